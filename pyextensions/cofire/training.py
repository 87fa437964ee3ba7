# SPDX-License-Identifier: Apache-2.0
"""Training loop and experiments: what ``cofire train METHOD`` runs.

An experiment is a grid of *cells* (budget, seed). Each finished cell is in the results file, with its weights in
a file beside it, so an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import data as datasets
from cofire import models
from cofire.data import Images
from cofire.methods import FTWT, Method
from cofire.methods.ftwt import random_masks
from cofire.nn.gating import DeployedGatedConv2d, Gated
from cofire.version import __version__

Results = dict[str, Any]
Advance = Callable[[str], None]  #: called after each epoch with what is being trained


# ---------------------------------------------------------------------------------------------------- training


def fit(
    model: nn.Module,
    images: Images,
    groups: Iterable[Mapping[str, Any]],
    *,
    epochs: int,
    batch: int,
    seed: int,
    method: Method | None = None,
    advance: Advance | None = None,
) -> None:
    """Train by SGD with momentum 0.9; the first parameter group's rate falls to zero as a cosine, the others' stay."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([dict(group) for group in groups], momentum=0.9, nesterov=True)
    peak = optimizer.param_groups[0]["lr"]
    steps, total = 0, epochs * steps_per_epoch(images, batch)
    for _ in range(epochs):
        model.train()
        for x, y in images.batches(batch, generator):
            optimizer.param_groups[0]["lr"] = peak * 0.5 * (1 + math.cos(math.pi * steps / total))
            output = model(x)
            loss = F.cross_entropy(output, y)
            if method is not None:
                loss = loss + method.loss(model, output, y)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            if method is not None:
                method.step(model)
            steps += 1
        if advance is not None:
            advance(f"loss {loss.item():.3f}")


def steps_per_epoch(images: Images, batch: int) -> int:
    full, rest = divmod(len(images.train), batch)
    return full + (rest > 1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, batch: int = 256) -> float:
    """Per cent of the test images classified correctly."""
    model.eval()
    correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in images.test_batches(batch))
    return 100 * correct / len(images.test_labels)


# ---------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Budget:
    """One setting of the method and the number of seeds that it is run with (None: all)."""

    mass: float
    coupling: str = "decoupled"
    seeds: int | None = None

    @property
    def name(self) -> str:
        return f"{self.coupling} {self.mass:g}"


@dataclass(frozen=True)
class Plan:
    """How an experiment trains. Epochs are passes over the training images; rates are those of SGD."""

    model: str
    budgets: tuple[Budget, ...]
    dense_epochs: int
    gated_epochs: int
    batch: int
    dense_lr: float
    gated_lr: float
    #: 0.1 in the paper, over some 39,000 steps. The softmax divides the heads' gradients by about the number of
    #: channels, so that in a few hundred steps they learn with a hundred times that rate only.
    head_lr: float = 10.0
    cooldown: float = 0.5
    weight_decay: float = 5e-4
    images: int | None = None  #: train on a fixed subset of this many
    test_images: int | None = None  #: test on the first so many
    counted: int = 2000  #: test images on which multiply-accumulates and masks are counted


DIGITS = Plan(
    model="digits_cnn",
    budgets=tuple(Budget(mass) for mass in (1.0, 0.95, 0.9, 0.8)),
    dense_epochs=30,
    gated_epochs=30,
    batch=32,
    dense_lr=0.05,
    gated_lr=0.01,
)
#: For a network that starts from given weights.
PRETRAINED = Plan(
    model="resnet20",
    budgets=(Budget(0.93), Budget(0.97, seeds=1), Budget(0.88, seeds=1), Budget(0.93, "joint", seeds=1)),
    dense_epochs=2,
    gated_epochs=4,
    batch=32,
    dense_lr=0.02,
    gated_lr=0.01,
    images=4_000,
    test_images=5_000,
)


# -------------------------------------------------------------------------------------------------- experiment


