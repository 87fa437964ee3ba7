# SPDX-License-Identifier: Apache-2.0
"""Attention that returns scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cofire
from cofire import native, ops
from cofire.ops import kv_fusion_attention
from helpers import Args, Random, Refusal, Sample, check_examples, check_op, refusals


def attention(
    b: int,
    h: int,
    hkv: int,
    q: int,
    s: int,
    d: int,
    *,
    causal: bool = True,
    scale: float = 0.4,
    window: int | None = None,
    normalize: bool = False,
    backward: str = "",
) -> Callable[[Random], Args]:
    """``backward``: with the gradient of the logarithm, where there is an ``l``."""

    def make(rand: Random) -> Args:
        query, key, value = rand.normal(b, h, q, d), rand.normal(b, hkv, s, d), rand.normal(b, hkv, s, d)
        if backward:
            grads = rand.normal(b, h, q, d), rand.normal(b, h, q) if "l" in backward else None
            return *grads, query, key, value, causal, scale
        return query, key, value, causal, scale, q if window is None else window, normalize

    return make


def cached(d: int, backward: bool = False) -> Callable[[Random], Args]:
    """Keys and values that are parts of a larger cache."""

    def make(rand: Random) -> Args:
        query, *_ = attention(2, 4, 2, 5, 1, d)(rand)
        key, value = rand.normal(2, 2, 3, 40, d)[:, :, :2, 3:20].unbind(0)
        if backward:
            return rand.normal(2, 4, 5, d), None, query, key, value, True, 0.3
        return query, key, value, True, 0.3, 3, True

    return make


#: b, h, hkv, q, s, d
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "odd": ((2, 3, 3, 7, 17, 5), {"window": 4}),
    "grouped": ((2, 6, 2, 9, 33, 8), {"normalize": True, "window": 5}),
    "full": ((1, 2, 1, 5, 19, 6), {"causal": False, "normalize": True}),
    "more_queries": ((1, 2, 2, 9, 4, 6), {"causal": False, "window": 2}),
    "decode": ((2, 4, 2, 1, 65, 16), {}),
    "decode_parts": ((1, 7, 1, 1, 1100, 21), {}),  # all of few queries' tails: of rows, keys, features
    "square": ((1, 1, 1, 65, 65, 7), {"normalize": True}),
    "one": ((1, 1, 1, 1, 1, 1), {}),
    "tasks": ((1, 2, 1, 150, 163, 4), {"window": 100}),  # blocks and tasks that end within a head
    "wide": ((1, 1, 1, 40, 2500, 4), {}),  # blocks of fewer queries
    "sharp": ((1, 2, 2, 6, 40, 8), {"scale": 9.0}),  # most weights are nothing
    "squares": ((1, 4, 2, 150, 163, 32), {"window": 100}),  # of 32 features: some processors multiply on tiles
    "squares_full": ((1, 2, 1, 45, 300, 64), {"causal": False, "normalize": True}),
    "squares_few": ((2, 2, 2, 3, 9, 96), {}),
    "no_queries": ((1, 2, 2, 0, 4, 3), {}),
    "no_heads": ((1, 0, 0, 3, 4, 3), {}),
    "no_window": ((1, 2, 2, 3, 4, 3), {"window": 0, "normalize": True}),
}
SECOND_TIER = ("square", "no_heads", "no_window", "more_queries")
OF_FORWARD = ("window", "normalize")
FORWARD = [
    *(
        Sample(f"attention_{n}", attention(*s, **o), full=n in SECOND_TIER, interpreted=not n.startswith("squares"))
        for n, (s, o) in SHAPES.items()
    ),
    Sample("attention_cached", cached(8)),
    Sample("attention_cached_squares", cached(32)),
]
BACKWARD = [
    Sample(
        f"attention_{name}_b",
        attention(*s, **{n: v for n, v in o.items() if n not in OF_FORWARD}, backward="l" if i % 2 else "g"),
        full=name in SECOND_TIER,
        interpreted=not name.startswith("squares"),
    )
    for i, (name, (s, o)) in enumerate(SHAPES.items())
]
BACKWARD.append(Sample("attention_cached_squares_b", cached(32, backward=True)))
TINY = [
    Sample("attention_tiny", attention(2, 4, 2, 3, 5, 4, window=2)),
    Sample("attention_resized", attention(3, 6, 3, 4, 7, 5, window=2)),
]
TINY_BACKWARD = [
    Sample("attention_tiny_b", attention(2, 4, 2, 3, 5, 4, backward="l")),
    Sample("attention_resized_b", attention(3, 6, 3, 4, 7, 5, backward="l")),
]
SUMMED = ("query", "key", "value")

CHECKS = [
    *check_op("attention_with_scores", FORWARD, tiny=TINY, sums=(*SUMMED, "output", "lse", "scores")),
    *check_op(
        "attention_with_scores_backward",
        BACKWARD,
        tiny=TINY_BACKWARD,
        wide=("grad_lse",),
        sums=(*SUMMED, "grad", "grad_lse", "grad_query", "grad_key", "grad_value"),
    ),
]


@pytest.mark.parametrize("check", CHECKS)
def test_operator(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_attention_of_torch(causal: bool) -> None:
    """Against PyTorch's own, with repeated heads and an explicit mask; gradients too."""
    rand = Random("torch")
    query, key, value = rand.normal(2, 6, 9, 8), rand.normal(2, 2, 21, 8), rand.normal(2, 2, 21, 8)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    output, *_ = ops.attention_with_scores(*leaves, causal=causal)
    cotangent = rand.normal(*output.shape)
    found = torch.autograd.grad(output, leaves, cotangent)
    wide = [x.double().requires_grad_() for x in (query, key, value)]
    mask = torch.ones(9, 21, dtype=torch.bool).tril(21 - 9) if causal else None
    repeated = [wide[0], *(x.repeat_interleave(3, 1) for x in wide[1:])]
    expected = torch.nn.functional.scaled_dot_product_attention(*repeated, attn_mask=mask)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-6)
    for o, r in zip(found, torch.autograd.grad(expected, wide, cotangent.double()), strict=True):
        torch.testing.assert_close(o.double(), r, rtol=0, atol=5e-6)


