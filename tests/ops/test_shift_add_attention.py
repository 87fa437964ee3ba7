# SPDX-License-Identifier: Apache-2.0
"""Binary codes of queries and keys, and attention by addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import ops
from cofire.ops import shift_add_attention
from cofire.ops.shift_add_attention import _pack, _unpack
from cofire.registry import OPERATORS
from helpers import Args, Random, Refusal, Sample, check_examples, check_op, providers, refusals

EPS = 1e-6
CONSTANTS = ("anchors", "center", "projection")


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


# ------------------------------------------------------------------------------------------------ hash_encode


def hashed(b: int, h: int, n: int, d: int, m: int, bits: int) -> Callable[[Random], Args]:
    def make(rand: Random) -> Args:
        return (
            rand.normal(b, h, n, d),
            unit(rand.normal(h, m, d)),
            0.6 + 0.1 * rand.uniform(h, m),
            rand.normal(h, bits, m),
            EPS,
        )

    return make


def with_zero_rows(rand: Random) -> Args:
    input, *rest = hashed(1, 2, 19, 8, 5, 12)(rand)
    input[0, :, 3::5] = 0
    return input, *rest


HASHED = [
    Sample("hash_odd", hashed(2, 3, 17, 7, 5, 9)),
    Sample("hash_one", hashed(1, 1, 1, 2, 3, 1)),
    Sample("hash_16", hashed(1, 2, 33, 32, 25, 16)),
    Sample("hash_17", hashed(1, 1, 16, 16, 6, 17)),
    Sample("hash_33", hashed(1, 1, 35, 9, 11, 33), full=True),
    Sample("hash_64", hashed(1, 1, 31, 24, 12, 64)),
    Sample("hash_chunks", hashed(1, 1, 530, 5, 4, 8)),  # more than one sum
    Sample("hash_sets", hashed(7, 2, 9, 8, 4, 8)),  # more sets than threads
    Sample("hash_zero_rows", with_zero_rows),
    Sample("hash_no_tokens", hashed(2, 1, 0, 8, 4, 8)),
    Sample("hash_no_batch", hashed(0, 1, 4, 8, 4, 8), full=True),
]
HASHED_TINY = [Sample("hash_tiny", hashed(2, 2, 5, 3, 4, 6)), Sample("hash_resized", hashed(3, 2, 4, 3, 4, 6))]


def hash_backward_of(make: Callable[[Random], Args]) -> Callable[[Random], Args]:
    def backward(rand: Random) -> Args:
        input, anchors, center, projection, eps = make(rand)
        link, _, gate, sigma = OPERATORS["hash_encode"].reference(input, anchors, center, projection, eps)
        return rand.normal(*link.shape), input, anchors, projection, gate, sigma, eps

    return backward


HASH_BACKWARD = [Sample(f"{s.name}_b", hash_backward_of(s.make), s.full) for s in HASHED]
HASH_BACKWARD_TINY = [Sample(f"{s.name}_b", hash_backward_of(s.make)) for s in HASHED_TINY]

# ---------------------------------------------------------------------------------------------- binary_encode


def binary(b: int, h: int, n: int, d: int, threshold: bool = False) -> Callable[[Random], Args]:
    return lambda rand: (rand.normal(b, h, n, d), 0.1 * rand.normal(h) if threshold else None, EPS)


BINARY = [
    Sample("binary_odd", binary(2, 3, 17, 7)),
    Sample("binary_given", binary(2, 3, 17, 7, True)),
    Sample("binary_one", binary(1, 1, 1, 2)),
    *(Sample(f"binary_{d}", binary(1, 2, 9, d, True), full=d == 63) for d in (16, 17, 33, 63, 64)),
    Sample("binary_chunks", binary(1, 2, 530, 3)),
    Sample("binary_no_tokens", binary(2, 1, 0, 8)),
    # exactly the threshold, and zero rows: not above
    Sample("binary_ties", lambda rand: (torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]]), torch.tensor([0.0]), EPS)),
]
BINARY_TINY = [
    Sample("binary_tiny", binary(2, 2, 5, 3, True)),
    Sample("binary_resized", binary(3, 2, 4, 3, True)),
]


def binary_backward(b: int, h: int, n: int, d: int) -> Callable[[Random], Args]:
    return lambda rand: (rand.normal(b, h, n, d), rand.normal(b, h, n, d), EPS)


BINARY_BACKWARD = [
    Sample("binary_odd_b", binary_backward(2, 3, 17, 7)),
    Sample("binary_64_b", binary_backward(1, 2, 9, 64)),
    Sample("binary_none_b", binary_backward(1, 2, 0, 4)),
    # the ends of the window pass, a zero row has a gradient
    Sample("binary_ends_b", lambda rand: (rand.normal(1, 1, 3, 2), torch.tensor([[[[1.0, 0], [0, -1], [0, 0]]]]), 0.5)),
]
BINARY_BACKWARD_TINY = [
    Sample("binary_tiny_b", binary_backward(2, 3, 3, 4)),
    Sample("binary_resized_b", binary_backward(3, 2, 5, 4)),
]

# ------------------------------------------------------------------------------------ binary_linear_attention


def codes_of(rand: Random, bits: int, *shape: int) -> Tensor:
    return _pack(rand.mask(*shape, bits))


def attention(
    b: int, h: int, n: int, d: int, bits: int, taps: int = 9, *, links: str = "qk", backward: bool = False
) -> Callable[[Random], Args]:
    """A link of 0 (no gradient goes there) is None."""

    def make(rand: Random) -> Args:
        query, key = (codes_of(rand, bits, b, h, n) for _ in range(2))
        value = rand.normal(b, h, n, d)
        weight = rand.normal(h, taps) if taps else None
        zeros = [torch.zeros(b, h, n, bits) if which in links else None for which in "qk"]
        grad = (rand.normal(b, h, n, d),) if backward else ()
        return (*grad, query, key, value, weight, *zeros, bits, EPS)

    return make


SHAPES: dict[str, tuple[Any, ...]] = {
    "odd": (2, 3, 17, 7, 5),
    "d8": (1, 2, 13, 8, 16),
    "d16": (1, 2, 21, 16, 9, 5),
    "d32": (1, 1, 30, 32, 16),
    "d64": (1, 1, 19, 64, 17, 3),
    "d128": (1, 1, 9, 128, 4),
    "one": (1, 1, 1, 1, 1, 1),
    "bits_33": (1, 1, 18, 4, 33),
    "bits_64": (1, 1, 18, 12, 64),
    "no_weight": (1, 2, 11, 9, 8, 0),
    "chunks": (1, 1, 1027, 3, 6),  # more than one sum
    "sets": (7, 1, 5, 8, 4),  # more sets than threads
    "no_tokens": (1, 2, 0, 8, 4),
}
SECOND_TIER = ("d16", "d64", "bits_33", "sets")
ATTENTION = [
    *(Sample(f"attention_{name}", attention(*shape), full=name in SECOND_TIER) for name, shape in SHAPES.items()),
    Sample("attention_no_links", attention(1, 2, 9, 8, 4, links="")),
]
ATTENTION_TINY = [
    Sample("attention_tiny", attention(2, 2, 5, 3, 6, 3)),
    Sample("attention_resized", attention(3, 3, 4, 2, 6, 3)),
]
ATTENTION_BACKWARD = [
    *(
        Sample(f"attention_{name}_b", attention(*shape, backward=True), full=name in SECOND_TIER)
        for name, shape in SHAPES.items()
    ),
    Sample("attention_key_link_b", attention(1, 2, 9, 8, 4, links="k", backward=True)),
]
ATTENTION_BACKWARD_TINY = [
    Sample("attention_tiny_b", attention(2, 2, 5, 3, 6, 3, backward=True)),
    Sample("attention_resized_b", attention(3, 3, 4, 2, 6, 3, backward=True)),
]
SUMMED = ("value", "weight", "query_link", "key_link", "output 0")

# ----------------------------------------------------------------------------------------- hamming_similarity


def similar(bits: int, kind: str, *shape: int, keys: int = 5) -> Callable[[Random], Args]:
    return lambda rand: (codes_of(rand, bits, *shape), codes_of(rand, bits, *shape[:-1], keys), bits, kind)


SIMILAR = [
    *(
        Sample(f"similar_{bits}_{kind}", similar(bits, kind, 2, 3, 7))
        for bits in (1, 16, 17, 64)
        for kind in ("sign", "binary")
    ),
    Sample("similar_parts", similar(16, "sign", 70, keys=1025)),
    Sample("similar_no_keys", similar(16, "sign", 3, keys=0)),
    Sample("similar_no_queries", similar(33, "binary", 2, 0)),
]
SIMILAR_TINY = [
    Sample("similar_tiny", similar(9, "sign", 2, 3)),
    Sample("similar_resized", similar(9, "sign", 3, 4, keys=6)),
]

CHECKS = [
    *check_op("hamming_similarity", SIMILAR, tiny=SIMILAR_TINY),
    *check_op("binary_linear_attention", ATTENTION, tiny=ATTENTION_TINY, sums=SUMMED),
    *check_op(
        "binary_linear_attention_backward",
        ATTENTION_BACKWARD,
        tiny=ATTENTION_BACKWARD_TINY,
        sums=(*SUMMED, "grad_value", "grad_weight", "grad_query_link", "grad_key_link"),
    ),
    *check_op(
        "hash_encode",
        HASHED,
        tiny=HASHED_TINY,
        constants=CONSTANTS,
        wide=CONSTANTS,
        sums=("sigma", "input"),
        straight_through=True,
    ),
    *check_op(
        "hash_encode_backward",
        HASH_BACKWARD,
        tiny=HASH_BACKWARD_TINY,
        constants=("anchors", "projection", "sigma"),
        wide=("anchors", "projection", "sigma"),
        sums={"output 0": 16},
    ),
    *check_op(
        "binary_encode",
        BINARY,
        tiny=BINARY_TINY,
        constants=("threshold",),
        wide=("threshold",),
        sums=("mean",),
        straight_through=True,
    ),
    *check_op("binary_encode_backward", BINARY_BACKWARD, tiny=BINARY_BACKWARD_TINY),
]


@pytest.mark.parametrize("check", CHECKS)
def test_operator(check: Callable[[], None]) -> None:
    check()


def test_the_hash_is_that_of_the_differences() -> None:
    """The closed forms against the broadcast differences, and their derivative by autograd."""
    input, anchors, center, projection, _ = (
        t.double() if isinstance(t, Tensor) else t for t in hashed(2, 2, 40, 8, 6, 10)(Random("differences"))
    )
    input.requires_grad_()
    distance = (unit(input)[:, :, :, None] - anchors[:, None]).square().sum(-1)
    sigma = distance.mean((-1, -2), keepdim=True)
    y = (torch.exp(-distance / (2 * sigma)) - center[:, None]) @ projection.transpose(-1, -2)
    inside = (y > 0) & (y < 1)
    cotangent = Random("cotangent").normal(*y.shape).double()
    (expected,) = torch.autograd.grad((torch.where(inside, y, 0) * cotangent).sum(), input)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        leaf = input.detach().to(dtype).requires_grad_()
        codes, link = ops.hash_encode(leaf, *(t.to(dtype) for t in (anchors, center, projection)))
        assert torch.equal(codes, _pack(y > 0))
        assert not link.any()
        assert link.untyped_storage().nbytes() == leaf.element_size(), "a link takes no memory"
        (found,) = torch.autograd.grad(link, leaf, cotangent.to(dtype))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())
    assert 0.05 < inside.double().mean() < 0.95, "a window that decides nothing"


def test_binary_codes_and_their_window() -> None:
    """Both ends of the window pass; the threshold is the mean of the whole tensor, over heads too."""
    x = torch.tensor([[[[3.0, 4.0], [-4.0, 3.0]], [[1.0, 0.0], [0.0, -1.0]]]], requires_grad=True)
    codes, mean, link = ops.binary_encode(x)
    assert codes.tolist() == [[[3, 2], [1, 0]]]
    torch.testing.assert_close(mean, torch.tensor([0.3, 0.0]))
    (grad,) = torch.autograd.grad(link.sum(), x)
    # a gradient of ones, cut by the window, without its part along the row
    torch.testing.assert_close(
        grad, torch.tensor([[[[0.032, -0.024], [0.096, 0.128]], [[0.0, 1.0], [1.0, 0.0]]]]), rtol=0, atol=1e-6
    )
    # with thresholds of their own, samples do not depend on each other
    both = Random("both").normal(2, 2, 9, 5)
    threshold = torch.tensor([0.1, -0.1])
    together = ops.binary_encode(both, threshold)[0]
    assert torch.equal(together[:1], ops.binary_encode(both[:1], threshold)[0])


@pytest.mark.parametrize("bits", [1, 16, 17, 32, 33, 64])
def test_words_hold_their_bits(bits: int) -> None:
    features = Random(f"word {bits}").mask(3, 50, bits).reshape(3, 50, bits)
    features[0] = True  # the sign bit of a full word
    codes = _pack(features)
    assert codes.dtype == (torch.int16 if bits <= 16 else torch.int32 if bits <= 32 else torch.int64)
    assert torch.equal(_unpack(codes, bits).bool(), features)


def test_golden_sums() -> None:
    """Which values a bit sums up, and which sums a code selects."""
    codes = torch.tensor([[[1, 3, 2]]], dtype=torch.int16)
    value = torch.tensor([[[[1.0], [2.0], [4.0]]]])
    bits = _unpack(codes, 2).float()
    sums = bits.transpose(-1, -2) @ value
    assert sums.flatten().tolist() == [3, 6]
    assert (bits @ sums).flatten().tolist() == [3, 9, 6]
    # an eps far above the squared norms leaves t, scaled down
    out = ops.binary_linear_attention(codes, codes, value, bits=2, eps=2.0**60) * 2.0**30
    torch.testing.assert_close(out.flatten(), torch.tensor([1.45493, 3.86479, 3.90986]), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "provider", [p.name for p in providers(OPERATORS["binary_linear_attention"]) if p.device == "cpu"]
)
def test_golden_sums_of_the_operator(provider: str) -> None:
    """K^T V = [3, 6] by queries of one bit each, and what the codes select of it, [3, 9, 6]: as every kernel adds them up."""
    run = next(p for p in providers(OPERATORS["binary_linear_attention"]) if p.name == provider)
    key = torch.tensor([[[1, 3, 2]]], dtype=torch.int16)
    value = torch.tensor([[[[1.0], [2.0], [4.0]]]])
    for query, expected in (([1, 2, 0], [3, 6, 0]), ([1, 3, 2], [3, 9, 6])):
        codes = torch.tensor([[query]], dtype=torch.int16)
        (out,) = run(codes, key, value, None, None, None, 2, 2.0**60)
        found = (out * 2.0**30 - value / 2) * torch.pi
        torch.testing.assert_close(found.flatten(), torch.tensor(expected).float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("bits", [5, 17, 33])
def test_other_bits_of_a_word_are_ignored(bits: int) -> None:
    rand = Random(f"other bits {bits}")
    codes, value = codes_of(rand, bits, 1, 1, 9), rand.normal(1, 1, 9, 8)
    noisy = codes | ~torch.zeros_like(codes) << bits
    assert not torch.equal(noisy, codes)
    for function in (
        lambda c: ops.binary_linear_attention(c, c, value, bits=bits),
        lambda c: ops.hamming_similarity(c, codes, bits=bits),
        lambda c: ops.hamming_similarity(codes, c, bits=bits, kind="binary"),
    ):
        assert torch.equal(function(noisy), function(codes))


def test_attention_trains_its_encoder() -> None:
    """The gradient from the output through the link to the input, against straight-through features by autograd."""
    input, anchors, center, projection, _ = hashed(2, 2, 23, 8, 6, 10)(Random("encoder"))
    value, weight = Random("encoder values").normal(2, 2, 23, 12), Random("encoder taps").normal(2, 9)
    cotangent = Random("encoder cotangent").normal(2, 2, 23, 12)
    leaf = input.requires_grad_()
    codes, link = ops.hash_encode(leaf, anchors, center, projection)
    out = ops.binary_linear_attention(codes, codes, value, weight, bits=10, query_link=link, key_link=link)
    (found,) = torch.autograd.grad(out, leaf, cotangent)

    wide = input.detach().double().requires_grad_()
    distance = (unit(wide)[:, :, :, None] - anchors.double()[:, None]).square().sum(-1)
    sigma = distance.mean((-1, -2), keepdim=True)
    y = (torch.exp(-distance / (2 * sigma)) - center.double()[:, None]) @ projection.double().transpose(-1, -2)
    features = (y > 0).double() + torch.where((y > 0) & (y < 1), y - y.detach(), 0)
    v = value.double()
    t = v / 2 + features @ (features.transpose(-1, -2) @ v) / torch.pi
    residual = torch.nn.functional.conv2d(v, weight.double()[:, None, :, None], padding=(4, 0), groups=2)
    expected_out = t / (t.square().sum(-1, keepdim=True) + EPS).sqrt() + residual
    (expected,) = torch.autograd.grad(expected_out, wide, cotangent.double())
    torch.testing.assert_close(out.double(), expected_out.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def _attend(**changes: Any) -> Any:
    codes = torch.zeros(1, 2, 3, dtype=torch.int16)
    args: dict[str, Any] = {
        "query": codes,
        "key": codes,
        "value": torch.ones(1, 2, 3, 4),
        "weight": torch.ones(2, 9),
        "bits": 6,
    }
    return ops.binary_linear_attention(**(args | changes))


def _hash(**changes: Any) -> Any:
    args: dict[str, Any] = {
        "input": torch.ones(2, 1, 3, 4),
        "anchors": torch.ones(1, 5, 4),
        "center": torch.zeros(1, 5),
        "projection": torch.ones(1, 6, 5),
    } | changes
    return ops.hash_encode(**args)


REFUSALS = [
    Refusal(
        "hash_rank",
        lambda: _hash(input=torch.ones(3, 4)),
        ValueError,
        "hash_encode: input must have shape [B, H, N, d], got [3, 4]",
    ),
    Refusal(
        "hash_dtype",
        lambda: _hash(input=torch.ones(2, 1, 3, 4, dtype=torch.int32)),
        TypeError,
        "hash_encode: input must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "hash_anchors",
        lambda: _hash(anchors=torch.ones(1, 5, 3)),
        ValueError,
        "hash_encode: anchors must have shape [1, m, 4] with m at least 1, got [1, 5, 3]",
    ),
    Refusal(
        "hash_center",
        lambda: _hash(center=torch.ones(1, 4)),
        ValueError,
        "hash_encode: center must have shape [1, 5], got [1, 4]",
    ),
    Refusal(
        "hash_projection",
        lambda: _hash(projection=torch.ones(1, 6, 4)),
        ValueError,
        "hash_encode: projection must have shape [1, b, 5], got [1, 6, 4]",
    ),
    Refusal(
        "hash_bits",
        lambda: _hash(projection=torch.ones(1, 65, 5)),
        ValueError,
        "hash_encode: the bits of a code (rows of projection) must be between 1 and 64, got 65",
    ),
    Refusal("hash_eps", lambda: _hash(eps=0.0), ValueError, "hash_encode: eps must be positive and finite, got 0.0"),
    Refusal(
        "attention_word",
        lambda: _attend(bits=17),
        TypeError,
        "binary_linear_attention: query must be torch.int32 for codes of 17 bits, got torch.int16",
    ),
    Refusal(
        "attention_bits",
        lambda: _attend(bits=65),
        ValueError,
        "binary_linear_attention: bits must be between 1 and 64, got 65",
    ),
    Refusal(
        "attention_key",
        lambda: _attend(key=torch.zeros(1, 2, 4, dtype=torch.int16)),
        ValueError,
        "binary_linear_attention: key must have shape [1, 2, 3], got [1, 2, 4]",
    ),
    Refusal(
        "attention_weight",
        lambda: _attend(weight=torch.ones(2, 8)),
        ValueError,
        "binary_linear_attention: weight must have shape [2, taps] with odd taps, got [2, 8]",
    ),
    Refusal(
        "attention_link",
        lambda: _attend(key_link=torch.zeros(1, 2, 3, 4)),
        ValueError,
        "binary_linear_attention: key_link must have shape [1, 2, 3, 6], got [1, 2, 3, 4]",
    ),
    Refusal(
        "attention_dtype",
        lambda: _attend(weight=torch.ones(2, 9, dtype=torch.float64)),
        TypeError,
        "binary_linear_attention: weight must have the dtype of value (torch.float32), got torch.float64",
    ),
    Refusal(
        "similar_kind",
        lambda: ops.hamming_similarity(
            torch.zeros(3, dtype=torch.int16), torch.zeros(3, dtype=torch.int16), bits=3, kind="x"
        ),
        ValueError,
        "hamming_similarity: kind must be one of binary, sign, got 'x'",
    ),
    Refusal(
        "similar_word",
        lambda: ops.hamming_similarity(torch.zeros(3, dtype=torch.int16), torch.zeros(3, dtype=torch.int32), bits=3),
        TypeError,
        "hamming_similarity: key must be torch.int16 for codes of 3 bits, got torch.int32",
    ),
    Refusal(
        "similar_shape",
        lambda: ops.hamming_similarity(
            torch.zeros(2, 3, dtype=torch.int16), torch.zeros(3, 3, dtype=torch.int16), bits=3
        ),
        ValueError,
        "hamming_similarity: key must have shape [2, M], got [3, 3]",
    ),
    Refusal(
        "binary_bits",
        lambda: ops.binary_encode(torch.ones(1, 1, 2, 65)),
        ValueError,
        "binary_encode: the bits of a code (features of input) must be between 1 and 64, got 65",
    ),
    Refusal(
        "binary_threshold",
        lambda: ops.binary_encode(torch.ones(1, 2, 3, 4), torch.ones(3)),
        ValueError,
        "binary_encode: threshold must have shape [2], got [3]",
    ),
]


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_examples() -> None:
    check_examples(shift_add_attention)
