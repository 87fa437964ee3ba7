# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Fusion of tokens into slots: convolution, softmax over the tokens, mixing and gate in one pass over the tokens.

Token by token in memory, what a filter sees of a window is ``taps * width`` neighbours, and the next window begins
``width`` later: a product of matrices one of which overlaps with itself, which costs a pointer expression and no copy.

The backward goes over the convolution once more and keeps the logits in fp32, from which shares are one exponential
away. Sums of several programs are added in a fixed order: the same bits on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.lowbit.product import share, sum_splits
from cofire_kernels.numerics import dot, maximum

#: The most features of a token, key and value together, of which one program holds the sums of a tile of slots.
MOST_FEATURES = 512
#: As many features fill the tiles of the configuration: of wider tokens, a tile has fewer slots.
FEATURES = 256


@triton.jit
def rows_by_rows(
    a_ptr, i, a_rows, a_stride, b_ptr, j, b_rows, b_stride, length,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of rows, fp32 ``[BLOCK_I, BLOCK_J]``, each of ``length`` values; the rows may overlap."""
    acc = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for start in range(0, length, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (i < a_rows)[:, None] & (k < length)[None, :]
        a = tl.load(a_ptr + i[:, None].to(tl.int64) * a_stride + k[None, :], mask=inside, other=0)
        inside = (k < length)[:, None] & (j < b_rows)[None, :]
        b = tl.load(b_ptr + j[None, :].to(tl.int64) * b_stride + k[:, None], mask=inside, other=0)
        acc = dot(a, b, acc)
    return acc


@triton.jit
def logits_of(
    tokens_ptr, weight_ptr, bias_ptr, m, s, slots, rest, span, width,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``relu(bias + W windows)``, fp32 ``[BLOCK_M, BLOCK_S]``. ``span`` is the length of a window, and of a filter."""
    acc = rows_by_rows(
        weight_ptr, m, slots, span, tokens_ptr, s, rest, width, span, BLOCK_M, BLOCK_S, BLOCK_K
    )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + m, mask=m < slots, other=0).to(tl.float32)[:, None]
    return maximum(acc, 0.0)


