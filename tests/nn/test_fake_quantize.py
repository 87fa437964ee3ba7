# SPDX-License-Identifier: Apache-2.0
"""Quantisers as modules, and the layers of quantisation-aware training."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cofire import ops
from cofire.nn import FakeQuantize, LSQConv2d, LSQLinear, QuantLinear, quantize_
from cofire.nn import fake_quantize as module
from cofire.nn.fake_quantize import lsq_scale
from cofire.ops.fake_quantize import SCALE_FLOOR
from helpers import check_examples


def calls(x: Tensor) -> list[tuple[FakeQuantize, Any]]:
    """Modules, and what each does to x."""
    s = 2 * x.abs().mean() / math.sqrt(7)
    u = 4 * x.abs().mean(0) / math.sqrt(15)
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    return [
        (FakeQuantize("lsq", 4), lambda: ops.fake_quantize_lsq(x, s, -8, 7)),
        (
            FakeQuantize("lsq", 4, signed=False, axis=-1, size=x.shape[1]),
            lambda: ops.fake_quantize_lsq(x, u, 0, 15, axis=1),
        ),
        (
            FakeQuantize("affine", 3, axis=0, size=x.shape[0]),
            lambda: ops.fake_quantize_affine(x, high - low, low, 3, axis=0),
        ),
        (
            FakeQuantize("lsq", 3, group_size=16, size=x.shape),
            lambda: ops.fake_quantize_lsq(x, 2 * x.abs().view(-1, 4, 16).mean(2) / math.sqrt(3), -4, 3, group_size=16),
        ),
        (FakeQuantize("minmax", 5, group_size=16), lambda: ops.fake_quantize_minmax(x, 5, group_size=16)),
        (FakeQuantize("minmax", 5), lambda: ops.fake_quantize_minmax(x, 5)),
        (FakeQuantize("statsq", 2), lambda: ops.fake_quantize_statsq(x, 2)),
        (
            FakeQuantize("group", group_size=32, format="e2m1", outliers=1),
            lambda: ops.fake_quantize_group(x, "e2m1", group_size=32, outliers=1),
        ),
    ]


def test_modules_do_what_the_operators_do() -> None:
    x = torch.randn(6, 64)
    for quantizer, expected in calls(x):
        torch.testing.assert_close(quantizer(x), expected())
        before = {k: v.clone() for k, v in quantizer.state_dict().items() if isinstance(v, Tensor)}
        quantizer(x * 3)  # the first batch alone sets the parameters
        assert all(torch.equal(before[k], quantizer.state_dict()[k]) for k in before)
        assert all(p.requires_grad for p in quantizer.parameters())


def test_an_optimiser_made_before_the_first_batch_trains_them() -> None:
    layer = LSQLinear(16, 4, bits=3, activation_bits=4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    assert {n for n, _ in layer.named_parameters()} == {"weight", "bias", "weight_scale", "activation.scale"}
    before = None
    for _ in range(2):
        layer(torch.randn(32, 16)).square().mean().backward()
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    assert before is not None
    assert all(not torch.equal(before[n], p) for n, p in layer.named_parameters())


def test_state_round_trip() -> None:
    x = torch.randn(6, 64)
    for quantizer, _ in calls(x):
        y = quantizer(x)
        fresh = copy.deepcopy(quantizer)
        for p in fresh.parameters():
            p.data.fill_(9.0)
        fresh._ready = quantizer.method not in ("lsq", "affine")
        file = io.BytesIO()
        torch.save(quantizer.state_dict(), file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(fresh(x), y)  # what was loaded stays
        assert torch.equal(copy.deepcopy(quantizer)(x), y)
    # of a module that has seen nothing: it takes the first batch after loading
    made, other = FakeQuantize("lsq"), FakeQuantize("lsq")
    other(x)
    other.load_state_dict(made.state_dict())
    other(5 * x)
    torch.testing.assert_close(other.scale.detach(), 2 * (5 * x).abs().mean() / math.sqrt(7))


def through_safetensors(model: nn.Module) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save(model.state_dict()))


LAYERS = {
    "linear": (lambda: LSQLinear(48, 6, bits=3, activation_bits=8), (5, 48)),
    "linear in groups": (lambda: LSQLinear(48, 6, bits=3, per="group", group_size=16, activation_bits=8), (5, 48)),
    "convolution": (lambda: LSQConv2d(3, 5, 3, activation_bits=4, activation_signed=False), (2, 3, 8, 8)),
    "deployed": (lambda: LSQLinear(48, 6, activation_bits=8).finalize(), (5, 48)),
    "model": (lambda: nn.Sequential(LSQLinear(48, 32, activation_bits=8), nn.ReLU(), LSQLinear(32, 4)), (5, 48)),
    "model deployed in part": (
        lambda: quantize_(
            nn.Sequential(
                LSQLinear(48, 32, activation_bits=8).finalize(),
                FakeQuantize("group", group_size=32, stochastic=True),
                nn.Linear(32, 32),
            ),
            group_size=32,
            activations="int8",
        ),
        (5, 48),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_pass_through_safetensors(name: str) -> None:
    """Which holds tensors alone."""
    make, shape = LAYERS[name]
    x, layer, other = torch.randn(shape), make(), make()
    layer(x)
    other(5 * x)
    assert str(other.load_state_dict(through_safetensors(layer))) == "<All keys matched successfully>"
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in layer.state_dict().items())
    assert torch.equal(other(x), layer(x))


def test_quantisers_pass_through_safetensors() -> None:
    x = torch.randn(6, 64)
    for (quantizer, _), (other, _) in zip(calls(x), calls(torch.randn(6, 64))):
        y = quantizer(x)
        other(3 * x)
        other.load_state_dict(through_safetensors(quantizer))
        assert torch.equal(other(x), y)


def test_a_seed_that_was_saved_as_a_number_is_read() -> None:
    """As states had it before it was a tensor."""
    x = torch.randn(2, 256)
    quantizer = FakeQuantize("group", stochastic=True)
    for _ in range(3):
        quantizer(x)
    assert isinstance(quantizer.state_dict()["_extra_state"], Tensor)
    other = FakeQuantize("group", stochastic=True)
    other.load_state_dict({"_extra_state": 3})
    assert other.seed == 3 and torch.equal(other(x), quantizer(x))
    model, trained = (nn.Sequential(LSQLinear(8, 4, activation_bits=4)) for _ in range(2))
    trained(torch.randn(3, 8))
    old = {n: int(v) if n.endswith("_extra_state") else v for n, v in trained.state_dict().items()}
    assert str(model.load_state_dict(old)) == "<All keys matched successfully>"


def test_stochastic_rounding_goes_on_where_it_was() -> None:
    x = torch.randn(2, 256)
    quantizer = FakeQuantize("group", stochastic=True)
    first, second = quantizer(x), quantizer(x)
    assert not torch.equal(first, second)
    again = FakeQuantize("group", stochastic=True)
    assert torch.equal(again(x), first)
    other = FakeQuantize("group", stochastic=True)
    other.load_state_dict(again.state_dict())
    assert torch.equal(other(x), second)
    assert torch.equal(quantizer.eval()(x), ops.fake_quantize_group(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("per", ["row", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_deployed_weight_is_the_trained_one(bits: int, per: str, dtype: torch.dtype) -> None:
    layer = LSQLinear(33, 7, bits=bits, per=per, dtype=dtype)
    with torch.no_grad():
        layer.weight_scale.mul_(0.7)
        layer.weight[2] = 0
    if per == "row":
        with torch.no_grad():
            layer.weight_scale[3] = -1.0  # read as the floor
    deployed = layer.finalize()
    assert isinstance(deployed, QuantLinear) and deployed.bits == bits
    assert torch.equal(deployed.weight, layer.quantized_weight)
    x = torch.randn(5, 33).to(dtype)
    torch.testing.assert_close(deployed(x), layer(x), rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_deployed_weight_of_groups_is_the_trained_one(bits: int, dtype: torch.dtype) -> None:
    layer = LSQLinear(96, 7, bits=bits, per="group", group_size=32, dtype=dtype)
    assert layer.weight_scale.shape == (7, 3)
    first = 2 * layer.weight.detach()[:, :32].to(torch.float64).abs().mean(1) / math.sqrt(layer.high)
    torch.testing.assert_close(layer.weight_scale.detach()[:, 0].double(), first, rtol=1e-2, atol=1e-6)
    with torch.no_grad():
        layer.weight_scale.mul_(torch.rand(7, 3) + 0.5)
        layer.weight_scale[3, 1] = -1.0  # read as the floor
    deployed = layer.finalize()
    assert isinstance(deployed, QuantLinear) and deployed.group_size == 32 and deployed.scale.shape == (7, 3)
    assert torch.equal(deployed.weight, layer.quantized_weight)
    assert "group_size=32" in repr(layer)


def test_a_step_for_each_group_gets_its_own_gradient() -> None:
    layer = LSQLinear(48, 5, bits=4, per="group", group_size=16)
    x = torch.randn(9, 48)
    layer(x).square().sum().backward()
    weight, scale = layer.weight.detach().requires_grad_(), layer.weight_scale.detach()
    columns = [scale[:, g].clone().requires_grad_() for g in range(3)]
    # each group by itself is a matrix whose rows have a step each
    parts = [ops.fake_quantize_lsq(weight[:, 16 * g : 16 * g + 16], columns[g], -8, 7, axis=0) for g in range(3)]
    nn.functional.linear(x, torch.cat(parts, 1), layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.weight_scale.grad, torch.stack([c.grad for c in columns], 1))


def test_groups_fit_a_weight_better_than_rows() -> None:
    """Where the parts of a row differ in size, which is what groups are for."""
    dense = nn.Linear(64, 8)
    with torch.no_grad():
        dense.weight *= torch.logspace(0, 3, 4).repeat_interleave(16)
    errors = [
        ((layer.quantized_weight - dense.weight) / torch.logspace(0, 3, 4).repeat_interleave(16)).square().mean().item()
        for layer in (
            LSQLinear.from_linear(dense, bits=4),
            LSQLinear.from_linear(dense, bits=4, per="group", group_size=16),
        )
    ]
    assert errors[1] < 0.2 * errors[0]


def test_a_convolution_in_groups() -> None:
    layer = LSQConv2d(4, 6, 3, bits=4, per="group", group_size=12)
    assert layer.weight_scale.shape == (6, 3)
    flat = ops.fake_quantize_lsq(layer.weight.flatten(1), layer.weight_scale, -8, 7, group_size=12)
    assert torch.equal(layer.quantized_weight, flat.view(6, 4, 3, 3))
    x = torch.randn(2, 4, 7, 7)
    y = layer.to(memory_format=torch.channels_last)(x)
    torch.testing.assert_close(y, nn.functional.conv2d(x, flat.view(6, 4, 3, 3), layer.bias))
    y.square().sum().backward()
    assert layer.weight_scale.grad is not None and layer.weight_scale.grad.abs().min() > 0


def test_deployed_with_activations() -> None:
    layer = LSQLinear(32, 8, bits=4, activation_bits=6, activation_signed=False)
    x = torch.rand(50, 32)
    y = layer(x)
    deployed = layer.finalize()
    torch.testing.assert_close(deployed(x), y, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in deployed.parameters())
    assert deployed[0].scale.item() == pytest.approx(4 * x.mean().item() / math.sqrt(63), rel=1e-5)


def test_from_linear() -> None:
    dense = nn.Linear(24, 6).eval()
    layer = LSQLinear.from_linear(dense, bits=8)
    assert layer.weight is dense.weight and layer.bias is dense.bias and not layer.training
    torch.testing.assert_close(layer.weight_scale.detach(), 2 * dense.weight.detach().abs().mean(1) / math.sqrt(127))
    x = torch.randn(9, 24)
    assert (layer(x) - dense(x)).abs().max() < 0.1
    made = LSQLinear.from_linear(nn.Linear(24, 6, bias=False, dtype=torch.bfloat16), per="tensor")
    assert made.bias is None and made.weight_scale.shape == () and made.weight_scale.dtype == torch.bfloat16
    # subclasses of nn.Linear stay what they are
    model = nn.Sequential(layer, nn.Linear(6, 32))
    quantize_(model, group_size=None)
    assert type(model[0]) is LSQLinear and type(model[1]) is QuantLinear


def test_convolution() -> None:
    layer = LSQConv2d(3, 5, 3, padding=1, stride=2, bits=3, activation_bits=8)
    x = torch.randn(2, 3, 9, 9)
    y = layer(x)
    w = torch.stack([ops.fake_quantize_lsq(layer.weight[i], layer.weight_scale[i], -4, 3) for i in range(5)])
    assert layer.activation is not None
    seen = ops.fake_quantize_lsq(x, layer.activation.scale, -128, 127)
    torch.testing.assert_close(y, nn.functional.conv2d(seen, w, layer.bias, stride=2, padding=1))
    y.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert "bits=3" in repr(layer) and "stride=(2, 2)" in repr(layer)


def test_training_lowers_the_loss() -> None:
    """Three bits, from a dense layer's weights: the steps and the weights fit a target better than where LSQ starts."""
    torch.manual_seed(0)
    target, x = nn.Linear(32, 16), torch.randn(256, 32)
    y = target(x).detach()
    layer = LSQLinear.from_linear(copy.deepcopy(target), bits=3, activation_bits=6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3)
    losses = []
    for _ in range(80):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.isfinite(layer.weight_scale).all()


