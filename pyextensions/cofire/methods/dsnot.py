# SPDX-License-Identifier: Apache-2.0
"""DSnoT: pruning after training, with masks that are refined on calibration data and no retraining.

Source: Zhang, Zhao, Lin, Sun, Yao, Han, Tanner, Liu, Ji, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse
LLMs", ICLR 2024. Starting masks: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language
Models" (Wanda), ICLR 2024; Frantar, Alistarh, "SparseGPT", ICML 2023.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cofire.methods.base import Method, Report, bare, matches, replace_modules
from cofire.names import near_matches
from cofire.nn import SparseLinear
from cofire.nn.calibration import InputStatistics, evaluation, in_order, run
from cofire.nn.lowbit import dense_weight, is_transposed, linear_layers
from cofire.nn.sparse import check_groups
from cofire.ops import corrected_bias, dsnot_swap, gram_swap, keep_mask, pruning_error, unpack_mask
from cofire.ops.checks import check_choice, check_finite, check_integer, check_module, check_number
from cofire.ops.quantizers import inverse_factor
from cofire.ops.selection import check_scores
from cofire.ops.sparse_refine import STOPS, check_pad, check_pattern

#: Starting masks, and how they are refined.
INITIAL = ("magnitude", "wanda", "sparsegpt")
REFINERS = ("none", "dsnot", "swap1")
#: Of the released code: its error is of sums over a sequence, and its threshold not relative to anything.
OFFICIAL_SWAPS, OFFICIAL_THRESHOLD = 50, 0.1
THRESHOLD = 1e-3
#: Of the mean of the diagonal, added to it before SparseGPT's scores are taken.
DAMPING = 0.01


@dataclass(frozen=True)
class Pruned:
    """What was done to one layer. Errors are mean squares over the layer's outputs, on the calibration data."""

    name: str
    shape: tuple[int, int]
    kept: int  #: weights
    output: float  #: mean square of the dense layer's outputs without the bias
    initial: float  #: error of the starting mask
    refined: float  #: and of the refined one
    moved: int  #: weights that were pruned at first and are kept now


@dataclass(frozen=True)
class DSnoTReport(Report):
    """What the pruned layers are."""

    layers: int
    weights: int  #: of the pruned layers
    density: float  #: share of them that is kept
    output: float  #: means over the layers: mean square of the outputs,
    initial_error: float  #: error of the starting masks,
    refined_error: float  #: and of the refined ones
    dense_bytes: int  #: of the pruned layers' weights
    sparse_bytes: int  #: as they are stored by finalize
    by_layer: tuple[Pruned, ...]


