# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of the refinement of masks: the fused search against the sorts of the released code."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cofire.bench.cases import Args, Case, Random, plain
from cofire.ops import pack_mask, unpack_mask
from cofire.ops.sparse_refine import LEAST_GAIN
from cofire.registry import OPERATORS

Stream = Callable[[Tensor, int], Tensor]


def by_sort(score: Tensor, count: int) -> Tensor:
    """The columns of the least scores, as the released code finds them: the whole row is sorted."""
    return score.sort(dim=1, stable=True).indices[:, :count]


def by_topk(score: Tensor, count: int) -> Tensor:
    return score.topk(count, dim=1, largest=False).indices


def _lockstep(least: Stream) -> Callable[..., Tensor]:
    """All rows in lockstep, in the weight's dtype as released; each row's error in fp64, so that the masks are the same.

    The four lists of candidates must not meet: there are more than twice as many as swaps.
    """

    def swap(
        weight: Tensor, bits: Tensor, mean: Tensor, norm: Tensor, growth: Tensor,
        max_swaps: int, threshold: float, official: bool, group: int,
    ) -> Tensor:  # fmt: skip
        columns = weight.shape[1]
        kept = unpack_mask(bits, columns)
        share = weight * mean
        gain, metric = share * growth, weight.abs() * norm
        there = ~kept & (growth > 0)
        streams = [
            least(torch.where(there, -gain, torch.inf), max_swaps),  # of a positive error
            least(torch.where(there, gain, torch.inf), max_swaps),
            least(torch.where(kept & (share < 0), metric, torch.inf), max_swaps),
            least(torch.where(kept & (share > 0), metric, torch.inf), max_swaps),
        ]
        grow, go = torch.stack(streams[:2]), torch.stack(streams[2:])
        error = share.masked_fill(kept, 0.0).sum(1, dtype=torch.float64)
        limit = torch.full_like(error, threshold)
        if not official:
            limit = threshold * share.abs().sum(1, dtype=torch.float64) / math.sqrt(columns)
        row = torch.arange(len(weight), device=weight.device)
        place = row.new_zeros((2, len(weight)))  # in the lists, by the sign of the error
        active = error.abs() > limit
        for _ in range(max_swaps):
            side = (error < 0).long()
            at = place[side, row]
            grown, gone = grow[side, row, at], go[side, row, at]
            new = error + share[row, gone].double() - share[row, grown].double()
            swap = active if official else active & (new.abs() < error.abs())
            kept[row, grown] |= swap
            kept[row, gone] &= ~swap
            place[side, row] = at + swap.long()
            error = torch.where(swap, new, error)
            active = swap & (error.abs() > limit)
        return pack_mask(kept)

    return swap


