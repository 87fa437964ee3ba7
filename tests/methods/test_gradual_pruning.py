# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning: the schedule, what is pruned, what stays pruned, and the protocol of the methods."""

from __future__ import annotations

import copy
import doctest
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cofire import optim
from cofire.methods import GradualPruning
from cofire.nn import Compressed, SparseLinear, masks
from methods.protocol import check_protocol

torch.manual_seed(0)
BATCH = (torch.randn(8, 2, 6, 6), torch.randint(4, (8,)))


def network() -> nn.Module:
    """A convolution, a batch norm and two linear layers, of which the last stays dense."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.ReLU(),
        nn.Linear(16, 4),
    )  # fmt: skip


def method() -> GradualPruning:
    """Each check of the protocol takes a few steps: the masks change with each."""
    return GradualPruning(density=0.25, begin=0, end=4, every=1)


#: All but the check that a method's own loss trains something: this method's loss is zero by design.
PROTOCOL = [check for check in check_protocol(method, network, BATCH) if check.id != "loss_reaches_something"]


@pytest.mark.parametrize("check", PROTOCOL)
def test_protocol(check: Callable[[], None]) -> None:
    check()


def train(method: GradualPruning, model: nn.Module, steps: int, optimizer: Any = None, each: Any = None) -> nn.Module:
    optimizer = optimizer or optim.MaskedAdamW(model.parameters(), lr=1e-2, model=model)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
        optimizer.step()
        method.step(model)
        if each is not None:
            each()
    return model


def densities(model: nn.Module) -> list[float]:
    return [layer.density() for _, layer in masks(model)]


def test_the_schedule_is_the_papers() -> None:
    pruning = GradualPruning(sparsity=0.9, begin=10, end=110, every=10)
    for t in (10, 20, 60, 110):
        sparsity = 0.9 + (0.0 - 0.9) * (1 - (t - 10) / 100) ** 3  # equation 1
        assert 1 - pruning.density_at(t) == pytest.approx(sparsity)
    assert pruning.density_at(3) == 1.0
    assert pruning.density_at(500) == pytest.approx(0.1)


def test_masks_shrink_only_and_pruned_weights_stay_zero() -> None:
    """Under an optimiser whose momentum would move them, too."""
    pruning = GradualPruning(density=0.1, begin=1, end=9, every=2)
    for build in (None, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)):
        model = pruning.prepare(network())
        before = {name: layer.mask for name, layer in masks(model)}
        assert densities(model) == [1.0, 1.0]
        seen = []

        def look(model: nn.Module = model, before: dict[str, Any] = before, seen: list[Any] = seen) -> None:
            for name, layer in masks(model):
                assert not (layer.mask & ~before[name]).any()
                before[name] = layer.mask
            optim.check_invariant(model)
            seen.append(densities(model)[1])

        train(pruning, model, 12, build(model.parameters()) if build else None, look)
        assert seen[0] == seen[1] == 1.0 and seen[3] == seen[2] and seen[5] == seen[4]
        expected = [round(144 * pruning.density_at(t)) / 144 for t in (3, 5, 7, 9)]
        assert [seen[2], seen[4], seen[6], seen[8]] == pytest.approx(expected)
        assert seen[-1] == seen[8]
        assert isinstance(model[-1], nn.Linear) and not isinstance(model[-1], SparseLinear)


def test_what_is_kept_is_the_largest() -> None:
    pruning = GradualPruning(density=0.5, begin=0, end=1, every=1, scope="tensor")
    model = pruning.prepare(network())
    for _, layer in masks(model):
        layer.weight.grad = torch.zeros_like(layer.weight)
    old = [layer.weight.detach().clone() for _, layer in masks(model)]
    pruning.step(model)
    for (_, layer), w in zip(masks(model), old, strict=True):
        keep = round(0.5 * w.numel())
        cut = w.abs().flatten().sort(descending=True).values[keep - 1]
        assert torch.equal(layer.mask, w.abs() >= cut)
        assert torch.equal(layer.weight, torch.where(layer.mask, w, 0.0))


def test_global_scope_and_scores() -> None:
    model = GradualPruning(density=0.2, begin=0, end=2, every=1, scope="global").prepare(network())
    train(GradualPruning(density=0.2, begin=0, end=2, every=1, scope="global"), model, 2)
    kept = sum(int(layer.mask.sum()) for _, layer in masks(model))
    assert kept == round(0.2 * sum(layer.weight.numel() for _, layer in masks(model)))
    assert len(set(densities(model))) == 2  # one order for both

    taylor = GradualPruning(density=0.5, end=1, every=1, score="taylor", scope="tensor")
    model = taylor.prepare(network())
    with pytest.raises(ValueError, match=r"^GradualPruning.step: score 'taylor' needs the gradient of '0', got None"):
        taylor.step(model)
    model = taylor.prepare(network())
    old = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
    optimizer.step()
    old = {name: (layer.weight * layer.weight.grad).abs().detach() for name, layer in masks(model)}
    taylor.step(model)
    for name, layer in masks(model):
        assert old[name][layer.mask].min() >= old[name][~layer.mask].max()

    own = GradualPruning(density=0.5, end=1, every=1, score=lambda layer: -layer.weight.abs(), scope="tensor")
    model = own.prepare(network())
    old = {name: layer.weight.detach().abs() for name, layer in masks(model)}
    own.step(model)
    for name, layer in masks(model):
        assert old[name][layer.mask].max() <= old[name][~layer.mask].min()


def test_pattern() -> None:
    pruning = GradualPruning(pattern="2:4", begin=0, end=3, every=1, exclude=["0"])
    model = train(pruning, pruning.prepare(network()), 3)
    (layer,) = (layer for _, layer in masks(model))
    assert (layer.mask.view(16, 36, 4).sum(2) == 2).all()
    sentence = r"pattern '2:4' needs rows of a multiple of 4 weights, got 18 in '0' .*; pad=True lets"
    with pytest.raises(ValueError, match=sentence):
        GradualPruning(pattern="2:4").prepare(network())


def test_pattern_with_a_shorter_last_group() -> None:
    pruning = GradualPruning(pattern="2:8", begin=0, end=3, every=1, pad=True)
    model = train(pruning, pruning.prepare(network()), 3)
    first, second = (layer.mask.flatten(1) for _, layer in masks(model))
    assert [group.sum(1).unique().tolist() for group in first.split(8, 1)] == [[2], [2], [2]]
    assert second.view(16, 18, 8).sum(2).unique().tolist() == [2]
    report = pruning.report(model, [BATCH])
    assert report.deployed_error is not None and report.deployed_error < 1e-5


def gradients(model: nn.Module) -> None:
    model.zero_grad()
    F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()


@pytest.mark.parametrize(
    "score", ["taylor", "fisher", "magnitude_gradient", lambda layer: (layer.weight * layer.weight.grad).abs()]
)
@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_overflow_prunes_nothing_and_the_next_step_makes_up_for_it(score: Any, scope: str, value: float) -> None:
    """Even if it is the last update's; and after saving and loading."""
    pruning = GradualPruning(density=0.25, begin=0, end=2, every=2, score=score, scope=scope)
    model = pruning.prepare(network())
    gradients(model)
    pruning.step(model)
    gradients(model)
    model[4].weight.grad[0, 0] = value
    pruning.step(model)
    assert densities(model)[1] == 1.0
    assert (densities(model)[0] == 1.0) == (scope == "global")  # there all layers are in one order
    other = pruning.prepare(network())
    other.load_state_dict(model.state_dict())
    gradients(other)
    pruning.step(other)
    kept = sum(int(layer.mask.sum()) for _, layer in masks(other))
    assert kept == (4 * round(0.25 * 18) + 576 if scope == "row" else round(0.25 * (72 + 2304)))
    before = [layer.mask for _, layer in masks(other)]
    gradients(other)
    pruning.step(other)
    assert all(torch.equal(layer.mask, mask) for (_, layer), mask in zip(masks(other), before, strict=True))