@dataclass(frozen=True)
class DSnoT(Method, name="dsnot"):
    """Prune linear layers of a trained model: start from a mask, and swap weights within its rows.

    Layers are pruned in the order in which data reaches them, each on what the pruned layers before it return.

    Args:
        density: share of the weights of each row that is kept, above 0 and at most 1.
        pattern: ``(N, M)`` instead: N of each M columns are kept.
        initial: the starting mask: ``"wanda"`` (|w| times the norm of the input), ``"magnitude"``, or ``"sparsegpt"``
            (``w^2 / d^2`` with the diagonal d of the upper Cholesky factor of the inverse Hessian; weights stay as they are).
        refine: ``"dsnot"``: by the mean of each output (:func:`cofire.ops.dsnot_swap`). ``"swap1"``: by its squared error
            (:func:`cofire.ops.gram_swap`). ``"none"``.
        stop: of "dsnot": ``"decrease"``, or ``"official"``, the loop of the released code.
        bias_correct: add to the bias what the pruned weights would give on the mean input; makes a bias where there is none.
            "swap1" then looks at the error that is left: its Gram matrix is the covariance.
        max_swaps: most swaps of a row. Default: "dsnot" K / 80, at least 8 (with ``stop="official"`` 50); "swap1" K.
        threshold: of "dsnot": an error to be content with. Default: 1e-3, in units of the error that random signs would
            give (with ``stop="official"`` 0.1, absolute).
        gamma: of "dsnot": power of the variance.
        layers: names or patterns (``"layers.*.mlp.*"``) of the layers to prune. Default: all linear layers but the one
            that gives the model's output. Layers whose weight is tied to another's stay dense always.
        pad: of a pattern: layers may have any number of columns. What is behind the last whole group, r columns, is a group
            of which ``min(N, r)`` are kept.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.

    Source: DSnoT, algorithm 1. Departures: a row ends before its error would grow (``stop="official"``: when it is below
    the threshold, or after 50 swaps); the variance is that of all inputs, not the mean over batches of theirs; features
    without variance are never grown; every layer is refined, where the released code leaves out those of MLPs.
    """

    density: float = 0.5
    pattern: tuple[int, int] | None = None
    initial: str = "wanda"
    refine: str = "dsnot"
    stop: str = "decrease"
    bias_correct: bool = True
    max_swaps: int | None = None
    threshold: float | None = None
    gamma: float = 1.0
    layers: Sequence[str] | None = None
    pad: bool = False

    def __post_init__(self) -> None:
        check_number("DSnoT", density=self.density, gamma=self.gamma)
        check_choice("DSnoT", "initial", self.initial, INITIAL)
        check_choice("DSnoT", "refine", self.refine, REFINERS)
        check_choice("DSnoT", "stop", self.stop, STOPS)
        if not 0 < self.density <= 1:
            raise ValueError(f"DSnoT: density must be above 0 and at most 1, got {self.density}")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"DSnoT: gamma must be a number of at least 0, got {self.gamma}")
        if self.pattern is not None:
            check_pattern("DSnoT", self.pattern)
        check_pad("DSnoT", self.pad, self.pattern)
        if self.max_swaps is not None:
            check_integer("DSnoT", max_swaps=self.max_swaps)
            if self.max_swaps < 0:
                raise ValueError(f"DSnoT: max_swaps must be at least 0, got {self.max_swaps}")
        if self.threshold is not None:
            check_number("DSnoT", threshold=self.threshold)
            if not 0 <= self.threshold < math.inf:
                raise ValueError(f"DSnoT: threshold must be a number of at least 0, got {self.threshold}")
        layers = self.layers
        if layers is not None and (
            isinstance(layers, str) or not isinstance(layers, Collection) or not all(isinstance(p, str) for p in layers)
        ):
            raise TypeError(f"DSnoT: layers must be a sequence of names or patterns, got {layers!r}")

    # ------------------------------------------------------------------------------------------------ one layer

    def mask(self, weight: Tensor, inputs: InputStatistics) -> tuple[Tensor, Tensor]:
        """The starting mask of a layer and the refined one, packed.

        Args:
            weight: ``[N, K]``.
            inputs: statistics of the layer's inputs.

        Raises:
            ValueError: weights, inputs or scores that are not finite, a density that keeps nothing, K no multiple of the
                pattern's M (without ``pad``).
        """
        columns = weight.shape[1]
        check_finite("DSnoT.mask", weight=weight)
        if not inputs.finite:
            raise ValueError("DSnoT.mask: the calibration inputs of the layer must be finite, got values that are not")
        initial = self._initial(weight, inputs)
        if self.refine == "none":
            return initial, initial
        if self.refine == "swap1":
            gram = (inputs.covariance if self.bias_correct else inputs.second_moment).float()
            return initial, gram_swap(
                weight, initial, gram, max_swaps=self.max_swaps, pattern=self.pattern, pad=self.pad
            )
        official = self.stop == "official"
        swaps, threshold = self.max_swaps, self.threshold
        if official:
            swaps = OFFICIAL_SWAPS if swaps is None else swaps
            threshold = OFFICIAL_THRESHOLD if threshold is None else threshold
        refined = dsnot_swap(
            weight,
            initial,
            inputs.mean * (inputs.count / inputs.samples if official else 1.0),
            inputs.norm,
            inputs.variance,
            max_swaps=max(8, columns // 80) if swaps is None else swaps,
            gamma=self.gamma,
            threshold=THRESHOLD if threshold is None else threshold,
            stop=self.stop,
            pattern=self.pattern,
            pad=self.pad,
        )
        return initial, refined

    def _initial(self, weight: Tensor, inputs: InputStatistics) -> Tensor:
        columns = weight.shape[1]
        score: dict[str, Any] = {"score": "magnitude"}
        if self.initial == "wanda":
            score = {"score": "wanda", "other": inputs.norm.float()}
        elif self.initial == "sparsegpt":
            hessian = inputs.gram.double()
            dead = hessian.diagonal() == 0  # inputs that never came
            hessian.diagonal()[dead] = 1
            scale = 1 / inverse_factor("DSnoT", hessian, DAMPING).diagonal()
            score = {"score": "wanda", "other": torch.where(dead, 0.0, scale).float()}  # the same order without squares
        check_scores("DSnoT.mask", weight, score.get("other"), score["score"])
        if self.pattern is not None:
            keep, group = self.pattern
            check_groups("DSnoT.mask", self.pattern, group, columns, self.pad)
            return keep_mask(weight, keep, scope="block", block=(1, group), pad=self.pad, **score)
        keep = round(self.density * columns)
        if keep == 0:
            raise ValueError(f"DSnoT.mask: density must keep at least one of {columns} columns, got {self.density}")
        return keep_mask(weight, keep, **score)

    # ------------------------------------------------------------------------------------------------- protocol

    def prune_(self, model: nn.Module, data: Iterable[Any]) -> dict[str, tuple[Tensor, Pruned]]:
        """Prune the dense layers of ``model`` in place: pruned weights become zeros, and biases are corrected.

        Args:
            model: its linear layers are changed, not replaced.
            data: calibration batches, as :meth:`prepare` takes them.

        Returns:
            By name of the layer, its packed mask and what was done.

        Raises:
            TypeError, ValueError: as :meth:`prepare`.
        """
        batches = list(data)
        if not batches:
            raise ValueError("DSnoT.prepare: data must hold batches of calibration inputs, got none")
        chosen = self._chosen(model, batches[0])
        done: dict[str, tuple[Tensor, Pruned]] = {}

        def visit(found: Mapping[str, InputStatistics]) -> None:
            for name, inputs in found.items():
                try:
                    done[name] = self._prune_layer(name, chosen[name], inputs)
                except ValueError as error:
                    sentence = str(error).removeprefix("DSnoT.mask: ")
                    raise ValueError(f"DSnoT.prepare: layer {name!r}: {sentence}") from None

        try:
            in_order(model, batches, chosen, visit)
        except ValueError as error:
            if str(error).startswith("in_order"):
                raise ValueError(f"DSnoT.prepare: {str(error).removeprefix('in_order: ')}") from None
            raise
        return {name: done[name] for name in chosen}

    def _prune_layer(self, name: str, layer: nn.Module, inputs: InputStatistics) -> tuple[Tensor, Pruned]:
        weight, bias = dense_weight(layer)
        initial, bits = self.mask(weight, inputs)
        columns = weight.shape[1]
        kept = unpack_mask(bits, columns)
        left = inputs.covariance if self.bias_correct else inputs.second_moment
        every = torch.zeros_like(bits)
        pruned = Pruned(
            name=name,
            shape=(weight.shape[0], columns),
            kept=int(kept.sum()),
            output=float(pruning_error(weight, every, inputs.second_moment).mean()),
            initial=float(pruning_error(weight, initial, left).mean()),
            refined=float(pruning_error(weight, bits, left).mean()),
            moved=int((kept & ~unpack_mask(initial, columns)).sum()),
        )
        if self.bias_correct:
            corrected = corrected_bias(weight, bits, inputs.mean.to(weight.dtype), bias)
            if bias is None:
                layer.bias = nn.Parameter(corrected)
            else:
                layer.get_parameter("bias").copy_(corrected)
        new = torch.where(kept, weight, 0.0)
        layer.get_parameter("weight").copy_(new.t() if is_transposed(layer) else new)
        return bits, pruned

    def _chosen(self, model: nn.Module, batch: Any) -> dict[str, nn.Module]:
        layers = dict(linear_layers(model))
        if self.layers is not None:
            for pattern in self.layers:
                if not matches(layers, pattern):
                    near = near_matches(pattern, layers)
                    raise ValueError(f"DSnoT.prepare: layers names {pattern!r}, which fits no linear layer{near}")
            chosen = {n: m for n, m in layers.items() if any(matches([n], pattern) for pattern in self.layers)}
        else:
            last = _gives_output(model, batch, layers)
            chosen = {n: m for n, m in layers.items() if n != last}
        if not chosen:
            raise ValueError(
                "DSnoT.prepare: the model must have a linear layer to prune (tied ones stay dense), got none"
            )
        return chosen

    def prepare(self, model: nn.Module, data: Iterable[Any] = ()) -> nn.Module:
        """A copy of ``model`` with pruned layers, each a :class:`cofire.nn.SparseLinear` that keeps its zeros in training.

        Args:
            model: trained; any model whose linear layers are ``nn.Linear`` or GPT-2's ``Conv1D``.
            data: calibration batches: the model is called as ``model(**batch)`` for a mapping, as ``model(batch[0])`` for a
                tuple or list, else as ``model(batch)``.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: no data, or none that reaches a layer; no linear layer, or a pattern that fits none; weights or
                inputs that are not finite; a density that keeps nothing of a row; a pattern that does not divide the
                columns (without ``pad``); a model that is pruned already.
        """
        check_module("DSnoT.prepare", model)
        if pruned_layers(model):
            raise ValueError("DSnoT.prepare: the model is pruned already; prepare the network that it was made from")
        result = copy.deepcopy(bare(model))
        with torch.no_grad():
            found = self.prune_(result, data)
        new: dict[int, nn.Module] = {}
        for name, (bits, pruned) in found.items():
            layer = result.get_submodule(name)
            mask = unpack_mask(bits, pruned.shape[1])
            sparse = SparseLinear.from_dense(layer, mask, mode="invariant").train(layer.training)
            sparse.pruned = pruned
            new[id(layer)] = sparse
        return replace_modules(result, new)

    def loss(self, model: nn.Module, output: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """Zero, a leaf of its own: nothing has to be trained. The kept weights may be, by the task's loss.

        Raises:
            ValueError: no pruned layer.
        """
        layer = next(iter(self._require(model, "loss").values()))
        device = next(t.device for t in (*layer.parameters(), *layer.buffers()))
        return torch.zeros((), dtype=torch.float32, device=device, requires_grad=True)

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Pruned weights are zeros again, whatever the optimiser did to them.

        Raises:
            ValueError: no pruned layer, or finalized already.
        """
        for layer in self._require(model, "step").values():
            layer.update_mask(layer.mask_bits)

    def finalize(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` in evaluation mode whose pruned layers hold the kept weights alone.

        Raises:
            ValueError: no pruned layer, or finalized already.
        """
        self._require(model, "finalize")
        result = copy.deepcopy(bare(model)).eval()
        new: dict[int, nn.Module] = {}
        for layer in pruned_layers(result).values():
            packed = layer.pack()
            packed.pruned = layer.pruned
            new[id(layer)] = packed
        return replace_modules(result, new)

    def report(self, model: nn.Module, batches: Iterable[Any] = ()) -> DSnoTReport:
        """Density, errors on the calibration data, bytes. ``batches`` are not looked at.

        Raises:
            ValueError: no pruned layer.
        """
        layers = self._require(model, "report")
        facts = tuple(layer.pruned for layer in layers.values())
        weights = sum(math.prod(fact.shape) for fact in facts)
        return DSnoTReport(
            layers=len(facts),
            weights=weights,
            density=sum(fact.kept for fact in facts) / weights,
            output=_mean(fact.output for fact in facts),
            initial_error=_mean(fact.initial for fact in facts),
            refined_error=_mean(fact.refined for fact in facts),
            dense_bytes=sum(
                layer.in_features * layer.out_features * _dtype(layer).itemsize for layer in layers.values()
            ),
            sparse_bytes=sum(_stored(layer) for layer in layers.values()),
            by_layer=facts,
        )

    def _require(self, model: nn.Module, where: str) -> dict[str, Any]:
        check_module(f"DSnoT.{where}", model)
        layers = pruned_layers(model)
        if not layers:
            raise ValueError(f"DSnoT.{where}: the model has no pruned layers; call prepare(model, data) first")
        if where in ("finalize", "step") and any(layer.mode == "compressed" for layer in layers.values()):
            raise ValueError(f"DSnoT.{where}: the model is finalized already")
        return layers


def pruned_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that :meth:`DSnoT.prepare` put into a model, by name."""
    return {n: m for n, m in bare(model).named_modules() if isinstance(getattr(m, "pruned", None), Pruned)}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


@torch.no_grad()
def _gives_output(model: nn.Module, batch: Any, layers: Mapping[str, nn.Module]) -> str | None:
    """The layer whose output is the model's."""
    outputs: dict[int, str] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def hook(name: str) -> Any:
        def take(module: nn.Module, args: Any, output: Tensor) -> None:
            kept.append(output)
            outputs[id(output)] = name

        return take

    handles = [m.register_forward_hook(hook(name)) for name, m in layers.items()]
    try:
        with evaluation(model):
            output = run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    return next((outputs[id(value)] for value in values if id(value) in outputs), None)


def _dtype(layer: Any) -> torch.dtype:
    found: torch.dtype = next(t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point())
    return found


def _stored(layer: Any) -> int:
    """Bytes of the weight, as finalize stores it."""
    packed = layer if layer.mode == "compressed" else layer.pack()
    return int(packed.sparse_weight.nbytes)
