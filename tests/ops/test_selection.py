# SPDX-License-Identifier: Apache-2.0
"""compact: the positions of set entries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cofire import ops
from cofire.ops import selection
from cofire.ops.gating import mask_from_index
from helpers import Random, Refusal, Sample, check_examples, check_op, refusals
from laws import given, settings, st


def mask_of(rows: int, columns: int, density: float = 0.5) -> Callable[[Random], tuple[torch.Tensor]]:
    return lambda rand: (rand.mask(rows, columns, density=density),)


COMPACT = [
    Sample("odd", mask_of(3, 17)),
    *(Sample(f"columns_{c}", mask_of(2, c)) for c in (1, 7, 63, 64, 65, 129)),
    Sample("large", mask_of(70, 1030)),
    Sample("sparse", mask_of(5, 200, density=0.01)),
    Sample("zeros", mask_of(3, 65, density=0.0)),
    Sample("ones", mask_of(3, 65, density=1.0)),
    Sample("no_rows", mask_of(0, 7)),
    Sample("no_columns", mask_of(3, 0)),
    Sample("uint8", lambda rand: ((rand.uniform(3, 67) * 3).to(torch.uint8),)),
    Sample("uint8_high_bit", lambda rand: ((rand.mask(3, 67) * 128).to(torch.uint8),)),
    Sample("int8_negative", lambda rand: (-rand.mask(3, 67).to(torch.int8),)),
    # a kernel that looks at the low byte, or casts, would lose these
    Sample("int64_high_bits", lambda rand: (rand.mask(3, 67).long() << 40,)),
]
# A float mask is any number but zero: minus zero is zero, NaN and the smallest denormal are not.
FLOAT_MASKS = [
    Sample("float", lambda rand: (rand.normal(3, 67) * rand.mask(3, 67),)),
    Sample("float_corners", lambda rand: (torch.tensor([[0.0, -0.0, torch.nan, torch.inf, 6e-8, -1.0, 0.5]]),)),
]
TINY = [Sample("tiny", mask_of(2, 5)), Sample("tiny_resized", mask_of(3, 8))]


@pytest.mark.parametrize(
    "check", [*check_op("compact", COMPACT, tiny=TINY), *check_op("compact", FLOAT_MASKS, tiny=())]
)
def test_operator(check: Callable[[], None]) -> None:
    check()


REFUSALS = [
    Refusal(
        "compact_rank",
        lambda: ops.compact(torch.ones(3, dtype=torch.bool)),
        ValueError,
        "compact: mask must have shape [rows, columns], got [3]",
    ),
    Refusal(
        "compact_list",
        lambda: ops.compact([[1, 0]]),  # type: ignore[arg-type]
        TypeError,
        "compact: mask must be a tensor, got list",
    ),
]


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_golden() -> None:
    index, count = ops.compact(torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool))
    assert index.tolist() == [[1, 2, -1, -1], [-1, -1, -1, -1], [0, 1, 2, 3]]
    assert count.tolist() == [2, 0, 4]


masks = st.integers(0, 140).flatmap(
    lambda columns: st.lists(st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=1, max_size=4)
)


@given(masks)
@settings(max_examples=100, deadline=None)
def test_mask_from_index_is_the_inverse(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows, dtype=torch.bool).view(len(rows), -1)
    index, count = ops.compact(mask)
    assert torch.equal(mask_from_index(index, count, mask.shape[1]), mask)
    for row, found, number in zip(rows, index.tolist(), count.tolist(), strict=True):
        positions = [i for i, present in enumerate(row) if present]
        assert found == positions + [-1] * (len(row) - number)


def test_examples() -> None:
    check_examples(selection)
