# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""The nearest centroid of each row of weights, in fp64; of equally near ones the first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels.clustering.rows import distances, in_centroids, load_rows, scalar, weight_rows


@triton.jit
def palettize_kernel(
    x_ptr,
    counts_ptr,
    index_ptr,
    length_ptr,
    c_ptr,
    labels_ptr,
    inertia_ptr,
    longest,
    clusters,
    d,
    prune: tl.float64,
    KEEP_SPARSITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    partition = tl.program_id(0).to(tl.int64)
    slot, slots = tl.program_id(1), tl.num_programs(1)
    length = tl.load(length_ptr + partition)
    offset, inside = in_centroids(clusters, d, BLOCK_K, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    c = tl.load(c_ptr + partition * clusters * d + offset, mask=inside, other=0).to(tl.float64)
    inertia = tl.zeros([BLOCK_N], tl.float64)
    for start in range(slot * BLOCK_N, length, slots * BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        x, times, _ = load_rows(
            x_ptr, counts_ptr, index_ptr, partition, row, length, longest, d, False, tl.float64, BLOCK_D
        )
        distance, plain, _ = distances(x, c, scalar(prune, tl.float64), clusters, KEEP_SPARSITY, BLOCK_K)
        nearest = distance == tl.min(distance, 1)[:, None]
        label = tl.min(tl.where(nearest, k[None, :], clusters - 1), 1)
        inertia += times * tl.sum(tl.where(k[None, :] == label[:, None], plain, 0.0), 1)
        tl.store(labels_ptr + partition * longest + row, label.to(tl.uint8), mask=row < length)
    tl.store(inertia_ptr + partition * slots + slot, tl.sum(inertia, 0))


def palettize(
    weight: Tensor, centroids: Tensor, group_size: int, prune_threshold: float, keep_sparsity: bool
) -> tuple[Tensor, Tensor]:
    torch._assert_async(weight.isfinite().all(), "palettize: weight must be finite")
    partitions, clusters, d = centroids.shape
    rows = weight_rows(weight, group_size, d)
    shape = weight.shape if d == 1 else (weight.numel() // d,)
    labels = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    tile = rows.tile(clusters)
    slots = rows.slots(tile["BLOCK_N"])
    inertia = torch.empty((partitions, slots), dtype=torch.float64, device=weight.device)
    with torch.cuda.device_of(weight):
        palettize_kernel[(partitions, slots)](
            *rows.pointers,
            centroids.contiguous(),
            labels,
            inertia,
            rows.longest,
            clusters,
            d,
            prune_threshold,
            KEEP_SPARSITY=keep_sparsity,
            **tile,
        )
    return labels, inertia.sum(1).to(centroids.dtype)
