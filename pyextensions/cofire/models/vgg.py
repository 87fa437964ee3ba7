# SPDX-License-Identifier: Apache-2.0
"""Plain stacks of 3x3 convolutions.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015; with
batch norm and one linear layer, as is usual for 32x32 images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

POOL = "pool"
#: 13 convolutions; with the linear layer, 14 of the 16 layers of the ImageNet network.
VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512)


class VGG(nn.Module):
    """Convolution, batch norm and ReLU per width; then the mean over the pixels and a linear layer."""

    def __init__(self, layers: Sequence[int | str], in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        channels = in_channels
        for layer in layers:
            if isinstance(layer, str):
                modules.append(nn.MaxPool2d(2))
                continue
            modules += [nn.Conv2d(channels, layer, 3, padding=1, bias=False), nn.BatchNorm2d(layer), nn.ReLU()]
            channels = layer
        self.features = nn.Sequential(*modules)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return logits


def vgg(layers: Sequence[int | str], *, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """A stack of 3x3 convolutions.

    Args:
        layers: the width of each convolution in order; ``"pool"`` halves the map.
        in_channels: channels of the images.
        num_classes: outputs of the linear layer.

    Raises:
        ValueError: an entry that is neither a positive integer nor ``"pool"``.
    """
    for layer in layers:
        if not (layer == POOL or (isinstance(layer, int) and layer > 0)):
            raise ValueError(f"vgg: layers must hold positive widths or {POOL!r}, got {layer!r}")
    return VGG(layers, in_channels, num_classes)


def vgg16(*, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """The 13 convolutions of VGG-16 for 32x32 images."""
    return vgg(VGG16, in_channels=in_channels, num_classes=num_classes)


def digits_cnn(
    widths: Sequence[int] = (32, 64, 64), *, pool_after: int = 2, in_channels: int = 1, num_classes: int = 10
) -> VGG:
    """A convolution per width, with one max pool after the first ``pool_after`` of them: for 8x8 digits."""
    return vgg([*widths[:pool_after], POOL, *widths[pool_after:]], in_channels=in_channels, num_classes=num_classes)
