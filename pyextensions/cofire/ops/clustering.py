# SPDX-License-Identifier: Apache-2.0
"""Differentiable k-means of weights (DKM), without its attention maps.

A 16-bit weight has at most 65,536 values, so every map of DKM over scalar weights is a function of the value: counts per
value (:func:`histogram16`) and tables over the values (:func:`dkm_tables`) replace maps over the weights, and the gradient
of weight i is ``G_i slope[v] + offset[v]``, where v is the value of weight i. fp32 weights, and vectors of several
weights, stream through the same formulas one weight at a time.

Notation: N weights in P partitions of ``group_size`` consecutive ones, the last may be shorter; vectors of d weights;
K centroids; T iterations; temperature tau; A the attention ``softmax_k(-|x - c_k|^2 / tau)``, clamped from below at eps.

Sources: Cho, Alizadeh-Vahid, Adya, Rastegari, "DKM: Differentiable K-Means Clustering Layer for Neural Network
Compression", ICLR 2022; Cho et al., "eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language
Models", IEEE CAL 2024; Jaffe, Singh, Bullo, "IDKM: Memory Efficient Neural Network Quantization via Implicit,
Differentiable k-Means", 2023 (implicit and Jacobian-free gradients).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cofire.ops.checks import (
    check_choice,
    check_device,
    check_float,
    check_integer,
    check_number,
    refuse,
    shape_of,
)
from cofire.registry import Backward, Kernel, Operator, refuse_second, register

__all__ = [
    "dkm",
    "dkm_tables",
    "histogram16",
    "kmeans1d",
    "lut_apply16",
    "palettize",
    "scatter16",
]

HALVES = (torch.bfloat16, torch.float16)
BINS = 65536
GRADIENTS = ("unroll", "implicit", "jfb")
FORWARDS = ("soft", "hard_ste")
MAX_CLUSTERS = 256

#: What ``status`` says of a partition.
CONVERGED, BELOW_FLOOR, STALLED = 0, 1, 2
#: Newton's method: most iterations, shortest step, and when the residual counts as zero (of the largest centroid): at
#: once, or when the iterations are used up.
NEWTON_ITERATIONS, NEWTON_SHORTEST, NEWTON_TOLERANCE, NEWTON_STALLED = 60, 1 / 64, 1e-13, 1e-10
#: Plain updates where Newton's method does not apply.
FALLBACK_ITERATIONS = 50


# ------------------------------------------------------------------------------------------- 16-bit values


def bin_values(dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """The value of each bin of :func:`histogram16`: fp32 ``[65536]``, ascending; NaN at both ends."""
    place = torch.arange(BINS, dtype=torch.int32, device=device)
    bits = torch.where(place < BINS // 2, place ^ 0xFFFF, place ^ 0x8000)
    return bits.to(torch.int16).view(dtype).float()


def bins_of(input: Tensor) -> Tensor:
    """The bin of each element, int64: its rank among the 65,536 patterns of the dtype, ordered by value."""
    bits = input.contiguous().view(torch.int16).long() & 0xFFFF
    return torch.where(bits >= BINS // 2, bits ^ 0xFFFF, bits ^ 0x8000)


def _check_half(operator: str, input: Tensor) -> None:
    if input.dtype not in HALVES:
        raise TypeError(f"{operator}: input must be bfloat16 or float16, got {input.dtype}")


def _validate_histogram16(input: Tensor) -> None:
    _check_half("histogram16", input)
    if input.numel() >= 2**31:
        refuse("histogram16", f"input must have fewer than 2^31 elements, got {input.numel()}")


def _histogram16_reference(input: Tensor) -> Tensor:
    return torch.bincount(bins_of(input).flatten(), minlength=BINS).int()


_histogram16 = register(
    Operator(
        "histogram16(Tensor input) -> Tensor",
        family="clustering",
        validate=_validate_histogram16,
        reference=_histogram16_reference,
        fake=lambda input: input.new_empty((BINS,), dtype=torch.int32),
        backward="counts have no gradient",
        cpu=HALVES,
        triton=Kernel("cofire_kernels.clustering:histogram16", HALVES),
        bytes=lambda input: 2 * input.numel() + 4 * BINS,
    )
)


def histogram16(input: Tensor) -> Tensor:
    """How often each of the 65,536 values of a 16-bit type occurs; exact, and the same for any number of threads.

    Args:
        input: bfloat16 or float16, any shape, fewer than 2^31 elements.

    Returns:
        int32 ``[65536]``, ordered by value: from -NaN and -infinity over -0 and +0 to infinity and NaN. Each bit pattern
        counts by itself. ``cofire.ops.clustering.bin_values`` gives the values.

    Raises:
        TypeError: another dtype.
        ValueError: too many elements.

    Example:
        >>> counts = histogram16(torch.tensor([0.5, -1.0, 0.5], dtype=torch.bfloat16))
        >>> bins = counts.nonzero().flatten()
        >>> bin_values(torch.bfloat16)[bins].tolist(), counts[bins].tolist()
        ([-1.0, 0.5], [1, 2])

    Source: the uniquification of eDKM (section 2.2), taken over the weights instead of over the attention map.
    """
    counts: Tensor = _histogram16(input)
    return counts


def _validate_lut_apply16(input: Tensor, table: Tensor, source: Tensor | None, slope: Tensor | None) -> None:
    _check_half("lut_apply16", input)
    check_float("lut_apply16", table=table, source=source, slope=slope)
    check_device("lut_apply16", "input", input, table=table, source=source, slope=slope)
    if (source is None) != (slope is None):
        refuse("lut_apply16", "source and slope must be given together")
    for name, x in (("table", table), ("slope", slope)):
        if x is not None and list(x.shape) != [BINS]:
            refuse("lut_apply16", f"{name} must have shape [{BINS}], got {shape_of(x)}")
        if x is not None and x.dtype != table.dtype:
            raise TypeError(f"lut_apply16: {name} must have the dtype of table ({table.dtype}), got {x.dtype}")
    if source is not None and source.shape != input.shape:
        refuse("lut_apply16", f"source must have the shape of input {shape_of(input)}, got {shape_of(source)}")


def _lut_apply16_reference(input: Tensor, table: Tensor, source: Tensor | None, slope: Tensor | None) -> Tensor:
    bins = bins_of(input)
    result = table[bins]
    if source is not None and slope is not None:
        result = result + slope[bins] * source.to(table.dtype)
    return result.to(input.dtype if source is None else source.dtype)


def _save_lut_apply16(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(inputs if inputs[2] is not None else inputs[:1]))
    ctx.dtype = inputs[1].dtype


def _lut_apply16_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, *rest = ctx.saved_tensors
    table = scatter16(input, grad).to(ctx.dtype) if ctx.needs_input_grad[1] else None
    if not rest:
        return None, table, None, None
    _, source, slope = rest
    wide = grad.to(ctx.dtype)
    d_source = lut_apply16(input, torch.zeros_like(slope), wide, slope) if ctx.needs_input_grad[2] else None
    d_slope = scatter16(input, wide * source).to(ctx.dtype) if ctx.needs_input_grad[3] else None
    return None, table, None if d_source is None else d_source.to(source.dtype), d_slope


_lut_apply16 = register(
    Operator(
        "lut_apply16(Tensor input, Tensor table, Tensor? source, Tensor? slope) -> Tensor",
        family="clustering",
        validate=_validate_lut_apply16,
        reference=_lut_apply16_reference,
        fake=lambda input, table, source, slope: torch.empty_like(
            input if source is None else source, memory_format=torch.contiguous_format
        ),
        backward=Backward(_save_lut_apply16, _lut_apply16_grad, "scatter16"),
        double_backward=True,
        triton=Kernel("cofire_kernels.clustering:lut_apply16"),
        flops=lambda input, table, source, slope: 2 * input.numel() if source is not None else input.numel(),
        bytes=lambda input, table, source, slope: (
            4 * input.numel() + (0 if source is None else source.numel() * source.element_size())
        ),
    )
)


def lut_apply16(input: Tensor, table: Tensor, source: Tensor | None = None, slope: Tensor | None = None) -> Tensor:
    """A function of 16-bit values given as a table: ``table[bin]``, or ``table[bin] + slope[bin] * source``.

    Args:
        input: bfloat16 or float16, any shape. It chooses the bin, and has no gradient.
        table: fp32, or any float, ``[65536]``, one value per bin of :func:`histogram16`.
        source: optional, in the shape of ``input``, any float.
        slope: with ``source``: in shape and dtype like ``table``.

    Returns:
        In the shape of ``input``, and in its dtype or, if given, that of ``source``. Differentiable with respect to
        ``table``, ``source`` and ``slope``.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit; ``source`` without ``slope``.

    Example:
        >>> x = torch.tensor([-2.0, 3.0], dtype=torch.bfloat16)
        >>> lut_apply16(x, bin_values(torch.bfloat16).square()).tolist()
        [4.0, 9.0]

    Source: eDKM, section 2.2: an attention map is a table and an index.
    """
    result: Tensor = _lut_apply16(input, table, source, slope)
    return result


def _validate_scatter16(input: Tensor, source: Tensor) -> None:
    _check_half("scatter16", input)
    check_float("scatter16", source=source)
    check_device("scatter16", "input", input, source=source)
    if source.shape != input.shape:
        refuse("scatter16", f"source must have the shape of input {shape_of(input)}, got {shape_of(source)}")


def _scatter16_reference(input: Tensor, source: Tensor) -> Tensor:
    wide = source.flatten().to(torch.promote_types(source.dtype, torch.float32))
    return wide.new_zeros(BINS).index_add(0, bins_of(input).flatten(), wide)


def _save_scatter16(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.dtype = inputs[1].dtype


def _scatter16_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (input,) = ctx.saved_tensors
    if ctx.dtype == input.dtype:
        return None, lut_apply16(input, grad)
    carrier = torch.zeros(input.shape, dtype=ctx.dtype, device=input.device)
    return None, lut_apply16(input, grad, carrier, torch.zeros_like(grad))


_scatter16 = register(
    Operator(
        "scatter16(Tensor input, Tensor source) -> Tensor",
        family="clustering",
        validate=_validate_scatter16,
        reference=_scatter16_reference,
        fake=lambda input, source: source.new_empty((BINS,), dtype=torch.promote_types(source.dtype, torch.float32)),
        backward=Backward(_save_scatter16, _scatter16_grad, "lut_apply16"),
        double_backward=True,
        triton=Kernel("cofire_kernels.clustering:scatter16"),
        flops=lambda input, source: input.numel(),
        bytes=lambda input, source: 2 * input.numel() + source.numel() * source.element_size() + 4 * BINS,
    )
)


def scatter16(input: Tensor, source: Tensor) -> Tensor:
    """Sums of ``source`` over the elements of ``input`` with the same 16-bit value.

    Args:
        input: bfloat16 or float16, any shape. It chooses the bin, and has no gradient.
        source: in the shape of ``input``, any float.

    Returns:
        fp32 (fp64 for an fp64 ``source``) ``[65536]``, in the order of :func:`histogram16`; the same bits for any number
        of threads. Differentiable with respect to ``source``.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes that differ.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 1.0], dtype=torch.bfloat16)
        >>> sums = scatter16(x, torch.tensor([10.0, 20.0, 30.0]))
        >>> sums[sums != 0].tolist()
        [40.0, 20.0]

    Source: the transpose of :func:`lut_apply16`; eDKM, section 2.2.
    """
    sums: Tensor = _scatter16(input, source)
    return sums


# -------------------------------------------------------------------------------- the maths, step by step


class Rules(NamedTuple):
    """What an iteration of k-means does besides k-means."""

    eps: float  #: attention below it counts as it
    enforce_zero: bool  #: centroid 0 is zero
    prune_threshold: float  #: subtracted from the squared distance to centroid 0
    keep_sparsity: bool  #: only weights that are zero may be assigned to centroid 0


def _distances(x: Tensor, c: Tensor, rules: Rules) -> Tensor:
    """Squared distances ``[n, K]`` of vectors ``[n, d]`` to centroids ``[K, d]``, with the preference for centroid 0."""
    distance = (x[:, None, :] - c).square().sum(2)
    first = distance[:, :1] - rules.prune_threshold
    if rules.keep_sparsity:
        first = first.masked_fill((x != 0).any(1, keepdim=True), math.inf)
    return torch.cat((first, distance[:, 1:]), 1)


def _softmax(x: Tensor, c: Tensor, tau: Tensor, rules: Rules) -> Tensor:
    return torch.softmax(-_distances(x, c, rules) / tau, 1)


def _update(x: Tensor, n: Tensor, a: Tensor, c: Tensor, rules: Rules) -> Tensor:
    """The centroids' new places under the attention ``a``; each vector counts ``n`` times. An empty cluster stays."""
    total = a.T @ n
    empty = (total == 0)[:, None]
    new = torch.where(empty, c, (a.T @ (n[:, None] * x)) / total[:, None].masked_fill(empty, 1))
    return torch.cat((torch.zeros_like(new[:1]), new[1:])) if rules.enforce_zero else new


