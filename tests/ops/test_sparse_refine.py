# SPDX-License-Identifier: Apache-2.0
"""Refinement of masks: kernels and references make equal masks, each step is the best one, and rows keep their counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

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
    """A random mask with equally many in each row (or in each group)."""
    width = group or columns
    order = rand.uniform(rows, columns // max(width, 1), width).argsort(-1).argsort(-1)
    return packed((order < round(density * width)).view(rows, columns))


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


def _weights_not_finite(args: list[Tensor]) -> None:
    args[0][0, 3], args[0][1, 5], args[0][2, 1] = torch.nan, torch.inf, -torch.inf


def _gram_not_finite(args: list[Tensor]) -> None:
    args[2][3, 4] = args[2][4, 3] = torch.nan
    args[2][6, 6] = torch.inf


GRAM = [
    Sample("odd", gram(4, 37, swaps=30)),
    Sample("few_candidates", gram(4, 65, 0.3, candidates=5)),
    Sample("groups", gram(3, 64, group=4)),
    Sample("groups_of_six", gram(4, 36, group=6, swaps=7)),
    Sample("ties", gram(5, 33, change=_equal_columns)),
    Sample("dead_features", gram(3, 17, change=_dead)),
    Sample("weights_not_finite", gram(5, 17, change=_weights_not_finite)),
    Sample("gram_not_finite", gram(5, 17, change=_gram_not_finite)),
    Sample("rank_deficient", gram(4, 63, 0.2, tokens=9)),
    Sample("nothing_pruned", gram(3, 17, 1.0)),
    Sample("nothing_kept", gram(3, 17, 0.0)),
    Sample("no_swaps", gram(3, 17, swaps=0)),
    Sample("one_column", gram(3, 1, 1.0)),
    Sample("no_rows", gram(0, 17)),
    Sample("wide", gram(3, 515, 0.2, swaps=1000), full=True),
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
