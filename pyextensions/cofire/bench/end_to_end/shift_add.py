# SPDX-License-Identifier: Apache-2.0
"""Vision transformers of additions and shifts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cofire import models
from cofire.bench.cases import Random
from cofire.bench.end_to_end import digits
from cofire.bench.end_to_end.dense import dense_forms
from cofire.bench.end_to_end.network import RANDOM_WEIGHTS, Network, Variant, in_double
from cofire.experiments import training
from cofire.methods import ShiftAddViT

#: By name: the stage. Latencies of the experts are given, so that training does not hang on the machine.
STAGES = {
    "additions": ShiftAddViT(1, anchors=12),
    "additions and shifts": ShiftAddViT(2, anchors=12),
    "additions and a mixture": ShiftAddViT(3, anchors=12, alpha=(6.0, 4.0)),
}
#: A code or an expert at the border may be another one by a rounding of the logit it hangs on.
TOLERANCE, SHARE = 1e-3, 0.75


@dataclass(frozen=True)
class Plan:
    """How the transformer of digits is trained."""

    dense_epochs: int = 20
    epochs: int = 6  #: of each stage
    batch: int = 64
    dense_lr: float = 2e-3
    lr: float = 1e-3
    images: int | None = None


def forms(dense: nn.Module, prepared: Mapping[str, nn.Module]) -> dict[str, Variant]:
    """The dense network in its forms, and what is deployed of each stage: it must compute what the trained one does."""
    found = dense_forms(dense)
    for name, model in prepared.items():
        found[name] = Variant(STAGES[name].finalize(model), in_double(model), TOLERANCE, SHARE)
    return found


def trained(plan: Plan | None = None, *, throughput: int = 64) -> Network:
    """Trained dense on the digits, then stage by stage."""
    chosen = plan or Plan()

    def fit(model: nn.Module, epochs: int, lr: float, seed: int, method: ShiftAddViT | None = None) -> nn.Module:
        groups = [{"params": list(model.parameters()), "lr": lr, "weight_decay": 0.05}]
        if method is not None:
            groups = [g for g in method.parameter_groups(model, lr, router_lr=1e-2) if g["params"]]
        options: dict[str, Any] = {"batch": chosen.batch, "seed": seed, "warm_up": 20, "scheduled": len(groups)}
        training.fit(
            model,
            digits.load(None, chosen.images),
            groups,
            epochs=epochs,
            method=method,
            make=training.adamw,
            **options,
        )
        return model.eval()

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        found = digits.load(None, chosen.images)
        example = found.normalize(found.train[:128])
        dense_epochs, epochs = (max(1, round(share * n)) for n in (chosen.dense_epochs, chosen.epochs))
        torch.manual_seed(seed)
        dense = fit(models.digits_vit(), dense_epochs, chosen.dense_lr, seed)
        prepared: dict[str, nn.Module] = {}
        for name, method in STAGES.items():
            start = prepared.get("additions", dense)
            prepared[name] = fit(method.prepare(start, example), epochs, chosen.lr, seed + 1, method)
        return forms(dense, prepared)

    return Network(
        family="shift_add",
        name="ViT, 4 layers of 64, 16 patches",
        data=digits.DATA,
        build=build,
        inputs=digits.first,
        unit="images/s",
        batch=throughput,
        latency_of="one image",
        evaluate=lambda model: training.accuracy(model, digits.load()),
        accuracy_kind=digits.KIND,
    )


def random(
    image: int = 224, patch: int = 16, width: int = 192, depth: int = 12, heads: int = 3, *, throughput: int = 8
) -> Network:
    """One of the size of DeiT-Tiny."""

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        torch.manual_seed(seed)
        dense = models.vit(image, patch, width=width, depth=depth, heads=heads, ratio=4, num_classes=1000).eval()
        prepared = {name: method.prepare(dense, inputs(2)).eval() for name, method in STAGES.items()}
        return forms(dense, prepared)

    def inputs(n: int) -> Tensor:
        return Random("images").normal(n, 3, image, image)

    return Network(
        family="shift_add",
        name=f"ViT, {depth} layers of {width}, {(image // patch) ** 2} patches",
        data=RANDOM_WEIGHTS,
        build=build,
        inputs=inputs,
        unit="images/s",
        batch=throughput,
        latency_of="one image",
    )


NETWORKS = [trained(), random()]
