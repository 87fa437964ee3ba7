# SPDX-License-Identifier: Apache-2.0
"""Selection, gathering and fusion of cached keys and values."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cofire
from cofire import native, ops
from cofire.ops import kv_fusion
from cofire.ops.kv_fusion import rows_at
from helpers import Args, Random, Refusal, Sample, check_examples, check_op, refusals, threads

GOLDEN_SCORES = torch.tensor([[[0.5, 0.1, 0.9, 0.2, 0.9, 0.3]]])

# -------------------------------------------------------------------------------------------------- kv_select


def select(
    b: int, h: int, s: int, heavy: int, merged: int, local: int = 0, levels: int = 0
) -> Callable[[Random], Args]:
    """With ``levels`` the scores take so few values that most are tied."""

    def make(rand: Random) -> Args:
        scores = rand.normal(b, h, s)
        return (scores * levels).round() / 8 if levels else scores, heavy, merged, local

    return make


def extremes(rand: Random) -> Args:
    scores = rand.normal(1, 3, 40)
    scores[0, 0, ::3], scores[0, 0, 1::3] = math.inf, -math.inf
    scores[0, 1] = 0.0
    scores[0, 1, ::2] = -0.0  # equal to zero
    scores[0, 2, :35] = math.inf  # the last ones stay all the same
    return scores, 17, 9, 4


SELECT = [
    Sample("select_odd", select(2, 3, 17, 7, 3, 2)),
    Sample("select_ties", select(2, 2, 129, 60, 33, levels=1)),
    Sample("select_long", select(1, 2, 1100, 512, 129, 16, levels=40)),
    Sample("select_extremes", extremes),
    Sample("select_all", select(1, 2, 9, 9, 0, 9)),
    Sample("select_none", select(1, 2, 9, 0, 9)),
    Sample("select_one", select(1, 1, 1, 0, 1)),
    Sample("select_empty", select(2, 0, 5, 2, 1), full=True),
    Sample("select_no_tokens", select(1, 2, 0, 0, 0), full=True),
]
SELECT_TINY = [Sample("select_tiny", select(2, 2, 7, 3, 2, 1)), Sample("select_resized", select(3, 2, 9, 4, 3, 2))]

# ------------------------------------------------------------------------------------------------- kv_gather_


def gather(
    b: int, h: int, s: int, d: int, heavy: int, padding: int, slots: int | None = None, part: bool = False
) -> Callable[[Random], Args]:
    """``part``: tensors that are parts of larger caches."""

    def make(rand: Random) -> Args:
        order = rand.uniform(b, h, s).argsort(-1)
        kept, rest = (i.sort(-1).values.to(torch.int32) for i in (order[..., :heavy], order[..., heavy:]))
        size = heavy if slots is None else slots
        if part:
            cache, new = rand.normal(2, b, h, s + 3, d), rand.normal(2, b, h, size + 5, d)
            return *new[:, :, :, 2 : size + 2].unbind(0), *cache[:, :, :, 1 : s + 1].unbind(0), kept, rest, padding
        return *(rand.normal(b, h, n, d) for n in (size, size, s, s)), kept, rest, padding

    return make


GATHER = [
    Sample("gather_odd", gather(2, 3, 17, 5, 7, 2, slots=9)),
    Sample("gather_part", gather(2, 2, 33, 16, 12, 4, slots=20, part=True)),
    Sample("gather_no_heavy", gather(1, 2, 9, 8, 0, 1)),
    Sample("gather_no_rest", gather(1, 2, 9, 8, 9, 0)),
    Sample("gather_one", gather(1, 1, 1, 1, 1, 3)),
    Sample("gather_long", gather(1, 3, 700, 64, 300, 10), full=True),
    Sample("gather_empty", gather(0, 2, 3, 4, 1, 1), full=True),
    Sample("gather_no_features", gather(1, 2, 3, 0, 1, 1), full=True),
]
GATHER_TINY = [
    Sample("gather_tiny", gather(2, 2, 5, 3, 2, 1, slots=4)),
    Sample("gather_resized", gather(3, 2, 7, 4, 3, 1, slots=5)),
]

# ---------------------------------------------------------------------------------------------------- kv_fuse


def fuse(
    b: int, h: int, n: int, d: int, merged: int, taps: int, *, bias: bool = True, scale: float = 0.3, backward: str = ""
) -> Callable[[Random], Args]:
    """``backward``: with the gradient of the tokens, where there is an ``x``."""

    def make(rand: Random) -> Args:
        tokens = torch.nn.functional.pad(rand.normal(b, h, n, 2 * d), (0, 0, taps // 2, taps // 2))
        weight, constant = scale * rand.normal(merged, 2 * d, taps), rand.normal(merged) if bias else None
        pick = rand.uniform(b, h, max(n, merged)).argsort(-1)[..., :merged].sort(-1).values.clamp(max=n - 1)
        args = tokens, weight, constant, torch.tensor(0.37), pick.to(torch.int32)
        if backward:
            return rand.normal(b, h, merged, d), rand.normal(b, h, merged, d), *args, "x" in backward
        return args

    return make


#: b, h, n, d, merged, taps
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "odd": ((2, 3, 17, 5, 7, 5), {}),
    "no_bias": ((1, 2, 33, 4, 9, 3), {"bias": False}),
    "one": ((1, 1, 1, 1, 1, 1), {}),
    "short": ((1, 2, 3, 2, 3, 9), {}),  # a convolution wider than the tokens
    "slots": ((1, 2, 40, 2, 150, 3), {}),  # tiles of slots
    "heads": ((2, 9, 9, 2, 4, 3), {}),
    "together": ((1, 5, 150, 4, 70, 3), {"scale": 0.1}),  # more rows of all heads than one product takes, tap by tap
    "together_frozen": ((1, 5, 150, 4, 70, 3), {"scale": 0.1}),
    "sharp": ((1, 1, 40, 8, 6, 7), {"scale": 2.0}),
    "filter": ((1, 2, 41, 16, 7, 9), {"scale": 0.1}),
    "no_heads": ((0, 2, 5, 3, 4, 3), {}),
    "frequencies": ((1, 9, 70, 16, 66, 21), {"scale": 0.1}),  # enough work for them; heads, segments, slots in parts
    # whole squares of slots and features, as AMX multiplies them in bf16; tokens that are no multiple of one
    "squares": ((2, 3, 45, 16, 32, 5), {"scale": 0.1}),
    "more_squares": ((1, 5, 97, 32, 96, 21), {"scale": 0.03, "bias": False}),
    "squares_of_one_tap": ((1, 2, 33, 16, 32, 1), {"scale": 0.1}),
    "squares_of_three_taps": ((1, 2, 33, 16, 32, 3), {"scale": 0.1}),
    "whole_squares": ((1, 3, 32, 16, 32, 5), {"scale": 0.1}),
    "two_whole_squares": ((1, 2, 64, 16, 32, 9), {"scale": 0.1}),
    "squares_of_many_taps": ((1, 2, 33, 16, 32, 63), {"scale": 0.03}),  # more than tokens
    "wide_squares": ((2, 1, 131, 48, 64, 13), {"scale": 0.05}),  # 9 tiles of windows in two parts, 13 taps in three
    "many_squares": ((1, 110, 600, 16, 32, 7), {"scale": 0.1}),  # of more heads than are taken at a time
}
#: The gradient of the tokens is not asked for.
SQUARES = (
    "squares",
    "more_squares",
    "squares_of_one_tap",
    "squares_of_three_taps",
    "whole_squares",
    "two_whole_squares",
    "squares_of_many_taps",
    "wide_squares",
    "many_squares",
)
WITHOUT_TOKENS = ("no_bias", "slots", "filter", "together_frozen", *SQUARES)
LATER = ("no_heads", "heads")
LARGE = ("together", "together_frozen", "frequencies", *SQUARES)


def when(name: str) -> dict[str, bool]:
    return {"full": name in LATER, "interpreted": name not in LARGE}


FUSE = [Sample(f"fuse_{name}", fuse(*s, **o), **when(name)) for name, (s, o) in SHAPES.items()]
FUSE_BACKWARD = [
    Sample(f"fuse_{name}_b", fuse(*s, **o, backward="-" if name in WITHOUT_TOKENS else "x"), **when(name))
    for name, (s, o) in SHAPES.items()
]
FUSE_TINY = [Sample("fuse_tiny", fuse(2, 2, 5, 3, 2, 3)), Sample("fuse_resized", fuse(3, 2, 7, 2, 4, 5))]
FUSE_TINY_BACKWARD = [
    Sample("fuse_tiny_b", fuse(2, 2, 5, 3, 2, 3, backward="x")),
    Sample("fuse_resized_b", fuse(3, 2, 7, 2, 4, 5, backward="x")),
]
SUMMED = ("tokens", "weight", "bias", "gate")

CHECKS = [
    # what a bias adds to all slots of a token alike cancels: its gradient is near zero
    *check_op("kv_fuse", FUSE, tiny=FUSE_TINY, sums=dict.fromkeys((*SUMMED, "key", "value"), 16) | {"bias": 128}),
    *check_op(
        "kv_fuse_backward",
        FUSE_BACKWARD,
        tiny=FUSE_TINY_BACKWARD,
        sums=dict.fromkeys((*SUMMED, "grad_key", "grad_value", "grad_tokens", "grad_weight", "grad_gate"), 16)
        | {"bias": 128, "grad_bias": 128},
    ),
    *check_op("kv_select", SELECT, tiny=SELECT_TINY),
    *check_op("kv_gather_", GATHER, tiny=GATHER_TINY),
]


@pytest.mark.parametrize("check", CHECKS)
def test_operator(check: Callable[[], None]) -> None:
    check()


def test_golden_selection() -> None:
    """Two equal scores, and the rest in the order of positions."""
    heavy, rest, pick = ops.kv_select(GOLDEN_SCORES, 2, 2)
    assert (heavy.tolist(), rest.tolist(), pick.tolist()) == ([[[2, 4]]], [[[0, 1, 3, 5]]], [[[0, 3]]])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter: there is a GPU")
def test_the_launcher_refuses_nan_with_the_same_sentence() -> None:
    """On a GPU the kernel asserts it (:mod:`test_aot`)."""
    select = pytest.importorskip("cofire_kernels.kv_fusion.select")
    scores = torch.rand(1, 2, 20)
    scores[0, 1, 3] = torch.nan
    with pytest.raises(ValueError, match="^kv_select: scores must not be NaN, got 1 NaN among 40 scores$"):
        select.kv_select(scores, 4, 4, 0)


def test_selection_is_what_its_words_say() -> None:
    """Against sorting of pairs, row by row, in plain Python."""
    scores, heavy, merged, local = select(2, 2, 61, 23, 11, 5, levels=3)(Random("words"))
    found = ops.kv_select(scores, heavy, merged, local=local)
    for b in range(2):
        for h in range(2):
            row = scores[b, h].tolist()
            order = sorted(range(61 - local), key=lambda i: (-row[i], i))
            kept = sorted([*order[: heavy - local], *range(61 - local, 61)])
            rest = [i for i in range(61) if i not in kept]
            best = sorted(sorted(range(len(rest)), key=lambda i: (-row[rest[i]], i))[:merged])
            assert [x[b, h].tolist() for x in found] == [kept, rest, best]


def test_gathering_moves_every_token_once() -> None:
    """To its place, in a part of a cache, of which nothing else is written."""
    rand = Random("moves")
    scores, key, value = rand.uniform(2, 3, 40), rand.normal(2, 3, 40, 8), rand.normal(2, 3, 40, 8)
    heavy, rest, _ = ops.kv_select(scores, 15, 5)
    cache = torch.full((2, 2, 3, 30, 8), 7.0)
    tokens = ops.kv_gather_(cache[0, :, :, 4:24], cache[1, :, :, 4:24], key, value, heavy, rest, padding=2)
    assert torch.equal(cache[0, :, :, 4:19], rows_at(key, heavy))
    assert torch.equal(cache[1, :, :, 4:19], rows_at(value, heavy))
    assert (cache[:, :, :, :4] == 7).all()
    assert (cache[:, :, :, 19:] == 7).all()
    assert torch.equal(tokens[:, :, 2:-2], torch.cat([rows_at(key, rest), rows_at(value, rest)], -1))
    assert not tokens[:, :, :2].any()
    assert not tokens[:, :, -2:].any()


def test_an_index_outside_is_refused() -> None:
    key = torch.ones(1, 1, 4, 2)
    for wrong in (-1, 4):
        heavy, rest = torch.zeros(1, 1, 1, dtype=torch.int32), torch.tensor([[[1, wrong]]], dtype=torch.int32)
        with pytest.raises((IndexError, RuntimeError), match="outside|out of bounds"):
            ops.kv_gather_(key.clone(), key.clone(), key, key, heavy, rest)


def compressed(gate: float) -> tuple[Tensor, Tensor]:
    """The golden example: six tokens in four slots, with a convolution of zeros."""
    key = torch.arange(1.0, 7.0).view(1, 1, 6, 1)
    heavy, rest, pick = ops.kv_select(GOLDEN_SCORES, 2, 2)
    cache = torch.zeros(2, 1, 1, 4, 1)
    tokens = ops.kv_gather_(cache[0], cache[1], key, 10 * key, heavy, rest, padding=1)
    cache[0, :, :, 2:], cache[1, :, :, 2:] = ops.kv_fuse(
        tokens, torch.zeros(2, 2, 3), torch.zeros(2), torch.tensor(gate), pick
    )
    return cache[0].flatten(), cache[1].flatten()


def test_golden_compression() -> None:
    key, value = compressed(0.5)
    assert key.tolist() == [3, 5, 2.125, 4.625]
    assert value.tolist() == [30, 50, 21.25, 46.25]


def test_without_the_gate_the_best_stay_as_they_are() -> None:
    """The set that keeping the four largest scores would leave."""
    key, value = compressed(0.0)
    assert key.tolist() == [3, 5, 1, 6]
    assert value.tolist() == [30, 50, 10, 60]
    best = GOLDEN_SCORES.flatten().topk(4).indices + 1
    assert sorted(key.tolist()) == sorted(best.tolist())


def test_slots_are_within_the_hull_of_the_tokens() -> None:
    tokens, weight, bias, _, pick = fuse(2, 2, 20, 4, 6, 5)(Random("hull"))
    for gate in (0.0, 0.4, 1.0):
        key, value = ops.kv_fuse(tokens, weight, bias, torch.tensor(gate), pick)
        slots, rest = torch.cat([key, value], -1), tokens[:, :, 2:-2]
        assert (slots <= rest.amax(2, keepdim=True) + 1e-6).all()
        assert (slots >= rest.amin(2, keepdim=True) - 1e-6).all()


@pytest.mark.parametrize(
    ("n", "d", "merged", "taps"),
    [(20, 4, 6, 5), (150, 8, 64, 3), (301, 16, 64, 21)],
    ids=["few tokens", "tap by tap", "by frequencies"],
)
def test_it_is_the_convolution_of_torch(n: int, d: int, merged: int, taps: int) -> None:
    """Step by step with one-hot rows, as the paper's code has it, and its gradients; the same for any number of threads."""
    tokens, weight, bias, gate, pick = fuse(1, 3, n, d, merged, taps, scale=0.1)(Random("steps"))
    half = taps // 2
    cotangent = Random("cotangent").normal(3, merged, 2 * d)
    results = []
    for count in (1, 3):
        leaves = [x.clone().requires_grad_() for x in (tokens, weight, bias, gate)]
        with threads(count):
            key, value = ops.kv_fuse(*leaves, pick)
            found = torch.autograd.grad([key, value], leaves, [cotangent[None, ..., :d], cotangent[None, ..., d:]])
        results.append((key, value, *found))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    key, value, *found = results[0]
    wide = [x.double().requires_grad_() for x in (tokens, weight, bias, gate)]
    convolution = torch.nn.functional.conv1d(
        wide[0][0, :, half : half + n].transpose(1, 2), wide[1], wide[2], padding=half
    )
    # (the padding is zero, so that its gradient is compared where there are tokens)
    one_hot = torch.nn.functional.one_hot(pick[0].long(), n).double()
    mixing = (1 - wide[3]) * one_hot + wide[3] * torch.softmax(torch.relu(convolution), -1)
    expected = mixing @ wide[0][0, :, half : half + n]
    torch.testing.assert_close(torch.cat([key, value], -1)[0].double(), expected, rtol=0, atol=1e-5)
    right = torch.autograd.grad(expected, wide, cotangent.double())
    rest = (0, slice(None), slice(half, half + n))
    torch.testing.assert_close(found[0][rest].double(), right[0][rest], rtol=0, atol=1e-4)
    for o, r in zip(found[1:], right[1:], strict=True):
        torch.testing.assert_close(o.double(), r, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["squares", "frequencies"])
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_nan_of_a_slot_stays_in_it(dtype: torch.dtype, name: str, where: str) -> None:
    size, options = SHAPES[name]
    arguments = [x.to(dtype) if x.is_floating_point() else x for x in fuse(*size, **options)(Random("nan"))]
    tokens, weight, bias, gate, pick = arguments
    {"weight": weight[3, 1], "bias": bias[3:4]}[where].fill_(torch.nan)
    for out in ops.kv_fuse(tokens, weight, bias, gate, pick):
        assert out[:, :, 3].isnan().all()
        assert out[:, :, :3].isfinite().all() and out[:, :, 4:].isfinite().all()


