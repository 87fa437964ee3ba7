# SPDX-License-Identifier: Apache-2.0
"""The harness on operators that are wrong: every check must fail on the fault that it is there for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire.registry import OPERATORS, Backward, Operator
from helpers import (
    TORCH,
    Args,
    Case,
    Provider,
    Random,
    Refusal,
    Sample,
    check_autocast,
    check_close,
    check_compile,
    check_counts,
    check_examples,
    check_forward,
    check_gradcheck,
    check_gradgradcheck,
    check_gradient,
    check_layouts,
    check_opcheck,
    check_refusal,
)

EVERY = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_sample(poison: bool = False) -> Sample:
    def make(rand: Random) -> Args:
        mask = rand.mask(3, 7)
        x = rand.normal(3, 7)
        x = x.masked_fill(~mask, torch.nan) if poison else x
        selection = OPERATORS["compact"].reference
        return x, rand.normal(5, 7), rand.normal(5), *selection(mask), *selection(rand.mask(3, 5)), "relu"

    return Sample("sample", make)


LINEAR = Case(OPERATORS["gated_linear"], constants=(), wide=(), kept=(), sums={}, decided_by=None)
POOL = Case(OPERATORS["channel_pool"], constants=(), wide=(), kept=(), sums={}, decided_by=None)
POOL_SAMPLE = Sample("sample", lambda rand: (rand.normal(2, 3, 4, 5), "max"))


def wrong(case: Case, change: Callable[..., Any], name: str = "broken") -> Provider:
    """The reference with a fault: ``change(outputs, args)``."""

    def run(*args: Any) -> Any:
        return change(case.operator.reference(*args), args)

    return Provider(name, "cpu", run, EVERY)


@pytest.fixture(autouse=True)
def filled() -> Iterator[None]:
    """As in operator tests: unwritten memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def add_at_end(value: float) -> Callable[..., Tensor]:
    def change(output: Tensor, args: Args) -> Tensor:
        output.view(-1)[-1] += value
        return output

    return change


def forget_the_last(output: Tensor, args: Args) -> Tensor:
    result = torch.empty_like(output)
    result.view(-1)[:-1] = output.view(-1)[:-1]
    return result


def write_to_input(output: Tensor, args: Args) -> Tensor:
    args[0].detach()[0, 0] += 1
    return output


FORWARD_FAULTS = {
    "a value": (add_at_end(1e-4), "1 of 15 values are wrong"),
    "nan": (add_at_end(torch.nan), "1 of 15 values are wrong"),
    "unwritten": (forget_the_last, "1 of 15 values are wrong"),
    "shape": (lambda y, args: y[:, :4].clone(), "shape"),
    "dtype": (lambda y, args: y.double(), "dtype"),
    "strides": (lambda y, args: y.t().contiguous().t(), "the fake says"),
    "input": (write_to_input, "it wrote to its input input"),
}


@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_a_wrong_result_is_found(fault: str) -> None:
    change, message = FORWARD_FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        check_forward(LINEAR, wrong(LINEAR, change), linear_sample(), torch.float32)


def test_the_right_result_passes() -> None:
    check_forward(LINEAR, wrong(LINEAR, lambda y, args: y), linear_sample(), torch.float32)
    check_layouts(LINEAR, wrong(LINEAR, lambda y, args: y), linear_sample())
    check_gradient(LINEAR, wrong(LINEAR, lambda y, args: y), linear_sample(), torch.float32)


def test_16_bit_accumulation_is_found() -> None:
    """What plain torch would not lose."""
    sample = Sample("sample", lambda rand: (rand.uniform(4, 3, 20, 20), "avg"))

    def change(outputs: tuple[Tensor, ...], args: Args) -> tuple[Tensor, ...]:
        total = args[0].new_zeros(args[0].shape[:2])
        for pixel in args[0].flatten(2).unbind(2):
            total = total + pixel
        return total / 400, *outputs[1:]

    with pytest.raises(AssertionError, match="values are wrong"):
        check_forward(POOL, wrong(POOL, change), sample, torch.bfloat16)


