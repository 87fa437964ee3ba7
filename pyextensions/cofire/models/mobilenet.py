# SPDX-License-Identifier: Apache-2.0
"""Networks of depthwise and pointwise convolutions, with a first stride of 1 for 32x32 images.

Sources: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017,
table 1; Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([act] if act is not None else []))


def _width(channels: int, multiplier: float) -> int:
    """The scaled width, rounded to a multiple of 8 but to no less than nine tenths of what was asked."""
    rounded = max(8, int(channels * multiplier + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * multiplier else rounded


class MobileNet(nn.Module):
    """Features, the mean over the pixels, and a linear layer."""

    def __init__(self, features: nn.Sequential, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return logits


class InvertedResidual(nn.Module):
    """Widen (pointwise), filter (depthwise), narrow (pointwise, no activation); a shortcut where the shape allows."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        widen = [_conv(in_channels, wide, 1, act=nn.ReLU6())] if expansion > 1 else []
        self.layers = nn.Sequential(
            *widen, _conv(wide, wide, 3, stride, groups=wide, act=nn.ReLU6()), _conv(wide, out_channels, 1)
        )
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


def mobilenet_v1(*, width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> MobileNet:
    """Thirteen pairs of a depthwise and a pointwise convolution; ``width`` multiplies every number of channels."""
    pairs = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    channels = _width(32, width)
    layers = [_conv(in_channels, channels, 3, act=nn.ReLU())]
    for base, stride in pairs:
        out = _width(base, width)
        layers += [
            _conv(channels, channels, 3, stride, groups=channels, act=nn.ReLU()),
            _conv(channels, out, 1, act=nn.ReLU()),
        ]
        channels = out
    return MobileNet(nn.Sequential(*layers), channels, num_classes)


def mobilenet_v2(*, width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> MobileNet:
    """Seventeen inverted residuals; ``width`` multiplies every number of channels but the last."""
    #: expansion, channels, repeats, stride; the first two strides are 1 instead of 2 for 32x32 images
    stages = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    channels = _width(32, width)
    layers: list[nn.Module] = [_conv(in_channels, channels, 3, act=nn.ReLU6())]
    for expansion, base, repeats, stride in stages:
        for repeat in range(repeats):
            out = _width(base, width)
            layers.append(InvertedResidual(channels, out, stride if repeat == 0 else 1, expansion))
            channels = out
    last = max(1280, _width(1280, width))
    layers.append(_conv(channels, last, 1, act=nn.ReLU6()))
    return MobileNet(nn.Sequential(*layers), last, num_classes)
