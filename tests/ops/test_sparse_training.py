# SPDX-License-Identifier: Apache-2.0
"""Masked optimiser steps, drop and grow, statistics of activations and groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import ops
from cofire.ops import sparse_training
from cofire.ops.fake_quantize import philox_uniform
from cofire.ops.packing import pack_bits, unpack_bits
from cofire.ops.sparse_training import random_keys
from helpers import Random, Refusal, Sample, check_examples, check_op, refusals

Make = Callable[[Random], tuple[Any, ...]]


def bits_of(mask: Tensor) -> Tensor:
    return pack_bits(mask.flatten(1).to(torch.uint8), 1)


def offsets_of(mask: Tensor) -> Tensor:
    counts = mask.flatten(1).sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def state(rand: Random, mask: Tensor | None, packed: bool, positive: bool = False) -> Tensor:
    """As an optimiser leaves it: zero, or nothing, where pruned."""
    assert mask is not None
    x = rand.normal(*mask.shape)
    x = x.square() if positive else x
    return x[mask] if packed else torch.where(mask, x, 0.0)


def setting(rand: Random, shape: tuple[int, ...], density: float | None, pattern: str = "", nan: bool = True) -> Any:
    """Weight, gradient, mask; NaN and infinities stand where pruned."""
    w, g = rand.normal(*shape), rand.normal(*shape)
    if density is None:
        return w, g, torch.ones(shape, dtype=torch.bool)
    mask = rand.mask(*shape, density=density)
    if pattern == "runs":  # whole words are empty, others full
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[:, :65] = True
        mask[0] = False
    if nan:
        w, g = torch.where(mask, w, torch.inf), torch.where(mask, g, torch.nan)
    return w, g, mask


# ------------------------------------------------------------------------------------------- optimiser steps


def sgd(
    *shape: int,
    density: float | None = 0.5,
    momentum: float = 0.9,
    packed: bool = False,
    nesterov: bool = False,
    rest: tuple[Any, ...] = (False, False, False),
    pattern: str = "",
) -> Make:
    """``rest``: maximize, first, clean."""

    def make(rand: Random) -> tuple[Any, ...]:
        w, g, mask = setting(rand, shape, density, pattern, nan=not rest[2])
        w = torch.where(mask, w, 0.0) if rest[2] else w
        buffer = state(rand, mask, packed) if momentum else None
        bits = None if density is None else bits_of(mask)
        dampening = 0.0 if nesterov else 0.25
        options = (0.1, momentum, dampening, 0.01, nesterov)
        return w, g, buffer, bits, offsets_of(mask) if packed else None, *options, *rest

    return make


SGD = [
    Sample("odd", sgd(3, 67)),
    Sample("plain", sgd(2, 33, momentum=0.0)),
    Sample("unmasked", sgd(5, 7, density=None, nesterov=True)),
    Sample("packed_conv", sgd(4, 3, 3, 5, packed=True, rest=(True, True, False))),
    Sample("clean", sgd(3, 129, nesterov=True, rest=(False, False, True), pattern="runs"), full=True),
    Sample("large", sgd(9, 5000, density=0.1), full=True),
]


def adam(
    *shape: int,
    density: float | None = 0.5,
    amsgrad: bool = False,
    packed: bool = False,
    rest: tuple[Any, ...] = (True, False, 3, False),
    pattern: str = "",
    beta1: float = 0.9,
) -> Make:
    """``rest``: decoupled, maximize, step, clean."""

    def make(rand: Random) -> tuple[Any, ...]:
        w, g, mask = setting(rand, shape, density, pattern, nan=not rest[3])
        w = torch.where(mask, w, 0.0) if rest[3] else w
        states = [state(rand, mask, packed), state(rand, mask, packed, True)]
        highest = state(rand, mask, packed, True) if amsgrad else None
        bits = None if density is None else bits_of(mask)
        options = (0.1, beta1, 0.99, 1e-8, 0.01)
        return w, g, *states, highest, bits, offsets_of(mask) if packed else None, *options, *rest

    return make


ADAM = [
    Sample("odd", adam(3, 67)),
    Sample("packed", adam(3, 65, packed=True)),
    Sample("unmasked", adam(5, 7, density=None, amsgrad=True, rest=(False, True, 1, False), beta1=0.25)),
    Sample("clean", adam(3, 129, pattern="runs", rest=(True, False, 2, True))),
    Sample("runs", adam(3, 97, pattern="runs"), full=True),
    Sample("no_columns", adam(2, 0), full=True),
    Sample("packed_conv", adam(4, 3, 3, 5, packed=True, amsgrad=True, rest=(False, False, 9, False)), full=True),
    Sample("packed_runs", adam(3, 129, packed=True, pattern="runs", rest=(True, False, 2, True)), full=True),
    Sample("none_kept", adam(3, 40, density=0.0, packed=True), full=True),
    Sample("large", adam(9, 5000, density=0.1), full=True),
    Sample("large_packed", adam(9, 5000, density=0.1, packed=True), full=True),
]

# -------------------------------------------------------------------------------------------- drop and grow


def moving(
    *shape: int,
    count: int,
    scope: str = "row",
    density: float = 0.5,
    grow: str = "gradient",
    drop: bool = False,
    steps: int = 0,
    seed: int = 0,
) -> Make:
    """``steps``: so many different magnitudes, so that there are ties."""

    def make(rand: Random) -> tuple[Any, ...]:
        w, g, mask = setting(rand, shape, density, nan=False)
        score = rand.normal(*shape) if drop else None
        if steps:
            w, g = ((x * steps).round() / steps for x in (w, g))
        # of what is not asked for, nothing matters
        g = torch.where(mask, torch.nan, g)
        return w, bits_of(mask), g if grow == "gradient" else None, score, count, scope, seed

    return make


MOVES = [
    Sample("odd", moving(3, 67, count=7)),
    Sample("ties", moving(4, 65, count=9, steps=1)),
    Sample("tensor", moving(5, 33, count=20, scope="tensor", steps=2)),
    Sample("random", moving(5, 33, count=5, grow="random", seed=(7 << 32) + 3)),
    Sample("more_than_there_are", moving(4, 40, count=39, density=0.1), full=True),
    Sample("drop_score", moving(4, 3, 3, 5, count=6, drop=True), full=True),
    Sample("none", moving(2, 9, count=0), full=True),
    Sample("no_columns", moving(2, 0, count=1), full=True),
    Sample("random_tensor", moving(5, 33, count=9, grow="random", scope="tensor", seed=5), full=True),
    Sample("large", moving(20, 4100, count=200, density=0.1, steps=64), full=True),
    Sample("large_tensor", moving(70, 4100, count=9000, density=0.1, steps=64, scope="tensor"), full=True),
]

# ------------------------------------------------------------------------------------------------ statistics


def activations(*shape: int, shift: float = 0.0) -> Make:
    return lambda rand: (rand.normal(*shape) + shift,)


ACTIVATIONS = [
    Sample("odd", activations(7, 17)),
    Sample("batches", activations(2, 65, 9, shift=3.0)),
    Sample("vector", activations(5), full=True),
    Sample("no_rows", activations(0, 5)),
    Sample("no_columns", activations(3, 0), full=True),
    Sample("pieces", activations(300, 270, shift=-2.0), full=True),
]


def groups(rows: int, columns: int, r: int, c: int) -> Make:
    return lambda rand: (rand.normal(rows, columns), rand.normal(rows, columns), r, c)


GROUPS = [
    Sample("blocks", groups(6, 35, 2, 7)),
    Sample("rows", groups(3, 129, 1, 129)),
    Sample("columns", groups(33, 5, 33, 1)),
    Sample("long_rows", groups(8, 1300, 4, 650)),  # pieces of a row
    Sample("short", groups(6, 74, 3, 37)),
    Sample("empty", groups(0, 4, 2, 2), full=True),
    Sample("large", groups(256, 1200, 128, 300), full=True),
]

CHECKS = [
    *check_op(
        "masked_sgd_",
        SGD,
        tiny=[Sample("tiny", sgd(2, 9)), Sample("tiny_resized", sgd(3, 12))],
        wide=["momentum_buffer"],
    ),
    *check_op(
        "masked_adam_",
        ADAM,
        tiny=[Sample("tiny", adam(2, 9)), Sample("tiny_resized", adam(3, 12))],
        wide=["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    ),
    *check_op(
        "prune_and_grow_",
        MOVES,
        tiny=[Sample("tiny", moving(2, 9, count=2)), Sample("tiny_resized", moving(3, 12, count=2))],
    ),
    *check_op(
        "activation_statistics",
        ACTIVATIONS,
        tiny=[Sample("tiny", activations(3, 4)), Sample("tiny_resized", activations(4, 5))],
        sums={"mean": 4, "deviation": 16},
    ),
    *check_op(
        "gram",
        [
            Sample("odd", activations(7, 17)),
            Sample("batches", activations(2, 9, 5)),
            Sample("no_rows", activations(0, 3)),
        ],
        tiny=[Sample("tiny", activations(3, 4)), Sample("tiny_resized", activations(4, 5))],
        by_library=True,
    ),
    *check_op(
        "group_statistics",
        GROUPS,
        tiny=[Sample("tiny", groups(2, 6, 1, 3)), Sample("tiny_resized", groups(4, 9, 1, 3))],
        sums=["weight_squares", "grad_squares", "products"],
    ),
]


@pytest.mark.parametrize("check", CHECKS)
def test_operator(check: Callable[[], None]) -> None:
    check()


# --------------------------------------------------------------------------------------- against torch.optim


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_is_torchs(decoupled: bool) -> None:
    """Of a single tensor, for the values that are kept: to rounding, over steps."""
    rand = Random("adam")
    mask = rand.mask(6, 50)
    start = torch.where(mask, rand.normal(6, 50), 0.0)
    kept = torch.nn.Parameter(start[mask].clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([kept], lr=0.01, weight_decay=0.1, amsgrad=True, foreach=False)
    w, states = start.clone(), [torch.zeros(6, 50) for _ in range(3)]
    for step in range(1, 6):
        g = torch.where(mask, rand.normal(6, 50), torch.nan)
        kept.grad = g[mask]
        optimizer.step()
        ops.masked_adam_(w, g, *states, bits_of(mask), lr=0.01, weight_decay=0.1, decoupled=decoupled, step=step)
    torch.testing.assert_close(w[mask], kept.detach(), rtol=2e-6, atol=1e-7)
    for x in (w, *states):
        assert not x[~mask].any()


def test_a_backward_notices_the_write() -> None:
    w = torch.ones(2, 3, requires_grad=True)
    y = (w * w).sum()
    with torch.no_grad():
        ops.masked_sgd_(w, torch.ones(2, 3), lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --------------------------------------------------------------------------------------------- drop and grow


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_counts_are_kept_and_the_dropped_do_not_grow(scope: str) -> None:
    rand = Random("moves")
    w, mask = rand.normal(9, 70), rand.mask(9, 70, density=0.2)
    w = torch.where(mask, w, 0.0)
    g = torch.where(mask, 100.0, rand.normal(9, 70))  # what was dropped would be the best to grow
    before = w.clone()
    count = 4 if scope == "row" else 31
    after = unpack_bits(ops.prune_and_grow_(w, bits_of(mask), g, count, scope=scope), 1, 70).bool()
    number = mask.sum(1).clamp(max=count) if scope == "row" else count
    dropped, grown = mask & ~after, ~mask & after
    axis = 1 if scope == "row" else (0, 1)
    assert (dropped.sum(axis) == number).all() and (grown.sum(axis) == number).all()
    assert not w[dropped].any() and not w[grown].any()
    assert torch.equal(w[mask & after], before[mask & after])
    assert (before.abs()[dropped].max() <= before.abs()[mask & after].min()) or scope == "row"


def test_golden_ties() -> None:
    w = torch.tensor([[1.0, -1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    g = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, -3.0, 1.0, 3.0, 3.0]])
    after = ops.prune_and_grow_(w, torch.tensor([[15, 0]], dtype=torch.uint8), g, 2)
    assert unpack_bits(after, 1, 9).tolist() == [[0, 0, 1, 1, 0, 1, 0, 1, 0]]
    assert w.tolist() == [[0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


def test_random_growth_is_the_generator_of_fake_quantisation() -> None:
    """The same numbers, with their lower bits; another seed, another choice; uniform enough to be fair."""
    keys = random_keys(11, 1000)
    assert torch.equal((keys >> 8).float() * 2.0**-24, philox_uniform(11, 1000))
    mask = torch.zeros(40, 100, dtype=torch.bool)
    mask[:, :10] = True
    found = [
        unpack_bits(ops.prune_and_grow_(torch.ones(40, 100), bits_of(mask), None, 5, seed=s), 1, 100) for s in (1, 2)
    ]
    assert not torch.equal(*found)
    share = found[0][:, 10:].float().view(40, 9, 10).mean((0, 2))
    assert (share - 5 / 90).abs().max() < 4 * (5 / 90 / 400) ** 0.5


def test_nan_at_what_matters_is_refused_and_nothing_is_written() -> None:
    mask = torch.tensor([[True, True, False, False]] * 3)
    for scope in ("row", "tensor"):
        w, g = torch.ones(3, 4), torch.ones(3, 4)
        w[1, 0] = torch.nan
        with pytest.raises(
            ValueError, match=r"^prune_and_grow_: drop scores must not be NaN, got NaN at 1 kept entries"
        ):
            ops.prune_and_grow_(w, bits_of(mask), g, 1, scope=scope)
        w[1, 0], g[2, 2] = 1.0, torch.nan
        with pytest.raises(ValueError, match=r"^prune_and_grow_: grow scores must not be NaN, got NaN at 1 pruned"):
            ops.prune_and_grow_(w, bits_of(mask), g, 1, scope=scope)
        assert torch.equal(w, torch.ones(3, 4))


# ------------------------------------------------------------------------------------------------ statistics


def test_merged_statistics_are_those_of_all() -> None:
    """Also where the mean is far from zero, so that a difference of squares would be lost."""
    x = Random("merge").normal(301, 5) + 1000.0
    found = ops.activation_statistics(x[:100]).merge(ops.activation_statistics(x[100:]))
    r = x.double()
    assert found.number == 301
    torch.testing.assert_close(found.variance.double(), r.var(0, correction=0), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.sum.double(), r.sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.sum_of_squares.double(), r.square().sum(0), rtol=1e-6, atol=0)
    assert torch.equal(found.largest, x.abs().amax(0))
    none = ops.activation_statistics(x[:0])
    assert all(torch.equal(a, b) for a, b in zip(none.merge(found)[1:], found[1:], strict=True))


def test_nan_stays_with_its_feature() -> None:
    x = torch.ones(300, 4)
    x[150, 2] = torch.nan
    found = ops.activation_statistics(x)
    for part in found[1:]:
        assert part.isnan().tolist() == [False, False, True, False]


# ------------------------------------------------------------------------------------------------- refusals


def w() -> Tensor:
    return torch.ones(2, 9)


def b() -> Tensor:
    return torch.zeros(2, 2, dtype=torch.uint8)


def step(**given: Any) -> None:
    ops.masked_sgd_(**{"weight": w(), "grad": w(), "momentum_buffer": w(), "lr": 0.1, "momentum": 0.9} | given)


def adam_step(**given: Any) -> None:
    ops.masked_adam_(w(), w(), w(), w(), **{"lr": 0.1, "step": 1} | given)


REFUSALS = [
    Refusal("integers", lambda: step(weight=torch.ones(2, 9, dtype=torch.int32)), TypeError,
            "masked_sgd_: weight must be a floating-point tensor, got torch.int32"),
    Refusal("grad_shape", lambda: step(grad=torch.ones(2, 8)), ValueError,
            "masked_sgd_: grad must have shape [2, 9], got [2, 8]"),
    Refusal("bits_shape", lambda: step(bits=torch.zeros(2, 1, dtype=torch.uint8)), ValueError,
            "masked_sgd_: bits must have shape [2, 2] (9 columns of one bit), got [2, 1]"),
    Refusal("bits_dtype", lambda: step(bits=torch.zeros(2, 2)), TypeError,
            "masked_sgd_: bits must be uint8 (a packed mask), got torch.float32"),
    Refusal("no_buffer", lambda: step(momentum_buffer=None), ValueError,
            "masked_sgd_: momentum_buffer must be a tensor exactly where momentum is not 0, got None and 0.9"),
    Refusal("offsets_alone", lambda: step(offsets=torch.zeros(3, dtype=torch.int64)), ValueError,
            "masked_sgd_: offsets need a mask, got bits None"),
    Refusal("packed_state", lambda: step(bits=b(), offsets=torch.zeros(3, dtype=torch.int64)), ValueError,
            "masked_sgd_: momentum_buffer must have shape [kept entries] where offsets are given, got [2, 9]"),
    Refusal("state_dtype", lambda: step(momentum_buffer=w().half()), TypeError,
            "masked_sgd_: momentum_buffer must be torch.float32 (weight is torch.float32), got torch.float16"),
    Refusal("step", lambda: adam_step(step=0), ValueError,
            "masked_adam_: step must be at least 1 (the number of this step), got 0"),
    Refusal("beta", lambda: adam_step(beta2=1.0), ValueError,
            "masked_adam_: beta2 must be at least 0 and less than 1, got 1.0"),
    Refusal("move_scope", lambda: ops.prune_and_grow_(w(), b(), w(), 1, scope="global"), ValueError,
            "prune_and_grow_: scope must be one of row, tensor, got 'global'"),
    Refusal("move_count", lambda: ops.prune_and_grow_(w(), b(), w(), -1), ValueError,
            "prune_and_grow_: count must not be negative, got -1"),
    Refusal("move_score", lambda: ops.prune_and_grow_(w(), b(), w()[:1], 1), ValueError,
            "prune_and_grow_: grow_score must have shape [2, 9], got [1, 9]"),
    Refusal("block", lambda: ops.group_statistics(w(), w(), (1, 2)), ValueError,
            "group_statistics: block must be positive and divide the shape of weight [2, 9], got (1, 2)"),
    Refusal("statistics_list", lambda: ops.activation_statistics([1.0]), TypeError,  # type: ignore[arg-type]
            "activation_statistics: input must be a tensor, got list"),
    Refusal("gram_scalar", lambda: ops.gram(torch.ones(())), ValueError, "gram: input must have shape [..., K], got []"),
]  # fmt: skip


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_offsets_that_lie_are_caught() -> None:
    """In the C++ kernel: memory is at stake."""
    from cofire import native

    if native.STATUS.variant is None:
        pytest.skip(f"no compiled kernels: {native.STATUS.reason}")
    bits = bits_of(torch.ones(2, 9, dtype=torch.bool))
    for offsets in ([0, 9, 40], [0, 3, 18], [-9, 0, 9]):
        with pytest.raises(RuntimeError, match="offsets must"):
            step(momentum_buffer=torch.ones(18), bits=bits, offsets=torch.tensor(offsets))


def test_examples() -> None:
    check_examples(sparse_training)
