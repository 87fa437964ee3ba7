# SPDX-License-Identifier: Apache-2.0
"""Gated layers: the trainable form against plain torch, the deployed form against the trainable one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cofire import ops
from cofire.nn import DeployedGatedConv2d, GatedConv2d, GatedLinear, GateHead

GEOMETRIES = {
    "3x3": ((5, 8, 3), {"padding": 1}),
    "pointwise": ((7, 3, 1), {"bias": False}),
    "strided": ((4, 6, 3), {"stride": 2, "padding": (1, 0)}),
    "dilated": ((3, 5, (3, 1)), {"dilation": (2, 1)}),
    "same": ((3, 5, 3), {"padding": "same", "dilation": 2}),
    "grouped": ((6, 9, 3), {"groups": 3, "padding": 1}),
    "depthwise": ((6, 6, 3), {"groups": 6, "padding": 1, "bias": False}),
    "relu6": ((5, 8, 3), {"activation": "relu6"}),
    "bottleneck": ((5, 4, 1), {"activation": "identity"}),
    "no norm": ((5, 4, 3), {"norm": False}),
    "no norm, no bias": ((5, 4, 3), {"norm": False, "bias": False}),
    "one channel": ((1, 1, 1), {}),
}


def sparse_input(channels, n=4, size=9):
    """About half of the channels of each sample are zero, as after a gate."""
    x = torch.randn(n, channels, size, size)
    return x * (torch.rand(n, channels, 1, 1) < 0.6)


def settled(layer):
    """With the statistics, scales and shifts of a layer that has been trained."""
    norm = layer.norm
    if norm is not None:
        for tensor in (norm.weight.data, norm.running_var):
            tensor.uniform_(0.5, 2)
        for tensor in (norm.bias.data, norm.running_mean):
            tensor.uniform_(-1, 1)
    return layer


def plain_forward(layer, x, residual, mask):
    """The layer in plain torch: its output and each channel's peak."""
    u = layer.conv(x)
    if layer.norm is not None:
        u = layer.norm(u)
    if residual is not None:
        u = u + residual
    u = {"identity": u, "relu": u.relu(), "relu6": F.relu6(u)}[layer.activation]
    return u * mask[:, :, None, None], u.abs().amax((2, 3))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_plain_torch(geometry, with_residual, training):
    args, options = GEOMETRIES[geometry]
    layer = settled(GatedConv2d(*args, **options, mass=0.8)).train(training)
    twin = copy.deepcopy(layer)
    x = sparse_input(args[0]).requires_grad_()
    x_twin = x.detach().clone().requires_grad_()
    residual = torch.randn_like(twin.conv(x)).detach() if with_residual else None

    pooled = x_twin.detach().amax((2, 3)).softmax(1)
    logits = F.linear(pooled, twin.head.weight, twin.head.bias)
    mask = logits > 0
    mask[torch.arange(len(x)), logits.argmax(1)] = True
    expected, peak = plain_forward(twin, x_twin, residual, mask)
    target = ops.mass_mask(peak.detach(), 0.8)
    loss = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none").sum(1).mean()

    output = layer(x, residual)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert (output[~mask] == 0).all()
    direction = torch.randn_like(output)
    objective, expected_objective = (output * direction).sum(), (expected * direction).sum()
    if training:
        torch.testing.assert_close(layer.gate_loss, loss, rtol=1e-4, atol=1e-5)
        objective, expected_objective = objective + layer.gate_loss, expected_objective + loss
    else:
        assert layer.gate_loss is None
    objective.backward()
    expected_objective.backward()
    torch.testing.assert_close(x.grad, x_twin.grad, rtol=1e-3, atol=1e-4)
    for (name, p), q in zip(layer.named_parameters(), twin.parameters()):
        if training or "head" not in name:
            atol = 2e-3 if name == "conv.bias" else 2e-4  # before a batch norm it is a sum that cancels to zero
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_as_batch_norm(momentum):
    layer = GatedConv2d(3, 5, 3)
    layer.norm.momentum = momentum
    twin = copy.deepcopy(layer)
    for n in (4, 1, 7):
        x = torch.randn(n, 3, 5, 5)
        layer(x)
        twin.norm(twin.conv(x))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer.norm, name), getattr(twin.norm, name))


def test_frozen_norm_keeps_its_statistics():
    layer = settled(GatedConv2d(3, 5, 3))
    layer.norm.eval()
    before = copy.deepcopy(layer.norm.state_dict())
    layer(torch.randn(2, 3, 5, 5))
    assert all(torch.equal(before[name], value) for name, value in layer.norm.state_dict().items())
    assert layer.gate_loss is not None


