# SPDX-License-Identifier: Apache-2.0
"""eDKM's experiments: what ``cofire train edkm`` runs.

A dense network is trained; from its weights each *cell* (setting, seed) clusters them, trains on, and is compared with the
same palettes without training (k-means after training) and with the dense network, trained on for as long. Each finished
cell is in the results file, so an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import abc
import functools
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cofire import data as datasets
from cofire import models
from cofire.data import Images, Text
from cofire.experiments import edkm_report, language, report
from cofire.experiments.centroid_path import centroid_path
from cofire.experiments.environment import environment
from cofire.experiments.files import Results, load_results, load_weights, read_weights, results_file, save_weights
from cofire.experiments.training import Advance, accuracy, fit, refuse_heads, steps_per_epoch
from cofire.files import write_atomically
from cofire.methods import EDKM, Method
from cofire.nn.clustering import Palette, Palettized, soft_evaluation

TEXT = "text"


@dataclass(frozen=True)
class Setting:
    """One setting of the method and the number of seeds that it is run with (None: all)."""

    bits: int
    grad: str = "unroll"
    conv_bits: int | None = None
    #: ``"bfloat16"``: the optimiser keeps fp32 weights, and what is clustered are those rounded to 16 bits.
    dtype: str = "float32"
    seeds: int | None = None

    @property
    def palette(self) -> str:
        """Bits of the labels, in words."""
        bits = f"{self.bits} bit" + "s" * (self.bits > 1)
        return bits if self.conv_bits is None else f"conv {self.conv_bits}, linear {bits}"

    @property
    def name(self) -> str:
        return f"{self.palette}, {self.grad}" + (", bf16" if self.dtype == "bfloat16" else "")


@dataclass(frozen=True)
class Plan:
    """How an experiment trains. An epoch is a pass over the training images, or ``steps`` steps on text."""

    model: str
    settings: tuple[Setting, ...]
    dense_epochs: int
    epochs: int
    batch: int
    dense_lr: float
    lr: float  #: of the second training, the dense control's too; chosen on validation splits, see docs/edkm.md
    rho: float = 0.3
    rho_end: float = 0.03
    hard_last: float = 0.05
    weight_threshold: int = 256
    weight_decay: float = 5e-4
    steps: int = 100  #: text only
    context: int = 128  #: text only
    windows: int = 512  #: text only: of the test, each of ``context`` characters
    #: Compare the gradients that flow through the centroids, on the layers of the first seed's dense network.
    gradients: bool = False
    #: Train without a share of the training data and score on it, so that a setting is chosen without the test.
    validate: bool = False


GRADS = ("unroll", "implicit", "jfb")
MLP = Plan(
    model="digits_mlp",
    settings=(
        *(Setting(bits, grad) for bits in (2, 1) for grad in GRADS),
        Setting(2, "unroll", dtype="bfloat16"),
    ),
    dense_epochs=30,
    epochs=30,
    batch=64,
    dense_lr=0.05,
    lr=0.01,
)
CNN = Plan(
    model="digits_cnn",
    settings=tuple(Setting(4, grad, conv_bits=2) for grad in GRADS),
    dense_epochs=30,
    epochs=30,
    batch=64,
    dense_lr=0.05,
    lr=0.003,
    gradients=True,
)
CHARACTERS = Plan(
    model="char_transformer",
    settings=(Setting(3), Setting(2)),
    dense_epochs=8,
    epochs=3,
    batch=8,
    dense_lr=3e-3,
    lr=1e-3,
    weight_threshold=2048,
    weight_decay=0.01,
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
    """Train the dense network, its control and eDKM's cells, and return the results, also written to ``out``.

    Args:
        data: ``"digits"``, ``"text"`` (:func:`cofire.data.load_text`) or a folder of images (:func:`cofire.data.load`).
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
    plan = plan or (CHARACTERS if str(data) == TEXT else MLP)
    if not 0 < plan.lr < math.inf:
        raise ValueError(f"experiment: lr must be a positive number, got {plan.lr:g}")
    run = _Run(data, seeds, plan, out, weights, progress)
    for seed in range(seeds):
        run.dense(seed)
        for setting in plan.settings:
            if seed < (setting.seeds or seeds):
                run.cell(setting, seed)
    if plan.gradients:
        run.gradients()
    run.results["criteria"] = [asdict(c) for c in edkm_report.criteria(run.results)]
    run.save()
    return run.results


