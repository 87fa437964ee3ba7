# SPDX-License-Identifier: Apache-2.0
"""Shift layers, binary attention and the mixture: gradients, packing, fitting, routing, state, and what is refused."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from cofire import ops
from cofire.nn import BinaryLinearAttention, MixtureOfPrimitives, PackedMixture, QuantLinear, ShiftLinear
from cofire.nn.shift_add import supervised_hash

LN2 = math.log(2)


def attention(encoder="hash", *, fit=True, **options):
    layer = BinaryLinearAttention(16, 2, encoder=encoder, bits=8, anchors=6, topk=4, kernel_size=3, **options)
    return layer.fit(torch.randn(4, 7, 16)) if fit else layer


# ----------------------------------------------------------------------------------------------------- ShiftLinear


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("format", ["S5", "S4", "S8"])
def test_gradients_are_those_of_the_paper(training, format):
    """dX = dY W, d sign = G, d shift = ln 2 G W, d b = sum dY with G = dY^T X: whichever product is taken."""
    layer = ShiftLinear(7, 5, format=format).train(training)
    with torch.no_grad():
        layer.shift.uniform_(-16, 1)
        layer.sign.uniform_(-1.6, 1.6)
    x, dy = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 5)
    y = layer(x)
    y.backward(dy)
    weight = ops.dequantize(layer.qweight)
    assert torch.equal(layer.weight, weight) and layer.dead > 0
    torch.testing.assert_close(y, F.linear(x, weight, layer.bias))
    g = torch.einsum("abo,abi->oi", dy, x)
    for found, expected in (
        (x.grad, dy @ weight),
        (layer.sign.grad, g),
        (layer.shift.grad, LN2 * g * weight),
        (layer.bias.grad, dy.sum((0, 1))),
    ):
        torch.testing.assert_close(found, expected)
    assert (layer.shift.grad[weight == 0] == 0).all() and (layer.sign.grad != 0).all()


def test_edge_values_of_the_quantiser():
    layer = ShiftLinear(6, 1, bias=False).eval()
    with torch.no_grad():
        layer.shift.copy_(torch.tensor([[-2.5, -3.5, -20.0, 3.0, -1.0, -1.0]]))
        layer.sign.copy_(torch.tensor([[1.0, -0.51, 0.7, 2.0, 0.5, -0.5]]))
    expected = [0.25, -(2.0**-4), 2.0**-14, 1.0, 0.0, 0.0]
    assert layer.weight.tolist() == [expected] and layer.decoded().tolist() == [expected]
    assert layer.statistics() == {"weights": 6, "dead": 2, "clipped": 1}  # 2^-14, in S4
    assert layer.clamp_().shift.tolist() == [[-2.5, -3.5, -14.0, 0.0, -1.0, -1.0]]


def test_s4_trains_on_what_it_packs():
    layer = ShiftLinear(4, 1, bias=False, format="S4")
    with torch.no_grad():
        layer.shift.copy_(torch.tensor([[-1.0, -7.0, -8.0, -9.0]]))
        layer.sign.fill_(1)
    assert layer.weight.tolist() == [[0.5, 2.0**-7, 2.0**-7, 0.0]]
    assert torch.equal(layer.weight, ops.dequantize(layer.qweight))
    assert layer.statistics()["clipped"] == 2


def test_starts_as_a_linear_layer_without_dead_weights():
    torch.manual_seed(3)
    dense = nn.Linear(20, 30)
    torch.manual_seed(3)
    layer = ShiftLinear(20, 30)
    assert layer.dead == 0 and bool((layer.sign.abs() >= 0.5).all())
    assert torch.equal(layer.shift, dense.weight.abs().log2().round())
    taken = ShiftLinear.from_dense(dense)
    assert torch.equal(taken.weight, layer.weight) and torch.equal(taken.bias, dense.bias)
    assert taken.bias is not dense.bias and taken.weight.shape == dense.weight.shape
    with torch.no_grad():
        dense.weight[0] = 0
    assert ShiftLinear.from_dense(dense).dead == 20
    assert ShiftLinear.from_dense(nn.Linear(3, 2, bias=False).double()).shift.dtype == torch.float64


def test_the_packed_weight_follows_the_parameters():
    layer = ShiftLinear(8, 4).eval()
    x = torch.randn(3, 8)
    first = layer.qweight
    assert layer.qweight is first and layer.decoded() is layer.decoded()
    with torch.no_grad():
        layer.shift[0] = -1.0
        layer.sign[0] = -1.0
    assert layer.qweight is not first
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    other = ShiftLinear(8, 4).eval()
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), other(x))
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.sign.neg_()
    assert torch.equal(copied.weight, -layer.weight) and not torch.equal(copied(x), layer(x))
    layer.double()
    assert layer.qweight.dtype == torch.float64 and layer(x.double()).dtype == torch.float64


def test_int8_activations_are_those_of_the_operator():
    layer = ShiftLinear(16, 4, format="S4", activations="int8")
    x = torch.randn(5, 16)
    trained = layer(x)
    layer.eval()
    expected = ops.shift_linear(x, layer.qweight, layer.bias, activations="int8")
    assert torch.equal(layer(x), expected)
    torch.testing.assert_close(trained, expected)
    assert not torch.allclose(trained, F.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-6)
    packed = layer.pack()
    assert isinstance(packed, QuantLinear) and torch.equal(packed(x), expected)
    assert packed.nbytes == layer.nbytes


@pytest.mark.parametrize("format", ["S5", "S4", "S8"])
def test_pack_is_smaller_and_loads(format):
    layer = ShiftLinear(64, 32, bias=False, format=format).eval()
    packed = layer.pack()
    bits = int(format[1])
    assert packed.qweight.codes.nbytes == 64 * 32 * bits // 8
    assert packed.nbytes < 64 * 32 * 4 / 2.5
    x = torch.randn(2, 64)
    torch.testing.assert_close(packed(x), layer(x))
    state = safetensors.torch.load(safetensors.torch.save(packed.state_dict()))
    for again in (
        QuantLinear(64, 32, bias=False, group_size=None),
        ShiftLinear(64, 32, bias=False, format="S8").pack(),
    ):
        again.load_state_dict(state)
        assert torch.equal(again(x), packed(x)) and again.format == packed.format == f"shift_{format.lower()}"
        for found, expected in zip(ops.unpack_shift(again.qweight), ops.unpack_shift(layer.qweight), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(ops.shift_linear(x, again.qweight), packed(x))


def test_shift_layers_differentiate_twice_and_compile():
    layer = ShiftLinear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: ShiftLinear(4, 4, format="S6"), ValueError, "ShiftLinear: format must be one of S5, S4, S8, got 'S6'"),
        (lambda: ShiftLinear(4, 4, activations="int8"), ValueError, "int8 activations need format S4, got 'S5'"),
        (lambda: ShiftLinear(4.0, 4), TypeError, "in_features must be an integer, got 4.0"),
        (lambda: ShiftLinear.from_dense(nn.ReLU()), TypeError, "must be a linear layer, got ReLU"),
        (
            lambda: ShiftLinear(4, 4)(torch.ones(2, 4, dtype=torch.int64)),
            TypeError,
            "ShiftLinear: input must be a floating-point tensor, got torch.int64",
        ),
        (
            lambda: MixtureOfPrimitives(4, 4)(torch.ones(2, 4, dtype=torch.int32)),
            TypeError,
            "MixtureOfPrimitives: input must be a floating-point tensor, got torch.int32",
        ),
        (
            lambda: MixtureOfPrimitives(4, 4).pack()(torch.ones(2, 4, dtype=torch.int32)),
            TypeError,
            "PackedMixture: input must be a floating-point tensor",
        ),
        (lambda: MixtureOfPrimitives(4, 4)(torch.ones(2, 3)), ValueError, r"must have shape \[..., 4\], got \[2, 3\]"),
        (
            lambda: MixtureOfPrimitives(4, 4, alpha=(6, 4, 2)),
            ValueError,
            r"alpha must be two positive numbers, one for each of two experts, or None, got \(6, 4, 2\)",
        ),
        (lambda: MixtureOfPrimitives(4, 4, alpha=(6, 0)), ValueError, "alpha must be two positive numbers"),
        (lambda: BinaryLinearAttention(16, 3), ValueError, r"num_heads \(3\)"),
        (lambda: BinaryLinearAttention(16, 2, encoder="none"), ValueError, "encoder must be one of hash, binary"),
        (lambda: BinaryLinearAttention(16, 2, bits=65), ValueError, "bits must be between 1 and 64, got 65"),
        (lambda: BinaryLinearAttention(16, 2, topk=0), ValueError, "topk must be at least 1, got 0"),
        (lambda: BinaryLinearAttention(16, 2, kernel_size=4), ValueError, "kernel_size must be odd, or 0"),
        (lambda: BinaryLinearAttention(16, 2, momentum=0), ValueError, r"momentum must be in \(0, 1\], got 0"),
        (
            lambda: BinaryLinearAttention(160, 2, encoder="binary"),
            ValueError,
            "has a bit for each of the 80 features of a head, at most 64",
        ),
        (
            lambda: attention(fit=False)(torch.randn(1, 7, 16)),
            RuntimeError,
            r"the encoder knows no data yet: call fit\(x\)",
        ),
        (lambda: attention(fit=False).encode(torch.randn(1, 7, 16)), RuntimeError, "the encoder knows no data yet"),
        (
            lambda: attention("binary", fit=False)(torch.randn(1, 7, 16)),
            RuntimeError,
            "the encoder knows no data yet",
        ),
        (
            lambda: attention(fit=False).fit(torch.randn(1, 5, 16)),
            ValueError,
            "input must have at least as many tokens as its 6 anchors, got 5",
        ),
        (
            lambda: attention(fit=False).fit(torch.randn(1, 7, 16)),
            ValueError,
            r"at least as many tokens as twice its topk \(4\), got 7",
        ),
        (lambda: attention()(torch.ones(1, 7, 16, dtype=torch.int64)), TypeError, "input must be a floating-point"),
        (lambda: attention()(torch.randn(7, 16)), ValueError, r"input must have shape \[B, N, 16\], got \[7, 16\]"),
        (
            lambda: attention()(torch.randn(2, 7, 16), torch.ones(7, 7)),
            TypeError,
            "takes sizes of a grid beside the input, and no mask; got Tensor",
        ),
    ],
)
def test_refusals(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


# ------------------------------------------------------------------------------------------ BinaryLinearAttention


def test_the_hash_step_by_step():
    """From the buffers to the output, written out with float codes."""
    layer = attention().eval()
    x = torch.randn(3, 9, 16)
    z = F.normalize(layer.qk(x).view(3, 9, 2, 8).transpose(1, 2), dim=-1)
    v = layer.v(x).view(3, 9, 2, 8).transpose(1, 2)
    distance = (z[:, :, :, None] - layer.anchors[:, None]).square().sum(-1)
    sigma = distance.mean((2, 3), keepdim=True)
    features = torch.exp(-distance / (2 * sigma)) - layer.center[:, None]
    bits = (torch.einsum("bhnm,hkm->bhnk", features, layer.projection) > 0).float()
    codes = (bits.long() << torch.arange(8)).sum(-1).to(torch.int16)
    assert torch.equal(layer.encode(x), codes)
    t = v / 2 + bits @ (bits.transpose(2, 3) @ v) / math.pi
    out = F.normalize(t, dim=-1)
    conv = F.conv1d(
        v.transpose(2, 3).reshape(-1, 2 * 8, 9),
        layer.mix.repeat_interleave(8, 0)[:, None],
        padding=1,
        groups=2 * 8,
    )
    out = out + conv.view(3, 2, 8, 9).transpose(2, 3)
    expected = layer.proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_anchors_are_tokens_and_centers_their_mean_similarity():
    layer, x = BinaryLinearAttention(16, 2, bits=8, anchors=6, topk=4), torch.randn(4, 7, 16)
    assert layer.fit(x) is layer and layer.is_fitted
    z = F.normalize(layer.qk(x).view(4, 7, 2, 8).transpose(1, 2), dim=-1)
    for head in range(2):
        nearest = (layer.anchors[head] @ z[:, head].reshape(-1, 8).T).amax(1)
        torch.testing.assert_close(nearest, torch.ones(6))
    distance = (z[:, :, :, None] - layer.anchors[:, None]).square().sum(-1)
    kernel = torch.exp(-distance / (2 * distance.mean((2, 3), keepdim=True)))
    torch.testing.assert_close(layer.center, kernel.mean((0, 2)))
    before = layer.projection.clone()
    layer.fit(x)
    assert torch.equal(layer.projection, before)
    assert not torch.equal(layer.fit(x, seed=1).projection, before)


def test_fitted_codes_agree_where_tokens_are_similar():
    """Of tokens in clusters, neighbours by Hamming distance are neighbours by angle: at least twice chance, and more than
    random directions find."""
    centres = F.normalize(torch.randn(12, 16), dim=1)
    x = (centres[torch.arange(240) % 12] + 0.15 * torch.randn(240, 16)).view(8, 30, 16)
    layer = BinaryLinearAttention(16, 1, bits=16, anchors=12, topk=10).fit(x)
    z = F.normalize(layer.qk(x), dim=-1).flatten(0, 1)

    def overlap(layer):
        codes = layer.encode(x).transpose(0, 1).flatten(1)
        hamming = ops.hamming_similarity(codes, codes, bits=16)[0].float()
        near = (z @ z.T).topk(10).indices
        found = hamming.topk(10).indices
        return (near[:, :, None] == found[:, None]).any(2).float().mean()

    fitted = overlap(layer)
    with torch.no_grad():
        layer.projection.copy_(torch.randn_like(layer.projection))
    assert fitted > 2 * 10 / 240
    assert fitted > overlap(layer)


def test_supervised_hash_explains_the_target():
    """The bits' agreement follows similarity better than that of the directions that the ascent starts at."""
    rows = F.normalize(torch.randn(1, 60, 5), dim=2)
    features = torch.exp(rows @ rows[:, :8].transpose(1, 2)) - 1
    features = features - features.mean(1, keepdim=True)

    def error(iterations):
        y = torch.where(features @ supervised_hash(rows, features, 8, 6, iterations).transpose(1, 2) > 0, 1.0, -1.0)
        agreement = (y @ y.transpose(1, 2) / 8)[0]
        similarity = (rows @ rows.transpose(1, 2))[0]
        pairs = torch.stack([agreement.flatten(), similarity.flatten()])
        return float(torch.corrcoef(pairs)[0, 1])

    assert error(100) >= error(0) - 0.05
    assert error(100) > 0.5
    found = supervised_hash(rows, features, 4, 6)
    assert found.shape == (1, 4, 8) and bool(found.isfinite().all())


