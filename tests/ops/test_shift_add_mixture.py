# SPDX-License-Identifier: Apache-2.0
"""The mixture of two linear experts: choice, products in place, the loss that balances times."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from cofire import native, ops
from cofire.ops import shift_add_mixture
from helpers import Random, Refusal, Sample, check_examples, check_op, refusals


def logits_of(tokens: int, scale: float = 1.0) -> Callable[[Random], tuple[Any, ...]]:
    return lambda rand: (scale * rand.normal(tokens, 2),)


ROUTE = [
    Sample("odd", logits_of(37)),
    Sample("chunks", logits_of(4099)),
    Sample("one", logits_of(1)),
    Sample("none", logits_of(0)),
    # probabilities of exactly 0 and 1, and one exponential that would overflow
    Sample("certain", logits_of(20, 300.0)),
    Sample("ties", lambda rand: (rand.normal(21, 1).expand(21, 2).clone(),)),
]
ROUTE_TINY = [Sample("tiny", logits_of(5)), Sample("tiny_resized", logits_of(8))]


def route_backward(tokens: int) -> Callable[[Random], tuple[Any, ...]]:
    return lambda rand: (rand.normal(tokens), rand.normal(2), rand.normal(tokens, 2))


def lists(shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    index, count = ops.compact(torch.stack([~shift, shift]))
    return index, count


def linear_of(
    tokens: int, k: int, n: int, share: float = 0.5, biases: tuple[bool, bool] = (True, True), *, grad: bool = False
) -> Callable[[Random], tuple[Any, ...]]:
    def make(rand: Random) -> tuple[Any, ...]:
        shift = torch.exp2((2 * rand.normal(n, k)).round()) * (2 * rand.mask(n, k) - 1)
        args = (
            rand.normal(tokens, k),
            rand.normal(n, k),
            shift,
            *(rand.normal(n) if bias else None for bias in biases),
            0.5 + 0.5 * rand.uniform(tokens),
            *lists(rand.mask(tokens, density=share)),
        )
        return (rand.normal(tokens, n), *args) if grad else args

    return make


def samples(grad: bool) -> list[Sample]:
    return [
        Sample("odd", linear_of(19, 13, 37, grad=grad)),
        Sample("blocks", linear_of(300, 70, 40, 0.6, grad=grad)),
        Sample("dense_only", linear_of(13, 9, 16, 0.0, (True, False), grad=grad)),
        Sample("shift_only", linear_of(13, 9, 16, 1.0, (False, True), grad=grad)),
        Sample("no_tokens", linear_of(0, 5, 7, grad=grad)),
        Sample("one_column", linear_of(7, 1, 1, biases=(False, False), grad=grad)),
        Sample("whole_panels", linear_of(96, 64, 64, grad=grad), full=True),
    ]


def tiny(grad: bool) -> list[Sample]:
    return [Sample("tiny", linear_of(5, 3, 4, grad=grad)), Sample("tiny_resized", linear_of(7, 4, 6, grad=grad))]


CHECKS = [
    *check_op("moe_route", ROUTE, tiny=ROUTE_TINY, sums={"importance": 16}),
    *check_op(
        "moe_route_backward",
        [Sample("odd", route_backward(37)), Sample("none", route_backward(0))],
        tiny=[Sample("tiny", route_backward(5)), Sample("tiny_resized", route_backward(8))],
        wide=("grad_importance",),
    ),
    *check_op("moe2_linear", samples(False), tiny=tiny(False)),
    *check_op(
        "moe2_linear_backward",
        samples(True),
        tiny=tiny(True),
        sums={"grad_dense_weight": 4, "grad_shift_weight": 4},
        by_library=True,
    ),
]


@pytest.mark.parametrize("check", CHECKS)
def test_operator(check: Callable[[], None]) -> None:
    check()


def a_call(**changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        index = torch.tensor([[0, 2, -1], [1, -1, -1]], dtype=torch.int32)
        args = {
            "x": torch.ones(3, 4),
            "dense_weight": torch.ones(5, 4),
            "shift_weight": torch.ones(5, 4),
            "dense_bias": None,
            "shift_bias": None,
            "gate": torch.ones(3),
            "index": index,
            "count": torch.tensor([2, 1], dtype=torch.int32),
        }
        changed = {name: make() for name, make in changes.items()}
        return ops.moe2_linear(**(args | changed))

    return call


LISTS = "moe2_linear: index and count must list every token exactly once, as moe_route does"


def ints(*values: Any) -> Callable[[], torch.Tensor]:
    return lambda: torch.tensor(values, dtype=torch.int32)


REFUSALS = [
    Refusal(
        "experts",
        lambda: ops.moe_route(torch.ones(3, 4)),
        ValueError,
        "moe_route: logits must have shape [tokens, 2], one column for each expert, got [3, 4]",
    ),
    Refusal(
        "logits_int",
        lambda: ops.moe_route(torch.ones(3, 2, dtype=torch.int64)),
        TypeError,
        "moe_route: logits must be a floating-point tensor, got torch.int64",
    ),
    Refusal(
        "x_rank",
        a_call(x=lambda: torch.ones(3)),
        ValueError,
        "moe2_linear: x must have shape [tokens, K], got [3]",
    ),
    Refusal(
        "x_int",
        a_call(x=lambda: torch.ones(3, 4, dtype=torch.int32)),
        TypeError,
        "moe2_linear: x must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "dense",
        a_call(dense_weight=lambda: torch.ones(4, 5)),
        ValueError,
        "moe2_linear: dense_weight must have shape [N, 4], got [4, 5]",
    ),
    Refusal(
        "shift",
        a_call(shift_weight=lambda: torch.ones(6, 4)),
        ValueError,
        "moe2_linear: shift_weight must have shape [5, 4], got [6, 4]",
    ),
    Refusal(
        "bias",
        a_call(shift_bias=lambda: torch.ones(4)),
        ValueError,
        "moe2_linear: shift_bias must have shape [5], got [4]",
    ),
    Refusal("gate", a_call(gate=lambda: torch.ones(4)), ValueError, "moe2_linear: gate must have shape [3], got [4]"),
    Refusal(
        "index",
        a_call(index=lambda: torch.zeros(3, 3, dtype=torch.int32)),
        ValueError,
        "moe2_linear: index must have shape [2, 3], got [3, 3]",
    ),
    Refusal(
        "count_dtype",
        a_call(count=lambda: torch.tensor([2, 1])),
        TypeError,
        "moe2_linear: count must be int32 (as moe_route returns it), got torch.int64",
    ),
    Refusal(
        "mixed",
        a_call(gate=lambda: torch.ones(3, dtype=torch.bfloat16)),
        TypeError,
        "moe2_linear: gate must have the dtype of x (torch.float32), got torch.bfloat16",
    ),
    Refusal("twice", a_call(index=ints([0, 1, -1], [1, -1, -1])), ValueError, LISTS, data=True),
    Refusal("outside", a_call(index=ints([0, 3, -1], [1, -1, -1])), ValueError, LISTS, data=True),
    Refusal("negative", a_call(index=ints([0, -1, -1], [1, -1, -1])), ValueError, LISTS, data=True),
    Refusal("missing", a_call(count=ints(1, 1)), ValueError, LISTS, data=True),
    Refusal("too_many", a_call(count=ints(4, 1)), ValueError, LISTS, data=True),
    Refusal("below_zero", a_call(count=ints(-1, 1)), ValueError, LISTS, data=True),
    Refusal(
        "load_shape",
        lambda: ops.balance_loss(torch.ones(3), (6, 4)),
        ValueError,
        "balance_loss: load must have shape [2] or [tokens, 2], got [3]",
    ),
    Refusal(
        "latency",
        lambda: ops.balance_loss(torch.ones(2), (6, 0)),
        ValueError,
        "balance_loss: latency must be two positive finite numbers, got (6, 0)",
    ),
    Refusal(
        "latencies",
        lambda: ops.balance_loss(torch.ones(2), (6, 4, 2)),
        ValueError,
        "balance_loss: latency must be two positive finite numbers, got (6, 4, 2)",
    ),
    Refusal(
        "latency_tensor",
        lambda: ops.balance_loss(torch.ones(2), torch.ones(3)),
        ValueError,
        "balance_loss: latency must be two positive finite numbers, got shape [3]",
    ),
    Refusal(
        "load_int",
        lambda: ops.balance_loss(torch.ones(2, dtype=torch.int32), (6, 4)),
        TypeError,
        "balance_loss: load must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "deviation",
        lambda: ops.load_probability(torch.ones(3, 2), torch.ones(3, 2), torch.ones(2, 3, 2)),
        ValueError,
        "load_probability: deviation must have a shape that broadcasts to [3, 2], got [2, 3, 2]",
    ),
    Refusal(
        "noisy",
        lambda: ops.load_probability(torch.ones(3, 2), torch.ones(4, 2), torch.ones(2)),
        ValueError,
        "load_probability: noisy must have shape [3, 2], got [4, 2]",
    ),
]


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_lists_are_checked_by_the_reference_too() -> None:
    args = (torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 3), None, None, torch.ones(2))
    bad = (torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"^{LISTS}$"):
        shift_add_mixture._moe2_linear_reference(*args, *bad)


def test_each_token_goes_through_its_expert() -> None:
    """Against a loop over tokens."""
    rand = Random("loop")
    x, logits = rand.normal(29, 6), rand.normal(29, 2)
    experts = [(rand.normal(5, 6), rand.normal(5)), (rand.normal(5, 6).sign(), rand.normal(5))]
    (dense, dense_bias), (shift, shift_bias) = experts
    gate, index, count, importance = ops.moe_route(logits)
    chance = logits.softmax(1)
    torch.testing.assert_close(importance, chance.sum(0))
    y = ops.moe2_linear(x, dense, shift, dense_bias, shift_bias, gate, index, count)
    for t in range(29):
        e = int(logits[t, 1] >= logits[t, 0])
        torch.testing.assert_close(y[t], chance[t, e] * F.linear(x[t], *experts[e]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # a kernel's and the reference's
@pytest.mark.parametrize("unused", [0, 1])
def test_an_expert_without_tokens_is_not_read(unused: int, dtype: torch.dtype) -> None:
    """What it holds does no harm, forward or backward; equal logits choose the shift expert."""
    rand = Random("unread")
    x, used = rand.normal(29, 6).to(dtype).requires_grad_(), rand.normal(5, 6).sign().to(dtype).requires_grad_()
    weights = [used, used]
    weights[unused] = torch.full((5, 6), torch.nan, dtype=dtype, requires_grad=True)
    logits = torch.tensor([1.0, 1.0] if unused == 0 else [9.0, 0.0], dtype=dtype).expand(29, 2)
    gate, index, count, _ = ops.moe_route(logits)
    assert count[unused] == 0 and count.sum() == 29
    y = ops.moe2_linear(x, *weights, None, None, gate, index, count)
    expected = gate[0] * F.linear(x, used)
    torch.testing.assert_close(y, expected)
    cotangent = rand.normal(29, 5).to(dtype)
    found = torch.autograd.grad(y, [x, used, weights[unused]], cotangent)
    torch.testing.assert_close(found[:2], torch.autograd.grad(expected, [x, used], cotangent))
    assert not found[2].any()


@pytest.mark.skipif(native.STATUS.variant is None, reason="no compiled kernels")
@pytest.mark.parametrize("wrong", range(9))
def test_the_kernels_do_not_trust_shapes(wrong: int) -> None:
    """Called past the public function, a kernel reads nothing that is not there."""
    grad, *args = linear_of(7, 4, 6, grad=True)(Random("shapes"))
    backward, whole = torch.ops.cofire.moe2_linear_backward, [grad, *args]
    backward(*whole)
    whole[wrong] = whole[wrong][..., :-1].contiguous()
    with pytest.raises(ValueError, match="^moe2_linear_backward: .* (do|does) not fit "):
        backward(*whole)
    if wrong > 0:
        with pytest.raises(ValueError, match="^moe2_linear: .* (do|does) not fit "):
            torch.ops.cofire.moe2_linear(*whole[1:])


@pytest.mark.skipif(native.STATUS.variant is None, reason="no compiled kernels")
def test_the_router_does_not_trust_shapes() -> None:
    with pytest.raises(ValueError, match=r"^moe_route: logits must have shape \[tokens, 2\], got "):
        torch.ops.cofire.moe_route(torch.ones(4, 3))
    with pytest.raises(ValueError, match="^moe_route_backward: the gradients do not fit logits "):
        torch.ops.cofire.moe_route_backward(torch.ones(3), torch.ones(2), torch.ones(4, 2))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off")
def test_lists_of_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks than a program reads at a time: their numbers are summed over several reads."""
    from cofire_kernels import configs, shift_add_mixture

    monkeypatch.setitem(configs.forced, "moe_route", {"BLOCK": 16, "num_warps": 1})
    logits = Random("chunks").normal(16 * 65 + 3, 2)
    found, expected = shift_add_mixture.moe_route(logits), ops.moe_route(logits)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
    torch.testing.assert_close((found[0], found[3]), (expected[0], expected[3]))