def experiment(
    method: str = "ftwt",
    data: str | Path = "digits",
    seeds: int = 3,
    *,
    out: Path,
    plan: Plan | None = None,
    weights: Path | None = None,
    progress: Any = None,
) -> Results:
    """Train the dense baseline and the method's cells, time them, and return the results, also written to ``out``.

    Args:
        method: ``"ftwt"``.
        data: ``"digits"`` or a folder (:func:`cofire.data.load`).
        seeds: repeats; each draws its own split (where the data has none), initial weights and order.
        out: folder for ``results.json`` and the weights. What it holds of the same experiment is not run again.
        plan: how to train; None: the one for the data.
        weights: a ``state_dict`` to start from instead of random weights.
        progress: a ``rich.progress.Progress`` to report to, or None.

    Raises:
        ValueError: a method without experiment, weights that do not fit, or ``out`` holds another experiment.
    """
    if method != "ftwt":
        raise ValueError(f"experiment: method must be 'ftwt', got {method!r}")
    if seeds < 1:
        raise ValueError(f"experiment: seeds must be at least 1, got {seeds}")
    plan = plan or (DIGITS if str(data) == "digits" else PRETRAINED)
    run = _Run(data, seeds, plan, out, weights, progress)
    for seed in range(seeds):
        run.dense(seed)
        for budget in plan.budgets:
            if seed < (budget.seeds or seeds):
                run.gated(budget, seed)
    run.time_cells()
    run.results["criteria"] = [asdict(c) for c in criteria(run.results)]
    run.save()
    return run.results


