# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Positions of the set entries of each row: one program per row, one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs


@triton.jit
def store_compact(index_ptr, set_, column, inside, columns, found):
    """Write one block of a row's compaction and return the new number of set entries.

    ``found`` set entries lie to the left of the block. The r-th set entry goes to slot r, the r-th unset one puts its
    -1 into the r-th slot from the end: together they fill the row exactly, before the total count is known.
    """
    one = (set_ & inside).to(tl.int32)
    before = found + tl.cumsum(one, 0) - one
    slot = tl.where(set_, before, columns - 1 - (column - before))
    tl.store(index_ptr + slot, tl.where(set_, column, -1), mask=inside)
    return found + tl.sum(one, 0)


@triton.jit
def compact_forward_kernel(mask_ptr, index_ptr, count_ptr, columns, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found = tl.sum(tl.zeros([BLOCK_C], tl.int32), 0)
    for start in range(0, columns, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = column < columns
        set_ = tl.load(mask_ptr + row * columns + column, mask=inside, other=0) != 0
        found = store_compact(index_ptr + row * columns, set_, column, inside, columns, found)
    tl.store(count_ptr + row, found)


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = mask.shape
    mask = mask.contiguous()
    index = torch.empty((rows, columns), dtype=torch.int32, device=mask.device)
    count = torch.empty((rows,), dtype=torch.int32, device=mask.device)
    if mask.numel() == 0:
        return index, count.zero_()
    with torch.cuda.device_of(mask):
        tile = configs.tile("compact", mask.device, columns=columns)
        compact_forward_kernel[(rows,)](mask, index, count, columns, **tile)
    return index, count