def test_explain_says_how_the_convolution_is_computed() -> None:
    if native.STATUS.variant is None:
        pytest.skip(f"no compiled kernels: {native.STATUS.reason}")
    found = {}
    for name in ("odd", "frequencies", "squares"):
        size, options = SHAPES[name]
        for dtype in (torch.float32, torch.bfloat16):
            args = [x.to(dtype) if x.is_floating_point() else x for x in fuse(*size, **options)(Random("explain"))]
            ((call),) = cofire.explain("kv_fuse", *args)
            found[name, dtype] = call["kernel"]
    assert found["odd", torch.float32].endswith("tap by tap in fp32")
    assert re.search(
        r"frequencies in fp32: \d+ products for \d+ outputs of 21 taps", found["frequencies", torch.float32]
    )
    amx = "multiplied on AMX" in found["squares", torch.bfloat16]
    assert amx or found["squares", torch.bfloat16].endswith("in fp32")
    assert all(
        "AMX" not in text for (name, dtype), text in found.items() if (name, dtype) != ("squares", torch.bfloat16)
    )


def _fuse(**changes: Any) -> Any:
    args: dict[str, Any] = {
        "tokens": torch.zeros(1, 2, 7, 8),
        "weight": torch.zeros(4, 8, 3),
        "bias": torch.zeros(4),
        "gate": torch.tensor(0.5),
        "pick": torch.zeros(1, 2, 4, dtype=torch.int32),
    }
    return ops.kv_fuse(**(args | changes))


