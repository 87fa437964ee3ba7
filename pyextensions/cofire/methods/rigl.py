# SPDX-License-Identifier: Apache-2.0
"""RigL and SET: networks that are sparse from the first step, whose masks move while they train.

Source: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020 (1911.11134);
Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science", 2018 (1707.04780).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from cofire.ops import apply_mask, keep_mask, prune_and_grow_, unpack_mask
from cofire.ops.checks import check_choice
from cofire.ops.sparse_training import random_keys
from cofire.optim import reset_moments

DISTRIBUTIONS = ("erdos_renyi_kernel", "uniform")
GROWTH = ("gradient", "random")


def erdos_renyi_kernel(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Densities of layers in proportion to the sum over the product of their dimensions, and ``density`` over all.

    Small layers become denser than large ones; a layer that would have more than all of its weights is dense.

    Args:
        shapes: of the weights, by name.
        density: share of all weights.

    Returns:
        The density of each layer.

    Example:
        >>> found = erdos_renyi_kernel({"a": (8, 8), "b": (16, 64)}, 0.25)
        >>> [round(found[name], 3) for name in "ab"]
        [0.708, 0.221]

    Source: Evci et al. 2020, section 3, (1); Mocanu et al. 2018, equation 3.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / max(sizes[name], 1) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        left = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        weights = sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        scale = left / weights if weights else 0.0
        over = {name for name in shapes if name not in dense and scale * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense.add(max(over, key=lambda name: raw[name]))


@dataclass(frozen=True)
class RigL(SparseTraining, name="rigl"):
    """Sparse from scratch: every so often the least weights are dropped, and others grow where the gradient is largest.

    Best with an optimiser of :mod:`cofire.optim`: weights that grow begin without moments. Of another optimiser's moments,
    give it to :meth:`step`.

    Args:
        density: share of the weights that is kept, over all layers.
        distribution: "erdos_renyi_kernel" (:func:`erdos_renyi_kernel`) or "uniform", the same in each layer.
        grow: "gradient", by the gradient of the step, of all entries; or "random" (SET).
        alpha: share of a layer's kept weights that moves at first; it falls along a cosine to zero at ``end``.
        every: optimiser steps between two updates of the masks.
        end: the step from which the masks stay; about three quarters of training.
        seed: of the first masks and of random growth.
        include, exclude: names or patterns of layers, as in :func:`cofire.nn.sparsify_`; default: all but the last.
        checks: where ``torch.distributed`` has several processes, :meth:`prepare` and each change of the masks compare them, and
            raise in all processes if they differ (:func:`cofire.nn.check_masks_agree`). All processes must make the same calls
            then; False: those that train networks of their own.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.

    Example:
        >>> import torch.nn.functional as F
        >>> from cofire.optim import MaskedSGD
        >>> method = RigL(density=0.25, every=2, end=8)
        >>> model = method.prepare(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, model=model)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     F.cross_entropy(model(torch.randn(4, 16)), torch.tensor([0, 1, 0, 1])).backward()
        ...     optimizer.step(); method.step(model)
        >>> method.report(model).kept
        32

    Source: Evci et al. 2020, section 3 and algorithm 1. There an update takes the place of an optimiser step, here it comes
    after one. With growth by gradient the weight's gradient is that of a dense layer at every step, which costs no more
    than the product of the dense one.
    """

    density: float = 0.1
    distribution: str = "erdos_renyi_kernel"
    grow: str = "gradient"
    alpha: float = 0.3
    every: int = 100
    end: int = 25_000
    seed: int = 0
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    checks: bool = True

    def __post_init__(self) -> None:
        check_between("RigL", "density", self.density, 0, 1)
        check_between("RigL", "alpha", self.alpha, 0, 1)
        check_choice("RigL", "distribution", self.distribution, DISTRIBUTIONS)
        check_choice("RigL", "grow", self.grow, GROWTH)
        check_least("RigL", 1, every=self.every, end=self.end)
        check_least("RigL", 0, seed=self.seed)
        if self.seed >= 1 << 31:
            raise ValueError(f"RigL: seed must be less than 2^31, got {self.seed}")
        check_patterns("RigL", "exclude", self.exclude)
        if self.include is not None:
            check_patterns("RigL", "include", self.include)

    def prepare(self, model: nn.Module) -> nn.Module:
        """A copy whose linear layers and convolutions have random masks; what they prune is zero.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: prepared already, or no layer to prune.
        """
        # behind a mask with a straight-through gradient pruned entries get theirs; they are kept zero all the same
        options = {"mode": "masked", "gradient": "ste"} if self.grow == "gradient" else {"mode": "invariant"}
        result = self._with_masks(model, self.include, self.exclude, **options)
        layers = self._require(result, "prepare")
        shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
        shares = dict.fromkeys(shapes, self.density)
        if self.distribution == "erdos_renyi_kernel":
            shares = erdos_renyi_kernel(shapes, self.density)
        for i, (name, layer) in enumerate(layers.items()):
            keep = max(1, round(shares[name] * layer.weight.numel()))
            order = random_keys(self._key(0, i, len(layers)), layer.weight.numel(), layer.weight.device).double()
            bits = keep_mask(order.view_as(layer.weight).flatten(1), keep, scope="tensor", score="value")
            layer.update_mask(bits)
            with torch.no_grad():
                layer.weight.copy_(apply_mask(layer.weight, bits))
            layer.pruned_are_zero = True  # type: ignore[assignment]
        self._agree(result)
        return result

    def _key(self, step: int, layer: int, layers: int) -> int:
        """Of the generator, another one for each update of each layer."""
        return (self.seed << 32) | ((step * layers + layer) & 0xFFFFFFFF)

    def share_at(self, step: int) -> float:
        """The share of a layer's kept weights that moves at a step.

        Example:
            >>> [round(RigL(alpha=0.3, end=100).share_at(t), 3) for t in (0, 50, 100)]
            [0.3, 0.15, 0.0]
        """
        return self.alpha / 2 * (1 + math.cos(math.pi * min(step, self.end) / self.end))

    @torch.no_grad()
    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count one optimiser step, and move the masks when it is time.

        A layer whose gradient is not finite (an overflow of mixed precision, whose optimiser step is skipped too) does not
        move this time.

        Args:
            model: the prepared model; its gradients must be those of the step.
            optimizer: whose moments are zeroed where the mask changes; those of :mod:`cofire.optim` do it by themselves.

        Raises:
            ValueError: not prepared, growth by gradient without a gradient, a weight that is not finite, or other masks in
                other processes.
        """
        layers = self._require(model, "step")
        count = self._count(layers)
        if count % self.every or count >= self.end:
            return
        for i, (name, layer) in enumerate(layers.items()):
            weight: Tensor = layer.weight
            number = int(self.share_at(count) * int(layer.mask.sum()))
            if not weight.requires_grad or number == 0:
                continue
            gradient = None
            if self.grow == "gradient":
                gradient = gradient_of("RigL.step", "growth", name, layer)
                if gradient is None:
                    continue
            check_kept("RigL.step", "the weight", name, layer, weight)
            bits = layer.mask_bits.clone()
            new = prune_and_grow_(weight, bits, gradient, number, scope="tensor", seed=self._key(count, i, len(layers)))
            layer.update_mask(new)
            if optimizer is not None:
                changed = unpack_mask(bits ^ new, weight[0].numel()).view_as(weight)
                reset_moments(optimizer, weight, changed)
        self._agree(model)
