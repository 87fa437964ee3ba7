# SPDX-License-Identifier: Apache-2.0
"""Recommenders that hold a part of their weights. The operators of ``selection`` choose which."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cofire.bench.end_to_end import recommender
from cofire.bench.end_to_end.dense import dense_forms
from cofire.bench.end_to_end.network import RANDOM_WEIGHTS, Network, Variant, compressed
from cofire.bench.end_to_end.recommender import Recommender
from cofire.methods import DSnoT, GradualPruning

DENSITIES = (0.5, 0.1)


def trained(plan: Recommender, *, epochs: int = 8, throughput: int = 64) -> Network:
    """Trained dense; pruned at once without training, or little by little."""

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        dense = plan.network(seed, share)
        found = dense_forms(dense)
        wanda = DSnoT(DENSITIES[0], layers=["*"])
        calibration = plan.uses.train[:512].split(128)
        found[f"DSnoT, {DENSITIES[0]:.0%} kept"] = compressed(wanda.finalize(wanda.prepare(dense, calibration)).eval())
        for density in DENSITIES:
            found[f"gradual pruning, {density:.0%} kept"] = compressed(
                _pruned(plan, dense, density, share, seed, epochs)
            )
        return found

    return Network(
        family="sparse",
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


def _pruned(plan: Recommender, dense: nn.Module, density: float, share: float, seed: int, epochs: int) -> nn.Module:
    rounds = max(1, round(share * epochs))
    end = max(1, 3 * plan.steps(rounds) // 4)
    method = GradualPruning(density, begin=0, end=end, every=max(1, end // 20), include=["*"])
    model = method.prepare(dense)
    plan.fit(model, rounds, plan.lr, seed + 1, method)
    return method.finalize(model)


def random(items: int = 4096, width: int = 4096, *, throughput: int = 64) -> Network:
    """One whose weights are in no cache; a random part of them is kept."""

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        torch.manual_seed(seed)
        dense = recommender.perceptron(items, width).eval().requires_grad_(False)
        return dense_forms(dense) | {f"{d:.0%} kept": compressed(_compressed(dense, d)) for d in DENSITIES}

    return Network(
        family="sparse",
        name=f"MLP recommender, {items}-{width}-{width}-{items}",
        data=RANDOM_WEIGHTS,
        build=build,
        inputs=lambda n: recommender.random_uses(n, items),
        unit="users/s",
        batch=throughput,
        latency_of="one user",
    )


def _compressed(dense: nn.Module, density: float) -> nn.Module:
    method = GradualPruning(density, begin=0, end=1, every=1, include=["*"])
    model = method.prepare(dense)
    method.step(model)
    return method.finalize(model)


NETWORKS = [trained(Recommender()), random()]