def _select(**changes: Any) -> Any:
    args: dict[str, Any] = {"scores": torch.zeros(1, 2, 5), "heavy": 2, "merged": 2}
    return ops.kv_select(**(args | changes))


def _gather(**changes: Any) -> Any:
    def index(n: int) -> Tensor:
        return torch.zeros(1, 2, n, dtype=torch.int32)

    args: dict[str, Any] = {name: torch.zeros(1, 2, 5, 4) for name in ("heavy_key", "heavy_value", "key", "value")}
    return ops.kv_gather_(**(args | {"heavy_index": index(3), "rest_index": index(2)} | changes))


REFUSALS = [
    Refusal(
        "select_rank",
        lambda: _select(scores=torch.zeros(2, 5)),
        ValueError,
        "kv_select: scores must have shape [B, H, S], got [2, 5]",
    ),
    Refusal(
        "select_dtype",
        lambda: _select(scores=torch.zeros(1, 2, 5, dtype=torch.int32)),
        TypeError,
        "kv_select: scores must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "select_heavy",
        lambda: _select(heavy=6),
        ValueError,
        "kv_select: heavy must be between 0 and the 5 tokens, got 6",
    ),
    Refusal(
        "select_local",
        lambda: _select(local=3),
        ValueError,
        "kv_select: local must be between 0 and heavy (2), got 3",
    ),
    Refusal(
        "select_merged",
        lambda: _select(merged=4),
        ValueError,
        "kv_select: merged must be between 0 and the 3 tokens that are left, got 4",
    ),
    Refusal("select_number", lambda: _select(heavy=1.5), TypeError, "kv_select: heavy must be an integer, got 1.5"),
    Refusal(
        "select_nan",
        lambda: _select(scores=torch.full((1, 2, 5), math.nan)),
        ValueError,
        "kv_select: scores must not be NaN, got 10 NaN among 10 scores",
        data=True,
    ),
    Refusal(
        "gather_rank",
        lambda: _gather(key=torch.zeros(2, 5, 4)),
        ValueError,
        "kv_gather_: key must have shape [B, H, S, d], got [2, 5, 4]",
    ),
    Refusal(
        "gather_value",
        lambda: _gather(value=torch.zeros(1, 2, 6, 4)),
        ValueError,
        "kv_gather_: value must have shape [1, 2, 5, 4], got [1, 2, 6, 4]",
    ),
    Refusal(
        "gather_index",
        lambda: _gather(rest_index=torch.zeros(1, 2, 2, dtype=torch.int64)),
        TypeError,
        "kv_gather_: rest_index must be int32 (as kv_select returns it), got torch.int64",
    ),
    Refusal(
        "gather_heads",
        lambda: _gather(heavy_index=torch.zeros(1, 1, 3, dtype=torch.int32)),
        ValueError,
        "kv_gather_: heavy_index must have shape [1, 2, n], got [1, 1, 3]",
    ),
    Refusal(
        "gather_room",
        lambda: _gather(heavy_value=torch.zeros(1, 2, 2, 4)),
        ValueError,
        "kv_gather_: heavy_value must have shape [1, 2, M, 4] with M at least 3, got [1, 2, 2, 4]",
    ),
    Refusal(
        "gather_dtype",
        lambda: _gather(heavy_key=torch.zeros(1, 2, 5, 4, dtype=torch.float16)),
        TypeError,
        "kv_gather_: heavy_key must have the dtype of key (torch.float32), got torch.float16",
    ),
    Refusal(
        "fuse_odd_width",
        lambda: _fuse(tokens=torch.zeros(1, 2, 7, 9)),
        ValueError,
        "kv_fuse: tokens must hold keys and values of equal size, got [1, 2, 7, 9]",
    ),
    Refusal(
        "fuse_even_taps",
        lambda: _fuse(weight=torch.zeros(4, 8, 4)),
        ValueError,
        "kv_fuse: weight must have shape [merged, 8, taps] with merged at least 1 and odd taps, got [4, 8, 4]",
    ),
    Refusal(
        "fuse_no_slots",
        lambda: _fuse(weight=torch.zeros(0, 8, 3)),
        ValueError,
        "kv_fuse: weight must have shape [merged, 8, taps] with merged at least 1 and odd taps, got [0, 8, 3]",
    ),
    Refusal(
        "fuse_short",
        lambda: _fuse(tokens=torch.zeros(1, 2, 2, 8)),
        ValueError,
        "kv_fuse: tokens must be padded by half of the 3 taps, and be at least one, got [1, 2, 2, 8]",
    ),
    Refusal(
        "fuse_bias",
        lambda: _fuse(bias=torch.zeros(3)),
        ValueError,
        "kv_fuse: bias must have shape [4], got [3]",
    ),
    Refusal(
        "fuse_gate",
        lambda: _fuse(gate=torch.zeros(2)),
        ValueError,
        "kv_fuse: gate must be one number, got [2]",
    ),
    Refusal(
        "fuse_pick",
        lambda: _fuse(pick=torch.zeros(1, 2, 3, dtype=torch.int32)),
        ValueError,
        "kv_fuse: pick must have shape [1, 2, 4], got [1, 2, 3]",
    ),
    Refusal(
        "gather_padding", lambda: _gather(padding=-1), ValueError, "kv_gather_: padding must not be negative, got -1"
    ),
]


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_examples() -> None:
    check_examples(kv_fusion)
