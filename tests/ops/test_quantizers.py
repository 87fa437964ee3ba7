# SPDX-License-Identifier: Apache-2.0
"""The ways from a dense weight to a quantised one, each against a slow loop of its own or a law that it must keep."""

from __future__ import annotations

import doctest
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import ops
from cofire.ops import QTensor, quantize_weight, quantizers
from cofire.ops.quantizers import FP4, NF4, QUANTIZERS
from helpers import Random, Refusal, refusals

EVERY = range(1, 9)
TABLES = ("nf4", "fp4")  #: methods of 4 bits alone
ROWS, COLUMNS, GROUP = 3, 28, 7
Levels = list[float]


def dense(name: str = "weight", rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return Random(name).normal(rows, columns)


def error(weight: Tensor, q: QTensor, p: float = 2.0) -> float:
    return float((q.dequantize().double() - weight.double()).abs().pow(p).sum())


# ------------------------------------------------------------------------------------------------ slow loops


def rounded(x: float) -> int:
    """To the nearest integer, halves to the even one, as torch does."""
    return round(x)


def symmetric(top: float, bits: int) -> Levels:
    """The levels around 0 whose outermost on the upper side is ``top``."""
    if bits == 1:
        return [-top, top]
    half = 2 ** (bits - 1)
    return [top / (half - 1) * (q - half) for q in range(2**bits)]


def affine(low: float, high: float, bits: int) -> Levels:
    """The levels from ``low`` to ``high``, moved so that one of them is 0."""
    low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
    step = (high - low) / top or 1.0
    zero = min(max(rounded(-low / step), 0), top)
    return [step * (q - zero) for q in range(top + 1)]


def slow_absmax(w: list[float], bits: int) -> Levels:
    return symmetric(sum(map(abs, w)) / len(w) if bits == 1 else max(map(abs, w)), bits)


def slow_minmax(w: list[float], bits: int) -> Levels:
    return affine(min(w), max(w), bits)


def loss(w: list[float], levels: Levels) -> float:
    return sum(min((x - v) ** 2 for v in levels) for x in w)


def slow_mse(w: list[float], bits: int) -> Levels:
    tried = [affine(min(w) * (1 - i / 100), max(w) * (1 - i / 100), bits) for i in range(80)]
    return min(tried, key=lambda levels: loss(w, levels))


def slow_mse_symmetric(w: list[float], bits: int) -> Levels:
    if bits == 1:
        return slow_absmax(w, bits)
    tried = [symmetric(max(map(abs, w)) * (1 - i / 100), bits) for i in range(80)]
    return min(tried, key=lambda levels: loss(w, levels))


def slow_statsq(w: list[float], bits: int) -> Levels:
    """The paper's: scale times the middles of 2^b equal parts of [-1, 1]."""
    scale, half = 2 * sum(map(abs, w)) / len(w), 2 ** (bits - 1)
    return [scale * (q - half + 0.5) / half for q in range(2**bits)]


def slow_hqq(w: list[float], bits: int) -> Levels:
    top, p, beta = 2**bits - 1, 0.7, 10.0
    scale = (max(w) - min(w)) / top
    zero = -min(w) / scale
    found = []
    for _ in range(20):
        codes = [min(max(rounded(x / scale + zero), 0), top) for x in w]
        residual = [x - scale * (q - zero) for x, q in zip(w, codes)]
        found.append((sum(abs(r) ** p for r in residual), zero))
        shrunk = [math.copysign(max(abs(r) - abs(r) ** (p - 1) / beta, 0.0), r) if r else 0.0 for r in residual]
        zero = sum(q - (x - e) / scale for q, x, e in zip(codes, w, shrunk)) / len(w)
        beta *= 1.01
    zero = min(found)[1]
    return [scale * (q - zero) for q in range(top + 1)]


def slow_table(values: tuple[float, ...]) -> Callable[[list[float], int], Levels]:
    return lambda w, bits: [v * max(map(abs, w)) for v in values]


SLOW: dict[str, tuple[Callable[[list[float], int], Levels], dict[str, Any], tuple[int, ...]]] = {
    "absmax": (slow_absmax, {}, tuple(EVERY)),
    "minmax": (slow_minmax, {}, tuple(EVERY)),
    "mse": (slow_mse, {}, tuple(EVERY)),
    "mse, symmetric": (slow_mse_symmetric, {"symmetric": True}, tuple(EVERY)),
    "hqq": (slow_hqq, {}, tuple(EVERY)),
    "statsq": (slow_statsq, {}, tuple(EVERY)),
    "nf4": (slow_table(NF4), {}, (4,)),
    "fp4": (slow_table(FP4), {}, (4,)),
}
CASES = [(name, bits) for name, (*_, widths) in SLOW.items() for bits in widths]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_each_weight_becomes_the_nearest_of_its_groups_levels(name: str, bits: int) -> None:
    slow, options, _ = SLOW[name]
    weight = dense(name)
    q = quantize_weight(weight, name.split(",")[0], bits=bits, group_size=GROUP, **options)
    assert (q.shape, q.bits, q.group_size, q.dtype) == ((ROWS, COLUMNS), bits, GROUP, torch.float32)
    found = q.dequantize()
    for n in range(ROWS):
        for g in range(COLUMNS // GROUP):
            columns = slice(g * GROUP, (g + 1) * GROUP)
            w = weight[n, columns].double().tolist()
            levels = slow(w, bits)
            reach = max(map(abs, w))
            for x, got in zip(w, found[n, columns].tolist()):
                assert min(abs(got - v) for v in levels) < 1e-5 * reach, "a level of the group"
                assert abs(got - x) <= min(abs(v - x) for v in levels) + 1e-5 * reach, "the nearest"


@pytest.mark.parametrize("bits", EVERY)
def test_rows_groups_and_columns_of_any_number(bits: int) -> None:
    """Odd numbers of columns, and groups of one column, which every method with an end at the largest weight holds."""
    weight = dense(rows=1, columns=13)
    q = quantize_weight(weight, "minmax", bits=bits, group_size=1)
    assert torch.allclose(q.dequantize(), weight, rtol=1e-6)
    for group in (None, -1, 13):
        assert torch.equal(
            quantize_weight(weight, "minmax", bits=bits, group_size=group).dequantize(),
            quantize_weight(weight, "minmax", bits=bits, group_size=13).dequantize(),
        )


@pytest.mark.parametrize("bits", EVERY)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_searched_range_is_never_worse_than_the_whole(bits: int, symmetric: bool) -> None:
    """Also with an outlier, where it is much better; of few bits at least."""
    weight = dense(rows=40, columns=64)
    weight[:, ::32] *= 3
    plain = quantize_weight(weight, "absmax" if symmetric else "minmax", bits=bits, group_size=32)
    searched = quantize_weight(weight, "mse", bits=bits, group_size=32, symmetric=symmetric)
    for a, b, w in zip(searched.dequantize(), plain.dequantize(), weight):
        assert (a - w).square().sum() <= (b - w).square().sum() * (1 + 1e-5)
    if bits in (2, 3):
        assert error(weight, searched) < 0.95 * error(weight, plain)
    few = quantize_weight(weight, "mse", bits=bits, group_size=32, symmetric=symmetric, steps=1)
    assert error(weight, few) == pytest.approx(error(weight, plain), rel=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_hqq_lowers_the_error_that_it_is_about(bits: int) -> None:
    weight = dense(rows=40, columns=64)
    weight[:, ::32] *= 4
    start = quantize_weight(weight, "hqq", bits=bits, group_size=32, steps=1)
    found = quantize_weight(weight, "hqq", bits=bits, group_size=32)
    assert error(weight, found, 0.7) < 0.99 * error(weight, start, 0.7)
    group = (40, 2, 32)
    before = (start.dequantize() - weight).abs().pow(0.7).view(group).sum(2)
    after = (found.dequantize() - weight).abs().pow(0.7).view(group).sum(2)
    assert (after <= before * (1 + 1e-5)).all(), "of no group it rises"


def test_the_tables() -> None:
    """Of NF4: quantiles, symmetric in their number, an exact zero. Of E2M1: every value of its bits, by its definition."""
    assert len(NF4) == 16 and list(NF4) == sorted(NF4) and NF4[7] == 0 and NF4[0] == -1 and NF4[15] == 1
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        value = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        assert FP4[code] == pytest.approx((-1) ** (code >> 3) * value / 6)
    # the quantiles of a normal distribution, as the paper's appendix builds them
    from statistics import NormalDist

    normal = NormalDist()
    offset = 0.9677083
    upper = [normal.inv_cdf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    lower = [-normal.inv_cdf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    expected = sorted([*upper, 0.0, *lower])
    assert torch.allclose(torch.tensor(NF4), torch.tensor(expected) / max(expected), atol=1e-4)


@pytest.mark.parametrize("method", TABLES)
def test_every_value_of_a_table_is_kept(method: str) -> None:
    weight = torch.tensor([NF4, FP4], dtype=torch.float32) * 0.37
    row = 0 if method == "nf4" else 1
    assert torch.allclose(quantize_weight(weight, method, group_size=16).dequantize()[row], weight[row], rtol=1e-6)


# ----------------------------------------------------------------------------------------------------- palettes


def optimal(values: list[float], clusters: int) -> float:
    """The least sum of squares of any division of the sorted values, by trying every last boundary."""
    x = sorted(values)

    def cost(i: int, j: int) -> float:
        part = x[i:j]
        mean = sum(part) / len(part)
        return sum((v - mean) ** 2 for v in part)

    best = [0.0] + [math.inf] * len(x)
    for _ in range(clusters):
        best = [min([best[j]] + [best[i] + cost(i, j) for i in range(j)]) for j in range(len(x) + 1)]
    return best[-1]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group_rows", [None, 2])
def test_a_palette_is_the_optimum(bits: int, group_rows: int | None) -> None:
    weight = dense(rows=5, columns=6)
    q = quantize_weight(weight, "palette", bits=bits, group_size=None, group_rows=group_rows)
    parts = weight.split(group_rows or 5)
    assert q.scale is None and q.lut is not None and q.lut.shape == (len(parts), 2**bits)
    for part, got in zip(parts, q.dequantize().split(group_rows or 5)):
        best = optimal(part.flatten().tolist(), 2**bits)
        assert float((part - got).square().sum()) == pytest.approx(best, abs=1e-5)
        assert len(got.unique()) <= 2**bits


@pytest.mark.parametrize("bits", [5, 7])
def test_a_palette_of_many_entries(bits: int) -> None:
    """More entries than weights hold each weight; of more weights, no entry could be left out."""
    few = dense(rows=2, columns=3)
    assert torch.equal(quantize_weight(few, "palette", bits=bits, group_size=None).dequantize(), few)
    weight = dense(rows=5, columns=50)
    q = quantize_weight(weight, "palette", bits=bits, group_size=None)
    assert q.lut is not None and (q.lut[0].diff() > 0).all()
    centroids, inertia = ops.kmeans1d(weight, 2**bits)
    assert torch.equal(q.lut, centroids[:, :, 0])
    assert error(weight, q) == pytest.approx(float(inertia), rel=1e-4)


def as_bytes(entries: list[float]) -> tuple[list[int], float]:
    """A palette as signed bytes and their factor, number by number."""
    factor = max(map(abs, entries)) / 127
    return [rounded(e / factor) for e in entries], factor


@pytest.mark.parametrize("bits", EVERY)
@pytest.mark.parametrize("group_rows", [None, 2])
def test_a_palette_of_bytes(bits: int, group_rows: int | None) -> None:
    """The optimal palette, rounded; each weight takes the nearest of the rounded entries, and loses at most half a step."""
    weight = dense(rows=5, columns=60)
    options: dict[str, Any] = {"bits": bits, "group_size": None, "group_rows": group_rows}
    floats = quantize_weight(weight, "palette", **options)
    q = quantize_weight(weight, "palette", lut_dtype=torch.int8, **options)
    size = group_rows or 5
    assert q.lut is not None and q.lut.dtype == torch.int8 and q.lut.abs().max() == 127 and q.scale.shape == (5, 1)
    found = q.dequantize()
    for n in range(5):
        entries, factor = as_bytes(floats.lut[n // size].double().tolist())
        # (a quotient in fp32 may round the other way)
        assert all(abs(a - b) <= 1 for a, b in zip(q.lut[n // size].tolist(), entries))
        assert float(q.scale[n]) == pytest.approx(factor, rel=1e-6)
        levels = [e * float(q.scale[n]) for e in q.lut[n // size].tolist()]
        before = (floats.dequantize()[n] - weight[n]).abs().tolist()
        for x, got, was in zip(weight[n].tolist(), found[n].tolist(), before):
            assert abs(got - x) == pytest.approx(min(abs(v - x) for v in levels), abs=1e-6)
            assert abs(got - x) <= was + factor / 2 + 1e-6


def test_a_palette_of_bytes_is_multiplied_as_integers() -> None:
    """Of weights that are integers times a power of two: then nothing is rounded, and the product is that of int64."""
    rand = Random("integers")
    entries = torch.tensor([-127, -90, -64, -20, -3, 0, 1, 7, 12, 31, 50, 77, 90, 101, 119, 127])
    whole = entries[(rand.uniform(40, 96) * 16).long()]
    whole[:, :16] = entries
    q = quantize_weight(whole / 64, "palette", bits=4, group_size=None, group_rows=10, lut_dtype=torch.int8)
    assert torch.equal(q.dequantize() * 64, whole.float())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 5, 40):
            x = (rand.uniform(rows, 96) * 255).floor() - 127
            x[:, 0] = 127
            expected = x.long() @ whole.t()
            y = ops.qlinear(x.to(dtype), q, activations="int8")
            assert torch.equal(y, (expected.double() / 64).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_palette_in_another_float(dtype: torch.dtype) -> None:
    weight = dense(rows=6, columns=50)
    plain = quantize_weight(weight, "palette", bits=3, group_size=None)
    q = quantize_weight(weight, "palette", bits=3, group_size=None, lut_dtype=dtype)
    assert q.scale is None and q.lut.dtype == dtype and torch.equal(q.lut, plain.lut.to(dtype))
    levels = q.lut[0].float()
    nearest = (weight[..., None] - levels).abs().min(-1).values
    assert torch.allclose((q.dequantize() - weight).abs(), nearest, atol=1e-6)


def test_palettes_of_bytes_of_zeros_large_and_small_weights_and_no_rows() -> None:
    options: dict[str, Any] = {"bits": 2, "group_size": None, "lut_dtype": torch.int8}
    assert (quantize_weight(torch.zeros(3, 8), "palette", **options).dequantize() == 0).all()
    for factor in (1e-30, 1.0, 1e30):
        weight = dense(rows=4, columns=12) * factor
        plain = quantize_weight(weight, "palette", bits=2, group_size=None).dequantize()
        got = quantize_weight(weight, "palette", **options).dequantize()
        assert ((got - weight).abs() <= (plain - weight).abs() + 0.005 * weight.abs().max()).all()
    none = quantize_weight(torch.zeros(0, 8), "palette", **options)
    assert none.dequantize().shape == (0, 8)
    assert ops.qlinear(torch.ones(3, 8), none, activations="int8").shape == (3, 0)
    wide = quantize_weight(dense(rows=4, columns=12).bfloat16(), "palette", **options)
    assert wide.dtype == torch.bfloat16 and wide.scale.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------- gptq


def inputs(columns: int, samples: int = 400, spread: float = 0.0) -> Tensor:
    """Correlated: a few directions carry most of it. ``spread`` makes some columns much larger."""
    rand = Random("inputs")
    x = rand.normal(samples, max(columns // 4, 1)) @ rand.normal(max(columns // 4, 1), columns)
    return (x + 0.1 * rand.normal(samples, columns)) * torch.exp(spread * rand.normal(columns))


def textbook(
    weight: Tensor, hessian: Tensor, bits: int, group: int, damping: float = 0.01, symmetric_: bool = False
) -> Tensor:
    """Optimal brain quantisation in the order of the columns, in fp64, with the inverse updated after each."""
    w, h = weight.double().clone(), hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    q = torch.empty_like(w)
    levels: list[Levels] = []
    for k in range(w.shape[1]):
        if k % group == 0:
            rows = w[:, k : k + group].tolist()
            levels = [symmetric(max(map(abs, r)), bits) if symmetric_ else affine(min(r), max(r), bits) for r in rows]
        for n in range(w.shape[0]):
            x = float(w[n, k])
            q[n, k] = min(levels[n], key=lambda v: abs(v - x))
            rest = inverse[k] / inverse[k, k]
            w[n] -= (x - q[n, k]) * rest
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[k], inverse[:, k] = 0, 0
    return q


def output_error(weight: Tensor, got: Tensor, hessian: Tensor) -> float:
    d = got.double() - weight.double()
    return float((d @ hessian.double() * d).sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("block", [1, 5, 7, 128])
@pytest.mark.parametrize("group", [1, 4, 6, 24])
def test_gptq_equals_the_textbook(bits: int, block: int, group: int) -> None:
    weight, x = dense(rows=4, columns=24), inputs(24)
    hessian = x.t() @ x
    for symmetric_ in (False, True):
        q = quantize_weight(
            weight, "gptq", bits=bits, group_size=group, hessian=hessian, block=block, symmetric=symmetric_
        )
        expected = textbook(weight, hessian, bits, group, symmetric_=symmetric_)
        torch.testing.assert_close(q.dequantize(), expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_better_where_inputs_are_correlated(bits: int) -> None:
    weight, x = dense(rows=32, columns=64), inputs(64)
    hessian = x.t() @ x
    plain = quantize_weight(weight, "minmax", bits=bits, group_size=32).dequantize()
    found = quantize_weight(weight, "gptq", bits=bits, group_size=32, hessian=hessian).dequantize()
    assert output_error(weight, found, hessian) < 0.5 * output_error(weight, plain, hessian)
    assert error(weight, quantize_weight(weight, "minmax", bits=bits, group_size=32)) < float(
        (found - weight).square().sum()
    ), "its own error is larger for it"


def test_gptq_without_correlation_is_rounding() -> None:
    weight = dense(rows=6, columns=24)
    for symmetric_, method in ((False, "minmax"), (True, "absmax")):
        q = quantize_weight(weight, "gptq", bits=3, group_size=8, hessian=3 * torch.eye(24), symmetric=symmetric_)
        assert torch.allclose(q.dequantize(), quantize_weight(weight, method, bits=3, group_size=8).dequantize())


@pytest.mark.parametrize("bits", [2, 4])
def test_the_order_of_the_largest_inputs(bits: int) -> None:
    weight, x = dense(rows=16, columns=24), inputs(24, spread=1.5)
    hessian = x.t() @ x
    q = quantize_weight(weight, "gptq", bits=bits, group_size=6, hessian=hessian, act_order=True)
    perm = hessian.diagonal().argsort(descending=True)
    assert q.perm is not None and torch.equal(q.perm, perm)
    expected = torch.empty(16, 24)
    expected[:, perm] = textbook(weight[:, perm], hessian[perm][:, perm], bits, 6).float()
    torch.testing.assert_close(q.dequantize(), expected, rtol=1e-3, atol=1e-4)
    y, reference = ops.qlinear(x[:5], q), x[:5] @ q.dequantize().t()
    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-3)
    plain = quantize_weight(weight, "gptq", bits=bits, group_size=6, hessian=hessian).dequantize()
    assert output_error(weight, q.dequantize(), hessian) < output_error(weight, plain, hessian)


def test_an_input_that_never_came() -> None:
    weight, x = dense(rows=6, columns=24), inputs(24)
    x[:, [3, 17]] = 0
    hessian = x.t() @ x
    q = quantize_weight(weight, "gptq", bits=4, group_size=8, hessian=hessian).dequantize()
    assert q.isfinite().all() and (q[:, [3, 17]] == 0).all()
    large = weight.clone()
    large[:, 3] = 1e6  # and would have spoilt its group
    assert torch.equal(quantize_weight(large, "gptq", bits=4, group_size=8, hessian=hessian).dequantize(), q)


def test_the_hessian_is_left_alone() -> None:
    weight, x = dense(rows=6, columns=24), inputs(24)
    hessian = (x.t() @ x).double()
    hessian[0, :] = hessian[:, 0] = 0
    before, w = hessian.clone(), weight.clone()
    quantize_weight(weight, "gptq", group_size=8, hessian=hessian)
    assert torch.equal(hessian, before) and torch.equal(weight, w)


# ------------------------------------------------------------------------------------------------- of all methods


def how(method: str, columns: int) -> dict[str, Any]:
    """Options that the method cannot do without."""
    if method == "gptq":
        return {"hessian": torch.eye(columns) * 2 + 0.5}
    return {"group_size": None} if method == "palette" else {}


every_method = pytest.mark.parametrize("method", QUANTIZERS)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_weight_is_kept(method: str, dtype: torch.dtype) -> None:
    weight = dense().to(dtype)
    q = quantize_weight(weight, method, **{"group_size": 14, **how(method, COLUMNS)})
    assert q.dtype == dtype == q.dequantize().dtype
    wide = quantize_weight(weight.float(), method, **{"group_size": 14, **how(method, COLUMNS)})
    assert all(torch.equal(a, b) for a, b in zip(q.tensors().values(), wide.tensors().values(), strict=True))


@every_method
def test_strides_and_gradients_do_not_matter(method: str) -> None:
    weight = dense(rows=COLUMNS, columns=6).t().requires_grad_()
    options = {"group_size": 14, **how(method, COLUMNS)}
    q = quantize_weight(weight, method, **options)
    assert not any(t.requires_grad for t in q.tensors().values())
    same = quantize_weight(weight.detach().contiguous(), method, **options)
    assert torch.equal(q.dequantize(), same.dequantize())


@pytest.mark.parametrize(("method", "bits"), [(m, b) for m in QUANTIZERS for b in EVERY if b == 4 or m not in TABLES])
def test_zeros_constants_and_no_rows(method: str, bits: int) -> None:
    """Groups of zeros stay zeros (mid-rise levels of no height too); constants are held by all that reach them."""
    options = {"bits": bits, "group_size": 4, **how(method, 8)}
    zeros = quantize_weight(torch.zeros(2, 8), method, **options)
    assert zeros.scale is None or zeros.scale.isfinite().all()  # type: ignore[union-attr]
    if not (bits == 1 and method in ("absmax",)):
        assert (zeros.dequantize() == 0).all()
    assert zeros.dequantize().isfinite().all()
    for value in (0.75, -0.75):
        got = quantize_weight(torch.full((2, 8), value), method, **options).dequantize()
        assert got.isfinite().all()
        if method != "statsq":
            assert torch.allclose(got, torch.full((2, 8), value), rtol=1e-5)
    none = quantize_weight(torch.zeros(0, 8), method, **options)
    assert none.dequantize().shape == (0, 8) and ops.qlinear(torch.ones(3, 8), none).shape == (3, 0)
    some = quantize_weight(torch.ones(2, 8), method, **options)
    assert ops.qlinear(torch.ones(0, 8), some).shape == (0, 2)


@every_method
def test_large_and_small_weights(method: str) -> None:
    for factor in (1e-30, 1e30):
        weight = dense() * factor
        got = quantize_weight(weight, method, bits=4, **{"group_size": 14, **how(method, COLUMNS)}).dequantize()
        assert got.isfinite().all()
        assert (got - weight).abs().mean() < 0.3 * weight.abs().mean()


def test_the_range_itself_does_not_overflow() -> None:
    most = 0.9 * torch.finfo(torch.float32).max
    got = quantize_weight(torch.tensor([[-most, 0.0, most / 2, most]]), "minmax", bits=8, group_size=None).dequantize()
    assert got.isfinite().all() and got[0, 1] == 0


# -------------------------------------------------------------------------------------------------------- errors


def quantized(weight: Tensor | Callable[[], Any] | None = None, *args: Any, **options: Any) -> Callable[[], object]:
    def call() -> object:
        w = torch.ones(2, 8) if weight is None else weight() if callable(weight) else weight
        made = {k: v() if callable(v) else v for k, v in options.items()}
        return quantize_weight(w, *args, **{"group_size": 4, **made})

    return call


def spoilt(value: float) -> Callable[[], Tensor]:
    def make() -> Tensor:
        weight = torch.ones(2, 8)
        weight[1, 3] = weight[0, 0] = value
        return weight

    return make


def gram(value: float) -> Callable[[], Tensor]:
    def make() -> Tensor:
        h = torch.eye(8)
        h[0, 0] = value
        return h

    return make


NAME = "quantize_weight: "
REFUSALS = [
    Refusal("list", quantized(lambda: [1.0]), TypeError, NAME + "weight must be a floating-point tensor, got list"),
    Refusal(
        "integers", quantized(lambda: torch.ones(2, 8).int()), TypeError,
        NAME + "weight must be a floating-point tensor, got torch.int32",
    ),
    Refusal("shape", quantized(lambda: torch.ones(8)), ValueError, NAME + "weight must have shape [N, K], got [8]"),
    Refusal(
        "nan", quantized(spoilt(torch.nan)), ValueError,
        NAME + "weight must be finite, got 2 values that are not, of 16", data=True,
    ),
    Refusal(
        "inf", quantized(spoilt(torch.inf)), ValueError,
        NAME + "weight must be finite, got 2 values that are not, of 16", data=True,
    ),
    Refusal(
        "too_large", quantized(lambda: torch.full((2, 8), 1e39, dtype=torch.float64)), ValueError,
        NAME + "weight must be finite, got 16 values that are not, of 16", data=True,
    ),
    Refusal(
        "method", quantized(None, "absmix"), ValueError,
        NAME + "there is no method 'absmix'; did you mean 'absmax' or 'minmax'?",
    ),
    Refusal("bits", quantized(bits=9), ValueError, NAME + "bits must be between 1 and 8, got 9"),
    Refusal("bits_0", quantized(bits=0), ValueError, NAME + "bits must be between 1 and 8, got 0"),
    Refusal("bits_float", quantized(bits=4.0), TypeError, NAME + "bits must be an integer, got 4.0"),
    Refusal(
        "group", quantized(group_size=3), ValueError,
        NAME + "group_size must be positive and divide the 8 columns, got 3",
    ),
    Refusal(
        "group_0", quantized(group_size=0), ValueError,
        NAME + "group_size must be positive and divide the 8 columns, got 0",
    ),
    Refusal(
        "group_negative", quantized(group_size=-2), ValueError,
        NAME + "group_size must be positive and divide the 8 columns, got -2",
    ),
    Refusal(
        "odd", quantized(lambda: torch.ones(2, 7)), ValueError,
        NAME + "group_size must be positive and divide the 7 columns, got 4",
    ),
    Refusal(
        "no_columns", quantized(lambda: torch.ones(2, 0), group_size=None), ValueError,
        NAME + "group_size must be positive and divide the 0 columns, got 0",
    ),
    Refusal(
        "option", quantized(None, "gptq", dampening=0.1), TypeError,
        NAME + "method gptq has no option 'dampening'; did you mean 'damping'?", data=True,
    ),
    Refusal(
        "no_options", quantized(None, "absmax", symmetric=True), TypeError,
        NAME + "method absmax has no option 'symmetric'; there are none", data=True,
    ),
    Refusal(
        "switch", quantized(None, "mse", symmetric="yes"), TypeError,
        NAME + "symmetric must be True or False, got 'yes'", data=True,
    ),
    Refusal(
        "count", quantized(None, "hqq", steps=0), ValueError, NAME + "steps must be at least 1, got 0", data=True
    ),
    Refusal("count_float", quantized(None, "hqq", steps=2.5), TypeError, NAME + "steps must be an integer, got 2.5", data=True),
    Refusal(
        "steps", quantized(None, "mse", steps=101), ValueError,
        NAME + "steps must be at most 100 (each cuts a hundredth of the range), got 101", data=True,
    ),
    Refusal("number", quantized(None, "hqq", p="x"), TypeError, NAME + "p must be a number, got 'x'", data=True),
    Refusal(
        "negative", quantized(None, "gptq", hessian=gram(1), damping=-0.1), ValueError,
        NAME + "damping must be finite and not negative, got -0.1", data=True,
    ),
    Refusal(
        "no_hessian", quantized(None, "gptq"), ValueError,
        NAME + "method gptq needs hessian, the sum of x x^T over the inputs of the layer", data=True,
    ),
    Refusal(
        "hessian_type", quantized(None, "gptq", hessian="x"), TypeError,
        NAME + "hessian must be a floating-point tensor, got str", data=True,
    ),
    Refusal(
        "hessian_shape", quantized(None, "gptq", hessian=lambda: torch.eye(7)), ValueError,
        NAME + "hessian must have shape [8, 8], got [7, 7]", data=True,
    ),
    Refusal(
        "hessian_nan", quantized(None, "gptq", hessian=gram(torch.nan)), ValueError,
        NAME + "hessian must be finite, got 1 values that are not, of 64", data=True,
    ),
    Refusal(
        "hessian_zero", quantized(None, "gptq", hessian=lambda: torch.zeros(8, 8)), ValueError,
        NAME + "hessian must be of inputs that came, got a diagonal of zeros", data=True,
    ),
    Refusal(
        "hessian_indefinite", quantized(None, "gptq", hessian=gram(-1)), ValueError,
        NAME + "hessian must be positive definite with damping 0.01; it is not: raise damping", data=True,
    ),
    Refusal("nf4", quantized(None, "nf4", bits=3), ValueError, NAME + "method nf4 has 4 bits, got bits=3", data=True),
    Refusal("fp4", quantized(None, "fp4", bits=8), ValueError, NAME + "method fp4 has 4 bits, got bits=8", data=True),
    Refusal(
        "palette", quantized(None, "palette"), ValueError,
        NAME + "method palette has no groups of columns: group_size must be 8, got 4", data=True,
    ),
    Refusal(
        "palette_rows", quantized(None, "palette", group_size=None, group_rows=0), ValueError,
        NAME + "group_rows must be at least 1, got 0", data=True,
    ),
    Refusal(
        "palette_rows_uneven", lambda: quantize_weight(torch.randn(12, 8), "palette", group_size=None, group_rows=5), ValueError,
        NAME + "group_rows must divide the 12 rows equally, but for a last short block; 3 palettes have 4 rows each, got 5",
        data=True,
    ),
    Refusal(
        "palette_rows_type", quantized(None, "palette", group_size=None, group_rows=1.5), TypeError,
        NAME + "group_rows must be an integer, got 1.5", data=True,
    ),
    Refusal(
        "palette_dtype", quantized(None, "palette", group_size=None, lut_dtype=torch.uint8), TypeError,
        NAME + "lut_dtype must be one of torch.int8, torch.float16, torch.bfloat16, torch.float32, or None, got torch.uint8",
        data=True,
    ),
    Refusal(
        "palette_dtype_name", quantized(None, "palette", group_size=None, lut_dtype="int8"), TypeError,
        NAME + "lut_dtype must be one of torch.int8, torch.float16, torch.bfloat16, torch.float32, or None, got 'int8'",
        data=True,
    ),
    Refusal(
        "table_dtype", quantized(None, "nf4", lut_dtype=torch.int8), TypeError,
        NAME + "method nf4 has no option 'lut_dtype'; there are none", data=True,
    ),
    Refusal(
        "codes", lambda: QTensor.from_codes(torch.tensor([[-1, 3]]), None, bits=2), ValueError,
        "QTensor.from_codes: codes must be in 0 to 3, got -1 to 3", data=True,
    ),
    Refusal(
        "scale", lambda: QTensor.from_codes(torch.zeros(1, 2).int(), torch.tensor([[torch.nan, 1.0]]), bits=2), ValueError,
        "QTensor.from_codes: scale must be finite, got 1 values that are not, of 2", data=True,
    ),
    Refusal(
        "lut",
        lambda: QTensor.from_codes(torch.zeros(1, 2).int(), None, bits=1, lut=torch.tensor([[torch.inf, 1.0]])), ValueError,
        "QTensor.from_codes: lut must be finite, got 1 values that are not, of 2", data=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_every_option_of_every_method_is_described() -> None:
    """And by its default."""
    described = quantize_weight.__doc__
    assert described is not None
    for method, function in QUANTIZERS.items():
        assert f'"{method}"' in described
        for option, default in (function.__kwdefaults__ or {}).items():
            assert f"``{option}``" in described, f"{method}: {option}"
            if default is not None:
                assert re.search(rf"``{option}``\s+\({re.escape(str(default))}\)", described), f"{method}: {option}"


def test_examples() -> None:
    assert doctest.testmod(quantizers).failed == 0
