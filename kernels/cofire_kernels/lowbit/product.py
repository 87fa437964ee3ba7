# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Products with a weight that is decoded in the kernel, tile by tile.

Few rows are bound by the bytes of the weight, and the kernels for them are built to stream it: a product of a vector
for up to four rows, tensor cores with the weight as their first operand (whose least height is 64, so that few rows do
not leave it empty) for more; the columns are split among programs until there are enough of them. Many rows are bound
by arithmetic, and there a tile decoded again for each block of rows costs more than decoding the weight once for the
library's product.

With 16-bit inputs the decoded tile is rounded to their type for the tensor cores; sums are fp32. With int8 activations
and groups of whole tiles the products are those of integers. Nothing is added atomically: the same bits on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.lowbit.decode import (
    Weight,
    decoded,
    look_up,
    tile_codes,
    tile_line,
    tile_part,
    tile_values,
    tile_weight,
    tiles_refused,
    weight_of,
)
from cofire_kernels.numerics import INTERPRETED, dot, row_max

#: Up to here a product of vectors, without tensor cores.
VECTOR_ROWS = 4

#: With more rows than this the weight is decoded once, for the library's product. By arithmetic, not by a measurement:
#: a weight is decoded by about 4 operations, and again for each block of 64 to 128 rows, which tensor cores multiply in
#: twice that time; decoding it once moves 4 bytes more per weight. Without tensor cores the product itself is the
#: bottleneck much earlier.
LIBRARY_ROWS = {2: 512, 4: 64}

#: Programs that keep a GPU busy: four for each of 132 multiprocessors. The columns are split until there are so many.
PROGRAMS = 528


