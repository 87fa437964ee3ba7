# SPDX-License-Identifier: Apache-2.0
"""OFQ's experiment: what ``cofire train ofq`` runs.

A vision transformer is trained in full precision; from its weights each *cell* (setting, seed) trains a network of few bits
with that one as teacher. The network with StatsQ weights is then trained on for a few epochs twice: with annealing, and as a
control without. Each finished cell is in the results file, so an interrupted experiment goes on where it stopped.
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
from cofire.experiments import ofq_report, report
from cofire.experiments.environment import environment
from cofire.experiments.files import Results, load_results, load_weights, read_weights, results_file, save_weights
from cofire.experiments.training import Advance, accuracy, adamw, fit, refuse_heads, steps_per_epoch
from cofire.files import write_atomically
from cofire.methods import OFQ
from cofire.methods.ofq import OSCILLATING
from cofire.nn.statsq import Quantized, QueryKey

#: How a network goes on after the first quantised training.
PHASES = ("annealed", "continued")


@dataclass(frozen=True)
class Setting:
    """How weights are quantised, and the rate of the training, chosen on a validation split: see docs/ofq.md."""

    weights: str
    lr: float
    #: Train on with annealing, and without.
    anneal: bool = False

    @property
    def name(self) -> str:
        return {"statsq": "StatsQ", "lsq": "LSQ"}[self.weights]


@dataclass(frozen=True)
class Plan:
    """How an experiment trains; rates are those of AdamW, which rise shortly and fall as a cosine: to zero in full
    precision, to ``floor`` of the peak afterwards."""

    model: str
    settings: tuple[Setting, ...]
    dense_epochs: int
    epochs: int
    anneal_epochs: int
    batch: int
    dense_lr: float
    weight_bits: int = 2
    activation_bits: int = 4
    boundary_range: float = 0.005
    #: Share of the peak rate at the end of the quantised training, and throughout what follows it, with annealing and
    #: without: so that nothing but annealing tells these apart.
    floor: float = 0.1
    weight_decay: float = 0.05
    warm_up: int = 20
    watched: float = 0.2  #: share of the steps, at the end, over which the variance of the row scales is taken
    images: int | None = None  #: train on a fixed subset of this many
    test_images: int | None = None  #: test on the first so many
    #: Train without a share of the training images and score on them, so that a setting is chosen without the test.
    validate: bool = False


DIGITS = Plan(
    model="digits_vit",
    settings=(Setting("statsq", 2e-3, anneal=True), Setting("lsq", 2e-3)),
    dense_epochs=30,
    epochs=20,
    anneal_epochs=5,
    batch=32,
    dense_lr=2e-3,
)
#: For larger images: a short training on few of them.
IMAGES = Plan(
    model="vit_patch8",
    settings=(Setting("statsq", 2e-3, anneal=True), Setting("lsq", 2e-3)),
    dense_epochs=15,
    epochs=5,
    anneal_epochs=3,
    batch=64,
    dense_lr=1e-3,
    images=4_000,
    test_images=2_000,
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
    """Run all cells that ``out`` does not have yet, and judge them.

    Args:
        data: as in :func:`cofire.data.load`.
        seeds: every setting runs with seeds 0 to ``seeds - 1``; all on one split of the data.
        out: folder for ``results.json`` and the weights.
        plan: how to train; default: as fits the data.
        weights: a ``state_dict`` of the network in full precision to start from instead of random weights.
        progress: a ``rich.progress.Progress`` to report to, or None.

    Raises:
        ValueError: a value out of range, weights that do not fit, or ``out`` holds another experiment.
    """
    if seeds < 1:
        raise ValueError(f"experiment: seeds must be at least 1, got {seeds}")
    plan = plan or (DIGITS if str(data) == "digits" else IMAGES)
    for setting in plan.settings:
        if not 0 < setting.lr < math.inf:
            raise ValueError(f"experiment: lr must be a positive number, got {setting.lr:g}")
    run = Run(data, seeds, plan, out, weights, progress)
    for seed in range(seeds):
        run.seed(seed)
    run.latency()
    run.results["criteria"] = [asdict(c) for c in ofq_report.criteria(run.results)]
    run.save()
    return run.results


class Run:
    """One experiment under way: its results so far, and how to make the next."""

    def __init__(
        self, data: str | Path, seeds: int, plan: Plan, out: Path, weights: Path | None = None, progress: Any = None
    ) -> None:
        self.data, self.plan, self.progress = data, plan, progress
        self.file = results_file(out, plan.validate)
        self.out = self.file.parent
        self.weights = None if weights is None else read_weights(weights)
        settings = {
            "method": "ofq",
            "data": self.images.name,
            "condition": self.images.condition,
            "seeds": seeds,
            "weights": None if weights is None else weights.name,
            "plan": json.loads(json.dumps(asdict(plan))),
        }
        self.results = load_results(self.file, settings, environment())
        phases = sum(len(self._phases(setting)) for setting in plan.settings)
        epochs = plan.dense_epochs + len(plan.settings) * plan.epochs + phases * plan.anneal_epochs
        self.bar = None if progress is None else progress.add_task("training", total=seeds * epochs)

    def save(self) -> None:
        write_atomically(self.file, json.dumps(self.results, indent=2))

    @functools.cached_property
    def images(self) -> Images:
        """One split for all seeds: what one seed chooses its settings on is never another one's test."""
        found = datasets.load(self.data, seed=0)
        found = found.validation() if self.plan.validate else found
        return found.subset(self.plan.images, self.plan.test_images)

    @functools.cached_property
    def example(self) -> Tensor:
        return self.images.normalize(self.images.train[: self.plan.batch])

    def network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        channels, classes = self.images.train.shape[1], len(self.images.classes)
        return models.build(self.plan.model, in_channels=channels, num_classes=classes)

    def method(self, setting: Setting) -> OFQ:
        plan = self.plan
        return OFQ(
            weight_bits=plan.weight_bits,
            activation_bits=plan.activation_bits,
            weights=setting.weights,
            boundary_range=plan.boundary_range,
        )

    def seed(self, seed: int) -> None:
        """Everything of one seed that is not there yet."""
        self.dense(seed)
        for setting in self.plan.settings:
            self.cell(setting, seed)
            for phase in self._phases(setting):
                self.cell(setting, seed, phase)

    def _phases(self, setting: Setting) -> tuple[str, ...]:
        """What follows the first training; a validation run chooses its rate, so it ends there."""
        return PHASES if setting.anneal and not self.plan.validate else ()

    # ------------------------------------------------------------------------------------------------ cells

    def dense(self, seed: int) -> None:
        """The network in full precision."""
        plan = self.plan
        if any(found["seed"] == seed for found in self.results["dense"]):
            return self._advance(plan.dense_epochs, f"full precision, seed {seed}: found")
        start = time.perf_counter()
        model = self.network(seed)
        row: Results = {"seed": seed}
        if self.weights is not None:
            load_weights(model, self.weights)
            row["given"] = accuracy(model, self.images)
        self._fit(model, plan.dense_epochs, plan.dense_lr, seed, None, self._each(f"full precision, seed {seed}"))
        row |= {"accuracy": accuracy(model, self.images), "seconds": time.perf_counter() - start}
        save_weights(self.out / _file("dense", seed), model)
        self.results["dense"].append(row)
        self.save()

    def cell(self, setting: Setting, seed: int, phase: str = "") -> None:
        """One cell: training from the full precision, or from the cell of the first phase."""
        plan = self.plan
        name = f"{setting.name}, {phase}" if phase else setting.name
        epochs = plan.anneal_epochs if phase else plan.epochs
        if any((c["setting"], c["seed"]) == (name, seed) for c in self.results["cells"]):
            return self._advance(epochs, f"{name}, seed {seed}: found")
        method = self.method(setting)
        model = self.prepared(setting, seed, trained=bool(phase))
        if phase == "annealed":
            method.anneal(model)
        start = time.perf_counter()
        watch = _Watch(model, epochs * steps_per_epoch(self.images, plan.batch), plan.watched, plan.weight_bits)
        rate, order = (plan.floor * setting.lr, seed + 2) if phase else (setting.lr, seed + 1)
        options: dict[str, Any] = {
            "watch": watch,
            "floor": 1.0 if phase else plan.floor,
            "warm_up": 0 if phase else plan.warm_up,
        }
        self._fit(model, epochs, rate, order, method, self._each(f"{name}, seed {seed}"), **options)
        row: Results = {"setting": name, "weights": setting.weights, "phase": phase, "lr": setting.lr, "seed": seed}
        row["seconds"] = time.perf_counter() - start
        row["accuracy"] = accuracy(model, self.images)
        row["packed"] = accuracy(method.finalize(model), self.images)
        found = method.report(model, [self.images.normalize(self.images.test[:256])])
        names = ("bits_per_weight", "dense_bytes", "packed_bytes", "model_dense_bytes", "model_packed_bytes")
        row |= {n: getattr(found, n) for n in (*names, "near_boundary", "deployed_error", "deployed_equal")}
        row["quantized"] = sum(layer.weights for layer in _layers(model, plan.weight_bits))
        row |= {"oscillating": oscillating(model, plan.weight_bits), **watch.found()}
        row["oscillating_qk"] = oscillating(model, plan.weight_bits, QueryKey)
        if not phase:
            save_weights(self.out / _file(setting.weights, seed), model)
        self.results["cells"].append(row)
        self.save()

    def prepared(self, setting: Setting, seed: int, trained: bool) -> nn.Module:
        """The quantised network of a seed, before or after its first training."""
        dense = self.network(seed)
        load_weights(dense, read_weights(self.out / _file("dense", seed)))
        model = self.method(setting).prepare(dense, example_input=self.example)
        if trained:
            load_weights(model, read_weights(self.out / _file(setting.weights, seed)))
        return model

    def latency(self) -> None:
        """The deployed network of the first seed, and that of integers, against the one in full precision, at batch 1 and at
        the training's."""
        if "latency" in self.results:
            return
        setting = self.plan.settings[0]
        method, model = self.method(setting), self.prepared(setting, 0, trained=True).eval()
        self.results["latency"] = latencies(method, model, self.example, (1, self.plan.batch))
        self.save()

    def _fit(
        self, model: nn.Module, epochs: int, lr: float, seed: int, method: OFQ | None, advance: Advance,
        **options: Any,
    ) -> None:  # fmt: skip
        plan = self.plan
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "lr": lr, "weight_decay": plan.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
        ]
        options = {"make": adamw, "scheduled": 2, "warm_up": plan.warm_up, **options}
        options |= {"epochs": epochs, "batch": plan.batch, "seed": seed, "method": method, "advance": advance}
        fit(model, self.images, groups, **options)

    # --------------------------------------------------------------------------------------------- progress

    def _each(self, what: str) -> Advance:
        return lambda note: self._advance(1, f"{what}, {note}")

    def _advance(self, epochs: int, text: str) -> None:
        if self.progress is not None:
            self.progress.update(self.bar, advance=epochs, description=text)


