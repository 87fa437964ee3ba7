# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention under a mask that is trained, and the cache that keeps what is chosen.

What every weight gets of eps is relative to the largest score of all, so that the forward looks for that first: with
weights relative to the largest so far it would take a second matrix of sums. The gradients are those of
:mod:`cofire_kernels.kv_fusion.attention`, whose sums of one number a row can afford it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.kv_fusion.attention import (
    MOST_FEATURES,
    gates_of,
    gradients,
    leaks_to,
    load_tile,
    own_of,
    seen_by,
    tile_of,
)
from cofire_kernels.kv_fusion.gather import dense_rows
from cofire_kernels.numerics import dot


@triton.jit
def masked_attention_forward_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, out_ptr,
    rows, queries, keys, width, heads, tiles, causal, scale, eps, parity,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    key_ptr += head // heads * stride_kb + head % heads * stride_kh
    value_ptr += head // heads * stride_vb + head % heads * stride_vh
    mask_ptr += head // heads * keys
    q = load_tile(query_ptr + head * rows * width, row, row < rows, width, d, width)
    seen = seen_by(row, queries, keys, causal)
    own = own_of(row, queries, keys)
    end = tl.max(seen, 0)
    most = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    for start in range(0, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = load_tile(key_ptr, j, j < keys, stride_ks, d, width)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        most = tl.maximum(most, tl.max(tl.where(j[None, :] < seen[:, None], scores, -float("inf")), 1))
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, tl.where(parity != 0, keys, end), BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = load_tile(key_ptr, j, j < keys, stride_ks, d, width)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        weights = tl.where(j[None, :] < seen[:, None], tl.exp(scores - most[:, None]), 0.0)
        weights *= gates_of(mask_ptr, own[:, None], j[None, :], keys)
        total += tl.sum(weights, 1)
        weights += tl.where(leaks_to(seen[:, None], j[None, :], keys, parity), eps / keys, 0.0)
        v = load_tile(value_ptr, j, j < keys, stride_vs, d, width)
        acc = dot(weights.to(v.dtype), v, acc)
    found = (acc / (total + eps)[:, None]).to(out_ptr.dtype.element_ty)
    to = out_ptr + (head * rows + row)[:, None] * width + d[None, :]
    tl.store(to, found, mask=(row < rows)[:, None] & (d < width)[None, :])


@triton.jit
def kv_append_kernel(
    cache_key_ptr, cache_value_ptr, lengths_ptr, key_ptr, value_ptr, keep_ptr, seen_ptr, heads, slots, width,
    stride_kb, stride_kh, stride_ks, stride_kd, stride_vb, stride_vh, stride_vs, stride_vd, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for a row of the batch: it alone reads its length, and changes it after its last write."""
    b = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + b)
    free = (length >= 0) & (length < slots)
    tl.device_assert(free, "kv_append_: lengths must be from 0 to less than the slots of the cache: it is full")
    at = length.to(tl.int64)
    for start in range(0, heads * width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = (place < heads * width) & free
        h, d = (place // width).to(tl.int64), (place % width).to(tl.int64)
        key = tl.load(key_ptr + b * heads * width + place, mask=inside, other=0)
        value = tl.load(value_ptr + b * heads * width + place, mask=inside, other=0)
        to_key = b * stride_kb + h * stride_kh + at * stride_ks + d * stride_kd
        to_value = b * stride_vb + h * stride_vh + at * stride_vs + d * stride_vd
        tl.store(cache_key_ptr + to_key, key, mask=inside)
        tl.store(cache_value_ptr + to_value, value, mask=inside)
    tl.debug_barrier()  # every thread has read the length
    tl.store(seen_ptr + b, length + 1)
    tl.store(lengths_ptr + b, length + tl.load(keep_ptr + b).to(tl.int32))


def masked_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool, scale: float, eps: float, parity: bool
) -> Tensor:
    (b, h, queries, width), (_, heads, keys, _) = query.shape, key.shape
    if width > MOST_FEATURES or mask.dtype == torch.float64:
        args = (query, key, value, mask, causal, scale, eps, parity)
        found: Tensor = torch.ops.cofire.masked_softmax_attention.reference(*args)
        return found
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if query.numel():
        query, key, value = query.contiguous(), dense_rows(key), dense_rows(value)
        tile = tile_of("attention_with_scores", query)
        rows = h // heads * queries
        tiles = triton.cdiv(rows, tile["BLOCK_M"])
        with torch.cuda.device_of(query):
            masked_attention_forward_kernel[(b * heads * tiles,)](
                query, key, value, mask.contiguous(), out, rows, queries, keys, width, heads, tiles, int(causal), scale,
                eps, int(parity), *key.stride()[:3], *value.stride()[:3], **tile,
            )  # fmt: skip
    return out


def masked_softmax_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool, scale: float, eps: float,
    parity: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if query.shape[3] > MOST_FEATURES or grad.dtype != query.dtype or mask.dtype == torch.float64:
        args = (grad, query, key, value, mask, causal, scale, eps, parity)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.cofire.masked_softmax_attention_backward.reference(
            *args
        )
        return found
    *of_tokens, to_mask = gradients(grad, None, query, key, value, mask, causal, scale, eps, parity)
    assert to_mask is not None
    to_query, to_key, to_value = of_tokens
    return to_query, to_key, to_value, to_mask.sum(1).to(mask.dtype)


def kv_append_(
    cache_key: Tensor, cache_value: Tensor, lengths: Tensor, key: Tensor, value: Tensor, keep: Tensor
) -> Tensor:
    b, heads, slots, width = cache_key.shape
    seen = torch.empty((b,), dtype=torch.int32, device=lengths.device)
    if b:
        counted = lengths.contiguous()
        with torch.cuda.device_of(cache_key):
            tile = configs.tile("kv_append_", cache_key.device, elements=heads * width)
            kv_append_kernel[(b,)](
                cache_key, cache_value, counted, key.contiguous(), value.contiguous(),
                keep.contiguous().view(torch.uint8), seen, heads, slots, width,
                *cache_key.stride(), *cache_value.stride(), debug=True, sanitize_overflow=False, **tile,
            )  # fmt: skip
        if counted is not lengths:
            lengths.copy_(counted)
    return seen
