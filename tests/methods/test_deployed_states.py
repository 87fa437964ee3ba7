# SPDX-License-Identifier: Apache-2.0
"""What the methods of few bits deploy is a state of tensors: safetensors holds it, and a model of other weights takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from cofire import models
from cofire.methods import OFQ, QLoRA
from cofire.nn import FakeQuantize, LSQLinear

X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    return models.vit(image=8, patch=4, width=16, depth=1, heads=2, in_channels=1, num_classes=4)


def trained(method: Any, model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(X)
        (output.square().mean() + method.loss(model, output)).backward()
        optimizer.step()
        method.step(model)
    return model


def ofq(**options: Any) -> nn.Module:
    method = OFQ(**options)
    return method.finalize(trained(method, method.prepare(vit(), X).train())).eval()


def qlora() -> nn.Module:
    method = QLoRA(group_size=16)
    return method.finalize(trained(method, method.prepare(vit()).train())).eval()


class Flat(nn.Module):
    """Layers of LSQ, deployed, and a quantiser with a seed."""

    def __init__(self) -> None:
        super().__init__()
        layer, grouped = LSQLinear(64, 32, activation_bits=8), LSQLinear(32, 4, per="group", group_size=16)
        self.layers = nn.Sequential(layer, FakeQuantize("group", group_size=32, stochastic=True), grouped)
        self.layers(X.flatten(1))
        self.layers[0], self.layers[2] = layer.finalize(), grouped.finalize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x.flatten(1))
        return y


MADE: dict[str, Callable[[], nn.Module]] = {
    "ofq": ofq,
    "ofq, learned scales": lambda: ofq(weights="lsq", weight_bits=3),
    "qlora": qlora,
    "lsq": lambda: Flat().train(),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_deployed_goes_through_safetensors(name: str) -> None:
    model, other = MADE[name](), MADE[name]()
    others = other(X).detach()
    state = safetensors.torch.load(safetensors.torch.save(model.state_dict()))
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    with torch.no_grad():
        assert torch.equal(other(X), model(X)) and not torch.equal(others, model(X))
