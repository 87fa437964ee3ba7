# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Drop and grow: a key for every entry, then the least keys of the kept and of the pruned ones.

A program holds a row and finds each threshold bit by bit, by counting; equal keys are ranked by a running sum. Wider rows
and whole tensors are sorted by torch operators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.lowbit.fake_quantize import philox_words
from cofire_kernels.sparse_training.step import read_bits

#: Widest row that one program holds in registers.
WIDEST = 8192


@triton.jit
def magnitude_key(x):
    """Unsigned, in the order of magnitudes; the keys of NaN are above ``0xFF000000``."""
    return x.to(tl.float32).to(tl.uint32, bitcast=True) << 1


@triton.jit
def prune_and_grow_keys_kernel(
    bits_ptr, drop_ptr, grow_ptr, key_ptr, nan_ptr, columns, blocks, seed_low, seed_high,
    RANDOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys as int32 of the same order, and how many are NaN: of the pruned entries, of the kept ones."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    kept = read_bits(bits_ptr, row, column, inside, columns, True)
    at = row * columns + column
    key = magnitude_key(tl.load(drop_ptr + at, mask=kept, other=0))
    dropped_nan = kept & (key > 0xFF000000)
    if RANDOM:
        a, b, c, d = philox_words((at // 4)[None, :], seed_low, seed_high)
        which = (at % 4)[None, :]
        words = tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d)).reshape(BLOCK)
        grown_nan = dropped_nan & False
    else:
        words = magnitude_key(tl.load(grow_ptr + at, mask=inside & (kept == 0), other=0))
        grown_nan = inside & (kept == 0) & (words > 0xFF000000)
    key = tl.where(kept, key, words ^ tl.full([1], 0xFFFFFFFF, tl.uint32))
    ordered = (key ^ tl.full([1], 0x80000000, tl.uint32)).to(tl.int32, bitcast=True)
    tl.store(key_ptr + at, ordered, mask=inside)
    tl.store(nan_ptr + 2 * tl.program_id(0), tl.sum(grown_nan.to(tl.int32), 0))
    tl.store(nan_ptr + 2 * tl.program_id(0) + 1, tl.sum(dropped_nan.to(tl.int32), 0))


@triton.jit
def first_of(key, among, number):
    """The ``number`` entries of least key, of equal ones those of lower index."""
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        higher = threshold | bit
        below = tl.sum((among & (key < higher)).to(tl.int32), 0)
        threshold = tl.where(below < number, higher, threshold)
        bit = bit >> 1
    less, equal = among & (key < threshold), (among & (key == threshold)).to(tl.int32)
    left = number - tl.sum(less.to(tl.int32), 0)
    rank = tl.cumsum(equal, 0) - equal
    return (number > 0) & (less | ((equal != 0) & (rank < left)))


@triton.jit
def prune_and_grow_kernel(bits_ptr, key_ptr, new_ptr, columns, count, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    kept = read_bits(bits_ptr, row, column, inside, columns, True)
    pruned = inside & (kept == 0)
    stored = tl.load(key_ptr + row * columns + column, mask=inside, other=0)
    key = stored.to(tl.uint32, bitcast=True) ^ tl.full([1], 0x80000000, tl.uint32)
    number = tl.minimum(tl.sum(kept.to(tl.int32), 0), tl.sum(pruned.to(tl.int32), 0))
    number = tl.minimum(number.to(tl.int64), count).to(tl.int32)
    changed = first_of(key, kept, number) | first_of(key, pruned, number)
    new = (kept ^ changed).to(tl.int32) << (column % 8)
    bytes_ = tl.sum(new.reshape(BLOCK // 8, 8), 1).to(tl.uint8)
    byte = tl.arange(0, BLOCK // 8)
    width = (columns + 7) // 8
    tl.store(new_ptr + row * width + byte, bytes_, mask=byte < width)


@triton.jit
def clear_changed_kernel(w_ptr, before_ptr, after_ptr, columns, blocks, BLOCK: tl.constexpr):
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    before = read_bits(before_ptr, row, column, inside, columns, True)
    after = read_bits(after_ptr, row, column, inside, columns, True)
    zero = tl.zeros([BLOCK], tl.float32).to(w_ptr.dtype.element_ty)
    tl.store(w_ptr + row * columns + column, zero, mask=before ^ after)


def prune_and_grow__plan(
    weight: Tensor,
    bits: Tensor,
    grow_score: Tensor | None,
    drop_score: Tensor | None,
    count: int,
    scope: str,
    seed: int,
) -> str:
    columns = weight.numel() // max(weight.shape[0], 1)
    if scope == "tensor":
        return "torch operators: the order of a whole tensor"
    return "one program per row" if columns <= WIDEST else f"torch operators: more than {WIDEST} columns"


def prune_and_grow_(
    weight: Tensor,
    bits: Tensor,
    grow_score: Tensor | None,
    drop_score: Tensor | None,
    count: int,
    scope: str,
    seed: int,
) -> Tensor:
    new = torch.empty_like(bits, memory_format=torch.contiguous_format)
    if weight.numel() == 0:
        return new.zero_()
    if scope == "tensor" or weight.numel() // weight.shape[0] > WIDEST:
        torch_: Tensor = torch.ops.cofire.prune_and_grow_.reference(
            weight, bits, grow_score, drop_score, count, scope, seed
        )
        return torch_
    rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
    w, before = weight.contiguous(), bits.contiguous()
    drop = w if drop_score is None else drop_score.contiguous()
    grow = w if grow_score is None else grow_score.contiguous()
    # sources are narrowed to fp32 where they are wider
    drop, grow = (x.float() if x.dtype == torch.float64 else x for x in (drop, grow))
    low, high = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    low, high = (word - (1 << 32) if word >> 31 else word for word in (low, high))
    with torch.cuda.device_of(weight):
        tile = configs.tile("prune_and_grow_keys", weight.device, columns=columns)
        blocks = triton.cdiv(columns, tile["BLOCK"])
        key = torch.empty((rows, columns), dtype=torch.int32, device=weight.device)
        nan = torch.empty((rows * blocks, 2), dtype=torch.int32, device=weight.device)
        prune_and_grow_keys_kernel[(rows * blocks,)](
            before, drop, grow, key, nan, columns, blocks, low, high, RANDOM=grow_score is None, **tile
        )
        if nan.device.type != "meta":  # nothing may be written then, so the host has to know
            grown, dropped = nan.sum(0).tolist()
            for found, kind, of in ((dropped, "drop", "kept"), (grown, "grow", "pruned")):
                if found:
                    raise ValueError(f"prune_and_grow_: {kind} scores must not be NaN, got NaN at {found} {of} entries")
        size = triton.next_power_of_2(max(columns, 8))
        held = configs.tile("prune_and_grow", weight.device, columns=columns)
        prune_and_grow_kernel[(rows,)](before, key, new, columns, count, BLOCK=size, **held)
        clear_changed_kernel[(rows * blocks,)](w, before, new, columns, blocks, **tile)
    if w is not weight:
        weight.copy_(w)
    return new
