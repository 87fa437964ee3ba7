# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of fake quantisation: weights and activations of linear layers, normal.

``eager`` is the expression as it is written from the paper, with the straight-through detour. In 16 bits there are two of
it, of which the faster is the row: one that computes in fp32, as the operator does, and one in the dtype itself, which is
checked against its own maths in fp64: it lands on other levels. ``dense`` is the strongest plain torch: the same passes in
place where autograd need not see them, and a gradient by hand that saves what the operator saves. torch's own learnable
operators multiply by the reciprocal of the step, and are checked against that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Args, Case, Provider, Random, compiled, plain
from cofire.ops.fake_quantize import LEVELS, STATSQ_CEILING
from cofire.registry import OPERATORS

FLOAT, HALF = torch.float32, torch.bfloat16
LARGE, SMALL = (4096, 4096), (256, 1024)
TINY = (8, 64)

Providers = dict[str, Provider | Mapping[str, Provider]]


def _through(value: Tensor, source: Tensor) -> Tensor:
    return (value - source).detach() + source


def _spread(parameter: Tensor, input: Tensor, inner: int) -> Tensor:
    """A scale per row, per column or for all, ready to broadcast."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    return parameter[:, None] if inner > 1 else parameter


# ------------------------------------------------------------------------------------------------------- lsq


def _factor(input: Tensor, scale: Tensor, high: int) -> float:
    return 1 / math.sqrt(high * (input.numel() // scale.numel()))


def eager_lsq(input: Tensor, scale: Tensor, inner: int, low: int, high: int, _: None) -> Tensor:
    """LSQ as its paper's appendix writes it."""
    factor = _factor(input, scale, high)
    s = _spread(scale, input, inner)
    s = _through(s, s * factor)
    v = (input / s).clamp(low, high)
    return _through(v.round(), v) * s


def _sum_to(x: Tensor, parameter: Tensor, inner: int) -> Tensor:
    if parameter.numel() == 1:
        return x.sum().reshape(parameter.shape)
    return x.sum(1 if inner > 1 else 0)


class _DenseLSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: Tensor, inner: int, low: int, high: int) -> Tensor:
        ctx.save_for_backward(input, scale)
        ctx.rest = inner, low, high
        s = _spread(scale.float(), input, inner)
        # (a scale without dimensions would not lift the arithmetic out of 16 bits)
        return (input.float() / s).clamp_(low, high).round_().mul_(s).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        input, scale = ctx.saved_tensors
        inner, low, high = ctx.rest
        v = input.float() / _spread(scale.float(), input, inner)
        q = v.clamp(low, high).round_()
        outside = (v < low) | (v > high)
        term = q.sub_(v.masked_fill_(outside, 0)).mul_(grad)
        to_scale = _sum_to(term, scale, inner) * _factor(input, scale, high)
        return grad.masked_fill(outside, 0), to_scale.to(scale.dtype), None, None, None


def dense_lsq(input: Tensor, scale: Tensor, inner: int, low: int, high: int, _: None) -> Tensor:
    output: Tensor = _DenseLSQ.apply(input, scale, inner, low, high)  # type: ignore[no-untyped-call]
    return output


def _learnable(input: Tensor, scale: Tensor, inner: int, low: int, high: int, _: None) -> Tensor:
    factor = _factor(input, scale, high)
    scale = scale.float().reshape(-1)
    zero = torch.zeros_like(scale)
    if scale.numel() == 1:
        return torch._fake_quantize_learnable_per_tensor_affine(input, scale, zero, low, high, factor)
    axis = 0 if inner > 1 else 1
    return torch._fake_quantize_learnable_per_channel_affine(input, scale, zero, axis, low, high, factor)


def _learnable_reference(input: Tensor, scale: Tensor, inner: int, low: int, high: int, _: None) -> Tensor:
    """The maths of torch's operators: the reciprocal of the step, and a clamp after rounding, that the gradient heeds."""
    s = _spread(scale, input, inner)
    s = _through(s, s * _factor(input, scale, high))
    v = input / s
    exact = input * (1 / s)
    q = _through(exact.round(), v).clamp(low, high)
    return q * s