@pytest.mark.parametrize("encoder", ["hash", "binary"])
def test_gradients_reach_every_parameter(encoder):
    layer = attention(encoder)
    x = torch.randn(2, 7, 16, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x.clone()))


@pytest.mark.parametrize("encoder", ["hash", "binary"])
@pytest.mark.parametrize("training", [True, False])
def test_a_sample_does_not_depend_on_its_batch(encoder, training):
    layer = attention(encoder).train(training)
    x = torch.randn(5, 7, 16)
    alone = torch.cat([layer(part) for part in x.split(1)])
    torch.testing.assert_close(layer(x), alone)


def test_running_thresholds_follow_the_means_of_training():
    layer = attention("binary", momentum=0.25)
    before = layer.threshold.clone()
    batches = [torch.randn(2, 7, 16) + 1, torch.randn(2, 7, 16) + 1]
    means = []
    for x in batches:
        layer(x)
        pair = [F.normalize(p(x).view(2, 7, 2, 8), dim=-1).mean((0, 1, 3)) for p in (layer.q, layer.k)]
        means.append(torch.stack(pair))
    assert torch.equal(layer.threshold, before)
    layer.step()
    torch.testing.assert_close(layer.threshold, 0.75 * before + 0.25 * (means[0] + means[1]) / 2)
    assert layer.threshold_count == 0
    moved = layer.threshold.clone()
    layer.eval()(batches[0])
    layer.step()  # nothing was seen in training
    assert torch.equal(layer.threshold, moved)
    x = batches[0]
    unit = F.normalize(layer.q(x).view(2, 7, 2, 8).transpose(1, 2), dim=-1)
    bits = (unit > layer.threshold[0][:, None, None]).long()
    assert torch.equal(layer.encode(x).long(), (bits << torch.arange(8)).sum(-1))


