# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Iterations of differentiable k-means, forward: one launch each.

A launch adds up the sums of its predecessor to the new centroids (every program for itself: they are few), then its own
rows to sums of its own. The last one has no rows to add but their results to write.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels.clustering.rows import (
    Rows,
    Rules,
    attend,
    clamp,
    distances,
    in_centroids,
    load_rows,
    merge,
    scalar,
)


@triton.jit
def new_centroids(
    before_ptr,
    moments_ptr,
    totals_ptr,
    partition,
    slots,
    clusters,
    d,
    ENFORCE_ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Where the sums of the previous launch move the centroids; without slots there was none. An empty cluster stays."""
    offset, inside = in_centroids(clusters, d, BLOCK_K, BLOCK_D)
    c = tl.load(before_ptr + partition * clusters * d + offset, mask=inside, other=0)
    if slots > 0:
        moment, total = merge(moments_ptr, totals_ptr, partition, slots, clusters, d, BLOCK_N, BLOCK_K, BLOCK_D)
        empty = total == 0
        c = tl.where(empty[:, None], c, moment / tl.where(empty, 1.0, total)[:, None])
        if ENFORCE_ZERO:
            c = tl.where((tl.arange(0, BLOCK_K) == 0)[:, None], 0.0, c)
    return c


@triton.jit
def dkm_sums_kernel(
    x_ptr,
    counts_ptr,
    index_ptr,
    length_ptr,
    before_ptr,
    after_ptr,
    moments_ptr,
    totals_ptr,
    new_moments_ptr,
    new_totals_ptr,
    tau_ptr,
    repeat,
    slots,
    longest,
    clusters,
    d,
    eps: tl.float64,
    prune: tl.float64,
    COUNTED: tl.constexpr,
    ENFORCE_ZERO: tl.constexpr,
    KEEP_SPARSITY: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``sum_n n A x`` and ``sum_n n A`` of each centroid; ``repeat`` palettes look at the same partition."""
    palette = tl.program_id(0).to(tl.int64)
    slot, new_slots = tl.program_id(1), tl.num_programs(1)
    partition = palette // repeat
    length = tl.load(length_ptr + partition)
    offset, inside = in_centroids(clusters, d, BLOCK_K, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    moment = tl.zeros([BLOCK_N, BLOCK_K, BLOCK_D], tl.float64)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float64)
    if (slot == 0) | (slot * BLOCK_N < length):
        c = new_centroids(
            before_ptr, moments_ptr, totals_ptr, palette, slots, clusters, d, ENFORCE_ZERO, BLOCK_N, BLOCK_K, BLOCK_D
        )
        if (slot == 0) & (slots > 0):
            tl.store(after_ptr + palette * clusters * d + offset, c, mask=inside)
        c = c.to(COMPUTE)
        tau = tl.load(tau_ptr + partition).to(COMPUTE)
        lowest, preference = scalar(eps, COMPUTE), scalar(prune, COMPUTE)
        for start in range(slot * BLOCK_N, length, new_slots * BLOCK_N):
            x, times, _ = load_rows(
                x_ptr, counts_ptr, index_ptr, partition, start + tl.arange(0, BLOCK_N), length, longest, d,
                COUNTED, COMPUTE, BLOCK_D,
            )  # fmt: skip
            soft, _ = attend(x, c, tau, preference, clusters, KEEP_SPARSITY, BLOCK_K)
            share = times[:, None] * clamp(soft, lowest, clusters, BLOCK_K)
            total += share
            moment += share[:, :, None] * x.to(tl.float64)[:, None, :]
    place = (palette * new_slots + slot) * clusters
    tl.store(new_moments_ptr + place * d + offset, tl.sum(moment, 0), mask=inside)
    tl.store(new_totals_ptr + place + k, tl.sum(total, 0), mask=k < clusters)


@triton.jit
def dkm_apply_kernel(
    x_ptr,
    counts_ptr,
    index_ptr,
    length_ptr,
    before_ptr,
    after_ptr,
    moments_ptr,
    totals_ptr,
    out_ptr,
    tau_ptr,
    slots,
    longest,
    clusters,
    d,
    eps: tl.float64,
    prune: tl.float64,
    COUNTED: tl.constexpr,
    HARD: tl.constexpr,
    ENFORCE_ZERO: tl.constexpr,
    KEEP_SPARSITY: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What becomes of each row: the mean of the last centroids under the attention to the last but one."""
    partition = tl.program_id(0).to(tl.int64)
    slot, new_slots = tl.program_id(1), tl.num_programs(1)
    length = tl.load(length_ptr + partition)
    offset, inside = in_centroids(clusters, d, BLOCK_K, BLOCK_D)
    k, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    if (slot == 0) | (slot * BLOCK_N < length):
        before = tl.load(before_ptr + partition * clusters * d + offset, mask=inside, other=0).to(COMPUTE)
        c = new_centroids(
            before_ptr, moments_ptr, totals_ptr, partition, slots, clusters, d, ENFORCE_ZERO, BLOCK_N, BLOCK_K, BLOCK_D
        )
        if (slot == 0) & (slots > 0):
            tl.store(after_ptr + partition * clusters * d + offset, c, mask=inside)
        after = c.to(COMPUTE)
        tau = tl.load(tau_ptr + partition).to(COMPUTE)
        lowest, preference = scalar(eps, COMPUTE), scalar(prune, COMPUTE)
        for start in range(slot * BLOCK_N, length, new_slots * BLOCK_N):
            row = start + tl.arange(0, BLOCK_N)
            x, _, place = load_rows(
                x_ptr, counts_ptr, index_ptr, partition, row, length, longest, d, COUNTED, COMPUTE, BLOCK_D
            )
            if HARD:  # the nearest in fp64, of equally near ones the first
                final = after.to(tl.float32).to(tl.float64)
                distance, _, _ = distances(
                    x.to(tl.float64), final, scalar(prune, tl.float64), clusters, KEEP_SPARSITY, BLOCK_K
                )
                nearest = distance == tl.min(distance, 1)[:, None]
                first = tl.min(tl.where(nearest, k[None, :], BLOCK_K), 1)
                share = (k[None, :] == first[:, None]).to(COMPUTE)
            else:
                soft, _ = attend(x, before, tau, preference, clusters, KEEP_SPARSITY, BLOCK_K)
                share = clamp(soft, lowest, clusters, BLOCK_K)
            result = tl.sum(share[:, :, None] * after[None, :, :], 1)
            exists = (row < length)[:, None] & (column < d)[None, :]
            tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=exists)


class Sums:
    """The sums of one launch, per palette and slot: fp64 ``[palettes, slots, K, d]`` and ``[palettes, slots, K]``."""

    def __init__(self, palettes: int, slots: int, clusters: int, d: int, device: torch.device) -> None:
        self.slots = slots
        self.moments = torch.empty((palettes, slots, clusters, d), dtype=torch.float64, device=device)
        self.totals = torch.empty((palettes, slots, clusters), dtype=torch.float64, device=device)

    def merged(self) -> tuple[Tensor, Tensor]:
        """``[palettes, K, d]`` and ``[palettes, K]``."""
        return self.moments.sum(1), self.totals.sum(1)


def add_up(
    rows: Rows, before: Tensor, after: Tensor, previous: Sums | None, tau: Tensor, rules: Rules, compute: tl.dtype
) -> Sums:
    """One launch: the centroids that ``previous`` leads to, into ``after``, and the sums of an update of these."""
    palettes, clusters, d = before.shape
    tile = rows.tile(clusters)
    slots = rows.slots(tile["BLOCK_N"])
    sums = Sums(palettes, slots, clusters, d, before.device)
    old = sums if previous is None else previous
    with torch.cuda.device_of(before):
        dkm_sums_kernel[(palettes, slots)](
            *rows.pointers,
            before,
            after,
            old.moments,
            old.totals,
            sums.moments,
            sums.totals,
            tau,
            palettes // rows.partitions,
            0 if previous is None else old.slots,
            rows.longest,
            clusters,
            d,
            rules.eps,
            rules.prune_threshold,
            COUNTED=rows.counted,
            ENFORCE_ZERO=rules.enforce_zero,
            KEEP_SPARSITY=rules.keep_sparsity,
            COMPUTE=compute,
            **tile,
        )
    return sums


def iterate(rows: Rows, path: Tensor, tau: Tensor, rules: Rules, compute: tl.dtype) -> Sums:
    """Fill ``path [T + 1, P, K, d]`` from its first centroids on; the last ones are left as sums."""
    sums = None
    for t in range(path.shape[0] - 1):
        sums = add_up(rows, path[max(t - 1, 0)], path[t], sums, tau, rules, compute)
    assert sums is not None
    return sums


def moved(sums: Sums, before: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """The same by torch operators: the centroids that ``sums`` leads to from ``before``, and the totals."""
    moments, totals = sums.merged()
    empty = (totals == 0)[:, :, None]
    after = torch.where(empty, before, moments / totals[:, :, None].masked_fill(empty, 1))
    if rules.enforce_zero:
        after[:, 0] = 0
    return after, totals


def plain_updates(rows: Rows, start: Tensor, tau: Tensor, rules: Rules, iterations: int) -> Tensor:
    """The centroids after some updates in fp64."""
    path = start.new_empty((iterations + 1, *start.shape))
    path[0] = start
    sums = iterate(rows, path, tau, rules, tl.float64)
    return moved(sums, path[-2], rules)[0]


def apply(
    rows: Rows,
    before: Tensor,
    after: Tensor,
    previous: Sums | None,
    out: Tensor,
    tau: Tensor,
    rules: Rules,
    compute: tl.dtype,
    hard: bool,
) -> None:
    """Write what becomes of each row into ``out``; into ``after``, if there are sums, the last centroids."""
    partitions, clusters, d = before.shape
    tile = rows.tile(clusters)
    with torch.cuda.device_of(before):
        dkm_apply_kernel[(partitions, rows.slots(tile["BLOCK_N"]))](
            *rows.pointers,
            before,
            after,
            after if previous is None else previous.moments,
            after if previous is None else previous.totals,
            out,
            tau,
            0 if previous is None else previous.slots,
            rows.longest,
            clusters,
            d,
            rules.eps,
            rules.prune_threshold,
            COUNTED=rows.counted,
            HARD=hard,
            ENFORCE_ZERO=rules.enforce_zero,
            KEEP_SPARSITY=rules.keep_sparsity,
            COMPUTE=compute,
            **tile,
        )


def without(rows: Rows, left_out: Tensor) -> Rows:
    """The same rows, but none in the partitions that are left out: their programs end at once, their centroids stay."""
    return replace(rows, length=rows.length.masked_fill(left_out, 0))
