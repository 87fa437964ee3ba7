# SPDX-License-Identifier: Apache-2.0
"""A small language model over characters.

Sources: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; layer norm before each half of a block: Radford et al.,
"Language Models are Unsupervised Multitask Learners", 2019, section 2.3; one matrix for embedding and output: Press, Wolf,
"Using the Output Embedding to Improve Language Models", EACL 2017.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Initial deviation of the weights; of those that write to the residual stream over the root of twice the depth.
DEVIATION = 0.02


class Block(nn.Module):
    """Attention to what came before, then two linear layers; each adds to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class CharTransformer(nn.Module):
    """Characters ``[batch, length]`` to logits ``[batch, length, vocabulary]`` of the next ones."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = math.sqrt(2 * depth) if name.endswith(("proj.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=DEVIATION / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.ones_like(x[:1]).cumsum(1) - 1
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(x) + self.position(places))))
        return logits


def char_transformer(
    vocabulary: int = 96, *, width: int = 128, depth: int = 4, heads: int = 4, context: int = 128
) -> CharTransformer:
    """A transformer of 0.8 million parameters that predicts the next character. The output shares the embedding's weight.

    Args:
        vocabulary: number of characters.
        width: of the residual stream, a multiple of ``heads``.
        depth: number of blocks.
        heads: of the attention.
        context: most characters that it looks at.

    Raises:
        ValueError: a size that is not positive, or a width that does not divide into heads.
    """
    sizes = {"vocabulary": vocabulary, "width": width, "depth": depth, "heads": heads, "context": context}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"char_transformer: {name} must be at least 1, got {size}")
    if width % heads:
        raise ValueError(f"char_transformer: width must be a multiple of heads ({heads}), got {width}")
    return CharTransformer(vocabulary, width, depth, heads, context)
