# SPDX-License-Identifier: Apache-2.0
"""LoCoCo's experiments: what ``cofire train lococo`` runs.

A decoder is trained with all its keys and values: on the handwritten digits as streams of pixels, whose class it reads at
the last one, or on source text. Each *cell* then reads the test with a cache, by one policy and of one size, as it is or
after its training in chunks through that cache. Each finished cell is in the results file, so an interrupted experiment goes
on where it stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cofire import data as datasets
from cofire import models
from cofire.data import Images, Text
from cofire.experiments import language, lococo_report, quantize_report, report, training
from cofire.experiments.files import Results, results_file, save_weights
from cofire.experiments.quantize import TEXT, Run, Task
from cofire.experiments.training import Advance, adamw, refuse_heads
from cofire.methods import LoCoCo
from cofire.methods.lococo import CompressingDecoder, backward, read
from cofire.models.decoder import RotaryAttention
from cofire.nn import FullCache, HeavyHitterCache, SlidingWindowCache, SnapKVCache
from cofire.nn.kv_cache import KVCache

DIGITS, BOTH = "digits", "both"
LEVELS = 17  #: of a pixel of scikit-learn's digits
JITTER = 1.5  #: levels, the standard deviation of what training adds


@dataclass(frozen=True)
class Cell:
    """One way to read: by which policy, and whether after training through its cache."""

    name: str
    policy: str
    trained: bool = False
    capacity: int | None = None  #: None: the plan's
    bptt: int | None = None  #: None: the plan's


FULL, WINDOW, HEAVY, LATEST, SNAP, LOCOCO = "full", "window", "heavy hitters", "latest scores", "snap", "lococo"
#: Every seed has these.
CELLS = (
    Cell("full cache", FULL),
    Cell("window", WINDOW),
    Cell("heavy hitters, summed scores", HEAVY),
    Cell("heavy hitters, latest scores", LATEST),
    Cell("heavy hitters, latest scores, trained alike", LATEST, trained=True),
    Cell("SnapKV", SNAP),
    Cell("LoCoCo", LOCOCO, trained=True),
)


@dataclass(frozen=True)
class Plan:
    """The network, how it is trained with the full cache, and how through the small one."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    epochs: int  #: of the first training: over the images, or rounds of ``steps`` steps on text
    batch: int
    lr: float
    capacity: int
    chunk: int
    taps: int
    capacities: tuple[int, ...]  #: of the plot, first seed
    updates: int
    update_batch: int
    update_lr: float  #: falls to zero, on a line or as a cosine
    trained: tuple[str, ...]  #: names of what is trained beside the fusions
    weight_decay: float
    cells: tuple[Cell, ...] = CELLS
    keep: float = 0.5
    local: int = 0  #: of ``capacity``, and as large a share of other sizes
    buffer: int = 0
    normalize: bool = False
    std: float = 1.0
    bptt: int = 1
    fusion_rate: float = 1000.0
    other_rate: float = 5.0
    cosine: bool = False
    warm_up: int = 0  #: updates in which the rate rises
    clip: float | None = None  #: of the norm of each group's gradients
    sinks: int = 4
    steps: int = 50  #: text only: of a round
    context: int = 1024  #: text only
    windows: int = 32  #: text only: of the test, each of ``context`` characters
    #: Train without a share of the training data and score on it, so that a setting is chosen without the test.
    validate: bool = False


STREAM = Plan(
    width=64, depth=2, heads=2, kv_heads=2, epochs=40, batch=32, lr=3e-3, capacity=12, chunk=8, taps=5,
    capacities=(6, 12, 24), updates=1000, update_batch=32, update_lr=1e-3, trained=("norm",),
    weight_decay=0.05, buffer=16, std=0.1, bptt=9, fusion_rate=50.0, cosine=True, warm_up=50, clip=1.0,
)  # fmt: skip
CHARACTERS = Plan(
    width=128, depth=4, heads=4, kv_heads=2, epochs=9, batch=2, lr=3e-3, capacity=64, chunk=64, taps=9,
    capacities=(32, 64, 128), updates=60, update_batch=4, update_lr=2e-4, trained=("norm", "embed"),
    weight_decay=0.01, local=16, normalize=True,
)  # fmt: skip


