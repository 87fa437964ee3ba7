# SPDX-License-Identifier: Apache-2.0
"""StatsQ layers: levels, what may move in annealing, the tracker of oscillation, query and key as one matrix."""

from __future__ import annotations

import copy
import doctest
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cofire.nn import (
    IntegerLinear,
    LSQActivation,
    QuantConv2d,
    QuantLinear,
    QueryKey,
    ReparameterizedAttention,
    StatsQConv2d,
    StatsQLinear,
    WeightQuantizer,
)
from cofire.ops import QTensor, quantize_weight

# ------------------------------------------------------------------------------------------------------ activations


def test_activations_step_by_step():
    """Shift, divide by the position's scale, clamp, round, multiply, shift."""
    layer = LSQActivation(2, features=2, scales=3, axis=-2)
    layer.initialized = True
    with torch.no_grad():
        layer.scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
        layer.before.copy_(torch.tensor([0.0, 1.0]))
        layer.after.copy_(torch.tensor([10.0, -10.0]))
    x = torch.tensor([[[0.3, 0.4], [-9.0, -1.4], [2.9, 3.2]]])
    # position 0: 0.3 -> 0.6 -> 1 -> 0.5 and 1.4 -> 2.8 -> 1 (clamped) -> 0.5; and so on
    expected = torch.tensor([[[0.5, 0.5], [-2.0, 0.0], [2.0, 2.0]]]) + torch.tensor([10.0, -10.0])
    torch.testing.assert_close(layer(x), expected)


def test_the_first_batch_gives_the_scales_and_no_other():
    layer = LSQActivation(4, features=8, scales=3, axis=-2)
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {"scale", "before", "after"}
    x = torch.randn(5, 3, 8)
    layer(x)
    assert layer.initialized and layer.flag == 1
    torch.testing.assert_close(layer.scale, 2 * x.abs().mean((0, 2)) / math.sqrt(7))
    assert layer.scale is parameters["scale"]
    before = layer.scale.detach().clone()
    layer(10 * x)
    assert torch.equal(layer.scale, before)


@pytest.mark.parametrize(
    ("options", "mean", "factor"),
    [
        ({}, lambda x: x.abs().mean().view(1), 2 / math.sqrt(7)),
        ({"unsigned": True}, lambda x: x.abs().mean().view(1), 4 / math.sqrt(15)),
        ({"scales": 6, "axis": -1}, lambda x: x.abs().mean((0, 1)), 2 / math.sqrt(7)),
        ({"scales": 8, "axis": -2, "parts": 2}, lambda x: x.view(3, 8, 3).abs().mean((0, 2)), 2 / math.sqrt(7)),
    ],
)
def test_scales_of_every_layout(options, mean, factor):
    layer, x = LSQActivation(4, **options), torch.randn(3, 4, 6)
    y = layer(x)
    torch.testing.assert_close(layer.scale, factor * mean(x))
    assert y.shape == x.shape
    steps = (
        y.view(3, 8, 3) / layer.scale[:, None]
        if "parts" in options
        else y / (layer.scale if options.get("axis") == -1 else layer.scale[0])
    )
    torch.testing.assert_close(steps, steps.round())
    low, high = (0, 15) if options.get("unsigned") else (-8, 7)
    assert steps.round().min() >= low and steps.round().max() <= high


def test_the_gradient_of_a_scale_does_not_depend_on_how_a_batch_is_split():
    layer, x = LSQActivation(3, scales=4, axis=-2), torch.randn(6, 4, 5)
    layer(x)
    cotangent = torch.randn(6, 4, 5)
    (layer(x) * cotangent).sum().backward()
    whole = layer.scale.grad.clone()
    # g = cotangent; ds = sum of g (round(clamp v) - [inside] v), over the root of high times the elements of one sample
    v = (x / layer.scale.detach()[:, None]).double()
    inside = (v >= -4) & (v <= 3)
    by_hand = (cotangent * (v.clamp(-4, 3).round() - torch.where(inside, v, 0))).sum((0, 2)) / math.sqrt(3 * 5)
    torch.testing.assert_close(whole, by_hand.float())
    layer.scale.grad = None
    for part in (slice(0, 2), slice(2, 6)):
        (layer(x[part]) * cotangent[part]).sum().backward()
    torch.testing.assert_close(layer.scale.grad, whole)


def test_another_length_of_the_sequence_is_refused():
    layer = LSQActivation(4, scales=3, axis=-2)
    layer(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match=r"LSQActivation: the input must be 3 long in dimension -2.*got \[2, 4, 8\]"):
        layer(torch.randn(2, 4, 8))
    parts = LSQActivation(4, scales=6, axis=-2, parts=2)
    with pytest.raises(ValueError, match=r"\(3 positions of 2 parts\)"):
        parts(torch.randn(2, 4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"scales": 3, "axis": -2}, {"scales": 8, "axis": -1, "unsigned": True}])
