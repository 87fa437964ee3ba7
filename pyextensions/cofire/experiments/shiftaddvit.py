# SPDX-License-Identifier: Apache-2.0
"""ShiftAddViT's experiment: what ``cofire train shiftaddvit`` runs.

A vision transformer is trained in full precision. From its weights each *cell* trains on: the network as it is (the
control), and with attention of additions. From the latter, a network whose linear layers are powers of two, and for each
pair of latencies one with mixtures. Each finished cell is in the results file, so an interrupted experiment goes on where it
stopped.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import data as datasets
from cofire import models, ops
from cofire.data import Images
from cofire.experiments import report, shiftaddvit_report
from cofire.experiments.environment import environment
from cofire.experiments.files import Results, load_results, load_weights, read_weights, results_file, save_weights
from cofire.experiments.training import Advance, accuracy, adamw, fit, refuse_heads, steps_per_epoch
from cofire.files import write_atomically
from cofire.methods import ShiftAddViT
from cofire.nn import BinaryLinearAttention, MixtureOfPrimitives
from cofire.ops.shift_add_attention import _normalised
from cofire.registry import OPERATORS


@dataclass(frozen=True)
class Cell:
    """One network: the stage that it is at, and from which cell's weights it starts."""

    name: str
    stage: int
    start: str = ""  #: empty: the network in full precision
    encoder: str = "hash"
    alpha: tuple[float, float] | None = None


ADDITIONS = "additions"
CELLS = (
    Cell("continued", 0),
    Cell(ADDITIONS, 1),
    Cell("additions, thresholds", 1, encoder="binary"),
    Cell("shifts", 2, ADDITIONS),
    Cell("mixture 6:4", 3, ADDITIONS, alpha=(6.0, 4.0)),
    Cell("mixture 8:2", 3, ADDITIONS, alpha=(8.0, 2.0)),
)


@dataclass(frozen=True)
class Plan:
    """How an experiment trains; rates are those of AdamW, which rise shortly and fall as a cosine to zero."""

    model: str
    dense_epochs: int
    epochs: int
    batch: int
    dense_lr: float
    lr: float  #: of every training that follows
    router_lr: float = 1e-2
    cells: tuple[Cell, ...] = CELLS
    bits: int = 16
    anchors: int = 12
    topk: int = 10
    balance: float = 0.01
    fitted: int = 128  #: images that the hash is fitted to
    weight_decay: float = 0.05
    warm_up: int = 20
    images: int | None = None  #: train on a fixed subset of this many
    test_images: int | None = None  #: test on the first so many
    #: Train without a share of the training images and score on them, so that a setting is chosen without the test.
    validate: bool = False