@pytest.mark.parametrize(("by", "passes"), [(6e-8, True), (1e-3, False)])
def test_of_a_single_number_plain_torch_may_be_right_by_luck(by: float, passes: bool) -> None:
    """Only other samples show what it usually loses; more than that is still a fault."""
    again = [(torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0 + i * 1e-7)) for i in range(9)]
    r, t = again[0]
    o = (r + by + 2e-7).float()
    with pytest.raises(AssertionError, match="1 of 1 values"):
        check_close("alone", o, r, t, factor=2, scale=1)
    with nullcontext() if passes else pytest.raises(AssertionError, match="1 of 1 values"):
        check_close("of several", o, r, t, factor=2, scale=1, again=lambda draw: again[draw])
    with pytest.raises(AssertionError, match="2 of 2 values"):
        check_close("two", o.expand(2), r.expand(2), t.expand(2), factor=2, scale=1, again=lambda draw: again[draw])


def test_an_aliased_output_is_found() -> None:
    case = Case(OPERATORS["channel_pool_backward"], ("input",), (), (), {}, None)
    sample = Sample("sample", lambda rand: (torch.ones(2, 3), torch.ones(2, 3, 1, 1), "avg"))
    with pytest.raises(AssertionError, match="output 0 shares the memory of grad"):
        check_forward(case, wrong(case, lambda y, args: args[0].view(2, 3, 1, 1)), sample, torch.float32)


def test_outputs_that_share_memory_are_found() -> None:
    def change(outputs: tuple[Tensor, ...], args: Args) -> tuple[Tensor, ...]:
        both = torch.cat([outputs[1].flatten(), outputs[2]])
        return outputs[0], both[:6].view(2, 3), both[6:]

    with pytest.raises(AssertionError, match="count shares the memory of index"):
        check_forward(POOL, wrong(POOL, change), POOL_SAMPLE, torch.float32)


@pytest.mark.parametrize("which", [1, 2])
def test_a_wrong_integer_is_found(which: int) -> None:
    def change(outputs: tuple[Tensor, ...], args: Args) -> tuple[Tensor, ...]:
        outputs[which].view(-1)[0] += 1
        return outputs

    with pytest.raises(AssertionError, match="1 values differ"):
        check_forward(POOL, wrong(POOL, change), POOL_SAMPLE, torch.float32)


def test_a_decision_against_the_own_floats_is_found() -> None:
    def decided(args: Args, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"mask": outputs[0] > 0}

    def change(outputs: tuple[Tensor, ...], args: Args) -> tuple[Tensor, ...]:
        outputs[1][0, 0] ^= True
        return outputs

    case = Case(OPERATORS["gate_head"], (), (), (), {}, decided)
    sample = Sample("sample", lambda rand: (rand.normal(2, 3), rand.normal(4, 3), None, True, 0))
    with pytest.raises(AssertionError, match="mask, as its own floats decide"):
        check_forward(case, wrong(case, change), sample, torch.float32)


def test_different_bits_on_the_second_run_are_found() -> None:
    calls = itertools.count()

    def change(output: Tensor, args: Args) -> Tensor:  # one ulp, which the rule for floats allows
        return torch.nextafter(output, output + 1) if next(calls) % 2 else output

    with pytest.raises(AssertionError, match="changes from run to run"):
        check_forward(LINEAR, wrong(LINEAR, change), linear_sample(), torch.float32)