@pytest.mark.parametrize("encoder", ["hash", "binary"])
def test_the_state_carries_the_fit(encoder):
    layer, other = attention(encoder), attention(encoder, fit=False)
    x = torch.randn(2, 7, 16)
    other.load_state_dict(layer.state_dict())
    assert other.is_fitted and copy.deepcopy(layer).is_fitted
    assert torch.equal(other(x), layer(x))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))
    layer.load_state_dict(attention(encoder, fit=False).state_dict())
    assert not layer.is_fitted
    names = {"hash": {"anchors", "center", "projection"}, "binary": {"threshold", "threshold_sum", "threshold_count"}}
    assert set(dict(layer.named_buffers())) == names[encoder] | {"fitted"}


def test_forms_of_the_attention():
    x = torch.randn(2, 7, 16)
    plain = attention(project=False)
    assert plain.proj is None and plain(x).shape == (2, 7, 16)
    bare = BinaryLinearAttention(16, 2, bias=False, bits=8, anchors=6, topk=4, kernel_size=0).fit(torch.randn(4, 7, 16))
    assert bare.mix is None and bare.v.bias is None
    heads = bare.v(x).view(2, 7, 2, 8)
    assert bare(x, 7, 1).shape == bare(x, (7, 1)).shape == (2, 7, 16)
    assert heads.shape == (2, 7, 2, 8)
    wide = BinaryLinearAttention(16, 2, bits=40, anchors=6, topk=4).fit(torch.randn(4, 7, 16))
    assert wide.encode(x).dtype == torch.int64
    half = attention().to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16 and half.is_fitted
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention()(x).isfinite().all()


