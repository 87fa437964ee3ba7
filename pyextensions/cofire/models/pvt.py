# SPDX-License-Identifier: Apache-2.0
"""Small pyramid vision transformers: stages of fewer tokens and more features, keys and values of a reduced grid.

Source: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", Computational Visual Media 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ReducedAttention(nn.Module):
    """Self-attention whose keys and values come from a grid that a strided convolution has reduced.

    Projections ``q``, ``kv`` and ``proj``; ``num_heads`` is an attribute. ``sr`` and ``norm`` are None without reduction.
    """

    def __init__(self, width: int, heads: int, grid: int, reduction: int) -> None:
        super().__init__()
        self.num_heads, self.grid = heads, grid
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.sr = nn.Conv2d(width, width, reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(width) if reduction > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        source = x
        if self.sr is not None and self.norm is not None:
            grid = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            source = self.norm(self.sr(grid).flatten(2).transpose(1, 2))
        key, value = self.kv(source).chunk(2, 2)
        q, k, v = (p.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for p in (self.q(x), key, value))
        mixed = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return y


class PyramidBlock(nn.Module):
    """Attention, then two linear layers around a depthwise convolution, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int, grid: int, reduction: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm1 = nn.LayerNorm(width)
        self.attn = ReducedAttention(width, heads, grid, reduction)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y = self.up(self.norm2(x)).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        x = x + self.down(F.gelu(self.depthwise(y).flatten(2).transpose(1, 2)))
        return x


class Stage(nn.Module):
    """A convolution that makes tokens of overlapping patches, blocks, and a norm; a map in, a map out."""

    def __init__(
        self, channels: int, width: int, stride: int, depth: int, heads: int, hidden: int, grid: int, reduction: int
    ) -> None:
        super().__init__()
        self.grid = grid
        self.embed = nn.Conv2d(channels, width, 2 * stride - 1, stride, stride - 1)
        self.norm1 = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(PyramidBlock(width, heads, hidden, grid, reduction) for _ in range(depth)))
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm1(self.embed(x).flatten(2).transpose(1, 2))
        y: Tensor = self.norm2(self.blocks(tokens)).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return y


class PyramidTransformer(nn.Module):
    """Stages, the mean over the last map, and a linear layer."""

    def __init__(self, image: int, stages: Sequence[Stage], width: int, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(image)
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.pool(x)).mean((2, 3)))
        return logits


def pvt(
    image: int = 32,
    patch: int = 4,
    *,
    widths: Sequence[int] = (32, 64, 128),
    depths: Sequence[int] = (1, 1, 1),
    heads: Sequence[int] = (1, 2, 4),
    reductions: Sequence[int] = (4, 2, 1),
    ratio: int = 4,
    in_channels: int = 3,
    num_classes: int = 10,
) -> PyramidTransformer:
    """A pyramid vision transformer, by default of three stages of 8x8, 4x4 and 2x2 tokens for images of 32x32 pixels.

    Args:
        image: pixels a side; larger images are averaged down to it.
        patch: stride of the first stage; each later stage halves the grid.
        widths, depths, heads: of each stage.
        reductions: of the grid that keys and values come from, in each stage.
        ratio: width of the hidden layer in a block, in units of the stage's width.
        in_channels: channels of the images.
        num_classes: outputs of the last layer.

    Raises:
        ValueError: lists of different lengths, sizes that are not positive, or that do not divide.
    """
    if not len(widths) == len(depths) == len(heads) == len(reductions) > 0:
        raise ValueError("pvt: widths, depths, heads and reductions must have an entry for each stage")
    sizes = {"image": image, "patch": patch, "ratio": ratio}
    for name, values in (("widths", widths), ("depths", depths), ("heads", heads), ("reductions", reductions)):
        sizes |= {f"{name}[{i}]": value for i, value in enumerate(values)}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"pvt: {name} must be at least 1, got {size}")
    stages, channels, grid = [], in_channels, image
    for i, (width, depth, head, reduction) in enumerate(zip(widths, depths, heads, reductions, strict=True)):
        stride = 2 if i else patch
        if grid % stride or (grid // stride) % reduction:
            raise ValueError(f"pvt: stage {i} cannot divide {grid} pixels a side by {stride}, and then by {reduction}")
        if width % head:
            raise ValueError(f"pvt: widths must be multiples of heads, got {width} and {head} in stage {i}")
        grid //= stride
        stages.append(Stage(channels, width, stride, depth, head, ratio * width, grid, reduction))
        channels = width
    return PyramidTransformer(image, stages, channels, num_classes)
