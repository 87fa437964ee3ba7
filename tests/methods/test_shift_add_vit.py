# SPDX-License-Identifier: Apache-2.0
"""ShiftAddViT: what each stage replaces in which networks, losses, what is deployed and reported, refusals, the protocol."""

from __future__ import annotations

import copy
import doctest
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cofire import models
from cofire.methods import METHODS, ShiftAddViT
from cofire.methods.shift_add_vit import PairAttention
from cofire.models.pvt import ReducedAttention
from cofire.models.vit import Attention
from cofire.nn import BinaryLinearAttention, MixtureOfPrimitives, PackedMixture, QuantLinear, ShiftLinear
from helpers import stored_bytes
from methods.protocol import check_protocol

torch.manual_seed(0)
BATCH = (torch.randn(8, 1, 8, 8), torch.randint(4, (8,)))
X = BATCH[0]
HASH = {"bits": 8, "anchors": 6, "topk": 4, "kernel_size": 3}


def network(**options):
    """One block of two heads on four patches."""
    sizes = {"image": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2, "in_channels": 1, "num_classes": 4}
    return models.vit(**sizes | options)


def additions():
    return ShiftAddViT(stage=1, encoder="binary", kernel_size=3)


def shifts():
    return ShiftAddViT(stage=2, **HASH)


def mixed():
    """Neither noise nor balance: with them, halves of a batch differ from the whole, as with the statistics of a norm."""
    return ShiftAddViT(stage=3, alpha=(6, 4), noise=False, balance=0, **HASH)


def balanced():
    return ShiftAddViT(stage=3, alpha=(6, 4), noise=False, **HASH)


def kinds(model, *classes):
    return {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, classes)}


def train(method, model, steps=2, x=X, y=BATCH[1]):
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr=1e-2))
    for _ in range(steps):
        optimizer.zero_grad()
        output = model.train()(x)
        (F.cross_entropy(output, y) + method.loss(model, output)).backward()
        optimizer.step()
        method.step(model)
    return model


# --------------------------------------------------------------------------------------------------- protocol


def protocol(method, *without):
    checks = check_protocol(method, network, BATCH, example_input=X)
    return [check for check in checks if check.id not in without]


#: A loss of their own have only the mixtures that are to be balanced.
ZERO = ("loss_reaches_something",)
#: The balance of a batch is not that of its halves.
OF_A_BATCH = ("accumulated_halves_equal_the_batch", "two_processes_equal_one")


@pytest.mark.parametrize("check", protocol(shifts, *ZERO))
def test_protocol_of_shifts(check):
    check()


@pytest.mark.parametrize("check", protocol(balanced, *OF_A_BATCH))
def test_protocol_of_a_balanced_mixture(check):
    check()


@pytest.mark.full
@pytest.mark.parametrize("check", protocol(additions, *ZERO))
def test_protocol_of_additions(check):
    check()


@pytest.mark.full
@pytest.mark.parametrize("check", protocol(mixed, *ZERO))
def test_protocol_of_a_mixture(check):
    check()


# ---------------------------------------------------------------------------------------------------- prepare


def test_each_stage_replaces_its_layers_and_no_others():
    dense = network(depth=2)
    one = ShiftAddViT(stage=1, **HASH).prepare(dense, X)
    names = [f"blocks.{i}.attn" for i in (0, 1)]
    assert kinds(one, BinaryLinearAttention, ShiftLinear, Attention) == dict.fromkeys(names, "BinaryLinearAttention")
    inner = [f"{n}.{p}" for n in names for p in ("qk", "v", "proj")] + [
        f"blocks.{i}.{p}" for i in (0, 1) for p in ("up", "down")
    ]
    two = ShiftAddViT(stage=2, **HASH).prepare(one)
    assert (
        kinds(two, ShiftLinear)
        == dict.fromkeys(sorted(inner), "ShiftLinear")
        == dict(sorted(kinds(ShiftAddViT(stage=2, **HASH).prepare(dense, X), ShiftLinear).items()))
    )
    assert type(two.embed) is type(two.head) is nn.Linear
    three = ShiftAddViT(stage=3, alpha=(6, 4), **HASH)
    for before in (one, two):
        assert set(kinds(three.prepare(before), MixtureOfPrimitives)) == set(inner)
    assert METHODS["shiftaddvit"] is ShiftAddViT


