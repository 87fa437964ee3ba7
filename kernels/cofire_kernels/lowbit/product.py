# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Products with a weight that is decoded in the kernel, tile by tile.

With 16-bit inputs the decoded tile is rounded to their type for the tensor cores; sums are fp32. With int8 activations
and groups of whole tiles the products are those of integers. Nothing is added atomically: the same bits on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.lowbit.decode import Weight, load_codes, load_weight, weight_of
from cofire_kernels.numerics import INTERPRETED, dot, row_max


@triton.jit
def add_low_rank(acc, low_ptr, other_ptr, m, n, rows, columns, rank, alpha, stride_r, stride_n, BLOCK_R: tl.constexpr):
    """``acc + alpha low other``: low ``[M, R]``, other ``[R, N]`` by strides."""
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        a = tl.load(low_ptr + m[:, None] * rank + r[None, :], mask=(m < rows)[:, None] & (r < rank)[None, :], other=0)
        b = tl.load(
            other_ptr + r[:, None] * stride_r + n[None, :] * stride_n,
            mask=(r < rank)[:, None] & (n < columns)[None, :],
            other=0,
        )
        acc = dot(a.to(tl.float32) * alpha, b.to(tl.float32), acc)
    return acc


@triton.jit
def qlinear_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, bias_ptr, low_ptr, lora_b_ptr, a_ptr, y_ptr,
    m_rows, rows, columns, rank, alpha, row_bytes, partition_rows, groups, group, zero_row, zero_group,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y = x W^T``; ``a_ptr``, if any, are the scales of the rows of x."""
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + m[:, None] * columns + k[None, :], mask=(m < m_rows)[:, None] & (k < columns)[None, :], other=0
        )
        inside = (n < rows)[:, None] & (k < columns)[None, :]
        w = load_weight(
            codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, n[:, None], k[None, :], inside, row_bytes,
            partition_rows, groups, group, zero_row, zero_group, BITS,
        )  # fmt: skip
        acc = dot(x, w.to(x.dtype).trans(), acc)
    if low_ptr is not None:
        acc = add_low_rank(acc, low_ptr, lora_b_ptr, m, n, m_rows, rows, rank, alpha, 1, rank, 16)
    if a_ptr is not None:
        acc *= tl.load(a_ptr + m, mask=m < m_rows, other=0)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < rows, other=0).to(tl.float32)[None, :]
    to = y_ptr + m[:, None] * rows + n[None, :]
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=(m < m_rows)[:, None] & (n < rows)[None, :])


@triton.jit
def dot_bytes(a, b):
    """int32 products of int8 matrices."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee").to(tl.int32)
    return tl.dot(a, b, out_dtype=tl.int32)


