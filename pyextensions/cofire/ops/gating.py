# SPDX-License-Identifier: Apache-2.0
"""Dynamic channel gating: masks per sample, their targets, and convolutions that really skip.

Source: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised
Mask Prediction", CVPR 2022 (FTWT). Notation: N samples, C channels, a gate mask is bool ``[N, C]``, and ``(index,
count)`` is its compaction (:func:`cofire.ops.compact`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.ops.checks import (
    check_choice,
    check_device,
    check_float,
    check_integer,
    check_map,
    check_number,
    check_pair,
    check_same,
    check_selection,
    refuse,
    shape_of,
)
from cofire.ops.selection import compact
from cofire.registry import Backward, Kernel, Operator, register, through_reference

__all__ = [
    "channel_pool",
    "gate_head",
    "gated_conv2d",
    "gated_linear",
    "gated_norm_act",
    "mass_mask",
]

ACTIVATIONS = ("identity", "relu", "relu6")


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return x.relu()
    return x.clamp(0, 6) if activation == "relu6" else x


def _activation_grad(grad: Tensor, output: Tensor, activation: str) -> Tensor:
    """Gradient before the activation, from its output alone; for NaN and infinity too as ``F.relu`` and ``F.relu6``."""
    if activation == "relu":
        return grad.masked_fill(output <= 0, 0)
    return grad.masked_fill(~((output > 0) & (output < 6)), 0) if activation == "relu6" else grad


def mask_from_index(index: Tensor, count: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`cofire.ops.compact`: bool ``[R, columns]``."""
    slot = torch.arange(index.shape[1], device=index.device)
    position = torch.where(slot < count[:, None], index, columns).long()
    mask = torch.zeros(index.shape[0], columns + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(1, position, True)[:, :columns]


# ---------------------------------------------------------------------------------------------- channel_pool


def _validate_channel_pool(input: Tensor, mode: str) -> None:
    check_map("channel_pool", "input", input)
    check_float("channel_pool", input=input)
    check_choice("channel_pool", "mode", mode, ("avg", "max"))
    if input.shape[2] * input.shape[3] <= 0:
        refuse("channel_pool", f"input must have pixels, got {shape_of(input)}")


def _channel_pool_reference(input: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    flat = input.flatten(2)
    pooled = flat.mean(2) if mode == "avg" else flat.max(2).values
    index, count = compact((flat != 0).any(2))
    return pooled, index, count


def _channel_pool_fake(input: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    n, c = input.shape[:2]
    integers = input.new_empty((n, c), dtype=torch.int32)
    return input.new_empty((n, c)), integers, input.new_empty((n,), dtype=torch.int32)


def _channel_pool_backward_reference(grad: Tensor, input: Tensor, mode: str) -> Tensor:
    n, c, h, w = input.shape
    if mode == "avg":
        everywhere = (grad / (h * w))[:, :, None, None].expand(n, c, h, w)
        return everywhere.clone(memory_format=memory_format(input))
    # argmax promises nothing on ties; the first maximum is the lowest position that equals it, or is NaN
    flat = input.flatten(2)
    hit = (flat == flat.amax(2, keepdim=True)) | flat.isnan()
    position = torch.arange(h * w, device=input.device)
    first = torch.where(hit, position, h * w).amin(2, keepdim=True)
    return like_input(torch.zeros_like(flat).scatter(2, first, grad[:, :, None]).reshape(n, c, h, w), input)


def _channel_pool_bytes(input: Tensor, mode: str) -> int:
    return input.numel() * input.element_size() + input.shape[0] * input.shape[1] * (input.element_size() + 4)


_channel_pool_backward = register(
    Operator(
        "channel_pool_backward(Tensor grad, Tensor input, str mode) -> Tensor",
        family="gating",
        reference=_channel_pool_backward_reference,
        fake=lambda grad, input, mode: torch.empty_like(input, memory_format=memory_format(input)),
        backward=through_reference(_channel_pool_backward_reference),
        triton=Kernel("cofire_kernels.gating:channel_pool_backward"),
        bytes=lambda grad, input, mode: 2 * input.numel() * input.element_size(),
    )
)


def _save_channel_pool(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.mode = inputs[1]
    ctx.mark_non_differentiable(output[1], output[2])


def _channel_pool_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return _channel_pool_backward(grad, ctx.saved_tensors[0], ctx.mode), None


_channel_pool = register(
    Operator(
        "channel_pool(Tensor input, str mode) -> (Tensor pooled, Tensor index, Tensor count)",
        family="gating",
        validate=_validate_channel_pool,
        reference=_channel_pool_reference,
        fake=_channel_pool_fake,
        backward=Backward(_save_channel_pool, _channel_pool_grad, "channel_pool_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.gating:channel_pool"),
        bytes=_channel_pool_bytes,
    )
)


def channel_pool(input: Tensor, mode: str = "max") -> tuple[Tensor, Tensor, Tensor]:
    """Global pooling of each channel, and the channels that hold any non-zero element, in one pass.

    Args:
        input: ``[N, C, H, W]``, a float type.
        mode: ``"max"`` (FTWT, figure 3) or ``"avg"`` (the authors' released code).

    Returns:
        ``pooled`` ``[N, C]`` in the dtype of ``input``, and the support of each sample: ``index`` int32 ``[N, C]``
        (ascending, then -1) and ``count`` int32 ``[N]``. A max-pool's gradient goes to the first maximum.

    Raises:
        ValueError: ``input`` is not 4-D or has no pixels; unknown ``mode``.
        TypeError: ``input`` is not a floating-point tensor.

    Example:
        >>> pooled, index, count = channel_pool(torch.tensor([[[[1.0, -2.0]], [[0.0, 0.0]]]]))
        >>> pooled.tolist(), index.tolist(), count.tolist()
        ([[1.0, 0.0]], [[0, -1]], [1])

    Source: FTWT, section 3 (the input of the mask predictor).
    """
    pooled, index, count = _channel_pool(input, mode)
    return pooled, index, count


# ------------------------------------------------------------------------------------------------- mass_mask


def _validate_mass_mask(scores: Tensor, mass: float, mode: str, min_keep: int) -> None:
    if scores.dim() != 2:
        refuse("mass_mask", f"scores must have shape [N, C], got {shape_of(scores)}")
    check_float("mass_mask", scores=scores)
    check_choice("mass_mask", "mode", mode, ("mass", "uniform"))
    check_number("mass_mask", mass=mass)
    check_integer("mass_mask", min_keep=min_keep)
    if mode == "mass":
        if not (mass < 0 or 0 < mass <= 1):
            refuse("mass_mask", f"mass must be in (0, 1] or negative (gating off), got {mass}")
    else:
        if not (0 <= mass < 1):
            refuse("mass_mask", f"mass must be in [0, 1) in mode 'uniform' (the share to prune), got {mass}")
    limit = scores.shape[1]
    if not (0 <= min_keep <= limit):
        refuse("mass_mask", f"min_keep must be between 0 and the {limit} channels, got {min_keep}")


def _refuse_bad_scores(scores: Tensor) -> None:
    bad = ~(scores.isfinite() & (scores >= 0))
    if scores.device.type == "cpu":
        if bad.any():
            n, c = (int(i) for i in bad.nonzero()[0])
            value = scores[n, c].item()
            raise ValueError(
                f"mass_mask: scores must be finite and non-negative, got {value:g} for sample {n}, channel {c}"
            )
    else:  # no host synchronisation: the device reports it
        torch._assert_async(~bad.any(), "mass_mask: scores must be finite and non-negative")


def _mass_mask_reference(scores: Tensor, mass: float, mode: str, min_keep: int) -> Tensor:
    _refuse_bad_scores(scores)
    if mass < 0:
        return torch.ones_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    channels = scores.shape[1]
    ordered, order = scores.float().sort(dim=1, descending=True, stable=True)
    rank = torch.arange(channels, device=scores.device)
    if mode == "uniform":
        keep = (rank < channels - int(mass * channels)) & (ordered > 1e-5)
    else:
        total = ordered.cumsum(1)[:, -1:] if channels else ordered
        share = ordered / total
        keep = share > 1e-5 if mass == 1 else share.cumsum(1) - mass <= 1e-5
        keep &= total > 0
    keep |= rank < min_keep
    return torch.zeros_like(keep).scatter(1, order, keep)


_mass_mask = register(
    Operator(
        "mass_mask(Tensor scores, float mass, str mode, int min_keep) -> Tensor",
        family="gating",
        validate=_validate_mass_mask,
        reference=_mass_mask_reference,
        fake=lambda scores, mass, mode, min_keep: scores.new_empty(scores.shape, dtype=torch.bool),
        backward="the mask is a target; FTWT has no straight-through gradient",
        triton=Kernel("cofire_kernels.gating:mass_mask"),
        autocast=torch.float32,
        bytes=lambda scores, *_: scores.numel() * (scores.element_size() + 1),
    )
)


def mass_mask(scores: Tensor, mass: float, mode: str = "mass", min_keep: int = 1) -> Tensor:
    """The self-supervised target of FTWT: the channels that carry a given share of a sample's activation mass.

    Channels are taken in descending order of score, ties to the lower index, while the share taken so far stays at or
    below ``mass`` (within 1e-5). ``mass=1`` drops only channels that never fire (share at most 1e-5).

    Args:
        scores: ``[N, C]``, finite and non-negative; FTWT takes the largest absolute activation of each channel.
        mass: share to keep, in (0, 1]; negative turns gating off. In mode ``"uniform"`` the share to prune, in [0, 1).
        mode: ``"mass"``, or ``"uniform"`` (prune the same number everywhere, and every score at or below 1e-5).
        min_keep: the fewest channels kept per sample; the largest scores fill up.

    Returns:
        bool ``[N, C]``.

    Raises:
        ValueError: a value out of range, an unknown mode, a score that is negative or not finite (on a GPU the device
            asserts, without a synchronisation).
        TypeError: ``scores`` is not a floating-point tensor.

    Example:
        >>> mass_mask(torch.tensor([[5.5, 7.9, 0.3, 8.6, 2.2, 3.1, 0.9]]), 0.8).int().tolist()
        [[1, 1, 0, 1, 0, 0, 0]]

    Source: FTWT, section 3 (ground-truth masks by activation mass).
    """
    result: Tensor = _mass_mask(scores, mass, mode, min_keep)
    return result


# ------------------------------------------------------------------------------------------------- gate_head


def _validate_gate_head(pooled: Tensor, weight: Tensor, bias: Tensor | None, softmax: bool, min_keep: int) -> None:
    op = "gate_head"
    if pooled.dim() != 2:
        refuse(op, f"pooled must have shape [N, in_features], got {shape_of(pooled)}")
    check_float(op, pooled=pooled, weight=weight, bias=bias)
    if not (weight.dim() == 2 and weight.shape[1] == pooled.shape[1]):
        refuse(op, f"weight must have shape [out_channels, {pooled.shape[1]}], got {shape_of(weight)}")
    out = weight.shape[0]
    if bias is not None:
        if list(bias.shape) != [out]:
            refuse(op, f"bias must have shape [{out}], got {shape_of(bias)}")
    check_same(op, "pooled", pooled, weight=weight, bias=bias)
    check_integer(op, min_keep=min_keep)
    if not (0 <= min_keep <= out):
        refuse(op, f"min_keep must be between 0 and the {out} channels, got {min_keep}")


def _gate_head_reference(
    pooled: Tensor, weight: Tensor, bias: Tensor | None, softmax: bool, min_keep: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    accumulate = _accumulation_dtype(pooled)
    features = pooled.to(accumulate).softmax(1) if softmax else pooled.to(accumulate)
    logits = F.linear(features, weight.to(accumulate), None if bias is None else bias.to(accumulate)).to(pooled.dtype)
    mask = logits > 0
    if min_keep:
        best = logits.sort(dim=1, descending=True, stable=True).indices[:, :min_keep]  # NaN first
        mask = torch.where(mask.sum(1, keepdim=True) < min_keep, torch.zeros_like(mask).scatter(1, best, True), mask)
    index, count = compact(mask)
    return logits, mask, index, count


def _gate_head_fake(pooled: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (pooled.shape[0], weight.shape[0])
    return (
        pooled.new_empty(shape),
        pooled.new_empty(shape, dtype=torch.bool),
        pooled.new_empty(shape, dtype=torch.int32),
        pooled.new_empty(shape[:1], dtype=torch.int32),
    )


def _gate_head_backward_reference(
    grad_logits: Tensor, pooled: Tensor, weight: Tensor, softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = _accumulation_dtype(pooled)
    grad, x, w = grad_logits.to(accumulate), pooled.to(accumulate), weight.to(accumulate)
    features = x.softmax(1) if softmax else x
    grad_features = grad @ w
    if softmax:
        grad_features = features * (grad_features - (features * grad_features).sum(1, keepdim=True))
    return grad_features.to(pooled.dtype), (grad.t() @ features).to(weight.dtype), grad.sum(0).to(weight.dtype)


_gate_head_backward = register(
    Operator(
        "gate_head_backward(Tensor grad_logits, Tensor pooled, Tensor weight, bool softmax) "
        "-> (Tensor grad_pooled, Tensor grad_weight, Tensor grad_bias)",
        family="gating",
        reference=_gate_head_backward_reference,
        fake=lambda grad, pooled, weight, softmax: (
            pooled.new_empty(pooled.shape),
            weight.new_empty(weight.shape),
            weight.new_empty(weight.shape[:1]),
        ),
        backward=through_reference(_gate_head_backward_reference),
        triton="library GEMMs",
        flops=lambda grad, pooled, weight, softmax: 4 * pooled.shape[0] * weight.numel(),
        bytes=lambda grad, pooled, weight, softmax: (
            (2 * (pooled.numel() + weight.numel()) + grad.numel()) * pooled.element_size()
        ),
    )
)


def _save_gate_head(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pooled, weight, bias, ctx.softmax, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(pooled, weight)
    ctx.mark_non_differentiable(*output[1:])


def _gate_head_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    pooled, weight = ctx.saved_tensors
    grad_pooled, grad_weight, grad_bias = _gate_head_backward(grad, pooled, weight, ctx.softmax)
    return grad_pooled, grad_weight, grad_bias if ctx.has_bias else None, None, None


_gate_head = register(
    Operator(
        "gate_head(Tensor pooled, Tensor weight, Tensor? bias, bool softmax, int min_keep) "
        "-> (Tensor logits, Tensor mask, Tensor index, Tensor count)",
        family="gating",
        validate=_validate_gate_head,
        reference=_gate_head_reference,
        fake=_gate_head_fake,
        backward=Backward(_save_gate_head, _gate_head_grad, "gate_head_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.gating:gate_head"),
        autocast=torch.float32,
        flops=lambda pooled, weight, *_: 2 * pooled.shape[0] * weight.numel(),
        bytes=lambda pooled, weight, *_: (
            (pooled.numel() + weight.numel()) * pooled.element_size()
            + pooled.shape[0] * weight.shape[0] * (pooled.element_size() + 5)
        ),
    )
)


def gate_head(
    pooled: Tensor, weight: Tensor, bias: Tensor | None = None, *, softmax: bool = True, min_keep: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mask predictor of FTWT: softmax over the channels, linear, threshold at zero, compaction.

    Gradients flow to ``pooled``, ``weight`` and ``bias`` through ``logits`` only; FTWT trains the head by binary cross
    entropy, and no gradient passes the threshold. For decoupled training pass ``pooled.detach()``.

    Args:
        pooled: ``[N, in_features]``, from :func:`channel_pool`.
        weight: ``[out_channels, in_features]``.
        bias: ``[out_channels]`` or None.
        softmax: normalise ``pooled`` over its features first.
        min_keep: the fewest channels kept per sample; where fewer logits are positive, the largest are kept, ties to the
            lower index (NaN counts as largest there, and as not positive elsewhere).

    Returns:
        ``logits`` ``[N, out_channels]`` in the dtype of ``pooled``, ``mask`` bool
        ``[N, out_channels]`` (``logits > 0``), and its compaction ``index`` int32 ``[N, out_channels]``, ``count``
        int32 ``[N]``.

    Raises:
        ValueError: shapes that do not fit, ``min_keep`` out of range.
        TypeError: a tensor that is not floating-point, or mixed dtypes.

    Example:
        >>> logits, mask, index, count = gate_head(torch.zeros(1, 2), torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        >>> logits.tolist(), mask.tolist(), index.tolist(), count.tolist()
        ([[1.0, -1.0]], [[True, False]], [[0, -1]], [1])

    Source: FTWT, section 3 and figure 3.
    """
    logits, mask, index, count = _gate_head(pooled, weight, bias, softmax, min_keep)
    return logits, mask, index, count


# -------------------------------------------------------------------------------------------- gated_norm_act


def _validate_gated_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
    training: bool,
    eps: float,
) -> None:
    op = "gated_norm_act"
    check_map(op, "input", input)
    statistics = {"running_mean": running_mean, "running_var": running_var}
    check_float(op, input=input, weight=weight, bias=bias, **statistics, residual=residual)
    n, c, h, w = input.shape
    given = {name: x for name, x in statistics.items() if x is not None}
    for name, x in {"weight": weight, "bias": bias, **given}.items():
        if list(x.shape) != [c]:
            refuse(op, f"{name} must have shape [{c}], got {shape_of(x)}")
    if training:
        if n * h * w <= 1:
            refuse(op, f"training needs more than one value per channel, got input {shape_of(input)}")
    else:
        if not (running_mean is not None and running_var is not None):
            refuse(op, "running_mean and running_var must be given when training is False, got None")
    if residual is not None:
        if residual.shape != input.shape:
            refuse(op, f"residual must have shape {shape_of(input)}, got {shape_of(residual)}")
        check_same(op, "input", input, residual=residual)
    if mask is not None:
        if list(mask.shape) != [n, c]:
            refuse(op, f"mask must have shape [{n}, {c}], got {shape_of(mask)}")
        if mask.requires_grad:
            refuse(op, "mask must not require grad: no gradient passes the gate")
    check_device(op, "input", input, weight=weight, bias=bias, **statistics, mask=mask)
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_number(op, eps=eps)
    if not eps >= 0:
        refuse(op, f"eps must not be negative, got {eps}")


def _gated_norm_act_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    accumulate = _accumulation_dtype(input)
    x = input.to(accumulate)
    if training:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean.to(accumulate, copy=True), running_var.to(accumulate, copy=True)

    def per_channel(v: Tensor) -> Tensor:
        return v.to(accumulate)[None, :, None, None]

    normalised = (x - per_channel(mean)) * (per_channel(var) + eps).rsqrt()
    u = normalised * per_channel(weight) + per_channel(bias)
    if residual is not None:
        u = u + residual.to(accumulate)
    u = _activate(u, activation)
    peak = u.abs().amax((2, 3)) if u.shape[2] * u.shape[3] else u.new_zeros(u.shape[:2])
    output = u if mask is None else u.masked_fill((mask == 0)[:, :, None, None], 0)
    return like_input(output.to(input.dtype), input), peak.detach(), mean, var


def like_input(output: Tensor, input: Tensor) -> Tensor:
    """In the memory format of ``input``: channels_last stays channels_last."""
    return output.contiguous(memory_format=memory_format(input))


def memory_format(x: Tensor) -> torch.memory_format:
    """The format a convolution-like operator keeps; a tensor that is both counts as contiguous."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _gated_norm_act_fake(input: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c = input.shape[:2]
    accumulate = _accumulation_dtype(input)
    statistic = input.new_empty((c,), dtype=accumulate)
    output = torch.empty_like(input, memory_format=memory_format(input))
    return output, input.new_empty((n, c), dtype=accumulate), statistic, statistic.clone()


def _gated_norm_act_backward_reference(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    activation: str,
    training: bool,
    residual: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    accumulate = _accumulation_dtype(input)
    kept = grad.to(accumulate) if mask is None else grad.to(accumulate).masked_fill((mask == 0)[:, :, None, None], 0)
    before = _activation_grad(kept, output.detach(), activation)
    x = input.to(accumulate)
    if training:  # recomputed, so that a second backward sees how the statistics depend on the input
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    rstd = (var + eps).rsqrt()[None, :, None, None]
    normalised = (x - mean[None, :, None, None]) * rstd
    grad_bias = before.sum((0, 2, 3))
    grad_weight = (before * normalised).sum((0, 2, 3))
    inner = before
    if training:
        size = x.numel() // max(x.shape[1], 1)
        inner = before - (grad_bias[:, None, None] + normalised * grad_weight[:, None, None]) / size
    grad_input = weight.to(accumulate)[:, None, None] * rstd * inner
    grad_residual = like_input(before.to(input.dtype, copy=True), input) if residual else input.new_empty(0)
    return like_input(grad_input.to(input.dtype), input), grad_weight, grad_bias, grad_residual


def _gated_norm_act_backward_fake(
    grad: Tensor, output: Tensor, input: Tensor, weight: Tensor, mean: Tensor, var: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input = torch.empty_like(input, memory_format=memory_format(input))
    statistic = input.new_empty(weight.shape, dtype=_accumulation_dtype(input))
    _, _, _, residual, _ = rest
    grad_residual = torch.empty_like(grad_input) if residual else input.new_empty(0)
    return grad_input, statistic, torch.empty_like(statistic), grad_residual


_gated_norm_act_backward = register(
    Operator(
        "gated_norm_act_backward(Tensor grad, Tensor output, Tensor input, Tensor weight, Tensor mean, Tensor var, "
        "Tensor? mask, str activation, bool training, bool residual, float eps) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
        family="gating",
        reference=_gated_norm_act_backward_reference,
        fake=_gated_norm_act_backward_fake,
        backward=through_reference(_gated_norm_act_backward_reference),
        triton=Kernel("cofire_kernels.gating:gated_norm_act_backward"),
        # two passes over grad, output and input, and one that writes
        bytes=lambda grad, output, input, *rest: 7 * input.numel() * input.element_size(),
    )
)


def _save_gated_norm_act(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, weight, bias, _, _, residual, mask, ctx.activation, ctx.training, ctx.eps = inputs
    ctx.bias_dtype, ctx.residual = bias.dtype, residual is not None
    y, peak, mean, var = output
    ctx.save_for_backward(y, input, weight, mean, var, mask)
    ctx.mark_non_differentiable(peak, mean, var)


def _gated_norm_act_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    y, input, weight, mean, var, mask = ctx.saved_tensors
    grad_input, grad_weight, grad_bias, grad_residual = _gated_norm_act_backward(
        grad, y, input, weight, mean, var, mask, ctx.activation, ctx.training, ctx.residual, ctx.eps
    )
    return (
        grad_input,
        grad_weight.to(weight.dtype),
        grad_bias.to(ctx.bias_dtype),
        None,
        None,
        grad_residual if ctx.residual else None,
        *(None,) * 4,
    )


_gated_norm_act = register(
    Operator(
        "gated_norm_act(Tensor input, Tensor weight, Tensor bias, Tensor? running_mean, Tensor? running_var, "
        "Tensor? residual, Tensor? mask, str activation, bool training, float eps) "
        "-> (Tensor output, Tensor peak, Tensor mean, Tensor var)",
        family="gating",
        validate=_validate_gated_norm_act,
        reference=_gated_norm_act_reference,
        fake=_gated_norm_act_fake,
        backward=Backward(_save_gated_norm_act, _gated_norm_act_grad, "gated_norm_act_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.gating:gated_norm_act"),
        # the input twice (statistics, then use), the output once, the residual once
        bytes=lambda input, w, b, m, v, residual, mask, act, training, eps: (
            (2 + bool(training) + (residual is not None)) * input.numel() * input.element_size()
        ),
    )
)


def gated_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "relu",
    training: bool = True,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm, residual, activation, gate and per-channel peak in one operator: the training epilogue of FTWT.

    ``u = act(batch_norm(input) + residual)``, ``output = u * mask``, ``peak = max |u|`` over each channel's pixels.
    Equivalent to ``F.batch_norm``, an activation, ``abs().amax((2, 3))`` and a multiplication; three passes over
    memory instead of about ten, and only ``input`` and ``output`` are kept for backward.

    Args:
        input: ``[N, C, H, W]``, contiguous or channels_last (kept).
        weight, bias: ``[C]``, a float type.
        running_mean, running_var: ``[C]``, used when ``training`` is False; they are not updated here.
        residual: shape and dtype of ``input``, added before the activation, or None.
        mask: ``[N, C]``, non-zero keeps, or None to keep all. It carries no gradient.
        activation: ``"identity"``, ``"relu"`` or ``"relu6"``.
        training: normalise by the statistics of this batch.
        eps: added to the variance.

    Returns:
        ``output`` like ``input``; ``peak`` ``[N, C]``, from the activation *before* the gate; ``mean`` and biased
        ``var`` ``[C]``, as used. The last three are fp32 (fp64 for fp64 input) and carry no gradient.

    Raises:
        ValueError: shapes that do not fit, no running statistics in evaluation, an unknown activation, a mask that
            requires grad. TypeError: an integer input, a residual of another dtype.

    Example:
        >>> y, peak, mean, var = gated_norm_act(torch.tensor([[[[1.0, 3.0]]]]), torch.ones(1), torch.zeros(1), eps=0.0)
        >>> y.tolist(), peak.tolist(), mean.tolist(), var.tolist()
        ([[[[0.0, 1.0]]]], [[1.0]], [2.0], [1.0])

    Source: FTWT, section 3; Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1.
    """
    output, peak, mean, var = _gated_norm_act(
        input, weight, bias, running_mean, running_var, residual, mask, activation, training, eps
    )
    return output, peak, mean, var


# ---------------------------------------------------------------------------------------------- gated_conv2d


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _validate_gated_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_index: Tensor,
    in_count: Tensor,
    out_index: Tensor,
    out_count: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    masked_input: bool,
    compact_input: bool,
    compact_output: int,
) -> None:
    op = "gated_conv2d"
    check_map(op, "input", input)
    check_float(op, input=input, weight=weight, bias=bias, residual=residual)
    if weight.dim() != 4:
        refuse(op, f"weight must have shape [out, in / groups, kh, kw], got {shape_of(weight)}")
    n, co = input.shape[0], weight.shape[0]
    check_integer(op, groups=groups, compact_output=compact_output)
    if groups < 1:
        refuse(op, f"groups must be at least 1, got {groups}")
    ci = weight.shape[1] * groups
    if co % groups != 0:
        refuse(op, f"groups must divide the {co} output channels, got {groups}")
    if compact_input:
        if input.shape[1] > ci:
            refuse(op, f"a compact input has at most {ci} channels (weight, groups), got {shape_of(input)}")
    else:
        if input.shape[1] != ci:
            refuse(op, f"input must have {ci} channels (weight, groups), got {shape_of(input)}")
    if bias is not None:
        if list(bias.shape) != [co]:
            refuse(op, f"bias must have shape [{co}], got {shape_of(bias)}")
    for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        least = 0 if name == "padding" else 1
        if not (len(value) == 2 and min(value) >= least):
            refuse(op, f"{name} must be two integers >= {least}, got {list(value)}")
    check_selection(op, "in", in_index, in_count, n, ci)
    check_selection(op, "out", out_index, out_count, n, co)
    check_choice(op, "activation", activation, ACTIVATIONS)
    size = _conv_output_size(input, weight, stride, padding, dilation)
    if min(size) < 1:
        refuse(op, f"the output would have no pixels ({size}) for input {shape_of(input)}, weight {shape_of(weight)}")
    if residual is not None:
        expected = [n, co, *size]
        if list(residual.shape) != expected:
            refuse(op, f"residual must have shape {expected}, got {shape_of(residual)}")
    if not (0 <= compact_output <= co):
        refuse(op, f"compact_output must be between 0 and the {co} channels, got {compact_output}")
    check_same(op, "input", input, weight=weight, bias=bias, residual=residual)
    check_device(op, "input", input, in_index=in_index, in_count=in_count, out_index=out_index, out_count=out_count)


def _conv_output_size(
    input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    return [_output_size(input.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1)]


def to_dense(x: Tensor, index: Tensor, count: Tensor, channels: int) -> Tensor:
    """From compact to dense: slot j of sample n becomes channel ``index[n, j]``, every other channel zero."""
    slots = x.shape[1]
    used = torch.arange(slots, device=x.device) < count[:, None]
    position = torch.where(used, index[:, :slots], channels).long()[:, :, None, None].expand_as(x)
    dense = x.new_zeros(x.shape[0], channels + 1, *x.shape[2:])
    return dense.scatter(1, position, x)[:, :channels]


def to_compact(x: Tensor, index: Tensor, count: Tensor, slots: int) -> Tensor:
    """From dense to compact, the inverse of :func:`to_dense`."""
    used = torch.arange(slots, device=x.device) < count[:, None]
    position = index[:, :slots].clamp(min=0).long()[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return x.gather(1, position).masked_fill(~used[:, :, None, None], 0)


def _refuse_bad_selection(operator: str, prefix: str, index: Tensor, count: Tensor) -> None:
    """What tracing cannot see; on a CPU only, because elsewhere it would synchronise."""
    if index.device.type != "cpu":
        return
    channels = index.shape[1]
    outside = (count < 0) | (count > channels)
    if outside.any():
        n = int(outside.nonzero()[0])
        refuse(operator, f"{prefix}_count must be between 0 and {channels}, got {int(count[n])} for sample {n}")
    before = F.pad(index, (1, 0), value=-1)[:, :-1]
    used = torch.arange(channels) < count[:, None]
    wrong = used & ((index <= before) | (index >= channels))
    if wrong.any():
        n, slot = wrong.nonzero()[0].tolist()
        place = f"got {int(index[n, slot])} at slot {slot} of sample {n}"
        refuse(operator, f"{prefix}_index must hold ascending channels below {channels}, {place}")


def _masked_input(input: Tensor, index: Tensor, count: Tensor, channels: int, compact_input: bool) -> Tensor:
    if compact_input:
        return to_dense(input, index, count, channels)
    return input.masked_fill(~mask_from_index(index, count, channels)[:, :, None, None], 0)


def _gated_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_index: Tensor,
    in_count: Tensor,
    out_index: Tensor,
    out_count: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    masked_input: bool,
    compact_input: bool,
    compact_output: int,
) -> Tensor:
    op = "gated_conv2d"
    _refuse_bad_selection(op, "in", in_index, in_count)
    _refuse_bad_selection(op, "out", out_index, out_count)
    if input.device.type == "cpu" and input.shape[0]:
        most = int(in_count.max())
        if compact_input and most > input.shape[1]:
            refuse(op, f"a compact input must hold every sample's channels ({most}), got {shape_of(input)}")
        most = int(out_count.max())
        if compact_output and most > compact_output:
            refuse(op, f"compact_output must hold every sample's channels ({most}), got {compact_output}")
    x = _masked_input(input, in_index, in_count, weight.shape[1] * groups, compact_input)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y + residual
    y = _activate(y, activation)
    if compact_output:
        y = to_compact(y, out_index, out_count, compact_output)
    else:
        y = y.masked_fill(~mask_from_index(out_index, out_count, weight.shape[0])[:, :, None, None], 0)
    return like_input(y, input)


def _gated_conv2d_fake(
    input: Tensor, weight: Tensor, bias: Any, residual: Any, i: Any, ic: Any, o: Any, oc: Any, *options: Any
) -> Tensor:
    stride, padding, dilation, _, _, _, _, compact_output = options
    channels = compact_output or weight.shape[0]
    shape = (input.shape[0], channels, *_conv_output_size(input, weight, stride, padding, dilation))
    return input.new_empty(shape).contiguous(memory_format=memory_format(input))


def _gated_conv2d_backward_reference(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    in_index: Tensor,
    in_count: Tensor,
    out_index: Tensor,
    out_count: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    compact_input: bool,
    compact_output: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    co, ci = weight.shape[0], weight.shape[1] * groups
    before = _activation_grad(grad, output.detach(), activation)
    if compact_output:
        before = to_dense(before, out_index, out_count, co)
    else:
        before = before.masked_fill(~mask_from_index(out_index, out_count, co)[:, :, None, None], 0)
    x = _masked_input(input, in_index, in_count, ci, compact_input)
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        before, x, weight, [co], stride, padding, dilation, False, [0, 0], groups, [True, True, True]
    )
    if compact_input:
        grad_input = to_compact(grad_input, in_index, in_count, input.shape[1])
    else:
        grad_input = grad_input.masked_fill(~mask_from_index(in_index, in_count, ci)[:, :, None, None], 0)
    # the gradient of the residual, which is dense
    return like_input(grad_input, input), grad_weight.contiguous(), grad_bias, before.contiguous()


_gated_conv2d_backward = register(
    Operator(
        "gated_conv2d_backward(Tensor grad, Tensor output, Tensor input, Tensor weight, Tensor in_index, "
        "Tensor in_count, Tensor out_index, Tensor out_count, int[2] stride, int[2] padding, int[2] dilation, "
        "int groups, str activation, bool compact_input, int compact_output) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
        family="gating",
        reference=_gated_conv2d_backward_reference,
        fake=lambda grad, output, input, weight, *rest: (
            torch.empty_like(input, memory_format=memory_format(input)),
            weight.new_empty(weight.shape),
            weight.new_empty(weight.shape[:1]),
            grad.new_empty((grad.shape[0], weight.shape[0], *grad.shape[2:])),
        ),
        backward=through_reference(_gated_conv2d_backward_reference),
        cpu="the library's convolution on masked tensors",
        triton="the library's convolution on masked tensors",
    )
)


def _save_gated_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, weight, bias, residual, *selection = inputs[:8]
    stride, padding, dilation, groups, activation, _, compact_input, compact_output = inputs[8:]
    ctx.save_for_backward(output, input, weight, *selection)
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.options = (stride, padding, dilation, groups, activation, compact_input, compact_output)


def _gated_conv2d_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    output, input, weight, *selection = ctx.saved_tensors
    grad_input, grad_weight, grad_bias, grad_residual = _gated_conv2d_backward(
        grad, output, input, weight, *selection, *ctx.options
    )
    bias = grad_bias if ctx.has_bias else None
    return grad_input, grad_weight, bias, grad_residual if ctx.has_residual else None, *(None,) * 12


def _gated_conv2d_flops(*args: Any) -> int:
    """Dense upper bound: the true count depends on the masks, which are data."""
    input, weight, stride, padding, dilation = args[0], args[1], *args[8:11]
    out = math.prod(_conv_output_size(input, weight, stride, padding, dilation))
    total: int = 2 * input.shape[0] * out * weight.numel()
    return total


def _gated_conv2d_bytes(*args: Any) -> int:
    """What the masks leave: the union of the used weight rows, the used input and output channels."""
    input, weight, _, residual, in_index, in_count, out_index, out_count = args[:8]
    out = math.prod(_conv_output_size(input, weight, *args[8:11]))
    rows = int(mask_from_index(out_index, out_count, weight.shape[0]).any(0).sum())
    columns = int(mask_from_index(in_index, in_count, in_index.shape[1]).any(0).sum())
    weights = rows * columns * weight[0, 0].numel() // args[11]
    maps = int(in_count.sum()) * input[0, 0].numel() + int(out_count.sum()) * out * (1 + (residual is not None))
    total: int = (weights + maps) * input.element_size()
    return total


_gated_conv2d = register(
    Operator(
        "gated_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor in_index, Tensor in_count, "
        "Tensor out_index, Tensor out_count, int[2] stride, int[2] padding, int[2] dilation, int groups, "
        "str activation, bool masked_input, bool compact_input, int compact_output) -> Tensor",
        family="gating",
        validate=_validate_gated_conv2d,
        reference=_gated_conv2d_reference,
        fake=_gated_conv2d_fake,
        backward=Backward(_save_gated_conv2d, _gated_conv2d_grad, "gated_conv2d_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.gating:gated_conv2d"),
        autocast="lower",
        flops=_gated_conv2d_flops,
        bytes=_gated_conv2d_bytes,
    )
)


def gated_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor,
    in_count: Tensor,
    out_index: Tensor,
    out_count: Tensor,
    *,
    residual: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "identity",
    masked_input: bool = False,
    compact_input: bool = False,
    compact_output: int = 0,
) -> Tensor:
    """Convolution that computes, for each sample, only its active output channels from its active input channels.

    Equivalent to ``act(F.conv2d(input * in_mask, weight, bias, ...) + residual) * out_mask``, without the arithmetic
    that the masks make void. Where the library's dense convolution is faster, by a measured rule, it is used:
    ``cofire.explain("gated_conv2d", ...)`` says which.

    Args:
        input: ``[N, Ci, H, W]``, contiguous or channels_last (kept).
        weight: ``[Co, Ci / groups, kh, kw]``, batch norm already folded into it.
        bias: ``[Co]`` or None.
        in_index, in_count: int32 ``[N, Ci]`` and ``[N]``: the input channels that count, as :func:`cofire.ops.compact`
            gives them; the others are taken as zero.
        out_index, out_count: int32 ``[N, Co]`` and ``[N]``: the output channels to compute; the others are exactly
            zero.
        residual: ``[N, Co, Ho, Wo]``, added before the activation, or None.
        stride, padding, dilation: pixels, one integer or (vertical, horizontal). groups: as in ``F.conv2d``.
        activation: ``"identity"``, ``"relu"`` or ``"relu6"``.
        masked_input: promise that the channels outside ``in_index`` hold zeros, so that a dense path need not clear
            them.
        compact_input: ``input`` is ``[N, K, H, W]``, and slot j of sample n is channel ``in_index[n, j]``.
        compact_output: if K > 0, return ``[N, K, Ho, Wo]`` with channel ``out_index[n, j]`` in slot j and zeros after
            the last.

    Returns:
        ``[N, Co, Ho, Wo]``, or compact. Gradients of input, weight, bias and residual are those of the equivalent
        expression.

    Raises:
        ValueError: shapes, groups or options that do not fit; more active channels than ``compact_output`` or a
            compact ``input`` holds; on a CPU, indices that are not ascending or a count out of range.
        TypeError: an integer input, mixed dtypes, indices that are not int32.

    Example:
        >>> from cofire.ops import compact
        >>> both, second = compact(torch.tensor([[True, True]])), compact(torch.tensor([[False, True]]))
        >>> gated_conv2d(torch.ones(1, 2, 1, 1), torch.ones(2, 2, 1, 1), None, *both, *second).flatten().tolist()
        [0.0, 2.0]

    Source: FTWT, section 3 (dynamic inference).
    """
    result: Tensor = _gated_conv2d(
        input,
        weight,
        bias,
        residual,
        in_index,
        in_count,
        out_index,
        out_count,
        check_pair("gated_conv2d", "stride", stride),
        check_pair("gated_conv2d", "padding", padding),
        check_pair("gated_conv2d", "dilation", dilation),
        groups,
        activation,
        masked_input,
        compact_input,
        compact_output,
    )
    return result


# ---------------------------------------------------------------------------------------------- gated_linear


def _validate_gated_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor,
    in_count: Tensor,
    out_index: Tensor,
    out_count: Tensor,
    activation: str,
) -> None:
    op = "gated_linear"
    if input.dim() != 2:
        refuse(op, f"input must have shape [N, in_features], got {shape_of(input)}")
    check_float(op, input=input, weight=weight, bias=bias)
    if not (weight.dim() == 2 and weight.shape[1] == input.shape[1]):
        refuse(op, f"weight must have shape [out_features, {input.shape[1]}], got {shape_of(weight)}")
    if bias is not None:
        if list(bias.shape) != [weight.shape[0]]:
            refuse(op, f"bias must have shape [{weight.shape[0]}], got {shape_of(bias)}")
    check_selection(op, "in", in_index, in_count, *input.shape)
    check_selection(op, "out", out_index, out_count, input.shape[0], weight.shape[0])
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_same(op, "input", input, weight=weight, bias=bias)
    check_device(op, "input", input, in_index=in_index, in_count=in_count, out_index=out_index, out_count=out_count)


def _gated_linear_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor,
    in_count: Tensor,
    out_index: Tensor,
    out_count: Tensor,
    activation: str,
) -> Tensor:
    _refuse_bad_selection("gated_linear", "in", in_index, in_count)
    _refuse_bad_selection("gated_linear", "out", out_index, out_count)
    x = input.masked_fill(~mask_from_index(in_index, in_count, input.shape[1]), 0)
    y = _activate(F.linear(x, weight, bias), activation)
    return y.masked_fill(~mask_from_index(out_index, out_count, weight.shape[0]), 0)


def _gated_linear_backward_reference(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    in_index: Tensor,
    in_count: Tensor,
    out_index: Tensor,
    out_count: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    in_mask = mask_from_index(in_index, in_count, input.shape[1])
    before = _activation_grad(grad, output.detach(), activation)
    before = before.masked_fill(~mask_from_index(out_index, out_count, weight.shape[0]), 0)
    grad_input = (before @ weight).masked_fill(~in_mask, 0)
    return grad_input, before.t() @ input.masked_fill(~in_mask, 0), before.sum(0)


_gated_linear_backward = register(
    Operator(
        "gated_linear_backward(Tensor grad, Tensor output, Tensor input, Tensor weight, Tensor in_index, "
        "Tensor in_count, Tensor out_index, Tensor out_count, str activation) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
        family="gating",
        reference=_gated_linear_backward_reference,
        fake=lambda grad, output, input, weight, *rest: (
            input.new_empty(input.shape),
            weight.new_empty(weight.shape),
            weight.new_empty(weight.shape[:1]),
        ),
        backward=through_reference(_gated_linear_backward_reference),
        cpu="the library's GEMM on masked tensors",
        triton="the library's GEMM on masked tensors",
    )
)


def _save_gated_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, weight, bias, *selection, ctx.activation = inputs
    ctx.save_for_backward(output, input, weight, *selection)
    ctx.has_bias = bias is not None


def _gated_linear_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_input, grad_weight, grad_bias = _gated_linear_backward(grad, *ctx.saved_tensors, ctx.activation)
    return grad_input, grad_weight, grad_bias if ctx.has_bias else None, *(None,) * 5


def _gated_linear_bytes(*args: Any) -> int:
    input, weight, _, in_index, in_count, out_index, out_count = args[:7]
    rows = int(mask_from_index(out_index, out_count, weight.shape[0]).any(0).sum())
    columns = int(mask_from_index(in_index, in_count, weight.shape[1]).any(0).sum())
    total: int = (rows * columns + int(in_count.sum()) + int(out_count.sum())) * input.element_size()
    return total


_gated_linear = register(
    Operator(
        "gated_linear(Tensor input, Tensor weight, Tensor? bias, Tensor in_index, Tensor in_count, Tensor out_index, "
        "Tensor out_count, str activation) -> Tensor",
        family="gating",
        validate=_validate_gated_linear,
        reference=_gated_linear_reference,
        fake=lambda input, weight, *rest: input.new_empty((input.shape[0], weight.shape[0])),
        backward=Backward(_save_gated_linear, _gated_linear_grad, "gated_linear_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.gating:gated_linear"),
        autocast="lower",
        flops=lambda input, weight, *rest: 2 * input.shape[0] * weight.numel(),
        bytes=_gated_linear_bytes,
    )
)


def gated_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor,
    in_count: Tensor,
    out_index: Tensor,
    out_count: Tensor,
    *,
    activation: str = "identity",
) -> Tensor:
    """Linear layer that computes, for each sample, only its active outputs from its active inputs.

    Equivalent to ``act(F.linear(input * in_mask, weight, bias)) * out_mask``. The storage of ``weight`` decides what
    skipping saves: row-major, a skipped output saves a row of bytes; column-major (``storage.t()`` of an ``[in, out]``
    tensor), a skipped input does.

    Args:
        input: ``[N, in_features]``.
        weight: ``[out_features, in_features]``, any strides.
        bias: ``[out_features]`` or None.
        in_index, in_count, out_index, out_count: int32, as :func:`cofire.ops.compact` gives them.
        activation: ``"identity"``, ``"relu"`` or ``"relu6"``.

    Returns:
        ``[N, out_features]``, exactly zero outside ``out_index``.

    Raises:
        ValueError: shapes that do not fit, an unknown activation; on a CPU, indices that are not ascending or a count
            out of range.
        TypeError: an integer input, mixed dtypes, indices that are not int32.

    Example:
        >>> from cofire.ops import compact
        >>> first, both = compact(torch.tensor([[True, False]])), compact(torch.tensor([[True, True]]))
        >>> gated_linear(torch.ones(1, 2), torch.tensor([[1.0, 5.0], [2.0, 5.0]]), None, *first, *both).tolist()
        [[1.0, 2.0]]

    Source: FTWT, section 3, applied to linear layers.
    """
    result: Tensor = _gated_linear(input, weight, bias, in_index, in_count, out_index, out_count, activation)
    return result
