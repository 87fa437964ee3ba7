# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Softmax attention that says how much attention each key got, forward and backward.

Heads of queries that share a head of keys stand one after the other in memory, so that they are one matrix of
``group * queries`` rows: a tile may hold rows of several heads, and decoding with one query reads its keys once.

Sums over keys are those of a program that holds queries, sums over queries those of one that holds keys: products are
computed again rather than added up by several programs, so every run gives the same bits. ``BLOCK_M`` is the tile that a
program holds, of queries or of keys, ``BLOCK_N`` the one with which it goes over the others.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.kv_fusion.gather import dense_rows
from cofire_kernels.numerics import INTERPRETED, dot

#: The most features of a head that one program holds, and as many as fill the tiles of the configuration.
MOST_FEATURES, FEATURES = 256, 128
#: The interpreter, which takes as long for a small tile as for a large one, works on tiles larger by this factor.
INTERPRETED_LARGER = 4


@triton.jit
def seen_by(row, queries, keys, causal):
    """How many keys, from the first on, the query of a row sees: with ``causal`` 1, all but those of later queries."""
    return keys - causal * (queries - 1 - row % queries)


@triton.jit
def load_tile(ptr, row, inside, stride, d, width):
    """Rows of ``width`` values, ``[rows, features]``; zeros outside."""
    place = row[:, None].to(tl.int64) * stride + d[None, :]
    return tl.load(ptr + place, mask=inside[:, None] & (d < width)[None, :], other=0)


@triton.jit
def attention_forward_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, most_ptr, total_ptr,
    rows, queries, keys, width, heads, tiles, causal, scale,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One pass over the keys. Of each row also the largest score and the sum of exponentials relative to it.

    Two numbers: in their logarithm together large scores would drown the sum, and weights would not add up to one.
    """
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    key_ptr += head // heads * stride_kb + head % heads * stride_kh
    value_ptr += head // heads * stride_vb + head % heads * stride_vh
    q = load_tile(query_ptr + head * rows * width, row, row < rows, width, d, width)
    seen = seen_by(row, queries, keys, causal)
    most = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, tl.max(seen, 0), BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = load_tile(key_ptr, j, j < keys, stride_ks, d, width)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        scores = tl.where(j[None, :] < seen[:, None], scores, -float("inf"))
        now = tl.maximum(most, tl.max(scores, 1))  # every row sees the first key
        by = tl.exp(most - now)
        weights = tl.exp(scores - now[:, None])
        total = total * by + tl.sum(weights, 1)
        v = load_tile(value_ptr, j, j < keys, stride_vs, d, width)
        acc = dot(weights.to(v.dtype), v, acc * by[:, None])
        most = now
    place = head * rows + row
    found = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place[:, None] * width + d[None, :], found, mask=(row < rows)[:, None] & (d < width)[None, :])
    tl.store(lse_ptr + place, most + tl.log(total), mask=row < rows)
    tl.store(most_ptr + place, most, mask=row < rows)
    tl.store(total_ptr + place, total, mask=row < rows)


@triton.jit
def rows_from(start, first, groups, queries, BLOCK_N: tl.constexpr):
    """A tile of the rows of all groups whose queries are not before ``first``, and which of them there are."""
    each = queries - first
    place = start + tl.arange(0, BLOCK_N)
    return place // each * queries + first + place % each, place < groups * each


@triton.jit
def attention_scores_kernel(
    query_ptr, key_ptr, most_ptr, total_ptr, scores_ptr,
    rows, queries, keys, width, heads, tiles, causal, scale, first, normalize, stride_kb, stride_kh, stride_ks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of the weights of a tile of keys, over the queries from ``first`` on that see one of them."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    begin = (tl.program_id(0) % tiles) * BLOCK_M
    j = begin + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    key_ptr += head // heads * stride_kb + head % heads * stride_kh
    k = load_tile(key_ptr, j, j < keys, stride_ks, d, width)
    groups = rows // queries
    from_ = tl.maximum(first, causal * (begin - (keys - queries)))
    acc = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, groups * (queries - from_), BLOCK_N):
        row, inside = rows_from(start, from_, groups, queries, BLOCK_N)
        q = load_tile(query_ptr + head * rows * width, row, inside, width, d, width)
        most = tl.load(most_ptr + head * rows + row, mask=inside, other=0)
        total = tl.load(total_ptr + head * rows + row, mask=inside, other=1)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_N, BLOCK_M], tl.float32)) * scale
        weights = tl.exp(scores - most[:, None]) / total[:, None]
        seen = inside[:, None] & (j[None, :] < seen_by(row, queries, keys, causal)[:, None])
        acc += tl.sum(tl.where(seen, weights, 0.0), 0)
    by = groups * (queries - tl.maximum(first, causal * (j - (keys - queries))))
    acc /= tl.where(normalize != 0, tl.maximum(by, 1), 1).to(tl.float32)
    tl.store(scores_ptr + head * keys + j, acc, mask=j < keys)


@triton.jit
def own_of(row, queries, keys):
    """The key of a query's own token."""
    return keys - queries + row % queries


