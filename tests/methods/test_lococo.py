# SPDX-License-Identifier: Apache-2.0
"""LoCoCo: what is trained and how gradients flow, what is refused, what it costs, and the protocol of the methods."""

from __future__ import annotations

import copy
import doctest
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import models
from cofire.methods import METHODS, LoCoCo, QLoRA
from cofire.methods.lococo import CompressingDecoder, read
from cofire.nn import FullCache, HeavyHitterCache, KVFusion, LoRALinear, QLoRALinear
from methods.protocol import check_protocol

torch.manual_seed(0)
BATCH = (torch.randint(12, (8, 22)), torch.randint(4, (8,)))


def classifier() -> nn.Module:
    return models.decoder(12, width=16, depth=1, heads=2, kv_heads=1, classes=4)


def decoder() -> nn.Module:
    return models.decoder(12, width=16, depth=2, heads=2, kv_heads=1)


def method(**changes: Any) -> LoCoCo:
    return LoCoCo(**{"capacity": 6, "taps": 3, "buffer": 0, "chunk": 6, "std": 0.1, **changes})


#: All but the check that a method's own loss trains something: this method's loss is zero by design.
SHORT = (BATCH[0][:, :14], BATCH[1])  # three chunks, and a compression before the last
PROTOCOL = [check for check in check_protocol(method, classifier, SHORT) if check.id != "loss_reaches_something"]


@pytest.mark.parametrize("check", PROTOCOL)
def test_protocol(check: Callable[[], None]) -> None:
    check()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def shifted_loss(model: CompressingDecoder, tokens: Tensor) -> Tensor:
    """As published: the first token of a chunk is no target."""
    logits, chunk = model(tokens), model.method.chunk
    losses = [
        F.cross_entropy(a[:, :-1].flatten(0, 1), b[:, 1:].flatten(), reduction="sum")
        for a, b in zip(logits.split(chunk, 1), tokens.split(chunk, 1), strict=True)
    ]
    pieces = [len(tokens) * (piece.shape[1] - 1) for piece in tokens.split(chunk, 1)]
    return sum(losses) / sum(pieces)


def test_the_defaults_are_the_papers() -> None:
    assert METHODS["lococo"] is LoCoCo
    m = LoCoCo()
    assert (m.capacity, m.keep, m.taps, m.buffer, m.chunk, m.bptt) == (512, 0.5, 21, 16, 512, 1)
    assert (m.merged, m.heavy, m.local, m.std) == (256, 256, 0, 1.0)


def test_what_trains_and_at_which_rates() -> None:
    model = method().prepare(decoder())
    named = dict(model.named_parameters())
    trained = {n for n, p in named.items() if p.requires_grad}
    assert trained == {n for n in named if n.startswith("fusions.") or "norm" in n or "embed" in n}
    fusion, others = method().parameter_groups(model, lr=1e-4)
    assert {id(p) for p in fusion["params"]} == {id(p) for p in model.fusions.parameters()}
    assert (fusion["lr"], others["lr"]) == (pytest.approx(0.1), pytest.approx(5e-4))
    assert fusion["weight_decay"] == others["weight_decay"] == 0
    assert len(others["params"]) == 2 * 2 + 1 + 1
    only = method(trained=()).prepare(decoder())
    assert [g["name"] for g in method(trained=()).parameter_groups(only)] == ["fusion"]
    assert [type(f) for f in model.fusions] == [KVFusion] * 2
    assert model.fusions[0].weight.shape == (3, 16, 3)
    deeper = method(hidden=(5,), gate="sigmoid").prepare(decoder())
    assert deeper.fusions[0].weight.shape == (3, 5, 3) and deeper.gate(0) == pytest.approx(0.5)


@pytest.mark.parametrize("bptt", [1, 2, 4])
def test_backward_by_chunks_has_the_gradients_of_the_whole(bptt: int) -> None:
    method_ = method(bptt=bptt)
    model = method_.prepare(decoder())
    tokens = BATCH[0]
    loss = shifted_loss(model, tokens)
    loss.backward()
    whole = gradients(model)
    model.zero_grad()
    found = method_.backward(model, tokens)
    assert not found.requires_grad
    torch.testing.assert_close(found, loss.detach())
    assert gradients(model).keys() == whole.keys()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.fusions.parameters())


