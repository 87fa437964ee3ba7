# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Products of two experts with the rows that each has been given, read and written where they are.

How many tiles of rows an expert has is known on the device alone. Programs are launched for the most that there can be,
one more than the tokens fill; each finds its expert and its rows from the counts, and the last ones may find none.

What a weight of powers of two saves is bytes, and with thousands of tokens for one layer's weights these are few: the
shift expert goes through the tensor cores like the dense one, in whose 16-bit types powers of two are exact.

A token is in one list, so that no row is written twice; sums of several programs are added in a fixed order: the same
bits on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.lowbit.product import share, sum_splits
from cofire_kernels.numerics import dot


@triton.jit
def listed(index_ptr, count_ptr, expert, tokens, slot):
    """The tokens (int64) in the slots of an expert's list, and which slots hold one."""
    count = tl.minimum(tl.load(count_ptr + expert), tokens)
    token = tl.load(index_ptr + expert.to(tl.int64) * tokens + slot, mask=slot < count, other=-1).to(tl.int64)
    return token, (token >= 0) & (token < tokens)


@triton.jit
def tile_of(count_ptr, tile, BLOCK_M: tl.constexpr):
    """The expert of a tile of rows, its first slot, and whether the tile has any token."""
    tiles = tl.cdiv(tl.load(count_ptr), BLOCK_M)
    expert = (tile >= tiles).to(tl.int32)
    first = (tile - expert * tiles) * BLOCK_M
    return expert, first, first < tl.load(count_ptr + expert)


@triton.jit
def load_rows(ptr, token, inside, size, column):
    """The given columns of gathered rows of ``size`` values; 0 outside."""
    return tl.load(
        ptr + token[:, None] * size + column[None, :], mask=inside[:, None] & (column < size)[None, :], other=0
    )


@triton.jit
def load_bias(dense_ptr, shift_ptr, expert, n, inside):
    """The expert's bias in fp32; either may be missing."""
    bias = tl.zeros(n.shape, tl.float32)
    if dense_ptr is not None:
        bias += tl.load(dense_ptr + n, mask=inside & (expert == 0), other=0).to(tl.float32)
    if shift_ptr is not None:
        bias += tl.load(shift_ptr + n, mask=inside & (expert == 1), other=0).to(tl.float32)
    return bias


@triton.jit
def moe2_linear_forward_kernel(
    x_ptr, dense_ptr, shift_ptr, dense_bias_ptr, shift_bias_ptr, gate_ptr, index_ptr, count_ptr, y_ptr,
    tokens, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y = gate (x W^T + bias)`` of one expert's tile of rows."""
    expert, first, any_token = tile_of(count_ptr, tl.program_id(1), BLOCK_M)
    if not any_token:
        return
    token, listed_ = listed(index_ptr, count_ptr, expert, tokens, first + tl.arange(0, BLOCK_M))
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_ptr = tl.where(expert == 0, dense_ptr, shift_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, token, listed_, columns, k)
        inside = (k < columns)[:, None] & (n < rows)[None, :]
        w = tl.load(w_ptr + n[None, :].to(tl.int64) * columns + k[:, None], mask=inside, other=0)
        acc = dot(x, w, acc)
    acc += load_bias(dense_bias_ptr, shift_bias_ptr, expert, n, n < rows)[None, :]
    acc *= tl.load(gate_ptr + token, mask=listed_, other=0).to(tl.float32)[:, None]
    to = y_ptr + token[:, None] * rows + n[None, :]
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=listed_[:, None] & (n < rows)[None, :])


