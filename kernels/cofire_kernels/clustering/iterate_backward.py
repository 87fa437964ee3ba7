# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Iterations of differentiable k-means, backward: one launch each, from the centroids on the way alone.

As in the forward, a launch adds up what its predecessor left. The gradient that a new centroid receives is divided by the
centroid's total, which is a sum over all rows: a launch therefore also adds up the totals that its successor needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels.clustering.iterate import Sums
from cofire_kernels.clustering.rows import (
    Rows,
    Rules,
    attend,
    clamp,
    in_centroids,
    load_rows,
    merge,
    pull,
    scalar,
)


@triton.jit
def dkm_output_backward_kernel(
    x_ptr,
    counts_ptr,
    index_ptr,
    length_ptr,
    before_ptr,
    after_ptr,
    grad_ptr,
    local_ptr,
    moments_ptr,
    totals_ptr,
    pulled_ptr,
    tau_ptr,
    longest,
    clusters,
    d,
    eps: tl.float64,
    prune: tl.float64,
    COUNTED: tl.constexpr,
    KEEP_SPARSITY: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of ``out = A(before) after``: the part of each row by itself, and the sums for ``after`` and ``before``.

    The gradient of a counted value is the sum over all weights that have it; what one of them does to itself is then
    that weight's own gradient times the slope, which is what is written.
    """
    partition = tl.program_id(0).to(tl.int64)
    slot, slots = tl.program_id(1), tl.num_programs(1)
    length = tl.load(length_ptr + partition)
    offset, inside = in_centroids(clusters, d, BLOCK_K, BLOCK_D)
    k, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    moment = tl.zeros([BLOCK_N, BLOCK_K, BLOCK_D], tl.float64)
    pulled = tl.zeros([BLOCK_N, BLOCK_K, BLOCK_D], tl.float64)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float64)
    if slot * BLOCK_N < length:
        palette = partition * clusters * d + offset
        before = tl.load(before_ptr + palette, mask=inside, other=0).to(COMPUTE)
        after = tl.load(after_ptr + palette, mask=inside, other=0).to(COMPUTE)
        tau = tl.load(tau_ptr + partition).to(COMPUTE)
        lowest, preference = scalar(eps, COMPUTE), scalar(prune, COMPUTE)
        for start in range(slot * BLOCK_N, length, slots * BLOCK_N):
            row = start + tl.arange(0, BLOCK_N)
            x, times, place = load_rows(
                x_ptr, counts_ptr, index_ptr, partition, row, length, longest, d, COUNTED, COMPUTE, BLOCK_D
            )
            exists = (row < length)[:, None] & (column < d)[None, :]
            grad = tl.load(grad_ptr + place, mask=exists, other=0).to(COMPUTE)
            soft, away = attend(x, before, tau, preference, clusters, KEEP_SPARSITY, BLOCK_K)
            attention = clamp(soft, lowest, clusters, BLOCK_K)
            total += times[:, None] * attention
            moment += attention.to(tl.float64)[:, :, None] * grad[:, None, :]
            own = tl.full([BLOCK_N, BLOCK_D], 1.0, COMPUTE) if COUNTED else grad
            by_centroid = pull(tl.sum(own[:, None, :] * after[None, :, :], 2), soft, away, tau, lowest)
            local = -tl.sum(by_centroid, 1)
            tl.store(local_ptr + place, local.to(local_ptr.dtype.element_ty), mask=exists)
            if COUNTED:
                by_centroid = by_centroid * grad[:, None, :]
            pulled += tl.where(exists[:, None, :], by_centroid, 0.0).to(tl.float64)
    out = (partition * slots + slot) * clusters
    tl.store(moments_ptr + out * d + offset, tl.sum(moment, 0), mask=inside)
    tl.store(pulled_ptr + out * d + offset, tl.sum(pulled, 0), mask=inside)
    tl.store(totals_ptr + out + k, tl.sum(total, 0), mask=k < clusters)


@triton.jit
def dkm_update_backward_kernel(
    x_ptr,
    counts_ptr,
    index_ptr,
    length_ptr,
    next_ptr,
    before_ptr,
    after_ptr,
    shared_ptr,
    moments_ptr,
    totals_ptr,
    extra_ptr,
    new_moments_ptr,
    new_totals_ptr,
    tau_ptr,
    slots,
    longest,
    clusters,
    d,
    eps: tl.float64,
    prune: tl.float64,
    COUNTED: tl.constexpr,
    ENFORCE_ZERO: tl.constexpr,
    KEEP_SPARSITY: tl.constexpr,
    EXTRA: tl.constexpr,
    NEXT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One update, from ``before`` to ``after``: from the gradient of ``after`` to those of each row and of ``before``.

    The gradient of the rows is added to what is there. ``extra``: what ``before`` receives from elsewhere. ``next``: the
    centroids before ``before``, whose totals the next launch needs.
    """
    partition = tl.program_id(0).to(tl.int64)
    slot, new_slots = tl.program_id(1), tl.num_programs(1)
    length = tl.load(length_ptr + partition)
    offset, inside = in_centroids(clusters, d, BLOCK_K, BLOCK_D)
    k, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    moment = tl.zeros([BLOCK_N, BLOCK_K, BLOCK_D], tl.float64)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float64)
    stay = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    if (slot == 0) | (slot * BLOCK_N < length):
        incoming, count = merge(moments_ptr, totals_ptr, partition, slots, clusters, d, BLOCK_N, BLOCK_K, BLOCK_D)
        if ENFORCE_ZERO:
            incoming = tl.where((k == 0)[:, None], 0.0, incoming)
        empty = (count == 0)[:, None]
        share = tl.where(empty, 0.0, incoming / tl.where(empty, 1.0, count[:, None])).to(COMPUTE)
        stay = tl.where(empty, incoming, 0.0)
        if EXTRA:
            stay += merge(extra_ptr, totals_ptr, partition, slots, clusters, d, BLOCK_N, BLOCK_K, BLOCK_D)[0]
        palette = partition * clusters * d + offset
        before = tl.load(before_ptr + palette, mask=inside, other=0).to(COMPUTE)
        after = tl.load(after_ptr + palette, mask=inside, other=0).to(COMPUTE)
        following = tl.load(next_ptr + palette, mask=inside, other=0).to(COMPUTE)
        tau = tl.load(tau_ptr + partition).to(COMPUTE)
        lowest, preference = scalar(eps, COMPUTE), scalar(prune, COMPUTE)
        for start in range(slot * BLOCK_N, length, new_slots * BLOCK_N):
            row = start + tl.arange(0, BLOCK_N)
            x, times, place = load_rows(
                x_ptr, counts_ptr, index_ptr, partition, row, length, longest, d, COUNTED, COMPUTE, BLOCK_D
            )
            soft, away = attend(x, before, tau, preference, clusters, KEEP_SPARSITY, BLOCK_K)
            attention = clamp(soft, lowest, clusters, BLOCK_K)
            direct = tl.sum(attention[:, :, None] * share[None, :, :], 1)
            beyond = x[:, None, :] - after[None, :, :]
            by_centroid = pull(tl.sum(beyond * share[None, :, :], 2), soft, away, tau, lowest)
            by_row = direct - tl.sum(by_centroid, 1)
            exists = (row < length)[:, None] & (column < d)[None, :]
            so_far = tl.load(shared_ptr + place, mask=exists, other=0)
            tl.store(shared_ptr + place, so_far + by_row.to(shared_ptr.dtype.element_ty), mask=exists)
            moment += times[:, None, None] * by_centroid
            if NEXT:
                soft, _ = attend(x, following, tau, preference, clusters, KEEP_SPARSITY, BLOCK_K)
                total += times[:, None] * clamp(soft, lowest, clusters, BLOCK_K)
    out = (partition * new_slots + slot) * clusters
    first = tl.where(slot == 0, 1.0, 0.0)
    tl.store(new_moments_ptr + out * d + offset, tl.sum(moment, 0) + first * stay, mask=inside)
    tl.store(new_totals_ptr + out + k, tl.sum(total, 0), mask=k < clusters)


