# SPDX-License-Identifier: Apache-2.0
"""The ways of `qlinear` on a CPU change with the number of rows, and the answer does not."""

from __future__ import annotations

import pytest
import torch

from cofire.ops import qlinear, qlora_linear
from cofire.ops.qtensor import QTensor
from cofire.ops.quantizers import quantize_weight
from helpers import threads

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


@pytest.mark.parametrize("magnitude", [1e-36, 1e-27, 1e-24, 1e-7, 1.0, 3.7, 1e6, 1e30])
def test_rows_are_rounded_as_quotients_are(magnitude: float) -> None:
    """Halves between two integers among them, and scales whose inverse is no float: the bytes are those of a division."""
    columns = 64
    identity = QTensor.from_codes(torch.eye(columns, dtype=torch.uint8), torch.ones(columns, 1), bits=4)
    rand = torch.Generator().manual_seed(5)
    halves = torch.randint(-254, 255, (500, columns), generator=rand) / 2
    halves[:, 0] = 127
    for x in (magnitude * halves, magnitude * torch.randn(500, columns, generator=rand)):
        scale = x.abs().amax(1, keepdim=True) / 127
        assert torch.equal(qlinear(x, identity, activations="int8"), (x / scale).round() * scale)


@pytest.mark.parametrize("bits", [2, 4])
def test_an_input_that_no_cache_holds(bits: int) -> None:
    """Its rows are rounded where they are multiplied, some at a time; any number of threads computes the same."""
    rand = torch.Generator().manual_seed(bits)
    w = quantize_weight(torch.randn(50, 512, generator=rand), "minmax", bits=bits, group_size=128)
    x = torch.randn(1100, 512, generator=rand)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(qlinear(x, w, activations="int8"))
    assert all(torch.equal(results[0], other) for other in results[1:])
    for row in (0, 11, 12, 555, 1099):
        one = qlinear(x[row : row + 1], w, activations="int8")
        torch.testing.assert_close(one, results[0][row : row + 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_low_rank_term_whose_tiles_end_with_a_block(rows: int) -> None:
    rand = torch.Generator().manual_seed(7)
    w = quantize_weight(torch.randn(80, 64, generator=rand), "minmax", bits=4, group_size=32)
    a, b, x = (torch.randn(*shape, generator=rand) for shape in ((2, 64), (80, 2), (rows, 64)))
    torch.testing.assert_close(qlora_linear(x, w, a, b), x @ (w.dequantize() + b @ a).t(), rtol=1e-4, atol=1e-4)
