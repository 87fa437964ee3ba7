# SPDX-License-Identifier: Apache-2.0
"""Quantisation after training: what ``cofire train quantize`` runs.

A dense network is trained. Each *cell* (setting, seed) quantises its linear layers, in one call of
:func:`cofire.nn.quantize_` or by way of another library's format, and is compared with it, and with itself computed by plain
torch on the decoded weights. Each finished cell is in the results file, so an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import abc
import copy
import functools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import data as datasets
from cofire import models
from cofire.data import Images, Text
from cofire.experiments import language, quantize_report, report, training
from cofire.experiments.environment import environment
from cofire.experiments.files import Results, load_results, load_weights, read_weights, results_file, save_weights
from cofire.experiments.quantize_formats import FLOAT_TABLES, FORMAT_BITS, FORMATS
from cofire.experiments.training import Advance, refuse_heads
from cofire.files import write_atomically
from cofire.methods.base import replace_modules
from cofire.nn import QuantLinear, hessians, quantize_
from cofire.nn.lowbit import dense_weight, linear_layers
from cofire.ops.lowbit import int8_activations

TEXT = "text"


@dataclass(frozen=True)
class Setting:
    """One way to quantise: by a method, or by a format of another library, which has bits of its own."""

    bits: int
    method: str
    #: "exact": as they are, in fp32. "bf16": the network is in bfloat16, but for the packed weights. "int8": rounded row by row.
    activations: str = "exact"

    @property
    def name(self) -> str:
        return quantize_report.label(asdict(self))


@dataclass(frozen=True)
class Plan:
    """How the dense network is trained, and what is done with it."""

    model: str
    settings: tuple[Setting, ...]
    epochs: int  #: passes over the training images, or rounds of ``steps`` steps on text
    batch: int
    lr: float
    weight_decay: float
    group_size: int = 64
    calibration: int = 8  #: batches of training data that GPTQ's Hessians are sums over
    steps: int = 100  #: text only
    context: int = 128  #: text only
    windows: int = 512  #: text only: of the test, each of ``context`` characters


METHODS = ("absmax", "minmax", "mse", "hqq", "gptq")
CHARACTERS = Plan(
    model="char_transformer",
    settings=(
        Setting(8, "absmax"),
        Setting(8, "absmax", "int8"),
        *(Setting(4, method) for method in (*METHODS, "nf4")),
        *(Setting(4, method, "int8") for method in METHODS),
        *(Setting(bits, method) for bits in (3, 2) for method in METHODS[1:]),
    ),
    epochs=8,
    batch=8,
    lr=3e-3,
    weight_decay=0.01,
)


def _everything() -> Iterator[Setting]:
    """Every method at every width, and every format, with all activations; int8 ones take no tables of floats."""
    for activations in quantize_report.ACTIVATIONS:
        floats = activations != "int8"
        for bits in range(8, 0, -1):
            methods = [*METHODS, "statsq", *(["palette"] * floats), *(["nf4", "fp4"] * (floats and bits == 4))]
            yield from (Setting(bits, method, activations) for method in methods)
    for name, bits in FORMAT_BITS.items():
        for activations in quantize_report.ACTIVATIONS:
            if activations != "int8" or name not in FLOAT_TABLES:
                yield Setting(bits, name, activations)


#: What is asked on digits is that kernels compute what the weights say.
MLP = Plan(
    model="digits_mlp",
    settings=tuple(_everything()),
    epochs=30,
    batch=64,
    lr=0.05,
    weight_decay=5e-4,
)


def experiment(
    data: str | Path = TEXT,
    seeds: int = 3,
    *,
    out: Path,
    plan: Plan | None = None,
    weights: Path | None = None,
    progress: Any = None,
) -> Results:
    """Train the dense networks, quantise them, and return the results, also written to ``out``.

    Args:
        data: ``"text"`` (:func:`cofire.data.load_text`), ``"digits"`` or a folder of images (:func:`cofire.data.load`).
        seeds: repeats; each draws its own initial weights and order.
        out: folder for ``results.json`` and the weights. What it holds of the same experiment is not run again.
        plan: how to train; None: the one for the data.
        weights: a ``state_dict`` to start the dense training from instead of random weights.
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
        run.dense(seed, plan.epochs)
        for setting in plan.settings:
            run.cell(setting, seed)
    run.results["criteria"] = [asdict(c) for c in quantize_report.criteria(run.results)]
    run.save()
    return run.results


