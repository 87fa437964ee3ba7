# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Swaps that bring the mean of a layer's output nearer to the dense layer's. A row's weights are read again for each swap,
which is seldom more than ten times; they come from a cache."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.sparse_refine.rows import LANES, fold, pack_row, unpack_row

#: States of a weight that has moved; before that it is 1 if it is kept and 0 if not.
GROWN, GONE = tl.constexpr(3), tl.constexpr(2)


@triton.jit
def shares(weight_ptr, mean_ptr, column, columns):
    """The weights of some columns, and what they add to the mean of the output."""
    w = tl.load(weight_ptr + column, mask=column < columns, other=0).to(tl.float64)
    return w, w * tl.load(mean_ptr + column, mask=column < columns, other=0)


@triton.jit
def dsnot_swap_kernel(
    weight_ptr, bits_ptr, mean_ptr, norm_ptr, growth_ptr, numbers_ptr, kept_ptr, out_ptr, columns, max_swaps,
    OFFICIAL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight_ptr += row * columns
    kept_ptr += row * columns
    unpack_row(bits_ptr + row * ((columns + 7) // 8), kept_ptr, columns)

    lost = tl.zeros([LANES], tl.float64)
    size = tl.zeros([LANES], tl.float64)
    for start in range(0, columns, LANES):
        column = start + tl.arange(0, LANES)
        w, share = shares(weight_ptr, mean_ptr, column, columns)
        kept = tl.load(kept_ptr + column, mask=column < columns, other=1) != 0
        lost += tl.where(kept, 0.0, share)
        size += tl.abs(share)
    error = fold(lost)
    limit = tl.load(numbers_ptr)
    if not OFFICIAL:
        limit = limit * fold(size) / tl.load(numbers_ptr + 1)
    first = error
    swaps = 0
    active = tl.abs(error) > limit
    while active:
        sign = tl.where(error > 0, 1.0, -1.0).to(tl.float64)
        most = tl.full([], float("-inf"), tl.float64)
        least = tl.full([], float("inf"), tl.float64)
        grown = 0
        gone = 0
        for start in range(0, columns, LANES):
            column = start + tl.arange(0, LANES)
            w, share = shares(weight_ptr, mean_ptr, column, columns)
            state = tl.load(kept_ptr + column, mask=column < columns, other=2)
            growth = tl.load(growth_ptr + column, mask=column < columns, other=0)
            gain = share * growth
            may = (state == 0) & (growth > 0) & (tl.abs(gain) < float("inf"))
            best, place = tl.max(tl.where(may, sign * gain, float("-inf")), 0, return_indices=True)
            grown = tl.where(best > most, start + place, grown)
            most = tl.maximum(most, best)
            if GROUP == 0:
                metric = tl.abs(w) * tl.load(norm_ptr + column, mask=column < columns, other=0)
                may = (state == 1) & (sign * share < 0) & (metric < float("inf"))
                best, place = tl.min(tl.where(may, metric, float("inf")), 0, return_indices=True)
                gone = tl.where(best < least, start + place, gone)
                least = tl.minimum(least, best)
        if GROUP > 0:
            column = grown // GROUP * GROUP + tl.arange(0, triton.next_power_of_2(GROUP))
            inside = column < grown // GROUP * GROUP + GROUP
            w = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float64)
            metric = tl.abs(w) * tl.load(norm_ptr + column, mask=inside, other=0)
            may = (tl.load(kept_ptr + column, mask=inside, other=2) == 1) & (metric < float("inf"))
            least, place = tl.min(tl.where(may, metric, float("inf")), 0, return_indices=True)
            gone = grown // GROUP * GROUP + place
        coming = tl.load(weight_ptr + grown).to(tl.float64) * tl.load(mean_ptr + grown)
        going = tl.load(weight_ptr + gone).to(tl.float64) * tl.load(mean_ptr + gone)
        changed = (error + going) - coming
        swap = (most > float("-inf")) & (least < float("inf"))
        if not OFFICIAL:
            swap = swap & (tl.abs(changed) < tl.abs(error))
        elif GROUP > 0:
            swap = swap & (((changed > 0) & (first > 0)) | ((changed < 0) & (first < 0)))
        tl.debug_barrier()
        tl.store(kept_ptr + grown, GROWN, mask=swap)
        tl.store(kept_ptr + gone, GONE, mask=swap)
        tl.debug_barrier()
        error = tl.where(swap, changed, error)
        swaps += 1
        active = swap & (tl.abs(error) > limit) & (swaps < max_swaps)
    pack_row(kept_ptr, out_ptr + row * ((columns + 7) // 8), columns)


def dsnot_swap(
    weight: Tensor, bits: Tensor, mean: Tensor, norm: Tensor, growth: Tensor,
    max_swaps: int, threshold: float, official: bool, group: int,
) -> Tensor:  # fmt: skip
    rows, columns = weight.shape
    out = torch.empty_like(bits, memory_format=torch.contiguous_format)
    if weight.numel() == 0:
        return out
    if max_swaps == 0:
        max_swaps, threshold, official = 1, math.inf, True
    vectors = [v.to(torch.float64).contiguous() for v in (mean, norm, growth)]
    numbers = torch.tensor([threshold, math.sqrt(columns)], dtype=torch.float64, device=weight.device)
    kept = torch.empty((rows, columns), dtype=torch.int8, device=weight.device)
    with torch.cuda.device_of(weight):
        tile = configs.tile("dsnot_swap", weight.device, columns=columns)
        dsnot_swap_kernel[(rows,)](
            weight.contiguous(), bits.contiguous(), *vectors, numbers, kept, out, columns, min(max_swaps, columns),
            OFFICIAL=official, GROUP=group, enable_fp_fusion=False, **tile,
        )  # fmt: skip
    return out
