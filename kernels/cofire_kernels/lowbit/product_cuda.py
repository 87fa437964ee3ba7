# SPDX-License-Identifier: Apache-2.0
"""qlinear of few rows with weights of four bits, in CUDA C++ (``csrc/cuda/lowbit.cu``): an alternative to Triton's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cofire_kernels import nvrtc
from cofire_kernels.lowbit.decode import weight_of
from cofire_kernels.lowbit.product import _bytes, _rows, _samples, qlinear, qlinear_plan

MOST_ROWS = 8  # of the input: the width of a tensor core's product
WEIGHT_ROWS = 32  # per thread block
THREADS = 256

KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


def kernel_of(
    samples: int, dtype: torch.dtype, columns: int, bits: int, group: int, lut: Tensor | None, activations: str
) -> str:  # fmt: skip
    """The name of the kernel for such a call; empty where there is none."""
    width = next((w for w in (128, 64, 32) if columns % w == 0 and group % w == 0), 0)
    if bits != 4 or not 1 <= samples <= MOST_ROWS or not width:
        return ""
    if activations == "int8":
        one_table = lut is not None and lut.dtype == torch.int8 and lut.shape[0] == 1
        kind = "s8" if lut is None else "table" if one_table else ""
    else:
        kind = KINDS.get(dtype, "") if lut is None else ""
    return kind and f"qlinear_{kind}_{width}_kernel"


def _kernel(*args: Any) -> str:
    input, lut, bits, group, activations = args[0], args[5], *args[7:10]
    return kernel_of(_samples(input), input.dtype, input.shape[-1], bits, group, lut, activations)


def qlinear_cuda_plan(*args: Any) -> str:
    """What :func:`qlinear_cuda` does with these arguments."""
    return "CUDA C++ on the tensor cores" if _kernel(*args) else f"Triton: {qlinear_plan(*args)}"


def _aligned(t: Tensor) -> Tensor:
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def qlinear_cuda(
    input: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bias: Tensor | None, bits: int, group_size: int, activations: str,
) -> Tensor:  # fmt: skip
    args = (input, codes, scale, zero, offset, lut, bias, bits, group_size, activations)
    name = _kernel(*args)
    rows, columns = codes.shape[0], input.shape[-1]
    if not name or rows == 0:
        return qlinear(*args)
    w = weight_of(codes, scale, zero, offset, None, bits, group_size, columns)
    scale, zero, offset = (None if t is None else t.float().contiguous() for t in (scale, zero, offset))
    x, a, to = _rows(input), None, input.dtype
    if activations == "int8":
        x, a, _ = _bytes(x, 32)
        to = torch.float32
    bias = None if bias is None else bias.to(to).contiguous()
    table = None if lut is None else _aligned(lut)
    y = torch.empty((*input.shape[:-1], rows), dtype=to, device=input.device)
    parts = (_aligned(x), _aligned(codes), scale, zero, offset, bias, a, y, table)
    numbers = (x.shape[0], rows, columns, group_size, *w.sizes[4:])
    blocks = -(-rows // WEIGHT_ROWS)
    nvrtc.launch("lowbit", name, blocks, THREADS, (*(0 if t is None else t for t in parts), *numbers))
    return y.to(input.dtype)
