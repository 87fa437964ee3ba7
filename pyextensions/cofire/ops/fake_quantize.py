# SPDX-License-Identifier: Apache-2.0
"""Fake quantisation: rounding to the levels of a quantiser while the tensor stays a float, for training.

Every operator reads its input once and writes the rounded values; its backward reads the input and the gradient once.
Nothing but the input and the parameters is saved. All arithmetic is in fp32 (fp64 where an argument is), one rounding
per operation, rounding to the nearest with ties to even, so every implementation gives the same bits; statistics and
gradients of parameters are sums, taken in fp64 or in pairs.

Gradients are straight-through: rounding to a level has the derivative 1.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from cofire.ops.checks import check_choice, check_device, check_float, check_integer, check_number, refuse, shape_of
from cofire.ops.lowbit import compute_dtype
from cofire.registry import IDENTITY, Backward, Kernel, Operator, register, through_reference

__all__ = [
    "fake_quantize_affine",
    "fake_quantize_group",
    "fake_quantize_lsq",
    "fake_quantize_minmax",
    "fake_quantize_statsq",
]

#: The least scale of LSQ, as in the code of OFQ; smaller ones are read as this one, and their gradient passes.
SCALE_FLOOR = 1e-5
#: The ranges that AdaQuant's code allows.
RANGE_FLOOR, RANGE_CEILING = 1e-6, 1e5
#: The largest StatsQ input, in scales: a step is never rounded up beyond the last level.
STATSQ_CEILING = 1 - 1e-6
#: Levels beyond this are not integers in fp32 after division and rounding.
LARGEST_LEVEL = 1 << 22
MOST_BITS = 16

#: The magnitudes of the symmetric 4-bit formats, by code. Their scale puts the last one at a group's largest magnitude.
LEVELS: dict[str, tuple[float, ...]] = {
    "int4": (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
    "e1m2": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "e3m0": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
}
FORMATS = ("int4", "int4_asymmetric", "e1m2", "e2m1", "e3m0")


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """``value``, with the gradient of ``source``."""
    if not (torch.is_grad_enabled() and source.requires_grad):
        return value
    return value.detach() + (source - source.detach())


def _round(v: Tensor) -> Tensor:
    return straight_through(v.round(), v)


def _per_scale(x: Tensor, scales: int, inner: int, dtype: torch.dtype) -> Tensor:
    """``[outer, S, inner]``: element i of the contiguous tensor belongs to scale ``(i // inner) % S``."""
    size = scales * inner
    return x.to(dtype).reshape(0 if size == 0 else x.numel() // size, scales, inner)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """In the dtype and shape of x, contiguous."""
    return value.to(x.dtype).reshape(x.shape).contiguous()


def _column(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return parameter.to(dtype).reshape(-1, 1)


def _bytes(passes: int, x: Tensor, parameters: int = 0) -> int:
    return passes * x.numel() * x.element_size() + parameters


def _parameter_bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------------------- lsq


def _default_gradient_scale(input: Tensor, scale: Tensor, high: int) -> float:
    """One over the root of ``high`` times the number of elements that share a scale."""
    return 1 / math.sqrt(max(high * (input.numel() // max(scale.numel(), 1)), 1))


def _lsq_reference(
    input: Tensor, scale: Tensor, inner: int, low: int, high: int, gradient_scale: float | None
) -> Tensor:
    dtype = compute_dtype(input, scale)
    x, s = _per_scale(input, scale.numel(), inner, dtype), _column(scale, dtype)
    if torch.is_grad_enabled() and s.requires_grad:
        factor = _default_gradient_scale(input, scale, high) if gradient_scale is None else gradient_scale
        s = straight_through(s.clamp(min=SCALE_FLOOR), s * factor)
    else:
        s = s.clamp(min=SCALE_FLOOR)
    q = _round((x / s).clamp(low, high))
    return _like(q * s, input)


def _lsq_backward_reference(
    grad: Tensor, input: Tensor, scale: Tensor, inner: int, low: int, high: int, gradient_scale: float | None
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(grad, input, scale)
    g, x = (_per_scale(t, scale.numel(), inner, dtype) for t in (grad, input))
    v = x / _column(scale, dtype).clamp(min=SCALE_FLOOR)
    inside = (v >= low) & (v <= high)
    factor = _default_gradient_scale(input, scale, high) if gradient_scale is None else gradient_scale
    to_scale = factor * (g * (v.clamp(low, high).round() - torch.where(inside, v, 0))).sum((0, 2))
    to_input = torch.where(inside, g, 0)
    return _like(to_input, input), _like(to_scale, scale)


def _check_layout(operator: str, input: Tensor, name: str, parameter: Tensor, inner: int) -> None:
    check_float(operator, input=input, **{name: parameter})
    check_device(operator, "input", input, **{name: parameter})
    count = parameter.numel() * inner
    if (count == 0 and input.numel() != 0) or (count != 0 and input.numel() % count):
        refuse(
            operator,
            f"input must be divided evenly by its {parameter.numel()} scales of {inner} neighbouring elements each, "
            f"got shape {shape_of(input)}",
        )


def _check_grad(operator: str, grad: Tensor, input: Tensor) -> None:
    check_float(operator, grad=grad)
    check_device(operator, "input", input, grad=grad)
    if grad.shape != input.shape:
        refuse(operator, f"grad must have shape {shape_of(input)}, got {shape_of(grad)}")


def _check_levels(operator: str, low: int, high: int, gradient_scale: float | None) -> None:
    if not low < high:
        refuse(operator, f"low must be less than high, got {low} and {high}")
    for name, value in (("low", low), ("high", high)):
        if abs(value) > LARGEST_LEVEL:
            refuse(operator, f"{name} must be between {-LARGEST_LEVEL} and {LARGEST_LEVEL}, got {value}")
    if gradient_scale is None and high < 1:
        refuse(operator, f"gradient_scale must be given where high is not positive, got high={high}")


def _validate_lsq(input: Tensor, scale: Tensor, inner: int, low: int, high: int, gradient_scale: float | None) -> None:
    _check_layout("fake_quantize_lsq", input, "scale", scale, inner)
    _check_levels("fake_quantize_lsq", low, high, gradient_scale)


def _validate_lsq_backward(
    grad: Tensor, input: Tensor, scale: Tensor, inner: int, low: int, high: int, gradient_scale: float | None
) -> None:
    _check_grad("fake_quantize_lsq_backward", grad, input)
    _check_layout("fake_quantize_lsq_backward", input, "scale", scale, inner)
    _check_levels("fake_quantize_lsq_backward", low, high, gradient_scale)


_lsq_backward = register(
    Operator(
        "fake_quantize_lsq_backward(Tensor grad, Tensor input, Tensor scale, SymInt inner, int low, int high, "
        "float? gradient_scale) -> (Tensor input_grad, Tensor scale_grad)",
        family="lowbit",
        validate=_validate_lsq_backward,
        reference=_lsq_backward_reference,
        fake=lambda grad, input, scale, *rest: (_empty(input), _empty(scale)),
        backward=through_reference(_lsq_backward_reference),
        triton=Kernel("cofire_kernels.lowbit:fake_quantize_lsq_backward"),
        bytes=lambda grad, input, scale, *rest: _bytes(2, input, 2 * _parameter_bytes(scale)) + _bytes(1, grad),
    )
)


def _save_lsq(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, scale, *ctx.rest = inputs
    ctx.save_for_backward(input, scale)


def _lsq_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, scale = ctx.saved_tensors
    to_input, to_scale = _lsq_backward.overload(grad, input, scale, *ctx.rest)
    wanted = ctx.needs_input_grad
    return to_input if wanted[0] else None, to_scale if wanted[1] else None, None, None, None, None


_lsq = register(
    Operator(
        "fake_quantize_lsq(Tensor input, Tensor scale, SymInt inner, int low, int high, float? gradient_scale) -> Tensor",
        family="lowbit",
        validate=_validate_lsq,
        reference=_lsq_reference,
        fake=lambda input, *rest: _empty(input),
        backward=Backward(_save_lsq, _lsq_grad, "fake_quantize_lsq_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.lowbit:fake_quantize_lsq"),
        bytes=lambda input, scale, *rest: _bytes(2, input, _parameter_bytes(scale)),
    )
)


def _layout_of(
    operator: str, input: Tensor, name: str, parameter: Tensor, axis: int | None, group_size: int | None
) -> int:
    """How many neighbouring elements belong to one parameter; checks the shape of ``parameter``."""
    if axis is not None and group_size is not None:
        refuse(operator, f"axis and group_size exclude each other, got axis={axis} and group_size={group_size}")
    if axis is not None:
        check_integer(operator, axis=axis)
        if not -input.dim() <= axis < input.dim():
            refuse(operator, f"axis must be a dimension of input {shape_of(input)}, got {axis}")
        if list(parameter.shape) != [input.shape[axis]]:
            want = f"[{input.shape[axis]}] (the size of axis {axis} of input)"
            refuse(operator, f"{name} must have shape {want}, got {shape_of(parameter)}")
        return math.prod(input.shape[axis % input.dim() + 1 :])
    if group_size is not None:
        check_groups(operator, input, group_size)
        shape = [*input.shape[:-1], input.shape[-1] // group_size]
        if list(parameter.shape) != shape:
            refuse(
                operator,
                f"{name} must have shape {shape} (a scale per group of {group_size}), got {shape_of(parameter)}",
            )
        return group_size
    if list(parameter.shape) not in ([], [1]):
        refuse(operator, f"{name} must have shape [] or [1] where axis is not given, got {shape_of(parameter)}")
    return 1


def check_groups(operator: str, input: Tensor, group_size: Any) -> None:
    if input.dim() == 0:
        refuse(operator, "input must have shape [..., K], got []")
    check_integer(operator, group_size=group_size)
    if group_size < 1 or input.shape[-1] % group_size:
        columns = input.shape[-1]
        refuse(operator, f"group_size must be positive and divide the {columns} columns of input, got {group_size}")


def _check_tensors(operator: str, **tensors: Any) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(x).__name__}")


def fake_quantize_lsq(
    input: Tensor,
    scale: Tensor,
    low: int,
    high: int,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    gradient_scale: float | None = None,
) -> Tensor:
    """Learned step size quantisation: ``s * round(clamp(x / s, low, high))`` with a gradient to x and to s.

    The gradient g passes to x where ``low <= x / s <= high``; the scale gets ``gradient_scale`` times the sum of
    ``g * (round(clamp(x / s)) - [inside] x / s)`` over its elements.

    Args:
        input: any float tensor.
        scale: any float: ``[]`` or ``[1]`` for the whole tensor, ``[D]`` with ``axis``, or ``[..., K / group_size]``. It
            may be wider than the input (fp32 beside bf16). A scale below 1e-5, negative ones included, is read as 1e-5
            on every device, and its gradient passes, so that training can bring it back; no value is looked at on the host.
        low, high: the first and the last level, integers: -8 and 7 for four signed bits, 0 and 15 for unsigned ones.
        axis: the dimension, of size D, along which each slice has its scale; -2 of ``[B, N, C]`` is one per token.
        group_size: columns of the last dimension, of size K, that share a scale; divides K.
        gradient_scale: the factor of the scale's gradient; default ``1 / sqrt(high * n)`` with n elements to a scale.

    Returns:
        The shape and dtype of ``input``, contiguous; computed in fp32 (fp64 where an argument is), ties to even. NaN gives
        NaN, gets no gradient and makes the gradient of its scale NaN; infinities are clamped.

    Raises:
        TypeError: a tensor that is no float tensor, or another argument that is no number.
        ValueError: shapes that do not fit, an empty range of levels, or ``high < 1`` without a gradient_scale.

    Example:
        >>> fake_quantize_lsq(torch.tensor([-3.0, 0.2, 0.75, 1.25]), torch.tensor(0.5), -2, 1).tolist()
        [-1.0, 0.0, 0.5, 0.5]

    Source:
        Esser et al. 2020 (LSQ, 1902.08153), equations 1 to 5, section 2.2 for the factor; the floor: the code of Liu et
        al. 2023 (OFQ, 2302.02210).
    """
    name = "fake_quantize_lsq"
    _check_tensors(name, input=input, scale=scale)
    check_integer(name, low=low, high=high)
    if gradient_scale is not None:
        check_number(name, gradient_scale=gradient_scale)
    inner = _layout_of(name, input, "scale", scale, axis, group_size)
    output: Tensor = _lsq(input, scale, inner, low, high, gradient_scale)
    return output


# ---------------------------------------------------------------------------------------------------- affine


def _affine_reference(input: Tensor, range: Tensor, minimum: Tensor, inner: int, bits: int) -> Tensor:
    dtype = compute_dtype(input, range, minimum)
    top = (1 << bits) - 1
    x, r, m = _per_scale(input, range.numel(), inner, dtype), _column(range, dtype), _column(minimum, dtype)
    delta = straight_through(r.clamp(RANGE_FLOOR, RANGE_CEILING), r) / top
    zero = _round(-m / delta).clamp(0, top)
    q = _round((x / delta + zero).clamp(0, top))
    return _like((q - zero) * delta, input)


def _affine_backward_reference(
    grad: Tensor, input: Tensor, range: Tensor, minimum: Tensor, inner: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(grad, input, range, minimum)
    top = (1 << bits) - 1
    g, x = (_per_scale(t, range.numel(), inner, dtype) for t in (grad, input))
    delta = _column(range, dtype).clamp(RANGE_FLOOR, RANGE_CEILING) / top
    exact = -_column(minimum, dtype) / delta
    zero = exact.round()
    movable = (zero >= 0) & (zero <= top)
    zero = zero.clamp(0, top)
    v = x / delta + zero
    inside = (v >= 0) & (v <= top)
    outside = ~inside
    shift = torch.where(movable, exact - zero, -zero)  # how the zero point follows the step
    to_range = (g * torch.where(inside, v.round() - v, v.clamp(0, top) + shift)).sum((0, 2)) / top
    to_minimum = torch.where(movable[:, 0], torch.where(outside, g, 0).sum((0, 2)), 0)
    return (
        _like(torch.where(inside, g, 0), input),
        _like(to_range, range),
        _like(to_minimum, minimum),
    )


def check_bits(operator: str, bits: Any, most: int) -> None:
    check_integer(operator, bits=bits)
    if not 1 <= bits <= most:
        refuse(operator, f"bits must be between 1 and {most}, got {bits}")


def _check_affine(operator: str, input: Tensor, range: Tensor, minimum: Tensor, inner: int, bits: int) -> None:
    _check_layout(operator, input, "range", range, inner)
    check_float(operator, minimum=minimum)
    check_device(operator, "input", input, minimum=minimum)
    if minimum.shape != range.shape:
        refuse(operator, f"minimum must have the shape of range, {shape_of(range)}, got {shape_of(minimum)}")
    check_bits(operator, bits, MOST_BITS)


def _validate_affine(input: Tensor, range: Tensor, minimum: Tensor, inner: int, bits: int) -> None:
    _check_affine("fake_quantize_affine", input, range, minimum, inner, bits)


def _validate_affine_backward(
    grad: Tensor, input: Tensor, range: Tensor, minimum: Tensor, inner: int, bits: int
) -> None:
    _check_grad("fake_quantize_affine_backward", grad, input)
    _check_affine("fake_quantize_affine_backward", input, range, minimum, inner, bits)


_affine_backward = register(
    Operator(
        "fake_quantize_affine_backward(Tensor grad, Tensor input, Tensor range, Tensor minimum, SymInt inner, int bits) "
        "-> (Tensor input_grad, Tensor range_grad, Tensor minimum_grad)",
        family="lowbit",
        validate=_validate_affine_backward,
        reference=_affine_backward_reference,
        fake=lambda grad, input, range, minimum, *rest: (_empty(input), _empty(range), _empty(minimum)),
        backward=through_reference(_affine_backward_reference),
        triton=Kernel("cofire_kernels.lowbit:fake_quantize_affine_backward"),
        bytes=lambda grad, input, range, minimum, *rest: (
            _bytes(2, input, 2 * (_parameter_bytes(range) + _parameter_bytes(minimum))) + _bytes(1, grad)
        ),
    )
)


def _save_affine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.inner, ctx.bits = inputs
    ctx.save_for_backward(*tensors)


def _affine_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = _affine_backward.overload(grad, *ctx.saved_tensors, ctx.inner, ctx.bits)
    return *(g if wanted else None for g, wanted in zip(found, ctx.needs_input_grad)), None, None


_affine = register(
    Operator(
        "fake_quantize_affine(Tensor input, Tensor range, Tensor minimum, SymInt inner, int bits) -> Tensor",
        family="lowbit",
        validate=_validate_affine,
        reference=_affine_reference,
        fake=lambda input, *rest: _empty(input),
        backward=Backward(_save_affine, _affine_grad, "fake_quantize_affine_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.lowbit:fake_quantize_affine"),
        bytes=lambda input, range, minimum, *rest: _bytes(
            2, input, _parameter_bytes(range) + _parameter_bytes(minimum)
        ),
    )
)


def fake_quantize_affine(
    input: Tensor, range: Tensor, minimum: Tensor, bits: int, *, axis: int | None = None
) -> Tensor:
    """Asymmetric quantisation with a learned range R and minimum m, as AdaQuant trains it.

    The step is ``d = R / (2^bits - 1)``, the zero point the integer ``z = clamp(round(-m / d), 0, 2^bits - 1)``, and the
    result ``d * (round(clamp(x / d + z, 0, 2^bits - 1)) - z)``. The gradient g passes to x where nothing is clamped. R gets
    the sum of ``g / (2^bits - 1)`` times ``q - (x / d + z)`` inside, ``q - m / d - z`` outside; m gets the sum of g
    outside. Where z itself is clamped, nothing flows through it.

    Args:
        input: any float tensor.
        range: any float, ``[]`` or ``[1]``, or ``[D]`` with ``axis``; may be wider than the input. It is clamped to 1e-6
            and 1e5, on every device, and its gradient passes, so that training can bring it back.
        minimum: any float, the shape of ``range``: the smallest value that is not clamped.
        bits: 1 to 16.
        axis: the dimension, of size D, along which each slice has its range.

    Returns:
        The shape and dtype of ``input``, contiguous; computed in fp32 (fp64 where an argument is), ties to even. NaN gives
        NaN, gets no gradient and makes the gradient of its range NaN; infinities are clamped.

    Raises:
        TypeError: a tensor that is no float tensor, or another argument that is no integer.
        ValueError: shapes that do not fit, bits out of range.

    Example:
        >>> x = torch.tensor([-0.5, 0.3, 1.0, 4.0])
        >>> fake_quantize_affine(x, torch.tensor(3.0), torch.tensor(-1.0), 2).tolist()
        [-1.0, 0.0, 1.0, 2.0]

    Source: Hubara et al. 2020 (AdaQuant, 2006.10518), section 3.1, and its code for the clamps.
    """
    name = "fake_quantize_affine"
    _check_tensors(name, input=input, range=range, minimum=minimum)
    inner = _layout_of(name, input, "range", range, axis, None)
    check_bits(name, bits, MOST_BITS)
    output: Tensor = _affine(input, range, minimum, inner, bits)
    return output


# ---------------------------------------------------------------------------------------------------- minmax


def _groups(x: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """``[G, g]``: groups of neighbouring columns."""
    return x.to(dtype).reshape(0 if group_size == 0 else x.numel() // group_size, group_size)


def _step(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step, zero point (an integer anywhere, without gradient), and where there is no step: a group of equal values."""
    step = (high - low) / top
    constant = step == 0
    step = torch.where(constant, 1.0, step)
    return step, (-low / step).round().detach(), constant


def _minmax_reference(input: Tensor, bits: int, group_size: int) -> Tensor:
    if input.numel() == 0:
        return input.clone(memory_format=torch.contiguous_format)
    top = (1 << bits) - 1
    x = _groups(input, group_size, compute_dtype(input))
    step, zero, constant = _step(x.amin(1, keepdim=True), x.amax(1, keepdim=True), top)
    q = (_round(x / step) + zero).clamp(0, top)
    return _like(torch.where(constant, x, (q - zero) * step), input)


def _minmax_backward_reference(grad: Tensor, input: Tensor, bits: int, group_size: int) -> Tensor:
    if input.numel() == 0:
        return input.clone(memory_format=torch.contiguous_format)
    top = (1 << bits) - 1
    dtype = compute_dtype(grad, input)
    g, x = _groups(grad, group_size, dtype), _groups(input, group_size, dtype)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step, zero, constant = _step(low, high, top)
    v = x / step
    level = v.round() + zero
    inside = (level >= 0) & (level <= top)
    to_step = (g * (level.clamp(0, top) - zero - torch.where(inside, v, 0))).sum(1, keepdim=True) / top
    at_low, at_high = (x == low).to(dtype), (x == high).to(dtype)
    share = at_high / at_high.sum(1, keepdim=True) - at_low / at_low.sum(1, keepdim=True)
    to_input = torch.where(constant, g, torch.where(inside, g, 0) + to_step * share)
    return _like(to_input, input)


def _check_minmax(operator: str, input: Tensor, bits: int, group_size: int) -> None:
    check_float(operator, input=input)
    if input.numel():
        check_groups(operator, input, group_size)
    check_bits(operator, bits, MOST_BITS)


def _validate_minmax(input: Tensor, bits: int, group_size: int) -> None:
    _check_minmax("fake_quantize_minmax", input, bits, group_size)


def _validate_minmax_backward(grad: Tensor, input: Tensor, bits: int, group_size: int) -> None:
    _check_grad("fake_quantize_minmax_backward", grad, input)
    _check_minmax("fake_quantize_minmax_backward", input, bits, group_size)


_minmax_backward = register(
    Operator(
        "fake_quantize_minmax_backward(Tensor grad, Tensor input, int bits, SymInt group_size) -> Tensor",
        family="lowbit",
        validate=_validate_minmax_backward,
        reference=_minmax_backward_reference,
        fake=lambda grad, input, *rest: _empty(input),
        backward=through_reference(_minmax_backward_reference),
        triton=Kernel("cofire_kernels.lowbit:fake_quantize_minmax_backward"),
        bytes=lambda grad, input, *rest: _bytes(2, input) + _bytes(1, grad),
    )
)


def _save_minmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, ctx.bits, ctx.group_size = inputs
    ctx.save_for_backward(input)


def _minmax_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _minmax_backward.overload(grad, *ctx.saved_tensors, ctx.bits, ctx.group_size), None, None


_minmax = register(
    Operator(
        "fake_quantize_minmax(Tensor input, int bits, SymInt group_size) -> Tensor",
        family="lowbit",
        validate=_validate_minmax,
        reference=_minmax_reference,
        fake=lambda input, *rest: _empty(input),
        backward=Backward(_save_minmax, _minmax_grad, "fake_quantize_minmax_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.lowbit:fake_quantize_minmax"),
        bytes=lambda input, *rest: _bytes(2, input),
    )
)


def fake_quantize_minmax(input: Tensor, bits: int, *, group_size: int | None = None) -> Tensor:
    """Dynamic asymmetric quantisation between the minimum and the maximum of each row, with a gradient through both.

    The step is ``s = (max - min) / (2^bits - 1)`` and the zero point the integer ``z = round(-min / s)``, which takes no
    gradient; the result is ``s * (clamp(round(x / s) + z, 0, 2^bits - 1) - z)``. The gradient g passes where nothing is
    clamped, and the step's gradient goes to the largest elements and, with the opposite sign, to the smallest; equal ones
    share it evenly.

    Args:
        input: any float ``[..., K]``.
        bits: 1 to 16.
        group_size: columns that share a range; divides K. None, or -1: whole rows.

    Returns:
        The shape and dtype of ``input``, contiguous; computed in fp32 (fp64 for fp64), ties to even. A group of equal
        values is returned as it is. A group with a NaN or an infinity becomes NaN.

    Raises:
        TypeError: ``input`` is no float tensor, ``bits`` or ``group_size`` no integer.
        ValueError: bits out of range, or a group size that does not divide the columns.

    Example:
        >>> fake_quantize_minmax(torch.tensor([[-1.0, 0.1, 0.4, 0.6, 2.0]]), 2).tolist()
        [[-1.0, 0.0, 0.0, 1.0, 2.0]]

    Source: Hu et al. 2025 (OSTQuant, 2501.13987), section 3; Jacob et al. 2018 (1712.05877), equation 1.
    """
    name = "fake_quantize_minmax"
    _check_tensors(name, input=input)
    if group_size in (None, -1):
        if input.dim() == 0:
            refuse(name, "input must have shape [..., K], got []")
        group_size = input.shape[-1]
    elif input.numel() == 0:
        check_groups(name, input, group_size)
    output: Tensor = _minmax(input, bits, group_size)
    return output


# ---------------------------------------------------------------------------------------------------- statsq


def statsq_levels(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """StatsQ of rows in the last dimension: levels, integers from ``-2^(bits - 1)`` on, and their scale, twice the mean.

    The mean is taken in fp64: it does not depend on the order of the sum.
    """
    half = 1 << (bits - 1)
    scale = (2 * x.abs().sum(-1, keepdim=True, dtype=torch.float64) / x.shape[-1]).to(x.dtype)
    u = (x / torch.where(scale == 0, 1.0, scale)).clamp(-1, STATSQ_CEILING)
    return (u * half - 0.5).round().clamp(-half, half - 1), scale


def _statsq_reference(input: Tensor, bits: int) -> Tensor:
    if input.numel() == 0:
        return input.clone(memory_format=torch.contiguous_format)
    levels, scale = statsq_levels(input.detach().to(compute_dtype(input)), bits)
    value = (levels + 0.5) * (scale / (1 << (bits - 1)))
    return straight_through(_like(value, input), input)


def _validate_statsq(input: Tensor, bits: int) -> None:
    check_float("fake_quantize_statsq", input=input)
    if input.dim() == 0:
        refuse("fake_quantize_statsq", "input must have shape [..., K], got []")
    check_bits("fake_quantize_statsq", bits, 8)


def _identity(count: int) -> Backward:
    return Backward(lambda ctx, inputs, output: None, lambda ctx, grad: (grad, *[None] * (count - 1)), IDENTITY)


_statsq = register(
    Operator(
        "fake_quantize_statsq(Tensor input, int bits) -> Tensor",
        family="lowbit",
        validate=_validate_statsq,
        reference=_statsq_reference,
        fake=lambda input, bits: _empty(input),
        backward=_identity(2),
        double_backward=True,
        triton=Kernel("cofire_kernels.lowbit:fake_quantize_statsq"),
        bytes=lambda input, bits: _bytes(2, input),
    )
)


def fake_quantize_statsq(input: Tensor, bits: int) -> Tensor:
    """StatsQ: mid-rise levels on twice the mean magnitude of each row; the gradient passes everywhere as it is.

    With ``s = 2 mean|w|`` and ``n = 2^(bits - 1)`` the result is ``s (q + 1/2) / n``, where q is
    ``round(n clamp(w / s, -1, 1 - 1e-6) - 1/2)``. Zero is no level; nothing is clamped in the gradient, and none flows to s.

    Args:
        input: any float ``[..., K]``; each row of K has its own scale. A convolution's weight: flatten all but its outputs.
        bits: 1 to 8.

    Returns:
        The shape and dtype of ``input``, contiguous; computed in fp32 (fp64 for fp64), ties to even. A row of zeros gives
        zeros. A row with a NaN becomes NaN, and of one with an infinity nothing stays finite. Equal to
        ``quantize_weight(w, "statsq", ...)`` decoded.

    Raises:
        TypeError: ``input`` is no float tensor, or ``bits`` no integer.
        ValueError: bits out of range, or no dimension.

    Example:
        >>> fake_quantize_statsq(torch.tensor([[-4.0, -1.0, 0.5, 2.5]]), 2).tolist()
        [[-3.0, -1.0, 1.0, 3.0]]

    Source: Liu et al. 2023 (OFQ, 2302.02210), section 4.1.
    """
    _check_tensors("fake_quantize_statsq", input=input)
    output: Tensor = _statsq(input, bits)
    return output


# ----------------------------------------------------------------------------------------------------- group

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al. 2011): four words of 32 bits, in int64, for each counter of four words."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        # a product of two words wraps in int64, and its two halves are right all the same
        p, q = a * PHILOX_MULTIPLIERS[0], c * PHILOX_MULTIPLIERS[1]
        a, b, c, d = ((q >> 32) & WORD) ^ b ^ k0, q & WORD, ((p >> 32) & WORD) ^ d ^ k1, p & WORD
        k0, k1 = (k0 + PHILOX_WEYL[0]) & WORD, (k1 + PHILOX_WEYL[1]) & WORD
    return a, b, c, d


def philox_uniform(seed: int, count: int, device: torch.device | None = None) -> Tensor:
    """``count`` numbers in [0, 1), multiples of 2^-24 in fp32: number i is the upper part of word ``i % 4`` of block
    ``i // 4``, a counter of 64 bits, under the key ``seed``."""
    block = torch.arange((count + 3) // 4, device=device)
    zero = torch.zeros_like(block)
    words = philox((block & WORD, block >> 32, zero, zero), (seed & WORD, (seed >> 32) & WORD))
    return (torch.stack(words, 1).flatten()[:count] >> 8).float() * 2.0**-24


def largest_of(x: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest magnitudes of each row are; of equal ones those of lower index, NaN above all."""
    place = x.abs().sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(x, dtype=torch.bool).scatter(1, place, True)


def _to_grid(a: Tensor, levels: tuple[float, ...], chance: Tensor | None) -> Tensor:
    """Magnitudes to the nearest level, ties to the even code; or up with the chance of the distance from the one below."""
    table = torch.tensor(levels, dtype=a.dtype, device=a.device)
    code = torch.zeros_like(a, dtype=torch.long)
    if chance is None:
        for i, (below, above) in enumerate(itertools.pairwise(levels)):
            middle = (below + above) / 2
            code += (a >= middle) if i % 2 else (a > middle)
        return table[code]
    for level in levels[1:]:
        code += a >= level
    lower, upper = table[code], table[(code + 1).clamp(max=len(levels) - 1)]
    return torch.where(a - lower > chance * (upper - lower), upper, lower)


def _group_reference(input: Tensor, format: str, group_size: int, outliers: int, stochastic: bool, seed: int) -> Tensor:
    if input.numel() == 0:
        return input.clone(memory_format=torch.contiguous_format)
    x = _groups(input.detach(), group_size, compute_dtype(input))
    kept = largest_of(x, outliers)
    chance = philox_uniform(seed, x.numel(), x.device).to(x.dtype).view(x.shape) if stochastic else None
    if format == "int4_asymmetric":
        low = torch.where(kept, torch.inf, x).amin(1, keepdim=True)
        high = torch.where(kept, -torch.inf, x).amax(1, keepdim=True)
        step, zero, constant = _step(low, high, 15)
        v = x / step
        rounded = v.round() if chance is None else v.floor() + (v - v.floor() > chance)
        value = ((rounded + zero).clamp(0, 15) - zero) * step
    else:
        levels = LEVELS[format]
        step = torch.where(kept, 0, x.abs()).amax(1, keepdim=True) / levels[-1]
        constant = step == 0
        magnitude = _to_grid(x.abs() / torch.where(constant, 1.0, step), levels, chance)
        value = torch.copysign(magnitude, x) * step
    value = torch.where(kept | constant, x, value)
    return straight_through(_like(value, input), input)


def _validate_group(input: Tensor, format: str, group_size: int, outliers: int, stochastic: bool, seed: int) -> None:
    name = "fake_quantize_group"
    check_float(name, input=input)
    check_choice(name, "format", format, FORMATS)
    check_groups(name, input, group_size)
    check_integer(name, outliers=outliers, seed=seed)
    if not 0 <= outliers < group_size:
        refuse(name, f"outliers must be between 0 and {group_size - 1}, got {outliers}")
    if not 0 <= seed < 1 << 63:
        refuse(name, f"seed must be between 0 and 2^63 - 1, got {seed}")


_group = register(
    Operator(
        "fake_quantize_group(Tensor input, str format, SymInt group_size, int outliers, bool stochastic, SymInt seed) "
        "-> Tensor",
        family="lowbit",
        validate=_validate_group,
        reference=_group_reference,
        fake=lambda input, *rest: _empty(input),
        backward=_identity(6),
        double_backward=True,
        triton=Kernel("cofire_kernels.lowbit:fake_quantize_group"),
        bytes=lambda input, *rest: _bytes(2, input),
    )
)


def fake_quantize_group(
    input: Tensor,
    format: str = "int4",
    *,
    group_size: int = 256,
    outliers: int = 2,
    stochastic: bool = False,
    seed: int = 0,
) -> Tensor:
    """Four bits per group, with the largest magnitudes of each group kept as they are; the gradient passes everywhere.

    Args:
        input: any float ``[..., K]``.
        format: "int4" (levels -7 to 7, the largest magnitude at 7), "int4_asymmetric" (16 levels from the minimum to the
            maximum, an integer zero point), or the floats "e1m2", "e2m1" and "e3m0", the largest magnitude at their last
            value: 1.75, 6 and 16. The values of e1m2 are evenly spaced: it is int4, with the scale times four.
        group_size: neighbouring columns that share a scale; divides K.
        outliers: how many of a group's largest magnitudes stay exact and out of the scale; of equal ones those of lower
            index; 0 to ``group_size - 1``.
        stochastic: round up with the probability of the distance from the level below, so that the mean is right, instead
            of to the nearest level (ties to the even code). What "int4_asymmetric" clamps, because its zero point is an
            integer, stays clamped.
        seed: of the stochastic rounding, 0 to 2^63 - 1. The random number of an element depends on the seed and on its
            index alone: Philox-4x32-10 with the seed as key, counter ``index // 4``, word ``index % 4``, of which the upper
            24 bits. The same on every device. Take another seed at each step.

    Returns:
        The shape and dtype of ``input``, contiguous; computed in fp32 (fp64 for fp64). A group without a scale, zeros or,
        asymmetric, equal values, is returned as it is. NaN counts as the largest magnitude; a NaN or an infinity that is no
        outlier turns its group, but for the outliers, to NaN.

    Raises:
        TypeError: ``input`` is no float tensor, or an argument that is no integer.
        ValueError: an unknown format, a group size that does not divide the columns, outliers or seed out of range.

    Example:
        >>> x = torch.tensor([[0.1, -3.0, 1.3, 100.0]])
        >>> fake_quantize_group(x, "e2m1", group_size=4, outliers=1).tolist()
        [[0.0, -3.0, 1.5, 100.0]]

    Source:
        Huang et al. 2025 (Stable-SPAM, 2502.17055), the 4-bit simulation of its experiments; Salmon et al. 2011 (Parallel
        random numbers: as easy as 1, 2, 3) for Philox.
    """
    _check_tensors("fake_quantize_group", input=input)
    output: Tensor = _group(input, format, group_size, outliers, bool(stochastic), seed)
    return output
