# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""The centroids that an update leaves in place, by Newton's method, for all partitions at once.

The host never asks how far it got: the number of launches is fixed, a partition that has arrived has no rows any more
(its programs end at once), and of the steps of a line search, tried side by side, the first good one is taken on the
device. Sums and Jacobians come from kernels, the K x K systems go to torch.

Source: Jaffe, Singh, Bullo, "IDKM", 2023, section 4 (implicit differentiation); the Jacobian is formed and solved here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels.clustering.iterate import add_up, moved, plain_updates, without
from cofire_kernels.clustering.rows import Rows, Rules, attend, in_centroids, load_rows, scalar
from cofire_kernels.numerics import INTERPRETED

CONVERGED, BELOW_FLOOR, STALLED = 0, 1, 2
#: Most iterations, steps tried in each (1, 1/2, ..., then a plain update), and when the residual counts as zero (of the
#: largest centroid): at once, or when the iterations are used up.
ITERATIONS, STEPS, TOLERANCE, STALLED_TOLERANCE = 60, 7, 1e-13, 1e-10
#: Plain updates where Newton's method does not apply.
FALLBACK_ITERATIONS = 50
#: Programs per partition that share a Jacobian.
JACOBIAN_PROGRAMS = 128


@triton.jit
def dkm_jacobian_kernel(
    x_ptr,
    counts_ptr,
    index_ptr,
    length_ptr,
    c_ptr,
    sums_ptr,
    tau_ptr,
    longest,
    clusters,
    d,
    eps: tl.float64,
    prune: tl.float64,
    COUNTED: tl.constexpr,
    KEEP_SPARSITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Column (l, e) of ``sum_n n A_k (x - c_k)_j (x - c_l)_e (delta_kl - A_l)``; A_k counts where it is not clamped."""
    partition = tl.program_id(0).to(tl.int64)
    slot, slots = tl.program_id(1), tl.num_programs(1)
    entry = tl.program_id(2)
    length = tl.load(length_ptr + partition)
    offset, inside = in_centroids(clusters, d, BLOCK_K, BLOCK_D)
    of_dimension = (tl.arange(0, BLOCK_D) == entry % d)[None, :]
    of_centroid = (tl.arange(0, BLOCK_K) == entry // d)[None, :]
    found = tl.zeros([BLOCK_N, BLOCK_K, BLOCK_D], tl.float64)
    if slot * BLOCK_N < length:
        c = tl.load(c_ptr + partition * clusters * d + offset, mask=inside, other=0)
        c_entry = tl.load(c_ptr + partition * clusters * d + entry)
        tau = tl.load(tau_ptr + partition).to(tl.float64)
        lowest, preference = scalar(eps, tl.float64), scalar(prune, tl.float64)
        for start in range(slot * BLOCK_N, length, slots * BLOCK_N):
            x, times, _ = load_rows(
                x_ptr, counts_ptr, index_ptr, partition, start + tl.arange(0, BLOCK_N), length, longest, d,
                COUNTED, tl.float64, BLOCK_D,
            )  # fmt: skip
            soft, away = attend(x, c, tau, preference, clusters, KEEP_SPARSITY, BLOCK_K)
            kept = times[:, None] * tl.where(soft > lowest, soft, 0.0)
            of_entry = tl.sum(tl.where(of_dimension, x, 0.0), 1) - c_entry
            own = tl.where(of_centroid, 1.0, 0.0) - tl.sum(tl.where(of_centroid, soft, 0.0), 1)[:, None]
            found += (kept * own * of_entry[:, None])[:, :, None] * away
    place = ((partition * slots + slot) * clusters * d + entry) * clusters * d
    tl.store(sums_ptr + place + offset, tl.sum(found, 0), mask=inside)


def jacobian(rows: Rows, c: Tensor, totals: Tensor, tau: Tensor, rules: Rules) -> Tensor:
    """Derivative of an update by the centroids where it leaves them in place, fp64 ``[P, K d, K d]``."""
    partitions, clusters, d = c.shape
    tile = rows.tile(clusters)
    tile["BLOCK_N"] = max(1, tile["BLOCK_N"] // 2)  # with more in registers than other kernels
    size = clusters * d
    slots = min(triton.cdiv(rows.longest, tile["BLOCK_N"]), max(1, JACOBIAN_PROGRAMS // size))
    sums = c.new_empty((partitions, slots, size, clusters, d))
    with torch.cuda.device_of(c):
        dkm_jacobian_kernel[(partitions, slots, size)](
            *rows.pointers,
            c,
            sums,
            tau,
            rows.longest,
            clusters,
            d,
            rules.eps,
            rules.prune_threshold,
            COUNTED=rows.counted,
            KEEP_SPARSITY=rules.keep_sparsity,
            **tile,
        )
    factor = 2 / tau.double()[:, None] / totals.masked_fill(totals == 0, 1)
    result = sums.sum(1) * factor[:, None, :, None]
    if rules.enforce_zero:
        result[:, :, 0] = 0
    return result.flatten(2).transpose(1, 2)


def system(rows: Rows, c: Tensor, totals: Tensor, tau: Tensor, rules: Rules) -> Tensor:
    """``1 - J``, fp64 ``[P, K d, K d]``."""
    found = jacobian(rows, c, totals, tau, rules)
    return torch.eye(found.shape[1], dtype=found.dtype, device=found.device) - found


def below_floor(c: Tensor, tau: Tensor, resolution: float) -> Tensor:
    """Whether, between some neighbours, the attention changes over within the spacing of the weights there, ``[P]``."""
    if c.shape[2] != 1:
        return torch.zeros(c.shape[:1], dtype=torch.bool, device=c.device)
    ordered = c[:, :, 0].sort(dim=1).values
    gap, boundary = ordered.diff(), (ordered[:, 1:] + ordered[:, :-1]) / 2
    return (tau.double()[:, None] < 2 * gap * boundary.abs() * resolution).any(1)


def residual(rows: Rows, c: Tensor, tau: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """How far an update moves the palettes ``c [P, K, d]``, and their totals."""
    after, totals = moved(add_up(rows, c, c, None, tau, rules, tl.float64), c, rules)
    return after - c, totals


def largest(x: Tensor) -> Tensor:
    """The largest magnitude in each palette; NaN if there is one."""
    return x.abs().amax((-2, -1))


def newton(rows: Rows, c: Tensor, tau: Tensor, rules: Rules, resolution: float) -> tuple[Tensor, Tensor]:
    """Where Newton's method arrives, and the status, int32 ``[P]``."""
    if rules.enforce_zero:
        c = c.clone()
        c[:, 0] = 0
    partitions, clusters, d = c.shape
    floor = below_floor(c, tau, resolution)
    order, scale = c[:, :, 0].argsort(dim=1), largest(c)
    lengths = torch.ldexp(c.new_ones(STEPS), -torch.arange(STEPS, device=c.device))
    priority = torch.arange(STEPS + 1, 0, -1, device=c.device)
    r, totals = residual(rows, c, tau, rules)
    done = floor
    for _ in range(ITERATIONS):
        size = largest(r)
        done = done | (size <= TOLERANCE * scale)
        if INTERPRETED.value and bool(done.all()):  # on the CPU asking costs nothing; what follows would change nothing
            break
        left = without(rows, done)
        matrix = system(left, c, totals, tau, rules)
        step, info = torch.linalg.solve_ex(matrix, r.flatten(1).unsqueeze(2))
        along = c[:, None] + lengths[:, None, None] * step.view_as(c)[:, None]
        tried = torch.cat((along, (c + r)[:, None]), 1)  # a plain update always leads on
        r_tried, totals_tried = residual(left, tried.flatten(0, 1), tau, rules)
        r_tried, totals_tried = r_tried.view_as(tried), totals_tried.view(partitions, STEPS + 1, clusters)
        good = (largest(r_tried) < size[:, None]) & (info == 0)[:, None]
        if d == 1:
            sorted_before = order[:, None].expand(-1, STEPS + 1, -1)
            good &= (tried[:, :, :, 0].gather(2, sorted_before).diff() > 0).all(2)
        good[:, STEPS] = True
        first = (good * priority).argmax(1)
        best = torch.arange(partitions, device=c.device), first
        c, r = (torch.where(done[:, None, None], old, new[best]) for old, new in ((c, tried), (r, r_tried)))
        totals = torch.where(done[:, None], totals, totals_tried[best])
    arrived = ~floor & (done | (largest(r) <= STALLED_TOLERANCE * scale))
    status = torch.where(floor, BELOW_FLOOR, torch.where(arrived, CONVERGED, STALLED))
    return c, status.int()


def fixed_point(
    rows: Rows, c: Tensor, tau: Tensor, iterations: int, rules: Rules, grad: str, resolution: float
) -> tuple[Tensor, Tensor]:
    """Where Newton's method (``grad="implicit"``) or some plain updates (``"jfb"``) lead, fp64, and the status."""
    if grad == "jfb":
        status = torch.zeros((rows.partitions,), dtype=torch.int32, device=c.device)
        return plain_updates(rows, c, tau, rules, iterations), status
    c, status = newton(rows, c, tau, rules, resolution)
    left = without(rows, status == CONVERGED)
    further = plain_updates(left, c, tau, rules, FALLBACK_ITERATIONS)
    return torch.where((status == CONVERGED)[:, None, None], c, further), status
