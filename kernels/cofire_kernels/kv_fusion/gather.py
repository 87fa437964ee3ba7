# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Tokens of a cache to where they stay, and side by side for their fusion, in one launch: rows move, nothing else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs


@triton.jit
def kv_gather_kernel(
    key_ptr, value_ptr, heavy_index_ptr, rest_index_ptr, heavy_key_ptr, heavy_value_ptr, tokens_ptr,
    heads, tokens, heavy, rest, padding, width, heavy_tiles, blocks,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_hkb, stride_hkh, stride_hks, stride_hkd, stride_hvb, stride_hvh, stride_hvs, stride_hvd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program moves a tile of heavy hitters, or writes a tile of the rest. An index outside counts as a row of zeros."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    b, h = row // heads, row % heads
    is_heavy = block < heavy_tiles
    slot = tl.where(is_heavy, block, block - heavy_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    from_ptr = tl.where(is_heavy, heavy_index_ptr + row * heavy, rest_index_ptr + row * rest)
    place = tl.where(is_heavy, slot, slot - padding)
    count = tl.where(is_heavy, heavy, rest)
    token = tl.load(from_ptr + place, mask=(place >= 0) & (place < count), other=-1).to(tl.int64)
    found = (token >= 0) & (token < tokens)
    key_ptr += b * stride_kb + h * stride_kh
    value_ptr += b * stride_vb + h * stride_vh
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = found[:, None] & (d < width)[None, :]
        key = tl.load(key_ptr + token[:, None] * stride_ks + d[None, :], mask=inside, other=0)
        value = tl.load(value_ptr + token[:, None] * stride_vs + d[None, :], mask=inside, other=0)
        if is_heavy:
            inside = (slot < heavy)[:, None] & (d < width)[None, :]
            to_key = slot[:, None].to(tl.int64) * stride_hks + d[None, :].to(tl.int64) * stride_hkd
            tl.store(heavy_key_ptr + b * stride_hkb + h * stride_hkh + to_key, key, mask=inside)
            to_value = slot[:, None].to(tl.int64) * stride_hvs + d[None, :].to(tl.int64) * stride_hvd
            tl.store(heavy_value_ptr + b * stride_hvb + h * stride_hvh + to_value, value, mask=inside)
        else:
            inside = (slot < rest + 2 * padding)[:, None] & (d < width)[None, :]
            to = tokens_ptr + (row * (rest + 2 * padding) + slot[:, None]) * (2 * width) + d[None, :]
            tl.store(to, key, mask=inside)
            tl.store(to + width, value, mask=inside)


def dense_rows(x: Tensor) -> Tensor:
    """``x`` itself where a row's values are neighbours, else a copy: parts of a larger cache are read where they are."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def kv_gather_(
    heavy_key: Tensor, heavy_value: Tensor, key: Tensor, value: Tensor, heavy_index: Tensor, rest_index: Tensor,
    padding: int,
) -> Tensor:  # fmt: skip
    (b, heads, tokens, width), heavy, rest = key.shape, heavy_index.shape[2], rest_index.shape[2]
    out = torch.empty((b, heads, rest + 2 * padding, 2 * width), dtype=key.dtype, device=key.device)
    tile = configs.tile("kv_gather_", key.device, features=width)
    heavy_tiles, rest_tiles = (triton.cdiv(n, tile["BLOCK_N"]) for n in (heavy, rest + 2 * padding))
    blocks = heavy_tiles + rest_tiles
    if b * heads * blocks * width:
        key, value = dense_rows(key), dense_rows(value)
        with torch.cuda.device_of(key):
            kv_gather_kernel[(b * heads * blocks,)](
                key, value, heavy_index.contiguous(), rest_index.contiguous(), heavy_key, heavy_value, out,
                heads, tokens, heavy, rest, padding, width, heavy_tiles, blocks,
                *key.stride()[:3], *value.stride()[:3], *heavy_key.stride(), *heavy_value.stride(), **tile,
            )  # fmt: skip
    return out
