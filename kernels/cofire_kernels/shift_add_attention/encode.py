# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Tokens to binary codes, and the straight-through gradients. Neither features nor distances are stored.

What depends on all tokens of a head (its mean distance, its mean feature) is summed by chunks of them, which whoever reads
the sums adds up, so every run gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.numerics import dot, maximum
from cofire_kernels.shift_add_attention.linear import load_rows, store_rows
from cofire_kernels.shift_add_attention.scores import features, width_of, word_of

#: The most features of a token that one program holds, and the most numbers of all anchors, each padded.
MOST_FEATURES, MOST_HELD = 256, 8192
#: The least sigma of a hash, as in ``cofire.ops.shift_add_attention``.
SIGMA_FLOOR = tl.constexpr(1e-12)


@triton.jit
def unit_rows(x, eps):
    """Rows divided by their norms, which are at least eps; and these norms. Rounded as torch does: codes are compared."""
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    return tl.div_rn(x, maximum(norm, eps)[:, None] + tl.zeros_like(x)), norm


@triton.jit
def through_norm(to_unit, unit, norm, eps):
    """The gradient of rows, from that of the unit rows."""
    along = tl.where(norm >= eps, tl.sum(unit * to_unit, 1), 0.0)
    return (to_unit - unit * along[:, None]) / maximum(norm, eps)[:, None]


@triton.jit
def store_bits(ptr, token, tokens, bits, WIDTH: tl.constexpr):
    """Words of zeros and ones ``[tokens, WIDTH]``."""
    place = tl.arange(0, WIDTH).to(tl.int64)
    words = tl.sum(bits.to(tl.int64) << place[None, :], 1)
    tl.store(ptr + token, words.to(ptr.dtype.element_ty), mask=token < tokens)


