# SPDX-License-Identifier: Apache-2.0
"""Quantised linear layers, and whole models of them, Hugging Face's among them."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cofire
from cofire import native
from cofire.nn import LoRALinear, QLoRALinear, QuantLinear, SparseLinear, hessians, quantize_
from cofire.nn.lowbit import is_transposed
from cofire.ops import NestedScale, QTensor, quantize_weight
from cofire.ops.lowbit import ACTIVATIONS, int8_columns
from helpers import stored_bytes

IN, OUT = 48, 20
#: How a layer is quantised.
KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {"method": "absmax", "bits": 4, "group_size": 16},
    "3 bits, whole rows": {"method": "minmax", "bits": 3, "group_size": None},
    "1 bit": {"method": "absmax", "bits": 1, "group_size": 48},
    "hqq": {"method": "hqq", "bits": 2, "group_size": 24},
    "8 bits": {"method": "absmax", "bits": 8, "group_size": 16},
    "nf4": {"method": "nf4", "group_size": 16},
    "palettes": {"method": "palette", "bits": 3, "group_size": None, "group_rows": 7},
    "reordered": {"method": "gptq", "bits": 4, "group_size": 16, "act_order": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def gram(columns: int = IN, scale: float = 1.0) -> Tensor:
    x = torch.randn(200, columns, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, scale, columns)
    return x.t() @ x


def make(kind: str, *, bias: bool = True, dtype: torch.dtype | None = None, activations: str = "exact") -> QuantLinear:
    options = dict(KINDS[kind])
    if options["method"] == "gptq":
        options["hessian"] = gram()
    return QuantLinear.from_linear(nn.Linear(IN, OUT, bias, dtype=dtype), activations=activations, **options)


def nested(layer: QuantLinear) -> QuantLinear:
    """The same with scales of 8 bits, as double quantisation leaves them."""
    q = layer.qweight
    assert isinstance(q.scale, Tensor)
    block, scale = 4, q.scale.flatten()
    mean = scale.mean()
    absmax = (scale - mean).view(-1, block).abs().amax(1)
    table = torch.linspace(-1, 1, 256)
    codes = ((scale - mean) / absmax.repeat_interleave(block) * 127.5 + 127.5).round().to(torch.uint8)
    scales = NestedScale(codes.view(q.scale.shape), table, absmax, mean, block)
    return QuantLinear.from_qtensor(q.replace(scale=scales), layer.bias)


def same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first)


# -------------------------------------------------------------------------------------------------------- forward


@every_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (2, 3, IN), (40, IN), (0, IN)])
def test_it_is_a_linear_layer_of_the_decoded_weight(kind: str, bias: bool, shape: tuple[int, ...]) -> None:
    dense = nn.Linear(IN, OUT, bias)
    options = dict(KINDS[kind])
    if options["method"] == "gptq":
        options["hessian"] = gram()
    layer = QuantLinear.from_linear(dense, **options)
    expected = quantize_weight(dense.weight, **options).dequantize()
    assert torch.equal(layer.weight, expected) and layer.weight.shape == dense.weight.shape
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), F.linear(x, expected, dense.bias), rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("kind", ["4 bits", "3 bits, whole rows", "8 bits", "reordered"])
def test_eight_bit_activations_are_near(kind: str) -> None:
    layer = make(kind)
    x = torch.randn(9, IN)
    exact = layer(x)
    layer.activations = "int8"
    assert not torch.equal(layer(x), exact)
    assert (layer(x) - exact).abs().mean() < 0.02 * exact.abs().mean()
    assert "activations=int8" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_kind
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    layer = make(kind, dtype=dtype)
    x = torch.randn(5, IN, dtype=dtype)
    assert layer(x).dtype == layer.weight.dtype == dtype
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=0.02, atol=0.02)


def test_gradients_reach_the_input_alone() -> None:
    layer = make("nf4")
    x = torch.randn(5, IN, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    assert not any(t.shape == x.shape for t in saved), "the backward needs the weight alone"
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in layer.parameters())


# ---------------------------------------------------------------------------------------------------------- state


def test_constructed_like_a_linear_layer() -> None:
    for bias in (True, False):
        layer, plain = QuantLinear(64, 8, bias, "cpu", torch.bfloat16, group_size=32), nn.Linear(64, 8, bias)
        assert (layer.in_features, layer.out_features) == (plain.in_features, plain.out_features)
        assert (layer.bias is None) == (plain.bias is None)
        assert layer.weight.dtype == torch.bfloat16 and (layer(torch.ones(2, 64)) == 0).all()
    assert QuantLinear(96, 8, group_size=None, bits=3).group_size == QuantLinear(96, 8, group_size=-1).group_size == 96
    assert QuantLinear(64, 0, group_size=32)(torch.ones(3, 64)).shape == (3, 0)


@every_kind
def test_state_survives(kind: str, tmp_path: Path) -> None:
    """On disk, and into a layer that was made for another format."""
    layer, x = make(kind), torch.randn(3, IN)
    file = tmp_path / "state.safetensors"
    safetensors.torch.save_file(layer.state_dict(), file)
    fresh = QuantLinear(IN, OUT, bits=8, group_size=12)
    assert str(fresh.load_state_dict(safetensors.torch.load_file(file))) == "<All keys matched successfully>"
    torch.save(layer, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    for twin in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), whole):
        same_state(twin, layer)
        assert torch.equal(twin(x), layer(x)) and repr(twin) == repr(layer)
        assert not twin.bias.requires_grad


@pytest.mark.parametrize("name", ["gptq_v2", "bitsandbytes-nf4-64", "ein Maß", ""])
def test_the_format_survives(name: str) -> None:
    """Where the weight came from, for the way back; also what a layer had before, and in any layer that it is loaded into."""
    layer = QuantLinear.from_qtensor(make("4 bits").qweight.replace(format=name))
    state = safetensors.torch.load(safetensors.torch.save(layer.state_dict()))
    for assign in (False, True):
        fresh = QuantLinear.from_qtensor(make("1 bit").qweight.replace(format="another"))
        fresh.load_state_dict(state, assign=assign)
        assert fresh.format == fresh.qweight.format == name
        assert torch.equal(fresh.geometry, layer.geometry)
        again = QuantLinear(IN, OUT, bias=False, group_size=16)
        again.load_state_dict(fresh.state_dict())
        assert again.format == name


def test_states_of_before_formats_were_written_load() -> None:
    """Five numbers. A layer of the same bits and groups keeps its format; another one has none."""
    layer = QuantLinear.from_qtensor(make("nf4").qweight.replace(format="bitsandbytes-nf4-16"))
    old = {**layer.state_dict(), "geometry": layer.geometry[:5].clone()}
    for assign in (False, True):
        same, other = (
            copy.deepcopy(layer),
            QuantLinear.from_qtensor(make("3 bits, whole rows").qweight.replace(format="x")),
        )
        for twin, format in ((same, layer.format), (other, "")):
            assert str(twin.load_state_dict(old, assign=assign)) == "<All keys matched successfully>"
            assert twin.format == format and torch.equal(twin.weight, layer.weight)
            assert twin.geometry.tolist() == [*old["geometry"].tolist(), 2, 0, *format.encode()]
            twin.load_state_dict(twin.state_dict())
    assert old["geometry"].shape == (5,)


def version_1(layer: QuantLinear) -> dict[str, Tensor]:
    """A state as it was written before activations were a part of it."""
    numbers = layer.geometry.tolist()
    assert numbers[5:7] == [2, ACTIVATIONS.index(layer.activations)]
    return {**layer.state_dict(), "geometry": torch.tensor([*numbers[:5], 1, *numbers[7:]])}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("own", ACTIVATIONS)
def test_states_of_before_activations_were_written_load(own: str, assign: bool) -> None:
    """The layer keeps its own, and its format is read; what is written then is the new version."""
    layer = QuantLinear.from_qtensor(make("4 bits").qweight.replace(format="some"), torch.randn(OUT))
    twin = make("3 bits, whole rows", activations=own)
    old = version_1(layer)
    assert str(twin.load_state_dict(old, assign=assign)) == "<All keys matched successfully>"
    assert twin.activations == own and twin.format == "some" and torch.equal(twin.weight, layer.weight)
    assert twin.geometry.tolist() == [OUT, IN, 4, 16, 0, 2, ACTIVATIONS.index(own), *b"some"]
    assert old["geometry"].tolist()[5] == 1


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("stored", "own"), [("int8", "exact"), ("exact", "int8")])
def test_activations_are_a_part_of_the_state(stored: str, own: str, assign: bool) -> None:
    """A layer of another kind computes with it what the layer that was saved does."""
    layer, x = make("4 bits", activations=stored), torch.randn(3, IN)
    other = make("8 bits", activations=own)
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(layer.state_dict())), assign=assign)
    assert other.activations == stored and torch.equal(other(x), layer(x)) and repr(other) == repr(layer)
    model = nn.Sequential(make("8 bits", activations=own))
    model.load_state_dict({f"0.{n}": v for n, v in layer.state_dict().items()}, assign=assign)
    assert torch.equal(model(x), layer(x))


def test_activations_may_be_set() -> None:
    layer, x = make("4 bits"), torch.randn(3, IN)
    exact = layer(x)
    layer.activations = "int8"
    other = make("4 bits")
    other.load_state_dict(layer.state_dict())
    assert other.activations == "int8" and torch.equal(other(x), layer(x)) and not torch.equal(layer(x), exact)
    with pytest.raises(ValueError, match="QuantLinear: activations must be one of exact, int8, got 'int4'"):
        layer.activations = "int4"
    with pytest.raises(ValueError, match="QuantLinear: int8 activations need uniform codes or an int8 lut"):
        make("nf4").activations = "int8"
    assert layer.activations == "int8"


def test_a_layer_pickled_before_activations_were_written() -> None:
    layer, x = make("4 bits", activations="int8"), torch.randn(3, IN)
    inside = {n: v for n, v in copy.deepcopy(layer).__dict__.items() if n != "_activations"}
    inside["_buffers"] = {**inside["_buffers"], "geometry": version_1(layer)["geometry"]}
    old = QuantLinear.__new__(QuantLinear)
    old.__setstate__({**inside, "activations": "int8"})
    assert torch.equal(old(x), layer(x)) and torch.equal(old.geometry, layer.geometry)


def test_nested_scales_survive() -> None:
    layer, x = nested(make("nf4")), torch.randn(3, IN)
    assert {"scale_codes", "scale_table", "scale_absmax", "scale_mean"} <= set(layer.state_dict())
    fresh = QuantLinear(IN, OUT, group_size=16)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x)) and fresh.scale is None
    assert torch.equal(copy.deepcopy(layer).bfloat16().weight, layer.weight.bfloat16())


def test_a_model_loads_the_state_of_another(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(IN, 32), nn.ReLU(), nn.Linear(32, 5))

    source = quantize_(network(), "minmax", bits=3, group_size=16)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    other = quantize_(network(), "nf4", group_size=16)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    x = torch.randn(3, IN)
    assert torch.equal(other(x), source(x))


def test_the_empty_layer_may_be_on_meta() -> None:
    layer = make("hqq")
    for assign in (True, False):
        empty = QuantLinear(IN, OUT, device="meta", group_size=16)
        assert empty.codes.is_meta and empty(torch.ones(2, IN, device="meta")).shape == (2, OUT)
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(layer.state_dict(), assign=assign)
        x = torch.randn(2, IN)
        assert torch.equal(empty(x), layer(x))
        assert torch.equal(empty.to("cpu").bfloat16().weight, layer.weight.bfloat16())


def nested_state(**changes: Tensor) -> dict[str, Any]:
    """What replaces the scales of "4 bits" by nested ones of 4 to a block, and the geometry that goes with them."""
    parts = {
        "codes": torch.full((OUT, 3), 9, dtype=torch.uint8),
        "table": torch.ones(10),
        "absmax": torch.ones(15),
        "mean": torch.tensor(0.0),
        **changes,
    }
    geometry = torch.tensor([OUT, IN, 4, 16, 4, 2, 0])
    return {"scale": None, "geometry": geometry, **{f"scale_{name}": part for name, part in parts.items()}}


def with_numbers(state: dict[str, Any], *numbers: int) -> dict[str, Any]:
    """A state with other first numbers in its geometry."""
    return {**state, "geometry": torch.tensor([*numbers, *state["geometry"].tolist()[len(numbers) :]])}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: with_numbers(s, 21, 49), r"must be of a weight \[20, 48\], got one of \[21, 49\]"),
        (
            lambda s: with_numbers(s, 21, 49, 4, 16, 0, 3),
            "the layout of the state must have a version of 1 to 2, got 3",
        ),
        (
            lambda s: with_numbers(s, 20, 48, 4, 16, 0, 2, 2),
            r"the geometry .* must hold rows, .*, activations and .*, got \[20, 48, 4, 16, 0, 2, 2\]",
        ),
        (lambda s: {**s, "geometry": s["geometry"][:6]}, r"the geometry .* must hold .*, got \[20, 48, 4, 16, 0, 2\]"),
        (lambda s: {**s, "geometry": s["geometry"][:3]}, r"the geometry .* must hold rows, .*, got \[20, 48, 4\]"),
        (lambda s: {**s, "geometry": s["geometry"][None]}, r"the geometry .* must hold rows, .*, got \[\]"),
        (
            lambda s: {**s, "geometry": F.pad(s["geometry"], (0, 1), value=300)},
            r"the bytes of a format's name, got .*300",
        ),
        (lambda s: with_numbers(s, 20, 48, 9), "bits must be between 1 and 8, got 9"),
        (lambda s: with_numbers(s, 20, 48, 4, 0), "group_size must be positive and divide the 48 columns, got 0"),
        (lambda s: with_numbers(s, 20, 48, 4, 32), "group_size must be positive and divide the 48 columns, got 32"),
        (lambda s: with_numbers(s, 20, 48, 4, 8), r"scale must have shape \[20, 6\], got \[20, 3\]"),
        (
            lambda s: with_numbers(s, 20, 48, 3),
            r"codes must have shape \[N, 18\] \(48 columns of 3 bits\), got \[20, 24\]",
        ),
        (lambda s: {**s, "codes": s["codes"][:19]}, r"codes must have a row for each of 20 rows, got shape \[19, 24\]"),
        (lambda s: {**s, "codes": s["codes"].int()}, "codes must be uint8, got torch.int32"),
        (lambda s: {**s, "scale": s["scale"].int()}, "scale must be a floating-point tensor, got torch.int32"),
        (lambda s: {**s, "zero": torch.ones(20, 2)}, r"zero must have shape \[20, 3\] or \[1, 1\], got \[20, 2\]"),
        (lambda s: {**s, "perm": torch.arange(47)}, r"perm must be int64 of shape \[48\], got torch.int64 \[47\]"),
        (
            lambda s: {**s, "perm": torch.zeros(48, dtype=torch.int64)},
            "perm must be a permutation of the 48 columns, got one without 47 of them",
        ),
        (
            lambda s: {**s, "scale": torch.full((20, 3), torch.nan)},
            "scale must be finite, got 60 values that are not, of 60",
        ),
        (
            lambda s: {**s, "zero": torch.full((1, 1), torch.inf)},
            "zero must be finite, got 1 values that are not, of 1",
        ),
        (
            lambda s: {**s, "offset": torch.full((20, 3), torch.inf)},
            "offset must be finite, got 60 values that are not, of 60",
        ),
        (
            lambda s: {**s, "lut": torch.full((1, 16), torch.nan)},
            "lut must be finite, got 16 values that are not, of 16",
        ),
        (
            lambda s: {**s, **nested_state(absmax=torch.full((15,), torch.inf))},
            "scale.absmax must be finite, got 15 values",
        ),
        (lambda s: {**s, **nested_state(mean=torch.tensor(torch.nan))}, "scale.mean must be finite, got 1 values"),
        (lambda s: {**s, **nested_state(table=torch.ones(8))}, "scale.codes must be below 8, got up to 9"),
        (
            lambda s: {**s, **nested_state(absmax=torch.ones(3))},
            r"absmax \[15\] and one mean belong together, got .*absmax \[3\]",
        ),
        (
            lambda s: {n: v for n, v in {**s, **nested_state()}.items() if n != "scale_table"},
            "the state of a nested scale must have scale_table, got none",
        ),
        (
            lambda s: with_numbers({**s, **nested_state()}, 20, 48, 4, 16, 0),
            "NestedScale: block must be at least 1, got 0",
        ),
        (lambda s: {**s, "bias": torch.ones(19)}, r"bias must have shape \[20\], got \[19\]"),
        (lambda s: {**s, "bias": torch.ones(20, 1)}, r"bias must have shape \[20\], got \[20, 1\]"),
        (lambda s: {"weight": torch.ones(OUT, IN), "bias": s["bias"]}, "Missing key"),
    ],
)
def test_another_state_is_refused_and_changes_nothing(change: Callable[[Any], Any], sentence: str) -> None:
    layer = make("4 bits")
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=sentence):
        layer.load_state_dict(change(make("4 bits", bias=True).state_dict()))
    if sentence == "Missing key":
        assert not torch.equal(layer.bias, before.bias)  # torch loads what it can
        layer.bias = before.bias
    same_state(before, layer)
    assert torch.equal(before.weight, layer.weight) and repr(before) == repr(layer)


@pytest.mark.parametrize("state", [lambda: make("nf4").state_dict(), lambda: version_1(make("nf4"))])
def test_a_table_of_floats_and_int8_activations_do_not_meet(state: Callable[[], dict[str, Any]]) -> None:
    """A state that says its own activations brings them; one that does not meets those of the layer."""
    layer, found = make("4 bits", activations="int8"), state()
    sentence = "int8 activations need uniform codes or an int8 lut, got a lut of torch.float32"
    if found["geometry"][5] == 1:
        with pytest.raises(RuntimeError, match=sentence):
            layer.load_state_dict(found)
        assert layer.activations == "int8" and layer.lut is None
    else:
        layer.load_state_dict(found)
        assert layer.activations == "exact"
        with pytest.raises(RuntimeError, match=sentence):
            layer.load_state_dict(with_numbers(found, OUT, IN, 4, 16, 0, 2, 1))


def test_groups_too_wide_for_int8_activations_are_refused_before_the_first_product() -> None:
    most = int8_columns(8, None)
    sizes = {"bits": 8, "group_size": None}
    assert QuantLinear(most, 1, **sizes, activations="int8")(torch.ones(1, most)).tolist() == [[0.0]]
    wide = QuantLinear(most + 1, 1, **sizes)
    sentence = f"QuantLinear: int8 activations take groups of at most {most} columns with bits=8"
    with pytest.raises(ValueError, match=sentence):
        QuantLinear(most + 1, 1, **sizes, activations="int8")
    with pytest.raises(ValueError, match=sentence):
        QuantLinear.from_qtensor(wide.qweight, activations="int8")
    with pytest.raises(ValueError, match=sentence):
        wide.activations = "int8"
    assert wide.activations == "exact"
    narrow = QuantLinear(most + 1, 1, bits=4, group_size=None, activations="int8")
    for state in (with_numbers(wide.state_dict(), 1, most + 1, 8, most + 1, 0, 2, 1), version_1(wide)):
        with pytest.raises(RuntimeError, match=sentence):
            narrow.load_state_dict(state)
    assert narrow.bits == 4 and narrow.activations == "int8"


def test_a_state_without_codes_is_missed() -> None:
    layer = make("4 bits")
    state = {n: v for n, v in layer.state_dict().items() if n != "codes"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"codes\""):
        layer.load_state_dict(state)
    assert layer.weight.shape == (OUT, IN)


@every_kind
def test_codes_and_scales_keep_their_dtypes(kind: str) -> None:
    layer = make(kind)
    before = {n: v.clone() for n, v in layer.state_dict().items() if n != "bias"}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        assert layer.weight.dtype == dtype and layer.bias.dtype == dtype
        assert layer(torch.randn(2, IN, dtype=dtype)).dtype == dtype
    for name, value in before.items():
        assert torch.equal(layer.state_dict()[name], value) and layer.state_dict()[name].dtype == value.dtype
    assert layer.float().weight.dtype == torch.float32


def test_bytes_that_are_held() -> None:
    """Once the layer has run there is a second layout beside what is saved, until it is given back."""
    layer = QuantLinear.from_linear(nn.Linear(64, OUT), bits=4, group_size=32)
    assert layer.resident_nbytes >= layer.nbytes == stored_bytes(layer)
    # two blocks of 16 rows, of two steps of 32 columns; a scale and a shift for each row and group; a table
    layout = 2 * 2 * 4 * 64 + 2 * (4 * 2 * 2 * 16) + 64
    assert layer.resident_nbytes - layer.nbytes == (layout if native.STATUS.variant else 0)
    x = torch.randn(3, 64)
    y = layer(x)
    codes = layer.codes
    assert layer.free_layout() is layer and layer.codes is not codes
    assert torch.equal(layer(x), y) and torch.equal(layer.codes, codes)


def test_bytes() -> None:
    layer = make("4 bits")
    assert layer.nbytes == OUT * IN // 2 + 4 * OUT * IN // 16 + 4 + 4 * OUT == stored_bytes(layer)


# -------------------------------------------------------------------------------------------- what torch does with it


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("kind", ["4 bits", "nf4", "reordered"])
def test_layers_compile(kind: str, activations: str) -> None:
    if (kind, activations) == ("nf4", "int8"):
        activations = "exact"  # its table is of floats
    layer = make(kind, activations=activations)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            x = torch.randn(3, IN, requires_grad=True)
            y = compiled(x)
            assert torch.equal(y, layer(x))
            y.sum().backward()
            torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_a_trained_layer_compiles() -> None:
    layer = QLoRALinear(make("nf4"), rank=3)
    nn.init.normal_(layer.lora_b)
    twin = copy.deepcopy(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, IN)
    for module in (compiled, twin):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_a.grad, twin.lora_a.grad)
    torch.testing.assert_close(layer.lora_b.grad, twin.lora_b.grad)


def test_inductor_compiles_a_model() -> None:
    model = quantize_(nn.Sequential(nn.Linear(IN, 32), nn.GELU(), nn.Linear(32, 5)), group_size=16)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(3, IN)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("low", [False, True])
def test_autocast(low: bool) -> None:
    layer: nn.Module = make("4 bits")
    if low:
        layer = QLoRALinear(layer)
    x = torch.randn(4, IN, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nn.Sequential(nn.Linear(IN, IN), layer, nn.Linear(OUT, 3))(x)
        torch.testing.assert_close(layer(x).float(), exact, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_gradient_checkpointing() -> None:
    layer = QLoRALinear(make("4 bits"), rank=2)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(4, IN, requires_grad=True)
    layer(x).square().sum().backward()
    whole = layer.lora_a.grad.clone(), layer.lora_b.grad.clone(), x.grad.clone()
    for t in (layer.lora_a, layer.lora_b, x):
        t.grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(whole, (layer.lora_a, layer.lora_b, x)))


def test_torch_transformer_layers_take_it() -> None:
    """In evaluation torch looks at the weights of its layers itself."""
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    quantize_(model, bits=8, group_size=32)
    assert isinstance(model.linear1, QuantLinear) and isinstance(model.linear2, QuantLinear)
    x = torch.randn(2, 5, 32)
    trained = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- QLoRA


def test_the_low_rank_term() -> None:
    base = make("nf4")
    layer = QLoRALinear(base, rank=3, alpha=6.0)
    x = torch.randn(5, IN)
    torch.testing.assert_close(layer(x), base(x))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]
    nn.init.normal_(layer.lora_b)
    expected = base(x) + 2.0 * x @ layer.lora_a.t() @ layer.lora_b.t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), F.linear(x, layer.merged(), base.bias), rtol=1e-4, atol=1e-4)
    assert (layer.in_features, layer.out_features) == (IN, OUT) and "rank=3, alpha=6.0" in repr(layer)


def test_what_is_saved_for_the_backward() -> None:
    layer = QLoRALinear(make("nf4"), rank=2)
    rows = 100

    def saved(x: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            layer(x)
        return [t for t in kept if t.dim() and t.shape[0] == rows]

    x = torch.randn(rows, IN, requires_grad=True)
    assert sorted(t.shape[1] for t in saved(x)) == [2, IN]
    layer.lora_a.requires_grad_(False)
    assert [t.shape[1] for t in saved(x)] == [2]
    layer.lora_b.requires_grad_(False)
    assert saved(x) == []


def test_training_lowers_a_loss_and_leaves_the_base() -> None:
    model = nn.Sequential(nn.Linear(IN, 32), nn.Tanh(), nn.Linear(32, 4))
    quantize_(model, "nf4", group_size=16)
    for i in (0, 2):
        model[i] = QLoRALinear(model[i], rank=4)
    before = {n: v.clone() for n, v in model.state_dict().items() if "lora" not in n}
    x, y = torch.randn(64, IN), torch.randint(4, (64,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items())
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.grad is not None} == {"lora_a", "lora_b"}


def test_a_base_stays_exact() -> None:
    """Its product takes no other activations: they would be left out without a word."""
    layer = QLoRALinear(make("4 bits"), rank=2)
    int8 = QLoRALinear(make("4 bits"), rank=2)
    int8.base.activations = "int8"
    with pytest.raises(ValueError, match="QLoRALinear: base must have exact activations, got 'int8'"):
        int8(torch.randn(3, IN))
    layer = QLoRALinear(make("4 bits"), rank=2)
    layer.load_state_dict({**layer.state_dict(), "base.geometry": version_1(make("4 bits"))["geometry"]})
    assert layer.base.activations == "exact"


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("inside", [lambda layer: layer, nn.Sequential], ids=["alone", "in a model"])
def test_the_state_of_a_base_that_is_not_exact_changes_nothing(
    inside: Callable[[nn.Module], nn.Module], assign: bool
) -> None:
    layer, int8 = QLoRALinear(make("4 bits"), rank=2), QLoRALinear(make("8 bits"), rank=2)
    int8.base.activations = "int8"
    before, x, stored = copy.deepcopy(layer), torch.randn(3, IN), inside(int8).state_dict()
    names = list(stored)
    for strict in (True, False):
        with pytest.raises(RuntimeError) as caught:
            inside(layer).load_state_dict(stored, strict=strict, assign=assign)
        assert str(caught.value).endswith("base: the state must have exact activations, got 'int8'")
        assert "key" not in str(caught.value).replace("state_dict", "")
        same_state(before, layer)
        assert torch.equal(layer(x), before(x)) and repr(before) == repr(layer)
    assert list(stored) == names


def test_trained_state_survives() -> None:
    layer = QLoRALinear(make("nf4"), rank=4)
    nn.init.normal_(layer.lora_b)
    other = QLoRALinear(QuantLinear(IN, OUT, group_size=16), rank=4)
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(layer.state_dict())))
    x = torch.randn(3, IN)
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    half = copy.deepcopy(layer).bfloat16()
    assert half.lora_a.dtype == torch.bfloat16 and torch.equal(half.base.codes, layer.base.codes)
    assert half(x.bfloat16()).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------- whole models


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(x))))


def test_tied_and_odd_layers_stay_dense() -> None:
    model = quantize_(Tied(), group_size=32)
    assert type(model.head) is nn.Linear and model.head.weight is model.embed.weight
    assert isinstance(model.hidden, QuantLinear)

    class More(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = torch.nn.utils.weight_norm(nn.Linear(32, 32))
    network = nn.Sequential(nn.Linear(32, 32), More(32, 32), nn.MultiheadAttention(32, 2).out_proj, normed, old)
    quantize_(network, group_size=32)
    kinds = [type(m) for m in network]
    assert kinds[0] is QuantLinear and kinds[1] is More and QuantLinear not in kinds[1:]


def test_a_layer_in_two_places_is_replaced_in_both() -> None:
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    quantize_(model, group_size=32)
    assert isinstance(model[0], QuantLinear) and model[0] is model[2]


def test_a_layer_by_itself() -> None:
    dense = nn.Linear(32, 8).eval()
    layer = quantize_(dense, group_size=32)
    assert isinstance(layer, QuantLinear) and not layer.training and layer.bias is not None


def test_a_filter_chooses() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 10))
    seen = []
    quantize_(model, group_size=32, filter=lambda module, name: seen.append(name) or module.out_features > 10)
    assert seen == ["0", "1"] and isinstance(model[0], QuantLinear) and type(model[1]) is nn.Linear


def test_hessians_are_sums_over_inputs_in_evaluation() -> None:
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6), norm, nn.Linear(6, 2))
    norm.eval()
    batches = [torch.randn(4, 6), torch.randn(3, 6)]
    found = hessians(model, batches)
    x = torch.cat(batches)
    assert list(found) == ["1", "3"] and model.training and not norm.training
    torch.testing.assert_close(found["1"], x.t() @ x)
    hidden = norm(model[1](x))
    torch.testing.assert_close(found["3"], (hidden.t() @ hidden).detach())
    assert not found["3"].requires_grad and not any(m._forward_pre_hooks for m in model.modules())

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, *, values: Tensor) -> Tensor:
            return self.layer(input=values)

    torch.testing.assert_close(hessians(Named(), [{"values": x}])["layer"], x.t() @ x)
    assert list(hessians(model, batches, lambda module, name: name == "3")) == ["3"]


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: quantize_("model"), TypeError, "quantize_: model must be a torch.nn.Module, got str"),
        (
            lambda: quantize_(nn.Linear(32, 8), "nf5"),
            ValueError,
            "quantize_: there is no method 'nf5'; did you mean 'nf4'?",
        ),
        (
            lambda: quantize_(nn.Sequential(nn.Linear(32, 8), nn.Linear(48, 8)), group_size=32),
            ValueError,
            "quantize_: the layer '1' cannot be quantised (quantize_weight: group_size must be positive and divide the 48 "
            "columns, got 32); a filter can leave it out",
        ),
        (
            lambda: quantize_(nn.Sequential(nn.Linear(32, 8)), group_size=32, gropu=2),
            TypeError,
            "quantize_weight: method absmax has no option 'gropu'; there are none",
        ),
        (
            lambda: quantize_(nn.Linear(32, 8), group_size=32, activations="int4"),
            ValueError,
            "quantize_: activations must be one of exact, int8, got 'int4'",
        ),
        (
            lambda: quantize_(nn.Sequential(nn.Linear(32, 8)), "nf4", group_size=32, activations="int8"),
            ValueError,
            "quantize_: the layer '0' cannot be quantised (QuantLinear: int8 activations need uniform codes or an int8 lut, "
            "got a lut of torch.float32); a filter can leave it out",
        ),
        (
            lambda: quantize_(nn.ReLU()),
            ValueError,
            "quantize_: model must have a linear layer to quantise (tied ones stay dense), got none",
        ),
        (
            lambda: quantize_(quantize_(nn.Sequential(nn.Linear(32, 8)), group_size=32)),
            ValueError,
            "quantize_: model must have a linear layer to quantise (tied ones stay dense), got none that is not quantised "
            "already",
        ),
        (
            lambda: quantize_(nn.Sequential(nn.Linear(32, 8)), "gptq", group_size=32),
            ValueError,
            "quantize_: hessians must have one for the layer '0' (method gptq)",
        ),
        (
            lambda: quantize_(nn.Sequential(nn.Linear(32, 8)), group_size=32, hessians={"0": torch.eye(32)}),
            ValueError,
            "quantize_: hessians are for the method 'gptq', got the method 'absmax'",
        ),
        (
            lambda: QuantLinear.from_linear(nn.Conv2d(1, 1, 1)),
            TypeError,
            "QuantLinear.from_linear: linear must be a linear layer, got Conv2d",
        ),
        (
            lambda: QuantLinear.from_qtensor(torch.ones(2, 2)),
            TypeError,
            "QuantLinear.from_qtensor: weight must be a QTensor, got Tensor",
        ),
        (
            lambda: QuantLinear.from_qtensor(make("4 bits").qweight, torch.ones(3)),
            ValueError,
            "QuantLinear.from_qtensor: bias must have shape [20], got [3]",
        ),
        (
            lambda: QuantLinear(30, 8, group_size=32),
            ValueError,
            "QuantLinear: group_size must be positive and divide the 30 columns, got 32",
        ),
        (lambda: QuantLinear(32, 8, bits=9), ValueError, "QuantLinear: bits must be between 1 and 8, got 9"),
        (lambda: QuantLinear(32.0, 8), TypeError, "QuantLinear: in_features must be an integer, got 32.0"),
        (
            lambda: make("4 bits")(torch.ones(2, 47)),
            ValueError,
            "qlinear: input must have shape [..., 48], got [2, 47]",
        ),
        (
            lambda: QLoRALinear(nn.Linear(8, 8)),
            TypeError,
            "QLoRALinear: base must be a QuantLinear, got Linear",
        ),
        (
            lambda: LoRALinear(nn.ReLU()),
            TypeError,
            "LoRALinear: base must be an nn.Linear itself, got ReLU",
        ),
        (
            lambda: LoRALinear(SparseLinear.from_dense(nn.Linear(8, 8), density=0.5)),
            TypeError,
            "LoRALinear: base must be an nn.Linear itself, got the subclass SparseLinear",
        ),
        (lambda: LoRALinear(nn.Linear(8, 8), rank=0), ValueError, "LoRALinear: rank must be at least 1, got 0"),
        (lambda: QLoRALinear(make("4 bits"), rank=0), ValueError, "QLoRALinear: rank must be at least 1, got 0"),
        (lambda: QLoRALinear(make("4 bits"), rank=2.5), TypeError, "QLoRALinear: rank must be an integer, got 2.5"),
        (lambda: QLoRALinear(make("4 bits"), alpha="x"), TypeError, "QLoRALinear: alpha must be a number, got 'x'"),
        (
            lambda: QLoRALinear(make("4 bits", activations="int8")),
            ValueError,
            "QLoRALinear: base must have exact activations, got 'int8'",
        ),
        (lambda: hessians("model", []), TypeError, "hessians: model must be a torch.nn.Module, got str"),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence


def test_a_refused_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(48, 8))
    with pytest.raises(ValueError, match="cannot be quantised"):
        quantize_(model, group_size=32)
    assert all(type(m) is nn.Linear for m in model)
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the layer '0' cannot be quantised .*weight must be finite, got 1 values"):
        quantize_(model, group_size=16)
    assert all(type(m) is nn.Linear for m in model)


# -------------------------------------------------------------------------------------------------- Hugging Face


def llama(**changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **changes,
        }
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {"llama": llama, "tied llama": lambda: llama(tie_word_embeddings=True), "gpt2": gpt2}
WAYS: dict[str, dict[str, Any]] = {
    "absmax": {"bits": 4, "group_size": 32},
    "int8": {"bits": 8, "group_size": 64, "activations": "int8"},
    "nf4": {"method": "nf4", "group_size": 64},
    "gptq": {"method": "gptq", "bits": 4, "group_size": 32},
}


def tokens() -> Tensor:
    return torch.randint(2, 96, (2, 9), generator=torch.Generator().manual_seed(0))


def with_decoded_weights(dense: nn.Module, quantised: nn.Module) -> nn.Module:
    """The dense model with the weights that the quantised one stands for."""
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, QuantLinear):
                weight = dense.get_submodule(name).weight
                weight.copy_(module.weight.t() if is_transposed(dense.get_submodule(name)) else module.weight)
    return dense


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str, way: str) -> None:
    dense, options = MODELS[name](), dict(WAYS[way])
    model = copy.deepcopy(dense)
    if way == "gptq":
        options["hessians"] = hessians(model, [{"input_ids": tokens()}])
    quantize_(model, **options)
    kinds = {n: type(m) for n, m in model.named_modules()}
    linears = [n for n, m in dense.named_modules() if type(m) is nn.Linear or is_transposed(m)]
    tied = name != "llama"
    assert [n for n in linears if kinds[n] is not QuantLinear] == (["lm_head"] if tied else [])
    if tied:
        assert model.lm_head.weight is model.get_input_embeddings().weight
    reference = with_decoded_weights(copy.deepcopy(dense), model)
    with torch.no_grad():
        logits, expected, exact = (m(input_ids=tokens()).logits for m in (model, reference, dense))
    deviation = expected.std()
    assert (logits - expected).abs().max() < (0.1 if way == "int8" else 1e-3) * deviation
    assert (logits - exact).abs().mean() < 0.5 * deviation and not torch.equal(logits, exact)
    written = model.generate(tokens(), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert written.shape == (2, 15)
    if way != "int8":
        again = reference.generate(tokens(), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(written, again)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_is_saved_and_loaded(name: str) -> None:
    model = quantize_(MODELS[name](), "nf4", group_size=64)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = quantize_(MODELS[name](), bits=4, group_size=32)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, other(input_ids=tokens()).logits)
    assert torch.equal(copy.deepcopy(model)(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    half = copy.deepcopy(model).bfloat16()
    assert half(input_ids=tokens()).logits.dtype == torch.bfloat16


def same_logits(a: nn.Module, b: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(a(input_ids=tokens()).logits, b(input_ids=tokens()).logits)


@pytest.mark.parametrize("way", ["nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_goes_through_safetensors(name: str, way: str, tmp_path: Path) -> None:
    """Of tied weights, which share memory, ``save_model`` writes one; ``load_model`` fills both."""
    model, file = quantize_(MODELS[name](), **WAYS[way]), str(tmp_path / "model.safetensors")
    safetensors.torch.save_model(model, file)
    stored = safetensors.torch.load_file(file)
    tied = name != "llama"
    assert set(model.state_dict()) - set(stored) <= {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "transformer.wte.weight",
    }
    assert (len(stored) < len(model.state_dict())) == tied
    other = quantize_(MODELS[name](), bits=4, group_size=32)
    assert not same_logits(model, other)
    missing, unexpected = safetensors.torch.load_model(other, file)
    assert not missing and not unexpected
    assert same_logits(model, other)
    if tied:
        assert other.lm_head.weight is other.get_input_embeddings().weight
        with pytest.raises(RuntimeError, match="share memory"):
            safetensors.torch.save_file(model.state_dict(), file)


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_is_read(name: str, tmp_path: Path) -> None:
    """Into a model that was quantised before: transformers itself would make dense layers of the configuration."""
    model = quantize_(MODELS[name](), "nf4", group_size=64)
    model.save_pretrained(tmp_path)
    other = quantize_(type(model)(type(model).config_class.from_pretrained(tmp_path)).eval(), bits=4, group_size=32)
    safetensors.torch.load_model(other, str(tmp_path / "model.safetensors"))
    assert same_logits(model, other)
    assert torch.equal(
        model.generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None),
        other.generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None),
    )


def test_a_model_of_transformers_trains_its_low_rank_terms() -> None:
    model = quantize_(llama(), "nf4", group_size=64)
    for p in model.parameters():
        p.requires_grad_(False)
    for parent in list(model.modules()):
        for leaf, module in list(parent.named_children()):
            if isinstance(module, QuantLinear):
                setattr(parent, leaf, QLoRALinear(module, rank=4))
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its name changes from release to release
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


LAZY = """
import sys
import cofire
assert not [m for m in sys.modules if m == "cofire.nn" or m.startswith("cofire.nn.")], "importing cofire imports layers"
assert "quantize_" in dir(cofire) and "quantize_" in cofire.__all__
assert not hasattr(cofire, "quantise_") and "cofire.nn" not in sys.modules
from cofire import quantize_
import cofire.nn
assert quantize_ is cofire.quantize_ is cofire.nn.quantize_
"""


def test_the_call_is_at_the_top_and_imported_when_it_is_asked_for() -> None:
    assert cofire.quantize_ is quantize_
    with pytest.raises(AttributeError, match="module 'cofire' has no attribute 'quantise_'"):
        cofire.quantise_  # noqa: B018
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root / "pyextensions"), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", LAZY], env={**os.environ, "PYTHONPATH": paths}, check=True)


def test_the_examples_of_the_docstrings() -> None:
    results = doctest.testmod(importlib.import_module("cofire.nn.lowbit"))
    assert results.attempted > 0 and results.failed == 0


def test_the_same_weight_in_every_form() -> None:
    """The layer holds what the QTensor says, and nothing else."""
    q = quantize_weight(torch.randn(OUT, IN), "minmax", bits=5, group_size=16, **{})
    layer = QuantLinear.from_qtensor(q.replace(format="some"))
    again = layer.qweight
    assert isinstance(again, QTensor) and again.format == "some"
    assert all(torch.equal(a, b) for a, b in zip(q.tensors().values(), again.tensors().values(), strict=True))