def test_compiled_after_the_first_batch() -> None:
    layer = LSQLinear(16, 4, bits=4, activation_bits=8)
    x = torch.randn(3, 16)
    layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.weight_scale.grad is not None


def test_scales_start_positive() -> None:
    assert lsq_scale(torch.zeros(3, 4), 7).item() == pytest.approx(SCALE_FLOOR)
    assert (lsq_scale(torch.zeros(3, 4), 7, axis=0) > 0).all()
    assert lsq_scale(torch.ones(3), 7, axis=0).shape == (3,)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: FakeQuantize("lqs"), ValueError,
         "FakeQuantize: method must be one of lsq, affine, minmax, statsq, group, got 'lqs'"),
        (lambda: FakeQuantize("lsq", 9), ValueError, "FakeQuantize: bits must be between 1 and 8, got 9"),
        (lambda: FakeQuantize("lsq", 1), ValueError,
         "FakeQuantize: bits must be at least 2 for signed levels of method lsq, got 1"),
        (lambda: FakeQuantize("lsq", axis=1), ValueError, "FakeQuantize: axis and size belong together, got axis=1 and size=None"),
        (lambda: FakeQuantize("statsq", axis=1, size=2), ValueError, "FakeQuantize: axis must be None for method statsq, got 1"),
        (lambda: FakeQuantize("affine", group_size=8), ValueError,
         "FakeQuantize: group_size must be None for method affine, got 8"),
        (lambda: FakeQuantize("lsq", group_size=8), ValueError,
         "FakeQuantize: size must be the shape of the input where method lsq has a group_size, got None"),
        (lambda: FakeQuantize("lsq", group_size=8, size=16), ValueError,
         "FakeQuantize: size must be the shape of the input where method lsq has a group_size, got 16"),
        (lambda: FakeQuantize("lsq", group_size=8, size=(4, 12)), ValueError,
         "FakeQuantize: group_size must be positive and divide the 12 columns of size, got 8"),
        (lambda: FakeQuantize("lsq", group_size=8, size=(4, 16), axis=0), ValueError,
         "FakeQuantize: axis and group_size exclude each other, got axis=0 and group_size=8"),
        (lambda: FakeQuantize("lsq", group_size=8.0, size=(4, 16)), TypeError,
         "FakeQuantize: group_size must be an integer, got 8.0"),
        (lambda: FakeQuantize("lsq", axis=0, size=(4, 16)), TypeError, "FakeQuantize: size must be an integer, got (4, 16)"),
        (lambda: FakeQuantize("lsq", outliers=2), TypeError, "FakeQuantize: method lsq has no option 'outliers'"),
        (lambda: LSQLinear(4, 4, bits=1), ValueError, "LSQLinear: bits must be between 2 and 8, got 1"),
        (lambda: LSQLinear(4, 4, per="column"), ValueError, "LSQLinear: per must be one of tensor, row, group, got 'column'"),
        (lambda: LSQLinear(4, 4, per="group"), ValueError,
         "LSQLinear: per='group' and group_size belong together, got per='group' and group_size=None"),
        (lambda: LSQLinear(4, 4, group_size=2), ValueError,
         "LSQLinear: per='group' and group_size belong together, got per='row' and group_size=2"),
        (lambda: LSQLinear(4, 4, per="group", group_size=3), ValueError,
         "LSQLinear: group_size must be positive and divide the 4 columns, got 3"),
        (lambda: LSQConv2d(4, 4, 3, per="group", group_size=8), ValueError,
         "LSQConv2d: group_size must be positive and divide the 36 columns, got 8"),
        (lambda: LSQConv2d(4, 4, 3, bits=16), ValueError, "LSQConv2d: bits must be between 2 and 8, got 16"),
        (lambda: LSQLinear.from_linear(nn.ReLU()), TypeError, "LSQLinear.from_linear: linear must be an nn.Linear, got ReLU"),
    ],
)  # fmt: skip
def test_refusal(call: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence


def test_a_weight_that_is_not_a_number_is_refused() -> None:
    layer = LSQLinear(4, 2)
    with torch.no_grad():
        layer.weight[0, 1] = float("nan")
    with pytest.raises(
        ValueError, match="LSQLinear.to_qtensor: weight and scales must not be NaN, got 1 values that are"
    ):
        layer.finalize()


def test_examples() -> None:
    check_examples(module)
