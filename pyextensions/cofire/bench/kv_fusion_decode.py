# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of a decoding step: one token is cached, and its query attends to all that are.

All providers start with the same tokens in their cache, and forget the new one when a step is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cofire.bench.cases import Args, Case, Provider, Random, Run
from cofire.nn import FullCache, HeavyHitterCache, KVCache


def library(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Queries that share a head of keys are queries of that head: torch then repeats no key."""
    grouped = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
    return F.scaled_dot_product_attention(grouped, key, value, scale=scale).view(query.shape)


def by_cat(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, *rest: Any) -> Run:
    """As the dynamic cache of transformers has it: the cache is a new tensor with each token."""
    (old_key, key), (old_value, value) = (_split(x) for x in (key, value))

    def step() -> tuple[Tensor]:
        keys, values = torch.cat([old_key, key], -2), torch.cat([old_value, value], -2)
        return (library(query, keys, values, scale),)

    return step


def by_hand(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, *rest: Any) -> Run:
    """A tensor with room to spare, written in place, and torch's attention to the part that is filled."""
    keys, values = (F.pad(x, (0, 0, 0, 64)) for x in (key, value))
    (_, key), (_, value), tokens = _split(key), _split(value), key.shape[2]

    def step() -> tuple[Tensor]:
        keys[:, :, tokens - 1 : tokens], values[:, :, tokens - 1 : tokens] = key, value
        return (library(query, keys[:, :, :tokens], values[:, :, :tokens], scale),)

    return step


def by_cache(make: Callable[[int], KVCache]) -> Provider:
    def setup(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, *rest: Any) -> Run:
        cache = make(key.shape[2])
        (old_key, key), (old_value, value) = (_split(x) for x in (key, value))
        cache.update(0, old_key, old_value)
        layer = cache.layers[0]

        def step() -> tuple[Tensor]:
            output = cache.attend(0, query, key, value, scale=scale)
            layer.count -= 1
            layer.seen -= 1
            return (output,)

        return step

    return Provider(setup, outputs=1)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens but the last, and the last."""
    return x[:, :, :-1].contiguous(), x[:, :, -1:].contiguous()


def with_scores(tokens: int) -> KVCache:
    return HeavyHitterCache(tokens, accumulate=False, recent=0)


def _decode(h: int, hkv: int, s: int, d: int, dtype: torch.dtype = torch.float32) -> Case:
    def args(s: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            query, key, value = (rand.normal(1, n, t, d).to(dtype) for n, t in ((h, 1), (hkv, s), (hkv, s)))
            return query, key, value, True, 1 / math.sqrt(d), 0, False

        return make

    heads = str(h) if h == hkv else f"{h}/{hkv}"
    return Case(
        "attention_with_scores",
        f"a decoding step with its cache, 1x{heads}, {s} keys of {d}",
        dtype,
        args(s),
        {
            "eager": Provider(by_cat, outputs=1),
            "dense": {"in place": Provider(by_hand, outputs=1), "cat": Provider(by_cat, outputs=1)},
            "peer:cofire with scores": by_cache(with_scores),
        },
        args(9),
        ours=by_cache(lambda tokens: FullCache()),
        facts={"decoding": True, "causal": True},
    )


#: A layer of Llama-2-7B and one with grouped queries at a context of 4,096.
CASES = [
    _decode(32, 32, 4096, 128),
    _decode(32, 8, 4096, 128),
    _decode(32, 32, 4096, 128, torch.bfloat16),
]
