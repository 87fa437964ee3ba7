# SPDX-License-Identifier: Apache-2.0
"""eDKM: what is clustered, the schedule, what is packed, and the protocol of the methods."""

from __future__ import annotations

import copy
import doctest
import importlib
import math
import warnings

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from cofire import ops
from cofire.methods import EDKM, METHODS
from cofire.nn import (
    PackedPalettizedConv2d,
    PackedPalettizedLinear,
    Palettized,
    PalettizedConv2d,
    PalettizedEmbedding,
    PalettizedLinear,
)
from cofire.nn.clustering import soft_evaluation
from helpers import stored_bytes
from methods.protocol import check_protocol

torch.manual_seed(0)
BATCH = (torch.randn(8, 2, 6, 6), torch.randint(4, (8,)))


def network():
    """A convolution, a batch norm and two linear layers, each with a few hundred weights."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 4),
    )


def method():
    return EDKM(bits=2, weight_threshold=100, group_rows=8, total_steps=20)


def implicit():
    return EDKM(bits=2, weight_threshold=100, grad="implicit")


class Tied(nn.Module):
    """An embedding and the linear layer that shares its weight."""

    def __init__(self, words=40, width=16):
        super().__init__()
        self.embed, self.hidden, self.head = (
            nn.Embedding(words, width),
            nn.Linear(width, width),
            nn.Linear(width, words),
        )
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.embed(x))))


def palettized(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Palettized)}


def train(method, model, steps, batch=BATCH, lr=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(model(batch[0]), batch[1]) + method.loss(model)).backward()
        optimizer.step()
        method.step(model)
    return model


# --------------------------------------------------------------------------------------------------- protocol


def protocol(method):
    """All but the check that a method's own loss trains something: this method's loss is zero by design."""
    checks = check_protocol(method, network, BATCH)
    return [check for check in checks if check.id != "loss_reaches_something"]


@pytest.mark.parametrize("check", protocol(method))
def test_protocol(check):
    check()


@pytest.mark.full
@pytest.mark.parametrize("check", protocol(implicit))
def test_protocol_with_the_implicit_gradient(check):
    check()


def test_the_loss_is_zero_and_leaves_no_gradient():
    model = method().prepare(network())
    loss = method().loss(model)
    assert loss.dim() == 0 and loss == 0 and loss.requires_grad
    loss.backward()
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------- prepare


def test_what_is_clustered():
    model = EDKM(bits=3, conv_bits=2, weight_threshold=150).prepare(network())
    layers = palettized(model)
    assert {name: (type(m), m.palette.bits) for name, m in layers.items()} == {
        "3": (PalettizedConv2d, 2),
        "6": (PalettizedLinear, 3),
    }
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in network().named_parameters()]
    assert layers["6"].palette.parameter_name == "6.weight"
    assert METHODS["edkm"] is EDKM


def test_the_default_threshold_leaves_small_weights_alone():
    model = EDKM().prepare(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 31), nn.Linear(64, 32)))
    assert list(palettized(model)) == ["0", "2"]


def test_bits_by_name_and_pattern():
    make = lambda **options: palettized(EDKM(weight_threshold=1, **options).prepare(network()))  # noqa: E731
    assert {n: m.palette.bits for n, m in make(bits={"6": 4, "[038]": 2}).items()} == {"0": 2, "3": 2, "6": 4, "8": 2}
    assert {n: m.palette.bits for n, m in make(bits={"*": 1, "6": 4}).items()} == {"0": 1, "3": 1, "6": 4, "8": 1}
    assert list(make(bits={"6": 4})) == ["6"]
    assert list(make(bits=2, skip=["0", "[68]"])) == ["3"]


def test_a_single_layer_is_a_model():
    model = EDKM(weight_threshold=1).prepare(nn.Linear(16, 4))
    assert type(model) is PalettizedLinear and type(EDKM().finalize(model)) is PackedPalettizedLinear


def test_the_same_module_in_two_places():
    shared = nn.Linear(16, 16)
    model = EDKM(weight_threshold=1, bits=2).prepare(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    final = EDKM().finalize(model)
    assert final[0] is final[2]
    assert len(EDKM().report(model).layers) == 1


def test_any_name_of_a_module_chooses_it():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(16, 16)})
    by_bits = EDKM(weight_threshold=1, bits={"second": 2}).prepare(model)
    assert by_bits["first"] is by_bits["second"] and by_bits["first"].palette.bits == 2
    assert type(by_bits["other"]) is nn.Linear
    skipped = EDKM(weight_threshold=1, bits=2, skip=["sec*"]).prepare(model)
    assert type(skipped["first"]) is nn.Linear and type(skipped["other"]) is PalettizedLinear


def test_classes_derived_from_linear_are_left_alone():
    """``nn.MultiheadAttention`` reads the weight of its ``out_proj`` past the layer's forward."""
    model = EDKM(weight_threshold=1, bits=2).prepare(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    assert sorted(palettized(model)) == ["linear1", "linear2"]


def test_the_fused_encoder_does_not_bypass_the_palette():
    """In evaluation without gradients, the encoder layer of torch reads weights; see the hook of the layers."""
    method = EDKM(weight_threshold=1, bits=1)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = method.prepare(layer).eval()
    x = torch.randn(2, 5, 16)
    slow = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)
        torch.testing.assert_close(method.finalize(model)(x), slow, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(layer.eval()(x), slow, atol=1e-3)


def test_tied_weights_stay_tied():
    method = EDKM(bits=2, embedding_bits=3, weight_threshold=100, total_steps=6)
    model = method.prepare(Tied())
    assert type(model.embed) is PalettizedEmbedding and type(model.head) is PalettizedLinear
    assert model.embed.weight is model.head.weight and model.embed.palette is model.head.palette
    assert model.embed.palette.bits == 3 and model.hidden.palette.bits == 2
    words = torch.randint(40, (6,))
    train(method, model, 3, (words, words))
    assert model.embed.palette.steps == 3 == model.embed.palette.count
    for copied in (copy.deepcopy(model), copy.deepcopy(model).double().float()):
        assert copied.embed.weight is copied.head.weight and copied.embed.palette is copied.head.palette
    report = method.report(model)
    assert [layer.name for layer in report.layers] == ["embed", "hidden"]
    final = method.finalize(model)
    assert final.embed.palette is final.head.palette
    assert torch.equal(final.embed.weight, final.head.weight)
    torch.testing.assert_close(final(words), model.eval()(words))


def test_prepare_on_the_meta_device_waits_for_a_state():
    method = EDKM(bits=2, weight_threshold=100)
    trained = train(method, method.prepare(network()), 2)
    with torch.device("meta"):
        empty = network()
    model = method.prepare(empty)
    assert not any(m.palette.initialized for m in palettized(model).values())
    model.load_state_dict(trained.state_dict(), assign=True)
    assert all(m.palette.initialized and m.palette.count == 2 for m in palettized(model).values())
    torch.testing.assert_close(model.eval()(BATCH[0]), trained.eval()(BATCH[0]))
    train(method, model.train(), 1)


# --------------------------------------------------------------------------------------------------- schedule


def test_the_temperature_follows_a_cosine():
    method = EDKM(rho=0.4, rho_end=0.1, total_steps=10, milestone=2)
    assert [method.heat(step) for step in (0, 2, 6, 10, 99)] == pytest.approx([0.4, 0.4, 0.25, 0.1, 0.1])
    assert EDKM(rho=0.4).heat(1000) == 0.4 and EDKM(tau=1e-4, total_steps=5).heat(3) == 1e-4


def test_phases():
    method = EDKM(bits=2, weight_threshold=100, total_steps=10, milestone=3, hard_last=0.2)
    model = method.prepare(network())
    layer = palettized(model)["6"]
    start = layer.palette.centroids.clone()
    x = torch.randn(3, 32)
    seen = []
    for step in range(10):
        seen.append((layer.palette.enabled, layer.palette.hard))
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) == (step < 3)
        train(method, model, 1)
        assert float(layer.palette.heat) == pytest.approx(method.heat(step + 1))
        if step == 2:
            assert not torch.equal(layer.palette.centroids, start)  # of the weights as they are now
    assert seen == [(False, False)] * 3 + [(True, False)] * 5 + [(True, True)] * 2
    found = layer.palette.cluster(layer.weight)
    assert (found.output.flatten()[:, None] - found.centroids.flatten()).abs().amin(1).max() < 1e-6  # hard