def test_the_integers_are_those_that_the_forward_multiplies(options, dtype):
    layer, x = LSQActivation(4, features=8, dtype=dtype, **options), torch.randn(5, 3, 8, dtype=dtype)
    with torch.no_grad():
        layer.before.normal_(std=0.1)
        layer.after.normal_(std=0.1)
        y = layer(x)
        q, scale = layer.integers(x)
    assert torch.equal(q, q.round()) and q.min() >= layer.low and q.max() <= layer.high and q.unique().numel() > 2
    assert q.dtype == scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal((q * scale).to(dtype) + layer.after, y)


def test_integers_of_parts_are_refused():
    with pytest.raises(ValueError, match="LSQActivation: the integers are of one part, got 2 parts"):
        LSQActivation(4, scales=6, axis=-2, parts=2).integers(torch.randn(2, 3, 8))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 1}, "bits must be between 2 and 8, got 1"),
        ({"bits": 9}, "bits must be between 2 and 8, got 9"),
        ({"bits": 4, "axis": 0, "scales": 2}, "axis must be -1, -2 or None, got 0"),
        ({"bits": 4, "scales": 2}, "scales must be at least 1, and 1 without axis, got 2"),
    ],
)
def test_activations_refuse(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LSQActivation(**options)
    with pytest.raises(TypeError, match="bits must be an integer"):
        LSQActivation(2.0)


def test_the_state_carries_whether_scales_are_set():
    layer, other = LSQActivation(4), LSQActivation(4)
    layer(torch.randn(4, 3))
    other.load_state_dict(layer.state_dict())
    assert other.initialized and copy.deepcopy(layer).initialized
    fresh = LSQActivation(4)
    layer.load_state_dict(fresh.state_dict())
    assert not layer.initialized


# ----------------------------------------------------------------------------------------------------------- weights


def test_golden_levels_of_two_bits():
    """Levels -3, -1, 1, 3 quarters of s = 2 mean|w|: plus and minus 0.5 and 1.5 mean|w|."""
    weight = torch.tensor([[1.0, -1.0, 3.0, -3.0, 0.1, -0.1, 0.9, -0.9]])  # the mean magnitude is 1.25
    quantizer = WeightQuantizer(weight, 2)
    assert quantizer.row_scale(weight).tolist() == [2.5]
    expected = [[0.625, -0.625, 1.875, -1.875, 0.625, -0.625, 0.625, -0.625]]
    torch.testing.assert_close(quantizer(weight), torch.tensor(expected))
    assert quantizer.codes(weight).tolist() == [[0, -1, 1, -2, 0, -1, 0, -1]]


def test_golden_levels_of_one_bit_and_of_a_row_of_zeros():
    weight = torch.tensor([[1.0, -3.0, 0.5], [0.0, 0.0, 0.0]])
    quantizer = WeightQuantizer(weight, 1)
    assert quantizer(weight).tolist() == [[1.5, -1.5, 1.5], [0.0, 0.0, 0.0]]
    assert quantizer.pack(weight).dequantize().tolist() == quantizer(weight).tolist()
    assert not quantizer.movable(weight)[0].any()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["statsq", "lsq"])
def test_packed_values_are_those_of_training_to_the_bit(bits, kind):
    if kind == "lsq" and bits == 1:
        pytest.skip("a learned scale has no range of one signed bit")
    weight = torch.randn(7, 33)
    quantizer = WeightQuantizer(weight, bits, kind)
    packed = quantizer.pack(weight)
    assert packed.bits == bits and packed.group_size == 33
    if kind == "statsq":
        assert packed.zero.item() == 2 ** (bits - 1) - 0.5
        torch.testing.assert_close(packed.scale[:, 0], 2 * weight.abs().mean(1) / 2 ** (bits - 1))
    assert torch.equal(packed.dequantize(), quantizer(weight))
    values = quantizer.codes(weight).double() + (0.5 if kind == "statsq" else 0)
    scale = quantizer.row_scale(weight)[:, None].double() / (2 ** (bits - 1) if kind == "statsq" else 1)
    torch.testing.assert_close((values * scale).float(), quantizer(weight))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_what_may_move_is_what_lies_near_a_boundary(bits):
    """By the definition, level by level: |u n - 1/2 - (i + 1/2)| at most the range, for a boundary between i and i + 1."""
    half, reach = 2 ** (bits - 1), 0.05
    weight = torch.randn(9, 201)
    weight[:, -1] = 0  # on the boundary of zero
    quantizer = WeightQuantizer(weight, bits, boundary_range=reach)
    u = (weight.double() / (2 * weight.double().abs().mean(1, keepdim=True))).clamp(-1, 1 - 1e-6)
    expected = torch.zeros_like(weight, dtype=torch.bool)
    for i in range(-half, half - 1):
        expected |= (u * half - 0.5 - (i + 0.5)).abs() <= reach
    assert torch.equal(quantizer.movable(weight), expected)
    assert 0 < expected.double().mean() < 0.2 and expected[:, -1].all()


