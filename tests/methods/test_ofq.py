# SPDX-License-Identifier: Apache-2.0
"""OFQ: what is quantised, the teacher, annealing, what is deployed, what is refused, and the protocol of the methods."""

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
from cofire.methods import METHODS, OFQ
from cofire.methods.ofq import Distilled
from cofire.models.vit import Attention
from cofire.nn import (
    IntegerLinear,
    LSQActivation,
    QuantConv2d,
    QuantLinear,
    QueryKey,
    ReparameterizedAttention,
    StatsQConv2d,
    StatsQLinear,
)
from cofire.nn.statsq import Quantized
from helpers import stored_bytes
from methods.protocol import check_protocol

torch.manual_seed(0)
BATCH = (torch.randn(8, 1, 8, 8), torch.randint(4, (8,)))
X = BATCH[0]


def network(**options):
    """One block of two heads on four patches."""
    sizes = {"image": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2, "in_channels": 1, "num_classes": 4}
    return models.vit(**sizes | options)


class Patches(nn.Module):
    """Patches by a convolution, as timm's vision transformers have them, behind another one where ``stem`` says so."""

    def __init__(self, stem=False):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1) if stem else nn.Identity()
        self.patch_embed = nn.Conv2d(2 if stem else 1, 16, 4, stride=4)
        self.blocks = network().blocks
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.blocks(self.patch_embed(self.stem(x)).flatten(2).transpose(1, 2)).mean(1))


def method():
    return OFQ()


def annealing():
    return OFQ(anneal_at=1, boundary_range=0.1)


def learned():
    return OFQ(weights="lsq", weight_bits=3)


def quantized(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Quantized)}


def trained(method, steps=2, model=None, **options):
    model = method.prepare(network() if model is None else model, X, **options).train()
    return train(method, model, steps)


def train(method, model, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(X)
        (F.cross_entropy(output, BATCH[1]) + method.loss(model, output)).backward()
        optimizer.step()
        method.step(model)
    return model


# --------------------------------------------------------------------------------------------------- protocol


@pytest.mark.parametrize("check", check_protocol(method, network, BATCH, example_input=X))
def test_protocol(check):
    check()


@pytest.mark.parametrize("check", check_protocol(annealing, network, BATCH, example_input=X))
def test_protocol_in_annealing(check):
    check()


@pytest.mark.full
@pytest.mark.parametrize("check", check_protocol(learned, network, BATCH, example_input=X))
def test_protocol_with_learned_scales(check):
    check()


@pytest.mark.full
@pytest.mark.parametrize("check", check_protocol(method, Patches, BATCH, example_input=X))
def test_protocol_with_a_convolution(check):
    check()


# ---------------------------------------------------------------------------------------------------- prepare


def test_what_is_quantised_and_how():
    model = OFQ(weight_bits=2, activation_bits=4).prepare(network(depth=2), X)
    layers = {name: (type(m), m.quantizer.bits, m.quantizer.kind) for name, m in quantized(model).items()}
    block = {
        "attn.qk": QueryKey,
        "attn.v": StatsQLinear,
        "attn.proj": StatsQLinear,
        "up": StatsQLinear,
        "down": StatsQLinear,
    }
    expected = {f"student.blocks.{i}.{name}": (kind, 2, "statsq") for i in (0, 1) for name, kind in block.items()}
    edges = {f"student.{name}": (StatsQLinear, 8, "lsq") for name in ("embed", "head")}
    assert layers == expected | edges
    activations = {n.removeprefix("student."): m for n, m in model.named_modules() if isinstance(m, LSQActivation)}
    found = {
        n: (m.bits, m.unsigned, len(m.scale), m.axis) for n, m in activations.items() if not n.startswith("blocks.1")
    }
    assert found == {
        "embed.input": (8, False, 4, -2),
        "blocks.0.attn.input": (4, False, 4, -2),  # a scale per position
        "blocks.0.attn.qk_output": (4, False, 8, -2),  # and head
        "blocks.0.attn.v_output": (4, False, 16, -1),  # per channel
        "blocks.0.attn.softmax": (4, True, 4, -2),
        "blocks.0.attn.proj.input": (4, False, 4, -2),
        "blocks.0.up.input": (4, False, 4, -2),
        "blocks.0.down.input": (4, True, 4, -2),  # after GELU
        "head.input": (8, False, 1, None),  # no sequence any more
    }
    assert all(m.initialized for m in activations.values())
    assert all(m.before is not None for n, m in activations.items() if not n.endswith("softmax"))
    assert METHODS["ofq"] is OFQ


def test_only_the_first_and_the_last_layer_are_edges():
    """Where a convolution embeds the patches, no layer of the first block takes its place."""

    class Embed(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).flatten(2).transpose(1, 2)

    model = network()
    model.pool, model.patch, model.embed = nn.Identity(), 1, nn.Identity()
    convolved = nn.Sequential(Embed(1, 16, 4, stride=4), model.blocks, nn.Flatten(), nn.Linear(64, 4))
    for qkr in (True, False):
        prepared = OFQ(qkr=qkr, distill=0).prepare(convolved, X)
        assert [n for n, m in quantized(prepared).items() if m.quantizer.bits == 8] == ["3"]
    prepared = OFQ(distill=0).prepare(convolved[1:2], torch.randn(2, 4, 16))
    assert [n for n, m in quantized(prepared).items() if m.quantizer.bits == 8] == ["1.0.down"]


def test_the_first_convolution_is_quantised_in_8_bits_and_deployed():
    method = OFQ()
    model = trained(method, 2, model=Patches())
    embed = model.student.patch_embed
    assert type(embed) is StatsQConv2d and (embed.quantizer.bits, embed.quantizer.kind) == (8, "lsq")
    assert (embed.input.bits, embed.input.unsigned, len(embed.input.scale), embed.input.before) == (8, False, 1, None)
    assert embed.quantizer.count == 2 and embed.weight.grad is not None
    final = method.finalize(model)
    assert type(final.patch_embed[1]) is QuantConv2d and final.patch_embed[1].linear.bits == 8
    assert torch.equal(final.patch_embed[1].weight.flatten(1), embed.quantizer(embed.matrix()))
    torch.testing.assert_close(final(X), model.eval()(X), rtol=1e-4, atol=1e-5)

    resumed = method.prepare(Patches(), X)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed.eval()(X), model(X))
    other = method.finalize(trained(method, 1, model=Patches()))
    other.load_state_dict(final.state_dict())
    assert torch.equal(other(X), final(X))

    report = method.report(model)
    row = {row.name: row for row in report.layers}["patch_embed"]
    assert (row.shape, row.bits, row.dense_bytes, row.packed_bytes) == ((16, 16), 8, 16 * 16 * 4, 16 * 16 + 16 * 4 + 4)
    assert report.unquantized == []


