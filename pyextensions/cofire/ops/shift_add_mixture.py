# SPDX-License-Identifier: Apache-2.0
"""A mixture of two linear experts, one dense (expert 0), one with powers of two as weights (expert 1).

A router gives each token two logits. The larger one decides which expert the token goes through, and its probability,
the *gate*, scales what comes out, so that the router is trained by the task; :func:`balance_loss` trains it to give
each expert a share that its latency allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.ops.checks import check_device, check_float, check_same, refuse, shape_of
from cofire.ops.gating import mask_from_index
from cofire.ops.selection import compact
from cofire.registry import Backward, Kernel, Operator, register, through_reference

__all__ = ["balance_loss", "load_probability", "moe2_linear", "moe_route"]

EXPERTS = 2


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------- moe_route


def _validate_moe_route(logits: Tensor) -> None:
    _check_logits("moe_route", logits=logits)


def _check_logits(operator: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dim() != 2 or x.shape[1] != EXPERTS:
            refuse(operator, f"{name} must have shape [tokens, 2], one column for each expert, got {shape_of(x)}")
        check_float(operator, **{name: x})


def _moe_route_reference(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probability = torch.softmax(logits.to(_wide(logits)), 1)
    shift = logits[:, 1] >= logits[:, 0]
    gate = torch.where(shift, probability[:, 1], probability[:, 0]).to(logits.dtype)
    index, count = compact(torch.stack([~shift, shift]))
    return gate, index, count, probability.sum(0)


def _moe_route_fake(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = logits.shape[0]
    return (
        logits.new_empty(tokens),
        logits.new_empty((EXPERTS, tokens), dtype=torch.int32),
        logits.new_empty(EXPERTS, dtype=torch.int32),
        logits.new_empty(EXPERTS, dtype=_wide(logits)),
    )


def _moe_route_backward_reference(grad_gate: Tensor, grad_importance: Tensor, logits: Tensor) -> Tensor:
    probability = torch.softmax(logits.to(grad_importance.dtype), 1)
    gate = torch.where(logits[:, 1] >= logits[:, 0], grad_gate, -grad_gate).to(grad_importance.dtype)
    ahead = probability.prod(1) * (gate + grad_importance[1] - grad_importance[0])
    return torch.stack([-ahead, ahead], 1).to(logits.dtype)


_moe_route_backward = register(
    Operator(
        "moe_route_backward(Tensor grad_gate, Tensor grad_importance, Tensor logits) -> Tensor",
        family="shift_add",
        reference=_moe_route_backward_reference,
        fake=lambda grad_gate, grad_importance, logits: logits.new_empty(logits.shape),
        backward=through_reference(_moe_route_backward_reference),
        triton=Kernel("cofire_kernels.shift_add_mixture:moe_route_backward"),
    )
)


def _save_moe_route(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _moe_route_grad(ctx: Any, gate: Tensor, index: Any, count: Any, importance: Tensor) -> Tensor:
    result: Tensor = _moe_route_backward(gate, importance, *ctx.saved_tensors)
    return result


_moe_route = register(
    Operator(
        "moe_route(Tensor logits) -> (Tensor gate, Tensor index, Tensor count, Tensor importance)",
        family="shift_add",
        validate=_validate_moe_route,
        reference=_moe_route_reference,
        fake=_moe_route_fake,
        backward=Backward(_save_moe_route, _moe_route_grad, "moe_route_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.shift_add_mixture:moe_route"),
        bytes=lambda logits: logits.numel() * (logits.element_size() + 4) + logits.shape[0] * logits.element_size(),
    )
)


def moe_route(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The choice of one of two experts for each token, as lists of tokens, without a host synchronisation.

    Args:
        logits: ``[tokens, 2]``, of the dense expert and of the shift expert. Equal ones choose the shift expert, the
            cheap one.

    Returns:
        ``gate`` ``[tokens]``, the probability of the chosen expert; ``index`` int32 ``[2, tokens]``, the tokens of each
        expert in ascending order, followed by -1; ``count`` int32 ``[2]``, how many they are; ``importance`` ``[2]``, the
        sum of each expert's probabilities, in fp32 (fp64 of fp64). ``gate`` and ``importance`` have gradients.

    Raises:
        TypeError: ``logits`` is no floating-point tensor.
        ValueError: it has another shape.

    Example:
        >>> gate, index, count, importance = moe_route(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
        >>> gate[0].item(), index.tolist(), count.tolist()
        (0.5, [[1, -1, -1], [0, 2, -1]], [1, 2])

    Source: ShiftAddViT (You et al. 2023, section 4.3), with the gate of Switch Transformers (Fedus et al. 2022, section 2.1).
    """
    gate, index, count, importance = _moe_route(logits)
    return gate, index, count, importance


