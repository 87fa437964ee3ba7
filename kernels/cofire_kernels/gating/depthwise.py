# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""gated_conv2d with one input channel per output channel: bound by memory, so it reads only what is active."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.layout import empty_map, in_format, is_channels_last, output_size, plane_strides
from cofire_kernels.numerics import activate
from cofire_kernels.selection.positions import positions


@triton.jit
def gated_conv2d_depthwise_forward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    in_slot_ptr,
    out_index_ptr,
    out_slot_ptr,
    in_channels,
    out_channels,
    out_slots,
    multiplier,
    height,
    width,
    out_width,
    out_pixels,
    taps,
    kernel_width,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_rn,
    stride_rc,
    stride_rp,
    stride_yn,
    stride_yc,
    stride_yp,
    ACTIVATION: tl.constexpr,
    COMPACT_INPUT: tl.constexpr,
    COMPACT_OUTPUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pixel_blocks = tl.cdiv(out_pixels, BLOCK_P)
    pixel = tl.program_id(0) % pixel_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    sample = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = slot < out_slots
    if COMPACT_OUTPUT:
        channel = tl.load(out_index_ptr + sample * out_channels + slot, mask=inside, other=-1)
        active = channel >= 0
    else:
        channel = slot
        active = tl.load(out_slot_ptr + sample * out_channels + slot, mask=inside, other=-1) >= 0
    source = channel // multiplier
    live = active
    if in_slot_ptr is not None:
        in_slot = tl.load(in_slot_ptr + sample * in_channels + source, mask=active, other=-1)
        live = in_slot >= 0
        if COMPACT_INPUT:
            source = in_slot

    in_image = pixel < out_pixels
    top = pixel // out_width * step_h - pad_h
    left = pixel % out_width * step_w - pad_w
    x_ptr += sample * stride_xn + source.to(tl.int64)[:, None] * stride_xc
    acc = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for tap in range(0, taps):
        h = top + tap // kernel_width * dilation_h
        w = left + tap % kernel_width * dilation_w
        in_window = in_image & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        offset = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
        x = tl.load(x_ptr + offset[None, :], mask=live[:, None] & in_window[None, :], other=0).to(tl.float32)
        weight = tl.load(w_ptr + channel.to(tl.int64) * taps + tap, mask=active, other=0).to(tl.float32)
        acc += x * weight[:, None]

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=active, other=0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        r_ptr = residual_ptr + sample * stride_rn + channel.to(tl.int64)[:, None] * stride_rc
        r_ptr += pixel.to(tl.int64)[None, :] * stride_rp
        acc += tl.load(r_ptr, mask=active[:, None] & in_image[None, :], other=0).to(tl.float32)
    acc = tl.where(active[:, None], activate(acc, ACTIVATION), 0.0)
    out_ptr = y_ptr + sample * stride_yn + slot.to(tl.int64)[:, None] * stride_yc
    out_ptr += pixel.to(tl.int64)[None, :] * stride_yp
    tl.store(out_ptr, acc.to(y_ptr.dtype.element_ty), mask=inside[:, None] & in_image[None, :])


def depthwise(
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
    activation: str,
    masked_input: bool,
    compact_input: bool,
    compact_output: int,
) -> Tensor:
    n, _, height, width = input.shape
    out_channels, _, kernel_height, kernel_width = weight.shape
    in_channels = in_index.shape[1]
    out_height, out_width = output_size(input, weight, stride, padding, dilation)
    pixels = out_height * out_width
    slots = compact_output or out_channels
    last = is_channels_last(input)
    y = empty_map(input, (n, slots, out_height, out_width), last)
    if y.numel() == 0:
        return y
    name = "gated_conv2d_depthwise_channels_last" if last else "gated_conv2d_depthwise"
    tile = configs.tile(name, input.device, pixels=pixels)
    grid = (n * triton.cdiv(pixels, tile["BLOCK_P"]), triton.cdiv(slots, tile["BLOCK_C"]))
    with torch.cuda.device_of(input):
        gated_conv2d_depthwise_forward_kernel[grid](
            input,
            weight.contiguous(),
            bias,
            None if residual is None else in_format(residual, last),
            y,
            None if masked_input and not compact_input else positions(in_index, in_count),
            out_index if compact_output else None,
            None if compact_output else positions(out_index, out_count),
            in_channels,
            out_channels,
            slots,
            out_channels // in_channels,
            height,
            width,
            out_width,
            pixels,
            kernel_height * kernel_width,
            kernel_width,
            *stride,
            *padding,
            *dilation,
            *input.stride(),
            *plane_strides(out_channels, pixels, last),
            *plane_strides(slots, pixels, last),
            ACTIVATION=activation,
            COMPACT_INPUT=compact_input,
            COMPACT_OUTPUT=compact_output > 0,
            **tile,
        )
    return y
