# SPDX-License-Identifier: Apache-2.0
"""Products with quantised weights by torch's own packed kernels, and by ours with 4 bits where a format claims as much."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Provider, Run
from cofire.bench.peers._products import HALF, Product, decoded, seven_bits
from cofire.ops.lowbit import qlinear
from cofire.ops.qtensor import QTensor
from cofire.ops.quantizers import quantize_weight


def _of_four_bits(p: Product) -> QTensor:
    return quantize_weight(decoded(p).float(), "absmax", bits=4, group_size=min(128, p.shape[1]))


def of_four_bits(*args: Any) -> Tensor:
    """With the weight rounded to our own 4 bits, by groups of 128."""
    p = Product(*args)
    w = _of_four_bits(p).dequantize().to(decoded(p).dtype)
    return (p.input.to(w.dtype) @ w.t()).to(p.input.dtype)


def four_bits(*args: Any) -> Run:
    """Our own product with 4 bits, for formats that claim to be as fast."""
    p = Product(*args)
    q = _of_four_bits(p)
    return functools.partial(qlinear, p.input, q, p.bias, activations=p.activations)


def int4pack(*args: Any) -> Run:
    """torch's 4-bit product; scale and zero point in the dtype of the input."""
    p = Product(*args)
    scales = torch.stack((p.scale, torch.zeros_like(p.scale)), 2).transpose(0, 1).contiguous().to(p.input.dtype)
    if p.input.is_cuda:
        levels = p.levels().to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(levels[:, ::2] << 4 | levels[:, 1::2], 8)
        return functools.partial(torch.ops.aten._weight_int4pack_mm, p.input, packed, p.group_size, scales)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(p.levels().int(), 1)
    return functools.partial(torch.ops.aten._weight_int4pack_mm_for_cpu, p.input, packed, p.group_size, scales)


def int8pack(*args: Any) -> Run:
    """torch's 8-bit product, one scale for each row."""
    p = Product(*args)
    scales = p.scale[:, 0].to(p.input.dtype)
    return functools.partial(torch.ops.aten._weight_int8pack_mm, p.input, p.signed(), scales)


def int_mm(*args: Any) -> Run:
    """Rows rounded in plain torch, then its product of bytes: the same maths as ours."""
    p = Product(*args)
    weight, scale = p.signed().t(), p.scale[:, 0].float()

    def run() -> Tensor:
        top = p.input.abs().amax(1, keepdim=True).float() / 127
        codes = (p.input / top).round_().to(torch.int8)
        return torch._int_mm(codes, weight).float().mul_(top).mul_(scale).to(p.input.dtype)

    return run


def dynamic(*args: Any) -> Run:
    """torch's dynamically quantised layer: activations of 7 bits, one scale and zero point for all."""
    p = Product(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeros = torch.zeros(p.shape[0], dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(p.signed(), p.scale[:, 0].double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return functools.partial(torch.ops.quantized.linear_dynamic, p.input, packed, True)


def of_torch(
    bits: int, group_size: int | None, dtype: torch.dtype, activations: str, format: str, rows: int
) -> dict[str, Provider]:
    """Those that compute this product; ``group_size`` None is one scale for each row."""
    cpu: dict[str, Any] = {"devices": ("cpu",), "differentiable": False}
    if format in ("S4", "S5"):
        if activations == "int8" and dtype == torch.float32:
            return {"peer:torch-dynamic": Provider(dynamic, reference=seven_bits, **cpu)}
        if activations == "exact" and rows == 1:
            return {"peer:cofire 4 bits": Provider(four_bits, reference=of_four_bits, **cpu)}
    if format != "uniform":
        return {}
    if activations == "int8":
        if group_size is None and bits == 8 and dtype == torch.float32:
            return {"peer:torch-dynamic": Provider(dynamic, reference=seven_bits, **cpu)}
        return {}
    # in fp32 it takes half a second for 32 rows
    if bits == 4 and group_size in (32, 64, 128) and (dtype == HALF or rows <= 16):
        there = ("cpu", "cuda") if dtype == HALF else ("cpu",)
        return {"peer:torch-int4pack": Provider(int4pack, devices=there, differentiable=False)}
    if bits == 8 and group_size is None:
        return {"peer:torch-int8pack": Provider(int8pack, **cpu)}
    return {}
