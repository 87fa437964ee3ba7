# SPDX-License-Identifier: Apache-2.0
"""Layers with pruned weights: what they compute, what keeps pruned weights zero, their states, and their dispatch."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from cofire import native
from cofire.methods import GradualPruning, RigL
from cofire.nn import (
    Compressed,
    CompressedConv2d,
    CompressedLinear,
    SparseConv2d,
    SparseLinear,
    check_masks_agree,
    mask_checks,
    masks,
    sparsify_,
)
from cofire.nn import compressed as dispatch
from cofire.ops import pack_mask, spmm
from cofire.optim import MaskedAdamW, MaskedSGD, check_invariant
from helpers import check_examples

IN, OUT = 48, 20
GRADIENTS = ("hard", "ste", "srste")
RULES: list[dict[str, Any]] = [
    {"mode": "invariant"},
    *({"mode": "masked", "gradient": gradient, "decay": 0.5} for gradient in GRADIENTS),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda r: "-".join(str(v) for v in list(r.values())[:2]))
FORMATS: list[dict[str, Any]] = [
    {"format": "csr"},
    {"format": "delta"},
    {"format": "bitmap"},
    {"format": "block", "block": (4, 2)},
    {"format": "bitmap", "values": torch.int8},
]
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: "-".join(map(str, f.values())))
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
}


def a_mask(shape: tuple[int, ...] = (OUT, IN), density: float = 0.4, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def in_blocks(shape: tuple[int, ...], block: tuple[int, int], density: float = 0.4) -> Tensor:
    """A mask of whole blocks; those at the edges may be cut off."""
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    tiles = a_mask((-(-rows // block[0]), -(-columns // block[1])), density)
    whole = tiles.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return whole[:rows, :columns].reshape(shape)


def linear(density: float = 0.4, block: tuple[int, int] = (1, 1), **options: Any) -> Any:
    return SparseLinear.from_dense(nn.Linear(IN, OUT), in_blocks((OUT, IN), block, density), **options)


def conv(block: tuple[int, int] = (1, 1), **options: Any) -> Any:
    dense = nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2, padding_mode="reflect")
    return SparseConv2d.from_dense(dense, in_blocks((8, 2, 3, 3), block), **options)


def network(mode: str = "invariant", density: float = 0.3) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 24), nn.Tanh(), nn.Linear(24, 3)
    )
    return model if mode == "dense" else sparsify_(model, density=density, mode=mode)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, 1, 4, 4, generator=generator), torch.randint(3, (16,), generator=generator)


def holds(model: nn.Module) -> bool:
    """Whether pruned weights are zero, and some are pruned in every layer."""
    found = [(layer.weight, layer.mask) for _, layer in masks(model)]
    assert found and all(not mask.all() and mask.any() for _, mask in found)
    return all(bool((weight[~mask] == 0).all()) for weight, mask in found)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    x, y = batch()
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


# -------------------------------------------------------------------------------------------------------- products


def expected_gradient(dense: Tensor, weight: Tensor, mask: Tensor, rule: dict[str, Any]) -> Tensor:
    """``dense``: the gradient of the weight with zeros, at all its entries."""
    gradient = rule.get("gradient", "hard")
    if gradient == "hard":
        return torch.where(mask, dense, 0.0)
    return torch.where(mask, dense, dense + rule["decay"] * weight) if gradient == "srste" else dense


@every_rule
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_products_and_gradients(rule: dict[str, Any], kind: str) -> None:
    layer, x = (linear(**rule), torch.randn(7, IN)) if kind == "linear" else (conv(**rule), torch.randn(2, 4, 9, 8))
    plain = layer.to_dense()
    assert type(plain) in (nn.Linear, nn.Conv2d) and (plain.weight[~layer.mask] == 0).all()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = layer(a), plain(b)
    torch.testing.assert_close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    wanted = expected_gradient(plain.weight.grad, layer.weight.detach(), layer.mask, rule)
    torch.testing.assert_close(layer.weight.grad, wanted)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), z)
    frozen = copy.deepcopy(layer).requires_grad_(False)
    torch.testing.assert_close(frozen(x), z)


@every_rule
def test_what_is_pruned_does_not_matter(rule: dict[str, Any]) -> None:
    """NaN behind the mask reaches nothing; a kept zero stays kept."""
    for dense, mask, x in (
        (nn.Linear(IN, OUT), a_mask(), torch.randn(3, IN)),
        (nn.Conv2d(4, 8, 3), a_mask((8, 4, 3, 3)), torch.randn(1, 4, 5, 5)),
    ):
        with torch.no_grad():
            dense.weight[~mask] = torch.nan
            dense.weight[0] = torch.where(mask[0], 0.0, torch.nan)
        kind: Any = SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d
        layer = kind.from_dense(dense, mask, **rule)
        y = layer(x)
        y.sum().backward()
        assert y.isfinite().all() and layer.weight.grad[mask].isfinite().all()
        assert torch.equal(layer.mask, mask) and torch.equal(layer.pack().mask, mask)
        if rule.get("gradient", "hard") == "hard":
            assert (layer.weight.grad[~mask] == 0).all()


@every_rule
def test_second_derivatives(rule: dict[str, Any]) -> None:
    layer = SparseConv2d.from_dense(nn.Conv2d(2, 2, 2, dtype=torch.float64), a_mask((2, 2, 2, 2)), **rule)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)

    def f(weight: Tensor) -> Tensor:
        first = torch.autograd.grad(
            torch.func.functional_call(layer, {"weight": weight}, (x,)).pow(3).sum(), weight, create_graph=True
        )
        return first[0].square().sum()

    weight = layer.weight.detach().clone().requires_grad_()
    (second,) = torch.autograd.grad(f(weight), weight)
    eps = 1e-6
    if rule.get("gradient", "hard") == "hard":  # the others' gradients are no derivatives
        i = tuple(layer.mask.nonzero()[0].tolist())
        step = torch.zeros_like(weight)
        step[i] = eps
        numeric = (f((weight + step).detach().requires_grad_()) - f((weight - step).detach().requires_grad_())) / (
            2 * eps
        )
        torch.testing.assert_close(second[i], numeric.detach(), rtol=1e-5, atol=1e-6)
    assert second.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for layer, x in ((linear(), torch.randn(3, IN)), (conv(), torch.randn(1, 4, 8, 8))):
        cast = copy.deepcopy(layer).to(dtype)
        packed = cast.pack()
        assert cast.mask_bits.dtype == torch.uint8 and torch.equal(cast.mask, layer.mask)
        y, z = cast(x.to(dtype)), packed(x.to(dtype))
        assert y.dtype == z.dtype == packed.weight.dtype == dtype
        torch.testing.assert_close(y, z, rtol=0.02, atol=0.02)
        assert layer.pack(values=torch.bfloat16).values.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- choosing a mask


def test_which_weights_are_kept() -> None:
    w = nn.Linear(32, 16)
    rows = SparseLinear.from_dense(copy.deepcopy(w), density=0.25)
    assert (rows.mask.sum(1) == 8).all() and rows.density() == 0.25
    top = w.weight.abs().topk(8, 1).values[:, -1:]
    assert torch.equal(rows.mask, w.weight.detach().abs() >= top)
    whole = SparseLinear.from_dense(copy.deepcopy(w), density=0.25, scope="tensor")
    assert whole.mask.sum() == 128 and not torch.equal(whole.mask, rows.mask)
    two = SparseLinear.from_dense(copy.deepcopy(w), pattern="2:4")
    assert (two.mask.view(16, 8, 4).sum(2) == 2).all()
    blocks = SparseLinear.from_dense(copy.deepcopy(w), pattern="4x2", density=0.5)
    tiles = blocks.mask.view(4, 4, 16, 2).transpose(1, 2).flatten(2)
    assert ((tiles.sum(2) == 8) | (tiles.sum(2) == 0)).all() and (tiles.any(2).sum(1) == 8).all()
    sums = w.weight.detach().abs().view(4, 4, 16, 2).sum((1, 3))
    assert torch.equal(tiles.any(2), sums >= sums.topk(8, 1).values[:, -1:])
    assert blocks.pack(block=(4, 2)).format == "block" and rows.pack().format == "bitmap"
    score = torch.arange(512.0).view(16, 32)
    last = SparseLinear.from_dense(copy.deepcopy(w), density=0.25, score=score, scope="tensor")
    assert torch.equal(last.mask, score >= 384)
    norms = torch.rand(32)
    wanda = SparseLinear.from_dense(copy.deepcopy(w), density=0.25, score="wanda", other=norms)
    best = (w.weight.detach().abs() * norms).topk(8, 1).indices
    assert torch.equal(wanda.mask, torch.zeros_like(wanda.mask).scatter_(1, best, True))
    assert SparseLinear.from_dense(copy.deepcopy(w), density=1e-6).mask.sum() == 16, "at least one of each row"


def test_a_new_layer_keeps_everything() -> None:
    for bias in (True, False):
        layer = SparseLinear(9, 5, bias, "cpu", torch.float64)
        assert layer.mask.all() and layer.density() == 1 and (layer.bias is not None) == bias
        assert layer.mask_bits.tolist() == [[255, 1]] * 5
    assert SparseConv2d(3, 4, 3, mode="masked", gradient="ste").mask.shape == (4, 3, 3, 3)
    assert SparseLinear(4, 0).density() == 1 and SparseLinear(4, 0)(torch.ones(2, 4)).shape == (2, 0)
    assert "mode=masked, gradient=ste, density=1" in repr(SparseLinear(4, 4, mode="masked", gradient="ste"))


def test_parameters_are_shared_with_the_dense_layer() -> None:
    dense = nn.Linear(IN, OUT)
    seen: list[int] = []
    dense.register_forward_hook(lambda *a: seen.append(1))
    before = dense.weight.detach().clone()
    masked = SparseLinear.from_dense(dense, a_mask(), mode="masked")
    assert masked.weight is dense.weight and torch.equal(masked.weight, before)
    compressed = SparseLinear.from_dense(dense, a_mask(), mode="compressed")
    assert torch.equal(dense.weight, before), "what is compressed is copied"
    assert compressed.format == "csr" and compressed.values.requires_grad
    layer = SparseLinear.from_dense(dense, a_mask())
    assert layer.weight is dense.weight and (dense.weight[~a_mask()] == 0).all()
    layer(torch.randn(1, IN))
    assert seen == [1]


def test_a_layer_that_torch_pruned() -> None:
    dense = nn.Linear(IN, OUT)
    prune.l1_unstructured(dense, "weight", amount=0.5)
    x = torch.randn(3, IN)
    expected = dense(x)
    state = copy.deepcopy(dense.state_dict())
    layer = SparseLinear.from_dense(dense)
    torch.testing.assert_close(layer(x), expected)
    assert layer.density() == 0.5 and set(layer.state_dict()) == {"weight", "bias", "mask_bits", "mask_format"}
    fresh = SparseLinear(IN, OUT)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.mask, layer.mask) and torch.equal(fresh(x), layer(x))


def test_auto_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def auto(density: float) -> str:
        return str(SparseLinear.from_dense(nn.Linear(IN, OUT), density=density, mode="auto").mode)

    monkeypatch.setattr(dispatch, "kernel_for", lambda *a: "c++")
    monkeypatch.setattr(dispatch, "largest_density", lambda *a: [0.3] * 6)
    assert (auto(0.25), auto(0.5)) == ("compressed", "invariant")
    monkeypatch.setattr(dispatch, "kernel_for", lambda *a: "reference: none")
    assert auto(0.25) == "invariant"
    assert SparseConv2d.from_dense(nn.Conv2d(2, 2, 3), density=0.01, mode="auto").mode == "invariant"


# --------------------------------------------------------------------------------- what keeps pruned weights zero


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_plain_optimizers(optimizer: str) -> None:
    """With momentum, weight decay, and clipping, whose norm is that of the kept weights' gradients."""
    model = network()
    first = [layer.weight.detach().clone() for _, layer in masks(model)]
    steps(model, OPTIMIZERS[optimizer](model.parameters()))
    assert holds(model)
    assert all(not torch.equal(a, layer.weight) for a, (_, layer) in zip(first, masks(model)))


