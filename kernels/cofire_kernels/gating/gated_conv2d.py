# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Convolution that computes only the active output channels of each sample, as an implicit GEMM.

One program computes BLOCK_M active output channels of one sample at BLOCK_N pixels; programs beyond the sample's number
of active channels end at once. On the reduction side whole blocks of BLOCK_K input channels are left out when the
sample uses none of them; a compact input leaves out single channels, by gathering columns of the weight. The input is
read by its strides, whatever its memory format, and the result has the input's.

Weights are read as [out, kh, kw, in]. That is how a channels_last weight lies in memory; any other is copied first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.gating.depthwise import depthwise
from cofire_kernels.layout import empty_map, in_format, is_channels_last, output_size, plane_strides
from cofire_kernels.numerics import activate, dot
from cofire_kernels.selection.positions import positions


@triton.jit
def gated_conv2d_blocks_kernel(
    index_ptr, count_ptr, blocks_ptr, number_ptr, channels, blocks, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The blocks of BLOCK_K channels that hold an active one: each is found at its first active channel."""
    sample = tl.program_id(0).to(tl.int64)
    index_ptr += sample * channels
    count = tl.load(count_ptr + sample)
    found = tl.sum(tl.zeros([BLOCK_C], tl.int32), 0)
    for start in range(0, count, BLOCK_C):
        slot = start + tl.arange(0, BLOCK_C)
        used = slot < count
        block = tl.load(index_ptr + slot, mask=used, other=0) // BLOCK_K
        previous = tl.load(index_ptr + slot - 1, mask=used & (slot > 0), other=0) // BLOCK_K
        new = (used & ((block != previous) | (slot == 0))).to(tl.int32)
        tl.store(blocks_ptr + sample * blocks + found + tl.cumsum(new, 0) - new, block, mask=new > 0)
        found += tl.sum(new, 0)
    tl.store(number_ptr + sample, found)


@triton.jit
def gated_conv2d_forward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    in_index_ptr,
    in_count_ptr,
    in_slot_ptr,
    blocks_ptr,
    out_index_ptr,
    out_count_ptr,
    in_channels,
    out_channels,
    out_slots,
    in_blocks,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pixel_blocks = tl.cdiv(out_pixels, BLOCK_N)
    slot_blocks = tl.cdiv(out_slots, BLOCK_M)
    program = tl.program_id(0)
    pixel = (program % pixel_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_slot = (program // pixel_blocks) % slot_blocks * BLOCK_M
    sample = (program // pixel_blocks // slot_blocks).to(tl.int64)
    count = tl.load(out_count_ptr + sample)
    if not COMPACT_OUTPUT:  # the result holds zeros already
        if first_slot >= count:
            return

    slot = first_slot + tl.arange(0, BLOCK_M)
    active = (slot < count) & (slot < out_slots)
    row = tl.load(out_index_ptr + sample * out_channels + slot, mask=active, other=0).to(tl.int64)
    in_image = pixel < out_pixels
    top = pixel // out_width * step_h - pad_h
    left = pixel % out_width * step_w - pad_w
    x_ptr += sample * stride_xn
    w_ptr += row[:, None] * taps * in_channels
    lane = tl.arange(0, BLOCK_K)
    in_count = tl.load(in_count_ptr + sample)  # of blocks, or of slots where the input is compact

    steps = (tl.cdiv(in_count, BLOCK_K) if COMPACT_INPUT else in_count) * taps
    steps = tl.where(first_slot < count, steps, 0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, steps):  # the taps of one channel block follow each other: they share its cache lines
        tap = step % taps
        if COMPACT_INPUT:
            channel = step // taps * BLOCK_K + lane
            live = channel < in_count
            column = tl.load(in_index_ptr + sample * in_channels + channel, mask=live, other=0)
        else:
            channel = tl.load(blocks_ptr + sample * in_blocks + step // taps) * BLOCK_K + lane
            live = channel < in_channels
            column = channel
            if in_slot_ptr is not None:
                live = tl.load(in_slot_ptr + sample * in_channels + channel, mask=live, other=-1) >= 0
        h = top + tap // kernel_width * dilation_h
        w = left + tap % kernel_width * dilation_w
        inside = in_image & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        a = tl.load(w_ptr + (tap * in_channels + column)[None, :], mask=active[:, None] & live[None, :], other=0)
        offset = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
        b_ptr = x_ptr + channel.to(tl.int64)[:, None] * stride_xc + offset[None, :]
        b = tl.load(b_ptr, mask=live[:, None] & inside[None, :], other=0)
        acc = dot(a, b, acc)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row, mask=active, other=0).to(tl.float32)[:, None]
    written = active[:, None] & in_image[None, :]
    if residual_ptr is not None:
        r_ptr = residual_ptr + sample * stride_rn + row[:, None] * stride_rc + pixel.to(tl.int64)[None, :] * stride_rp
        acc += tl.load(r_ptr, mask=written, other=0).to(tl.float32)
    acc = activate(acc, ACTIVATION)
    if COMPACT_OUTPUT:
        acc = tl.where(active[:, None], acc, 0.0)
        row = slot.to(tl.int64)
        written = (slot < out_slots)[:, None] & in_image[None, :]
    out_ptr = y_ptr + sample * stride_yn + row[:, None] * stride_yc + pixel.to(tl.int64)[None, :] * stride_yp
    tl.store(out_ptr, acc.to(y_ptr.dtype.element_ty), mask=written)


def _by_library(weight: Tensor, groups: int) -> bool:
    """Groups of several channels: the library's convolution on masked tensors."""
    return groups > 1 and weight.shape[1] > 1


def gated_conv2d_plan(*args) -> str:
    """What :func:`gated_conv2d` does with these arguments."""
    weight, groups = args[1], args[11]
    if _by_library(weight, groups):
        return "library convolution on masked tensors: groups of several channels"
    return "depthwise kernel" if weight.shape[1] == 1 else "computes the active channels"


def gated_conv2d(
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
    if _by_library(weight, groups):
        options = (stride, padding, dilation, groups, activation, masked_input, compact_input, compact_output)
        selection = (in_index, in_count, out_index, out_count)
        reference = torch.ops.cofire.gated_conv2d.reference
        y: Tensor = reference(input, weight, bias, residual, *selection, *options)
        return y
    return (depthwise if weight.shape[1] == 1 else _implicit_gemm)(
        input,
        weight,
        None if bias is None else bias.contiguous(),
        residual,
        in_index.contiguous(),
        in_count.contiguous(),
        out_index.contiguous(),
        out_count.contiguous(),
        stride,
        padding,
        dilation,
        activation,
        masked_input,
        compact_input,
        compact_output,
    )


def _implicit_gemm(
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
    out_channels, in_channels, kernel_height, kernel_width = weight.shape
    out_height, out_width = output_size(input, weight, stride, padding, dilation)
    pixels = out_height * out_width
    slots = compact_output or out_channels
    last = is_channels_last(input)
    y = empty_map(input, (n, slots, out_height, out_width), last)
    if y.numel() == 0:
        return y
    if not compact_output:  # programs write active channels only
        y.zero_()
    tile = configs.tile(
        "gated_conv2d", input.device, pixels=pixels, out_channels=slots, element_size=input.element_size()
    )
    in_slot = blocks = None
    if not compact_input:
        in_slot = None if masked_input else positions(in_index, in_count)
        blocks, in_count = _active_blocks(in_index, in_count, tile["BLOCK_K"])
    programs = n * triton.cdiv(slots, tile["BLOCK_M"]) * triton.cdiv(pixels, tile["BLOCK_N"])
    with torch.cuda.device_of(input):
        gated_conv2d_forward_kernel[(programs,)](
            input,
            weight.permute(0, 2, 3, 1).contiguous(),
            bias,
            None if residual is None else in_format(residual, last),
            y,
            in_index if compact_input else None,
            in_count,
            in_slot,
            blocks,
            out_index,
            out_count,
            in_channels,
            out_channels,
            slots,
            0 if blocks is None else blocks.shape[1],
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


def _active_blocks(index: Tensor, count: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """For each sample the ascending blocks of channels that hold an active one, and their number."""
    n, channels = index.shape
    blocks = torch.empty((n, triton.cdiv(channels, block)), dtype=torch.int32, device=index.device)
    number = torch.empty((n,), dtype=torch.int32, device=index.device)
    with torch.cuda.device_of(index):
        tile = configs.tile("compact", index.device, columns=channels)
        gated_conv2d_blocks_kernel[(n,)](index, count, blocks, number, channels, blocks.shape[1], BLOCK_K=block, **tile)
    return blocks, number
