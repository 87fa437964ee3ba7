# SPDX-License-Identifier: Apache-2.0
"""A small causal decoder of today's build, which takes a cache of keys and values.

Sources: rotary positions: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; norm by the
root mean square: Zhang, Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019; shared heads of keys and values:
Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", EMNLP 2023; gated
linear layers: Shazeer, "GLU Variants Improve Transformer", 2020. Names of the layers are those of Llama.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Initial deviation of the weights times the root of the width; of those that write to the residual stream over the root of
#: twice the depth.
DEVIATION = 0.5


class Cache(Protocol):
    """What a decoder asks of a cache; :class:`cofire.nn.FullCache` and its like have it."""

    @property
    def seen(self) -> int: ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor: ...

    def lengths(self, layer: int = 0) -> list[int]: ...


class Rotary(nn.Module):
    """Cosines and sines by which pairs of features turn with the position.

    Args:
        head_dim: features of a head, even.
        theta: wave length of the slowest pair, over 2 pi.
        scaling: positions are divided by it: a context of ``scaling`` times the length then has the angles of the first.
    """

    frequency: Tensor

    def __init__(self, head_dim: int, theta: float = 1e4, scaling: float = 1.0) -> None:
        super().__init__()
        self.scaling = scaling
        self.register_buffer("frequency", theta ** -(torch.arange(0, head_dim, 2) / head_dim), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 ``[..., T, head_dim]`` of the integers ``[..., T]``."""
        angles = (positions.float() / self.scaling)[..., None] * self.frequency.float()
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """``x [B, H, T, d]`` turned; computed in fp32, in the dtype of ``x``."""
    cosine, sine = turn
    first, second = x.chunk(2, -1)
    return (x * cosine + torch.cat([-second, first], -1) * sine).to(x.dtype)


class RotaryAttention(nn.Module):
    """Attention to what came before, or to what a cache holds of it."""

    def __init__(self, width: int, heads: int, kv_heads: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, width // heads
        self.num_heads, self.num_key_value_heads = heads, kv_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        q, k = rotate(q, turn), rotate(k, turn)
        if cache is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        else:
            mixed = cache.attend(self.layer_idx, q, k, v, **({} if lengths is None else {"lengths": lengths}))
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


class DecoderBlock(nn.Module):
    """Attention, then a gated pair of linear layers; each adds to its input."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int, layer_idx: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = RotaryAttention(width, heads, kv_heads, layer_idx)
        self.output_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        x = x + self.attention(self.input_norm(x), turn, cache, lengths)
        y = self.output_norm(x)
        x = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return x


class Decoder(nn.Module):
    """Tokens ``[batch, length]`` to logits ``[batch, length, vocabulary]`` of the next ones; or, of a classifier, to logits
    ``[batch, classes]`` at the last token."""

    def __init__(
        self, vocabulary: int, width: int, depth: int, heads: int, kv_heads: int, hidden: int, classes: int | None
    ) -> None:
        super().__init__()
        self.classes = classes
        self.embed = nn.Embedding(vocabulary, width)
        self.rotary = Rotary(width // heads)
        self.blocks = nn.ModuleList(DecoderBlock(width, hidden, heads, kv_heads, i) for i in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary if classes is None else classes, bias=False)
        if classes is None:
            self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = math.sqrt(2 * depth) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(parameter, std=DEVIATION / math.sqrt(width) / scale)

    def forward(self, tokens: Tensor, cache: Cache | None = None, *, lengths: Sequence[int] | None = None) -> Tensor:
        """Logits.

        Args:
            tokens: int64 ``[batch, length]``.
            cache: what the tokens before these left, and where these go; None: there were none, and none will follow.
            lengths: with a cache, how many of the tokens count in each row; the others, at the end, only fill up.
        """
        if lengths is not None and cache is None:
            raise ValueError("Decoder: lengths need a cache: without one no row looks at what fills it up")
        x = self.states(tokens, cache, lengths)
        if self.classes is not None:
            x = x[:, -1] if lengths is None else x[torch.arange(len(x)), torch.tensor(lengths) - 1]
        logits: Tensor = self.head(x)
        return logits

    def states(self, tokens: Tensor, cache: Cache | None = None, lengths: Sequence[int] | None = None) -> Tensor:
        """What the head gets, ``[batch, length, width]``."""
        turn = self.rotary(self._positions(tokens, cache))
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, turn, cache, lengths)
        states: Tensor = self.norm(x)
        return states

    @staticmethod
    def _positions(tokens: Tensor, cache: Cache | None) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        if cache is None:
            return places
        starts = cache.lengths()
        if len(set(starts)) > 1:  # one row's tokens came to an end before another's
            return (places + torch.tensor(starts, device=tokens.device)[:, None])[:, None]
        return places + (starts[0] if starts else cache.seen)


def decoder(
    vocabulary: int = 96,
    *,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    kv_heads: int | None = None,
    hidden: int | None = None,
    classes: int | None = None,
) -> Decoder:
    """A causal decoder with rotary positions, which takes a cache of keys and values.

    Args:
        vocabulary: number of tokens.
        width: of the residual stream, an even multiple of ``heads``.
        depth: number of blocks.
        heads: of the queries.
        kv_heads: of the keys and values, a divisor of ``heads``; None: as many.
        hidden: features between the gated linear layers; None: 8/3 of ``width``, so that they have as many weights as a
            plain pair of four times the width.
        classes: with a number, logits of classes at the last token instead of the next token's everywhere.

    Raises:
        ValueError: a size that is not positive, or heads that do not divide.

    Example:
        >>> from cofire.nn import FullCache
        >>> model, tokens = decoder(10, width=16, depth=2, heads=2), torch.randint(10, (1, 12))
        >>> cache = FullCache()
        >>> with torch.no_grad():
        ...     parts = [model(part, cache) for part in tokens.split(5, 1)]
        ...     print(torch.allclose(torch.cat(parts, 1), model(tokens), atol=1e-5))
        True
    """
    kv_heads = heads if kv_heads is None else kv_heads
    hidden = max(8 * width // 3, 1) if hidden is None else hidden
    sizes = {"vocabulary": vocabulary, "width": width, "depth": depth, "heads": heads, "kv_heads": kv_heads}
    sizes |= {"hidden": hidden} | ({} if classes is None else {"classes": classes})
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"decoder: {name} must be at least 1, got {size}")
    if width % (2 * heads):
        raise ValueError(f"decoder: width must be an even multiple of heads ({heads}), got {width}")
    if heads % kv_heads:
        raise ValueError(f"decoder: kv_heads must divide heads ({heads}), got {kv_heads}")
    return Decoder(vocabulary, width, depth, heads, kv_heads, hidden, classes)
