# SPDX-License-Identifier: Apache-2.0
"""To and from coremltools' form: names and shapes of the buffers, the round trip, what cannot be said in it."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from torch import nn

from cofire.methods import EDKM
from cofire.nn import PackedPalettizedLinear, PalettizedConv2d, PalettizedEmbedding, PalettizedLinear
from cofire.nn.coreml import export_coreml, import_coreml, read_coreml

LAYERS = {
    "linear": (lambda: PalettizedLinear(20, 12, bits=3), torch.randn(3, 20)),
    "groups": (lambda: PalettizedLinear(20, 12, bits=2, group_rows=4), torch.randn(3, 20)),
    "vectors": (lambda: PalettizedLinear(20, 12, bits=3, cluster_dim=2), torch.randn(3, 20)),
    "scaled": (lambda: PalettizedLinear(20, 12, bits=3, per_channel_scale=True, bias=False), torch.randn(3, 20)),
    "conv": (lambda: PalettizedConv2d(3, 8, 3, padding=1, bits=2, group_rows=2), torch.randn(1, 3, 5, 5)),
    "scaled conv": (
        lambda: PalettizedConv2d(4, 8, 3, bits=2, groups=2, per_channel_scale=True),
        torch.randn(1, 4, 5, 5),
    ),
    "conv of vectors": (lambda: PalettizedConv2d(4, 8, 1, bits=2, cluster_dim=4), torch.randn(1, 4, 5, 5)),
    "embedding": (lambda: PalettizedEmbedding(20, 8, bits=4), torch.tensor([3, 19])),
}
SHAPES = {
    "linear": [1, 1, 8, 1],
    "groups": [3, 1, 4, 1],
    "vectors": [1, 1, 8, 2],
    "scaled": [1, 1, 8, 1],
    "conv": [4, 1, 1, 1, 4, 1],
    "scaled conv": [1, 1, 1, 1, 4, 1],
    "conv of vectors": [1, 1, 1, 1, 4, 4],
    "embedding": [1, 1, 16, 1],
}


@pytest.mark.parametrize("kind", LAYERS)
def test_round_trip(kind):
    make, x = LAYERS[kind]
    packed = make().pack()
    plain = export_coreml(nn.Sequential(packed))
    assert type(plain[0]) in (nn.Linear, nn.Conv2d, nn.Embedding)
    assert torch.equal(plain[0].weight, packed.weight)
    torch.testing.assert_close(plain(x), packed(x))  # a linear layer's sums are in another order
    state = plain.state_dict()
    assert list(state["0._COREML_/weight/lut"].shape) == SHAPES[kind]
    assert state["0._COREML_/weight/compression_type"].tolist() == [2] and state["_COREML_/metadata_version"] == 1
    assert ("0._COREML_/weight/palettization_scale" in state) == ("scaled" in kind)
    if "scaled" in kind:
        assert state["0._COREML_/weight/palettization_scale"].shape == (
            len(packed.weight),
            *[1] * (packed.weight.dim() - 1),
        )
    assert state.get("0._COREML_/weight/vector_axis") == (1 if "vectors" in kind else None)
    again = import_coreml(plain)
    assert type(again[0]) is type(packed)
    assert torch.equal(again(x), packed(x)) and not any("_COREML_" in name for name in again.state_dict())
    assert torch.equal(again[0].labels, packed.labels) and torch.equal(again[0].lut, packed.lut)


def test_models():
    network = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12)))
    method = EDKM(bits=2, weight_threshold=1)
    final = method.finalize(method.prepare(network))
    before = {name: value.clone() for name, value in final.state_dict().items()}
    plain = export_coreml(final)
    assert all(torch.equal(before[name], value) for name, value in final.state_dict().items())
    assert sorted(read_coreml(plain.state_dict())) == ["0.weight", "2.0.weight"]
    x = torch.randn(2, 20)
    torch.testing.assert_close(plain(x), final(x))
    assert torch.equal(import_coreml(plain)(x), final(x))
    assert (
        type(export_coreml(final[0])) is nn.Linear
        and type(import_coreml(export_coreml(final[0]))) is PackedPalettizedLinear
    )


def foreign(**changes):
    """A state as coremltools writes it, with a palette of five, and without the last dimension."""
    lut = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    labels = torch.randint(5, (6, 4))
    weight = torch.cat((lut[0][labels[:3]], lut[1][labels[3:]]))
    return {
        "fc.weight": weight,
        "fc._COREML_/weight/lut": lut.view(2, 1, 5),
        "fc._COREML_/weight/compression_type": torch.tensor([2]),
        "_COREML_/metadata_version": torch.tensor(1),
        **changes,
    }


def test_shared_weights_stay_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(32, 16)
            self.head = nn.Linear(16, 32)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    packed = EDKM(weight_threshold=1, embedding_bits=3).finalize(
        EDKM(weight_threshold=1, embedding_bits=3).prepare(Tied())
    )
    assert packed.head.palette is packed.embedding.palette
    plain = export_coreml(packed)
    assert plain.head.weight is plain.embedding.weight
    again = import_coreml(plain)
    assert again.head.palette is again.embedding.palette
    x = torch.randint(32, (2, 5))
    torch.testing.assert_close(plain(x), packed(x))
    assert torch.equal(again(x), packed(x))


def test_palettes_of_other_sizes():
    state = foreign()
    packed = read_coreml(state)["fc.weight"]
    assert packed.bits == 3 and packed.group_rows == 3
    assert torch.equal(packed.weight, state["fc.weight"])
    single = read_coreml({"w": torch.ones(2, 2), "_COREML_/w/lut": torch.ones(1, 1, 1, 1)})["w"]
    assert single.bits == 1 and torch.equal(single.weight, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: export_coreml(nn.Linear(2, 2)), "export_coreml: the model has no packed layer"),
        (
            lambda: export_coreml(nn.Sequential(PalettizedLinear(20, 14, bits=2, group_rows=4).pack())),
            "layer '0': groups must have equally many rows, got 14 rows in groups of 4",
        ),
        (
            lambda: export_coreml(PalettizedConv2d(4, 8, 3, bits=2, cluster_dim=2).pack()),
            r"vectors must lie along the input channels, which needs a kernel of 1x1, got a weight of \[8, 4, 3, 3\]",
        ),
        (
            lambda: export_coreml(nn.Sequential(PalettizedEmbedding(20, 8, 3, bits=2).pack())),
            r"layer '0': padding_idx must be None \(its row is not of the palette\), got 3",
        ),
        (lambda: import_coreml(nn.Linear(2, 2)), "import_coreml: the model has no palettized linear layer"),
        (
            lambda: read_coreml(foreign(**{"fc._COREML_/weight/lut": torch.ones(2, 5)})),
            r"fc\.weight: lut must have 4 dimensions, got \[2, 5\]",
        ),
        (
            lambda: read_coreml(foreign(**{"fc._COREML_/weight/lut": torch.ones(1, 2, 5, 1)})),
            r"palettes must belong to groups of rows, got lut \[1, 2, 5, 1\] of a weight \[6, 4\]",
        ),
        (
            lambda: read_coreml(foreign(**{"fc._COREML_/weight/lut": torch.ones(1, 1, 5, 2)})),
            "vectors must lie along dimension 1, .* got vector_axis None",
        ),
        (
            lambda: read_coreml(foreign(**{"fc._COREML_/weight/lut": torch.ones(1, 1, 5, 1)})),
            "fc.weight: the weight must be made of its palette, but differs from it by",
        ),
        (
            lambda: read_coreml({"fc._COREML_/weight/lut": torch.ones(1, 1, 5, 1)}),
            "is the palette of a parameter 'fc.weight', which the state does not have",
        ),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_the_converter_finds_the_palette():
    coremltools = pytest.importorskip(
        "coremltools", reason="the converter itself is not among the project's dependencies"
    )
    packed = PalettizedLinear(64, 32, bits=2).pack()
    plain = export_coreml(nn.Sequential(packed))
    model = coremltools.convert(
        torch.jit.trace(plain, torch.randn(1, 64)),
        inputs=[coremltools.TensorType(shape=(1, 64))],
        minimum_deployment_target=coremltools.target.iOS18,
        skip_model_load=True,
    )
    found = [op for op in model._mil_program.functions["main"].operations if op.op_type == "constexpr_lut_to_dense"]
    assert len(found) == 1 and found[0].lut.val.shape == (1, 1, 4, 1)


def test_the_examples_of_the_docstrings():
    results = doctest.testmod(importlib.import_module("cofire.nn.coreml"))
    assert results.attempted > 0 and results.failed == 0