@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_what_was_missed_is_made_up_for_there_alone(scope: str) -> None:
    """At the density of the update that was missed; with one order for all layers, in all of them."""
    pruning = GradualPruning(density=0.1, begin=0, end=9, every=3, score="taylor", scope=scope)
    model = pruning.prepare(network())
    layers = [layer for _, layer in masks(model)]
    for _ in range(3):
        gradients(model)
        if int(layers[0].steps_taken) == 2:
            layers[1].weight.grad[0, 0] = torch.nan
        pruning.step(model)
    assert [bool(layer.update_missed) for layer in layers] == [scope == "global", True]
    first = layers[0].mask
    gradients(model)
    pruning.step(model)
    assert not any(bool(layer.update_missed) for layer in layers)
    assert torch.equal(layers[0].mask, first) == (scope != "global")
    aim = pruning.density_at(3)
    if scope == "row":
        assert densities(model) == [round(aim * 18) / 18, round(aim * 144) / 144]
    else:
        weights = [layer.weight.numel() for layer in layers]
        kept = [int(layer.mask.sum()) for layer in layers]
        assert (
            sum(kept) == round(aim * sum(weights)) if scope == "global" else kept == [round(aim * n) for n in weights]
        )
    seen = [layer.mask for layer in layers]
    gradients(model)
    pruning.step(model)  # nothing is due
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers, seen, strict=True))