def test_norms_without_scale_or_statistics():
    for options in ({"affine": False}, {"track_running_stats": False}):
        conv, norm, x = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, **options), torch.randn(4, 3, 6, 6)
        layer = GatedConv2d.from_modules(conv, norm, "relu").eval()
        layer.force = "open"
        torch.testing.assert_close(layer(x), norm(conv(x)).relu(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="without running statistics cannot be folded"):
        layer.deploy()


def golden_layer():
    """Logits [0, 2] whatever the input, target [1, 0]."""
    layer = GatedConv2d(1, 2, 1, bias=False, norm=False, activation="identity", mass=1.0)
    layer.conv.weight.data.copy_(torch.tensor([3.0, 0.0]).view(2, 1, 1, 1))
    layer.head.weight.data.zero_()
    layer.head.bias.data.copy_(torch.tensor([0.0, 2.0]))
    return layer


def test_golden_loss():
    layer = golden_layer()
    layer(torch.ones(1, 1, 2, 2))
    assert layer.gate_loss.item() == pytest.approx(2.820075, abs=1e-6)
    layer.gate_loss.backward()
    torch.testing.assert_close(layer.head.bias.grad, torch.tensor([-0.5, 0.880797]))
    layer(torch.ones(5, 1, 2, 2))  # the mean over the batch
    assert layer.gate_loss.item() == pytest.approx(2.820075, abs=1e-6)


def test_task_gradient_never_reaches_the_head():
    layer = GatedConv2d(3, 5, 3, coupling="joint")
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert all(p.grad is None for p in layer.head.parameters())
    assert layer.conv.weight.grad is not None


@pytest.mark.parametrize("coupling", ["decoupled", "joint"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_where_the_gate_loss_goes(coupling, pool):
    layer = GatedConv2d(3, 5, 3, coupling=coupling, pool=pool)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    layer(x)
    layer.gate_loss.backward()
    assert all(p.grad is not None for p in layer.head.parameters())
    assert layer.conv.weight.grad is None and layer.norm.weight.grad is None
    assert (x.grad is not None) == (coupling == "joint")
    if coupling == "joint":
        pooled = x.detach().requires_grad_()
        features = (pooled.amax((2, 3)) if pool == "max" else pooled.mean((2, 3))).softmax(1)
        logits = F.linear(features, layer.head.weight, layer.head.bias)
        target = layer.examine(x)[1].float()
        (F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / 2).backward()
        torch.testing.assert_close(x.grad, pooled.grad)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_deployed_equals_evaluation(geometry, with_residual):
    args, options = GEOMETRIES[geometry]
    layer = settled(GatedConv2d(*args, **options)).eval()
    deployed = layer.deploy()
    x = sparse_input(args[0])
    with torch.no_grad():
        residual = torch.randn_like(layer.conv(x)) if with_residual else None
        expected = layer(x, residual)
        torch.testing.assert_close(deployed(x, residual), expected, rtol=1e-5, atol=1e-5)
        channels_last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(deployed(channels_last, residual), expected, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in deployed.parameters())
    assert isinstance(deployed.explain(x, residual), str)


def test_deployed_layer_is_independent():
    layer = settled(GatedConv2d(3, 5, 3)).eval()
    deployed, x = layer.deploy(), torch.randn(2, 3, 5, 5)
    before = deployed(x)
    for tensor in layer.state_dict().values():
        tensor.zero_()
    assert torch.equal(deployed(x), before)


def test_deployed_layers_compile_and_copy():
    x = torch.randn(4, 3, 6, 6)
    for layer, value in ((GatedConv2d(3, 5, 3), x), (GatedLinear(3, 5), x[:, :, 0, 0])):
        deployed = layer.eval().deploy()
        with torch.no_grad():
            expected = deployed(value)
            compiled = torch.compile(deployed, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(value), expected)
        assert torch.equal(copy.deepcopy(deployed)(value), expected)
        assert torch.equal(pickle.loads(pickle.dumps(deployed))(value), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    layer = GatedConv2d(3, 5, 3, dtype=dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    output = layer(x)
    assert output.dtype == dtype
    assert layer.gate_loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    (output.float().square().mean() + layer.gate_loss).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.eval().deploy()(x).dtype == dtype


def test_autocast_residual_in_full_precision():
    layer, x = GatedConv2d(4, 4, 3, padding=1), torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x, x).dtype == torch.bfloat16
        assert layer.eval().deploy()(x, x).dtype == torch.bfloat16
    assert layer.gate_loss.dtype == torch.float32


def test_memory_format_is_kept():
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    layer = GatedConv2d(4, 8, 3)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer.eval().deploy()(x).is_contiguous(memory_format=torch.channels_last)


def test_forced_masks():
    layer, x = settled(GatedConv2d(3, 6, 3, mass=0.6)).eval(), torch.randn(4, 3, 6, 6)
    dense = layer.norm(layer.conv(x)).relu()
    predicted, target = layer.examine(x)
    some = torch.rand(4, 6) < 0.5
    for force, mask in ((None, predicted), ("open", torch.ones_like(target)), ("target", target), (some, some)):
        layer.force = force
        torch.testing.assert_close(layer(x), dense * mask[:, :, None, None], rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.examine(x)[0], mask)
    layer.force = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask must have shape \[4, 6\], got \[4, 5\]"):
        layer(x)


def test_examine_changes_nothing():
    layer, x = GatedConv2d(3, 6, 3), torch.randn(4, 3, 6, 6)
    before = copy.deepcopy(layer.state_dict())
    layer.examine(x)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert layer.gate_loss is None


def test_copies_and_pickles_drop_what_belongs_to_one_forward():
    layer, x = GatedConv2d(3, 6, 3), torch.randn(4, 3, 6, 6)
    layer(x)
    layer.force = "target"
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.gate_loss is None and other.force is None
    assert layer.gate_loss is not None and layer.force == "target"


def test_from_modules_takes_the_modules_over():
    conv, norm = nn.Conv2d(4, 6, 3, padding=1, bias=False, dtype=torch.float64), nn.BatchNorm2d(6, dtype=torch.float64)
    layer = GatedConv2d.from_modules(conv.eval(), norm.eval(), "relu6", mass=0.5)
    assert layer.conv is conv and layer.norm is norm and not layer.training
    assert layer.head.weight.dtype == torch.float64 and layer.activation == "relu6" and layer.mass == 0.5


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: GatedConv2d(3, 4, 3, mass=1.5), ValueError, r"GatedConv2d: mass must be in \(0, 1\] .*1.5"),
        (lambda: GatedConv2d(3, 4, 3, mass=0), ValueError, r"GatedConv2d: mass must be in \(0, 1\] .* got 0"),
        (lambda: GatedConv2d(3, 4, 3, mode="uniform", mass=1), ValueError, r"must be in \[0, 1\) in mode 'uniform'"),
        (lambda: GatedConv2d(3, 4, 3, activation="gelu"), ValueError, "must be one of identity, relu, relu6"),
        (lambda: GatedConv2d(3, 4, 3, coupling="both"), ValueError, "one of decoupled, joint, got 'both'"),
        (lambda: GatedConv2d(3, 4, 3, pool="sum"), ValueError, "GateHead: pool must be one of avg, max, got 'sum'"),
        (lambda: GatedConv2d(3, 4, 3, min_keep=5), ValueError, "must be between 0 and the 4 channels, got 5"),
        (lambda: GatedConv2d(3, 4, 2, padding="same"), ValueError, "padding='same' needs an odd kernel"),
        (lambda: GatedConv2d(3, 4, 3)(torch.ones(3, 5, 5)), ValueError, r"must have shape \[N, C, H, W\], got \[3, 5"),
        (lambda: GatedConv2d(3, 4, 3)(torch.ones(2, 3)), ValueError, r"GatedConv2d: input must have shape"),
        (
            lambda: GatedConv2d(3, 4, 3)(torch.ones(2, 3, 5, 5), torch.ones(2, 4, 5, 5)),
            ValueError,
            r"residual must have shape \[2, 4, 3, 3\], got \[2, 4, 5, 5\]",
        ),
        (
            lambda: GatedConv2d.from_modules(nn.Conv2d(3, 4, 3, padding_mode="circular")),
            ValueError,
            "padding_mode must be 'zeros', got 'circular'",
        ),
        (
            lambda: GatedConv2d.from_modules(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)),
            ValueError,
            "norm must have the 4 channels of the convolution, got 5",
        ),
        (
            lambda: GatedConv2d.from_modules(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)),
            TypeError,
            "norm must be a BatchNorm2d or None, got SyncBatchNorm",
        ),
        (
            lambda: nn.SyncBatchNorm.convert_sync_batchnorm(GatedConv2d(3, 4, 3))(torch.ones(2, 3, 5, 5)),
            TypeError,
            "norm must be a BatchNorm2d, got SyncBatchNorm",
        ),
        (lambda: GatedConv2d(3, 4, 3, mass="x"), TypeError, "GatedConv2d: mass must be a number, got 'x'"),
        (lambda: GatedConv2d(3, 4, 3, min_keep=2.5), TypeError, "GateHead: min_keep must be an integer, got 2.5"),
        (
            lambda: GatedConv2d(3, 8, 3)(torch.ones(2, 4, 8, 8)),
            ValueError,
            r"^GatedConv2d: input must have 3 channels, got \[2, 4, 8, 8\]",
        ),
        (
            lambda: GatedConv2d(3, 8, 3).eval().deploy()(torch.ones(2, 4, 8, 8)),
            ValueError,
            r"^GateHead: input must have 3 channels, got \[2, 4, 8, 8\]",
        ),
        (lambda: GatedLinear(4, 4)(torch.rand(2, 3)), ValueError, r"^GatedLinear: input must have 4 features, got \[2"),
        (lambda: GatedConv2d.from_modules(nn.Linear(3, 8)), TypeError, "conv must be a Conv2d, got Linear"),
        (lambda: GateHead(3, 4, rank=0), ValueError, "rank must be at least 1, or None, got 0"),
        (lambda: GatedLinear(3, 4, storage="row"), ValueError, "storage must be one of out, in, got 'row'"),
        (lambda: GatedLinear(3, 4)(torch.ones(2, 5, 3)), ValueError, r"input must have shape \[N, in_features\], got"),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.parametrize("layer", [GatedConv2d(3, 4, 3), GatedLinear(3, 4)], ids=["conv", "linear"])
def test_a_misspelt_force_is_refused(layer):
    layer.force = "opne"
    x = torch.ones(2, 3, 5, 5) if isinstance(layer, GatedConv2d) else torch.ones(2, 3)
    with pytest.raises(ValueError, match="force must be None, 'open', 'target' or a tensor, got 'opne'"):
        layer(x)
    with pytest.raises(ValueError, match="got 'opne'"):
        layer.examine(x)


@pytest.mark.parametrize("activation", ["identity", "relu", "relu6"])
def test_linear_equals_plain_torch(activation):
    layer = GatedLinear(16, 24, activation=activation, mass=0.7)
    x = torch.randn(5, 16) * (torch.rand(5, 16) < 0.5)
    u = layer.linear(x)
    u = {"identity": u, "relu": u.relu(), "relu6": F.relu6(u)}[activation]
    logits = F.linear((x @ layer.head.projection.t()).softmax(1), layer.head.weight, layer.head.bias)
    mask = logits > 0
    mask[torch.arange(5), logits.argmax(1)] = True
    target = ops.mass_mask(u.detach().abs(), 0.7)
    torch.testing.assert_close(layer(x), u * mask)
    loss = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="sum") / 5
    torch.testing.assert_close(layer.gate_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(layer.examine(x), (mask, target)))
    layer.gate_loss.backward()
    assert layer.linear.weight.grad is None
    assert all(p.grad is not None for p in layer.head.parameters())
    layer(x).sum().backward()
    assert layer.linear.weight.grad is not None