# ----------------------------------------------------------------------------------------------------------- tasks


class Task(abc.ABC):
    """What is learned: the network, its training, its score on the test, and inputs."""

    condition: str
    name: str
    unit: str  #: of the score

    @abc.abstractmethod
    def network(self) -> nn.Module: ...

    @abc.abstractmethod
    def train(self, model: nn.Module, seed: int, advance: Advance) -> None: ...

    @abc.abstractmethod
    def score(self, model: nn.Module) -> float: ...


class Calibrated(Task):
    """With inputs to fit and compare quantised networks on."""

    @abc.abstractmethod
    def calibration(self, seed: int) -> Iterator[Tensor]:
        """Batches of training inputs."""

    @abc.abstractmethod
    def inputs(self) -> Iterator[Tensor]:
        """Batches of all inputs that kernels and decoded weights are compared on."""


class Classify(Calibrated):
    unit = quantize_report.ACCURACY

    def __init__(self, images: Images, plan: Plan) -> None:
        self.images, self.plan = images, plan
        self.condition, self.name = images.condition, images.name

    def network(self) -> nn.Module:
        channels, classes = self.images.train.shape[1], len(self.images.classes)
        return models.build(self.plan.model, in_channels=channels, num_classes=classes)

    def train(self, model: nn.Module, seed: int, advance: Advance) -> None:
        plan = self.plan
        groups = [{"params": list(model.parameters()), "lr": plan.lr, "weight_decay": plan.weight_decay}]
        training.fit(model, self.images, groups, epochs=plan.epochs, batch=plan.batch, seed=seed, advance=advance)

    def score(self, model: nn.Module) -> float:
        return training.accuracy(model, self.images)

    def calibration(self, seed: int) -> Iterator[Tensor]:
        batches = self.images.batches(self.plan.batch, torch.Generator().manual_seed(seed))
        for _, (x, _) in zip(range(self.plan.calibration), batches):
            yield x

    def inputs(self) -> Iterator[Tensor]:
        for part in (self.images.train, self.images.test):
            for x in part.split(256):
                yield self.images.normalize(x)


class Predict(Calibrated):
    unit = quantize_report.BITS

    def __init__(self, text: Text, plan: Plan) -> None:
        self.text, self.plan = text, plan
        self.condition, self.name = text.condition, text.name

    def network(self) -> nn.Module:
        return models.char_transformer(len(self.text.vocabulary), context=self.plan.context)

    def train(self, model: nn.Module, seed: int, advance: Advance) -> None:
        plan = self.plan
        options: dict[str, Any] = {"rounds": plan.epochs, "steps": plan.steps, "batch": plan.batch}
        options |= {"context": plan.context, "lr": plan.lr, "weight_decay": plan.weight_decay, "seed": seed}
        language.fit(model, self.text, advance=advance, **options)

    def score(self, model: nn.Module) -> float:
        return language.bits_per_character(model, self.text, context=self.plan.context, windows=self.plan.windows)

    def calibration(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.plan.calibration):
            yield self.text.batch(self.plan.batch, self.plan.context, generator)[0]

    def inputs(self) -> Iterator[Tensor]:
        for x, _ in self.text.test_batches(16, self.plan.context, min(self.plan.windows, 32)):
            yield x


# ------------------------------------------------------------------------------------------------ decoded weights


