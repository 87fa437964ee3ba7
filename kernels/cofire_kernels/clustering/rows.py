# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""What is clustered: rows of d numbers that count n times each, in partitions; and the attention that they pay.

Rows are either *counted* values (d = 1; each partition lists the values that occur in it and how often) or the weights
themselves (each once). All kernels of the family read both through :func:`load_rows`, a block of rows at a time, with
all centroids of the partition in registers.

Programs ``(partition, slot)`` share the rows of a partition: slot s takes the blocks s, s + slots, s + 2 slots, ...
Each writes its sums, in fp64, to a place of its own, and whoever needs them adds the slots in their order
(:func:`merge`). Which rows and which slots meet depends on sizes and counts alone, so every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.numerics import INTERPRETED
from cofire_kernels.selection import compact

#: Programs that share the rows: of a whole tensor, and of a table, which has some thousand rows.
PROGRAMS, TABLE_PROGRAMS = 512, 128
#: The interpreter, which takes as long for a small tile as for a large one, works on tiles larger by this factor.
INTERPRETED_LARGER = 16


class Rules(NamedTuple):
    """What an iteration of k-means does besides k-means."""

    eps: float  #: attention below it counts as it
    enforce_zero: bool  #: centroid 0 is zero
    prune_threshold: float  #: subtracted from the squared distance to centroid 0
    keep_sparsity: bool  #: only rows of zeros may be assigned to centroid 0