def test_other_convolutions_stay_and_are_named():
    method = OFQ()
    model = method.prepare(Patches(stem=True), X)
    assert type(model.student.stem) is StatsQConv2d and type(model.student.patch_embed) is nn.Conv2d
    assert method.report(model).unquantized == ["patch_embed"]
    assert type(method.finalize(model).patch_embed) is nn.Conv2d
    for options in ({"edge_bits": None}, {"skip": ["stem", "head"]}):
        model = OFQ(**options).prepare(Patches(stem=True), X)
        assert type(model.student.stem) is type(model.student.patch_embed) is nn.Conv2d
    plain = OFQ(activation_bits=None).prepare(Patches(), X).student
    assert plain.patch_embed.input is None and type(plain.patch_embed) is StatsQConv2d
    last = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 4, 1))
    last = OFQ(qkr=False, distill=0).prepare(last, torch.randn(2, 8))
    assert [m.quantizer.bits for m in quantized(last).values()] == [8, 2, 8]
    assert last(torch.randn(3, 8)).shape == (3, 4, 1, 1)


def test_the_forward_of_a_prepared_block_step_by_step():
    """The paper's attention, written out once more."""
    model = OFQ(distill=0).prepare(network(), X)
    layer = model.blocks[0].attn
    x = torch.randn(3, 4, 16)

    def lsq(module, x, s):
        if module.before is not None:
            x = x + module.before
        y = (x / s).clamp(module.low, module.high).round() * s
        return y if module.after is None else y + module.after

    def statsq(w):
        s = 2 * w.abs().mean(1, keepdim=True)
        return s * (((w / s).clamp(-1, 1 - 1e-6) * 2 - 0.5).round() + 0.5) / 2

    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, LSQActivation) and module.before is not None:
                module.before.normal_(std=0.1)
                module.after.normal_(std=0.1)
        x_hat = lsq(layer.input, x, layer.input.scale[:, None])
        per_head = []
        for h in range(2):
            a = statsq(layer.qk.query[8 * h : 8 * h + 8].t() @ layer.qk.key[8 * h : 8 * h + 8])
            per_head.append(x_hat @ a.t())
        keys = torch.cat(per_head, -1)
        scales = layer.qk_output.scale.view(4, 2).repeat_interleave(16, 1)  # position, head
        keys = lsq(layer.qk_output, keys, scales)
        v = lsq(layer.v_output, x_hat @ statsq(layer.v.weight).t() + layer.v.bias, layer.v_output.scale)
        heads = []
        for h in range(2):
            logits = x_hat @ keys[..., 16 * h : 16 * h + 16].transpose(1, 2) / math.sqrt(8)
            weights = lsq(layer.softmax, logits.softmax(-1), layer.softmax.scale[:, None])
            heads.append(weights @ v[..., 8 * h : 8 * h + 8])
        mixed = lsq(layer.proj.input, torch.cat(heads, -1), layer.proj.input.scale[:, None])
        expected = mixed @ statsq(layer.proj.weight).t() + layer.proj.bias
        torch.testing.assert_close(layer(x), expected)


