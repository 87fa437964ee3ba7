# SPDX-License-Identifier: Apache-2.0
"""The ways of `qlinear` on a CPU change with the number of rows, and the answer does not."""

from __future__ import annotations

import pytest
import torch

from cofire.ops import qlinear, qlora_linear
from cofire.ops.qtensor import QTensor
from cofire.ops.quantizers import quantize_weight

ROWS = 600  #: more than codes are decoded in registers for


def weight(bits: int, group: int) -> QTensor:
    return quantize_weight(
        torch.randn(50, 256, generator=torch.Generator().manual_seed(bits)), "minmax", bits=bits, group_size=group
    )


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_have_the_same_answer_in_many_rows_and_in_few(bits: int, group: int) -> None:
    w = weight(bits, group)
    x = torch.randn(ROWS, 256, generator=torch.Generator().manual_seed(9))
    many = qlinear(x, w, activations="int8")
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 23, 24, 25, 100):
        torch.testing.assert_close(qlinear(x[:rows], w, activations="int8"), many[:rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bf16_in_many_rows_and_in_few(bits: int, group: int) -> None:
    w = weight(bits, group)
    x = torch.randn(ROWS, 256, generator=torch.Generator().manual_seed(9)).bfloat16()
    exact = x.double() @ w.dequantize().double().T
    terms = x.double().abs() @ w.dequantize().double().abs().T
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 23, 24, 25, 100, ROWS):
        # Products are exact and sums in fp32. For many rows the weight itself may be rounded, as the answer is, to 8 bits.
        slack = 2**-8 * exact.abs() + (2e-5 if rows < 64 else 2**-8) * terms
        error = (qlinear(x[:rows], w).double() - exact[:rows]).abs()
        assert (error <= slack[:rows]).all(), f"{rows} rows: {(error / slack[:rows]).max():.2f} times what is allowed"


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_the_gradient_of_bf16_in_many_rows_and_in_few(bits: int, group: int, rank: int) -> None:
    """The weight has rows and columns that fill no whole block of a layout."""
    w = quantize_weight(
        torch.randn(50, 192, generator=torch.Generator().manual_seed(bits)), "minmax", bits=bits, group_size=group
    )
    rand = torch.Generator().manual_seed(9)
    a, b = torch.randn(rank, 192, generator=rand).bfloat16(), torch.randn(50, rank, generator=rand).bfloat16()
    grad = torch.randn(300, 50, generator=rand).bfloat16()
    whole = w.dequantize().double() + b.double() @ a.double()
    exact, terms = (
        grad.double() @ whole,
        grad.double().abs() @ (w.dequantize().double().abs() + b.double().abs() @ a.double().abs()),
    )
    for rows in (1, 7, 8, 9, 63, 64, 300):
        x = torch.zeros(rows, 192, dtype=torch.bfloat16, requires_grad=True)
        y = qlora_linear(x, w, a, b) if rank else qlinear(x, w)
        y.backward(grad[:rows])
        # The answer is rounded to 8 bits, and where there are products of bf16 the weight and the low-rank term are too.
        slack = 2**-8 * exact[:rows].abs() + 2 * 2**-8 * terms[:rows]
        assert ((x.grad.double() - exact[:rows]).abs() <= slack).all()