def in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same expression between casts."""

    def call(input: Tensor, *rest: Any) -> Tensor:
        wide = (a.float() if isinstance(a, Tensor) else a for a in rest)
        return function(input.float(), *wide).to(input.dtype)

    return call


def eager_providers(function: Callable[..., Tensor], dtype: torch.dtype) -> Provider | Mapping[str, Provider]:
    if dtype == FLOAT:
        return plain(function)
    return {"in fp32": plain(in_fp32(function)), "in 16 bits": plain(function, reference=function)}


def _lsq_args(rand: Random, shape: tuple[int, int], per: str, dtype: torch.dtype, low: int, high: int) -> Args:
    count = {"tensor": 1, "row": shape[0], "column": shape[1]}[per]
    scale = (rand.uniform(count) * 0.2 + 0.3).to(dtype)
    scale = scale.reshape(()) if per == "tensor" else scale
    return rand.normal(*shape).to(dtype), scale, shape[1] if per == "row" else 1, low, high, None


def _lsq(shape: tuple[int, int], per: str, dtype: torch.dtype, *, learnable: bool = True, **options: Any) -> Case:
    providers: Providers = {
        "eager": eager_providers(eager_lsq, dtype),
        "dense": plain(dense_lsq),
        "compile": compiled(OPERATORS["fake_quantize_lsq"].reference),
    }
    if learnable and dtype == FLOAT:  # torch's operators take nothing else
        providers["peer:torch learnable"] = plain(_learnable, reference=_learnable_reference, devices=("cpu", "cuda"))
    return Case(
        "fake_quantize_lsq",
        f"{shape[0]}x{shape[1]} 4 bits per {per}",
        dtype,
        lambda rand: _lsq_args(rand, shape, per, dtype, -8, 7),
        providers,
        lambda rand: _lsq_args(rand, TINY, per, dtype, -8, 7),
        gradients=(0, 1),
        backward_cost=_cost("fake_quantize_lsq_backward"),
        **options,
    )


def _cost(backward: str) -> Callable[..., tuple[int, int]]:
    """Bytes of a backward operator, of which the gradient is like the input."""
    formula = OPERATORS[backward].bytes
    assert formula is not None
    return lambda input, *rest: (formula(input, input, *rest), 0)


LSQ = [
    _lsq(LARGE, "tensor", FLOAT, overhead=True),
    _lsq(LARGE, "row", FLOAT),
    _lsq(LARGE, "column", FLOAT),
    _lsq(LARGE, "tensor", HALF),
    _lsq(LARGE, "row", HALF),
    _lsq(SMALL, "row", FLOAT, quick=True),
    _lsq(SMALL, "row", HALF),
]


# ---------------------------------------------------------------------------------------------------- affine


def eager_affine(input: Tensor, range: Tensor, minimum: Tensor, inner: int, bits: int) -> Tensor:
    """As AdaQuant's code writes it, with the clamps of its range."""
    top = (1 << bits) - 1
    delta = _spread(range, input, inner).clamp(1e-6, 1e5) / top
    exact = -_spread(minimum, input, inner) / delta
    zero = _through(exact.round(), exact).clamp(0, top)
    v = (input / delta + zero).clamp(0, top)
    return (_through(v.round(), v) - zero) * delta


def _affine_args(rand: Random, shape: tuple[int, int], per: str, dtype: torch.dtype) -> Args:
    count = 1 if per == "tensor" else shape[0]
    range = (rand.uniform(count) + 3).to(dtype)
    minimum = -(rand.uniform(count) * 0.5 + 1.25).to(dtype)
    if per == "tensor":
        range, minimum = range.reshape(()), minimum.reshape(())
    return rand.normal(*shape).to(dtype), range, minimum, shape[1] if per == "row" else 1, 4


