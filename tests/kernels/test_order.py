# SPDX-License-Identifier: Apache-2.0
"""The order of a row by 64-bit keys, with the sort that a GPU runs: launchers in the interpreter count instead."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402

from cofire_kernels.selection.order import key_column, key_value, sort_descending, sort_keys  # noqa: E402


@triton.jit
def order_kernel(value_ptr, column_ptr, ordered_ptr, columns, SORT: tl.constexpr, BLOCK_C: tl.constexpr):
    lane = tl.arange(0, BLOCK_C)
    inside = lane < columns
    key = sort_keys(tl.load(value_ptr + lane, mask=inside, other=0), lane, inside)
    key = tl.sort(key, descending=True) if SORT else sort_descending(key, BLOCK_C)
    tl.store(column_ptr + lane, key_column(key), mask=inside)
    tl.store(ordered_ptr + lane, key_value(key), mask=inside)


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        [3.0],
        [1.0, 3.0, 3.0, -2.0, 0.0, -0.0, 3.0],
        [float("-inf"), -1e-45, 1e-45, float("inf"), -3.4e38],
        [0.0] * 17,
        [float(i * 7 % 11 - 5) for i in range(33)],
    ],
)
def test_order_is_that_of_a_stable_descending_sort(row: list[float], sort: bool) -> None:
    values = torch.tensor(row, device="cuda" if torch.cuda.is_available() else "cpu")
    column, ordered = torch.empty_like(values, dtype=torch.int32), torch.empty_like(values)
    block = max(triton.next_power_of_2(len(row)), 16)
    order_kernel[(1,)](values, column, ordered, len(row), SORT=sort, BLOCK_C=block)
    expected = values.sort(descending=True, stable=True)
    assert column.tolist() == expected.indices.tolist()
    assert ordered.tolist() == expected.values.tolist()
