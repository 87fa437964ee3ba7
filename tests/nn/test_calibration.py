# SPDX-License-Identifier: Apache-2.0
"""Statistics of a layer's inputs, and the order in which layers are visited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cofire.nn import calibration, hessians
from cofire.nn.calibration import InputStatistics, in_order, input_statistics
from cofire.nn.lowbit import is_transposed, linear_layers
from helpers import check_examples

Statistics = dict[str, InputStatistics]


def test_examples() -> None:
    check_examples(calibration)


def test_sums_over_batches_are_those_of_all_inputs() -> None:
    x = 1000 + torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0.1
    found = InputStatistics.of(x[:10].view(2, 5, 6))
    for part in x[10:].split(7):
        found.add(part)
    wide = x.double()
    assert (found.count, found.samples) == (40, 2 + 5)
    torch.testing.assert_close(found.mean, wide.mean(0))
    torch.testing.assert_close(found.variance, wide.var(0, correction=0), rtol=1e-9, atol=0)
    assert found.variance[2] == 0, "what is constant has no variance, not a small one"
    torch.testing.assert_close(found.norm, wide.norm(dim=0))
    torch.testing.assert_close(found.second_moment, wide.T @ wide / 40, rtol=1e-6, atol=0)
    assert found.finite
    found.add(torch.tensor([[torch.inf, 0, 0, 0, 0, 0]]))
    assert not found.finite


def test_hessians_are_sums_over_the_inputs() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).train()
    batches = [torch.randn(3, 2, 5), torch.randn(4, 5)]
    found = hessians(model, batches)
    rows = torch.cat([b.reshape(-1, 5) for b in batches])
    torch.testing.assert_close(found["0"], rows.T @ rows)
    hidden = model[1](model[0](rows)).detach()
    torch.testing.assert_close(found["2"], hidden.T @ hidden)
    assert model.training and not model[0]._forward_pre_hooks


class Block(nn.Module):
    """Returns several things, is told something, and counts its calls."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), 0

    def forward(self, scale: float, *, state: Tensor) -> tuple[Tensor, str]:
        self.calls += 1
        return state + scale * self.second(torch.relu(self.first(state))), "more"


class Decoder(nn.Module):
    def __init__(self, width: int = 6, depth: int = 3) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        state = self.before(x)
        for i, block in enumerate(self.blocks):
            state, _ = block(0.5 + i, state=state)
        return self.after(state)


def halve(model: nn.Module, seen: Statistics) -> Callable[[Statistics], None]:
    """A visit that changes each layer, so that what follows sees other inputs."""

    def visit(found: Statistics) -> None:
        seen.update(found)
        for name in found:
            layer = model.get_submodule(name)
            layer.weight.mul_(0.5)
            layer.bias.add_(0.25)

    return visit


def one_by_one(model: nn.Module, batches: list[Any], stages: list[list[str]]) -> Statistics:
    """The same by running the whole model for each stage."""
    seen: Statistics = {}
    for names in stages:
        with torch.no_grad():
            visit = halve(model, seen)
            visit(input_statistics(model, batches, {name: model.get_submodule(name) for name in names}))
    return seen


def same(a: Statistics, b: Statistics) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].gram, b[name].gram)
        torch.testing.assert_close(a[name].mean, b[name].mean)
        assert (a[name].count, a[name].samples) == (b[name].count, b[name].samples)


def test_layers_see_what_changed_layers_before_them_return() -> None:
    torch.manual_seed(0)
    model, other = Decoder(), Decoder()
    other.load_state_dict(model.state_dict())
    batches = [torch.randn(3, 5, 4), (torch.randn(2, 4), "labels"), {"x": torch.randn(1, 2, 4)}]
    seen: Statistics = {}
    layers = dict(linear_layers(model))
    in_order(model, batches, layers, halve(model, seen))
    blocks = [[f"blocks.{i}.first", f"blocks.{i}.second"] for i in range(3)]
    same(seen, one_by_one(other, batches, [["before"], *blocks, ["after"]]))
    # to look for the chain once, with the layers outside 3 x 2, to take the arguments, and twice each but the last
    assert [block.calls for block in model.blocks] == [1 + 6 + 6 + 3 - (i == 2) * (3 + 3) for i in range(3)]


def test_only_some_layers() -> None:
    torch.manual_seed(1)
    model, other = Decoder(), Decoder()
    other.load_state_dict(model.state_dict())
    batches = [torch.randn(7, 4)]
    seen: Statistics = {}
    names = ["blocks.0.second", "blocks.1.first"]
    in_order(model, batches, {name: model.get_submodule(name) for name in names}, halve(model, seen))
    same(seen, one_by_one(other, batches, [[name] for name in names]))


class Branches(nn.Module):
    """No chain: a module list whose members all see the input."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)
        self.branches = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(sum(branch(x) for branch in self.branches))


def test_a_model_without_a_chain() -> None:
    torch.manual_seed(2)
    model, other = Branches(), Branches()
    other.load_state_dict(model.state_dict())
    batches = [torch.randn(7, 4), torch.randn(3, 4)]
    seen: Statistics = {}
    order: list[str] = []
    visit = halve(model, seen)
    in_order(model, batches, dict(linear_layers(model)), lambda found: (order.extend(found), visit(found)))
    assert order == ["branches.0", "branches.1", "last"], "as they run, not as they are listed"
    same(seen, one_by_one(other, batches, [[name] for name in order]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoders_of_transformers(kind: str) -> None:
    """Blocks run again give what the whole model gives."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes)
        make: Callable[[], nn.Module] = lambda: transformers.LlamaForCausalLM(config)  # noqa: E731
    else:
        config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        make = lambda: transformers.GPT2LMHeadModel(config)  # noqa: E731
    model, other = make(), make()
    other.load_state_dict(model.state_dict())
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    batches = [{"input_ids": torch.randint(50, (2, 5)), "attention_mask": mask}, torch.randint(50, (1, 7))]
    names = [n for n, m in linear_layers(model) if n != "lm_head"]
    assert kind == "llama" or all(is_transposed(model.get_submodule(name)) for name in names)

    def shrink(target: nn.Module, seen: Statistics) -> Callable[[Statistics], None]:
        def visit(found: Statistics) -> None:
            seen.update(found)
            for name in found:
                target.get_submodule(name).weight.mul_(0.9)

        return visit

    seen: Statistics = {}
    in_order(model, batches, {name: model.get_submodule(name) for name in names}, shrink(model, seen))
    assert list(seen) == names
    expected: Statistics = {}
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        with torch.no_grad():
            found = input_statistics(other, batches, {name: other.get_submodule(name) for name in part})
            shrink(other, expected)(found)
    same(seen, expected)
    assert model.config.use_cache


def test_refusals() -> None:
    model = Branches()
    with pytest.raises(ValueError, match="^in_order: batches must hold calibration inputs, got none$"):
        in_order(model, [], dict(linear_layers(model)), lambda found: None)
    layers = {"apart": nn.Linear(2, 2)}
    with pytest.raises(ValueError, match="^in_order: batches must reach every layer, got none that reaches 'apart'$"):
        in_order(model, [torch.ones(1, 4)], layers, lambda found: None)
    with pytest.raises(ValueError, match="none that reaches 'last'$"):
        in_order(model, [torch.ones(0, 4)], {"last": model.last}, lambda found: None)
