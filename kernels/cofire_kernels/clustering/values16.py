# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Tables over the 65,536 values of a 16-bit type: how often each occurs, what belongs to each, and the way back.

A partition is a run of ``group`` consecutive elements and has a row of its own in every table; the operators have one
partition. The 16 bits of an element, reordered by value, are its column (its bin).

Counts are added by integer atomics, whose result does not depend on their order. Sums of floats are too: each term is
rounded to a multiple of 2^-q and added as a 64-bit integer, where q is the largest (even) number for which no sum of a
partition can overflow. Of N terms each is then kept to within N max|source| 2^-60: more than fp32 sums keep. What is
left of fp64 terms goes to a second integer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs

BINS = 65536
TABLE = tl.constexpr(BINS)  # columns of a table, as kernels read it


@triton.jit
def load_bin(input_ptr, element, inside):
    """The bins of elements whose patterns are stored as int16."""
    bits = tl.load(input_ptr + element, mask=inside, other=0).to(tl.int32) & 0xFFFF
    return tl.where(bits >= 32768, bits ^ 0xFFFF, bits ^ 0x8000)


@triton.jit
def histogram16_kernel(input_ptr, counts_ptr, group, total, BLOCK: tl.constexpr):
    """Every element is one atomic addition to a table that stays in the second-level cache.

    Weights are bell-shaped: several thousand bins are in use and the fullest holds a fraction of a percent, so
    additions to one address follow each other rarely. A tensor of one value is the worst case.
    """
    partition = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < group) & (partition * group + column < total)
    bin = load_bin(input_ptr, partition * group + column, inside)
    tl.atomic_add(counts_ptr + partition * TABLE + bin, 1, mask=inside, sem="relaxed")


@triton.jit
def is_finite(x):
    return (x == x) & (tl.abs(x) != float("inf"))


