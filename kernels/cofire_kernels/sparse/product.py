# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Products with compressed weights.

Blocks of at least 16 x 16 are tiles of the tensor cores: what is pruned is neither loaded nor multiplied, forward and
backward. Any other weight is decoded once, for the library's product (see :mod:`cofire_kernels.sparse.decode`); few
rows with a bitmap have a kernel in CUDA C++ besides (:mod:`cofire_kernels.sparse.product_cuda`).

The blocks of a row (or, for the gradient of the input, of a column) are summed in their order, in parts that do not
depend on the device: the same bits on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.lowbit.product import PROGRAMS, _rows, _target, share, sum_splits
from cofire_kernels.numerics import dot
from cofire_kernels.sparse.decode import dense, rows_of_entries

SMALLEST_BLOCK = 16  # rows and columns: what tensor cores multiply


# ------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def block_product_kernel(
    x_ptr, values_ptr, other_ptr, order_ptr, offsets_ptr, scale_ptr, bias_ptr, y_ptr,
    m_rows, features_in, features_out, size_in, size_out, stride_in, stride_out,
    TILES: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y = x V`` for one strip of blocks that share their outputs: a row of blocks, or a column (``order`` given).

    Block ``e`` multiplies ``size_in`` features of x from ``other[e] * size_in`` on. TILES tiles make a block's outputs,
    PARTS tiles its inputs.
    """
    strip = tl.program_id(0) // TILES
    o = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    first = tl.load(offsets_ptr + strip).to(tl.int32)
    count = tl.load(offsets_ptr + strip + 1).to(tl.int32) - first
    begin = first + count * split // tl.num_programs(2)
    end = first + count * (split + 1) // tl.num_programs(2)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(begin * PARTS, end * PARTS):
        e = step // PARTS
        if order_ptr is not None:
            e = tl.load(order_ptr + e)
        i = step % PARTS * BLOCK_K + tl.arange(0, BLOCK_K)
        feature = tl.load(other_ptr + e) * size_in + i
        inside = (m < m_rows)[:, None] & ((i < size_in) & (feature < features_in))[None, :]
        x = tl.load(x_ptr + m[:, None] * features_in + feature[None, :], mask=inside, other=0)
        place = e.to(tl.int64) * size_in * size_out + i[:, None] * stride_in + o[None, :] * stride_out
        v = tl.load(values_ptr + place, mask=(i < size_in)[:, None] & (o < size_out)[None, :], other=0)
        if v.dtype != x.dtype:  # int8, by way of fp32: the interpreter holds bf16 as integers
            v = v.to(tl.float32)
        acc = dot(x, v.to(x.dtype), acc)
    n = strip.to(tl.int64) * size_out + o
    inside = (o < size_out) & (n < features_out)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + n, mask=inside, other=0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=inside & (split == 0), other=0).to(tl.float32)[None, :]
    to = y_ptr + (split.to(tl.int64) * m_rows + m)[:, None] * features_out + n[None, :]
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=(m < m_rows)[:, None] & inside[None, :])


@triton.jit
def block_gradient_kernel(
    dy_ptr, x_ptr, row_ptr, index_ptr, dv_ptr, m_rows, rows, columns, entries, size_row, size_column, part,
    TILES: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dv = x^T dy`` of a tile of one block, over ``part`` tiles of samples. PARTS tiles of columns, TILES of rows."""
    e = tl.program_id(0) // (TILES * PARTS)
    r = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) // TILES % PARTS * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.load(row_ptr + e) * size_row + r
    k = tl.load(index_ptr + e) * size_column + c
    split = tl.program_id(1)
    first = split * part
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for tile in range(first, tl.minimum(first + part, tl.cdiv(m_rows, BLOCK_M))):
        m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (m < m_rows)[:, None] & ((r < size_row) & (n < rows))[None, :]
        dy = tl.load(dy_ptr + m[:, None] * rows + n[None, :], mask=inside, other=0)
        inside = (m < m_rows)[:, None] & ((c < size_column) & (k < columns))[None, :]
        x = tl.load(x_ptr + m[:, None] * columns + k[None, :], mask=inside, other=0)
        acc = dot(tl.trans(x), dy, acc)
    place = (split.to(tl.int64) * entries + e) * size_column * size_row + c[:, None] * size_row + r[None, :]
    tl.store(dv_ptr + place, acc.to(dv_ptr.dtype.element_ty), mask=(c < size_column)[:, None] & (r < size_row)[None, :])


