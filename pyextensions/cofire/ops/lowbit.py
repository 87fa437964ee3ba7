# SPDX-License-Identifier: Apache-2.0
"""Products with weights of 1 to 8 bits.

A weight is a :class:`~cofire.ops.QTensor`; the operators take its tensors one by one. It stands for
``W = (V(q) - zero) * scale + offset`` in fp32 (fp64 where an argument is), each operation rounded by itself: so
``dequantize`` decodes it everywhere, and so the references read it.

Kernels sum in fp32, and multiply with the same W but for its last bits. Most apply scale, zero and offset to the sum of a
group, not to each weight. Where matrix units multiply 16-bit numbers alone, W is rounded once to 16 bits, as a dense weight
of that type is: with bf16 inputs on CPUs with AMX from 64 rows on, in the forward and in the gradient of the input, and with
fp16 and bf16 inputs on GPUs, but for forward products of up to 4 rows. ``cofire.explain`` says which kernel a call takes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cofire import native
from cofire.ops.checks import check_choice, check_device, check_float, check_integer, check_number, refuse, shape_of
from cofire.ops.packing import unpack_bits
from cofire.ops.qtensor import NestedScale, QTensor, check_parts
from cofire.registry import Backward, Kernel, Operator, register, through_reference

__all__ = ["NestedScale", "QTensor", "dequantize", "qlinear", "qlora_linear"]

ACTIVATIONS = ("exact", "int8")
PARTS = "Tensor codes, Tensor? scale, Tensor? zero, Tensor? offset, Tensor? lut"


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty((0,))


def stored_bytes(*parts: Tensor | None) -> int:
    """What a product reads besides its input."""
    return sum(t.numel() * t.element_size() for t in parts if t is not None)


def rows_of(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``, also where K is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# ------------------------------------------------------------------------------------------------ dequantize


def partition_of_rows(rows: int, lut: Tensor) -> Tensor:
    """Which row of the table each row of the weight reads."""
    size = -(-rows // lut.shape[0])
    return torch.arange(rows, device=lut.device) // max(size, 1)


def _values(codes: Tensor, lut: Tensor | None, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    """V(q), ``[N, K]``."""
    q = unpack_bits(codes, bits, columns)
    if lut is None:
        return q.to(dtype)
    return lut.to(dtype)[partition_of_rows(q.shape[0], lut)[:, None], q.int()]


def _dequantize_reference(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bits: int, group_size: int, columns: int,
) -> Tensor:  # fmt: skip
    dtype = compute_dtype(scale, zero, offset, lut)
    rows = codes.shape[0]
    w = _values(codes, lut, bits, columns, dtype).view(rows, columns // group_size, group_size)
    if zero is not None:
        w = w - zero.to(dtype)[:, :, None]
    if scale is not None:
        w = w * scale.to(dtype)[:, :, None]
    if offset is not None:
        w = w + offset.to(dtype)[:, :, None]
    return w.reshape(rows, columns).contiguous()


def _dequantize_backward_reference(
    grad: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bits: int, group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, columns = grad.shape
    dtype = compute_dtype(grad, scale, zero, offset, lut)
    groups = columns // group_size
    d = grad.to(dtype).view(rows, groups, group_size)
    values = _values(codes, lut, bits, columns, dtype).view(rows, groups, group_size)
    centred = values if zero is None else values - zero.to(dtype)[:, :, None]
    scaled = d if scale is None else d * scale.to(dtype)[:, :, None]
    total = d.sum(2)
    nothing = _nothing(grad)
    to_scale = nothing if scale is None else (d * centred).sum(2).to(scale.dtype)
    to_zero = nothing
    if zero is not None and zero.is_floating_point():
        to_zero = (-scaled.sum(2)).sum_to_size(zero.shape).to(zero.dtype)
    to_offset = nothing if offset is None else total.to(offset.dtype)
    to_lut = nothing
    if lut is not None and lut.is_floating_point():
        q = unpack_bits(codes, bits, columns).long()
        cell = partition_of_rows(rows, lut)[:, None] * lut.shape[1] + q
        sums = scaled.new_zeros(lut.numel()).index_add(0, cell.flatten(), scaled.flatten())
        to_lut = sums.view(lut.shape).to(lut.dtype)
    return to_scale, to_zero, to_offset, to_lut


def _trainable(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def _parts_like(x: Tensor, *parts: Tensor | None) -> tuple[Tensor, ...]:
    def like(p: Tensor | None) -> Tensor:
        if p is None or not p.is_floating_point():
            return _nothing(x)
        return torch.empty_like(p, memory_format=torch.contiguous_format)

    return tuple(map(like, parts))


_dequantize_backward = register(
    Operator(
        f"dequantize_backward(Tensor grad, {PARTS}, int bits, int group_size) "
        "-> (Tensor scale_grad, Tensor zero_grad, Tensor offset_grad, Tensor lut_grad)",
        family="lowbit",
        reference=_dequantize_backward_reference,
        fake=lambda grad, codes, scale, zero, offset, lut, *rest: _parts_like(grad, scale, zero, offset, lut),
        backward=through_reference(_dequantize_backward_reference),
        triton="sums of a dense gradient: plain torch",
    )
)


def _needs(ctx: Any, first: int, *parts: Tensor | None) -> bool:
    return any(_trainable(p) and ctx.needs_input_grad[first + i] for i, p in enumerate(parts))


def _only(parts: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [g if _trainable(p) else None for p, g in zip(parts, grads, strict=True)]


def _save_dequantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *parts, ctx.bits, ctx.group_size, _ = inputs
    ctx.save_for_backward(*parts)


def _dequantize_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, *parts = ctx.saved_tensors
    grads = _dequantize_backward.overload(grad, codes, *parts, ctx.bits, ctx.group_size)
    return None, *_only(tuple(parts), grads), None, None, None


def _validate_dequantize(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bits: int, group_size: int, columns: int,
) -> None:  # fmt: skip
    check_parts("dequantize", codes, scale, zero, offset, lut, bits, group_size, columns)


_dequantize = register(
    Operator(
        f"dequantize({PARTS}, int bits, int group_size, SymInt columns) -> Tensor",
        family="lowbit",
        validate=_validate_dequantize,
        reference=_dequantize_reference,
        fake=lambda codes, scale, zero, offset, lut, bits, group_size, columns: codes.new_empty(
            (codes.shape[0], columns), dtype=compute_dtype(scale, zero, offset, lut)
        ),
        backward=Backward(_save_dequantize, _dequantize_grad, "dequantize_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.lowbit:dequantize"),
        bytes=lambda codes, scale, zero, offset, lut, bits, group_size, columns: (
            codes.numel() + 4 * codes.shape[0] * columns
        ),
    )
)


def dequantize(weight: QTensor) -> Tensor:
    """The matrix that a quantised weight stands for.

    Args:
        weight: a :class:`~cofire.ops.QTensor` ``[N, K]``.

    Returns:
        ``[N, K]`` in ``weight.dtype``, contiguous, in the original order of columns. Computed in fp32 (fp64 where a part
        is fp64) with one rounding per operation, so every implementation gives the same bits. Differentiable with
        respect to scale, zero, offset and lut, where they are floats.

    Raises:
        TypeError: ``weight`` is no QTensor.

    Example:
        >>> q = QTensor.from_codes(torch.tensor([[0, 15]]), torch.tensor([[0.25]]), bits=4, zero=torch.tensor([[8.0]]))
        >>> dequantize(q).tolist()
        [[-2.0, 1.75]]

    Source:
        Jacob et al. 2018 (1712.05877), equation 1; tables as in Dettmers et al. 2023 (QLoRA, 2305.14314).
    """
    _check_weight("dequantize", weight)
    w: Tensor = _dequantize(
        weight.codes, weight.scales(), weight.zero, weight.offsets(), weight.lut,
        weight.bits, weight.group_size, weight.shape[1],
    )  # fmt: skip
    if weight.perm is not None:  # by the inverse, so that every column is written whatever perm holds
        w = w.index_select(1, weight.perm.argsort())
    return w.to(weight.dtype)


def _check_weight(operator: str, weight: Any) -> None:
    if not isinstance(weight, QTensor):
        raise TypeError(f"{operator}: weight must be a QTensor, got {type(weight).__name__}")


# --------------------------------------------------------------------------------------------------- qlinear


def int8_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit codes per row, and their scales: ``x ~ codes * scale``; in fp32 whatever the dtype of x is.

    A row with an infinity or a NaN has that scale and codes 0, so what is computed from it is NaN.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127 if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    usable = scale.isfinite() & (scale > 0)
    codes = torch.where(usable, x / torch.where(usable, scale, 1.0), 0.0).round()
    return codes, scale


def _seen(input: Tensor, activations: str) -> Tensor:
    """The activations that enter the product; the gradient passes through the rounding."""
    if activations == "exact":
        return input
    codes, scale = int8_activations(input.detach())
    return input + ((codes.to(input.dtype) if input.dtype == torch.float64 else codes) * scale - input).detach()


def _qlinear_reference(
    input: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bias: Tensor | None, bits: int, group_size: int, activations: str,
) -> Tensor:  # fmt: skip
    dtype = compute_dtype(input, scale, zero, offset, lut)
    w = _dequantize_reference(codes, scale, zero, offset, lut, bits, group_size, input.shape[-1]).to(dtype)
    if activations == "int8":  # the integers first, the scale of the row last: rounded as little as integers are
        p, a = int8_activations(input.detach())
        exact = input.to(dtype) @ w.t()
        rounded = (p.to(dtype) @ w.t()) * a.to(dtype)
        through = _seen(input, activations).to(dtype) @ w.t()
        y = rounded.detach() + (through - through.detach()) if exact.requires_grad else rounded
    else:
        y = input.to(dtype) @ w.t()
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(input.dtype)


def _qlinear_backward_reference(
    grad: Tensor, input: Tensor | None, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None,
    lut: Tensor | None, bits: int, group_size: int, columns: int, activations: str, to_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(grad, input, scale, zero, offset, lut)
    g = rows_of(grad.to(dtype))
    nothing = _nothing(grad)
    to_x = nothing
    if to_input:
        w = _dequantize_reference(codes, scale, zero, offset, lut, bits, group_size, columns).to(dtype)
        to_x = (g @ w).view(*grad.shape[:-1], columns).to(grad.dtype)
    if input is None:
        return to_x, nothing, nothing, nothing, nothing
    parts = (scale, zero, offset, lut)
    dense = g.t() @ rows_of(_seen(input, activations).to(dtype))
    a, b, c, d = _dequantize_backward_reference(dense, codes, scale, zero, offset, lut, bits, group_size)
    a, b, c, d = (part if trained else nothing for part, trained in zip((a, b, c, d), map(_trainable, parts)))
    return to_x, a, b, c, d


def _qlinear_backward_fake(
    grad: Tensor, input: Tensor | None, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None,
    lut: Tensor | None, bits: int, group_size: int, columns: int, activations: str, to_input: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    to_x = grad.new_empty((*grad.shape[:-1], columns)) if to_input else _nothing(grad)
    parts = (None,) * 4 if input is None else (scale, zero, offset, lut)
    return to_x, *_parts_like(grad, *parts)


_qlinear_backward = register(
    Operator(
        f"qlinear_backward(Tensor grad, Tensor? input, {PARTS}, int bits, int group_size, SymInt columns, str activations, "
        "bool to_input) -> (Tensor input_grad, Tensor scale_grad, Tensor zero_grad, Tensor offset_grad, Tensor lut_grad)",
        family="lowbit",
        reference=_qlinear_backward_reference,
        fake=_qlinear_backward_fake,
        backward=through_reference(_qlinear_backward_reference),
        triton=Kernel("cofire_kernels.lowbit:qlinear_backward"),
        flops=lambda grad, input, codes, *rest: (
            2 * grad.numel() * int(rest[6]) * (int(rest[8]) + int(input is not None))
        ),
        bytes=lambda grad, input, codes, *rest: (
            stored_bytes(codes, *rest[:4])
            + (grad.numel() + grad.numel() // max(codes.shape[0], 1) * int(rest[6])) * grad.element_size()
        ),
    )
)


def _save_qlinear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, codes, *parts, bias, ctx.bits, ctx.group_size, ctx.activations = inputs
    ctx.columns, ctx.bias = input.shape[-1], None if bias is None else bias.dtype
    # The gradient of the input needs the weight alone.
    ctx.save_for_backward(input if _needs(ctx, 2, *parts) else None, codes, *parts)


def _qlinear_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, codes, *parts = ctx.saved_tensors
    to_input = ctx.needs_input_grad[0]
    to_x: Tensor | None = None
    to_parts: list[Tensor | None] = [None] * 4
    if to_input or input is not None:
        found = _qlinear_backward.overload(
            grad, input, codes, *parts, ctx.bits, ctx.group_size, ctx.columns, ctx.activations, to_input
        )
        to_x = found[0] if to_input else None
        to_parts = _only(tuple(parts), found[1:]) if input is not None else to_parts
    to_bias = rows_of(grad).sum(0).to(ctx.bias) if ctx.needs_input_grad[6] else None
    return to_x, None, *to_parts, to_bias, None, None, None


def _check_product(
    operator: str, input: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None,
    lut: Tensor | None, bias: Tensor | None, bits: int, group_size: int, activations: str,
) -> None:  # fmt: skip
    check_float(operator, input=input, bias=bias)
    if input.dim() == 0:
        refuse(operator, "input must have shape [..., K], got []")
    check_choice(operator, "activations", activations, ACTIVATIONS)
    columns = input.shape[-1]
    if codes.dim() == 2 and codes.shape[1] != (columns * bits + 7) // 8:
        refuse(
            operator,
            f"input must have as many columns as the weight: its last dimension is {columns}, which takes rows of "
            f"{(columns * bits + 7) // 8} bytes at {bits} bits, and the codes have {codes.shape[1]}",
        )
    check_parts(operator, codes, scale, zero, offset, lut, bits, group_size, columns)
    _check_against_weight(operator, input, codes, lut, bias, bits, group_size, activations)


def _check_against_weight(
    operator: str, input: Tensor, codes: Tensor, lut: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    activations: str,
) -> None:  # fmt: skip
    check_device(operator, "input", input, codes=codes, bias=bias)
    if bias is not None and list(bias.shape) != [codes.shape[0]]:
        refuse(operator, f"bias must have shape [{codes.shape[0]}], got {shape_of(bias)}")
    if activations == "int8":
        check_int8(operator, bits, group_size, lut)


def check_int8(operator: str, bits: int, group_size: int, lut: Tensor | None) -> None:
    """The sentences of what int8 activations do not take."""
    if lut is not None and lut.is_floating_point():
        refuse(operator, f"int8 activations need uniform codes or an int8 lut, got a lut of {lut.dtype}")
    if group_size > (most := int8_columns(bits, lut)):
        codes_of = f"bits={bits}" if lut is None else "an int8 lut"
        refuse(
            operator,
            f"int8 activations take groups of at most {most} columns with {codes_of} (sums stay in 32 bits), got {group_size}",
        )


def int8_columns(bits: int, lut: Tensor | None) -> int:
    """The widest group whose products with int8 activations, each at most 127 times the largest code, fit in 32 bits.

    At most 2^17: the sum of the activations is kept in fp32, which holds integers up to 2^24.
    """
    largest = (1 << bits) - 1 if lut is None else 255
    return min(1 << 17, ((1 << 31) - 1) // (127 * largest))


INT8_COLUMNS = int8_columns(8, None)  #: of any codes without a table


def _validate_qlinear(*args: Any) -> None:
    _check_product("qlinear", *args)


_qlinear = register(
    Operator(
        f"qlinear(Tensor input, {PARTS}, Tensor? bias, int bits, int group_size, str activations) -> Tensor",
        family="lowbit",
        validate=_validate_qlinear,
        reference=_qlinear_reference,
        fake=lambda input, codes, *rest: input.new_empty((*input.shape[:-1], codes.shape[0])),
        backward=Backward(_save_qlinear, _qlinear_grad, "qlinear_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.lowbit:qlinear"),
        cuda=Kernel("cofire_kernels.lowbit:qlinear_cuda"),
        flops=lambda input, codes, *rest: 2 * input.numel() * codes.shape[0],
        bytes=lambda input, codes, *rest: (
            stored_bytes(codes, *rest[:5])
            + (input.numel() + input.numel() // max(input.shape[-1], 1) * codes.shape[0]) * input.element_size()
        ),
    )
)


def _in_stored_order(operator: str, input: Tensor, weight: QTensor) -> Tensor:
    _check_weight(operator, weight)
    if not isinstance(input, Tensor):
        raise TypeError(f"{operator}: input must be a tensor, got {type(input).__name__}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        refuse(operator, f"input must have shape [..., {weight.shape[1]}], got {shape_of(input)}")
    if weight.perm is None:
        return input
    check_device(operator, "input", input, codes=weight.codes)
    return input.index_select(-1, weight.perm)


def _fits(input: Tensor, weight: QTensor, bias: Tensor | None, activations: str) -> bool:
    """Whether the checks have nothing to say, for most calls: one by one, they take as long as a small product."""
    return (
        isinstance(weight, QTensor)
        and isinstance(input, Tensor)
        and bias is None
        and weight.perm is None
        and (
            activations == "exact"
            or (activations == "int8" and weight.lut is None and weight.group_size <= INT8_COLUMNS)
        )
        and input.is_floating_point()
        and input.dim() > 0
        and input.shape[-1] == weight.shape[1]
        and input.device == weight.codes.device
    )


def qlinear(input: Tensor, weight: QTensor, bias: Tensor | None = None, *, activations: str = "exact") -> Tensor:
    """``F.linear`` with a quantised weight, which is decoded inside the kernel.

    Args:
        input: any float ``[..., K]``.
        weight: a :class:`~cofire.ops.QTensor` ``[N, K]``.
        bias: optional, any float ``[N]``.
        activations: "exact": the input as it is, accumulated in fp32. "int8": each row of the input is rounded to
            symmetric 8-bit integers of its own scale (absmax / 127), and the product is one of integers, exact within
            each group of the weight. Needs uniform codes or an int8 ``lut``, and groups of at most 66,311 columns (131,072
            where codes have at most 7 bits).

    Returns:
        ``[..., N]`` in the dtype of the input; the same bits for any number of threads. With 16-bit inputs and exact
        activations the decoded weight is rounded to 16 bits, as a dense one is, where matrix units multiply it: bf16 on CPUs
        with AMX from 64 rows on, on others with bf16 products (AVX512_BF16) from 192, in the gradient of the input from 8, and
        there a bias and a low-rank term are too; fp16 and bf16 on GPUs from 5 rows on.

        Differentiable with respect to input, bias, and scale, zero, offset and lut of the weight where they are floats. The
        input is saved for the backward only where one of the latter needs a gradient; the rounding to int8 passes gradients
        through.

    Raises:
        TypeError: ``weight`` is no QTensor, ``input`` no float.
        ValueError: shapes that do not fit; tensors on different devices; int8 activations with a table of floats, or with
            groups whose sums 32 bits may not hold.

    Example:
        >>> q = QTensor.from_codes(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.5], [2.0]]), bits=2)
        >>> qlinear(torch.tensor([[1.0, 2.0]]), q).tolist()
        [[1.0, 16.0]]

    Source:
        Dettmers et al. 2022 (LLM.int8(), 2208.07339), section 2 for the rows of int8; Frantar et al. 2023 (GPTQ,
        2210.17323) and Dettmers et al. 2023 (QLoRA, 2305.14314), section 3, for weights of few bits.
    """
    if not _fits(input, weight, bias, activations):
        input = _in_stored_order("qlinear", input, weight)
        # The weight itself was checked when it was made.
        check_float("qlinear", input=input, bias=bias)
        check_choice("qlinear", "activations", activations, ACTIVATIONS)
        _check_against_weight(
            "qlinear", input, weight.codes, weight.lut, bias, weight.bits, weight.group_size, activations
        )
    y: Tensor = _qlinear.run(
        input, weight.codes, weight.scales(), weight.zero, weight.offsets(), weight.lut, bias,
        weight.bits, weight.group_size, activations,
    )  # fmt: skip
    return y


# ---------------------------------------------------------------------------------------------- qlora_linear


def _qlora_linear_reference(
    input: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, alpha: float, bits: int, group_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(input, scale, zero, offset, lut)
    w = _dequantize_reference(codes, scale, zero, offset, lut, bits, group_size, input.shape[-1]).to(dtype)
    low = (input.to(dtype) @ lora_a.to(dtype).t()).to(input.dtype)
    y = input.to(dtype) @ w.t() + alpha * (low.to(dtype) @ lora_b.to(dtype).t())
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(input.dtype), low


def _qlora_linear_backward_reference(
    grad: Tensor, low_grad: Tensor | None, input: Tensor | None, low: Tensor | None, codes: Tensor, scale: Tensor | None,
    zero: Tensor | None, offset: Tensor | None, lut: Tensor | None, lora_a: Tensor, lora_b: Tensor, alpha: float,
    bits: int, group_size: int, to_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(grad, scale, zero, offset, lut)
    columns, nothing = lora_a.shape[1], _nothing(grad)
    g = rows_of(grad.to(dtype))
    to_low = alpha * (g @ lora_b.to(dtype))
    if low_grad is not None:
        to_low = to_low + low_grad.to(dtype).reshape(to_low.shape)
    to_x = nothing
    if to_input:
        w = _dequantize_reference(codes, scale, zero, offset, lut, bits, group_size, columns).to(dtype)
        to_x = (g @ w + to_low @ lora_a.to(dtype)).view(*grad.shape[:-1], columns).to(grad.dtype)
    to_a = nothing if input is None else (to_low.t() @ rows_of(input.to(dtype))).to(lora_a.dtype)
    to_b = nothing
    if low is not None:
        to_b = (alpha * (g.t() @ low.to(dtype).reshape(to_low.shape))).to(lora_b.dtype)
    return to_x, to_a, to_b


def _qlora_linear_backward_fake(
    grad: Tensor, low_grad: Tensor | None, input: Tensor | None, low: Tensor | None, codes: Tensor, scale: Tensor | None,
    zero: Tensor | None, offset: Tensor | None, lut: Tensor | None, lora_a: Tensor, lora_b: Tensor, alpha: float,
    bits: int, group_size: int, to_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        grad.new_empty((*grad.shape[:-1], lora_a.shape[1])) if to_input else _nothing(grad),
        _nothing(grad) if input is None else torch.empty_like(lora_a, memory_format=torch.contiguous_format),
        _nothing(grad) if low is None else torch.empty_like(lora_b, memory_format=torch.contiguous_format),
    )


_qlora_linear_backward = register(
    Operator(
        f"qlora_linear_backward(Tensor grad, Tensor? low_grad, Tensor? input, Tensor? low, {PARTS}, Tensor lora_a, "
        "Tensor lora_b, float alpha, int bits, int group_size, bool to_input) "
        "-> (Tensor input_grad, Tensor lora_a_grad, Tensor lora_b_grad)",
        family="lowbit",
        reference=_qlora_linear_backward_reference,
        fake=_qlora_linear_backward_fake,
        backward=through_reference(_qlora_linear_backward_reference),
        triton=Kernel("cofire_kernels.lowbit:qlora_linear_backward"),
    )
)


def _save_qlora_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, codes, *parts, bias, lora_a, lora_b, ctx.alpha, ctx.bits, ctx.group_size = inputs
    ctx.set_materialize_grads(False)
    ctx.bias = None if bias is None else bias.dtype
    needs_a, needs_b = ctx.needs_input_grad[7], ctx.needs_input_grad[8]
    if _needs(ctx, 2, *parts):
        raise RuntimeError(
            "qlora_linear: the weight is frozen; scale, zero, offset and lut must not require a gradient"
        )
    ctx.save_for_backward(input if needs_a else None, output[1] if needs_b else None, codes, *parts, lora_a, lora_b)


def _qlora_linear_grad(ctx: Any, grad: Tensor | None, low_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    input, low, codes, *parts, lora_a, lora_b = ctx.saved_tensors
    if grad is None:
        if low_grad is None:
            return (None,) * 12
        grad = low_grad.new_zeros((*low_grad.shape[:-1], codes.shape[0]))
    to_input = ctx.needs_input_grad[0]
    to_x, to_a, to_b = _qlora_linear_backward.overload(
        grad, low_grad, input, low, codes, *parts, lora_a, lora_b, ctx.alpha, ctx.bits, ctx.group_size, to_input
    )
    to_bias = rows_of(grad).sum(0).to(ctx.bias) if ctx.needs_input_grad[6] else None
    return (
        to_x if to_input else None, None, None, None, None, None, to_bias,
        to_a if input is not None else None, to_b if low is not None else None, None, None, None,
    )  # fmt: skip


def _validate_qlora_linear(
    input: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, alpha: float, bits: int, group_size: int,
) -> None:  # fmt: skip
    name = "qlora_linear"
    _check_product(name, input, codes, scale, zero, offset, lut, bias, bits, group_size, "exact")
    check_float(name, lora_a=lora_a, lora_b=lora_b)
    check_device(name, "input", input, lora_a=lora_a, lora_b=lora_b)
    if lora_a.dim() != 2 or lora_a.shape[1] != input.shape[-1]:
        refuse(name, f"lora_a must have shape [R, {input.shape[-1]}], got {shape_of(lora_a)}")
    if list(lora_b.shape) != [codes.shape[0], lora_a.shape[0]]:
        refuse(name, f"lora_b must have shape [{codes.shape[0]}, {lora_a.shape[0]}], got {shape_of(lora_b)}")


_qlora_linear = register(
    Operator(
        f"qlora_linear(Tensor input, {PARTS}, Tensor? bias, Tensor lora_a, Tensor lora_b, float alpha, int bits, "
        "int group_size) -> (Tensor output, Tensor low)",
        family="lowbit",
        validate=_validate_qlora_linear,
        reference=_qlora_linear_reference,
        fake=lambda input, codes, scale, zero, offset, lut, bias, lora_a, *rest: (
            input.new_empty((*input.shape[:-1], codes.shape[0])),
            input.new_empty((*input.shape[:-1], lora_a.shape[0])),
        ),
        backward=Backward(_save_qlora_linear, _qlora_linear_grad, "qlora_linear_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.lowbit:qlora_linear"),
        flops=lambda input, codes, scale, zero, offset, lut, bias, lora_a, *rest: (
            2 * input.numel() * codes.shape[0]
            + 2 * lora_a.shape[0] * (input.numel() + input.numel() // max(input.shape[-1], 1) * codes.shape[0])
        ),
        bytes=lambda input, codes, scale, zero, offset, lut, bias, lora_a, lora_b, *rest: (
            stored_bytes(codes, scale, zero, offset, lut, bias, lora_a, lora_b)
            + (input.numel() + input.numel() // max(input.shape[-1], 1) * codes.shape[0]) * input.element_size()
        ),
    )
)


def qlora_linear(
    input: Tensor, weight: QTensor, lora_a: Tensor, lora_b: Tensor, alpha: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """A frozen quantised weight with a trained low-rank term: ``x W^T + alpha (x A^T) B^T + bias``.

    Args:
        input: any float ``[..., K]``.
        weight: a :class:`~cofire.ops.QTensor` ``[N, K]``; frozen.
        lora_a: any float ``[R, K]``.
        lora_b: any float ``[N, R]``.
        alpha: the factor of the low-rank term (in papers: alpha / r).
        bias: optional, any float ``[N]``.

    Returns:
        ``[..., N]`` in the dtype of the input; the decoded weight is rounded where it is in :func:`qlinear`. Differentiable
        with respect to input, ``lora_a``, ``lora_b`` and bias. Saved for the backward are ``x A^T`` (R numbers per row)
        where ``lora_b`` is trained, and the input only where ``lora_a`` is.

    Raises:
        TypeError: ``weight`` is no QTensor, or a tensor no float.
        ValueError: shapes that do not fit; tensors on different devices.
        RuntimeError: a part of the weight requires a gradient.

    Example:
        >>> q = QTensor.from_codes(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.5], [2.0]]), bits=2)
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]])
        >>> qlora_linear(torch.tensor([[1.0, 2.0]]), q, a, b, alpha=0.5).tolist()
        [[2.0, 16.0]]

    Source:
        Dettmers et al. 2023 (QLoRA, 2305.14314), equation 5; Hu et al. 2022 (LoRA, 2106.09685), equation 3.
    """
    check_number("qlora_linear", alpha=alpha)
    stored = _in_stored_order("qlora_linear", input, weight)
    if weight.perm is not None:
        check_device("qlora_linear", "input", input, lora_a=lora_a)
        lora_a = lora_a.index_select(-1, weight.perm)
    y: Tensor = _qlora_linear(
        stored, weight.codes, weight.scales(), weight.zero, weight.offsets(), weight.lut, bias, lora_a, lora_b,
        float(alpha), weight.bits, weight.group_size,
    )[0]  # fmt: skip
    return y


# ---------------------------------------------------------------------------------------- the second layout

#: Rows of a block and columns of a step of the layout that CPU products read: ``csrc/cpu/lowbit.h``.
BLOCK, STEP = 16, 32


def layout_nbytes(weight: QTensor) -> int:
    """Bytes of the layout that the first product of this machine's CPU makes of a weight; 0 where it makes none.

    But for tables of bytes: 16 of powers of two with 5 bits, and 32 of each table of values that are bfloat16.
    """
    (rows, columns), lut, zero, offset = weight.shape, weight.lut, weight.zero, weight.offset
    wide = any(t.dtype == torch.float64 for t in weight.tensors().values())
    if native.STATUS.variant is None or weight.device.type != "cpu" or wide or not rows:
        return 0
    groups = columns // weight.group_size
    if groups != 1 and weight.group_size % STEP:
        return 0
    if lut is not None and lut.shape[0] > 1 and -(-rows // lut.shape[0]) % BLOCK:
        return 0
    blocks, steps = -(-rows // BLOCK), -(-columns // STEP)
    moved = zero is not None or offset is not None  # then zero and offset become one number of a row and group
    parts = 4 * BLOCK * blocks * groups
    tables, entries = 1 if lut is None else lut.shape[0], max(1 << weight.bits, 16)
    found = blocks * steps * weight.bits * 64 + parts * (1 + moved) + 4 * tables * entries
    if lut is None and zero is not None and zero.numel() == 1 and offset is not None and float(zero):
        found += parts  # the offset without the zero point, for products of few rows
    if lut is not None and lut.dtype == torch.int8:
        found += tables * entries
    return found


def drop_layouts() -> None:
    """Drop the layouts of weights that are gone. Without it they go when the next weight gets one: here a tiny one does."""
    tiny = QTensor(torch.zeros(1, 1, dtype=torch.uint8, device="cpu"), None, (1, 2), 4, 2)
    if layout_nbytes(tiny):
        _qlinear.overload(torch.zeros(1, 2, device="cpu"), tiny.codes, None, None, None, None, None, 4, 2, "exact")


def check_bits(operator: str, bits: Any, group_size: Any, columns: int) -> int:
    """The sentences of bits and group size; -1 and None stand for whole rows."""
    group_size = columns if group_size in (None, -1) else group_size
    check_integer(operator, bits=bits, group_size=group_size)
    if not 1 <= bits <= 8:
        refuse(operator, f"bits must be between 1 and 8, got {bits}")
    if group_size < 1 or columns % group_size:
        refuse(operator, f"group_size must be positive and divide the {columns} columns, got {group_size}")
    return int(group_size)
