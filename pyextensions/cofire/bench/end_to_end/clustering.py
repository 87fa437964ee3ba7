# SPDX-License-Identifier: Apache-2.0
"""Recommenders whose weights are labels of a few bits, and a palette for each layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cofire.bench.end_to_end import recommender
from cofire.bench.end_to_end.dense import dense_forms
from cofire.bench.end_to_end.network import RANDOM_WEIGHTS, Network, Variant, compressed
from cofire.bench.end_to_end.recommender import Recommender
from cofire.methods import EDKM

BITS = (3, 2)


def trained(plan: Recommender, *, epochs: int = 5, throughput: int = 64) -> Network:
    """Trained dense, then with clustered weights."""

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        dense = plan.network(seed, share)
        rounds = max(1, round(share * epochs))
        found = dense_forms(dense)
        for bits in BITS:
            method = EDKM(bits=bits, total_steps=plan.steps(rounds))
            model = plan.fit(method.prepare(dense), rounds, plan.lr / 4, seed + 1, method)
            found[f"eDKM, {bits} bits"] = compressed(method.finalize(model))
        return found

    return Network(
        family="clustering",
        name=plan.shape,
        data=recommender.DATA,
        build=build,
        inputs=plan.inputs,
        unit="users/s",
        batch=throughput,
        latency_of="one user",
        evaluate=plan.score,
        accuracy_kind=recommender.KIND,
    )


def random(items: int = 4096, width: int = 4096, *, throughput: int = 64) -> Network:
    """One whose weights are in no cache."""

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        torch.manual_seed(seed)
        dense = recommender.perceptron(items, width).eval().requires_grad_(False)
        found = dense_forms(dense)
        for bits in BITS:
            method = EDKM(bits=bits)
            found[f"k-means, {bits} bits"] = compressed(method.finalize(method.prepare(dense).eval()))
        return found

    return Network(
        family="clustering",
        name=f"MLP recommender, {items}-{width}-{width}-{items}",
        data=RANDOM_WEIGHTS,
        build=build,
        inputs=lambda n: recommender.random_uses(n, items),
        unit="users/s",
        batch=throughput,
        latency_of="one user",
    )


NETWORKS = [trained(Recommender()), random()]