DIGITS = Plan(model="digits_vit", dense_epochs=30, epochs=10, batch=32, dense_lr=2e-3, lr=1e-3)
#: For larger images: a short training on few of them.
IMAGES = Plan(
    model="vit_patch8", dense_epochs=15, epochs=5, batch=64, dense_lr=1e-3, lr=1e-3, images=4_000, test_images=2_000
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
        seeds: every cell runs with seeds 0 to ``seeds - 1``; all on one split of the data.
        out: folder for ``results.json`` and the weights.
        plan: how to train; default: as fits the data.
        weights: a ``state_dict`` of the network in full precision to start from instead of random weights.
        progress: a ``rich.progress.Progress`` to report to, or None.

    Raises:
        ValueError: a value out of range, weights that do not fit, or ``out`` holds another experiment.
    """
    if seeds < 1:
        raise ValueError(f"experiment: seeds must be at least 1, got {seeds}")
    plan = plan or plan_of(str(data))
    if not 0 < plan.lr < math.inf:
        raise ValueError(f"experiment: lr must be a positive number, got {plan.lr:g}")
    run = Run(data, seeds, plan, out, weights, progress)
    for seed in range(seeds):
        run.dense(seed)
        for cell in plan.cells:
            run.cell(cell, seed)
    run.latency()
    run.results["criteria"] = [asdict(c) for c in shiftaddvit_report.criteria(run.results)]
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
            "method": "shiftaddvit",
            "data": self.images.name,
            "condition": self.images.condition,
            "seeds": seeds,
            "weights": None if weights is None else weights.name,
            "plan": json.loads(json.dumps(asdict(plan))),
        }
        self.results = load_results(self.file, settings, environment())
        epochs = seeds * (plan.dense_epochs + len(plan.cells) * plan.epochs)
        self.bar = None if progress is None else progress.add_task("training", total=epochs)

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
        return self.images.normalize(self.images.train[: self.plan.fitted])

    def network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        channels, classes = self.images.train.shape[1], len(self.images.classes)
        return models.build(self.plan.model, in_channels=channels, num_classes=classes)

    def method(self, cell: Cell) -> ShiftAddViT:
        plan = self.plan
        options: dict[str, Any] = {"bits": plan.bits, "anchors": plan.anchors, "topk": plan.topk}
        if cell.stage == 3:
            options["noise_steps"] = plan.epochs * steps_per_epoch(self.images, plan.batch)
        return ShiftAddViT(cell.stage, cell.encoder, balance=plan.balance, alpha=cell.alpha, **options)

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
        groups = _groups(model, plan.dense_lr, plan.weight_decay)
        self._fit(model, groups, plan.dense_epochs, seed, None, self._each(f"full precision, seed {seed}"))
        row |= {"accuracy": accuracy(model, self.images), "seconds": time.perf_counter() - start}
        save_weights(self._file("dense", seed), model)
        self.results["dense"].append(row)
        self.save()

    def cell(self, cell: Cell, seed: int) -> None:
        """Train one cell on, and measure it."""
        plan = self.plan
        if any((c["cell"], c["seed"]) == (cell.name, seed) for c in self.results["cells"]):
            return self._advance(plan.epochs, f"{cell.name}, seed {seed}: found")
        start = time.perf_counter()
        model, method = self.start(cell, seed), None if cell.stage == 0 else self.method(cell)
        row: Results = {"cell": cell.name, "seed": seed, "stage": cell.stage, "alpha": cell.alpha}
        row["before"] = accuracy(model, self.images)
        if method is None:
            groups = _groups(model, plan.lr, plan.weight_decay)
        else:
            groups = method.parameter_groups(model, plan.lr, plan.weight_decay, router_lr=plan.router_lr)
        watch = _Watch(model, self.example, plan.epochs * steps_per_epoch(self.images, plan.batch))
        torch.manual_seed(seed)  # of the routers' noise
        self._fit(model, groups, plan.epochs, seed + 1, method, self._each(f"{cell.name}, seed {seed}"), watch=watch)
        row |= {"seconds": time.perf_counter() - start, "accuracy": accuracy(model, self.images)}
        if method is not None:
            row |= self.measures(cell, method, model) | {"course": watch.course}
        save_weights(self._file(cell.name, seed), model)
        self.results["cells"].append(row)
        self.save()

    def start(self, cell: Cell, seed: int) -> nn.Module:
        """The network of a cell before its training."""
        model = self.network(seed)
        if not cell.start:
            load_weights(model, read_weights(self._file("dense", seed)))
        else:
            model = self.trained(self._named(cell.start), seed)
        return model if cell.stage == 0 else self.method(cell).prepare(model, self.example)

    def trained(self, cell: Cell, seed: int) -> nn.Module:
        """The network of a cell after its training."""
        model = self.start(cell, seed)
        load_weights(model, read_weights(self._file(cell.name, seed)))
        return model

    def _named(self, name: str) -> Cell:
        return next(cell for cell in self.plan.cells if cell.name == name)

    def measures(self, cell: Cell, method: ShiftAddViT, model: nn.Module) -> Results:
        """What a trained network is beside accurate."""
        test = self.images.normalize(self.images.test)
        found = method.report(model, [test[:256]])
        names = ("dense_bytes", "packed_bytes", "resident_bytes", "model_bytes", "model_resident_bytes", "dead")
        shares = ("shift_share", "balanced_share", "deployed_error", "deployed_equal")
        row: Results = {n: getattr(found, n) for n in (*names, *shares)}
        row["weights"] = sum(math.prod(layer.shape) for layer in found.layers)
        row["packed"] = accuracy(method.finalize(model), self.images)
        if cell.stage == 1 and cell.encoder == "hash":
            row |= hash_overlap(model, test[:32], self.plan.topk) | against_reference(model, test[:32])
        if cell.stage == 3:
            row |= router_gradients(method, model, test[:32], self.images.test_labels[:32])
        return row

    def latency(self) -> None:
        """The deployed networks of the first seed against the one in full precision, and the experts of the mixtures."""
        if "latency" in self.results:
            return
        dense = self.network(0)
        load_weights(dense, read_weights(self._file("dense", 0)))
        rows: list[Results] = []
        for cell in self.plan.cells:
            if cell.stage == 0 or cell.encoder != "hash" or (cell.alpha and cell.alpha != self.plan.cells[-1].alpha):
                continue
            method, model = self.method(cell), self.trained(cell, 0)
            for n in (1, self.plan.batch):
                timing = method.report(model, [self.example[:n]], dense=dense.eval()).latency
                assert timing is not None
                rows.append({"cell": cell.name, **timing.as_dict()})
            if cell.stage == 3:
                self.results["experts"] = self._experts(method, model)
        self.results["latency"] = rows
        self.save()

    def _experts(self, method: ShiftAddViT, model: nn.Module) -> list[Results]:
        """Latency of both experts of each shape, in microseconds for a batch's tokens."""
        method.measure(model, self.example[: self.plan.batch])
        shapes: dict[tuple[int, int], Results] = {}
        for layer in model.modules():
            if isinstance(layer, MixtureOfPrimitives):
                shape = (layer.in_features, layer.out_features)
                dense, shift = layer.latency.tolist()
                shapes.setdefault(shape, {"shape": list(shape), "dense_us": dense, "shift_us": shift})
        return list(shapes.values())

    def _fit(
        self, model: nn.Module, groups: list[dict[str, Any]], epochs: int, seed: int, method: ShiftAddViT | None,
        advance: Advance, watch: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        groups = [group for group in groups if group["params"]]
        options: dict[str, Any] = {"make": adamw, "scheduled": len(groups), "warm_up": self.plan.warm_up}
        options |= {"epochs": epochs, "batch": self.plan.batch, "seed": seed, "method": method}
        fit(model, self.images, groups, advance=advance, watch=watch, **options)

    # --------------------------------------------------------------------------------------------- progress

    def _file(self, what: str, seed: int) -> Path:
        return self.out / "weights" / f"{what.replace(', ', '-').replace(' ', '-').replace(':', '-')}-{seed}.pt"

    def _each(self, what: str) -> Advance:
        return lambda note: self._advance(1, f"{what}, {note}")

    def _advance(self, epochs: int, text: str) -> None:
        if self.progress is not None:
            self.progress.update(self.bar, advance=epochs, description=text)


def _groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]


# ------------------------------------------------------------------------------------------------------- measures


class _Watch:
    """Follows the share of tokens that would take the shift expert, on one batch of training images."""

    def __init__(self, model: nn.Module, example: Tensor, total: int) -> None:
        self.model, self.example, self.every, self.total = model, example[:64], max(total // 20, 1), total
        self.mixtures = [m for m in model.modules() if isinstance(m, MixtureOfPrimitives)]
        self.course: list[tuple[int, float]] = []

    def __call__(self, step: int) -> None:
        if self.mixtures and (step % self.every == 0 or step == self.total):
            self.course.append((step, self.share()))

    @torch.no_grad()
    def share(self) -> float:
        counts: list[Tensor] = []
        hooks = [m.register_forward_pre_hook(lambda m, args: counts.append(m.route(args[0])[2])) for m in self.mixtures]
        training = self.model.training
        try:
            self.model.eval()(self.example)
        finally:
            self.model.train(training)
            for hook in hooks:
                hook.remove()
        total = torch.stack(counts).double().sum(0)
        return float(total[1] / total.sum())


def _inputs(model: nn.Module, x: Tensor) -> list[tuple[BinaryLinearAttention, Tensor]]:
    """The attentions, and what each gets when the network runs on ``x``."""
    found: list[tuple[BinaryLinearAttention, Tensor]] = []
    layers = [m for m in model.modules() if isinstance(m, BinaryLinearAttention)]
    hooks = [m.register_forward_pre_hook(lambda m, args: found.append((m, args[0]))) for m in layers]
    try:
        model.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def hash_overlap(model: nn.Module, x: Tensor, topk: int) -> Results:
    """Of the tokens most similar to each by angle, how many are so by Hamming distance: mean over heads and layers.

    A token itself is not counted, and equal distances are ordered at random. ``chance`` is what any codes that know nothing
    would have, and ``random_overlap`` what the same hash has with random directions in the place of the fitted ones.
    """
    generator = torch.Generator().manual_seed(0)
    overlaps: dict[str, list[float]] = {"overlap": [], "random_overlap": []}
    tokens = 0
    for layer, inputs in _inputs(model, x):
        unit = _normalised(layer._heads(layer.qk(inputs)), 1e-6)
        rows = unit.transpose(0, 1).flatten(1, 2)
        tokens = rows.shape[1]
        itself = torch.eye(tokens, dtype=torch.bool)
        near = (rows @ rows.transpose(1, 2)).masked_fill(itself, -2).topk(topk).indices
        fitted = layer.projection.clone()
        drawn = torch.randn(fitted.shape, generator=generator)
        for name, projection in (("overlap", fitted), ("random_overlap", drawn)):
            layer.projection.copy_(projection)
            codes = layer.encode(inputs).transpose(0, 1).flatten(1)
            alike = ops.hamming_similarity(codes, codes, bits=layer.bits).float()
            alike = (alike + 0.5 * torch.rand(alike.shape, generator=generator)).masked_fill(itself, -1e9)
            found = alike.topk(topk).indices
            common = (near[..., :, None] == found[..., None, :]).any(-1).float().mean()
            overlaps[name].append(float(common))
        layer.projection.copy_(fitted)
    means = {name: sum(values) / len(values) for name, values in overlaps.items()}
    return {**means, "chance": topk / (tokens - 1)}


@torch.no_grad()
def against_reference(model: nn.Module, x: Tensor) -> Results:
    """The kernels against the references in fp32 on what the layers get: codes that differ, and the largest relative error."""
    differing, error = 0, 0.0
    for layer, inputs in _inputs(model, x):
        z, v = (layer._heads(p(inputs)) for p in (layer.qk, layer.v))
        hash = (layer.anchors, layer.center, layer.projection)
        codes, _ = ops.hash_encode(z, *hash)
        expected = OPERATORS["hash_encode"].reference(z, *hash, 1e-6)[1]
        differing += int((codes != expected).sum())
        y = ops.binary_linear_attention(codes, codes, v, layer.mix, bits=layer.bits)
        exact = OPERATORS["binary_linear_attention"].reference(codes, codes, v, layer.mix, None, None, layer.bits, 1e-6)
        error = max(error, float((y - exact).abs().max() / exact.abs().max()))
    return {"codes_differing": differing, "kernel_error": error}


def router_gradients(method: ShiftAddViT, model: nn.Module, x: Tensor, y: Tensor) -> Results:
    """How many routers get a gradient, and the smallest norm among these: of all that is trained on, and of the task alone.

    ``routers_trained`` and ``training_gradient``: of task and balance, in training mode as they are added up there.
    ``routers_reached`` and ``router_gradient``: of the task, as the network is evaluated. What is below 1e-5 of the largest is
    taken for the rounding error of zero: the gate of a projection whose rows are normalised afterwards changes nothing, so
    that its router is left to the balance.
    """
    model = copy.deepcopy(model)  # a forward in training leaves its marks
    routers = [m.router.weight for m in model.modules() if isinstance(m, MixtureOfPrimitives)]

    def reached(loss: Tensor) -> tuple[int, float]:
        norms = torch.stack([torch.linalg.vector_norm(g) for g in torch.autograd.grad(loss, routers)])
        found = norms[norms > 1e-5 * norms.max()]
        return len(found), float(found.min()) if len(found) else 0.0

    by_task, least = reached(F.cross_entropy(model.eval()(x), y))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # of the routers' noise
        trained, smallest = reached(F.cross_entropy(model.train()(x), y) + method.loss(model))
    counts = {"routers": len(routers), "routers_trained": trained, "routers_reached": by_task}
    return counts | {"training_gradient": smallest, "router_gradient": least}


# --------------------------------------------------------------------------------------------------------- command


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
        plan = replace(plan, dense_epochs=epochs, epochs=epochs)
    if lr is not None:
        plan = replace(plan, lr=lr)
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
    """``cofire train shiftaddvit``: run the experiment, print table and criteria, write results, table and plots."""
    refuse_heads("shiftaddvit", epochs, head_lr, "what follows the dense training")
    plan = plan_of(data, model, epochs, lr, validate)
    folder = out / f"shiftaddvit-{plan.model}-{Path(data).name}"
    report.show(
        shiftaddvit_report,
        results_file(folder, validate),
        lambda progress: experiment(data, seeds, out=folder, plan=plan, weights=weights, progress=progress),
    )