def test_a_gradient_goes_back_through_bptt_chunks_and_no_further() -> None:
    """Only the last chunk has a target; embeddings of tokens that came before are reached through the cache alone."""
    tokens = torch.arange(24).view(1, 24)
    network = models.decoder(24, width=16, depth=1, heads=1, classes=4)
    reached = {}
    for bptt in (1, 2, 4):
        m = method(bptt=bptt)
        model = m.prepare(network)
        m.backward(model, tokens, torch.tensor([1]))
        rows = model.model.embed.weight.grad.abs().sum(1) > 0
        reached[bptt] = [bool(part.any()) for part in rows.split(6)]
        assert model.fusions[0].gate.grad.abs() > 0
    assert reached == {1: [False] * 3 + [True], 2: [False] * 2 + [True] * 2, 4: [True] * 4}


def test_targets_may_be_given() -> None:
    m = method()
    model, tokens = m.prepare(decoder()), BATCH[0]
    target = tokens.roll(-1, 1)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), target.flatten())
    torch.testing.assert_close(m.backward(model, tokens, target), expected.detach())
    target[:, 3:] = -100
    expected = F.cross_entropy(model(tokens)[:, :3].flatten(0, 1), target[:, :3].flatten())
    torch.testing.assert_close(m.backward(model, tokens, target), expected.detach())
    with pytest.raises(ValueError, match=r"LoCoCo.backward: there must be a token to predict, got 1 tokens"):
        m.backward(model, tokens[:, :1])


# ------------------------------------------------------------------------------------------------------ invariants


@torch.no_grad()
def test_with_a_gate_at_zero_it_keeps_the_tokens_with_the_highest_scores() -> None:
    model = method(capacity=8, chunk=4, buffer=2).prepare(decoder())
    for fusion in model.fusions:
        fusion.gate.zero_()
    tokens = torch.randint(12, (3, 60))
    cache = HeavyHitterCache(8, recent=0, accumulate=False, buffer=2, chunk=4)
    dropped = torch.cat([read(model.model, piece, cache) for piece in tokens.split(4, 1)], 1)
    torch.testing.assert_close(model(tokens), dropped, rtol=1e-4, atol=1e-5)
    # and the scores matter: summed over all chunks they keep others
    cache = HeavyHitterCache(8, recent=0, buffer=2, chunk=4)
    summed = torch.cat([read(model.model, piece, cache) for piece in tokens.split(4, 1)], 1)
    assert not torch.allclose(summed, dropped, atol=1e-3)


def test_training_without_a_rate_changes_nothing_that_is_within_the_capacity() -> None:
    m = method(capacity=8, buffer=4, chunk=6)
    network = decoder()
    model = m.prepare(network)
    optimizer = torch.optim.AdamW(m.parameter_groups(model, lr=0.0))
    tokens = BATCH[0][:, :18]  # 12 before the last chunk, which are not compressed
    m.backward(model, tokens)
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), network(tokens), rtol=1e-4, atol=1e-5)
        longer = BATCH[0]
        assert not torch.allclose(model(longer)[:, 18:], network(longer)[:, 18:], atol=1e-3)


