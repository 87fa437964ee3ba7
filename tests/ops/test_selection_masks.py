# SPDX-License-Identifier: Apache-2.0
"""Packed masks: one bit per entry, their transpose, and where the rows' values begin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cofire import ops
from helpers import Random, Refusal, Sample, check_op, refusals
from laws import given, settings, st

Make = Callable[[Random], tuple[object, ...]]
#: No size is a multiple of 8; the larger ones have whole vectors, several tiles and a rest.
SIZES = [(3, 17), (1, 1), (9, 8), (8, 64), (65, 129), (70, 1030)]
NOTHING = [(0, 7), (3, 0)]
TINY = [(9, 13), (17, 26)]  # two bytes and more each way: the compiler takes a size of 1 for a constant


def mask_of(rows: int, columns: int) -> Make:
    return lambda rand: (rand.mask(rows, columns),)


def bits_of(rows: int, columns: int, *rest: int) -> Make:
    return lambda rand: (ops.pack_bits(rand.mask(rows, columns).to(torch.uint8), 1), *rest)


def samples(make: Callable[[int, int], Make], sizes: list[tuple[int, int]]) -> list[Sample]:
    return [Sample(f"{rows}x{columns}", make(rows, columns), full=rows == 70) for rows, columns in sizes]


PACK = [
    *samples(mask_of, [*SIZES, *NOTHING]),
    Sample("uint8_high_bit", lambda rand: ((rand.mask(3, 67) * 128).to(torch.uint8),)),
    Sample("int64_high_bits", lambda rand: (rand.mask(3, 67).long() << 40,)),
]
CHECKS = [
    *check_op("pack_mask", PACK, tiny=samples(mask_of, TINY)),
    *check_op(
        "unpack_mask",
        # garbage after the last column must not matter
        [
            *samples(lambda r, c: bits_of(r, c, c), [*SIZES, *NOTHING]),
            Sample("rest", lambda rand: (torch.full((2, 2), 255, dtype=torch.uint8), 9)),
        ],
        tiny=samples(lambda r, c: bits_of(r, c, c), TINY),
    ),
    *check_op(
        "transpose_mask",
        [
            *samples(lambda r, c: bits_of(r, c, c), [*SIZES, *NOTHING]),
            Sample("rest", lambda rand: (torch.full((2, 2), 255, dtype=torch.uint8), 9)),
        ],
        tiny=samples(lambda r, c: bits_of(r, c, c), TINY),
    ),
    *check_op(
        "mask_offsets",
        samples(lambda r, c: bits_of(r, c), [*SIZES, *NOTHING]),
        tiny=samples(lambda r, c: bits_of(r, c), TINY),
    ),
]


@pytest.mark.parametrize("check", CHECKS)
def test_operator(check: Callable[[], None]) -> None:
    check()


def byte_matrix(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


REFUSALS = [
    Refusal(
        "pack_rank",
        lambda: ops.pack_mask(torch.ones(3)),
        ValueError,
        "pack_mask: mask must have shape [rows, columns], got [3]",
    ),
    Refusal(
        "unpack_dtype",
        lambda: ops.unpack_mask(torch.zeros(2, 2), 9),
        TypeError,
        "unpack_mask: bits must be uint8, got torch.float32",
    ),
    Refusal(
        "unpack_columns",
        lambda: ops.unpack_mask(byte_matrix(2, 2), 17),
        ValueError,
        "unpack_mask: 17 columns take 3 bytes per row, got bits [2, 2]",
    ),
    Refusal(
        "transpose_columns",
        lambda: ops.transpose_mask(byte_matrix(2, 2), 8),
        ValueError,
        "transpose_mask: 8 columns take 1 bytes per row, got bits [2, 2]",
    ),
    Refusal(
        "transpose_float",
        lambda: ops.transpose_mask(byte_matrix(2, 2), 8.5),  # type: ignore[arg-type]
        TypeError,
        "transpose_mask: columns must be an integer, got 8.5",
    ),
    Refusal(
        "offsets_rank",
        lambda: ops.mask_offsets(byte_matrix(2)),
        ValueError,
        "mask_offsets: bits must have shape [N, ceil(columns / 8)], got [2]",
    ),
]


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


masks = st.tuples(st.integers(1, 70), st.integers(1, 150), st.integers(0, 2**31), st.sampled_from([0.05, 0.5, 1.0]))


@given(masks)
@settings(max_examples=50, deadline=None)
def test_laws(shape: tuple[int, int, int, float]) -> None:
    """Packing and transposing are undone; bits are those of pack_bits; offsets are sums of what unpacking finds."""
    rows, columns, seed, density = shape
    mask = torch.rand((rows, columns), generator=torch.Generator().manual_seed(seed)) < density
    bits = ops.pack_mask(mask)
    assert torch.equal(bits, ops.pack_bits(mask.to(torch.uint8), 1))
    assert torch.equal(ops.unpack_mask(bits, columns), mask)
    turned = ops.transpose_mask(bits, columns)
    assert torch.equal(ops.unpack_mask(turned, rows), mask.t())
    assert torch.equal(ops.transpose_mask(turned, rows), bits)
    assert ops.mask_offsets(bits).tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
