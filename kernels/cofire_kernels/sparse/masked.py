# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Masked weights: the mask alone, and the products of few rows that expand its bits in registers.

A tile of the weight and the words of its mask are loaded side by side, and the bits choose between a weight and zero
(they never multiply: a NaN in a pruned weight stays where it is). A product of few rows is bound by the bytes of the
weight, and there the masked weight, written and read again, would cost more than the product. With many rows the
tensor cores are the bound, a tile would be masked again for each block of rows, and the masked weight is written once
for the library's product.

The bits stand along the columns, which is the order in which all three products load the weight: no transposed copy of
the mask is needed. Sums are fp32, nothing is added atomically: the same bits on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.lowbit.decode import tile_codes
from cofire_kernels.lowbit.product import _rows, _samples, _target, share, sum_splits
from cofire_kernels.numerics import dot

#: With more rows than this the masked weight is written once. By arithmetic, not by a measurement: masking costs about
#: 4 operations per weight and block of 64 to 128 rows, as much as the tensor cores' product of a block. Without tensor
#: cores (fp32) the product itself is the bottleneck much earlier.
LIBRARY_ROWS = {2: 512, 4: 64}


# ------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def kept_tile(bits_ptr, n, start, rows, row_units, BLOCK_K: tl.constexpr):
    """Where the mask is set in rows ``n`` (int64) and the columns from ``start`` on."""
    return tile_codes(bits_ptr, n, start, rows, row_units, 1, BLOCK_K) != 0


@triton.jit
def masked_tile(w_ptr, bits_ptr, n, start, rows, columns, row_units, BLOCK_K: tl.constexpr):
    """The weight in rows ``n`` and the columns from ``start`` on; 0 where it is pruned, and outside."""
    k = start + tl.arange(0, BLOCK_K)
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    w = tl.load(w_ptr + n[:, None] * columns + k[None, :], mask=inside, other=0)
    return tl.where(kept_tile(bits_ptr, n, start, rows, row_units, BLOCK_K), w, tl.zeros_like(w))


