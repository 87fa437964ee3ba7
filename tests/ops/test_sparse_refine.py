# SPDX-License-Identifier: Apache-2.0
"""Refinement of masks: kernels and references make equal masks, each step is the best one, and rows keep their counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import ops
from cofire.ops import sparse_refine
from cofire.ops.packing import pack_bits, unpack_bits
from helpers import Args, Random, Refusal, Sample, check_examples, check_op, refusals


def packed(kept: Tensor) -> Tensor:
    return pack_bits(kept.to(torch.uint8), 1)


def unpacked(bits: Tensor, columns: int) -> Tensor:
    return unpack_bits(bits, 1, columns).bool()


def start(rand: Random, rows: int, columns: int, density: float, group: int = 0) -> Tensor:
    """A random mask with equally many in each row (or in each group; the last may be cut off)."""
    width = group or columns
    order = rand.uniform(rows, -(-columns // max(width, 1)), width).argsort(-1).argsort(-1)
    return packed((order < round(density * width)).flatten(1)[:, :columns])


def inputs(rand: Random, tokens: int, columns: int) -> Tensor:
    """Correlated, with a mean."""
    mix = rand.normal(columns, columns) / math.sqrt(columns)
    return rand.normal(tokens, columns) @ mix + rand.normal(columns)


# ---------------------------------------------------------------------------------------------------------- dsnot_swap


def dsnot(
    rows: int, columns: int, density: float = 0.5, swaps: int = 20, threshold: float = 1e-3, official: bool = False,
    group: int = 0, change: Callable[[list[Tensor]], None] = lambda args: None,
) -> Callable[[Random], Args]:  # fmt: skip
    def make(rand: Random) -> Args:
        x = inputs(rand, 3 * columns, columns)
        args = [rand.normal(rows, columns), start(rand, rows, columns, density, group)]
        args += [x.mean(0), x.norm(dim=0), 1 / x.var(0)]
        change(args)
        return (*args, swaps, threshold, official, group)

    return make


def _no_variance(args: list[Tensor]) -> None:
    args[4][::3] = 0


def _ties(args: list[Tensor]) -> None:
    for i in (0, 2, 3, 4):
        args[i] = args[i].round().clamp(-1, 1)


def _not_finite(args: list[Tensor]) -> None:
    args[0][0, 3], args[0][1, 5], args[0][2, 1] = torch.nan, torch.inf, -torch.inf
    args[3][7] = torch.inf


def _a_statistic_is_nan(args: list[Tensor]) -> None:
    args[4][2] = torch.nan
    args[3][4] = torch.nan


DSNOT = [
    Sample("odd", dsnot(5, 37, swaps=9)),
    Sample("official", dsnot(4, 65, 0.3, swaps=50, threshold=0.1, official=True)),
    Sample("groups", dsnot(5, 64, swaps=30, group=4)),
    Sample("groups_official", dsnot(5, 66, swaps=30, threshold=0.1, official=True, group=6)),
    Sample("no_variance", dsnot(4, 33, change=_no_variance)),
    Sample("ties", dsnot(9, 63, 0.4, threshold=0.0, change=_ties)),
    Sample("not_finite", dsnot(5, 17, change=_not_finite)),
    Sample("nan_statistic", dsnot(5, 17, change=_a_statistic_is_nan)),
    Sample("candidates_exhausted", dsnot(4, 9, 0.8, swaps=50, threshold=0.0, official=True)),
    Sample("nothing_pruned", dsnot(3, 17, 1.0)),
    Sample("nothing_kept", dsnot(3, 17, 0.0)),
    Sample("no_swaps", dsnot(3, 17, swaps=0)),
    Sample("one_column", dsnot(3, 1, 1.0)),
    Sample("no_rows", dsnot(0, 17)),
    Sample("wide", dsnot(3, 1030, 0.2, swaps=60, official=True, threshold=0.1), full=True),
    Sample("many_rows", dsnot(70, 129, 0.3, swaps=8), full=True),
]
DSNOT_TINY = [Sample("tiny", dsnot(3, 12, swaps=4)), Sample("tiny_resized", dsnot(4, 17, swaps=4))]

# ----------------------------------------------------------------------------------------------------------- gram_swap


def gram(
    rows: int, columns: int, density: float = 0.5, swaps: int = 100, candidates: int = 64, group: int = 0,
    tokens: int | None = None, change: Callable[[list[Tensor]], None] = lambda args: None,
) -> Callable[[Random], Args]:  # fmt: skip
    def make(rand: Random) -> Args:
        x = inputs(rand, tokens or 3 * columns, columns)
        # few digits, so that 16 bits hold them and every dtype is given the same correlation
        weight = (rand.normal(rows, columns) * 16).round() / 16
        args = [weight, start(rand, rows, columns, density, group), (x.T @ x / len(x) * 16).round() / 16]
        change(args)
        weight, bits, g = args
        lost = torch.where(unpacked(bits, columns), 0.0, weight.double())
        return weight, bits, g, lost @ g.double(), swaps, candidates, group

    return make


def _equal_columns(args: list[Tensor]) -> None:
    args[0] = args[0].sign()
    args[2] = torch.eye(len(args[2])) + 0.5


def _dead(args: list[Tensor]) -> None:
    args[2][::2] = 0
    args[2][:, ::2] = 0


def short(rows: int, columns: int, group: int) -> Callable[[Random], Args]:
    """As ``pad=True`` asks for it: the last two columns are pruned, and infinitely expensive."""

    def make(rand: Random) -> Args:
        weight, bits, g, *_, swaps, candidates, _ = gram(rows, columns, group=group)(rand)
        kept = unpacked(bits, columns)
        kept[:, -2:] = False
        g[-2:], g[:, -2:], weight[:, -2:] = 0, 0, 1
        correlation = torch.where(kept, 0.0, weight.double()) @ g.double()
        g.diagonal()[-2:] = torch.inf
        return weight, packed(kept), g, correlation, swaps, candidates, group

    return make


def _weights_not_finite(args: list[Tensor]) -> None:
    args[0][0, 3], args[0][1, 5], args[0][2, 1] = torch.nan, torch.inf, -torch.inf


def _gram_not_finite(args: list[Tensor]) -> None:
    args[2][3, 4] = args[2][4, 3] = torch.nan
    args[2][6, 6] = torch.inf


GRAM = [
    Sample("odd", gram(2, 37, swaps=4)),
    Sample("few_candidates", gram(2, 65, 0.3, swaps=3, candidates=5)),
    Sample("groups", gram(3, 64, group=4)),
    Sample("groups_of_six", gram(4, 36, group=6, swaps=7)),
    Sample("short_group", short(4, 36, 4)),
    Sample("ties", gram(3, 33, change=_equal_columns)),
    Sample("dead_features", gram(3, 17, change=_dead), full=True),
    Sample("weights_not_finite", gram(5, 17, change=_weights_not_finite)),
    Sample("gram_not_finite", gram(5, 17, change=_gram_not_finite)),
    Sample("rank_deficient", gram(2, 63, 0.2, tokens=9), full=True),
    Sample("nothing_pruned", gram(3, 17, 1.0)),
    Sample("nothing_kept", gram(3, 17, 0.0)),
    Sample("no_swaps", gram(3, 17, swaps=0)),
    Sample("one_column", gram(3, 1, 1.0)),
    Sample("no_rows", gram(0, 17)),
    Sample("to_the_end", gram(9, 129, 0.2), full=True),
    Sample("wide", gram(1, 515, 0.2, swaps=20), full=True),
]
GRAM_TINY = [Sample("tiny", gram(3, 12, swaps=4)), Sample("tiny_resized", gram(4, 17, swaps=4))]


@pytest.mark.parametrize(
    "check",
    [
        *check_op("dsnot_swap", DSNOT, tiny=DSNOT_TINY),
        *check_op("gram_swap", GRAM, tiny=GRAM_TINY, kept=("correlation",)),
    ],
)
def test_operator(check: Callable[[], None]) -> None:
    check()


def some() -> dict[str, Tensor]:
    """Made where they are used: while tracing, these are fakes."""
    bits = torch.full((3, 1), 7, dtype=torch.uint8)
    return {"weight": torch.ones(3, 8), "bits": bits, "gram": torch.eye(8), "vector": torch.ones(8)}


def _dsnot(**changes: Any) -> Tensor:
    have = some()
    args = {
        "weight": have["weight"],
        "bits": have["bits"],
        **dict.fromkeys(("mean", "norm", "variance"), have["vector"]),
    }
    return ops.dsnot_swap(**(args | {n: c() if callable(c) else c for n, c in changes.items()}))


def _gram(**changes: Any) -> Tensor:
    have = some()
    args = {name: have[name] for name in ("weight", "bits", "gram")}
    return ops.gram_swap(**(args | {n: c() if callable(c) else c for n, c in changes.items()}))


def _refusal(name: str, call: Callable[..., Tensor], error: type[Exception], sentence: str, **changes: Any) -> Refusal:
    return Refusal(name, lambda: call(**changes), error, sentence)


REFUSALS = [
    _refusal("rank", _dsnot, ValueError, "dsnot_swap: weight must have shape [rows, columns], got [8]",
             weight=lambda: torch.ones(8)),
    _refusal("integers", _dsnot, TypeError, "dsnot_swap: weight must be a floating-point tensor, got torch.int64",
             weight=lambda: torch.ones(3, 8).long()),
    _refusal("bools", _dsnot, TypeError, "dsnot_swap: bits must be uint8 (a packed mask), got torch.bool",
             bits=lambda: torch.ones(3, 8) > 0),
    _refusal("bytes", _dsnot, ValueError, "dsnot_swap: bits must have shape [3, 1] (8 columns of one bit), got [3, 2]",
             bits=lambda: torch.ones(3, 2, dtype=torch.uint8)),
    _refusal("variance", _dsnot, ValueError, "dsnot_swap: variance must have shape [8], one per column, got [3]",
             variance=lambda: torch.ones(3)),
    _refusal("list", _dsnot, TypeError, "dsnot_swap: norm must be a tensor, got list", norm=[1.0]),
    _refusal("stop", _dsnot, ValueError, "dsnot_swap: stop must be one of decrease, official, got 'never'", stop="never"),
    _refusal("gamma", _dsnot, ValueError, "dsnot_swap: gamma must be a number of at least 0, got -1", gamma=-1),
    _refusal("threshold", _dsnot, ValueError, "dsnot_swap: threshold must be a number of at least 0, got nan",
             threshold=math.nan),
    _refusal("swaps", _dsnot, ValueError, "dsnot_swap: max_swaps must be at least 0, got -1", max_swaps=-1),
    _refusal("half_a_swap", _dsnot, TypeError, "dsnot_swap: max_swaps must be an integer, got 0.5", max_swaps=0.5),
    _refusal("group", _dsnot, ValueError,
             "dsnot_swap: the columns of weight must be a multiple of the pattern's group (3), got 8; pad=True lets the last "
             "group be shorter", pattern=(1, 3)),
    _refusal("pad", _gram, TypeError, "gram_swap: pad must be True or False, got 'zeros'", pattern=(1, 4), pad="zeros"),
    _refusal("nothing_to_pad", _dsnot, ValueError, "dsnot_swap: pad must be False where there is no pattern N:M, got True",
             pad=True),
    _refusal("pattern", _gram, ValueError, "gram_swap: pattern must keep 1 to 4 of 4, got 5:4", pattern=(5, 4)),
    _refusal("pattern_of_one", _gram, TypeError, "gram_swap: pattern must be two integers (kept, of how many), got 4",
             pattern=4),
    _refusal("gram", _gram, ValueError, "gram_swap: gram must have shape [8, 8], got [8]", gram=lambda: torch.ones(8)),
    _refusal("no_gram", _gram, TypeError, "gram_swap: gram must be a tensor, got NoneType", gram=None),
    _refusal("candidates", _gram, ValueError, "gram_swap: candidates must be at least 1, got 0", candidates=0),
    Refusal("bias", lambda: ops.corrected_bias(some()["weight"], some()["bits"], torch.ones(8), torch.ones(8)), ValueError,
            "corrected_bias: bias must have shape [3], got [8]"),
    Refusal("error", lambda: ops.pruning_error(some()["weight"], some()["bits"], torch.eye(3)), ValueError,
            "pruning_error: gram must have shape [8, 8], got [3, 3]"),
]  # fmt: skip


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_examples() -> None:
    check_examples(sparse_refine)


# ---------------------------------------------------------------------------------------------------------------- laws


def problem(seed: int, rows: int, columns: int, density: float, group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rand = Random(f"problem {seed}")
    weight, x = rand.normal(rows, columns), inputs(rand, 5 * columns, columns)
    return weight, start(rand, rows, columns, density, group), x


def refined(weight: Tensor, bits: Tensor, x: Tensor, refiner: str, pattern: tuple[int, int] | None = None) -> Tensor:
    pad = pattern is not None
    if refiner == "swap1":
        return ops.gram_swap(weight, bits, x.T @ x / len(x), pattern=pattern, pad=pad)
    return ops.dsnot_swap(weight, bits, x.mean(0), x.norm(dim=0), x.var(0), stop=refiner, pattern=pattern, pad=pad)


@pytest.mark.parametrize("gamma", [1.0, 0.0])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("columns", [2, 3, 61, 63, 66])
def test_a_shorter_last_group_of_dsnot(columns: int, official: bool, gamma: float) -> None:
    """The reference, which needs no padding, is asked directly."""
    weight, bits, x = problem(8, 40, columns, 0.5, 4)
    mean, norm, variance = x.mean(0), x.norm(dim=0), x.var(0)
    dirty = bits.clone()
    if columns % 8:
        dirty[:, -1] |= 0x100 - (1 << columns % 8)  # what stands after the last column
    found = ops.dsnot_swap(
        weight, dirty, mean, norm, variance, max_swaps=20, gamma=gamma, threshold=0.01, pattern=(2, 4), pad=True,
        stop="official" if official else "decrease",
    )  # fmt: skip
    growth = variance.double() ** -gamma
    expected = torch.ops.cofire.dsnot_swap.reference(weight, bits, mean, norm, growth, 20, 0.01, official, 4)
    assert torch.equal(found, expected) and (columns < 4 or not torch.equal(found, bits))
    groups = [
        (a.sum(1), b.sum(1)) for a, b in zip(*(unpacked(m, columns).split(4, 1) for m in (found, bits)), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in groups)


@pytest.mark.parametrize("refiner", ["decrease", "official", "swap1"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_rows_and_groups_keep_their_counts(refiner: str, pattern: tuple[int, int] | None) -> None:
    weight, bits, x = problem(0, 30, 64, 0.5, 4 if pattern else 0)
    new = refined(weight, bits, x, refiner, pattern)
    assert not torch.equal(new, bits)
    kept = unpacked(new, 64)
    assert (kept.sum(1) == 32).all()
    if pattern:
        assert (kept.view(30, 16, 4).sum(2) == 2).all()


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_no_row_gets_worse(pattern: tuple[int, int] | None) -> None:
    """What a refiner looks at falls in every row; the released loop's may rise, which is why it is not the default."""
    weight, bits, x = problem(1, 50, 64, 0.25 if pattern is None else 0.5, 4 if pattern else 0)
    gram, mean = x.T @ x / len(x), x.mean(0).double()

    def of_mean(mask: Tensor) -> Tensor:
        return ((weight.double() * mean) * ~unpacked(mask, 64)).sum(1).abs()

    by_square, by_mean = refined(weight, bits, x, "swap1", pattern), refined(weight, bits, x, "decrease", pattern)
    before, after = ops.pruning_error(weight, bits, gram), ops.pruning_error(weight, by_square, gram)
    assert (after <= before).all() and after.sum() < 0.5 * before.sum()
    assert (of_mean(by_mean) <= of_mean(bits)).all() and of_mean(by_mean).sum() < 0.2 * of_mean(bits).sum()
    if pattern is None:
        released = ops.dsnot_swap(
            weight, bits, mean, x.norm(dim=0), x.var(0), max_swaps=50, threshold=0.0, stop="official"
        )
        assert (of_mean(released) > of_mean(by_mean)).float().mean() > 0.5