def test_gradient_clipping() -> None:
    model, plain = network(), network("masked")
    x, y = batch()
    for m in (model, plain):
        F.cross_entropy(m(x), y).backward()
    total = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    parts = []
    for p in plain.parameters():
        parts.append(p.grad)
    torch.testing.assert_close(total, torch.cat([g.flatten() for g in parts]).norm())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.step()
    assert holds(model)


def test_averages() -> None:
    model = network()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for _ in range(3):
        steps(model, optimizer, 1)
        ema.update_parameters(model)
    assert holds(ema.module)
    for _, layer in masks(model):
        layer.update_mask(a_mask(tuple(layer.weight.shape), seed=7))
    ema.update_parameters(model)
    assert not holds(ema.module), "an average over two masks has the weights of both"
    with pytest.raises(ValueError, match=r"must be zero in the mode 'invariant', got \d+ that are not: momentum"):
        ema.module[3].pack()
    for _, layer in masks(ema.module):
        layer.update_mask(layer.mask)
    assert holds(ema.module) and ema.module[3].pack().mode == "compressed"


def test_autocast() -> None:
    model = network()
    x, y = batch()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
            assert output.dtype == torch.bfloat16
            loss = F.cross_entropy(output, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert holds(model) and model[3].weight.dtype == torch.float32
    for kind in ("masked", "compressed"):
        other = network(kind)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            F.cross_entropy(other(x).float(), y).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in other.parameters())


@every_rule
def test_compiled_layers_see_a_new_mask(rule: dict[str, Any]) -> None:
    torch.compiler.reset()
    for layer, x in ((linear(**rule), torch.randn(3, IN)), (conv(**rule), torch.randn(2, 4, 8, 8))):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()  # compiled here; another mask must not do it again
        before = layer.mask_bits.data_ptr(), layer.weight.data_ptr()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in (8, 9):
                layer.update_mask(a_mask(tuple(layer.weight.shape), seed=seed))
                twin = copy.deepcopy(layer)
                layer.weight.grad = twin.weight.grad = None
                y = compiled(x)
                torch.testing.assert_close(y, twin(x))
                y.square().sum().backward()
                twin(x).square().sum().backward()
                torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
        assert before == (layer.mask_bits.data_ptr(), layer.weight.data_ptr())


def test_inductor_compiles_a_model() -> None:
    model = network()
    x, _ = batch()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all((layer.weight.grad[~layer.mask] == 0).all() for _, layer in masks(model))


@every_rule
def test_gradient_checkpointing(rule: dict[str, Any]) -> None:
    for layer, x in ((linear(**rule), torch.randn(3, IN)), (conv(**rule), torch.randn(2, 4, 8, 8))):
        x.requires_grad_()
        layer(x).square().sum().backward()
        found = layer.weight.grad.clone()
        layer.weight.grad = None
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        assert torch.equal(found, layer.weight.grad)


def test_a_new_mask_zeroes_weights_and_gradients() -> None:
    layer = linear()
    layer(torch.randn(3, IN)).sum().backward()
    weight, bits, version = layer.weight, layer.mask_bits, layer.weight._version
    mask = a_mask(seed=2)
    layer.update_mask(mask)
    assert layer.weight is weight and layer.mask_bits is bits and layer.weight._version > version
    assert (layer.weight[~mask] == 0).all() and (layer.weight.grad[~mask] == 0).all()
    assert torch.equal(layer.mask, mask)
    layer.update_mask(pack_mask(a_mask(seed=3)))
    assert torch.equal(layer.mask, a_mask(seed=3))
    hidden = linear(mode="masked")
    before = hidden.weight.detach().clone()
    hidden.update_mask(mask)
    assert torch.equal(hidden.weight, before), "behind the mask they live on"


