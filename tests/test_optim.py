# SPDX-License-Identifier: Apache-2.0
"""Optimisers that know masks: torch's steps on what is kept, zero elsewhere, and state that follows the mask."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cofire import optim
from cofire.ops.packing import pack_bits
from helpers import check_examples

KINDS = {
    "sgd": (optim.MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    "sgd_plain": (optim.MaskedSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "adam": (optim.MaskedAdam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    "adamw": (optim.MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
both_states = pytest.mark.parametrize("sparse_state", [False, True], ids=["dense_state", "sparse_state"])


class Masked(nn.Linear):
    """The convention: a weight, its packed mask, and pruned entries that are zero."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask_bits", pack_bits(mask.to(torch.uint8), 1))
        self.mask = mask
        with torch.no_grad():
            self.weight.masked_fill_(~mask, 0)

    def update(self, mask: Tensor) -> None:
        self.mask_bits.copy_(pack_bits(mask.to(torch.uint8), 1))
        self.mask = mask


def network(density: float = 0.4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Masked(torch.rand(9, 33) < density), nn.ReLU(), nn.Linear(9, 4))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(5, 33, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def made(kind: str, model: nn.Module, **options: Any) -> Any:
    build, _, defaults = KINDS[kind]
    return build(model.parameters(), **defaults, model=model, **options)


@every_kind
@both_states
def test_it_trains_as_torch_does_and_zeros_stay(kind: str, sparse_state: bool) -> None:
    """Against torch's optimiser with the gradient and the weight masked by hand."""
    model, twin = network(), network()
    optimizer, theirs = (
        made(kind, model, sparse_state=sparse_state),
        KINDS[kind][1](twin.parameters(), **KINDS[kind][2]),
    )
    mask = twin[0].mask
    twin[0].weight.register_hook(lambda grad: torch.where(mask, grad, 0.0))
    steps(model, optimizer, range(5))
    steps(twin, theirs, range(5))
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    optim.check_invariant(model)
    assert not model[0].weight[~mask].any()
    for value in optimizer.state[model[0].weight].values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            assert value.numel() == (mask.sum() if sparse_state else mask.numel())


@every_kind
def test_the_form_of_the_state_makes_no_difference(kind: str) -> None:
    """Over changes of the mask too: bit by bit, and a weight that grows begins without moments."""
    models = [network() for _ in range(3)]
    optimizers = [made(kind, m, sparse_state=i == 1, skip_pruned=i == 2) for i, m in enumerate(models)]
    for round, density in enumerate((0.4, 0.7, 0.1, 0.0, 0.5)):
        mask = torch.rand(9, 33, generator=torch.Generator().manual_seed(round)) < density
        for model, optimizer in zip(models, optimizers, strict=True):
            with torch.no_grad():
                grown = mask & ~model[0].mask
                model[0].weight[grown] = 0.01
            if round:
                model[0].update(mask)
            steps(model, optimizer, range(2 * round, 2 * round + 2))
            optim.check_invariant(model)
        for other in models[1:]:
            for a, b in zip(models[0].parameters(), other.parameters(), strict=True):
                assert torch.equal(a, b)


def test_moments_are_zero_at_what_has_grown() -> None:
    model = network()
    optimizer = made("adam", model)
    steps(model, optimizer, range(3))
    before, layer = model[0].mask, model[0]
    swapped = ~before
    layer.update(swapped)
    x = torch.zeros(1, 33)  # no gradient: what moves the new weights would be an old moment
    optimizer.zero_grad()
    model(x).sum().backward()
    assert not layer.weight.grad.any()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    assert not layer.weight.any()


@every_kind
@both_states
def test_training_resumes_exactly(kind: str, sparse_state: bool) -> None:
    through = network()
    optimizer = made(kind, through, sparse_state=sparse_state)
    steps(through, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"model": through.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(through, optimizer, range(2, 4))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for other in (sparse_state, not sparse_state):  # the other form reads it too
        resumed = network(seed=1)
        resumed.load_state_dict(saved["model"])
        optimizer = made(kind, resumed, sparse_state=other)
        optimizer.load_state_dict(saved["optimizer"])
        steps(resumed, optimizer, range(2, 4))
        for a, b in zip(through.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)


def test_state_of_16_bit_weights_is_fp32_and_stays_it() -> None:
    model = network().bfloat16()
    optimizer = made("adamw", model, sparse_state=True)
    x = torch.randn(5, 33, dtype=torch.bfloat16)
    model(x).float().square().sum().backward()
    optimizer.step()
    again = made("adamw", model, sparse_state=True)
    again.load_state_dict(optimizer.state_dict())
    state = again.state[model[0].weight]
    assert (state["exp_avg"].dtype, state["mask_bits"].dtype) == (torch.float32, torch.uint8)
    assert torch.equal(state["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


def test_a_checkpoint_of_torch_is_read() -> None:
    model, twin = network(), network()
    theirs = torch.optim.AdamW(twin.parameters(), **KINDS["adamw"][2])
    steps(twin, theirs, range(2))
    model.load_state_dict(twin.state_dict())
    optimizer = made("adamw", model)
    optimizer.load_state_dict(theirs.state_dict())
    steps(model, optimizer, range(2, 3))
    steps(twin, theirs, range(2, 3))
    torch.testing.assert_close(model[2].weight, twin[2].weight, rtol=1e-5, atol=1e-6)
    optim.check_invariant(model)


def test_a_copy_goes_on_alone() -> None:
    model = network()
    optimizer = made("adamw", model, sparse_state=True)
    steps(model, optimizer, range(2))
    other, theirs = copy.deepcopy((model, optimizer))
    steps(model, optimizer, range(2, 4))
    assert not torch.equal(model[0].weight, other[0].weight)
    steps(other, theirs, range(2, 4))
    assert torch.equal(model[0].weight, other[0].weight)


def test_schedulers_scalers_and_closures() -> None:
    model = network()
    optimizer = made("sgd", model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 33)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = model[0].weight.detach().clone()
    scaler.scale(model(torch.full((2, 33), torch.inf)).sum()).backward()
    scaler.step(optimizer)  # gradients are not finite: no step
    assert torch.equal(model[0].weight, before)


# ------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("norm_type", [2.0, torch.inf])
def test_clipping_counts_kept_gradients_only(norm_type: float) -> None:
    model = network()
    model(torch.randn(5, 33)).square().sum().backward()
    kept = [model[0].weight.grad[model[0].mask], *(p.grad for p in list(model.parameters())[1:])]
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in kept]), norm_type)
    before = model[0].weight.grad.clone()
    model[0].weight.grad[~model[0].mask] = 1e6
    norm = optim.clip_grad_norm_(model, 0.5, norm_type)
    torch.testing.assert_close(norm, expected)
    scale = 0.5 / (expected + 1e-6)
    torch.testing.assert_close(model[0].weight.grad[model[0].mask], (before * scale)[model[0].mask])
    assert (model[0].weight.grad[~model[0].mask] > 0).all()  # there still, for growth by gradient
    model[0].weight.grad[~model[0].mask] = torch.nan
    assert optim.clip_grad_norm_(model.parameters(), 1.0, norm_type, model=model).isfinite()


# ------------------------------------------------------------------------------------------------ invariant


def test_an_optimiser_that_does_not_know_masks_is_found_out() -> None:
    model = network()
    optim.check_invariant(model)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1), range(1))
    pruned = int((~model[0].mask).sum())
    with pytest.raises(
        RuntimeError, match=rf"0\.weight must be zero where it is pruned, got \d+ other entries of {pruned} "
    ):
        optim.check_invariant(model)
    with torch.no_grad():
        model[0].weight.masked_fill_(~model[0].mask, 0)
        row, column = (~model[0].mask).nonzero()[0]
        model[0].weight[row, column] = torch.nan
    with pytest.raises(RuntimeError, match="got 1 other entries"):
        optim.check_invariant(model)
    model[0].mode = "masked"  # there the dense weight is alive
    optim.check_invariant(model)


