# SPDX-License-Identifier: Apache-2.0
"""Memory formats of feature maps: ``[N, C, H, W]`` in rows of pixels, or channels_last."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """True where a kernel should keep channels_last; a tensor that is both formats counts as contiguous."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` itself where it has the format already, else a copy."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def empty_map(like: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """An uninitialised map with the dtype and device of ``like``; one that is both formats has contiguous strides."""
    distinct = shape[1] > 1 and shape[2] * shape[3] > 1
    memory_format = torch.channels_last if channels_last and distinct else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def plane_strides(channels: int, pixels: int, channels_last: bool) -> tuple[int, int, int]:
    """Strides of sample, channel and pixel. From the sizes: torch reports arbitrary strides for sizes of one."""
    return (channels * pixels, 1, channels) if channels_last else (channels * pixels, pixels, 1)


def output_size(input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    """Height and width of a convolution's result."""
    return [
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
