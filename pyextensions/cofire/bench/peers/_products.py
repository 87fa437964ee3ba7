# SPDX-License-Identifier: Apache-2.0
"""Products with quantised weights for peers: the arguments of ``qlinear``, and the maths of each way to round activations.

A library that rounds activations to 8 bits does so in its own way. Each way stands here in plain torch, and the library's
answer is checked against it; weights have the very codes and scales of the operator.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cofire.bench.dense_products import in_half
from cofire.ops.lowbit import _dequantize_reference, int8_activations
from cofire.ops.packing import unpack_bits

HALF, WIDE = torch.bfloat16, torch.float64


class Product(NamedTuple):
    """The arguments of ``qlinear``."""

    input: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    lut: Tensor | None
    bias: Tensor | None
    bits: int
    group_size: int
    activations: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.input.shape[-1]

    def levels(self) -> Tensor:
        """The codes ``[N, K]`` as unsigned integers."""
        return unpack_bits(self.codes, self.bits, self.shape[1])

    def signed(self) -> Tensor:
        """int8 ``[N, K]``: what the scales multiply, an entry of the table or a code minus the middle of all."""
        if self.lut is not None:
            return self.lut[0][self.levels().long()]
        return (self.levels().short() - (1 << (self.bits - 1))).to(torch.int8)


#: Decoded weights by their codes, the last few: a case asks for one again and again, and decoding costs seconds.
_DECODED: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()


def decoded(p: Product) -> Tensor:
    """The weight by the operator's reference, fp64 where a part of it is, else fp32."""
    key = (id(p.codes), p.bits, p.group_size, *(None if t is None else t.dtype for t in p[2:6]))
    if key not in _DECODED:
        # outside inference mode, whatever the caller is in: autograd may meet it later
        with torch.inference_mode(False), torch.no_grad():
            w = _dequantize_reference(*p[1:6], p.bits, p.group_size, p.shape[1])
        _DECODED[key] = (p.codes, w)  # with the codes, so that their id stays theirs
        while len(_DECODED) > 4:
            _DECODED.popitem(last=False)
    return _DECODED[key][1]


def _times_weight(p: Product, x: Tensor, factor: Tensor | None = None) -> Tensor:
    w = decoded(p)
    y = x.to(w.dtype) @ w.t()
    if factor is not None:
        y = y * factor.to(w.dtype)
    return y.to(p.input.dtype)


def reference(*args: Any) -> Tensor:
    """:func:`cofire.ops.qlinear` with activations as the case has them, and the decoded weight kept."""
    p = Product(*args)
    if p.activations == "int8":
        return _times_weight(p, *int8_activations(p.input))
    return _times_weight(p, p.input)


def exact(*args: Any) -> Tensor:
    """With the activations as they are."""
    p = Product(*args)
    return _times_weight(p, p.input)


def half(*args: Any) -> Tensor:
    """With input and weight rounded to bfloat16, and so is the result."""
    p = Product(*args)
    return in_half(p.input, decoded(p))


def rows_of_half(*args: Any) -> Tensor:
    """With the input rounded to bfloat16, then each row to 8 bits as the operator does; the result is in bfloat16."""
    p = Product(*args)
    y = _times_weight(p, *int8_activations(p.input.to(HALF).to(p.input.dtype)))
    return y if p.input.dtype == WIDE else y.to(HALF)


def by_group(*args: Any) -> Tensor:
    """With activations rounded to 8 bits by groups as long as the weight's."""
    p = Product(*args)
    codes, scale = int8_activations(p.input.unflatten(-1, (-1, p.group_size)))
    return _times_weight(p, (codes.double() * scale.double()).flatten(-2))


def seven_bits(*args: Any) -> Tensor:
    """With activations rounded to 7 bits between the smallest and the largest of all."""
    p = Product(*args)
    scale, zero = torch._choose_qparams_per_tensor(p.input.float(), True)
    codes = ((p.input.float() / scale).round() + zero).clamp(0, 127) - zero
    return _times_weight(p, codes.double() * scale)


def of_255(*args: Any) -> Tensor:
    """With each row rounded to 8 bits of the scale 2 absmax / 255."""
    p = Product(*args)
    scale = p.input.float().abs().amax(-1, keepdim=True) / 127.5
    return _times_weight(p, (p.input.float() * (1 / scale)).round().clamp(-128, 127), scale)


def clear_of_halves(x: Tensor, group_sizes: tuple[int, ...]) -> Tensor:
    """Moves values that some rounding to 8 bits would find halfway: to which side is nobody's mistake."""
    for _ in range(100):
        grids = [x.unflatten(-1, (-1, size)).abs().amax(-1, keepdim=True) / 127 for size in group_sizes]
        # (those of 32 with a scale in bfloat16 too)
        grids += [grid.to(HALF).to(grid.dtype) for grid, size in zip(grids, group_sizes) if size == 32]
        grids += [x.abs().amax(-1, keepdim=True) / n for n in (127, 127.5)]
        ratios = [(x.unflatten(-1, (s.shape[-2], -1)) / s).flatten(-2) if s.dim() > x.dim() else x / s for s in grids]
        ratios.append(x / torch._choose_qparams_per_tensor(x, True)[0])
        # not the largest, which are halfway by definition where 255 steps part the two ends
        near = (((r - r.floor() - 0.5).abs() < 1e-3) & (r.abs() < 127.4) for r in ratios)
        halfway = functools.reduce(torch.logical_or, near)
        if not halfway.any():
            break
        x = torch.where(halfway, x * (1 - 2**-6), x)
    return x