def test_scores_are_sums_of_probabilities() -> None:
    """All weights of a query sum up to one; the mean of equal weights is the weight."""
    rand = Random("sums")
    query, key, value = rand.normal(2, 6, 9, 8), rand.normal(2, 2, 21, 8), rand.normal(2, 2, 21, 8)
    *_, scores = ops.attention_with_scores(query, key, value)
    torch.testing.assert_close(scores.sum(-1), torch.full((2, 2), 9 * 3.0))
    *_, last = ops.attention_with_scores(query, key, value, window=4)
    torch.testing.assert_close(last.sum(-1), torch.full((2, 2), 4 * 3.0))
    *_, alone = ops.attention_with_scores(query[:, :, -4:], key, value)
    torch.testing.assert_close(last, alone)
    *_, mean = ops.attention_with_scores(0 * query, key, value, causal=False, normalize=True)
    torch.testing.assert_close(mean, torch.full((2, 2, 21), 1 / 21))


def test_lse_merges_attention_to_parts() -> None:
    """Attention to all keys from that to two parts of them, and its gradient through the logarithms."""
    rand = Random("merge")
    query, key, value = (rand.normal(1, 2, n, 8).requires_grad_() for n in (5, 12, 12))
    halves = [ops.attention_with_scores(query, key[:, :, i], value[:, :, i], causal=False) for i in PARTS]
    share = torch.softmax(torch.stack([lse for _, lse, _ in halves]), 0)[..., None]
    merged = sum(s * output for s, (output, *_) in zip(share, halves, strict=True))
    whole, *_ = ops.attention_with_scores(query, key, value, causal=False)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=2e-6)
    cotangent, leaves = rand.normal(*whole.shape), (query, key, value)
    for o, r in zip(
        torch.autograd.grad(merged, leaves, cotangent), torch.autograd.grad(whole, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(o, r, rtol=1e-5, atol=5e-6)


PARTS = (slice(0, 5), slice(5, 12))


def test_scores_have_no_gradient() -> None:
    query, key, value = (Random("none").normal(1, 1, 3, 4).requires_grad_() for _ in range(3))
    output, lse, scores = ops.attention_with_scores(query, key, value)
    assert output.requires_grad
    assert lse.requires_grad
    assert not scores.requires_grad


def test_what_is_not_a_number_stays_so() -> None:
    query, key, value = (Random("nan").normal(1, 1, 9, 4) for _ in range(3))
    query[0, 0, 2, 1] = math.nan
    output, lse, scores = ops.attention_with_scores(query, key, value)
    assert output[0, 0].isnan().any(-1).tolist() == [i == 2 for i in range(9)]
    assert lse[0, 0].isnan().tolist() == [i == 2 for i in range(9)]
    assert scores[0, 0, :3].isnan().all()


def _attend(**changes: Any) -> Any:
    args: dict[str, Any] = {
        "query": torch.zeros(1, 4, 3, 8),
        "key": torch.zeros(1, 2, 5, 8),
        "value": torch.zeros(1, 2, 5, 8),
    }
    return ops.attention_with_scores(**(args | changes))


def _like(*shape: int) -> dict[str, Tensor]:
    return {"key": torch.zeros(shape), "value": torch.zeros(shape)}


NAME = "attention_with_scores"
REFUSALS = [
    Refusal(
        "rank",
        lambda: _attend(query=torch.zeros(4, 3, 8)),
        ValueError,
        f"{NAME}: query must have shape [B, H, q, d], got [4, 3, 8]",
    ),
    Refusal(
        "dtype",
        lambda: _attend(query=torch.zeros(1, 4, 3, 8, dtype=torch.int32)),
        TypeError,
        f"{NAME}: query must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "same",
        lambda: _attend(key=torch.zeros(1, 2, 5, 8, dtype=torch.float16)),
        TypeError,
        f"{NAME}: key must have the dtype of query (torch.float32), got torch.float16",
    ),
    Refusal(
        "groups",
        lambda: _attend(**_like(1, 3, 5, 8)),
        ValueError,
        f"{NAME}: key must have shape [1, a divisor of 4, S, 8], got [1, 3, 5, 8]",
    ),
    Refusal(
        "value",
        lambda: _attend(value=torch.zeros(1, 2, 6, 8)),
        ValueError,
        f"{NAME}: value must have shape [1, 2, 5, 8], got [1, 2, 6, 8]",
    ),
    Refusal(
        "no_keys",
        lambda: _attend(**_like(1, 2, 0, 8)),
        ValueError,
        f"{NAME}: key must have at least one token and one feature, got [1, 2, 0, 8]",
    ),
    Refusal(
        "too_many",
        lambda: _attend(**_like(1, 2, 2, 8)),
        ValueError,
        f"{NAME}: causal queries are the last of the 2 tokens, got 3 queries",
    ),
    Refusal("scale", lambda: _attend(scale=-1.0), ValueError, f"{NAME}: scale must be positive and finite, got -1.0"),
    Refusal("causal", lambda: _attend(causal=1), TypeError, f"{NAME}: causal must be a bool, got 1"),
    Refusal("window", lambda: _attend(window=-1), ValueError, f"{NAME}: window must not be negative, got -1"),
    Refusal("normalize", lambda: _attend(normalize=None), TypeError, f"{NAME}: normalize must be a bool, got None"),
]


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_examples() -> None:
    check_examples(kv_fusion_attention)


def test_explain_says_how_the_products_are_made() -> None:
    if native.STATUS.variant is None:
        pytest.skip(f"no compiled kernels: {native.STATUS.reason}")
    found, rand = {}, Random("explain")
    for name in ("decode", "odd", "squares"):
        sizes, options = SHAPES[name]
        for dtype in (torch.float32, torch.bfloat16):
            query, key, value, *_ = attention(*sizes, **options)(rand)
            ((call),) = cofire.explain("attention_with_scores", query.to(dtype), key.to(dtype), value.to(dtype))
            found[name, dtype] = call["kernel"].rpartition(": ")[2]
    tiles = "products of bf16 on AMX"
    few, library = "vector by vector, for one query of each head", "products of the library in fp32"
    last = found.pop(("squares", torch.bfloat16))
    assert found == {key: few if key[0] == "decode" else library for key in found}
    assert last in (tiles, library)  # as the processor has it
    for name, more in (("attention_with_scores", ()), ("masked_softmax_attention", (torch.ones(1, 163),))):
        query, key, value = (rand.normal(1, n, t, 32).bfloat16() for n, t in ((4, 150), (2, 163), (2, 163)))
        query.requires_grad_()

        def both_ways(name: str = name, args: tuple[Tensor, ...] = (query, key, value, *more)) -> None:
            found = getattr(ops, name)(*args)
            (found if isinstance(found, Tensor) else found[0]).sum().backward()

        calls = {call["operator"]: call["kernel"].rpartition(": ")[2] for call in cofire.explain(both_ways)}
        assert calls == {name: last, f"{name}_backward": last}
