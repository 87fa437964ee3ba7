# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Packed masks: packing, unpacking, transposing, counting. A program's tile is so many bytes of bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs


@triton.jit
def bytes_of_bits(set_, BYTES: tl.constexpr):
    """uint8 ``[BYTES]`` of ``[8 * BYTES]`` zeros and ones, the first in the lowest bit."""
    eight = tl.reshape(set_.to(tl.int32), [BYTES, 8])
    return tl.sum(eight << tl.arange(0, 8)[None, :], 1).to(tl.uint8)


@triton.jit
def pack_mask_kernel(mask_ptr, bits_ptr, columns, width, blocks, BYTES: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    column = block * (8 * BYTES) + tl.arange(0, 8 * BYTES)
    set_ = tl.load(mask_ptr + row * columns + column, mask=column < columns, other=0) != 0
    byte = block * BYTES + tl.arange(0, BYTES)
    tl.store(bits_ptr + row * width + byte, bytes_of_bits(set_, BYTES), mask=byte < width)


@triton.jit
def unpack_mask_kernel(bits_ptr, mask_ptr, columns, width, blocks, BYTES: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    column = block * (8 * BYTES) + tl.arange(0, 8 * BYTES)
    inside = column < columns
    byte = tl.load(bits_ptr + row * width + column // 8, mask=inside, other=0).to(tl.int32)
    tl.store(mask_ptr + row * columns + column, ((byte >> (column % 8)) & 1).to(tl.uint8), mask=inside)


@triton.jit
def transpose_mask_kernel(bits_ptr, out_ptr, rows, columns, width, height, blocks, BYTES: tl.constexpr):
    """Eight columns, that is one byte of each row, and 8 * BYTES rows."""
    across = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    row = (block * (8 * BYTES) + tl.arange(0, 8 * BYTES)).to(tl.int64)
    byte = tl.load(bits_ptr + row * width + across, mask=row < rows, other=0).to(tl.int32)
    out = block * BYTES + tl.arange(0, BYTES)
    for bit in tl.static_range(8):
        column = across * 8 + bit
        turned = bytes_of_bits((byte >> bit) & 1, BYTES)
        tl.store(out_ptr + column * height + out, turned, mask=(out < height) & (column < columns))


@triton.jit
def count_bits_kernel(bits_ptr, count_ptr, width, BYTES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BYTES], tl.int32)
    for start in range(0, width, BYTES):
        byte = start + tl.arange(0, BYTES)
        b = tl.load(bits_ptr + row * width + byte, mask=byte < width, other=0).to(tl.int32)
        b = b - ((b >> 1) & 0x55)
        b = (b & 0x33) + ((b >> 2) & 0x33)
        total += (b + (b >> 4)) & 0x0F
    tl.store(count_ptr + row, tl.sum(total, 0).to(tl.int64))


def _tile(device: torch.device, width: int) -> dict[str, int]:
    return configs.tile("packed_mask", device, bytes=width)


def pack_mask(mask: Tensor) -> Tensor:
    rows, columns = mask.shape
    width = (columns + 7) // 8
    bits = torch.empty((rows, width), dtype=torch.uint8, device=mask.device)
    if bits.numel():
        one_byte = mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0
        one_byte = one_byte.contiguous().view(torch.uint8)
        tile = _tile(mask.device, width)
        blocks = triton.cdiv(width, tile["BYTES"])
        with torch.cuda.device_of(mask):
            pack_mask_kernel[(rows * blocks,)](one_byte, bits, columns, width, blocks, **tile)
    return bits


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    rows, width = bits.shape
    mask = torch.empty((rows, columns), dtype=torch.bool, device=bits.device)
    if mask.numel():
        tile = _tile(bits.device, width)
        blocks = triton.cdiv(width, tile["BYTES"])
        with torch.cuda.device_of(bits):
            unpack_mask_kernel[(rows * blocks,)](
                bits.contiguous(), mask.view(torch.uint8), columns, width, blocks, **tile
            )
    return mask


def transpose_mask(bits: Tensor, columns: int) -> Tensor:
    rows, width = bits.shape
    height = (rows + 7) // 8
    out = torch.empty((columns, height), dtype=torch.uint8, device=bits.device)
    if out.numel():
        tile = _tile(bits.device, height)
        blocks = triton.cdiv(height, tile["BYTES"])
        with torch.cuda.device_of(bits):
            transpose_mask_kernel[(width * blocks,)](
                bits.contiguous(), out, rows, columns, width, height, blocks, **tile
            )
    return out


def mask_offsets(bits: Tensor) -> Tensor:
    rows, width = bits.shape
    offsets = torch.zeros((rows + 1,), dtype=torch.int64, device=bits.device)
    if bits.numel():
        with torch.cuda.device_of(bits):
            count_bits_kernel[(rows,)](bits.contiguous(), offsets[1:], width, **_tile(bits.device, width))
    return offsets.cumsum(0)
