# SPDX-License-Identifier: Apache-2.0
"""The demonstration: what ``cofire demo`` and ``make demo`` run. Every figure it prints was measured in that run."""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cofire import data, models
from cofire.experiments import report, training
from cofire.experiments.environment import cpu_name
from cofire.experiments.latency import latency
from cofire.files import write_atomically
from cofire.methods import FTWT
from cofire.methods.ftwt import random_masks
from cofire.nn.gating import DeployedGatedConv2d


@dataclass(frozen=True)
class Settings:
    """The network and how long it trains: about two minutes on two cores."""

    layers: tuple[int | str, ...] = (32, "pool", 128, 256, 256)
    size: int = 24  #: pixels; at 8x8 a convolution takes microseconds, and there is nothing to gain
    dense_epochs: int = 4
    gated_epochs: int = 6
    batch: int = 16
    mass: float = 0.8
    cooldown: float = 0.7
    head_lr: float = 30.0
    images: int | None = None
    validate: bool = False  #: score on a share of the training images; for choosing the settings above
    bench: bool = True


def main(out: Path = Path("report"), settings: Settings | None = None) -> dict[str, Any]:
    """Train, gate and time a network, time the operators, and write a page with plots to ``out``."""
    from rich.console import Console

    from cofire.info import print_table

    console = Console()
    settings = settings or Settings()
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    console.rule("The operators, and what runs them on this machine")
    print_table()
    console.rule("A network that computes only the channels each image needs")
    result = _network(console, settings)
    _print_network(console, result)
    results = None
    if settings.bench:
        console.rule("The operators against the strongest plain torch")
        results = _operators(console, out)
    page = _write_page(out, result, results)
    console.print(f"Took {time.perf_counter() - start:.0f} s. The same as a page, with plots: {page}")
    return result


# ------------------------------------------------------------------------------------------------ the network


def _network(console: Any, settings: Settings) -> dict[str, Any]:
    """Train the dense network, gate it, and measure both."""
    images = data.load("digits", size=settings.size)
    images = (images.validation() if settings.validate else images).subset(settings.images)
    steps = training.steps_per_epoch(images, settings.batch) * settings.gated_epochs
    method = FTWT(mass=settings.mass, cooldown=settings.cooldown, total_steps=steps)
    torch.manual_seed(0)
    dense = models.vgg(settings.layers, in_channels=1)
    console.print(
        f"{images.condition} Trained here and now: the dense network, then the same with gates.", highlight=False
    )
    with report.progress_bar(console) as progress:
        task = progress and progress.add_task("training", total=settings.dense_epochs + settings.gated_epochs)

        def fit(model: nn.Module, what: str, groups: Any, epochs: int, method: FTWT | None = None) -> None:
            def advance(note: str) -> None:
                if progress is not None:
                    progress.update(task, advance=1, description=f"{what}, {note}")

            training.fit(
                model, images, groups, epochs=epochs, batch=settings.batch, seed=0, method=method, advance=advance
            )

        groups = [{"params": dense.parameters(), "lr": 0.02, "weight_decay": 5e-4}]
        fit(dense, "dense", groups, settings.dense_epochs)
        estimate = method.estimate_flops(dense, [images.normalize(images.train[:128])])
        gated = method.prepare(dense)
        groups = method.parameter_groups(gated, lr=0.01, head_lr=settings.head_lr)
        fit(gated, "gated", groups, settings.gated_epochs, method)
    gains = method.report(gated, [x for x, _ in images.test_batches(128)])
    deployed = method.finalize(gated)
    with random_masks(gated):
        random = training.accuracy(gated, images)
    return {
        "condition": images.condition,
        "part": images.part,
        "layers": " ".join(map(str, settings.layers)),
        "mass": settings.mass,
        "epochs": [settings.dense_epochs, settings.gated_epochs],
        "dense_accuracy": training.accuracy(dense, images),
        "gated_accuracy": training.accuracy(gated, images),
        "random_accuracy": random,
        "deployed_accuracy": training.accuracy(deployed, images),
        "estimated_cut": estimate.exact.reduction,
        "dense_macs": gains.exact.dense,
        "gated_macs": gains.exact.gated,
        "cut": gains.exact.reduction,
        "mask_accuracy": gains.mask_accuracy,
        "kept": {layer.name: layer.kept for layer in gains.layers if layer.gated},
        "latency": latency(
            "gated",
            method.dense(gated),
            deployed,
            images.normalize(images.test[:1]),
            DeployedGatedConv2d,
        ),
    }


def _sentences(result: dict[str, Any]) -> list[str]:
    timing = result["latency"]
    change = result["deployed_accuracy"] - result["dense_accuracy"]
    return [
        f"The dense network trained for {result['epochs'][0]} epochs, the gated one, from its weights, for "
        f"{result['epochs'][1]} more.",
        f"The gated network does {result['cut']:.0%} fewer multiply-accumulates than the dense one (heads included; "
        f"{result['estimated_cut']:.0%} was the estimate before its heads were trained), and its accuracy differs by "
        f"{change:+.2f} points.",
        f"With as many channels per layer and image, but random ones, accuracy is {result['random_accuracy']:.2f} %; "
        f"the trained heads' {result['deployed_accuracy']:.2f} % is what choosing them is worth.",
        f"One image takes {timing['gated_ms']:.3f} ms instead of {timing['dense_ms']:.3f} ms on this machine with "
        f"{timing['threads']} threads: {timing['speedup']:.2f}x. The dense network is the fastest of "
        f"{', '.join(_dense_forms(timing))}; medians of runs in turns.",
    ]