def _jacobian(x: Tensor, n: Tensor, c: Tensor, tau: Tensor, rules: Rules) -> Tensor:
    """Derivative of :func:`_update` by the centroids at a fixed point, ``[K d, K d]``."""
    soft = _softmax(x, c, tau, rules)
    kept = soft * (soft > rules.eps)
    total = soft.clamp(min=rules.eps).T @ n
    away = x[:, None, :] - c
    pushed = n[:, None, None] * kept[:, :, None] * away
    own = torch.einsum("nkd,nke->kde", pushed, away)
    full = -torch.einsum("nkd,nle->kdle", pushed, soft[:, :, None] * away)
    k = torch.arange(len(c))
    full[k, :, k, :] += own
    full *= 2 / tau / total.masked_fill(total == 0, 1)[:, None, None, None]
    if rules.enforce_zero:
        full[0] = 0
    return full.flatten(2).flatten(0, 1)


def _below_floor(c: Tensor, tau: Tensor, resolution: float) -> bool:
    """Whether, between some neighbours, the attention changes over within the spacing of the weights there.

    Its transition has half-width ``tau / 2 gap``; the spacing is ``|boundary| resolution``.
    """
    if c.shape[1] != 1 or len(c) < 2:
        return False
    ordered = c.flatten().sort().values
    gap, boundary = ordered.diff(), (ordered[1:] + ordered[:-1]) / 2
    return bool((tau < 2 * gap * boundary.abs() * resolution).any())


