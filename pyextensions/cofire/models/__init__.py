# SPDX-License-Identifier: Apache-2.0
"""Small networks for experiments and demonstrations. Those that classify images are traceable by ``torch.fx``."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from cofire.models.decoder import decoder
from cofire.models.mlp import digits_mlp
from cofire.models.mobilenet import mobilenet_v1, mobilenet_v2
from cofire.models.pvt import pvt
from cofire.models.resnet import resnet, resnet20, resnet56
from cofire.models.transformer import char_transformer
from cofire.models.vgg import digits_cnn, vgg, vgg16
from cofire.models.vision_language import vision_language
from cofire.models.vit import digits_vit, vit, vit_patch8

__all__ = [
    "MODELS",
    "build",
    "char_transformer",
    "decoder",
    "digits_cnn",
    "digits_mlp",
    "digits_vit",
    "mobilenet_v1",
    "mobilenet_v2",
    "pvt",
    "resnet",
    "resnet20",
    "resnet56",
    "vgg",
    "vgg16",
    "vision_language",
    "vit",
    "vit_patch8",
]

#: The networks that ``cofire train --model NAME`` knows; each takes ``in_channels`` and ``num_classes``.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits_cnn": digits_cnn,
    "digits_mlp": digits_mlp,
    "digits_vit": digits_vit,
    "vgg16": vgg16,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "pvt": pvt,
    "vit": vit,
    "vit_patch8": vit_patch8,
}


def build(name: str, *, in_channels: int = 3, num_classes: int = 10) -> nn.Module:
    """The network called ``name``, freshly initialised from torch's global random state."""
    if name not in MODELS:
        raise ValueError(f"build: name must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](in_channels=in_channels, num_classes=num_classes)
