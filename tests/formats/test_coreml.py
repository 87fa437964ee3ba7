# SPDX-License-Identifier: Apache-2.0
"""Palettes: coremltools' own layers, packed layers, there and back, refusals."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cofire.formats import from_coreml, from_palette, to_coreml, to_palette
from cofire.nn import PalettizedConv2d, PalettizedLinear, QuantLinear
from cofire.ops import NF4, QTensor, quantize_weight

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


@pytest.mark.parametrize(("bits", "group_rows"), [(1, None), (3, 4), (8, 6)])
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


def test_tables_of_integers_become_floats():
    codes, lut = torch.randint(4, (4, 8)), torch.tensor([[-127, -3, 5, 99]], dtype=torch.int8)
    q = QTensor.from_codes(codes, torch.rand(4, 1), bits=2, lut=lut)
    assert torch.equal(to_palette(q).weight, q.dequantize())


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
    results = doctest.testmod(importlib.import_module("cofire.formats.coreml"))
    assert results.attempted > 0 and results.failed == 0
