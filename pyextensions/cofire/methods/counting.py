# SPDX-License-Identifier: Apache-2.0
"""Counting what gating saves: multiply-accumulates, channels, bytes.

Source of the first of the two rules: the counter of the code released with FTWT (CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from cofire.methods import tracing
from cofire.methods.base import Report, evaluation, first_input
from cofire.nn.gating import Gated, GatedConv2d, GatedLinear


@dataclass(frozen=True)
class Macs(Report):
    """Multiply-accumulates per sample, on average."""

    dense: float
    gated: float

    @property
    def reduction(self) -> float:
        """The share that is saved, in [0, 1]; negative where the heads cost more than the gates save."""
        return 1 - self.gated / self.dense if self.dense else 0.0


@dataclass(frozen=True)
class FlopsEstimate(Report):
    """Two ways to count.

    ``paper_rule`` is the counter of the authors' code, ``kept_out * (kept_by_the_layer_before // groups) * k^2 *
    pixels`` over the convolutions: it takes depthwise layers for free as soon as one input channel is off, forgets that a
    shortcut fills channels again, and leaves the heads out. ``exact`` counts the input channels that are
    really non-zero, pairs outputs with inputs within each group, and adds the heads and the linear layers.
    Compare with the paper by the first, believe the second.
    """

    paper_rule: Macs
    exact: Macs


@dataclass(frozen=True)
class LayerReport(Report):
    """One layer; averages per sample."""

    name: str
    gated: bool
    channels: int
    kept: float  #: share of the output channels
    support: float  #: share of the input channels that are non-zero
    mask_accuracy: float | None  #: share of the mask's bits that equal the target's
    dense_macs: float
    exact_macs: float  #: with the head
    head_macs: int
    dense_bytes: float  #: weights, input and output
    gated_bytes: float  #: kept weight rows, non-zero input channels, kept output channels, head


@dataclass(frozen=True)
class Latency(Report):
    """Medians on one input shape.

    The baseline, ``dense_ms``, is what the method's ``dense`` gives: the same weights without gates, batch norm folded,
    the library's kernels. Each side counts in the faster of contiguous and channels_last.
    """

    dense_ms: float
    gated_ms: float
    shape: tuple[int, ...]
    threads: int

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.gated_ms


@dataclass(frozen=True)
class GatingReport(FlopsEstimate):
    """What gating saves in a trained model."""

    head_macs: int
    kept: float  #: share of the channels, the mean over the gated layers
    mask_accuracy: float  #: share of the mask's bits, over all gated layers, that equal the target's
    dense_bytes: float
    gated_bytes: float
    latency: Latency | None
    layers: list[LayerReport]


@dataclass
class _Layer:
    """Sums over the samples seen so far."""

    samples: int = 0
    kept: int = 0
    support: int = 0
    agreeing: int = 0
    bits: int = 0
    dense: int = 0
    paper: int = 0
    exact: int = 0
    dense_bytes: int = 0
    gated_bytes: int = 0
    head: int = 0
    channels: tuple[int, int] = (0, 0)
    gated: bool = False
    is_conv: bool = True


@dataclass
class Count:
    """Runs the batches in evaluation mode and counts what each convolution and linear layer does."""

    model: nn.Module
    batches: Iterable[Any]
    layers: dict[str, _Layer] = field(default_factory=dict)
    first: Tensor | None = None  #: the first batch's input
    kept_now: dict[str, Tensor] = field(default_factory=dict)  #: channels kept per sample, this batch

    def __post_init__(self) -> None:
        model = self.model
        if isinstance(self.batches, Tensor):
            raise TypeError("FTWT: batches must be an iterable of batches, got a single tensor; put it into a list")
        self.sources = tracing.producers(model) if isinstance(model, fx.GraphModule) else None
        inside = {
            part for gate in model.modules() if isinstance(gate, Gated) for part in gate.modules() if part is not gate
        }
        kinds = (nn.Conv2d, nn.Linear, Gated)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m not in inside}
        hooks = [module.register_forward_hook(self._hook(name)) for name, module in layers.items()]
        try:
            with evaluation(model), torch.no_grad():
                for batch in self.batches:
                    x = first_input(batch)
                    if not isinstance(x, Tensor):
                        found = type(x).__name__
                        raise TypeError(f"FTWT: batches must hold tensors, or tuples that begin with one, got {found}")
                    self.first = x if self.first is None else self.first
                    self.kept_now.clear()
                    model(x)
        finally:
            for hook in hooks:
                hook.remove()
        if not self.layers:
            raise ValueError("FTWT: batches must hold at least one batch, got none")
        if not any(layer.samples for layer in self.layers.values()):
            raise ValueError("FTWT: batches must hold at least one sample, got none")

    def _hook(self, name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if isinstance(module, Gated):
                mask, target = module.examine(*args)
            else:
                mask = torch.ones(output.shape[0], output.shape[1], dtype=torch.bool, device=output.device)
                target = None
            if args[0].dim() in (2, 4):
                self._add(name, module, args[0], output, mask, target)

        return count

    def _add(self, name: str, module: nn.Module, x: Tensor, y: Tensor, mask: Tensor, target: Tensor | None) -> None:
        inner = _inner(module)
        gated, is_conv = target is not None, isinstance(inner, nn.Conv2d)
        groups, taps = (inner.groups, inner.weight[0, 0].numel()) if isinstance(inner, nn.Conv2d) else (1, 1)
        (n, ci), co = x.shape[:2], y.shape[1]
        pixels = y[0, 0].numel() if n else 0
        support = (x != 0).flatten(2).any(2) if is_conv else x != 0
        reached = support if gated else torch.ones_like(support)  # an ungated layer reads its zeros
        pairs = mask.view(n, groups, co // groups).sum(2) * reached.view(n, groups, ci // groups).sum(2)
        head = module.head.macs if isinstance(module, Gated) else 0
        kept = mask.sum(1)

        layer = self.layers.setdefault(name, _Layer(channels=(ci, co), gated=gated, is_conv=is_conv))
        layer.samples += n
        layer.kept += int(kept.sum())
        layer.support += int(support.sum())
        layer.dense += n * co * (ci // groups) * taps * pixels
        layer.exact += int(pairs.sum()) * taps * pixels + n * head
        layer.paper += int((kept * (self._kept_before(name, ci, n, kept) // groups)).sum()) * taps * pixels
        layer.head = head
        if target is not None:
            layer.agreeing += int((mask == target).sum())
            layer.bits += mask.numel()
        size, row = x.element_size(), (ci // groups) * taps
        layer.dense_bytes += size * (n * co * row + x.numel() + y.numel())
        maps = int(reached.sum()) * x[0, 0].numel() + int(kept.sum()) * pixels if n else 0
        layer.gated_bytes += size * (int(kept.sum()) * row + maps + n * head)
        if is_conv:
            self.kept_now[name] = kept

    def _kept_before(self, name: str, channels: int, n: int, like: Tensor) -> Tensor:
        """What the paper's counter takes for the number of input channels: those that the layer before kept."""
        if self.sources is not None:
            names = self.sources.get(name, [])
        else:  # no graph: the last layer that ran and has as many channels
            names = [other for other in self.kept_now if self.layers[other].channels[1] == channels][-1:]
        if not names or any(other not in self.kept_now for other in names):
            return torch.full_like(like, channels)
        return torch.stack([self.kept_now[other] for other in names]).sum(0).clamp(max=channels)

    def totals(self) -> tuple[Macs, Macs]:
        samples = max(layer.samples for layer in self.layers.values())
        every, convs = list(self.layers.values()), [layer for layer in self.layers.values() if layer.is_conv]
        paper = Macs(sum(c.dense for c in convs) / samples, sum(c.paper for c in convs) / samples)
        return paper, Macs(sum(c.dense for c in every) / samples, sum(c.exact for c in every) / samples)

    def layer_reports(self) -> list[LayerReport]:
        return [
            LayerReport(
                name=name,
                gated=c.gated,
                channels=c.channels[1],
                kept=c.kept / (c.samples * c.channels[1]),
                support=c.support / (c.samples * c.channels[0]),
                mask_accuracy=c.agreeing / c.bits if c.bits else None,
                dense_macs=c.dense / c.samples,
                exact_macs=c.exact / c.samples,
                head_macs=c.head,
                dense_bytes=c.dense_bytes / c.samples,
                gated_bytes=c.gated_bytes / c.samples,
            )
            for name, c in self.layers.items()
        ]


def _inner(module: nn.Module) -> nn.Module:
    """The layer inside a gated one."""
    if isinstance(module, GatedConv2d):
        return module.conv
    return module.linear if isinstance(module, GatedLinear) else module