@dataclass(frozen=True)
class Rows:
    """The rows of some partitions, on the device; ``length`` may be shortened to leave a partition out."""

    x: Tensor  #: values ``[U]``, or the weights, flat
    counts: Tensor | None  #: int32 ``[partitions, U]``; None: each row of the weights counts once
    index: Tensor | None  #: int32 ``[partitions, U]``: the values that occur, ascending, in the first places
    length: Tensor  #: int32 ``[partitions]``: rows in each
    longest: int  #: rows that a partition can have, U or ``group_size / d``
    d: int

    @property
    def partitions(self) -> int:
        return int(self.length.shape[0])

    @property
    def counted(self) -> bool:
        return self.counts is not None

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """The first arguments of every kernel that calls :func:`load_rows`."""
        return self.x, self.counts, self.index, self.length

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """One number per row and dimension; zero for values that do not occur."""
        if self.counts is not None:
            return torch.zeros(self.counts.shape, dtype=dtype, device=self.x.device)
        return torch.empty(self.x.shape, dtype=dtype, device=self.x.device)

    def tile(self, clusters: int) -> dict[str, Any]:
        """Block sizes and launch options: as many rows as fill the tile together with all centroids."""
        tile = dict(configs.tile("dkm_tables" if self.counted else "dkm", self.x.device, clusters=clusters * self.d))
        block_k, block_d = triton.next_power_of_2(clusters), triton.next_power_of_2(self.d)
        elements = tile.pop("ELEMENTS") * (INTERPRETED_LARGER if INTERPRETED.value else 1)
        block_n = max(1, elements // (block_k * block_d))
        return {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_D": block_d, **tile}

    def slots(self, block: int) -> int:
        programs = TABLE_PROGRAMS if self.counted else PROGRAMS
        return int(min(triton.cdiv(self.longest, block), max(1, programs // self.partitions)))


def counted_rows(values: Tensor, counts: Tensor) -> Rows:
    """The values that occur in each partition, without asking how many there are."""
    counts = counts.contiguous()
    index, length = compact(counts > 0)
    return Rows(values.contiguous(), counts, index, length, counts.shape[1], 1)


def weight_rows(weight: Tensor, group_size: int, d: int) -> Rows:
    weight = weight.contiguous().view(-1)
    rows, longest = weight.numel() // d, min(group_size, weight.numel()) // d
    starts = torch.arange(0, rows, longest, device=weight.device)
    return Rows(weight, None, None, (rows - starts).clamp(max=longest).int(), longest, d)


@triton.jit
def load_rows(
    x_ptr,
    counts_ptr,
    index_ptr,
    partition,
    row,
    length,
    longest,
    d,
    COUNTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of a block of rows: the numbers ``[N, D]``, how often each row counts ``[N]``, and where its results go ``[N, D]``."""
    inside = row < length
    column = tl.arange(0, BLOCK_D)
    if COUNTED:
        bin = tl.load(index_ptr + partition * longest + row, mask=inside, other=0)
        x = tl.load(x_ptr + bin, mask=inside, other=0)[:, None]
        place = (partition * longest + bin)[:, None] + tl.zeros([1, BLOCK_D], tl.int64)
        times = tl.load(counts_ptr + partition * longest + bin, mask=inside, other=0).to(tl.float64)
    else:
        place = (partition * longest + row)[:, None] * d + column[None, :]
        x = tl.load(x_ptr + place, mask=inside[:, None] & (column < d)[None, :], other=0)
        times = inside.to(tl.float64)
    return x.to(COMPUTE), times, place


@triton.jit
def in_centroids(clusters, d, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets into one palette, and which of them exist."""
    k, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    return k[:, None] * d + column[None, :], (k < clusters)[:, None] & (column < d)[None, :]


@triton.jit
def merge(
    moments_ptr,
    totals_ptr,
    partition,
    slots,
    clusters,
    d,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sums ``[K, D]`` and ``[K]`` of all slots, in a fixed order."""
    offset, inside = in_centroids(clusters, d, BLOCK_K, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    moment = tl.zeros([BLOCK_N, BLOCK_K, BLOCK_D], tl.float64)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float64)
    for start in range(0, slots, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        place = (partition * slots + slot) * clusters
        moment += tl.load(
            moments_ptr + (place * d)[:, None, None] + offset[None, :, :],
            mask=(slot < slots)[:, None, None] & inside[None, :, :],
            other=0,
        )
        there = (slot < slots)[:, None] & (k < clusters)[None, :]
        total += tl.load(totals_ptr + place[:, None] + k[None, :], mask=there, other=0)
    return tl.sum(moment, 0), tl.sum(total, 0)


@triton.jit
def distances(x, c, prune, clusters, KEEP_SPARSITY: tl.constexpr, BLOCK_K: tl.constexpr):
    """Squared distances ``[N, K]``, with the preference for centroid 0, and the differences ``[N, K, D]``."""
    k = tl.arange(0, BLOCK_K)
    away = x[:, None, :] - c[None, :, :]
    plain = tl.sum(away * away, 2)
    distance = tl.where((k == 0)[None, :], plain - prune, plain)
    if KEEP_SPARSITY:
        occupied = tl.max((x != 0).to(tl.int32), 1) > 0
        distance = tl.where((k == 0)[None, :] & occupied[:, None], float("inf"), distance)
    return tl.where((k < clusters)[None, :], distance, float("inf")), plain, away


@triton.jit
def attend(x, c, tau, prune, clusters, KEEP_SPARSITY: tl.constexpr, BLOCK_K: tl.constexpr):
    """The attention ``[N, K]`` before its clamp, zero where there is no centroid, and the differences ``[N, K, D]``."""
    distance, _, away = distances(x, c, prune, clusters, KEEP_SPARSITY, BLOCK_K)
    score = (tl.min(distance, 1)[:, None] - distance) / tau
    raised = tl.exp(score)
    return raised / tl.sum(raised, 1)[:, None], away


@triton.jit
def clamp(soft, eps, clusters, BLOCK_K: tl.constexpr):
    return tl.where((tl.arange(0, BLOCK_K) < clusters)[None, :], tl.maximum(soft, eps), 0.0)


@triton.jit
def pull(d_attention, soft, away, tau, eps):
    """From the gradient of the clamped attention to that of the centroids, per row ``[N, K, D]``; the row's is minus its sum."""
    passed = tl.where(soft > eps, d_attention, 0.0)
    d_score = soft * (passed - tl.sum(soft * passed, 1)[:, None])
    return (2 / tau * d_score)[:, :, None] * away


@triton.jit
def scalar(x, COMPUTE: tl.constexpr):
    """A number given as fp64, or as a Python float in the interpreter, as a tile of one."""
    return (tl.zeros([1, 1], tl.float64) + x).to(COMPUTE)