def test_activations_that_stay_as_they_are():
    model = OFQ(activation_bits=None, edge_bits=None, weights="lsq", weight_bits=8).prepare(network())
    assert not any(isinstance(m, LSQActivation) for m in model.modules())
    assert {m.quantizer.bits for m in quantized(model).values()} == {8}
    plain = network()
    for p in (*plain.blocks[0].attn.q.parameters(), *plain.blocks[0].attn.k.parameters()):
        if p.dim() == 1:
            nn.init.zeros_(p)
    model = OFQ(activation_bits=None, edge_bits=None, weights="lsq", weight_bits=8).prepare(plain)
    torch.testing.assert_close(model(X), plain(X), rtol=0.1, atol=0.05)


def test_one_scale_per_tensor_needs_no_example():
    method = OFQ(activation_scale="tensor")
    model = method.prepare(network())
    scales = [m for m in model.modules() if isinstance(m, LSQActivation)]
    assert all(len(m.scale) == 1 and not m.initialized for m in scales)
    known = {id(p) for p in model.parameters()}
    with pytest.raises(ValueError, match=r"OFQ.finalize: the scales of 'embed.input' have no values yet"):
        method.finalize(model)
    with pytest.raises(Exception, match="run one batch before compiling"):
        torch.compile(model, fullgraph=True, backend="eager")(X)
    torch.compiler.reset()
    model(X)
    assert all(m.initialized for m in scales)
    assert {id(p) for p in model.parameters()} == known
    assert method.finalize(model)(X[:, :, :4].repeat(1, 1, 2, 1)).shape == (8, 4)


def test_another_number_of_positions_is_refused():
    model = OFQ(distill=0).prepare(network(), X)
    with pytest.raises(ValueError, match="the length of the sequences that it was prepared for"):
        model.blocks(torch.randn(2, 5, 16))


def test_fused_projections_equal_separate_ones():
    class Fused(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.num_heads, self.scale = of.num_heads, 8**-0.5
            self.qkv = nn.Linear(16, 48)
            self.proj, self.attn_drop, self.proj_drop = copy.deepcopy(of.proj), nn.Dropout(0.0), nn.Dropout(0.0)
            with torch.no_grad():
                self.qkv.weight.copy_(torch.cat([p.weight for p in (of.q, of.k, of.v)]))
                self.qkv.bias.copy_(torch.cat([p.bias for p in (of.q, of.k, of.v)]))

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            y = (self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1)) @ v).transpose(1, 2).flatten(2)
            return self.proj_drop(self.proj(y))

    separate = network()
    fused = copy.deepcopy(separate)
    fused.blocks[0].attn = Fused(separate.blocks[0].attn)
    torch.testing.assert_close(fused(X), separate(X))
    method = OFQ(distill=0)
    a, b = method.prepare(fused, X), method.prepare(separate, X)
    assert isinstance(a.blocks[0].attn, ReparameterizedAttention) and isinstance(a.blocks[0].attn.attn_drop, nn.Dropout)
    assert dict(a.named_parameters()).keys() == dict(b.named_parameters()).keys()
    assert all(p.requires_grad for p in a.parameters())
    torch.testing.assert_close(a(X), b(X))


def test_frozen_weights_stay_frozen():
    plain = network().requires_grad_(False)
    plain.head.requires_grad_(True)
    model = OFQ(distill=0).prepare(plain, X)
    assert not model.blocks[0].attn.qk.query.requires_grad and not model.blocks[0].up.weight.requires_grad
    assert model.head.weight.requires_grad