@triton.jit
def hash_sums_kernel(
    input_ptr, sums_ptr, squares_ptr, tokens, width, parts, eps,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of the unit rows of a chunk the sum, and that of their squares."""
    head, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    d = tl.arange(0, BLOCK_D)
    total, square = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(part * CHUNK, tl.minimum((part + 1) * CHUNK, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        unit, _ = unit_rows(load_rows(input_ptr + head * tokens * width, n, tokens, d, width).to(tl.float32), eps)
        total += tl.sum(unit, 0)
        square += tl.sum(unit * unit, 0)
    place = head * parts + part
    tl.store(sums_ptr + place * width + d, total, mask=d < width)
    tl.store(squares_ptr + place, tl.sum(square, 0))


@triton.jit
def sigma_of(a, sums_ptr, squares_ptr, tokens, anchors, width, parts, d):
    """The mean squared distance of all tokens of a head from all anchors, from the means alone."""
    total, square = tl.load(sums_ptr + d, mask=d < width, other=0), tl.load(squares_ptr)
    for part in range(1, parts):
        total += tl.load(sums_ptr + part * width + d, mask=d < width, other=0)
        square += tl.load(squares_ptr + part)
    rows = square / tokens + tl.sum(tl.sum(a * a, 1), 0) / anchors
    products = tl.sum((total / tokens) * (tl.sum(a, 0) / anchors), 0)
    return maximum(rows - 2.0 * products, SIGMA_FLOOR)


@triton.jit
def distances(unit, a, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr):
    """Squared, of each row from each anchor, without the differences."""
    products = dot(unit, tl.trans(a), tl.zeros([BLOCK_N, BLOCK_A], tl.float32))
    return tl.sum(unit * unit, 1)[:, None] + tl.sum(a * a, 1)[None, :] - 2.0 * products


@triton.jit
def hash_encode_kernel(
    input_ptr, anchors_ptr, center_ptr, projection_ptr, sums_ptr, squares_ptr, codes_ptr, gate_ptr, sigma_ptr,
    tokens, width, heads, anchors, parts, tiles, eps,
    BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    kind = head % heads
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d, anchor, bit = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_A), tl.arange(0, WIDTH)
    a = load_rows(anchors_ptr + kind * anchors * width, anchor, anchors, d, width).to(tl.float32)
    sums_ptr += head * parts * width
    sigma = sigma_of(a, sums_ptr, squares_ptr + head * parts, tokens, anchors, width, parts, d)
    tl.store(sigma_ptr + head, sigma, mask=tile == 0)
    unit, _ = unit_rows(load_rows(input_ptr + head * tokens * width, n, tokens, d, width).to(tl.float32), eps)
    center = tl.load(center_ptr + kind * anchors + anchor, mask=anchor < anchors, other=0).to(tl.float32)
    kernel = tl.exp(-distances(unit, a, BLOCK_N, BLOCK_A) / (2.0 * sigma)) - center[None, :]
    p = load_rows(projection_ptr + kind * BITS * anchors, bit, BITS, anchor, anchors).to(tl.float32)
    found = dot(kernel, tl.trans(p), tl.zeros([BLOCK_N, WIDTH], tl.float32))
    above = (found > 0) & (bit < BITS)[None, :]
    store_bits(codes_ptr + head * tokens, n, tokens, above, WIDTH)
    store_bits(gate_ptr + head * tokens, n, tokens, above & (found < 1), WIDTH)


@triton.jit
def weighted_kernels(
    grad_ptr, gate_ptr, projection_ptr, unit, a, n, tokens, anchors, sigma,
    BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The values of the kernel times their gradients, and the distances."""
    bit, anchor = tl.arange(0, WIDTH), tl.arange(0, BLOCK_A)
    grad = load_rows(grad_ptr, n, tokens, bit, BITS).to(tl.float32)
    grad = tl.where(features(gate_ptr, n, tokens, BITS, WIDTH, False) > 0, grad, 0.0)
    p = load_rows(projection_ptr, bit, BITS, anchor, anchors).to(tl.float32)
    distance = distances(unit, a, BLOCK_N, BLOCK_A)
    to_kernel = dot(grad, p, tl.zeros([BLOCK_N, BLOCK_A], tl.float32))
    return tl.exp(-distance / (2.0 * sigma)) * to_kernel, distance


@triton.jit
def hash_sigma_gradient_kernel(
    grad_ptr, input_ptr, anchors_ptr, projection_ptr, gate_ptr, sigma_ptr, moments_ptr,
    tokens, width, heads, anchors, parts, eps,
    BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What all tokens of a chunk tell sigma: the sum of weighted distances."""
    head, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    d, anchor = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_A)
    kind, sigma = head % heads, tl.load(sigma_ptr + head)
    a = load_rows(anchors_ptr + kind * anchors * width, anchor, anchors, d, width).to(tl.float32)
    acc = tl.zeros([BLOCK_A], tl.float32)
    for start in range(part * CHUNK, tl.minimum((part + 1) * CHUNK, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        unit, _ = unit_rows(load_rows(input_ptr + head * tokens * width, n, tokens, d, width).to(tl.float32), eps)
        weighted, distance = weighted_kernels(
            grad_ptr + head * tokens * BITS, gate_ptr + head * tokens, projection_ptr + kind * BITS * anchors,
            unit, a, n, tokens, anchors, sigma, BITS, WIDTH, BLOCK_A, BLOCK_N,
        )  # fmt: skip
        acc += tl.sum(weighted * distance, 0)
    tl.store(moments_ptr + head * parts + part, tl.sum(acc, 0))


@triton.jit
def hash_gradient_kernel(
    grad_ptr, input_ptr, anchors_ptr, projection_ptr, gate_ptr, sigma_ptr, moments_ptr, out_ptr,
    tokens, width, heads, anchors, parts, tiles, eps,
    BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    d, anchor = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_A)
    kind, sigma = head % heads, tl.load(sigma_ptr + head)
    a = load_rows(anchors_ptr + kind * anchors * width, anchor, anchors, d, width).to(tl.float32)
    moment = tl.load(moments_ptr + head * parts)
    for part in range(1, parts):
        moment += tl.load(moments_ptr + head * parts + part)
    to_sigma = tl.where(sigma > SIGMA_FLOOR, moment / (2.0 * sigma * sigma), 0.0)
    unit, norm = unit_rows(load_rows(input_ptr + head * tokens * width, n, tokens, d, width).to(tl.float32), eps)
    weighted, _ = weighted_kernels(
        grad_ptr + head * tokens * BITS, gate_ptr + head * tokens, projection_ptr + kind * BITS * anchors,
        unit, a, n, tokens, anchors, sigma, BITS, WIDTH, BLOCK_A, BLOCK_N,
    )  # fmt: skip
    to_distance = to_sigma / anchors / tokens - weighted / (2.0 * sigma)
    to_distance = tl.where((anchor < anchors)[None, :], to_distance, 0.0)
    to_unit = tl.sum(to_distance, 1)[:, None] * unit - dot(to_distance, a, tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
    store_rows(out_ptr + head * tokens * width, n, tokens, d, width, through_norm(2.0 * to_unit, unit, norm, eps))


@triton.jit
def binary_encode_kernel(
    input_ptr, bound_ptr, codes_ptr, sums_ptr, tokens, width, heads, parts, eps,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a chunk of tokens the codes, where there is a bound, and the sum of all unit features, where it is asked for."""
    head, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    d = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float64)  # equal features have to have a mean that none of them is above
    bound = 0.0
    if codes_ptr is not None:
        bound = tl.load(bound_ptr + head % heads).to(tl.float32)
    for start in range(part * CHUNK, tl.minimum((part + 1) * CHUNK, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        unit, _ = unit_rows(load_rows(input_ptr + head * tokens * width, n, tokens, d, width).to(tl.float32), eps)
        if codes_ptr is not None:
            store_bits(codes_ptr + head * tokens, n, tokens, (unit > bound) & (d < width)[None, :], WIDTH)
        total += tl.sum(unit.to(tl.float64), 0)
    if sums_ptr is not None:
        tl.store(sums_ptr + head * parts + part, tl.sum(total, 0))


@triton.jit
def binary_gradient_kernel(
    grad_ptr, input_ptr, out_ptr, rows, width, eps, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, WIDTH)
    unit, norm = unit_rows(load_rows(input_ptr, n, rows, d, width).to(tl.float32), eps)
    grad = load_rows(grad_ptr, n, rows, d, width).to(tl.float32)
    passed = tl.where((unit >= 0) & (unit <= 1), grad, 0.0)
    store_rows(out_ptr, n, rows, d, width, through_norm(passed, unit, norm, eps))


def _tile(input: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """The launch options of kernels that go over a chunk of tokens, and of those that take a tile of them."""
    whole = configs.tile("binary_codes", input.device, features=input.shape[-1])
    return whole, {name: option for name, option in whole.items() if name != "CHUNK"}


def _block(size: int) -> int:
    return int(triton.next_power_of_2(max(size, 16)))


def _too_much(input: Tensor, anchors: Tensor, *tensors: Tensor) -> bool:
    """Whether this is for plain torch: fp64 that is to be computed in, or more than a program holds."""
    wide = any(t.dtype == torch.float64 for t in (input, anchors, *tensors))
    return wide or _block(input.shape[3]) * _block(anchors.shape[1]) > MOST_HELD


def hash_encode(
    input: Tensor, anchors: Tensor, center: Tensor, projection: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, h, tokens, width), (bits, count) = input.shape, projection.shape[1:]
    if not input[..., 0].numel() or _too_much(input, anchors, center, projection):
        args = (input, anchors, center, projection, eps)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.cofire.hash_encode.reference(*args)
        return found
    codes, gate = (torch.empty((b, h, tokens), dtype=word_of(bits), device=input.device) for _ in range(2))
    link, sigma = input.new_zeros(()).expand(b, h, tokens, bits), codes.new_empty((b, h), dtype=torch.float32)
    input, anchors, center, projection = (t.contiguous() for t in (input, anchors, center, projection))
    whole, part = _tile(input)
    parts, tiles, block = triton.cdiv(tokens, whole["CHUNK"]), triton.cdiv(tokens, part["BLOCK_N"]), _block(width)
    sums, squares = sigma.new_empty((b, h, parts, width)), sigma.new_empty((b, h, parts))
    with torch.cuda.device_of(input):
        hash_sums_kernel[(b * h * parts,)](input, sums, squares, tokens, width, parts, eps, BLOCK_D=block, **whole)
        hash_encode_kernel[(b * h * tiles,)](
            input, anchors, center, projection, sums, squares, codes, gate, sigma,
            tokens, width, h, count, parts, tiles, eps,
            BITS=bits, WIDTH=width_of(bits), BLOCK_A=_block(count), BLOCK_D=block, **part,
        )  # fmt: skip
    return link, codes, gate, sigma


def hash_encode_backward(
    grad: Tensor, input: Tensor, anchors: Tensor, projection: Tensor, gate: Tensor, sigma: Tensor, eps: float
) -> Tensor:
    (b, h, tokens, width), (bits, count) = input.shape, projection.shape[1:]
    if not input[..., 0].numel() or _too_much(input, anchors, grad, projection, sigma):
        args = (grad, input, anchors, projection, gate, sigma, eps)
        found: Tensor = torch.ops.cofire.hash_encode_backward.reference(*args)
        return found
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    grad, input, anchors, projection, gate, sigma = (
        t.contiguous() for t in (grad, input, anchors, projection, gate, sigma)
    )
    whole, part = _tile(input)
    parts, tiles = triton.cdiv(tokens, whole["CHUNK"]), triton.cdiv(tokens, part["BLOCK_N"])
    moments = sigma.new_empty((b, h, parts))
    blocks = {"BITS": bits, "WIDTH": width_of(bits), "BLOCK_A": _block(count), "BLOCK_D": _block(width)}
    given = (grad, input, anchors, projection, gate, sigma, moments)
    with torch.cuda.device_of(input):
        hash_sigma_gradient_kernel[(b * h * parts,)](*given, tokens, width, h, count, parts, eps, **blocks, **whole)
        hash_gradient_kernel[(b * h * tiles,)](
            *given, out, tokens, width, h, count, parts, tiles, eps, **blocks, **part
        )  # fmt: skip
    return out


def binary_encode(input: Tensor, threshold: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    b, h, tokens, width = input.shape
    if (
        not input.numel()
        or input.dtype == torch.float64
        or (threshold is not None and threshold.dtype == torch.float64)
    ):
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.cofire.binary_encode.reference(input, threshold, eps)
        return found
    codes = torch.empty((b, h, tokens), dtype=word_of(width), device=input.device)
    link, input = input.new_zeros(()).expand(input.shape), input.contiguous()
    tile, _ = _tile(input)
    parts = triton.cdiv(tokens, tile["CHUNK"])
    sums = torch.empty((b, h, parts), dtype=torch.float64, device=input.device)

    def launch(bound: Tensor | None, codes: Tensor | None, sums: Tensor | None) -> None:
        binary_encode_kernel[(b * h * parts,)](
            input, bound, codes, sums, tokens, width, h, parts, eps, WIDTH=_block(width), **tile
        )  # fmt: skip

    with torch.cuda.device_of(input):
        if threshold is None:
            launch(None, None, sums)
        else:
            launch(threshold.contiguous(), codes, sums)
        mean = sums.sum((0, 2)) / (b * tokens * width)
        if threshold is None:
            launch(mean.float().double().mean().float().expand(h).contiguous(), codes, None)
    return link, codes, mean.float()


def binary_encode_backward(grad: Tensor, input: Tensor, eps: float) -> Tensor:
    width = input.shape[3]
    if torch.float64 in (grad.dtype, input.dtype) or width > MOST_FEATURES:
        found: Tensor = torch.ops.cofire.binary_encode_backward.reference(grad, input, eps)
        return found
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if out.numel():
        rows = out.numel() // width
        grad, input = grad.contiguous(), input.contiguous()
        _, tile = _tile(input)
        with torch.cuda.device_of(input):
            binary_gradient_kernel[(triton.cdiv(rows, tile["BLOCK_N"]),)](
                grad, input, out, rows, width, eps, WIDTH=_block(width), **tile
            )  # fmt: skip
    return out