def test_states_that_know_nothing_of_missed_updates_are_loaded() -> None:
    """Into a layer that had missed one, too; and so are pickles of whole models from before. What else lacks is named."""
    pruning = GradualPruning(density=0.25, begin=0, end=2, every=2, score="taylor")
    model = pruning.prepare(network())
    old = {n: t for n, t in model.state_dict().items() if not n.endswith("update_missed")}
    assert len(old) == len(model.state_dict()) - 2
    other = copy.deepcopy(model)
    for _, layer in masks(other):
        layer.update_missed.fill_(True)
    other.load_state_dict(old)
    assert not any(bool(layer.update_missed) for _, layer in masks(other))
    with pytest.raises(RuntimeError, match="Missing key.*4.steps_taken"):
        other.load_state_dict({n: t for n, t in old.items() if n != "4.steps_taken"})
    for _, layer in masks(other):
        del layer.update_missed
    for _ in range(2):
        gradients(other)
        pruning.step(other)
    assert densities(other) == [round(0.25 * 18) / 18, 0.25]


def test_what_is_not_finite_is_named() -> None:
    pruning = GradualPruning(density=0.5, end=1, every=1)
    model = pruning.prepare(network())
    model[4].weight.data[1, 2] = torch.inf
    with pytest.raises(
        ValueError, match=r"^GradualPruning.step: the weight of '4' must be finite, got 1 NaN or infinite of 2304"
    ):
        pruning.step(model)
    own = GradualPruning(density=0.5, end=1, every=1, score=lambda layer: layer.weight / 0)
    model = own.prepare(network())
    with pytest.raises(
        ValueError, match=r"^GradualPruning.step: the score of '0' must be finite, got 72 NaN or infinite of 72"
    ):
        own.step(model)
    fisher = GradualPruning(density=0.5, end=1, every=1, score="fisher")
    model = fisher.prepare(network())
    gradients(model)
    model[0].weight.grad.fill_(1e30)  # finite, and its square is not
    with pytest.raises(ValueError, match=r"^GradualPruning.step: the score of '0' must be finite, got 72"):
        fisher.step(model)


def test_report_and_deployment() -> None:
    pruning = GradualPruning(density=0.1, end=2, every=1)
    model = train(pruning, pruning.prepare(network()), 2)
    report = pruning.report(model, [BATCH])
    assert report.steps == 2
    assert report.kept == sum(layer.kept for layer in report.layers) == round(0.1 * 18) * 4 + round(0.1 * 144) * 16
    assert report.packed_bytes < report.dense_bytes / 2
    layers = [layer for layer in pruning.finalize(model).modules() if isinstance(layer, Compressed)]
    stored = [t for layer in layers for name, t in layer.state_dict().items() if name != "bias"]
    assert len(layers) == 2 and report.packed_bytes == sum(t.nbytes for t in stored), "what is saved, and no more"
    assert report.deployed_error is not None and report.deployed_error < 1e-5


def test_begin_density() -> None:
    pruning = GradualPruning(density=0.1, begin_density=0.5, scope="tensor")
    assert densities(pruning.prepare(network())) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({}, ValueError, "GradualPruning: exactly one of density, sparsity and pattern must be given, got 0"),
        ({"density": 0.0}, ValueError, "GradualPruning: density must be in (0, 1], got 0.0"),
        ({"sparsity": 1.0}, ValueError, "GradualPruning: sparsity must be in [0, 1), got 1.0"),
        ({"density": 0.1, "end": 0}, ValueError, "GradualPruning: end must be at least 1, got 0"),
        ({"density": 0.1, "begin": 9, "end": 9}, ValueError,
         "GradualPruning: begin must be less than end, got 9 and 9"),
        ({"density": 0.1, "every": 1.5}, TypeError, "GradualPruning: every must be an integer, got 1.5"),
        ({"density": 0.1, "score": "size"}, ValueError,
         "GradualPruning: score must be one of magnitude, taylor, fisher, magnitude_gradient, got 'size'"),
        ({"density": 0.1, "pad": True}, ValueError,
         "GradualPruning: pad must be False where there is no pattern N:M, got True"),
        ({"pattern": "16x1"}, ValueError, "GradualPruning: pattern must be like '2:4', got '16x1'"),
        ({"density": 0.1, "exclude": "0"}, TypeError,
         "GradualPruning: exclude must be a sequence of names or patterns, got '0'"),
    ],
)  # fmt: skip
def test_refusal(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        GradualPruning(**options)
    assert str(caught.value) == sentence


def test_examples() -> None:
    failed, tried = doctest.testmod(importlib.import_module("cofire.methods.gradual_pruning"))
    assert tried and not failed