def test_balance_golden() -> None:
    """(30, 70) with latencies (6, 4): scaled (180, 280), mean 230, unbiased variance 5000."""
    assert ops.balance_loss(torch.tensor([30.0, 70.0]), (6, 4)).item() == pytest.approx(5000 / 230**2, rel=1e-6)
    assert ops.balance_loss(torch.tensor([40.0, 60.0]), (6, 4)).item() == 0
    chances = torch.tensor([[0.25, 0.75], [0.35, 0.65]], dtype=torch.float64)
    assert ops.balance_loss(chances, torch.tensor([6.0, 4.0])).item() == pytest.approx(5000 / 230**2, rel=1e-9)


def test_balance_loss_compiles_and_moves_nothing_between_devices() -> None:
    """Latencies become constants: a tensor made of them on a GPU, or a look at one there, would synchronise each step."""
    load = torch.tensor([30.0, 70.0], requires_grad=True)
    compiled = torch.compile(ops.balance_loss, fullgraph=True, backend="eager")
    for latency in ((6, 4), torch.tensor([6.0, 4.0])):
        assert compiled(load, latency).item() == ops.balance_loss(load, latency).item()
    meta = ops.balance_loss(torch.ones(2, device="meta"), torch.tensor([6.0, 4.0]))
    assert (meta.device.type, meta.shape) == ("meta", ())
    with FakeTensorMode():
        assert ops.balance_loss(torch.ones(2), (6, 4)).shape == ()


