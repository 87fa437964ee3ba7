# SPDX-License-Identifier: Apache-2.0
"""Dynamic-LLaVA: what is masked in training, what is left out afterwards, with a cache and without; refusals, the protocol."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import models, ops
from cofire.methods import METHODS, DynamicLLaVA
from cofire.methods.dynamic_llava import best, chosen, decoder_of
from cofire.models.vision_language import VisionLanguageDecoder
from methods.protocol import check_protocol

torch.manual_seed(0)
BATCH = (torch.randn(8, 1, 8, 8), torch.randint(4, (8,)))
IMAGES, QUESTION = BATCH[0][:3], torch.randint(1, 9, (3, 3))
TEXT = torch.cat([QUESTION, torch.randint(1, 9, (3, 5))], 1)
SMALL: dict[str, Any] = {"predictor_width": 8, "predictor_depth": 1, "predictor_heads": 2, "predictor_hidden": 8}


class Classifier(VisionLanguageDecoder):
    """Asks always the same and has one answer begun; an image to the logits of what comes next."""

    text: Tensor

    def __init__(self) -> None:
        super().__init__(8, 2, 9, 16, 2, 2, 16, 1)
        self.register_buffer("text", torch.tensor([[1, 2, 3, 4]]))

    def forward(self, images: Tensor) -> Tensor:
        text = self.text.expand(images.shape[0], -1)
        return super().forward(images, text, answer=2)[:, -1, :4]


def method(**options: Any) -> DynamicLLaVA:
    """Without noise: with it, halves of a batch differ from the whole."""
    defaults: dict[str, Any] = {"vision_keep": 0.3, "layer": 1, "min_answer": 2, "noise": False, "steps": 4}
    return DynamicLLaVA(**(defaults | SMALL | options))


def network(depth: int = 3) -> VisionLanguageDecoder:
    torch.manual_seed(1)
    return models.vision_language(8, 2, vocabulary=9, width=16, depth=depth, heads=2)


@torch.no_grad()
def prepared(**options: Any) -> nn.Module:
    """With predictors that keep about half of the tokens."""
    torch.manual_seed(2)
    model = method(**options).prepare(network())
    decoder = decoder_of(model)
    x = decoder._before(model.hidden(IMAGES, TEXT))
    for predictor, tokens in ((decoder.vision, x[:, :16]), (decoder.text, x[:, 19:])):
        if predictor is not None:
            for p in predictor.parameters():
                nn.init.normal_(p, std=0.4)
            logits = predictor(tokens)
            predictor.end[-1].bias[0] -= (logits[..., 0] - logits[..., 1]).median() - 1e-3
    return model


@pytest.mark.parametrize("check", check_protocol(method, Classifier, BATCH))
def test_protocol(check) -> None:
    check()


# --------------------------------------------------------------------------------------------------- training


def test_training_equals_the_steps_written_out() -> None:
    """Hidden states, choice, masked softmax of each later layer, and the loss of the shares."""
    model = prepared().train()
    decoder = decoder_of(model)
    found = model(IMAGES, TEXT, answer=3)
    loss = method().loss(model)
    x = model.hidden(IMAGES, TEXT)
    positions = torch.arange(24)[None]
    x = decoder.blocks[0](x, positions, _causal)
    vision, text = decoder.vision(x[:, :16]), decoder.text(x[:, 19:])
    mask = torch.cat([vision.argmax(-1) == 0, torch.ones(3, 3).bool(), text.argmax(-1) == 0], 1).float()
    assert 0 < mask[:, :16].mean() < 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        a = a.masked_fill(torch.ones(24, 24).triu(1).bool(), float("-inf"))
        gates = mask[:, None, None].expand(a.shape).clone()
        gates.diagonal(dim1=-2, dim2=-1).fill_(1)
        e = (a - a.amax(-1, keepdim=True)).exp() * gates
        seen = torch.ones(24, 24).tril()
        return (e + seen * 1e-6 / 24) / (e.sum(-1, keepdim=True) + 1e-6) @ v

    for block in decoder.blocks[1:]:
        x = block(x, positions, attend)
    torch.testing.assert_close(found, model.read(x[:, 16:]), rtol=1e-4, atol=1e-5)
    shares = (0.3 - mask[:, :16].mean(1)).square().mean() + (0.5 - mask[:, 19:].mean(1)).square().mean()
    torch.testing.assert_close(loss, 100 * shares)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_the_task_reaches_the_predictors_and_what_was_dropped() -> None:
    model = prepared(weight=0.0).train()
    F.cross_entropy(model(IMAGES, TEXT, answer=3).flatten(0, 1), TEXT.flatten()).backward()
    for part in (decoder_of(model).vision, decoder_of(model).text):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_short_answers_stay_whole_and_padding_counts_for_nothing() -> None:
    model = prepared(min_answer=3).train()
    decoder, (x, args) = decoder_of(model), (model.hidden(IMAGES, TEXT), (16, 19))
    mask = decoder._mask(decoder._before(x), *args, torch.tensor([19 + 2, 19 + 3, 24]))
    every = decoder._mask(decoder._before(x), *args, None)
    assert (mask[0, 19:] == 1).all()
    assert torch.equal(mask[1:], every[1:]) and not torch.equal(every[0, 19:], mask[0, 19:])
    text = chosen(decoder.text(decoder._before(x)[:, 19:]), torch.ones(()), False)
    decoder._mask(decoder._before(x), *args, torch.tensor([21, 22, 24]))
    shares = [(0.5 - text[1, :3].mean()) ** 2, (0.5 - text[2].mean()) ** 2]
    vision = (0.3 - every[:, :16].mean(1)).square().mean()
    torch.testing.assert_close(decoder.rate_loss, vision + sum(shares) / 3)


def test_the_choice_is_a_sample_of_the_softmax_with_its_softened_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.5, -0.5]).expand(20_000, 2).clone().requires_grad_()
    mask = chosen(logits, torch.tensor(0.5), noise=True)
    assert set(mask.tolist()) == {0.0, 1.0}
    torch.testing.assert_close(mask.mean(), torch.sigmoid(torch.tensor(1.0)), rtol=0, atol=0.012)
    (found,) = torch.autograd.grad(chosen(logits, torch.tensor(0.5), noise=False).sum(), logits)
    soft = torch.sigmoid(torch.tensor(1.0 / 0.5))
    slope = soft * (1 - soft) / 0.5
    torch.testing.assert_close(found[0], torch.stack([slope, -slope]))


def test_exactly_as_many_are_kept_with_the_gradient_of_a_sigmoid_around_the_last() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.5, 0.0], [1.0, 2.0], [0.0, 0.5]]], requires_grad=True)
    mask = best(logits, 2, torch.tensor(0.5), noise=False)
    assert mask.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    mask.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    soft = ((torch.tensor([2.0, 0.5, -1.0, -0.5]) - 0.0) / 0.5).sigmoid()  # between 0.5, the last kept, and -0.5
    slope = soft * (1 - soft) / 0.5 * torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(logits.grad[0], torch.stack([slope, -slope], 1))
    assert best(torch.zeros(1, 3, 2), 3, torch.tensor(1.0), noise=True).tolist() == [[1.0, 1.0, 1.0]]


def test_exact_noise_is_that_of_the_sample_and_fades_with_the_temperature() -> None:
    torch.manual_seed(0)
    logits = torch.zeros(20_000, 2, 2)
    logits[:, 0, 0] = 1.0
    difference = torch.tensor([best(logits, 1, torch.tensor(t), noise=True)[:, 0].mean() for t in (1.0, 0.1)])
    # of two logistic numbers the first wins from a lead a with chance e^a (e^a - 1 - a) / (e^a - 1)^2
    lead = torch.tensor([1.0, 10.0]).double()
    expected = lead.exp() * (lead.exp() - 1 - lead) / (lead.exp() - 1) ** 2
    torch.testing.assert_close(difference.double(), expected, rtol=0, atol=0.012)
    assert (best(logits, 1, torch.tensor(0.3), noise=True).sum(1) == 1).all()


def test_exact_training_sees_what_the_deployed_network_sees() -> None:
    model = prepared(exact=True, text_keep=1.0)
    trained, deployed = (model.train(mode)(IMAGES, TEXT, answer=3) for mode in (True, False))
    torch.testing.assert_close(trained, deployed, rtol=1e-3, atol=1e-4)
    model.train()(IMAGES, TEXT, answer=3)
    alone = chosen(
        decoder_of(model).vision(decoder_of(model)._before(model.hidden(IMAGES, TEXT))[:, :16]), torch.ones(()), False
    )
    torch.testing.assert_close(method().loss(model), 100 * (0.3 - alone.mean(1)).square().mean())
    F.cross_entropy(model(IMAGES, TEXT, answer=3).flatten(0, 1), TEXT.flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder_of(model).vision.parameters())


@pytest.mark.parametrize("detach", [False, True])
def test_the_loss_of_the_shares_reaches_the_layers_below_unless_it_is_detached(detach: bool) -> None:
    model = prepared(detach=detach).train()
    model(IMAGES, TEXT, answer=3)
    method().loss(model).backward()
    decoder = decoder_of(model)
    assert all(p.grad.any() for part in (decoder.vision, decoder.text) for p in part.parameters())
    below = [p.grad is not None and bool(p.grad.any()) for p in decoder.blocks[0].parameters()]
    assert not any(below) if detach else all(below)


@pytest.mark.parametrize("exact", [False, True])
def test_the_choice_stands_after_its_share_of_the_steps(exact: bool) -> None:
    """The predictors have no gradient then, of the task or of the shares; the network goes on."""
    model, how, moved = prepared(settle=0.5, exact=exact, weight=1.0), method(settle=0.5, weight=1.0), []
    for _ in range(4):
        model.zero_grad()
        loss = F.cross_entropy(model.train()(IMAGES, TEXT, answer=3).flatten(0, 1), TEXT.flatten())
        (loss + how.loss(model)).backward()
        decoder = decoder_of(model)
        moved.append([any(p.grad.any() for p in part.parameters()) for part in (decoder.vision, decoder.text)])
        assert all(p.grad.any() for p in decoder.blocks[-1].parameters())
        how.step(model)
    assert moved == [[True, True]] * 2 + [[False, False]] * 2


def test_the_temperature_falls_to_a_tenth() -> None:
    model = prepared()
    temperatures = []
    for _ in range(6):
        temperatures.append(float(decoder_of(model).temperature))
        method().step(model)
    expected = [10 ** -(i / 4) for i in range(5)] + [0.1]
    assert temperatures == pytest.approx(expected, rel=1e-5)


# -------------------------------------------------------------------------------------------------- inference


def test_the_best_tokens_of_the_image_are_left_in_their_order() -> None:
    model = prepared().eval()
    decoder, lengths = decoder_of(model), []
    decoder.blocks[1].register_forward_pre_hook(lambda m, args: lengths.append(args))
    model(IMAGES, QUESTION)
    x, positions, _ = lengths[0]
    logits = decoder.vision(decoder._before(model.hidden(IMAGES, QUESTION))[:, :16])
    best = (logits[..., 0] - logits[..., 1]).topk(4).indices.sort().values
    assert torch.equal(positions, torch.cat([best, torch.tensor([16, 17, 18]).expand(3, -1)], 1))
    assert x.shape == (3, 7, 16)


def test_evaluation_is_training_with_the_same_choice() -> None:
    """What is left out is as if it had been masked, but for eps."""
    model = prepared()
    keep = torch.zeros(3, 24)
    for b, kept in enumerate(([0, 3, 9], [1, 2, 15], [4, 5, 6])):
        keep[b, kept] = 1
    keep[:, 16:] = torch.tensor([1, 1, 1, 0, 1, 0, 0, 1])
    masked, left = (model.train(mode)(IMAGES, TEXT, answer=3, keep=keep) for mode in (True, False))
    torch.testing.assert_close(masked, left, rtol=1e-3, atol=1e-4)
    full = model(IMAGES, TEXT, answer=3, keep=torch.ones(3, 24))
    torch.testing.assert_close(full, network_of(model)(IMAGES, TEXT))
    assert not torch.allclose(full, left, atol=1e-3)


def network_of(model: nn.Module) -> nn.Module:
    """The dense network with a prepared one's weights."""
    dense = network().eval()
    dense.load_state_dict({n: p for n, p in model.state_dict().items() if n in dense.state_dict()})
    return dense