def test_skip_and_single_layers():
    skipped = OFQ(distill=0, skip=["blocks.0.attn", "*.up"]).prepare(network(depth=2), X)
    assert type(skipped.blocks[0].attn) is Attention and type(skipped.blocks[1].attn) is ReparameterizedAttention
    # its layers are linear layers like others
    assert type(skipped.blocks[0].attn.q) is StatsQLinear
    assert type(skipped.blocks[0].up) is type(skipped.blocks[1].up) is nn.Linear
    method = OFQ(qkr=False, activation_scale="tensor", distill=0)
    single = method.prepare(nn.Linear(8, 4))
    assert type(single) is StatsQLinear and single.quantizer.bits == 8
    single(torch.randn(3, 8))
    assert type(method.finalize(single)[1]) is QuantLinear
    shared = nn.Linear(8, 8)
    twice = method.prepare(nn.Sequential(shared, shared, nn.Linear(8, 8)))
    assert twice[0] is twice[1]


def test_only_convolutions_that_would_be_quantised_are_skipped():
    assert type(OFQ(skip=["stem"]).prepare(Patches(stem=True), X).student.stem) is nn.Conv2d
    for options, name in (({}, "patch_embed"), ({"edge_bits": None}, "stem")):
        with pytest.raises(ValueError, match=f"skip names '{name}', which fits no layer or attention that can be quan"):
            OFQ(skip=[name], **options).prepare(Patches(stem=True), X)
    both = OFQ(skip=["*em*"]).prepare(Patches(stem=True), X).student  # the pattern fits the first one too
    assert type(both.stem) is type(both.patch_embed) is nn.Conv2d


def test_without_reparameterisation_the_linear_layers_are_quantised():
    model = OFQ(qkr=False, distill=0).prepare(network(), X)
    assert not any(isinstance(m, QueryKey) for m in model.modules())
    assert {"blocks.0.attn.q", "blocks.0.attn.k"} <= set(quantized(model))
    assert model(X).shape == (8, 4)


# ----------------------------------------------------------------------------------------------------------- teacher


def test_the_loss_is_the_cross_entropy_with_the_teacher():
    method = OFQ(distill=0.5)
    plain = network()
    model = method.prepare(plain, X).train()
    assert isinstance(model, Distilled) and not model.teacher.training
    assert all(not p.requires_grad for p in model.teacher.parameters())
    output = model(X)
    p, log_q = plain(X).softmax(1), output.log_softmax(1)
    torch.testing.assert_close(method.loss(model, output), -0.5 * (p * log_q).sum(1).mean())
    other = network(depth=2)
    model = method.prepare(plain, X, teacher=other).train()
    output = model(X)
    torch.testing.assert_close(method.loss(model, output), 0.5 * F.cross_entropy(output, other(X).softmax(1)))
    before = copy.deepcopy(model.teacher.state_dict())
    train(method, model, 2)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.teacher.state_dict().values(), strict=True))


def test_the_teacher_rests_in_evaluation():
    model = OFQ().prepare(network(), X).eval()
    calls = []
    model.teacher.register_forward_hook(lambda *_: calls.append(1))
    model(X)
    assert not calls
    model.train()(X)
    assert calls == [1] and not model.teacher.training and model.student.training


def test_without_a_teacher_the_loss_is_zero_and_leaves_no_gradient():
    method = OFQ(distill=0)
    model = method.prepare(network(), X)
    assert not isinstance(model, Distilled)
    loss = method.loss(model)
    assert loss == 0 and loss.requires_grad
    loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_cannot_be_is_refused():
    method = OFQ()
    model = method.prepare(network(), X).train()
    with pytest.raises(ValueError, match="OFQ.loss: the model has seen no forward in training mode; call"):
        method.loss(model, torch.zeros(8, 4))
    output = model(X)
    with pytest.raises(ValueError, match=r"OFQ.loss: output must be what model\(x\) returned"):
        method.loss(model)
    with pytest.raises(ValueError, match=r"output must have the shape of the teacher's, \[8, 4\], got \[2, 4\]"):
        method.loss(model, output[:2])


# --------------------------------------------------------------------------------------------------------- annealing


