# SPDX-License-Identifier: Apache-2.0
"""Fully connected networks of small images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Larger images are averaged to so many pixels a side, so that the first layer has one size for all data.
SIDE = 8


class MLP(nn.Module):
    """Linear layers with ReLU between them, over all the pixels at once."""

    def __init__(self, widths: Sequence[int], in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(SIDE)
        modules: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise([in_channels * SIDE**2, *widths]):
            modules += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(torch.flatten(self.pool(x), 1)))
        return logits


def digits_mlp(widths: Sequence[int] = (256, 256), *, in_channels: int = 1, num_classes: int = 10) -> MLP:
    """The layers 64-256-256-10 for digits of 8x8 pixels.

    Args:
        widths: of the hidden layers, at least one.
        in_channels: channels of the images.
        num_classes: outputs of the last layer.

    Raises:
        ValueError: no widths, or one that is not a positive integer.
    """
    if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        raise ValueError(f"digits_mlp: widths must be positive integers, got {list(widths)}")
    return MLP(widths, in_channels, num_classes)