@pytest.mark.parametrize(("pattern", "columns"), [(None, 12), ((2, 4), 12), ((2, 4), 11), ((2, 4), 15), ((2, 8), 11)])
def test_each_swap_is_the_best_one(pattern: tuple[int, int] | None, columns: int) -> None:
    """By trying all pairs; the search ends where no pair lowers the error. The last group may be shorter."""
    group = pattern[1] if pattern else columns
    weight, bits, x = problem(2, 6, columns, 0.5, group)
    gram, pad = x.T @ x / len(x), columns % group > 0
    for _ in range(3):
        one = ops.gram_swap(weight, bits, gram, max_swaps=1, pattern=pattern, pad=pad)
        for row in range(6):
            kept = unpacked(bits[row : row + 1], columns)
            errors = {}
            for p, q in itertools.product(range(columns), range(columns)):
                if kept[0, p] and not kept[0, q] and p // group == q // group:
                    tried = kept.clone()
                    tried[0, p], tried[0, q] = False, True
                    errors[p, q] = float(ops.pruning_error(weight[row : row + 1], packed(tried), gram))
            now = float(ops.pruning_error(weight[row : row + 1], bits[row : row + 1], gram))
            got = unpacked(one[row : row + 1], columns)
            gone, grown = (kept & ~got)[0].nonzero().flatten().tolist(), (got & ~kept)[0].nonzero().flatten().tolist()
            if min(errors.values()) < now * (1 - 1e-8):
                assert (gone, grown) == tuple([i] for i in min(errors, key=errors.__getitem__))
            else:
                assert gone == grown == []
        bits = one
    final = ops.gram_swap(weight, bits, gram, pattern=pattern, pad=pad)
    assert torch.equal(ops.gram_swap(weight, final, gram, pattern=pattern, pad=pad), final)