class _Run:
    """One experiment under way: its results so far, and how to make the next."""

    def __init__(
        self, data: str | Path, seeds: int, plan: Plan, out: Path, weights: Path | None, progress: Any
    ) -> None:
        self.data, self.plan, self.out, self.progress = data, plan, out, progress
        self.weights = None if weights is None else read_weights(weights)
        self._images: dict[int, Images] = {}
        images = self.images(0)
        settings = {
            "method": "ftwt",
            "data": images.name,
            "condition": images.condition,
            "seeds": seeds,
            "weights": None if weights is None else weights.name,
            "plan": json.loads(json.dumps(asdict(plan))),
        }
        out.mkdir(parents=True, exist_ok=True)
        self.results: Results = {"environment": _environment(), "settings": settings, "dense": [], "cells": []}
        path = out / "results.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("settings") != settings:
                raise ValueError(f"experiment: {path} holds another experiment; give an empty folder")
            self.results = found
        cells = sum(min(budget.seeds or seeds, seeds) for budget in plan.budgets)
        epochs = seeds * (plan.dense_epochs + plan.gated_epochs) + cells * plan.gated_epochs
        self.task = None if progress is None else progress.add_task("training", total=epochs)

    def save(self) -> None:
        write_atomically(self.out / "results.json", json.dumps(self.results, indent=2))

    def images(self, seed: int) -> Images:
        """Drawn anew per seed where the data has no split of its own."""
        key = seed if str(self.data) == "digits" else 0
        if key not in self._images:
            images = datasets.load(self.data, seed=key)
            self._images[key] = images.subset(self.plan.images, self.plan.test_images)
        return self._images[key]

    def network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        images = self.images(seed)
        return models.build(self.plan.model, in_channels=images.train.shape[1], num_classes=len(images.classes))

    def method(self, budget: Budget, seed: int) -> FTWT:
        steps = self.plan.gated_epochs * steps_per_epoch(self.images(seed), self.plan.batch)
        return FTWT(mass=budget.mass, coupling=budget.coupling, cooldown=self.plan.cooldown, total_steps=steps)

    # ------------------------------------------------------------------------------------------------ cells

    def dense(self, seed: int) -> None:
        """The baseline, and the control that goes on training for as long as the gated networks do."""
        plan, images = self.plan, self.images(seed)
        if any(found["seed"] == seed for found in self.results["dense"]):
            return self._advance(plan.dense_epochs + plan.gated_epochs, f"dense, seed {seed}: found")
        start = time.perf_counter()
        model = self.network(seed)
        row: Results = {"seed": seed}
        if self.weights is not None:
            load_weights(model, self.weights)
            row["given"] = accuracy(model, images)

        def train(epochs: int, lr: float) -> float:
            groups = [{"params": model.parameters(), "lr": lr, "weight_decay": plan.weight_decay}]
            advance = self._each(f"dense, seed {seed}")
            fit(model, images, groups, epochs=epochs, batch=plan.batch, seed=seed, advance=advance)
            return accuracy(model, images)

        row["accuracy"] = train(plan.dense_epochs, plan.dense_lr)
        save_weights(self.out / _dense_file(seed), model)
        row["continued"] = train(plan.gated_epochs, plan.gated_lr)
        row["seconds"] = time.perf_counter() - start
        self.results["dense"].append(row)
        self.save()

    def gated(self, budget: Budget, seed: int) -> None:
        """One cell: estimate, train, compare with random masks, count."""
        plan, images = self.plan, self.images(seed)
        if any((c["budget"], c["seed"]) == (budget.name, seed) for c in self.results["cells"]):
            return self._advance(plan.gated_epochs, f"{budget.name}, seed {seed}: found")
        start = time.perf_counter()
        dense = self.network(seed)
        load_weights(dense, read_weights(self.out / _dense_file(seed)))
        method = self.method(budget, seed)
        counted = [x for x, _ in images.subset(None, plan.counted).test_batches(250)]
        known = [images.normalize(images.train[:512])]
        estimate = method.estimate_flops(dense, known)
        model = method.prepare(dense)
        fit(
            model,
            images,
            method.parameter_groups(model, lr=plan.gated_lr, weight_decay=plan.weight_decay, head_lr=plan.head_lr),
            epochs=plan.gated_epochs,
            batch=plan.batch,
            seed=seed + 1,
            method=method,
            advance=self._each(f"{budget.name}, seed {seed}"),
        )
        report = method.report(model, counted)
        row = {
            "budget": budget.name,
            "mass": budget.mass,
            "coupling": budget.coupling,
            "seed": seed,
            "accuracy": accuracy(model, images),
            "random_accuracy": _random_accuracy(model, images, seed),
            "cut": report.exact.reduction,
            "cut_paper_rule": report.paper_rule.reduction,
            "estimated_cut": estimate.exact.reduction,
            "estimated_cut_paper_rule": estimate.paper_rule.reduction,
            "mask_accuracy": report.mask_accuracy,
            "fixed_mask_accuracy": fixed_mask_accuracy(model, counted),
            "kept": report.kept,
            "layers": [layer.as_dict() for layer in report.layers],
            "deployed_error": deployed_error(method, model, counted[0]),
            "seconds": time.perf_counter() - start,
        }
        save_weights(self.out / _cell_file(budget, seed), model)
        self.results["cells"].append(row)
        self.save()

    def time_cells(self) -> None:
        """Latency of the first seed's cells that have none yet, after all training so that nothing runs beside it."""
        for row in self.results["cells"]:
            if row["seed"] == 0 and "latency" not in row:
                budget = next(b for b in self.plan.budgets if b.name == row["budget"])
                method = self.method(budget, 0)
                model = method.prepare(self.network(0))
                load_weights(model, read_weights(self.out / _cell_file(budget, 0)))
                images = self.images(0)
                row["latency"] = latency(method, model, images.normalize(images.test[:1]))
                self.save()

    # --------------------------------------------------------------------------------------------- progress

    def _each(self, what: str) -> Advance:
        return lambda note: self._advance(1, f"{what}, {note}")

    def _advance(self, epochs: int, text: str) -> None:
        if self.progress is not None:
            self.progress.update(self.task, advance=epochs, description=text)


def _random_accuracy(model: nn.Module, images: Images, seed: int) -> float:
    """With as many channels per layer and sample as the heads keep, but random ones."""
    with random_masks(model, seed):
        return accuracy(model, images)