# ----------------------------------------------------------------------------------------------- moe2_linear

SCHEMA = (
    "Tensor x, Tensor dense_weight, Tensor shift_weight, Tensor? dense_bias, Tensor? shift_bias, Tensor gate, "
    "Tensor index, Tensor count"
)


def _validate_moe2_linear(
    x: Tensor,
    dense_weight: Tensor,
    shift_weight: Tensor,
    dense_bias: Tensor | None,
    shift_bias: Tensor | None,
    gate: Tensor,
    index: Tensor,
    count: Tensor,
) -> None:
    op = "moe2_linear"
    if x.dim() != 2:
        refuse(op, f"x must have shape [tokens, K], got {shape_of(x)}")
    floats = {
        "dense_weight": dense_weight,
        "shift_weight": shift_weight,
        "dense_bias": dense_bias,
        "shift_bias": shift_bias,
        "gate": gate,
    }
    check_float(op, x=x, **floats)
    if dense_weight.dim() != 2 or dense_weight.shape[1] != x.shape[1]:
        refuse(op, f"dense_weight must have shape [N, {x.shape[1]}], got {shape_of(dense_weight)}")
    if shift_weight.shape != dense_weight.shape:
        refuse(op, f"shift_weight must have shape {shape_of(dense_weight)}, got {shape_of(shift_weight)}")
    for name, bias in (("dense_bias", dense_bias), ("shift_bias", shift_bias)):
        if bias is not None and list(bias.shape) != [dense_weight.shape[0]]:
            refuse(op, f"{name} must have shape [{dense_weight.shape[0]}], got {shape_of(bias)}")
    if list(gate.shape) != [x.shape[0]]:
        refuse(op, f"gate must have shape [{x.shape[0]}], got {shape_of(gate)}")
    for name, entries, shape in (("index", index, [EXPERTS, x.shape[0]]), ("count", count, [EXPERTS])):
        if entries.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be int32 (as moe_route returns it), got {entries.dtype}")
        if list(entries.shape) != shape:
            refuse(op, f"{name} must have shape {shape}, got {shape_of(entries)}")
    check_same(op, "x", x, **floats)
    check_device(op, "x", x, index=index, count=count)


def _refuse_bad_lists(index: Tensor, count: Tensor) -> None:
    """What tracing cannot see; on a CPU only, because elsewhere it would synchronise."""
    if index.device.type != "cpu":
        return
    listed = torch.cat([row[: max(0, n)] for row, n in zip(index, count.tolist(), strict=True)])
    if not torch.equal(listed.sort().values, torch.arange(index.shape[1], dtype=index.dtype)):
        refuse("moe2_linear", "index and count must list every token exactly once, as moe_route does")


def _of_shift(index: Tensor, count: Tensor) -> Tensor:
    """Whether a token goes through the shift expert: bool ``[tokens, 1]``."""
    return mask_from_index(index[1:], count[1:], index.shape[1])[0, :, None]


def _moe2_linear_reference(
    x: Tensor,
    dense_weight: Tensor,
    shift_weight: Tensor,
    dense_bias: Tensor | None,
    shift_bias: Tensor | None,
    gate: Tensor,
    index: Tensor,
    count: Tensor,
) -> Tensor:
    _refuse_bad_lists(index, count)
    shift = _of_shift(index, count)
    y = torch.where(shift, F.linear(x, shift_weight, shift_bias), F.linear(x, dense_weight, dense_bias))
    return y * gate[:, None]