def test_load_probability_is_a_chance() -> None:
    """Against draws: how often the clean logit with new noise passes the other's noisy one."""
    generator = torch.Generator().manual_seed(0)
    clean, noisy = torch.tensor([[0.3, 0.0]]), torch.tensor([[0.5, -0.2]])
    draws = clean + torch.tensor([0.7, 0.4]) * torch.randn(200_000, 2, generator=generator)
    found = (draws > noisy.flip(1)).float().mean(0)
    expected = ops.load_probability(clean, noisy, torch.tensor([0.7, 0.4]))[0]
    assert torch.allclose(found, expected, atol=0.005)


@pytest.mark.parametrize(("latency", "share"), [((6.0, 4.0), 0.6), ((8.0, 2.0), 0.8)])
def test_the_router_follows_the_latencies(latency: tuple[float, float], share: float) -> None:
    """Both parts of a router's training: the task reaches it through the gate, and the loss moves the share of tokens."""
    rand = Random("router")
    x, dense, shift = rand.normal(400, 8), rand.normal(4, 8), rand.normal(4, 8).sign()
    router = torch.nn.Linear(8, 2)
    with torch.no_grad():
        router.weight.copy_(rand.normal(2, 8))
        router.bias.zero_()
    gate, index, count, _ = ops.moe_route(router(x))
    (gradient,) = torch.autograd.grad(
        ops.moe2_linear(x, dense, shift, None, None, gate, index, count).square().mean(), [router.weight]
    )
    assert gradient.abs().max() > 1e-3
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        logits = router(x)
        spread = torch.ones(())
        draw = logits + spread * rand.normal(400, 2)
        chance = ops.load_probability(logits, draw, spread)
        loss = ops.balance_loss(ops.moe_route(logits)[3], latency) + ops.balance_loss(chance, latency)
        loss.backward()
        optimizer.step()
    _, _, count, importance = ops.moe_route(router(x))
    assert importance[1].item() / 400 == pytest.approx(share, abs=0.05)
    assert count[1].item() / 400 == pytest.approx(share, abs=0.08)


def test_examples() -> None:
    check_examples(shift_add_mixture)
