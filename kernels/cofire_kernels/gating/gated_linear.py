# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Linear layer per sample that leaves out weights: whole rows of inactive outputs, or whole columns of inactive inputs.

A skipped weight saves time only where it saves bytes, and DRAM delivers 32 of them at once: what is skipped must be
contiguous. So the storage of the weight decides: row-major skips outputs, column-major skips inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.numerics import activate
from cofire_kernels.selection.positions import positions

#: With more samples than this the weights are read from cache once per sample, and the library's GEMM on masked tensors
#: is used. Set by the arithmetic intensity of a matrix-vector product, not by a measurement.
MOST_SAMPLES = 32


@triton.jit
def gated_linear_rows_forward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    in_slot_ptr,
    out_index_ptr,
    out_count_ptr,
    y_ptr,
    in_features,
    out_features,
    stride_xn,
    stride_xk,
    stride_wm,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``w`` row-major: BLOCK_M active rows, every column; ``y`` holds zeros already."""
    sample = tl.program_id(0).to(tl.int64)
    count = tl.load(out_count_ptr + sample)
    slot = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(1) * BLOCK_M >= count:
        return
    active = slot < count
    row = tl.load(out_index_ptr + sample * out_features + slot, mask=active, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live = tl.load(in_slot_ptr + sample * in_features + k, mask=k < in_features, other=-1) >= 0
        x = tl.load(x_ptr + sample * stride_xn + k.to(tl.int64) * stride_xk, mask=live, other=0).to(tl.float32)
        inside = active[:, None] & (k < in_features)[None, :]
        w = tl.load(w_ptr + row[:, None] * stride_wm + k[None, :], mask=inside, other=0).to(tl.float32)
        acc += w * x[None, :]
    y = tl.sum(acc, 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=active, other=0).to(tl.float32)
    y = activate(y, ACTIVATION)
    tl.store(y_ptr + sample * out_features + row, y.to(y_ptr.dtype.element_ty), mask=active)


@triton.jit
def gated_linear_columns_forward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    in_index_ptr,
    in_count_ptr,
    out_slot_ptr,
    y_ptr,
    in_features,
    out_features,
    stride_xn,
    stride_xk,
    stride_wk,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``w`` column-major: the active columns, BLOCK_M neighbouring outputs, zeros written where an output is gated."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < out_features
    active = tl.load(out_slot_ptr + sample * out_features + row, mask=inside, other=-1) >= 0
    count = tl.load(in_count_ptr + sample)
    count = tl.where(tl.max(active.to(tl.int32), 0) > 0, count, 0)  # nothing to compute in this block
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, count, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        used = slot < count
        k = tl.load(in_index_ptr + sample * in_features + slot, mask=used, other=0).to(tl.int64)
        x = tl.load(x_ptr + sample * stride_xn + k * stride_xk, mask=used, other=0).to(tl.float32)
        w = tl.load(w_ptr + row[:, None] + k[None, :] * stride_wk, mask=inside[:, None] & used[None, :], other=0)
        acc += w.to(tl.float32) * x[None, :]
    y = tl.sum(acc, 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=inside, other=0).to(tl.float32)
    y = tl.where(active, activate(y, ACTIVATION), 0.0)
    tl.store(y_ptr + sample * out_features + row, y.to(y_ptr.dtype.element_ty), mask=inside)


def gated_linear_plan(*args) -> str:
    """What :func:`gated_linear` does with these arguments."""
    input, weight = args[:2]
    if input.shape[0] > MOST_SAMPLES:
        return f"library GEMM on masked tensors: more than {MOST_SAMPLES} samples"
    return "skips inactive inputs" if _by_columns(weight) else "skips inactive outputs"


def _by_columns(weight: Tensor) -> bool:
    return weight.stride(0) == 1 and weight.stride(1) != 1


def gated_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor,
    in_count: Tensor,
    out_index: Tensor,
    out_count: Tensor,
    activation: str,
) -> Tensor:
    samples, in_features = input.shape
    out_features = weight.shape[0]
    if samples > MOST_SAMPLES:
        return _masked_library(input, weight, bias, in_index, in_count, out_index, out_count, activation)
    by_columns = _by_columns(weight)
    if not by_columns and weight.stride(1) != 1:
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if samples == 0 or out_features == 0:
        return input.new_empty((samples, out_features))
    name = "gated_linear_columns" if by_columns else "gated_linear_rows"
    tile = configs.tile(name, input.device, out_features=out_features, samples=samples)
    grid = (samples, triton.cdiv(out_features, tile["BLOCK_M"]))
    with torch.cuda.device_of(input):
        if by_columns:
            y = input.new_empty((samples, out_features))
            gated_linear_columns_forward_kernel[grid](
                input,
                weight,
                bias,
                in_index.contiguous(),
                in_count.contiguous(),
                positions(out_index, out_count),
                y,
                in_features,
                out_features,
                *input.stride(),
                weight.stride(1),
                ACTIVATION=activation,
                **tile,
            )
        else:
            y = input.new_zeros((samples, out_features))
            gated_linear_rows_forward_kernel[grid](
                input,
                weight,
                bias,
                positions(in_index, in_count),
                out_index.contiguous(),
                out_count.contiguous(),
                y,
                in_features,
                out_features,
                *input.stride(),
                weight.stride(0),
                ACTIVATION=activation,
                **tile,
            )
    return y


def _masked_library(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor,
    in_count: Tensor,
    out_index: Tensor,
    out_count: Tensor,
    activation: str,
) -> Tensor:
    y = F.linear(input.masked_fill(positions(in_index, in_count) < 0, 0), weight, bias)
    if activation == "relu":
        y = y.relu_()
    elif activation == "relu6":
        y = y.clamp_(0, 6)
    return y.masked_fill_(positions(out_index, out_count) < 0, 0)