# ----------------------------------------------------------------------------------------------------------- tasks


class _Task(abc.ABC):
    """What is learned: the network, its training, and its score on the part that is not trained on."""

    condition: str
    name: str
    unit: str  #: of the score

    @abc.abstractmethod
    def network(self) -> nn.Module: ...

    @abc.abstractmethod
    def steps(self, epochs: int) -> int: ...

    @abc.abstractmethod
    def train(
        self, model: nn.Module, epochs: int, lr: float, decay: float, seed: int, method: Method | None, advance: Advance
    ) -> None: ...

    @abc.abstractmethod
    def score(self, model: nn.Module) -> float: ...

    @abc.abstractmethod
    def batch(self) -> tuple[Tensor, Tensor]:
        """Training data, to take a gradient of the loss with."""


class _Classify(_Task):
    unit = edkm_report.ACCURACY

    def __init__(self, images: Images, plan: Plan) -> None:
        self.images, self.plan = images, plan
        self.condition, self.name = images.condition, images.name

    def network(self) -> nn.Module:
        channels, classes = self.images.train.shape[1], len(self.images.classes)
        return models.build(self.plan.model, in_channels=channels, num_classes=classes)

    def steps(self, epochs: int) -> int:
        return epochs * steps_per_epoch(self.images, self.plan.batch)

    def train(
        self, model: nn.Module, epochs: int, lr: float, decay: float, seed: int, method: Method | None, advance: Advance
    ) -> None:
        groups = [{"params": list(model.parameters()), "lr": lr, "weight_decay": decay}]
        options: dict[str, Any] = {"epochs": epochs, "batch": self.plan.batch, "seed": seed}
        fit(model, self.images, groups, method=method, advance=advance, **options)

    def score(self, model: nn.Module) -> float:
        return accuracy(model, self.images)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.images.normalize(self.images.train[:256]), self.images.train_labels[:256]


class _Predict(_Task):
    unit = edkm_report.BITS

    def __init__(self, text: Text, plan: Plan) -> None:
        self.text, self.plan = text, plan
        self.condition, self.name = text.condition, text.name

    def network(self) -> nn.Module:
        return models.char_transformer(len(self.text.vocabulary), context=self.plan.context)

    def steps(self, epochs: int) -> int:
        return epochs * self.plan.steps

    def train(
        self, model: nn.Module, epochs: int, lr: float, decay: float, seed: int, method: Method | None, advance: Advance
    ) -> None:
        options: dict[str, Any] = {"rounds": epochs, "steps": self.plan.steps, "batch": self.plan.batch}
        options |= {"context": self.plan.context, "lr": lr, "weight_decay": decay, "seed": seed}
        language.fit(model, self.text, method=method, advance=advance, **options)

    def score(self, model: nn.Module) -> float:
        return language.bits_per_character(model, self.text, context=self.plan.context, windows=self.plan.windows)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.text.batch(self.plan.batch, self.plan.context, torch.Generator().manual_seed(0))