@triton.jit
def moe2_linear_input_gradient_kernel(
    dy_ptr, x_ptr, dense_ptr, shift_ptr, dense_bias_ptr, shift_bias_ptr, gate_ptr, index_ptr, count_ptr, dx_ptr,
    dgate_ptr, tokens, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With ``u = dy W``: ``dx = gate u``, and of ``dgate = <u, x> + <dy, bias>`` what these columns give."""
    expert, first, any_token = tile_of(count_ptr, tl.program_id(1), BLOCK_M)
    if not any_token:
        return
    token, listed_ = listed(index_ptr, count_ptr, expert, tokens, first + tl.arange(0, BLOCK_M))
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    w_ptr = tl.where(expert == 0, dense_ptr, shift_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, rows, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        dy = load_rows(dy_ptr, token, listed_, rows, n)
        inside = (n < rows)[:, None] & (k < columns)[None, :]
        w = tl.load(w_ptr + n[:, None].to(tl.int64) * columns + k[None, :], mask=inside, other=0)
        acc = dot(dy, w, acc)
    place = token[:, None] * columns + k[None, :]
    inside = listed_[:, None] & (k < columns)[None, :]
    gate = tl.load(gate_ptr + token, mask=listed_, other=0).to(tl.float32)
    tl.store(dx_ptr + place, (acc * gate[:, None]).to(dx_ptr.dtype.element_ty), mask=inside)
    dgate = tl.sum(acc * load_rows(x_ptr, token, listed_, columns, k).to(tl.float32), 1)
    if (dense_bias_ptr is not None) or (shift_bias_ptr is not None):
        for start in range(0, tl.where(tl.program_id(0) == 0, rows, 0), BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            dy = load_rows(dy_ptr, token, listed_, rows, n).to(tl.float32)
            dgate += tl.sum(dy * load_bias(dense_bias_ptr, shift_bias_ptr, expert, n, n < rows)[None, :], 1)
    to = dgate_ptr + tl.program_id(0).to(tl.int64) * tokens + token
    tl.store(to, dgate.to(dgate_ptr.dtype.element_ty), mask=listed_)


@triton.jit
def moe2_linear_weight_gradient_kernel(
    dy_ptr, x_ptr, gate_ptr, index_ptr, count_ptr, dense_ptr, shift_ptr, dense_bias_ptr, shift_bias_ptr,
    tokens, rows, columns, splits, stride_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dW = (gate dy)^T x`` and ``dbias = sum gate dy`` of an expert, over its share of the expert's tiles of rows."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    expert = tl.program_id(2) % 2
    split = tl.program_id(2) // 2
    tiles = tl.cdiv(tl.minimum(tl.load(count_ptr + expert), tokens), BLOCK_M)
    each = tl.cdiv(tiles, splits)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(split * each, tl.minimum(split * each + each, tiles)):
        token, listed_ = listed(index_ptr, count_ptr, expert, tokens, tile * BLOCK_M + tl.arange(0, BLOCK_M))
        gate = tl.load(gate_ptr + token, mask=listed_, other=0).to(tl.float32)
        dy = load_rows(dy_ptr, token, listed_, rows, n)
        scaled = dy.to(tl.float32) * gate[:, None]
        sums += tl.sum(scaled, 0)
        x = load_rows(x_ptr, token, listed_, columns, k)
        acc = dot(tl.trans(scaled.to(dy.dtype)), x, acc)
    skipped = split.to(tl.int64) * stride_split
    to = tl.where(expert == 0, dense_ptr, shift_ptr) + skipped + n[:, None].to(tl.int64) * columns + k[None, :]
    tl.store(to, acc.to(dense_ptr.dtype.element_ty), mask=(n < rows)[:, None] & (k < columns)[None, :])
    to = tl.where(expert == 0, dense_bias_ptr, shift_bias_ptr) + skipped + n
    tl.store(to, sums.to(dense_bias_ptr.dtype.element_ty), mask=(n < rows) & (tl.program_id(0) == 0))


@triton.jit
def moe2_linear_sums_kernel(
    parts_ptr, dense_ptr, shift_ptr, dense_bias_ptr, shift_bias_ptr, weights, rows, splits, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradients of both experts' weights and biases, side by side in each part, from all parts in their order."""
    expert = tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    elements = weights + rows
    parts_ptr += expert.to(tl.int64) * elements
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        acc += tl.load(parts_ptr + place, mask=place < elements, other=0)
        parts_ptr += elements  # of this expert
        parts_ptr += elements  # of the other
    found = acc.to(dense_ptr.dtype.element_ty)
    tl.store(tl.where(expert == 0, dense_ptr, shift_ptr) + place, found, mask=place < weights)
    of_bias = (place >= weights) & (place < elements)
    tl.store(tl.where(expert == 0, dense_bias_ptr, shift_bias_ptr) + (place - weights), found, mask=of_bias)


def _tile(name: str, x: Tensor, rows: int) -> dict[str, Any]:
    return configs.tile(name, x.device, tokens=x.shape[0], features=rows, element_size=x.element_size())


def _tiles(tokens: int, block: int) -> int:
    """The most tiles that two lists of so many tokens can have."""
    return int(triton.cdiv(tokens, block)) + 1


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def moe2_linear(
    x: Tensor, dense_weight: Tensor, shift_weight: Tensor, dense_bias: Tensor | None, shift_bias: Tensor | None,
    gate: Tensor, index: Tensor, count: Tensor,
) -> Tensor:  # fmt: skip
    (tokens, columns), rows = x.shape, dense_weight.shape[0]
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if y.numel():
        tile = _tile("moe2_linear", x, rows)
        args = _contiguous(x, dense_weight, shift_weight, dense_bias, shift_bias, gate, index, count)
        with torch.cuda.device_of(x):
            moe2_linear_forward_kernel[(triton.cdiv(rows, tile["BLOCK_N"]), _tiles(tokens, tile["BLOCK_M"]))](
                *args, y, tokens, rows, columns, **tile
            )
    return y


def moe2_linear_backward(
    grad: Tensor, x: Tensor, dense_weight: Tensor, shift_weight: Tensor, dense_bias: Tensor | None,
    shift_bias: Tensor | None, gate: Tensor, index: Tensor, count: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (tokens, columns), rows = x.shape, dense_weight.shape[0]

    def empty(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    dx, dgate = empty(tokens, columns), empty(tokens)
    found = (empty(rows, columns), empty(rows, columns), empty(rows), empty(rows))
    if tokens == 0:
        return (dx, *(f.zero_() for f in found), dgate)  # type: ignore[return-value]
    args = _contiguous(grad, x, dense_weight, shift_weight, dense_bias, shift_bias, gate, index, count)
    dy, x_, *_, gate_, index_, count_ = args
    with torch.cuda.device_of(x):
        tile = _tile("moe2_input_gradient", x, rows)
        blocks = max(triton.cdiv(columns, tile["BLOCK_K"]), 1)  # without columns one, for the bias's part of dgate
        to_gate = dgate if blocks == 1 else empty(blocks, tokens, dtype=torch.float32)
        moe2_linear_input_gradient_kernel[(blocks, _tiles(tokens, tile["BLOCK_M"]))](
            *args, dx, to_gate, tokens, rows, columns, **tile
        )
        sum_splits(to_gate, dgate)

        tile = _tile("moe2_weight_gradient", x, rows)
        blocks, over_rows = max(triton.cdiv(columns, tile["BLOCK_K"]), 1), triton.cdiv(rows, tile["BLOCK_N"])
        splits, _ = share(triton.cdiv(tokens, 2), tile["BLOCK_M"], 2 * blocks * over_rows)
        weights, elements = rows * columns, rows * columns + rows
        parts = empty(splits, 2 * elements, dtype=torch.float32) if splits > 1 else None
        to = found
        if parts is not None:
            dense, shift = parts[0, :elements], parts[0, elements:]
            to = (dense, shift, dense[weights:], shift[weights:])
        if rows:
            moe2_linear_weight_gradient_kernel[(blocks, over_rows, 2 * splits)](
                dy, x_, gate_, index_, count_, *to, tokens, rows, columns, splits, 2 * elements, **tile
            )
        if parts is not None and rows:
            tile = configs.tile("sum_splits", x.device, elements=elements)
            moe2_linear_sums_kernel[(triton.cdiv(elements, tile["BLOCK"]), 2)](
                parts, *found, weights, rows, splits, **tile
            )
    return dx, *found, dgate
