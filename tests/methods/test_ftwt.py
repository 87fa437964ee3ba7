# SPDX-License-Identifier: Apache-2.0
"""FTWT: what is gated, what is learned, what is counted, and that the deployed network computes the same."""

from __future__ import annotations

import copy
import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cofire import models, ops
from cofire.methods import FTWT, tracing
from cofire.methods.ftwt import open_gates, random_masks, target_masks
from cofire.nn import DeployedGatedConv2d, Gated, GatedConv2d, GatedLinear
from methods.protocol import check_protocol

# ------------------------------------------------------------------------------------------------- networks


class Block(nn.Module):
    """A residual block; ``style`` is how its forward is written."""

    def __init__(self, channels, out, style="function"):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
        self.downsample = nn.Identity() if channels == out else shortcut
        self.style = style

    def forward(self, x):
        if self.style == "function":
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return torch.relu(self.downsample(x) + y)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)  # in place, as torchvision writes it
        return self.relu(y)


class Head(nn.Sequential):
    """Mean over the pixels, and a linear layer."""

    def __init__(self, channels):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def conv(channels, out, act=nn.ReLU, kernel=3, groups=1):
    parts = [nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups), nn.BatchNorm2d(out)]
    return nn.Sequential(*parts, *([act()] if act else []))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = conv(2, 6), conv(6, 5), conv(6, 4, kernel=1)
        self.last, self.head = conv(9, 7), Head(7)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.last(torch.cat([self.left(x), F.max_pool2d(self.right(x), 3, 1, 1)], 1)))


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.depthwise = conv(6, 12, nn.ReLU6, 1), conv(12, 12, nn.ReLU6, 3, groups=12)
        self.narrow = conv(12, 6, None, 1)

    def forward(self, x):
        return x + self.narrow(self.depthwise(self.wide(x)))


def residual(style="function"):
    return nn.Sequential(conv(2, 6), Block(6, 6, style), Block(6, 8, style), Head(8))


NETWORKS = {
    "plain": lambda: nn.Sequential(conv(2, 6), conv(6, 8), nn.MaxPool2d(2), nn.Dropout(0.5), conv(8, 5), Head(5)),
    "no norm": lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(inplace=True), Head(5)),
    "residual": residual,
    "residual in place": lambda: residual("module"),
    "bottleneck": lambda: nn.Sequential(conv(2, 6), Bottleneck(), Bottleneck(), conv(6, 10), Head(10)),
    "concatenation": Concat,
}
BATCH = (torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 4)


def randomise(network):
    """Norms as after training; a fresh one hides mistakes, since it does nothing."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    return network


def gates(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Gated)}


def settle(model, seed=0):
    """Heads that decide by the input and close about half."""
    generator = torch.Generator().manual_seed(seed)
    for gate in gates(model).values():
        gate.head.weight.data.copy_(torch.randn(gate.head.weight.shape, generator=generator) * 8)
        gate.head.bias.data.zero_()
    return model


def set_masks(model, **masks):
    for name, mask in masks.items():
        model.get_submodule(name.replace("__", ".")).force = torch.tensor(mask, dtype=torch.bool)


# ------------------------------------------------------------------------------------------------- protocol


def scheduled():
    return FTWT(mass=0.8, cooldown=0.5, total_steps=6)


@pytest.mark.parametrize("check", check_protocol(scheduled, residual, BATCH))
def test_protocol(check):
    check()


@pytest.mark.full
def test_compiled_code_trains_alike():
    model = FTWT().prepare(residual()).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True)
    for network, call in ((model, model), (twin, compiled)):
        (F.cross_entropy(call(BATCH[0]), BATCH[1]) + FTWT().loss(network)).backward()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------- what is gated

GATED = {
    "plain": {"1.0": "relu", "4.0": "relu"},
    "no norm": {"2": "relu"},
    "residual": {"1.conv1": "relu", "1.conv2": "relu", "2.conv1": "relu", "2.conv2": "relu"},
    "residual in place": {"1.conv1": "relu", "1.conv2": "relu", "2.conv1": "relu", "2.conv2": "relu"},
    "bottleneck": {
        **{f"{block}.{part}.0": "relu6" for block in (1, 2) for part in ("wide", "depthwise")},
        **{f"{block}.narrow.0": "identity" for block in (1, 2)},
        "3.0": "relu",
    },
    "concatenation": {"left.0": "relu", "right.0": "relu", "last.0": "relu"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_which_layers_are_gated(name):
    model = FTWT().prepare(NETWORKS[name](), BATCH[0])
    assert {n: g.activation for n, g in gates(model).items()} == GATED[name]
    assert all(g.mass == 0.95 and g.head.pool == "max" and g.head.min_keep == 1 for g in gates(model).values())


def test_the_shortcut_enters_the_gate():
    """With the gate after the residual sum, the block's output is zero wherever the mask is."""
    model = settle(FTWT().prepare(randomise(residual()))).eval()
    seen = {}
    for name, gate in gates(model).items():
        gate.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args, output)}))
    model(BATCH[0])
    for name in ("1.conv2", "2.conv2"):
        args, output = seen[name]
        assert len(args) == 2
        assert (output[~model.get_submodule(name).examine(*args)[0]] == 0).all()
    model = FTWT(gate_after_residual=False).prepare(residual())
    assert {n: g.activation for n, g in gates(model).items() if "conv2" in n} == {
        "1.conv2": "identity",
        "2.conv2": "identity",
    }