# ------------------------------------------------------------------------------------------------------ launching


def _tile(kernel: str, x: Tensor, samples: int, outputs: int, inputs: int) -> dict[str, int]:
    """The tile for blocks of so many outputs and inputs: no wider than they are."""
    sizes = {"samples": samples, "block": min(outputs, inputs), "element_size": x.element_size()}
    tile: dict[str, int] = dict(configs.tile(kernel, x.device, **sizes))
    tile["BLOCK_N"] = min(tile["BLOCK_N"], triton.next_power_of_2(outputs))
    tile["BLOCK_K"] = min(tile["BLOCK_K"], triton.next_power_of_2(inputs))
    return tile | {"TILES": triton.cdiv(outputs, tile["BLOCK_N"]), "PARTS": triton.cdiv(inputs, tile["BLOCK_K"])}


def _block_product(
    x: Tensor, values: Tensor, other: Tensor, order: Tensor | None, offsets: Tensor, scale: Tensor | None,
    bias: Tensor | None, y: Tensor, sizes: tuple[int, int], strides: tuple[int, int],
) -> None:  # fmt: skip
    """``y [M, out]`` of ``x [M, in]``; ``sizes`` and ``strides``: of a block's inputs and outputs."""
    samples, strips = x.shape[0], offsets.shape[0] - 1
    tile = _tile("spmm_block", x, samples, sizes[1], sizes[0])
    over_samples = triton.cdiv(samples, tile["BLOCK_M"])
    programs = strips * tile["TILES"] * over_samples
    steps = triton.cdiv(other.shape[0], strips) * tile["PARTS"]  # of a strip, on average
    splits = max(1, min(steps // 4, PROGRAMS // programs))
    with torch.cuda.device_of(x):
        to = _target(y, splits)
        block_product_kernel[(strips * tile["TILES"], over_samples, splits)](
            x, values, other, order, offsets, scale, bias, to, samples, x.shape[1], y.shape[1], *sizes, *strides, **tile
        )
        sum_splits(to, y)


def _common(input: Tensor, values: Tensor) -> torch.dtype:
    """What both are multiplied in. int8 is exact in every float type."""
    return torch.promote_types(input.dtype, values.dtype) if values.is_floating_point() else input.dtype


def refused(format: str, block_rows: int, block_columns: int, dtype: torch.dtype) -> str:
    """Why the weight is decoded for the library's product; empty where its blocks are multiplied as they are."""
    if format != "block":
        return f"tensor cores multiply dense tiles faster than any kernel the single weights of {format}"
    if min(block_rows, block_columns) < SMALLEST_BLOCK:
        return f"blocks of {block_rows} x {block_columns} are smaller than a tile of the tensor cores"
    if dtype == torch.float64:
        return "products in fp64"
    return ""


def _plan(why: str) -> str:
    return f"decodes the weight, then the library's product: {why}" if why else "multiplies the kept blocks"


def spmm_plan(*args: Any) -> str:
    """What :func:`spmm` does with these arguments."""
    return _plan(refused(args[6], args[9], args[10], _common(args[0], args[2])))


def spmm(
    input: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None,
    format: str, rows: int, columns: int, block_rows: int, block_columns: int,
) -> Tensor:  # fmt: skip
    common = _common(input, values)
    x = _rows(input).to(common)
    if refused(format, block_rows, block_columns, common) or x.shape[0] * rows == 0 or index.shape[0] == 0:
        w = dense(values, index, offsets, format, rows, columns, block_rows, block_columns, common)
        if scale is None and (bias is None or bias.dtype == common):
            y = F.linear(x, w, bias)
        else:  # in fp32 as the reference, so that the result is rounded once more at most
            y = F.linear(x, w).to(torch.promote_types(common, torch.float32))
            y = y if scale is None else y * scale
            y = y if bias is None else y + bias
        return y.to(input.dtype).view(*input.shape[:-1], rows)
    y = torch.empty((*input.shape[:-1], rows), dtype=input.dtype, device=input.device)
    values = values.contiguous() if scale is not None else values.to(common).contiguous()
    scale, bias = (None if t is None else t.contiguous() for t in (scale, bias))
    _block_product(
        x, values, index.contiguous(), None, offsets.contiguous(), scale, bias, y.view(-1, rows),
        (block_columns, block_rows), (block_rows, 1),
    )  # fmt: skip
    return y


def spmm_backward_plan(*args: Any) -> str:
    """What :func:`spmm_backward` does with these arguments."""
    return _plan(refused(args[6], args[9], args[10], _common(args[0], args[2])))


def spmm_backward(
    grad: Tensor, input: Tensor, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None,
    format: str, rows: int, columns: int, block_rows: int, block_columns: int, to_input: bool, to_values: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx, dv = grad.new_empty((0,)), grad.new_empty((0,))
    if to_input:
        dx = _input_gradient(
            _rows(grad), values, index, offsets, scale, format, rows, columns, block_rows, block_columns
        ).view(*grad.shape[:-1], columns)
    if to_values:
        dv = _sampled(grad, input, index, offsets, format, block_rows, block_columns, values.dtype)
    return dx, dv


def _input_gradient(
    dy: Tensor, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None, format: str, rows: int,
    columns: int, block_rows: int, block_columns: int,
) -> Tensor:  # fmt: skip
    common = _common(dy, values)
    wide = dy.to(common)
    if scale is not None:
        wide = (dy.float() * scale).to(common)
    if refused(format, block_rows, block_columns, common) or dy.shape[0] * columns == 0 or index.shape[0] == 0:
        w = dense(values, index, offsets, format, rows, columns, block_rows, block_columns, common)
        return (wide @ w).to(dy.dtype)
    dx = torch.empty((dy.shape[0], columns), dtype=dy.dtype, device=dy.device)
    order = index.argsort(stable=True)  # by column of blocks, then by row
    strips = torch.arange(-(-columns // block_columns) + 1, dtype=index.dtype, device=index.device)
    starts = torch.searchsorted(index[order], strips)
    row = rows_of_entries(index, offsets.contiguous()).to(torch.int32)
    values = values.contiguous() if scale is not None else values.to(common).contiguous()
    _block_product(
        wide.contiguous(), values, row, order.to(torch.int32), starts, None, None, dx, (block_rows, block_columns),
        (1, block_rows),
    )  # fmt: skip
    return dx


def sddmm_plan(*args: Any) -> str:
    """What :func:`sddmm` does with these arguments."""
    format, block_rows, block_columns = args[4:7]
    why = refused(format, block_rows, block_columns, args[0].dtype)
    return f"the library's dense product, of which the kept places are read: {why}" if why else _plan("")


def sddmm(
    grad: Tensor, input: Tensor, index: Tensor, offsets: Tensor, format: str, block_rows: int, block_columns: int
) -> Tensor:  # fmt: skip
    return _sampled(grad, input, index, offsets, format, block_rows, block_columns, torch.float32)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in fp32 (fp64)."""
    if a.is_cuda and a.element_size() == 2:
        narrow: Tensor = torch.mm(a, b, out_dtype=torch.float32)
        return narrow
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


def _sampled(
    grad: Tensor, input: Tensor, index: Tensor, offsets: Tensor, format: str, block_rows: int, block_columns: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    dy, x = _rows(grad), _rows(input)
    samples, rows, columns, entries = dy.shape[0], dy.shape[1], x.shape[1], index.shape[0]
    row = rows_of_entries(index, offsets.contiguous())
    if refused(format, block_rows, block_columns, dy.dtype) or samples * entries == 0:
        whole = _wide_product(dy.t(), x)
        if format == "csr":
            return whole[row, index.long()].to(dtype)
        grid = (offsets.shape[0] - 1, -(-columns // block_columns))
        margin = (0, grid[1] * block_columns - columns, 0, grid[0] * block_rows - rows)
        tiles = F.pad(whole, margin).view(grid[0], block_rows, grid[1], block_columns).permute(0, 2, 3, 1)
        return tiles[row, index.long()].to(dtype).contiguous()
    dv = torch.empty((entries, block_columns, block_rows), dtype=dtype, device=dy.device)
    tile = _tile("sddmm_block", dy, samples, block_rows, block_columns)
    programs = entries * tile["TILES"] * tile["PARTS"]
    splits, part = share(samples, tile["BLOCK_M"], programs)
    with torch.cuda.device_of(dy):
        to = _target(dv, splits)
        block_gradient_kernel[(programs, splits)](
            dy, x, row.to(torch.int32), index.contiguous(), to, samples, rows, columns, entries, block_rows,
            block_columns, part, **tile,
        )  # fmt: skip
        sum_splits(to, dv)
    return dv
