# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of attention that returns scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cofire.bench.cases import Args, Case, Provider, Random, Run


def hidden(query: Tensor, key: Tensor) -> Tensor:
    """Zero where a query sees a key, else minus infinity ``[q, S]``."""
    queries, keys = query.shape[2], key.shape[2]
    unseen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(keys - queries + 1)
    return query.new_zeros(queries, keys).masked_fill_(unseen, -math.inf)


def repeated(query: Tensor, x: Tensor) -> Tensor:
    """Keys or values for each head of queries."""
    return x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def by_key(weights: Tensor, key: Tensor, window: int) -> Tensor:
    scores: Tensor = weights.detach()[:, :, max(weights.shape[2] - window, 0) :].sum(2, dtype=torch.float32)
    grouped: Tensor = scores.unflatten(1, (key.shape[1], -1)).sum(2)
    return grouped


def written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As models have it that need the weights: all of them in memory."""
    logits = query @ repeated(query, key).transpose(-1, -2) * scale
    logits = logits if mask is None else logits + mask
    weights = logits.softmax(-1, dtype=torch.float32)
    output = weights.to(value.dtype) @ repeated(query, value)
    return output, logits.float().logsumexp(-1), by_key(weights, key, window)


def in_one_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and mask within the product; the logarithm from the largest logit and its weight."""
    b, h, q, _ = query.shape
    keys, values = (repeated(query, x).flatten(0, 1) for x in (key, value))
    start = query.new_zeros(()) if mask is None else mask
    logits = torch.baddbmm(
        start.expand(b * h, q, keys.shape[1]), query.flatten(0, 1), keys.transpose(1, 2), alpha=scale
    )
    weights = logits.softmax(-1)
    lse = logits.amax(-1) - weights.amax(-1).log()
    scores = by_key(weights.unflatten(0, (b, h)), key, window)
    return (weights @ values).unflatten(0, (b, h)), lse.float().unflatten(0, (b, h)), scores


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, int], Any]


def masked(attend: Attend, compile: bool = False, **options: Any) -> Provider:
    """The mask is there before time counts."""

    def setup(
        query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, window: int, normalize: bool
    ) -> Run:
        mask = hidden(query, key) if causal else None
        run = torch.compile(attend, dynamic=False) if compile else attend
        return lambda: run(query, key, value, mask, scale, window)

    return Provider(setup, **options)


def by_library(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, window: int
) -> tuple[Tensor]:
    """Without scores: what they cost."""
    grouped = query.shape[1] != key.shape[1]
    return (F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped),)


def _attention(
    b: int, h: int, hkv: int, q: int, s: int, d: int, causal: bool, dtype: torch.dtype = torch.float32, **options: Any
) -> Case:
    def args(b: int, q: int, s: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            query, key, value = (rand.normal(b, n, t, d).to(dtype) for n, t in ((h, q), (hkv, s), (hkv, s)))
            return query, key, value, causal, 1 / math.sqrt(d), q, False

        return make

    heads = str(h) if h == hkv else f"{h}/{hkv}"
    return Case(
        "attention_with_scores",
        f"{b}x{heads}, {q} queries, {s} keys of {d}{', causal' if causal else ''}",
        dtype,
        args(b, q, s),
        {
            "eager": masked(written_out),
            "dense": {"written out": masked(written_out), "in one product": masked(in_one_product)},
            "compile": masked(written_out, compile=True),
            "peer:library without scores": masked(by_library, outputs=1),
        },
        args(1, 3, 9),
        gradients=(0, 1, 2),
        facts={"decoding": False, "causal": causal},
        **options,
    )


#: A chunk of Llama-2-7B's prefill against a full cache, a decode step, heads in groups, and a small language model.
CASES = [
    _attention(1, 32, 32, 512, 1024, 128, True),
    _attention(1, 32, 8, 512, 1024, 128, True),
    _attention(1, 32, 32, 512, 1024, 128, False),
    _attention(1, 32, 32, 1, 1024, 128, True),
    _attention(1, 32, 32, 512, 1024, 128, True, torch.bfloat16),
    _attention(8, 4, 4, 64, 192, 32, True, quick=True, overhead=True),
]
