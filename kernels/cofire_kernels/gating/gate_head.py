# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Softmax over the features, linear layer, threshold and compaction: a tiled kernel and one program per sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.numerics import dot
from cofire_kernels.selection import compact
from cofire_kernels.selection.compact import store_compact
from cofire_kernels.selection.order import LONGEST_ROW, sort_descending, sort_keys


@triton.jit
def gate_head_forward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    logits_ptr,
    samples,
    features,
    channels,
    stride_xn,
    stride_xk,
    stride_wm,
    stride_wk,
    SOFTMAX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += sample[:, None] * stride_xn
    w_ptr += channel[None, :] * stride_wm
    has_sample, has_channel = sample < samples, channel < channels

    # The features are a few kilobytes: reading them three times from cache is cheaper than rescaling accumulators.
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    if SOFTMAX:
        for start in range(0, features, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = has_sample[:, None] & (k < features)[None, :]
            x = tl.load(x_ptr + k.to(tl.int64)[None, :] * stride_xk, mask=inside, other=float("-inf"))
            peak = tl.maximum(peak, tl.max(x.to(tl.float32), 1))
        peak = tl.where(has_sample, peak, 0.0)
        for start in range(0, features, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = has_sample[:, None] & (k < features)[None, :]
            x = tl.load(x_ptr + k.to(tl.int64)[None, :] * stride_xk, mask=inside, other=float("-inf"))
            total += tl.sum(tl.exp(x.to(tl.float32) - peak[:, None]), 1)
        total = tl.where(has_sample, total, 1.0)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_features = k < features
        offset = k.to(tl.int64)
        inside = has_sample[:, None] & in_features[None, :]
        x = tl.load(x_ptr + offset[None, :] * stride_xk, mask=inside, other=0).to(tl.float32)
        if SOFTMAX:
            x = tl.where(inside, tl.exp(x - peak[:, None]) / total[:, None], 0.0)
        inside = in_features[:, None] & has_channel[None, :]
        w = tl.load(w_ptr + offset[:, None] * stride_wk, mask=inside, other=0).to(tl.float32)
        acc = dot(x, w, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=has_channel, other=0).to(tl.float32)[None, :]
    out_ptr = logits_ptr + sample[:, None] * channels + channel[None, :]
    tl.store(out_ptr, acc.to(logits_ptr.dtype.element_ty), mask=has_sample[:, None] & has_channel[None, :])


@triton.jit
def gate_head_select_kernel(logits_ptr, mask_ptr, index_ptr, count_ptr, channels, min_keep, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * channels
    channel = tl.arange(0, BLOCK_C)
    inside = channel < channels
    logit = tl.load(logits_ptr + row + channel, mask=inside, other=0).to(tl.float32)
    keep = inside & (logit > 0)
    if tl.sum(keep.to(tl.int32), 0) < min_keep:  # rare: only then is the order needed
        key = sort_keys(logit, channel, inside)
        ordered = sort_descending(key, BLOCK_C)
        least = tl.sum(tl.where(channel == min_keep - 1, ordered, 0), 0)
        keep = inside & (key >= least)
    tl.store(mask_ptr + row + channel, keep, mask=inside)
    count = store_compact(index_ptr + row, keep, channel, inside, channels, 0)
    tl.store(count_ptr + tl.program_id(0).to(tl.int64), count)


def gate_head_plan(*args) -> str:
    """What :func:`gate_head` does with these arguments."""
    if args[1].shape[0] > LONGEST_ROW:
        return f"logits; the mask by torch operators: more than {LONGEST_ROW} channels"
    return "logits; the mask by one program per sample"


def gate_head(
    pooled: Tensor, weight: Tensor, bias: Tensor | None, softmax: bool, min_keep: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples, features = pooled.shape
    channels = weight.shape[0]
    logits = torch.empty((samples, channels), dtype=pooled.dtype, device=pooled.device)
    if logits.numel():
        with torch.cuda.device_of(pooled):
            tile = configs.tile("gate_head", pooled.device, samples=samples, features=features)
            grid = (triton.cdiv(samples, tile["BLOCK_N"]), triton.cdiv(channels, tile["BLOCK_M"]))
            gate_head_forward_kernel[grid](
                pooled,
                weight,
                None if bias is None else bias.contiguous(),
                logits,
                samples,
                features,
                channels,
                *pooled.stride(),
                *weight.stride(),
                SOFTMAX=softmax,
                **tile,
            )
    return logits, *_select(logits, min_keep)


def _select(logits: Tensor, min_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    samples, channels = logits.shape
    if logits.numel() == 0 or channels > LONGEST_ROW:  # one program cannot sort the row
        mask = logits > 0
        if min_keep:
            best = logits.sort(dim=1, descending=True, stable=True).indices[:, :min_keep]
            filled = mask.scatter(1, best, True)
            mask = torch.where((mask.sum(1) < min_keep)[:, None], filled, mask)
        return mask, *compact(mask)
    mask = torch.empty((samples, channels), dtype=torch.bool, device=logits.device)
    index = torch.empty((samples, channels), dtype=torch.int32, device=logits.device)
    count = torch.empty((samples,), dtype=torch.int32, device=logits.device)
    with torch.cuda.device_of(logits):
        tile = configs.tile("mass_mask", logits.device, columns=channels)
        block = max(triton.next_power_of_2(channels), 16)
        gate_head_select_kernel[(samples,)](logits, mask, index, count, channels, min_keep, BLOCK_C=block, **tile)
    return mask, index, count
