# SPDX-License-Identifier: Apache-2.0
"""Palettes: coremltools' own layers, packed layers, there and back, refusals."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cofire.formats import from_coreml, from_palette, to_coreml, to_palette
from cofire.nn import PalettizedConv2d, PalettizedLinear, QuantLinear
from cofire.nn.coreml import export_coreml, import_coreml
from cofire.ops import NF4, QTensor, quantize_weight
from helpers import check_examples

GOLDEN = load_file(Path(__file__).with_name("golden") / "coremltools.safetensors")
NAMES = sorted({key.split("/")[0] for key in GOLDEN})


def golden(name):
    return {k.removeprefix(f"{name}/"): v for k, v in GOLDEN.items() if k.startswith(f"{name}/")}


def look_up(state):
    """The weight that palette and scale describe, from labels that this function finds by itself."""
    weight, lut = state["0.weight"], state["0._COREML_/weight/lut"]
    scale = state.get("0._COREML_/weight/palettization_scale", torch.ones(len(weight), 1))
    rows = len(weight) // lut.shape[0]
    labels = torch.empty(weight.shape, dtype=torch.uint8)
    out = torch.empty_like(weight)
    for n in range(weight.shape[0]):
        entries = lut[n // rows].flatten()
        for k in range(weight.shape[1]):
            label = int((entries * scale[n] - weight[n, k]).abs().argmin())
            labels[n, k], out[n, k] = label, entries[label] * scale[n, 0]
    return labels, out


@pytest.mark.parametrize("name", NAMES)
def test_coremltools_own_layers_are_read_and_come_back(name):
    state = golden(name)
    q = from_coreml(state, "0.weight")
    labels, weight = look_up(state)
    assert torch.equal(q.unpack(), labels) and torch.equal(q.dequantize(), weight)
    assert torch.equal(weight, state["0.weight"])
    again = to_coreml(q)
    for key in ("lut", "palettization_scale", "compression_type"):
        theirs = state.get(f"0._COREML_/weight/{key}")
        ours = again.get(f"_COREML_/weight/{key}")
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert torch.equal(ours.flatten(), theirs.flatten()), key
            assert key == "compression_type" or list(ours.shape) == list(theirs.shape)
    assert torch.equal(again["weight"], state["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 2, "group_rows": 4}, {"bits": 4, "per_channel_scale": True}])
def test_packed_layers(dtype, options):
    packed = PalettizedLinear(20, 12, dtype=dtype, **options).pack()
    q = from_palette(packed.palette)
    assert torch.equal(q.dequantize(), packed.weight)
    again = to_palette(q)
    for name in ("labels", "lut", "scale"):
        a, b = getattr(again, name), getattr(packed.palette, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
    assert torch.equal(again.weight, packed.weight)
    x = torch.randn(3, 20, dtype=dtype)
    torch.testing.assert_close(QuantLinear.from_qtensor(q, packed.bias)(x), packed(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_rows", [None, 4, 6])
def test_what_our_quantiser_makes_goes_out(bits, group_rows):
    q = quantize_weight(torch.randn(12, 33), "palette", bits=bits, group_size=None, group_rows=group_rows)
    assert torch.equal(to_palette(q).weight, q.dequantize())
    state = {f"fc.{k}": v for k, v in to_coreml(q).items()}
    again = from_coreml(state, "fc.weight")
    assert torch.equal(again.dequantize(), q.dequantize()) and torch.equal(again.lut, q.lut)
    for name, t in to_coreml(again).items():
        assert torch.equal(t, state[f"fc.{name}"])


def test_a_last_group_of_fewer_rows():
    q = quantize_weight(torch.randn(11, 16), "palette", bits=2, group_size=None, group_rows=4)
    assert torch.equal(from_palette(to_palette(q)).dequantize(), q.dequantize())
    with pytest.raises(ValueError, match="to_coreml: the weight: groups must have equally many rows, got 11 rows"):
        to_coreml(q)


def test_tables_of_bytes():
    codes, lut = torch.randint(4, (4, 8)), torch.tensor([[-127, -3, 5, 99]], dtype=torch.int8)
    for scale in (torch.rand(4, 1), None):
        q = QTensor.from_codes(codes, scale, bits=2, lut=lut)
        palette = to_palette(q)
        assert palette.lut.dtype == torch.int8 and torch.equal(palette.weight, q.dequantize())
        again = from_palette(palette)
        assert torch.equal(again.lut, lut) and torch.equal(again.codes, q.codes)
        assert torch.equal(again.dequantize(), q.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"bits": 8}, {"bits": 2, "group_rows": 4}, {"bits": 4, "per_channel_scale": True}]
)
def test_tables_are_rounded_to_bytes(dtype, options):
    """Labels stay, the largest magnitude of each table becomes 127, and no weight moves by more than half a step."""
    packed = PalettizedLinear(40, 12, dtype=dtype, **options).pack()
    floats, q = from_palette(packed.palette), from_palette(packed.palette, lut_dtype=torch.int8)
    assert torch.equal(q.codes, floats.codes) and q.dtype == dtype and q.scale.dtype == torch.float32
    assert q.lut.dtype == torch.int8 and (q.lut.int().abs().amax(1) == 127).all()
    scale = torch.ones(12, 1) if floats.scale is None else floats.scale
    size = packed.palette.group_rows
    entry = floats.lut.float().abs().amax(1).repeat_interleave(size)[:12, None] / 127
    torch.testing.assert_close(q.scale, entry * scale.float())
    exact, rounded = (x.replace(dtype=torch.float32).dequantize() for x in (floats, q))
    assert ((exact - rounded).abs() <= 0.5001 * q.scale.abs()).all()
    # What is of bytes already stays as it is.
    layer = PalettizedLinear(40, 12, dtype=dtype, **options).pack(lut_dtype=torch.int8)
    one, two = from_palette(layer.palette), from_palette(layer.palette, lut_dtype=torch.int8)
    assert torch.equal(one.lut, two.lut) and torch.equal(one.scale, two.scale)
    assert torch.equal(one.dequantize(), layer.weight)
    x = torch.randn(3, 40, dtype=dtype)
    y = QuantLinear.from_qtensor(two, layer.bias, activations="int8")(x)
    torch.testing.assert_close(y, layer(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group_rows"), [(2, None), (8, 6), (6, 4)])
def test_tables_of_bytes_go_out_as_floats(dtype, bits, group_rows):
    """And come back label for label, also where neighbouring bytes are as near as 16 bits can tell."""
    weight = torch.randn(12, 64).to(dtype)
    q = quantize_weight(weight, "palette", bits=bits, group_size=None, group_rows=group_rows, lut_dtype=torch.int8)
    state = to_coreml(q)
    assert all(t.dtype == dtype for name, t in state.items() if not name.endswith("type"))
    again = from_coreml(state)
    assert torch.equal(again.dequantize(), state["weight"])
    assert torch.equal(again.lut, q.lut.to(dtype) / 128)
    entries = q.lut.int()[(torch.arange(12) // (group_rows or 12))[:, None], q.unpack().int()]
    found = (again.lut * 128).int()[(torch.arange(12) // (group_rows or 12))[:, None], again.unpack().int()]
    assert torch.equal(entries, found)
    tolerance = 0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(again.dequantize(), q.dequantize(), rtol=tolerance, atol=0)
    bytes_again = from_coreml(state, lut_dtype=torch.int8)
    assert bytes_again.lut.dtype == torch.int8
    torch.testing.assert_close(bytes_again.dequantize(), q.dequantize(), rtol=max(tolerance, 1e-6), atol=0)


def test_layers_of_bytes_go_out_as_floats():
    packed = PalettizedLinear(20, 12, bits=3, group_rows=4, dtype=torch.bfloat16).pack(lut_dtype=torch.int8)
    plain = export_coreml(torch.nn.Sequential(packed))
    assert plain[0].get_buffer("_COREML_/weight/lut").dtype == torch.bfloat16
    torch.testing.assert_close(plain[0].weight, packed.weight, rtol=2e-2, atol=0)
    again = import_coreml(plain)
    assert torch.equal(again[0].weight, plain[0].weight)


def test_live():
    tools = pytest.importorskip("coremltools.optimize.torch.palettization")
    config = tools.PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 3, "granularity": "per_tensor"}})
    model = torch.nn.Sequential(torch.nn.Linear(24, 12))
    state = tools.PostTrainingPalettizer(model, config).compress(num_kmeans_workers=1).state_dict()
    q = from_coreml(state, "0.weight")
    assert torch.equal(q.dequantize(), state["0.weight"])
    assert torch.equal(to_coreml(q)["_COREML_/weight/lut"], state["0._COREML_/weight/lut"])


def own(bits=2, rows=4, columns=8, **parts):
    parts = {"scale": None, "lut": torch.randn(1, 4), **parts}
    return QTensor.from_codes(torch.randint(1 << bits, (rows, columns)), bits=bits, **parts)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: from_palette(torch.zeros(2)), TypeError, "palette must be a PackedPalette, got Tensor"),
        (
            lambda: from_palette(PalettizedLinear(8, 8, bits=2).pack().palette, lut_dtype=torch.float16),
            TypeError,
            "^from_palette: lut_dtype must be torch.int8, or None, got torch.float16$",
        ),
        (
            lambda: from_palette(PalettizedLinear(8, 8, bits=2, cluster_dim=2).pack().palette),
            ValueError,
            "vectors of 2",
        ),
        (
            lambda: from_palette(PalettizedConv2d(4, 8, 3, bits=2).pack().palette),
            ValueError,
            "the weight must be a matrix",
        ),
        (
            lambda: from_palette(PalettizedLinear(8, 5, bits=2, group_rows=4).pack().palette),
            ValueError,
            "divide its 5 rows equally among its 2 palettes, got groups of 4 rows",
        ),
        (lambda: from_coreml({"weight": torch.zeros(2, 2)}), ValueError, "the state must have a palettized 'weight'"),
        (lambda: to_palette(own(lut=None)), ValueError, "holds tables of values, and this weight has none"),
        (lambda: to_palette(own(zero=torch.zeros(1, 1))), ValueError, "no place for zero points"),
        (
            lambda: to_palette(own(scale=torch.ones(4, 2))),
            ValueError,
            "one scale per row, and this weight has groups of 4",
        ),
        (lambda: to_palette(own(lut=torch.randn(3, 4))), ValueError, "each palette must have rows, got 3 for 4 rows"),
        (
            lambda: to_palette(own(bits=4, columns=128, scale=torch.ones(4, 2), lut=torch.tensor([NF4]))),
            ValueError,
            "groups of 64 columns",
        ),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_the_examples_of_the_docstrings():
    check_examples(importlib.import_module("cofire.formats.coreml"))