def test_momentum_from_before_a_new_mask_is_found() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps(model, optimizer)
    for _, layer in masks(model):
        layer.update_mask(a_mask(tuple(layer.weight.shape), seed=11))
    assert holds(model)
    steps(model, optimizer, 1)
    assert not holds(model)
    with pytest.raises(RuntimeError, match="weight must be zero where it is pruned"):
        check_invariant(model)
    with pytest.raises(ValueError, match="must be zero in the mode 'invariant'"):
        model[3].to_dense()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_next_forward_finds_them_unasked(optimizer: str) -> None:
    model = network()
    plain = OPTIMIZERS[optimizer](model.parameters())
    steps(model, plain)
    mask = a_mask((24, 96), seed=11)
    model[3].update_mask(mask)
    steps(model, plain, 1)
    moved = int((model[3].weight[~mask] != 0).sum())
    sentence = (
        rf"SparseLinear '3': weight must be zero where it is pruned, got {moved} other entries of {(~mask).sum()} "
    )
    for _ in range(2):  # until something is done about it
        with pytest.raises(RuntimeError, match=sentence):
            steps(model, plain, 1)
    model.eval()(batch()[0])
    with torch.no_grad():
        model.train()(batch()[0])
    model[3].checks = False
    model(batch()[0])
    model[3].checks = True
    model[3].update_mask(mask)
    model(batch()[0])


def test_an_optimizer_that_writes_past_the_counter_is_found_too() -> None:
    """To ``weight.data``, whose writes are not counted; with gradients of several batches added up."""
    layer, x = linear(), torch.randn(3, IN)
    for part in range(2):
        layer(x).sum().backward()
        if part == 1:
            layer.weight.data.add_(0.1)
    with pytest.raises(RuntimeError, match=r"SparseLinear \[20, 48\]: weight must be zero where it is pruned"):
        layer(x)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimizers_that_know_masks_are_not_suspected(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    count = mask_checks.pruned_not_zero
    monkeypatch.setattr(mask_checks, "pruned_not_zero", lambda *a: looked.append(1) or count(*a))
    model = network()
    optimizer: torch.optim.Optimizer = (
        MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, model=model)
        if kind == "sgd"
        else MaskedAdamW(model.parameters(), lr=0.01, model=model)
    )
    for seed in range(3):
        for _, layer in masks(model):
            layer.update_mask(a_mask(tuple(layer.weight.shape), seed=seed))
        looked.clear()
        steps(model, optimizer, 6)
        assert 6 <= len(looked) <= 2 * (mask_checks.STEPS + mask_checks.UNSEEN), "of two layers"
        looked.clear()
        steps(model, optimizer, 3)
        assert not looked, "steady training looks at nothing"
    for _, layer in masks(model):
        layer.update_mask(layer.mask_bits)  # the same: only zeroed
    steps(model, optimizer, 2)
    assert not looked and holds(model)


def test_a_kept_nan_is_no_violation() -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[layer.mask] = torch.nan
    assert layer(torch.randn(3, IN)).isnan().any()
    check_invariant(layer)


SPOILED = "the mask is not the one that update_mask or load_state_dict left"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", RULES[:2], ids=["invariant", "masked"])
@pytest.mark.parametrize("same", [True, False], ids=["one_mask", "two_masks"])
def test_averages_of_buffers_are_found(rule: dict[str, Any], same: bool) -> None:
    """They make numbers of the bits: a warning, once, and no error. Where buffers are copied, all is well."""
    x = torch.randn(2, IN)
    for averaged in (False, True):
        model = nn.Sequential(linear(**rule))
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=averaged)
        ema.update_parameters(model)
        ema(x)
        if not same:
            model[0].update_mask(a_mask(seed=4))
            with torch.no_grad():
                ema.module[0].weight.zero_()
        ema.update_parameters(model)
        layer = ema.module[0].eval()
        if not averaged:
            layer(x)
            assert torch.equal(layer.mask, model[0].mask) and layer.state_dict()
            continue
        assert layer.state_dict()
        if layer.mode == "masked":  # (else spoiled masks prune weights that are not zero)
            assert layer.pack() and layer.to_dense()
        with pytest.warns(UserWarning, match=rf"SparseLinear \[20, 48\]: {SPOILED}"):
            layer(x)
        layer(x)
        ema.update_parameters(model)
        layer(x)  # once is enough
        model[0](x)
        layer.update_mask(model[0].mask)
        layer(x)
        layer.load_state_dict(model[0].state_dict())
        assert torch.equal(layer.mask, model[0].mask) and layer.state_dict()
    packed = nn.Sequential(linear().pack("csr"))
    ema = AveragedModel(packed, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(2):
        ema.update_parameters(packed)
    bad = ema.module
    for one in (copy.deepcopy(bad), pickle.loads(pickle.dumps(bad)), copy.deepcopy(bad)._apply(torch.clone), ema):
        spoiled = pytest.raises(RuntimeError, match="spmm: offsets must end")
        with pytest.warns(UserWarning, match=f"CompressedLinear .*: {SPOILED}"), spoiled:
            one(x)


@pytest.mark.filterwarnings("error")
def test_a_spoiled_mask_is_found_after_many_writes() -> None:
    layer, x = linear(mode="masked"), torch.randn(2, IN)
    for _ in range(9):
        layer.mask_bits.copy_(layer.mask_bits.clone())
        layer(x)
    layer.mask_bits.sub_(layer.mask_bits // 2)
    with pytest.warns(UserWarning, match=SPOILED):
        layer(x)


@pytest.mark.filterwarnings("error")
@every_rule
def test_lent_buffers_are_no_change(rule: dict[str, Any]) -> None:
    """``functional_call`` with another model's state, or with some of it: the layer's own is as it was."""
    model, other, x = nn.Sequential(linear(**rule)), nn.Sequential(linear(**rule)), torch.randn(2, IN)
    other[0].update_mask(a_mask(seed=4))
    expected, own = other(x), model(x)
    for one in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model)._apply(torch.clone),
    ):
        for lent in (other.state_dict(), dict(other.named_parameters()) | dict(other.named_buffers())):
            torch.testing.assert_close(torch.func.functional_call(one, lent, (x,)), expected)
        torch.testing.assert_close(one(x), own)
        assert torch.equal(one[0].mask, model[0].mask)
    model[0].mask_bits.zero_()
    torch.func.functional_call(model, other.state_dict(), (x,))
    with pytest.warns(UserWarning, match=SPOILED):
        model.eval()(x)


@pytest.mark.filterwarnings("error")
@every_rule
def test_masks_that_are_copied_into_a_state_are_taken(rule: dict[str, Any]) -> None:
    """They cannot be told from others at the first forward, but are right: a warning at most, and that once."""
    model, x = nn.Sequential(linear(**rule)), torch.randn(2, IN)
    kept, ema = {n: t.clone() for n, t in model.state_dict().items()}, copy.deepcopy(model)

    def average() -> None:
        for mine, its in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(0.9 * mine + 0.1 * its if mine.is_floating_point() else its)

    average()
    ema(x)
    model[0].update_mask(a_mask(seed=4))
    average()
    with pytest.warns(UserWarning, match=SPOILED):
        ema(x)
    average()
    ema(x)
    assert ema.state_dict() and torch.equal(ema[0].mask, a_mask(seed=4))
    for name, tensor in model.state_dict().items():
        tensor.copy_(kept[name])
    with pytest.warns(UserWarning, match=SPOILED):
        model(x)
    model(x)
    assert torch.equal(model[0].mask, a_mask()) and model[0].to_dense() and model[0].pack()


@pytest.mark.filterwarnings("error")
def test_layers_pickled_before_there_were_checksums() -> None:
    for layer in (linear(), linear(mode="masked"), conv(), linear().pack("csr")):
        state = copy.deepcopy(layer).__getstate__()
        assert "_seen" not in state
        state["_buffers"] = {n: t for n, t in state["_buffers"].items() if n != "mask_sum"}
        old = type(layer).__new__(type(layer))
        old.__setstate__(state)
        x = torch.randn(2, 4, 8, 8) if isinstance(layer, SparseConv2d) else torch.randn(2, IN)
        assert torch.equal(old(x), layer(x)) and torch.equal(old.mask_sum, layer.mask_sum)


