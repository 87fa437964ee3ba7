# SPDX-License-Identifier: Apache-2.0
"""Pruning after training: what ``cofire train dsnot`` and ``cofire prune`` run.

A dense network is trained. Each *cell* (setting, sparsity, seed) prunes it with :class:`cofire.methods.DSnoT` and is
compared with it. Nothing is trained after pruning. Each finished cell is in the results file, so an interrupted experiment
goes on where it stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cofire import data as datasets
from cofire import models
from cofire.data import Images, Text
from cofire.experiments import dsnot_report, report, training
from cofire.experiments.files import Results, results_file
from cofire.experiments.quantize import TEXT, Calibrated, Classify, Predict, Run, Task, refuse_options
from cofire.experiments.training import Advance
from cofire.methods import DSnoT
from cofire.ops import unpack_mask
from cofire.registry import OPERATORS

REFINEMENTS = ("dsnot_swap", "gram_swap")


@dataclass(frozen=True)
class Setting:
    """One way to prune."""

    name: str
    initial: str = "wanda"
    refine: str = "none"
    stop: str = "decrease"
    bias_correct: bool = False
    pattern: tuple[int, int] | None = None

    def method(self, density: float, layers: Sequence[str] | None) -> DSnoT:
        return DSnoT(
            density=density, pattern=self.pattern, initial=self.initial, refine=self.refine, stop=self.stop,
            bias_correct=self.bias_correct, layers=layers, pad=self.pattern is not None,
        )  # fmt: skip


MAGNITUDE = Setting("magnitude", initial="magnitude")
WANDA = Setting("Wanda")
WANDA_BIAS = Setting("Wanda, bias", bias_correct=True)
OFFICIAL = Setting("DSnoT, released loop", refine="dsnot", stop="official")
DECREASE = Setting("DSnoT, decrease", refine="dsnot")
DECREASE_BIAS = Setting("DSnoT, decrease, bias", refine="dsnot", bias_correct=True)
SWAP = Setting("swap1", refine="swap1")
SWAP_BIAS = Setting("swap1, bias", refine="swap1", bias_correct=True)


def _two_of_four(setting: Setting) -> Setting:
    return replace(setting, name=f"2:4, {setting.name}", pattern=(2, 4))


@dataclass(frozen=True)
class Plan:
    """How the dense network is trained, and how it is pruned."""

    model: str
    settings: tuple[Setting, ...]
    sparsities: tuple[float, ...]  #: of settings without a pattern
    judged: float | None  #: the sparsity of the criteria, where kernels and references are compared; None: no criteria
    epochs: int  #: passes over the training images, or rounds of ``steps`` steps on text
    batch: int
    lr: float
    weight_decay: float
    layers: tuple[str, ...] | None = None  #: to prune; None: all but the output
    widths: tuple[int, ...] = ()  #: digits only
    train_images: int = 0  #: digits only: so many for training, chosen at random, the others are the test
    calibration: int = 8  #: batches of training data; on digits all training images are one batch
    steps: int = 100  #: text only
    context: int = 128  #: text only
    windows: int = 512  #: text only: of the test, each of ``context`` characters


MLP = Plan(
    model="digits_mlp",
    settings=(
        MAGNITUDE,
        WANDA,
        WANDA_BIAS,
        Setting("SparseGPT's mask", initial="sparsegpt"),
        OFFICIAL,
        DECREASE,
        DECREASE_BIAS,
        SWAP,
        SWAP_BIAS,
        _two_of_four(WANDA),
        _two_of_four(DECREASE),
        _two_of_four(SWAP),
    ),
    sparsities=(0.6, 0.7, 0.8, 0.9),
    judged=0.8,
    epochs=30,
    batch=64,
    lr=1e-3,
    weight_decay=0.0,
    layers=("features.2", "features.4"),
    widths=(512, 512, 512),
    train_images=1400,
)
CHARACTERS = Plan(
    model="char_transformer",
    settings=(MAGNITUDE, WANDA, WANDA_BIAS, DECREASE, SWAP, SWAP_BIAS),
    sparsities=(0.5, 0.6, 0.7),
    judged=None,
    epochs=8,
    batch=8,
    lr=3e-3,
    weight_decay=0.01,
)


class Digits(Classify):
    """The perceptron on pixels between 0 and 1, trained by Adam at a constant rate."""

    def __init__(self, images: Images, plan: Plan) -> None:
        pixels, labels = (
            torch.cat(pair) for pair in ((images.train, images.test), (images.train_labels, images.test_labels))
        )
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        first, rest = order[: plan.train_images], order[plan.train_images :]
        images = replace(
            images, train=pixels[first], train_labels=labels[first], test=pixels[rest], test_labels=labels[rest],
            mean=(0.0,), std=(1.0,),
            condition=f"The handwritten digits of scikit-learn, 8x8 pixels between 0 and 1; {len(first):,} images for training, "
            f"{len(rest):,} for the test.",
        )  # fmt: skip
        super().__init__(images, plan)  # type: ignore[arg-type]

    def network(self) -> nn.Module:
        channels, classes = self.images.train.shape[1], len(self.images.classes)
        return models.digits_mlp(self.plan.widths, in_channels=channels, num_classes=classes)  # type: ignore[attr-defined]

    def train(self, model: nn.Module, seed: int, advance: Advance) -> None:
        plan = self.plan
        groups = [{"params": list(model.parameters()), "lr": plan.lr, "weight_decay": plan.weight_decay}]
        training.fit(
            model, self.images, groups, epochs=plan.epochs, batch=plan.batch, seed=seed, advance=advance,
            make=torch.optim.Adam, floor=1.0,
        )  # fmt: skip

    def calibration(self, seed: int) -> Iterator[Tensor]:
        yield self.images.normalize(self.images.train)


def experiment(
    data: str | Path = "digits",
    seeds: int = 3,
    *,
    out: Path,
    plan: Plan | None = None,
    weights: Path | None = None,
    progress: Any = None,
) -> Results:
    """Train the dense networks, prune them, and return the results, also written to ``out``.

    Args:
        data: ``"digits"``, ``"text"`` (:func:`cofire.data.load_text`) or a folder of images (:func:`cofire.data.load`).
        seeds: repeats; each draws its own initial weights and order.
        out: folder for ``results.json`` and the weights. What it holds of the same experiment is not run again.
        plan: how to train and prune; None: the one for the data.
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
    for sparsity in plan.sparsities:
        if not 0 <= sparsity < 1:
            raise ValueError(f"experiment: sparsity must be at least 0 and below 1, got {sparsity:g}")
    run = _Run(data, seeds, plan, out, weights, progress)
    for seed in range(seeds):
        run.dense(seed, plan.epochs)
        for setting, sparsity in run.cells:
            run.cell(setting, sparsity, seed)
    run.results["criteria"] = [asdict(c) for c in dsnot_report.criteria(run.results)]
    run.save()
    return run.results