def test_weights_are_taken_over():
    dense = network()
    old = dense.blocks[0].attn
    for fused in (False, True):
        if fused:
            old = dense.blocks[0].attn = _fuse(old)
        one = ShiftAddViT(stage=1, **HASH).prepare(dense, X).blocks[0].attn
        first = old.q if not fused else old.qkv
        assert torch.equal(one.qk.weight, first.weight[:16]) and torch.equal(one.qk.bias, first.bias[:16])
        value = old.v.weight if not fused else old.qkv.weight[32:]
        assert torch.equal(one.v.weight, value) and torch.equal(one.proj.weight, old.proj.weight)
        assert one.is_fitted and one.v.weight.data_ptr() != value.data_ptr()
        binary = additions().prepare(dense, X).blocks[0].attn
        key = old.k.weight if not fused else old.qkv.weight[16:32]
        assert torch.equal(binary.k.weight, key) and binary.threshold.abs().sum() > 0
    two = ShiftAddViT(stage=2, **HASH).prepare(dense, X)
    ratio = two.blocks[0].up.weight / dense.blocks[0].up.weight
    assert ratio.min() >= 2**-0.5 - 1e-6 and ratio.max() <= 2**0.5 + 1e-6


def _fuse(old):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = old.num_heads
            self.qkv = nn.Linear(16, 48)
            self.proj = old.proj
            with torch.no_grad():
                self.qkv.weight.copy_(torch.cat([p.weight for p in (old.q, old.k, old.v)]))
                self.qkv.bias.copy_(torch.cat([p.bias for p in (old.q, old.k, old.v)]))

        def forward(self, x):
            q, k, v = (p.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, 2))
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return Fused()


def test_attentions_are_fitted_one_after_the_other():
    """The second one to what the first one, already replaced, lets through."""
    model = ShiftAddViT(stage=1, **HASH).prepare(network(depth=2), X)
    seen = []
    model.blocks[1].attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval()(X)
    again = copy.deepcopy(model.blocks[1].attn)
    before = again.projection.clone()
    assert torch.equal(again.fit(seen[0]).projection, before)


def test_a_pyramid_keeps_its_last_stage():
    dense = models.pvt(
        8, 1, widths=(16, 16), depths=(1, 1), heads=(1, 2), reductions=(2, 1), in_channels=1, num_classes=4
    )
    method = ShiftAddViT(stage=3, alpha=(6, 4), keep_attention=["stages.1.*"], skip=["stages.1.blocks.0.up"], **HASH)
    model = method.prepare(dense, X)
    assert kinds(model, BinaryLinearAttention, ReducedAttention) == {
        "stages.0.blocks.0.attn": "BinaryLinearAttention",
        "stages.1.blocks.0.attn": "ReducedAttention",
    }
    attention = model.stages[0].blocks[0].attn
    old = dense.stages[0].blocks[0].attn
    assert torch.equal(attention.v.dense.weight / 2, old.kv.weight[16:])
    expected = {f"stages.0.blocks.0.{n}" for n in ("attn.qk", "attn.v", "attn.proj", "up", "down")}
    assert set(kinds(model, MixtureOfPrimitives)) == expected | {"stages.1.blocks.0.down"}
    train(method, model)
    final = method.finalize(model)
    torch.testing.assert_close(final(X), model.eval()(X), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_vision_transformers_of_transformers(stage):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    dense = transformers.ViTForImageClassification(config)
    method = ShiftAddViT(stage=stage, alpha=(6, 4), **HASH)
    model = method.prepare(dense, X)
    assert len(kinds(model, BinaryLinearAttention)) == 2 and len(kinds(model, PairAttention)) == 2
    assert type(model.classifier) is nn.Linear
    found = kinds(model, *[(ShiftLinear,), (MixtureOfPrimitives,)][stage == 3])
    assert len(found) == (0 if stage == 1 else 2 * 5)
    output = model.train()(X).logits
    (F.cross_entropy(output, BATCH[1]) + method.loss(model, output)).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".attention." in n)
    final = method.finalize(model)
    torch.testing.assert_close(final(X).logits, model.eval()(X).logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match="attention of additions takes no mask, got attention_mask"):
        next(m for m in model.modules() if isinstance(m, PairAttention))(
            torch.randn(1, 5, 16), attention_mask=torch.ones(1, 5)
        )


