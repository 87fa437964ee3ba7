# SPDX-License-Identifier: Apache-2.0
"""Clustering of weights that are spread over processes.

Under data parallelism, and under FSDP2 with its gathered weights, the palettized layers work as they are: every process
computes the same. :func:`dkm_sharded` needs no gathered weight. Each process counts the values of its own shard; what is
added up over the processes are 65,536 counts in the forward and 65,536 sums of gradients in the backward, a quarter of a
mebibyte each, however large the weight.

Source: Cho et al., "eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models", IEEE CAL 2024,
section 2 (which shards the attention maps; here no map exists).
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cofire import ops
from cofire.ops.checks import check_choice, check_float, check_number, refuse, shape_of
from cofire.ops.clustering import FORWARDS, HALVES, Clustered, bin_values, dkm_tables_backward, temperature

__all__ = ["dkm_sharded"]


class _ShardedDKM(torch.autograd.Function):
    """Between counting and looking up, everything is a table over the 65,536 values, in fp64, and equal everywhere."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        centroids: Tensor,
        heat: Tensor,
        iterations: int,
        rules: tuple[float, bool, float, bool],
        forward: str,
        grad: str,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        eps, enforce_zero, prune_threshold, keep_sparsity = rules
        counts = ops.histogram16(weight)
        dist.all_reduce(counts, group=group)
        values = bin_values(weight.dtype, weight.device).double()
        start, heat = centroids.detach()[:, :, 0].double(), heat.double()
        table, path, status = ops.dkm_tables(
            values,
            counts[None],
            start,
            heat,
            iterations=iterations,
            eps=eps,
            enforce_zero=enforce_zero,
            prune_threshold=prune_threshold,
            keep_sparsity=keep_sparsity,
            grad=grad,
            resolution=torch.finfo(weight.dtype).eps / 2,
        )
        table = table[0]
        if forward == "hard_ste":
            final = path[-1].to(centroids.dtype)
            finite = torch.where(values.isfinite(), values, 0).float()
            labels, _ = ops.palettize(
                finite, final[:, :, None], prune_threshold=prune_threshold, keep_sparsity=keep_sparsity
            )
            table = final[0, labels.long()]
        ctx.save_for_backward(weight, counts, path, status, heat)
        ctx.options, ctx.group, ctx.dtype = (*rules, grad), group, centroids.dtype
        moved = path[-1].to(centroids.dtype)[:, :, None]
        ctx.mark_non_differentiable(moved, status)
        return ops.lut_apply16(weight, table.float()), moved, status

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        weight, counts, path, status, heat = ctx.saved_tensors
        sums = ops.scatter16(weight, grad)
        dist.all_reduce(sums, group=ctx.group)
        values = bin_values(weight.dtype, weight.device).double()
        slope, offset, d_centroids = dkm_tables_backward(
            sums.double()[None], values, counts[None], path, status, heat, *ctx.options
        )
        d_weight = ops.lut_apply16(weight, offset[0].float(), grad.contiguous(), slope[0].float())
        # A fixed point does not depend on where the search for it began.
        start = d_centroids.to(ctx.dtype)[:, :, None] if ctx.options[-1] == "unroll" else None
        return d_weight, start, *[None] * 6