def _fixed_point(
    x: Tensor, n: Tensor, c: Tensor, tau: Tensor, iterations: int, rules: Rules, grad: str, resolution: float
) -> tuple[Tensor, int]:
    """Centroids that an update leaves in place, by Newton's method; without it, where plain updates lead."""
    x, n, c, tau = (t.detach().double() for t in (x, n, c, tau))

    def residual(at: Tensor) -> Tensor:
        return _update(x, n, _softmax(x, at, tau, rules).clamp(min=rules.eps), at, rules) - at

    status = CONVERGED
    if grad == "implicit":
        if rules.enforce_zero:
            c = torch.cat((torch.zeros_like(c[:1]), c[1:]))
        status = BELOW_FLOOR if _below_floor(c, tau, resolution) else STALLED
        order, scale = c[:, 0].argsort(), c.abs().max()
        r = residual(c)
        for _ in range(NEWTON_ITERATIONS if status == STALLED else 0):
            size = r.abs().max()
            if size <= NEWTON_TOLERANCE * scale:
                status = CONVERGED
                break
            identity = torch.eye(c.numel(), dtype=c.dtype, device=c.device)
            step, info = torch.linalg.solve_ex(identity - _jacobian(x, n, c, tau, rules), r.flatten())
            length = 1.0
            while info == 0 and length >= NEWTON_SHORTEST:
                candidate = c + length * step.view_as(c)
                ordered = c.shape[1] > 1 or bool((candidate[order, 0].diff() > 0).all())
                if ordered and residual(candidate).abs().max() < size:
                    break
                length /= 2
            else:
                candidate = c + r  # a plain update always leads on
            c, r = candidate, residual(candidate)
        if status == STALLED and r.abs().max() <= NEWTON_STALLED * scale:
            status = CONVERGED
    for _ in range({"jfb": iterations}.get(grad, 0 if status == CONVERGED else FALLBACK_ITERATIONS)):
        c = c + residual(c)
    return c, status


def _nearest(x: Tensor, c: Tensor, rules: Rules) -> Tensor:
    """The index of the nearest centroid; of equally near ones the first."""
    distance = _distances(x.double(), c.double(), rules)
    k = torch.arange(len(c), device=c.device)
    return torch.where(distance == distance.amin(1, keepdim=True), k, len(c)).amin(1)


def _cluster(
    x: Tensor, n: Tensor, c: Tensor, tau: Tensor, iterations: int, rules: Rules, grad: str, resolution: float
) -> tuple[Tensor, Tensor, int]:
    """DKM of one partition, differentiable: what becomes of ``x [n, d]``, the centroids on the way, and the status."""
    status = CONVERGED
    if grad == "unroll":
        path, soft = [c], _softmax(x, c, tau, rules).clamp(min=rules.eps)
        for t in range(iterations):
            soft = _softmax(x, path[t], tau, rules).clamp(min=rules.eps)
            path.append(_update(x, n, soft, path[t], rules))
        return soft @ path[-1], torch.stack(path).detach(), status
    fixed, status = _fixed_point(x, n, c, tau, iterations, rules, grad, resolution)
    exact, fixed = fixed, fixed.to(x.dtype)
    soft = _softmax(x, fixed, tau, rules).clamp(min=rules.eps)
    total = (soft.T @ n).detach()[:, None]
    # Zero at a fixed point, where it carries the gradient of one update by the weights.
    moved = ((n[:, None] * soft)[:, :, None] * (x[:, None, :] - fixed)).sum(0) / total.masked_fill(total == 0, 1)
    step = torch.cat((torch.zeros_like(moved[:1]), moved[1:])) if rules.enforce_zero else moved
    step = step - step.detach()
    if grad == "implicit" and status == CONVERGED:
        inverse = torch.eye(fixed.numel(), dtype=exact.dtype, device=x.device)
        inverse = inverse - _jacobian(x.detach().double(), n.double(), exact, tau.double(), rules)
        step = torch.linalg.solve(inverse, step.double().flatten()).view_as(fixed).to(x.dtype)
    final = fixed + step
    soft = _softmax(x, final, tau, rules).clamp(min=rules.eps)
    return soft @ final, torch.stack((c.detach().double(), exact)), status