@triton.jit
def mix(
    tokens_ptr, weight_ptr, bias_ptr, m, c, slots, rest, taps, width,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Means of all tokens by their shares, ``[BLOCK_M, BLOCK_C]``. No logit is below zero, where the largest begins."""
    most = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, rest, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        z = logits_of(
            tokens_ptr, weight_ptr, bias_ptr, m, s, slots, rest, taps * width, width, BLOCK_M, BLOCK_S, BLOCK_K
        )
        z = tl.where((s < rest)[None, :], z, -float("inf"))
        now = tl.maximum(most, tl.max(z, 1))
        by = tl.exp(most - now)
        shares = tl.exp(z - now[:, None])
        total = total * by + tl.sum(shares, 1)
        inside = (s < rest)[:, None] & (c < width)[None, :]
        x = tl.load(tokens_ptr + (s + taps // 2)[:, None].to(tl.int64) * width + c[None, :], mask=inside, other=0)
        acc = dot(shares.to(x.dtype), x, acc * by[:, None])
        most = now
    return acc / total[:, None]


@triton.jit
def picked(tokens_ptr, pick_ptr, m, c, slots, rest, taps, width):
    """The picked tokens as they are, in fp32; zeros where the index is outside."""
    token = tl.load(pick_ptr + m, mask=m < slots, other=-1).to(tl.int64)
    inside = ((token >= 0) & (token < rest))[:, None] & (c < width)[None, :]
    return tl.load(tokens_ptr + (token + taps // 2)[:, None] * width + c[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def kv_fuse_forward_kernel(
    tokens_ptr, weight_ptr, bias_ptr, gate_ptr, pick_ptr, key_ptr, value_ptr, slots, rest, taps, width, tiles,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // tiles).to(tl.int64)
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    tokens_ptr += head * (rest + taps - 1) * width
    mixed = mix(tokens_ptr, weight_ptr, bias_ptr, m, c, slots, rest, taps, width, BLOCK_M, BLOCK_S, BLOCK_K, BLOCK_C)
    x = picked(tokens_ptr, pick_ptr + head * slots, m, c, slots, rest, taps, width)
    found = (x + tl.load(gate_ptr).to(tl.float32) * (mixed - x)).to(key_ptr.dtype.element_ty)
    d = width // 2
    place = (head * slots + m)[:, None] * d + c[None, :]
    tl.store(key_ptr + place, found, mask=(m < slots)[:, None] & (c < d)[None, :])
    tl.store(value_ptr + place - d, found, mask=(m < slots)[:, None] & ((c >= d) & (c < width))[None, :])


@triton.jit
def kv_fuse_logits_kernel(
    tokens_ptr, weight_ptr, bias_ptr, logits_ptr, most_ptr, total_ptr, slots, rest, taps, width, tiles,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits ``[rest, slots]`` of each head; of each slot the largest, and the sum of the exponentials relative to it.

    Two numbers: in their logarithm together large logits would drown the sum, and shares would not add up to one.
    """
    head = (tl.program_id(0) // tiles).to(tl.int64)
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens_ptr += head * (rest + taps - 1) * width
    logits_ptr += head * rest * slots
    most = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, rest, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        z = logits_of(
            tokens_ptr, weight_ptr, bias_ptr, m, s, slots, rest, taps * width, width, BLOCK_M, BLOCK_S, BLOCK_K
        )
        inside = (m < slots)[:, None] & (s < rest)[None, :]
        tl.store(logits_ptr + s[None, :].to(tl.int64) * slots + m[:, None], z, mask=inside)
        z = tl.where((s < rest)[None, :], z, -float("inf"))
        now = tl.maximum(most, tl.max(z, 1))
        total = total * tl.exp(most - now) + tl.sum(tl.exp(z - now[:, None]), 1)
        most = now
    tl.store(most_ptr + head * slots + m, most, mask=m < slots)
    tl.store(total_ptr + head * slots + m, total, mask=m < slots)


@triton.jit
def shares_of(logits_ptr, most_ptr, total_ptr, head, s, m, slots, rest, inside):
    """Logits of a head and the shares that they stand for, ``[tokens, slots]``; no share outside."""
    logits_ptr += head * rest * slots
    most_ptr += head * slots
    total_ptr += head * slots
    z = tl.load(logits_ptr + s[:, None].to(tl.int64) * slots + m[None, :], mask=inside, other=0)
    most = tl.load(most_ptr + m, mask=m < slots, other=0)
    total = tl.load(total_ptr + m, mask=m < slots, other=1)
    return z, tl.where(inside, tl.exp(z - most[None, :]) / total[None, :], 0.0)


@triton.jit
def products_of(
    grad_ptr, tokens_ptr, s, m, slots, rest, width,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of tokens with the gradients of slots, ``[BLOCK_S, BLOCK_M]``: the gradient of what the tokens are weighted by."""
    return rows_by_rows(tokens_ptr, s, rest, width, grad_ptr, m, slots, width, width, BLOCK_S, BLOCK_M, BLOCK_K)


@triton.jit
def kv_fuse_sums_kernel(
    grad_ptr, tokens_ptr, pick_ptr, logits_ptr, most_ptr, total_ptr, along_ptr, to_gate_ptr,
    slots, rest, taps, width, tiles, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What a tile of tokens gives to each slot's ``<grad, mixed>`` and to ``<grad, mixed - picked>``.

    From the shares in fp32, as the gradients of logits are: they cancel where they have to, which those of a rounded
    mixture would not.
    """
    head = (tl.program_id(0) // tiles).to(tl.int64)
    s = (tl.program_id(0) % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens_ptr += (head * (rest + taps - 1) + taps // 2) * width
    to_shares = products_of(
        grad_ptr + head * slots * width, tokens_ptr, s, m, slots, rest, width, BLOCK_M, BLOCK_S, BLOCK_K
    )
    inside = (s < rest)[:, None] & (m < slots)[None, :]
    _, shares = shares_of(logits_ptr, most_ptr, total_ptr, head, s, m, slots, rest, inside)
    pick = tl.load(pick_ptr + head * slots + m, mask=m < slots, other=-1)
    more = shares - (pick[None, :] == s[:, None]).to(tl.float32)
    place = tl.program_id(0).to(tl.int64) * slots + m
    tl.store(along_ptr + place, tl.sum(shares * to_shares, 0), mask=m < slots)
    tl.store(to_gate_ptr + place, tl.sum(more * to_shares, 0), mask=m < slots)


@triton.jit
def kv_fuse_logit_gradient_kernel(
    grad_ptr, tokens_ptr, gate_ptr, logits_ptr, most_ptr, total_ptr, along_ptr, to_logits_ptr, to_bias_ptr,
    slots, rest, taps, width, tiles, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the logits' gradients, and their sums over its tokens."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    s = (tl.program_id(0) % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens_ptr += (head * (rest + taps - 1) + taps // 2) * width
    to_shares = products_of(
        grad_ptr + head * slots * width, tokens_ptr, s, m, slots, rest, width, BLOCK_M, BLOCK_S, BLOCK_K
    )
    inside = (s < rest)[:, None] & (m < slots)[None, :]
    z, shares = shares_of(logits_ptr, most_ptr, total_ptr, head, s, m, slots, rest, inside)
    along = tl.load(along_ptr + head * slots + m, mask=m < slots, other=0)
    factor = tl.where(z > 0, tl.load(gate_ptr).to(tl.float32) * shares, 0.0)
    to_logits = factor * (to_shares - along[None, :])
    to = to_logits_ptr + (head * rest + s)[:, None] * slots + m[None, :]
    tl.store(to, to_logits.to(to_logits_ptr.dtype.element_ty), mask=inside)
    tl.store(to_bias_ptr + tl.program_id(0).to(tl.int64) * slots + m, tl.sum(to_logits, 0), mask=m < slots)


@triton.jit
def kv_fuse_weight_gradient_kernel(
    tokens_ptr, to_logits_ptr, to_weight_ptr, heads, slots, rest, taps, width, tiles, each, stride_split,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dW = sum dZ windows`` over a share of the tiles of tokens of all heads, in the layout of the convolution."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for tile in range(split * each, tl.minimum(split * each + each, heads * tiles)):
        head = (tile // tiles).to(tl.int64)
        s = (tile % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = (s < rest)[:, None] & (m < slots)[None, :]
        dz = tl.load(to_logits_ptr + (head * rest + s)[:, None] * slots + m[None, :], mask=inside, other=0)
        inside = (s < rest)[:, None] & (k < taps * width)[None, :]
        x = tl.load(tokens_ptr + (head * (rest + taps - 1) + s)[:, None] * width + k[None, :], mask=inside, other=0)
        acc = dot(tl.trans(dz), x, acc)
    to = m[:, None].to(tl.int64) * (taps * width) + ((k % width) * taps + k // width)[None, :]
    inside = (m < slots)[:, None] & (k < taps * width)[None, :]
    to_weight_ptr += split.to(tl.int64) * stride_split
    tl.store(to_weight_ptr + to, acc.to(to_weight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def kv_fuse_token_gradient_kernel(
    grad_ptr, weight_ptr, gate_ptr, pick_ptr, logits_ptr, most_ptr, total_ptr, to_logits_ptr, to_tokens_ptr,
    slots, rest, taps, width, tiles, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Through the mixing and the pick, whose coefficients are one matrix; and through the windows that hold a token."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    place = (tl.program_id(0) % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    s = place - taps // 2
    gate = tl.load(gate_ptr).to(tl.float32)
    acc = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for start in range(0, slots, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = ((s >= 0) & (s < rest))[:, None] & (m < slots)[None, :]
        _, shares = shares_of(logits_ptr, most_ptr, total_ptr, head, s, m, slots, rest, inside)
        pick = tl.load(pick_ptr + head * slots + m, mask=m < slots, other=-1)
        factor = gate * shares + tl.where(inside & (pick[None, :] == s[:, None]), 1 - gate, 0.0)
        inside = (m < slots)[:, None] & (c < width)[None, :]
        grad = tl.load(grad_ptr + (head * slots + m)[:, None] * width + c[None, :], mask=inside, other=0)
        acc = dot(factor.to(grad.dtype), grad, acc)
    over = tl.cdiv(slots, BLOCK_M)
    for step in range(0, taps * over):
        tap = step // over
        m = (step % over) * BLOCK_M + tl.arange(0, BLOCK_M)
        s = place - tap
        inside = ((s >= 0) & (s < rest))[:, None] & (m < slots)[None, :]
        dz = tl.load(to_logits_ptr + (head * rest + s)[:, None] * slots + m[None, :], mask=inside, other=0)
        inside = (m < slots)[:, None] & (c < width)[None, :]
        filter_ptr = weight_ptr + m[:, None].to(tl.int64) * (taps * width) + tap * width
        acc = dot(dz, tl.load(filter_ptr + c[None, :], mask=inside, other=0), acc)
    to = to_tokens_ptr + (head * (rest + taps - 1) + place)[:, None] * width + c[None, :]
    inside = (place < rest + taps - 1)[:, None] & (c < width)[None, :]
    tl.store(to, acc.to(to_tokens_ptr.dtype.element_ty), mask=inside)


def _refused(tokens: Tensor, *others: Tensor | None) -> bool:
    """Whether the reference serves: tokens too wide, or (of ``others``) dtypes that no one product takes."""
    return tokens.shape[3] > MOST_FEATURES or any(x is not None and x.dtype != tokens.dtype for x in others)


def _tile(tokens: Tensor) -> dict[str, Any]:
    width = tokens.shape[3]
    tile = dict(configs.tile("kv_fuse", tokens.device, features=width, element_size=tokens.element_size()))
    block = max(triton.next_power_of_2(width), 16)
    tile["BLOCK_M"] = tile["BLOCK_M"] * FEATURES // max(block, FEATURES)
    return {**tile, "BLOCK_C": block}


def _by_taps(weight: Tensor) -> Tensor:
    """Filters ``[merged, 2 d, taps]`` in the order of the tokens: ``[merged, taps, 2 d]``."""
    return weight.transpose(1, 2).contiguous()


def kv_fuse(tokens: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
    if _refused(tokens, weight, bias, gate):
        found: tuple[Tensor, Tensor] = torch.ops.cofire.kv_fuse.reference(tokens, weight, bias, gate, pick)
        return found
    (b, heads, padded, width), (slots, _, taps) = tokens.shape, weight.shape
    key, value = (tokens.new_empty((b, heads, slots, width // 2)) for _ in range(2))
    if key.numel():
        tile = _tile(tokens)
        tiles = triton.cdiv(slots, tile["BLOCK_M"])
        with torch.cuda.device_of(tokens):
            kv_fuse_forward_kernel[(b * heads * tiles,)](
                tokens.contiguous(), _by_taps(weight), None if bias is None else bias.contiguous(), gate,
                pick.contiguous(), key, value, slots, padded - taps + 1, taps, width, tiles, **tile,
            )  # fmt: skip
    return key, value


def kv_fuse_backward(
    grad_key: Tensor, grad_value: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor,
    pick: Tensor, to_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if _refused(tokens, weight, bias, gate, grad_key, grad_value):
        args = (grad_key, grad_value, tokens, weight, bias, gate, pick, to_tokens)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.cofire.kv_fuse_backward.reference(*args)
        return found
    (b, h, padded, width), (slots, _, taps) = tokens.shape, weight.shape
    heads, rest = b * h, padded - taps + 1
    to_x = tokens.new_empty(tokens.shape if to_tokens else (0,))
    to_weight = weight.new_empty(weight.shape)
    if not heads:
        to_bias = weight.new_empty((0,)) if bias is None else torch.zeros_like(bias)
        return to_x, to_weight.zero_(), to_bias, gate.new_zeros(gate.shape)

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=tokens.device)

    x, filters, pick = tokens.contiguous(), _by_taps(weight), pick.contiguous()
    bias_ = None if bias is None else bias.contiguous()
    grad = torch.cat([grad_key, grad_value], -1).contiguous()  # cat keeps channels_last
    logits, dz = scratch(heads, rest, slots), x.new_empty((heads, rest, slots))
    most, total = scratch(heads, slots), scratch(heads, slots)
    sizes = (slots, rest, taps, width)
    with torch.cuda.device_of(tokens):
        tile = _tile(tokens)
        tile.pop("BLOCK_C")
        tiles = triton.cdiv(slots, tile["BLOCK_M"])
        kv_fuse_logits_kernel[(heads * tiles,)](x, filters, bias_, logits, most, total, *sizes, tiles, **tile)
        tile = configs.tile("kv_fuse_backward", x.device, features=width, element_size=x.element_size())
        tiles, over_slots = triton.cdiv(rest, tile["BLOCK_S"]), triton.cdiv(slots, tile["BLOCK_M"])
        of_along, of_gate, of_bias = (scratch(heads * tiles, slots) for _ in range(3))
        grid = (heads * tiles, over_slots)
        kv_fuse_sums_kernel[grid](grad, x, pick, logits, most, total, of_along, of_gate, *sizes, tiles, **tile)
        along = of_along.view(heads, tiles, slots).sum(1)
        kv_fuse_logit_gradient_kernel[grid](
            grad, x, gate, logits, most, total, along, dz, of_bias, *sizes, tiles, **tile
        )
        blocks = triton.cdiv(taps * width, tile["BLOCK_K"])
        splits, each = share(heads * tiles, 1, blocks * over_slots)
        parts = to_weight if splits == 1 else scratch(splits, to_weight.numel())
        kv_fuse_weight_gradient_kernel[(blocks, over_slots, splits)](
            x, dz, parts, heads, *sizes, tiles, each, to_weight.numel(), **tile
        )
        sum_splits(parts, to_weight)
        if to_tokens:
            tiles = triton.cdiv(padded, tile["BLOCK_S"])
            kv_fuse_token_gradient_kernel[(heads * tiles, triton.cdiv(width, tile["BLOCK_K"]))](
                grad, filters, gate, pick, logits, most, total, dz, to_x, *sizes, tiles, **tile
            )
    to_bias = tokens.new_empty((0,)) if bias is None else of_bias.sum(0).to(bias.dtype)
    return to_x, to_weight, to_bias, of_gate.sum().reshape(gate.shape).to(gate.dtype)
