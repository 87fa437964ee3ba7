# SPDX-License-Identifier: Apache-2.0
"""Decoders that read and generate with a cache of fixed size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from cofire import models
from cofire.bench.end_to_end import text
from cofire.bench.end_to_end.dense import dense_forms
from cofire.bench.end_to_end.network import RANDOM_WEIGHTS, Call, Network, Variant, in_double
from cofire.bench.end_to_end.text import Trained
from cofire.experiments.training import adamw
from cofire.methods import LoCoCo
from cofire.methods.lococo import CompressingDecoder
from cofire.models.decoder import Decoder
from cofire.nn import FullCache, SlidingWindowCache
from cofire.nn.kv_cache import KVCache

#: Which tokens are heavy hitters hangs on sums of shares; where two are alike to rounding, another one may stay.
TOLERANCE, SHARE = 1e-2, 0.95


class Reader(nn.Module):
    """A decoder that reads in chunks with a cache of some policy."""

    def __init__(self, model: nn.Module, make: Callable[[], KVCache], chunk: int) -> None:
        super().__init__()
        self.model, self.new_cache, self.chunk = model, make, chunk

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        cache = self.new_cache() if cache is None else cache
        return torch.cat([self.model(piece, cache) for piece in tokens.split(self.chunk, 1)], 1)


@dataclass(frozen=True)
class Sizes:
    """Of the cache, and what is timed."""

    capacity: int
    chunk: int
    taps: int
    buffer: int
    prompt: int  #: tokens that were read before
    batch: int
    local: int = 0
    normalize: bool = False

    @property
    def steps(self) -> int:
        """Tokens in which each layer is compressed once."""
        return self.buffer + 1

    def method(self, **options: Any) -> LoCoCo:
        own = {"taps": self.taps, "buffer": self.buffer, "chunk": self.chunk, "local": self.local}
        return LoCoCo(self.capacity, normalize=self.normalize, **own, **options)  # type: ignore[arg-type]

    def start(self, model: Any, prompt: Tensor) -> Call:
        """Timed: generating. A bounded cache goes on and on, the one of all tokens goes back to the prompt's end."""
        cache = model.new_cache()
        token = model(prompt, cache)[:, -1].argmax(-1, keepdim=True)

        def run() -> Tensor:
            found = text.generate(model, cache, token, self.steps)
            if cache.capacity is None:
                text.rewind(cache, self.steps)
            return found

        return Call(run, len(prompt) * self.steps, self.steps, lambda: cache.bytes)


def forms(model: Decoder, lococo: CompressingDecoder, sizes: Sizes) -> dict[str, Variant]:
    """All keys and values; a window; LoCoCo. The decoder without a cache says what the first must compute."""

    def full() -> KVCache:
        return FullCache(reserve=sizes.prompt + sizes.steps, chunk=sizes.chunk)

    def window() -> KVCache:
        return SlidingWindowCache(sizes.capacity, buffer=sizes.buffer, chunk=sizes.chunk)

    held = f"{sizes.capacity} of {sizes.prompt} tokens"
    windowed = Reader(model, window, sizes.chunk)
    return {
        **dense_forms(model, lambda m: Reader(m, full, sizes.chunk), model, "a cache of all keys and values"),
        f"window, {held}": Variant(windowed, in_double(windowed), TOLERANCE),
        f"LoCoCo, {held}": Variant(lococo, in_double(lococo), TOLERANCE, SHARE),
    }


def trained(plan: Trained, sizes: Sizes, *, updates: int = 60, batch: int = 4, lr: float = 2e-4) -> Network:
    """The small decoder, trained, and then through the cache that compresses."""

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        model = plan.network(seed, share)
        method = sizes.method()
        torch.manual_seed(seed)
        prepared = method.prepare(model).train()
        _train(method, prepared, plan, max(1, round(share * updates)), batch, lr)
        return forms(model, method.finalize(prepared), sizes)

    return Network(
        family="kv_fusion",
        name=plan.shape,
        data="source text of Python's standard library",
        build=build,
        inputs=lambda n: plan.windows_of(n, sizes.prompt),
        unit=text.UNIT,
        batch=sizes.batch,
        latency_of=f"one token, after {sizes.prompt}",
        start=sizes.start,
        sample=lambda: plan.windows_of(2, plan.context),
        evaluate=plan.score,
        accuracy_kind=text.KIND,
    )


def _train(method: LoCoCo, prepared: CompressingDecoder, plan: Trained, updates: int, batch: int, lr: float) -> None:
    """Through the cache, with rates that fall on a line."""
    groups = method.parameter_groups(prepared, lr)
    optimizer = adamw(groups)
    peaks = [group["lr"] for group in groups]
    for step, seed in zip(range(updates), count(1)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (1 - step / updates)
        optimizer.zero_grad(set_to_none=True)
        method.backward(prepared, plan.training_windows(batch, seed))
        optimizer.step()
        method.step(prepared)


def random(
    sizes: Sizes, width: int = 512, depth: int = 8, heads: int = 8, vocabulary: int = 4096, *, checked: int = 768
) -> Network:
    """One of the size of a small language model, after a long prompt."""

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        torch.manual_seed(seed)
        model = models.decoder(vocabulary, width=width, depth=depth, heads=heads).eval().requires_grad_(False)
        method = sizes.method(std=0.1)
        return forms(model, method.finalize(method.prepare(model)), sizes)

    return Network(
        family="kv_fusion",
        name=f"Llama-shaped, {depth} layers of {width}",
        data=RANDOM_WEIGHTS,
        build=build,
        inputs=lambda n: text.random_tokens(n, sizes.prompt, vocabulary),
        unit=text.UNIT,
        batch=sizes.batch,
        latency_of=f"one token, after {sizes.prompt}",
        start=sizes.start,
        sample=lambda: text.random_tokens(1, checked, vocabulary),
    )


NETWORKS = [
    trained(Trained(), Sizes(capacity=64, chunk=64, taps=9, buffer=16, prompt=512, batch=16, local=16, normalize=True)),
    random(Sizes(capacity=256, chunk=256, taps=21, buffer=16, prompt=2048, batch=4)),
]