def test_annealing_keeps_the_integers_of_the_network_where_they_are():
    method = OFQ(boundary_range=0.01)
    model = trained(method, 3)
    method.anneal(model)
    layers = {n: m for n, m in quantized(model).items() if m.quantizer.kind == "statsq"}
    assert len(layers) == 5 and all(m.quantizer.annealing for m in layers.values())
    assert not any(m.quantizer.annealing for m in quantized(model).values() if m.quantizer.kind == "lsq")
    before = {n: [getattr(m, f).detach().clone() for f in m.factors] for n, m in layers.items()}
    free = {n: m.movable(*before[n]) for n, m in layers.items()}
    bias = model.student.blocks[0].up.bias.detach().clone()
    train(method, model, 1)
    for name, layer in layers.items():
        for factor, old, may in zip(layer.factors, before[name], free[name], strict=True):
            assert torch.equal(getattr(layer, factor)[~may], old[~may]), name
            assert torch.all(getattr(layer, factor)[may] != old[may]), name
            assert 0 < may.sum() < may.numel(), name
    assert not torch.equal(model.student.blocks[0].up.bias, bias)
    method.anneal(model, on=False)
    train(method, model, 1)
    assert (model.student.blocks[0].up.weight != before["student.blocks.0.up"][0]).all()


def test_annealing_begins_by_itself():
    method = OFQ(anneal_at=2)
    model = trained(method, 1)
    assert not method.report(model).annealing
    train(method, model, 1)
    assert method.report(model).annealing
    resumed = method.prepare(network(), X)
    resumed.load_state_dict(model.state_dict())
    assert method.report(resumed).annealing and method.report(resumed).steps == 2


def test_moments_of_frozen_weights_are_kept():
    """AdamW by hand, with and without: exp_avg is kept where a weight is frozen, and moves on elsewhere."""

    def moments(keep):
        torch.manual_seed(1)
        method = OFQ(boundary_range=0.05)
        model = trained(method, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        kept = method.keep_moments(model, optimizer) if keep else None
        layers = {n: m for n, m in quantized(model).items() if m.quantizer.kind == "statsq"}
        for step in range(4):
            if step == 2:
                method.anneal(model)
            state = {n: [optimizer.state.get(getattr(m, f), {}) for f in m.factors] for n, m in layers.items()}
            before = copy.deepcopy(state)
            free = {n: m.movable(*(getattr(m, f).detach() for f in m.factors)) for n, m in layers.items()}
            optimizer.zero_grad()
            output = model(X)
            (F.cross_entropy(output, BATCH[1]) + method.loss(model, output)).backward()
            optimizer.step()
            method.step(model)
            if step < 2:
                continue
            for name, layer in layers.items():
                for i, factor in enumerate(layer.factors):
                    p, may, old = getattr(layer, factor), free[name][i], before[name][i]
                    now = optimizer.state[p]
                    assert torch.all(p.grad[~may] == 0) and 0 < may.sum() < may.numel()
                    for key, beta, term in (("exp_avg", 0.9, p.grad), ("exp_avg_sq", 0.99, p.grad**2)):
                        expected = beta * old[key] + (1 - beta) * term
                        torch.testing.assert_close(now[key][may], expected[may])
                        if keep:
                            assert torch.equal(now[key][~may], old[key][~may]), name
                        else:
                            torch.testing.assert_close(now[key][~may], beta * old[key][~may])
        return method, model, optimizer, kept

    moments(False)
    _, model, optimizer, kept = moments(True)
    kept.remove()
    weight = model.student.blocks[0].up.weight
    before = optimizer.state[weight]["exp_avg"].clone()
    free = model.student.blocks[0].up.quantizer.movable(weight.detach())
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"][~free], 0.9 * before[~free])
    assert before[~free].count_nonzero() > 0


def test_moments_that_cannot_be_kept_are_refused():
    with pytest.raises(TypeError, match="OFQ.keep_moments: optimizer must be a torch optimizer, got str"):
        OFQ().keep_moments(OFQ().prepare(network(), X), "adamw")
    plain = network()
    with pytest.raises(ValueError, match="OFQ.keep_moments: the model has no quantised layer"):
        OFQ().keep_moments(plain, torch.optim.SGD(plain.parameters(), lr=1.0))


def test_annealing_without_a_trained_statsq_network_is_refused():
    method = OFQ()
    with pytest.raises(
        ValueError, match="OFQ.anneal: annealing refines a network trained with StatsQ, got one without"
    ):
        method.anneal(method.prepare(network(), X))
    control = OFQ(weights="lsq")
    with pytest.raises(ValueError, match="OFQ.anneal: annealing needs weights quantised by StatsQ"):
        control.anneal(trained(control, 1))
    with pytest.raises(ValueError, match="OFQ: anneal_at needs weights 'statsq', got 'lsq'"):
        OFQ(weights="lsq", anneal_at=3)
    with pytest.raises(ValueError, match="OFQ: anneal_at must be at least 1"):
        OFQ(anneal_at=0)


# ---------------------------------------------------------------------------------------------- finalize and report


@pytest.mark.parametrize(
    "options", [{}, {"weights": "lsq", "weight_bits": 3}, {"weight_bits": 1, "activation_bits": None}]
)
def test_the_deployed_network_equals_the_trained_one(options):
    method = OFQ(**options)
    model = trained(method, 3).eval()
    final = method.finalize(model)
    assert not any(isinstance(m, (Quantized, Distilled)) for m in final.modules())
    assert not any(p.requires_grad for p in final.parameters()) and not final.training
    for name, layer in quantized(model.student).items():
        packed = final.get_submodule(name)
        packed = packed[-1] if isinstance(packed, nn.Sequential) else packed
        assert torch.equal(packed.weight, layer.quantizer(layer.matrix())), name
    torch.testing.assert_close(final(X), model(X), rtol=1e-4, atol=1e-5)
    other = method.finalize(trained(method, 1))
    other.load_state_dict(final.state_dict())
    assert torch.equal(other(X), final(X))


@pytest.mark.parametrize("options", [{}, {"weights": "lsq", "weight_bits": 3}, {"qkr": False}, {"edge_bits": 7}])
def test_integers_are_multiplied_where_asked(options):
    method = OFQ(**options)
    model = trained(method, 3).eval()
    floats, final = method.finalize(model), method.finalize(model, integer=True)
    integers = [n for n, m in final.named_modules() if isinstance(m, IntegerLinear)]
    attention = ["qk", "v", "proj"] if method.qkr else ["q", "k", "v", "proj"]
    edges = (["embed"], ["head"]) if method.edge_bits == 7 else ([], [])
    assert integers == [
        *edges[0],
        *(f"blocks.0.attn.{n}" for n in attention),
        "blocks.0.up",
        "blocks.0.down",
        *edges[1],
    ]
    assert not any(isinstance(m, IntegerLinear) for m in floats.modules())
    torch.testing.assert_close(final(X), model(X), rtol=1e-4, atol=1e-5)
    report = method.report(model, [X], integer=True)
    assert report.deployed_error < 1e-5 and report.model_packed_bytes > method.report(model).model_packed_bytes
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(final, fullgraph=True, backend="eager")(X), final(X))
    other = method.finalize(trained(method, 1), integer=True)
    other.load_state_dict(final.state_dict())
    assert torch.equal(other(X), final(X))