@torch.no_grad()
def fixed_mask_accuracy(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """The share of target bits that the best mask per layer gets right which is the same for all samples.

    It is chosen in hindsight on ``batches``, so heads that merely learn how often a channel is wanted stay below.
    """
    wanted: dict[Gated, Tensor] = {}
    samples = 0

    def count(gate: Gated, args: tuple[Any, ...]) -> None:
        wanted[gate] = wanted.get(gate, torch.zeros(())) + gate.examine(*args)[1].sum(0)

    hooks = [m.register_forward_pre_hook(count) for m in model.modules() if isinstance(m, Gated)]
    model.eval()
    for x in batches:
        model(x)
        samples += len(x)
    for hook in hooks:
        hook.remove()
    frequency = torch.cat(list(wanted.values())) / samples
    return float(torch.maximum(frequency, 1 - frequency).mean())


@torch.no_grad()
def deployed_error(method: FTWT, model: nn.Module, x: Tensor) -> float:
    """Largest difference between the deployed network and the trained one, relative to the largest output."""
    model.eval()
    expected = model(x)
    return float((method.finalize(model)(x) - expected).abs().max() / expected.abs().max())


# --------------------------------------------------------------------------------------------------- latency


def latency(method: FTWT, model: nn.Module, x: Tensor, pairs: int = 51) -> Results:
    """Medians in milliseconds on one input: the gated network against the fastest form of the dense one.

    Dense: batch norm folded; contiguous, channels_last, and with weights packed for oneDNN and activations fused.
    Gated: contiguous and channels_last. The candidates run in turn, so that a slow moment of the machine meets all of
    them; the best of each side counts.
    """
    candidates: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {}
    pixel_last = x.contiguous(memory_format=torch.channels_last)
    for side, network in (("dense", method.dense(model)), ("gated", method.finalize(model))):
        candidates[f"{side} contiguous"] = (network, x)
        candidates[f"{side} channels_last"] = (_channels_last(network), pixel_last)
    packed = _prepacked(method.dense(model), x)
    if packed is not None:
        candidates["dense prepacked"] = (packed, pixel_last)
    times = interleaved(candidates, pairs)
    middle = {name: 1e3 * median(taken) for name, taken in times.items()}
    best = {side: min((n for n in middle if n.startswith(side)), key=middle.__getitem__) for side in ("dense", "gated")}
    ratios = [d / g for d, g in zip(times[best["dense"]], times[best["gated"]], strict=True)]
    return {
        "dense_ms": middle[best["dense"]],
        "gated_ms": middle[best["gated"]],
        "speedup": median(ratios),
        "candidates_ms": middle,
        "shape": list(x.shape),
        "threads": torch.get_num_threads(),
        "layers": _layer_latency(method, model, x, best),
    }


def _channels_last(network: nn.Module) -> nn.Module:
    """A copy whose weights, and hence whose maps, hold the channels of a pixel side by side."""
    result = copy.deepcopy(network)
    for parameter in result.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return result


class _Prepacked(nn.Module):
    """A convolution with its weights in oneDNN's own layout and its activation fused, as a compiler would leave it."""

    def __init__(self, conv: nn.Conv2d, activation: str, shape: list[int]) -> None:
        super().__init__()
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *self.geometry, shape)
        self.bias = conv.bias
        self.activation = {"identity": ("none", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0])}[
            activation
        ]

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        convolution, (name, scalars) = torch.ops.mkldnn._convolution_pointwise, self.activation
        if residual is None:
            y: Tensor = convolution(input, self.weight, self.bias, *self.geometry, name, scalars, "")
            return y
        summed = (input, residual, self.weight, self.bias, *self.geometry, "add", 1.0, name, scalars, "")
        y = convolution.binary(*summed)
        return y


def _prepacked(network: nn.Module, x: Tensor) -> nn.Module | None:
    """The dense network with its gated layers' counterparts prepacked; None where torch has no oneDNN."""
    if not torch._C._has_mkldnn or x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    layers = {n: m for n, m in network.named_modules() if isinstance(getattr(m, "layer", None), nn.Conv2d)}
    inputs = _inputs(network, layers, x)
    for name, layer in layers.items():
        network.set_submodule(name, _Prepacked(layer.layer, layer.activation, list(inputs[name][0].shape)))
    return network