@pytest.mark.parametrize("encoder", ["hash", "binary"])
def test_rows_without_a_direction_are_finite_or_refused(encoder):
    layer = attention(encoder, bias=False, check=True)
    x = torch.randn(2, 7, 16)
    x[0, 3] = 0
    with pytest.raises(ValueError, match=r"quer.* must be finite and not 0, got 2 rows that are not, of 28"):
        layer(x)
    layer.check = False
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    layer.check = True
    with pytest.raises(ValueError, match=r"values must be finite, got 28 rows that are not, of 28"):
        layer(torch.full((2, 7, 16), math.inf))


@pytest.mark.parametrize("encoder", ["hash", "binary"])
def test_sums_without_a_direction_are_zero_or_refused(encoder):
    """Of values that are all 0, and of values whose sums have a norm that is beyond fp32."""
    layer, x = attention(encoder, check=True, project=False), torch.randn(2, 7, 16)
    layer(x)
    sentence = "sums of values must be finite and not 0, got 28 rows that are not, of 28"
    with torch.no_grad():
        layer.v.weight.zero_()
        layer.v.bias.zero_()
    with pytest.raises(ValueError, match=sentence):
        layer(x)
    layer.check = False
    assert (layer(x) == 0).all()
    with torch.no_grad():
        layer.mix.zero_()
        layer.v.bias.fill_(3e18)
    lost = int((layer(x) == 0).view(2, 7, 2, 8).all(3).sum())
    assert lost > 0
    layer.check = True
    with pytest.raises(
        ValueError, match=f"sums of values must be finite and not 0, got {lost} rows that are not, of 28"
    ):
        layer(x)