# ------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def qlinear_rows_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, bias_ptr, low_ptr, lora_b_ptr, a_ptr, y_ptr,
    m_rows, rows, columns, rank, alpha, row_units, partition_rows, groups, group, zero_row, zero_group, part,
    BITS: tl.constexpr, TABLES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """``y = x W^T`` of one to four rows; a program sums ``part`` tiles.

    The scale multiplies the sum of a group, ``sum(V x) scale + sum(x) shift``: a weight costs its decoding and one
    multiplication-addition per row of x.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * part
    acc = tl.zeros([BLOCK_M, BLOCK_N, GROUPS], tl.float32)
    for tile in tl.range(first, tl.minimum(first + part, tl.cdiv(columns, BLOCK_K)), num_stages=AHEAD):
        start = tile * BLOCK_K
        k = start + tl.arange(0, BLOCK_K)
        inside = (m < m_rows)[:, None] & (k < columns)[None, :]
        x = tl.load(x_ptr + m[:, None] * columns + k[None, :], mask=inside, other=0).to(tl.float32)
        v = tile_values(codes_ptr, lut_ptr, n, start, rows, row_units, partition_rows, BITS, TABLES, BLOCK_K)
        scale, shift = tile_line(
            scale_ptr, zero_ptr, offset_ptr, n, start, rows, groups, group, zero_row, zero_group, GROUPS
        )
        products = v.reshape(1, BLOCK_N, BLOCK_K) * x.reshape(BLOCK_M, 1, BLOCK_K)
        sums = tl.sum(products.reshape(BLOCK_M, BLOCK_N, GROUPS, BLOCK_K // GROUPS), 3)
        totals = tl.sum(x.reshape(BLOCK_M, GROUPS, BLOCK_K // GROUPS), 2)
        acc += sums * scale[None, :, :] + totals[:, None, :] * shift[None, :, :]
    y = tl.sum(acc, 2)
    m = m.to(tl.int64)
    if low_ptr is not None:
        for r in range(0, tl.where(tl.program_id(1) == 0, rank, 0)):
            low = tl.load(low_ptr + m * rank + r, mask=m < m_rows, other=0).to(tl.float32)
            other = tl.load(lora_b_ptr + n * rank + r, mask=n < rows, other=0).to(tl.float32)
            y += (alpha * low)[:, None] * other[None, :]
    if a_ptr is not None:
        y *= tl.load(a_ptr + m, mask=m < m_rows, other=0)[:, None]
    if bias_ptr is not None:
        once = (n < rows) & (tl.program_id(1) == 0)
        y += tl.load(bias_ptr + n, mask=once, other=0).to(tl.float32)[None, :]
    to = y_ptr + (tl.program_id(1).to(tl.int64) * m_rows + m)[:, None] * rows + n[None, :]
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=(m < m_rows)[:, None] & (n < rows)[None, :])


@triton.jit
def qlinear_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, bias_ptr, low_ptr, lora_b_ptr, a_ptr, y_ptr,
    m_rows, rows, columns, rank, alpha, row_units, partition_rows, groups, group, zero_row, zero_group, part,
    BITS: tl.constexpr, TABLES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y^T = W x^T``, so that the decoded weight goes from registers into the tensor cores."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    first = split * part
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for tile in range(first, tl.minimum(first + part, tl.cdiv(columns, BLOCK_K))):
        start = tile * BLOCK_K
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < columns)[:, None] & (m < m_rows)[None, :]
        x = tl.load(x_ptr + m[None, :] * columns + k[:, None], mask=inside, other=0)
        w = tile_weight(
            codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, n, start, rows, row_units, partition_rows, groups,
            group, zero_row, zero_group, BITS, TABLES, GROUPS, BLOCK_K, False,
        )  # fmt: skip
        acc = dot(w.to(x.dtype), x, acc)
    if low_ptr is not None:
        extra = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, tl.where(split == 0, rank, 0), 16):
            r = start + tl.arange(0, 16)
            inside = (n < rows)[:, None] & (r < rank)[None, :]
            other = tl.load(lora_b_ptr + n[:, None] * rank + r[None, :], mask=inside, other=0)
            inside = (r < rank)[:, None] & (m < m_rows)[None, :]
            low = tl.load(low_ptr + m[None, :] * rank + r[:, None], mask=inside, other=0)
            extra = dot(other.to(low.dtype), low, extra)
        acc += alpha * extra
    if a_ptr is not None:
        acc *= tl.load(a_ptr + m, mask=m < m_rows, other=0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=(n < rows) & (split == 0), other=0).to(tl.float32)[:, None]
    to = y_ptr + (split.to(tl.int64) * m_rows + m)[None, :] * rows + n[:, None]
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=(m < m_rows)[None, :] & (n < rows)[:, None])


@triton.jit
def dot_bytes(a, b, acc):
    """``acc + a b`` of int8 matrices in int32."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee").to(tl.int32)
    return tl.dot(a, b, acc, out_dtype=tl.int32)


@triton.jit
def qlinear_bytes_kernel(
    p_ptr, totals_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, bias_ptr, a_ptr, y_ptr,
    m_rows, rows, columns, tiles, row_units, partition_rows, groups, group, zero_row, zero_group, part,
    BITS: tl.constexpr, TABLES: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y^T = W (a p)^T`` with int8 p; every tile lies within one group, with WHOLE all of them within the same.

    ``totals``, int32 ``[M, tiles]``, are the sums of p over the columns of a tile. Products and the sums that a zero
    multiplies stay integers until the scale of a group.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    first = split * part
    CENTRE: tl.constexpr = 128 if BITS == 8 and lut_ptr is None else 0  # codes of eight bits are moved to fit
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    products = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    total = tl.zeros([BLOCK_M], tl.int32)
    for tile in range(first, tl.minimum(first + part, tl.cdiv(columns, BLOCK_K))):
        start = tile * BLOCK_K
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < columns)[:, None] & (m < m_rows)[None, :]
        p = tl.load(p_ptr + m[None, :] * columns + k[:, None], mask=inside, other=0)
        q = tile_codes(codes_ptr, n, start, rows, row_units, BITS, BLOCK_K)
        if lut_ptr is None:  # noqa: SIM108
            v = (q - CENTRE).to(tl.int8)
        else:
            v = look_up(lut_ptr, q, n, rows, partition_rows, BITS, TABLES)
        products = dot_bytes(v, p, products)
        total += tl.load(totals_ptr + m * tiles + tile, mask=m < m_rows, other=0)
        if not WHOLE:
            acc += scaled(
                products, total, scale_ptr, zero_ptr, offset_ptr, n, start, rows, groups, group, zero_row, zero_group,
                CENTRE,
            )  # fmt: skip
            products = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            total = tl.zeros([BLOCK_M], tl.int32)
    if WHOLE:
        acc = scaled(
            products, total, scale_ptr, zero_ptr, offset_ptr, n, 0, rows, groups, group, zero_row, zero_group, CENTRE
        )
    acc *= tl.load(a_ptr + m, mask=m < m_rows, other=0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=(n < rows) & (split == 0), other=0).to(tl.float32)[:, None]
    to = y_ptr + (split.to(tl.int64) * m_rows + m)[None, :] * rows + n[:, None]
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=(m < m_rows)[None, :] & (n < rows)[:, None])