@pytest.mark.parametrize("storage", ["out", "in"])
@pytest.mark.parametrize("bias", [True, False])
def test_deployed_linear_equals_evaluation(storage, bias):
    layer = GatedLinear(17, 9, bias, storage=storage).eval()
    deployed = layer.deploy()
    x = torch.randn(5, 17) * (torch.rand(5, 17) < 0.5)
    torch.testing.assert_close(deployed(x), layer(x), rtol=1e-5, atol=1e-5)
    assert deployed.weight.shape == ((9, 17) if storage == "out" else (17, 9))
    assert deployed.weight.is_contiguous() and isinstance(deployed.explain(x), str)
    assert deployed.extra_repr().startswith("17, 9")


def test_the_head_of_a_linear_layer_is_cheaper_than_the_layer():
    layer = GatedLinear(256, 128)
    assert layer.head.macs == 16 * (256 + 128) < 256 * 128 / 4
    assert GatedLinear(256, 128, rank=4).head.macs == 4 * (256 + 128)


def test_representations_name_what_matters():
    layer = GatedConv2d(3, 8, 3, padding=1, mass=0.9)
    assert "mass=0.9" in repr(layer) and "pool=max" in repr(layer)
    assert "3, 8, kernel_size=(3, 3)" in repr(layer.eval().deploy())
    assert isinstance(layer.deploy(), DeployedGatedConv2d)
