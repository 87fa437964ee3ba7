# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weights are powers of two: ``W = s 2^p`` with s in -1, 0, 1 and p in -14 to 0.

Such a weight is an index into a short table, so it is a :class:`~cofire.ops.QTensor` with a ``lut``, and its products are
those of :func:`~cofire.ops.qlinear`. Formats:

* ``S5``: 5 bits, ``sign << 4 | -p``, where 15 is zero; lossless.
* ``S4``: 4 bits, ``sign << 3 | (e - p)``, where 7 is zero and e is the largest exponent of the row. Magnitudes are the
  integers 64 to 1 and a scale per row, so activations of 8 bits can be taken; weights below ``2^(e - 6)`` are clipped.
* ``S8``: 8 bits, ``sign << 7 | -p``, where 15 and above are zero; lossless, for looking at.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cofire.ops.checks import check_choice, check_float, refuse, shape_of
from cofire.ops.lowbit import _check_weight, _qlinear_backward, _seen, compute_dtype, dequantize, qlinear, rows_of
from cofire.ops.qtensor import QTensor

__all__ = ["pack_shift", "shift_from_weight", "shift_linear", "shift_quantize", "shift_statistics", "unpack_shift"]

FORMATS = ("S5", "S4", "S8")
LOWEST = -14  #: the smallest exponent
ZERO = 15  #: the magnitude code of a zero in S5 and S8
OCTAVES = 7  #: magnitudes of a row in S4, and the code of its zero
LN2 = math.log(2.0)


def _check_pair(operator: str, shift: Tensor, sign: Tensor) -> None:
    for name, x in (("shift", shift), ("sign", sign)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(x).__name__}")
    if shift.dim() != 2:
        refuse(operator, f"shift must have shape [N, K], got {shape_of(shift)}")
    if sign.shape != shift.shape or sign.device != shift.device:
        where = f"{shape_of(shift)} on {shift.device}"
        refuse(
            operator, f"sign must have the shape and device of shift ({where}), got {shape_of(sign)} on {sign.device}"
        )