@pytest.mark.parametrize("text_keep", [0.5, 1.0])
def test_with_a_cache_and_without_the_answers_are_the_same(text_keep: float) -> None:
    """Rows decide differently, so that what they have cached differs."""
    model = method(text_keep=text_keep).finalize(prepared(text_keep=text_keep))
    caches = []
    prefill = decoder_of(model).prefill
    decoder_of(model).prefill = lambda *args: caches.append(prefill(*args)) or caches[-1]
    cached, anew = (model.generate(IMAGES, QUESTION, 9, cached=c) for c in (True, False))
    assert torch.equal(cached, anew)
    text = torch.cat([QUESTION, cached], 1)
    whole = model(IMAGES, text[:, :-1], answer=3)[:, 2:, 1:].argmax(-1) + 1
    assert torch.equal(whole, cached)
    lengths = [layer[2] for layer in caches[0][1].layers]
    assert lengths[0].tolist() == [19 + 8] * 3
    assert torch.equal(lengths[1], lengths[2])
    if text_keep == 1:
        assert lengths[1].tolist() == [4 + 3 + 8] * 3
    else:
        assert len(set(lengths[1].tolist())) > 1 and lengths[1].min() < 4 + 3 + 8


def test_the_dense_network_generates_alike_with_a_cache_and_without() -> None:
    model = network().eval()
    cached, anew = (model.generate(IMAGES, QUESTION, 5, cached=c) for c in (True, False))
    assert torch.equal(cached, anew)
    whole = model(IMAGES, torch.cat([QUESTION, cached], 1)[:, :-1])[:, 2:, 1:].argmax(-1) + 1
    assert torch.equal(whole, cached)


