# SPDX-License-Identifier: Apache-2.0
"""The protocol of the methods, tried on the smallest method that has state, a schedule and something to finalize."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cofire.methods import METHODS, Method, Report
from methods.protocol import check_protocol


@dataclass(frozen=True)
class Density(Report):
    density: float


@dataclass(frozen=True)
class MagnitudeDecay(Method):
    """An L1 penalty that grows with the steps; at the end, small weights become zero."""

    rate: float = 1e-3
    threshold: float = 0.05

    def prepare(self, model: nn.Module) -> nn.Module:
        if "decay_steps" in model._buffers:
            raise ValueError("MagnitudeDecay.prepare: the model is prepared already")
        model = copy.deepcopy(model)
        model.register_buffer("decay_steps", torch.zeros((), dtype=torch.int64))
        return model

    def loss(self, model: nn.Module, output: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        size = torch.stack([p.abs().sum() for p in model.parameters()]).sum()
        return self.rate * (1 + self._steps(model, "loss")) * size

    def step(self, model: nn.Module) -> None:
        self._steps(model, "step").add_(1)

    def finalize(self, model: nn.Module) -> nn.Module:
        self._steps(model, "finalize")
        model = copy.deepcopy(model).eval()
        del model.decay_steps
        model.was_finalized = True
        for p in model.parameters():
            p.data = p.data * (p.data.abs() > self.threshold)
        return model

    def report(self, model: nn.Module, batches: Iterable[Any]) -> Density:
        self._steps(model, "report")
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return Density(float((weights.abs() > self.threshold).float().mean()))

    def _steps(self, model: nn.Module, where: str) -> Tensor:
        for module in model.modules():  # the root may be wrapped
            if "decay_steps" in module._buffers:
                return module.decay_steps
        state = "is finalized already" if hasattr(model, "was_finalized") else "has no state; call prepare(model) first"
        raise ValueError(f"MagnitudeDecay.{where}: the model {state}")


def tiny_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))


BATCH = (torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4)


@pytest.mark.parametrize("check", check_protocol(MagnitudeDecay, tiny_network, BATCH))
def test_protocol(check):
    check()


def test_methods_by_name():
    assert METHODS["ftwt"].name == "ftwt"
    with pytest.raises(KeyError, match="no method named 'ftw'; did you mean 'ftwt'"):
        METHODS["ftw"]
    with pytest.raises(KeyError, match=r"no method named 'zzz'; there are .*'ftwt'"):
        METHODS["zzz"]


def test_a_method_with_a_name_is_entered():
    before = dict(METHODS)
    try:

        class Named(MagnitudeDecay, name="named"):
            pass

        assert METHODS["named"] is Named
    finally:
        METHODS.clear()
        METHODS.update(before)
    assert MagnitudeDecay not in METHODS.values()


def test_hyperparameters_are_frozen():
    with pytest.raises(AttributeError):
        MagnitudeDecay().rate = 1.0