def shift_quantize(shift: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """The exponents and signs that the parameters of a shift layer stand for; halves are rounded to even.

    Args:
        shift: any float ``[N, K]``; clamped to -14 to 0, then rounded.
        sign: any float ``[N, K]``; rounded, then its sign is taken. Within a half of 0 the weight is dead: it is 0.

    Returns:
        exponent, int8 ``[N, K]`` in -14 to 0, and sign, int8 ``[N, K]`` in -1, 0, 1.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: shapes that differ; values that are NaN.

    Example:
        >>> shift_quantize(torch.tensor([[-2.5, -20.0]]), torch.tensor([[0.5, 0.51]]))
        (tensor([[ -2, -14]], dtype=torch.int8), tensor([[0, 1]], dtype=torch.int8))

    Source:
        Elhoushi et al. 2021 (DeepShift, 1905.13298), section 3.2 (DeepShift-PS).
    """
    _check_pair("shift_quantize", shift, sign)
    check_float("shift_quantize", shift=shift, sign=sign)
    for name, x in (("shift", shift), ("sign", sign)):
        if bool(x.isnan().any()):
            refuse("shift_quantize", f"{name} must not be NaN, got {int(x.isnan().sum())} of {x.numel()} that are")
    return shift.detach().clamp(LOWEST, 0).round().to(torch.int8), sign.detach().round().sign().to(torch.int8)


def shift_from_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The parameters of a shift layer that starts from a dense weight: ``log2 |W|`` rounded, and the sign of W.

    Args:
        weight: any float ``[N, K]``, finite.

    Returns:
        shift and sign, both ``[N, K]`` in the dtype of ``weight``: shift in -14 to 0 (0 where the weight is 0), sign in
        -1, 0, 1. Weights outside ``2^-14`` to 1 take the nearest exponent.

    Raises:
        TypeError: ``weight`` is no floating-point tensor.
        ValueError: not a matrix, or values that are not finite.

    Example:
        >>> [x.tolist() for x in shift_from_weight(torch.tensor([[0.3, -1.0, 0.0]]))]
        [[[-2.0, 0.0, 0.0]], [[1.0, -1.0, 0.0]]]

    Source:
        Elhoushi et al. 2021 (DeepShift, 1905.13298), section 3.1.
    """
    check_float("shift_from_weight", weight=weight)
    if weight.dim() != 2:
        refuse("shift_from_weight", f"weight must have shape [N, K], got {shape_of(weight)}")
    if not bool(weight.isfinite().all()):
        wrong = int((~weight.isfinite()).sum())
        refuse("shift_from_weight", f"weight must be finite, got {wrong} values that are not, of {weight.numel()}")
    w = weight.detach().double()
    # The logarithm of 0 must not reach the clamp.
    shift = torch.where(w == 0, 1.0, w.abs()).log2().round().clamp(LOWEST, 0)
    return shift.to(weight.dtype), w.sign().to(weight.dtype)


def _row_exponent(exponent: Tensor, sign: Tensor) -> Tensor:
    """The largest exponent of the weights of a row that are not 0, ``[N, 1]``; 0 where all are."""
    if not exponent.shape[1]:
        return exponent.new_zeros((exponent.shape[0], 1))
    top = torch.where(sign != 0, exponent, -128).amax(1, keepdim=True)
    return torch.where(top == -128, 0, top).to(exponent.dtype)


def _table(magnitudes: list[float], size: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Both signs of the magnitudes, zeros behind each: ``[1, 2 size]``."""
    half = torch.tensor(magnitudes + [0.0] * (size - len(magnitudes)))
    return torch.cat((half, 0 - half))[None].to(like.device, dtype)


def pack_shift(exponent: Tensor, sign: Tensor, *, format: str = "S5", dtype: torch.dtype = torch.float32) -> QTensor:
    """Powers of two as a packed weight.

    Args:
        exponent: integers ``[N, K]`` in -14 to 0, as :func:`shift_quantize` returns them.
        sign: integers ``[N, K]`` in -1, 0, 1.
        format: ``"S5"``, ``"S4"`` or ``"S8"``. S4 keeps seven octaves per row: what is one octave below them takes the
            smallest magnitude (it is as far from that as from 0), what is further below becomes 0.
        dtype: of the weight that it stands for.

    Returns:
        A :class:`~cofire.ops.QTensor` whose ``format`` is ``shift_s5``, ``shift_s4`` or ``shift_s8``.

    Raises:
        TypeError: arguments that are not integers.
        ValueError: exponents or signs out of range, shapes that differ, an unknown format.

    Example:
        >>> exponent, sign = torch.tensor([[0, -1, -14]]), torch.tensor([[1, -1, 0]])
        >>> pack_shift(exponent, sign).dequantize().tolist()
        [[1.0, -0.5, 0.0]]

    Source:
        You et al. 2023 (ShiftAddViT, 2306.06446), section 4.2; Elhoushi et al. 2021 (DeepShift, 1905.13298).
    """
    _check_pair("pack_shift", exponent, sign)
    check_choice("pack_shift", "format", format, FORMATS)
    for name, x, low, high in (("exponent", exponent, LOWEST, 0), ("sign", sign, -1, 1)):
        if x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"pack_shift: {name} must be a tensor of integers, got {x.dtype}")
        wrong = int(((x < low) | (x > high)).sum())
        if wrong:
            refuse("pack_shift", f"{name} must be in {low} to {high}, got {wrong} values outside, of {x.numel()}")
    p, s = exponent.to(torch.int16), sign.to(torch.int16)
    negative = (s < 0).to(torch.int16)
    if format == "S4":
        top = _row_exponent(p, s)
        m = top - p
        m = torch.where((s == 0) | (m > OCTAVES), OCTAVES, m.clamp(max=OCTAVES - 1))
        lut = _table([float(64 >> i) for i in range(OCTAVES)], 8, p, torch.int8)
        codes, bits, scale = torch.where(m == OCTAVES, m, negative << 3 | m), 4, torch.exp2(top.float() - 6)
    else:
        bits = int(format[1])
        m = torch.where(s == 0, ZERO, -p)
        lut = _table([2.0**-i for i in range(ZERO)], 1 << (bits - 1), p, torch.float32)
        codes, scale = negative << (bits - 1) | m, None
    return QTensor.from_codes(
        codes, scale, bits=bits, group_size=p.shape[1] or 1, lut=lut, dtype=dtype, format=f"shift_{format.lower()}"
    )