def _dense_forms(timing: dict[str, Any]) -> list[str]:
    times = timing["candidates_ms"]
    return [f"{name.removeprefix('dense ')} ({ms:.3f} ms)" for name, ms in times.items() if name.startswith("dense")]


def _network_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    timing = result["latency"]
    dense, gated = (f"{result[key] / 1e6:.1f} M" for key in ("dense_macs", "gated_macs"))
    rows = [
        ["dense", f"{result['dense_accuracy']:.2f}", dense, f"{timing['dense_ms']:.3f}"],
        ["gated, deployed", f"{result['deployed_accuracy']:.2f}", gated, f"{timing['gated_ms']:.3f}"],
        ["random masks, as many channels", f"{result['random_accuracy']:.2f}", gated, ""],
    ]
    return ["network", f"{result['part']} accuracy %", "MACs", "ms per image (batch 1)"], rows


def _layer_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            layer["name"],
            f"{result['kept'][layer['name']]:.0%}",
            f"{layer['dense_ms']:.3f}",
            f"{layer['gated_ms']:.3f}",
            f"{layer['dense_ms'] / layer['gated_ms']:.2f}x",
        ]
        for layer in result["latency"]["layers"]
    ]
    return ["gated layer", "channels kept", "dense ms", "gated ms, with head", "speed-up"], rows


def _print_network(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    for header, rows in (_network_table(result), _layer_table(result)):
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence in _sentences(result):
        console.print(sentence, highlight=False)


# ---------------------------------------------------------------------------------------------- the operators


def _operators(console: Any, out: Path) -> Any:
    from cofire import bench

    results = bench.run(families=["gating"], quick=True, out=out / "operators.json", progress=console.is_terminal)
    console.print(results.summary(), highlight=False)
    return results


# -------------------------------------------------------------------------------------------------- the page


def _plot_layers(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    layers = result["latency"]["layers"]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    at = range(len(layers))
    axes.bar([i - 0.2 for i in at], [layer["dense_ms"] for layer in layers], 0.4, label="dense", color="0.6")
    axes.bar([i + 0.2 for i in at], [layer["gated_ms"] for layer in layers], 0.4, label="gated", color="tab:orange")
    axes.set_xticks(list(at), [f"{x['name']}\n{result['kept'][x['name']]:.0%} kept" for x in layers])
    axes.set(ylabel="ms at batch 1")
    axes.legend()
    figure.savefig(path, dpi=120)


def _plot_accuracy(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    timing = result["latency"]
    for name, ms, key, marker in (
        ("dense", timing["dense_ms"], "dense_accuracy", "k*"),
        ("gated", timing["gated_ms"], "deployed_accuracy", "o"),
        ("random masks, as many channels", timing["gated_ms"], "random_accuracy", "x"),
    ):
        axes.plot([ms], [result[key]], marker, label=name, markersize=9)
    axes.set(xlabel="ms at batch 1", ylabel=f"{result['part']} accuracy (%)", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _image(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{path.stem}" src="data:image/png;base64,{content}"></p>'


def _write_page(out: Path, result: dict[str, Any], results: Any) -> Path:
    """Plots as PNG and one HTML page that needs no other file; without matplotlib, the page has no plots."""
    pictures = []
    try:
        for name, plot in (("accuracy", _plot_accuracy), ("layers", _plot_layers)):
            plot(result, out / f"{name}.png")
            pictures.append(_image(out / f"{name}.png"))
    except ModuleNotFoundError:
        pictures.append("<p>Plots need matplotlib: pip install 'cofire[report]'.</p>")
    parts = [
        "<!doctype html><meta charset='utf-8'><title>cofire: demonstration</title>",
        "<style>body{font:16px/1.5 system-ui;max-width:50rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{border:1px solid #8884;padding:.2rem .6rem;text-align:left}"
        "img,svg{max-width:100%}</style>",
        "<h1>cofire</h1><h2>A network that computes only the channels each image needs</h2>",
        f"<p>{html.escape(result['condition'])} Network: 3x3 convolutions of {html.escape(result['layers'])} channels; "
        f"gates for {result['mass']:.0%} of each layer's activation mass; {html.escape(cpu_name())}, "
        f"{result['latency']['threads']} threads, torch {torch.__version__}.</p>",
        _html_table(*_network_table(result)),
        *(f"<p>{html.escape(sentence)}</p>" for sentence in _sentences(result)),
        _html_table(*_layer_table(result)),
        *pictures,
    ]
    if results is not None:
        parts += ["<h2>The operators</h2>", f"<pre>{html.escape(results.summary())}</pre>", _speedups(results)]
    page = out / "index.html"
    write_atomically(page, "\n".join(parts))
    return page


def _speedups(results: Any) -> str:
    from cofire.bench.report import speedup_plot

    try:
        return speedup_plot(results.rows) or ""
    except ModuleNotFoundError:
        return ""