def _moe2_linear_backward_reference(
    grad: Tensor,
    x: Tensor,
    dense_weight: Tensor,
    shift_weight: Tensor,
    dense_bias: Tensor | None,
    shift_bias: Tensor | None,
    gate: Tensor,
    index: Tensor,
    count: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shift = _of_shift(index, count)
    y = torch.where(shift, F.linear(x, shift_weight, shift_bias), F.linear(x, dense_weight, dense_bias))
    scaled = grad * gate[:, None]
    dense, cheap = scaled.masked_fill(shift, 0), scaled.masked_fill(~shift, 0)
    grad_x = torch.where(shift, scaled @ shift_weight, scaled @ dense_weight)
    return grad_x, dense.t() @ x, cheap.t() @ x, dense.sum(0), cheap.sum(0), (grad * y).sum(1)


_moe2_linear_backward = register(
    Operator(
        f"moe2_linear_backward(Tensor grad, {SCHEMA}) -> (Tensor grad_x, Tensor grad_dense_weight, "
        "Tensor grad_shift_weight, Tensor grad_dense_bias, Tensor grad_shift_bias, Tensor grad_gate)",
        family="shift_add",
        reference=_moe2_linear_backward_reference,
        fake=lambda grad, x, dense_weight, shift_weight, dense_bias, shift_bias, gate, *rest: (
            x.new_empty(x.shape),
            *(x.new_empty(dense_weight.shape) for _ in range(EXPERTS)),
            *(x.new_empty(dense_weight.shape[:1]) for _ in range(EXPERTS)),
            gate.new_empty(gate.shape),
        ),
        backward=through_reference(_moe2_linear_backward_reference),
        triton=Kernel("cofire_kernels.shift_add_mixture:moe2_linear_backward"),
    )
)


def _save_moe2_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _moe2_linear_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    x, dense, shift, dense_bias, shift_bias, gate = _moe2_linear_backward(grad, *saved)
    biases = (dense_bias if saved[3] is not None else None, shift_bias if saved[4] is not None else None)
    return x, dense, shift, *biases, gate, None, None


def _moe2_linear_bytes(x: Tensor, dense_weight: Tensor, shift_weight: Tensor, *rest: Any) -> int:
    tokens, rows = x.shape[0], dense_weight.shape[0]
    floats = x.numel() + tokens * (rows + 1) + 2 * dense_weight.numel()
    return floats * x.element_size() + 4 * tokens


_moe2_linear = register(
    Operator(
        f"moe2_linear({SCHEMA}) -> Tensor",
        family="shift_add",
        validate=_validate_moe2_linear,
        reference=_moe2_linear_reference,
        fake=lambda x, dense_weight, *rest: x.new_empty((x.shape[0], dense_weight.shape[0])),
        backward=Backward(_save_moe2_linear, _moe2_linear_grad, "moe2_linear_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.shift_add_mixture:moe2_linear"),
        autocast="lower",
        flops=lambda x, dense_weight, *rest: 2 * x.shape[0] * dense_weight.numel(),
        bytes=_moe2_linear_bytes,
    )
)


def moe2_linear(
    x: Tensor,
    dense_weight: Tensor,
    shift_weight: Tensor,
    dense_bias: Tensor | None,
    shift_bias: Tensor | None,
    gate: Tensor,
    index: Tensor,
    count: Tensor,
) -> Tensor:
    """Each token through one of two linear experts, times its gate; tokens are read and written where they are.

    Equivalent, with expert e of token t, to ``gate[t] * F.linear(x[t], weight_e, bias_e)``.

    The shift weight is dense here: packed codes would save at most what it takes to lay it out for the product, which at
    3,136 tokens is 1 % of the time on a CPU (:func:`shift_linear` is for the few tokens where the bytes of a weight count).

    Args:
        x: ``[tokens, K]``.
        dense_weight: ``[N, K]`` of expert 0.
        shift_weight: ``[N, K]`` of expert 1, as it is used: already rounded to powers of two.
        dense_bias: ``[N]`` or None.
        shift_bias: ``[N]`` or None.
        gate: ``[tokens]``.
        index: int32 ``[2, tokens]``, as :func:`moe_route` returns it: every token is in one of the two lists.
        count: int32 ``[2]``, how long the lists are; an expert may have no token.

    Returns:
        ``[tokens, N]``.

    Raises:
        TypeError: an argument that is no float, mixed dtypes, lists that are not int32.
        ValueError: shapes that do not fit; on a CPU, lists that do not hold every token exactly once.

    Example:
        >>> gate, index, count, _ = moe_route(torch.tensor([[100.0, 0.0], [0.0, 100.0]]))
        >>> x, weight = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[3.0, 3.0]])
        >>> moe2_linear(x, weight, torch.tensor([[2.0, 4.0]]), None, None, gate, index, count).tolist()
        [[9.0], [10.0]]

    Source: ShiftAddViT (You et al. 2023, section 4.3).
    """
    result: Tensor = _moe2_linear(x, dense_weight, shift_weight, dense_bias, shift_bias, gate, index, count)
    return result


# --------------------------------------------------------------------------------------------------- balance


def balance_loss(load: Tensor, latency: Sequence[float] | Tensor) -> Tensor:
    """How far the experts are from taking equally long: the squared coefficient of variation of their total times.

    Zero where an expert's share of the tokens is inversely proportional to its latency. The unit of the latencies does not
    matter.

    Args:
        load: ``[2]``, how many tokens an expert gets, as a sum of probabilities (``importance`` of :func:`moe_route`),
            or ``[tokens, 2]``, the probabilities themselves.
        latency: two positive numbers, what a token takes in the dense and in the shift expert, as measured.

    Returns:
        A scalar, differentiable with respect to ``load``.

    Raises:
        TypeError: ``load`` is no floating-point tensor.
        ValueError: another shape, or latencies that are not two positive finite numbers (their values are not looked at
            where they are on a GPU).

    Example:
        >>> balance_loss(torch.tensor([40.0, 60.0]), (6, 4)).item()
        0.0
        >>> round(balance_loss(torch.tensor([30.0, 70.0]), (6, 4)).item(), 4)
        0.0945

    Source: ShiftAddViT (You et al. 2023, section 4.3, the latency-aware load-balancing loss), with the unbiased variance
    and the 1e-10 of Shazeer et al. 2017 (appendix A).
    """
    op = "balance_loss"
    if not isinstance(load, Tensor):
        raise TypeError(f"{op}: load must be a tensor, got {type(load).__name__}")
    check_float(op, load=load)
    if load.dim() not in (1, 2) or load.shape[-1] != EXPERTS:
        refuse(op, f"load must have shape [2] or [tokens, 2], got {shape_of(load)}")
    total = (load.sum(0, dtype=_wide(load)) if load.dim() == 2 else load.to(_wide(load))).unbind()
    dense, shift = (time * a for time, a in zip(total, _latencies(op, latency, load), strict=True))
    variance = (dense - shift).square() / 2  # of two numbers, unbiased
    return variance / (((dense + shift) / 2).square() + 1e-10)


def _latencies(op: str, latency: Sequence[float] | Tensor, load: Tensor) -> Sequence[float | Tensor]:
    """Numbers, or numbers on the load's device: what would copy them to a GPU, or look at them there, would synchronise."""
    expected = "latency must be two positive finite numbers"
    if isinstance(latency, Tensor):
        if list(latency.shape) != [EXPERTS]:
            refuse(op, f"{expected}, got shape {shape_of(latency)}")
        if latency.device.type != "cpu":
            return latency.to(load.device, _wide(load)).unbind()
        if torch.compiler.is_compiling():  # a graph is for any values
            return latency.to(_wide(load)).unbind()
        values: Any = latency.tolist()
    else:
        values = list(latency)
    if len(values) != EXPERTS or not all(isinstance(a, Real) and 0 < float(a) < math.inf for a in values):
        refuse(op, f"{expected}, got {latency!r}")
    return [float(a) for a in values]


def load_probability(logits: Tensor, noisy: Tensor, deviation: Tensor) -> Tensor:
    """How likely each expert would be chosen if its noise were drawn again: a smooth count of tokens.

    Args:
        logits: ``[tokens, 2]`` before the noise.
        noisy: ``[tokens, 2]`` with the noise, by which the experts were chosen.
        deviation: the noise's standard deviation, positive, ``[tokens, 2]`` or what broadcasts to it.

    Returns:
        ``[tokens, 2]``, for :func:`balance_loss`; differentiable.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: logits of another shape, or a deviation that does not broadcast to theirs.

    Example:
        >>> clean = torch.tensor([[1.0, 0.0]])
        >>> chance = load_probability(clean, clean, torch.ones(1, 2))
        >>> [round(p, 3) for p in chance[0].tolist()]
        [0.841, 0.159]

    Source: Shazeer et al. 2017 (appendix A, equation 9): of two experts, the threshold of one is the other's logit.
    """
    op = "load_probability"
    _check_logits(op, logits=logits, noisy=noisy)
    check_float(op, deviation=deviation)
    if noisy.shape != logits.shape:
        refuse(op, f"noisy must have shape {shape_of(logits)}, got {shape_of(noisy)}")
    sizes = zip(reversed(deviation.shape), reversed(logits.shape), strict=False)
    if deviation.dim() > 2 or not all(a in (1, b) for a, b in sizes):
        refuse(op, f"deviation must have a shape that broadcasts to {shape_of(logits)}, got {shape_of(deviation)}")
    chance: Tensor = torch.special.ndtr((logits - noisy.flip(1)) / deviation)
    return chance