def test_official_settings():
    method = FTWT(compat="official")
    assert (method.pool, method.gate_after_residual, method.skip_first) == ("avg", False, False)
    assert "0.0" in gates(method.prepare(NETWORKS["plain"]()))


def test_what_cannot_be_gated_is_left():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.swish = conv(2, 6), conv(6, 6, nn.SiLU)
            self.twice, self.circular = conv(6, 6), nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
            self.bare, self.last, self.head = nn.Conv2d(6, 6, 1), conv(6, 6), Head(6)

        def forward(self, x):
            x = self.twice(self.twice(self.swish(self.first(x))))
            x = torch.sigmoid(self.bare(F.relu(self.circular(x)))) * x
            return self.head(self.last(x))

    assert list(gates(FTWT().prepare(Odd(), BATCH[0]))) == ["last.0"]


def test_names_and_parameters_survive():
    network = NETWORKS["plain"]()
    model = FTWT().prepare(network)
    assert torch.equal(model.get_submodule("1.0").conv.weight, network[1][0].weight)
    assert torch.equal(model.get_submodule("0.0").weight, network[0][0].weight)
    assert model.training


def test_mass_per_layer():
    model = FTWT(mass={"0.0": 0.5, "4.0": 1.0}).prepare(NETWORKS["plain"]())
    assert {name: gate.mass for name, gate in gates(model).items()} == {"0.0": 0.5, "4.0": 1.0}


def test_named_groups_equal_the_trace():
    network, method = randomise(NETWORKS["plain"]()), FTWT(mass=0.8)
    traced = settle(method.prepare(network)).eval()
    named = settle(method.prepare(network, BATCH[0], groups=[("1.0", "1.1", "1.2"), ("4.0", "4.1", "relu")])).eval()
    assert isinstance(named, nn.Sequential)
    assert torch.equal(traced(BATCH[0]), named(BATCH[0]))
    torch.testing.assert_close(method.finalize(named)(BATCH[0]), named(BATCH[0]), rtol=1e-5, atol=1e-5)
    a, b = (method.report(model, [BATCH]) for model in (traced, named))
    assert a.exact == b.exact and a.paper_rule == b.paper_rule


# -------------------------------------------------------------------------------------------- what is learned


