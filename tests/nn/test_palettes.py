# SPDX-License-Identifier: Apache-2.0
"""Packed layers whose palettes are signed bytes: what they hold, what they multiply with, how they are saved."""

from __future__ import annotations

import copy
import pickle

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from cofire import ops
from cofire.nn import (
    PackedPalette,
    PackedPalettizedConv2d,
    PackedPalettizedEmbedding,
    PackedPalettizedLinear,
    PalettizedConv2d,
    PalettizedEmbedding,
    PalettizedLinear,
    QuantLinear,
    quantize_,
)
from cofire.nn.palettes import as_qtensor, palettized_linear
from cofire.ops.lowbit import ACTIVATIONS, int8_columns
from helpers import stored_bytes

OPTIONS = {
    "one palette": {"bits": 4},
    "one bit": {"bits": 1},
    "groups": {"bits": 3, "group_rows": 7},
    "groups, the last short": {"bits": 2, "group_rows": 4},
    "uneven groups": {"bits": 2, "group_rows": 11},
    "factors": {"bits": 2, "group_rows": 7, "per_channel_scale": True},
    "vectors": {"bits": 3, "cluster_dim": 2},
}
EVEN = [name for name in OPTIONS if name not in ("uneven groups", "vectors")]
every_option = pytest.mark.parametrize("options", OPTIONS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def linear(options, **more):
    return PalettizedLinear(20, 14, **{**OPTIONS[options], **more})


def slowly(floats, packed):
    """The weight of bytes, entry by entry; and half a step of each row: what rounding may move a weight by."""
    lut, scale = floats.lut.double(), floats.scale
    d, groups = floats.cluster_dim, floats.group_rows
    labels = ops.unpack_bits(floats.labels, floats.bits, floats.columns // d).long()
    weight = torch.empty(labels.shape[0], floats.columns, dtype=torch.float64)
    steps = torch.empty(labels.shape[0], 1, dtype=torch.float64)
    for n in range(labels.shape[0]):
        entries = lut[n // groups]
        factor = float(entries.abs().max()) / 127
        own = 1.0 if scale is None else float(scale[n])
        steps[n] = factor * abs(own)
        for k in range(labels.shape[1]):
            for j in range(d):
                byte = round(float(entries[labels[n, k], j]) / factor)
                assert abs(int(packed.lut[n // groups, labels[n, k], j]) - byte) <= 1e-6 or factor == 0
                weight[n, k * d + j] = byte * factor * own
    return weight.view(floats.shape), steps


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_palette_of_bytes(options, dtype):
    layer = linear(options, dtype=dtype)
    floats, packed = layer.packed_palette(), layer.packed_palette(torch.int8)
    assert packed.lut.dtype == torch.int8 and packed.scale.dtype == dtype == packed.weight.dtype
    assert torch.equal(packed.labels, floats.labels)
    weight, steps = slowly(floats, packed)
    torch.testing.assert_close(packed.weight.double(), weight, rtol=1e-6, atol=1e-9)
    assert ((packed.weight.double() - floats.weight.double()).abs() <= steps * (0.5 + 1e-5)).all()
    assert packed.nbytes == packed.labels.numel() + packed.lut.numel() + packed.scale.nbytes
    assert torch.equal(packed.rows(torch.tensor([13, 0, 5])), packed.weight[[13, 0, 5]])


@every_option
def test_in_16_bits_it_is_rounded_once(options):
    wide = linear(options).pack(lut_dtype=torch.int8)
    weight = wide.weight
    for dtype in (torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(wide).to(dtype)
        assert narrow.lut.dtype == torch.int8 and narrow.palette.scale.dtype == torch.float32
        assert narrow.weight.dtype == narrow.bias.dtype == dtype and torch.equal(narrow.weight, weight.to(dtype))
        assert narrow(torch.randn(3, 20, dtype=dtype)).dtype == dtype
    assert torch.equal(copy.deepcopy(wide).double().weight, weight.double())


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_multiplies_with_its_weight(options, dtype):
    packed = linear(options, dtype=dtype).pack(lut_dtype=torch.int8)
    x = torch.randn(2, 3, 20, dtype=dtype, requires_grad=True)
    y = packed(x)
    expected = F.linear(x.double(), packed.weight.double(), packed.bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    y.sum().backward()
    torch.testing.assert_close(
        x.grad.double(), packed.weight.double().sum(0).expand(2, 3, -1), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("options", EVEN)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_int8_activations(options, rows):
    """Against bytes times bytes, in int64, times the two scales."""
    packed = linear(options).pack(lut_dtype=torch.int8, activations="int8")
    x = torch.randn(rows, 20)
    a = x.abs().amax(1, keepdim=True) / 127
    p = (x / a).round().long()
    q = as_qtensor(
        packed.labels, packed.lut, packed.palette.scale, columns=20, group_rows=packed.palette.group_rows, dtype=None
    )
    entries = q.lut.long()[(torch.arange(14) // packed.palette.group_rows)[:, None], q.unpack().long()]
    expected = (p @ entries.t()).double() * a.double() * packed.palette.scale.double() + packed.bias.double()
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-6, atol=1e-6)
    # The rounding of the input, at most half a step of each, is all that is lost beside the palette's.
    exact = F.linear(x, packed.weight, packed.bias)
    assert ((packed(x) - exact).abs() <= a / 2 * packed.weight.abs().sum(1) * (1 + 1e-4) + 1e-5).all()


def test_the_product_is_that_of_integers():
    """Entries that are integers times a power of two are kept as they are, and nothing else is rounded."""
    entries = torch.tensor([[-127.0, -31, 0, 64], [12, 127, 5, -1], [0, -127, 126, 3]])
    labels = torch.randint(4, (45, 70))
    labels[:, :4] = torch.arange(4)
    packed = PackedPalette.from_labels(labels, entries[:, :, None] / 32, (45, 70), group_rows=15, lut_dtype=torch.int8)
    whole = entries.long()[(torch.arange(45) // 15)[:, None], labels]
    assert torch.equal(packed.lut[:, :, 0].long(), entries.long()) and torch.equal(packed.weight * 32, whole.float())
    for rows in (1, 4, 33):
        x = torch.randint(-127, 128, (rows, 70))
        x[:, 0] = 127
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            y = palettized_linear(
                x.to(dtype), packed.labels, packed.lut, packed.scale, group_rows=15, activations="int8"
            )
            assert torch.equal(y, ((x @ whole.t()).double() / 32).to(dtype))


@every_option
@pytest.mark.parametrize("how", ["linear", "conv", "embedding"])
def test_the_state_survives(options, how):
    o = OPTIONS[options]
    names = {n: o[n] for n in ("bits", "group_rows", "cluster_dim") if n in o} | {"lut_dtype": torch.int8}
    layer, empty, x = {
        "linear": lambda: (PalettizedLinear(20, 14, **o), PackedPalettizedLinear(20, 14, **names), torch.randn(3, 20)),
        "conv": lambda: (
            PalettizedConv2d(4, 14, 3, **o), PackedPalettizedConv2d(4, 14, 3, **names), torch.randn(2, 4, 5, 5),
        ),
        "embedding": lambda: (
            PalettizedEmbedding(14, 20, 3, **o), PackedPalettizedEmbedding(14, 20, 3, **names), torch.arange(14),
        ),
    }[how]()  # fmt: skip
    packed = layer.pack(lut_dtype=torch.int8)
    assert torch.allclose(packed(x), layer.eval()(x), atol=0.15)
    stored = safetensors.torch.load(safetensors.torch.save(packed.state_dict()))
    empty.load_state_dict(stored)
    assigned = copy.deepcopy(empty).to("meta")
    assigned.load_state_dict(stored, assign=True)
    for twin in (empty, assigned, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(x), packed(x)) and repr(twin) == repr(packed)
        assert twin.lut.dtype == torch.int8 and twin.weight.dtype == torch.float32
    assert "lut_dtype=torch.int8" in repr(packed)


def empty_groups(activations, device=None):
    return PackedPalettizedLinear(
        20, 14, bits=3, group_rows=7, lut_dtype=torch.int8, activations=activations, device=device
    )


def other(activations):
    return "exact" if activations == "int8" else "int8"


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_activations_are_a_part_of_the_state(activations, assign):
    packed, x = linear("groups").pack(torch.int8, activations), torch.randn(3, 20)
    assert packed.nbytes == stored_bytes(packed) and packed.geometry.tolist() == [ACTIVATIONS.index(activations)]
    state = safetensors.torch.load(safetensors.torch.save(packed.state_dict()))
    empty = empty_groups(other(activations), "meta" if assign else None)
    assert str(empty.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    for twin in (empty, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), copy.deepcopy(empty).to("cpu")):
        assert twin.activations == activations and repr(twin) == repr(packed)
        assert torch.equal(twin(x), packed(x)) and torch.equal(twin.geometry, packed.geometry)
    packed.activations = other(activations)
    assert not torch.equal(packed(x), empty(x))
    empty.load_state_dict(packed.state_dict())
    assert torch.equal(packed(x), empty(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("own", ACTIVATIONS)
def test_states_and_pickles_of_before_activations_were_written_load(own, assign):
    """The layer keeps its own."""
    packed, x = linear("groups").pack(torch.int8, own), torch.randn(3, 20)
    old = {name: value for name, value in packed.state_dict().items() if name != "geometry"}
    empty = empty_groups(own, "meta" if assign else None)
    assert str(empty.load_state_dict(old, assign=assign)) == "<All keys matched successfully>"
    assert "geometry" not in old and empty.activations == own and torch.equal(empty.to("cpu")(x), packed(x))
    inside = {name: value for name, value in packed.__dict__.items() if name != "_activations"}
    inside["_buffers"] = {}
    loaded = PackedPalettizedLinear.__new__(PackedPalettizedLinear)
    loaded.__setstate__({**inside, "activations": own})
    assert loaded.activations == own and torch.equal(loaded(x), packed(x))
    assert torch.equal(loaded.geometry, packed.geometry)


def test_activations_that_do_not_fit_are_refused():
    rounded = linear("groups").pack(torch.int8, "int8").state_dict()
    layer = empty_groups("exact")
    with pytest.raises(RuntimeError, match=r"the geometry of the state must hold 0 .* or 1 .int8., got \[2\]"):
        layer.load_state_dict({**rounded, "geometry": torch.tensor([2])})
    assert layer.activations == "exact" and layer.geometry.tolist() == [0]
    vectors = linear("vectors").pack(torch.int8)
    with pytest.raises(RuntimeError, match="PackedPalettizedLinear: int8 activations need palettes of single weights"):
        vectors.load_state_dict({**vectors.state_dict(), "geometry": torch.tensor([1])})
    with pytest.raises(ValueError, match="PackedPalettizedLinear: int8 activations need palettes of single weights"):
        vectors.activations = "int8"
    assert vectors.activations == "exact" and vectors.geometry.tolist() == [0]
    layer.activations = "int8"
    with pytest.raises(RuntimeError, match="the palette of the state must be of torch.int8"):
        layer.load_state_dict(linear("groups").pack().state_dict())
    assert layer.activations == "int8" and layer.geometry.tolist() == [1]


def test_rows_too_wide_for_int8_activations_are_refused_before_the_first_product():
    most = int8_columns(1, torch.zeros(1, 2, dtype=torch.int8))
    options = {"bits": 1, "lut_dtype": torch.int8}
    assert PackedPalettizedLinear(most, 1, **options, activations="int8")(torch.ones(1, most)).tolist() == [[0.0]]
    layer = PackedPalettizedLinear(most + 1, 1, **options)
    sentence = f"PackedPalettizedLinear: int8 activations take groups of at most {most} columns with an int8 lut"
    with pytest.raises(ValueError, match=sentence):
        PackedPalettizedLinear(most + 1, 1, **options, activations="int8")
    with pytest.raises(ValueError, match=sentence):
        layer.activations = "int8"
    with pytest.raises(RuntimeError, match=sentence):
        layer.load_state_dict({**layer.state_dict(), "geometry": torch.tensor([1])})
    assert layer.activations == "exact"


@pytest.mark.parametrize("assign", [False, True])
def test_bytes_and_floats_are_not_loaded_into_each_other(assign):
    """Floats would be cut off, bytes read as weights."""
    layer = linear("factors")
    floats, packed = layer.pack(), layer.pack(lut_dtype=torch.int8)
    for source, target, sentence in (
        (floats, packed, "palette: the palette of the state must be of torch.int8 .lut_dtype., got torch.float32"),
        (packed, floats, "palette: the palette of the state must be of floats .lut_dtype., got torch.int8"),
    ):
        before = target.weight
        with pytest.raises(RuntimeError, match=sentence):
            target.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(target.weight, before)


def test_labels_with_a_palette_of_bytes():
    labels, lut = torch.tensor([[0, 2], [1, 1]]), torch.tensor([[[-128], [4], [127]]], dtype=torch.int8)
    packed = PackedPalette.from_labels(labels, lut, (2, 2), scale=torch.tensor([0.5, 2.0]))
    assert packed.weight.tolist() == [[-64.0, 63.5], [8.0, 8.0]]
    assert packed.lut.flatten().tolist() == [-128, 4, 127, 127]
    floats = packed.as_floats()
    assert floats.lut.dtype == torch.float32 and torch.equal(floats.weight, packed.weight)
    assert floats.as_floats() is floats
    assert PackedPalette.from_labels(labels, lut, (2, 2)).weight.tolist() == [[-128.0, 127.0], [4.0, 4.0]]
    half = PackedPalette.from_labels(labels, lut, (2, 2), dtype=torch.float16)
    assert half.weight.dtype == torch.float16 and half.scale.dtype == torch.float32


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1.0, 1e4])
def test_small_weights_of_bytes_as_floats_of_16_bits(size):
    """The factor of a byte, size / 127, is a subnormal of fp16 where the weights are none."""
    labels, lut = torch.randint(8, (6, 20)), torch.randn(2, 8, 1) * size
    packed = PackedPalette.from_labels(labels, lut, (6, 20), group_rows=3, dtype=torch.float16, lut_dtype=torch.int8)
    exact = packed.lut.flatten(1)[torch.arange(6)[:, None] // 3, labels] * packed.scale[:, None]
    floats = packed.as_floats()
    assert floats.lut.dtype == floats.scale.dtype == torch.float16
    assert torch.equal(floats.lut.float() * 128, packed.lut.float())
    # Two roundings, of the factor and of the product; each of half a unit, of subnormals 2^-24.
    torch.testing.assert_close(floats.weight.float(), exact, rtol=torch.finfo(torch.float16).eps, atol=2**-24)


def test_large_factors_of_small_integers_as_floats_of_16_bits():
    """Only as much is moved into the factors as the entries need: these would overflow."""
    lut = torch.tensor([[[-1], [1]]], dtype=torch.int8)
    packed = PackedPalette.from_labels(
        torch.tensor([[0, 1]]), lut, (1, 2), scale=torch.tensor([10000.0]), dtype=torch.float16
    )
    assert packed.as_floats().weight.tolist() == packed.weight.tolist() == [[-10000.0, 10000.0]]


def test_a_palette_of_zeros():
    packed = PackedPalette.from_labels(torch.zeros(2, 2).int(), torch.zeros(1, 2, 1), (2, 2), lut_dtype=torch.int8)
    assert packed.weight.tolist() == packed.as_floats().weight.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_nothing_to_multiply():
    packed = linear("one palette").pack(lut_dtype=torch.int8, activations="int8")
    assert packed(torch.zeros(0, 20)).shape == (0, 14)


def test_a_model_of_palettes_of_bytes():
    """The one call, with both kinds of activations; the state goes from layer to layer."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    x = torch.randn(40, 64)
    dense = model(x)
    options = {"bits": 6, "group_size": None, "lut_dtype": torch.int8}
    quantized = quantize_(copy.deepcopy(model), "palette", activations="int8", **options)
    assert all(m.lut.dtype == torch.int8 for m in quantized if isinstance(m, QuantLinear))
    assert (quantized(x) - dense).norm() < 0.05 * dense.norm()
    other = quantize_(copy.deepcopy(model), bits=4, group_size=32, activations="int8")
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(quantized.state_dict())))
    assert torch.equal(other(x), quantized(x))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: linear("one palette").pack(activations="int8"),
            ValueError,
            r"^PackedPalettizedLinear: int8 activations need a palette of bytes \(lut_dtype=torch.int8\), got one of torch.float",
        ),
        (
            lambda: linear("vectors").pack(torch.int8, "int8"),
            ValueError,
            r"^PackedPalettizedLinear: int8 activations need palettes of single weights, .*, got .*cluster_dim=2",
        ),
        (
            lambda: PackedPalettizedLinear(20, 14, group_rows=11, lut_dtype=torch.int8, activations="int8"),
            ValueError,
            r"which share out the rows as evenly as possible, got .*group_rows=11",
        ),
        (
            lambda: PackedPalettizedLinear(20, 14, lut_dtype=torch.int8, activations="int4"),
            ValueError,
            "^PackedPalettizedLinear: activations must be one of exact, int8, got 'int4'$",
        ),
        (
            lambda: palettized_linear(
                torch.ones(2, 4), torch.zeros(4, 1, dtype=torch.uint8), torch.zeros(1, 4, 2, dtype=torch.int8),
                group_rows=4, activations="int8",
            ),
            ValueError,
            "^palettized_linear: int8 activations need palettes of single weights, which share",
        ),
        (
            lambda: palettized_linear(
                torch.ones(2, 4), torch.zeros(4, 1, dtype=torch.uint8), torch.zeros(1, 4, 1), group_rows=4, activations="int8"
            ),
            ValueError,
            "^qlinear: int8 activations need uniform codes or an int8 lut, got a lut of torch.float32$",
        ),
        (
            lambda: PackedPalette.from_labels(
                torch.zeros(2, 2).int(), torch.tensor([[[1.0], [torch.nan]]]), (2, 2), lut_dtype=torch.int8
            ),
            ValueError,
            "^PackedPalette: lut must be finite to be rounded to int8, got 1 values that are not, of 2$",
        ),
        (
            lambda: PackedPalette((2, 2), lut_dtype=torch.int16),
            TypeError,
            "^PackedPalette: lut_dtype must be int8 or a float of 16 to 64 bits, got torch.int16$",
        ),
    ],
)  # fmt: skip
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()