def _inputs(network: nn.Module, layers: Mapping[str, nn.Module], x: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """What each of ``layers`` gets when ``network`` runs on ``x``."""
    inputs: dict[str, tuple[Tensor, ...]] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.__setitem__(name, args)

    hooks = [layer.register_forward_pre_hook(remember(name)) for name, layer in layers.items()]
    with torch.inference_mode():
        network(x)
    for hook in hooks:
        hook.remove()
    return inputs


def interleaved(
    candidates: Mapping[str, tuple[Callable[[Tensor], Any], Tensor]], repeats: int, warmup: int = 10
) -> dict[str, list[float]]:
    """Seconds of each repeat; the candidates run one after the other within each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for repeat in range(warmup + repeats):
            for name, (function, x) in candidates.items():
                start = time.perf_counter()
                function(x)
                if repeat >= warmup:
                    times[name].append(time.perf_counter() - start)
    return times


def _layer_latency(method: FTWT, model: nn.Module, x: Tensor, forms: Mapping[str, str]) -> list[Results]:
    """Each gated layer, its head included, against the dense one, in the winning forms, on the input that it gets."""
    networks = {"dense": method.dense(model), "gated": method.finalize(model)}
    if forms["dense"] == "dense prepacked":
        networks["dense"] = _prepacked(networks["dense"], x) or networks["dense"]
    layout = {
        side: torch.contiguous_format if "contiguous" in form else torch.channels_last for side, form in forms.items()
    }
    layers = {name: m for name, m in networks["gated"].named_modules() if isinstance(m, DeployedGatedConv2d)}
    inputs = _inputs(networks["gated"], layers, x)
    rows = []
    for name in layers:
        runs = {}
        for side, network in networks.items():
            layer = network.get_submodule(name)
            if forms[side].endswith("channels_last"):
                layer = _channels_last(layer)
            first, *rest = (value.contiguous(memory_format=layout[side]) for value in inputs[name])
            runs[side] = (_with(layer, rest), first)
        times = interleaved(runs, 101)
        rows.append({"name": name, **{f"{side}_ms": 1e3 * median(taken) for side, taken in times.items()}})
    return rows


def _with(layer: nn.Module, rest: list[Tensor]) -> Callable[[Tensor], Any]:
    return lambda value: layer(value, *rest)


# -------------------------------------------------------------------------------------------------- criteria


@dataclass(frozen=True)
class Criterion:
    """One thing that the experiment has to show, what came out, and whether that is enough."""

    name: str
    found: str
    passed: bool | None  #: None: there is nothing to judge


def criteria(results: Results) -> list[Criterion]:
    """What the experiment has to show, judged on the means over the seeds."""
    rows = summary(results)
    checks = [_lossless(rows), _useful(rows), *_masks(rows), _estimate(rows), _exact(results), _fast(results)]
    return [check for check in checks if check is not None]


AVERAGED = (
    "accuracy",
    "random_accuracy",
    "cut",
    "cut_paper_rule",
    "estimated_cut",
    "mask_accuracy",
    "fixed_mask_accuracy",
)


def summary(results: Results) -> list[Results]:
    """One row per budget: means over its seeds. ``drop`` counts from the better of each seed's two dense trainings."""
    best = {row["seed"]: max(row["accuracy"], row["continued"]) for row in results["dense"]}
    names = dict.fromkeys(cell["budget"] for cell in results["cells"])
    rows = []
    for name in names:
        cells = [cell for cell in results["cells"] if cell["budget"] == name]
        row: Results = {key: mean(cell[key] for cell in cells) for key in AVERAGED}
        drops = [best[cell["seed"]] - cell["accuracy"] for cell in cells]
        row |= {"budget": name, "mass": cells[0]["mass"], "coupling": cells[0]["coupling"], "seeds": len(cells)}
        row |= {"drop": mean(drops), "worst_drop": max(drops)}
        row["estimate_error"] = max(abs(cell["estimated_cut"] - cell["cut"]) for cell in cells)
        row["latency"] = next((cell["latency"] for cell in cells if "latency" in cell), None)
        rows.append(row)
    return rows


def _lossless(rows: list[Results]) -> Criterion | None:
    row = next((r for r in rows if r["mass"] == 1), None)
    if row is None:
        return None
    found = f"{row['drop']:+.2f} points lost, {row['cut']:.1%} cut"
    return Criterion(
        "mass 1: at most 0.3 points lost, at least 10 % cut", found, row["drop"] <= 0.3 and row["cut"] >= 0.1
    )


def _useful(rows: list[Results]) -> Criterion:
    name = "some budget: at least 35 % cut, at most 1 point lost"
    deep = [r for r in rows if r["cut"] >= 0.35]
    if not deep:
        deepest = max(rows, key=lambda r: r["cut"])
        return Criterion(name, f"no cut above {deepest['cut']:.1%} ({deepest['budget']})", False)
    row = min(deep, key=lambda r: r["drop"])
    return Criterion(name, f"{row['budget']}: {row['cut']:.1%} cut, {row['drop']:+.2f} points lost", row["drop"] <= 1)


def _masks(rows: list[Results]) -> Iterator[Criterion]:
    # Where nearly everything is kept, random masks are as good: there is nothing to predict.
    masking = [r for r in rows if r["cut"] >= 0.1]
    lead = min(masking, key=lambda r: r["accuracy"] - r["random_accuracy"], default=None)
    if lead is None:
        yield Criterion("predicted masks beat random ones by 5 points", "no budget cuts 10 % or more", None)
    else:
        points = lead["accuracy"] - lead["random_accuracy"]
        yield Criterion(
            "predicted masks beat random ones by 5 points, at every cut of 10 % or more",
            f"least: {points:+.1f} points ({lead['budget']})",
            points >= 5,
        )
    worst = min(rows, key=lambda r: r["mask_accuracy"])
    found = f"least: {worst['mask_accuracy']:.1%} ({worst['budget']})"
    yield Criterion("mask bits predicted correctly: at least 85 %", found, worst["mask_accuracy"] >= 0.85)


def _estimate(rows: list[Results]) -> Criterion:
    worst = max(rows, key=lambda r: r["estimate_error"])
    found = f"at most {100 * worst['estimate_error']:.1f} points off ({worst['budget']})"
    return Criterion("cut estimated before training within 10 points", found, worst["estimate_error"] <= 0.1)


def _exact(results: Results) -> Criterion:
    worst = max(cell["deployed_error"] for cell in results["cells"])
    return Criterion("deployed network equals the trained one to 1e-5", f"{worst:.1e} relative", worst <= 1e-5)


def _fast(results: Results) -> Criterion:
    name = "gated layers take at most 0.8 of the dense time at batch 1, where the cut is 40 % or more"
    timed = [cell for cell in results["cells"] if "latency" in cell and cell["cut"] >= 0.4]
    if not timed:
        return Criterion(name, "no timed budget cuts 40 %", None)
    ratios = []
    for cell in timed:
        layers = cell["latency"]["layers"]
        ratio = sum(layer["gated_ms"] for layer in layers) / sum(layer["dense_ms"] for layer in layers)
        ratios.append((ratio, cell["budget"]))
    ratio, budget = max(ratios)
    return Criterion(name, f"at most {ratio:.2f} of the dense time ({budget})", ratio <= 0.8)


# ---------------------------------------------------------------------------------------------------- report

#: two tables, so that each fits a terminal of 80 columns
OUTCOME = ("budget", "seeds", "accuracy %", "points lost", "random masks %", "MACs cut")
DETAILS = (
    "budget",
    "paper's rule",
    "estimate",
    "mask bits right",
    "best fixed mask",
    "dense ms",
    "gated ms",
    "speed-up",
)


def outcome_rows(results: Results) -> Iterator[list[str]]:
    """What each budget costs and saves."""
    for row in summary(results):
        accuracy, lost, random = (f"{row[key]:{form}}" for key, form in _OUTCOME)
        yield [row["budget"], str(row["seeds"]), accuracy, lost, random, f"{row['cut']:.1%}"]


_OUTCOME = (("accuracy", ".2f"), ("drop", "+.2f"), ("random_accuracy", ".2f"))
_SHARES = ("cut_paper_rule", "estimated_cut", "mask_accuracy", "fixed_mask_accuracy")


def detail_rows(results: Results) -> Iterator[list[str]]:
    """The cut by the paper's rule and as estimated before training, the heads' predictions, and latency."""
    for row in summary(results):
        timing = row["latency"]
        times = ["", "", ""]
        if timing is not None:
            times = [f"{timing['dense_ms']:.3f}", f"{timing['gated_ms']:.3f}", f"{timing['speedup']:.2f}x"]
        yield [row["budget"], *(f"{row[key]:.1%}" for key in _SHARES), *times]


def criterion_rows(results: Results) -> Iterator[list[str]]:
    """What the experiment has to show, and what came out."""
    return ([c.name, c.found, verdict(c)] for c in criteria(results))


def tables(results: Results) -> list[tuple[tuple[str, ...], list[list[str]]]]:
    """Header and rows of the three tables of a report."""
    return [
        (OUTCOME, list(outcome_rows(results))),
        (DETAILS, list(detail_rows(results))),
        (("criterion", "found", "met"), list(criterion_rows(results))),
    ]


def conditions(results: Results) -> str:
    """One paragraph: data, network, length of training, baseline, machine."""
    settings, plan, dense = results["settings"], results["settings"]["plan"], results["dense"]
    start = "random weights" if settings["weights"] is None else f"the weights {settings['weights']}"
    given = f" ({mean(d['given'] for d in dense):.2f} % as given)" if "given" in dense[0] else ""
    where = results["environment"]
    timed = (cell["latency"]["threads"] for cell in results["cells"] if "latency" in cell)
    threads = next(timed, where["threads"])  # the timing may be a run of its own
    first, longer = (mean(d[key] for d in dense) for key in ("accuracy", "continued"))
    sentences = (
        f"{settings['condition']} Network {plan['model']}, from {start}{given};",
        f"{plan['dense_epochs']} dense epochs, then {plan['gated_epochs']} with gates, whose heads learn in the first",
        f"{plan['cooldown']:.0%}. Dense baseline, mean over the seeds ({len(dense)}): {first:.2f} %, and",
        f"{longer:.2f} % after as many further epochs as the gated networks had; points lost count from the better.",
        "Multiply-accumulates include the heads; the paper's rule leaves them out. The best fixed mask is the same for",
        "all samples and chosen in hindsight. Latency at batch 1, first seed, against the fastest form of the dense",
        f"network: {where['cpu']}, {threads} threads, torch {where['torch']}.",
    )
    return " ".join(sentences)


def markdown(results: Results) -> str:
    """Conditions, and the three tables."""
    lines = [conditions(results)]
    for header, rows in tables(results):
        lines += ["", _markdown_row(header), _markdown_row("---" for _ in header), *map(_markdown_row, rows)]
    return "\n".join(lines) + "\n"


def update_page(page: Path, folder: Path) -> bool:
    """Put the tables of results files between the markers of a markdown page; True if that changed it.

    ``<!-- results: NAME -->`` ... ``<!-- end of results -->`` holds what ``folder/NAME.json`` says.
    """
    pattern = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

    def fresh(found: re.Match[str]) -> str:
        results = json.loads((folder / f"{found[2]}.json").read_text(encoding="utf-8"))
        return f"{found[1]}\n{markdown(results)}\n{found[3]}"

    text = page.read_text(encoding="utf-8")
    new = pattern.sub(fresh, text)
    if new != text:
        write_atomically(page, new)
    return new != text


def verdict(criterion: Criterion) -> str:
    return {True: "yes", False: "no", None: "not applicable"}[criterion.passed]


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plots(results: Results, folder: Path) -> list[Path]:
    """Accuracy against the cut, and against measured latency, as PNG; empty if matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = summary(results)
    dense = mean(max(d["accuracy"], d["continued"]) for d in results["dense"])
    timed = [r for r in rows if r["latency"] is not None]
    figures: list[tuple[str, str, list[Results], Callable[[Results], float], float]] = [
        ("accuracy_cut.png", "multiply-accumulates cut (%)", rows, lambda r: 100 * float(r["cut"]), 0.0)
    ]
    if timed:
        at = median(r["latency"]["dense_ms"] for r in timed)
        label = "latency at batch 1 (ms)"
        figures.append(("accuracy_latency.png", label, timed, lambda r: float(r["latency"]["gated_ms"]), at))
    paths = []
    for file, label, shown, value, dense_at in figures:
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        axes.plot([dense_at], [dense], "k*", markersize=12, label="dense")
        for coupling, marker in (("decoupled", "o-"), ("joint", "s-")):
            points = sorted((value(r), r["accuracy"]) for r in shown if r["coupling"] == coupling)
            if points:
                axes.plot(*zip(*points, strict=True), marker, label=f"FTWT {coupling}")
        random = sorted((value(r), r["random_accuracy"]) for r in shown)
        axes.plot(*zip(*random, strict=True), "x:", color="grey", label="random masks, as many channels")
        axes.set(xlabel=label, ylabel="test accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(folder / file)
        figure.savefig(paths[-1], dpi=120)
        pyplot.close(figure)
    return paths


# ----------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of it."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_weights(path: Path, model: nn.Module) -> None:
    """The model's ``state_dict``, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as temporary:
        torch.save(model.state_dict(), temporary)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A ``state_dict``, also one that lies under the key ``state_dict`` or was saved from ``DataParallel``.

    Raises:
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"read_weights: no file {str(path)!r}")
    found = torch.load(path, map_location="cpu", weights_only=True)
    found = found.get("state_dict", found)
    return {name.removeprefix("module."): value for name, value in found.items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load, all names and shapes as the model's.

    Raises:
        ValueError: names or shapes that do not fit.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"load_weights: the weights do not fit {type(model).__name__}: {error}") from error


