# SPDX-License-Identifier: Apache-2.0
"""The part of a cache's compression that learns: a convolution that computes by which shares tokens are mixed.

The caches that use it are in :mod:`cofire.nn.kv_cache`.

Source: Cai et al., "LoCoCo: Dropping In Convolutions for Long Context Compression", ICML 2024.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import ops
from cofire.ops.checks import check_choice, check_float, check_integer, check_number, refuse, shape_of
from cofire.ops.kv_fusion import rows_at

__all__ = ["KVFusion"]

GATES = ("plain", "sigmoid")


class KVFusion(nn.Module):
    """Compress the keys and values of one layer to a fixed number of tokens.

    The *heavy hitters*, the tokens with the highest scores, stay as they are. The others, with key and value beside each
    other as channels, go through a convolution with ReLU that has a channel for each of ``merged`` slots; the softmax of a
    channel over the tokens gives the shares by which they are mixed in that slot. A gate blends each mixture with one of
    the ``merged`` best of the others. All heads share the convolution.

    Args:
        head_dim: features of a key and of a value.
        merged: how many slots hold mixtures.
        kernel_size: odd, taps of the convolutions.
        hidden: channels of further convolutions before, each followed by ReLU.
        bias: with a bias in each convolution.
        gate: where the gate starts: 0 takes the best of the others as they are, 1 the mixtures.
        parameterization: of the gate: "plain", a number that training may move out of 0 to 1, or "sigmoid", whose
            parameter is its logit.
        std: standard deviation of the convolutions' first weights. The published 1 makes shares that are almost one-hot.
        device, dtype: of the parameters.

    Attributes:
        weight: parameter ``[merged, channels, kernel_size]``, as in ``nn.Conv1d``; ``channels`` is twice ``head_dim``, or
            the last of ``hidden``.
        bias: parameter ``[merged]``, or None.
        gate: parameter of one number; see :attr:`share`.
        convolutions: the further ones.

    Shape: ``key`` and ``value`` ``[B, Hkv, S, head_dim]``, ``scores`` ``[B, Hkv, S]``; the result is a key and a value of
    ``heavy + merged`` tokens, the heavy hitters first, in the order of their positions.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of range, a shape that does not fit, fewer tokens than slots, scores that are NaN.
        RuntimeError: the key or the value wants a gradient, and ``bptt`` is False.

    Example:
        >>> fusion = KVFusion(head_dim=8, merged=4, kernel_size=5)
        >>> key, value = torch.randn(2, 1, 2, 20, 8)
        >>> key, value = fusion(key, value, torch.rand(1, 2, 20), heavy=4)
        >>> key.shape
        torch.Size([1, 2, 8, 8])

    Source: Cai et al., ICML 2024 (LoCoCo), section 3; the gate and the blended tokens are those of its code.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    gate: nn.Parameter

    def __init__(
        self,
        head_dim: int,
        merged: int,
        *,
        kernel_size: int = 21,
        hidden: Sequence[int] = (),
        bias: bool = True,
        gate: float = 0.5,
        parameterization: str = "plain",
        std: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "KVFusion"
        check_integer(name, head_dim=head_dim, merged=merged, kernel_size=kernel_size)
        check_number(name, gate=gate, std=std)
        check_choice(name, "parameterization", parameterization, GATES)
        for which, size in (("head_dim", head_dim), ("merged", merged), *(("hidden", c) for c in hidden)):
            if size < 1:
                refuse(name, f"{which} must be at least 1, got {size}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            refuse(name, f"kernel_size must be odd and positive, got {kernel_size}")
        if parameterization == "sigmoid" and not 0 < gate < 1:
            refuse(name, f"gate must be between 0 and 1 with a sigmoid, got {gate}")
        if std < 0:
            refuse(name, f"std must not be negative, got {std}")
        self.head_dim, self.merged, self.kernel_size = head_dim, merged, kernel_size
        self.parameterization, self.std, self.start = parameterization, std, gate
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [2 * head_dim, *hidden]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, kernel_size, padding=kernel_size // 2, bias=bias, **where)
            for a, b in itertools.pairwise(widths)
        )
        self.weight = nn.Parameter(torch.empty(merged, widths[-1], kernel_size, **where))
        self.bias = nn.Parameter(torch.empty(merged, **where)) if bias else None
        self.gate = nn.Parameter(torch.empty((), **where))
        self.reset_parameters()

    @classmethod
    def for_capacity(cls, head_dim: int, capacity: int, *, keep: float = 0.5, **options: Any) -> KVFusion:
        """For a cache of ``capacity`` tokens of which ``keep`` are heavy hitters.

        Args:
            head_dim: features of a key.
            capacity: tokens, at least 2.
            keep: from 0 to below 1; ``capacity * (1 - keep)``, rounded down, slots hold mixtures.
            **options: as in the constructor.
        """
        name = "KVFusion.for_capacity"
        check_integer(name, capacity=capacity)
        check_number(name, keep=keep)
        if capacity < 2:
            refuse(name, f"capacity must be at least 2, got {capacity}")
        if not 0 <= keep < 1:
            refuse(name, f"keep must be in [0, 1), got {keep}")
        merged = int(capacity * (1 - keep))
        if merged < 1:
            refuse(name, f"keep must leave a slot of {capacity} for a mixture, got {keep}")
        return cls(head_dim, merged, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights, biases as in ``nn.Conv1d``, the gate where it starts."""
        for layer in (*self.convolutions, self):
            weight, bias = layer.weight, layer.bias
            assert isinstance(weight, Tensor)
            nn.init.normal_(weight, std=self.std)
            if isinstance(bias, Tensor):
                bound = 1 / math.sqrt(weight.shape[1] * weight.shape[2])
                nn.init.uniform_(bias, -bound, bound)
        start = self.start if self.parameterization == "plain" else math.log(self.start / (1 - self.start))
        self.gate.fill_(start)

    @property
    def share(self) -> Tensor:
        """How much of a slot is the mixture: the gate, or its sigmoid."""
        return self.gate if self.parameterization == "plain" else self.gate.sigmoid()

    @property
    def wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def forward(
        self,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        *,
        heavy: int,
        local: int = 0,
        bptt: bool = False,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compress to ``heavy + merged`` tokens.

        Args:
            key: float ``[B, Hkv, S, head_dim]``.
            value: the same of the values.
            scores: float ``[B, Hkv, S]``, how much attention each token got; no gradient.
            heavy: how many tokens stay as they are.
            local: how many of those are the last ones, whatever their scores.
            bptt: pass gradients on to ``key`` and ``value``.
            out: where to write key and value, ``[B, Hkv, heavy + merged, head_dim]`` each, apart from the arguments. Not
                where a gradient is wanted.
        """
        check_float("KVFusion", key=key, value=value, scores=scores)
        if key.dim() != 4 or key.shape[3] != self.head_dim:
            refuse("KVFusion", f"key must have shape [B, Hkv, S, {self.head_dim}], got {shape_of(key)}")
        if scores.shape != key.shape[:3]:
            refuse(
                "KVFusion", f"scores must have shape {shape_of(key[..., 0])}, one for each key, got {shape_of(scores)}"
            )
        back = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        if back and not bptt:
            raise RuntimeError(
                "KVFusion: key or value wants a gradient, and bptt is False: detach them, or pass bptt=True"
            )
        kept, rest, pick = ops.kv_select(scores.detach(), heavy, self.merged, local=local)
        half = self.kernel_size // 2
        if out is not None and (back or self.wants_gradient):
            raise RuntimeError("KVFusion: out has no gradient: call it under torch.no_grad(), or without out")
        if back:
            heavy_key, heavy_value = rows_at(key, kept), rows_at(value, kept)
            tokens = F.pad(torch.cat([rows_at(key, rest), rows_at(value, rest)], -1), (0, 0, half, half))
        else:
            shape = (*key.shape[:2], heavy + self.merged, key.shape[3])
            new_key, new_value = (key.new_empty(shape), value.new_empty(shape)) if out is None else out
            tokens = ops.kv_gather_(new_key, new_value, key, value, kept, rest, padding=half)
            heavy_key, heavy_value = new_key[:, :, :heavy], new_value[:, :, :heavy]
        merged_key, merged_value = self._fuse(tokens, pick)
        if back or merged_key.requires_grad:
            return torch.cat([heavy_key, merged_key], 2), torch.cat([heavy_value, merged_value], 2)
        new_key[:, :, heavy:], new_value[:, :, heavy:] = merged_key, merged_value
        return new_key, new_value

    def _fuse(self, tokens: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
        if not self.convolutions:
            return ops.kv_fuse(tokens, self.weight, self.bias, self.share, pick)
        # Channels of the convolution and what is mixed are different tensors here, which the operator has no word for.
        half = self.kernel_size // 2
        rest = tokens[:, :, half : tokens.shape[2] - half]
        x = rest.flatten(0, 1).transpose(1, 2).to(self.weight.dtype)
        for convolution in self.convolutions:
            x = convolution(x).relu()
        logits = F.conv1d(x, self.weight, self.bias, padding=half).relu()
        shares = logits.softmax(-1).unflatten(0, tokens.shape[:2])
        mixed = shares @ rest.to(shares.dtype)
        fused = torch.lerp(rows_at(rest, pick).to(shares.dtype), mixed, self.share.to(shares.dtype)).to(tokens.dtype)
        key, value = fused.chunk(2, -1)
        return key, value

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, merged={self.merged}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}, parameterization={self.parameterization!r}"
        )