def test_training_equals_a_step_by_step_reference():
    """Three steps of SGD, the mechanism written out in plain torch."""
    method = FTWT(mass=0.7)
    model = method.prepare(nn.Sequential(conv(2, 6), conv(6, 8), conv(8, 5), Head(5))).train()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(method.parameter_groups(m, lr=0.05), momentum=0.9) for m in (model, twin)]
    layers = list(gates(twin).values())

    def reference(x):
        x, loss = F.relu(twin.get_submodule("0.1")(twin.get_submodule("0.0")(x))), 0.0
        for layer in layers:
            pooled = x.detach().amax((2, 3))
            logits = F.linear(pooled.softmax(1), layer.head.weight, layer.head.bias)
            u = F.relu(layer.norm(layer.conv(x)))
            share, order = u.detach().abs().amax((2, 3)).sort(dim=1, descending=True, stable=True)
            kept = (share / share.sum(1, keepdim=True)).cumsum(1) - 0.7 <= 1e-5
            kept[:, 0] = True
            target = torch.zeros_like(kept).scatter(1, order, kept).float()
            each = F.softplus(logits) - logits * target
            loss = loss + each.sum(1).mean() / len(layers)
            mask = (logits > 0).scatter(1, logits.argmax(1, keepdim=True), True)
            x = u * mask[:, :, None, None]
        return twin.get_submodule("3.2")(x.mean((2, 3))), loss

    for step in range(3):
        x, y = BATCH[0] + step, BATCH[1]
        output = model(x)
        loss = F.cross_entropy(output, y) + method.loss(model)
        expected_output, gate_loss = reference(x)
        expected = F.cross_entropy(expected_output, y) + gate_loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        for optimizer, value in zip(optimizers, (loss, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("coupling", ["decoupled", "joint"])
def test_who_learns_from_what(coupling):
    method = FTWT(coupling=coupling)
    model = method.prepare(residual()).train()
    backbone, heads = (group["params"] for group in method.parameter_groups(model))
    F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
    assert all(p.grad is None for p in heads)
    assert all(p.grad is not None for p in backbone)
    model.zero_grad()
    model(BATCH[0])
    method.loss(model).backward()
    assert all(p.grad is not None for p in heads)
    assert any(p.grad is not None for p in backbone) == (coupling == "joint")


def test_the_loss_is_the_mean_over_the_layers():
    model = FTWT().prepare(residual()).train()
    model(BATCH[0])
    losses = [gate.gate_loss for gate in gates(model).values()]
    torch.testing.assert_close(FTWT().loss(model), sum(losses) / 4)


def test_the_cooldown():
    method = FTWT(cooldown=0.5, total_steps=4)
    model = method.prepare(residual()).train()
    values = []
    for _ in range(4):
        model(BATCH[0])
        loss = method.loss(model)
        values.append(loss.item())
        method.step(model)
    assert values[0] > 0 and values[1] > 0 and values[2:] == [0, 0]
    loss.backward()  # zero, but there: data parallelism waits for every gradient
    assert all((p.grad == 0).all() for gate in gates(model).values() for p in gate.head.parameters())
    assert FTWT().loss(model) > 0  # without total_steps it never ends


def test_parameter_groups():
    model = FTWT().prepare(residual())
    backbone, heads = FTWT().parameter_groups(model, lr=0.02)
    assert (backbone["lr"], backbone["weight_decay"], heads["lr"], heads["weight_decay"]) == (0.02, 5e-4, 0.1, 0.0)
    assert {*backbone["params"], *heads["params"]} == set(model.parameters())
    assert len(heads["params"]) == 2 * len(gates(model))
    torch.optim.SGD([backbone, heads], momentum=0.9)


def test_a_forward_without_a_graph_is_refused():
    model = FTWT().prepare(residual()).train()
    with torch.no_grad():
        model(BATCH[0])
        assert FTWT().loss(model) > 0
    with pytest.raises(ValueError, match=r"the last forward kept no graph.*use_reentrant=False"):
        FTWT().loss(model)
    for gate in gates(model).values():
        gate.head.requires_grad_(False)
    assert FTWT().loss(model) > 0


# --------------------------------------------------------------------------------------------------- deployed


@pytest.mark.parametrize("gate_after_residual", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_finalized_equals_evaluation(name, gate_after_residual):
    method = FTWT(gate_after_residual=gate_after_residual)
    model = settle(method.prepare(randomise(NETWORKS[name]())))
    final = method.finalize(model)
    assert not final.training and not any(p.requires_grad for p in final.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in final.modules())
    assert sum(isinstance(module, DeployedGatedConv2d) for module in final.modules()) == len(gates(model))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(final(BATCH[0]), model(BATCH[0]), rtol=1e-5, atol=1e-5)
        with open_gates(model):
            torch.testing.assert_close(method.dense(model)(BATCH[0]), model(BATCH[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (models.digits_cnn, (3, 1, 8, 8)),
        (lambda: models.vgg([8, 12, "pool", 16]), (3, 3, 8, 8)),
        (lambda: models.resnet(8), (3, 3, 16, 16)),
        (lambda: models.mobilenet_v1(width=0.125), (2, 3, 16, 16)),
        (lambda: models.mobilenet_v2(width=0.125), (2, 3, 16, 16)),
    ],
    ids=["digits_cnn", "vgg", "resnet", "mobilenet_v1", "mobilenet_v2"],
)
def test_the_networks_of_this_library(build, shape):
    method, x = FTWT(), torch.randn(shape)
    network = randomise(build())
    model = settle(method.prepare(network, x))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert len(gates(model)) == convolutions - 1
    final = method.finalize(model)
    with torch.no_grad():
        torch.testing.assert_close(final(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_recalibration_measures_the_masked_network():
    method = FTWT()
    model = settle(method.prepare(NETWORKS["plain"]()))
    method.recalibrate(model, [BATCH, BATCH[0]])
    last = model.get_submodule("4.0")
    seen = {}
    last.register_forward_hook(lambda module, args, output: seen.setdefault("z", module.conv(args[0])))
    torch.manual_seed(0)
    model.train()(BATCH[0])
    assert last.norm.num_batches_tracked == 3
    assert last.norm.momentum == 0.1
    model.get_submodule("3").p = 0.0  # without dropout both batches give the same statistics
    method.recalibrate(model, [BATCH, BATCH[0]])
    seen.clear()
    model(BATCH[0])
    method.recalibrate(model, [BATCH])
    torch.testing.assert_close(last.norm.running_mean, seen["z"].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- controls


def test_random_masks_keep_the_same_numbers():
    model = settle(FTWT().prepare(randomise(residual()))).eval()
    records = []

    def record(gate, args, output):
        records.append((output != 0).flatten(2).any(2) if gate.force is None else gate.force)

    with torch.no_grad():
        expected = model(BATCH[0])
        decided = []
        hooks = [
            g.register_forward_pre_hook(lambda g, a: decided.append(g.examine(*a)[0])) for g in gates(model).values()
        ]
        model(BATCH[0])
        for hook in hooks:
            hook.remove()
        for gate in gates(model).values():
            gate.register_forward_hook(record)
        outputs = []
        for seed in (1, 1, 2):
            with random_masks(model, seed):
                records.clear()
                outputs.append(model(BATCH[0]))
            assert len(records) == 8  # the counting pass, then the random one
            for mask, random in zip(decided, records[4:]):
                assert torch.equal(mask.sum(1), random.sum(1))
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], expected)
        assert torch.equal(model(BATCH[0]), expected)
    assert all(gate.force is None for gate in gates(model).values())


def test_random_masks_leave_a_training_model_in_training():
    model = FTWT().prepare(residual()).train()
    before = model.get_submodule("1.conv1").norm.num_batches_tracked.clone()
    with random_masks(model):
        model(BATCH[0])
    assert all(module.training for module in model.modules())
    assert model.get_submodule("1.conv1").norm.num_batches_tracked == before + 1


def test_targets_as_masks():
    model = settle(FTWT(mass=0.6).prepare(randomise(NETWORKS["plain"]()))).eval()
    first = model.get_submodule("1.0")
    seen = []
    first.register_forward_hook(lambda module, args, output: seen.append((module.examine(*args)[1], output)))
    with target_masks(model), torch.no_grad():
        model(BATCH[0])
    target, output = seen[0]
    assert torch.equal((output != 0).flatten(2).any(2), target)
    assert first.force is None


# --------------------------------------------------------------------------------------------------- counting


def counted(network, **masks):
    """All activations positive, so that the support is what the masks leave."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.uniform_(0.1, 1)
            if module.bias is not None:
                module.bias.data.zero_()
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
    method = FTWT()
    model = method.prepare(network)
    set_masks(model, **masks)
    return method.report(model, [torch.rand(1, 2, 4, 4) + 0.1])


def test_counting_a_plain_and_a_depthwise_layer():
    network = nn.Sequential(conv(2, 4), conv(4, 4), conv(4, 4, groups=4), conv(4, 3, kernel=1), Head(3))
    report = counted(network, **{"1__0": [[1, 1, 0, 0]], "2__0": [[1, 0, 1, 1]], "3__0": [[0, 1, 1]]})
    pixels, linear, heads = 16, 12, (16, 16, 12)
    dense = [2 * 4 * 9, 4 * 4 * 9, 4 * 9, 4 * 3]
    # on in both: channel 0 alone; channels 2 and 3 are on, but see zeros, and so they stay zero
    exact = [2 * 4 * 9, 2 * 4 * 9, 1 * 9, 2 * 1]
    # the paper's counter: 2 // 4 = 0 input channels per group, and three channels kept by the depthwise layer
    paper = [2 * 4 * 9, 2 * 4 * 9, 0, 2 * 3]
    assert report.exact.dense == sum(dense) * pixels + linear
    assert report.exact.gated == sum(exact) * pixels + linear + sum(heads)
    assert report.paper_rule.dense == sum(dense) * pixels
    assert report.paper_rule.gated == sum(paper) * pixels
    assert report.head_macs == sum(heads)
    assert [layer.kept for layer in report.layers] == [1, 0.5, 0.75, pytest.approx(2 / 3), 1]
    assert [layer.support for layer in report.layers] == [1, 1, 0.5, 0.25, pytest.approx(2 / 3)]
    assert report.kept == pytest.approx((0.5 + 0.75 + 2 / 3) / 3)
    assert report.exact.reduction == 1 - report.exact.gated / report.exact.dense


def test_counting_forgets_no_shortcut():
    """Gated before the sum, the shortcut fills the block's channels again; the paper's counter does not see it."""
    network = nn.Sequential(conv(2, 4), Block(4, 4), conv(4, 2, kernel=1), Head(2))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.uniform_(0.1, 1)
    for keep, seen in ((True, 1), (False, 4)):
        method = FTWT(gate_after_residual=keep)
        model = method.prepare(network)
        set_masks(model, **{"1__conv1": [[1] * 4], "1__conv2": [[0, 1, 0, 0]], "2__0": [[1, 1]]})
        layers = {layer.name: layer for layer in method.report(model, [torch.rand(1, 2, 4, 4) + 0.1]).layers}
        assert layers["2.0"].support == seen / 4
        assert layers["2.0"].exact_macs == seen * 2 * 16 + 8
        assert tracing.producers(model)["2.0"] == ["1.conv2"]


def test_counting_a_concatenation():
    model = FTWT().prepare(Concat())
    sources = tracing.producers(model)
    assert sources["last.0"] == ["left.0", "right.0"] and sources["left.0"] == ["stem.0"] and sources["stem.0"] == []


def test_bytes():
    network = nn.Sequential(conv(2, 4), conv(4, 4), Head(4))
    report = counted(network, **{"1__0": [[1, 0, 0, 0]]})
    layer = report.layers[1]
    assert layer.dense_bytes == 4 * (4 * 36 + 64 + 64)
    assert layer.gated_bytes == 4 * (1 * 36 + 64 + 16 + 16)


def test_mask_accuracy():
    method = FTWT(mass=1.0)
    model = method.prepare(nn.Sequential(conv(2, 4), conv(4, 4), Head(4)))
    x = torch.randn(1, 2, 6, 6)
    gate = model.get_submodule("1.0")
    with target_masks(model):
        assert method.report(model, [x]).mask_accuracy == 1.0
    stem = model.eval().get_submodule("0")
    target = gate.examine(stem.get_submodule("2")(stem.get_submodule("1")(stem.get_submodule("0")(x))))[1]
    gate.force = target.clone()
    gate.force[0, 0] = ~gate.force[0, 0]
    report = method.report(model, [x])
    assert report.mask_accuracy == 0.75
    assert [layer.mask_accuracy for layer in report.layers] == [None, 0.75, None]


def test_the_estimate_is_what_the_targets_give():
    network, method = randomise(residual()), FTWT(mass=0.7)
    before = copy.deepcopy(network.state_dict())
    estimate = method.estimate_flops(network, [BATCH, BATCH[0]])
    model = method.prepare(network)
    with target_masks(model):
        report = method.report(model, [BATCH])
    assert report.exact == estimate.exact and report.paper_rule == estimate.paper_rule
    assert 0 < estimate.exact.reduction < 1
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    tighter = FTWT(mass=0.4).estimate_flops(network, [BATCH])
    assert tighter.exact.gated < estimate.exact.gated


def test_a_report_changes_nothing():
    method = FTWT()
    model = method.prepare(residual()).train()
    before = copy.deepcopy(model.state_dict())
    report = method.report(model, [BATCH], latency=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert report.latency.dense_ms > 0 and report.latency.gated_ms > 0 and report.latency.shape == (1, 2, 8, 8)
    assert report["latency"]["threads"] == torch.get_num_threads() and report.latency.speedup > 0
    assert report.as_dict()["layers"][0]["name"] == "0.0"


def test_linear_layers_count_too():
    model = nn.Sequential(nn.Flatten(), GatedLinear(128, 16, rank=2), nn.Linear(16, 4))
    gate = model[1]
    gate.force = torch.zeros(1, 16, dtype=torch.bool)
    gate.force[0, :3] = True
    report = FTWT().report(model, [torch.rand(1, 2, 8, 8) + 0.1])
    assert report.exact.gated == 128 * 3 + 2 * (128 + 16) + 16 * 4
    final = FTWT().finalize(model)
    gate.force = None
    torch.testing.assert_close(final(BATCH[0]), model.eval()(BATCH[0]))


# ----------------------------------------------------------------------------------------------------- errors


class AsksForTheMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = NETWORKS["plain"]()

    def forward(self, x):
        return F.dropout(self.body(x), 0.5, self.training)


class Branches(AsksForTheMode):
    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)


class HidesItsScale(AsksForTheMode):
    """A trace runs the forward on symbols, and so it takes the wrong branch."""

    def forward(self, x):
        return self.body(x) * (2 if type(x) is torch.Tensor else 1)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: FTWT(mass=1.5), r"FTWT: mass must be in \(0, 1\] or negative \(gating off\), got 1.5"),
        (lambda: FTWT(mass={"a": 0.0}), r"FTWT: mass must be in \(0, 1\] .* got 0.0"),
        (lambda: FTWT(mode="uniform", mass=1.0), r"FTWT: mass must be in \[0, 1\) in mode 'uniform'"),
        (lambda: FTWT(mode="top"), "FTWT: mode must be one of mass, uniform, got 'top'"),
        (lambda: FTWT(pool="sum"), "FTWT: pool must be one of max, avg, got 'sum'"),
        (lambda: FTWT(coupling="x"), "FTWT: coupling must be one of decoupled, joint, got 'x'"),
        (lambda: FTWT(compat="v2"), "FTWT: compat must be one of None, official, got 'v2'"),
        (lambda: FTWT(min_keep=-1), "FTWT: min_keep must not be negative, got -1"),
        (lambda: FTWT(cooldown=2), "FTWT: cooldown must be between 0 and 1, got 2"),
        (lambda: FTWT(total_steps=0), "FTWT: total_steps must be at least 1, or None, got 0"),
        (lambda: FTWT(min_keep=7).prepare(residual()), "min_keep must be between 0 and the 6 channels, got 7"),
        (lambda: FTWT().prepare(nn.Sequential(nn.Flatten(), nn.Linear(2, 2))), "no layer to gate: .*norm or ReLU"),
        (lambda: FTWT().prepare(nn.Sequential(conv(2, 3))), "no layer to gate: .* apart from the first.*skip_first"),
        (
            lambda: FTWT(mass={"1.conv3": 0.5}).prepare(residual()),
            "mass names '1.conv3', which cannot be gated; did you mean '1.conv",
        ),
        (lambda: FTWT().prepare(AsksForTheMode()), "AsksForTheMode: its forward depends on self.training .*dropout"),
        (lambda: FTWT().prepare(Branches()), r"torch.fx cannot trace Branches: TraceError.*groups=\[\("),
        (lambda: FTWT().prepare(HidesItsScale(), BATCH[0]), "on example_input the rewritten network differs"),
        (lambda: FTWT().prepare(residual(), groups=[("1.conv", None, None)]), "names '1.conv', .*did you mean '1.conv"),
        (lambda: FTWT().prepare(residual(), groups=[("0", "1")]), r"groups must hold triples .*, got \('0', '1'\)"),
        (lambda: FTWT().prepare(residual(), groups=[("zzz", None, None)]), r"names 'zzz', .*; there are '0', "),
        (lambda: FTWT().prepare(residual(), groups=[("1.bn1", None, None)]), "a Conv2d at '1.bn1', got BatchNorm2d"),
        (
            lambda: FTWT().prepare(residual(), groups=[("1.conv1", "1.bn1", "1.conv2")]),
            "expects a ReLU or ReLU6 at '1.conv2', got Conv2d",
        ),
        (lambda: FTWT().loss(FTWT().prepare(residual())), "FTWT.loss: layer '1.conv1' has seen no forward in training"),
        (lambda: FTWT().report(FTWT().prepare(residual()), []), "batches must hold at least one batch, got none"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: FTWT(mass=[0.9]), r"FTWT: mass must be a number, got \[0.9\]"),
        (lambda: FTWT(mass={"a": "0.9"}), "FTWT: mass must be a number, got '0.9'"),
        (lambda: FTWT(min_keep=2.5), "FTWT: min_keep must be an integer, got 2.5"),
        (lambda: FTWT(cooldown="half"), "FTWT: cooldown must be a number, got 'half'"),
        (lambda: FTWT().prepare("m"), "FTWT.prepare: model must be a torch.nn.Module, got str"),
        (lambda: FTWT().report(FTWT().prepare(residual()), "abc"), "batches must hold tensors, .* got str"),
        (lambda: FTWT().report(FTWT().prepare(residual()), BATCH[0]), "an iterable of batches, got a single tensor"),
    ],
)
def test_refusals_of_types(call, sentence):
    with pytest.raises(TypeError, match=sentence):
        call()


def test_an_empty_batch_counts_nothing():
    method = FTWT()
    model = settle(method.prepare(NETWORKS["bottleneck"]()))
    with pytest.raises(ValueError, match="FTWT: batches must hold at least one sample, got none"):
        method.report(model, [BATCH[0][:0]])
    assert method.report(model, [BATCH[0][:0], BATCH[0]]).exact == method.report(model, [BATCH[0]]).exact


class SharesItsActivation(nn.Module):
    """One module for the group's activation, and for another that must not get lost."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.act, self.head = nn.ReLU(inplace=True), Head(6)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.act(self.act(self.bn(self.conv(x))) - x.mean()))


def test_an_activation_that_several_layers_share_stays():
    network = randomise(SharesItsActivation())
    model = FTWT().prepare(network, BATCH[0], groups=[("conv", "bn", "act")])
    expected = network.eval()(BATCH[0])
    with open_gates(model):
        torch.testing.assert_close(model.eval()(BATCH[0]), expected)
    assert network.act.inplace and isinstance(model.act, nn.ReLU)
    model.train()(BATCH[0]).sum().backward()  # in place, the module would write to what the gated layer keeps


def test_untraceable_networks_take_named_groups():
    model = FTWT().prepare(Branches(), BATCH[0], groups=[("body.1.0", "body.1.1", "body.1.2")])
    assert list(gates(model)) == ["body.1.0"]
    assert isinstance(model, Branches)


def test_a_hand_built_network_needs_no_prepare():
    torch.manual_seed(0)
    model = nn.Sequential(conv(2, 6), GatedConv2d(6, 8, 3, padding=1, mass=0.5), Head(8))
    method = FTWT()
    model(BATCH[0])
    method.loss(model).backward()
    method.step(model)
    assert model[1].steps == 1
    torch.testing.assert_close(method.finalize(model)(BATCH[0]), model.eval()(BATCH[0]), rtol=1e-5, atol=1e-5)


def test_the_target_is_the_operator():
    gate = GatedConv2d(3, 6, 3, mass=0.5, mode="uniform", min_keep=2)
    x = torch.randn(2, 3, 5, 5)
    peak = gate.eval().norm(gate.conv(x)).relu().amax((2, 3))
    assert torch.equal(gate.examine(x)[1], ops.mass_mask(peak, 0.5, "uniform", 2))


@pytest.mark.parametrize("module", ["cofire.nn.gating", "cofire.methods.ftwt"])
def test_the_examples_of_the_docstrings(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0 and results.failed == 0
