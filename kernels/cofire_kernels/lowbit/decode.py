# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Decoding: codes out of rows of bits, values out of codes, weights out of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs


@triton.jit
def load_codes(codes_ptr, row, k, inside, row_bytes, BITS: tl.constexpr):
    """Codes at ``row`` (int64 ``[N, 1]``) and ``k`` (``[1, K]``), int32; 0 outside."""
    bit = k * BITS
    byte = bit // 8
    word = tl.load(codes_ptr + row * row_bytes + byte, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may reach into the next byte
        more = inside & (byte + 1 < row_bytes)
        word |= tl.load(codes_ptr + row * row_bytes + byte + 1, mask=more, other=0).to(tl.int32) << 8
    return (word >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def load_values(codes_ptr, lut_ptr, row, k, inside, row_bytes, partition_rows, BITS: tl.constexpr):
    """V(q) in fp32."""
    q = load_codes(codes_ptr, row, k, inside, row_bytes, BITS)
    if lut_ptr is None:
        return q.to(tl.float32)
    return tl.load(lut_ptr + (row // partition_rows) * (1 << BITS) + q, mask=inside, other=0).to(tl.float32)


@triton.jit
def load_weight(
    codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, row, k, inside, row_bytes, partition_rows, groups, group,
    zero_row, zero_group, BITS: tl.constexpr,
):  # fmt: skip
    """The weight in fp32; 0 outside."""
    w = load_values(codes_ptr, lut_ptr, row, k, inside, row_bytes, partition_rows, BITS)
    g = k // group
    if zero_ptr is not None:
        w = w - tl.load(zero_ptr + row * zero_row + g * zero_group, mask=inside, other=0).to(tl.float32)
    if scale_ptr is not None:
        w = w * tl.load(scale_ptr + row * groups + g, mask=inside, other=0).to(tl.float32)
    if offset_ptr is not None:
        w = w + tl.load(offset_ptr + row * groups + g, mask=inside, other=0).to(tl.float32)
    return tl.where(inside, w, 0.0)


@triton.jit
def dequantize_kernel(
    codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, out_ptr, rows, columns, row_bytes, partition_rows, groups, group,
    zero_row, zero_group, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    k = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (row < rows) & (k < columns)
    w = load_weight(
        codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, row, k, inside, row_bytes, partition_rows, groups, group,
        zero_row, zero_group, BITS,
    )  # fmt: skip
    tl.store(out_ptr + row * columns + k, w, mask=inside)


@dataclass(frozen=True)
class Weight:
    """The tensors and numbers of a weight, as the kernels take them."""

    pointers: tuple[Tensor | None, ...]  #: codes, scale, zero, offset, lut
    sizes: tuple[int, ...]  #: bytes of a row, rows of a partition, groups, columns of a group, strides of zero
    rows: int
    columns: int
    bits: int
    group: int


def weight_of(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bits: int, group_size: int, columns: int,
) -> Weight:  # fmt: skip
    rows, groups = codes.shape[0], columns // group_size
    partition_rows = rows if lut is None else -(-rows // lut.shape[0])
    zero_strides = (0, 0) if zero is None or zero.numel() == 1 != rows * groups else (groups, 1)
    dense = tuple(None if t is None else t.contiguous() for t in (codes, scale, zero, offset, lut))
    sizes = (codes.shape[1], max(partition_rows, 1), groups, group_size, *zero_strides)
    return Weight(dense, sizes, rows, columns, bits, group_size)


def dequantize(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bits: int, group_size: int, columns: int,
) -> Tensor:  # fmt: skip
    w = weight_of(codes, scale, zero, offset, lut, bits, group_size, columns)
    out = torch.empty((w.rows, columns), dtype=torch.float32, device=codes.device)
    if out.numel() == 0:
        return out
    tile: dict[str, Any] = configs.tile("dequantize", codes.device, columns=columns)
    grid = (triton.cdiv(columns, tile["BLOCK_K"]), triton.cdiv(w.rows, tile["BLOCK_N"]))
    with torch.cuda.device_of(codes):
        # Each operation is rounded by itself, as in the reference: no fused multiply-add.
        dequantize_kernel[grid](*w.pointers, out, w.rows, columns, *w.sizes, BITS=bits, enable_fp_fusion=False, **tile)
    return out