class Decoded(nn.Module):
    """The same layer in plain torch: the decoded weight in fp32, and activations rounded as the kernel rounds them."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.weight = layer.qweight.replace(dtype=torch.float32).dequantize()
        self.bias = None if layer.bias is None else layer.bias.float()
        self.activations = layer.activations

    def forward(self, x: Tensor) -> Tensor:
        seen = x.float()
        if self.activations == "int8":
            codes, scale = int8_activations(seen)
            seen = codes * scale
        return F.linear(seen, self.weight, self.bias).to(x.dtype)


class InBfloat16(nn.Module):
    """A network in bfloat16, but for its packed weights, with inputs as they come and outputs in fp32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x.bfloat16() if x.is_floating_point() else x)
        return output.float()


@torch.no_grad()
def agreement(model: nn.Module, batches: Iterator[Tensor]) -> tuple[int, int]:
    """How many answers (the largest logit) are those of the decoded weights in plain torch, and of how many."""
    twin = copy.deepcopy(model).eval()
    decoded = replace_modules(twin, {id(m): Decoded(m) for m in twin.modules() if isinstance(m, QuantLinear)})
    same, count = 0, 0
    for x in batches:
        answers = model(x).argmax(-1)
        same, count = same + int((answers == decoded(x).argmax(-1)).sum()), count + answers.numel()
    return same, count


# ------------------------------------------------------------------------------------------------------------- run


class Run:
    """An experiment on trained dense networks under way: its results so far, and how to make the next dense network."""

    def __init__(
        self, settings: Results, task: Task, seeds: int, out: Path, weights: Path | None, progress: Any, epochs: int,
        validate: bool = False,
    ) -> None:  # fmt: skip
        self.task, self.progress = task, progress
        self.file = results_file(out, validate)
        self.out = self.file.parent
        self.weights = None if weights is None else read_weights(weights)
        settings = {**settings, "seeds": seeds, "weights": None if weights is None else weights.name}
        self.results = load_results(self.file, json.loads(json.dumps(settings)), environment())
        self.bar = None if progress is None else progress.add_task("training", total=epochs)

    def save(self) -> None:
        write_atomically(self.file, json.dumps(self.results, indent=2))

    def dense(self, seed: int, epochs: int) -> None:
        """Train the dense network of a seed, unless the results have it."""
        if any(found["seed"] == seed for found in self.results["dense"]):
            return self.advance(epochs, f"dense, seed {seed}: found")
        start = time.perf_counter()
        torch.manual_seed(seed)
        model = self.task.network()
        if self.weights is not None:
            load_weights(model, self.weights)
        self.task.train(model, seed, self.each(f"dense, seed {seed}"))
        row = {"seed": seed, "score": self.task.score(model)}
        save_weights(self.out / f"weights/dense-{seed}.pt", model)
        self.results["dense"].append({**row, "seconds": time.perf_counter() - start})
        self.save()

    def network(self, seed: int) -> nn.Module:
        """The dense network of a seed, in evaluation mode."""
        model = self.task.network()
        load_weights(model, read_weights(self.out / f"weights/dense-{seed}.pt"))
        return model.eval()

    def missing(self, seed: int, **which: Any) -> bool:
        """Whether the results have no such cell yet."""
        which["seed"] = seed
        return not any(which.items() <= cell.items() for cell in self.results["cells"])

    def each(self, what: str) -> Advance:
        return lambda note: self.advance(1, f"{what}, {note}")

    def advance(self, epochs: int, text: str) -> None:
        if self.progress is not None:
            self.progress.update(self.bar, advance=epochs, description=text)