def test_modes_that_watch_operations_see_none_of_the_checks() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    layer, x = linear(), torch.randn(2, IN)
    layer.update_mask(a_mask(seed=4))
    layer.mask_bits.copy_(layer.mask_bits.clone())
    with Names():
        layer(x)
    assert seen and not any("local_scalar" in name or "equal" in name for name in seen)


def test_frozen_weights_are_not_suspected_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    look = SparseLinear._look
    monkeypatch.setattr(SparseLinear, "_look", lambda self: looked.append(1) or look(self))
    layer = linear().requires_grad_(False)
    for _ in range(5):
        layer(torch.randn(2, IN))
    assert len(looked) == 1


def test_training_a_compressed_model() -> None:
    """Step for step what the layers with zeros do."""
    model, other = network(), network("compressed")
    assert isinstance(other[0], CompressedConv2d) and isinstance(other[3], CompressedLinear)
    for m in (model, other):
        steps(m, torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1), 4)
    assert torch.equal(other[3].mask, model[3].mask)
    torch.testing.assert_close(other[3].weight, model[3].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other[0].weight, model[0].weight, rtol=1e-4, atol=1e-5)


def _two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        for mode in ("invariant", "compressed"):
            model = network(mode)
            check_masks_agree(model)
            wrapped = nn.parallel.DistributedDataParallel(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
            x, y = batch()
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(wrapped(x[rank::2]), y[rank::2]).backward()
                optimizer.step()
            parts = [torch.empty_like(model[3].bias) for _ in range(2)]
            dist.all_gather(parts, model[3].bias.detach())
            assert torch.equal(parts[0], parts[1])
            if mode == "invariant":
                assert holds(model)
                torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")
            check_masks_agree(model)
        sentence = "check_masks_agree: all processes must have the same masks, got others for 3"
        model = network()
        if rank == 1:
            model[3].update_mask(a_mask((24, 96), seed=4))
        with pytest.raises(ValueError, match=sentence):
            check_masks_agree(model)
        for mode in ("invariant", "masked"):  # DDP copies the first one's mask, and no layer waits for another process
            model = network(mode)
            model[3].update_mask(a_mask((24, 96), seed=5 + rank))
            wrapped = nn.parallel.DistributedDataParallel(model)
            if rank == 0:
                model(x)
            wrapped(x)
            assert torch.equal(model[3].mask, a_mask((24, 96), seed=5))
            model.eval()(x)  # its checksum too
        _two_by_methods(rank, x, y)
    finally:
        dist.destroy_process_group()


def _two_by_methods(rank: int, x: Tensor, y: Tensor) -> None:
    """They compare masks when they prepare, and after each change."""
    sentence = "check_masks_agree: all processes must have the same masks, got others for "
    with pytest.raises(ValueError, match=sentence + "3"):
        RigL(density=0.5, seed=rank).prepare(network("dense"))
    RigL(density=0.5, seed=rank, checks=False).prepare(network("dense"))
    methods: list[Any] = [RigL(density=0.5, every=2, end=9), GradualPruning(density=0.5, end=4, every=2)]
    for method in methods:
        model = method.prepare(network("dense"))
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = MaskedSGD(model.parameters(), lr=0.1, model=model)
        for number in range(1, 5):
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x[rank::2]), y[rank::2]).backward()
            optimizer.step()
            if number == 4:  # what only one of them does to its weights
                with torch.no_grad():
                    model[3].weight.mul_(torch.rand(24, 96, generator=torch.Generator().manual_seed(rank)))
                with pytest.raises(ValueError, match=sentence + "3"):
                    method.step(wrapped)
                replace(method, checks=False).step(wrapped)
            else:
                method.step(wrapped)
    if rank == 0:
        GradualPruning(density=0.5, begin_density=0.9, checks=False).prepare(network("dense"))  # of its own


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    steps(model, optimizer, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    check_masks_agree(model)  # one process agrees with itself


# ------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("rule", RULES[:2], ids=["invariant", "masked"])
def test_states(rule: dict[str, Any], tmp_path: Path) -> None:
    for layer, empty, plain in (
        (linear(**rule), SparseLinear(IN, OUT, **rule), nn.Linear(IN, OUT)),
        (conv(**rule), SparseConv2d(4, 8, 3, 2, 1, 1, 2, padding_mode="reflect", **rule), conv().to_dense()),
    ):
        state = layer.state_dict()
        assert set(state) == {"weight", "bias", "mask_bits", "mask_format"}
        assert state["weight"].shape == plain.weight.shape
        file = tmp_path / "state.safetensors"
        safetensors.torch.save_file(state, file)
        loaded = safetensors.torch.load_file(file)
        assert str(empty.load_state_dict(loaded)) == "<All keys matched successfully>"
        found = plain.load_state_dict(loaded, strict=False)
        assert not found.missing_keys and set(found.unexpected_keys) == {"mask_bits", "mask_format"}
        assert torch.equal(plain.weight, layer.weight)
        for twin in (empty, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin.weight, layer.weight) and torch.equal(twin.mask, layer.mask)
            assert repr(twin) == repr(layer) and twin.weight is not layer.weight


def test_a_dense_state_is_masked_by_the_layer() -> None:
    dense = nn.Linear(IN, OUT).state_dict()
    kept = dense["weight"].clone()
    layer, masked = linear(), linear(mode="masked")
    for one in (layer, masked):
        assert str(one.load_state_dict(dense)) == "<All keys matched successfully>"
        assert torch.equal(one.mask, a_mask())
    assert torch.equal(layer.weight, torch.where(a_mask(), kept, 0.0)) and torch.equal(masked.weight, kept)
    layer.load_state_dict(dense, assign=True)
    assert torch.equal(dense["weight"], kept), "the state itself is left as it is"
    assert torch.equal(layer.weight, torch.where(a_mask(), kept, 0.0))
    empty = SparseLinear(IN, OUT, device="meta")
    empty.load_state_dict(linear().state_dict(), assign=True)
    assert torch.equal(empty.mask, a_mask())
    with pytest.raises(RuntimeError, match='Missing key.*"weight"'):
        layer.load_state_dict({"bias": dense["bias"]})
    other = {**linear(mode="masked").state_dict(), "mask_bits": pack_mask(a_mask(seed=6))}
    layer.load_state_dict(other)
    assert torch.equal(layer.mask, a_mask(seed=6)) and (layer.weight[~layer.mask] == 0).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"mask_bits": torch.zeros(OUT, 7, dtype=torch.uint8)},
            r"mask_bits must be uint8 \[20, 6\], got torch.uint8 \[20, 7\]",
        ),
        ({"mask_bits": torch.ones(OUT, 6)}, r"mask_bits must be uint8 \[20, 6\], got torch.float32"),
        ({"mask_format": torch.tensor(9)}, "the format of the mask must have the version 1, got 9"),
        ({"weight": torch.ones(3, 3)}, "size mismatch for weight"),
    ],
)
def test_other_states_are_refused(change: dict[str, Tensor], sentence: str) -> None:
    layer = linear()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=sentence):
        layer.load_state_dict({**linear(0.6).state_dict(), **change})
    assert torch.equal(layer.weight, before)


@every_format
def test_compressed_states(format: dict[str, Any], tmp_path: Path) -> None:
    block = format.get("block", (1, 1))
    for source, empty in (
        (linear(block=block), CompressedLinear(IN, OUT)),
        (conv(block), CompressedConv2d(4, 8, 3, 2, 1, 1, 2, padding_mode="reflect", format="bitmap")),
    ):
        packed = source.pack(**format)
        assert packed.nbytes == packed.sparse_weight.nbytes + 4 * packed.shape[0]
        assert torch.equal(packed.mask, source.mask)
        assert packed.state_dict()["index"].dtype == packed.sparse_weight.index.dtype != torch.int16
        safetensors.torch.save_file(packed.state_dict(), tmp_path / "state.safetensors")
        empty.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
        for twin in (empty, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert torch.equal(twin.weight, packed.weight) and twin.index.dtype == packed.index.dtype
            assert (twin.format, twin.block, twin.values.requires_grad) == (
                packed.format,
                packed.block,
                packed.values.requires_grad,
            )
        dense = type(source)(**geometry(source))
        dense.load_state_dict(packed.state_dict())
        assert torch.equal(dense.weight, packed.weight) and torch.equal(dense.mask, source.mask)
        again = type(packed)(**geometry(source), format=packed.format, block=format.get("block", (16, 1)))
        again.load_state_dict(source.state_dict())
        torch.testing.assert_close(again.weight, source.weight)
        assert torch.equal(again.to_dense().weight, again.weight)
        if packed.scale is not None:
            half = copy.deepcopy(packed).bfloat16()
            assert half.scale.dtype == torch.float32 and half.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.int8])