def test_phases_are_part_of_the_state():
    method = EDKM(bits=2, weight_threshold=100, total_steps=10, milestone=3, hard_last=0.2)
    for steps in (2, 5, 9):
        through = train(method, method.prepare(network()), steps)
        other = method.prepare(network())
        other.load_state_dict(safetensors.torch.load(safetensors.torch.save(through.state_dict())))
        for a, b in zip(palettized(through).values(), palettized(other).values()):
            assert (a.palette.enabled, a.palette.hard, a.palette.count) == (b.palette.enabled, b.palette.hard, steps)
        torch.testing.assert_close(through(BATCH[0]), other(BATCH[0]), rtol=0, atol=0)


def test_centroids_move_once_per_step():
    method = EDKM(bits=2, weight_threshold=100)
    model = method.prepare(network())
    layer = palettized(model)["6"]
    before = layer.centroids.clone()
    x = torch.randn(2, 32)
    first, second = layer(x), layer(x)
    assert torch.equal(first, second) and torch.equal(layer.centroids, before)
    expected = layer.palette.cluster(layer.weight).centroids
    method.step(model)
    assert torch.equal(layer.centroids, expected) and not torch.equal(before, expected)
    method.step(model)  # without a forward between: nothing moves
    assert torch.equal(layer.centroids, expected)


