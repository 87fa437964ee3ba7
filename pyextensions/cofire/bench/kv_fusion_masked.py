# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of attention under a trained mask, and of a token's way into a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Args, Case, Provider, Random, Run, compiled, plain
from cofire.bench.kv_fusion_attention import hidden, repeated
from cofire.registry import OPERATORS

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


def as_policy(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor, own: Tensor, scale: float, eps: float
) -> Tensor:
    """As the paper's code has it, but for the gradient through the largest logit, which is of the order of eps."""
    logits = query @ repeated(query, key).transpose(-1, -2) * scale + bias
    gates = mask[:, None, None]
    gates = gates + (1 - gates) * own
    kept = (logits - logits.detach().amax(-1, keepdim=True)).float().exp() * gates.float()
    weights = (kept + eps / kept.shape[-1]) / (kept.sum(-1, keepdim=True) + eps)
    output: Tensor = weights.to(value.dtype) @ repeated(query, value)
    return output


def in_place(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor, own: Tensor, scale: float, eps: float
) -> Tensor:
    """Scale and mask within the product, the exponential in place, sums and eps on what is smaller; causal."""
    b, h, q, _ = query.shape
    keys, values = (repeated(query, x).flatten(0, 1) for x in (key, value))
    logits = torch.baddbmm(bias.expand(b * h, q, q), query.flatten(0, 1), keys.transpose(1, 2), alpha=scale)
    with torch.no_grad():
        most = logits.amax(-1, keepdim=True)
    gates = torch.addcmul(own.to(mask.dtype), mask[:, None], 1 - own.to(mask.dtype)).repeat_interleave(h, 0)
    kept = logits.sub_(most).exp_() * gates.to(logits.dtype)
    total = kept.sum(-1, keepdim=True, dtype=torch.float32) + eps
    leak = values.cumsum(1, dtype=torch.float32) * (eps / q)
    output: Tensor = ((kept @ values + leak) / total).to(query.dtype).unflatten(0, (b, h))
    return output


def published(*args: Any) -> Any:
    """What the paper's code computes: what a query does not see gets a share of eps."""
    return OPERATORS["masked_softmax_attention"].reference(*args[:-1], True)


def prepared(attend: Attend, compile: bool = False) -> Provider:
    """What the tokens do not see, and which is a query's own, is known before time counts."""

    def setup(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool, scale: float, eps: float, parity: bool
    ) -> Run:
        bias = hidden(query, key)
        own = torch.eye(key.shape[2], dtype=torch.float32, device=query.device)
        run = torch.compile(attend, dynamic=False) if compile else attend
        return lambda: run(query, key, value, mask, bias, own, scale, eps)

    return Provider(setup, reference=published if attend is as_policy else None)


def _attention(b: int, h: int, n: int, d: int, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    def args(b: int, n: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            query, key, value = (rand.normal(b, h, n, d).to(dtype) for _ in range(3))
            return query, key, value, rand.mask(b, n, 0.5).float(), True, 1 / math.sqrt(d), 1e-6, False

        return make

    return Case(
        "masked_softmax_attention",
        f"{b}x{h}, {n} tokens of {d}, half of them dropped",
        dtype,
        args(b, n),
        {
            "eager": prepared(as_policy),
            "dense": {"policy": prepared(as_policy), "in place": prepared(in_place)},
            "compile": prepared(as_policy, compile=True),
        },
        args(1, 5),
        gradients=(0, 1, 2, 3),
        **options,
    )


# ------------------------------------------------------------------------------------------------- a token more


def append_by_index(
    cache_key: Tensor, cache_value: Tensor, lengths: Tensor, key: Tensor, value: Tensor, keep: Tensor
) -> Tensor:
    """Every row at its own place."""
    rows, at = torch.arange(len(lengths), device=key.device), lengths.long()
    cache_key[rows, :, at] = key[:, :, 0]
    cache_value[rows, :, at] = value[:, :, 0]
    seen = lengths + 1
    lengths += keep
    return seen


def append_by_rows(
    cache_key: Tensor, cache_value: Tensor, lengths: Tensor, key: Tensor, value: Tensor, keep: Tensor
) -> Tensor:
    """Row by row; the lengths are read."""
    for b, at in enumerate(lengths.tolist()):
        cache_key[b, :, at] = key[b, :, 0]
        cache_value[b, :, at] = value[b, :, 0]
    seen = lengths + 1
    lengths += keep
    return seen


def _append(b: int, h: int, slots: int, d: int, **options: Any) -> Case:
    def args(b: int, h: int, slots: int, d: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            keys, values = rand.normal(b, h, slots, d), rand.normal(b, h, slots, d)
            lengths = (rand.uniform(b) * slots / 2).int()
            # none is counted, so that the cache does not fill while it is timed
            return keys, values, lengths, rand.normal(b, h, 1, d), rand.normal(b, h, 1, d), torch.zeros(b).bool()

        return make

    return Case(
        "kv_append_",
        f"{b}x{h}, {slots} slots of {d}",
        torch.float32,
        args(b, h, slots, d),
        {
            "eager": plain(append_by_rows),
            "dense": {"rows": plain(append_by_rows), "index": plain(append_by_index)},
            "compile": compiled(append_by_index),
        },
        args(2, 2, 4, 3),
        **options,
    )


#: A layer of a model of 7 billion parameters on an image and a question, and a small one.
CASES = [
    _attention(1, 32, 700, 128),
    _attention(1, 32, 700, 128, torch.bfloat16),
    _attention(8, 4, 76, 24, quick=True, overhead=True),
    _append(8, 32, 700, 128),
    _append(1, 32, 700, 128, quick=True, overhead=True),
]