def dkm_sharded(
    local_weight: Tensor,
    centroids: Tensor,
    *,
    tau: float | Tensor | None = None,
    rho: float | None = None,
    iterations: int = 3,
    eps: float = 1e-7,
    forward: str = "soft",
    grad: str = "unroll",
    enforce_zero: bool = False,
    prune_threshold: float = 0.0,
    keep_sparsity: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Clustered:
    """:func:`cofire.ops.dkm` of a weight of which each process holds a part; every process has to call it.

    Args:
        local_weight: this process's part, bfloat16 or float16, any shape; it may be empty. Or a ``DTensor`` that is sharded
            over one dimension of its mesh.
        centroids: fp32 ``[1, K, 1]``, the same in every process.
        tau, rho, iterations, eps, forward, grad, enforce_zero, prune_threshold, keep_sparsity: as in
            :func:`cofire.ops.dkm`.
        process_group: the processes that hold the weight; None: all, or those of the ``DTensor``.

    Returns:
        :class:`cofire.ops.clustering.Clustered`: ``output`` like ``local_weight``; ``centroids`` and ``status``, the same in
        every process. ``output`` is differentiable, once, with respect to ``local_weight`` and (unrolled) ``centroids``; in
        backward too every process has to take part. The gradient of the centroids is that of all parts together.

    Raises:
        TypeError: weights that are not 16-bit; centroids that are not fp32.
        ValueError: more than one palette, vectors, a number that does not fit, NaN or infinity in any part, a ``DTensor``
            with another placement; no process group.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> part = torch.tensor([0.0, 0.1, 0.9, 1.0], dtype=torch.bfloat16)
        >>> found = dkm_sharded(part, torch.tensor([[[0.25], [0.75]]]), rho=0.01)
        >>> [round(c, 2) for c in found.centroids.flatten().tolist()]
        [0.05, 0.95]
        >>> dist.destroy_process_group()

    Source: eDKM, section 2; DKM, section 3.2.
    """
    _validate(local_weight, centroids, tau, rho, forward)
    rules = (eps, enforce_zero, prune_threshold, keep_sparsity)
    if rho is not None:
        heat = temperature(centroids, rho)
    else:
        if not isinstance(tau, Tensor):
            check_number("dkm_sharded", tau=tau)
        heat = torch.as_tensor(tau, dtype=centroids.dtype, device=centroids.device)
        if heat.numel() != 1 or heat.dim() > 1:
            refuse("dkm_sharded", f"tau must be a number or have shape [1], got {shape_of(heat)}")
        heat = heat.expand(1)
    sharded = cast(Any, local_weight) if hasattr(local_weight, "to_local") else None
    if sharded is not None:
        process_group = _group_of(sharded) if process_group is None else process_group
        local_weight = sharded.to_local()
    output, moved, status = _ShardedDKM.apply(
        local_weight, centroids, heat, iterations, rules, forward, grad, process_group
    )
    if sharded is not None:
        mesh, placements = sharded.device_mesh, sharded.placements
        output = type(sharded).from_local(
            output, mesh, placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
        )
    return Clustered(output, moved, status)


def _validate(weight: Tensor, centroids: Tensor, tau: float | Tensor | None, rho: float | None, forward: str) -> None:
    if weight.dtype not in HALVES:
        raise TypeError(
            f"dkm_sharded: local_weight must be bfloat16 or float16, whose values can be counted, got {weight.dtype}"
        )
    check_float("dkm_sharded", centroids=centroids)
    if centroids.dtype != torch.float32:
        raise TypeError(f"dkm_sharded: centroids must be float32, got {centroids.dtype}")
    if centroids.dim() != 3 or centroids.shape[0] != 1 or centroids.shape[2] != 1:
        refuse(
            "dkm_sharded",
            f"centroids must have shape [1, clusters, 1] (one palette, scalars), got {shape_of(centroids)}",
        )
    check_choice("dkm_sharded", "forward", forward, FORWARDS)
    if (tau is None) == (rho is None):
        refuse("dkm_sharded", "one of tau and rho must be given")
    if rho is not None:
        check_number("dkm_sharded", rho=rho)
        if not (rho > 0 and math.isfinite(rho)):
            refuse("dkm_sharded", f"rho must be positive and finite, got {rho}")


def _group_of(weight: Any) -> dist.ProcessGroup:
    """The processes over which a ``DTensor`` is sharded."""
    if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard():
        refuse(
            "dkm_sharded",
            "a DTensor must be sharded over a mesh of one dimension, got placements "
            f"{list(weight.placements)} on a mesh of {weight.device_mesh.ndim}",
        )
    return cast(dist.ProcessGroup, weight.device_mesh.get_group())