def output_backward(
    rows: Rows,
    before: Tensor,
    after: Tensor,
    grad: Tensor,
    local: Tensor,
    tau: Tensor,
    rules: Rules,
    compute: tl.dtype,
) -> tuple[Sums, Tensor]:
    """Write ``local``; return the gradient of ``after`` with the totals at ``before``, and the gradient of ``before``."""
    partitions, clusters, d = before.shape
    tile = rows.tile(clusters)
    slots = rows.slots(tile["BLOCK_N"])
    sums = Sums(partitions, slots, clusters, d, before.device)
    pulled = torch.empty_like(sums.moments)
    with torch.cuda.device_of(before):
        dkm_output_backward_kernel[(partitions, slots)](
            *rows.pointers,
            before,
            after,
            grad,
            local,
            sums.moments,
            sums.totals,
            pulled,
            tau,
            rows.longest,
            clusters,
            d,
            rules.eps,
            rules.prune_threshold,
            COUNTED=rows.counted,
            KEEP_SPARSITY=rules.keep_sparsity,
            COMPUTE=compute,
            **tile,
        )
    return sums, pulled


def update_backward(
    rows: Rows,
    following: Tensor | None,
    before: Tensor,
    after: Tensor,
    shared: Tensor,
    previous: Sums,
    extra: Tensor | None,
    tau: Tensor,
    rules: Rules,
    compute: tl.dtype,
) -> Sums:
    """Add to ``shared``; return the gradient of ``before``, with the totals at ``following`` if there is such."""
    partitions, clusters, d = before.shape
    tile = rows.tile(clusters)
    slots = rows.slots(tile["BLOCK_N"])
    sums = Sums(partitions, slots, clusters, d, before.device)
    with torch.cuda.device_of(before):
        dkm_update_backward_kernel[(partitions, slots)](
            *rows.pointers,
            before if following is None else following,
            before,
            after,
            shared,
            previous.moments,
            previous.totals,
            previous.moments if extra is None else extra,
            sums.moments,
            sums.totals,
            tau,
            previous.slots,
            rows.longest,
            clusters,
            d,
            rules.eps,
            rules.prune_threshold,
            COUNTED=rows.counted,
            ENFORCE_ZERO=rules.enforce_zero,
            KEEP_SPARSITY=rules.keep_sparsity,
            EXTRA=extra is not None,
            NEXT=following is not None,
            COMPUTE=compute,
            **tile,
        )
    return sums