def _statistics(rand: Random, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Powers of two, so that products are exact in fp32 as in fp64, and masks the same whoever computes them."""
    sign = torch.where(rand.uniform(columns) < 0.5, -1.0, 1.0)
    mean, norm, growth = (2.0 ** (rand.uniform(columns) * 6 - 3).round() for _ in range(3))
    return sign * mean, norm, growth


def _dsnot(
    rows: int, columns: int, density: float, official: bool, quick: bool = False, overhead: bool = False
) -> Case:
    swaps, threshold = (50, 0.1) if official else (max(8, columns // 80), 1e-3)

    def of(rows: int, columns: int, swaps: int) -> Callable[[Random], Args]:
        def args(rand: Random) -> Args:
            weight = rand.normal(rows, columns)
            order = rand.uniform(rows, columns).argsort(1).argsort(1)
            return (
                weight,
                pack_mask(order < density * columns),
                *_statistics(rand, columns),
                swaps,
                threshold,
                official,
                0,
            )

        return args

    return Case(
        "dsnot_swap",
        f"{rows}x{columns} keep {density:g}, {swaps} swaps{', released loop' if official else ''}",
        torch.float32,
        of(rows, columns, swaps),
        {
            "eager": plain(_lockstep(by_sort)),
            "dense": {"sort": plain(_lockstep(by_sort)), "topk": plain(_lockstep(by_topk))},
        },
        of(8, 64, 4),
        quick=quick,
        overhead=overhead,
        bits=(1,),
    )


def _pair_by_pair(least: Stream) -> Callable[..., Tensor]:
    """All rows that still change in lockstep; what the loop needs of them is kept up to date in place."""

    def swap(
        weight: Tensor, bits: Tensor, gram: Tensor, correlation: Tensor, max_swaps: int, candidates: int, group: int
    ) -> Tensor:
        columns = weight.shape[1]
        mask = unpack_mask(bits, columns)
        row = torch.arange(len(weight), device=weight.device)
        w, c, kept = weight.double(), correlation.clone(), mask.clone()
        flat, own = gram.double().flatten(), w * w * gram.diagonal()
        limit = (w * c).masked_fill_(kept, 0.0).sum(1).abs_() * -LEAST_GAIN
        for _ in range(max_swaps):
            alone = (w * c).mul_(2)
            going = torch.where(kept, own + alone, torch.inf)
            coming = torch.where(kept, torch.inf, own - alone)
            gone, grown = least(going, candidates), least(coming, candidates)
            both = w.gather(1, gone).mul_(2)[:, :, None] * w.gather(1, grown)[:, None]
            both *= flat.take(gone[:, :, None] * columns + grown[:, None])
            change = (going.gather(1, gone)[:, :, None] + coming.gather(1, grown)[:, None]).sub_(both)
            change, place = change.flatten(1).min(1)
            better = change < limit
            if not bool(better.all()):  # rows that have come to an end change no more
                mask[row] = kept
                if not bool(better.any()):
                    break
                row, w, c, kept, own, limit = (x[better] for x in (row, w, c, kept, own, limit))
                gone, grown, place = gone[better], grown[better], place[better]
            p = gone.gather(1, (place // grown.shape[1])[:, None])
            q = grown.gather(1, (place % grown.shape[1])[:, None])
            c += w.gather(1, p) * gram[p[:, 0]] - w.gather(1, q) * gram[q[:, 0]]
            kept.scatter_(1, p, False).scatter_(1, q, True)
        mask[row] = kept
        return pack_mask(mask)

    return swap


def _gram_flops(
    weight: Tensor, bits: Tensor, gram: Tensor, correlation: Tensor, max_swaps: int, candidates: int, group: int
) -> int:
    """Where no row ends before its last swap: four for each pair that is tried, and seven for each weight: what it would
    change alone, and how its correlation changes. (Without a pattern.)"""
    kept = unpack_mask(bits, weight.shape[1]).sum(1)
    pairs = kept.clamp(max=candidates) * (weight.shape[1] - kept).clamp(max=candidates)
    return max_swaps * (4 * int(pairs.sum()) + 7 * weight.numel())


def _gram(rows: int, columns: int, density: float, swaps: int, quick: bool = False, overhead: bool = False) -> Case:
    def of(rows: int, columns: int, swaps: int) -> Callable[[Random], Args]:
        def args(rand: Random) -> Args:
            weight = rand.normal(rows, columns)
            kept = rand.uniform(rows, columns).argsort(1).argsort(1) < density * columns
            x = rand.normal(2 * columns, columns) @ (rand.normal(columns, columns) / math.sqrt(columns)) + rand.normal(
                columns
            )
            gram = x.t() @ x / len(x)
            correlation = torch.where(kept, 0.0, weight.double()) @ gram.double()
            return weight, pack_mask(kept), gram, correlation, swaps, 64, 0

        return args

    return Case(
        "gram_swap",
        f"{rows}x{columns} keep {density:g}, {swaps} swaps",
        torch.float32,
        of(rows, columns, swaps),
        {
            "eager": plain(OPERATORS["gram_swap"].reference),
            "dense": {"sort": plain(_pair_by_pair(by_sort)), "topk": plain(_pair_by_pair(by_topk))},
        },
        of(4, 64, 4),
        flops=_gram_flops,
        quick=quick,
        overhead=overhead,
        bits=(1,),
    )


CASES = [
    _dsnot(512, 512, 0.5, official=False, quick=True, overhead=True),
    _dsnot(4096, 4096, 0.5, official=False),
    _dsnot(4096, 4096, 0.5, official=True),
    _gram(256, 512, 0.5, 8, quick=True, overhead=True),
]