def _dense_file(seed: int) -> str:
    return f"weights/dense-{seed}.pt"


def _cell_file(budget: Budget, seed: int) -> str:
    return f"weights/{budget.name.replace(' ', '-')}-{seed}.pt"


def _environment() -> Results:
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cofire": __version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


# --------------------------------------------------------------------------------------------------- command


def command(
    method: str,
    *,
    data: str = "digits",
    model: str | None = None,
    weights: Path | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    out: Path = Path("runs"),
) -> None:
    """``cofire train``: run the experiment, print table and criteria, write results, table and plots to ``out``."""
    from rich.console import Console

    console = Console()
    plan = DIGITS if data == "digits" and weights is None else PRETRAINED
    if weights is None and plan is PRETRAINED:
        plan = replace(plan, dense_epochs=30, dense_lr=0.1, images=None, test_images=None)
    if model is not None:
        plan = replace(plan, model=model)
    if epochs is not None:
        plan = replace(plan, dense_epochs=epochs, gated_epochs=epochs)
    folder = out / f"{method}-{plan.model}-{Path(data).name}"
    with progress_bar(console) as progress:
        results = experiment(method, data, seeds, out=folder, plan=plan, weights=weights, progress=progress)
    print_results(console, results)
    write_atomically(folder / "results.md", markdown(results))
    for path in [folder / "results.json", folder / "results.md", *plots(results, folder)]:
        console.print(f"written: {path}")


def progress_bar(console: Any) -> Any:
    """A bar with time taken and left; without a terminal it prints nothing."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not console.is_terminal:
        return nullcontext()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.description}"), console=console)


def print_results(console: Any, results: Results) -> None:
    """Conditions, and the three tables."""
    from rich import box
    from rich.table import Table

    console.print(conditions(results), highlight=False)
    colours = {"yes": "[green]yes", "no": "[red]no"}
    for header, rows in tables(results):
        table = Table(*header, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        table.columns[0].no_wrap = header[0] == "budget"
        for row in rows:
            table.add_row(*(colours.get(cell, cell) for cell in row))
        console.print(table)
