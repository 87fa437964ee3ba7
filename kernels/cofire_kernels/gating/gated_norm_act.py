# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Batch norm, residual, activation, gate and peak in three passes over memory; two passes and a write backward.

Contiguous and channels_last maps are read and written natively, by their strides. Sums over a channel are taken in two
stages, so that no float atomic makes them depend on the order of programs: each program of the first stage sums a fixed
share of the tiles in fp32 lanes, the second stage merges the shares in a fixed order in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.layout import empty_map, in_format, is_channels_last, plane_strides
from cofire_kernels.numerics import activate, activation_grad, maximum, row_max

PROGRAMS = 1024  # wanted in a first stage: several waves on any GPU; constant, so that sums are the same everywhere
MERGE = {"BLOCK_S": 32, "BLOCK_C": 32, "num_warps": 4}  # second stages: a few kilobytes


@triton.jit
def gated_norm_act_statistics_kernel(
    x_ptr,
    count_ptr,
    mean_ptr,
    square_ptr,
    channels,
    pixels,
    tasks,
    tasks_per_split,
    stride_xn,
    stride_xc,
    stride_xp,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Number, mean and sum of squared deviations of each channel over a run of tiles (sample, BLOCK_P pixels)."""
    split = tl.program_id(0)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_P)
    alive = (channel < channels)[:, None]
    x_ptr += channel[:, None] * stride_xc
    tiles = tl.cdiv(pixels, BLOCK_P)
    first = split * tasks_per_split
    last = tl.minimum(first + tasks_per_split, tasks)

    # Each lane sums deviations from a value that it has seen: without cancellation, and one subtraction instead of
    # Welford's division.
    offset = (first // tiles).to(tl.int64) * stride_xn + lane.to(tl.int64)[None, :] * stride_xp
    shift = tl.load(x_ptr + offset, mask=alive & (lane < pixels)[None, :], other=0).to(tl.float32)
    number = tl.zeros([BLOCK_P], tl.float32)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    square = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for task in range(first, last):
        pixel = (task % tiles) * BLOCK_P + lane
        inside = alive & (pixel < pixels)[None, :]
        offset = (task // tiles).to(tl.int64) * stride_xn + pixel.to(tl.int64)[None, :] * stride_xp
        x = tl.load(x_ptr + offset, mask=inside, other=0).to(tl.float32)
        deviation = tl.where(inside, x - shift, 0.0)
        number += (pixel < pixels).to(tl.float32)
        total += deviation
        square += deviation * deviation

    # Once per program, so fp64 costs nothing that shows, and the result is as good as the lanes.
    n = tl.sum(number, 0).to(tl.float64)
    of_lane = total.to(tl.float64) / tl.maximum(number, 1.0)[None, :]
    weight = number.to(tl.float64)[None, :]
    mean = tl.sum(weight * (shift + of_lane), 1) / n
    between = shift + of_lane - mean[:, None]
    within = square - total * of_lane
    out = split.to(tl.int64) * channels + channel
    tl.store(count_ptr + split, n)
    tl.store(mean_ptr + out, mean, mask=channel < channels)
    tl.store(square_ptr + out, tl.sum(within + weight * between * between, 1), mask=channel < channels)


@triton.jit
def gated_norm_act_merge_kernel(
    count_ptr,
    mean_ptr,
    square_ptr,
    out_mean_ptr,
    out_var_ptr,
    channels,
    splits,
    size,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance from those of the splits (Chan, Golub, LeVeque, 1983)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    alive = (channel < channels)[None, :]
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        n = tl.load(count_ptr + split, mask=split < splits, other=0)[:, None]
        offset = split.to(tl.int64)[:, None] * channels + channel[None, :]
        total += n * tl.load(mean_ptr + offset, mask=(split < splits)[:, None] & alive, other=0)
    mean = tl.sum(total, 0) / size

    square = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        n = tl.load(count_ptr + split, mask=split < splits, other=0)[:, None]
        offset = split.to(tl.int64)[:, None] * channels + channel[None, :]
        inside = (split < splits)[:, None] & alive
        between = tl.load(mean_ptr + offset, mask=inside, other=0) - mean[None, :]
        square += tl.load(square_ptr + offset, mask=inside, other=0) + n * between * between
    var = maximum((tl.sum(square, 0) / size).to(tl.float32), 0.0)
    tl.store(out_mean_ptr + channel, mean.to(tl.float32), mask=channel < channels)
    tl.store(out_var_ptr + channel, var, mask=channel < channels)


@triton.jit
def gated_norm_act_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    mask_ptr,
    y_ptr,
    peak_ptr,
    channels,
    pixels,
    eps,
    stride_xn,
    stride_xc,
    stride_xp,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    alive = channel < channels
    mean = tl.load(mean_ptr + channel, mask=alive, other=0)[:, None]
    rstd = (1.0 / tl.sqrt_rn(tl.load(var_ptr + channel, mask=alive, other=1) + eps))[:, None]
    weight = tl.load(weight_ptr + channel, mask=alive, other=0).to(tl.float32)[:, None]
    bias = tl.load(bias_ptr + channel, mask=alive, other=0).to(tl.float32)[:, None]
    keep = alive
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + sample * channels + channel, mask=alive, other=0) != 0

    row = sample * stride_xn + channel[:, None] * stride_xc
    peak = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = alive[:, None] & (pixel < pixels)[None, :]
        offset = row + pixel.to(tl.int64)[None, :] * stride_xp
        x = tl.load(x_ptr + offset, mask=inside, other=0).to(tl.float32)
        u = (x - mean) * rstd * weight + bias
        if residual_ptr is not None:
            u += tl.load(residual_ptr + offset, mask=inside, other=0).to(tl.float32)
        u = activate(u, ACTIVATION)
        peak = maximum(peak, tl.where(inside, tl.abs(u), 0.0))
        tl.store(y_ptr + offset, tl.where(keep[:, None], u, 0.0).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(peak_ptr + sample * channels + channel, row_max(peak), mask=alive)


def gated_norm_act(
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
    n, c, h, w = input.shape
    last = is_channels_last(input)
    x = in_format(input, last)
    strides = plane_strides(c, h * w, last)
    tile = configs.tile(_tile_name(last), x.device, pixels=h * w)
    with torch.cuda.device_of(x):
        if training:
            mean, var = _batch_statistics(x, n, c, h * w, strides, tile)
        else:
            assert running_mean is not None and running_var is not None
            mean, var = running_mean.to(torch.float32, copy=True), running_var.to(torch.float32, copy=True)
        y = empty_map(x, (n, c, h, w), last)
        peak = torch.empty((n, c), dtype=torch.float32, device=x.device)
        if x.numel() == 0:
            return y, peak.zero_(), mean, var
        gated_norm_act_forward_kernel[(n, triton.cdiv(c, tile["BLOCK_C"]))](
            x,
            weight.contiguous(),
            bias.contiguous(),
            mean,
            var,
            None if residual is None else in_format(residual, last),
            None if mask is None else mask.contiguous(),
            y,
            peak,
            c,
            h * w,
            float(eps),
            *strides,
            ACTIVATION=activation,
            **tile,
        )
    return y, peak, mean, var


def _tile_name(channels_last: bool) -> str:
    return "gated_norm_act_channels_last" if channels_last else "gated_norm_act"


def _splits(n: int, c: int, pixels: int, tile: dict[str, int]) -> tuple[int, int, int]:
    """The tiles of one channel block (sample, BLOCK_P pixels), how many a split takes, and the number of splits."""
    tasks = n * triton.cdiv(pixels, tile["BLOCK_P"])
    wanted = max(1, PROGRAMS // triton.cdiv(c, tile["BLOCK_C"]))
    per_split = triton.cdiv(tasks, wanted)
    return tasks, per_split, triton.cdiv(tasks, per_split)


def _batch_statistics(
    x: Tensor, n: int, c: int, pixels: int, strides: tuple[int, int, int], tile: dict[str, int]
) -> tuple[Tensor, Tensor]:
    mean, var = (torch.empty((c,), dtype=torch.float32, device=x.device) for _ in range(2))
    if c == 0:
        return mean, var
    tasks, per_split, splits = _splits(n, c, pixels, tile)
    number = torch.empty((splits,), dtype=torch.float64, device=x.device)
    partial = torch.empty((2, splits, c), dtype=torch.float64, device=x.device)
    gated_norm_act_statistics_kernel[(splits, triton.cdiv(c, tile["BLOCK_C"]))](
        x, number, partial[0], partial[1], c, pixels, tasks, per_split, *strides, **tile
    )
    gated_norm_act_merge_kernel[(triton.cdiv(c, MERGE["BLOCK_C"]),)](
        number, partial[0], partial[1], mean, var, c, splits, float(n * pixels), **MERGE
    )
    return mean, var


@triton.jit
def gated_norm_act_backward_sums_kernel(
    grad_ptr,
    y_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    mask_ptr,
    weight_sum_ptr,
    bias_sum_ptr,
    channels,
    pixels,
    tasks,
    tasks_per_split,
    eps,
    stride_xn,
    stride_xc,
    stride_xp,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sums of ``before * xhat`` and of ``before``, the gradient before the activation, over a run of tiles."""
    split = tl.program_id(0)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    alive = channel < channels
    mean = tl.load(mean_ptr + channel, mask=alive, other=0).to(tl.float32)[:, None]
    rstd = 1.0 / tl.sqrt_rn(tl.load(var_ptr + channel, mask=alive, other=1).to(tl.float32) + eps)
    tiles = tl.cdiv(pixels, BLOCK_P)
    first = split * tasks_per_split
    last = tl.minimum(first + tasks_per_split, tasks)

    weight_sum = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    bias_sum = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for task in range(first, last):
        sample = (task // tiles).to(tl.int64)
        pixel = (task % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        keep = alive
        if mask_ptr is not None:
            keep = tl.load(mask_ptr + sample * channels + channel, mask=alive, other=0) != 0
        inside = keep[:, None] & (pixel < pixels)[None, :]  # a gated channel adds nothing: do not read it
        offset = sample * stride_xn + channel[:, None] * stride_xc + pixel.to(tl.int64)[None, :] * stride_xp
        x = tl.load(x_ptr + offset, mask=inside, other=0).to(tl.float32)
        before = tl.load(grad_ptr + offset, mask=inside, other=0).to(tl.float32)
        if ACTIVATION != "identity":
            before = activation_grad(before, tl.load(y_ptr + offset, mask=inside, other=0).to(tl.float32), ACTIVATION)
        weight_sum += before * (x - mean)
        bias_sum += before
    out = split.to(tl.int64) * channels + channel
    tl.store(weight_sum_ptr + out, tl.sum(weight_sum.to(tl.float64), 1) * rstd, mask=alive)
    tl.store(bias_sum_ptr + out, tl.sum(bias_sum.to(tl.float64), 1), mask=alive)


@triton.jit
def gated_norm_act_backward_merge_kernel(
    weight_sum_ptr,
    bias_sum_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    channels,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight_sum = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    bias_sum = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        inside = (split < splits)[:, None] & (channel < channels)[None, :]
        offset = split.to(tl.int64)[:, None] * channels + channel[None, :]
        weight_sum += tl.load(weight_sum_ptr + offset, mask=inside, other=0)
        bias_sum += tl.load(bias_sum_ptr + offset, mask=inside, other=0)
    tl.store(grad_weight_ptr + channel, tl.sum(weight_sum, 0).to(tl.float32), mask=channel < channels)
    tl.store(grad_bias_ptr + channel, tl.sum(bias_sum, 0).to(tl.float32), mask=channel < channels)


@triton.jit
def gated_norm_act_backward_kernel(
    grad_ptr,
    y_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    mask_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    channels,
    pixels,
    size,
    eps,
    stride_xn,
    stride_xc,
    stride_xp,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    alive = channel < channels
    rstd = (1.0 / tl.sqrt_rn(tl.load(var_ptr + channel, mask=alive, other=1).to(tl.float32) + eps))[:, None]
    scale = tl.load(weight_ptr + channel, mask=alive, other=0).to(tl.float32)[:, None] * rstd
    if TRAINING:
        mean = tl.load(mean_ptr + channel, mask=alive, other=0).to(tl.float32)[:, None]
        weight_mean = tl.load(grad_weight_ptr + channel, mask=alive, other=0)[:, None] / size
        bias_mean = tl.load(grad_bias_ptr + channel, mask=alive, other=0)[:, None] / size
    keep = alive
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + sample * channels + channel, mask=alive, other=0) != 0

    row = sample * stride_xn + channel[:, None] * stride_xc
    for start in range(0, pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        in_plane = (pixel < pixels)[None, :]
        inside, live = alive[:, None] & in_plane, keep[:, None] & in_plane
        offset = row + pixel.to(tl.int64)[None, :] * stride_xp
        before = tl.load(grad_ptr + offset, mask=live, other=0).to(tl.float32)
        if ACTIVATION != "identity":
            before = activation_grad(before, tl.load(y_ptr + offset, mask=live, other=0).to(tl.float32), ACTIVATION)
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + offset, before.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if TRAINING:
            x = tl.load(x_ptr + offset, mask=inside, other=0).to(tl.float32)
            before = before - bias_mean - (x - mean) * rstd * weight_mean
        tl.store(grad_x_ptr + offset, (scale * before).to(grad_x_ptr.dtype.element_ty), mask=inside)


def gated_norm_act_backward(
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
    n, c, h, w = input.shape
    last = is_channels_last(input)
    x, y, grad = (in_format(t, last) for t in (input, output, grad))
    mean, var = mean.contiguous(), var.contiguous()
    mask = None if mask is None else mask.contiguous()
    strides = plane_strides(c, h * w, last)
    grad_input = empty_map(x, (n, c, h, w), last)
    grad_residual = empty_map(x, (n, c, h, w), last) if residual else input.new_empty(0)
    grad_weight, grad_bias = (torch.empty((c,), dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return grad_input, grad_weight.zero_(), grad_bias.zero_(), grad_residual

    tile = configs.tile(_tile_name(last), x.device, pixels=h * w)
    channel_blocks = triton.cdiv(c, tile["BLOCK_C"])
    tasks, per_split, splits = _splits(n, c, h * w, tile)
    partial = torch.empty((2, splits, c), dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        gated_norm_act_backward_sums_kernel[(splits, channel_blocks)](
            grad,
            y,
            x,
            mean,
            var,
            mask,
            partial[0],
            partial[1],
            c,
            h * w,
            tasks,
            per_split,
            float(eps),
            *strides,
            ACTIVATION=activation,
            **tile,
        )
        gated_norm_act_backward_merge_kernel[(triton.cdiv(c, MERGE["BLOCK_C"]),)](
            partial[0], partial[1], grad_weight, grad_bias, c, splits, **MERGE
        )
        gated_norm_act_backward_kernel[(n, channel_blocks)](
            grad,
            y,
            x,
            weight.contiguous(),
            mean,
            var,
            mask,
            grad_weight,
            grad_bias,
            grad_input,
            grad_residual if residual else None,
            c,
            h * w,
            float(n * h * w),
            float(eps),
            *strides,
            ACTIVATION=activation,
            TRAINING=training,
            **tile,
        )
    return grad_input, grad_weight, grad_bias, grad_residual
