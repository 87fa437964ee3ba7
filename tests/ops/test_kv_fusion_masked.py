# SPDX-License-Identifier: Apache-2.0
"""Attention under a trained mask, and the cache that keeps what is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import ops
from cofire.ops import kv_fusion_masked
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
    mask: str = "hard",
    eps: float = 1e-6,
    parity: bool = False,
    backward: bool = False,
) -> Callable[[Random], Args]:
    """``mask``: hard (zeros and ones), soft, nothing or everything."""

    def make(rand: Random) -> Args:
        query, key, value = rand.normal(b, h, q, d), rand.normal(b, hkv, s, d), rand.normal(b, hkv, s, d)
        soft = rand.uniform(b, s)
        masks = {"hard": (soft < 0.5).float(), "soft": soft, "nothing": 0 * soft, "everything": soft.ceil()}
        grads = (rand.normal(b, h, q, d),) if backward else ()
        return *grads, query, key, value, masks[mask], causal, scale, eps, parity

    return make


#: b, h, hkv, q, s, d
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "odd": ((2, 3, 3, 7, 17, 5), {}),
    "grouped": ((2, 6, 2, 9, 33, 8), {"mask": "soft", "parity": True, "eps": 1e-3}),  # an eps that shows
    "full": ((1, 2, 1, 5, 19, 6), {"causal": False, "eps": 1e-3}),
    "dropped": ((1, 2, 2, 9, 9, 6), {"mask": "nothing"}),
    "decode": ((2, 4, 2, 1, 65, 16), {"mask": "everything"}),
    "square": ((1, 1, 1, 65, 65, 7), {"mask": "soft", "parity": True}),
    "one": ((1, 1, 1, 1, 1, 1), {}),
    "tasks": ((1, 2, 1, 150, 163, 4), {"eps": 1e-2}),  # blocks and tasks that end within a head
    "sharp": ((1, 2, 2, 6, 40, 8), {"scale": 4.0, "mask": "soft"}),  # most weights are nothing
    "squares": ((1, 4, 2, 150, 163, 32), {"mask": "soft", "eps": 1e-2}),  # some processors multiply on tiles
    "squares_parity": ((1, 2, 1, 70, 90, 64), {"parity": True, "eps": 1e-2}),
    "no_queries": ((1, 2, 2, 0, 4, 3), {}),
    "no_heads": ((1, 0, 0, 3, 4, 3), {}),
}
SECOND_TIER = ("square", "no_heads", "sharp", "one")
FORWARD, BACKWARD = (
    [
        Sample(
            f"masked_{name}{'_b' if backward else ''}",
            attention(*s, **o, backward=backward),
            full=name in SECOND_TIER,
            interpreted=not name.startswith("squares"),
        )
        for name, (s, o) in SHAPES.items()
    ]
    for backward in (False, True)
)
TINY = [
    Sample("masked_tiny", attention(2, 4, 2, 3, 5, 4, mask="soft")),
    Sample("masked_resized", attention(3, 6, 3, 4, 7, 5, mask="soft")),
]
TINY_BACKWARD = [
    Sample("masked_tiny_b", attention(2, 4, 2, 3, 5, 4, mask="soft", backward=True)),
    Sample("masked_resized_b", attention(3, 6, 3, 4, 7, 5, mask="soft", backward=True)),
]


def append(b: int, h: int, slots: int, d: int, *, part: bool = False) -> Callable[[Random], Args]:
    """``part``: of a larger cache."""

    def make(rand: Random) -> Args:
        keys, values, key, value = (
            rand.normal(2, b, h, slots + 3, d),
            rand.normal(b, h, slots, d),
            *rand.normal(2, b, h, 1, d),
        )
        keys = keys[1, :, :, 2 : 2 + slots] if part else keys[1, :, :, :slots].contiguous()
        lengths = (rand.uniform(b) * slots).int()
        return keys, values, lengths, key, value, rand.mask(b)

    return make


APPEND = [
    Sample("append_odd", append(5, 3, 7, 5)),
    Sample("append_part", append(3, 2, 4, 8, part=True)),
    Sample("append_one", append(1, 1, 1, 1), full=True),
    Sample("append_many", append(65, 17, 3, 63), full=True),
    Sample("append_no_rows", append(0, 2, 3, 4), full=True),
]
APPEND_TINY = [Sample("append_tiny", append(2, 3, 4, 5)), Sample("append_resized", append(3, 2, 5, 4))]

SUMMED = ("query", "key", "value", "mask")
CHECKS = [
    *check_op("masked_softmax_attention", FORWARD, tiny=TINY, wide=("mask",), sums=(*SUMMED, "output")),
    *check_op(
        "masked_softmax_attention_backward",
        BACKWARD,
        tiny=TINY_BACKWARD,
        wide=("mask",),
        sums=(*SUMMED, "grad", "grad_query", "grad_key", "grad_value", "grad_mask"),
    ),
    *check_op("kv_append_", APPEND, tiny=APPEND_TINY),
]


@pytest.mark.parametrize("check", CHECKS)
def test_operator(check: Callable[[], None]) -> None:
    check()


# ------------------------------------------------------------------------------------ masked_softmax_attention


def tensors(b: int = 2, h: int = 4, hkv: int = 2, n: int = 9, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    rand = Random("masked")
    return rand.normal(b, h, n, d), rand.normal(b, hkv, n, d), rand.normal(b, hkv, n, d)


def test_golden() -> None:
    """Two queries by hand: one sees itself alone, the other a dropped key and itself."""
    query = torch.tensor([[0.0], [1.0]]).view(1, 1, 2, 1)
    key, value = torch.tensor([[3.0], [1.0]]).view(1, 1, 2, 1), torch.tensor([[10.0], [20.0]]).view(1, 1, 2, 1)
    mask = torch.tensor([[0.0, 1.0]])
    e, eps = math.exp(1.0 - 3.0), 0.5  # of the second query: less the logit of the dropped key
    found = ops.masked_softmax_attention(query, key, value, mask, scale=1.0, eps=eps)
    first, second = 10 * (1 + eps / 2) / (1 + eps), (10 * eps / 2 + 20 * (e + eps / 2)) / (e + eps)
    torch.testing.assert_close(found.flatten(), torch.tensor([first, second]))
    found = ops.masked_softmax_attention(query, key, value, mask, scale=1.0, eps=eps, parity=True)
    torch.testing.assert_close(found.flatten(), torch.tensor([first + 20 * eps / 2 / (1 + eps), second]))


@pytest.mark.parametrize("causal", [False, True])
def test_of_all_tokens_it_is_the_attention_of_torch(causal: bool) -> None:
    query, key, value = tensors()
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    output = ops.masked_softmax_attention(*leaves, torch.ones(2, 9), causal=causal, eps=1e-9)
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)
    cotangent = Random("cotangent").normal(*output.shape)
    found, right = (torch.autograd.grad(y, leaves, cotangent) for y in (output, expected))
    for o, r in zip(found, right, strict=True):
        torch.testing.assert_close(o, r, rtol=1e-5, atol=5e-6)


def test_dropped_tokens_count_for_nobody_but_themselves() -> None:
    """As if they were not there, for the others."""
    query, key, value = tensors()
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1]).bool()
    found = ops.masked_softmax_attention(query, key, value, keep.expand(2, 9), eps=1e-12)
    alone = [x[:, :, keep] for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*alone, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found[:, :, keep], expected, rtol=1e-5, atol=2e-6)


def test_the_gradient_of_a_dropped_token_is_the_slope_towards_it() -> None:
    """Against the difference that a little of the token makes."""
    query, key, value = (x.double() for x in tensors())
    mask = (Random("drop").uniform(2, 9) < 0.5).double()
    cotangent = Random("cotangent").normal(*query.shape).double()

    def result(m: Tensor) -> Tensor:
        return (ops.masked_softmax_attention(query, key, value, m) * cotangent).sum()

    leaf = mask.clone().requires_grad_()
    (found,) = torch.autograd.grad(result(leaf), leaf)
    single = [x.float() for x in (query, key, value)]
    leaf = mask.float().requires_grad_()
    (kernel,) = torch.autograd.grad(ops.masked_softmax_attention(*single, leaf), leaf, cotangent.float())
    torch.testing.assert_close(kernel.double(), found, rtol=1e-4, atol=1e-4)
    dropped = (mask == 0).nonzero()
    assert len(dropped) > 4
    for b, j in dropped.tolist()[:5]:
        some = mask.clone()
        some[b, j] = 1e-6
        torch.testing.assert_close((result(some) - result(mask)) / 1e-6, found[b, j], rtol=1e-3, atol=1e-6)


def test_what_is_hidden_weighs_nothing_without_parity() -> None:
    query, key, value = tensors()
    far = value.clone()
    far[:, :, -1] = 1e30
    mask = torch.zeros(2, 9)
    a, b = (ops.masked_softmax_attention(query, key, v, mask) for v in (value, far))
    assert torch.equal(a[:, :, :-1], b[:, :, :-1])
    b = ops.masked_softmax_attention(query, key, far, mask, parity=True)
    assert (b[:, :, :-1] > 1e20).all()


def test_a_dropped_outlier_leaves_equal_weights_of_what_is_seen() -> None:
    """It is the largest, so that nothing else but eps is left, as in the released code; gradients stay finite."""
    query, key = torch.ones(1, 1, 3, 1), torch.tensor([200.0, 0.0, 1.0]).view(1, 1, 3, 1)
    value = torch.tensor([3.0, 6.0, 9.0]).view(1, 1, 3, 1)
    leaves = [x.requires_grad_() for x in (query, key, value, torch.tensor([[0.0, 1.0, 1.0]]))]
    output = ops.masked_softmax_attention(*leaves, scale=1.0)
    torch.testing.assert_close(output[0, 0, 2], torch.tensor([6.0]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), leaves))


def test_what_is_not_a_number_stays_so() -> None:
    query, key, value = tensors(1, 1, 1)
    query[0, 0, 2, 1] = math.nan
    output = ops.masked_softmax_attention(query, key, value, torch.ones(1, 9))
    assert output[0, 0].isnan().any(-1).tolist() == [i == 2 for i in range(9)]


# ------------------------------------------------------------------------------------------------- kv_append_


def test_rows_go_on_from_what_they_kept() -> None:
    """Twenty steps of three rows that decide differently, against lists."""
    rand, slots = Random("steps"), 20
    keys, values, lengths = torch.zeros(3, 2, slots, 4), torch.zeros(3, 2, slots, 4), torch.zeros(3, dtype=torch.int32)
    kept: list[list[Tensor]] = [[], [], []]
    for _ in range(slots):
        key, value, keep = rand.normal(3, 2, 1, 4), rand.normal(3, 2, 1, 4), rand.mask(3)
        seen = ops.kv_append_(keys, values, lengths, key, value, keep)
        for b in range(3):
            there = torch.stack([*kept[b], key[b, :, 0]], 1)
            assert seen[b] == there.shape[1]
            assert torch.equal(keys[b, :, : int(seen[b])], there)
            assert torch.equal(values[b, :, int(seen[b]) - 1], value[b, :, 0])
            kept[b] += [key[b, :, 0]] if keep[b] else []
    assert lengths.tolist() == [len(k) for k in kept]


@pytest.mark.parametrize("length", [3, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_full_cache_is_refused_before_anything_is_written(length: int, dtype: torch.dtype) -> None:
    keys, values = torch.zeros(2, 1, 3, 2, dtype=dtype), torch.zeros(2, 1, 3, 2, dtype=dtype)
    lengths, x = torch.tensor([0, length], dtype=torch.int32), torch.ones(2, 1, 1, 2, dtype=dtype)
    with pytest.raises(RuntimeError, match="kv_append_: lengths must be from 0 to less than the slots of the cache"):
        ops.kv_append_(keys, values, lengths, x, x, torch.ones(2, dtype=torch.bool))
    assert not keys.any() and not values.any() and lengths.tolist() == [0, length]


# --------------------------------------------------------------------------------------------------- refusals


def _attend(**changes: Any) -> Any:
    args: dict[str, Any] = {
        "query": torch.zeros(1, 4, 3, 8),
        "key": torch.zeros(1, 2, 5, 8),
        "value": torch.zeros(1, 2, 5, 8),
        "mask": torch.zeros(1, 5),
    }
    return ops.masked_softmax_attention(**(args | changes))


def _append(**changes: Any) -> Any:
    args: dict[str, Any] = {
        "cache_key": torch.zeros(2, 3, 5, 8),
        "cache_value": torch.zeros(2, 3, 5, 8),
        "lengths": torch.zeros(2, dtype=torch.int32),
        "key": torch.zeros(2, 3, 1, 8),
        "value": torch.zeros(2, 3, 1, 8),
        "keep": torch.zeros(2, dtype=torch.bool),
    }
    return ops.kv_append_(**(args | changes))


NAME = "masked_softmax_attention"
REFUSALS = [
    Refusal(
        "rank",
        lambda: _attend(query=torch.zeros(4, 3, 8)),
        ValueError,
        f"{NAME}: query must have shape [B, H, q, d], got [4, 3, 8]",
    ),
    Refusal(
        "groups",
        lambda: _attend(key=torch.zeros(1, 3, 5, 8)),
        ValueError,
        f"{NAME}: key must have shape [1, a divisor of 4, S, 8], got [1, 3, 5, 8]",
    ),
    Refusal(
        "mask",
        lambda: _attend(mask=torch.zeros(1, 3)),
        ValueError,
        f"{NAME}: mask must have shape [1, 5], got [1, 3]",
    ),
    Refusal(
        "mask_dtype",
        lambda: _attend(mask=torch.zeros(1, 5, dtype=torch.int32)),
        TypeError,
        f"{NAME}: mask must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "too_many",
        lambda: _attend(query=torch.zeros(1, 4, 6, 8), causal=False),
        ValueError,
        f"{NAME}: queries are the last of the 5 tokens, got 6 queries",
    ),
    Refusal("eps", lambda: _attend(eps=0.0), ValueError, f"{NAME}: eps must be positive and finite, got 0.0"),
    Refusal("parity", lambda: _attend(parity=1), TypeError, f"{NAME}: parity must be a bool, got 1"),
    Refusal(
        "cache",
        lambda: _append(cache_value=torch.zeros(2, 3, 4, 8)),
        ValueError,
        "kv_append_: cache_value must have shape [2, 3, 5, 8], got [2, 3, 4, 8]",
    ),
    Refusal(
        "key",
        lambda: _append(key=torch.zeros(2, 3, 2, 8)),
        ValueError,
        "kv_append_: key must have shape [2, 3, 1, 8], got [2, 3, 2, 8]",
    ),
    Refusal(
        "key_dtype",
        lambda: _append(key=torch.zeros(2, 3, 1, 8, dtype=torch.float16)),
        TypeError,
        "kv_append_: key must have the dtype of cache_key (torch.float32), got torch.float16",
    ),
    Refusal(
        "lengths_dtype",
        lambda: _append(lengths=torch.zeros(2, dtype=torch.int64)),
        TypeError,
        "kv_append_: lengths must be int32, got torch.int64",
    ),
    Refusal(
        "keep_dtype",
        lambda: _append(keep=torch.zeros(2)),
        TypeError,
        "kv_append_: keep must be bool, got torch.float32",
    ),
    Refusal(
        "lengths",
        lambda: _append(lengths=torch.zeros(3, dtype=torch.int32)),
        ValueError,
        "kv_append_: lengths must have shape [2], one for each row of the batch, got [3]",
    ),
]


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_examples() -> None:
    check_examples(kv_fusion_masked)