@pytest.fixture
def as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a C++ library were loaded."""
    monkeypatch.setattr("helpers.native.STATUS", replace(__import__("cofire").native.STATUS, variant="default"))


@pytest.mark.usefixtures("as_compiled")
def test_different_bits_with_other_threads_are_found() -> None:
    def change(output: Tensor, args: Args) -> Tensor:
        return torch.nextafter(output, output + 1) if torch.get_num_threads() == 3 else output

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(AssertionError, match="changes with 3 threads"):
            check_forward(LINEAR, wrong(LINEAR, change, "cpu"), linear_sample(), torch.float32)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("as_compiled")
def test_a_kernel_that_hands_over_is_found() -> None:
    provider = Provider("cpu", "cpu", torch.ops.cofire.gated_linear.reference, EVERY)
    with pytest.raises(
        AssertionError, match="the registry claims a C\\+\\+ kernel for torch.float32, but the reference ran"
    ):
        check_forward(LINEAR, provider, linear_sample(), torch.float32)


def test_multiplying_by_the_mask_is_found() -> None:
    """NaN times zero is NaN: what a gate leaves out must not be read at all."""

    def change(output: Tensor, args: Args) -> Tensor:
        return output + (args[0] * 0).sum()

    check_forward(LINEAR, wrong(LINEAR, change), linear_sample(), torch.float32)
    with pytest.raises(AssertionError, match="values are wrong"):
        check_forward(LINEAR, wrong(LINEAR, change), linear_sample(poison=True), torch.float32)


def test_a_kernel_that_ignores_strides_is_found() -> None:
    def run(*args: Any) -> Any:
        x = args[0]
        return LINEAR.operator.reference(torch.as_strided(x, x.shape, (x.shape[1], 1)), *args[1:])

    with pytest.raises(AssertionError, match="float32, strided: output 0: .* values are wrong"):
        check_layouts(LINEAR, Provider("broken", "cpu", run, EVERY), linear_sample())


def test_a_wrong_gradient_is_found() -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * (1 + 1e-4)

    with pytest.raises(AssertionError, match="gradient of input"):
        check_gradient(LINEAR, wrong(LINEAR, lambda y, args: Scale.apply(y)), linear_sample(), torch.float32)


# ------------------------------------------------------------------------ operators with a fault in their parts

counter = itertools.count()


def cube(x: Tensor) -> Tensor:
    return x**3


def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


right_backward = Backward(save, lambda ctx, grad: 3 * ctx.saved_tensors[0] ** 2 * grad, "reference")
wrong_backward = Backward(save, lambda ctx, grad: 2 * ctx.saved_tensors[0] ** 2 * grad, "reference")
once_backward = Backward(save, lambda ctx, grad: (3 * ctx.saved_tensors[0] ** 2).detach() * grad, "reference")
CUBE = [
    Sample("tiny", lambda rand: (rand.uniform(2, 3) + 0.5,)),
    Sample("tiny_resized", lambda rand: (rand.uniform(4, 5) + 0.5,)),
]


@pytest.fixture
def operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Case]]:
    """Makes x ** 3 with parts of one's choice into an operator of a library that goes away after the test."""
    from cofire import registry

    with torch.library._scoped_library("cofire", "FRAGMENT") as library:
        monkeypatch.setattr(registry, "LIBRARY", library)
        monkeypatch.setattr(registry, "OPERATORS", {})

        def make(**parts: Any) -> Case:
            name = f"cube_{next(counter)}"
            defaults = {
                "family": "test",
                "reference": cube,
                "fake": torch.empty_like,
                "backward": right_backward,
                "cpu": "none",
                "triton": "none",
            }
            return Case(
                registry.register(Operator(f"{name}(Tensor input) -> Tensor", **defaults | parts)), (), (), (), {}, None
            )

        yield make


def test_the_right_operator_passes(operator: Callable[..., Case]) -> None:
    case = operator()
    check_opcheck(case, CUBE[0])
    check_gradcheck(case, CUBE[0])
    check_gradgradcheck(case, CUBE[0])
    check_autocast(case, CUBE[0])
    for dynamic in (False, True):
        check_compile(case, CUBE, dynamic, backend="aot_eager")