def test_bridges_are_not_kept_weights(values: torch.dtype) -> None:
    """Distances of more than 255 columns, and kept zeros at just 255 and its multiples."""
    dense, mask = nn.Linear(1600, 8), torch.zeros(8, 1600, dtype=torch.bool)
    places = ([], [0], [254], [255], [256], [0, 255, 510, 1275], [3, 258, 1278, 1599], [1599])
    for row, columns in enumerate(places):
        mask[row, columns] = True
    for zeros in (False, True):
        if zeros:
            nn.init.zeros_(dense.weight)
        source = SparseLinear.from_dense(dense, mask)
        packed = source.pack("delta", values=values)
        assert torch.equal(packed.mask, mask)
        fresh = SparseLinear(1600, 8)
        fresh.load_state_dict(packed.state_dict())
        assert torch.equal(fresh.mask, mask) and torch.equal(fresh.weight, packed.weight)
        again = CompressedLinear(1600, 8, format="delta")
        again.load_state_dict(fresh.state_dict())
        assert torch.equal(again.mask, mask)
        for rows in (1, 3, 70):
            x = torch.randn(rows, 1600)
            product = spmm(x, packed.sparse_weight, packed.bias)
            torch.testing.assert_close(product, fresh(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_keep_what_becomes_zero_at_the_distance_of_a_bridge(dtype: torch.dtype) -> None:
    dense, mask = nn.Linear(1600, 3), torch.zeros(3, 1600, dtype=torch.bool)
    mask[0, [255, 600]] = mask[1, [4, 259, 300]] = mask[2, [0, 7]] = True
    with torch.no_grad():
        dense.weight[0, 255] = dense.weight[1, 259] = 1e-45
    packed = SparseLinear.from_dense(dense, mask).pack("delta")
    values = packed.values
    packed.to(dtype)
    assert torch.equal(packed.mask, mask) and packed.values is values and values.dtype == dtype
    assert torch.equal(packed.weight, torch.where(mask, dense.weight, 0.0).to(dtype))
    again = CompressedLinear(1600, 3, format="delta", dtype=dtype)
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again.mask, mask)
    x = torch.randn(2, 1600, dtype=dtype)
    expected = F.linear(x.float(), packed.weight.float(), packed.bias.float()).to(dtype)
    torch.testing.assert_close(packed(x), expected, rtol=2e-2, atol=2e-2)
    stored = values.numel()
    packed.float()
    assert torch.equal(packed.mask, mask) and packed.values.numel() == stored


def test_blocks_that_are_not_whole_are_refused() -> None:
    """They would keep more than the mask says."""
    mask = torch.zeros(OUT, IN, dtype=torch.bool)
    mask[0, 0], mask[17, 3] = True, True
    layer = SparseLinear.from_dense(nn.Linear(IN, OUT), mask)
    sentence = "mask must consist of whole blocks of 16x1 in the format 'block', got one of 2 weights in blocks of 20;"
    with pytest.raises(ValueError, match=f"SparseLinear.pack: {sentence}"):
        layer.pack("block")
    with pytest.raises(ValueError, match=f"SparseLinear.pack: {sentence}"):
        SparseLinear.from_dense(nn.Linear(IN, OUT), mask, mode="compressed", format="block")
    empty = CompressedLinear(IN, OUT, format="block")
    with pytest.raises(RuntimeError, match=f"CompressedLinear: its mask: {sentence}"):
        empty.load_state_dict(layer.state_dict())
    whole = in_blocks((OUT, IN), (16, 1))
    packed = SparseLinear.from_dense(nn.Linear(IN, OUT), whole).pack("block")
    assert torch.equal(packed.mask, whole)
    whole[0] = False
    with pytest.raises(ValueError, match="CompressedLinear.update_mask: mask must consist of whole blocks of 16x1"):
        packed.update_mask(whole)


def geometry(layer: Any) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"in_features": IN, "out_features": OUT}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names}