class _Run(Run):
    task: Calibrated

    def __init__(
        self, data: str | Path, seeds: int, plan: Plan, out: Path, weights: Path | None, progress: Any
    ) -> None:
        self.plan = plan
        found = datasets.load_text() if str(data) == TEXT else datasets.load(data, seed=0)
        task: Calibrated = Predict(found, plan) if isinstance(found, Text) else Classify(found, plan)
        settings = {"method": "quantize", "data": task.name, "condition": task.condition, "unit": task.unit}
        super().__init__(
            {**settings, "plan": asdict(plan)}, task, seeds, out, weights, progress,
            seeds * (plan.epochs + len(plan.settings)),
        )  # fmt: skip

    def cell(self, setting: Setting, seed: int) -> None:
        """One cell: score, bytes, and how many answers are those of the decoded weights."""
        if self.missing(seed, setting=setting.name):
            model = self.network(seed)
            linears = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear) and _own(m, model))
            start = time.perf_counter()
            model = self.quantized(model, setting, seed)
            row: Results = {
                "setting": setting.name,
                **asdict(setting),
                "format": setting.method in FORMATS,
                "seed": seed,
            }
            row["seconds"] = time.perf_counter() - start
            layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
            packed = sum(m.in_features * m.out_features for m in layers)
            row["dense_bytes"], row["packed_bytes"] = linears, sum(m.qweight.nbytes for m in layers)
            row["bits_per_weight"], row["share"] = 8 * row["packed_bytes"] / packed, 4 * packed / linears
            model = InBfloat16(model) if setting.activations == "bf16" else model
            row["score"] = self.task.score(model)
            row["agreeing"], row["answers"] = agreement(model, self.task.inputs())
            self.results["cells"].append(row)
            self.save()
        self.advance(1, f"{setting.name}, seed {seed}")

    def quantized(self, model: nn.Module, setting: Setting, seed: int) -> nn.Module:
        """The network with packed weights; those that a format cannot hold stay dense."""
        activations = "int8" if setting.activations == "int8" else "exact"
        if setting.method not in FORMATS:
            return quantize_(
                model, setting.method, bits=setting.bits, activations=activations,
                group_size=None if setting.method == "palette" else self.plan.group_size,
                hessians=self.hessians(seed) if setting.method == "gptq" else None,
            )  # fmt: skip
        new: dict[int, nn.Module] = {}
        for name, layer in linear_layers(model):
            weight, bias = dense_weight(layer)
            try:
                packed = FORMATS[setting.method](weight, self.hessians(seed)[name])
            except ValueError:
                continue
            new[id(layer)] = QuantLinear.from_qtensor(packed, bias, activations=activations)
        return replace_modules(model, new)

    @functools.lru_cache(maxsize=1)  # noqa: B019 (a run is as long as its process)
    def hessians(self, seed: int) -> dict[str, Tensor]:
        return hessians(self.network(seed), self.task.calibration(seed))


def _own(layer: nn.Linear, model: nn.Module) -> bool:
    """Whether no other module has the layer's weight."""
    return sum(p is layer.weight for m in model.modules() for p in m._parameters.values()) == 1


# --------------------------------------------------------------------------------------------------------- command


def command(
    *,
    data: str = TEXT,
    model: str | None = None,
    weights: Path | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    head_lr: float | None = None,
    lr: float | None = None,
    validate: bool = False,
    out: Path = Path("runs"),
) -> None:
    """``cofire train quantize``: run the experiment, print tables and criteria, and write them to ``out``."""
    refuse_options("quantize", data, model, CHARACTERS.model, epochs, head_lr, validate)
    plan = CHARACTERS if data == TEXT else replace(MLP, model=model or MLP.model)
    if epochs is not None:
        plan = replace(plan, epochs=epochs)
    if lr is not None:
        plan = replace(plan, lr=lr)
    folder = out / f"quantize-{plan.model}-{Path(data).name}"
    report.show(
        quantize_report,
        results_file(folder),
        lambda progress: experiment(data, seeds, out=folder, plan=plan, weights=weights, progress=progress),
    )


def refuse_options(
    method: str, data: str, model: str | None, of_text: str, epochs: int | None, head_lr: float | None, validate: bool
) -> None:
    """Raise for options of the command that the experiment has no use for."""
    refuse_heads(method, epochs, head_lr, "the training")
    if validate:
        raise ValueError(f"experiment: {method} chooses no setting, so there is no validation run")
    if data == TEXT and model not in (None, of_text):
        raise ValueError(f"experiment: the network for text is {of_text}, got {model!r}")
