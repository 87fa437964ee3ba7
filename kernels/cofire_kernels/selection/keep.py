# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""The largest scores of each row, block or small group, as packed masks. Scores exist in registers alone.

Each operation of a score is rounded by itself, as in the reference, so masks are equal bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.selection.bits import bytes_of_bits
from cofire_kernels.selection.order import ordered

#: Most entries of a row or block that one program holds. What is longer, a whole tensor, blocks whose rows are not
#: whole bytes, and groups of other sizes than powers of two are selected by the reference's sort.
MOST_ENTRIES = 16384
LARGEST_GROUP = 32
#: Pairs of neighbours that one program compares: with more, registers spill.
PAIRS = 2048


@triton.jit
def score_keys(weight_ptr, other_ptr, place, column, inside, factor, SCORE: tl.constexpr):
    """uint32 keys of the order of the scores, zero outside, and how many scores are NaN."""
    w = tl.load(weight_ptr + place, mask=inside, other=0).to(tl.float32)
    if SCORE == "value":
        s = w
    elif SCORE == "magnitude":
        s = tl.abs(w)
    elif SCORE == "wanda":
        s = tl.abs(w) * tl.load(other_ptr + column, mask=inside, other=0).to(tl.float32)
    else:
        o = tl.load(other_ptr + place, mask=inside, other=0).to(tl.float32)
        if SCORE == "taylor":
            s = tl.abs(w * o)
        elif SCORE == "fisher":
            s = (w * o) * (w * o)
        else:
            s = tl.abs(w) + tl.abs(o) * factor
    nan = tl.sum((inside & (s != s)).to(tl.int32))
    key = ordered(s).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(inside, key, 0), nan


@triton.jit
def largest(key, inside, keep):
    """Which of the keys, uint32 above zero inside and zero outside, are the ``keep`` largest; ties go to the first.

    The threshold is found bit by bit: each bit is kept if at least ``keep`` keys remain above it.
    """
    threshold = tl.min(key, 0) * 0
    one = threshold + 1
    for step in range(32):
        higher = threshold | (one << (31 - step))
        found = tl.sum((key >= higher).to(tl.int32), 0)
        threshold = tl.where(found >= keep, higher, threshold)
    above = (key > threshold) & inside
    tied = (key == threshold) & inside
    left = keep - tl.sum(above.to(tl.int32), 0)
    before = tl.cumsum(tied.to(tl.int32), 0) - tied.to(tl.int32)
    return above | (tied & (before < left))


@triton.jit
def keep_entries_kernel(
    weight_ptr, other_ptr, count_ptr, bits_ptr, nan_ptr, columns, width, keep, height, across, blocks, factor,
    PER_ROW: tl.constexpr, SCORE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program per row (a block of height 1) or block. ``across`` columns of a block stand in ``blocks`` blocks."""
    down, right = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    entry = tl.arange(0, ENTRIES)
    inside = entry < height * across
    row, column = down * height + entry // across, right * across + entry % across
    key, nan = score_keys(weight_ptr, other_ptr, row * columns + column, column, inside, factor, SCORE)
    if nan > 0:
        tl.atomic_add(nan_ptr, nan)
    if PER_ROW:
        keep = tl.load(count_ptr + down).to(tl.int32)
    kept = largest(key, inside, keep)
    byte = tl.arange(0, ENTRIES // 8)
    wide = (across + 7) // 8
    place = (down * height + byte // wide) * width + right * wide + byte % wide
    tl.store(bits_ptr + place, bytes_of_bits(kept, ENTRIES // 8), mask=byte < height * wide)


@triton.jit
def keep_groups_kernel(
    weight_ptr, other_ptr, bits_ptr, nan_ptr, columns, width, keep, tiles, factor,
    SCORE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Groups of a few neighbours: an entry's rank is the number of those in its group that go first."""
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    column = tile * (GROUPS * GROUP) + tl.arange(0, GROUPS * GROUP)
    inside = column < columns
    key, nan = score_keys(weight_ptr, other_ptr, row * columns + column, column, inside, factor, SCORE)
    if nan > 0:
        tl.atomic_add(nan_ptr, nan)
    key = tl.reshape(key, [GROUPS, GROUP])
    mine, other = key[:, :, None], key[:, None, :]
    lane = tl.arange(0, GROUP)
    earlier = lane[None, None, :] < lane[None, :, None]
    rank = tl.sum(((other > mine) | ((other == mine) & earlier)).to(tl.int32), 2)
    kept = tl.reshape(rank < keep, [GROUPS * GROUP]) & inside
    byte = tile * (GROUPS * GROUP // 8) + tl.arange(0, GROUPS * GROUP // 8)
    tl.store(bits_ptr + row * width + byte, bytes_of_bits(kept, GROUPS * GROUP // 8), mask=byte < width)


def _refuse(message: str) -> None:
    raise ValueError(f"keep_mask: {message}")


def _reads_values(x: Tensor) -> bool:
    return x.device.type != "meta"


def keep_mask(
    weight: Tensor,
    other: Tensor | None,
    counts: Tensor | None,
    keep: int,
    scope: str,
    score: str,
    block_rows: int,
    block_columns: int,
    factor: float,
) -> Tensor:
    rows, columns = weight.shape
    whole = scope == "row"
    height, across = (1, columns) if whole else (block_rows, block_columns)
    group = not whole and height == 1 and across <= LARGEST_GROUP and across & (across - 1) == 0
    entries = height * across <= MOST_ENTRIES and (whole or across % 8 == 0)
    wide = other is not None and other.dtype == torch.float64
    if wide or scope == "tensor" or not (group or entries):
        args = (weight, other, counts, keep, scope, score, block_rows, block_columns, factor)
        chosen: Tensor = torch.ops.cofire.keep_mask.reference(*args)
        return chosen
    width = (columns + 7) // 8
    bits = torch.empty((rows, width), dtype=torch.uint8, device=weight.device)
    if bits.numel() == 0:
        return bits
    if counts is not None and _reads_values(counts):
        least, most = torch.stack([counts.min(), counts.max()]).tolist()
        if least < 0 or most > columns:
            _refuse(f"keep must be between 0 and the {columns} columns of a row, got {least} to {most}")
    weight = weight.contiguous()
    other = weight if other is None else other.contiguous()
    nan = torch.zeros((1,), dtype=torch.int32, device=weight.device)
    with torch.cuda.device_of(weight):
        tile = configs.tile("keep_mask", weight.device, entries=PAIRS // across if group else height * across)
        options = {"SCORE": score, "enable_fp_fusion": False, **tile}
        if group:
            groups = PAIRS // across**2
            tiles = triton.cdiv(columns, groups * across)
            keep_groups_kernel[(rows * tiles,)](
                weight, other, bits, nan, columns, width, keep, tiles, factor, GROUP=across, GROUPS=groups, **options
            )
        else:
            blocks = 1 if whole else columns // across
            counted = nan if counts is None else counts.contiguous()
            keep_entries_kernel[(rows // height * blocks,)](
                weight, other, counted, bits, nan, columns, width, keep, height, across, blocks, factor,
                PER_ROW=counts is not None, ENTRIES=max(triton.next_power_of_2(height * across), 16), **options,
            )  # fmt: skip
    if _reads_values(nan) and (found := int(nan)):
        _refuse(f"scores must not be NaN, got {found} NaN among {weight.numel()} scores")
    return bits