def test_compressed_states_that_are_refused() -> None:
    layer, state = CompressedLinear(IN, OUT), linear().pack().state_dict()
    for change, sentence in (
        ({"geometry": state["geometry"] + 1}, "must have the version 1, got 2"),
        ({"geometry": torch.tensor([1, 0, 1, 1, 3, 4])}, r"must be of a weight \[20, 48\], got one of \[3, 4\]"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            layer.load_state_dict({**state, **change})
    with pytest.raises(RuntimeError, match=r"a dense weight needs its mask beside it \(mask_bits\)"):
        layer.load_state_dict(nn.Linear(IN, OUT).state_dict())
    assert layer.values.numel() == 0


# -------------------------------------------------------------------------------------------- compressed products


@every_format
def test_compressed_products(format: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(block=format.get("block", (1, 1))).pack(**format).requires_grad_(False)
    expected = F.linear(x := torch.randn(5, IN), layer.weight, layer.bias)
    for most in (0.0, 1.0):  # the dense product, and the sparse one
        monkeypatch.setattr(dispatch, "largest_density", lambda *a, most=most: [most] * 6)
        monkeypatch.setattr(dispatch, "kernel_for", lambda *a: "c++")
        layer._replan()
        assert {e["path"] for e in layer.explain()} == {"sparse" if most else "dense"}
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-4, atol=1e-5)
        assert layer(x[:0]).shape == (0, OUT)
        torch.testing.assert_close(layer(x.bfloat16()).float(), expected, rtol=0.1, atol=0.05)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@every_format
def test_compressed_convolutions(format: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for source, x in (
        (conv((1, 2)), torch.randn(2, 4, 9, 8)),
        (
            SparseConv2d.from_dense(nn.Conv2d(3, 5, (2, 3), padding="same"), pattern="1x2", density=0.4),
            torch.randn(1, 3, 6, 5),
        ),
    ):
        layer = source.pack(**{**format, "block": (1, 2)})
        dense = layer.to_dense()
        expected = dense(x)
        expected.square().sum().backward()
        for most in (0.0, 1.0):
            monkeypatch.setattr(dispatch, "largest_density", lambda *a, most=most: [most] * 6)
            monkeypatch.setattr(dispatch, "kernel_for", lambda *a: "c++")
            layer._replan()
            assert {e["path"] for e in layer.explain()} == {"sparse" if most else "dense"}
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-4, atol=1e-4)
            if layer.values.requires_grad:
                layer.zero_grad()
                layer(x).square().sum().backward()
                found = layer.sparse_weight.replace(values=layer.values.grad).to_dense().view(layer.shape)
                torch.testing.assert_close(found, torch.where(layer.mask, dense.weight.grad, 0.0), rtol=1e-3, atol=1e-3)
            else:
                layer(x.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("format", [f for f in FORMATS if f["format"] in ("csr", "block")], ids=lambda f: f["format"])
def test_compressed_gradients(format: dict[str, Any]) -> None:
    source = linear(block=format.get("block", (1, 1)))
    layer, x = source.pack(**format), torch.randn(5, IN)
    assert layer.values.requires_grad
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(a).square().sum().backward()
    dense = layer.weight.detach().requires_grad_()
    F.linear(b, dense, source.bias).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    same = layer.sparse_weight.replace(values=layer.values.grad).to_dense()
    torch.testing.assert_close(same, torch.where(layer.mask, dense.grad, 0.0), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
    twin = copy.deepcopy(layer)
    twin.zero_grad()
    torch.compile(twin, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(twin.values.grad, layer.values.grad)


def test_what_is_packed_for_inference_has_no_backward() -> None:
    for options in ({"format": "bitmap"}, {"format": "delta"}, {"format": "csr", "values": torch.int8}):
        layer = linear().pack(**options)
        assert not any(p.requires_grad for p in layer.parameters())
        with pytest.raises(RuntimeError, match="the weight is packed for inference"):
            layer(torch.randn(2, IN, requires_grad=True)).sum().backward()


def test_a_kept_copy_follows_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "largest_density", lambda *a: [0.0] * 6)
    layer = linear().pack("csr", cache_dense=True).requires_grad_(False)
    x = torch.randn(3, IN)
    y = layer(x)
    assert layer._copy is not None
    kept = layer._copy[1]
    layer(x)
    assert layer._copy[1] is kept, "decoded once"
    with torch.no_grad():
        layer.values.mul_(2)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (y - layer.bias))
    with torch.inference_mode():
        layer(x)
    assert copy.deepcopy(layer)._copy is None and pickle.loads(pickle.dumps(layer))._copy is None
    layer.load_state_dict(linear(0.2).pack("csr").state_dict())
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.explain(3)[0]["bytes"] == 4 * IN * OUT
    layer.cache_dense, layer._copy = False, None
    layer(x)
    assert layer._copy is None and "decoded with each forward" in layer.explain(3)[0]["kernel"]


def test_a_compressed_layer_takes_a_mask_of_as_many_weights() -> None:
    layer = linear().pack("csr")
    values, old = layer.values, layer.weight.detach()
    mask = a_mask().roll(1, 1)
    layer.update_mask(mask)
    assert layer.values is values and torch.equal(layer.mask, mask)
    assert torch.equal(layer.weight, torch.where(mask & a_mask(), old, 0.0))
    with pytest.raises(ValueError, match=r"update_mask: mask must keep as many values as are stored, \[\d+\] values"):
        layer.update_mask(a_mask(density=0.9))


def test_a_mask_that_needs_other_entries_is_refused_with_what_they_are() -> None:
    mask = torch.zeros(1, 600, dtype=torch.bool)
    mask[0, [3, 100]] = True
    layer = SparseLinear.from_dense(nn.Linear(600, 1), mask).pack("delta")
    other = torch.zeros_like(mask)
    other[0, [3, 258]] = True
    sentence = r"stored \(with the zeros that the format 'delta' needs: .*, and one for a kept zero, .*\), \[2\] values, got \[3\]"
    with pytest.raises(ValueError, match=sentence):
        layer.update_mask(other)
    layer.update_mask(mask.roll(1, 1))
    assert torch.equal(layer.mask, mask.roll(1, 1))


def test_buckets() -> None:
    assert [dispatch.bucket(n) for n in (0, 1, 2, 4, 5, 16, 17, 64, 65, 512, 513)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    names = [e["rows"] for e in linear().pack().explain()]
    assert names == ["1", "2-4", "5-16", "17-64", "65-512", ">512"]
    assert tuple(dispatch.table()["rows"]) == dispatch.ROWS


def test_the_shipped_table() -> None:
    """Every entry has a density for each bucket, and names that exist."""
    for machine in dispatch.table()["densities"].values():
        for dtype, ways in machine.items():
            assert getattr(torch, dtype) in dispatch.DTYPES
            for against, formats in ways.items():
                assert against in ("kept", "decoded", "training", "convolution")
                for format, densities in formats.items():
                    assert format in ("csr", "delta", "bitmap", "block") and len(densities) == 6
                    assert all(0 <= d <= 1 for d in densities)
    assert dispatch.largest_density("nowhere", torch.float32, "csr", "kept") == [0.0] * 6


def test_cpus_with_tiles_count_as_avx512_until_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for variant, tiles, measured, name in (
        ("avx512", True, True, "amx"),
        ("avx512", True, False, "avx512"),
        ("avx512", False, True, "avx512"),
        ("avx2", True, True, "avx2"),
    ):
        densities = {"avx512": {"float32": {"kept": {"csr": [0.25] * 6}}}}
        if measured:
            densities["amx"] = {"float32": {"kept": {"csr": [0.5] * 6}}}
        monkeypatch.setattr(native, "STATUS", native.Status(variant, ""))
        monkeypatch.setattr(native, "has_tiles", lambda tiles=tiles: tiles)
        monkeypatch.setattr(dispatch, "table", lambda densities=densities: {"densities": densities})
        assert dispatch.machine_of("cpu") == name and dispatch.machine_of("cuda") == "cuda"
        assert dispatch.instruction_set() == ("amx" if variant == "avx512" and tiles else variant)
        expected = {"amx": [0.5] * 6, "avx512": [0.25] * 6}.get(name)
        assert dispatch.known_densities("cpu", torch.float32, "csr", "kept") == expected


def test_preparing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear().pack("csr").requires_grad_(False)
    x = torch.randn(9, IN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        assert layer.prepare(rows=(1, 2)) is layer
        layer(x[:1])
    with pytest.warns(UserWarning, match=r"prepared for other numbers of rows than 9; prepare\(9\) includes them"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    for times, path in (((1.0, 1.06), "sparse"), ((1.0, 1.04), "dense")):
        monkeypatch.setattr(Compressed, "_time", lambda self, rows, dtype, times=times: times)
        layer.prepare(16, tune=True)
        (entry,) = layer.explain(16)
        assert entry["path"] == path and entry["why"].startswith("measured here: sparse 1 ms, dense 1.0")
    monkeypatch.undo()
    sparse, dense = layer._time(2, torch.float32)
    assert sparse > 0 and dense > 0
    with pytest.raises(ValueError, match="prepare: rows must be positive, got 0"):
        layer.prepare(0)


def test_preparing_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = conv().pack("csr"), torch.randn(2, 4, 8, 8)  # 32 positions
    taken: list[str] = []
    for way in ("_convolve_sparse", "_convolve_dense"):
        real = getattr(layer, way)
        monkeypatch.setattr(layer, way, lambda x, way=way, real=real: (taken.append(way), real(x))[1])
    sparse, dense = layer._time(x.shape, torch.float32)
    assert sparse > 0 and dense > 0 and {"_convolve_sparse", "_convolve_dense"} == set(taken)
    shapes: list[Any] = []
    for times, path in (((1.0, 1.06), "sparse"), ((1.0, 1.04), "dense")):
        measured = lambda self, shape, dtype, times=times: shapes.append(list(shape)) or times  # noqa: E731
        monkeypatch.setattr(CompressedConv2d, "_time", measured)
        assert layer.prepare(shape=x.shape, tune=True) is layer and shapes[-1] == [2, 4, 8, 8]
        (entry,) = layer.explain(32)
        assert entry["path"] == path and entry["why"].startswith("measured here: sparse 1 ms, dense 1.0")
        assert entry["why"].endswith("; the same while it is trained")
        for train in (True, False):
            taken.clear()
            with torch.set_grad_enabled(train), warnings.catch_warnings():
                warnings.simplefilter("error")
                layer(x)
            assert taken == [f"_convolve_{path}"]
    with pytest.warns(UserWarning, match=r"prepared for other numbers of rows than 144; prepare\(144\) includes them"):
        layer(torch.randn(1, 4, 24, 24))
    layer.prepare(144).prepare(shape=[(1, 4, 4, 4), (1, 4, 100, 100)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(1, 4, 4, 4))
        layer(torch.randn(1, 4, 100, 100))
    frozen = conv().pack("delta")
    monkeypatch.setattr(dispatch, "largest_density", lambda *a: [1.0] * 6)
    monkeypatch.setattr(dispatch, "kernel_for", lambda *a: "c++")
    frozen._replan()
    assert frozen.explain(32)[0]["why"].endswith("; dense where the input needs a gradient")
    for arguments, sentence in (
        ({"shape": (1, 3, 8, 8)}, r"shape must be \[batch, 4, height, width\], got \[1, 3, 8, 8\]"),
        ({"shape": [(4, 8, 8)]}, r"shape must be \[batch, 4, height, width\], got \[4, 8, 8\]"),
        ({"shape": (1, 4, 8, 8), "rows": 3}, "rows and shape must not both be given.*, got rows=3"),
        ({"rows": 0}, "rows must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=f"CompressedConv2d.prepare: {sentence}"):
            layer.prepare(**arguments)


def test_convolutions_without_a_shape_are_not_measured() -> None:
    """A loop over all compressed layers goes on: the table decides."""
    layer = conv().pack("csr")
    before = layer.explain()
    sentence = (
        r"^CompressedConv2d.prepare: nothing is measured without shape, \[batch, 4, height, width\] of an input; the"
    )
    with pytest.warns(UserWarning, match=sentence) as caught:
        assert layer.prepare((1, 16, 100), tune=True) is layer
    assert caught[0].filename == __file__ and layer.explain() == before and not layer._measured


def test_each_shape_is_measured_and_those_of_a_bucket_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = conv().pack("csr")
    times = {
        (1, 4, 4, 16): (1.0, 4.0),
        (1, 4, 16, 4): (4.0, 2.0),
        (1, 4, 100, 100): (7.0, 1.0),
    }  # 16, 16 and 2500 rows
    monkeypatch.setattr(CompressedConv2d, "_time", lambda self, size, dtype: times[size])
    layer.prepare(shape=list(times), tune=True)
    assert layer._measured == {(torch.float32, 2): (2.5, 3.0), (torch.float32, 5): (7.0, 1.0)}
    assert [entry["path"] for entry in layer.explain([16, 2500])] == ["sparse", "dense"]


def test_what_the_table_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = conv().pack("csr")
    monkeypatch.setattr(dispatch, "kernel_for", lambda *a: "c++")
    for machine in ("avx2", "avx512"):
        monkeypatch.setattr(dispatch, "machine_of", lambda device, machine=machine: machine)
        for entry, path in (({}, "dense"), ({"convolution": {"csr": [0.9] * 6}}, "sparse")):
            densities = {machine: {"float32": {"kept": {"csr": [1.0] * 6}, **entry}}}
            monkeypatch.setattr(dispatch, "table", lambda densities=densities: {"densities": densities})
            layer._replan()
            for found in layer.explain():
                assert found["path"] == path
                missing = f"the table has no entry for csr convolution in float32 on {machine}: prepare"
                assert found["why"].startswith(missing) == (not entry)
            assert all(layer._plans[torch.float32, False]) == bool(entry)


def test_layers_explain_themselves() -> None:
    for layer in (linear(), linear(mode="masked", gradient="ste"), conv(), conv(mode="masked")):
        (entry,) = layer.explain(3)
        assert entry["path"] == "dense" and entry["rows"] == "2-4" and entry["why"].startswith(layer.mode)
        assert len(layer.explain()) == 6 and len(layer.explain([1, 2, 3])) == 2


# -------------------------------------------------------------------------------------------------- whole models


def test_one_line_prunes_a_model() -> None:
    model = network()
    assert [type(m).__name__ for m in model] == ["SparseConv2d", "ReLU", "Flatten", "SparseLinear", "Tanh", "Linear"]
    assert [name for name, _ in masks(model)] == ["0", "3"]
    whole = sparsify_(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), density=0.5, include="*", scope="global")
    assert sum(int(m.mask.sum()) for _, m in masks(whole)) == 80 and not (whole[1].mask.sum(1) == 4).all()
    shares = sparsify_(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4), nn.Linear(4, 4)), density={"0": 0.25, "*": 0.5})
    assert [m.density() for _, m in masks(shares)] == [0.25, 0.5]
    some = sparsify_(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4), nn.Linear(4, 4)), density=0.5, exclude=["0"])
    assert [name for name, _ in masks(some)] == ["1"]
    given = {"1": a_mask((4, 8))}
    only = sparsify_(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), masks=given, mode="masked")
    assert [(n, torch.equal(m.mask, given["1"])) for n, m in masks(only)] == [("1", True)]
    alone = sparsify_(nn.Linear(8, 4), density=0.5)
    assert isinstance(alone, SparseLinear)
    tied = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False), nn.Linear(8, 2))
    tied[2].weight = tied[0].weight
    sparsify_(tied, density=0.5)
    assert [name for name, _ in masks(tied)] == ["1"]
    norms = {"0": torch.rand(16), "1": torch.rand(8)}
    wanda = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4), nn.Linear(4, 4))
    sparsify_(wanda, density=0.5, score="wanda", others=norms)
    assert [m.density() for _, m in masks(wanda)] == [0.5, 0.5]