# ------------------------------------------------------------------------------------------------------- measures


def latencies(method: OFQ, model: nn.Module, example: Tensor, batches: Iterable[int]) -> list[Results]:
    """The deployed network against its teacher, for the first inputs of ``example``; ``integer``: the one of integers."""
    rows = []
    for n in batches:
        floats, integers = (
            method.report(model, [example[:n]], latency=True, integer=integer).latency for integer in (False, True)
        )
        assert floats is not None and integers is not None
        rows.append({**floats.as_dict(), "integer": integers.as_dict()})
    return rows


def _layers(model: nn.Module, bits: int, kind: type[Quantized] = Quantized) -> list[Quantized]:
    """The layers of so many bits: not the first and the last."""
    return [m for m in model.modules() if isinstance(m, kind) and m.quantizer.bits == bits]


def oscillating(model: nn.Module, bits: int, kind: type[Quantized] = Quantized) -> float:
    """The share of the quantised weights whose moving average of reversals is above the threshold."""
    values = torch.cat([layer.quantizer.oscillation.flatten() for layer in _layers(model, bits, kind)])
    return float((values > OSCILLATING).double().mean())


class _Watch:
    """Follows training: the share of oscillating weights, and the row scales of the last steps."""

    def __init__(self, model: nn.Module, total: int, share: float, bits: int) -> None:
        self.model, self.bits, self.total = model, bits, total
        self.first = total - max(round(share * total), 2)
        self.every = max(total // 30, 1)
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())
        self.course: list[tuple[int, float]] = []

    def __call__(self, step: int) -> None:
        if step % self.every == 0 or step == self.total:
            self.course.append((step, oscillating(self.model, self.bits)))
        if step <= self.first:
            return
        layers = _layers(self.model, self.bits)
        scales = torch.cat([m.quantizer.row_scale(m.matrix()) for m in layers]).double()
        self.count += 1  # Welford's running mean and sum of squares
        change = scales - self.mean
        self.mean = self.mean + change / self.count
        self.squares = self.squares + change * (scales - self.mean)

    def found(self) -> Results:
        """``scale_variance``: mean over the rows of the variance of a row's scale over the steps, in units of its squared
        mean."""
        relative = self.squares / self.count / self.mean.square()
        return {"scale_variance": float(relative.mean()), "course": self.course}


# --------------------------------------------------------------------------------------------------------- command


def _file(what: str, seed: int) -> str:
    return f"weights/{what}-{seed}.pt"


def plan_of(
    data: str,
    model: str | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    validate: bool = False,
) -> Plan:
    """The experiment's plan for the data, with what the command line changes."""
    plan = DIGITS if data == "digits" else IMAGES
    if model is not None:
        plan = replace(plan, model=model)
    if epochs is not None:
        plan = replace(plan, dense_epochs=epochs, epochs=epochs, anneal_epochs=epochs)
    if lr is not None:
        plan = replace(plan, settings=tuple(replace(setting, lr=lr) for setting in plan.settings))
    return replace(plan, validate=validate)


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
    """``cofire train ofq``: run the experiment, print table and criteria, write results, table and plots to ``out``."""
    refuse_heads("ofq", epochs, head_lr, "the quantised training")
    plan = plan_of(data, model, epochs, lr, validate)
    folder = out / f"ofq-{plan.model}-{Path(data).name}"
    report.show(
        ofq_report,
        results_file(folder, validate),
        lambda progress: experiment(data, seeds, out=folder, plan=plan, weights=weights, progress=progress),
    )