def experiment(
    data: str = DIGITS,
    seeds: int = 3,
    *,
    out: Path,
    plan: Plan | None = None,
    weights: Path | None = None,
    progress: Any = None,
) -> Results:
    """Train the networks, read with every cache that ``out`` does not have yet, and judge them.

    Args:
        data: ``"digits"`` or ``"text"``.
        seeds: every cell runs with seeds 0 to ``seeds - 1``, the further sizes of the plot with seed 0.
        out: folder for ``results.json`` and the weights.
        plan: how to train; None: as fits the data.
        weights: a ``state_dict`` of the network to start from instead of random weights.
        progress: a ``rich.progress.Progress`` to report to, or None.

    Raises:
        ValueError: a value out of range, weights that do not fit, or ``out`` holds another experiment.
    """
    if seeds < 1:
        raise ValueError(f"experiment: seeds must be at least 1, got {seeds}")
    if data not in (DIGITS, TEXT):
        raise ValueError(f"experiment: lococo's data is {DIGITS} or {TEXT}, got {data!r}")
    plan = plan or (STREAM if data == DIGITS else CHARACTERS)
    if not 0 < plan.update_lr < math.inf:
        raise ValueError(f"experiment: lr must be a positive number, got {plan.update_lr:g}")
    run = _Run(data, seeds, plan, out, weights, progress)
    for seed in range(seeds):
        run.dense(seed, plan.epochs)
        for cell in plan.cells:
            run.cell(cell, seed)
    for cell in sizes(plan):
        run.cell(cell, 0)
    run.growth()
    run.results["criteria"] = [asdict(c) for c in lococo_report.criteria(run.results)]
    run.save()
    return run.results


def sizes(plan: Plan) -> list[Cell]:
    """The further cells of the plot, at every other size: LoCoCo, and the controls as they are."""
    return [
        replace(cell, name=f"{cell.name}, {capacity} tokens", capacity=capacity)
        for capacity in plan.capacities
        if capacity != plan.capacity
        for cell in plan.cells
        if cell.policy == LOCOCO or (cell.policy in (WINDOW, HEAVY, LATEST) and not cell.trained)
    ]


# ----------------------------------------------------------------------------------------------------------- tasks


class Stream(nn.Module):
    """A decoder of pixels, for images that hold tokens; in training their levels are uncertain."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1).round().long()
        output: Tensor = self.model(jittered(tokens) if self.training else tokens)
        return output


def jittered(tokens: Tensor) -> Tensor:
    """Levels off by about one at random: to a network that embeds each by itself, near levels are else as strange as far."""
    noise = (JITTER * torch.randn(tokens.shape)).round().long()
    return torch.where(tokens < LEVELS, (tokens + noise).clamp(0, LEVELS - 1), tokens)


class Pixels(Task):
    """The class of a digit, read after its last pixel."""

    unit = quantize_report.ACCURACY

    def __init__(self, images: Images, plan: Plan) -> None:
        self.plan, self.classes = plan, len(images.classes)
        train, test = tokens_of(images.train), tokens_of(images.test)
        # A deviation of one level, so that what is "normalised" are the tokens themselves.
        self.images = replace(images, train=train, test=test, mean=(0.0,), std=(1 / 255,), augment=False)
        self.length = self.images.train.shape[-1]
        self.condition, self.name = images.condition, images.name

    def network(self) -> nn.Module:
        plan = self.plan
        sizes = {"width": plan.width, "depth": plan.depth, "heads": plan.heads, "kv_heads": plan.kv_heads}
        return models.decoder(LEVELS + 1, classes=self.classes, **sizes)

    def train(self, model: nn.Module, seed: int, advance: Advance) -> None:
        plan = self.plan
        groups = [{"params": list(model.parameters()), "lr": plan.lr, "weight_decay": plan.weight_decay}]
        options: dict[str, Any] = {"epochs": plan.epochs, "batch": plan.batch, "seed": seed, "make": adamw}
        training.fit(Stream(model), self.images, groups, warm_up=20, advance=advance, **options)

    def score(self, model: nn.Module) -> float:
        return training.accuracy(Stream(model), self.images)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Without an end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for x, y in self.images.batches(self.plan.update_batch, generator):
                yield jittered(x.flatten(1).round().long()), y


class Characters(Task):
    """The next character."""

    unit = quantize_report.BITS

    def __init__(self, text: Text, plan: Plan) -> None:
        self.text, self.plan, self.length = text, plan, plan.context
        self.condition, self.name = text.condition, text.name

    def network(self) -> nn.Module:
        plan = self.plan
        sizes = {"width": plan.width, "depth": plan.depth, "heads": plan.heads, "kv_heads": plan.kv_heads}
        return models.decoder(len(self.text.vocabulary), **sizes)

    def train(self, model: nn.Module, seed: int, advance: Advance) -> None:
        plan = self.plan
        options: dict[str, Any] = {"rounds": plan.epochs, "steps": plan.steps, "batch": plan.batch, "lr": plan.lr}
        options |= {"context": plan.context, "weight_decay": plan.weight_decay, "seed": seed}
        language.fit(model, self.text, advance=advance, **options)

    def score(self, model: nn.Module) -> float:
        return language.bits_per_character(
            model, self.text, context=self.plan.context, windows=self.plan.windows, batch=16
        )

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Without an end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.text.batch(self.plan.update_batch, self.plan.context, generator)[0], None


def tokens_of(images: Tensor) -> Tensor:
    """uint8 ``[N, 1, h, w]`` of 0 to 255 as uint8 ``[N, 1, 1, 1 + h w]``: a token that begins, and the pixels' levels."""
    levels = (images.flatten(1).float() * ((LEVELS - 1) / 255)).round().to(torch.uint8)
    return torch.nn.functional.pad(levels, (1, 0), value=LEVELS)[:, None, None]


