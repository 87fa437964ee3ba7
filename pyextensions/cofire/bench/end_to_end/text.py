# SPDX-License-Identifier: Apache-2.0
"""The small decoder of the families that need a language model, and how it is trained, scored and run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cofire import models
from cofire.bench.cases import Random
from cofire.bench.end_to_end.network import Call
from cofire.data import Text, load_text
from cofire.experiments import language
from cofire.models.decoder import Decoder
from cofire.nn.kv_cache import FullCache, KVCache

KIND = "next characters right, %"
UNIT = "tokens/s"


@dataclass(frozen=True)
class Trained:
    """A decoder for characters of Python's standard library, and how it is trained."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 384
    context: int = 512
    batch: int = 4
    rounds: int = 6
    steps: int = 50  #: of a round
    lr: float = 3e-3
    windows: int = 128  #: of the test, each of ``context`` characters

    @property
    def shape(self) -> str:
        return f"Llama-shaped, {self.depth} layers of {self.width}"

    def network(self, seed: int, share: float) -> Decoder:
        """A trained network, in evaluation mode. It is trained once for all families that ask for it."""
        return copy.deepcopy(_trained(self, seed, share))

    def score(self, model: nn.Module) -> float:
        """Per cent of the test's characters that the model finds most probable at their place."""
        right = count = 0
        for x, y in _text().test_batches(16, self.context, self.windows):
            right, count = right + int((model(x).argmax(-1) == y).sum()), count + y.numel()
        return 100 * right / count

    def windows_of(self, batch: int, length: int) -> Tensor:
        """Windows of the test text, ``[batch, length]``."""
        return next(_text().test_batches(batch, length, batch))[0]

    def training_windows(self, batch: int, seed: int) -> Tensor:
        return _text().batch(batch, self.context, torch.Generator().manual_seed(seed))[0]


@functools.lru_cache(maxsize=1)
def _text() -> Text:
    return load_text()


@functools.lru_cache(maxsize=1)
def _trained(plan: Trained, seed: int, share: float) -> Decoder:
    torch.manual_seed(seed)
    sizes: dict[str, int] = {"width": plan.width, "depth": plan.depth, "heads": plan.heads}
    sizes |= {"kv_heads": plan.kv_heads, "hidden": plan.hidden}
    model = models.decoder(len(_text().vocabulary), **sizes)
    rounds = max(1, round(share * plan.rounds))
    options: dict[str, Any] = {"steps": plan.steps, "batch": plan.batch, "context": plan.context, "lr": plan.lr}
    language.fit(model, _text(), rounds=rounds, weight_decay=0.01, seed=seed, **options)
    return model.eval().requires_grad_(False)


def random_tokens(batch: int, length: int, vocabulary: int) -> Tensor:
    """``[batch, length]``; the first rows are the same for every batch."""
    chances = Random("tokens").uniform(batch, length)
    return (chances * vocabulary).long().clamp_(max=vocabulary - 1)


def rewind(cache: KVCache, tokens: int) -> None:
    """Forget the last tokens of a cache that is not bounded."""
    for layer in cache.layers:
        layer.count -= tokens
        layer.seen -= tokens


def generate(read: Callable[[Tensor, KVCache], Tensor], cache: KVCache, token: Tensor, steps: int) -> Tensor:
    """The most probable token, so many times over, each read through the cache."""
    for _ in range(steps):
        token = read(token, cache)[:, -1].argmax(-1, keepdim=True)
    return token


def decoding(steps: int) -> Callable[[Any, Tensor], Call]:
    """Timed: so many tokens one after the other, each time after the same prompt, with a cache of all keys and values."""

    def start(model: Decoder, prompt: Tensor) -> Call:
        cache = FullCache(reserve=prompt.shape[1] + steps)
        token = model(prompt, cache)[:, -1].argmax(-1, keepdim=True)

        def run() -> Tensor:
            found = generate(model, cache, token, steps)
            rewind(cache, steps)
            return found

        return Call(run, len(prompt) * steps, steps, lambda: cache.bytes)

    return start