def test_an_optimizer_made_before_goes_on() -> None:
    model = nn.Sequential(nn.Linear(IN, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsify_(model, density=0.5)
    before = model[0].weight.detach().clone()
    model(torch.randn(8, IN)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight) and holds(model)


def test_transposed_layers() -> None:
    """GPT-2's: the state stays one that its own model loads."""
    transformers = pytest.importorskip("transformers")
    dense = transformers.pytorch_utils.Conv1D(16, 16)
    state, x = copy.deepcopy(dense.state_dict()), torch.randn(3, 16)
    layer = SparseLinear.from_dense(dense, torch.ones(16, 16, dtype=torch.bool))
    torch.testing.assert_close(layer(x), dense(x))
    assert torch.equal(layer.state_dict()["weight"], state["weight"])
    assert not dense.load_state_dict(layer.state_dict(), strict=False).missing_keys
    fresh = SparseLinear.from_dense(transformers.pytorch_utils.Conv1D(16, 16), density=0.5)
    mask = fresh.mask
    fresh.load_state_dict(state)
    assert torch.equal(fresh.weight, torch.where(mask, state["weight"].t(), 0.0))


def test_torch_transformer_layers_take_them() -> None:
    """In evaluation torch reads the weights of its layers itself."""
    for mode in ("invariant", "masked", "compressed"):
        model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        sparsify_(model, density=0.3, include="linear*", mode=mode)
        x = torch.randn(2, 5, 32)
        trained = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), trained, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ refusals


def dense() -> nn.Linear:
    return nn.Linear(IN, OUT)


def with_nan() -> nn.Linear:
    layer = dense()
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    return layer


def integers() -> nn.Linear:
    layer = dense()
    layer.weight = nn.Parameter(torch.ones(OUT, IN, dtype=torch.int32), requires_grad=False)
    return layer


make = SparseLinear.from_dense


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: make(dense(), a_mask((3, 4))),
            ValueError,
            r"mask must have the shape of the weight \[20, 48\], got \[3, 4\]",
        ),
        (
            lambda: make(dense(), a_mask().float()),
            TypeError,
            "mask must be a bool tensor, got torch.float32; mask != 0 makes",
        ),
        (
            lambda: make(dense(), a_mask().float().requires_grad_()),
            TypeError,
            "mask must be a bool tensor, got torch.float32 that requires a gradient; a mask that is learned is a gate",
        ),
        (lambda: make(dense(), [1]), TypeError, "mask must be a bool tensor, got list"),
        (
            lambda: make(dense(), a_mask().to("meta")),
            ValueError,
            r"mask must be on the device of the weight \(cpu\), got meta",
        ),
        (lambda: make(dense(), density=0.0), ValueError, r"density must be in \(0, 1\], got 0.0"),
        (lambda: make(dense(), density=1.5), ValueError, r"density must be in \(0, 1\], got 1.5"),
        (lambda: make(dense(), density="half"), TypeError, "density must be a number, got 'half'"),
        (
            lambda: make(dense()),
            ValueError,
            "density must be given where neither a mask nor a pattern N:M is, got None",
        ),
        (lambda: make(dense(), a_mask(), density=0.5), ValueError, "mask and density must not both be given"),
        (
            lambda: make(dense(), pattern="2:5"),
            ValueError,
            "pattern '2:5' needs rows of a multiple of 5 weights, got 48; pad=True lets the last group be shorter",
        ),
        (lambda: make(dense(), pattern="5:4"), ValueError, "pattern N:M must have 1 <= N <= M, got '5:4'"),
        (
            lambda: make(dense(), pattern="2:4", density=0.3),
            ValueError,
            "density must be None, or 0.5 as the pattern says",
        ),
        (lambda: make(dense(), pattern="4by4"), ValueError, "pattern must be like '2:4'"),
        (
            lambda: make(dense(), pattern="0x4", density=0.5),
            ValueError,
            "pattern must be a block of at least 1x1, got '0x4'",
        ),
        (
            lambda: make(dense(), pattern=(16, 1), density=0.5),
            ValueError,
            r"pattern 16x1 must divide the weight \[20, 48\]",
        ),
        (lambda: make(with_nan(), density=0.5), ValueError, "weight must be finite, got 1 NaN or infinite of 960"),
        (
            lambda: make(dense(), pattern="16x1", density=0.5, pad=True),
            ValueError,
            "pad must be False where there is no",
        ),
        (lambda: make(dense(), pattern="2:4", pad=1), TypeError, "pad must be True or False, got 1"),
        (
            lambda: make(dense(), density=0.5, score="wanda", other=torch.full((IN,), torch.inf)),
            ValueError,
            "other must be finite, got 48 NaN or infinite of 48",
        ),
        (
            lambda: make(dense(), density=0.5, score=torch.ones(3)),
            ValueError,
            r"score must have the shape of the weight",
        ),
        (lambda: make(integers(), density=0.5), TypeError, "weight must be a floating-point tensor, got torch.int32"),
        (lambda: make(integers(), a_mask()), TypeError, "weight must be a floating-point tensor, got torch.int32"),
        (lambda: make(nn.Conv2d(1, 1, 1), density=0.5), TypeError, "module must be a Linear, got Conv2d"),
        (
            lambda: make(dense(), density=0.5, mode="C"),
            ValueError,
            "mode must be one of invariant, masked, compressed, auto",
        ),
        (
            lambda: make(dense(), density=0.5, format="csr"),
            TypeError,
            "the option 'format' is for the modes compressed",
        ),
        (lambda: make(dense(), density=0.5, scope="all"), ValueError, "scope must be one of row, tensor, got 'all'"),
        (lambda: SparseLinear(4, 4, mode="compressed"), ValueError, "got 'compressed': CompressedLinear is one"),
        (
            lambda: SparseLinear(4, 4, gradient="soft"),
            ValueError,
            "gradient must be one of hard, ste, srste, got 'soft'",
        ),
        (lambda: linear().pack("coo"), ValueError, "pack: format must be one of auto, csr"),
        (
            lambda: linear().update_mask(a_mask((2, 2))),
            ValueError,
            "SparseLinear.update_mask: mask must have the shape of",
        ),
        (
            lambda: sparsify_(nn.ReLU(), density=0.5),
            ValueError,
            "model must have a linear layer or a convolution to prune",
        ),
        (lambda: sparsify_("x", density=0.5), TypeError, "sparsify_: model must be a torch.nn.Module, got str"),
        (
            lambda: sparsify_(nn.Sequential(dense()), density=0.5, pattern="16x1"),
            ValueError,
            r"the layer '0' cannot be pruned \(.*must divide the weight \[20, 48\].*\); exclude can leave it out",
        ),
        (
            lambda: sparsify_(nn.Sequential(dense()), density={"1": 0.5}),
            ValueError,
            "density must have an entry that matches '0', got 1",
        ),
        (
            lambda: sparsify_(nn.Sequential(dense()), masks={"1": a_mask()}),
            ValueError,
            "masks must be of layers that can be pruned, got one for '1'",
        ),
        (
            lambda: sparsify_(nn.Sequential(dense()), density=0.5, score="wanda", others={}),
            ValueError,
            "others must have a tensor for the layer '0'",
        ),
        (
            lambda: sparsify_(nn.Sequential(dense()), pattern="2:4", scope="global"),
            ValueError,
            "scope 'global' needs one density and no pattern",
        ),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (1, 4)])
