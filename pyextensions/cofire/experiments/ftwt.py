# SPDX-License-Identifier: Apache-2.0
"""FTWT's experiment: what ``cofire train ftwt`` runs.

It is a grid of *cells* (budget, seed). Each finished cell is in the results file, with its weights in a file beside
it, so an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cofire import data as datasets
from cofire import models
from cofire.data import Images
from cofire.experiments import ftwt_report, report
from cofire.experiments.environment import environment
from cofire.experiments.files import (
    Results,
    load_results,
    load_weights,
    read_weights,
    results_file,
    save_weights,
)
from cofire.experiments.latency import latency
from cofire.experiments.training import Advance, accuracy, fit, steps_per_epoch
from cofire.files import write_atomically
from cofire.methods import FTWT
from cofire.methods.ftwt import random_masks
from cofire.nn.gating import DeployedGatedConv2d, Gated


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
    #: channels, so that few steps need a higher rate; chosen on validation splits, see docs/ftwt.md.
    head_lr: float
    cooldown: float = 0.5
    weight_decay: float = 5e-4
    images: int | None = None  #: train on a fixed subset of this many
    test_images: int | None = None  #: test on the first so many
    #: Train without a share of the training images and score on them, so that a setting is chosen without the test.
    validate: bool = False
    counted: int = 2000  #: test images on which multiply-accumulates and masks are counted


DIGITS = Plan(
    model="digits_cnn",
    budgets=tuple(Budget(mass) for mass in (1.0, 0.95, 0.9, 0.8)),
    dense_epochs=30,
    gated_epochs=30,
    batch=32,
    dense_lr=0.05,
    gated_lr=0.01,
    head_lr=30.0,
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
    head_lr=0.1,
    images=4_000,
    test_images=5_000,
)


def experiment(
    data: str | Path = "digits",
    seeds: int = 3,
    *,
    out: Path,
    plan: Plan | None = None,
    weights: Path | None = None,
    progress: Any = None,
) -> Results:
    """Train the dense baseline and FTWT's cells, time them, and return the results, also written to ``out``.

    Args:
        data: ``"digits"`` or a folder (:func:`cofire.data.load`).
        seeds: repeats; each draws its own initial weights and order. Where the data has no split, one serves all seeds.
        out: folder for ``results.json`` and the weights. What it holds of the same experiment is not run again. A
            validation run writes ``validation.json`` and its weights to the subfolder ``validation``.
        plan: how to train; None: the one for the data.
        weights: a ``state_dict`` to start from instead of random weights.
        progress: a ``rich.progress.Progress`` to report to, or None.

    Raises:
        ValueError: a value out of range, weights that do not fit, or ``out`` holds another experiment.
    """
    if seeds < 1:
        raise ValueError(f"experiment: seeds must be at least 1, got {seeds}")
    plan = plan or (DIGITS if str(data) == "digits" else PRETRAINED)
    if not 0 < plan.head_lr < math.inf:
        raise ValueError(f"experiment: head_lr must be a positive number, got {plan.head_lr:g}")
    run = _Run(data, seeds, plan, out, weights, progress)
    for seed in range(seeds):
        run.dense(seed)
        for budget in plan.budgets:
            if seed < (budget.seeds or seeds):
                run.gated(budget, seed)
    run.time_cells()
    run.results["criteria"] = [asdict(c) for c in ftwt_report.criteria(run.results)]
    run.save()
    return run.results


class _Run:
    """One experiment under way: its results so far, and how to make the next."""

    def __init__(
        self, data: str | Path, seeds: int, plan: Plan, out: Path, weights: Path | None, progress: Any
    ) -> None:
        self.data, self.plan, self.progress = data, plan, progress
        self.file = results_file(out, plan.validate)
        self.out = self.file.parent
        self.weights = None if weights is None else read_weights(weights)
        images = self.images
        settings = {
            "method": "ftwt",
            "data": images.name,
            "condition": images.condition,
            "seeds": seeds,
            "weights": None if weights is None else weights.name,
            "plan": json.loads(json.dumps(asdict(plan))),
        }
        self.results = load_results(self.file, settings, environment())
        cells = sum(min(budget.seeds or seeds, seeds) for budget in plan.budgets)
        epochs = seeds * (plan.dense_epochs + plan.gated_epochs) + cells * plan.gated_epochs
        self.task = None if progress is None else progress.add_task("training", total=epochs)

    def save(self) -> None:
        write_atomically(self.file, json.dumps(self.results, indent=2))

    @functools.cached_property
    def images(self) -> Images:
        """One split for all seeds: what one seed chooses its settings on is never another one's test."""
        images = datasets.load(self.data, seed=0)
        if self.plan.validate:
            images = images.validation()
        return images.subset(self.plan.images, self.plan.test_images)

    def network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        images = self.images
        return models.build(self.plan.model, in_channels=images.train.shape[1], num_classes=len(images.classes))

    def method(self, budget: Budget, seed: int) -> FTWT:
        steps = self.plan.gated_epochs * steps_per_epoch(self.images, self.plan.batch)
        return FTWT(mass=budget.mass, coupling=budget.coupling, cooldown=self.plan.cooldown, total_steps=steps)

    # ------------------------------------------------------------------------------------------------ cells

    def dense(self, seed: int) -> None:
        """The baseline, and the control that goes on training for as long as the gated networks do."""
        plan, images = self.plan, self.images
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
        plan, images = self.plan, self.images
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
        gains = method.report(model, counted)
        row = {
            "budget": budget.name,
            "mass": budget.mass,
            "coupling": budget.coupling,
            "seed": seed,
            "accuracy": accuracy(model, images),
            "random_accuracy": _random_accuracy(model, images, seed),
            "cut": gains.exact.reduction,
            "cut_paper_rule": gains.paper_rule.reduction,
            "estimated_cut": estimate.exact.reduction,
            "estimated_cut_paper_rule": estimate.paper_rule.reduction,
            "mask_accuracy": gains.mask_accuracy,
            "fixed_mask_accuracy": fixed_mask_accuracy(model, counted),
            "kept": gains.kept,
            "layers": [layer.as_dict() for layer in gains.layers],
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
                images = self.images
                row["latency"] = latency(
                    "gated",
                    method.dense(model),
                    method.finalize(model),
                    images.normalize(images.test[:1]),
                    DeployedGatedConv2d,
                )
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
    try:
        for x in batches:
            model(x)
            samples += len(x)
    finally:
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


def _dense_file(seed: int) -> str:
    return f"weights/dense-{seed}.pt"


def _cell_file(budget: Budget, seed: int) -> str:
    return f"weights/{budget.name.replace(' ', '-')}-{seed}.pt"


def command(
    *,
    data: str = "digits",
    model: str | None = None,
    weights: Path | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    head_lr: float | None = None,
    lr: float | None = None,
    validate: bool = False,
    out: Path = Path("runs"),
) -> None:
    """``cofire train ftwt``: run the experiment, print table and criteria, write results, table and plots to ``out``."""
    if epochs is not None and epochs < 1:
        raise ValueError(f"experiment: epochs must be at least 1, got {epochs}")
    plan = DIGITS if data == "digits" and weights is None else PRETRAINED
    if weights is None and plan is PRETRAINED:
        plan = replace(plan, dense_epochs=30, dense_lr=0.1, images=None, test_images=None)
    if model is not None:
        plan = replace(plan, model=model)
    if epochs is not None:
        plan = replace(plan, dense_epochs=epochs, gated_epochs=epochs)
    if head_lr is not None:
        plan = replace(plan, head_lr=head_lr)
    if lr is not None:
        plan = replace(plan, gated_lr=lr)
    plan = replace(plan, validate=validate)
    folder = out / f"ftwt-{plan.model}-{Path(data).name}"
    report.show(
        ftwt_report,
        results_file(folder, validate),
        lambda progress: experiment(data, seeds, out=folder, plan=plan, weights=weights, progress=progress),
    )
