# SPDX-License-Identifier: Apache-2.0
"""Products with masked and with compressed weights.

A mask is packed: uint8 ``[N, ceil(K / 8)]``, bit ``k % 8`` of byte ``k // 8``, 1 = kept (:func:`cofire.ops.pack_mask`).
A pruned entry is replaced by zero, never multiplied: what stands there, NaN included, does not matter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import grad as conv_gradients

from cofire.ops.checks import (
    check_choice,
    check_device,
    check_float,
    check_integer,
    check_map,
    check_number,
    check_pair,
    check_same,
    refuse,
    shape_of,
)
from cofire.ops.lowbit import rows_of
from cofire.ops.packing import packed_bytes, unpack_bits
from cofire.ops.sparse_weight import SparseWeight, check_sparse, dense_values, places
from cofire.registry import Backward, Kernel, Operator, register, through_reference

__all__ = ["SparseWeight", "apply_mask", "masked_linear", "sddmm", "sparse_conv2d", "spmm"]

MODES = ("invariant", "hard", "ste", "srste")


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty((0,))


# ------------------------------------------------------------------------------------------------ apply_mask


def _kept(bits: Tensor, weight: Tensor) -> Tensor:
    columns = math.prod(weight.shape[1:])
    return unpack_bits(bits, 1, columns).view(weight.shape).bool()


def _apply_mask_reference(weight: Tensor, bits: Tensor) -> Tensor:
    return torch.where(_kept(bits, weight), weight, 0.0).contiguous()


def check_bits(operator: str, weight: Tensor, bits: Tensor) -> None:
    """The sentences of a packed mask."""
    check_float(operator, weight=weight)
    if weight.dim() < 2:
        refuse(operator, f"weight must have at least two dimensions, got shape {shape_of(weight)}")
    if bits.dtype != torch.uint8:
        raise TypeError(f"{operator}: bits must be uint8 (a packed mask), got {bits.dtype}")
    columns = math.prod(weight.shape[1:])
    want = [weight.shape[0], packed_bytes(columns, 1)]
    if list(bits.shape) != want:
        refuse(operator, f"bits must have shape {want} ({columns} columns of one bit), got {shape_of(bits)}")
    check_device(operator, "weight", weight, bits=bits)


def _save_bits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _apply_mask_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    masked: Tensor = torch.ops.cofire.apply_mask.default(grad, ctx.saved_tensors[0])
    return masked, None


_apply_mask = register(
    Operator(
        "apply_mask(Tensor weight, Tensor bits) -> Tensor",
        family="sparse",
        validate=lambda weight, bits: check_bits("apply_mask", weight, bits),
        reference=_apply_mask_reference,
        fake=lambda weight, bits: weight.new_empty(weight.shape),
        backward=Backward(_save_bits, _apply_mask_grad, "apply_mask"),
        double_backward=True,
        triton=Kernel("cofire_kernels.sparse:apply_mask"),
        bytes=lambda weight, bits: 2 * weight.numel() * weight.element_size() + bits.numel(),
    )
)


def apply_mask(weight: Tensor, bits: Tensor) -> Tensor:
    """The weight with zeros where the mask is not set.

    Args:
        weight: any float ``[N, ...]``.
        bits: packed mask, uint8 ``[N, ceil(K / 8)]`` where K counts the entries of a row.

    Returns:
        The weight's shape and dtype, contiguous. Differentiable: the gradient is masked likewise.

    Raises:
        TypeError: ``weight`` is no float, or ``bits`` not uint8.
        ValueError: shapes that do not fit.

    Example:
        >>> apply_mask(torch.tensor([[1.0, float("nan"), 3.0]]), torch.tensor([[5]], dtype=torch.uint8)).tolist()
        [[1.0, 0.0, 3.0]]

    Source: the masked weight of Zhu and Gupta 2017 (1710.01878), section 3.
    """
    masked: Tensor = _apply_mask(weight, bits)
    return masked


# --------------------------------------------------------------------------------------------- masked_linear


def _effective(weight: Tensor, bits: Tensor, mode: str) -> Tensor:
    """What is multiplied. Of the pruned weights of "invariant", which are zero, no gradient goes back."""
    return torch.where(_kept(bits, weight), weight, weight.detach() if mode == "invariant" else 0.0)


def _masked_linear_reference(
    input: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, mode: str, decay: float
) -> Tensor:
    return torch.nn.functional.linear(input, _effective(weight, bits, mode), bias)


def _masked_linear_backward_reference(
    grad: Tensor, input: Tensor, weight: Tensor, bits: Tensor, mode: str, decay: float, to_input: bool, to_weight: bool
) -> tuple[Tensor, Tensor]:
    to_x = to_w = _nothing(grad)
    if to_input:
        to_x = (rows_of(grad) @ _effective(weight, bits, mode)).view(input.shape)
    if to_weight:
        to_w = rows_of(grad).t() @ rows_of(input)
        kept = _kept(bits, weight)
        if mode in ("invariant", "hard"):
            to_w = torch.where(kept, to_w, 0.0)
        elif mode == "srste":
            to_w = torch.where(kept, to_w, to_w + decay * weight)
    return to_x, to_w


_masked_linear_backward = register(
    Operator(
        "masked_linear_backward(Tensor grad, Tensor input, Tensor weight, Tensor bits, str mode, float decay, "
        "bool to_input, bool to_weight) -> (Tensor input_grad, Tensor weight_grad)",
        family="sparse",
        reference=_masked_linear_backward_reference,
        fake=lambda grad, input, weight, bits, mode, decay, to_input, to_weight: (
            input.new_empty(input.shape) if to_input else _nothing(grad),
            weight.new_empty(weight.shape) if to_weight else _nothing(grad),
        ),
        backward=through_reference(_masked_linear_backward_reference),
        triton=Kernel("cofire_kernels.sparse:masked_linear_backward"),
        flops=lambda grad, input, weight, bits, mode, decay, to_input, to_weight: (
            2 * grad.numel() * weight.shape[1] * (int(to_input) + int(to_weight))
        ),
    )
)


def _save_masked_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bits, bias, ctx.mode, ctx.decay = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(input, weight, bits)


def _masked_linear_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bits = ctx.saved_tensors
    to_input, to_weight = ctx.needs_input_grad[:2]
    to_x: Tensor | None = None
    to_w: Tensor | None = None
    if to_input or to_weight:
        x, w = _masked_linear_backward.overload(grad, input, weight, bits, ctx.mode, ctx.decay, to_input, to_weight)
        to_x, to_w = x if to_input else None, w if to_weight else None
    to_bias = rows_of(grad).sum(0).to(ctx.bias) if ctx.needs_input_grad[3] else None
    return to_x, to_w, None, to_bias, None, None


def _validate_masked_linear(
    input: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, mode: str, decay: float
) -> None:
    operator = "masked_linear"
    check_float(operator, input=input, bias=bias)
    check_bits(operator, weight, bits)
    check_choice(operator, "mode", mode, MODES)
    if weight.dim() != 2:
        refuse(operator, f"weight must have shape [N, K], got {shape_of(weight)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        refuse(operator, f"input must have shape [..., {weight.shape[1]}], got {shape_of(input)}")
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        refuse(operator, f"bias must have shape [{weight.shape[0]}], got {shape_of(bias)}")
    check_same(operator, "input", input, weight=weight, bias=bias)


_masked_linear = register(
    Operator(
        "masked_linear(Tensor input, Tensor weight, Tensor bits, Tensor? bias, str mode, float decay) -> Tensor",
        family="sparse",
        validate=_validate_masked_linear,
        reference=_masked_linear_reference,
        fake=lambda input, weight, *rest: input.new_empty((*input.shape[:-1], weight.shape[0])),
        backward=Backward(_save_masked_linear, _masked_linear_grad, "masked_linear_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.sparse:masked_linear"),
        autocast="lower",
        flops=lambda input, weight, *rest: 2 * input.numel() * weight.shape[0],
        bytes=lambda input, weight, bits, *rest: (
            (weight.numel() + input.numel() + input.numel() // max(weight.shape[1], 1) * weight.shape[0])
            * input.element_size()
            + bits.numel()
        ),
    )
)


def masked_linear(
    input: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None = None,
    *,
    mode: str = "hard",
    decay: float = 2e-4,
) -> Tensor:
    """``input`` times the masked weight, transposed: what a pruned linear layer computes while it is trained.

    Args:
        input: any float ``[..., K]``.
        weight: the input's dtype, ``[N, K]``, dense.
        bits: packed mask, uint8 ``[N, ceil(K / 8)]``.
        bias: optional, the input's dtype, ``[N]``.
        mode: how pruned weights take part.

            * ``"hard"``: they count as zero and get no gradient.
            * ``"invariant"``: they *are* zero already, which the caller vouches for (the optimisers of
              :mod:`cofire.optim` keep it so): the weight is read as it is, and pruned weights get no gradient.
            * ``"ste"``: zero in the product, but the gradient passes straight through to them.
            * ``"srste"``: the same, and they decay: ``decay * weight`` is added to their gradients.
        decay: of ``"srste"``.

    Returns:
        ``[..., N]`` in the input's dtype. Differentiable with respect to input, weight and bias.

    Raises:
        TypeError: a tensor that is no float, dtypes that differ, or ``bits`` not uint8.
        ValueError: shapes that do not fit, an unknown mode.

    Example:
        >>> w, bits = torch.tensor([[1.0, float("nan"), 3.0]]), torch.tensor([[5]], dtype=torch.uint8)
        >>> masked_linear(torch.tensor([[1.0, 1.0, 2.0]]), w, bits).tolist()
        [[7.0]]

    Source: Zhu and Gupta 2017 (1710.01878), section 3; SR-STE: Zhou et al. 2021 (2102.04010), equation 8.
    """
    check_number("masked_linear", decay=decay)
    y: Tensor = _masked_linear(input, weight, bits, bias, mode, float(decay))
    return y


# ------------------------------------------------------------------------------------------------------ spmm

PARTS = (
    "Tensor values, Tensor index, Tensor offsets, Tensor? scale, str format, SymInt rows, SymInt columns, "
    "int block_rows, int block_columns"
)


def _spmm_reference(
    input: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None,
    format: str, rows: int, columns: int, block_rows: int, block_columns: int,
) -> Tensor:  # fmt: skip
    dtype = _wide(input)
    w = dense_values(values, index, offsets, scale, format, rows, columns, block_rows, block_columns, dtype)
    y = input.to(dtype) @ w.t()
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(input.dtype)


def _sddmm_reference(
    grad: Tensor, input: Tensor, index: Tensor, offsets: Tensor, format: str, block_rows: int, block_columns: int
) -> Tensor:
    dtype = _wide(grad)
    g, x = rows_of(grad).to(dtype), rows_of(input).to(dtype)
    row, column = places(index, offsets, format)
    if format == "csr":
        return (g[:, row] * x[:, column]).sum(0)
    pad, panels = torch.nn.functional.pad, offsets.shape[0] - 1
    g = pad(g, (0, panels * block_rows - g.shape[1])).view(g.shape[0], panels, block_rows)
    x = pad(x, (0, -x.shape[1] % block_columns)).view(x.shape[0], -(-x.shape[1] // block_columns), block_columns)
    return torch.einsum("mbr,mbc->bcr", g[:, row], x[:, column])


_sddmm = register(
    Operator(
        "sddmm(Tensor grad, Tensor input, Tensor index, Tensor offsets, str format, int block_rows, int block_columns) "
        "-> Tensor",
        family="sparse",
        validate=lambda *args: _validate_sddmm(*args),
        reference=_sddmm_reference,
        fake=lambda grad, input, index, offsets, format, block_rows, block_columns: grad.new_empty(
            (index.shape[0],) if format == "csr" else (index.shape[0], block_columns, block_rows), dtype=_wide(grad)
        ),
        backward=through_reference(_sddmm_reference),
        double_backward=True,
        triton=Kernel("cofire_kernels.sparse:sddmm"),
        flops=lambda grad, input, index, offsets, format, block_rows, block_columns: (
            2 * math.prod(grad.shape[:-1]) * index.shape[0] * block_rows * block_columns
        ),
        bytes=lambda grad, input, index, offsets, format, block_rows, block_columns: (
            (grad.numel() + input.numel()) * grad.element_size()
            + index.shape[0] * (index.element_size() + 4 * block_rows * block_columns)
        ),
    )
)


def _validate_sddmm(
    grad: Tensor, input: Tensor, index: Tensor, offsets: Tensor, format: str, block_rows: int, block_columns: int
) -> None:
    operator = "sddmm"
    check_float(operator, grad=grad, input=input)
    check_choice(operator, "format", format, ("csr", "block"))
    if grad.dim() == 0 or input.dim() == 0 or grad.shape[:-1] != input.shape[:-1]:
        refuse(
            operator,
            f"grad and input must agree in all dimensions but the last, got {shape_of(grad)} and {shape_of(input)}",
        )
    entries = (index.shape[0],) if format == "csr" else (index.shape[0], block_columns, block_rows)
    values = grad.new_empty(entries)
    check_sparse(
        operator, values, index, offsets, None, format, grad.shape[-1], input.shape[-1], block_rows, block_columns
    )
    check_same(operator, "grad", grad, input=input)


def sddmm(grad: Tensor, input: Tensor, weight: SparseWeight) -> Tensor:
    """The product ``grad^T input``, but only where the weight has values: the gradient of a compressed weight.

    Args:
        grad: any float ``[..., N]``.
        input: the same dtype, ``[..., K]``.
        weight: a :class:`SparseWeight` ``[N, K]`` of format ``"csr"`` or ``"block"``; its values are not read.

    Returns:
        fp32 (fp64 of fp64), the shape of ``weight.values``.

    Raises:
        TypeError: ``weight`` is no SparseWeight, or a tensor no float.
        ValueError: shapes that do not fit, or a format without gradients.

    Example:
        >>> w = SparseWeight.from_dense(torch.eye(2), torch.eye(2) > 0, format="csr")
        >>> sddmm(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), w).tolist()
        [3.0, 8.0]

    Source: sampled dense-dense products: Gale et al. 2020 (Sputnik, 2006.10901), section 5.
    """
    _check_weight("sddmm", weight)
    found: Tensor = _sddmm(grad, input, weight.index, weight.offsets, weight.format, *weight.block)
    return found


def _spmm_backward_reference(
    grad: Tensor, input: Tensor, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None,
    format: str, rows: int, columns: int, block_rows: int, block_columns: int, to_input: bool, to_values: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    to_x = to_v = _nothing(grad)
    dtype = _wide(grad)
    if to_input:
        w = dense_values(values, index, offsets, scale, format, rows, columns, block_rows, block_columns, dtype)
        to_x = (rows_of(grad).to(dtype) @ w).view(*grad.shape[:-1], columns).to(grad.dtype)
    if to_values:
        to_v = _sddmm_reference(grad, input, index, offsets, format, block_rows, block_columns).to(values.dtype)
    return to_x, to_v


_spmm_backward = register(
    Operator(
        f"spmm_backward(Tensor grad, Tensor input, {PARTS}, bool to_input, bool to_values) "
        "-> (Tensor input_grad, Tensor values_grad)",
        family="sparse",
        reference=_spmm_backward_reference,
        fake=lambda grad, input, values, *rest: (
            grad.new_empty((*grad.shape[:-1], rest[5])) if rest[8] else _nothing(grad),
            values.new_empty(values.shape) if rest[9] else _nothing(grad),
        ),
        backward=through_reference(_spmm_backward_reference),
        triton=Kernel("cofire_kernels.sparse:spmm_backward"),
        flops=lambda grad, input, values, *rest: (
            2 * math.prod(grad.shape[:-1]) * values.numel() * (int(rest[8]) + int(rest[9]))
        ),
    )
)


def _save_spmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, bias, values, index, offsets, scale, *ctx.rest = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(input, values, index, offsets, scale)


def _refuse_packed(operator: str, format: str, scale: Tensor | None) -> None:
    if format not in ("csr", "block") or scale is not None:
        what = "int8 values" if scale is not None else f"the format {format}"
        raise RuntimeError(
            f"{operator}: the weight is packed for inference ({what}) and has no backward; pack it as csr or block, with "
            "floating-point values"
        )


def _spmm_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, values, index, offsets, scale = ctx.saved_tensors
    to_input, to_values = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    to_x: Tensor | None = None
    to_v: Tensor | None = None
    if to_input or to_values:
        _refuse_packed("spmm", ctx.rest[0], scale)
        x, v = _spmm_backward.overload(grad, input, values, index, offsets, scale, *ctx.rest, to_input, to_values)
        to_x, to_v = x if to_input else None, v if to_values else None
    to_bias = rows_of(grad).sum(0).to(ctx.bias) if ctx.needs_input_grad[1] else None
    return to_x, to_bias, to_v, None, None, None, None, None, None, None, None


def _validate_spmm(
    input: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None,
    format: str, rows: int, columns: int, block_rows: int, block_columns: int,
) -> None:  # fmt: skip
    check_sparse("spmm", values, index, offsets, scale, format, rows, columns, block_rows, block_columns)
    _check_product(input, bias, values, rows, columns)


def _check_product(input: Tensor, bias: Tensor | None, values: Tensor, rows: int, columns: int) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"spmm: input must be a tensor, got {type(input).__name__}")
    check_float("spmm", input=input, bias=bias)
    if input.dim() == 0 or input.shape[-1] != columns:
        refuse("spmm", f"input must have shape [..., {columns}], got {shape_of(input)}")
    if bias is not None and list(bias.shape) != [rows]:
        refuse("spmm", f"bias must have shape [{rows}], got {shape_of(bias)}")
    check_device("spmm", "input", input, values=values, bias=bias)


def _stored(values: Tensor, index: Tensor, offsets: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in (values, index, offsets))


_spmm = register(
    Operator(
        f"spmm(Tensor input, Tensor? bias, {PARTS}) -> Tensor",
        family="sparse",
        validate=_validate_spmm,
        reference=_spmm_reference,
        fake=lambda input, bias, values, index, offsets, scale, format, rows, *rest: input.new_empty(
            (*input.shape[:-1], rows)
        ),
        backward=Backward(_save_spmm, _spmm_grad, "spmm_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.sparse:spmm"),
        cuda=Kernel("cofire_kernels.sparse:spmm_cuda", (torch.bfloat16, torch.float16)),
        autocast=None,
        flops=lambda input, bias, values, *rest: 2 * math.prod(input.shape[:-1]) * values.numel(),
        bytes=lambda input, bias, values, index, offsets, scale, format, rows, *rest: (
            _stored(values, index, offsets)
            + (input.numel() + math.prod(input.shape[:-1]) * rows) * input.element_size()
        ),
    )
)


def spmm(input: Tensor, weight: SparseWeight, bias: Tensor | None = None) -> Tensor:
    """A linear layer with a compressed weight: ``input W^T + bias``.

    Args:
        input: any float ``[..., K]``.
        weight: a :class:`SparseWeight` ``[N, K]``, values of any supported dtype.
        bias: optional, any float ``[N]``.

    Returns:
        ``[..., N]`` in the input's dtype, summed in fp32. Differentiable with respect to input, bias and (of the formats
        ``csr`` and ``block``) the values; what is packed for inference refuses a backward. A NaN in the input reaches the
        outputs whose kept weights meet it, and with bitmaps, whose zeros are multiplied, and in plain torch
        all outputs of its row.

    Raises:
        TypeError: ``weight`` is no SparseWeight, or a tensor no float.
        ValueError: shapes that do not fit.

    Example:
        >>> w = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]])
        >>> spmm(torch.tensor([[1.0, 10.0, 100.0]]), SparseWeight.from_dense(w, w != 0)).tolist()
        [[20.0, 301.0]]

    Source: Saad, "Iterative methods for sparse linear systems" (2003), section 3.5; Gale et al. 2020 (2006.10901).
    """
    _check_weight("spmm", weight)
    _check_product(input, bias, weight.values, *weight.shape)  # the weight itself was checked when it was made
    y: Tensor = _spmm.run(input, bias, *weight.arguments())
    return y


# --------------------------------------------------------------------------------------------- sparse_conv2d

WINDOW = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"


def _kernel_of(weight: Tensor, kernel_size: list[int]) -> Tensor:
    taps = math.prod(kernel_size)
    return weight.view(weight.shape[0], weight.shape[1] // taps, *kernel_size)


def _sparse_conv2d_reference(
    input: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None,
    format: str, rows: int, columns: int, block_rows: int, block_columns: int,
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    dtype = _wide(input)
    w = dense_values(values, index, offsets, scale, format, rows, columns, block_rows, block_columns, dtype)
    b = None if bias is None else bias.to(dtype)
    kernel = _kernel_of(w, kernel_size)
    y = torch.nn.functional.conv2d(input.to(dtype), kernel, b, stride, padding, dilation, groups)
    return y.to(input.dtype).contiguous()


def _sparse_conv2d_backward_reference(
    grad: Tensor, input: Tensor, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None,
    format: str, rows: int, columns: int, block_rows: int, block_columns: int,
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
    to_input: bool, to_values: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = _wide(grad)
    w = dense_values(values, index, offsets, scale, format, rows, columns, block_rows, block_columns, dtype)
    kernel = _kernel_of(w, kernel_size)
    to_x = to_v = _nothing(grad)
    window = (stride, padding, dilation, groups)
    if to_input:
        to_x = conv_gradients.conv2d_input(input.shape, kernel, grad.to(dtype), *window).to(grad.dtype).contiguous()
    if to_values:
        dense = conv_gradients.conv2d_weight(input.to(dtype), kernel.shape, grad.to(dtype), *window).reshape(
            rows, columns
        )
        row, column = places(index, offsets, format)
        if format == "csr":
            to_v = dense[row, column]
        else:
            margin = (0, -columns % block_columns, 0, -rows % block_rows)
            dense = torch.nn.functional.pad(dense, margin)
            tiles = dense.view(-1, block_rows, dense.shape[1] // block_columns, block_columns)
            to_v = tiles[row, :, column].transpose(1, 2)
        to_v = to_v.to(values.dtype).contiguous()
    return to_x, to_v


_sparse_conv2d_backward = register(
    Operator(
        f"sparse_conv2d_backward(Tensor grad, Tensor input, {PARTS}, {WINDOW}, bool to_input, bool to_values) "
        "-> (Tensor input_grad, Tensor values_grad)",
        family="sparse",
        reference=_sparse_conv2d_backward_reference,
        fake=lambda grad, input, values, *rest: (
            input.new_empty(input.shape) if rest[-2] else _nothing(grad),
            values.new_empty(values.shape) if rest[-1] else _nothing(grad),
        ),
        backward=through_reference(_sparse_conv2d_backward_reference),
        cpu="the library's dense gradients, of which the stored ones are taken",
        triton="the library's dense gradients, of which the stored ones are taken",
    )
)


def _sparse_conv2d_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, values, index, offsets, scale = ctx.saved_tensors
    to_input, to_values = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    to_x: Tensor | None = None
    to_v: Tensor | None = None
    if to_input or to_values:
        _refuse_packed("sparse_conv2d", ctx.rest[0], scale)
        x, v = _sparse_conv2d_backward.overload(
            grad, input, values, index, offsets, scale, *ctx.rest, to_input, to_values
        )
        to_x, to_v = x if to_input else None, v if to_values else None
    to_bias = grad.sum((0, 2, 3)).to(ctx.bias) if ctx.needs_input_grad[1] else None
    return to_x, to_bias, to_v, *([None] * (len(ctx.rest) + 3))


def _out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _validate_sparse_conv2d(
    input: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None,
    format: str, rows: int, columns: int, block_rows: int, block_columns: int,
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> None:  # fmt: skip
    operator = "sparse_conv2d"
    check_sparse(operator, values, index, offsets, scale, format, rows, columns, block_rows, block_columns)
    check_float(operator, input=input, bias=bias)
    check_map(operator, "input", input)
    for name, pair, least in (
        ("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1),
    ):  # fmt: skip
        if len(pair) != 2 or min(pair) < least:
            refuse(operator, f"{name} must be two integers of at least {least}, got {list(pair)}")
    if groups < 1 or input.shape[1] % groups or rows % groups:
        refuse(
            operator,
            f"groups must divide the channels, {input.shape[1]} of the input and {rows} of the output, got {groups}",
        )
    want = input.shape[1] // groups * math.prod(kernel_size)
    if columns != want:
        refuse(
            operator,
            f"weight must have {want} columns ({input.shape[1] // groups} channels of {kernel_size[0]}x{kernel_size[1]}), "
            f"got {columns}",
        )
    for d in range(2):
        if _out_size(input.shape[2 + d], kernel_size[d], stride[d], padding[d], dilation[d]) < 1:
            refuse(operator, f"input must be as large as the kernel, got shape {shape_of(input)}")
    if bias is not None and list(bias.shape) != [rows]:
        refuse(operator, f"bias must have shape [{rows}], got {shape_of(bias)}")
    check_device(operator, "input", input, values=values, bias=bias)


def _conv_shape(input: Tensor, rows: int, window: tuple[list[int], ...]) -> tuple[int, ...]:
    kernel_size, stride, padding, dilation = window
    sizes = (_out_size(input.shape[2 + d], kernel_size[d], stride[d], padding[d], dilation[d]) for d in range(2))
    return (input.shape[0], rows, *sizes)


_sparse_conv2d = register(
    Operator(
        f"sparse_conv2d(Tensor input, Tensor? bias, {PARTS}, {WINDOW}) -> Tensor",
        family="sparse",
        validate=_validate_sparse_conv2d,
        reference=_sparse_conv2d_reference,
        fake=lambda input, bias, *rest: input.new_empty(_conv_shape(input, rest[5], rest[9:13])),
        backward=Backward(_save_spmm, _sparse_conv2d_grad, "sparse_conv2d_backward"),
        double_backward=True,
        triton="decoded, then the library's convolution",
        flops=lambda input, bias, values, *rest: (
            2 * values.numel() * input.shape[0] * math.prod(_conv_shape(input, 1, rest[8:12])[2:])
        ),
        bytes=lambda input, bias, values, index, offsets, scale, format, rows, *rest: (
            _stored(values, index, offsets)
            + (input.numel() + math.prod(_conv_shape(input, rows, rest[3:7]))) * input.element_size()
        ),
    )
)


def sparse_conv2d(
    input: Tensor,
    weight: SparseWeight,
    bias: Tensor | None = None,
    *,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution with a compressed weight.

    Args:
        input: any float ``[B, C, H, W]``.
        weight: a :class:`SparseWeight` ``[O, C / groups * kh * kw]``: the kernel ``[O, C / groups, kh, kw]``, a row for
            each output channel.
        bias: optional, any float ``[O]``.
        kernel_size, stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; ``padding`` in numbers.

    Returns:
        ``[B, O, H', W']`` in the input's dtype, contiguous. Differentiable as :func:`spmm` is; the gradients are those of the
        library's dense convolution, of which the stored ones are kept.

    Raises:
        TypeError: ``weight`` is no SparseWeight, or a tensor no float.
        ValueError: shapes that do not fit.

    Example:
        >>> w = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
        >>> s = SparseWeight.from_dense(w.flatten(1), w.flatten(1) != 0, "csr")
        >>> sparse_conv2d(torch.arange(9.0).view(1, 1, 3, 3), s, kernel_size=2).tolist()
        [[[[1.0, 2.0], [4.0, 5.0]]]]

    Source: the direct convolution of Park et al. 2017 (1608.01409), section 3.1.
    """
    _check_weight("sparse_conv2d", weight)
    window = [
        check_pair("sparse_conv2d", name, value)
        for name, value in (
            ("kernel_size", kernel_size), ("stride", stride), ("padding", padding), ("dilation", dilation),
        )
    ]  # fmt: skip
    check_integer("sparse_conv2d", groups=groups)
    y: Tensor = _sparse_conv2d(input, bias, *weight.arguments(), *window, groups)
    return y


def _check_weight(operator: str, weight: Any) -> None:
    if not isinstance(weight, SparseWeight):
        raise TypeError(f"{operator}: weight must be a SparseWeight, got {type(weight).__name__}")