@contextmanager
def by_reference(names: Sequence[str] = REFINEMENTS) -> Iterator[None]:
    """Within the context some operators compute by their references."""
    fields = [vars(OPERATORS[name]) for name in names]
    before = [field["overload"] for field in fields]
    for name, field in zip(names, fields, strict=True):
        field["overload"] = getattr(torch.ops.cofire, name).reference
    try:
        yield
    finally:
        for field, was in zip(fields, before, strict=True):
            field["overload"] = was


class _Run(Run):
    task: Calibrated

    def __init__(
        self, data: str | Path, seeds: int, plan: Plan, out: Path, weights: Path | None, progress: Any
    ) -> None:
        self.plan = plan
        found = datasets.load_text() if str(data) == TEXT else datasets.load(data, seed=0)
        kind: Callable[..., Task] = Predict if isinstance(found, Text) else Digits if plan.widths else Classify
        task = kind(found, plan)
        self.cells = [
            (setting, sparsity)
            for setting in plan.settings
            for sparsity in (
                plan.sparsities if setting.pattern is None else (1 - setting.pattern[0] / setting.pattern[1],)
            )
        ]
        settings = {"method": "dsnot", "data": task.name, "condition": task.condition, "unit": task.unit}
        super().__init__(
            {**settings, "plan": asdict(plan)}, task, seeds, out, weights, progress,
            seeds * (plan.epochs + len(self.cells)),
        )  # fmt: skip

    def cell(self, setting: Setting, sparsity: float, seed: int) -> None:
        """One cell: score, errors of the layers, and whether kernels and references make the same masks."""
        if self.missing(seed, setting=setting.name, sparsity=sparsity):
            method = setting.method(1 - sparsity, self.plan.layers)
            model, start = self.network(seed), time.perf_counter()
            masks, facts = self.pruned(method, model, seed)
            row: Results = {
                "setting": setting.name,
                **asdict(setting),
                "name": setting.name,
                "sparsity": sparsity,
                "seed": seed,
            }
            row["seconds"] = time.perf_counter() - start
            row["layers"] = facts
            row["weights"] = sum(mask.numel() for mask in masks)
            row["kept"] = sum(int(mask.sum()) for mask in masks)
            row["uniform"] = all(len(mask.sum(1).unique()) == 1 for mask in masks)
            row["score"] = self.task.score(model)
            judged = setting.refine != "none" and (sparsity == self.plan.judged or setting.pattern is not None)
            if judged and self.plan.judged is not None:
                with by_reference():
                    again, _ = self.pruned(method, self.network(seed), seed)
                row["same_masks"] = all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
            self.results["cells"].append(row)
            self.save()
        self.advance(1, f"{setting.name} at {sparsity:.0%}, seed {seed}")

    @torch.no_grad()
    def pruned(self, method: DSnoT, model: nn.Module, seed: int) -> tuple[list[Tensor], list[Results]]:
        """Prune in place; the masks of the layers, and what was done to each."""
        found = method.prune_(model, self.task.calibration(seed))
        masks = [unpack_mask(bits, pruned.shape[1]) for bits, pruned in found.values()]
        return masks, [asdict(pruned) for _, pruned in found.values()]