def _pull(x: Tensor, d_attention: Tensor, soft: Tensor, c: Tensor, tau: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """From the gradient of the clamped attention to those of ``x`` ``[n, d]`` and of ``c``, per vector, ``[n, K, d]``."""
    passed = d_attention * (soft > eps)
    d_score = soft * (passed - (soft * passed).sum(1, keepdim=True))
    d_centroid = 2 / tau * d_score[:, :, None] * (x[:, None, :] - c)
    return -d_centroid.sum(1), d_centroid


def _cluster_backward(
    g: Tensor | None,
    total: Tensor,
    x: Tensor,
    n: Tensor,
    path: Tensor,
    tau: Tensor,
    rules: Rules,
    grad: str,
    status: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of :func:`_cluster`, from the centroids on the way alone.

    Args:
        g: upstream gradient of each vector, ``[n, d]``; None for one (d = 1): the local part is then the slope.
        total: upstream gradient summed over the vectors that one row stands for, ``[n, d]``.

    Returns:
        What an upstream gradient does to its own vector; what all of them do to each through the centroids; and the
        gradient of the first centroids.
    """
    unrolled = grad == "unroll"
    before, after = (path[-2], path[-1]) if unrolled and len(path) > 1 else (path[-1], path[-1])
    soft = _softmax(x, before, tau, rules)
    attention = soft.clamp(min=rules.eps)
    local, _ = _pull(x, (torch.ones_like(x) if g is None else g) @ after.T, soft, before, tau, rules.eps)
    to_after = attention.T @ total
    to_before = _pull(x, total @ after.T, soft, before, tau, rules.eps)[1].sum(0)
    shared = torch.zeros_like(x)
    if not unrolled:
        incoming = to_after + to_before
        if grad == "implicit" and status == CONVERGED:
            system = torch.eye(incoming.numel(), dtype=x.dtype, device=x.device)
            system = system - _jacobian(x, n, after, tau, rules)
            incoming = torch.linalg.solve(system.T, incoming.flatten()).view_as(incoming)
        shared, _ = _update_backward(incoming, x, n, before, after, tau, rules)
        return local, shared, torch.zeros_like(incoming)
    for t in range(len(path) - 1, 0, -1):
        by_weight, passed_on = _update_backward(to_after, x, n, path[t - 1], path[t], tau, rules)
        shared = shared + by_weight
        to_after = passed_on + (to_before if t == len(path) - 1 else 0)
    return local, shared, to_after if len(path) > 1 else to_after + to_before


def _update_backward(
    incoming: Tensor, x: Tensor, n: Tensor, before: Tensor, after: Tensor, tau: Tensor, rules: Rules
) -> tuple[Tensor, Tensor]:
    """From the gradient of the new centroids to those of each vector and of the old centroids."""
    if rules.enforce_zero:
        incoming = torch.cat((torch.zeros_like(incoming[:1]), incoming[1:]))
    soft = _softmax(x, before, tau, rules)
    attention = soft.clamp(min=rules.eps)
    count = (attention.T @ n)[:, None]
    share = torch.where(count == 0, 0, incoming / count.masked_fill(count == 0, 1))
    direct = attention @ share
    by_weight, by_centroid = _pull(
        x, torch.einsum("nkd,kd->nk", x[:, None, :] - after, share), soft, before, tau, rules.eps
    )
    stay = torch.where(count == 0, incoming, 0)
    return direct + by_weight, (n[:, None, None] * by_centroid).sum(0) + stay


# ------------------------------------------------------------------------------------------------ validation


def _check_rules(operator: str, eps: float, enforce_zero: bool, prune_threshold: float, keep_sparsity: bool) -> None:
    check_number(operator, eps=eps, prune_threshold=prune_threshold)
    if not 0 <= eps < 1:
        refuse(operator, f"eps must be at least 0 and less than 1, got {eps}")
    if not 0 <= prune_threshold < math.inf:
        refuse(operator, f"prune_threshold must be finite and not negative, got {prune_threshold}")
    if keep_sparsity and not enforce_zero:
        refuse(operator, "keep_sparsity needs enforce_zero")


def _check_clusters(operator: str, clusters: int) -> None:
    if not 2 <= clusters <= MAX_CLUSTERS:
        refuse(operator, f"there must be 2 to {MAX_CLUSTERS} clusters, got {clusters}")


def _check_iterations(operator: str, iterations: int, grad: str) -> None:
    check_choice(operator, "grad", grad, GRADIENTS)
    check_integer(operator, iterations=iterations)
    if not 1 <= iterations <= 1000:
        refuse(operator, f"iterations must be between 1 and 1000, got {iterations}")


def _check_partitions(operator: str, weight: Tensor, centroids: Tensor, group_size: int) -> None:
    """That ``weight`` splits into vectors and partitions for which there are centroids."""
    check_float(operator, weight=weight, centroids=centroids)
    check_device(operator, "weight", weight, centroids=centroids)
    check_integer(operator, group_size=group_size)
    wanted = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if centroids.dtype != wanted:
        raise TypeError(f"{operator}: centroids of {weight.dtype} weights must be {wanted}, got {centroids.dtype}")
    if centroids.dim() != 3:
        refuse(operator, f"centroids must have shape [partitions, clusters, d], got {shape_of(centroids)}")
    partitions, clusters, d = centroids.shape
    _check_clusters(operator, clusters)
    if weight.numel() == 0:
        refuse(operator, f"weight must have elements, got shape {shape_of(weight)}")
    if d < 1 or weight.numel() % d or group_size < 1 or group_size % d:
        refuse(operator, f"weight {shape_of(weight)} and group_size {group_size} must divide into vectors of {d}")
    count = (weight.numel() + group_size - 1) // group_size
    if partitions != count:
        refuse(operator, f"centroids must be given for {count} partitions, got {shape_of(centroids)}")
    if group_size < clusters * d:
        refuse(
            operator, f"a partition must have at least {clusters * d} weights ({clusters} clusters), got {group_size}"
        )


def _check_temperature(operator: str, tau: Tensor, centroids: Tensor) -> None:
    check_float(operator, tau=tau)
    check_device(operator, "centroids", centroids, tau=tau)
    if tau.dtype != centroids.dtype:
        raise TypeError(f"{operator}: tau must have the dtype of centroids ({centroids.dtype}), got {tau.dtype}")
    if list(tau.shape) != [centroids.shape[0]]:
        refuse(operator, f"tau must have shape [{centroids.shape[0]}], one per partition, got {shape_of(tau)}")


def _check_finite(operator: str, weight: Tensor) -> None:
    """What only the values can show. The kernels say the same sentence; on a GPU it is an asynchronous assertion."""
    nan, infinite = int(weight.isnan().sum()), int(weight.isinf().sum())
    if nan + infinite:
        refuse(operator, f"weight must be finite, got {nan} NaN and {infinite} infinite values")


def _check_heat(operator: str, tau: Tensor) -> None:
    for p, heat in enumerate(tau.tolist()):
        if not (heat > 0 and math.isfinite(heat)):
            refuse(operator, f"tau must be positive and finite, got {heat:g} for partition {p}")


def _heat(operator: str, tau: Any, centroids: Tensor) -> Tensor:
    """The temperature of each partition."""
    if not isinstance(centroids, Tensor):
        raise TypeError(f"{operator}: centroids must be a tensor, got {type(centroids).__name__}")
    if isinstance(tau, Tensor):
        return tau.expand(centroids.shape[:1]) if tau.dim() == 0 else tau
    check_number(operator, tau=tau)
    return centroids.new_full(centroids.shape[:1], float(tau))


def _partitions(weight: Tensor, group_size: int, d: int) -> Iterator[Tensor]:
    """The vectors ``[n, d]`` of each partition."""
    yield from (part.view(-1, d) for part in weight.reshape(-1).split(group_size))


# -------------------------------------------------------------------------------------------------- dkm_tables


def _validate_dkm_tables(
    values: Tensor, counts: Tensor, centroids: Tensor, tau: Tensor, iterations: int, eps: float, enforce_zero: bool,
    prune_threshold: float, keep_sparsity: bool, grad: str, resolution: float,
) -> None:  # fmt: skip
    check_float("dkm_tables", values=values, centroids=centroids)
    check_device("dkm_tables", "values", values, counts=counts, centroids=centroids)
    _check_iterations("dkm_tables", iterations, grad)
    _check_rules("dkm_tables", eps, enforce_zero, prune_threshold, keep_sparsity)
    if values.dtype not in (torch.float32, torch.float64) or centroids.dtype != values.dtype:
        raise TypeError(
            f"dkm_tables: values and centroids must both be float32 or both float64, got {values.dtype} and "
            f"{centroids.dtype}"
        )
    if values.dim() != 1 or centroids.dim() != 2 or list(counts.shape) != [centroids.shape[0], values.shape[0]]:
        refuse(
            "dkm_tables",
            "values, counts and centroids must have shapes [bins], [partitions, bins] and [partitions, clusters], got "
            f"{shape_of(values)}, {shape_of(counts)} and {shape_of(centroids)}",
        )
    if counts.dtype != torch.int32:
        raise TypeError(f"dkm_tables: counts must be int32, as histogram16 gives them, got {counts.dtype}")
    _check_clusters("dkm_tables", centroids.shape[1])
    _check_temperature("dkm_tables", tau, centroids)
    check_number("dkm_tables", resolution=resolution)


def _dkm_tables_reference(
    values: Tensor, counts: Tensor, centroids: Tensor, tau: Tensor, iterations: int, eps: float, enforce_zero: bool,
    prune_threshold: float, keep_sparsity: bool, grad: str, resolution: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_heat("dkm_tables", tau)
    rules = Rules(eps, enforce_zero, prune_threshold, keep_sparsity)
    tables, paths, states = [], [], []
    for n, c, temperature in zip(counts, centroids, tau, strict=True):
        there = n.nonzero().flatten()
        x, weight = values[there, None], n[there].to(values.dtype)
        _check_finite("dkm_tables", x)
        out, path, status = _cluster(x, weight, c[:, None], temperature, iterations, rules, grad, resolution)
        tables.append(torch.zeros_like(values).index_add(0, there, out[:, 0]))
        paths.append(path[:, :, 0].double())
        states.append(status)
    return torch.stack(tables), torch.stack(paths, 1), counts.new_tensor(states)


def _path_length(iterations: int, grad: str) -> int:
    return iterations + 1 if grad == "unroll" else 2


def _dkm_tables_fake(
    values: Tensor, counts: Tensor, centroids: Tensor, tau: Tensor, iterations: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    partitions, clusters = centroids.shape
    path = values.new_empty((_path_length(iterations, rest[4]), partitions, clusters), dtype=torch.float64)
    return values.new_empty(counts.shape), path, counts.new_empty((partitions,))


def _dkm_tables_backward_reference(
    grad: Tensor, values: Tensor, counts: Tensor, path: Tensor, status: Tensor, tau: Tensor, eps: float,
    enforce_zero: bool, prune_threshold: float, keep_sparsity: bool, mode: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rules = Rules(eps, enforce_zero, prune_threshold, keep_sparsity)
    slopes: list[Tensor] = []
    offsets: list[Tensor] = []
    first = []
    for p, (total, n) in enumerate(zip(grad, counts, strict=True)):
        there = n.nonzero().flatten()
        x, weight = values[there, None], n[there].to(values.dtype)
        local, shared, start = _cluster_backward(
            None,
            total[there, None],
            x,
            weight,
            path[:, p, :, None].to(values.dtype),
            tau[p],
            rules,
            mode,
            int(status[p]),
        )
        for found, into in ((local, slopes), (shared, offsets)):
            into.append(torch.zeros_like(values).index_add(0, there, found[:, 0]))
        first.append(start[:, 0])
    return torch.stack(slopes), torch.stack(offsets), torch.stack(first)


SECOND = "second derivatives of differentiable k-means: no step of training needs them, and they need the maps again"

_dkm_tables_backward = register(
    Operator(
        "dkm_tables_backward(Tensor grad, Tensor values, Tensor counts, Tensor path, Tensor status, Tensor tau, float eps, "
        "bool enforce_zero, float prune_threshold, bool keep_sparsity, str mode) "
        "-> (Tensor slope, Tensor offset, Tensor grad_centroids)",
        family="clustering",
        reference=_dkm_tables_backward_reference,
        fake=lambda grad, values, counts, path, *rest: (
            values.new_empty(counts.shape),
            values.new_empty(counts.shape),
            values.new_empty(path.shape[1:]),
        ),
        backward=refuse_second("dkm_tables", SECOND),
        cpu=(torch.float32, torch.float64),
        triton=Kernel("cofire_kernels.clustering:dkm_tables_backward", (torch.float32, torch.float64)),
    )
)


def dkm_tables_backward(
    grad: Tensor, values: Tensor, counts: Tensor, path: Tensor, status: Tensor, tau: Tensor, eps: float,
    enforce_zero: bool, prune_threshold: float, keep_sparsity: bool, mode: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``slope``, ``offset`` (per bin) and the gradient of the first centroids: see :func:`dkm_tables`."""
    slope, offset, centroids = _dkm_tables_backward(
        grad, values, counts, path, status, tau, eps, enforce_zero, prune_threshold, keep_sparsity, mode
    )
    return slope, offset, centroids


def _save_dkm_tables(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    values, counts, _, tau, _, *options = inputs
    ctx.save_for_backward(values, counts, output[1], output[2], tau)
    ctx.options = options[:5]  # without the resolution: what it decided is in the status
    ctx.mark_non_differentiable(output[1], output[2])


def _dkm_tables_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    values, counts, path, status, tau = ctx.saved_tensors
    slope, offset, centroids = _dkm_tables_backward(grad, values, counts, path, status, tau, *ctx.options)
    unrolled = ctx.options[-1] == "unroll"  # a fixed point does not depend on where the search for it began
    return (grad * slope + counts * offset).sum(0), None, centroids if unrolled else None, *[None] * 8


def _dkm_tables_flops(values: Tensor, counts: Tensor, centroids: Tensor, tau: Tensor, iterations: int, *_: Any) -> int:
    """Of full counts: nine a distance, exponential and two sums."""
    return 9 * counts.numel() * centroids.shape[1] * (iterations + 1)


_dkm_tables = register(
    Operator(
        "dkm_tables(Tensor values, Tensor counts, Tensor centroids, Tensor tau, int iterations, float eps, bool enforce_zero, "
        "float prune_threshold, bool keep_sparsity, str grad, float resolution) -> (Tensor table, Tensor path, Tensor status)",
        family="clustering",
        validate=_validate_dkm_tables,
        reference=_dkm_tables_reference,
        fake=_dkm_tables_fake,
        backward=Backward(_save_dkm_tables, _dkm_tables_grad, "dkm_tables_backward"),
        double_backward=SECOND,
        cpu=(torch.float32, torch.float64),
        triton=Kernel("cofire_kernels.clustering:dkm_tables", (torch.float32, torch.float64)),
        autocast=None,
        flops=_dkm_tables_flops,
        bytes=lambda values, counts, centroids, *_: 4 * counts.numel() + values.element_size() * 2 * counts.numel(),
    )
)


def dkm_tables(
    values: Tensor,
    counts: Tensor,
    centroids: Tensor,
    tau: float | Tensor,
    *,
    iterations: int = 3,
    eps: float = 1e-7,
    enforce_zero: bool = False,
    prune_threshold: float = 0.0,
    keep_sparsity: bool = False,
    grad: str = "unroll",
    resolution: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable k-means of values that occur several times: what :func:`dkm` does once weights are counted.

    ``dkm_tables(bin_values(w.dtype), histogram16(w)[None], ...)`` and :func:`lut_apply16` give ``dkm(w, ...)``; between the
    two, counts can be summed over processes. Kernels compute in fp64.

    Args:
        values: fp32 or fp64 ``[U]``. Where the count is zero a value is not there, whatever it is.
        counts: int32 ``[P, U]``, how often each value occurs in each of P partitions.
        centroids: ``[P, K]`` in the dtype of ``values``, where the iterations start; K from 2 to 256.
        tau: temperature, in squared units of ``values``; a number, or a tensor ``[P]``.
        iterations, eps, enforce_zero, prune_threshold, keep_sparsity, grad: as in :func:`dkm`.
        resolution: relative spacing of the values (2^-8 for bfloat16), for the temperature floor of the implicit gradient;
            0 for none.

    Returns:
        ``table [P, U]``: what becomes of each value, zero where it is not there; ``path``, fp64 ``[iterations + 1, P, K]``,
        the centroids from start to end (start and end alone where the gradient is not unrolled); ``status``, int32 ``[P]``
        (0: as asked; 1: temperature below the floor; 2: Newton's method stalled; then the gradient is ``jfb``). The table
        is differentiable with respect to ``values`` and ``centroids``, once.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or number that does not fit; a value that is there and not finite.

    Example:
        >>> values, counts = torch.tensor([0.0, 1.0, 9.0]), torch.tensor([[2, 2, 1]], dtype=torch.int32)
        >>> table, path, status = dkm_tables(values, counts, torch.tensor([[0.0, 8.0]]), 0.1, eps=0.0)
        >>> table.tolist(), path[-1].tolist(), status.tolist()
        ([[0.5, 0.5, 9.0]], [[0.5, 9.0]], [0])

    Source: DKM, section 3.2; eDKM, section 2.2.
    """
    options = (iterations, eps, enforce_zero, prune_threshold, keep_sparsity, grad, resolution)
    table, path, status = _dkm_tables(values, counts, centroids, _heat("dkm_tables", tau, centroids), *options)
    return table, path, status


# ------------------------------------------------------------------------------------------------------- dkm


def _validate_dkm(
    weight: Tensor, centroids: Tensor, tau: Tensor, group_size: int, iterations: int, eps: float, enforce_zero: bool,
    prune_threshold: float, keep_sparsity: bool, forward: str, grad: str,
) -> None:  # fmt: skip
    _check_partitions("dkm", weight, centroids, group_size)
    _check_temperature("dkm", tau, centroids)
    _check_iterations("dkm", iterations, grad)
    _check_rules("dkm", eps, enforce_zero, prune_threshold, keep_sparsity)
    check_choice("dkm", "forward", forward, FORWARDS)


def _resolution(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _dkm_reference(
    weight: Tensor, centroids: Tensor, tau: Tensor, group_size: int, iterations: int, eps: float, enforce_zero: bool,
    prune_threshold: float, keep_sparsity: bool, forward: str, grad: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_heat("dkm", tau)
    _check_finite("dkm", weight)
    rules = Rules(eps, enforce_zero, prune_threshold, keep_sparsity)
    outputs, paths, states = [], [], []
    for x, c, temperature in zip(_partitions(weight, group_size, centroids.shape[2]), centroids, tau, strict=True):
        x = x.to(centroids.dtype)
        once = x.new_ones(len(x))
        resolution = _resolution(weight.dtype)
        out, path, status = _cluster(x, once, c, temperature, iterations, rules, grad, resolution)
        if forward == "hard_ste":
            final = path[-1].to(x.dtype)
            out = final[_nearest(x, final, rules)] + (out - out.detach())  # that is zero, with the gradient
        outputs.append(out.reshape(-1))
        paths.append(path.double())
        states.append(status)
    output = torch.cat(outputs).view(weight.shape).to(weight.dtype)
    return output, torch.stack(paths, 1), torch.tensor(states, dtype=torch.int32, device=weight.device)


def _dkm_fake(
    weight: Tensor, centroids: Tensor, tau: Tensor, group_size: int, iterations: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    path = weight.new_empty((_path_length(iterations, rest[5]), *centroids.shape), dtype=torch.float64)
    return weight.new_empty(weight.shape), path, weight.new_empty(centroids.shape[:1], dtype=torch.int32)


def _dkm_backward_reference(
    grad: Tensor, weight: Tensor, path: Tensor, status: Tensor, tau: Tensor, group_size: int, eps: float,
    enforce_zero: bool, prune_threshold: float, keep_sparsity: bool, mode: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rules = Rules(eps, enforce_zero, prune_threshold, keep_sparsity)
    d = path.shape[3]
    parts, first = [], []
    for p, (g, x) in enumerate(zip(_partitions(grad, group_size, d), _partitions(weight, group_size, d), strict=True)):
        g, x = g.to(tau.dtype), x.to(tau.dtype)
        local, shared, start = _cluster_backward(
            g, g, x, x.new_ones(len(x)), path[:, p].to(x.dtype), tau[p], rules, mode, int(status[p])
        )
        parts.append((local + shared).reshape(-1))
        first.append(start)
    return torch.cat(parts).view(weight.shape).to(weight.dtype), torch.stack(first)


_dkm_backward = register(
    Operator(
        "dkm_backward(Tensor grad, Tensor weight, Tensor path, Tensor status, Tensor tau, int group_size, float eps, "
        "bool enforce_zero, float prune_threshold, bool keep_sparsity, str mode) "
        "-> (Tensor grad_weight, Tensor grad_centroids)",
        family="clustering",
        reference=_dkm_backward_reference,
        fake=lambda grad, weight, path, status, tau, *rest: (
            weight.new_empty(weight.shape),
            tau.new_empty(path.shape[1:]),
        ),
        backward=refuse_second("dkm", SECOND),
        triton=Kernel("cofire_kernels.clustering:dkm_backward"),
        bytes=lambda grad, weight, *_: 3 * weight.numel() * weight.element_size(),
    )
)


def _save_dkm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weight, _, tau, group_size, _, *options = inputs
    ctx.save_for_backward(weight, output[1], output[2], tau)
    *rules, _, mode = options
    ctx.options = (group_size, *rules, mode)
    ctx.mark_non_differentiable(output[1], output[2])


def _dkm_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    weight, path, status, tau = ctx.saved_tensors
    d_weight, d_centroids = _dkm_backward(grad, weight, path, status, tau, *ctx.options)
    return d_weight, d_centroids if ctx.options[-1] == "unroll" else None, *[None] * 9


def _dkm_flops(weight: Tensor, centroids: Tensor, tau: Tensor, group_size: int, iterations: int, *_: Any) -> int:
    """As for :func:`dkm_tables`, of at most as many values as the type has."""
    partitions, clusters, d = centroids.shape
    values = weight.numel() // d
    if weight.dtype in HALVES and d == 1:
        values = min(values, partitions * BINS)
    return (6 + 3 * d) * values * clusters * (iterations + 1)


_dkm = register(
    Operator(
        "dkm(Tensor weight, Tensor centroids, Tensor tau, int group_size, int iterations, float eps, bool enforce_zero, "
        "float prune_threshold, bool keep_sparsity, str forward, str grad) -> (Tensor output, Tensor path, Tensor status)",
        family="clustering",
        validate=_validate_dkm,
        reference=_dkm_reference,
        fake=_dkm_fake,
        backward=Backward(_save_dkm, _dkm_grad, "dkm_backward"),
        double_backward=SECOND,
        triton=Kernel("cofire_kernels.clustering:dkm"),
        flops=_dkm_flops,
        bytes=lambda weight, *_: 2 * weight.numel() * weight.element_size(),
    )
)

_warned: set[int] = set()
_WARNINGS = {
    BELOW_FLOOR: "the temperature is below the floor at which neighbouring centroids still share weights of this dtype",
    STALLED: "Newton's method found no fixed point",
}


def _warn_once(status: Tensor) -> None:
    for state, reason in _WARNINGS.items():
        if state not in _warned and bool((status == state).any()):
            _warned.add(state)
            warnings.warn(
                f"dkm: {reason}; such partitions take plain updates and the Jacobian-free gradient (said once)",
                stacklevel=3,
            )


class Clustered(NamedTuple):
    """What :func:`dkm` returns."""

    output: Tensor  #: the weights, drawn to their centroids
    centroids: Tensor  #: ``[P, K, d]``, detached: where the next call starts
    status: Tensor  #: int32 ``[P]``: 0 as asked, 1 temperature below the floor, 2 Newton's method stalled


def mean_gap(centroids: Tensor) -> Tensor:
    """The mean distance between neighbouring centroids, ``[P]``: for scalars of adjacent, for vectors of nearest ones."""
    centroids = centroids.detach()
    if centroids.shape[2] == 1:
        flat = centroids[:, :, 0]
        return (flat.amax(1) - flat.amin(1)) / (flat.shape[1] - 1)
    distance = (centroids[:, :, None] - centroids[:, None]).square().sum(3)
    itself = torch.eye(centroids.shape[1], dtype=torch.bool, device=centroids.device)
    return distance.masked_fill(itself, math.inf).amin(2).sqrt().mean(1)


def temperature(centroids: Tensor, rho: float) -> Tensor:
    """The scale-free temperature ``rho * mean_gap(centroids)^2``, ``[P]``; positive also where all centroids are one."""
    return (rho * mean_gap(centroids).square()).clamp(min=1e-30)


def dkm(
    weight: Tensor,
    centroids: Tensor,
    *,
    tau: float | Tensor | None = None,
    rho: float | None = None,
    iterations: int = 3,
    group_size: int | None = None,
    eps: float = 1e-7,
    forward: str = "soft",
    grad: str = "unroll",
    enforce_zero: bool = False,
    prune_threshold: float = 0.0,
    keep_sparsity: bool = False,
) -> Clustered:
    """Differentiable k-means: each weight becomes the mean of the centroids under its attention.

    The attention maps ``[N, K]`` never exist: bfloat16 and float16 weights are counted (a histogram of their 65,536
    values), others stream. For backward the centroids of each iteration are kept, and the weight itself.

    Args:
        weight: any shape, bfloat16, float16, float32 (float64 by the reference); taken in row-major order.
        centroids: fp32 ``[P, K, d]``, where the iterations start: one palette of K = 2 to 256 vectors of d weights for each
            of the P partitions.
        tau: temperature in squared units of the weights: a number, or a tensor ``[P]``. Give this or ``rho``.
        rho: temperature in units of the squared mean gap between centroids: means the same for every layer.
        iterations: k-means updates (of plain ones; an implicit gradient goes on to the fixed point).
        group_size: weights per partition; the last may have fewer. None: one partition.
        eps: attention is clamped from below at it, which draws an empty cluster to the mean. With 0, it stays.
        forward: ``"soft"``, or ``"hard_ste"``: the nearest centroid, with the gradient of ``"soft"``.
        grad: ``"unroll"``: through all iterations, as in the paper; ``"implicit"``: of the fixed point, found by Newton's
            method (below a floor of the temperature, where 16-bit weights are too coarse for it: as ``"jfb"``, with a
            warning, once); ``"jfb"``: Jacobian-free, the implicit gradient without its linear system.
        enforce_zero: centroid 0 is zero and stays it.
        prune_threshold: subtracted from the squared distance to centroid 0, so that more weights go there.
        keep_sparsity: weights that are not zero never go to centroid 0; needs ``enforce_zero``.

    Returns:
        :class:`Clustered`: ``output`` like ``weight``, ``centroids``, ``status``. ``output`` is differentiable, once, with
        respect to ``weight`` and (unrolled) ``centroids``.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or number that does not fit; NaN or infinity in ``weight``, with their number.
        RuntimeError: a second derivative.

    Example:
        >>> weight = torch.tensor([0.0, 0.1, 0.9, 1.0], dtype=torch.bfloat16)
        >>> start = torch.tensor([[[0.25], [0.75]]])
        >>> clustered = dkm(weight, start, rho=0.01)
        >>> [round(c, 2) for c in clustered.centroids.flatten().tolist()]
        [0.05, 0.95]

    Source: DKM, section 3.2; eDKM, section 2; implicit gradients: IDKM, section 4.
    """
    if (tau is None) == (rho is None):
        refuse("dkm", "one of tau and rho must be given")
    size = max(weight.numel(), 1) if group_size is None else group_size
    if rho is not None:
        check_number("dkm", rho=rho)
        if not 0 < rho < math.inf:
            refuse("dkm", f"rho must be positive and finite, got {rho}")
        _check_partitions("dkm", weight, centroids, size)
        heat = temperature(centroids, rho)
    else:
        heat = _heat("dkm", tau, centroids)
    rules = (eps, enforce_zero, prune_threshold, keep_sparsity)
    output, path, status = _dkm(weight, centroids, heat, size, iterations, *rules, forward, grad)
    if (
        grad == "implicit"
        and type(status) is Tensor
        and status.device.type == "cpu"
        and not torch.compiler.is_compiling()
    ):
        _warn_once(status)
    return Clustered(output, path[-1].to(centroids.dtype), status)


# ---------------------------------------------------------------------------------------------- hard k-means


def _validate_palettize(
    weight: Tensor, centroids: Tensor, group_size: int, prune_threshold: float, keep_sparsity: bool
) -> None:
    _check_partitions("palettize", weight, centroids, group_size)
    _check_rules("palettize", 0.0, True, prune_threshold, keep_sparsity)


def _palettize_reference(
    weight: Tensor, centroids: Tensor, group_size: int, prune_threshold: float, keep_sparsity: bool
) -> tuple[Tensor, Tensor]:
    _check_finite("palettize", weight)
    rules = Rules(0.0, True, prune_threshold, keep_sparsity)
    labels, inertia = [], []
    for x, c in zip(_partitions(weight, group_size, centroids.shape[2]), centroids, strict=True):
        x, c = x.double(), c.double()
        chosen = torch.cat([_nearest(part, c, rules) for part in x.split(1 << 16)])
        labels.append(chosen.to(torch.uint8))
        inertia.append((x - c[chosen]).square().sum())
    return torch.cat(labels).view(_label_shape(weight, centroids)), torch.stack(inertia).to(centroids.dtype)


def _label_shape(weight: Tensor, centroids: Tensor) -> list[int]:
    d = centroids.shape[2]
    return list(weight.shape) if d == 1 else [weight.numel() // d]


_palettize = register(
    Operator(
        "palettize(Tensor weight, Tensor centroids, int group_size, float prune_threshold, bool keep_sparsity) "
        "-> (Tensor labels, Tensor inertia)",
        family="clustering",
        validate=_validate_palettize,
        reference=_palettize_reference,
        fake=lambda weight, centroids, *_: (
            weight.new_empty(_label_shape(weight, centroids), dtype=torch.uint8),
            centroids.new_empty(centroids.shape[:1]),
        ),
        backward="labels have no gradient",
        triton=Kernel("cofire_kernels.clustering:palettize"),
        flops=lambda weight, centroids, *_: 3 * weight.numel() * centroids.shape[1],
        bytes=lambda weight, centroids, *_: (
            weight.numel() * weight.element_size() + weight.numel() // centroids.shape[2]
        ),
    )
)


def palettize(
    weight: Tensor,
    centroids: Tensor,
    *,
    group_size: int | None = None,
    prune_threshold: float = 0.0,
    keep_sparsity: bool = False,
) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each weight: what is stored in place of the weights.

    Args:
        weight, centroids, group_size, prune_threshold, keep_sparsity: as in :func:`dkm`; centroids ``[P, K, d]``.

    Returns:
        ``labels``, uint8, in the shape of ``weight`` (``[N / d]`` for vectors), of equally near centroids the first; and
        ``inertia [P]``, the sum of squared distances.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit; NaN or infinity in ``weight``, with their number.

    Example:
        >>> labels, inertia = palettize(torch.tensor([0.0, 0.25, 1.0]), torch.tensor([[[0.0], [1.0]]]))
        >>> labels.tolist(), inertia.tolist()
        ([0, 0, 1], [0.0625])

    Source: DKM, section 3.3 (inference).
    """
    size = max(weight.numel(), 1) if group_size is None else group_size
    labels, inertia = _palettize(weight, centroids, size, prune_threshold, keep_sparsity)
    return labels, inertia


#: Weights of more bits than sixteen, if more than this many, are clustered in groups that share their leading sixteen.
EXACT_WEIGHTS = 4096


def _validate_kmeans1d(weight: Tensor, clusters: int, group_size: int) -> None:
    check_float("kmeans1d", weight=weight)
    check_integer("kmeans1d", clusters=clusters, group_size=group_size)
    _check_clusters("kmeans1d", clusters)
    if weight.numel() == 0:
        refuse("kmeans1d", f"weight must have elements, got shape {shape_of(weight)}")
    if group_size < 1:
        refuse("kmeans1d", f"group_size must be at least 1, got {group_size}")


def _cells(x: Tensor, shift: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of the weights that stay together, in ascending order: count, sum and sum of squares about ``shift``, fp64.

    And the squared distances of all weights to the means of their cells.
    """
    wide = x.double() - shift
    exact = x.dtype in HALVES or x.numel() <= EXACT_WEIGHTS
    if exact:
        place = x.double().unique(return_inverse=True)[1]
    else:
        place = (x.float().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        place = bins_of(place).unique(return_inverse=True)[1]
    zeros = wide.new_zeros(int(place.max()) + 1)
    moments = tuple(zeros.index_add(0, place, moment) for moment in (torch.ones_like(wide), wide, wide.square()))
    within = wide.new_zeros(()) if exact else (wide - (moments[1] / moments[0])[place]).square().sum()
    return moments, within


def _optimal_centroids(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """By dynamic programming over the cells: the best k clusters of the first j cells end with the best last cluster."""
    shift = x.double().mean()
    moments, within = _cells(x, shift)
    count, total, square = (torch.cat((m.new_zeros(1), m.cumsum(0))) for m in moments)
    cells = len(count) - 1
    if cells <= clusters:
        values = moments[1] / moments[0] + shift
        return torch.cat((values, values[-1:].expand(clusters - cells))), within
    best = square.new_full((cells + 1,), math.inf)
    best[0] = 0
    choices = []
    for _ in range(clusters):
        found = []
        for ends in torch.arange(1, cells + 1, device=x.device).split(max(1, (1 << 22) // cells)):
            n, s, q = (m[ends, None] - m for m in (count, total, square))
            cost = best + (q - s.square() / n).clamp(min=0)
            found.append(cost.masked_fill(n <= 0, math.inf).min(1))
        best = torch.cat([best.new_full((1,), math.inf), *(f.values for f in found)])
        choices.append(torch.cat([f.indices for f in found]))
    edges = [cells]
    for chosen in reversed(choices):
        edges.append(int(chosen[edges[-1] - 1]))
    edge = torch.tensor(edges[::-1], device=x.device)
    return total[edge].diff() / count[edge].diff() + shift, best[-1]


def _kmeans1d_reference(weight: Tensor, clusters: int, group_size: int) -> tuple[Tensor, Tensor]:
    _check_finite("kmeans1d", weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    found = [_optimal_centroids(x[:, 0], clusters) for x in _partitions(weight, group_size, 1)]
    centroids = torch.stack([c for c, _ in found])[:, :, None]
    return centroids.to(dtype), torch.stack([i for _, i in found]).to(dtype)


def _kmeans1d_fake(weight: Tensor, clusters: int, group_size: int) -> tuple[Tensor, Tensor]:
    partitions = (weight.numel() + group_size - 1) // group_size
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_empty((partitions, clusters, 1), dtype=dtype), weight.new_empty((partitions,), dtype=dtype)


_kmeans1d = register(
    Operator(
        "kmeans1d(Tensor weight, int clusters, int group_size) -> (Tensor centroids, Tensor inertia)",
        family="clustering",
        validate=_validate_kmeans1d,
        reference=_kmeans1d_reference,
        fake=_kmeans1d_fake,
        backward="where training starts needs no gradient",
        triton="runs once, before training: the reference's dynamic programme is torch operators",
        bytes=lambda weight, clusters, group_size: weight.numel() * weight.element_size(),
    )
)


def kmeans1d(weight: Tensor, clusters: int, *, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Globally optimal k-means of scalars, by dynamic programming; no seed, no restarts.

    Args:
        weight: any shape, any float. 16-bit weights are clustered exactly; of wider ones, if a partition has more than
            4,096, those that share their leading sixteen bits (sign, exponent, seven bits) stay together.
        clusters: 2 to 256.
        group_size: as in :func:`dkm`.

    Returns:
        ``centroids [P, clusters, 1]``, ascending, fp32 (fp64 for fp64 weights), and ``inertia [P]``, the sum of squared
        distances. A partition of fewer distinct weights than clusters repeats its largest one.

    Raises:
        TypeError: weights that are not floats.
        ValueError: ``clusters`` or ``group_size`` out of range; no weights; NaN or infinity, with their number.

    Example:
        >>> centroids, inertia = kmeans1d(torch.tensor([1.0, 2.0, 10.0, 12.0]), 2)
        >>> centroids.flatten().tolist(), inertia.tolist()
        ([1.5, 11.0], [2.5])

    Source: Wang, Song, "Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by Dynamic Programming", R Journal 2011;
    divide and conquer over the last boundary: Gronlund et al., "Fast Exact k-Means, k-Medians and Bregman Divergence
    Clustering in 1D", 2017.
    """
    size = max(weight.numel(), 1) if group_size is None else group_size
    centroids, inertia = _kmeans1d(weight, clusters, size)
    return centroids, inertia