@triton.jit
def scatter16_largest_kernel(source_ptr, largest_ptr, group, total, BLOCK: tl.constexpr):
    """The largest finite magnitude of each partition: the bits of floats that are not negative are in their order."""
    partition = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < group) & (partition * group + column < total)
    source = tl.load(source_ptr + partition * group + column, mask=inside, other=0).to(tl.float64)
    largest = tl.max(tl.where(is_finite(source), tl.abs(source), 0.0), 0)
    tl.atomic_max(largest_ptr + partition, largest.to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def half_scale(largest, sign, group_bits):
    """2^(q/2) for sign 1 and 2^(-q/2) for sign -1, where ``2^(q + group_bits) largest < 2^62`` and q is even.

    Half of the exponent, because the whole may exceed what fp64 can hold. Of the lowest numbers the exponent field is
    0, which is still an upper bound.
    """
    exponent = (largest >> 52) - 1022  # largest < 2^exponent
    half = (62 - group_bits - exponent) >> 1
    return ((sign * half + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def scatter16_add_kernel(
    input_ptr,
    source_ptr,
    largest_ptr,
    sums_ptr,
    remainders_ptr,
    special_ptr,
    group,
    total,
    group_bits,
    REMAINDERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    partition = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < group) & (partition * group + column < total)
    bin = partition * TABLE + load_bin(input_ptr, partition * group + column, inside)
    source = tl.load(source_ptr + partition * group + column, mask=inside, other=0).to(tl.float64)

    finite = is_finite(source)
    kind = tl.where(source != source, 4, tl.where(source > 0, 1, 2))
    tl.atomic_or(special_ptr + bin, kind, mask=inside & (finite == 0), sem="relaxed")

    scale = half_scale(tl.load(largest_ptr + partition), 1, group_bits)
    scaled = tl.where(finite, source, 0.0) * scale * scale
    whole = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int64)
    tl.atomic_add(sums_ptr + bin, whole, mask=inside, sem="relaxed")
    if REMAINDERS:
        rest = (
            scaled - whole.to(tl.float64)
        ) * 2147483648.0  # 2^31 of at most 1/2 each: fewer than 2^31 cannot overflow
        tl.atomic_add(remainders_ptr + bin, rest.to(tl.int64), mask=inside, sem="relaxed")


@triton.jit
def scatter16_finish_kernel(
    largest_ptr,
    sums_ptr,
    remainders_ptr,
    special_ptr,
    out_ptr,
    group_bits,
    REMAINDERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Integers back to floats. Infinity and NaN, which no integer holds, were noted apart."""
    partition = tl.program_id(1).to(tl.int64)
    place = partition * TABLE + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = half_scale(tl.load(largest_ptr + partition), -1, group_bits)
    value = tl.load(sums_ptr + place).to(tl.float64)
    if REMAINDERS:
        value += tl.load(remainders_ptr + place).to(tl.float64) * 4.656612873077393e-10  # 2^-31
    value = value * scale * scale
    special = tl.load(special_ptr + place)
    value = tl.where(special == 1, float("inf"), tl.where(special == 2, float("-inf"), value))
    value = tl.where(special >= 3, float("nan"), value)
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty))


@triton.jit
def lut_apply16_kernel(
    input_ptr,
    table_ptr,
    source_ptr,
    slope_ptr,
    out_ptr,
    group,
    total,
    SOURCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``table[bin]``, or ``table[bin] + slope[bin] source``. The rows in use of a table fit the second-level cache."""
    partition = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < group) & (partition * group + column < total)
    bin = partition * TABLE + load_bin(input_ptr, partition * group + column, inside)
    value = tl.load(table_ptr + bin, mask=inside, other=0).to(COMPUTE)
    if SOURCE:
        source = tl.load(source_ptr + partition * group + column, mask=inside, other=0).to(COMPUTE)
        value += tl.load(slope_ptr + bin, mask=inside, other=0).to(COMPUTE) * source
    tl.store(out_ptr + partition * group + column, value.to(out_ptr.dtype.element_ty), mask=inside)


def patterns(input: Tensor) -> Tensor:
    """The 16 bits of each element, in row-major order."""
    return input.contiguous().view(torch.int16).view(-1)


def count(bits: Tensor, group: int, partitions: int) -> Tensor:
    """int32 ``[partitions, 65536]``."""
    counts = torch.zeros((partitions, BINS), dtype=torch.int32, device=bits.device)
    if bits.numel():
        with torch.cuda.device_of(bits):
            tile = configs.tile("histogram16", bits.device, elements=bits.numel())
            grid = (triton.cdiv(group, tile["BLOCK"]), partitions)
            histogram16_kernel[grid](bits, counts, group, bits.numel(), **tile)
    return counts


def scatter(bits: Tensor, source: Tensor, group: int, partitions: int, dtype: torch.dtype) -> Tensor:
    """``[partitions, 65536]`` in ``dtype``: sums of ``source``, which is contiguous."""
    out = torch.empty((partitions, BINS), dtype=dtype, device=bits.device)
    if bits.numel() == 0:
        return out.zero_()
    wide = source.dtype == torch.float64
    largest = torch.zeros((partitions,), dtype=torch.int64, device=bits.device)
    sums = torch.zeros((1 + wide, partitions, BINS), dtype=torch.int64, device=bits.device)
    special = torch.zeros((partitions, BINS), dtype=torch.int32, device=bits.device)
    remainders, group_bits = sums[-1], group.bit_length()
    with torch.cuda.device_of(bits):
        tile = configs.tile("scatter16", bits.device, elements=bits.numel())
        grid = (triton.cdiv(group, tile["BLOCK"]), partitions)
        scatter16_largest_kernel[grid](source, largest, group, bits.numel(), **tile)
        scatter16_add_kernel[grid](
            bits, source, largest, sums, remainders, special, group, bits.numel(), group_bits, REMAINDERS=wide, **tile
        )
        scatter16_finish_kernel[(triton.cdiv(BINS, tile["BLOCK"]), partitions)](
            largest, sums, remainders, special, out, group_bits, REMAINDERS=wide, **tile
        )
    return out


def gather(bits: Tensor, table: Tensor, source: Tensor | None, slope: Tensor | None, out: Tensor, group: int) -> None:
    """Write into ``out``, flat, what the tables ``[partitions, 65536]`` say of each element."""
    if bits.numel() == 0:
        return
    compute = tl.float64 if torch.float64 in (table.dtype, None if slope is None else slope.dtype) else tl.float32
    with torch.cuda.device_of(bits):
        tile = configs.tile("lut_apply16", bits.device, elements=bits.numel())
        grid = (triton.cdiv(group, tile["BLOCK"]), triton.cdiv(bits.numel(), group))
        lut_apply16_kernel[grid](
            bits,
            table,
            source,
            slope,
            out,
            group,
            bits.numel(),
            SOURCE=source is not None,
            COMPUTE=compute,
            **tile,
        )


def histogram16(input: Tensor) -> Tensor:
    return count(patterns(input), max(input.numel(), 1), 1)[0]


def scatter16(input: Tensor, source: Tensor) -> Tensor:
    dtype = torch.promote_types(source.dtype, torch.float32)
    return scatter(patterns(input), source.contiguous(), max(input.numel(), 1), 1, dtype)[0]


def lut_apply16(input: Tensor, table: Tensor, source: Tensor | None, slope: Tensor | None) -> Tensor:
    dtype = input.dtype if source is None else source.dtype
    out = torch.empty(input.shape, dtype=dtype, device=input.device)
    source, slope = (None if x is None else x.contiguous() for x in (source, slope))
    gather(patterns(input), table.contiguous(), source, slope, out, max(input.numel(), 1))
    return out