@torch.no_grad()
def test_what_is_held_is_bounded_finite_and_within_what_was_put_in() -> None:
    m = method(capacity=6, buffer=3, chunk=5)
    model = m.prepare(models.decoder(12, width=16, depth=1, heads=2))
    seen: list[Tensor] = []
    attend = model.model.blocks[0].attention

    def spy(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(attend.v_proj(args[0]))

    attend.register_forward_pre_hook(spy)
    cache = model.new_cache()
    for piece in torch.randint(12, (2, 50)).split(5, 1):
        model.read(piece, cache)
        value = cache.layers[0].held[1]
        assert value.shape[2] <= 6 + 3 + 5 and value.isfinite().all()
        put = torch.cat(seen, 1)
        assert value.max() <= put.max() + 1e-5 and value.min() >= put.min() - 1e-5
    assert cache.seen == 50


# ------------------------------------------------------------------------------------------------------ generation


def test_a_trained_model_generates_the_same_within_the_capacity() -> None:
    """A model that has learned a text goes on with it through the full cache and through LoCoCo's."""
    text = "the quick brown fox jumps over the lazy dog and "
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(c) for c in text * 4])
    torch.manual_seed(0)
    network = models.decoder(len(letters), width=32, depth=2, heads=4, kv_heads=2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(60):
        starts = torch.randint(len(text), (4, 1))
        rows = codes[starts + torch.arange(81)]
        loss = F.cross_entropy(network(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    m = LoCoCo(capacity=64, taps=5, buffer=16, chunk=16)
    final = m.finalize(m.prepare(network))
    prompt = codes[:40].view(1, -1)
    found = final.generate(prompt, 40)
    assert torch.equal(found, final.generate(prompt, 40, cache=FullCache()))
    assert "".join(letters[i] for i in found[0]) == (text * 2)[:80]
    # beyond it the cache compresses, and the model still runs
    more = final.generate(prompt, 60)
    assert more.shape == (1, 100) and torch.equal(more[:, :80], found)


@torch.no_grad()
def test_rows_of_different_lengths_generate_as_each_alone() -> None:
    m = method(capacity=8, chunk=5, buffer=3)
    final = m.finalize(m.prepare(decoder()))
    tokens = BATCH[0][:3]
    lengths = [22, 9, 14]
    together = final.generate(tokens, 6, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = final.generate(tokens[row : row + 1, :length], 6)
        assert torch.equal(together[row, 22:], alone[0, length:])
    with pytest.raises(ValueError, match="lengths must be 3 numbers from 1 to the 22 tokens"):
        final(tokens, lengths=[1, 0, 3])
    drawn = [final.generate(tokens, 8, temperature=1.0, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    for arguments, sentence in (((tokens, 0), "new_tokens at least 1"), ((tokens[:, :0], 3), "T at least 1")):
        with pytest.raises(ValueError, match=sentence):
            final.generate(*arguments)
    reader = m.finalize(m.prepare(classifier()))
    with pytest.raises(ValueError, match="a classifier generates nothing"):
        reader.generate(tokens, 2)
    with pytest.raises(ValueError, match="takes no lengths"):
        reader(tokens, lengths=lengths)


# -------------------------------------------------------------------------------------------------- what it offers


def test_low_rank_terms_stand_beside_the_projections() -> None:
    m = method(low_rank=QLoRA(rank=2, method="absmax", bits=8, group_size=None))
    model = m.prepare(decoder())
    layers = {n for n, x in model.named_modules() if isinstance(x, QLoRALinear)}
    assert layers == {f"model.blocks.{i}.attention.{p}_proj" for i in (0, 1) for p in "qkvo"}
    groups = m.parameter_groups(model, lr=1e-4)
    assert [g["name"] for g in groups] == ["fusion", "trained", "low_rank"]
    assert len(groups[2]["params"]) == 16 and groups[2]["lr"] == 1e-4
    m.backward(model, BATCH[0])
    assert all(layer.lora_b.grad.abs().sum() > 0 for layer in model.modules() if isinstance(layer, QLoRALinear))
    plain = method().prepare(decoder())
    assert m.report(model, [BATCH]).full_bytes == method().report(plain, [BATCH]).full_bytes


def test_low_rank_terms_stand_beside_weights_that_stay() -> None:
    """LoRA: not quantised, and the same bits after training, while the terms have moved."""
    m, network = method(low_rank=QLoRA(rank=8, alpha=16.0, method=None), trained=()), decoder()
    model = m.prepare(network)
    layers = {n: x for n, x in model.model.named_modules() if isinstance(x, LoRALinear)}
    assert set(layers) == {f"blocks.{i}.attention.{p}_proj" for i in (0, 1) for p in "qkvo"}
    assert all(type(x.base) is nn.Linear and (x.rank, x.alpha) == (8, 16.0) for x in layers.values())
    assert [g["name"] for g in m.parameter_groups(model)] == ["fusion", "low_rank"]
    with torch.no_grad():
        torch.testing.assert_close(model(BATCH[0][:, :6]), network(BATCH[0][:, :6]), rtol=1e-5, atol=1e-5)
    flops = m.report(model, [BATCH]).model_flops
    assert flops == method().report(method().prepare(network), [BATCH]).model_flops
    optimizer = torch.optim.AdamW(m.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(float(m.backward(model, BATCH[0])))
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, layer in layers.items():
        before = network.get_submodule(name)
        assert torch.equal(layer.base.weight, before.weight) and not layer.base.weight.requires_grad
        assert layer.lora_a.grad.abs().sum() > 0 and layer.lora_b.abs().sum() > 0
    assert m.finalize(model).generate(BATCH[0], 3).shape == (8, 25)


@torch.no_grad()
def test_scaled_positions_have_the_angles_of_the_shorter_text() -> None:
    """With a factor of 2 the token at position 2 p has the angles that p had."""
    network = decoder()
    model = method(scaling=2.0).prepare(network)
    positions = torch.arange(10)
    for a, b in zip(model.model.rotary(2 * positions), network.rotary(positions), strict=True):
        torch.testing.assert_close(a, b)
    assert network.rotary.scaling == 1

    class Unrotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = copy.deepcopy(network.blocks[0].attention)

    with pytest.raises(ValueError, match="scaling needs rotary positions, got none in Unrotated"):
        method(scaling=2.0).prepare(Unrotated())


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_a_model_of_transformers_trains_and_generates() -> None:
    network = llama()
    m = method(capacity=64, chunk=8)
    model = m.prepare(network)
    tokens = BATCH[0][:2]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), network(tokens).logits, rtol=1e-4, atol=1e-5)
    final = m.finalize(model)
    expected = network.generate(tokens, max_new_tokens=10, do_sample=False)
    assert torch.equal(final.generate(tokens, 10), expected)

    m = method(scaling=2.0)
    model = m.prepare(network)
    torch.testing.assert_close(model.model.model.rotary_emb.inv_freq * 2, network.model.rotary_emb.inv_freq)
    assert model.model.config.rope_parameters["factor"] == 2.0
    m.backward(model, tokens)
    names = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"model.model.embed_tokens.weight", "model.model.norm.weight", "fusions.0.weight", "fusions.1.gate"} <= names
    assert not any("proj" in n for n in names)
    final = m.finalize(model)
    for n in (22, 19):  # the last piece of 19 is one token, of the first row
        together = final.generate(tokens[:, :n], 5, lengths=[n, 13])
        for row, length in enumerate((n, 13)):
            assert torch.equal(together[row, n:], final.generate(tokens[row : row + 1, :length], 5)[0, length:])


def test_gradient_checkpointing_of_transformers_is_refused() -> None:
    m = method()
    model = m.prepare(llama()).train()
    model.model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="LoCoCoCache: gradient checkpointing takes the cache away from the layers"):
        m.backward(model, BATCH[0][:2])
    m.finalize(model)(BATCH[0][:2])


# ----------------------------------------------------------------------------------------------------------- report


def test_the_report_counts_bytes_and_operations() -> None:
    m = method(capacity=6, buffer=3, chunk=5)
    model = m.prepare(decoder())
    with torch.no_grad():
        model.fusions[1].gate.fill_(0.25)
    tokens = torch.randint(12, (2, 23))
    report = m.report(model, [tokens])
    assert (report.layers, report.batch, report.tokens, report.gates) == (2, 2, 23, (0.5, 0.25))
    # held before each chunk: 0, 5, 10 (reduced), 11 (reduced), 11 (reduced); the last has 3 tokens
    assert m.reductions(23) == [10, 11, 11]
    d, heads, layers = 8, 1, 2
    assert report.full_bytes == 2 * layers * 2 * heads * 23 * d * 4
    assert report.held_bytes == layers * 2 * heads * (6 + 3) * (2 * d + 1) * 4
    room = 6 + 3 + 5  # of both layers, and a spare
    assert report.cache_bytes == (layers + 1) * 2 * 2 * heads * room * d * 4 + layers * 2 * heads * 9 * 4
    # convolution and mixing of what are no heavy hitters
    flops = [2 * heads * (n - 3) * 3 * 2 * d * (3 + 1) * layers for n in (10, 11, 11)]
    assert report.prompt_flops == pytest.approx(sum(flops) / 23)
    assert report.decode_flops == pytest.approx(2 * heads * (10 - 3) * 3 * 2 * d * 4 * layers / 4)
    assert report.fusion_parameters == layers * (3 * 16 * 3 + 3 + 1)
    weights = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 42) + 16 * 12
    assert report.model_flops == 2 * weights
    with pytest.raises(ValueError, match=r"LoCoCo.report: batches must have a batch"):
        m.report(model, [])


def test_the_cost_of_the_papers_model() -> None:
    """Llama-2 7B: 1.38 million parameters a layer; decoding 17 tokens costs 0.77 TFLOPs of convolution, 5 % more to mix."""
    m, shapes = LoCoCo(), 32 * [(32, 128)]
    conv = 2 * 256 * 256 * 21 * 273 * 32 * 32
    assert m.compression_flops(529, shapes) == pytest.approx(conv * 22 / 21)
    assert m.reductions(2048) == [1024, 1024]
    further = LoCoCo(hidden=(64,))
    assert further.compression_flops(529, [(1, 128)]) == 2 * 273 * (256 * 64 * 21 + 256 * (64 * 21 + 256))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"capacity": 1}, ValueError, "capacity must be at least 2, got 1"),
        ({"keep": 1.0}, ValueError, r"keep must be in \[0, 1\), got 1.0"),
        ({"keep": -0.1}, ValueError, r"keep must be in \[0, 1\)"),
        ({"keep": math.nan}, ValueError, r"keep must be in \[0, 1\), got nan"),
        ({"capacity": 2, "keep": 0.9}, ValueError, "keep must leave a slot of 2 for a mixture"),
        ({"taps": 4}, ValueError, "taps must be odd and positive, got 4"),
        ({"local": 3}, ValueError, "local must be at least 0 and less than the 3 heavy hitters, got 3"),
        ({"local": -1}, ValueError, "local must be at least 0"),
        ({"buffer": -1}, ValueError, "buffer must be at least 0, got -1"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"bptt": 0}, ValueError, "bptt must be at least 1, got 0"),
        ({"gate": "tanh"}, ValueError, "gate must be one of plain, sigmoid"),
        ({"scaling": 0.0}, ValueError, "scaling must be positive and finite"),
        ({"fusion_rate": math.inf}, ValueError, "fusion_rate must be positive and finite"),
        ({"capacity": 6.0}, TypeError, "capacity must be an integer"),
        ({"trained": "norm"}, TypeError, "trained must be a sequence of str, got 'norm'"),
        ({"hidden": (2.5,)}, TypeError, "hidden must be a sequence of int"),
        ({"low_rank": 8}, TypeError, "low_rank must be a QLoRA or None, got int"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=f"LoCoCo: {sentence}"):
        method(**changes)


def test_models_that_it_cannot_serve_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"prepare: model must have attentions with q_proj.*got none in CharTransformer"
    ):
        method().prepare(models.char_transformer(12, width=16, depth=1, heads=2))
    network = decoder()
    del network.blocks[0]
    with pytest.raises(ValueError, match=r"layer_idx from 0 on, got \[1\]"):
        method().prepare(network)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        method().prepare("model")


def test_what_is_not_finite_is_refused_where_asked_for() -> None:
    model = method(check=True).prepare(decoder())
    with torch.no_grad():
        model.model.blocks[1].attention.v_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"LoCoCoCache: layer 1: value must be finite"):
        model(BATCH[0])


def test_examples() -> None:
    found = doctest.testmod(importlib.import_module("cofire.methods.lococo"))
    assert found.attempted >= 8 and not found.failed
