# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of the mixture of two linear experts: weights and tokens normal, the choice at random.

Routing: ``eager`` makes the lists by ``nonzero``; ``dense`` is the fastest of that and of ways that get the probabilities of two
experts from the difference of their logits, one of them with lists by a running count.

Experts: ``eager`` is a dispatcher as it is usually written (Shazeer et al. 2017): the tokens sorted by expert and split, what comes
out stitched together, scaled, and added up in zeros. ``dense`` is the faster one of a dispatcher without these detours, and of both
experts on all tokens, and a choice. All know the lists already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.bench.cases import Args, Case, Random, plain
from cofire.bench.selection import compact_by_scan
from cofire.ops.gating import mask_from_index
from cofire.ops.selection import compact


def route_by_nonzero(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As a dispatcher does it: the lists by ``nonzero``, which synchronises on a GPU."""
    probability = logits.softmax(1)
    shift = logits[:, 1] >= logits[:, 0]
    gate = torch.where(shift, probability[:, 1], probability[:, 0])
    lists = ((~shift).nonzero()[:, 0], shift.nonzero()[:, 0])
    index = torch.full((2, logits.shape[0]), -1, dtype=torch.int32, device=logits.device)
    for row, found in zip(index, lists, strict=True):
        row[: found.numel()] = found
    count = torch.tensor([found.numel() for found in lists], dtype=torch.int32, device=logits.device)
    return gate, index, count, probability.float().sum(0)


def _by_difference(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gate, which tokens take the second expert, and the sum of each expert's probabilities."""
    difference = logits[:, 1] - logits[:, 0]
    shift = difference >= 0
    second = difference.sigmoid()
    gate = torch.where(shift, second, 1 - second)
    total = second.detach().float().sum()
    return gate, shift, torch.stack([len(logits) - total, total])


def route_by_difference(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lists by ``nonzero``."""
    gate, shift, total = _by_difference(logits)
    index = torch.full((2, len(logits)), -1, dtype=torch.int32, device=logits.device)
    second = shift.nonzero()[:, 0]
    first = shift.logical_not().nonzero()[:, 0]
    index[0, : len(first)], index[1, : len(second)] = first, second
    count = torch.tensor([len(first), len(second)], dtype=torch.int32, device=logits.device)
    return gate, index, count, total


def route_by_count(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lists by a running count, so that nobody waits for a GPU."""
    gate, shift, total = _by_difference(logits)
    return gate, *compact_by_scan(torch.stack([~shift, shift])), total


def dispatcher(x: Tensor, *rest: Any) -> Tensor:
    """The tokens in the order of their experts, and back."""
    dense_weight, shift_weight, dense_bias, shift_bias, gate, index, count = rest
    sizes = count.tolist()
    tokens = torch.cat([row[:size] for row, size in zip(index, sizes, strict=True)])
    dense, shift = x[tokens].split(sizes)
    y = torch.cat([F.linear(dense, dense_weight, dense_bias), F.linear(shift, shift_weight, shift_bias)])
    return x.new_zeros(x.shape[0], dense_weight.shape[0]).index_add(0, tokens, y * gate[tokens][:, None])


def expert_by_expert(x: Tensor, *rest: Any) -> Tensor:
    """Each expert's tokens gathered, multiplied, scaled, and put where they belong."""
    dense_weight, shift_weight, dense_bias, shift_bias, gate, index, count = rest
    y = x.new_empty(x.shape[0], dense_weight.shape[0])
    experts = ((dense_weight, dense_bias), (shift_weight, shift_bias))
    for (weight, bias), row, size in zip(experts, index, count.tolist(), strict=True):
        tokens = row[:size]
        scaled = F.linear(x.index_select(0, tokens), weight, bias) * gate.index_select(0, tokens)[:, None]
        y.index_copy_(0, tokens.long(), scaled)
    return y


def both_experts(x: Tensor, *rest: Any) -> Tensor:
    dense_weight, shift_weight, dense_bias, shift_bias, gate, index, count = rest
    shift = mask_from_index(index[1:], count[1:], x.shape[0])[0, :, None]
    y = torch.where(shift, F.linear(x, shift_weight, shift_bias), F.linear(x, dense_weight, dense_bias))
    result: Tensor = y * gate[:, None]
    return result


def _route(tokens: int, *, quick: bool = False) -> Case:
    return Case(
        "moe_route",
        f"{tokens} tokens",
        torch.float32,
        lambda rand: (rand.normal(tokens, 2),),
        {
            "eager": plain(route_by_nonzero),
            "dense": {
                "softmax": plain(route_by_nonzero),
                "difference": plain(route_by_difference),
                "running count": plain(route_by_count),
            },
        },
        lambda rand: (rand.normal(9, 2),),
        gradients=(0,),
        quick=quick,
        overhead=quick,
    )


def _linear(tokens: int, k: int, n: int, *, quick: bool = False) -> Case:
    def args(rand: Random, tokens: int, k: int, n: int) -> Args:
        shift = torch.exp2((rand.normal(n, k) - 3).round()) * (2.0 * rand.mask(n, k, 0.5) - 1)
        chosen = rand.uniform(tokens) < 0.6  # the share of equal times for latencies of 6 and 4
        return (
            rand.normal(tokens, k),
            rand.normal(n, k) / 8,
            shift,
            rand.normal(n),
            rand.normal(n),
            0.5 + 0.5 * rand.uniform(tokens),
            *compact(torch.stack([~chosen, chosen])),
        )

    return Case(
        "moe2_linear",
        f"{tokens} tokens {k}->{n}",
        torch.float32,
        lambda rand: args(rand, tokens, k, n),
        {"eager": plain(dispatcher), "dense": {"sparse": plain(expert_by_expert), "both": plain(both_experts)}},
        lambda rand: args(rand, 9, 5, 7),
        gradients=(0, 1, 2, 3, 4, 5),
        quick=quick,
        overhead=quick,
    )


CASES = [
    _route(3136, quick=True),
    _route(100352),
    _linear(3136, 64, 64, quick=True),
    _linear(3136, 128, 128),
    _linear(3136, 256, 256),
    _linear(3136, 512, 512),
    _linear(3136, 64, 512),
]
