# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Scores of codes with codes: their bits are unpacked in registers and multiplied by the tensor cores.

A product of zeros and ones, or of signs, is a number up to 64, which a product of 16-bit floats gives exactly. A code is
eight bytes of memory at most, whatever its bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.kv_fusion.attention import MOST_FEATURES, gradients
from cofire_kernels.numerics import INTERPRETED

#: The span of the exponents of 2 within which fp32 sums of powers of two lose nothing.
WIDEST_SPAN = 100.0


@triton.jit
def features(ptr, token, tokens, BITS: tl.constexpr, WIDTH: tl.constexpr, SIGN: tl.constexpr):
    """What the bits of codes stand for, ``[tokens, WIDTH]`` in fp16: bits beyond ``BITS`` for nothing."""
    codes = tl.load(ptr + token, mask=token < tokens, other=0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    bits = ((codes[:, None] >> place[None, :].to(tl.int64)) & 1).to(tl.int32)
    if SIGN:
        bits = 2 * bits - 1
    return tl.where((place < BITS)[None, :], bits, 0).to(tl.float16)


@triton.jit
def hamming_similarity_kernel(
    query_ptr, key_ptr, out_ptr, queries, keys, row_tiles,
    BITS: tl.constexpr, WIDTH: tl.constexpr, SIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    set_ = (tl.program_id(0) // row_tiles).to(tl.int64)
    n = (tl.program_id(0) % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = features(query_ptr + set_ * queries, n, queries, BITS, WIDTH, SIGN)
    k = features(key_ptr + set_ * keys, m, keys, BITS, WIDTH, SIGN)
    found = tl.dot(q, tl.trans(k), out_dtype=tl.float32).to(tl.int32)
    row = set_ * queries + n
    inside = (n < queries)[:, None] & (m < keys)[None, :]
    tl.store(out_ptr + row[:, None] * keys + m[None, :], found, mask=inside)


@triton.jit
def multiply(weights, values, acc, FAST: tl.constexpr):
    """``acc + weights values``. Of fp32: exact products, or (``FAST``) those of TF32."""
    if INTERPRETED:
        return tl.dot(weights, values.to(tl.float32), acc, input_precision="ieee")
    weights = weights.to(values.dtype)
    return tl.dot(weights, values, acc, input_precision="tf32" if FAST else "ieee")


@triton.jit
def binary_softmax_attention_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, queries, keys, width, row_tiles, step, highest,
    BITS: tl.constexpr, WIDTH: tl.constexpr, SIGN: tl.constexpr, CAUSAL: tl.constexpr, RUNNING: tl.constexpr,
    FAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One pass over the keys. Weights are relative to the highest score that codes can have, or (``RUNNING``) so far."""
    set_ = (tl.program_id(0) // row_tiles).to(tl.int64)
    first = (tl.program_id(0) % row_tiles) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q = features(query_ptr + set_ * queries, n, queries, BITS, WIDTH, SIGN)
    key_ptr += set_ * keys
    value_ptr += set_ * keys * width
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    most = tl.zeros([BLOCK_N], tl.float32) + highest
    if RUNNING:
        most -= 3.0 * BITS  # below any score
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + BLOCK_N)
    for start in range(0, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k = features(key_ptr, m, keys, BITS, WIDTH, SIGN)
        scores = tl.dot(q, tl.trans(k), out_dtype=tl.float32)
        seen = (m < keys)[None, :]
        if CAUSAL:
            seen = seen & (m[None, :] <= n[:, None])
        if RUNNING:
            now = tl.maximum(most, tl.max(tl.where(seen, scores, -3.0 * BITS), 1))
            by = tl.exp2((most - now) * step)
            acc = acc * by[:, None]
            total = total * by
            most = now
        weights = tl.where(seen, tl.exp2((scores - most[:, None]) * step), 0.0)
        total += tl.sum(weights, 1)
        inside = (m < keys)[:, None] & (d < width)[None, :]
        values = tl.load(value_ptr + m[:, None].to(tl.int64) * width + d[None, :], mask=inside, other=0)
        acc = multiply(weights, values, acc, FAST)
    to = out_ptr + (set_ * queries + n)[:, None] * width + d[None, :]
    found = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(to, found, mask=(n < queries)[:, None] & (d < width)[None, :])


def width_of(bits: int) -> int:
    """Of a tile of bits: tensor cores multiply sixteen at least."""
    return max(16, int(triton.next_power_of_2(bits)))


def word_of(bits: int) -> torch.dtype:
    """The dtype of codes of so many bits."""
    return torch.int16 if bits <= 16 else torch.int32 if bits <= 32 else torch.int64


def hamming_similarity(query: Tensor, key: Tensor, bits: int, kind: str) -> Tensor:
    queries, keys = query.shape[-1], key.shape[-1]
    out = torch.empty((*query.shape, keys), dtype=torch.int32, device=query.device)
    if out.numel():
        tile = configs.tile("hamming_similarity", query.device, keys=keys)
        tiles = triton.cdiv(queries, tile["BLOCK_N"])
        with torch.cuda.device_of(query):
            hamming_similarity_kernel[(query.numel() // queries * tiles, triton.cdiv(keys, tile["BLOCK_M"]))](
                query.contiguous(), key.contiguous(), out, queries, keys, tiles,
                BITS=bits, WIDTH=width_of(bits), SIGN=kind == "sign", **tile,
            )  # fmt: skip
    return out


def binary_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, query_link: Tensor | None, key_link: Tensor | None, bits: int,
    scale: float, kind: str, causal: bool, precision: str,
) -> Tensor:  # fmt: skip
    queries, (keys, width) = query.shape[2], value.shape[2:]
    out = torch.empty((*query.shape, width), dtype=value.dtype, device=value.device)
    if not out.numel() or not keys:
        return out.zero_()
    sign, step = kind == "sign", scale * math.log2(math.e)
    # (fp16 has no numbers as small as the weights of far keys)
    running = step * bits * (2 if sign else 1) > WIDEST_SPAN or value.dtype == torch.float16
    block = triton.next_power_of_2(max(width, 16))
    tile = configs.tile("binary_softmax_attention", value.device, features=block, element_size=value.element_size())
    tiles = triton.cdiv(queries, tile["BLOCK_N"])
    with torch.cuda.device_of(value):
        binary_softmax_attention_kernel[(query.numel() // queries * tiles,)](
            query.contiguous(), key.contiguous(), value.contiguous(), out, queries, keys, width, tiles, step,
            float(bits), BITS=bits, WIDTH=width_of(bits), SIGN=sign, CAUSAL=causal, RUNNING=running,
            FAST=precision == "high", BLOCK_D=block, **tile,
        )  # fmt: skip
    return out


@triton.jit
def unpack_kernel(
    codes_ptr, out_ptr, tokens, width, BITS: tl.constexpr, WIDTH: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What bits stand for, at the begin of rows of ``width`` numbers."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, WIDTH)
    found = features(codes_ptr, n, tokens, BITS, WIDTH, SIGN).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n[:, None] * width + place[None, :], found, mask=(n < tokens)[:, None] & (place < BITS)[None, :])


def _unpacked(codes: Tensor, bits: int, width: int, sign: bool, dtype: torch.dtype) -> Tensor:
    """``[..., width]``, zeros from ``bits`` on."""
    out = (torch.empty if width == bits else torch.zeros)((*codes.shape, width), dtype=dtype, device=codes.device)
    if out.numel():
        block = 64
        unpack_kernel[(triton.cdiv(codes.numel(), block),)](
            codes.contiguous(), out, codes.numel(), width, BITS=bits, WIDTH=width_of(bits), SIGN=sign, BLOCK=block
        )
    return out


def binary_softmax_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, query_link: Tensor | None, key_link: Tensor | None,
    bits: int, scale: float, kind: str, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """By the gradients of attention of floats: they are asked for features and values in rows of the same length."""
    width = max(bits, value.shape[3])
    aligned = not causal or query.shape[2] == value.shape[2]  # there the last query sees the last key
    if not aligned or width > MOST_FEATURES or grad.dtype != value.dtype:
        args = (grad, query, key, value, query_link, key_link, bits, scale, kind, causal)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.cofire.binary_softmax_attention_backward.reference(*args)
        return found
    sign = kind == "sign"
    with torch.cuda.device_of(value):
        q, k = (_unpacked(codes, bits, width, sign, value.dtype) for codes in (query, key))
    longer = (0, width - value.shape[3])
    g, v = (torch.nn.functional.pad(x, longer) if longer[1] else x for x in (grad, value))
    to_query, to_key, to_value, _ = gradients(g, None, q, k, v, None, causal, scale, 0.0, False)
    slope = 2 if sign else 1  # of a feature, by its bit

    def linked(link: Tensor | None, gradient: Tensor) -> Tensor:
        return value.new_empty((0,)) if link is None else (slope * gradient[..., :bits]).contiguous()

    return to_value[..., : value.shape[3]].contiguous(), linked(query_link, to_query), linked(key_link, to_key)