def test_the_shifts_of_deployed_layers_are_in_the_biases():
    method = OFQ()
    model = trained(method, 2).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LSQActivation) and module.after is not None:
                module.after.normal_(std=0.1)
    final = method.finalize(model)
    left = {n for n, m in final.named_modules() if isinstance(m, LSQActivation) and m.after is not None}
    assert left == {"blocks.0.attn.input", "blocks.0.attn.v_output"}  # others than a product see these
    torch.testing.assert_close(final(X), model(X), rtol=1e-4, atol=1e-5)


def test_states_of_when_shifts_were_no_part_of_the_biases_load():
    """Rebuilt as they were: each shift after in its rounding, and the bias without it."""
    method = OFQ()
    model, other = (trained(method, steps).eval() for steps in (2, 1))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LSQActivation) and module.after is not None:
                module.after.normal_(std=0.1)
    state = method.finalize(model).state_dict()
    for name, layer in model.student.named_modules():
        if isinstance(layer, StatsQLinear) and layer.input is not None:
            state[f"{name}.0.after"], state[f"{name}.1.bias"] = layer.input.after, layer.bias
        elif isinstance(layer, ReparameterizedAttention):
            state[f"{name}.qk_output.after"] = layer.qk_output.after
    final = copy.deepcopy(method.finalize(other))
    assert len(state.keys() - final.state_dict().keys()) > 3
    assert not torch.allclose(final(X), model(X), atol=1e-3)
    final.load_state_dict(state)
    torch.testing.assert_close(final(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation_bits", [4, None])
def test_states_of_when_convolutions_stayed_are_refused_with_a_sentence(activation_bits):
    method, older = (OFQ(activation_bits=activation_bits, skip=skip) for skip in ([], ["patch_embed"]))
    model, before = (m.prepare(Patches(), X).eval() for m in (method, older))
    sentence = (
        r"the state has a dense weight and no scales for the convolution 'patch_embed', .* with skip=\['patch_embed'\]"
    )
    with pytest.warns(UserWarning, match=f"StatsQConv2d: {sentence}"), pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(before.state_dict())
    with pytest.raises(RuntimeError, match=f"QuantConv2d: {sentence}"):
        method.finalize(model).load_state_dict(older.finalize(before).state_dict())
    again = older.prepare(Patches(), X).eval()  # what the sentence says works
    again.load_state_dict(before.state_dict())
    assert torch.equal(again(X), before(X))


def test_a_row_of_zeros_is_deployed_as_zeros():
    plain = network()
    with torch.no_grad():
        plain.blocks[0].up.weight[3] = 0
    method = OFQ()
    model = method.prepare(plain, X).eval()
    assert model.student.blocks[0].up.quantizer(model.student.blocks[0].up.weight)[3].count_nonzero() == 0
    final = method.finalize(model)
    assert final.blocks[0].up[1].weight[3].count_nonzero() == 0
    torch.testing.assert_close(final(X), model(X), rtol=1e-4, atol=1e-5)


def test_the_report_counts_bytes_and_oscillation():
    method = OFQ()
    model = trained(method, 2)
    report = method.report(model, [BATCH, X])
    rows = {row.name: row for row in report.layers}
    up = rows["blocks.0.up"]
    assert (up.shape, up.bits, up.kind) == ((32, 16), 2, "statsq")
    assert up.dense_bytes == 32 * 16 * 4
    assert up.packed_bytes == 32 * 4 + 32 * 4 + 4  # two bits, a scale per row, the zero point
    qk = rows["blocks.0.attn.qk"]
    assert qk.shape == (32, 16) and qk.dense_bytes == 2 * 16 * 16 * 4  # as many entries as query and key at two heads
    final = method.finalize(model)
    assert report.packed_bytes == sum(m.qweight.nbytes for m in final.modules() if isinstance(m, QuantLinear))
    assert report.dense_bytes == sum(row.dense_bytes for row in report.layers)
    plain = stored_bytes(network())
    assert report.model_dense_bytes == plain - 2 * 16 * 4  # without the biases of query and key
    assert report.model_packed_bytes == stored_bytes(final) < report.model_dense_bytes
    assert report.steps == 2 and not report.annealing and report.latency is None
    assert 0 <= report.near_boundary < 0.1
    assert report.deployed_error < 1e-5 and report.deployed_equal == 1
    layer = model.student.blocks[0].up.quantizer
    layer.oscillation.zero_()
    layer.oscillation[0] = 0.03
    layer.oscillation[1] = 0.02  # not above
    assert {r.name: r for r in method.report(model).layers}["blocks.0.up"].oscillating == pytest.approx(1 / 32)


def test_the_report_times_the_deployed_network_against_the_teacher():
    method = OFQ()
    model = method.prepare(network(), X)
    timing = method.report(model, [X[:1]], latency=True).latency
    assert timing.shape == (1, 1, 8, 8) and timing.dense_ms > 0 and timing.packed_ms > 0
    assert timing.speedup == pytest.approx(timing.dense_ms / timing.packed_ms)
    with pytest.raises(ValueError, match="OFQ.report: latency needs a teacher"):
        OFQ(distill=0).report(OFQ(distill=0).prepare(network(), X), [X], latency=True)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"weight_bits": 0}, ValueError, "weight_bits must be between 1 and 8, got 0"),
        ({"weight_bits": 1, "weights": "lsq"}, ValueError, "weight_bits must be between 2 and 8, got 1"),
        ({"weight_bits": 2.0}, TypeError, "weight_bits must be an integer, got 2.0"),
        ({"weight_bits": None}, TypeError, "weight_bits must be an integer, got None"),
        ({"activation_bits": 1}, ValueError, "activation_bits must be between 2 and 8, got 1"),
        ({"edge_bits": 9}, ValueError, "edge_bits must be between 2 and 8, got 9"),
        ({"weights": "absmax"}, ValueError, "weights must be one of statsq, lsq, got 'absmax'"),
        ({"activation_scale": "channel"}, ValueError, "activation_scale must be one of token, tensor, got 'channel'"),
        ({"boundary_range": 0}, ValueError, "boundary_range must be between 0 and 0.5"),
        ({"boundary_range": 0.5}, ValueError, "boundary_range must be between 0 and 0.5"),
        ({"distill": -1}, ValueError, "distill must not be negative, got -1"),
        ({"skip": "head"}, TypeError, "skip must be a sequence of names or patterns, got 'head'"),
        ({"anneal_at": 1.5}, TypeError, "anneal_at must be an integer, got 1.5"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(options, error, sentence):
    with pytest.raises(error, match=f"OFQ: {sentence}"):
        OFQ(**options)


def test_prepare_refuses():
    method = OFQ()
    with pytest.raises(TypeError, match="OFQ.prepare: model must be a torch.nn.Module, got int"):
        method.prepare(3)
    with pytest.raises(ValueError, match="OFQ.prepare: example_input must be a batch of inputs, got None"):
        method.prepare(network())
    with pytest.raises(ValueError, match="there is no attention to reparameterise"):
        method.prepare(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), X)
    with pytest.raises(ValueError, match="there is no layer to quantise"):
        OFQ(qkr=False, activation_scale="tensor").prepare(nn.Sequential(nn.Conv2d(1, 2, 3)))
    with pytest.raises(
        ValueError,
        match="skip names 'haed', which fits no layer or attention that can be quantised; did you mean 'head'",
    ):
        OFQ(skip=["haed"]).prepare(network(), X)
    with pytest.raises(ValueError, match="teacher is of no use with distill=0"):
        OFQ(distill=0).prepare(network(), X, teacher=network())
    with pytest.raises(TypeError, match="teacher: model must be a torch.nn.Module, got str"):
        method.prepare(network(), X, teacher="deit")


