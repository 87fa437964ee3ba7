# SPDX-License-Identifier: Apache-2.0
"""DSnoT: the masks of whole models, layer by layer; what is refused; the protocol of the methods."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.methods import METHODS, DSnoT
from cofire.methods.dsnot import Pruned, pruned_layers
from cofire.nn import CompressedLinear, SparseLinear
from cofire.nn.calibration import InputStatistics
from cofire.nn.lowbit import is_transposed
from cofire.ops import corrected_bias, pack_mask, pruning_error, unpack_mask
from methods.protocol import check_protocol


def network(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 24, bias=bias), nn.ReLU(), nn.Linear(24, 32, bias=bias), nn.ReLU(), nn.Linear(32, 4)
    )


def batches(count: int = 3, rows: int = 50) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(16, 16, generator=generator)
    return [torch.randn(rows, 16, generator=generator) @ mix / 4 + 1 for _ in range(count)]


def weights(model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    return {n: (m.weight.detach(), m.bias) for n, m in model.named_modules() if isinstance(m, nn.Linear)}


BATCH = (torch.cat(batches(1, 8)), torch.randint(4, (8,), generator=torch.Generator().manual_seed(5)))


def method() -> DSnoT:
    return DSnoT(density=0.3, refine="swap1")


#: All but the check that a method's own loss trains something: this method's loss is zero by design.
PROTOCOL = [
    check for check in check_protocol(method, network, BATCH, data=batches(1)) if check.id != "loss_reaches_something"
]


@pytest.mark.parametrize("check", PROTOCOL)
def test_protocol(check: Callable[[], None]) -> None:
    check()


ALL = [
    DSnoT(
        initial=initial, refine=refine, stop=stop, bias_correct=bias, pattern=pattern, density=0.5 if pattern else 0.3
    )
    for initial in ("magnitude", "wanda", "sparsegpt")
    for refine, stop in (("none", "decrease"), ("dsnot", "decrease"), ("dsnot", "official"), ("swap1", "decrease"))
    for bias in (False, True)
    for pattern in (None, (2, 4))
]


@pytest.mark.parametrize("method", ALL, ids=str)
def test_every_way_to_prune(method: DSnoT) -> None:
    """Counts, kept values, errors against outputs on the data, and what is behind is pruned on what comes out before."""
    dense, data = network(), batches()
    before = copy.deepcopy(dense.state_dict())
    model = method.prepare(dense, data)
    assert all(torch.equal(v, before[n]) for n, v in dense.state_dict().items()), "the given model stays as it was"
    layers = pruned_layers(model)
    assert list(layers) == ["1", "3"], "the output layer stays dense"
    assert all(isinstance(layer, SparseLinear) for layer in layers.values())
    x = torch.cat(data)
    for name, layer in layers.items():
        mask, old = layer.mask, dense.get_submodule(name)
        keep = 2 * old.in_features // 4 if method.pattern else round(method.density * old.in_features)
        assert (mask.sum(1) == keep).all()
        if method.pattern:
            assert (mask.view(len(mask), -1, 4).sum(2) == 2).all()
        assert torch.equal(layer.weight, torch.where(mask, old.weight, 0.0))
        inputs = model[: int(name)](x)
        wanted, got = old(inputs), layer(inputs)
        error = (got - wanted).double().square().mean()
        fact: Pruned = layer.pruned
        torch.testing.assert_close(float(error), fact.refined, rtol=1e-3, atol=1e-9)
        if method.bias_correct:
            torch.testing.assert_close(got.mean(0), wanted.mean(0), rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(layer.bias, old.bias)
        if method.refine == "none":
            assert fact.moved == 0 and fact.initial == fact.refined
        if method.refine == "swap1":
            assert fact.refined < 0.7 * fact.initial
        output = (inputs @ old.weight.T).double().square().mean()
        torch.testing.assert_close(float(output), fact.output, rtol=1e-3, atol=0)
    report = method.report(model)
    assert report.layers == 2 and report.weights == 16 * 24 + 24 * 32
    assert report.density == sum(int(layer.mask.sum()) for layer in layers.values()) / report.weights
    assert report.dense_bytes == 4 * report.weights > report.sparse_bytes
    final = method.finalize(model)
    assert all(isinstance(layer, CompressedLinear) for layer in pruned_layers(final).values())
    torch.testing.assert_close(final(x), model(x), rtol=1e-4, atol=1e-5)
    assert method.report(final) == report


@pytest.mark.parametrize("method", [m for m in ALL if m.pattern], ids=str)
def test_a_shorter_last_group(method: DSnoT) -> None:
    """16 = 2 * 6 + 4 columns, and 24 = 4 * 6."""
    method = replace(method, pattern=(3, 6), pad=True)
    model = method.prepare(network(), batches())
    first, second = pruned_layers(model).values()
    assert [part.sum(1).unique().tolist() for part in first.mask.split(6, 1)] == [[3], [3], [3]]
    assert second.mask.view(32, 4, 6).sum(2).unique().tolist() == [3]
    if method.refine == "swap1":
        assert first.pruned.refined < first.pruned.initial
    x = torch.cat(batches())
    torch.testing.assert_close(method.finalize(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_bias_is_made_where_there_is_none() -> None:
    dense, data = network(bias=False), batches()
    model = DSnoT(density=0.3).prepare(dense, data)
    x = torch.cat(data)
    torch.testing.assert_close(model[1](x).mean(0), dense[1](x).mean(0), rtol=1e-4, atol=1e-4)
    assert model[3].bias is not None
    assert DSnoT(density=0.3, bias_correct=False).prepare(dense, data)[1].bias is None


def test_the_scores_of_sparsegpt() -> None:
    weight, x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)), batches()[0][:, :8].clone()
    x[:, 3] = 0  # an input that never comes: nothing is lost with its weights
    inputs = InputStatistics.of(x)
    initial, refined = DSnoT(density=0.5, initial="sparsegpt", refine="none").mask(weight, inputs)
    assert torch.equal(initial, refined)
    hessian = (x.double().T @ x.double()) + torch.diag((x == 0).all(0).double())
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    diagonal = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal()
    score = (weight.double() / diagonal).square()
    score[:, 3] = 0
    expected = torch.zeros(6, 8, dtype=torch.bool).scatter_(1, score.topk(4, 1).indices, True)
    assert torch.equal(unpack_mask(initial, 8), expected)


def test_by_the_covariance_where_the_bias_is_corrected() -> None:
    """Otherwise the refiner would spend its swaps on an error that the bias takes away."""
    weight, inputs = network()[1].weight.detach(), InputStatistics.of(batches()[0] + 3)
    with_bias, without = (
        DSnoT(density=0.3, refine="swap1", bias_correct=b).mask(weight, inputs)[1] for b in (True, False)
    )
    left = [float(pruning_error(weight, bits, inputs.covariance).sum()) for bits in (with_bias, without)]
    whole = [float(pruning_error(weight, bits, inputs.second_moment).sum()) for bits in (with_bias, without)]
    assert left[0] < left[1] and whole[0] > whole[1]


def test_the_released_loop_sums_over_a_sequence() -> None:
    """Its threshold is absolute: the same inputs in longer sequences are refined further."""
    weight = network()[1].weight.detach()
    x = batches(1, 60)[0].view(3, 20, 16)
    method = DSnoT(density=0.3, stop="official")
    long, short = InputStatistics.of(x), InputStatistics.of(x.reshape(60, 1, 16))
    initial, of_long = method.mask(weight, long)
    _, of_short = method.mask(weight, short)
    moved = [int((unpack_mask(m, 16) & ~unpack_mask(initial, 16)).sum()) for m in (of_long, of_short)]
    assert moved[0] > 2 * moved[1]


def test_only_the_layers_that_are_named() -> None:
    assert list(pruned_layers(DSnoT(layers=["3"]).prepare(network(), batches()))) == ["3"]
    assert list(pruned_layers(DSnoT(layers=["*"]).prepare(network(), batches()))) == ["1", "3", "5"]


def test_everything_is_kept_at_full_density() -> None:
    dense, data = network(), batches()
    for refine in ("dsnot", "swap1"):
        model = DSnoT(density=1.0, refine=refine).prepare(dense, data)
        assert torch.equal(model(data[0]), dense(data[0]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoders_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes)
        dense: nn.Module = transformers.LlamaForCausalLM(config).eval()
    else:
        config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        dense = transformers.GPT2LMHeadModel(config).eval()
    data = [{"input_ids": torch.randint(50, (4, 8))} for _ in range(4)]
    method = DSnoT(density=0.5, refine="swap1")
    model = method.prepare(dense, data)
    layers = pruned_layers(model)
    assert len(layers) == 2 * (7 if kind == "llama" else 4)
    for name, layer in layers.items():
        old = dense.get_submodule(name)
        weight = old.weight.t() if is_transposed(old) else old.weight
        assert torch.equal(layer.weight, torch.where(layer.mask, weight, 0.0))
        assert (layer.mask.sum(1) == layer.in_features // 2).all()
    with torch.no_grad():
        logits, wanted = model(**data[0]).logits, dense(**data[0]).logits
        generated = model.generate(data[0]["input_ids"][:, :4], max_new_tokens=3, do_sample=False)
    assert logits.isfinite().all() and not torch.equal(logits, wanted)
    assert generated.shape == (4, 7)
    facts = [layer.pruned for layer in layers.values()]
    assert all(fact.refined < fact.initial for fact in facts)


def test_fine_tuning_keeps_the_zeros() -> None:
    method, data = DSnoT(density=0.3), batches()
    model = method.prepare(network(), data).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    target = torch.randint(4, (50,))
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(data[0]), target) + method.loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.step(model)
        losses.append(loss.item())
        assert all((layer.weight[~layer.mask] == 0).all() for layer in pruned_layers(model).values())
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"density": 0}, ValueError, "DSnoT: density must be above 0 and at most 1, got 0"),
        ({"density": 1.5}, ValueError, "DSnoT: density must be above 0 and at most 1, got 1.5"),
        ({"density": math.nan}, ValueError, "DSnoT: density must be above 0 and at most 1, got nan"),
        ({"density": "half"}, TypeError, "DSnoT: density must be a number, got 'half'"),
        ({"initial": "random"}, ValueError, "DSnoT: initial must be one of magnitude, wanda, sparsegpt, got 'random'"),
        ({"refine": "swap2"}, ValueError, "DSnoT: refine must be one of none, dsnot, swap1, got 'swap2'"),
        ({"stop": "never"}, ValueError, "DSnoT: stop must be one of decrease, official, got 'never'"),
        ({"pattern": (5, 4)}, ValueError, "DSnoT: pattern must keep 1 to 4 of 4, got 5:4"),
        ({"pattern": "2:4"}, TypeError, "DSnoT: pattern must be two integers (kept, of how many), got '2:4'"),
        ({"max_swaps": -1}, ValueError, "DSnoT: max_swaps must be at least 0, got -1"),
        ({"threshold": -1.0}, ValueError, "DSnoT: threshold must be a number of at least 0, got -1.0"),
        ({"gamma": math.inf}, ValueError, "DSnoT: gamma must be a number of at least 0, got inf"),
        ({"pad": True}, ValueError, "DSnoT: pad must be False where there is no pattern N:M, got True"),
        ({"layers": "fc"}, TypeError, "DSnoT: layers must be a sequence of names or patterns, got 'fc'"),
    ],
)
def test_hyperparameters_are_checked(arguments: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        DSnoT(**arguments)
    assert str(caught.value) == sentence


def _with(model: nn.Module, change: Any) -> nn.Module:
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize(
    ("method", "model", "data", "sentence"),
    [
        (DSnoT(), network(), [], "data must hold batches of calibration inputs, got none"),
        (DSnoT(), network(), [torch.ones(0, 16)], "batches must reach every layer, got none that reaches '1'"),
        (DSnoT(), network(), [torch.full((2, 16), torch.nan)],
         "layer '1': the calibration inputs of the layer must be finite, got values that are not"),
        (DSnoT(), _with(network(), lambda m: m[3].weight[0, 0].fill_(torch.inf)), batches(),
         "layer '3': weight must be finite, got 1 NaN or infinite of 768"),
        (DSnoT(density=0.01), network(), batches(), "layer '1': density must keep at least one of 16 columns, got 0.01"),
        (DSnoT(pattern=(1, 5)), network(), batches(),
         "layer '1': pattern (1, 5) needs rows of a multiple of 5 weights, got 16; pad=True lets the last group be shorter"),
        (DSnoT(layers=["fc"]), network(), batches(), "layers names 'fc', which fits no linear layer; there are '1', '3', '5'"),
        (DSnoT(), nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), batches(),
         "the model must have a linear layer to prune (tied ones stay dense), got none"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned(method: DSnoT, model: nn.Module, data: list[Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'DSnoT.prepare: {sentence}')}$"):
        method.prepare(model, data)


def test_misuse_is_named() -> None:
    method, plain, data = DSnoT(), network(), batches()
    for call in (method.loss, method.step, method.finalize, method.report):
        with pytest.raises(
            ValueError, match=r"DSnoT\.\w+: the model has no pruned layers; call prepare\(model, data\) first"
        ):
            call(plain)
    prepared = method.prepare(plain, data)
    with pytest.raises(ValueError, match="DSnoT.prepare: the model is pruned already"):
        method.prepare(prepared, data)
    final = method.finalize(prepared)
    for call in (method.finalize, method.step):
        with pytest.raises(ValueError, match=r"DSnoT\.\w+: the model is finalized already"):
            call(final)
    with pytest.raises(TypeError, match="DSnoT.prepare: model must be a torch.nn.Module, got list"):
        method.prepare([], data)  # type: ignore[arg-type]


def test_constant_features_are_never_grown() -> None:
    weight, x = network()[1].weight.detach(), batches()[0]
    x[:, ::2] = 0.1
    initial, refined = DSnoT(density=0.3, initial="magnitude").mask(weight, InputStatistics.of(x))
    grown = unpack_mask(refined, 16) & ~unpack_mask(initial, 16)
    assert grown.any() and not grown[:, ::2].any()


def test_it_is_a_method() -> None:
    assert METHODS["dsnot"] is DSnoT
    bits = pack_mask(torch.zeros(1, 2, dtype=torch.bool))
    assert corrected_bias(torch.ones(1, 2), bits, torch.tensor([1.0, 2.0])).tolist() == [3.0]
