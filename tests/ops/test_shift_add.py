# SPDX-License-Identifier: Apache-2.0
"""Weights of powers of two: known bits, the way there and back, and products against plain torch in fp64."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cofire import ops
from cofire.ops import QTensor, shift_add
from cofire.ops.lowbit import _seen, int8_activations
from cofire.ops.packing import pack_bits
from cofire.ops.shift_add import FORMATS, powers_of_two
from cofire.registry import OPERATORS
from helpers import Random

ROW = torch.tensor([[1, -0.5, 0, 2**-14, -0.125, 0.25, -1, 0]])
INTEGERS = torch.tensor([[0]])


def parameters(rows: int = 5, columns: int = 19, octaves: int = 14) -> tuple[Tensor, Tensor]:
    """Every exponent, both signs, and dead weights."""
    random = Random("parameters")
    shift = -octaves * torch.rand(rows, columns, generator=torch.Generator().manual_seed(1))
    return shift, random.normal(rows, columns)


def slow(shift: Tensor, sign: Tensor) -> Tensor:
    """The weight, number by number, in Python."""

    def value(p: float, s: float) -> float:
        q = round(s)
        return math.copysign(2.0 ** round(min(max(p, -14.0), 0.0)), q) if q else 0.0

    return torch.tensor([[value(p, s) for p, s in zip(*r)] for r in zip(shift.tolist(), sign.tolist())]).double()


def test_examples() -> None:
    assert doctest.testmod(shift_add, extraglobs={"torch": torch}).failed == 0


# ------------------------------------------------------------------------------------------------ the quantiser


def test_edges_of_the_quantiser() -> None:
    shift = torch.tensor([[-2.5, -3.5, -20, 3, -math.inf, -0.5]])
    sign = torch.tensor([[0.5, 0.51, -0.5, -0.51, 1.5, -7]])
    p, s = ops.shift_quantize(shift, sign)
    assert p.tolist() == [[-2, -4, -14, 0, -14, 0]]
    assert s.tolist() == [[0, 1, 0, -1, 1, -1]]


def test_a_weight_of_zero_starts_dead() -> None:
    shift, sign = ops.shift_from_weight(torch.tensor([[0.0, -0.0, 1e-9, -9.0, 2**-1.5, 0.3]]))
    assert shift.isfinite().all()
    assert shift.tolist() == [[0, 0, -14, 0, -2, -2]]
    assert sign.tolist() == [[0, 0, 1, -1, 1, 1]]
    assert ops.shift_statistics(*ops.shift_quantize(shift, sign))["dead"] == 2


def test_dead_and_clipped_are_counted() -> None:
    exponent = torch.tensor([[-2, -8, -9, -14], [-14, -14, 0, -1]])
    sign = torch.tensor([[1, -1, 1, 0], [1, 1, 0, 0]])
    assert ops.shift_statistics(exponent, sign) == {"weights": 8, "dead": 3, "clipped": 1}


# ------------------------------------------------------------------------------------------------------ packing


def test_known_bits() -> None:
    """Magnitudes and signs of a row of 8, as planes of nibbles and of bits, low bits first."""
    codes = ops.pack_shift(*ops.shift_quantize(*ops.shift_from_weight(ROW))).unpack()
    assert (codes & 15).tolist() == [[0, 1, 15, 14, 3, 2, 0, 15]]
    assert bytes(pack_bits(codes & 15, 4)[0].tolist()) == bytes.fromhex("10EF23F0")
    assert pack_bits(codes >> 4, 1).tolist() == [[0x52]]


@pytest.mark.parametrize("format", ["S5", "S8"])
def test_lossless(format: str) -> None:
    p, s = ops.shift_quantize(*parameters())
    q = ops.pack_shift(p, s, format=format)
    assert torch.equal(q.dequantize().double(), slow(*parameters()))
    back = ops.unpack_shift(q)
    assert torch.equal(back[0], torch.where(s == 0, 0, p))
    assert torch.equal(back[1], s)
    assert not q.dequantize()[s == 0].signbit().any()


@pytest.mark.parametrize("format", ["S5", "S8"])
@pytest.mark.parametrize(
    ("dtype", "eighth", "least"),
    [
        (torch.float32, 0x3E000000, 0x38800000),
        (torch.bfloat16, 0x3E00, 0x3880),
        (torch.float16, 0x3000, 0x0400),
        (torch.float8_e5m2, 0x30, 0x04),
    ],
)
def test_known_floats(format: str, dtype: torch.dtype, eighth: int, least: int) -> None:
    """2^-3 and 2^-14, the smallest normal number of fp16 and of E5M2, to the bit; a minus is the topmost bit."""
    exponent, sign = torch.tensor([[-3, -14, -3, -14]]), torch.tensor([[1, 1, -1, -1]])
    words = {4: torch.int32, 2: torch.int16, 1: torch.int8}[dtype.itemsize]
    found = ops.pack_shift(exponent, sign, format=format, dtype=dtype).dequantize()
    top = -(1 << (8 * dtype.itemsize - 1))
    assert found.dtype == dtype
    assert found.view(words).tolist() == [[eighth, least, eighth + top, least + top]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_every_power_is_exact_in_few_bits(dtype: torch.dtype) -> None:
    p = torch.arange(-14, 1)[None]
    w = ops.pack_shift(p, torch.ones_like(p), dtype=dtype).dequantize()
    assert torch.equal(w.double(), torch.exp2(p.double()))


def test_rows_of_seven_octaves_are_lossless_in_four_bits() -> None:
    shift, sign = parameters(octaves=6)
    shift = shift - torch.arange(5)[:, None] * 2
    q = ops.pack_shift(*ops.shift_quantize(shift, sign), format="S4")
    assert torch.equal(q.dequantize().double(), slow(shift, sign))
    assert q.codes.shape == (5, 10)
    assert torch.equal(ops.unpack_shift(q)[1], ops.shift_quantize(shift, sign)[1])


def test_what_four_bits_clip() -> None:
    exponent = torch.tensor([[-1, -7, -8, -9], [-3, -2, 0, 0]])
    sign = torch.tensor([[1, -1, -1, 1], [0, 0, 0, 0]])
    w = ops.pack_shift(exponent, sign, format="S4").dequantize()
    assert w.tolist() == [[0.5, -(2**-7), -(2**-7), 0.0], [0.0] * 4]


# ----------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 17, 520])
def test_product(format: str, rows: int) -> None:
    p, s = ops.shift_quantize(*parameters(23, 130))
    q = ops.pack_shift(p, s, format=format)
    x, bias = Random("x").normal(rows, 130), Random("bias").normal(23)
    expected = x.double() @ q.dequantize().double().t() + bias.double()
    torch.testing.assert_close(ops.shift_linear(x, q, bias).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [130, 9000])
@pytest.mark.parametrize("rows", [1, 17])
def test_product_of_rounded_activations_is_that_of_integers(rows: int, columns: int) -> None:
    p, s = ops.shift_quantize(*parameters(7, columns))
    q = ops.pack_shift(p, s, format="S4")
    x = Random("x").normal(rows, columns)
    codes, a = int8_activations(x)
    assert q.lut is not None
    integers = codes.long() @ q.lut[0].long()[q.unpack().long()].t()
    scale = q.scales()
    assert scale is not None
    expected = integers.double() * a.double() * scale.double().t()
    # One rounding for each of the two scales.
    torch.testing.assert_close(ops.shift_linear(x, q, activations="int8").double(), expected, rtol=2 * 2**-23, atol=0)


WAYS = [("S5", "exact"), ("S8", "exact"), ("S4", "exact"), ("S4", "int8")]


@pytest.mark.parametrize(("format", "activations"), WAYS)
def test_straight_through_gradients(format: str, activations: str) -> None:
    shift, sign = (t.requires_grad_() for t in parameters())
    q = ops.pack_shift(*ops.shift_quantize(shift, sign), format=format)
    x, bias = Random("x").normal(2, 3, 19).requires_grad_(), Random("bias").normal(5).requires_grad_()
    grad = Random("grad").normal(2, 3, 5)
    ops.shift_linear(x, q, bias, latent=(shift, sign), activations=activations).backward(grad)
    seen = x.detach()
    if activations == "int8":
        codes, scale = int8_activations(seen)
        seen = codes * scale
    w = q.dequantize().double()
    g = grad.double().view(6, 5).t() @ seen.double().view(6, 19)
    expected = {
        "input": (x.grad, grad.double() @ w),
        "sign": (sign.grad, g),
        "shift": (shift.grad, math.log(2) * g * w),
        "bias": (bias.grad, grad.double().sum((0, 1))),
    }
    for name, (found, wanted) in expected.items():
        assert found is not None, name
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5, msg=name)
    dead = sign.detach().round() == 0
    assert dead.any() and shift.grad is not None and not shift.grad[dead].any()


def leaves(format: str, dtype: torch.dtype = torch.float64) -> tuple[QTensor, dict[str, Tensor]]:
    """A packed weight, and what its product is differentiated by."""
    shift, sign = (t.to(dtype).requires_grad_() for t in parameters())
    x, bias = (Random(n).normal(*s).to(dtype).requires_grad_() for n, s in (("x", (2, 3, 19)), ("bias", (5,))))
    q = ops.pack_shift(*ops.shift_quantize(shift, sign), format=format, dtype=dtype)
    return q, {"input": x, "shift": shift, "sign": sign, "bias": bias}


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_input_and_bias_twice(format: str) -> None:
    """Against finite differences; those of shift and sign are straight through, so that differences say nothing of them."""
    q, given = leaves(format)
    latent = (given["shift"], given["sign"])

    def product(x: Tensor, bias: Tensor) -> Tensor:
        return ops.shift_linear(x, q, bias, latent=latent)

    assert torch.autograd.gradcheck(product, (given["input"], given["bias"]))
    assert torch.autograd.gradgradcheck(product, (given["input"], given["bias"]))


@pytest.mark.parametrize(("format", "activations"), WAYS)
def test_second_derivatives_are_those_of_the_straight_through_weight(format: str, activations: str) -> None:
    """Of every gradient by every argument: against plain torch with the weight that passes its gradient on."""
    q, given = leaves(format)
    cotangents = {name: Random(f"to {name}").normal(*t.shape).double() for name, t in given.items()}
    grad = Random("grad").normal(2, 3, 5).double().requires_grad_()
    everything = (*given.values(), grad)

    def plain(input: Tensor, shift: Tensor, sign: Tensor, bias: Tensor) -> Tensor:
        weight = powers_of_two(shift, sign, format == "S4")
        return torch.nn.functional.linear(_seen(input, activations), weight, bias)

    def packed(input: Tensor, shift: Tensor, sign: Tensor, bias: Tensor) -> Tensor:
        return ops.shift_linear(input, q, bias, latent=(shift, sign), activations=activations)

    def twice(product: Callable[..., Tensor], which: str) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        (first,) = torch.autograd.grad(product(**given), given[which], grad, create_graph=True)
        if not first.requires_grad:
            return first, ()
        return first, torch.autograd.grad(first, everything, cotangents[which], allow_unused=True)

    for which in given:
        (first, found), (expected_first, expected) = (twice(product, which) for product in (packed, plain))
        torch.testing.assert_close(first, expected_first, msg=which)
        for name, a, b in zip((*given, "grad"), found, expected, strict=True):
            assert (a is None) == (b is None), (which, name)
            torch.testing.assert_close(a, b, msg=f"{which} by {name}")
    # (the packed weight alone would have no such part)
    (first,) = torch.autograd.grad(packed(**given), given["input"], grad, create_graph=True)
    by = torch.autograd.grad(first, (given["shift"], given["sign"]), cotangents["input"])
    assert all(t.abs().sum() > 0 for t in by)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "activations"), WAYS)
def test_the_product_with_parameters_compiles(format: str, activations: str, dtype: torch.dtype) -> None:
    """One graph, the bits of eager, all gradients, and no second compilation."""
    q, given = leaves(format, dtype)

    def product(input: Tensor, shift: Tensor, sign: Tensor, bias: Tensor) -> Tensor:
        return ops.shift_linear(input, q, bias, latent=(shift, sign), activations=activations)

    grad = Random("grad").normal(2, 3, 5).to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    expected = product(**given)
    by = torch.autograd.grad(expected, tuple(given.values()), grad)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            y = compiled(**given)
            assert torch.equal(y, expected)
            torch.testing.assert_close(torch.autograd.grad(y, tuple(given.values()), grad), by)


@pytest.mark.parametrize("format", FORMATS)
def test_the_operators_behind_a_product_with_parameters_pass_opcheck(format: str) -> None:
    q, given = leaves(format, torch.float32)
    x, bias = given["input"], given["bias"]
    parts = (q.codes, q.scales(), q.zero, q.offsets(), q.lut)
    for name, args in (
        ("qlinear", (x, *parts, bias, q.bits, q.group_size, "exact")),
        ("qlinear_backward", (torch.ones(2, 3, 5), None, *parts, q.bits, q.group_size, 19, "exact", True)),
    ):
        torch.library.opcheck(OPERATORS[name].overload, args)


# ------------------------------------------------------------------------------------------------------- errors

PACKED = ops.pack_shift(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 4, dtype=torch.int8))
REFUSALS = [
    (lambda: ops.shift_quantize(INTEGERS, torch.ones(1, 1)), TypeError, "shift_quantize: shift must be a floating-point"),
    (lambda: ops.shift_quantize(torch.ones(1, 2), torch.ones(2, 1)), ValueError, "sign must have the shape and device"),
    (lambda: ops.shift_quantize(torch.tensor([[math.nan]]), torch.ones(1, 1)), ValueError, "shift must not be NaN, got 1"),
    (lambda: ops.shift_from_weight(torch.tensor([[math.inf, 1]])), ValueError, "weight must be finite, got 1 values"),
    (lambda: ops.pack_shift(torch.tensor([[-15, 1, 0]]), torch.ones(1, 3).int()), ValueError, "got 2 values outside, of 3"),
    (lambda: ops.pack_shift(INTEGERS, INTEGERS + 2), ValueError, "sign must be in -1 to 1, got 1 values outside"),
    (lambda: ops.pack_shift(torch.zeros(1, 1), INTEGERS), TypeError, "exponent must be a tensor of integers"),
    (lambda: ops.pack_shift(INTEGERS, INTEGERS, format="S6"), ValueError, "format must be one of S5, S4, S8"),
    (lambda: ops.unpack_shift(QTensor.from_codes(INTEGERS, None, bits=4)), ValueError, "must come from pack_shift"),
    (lambda: ops.shift_linear(torch.ones(1, 4), cast(Any, torch.ones(2, 4))), TypeError, "weight must be a QTensor, got Tensor"),
    (lambda: ops.shift_linear(torch.ones(1, 4), PACKED, activations="int8"), ValueError, "need a weight of format S4"),
    (lambda: ops.shift_linear(torch.ones(1, 3), PACKED, latent=(torch.ones(2, 3),) * 2), ValueError, "shape of the weight"),
    (lambda: ops.shift_linear(torch.ones(1, 9), PACKED), ValueError, "qlinear: input must have shape"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "sentence"), REFUSALS, ids=[r[2] for r in REFUSALS])
def test_refused(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()