def _affine(shape: tuple[int, int], per: str, dtype: torch.dtype, **options: Any) -> Case:
    return Case(
        "fake_quantize_affine",
        f"{shape[0]}x{shape[1]} 4 bits per {per}",
        dtype,
        lambda rand: _affine_args(rand, shape, per, dtype),
        {
            "eager": eager_providers(eager_affine, dtype),
            "compile": compiled(OPERATORS["fake_quantize_affine"].reference),
        },
        lambda rand: _affine_args(rand, TINY, per, dtype),
        gradients=(0, 1, 2),
        backward_cost=_cost("fake_quantize_affine_backward"),
        **options,
    )


AFFINE = [
    _affine(LARGE, "tensor", FLOAT, overhead=True),
    _affine(LARGE, "row", FLOAT),
    _affine(LARGE, "row", HALF),
    _affine(SMALL, "row", FLOAT, quick=True),
]


# ---------------------------------------------------------------------------------------------------- minmax


def eager_minmax(input: Tensor, bits: int, group_size: int) -> Tensor:
    """As OSTQuant's code writes it."""
    top = (1 << bits) - 1
    x = input.reshape(-1, group_size)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step = (high - low) / top
    zero = (-low / step).round().detach()
    v = x / step
    return ((_through(v.round(), v) + zero).clamp(0, top) - zero).mul(step).view_as(input)


def _minmax(shape: tuple[int, int], group_size: int | None, dtype: torch.dtype, **options: Any) -> Case:
    def args(rand: Random, shape: tuple[int, int], size: int | None) -> Args:
        return rand.normal(*shape).to(dtype), 4, size or shape[1]

    return Case(
        "fake_quantize_minmax",
        f"{shape[0]}x{shape[1]} 4 bits {f'groups of {group_size}' if group_size else 'rows'}",
        dtype,
        lambda rand: args(rand, shape, group_size),
        {
            "eager": eager_providers(eager_minmax, dtype),
            "compile": compiled(OPERATORS["fake_quantize_minmax"].reference),
        },
        lambda rand: args(rand, TINY, 32 if group_size else None),
        gradients=(0,),
        backward_cost=_cost("fake_quantize_minmax_backward"),
        **options,
    )


MINMAX = [
    _minmax(LARGE, None, FLOAT, overhead=True),
    _minmax(LARGE, 128, FLOAT),
    _minmax(LARGE, None, HALF),
    _minmax(SMALL, None, FLOAT, quick=True),
]


# ------------------------------------------------------------------------------------- statsq and the groups


def eager_statsq(input: Tensor, bits: int) -> Tensor:
    """As OFQ's code writes it."""
    half = 1 << (bits - 1)
    scale = (2 * input.abs().mean(-1, keepdim=True)).detach()
    u = (input / scale).clamp(-1, STATSQ_CEILING)
    value = scale * ((u * half - 0.5).round() + 0.5) / half
    return value.detach() - input.detach() + input


def dense_statsq(input: Tensor, bits: int, norm: bool = True) -> Tensor:
    """Nothing that autograd need not see, in place.

    ``norm``: the mean as a norm, in one pass, in fp32. It may be off by a bit, and a value between two levels then lands on
    the other one; without it the mean is taken in fp64, as the operator does.
    """
    half = 1 << (bits - 1)
    with torch.no_grad():
        x = input.float()
        if norm:
            scale = 2 * torch.linalg.vector_norm(x, 1, dim=-1, keepdim=True) / x.shape[-1]
        else:
            scale = 2 * x.abs().mean(-1, keepdim=True, dtype=torch.float64).float()
        u = (x / scale).clamp_(-1, STATSQ_CEILING)
        value = u.mul_(half).sub_(0.5).round_().add_(0.5).mul_(scale / half).to(input.dtype)
    return _Identity.apply(input, value) if input.requires_grad else value  # type: ignore[no-untyped-call, no-any-return]


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], None