def test_the_tracker_counts_reversals():
    """One weight's integers, 0 1 0 0 1 2 1: it turns back at the second, fourth and sixth change."""
    big = 30.0  # keeps the row's scale at about 10: boundaries at about -5, 0, 5 in two bits
    places = [1.0, 8.0, 1.0, 2.0, 8.0, 9.0, 1.0, -8.0]
    row = lambda value: torch.tensor([[value, *[5.0] * 200, -big]])  # noqa: E731
    quantizer = WeightQuantizer(row(places[0]), 2)
    codes, oscillation, turned = [int(quantizer.codes(row(places[0]))[0, 0])], 0.0, []
    for value in places[1:]:
        quantizer.track(row(value))
        codes.append(int(quantizer.integers[0, 0]))
        turned.append(round(float(quantizer.oscillation[0, 0]) - 0.99 * oscillation, 6) > 0)
        oscillation = float(quantizer.oscillation[0, 0])
    assert codes == [0, 1, 0, 0, 1, 1, 0, -2]
    assert turned == [False, True, False, True, False, True, False]
    expected = 0.0
    for reversal in turned:
        expected = 0.99 * expected + 0.01 * reversal
    assert oscillation == pytest.approx(expected)
    assert quantizer.count == quantizer.steps == len(places) - 1
    assert quantizer.oscillation[0, 1:].count_nonzero() == 0


@pytest.mark.parametrize("value", [0, 0.5, -0.1, 1.0, math.nan])
def test_a_boundary_range_outside_zero_and_a_half_is_refused(value):
    with pytest.raises(ValueError, match=r"boundary_range must be between 0 and 0.5 \(quantisation steps\), got"):
        WeightQuantizer(torch.randn(2, 4), 2, boundary_range=value)


def test_quantizers_refuse():
    with pytest.raises(ValueError, match="kind must be one of statsq, lsq, got 'absmax'"):
        WeightQuantizer(torch.randn(2, 4), 2, "absmax")
    with pytest.raises(ValueError, match="bits must be between 2 and 8 for lsq, got 1"):
        WeightQuantizer(torch.randn(2, 4), 1, "lsq")
    with pytest.raises(ValueError, match="bits must be between 1 and 8 for statsq, got 9"):
        WeightQuantizer(torch.randn(2, 4), 9)