@triton.jit
def qlinear_bytes_kernel(
    p_ptr, a_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, bias_ptr, y_ptr,
    m_rows, rows, columns, row_bytes, partition_rows, groups, group, zero_row, zero_group,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y = a p W^T`` with int8 p; every tile lies within one group."""
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        p = tl.load(p_ptr + m[:, None] * columns + k[None, :], mask=(m < m_rows)[:, None], other=0)
        inside = (n < rows)[:, None] & (k < columns)[None, :]
        q = load_codes(codes_ptr, n[:, None], k[None, :], inside, row_bytes, BITS)
        if lut_ptr is not None:
            v = tl.load(lut_ptr + (n // partition_rows)[:, None] * (1 << BITS) + q, mask=inside, other=0)
            centre = 0.0
        else:  # codes of eight bits are centred to fit
            v = q - (1 << (BITS - 1))
            centre = 1.0 * (1 << (BITS - 1))
        products = dot_bytes(p, v.to(tl.int8).trans()).to(tl.float32)
        total = tl.sum(p.to(tl.int32), 1).to(tl.float32)
        g = start // group
        move = tl.full([BLOCK_N], centre, tl.float32)
        if zero_ptr is not None:
            move -= tl.load(zero_ptr + n * zero_row + g * zero_group, mask=n < rows, other=0).to(tl.float32)
        products += total[:, None] * move[None, :]
        if scale_ptr is not None:
            products *= tl.load(scale_ptr + n * groups + g, mask=n < rows, other=0).to(tl.float32)[None, :]
        if offset_ptr is not None:
            offset = tl.load(offset_ptr + n * groups + g, mask=n < rows, other=0).to(tl.float32)
            products += total[:, None] * offset[None, :]
        acc += products
    acc *= tl.load(a_ptr + m, mask=m < m_rows, other=0)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < rows, other=0).to(tl.float32)[None, :]
    to = y_ptr + m[:, None] * rows + n[None, :]
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=(m < m_rows)[:, None] & (n < rows)[None, :])


@triton.jit
def input_gradient_kernel(
    dy_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, low_ptr, lora_a_ptr, dx_ptr,
    m_rows, rows, columns, rank, row_bytes, partition_rows, groups, group, zero_row, zero_group,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dx = dy W``, summed over the rows of the weight."""
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, rows, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        dy = tl.load(dy_ptr + m[:, None] * rows + n[None, :], mask=(m < m_rows)[:, None] & (n < rows)[None, :], other=0)
        inside = (n < rows)[:, None] & (k < columns)[None, :]
        w = load_weight(
            codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, n[:, None], k[None, :], inside, row_bytes,
            partition_rows, groups, group, zero_row, zero_group, BITS,
        )  # fmt: skip
        acc = dot(dy, w.to(dy.dtype), acc)
    if low_ptr is not None:
        acc = add_low_rank(acc, low_ptr, lora_a_ptr, m, k, m_rows, columns, rank, 1.0, columns, 1, 16)
    to = dx_ptr + m[:, None] * columns + k[None, :]
    tl.store(to, acc.to(dx_ptr.dtype.element_ty), mask=(m < m_rows)[:, None] & (k < columns)[None, :])


@triton.jit
def row_bytes_kernel(x_ptr, p_ptr, a_ptr, columns, BLOCK_K: tl.constexpr):
    """Rows as symmetric int8, and their scales; a row that is not finite has codes 0."""
    m = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([1, BLOCK_K], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + m * columns + k, mask=k < columns, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    a = tl.div_rn(row_max(largest), 127.0)
    tl.store(a_ptr + m + tl.arange(0, 1), a)
    usable = (a > 0) & (a < float("inf"))
    divisor = tl.where(usable, a, 1.0)[:, None]
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + m * columns + k, mask=k < columns, other=0).to(tl.float32)
        # 1.5 * 2^23: adding it rounds to an integer, halves to even
        rounded = (tl.div_rn(x, divisor + tl.zeros_like(x)) + 12582912.0) - 12582912.0
        rounded = tl.where(usable[:, None], rounded, 0.0)
        tl.store(p_ptr + m * columns + k, rounded.to(tl.int8), mask=k < columns)


def _rows(x: Tensor) -> Tensor:
    count = 1
    for size in x.shape[:-1]:
        count *= size
    return x.reshape(count, x.shape[-1]).contiguous()


def _bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    a = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        block = min(1024, triton.next_power_of_2(max(x.shape[1], 1)))
        with torch.cuda.device_of(x):
            row_bytes_kernel[(x.shape[0],)](x, p, a, x.shape[1], BLOCK_K=block, enable_fp_fusion=False)
    return p, a


def _product(
    x: Tensor, w: Weight, bias: Tensor | None, y: Tensor, scales: Tensor | None = None, low: Tensor | None = None,
    lora_b: Tensor | None = None, alpha: float = 0.0,
) -> None:  # fmt: skip
    tile: dict[str, Any] = configs.tile("qlinear", x.device, samples=x.shape[0], columns=w.columns)
    grid = (triton.cdiv(w.rows, tile["BLOCK_N"]), triton.cdiv(x.shape[0], tile["BLOCK_M"]))
    rank = 0 if low is None else low.shape[-1]
    with torch.cuda.device_of(x):
        qlinear_kernel[grid](
            x, *w.pointers, bias, low, lora_b, scales, y, x.shape[0], w.rows, w.columns, rank, alpha, *w.sizes,
            BITS=w.bits, **tile,
        )  # fmt: skip


def qlinear_plan(*args: Any) -> str:
    """What :func:`qlinear` does with these arguments."""
    group, activations = args[8], args[9]
    if activations == "exact":
        return "decodes tiles of the weight"
    return "multiplies int8" if _bytes_block(group) else "multiplies rounded activations as floats: groups are no tiles"


def _bytes_block(group: int) -> int:
    """The widest tile of whole groups' parts that an integer product takes; 0: none."""
    return next((b for b in (128, 64, 32) if group % b == 0), 0)


def qlinear(
    input: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bias: Tensor | None, bits: int, group_size: int, activations: str,
) -> Tensor:  # fmt: skip
    w = weight_of(codes, scale, zero, offset, lut, bits, group_size, input.shape[-1])
    y = torch.empty((*input.shape[:-1], w.rows), dtype=input.dtype, device=input.device)
    if y.numel() == 0:
        return y
    x = _rows(input)
    if activations == "exact":
        _product(x, w, bias, y)
        return y
    p, a = _bytes(x)
    block = _bytes_block(group_size)
    if not block:
        _product(p.float(), w, bias, y, scales=a)
        return y
    tile: dict[str, Any] = configs.tile("qlinear_bytes", x.device, samples=x.shape[0], columns=w.columns)
    grid = (triton.cdiv(w.rows, tile["BLOCK_N"]), triton.cdiv(x.shape[0], tile["BLOCK_M"]))
    with torch.cuda.device_of(x):
        qlinear_bytes_kernel[grid](
            p, a, *w.pointers, bias, y, x.shape[0], w.rows, w.columns, *w.sizes, BITS=bits, BLOCK_K=block, **tile
        )
    return y


def _input_gradient(grad: Tensor, w: Weight, low: Tensor | None = None, lora_a: Tensor | None = None) -> Tensor:
    dx = torch.empty((*grad.shape[:-1], w.columns), dtype=grad.dtype, device=grad.device)
    if dx.numel() == 0:
        return dx
    dy = _rows(grad)
    tile: dict[str, Any] = configs.tile("qlinear_backward", grad.device, samples=dy.shape[0], columns=w.columns)
    grid = (triton.cdiv(w.columns, tile["BLOCK_K"]), triton.cdiv(dy.shape[0], tile["BLOCK_M"]))
    rank = 0 if low is None else low.shape[-1]
    with torch.cuda.device_of(grad):
        input_gradient_kernel[grid](
            dy, *w.pointers, low, lora_a, dx, dy.shape[0], w.rows, w.columns, rank, *w.sizes, BITS=w.bits, **tile
        )
    return dx


def qlinear_backward(
    grad: Tensor, input: Tensor | None, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None,
    lut: Tensor | None, bits: int, group_size: int, columns: int, activations: str, to_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of the input by a kernel; those of scale, zero, offset and table from the library's dense product."""
    w = weight_of(codes, scale, zero, offset, lut, bits, group_size, columns)
    dx = _input_gradient(grad, w) if to_input else grad.new_empty((0,))
    if input is None:
        nothing = grad.new_empty((0,))
        return dx, nothing, nothing.clone(), nothing.clone(), nothing.clone()
    x = _rows(input).float()
    if activations == "int8":
        p, a = _bytes(_rows(input))
        x = p.float() * a[:, None]
    dense = _rows(grad).float().t() @ x
    parts = (scale, zero, offset, lut)
    found = torch.ops.cofire.dequantize_backward(dense, codes, *parts, bits, group_size)
    to_scale, to_zero, to_offset, to_lut = (
        f if p is not None and p.is_floating_point() else grad.new_empty((0,))
        for f, p in zip(found, parts, strict=True)
    )
    return dx, to_scale, to_zero, to_offset, to_lut


def qlora_linear(
    input: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, alpha: float, bits: int, group_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    w = weight_of(codes, scale, zero, offset, lut, bits, group_size, input.shape[-1])
    y = torch.empty((*input.shape[:-1], w.rows), dtype=input.dtype, device=input.device)
    x = _rows(input)
    low = (x @ lora_a.to(x.dtype).t()).view(*input.shape[:-1], lora_a.shape[0])
    if y.numel():
        _product(x, w, bias, y, None, _rows(low), lora_b.contiguous(), alpha)
    return y, low


def qlora_linear_backward(
    grad: Tensor, low_grad: Tensor | None, input: Tensor | None, low: Tensor | None, codes: Tensor, scale: Tensor | None,
    zero: Tensor | None, offset: Tensor | None, lut: Tensor | None, lora_a: Tensor, lora_b: Tensor, alpha: float,
    bits: int, group_size: int, to_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    w = weight_of(codes, scale, zero, offset, lut, bits, group_size, lora_a.shape[1])
    dy = _rows(grad).float()
    to_low = alpha * (dy @ lora_b.float())
    if low_grad is not None:
        to_low = to_low + _rows(low_grad).float()
    nothing = grad.new_empty((0,))
    dx = _input_gradient(grad, w, to_low.contiguous(), lora_a.contiguous()) if to_input else nothing
    da = nothing if input is None else (to_low.t() @ _rows(input).float()).to(lora_a.dtype)
    db = nothing if low is None else (alpha * (dy.t() @ _rows(low).float())).to(lora_b.dtype)
    return dx, da, db
