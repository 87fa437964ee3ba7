# SPDX-License-Identifier: Apache-2.0
"""Fake quantisation: levels by hand, gradients against finite differences with the rounding frozen, and the contracts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import ops
from cofire.ops import fake_quantize as module
from cofire.ops.fake_quantize import FORMATS, LEVELS, SCALE_FLOOR, philox, philox_uniform
from helpers import Args, Random, Refusal, Sample, check_examples, check_op, refusals

STEP = 0.25


def scales(rand: Random, *shape: int) -> Tensor:
    return rand.uniform(*shape) * 0.3 + 0.05


def half_steps(rows: int, columns: int) -> Tensor:
    """Multiples of half a step: every second one is a tie."""
    return (torch.arange(rows * columns).view(rows, columns) - rows * columns // 2) * (STEP / 2)


# ------------------------------------------------------------------------------------------------- contracts

#: shape of the input, of the scale, and how many neighbours share one: each kind of layout, and more than one chunk
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "rows": ((7, 17), (7,), 17),
    "tensor": ((63, 65), (), 1),
    "tensor_1": ((129,), (1,), 1),
    "axis": ((3, 5, 4, 2), (5,), 8),
    "columns": ((65, 129), (129,), 1),
    "columns_few": ((7, 3), (3,), 1),
    "groups": ((9, 64), (9, 4), 16),
    "tokens": ((3, 7, 33), (7,), 33),
    "one": ((1, 1), (1,), 1),
    "long_rows": ((3, 40_001), (3,), 40_001),
    "long": ((100_003,), (), 1),
    "many_columns": ((900, 63), (63,), 1),
    "no_rows": ((0, 5), (5,), 1),
    "no_columns": ((5, 0), (5,), 0),
}
LATER = ("tensor_1", "axis", "many_columns", "long")
GRADIENTS = {"scale_grad": 32, "range_grad": 32, "minimum_grad": 32, "scale": 32, "range": 32, "minimum": 32}


def lsq(rand: Random, name: str, low: int = -8, high: int = 7, gradient_scale: float | None = None) -> Args:
    shape, scale, inner = LAYOUTS[name]
    return rand.normal(*shape), scales(rand, *scale), inner, low, high, gradient_scale


def samples(make: Callable[..., Args], *rest: Sample) -> list[Sample]:
    found = [Sample(name, lambda rand, n=name: make(rand, n), full=name in LATER) for name in LAYOUTS]
    return [*found, *rest]


LSQ = samples(
    lsq,
    Sample("unsigned", lambda rand: lsq(rand, "rows", 0, 15)),
    Sample("ternary", lambda rand: lsq(rand, "tokens", -1, 1, 0.5)),
    Sample("ties", lambda rand: (half_steps(9, 15), torch.full((9,), STEP), 15, -4, 3, 1.0)),
    Sample("zeros", lambda rand: (torch.zeros(3, 9), scales(rand, 3), 9, -8, 7, None)),
    Sample("floor", lambda rand: (rand.normal(4, 9) * 5e-5, torch.tensor([-1.0, 0.0, 1e-6, 2e-5]), 9, -8, 7, None)),
)
TINY = {"tiny": ((3, 6), (3,), 6), "tiny_resized": ((4, 5), (4,), 5)}
LAYOUTS |= TINY


def with_grad(sample: Sample) -> Sample:
    def make(rand: Random) -> Args:
        args = sample.make(rand)
        return rand.normal(*args[0].shape), *args

    return Sample(sample.name, make, full=sample.full)


def tiny(make: Callable[..., Args]) -> list[Sample]:
    return [Sample(n, lambda rand, n=n: make(rand, n)) for n in TINY]


LSQ_TINY = tiny(lambda rand, name: lsq(rand, name, -8, 7, 0.75))


@pytest.mark.parametrize(
    "check",
    check_op("fake_quantize_lsq", LSQ, tiny=LSQ_TINY, wide=["scale"], sums=GRADIENTS, straight_through=True),
)
def test_lsq(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    check_op(
        "fake_quantize_lsq_backward",
        list(map(with_grad, LSQ)),
        tiny=list(map(with_grad, LSQ_TINY)),
        wide=["scale"],
        sums=GRADIENTS,
    ),
)
def test_lsq_backward(check: Callable[[], None]) -> None:
    check()


def affine(rand: Random, name: str, bits: int = 4) -> Args:
    shape, scale, inner = LAYOUTS[name]
    return rand.normal(*shape), scales(rand, *scale) * 10, -1.5 * scales(rand, *scale) * 4, inner, bits


AFFINE = samples(
    affine,
    Sample("one_bit", lambda rand: affine(rand, "rows", 1)),
    Sample("sixteen_bits", lambda rand: affine(rand, "rows", 16)),
    Sample("positive", lambda rand: (rand.uniform(3, 9), torch.full((3,), 0.75), torch.full((3,), 0.25), 9, 2)),
    Sample("negative", lambda rand: (-rand.uniform(3, 9), torch.full((3,), 0.5), torch.full((3,), -3.0), 9, 2)),
    Sample("ties", lambda rand: (half_steps(9, 15), torch.full((9,), 15 * STEP), torch.full((9,), -7 * STEP), 15, 4)),
    Sample("clamped", lambda rand: (rand.normal(3, 9), torch.tensor([-1.0, 0.0, 2e5]), torch.zeros(3), 9, 4)),
)
AFFINE_TINY = tiny(affine)


@pytest.mark.parametrize(
    "check",
    check_op(
        "fake_quantize_affine",
        AFFINE,
        tiny=AFFINE_TINY,
        wide=["range", "minimum"],
        sums=GRADIENTS,
        straight_through=True,
    ),
)
def test_affine(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    check_op(
        "fake_quantize_affine_backward",
        list(map(with_grad, AFFINE)),
        tiny=list(map(with_grad, AFFINE_TINY)),
        wide=["range", "minimum"],
        sums=GRADIENTS,
    ),
)
def test_affine_backward(check: Callable[[], None]) -> None:
    check()


MINMAX = [
    Sample("odd", lambda rand: (rand.normal(7, 17), 4, 17)),
    Sample("groups", lambda rand: (rand.normal(9, 64), 3, 16)),
    Sample("long", lambda rand: (rand.normal(3, 2049), 8, 2049)),
    Sample("many", lambda rand: (rand.normal(5, 65, 63), 2, 63), full=True),
    Sample("pairs", lambda rand: (rand.normal(129, 2), 4, 2)),
    Sample("singles", lambda rand: (rand.normal(7, 3), 4, 1)),
    Sample("vector", lambda rand: (rand.normal(65), 1, 65)),
    Sample("positive", lambda rand: (rand.uniform(4, 33) + 1, 4, 33)),
    Sample("ties", lambda rand: (half_steps(1, 17).expand(4, 17) + 0.0, 3, 17)),
    Sample("ends", lambda rand: ((rand.uniform(9, 33) * 4).floor() - 1, 4, 33)),  # many at the minimum and the maximum
    Sample("zeros", lambda rand: (torch.cat((torch.zeros(2, 9), torch.full((2, 9), -0.75), rand.normal(2, 9))), 4, 9)),
    Sample("no_rows", lambda rand: (torch.zeros(0, 4), 4, 4)),
    Sample("no_columns", lambda rand: (torch.zeros(4, 0), 4, 0)),
]
MINMAX_TINY = [
    Sample("tiny", lambda rand: (rand.normal(3, 6), 2, 6)),
    Sample("tiny_resized", lambda rand: (rand.normal(4, 5), 2, 5)),
]


@pytest.mark.parametrize(
    "check", check_op("fake_quantize_minmax", MINMAX, tiny=MINMAX_TINY, sums=["input"], straight_through=True)
)
def test_minmax(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    check_op(
        "fake_quantize_minmax_backward",
        list(map(with_grad, MINMAX)),
        tiny=list(map(with_grad, MINMAX_TINY)),
        sums=["output 0"],
    ),
)
def test_minmax_backward(check: Callable[[], None]) -> None:
    check()


STATSQ = [
    Sample("odd", lambda rand: (rand.normal(7, 17), 4)),
    Sample("one_bit", lambda rand: (rand.normal(9, 65), 1)),
    Sample("two_bits", lambda rand: (rand.normal(3, 5, 63), 2)),
    Sample("eight_bits", lambda rand: (rand.normal(5, 129), 8)),
    Sample("long", lambda rand: (rand.normal(3, 5001), 3)),
    Sample("vector", lambda rand: (rand.normal(33), 3)),
    Sample("ties", lambda rand: (torch.tensor([[1.0, -1.0, 0.5, -0.5, 0.0, 2.0, -2.0, 1.0]]), 3)),
    Sample("zeros", lambda rand: (torch.cat((torch.zeros(1, 7), rand.normal(1, 7), torch.zeros(1, 7))), 2)),
    Sample("no_rows", lambda rand: (torch.zeros(0, 4), 4)),
    Sample("no_columns", lambda rand: (torch.zeros(4, 0), 4)),
]
STATSQ_TINY = [
    Sample("tiny", lambda rand: (rand.normal(3, 6), 2)),
    Sample("tiny_resized", lambda rand: (rand.normal(4, 5), 2)),
]


@pytest.mark.parametrize("check", check_op("fake_quantize_statsq", STATSQ, tiny=STATSQ_TINY, straight_through=True))
def test_statsq(check: Callable[[], None]) -> None:
    check()


GROUP = [
    Sample("odd", lambda rand: (rand.normal(7, 17), "int4", 17, 2, False, 0)),
    *(
        Sample(f"{f}{'_stochastic' * s}", lambda rand, f=f, s=s: (rand.normal(5, 192), f, 64, 2, s, 1 << 40))
        for f in FORMATS
        for s in (False, True)
    ),
    Sample("no_outliers", lambda rand: (rand.normal(3, 63), "e2m1", 21, 0, False, 0)),
    Sample("all_but_one", lambda rand: (rand.normal(9, 7), "int4_asymmetric", 7, 6, False, 0)),
    Sample("singles", lambda rand: (rand.normal(9, 3), "e2m1", 1, 0, True, 5)),
    Sample("long", lambda rand: (rand.normal(2, 1290), "e2m1", 645, 20, False, 0)),
    Sample("many", lambda rand: (rand.normal(65, 512), "int4", 256, 2, True, 7), full=True),
    Sample("ties", lambda rand: (half_steps(4, 16), "int4", 16, 3, False, 0)),
    Sample("equal", lambda rand: (torch.full((2, 8), -1.5), "int4", 8, 3, False, 0)),
    Sample("zeros", lambda rand: (torch.zeros(2, 16), "e3m0", 8, 2, True, 0)),
    Sample("no_rows", lambda rand: (torch.zeros(0, 4), "int4", 4, 2, False, 0)),
    Sample("no_columns", lambda rand: (torch.zeros(4, 0), "int4", 4, 2, False, 0)),
]
GROUP_TINY = [
    Sample("tiny", lambda rand: (rand.normal(3, 8), "e2m1", 4, 1, True, 3)),
    Sample("tiny_resized", lambda rand: (rand.normal(4, 12), "e2m1", 4, 1, True, 3)),
]


@pytest.mark.parametrize("check", check_op("fake_quantize_group", GROUP, tiny=GROUP_TINY, straight_through=True))
def test_group(check: Callable[[], None]) -> None:
    check()


# ----------------------------------------------------------------------------------- golden vectors, by hand


def test_lsq_by_hand() -> None:
    x = torch.tensor([-3.0, -1.0, 0.2, 0.25, 0.75, 0.5, 1.25], requires_grad=True)
    s = torch.tensor([0.5], requires_grad=True)
    y = ops.fake_quantize_lsq(x, s, -2, 1, gradient_scale=2.0)
    # x / s: -6, -2, 0.4, 0.5, 1.5, 1, 2.5
    assert y.tolist() == [-1.0, -1.0, 0.0, 0.0, 0.5, 0.5, 0.5]
    y.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 3.0, 7.0, 5.0]))
    assert x.grad is not None and s.grad is not None
    assert x.grad.tolist() == [0.0, 10.0, 100.0, 1000.0, 0.0, 7.0, 0.0]
    # 2 (1 * -2 + 10 * 0 + 100 * -0.4 + 1000 * -0.5 + 3 * 1 + 7 * 0 + 5 * 1)
    assert s.grad.item() == pytest.approx(2 * (-2 - 40 - 500 + 3 + 5), rel=1e-6)


def test_lsq_default_factor() -> None:
    """``1 / sqrt(high n)``, n elements to a scale: section 2.2 of the paper."""
    x = torch.randn(6, 24)
    for kind, s in (
        ({}, torch.tensor(0.3)),
        ({"axis": 0}, torch.full((6,), 0.3)),
        ({"group_size": 8}, torch.full((6, 3), 0.3)),
    ):
        found = []
        for factor in (None, 1.0):
            leaf = s.clone().requires_grad_()
            ops.fake_quantize_lsq(x, leaf, -8, 7, **kind, gradient_scale=factor).square().sum().backward()
            found.append(leaf.grad)
        torch.testing.assert_close(found[0], found[1] / math.sqrt(7 * x.numel() / s.numel()))


@pytest.mark.parametrize("shape", [(5, 7, 3), (4, 6)])
def test_lsq_axes_and_groups_are_slices(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for axis in range(-len(shape), len(shape)):
        s = torch.rand(shape[axis]) + 0.1
        y = ops.fake_quantize_lsq(x, s, -4, 3, axis=axis)
        for i in range(shape[axis]):
            assert torch.equal(y.select(axis, i), ops.fake_quantize_lsq(x.select(axis, i), s[i], -4, 3))
        r, m = torch.rand(shape[axis]) + 1, -torch.rand(shape[axis])
        y = ops.fake_quantize_affine(x, r, m, 3, axis=axis)
        for i in range(shape[axis]):
            assert torch.equal(y.select(axis, i), ops.fake_quantize_affine(x.select(axis, i), r[i], m[i], 3))
    s = torch.rand(*shape[:-1], 3) + 0.1
    size = shape[-1] // 3
    y = ops.fake_quantize_lsq(x, s, -4, 3, group_size=size)
    wide = s.repeat_interleave(size, -1)
    assert torch.equal(y, (x / wide).clamp(-4, 3).round() * wide)


def test_a_scale_that_is_not_positive_is_the_floor_and_can_come_back() -> None:
    x = torch.tensor([3.2e-5, -1.0])
    for value in (-1.0, 0.0, 1e-6, SCALE_FLOOR):
        s = torch.tensor(value, requires_grad=True)
        y = ops.fake_quantize_lsq(x, s, -8, 7, gradient_scale=1.0)
        floor = torch.tensor(SCALE_FLOOR)
        assert torch.equal(y, torch.stack((3 * floor, -8 * floor)))
        y.sum().backward()
        assert s.grad is not None and s.grad.item() == pytest.approx((3 - 3.2) - 8, rel=1e-4)


def test_affine_by_hand() -> None:
    x = torch.tensor([-5.0, -1.5, -0.4, 0.3, 1.0, 4.0], requires_grad=True)
    r, m = torch.tensor(3.0, requires_grad=True), torch.tensor(-1.2, requires_grad=True)
    y = ops.fake_quantize_affine(x, r, m, 2)
    # step 1, zero point round(1.2) = 1; x / 1 + 1: -4, -0.5, 0.6, 1.3, 2, 5
    assert y.tolist() == [-1.0, -1.0, 0.0, 0.0, 1.0, 2.0]
    g = torch.tensor([1.0, 10.0, 100.0, 1000.0, 3.0, 7.0])
    y.backward(g)
    assert x.grad is not None and r.grad is not None and m.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 100.0, 1000.0, 3.0, 0.0]
    inside = 100 * 0.4 + 1000 * -0.3 + 3 * 0
    outside = (1 + 10) * (0 + 1.2 - 1) + 7 * (3 + 1.2 - 1)
    assert r.grad.item() == pytest.approx((inside + outside) / 3, rel=1e-5)
    assert m.grad.item() == pytest.approx(1 + 10 + 7)


def test_affine_passes_nothing_through_a_clamped_zero_point() -> None:
    x = torch.tensor([-1.0, 0.5, 9.0])
    for minimum, zero in ((0.75, 0), (-9.0, 3)):
        r, m = torch.tensor(3.0, requires_grad=True), torch.tensor(minimum, requires_grad=True)
        y = ops.fake_quantize_affine(x, r, m, 2)
        assert torch.equal(y, (x + zero).clamp(0, 3).round() - zero)
        y.sum().backward()
        assert m.grad is not None and m.grad.item() == 0
        v = x + zero
        q = v.clamp(0, 3).round()
        inside = (v >= 0) & (v <= 3)
        expected = torch.where(inside, q - v, q - zero).sum() / 3
        torch.testing.assert_close(r.grad, expected)


def test_minmax_by_hand() -> None:
    x = torch.tensor([[-1.0, 0.1, 0.6, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    y = ops.fake_quantize_minmax(x, 2)
    # step 1, zero point 1: levels -1, 0, 1, 2; the second row is constant
    assert y.tolist() == [[-1.0, 0.0, 1.0, 2.0, 2.0], [1.0] * 5]
    y.backward(torch.tensor([[1.0, 10.0, 100.0, 3.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]]))
    assert x.grad is not None
    step = (10 * -0.1 + 100 * 0.4) / 3  # inside: level - x; the ends are levels
    expected = torch.tensor([[1 - step, 10.0, 100.0, 3 + step / 2, 5 + step / 2], [1.0, 2.0, 3.0, 4.0, 5.0]])
    torch.testing.assert_close(x.grad, expected)


def test_minmax_gradient_at_clamped_ends() -> None:
    """The range is not on the grid of the zero point, so an end of it is clamped."""
    x = torch.tensor([[-0.4, 0.3, 2.6]], requires_grad=True)
    y = ops.fake_quantize_minmax(x, 2)
    # step 1; -min = 0.4: zero point 0; rounds to -0, 0, 3
    assert y.tolist() == [[0.0, 0.0, 3.0]]
    x = torch.tensor([[-0.6, 0.3, 2.4]], requires_grad=True)
    y = ops.fake_quantize_minmax(x, 2)
    # zero point 1; levels -1 to 2; 2.4 rounds to 2
    assert y.tolist() == [[-1.0, 0.0, 2.0]]
    x = torch.tensor([[-1.5, 0.0, 1.5]], requires_grad=True)
    y = ops.fake_quantize_minmax(x, 2)
    # zero point round(1.5) = 2; round(-1.5) = -2, round(1.5) = 2: level 4 is clamped to 3
    assert y.tolist() == [[-2.0, 0.0, 1.0]]
    y.backward(torch.tensor([[1.0, 10.0, 100.0]]))
    step = (1 * (-2 + 1.5) + 100 * 1) / 3
    torch.testing.assert_close(x.grad, torch.tensor([[1 - step, 10.0, step]]))


def test_statsq_by_hand() -> None:
    w = torch.tensor([[-4.0, -1.0, 0.5, 2.5], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    # mean 2, scale 4, two bits: levels -3, -1, 1, 3
    y = ops.fake_quantize_statsq(w, 2)
    assert y.tolist() == [[-3.0, -1.0, 1.0, 3.0], [0.0] * 4]
    assert ops.fake_quantize_statsq(w, 1).tolist() == [[-2.0, -2.0, 2.0, 2.0], [0.0] * 4]
    g = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    y.backward(g)
    assert torch.equal(w.grad, g)


@pytest.mark.parametrize("bits", range(1, 9))
def test_statsq_is_the_quantizer(bits: int) -> None:
    """What is trained is what is packed, to the last bit."""
    for dtype, columns in itertools.product((torch.float32, torch.bfloat16, torch.float16), (1, 7, 64, 2049)):
        w = torch.randn(5, columns).to(dtype)
        w[2] = 0
        packed = ops.quantize_weight(w, "statsq", bits=bits, group_size=None)
        assert torch.equal(packed.dequantize(), ops.fake_quantize_statsq(w, bits))


def test_group_by_hand() -> None:
    def run(values: list[float], format: str, outliers: int = 0) -> list[float]:
        x = torch.tensor([values])
        found: list[float] = ops.fake_quantize_group(x, format, group_size=len(values), outliers=outliers)[0].tolist()
        return found

    assert run([7.0, 0.5, 1.5, -2.5, -2.6], "int4") == [7.0, 0.0, 2.0, -2.0, -3.0]
    assert run([1.75, 0.125, 0.375, -0.625, -0.65], "e1m2") == [1.75, 0.0, 0.5, -0.5, -0.75]
    # ties between codes: 0.25 (0, 0.5), 0.75 (0.5, 1), 1.25, 1.75, 2.5 (2, 3), 3.5 (3, 4), 5 (4, 6): to the even code
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    assert run([6.0, *ties], "e2m1") == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert run([-6.0, *(-t for t in ties)], "e2m1") == [-6.0, -0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]
    # 0.125 (0, 1/4), 0.375 (1/4, 1/2), 0.75, 1.5, 3, 6, 12
    assert run([16.0, 0.125, 0.375, 0.75, 1.5, 3.0, 6.0, 12.0], "e3m0") == [16.0, 0.0, 0.5, 0.5, 2.0, 2.0, 8.0, 8.0]
    assert run([-5.0, 10.0, 0.5, 1.5, 2.4], "int4_asymmetric") == [-5.0, 10.0, 0.0, 2.0, 2.0]
    # outliers: of equal magnitudes the first two; the scale is 7 / 7
    assert run([100.3, 0.6, -100.3, 7.0], "int4", 2) == [pytest.approx(100.3), 1.0, pytest.approx(-100.3), 7.0]
    assert run([9.0, -50.0, 60.0, -1.0, 14.0, 0.4], "int4_asymmetric", 2) == [9.0, -50.0, 60.0, -1.0, 14.0, 0.0]


def test_equal_magnitudes_go_to_the_lower_index() -> None:
    """Outliers stay exact, the others are rounded: on a coarse grid that shows which are which."""
    x = torch.tensor([[2.6, -2.6, 2.6, 7.0, 2.6]])
    y = ops.fake_quantize_group(x, "int4_asymmetric", group_size=5, outliers=3)
    # exact: 7, the first 2.6 and -2.6; the other two are a range of their own
    assert torch.equal(y, x)
    x = torch.tensor([[1.1, 2.6, -2.6, 2.6, 0.3]])
    y = ops.fake_quantize_group(x, "e3m0", group_size=5, outliers=2)
    assert y[0, 1:3].tolist() == x[0, 1:3].tolist()
    step = torch.tensor(2.6) / 16
    assert y[0, 0] == 8 * step and y[0, 4] == 2 * step and y[0, 3] == 16 * step


def test_e1m2_is_int4() -> None:
    x = torch.randn(7, 256)
    for stochastic in (False, True):
        a, b = (ops.fake_quantize_group(x, f, stochastic=stochastic) for f in ("int4", "e1m2"))
        assert torch.equal(a, b)


def test_philox_is_the_published_one() -> None:
    """The known answers that come with the authors' library, Random123: philox4x32, ten rounds."""
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, words in known:
        a, b, c, d = (torch.tensor([w]) for w in counter)
        assert tuple(int(w) for w in philox((a, b, c, d), key)) == words


