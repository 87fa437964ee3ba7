# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Linear attention with binary codes, forward and backward.

The sums of the values that each bit of the keys selects, ``[bits, d]`` of a head, are those of chunks of tokens, which
whoever reads them adds up: no sum is one of several programs, so every run gives the same bits. Nothing as large as the
values is kept between the passes: their tiles are computed again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.numerics import dot
from cofire_kernels.shift_add_attention.scores import features, width_of

#: The most features of a value that one program holds.
MOST_FEATURES = 64
#: The most chunks whose sums are added up where they are read.
MOST_PARTS = 8
BY_PI = tl.constexpr(1 / math.pi)


@triton.jit
def load_rows(ptr, token, tokens, d, width):
    """Rows of a head, ``[tokens, d]`` in their dtype; zeros outside."""
    inside = (token >= 0) & (token < tokens)
    return tl.load(
        ptr + token[:, None].to(tl.int64) * width + d[None, :], mask=inside[:, None] & (d < width)[None, :], other=0
    )


@triton.jit
def store_rows(ptr, token, tokens, d, width, rows):
    place = ptr + token[:, None].to(tl.int64) * width + d[None, :]
    tl.store(place, rows.to(ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (d < width)[None, :])


@triton.jit
def add_selected(bits, rows, acc, HALVES: tl.constexpr):
    """``acc + bits rows`` of zeros and ones and fp32. ``HALVES``: of rows as a sum of two bf16, on tensor cores."""
    if HALVES:
        bits = bits.to(tl.bfloat16)
        high = rows.to(tl.bfloat16)
        acc = dot(bits, (rows - high.to(tl.float32)).to(tl.bfloat16), acc)
        return dot(bits, high, acc)
    return dot(bits.to(tl.float32), rows, acc)


@triton.jit
def add_product(a, b, acc, HALVES: tl.constexpr):
    """``acc + a b`` of fp32. ``HALVES``: as above, without the product of the lower parts."""
    if HALVES:
        high_a, high_b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        acc = dot((a - high_a.to(tl.float32)).to(tl.bfloat16), high_b, acc)
        acc = dot(high_a, (b - high_b.to(tl.float32)).to(tl.bfloat16), acc)
        return dot(high_a, high_b, acc)
    return dot(a, b, acc)


@triton.jit
def load_sums(ptr, parts, d, width, BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums of a head, ``[WIDTH, BLOCK_D]``, from those of its chunks."""
    bit = tl.arange(0, WIDTH)
    place = bit[:, None] * width + d[None, :]
    inside = (bit < BITS)[:, None] & (d < width)[None, :]
    total = tl.zeros([WIDTH, BLOCK_D], tl.float32)
    for part in range(parts):
        total += tl.load(ptr + part * BITS * width + place, mask=inside, other=0)
    return total


@triton.jit
def store_sums(ptr, d, width, sums, BITS: tl.constexpr, WIDTH: tl.constexpr):
    bit = tl.arange(0, WIDTH)
    inside = (bit < BITS)[:, None] & (d < width)[None, :]
    tl.store(ptr + bit[:, None] * width + d[None, :], sums, mask=inside)


@triton.jit
def key_sums_kernel(
    key_ptr, value_ptr, sums_ptr, tokens, width, parts,
    BITS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """K^T V of a chunk of tokens."""
    head, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([WIDTH, BLOCK_D], tl.float32)
    for start in range(part * CHUNK, tl.minimum((part + 1) * CHUNK, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = features(key_ptr + head * tokens, n, tokens, BITS, WIDTH, False)
        v = load_rows(value_ptr + head * tokens * width, n, tokens, d, width)
        acc = dot(tl.trans(k).to(v.dtype), v, acc)
    store_sums(sums_ptr + (head * parts + part) * BITS * width, d, width, acc, BITS, WIDTH)


@triton.jit
def turned(q, v, sums, HALVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """T = V / 2 + Q K^T V / pi."""
    selected = add_selected(q, sums, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), HALVES)
    return 0.5 * v.to(tl.float32) + selected * BY_PI


@triton.jit
def binary_linear_attention_kernel(
    query_ptr, value_ptr, weight_ptr, sums_ptr, out_ptr, tokens, width, heads, taps, parts, tiles, eps,
    BITS: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    value_ptr += head * tokens * width
    sums = load_sums(sums_ptr + head * parts * BITS * width, parts, d, width, BITS, WIDTH, BLOCK_D)
    q = features(query_ptr + head * tokens, n, tokens, BITS, WIDTH, False)
    v = load_rows(value_ptr, n, tokens, d, width)
    t = turned(q, v, sums, HALVES, BLOCK_N, BLOCK_D)
    out = t / tl.sqrt(tl.sum(t * t, 1) + eps)[:, None]
    if weight_ptr is not None:
        for j in range(taps):
            by = tl.load(weight_ptr + head % heads * taps + j).to(tl.float32)
            out += by * load_rows(value_ptr, n + j - taps // 2, tokens, d, width).to(tl.float32)
    store_rows(out_ptr + head * tokens * width, n, tokens, d, width, out)


@triton.jit
def turned_gradient(q, v, grad, sums, eps, HALVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradient of T, through the division by its rows' norms."""
    t = turned(q, v, sums, HALVES, BLOCK_N, BLOCK_D)
    by = (1.0 / tl.sqrt(tl.sum(t * t, 1) + eps))[:, None]
    direction, grad = t * by, grad.to(tl.float32)
    return by * (grad - direction * tl.sum(direction * grad, 1)[:, None])


@triton.jit
def query_gradient_kernel(
    grad_ptr, query_ptr, value_ptr, sums_ptr, to_sums_ptr, to_weight_ptr, to_query_ptr,
    tokens, width, taps, parts, chunks, eps,
    BITS: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, HALVES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of a chunk of tokens the gradients of the queries, and their part of those of the sums and of the taps."""
    head, part = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    d, bit, tap = tl.arange(0, BLOCK_D), tl.arange(0, WIDTH), tl.arange(0, TAPS)
    grad_ptr += head * tokens * width
    value_ptr += head * tokens * width
    sums = load_sums(sums_ptr + head * parts * BITS * width, parts, d, width, BITS, WIDTH, BLOCK_D)
    to_sums = tl.zeros([WIDTH, BLOCK_D], tl.float32)
    to_weight = tl.zeros([TAPS], tl.float32)
    for start in range(part * CHUNK, tl.minimum((part + 1) * CHUNK, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        q = features(query_ptr + head * tokens, n, tokens, BITS, WIDTH, False)
        v = load_rows(value_ptr, n, tokens, d, width)
        grad = load_rows(grad_ptr, n, tokens, d, width)
        to_t = turned_gradient(q, v, grad, sums, eps, HALVES, BLOCK_N, BLOCK_D)
        to_sums = add_selected(tl.trans(q), to_t, to_sums, HALVES)
        if to_query_ptr is not None:
            found = add_product(to_t, tl.trans(sums), tl.zeros([BLOCK_N, WIDTH], tl.float32), HALVES)
            store_rows(to_query_ptr + head * tokens * BITS, n, tokens, bit, BITS, found * BY_PI)
        if to_weight_ptr is not None:
            for j in range(taps):
                beside = load_rows(value_ptr, n + j - taps // 2, tokens, d, width).to(tl.float32)
                along = tl.sum(tl.sum(grad.to(tl.float32) * beside, 1), 0)
                to_weight += tl.where(tap == j, along, 0.0)
    place = head * chunks + part
    store_sums(to_sums_ptr + place * BITS * width, d, width, to_sums * BY_PI, BITS, WIDTH)
    if to_weight_ptr is not None:
        tl.store(to_weight_ptr + place * taps + tap, to_weight, mask=tap < taps)


@triton.jit
def value_gradient_kernel(
    grad_ptr, query_ptr, key_ptr, value_ptr, weight_ptr, sums_ptr, to_sums_ptr, to_value_ptr, to_key_ptr,
    tokens, width, heads, taps, parts, to_parts, tiles, eps,
    BITS: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of values, and of its keys."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    d, bit = tl.arange(0, BLOCK_D), tl.arange(0, WIDTH)
    grad_ptr += head * tokens * width
    sums = load_sums(sums_ptr + head * parts * BITS * width, parts, d, width, BITS, WIDTH, BLOCK_D)
    q = features(query_ptr + head * tokens, n, tokens, BITS, WIDTH, False)
    k = features(key_ptr + head * tokens, n, tokens, BITS, WIDTH, False)
    v = load_rows(value_ptr + head * tokens * width, n, tokens, d, width)
    grad = load_rows(grad_ptr, n, tokens, d, width)
    to_value = 0.5 * turned_gradient(q, v, grad, sums, eps, HALVES, BLOCK_N, BLOCK_D)
    to_sums = load_sums(to_sums_ptr + head * to_parts * BITS * width, to_parts, d, width, BITS, WIDTH, BLOCK_D)
    to_value = add_selected(k, to_sums, to_value, HALVES)
    if weight_ptr is not None:
        for j in range(taps):
            by = tl.load(weight_ptr + head % heads * taps + j).to(tl.float32)
            to_value += by * load_rows(grad_ptr, n - j + taps // 2, tokens, d, width).to(tl.float32)
    store_rows(to_value_ptr + head * tokens * width, n, tokens, d, width, to_value)
    if to_key_ptr is not None:
        found = add_product(v.to(tl.float32), tl.trans(to_sums), tl.zeros([BLOCK_N, WIDTH], tl.float32), HALVES)
        store_rows(to_key_ptr + head * tokens * BITS, n, tokens, bit, BITS, found)


def _tile(value: Tensor, bits: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The launch options of kernels that go over a chunk of tokens, and of those that take a tile of them."""
    block = triton.next_power_of_2(max(value.shape[3], 16))
    tile = configs.tile("binary_linear_attention", value.device, features=block, element_size=value.element_size())
    whole = {**tile, "BITS": bits, "WIDTH": width_of(bits), "BLOCK_D": block}
    return whole, {name: option for name, option in whole.items() if name != "CHUNK"}


def _key_sums(key: Tensor, value: Tensor, bits: int, tile: dict[str, Any]) -> Tensor:
    b, h, tokens, width = value.shape
    sums = torch.empty(
        (b * h, triton.cdiv(tokens, tile["CHUNK"]), bits, width), dtype=torch.float32, device=value.device
    )
    key_sums_kernel[(sums.shape[0] * sums.shape[1],)](key, value, sums, tokens, width, sums.shape[1], **tile)
    return _few(sums)


def _few(sums: Tensor) -> Tensor:
    """Those of many chunks added up once, not by each program that reads them."""
    return sums.sum(1, keepdim=True) if sums.shape[1] > MOST_PARTS else sums


def binary_linear_attention_plan(*args: Any) -> str:
    """What :func:`binary_linear_attention` does with these arguments."""
    return _plan(args[2])


def binary_linear_attention_backward_plan(*args: Any) -> str:
    """What :func:`binary_linear_attention_backward` does with these arguments."""
    return _plan(args[3])


def _plan(value: Tensor) -> str:
    if value.shape[3] > MOST_FEATURES:
        return f"plain torch: values of more than {MOST_FEATURES} features"
    return "sums of the values that the keys' bits select, and what the queries' bits select of them"


def binary_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, query_link: Tensor | None,
    key_link: Tensor | None, bits: int, eps: float,
) -> Tensor:  # fmt: skip
    b, h, tokens, width = value.shape
    if width > MOST_FEATURES:
        args = (query, key, value, weight, None, None, bits, eps)
        found: Tensor = torch.ops.cofire.binary_linear_attention.reference(*args)
        return found
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if out.numel():
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        weight = None if weight is None else weight.contiguous()
        whole, part = _tile(value, bits)
        tiles, taps = triton.cdiv(tokens, part["BLOCK_N"]), 0 if weight is None else weight.shape[1]
        with torch.cuda.device_of(value):
            sums = _key_sums(key, value, bits, whole)
            binary_linear_attention_kernel[(b * h * tiles,)](
                query, value, weight, sums, out, tokens, width, h, taps, sums.shape[1], tiles, eps,
                HALVES=value.element_size() == 2, **part,
            )  # fmt: skip
    return out


def binary_linear_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, query_link: Tensor | None,
    key_link: Tensor | None, bits: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    b, h, tokens, width = value.shape
    if width > MOST_FEATURES or grad.dtype != value.dtype:
        args = (grad, query, key, value, weight, query_link, key_link, bits, eps)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.cofire.binary_linear_attention_backward.reference(
            *args
        )
        return found
    to_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    to_query, to_key = (
        None if link is None else value.new_empty((b, h, tokens, bits)) for link in (query_link, key_link)
    )
    to_weight = (
        value.new_empty((0,)) if weight is None else torch.zeros_like(weight, memory_format=torch.contiguous_format)
    )
    if value.numel():
        grad, query, key, value = (x.contiguous() for x in (grad, query, key, value))
        weight = None if weight is None else weight.contiguous()
        whole, part = _tile(value, bits)
        tiles, taps = triton.cdiv(tokens, part["BLOCK_N"]), 0 if weight is None else weight.shape[1]
        halves = value.element_size() == 2
        with torch.cuda.device_of(value):
            sums = _key_sums(key, value, bits, whole)
            chunks = triton.cdiv(tokens, whole["CHUNK"])
            to_sums = sums.new_empty((b * h, chunks, bits, width))
            to_taps = None if weight is None else sums.new_empty((b, h, chunks, taps))
            query_gradient_kernel[(b * h * chunks,)](
                grad, query, value, sums, to_sums, to_taps, to_query, tokens, width, taps, sums.shape[1], chunks, eps,
                TAPS=triton.next_power_of_2(max(taps, 1)), HALVES=halves, **whole,
            )  # fmt: skip
            to_sums = _few(to_sums)
            value_gradient_kernel[(b * h * tiles,)](
                grad, query, key, value, weight, sums, to_sums, to_value, to_key, tokens, width, h, taps,
                sums.shape[1], to_sums.shape[1], tiles, eps, HALVES=halves, **part,
            )  # fmt: skip
        if to_taps is not None:
            to_weight = to_taps.sum((0, 2)).to(value.dtype)
    elif to_query is not None or to_key is not None:
        to_query, to_key = (None if x is None else x.zero_() for x in (to_query, to_key))
    to_query, to_key = (value.new_empty((0,)) if x is None else x for x in (to_query, to_key))
    return to_value, to_weight, to_query, to_key
