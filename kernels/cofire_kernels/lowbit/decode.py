# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Decoding: codes out of rows of bits, values out of codes, weights out of values.

Tiles are decoded from the one layout that is saved. Each word of codes is loaded once: codes of 1, 2, 4 and 8 bits by
128 bits a thread, those of 3, 5, 6 and 7 bits as the words that 32 (or 16) of them fill exactly. Joining the fields of
a word puts them beside each other in registers, where they are needed in order, so nothing is repacked beforehand and
no second copy of the weight is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs

# ------------------------------------------------------------------------------------------------- tiles in words


@triton.jit
def word_field(words, BIT: tl.constexpr):
    """The 32 bits from ``BIT`` on of consecutive words, as far as there are any."""
    WORD: tl.constexpr = BIT // 32
    SHIFT: tl.constexpr = BIT % 32
    field = words[WORD]
    if SHIFT > 0:
        field = (field.to(tl.uint32, bitcast=True) >> SHIFT).to(tl.int32, bitcast=True)
        if len(words) > WORD + 1:
            field = field | (words[WORD + 1] << (32 - SHIFT))
    return field


@triton.jit
def join_fields(words, BITS: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """The codes FIRST, FIRST + STEP, ... of the words, COUNT of them, in order along the last dimension."""
    if COUNT == 1:
        fields = word_field(words, FIRST * BITS)
    else:
        even = join_fields(words, BITS, FIRST, 2 * STEP, COUNT // 2)
        odd = join_fields(words, BITS, FIRST + STEP, 2 * STEP, COUNT // 2)
        fields = tl.join(even, odd).reshape(even.shape[0], 2 * even.shape[1])
    return fields


@triton.jit
def tile_codes(codes_ptr, row, start, rows, row_units, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes of the rows ``row`` (int64) at the columns from ``start`` on, int32 ``[N, BLOCK_K]``; some number outside.

    ``codes_ptr`` are bytes or words, ``row_units`` of them in a row; ``start`` is a multiple of BLOCK_K.
    """
    place = codes_ptr + row[:, None] * row_units
    if BITS == 1 or BITS == 2 or BITS == 4 or BITS == 8:
        FIELDS: tl.constexpr = codes_ptr.dtype.element_ty.primitive_bitwidth // BITS
        unit = start // FIELDS + tl.arange(0, BLOCK_K // FIELDS)[None, :]
        q = tl.load(place + unit, mask=(row < rows)[:, None] & (unit < row_units), other=0)
        for level in tl.static_range(FIELDS.bit_length() - 1):  # the highest bit of a field's number comes first
            q = tl.join(q, q >> ((BITS * FIELDS) >> (level + 1))).reshape(q.shape[0], 2 * q.shape[1])
        q = q.to(tl.int32)
    else:
        UNIT: tl.constexpr = 16 if BITS == 6 else 32
        WORDS: tl.constexpr = UNIT * BITS // 32
        unit = (start // UNIT + tl.arange(0, BLOCK_K // UNIT)[None, :]) * WORDS
        words = ()
        for i in tl.static_range(WORDS):
            inside = (row < rows)[:, None] & (unit + i < row_units)
            words = words + (tl.load(place + unit + i, mask=inside, other=0),)  # type: ignore[assignment]  # noqa: RUF005
        q = join_fields(words, BITS, 0, 1, UNIT)
    return q & ((1 << BITS) - 1)


@triton.jit
def integers(q):
    """Codes as fp32. Below 2^23 an integer is the low bits of 2^23 plus itself: a conversion costs eight additions."""
    return (q | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def tile_values(
    codes_ptr, lut_ptr, row, start, rows, row_units, partition_rows, BITS: tl.constexpr, TABLES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """V(q) in fp32."""
    q = tile_codes(codes_ptr, row, start, rows, row_units, BITS, BLOCK_K)
    if lut_ptr is None:  # noqa: SIM108
        v = integers(q)
    else:
        v = look_up(lut_ptr, q, row, rows, partition_rows, BITS, TABLES).to(tl.float32)
    return v


@triton.jit
def look_up(lut_ptr, q, row, rows, partition_rows, BITS: tl.constexpr, TABLES: tl.constexpr):
    """Entries of the tables of the rows. One table for all rows is read from shared memory."""
    if TABLES == 1:
        table = tl.load(lut_ptr + tl.arange(0, 1 << BITS))
        v = tl.gather(table, q.reshape(q.shape[0] * q.shape[1]), 0).reshape(q.shape[0], q.shape[1])
    else:
        partition = tl.where(row < rows, row // partition_rows, 0)
        v = tl.load(lut_ptr + (partition * (1 << BITS))[:, None] + q)
    return v


@triton.jit
def tile_part(part_ptr, row, start, rows, groups, group, stride_row, stride_group, GROUPS: tl.constexpr):
    """Scales, zeros or offsets of a tile's groups, fp32 ``[N, GROUPS]``; 0 outside."""
    g = start // group + tl.arange(0, GROUPS)[None, :]
    inside = (row < rows)[:, None] & (g < groups)
    return tl.load(part_ptr + row[:, None] * stride_row + g * stride_group, mask=inside, other=0).to(tl.float32)


@triton.jit
def tile_weight(
    codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, row, start, rows, row_units, partition_rows, groups, group,
    zero_row, zero_group, BITS: tl.constexpr, TABLES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The weight in fp32 ``[N, BLOCK_K]``; some number outside. A tile has GROUPS groups, or lies within one.

    EXACT rounds as the reference does; otherwise a weight is one multiplication-addition away from its value.
    """
    v = tile_values(codes_ptr, lut_ptr, row, start, rows, row_units, partition_rows, BITS, TABLES, BLOCK_K)
    N: tl.constexpr = v.shape[0]
    v = v.reshape(N, GROUPS, BLOCK_K // GROUPS)
    if EXACT:
        if zero_ptr is not None:
            v -= tile_part(zero_ptr, row, start, rows, groups, group, zero_row, zero_group, GROUPS)[:, :, None]
        if scale_ptr is not None:
            v *= tile_part(scale_ptr, row, start, rows, groups, group, groups, 1, GROUPS)[:, :, None]
        if offset_ptr is not None:
            v += tile_part(offset_ptr, row, start, rows, groups, group, groups, 1, GROUPS)[:, :, None]
    else:
        scale, shift = tile_line(
            scale_ptr, zero_ptr, offset_ptr, row, start, rows, groups, group, zero_row, zero_group, GROUPS
        )
        v = v * scale[:, :, None] + shift[:, :, None]
    return v.reshape(N, BLOCK_K)


@triton.jit
def tile_line(
    scale_ptr, zero_ptr, offset_ptr, row, start, rows, groups, group, zero_row, zero_group, GROUPS: tl.constexpr
):  # fmt: skip
    """``W = V scale + shift``: both fp32 ``[N, GROUPS]``."""
    scale = tl.full([row.shape[0], GROUPS], 1.0, tl.float32)
    shift = tl.zeros([row.shape[0], GROUPS], tl.float32)
    if scale_ptr is not None:
        scale = tile_part(scale_ptr, row, start, rows, groups, group, groups, 1, GROUPS)
    if zero_ptr is not None:
        shift -= tile_part(zero_ptr, row, start, rows, groups, group, zero_row, zero_group, GROUPS) * scale
    if offset_ptr is not None:
        shift += tile_part(offset_ptr, row, start, rows, groups, group, groups, 1, GROUPS)
    return scale, shift


@triton.jit
def dequantize_kernel(
    codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, out_ptr, rows, columns, row_units, partition_rows, groups, group,
    zero_row, zero_group, BITS: tl.constexpr, TABLES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(0) * BLOCK_K
    w = tile_weight(
        codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, row, start, rows, row_units, partition_rows, groups, group,
        zero_row, zero_group, BITS, TABLES, GROUPS, BLOCK_K, True,
    )  # fmt: skip
    k = (start + tl.arange(0, BLOCK_K))[None, :]
    inside = (row < rows)[:, None] & (k < columns)
    tl.store(out_ptr + row[:, None] * columns + k, w.to(out_ptr.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------- any shape, one element at a time


@triton.jit
def element_codes(codes_ptr, row, k, inside, row_bytes, BITS: tl.constexpr):
    """Codes at ``row`` (int64 ``[N, 1]``) and ``k`` (``[1, K]``), int32; 0 outside."""
    bit = k * BITS
    byte = bit // 8
    word = tl.load(codes_ptr + row * row_bytes + byte, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may reach into the next byte
        more = inside & (byte + 1 < row_bytes)
        word |= tl.load(codes_ptr + row * row_bytes + byte + 1, mask=more, other=0).to(tl.int32) << 8
    return (word >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def dequantize_elements_kernel(
    codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, out_ptr, rows, columns, row_bytes, partition_rows, groups, group,
    zero_row, zero_group, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For every group size and alignment: each weight finds its own bits, scale, zero and offset."""
    row = (tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    k = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (row < rows) & (k < columns)
    q = element_codes(codes_ptr, row, k, inside, row_bytes, BITS)
    if lut_ptr is None:
        w = q.to(tl.float32)
    else:
        w = tl.load(lut_ptr + (row // partition_rows) * (1 << BITS) + q, mask=inside, other=0).to(tl.float32)
    g = k // group
    if zero_ptr is not None:
        w = w - tl.load(zero_ptr + row * zero_row + g * zero_group, mask=inside, other=0).to(tl.float32)
    if scale_ptr is not None:
        w = w * tl.load(scale_ptr + row * groups + g, mask=inside, other=0).to(tl.float32)
    if offset_ptr is not None:
        w = w + tl.load(offset_ptr + row * groups + g, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + row * columns + k, w.to(out_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------ launchers


@dataclass(frozen=True)
class Weight:
    """The tensors and numbers of a weight, as the kernels take them."""

    pointers: tuple[Tensor | None, ...]  #: codes (words where rows are whole words), scale, zero, offset, lut
    sizes: tuple[
        int, ...
    ]  #: elements of a row of codes, rows of a partition, groups, columns of a group, strides of zero
    rows: int
    columns: int
    bits: int
    group: int

    @property
    def device(self) -> torch.device:
        codes = self.pointers[0]
        assert codes is not None
        return codes.device

    @property
    def tiled(self) -> bool:
        return not tiles_refused(self.columns, self.bits, self.group)

    @property
    def tables(self) -> dict[str, int]:
        """Whether there are no tables, one for all rows, or several."""
        lut = self.pointers[4]
        return {"TABLES": 0 if lut is None else min(lut.shape[0], 2)}

    def block(self, widest: int) -> dict[str, int]:
        """The columns of a tile, at most ``widest``, and how many groups they are."""
        return block_of(self.columns, self.group, widest)


def block_of(columns: int, group: int, widest: int) -> dict[str, int]:
    part = group & -group  # the largest power of two that divides the group
    if group in (part, columns):
        groups = max(1, widest // group) if group < columns else 1
        return {"BLOCK_K": widest, "GROUPS": groups}
    return {"BLOCK_K": min(widest, part), "GROUPS": 1}


def tiles_refused(columns: int, bits: int, group: int) -> str:
    """Why no tile of whole words and whole groups (or a part of one) fits; empty where one does."""
    if bits not in (1, 2, 4, 8) and columns * bits % 32:
        return f"rows of {columns} codes of {bits} bits are no whole words"
    if group < columns and (group & -group) < (32 if group & (group - 1) else 16):
        return f"groups of {group} are no tiles"
    return ""


def weight_of(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bits: int, group_size: int, columns: int,
) -> Weight:  # fmt: skip
    rows, groups = codes.shape[0], columns // group_size
    partition_rows = rows if lut is None else -(-rows // lut.shape[0])
    zero_strides = (0, 0) if zero is None or zero.numel() == 1 != rows * groups else (groups, 1)
    rest = [None if t is None else t.contiguous() for t in (scale, zero, offset, lut)]
    codes = codes.contiguous()
    if codes.shape[1] % 4 == 0 and not tiles_refused(columns, bits, group_size):
        if codes.numel() == 0:  # counts as contiguous whatever its strides are, and may begin anywhere
            codes = torch.empty(codes.shape, dtype=codes.dtype, device=codes.device)
        elif codes.device.type != "meta" and codes.data_ptr() % 4:
            codes = codes.clone()
        codes = codes.view(torch.int32)
    sizes = (codes.shape[1], max(partition_rows, 1), groups, group_size, *zero_strides)
    return Weight((codes, *rest), sizes, rows, columns, bits, group_size)


def decoded(w: Weight, dtype: torch.dtype) -> Tensor:
    """The whole weight; in fp32 to the last bit as the reference has it."""
    device = w.device
    out = torch.empty((w.rows, w.columns), dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    tile: dict[str, Any] = dict(configs.tile("dequantize", device, columns=w.columns))
    kernel = dequantize_elements_kernel
    if w.tiled:
        kernel, tile = dequantize_kernel, tile | w.block(tile["BLOCK_K"]) | w.tables
    grid = (triton.cdiv(w.columns, tile["BLOCK_K"]), triton.cdiv(w.rows, tile["BLOCK_N"]))
    with torch.cuda.device_of(out):
        # Each operation is rounded by itself, as in the reference: no fused multiply-add.
        kernel[grid](*w.pointers, out, w.rows, w.columns, *w.sizes, BITS=w.bits, enable_fp_fusion=False, **tile)
    return out


def dequantize_plan(*args: Any) -> str:
    """What :func:`dequantize` does with these arguments."""
    bits, group, columns = args[5:8]
    if any(t is not None and t.dtype == torch.float64 for t in args[1:5]):
        return "torch operators: a part in fp64"
    why = tiles_refused(columns, bits, group)
    return f"finds each code by itself: {why}" if why else "decodes words of codes"


def dequantize(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bits: int, group_size: int, columns: int,
) -> Tensor:  # fmt: skip
    if any(t is not None and t.dtype == torch.float64 for t in (scale, zero, offset, lut)):
        wide: Tensor = torch.ops.cofire.dequantize.reference(codes, scale, zero, offset, lut, bits, group_size, columns)
        return wide
    return decoded(weight_of(codes, scale, zero, offset, lut, bits, group_size, columns), torch.float32)