# ------------------------------------------------------------------------------------------------ loss and step


def test_the_loss_is_the_weighted_sum_of_the_balances():
    method = ShiftAddViT(stage=3, balance=0.5, alpha=(6, 4), **HASH)
    model = method.prepare(network(), X).train()
    with pytest.raises(ValueError, match="seen no forward in training mode"):
        method.loss(model)
    model(X)
    parts = [m.balance_loss for m in model.modules() if isinstance(m, MixtureOfPrimitives)]
    assert len(parts) == 5
    torch.testing.assert_close(method.loss(model), 0.5 * sum(parts))
    zero = ShiftAddViT(stage=2, **HASH)
    assert zero.loss(zero.prepare(network(), X)) == 0


@pytest.mark.parametrize("alpha", [(6, 4), (2, 8)])
def test_the_share_of_tokens_follows_the_latencies(alpha):
    """Tokens without a mean, so that it takes the router's bias; and a task, as everywhere."""
    layer = MixtureOfPrimitives(8, 4, alpha=alpha)
    x, target = torch.randn(200, 8), torch.randn(200, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        y = layer(x)
        (0.1 * F.mse_loss(y, target) + 0.1 * layer.balance_loss).backward()
        optimizer.step()
    share = float(layer.eval().route(x)[2][1]) / 200
    assert abs(share - alpha[0] / sum(alpha)) < 0.08


def test_step_keeps_shifts_in_range_and_moves_thresholds():
    method = ShiftAddViT(stage=2, encoder="binary", kernel_size=3)
    model = method.prepare(network(), X)
    layer, attention = model.blocks[0].up, model.blocks[0].attn
    before = attention.threshold.clone()
    with torch.no_grad():
        layer.shift[0, 0], layer.shift[0, 1] = 0.5, -15.0
    model(X)
    assert attention.threshold_count == 1 and torch.equal(attention.threshold, before)
    with torch.no_grad():
        attention.threshold_sum += 1
    method.step(model)
    assert layer.shift[0, :2].tolist() == [0.0, -14.0]
    assert not torch.equal(attention.threshold, before) and attention.threshold_count == 0


def test_noise_falls_to_nothing():
    method = ShiftAddViT(stage=3, alpha=(6, 4), noise_steps=4, **HASH)
    model = method.prepare(network(), X)
    layers = [m for m in model.modules() if isinstance(m, MixtureOfPrimitives)]
    for left in (0.75, 0.5, 0.25, 0.0, 0.0):
        method.step(model)
        assert [float(m.noise_scale) for m in layers] == [left] * 5
    x = torch.randn(50, 16)
    with torch.no_grad():
        layers[0].router.weight.normal_()
    layers[0].train()
    torch.testing.assert_close(layers[0](x), layers[0].eval()(x), rtol=0.1, atol=0.05)
    plain = ShiftAddViT(stage=3, alpha=(6, 4), **HASH)
    kept = plain.prepare(network(), X)
    plain.step(kept)
    assert all(m.noise_scale == 1 for m in kept.modules() if isinstance(m, MixtureOfPrimitives))


def test_parameter_groups_hold_each_parameter_once():
    method = ShiftAddViT(stage=3, alpha=(6, 4), **HASH)
    model = method.prepare(network(), X)
    groups = method.parameter_groups(model, lr=1e-3, shift_lr=1e-2, router_lr=1e-1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.05), (1e-3, 0), (1e-2, 0), (1e-1, 0)]
    layer = model.blocks[0].up
    assert {id(layer.shift.shift), id(layer.shift.sign)} <= {id(p) for p in groups[2]["params"]}
    assert {id(layer.router.weight), id(layer.noise.weight)} <= {id(p) for p in groups[3]["params"]}