class _Run:
    """One experiment under way: its results so far, and how to make the next."""

    def __init__(
        self, data: str | Path, seeds: int, plan: Plan, out: Path, weights: Path | None, progress: Any
    ) -> None:
        self.data, self.plan, self.progress = data, plan, progress
        self.file = results_file(out, plan.validate)
        self.out = self.file.parent
        self.weights = None if weights is None else read_weights(weights)
        settings = {
            "method": "edkm",
            "data": self.task.name,
            "condition": self.task.condition,
            "unit": self.task.unit,
            "seeds": seeds,
            "weights": None if weights is None else weights.name,
            "plan": json.loads(json.dumps(asdict(plan))),
        }
        self.results = load_results(self.file, settings, environment())
        cells = sum(min(setting.seeds or seeds, seeds) for setting in plan.settings)
        epochs = seeds * (plan.dense_epochs + plan.epochs) + cells * plan.epochs
        self.bar = None if progress is None else progress.add_task("training", total=epochs)

    def save(self) -> None:
        write_atomically(self.file, json.dumps(self.results, indent=2))

    @functools.cached_property
    def task(self) -> _Task:
        """One split for all seeds: what one seed chooses its settings on is never another one's test."""
        text = str(self.data) == TEXT
        found = datasets.load_text() if text else datasets.load(self.data, seed=0)
        found = found.validation() if self.plan.validate else found
        return _Predict(found, self.plan) if isinstance(found, Text) else _Classify(found, self.plan)

    def network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.task.network()

    def method(self, setting: Setting) -> EDKM:
        plan = self.plan
        return EDKM(
            bits=setting.bits,
            conv_bits=setting.conv_bits,
            grad=setting.grad,
            rho=plan.rho,
            rho_end=plan.rho_end,
            hard_last=plan.hard_last,
            weight_threshold=plan.weight_threshold,
            total_steps=self.task.steps(plan.epochs),
        )

    # ------------------------------------------------------------------------------------------------ cells

    def dense(self, seed: int) -> None:
        """The dense network, and the control that goes on training for as long as the clustered ones do."""
        plan, task = self.plan, self.task
        if any(found["seed"] == seed for found in self.results["dense"]):
            return self._advance(plan.dense_epochs + plan.epochs, f"dense, seed {seed}: found")
        start = time.perf_counter()
        model = self.network(seed)
        row: Results = {"seed": seed}
        if self.weights is not None:
            load_weights(model, self.weights)
            row["given"] = task.score(model)
        each = self._each(f"dense, seed {seed}")
        task.train(model, plan.dense_epochs, plan.dense_lr, plan.weight_decay, seed, None, each)
        row["score"] = task.score(model)
        save_weights(self.out / _dense_file(seed), model)
        # The second training is the same as the clustered networks': rate, order of the data, weight decay.
        task.train(model, plan.epochs, plan.lr, plan.weight_decay, seed + 1, None, each)
        row["continued"] = task.score(model)
        save_weights(self.out / _continued_file(seed), model)
        row["seconds"] = time.perf_counter() - start
        self.results["dense"].append(row)
        self.save()

    def cell(self, setting: Setting, seed: int) -> None:
        """One cell: k-means of both dense networks, training, and the scores with soft, nearest and packed weights."""
        plan, task = self.plan, self.task
        if any((c["setting"], c["seed"]) == (setting.name, seed) for c in self.results["cells"]):
            return self._advance(plan.epochs, f"{setting.name}, seed {seed}: found")
        method = self.method(setting)
        row: Results = {"setting": setting.name, **asdict(setting), "palette": setting.palette, "seed": seed}
        row["kmeans_continued"] = task.score(self.clustered(setting, seed, _continued_file(seed)))
        model = self.clustered(setting, seed, _dense_file(seed))
        row["kmeans"] = task.score(model)
        start = time.perf_counter()
        each = self._each(f"{setting.name}, seed {seed}")
        task.train(model, plan.epochs, plan.lr, plan.weight_decay, seed + 1, method, each)
        row["seconds"] = time.perf_counter() - start
        row["score"] = task.score(model)
        with _soft(model):
            row["soft"] = task.score(model)
        if isinstance(model, Rounded):
            model.settle()
        row["packed"] = task.score(method.finalize(model))
        found = method.report(model)
        names = ("bits_per_weight", "dense_bytes", "packed_bytes", "model_dense_bytes", "model_packed_bytes")
        row |= {name: getattr(found, name) for name in (*names, "soft_hard", "below_floor", "stalled")}
        self.results["cells"].append(row)
        self.save()

    def clustered(self, setting: Setting, seed: int, file: str) -> nn.Module:
        """The network of a weights file with optimal palettes; in evaluation, k-means after training."""
        dense = self.network(seed)
        load_weights(dense, read_weights(self.out / file))
        model = self.method(setting).prepare(dense)
        return Rounded(model) if setting.dtype == "bfloat16" else model

    def gradients(self) -> None:
        """How well each gradient knows what moving the weights does to the fixed point of the centroids."""
        if "gradients" in self.results:
            return
        dense = self.network(0)
        load_weights(dense, read_weights(self.out / _dense_file(0)))
        model = self.method(self.plan.settings[0]).prepare(dense)
        rhos = (self.plan.rho, math.sqrt(self.plan.rho * self.plan.rho_end), self.plan.rho_end)
        self.results["gradients"] = centroid_path(dense, model, self.task.batch(), rhos)
        self.save()

    # --------------------------------------------------------------------------------------------- progress

    def _each(self, what: str) -> Advance:
        return lambda note: self._advance(1, f"{what}, {note}")

    def _advance(self, epochs: int, text: str) -> None:
        if self.progress is not None:
            self.progress.update(self.bar, advance=epochs, description=text)


