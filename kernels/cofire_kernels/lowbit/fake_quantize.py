# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Fake quantisation: one pass over memory forward, one backward.

Every operation is rounded by itself, as in the references, so a level never differs. Gradients of parameters are summed
in two stages, each in a fixed order: tiles in fp32, what they leave in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.numerics import maximum

#: Widest group (or row) that one program holds in registers. Wider ones are read once more for each statistic; where
#: outliers have to be found, torch operators take them.
WIDEST = 8192


@triton.jit
def nearest(v):
    """Rounded to integers, halves to even, for every v: adding 2^23 leaves no fraction."""
    rounded = (tl.abs(v) + 8388608.0) - 8388608.0
    return tl.where(tl.abs(v) < 8388608.0, tl.where(v < 0, -rounded, rounded), v)


@triton.jit
def clamped(v, low, high):
    """Between two numbers; NaN stays."""
    return tl.minimum(maximum(v, low), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quotient(a, b):
    """``a / b``, rounded once."""
    return tl.div_rn(a + tl.zeros_like(b), b + tl.zeros_like(a))


# -------------------------------------------------------------------------------- learned parameters: LSQ and affine
# The tensor is a matrix whose rows, or whose columns, have a parameter each: row r the parameter r % scales.


@triton.jit
def tile_of(rows, columns, column_blocks, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows (int64), columns, and the place of this program's tile in a grid of one dimension."""
    down, across = tl.program_id(0) // column_blocks, tl.program_id(0) % column_blocks
    row = down.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return row, across * BLOCK_C + tl.arange(0, BLOCK_C), down, across


@triton.jit
def parameters(parameter_ptr, row, column, rows, columns, scales, BY_COLUMN: tl.constexpr):
    """Of a tile, in fp32, shaped to be broadcast."""
    if BY_COLUMN:
        found = tl.load(parameter_ptr + column, mask=column < columns, other=1).to(tl.float32)[None, :]
    else:
        found = tl.load(parameter_ptr + row % scales, mask=row < rows, other=1).to(tl.float32)[:, None]
    return found


@triton.jit
def store_sums(partial_ptr, terms, row, column, down, across, rows, columns, column_blocks, BY_COLUMN: tl.constexpr):
    """Sums of a tile: of each row ``[rows, column blocks]``, or of each column ``[row blocks, columns]``."""
    if BY_COLUMN:
        tl.store(partial_ptr + down.to(tl.int64) * columns + column, tl.sum(terms, 0), mask=column < columns)
    else:
        tl.store(partial_ptr + row * column_blocks + across, tl.sum(terms, 1), mask=row < rows)


@triton.jit
def fake_quantize_lsq_kernel(
    x_ptr, scale_ptr, y_ptr, rows, columns, column_blocks, scales, low, high,
    BY_COLUMN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, column, _, _ = tile_of(rows, columns, column_blocks, BLOCK_R, BLOCK_C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0).to(tl.float32)
    s = maximum(parameters(scale_ptr, row, column, rows, columns, scales, BY_COLUMN), 1e-5)
    y = nearest(clamped(quotient(x, s), low, high)) * s
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def fake_quantize_lsq_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, dx_ptr, partial_ptr, rows, columns, column_blocks, scales, low, high,
    BY_COLUMN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, column, down, across = tile_of(rows, columns, column_blocks, BLOCK_R, BLOCK_C)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + place, mask=there, other=0).to(tl.float32)
    g = tl.load(grad_ptr + place, mask=there, other=0).to(tl.float32)
    v = quotient(x, maximum(parameters(scale_ptr, row, column, rows, columns, scales, BY_COLUMN), 1e-5))
    inside = (v >= low) & (v <= high)
    tl.store(dx_ptr + place, tl.where(inside, g, 0.0).to(dx_ptr.dtype.element_ty), mask=there)
    terms = g * (nearest(clamped(v, low, high)) - tl.where(inside, v, 0.0))
    terms = tl.where(there, terms, 0.0)
    store_sums(partial_ptr, terms, row, column, down, across, rows, columns, column_blocks, BY_COLUMN)


@triton.jit
def affine_step(range_ptr, minimum_ptr, row, column, rows, columns, scales, top, BY_COLUMN: tl.constexpr):
    """The step, the zero point before it is rounded, and rounded."""
    r = parameters(range_ptr, row, column, rows, columns, scales, BY_COLUMN)
    low = parameters(minimum_ptr, row, column, rows, columns, scales, BY_COLUMN)
    delta = quotient(clamped(r, 1e-6, 1e5), top + tl.zeros_like(r))
    exact = quotient(-low, delta)
    return delta, exact, nearest(exact)


@triton.jit
def fake_quantize_affine_kernel(
    x_ptr, range_ptr, minimum_ptr, y_ptr, rows, columns, column_blocks, scales, top,
    BY_COLUMN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, column, _, _ = tile_of(rows, columns, column_blocks, BLOCK_R, BLOCK_C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0).to(tl.float32)
    delta, _, zero = affine_step(range_ptr, minimum_ptr, row, column, rows, columns, scales, top, BY_COLUMN)
    zero = clamped(zero, 0.0, top)
    y = (nearest(clamped(quotient(x, delta) + zero, 0.0, top)) - zero) * delta
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def fake_quantize_affine_backward_kernel(
    grad_ptr, x_ptr, range_ptr, minimum_ptr, dx_ptr, to_range_ptr, to_minimum_ptr, rows, columns, column_blocks, scales,
    top, BY_COLUMN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, column, down, across = tile_of(rows, columns, column_blocks, BLOCK_R, BLOCK_C)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + place, mask=there, other=0).to(tl.float32)
    g = tl.load(grad_ptr + place, mask=there, other=0).to(tl.float32)
    delta, exact, zero = affine_step(range_ptr, minimum_ptr, row, column, rows, columns, scales, top, BY_COLUMN)
    movable = (zero >= 0) & (zero <= top)
    zero = clamped(zero, 0.0, top)
    v = quotient(x, delta) + zero
    inside = (v >= 0) & (v <= top)
    tl.store(dx_ptr + place, tl.where(inside, g, 0.0).to(dx_ptr.dtype.element_ty), mask=there)
    shift = tl.where(movable, exact - zero, -zero)  # how the zero point follows the step
    terms = g * tl.where(inside, nearest(v) - v, clamped(v, 0.0, top) + shift)
    terms = tl.where(there, terms, 0.0)
    store_sums(to_range_ptr, terms, row, column, down, across, rows, columns, column_blocks, BY_COLUMN)
    terms = tl.where(there & movable & (inside == 0), g, 0.0)
    store_sums(to_minimum_ptr, terms, row, column, down, across, rows, columns, column_blocks, BY_COLUMN)


@triton.jit
def parameter_gradient_kernel(
    partial_ptr, out_ptr, outer, scales, inner, factor, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """The second stage: ``[outer, scales, inner]`` summed over its first and last dimension, in fp64."""
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    total = tl.zeros([BLOCK_S, BLOCK_T], tl.float64)
    count = tl.zeros([1, 1], tl.int64) + outer
    count *= inner
    for start in range(0, tl.sum(count), BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
        place = (t // inner * scales + s) * inner + t % inner
        total += tl.load(partial_ptr + place, mask=(s < scales) & (t < count), other=0).to(tl.float64)
    found = (tl.sum(total, 1)[:, None] * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + s, found, mask=s < scales)


# ----------------------------------------------------------------------------- statistics of groups: minmax and StatsQ


@triton.jit
def load_group(x_ptr, group, k, groups, size, other):
    """fp32 ``[BLOCK_R, BLOCK_K]``, ``other`` outside."""
    inside = (group < groups)[:, None] & (k < size)[None, :]
    x = tl.load(x_ptr + group[:, None] * size + k[None, :], mask=inside, other=0).to(tl.float32)
    return tl.where(inside, x, other)


@triton.jit
def extremes(x_ptr, group, groups, size, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """The least and the greatest of each group; NaN where one of them is NaN."""
    low = tl.full([BLOCK_R, BLOCK_K], float("inf"), tl.float32)
    high = tl.full([BLOCK_R, BLOCK_K], float("-inf"), tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        low = tl.minimum(
            low, load_group(x_ptr, group, k, groups, size, float("inf")), propagate_nan=tl.PropagateNan.ALL
        )
        high = maximum(high, load_group(x_ptr, group, k, groups, size, float("-inf")))
    return row_extremes(low, high)


@triton.jit
def row_extremes(low, high):
    has_nan = tl.max((low != low).to(tl.int32), 1) > 0
    nan = float("nan")
    return tl.where(has_nan, nan, tl.min(low, 1))[:, None], tl.where(has_nan, nan, tl.max(high, 1))[:, None]


@triton.jit
def group_step(low, high, top):
    """Step, zero point, and whether all values are equal."""
    step = quotient(high - low, top + tl.zeros_like(low))
    constant = step == 0
    step = tl.where(constant, 1.0, step)
    return step, nearest(quotient(-low, step)), constant


@triton.jit
def fake_quantize_minmax_kernel(
    x_ptr, y_ptr, groups, size, top, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    low, high = extremes(x_ptr, group, groups, size, BLOCK_R, BLOCK_K)
    step, zero, constant = group_step(low, high, top)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_group(x_ptr, group, k, groups, size, 0.0)
        y = (clamped(nearest(quotient(x, step)) + zero, 0.0, top) - zero) * step
        y = tl.where(constant, x, y)
        inside = (group < groups)[:, None] & (k < size)[None, :]
        tl.store(y_ptr + group[:, None] * size + k[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def fake_quantize_minmax_backward_kernel(
    grad_ptr, x_ptr, dx_ptr, groups, size, top, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    low, high = extremes(x_ptr, group, groups, size, BLOCK_R, BLOCK_K)
    step, zero, constant = group_step(low, high, top)
    to_step = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    at_low, at_high = tl.zeros([BLOCK_R, BLOCK_K], tl.float32), tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x, g = load_group(x_ptr, group, k, groups, size, 0.0), load_group(grad_ptr, group, k, groups, size, 0.0)
        there = (k < size)[None, :]
        v = quotient(x, step)
        level = nearest(v) + zero
        inside = (level >= 0) & (level <= top)
        terms = g * (clamped(level, 0.0, top) - zero - tl.where(inside, v, 0.0))
        to_step += tl.where(there, terms, 0.0)
        at_low += (there & (x == low)).to(tl.float32)
        at_high += (there & (x == high)).to(tl.float32)
    moved = quotient(tl.sum(to_step, 1)[:, None], top + tl.zeros_like(low))
    least, most = tl.sum(at_low, 1)[:, None], tl.sum(at_high, 1)[:, None]
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x, g = load_group(x_ptr, group, k, groups, size, 0.0), load_group(grad_ptr, group, k, groups, size, 0.0)
        level = nearest(quotient(x, step)) + zero
        inside = (level >= 0) & (level <= top)
        share = quotient((x == high).to(tl.float32), most) - quotient((x == low).to(tl.float32), least)
        dx = tl.where(constant, g, tl.where(inside, g, 0.0) + moved * share)
        there = (group < groups)[:, None] & (k < size)[None, :]
        tl.store(dx_ptr + group[:, None] * size + k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=there)


@triton.jit
def fake_quantize_statsq_kernel(
    x_ptr, y_ptr, groups, size, half, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float64)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        total += tl.abs(load_group(x_ptr, group, k, groups, size, 0.0)).to(tl.float64)
    scale = (2 * tl.sum(total, 1)[:, None] / size).to(tl.float32)
    divisor = tl.where(scale == 0, 1.0, scale)
    unit = quotient(scale, half + tl.zeros_like(scale))
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        u = clamped(quotient(load_group(x_ptr, group, k, groups, size, 0.0), divisor), -1.0, 1 - 1e-6)
        level = clamped(nearest(u * half - 0.5), -half, half - 1.0)
        inside = (group < groups)[:, None] & (k < size)[None, :]
        y = ((level + 0.5) * unit).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + group[:, None] * size + k[None, :], y, mask=inside)


# ------------------------------------------------------------------------------------------- four bits per group


@triton.jit
def philox_words(block, seed_low, seed_high):
    """Philox-4x32-10 of a 64-bit counter: four words (Salmon et al. 2011)."""
    k0 = tl.full([1, 1], seed_low, tl.int32).to(tl.uint32, bitcast=True)
    k1 = tl.full([1, 1], seed_high, tl.int32).to(tl.uint32, bitcast=True)
    a, b = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    c, d = tl.zeros_like(a), tl.zeros_like(a)
    first, second = tl.full([1, 1], 0xD2511F53, tl.uint32), tl.full([1, 1], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        p_high, p_low = tl.umulhi(a, first + tl.zeros_like(a)), a * first
        q_high, q_low = tl.umulhi(c, second + tl.zeros_like(c)), c * second
        a, b, c, d = q_high ^ b ^ k0, q_low, p_high ^ d ^ k1, p_low
        k0 += tl.full([1, 1], 0x9E3779B9, tl.uint32)
        k1 += tl.full([1, 1], 0xBB67AE85, tl.uint32)
    return a, b, c, d


@triton.jit
def random_words(element, seed_low, seed_high, WHOLE_BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A word for each element of the rows whose first elements are ``element`` (int64 ``[R, 1]``).

    A block of Philox is four neighbouring elements: computed once where groups begin with one, else by each of the four.
    """
    R: tl.constexpr = element.shape[0]
    if WHOLE_BLOCKS:
        block = element // 4 + tl.arange(0, BLOCK_K // 4)[None, :]
        a, b, c, d = philox_words(block, seed_low, seed_high)
        words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(R, BLOCK_K)
    else:
        element = element + tl.arange(0, BLOCK_K)[None, :]
        a, b, c, d = philox_words(element // 4, seed_low, seed_high)
        which = element % 4
        words = tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d))
    return words


@triton.jit
def to_levels(a, chance, LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Magnitudes at the nearest level, ties at the even code; or up with the chance of the distance from the one below."""
    lower = tl.zeros_like(a) + LEVELS[0]
    if STOCHASTIC:
        upper = tl.zeros_like(a) + LEVELS[1]
        for i in tl.static_range(1, 8):
            lower = tl.where(a >= LEVELS[i], LEVELS[i], lower)
            if i < 7:
                upper = tl.where(a >= LEVELS[i], LEVELS[i + 1], upper)
        lower = tl.where(a - lower > chance * (upper - lower), upper, lower)
    else:
        for i in tl.static_range(7):
            if i % 2 == 1:
                lower = tl.where(a >= (LEVELS[i] + LEVELS[i + 1]) / 2, LEVELS[i + 1], lower)
            else:
                lower = tl.where(a > (LEVELS[i] + LEVELS[i + 1]) / 2, LEVELS[i + 1], lower)
    return lower


@triton.jit
def fake_quantize_group_kernel(
    x_ptr, y_ptr, groups, size, outliers, seed_low, seed_high, LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LEVELS are the magnitudes of a symmetric format; None: 16 levels between the extremes."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    x = load_group(x_ptr, group, k, groups, size, 0.0)
    inside = (group < groups)[:, None] & (k < size)[None, :]

    # Unique keys, greater magnitudes first (the bits of floats that are not negative are in their order), then lower
    # columns; NaN above all.
    bits = tl.where(x != x, 0x7FFFFFFF, tl.abs(x).to(tl.int32, bitcast=True)).to(tl.int64)
    key = tl.where(inside, (bits << 32) | (0x7FFFFFFF - k)[None, :].to(tl.int64), -1)
    for _ in range(outliers):
        key = tl.where(key == tl.max(key, 1)[:, None], -1, key)
    free = key >= 0

    chance = tl.zeros_like(x)
    if STOCHASTIC:
        words = random_words((group * size)[:, None], seed_low, seed_high, WHOLE_BLOCKS, BLOCK_K)
        chance = (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    if LEVELS is None:
        low, high = row_extremes(tl.where(free, x, float("inf")), tl.where(free, x, float("-inf")))
        step, zero, constant = group_step(low, high, 15.0)
        v = quotient(x, step)
        if STOCHASTIC:  # noqa: SIM108
            rounded = tl.floor(v) + (v - tl.floor(v) > chance).to(tl.float32)
        else:
            rounded = nearest(v)
        y = (clamped(rounded + zero, 0.0, 15.0) - zero) * step
    else:
        _, largest = row_extremes(tl.where(free, tl.abs(x), 0.0), tl.where(free, tl.abs(x), 0.0))
        step = quotient(largest, LEVELS[7] + tl.zeros_like(largest))
        constant = step == 0
        y = to_levels(quotient(tl.abs(x), tl.where(constant, 1.0, step)), chance, LEVELS, STOCHASTIC) * step
        y = tl.where(x < 0, -y, y)
    y = tl.where(constant | (free == 0), x, y)
    tl.store(y_ptr + group[:, None] * size + k[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------ launchers


def _matrix(x: Tensor, scales: int, inner: int) -> tuple[int, int, bool]:
    """Rows, columns, and whether the columns have the parameters."""
    if scales == 1:
        return 1, x.numel(), False
    return (x.numel() // scales, scales, True) if inner == 1 else (x.numel() // inner, inner, False)


def _block(x: Tensor, rows: int, columns: int, widest: int | None = None) -> dict[str, Any]:
    """A tile of the tuned number of elements, as wide as the matrix allows."""
    tile: dict[str, Any] = dict(configs.tile("fake_quantize", x.device, columns=columns))
    elements = tile.pop("ELEMENTS")
    wide = min(triton.next_power_of_2(max(columns, 1)), elements if widest is None else widest)
    down = min(triton.next_power_of_2(max(rows, 1)), max(1, elements // wide))
    return {"down": down, "across": wide, **tile}


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def _learned(kernel: Any, tensors: tuple[Tensor, ...], x: Tensor, outputs: list[Tensor], scales: int, inner: int,
             sums: int, numbers: tuple[float, ...]) -> tuple[list[Tensor], tuple[int, int, int]]:  # fmt: skip
    """Launch; the partial sums, if any, and their shape ``[outer, scales, inner]``."""
    rows, columns, by_column = _matrix(x, scales, inner)
    tile = _block(x, rows, columns)
    down, across = tile.pop("down"), tile.pop("across")
    blocks = triton.cdiv(rows, down), triton.cdiv(columns, across)
    shape = (blocks[0], columns, 1) if by_column else (rows // scales, scales, blocks[1])
    partial = [torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(sums)]
    with torch.cuda.device_of(x):
        kernel[(blocks[0] * blocks[1],)](
            *tensors, *outputs, *partial, rows, columns, blocks[1], scales, *numbers, BY_COLUMN=by_column, BLOCK_R=down,
            BLOCK_C=across, enable_fp_fusion=False, **tile,
        )  # fmt: skip
    return partial, shape


def _gradient(partial: Tensor, like: Tensor, factor: float) -> Tensor:
    outer, scales, inner = partial.shape
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    block_s = min(16, triton.next_power_of_2(scales))
    with torch.cuda.device_of(out):
        parameter_gradient_kernel[(triton.cdiv(scales, block_s),)](
            partial, out, outer, scales, inner, float(factor), BLOCK_S=block_s, BLOCK_T=1024 // block_s
        )
    return out


def _reference(name: str, *args: Any) -> Tensor:
    """Plain torch: for parameters in fp64, and groups that no program can hold."""
    (found,) = _references(name, *args)
    return found


def _references(name: str, *args: Any) -> tuple[Tensor, ...]:
    found = getattr(torch.ops.cofire, name).reference(*args)
    return found if isinstance(found, tuple) else (found,)


def fake_quantize_lsq_plan(*args: Any) -> str:
    """What the launchers of learned parameters do with these arguments."""
    wide = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
    return "torch operators: an argument in fp64" if wide else "one pass over memory"


fake_quantize_lsq_backward_plan = fake_quantize_affine_plan = fake_quantize_affine_backward_plan = (
    fake_quantize_lsq_plan
)
fake_quantize_minmax_backward_plan = fake_quantize_lsq_plan


def fake_quantize_lsq(
    input: Tensor, scale: Tensor, inner: int, low: int, high: int, gradient_scale: float | None
) -> Tensor:  # fmt: skip
    if scale.dtype == torch.float64:
        return _reference("fake_quantize_lsq", input, scale, inner, low, high, gradient_scale)
    x, s = _contiguous(input, scale)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _learned(fake_quantize_lsq_kernel, (x, s), x, [y], s.numel(), inner, 0, (float(low), float(high)))
    return y


def fake_quantize_lsq_backward(
    grad: Tensor, input: Tensor, scale: Tensor, inner: int, low: int, high: int, gradient_scale: float | None
) -> tuple[Tensor, ...]:  # fmt: skip
    if torch.float64 in (scale.dtype, input.dtype, grad.dtype):
        return _references("fake_quantize_lsq_backward", grad, input, scale, inner, low, high, gradient_scale)
    g, x, s = _contiguous(grad, input, scale)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros(s.shape, dtype=s.dtype, device=s.device)
    numbers = (float(low), float(high))
    (partial,), _ = _learned(fake_quantize_lsq_backward_kernel, (g, x, s), x, [dx], s.numel(), inner, 1, numbers)
    shared = max(high * (x.numel() // max(s.numel(), 1)), 1)
    return dx, _gradient(partial, s, shared**-0.5 if gradient_scale is None else gradient_scale)


def fake_quantize_affine(input: Tensor, range: Tensor, minimum: Tensor, inner: int, bits: int) -> Tensor:
    if torch.float64 in (range.dtype, minimum.dtype):
        return _reference("fake_quantize_affine", input, range, minimum, inner, bits)
    x, r, m = _contiguous(input, range, minimum)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _learned(fake_quantize_affine_kernel, (x, r, m), x, [y], r.numel(), inner, 0, (float((1 << bits) - 1),))
    return y


def fake_quantize_affine_backward(
    grad: Tensor, input: Tensor, range: Tensor, minimum: Tensor, inner: int, bits: int
) -> tuple[Tensor, ...]:  # fmt: skip
    if torch.float64 in (range.dtype, minimum.dtype, input.dtype, grad.dtype):
        return _references("fake_quantize_affine_backward", grad, input, range, minimum, inner, bits)
    g, x, r, m = _contiguous(grad, input, range, minimum)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros_like(r), torch.zeros_like(m)
    top = float((1 << bits) - 1)
    tensors = (g, x, r, m)
    sums, _ = _learned(fake_quantize_affine_backward_kernel, tensors, x, [dx], r.numel(), inner, 2, (top,))
    return dx, _gradient(sums[0], r, 1 / top), _gradient(sums[1], m, 1.0)


def _grouped(kernel: Any, tensors: tuple[Tensor, ...], out: Tensor, size: int, *numbers: Any, **options: Any) -> None:
    groups = out.numel() // size
    tile = _block(out, groups, size, WIDEST)
    down, across = tile.pop("down"), tile.pop("across")
    with torch.cuda.device_of(out):
        kernel[(triton.cdiv(groups, down),)](
            *tensors,
            out,
            groups,
            size,
            *numbers,
            BLOCK_R=down,
            BLOCK_K=across,
            enable_fp_fusion=False,
            **options,
            **tile,
        )


def fake_quantize_minmax(input: Tensor, bits: int, group_size: int) -> Tensor:
    (x,) = _contiguous(input)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _grouped(fake_quantize_minmax_kernel, (x,), y, group_size, float((1 << bits) - 1))
    return y


def fake_quantize_minmax_backward(grad: Tensor, input: Tensor, bits: int, group_size: int) -> Tensor:
    if torch.float64 in (input.dtype, grad.dtype):
        return _reference("fake_quantize_minmax_backward", grad, input, bits, group_size)
    g, x = _contiguous(grad, input)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _grouped(fake_quantize_minmax_backward_kernel, (g, x), dx, group_size, float((1 << bits) - 1))
    return dx


def fake_quantize_statsq(input: Tensor, bits: int) -> Tensor:
    (x,) = _contiguous(input)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _grouped(fake_quantize_statsq_kernel, (x,), y, x.shape[-1], float(1 << bits >> 1))
    return y


#: The magnitudes of the symmetric formats, by code.
LEVELS: dict[str, tuple[float, ...] | None] = {
    "int4": (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
    "e1m2": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "e3m0": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    "int4_asymmetric": None,
}


def fake_quantize_group_plan(*args: Any) -> str:
    """What :func:`fake_quantize_group` does with these arguments."""
    return "one program per group" if args[2] <= WIDEST else f"torch operators: groups of more than {WIDEST}"


def fake_quantize_group(
    input: Tensor, format: str, group_size: int, outliers: int, stochastic: bool, seed: int
) -> Tensor:  # fmt: skip
    if group_size > WIDEST:
        return _reference("fake_quantize_group", input, format, group_size, outliers, stochastic, seed)
    (x,) = _contiguous(input)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        low, high = seed & 0xFFFFFFFF, seed >> 32
        low = low - (1 << 32) if low >> 31 else low  # the same 32 bits, signed
        _grouped(
            fake_quantize_group_kernel, (x,), y, group_size, outliers, low, high, LEVELS=LEVELS[format],
            STOCHASTIC=stochastic, WHOLE_BLOCKS=group_size % 4 == 0,
        )  # fmt: skip
    return y