def _step_by_step(weight: Tensor, bits: Tensor, x: Tensor, swaps: int, official: bool, threshold: float) -> Tensor:
    """As the released code does it: pointers into sorted lists, here as lists of what is left; one row after the other."""
    mean, norm, variance = x.mean(0).double(), x.norm(dim=0).double(), x.var(0).double()
    kept = unpacked(bits, weight.shape[1]).clone()
    for r in range(len(weight)):
        share = (weight[r].double() * mean).tolist()
        columns = range(len(share))
        error = sum(share[k] for k in columns if not kept[r, k])
        limit = threshold if official else threshold * sum(map(abs, share)) / math.sqrt(len(share))
        grow = [k for k in columns if not kept[r, k]]
        go = [k for k in columns if kept[r, k]]
        for _ in range(swaps):
            sign = math.copysign(1, error)
            fitting = [k for k in go if sign * share[k] < 0]
            if abs(error) <= limit or not grow or not fitting:
                break
            grown = max(grow, key=lambda k: sign * share[k] / float(variance[k]))
            gone = min(fitting, key=lambda k: abs(float(weight[r, k])) * float(norm[k]))
            changed = error + share[gone] - share[grown]
            if not official and abs(changed) >= abs(error):
                break
            grow.remove(grown)
            go.remove(gone)
            kept[r, grown], kept[r, gone], error = True, False, changed
    return packed(kept)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_dsnot_is_the_algorithm(official: bool, density: float) -> None:
    weight, bits, x = problem(3, 40, 48, density)
    threshold = 0.1 if official else 1e-3
    found = ops.dsnot_swap(
        weight, bits, x.mean(0).double(), x.norm(dim=0).double(), x.var(0).double(), max_swaps=30, threshold=threshold,
        stop="official" if official else "decrease",
    )  # fmt: skip
    assert torch.equal(found, _step_by_step(weight, bits, x, 30, official, threshold))