# ------------------------------------------------------------------------------------------------- 16-bit weights


class _Round(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


class Rounded(nn.Module):
    """A prepared network whose clustered weights are bfloat16, rounded in each forward from what the optimiser keeps.

    So clustering counts values. The rest of the network computes by torch's automatic mixed precision.

    Args:
        model: a network that :meth:`cofire.methods.EDKM.prepare` returned; changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for layer in self._layers():
            parametrize.register_parametrization(layer, "weight", _Round(), unsafe=True)
            layer.palette.initialize(layer.weight)

    def _layers(self) -> list[Palettized]:
        return [module for module in self.modules() if isinstance(module, Palettized)]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            output: Tensor = self.model(x)
        return output.float()

    def settle(self) -> None:
        """End the training: the weights are bfloat16 from now on."""
        for layer in self._layers():
            rounded = layer.weight.detach()
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            layer.weight = nn.Parameter(rounded)


@contextmanager
def _soft(model: nn.Module) -> Iterator[None]:
    """Within the context layers compute with the weights of training, before it went over to the nearest centroids."""
    palettes = [module for module in model.modules() if isinstance(module, Palette)]
    hard = [palette.hard for palette in palettes]
    for palette in palettes:
        palette.hard = False
    try:
        with soft_evaluation(model):
            yield
    finally:
        for palette, was in zip(palettes, hard, strict=True):
            palette.hard = was


# --------------------------------------------------------------------------------------------------------- command


def _dense_file(seed: int) -> str:
    return f"weights/dense-{seed}.pt"


def _continued_file(seed: int) -> str:
    return f"weights/continued-{seed}.pt"


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
    """``cofire train edkm``: run the experiment, print table and criteria, write results, table and plots to ``out``."""
    refuse_heads("edkm", epochs, head_lr, "the second training")
    if data == TEXT and model not in (None, CHARACTERS.model):
        raise ValueError(f"experiment: the network for text is {CHARACTERS.model}, got {model!r}")
    plan = CHARACTERS if data == TEXT else MLP if model in (None, MLP.model) else replace(CNN, model=str(model))
    if epochs is not None:
        plan = replace(plan, dense_epochs=epochs, epochs=epochs)
    if lr is not None:
        plan = replace(plan, lr=lr)
    plan = replace(plan, validate=validate)
    folder = out / f"edkm-{plan.model}-{Path(data).name}"
    report.show(
        edkm_report,
        results_file(folder, validate),
        lambda progress: experiment(data, seeds, out=folder, plan=plan, weights=weights, progress=progress),
    )