@pytest.mark.parametrize("columns", [3, 17, 18, 19, 20, 65])
def test_a_shorter_last_group(n: int, m: int, columns: int) -> None:
    """Of r weights behind the whole groups min(N, r) are kept; every format computes with such a mask."""
    dense = nn.Linear(columns, 21)
    layer = SparseLinear.from_dense(copy.deepcopy(dense), pattern=f"{n}:{m}", pad=True)
    for group, w in zip(layer.mask.split(m, 1), dense.weight.split(m, 1), strict=True):
        keep = min(n, w.shape[1])
        cut = w.abs().sort(descending=True).values[:, keep - 1 : keep]
        assert (group.sum(1) == keep).all() and torch.equal(group, w.abs() >= cut)
    x = torch.randn(70, columns)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        layer = SparseLinear.from_dense(copy.deepcopy(dense).to(dtype), pattern=f"{n}:{m}", pad=True)
        for format in ("bitmap", "csr", "delta"):
            packed = layer.pack(format)
            assert torch.equal(packed.sparse_weight.mask(), layer.mask)
            for rows in (1, 3, 70):
                inputs = x[:rows].to(dtype)
                wanted = F.linear(inputs, layer.weight, layer.bias)
                torch.testing.assert_close(
                    spmm(inputs, packed.sparse_weight, layer.bias), wanted, rtol=tolerance, atol=tolerance
                )
                torch.testing.assert_close(packed(inputs), wanted, rtol=tolerance, atol=tolerance)


def test_a_shorter_last_group_in_models() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(17, 8), nn.Linear(8, 2))
    with pytest.raises(
        ValueError, match="the layer '0' cannot be pruned .* multiple of 4 weights, got 18; pad=True lets"
    ):
        sparsify_(model, pattern="2:4")
    sparsify_(model, pattern="2:4", pad=True)
    assert [int(layer.mask[0].sum()) for _, layer in masks(model)] == [10, 9]
    with pytest.raises(ValueError, match="sparsify_: pad must be False where there is no pattern N:M, got True"):
        sparsify_(nn.Sequential(nn.Linear(4, 4)), density=0.5, scope="global", pad=True)


@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_are_refused_with_their_names(scope: str, value: float) -> None:
    """One rule for every scope, and for what is only a product."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.Conv2d(2, 4, 3), nn.Linear(4, 2))

    broken = model()
    broken[1].weight.data[2, 0, 1, 1] = value
    sentence = (
        r"sparsify_: the layer '1' cannot be pruned \(sparsify_: %s must be finite, got %d NaN or infinite of %d\)"
    )
    with pytest.raises(ValueError, match=sentence % ("weight", 1, 72)):
        sparsify_(broken, density=0.5, scope=scope)
    assert type(broken[0]) is nn.Linear
    gradients = {"0": torch.ones(4, 6), "1": torch.ones(4, 2, 3, 3)}
    sparsify_(model(), density=0.5, scope=scope, score="fisher", others=gradients)
    gradients["1"][1] = value
    with pytest.raises(ValueError, match=sentence % ("other", 18, 72)):
        sparsify_(model(), density=0.5, scope=scope, score="fisher", others=gradients)
    gradients["1"][1] = 1e30  # finite, and its square is not
    with pytest.raises(ValueError, match=sentence % ("scores 'fisher'", 18, 72)):
        sparsify_(model(), density=0.5, scope=scope, score="fisher", others=gradients)
    if scope != "global":
        scores = torch.ones(4, 6).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(value))
        with pytest.raises(
            ValueError, match="SparseLinear.from_dense: score must be finite, got 1 NaN or infinite of 24"
        ):
            SparseLinear.from_dense(nn.Linear(6, 4), density=0.5, score=scores, scope=scope)


def test_a_model_that_cannot_be_pruned_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 5), nn.Linear(5, 2))
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="the layer '1' cannot be pruned"):
        sparsify_(model, density=0.5, pattern="16x1")
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", ["sparse", "compressed", "mask_checks"])
def test_the_examples_of_the_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"cofire.nn.{name}")
    public = [n for n in module.__all__ if n not in ("Sparse", "Compressed", "Watched")]  # what layers share
    assert public
    monkeypatch.setattr(module, "__all__", public)
    check_examples(module)
