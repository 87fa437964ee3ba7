# SPDX-License-Identifier: Apache-2.0
"""Softmax attention with binary queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import native, ops
from cofire.ops import shift_add_softmax
from cofire.ops.shift_add_attention import _pack, _unpack
from cofire.registry import FLOATS, OPERATORS
from helpers import Args, Random, Refusal, Sample, calls_of_reference, check_examples, check_op, refusals, threads

OPERATOR = OPERATORS["binary_softmax_attention"]


def codes_of(rand: Random, bits: int, *shape: int) -> Tensor:
    return _pack(rand.mask(*shape, bits))


def attention(
    b: int,
    h: int,
    n: int,
    m: int,
    d: int,
    bits: int,
    *,
    scale: float | None = None,
    kind: str = "sign",
    causal: bool = False,
    links: str = "qk",
    backward: bool = False,
) -> Callable[[Random], Args]:
    """Without its letter in ``links`` a link is None."""

    def make(rand: Random) -> Args:
        query, key, value = codes_of(rand, bits, b, h, n), codes_of(rand, bits, b, h, m), rand.normal(b, h, m, d)
        zeros = [torch.zeros(b, h, t, bits) if which in links else None for which, t in (("q", n), ("k", m))]
        options = (bits, 1 / math.sqrt(bits) if scale is None else scale, kind, causal)
        if backward:
            return rand.normal(b, h, n, d), query, key, value, *zeros, *options
        return query, key, value, *zeros, *options, "highest"

    return make


def opposite(rand: Random) -> Args:
    """Distances of 0 and of 64 in one block, which reach over all of a table."""
    query, key, value, *rest = attention(1, 1, 5, 9, 6, 64, scale=0.01)(rand)
    key[..., :5] = query
    key[..., 5:] = ~query[..., :4]
    return query, key, value, *rest


#: b, h, n, m, d, bits
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "odd": ((2, 3, 17, 7, 5, 9), {}),
    "one": ((1, 1, 1, 1, 1, 1), {}),
    "binary": ((1, 2, 9, 33, 17, 16), {"kind": "binary"}),
    "causal": ((2, 1, 13, 13, 8, 17), {"causal": True}),
    "causal_wide": ((1, 1, 5, 150, 3, 33), {"causal": True}),  # a block that none sees
    "causal_long": ((1, 1, 135, 130, 3, 8), {"causal": True}),  # queries that see all, tiles, a block in part
    "blocks": ((1, 1, 50, 259, 18, 64), {}),  # tiles and blocks, each with a rest
    "sharp": ((1, 1, 6, 300, 4, 64), {"scale": 2.0}),  # most weights are below the least number of fp32
    "flat": ((1, 1, 4, 140, 20, 33), {"scale": 1e-3}),
    "no_keys": ((1, 2, 3, 0, 4, 8), {}),
    "no_queries": ((1, 2, 0, 3, 4, 8), {}),
    "no_features": ((1, 1, 2, 3, 0, 8), {}),
}
SECOND_TIER = ("causal_wide", "flat", "no_features")
FORWARD = [
    *(Sample(f"softmax_{name}", attention(*s, **o), full=name in SECOND_TIER) for name, (s, o) in SHAPES.items()),
    Sample("softmax_opposite", opposite),
    Sample("softmax_no_links", attention(1, 2, 9, 8, 4, 4, links="")),
]
BACKWARD = [
    *(
        Sample(f"softmax_{name}_b", attention(*s, **o, backward=True), full=name in SECOND_TIER)
        for name, (s, o) in SHAPES.items()
    ),
    Sample("softmax_key_link_b", attention(1, 2, 9, 8, 4, 4, links="k", backward=True)),
]
TINY = [
    Sample("softmax_tiny", attention(2, 2, 3, 5, 4, 6, causal=True)),
    Sample("softmax_resized", attention(3, 3, 4, 2, 5, 6, causal=True)),
]
TINY_BACKWARD = [
    Sample("softmax_tiny_b", attention(2, 2, 3, 5, 4, 6, causal=True, backward=True)),
    Sample("softmax_resized_b", attention(3, 3, 4, 2, 5, 6, causal=True, backward=True)),
]
SUMMED = ("value", "query_link", "key_link")

CHECKS = [
    *check_op("binary_softmax_attention", FORWARD, tiny=TINY, sums=(*SUMMED, "output 0")),
    *check_op(
        "binary_softmax_attention_backward",
        BACKWARD,
        tiny=TINY_BACKWARD,
        sums=(*SUMMED, "grad", "grad_value", "grad_query_link", "grad_key_link"),
        by_library=True,
    ),
]


@pytest.mark.parametrize("check", CHECKS)
def test_operator(check: Callable[[], None]) -> None:
    check()


def relative_error(args: Args, found: Tensor) -> float:
    """Of the largest, by its mean square."""
    exact = OPERATOR.reference(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
    return ((found.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


HIGH: dict[str, tuple[Any, ...]] = {
    **{name: s for name, s in SHAPES.items() if not name.startswith("no")},
    "long": ((1, 1, 7, 3000, 16, 64), {}),
    "long_sharp": ((1, 1, 7, 1500, 16, 64), {"scale": 1.0}),
    "long_flat": ((1, 1, 7, 1500, 16, 64), {"scale": 1e-3}),
    "long_binary": ((1, 1, 7, 1500, 16, 10), {"kind": "binary"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", HIGH)
def test_high_precision_is_what_it_says(name: str, dtype: torch.dtype) -> None:
    """16 bits and an exact sum: an error of 2e-4 or so, of fp16 values that of their last bit besides."""
    shape, options = HIGH[name]
    args = attention(*shape, **options)(Random(name))
    args = (*(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args[:-1]), "high")
    found = ops.binary_softmax_attention(
        *args[:3], bits=args[5], scale=args[6], kind=args[7], causal=args[8], precision="high"
    )
    assert found.dtype == dtype
    assert relative_error(args, found) <= (4e-4 if dtype == torch.float32 else 6e-4)


def test_high_precision_keeps_the_scale_of_each_feature() -> None:
    """Features of any size, one of zeros, and one that stands out in a block, do not disturb each other."""
    rand = Random("scales")
    args = list(attention(1, 1, 20, 400, 5, 32, links="")(rand))
    args[2] = args[2] * torch.tensor([1e-20, 1.0, 1e20, 0.0, 1.0])
    args[2][0, 0, 7, 4] = 1e4
    found = ops.binary_softmax_attention(*args[:3], bits=32, precision="high")
    for i in (0, 1, 2):
        one = (*args[:2], args[2][..., i : i + 1], *args[3:])
        assert relative_error(one, found[..., i : i + 1]) <= 4e-4
    assert not found[..., 3].any()
    # what stands out costs the values of its own block their last digits, not those of others
    exact = OPERATOR.reference(*args[:2], args[2].double(), *args[3:])[..., 4]
    assert (found[..., 4] - exact).abs().max() <= 1e4 / 2**13 * 128 / 400


def test_high_precision_passes_on_what_is_not_finite() -> None:
    args = list(attention(1, 1, 3, 200, 4, 16, links="")(Random("not finite")))
    args[2][0, 0, 150, 1], args[2][0, 0, 3, 2] = math.nan, math.inf
    found = ops.binary_softmax_attention(*args[:3], bits=16, precision="high")
    assert found.isfinite().all(dim=(0, 1, 2)).tolist() == [True, False, False, True]
    assert found[..., 1].isnan().all()


def test_high_precision_weights_sum_up_to_one() -> None:
    """Constant values come back, whatever the weights were rounded to."""
    query, key, *_ = attention(1, 1, 9, 500, 1, 64)(Random("constant"))
    found = ops.binary_softmax_attention(query, key, torch.full((1, 1, 500, 3), 0.75), bits=64, precision="high")
    torch.testing.assert_close(found, torch.full_like(found, 0.75), rtol=1e-5, atol=0)


@pytest.mark.skipif(native.STATUS.variant is None, reason="no compiled kernels")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_kernel_serves_and_does_not_depend_on_threads(precision: str) -> None:
    for dtype in FLOATS:
        args = list(attention(2, 1, 101, 300, 20, 24, causal=dtype == torch.float16)(Random("threads")))
        args = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        args[-1] = precision
        with calls_of_reference(OPERATOR) as calls:
            first = OPERATOR.overload(*args)
        assert not calls
        for count in (1, 2, 3):
            with threads(count):
                assert torch.equal(OPERATOR.overload(*args), first)
        strided = [a.transpose(-1, -2).contiguous().transpose(-1, -2) if isinstance(a, Tensor) else a for a in args]
        assert torch.equal(OPERATOR.overload(*strided), first)


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_attention_of_signs(causal: bool) -> None:
    """Against PyTorch's own on -1 and 1, with gradients that are twice those of the signs."""
    rand = Random("signs")
    bits, value = 24, rand.normal(2, 3, 30, 8)
    query, key = (codes_of(rand, bits, 2, 3, 30) for _ in range(2))
    links = [torch.zeros(2, 3, 30, bits, requires_grad=True) for _ in range(2)]
    leaf = value.clone().requires_grad_()
    out = ops.binary_softmax_attention(
        query, key, leaf, bits=bits, causal=causal, query_link=links[0], key_link=links[1]
    )
    cotangent = rand.normal(*out.shape)
    found = torch.autograd.grad(out, [leaf, *links], cotangent)
    signs = [(2 * _unpack(c, bits) - 1).double().requires_grad_() for c in (query, key)]
    wide = value.double().requires_grad_()
    expected_out = torch.nn.functional.scaled_dot_product_attention(*signs, wide, is_causal=causal)
    to_value, *to_signs = torch.autograd.grad(expected_out, [wide, *signs], cotangent.double())
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=1e-6)
    for o, r in zip(found, (to_value, 2 * to_signs[0], 2 * to_signs[1]), strict=True):
        torch.testing.assert_close(o.double(), r, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bits", [5, 33])
def test_other_bits_of_a_word_are_ignored(bits: int) -> None:
    rand = Random(f"other bits {bits}")
    codes, value = codes_of(rand, bits, 1, 1, 9), rand.normal(1, 1, 9, 8)
    noisy = codes | ~torch.zeros_like(codes) << bits
    assert not torch.equal(noisy, codes)
    for precision in ("highest", "high"):
        found, expected = (
            ops.binary_softmax_attention(c, c, value, bits=bits, precision=precision) for c in (noisy, codes)
        )
        assert torch.equal(found, expected)


def _attend(**changes: Any) -> Any:
    args: dict[str, Any] = {
        "query": torch.zeros(1, 2, 5, dtype=torch.int16),
        "key": torch.zeros(1, 2, 3, dtype=torch.int16),
        "value": torch.ones(1, 2, 3, 4),
        "bits": 6,
    }
    return ops.binary_softmax_attention(**(args | changes))


NAME = "binary_softmax_attention"
REFUSALS = [
    Refusal(
        "rank",
        lambda: _attend(value=torch.ones(2, 3, 4)),
        ValueError,
        f"{NAME}: value must have shape [B, H, M, d], got [2, 3, 4]",
    ),
    Refusal(
        "value",
        lambda: _attend(value=torch.ones(1, 2, 3, 4, dtype=torch.int32)),
        TypeError,
        f"{NAME}: value must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "word",
        lambda: _attend(bits=17),
        TypeError,
        f"{NAME}: query must be torch.int32 for codes of 17 bits, got torch.int16",
    ),
    Refusal("bits", lambda: _attend(bits=65), ValueError, f"{NAME}: bits must be between 1 and 64, got 65"),
    Refusal("no_bits", lambda: _attend(bits=0), ValueError, f"{NAME}: bits must be between 1 and 64, got 0"),
    Refusal(
        "query",
        lambda: _attend(query=torch.zeros(2, 2, 5, dtype=torch.int16)),
        ValueError,
        f"{NAME}: query must have shape [1, 2, N], got [2, 2, 5]",
    ),
    Refusal(
        "key",
        lambda: _attend(key=torch.zeros(1, 2, 4, dtype=torch.int16)),
        ValueError,
        f"{NAME}: key must have shape [1, 2, 3], got [1, 2, 4]",
    ),
    Refusal(
        "link",
        lambda: _attend(query_link=torch.zeros(1, 2, 3, 6)),
        ValueError,
        f"{NAME}: query_link must have shape [1, 2, 5, 6], got [1, 2, 3, 6]",
    ),
    Refusal(
        "link_dtype",
        lambda: _attend(key_link=torch.zeros(1, 2, 3, 6, dtype=torch.float16)),
        TypeError,
        f"{NAME}: key_link must have the dtype of value (torch.float32), got torch.float16",
    ),
    Refusal("kind", lambda: _attend(kind="x"), ValueError, f"{NAME}: kind must be one of binary, sign, got 'x'"),
    Refusal(
        "precision",
        lambda: _attend(precision="medium"),
        ValueError,
        f"{NAME}: precision must be one of highest, high, got 'medium'",
    ),
    Refusal("scale", lambda: _attend(scale=0.0), ValueError, f"{NAME}: scale must be positive and finite, got 0.0"),
    Refusal("causal", lambda: _attend(causal=1), TypeError, f"{NAME}: causal must be a bool, got 1"),
]


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_examples() -> None:
    check_examples(shift_add_softmax)
