# SPDX-License-Identifier: Apache-2.0
"""What the methods that train sparse networks share: their layers, what is deployed, and the report."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cofire.methods.base import Method, Report, bare, evaluation, first_input, replace_modules
from cofire.nn.compressed import Compressed
from cofire.nn.mask_checks import check_masks_agree
from cofire.nn.sparse import Sparse, sparsify_
from cofire.ops import apply_mask
from cofire.ops.checks import check_finite, check_integer, check_module, check_number


@dataclass(frozen=True)
class SparseLayer(Report):
    """One layer with a mask."""

    name: str
    shape: tuple[int, ...]
    kept: int
    density: float


@dataclass(frozen=True)
class SparsityReport(Report):
    """What is kept, and what that saves."""

    weights: int  #: of the layers with a mask
    kept: int
    density: float
    steps: int  #: optimiser steps that were counted
    dense_bytes: int  #: of the weights
    packed_bytes: int  #: of the deployed layers' weights: kept values, their positions, a few numbers of geometry
    deployed_error: float | None  #: largest difference of the outputs, over the largest output; None without batches
    layers: list[SparseLayer]


def check_between(where: str, name: str, value: Any, low: float, high: float, closed: bool = True) -> None:
    check_number(where, **{name: value})
    if not (low < value <= high if closed else low <= value < high):
        interval = f"({low:g}, {high:g}]" if closed else f"[{low:g}, {high:g})"
        raise ValueError(f"{where}: {name} must be in {interval}, got {value}")


def check_least(where: str, least: int, **values: Any) -> None:
    check_integer(where, **values)
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{where}: {name} must be at least {least}, got {value}")


def check_patterns(where: str, name: str, patterns: Any) -> None:
    if isinstance(patterns, str) or not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{where}: {name} must be a sequence of names or patterns, got {patterns!r}")


def gradient_of(where: str, what: str, name: str, layer: Sparse) -> Tensor | None:
    """The gradient of the step, which ``what`` needs. None if it is not finite: an overflow of mixed precision, whose
    optimiser step is skipped too."""
    gradient: Tensor | None = layer.weight.grad
    if gradient is None:
        raise ValueError(f"{where}: {what} needs the gradient of {name!r}, got None; zero gradients after step")
    return gradient if bool(gradient.isfinite().all()) else None


def check_kept(where: str, what: str, name: str, layer: Sparse, values: Tensor) -> None:
    """Values by which a layer's kept weights are compared must be finite."""
    check_finite(where, **{f"{what} of {name!r}": torch.where(layer.mask, values, 0.0)})


def sparse_layers(model: nn.Module) -> dict[str, Sparse]:
    """The layers that a method prepared: they count its steps."""
    return {
        name: module
        for name, module in bare(model).named_modules()
        if isinstance(module, Sparse) and "steps_taken" in module._buffers
    }


class SparseTraining(Method):
    """Prepares layers with masks, counts steps, deploys what is kept."""

    checks: bool = True

    def _agree(self, model: nn.Module) -> None:
        """Where there are several processes, all of them must have the same masks now."""
        if self.checks:
            check_masks_agree(bare(model))

    def _with_masks(
        self, model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str], **options: Any
    ) -> nn.Module:
        """A copy whose layers have full masks."""
        where = f"{type(self).__name__}.prepare"
        check_module(where, model)
        if any(isinstance(module, (Sparse, Compressed)) for module in model.modules()):
            raise ValueError(f"{where}: the model is prepared already; prepare the network that it was made from")
        result = copy.deepcopy(bare(model))
        patterns = None if include is None else list(include)
        try:
            result = sparsify_(result, density=1.0, include=patterns, exclude=list(exclude), **options)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for module in result.modules():
            if isinstance(module, Sparse):
                steps = torch.zeros((), dtype=torch.int64, device=module.weight.device)
                module.register_buffer("steps_taken", steps)
        return result

    def _require(self, model: nn.Module, where: str) -> dict[str, Sparse]:
        name = f"{type(self).__name__}.{where}"
        check_module(name, model)
        layers = sparse_layers(model)
        if not layers:
            done = any(isinstance(module, Compressed) for module in model.modules())
            state = (
                "is finalized already; prepare another"
                if done
                else "has no layer with a mask; call prepare(model) first"
            )
            raise ValueError(f"{name}: the model {state}")
        return layers

    def loss(self, model: nn.Module, output: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """Zero: the task's loss alone trains what is kept. A leaf of its own, which leaves no gradient anywhere.

        Raises:
            ValueError: not prepared.
        """
        weight = next(iter(self._require(model, "loss").values())).weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.zeros((), dtype=dtype, device=weight.device, requires_grad=True)

    def _count(self, layers: dict[str, Sparse]) -> int:
        """One step more. Another optimiser's momentum may have moved pruned weights: they are zero again."""
        for layer in layers.values():
            assert isinstance(layer.steps_taken, Tensor)
            layer.steps_taken += 1
            layer.weight.copy_(apply_mask(layer.weight, layer.mask_bits))
        return int(next(iter(layers.values())).steps_taken)  # type: ignore[arg-type]

    def finalize(self, model: nn.Module) -> nn.Module:
        """A copy in evaluation mode whose masked layers are compressed: the kept weights and their positions alone.

        Raises:
            ValueError: not prepared, or finalized already.
        """
        self._require(model, "finalize")
        result = copy.deepcopy(bare(model)).eval()
        new = {id(layer): layer.pack() for layer in sparse_layers(result).values()}
        return replace_modules(result, new).eval().requires_grad_(False)

    def report(self, model: nn.Module, batches: Iterable[Any] = ()) -> SparsityReport:
        """What is kept, bytes before and after, and whether the deployed network's outputs are those of the trained one.

        Args:
            model: a prepared model.
            batches: batches of inputs, or of tuples that begin with them: to compare the outputs.

        Raises:
            ValueError: not prepared.
        """
        layers = self._require(model, "report")
        found = [
            SparseLayer(name, tuple(layer.weight.shape), int(layer.mask.sum()), layer.density())
            for name, layer in layers.items()
        ]
        final = self.finalize(model)
        packed = 0
        for module in final.modules():
            if isinstance(module, Compressed):
                skip = module._non_persistent_buffers_set
                own = (module.values, *(b for n, b in module._buffers.items() if b is not None and n not in skip))
                packed += sum(x.numel() * x.element_size() for x in own)
        error: float | None = None
        with evaluation(model), torch.no_grad():
            for batch in batches:
                ours, theirs = model(first_input(batch)), final(first_input(batch))
                scale = max(float(ours.abs().max()), torch.finfo(ours.dtype).tiny)
                error = max(error or 0.0, float((ours - theirs).abs().max()) / scale)
        weights, kept = sum(layer.weight.numel() for layer in layers.values()), sum(x.kept for x in found)
        return SparsityReport(
            weights=weights,
            kept=kept,
            density=kept / max(weights, 1),
            steps=int(next(iter(layers.values())).steps_taken),  # type: ignore[arg-type]
            dense_bytes=sum(layer.weight.numel() * layer.weight.element_size() for layer in layers.values()),
            packed_bytes=packed,
            deployed_error=error,
            layers=found,
        )
