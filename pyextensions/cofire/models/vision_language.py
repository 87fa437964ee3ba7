# SPDX-License-Identifier: Apache-2.0
"""A small decoder that is shown an image and asked a question.

Patches of the image become tokens before those of the text, as in "Visual Instruction Tuning" (Liu et al., NeurIPS 2023);
rotary positions: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.models.decoder import Rotary, rotate

#: Queries, keys and values ``[B, H, N, d]`` to what each query takes of the values.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Initial deviation of the embeddings.
DEVIATION = 0.02
#: The longest wave of rotary positions, in tokens, over 2 pi.
BASE = 1000.0


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention to the token itself and to what came before."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Block(nn.Module):
    """Attention, then two linear layers, each behind a norm and added to its input; called with how to attend."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.rotary = Rotary(width // heads, BASE)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        turn = self.rotary(positions[:, None])
        mixed = attend(rotate(q, turn), rotate(k, turn), v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class Decoder(nn.Module):
    """Blocks one after the other, on ``images`` tokens of an image and then those of a text.

    ``blocks`` is a list of modules that are called with hidden states ``[B, N, D]``, positions and an attention. This is
    what :class:`cofire.methods.DynamicLLaVA` puts its own in the place of, which uses the other arguments.
    """

    def __init__(self, blocks: nn.ModuleList, features: int) -> None:
        super().__init__()
        self.blocks, self.features = blocks, features

    def forward(self, x: Tensor, images: int, answer: int, lengths: Tensor | None = None) -> Tensor:
        """All tokens.

        Args:
            x: ``[B, N, D]``.
            images: tokens of the image, in front.
            answer: position of the first token of the answer, N if there is none yet.
            lengths: tokens of each row, the rest being padding; default: N.
        """
        positions = torch.arange(x.shape[1], device=x.device)[None]
        for block in self.blocks:
            x = block(x, positions, causal)
        return x

    def prefill(self, x: Tensor, images: int, room: int) -> tuple[Tensor, Any]:
        """Hidden states of a prompt, and a cache with room for so many tokens more."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        cache: list[tuple[Tensor, Tensor]] = []
        for block in self.blocks:

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                cache.append((k, v))
                return causal(q, k, v)

            x = block(x, positions, attend)
        return x, cache

    def decode(self, x: Tensor, cache: Any) -> Tensor:
        """Of one token more ``[B, 1, D]``."""
        position = torch.full((1, 1), cache[0][0].shape[2], device=x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, position, functools.partial(_attend_to_all, cache, i))
        return x

    def last(self, x: Tensor, images: int, answer: int) -> Tensor:
        """The last token's ``[B, 1, D]``, without a cache."""
        hidden: Tensor = self(x, images, answer)
        return hidden[:, -1:]


def _attend_to_all(cache: list[tuple[Tensor, Tensor]], i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = cache[i]
    cache[i] = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return F.scaled_dot_product_attention(q, *cache[i])


class VisionLanguageDecoder(nn.Module):
    """An image and a text to logits of the text's next tokens. Token 0 is padding."""

    PADDING = 0

    def __init__(
        self, image: int, patch: int, vocabulary: int, width: int, depth: int, heads: int, hidden: int, in_channels: int
    ) -> None:
        super().__init__()
        self.image, self.patch = image, patch
        self.see = nn.Linear(in_channels * patch**2, width)
        self.place = nn.Parameter(torch.randn(1, (image // patch) ** 2, width) * DEVIATION)
        self.embed = nn.Embedding(vocabulary, width)
        self.decoder = Decoder(nn.ModuleList(Block(width, heads, hidden) for _ in range(depth)), width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(
        self, images: Tensor, text: Tensor, answer: int | None = None, lengths: Tensor | None = None, **chosen: Any
    ) -> Tensor:
        """Logits ``[B, T, vocabulary]`` of the token after each of the text's.

        Args:
            images: ``[B, C, H, W]``, scaled to the network's size.
            text: int64 ``[B, T]``, question and answer.
            answer: position in ``text`` of the answer; default: T, there is none yet.
            lengths: int64 ``[B]``, tokens of each row's text, the rest being padding.
            chosen: what the decoder takes beside.

        Raises:
            ValueError: the answer begins outside of the text, or rows with padding and no lengths.
        """
        name, (_, count) = type(self).__name__, text.shape
        answer = count if answer is None else answer
        if not 0 <= answer <= count:
            raise ValueError(
                f"{name}: answer must be a position in the text of {count} tokens, or its end, got {answer}"
            )
        self._check_padding(text, lengths)
        tokens = self.place.shape[1]
        lengths = None if lengths is None else lengths + tokens
        x = self.decoder(self.hidden(images, text), tokens, tokens + answer, lengths, **chosen)
        return self.read(x[:, x.shape[1] - count :])

    def _check_padding(self, text: Tensor, lengths: Tensor | None) -> None:
        """Whether there is padding and nobody says where; not looked at on a GPU, which somebody would have to wait for."""
        looked = lengths is None and not torch.compiler.is_compiling() and text.device.type == "cpu"
        if looked and bool((text == self.PADDING).any()):
            raise ValueError(
                f"{type(self).__name__}: lengths must say how long each row's text is, as there is padding, got None"
            )

    def hidden(self, images: Tensor, text: Tensor) -> Tensor:
        """The decoder's input ``[B, N, D]``."""
        x = F.interpolate(images, (self.image, self.image), mode="bilinear", align_corners=False)
        seen = self.see(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)) + self.place
        return torch.cat([seen, self.embed(text)], 1)

    def read(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def generate(
        self, images: Tensor, question: Tensor, count: int, *, cached: bool = True, lengths: Tensor | None = None
    ) -> Tensor:
        """The ``count`` likeliest tokens ``[B, count]``, one after the other.

        Args:
            images, question: as in :meth:`forward`.
            cached: keep keys and values; else all tokens are computed anew for each.
            lengths: int64 ``[B]``, tokens of each row's question, the rest being padding; default: all. Rows of one length
                are answered together, and those of another after them.

        Raises:
            ValueError: lengths that do not fit, or rows with padding and no lengths.
        """
        self._check_padding(question, lengths)
        if lengths is not None:
            rows, longest = question.shape
            if list(lengths.shape) != [rows] or not bool(((lengths >= 1) & (lengths <= longest)).all()):
                name, got = type(self).__name__, lengths.tolist()
                raise ValueError(f"{name}: lengths must be {rows} numbers from 1 to the {longest} tokens, got {got}")
            answers = question.new_empty(rows, count)
            for length in lengths.unique().tolist():
                alike = lengths == length
                answers[alike] = self.generate(images[alike], question[alike, :length], count, cached=cached)
            return answers
        tokens, text = self.place.shape[1], question
        x = self.hidden(images, question)
        if cached:
            x, cache = self.decoder.prefill(x, tokens, count)
        else:
            x = self.decoder.last(x, tokens, x.shape[1])
        for i in range(count):
            found = self.read(x[:, -1:])[..., 1:].argmax(-1) + 1  # anything but padding
            text = torch.cat([text, found], 1)
            if i + 1 == count:
                break
            if cached:
                x = self.decoder.decode(self.embed(found), cache)
            else:
                x = self.decoder.last(self.hidden(images, text), tokens, tokens + question.shape[1])
        return text[:, question.shape[1] :]


def vision_language(
    image: int = 16,
    patch: int = 2,
    *,
    vocabulary: int = 32,
    width: int = 96,
    depth: int = 4,
    heads: int = 4,
    ratio: int = 2,
    in_channels: int = 1,
) -> VisionLanguageDecoder:
    """A decoder of 0.3 million parameters for images of 16x16 pixels in 64 tokens, and a text after them.

    Args:
        image: pixels a side, a multiple of ``patch``; other images are scaled to it.
        patch: pixels a side.
        vocabulary: number of tokens of the text; the first is padding.
        width: of the residual stream, an even multiple of ``heads``.
        depth: number of blocks.
        heads: of the attention.
        ratio: width of the hidden layer in a block, in units of ``width``.
        in_channels: channels of the images.

    Raises:
        ValueError: a size that is not positive, an image that does not divide into patches, or a width into heads of pairs.
    """
    sizes = {"image": image, "patch": patch, "vocabulary": vocabulary, "width": width, "depth": depth, "heads": heads}
    for name, size in (sizes | {"ratio": ratio, "in_channels": in_channels}).items():
        if size < 1:
            raise ValueError(f"vision_language: {name} must be at least 1, got {size}")
    if image % patch:
        raise ValueError(f"vision_language: image must be a multiple of patch ({patch}), got {image}")
    if width % (2 * heads):
        raise ValueError(f"vision_language: width must be an even multiple of heads ({heads}), got {width}")
    return VisionLanguageDecoder(image, patch, vocabulary, width, depth, heads, ratio * width, in_channels)