@triton.jit
def gates_of(mask_ptr, own, j, keys):
    """What multiplies the exponentials: a key's mask, or 1 for a query's own token."""
    gate = tl.load(mask_ptr + j, mask=j < keys, other=0).to(tl.float32)
    return tl.where(own == j, 1.0, gate)


@triton.jit
def leaks_to(seen, j, keys, parity):
    """Which keys get a part of eps: all that a query sees, or with ``parity`` every one."""
    return (j < seen) | ((parity != 0) & (j < keys))


@triton.jit
def attention_query_gradient_kernel(
    grad_ptr, grad_lse_ptr, query_ptr, key_ptr, value_ptr, mask_ptr, to_query_ptr, most_ptr, total_ptr, along_ptr,
    rows, queries, keys, width, heads, tiles, causal, scale, eps, parity,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Two passes over the keys: what a row's gradients have in common, and then the gradient of its query.

    ``along``, the mean of the weights' gradients, is that of weights in fp32: it cancels where it has to. With a mask,
    see :mod:`cofire_kernels.kv_fusion.masked`.
    """
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    key_ptr += head // heads * stride_kb + head % heads * stride_kh
    value_ptr += head // heads * stride_vb + head % heads * stride_vh
    q = load_tile(query_ptr + head * rows * width, row, row < rows, width, d, width)
    grad = load_tile(grad_ptr + head * rows * width, row, row < rows, width, d, width)
    seen = seen_by(row, queries, keys, causal)
    end = tl.max(seen, 0)
    if mask_ptr is not None:
        mask_ptr += head // heads * keys
        end = tl.where(parity != 0, keys, end)
    most = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    total = tl.zeros([BLOCK_M], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)
    leaked = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = load_tile(key_ptr, j, j < keys, stride_ks, d, width)
        v = load_tile(value_ptr, j, j < keys, stride_vs, d, width)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        scores = tl.where(j[None, :] < seen[:, None], scores, -float("inf"))
        to_weights = dot(grad, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        now = tl.maximum(most, tl.max(scores, 1))
        by = tl.exp(most - now)
        weights = tl.exp(scores - now[:, None])
        if mask_ptr is not None:
            weights *= gates_of(mask_ptr, own_of(row, queries, keys)[:, None], j[None, :], keys)
            leaks = leaks_to(seen[:, None], j[None, :], keys, parity)
            leaked += tl.sum(tl.where(leaks, to_weights, 0.0), 1)
        total = total * by + tl.sum(weights, 1)
        along = along * by + tl.sum(weights * to_weights, 1)
        most = now
    along = tl.where(total > 0, along / total, 0.0)
    if mask_ptr is not None:
        total += eps
        along += (leaked / keys - along) * (eps / total)  # so that of equal gradients it is exactly one of them
    place = head * rows + row
    if grad_lse_ptr is not None:
        along -= tl.load(grad_lse_ptr + place, mask=row < rows, other=0).to(tl.float32)
    tl.store(most_ptr + place, most, mask=row < rows)
    tl.store(total_ptr + place, total, mask=row < rows)
    tl.store(along_ptr + place, along, mask=row < rows)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, tl.max(seen, 0), BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = load_tile(key_ptr, j, j < keys, stride_ks, d, width)
        v = load_tile(value_ptr, j, j < keys, stride_vs, d, width)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        to_weights = dot(grad, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        weights = tl.exp(scores - most[:, None]) / total[:, None]
        if mask_ptr is not None:
            weights *= gates_of(mask_ptr, own_of(row, queries, keys)[:, None], j[None, :], keys)
        to_scores = tl.where(j[None, :] < seen[:, None], weights * (to_weights - along[:, None]), 0.0)
        acc = dot(to_scores.to(k.dtype), k, acc)
    to = to_query_ptr + place[:, None] * width + d[None, :]
    found = (acc * scale).to(to_query_ptr.dtype.element_ty)
    tl.store(to, found, mask=(row < rows)[:, None] & (d < width)[None, :])


@triton.jit
def attention_key_gradient_kernel(
    grad_ptr, query_ptr, key_ptr, value_ptr, mask_ptr, most_ptr, total_ptr, along_ptr,
    to_key_ptr, to_value_ptr, to_mask_ptr, rows, queries, keys, width, heads, tiles, causal, scale, eps, parity,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and their values, from all queries of the group that see one of them."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    begin = (tl.program_id(0) % tiles) * BLOCK_M
    j = begin + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    key_ptr += head // heads * stride_kb + head % heads * stride_kh
    value_ptr += head // heads * stride_vb + head % heads * stride_vh
    k = load_tile(key_ptr, j, j < keys, stride_ks, d, width)
    v = load_tile(value_ptr, j, j < keys, stride_vs, d, width)
    groups = rows // queries
    first = tl.maximum(0, causal * (begin - (keys - queries)))
    if mask_ptr is not None:
        mask_ptr += head // heads * keys
        first = tl.where(parity != 0, 0, first)
    to_key = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    to_value = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    to_mask = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, groups * (queries - first), BLOCK_N):
        row, inside = rows_from(start, first, groups, queries, BLOCK_N)
        q = load_tile(query_ptr + head * rows * width, row, inside, width, d, width)
        grad = load_tile(grad_ptr + head * rows * width, row, inside, width, d, width)
        most = tl.load(most_ptr + head * rows + row, mask=inside, other=0)
        total = tl.load(total_ptr + head * rows + row, mask=inside, other=1)
        along = tl.load(along_ptr + head * rows + row, mask=inside, other=0)
        scores = dot(k, tl.trans(q), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        seen = seen_by(row, queries, keys, causal)
        visible = inside[None, :] & (j[:, None] < seen[None, :])
        weights = tl.where(visible, tl.exp(scores - most[None, :]) / total[None, :], 0.0)
        slopes = dot(v, tl.trans(grad), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) - along[None, :]
        shares = weights
        if mask_ptr is not None:
            own = own_of(row, queries, keys)[None, :]
            to_mask += tl.sum(tl.where(own == j[:, None], 0.0, weights * slopes), 1)
            weights *= gates_of(mask_ptr, own, j[:, None], keys)
            leaks = inside[None, :] & leaks_to(seen[None, :], j[:, None], keys, parity)
            shares = weights + tl.where(leaks, eps / keys / total[None, :], 0.0)
        to_value = dot(shares.to(grad.dtype), grad, to_value)
        to_key = dot((weights * slopes).to(q.dtype), q, to_key)
    place = (head * keys + j)[:, None] * width + d[None, :]
    inside = (j < keys)[:, None] & (d < width)[None, :]
    tl.store(to_key_ptr + place, (to_key * scale).to(to_key_ptr.dtype.element_ty), mask=inside)
    tl.store(to_value_ptr + place, to_value.to(to_value_ptr.dtype.element_ty), mask=inside)
    if mask_ptr is not None:
        tl.store(to_mask_ptr + head * keys + j, to_mask, mask=j < keys)


def tile_of(name: str, query: Tensor) -> dict[str, Any]:
    """Block sizes and launch options; of heads of more features, smaller blocks."""
    width = query.shape[3]
    tile = dict(configs.tile(name, query.device, features=width, element_size=query.element_size()))
    block = max(triton.next_power_of_2(width), 16)
    for side in ("BLOCK_M", "BLOCK_N"):
        tile[side] = tile[side] * FEATURES // max(block, FEATURES)
    if INTERPRETED.value:
        tile |= {side: INTERPRETED_LARGER * tile[side] for side in ("BLOCK_M", "BLOCK_N")}
    return {**tile, "BLOCK_D": block}


def _on_amd() -> bool:
    """Whether the GPU that a launch goes to is one of AMD's."""
    return not INTERPRETED.value and triton.runtime.driver.active.get_current_target().backend == "hip"


def attention_with_scores(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, window: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (b, h, queries, width), (_, heads, keys, _) = query.shape, key.shape
    if width > MOST_FEATURES:
        args = (query, key, value, causal, scale, window, normalize)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.cofire.attention_with_scores.reference(*args)
        return found
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse, most, total = (torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) for _ in range(3))
    scores = torch.empty(key.shape[:3], dtype=torch.float32, device=query.device)
    if not query.numel():
        return out, lse, scores.zero_()
    query, key, value = query.contiguous(), dense_rows(key), dense_rows(value)
    tile = tile_of("attention_with_scores", query)
    rows = h // heads * queries
    sizes = (rows, queries, keys, width, heads)
    tiles = triton.cdiv(rows, tile["BLOCK_M"])
    with torch.cuda.device_of(query):
        attention_forward_kernel[(b * heads * tiles,)](
            query, key, value, out, lse, most, total, *sizes, tiles, int(causal), scale,
            *key.stride()[:3], *value.stride()[:3], **tile,
        )  # fmt: skip
        tiles = triton.cdiv(keys, tile["BLOCK_M"])
        attention_scores_kernel[(b * heads * tiles,)](
            query, key, most, total, scores, *sizes, tiles, int(causal), scale, max(queries - window, 0),
            int(normalize), *key.stride()[:3], **tile,
        )  # fmt: skip
    return out, lse, scores


def attention_with_scores_backward(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = grad_lse is not None and grad_lse.dtype == torch.float64
    if query.shape[3] > MOST_FEATURES or grad.dtype != query.dtype or wide:
        args = (grad, grad_lse, query, key, value, causal, scale)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.cofire.attention_with_scores_backward.reference(*args)
        return found
    to_query, to_key, to_value, _ = gradients(grad, grad_lse, query, key, value, None, causal, scale, 0.0, False)
    return to_query, to_key, to_value


def gradients(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool,
    scale: float, eps: float, parity: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Those of attention, with a mask or without; that of the mask by heads ``[B, Hkv, S]``, fp32."""
    (b, h, queries, width), (_, heads, keys, _) = query.shape, key.shape
    to_query, to_key, to_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    to_mask = None if mask is None else torch.empty(key.shape[:3], dtype=torch.float32, device=key.device)
    if not query.numel():
        return to_query, to_key.zero_(), to_value.zero_(), None if to_mask is None else to_mask.zero_()
    grad, query, key, value = grad.contiguous(), query.contiguous(), dense_rows(key), dense_rows(value)
    grad_lse, mask = (None if x is None else x.contiguous() for x in (grad_lse, mask))
    most, total, along = (torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) for _ in range(3))
    tile = tile_of("attention_with_scores_backward", query)
    if _on_amd():
        tile["BLOCK_N"] = max(tile["BLOCK_N"] // 2, 16)  # with more, registers spill there
    rows = h // heads * queries
    strides = (*key.stride()[:3], *value.stride()[:3])
    options = (int(causal), scale, eps, int(parity), *strides)
    sizes = (rows, queries, keys, width, heads)
    with torch.cuda.device_of(query):
        tiles = triton.cdiv(rows, tile["BLOCK_M"])
        attention_query_gradient_kernel[(b * heads * tiles,)](
            grad, grad_lse, query, key, value, mask, to_query, most, total, along, *sizes, tiles, *options, **tile
        )
        tiles = triton.cdiv(keys, tile["BLOCK_M"])
        attention_key_gradient_kernel[(b * heads * tiles,)](
            grad,
            query,
            key,
            value,
            mask,
            most,
            total,
            along,
            to_key,
            to_value,
            to_mask,
            *sizes,
            tiles,
            *options,
            **tile,
        )
    return to_query, to_key, to_value, to_mask
