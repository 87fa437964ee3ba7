# SPDX-License-Identifier: Apache-2.0
"""Differentiable k-means of weights, and of values with counts: launchers over the stages of this package.

Weights of 16 bits are counted, clustered by value, and looked up, in fp64 where it costs nothing: the tables. Others
stream, in fp32 with sums in fp64, as do vectors and short partitions, whose values hardly repeat.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from cofire_kernels.clustering import iterate, iterate_backward, values16
from cofire_kernels.clustering.fixed_point import CONVERGED, fixed_point, system
from cofire_kernels.clustering.iterate import Sums
from cofire_kernels.clustering.rows import Rows, Rules, counted_rows, weight_rows

#: Shortest partition of 16-bit weights that is counted. A table has 65,536 columns, whatever is in it; not measured.
COUNTED_FROM = 4096
#: Partitions whose tables exist at the same time: about a megabyte each.
SLAB = 64


def _forward(
    rows: Rows,
    centroids: Tensor,
    tau: Tensor,
    iterations: int,
    rules: Rules,
    grad: str,
    resolution: float,
    hard: bool,
    out: Tensor,
    path: Tensor,
    status: Tensor,
) -> None:
    """Fill ``out`` per row, ``path [T + 1 or 2, P, K, d]`` and ``status [P]``."""
    compute = tl.float64 if rows.counted else tl.float32
    path[0] = centroids
    if grad == "unroll":
        status.zero_()
        sums = iterate.iterate(rows, path, tau, rules, compute)
        iterate.apply(rows, path[-2], path[-1], sums, out, tau, rules, compute, hard)
        return
    fixed, found = fixed_point(rows, path[0].clone(), tau, iterations, rules, grad, resolution)
    path[1] = fixed
    status.copy_(found)
    iterate.apply(rows, path[1], path[1], None, out, tau, rules, compute, hard)


def _backward(
    rows: Rows,
    grad: Tensor,
    path: Tensor,
    status: Tensor,
    tau: Tensor,
    rules: Rules,
    mode: str,
    local: Tensor,
    shared: Tensor,
) -> Tensor:
    """Write ``local`` and add to ``shared``, per row; return the gradient of the first centroids, fp64 ``[P, K, d]``."""
    compute = tl.float64 if rows.counted else tl.float32
    if mode == "unroll":
        sums, pulled = iterate_backward.output_backward(rows, path[-2], path[-1], grad, local, tau, rules, compute)
        extra: Tensor | None = pulled
        for t in range(path.shape[0] - 1, 0, -1):
            following = path[t - 2] if t > 1 else None
            sums = iterate_backward.update_backward(
                rows, following, path[t - 1], path[t], shared, sums, extra, tau, rules, compute
            )
            extra = None
        return sums.merged()[0]
    fixed = path[-1]
    sums, pulled = iterate_backward.output_backward(rows, fixed, fixed, grad, local, tau, rules, compute)
    moments, totals = sums.merged()
    incoming = moments + pulled.sum(1)
    if mode == "implicit":
        left = iterate.without(rows, status != CONVERGED)
        transposed = system(left, fixed, totals, tau, rules).transpose(1, 2)
        solved = torch.linalg.solve_ex(transposed, incoming.flatten(1).unsqueeze(2))[0].view_as(incoming)
        incoming = torch.where((status == CONVERGED)[:, None, None], solved, incoming)
    partitions, clusters, d = fixed.shape
    one = Sums(partitions, 1, clusters, d, fixed.device)
    one.moments[:, 0], one.totals[:, 0] = incoming, totals
    iterate_backward.update_backward(rows, None, fixed, fixed, shared, one, None, tau, rules, compute)
    return torch.zeros_like(fixed)


def _assert_temperature(operator: str, tau: Tensor) -> None:
    torch._assert_async(((tau > 0) & tau.isfinite()).all(), f"{operator}: tau must be positive and finite")


def dkm_tables(
    values: Tensor, counts: Tensor, centroids: Tensor, tau: Tensor, iterations: int, eps: float, enforce_zero: bool,
    prune_threshold: float, keep_sparsity: bool, grad: str, resolution: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    torch._assert_async(((counts == 0) | values.isfinite()).all(), "dkm_tables: weight must be finite")
    _assert_temperature("dkm_tables", tau)
    partitions, clusters = centroids.shape
    rules = Rules(eps, enforce_zero, prune_threshold, keep_sparsity)
    rows = counted_rows(values, counts)
    table = rows.zeros(values.dtype)
    length = iterations + 1 if grad == "unroll" else 2
    path = torch.empty((length, partitions, clusters, 1), dtype=torch.float64, device=values.device)
    status = torch.empty((partitions,), dtype=torch.int32, device=values.device)
    tau = tau.contiguous()
    _forward(rows, centroids[:, :, None], tau, iterations, rules, grad, resolution, False, table, path, status)
    return table, path[:, :, :, 0], status


def dkm_tables_backward(
    grad: Tensor, values: Tensor, counts: Tensor, path: Tensor, status: Tensor, tau: Tensor, eps: float,
    enforce_zero: bool, prune_threshold: float, keep_sparsity: bool, mode: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rules = Rules(eps, enforce_zero, prune_threshold, keep_sparsity)
    rows = counted_rows(values, counts)
    slope, offset = rows.zeros(values.dtype), rows.zeros(torch.float64)
    path = path.contiguous().unsqueeze(3)
    first = _backward(rows, grad.contiguous(), path, status, tau.contiguous(), rules, mode, slope, offset)
    return slope, offset.to(values.dtype), first[:, :, 0].to(values.dtype)


def _counted(weight: Tensor, group_size: int, d: int) -> bool:
    return weight.element_size() == 2 and d == 1 and min(group_size, weight.numel()) >= COUNTED_FROM


def _bin_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The value of each bin of a table, fp32."""
    place = torch.arange(values16.BINS, dtype=torch.int32, device=device)
    bits = torch.where(place < values16.BINS // 2, place ^ 0xFFFF, place ^ 0x8000)
    return bits.to(torch.int16).view(dtype).float()


def _slabs(weight: Tensor, group: int, partitions: int) -> Iterator[tuple[slice, slice]]:
    """Partitions that are counted together, and their elements."""
    for start in range(0, partitions, SLAB):
        stop = min(start + SLAB, partitions)
        yield slice(start, stop), slice(start * group, min(stop * group, weight.numel()))


def dkm_plan(*args: object) -> str:
    """What :func:`dkm` does with these arguments."""
    weight, centroids, _, group_size = args[:4]
    assert isinstance(weight, Tensor) and isinstance(centroids, Tensor) and isinstance(group_size, int)
    d = centroids.shape[2]
    if _counted(weight, group_size, d):
        return "counted, one table per partition"
    if weight.element_size() != 2:
        return "streamed: weights of 32 bits"
    return "streamed: vectors" if d > 1 else f"streamed: partitions of fewer than {COUNTED_FROM} weights"


def dkm_backward_plan(*args: object) -> str:
    """What :func:`dkm_backward` does with these arguments."""
    _, weight, path, _, tau, group_size = args[:6]
    assert isinstance(path, Tensor)
    return dkm_plan(weight, path[0], tau, group_size)


def dkm(
    weight: Tensor, centroids: Tensor, tau: Tensor, group_size: int, iterations: int, eps: float, enforce_zero: bool,
    prune_threshold: float, keep_sparsity: bool, forward: str, grad: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rules = Rules(eps, enforce_zero, prune_threshold, keep_sparsity)
    _assert_temperature("dkm", tau)
    partitions, _, d = centroids.shape
    length = iterations + 1 if grad == "unroll" else 2
    path = torch.empty((length, *centroids.shape), dtype=torch.float64, device=weight.device)
    status = torch.empty((partitions,), dtype=torch.int32, device=weight.device)
    output = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    tau, hard = tau.contiguous(), forward == "hard_ste"
    resolution = torch.finfo(weight.dtype).eps / 2
    if not _counted(weight, group_size, d):
        torch._assert_async(weight.isfinite().all(), "dkm: weight must be finite")
        rows = weight_rows(weight, group_size, d)
        _forward(rows, centroids, tau, iterations, rules, grad, resolution, hard, output, path, status)
        return output, path, status
    bits, flat = values16.patterns(weight), output.view(-1)
    values = _bin_values(weight.dtype, weight.device)
    for some, elements in _slabs(weight, group_size, partitions):
        parts = some.stop - some.start
        group = min(group_size, elements.stop - elements.start)
        counts = values16.count(bits[elements], group, parts)
        torch._assert_async(((counts == 0) | values.isfinite()).all(), "dkm: weight must be finite")
        rows = counted_rows(values, counts)
        table = rows.zeros(torch.float32)
        some_path = path if parts == partitions else path[:, some].contiguous()
        _forward(
            rows, centroids[some], tau[some], iterations, rules, grad, resolution, hard, table, some_path, status[some]
        )
        path[:, some] = some_path
        values16.gather(bits[elements], table, None, None, flat[elements], group)
    return output, path, status


def dkm_backward(
    grad: Tensor, weight: Tensor, path: Tensor, status: Tensor, tau: Tensor, group_size: int, eps: float,
    enforce_zero: bool, prune_threshold: float, keep_sparsity: bool, mode: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rules = Rules(eps, enforce_zero, prune_threshold, keep_sparsity)
    _, partitions, _, d = path.shape
    grad, path, tau = grad.contiguous(), path.contiguous(), tau.contiguous()
    if not _counted(weight, group_size, d):
        rows = weight_rows(weight, group_size, d)
        both = rows.zeros(torch.float32)
        first = _backward(rows, grad, path, status, tau, rules, mode, both, both)
        return both.view(weight.shape).to(weight.dtype), first.to(tau.dtype)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_centroids = torch.empty(path.shape[1:], dtype=tau.dtype, device=weight.device)
    bits, flat, source = values16.patterns(weight), grad_weight.view(-1), grad.view(-1)
    values = _bin_values(weight.dtype, weight.device)
    for some, elements in _slabs(weight, group_size, partitions):
        parts = some.stop - some.start
        group = min(group_size, elements.stop - elements.start)
        rows = counted_rows(values, values16.count(bits[elements], group, parts))
        total = values16.scatter(bits[elements], source[elements], group, parts, torch.float64)
        slope, offset = rows.zeros(torch.float32), rows.zeros(torch.float64)
        first = _backward(rows, total, path[:, some].contiguous(), status[some], tau[some], rules, mode, slope, offset)
        grad_centroids[some] = first
        values16.gather(bits[elements], offset.float(), source[elements], slope, flat[elements], group)
    return grad_weight, grad_centroids