@triton.jit
def scaled(
    products, total, scale_ptr, zero_ptr, offset_ptr, n, start, rows, groups, group, zero_row, zero_group,
    CENTRE: tl.constexpr,
):  # fmt: skip
    """The products of one group with its scale, zero and offset."""
    if zero_ptr is None:
        found = (products + (total * CENTRE)[None, :]).to(tl.float32)
    elif zero_ptr.dtype.element_ty == tl.uint8:
        zero = tl.load(zero_ptr + n * zero_row + (start // group) * zero_group, mask=n < rows, other=0).to(tl.int32)
        found = (products + (CENTRE - zero)[:, None] * total[None, :]).to(tl.float32)
    else:
        zero = tile_part(zero_ptr, n, start, rows, groups, group, zero_row, zero_group, 1)
        found = (products + (total * CENTRE)[None, :]).to(tl.float32) - zero * total.to(tl.float32)[None, :]
    if scale_ptr is not None:
        found *= tile_part(scale_ptr, n, start, rows, groups, group, groups, 1, 1)
    if offset_ptr is not None:
        found += tile_part(offset_ptr, n, start, rows, groups, group, groups, 1, 1) * total.to(tl.float32)[None, :]
    return found


@triton.jit
def input_gradient_kernel(
    dy_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, low_ptr, lora_a_ptr, dx_ptr,
    m_rows, rows, columns, rank, row_units, partition_rows, groups, group, zero_row, zero_group, part,
    BITS: tl.constexpr, TABLES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dx = dy W``, summed over ``part`` tiles of rows of the weight."""
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    first = split * part
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for tile in range(first, tl.minimum(first + part, tl.cdiv(rows, BLOCK_N))):
        n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        dy = tl.load(dy_ptr + m[:, None] * rows + n[None, :], mask=(m < m_rows)[:, None] & (n < rows)[None, :], other=0)
        w = tile_weight(
            codes_ptr, scale_ptr, zero_ptr, offset_ptr, lut_ptr, n, tl.program_id(0) * BLOCK_K, rows, row_units,
            partition_rows, groups, group, zero_row, zero_group, BITS, TABLES, GROUPS, BLOCK_K, False,
        )  # fmt: skip
        acc = dot(dy, w.to(dy.dtype), acc)
    if low_ptr is not None:
        for start in range(0, tl.where(split == 0, rank, 0), 16):
            r = start + tl.arange(0, 16)
            inside = (m < m_rows)[:, None] & (r < rank)[None, :]
            low = tl.load(low_ptr + m[:, None] * rank + r[None, :], mask=inside, other=0).to(dy_ptr.dtype.element_ty)
            inside = (r < rank)[:, None] & (k < columns)[None, :]
            other = tl.load(lora_a_ptr + r[:, None].to(tl.int64) * columns + k[None, :], mask=inside, other=0)
            acc = dot(low, other.to(low.dtype), acc)
    to = dx_ptr + (split.to(tl.int64) * m_rows + m)[:, None] * columns + k[None, :]
    tl.store(to, acc.to(dx_ptr.dtype.element_ty), mask=(m < m_rows)[:, None] & (k < columns)[None, :])


@triton.jit
def sum_splits_kernel(parts_ptr, y_ptr, elements, splits, BLOCK: tl.constexpr):
    """The sums of the programs that shared an output, in their order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        acc += tl.load(parts_ptr + place, mask=place < elements, other=0)
        parts_ptr += elements
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=place < elements)


@triton.jit
def row_bytes_kernel(
    x_ptr, p_ptr, a_ptr, totals_ptr, columns, tiles, BLOCK_K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Rows as symmetric int8, their scales, and the sums of each tile; a row that is not finite has codes 0."""
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
        tile = start // TILE + tl.arange(0, BLOCK_K // TILE)
        total = tl.sum(rounded.reshape(BLOCK_K // TILE, TILE), 1).to(tl.int32)
        tl.store(totals_ptr + m * tiles + tile, total, mask=tile < tiles)


# ----------------------------------------------------------------------------------------------------- launching


def _rows(x: Tensor) -> Tensor:
    count = 1
    for size in x.shape[:-1]:
        count *= size
    return x.reshape(count, x.shape[-1]).contiguous()


def share(summed: int, block: int, programs: int) -> tuple[int, int]:
    """How many programs share a sum of ``summed`` terms, of which a block is a tile; and the tiles of each."""
    tiles = max(triton.cdiv(summed, block), 1)
    each = triton.cdiv(tiles, min(triton.cdiv(tiles, 4), max(1, PROGRAMS // max(programs, 1))))
    return triton.cdiv(tiles, each), each


def _target(y: Tensor, splits: int) -> Tensor:
    """Where the kernel writes: the result itself, or fp32 sums beside each other."""
    return y if splits == 1 else torch.empty((splits, y.numel()), dtype=torch.float32, device=y.device)


def sum_splits(parts: Tensor, y: Tensor) -> None:
    """``y`` from fp32 ``[splits, elements of y]``, unless it is ``y`` itself."""
    if parts is not y:
        tile = configs.tile("sum_splits", y.device, elements=y.numel())
        sum_splits_kernel[(triton.cdiv(y.numel(), tile["BLOCK"]),)](parts, y, y.numel(), parts.shape[0], **tile)


def _bytes(x: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and sums of tiles ``[M, tiles]``."""
    p = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    a = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(x.shape[1], tile)
    totals = torch.empty((x.shape[0], tiles), dtype=torch.int32, device=x.device)
    if x.shape[0]:
        block = max(tile, min(1024, triton.next_power_of_2(max(x.shape[1], 1))))
        with torch.cuda.device_of(x):
            row_bytes_kernel[(x.shape[0],)](
                x, p, a, totals, x.shape[1], tiles, BLOCK_K=block, TILE=tile, enable_fp_fusion=False
            )
    return p, a, totals


def way(samples: int, columns: int, bits: int, group: int, element_size: int) -> tuple[str, str]:
    """The kernel that a product of so many rows takes, and why the weight is decoded as a whole, if it is."""
    refused = tiles_refused(columns, bits, group)
    if refused:
        return "library", refused
    if samples > LIBRARY_ROWS[element_size]:
        return "library", f"more than {LIBRARY_ROWS[element_size]} rows"
    return ("vectors" if samples <= VECTOR_ROWS else "tiles"), ""


def _plan(kernel: str, why: str) -> str:
    return {
        "library": f"decodes the weight, then the library's product: {why}",
        "vectors": "products of vectors",
        "tiles": "decodes tiles of the weight for the tensor cores",
    }[kernel]


def _samples(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _product(
    x: Tensor, w: Weight, bias: Tensor | None, y: Tensor, low: Tensor | None = None, lora_b: Tensor | None = None,
    alpha: float = 0.0,
) -> None:  # fmt: skip
    samples = x.shape[0]
    kernel, _ = way(samples, w.columns, w.bits, w.group, x.element_size())
    if kernel == "library":
        _library(x, decoded(w, x.dtype), bias, y, low, lora_b, alpha)
        return
    rank = 0 if low is None else low.shape[-1]
    sizes: dict[str, int] = {"samples": samples, "columns": w.columns}
    tile: dict[str, Any]
    if kernel == "vectors":
        tile = dict(configs.tile("qlinear_rows", x.device, **sizes))
        tile["BLOCK_M"] = triton.next_power_of_2(samples)
    else:
        tile = dict(configs.tile("qlinear", x.device, element_size=x.element_size(), **sizes))
    tile |= w.block(tile["BLOCK_K"]) | w.tables
    over_rows, over_samples = triton.cdiv(w.rows, tile["BLOCK_N"]), triton.cdiv(samples, tile["BLOCK_M"])
    splits, part = share(w.columns, tile["BLOCK_K"], over_rows * over_samples)
    grid = (over_rows, splits) if kernel == "vectors" else (over_rows, over_samples, splits)
    with torch.cuda.device_of(x):
        to = _target(y, splits)
        (qlinear_rows_kernel if kernel == "vectors" else qlinear_kernel)[grid](
            x, *w.pointers, bias, low, lora_b, None, to, samples, w.rows, w.columns, rank, alpha, *w.sizes, part,
            BITS=w.bits, **tile,
        )  # fmt: skip
        sum_splits(to, y)


def _library(
    x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, low: Tensor | None, lora_b: Tensor | None, alpha: float
) -> None:  # fmt: skip
    out = y.view(x.shape[0], w.shape[0])
    if bias is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, w.t(), out=out)
    if low is not None and lora_b is not None:
        out.addmm_(low, lora_b.to(low.dtype).t(), alpha=alpha)


def bytes_block(columns: int, bits: int, group: int, widest: int = 32) -> int:
    """The columns of a tile of integers within one group; 0: there is none."""
    if tiles_refused(columns, bits, group):
        return 0
    block = widest if group == columns else min(widest, group & -group)
    return block if block >= 32 else 0


def qlinear_plan(*args: Any) -> str:
    """What :func:`qlinear` does with these arguments."""
    input, bits, group, activations = args[0], *args[7:10]
    columns = input.shape[-1]
    if activations == "exact":
        return _plan(*way(_samples(input), columns, bits, group, input.element_size()))
    if bytes_block(columns, bits, group):
        return "multiplies int8 on the tensor cores"
    why = tiles_refused(columns, bits, group) or f"groups of {group} are narrower than a tile of bytes"
    return f"decodes the weight, then the library's product of rounded activations: {why}"


def qlinear(
    input: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bias: Tensor | None, bits: int, group_size: int, activations: str,
) -> Tensor:  # fmt: skip
    w = weight_of(codes, scale, zero, offset, lut, bits, group_size, input.shape[-1])
    y = torch.empty((*input.shape[:-1], w.rows), dtype=input.dtype, device=input.device)
    if y.numel() == 0:
        return y
    x, bias = _rows(input), None if bias is None else bias.contiguous()
    if activations == "exact":
        _product(x, w, bias, y)
    else:
        _product_of_bytes(x, w, bias, y)
    return y


def _product_of_bytes(x: Tensor, w: Weight, bias: Tensor | None, y: Tensor) -> None:
    samples = x.shape[0]
    tile: dict[str, Any] = dict(configs.tile("qlinear_bytes", x.device, samples=samples, columns=w.columns))
    block = bytes_block(w.columns, w.bits, w.group, tile["BLOCK_K"])
    p, a, totals = _bytes(x, block or 32)
    if not block:
        found = (p.float() @ decoded(w, torch.float32).t()) * a[:, None]
        y.copy_((found if bias is None else found + bias.float()).view(y.shape))
        return
    tile |= {"BLOCK_K": block, **w.tables}
    over_rows, over_samples = triton.cdiv(w.rows, tile["BLOCK_N"]), triton.cdiv(samples, tile["BLOCK_M"])
    splits, part = share(w.columns, block, over_rows * over_samples)
    with torch.cuda.device_of(x):
        to = _target(y, splits)
        qlinear_bytes_kernel[(over_rows, over_samples, splits)](
            p, totals, *w.pointers, bias, a, to, samples, w.rows, w.columns, totals.shape[1], *w.sizes, part, BITS=w.bits,
            WHOLE=w.group == w.columns, **tile,
        )  # fmt: skip
        sum_splits(to, y)


def _input_gradient(grad: Tensor, w: Weight, low: Tensor | None = None, lora_a: Tensor | None = None) -> Tensor:
    dx = torch.empty((*grad.shape[:-1], w.columns), dtype=grad.dtype, device=grad.device)
    if dx.numel() == 0:
        return dx
    dy = _rows(grad)
    samples = dy.shape[0]
    kernel, _ = way(samples, w.columns, w.bits, w.group, grad.element_size())
    if kernel == "library":
        out = dx.view(samples, w.columns)
        torch.mm(dy, decoded(w, dy.dtype), out=out)
        if low is not None and lora_a is not None:
            out.addmm_(low.to(dy.dtype), lora_a.to(dy.dtype))
        return dx
    sizes = {"samples": samples, "columns": w.columns, "element_size": grad.element_size()}
    tile: dict[str, Any] = dict(configs.tile("qlinear_backward", grad.device, **sizes))
    tile |= w.block(tile["BLOCK_K"]) | w.tables
    over_columns, over_samples = triton.cdiv(w.columns, tile["BLOCK_K"]), triton.cdiv(samples, tile["BLOCK_M"])
    splits, part = share(w.rows, tile["BLOCK_N"], over_columns * over_samples)
    rank = 0 if low is None else low.shape[-1]
    with torch.cuda.device_of(grad):
        to = _target(dx, splits)
        input_gradient_kernel[(over_columns, over_samples, splits)](
            dy, *w.pointers, low, lora_a, to, samples, w.rows, w.columns, rank, *w.sizes, part, BITS=w.bits, **tile
        )
        sum_splits(to, dx)
    return dx


def qlinear_backward_plan(*args: Any) -> str:
    """What :func:`qlinear_backward` does with these arguments for the gradient of the input."""
    grad, bits, group, columns = args[0], *args[7:10]
    kernel, why = way(_samples(grad), columns, bits, group, grad.element_size())
    return _plan("tiles" if kernel == "vectors" else kernel, why)


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
        p, a, _ = _bytes(_rows(input), 32)
        x = p.float() * a[:, None]
    dense = _rows(grad).float().t() @ x
    parts = (scale, zero, offset, lut)
    found = torch.ops.cofire.dequantize_backward(dense, codes, *parts, bits, group_size)
    to_scale, to_zero, to_offset, to_lut = (
        f if p is not None and p.is_floating_point() else grad.new_empty((0,))
        for f, p in zip(found, parts, strict=True)
    )
    return dx, to_scale, to_zero, to_offset, to_lut


def qlora_linear_plan(*args: Any) -> str:
    """What :func:`qlora_linear` does with these arguments."""
    input, bits, group = args[0], *args[10:12]
    return _plan(*way(_samples(input), input.shape[-1], bits, group, input.element_size()))


def qlora_linear(
    input: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, alpha: float, bits: int, group_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    w = weight_of(codes, scale, zero, offset, lut, bits, group_size, input.shape[-1])
    y = torch.empty((*input.shape[:-1], w.rows), dtype=input.dtype, device=input.device)
    x = _rows(input)
    low = F.linear(x, lora_a.to(x.dtype)).view(*input.shape[:-1], lora_a.shape[0])
    if y.numel():
        _product(x, w, None if bias is None else bias.contiguous(), y, _rows(low), lora_b.contiguous(), alpha)
    return y, low


def qlora_linear_backward_plan(*args: Any) -> str:
    """What :func:`qlora_linear_backward` does with these arguments for the gradient of the input."""
    grad, lora_a, bits, group = args[0], args[9], *args[12:14]
    kernel, why = way(_samples(grad), lora_a.shape[1], bits, group, grad.element_size())
    return _plan("tiles" if kernel == "vectors" else kernel, why)


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