def test_latencies_are_measured_when_it_is_prepared():
    method = ShiftAddViT(stage=3, **HASH)
    model = method.prepare(network(), X)
    mixtures = [m for m in model.modules() if isinstance(m, MixtureOfPrimitives)]
    assert all(m.measured == 1 and min(m.costs.tolist()) > 0 for m in mixtures)
    train(method, model)
    assert all(m.measured == 1 for m in mixtures)
    method.measure(model, [X])
    assert all(m.measured == 2 for m in mixtures)
    given = ShiftAddViT(stage=3, alpha=(6, 4), **HASH).prepare(network(), X)
    assert all(m.measured == 0 for m in given.modules() if isinstance(m, MixtureOfPrimitives))


# ------------------------------------------------------------------------------------------- finalize and report


@pytest.mark.parametrize("encoder", ["hash", "binary"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_deployed_network_computes_what_was_trained(stage, encoder):
    method = ShiftAddViT(stage=stage, encoder=encoder, alpha=(6, 4), **HASH)
    model = train(method, method.prepare(network(), X))
    final = method.finalize(model)
    torch.testing.assert_close(final(X), model.eval()(X), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.cat([final(x) for x in X.split(1)]), final(X), rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in final.parameters())
    assert not kinds(final, ShiftLinear, MixtureOfPrimitives)
    assert len(kinds(final, PackedMixture)) == (5 if stage == 3 and encoder == "hash" else 6 if stage == 3 else 0)
    assert bool(kinds(final, QuantLinear)) == (stage > 1)
    again = method.finalize(method.prepare(network(), X))  # of other weights
    again.load_state_dict(final.state_dict())
    assert torch.equal(again(X), final(X))


def test_the_report_counts_bytes_dead_weights_and_tokens():
    dense = network()
    method = ShiftAddViT(stage=2, **HASH)
    model = method.prepare(dense, X)
    with torch.no_grad():
        model.blocks[0].up.sign[0] = 0.25
    report = method.report(model, [BATCH, X], dense=dense)
    linear = 16 * 16 * 3 + 2 * 16 * 32
    biases = 16 * 3 + 32 + 16
    assert report.stage == 2 and report.attentions == 1 and report.dead == 16
    assert report.dense_bytes == 4 * (linear + biases)
    codes = linear * 5 // 8
    assert report.packed_bytes == codes + 4 * biases + 5 * 4 * 32  # and a table of 32 for each layer
    assert report.resident_bytes == report.packed_bytes and report.model_resident_bytes == report.model_bytes
    final = method.finalize(model)
    assert report.model_bytes == sum(t.nbytes for t in final.state_dict().values())
    assert report.model_dense_bytes == stored_bytes(dense)
    assert report.deployed_error < 1e-5 and report.deployed_equal == 1.0
    assert report.shift_share is None and report.balanced_share is None
    assert report.latency.shape == (8, 1, 8, 8) and report.latency.packed_ms > 0
    assert [layer.kind for layer in report.layers] == ["shift"] * 5

    method = ShiftAddViT(stage=3, alpha=(6, 4), **HASH)
    model = method.prepare(dense, X)
    report = method.report(model, [BATCH])
    assert report.shift_share == 1.0 and report.balanced_share == pytest.approx(0.6)  # equal logits: the cheap expert
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, MixtureOfPrimitives):
                m.router.weight.normal_()
    report = method.report(model, [BATCH])
    counted = []
    for layer in (m for m in model.modules() if isinstance(m, MixtureOfPrimitives)):
        layer.register_forward_hook(lambda m, args, y: counted.append(m.route(args[0])[2].tolist()))
    model.eval()(X)
    dense_tokens, shift_tokens = (sum(c[i] for c in counted) for i in (0, 1))
    assert report.shift_share == pytest.approx(shift_tokens / (dense_tokens + shift_tokens))
    assert [layer.costs for layer in report.layers] == [(6.0, 4.0)] * 5
    copies = [m.decoded().nbytes for m in method.finalize(model).modules() if isinstance(m, PackedMixture)]
    assert [layer.resident_bytes - layer.packed_bytes for layer in report.layers] == copies
    assert report.resident_bytes - report.packed_bytes == 4 * linear == report.model_resident_bytes - report.model_bytes
    assert report.latency is None and report.model_dense_bytes is None
    assert method.report(model).shift_share is None


def test_int8_activations_reach_the_deployed_network():
    method = ShiftAddViT(stage=2, format="S4", activations="int8", **HASH)
    final = method.finalize(method.prepare(network(), X))
    layers = [m for m in final.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 5 and all(m.activations == "int8" and m.bits == 4 for m in layers)
    assert final(X).isfinite().all()


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"stage": 4}, ValueError, "ShiftAddViT: stage must be 1, 2 or 3, got 4"),
        ({"encoder": "sum"}, ValueError, "encoder must be one of hash, binary, got 'sum'"),
        ({"bits": 65}, ValueError, "bits must be between 1 and 64, got 65"),
        ({"format": "S3"}, ValueError, "format must be one of S5, S4, S8"),
        ({"activations": "int8"}, ValueError, "int8 activations need stage 2 and format S4, got 3, 'S5'"),
        ({"noise_steps": 0}, ValueError, "noise_steps must be at least 1, or None, got 0"),
        ({"alpha": (1, 2, 3)}, ValueError, "alpha must be two positive numbers"),
        ({"balance": -1}, ValueError, "balance must not be negative, got -1"),
        ({"balance": math.inf}, ValueError, "balance must not be negative"),
        ({"skip": "embed"}, TypeError, "skip must be a sequence of names or patterns, got 'embed'"),
        ({"keep_attention": [1]}, TypeError, "keep_attention must be a sequence of names"),
    ],
)
def test_hyperparameters_out_of_range(options, error, sentence):
    with pytest.raises(error, match=sentence):
        ShiftAddViT(**options)