def test_a_packed_state_of_another_version_is_refused():
    packed = mixture().pack()
    state = packed.state_dict()
    state["shift.geometry"] = state["shift.geometry"].clone()
    state["shift.geometry"][5] = 3
    with pytest.raises(RuntimeError, match="shift: the layout of the state must have a version of 1 to 2, got 3"):
        packed.load_state_dict(state)


def _fit_on_two(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    hash, binary = attention(fit=False), attention("binary", fit=False)
    x = torch.randn(4, 7, 16) + rank
    for layer in (hash, binary):
        layer.fit(x)
    fitted = binary.threshold.clone()
    binary(x)
    binary.step()
    torch.save({**hash.state_dict(), **binary.state_dict(), "before": fitted}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_hash_and_thresholds(tmp_path):
    torch.multiprocessing.spawn(_fit_on_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in ("anchors", "center", "projection", "before", "threshold"):
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["before"], first["threshold"])


# ---------------------------------------------------------------------------------------------------- mixture


def mixture(**options):
    layer = MixtureOfPrimitives(8, 6, alpha=(6, 4), **options)
    with torch.no_grad():
        layer.router.weight.normal_()
    return layer


def test_the_mixture_token_by_token():
    layer, x = mixture().eval(), torch.randn(3, 5, 8)
    y = layer(x)
    assert y.shape == (3, 5, 6)
    experts = (layer.dense, layer.shift)
    chosen = set()
    for out, token in zip(y.view(-1, 6), x.view(-1, 8), strict=True):
        p = layer.router(token).softmax(0)
        e = int(p.argmax())
        chosen.add(e)
        torch.testing.assert_close(out, p[e] * experts[e](token))
    assert chosen == {0, 1} and layer.balance_loss is None


def test_the_task_and_the_balance_train_the_router():
    layer, x = mixture(), torch.randn(64, 8)
    y = layer(x)
    (task,) = torch.autograd.grad(y.square().sum(), layer.router.weight, retain_graph=True)
    assert task.abs().sum() > 0
    pair = [layer.router.weight, layer.noise.weight]
    found = torch.autograd.grad(layer.balance_loss, pair, retain_graph=True)
    assert all(g.abs().sum() > 0 for g in found)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    quiet = mixture(noise=False)
    quiet(x)
    p = quiet.router(x).softmax(1).sum(0) * torch.tensor([6.0, 4.0])
    torch.testing.assert_close(quiet.balance_loss, p.var() / p.mean() ** 2)


def test_equal_logits_take_the_shift_expert_and_an_expert_may_be_empty():
    layer = MixtureOfPrimitives(8, 6)
    x = torch.randn(4, 8)
    layer.eval()
    assert layer.route(x)[2].tolist() == [0, 4]
    torch.testing.assert_close(layer(x), layer.shift(x) / 2)
    with torch.no_grad():
        layer.router.weight[0] = x.sum(0)
        layer.router.weight[1] = -x.sum(0)
    only = x.sum(0, keepdim=True).expand(3, 8)
    assert layer.route(only)[2].tolist() == [3, 0]
    layer.train()(only).sum().backward()
    assert layer(torch.randn(0, 8)).shape == (0, 6) and layer.balance_loss.isfinite()


def test_noise_is_drawn_in_training_alone():
    layer, x = mixture(), torch.randn(50, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    quiet = mixture(noise=False)
    assert quiet.noise is None and torch.equal(quiet(x), quiet(x))


def test_starting_from_a_layer_keeps_what_it_computes():
    linear, x = nn.Linear(8, 6), torch.randn(5, 8)
    layer = MixtureOfPrimitives.from_dense(linear)
    with torch.no_grad():
        torch.testing.assert_close(layer.dense(x) / 2, linear(x))
        torch.testing.assert_close(layer.shift(x) / 2, ShiftLinear.from_dense(linear)(x))
    assert linear.weight.data_ptr() != layer.dense.weight.data_ptr()
    shift = ShiftLinear(8, 6)
    layer = MixtureOfPrimitives.from_dense(shift).eval()
    torch.testing.assert_close(layer(x), shift(x))
    assert torch.equal(layer.dense.weight, layer.shift.weight)


def test_measured_latencies_are_averaged_and_can_be_overridden():
    layer = MixtureOfPrimitives(16, 8)
    assert layer.costs.tolist() == [1, 1] and layer.measured == 0
    first = layer.measure(64)
    assert min(first) > 0 and layer.latency.tolist() == pytest.approx(first)
    second = layer.measure(64, momentum=0.5)
    assert layer.costs.tolist() == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    other = MixtureOfPrimitives(16, 8, alpha=(6, 4))
    other.load_state_dict(layer.state_dict())
    assert other.measured == 2 and other.costs.tolist() == [6, 4]
    x = torch.randn(40, 16)
    torch.manual_seed(0)
    other(x)
    torch.manual_seed(0)
    layer(x)
    assert layer.balance_loss != other.balance_loss


def test_what_is_measured_is_what_runs(monkeypatch):
    """Of the products of the mixture, deployed or not, each with all tokens in one expert, in turns; of no other."""
    layer, x = mixture(), torch.randn(20, 8)
    calls, product = [], ops.moe2_linear

    def watched(x, dense, shift, *rest):
        calls.append((x.shape[0], dense, shift, rest[-1].tolist()))
        return product(x, dense, shift, *rest)

    monkeypatch.setattr(ops, "moe2_linear", watched)
    for other in ("shift_linear", "qlinear"):
        monkeypatch.setattr(ops, other, None)
    layer.measure(48)
    assert [counts for *_, counts in calls] == [[48, 0], [0, 48]] * (len(calls) // 2) and len(calls) >= 40
    timed = calls.pop()
    for form in (layer.eval(), layer.pack()):
        form(x)
        _, dense, shift, counts = calls.pop()
        assert sum(counts) == 20 and torch.equal(dense, timed[1]) and torch.equal(shift, timed[2])


def test_the_packed_mixture_says_what_it_holds():
    packed, x = mixture(format="S4").pack(), torch.randn(20, 8)
    packed(x)
    assert packed.decoded() is packed.decoded()
    assert packed.resident_nbytes == packed.nbytes + packed.decoded().nbytes == packed.nbytes + 6 * 8 * 4
    half = packed.to(torch.bfloat16)
    half(x.bfloat16())
    assert half.resident_nbytes - half.nbytes == half.decoded().nbytes == 6 * 8 * 2


def test_the_mixture_packs_copies_and_saves():
    layer, x = mixture(), torch.randn(20, 8)
    layer(x)
    assert copy.deepcopy(layer).balance_loss is None
    layer.eval()
    expected = layer(x)
    packed = layer.pack()
    assert isinstance(packed, PackedMixture) and isinstance(packed.shift, QuantLinear)
    assert torch.equal(packed(x), expected)
    again = mixture().pack()
    again(x)
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), expected)
    assert packed.nbytes == sum(t.nbytes for t in packed.state_dict().values()) - packed.shift.geometry.nbytes
    with torch.no_grad():
        layer.dense.weight.zero_()
    assert torch.equal(packed(x), expected) and torch.equal(copy.deepcopy(packed)(x), expected)


def test_the_mixture_compiles_without_a_break():
    layer, x = mixture(noise=False), torch.randn(20, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), layer(x))


def test_docstrings():
    module = importlib.import_module("cofire.nn.shift_add")
    assert doctest.testmod(module).failed == 0
