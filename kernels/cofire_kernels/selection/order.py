# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Descending order of a row with ties to the lower column, by sorting one 64-bit key per column."""

from __future__ import annotations

import triton
import triton.language as tl

from cofire_kernels.numerics import INTERPRETED

#: Longest row that one program sorts; launchers compose longer ones of torch operators. The interpreter, which compares
#: all pairs of keys, can hold a tensor of 2**20 elements.
LONGEST_ROW = 1024 if INTERPRETED else 2048


@triton.jit
def ordered(value):
    """int32 of the order of fp32 values: a negative float's bits count downwards. -0.0 equals 0.0."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def sort_keys(value, column, inside):
    """int64 keys, unique, in the order "greater value first, then lower column first" when sorted descending.

    The upper half is the fp32 value as an integer of the same order, the lower half counts columns downwards. NaN comes
    first, as in torch. Lanes outside the row come last.
    """
    upper = tl.where(value != value, 0x7FFFFFFF, ordered(value))  # whatever its sign bit
    key = (upper.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    return tl.where(inside, key, -9223372036854775807)


@triton.jit
def sort_descending(key, BLOCK: tl.constexpr):
    """The keys of a row in descending order; those outside the row end up behind them, in no order.

    The interpreter counts instead: there ``tl.sort`` needs a second for a row of some hundred keys.
    """
    if INTERPRETED:
        rank = tl.sum((key[None, :] > key[:, None]).to(tl.int32), 1)
        result = tl.sum(tl.where(rank[:, None] == tl.arange(0, BLOCK)[None, :], key[:, None], 0), 0)
    else:
        result = tl.sort(key, descending=True)
    return result


@triton.jit
def key_value(key):
    upper = (key >> 32).to(tl.int32)
    return tl.where(upper < 0, upper ^ 0x7FFFFFFF, upper).to(tl.float32, bitcast=True)


@triton.jit
def key_column(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
