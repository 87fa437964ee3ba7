# SPDX-License-Identifier: Apache-2.0
"""What a quantised weight refuses: values that stand for nothing, parts on other devices, nested scales that do not fit."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import ops
from cofire.nn import QuantLinear
from cofire.ops import NestedScale, QTensor
from helpers import Refusal, refusals

COLUMNS = 32


def weight(**parts: Any) -> QTensor:
    codes = torch.arange(4 * COLUMNS).view(4, COLUMNS) % 16
    return QTensor.from_codes(codes, **{"scale": torch.full((4, 2), 0.5), "bits": 4, **parts})


def nested(**changes: Any) -> NestedScale:
    parts = {
        "codes": torch.tensor([[0, 1]] * 4, dtype=torch.uint8),
        "table": torch.tensor([0.5, 2.0]),
        "absmax": torch.tensor([1.0, 3.0]),
        "mean": torch.tensor(0.25),
        "block": 4,
    }
    return NestedScale(**{**parts, **changes})  # type: ignore[arg-type]


def test_columns_in_another_order() -> None:
    perm = torch.randperm(COLUMNS)
    q = weight(perm=perm)
    assert torch.equal(q.dequantize()[:, perm], q.replace(perm=None).dequantize())
    rows = torch.randn(3, COLUMNS)
    torch.testing.assert_close(ops.qlinear(rows, q), rows @ q.dequantize().t())
    scale = torch.full((4, 2), 0.5, requires_grad=True)
    (weight().replace(scale=scale, perm=perm).dequantize() * rows[0]).sum().backward()
    expected = (weight().unpack() * rows[0, perm]).view(4, 2, -1).sum(2)
    torch.testing.assert_close(scale.grad, expected)


def test_an_order_with_repetitions_decodes_nothing_that_was_not_written() -> None:
    """The constructor does not look: each column of the result is then one of the weight's, and none is left out of it."""
    q = weight().replace(perm=torch.zeros(COLUMNS, dtype=torch.int64))
    w = q.dequantize()
    columns = {tuple(c) for c in q.replace(perm=None).dequantize().t().tolist()}
    assert {tuple(c) for c in w.t().tolist()} == columns


def test_scales_that_are_allowed() -> None:
    """Negative ones, as ggml stores them, and zero, the scale of a group of zeros."""
    scale = torch.tensor([[-0.5, 0.0]] * 4)
    q = weight(scale=scale, zero=torch.full((1, 1), 8.0)).check_values()
    assert torch.equal(q.dequantize()[:, 16:], torch.zeros(4, 16))
    expected = (q.unpack().float() - 8)[:, :16] * -0.5
    assert torch.equal(q.dequantize()[:, :16], expected)
    rows = torch.randn(3, COLUMNS)
    torch.testing.assert_close(ops.qlinear(rows, q), rows @ q.dequantize().t())
    assert torch.equal(QuantLinear.from_qtensor(q).weight, q.dequantize())


def spoilt(x: Tensor, value: float = torch.nan) -> Tensor:
    x = x.clone()
    x.flatten()[-1] = value
    return x


FINITE = {
    "zero": lambda: {"zero": spoilt(torch.ones(4, 2))},
    "offset": lambda: {"offset": spoilt(torch.ones(4, 2), -torch.inf)},
    "lut": lambda: {"lut": spoilt(torch.ones(1, 16))},
    "scale": lambda: {"scale": spoilt(torch.ones(4, 2), torch.inf)},
    "scale.table": lambda: {"scale": nested(table=spoilt(torch.ones(2)))},
    "scale.absmax": lambda: {"scale": nested(absmax=spoilt(torch.ones(2), torch.inf))},
    "scale.mean": lambda: {"scale": nested(mean=torch.tensor(torch.nan))},
    "offset.mean": lambda: {"scale": nested(), "offset": nested(mean=torch.tensor(-torch.inf))},
}


@pytest.mark.parametrize("name", FINITE)
def test_numbers_that_are_not_finite_are_refused(name: str) -> None:
    parts = FINITE[name]()
    count = {"scale.mean": 1, "offset.mean": 1, "scale.table": 2, "scale.absmax": 2, "lut": 16}.get(name, 8)
    sentence = f"QTensor.from_codes: {name} must be finite, got 1 values that are not, of {count}"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        weight(**parts)
    with pytest.raises(ValueError, match=sentence.replace("QTensor.from_codes", "mine")):
        weight().replace(**parts).check_values("mine")


def order(*first: int) -> Tensor:
    return torch.cat((torch.tensor(first), torch.arange(len(first), COLUMNS)))