def test_equal_centroids_part_in_a_step(monkeypatch):
    monkeypatch.setattr("cofire.methods.edkm.SEPARATE_EVERY", 2)
    method = EDKM(bits=2, weight_threshold=100)
    model = method.prepare(network())
    palette = palettized(model)["6"].palette
    for p in (palette.centroids, palette.moved):
        p[0, 2] = p[0, 1]
    method.step(model)
    assert palette.centroids.unique().numel() == 3
    method.step(model)
    assert palette.centroids.unique().numel() == 4


def test_training_with_a_falling_temperature_closes_the_gap():
    """The end of the schedule: what training computes with is what is deployed."""
    method = EDKM(bits=2, weight_threshold=100, total_steps=40)
    model = method.prepare(network())
    start = method.report(model)
    train(method, model, 40)
    end = method.report(model)
    assert end.soft_hard < start.soft_hard / 3
    loss = F.cross_entropy(method.finalize(model)(BATCH[0]), BATCH[1])
    assert loss < F.cross_entropy(method.finalize(method.prepare(network()))(BATCH[0]), BATCH[1])


# ------------------------------------------------------------------------------------------ finalize and report


@pytest.mark.parametrize("options", [{}, {"group_rows": 3}, {"per_channel_scale": True}, {"cluster_dim": 2}])
def test_the_final_model_equals_evaluation(options):
    method = EDKM(bits=2, weight_threshold=100, **options)
    model = train(method, method.prepare(network()), 3).eval()
    final = method.finalize(model)
    assert not final.training
    assert [type(final[i]) for i in (0, 3, 6)] == [
        PackedPalettizedConv2d,
        PackedPalettizedConv2d,
        PackedPalettizedLinear,
    ]
    # (not to the bit: the packed product sums in another order)
    torch.testing.assert_close(final(BATCH[0]), model(BATCH[0]), rtol=1e-4, atol=1e-5)
    again = method.finalize(method.prepare(network()))
    again.load_state_dict(safetensors.torch.load(safetensors.torch.save(final.state_dict())))
    assert torch.equal(again(BATCH[0]), final(BATCH[0]))