def _nothing_more(*args: Any) -> tuple[int, int]:
    """The gradient passes as it is."""
    return 0, 0


def _statsq(shape: tuple[int, int], bits: int, dtype: torch.dtype, **options: Any) -> Case:
    def args(rand: Random, shape: tuple[int, int]) -> Args:
        return rand.normal(*shape).mul(0.02).to(dtype), bits

    return Case(
        "fake_quantize_statsq",
        f"{shape[0]}x{shape[1]} {bits} bits",
        dtype,
        lambda rand: args(rand, shape),
        {
            "eager": eager_providers(eager_statsq, dtype),
            "dense": {"in fp32": plain(dense_statsq), "in fp64": plain(functools.partial(dense_statsq, norm=False))},
            "compile": compiled(OPERATORS["fake_quantize_statsq"].reference),
        },
        lambda rand: args(rand, TINY),
        gradients=(0,),
        backward_cost=_nothing_more,
        **options,
    )


STATSQ = [
    _statsq(LARGE, 4, FLOAT, overhead=True),
    _statsq(LARGE, 2, HALF),
    _statsq(SMALL, 4, FLOAT, quick=True),
]


def eager_group(input: Tensor, format: str, group_size: int, outliers: int, stochastic: bool, seed: int) -> Tensor:
    """Two largest magnitudes of each group by ``topk``; floats by ``bucketize``. A tie on the way down goes elsewhere than
    to the even code, which no random input shows."""
    x = input.reshape(-1, group_size)
    magnitude = x.abs()
    kept = torch.zeros_like(x, dtype=torch.bool).scatter(1, magnitude.topk(outliers, dim=1).indices, True)
    if format == "int4_asymmetric":
        low, high = x.masked_fill(kept, torch.inf).amin(1, True), x.masked_fill(kept, -torch.inf).amax(1, True)
        step = (high - low) / 15
        zero = (-low / step).round()
        value = (((x / step).round() + zero).clamp(0, 15) - zero) * step
    else:
        levels = torch.tensor(LEVELS[format], dtype=x.dtype, device=x.device)
        step = magnitude.masked_fill(kept, 0).amax(1, True) / levels[-1]
        if format == "int4":
            value = (x / step).round() * step
        else:
            value = levels[torch.bucketize(magnitude / step, (levels[1:] + levels[:-1]) / 2)] * x.sign() * step
    return _through(torch.where(kept, x, value).view_as(input), input)


def _group(
    shape: tuple[int, int], format: str, dtype: torch.dtype, *, stochastic: bool = False, **options: Any
) -> Case:
    def args(rand: Random, shape: tuple[int, int], size: int) -> Args:
        return rand.normal(*shape).to(dtype), format, size, 2, stochastic, 7

    providers: Providers = {"compile": compiled(OPERATORS["fake_quantize_group"].reference)}
    if stochastic:  # these numbers come from nowhere but a program of theirs
        providers["eager"] = plain(OPERATORS["fake_quantize_group"].reference)
    else:
        providers["eager"] = eager_providers(eager_group, dtype)
    return Case(
        "fake_quantize_group",
        f"{shape[0]}x{shape[1]} {format}{' stochastic' if stochastic else ''}",
        dtype,
        lambda rand: args(rand, shape, 256),
        providers,
        lambda rand: args(rand, TINY, 32),
        gradients=(0,),
        backward_cost=_nothing_more,
        **options,
    )


GROUP = [
    _group(LARGE, "int4", FLOAT, overhead=True),
    _group(LARGE, "int4_asymmetric", FLOAT),
    _group(LARGE, "e2m1", FLOAT),
    _group(LARGE, "e2m1", HALF),
    _group(SMALL, "e2m1", FLOAT, stochastic=True),
    _group(SMALL, "int4", FLOAT, quick=True),
]

CASES = [*LSQ, *AFFINE, *MINMAX, *STATSQ, *GROUP]