class Relative(Attention):
    def __init__(self):
        super().__init__(16, 2)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(4, 4))


class Grouped(Attention):
    def __init__(self):
        super().__init__(16, 2)
        self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (None, {"keep_attention": ["blocks.9*"]}, r"keep_attention names 'blocks.9\*', which fits no attention"),
        (None, {"skip": ["blocks.0.upp"]}, "skip names 'blocks.0.upp', which fits no linear layer"),
        (None, {"keep_attention": ["*"]}, "there is no attention to replace"),
        (None, {"skip": ["*"]}, "there is no linear layer to replace"),
        (None, {"anchors": 40}, r"attention 'blocks.0.attn': .*at least as many tokens as its 40 anchors, got 32"),
        (Relative, {}, r"attention 'blocks.0.attn' has a relative bias \('relative_position_bias_table'\)"),
        (
            Grouped,
            {},
            r"has 2 heads and projections \[\[16, 16\], \[8, 16\], \[8, 16\]\]: it needs three of 16 features",
        ),
    ],
)
def test_networks_that_cannot_be_prepared(change, options, sentence):
    model = network()
    if change is not None:
        model.blocks[0].attn = change()
        model.blocks[0].attn.forward = lambda x: x
    with pytest.raises(ValueError, match=sentence):
        ShiftAddViT(**{"stage": 2, **HASH, **options}).prepare(model, X)


def test_misuse():
    with pytest.raises(ValueError, match="there is no attention to replace"):
        ShiftAddViT(stage=1).prepare(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="example_input must be a batch of inputs, got None: attentions are fitted"):
        ShiftAddViT(stage=1).prepare(network())
    one = ShiftAddViT(stage=1, **HASH).prepare(network(), X)
    with pytest.raises(ValueError, match="latencies are measured with its tokens"):
        ShiftAddViT(stage=3, **HASH).prepare(one)
    with pytest.raises(ValueError, match="prepared already, at stage 1; this is stage 1"):
        ShiftAddViT(stage=1, **HASH).prepare(one, X)
    with pytest.raises(ValueError, match="the model has no mixture; prepare it at stage 3"):
        ShiftAddViT(stage=1, **HASH).measure(one, X)
    with pytest.raises(ValueError, match="dense needs a batch to be timed on"):
        ShiftAddViT(stage=1, **HASH).report(one, dense=network())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        ShiftAddViT().prepare(3)


def test_docstrings():
    module = importlib.import_module("cofire.methods.shift_add_vit")
    assert doctest.testmod(module).failed == 0
