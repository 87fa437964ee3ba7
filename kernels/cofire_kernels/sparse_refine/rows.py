# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""What both refiners do with a row: its sum in a fixed order, and its mask as bytes and as bits.

Kernels have the masks of the references, so everything is fp64, each operation rounded by itself (they are launched
without fusing products into sums).
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Partial sums of a row; also the columns that are looked at in one go.
LANES = tl.constexpr(1024)


@triton.jit
def fold(x):
    """Of 1024 values the second half is added to the first, until one is left."""
    for i in tl.static_range(10):
        x = tl.sum(tl.reshape(x, (2, 512 // (2**i))), 0)
    return tl.sum(x, 0)


@triton.jit
def unpack_row(bits_ptr, kept_ptr, columns):
    """Bits to bytes."""
    for start in range(0, columns, LANES):
        column = start + tl.arange(0, LANES)
        byte = tl.load(bits_ptr + column // 8, mask=column < columns, other=0).to(tl.int32)
        tl.store(kept_ptr + column, ((byte >> (column % 8)) & 1).to(tl.int8), mask=column < columns)
    tl.debug_barrier()


@triton.jit
def pack_row(kept_ptr, bits_ptr, columns):
    """Bytes, of which the lowest bit counts, to bits."""
    tl.debug_barrier()
    for start in range(0, (columns + 7) // 8, LANES // 8):
        byte = start + tl.arange(0, LANES // 8)
        column = 8 * byte[:, None] + tl.arange(0, 8)[None, :]
        kept = tl.load(kept_ptr + column, mask=column < columns, other=0).to(tl.int32) & 1
        value = tl.sum(kept << tl.arange(0, 8)[None, :], 1)
        tl.store(bits_ptr + byte, value.to(tl.uint8), mask=byte < (columns + 7) // 8)