def test_the_answer_does_not_stay_on_the_model() -> None:
    """A prompt after another one is answered as if it were the first."""
    model = method().finalize(prepared())
    first = model.generate(IMAGES, QUESTION, 4)
    model.generate(IMAGES[:1], TEXT[:1], 6)
    assert torch.equal(model.generate(IMAGES, QUESTION, 4), first)


def test_chance_keeps_as_many() -> None:
    model = prepared(choice="random").train()
    decoder, x = decoder_of(model), model.hidden(IMAGES, TEXT)
    torch.manual_seed(0)
    masks = [decoder._mask(x, 16, 19, None)[:, :16] for _ in range(2)]
    assert all((m.sum(1) == 4).all() for m in masks) and not torch.equal(*masks)
    assert decoder.vision is None
    assert model.eval()(IMAGES, QUESTION).shape == (3, 3, 9)


def test_report_counts_what_is_left_out() -> None:
    model = prepared()
    report = method().report(model, [((IMAGES, TEXT, 3), None)], dense=network())
    assert (report.image_tokens, report.kept_tokens) == (16, 4)
    assert (report.dense_token_layers, report.token_layers) == (3 * 19, 19 + 2 * 7)
    assert report.cut == pytest.approx(1 - 33 / 57)
    final = method().finalize(model)
    _, cache = decoder_of(final).prefill(final.hidden(IMAGES, QUESTION), 16, 0)
    assert report.cache_bytes == cache.nbytes
    assert report.dense_cache_bytes == cache.nbytes * 57 // 33
    decoder = decoder_of(model)
    x = decoder._before(model.hidden(IMAGES, TEXT))
    vision, text = decoder.vision(x[:, :16]), decoder.text(x[:, 19:])
    assert report.vision_rate == pytest.approx((vision.argmax(-1) == 0).double().mean().item())
    assert report.text_rate == pytest.approx((text.argmax(-1) == 0).double().mean().item())
    assert report.predictor_parameters == sum(p.numel() for m in (decoder.vision, decoder.text) for p in m.parameters())
    assert report.latency is not None and report.latency.dense_ms > 0


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vision_keep": 0.0}, r"vision_keep must be in \(0, 1\], got 0"),
        ({"settle": 0.0}, r"settle must be in \(0, 1\], got 0"),
        ({"text_keep": 1.5}, r"text_keep must be in \(0, 1\], got 1.5"),
        ({"layer": -1}, "layer must be at least 0, got -1"),
        ({"predictor_heads": 3}, r"predictor_width must be a multiple of predictor_heads \(3\), got 8"),
        ({"choice": "best"}, "choice must be one of learned, random, got 'best'"),
    ],
)
def test_hyperparameters_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        method(**options)


