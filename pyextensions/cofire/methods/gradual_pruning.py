# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning: weights leave during training, fast at first and slower towards the end.

Source: Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017 (1710.01878).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cofire.methods.sparse_training import (
    SparseTraining,
    check_between,
    check_kept,
    check_least,
    check_patterns,
    gradient_of,
)
from cofire.nn.sparse import Sparse, check_groups, parse_pattern
from cofire.ops import keep_mask, keep_masks
from cofire.ops.checks import check_choice
from cofire.ops.selection import scores_of
from cofire.ops.sparse_refine import check_pad

SCOPES = ("row", "tensor", "global")
SCORES = ("magnitude", "taylor", "fisher", "magnitude_gradient")


@dataclass(frozen=True)
class GradualPruning(SparseTraining, name="gradual_pruning"):
    """Pruning while training, by the cubic schedule.

    The sparsity of step t is ``s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3``, taken every ``every`` steps and at
    ``end``. What is pruned is zero from then on and gets no gradient. Best with an optimiser of :mod:`cofire.optim`, whose
    moments are masked too.

    Args:
        density: the share of the weights that is kept in the end; or
        sparsity: the share that is not. Exactly one of the two.
        begin, end: optimiser steps between which weights leave.
        every: steps between two updates of the masks.
        begin_density: the share that is kept at first.
        score: by which weights are kept: "magnitude" |w|, "taylor" |w g|, "fisher" (w g)^2, "magnitude_gradient" |w| + |g|,
            with the gradient of the step, which must not be zeroed before :meth:`step`; or a function of the layer that gives
            a tensor of the weight's shape.
        scope: what is pruned to the same density: each "row", each layer ("tensor"), or all layers together ("global").
        pattern: "N:M" keeps, in the end, N of each M neighbours of a row; density is then given by it.
        include, exclude: names or patterns of layers, as in :func:`cofire.nn.sparsify_`; default: all but the last.
        pad: of a pattern: rows may have any number of weights. What is behind the last whole group, r weights, is a group of
            which ``min(N, r)`` are kept in the end.
        checks: where ``torch.distributed`` has several processes, :meth:`prepare` and each change of the masks compare them, and
            raise in all processes if they differ (:func:`cofire.nn.check_masks_agree`). All processes must make the same calls
            then; False: those that train networks of their own.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.

    Example:
        >>> import torch.nn.functional as F
        >>> from cofire.optim import MaskedAdamW
        >>> method = GradualPruning(density=0.25, begin=0, end=4, every=2)
        >>> model = method.prepare(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> optimizer = MaskedAdamW(model.parameters(), model=model)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     F.cross_entropy(model(torch.randn(4, 16)), torch.tensor([0, 1, 0, 1])).backward()
        ...     optimizer.step(); method.step(model)
        >>> method.report(model).density
        0.25

    Source: Zhu and Gupta 2017, equation 1.
    """

    density: float | None = None
    sparsity: float | None = None
    begin: int = 0
    end: int = 1000
    every: int = 100
    begin_density: float = 1.0
    score: str | Callable[[Sparse], Tensor] = "magnitude"
    scope: str = "row"
    pattern: str | None = None
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    pad: bool = False
    checks: bool = True

    def __post_init__(self) -> None:
        name = "GradualPruning"
        given = [x for x in (self.density, self.sparsity, self.pattern) if x is not None]
        if len(given) != 1:
            raise ValueError(f"{name}: exactly one of density, sparsity and pattern must be given, got {len(given)}")
        if self.density is not None:
            check_between(name, "density", self.density, 0, 1)
        if self.sparsity is not None:
            check_between(name, "sparsity", self.sparsity, 0, 1, closed=False)
        if self.pattern is not None and parse_pattern(name, self.pattern)[0] != "n:m":
            raise ValueError(f"{name}: pattern must be like '2:4', got {self.pattern!r}")
        check_pad(name, self.pad, self.pattern)
        check_between(name, "begin_density", self.begin_density, 0, 1)
        check_least(name, 0, begin=self.begin)
        check_least(name, 1, every=self.every, end=self.end)
        if self.begin >= self.end:
            raise ValueError(f"{name}: begin must be less than end, got {self.begin} and {self.end}")
        if self.begin_density < self.final_density:
            raise ValueError(
                f"{name}: begin_density must not be less than the density in the end, got {self.begin_density} and "
                f"{self.final_density:g}"
            )
        if not callable(self.score):
            check_choice(name, "score", self.score, SCORES)
        check_choice(name, "scope", self.scope, SCOPES)
        if self.pattern is not None and self.scope != "row":
            raise ValueError(f"{name}: scope must be 'row' where there is a pattern, got {self.scope!r}")
        check_patterns(name, "exclude", self.exclude)
        if self.include is not None:
            check_patterns(name, "include", self.include)

    @property
    def final_density(self) -> float:
        """The share that is kept in the end."""
        if self.pattern is not None:
            _, n, m = parse_pattern("GradualPruning", self.pattern)
            return n / m
        return self.density if self.density is not None else 1.0 - self.sparsity  # type: ignore[operator]

    def density_at(self, step: int) -> float:
        """The share that is kept after so many optimiser steps, if the masks are updated then.

        Example:
            >>> pruning = GradualPruning(density=0.25, begin=0, end=4)
            >>> [pruning.density_at(t) for t in (0, 2, 4)]
            [1.0, 0.34375, 0.25]
        """
        left = 1 - (min(max(step, self.begin), self.end) - self.begin) / (self.end - self.begin)
        return self.final_density + (self.begin_density - self.final_density) * left**3

    def prepare(self, model: nn.Module) -> nn.Module:
        """A copy whose linear layers and convolutions have masks, full ones (or of ``begin_density``).

        Raises:
            TypeError: ``model`` is no module.
            ValueError: prepared already, no layer to prune, or rows that the pattern does not divide.
        """
        result = self._with_masks(model, self.include, self.exclude, mode="invariant")
        layers = self._require(result, "prepare")
        if self.pattern is not None:
            _, _, m = parse_pattern("GradualPruning", self.pattern)
            for name, layer in layers.items():
                columns = layer.weight[0].numel()
                check_groups(
                    "GradualPruning.prepare",
                    self.pattern,
                    m,
                    columns,
                    self.pad,
                    f" in {name!r} (exclude can leave it out)",
                )
        for layer in layers.values():
            _remember_missed(layer)
        if self.begin_density < 1:
            for layer in layers.values():  # nothing has a gradient yet
                self._prune({"": layer}, self.begin_density, "magnitude")
        self._agree(result)
        return result

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Count one optimiser step, and prune when it is time.

        With another score than "magnitude" a layer whose gradient is not finite (an overflow of mixed precision, whose
        optimiser step is skipped too) is not pruned this time, and with the scope "global" none is. The next step makes up
        for it, in the layers that were left out alone, and to the density that the others have by then.

        Raises:
            ValueError: not prepared, a score by gradient without gradients, scores that are not finite, or other masks in
                other processes.
        """
        layers = self._require(model, "step")
        for layer in layers.values():
            if "update_missed" not in layer._buffers:  # of an older pickle
                _remember_missed(layer)
        count = self._count(layers)
        last = min(count, self.end)
        if last < self.end:
            last -= (last - self.begin) % self.every
        due = last == count >= self.begin
        chosen = layers if due else self._missed(layers)
        if chosen:
            self._prune(chosen, self.density_at(last), self.score)
            self._agree(model)

    def _missed(self, layers: dict[str, Sparse]) -> dict[str, Sparse]:
        """The layers in which the last update could not be made."""
        if self.score == "magnitude":
            return {}
        flags = [layer.get_buffer("update_missed") for layer in layers.values()]
        missed = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
        return {name: layer for (name, layer), one in zip(layers.items(), missed, strict=True) if one}

    def _prune(self, layers: dict[str, Sparse], density: float, score: str | Callable[[Sparse], Tensor]) -> None:
        maybe = {name: self._scores(name, layer, score) for name, layer in layers.items()}
        scores = {name: s for name, s in maybe.items() if s is not None}
        if self.scope == "global" and score == self.score:
            scores = {} if len(scores) < len(layers) else scores
            total = sum(s.numel() for s in scores.values())
            masks = keep_masks(list(scores.values()), max(1, round(density * total)), score="value") if scores else []
            found = dict(zip(scores, masks, strict=True))
        else:
            found = {name: self._choose(s, density) for name, s in scores.items()}
        for name, bits in found.items():
            layers[name].update_mask(bits)
        for name, layer in layers.items():
            layer.get_buffer("update_missed").fill_(name not in found)

    def _choose(self, scores: Tensor, density: float) -> Tensor:
        if self.pattern is not None:
            _, n, m = parse_pattern("GradualPruning", self.pattern)
            return keep_mask(
                scores, max(n, round(density * m)), scope="block", block=(1, m), pad=self.pad, score="value"
            )
        size = scores.numel() if self.scope != "row" else scores.shape[1]
        scope = "row" if self.scope == "row" else "tensor"
        return keep_mask(scores, max(1, round(density * size)), scope=scope, score="value")

    def _scores(self, name: str, layer: Sparse, score: str | Callable[[Sparse], Tensor]) -> Tensor | None:
        """``[N, K]``; what is pruned already comes last. None where the gradient is not finite."""
        gradient = None
        if score != "magnitude" and not (callable(score) and layer.weight.grad is None):
            gradient = gradient_of("GradualPruning.step", f"score {score!r}", name, layer)
            if gradient is None:
                return None
        check_kept("GradualPruning.step", "the weight", name, layer, layer.weight)
        if callable(score):
            found = score(layer)
            if not isinstance(found, Tensor) or found.shape != layer.weight.shape:
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"GradualPruning.step: score must give a tensor of the weight's shape {list(layer.weight.shape)} for "
                    f"{name!r}, got {got}"
                )
        else:
            found = scores_of(layer.weight, gradient, score, 1.0)
        check_kept("GradualPruning.step", "the score", name, layer, found)
        return torch.where(layer.mask, found.detach(), -torch.inf).flatten(1)


def _remember_missed(layer: Sparse) -> None:
    """Give the layer the flag of an update that could not be made."""
    layer.register_buffer("update_missed", torch.zeros((), dtype=torch.bool, device=layer.weight.device))
    layer.register_load_state_dict_pre_hook(_nothing_missed)


def _nothing_missed(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state is loaded: an older one does not say whether an update was missed, and none was."""
    if f"{prefix}steps_taken" in state:
        state.setdefault(f"{prefix}update_missed", torch.zeros_like(layer.get_buffer("update_missed")))