def test_report_counts_bytes():
    method = EDKM(bits=3, embedding_bits=8, weight_threshold=100)
    model = method.prepare(nn.Sequential(nn.Embedding(300, 16), nn.Linear(16, 20), nn.LayerNorm(20)))
    report = method.report(model)
    first, second = report.layers
    assert (first.name, first.shape, first.bits, first.palettes) == ("0", (300, 16), 8, 1)
    assert (first.dense_bytes, first.packed_bytes) == (300 * 16 * 4, 300 * 16 + 256 * 4)
    assert (second.dense_bytes, second.packed_bytes) == (320 * 4, 320 * 3 // 8 + 8 * 4)
    assert report.dense_bytes == first.dense_bytes + second.dense_bytes
    assert report.model_dense_bytes == report.dense_bytes + 3 * 20 * 4
    assert report.model_packed_bytes == report.packed_bytes + 3 * 20 * 4
    assert report.bits_per_weight == pytest.approx(8 * report.packed_bytes / (300 * 16 + 320))
    assert report.output_gap is None and report.below_floor == report.stalled == 0
    final = method.finalize(model)
    stored = stored_bytes(final)
    assert stored == report.model_packed_bytes


def test_a_weight_that_a_plain_layer_shares_stays_in_the_model():
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40, bias=False))
    model[1].weight = model[0].weight
    method = EDKM(bits=3, weight_threshold=100, skip=["1"])
    prepared = method.prepare(model)
    final, report = method.finalize(prepared), method.report(prepared)
    assert report.model_packed_bytes == stored_bytes(final)
    assert report.model_packed_bytes == report.packed_bytes + 40 * 16 * 4


def test_packed_before_the_milestone_it_is_the_weights_as_they_are_now():
    method = EDKM(bits=2, weight_threshold=100, milestone=10)
    model = method.prepare(network())
    with torch.no_grad():
        model[6].weight += 5
    assert (method.finalize(model)[6].weight - model[6].weight).abs().max() < 1


def test_hooks_of_the_layers_stay():
    model = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 4))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[1].register_forward_hook(lambda module, args, kwargs, output: output * 3, with_kwargs=True)
    clustering = method()
    prepared = clustering.prepare(model).eval()
    x = torch.randn(2, 32)
    torch.testing.assert_close(clustering.finalize(prepared)(x), prepared(x))


def test_report_says_how_soft_training_is():
    method = EDKM(bits=2, weight_threshold=100, rho=0.3)
    model = method.prepare(network())
    layer = palettized(model)["6"]
    soft = layer.palette(layer.weight).detach()
    hard = layer.pack().weight
    found = {entry.name: entry for entry in method.report(model).layers}["6"]
    assert found.soft_hard == pytest.approx(
        float((soft - hard).square().mean().sqrt() / layer.weight.detach().std(correction=0))
    )
    report = method.report(model, [BATCH])
    model.eval()
    with soft_evaluation(model), torch.no_grad():
        soft = model(BATCH[0])
    gap = (soft - model(BATCH[0])).detach().square().mean().sqrt() / model(BATCH[0]).std(correction=0)
    assert report.output_gap == pytest.approx(float(gap.detach()), rel=1e-4)


def test_report_counts_palettes_below_the_floor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once per process, wherever that was
        method = EDKM(bits=2, weight_threshold=100, grad="implicit", tau=1e-9)
        report = method.report(method.prepare(network().bfloat16()))
    assert report.below_floor == sum(layer.palettes for layer in report.layers) and report.stalled == 0


def test_report_changes_nothing():
    method = EDKM(bits=2, weight_threshold=100)
    model = method.prepare(network()).train()
    before = copy.deepcopy(model.state_dict())
    method.report(model, [BATCH, BATCH[0]])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


# ------------------------------------------------------------------------------------------------------ errors