def test_refusals() -> None:
    assert METHODS["dynamicllava"] is DynamicLLaVA
    with pytest.raises(ValueError, match="layer must be less than the decoder's 3 layers, got 3"):
        method(layer=3).prepare(network())
    with pytest.raises(ValueError, match=r"the model must have one cofire.models.vision_language.Decoder, got 0"):
        method().prepare(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"vision_keep \(0.05\) leaves none of the 16 image tokens"):
        method(vision_keep=0.05).prepare(network())(IMAGES, QUESTION)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        method().report(prepared(), [])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"answer": 9}, "answer must be a position in the text of 8 tokens, or its end, got 9"),
        ({"answer": -1}, "answer must be a position in the text of 8 tokens, or its end, got -1"),
        ({"keep": torch.full((3, 24), 0.5)}, "keep must hold zeros and ones in evaluation, got other values"),
        ({"keep": torch.ones(3, 8)}, r"keep must have shape \[3, 24\], got \[3, 8\]"),
        ({"keep": torch.eye(24)[[0, 20, 21]]}, r"keep must hold as many tokens of each image, got \[1, 0, 0\]"),
    ],
)
def test_bad_calls(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        prepared().eval()(IMAGES, TEXT, **options)


def test_rows_of_different_lengths_need_lengths() -> None:
    model, text = prepared().train(), TEXT.clone()
    text[1, 6:] = 0
    with pytest.raises(ValueError, match="lengths must say how long each row's text is, as there is padding, got None"):
        model(IMAGES, text, answer=3)
    assert model(IMAGES, text, answer=3, lengths=torch.tensor([8, 6, 8])).isfinite().all()


@pytest.mark.parametrize("cached", [True, False])
def test_questions_of_different_lengths_are_answered_as_each_alone(cached: bool) -> None:
    final, text = method().finalize(prepared()), TEXT.clone()
    lengths = torch.tensor([5, 8, 5])
    text[lengths == 5, 5:] = 0
    for model in (final, network().eval()):
        with pytest.raises(
            ValueError, match="lengths must say how long each row's text is, as there is padding, got None"
        ):
            model.generate(IMAGES, text, 4, cached=cached)
        found = model.generate(IMAGES, text, 4, cached=cached, lengths=lengths)
        for row, n in enumerate(lengths.tolist()):
            one = slice(row, row + 1)
            assert torch.equal(found[one], model.generate(IMAGES[one], text[one, :n], 4, cached=cached))
        for wrong in ([5, 8], [5, 9, 5], [0, 8, 5]):
            with pytest.raises(ValueError, match=r"lengths must be 3 numbers from 1 to the 8 tokens, got \["):
                model.generate(IMAGES, text, 4, cached=cached, lengths=torch.tensor(wrong))


def test_with_nothing_left_a_token_sees_itself() -> None:
    model = prepared().train()
    logits = model(IMAGES, TEXT, answer=3, keep=torch.zeros(3, 24))
    other = model(IMAGES.roll(1, 0), TEXT, answer=3, keep=torch.zeros(3, 24))
    assert logits.isfinite().all() and logits.shape == other.shape
    x = torch.randn(1, 2, 5, 4)
    torch.testing.assert_close(ops.masked_softmax_attention(x, x, x, torch.zeros(1, 5)), x, rtol=1e-3, atol=1e-3)


def test_examples() -> None:
    module = importlib.import_module("cofire.methods.dynamic_llava")
    found = doctest.testmod(module)
    assert found.attempted >= 6 and not found.failed