def test_features_without_variance_are_never_grown() -> None:
    weight, bits, x = problem(4, 20, 32, 0.5)
    x[:, ::2] = 3.0
    variance = x.var(0)
    assert (variance[::2] == 0).all()
    for stop in ("decrease", "official"):
        new = ops.dsnot_swap(weight, bits, x.mean(0), x.norm(dim=0), variance, stop=stop)
        grown = unpacked(new, 32) & ~unpacked(bits, 32)
        assert grown.any() and not grown[:, ::2].any()
    free = ops.dsnot_swap(weight, bits, x.mean(0), x.norm(dim=0), variance, gamma=0)
    assert (unpacked(free, 32) & ~unpacked(bits, 32))[:, ::2].any()


def test_scale_does_not_matter() -> None:
    """Of the inputs, by powers of two, and of G: thresholds are relative."""
    weight, bits, x = problem(5, 20, 64, 0.4)
    for scale in (2.0**-20, 2.0**20):
        assert torch.equal(refined(weight, bits, scale * x, "decrease"), refined(weight, bits, x, "decrease"))
    gram = x.T @ x / len(x)
    found = ops.gram_swap(weight, bits, gram)
    assert all(torch.equal(ops.gram_swap(weight, bits, scale * gram), found) for scale in (2.0**-40, 2.0**40))


def test_swaps_by_the_covariance_lower_the_error_behind_a_corrected_bias() -> None:
    weight, bits, x = problem(6, 16, 64, 0.3)
    x += 3.0
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    new = ops.gram_swap(weight, bits, covariance)
    dense = x.double() @ weight.double().T
    for mask in (bits, new):
        pruned = torch.where(unpacked(mask, 64), weight, 0.0)
        y = x.double() @ pruned.double().T + ops.corrected_bias(weight.double(), mask, mean.double())
        error = (y - dense).square().mean(0)
        torch.testing.assert_close(error, ops.pruning_error(weight, mask, covariance), rtol=1e-3, atol=1e-6)
    assert ops.pruning_error(weight, new, covariance).sum() < 0.5 * ops.pruning_error(weight, bits, covariance).sum()


def test_bits_after_the_last_column_are_ignored() -> None:
    weight, bits, x = problem(7, 8, 13, 0.5)
    dirty = bits.clone()
    dirty[:, -1] |= 0b11100000
    for refiner in ("decrease", "swap1"):
        assert torch.equal(refined(weight, dirty, x, refiner), refined(weight, bits, x, refiner))
