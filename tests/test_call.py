# SPDX-License-Identifier: Apache-2.0
"""The shorter way to an operator: it gives what torch.ops gives, and leaves to it what it does not know."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from cofire import native, ops
from cofire.registry import OPERATORS, Operator
from helpers import Random

pytestmark = pytest.mark.skipif(native.STATUS.variant is None, reason="no compiled kernels")


def operator(name: str) -> tuple[Operator, Any]:
    found = native.caller(f"cofire::{name}")
    assert found is not None
    return OPERATORS[name], found


def of_qlinear(**changes: Any) -> tuple[Any, ...]:
    rand = Random("call")
    q = ops.quantize_weight(rand.normal(8, 32), "absmax", bits=4, group_size=32)
    args = {
        "input": rand.normal(3, 32),
        "codes": q.codes,
        "scale": q.scale,
        "zero": q.zero,
        "offset": None,
        "lut": None,
    }
    args |= {"bias": None, "bits": 4, "group_size": 32, "activations": "exact"}
    assert changes.keys() <= args.keys()
    return tuple((args | changes).values())


def test_every_operator_has_it_but_one_of_lists() -> None:
    assert [name for name in OPERATORS if native.caller(f"cofire::{name}") is None] == ["keep_masks"]


def test_the_results_are_those_of_torch_ops() -> None:
    qlinear, direct = operator("qlinear")
    for args in (of_qlinear(), of_qlinear(activations="int8"), of_qlinear(bias=torch.ones(8)), of_qlinear(bits=4)):
        assert torch.equal(direct(*args), qlinear.overload(*args))
    compact, direct = operator("compact")
    mask = Random("mask").uniform(4, 9) < 0.5
    several = direct(mask)
    assert isinstance(several, tuple) and all(map(torch.equal, several, compact.overload(mask)))


def test_lists_and_floats() -> None:
    conv, direct = operator("sparse_conv2d")
    rand = Random("lists")
    weight = rand.normal(4, 27)
    parts = ops.SparseWeight.from_dense(weight, weight > 0, "csr").arguments()
    for window in (([3, 3], [1, 1], [1, 1], [1, 1]), ((3, 3), (2, 2), (0, 0), (1, 1))):
        args = (rand.normal(2, 3, 6, 6), None, *parts, *window, 1)
        assert torch.equal(direct(*args), conv.overload(*args))
    assert direct(*args[:-5], [3, 3.0], *args[-4:]) is NotImplemented
    qlora, direct = operator("qlora_linear")
    args = (*of_qlinear()[:-3], rand.normal(2, 32), rand.normal(8, 2), 2.0, 4, 32)
    as_integer = (*args[:-3], 2, *args[-2:])
    assert all(map(torch.equal, direct(*as_integer), qlora.overload(*args)))


def test_gradients_are_recorded() -> None:
    qlinear, direct = operator("qlinear")
    x = of_qlinear()[0].requires_grad_()
    y = direct(*of_qlinear(input=x))
    assert y.requires_grad and y.grad_fn is not None
    (grad,) = torch.autograd.grad(y.sum(), x)
    (right,) = torch.autograd.grad(qlinear.overload(*of_qlinear(input=x)).sum(), x)
    assert torch.equal(grad, right)
    with torch.no_grad():
        assert not direct(*of_qlinear(input=x)).requires_grad
    with torch.inference_mode():
        assert direct(*of_qlinear()).is_inference()


class Sub(Tensor):
    pass


class Mode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {"input": torch.ones(3, 32).as_subclass(Sub)},
        {"codes": None},
        {"bits": 4.0},
        {"bits": True},
        {"bits": 1 << 70},
        {"activations": b"exact"},
        {"activations": "\ud800"},
        {"input": [1.0]},
    ],
    ids=lambda c: "-".join(f"{k} {type(v).__name__}" for k, v in c.items()),
)
def test_what_it_does_not_know_it_leaves(changes: dict[str, Any]) -> None:
    assert operator("qlinear")[1](*of_qlinear(**changes)) is NotImplemented


def test_another_number_of_arguments_is_left() -> None:
    direct = operator("qlinear")[1]
    assert direct(*of_qlinear()[:-1]) is NotImplemented and direct(*of_qlinear(), 1) is NotImplemented


def test_modes_and_transforms_are_asked() -> None:
    qlinear, direct = operator("qlinear")
    args = of_qlinear()
    with Mode() as mode:
        assert direct(*args) is NotImplemented
        qlinear.run(*args)
    assert qlinear.overload in mode.calls
    with FlopCounterMode(display=False) as counter:
        qlinear.run(*args)
    assert counter.get_total_flops() == 2 * 3 * 32 * 8
    seen = []

    def inside(x: Tensor) -> Tensor:
        seen.append(direct(*of_qlinear(input=x)))
        return x

    torch.func.grad(lambda x: inside(x).sum())(args[0])
    assert seen == [NotImplemented]


@pytest.mark.filterwarnings("ignore")
def test_traces_hold_the_operator() -> None:
    q = ops.quantize_weight(Random("w").normal(8, 32), "absmax", bits=4, group_size=32)
    traced = torch.jit.trace(lambda x: ops.qlinear(x, q), torch.ones(2, 32), check_trace=False)
    assert "cofire::qlinear" in str(traced.graph)
    x = Random("x").normal(2, 32)
    assert torch.equal(traced(x), ops.qlinear(x, q))


def test_errors_are_those_of_the_kernel() -> None:
    qlinear, direct = operator("qlinear")
    wrong = of_qlinear(group_size=5)
    messages = []
    for call in (direct, qlinear.overload):
        with pytest.raises((RuntimeError, ValueError), match="scale, zero and offset") as caught:
            call(*wrong)
        messages.append((type(caught.value), str(caught.value).split("\n")[0]))
    assert messages[0] == messages[1]


def test_an_unknown_operator_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="there is no operator cofire::nothing"):
        native.caller("cofire::nothing")


def test_writes_are_counted() -> None:
    """By autograd, which would else take an old value for the one that it saved."""
    keys, values, lengths = torch.zeros(3, 2, 5, 4), torch.zeros(3, 2, 5, 4), torch.zeros(3, dtype=torch.int32)
    key = torch.ones(3, 2, 1, 4)
    ops.kv_append_(keys, values, lengths, key, key, torch.ones(3, dtype=torch.bool))
    assert keys._version == values._version == lengths._version == 1 and lengths.tolist() == [1, 1, 1]


def test_compiled_graphs_hold_the_operator() -> None:
    seen: list[str] = []

    def backend(graph: Any, example: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    q = ops.quantize_weight(Random("w").normal(8, 32), "absmax", bits=4, group_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(lambda x: ops.qlinear(x, q), backend=backend, fullgraph=True)(torch.ones(2, 32))
    assert any("cofire.qlinear" in name for name in seen)
