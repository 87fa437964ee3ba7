# SPDX-License-Identifier: Apache-2.0
"""QLoRA: what is quantised and what is trained, what is deployed, and the protocol of the methods."""

from __future__ import annotations

import copy
import doctest
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.methods import METHODS, QLoRA
from cofire.nn import LoRALinear, QLoRALinear, QuantLinear, hessians, quantize_
from helpers import stored_bytes
from methods.protocol import check_protocol

torch.manual_seed(0)
BATCH = (torch.randn(8, 2, 6, 6), torch.randint(4, (8,)))


def network() -> nn.Module:
    """A convolution, a batch norm and three linear layers."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 24, bias=False),
        nn.ReLU(),
        nn.Linear(24, 4),
    )


def method(**changes: Any) -> QLoRA:
    return QLoRA(**{"rank": 3, "group_size": 8, **changes})


#: All but the check that a method's own loss trains something: this method's loss is zero by design.
PROTOCOL = [check for check in check_protocol(method, network, BATCH) if check.id != "loss_reaches_something"]


@pytest.mark.parametrize("check", PROTOCOL)
def test_protocol(check: Callable[[], None]) -> None:
    check()


def train(model: nn.Module, steps: int = 30) -> list[float]:
    x, y = BATCH
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y) + method().loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_only_the_low_rank_terms_learn() -> None:
    model = method().prepare(network().eval())
    assert [n for n, m in model.named_modules() if isinstance(m, QLoRALinear)] == ["4", "6", "8"]
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    before = {n: v.clone() for n, v in model.state_dict().items() if "lora" not in n}
    losses = train(model)
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items())


def test_without_a_method_weights_stay_and_terms_learn() -> None:
    """LoRA."""
    dense, m = network().eval(), method(method=None)
    model = m.prepare(dense)
    layers = {n: x for n, x in model.named_modules() if isinstance(x, LoRALinear)}
    assert list(layers) == ["4", "6", "8"] and not any(
        isinstance(x, (QLoRALinear, QuantLinear)) for x in model.modules()
    )
    with torch.no_grad():
        assert torch.equal(model(BATCH[0]), dense(BATCH[0]))
    losses = train(model)
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(x.base.weight, dense.get_submodule(n).weight) for n, x in layers.items())
    report = m.report(model)
    assert report.packed_bytes == report.dense_bytes and report.bits_per_weight == 32
    assert report.model_dense_bytes == stored_bytes(dense) and report.model_packed_bytes == stored_bytes(model)
    with torch.no_grad():
        merged = m.finalize(model, merge=True)
        assert [type(merged[i]) for i in (4, 6, 8)] == [nn.Linear] * 3 and stored_bytes(merged) == stored_bytes(dense)
        torch.testing.assert_close(merged(BATCH[0]), model(BATCH[0]), rtol=1e-4, atol=1e-5)
    quantised = m.prepare(quantize_(copy.deepcopy(dense), "nf4", group_size=8))
    assert all(isinstance(quantised[i], QLoRALinear) for i in (4, 6, 8))


def test_it_starts_as_the_quantised_network() -> None:
    dense = network().eval()
    model = method().prepare(dense)
    expected = quantize_(copy.deepcopy(dense), "nf4", group_size=8)
    with torch.no_grad():
        torch.testing.assert_close(model(BATCH[0]), expected(BATCH[0]), rtol=1e-5, atol=1e-5)


def test_a_quantised_network_is_taken_as_it_is() -> None:
    dense = network().eval()
    found = hessians(dense, [BATCH[0]])
    quantised = quantize_(copy.deepcopy(dense), "gptq", bits=3, group_size=8, hessians=found)
    model = method().prepare(quantised)
    assert all(m.base.bits == 3 for m in model.modules() if isinstance(m, QLoRALinear))
    with torch.no_grad():
        torch.testing.assert_close(model(BATCH[0]), quantised(BATCH[0]), rtol=1e-5, atol=1e-5)


def test_what_is_deployed() -> None:
    model = method().prepare(network().eval())
    train(model)
    with torch.no_grad():
        trained = model(BATCH[0])
        beside, merged = method().finalize(model), method(method="absmax", bits=8).finalize(model, merge=True)
        assert torch.equal(beside(BATCH[0]), trained)
        assert not any(p.requires_grad for p in beside.parameters()) and not beside.training
        layers = [m for m in merged.modules() if isinstance(m, QuantLinear)]
        assert len(layers) == 3 and not any(isinstance(m, QLoRALinear) for m in merged.modules())
        torch.testing.assert_close(merged(BATCH[0]), trained, rtol=0.05, atol=0.05 * float(trained.std()))
        assert layers[0].bias is not None and layers[1].bias is None
    with pytest.raises(ValueError, match=r"QLoRA\.finalize: the model has no low-rank terms"):
        method().finalize(merged)


def test_skipped_and_tied_layers_stay_dense() -> None:
    model = method(skip=["8"]).prepare(network())
    assert type(model[8]) is nn.Linear and not model[8].weight.requires_grad

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.hidden, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.hidden(self.embed(x))))

    tied = method().prepare(Tied())
    assert tied.head.weight is tied.embed.weight and isinstance(tied.hidden, QLoRALinear)


def test_report_counts_bytes() -> None:
    dense = network()
    model = method().prepare(dense)
    report = method().report(model)
    weights = 32 * 24 + 24 * 24 + 24 * 4
    assert report.layers == 3 and report.dense_bytes == 4 * weights
    table = 3 * 16 * 4
    assert report.packed_bytes == weights // 2 + 4 * weights // 8 + table
    assert report.bits_per_weight == pytest.approx(8 * report.packed_bytes / weights)
    assert report.low_rank_bytes == 4 * 3 * (32 + 24 + 24 + 24 + 24 + 4) == 4 * report.trained
    assert report.model_dense_bytes == stored_bytes(dense)
    assert report.model_packed_bytes == stored_bytes(model)
    assert method().report(method().finalize(model)).trained == 0


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: QLoRA(rank=0), ValueError, "QLoRA: rank must be at least 1, got 0"),
        (lambda: QLoRA(rank=1.5), TypeError, "QLoRA: rank must be an integer, got 1.5"),
        (lambda: QLoRA(alpha="x"), TypeError, "QLoRA: alpha must be a number, got 'x'"),
        (lambda: QLoRA(method="nf5"), ValueError, "QLoRA: there is no method 'nf5'; did you mean 'nf4'?"),
        (lambda: QLoRA(method="gptq"), ValueError, "QLoRA: the method 'gptq' needs Hessians: quantise with quantize_"),
        (lambda: QLoRA(skip="head"), TypeError, "QLoRA: skip must be a sequence of names or patterns, got 'head'"),
        (lambda: QLoRA().prepare("x"), TypeError, "QLoRA.prepare: model must be a torch.nn.Module, got str"),
        (
            lambda: method(skip=["9"]).prepare(network()),
            ValueError,
            "QLoRA.prepare: skip names '9', which fits no linear layer",
        ),
        (
            lambda: method(skip=["*"]).prepare(network()),
            ValueError,
            "QLoRA.prepare: the model has no linear layer (tied ones stay dense) that skip leaves",
        ),
        (
            lambda: QLoRA(group_size=16).prepare(network()),
            ValueError,
            "QLoRA.prepare: layer '6': quantize_weight: group_size must be positive and divide the 24 columns, got 16",
        ),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(sentence)


def test_it_is_known_by_its_name() -> None:
    assert METHODS["qlora"] is QLoRA


def test_the_examples_of_the_docstrings() -> None:
    results = doctest.testmod(importlib.import_module("cofire.methods.qlora"))
    assert results.attempted > 0 and results.failed == 0