def test_a_linear_layer_step_by_step():
    linear = nn.Linear(6, 4)
    layer = StatsQLinear(linear, 2, input=LSQActivation(4, features=6, scales=3, axis=-2))
    x = torch.randn(5, 3, 6)
    with torch.no_grad():
        layer.input.before.uniform_(-0.1, 0.1)
        layer.input.after.uniform_(-0.1, 0.1)
    y = layer(x)
    s = layer.input.scale.detach()[:, None]
    rounded = ((x + layer.input.before) / s).clamp(-8, 7).round() * s + layer.input.after
    scale = 2 * linear.weight.abs().mean(1, keepdim=True)
    q = ((linear.weight / scale).clamp(-1, 1 - 1e-6) * 2 - 0.5).round()
    torch.testing.assert_close(y, rounded @ (scale * (q + 0.5) / 2).t() + linear.bias)
    # straight through: the weight's gradient is that of a dense layer on the rounded input, everywhere
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    torch.testing.assert_close(layer.weight.grad, torch.einsum("bno,bni->oi", cotangent, rounded))
    layer.step()
    torch.testing.assert_close(layer.deploy()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_layers_keep_their_averages_in_fp32(dtype):
    layer = StatsQLinear(nn.Linear(16, 8), 2, input=LSQActivation(4, features=16)).to(dtype)
    x = torch.randn(3, 16, dtype=dtype)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == layer.weight.grad.dtype == dtype
    with torch.no_grad():
        layer.weight.neg_()
    layer.step()
    assert layer.quantizer.oscillation.dtype == torch.float32 and layer.quantizer.integers.dtype == torch.int8
    assert torch.equal(layer.deploy()[1].weight, layer.quantizer(layer.weight))
    assert layer.double().quantizer.oscillation.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ convolutions


@pytest.mark.parametrize(
    ("kind", "bits", "options"),
    [
        ("lsq", 8, {"kernel_size": 4, "stride": 4}),  # patches
        ("statsq", 2, {"kernel_size": (2, 3), "stride": (2, 3), "bias": False}),  # with pixels left over
        ("lsq", 3, {"kernel_size": 3, "padding": 1}),
        ("statsq", 4, {"kernel_size": 3, "stride": 3, "groups": 3}),
        ("lsq", 4, {"kernel_size": 2, "stride": 2, "padding": 1, "padding_mode": "reflect"}),
        ("lsq", 4, {"kernel_size": 2, "stride": 2, "dilation": 2}),
        ("lsq", 4, {"kernel_size": 1}),
    ],
)
def test_a_convolution_step_by_step(kind, bits, options):
    conv = nn.Conv2d(3, 6, **options)
    layer, x = StatsQConv2d(conv, bits, kind, input=LSQActivation(8)), torch.randn(2, 3, 9, 11)
    y = layer(x)
    s, half = layer.input.scale.detach(), 2 ** (bits - 1)
    rounded = (x / s).clamp(-128, 127).round() * s
    if kind == "lsq":
        scale = layer.quantizer.scale.detach()[:, None, None, None]
        weight = (conv.weight / scale).clamp(-half, half - 1).round() * scale
    else:
        scale = 2 * conv.weight.abs().mean((1, 2, 3), keepdim=True)
        weight = scale * (((conv.weight / scale).clamp(-1, 1 - 1e-6) * half - 0.5).round() + 0.5) / half
    dense = nn.Conv2d(3, 6, **options)
    with torch.no_grad():
        dense.weight.copy_(weight)
        if conv.bias is not None:
            dense.bias.copy_(conv.bias)
    torch.testing.assert_close(y, dense(rounded))
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    dense(rounded).backward(cotangent)
    inside = (
        (conv.weight / scale).abs() <= half - 1 if kind == "lsq" else torch.ones_like(conv.weight, dtype=torch.bool)
    )
    torch.testing.assert_close(layer.weight.grad[inside], dense.weight.grad[inside])
    layer.step()
    final = layer.deploy()
    assert type(final[1]) is QuantConv2d and final[1].linear.bits == bits
    assert final[1].side_by_side == (
        options in ({"kernel_size": 4, "stride": 4}, {"kernel_size": 1}) or (kind == "statsq" and bits == 2)
    )
    torch.testing.assert_close(final[1].weight, weight.detach())
    torch.testing.assert_close(final(x), y)
    torch.testing.assert_close(final(x[0]), y[0])  # one image
    torch.testing.assert_close(final(x.contiguous(memory_format=torch.channels_last)), y)


def test_patches_are_multiplied_without_decoding(monkeypatch):
    layer = StatsQConv2d(nn.Conv2d(3, 6, 4, stride=4), 8, "lsq")
    final, x = layer.deploy(), torch.randn(2, 3, 10, 8)
    expected = layer(x)
    monkeypatch.setattr(QuantConv2d, "weight", property(lambda self: pytest.fail("decoded")))
    torch.testing.assert_close(final(x), expected)
    with pytest.raises(pytest.fail.Exception, match="decoded"):
        final(x[0])


def test_the_states_of_convolutions_load_into_others():
    layer, x = StatsQConv2d(nn.Conv2d(3, 6, 4, stride=4), 8, "lsq", input=LSQActivation(8)), torch.randn(2, 3, 8, 8)
    layer(x)
    layer.step()
    other = StatsQConv2d(nn.Conv2d(3, 6, 4, stride=4), 8, "lsq", input=LSQActivation(8))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and other.quantizer.count == 1
    final, empty = layer.deploy(), other.deploy()
    with torch.no_grad():
        empty[1].linear.codes.zero_()
    empty.load_state_dict(final.state_dict())
    assert torch.equal(empty(x), final(x))


def test_frozen_weights_of_a_convolution_stay():
    layer = StatsQConv2d(nn.Conv2d(8, 16, 3), 2, boundary_range=0.05)
    layer.anneal()
    before = layer.weight.detach().clone()
    free = layer.quantizer.movable(before.flatten(1)).view_as(before)
    layer(torch.randn(2, 8, 5, 5)).square().sum().backward()
    assert layer.weight.grad[~free].count_nonzero() == 0 and 0 < free.sum() < free.numel() / 2
    with torch.no_grad():
        layer.weight += 1
    layer.step()
    assert torch.equal(layer.weight, torch.where(free, before + 1, before))


def test_convolutions_refuse():
    conv = nn.Conv2d(3, 6, 4)
    with pytest.raises(ValueError, match="StatsQConv2d: input must have one scale and no shifts, got LSQActivation"):
        StatsQConv2d(conv, 8, "lsq", input=LSQActivation(8, features=9))
    with pytest.raises(ValueError, match="StatsQConv2d: input must have one scale"):
        StatsQConv2d(conv, 8, "lsq", input=LSQActivation(8, scales=3, axis=-2))
    weight = quantize_weight(torch.randn(6, 12), bits=8, group_size=None)
    with pytest.raises(ValueError, match=r"QuantConv2d: weight must have shape \[6, 48\], got \[6, 12\]"):
        QuantConv2d(conv, weight, None)


# ---------------------------------------------------------------------------------------------------- what is deployed


def shifted(activation):
    """With shifts that count."""
    with torch.no_grad():
        for shift in (activation.before, activation.after):
            if shift is not None:
                shift.normal_(std=0.3)
    return activation


def test_the_shift_after_becomes_part_of_the_bias():
    for bias in (True, False):
        layer = StatsQLinear(nn.Linear(6, 4, bias), 2, input=shifted(LSQActivation(4, features=6)))
        x = torch.randn(5, 6)
        y, weight = layer(x), layer.quantizer(layer.weight).detach()
        rounding, linear = layer.deploy()
        assert rounding.after is None and layer.input.after is not None
        torch.testing.assert_close(linear.bias, weight @ layer.input.after + (layer.bias if bias else 0))
        torch.testing.assert_close(linear(rounding(x)), y)
        linear.codes.zero_()  # memory of its own
        rounding.scale.data.zero_()
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_states_with_a_shift_after_load_into_the_bias(bias, assign):
    """As the states of deployed layers were before shifts were part of the biases."""
    torch.manual_seed(0)
    layers = [StatsQLinear(nn.Linear(6, 4, bias), 2, input=shifted(LSQActivation(4, features=6))) for _ in range(2)]
    x = torch.randn(5, 6)
    y, _ = (layer(x) for layer in layers)
    state = layers[0].deploy().state_dict() | {"0.after": layers[0].input.after.detach().clone()}
    del state["1.bias"]
    if bias:
        state["1.bias"] = layers[0].bias.detach().clone()
    before = {name: value.clone() for name, value in state.items()}
    final = copy.deepcopy(layers[1].deploy())
    final.load_state_dict(state, assign=assign)
    torch.testing.assert_close(final(x), y)
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.after"'):
        final.load_state_dict({name: x for name, x in state.items() if name != "1.codes"})
    final.load_state_dict(layers[1].deploy().state_dict())  # one of now
    torch.testing.assert_close(final(x), layers[1](x))


@pytest.mark.parametrize("columns", [1, 7, 30, 31, 62, 64, 65])
@pytest.mark.parametrize(
    ("bits", "kind", "options"),
    [
        (2, "statsq", {"bits": 4}),
        (1, "statsq", {"bits": 2, "scales": 3, "axis": -2}),
        (8, "lsq", {"bits": 7, "unsigned": True}),
        (3, "lsq", {"bits": 7, "scales": 3, "axis": -2}),
    ],
)
def test_integers_are_multiplied_exactly(columns, bits, kind, options):
    """The sums of integers are those in 64 bits, and only the scales are rounded."""
    torch.manual_seed(columns)
    activation = shifted(LSQActivation(features=columns, **options))
    layer = StatsQLinear(nn.Linear(columns, 5), bits, kind, input=activation)
    x = torch.randn(4, 3, columns)
    y = layer(x)
    final = layer.deploy(integer=True)
    assert type(final) is IntegerLinear and final.linear.activations == "int8"
    q, scale = activation.integers(x)
    codes = layer.quantizer.codes(layer.weight)
    doubled = 2 * codes.long() + (kind == "statsq")  # twice the level, which may be a half
    sums = (q.long()[..., None, :] * doubled).sum(-1)
    factor = layer.quantizer.row_scale(layer.weight).double() / (2**bits if kind == "statsq" else 2)
    exact = sums * factor
    found = final.linear(final.extended(q)).double()
    reach = (q.abs() @ (codes.abs().float() + 1).t()).double() * factor  # of the sum's terms
    assert ((found - exact).abs() <= 4e-6 * (reach + 127 * factor * 2**bits)).all()
    shift = layer.quantizer(layer.weight).detach().double() @ activation.after.detach().double()
    expected = exact * scale.double() + shift + layer.bias.detach().double()
    torch.testing.assert_close(final(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final(x), y, rtol=1e-4, atol=1e-4)
    assert final(x).dtype == x.dtype


def test_without_its_ends_a_row_would_be_rounded():
    """So that the test above can fail."""
    layer = StatsQLinear(nn.Linear(64, 5), 2, input=LSQActivation(4, features=64))
    x = torch.randn(3, 64)
    y = layer(x)
    final = layer.deploy(integer=True)
    final.ends.zero_()
    assert (final(x) - y).abs().max() > 1e-3


def test_integers_of_16_bit_layers_and_of_states():
    layer = StatsQLinear(nn.Linear(32, 8), 2, input=shifted(LSQActivation(4, features=32, scales=3, axis=-2)))
    layer = layer.bfloat16()
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    y, final = layer(x), layer.deploy(integer=True)
    assert final(x).dtype == torch.bfloat16
    torch.testing.assert_close(final(x), y, rtol=2e-2, atol=2e-2)
    layer = layer.float()
    x = x.float()
    final, other = layer.deploy(integer=True), StatsQLinear(nn.Linear(32, 8), 2, input=copy.deepcopy(layer.input))
    other = other.deploy(integer=True)
    other.load_state_dict(final.state_dict())
    assert torch.equal(other(x), final(x)) and not any("ends" in name for name in final.state_dict())
    torch.testing.assert_close(final(x), layer(x))


@pytest.mark.parametrize(
    "activation",
    [
        LSQActivation(8),
        LSQActivation(8, unsigned=True),
        LSQActivation(4, scales=4, axis=-1),
        LSQActivation(4, scales=4, axis=-2, parts=2),
    ],
)
def test_activations_of_other_integers_are_multiplied_as_floats(activation):
    assert not IntegerLinear.takes(activation)
    layer = StatsQLinear(nn.Linear(4, 3), 2, input=activation)
    assert type(layer.deploy(integer=True)) is nn.Sequential
    with pytest.raises(ValueError, match="IntegerLinear: activation must have integers of at most 127"):
        IntegerLinear(layer.quantizer.pack(layer.weight), None, activation)
    grouped = quantize_weight(torch.randn(3, 64), bits=4, group_size=32)
    with pytest.raises(ValueError, match="IntegerLinear: weight must have one scale per row"):
        IntegerLinear(grouped, None, LSQActivation(4))
    for dtype in (torch.float32, torch.int8):
        lut = torch.arange(16).to(dtype)[None]
        table = QTensor.from_codes(torch.randint(16, (3, 64)), torch.rand(3, 1), bits=4, lut=lut)
        with pytest.raises(
            ValueError, match="IntegerLinear: weight must have levels that are evenly spaced, without a lut"
        ):
            IntegerLinear(table, None, LSQActivation(4))


@pytest.mark.parametrize("parts", [("scale", "zero", "offset"), ("scale", "offset"), ("offset",), ("zero",), ()])
def test_integers_are_multiplied_by_every_part_of_a_weight(parts):
    torch.manual_seed(len(parts))
    found = {"scale": torch.rand(5, 1) + 0.5, "zero": torch.rand(5, 1), "offset": 3 * torch.randn(5, 1)}
    found = {"scale": None} | {name: found[name] for name in parts}
    weight = QTensor.from_codes(torch.randint(16, (5, 40)), bits=4, group_size=40, **found)
    bias, activation, x = torch.randn(5), shifted(LSQActivation(4, features=40)), torch.randn(3, 40)
    expected = F.linear(activation(x), weight.dequantize(), bias)
    torch.testing.assert_close(IntegerLinear(weight, bias, activation)(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("integer", [False, True])
def test_a_deployed_attention_is_the_attention(integer):
    torch.manual_seed(0)
    rounding = {"input": LSQActivation(4, features=12, scales=5, axis=-2), "softmax": LSQActivation(4, unsigned=True)}
    rounding |= {"qk_output": LSQActivation(4, features=24, scales=10, axis=-2, parts=2)}
    rounding |= {"v_output": LSQActivation(4, features=8, scales=8, axis=-1)}
    qk = QueryKey(torch.randn(6, 12), torch.randn(6, 12), 2, 2)
    v, proj = StatsQLinear(nn.Linear(12, 8), 2), StatsQLinear(nn.Linear(8, 12), 2, input=LSQActivation(4, features=8))
    layer = ReparameterizedAttention(qk, v, proj, 2, 0.5, **{n: shifted(a) for n, a in rounding.items()})
    shifted(proj.input)
    x = torch.randn(2, 5, 12)
    y = layer(x)
    final = layer.deploy(integer)
    kinds = (IntegerLinear,) * 3 if integer else (QuantLinear, QuantLinear, nn.Sequential)
    assert tuple(type(m) for m in (final.qk, final.v, final.proj)) == kinds
    assert final.qk_output.after is None and layer.qk_output.after is not None
    torch.testing.assert_close(final(x), y, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.qk_output.after.add_(3)  # the same for all logits of a query
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- annealing


def adamw(layer):
    return torch.optim.AdamW(layer.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)


def test_frozen_weights_stay_to_the_bit_and_the_others_move():
    layer = StatsQLinear(nn.Linear(64, 16), 2, boundary_range=0.05)
    optimizer, moved = adamw(layer), 0
    x, y = torch.randn(32, 64), torch.randn(32, 16)

    def step():
        optimizer.zero_grad()
        F.mse_loss(layer(x), y).backward()
        grad = layer.weight.grad.clone()
        optimizer.step()
        drift = layer.weight.detach().clone()
        layer.step()
        return grad, drift

    for _ in range(5):
        step()  # momentum for every weight
    layer.anneal()
    for _ in range(10):
        before = layer.weight.detach().clone()
        free = layer.quantizer.movable(before)
        grad, drift = step()
        assert 0 < free.sum() < 0.3 * free.numel()
        assert grad[~free].count_nonzero() == 0 and grad[free].count_nonzero() == free.sum()
        assert (drift != before)[~free].any(), "momentum and weight decay move what has no gradient"
        assert torch.equal(layer.weight[~free], before[~free])
        assert torch.equal(layer.weight[free], drift[free])
        moved += int((layer.weight != before).sum())
    assert moved > 100
    # the moments of a frozen weight decay as with a gradient of zero
    state = optimizer.state[layer.weight]
    free = layer.quantizer.movable(layer.weight)
    first = state["exp_avg"].clone()
    before = layer.weight.detach().clone()
    step()
    frozen = ~layer.quantizer.movable(before)
    torch.testing.assert_close(state["exp_avg"][frozen], 0.9 * first[frozen])
    layer.anneal(False)
    step()
    assert layer.weight_before is None and (layer.weight != before)[frozen].any()


def test_frozen_query_and_key_stay_to_the_bit_and_the_others_move():
    """The case that the authors' code leaves out: a column stays where its row, or column, of the product is frozen."""
    layer = QueryKey(torch.randn(8, 32), torch.randn(8, 32), heads=2, bits=2, boundary_range=0.01)
    optimizer = adamw(layer)
    x, target = torch.randn(4, 6, 32), torch.randn(4, 6, 64)

    def step():
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
        drift = [p.detach().clone() for p in (layer.query, layer.key)]
        layer.step()
        return drift

    for _ in range(5):
        step()
    layer.anneal()
    kept = moved = 0
    for _ in range(10):
        before = [p.detach().clone() for p in (layer.query, layer.key)]
        matrix = layer.matrix().detach()
        free = layer.quantizer.movable(matrix).view(2, 32, 32)
        drift = step()
        for p, old, new, columns in zip(
            (layer.query, layer.key), before, drift, (free.any(2), free.any(1)), strict=True
        ):
            stays = ~columns[:, None].expand(2, 4, 32).reshape(8, 32)
            assert (new != old)[stays].any(), "momentum and weight decay move what has no gradient"
            assert torch.equal(p[stays], old[stays])
            assert torch.equal(p[~stays], new[~stays])
            kept, moved = kept + int(stays.sum()), moved + int((p != old).sum())
        # an entry of the product whose row and column are frozen stays to the bit
        still = ~(free.any(2)[:, :, None] | free.any(1)[:, None, :]).view(64, 32)
        assert torch.equal(layer.matrix()[still], matrix[still])
    assert kept > 100 and moved > 100


def test_frozen_entries_of_the_product_pass_no_gradient_to_query_and_key():
    layer = QueryKey(torch.randn(6, 16), torch.randn(6, 16), heads=2, bits=2, boundary_range=0.05)
    layer.anneal()
    x = torch.randn(2, 3, 16)
    cotangent = torch.randn(2, 3, 32)
    free = layer.quantizer.movable(layer.matrix())
    layer(x).backward(cotangent)
    to_matrix = torch.einsum("bno,bni->oi", cotangent, x) * free  # straight through, but where frozen
    to_matrix = to_matrix.view(2, 16, 16)
    query, key = (p.detach().view(2, 3, 16) for p in (layer.query, layer.key))
    torch.testing.assert_close(layer.query.grad, (key @ to_matrix.transpose(1, 2)).flatten(0, 1))
    torch.testing.assert_close(layer.key.grad, (query @ to_matrix).flatten(0, 1))
    assert 0 < free.sum() < free.numel() / 2
    layer.eval()  # evaluation masks nothing
    layer.query.grad = None
    layer(x).backward(cotangent)
    full = torch.einsum("bno,bni->oi", cotangent, x).view(2, 16, 16)
    torch.testing.assert_close(layer.query.grad, (key @ full.transpose(1, 2)).flatten(0, 1))


def test_annealing_goes_on_from_a_state():
    layer = StatsQLinear(nn.Linear(16, 8), 2)
    layer.step()
    layer.anneal()
    other = StatsQLinear(nn.Linear(16, 8), 2)
    assert "weight_before" not in layer.state_dict()
    other.load_state_dict(layer.state_dict())
    assert other.quantizer.annealing and other.quantizer.count == 1
    assert torch.equal(other.weight_before, layer.weight)
    free = other.quantizer.movable(other.weight)
    before = other.weight.detach().clone()
    with torch.no_grad():
        other.weight += 1
    other.step()
    assert torch.equal(other.weight, torch.where(free, before + 1, before))


# -------------------------------------------------------------------------------------------------- query and key


def test_logits_without_quantisation_are_those_of_query_and_key():
    torch.manual_seed(0)
    query, key, heads = torch.randn(6, 10, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64), 3
    layer = QueryKey(query, key, heads, 2)
    layer.quantizer = nn.Identity()
    x = torch.randn(2, 7, 10, dtype=torch.float64)
    q, k = ((x @ w.t()).view(2, 7, 3, 2).transpose(1, 2) for w in (query, key))
    logits = torch.einsum("bic,bjhc->bhij", x, layer(x).view(2, 7, 3, 10))
    torch.testing.assert_close(logits, q @ k.transpose(-2, -1))


def test_gradients_of_query_and_key():
    """dW_q = W_k dA^T and dW_k = W_q dA for each head, straight through the rounding."""
    layer = QueryKey(torch.randn(6, 10), torch.randn(6, 10), 3, 2)
    to_matrix = torch.randn(30, 10)
    layer.quantizer(layer.matrix()).backward(to_matrix)
    d = to_matrix.view(3, 10, 10)
    query, key = (p.detach().view(3, 2, 10) for p in (layer.query, layer.key))
    torch.testing.assert_close(layer.query.grad.view(3, 2, 10), key @ d.transpose(1, 2))
    torch.testing.assert_close(layer.key.grad.view(3, 2, 10), query @ d)


def test_rows_of_the_product_are_quantised_by_statsq():
    layer = QueryKey(torch.randn(4, 8), torch.randn(4, 8), 2, 2)
    a = torch.cat([layer.query[h : h + 2].t() @ layer.key[h : h + 2] for h in (0, 2)]).detach()
    torch.testing.assert_close(layer.matrix(), a)
    s = 2 * a.abs().mean(1, keepdim=True)
    expected = s * (((a / s).clamp(-1, 1 - 1e-6) * 2 - 0.5).round() + 0.5) / 2
    x = torch.randn(1, 3, 8)
    torch.testing.assert_close(layer(x), x @ expected.t())
    deployed = layer.deploy()
    assert isinstance(deployed, QuantLinear) and deployed.weight.shape == (16, 8)
    torch.testing.assert_close(deployed(x), layer(x))


def test_autocast_does_not_round_the_product():
    layer = QueryKey(torch.randn(4, 8), torch.randn(4, 8), 2, 2)
    exact = layer.matrix()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.matrix(), exact)


def test_query_and_key_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one shape \[heads \* d, C\] for 2 heads, got \[4, 8\] and \[2, 8\]"):
        QueryKey(torch.randn(4, 8), torch.randn(2, 8), 2, 2)
    with pytest.raises(ValueError, match="for 3 heads"):
        QueryKey(torch.randn(4, 8), torch.randn(4, 8), 3, 2)


def test_attention_without_quantisation_is_attention():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    q, k, v, proj = (nn.Linear(8, 8, bias=bias) for bias in (False, False, True, True))
    qk = QueryKey(q.weight, k.weight, 2, 2)
    qk.quantizer = nn.Identity()
    identities = {name: nn.Identity() for name in ("input", "qk_output", "v_output", "softmax")}
    layer = ReparameterizedAttention(qk, v, proj, 2, 0.5, **identities)
    parts = [p(x).view(2, 5, 2, 4).transpose(1, 2) for p in (q, k, v)]
    expected = proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


def test_the_examples_of_the_docstrings():
    for name in ("cofire.nn.statsq", "cofire.nn.statsq_deployed"):
        results = doctest.testmod(importlib.import_module(name))
        assert results.attempted > 0 and results.failed == 0
