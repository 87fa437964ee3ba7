# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Swaps that lower a layer's squared error most."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.sparse_refine.rows import LANES, fold, pack_row, unpack_row

#: Longest row whose scores one program holds.
LONGEST_ROW = 4096
LEAST_GAIN = tl.constexpr(2.0**-30)  # (the value is that of cofire.ops.sparse_refine; a power of two in every format)


@triton.jit
def single(w, c, diagonal, kept, GOING: tl.constexpr):
    """How the error changes if a kept weight goes (or a pruned one comes back) alone; infinite for the others and for NaN."""
    change = w * (2 * c + w * diagonal) if GOING else w * (w * diagonal - 2 * c)
    return tl.where((kept != 0) == GOING, tl.where(change < float("inf"), change, float("inf")), float("inf"))


@triton.jit
def keys(score):
    """int64 in the order of the scores; -0 equals 0."""
    raw = tl.where(score == 0, 0.0, score).to(tl.int64, bitcast=True)
    return tl.where(raw < 0, raw ^ 0x7FFFFFFFFFFFFFFF, raw)


@triton.jit
def store_least(score, column, list_ptr, columns, candidates, LIST: tl.constexpr):
    """The columns of the least scores in ascending order, ties to the lower column; -1 behind them."""
    key = keys(score)
    low = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    if candidates < columns:  # the least key with so many below or at it, bit by bit from the sign
        low = tl.where(tl.sum((key < 0).to(tl.int32), 0) >= candidates, -0x8000000000000000, low - low)
        step = tl.full([], 0x4000000000000000, tl.int64)
        for _ in range(63):
            below = tl.sum((key < low + step).to(tl.int32), 0)
            low = tl.where(below >= candidates, low, low + step)
            step = step >> 1
    less = key < low
    equal = key == low
    room = candidates - tl.sum(less.to(tl.int32), 0)
    chosen = (less | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))) & (score < float("inf"))
    slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(list_ptr + tl.arange(0, LIST), -1)
    tl.debug_barrier()
    tl.store(list_ptr + slot, column, mask=chosen)
    tl.debug_barrier()


@triton.jit
def load_row(weight_ptr, c_ptr, diagonal_ptr, kept_ptr, column, inside):
    w = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float64)
    c = tl.load(c_ptr + column, mask=inside, other=0)
    diagonal = tl.load(diagonal_ptr + column, mask=inside, other=0).to(tl.float64)
    return w, c, diagonal, tl.load(kept_ptr + column, mask=inside, other=0)


