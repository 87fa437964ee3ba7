# SPDX-License-Identifier: Apache-2.0
"""RigL and SET: densities, what moves, what grows, and the protocol of the methods."""

from __future__ import annotations

import copy
import doctest
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import optim
from cofire.methods import RigL
from cofire.methods.rigl import erdos_renyi_kernel
from cofire.nn import masks
from methods.protocol import check_protocol

torch.manual_seed(0)
BATCH = (torch.randn(8, 2, 6, 6), torch.randint(4, (8,)))


def network() -> nn.Module:
    """A convolution, a batch norm and two linear layers, of which the last stays dense."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.ReLU(),
        nn.Linear(16, 4),
    )  # fmt: skip


def method() -> RigL:
    """Each check of the protocol takes a few steps: the masks move with each."""
    return RigL(density=0.25, every=1, end=100)


def random() -> RigL:
    return RigL(density=0.25, distribution="uniform", grow="random", every=1, end=100)


def protocol(method: Callable[[], RigL]) -> list[Any]:
    """All but the check that a method's own loss trains something: this method's loss is zero by design."""
    return [check for check in check_protocol(method, network, BATCH) if check.id != "loss_reaches_something"]


#: Where random growth, whose layers are of another mode, could go another way.
DIFFERENT = ("training_resumes_exactly", "compiles_without_a_break", "finalized_model_stands_alone")


@pytest.mark.parametrize("check", protocol(method))
def test_protocol(check: Callable[[], None]) -> None:
    check()


@pytest.mark.full
@pytest.mark.parametrize("check", [check for check in protocol(random) if check.id in DIFFERENT])
def test_protocol_of_random_growth(check: Callable[[], None]) -> None:
    check()


def backward(model: nn.Module) -> None:
    model.zero_grad()
    F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()


def test_densities() -> None:
    """The kernel's rule by hand, over all layers the density that was asked for, and no layer above one."""
    shapes = {"conv": (64, 3, 3, 3), "wide": (512, 512), "narrow": (512, 16)}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for density in (0.02, 0.1, 0.5, 1.0):
        found = erdos_renyi_kernel(shapes, density)
        assert max(found.values()) <= 1 + 1e-9
        assert sum(found[n] * sizes[n] for n in shapes) == pytest.approx(density * sum(sizes.values()))
    found = erdos_renyi_kernel(shapes, 0.02)
    assert max(found.values()) < 1
    ratio = (512 + 512) / sizes["wide"] / ((512 + 16) / sizes["narrow"])
    assert found["wide"] / found["narrow"] == pytest.approx(ratio)
    for distribution in ("erdos_renyi_kernel", "uniform"):
        model = RigL(density=0.25, distribution=distribution).prepare(network())
        kept = sum(int(layer.mask.sum()) for _, layer in masks(model))
        assert abs(kept - 0.25 * (4 * 18 + 16 * 144)) <= 1
        optim.check_invariant(model)
    assert {round(layer.density(), 2) for _, layer in masks(model)} == {0.25}


def test_first_masks_follow_the_seed() -> None:
    first, same, other = (
        [layer.mask for _, layer in masks(RigL(density=0.25, seed=s).prepare(network()))] for s in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[1], other[1])


def test_gradients_are_those_of_the_dense_layer() -> None:
    """At pruned entries too, of the weight with zeros."""
    model = method().prepare(network())
    dense = copy.deepcopy(network())
    with torch.no_grad():
        for name, p in dense.named_parameters():
            p.copy_(model.get_parameter(name))
    for network_ in (model, dense):
        backward(network_)
    for name, p in dense.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad)


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_the_least_leave_and_the_steepest_come(grow: str) -> None:
    rigl = RigL(density=0.25, every=2, end=100, grow=grow)
    model = rigl.prepare(network())
    optimizer = optim.MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, model=model)
    before = {name: layer.mask for name, layer in masks(model)}
    for step in (1, 2):
        backward(model)
        optimizer.step()
        trained = {name: layer.weight.detach().clone() for name, layer in masks(model)}
        rigl.step(model)
        if step == 1:
            assert all(torch.equal(layer.mask, before[name]) for name, layer in masks(model))
    for name, layer in masks(model):
        dropped, grown = before[name] & ~layer.mask, layer.mask & ~before[name]
        expected = int(rigl.share_at(2) * int(before[name].sum()))
        assert dropped.sum() == grown.sum() == expected
        assert not layer.weight[~layer.mask].any() and not layer.weight[grown].any()
        w, g = trained[name].abs(), layer.weight.grad.abs()
        if expected:
            assert w[dropped].max() <= w[before[name] & layer.mask].min()
            if grow == "gradient":
                assert g[grown].min() >= g[~before[name] & ~layer.mask].max()
    optim.check_invariant(model)


def test_the_share_falls_along_a_cosine_and_ends() -> None:
    rigl = RigL(density=0.25, every=1, end=3)
    assert rigl.share_at(0) == 0.3
    assert rigl.share_at(1) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    model = rigl.prepare(network())
    seen: list[list[Tensor]] = []
    for _ in range(5):
        backward(model)
        rigl.step(model)
        seen.append([layer.mask for _, layer in masks(model)])
    assert not torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[2][1], seen[1][1])
    assert torch.equal(seen[4][1], seen[1][1])


def test_another_optimisers_moments() -> None:
    """Pruned weights are zero after each step, and moments where the mask changed, if it is given."""
    rigl = method()
    model = rigl.prepare(network())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    before = model[4].mask
    backward(model)
    optimizer.step()
    rigl.step(model, optimizer)
    optim.check_invariant(model)
    changed = before ^ model[4].mask
    assert changed.any()
    assert not optimizer.state[model[4].weight]["exp_avg"][changed].any()
    assert optimizer.state[model[4].weight]["exp_avg"][~changed].any()


def test_an_overflow_moves_nothing_and_a_missing_gradient_is_named() -> None:
    model = method().prepare(network())
    before = model[4].mask
    backward(model)
    model[4].weight.grad[0, 0] = torch.inf
    method().step(model)
    assert torch.equal(model[4].mask, before)
    model.zero_grad()
    with pytest.raises(ValueError, match=r"^RigL.step: growth needs the gradient of '0', got None"):
        method().step(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rigl", [method(), random()])
def test_a_weight_that_is_not_finite_is_named(rigl: RigL, value: float) -> None:
    model = rigl.prepare(network())
    backward(model)
    layer = model[0]
    layer.weight.data[layer.mask] = value
    kept = int(layer.mask.sum())
    with pytest.raises(
        ValueError, match=rf"^RigL.step: the weight of '0' must be finite, got {kept} NaN or infinite of 72"
    ):
        rigl.step(model)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"density": 0.0}, ValueError, "RigL: density must be in (0, 1], got 0.0"),
        ({"alpha": 2.0}, ValueError, "RigL: alpha must be in (0, 1], got 2.0"),
        ({"grow": "least"}, ValueError, "RigL: grow must be one of gradient, random, got 'least'"),
        ({"distribution": "er"}, ValueError,
         "RigL: distribution must be one of erdos_renyi_kernel, uniform, got 'er'"),
        ({"every": 0}, ValueError, "RigL: every must be at least 1, got 0"),
        ({"seed": 1 << 31}, ValueError, "RigL: seed must be less than 2^31, got 2147483648"),
    ],
)  # fmt: skip
def test_refusal(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        RigL(**options)
    assert str(caught.value) == sentence


def test_examples() -> None:
    failed, tried = doctest.testmod(importlib.import_module("cofire.methods.rigl"))
    assert tried and not failed
