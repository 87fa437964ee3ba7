# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Global pooling of each channel and its support, in one read of the map; contiguous and channels_last natively."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.layout import in_format, is_channels_last, plane_strides
from cofire_kernels.numerics import maximum, row_max
from cofire_kernels.selection import compact


@triton.jit
def channel_pool_forward_kernel(
    x_ptr,
    pooled_ptr,
    support_ptr,
    channels,
    pixels,
    size,
    stride_xn,
    stride_xc,
    stride_xp,
    MODE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ptr = x_ptr + sample * stride_xn + channel[:, None] * stride_xc
    alive = channel < channels

    pooled = tl.full([BLOCK_C, BLOCK_P], float("-inf") if MODE == "max" else 0.0, tl.float32)
    support = tl.zeros([BLOCK_C, BLOCK_P], tl.int32)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = alive[:, None] & (pixel < pixels)[None, :]
        x = tl.load(row_ptr + pixel.to(tl.int64)[None, :] * stride_xp, mask=inside, other=0).to(tl.float32)
        support |= (x != 0).to(tl.int32)
        if MODE == "max":
            pooled = maximum(pooled, tl.where(inside, x, float("-inf")))
        else:
            pooled += x

    result = row_max(pooled) if MODE == "max" else tl.div_rn(tl.sum(pooled, 1), size)
    out = sample * channels + channel
    tl.store(pooled_ptr + out, result.to(pooled_ptr.dtype.element_ty), mask=alive)
    tl.store(support_ptr + out, (tl.max(support, 1) > 0), mask=alive)


def channel_pool(input: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = input.shape
    last = is_channels_last(input)
    x = in_format(input, last)
    pooled = torch.empty((n, c), dtype=x.dtype, device=x.device)
    support = torch.empty((n, c), dtype=torch.bool, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            tile = configs.tile("channel_pool_channels_last" if last else "channel_pool", x.device, pixels=h * w)
            grid = (n, triton.cdiv(c, tile["BLOCK_C"]))
            channel_pool_forward_kernel[grid](
                x, pooled, support, c, h * w, float(h * w), *plane_strides(c, h * w, last), MODE=mode, **tile
            )
    return pooled, *compact(support)


@triton.jit
def channel_pool_backward_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    channels,
    pixels,
    size,
    stride_xn,
    stride_xc,
    stride_xp,
    MODE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ptr = x_ptr + sample * stride_xn + channel[:, None] * stride_xc
    alive = channel < channels
    grad = tl.load(grad_ptr + sample * channels + channel, mask=alive, other=0).to(tl.float32)

    if MODE == "max":  # each lane remembers the first of its maxima, the lowest pixel among the lanes wins
        best = tl.full([BLOCK_C, BLOCK_P], float("-inf"), tl.float32)
        position = tl.zeros([BLOCK_C, BLOCK_P], tl.int32) + tl.arange(0, BLOCK_P)[None, :]
        for start in range(0, pixels, BLOCK_P):
            pixel = start + tl.arange(0, BLOCK_P)
            inside = alive[:, None] & (pixel < pixels)[None, :]
            offset = pixel.to(tl.int64)[None, :] * stride_xp
            x = tl.load(row_ptr + offset, mask=inside, other=float("-inf")).to(tl.float32)
            higher = (x > best) | ((x != x) & (best == best))  # as in torch, a NaN is higher than all
            position = tl.where(higher, pixel[None, :], position)
            best = tl.where(higher, x, best)
        is_nan = best != best
        is_best = best == tl.max(tl.where(is_nan, float("-inf"), best), 1)[:, None]
        is_best = tl.where(tl.max(is_nan.to(tl.int32), 1)[:, None] > 0, is_nan, is_best)
        first = tl.min(tl.where(is_best, position, 0x7FFFFFFF), 1)
    else:
        grad = tl.div_rn(grad, size)

    out_ptr = grad_x_ptr + (sample * channels + channel)[:, None] * pixels
    for start in range(0, pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = alive[:, None] & (pixel < pixels)[None, :]
        value = tl.zeros([BLOCK_C, BLOCK_P], tl.float32) + grad[:, None]
        if MODE == "max":
            value = tl.where(pixel[None, :] == first[:, None], value, 0.0)
        tl.store(out_ptr + pixel[None, :], value.to(grad_x_ptr.dtype.element_ty), mask=inside)


def channel_pool_backward(grad: Tensor, input: Tensor, mode: str) -> Tensor:
    n, c, h, w = input.shape
    last = is_channels_last(input)
    x = in_format(input, last)
    grad_input = torch.empty((n, c, h, w), dtype=x.dtype, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            # written in rows of pixels for either format of the input: tile for those
            tile = configs.tile("channel_pool", x.device, pixels=h * w)
            grid = (n, triton.cdiv(c, tile["BLOCK_C"]))
            strides = plane_strides(c, h * w, last)
            channel_pool_backward_kernel[grid](
                grad.contiguous(), x, grad_input, c, h * w, float(h * w), *strides, MODE=mode, **tile
            )
    return in_format(grad_input, last)