def test_reset_moments() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.Adam([weight], amsgrad=True)
    weight.sum().backward()
    optimizer.step()
    changed = torch.tensor([[True, False, False], [False, False, True]])
    optim.reset_moments(optimizer, weight, changed)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(optimizer.state[weight][key] == 0, changed)
    assert optimizer.state[weight]["step"] == 1
    with pytest.raises(ValueError, match=r"changed must have shape \[2, 3\], got \[3\]"):
        optim.reset_moments(optimizer, weight, changed[0])


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda p: optim.MaskedSGD(p, lr=-1.0), ValueError, "MaskedSGD: lr must not be negative, got -1.0"),
        (lambda p: optim.MaskedSGD(p, nesterov=True), ValueError,
         "MaskedSGD: nesterov needs a momentum and no dampening, got 0.0 and 0.0"),
        (lambda p: optim.MaskedAdamW(p, betas=(0.9, 1.0)), ValueError,
         "MaskedAdamW: betas[1] must be at least 0 and less than 1, got 1.0"),
        (lambda p: optim.MaskedAdam(p, sparse_state=True), ValueError,
         "MaskedAdam: sparse_state needs a model, whose masks say what is kept, got model None"),
        (lambda p: optim.MaskedAdam(p, model=3), TypeError,
         "MaskedAdam: model must be a torch.nn.Module, got int"),
    ],
)  # fmt: skip
def test_refusal(call: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call([nn.Parameter(torch.ones(2))])
    assert str(caught.value) == sentence


def test_examples() -> None:
    check_examples(optim)
