# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""The inverse of compact: for each column, its slot in the row's index, or -1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs


@triton.jit
def positions_forward_kernel(index_ptr, count_ptr, slot_ptr, columns, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    for start in range(0, columns, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        tl.store(slot_ptr + row * columns + column, -1, mask=column < columns)
    tl.debug_barrier()  # other threads of this program overwrite some of the -1
    for start in range(0, count, BLOCK_C):
        slot = start + tl.arange(0, BLOCK_C)
        used = slot < count
        column = tl.load(index_ptr + row * columns + slot, mask=used, other=0)
        tl.store(slot_ptr + row * columns + column, slot, mask=used)


def positions(index: Tensor, count: Tensor) -> Tensor:
    """int32, shape of ``index``: the j with ``index[row, j] == column``, or -1 where the column is not selected."""
    rows, columns = index.shape
    slot = torch.empty((rows, columns), dtype=torch.int32, device=index.device)
    if slot.numel():
        with torch.cuda.device_of(index):
            tile = configs.tile("compact", index.device, columns=columns)
            positions_forward_kernel[(rows,)](index.contiguous(), count.contiguous(), slot, columns, **tile)
    return slot
