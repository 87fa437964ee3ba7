# SPDX-License-Identifier: Apache-2.0
"""The networks: their size, that fx can trace them, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cofire import models
from cofire.models.decoder import rotate
from cofire.nn import FullCache


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The counts are those of the papers' networks with ten classes, worked out by hand from their tables.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vgg16", 14_724_042),
        ("resnet20", 269_722),
        ("resnet56", 853_018),
        ("mobilenet_v1", 3_217_226),
        ("mobilenet_v2", 2_236_682),
    ],
)
def test_parameter_count(name: str, parameters: int) -> None:
    assert _count(models.build(name)) == parameters


@pytest.mark.parametrize("name", list(models.MODELS))
def test_fx_traces_every_model(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name).eval()
    x = torch.randn(2, 3, 32, 32)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(traced(x), expected)
    assert expected.shape == (2, 10)


def test_digits_cnn_has_the_stated_layers() -> None:
    model = models.digits_cnn()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(1, 32), (32, 64), (64, 64)]
    assert [i for i, m in enumerate(model.features) if isinstance(m, nn.MaxPool2d)] == [6]
    assert _count(models.digits_cnn((32, 128))) == 9 * 32 + 64 + 9 * 32 * 128 + 256 + 1290


def test_padded_shortcut_keeps_every_second_pixel() -> None:
    block = models.resnet20().layer2[0]
    x = torch.arange(2.0 * 16 * 16).reshape(2, 16, 4, 4)
    y = block.shortcut(x)
    assert y.shape == (2, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].count_nonzero() == y[:, 24:].count_nonzero() == 0


def test_width_multiplier_rounds_to_eight() -> None:
    small = models.mobilenet_v2(width=0.35)
    widths = {m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)}
    assert all(w % 8 == 0 for w in widths)
    assert max(widths) == 1280
    assert _count(models.mobilenet_v1(width=0.25)) < _count(models.mobilenet_v1()) / 10


def test_resnet_takes_the_usual_checkpoint_names() -> None:
    names = set(models.resnet20().state_dict())
    assert {"conv1.weight", "layer1.0.bn1.weight", "layer3.2.conv2.weight", "linear.bias"} <= names
    assert not any("shortcut" in name for name in names)


def test_digits_mlp_has_the_stated_layers() -> None:
    layers = [m for m in models.digits_mlp().modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in layers] == [(64, 256), (256, 256), (256, 10)]
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(models.digits_mlp().pool(x), x)


def test_char_transformer_looks_back_only() -> None:
    torch.manual_seed(0)
    model = models.char_transformer(20, width=16, depth=2, heads=2, context=12).eval()
    x = torch.randint(20, (2, 12))
    y = x.clone()
    y[:, 7:] = (y[:, 7:] + 1) % 20
    a, b = model(x), model(y)
    assert a.shape == (2, 12, 20)
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7], b[:, 7])
    torch.testing.assert_close(model(x[:, :5]), a[:, :5])
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), a)


def test_char_transformer_has_the_stated_size() -> None:
    model = models.char_transformer()
    assert model.head.weight is model.embed.weight
    # Embeddings; per block two norms, and attention and the two layers with their biases; the last norm.
    block = 4 * 128 + (128 * 384 + 384) + (128 * 128 + 128) + (128 * 512 + 512) + (512 * 128 + 128)
    assert _count(model) == 96 * 128 + 128 * 128 + 4 * block + 256


def test_decoder_looks_back_only_and_reads_in_pieces() -> None:
    model = models.decoder(20, width=16, depth=2, heads=4, kv_heads=2)
    x = torch.randint(20, (2, 12))
    y = x.clone()
    y[:, 7:] = (y[:, 7:] + 1) % 20
    a, b = model(x), model(y)
    assert a.shape == (2, 12, 20)
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7], b[:, 7])
    cache = FullCache()
    with torch.no_grad():
        pieces = torch.cat([model(piece, cache) for piece in x.split(5, 1)], 1)
    torch.testing.assert_close(pieces, a)


def test_decoder_sees_distances_and_no_places() -> None:
    """Without what came before, the products of a query and a key depend on how far apart they are."""
    attention = models.decoder(9, width=16, depth=1, heads=2).blocks[0].attention
    rotary = models.decoder(9, width=16, depth=1, heads=2).rotary
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 6, 8).unbind(0)
    products = [rotate(q, rotary(torch.arange(6) + start)) @ rotate(k, rotary(torch.arange(6))).mT for start in (0, 3)]
    torch.testing.assert_close(products[0][..., 3, :], products[1][..., 0, :])
    torch.testing.assert_close(products[0][..., 1, 0], products[0][..., 4, 3])
    assert not torch.allclose(products[0][..., 1, 0], products[0][..., 2, 0])
    # the turn keeps lengths, and the first position is not turned
    torch.testing.assert_close(rotate(q, rotary(torch.arange(6))).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rotate(q, rotary(torch.zeros(6))), q)
    assert attention.head_dim == 8 and rotary(torch.arange(6))[0].shape == (6, 8)


def test_decoder_has_the_stated_size() -> None:
    model = models.decoder(kv_heads=2)
    assert model.head.weight is model.embed.weight
    # Per block two norms, four projections (half as many features of keys and values), three matrices of 341 features.
    block = 2 * 128 + 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 341
    assert _count(model) == 96 * 128 + 4 * block + 128
    classifier = models.decoder(18, width=64, depth=2, heads=2, classes=10)
    assert _count(classifier) == 18 * 64 + 2 * (2 * 64 + 4 * 64 * 64 + 3 * 64 * 170) + 64 + 640


@torch.no_grad()
def test_decoder_reads_rows_of_different_lengths() -> None:
    model = models.decoder(20, width=16, depth=2, heads=2, classes=3)
    x = torch.randint(20, (2, 9))
    found = model(x, FullCache(), lengths=[9, 4])
    torch.testing.assert_close(found[0], model(x[:1])[0])
    torch.testing.assert_close(found[1], model(x[1:, :4])[0])
    cache = FullCache()
    model(x, cache, lengths=[9, 4])
    following = torch.randint(20, (2, 1))
    torch.testing.assert_close(
        model(following, cache)[1], model(torch.cat([x[1:, :4], following[1:]], 1))[0], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="Decoder: lengths need a cache"):
        model(x, lengths=[9, 4])


def test_vit_has_the_stated_layers() -> None:
    """Per block two norms, four projections and two layers; embeddings, last norm, head."""
    block = 4 * 64 + 4 * (64 * 64 + 64) + (64 * 128 + 128) + (128 * 64 + 64)
    tail = 2 * 64 + 64 * 10 + 10
    assert _count(models.digits_vit()) == (4 * 64 + 64) + 16 * 64 + 4 * block + tail
    assert _count(models.vit(class_token=True)) == (48 * 64 + 64) + 65 * 64 + 64 + 4 * block + tail
    deep = models.vit(16, 8, width=24, depth=2, heads=3, ratio=4, in_channels=1, num_classes=5)
    assert [tuple(m.weight.shape) for m in deep.blocks[1].modules() if isinstance(m, nn.Linear)] == [
        *[(24, 24)] * 4,
        (96, 24),
        (24, 96),
    ]
    assert deep(torch.randn(2, 1, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize("class_token", [False, True])
def test_vit_embeds_patches_and_attends_to_all(class_token: bool) -> None:
    torch.manual_seed(0)
    model = models.vit(8, 2, class_token=class_token, in_channels=2).eval()
    x = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    seen = []
    model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    y = model(x)
    assert torch.equal(seen[0][1, 5], x[1, :, 2:4, 2:4].flatten())  # patches in rows of four: the second of the second
    far = x.clone()
    far[:, :, 6:, 6:] += 1  # every patch counts for the answer
    assert not torch.allclose(model(far), y)
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(model(large), y)


def test_attention_of_the_vit_is_softmax_of_products() -> None:
    torch.manual_seed(0)
    layer = models.vit().blocks[0].attn
    x = torch.randn(2, 5, 64)
    parts = [p(x).view(2, 5, 4, 16) for p in (layer.q, layer.k, layer.v)]
    weights = (torch.einsum("bihd,bjhd->bhij", *parts[:2]) / 4).softmax(-1)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, parts[2]).flatten(2)
    torch.testing.assert_close(layer(x), layer.proj(mixed))


def test_pvt_reduces_keys_and_values_by_stage() -> None:
    torch.manual_seed(0)
    model = models.pvt().eval()
    grids, keys = [], []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, y: grids.append(tuple(y.shape)))
        attention = stage.blocks[0].attn
        attention.kv.register_forward_pre_hook(lambda module, args: keys.append(args[0].shape[1]))
    x = torch.randn(2, 3, 32, 32)
    y = model(x)
    assert grids == [(2, 32, 8, 8), (2, 64, 4, 4), (2, 128, 2, 2)]
    assert keys == [4, 4, 4]
    far = x.clone()
    far[:, :, 28:, 28:] += 1
    assert not torch.allclose(model(far), y)
    small = models.pvt(8, 1, widths=(16, 24), depths=(2, 1), heads=(2, 3), reductions=(2, 1), in_channels=1)
    assert small(torch.randn(2, 1, 8, 8)).shape == (2, 10) and len(small.stages[0].blocks) == 2


def test_vision_language_reads_the_image_before_the_text() -> None:
    torch.manual_seed(0)
    model = models.vision_language(8, 2, vocabulary=9, width=16, depth=2, heads=2).eval()
    images, text = torch.randn(2, 1, 8, 8), torch.randint(1, 9, (2, 6))
    logits = model(images, text)
    assert logits.shape == (2, 6, 9)
    seen = []
    model.see.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    later = text.clone()
    later[:, 4:] = later[:, 4:] % 8 + 1
    torch.testing.assert_close(model(images, later)[:, :4], logits[:, :4])
    assert not torch.allclose(model(images, later)[:, 4], logits[:, 4])
    assert torch.equal(seen[0][1, 5], images[1, :, 2:4, 2:4].flatten())
    far = images.clone()
    far[:, :, 6:, 6:] += 1
    assert not torch.allclose(model(far, text)[:, 0], logits[:, 0])
    # Padding behind the text changes nothing of it.
    padded = torch.cat([text, torch.zeros_like(text)], 1)
    torch.testing.assert_close(model(images, padded, lengths=torch.tensor([6, 6]))[:, :6], logits)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"vision_language: width must be an even multiple of heads \(4\), got 100"):
        models.vision_language(width=100)
    with pytest.raises(ValueError, match=r"vision_language: image must be a multiple of patch \(3\), got 16"):
        models.vision_language(patch=3)
    with pytest.raises(ValueError, match="vision_language: in_channels must be at least 1, got 0"):
        models.vision_language(in_channels=0)
    with pytest.raises(ValueError, match="pvt: stage 1 cannot divide 8 pixels a side by 2, and then by 3"):
        models.pvt(reductions=(1, 3, 1))
    with pytest.raises(ValueError, match="must have an entry for each stage"):
        models.pvt(widths=(8, 8))
    with pytest.raises(ValueError, match=r"pvt: depths\[1\] must be at least 1, got 0"):
        models.pvt(depths=(1, 0, 1))
    with pytest.raises(ValueError, match="widths must be multiples of heads, got 32 and 3 in stage 0"):
        models.pvt(heads=(3, 2, 4))
    with pytest.raises(ValueError, match=r"vit: image must be a multiple of patch \(3\), got 8"):
        models.vit(8, 3)
    with pytest.raises(ValueError, match=r"vit: width must be a multiple of heads \(3\), got 64"):
        models.vit(heads=3)
    with pytest.raises(ValueError, match="vit: depth must be at least 1, got 0"):
        models.vit(depth=0)
    with pytest.raises(ValueError, match=r"widths must be positive integers, got \[8, 0\]"):
        models.digits_mlp([8, 0])
    with pytest.raises(ValueError, match=r"width must be a multiple of heads \(3\), got 128"):
        models.char_transformer(heads=3)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        models.char_transformer(depth=0)
    with pytest.raises(ValueError, match="decoder: vocabulary must be at least 1, got 0"):
        models.decoder(0)
    with pytest.raises(ValueError, match=r"decoder: width must be an even multiple of heads \(4\), got 12"):
        models.decoder(width=12)
    with pytest.raises(ValueError, match=r"decoder: kv_heads must divide heads \(4\), got 3"):
        models.decoder(kv_heads=3)
    with pytest.raises(ValueError, match="decoder: classes must be at least 1, got 0"):
        models.decoder(classes=0)
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 2 with n >= 1, got 21"):
        models.resnet(21)
    with pytest.raises(ValueError, match="positive widths or 'pool', got -3"):
        models.vgg([8, -3])
    with pytest.raises(ValueError, match=r"name must be one of .*resnet20.*, got 'alexnet'"):
        models.build("alexnet")
