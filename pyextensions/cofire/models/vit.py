# SPDX-License-Identifier: Apache-2.0
"""Small vision transformers.

Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021;
the mean over the patches instead of a class token: Beyer, Zhai, Kolesnikov, "Better plain ViT baselines for ImageNet-1k",
2022.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Initial deviation of the position and class embeddings.
DEVIATION = 0.02


class Attention(nn.Module):
    """Self-attention with separate projections ``q``, ``k``, ``v`` and ``proj``, each an ``nn.Linear``.

    ``num_heads`` is an attribute, the logits are ``q k^T / sqrt(head width)``, and nothing else acts on them: what
    :class:`cofire.methods.OFQ` asks of an attention that it reparameterises.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """Attention, then two linear layers, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class VisionTransformer(nn.Module):
    """Patches of an image, a linear map of each, blocks, and a linear layer on the class token or on the patches' mean."""

    def __init__(
        self, image: int, patch: int, width: int, depth: int, heads: int, hidden: int, class_token: bool,
        in_channels: int, num_classes: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch = patch
        self.pool = nn.AdaptiveAvgPool2d(image)
        self.embed = nn.Linear(in_channels * patch**2, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * DEVIATION) if class_token else None
        positions = (image // patch) ** 2 + class_token
        self.position = nn.Parameter(torch.randn(1, positions, width) * DEVIATION)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(F.unfold(self.pool(x), self.patch, stride=self.patch).transpose(1, 2))
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), 1)
        x = self.norm(self.blocks(x + self.position))
        logits: Tensor = self.head(x.mean(1) if self.class_token is None else x[:, 0])
        return logits


def vit(
    image: int = 32,
    patch: int = 4,
    *,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    ratio: int = 2,
    class_token: bool = False,
    in_channels: int = 3,
    num_classes: int = 10,
) -> VisionTransformer:
    """A vision transformer, by default of 0.14 million parameters for images of 32x32 pixels.

    Args:
        image: pixels a side, a multiple of ``patch``; larger images are averaged down to it.
        patch: pixels a side.
        width: of the residual stream, a multiple of ``heads``.
        depth: number of blocks.
        heads: of the attention.
        ratio: width of the hidden layer in a block, in units of ``width``.
        class_token: classify by a token of its own; otherwise by the mean over the patches.
        in_channels: channels of the images.
        num_classes: outputs of the last layer.

    Raises:
        ValueError: a size that is not positive, an image that does not divide into patches, or a width into heads.
    """
    sizes = {"image": image, "patch": patch, "width": width, "depth": depth, "heads": heads, "ratio": ratio}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"vit: {name} must be at least 1, got {size}")
    if image % patch:
        raise ValueError(f"vit: image must be a multiple of patch ({patch}), got {image}")
    if width % heads:
        raise ValueError(f"vit: width must be a multiple of heads ({heads}), got {width}")
    return VisionTransformer(image, patch, width, depth, heads, ratio * width, class_token, in_channels, num_classes)


def digits_vit(*, in_channels: int = 1, num_classes: int = 10) -> VisionTransformer:
    """The same for digits of 8x8 pixels, in patches of 2x2."""
    return vit(8, 2, in_channels=in_channels, num_classes=num_classes)


def vit_patch8(*, in_channels: int = 3, num_classes: int = 10) -> VisionTransformer:
    """The same for images of 32x32 pixels, in patches of 8x8: a quarter of the time."""
    return vit(32, 8, in_channels=in_channels, num_classes=num_classes)
