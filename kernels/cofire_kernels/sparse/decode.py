# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Compressed weights back to dense ones, for the library's product.

Tensor cores multiply dense tiles so fast that, below about 98 % of zeros, no product that skips single weights catches
up with them once there are more than some tens of rows: there a compressed weight saves memory, and no time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs

PANEL = 16  # rows of a panel of a bitmap


@triton.jit
def stored(v, out_ptr):
    """``v`` in the type of ``out``; int8 by way of fp32, since the interpreter holds bf16 as integers."""
    if v.dtype == tl.int8:
        v = v.to(tl.float32)
    return v.to(out_ptr.dtype.element_ty)


@triton.jit
def decode_rows_kernel(values_ptr, index_ptr, offsets_ptr, out_ptr, columns, DELTA: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its values to their columns, or (DELTA) to the sums of the distances; the others are zero already."""
    row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    before = tl.sum(tl.zeros([BLOCK], tl.int32), 0)
    for start in range(0, (last - first).to(tl.int32), BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < last - first
        column = tl.load(index_ptr + first + i, mask=inside, other=0).to(tl.int32)
        if index_ptr.dtype.element_ty == tl.int16:
            column = column & 0xFFFF
        if DELTA:
            total = tl.sum(column, 0)
            column = before + tl.cumsum(column, 0)
            before += total
        v = tl.load(values_ptr + first + i, mask=inside, other=0)
        tl.store(out_ptr + row * columns + column, stored(v, out_ptr), mask=inside)


@triton.jit
def decode_bitmap_kernel(
    values_ptr, index_ptr, offsets_ptr, out_ptr, rows, columns, BLOCK: tl.constexpr, PANEL: tl.constexpr
):  # fmt: skip
    """One panel: its values stand by column, then by row."""
    panel = tl.program_id(0).to(tl.int64)
    found = tl.load(offsets_ptr + panel)
    r = tl.arange(0, PANEL)
    row = panel * PANEL + r
    for start in range(0, columns, BLOCK):
        k = start + tl.arange(0, BLOCK)
        word = tl.load(index_ptr + panel * columns + k, mask=k < columns, other=0).to(tl.int32)
        kept = (word[None, :] >> r[:, None]) & 1
        count = tl.sum(kept, 0)
        place = (tl.cumsum(count, 0) - count)[None, :] + tl.cumsum(kept, 0) - kept
        v = tl.load(values_ptr + found + place, mask=kept != 0, other=0)
        inside = (row < rows)[:, None] & (k < columns)[None, :]
        tl.store(out_ptr + row[:, None] * columns + k[None, :], stored(v, out_ptr), mask=inside)
        found += tl.sum(count, 0)


def rows_of_entries(index: Tensor, offsets: Tensor) -> Tensor:
    """The row (or row of blocks) of each entry, int64."""
    entry = torch.arange(index.shape[0], device=index.device)
    return torch.searchsorted(offsets, entry, right=True) - 1


def dense(
    values: Tensor, index: Tensor, offsets: Tensor, format: str, rows: int, columns: int, block_rows: int,
    block_columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The stored values at their places in ``[rows, columns]``, without the scale."""
    values, index, offsets = values.contiguous(), index.contiguous(), offsets.contiguous()
    if format == "block":  # whole blocks move: torch operators
        grid = (-(-rows // block_rows), -(-columns // block_columns))
        tiles = torch.zeros((*grid, block_rows, block_columns), dtype=dtype, device=values.device)
        tiles[rows_of_entries(index, offsets), index.long()] = values.to(dtype).transpose(1, 2)
        whole = tiles.transpose(1, 2).reshape(grid[0] * block_rows, grid[1] * block_columns)
        return whole[:rows, :columns].contiguous()
    out = torch.zeros((rows, columns), dtype=dtype, device=values.device)
    if out.numel() == 0 or values.numel() == 0:
        return out
    if index.dtype == torch.uint16:
        index = index.view(torch.int16)
    tile = configs.tile("decode_sparse", values.device, columns=columns)
    with torch.cuda.device_of(values):
        if format == "bitmap":
            decode_bitmap_kernel[(offsets.shape[0] - 1,)](
                values, index, offsets, out, rows, columns, PANEL=PANEL, **tile
            )
        else:
            decode_rows_kernel[(rows,)](values, index, offsets, out, columns, DELTA=format == "delta", **tile)
    return out