def unseen(**parts: Any) -> QTensor:
    """By the constructor, which can be traced."""
    codes = torch.zeros(4, COLUMNS // 2, dtype=torch.uint8)
    return QTensor(codes, **{"scale": torch.ones(4, 2), "shape": (4, COLUMNS), "bits": 4, "group_size": 16, **parts})


def x(device: str = "cpu") -> Tensor:
    return torch.zeros(2, COLUMNS, device=device)


def on_meta(name: str) -> Callable[[], object]:
    """The weight with one of its tensors on another device."""

    def call() -> object:
        q = unseen(
            scale=nested(), offset=nested(), zero=torch.ones(4, 2), lut=torch.ones(1, 16), perm=torch.arange(COLUMNS)
        )
        part, _, inner = name.partition(".")
        moved = getattr(q, part)
        moved = dataclasses.replace(moved, **{inner: getattr(moved, inner).to("meta")}) if inner else moved.to("meta")
        return q.replace(**{part: moved})

    return call


REFUSALS = [
    Refusal(
        "perm_zeros", lambda: weight(perm=torch.zeros(COLUMNS, dtype=torch.int64)), ValueError,
        "QTensor.from_codes: perm must be a permutation of the 32 columns, got one without 31 of them", data=True,
    ),
    Refusal(
        "perm_twice", lambda: weight(perm=order(1, 1)), ValueError,
        "QTensor.from_codes: perm must be a permutation of the 32 columns, got one without 1 of them", data=True,
    ),
    Refusal(
        "perm_outside", lambda: weight(perm=order(0, -1, 40)), ValueError,
        "QTensor.from_codes: perm must be a permutation of the 32 columns, got one without 2 of them", data=True,
    ),
    Refusal(
        "perm_later", lambda: weight().replace(perm=order(1, 1)).check_values(), ValueError,
        "QTensor: perm must be a permutation of the 32 columns, got one without 1 of them", data=True,
    ),
    Refusal(
        "table_short", lambda: weight(scale=nested(table=torch.ones(1))), ValueError,
        "QTensor.from_codes: scale.codes must be below 1, got up to 1", data=True,
    ),
    Refusal("block", lambda: nested(block=0), ValueError, "NestedScale: block must be at least 1, got 0"),
    Refusal("block_none", lambda: nested(block=None), TypeError, "NestedScale: block must be an integer, got None"),
    Refusal(
        "nested_codes", lambda: nested(codes=torch.zeros(4, 2)), TypeError,
        "NestedScale: codes must be uint8, got torch.float32",
    ),
    Refusal(
        "nested_table", lambda: nested(table=torch.ones(2).int()), TypeError,
        "NestedScale: table must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "nested_absmax", lambda: nested(absmax=torch.ones(3)), ValueError,
        "NestedScale: codes [N, G], a table, absmax [2] and one mean belong together, got codes [4, 2], table [2], "
        "absmax [3], mean []",
    ),
    *(
        Refusal(
            f"device_{name}", on_meta(name), ValueError,
            f"QTensor: {name} must be on the device of codes (cpu), got meta",
        )
        for name in (
            "zero", "lut", "perm", "scale.codes", "scale.table", "scale.absmax", "scale.mean", "offset.table",
            "offset.absmax",
        )
    ),
    Refusal(
        "device_scale", lambda: unseen(scale=torch.ones(4, 2, device="meta")), ValueError,
        "QTensor: scale must be on the device of codes (cpu), got meta",
    ),
    Refusal(
        "input_device", lambda: ops.qlinear(x("meta"), unseen()), ValueError,
        "qlinear: codes must be on the device of input (meta), got cpu",
    ),
    Refusal(
        "input_device_ordered", lambda: ops.qlinear(x("meta"), unseen(perm=torch.arange(COLUMNS))), ValueError,
        "qlinear: codes must be on the device of input (meta), got cpu",
    ),
    Refusal(
        "bias_device", lambda: ops.qlinear(x(), unseen(), torch.zeros(4, device="meta")), ValueError,
        "qlinear: bias must be on the device of input (cpu), got meta",
    ),
    Refusal(
        "lora_device", lambda: ops.qlora_linear(x(), unseen(), x("meta"), torch.zeros(4, 2)), ValueError,
        "qlora_linear: lora_a must be on the device of input (cpu), got meta",
    ),
    Refusal(
        "lora_device_ordered",
        lambda: ops.qlora_linear(x(), unseen(perm=torch.arange(COLUMNS)), x("meta"), torch.zeros(4, 2)), ValueError,
        "qlora_linear: lora_a must be on the device of input (cpu), got meta",
    ),
]  # fmt: skip


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


# ----------------------------------------------------------------------------------------------------- gradients


def test_codes_cannot_require_a_gradient() -> None:
    with pytest.raises(RuntimeError, match="floating point"):
        weight().codes.requires_grad_()


@pytest.mark.parametrize("name", ["scale", "zero", "offset", "lut"])
def test_a_part_that_requires_a_gradient(name: str) -> None:
    """It is trained by qlinear, refused by the product whose weight is frozen, and frozen by the layer."""
    shape = (1, 16) if name == "lut" else (4, 2)
    part = torch.ones(shape, requires_grad=True)
    q = weight().replace(**{name: part})
    rows = torch.randn(3, COLUMNS)
    ops.qlinear(rows, q).sum().backward()
    assert part.grad is not None and part.grad.shape == part.shape
    with pytest.raises(RuntimeError, match="qlora_linear: the weight is frozen"):
        ops.qlora_linear(rows, q, torch.ones(2, COLUMNS), torch.ones(4, 2))
    layer = QuantLinear.from_qtensor(q)
    assert not getattr(layer, name).requires_grad and not layer(rows).requires_grad


def test_the_examples_of_the_docstrings() -> None:
    results = doctest.testmod(importlib.import_module("cofire.ops.qtensor"))
    assert results.attempted > 0 and results.failed == 0
