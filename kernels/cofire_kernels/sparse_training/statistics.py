# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Statistics of activations by feature, and of groups of weights, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.numerics import maximum

#: Smaller groups are left to torch: a program for each would do nothing else than start.
SMALLEST_GROUP = 256


@triton.jit
def activation_statistics_kernel(
    x_ptr, mean_ptr, deviation_ptr, largest_ptr, rows, columns, column_blocks,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows: mean, squared deviations from it and largest magnitude of each column."""
    piece, block = (tl.program_id(0) // column_blocks).to(tl.int64), tl.program_id(0) % column_blocks
    row, column = piece * BLOCK_R + tl.arange(0, BLOCK_R), block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0).to(tl.float32)
    count = tl.minimum(rows - piece * BLOCK_R, BLOCK_R).to(tl.float32)
    mean = tl.sum(x, 0) / count
    apart = tl.where(inside, x - mean[None, :], 0.0)
    largest = tl.reduce(tl.abs(x), 0, maximum)
    at = piece * columns + column
    tl.store(mean_ptr + at, mean, mask=column < columns)
    tl.store(deviation_ptr + at, tl.sum(apart * apart, 0), mask=column < columns)
    tl.store(largest_ptr + at, largest, mask=column < columns)


def activation_statistics(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    columns = input.shape[-1]
    rows = input.numel() // columns if columns else 0
    x = input.contiguous()
    if rows == 0:
        first, second, third = (torch.zeros(columns, dtype=torch.float32, device=x.device) for _ in range(3))
        return first, second, third
    with torch.cuda.device_of(x):
        tile = configs.tile("activation_statistics", x.device, columns=columns)
        pieces, blocks = triton.cdiv(rows, tile["BLOCK_R"]), triton.cdiv(columns, tile["BLOCK_C"])
        mean, deviation, largest = (
            torch.empty((pieces, columns), dtype=torch.float32, device=x.device) for _ in range(3)
        )
        activation_statistics_kernel[(pieces * blocks,)](x, mean, deviation, largest, rows, columns, blocks, **tile)
    # merged in fp64, as Chan et al. do for any number of sets
    counts = torch.full((pieces, 1), float(tile["BLOCK_R"]), dtype=torch.float64, device=x.device)
    counts[-1] = rows - (pieces - 1) * tile["BLOCK_R"]
    means = mean.double()
    whole = (means * counts).sum(0) / rows
    deviations = deviation.double().sum(0) + (counts * (means - whole).square()).sum(0)
    return whole.float(), deviations.float(), largest.amax(0)


@triton.jit
def group_statistics_kernel(
    w_ptr, g_ptr, ww_ptr, gg_ptr, wg_ptr, columns, across, block_rows, block_columns,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program for each group, tile after tile."""
    group = tl.program_id(0).to(tl.int64)
    top, left = (group // across) * block_rows, (group % across) * block_columns
    ww = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    gg, wg = tl.zeros_like(ww), tl.zeros_like(ww)
    for r in range(0, block_rows, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        for c in range(0, block_columns, BLOCK_C):
            column = c + tl.arange(0, BLOCK_C)
            inside = (row < block_rows)[:, None] & (column < block_columns)[None, :]
            at = (top + row)[:, None] * columns + (left + column)[None, :]
            w = tl.load(w_ptr + at, mask=inside, other=0).to(tl.float32)
            g = tl.load(g_ptr + at, mask=inside, other=0).to(tl.float32)
            ww += w * w
            gg += g * g
            wg += w * g
    tl.store(ww_ptr + group, tl.sum(tl.sum(ww, 1), 0))
    tl.store(gg_ptr + group, tl.sum(tl.sum(gg, 1), 0))
    tl.store(wg_ptr + group, tl.sum(tl.sum(wg, 1), 0))


def group_statistics_plan(weight: Tensor, grad: Tensor, block_rows: int, block_columns: int) -> str:
    if block_rows * block_columns < SMALLEST_GROUP:
        return f"torch operators: groups of less than {SMALLEST_GROUP} entries"
    return "one program per group"


def group_statistics(
    weight: Tensor, grad: Tensor, block_rows: int, block_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    down, across = weight.shape[0] // block_rows, weight.shape[1] // block_columns
    w, g = weight.contiguous(), grad.contiguous()
    if block_rows * block_columns < SMALLEST_GROUP:
        w, g = (x.float().view(down, block_rows, across, block_columns) for x in (w, g))
        return w.square().sum((1, 3)), g.square().sum((1, 3)), (w * g).sum((1, 3))
    ww, gg, wg = (torch.empty((down, across), dtype=torch.float32, device=w.device) for _ in range(3))
    if w.numel():
        with torch.cuda.device_of(w):
            tile = configs.tile("group_statistics", w.device, rows=block_rows, columns=block_columns)
            group_statistics_kernel[(down * across,)](
                w, g, ww, gg, wg, weight.shape[1], across, block_rows, block_columns, **tile
            )
    return ww, gg, wg