def test_nan_names_the_parameter():
    method = EDKM(bits=2, weight_threshold=100)
    model = method.prepare(network())
    model[6].weight.data[0, :2] = math.nan
    with pytest.raises(ValueError, match=r"^6\.weight: dkm: weight must be finite, got 2 NaN and 0 infinite values"):
        model(BATCH[0])
    broken = network()
    broken[6].weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"^6\.weight: kmeans1d: weight must be finite, got 0 NaN and 1"):
        method.prepare(broken)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: EDKM(bits=9), ValueError, "EDKM: bits must be between 1 and 8, got 9"),
        (lambda: EDKM(bits={"a": 0}), ValueError, r"EDKM: bits\['a'\] must be between 1 and 8, got 0"),
        (lambda: EDKM(bits={1: 2}), TypeError, "EDKM: bits must have names or patterns as keys, got 1"),
        (lambda: EDKM(bits=2.5), TypeError, "EDKM: bits must be an integer, got 2.5"),
        (lambda: EDKM(embedding_bits=12), ValueError, "EDKM: embedding_bits must be between 1 and 8, got 12"),
        (lambda: EDKM(group_rows=0), ValueError, "EDKM: group_rows must be at least 1, or None, got 0"),
        (lambda: EDKM(rho=0), ValueError, "EDKM: rho must be positive and finite, got 0"),
        (lambda: EDKM(tau=math.nan), ValueError, "EDKM: tau must be positive and finite, got nan"),
        (lambda: EDKM(grad="exact"), ValueError, "EDKM: grad must be one of unroll, implicit, jfb, got 'exact'"),
        (lambda: EDKM(hard_last=2), ValueError, "EDKM: hard_last must be between 0 and 1, got 2"),
        (lambda: EDKM(milestone=-1), ValueError, "EDKM: milestone must not be negative, got -1"),
        (lambda: EDKM(total_steps=5, milestone=5), ValueError, r"greater than milestone \(5\), got 5"),
        (lambda: EDKM(skip="head"), TypeError, "EDKM: skip must be a sequence of names or patterns, got 'head'"),
        (lambda: EDKM(skip=None), TypeError, "EDKM: skip must be a sequence of names or patterns, got None"),
        (lambda: EDKM(skip=[1]), TypeError, r"EDKM: skip must be a sequence of names or patterns, got \[1\]"),
        (lambda: EDKM(iterations=0), ValueError, "EDKM: iterations must be between 1 and 1000, got 0"),
        (lambda: EDKM(eps=math.nan), ValueError, "EDKM: eps must be at least 0 and less than 1, got nan"),
        (lambda: EDKM().prepare("m"), TypeError, "EDKM.prepare: model must be a torch.nn.Module, got str"),
        (lambda: EDKM().finalize(3), TypeError, "EDKM.finalize: model must be a torch.nn.Module, got int"),
        (lambda: EDKM().report(None), TypeError, "EDKM.report: model must be a torch.nn.Module, got NoneType"),
        (lambda: EDKM(weight_threshold=-3), ValueError, "EDKM: weight_threshold must not be negative, got -3"),
        (lambda: EDKM(bits=True), TypeError, "EDKM: bits must be an integer, got True"),
        (lambda: EDKM().prepare(network()), ValueError, r"no layer to cluster: .* at least 2048 weights"),
        (
            lambda: EDKM(bits={"7": 2, "6": 2}).prepare(network()),
            ValueError,
            "bits names '7', which fits no linear layer, convolution or embedding",
        ),
        (lambda: EDKM(skip=["head*"]).prepare(network()), ValueError, r"skip names 'head\*', which fits no"),
        (
            lambda: EDKM(bits=8, group_rows=1, weight_threshold=1).prepare(nn.Linear(16, 16)),
            ValueError,
            "EDKM.prepare: layer '': Palette: a group must have at least 256 weights for 256 clusters, got 1 rows of 16",
        ),
        (
            lambda: EDKM(cluster_dim=3, weight_threshold=1).prepare(nn.Linear(16, 16)),
            ValueError,
            "rows of 16 weights do not divide into vectors of 3",
        ),
        (
            lambda: EDKM(embedding_bits=2, weight_threshold=1).prepare(nn.Embedding(16, 16, max_norm=1.0)),
            ValueError,
            "PalettizedEmbedding: max_norm must be None",
        ),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_the_weights_of_a_step_are_those_of_the_operator():
    """A layer of the prepared model computes with what ops.dkm gives, gradient included."""
    method = EDKM(bits=2, weight_threshold=100, rho=0.2, group_rows=8)
    model = method.prepare(network())
    layer, x = model[6], torch.randn(4, 32)
    weight = layer.weight.detach().clone().requires_grad_()
    expected = ops.dkm(weight, layer.centroids, rho=0.2, group_size=8 * 32)
    y = F.linear(x, expected.output, layer.bias)
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-4, atol=1e-5)


def test_the_examples_of_the_docstrings():
    results = doctest.testmod(importlib.import_module("cofire.methods.edkm"))
    assert results.attempted > 0 and results.failed == 0