def _check_packed(operator: str, weight: Any) -> None:
    _check_weight(operator, weight)
    if weight.format not in [f"shift_{f.lower()}" for f in FORMATS]:
        refuse(operator, f"weight must come from pack_shift, got a weight of format {weight.format!r}")


def unpack_shift(weight: QTensor) -> tuple[Tensor, Tensor]:
    """Exponents and signs of a packed weight: the way back from :func:`pack_shift`.

    Args:
        weight: from :func:`pack_shift`.

    Returns:
        exponent and sign, int8 ``[N, K]``; the exponent of a zero is 0.

    Raises:
        TypeError: ``weight`` is no QTensor.
        ValueError: a QTensor of another format.

    Example:
        >>> unpack_shift(pack_shift(torch.tensor([[-3, 0]]), torch.tensor([[-1, 0]])))
        (tensor([[-3,  0]], dtype=torch.int8), tensor([[-1,  0]], dtype=torch.int8))

    Source:
        Elhoushi et al. 2021 (DeepShift, 1905.13298), section 3.
    """
    _check_packed("unpack_shift", weight)
    codes = weight.unpack().to(torch.int16)
    m = codes & ((1 << (weight.bits - 1)) - 1)
    zero = m >= (OCTAVES if weight.bits == 4 else ZERO)
    scale = weight.scales()
    top = 0 if scale is None else scale.log2().round().to(torch.int16) + 6
    exponent = torch.where(zero, 0, top - m)
    sign = torch.where(zero, 0, 1 - 2 * (codes >> (weight.bits - 1)))
    return exponent.to(torch.int8), sign.to(torch.int8)


def shift_statistics(exponent: Tensor, sign: Tensor) -> dict[str, int]:
    """How many weights are dead, and how many S4 would change.

    Args:
        exponent: integers ``[N, K]`` in -14 to 0.
        sign: integers ``[N, K]`` in -1, 0, 1.

    Returns:
        ``weights``; ``dead``: those whose sign is 0, which get no gradient to their shift; ``clipped``: those that are not
        0 and lie more than six octaves below the largest of their row.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: shapes that differ.

    Example:
        >>> shift_statistics(torch.tensor([[0, -7, -14]]), torch.tensor([[1, -1, 0]]))
        {'weights': 3, 'dead': 1, 'clipped': 1}

    Source:
        You et al. 2023 (ShiftAddViT, 2306.06446), section 4.2.
    """
    _check_pair("shift_statistics", exponent, sign)
    p = exponent.to(torch.int16)
    clipped = (sign != 0) & (_row_exponent(p, sign) - p >= OCTAVES)
    return {"weights": sign.numel(), "dead": int((sign == 0).sum()), "clipped": int(clipped.sum())}


class _PowersOfTwo(torch.autograd.Function):
    """The weight that shift and sign stand for, with straight-through gradients.

    With the weight's gradient G they are ``d sign = G`` and ``d shift = ln 2 * G * W``, through rounding, clamping and
    sign alike.
    """

    @staticmethod
    def forward(shift: Tensor, sign: Tensor, narrow: bool) -> Tensor:
        p, s = shift.clamp(LOWEST, 0).round(), sign.round().sign().to(shift.dtype)
        if narrow and p.shape[1]:  # S4 holds seven octaves of a row
            top = torch.where(s != 0, p, LOWEST - 1).amax(1, keepdim=True)
            s = torch.where(top - p > OCTAVES, 0, s)
            p = torch.maximum(p, top - (OCTAVES - 1))
        return s * torch.exp2(p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[1].dtype
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,), (grad,) = ctx.saved_tensors, grads
        return LN2 * grad * weight, grad.to(ctx.dtype), None


def powers_of_two(shift: Tensor, sign: Tensor, narrow: bool) -> Tensor:
    """The weight ``[N, K]`` of the parameters; differentiable, any number of times. ``narrow``: as S4 holds it."""
    w: Tensor = _PowersOfTwo.apply(shift, sign, narrow)  # type: ignore[no-untyped-call]
    return w


