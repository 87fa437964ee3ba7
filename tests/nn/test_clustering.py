# SPDX-License-Identifier: Apache-2.0
"""Palettized layers: the trainable form against the operators, the packed form against the trainable one."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle
import warnings

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cofire import ops
from cofire.nn import (
    PackedPalette,
    PackedPalettizedConv2d,
    PackedPalettizedEmbedding,
    PackedPalettizedLinear,
    Palette,
    PalettizedConv2d,
    PalettizedEmbedding,
    PalettizedLinear,
    clustering,
)
from cofire.nn.clustering import kmeans, separate, soft_evaluation
from cofire.nn.palettes import decode, palettized_linear
from helpers import stored_bytes

#: Layer, and an input.
LAYERS = {
    "linear": (lambda **o: PalettizedLinear(20, 14, **o), lambda: torch.randn(3, 20)),
    "linear, more dimensions": (lambda **o: PalettizedLinear(20, 14, bias=False, **o), lambda: torch.randn(2, 3, 20)),
    "conv": (lambda **o: PalettizedConv2d(4, 10, 3, padding=1, **o), lambda: torch.randn(2, 4, 7, 7)),
    "grouped conv": (
        lambda **o: PalettizedConv2d(4, 10, (3, 1), stride=2, groups=2, bias=False, **o),
        lambda: torch.randn(2, 4, 7, 7),
    ),
    "circular conv": (
        lambda **o: PalettizedConv2d(4, 10, 3, padding=1, padding_mode="circular", **o),
        lambda: torch.randn(2, 4, 7, 7),
    ),
    "same conv": (lambda **o: PalettizedConv2d(4, 10, 4, padding="same", **o), lambda: torch.randn(2, 4, 7, 7)),
    "embedding": (lambda **o: PalettizedEmbedding(30, 12, **o), lambda: torch.randint(30, (2, 5))),
    "padded embedding": (
        lambda **o: PalettizedEmbedding(30, 12, -1, **o),
        lambda: torch.tensor([[0, 29, 3], [29, 7, 7]]),
    ),
}
OPTIONS = {
    "one palette": {"bits": 2},
    "groups, the last short": {"bits": 2, "group_rows": 4},
    "vectors": {"bits": 3, "cluster_dim": 2},
    "vectors in groups": {"bits": 2, "cluster_dim": 2, "group_rows": 6},
    "scaled": {"bits": 3, "per_channel_scale": True},
    "zero": {"bits": 2, "enforce_zero": True, "prune_threshold": 1e-3},
    "tau": {"bits": 2, "tau": 1e-3},
    "hard": {"bits": 2, "forward": "hard_ste"},
    "implicit": {"bits": 2, "grad": "implicit"},
    "one bit": {"bits": 1, "rho": 0.3},
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_option = pytest.mark.parametrize("options", OPTIONS)


def make(kind, options, dtype=None):
    layer, input = LAYERS[kind]
    x = input()
    return layer(**OPTIONS[options], dtype=dtype), x.to(dtype) if x.is_floating_point() and dtype else x


def plain_output(layer, weight, x):
    """The layer of torch.nn with this weight."""
    if isinstance(layer, PalettizedLinear):
        return F.linear(x, weight, layer.bias)
    if isinstance(layer, PalettizedConv2d):
        return layer._conv_forward(x, weight, layer.bias)
    rows = F.embedding(x, weight, layer.padding_idx)
    if layer.padding_idx is None:
        return rows
    return torch.where((x == layer.padding_idx)[..., None], layer.weight[layer.padding_idx].detach(), rows)


def assert_same_output(packed, layer, x):
    """To the bit where the weight is decoded; a linear layer's product is another kernel's, and sums in another order."""
    with torch.no_grad():
        output, expected = packed(x), layer(x)
    if not isinstance(packed, PackedPalettizedLinear):
        assert torch.equal(output, expected)
        return
    step = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(output, expected, rtol=4 * step, atol=4 * step)


def expected_weight(layer, weight, options):
    """Scale, operator, scale: what a forward in training computes with."""
    palette, o = layer.palette, OPTIONS[options]
    group = weight[0].numel() * min(o.get("group_rows", len(weight)), len(weight))
    scale = torch.ones(len(weight), dtype=weight.dtype)
    if o.get("per_channel_scale"):
        scale = weight.detach().abs().flatten(1).amax(1)
        scale[scale == 0] = 1  # the row at padding_idx
    scale = scale.view(-1, *[1] * (weight.dim() - 1))
    heat = {"tau": o["tau"]} if "tau" in o else {"rho": o.get("rho", 0.1)}
    names = ("forward", "grad", "enforce_zero", "prune_threshold")
    found = ops.dkm(weight / scale, palette.centroids, group_size=group, **heat, **{n: o[n] for n in names if n in o})
    return found.output * scale, found.centroids


# ------------------------------------------------------------------------------------------------------- forward


@every_option
@every_layer
def test_training_equals_the_operator(kind, options):
    layer, x = make(kind, options)
    layer.initialize()
    before = layer.centroids.clone()
    weight = layer.weight.detach().clone().requires_grad_()
    weight_hat, centroids = expected_weight(layer, weight, options)
    expected = plain_output(layer, weight_hat, x)
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.centroids, centroids)
    assert not torch.equal(layer.centroids, before) and not layer.centroids.requires_grad
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    if isinstance(layer, PalettizedEmbedding) and layer.padding_idx is not None:
        assert (layer.weight.grad[layer.padding_idx] == 0).all()
        weight.grad[layer.padding_idx] = 0
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-4, atol=1e-5)


@every_option
@every_layer
def test_packed_equals_evaluation(kind, options):
    layer, x = make(kind, options)
    layer(x)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    packed = layer.pack()
    assert_same_output(packed, layer, x)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert packed.weight.shape == layer.weight.shape and packed.weight.dtype == layer.weight.dtype
    assert not packed.training and not any(p.requires_grad for p in packed.parameters())
    o, vectors = (
        OPTIONS[options],
        packed.palette.weight.reshape(len(layer.weight), -1, OPTIONS[options].get("cluster_dim", 1)),
    )
    for group in vectors.split(o.get("group_rows", len(vectors))) if options != "scaled" else ():
        assert len(group.flatten(0, 1).unique(dim=0)) <= 2 ** o["bits"]
    for tensor in layer.state_dict().values():
        tensor.zero_()
    assert packed.weight.abs().sum() > 0


@every_layer
def test_evaluation_is_the_nearest_centroid(kind):
    layer, x = make(kind, "groups, the last short")
    layer(x)
    layer.eval()
    labels, _ = ops.palettize(layer.weight, layer.centroids, group_size=4 * layer.weight[0].numel())
    palette = torch.arange(len(layer.weight)).div(4, rounding_mode="floor").view(-1, *[1] * (layer.weight.dim() - 1))
    weight = layer.centroids[palette, labels.long(), 0]
    torch.testing.assert_close(layer(x), plain_output(layer, weight, x))
    with soft_evaluation(layer):
        assert not torch.equal(layer(x), plain_output(layer, weight, x))
    torch.testing.assert_close(layer(x), plain_output(layer, weight, x))


def test_zero_is_a_centroid_of_evaluation_too():
    layer, x = make("linear", "zero")
    layer(x)
    assert (layer.centroids[:, 0] == 0).all()
    plain = PalettizedLinear.from_module(nn.Linear(20, 14), bits=2)
    plain.weight = layer.weight
    plain.initialize()
    assert (layer.eval().pack().weight == 0).sum() > 0
    assert 0.0 not in plain.centroids.flatten().tolist()


def test_keep_sparsity():
    layer = PalettizedLinear(20, 14, bits=2, enforce_zero=True, keep_sparsity=True)
    layer.weight.data[torch.rand(14, 20) < 0.5] = 0
    layer.initialize()
    assert torch.equal(layer.eval().pack().weight == 0, layer.weight == 0)


def test_disabled_is_the_plain_layer():
    layer, x = make("conv", "one palette")
    layer.palette.enabled = False
    output = layer(x)
    assert torch.equal(output, layer._conv_forward(x, layer.weight, layer.bias))
    assert not layer.palette.initialized and (layer.centroids == 0).all()
    layer.palette.enabled = True
    assert not torch.equal(layer(x), output) and layer.palette.initialized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", ["one palette", "scaled", "vectors"])
@every_layer
def test_other_dtypes(kind, options, dtype):
    layer, x = make(kind, options, dtype)
    output = layer(x)
    assert output.dtype == dtype
    output.float().square().mean().backward()
    assert layer.weight.grad.dtype == dtype and layer.weight.grad.isfinite().all()
    assert layer.centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    packed = layer.eval().pack()
    assert packed.lut.dtype == dtype and packed(x).dtype == dtype
    assert_same_output(packed, layer, x)


def test_autocast():
    layer, x = make("linear", "one palette")
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).float(), exact, rtol=0.05, atol=0.05)
        assert layer.eval().pack()(x).dtype == torch.bfloat16
    assert layer.centroids.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------- state


def test_everything_is_registered_before_the_first_forward():
    layer, x = make("linear", "scaled")
    names = set(layer.state_dict())
    shapes = {name: value.shape for name, value in layer.state_dict().items()}
    assert names >= {"weight", "bias", "palette.centroids", "palette.flags", "palette.heat", "palette.scale"}
    assert layer.centroids.shape == (1, 8, 1) and (layer.centroids == 0).all() and not layer.palette.initialized
    layer(x)
    assert {name: value.shape for name, value in layer.state_dict().items()} == shapes and layer.palette.initialized


@every_option
def test_state_survives(options):
    layer, x = make("linear", options)
    layer(x)
    other = LAYERS["linear"][0](**OPTIONS[options])
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(layer.state_dict())))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.palette.initialized
        fresh = copy.deepcopy(layer)
        for _ in range(2):
            assert torch.equal(twin(x), fresh(x))
        assert torch.equal(twin.centroids, fresh.centroids)


def test_the_temperature_and_the_flags_are_state():
    layer, _ = make("linear", "one palette")
    layer.palette.heat.fill_(0.25)
    layer.palette.enabled, layer.palette.hard = False, True
    other, _ = make("linear", "one palette")
    other.load_state_dict(layer.state_dict())
    palette = other.palette
    assert (float(palette.heat), palette.enabled, palette.hard, palette.initialized) == (0.25, False, True, False)


def test_centroids_stay_wide():
    layer, x = make("linear", "scaled")
    layer(x)
    before = layer.centroids.clone()
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and layer.palette.steps.dtype == torch.int64
    assert torch.equal(layer.centroids, before) and layer.palette.scale.dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.double()
    assert layer.centroids.dtype == torch.float64 and layer(x.double()).dtype == torch.float64
    layer.float()
    assert layer.centroids.dtype == torch.float32


def test_meta_and_to_empty():
    layer = PalettizedLinear(20, 14, bits=2, update="step", device="meta")
    assert layer.centroids.is_meta
    layer.to_empty(device="cpu")
    source = PalettizedLinear(20, 14, bits=2, update="step")
    x = torch.randn(2, 20)
    source(x)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))


def test_centroids_move_with_each_forward_or_with_each_step():
    each, x = make("linear", "one palette")
    each.initialize()
    stepped = PalettizedLinear.from_module(nn.Linear(20, 14), bits=2, update="step")
    stepped.weight, stepped.bias = each.weight, each.bias
    stepped.initialize()
    assert torch.equal(each(x), stepped(x))
    assert torch.equal(stepped(x), stepped(x)) and not torch.equal(each.centroids, stepped.centroids)
    stepped.palette.advance()
    assert torch.equal(each.centroids, stepped.centroids) and stepped.palette.steps == 1


def test_checkpointing_and_accumulation_need_steps():
    layer = PalettizedLinear(20, 14, bits=2, update="step")
    x = torch.randn(4, 20)
    layer(x).square().sum().backward()
    whole = layer.weight.grad.clone()
    layer.weight.grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.weight.grad, whole)
    layer.weight.grad = None
    for half in x.split(2):
        layer(half).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "update"),
    [
        ("linear", "one palette", "forward"),
        ("linear", "scaled", "step"),
        ("linear", "vectors in groups", "forward"),
        ("linear", "hard", "step"),
        ("conv", "one palette", "step"),
        ("conv", "hard", "forward"),
        ("padded embedding", "one palette", "forward"),
        ("padded embedding", "vectors in groups", "step"),
    ],
)
def test_layers_compile(kind, options, update):
    make_layer, input = LAYERS[kind]
    layer, x = make_layer(**OPTIONS[options], update=update), input()
    layer.initialize()
    twin = copy.deepcopy(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            output, expected = compiled(x), twin(x)
            torch.testing.assert_close(output, expected)
            output.square().sum().backward()
            expected.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
    torch.testing.assert_close(layer.centroids, twin.centroids)
    layer.eval(), twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), twin(x))
        packed = layer.pack()
        torch.testing.assert_close(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))


def test_a_graph_does_not_initialise():
    layer, x = make("linear", "one palette")
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="initialised once, outside of a graph"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert not layer.palette.initialized
    torch.compile(layer, backend="aot_eager")(x)  # with a break in the graph, it does
    assert layer.palette.initialized


# ---------------------------------------------------------------------------------------------------- from_module


def test_from_module_shares():
    for plain, kind in (
        (nn.Linear(20, 14), PalettizedLinear),
        (nn.Conv2d(4, 10, 3, padding_mode="reflect", padding=1), PalettizedConv2d),
        (nn.Embedding(30, 12, padding_idx=3), PalettizedEmbedding),
    ):
        seen = []
        plain.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        layer = kind.from_module(plain.eval(), bits=2)
        assert layer.weight is plain.weight and getattr(layer, "bias", None) is getattr(plain, "bias", None)
        assert not layer.training and not layer.palette.training and type(plain) is kind.plain
        assert "palette" not in dict(plain.named_children())
        x = {"Linear": torch.randn(2, 20), "Conv2d": torch.randn(1, 4, 5, 5), "Embedding": torch.tensor([1, 3])}
        layer.palette.enabled = False
        output = layer(x[type(plain).__name__])
        assert torch.equal(output, plain(x[type(plain).__name__])) and len(seen) == 2
        assert repr(layer).startswith(kind.__name__)


def test_a_palette_can_be_shared():
    embedding = nn.Embedding(30, 12)
    linear = nn.Linear(12, 30)
    linear.weight = embedding.weight
    first = PalettizedEmbedding.from_module(embedding, bits=2)
    second = PalettizedLinear.from_module(linear, palette=first.palette)
    assert second.palette is first.palette and second.weight is first.weight
    with pytest.raises(ValueError, match=r"palette must be of \[12, 30\], got \[30, 12\]"):
        PalettizedLinear.from_module(nn.Linear(30, 12), palette=first.palette)


# ------------------------------------------------------------------------------------------------ initialisation


def test_scalars_start_from_optimal_clusters():
    layer, _ = make("linear", "groups, the last short")
    layer.initialize()
    centroids, inertia = ops.kmeans1d(layer.weight, 4, group_size=80)
    assert torch.equal(layer.centroids, centroids)
    torch.testing.assert_close(layer.palette.assign(layer.weight)[1], inertia)


def test_scales():
    layer = PalettizedLinear(8, 4, bits=2, per_channel_scale=True)
    layer.weight.data[2] = 0
    layer.initialize()
    expected = layer.weight.detach().abs().amax(1)
    expected[2] = 1
    assert torch.equal(layer.palette.scale, expected)
    output = layer(torch.eye(8))
    assert output.isfinite().all()
    layer.weight.data *= 2
    layer(torch.eye(8))
    assert torch.equal(layer.palette.scale, expected)  # frozen


def test_fewer_weights_than_clusters_are_held_exactly(monkeypatch):
    monkeypatch.setattr(clustering, "_said_exact", False)
    layer = PalettizedLinear(8, 8, bits=3)
    layer.weight.data = torch.randint(3, (8, 8)).float()
    layer.palette.parameter_name = "some.weight"
    with pytest.warns(UserWarning, match=r"some\.weight: a group has fewer different weights than 8 clusters"):
        layer.initialize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.initialize()
    assert torch.equal(layer.eval().pack().weight, layer.weight)
    layer.train()(torch.eye(8)).sum().backward()
    assert layer.weight.grad.isfinite().all() and layer.centroids.isfinite().all()


def test_a_constant_weight():
    for value in (0.0, 0.3):
        layer = PalettizedLinear(8, 8, bits=2)
        layer.weight.data.fill_(value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = layer(torch.eye(8))
        output.sum().backward()
        assert output.isfinite().all() and layer.weight.grad.isfinite().all()
        torch.testing.assert_close(layer.eval().pack().weight, layer.weight.detach())


def test_equal_centroids_part():
    x = torch.tensor([0.0, 0.1, 5.0, 5.2, 9.0, 9.8])[:, None]
    start = torch.tensor([[0.05], [5.1], [9.4], [9.4], [0.05]])
    parted, different = separate(x, start)
    assert different
    torch.testing.assert_close(parted.flatten().sort().values, torch.tensor([0.05, 5.0, 5.2, 9.0, 9.8]))
    vectors = torch.randn(40, 3)
    parted, different = separate(vectors, vectors[:1].expand(4, -1))
    assert different and len(parted.unique(dim=0)) == 4
    same, different = separate(torch.ones(4, 1), torch.ones(3, 1))
    assert not different and torch.equal(same, torch.ones(3, 1))
    parted, different = separate(x, torch.tensor([[0.0], [0.0], [5.0]]), keep_first=True)
    assert different and parted[0] == 0


def test_nothing_moves_where_all_differ():
    layer, _ = make("linear", "groups, the last short")
    layer.initialize()
    before = layer.centroids.clone()
    layer.palette.separate(layer.weight)
    assert torch.equal(layer.centroids, before)


def test_kmeans_of_vectors():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = (centres[:, None] + 0.1 * torch.randn(4, 50, 2)).flatten(0, 1)
    found = kmeans(points, 4)
    assert torch.equal(found, kmeans(points, 4)) and found.dtype == torch.float32
    means = points.view(4, 50, 2).mean(1)
    for row in means:
        assert (found - row).norm(dim=1).min() < 1e-5
    scalars = torch.randn(300, 1)
    best = ops.kmeans1d(scalars, 4)[1][0]
    inertia = ops.palettize(scalars, kmeans(scalars, 4)[None])[1][0]
    assert best <= inertia * (1 + 1e-5) and inertia < 1.5 * best
    assert kmeans(torch.ones(3, 2), 5).shape == (5, 2)
    assert kmeans(torch.randn(9, 2, dtype=torch.float64), 3).dtype == torch.float64


def test_kmeans_of_many_vectors(monkeypatch):
    monkeypatch.setattr(clustering, "SAMPLE", 64)
    points = torch.cat((torch.zeros(500, 2), torch.ones(500, 2)))
    assert sorted(kmeans(points, 2).tolist()) == [[0.0, 0.0], [1.0, 1.0]]


# ---------------------------------------------------------------------------------------------------------- packed


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes(bits):
    layer = PalettizedLinear(37, 8, bits=bits, group_rows=8, dtype=torch.bfloat16)
    packed = layer.pack()
    width = -(-37 * bits // 8)
    assert packed.labels.shape == (8, width) and packed.lut.shape == (1, 2**bits, 1)
    assert packed.palette.nbytes == 8 * width + 2 * 2**bits
    assert packed.nbytes == packed.palette.nbytes + 2 * 8
    assert packed.nbytes == stored_bytes(packed)


@every_option
@every_layer
def test_packed_state_survives(kind, options):
    layer, x = make(kind, options)
    packed = layer.pack()
    o = OPTIONS[options]
    how = {name: o[name] for name in ("bits", "group_rows", "cluster_dim") if name in o}
    how["scale"] = "per_channel_scale" in o
    empty = {
        "linear": lambda: PackedPalettizedLinear(20, 14, **how),
        "linear, more dimensions": lambda: PackedPalettizedLinear(20, 14, bias=False, **how),
        "conv": lambda: PackedPalettizedConv2d(4, 10, 3, padding=1, **how),
        "grouped conv": lambda: PackedPalettizedConv2d(4, 10, (3, 1), stride=2, groups=2, bias=False, **how),
        "circular conv": lambda: PackedPalettizedConv2d(4, 10, 3, padding=1, padding_mode="circular", **how),
        "same conv": lambda: PackedPalettizedConv2d(4, 10, 4, padding="same", **how),
        "embedding": lambda: PackedPalettizedEmbedding(30, 12, **how),
        "padded embedding": lambda: PackedPalettizedEmbedding(30, 12, -1, **how),
    }[kind]()
    empty.load_state_dict(safetensors.torch.load(safetensors.torch.save(packed.state_dict())))
    for twin in (empty, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(x), packed(x)) and repr(twin) == repr(packed)


@pytest.mark.parametrize(
    ("make", "stored", "own"),
    [
        (lambda **o: PackedPalettizedLinear(8, 8, bits=2, **o), {"group_rows": 3}, {"group_rows": 4}),
        (lambda shape: PackedPalettizedConv2d(2, 8, shape, bits=2), {"shape": (3, 1)}, {"shape": (1, 3)}),
        (lambda columns: PackedPalettizedLinear(columns, 8, bits=2), {"columns": 7}, {"columns": 8}),
        (lambda **o: PalettizedLinear(16, 8, bits=2, **o), {"group_rows": 4}, {"group_rows": 5}),
    ],
)
def test_a_state_of_another_geometry_is_refused(make, stored, own):
    """Labels and palettes may have the same shapes all the same."""
    stored, layer = make(**stored), make(**own)
    assert stored.palette.state_dict().keys() == layer.palette.state_dict().keys()
    before = {name: x.clone() for name, x in layer.palette.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"palette: the state must be of a weight \[8, .* with palettes of \d rows, got"
    ):
        layer.load_state_dict(stored.state_dict())
    assert all(torch.equal(x, before[name]) for name, x in layer.palette.state_dict().items())


def test_an_assigned_state_brings_its_dtype():
    packed = PalettizedLinear(16, 8, bits=2, dtype=torch.bfloat16).pack()
    empty = PackedPalettizedLinear(16, 8, bits=2, device="meta")
    empty.load_state_dict(packed.state_dict(), assign=True)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    assert empty.weight.dtype == torch.bfloat16 and torch.equal(empty(x), packed(x))


def test_the_palette_in_another_dtype():
    layer, x = make("linear", "one palette")
    layer(x)
    packed = layer.eval().pack(lut_dtype=torch.float16)
    assert (
        packed.lut.dtype == torch.float16 and packed.weight.dtype == torch.float32 and packed(x).dtype == torch.float32
    )
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-2, atol=1e-2)
    packed.bfloat16()
    assert packed.lut.dtype == packed.weight.dtype == packed(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_pass_a_packed_layer():
    layer, x = make("linear", "one palette")
    packed = layer.pack()
    x.requires_grad_()
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, packed.weight.sum(0).expand(3, -1))


def test_palettes_of_any_size():
    labels = torch.tensor([[0, 4], [2, 1]])
    packed = PackedPalette.from_labels(labels, torch.arange(5.0).view(1, 5, 1), (2, 2))
    assert packed.bits == 3 and packed.lut.shape == (1, 8, 1)
    assert torch.equal(packed.weight, labels.float())
    assert PackedPalette.from_labels(labels * 0, torch.ones(1, 1, 1), (2, 2)).bits == 1


def test_the_functions_behind():
    layer, x = make("linear", "groups, the last short")
    p = layer.pack().palette
    y = palettized_linear(x, p.labels, p.lut, None, layer.bias, group_rows=4)
    torch.testing.assert_close(y, F.linear(x, p.weight, layer.bias))
    rows = torch.tensor([13, 0, 5, 5])
    assert torch.equal(decode(p.labels, p.lut, columns=20, group_rows=4, rows=rows), p.weight[rows])


@pytest.mark.parametrize(
    ("options", "decoded"),
    [
        ({"bits": 2}, False),
        ({"bits": 3, "scale": True}, False),
        ({"bits": 2, "group_rows": 4}, False),  # 4, 4, 4, 2: as even as four palettes go
        ({"bits": 2, "group_rows": 11}, True),  # 11 and 3: the products would share out 7 and 7
        ({"bits": 2, "cluster_dim": 2}, True),
    ],
)
def test_a_linear_layer_decodes_only_where_it_must(monkeypatch, options, decoded):
    layer = PackedPalettizedLinear(20, 14, **options)
    layer.palette.labels.random_(0, 256)
    layer.palette.lut.normal_()
    if layer.palette.scale is not None:
        layer.palette.scale.uniform_()
    seen = []
    monkeypatch.setattr(
        "cofire.nn.palettes.decode", lambda *args, **kwargs: (seen.append(1), decode(*args, **kwargs))[1]
    )
    x = torch.randn(2, 3, 20)
    output = layer(x)
    assert bool(seen) == decoded
    torch.testing.assert_close(output, F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)
    assert layer(torch.randn(0, 20)).shape == (0, 14)


def test_an_embedding_decodes_only_what_is_asked_for(monkeypatch):
    layer = PalettizedEmbedding(1000, 8, bits=2).pack()
    seen = []
    unpack = importlib.import_module("cofire.nn.palettes").unpack_bits
    monkeypatch.setattr("cofire.nn.palettes.unpack_bits", lambda *args: (seen.append(args[0].shape), unpack(*args))[1])
    layer(torch.tensor([[1, 2], [3, 4]]))
    assert seen == [(4, 2)]


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: PalettizedLinear(8, 8, bits=0), ValueError, "Palette: bits must be between 1 and 8, got 0"),
        (lambda: PalettizedLinear(8, 8, bits=2.0), TypeError, "Palette: bits must be an integer, got 2.0"),
        (lambda: PalettizedLinear(8, 8, bits=True), TypeError, "Palette: bits must be an integer, got True"),
        (
            lambda: PalettizedLinear(8, 8, bit=2),
            TypeError,
            "PalettizedLinear: there is no option 'bit'; did you mean 'bits'",
        ),
        (
            lambda: PalettizedConv2d.from_module(nn.Conv2d(4, 4, 1), grup_rows=2),
            TypeError,
            "PalettizedConv2d: there is no option 'grup_rows'; did you mean 'group_rows'",
        ),
        (
            lambda: PackedPalettizedEmbedding(8, 8, cluster_dims=2),
            TypeError,
            "PackedPalettizedEmbedding: there is no option 'cluster_dims'; did you mean 'cluster_dim'",
        ),
        (lambda: PalettizedLinear(8, 8, group_rows=0), ValueError, "group_rows must be at least 1, or None, got 0"),
        (
            lambda: PalettizedLinear(8, 8, cluster_dim=3),
            ValueError,
            "rows of 8 weights do not divide into vectors of 3",
        ),
        (
            lambda: PalettizedLinear(8, 8, bits=4, group_rows=1),
            ValueError,
            "a group must have at least 16 weights for 16 clusters, got 1 rows of 8",
        ),
        (
            lambda: PalettizedLinear(8, 8, tau=1.0, rho=1.0),
            ValueError,
            "one of tau and rho may be given, got 1.0 and 1.0",
        ),
        (lambda: PalettizedLinear(8, 8, tau=0.0), ValueError, "Palette: tau must be positive and finite, got 0.0"),
        (
            lambda: PalettizedLinear(8, 8, rho=float("inf")),
            ValueError,
            "Palette: rho must be positive and finite, got inf",
        ),
        (lambda: PalettizedLinear(8, 8, rho="x"), TypeError, "Palette: rho must be a number, got 'x'"),
        (lambda: PalettizedLinear(8, 8, grad="x"), ValueError, "grad must be one of unroll, implicit, jfb, got 'x'"),
        (lambda: PalettizedLinear(8, 8, forward="x"), ValueError, "forward must be one of soft, hard_ste, got 'x'"),
        (lambda: PalettizedLinear(8, 8, update="x"), ValueError, "update must be one of forward, step, got 'x'"),
        (lambda: PalettizedLinear(8, 8, iterations=0), ValueError, "iterations must be between 1 and 1000, got 0"),
        (lambda: PalettizedLinear(8, 8, keep_sparsity=True), ValueError, "Palette: keep_sparsity needs enforce_zero"),
        (lambda: PalettizedLinear.from_module(nn.Conv2d(1, 1, 1)), TypeError, "module must be a Linear, got Conv2d"),
        (
            lambda: PalettizedEmbedding.from_module(nn.Embedding(8, 8, sparse=True), bits=2),
            ValueError,
            "PalettizedEmbedding: sparse must be False",
        ),
        (lambda: kmeans(torch.ones(3), 2), ValueError, r"vectors must have shape \[n, d\] and elements, got \[3\]"),
        (lambda: kmeans(torch.full((3, 2), torch.nan), 2), ValueError, "must be finite, got 6 NaN and 0 infinite"),
        (lambda: kmeans(torch.ones(3, 2), 0), ValueError, "kmeans: clusters must be at least 1, got 0"),
        (
            lambda: PalettizedLinear(8, 8, bits=2).pack(lut_dtype=torch.uint8),
            TypeError,
            "PackedPalette: lut_dtype must be int8 or a float of 16 to 64 bits, got torch.uint8",
        ),
        (
            lambda: PackedPalette.from_labels(torch.full((2, 2), 3), torch.ones(1, 3, 1), (2, 2)),
            ValueError,
            "labels must be between 0 and 2, got 3",
        ),
        (
            lambda: PackedPalette.from_labels(torch.zeros(2, 3), torch.ones(1, 3, 1), (2, 2)),
            ValueError,
            r"labels must be 2 rows of 2, got \[2, 3\]",
        ),
        (
            lambda: PackedPalette.from_labels(torch.zeros(2, 2), torch.ones(3, 3, 1), (2, 2)),
            ValueError,
            r"lut must hold 1 palettes, got \[3, 3, 1\]",
        ),
        (lambda: PackedPalette((2, 3), cluster_dim=2), ValueError, "rows of 3 weights do not divide into vectors of 2"),
        (
            lambda: PackedPalettizedLinear(4, 4)(torch.ones(2, 3)),
            ValueError,
            r"PackedPalettizedLinear: input must have 4 features, got \[2, 3\]",
        ),
        (
            lambda: PackedPalettizedLinear(4, 4)(torch.tensor(1.0)),
            ValueError,
            r"PackedPalettizedLinear: input must have 4 features, got \[\]",
        ),
        (
            lambda: PackedPalettizedEmbedding(8, 4, padding_idx=8),
            ValueError,
            "PackedPalettizedEmbedding: padding_idx must be between -8 and 7, or None, got 8",
        ),
        (
            lambda: PackedPalettizedEmbedding(8, 4)(torch.tensor([1.5])),
            TypeError,
            "PackedPalettizedEmbedding: input must be int32 or int64, got torch.float32",
        ),
        (lambda: PackedPalettizedEmbedding(8, 4)(torch.tensor([-1])), IndexError, "out of range"),
        (lambda: PackedPalettizedEmbedding(8, 4)(torch.tensor([8])), IndexError, "out of range"),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_nan_in_the_weight_is_named():
    layer, x = make("linear", "one palette")
    layer.initialize()
    layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^dkm: weight must be finite, got 1 NaN and 0 infinite values"):
        layer(x)
    layer.palette.parameter_name = "layers.0.weight"
    for call in (lambda: layer(x), layer.initialize):
        with pytest.raises(ValueError, match=r"^layers\.0\.weight: (dkm|kmeans1d): weight must be finite, got 1 NaN"):
            call()
    layer.eval()
    for call in (lambda: layer(x), layer.pack):
        with pytest.raises(ValueError, match=r"^layers\.0\.weight: palettize: weight must be finite, got 1 NaN"):
            call()


def test_representations():
    layer = PalettizedLinear(16, 8, bits=2, group_rows=4, grad="implicit")
    assert "bits=2, grad=implicit, group_rows=4" in repr(layer)
    assert "in_features=16, out_features=8, bias=True" in repr(layer.pack())
    assert "[8, 16], bits=2, group_rows=4, 64 bytes" in repr(layer.pack())
    assert isinstance(Palette((4, 4), bits=1).extra_repr(), str)


@pytest.mark.parametrize("module", ["cofire.nn.clustering", "cofire.nn.palettes"])
def test_the_examples_of_the_docstrings(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0 and results.failed == 0