def test_uniform_numbers_are_those_words() -> None:
    u = philox_uniform(0, 6)
    assert u[:4].tolist() == [w / 2**24 for w in (0x6627E8, 0xE169C5, 0xBC57AC, 0x9B00DB)]
    zero = torch.zeros(1, dtype=torch.long)
    (word, *_) = philox((zero + 1, zero, zero, zero), (0, 0))
    assert u[4].item() == (int(word) >> 8) / 2**24
    seed = 0x299F31D0_A4093822
    (word, *_) = philox((zero, zero, zero, zero), (0xA4093822, 0x299F31D0))
    assert philox_uniform(seed, 1).item() == (int(word) >> 8) / 2**24


def test_stochastic_rounding_by_hand() -> None:
    """Under seed 0 the numbers begin 0.399, 0.881, 0.736, 0.605."""
    x = torch.tensor([[0.5, 0.5, -0.75, -0.6, 7.0, 0.0, 0.0, 0.0]])
    y = ops.fake_quantize_group(x, "int4", group_size=8, outliers=0, stochastic=True, seed=0)
    assert y.tolist() == [[1.0, 0.0, -1.0, 0.0, 7.0, 0.0, 0.0, 0.0]]
    x = torch.tensor([[5.0, 5.0, -5.5, -5.2, 6.0, 0.0, 0.0, 0.0]])  # between 4 and 6: chances 0.5, 0.5, 0.75, 0.6
    y = ops.fake_quantize_group(x, "e2m1", group_size=8, outliers=0, stochastic=True, seed=0)
    assert y.tolist() == [[6.0, 4.0, -6.0, -4.0, 6.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("format", FORMATS)
def test_stochastic_rounding_is_right_on_average(format: str) -> None:
    x = torch.randn(1, 16)
    runs = torch.stack(
        [ops.fake_quantize_group(x, format, group_size=16, stochastic=True, seed=s) for s in range(2000)]
    )
    if format == "int4_asymmetric":  # an integer zero point leaves some of the range beyond the last level
        kept = x.abs() >= x.abs().sort(dim=1).values[0, -2]
        low, high = torch.where(kept, INF, x).min(), torch.where(kept, -INF, x).max()
        step = (high - low) / 15
        zero = (-low / step).round()
        x = torch.where(kept, x, x.clamp(-zero * step, (15 - zero) * step))
    error = runs.mean(0) - x
    deviation = runs.std(0) / math.sqrt(2000)
    assert (error.abs() <= 5 * deviation + 1e-6).all()
    assert (runs != runs[0]).any()


def test_a_random_number_belongs_to_an_index() -> None:
    """Rows that are added change nothing, and no thread or shape does."""
    x = torch.randn(6, 64)
    whole = ops.fake_quantize_group(x, group_size=16, stochastic=True, seed=9)
    assert torch.equal(whole[:2], ops.fake_quantize_group(x[:2], group_size=16, stochastic=True, seed=9))
    assert torch.equal(
        whole.view(3, 128), ops.fake_quantize_group(x.view(3, 128), group_size=16, stochastic=True, seed=9)
    )


def test_a_new_seed_does_not_compile_again() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    f = torch.compile(lambda x, seed: ops.fake_quantize_group(x, stochastic=True, seed=seed), backend=counter)
    x = torch.randn(2, 256)
    for seed in (5, 6, 7, 8):
        assert torch.equal(f(x, seed), ops.fake_quantize_group(x, stochastic=True, seed=seed))
    assert counter.frame_count <= 2


# ------------------------------------------------------------------ gradients, with the rounding frozen


def residue(v: Tensor) -> Tensor:
    return (v.round() - v).detach()


def frozen_lsq(x: Tensor, s: Tensor) -> Callable[..., Tensor]:
    extra = residue((x / s[:, None]).clamp(-4, 3))
    return lambda x, s: ((x / s[:, None]).clamp(-4, 3) + extra) * s[:, None]


def frozen_affine(x: Tensor, r: Tensor, m: Tensor) -> Callable[..., Tensor]:
    def zero(r: Tensor, m: Tensor, extra: Any = None) -> Tensor:
        exact = -m / (r / 7)
        return exact.round().clamp(0, 7) if extra is None else (exact + extra).clamp(0, 7)

    off = residue(-m / (r / 7))
    extra = residue((x / (r / 7)[:, None] + zero(r, m)[:, None]).clamp(0, 7))

    def call(x: Tensor, r: Tensor, m: Tensor) -> Tensor:
        d, z = (r / 7)[:, None], zero(r, m, off)[:, None]
        return ((x / d + z).clamp(0, 7) + extra - z) * d

    return call


def frozen_minmax(x: Tensor) -> Callable[..., Tensor]:
    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 7, x.amin(1, keepdim=True)

    s, low = parts(x)
    zero, extra = (-low / s).round(), residue(x / s)
    level = (x / s).round() + zero
    inside = (level >= 0) & (level <= 7)

    def call(x: Tensor) -> Tensor:
        s = parts(x)[0]
        return torch.where(inside, x / s + extra, level.clamp(0, 7) - zero) * s

    return call


@pytest.mark.parametrize("kind", ["lsq", "affine", "minmax"])
def test_gradient_is_the_derivative_with_the_rounding_frozen(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 9, generator=generator, dtype=torch.float64) * 2
    r = torch.rand(4, generator=generator, dtype=torch.float64) * 3 + 2
    m = torch.tensor([-1.3, -0.4, 0.9, -7.7], dtype=torch.float64)  # the last two: zero points that are clamped
    if kind == "lsq":
        leaves, frozen = (x, r / 7), frozen_lsq(x, r / 7)
        run = lambda x, s: ops.fake_quantize_lsq(x, s, -4, 3, axis=0, gradient_scale=1.0)  # noqa: E731
    elif kind == "affine":
        leaves, frozen = (x, r, m), frozen_affine(x, r, m)
        run = lambda x, r, m: ops.fake_quantize_affine(x, r, m, 3, axis=0)  # noqa: E731
    else:
        leaves, frozen = (x,), frozen_minmax(x)
        run = lambda x: ops.fake_quantize_minmax(x, 3)  # noqa: E731
    torch.testing.assert_close(frozen(*leaves), run(*leaves))
    g = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(run(*(leaf.requires_grad_() for leaf in leaves)), leaves, g)
    for i, (leaf, gradient) in enumerate(zip(leaves, found)):
        numbers = torch.zeros_like(leaf)
        for j in range(leaf.numel()):
            sides = []
            for sign in (1, -1):
                moved = [p.detach().clone() for p in leaves]
                moved[i].view(-1)[j] += sign * 1e-6
                sides.append((frozen(*moved) * g).sum())
            numbers.view(-1)[j] = (sides[0] - sides[1]) / 2e-6
        torch.testing.assert_close(gradient, numbers, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------- what is not finite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite(dtype: torch.dtype) -> None:
    x = torch.randn(4, 40).to(dtype)
    x[0, 3], x[1, 37], x[2, 5] = NAN, INF, -INF
    nan = x.isnan()
    s = torch.full((4,), 0.25, requires_grad=True)
    leaf = x.clone().requires_grad_()
    y = ops.fake_quantize_lsq(leaf, s, -4, 3, axis=0)
    assert torch.equal(y.isnan(), nan) and y[1, 37] == 0.75 and y[2, 5] == -1
    y.sum().backward()
    assert leaf.grad is not None and s.grad is not None
    assert leaf.grad[0, 3] == 0 and s.grad.isnan().tolist() == [True, False, False, False]

    r, m = torch.full((4,), 3.0, requires_grad=True), torch.full((4,), -1.0, requires_grad=True)
    leaf = x.clone().requires_grad_()
    y = ops.fake_quantize_affine(leaf, r, m, 2, axis=0)
    assert torch.equal(y.isnan(), nan) and y[1, 37] == 2 and y[2, 5] == -1
    y.sum().backward()
    assert leaf.grad is not None and r.grad is not None and m.grad is not None
    assert leaf.grad[0, 3] == 0 and r.grad.isnan().tolist() == [True, False, False, False]

    for call in (lambda t: ops.fake_quantize_minmax(t, 4), lambda t: ops.fake_quantize_statsq(t, 4)):
        y = call(x)
        assert y[0].isnan().all() and not y[1:3].isfinite().any() and y[3].isfinite().all()
    for format, outliers in itertools.product(FORMATS, (0, 1)):
        y = ops.fake_quantize_group(x, format, group_size=40, outliers=outliers)
        if outliers:  # kept as it is, and out of the scale
            assert torch.equal(y.isnan(), nan) and y[1, 37] == INF and y[2, 5] == -INF
        else:
            assert y[:3].isnan().all()
        assert y[3].isfinite().all()
        x2 = x.clone()
        x2[0, 7] = NAN  # two of them, one place
        y = ops.fake_quantize_group(x2, format, group_size=40, outliers=1)
        assert y[0].isnan().all()
    scale = torch.tensor([NAN, 0.25, 0.25, 0.25])
    assert ops.fake_quantize_lsq(torch.ones(4, 2, dtype=dtype), scale, -8, 7, axis=0).isnan()[:, 0].tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_mixed_dtypes() -> None:
    """Parameters wider, or narrower, than the input; and arithmetic in the widest."""
    x = torch.randn(3, 8)
    s = torch.rand(3) + 0.1
    for a, b in itertools.product((torch.float64, torch.float32, torch.bfloat16, torch.float16), repeat=2):
        leaf, scale = x.to(a, copy=True).requires_grad_(), s.to(b, copy=True).requires_grad_()
        y = ops.fake_quantize_lsq(leaf, scale, -8, 7, axis=0)
        assert y.dtype == a
        y.sum().backward()
        assert leaf.grad is not None and scale.grad is not None
        assert (leaf.grad.dtype, scale.grad.dtype) == (a, b)
        wide = torch.float64 if torch.float64 in (a, b) else torch.float32
        v, d = x.to(a).to(wide), s.to(b).to(wide)[:, None]
        assert torch.equal(y, ((v / d).clamp(-8, 7).round() * d).to(a))
        y = ops.fake_quantize_affine(leaf, scale, -scale.detach(), 4, axis=0)
        assert y.dtype == a
        y.sum().backward()


def test_only_the_gradients_asked_for() -> None:
    x, s = torch.randn(3, 8, requires_grad=True), torch.rand(3) + 0.1
    ops.fake_quantize_lsq(x, s, -8, 7, axis=0).sum().backward()
    assert x.grad is not None and s.grad is None
    s.requires_grad_()
    ops.fake_quantize_lsq(x.detach(), s, -8, 7, axis=0).sum().backward()
    assert s.grad is not None


def test_saved_for_backward_is_the_input_alone() -> None:
    saved: list[Tensor] = []
    x, s = torch.randn(3, 256, requires_grad=True), (torch.rand(3) + 0.1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        for call, parameters in (
            (lambda: ops.fake_quantize_lsq(x, s, -8, 7, axis=0), 3),
            (lambda: ops.fake_quantize_affine(x, s, -s, 4, axis=0), 6),
            (lambda: ops.fake_quantize_minmax(x, 4), 0),
        ):
            saved.clear()
            call()
            assert sum(t.numel() for t in saved) == x.numel() + parameters
        for call in (lambda: ops.fake_quantize_statsq(x, 4), lambda: ops.fake_quantize_group(x)):
            saved.clear()
            call()
            assert not saved


def test_outputs_of_many_megabytes() -> None:
    """Their memory is asked for in large pages; the values are those of the parts."""
    x, s = torch.randn(2100, 1024), torch.rand(2100) + 0.1
    whole = ops.fake_quantize_lsq(x, s, -8, 7, axis=0)
    assert whole.nbytes > 8 << 20
    parts = [ops.fake_quantize_lsq(a, b, -8, 7, axis=0) for a, b in zip(x.split(300), s.split(300))]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(
        ops.fake_quantize_statsq(x, 3), torch.cat([ops.fake_quantize_statsq(a, 3) for a in x.split(300)])
    )


def test_levels_are_floats_of_their_names() -> None:
    """Sign, exponent and mantissa bits, with subnormal numbers, up to a power of two."""
    for name, (exponent, mantissa) in {"e1m2": (1, 2), "e2m1": (2, 1), "e3m0": (3, 0)}.items():
        bias = {"e1m2": 1, "e2m1": 1, "e3m0": 3}[name]
        values = []
        for code in range(8):
            e, m = code >> mantissa, code & ((1 << mantissa) - 1)
            fraction = m / (1 << mantissa)
            values.append(2.0 ** (1 - bias) * fraction if e == 0 else 2.0 ** (e - bias) * (1 + fraction))
        assert exponent + mantissa == 3 and tuple(values) == LEVELS[name]


# ------------------------------------------------------------------------------------------------- refusals


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


REFUSALS = [
    Refusal(
        "input", lambda: ops.fake_quantize_lsq(2.0, ones(), -8, 7), TypeError,
        "fake_quantize_lsq: input must be a tensor, got float",
    ),
    Refusal(
        "input_dtype", lambda: ops.fake_quantize_lsq(ones(2).int(), ones(), -8, 7), TypeError,
        "fake_quantize_lsq: input must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "scale_dtype", lambda: ops.fake_quantize_lsq(ones(2), ones(1).int(), -8, 7), TypeError,
        "fake_quantize_lsq: scale must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "scale_number", lambda: ops.fake_quantize_lsq(ones(2), 0.5, -8, 7), TypeError,
        "fake_quantize_lsq: scale must be a tensor, got float",
    ),
    Refusal(
        "scale_shape", lambda: ops.fake_quantize_lsq(ones(2, 3), ones(3), -8, 7), ValueError,
        "fake_quantize_lsq: scale must have shape [] or [1] where axis is not given, got [3]",
    ),
    Refusal(
        "scale_axis", lambda: ops.fake_quantize_lsq(ones(2, 3), ones(3), -8, 7, axis=0), ValueError,
        "fake_quantize_lsq: scale must have shape [2] (the size of axis 0 of input), got [3]",
    ),
    Refusal(
        "axis", lambda: ops.fake_quantize_lsq(ones(2, 3), ones(3), -8, 7, axis=2), ValueError,
        "fake_quantize_lsq: axis must be a dimension of input [2, 3], got 2",
    ),
    Refusal(
        "axis_type", lambda: ops.fake_quantize_lsq(ones(2, 3), ones(3), -8, 7, axis=1.0), TypeError,
        "fake_quantize_lsq: axis must be an integer, got 1.0",
    ),
    Refusal(
        "both", lambda: ops.fake_quantize_lsq(ones(2, 3), ones(3), -8, 7, axis=1, group_size=3), ValueError,
        "fake_quantize_lsq: axis and group_size exclude each other, got axis=1 and group_size=3",
    ),
    Refusal(
        "group_size", lambda: ops.fake_quantize_lsq(ones(2, 8), ones(2, 3), -8, 7, group_size=3), ValueError,
        "fake_quantize_lsq: group_size must be positive and divide the 8 columns of input, got 3",
    ),
    Refusal(
        "group_scale", lambda: ops.fake_quantize_lsq(ones(2, 8), ones(2, 3), -8, 7, group_size=4), ValueError,
        "fake_quantize_lsq: scale must have shape [2, 2] (a scale per group of 4), got [2, 3]",
    ),
    Refusal(
        "levels", lambda: ops.fake_quantize_lsq(ones(2), ones(), 7, -8), ValueError,
        "fake_quantize_lsq: low must be less than high, got 7 and -8",
    ),
    Refusal(
        "level_type", lambda: ops.fake_quantize_lsq(ones(2), ones(), -8.0, 7), TypeError,
        "fake_quantize_lsq: low must be an integer, got -8.0",
    ),
    Refusal(
        "level_size", lambda: ops.fake_quantize_lsq(ones(2), ones(), -8, 1 << 23), ValueError,
        "fake_quantize_lsq: high must be between -4194304 and 4194304, got 8388608",
    ),
    Refusal(
        "factor", lambda: ops.fake_quantize_lsq(ones(2), ones(), -8, 0), ValueError,
        "fake_quantize_lsq: gradient_scale must be given where high is not positive, got high=0",
    ),
    Refusal(
        "factor_type", lambda: ops.fake_quantize_lsq(ones(2), ones(), -8, 7, gradient_scale="n"), TypeError,
        "fake_quantize_lsq: gradient_scale must be a number, got 'n'",
    ),
    Refusal(
        "layout", lambda: module._lsq(ones(2, 3), ones(4), 1, -8, 7, None), ValueError,
        "fake_quantize_lsq: input must be divided evenly by its 4 scales of 1 neighbouring elements each, got shape [2, 3]",
    ),
    Refusal(
        "minimum", lambda: ops.fake_quantize_affine(ones(2, 3), ones(3), ones(2), 4, axis=1), ValueError,
        "fake_quantize_affine: minimum must have the shape of range, [3], got [2]",
    ),
    Refusal(
        "range", lambda: ops.fake_quantize_affine(ones(2, 3), ones(2), ones(2), 4, axis=1), ValueError,
        "fake_quantize_affine: range must have shape [3] (the size of axis 1 of input), got [2]",
    ),
    Refusal(
        "affine_bits", lambda: ops.fake_quantize_affine(ones(2, 3), ones(), ones(), 17), ValueError,
        "fake_quantize_affine: bits must be between 1 and 16, got 17",
    ),
    Refusal(
        "minmax_bits", lambda: ops.fake_quantize_minmax(ones(2, 3), 0), ValueError,
        "fake_quantize_minmax: bits must be between 1 and 16, got 0",
    ),
    Refusal(
        "minmax_group", lambda: ops.fake_quantize_minmax(ones(2, 3), 4, group_size=2), ValueError,
        "fake_quantize_minmax: group_size must be positive and divide the 3 columns of input, got 2",
    ),
    Refusal(
        "minmax_number", lambda: ops.fake_quantize_minmax(ones(), 4), ValueError,
        "fake_quantize_minmax: input must have shape [..., K], got []",
    ),
    Refusal(
        "statsq_bits", lambda: ops.fake_quantize_statsq(ones(2, 3), 9), ValueError,
        "fake_quantize_statsq: bits must be between 1 and 8, got 9",
    ),
    Refusal(
        "statsq_number", lambda: ops.fake_quantize_statsq(ones(), 4), ValueError,
        "fake_quantize_statsq: input must have shape [..., K], got []",
    ),
    Refusal(
        "format", lambda: ops.fake_quantize_group(ones(2, 256), "int5"), ValueError,
        "fake_quantize_group: format must be one of int4, int4_asymmetric, e1m2, e2m1, e3m0, got 'int5'",
    ),
    Refusal(
        "group", lambda: ops.fake_quantize_group(ones(2, 100)), ValueError,
        "fake_quantize_group: group_size must be positive and divide the 100 columns of input, got 256",
    ),
    Refusal(
        "outliers", lambda: ops.fake_quantize_group(ones(2, 8), group_size=4, outliers=4), ValueError,
        "fake_quantize_group: outliers must be between 0 and 3, got 4",
    ),
    Refusal(
        "seed", lambda: ops.fake_quantize_group(ones(2, 8), group_size=4, seed=-1), ValueError,
        "fake_quantize_group: seed must be between 0 and 2^63 - 1, got -1",
    ),
]  # fmt: skip


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_examples() -> None:
    check_examples(module)