class Variant(Attention):
    """Attention that differs from what can be reparameterised in one way."""

    def __init__(self, kind):
        super().__init__(16, 2)
        self.kind = kind
        if kind == "rope":
            self.rope = nn.Identity(), 10000.0
        if kind == "grouped":
            self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)
        if kind == "counted":
            self.num_kv_heads = 1
        if kind == "bias":
            self.relative_position_bias_table = nn.Parameter(torch.randn(4, 4))
        if kind == "norm":
            self.q_norm = nn.LayerNorm(8)

    def forward(self, x):
        if self.kind == "grouped":
            q, k, v = self.q(x).unflatten(2, (2, 8)), self.k(x).unflatten(2, (1, 8)), self.v(x).unflatten(2, (1, 8))
            q, k, v = (y.transpose(1, 2) for y in (q, k.expand(-1, -1, 2, -1), v.expand(-1, -1, 2, -1)))
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        q, k, v = (p(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.kind == "turned":  # rotary positions, without an attribute that says so
            angle = torch.arange(x.shape[1])[:, None] / 10 ** torch.arange(4)
            turn = lambda y: torch.view_as_real(  # noqa: E731
                torch.view_as_complex(y.unflatten(3, (4, 2)).contiguous()) * torch.polar(torch.ones(()), angle)
            ).flatten(3)
            q, k = turn(q), turn(k)
        return self.proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "causal").transpose(1, 2).flatten(2)
        )


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("rope", "attention 'blocks.0.attn' has rotary positions .'rope'.*set qkr=False"),
        ("bias", "attention 'blocks.0.attn' has a relative bias .'relative_position_bias_table'"),
        ("norm", "attention 'blocks.0.attn' has a norm of queries or keys .'q_norm'"),
        (
            "grouped",
            r"attention 'blocks.0.attn' has 2 heads of queries, and keys and values of another number .*\[16, 8, 8\]",
        ),
        ("counted", "attention 'blocks.0.attn' has 2 heads of queries, and keys and values of another number .1 heads"),
        ("causal", r"attention 'blocks.0.attn' computes something else than proj\(softmax\(q k\^T factor\) v\)"),
        ("turned", r"attention 'blocks.0.attn' computes something else than proj\(softmax\(q k\^T factor\) v\)"),
    ],
)
def test_attention_that_the_algebra_does_not_hold_for_is_refused(kind, sentence):
    model = network()
    model.blocks[0].attn = Variant(kind)
    with pytest.raises(ValueError, match=f"OFQ.prepare: {sentence}"):
        OFQ().prepare(model, X)
    plain = OFQ(qkr=False).prepare(model, X)
    assert plain(X).shape == (8, 4)


def test_the_examples_of_the_docstrings():
    results = doctest.testmod(importlib.import_module("cofire.methods.ofq"))
    assert results.attempted > 0 and results.failed == 0