@triton.jit
def best_pair(
    weight_ptr, gram_ptr, diagonal_ptr, c_ptr, kept_ptr, list_ptr, columns, candidates,
    BLOCK: tl.constexpr, LIST: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The pair of candidates that lowers the error most, and by how much (infinite: there is none)."""
    column = tl.arange(0, BLOCK)
    for coming in tl.static_range(2):  # loads again: so fewer values are held at once
        w, c, diagonal, kept = load_row(weight_ptr, c_ptr, diagonal_ptr, kept_ptr, column, column < columns)
        score = tl.where(column < columns, single(w, c, diagonal, kept, coming == 0), float("inf"))
        store_least(score, column, list_ptr + coming * LIST, columns, candidates, LIST)
    q = tl.load(list_ptr + LIST + tl.arange(0, LIST))
    wq, cq, dq, kq = load_row(weight_ptr, c_ptr, diagonal_ptr, kept_ptr, q, q >= 0)
    come = single(wq, cq, dq, kq, False)
    least = tl.full([], float("inf"), tl.float64)
    gone = 0
    grown = 0
    for first in range(0, LIST, PART):  # in parts that fit into registers
        p = tl.load(list_ptr + first + tl.arange(0, PART))
        wp, cp, dp, kp = load_row(weight_ptr, c_ptr, diagonal_ptr, kept_ptr, p, p >= 0)
        go = single(wp, cp, dp, kp, True)
        there = (p >= 0)[:, None] & (q >= 0)[None, :]
        g = tl.load(gram_ptr + p.to(tl.int64)[:, None] * columns + q[None, :], mask=there, other=0).to(tl.float64)
        change = (go[:, None] + come[None, :]) - ((2 * wp)[:, None] * wq[None, :]) * g
        change = tl.where(there & (change < float("inf")), change, float("inf"))
        best, place = tl.min(tl.reshape(change, (PART * LIST,)), 0, return_indices=True)
        gone = tl.where(best < least, tl.load(list_ptr + first + place // LIST), gone)
        grown = tl.where(best < least, tl.load(list_ptr + LIST + place % LIST), grown)
        least = tl.minimum(least, best)
    return least, gone, grown


@triton.jit
def best_pair_of_groups(
    weight_ptr, gram_ptr, diagonal_ptr, c_ptr, kept_ptr, columns,
    GROUP: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The same of all pairs within a group; ``GROUPS`` groups at once, each in a square of ``WIDE``."""
    least = tl.full([], float("inf"), tl.float64)
    gone = 0
    grown = 0
    for first in range(0, columns // GROUP, GROUPS):
        group = first + tl.arange(0, GROUPS)
        inner = tl.arange(0, WIDE)
        inside = (group < columns // GROUP)[:, None] & (inner < GROUP)[None, :]
        column = group[:, None] * GROUP + inner[None, :]
        w, c, diagonal, kept = load_row(weight_ptr, c_ptr, diagonal_ptr, kept_ptr, column, inside)
        go = tl.where(inside, single(w, c, diagonal, kept, True), float("inf"))
        come = tl.where(inside, single(w, c, diagonal, kept, False), float("inf"))
        there = (go < float("inf"))[:, :, None] & (come < float("inf"))[:, None, :]
        place = column.to(tl.int64)[:, :, None] * columns + column[:, None, :]
        g = tl.load(gram_ptr + place, mask=there, other=0).to(tl.float64)
        change = (go[:, :, None] + come[:, None, :]) - ((2 * w)[:, :, None] * w[:, None, :]) * g
        change = tl.where(there & (change < float("inf")), change, float("inf"))
        best, at = tl.min(tl.reshape(change, (GROUPS * WIDE * WIDE,)), 0, return_indices=True)
        block = first + at // (WIDE * WIDE)
        gone = tl.where(best < least, block * GROUP + at // WIDE % WIDE, gone)
        grown = tl.where(best < least, block * GROUP + at % WIDE, grown)
        least = tl.minimum(least, best)
    return least, gone, grown


@triton.jit
def move(weight_ptr, gram_ptr, c_ptr, p, q, end, columns):
    """c without what p held back, and with what q does."""
    wp, wq = tl.load(weight_ptr + p).to(tl.float64), tl.load(weight_ptr + q).to(tl.float64)
    for start in range(0, end, LANES):
        column = start + tl.arange(0, LANES)
        gp = tl.load(gram_ptr + p.to(tl.int64) * columns + column, mask=column < end, other=0).to(tl.float64)
        gq = tl.load(gram_ptr + q.to(tl.int64) * columns + column, mask=column < end, other=0).to(tl.float64)
        c = tl.load(c_ptr + column, mask=column < end, other=0)
        tl.store(c_ptr + column, (c + wp * gp) - wq * gq, mask=column < end)


@triton.jit
def gram_swap_kernel(
    weight_ptr, bits_ptr, gram_ptr, diagonal_ptr, c_ptr, kept_ptr, list_ptr, out_ptr, columns, max_swaps, candidates,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight_ptr += row * columns
    kept_ptr += row * columns
    c_ptr += row * columns
    list_ptr += row * 2 * LIST
    unpack_row(bits_ptr + row * ((columns + 7) // 8), kept_ptr, columns)

    lost = tl.zeros([LANES], tl.float64)
    for start in range(0, columns, LANES):
        column = start + tl.arange(0, LANES)
        w = tl.load(weight_ptr + column, mask=column < columns, other=0).to(tl.float64)
        c = tl.load(c_ptr + column, mask=column < columns, other=0)
        kept = tl.load(kept_ptr + column, mask=column < columns, other=1)
        lost += tl.where(kept != 0, 0.0, w * c)
    limit = -LEAST_GAIN * tl.abs(fold(lost))

    swaps = 0
    active = max_swaps > 0
    while active:
        if GROUP == 0:
            least, p, q = best_pair(
                weight_ptr, gram_ptr, diagonal_ptr, c_ptr, kept_ptr, list_ptr, columns, candidates, BLOCK, LIST, PART
            )
        else:
            least, p, q = best_pair_of_groups(
                weight_ptr, gram_ptr, diagonal_ptr, c_ptr, kept_ptr, columns, GROUP, WIDE, GROUPS
            )
        swap = least < limit
        tl.debug_barrier()
        move(weight_ptr, gram_ptr, c_ptr, p, q, tl.where(swap, columns, 0), columns)
        tl.store(kept_ptr + p, 0, mask=swap)
        tl.store(kept_ptr + q, 1, mask=swap)
        tl.debug_barrier()
        swaps += 1
        active = swap & (swaps < max_swaps)
    pack_row(kept_ptr, out_ptr + row * ((columns + 7) // 8), columns)


def gram_swap(
    weight: Tensor, bits: Tensor, gram: Tensor, correlation: Tensor, max_swaps: int, candidates: int, group: int
) -> Tensor:
    rows, columns = weight.shape
    if (columns > LONGEST_ROW and group == 0) or gram.dtype == torch.float64:
        found: Tensor = torch.ops.cofire.gram_swap.reference(
            weight, bits, gram, correlation, max_swaps, candidates, group
        )
        return found
    out = torch.empty_like(bits, memory_format=torch.contiguous_format)
    if weight.numel() == 0:
        return out
    candidates = min(candidates, columns)
    size, wide = triton.next_power_of_2(candidates), triton.next_power_of_2(max(group, 1))
    g = gram.float().contiguous()
    c = correlation.clone(memory_format=torch.contiguous_format)
    kept = torch.empty((rows, columns), dtype=torch.int8, device=weight.device)
    lists = torch.empty((rows, 2, size), dtype=torch.int32, device=weight.device)
    with torch.cuda.device_of(weight):
        tile = configs.tile("gram_swap", weight.device, columns=columns)
        gram_swap_kernel[(rows,)](
            weight.contiguous(), bits.contiguous(), g, g.diagonal().contiguous(), c, kept, lists, out, columns, max_swaps,
            candidates, GROUP=group, BLOCK=triton.next_power_of_2(columns), LIST=size,
            PART=min(size, 16), WIDE=wide, GROUPS=max(1, 2048 // wide**2), enable_fp_fusion=False, **tile,
        )  # fmt: skip
    return out