# --------------------------------------------------------------------------------------------------------- commands


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
    """``cofire train dsnot``: run the experiment, print tables and criteria, and write them and plots to ``out``."""
    refuse_options("dsnot", data, model, CHARACTERS.model, epochs, head_lr, validate)
    plan = _plan(data, model, epochs, lr)
    folder = out / f"dsnot-{plan.model}-{Path(data).name}"
    report.show(
        dsnot_report,
        results_file(folder),
        lambda progress: experiment(data, seeds, out=folder, plan=plan, weights=weights, progress=progress),
    )


def prune(
    *,
    data: str = "digits",
    model: str | None = None,
    weights: Path | None = None,
    sparsities: Sequence[float] = (),
    pattern: str | None = None,
    initial: str = "wanda",
    refine: str = "swap1",
    stop: str = "decrease",
    bias_correct: bool = True,
    seeds: int = 1,
    epochs: int | None = None,
    out: Path = Path("runs"),
) -> None:
    """``cofire prune``: one way to prune, beside magnitude and Wanda; prints and writes as ``cofire train dsnot`` does."""
    refuse_options("prune", data, model, CHARACTERS.model, epochs, None, False)
    groups = None if pattern is None else _pattern(pattern)
    if groups is not None and sparsities:
        raise ValueError("prune: give --sparsity or --pattern, got both")
    chosen = Setting("chosen", initial, refine, stop, bias_correct)
    bias = ", bias" if bias_correct else ""
    loop = ", released loop" if stop == "official" else ""
    chosen = replace(chosen, name=f"{refine} from {initial}{loop}{bias}")
    settings = [replace(setting, pattern=groups) for setting in (MAGNITUDE, WANDA, chosen)]
    settings[2].method(0.5, None)  # refuses what cannot be
    plan = _plan(data, model, epochs, None)
    plan = replace(plan, settings=tuple(settings), sparsities=tuple(sparsities) or plan.sparsities, judged=None)
    name = "-".join([plan.model, Path(data).name, refine, initial, stop, f"bias{bias_correct:d}"])
    amounts = pattern.replace(":", "of") if pattern else "-".join(f"{s:g}" for s in plan.sparsities)
    folder = out / f"prune-{name}-{amounts}"
    report.show(
        dsnot_report,
        results_file(folder),
        lambda progress: experiment(data, seeds, out=folder, plan=plan, weights=weights, progress=progress),
    )


def _pattern(text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"prune: pattern must be N:M, as 2:4, got {text!r}")
    return int(parts[0]), int(parts[1])


def _plan(data: str, model: str | None, epochs: int | None, lr: float | None) -> Plan:
    plan = CHARACTERS if data == TEXT else MLP
    if data != TEXT and (data != "digits" or model not in (None, MLP.model)):
        # another network, trained as those of the other experiments are; all layers but the output
        plan = replace(
            MLP,
            model=model or MLP.model,
            widths=(),
            layers=None,
            lr=0.05,
            weight_decay=5e-4,
            judged=None,
            calibration=8,
        )
    plan = plan if epochs is None else replace(plan, epochs=epochs)
    return plan if lr is None else replace(plan, lr=lr)