# --------------------------------------------------------------------------------------------------------- policies


def new_cache(policy: str, prepared: CompressingDecoder, sinks: int = 4) -> KVCache:
    """An empty cache of a policy, of the size of the prepared decoder's."""
    m = prepared.method
    if policy == LOCOCO:
        return prepared.new_cache()
    options: dict[str, Any] = {"chunk": m.chunk, "bptt": m.bptt > 1}
    if policy == FULL:
        return FullCache(**options)
    options |= {"buffer": m.buffer, "normalize": m.normalize}
    if policy == WINDOW:
        return SlidingWindowCache(m.capacity, sinks=min(sinks, m.capacity // 2), **options)
    if policy == SNAP:
        return SnapKVCache(m.capacity, window=max(m.capacity // 4, 1), **options)
    if policy == LATEST:  # what LoCoCo does with a gate at 0
        options |= {"recent": m.local, "accumulate": False}
    return HeavyHitterCache(m.capacity, **options)


class Reader(nn.Module):
    """A decoder that reads in chunks through a new cache each time, which it keeps to be looked at."""

    def __init__(self, model: nn.Module, make: Callable[[], KVCache], chunk: int) -> None:
        super().__init__()
        self.model, self.make, self.chunk = model, make, chunk
        self.cache = make()
        self.rows = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.cache, self.rows = self.make(), len(tokens)
        outputs = [read(self.model, piece, self.cache) for piece in tokens.split(self.chunk, 1)]
        return outputs[-1] if outputs[-1].dim() == 2 else torch.cat(outputs, 1)

    def sizes(self) -> Results:
        """Bytes for a row of the last batch: of what the cache holds at the end, and of what it has allocated."""
        held = sum(sum(x.nbytes for x in layer.held) for layer in self.cache.layers)
        kept = (x for layer in self.cache.layers for x in (layer.scores, layer.queries))
        held += sum(x.nbytes for x in kept if x is not None)
        return {"held_bytes": held / self.rows, "allocated_bytes": self.cache.bytes / self.rows}


# ------------------------------------------------------------------------------------------------------------- run


class _Run(Run):
    task: Pixels | Characters

    def __init__(self, data: str, seeds: int, plan: Plan, out: Path, weights: Path | None, progress: Any) -> None:
        self.plan = plan
        found = datasets.load_text() if data == TEXT else datasets.load(data, seed=0)
        found = found.validation() if plan.validate else found
        task = Characters(found, plan) if isinstance(found, Text) else Pixels(found, plan)
        settings: Results = {"method": "lococo", "data": task.name, "condition": task.condition, "unit": task.unit}
        settings |= {"length": task.length, "plan": asdict(plan)}
        units = seeds * (plan.epochs + len(plan.cells)) + len(sizes(plan))
        super().__init__(settings, task, seeds, out, weights, progress, units, plan.validate)

    def method(self, cell: Cell) -> LoCoCo:
        plan = self.plan
        capacity = cell.capacity or plan.capacity
        return LoCoCo(
            capacity=capacity, keep=plan.keep, taps=plan.taps, local=plan.local * capacity // plan.capacity,
            buffer=plan.buffer, chunk=plan.chunk, std=plan.std, normalize=plan.normalize, bptt=cell.bptt or plan.bptt,
            trained=plan.trained, fusion_rate=plan.fusion_rate, other_rate=plan.other_rate,
        )  # fmt: skip

    def cell(self, cell: Cell, seed: int) -> None:
        """Train one cell where it is to be, and measure it."""
        if not self.missing(seed, cell=cell.name):
            return self.advance(1, f"{cell.name}, seed {seed}: found")
        start = time.perf_counter()
        method = self.method(cell)
        torch.manual_seed(seed)
        prepared = method.prepare(self.network(seed))
        row: Results = {"cell": cell.name, "seed": seed, "policy": cell.policy, "trained": cell.trained}
        row["capacity"] = None if cell.policy == FULL else method.capacity
        reader = Reader(prepared.model, lambda: new_cache(cell.policy, prepared, self.plan.sinks), method.chunk)
        if cell.trained:
            row |= self.fit(cell, method, prepared, seed)
        row["score"] = self.task.score(reader)
        row |= reader.sizes()
        config = prepared.model
        row["full_bytes"] = _bytes_of_a_token(config) * self.task.length
        if cell.policy == LOCOCO:
            x = next(self.task.batches(seed))[0]
            found = method.report(prepared, [x[:1]])
            row |= {key: found[key] for key in ("gates", "prompt_flops", "model_flops", "fusion_parameters")}
            row["gates"] = list(found.gates)
            save_weights(self.out / f"weights/{cell.name.replace(', ', '-').replace(' ', '-')}-{seed}.pt", prepared)
        row["seconds"] = time.perf_counter() - start
        self.results["cells"].append(row)
        self.save()
        self.advance(1, f"{cell.name}, seed {seed}: {row['score']:.2f}")

    def fit(self, cell: Cell, method: LoCoCo, prepared: CompressingDecoder, seed: int) -> Results:
        """Train in chunks through the cell's cache; the losses of the first and the last tenth of the updates."""
        plan = self.plan
        groups = method.parameter_groups(prepared, plan.update_lr)
        groups = [g for g in groups if cell.policy == LOCOCO or g["name"] != "fusion"]
        optimizer = torch.optim.AdamW(groups, fused=True)
        peaks = [group["lr"] for group in groups]
        losses = []
        prepared.train()
        for step, (tokens, target) in zip(range(plan.updates), self.task.batches(seed + 1)):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share_of_rate(plan, step)
            optimizer.zero_grad(set_to_none=True)
            cache = new_cache(cell.policy, prepared, plan.sinks)
            losses.append(backward(prepared.read, cache, method.chunk, method.bptt, tokens, target))
            if plan.clip is not None:
                for group in optimizer.param_groups:
                    nn.utils.clip_grad_norm_(group["params"], plan.clip)
            optimizer.step()
            method.step(prepared)
        tenth = max(plan.updates // 10, 1)
        first, last = (float(torch.stack(part).mean()) for part in (losses[:tenth], losses[-tenth:]))
        return {"first_loss": first, "last_loss": last}

    @torch.no_grad()
    def growth(self) -> None:
        """Bytes of LoCoCo's cache after the task's length, and after four times as much."""
        if "growth" in self.results:
            return
        cell = next((c for c in self.plan.cells if c.policy == LOCOCO), None)
        if cell is None:
            return
        prepared = self.method(cell).prepare(self.network(0))
        x = next(self.task.batches(0))[0][:1]
        cache, found = prepared.new_cache(), []
        for times in range(4):
            prepared(x, cache)
            if times in (0, 3):
                found.append([cache.seen, cache.bytes])
        self.results["growth"] = found
        self.save()


def share_of_rate(plan: Plan, step: int) -> float:
    """Of the peak, at an update of the training through the cache."""
    done = step / plan.updates
    fallen = 0.5 * (1 + math.cos(math.pi * done)) if plan.cosine else 1 - done
    return fallen * min(1.0, (step + 1) / max(plan.warm_up, 1))


def _bytes_of_a_token(model: nn.Module) -> int:
    """Of the keys and values of all layers."""
    attentions = [m for m in model.modules() if isinstance(m, RotaryAttention)]
    return sum(2 * m.k_proj.out_features * m.k_proj.weight.element_size() for m in attentions)


# --------------------------------------------------------------------------------------------------------- command


def command(
    *,
    data: str = BOTH,
    model: str | None = None,
    weights: Path | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    head_lr: float | None = None,
    lr: float | None = None,
    validate: bool = False,
    out: Path = Path("runs"),
) -> None:
    """``cofire train lococo``: run both experiments, or one; print tables and criteria, write results, tables and plots."""
    refuse_heads("lococo", epochs, head_lr, "the training through the cache")
    if model not in (None, "decoder"):
        raise ValueError(f"experiment: the network of lococo is decoder, got {model!r}")
    if data not in (DIGITS, TEXT, BOTH):
        raise ValueError(f"experiment: lococo's data is {DIGITS}, {TEXT} or {BOTH}, got {data!r}")
    if weights is not None and data == BOTH:
        raise ValueError(f"experiment: weights fit one network; give --data {DIGITS} or --data {TEXT}")
    for one in (DIGITS, TEXT) if data == BOTH else (data,):
        plan = replace(STREAM if one == DIGITS else CHARACTERS, validate=validate)
        if epochs is not None:
            plan = replace(plan, epochs=epochs)
        if lr is not None:
            plan = replace(plan, update_lr=lr)
        _show(one, seeds, out / f"lococo-decoder-{one}", plan, weights)


def _show(data: str, seeds: int, folder: Path, plan: Plan, weights: Path | None) -> None:
    report.show(
        lococo_report,
        results_file(folder, plan.validate),
        lambda progress: experiment(data, seeds, out=folder, plan=plan, weights=weights, progress=progress),
    )