@pytest.mark.parametrize(
    "fake",
    [
        pytest.param(lambda x: x.new_empty(x.shape[::-1]), id="shape"),
        pytest.param(lambda x: x.new_empty(x.shape, dtype=torch.float64), id="dtype"),
        pytest.param(lambda x: x.new_empty(x.shape[::-1]).t(), id="strides"),
    ],
)
def test_a_wrong_fake_is_found(operator: Callable[..., Case], fake: Any) -> None:
    case = operator(fake=fake)
    with pytest.raises(AssertionError, match="the fake says"):
        check_forward(case, Provider("broken", "cpu", cube, EVERY), CUBE[0], torch.float32)
    x = torch.ones(2, 3)
    if TORCH < (2, 13) and (fake(x).shape, fake(x).dtype) == (x.shape, x.dtype):
        return  # that opcheck does not compare strides
    with pytest.raises(Exception):  # noqa: B017, PT011 (opcheck has an error of its own)
        check_opcheck(case, CUBE[0])


def test_a_wrong_backward_is_found(operator: Callable[..., Case]) -> None:
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        check_gradcheck(operator(backward=wrong_backward), CUBE[0])


def test_a_backward_that_is_not_differentiable_is_found(operator: Callable[..., Case]) -> None:
    case = operator(backward=once_backward)
    check_gradcheck(case, CUBE[0])
    with pytest.raises(RuntimeError, match="not require grad|mismatch"):
        check_gradgradcheck(case, CUBE[0])


def test_a_graph_break_is_found(operator: Callable[..., Case]) -> None:
    def validate(x: Tensor) -> None:
        message = f"got {list(x.shape)!s}"  # a sentence that is made before it is needed
        if x.sum() < 0:
            raise ValueError(message)

    with pytest.raises(Exception, match="[Dd]ata-dependent"):
        check_compile(operator(validate=validate), CUBE, dynamic=False, backend="aot_eager")


def test_a_second_compilation_is_found(operator: Callable[..., Case]) -> None:
    def validate(x: Tensor) -> None:
        if (
            int(x.shape[0]) == 2 and x.shape[1] == 3
        ):  # a size that the code looks at is a size that the graph is bound to
            return

    with pytest.raises(torch._dynamo.exc.RecompileError):
        check_compile(operator(validate=validate), CUBE, dynamic=True, backend="aot_eager")


def test_a_kernel_that_autocast_reaches_is_found(
    operator: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = operator(reference=lambda x: (x @ x.t()) @ x, fake=torch.empty_like)
    check_autocast(case, CUBE[0])
    bare = replace(case.operator)
    object.__setattr__(bare, "name", case.operator.name)
    monkeypatch.setattr(type(bare), "__call__", lambda self, x: (x @ x.t()) @ x)
    with pytest.raises(AssertionError, match="changes under autocast"):
        check_autocast(replace(case, operator=bare), CUBE[0])


def test_a_wrong_count_is_found(operator: Callable[..., Case]) -> None:
    check_counts(operator(bytes=lambda x: 2 * x.numel() * x.element_size(), flops=lambda x: 2 * x.numel()), CUBE[0])
    for parts in ({"bytes": lambda x: 0}, {"bytes": lambda x: 10**6}, {"flops": lambda x: 0}):
        with pytest.raises(AssertionError):
            check_counts(operator(**parts), CUBE[0])


def fail(sentence: str) -> None:
    raise ValueError(sentence)


@pytest.mark.parametrize("tracing", [False, True])
def test_a_wrong_sentence_is_found(tracing: bool) -> None:
    check_refusal(Refusal("right", lambda: fail("this"), ValueError, "this"), tracing)
    with pytest.raises(AssertionError):
        check_refusal(Refusal("sentence", lambda: fail("that"), ValueError, "this"), tracing)
    with pytest.raises(ValueError, match="this"):
        check_refusal(Refusal("type", lambda: fail("this"), TypeError, "this"), tracing)
    with pytest.raises(pytest.fail.Exception):
        check_refusal(Refusal("nothing", lambda: None, ValueError, "this"), tracing)


class Documented:
    """Stands in for a module."""

    __all__ = ("example",)

    @staticmethod
    def example() -> int:
        """
        >>> 1 + 1
        3
        """
        return 2


def test_a_wrong_example_is_found() -> None:
    with pytest.raises(AssertionError, match="Expected"):
        check_examples(Documented)