@triton.jit
def apply_mask_kernel(
    x_ptr, bits_ptr, other_ptr, out_ptr, rows, columns, row_units, decay, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """``x`` where the mask is set; elsewhere 0, or ``x + decay * other``. May work in place."""
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(0) * BLOCK_K
    k = start + tl.arange(0, BLOCK_K)
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    place = n[:, None] * columns + k[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0)
    kept = kept_tile(bits_ptr, n, start, rows, row_units, BLOCK_K)
    if other_ptr is None:
        pruned = tl.zeros_like(x)
    else:
        other = tl.load(other_ptr + place, mask=inside & (kept == 0), other=0).to(tl.float32)
        pruned = (x.to(tl.float32) + decay * other).to(x.dtype)
    tl.store(out_ptr + place, tl.where(kept, x, pruned), mask=inside)


@triton.jit
def masked_linear_kernel(
    x_ptr, w_ptr, bits_ptr, bias_ptr, y_ptr, m_rows, rows, columns, row_units, part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y^T = W x^T``: the masked weight goes from registers into the tensor cores."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    first = split * part
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for tile in range(first, tl.minimum(first + part, tl.cdiv(columns, BLOCK_K))):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (k < columns)[:, None] & (m < m_rows)[None, :]
        x = tl.load(x_ptr + m[None, :] * columns + k[:, None], mask=inside, other=0)
        w = masked_tile(w_ptr, bits_ptr, n, tile * BLOCK_K, rows, columns, row_units, BLOCK_K)
        acc = dot(w, x, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=(n < rows) & (split == 0), other=0).to(tl.float32)[:, None]
    to = y_ptr + (split.to(tl.int64) * m_rows + m)[None, :] * rows + n[:, None]
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=(m < m_rows)[None, :] & (n < rows)[:, None])


@triton.jit
def masked_input_gradient_kernel(
    dy_ptr, w_ptr, bits_ptr, dx_ptr, m_rows, rows, columns, row_units, part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dx = dy W``, summed over ``part`` tiles of rows of the weight."""
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(0) * BLOCK_K
    k = start + tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    first = split * part
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for tile in range(first, tl.minimum(first + part, tl.cdiv(rows, BLOCK_N))):
        n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        dy = tl.load(dy_ptr + m[:, None] * rows + n[None, :], mask=(m < m_rows)[:, None] & (n < rows)[None, :], other=0)
        w = masked_tile(w_ptr, bits_ptr, n, start, rows, columns, row_units, BLOCK_K)
        acc = dot(dy, w, acc)
    to = dx_ptr + (split.to(tl.int64) * m_rows + m)[:, None] * columns + k[None, :]
    tl.store(to, acc.to(dx_ptr.dtype.element_ty), mask=(m < m_rows)[:, None] & (k < columns)[None, :])


@triton.jit
def masked_weight_gradient_kernel(
    dy_ptr, x_ptr, w_ptr, bits_ptr, dw_ptr, m_rows, rows, columns, row_units, decay,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dw = dy^T x`` where the mask is set; elsewhere 0, or with ``w`` given ``dy^T x + decay * w``.

    A tile without any kept weight (of a pattern of blocks) multiplies nothing.
    """
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(0) * BLOCK_K
    k = start + tl.arange(0, BLOCK_K)
    kept = kept_tile(bits_ptr, n, start, rows, row_units, BLOCK_K)
    summed = m_rows
    if w_ptr is None:
        summed = tl.where(tl.max(tl.max(kept.to(tl.int32), 1), 0) > 0, m_rows, 0)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, summed, BLOCK_M):
        m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        dy = tl.load(dy_ptr + m[:, None] * rows + n[None, :], mask=(m < m_rows)[:, None] & (n < rows)[None, :], other=0)
        inside = (m < m_rows)[:, None] & (k < columns)[None, :]
        x = tl.load(x_ptr + m[:, None] * columns + k[None, :], mask=inside, other=0)
        acc = dot(tl.trans(dy), x, acc)
    place = n[:, None] * columns + k[None, :]
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    if w_ptr is None:
        pruned = tl.zeros_like(acc)
    else:
        pruned = acc + decay * tl.load(w_ptr + place, mask=inside & (kept == 0), other=0).to(tl.float32)
    tl.store(dw_ptr + place, tl.where(kept, acc, pruned).to(dw_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------- launching


def bits_of(bits: Tensor) -> Tensor:
    """The mask's rows as words of 32 bits where they are whole words, else as bytes."""
    bits = bits.contiguous()
    if bits.shape[1] % 4 or bits.numel() == 0:
        return bits
    if bits.device.type != "meta" and bits.data_ptr() % 4:
        bits = bits.clone()
    return bits.view(torch.int32)


def mask_into(x: Tensor, bits: Tensor, out: Tensor, other: Tensor | None = None, decay: float = 0.0) -> Tensor:
    """``out``, which may be ``x``, of :func:`apply_mask_kernel`; all contiguous ``[N, K]``."""
    if out.numel():
        rows, columns = x.shape
        words = bits_of(bits)
        tile = configs.tile("apply_mask", x.device, columns=columns)
        grid = (triton.cdiv(columns, tile["BLOCK_K"]), triton.cdiv(rows, tile["BLOCK_N"]))
        with torch.cuda.device_of(x):
            apply_mask_kernel[grid](x, words, other, out, rows, columns, words.shape[1], decay, **tile)
    return out


def apply_mask(weight: Tensor, bits: Tensor) -> Tensor:
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if out.numel():
        mask_into(weight.contiguous().view(weight.shape[0], -1), bits, out.view(weight.shape[0], -1))
    return out


def way(samples: int, columns: int, mode: str, element_size: int) -> tuple[str, str]:
    """How the product with the masked weight is computed for so many rows, and why by the library, if it is."""
    if mode == "invariant":
        return "library", "the pruned weights are zero already"
    if columns == 0:
        return "masked", "there is nothing to sum"
    if samples > LIBRARY_ROWS[element_size]:
        return "masked", f"more than {LIBRARY_ROWS[element_size]} rows"
    return "fused", ""


def _plan(kind: str, why: str) -> str:
    return {
        "library": f"the library's product: {why}",
        "masked": f"writes the masked weight, then the library's product: {why}",
        "fused": "masks tiles of the weight for the tensor cores",
    }[kind]


def masked_linear_plan(*args: Any) -> str:
    """What :func:`masked_linear` does with these arguments."""
    input, mode = args[0], args[4]
    return _plan(*way(_samples(input), input.shape[-1], mode, input.element_size()))


def masked_linear(
    input: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, mode: str, decay: float
) -> Tensor:  # fmt: skip
    rows, columns = weight.shape
    x, bias = _rows(input), None if bias is None else bias.contiguous()
    samples = x.shape[0]
    kind, _ = way(samples, columns, mode, x.element_size())
    if kind != "fused" or samples * rows == 0:
        effective = apply_mask(weight, bits) if kind == "masked" else weight
        return F.linear(x, effective, bias).view(*input.shape[:-1], rows)
    y = torch.empty((*input.shape[:-1], rows), dtype=input.dtype, device=input.device)
    words = bits_of(bits)
    sizes = {"samples": samples, "columns": columns, "element_size": x.element_size()}
    tile = configs.tile("masked_linear", x.device, **sizes)
    over_rows, over_samples = triton.cdiv(rows, tile["BLOCK_N"]), triton.cdiv(samples, tile["BLOCK_M"])
    splits, part = share(columns, tile["BLOCK_K"], over_rows * over_samples)
    with torch.cuda.device_of(x):
        to = _target(y, splits)
        masked_linear_kernel[(over_rows, over_samples, splits)](
            x, weight.contiguous(), words, bias, to, samples, rows, columns, words.shape[1], part, **tile
        )
        sum_splits(to, y)
    return y


def masked_linear_backward_plan(*args: Any) -> str:
    """What :func:`masked_linear_backward` does with these arguments."""
    grad, weight, mode, to_input, to_weight = args[0], args[2], args[4], *args[6:8]
    samples, columns = _samples(grad), weight.shape[1]
    parts = []
    if to_input:
        parts.append(f"input: {_plan(*way(samples, columns, mode, grad.element_size()))}")
    if to_weight:
        parts.append(f"weight: {_weight_plan(samples, columns, mode, grad.element_size())[1]}")
    return "; ".join(parts)


def _weight_plan(samples: int, columns: int, mode: str, element_size: int) -> tuple[bool, str]:
    """Whether one kernel multiplies and masks, and that in words."""
    if mode == "ste":
        return False, "the library's product: the gradient passes to all weights"
    if samples > LIBRARY_ROWS[element_size] or columns == 0:
        return False, f"the library's product, then the mask: more than {LIBRARY_ROWS[element_size]} rows"
    return True, "the product masked before it is written"


def masked_linear_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bits: Tensor, mode: str, decay: float, to_input: bool, to_weight: bool
) -> tuple[Tensor, Tensor]:
    dy, x = _rows(grad), _rows(input)
    dx, dw = grad.new_empty((0,)), grad.new_empty((0,))
    if to_input:
        dx = _input_gradient(dy, weight, bits, mode).view(input.shape)
    if to_weight:
        dw = _weight_gradient(dy, x, weight, bits, mode, decay)
    return dx, dw


def _input_gradient(dy: Tensor, weight: Tensor, bits: Tensor, mode: str) -> Tensor:
    rows, columns = weight.shape
    samples = dy.shape[0]
    kind, _ = way(samples, columns, mode, dy.element_size())
    if kind != "fused" or samples * rows == 0:
        return dy @ (apply_mask(weight, bits) if kind == "masked" else weight)
    dx = torch.empty((samples, columns), dtype=dy.dtype, device=dy.device)
    words = bits_of(bits)
    sizes = {"samples": samples, "columns": columns, "element_size": dy.element_size()}
    tile = configs.tile("masked_input_gradient", dy.device, **sizes)
    over_columns, over_samples = triton.cdiv(columns, tile["BLOCK_K"]), triton.cdiv(samples, tile["BLOCK_M"])
    splits, part = share(rows, tile["BLOCK_N"], over_columns * over_samples)
    with torch.cuda.device_of(dy):
        to = _target(dx, splits)
        masked_input_gradient_kernel[(over_columns, over_samples, splits)](
            dy, weight.contiguous(), words, to, samples, rows, columns, words.shape[1], part, **tile
        )
        sum_splits(to, dx)
    return dx


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, bits: Tensor, mode: str, decay: float) -> Tensor:
    rows, columns = weight.shape
    samples = dy.shape[0]
    other = weight.contiguous() if mode == "srste" else None
    fused, _ = _weight_plan(samples, columns, mode, dy.element_size())
    if not fused:
        dw = dy.t() @ x
        return dw if mode == "ste" else mask_into(dw, bits, dw, other, decay)
    dw = torch.empty((rows, columns), dtype=weight.dtype, device=weight.device)
    if dw.numel() == 0:
        return dw
    words = bits_of(bits)
    sizes = {"samples": samples, "columns": columns, "element_size": dy.element_size()}
    tile = configs.tile("masked_weight_gradient", dy.device, **sizes)
    grid = (triton.cdiv(columns, tile["BLOCK_K"]), triton.cdiv(rows, tile["BLOCK_N"]))
    with torch.cuda.device_of(dy):
        masked_weight_gradient_kernel[grid](
            dy, x, other, words, dw, samples, rows, columns, words.shape[1], decay, **tile
        )
    return dw