class _StraightThrough(torch.autograd.Function):
    """The product, with gradients to the parameters that the packed weight was made from.

    Where the gradients are to be differentiated again they are computed with the weight of the parameters, which passes
    second derivatives on to them; the packed one would drop these.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, shift: Tensor, sign: Tensor, bias: Tensor | None, weight: QTensor, activations: str
    ) -> Tensor:
        ctx.save_for_backward(input, shift, sign)
        ctx.weight, ctx.activations = weight, activations
        ctx.dtypes = shift.dtype, sign.dtype, None if bias is None else bias.dtype
        return qlinear(input, weight, bias, activations=activations)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (input, shift, sign) = grads, ctx.saved_tensors
        w: QTensor = ctx.weight
        to_input, to_shift, to_sign, to_bias, *_ = ctx.needs_input_grad
        d_input = d_shift = d_sign = d_bias = None
        dtype = compute_dtype(grad, input)
        again = powers_of_two(shift, sign, w.bits == 4).to(dtype) if torch.is_grad_enabled() else None
        if to_input and again is not None:
            d_input = (grad.to(dtype) @ again).to(input.dtype)
        elif to_input:
            parts = (w.codes, w.scales(), w.zero, w.offsets(), w.lut, w.bits, w.group_size, w.shape[1])
            d_input = _qlinear_backward.overload(grad, None, *parts, ctx.activations, True)[0]
        if to_shift or to_sign:
            g = rows_of(grad).to(dtype).t() @ rows_of(_seen(input, ctx.activations)).to(dtype)
            dense = dequantize(w).to(dtype) if again is None else again
            d_shift = (LN2 * g * dense).to(ctx.dtypes[0]) if to_shift else None
            d_sign = g.to(ctx.dtypes[1]) if to_sign else None  # not multiplied by 2^p
        if to_bias:
            d_bias = rows_of(grad).sum(0).to(ctx.dtypes[2])
        return d_input, d_shift, d_sign, d_bias, None, None


def shift_linear(
    input: Tensor, weight: QTensor, bias: Tensor | None = None, *, latent: tuple[Tensor, Tensor] | None = None,
    activations: str = "exact",
) -> Tensor:  # fmt: skip
    """``F.linear`` with a packed weight of powers of two.

    Args:
        input: any float ``[..., K]``.
        weight: ``[N, K]`` from :func:`pack_shift`.
        bias: any float ``[N]``.
        latent: shift and sign, both float ``[N, K]``: the parameters that ``weight`` was made from, which then receive
            the straight-through gradients: with ``G = dY^T X``, ``d sign = G`` (not multiplied by ``2^p``) and
            ``d shift = ln 2 * G * W``, which is 0 where the weight is dead.
        activations: ``"exact"``, or ``"int8"``, which rounds each row of the input to 8 bits; S4 alone.

    Returns:
        ``[..., N]`` in the dtype of ``input``. Differentiable with respect to input, bias and latent, also twice: second
        derivatives are those of the straight-through gradients.

    Raises:
        TypeError: a ``weight`` that is no QTensor, arguments that are no floating-point tensors.
        ValueError: shapes that do not fit; a weight that is not from :func:`pack_shift`; int8 activations with S5 or S8.

    Example:
        >>> w = pack_shift(torch.tensor([[-1, -2]]), torch.tensor([[1, -1]]))
        >>> shift_linear(torch.tensor([[4.0, 8.0]]), w).tolist()
        [[0.0]]

    Source:
        Elhoushi et al. 2021 (DeepShift, 1905.13298), section 3.2; You et al. 2023 (ShiftAddViT, 2306.06446), section 4.2.
    """
    _check_packed("shift_linear", weight)
    check_choice("shift_linear", "activations", activations, ("exact", "int8"))
    if activations == "int8" and weight.bits != 4:
        refuse("shift_linear", f"int8 activations need a weight of format S4, got {weight.format!r}")
    if latent is None:
        return qlinear(input, weight, bias, activations=activations)
    shift, sign = latent
    _check_pair("shift_linear", shift, sign)
    check_float("shift_linear", input=input, shift=shift, sign=sign, bias=bias)
    if tuple(shift.shape) != tuple(weight.shape):
        refuse("shift_linear", f"shift must have the shape of the weight, {list(weight.shape)}, got {shape_of(shift)}")
    y: Tensor = _StraightThrough.apply(input, shift, sign, bias, weight, activations)
    return y
