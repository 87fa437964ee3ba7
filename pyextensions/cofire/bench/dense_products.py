# SPDX-License-Identifier: Apache-2.0
"""A library's products with a dense weight, in fp32 and bfloat16: what quantised and sparse weights are compared with.

The weight is what an operator's arguments stand for, decoded before time counts. What comes in is converted, if it must be,
at every call; a product in bfloat16 leaves its result so, and is checked against its own rounding (:func:`in_half`) where the
input is not in bfloat16 itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.bench.cases import Provider, Run

FLOAT, HALF, WIDE = torch.float32, torch.bfloat16, torch.float64
SAME_DTYPE = "peer:dense fp32"  #: of an input in fp32, where the fastest dense product may be one in bfloat16
Weight = Callable[..., Tensor]  #: of an operator's arguments, of which the input is the first: ``[N, K]`` in fp32


def has_half(rows: int) -> bool:
    """Whether bfloat16 products are worth trying: without a library for them they take seconds (by AVX2, 64 rows: five)."""
    return rows <= 4 or torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_half(input: Tensor, weight: Tensor) -> Tensor:
    """The product with input and weight rounded to bfloat16, and so is the result, unless the input is in fp64."""
    y = input.to(HALF).double() @ weight.to(HALF).double().t()
    return y if input.dtype == WIDE else y.to(HALF)


def plainly(weight: Weight, dtype: torch.dtype) -> Callable[..., Run]:
    """The product as its users write it."""

    def setup(*args: Any) -> Run:
        x, w = args[0], weight(*args).to(dtype)
        to = x.dtype
        if to == dtype:
            return functools.partial(F.linear, x, w)
        if dtype == HALF:
            return lambda: F.linear(x.to(dtype), w)
        return lambda: F.linear(x.to(dtype), w).to(to)

    return setup


def packed(weight: Weight, dtype: torch.dtype) -> Callable[..., Run]:
    """The same by oneDNN with the weight packed for this number of rows: what a frozen ``torch.compile`` runs."""

    def setup(*args: Any) -> Run:
        onednn, x = torch.ops.mkldnn, args[0]
        to = x.dtype
        w = onednn._reorder_linear_weight(weight(*args).to(dtype), x.shape[0])
        if dtype == HALF:
            return lambda: onednn._linear_pointwise(x.to(dtype), w, None, "none", [], "")
        return lambda: onednn._linear_pointwise(x.to(dtype), w, None, "none", [], "").to(to)

    return setup


def dense_products(
    weight: Weight,
    rows: int,
    stored: float,
    half: bool,
    *,
    exact: Callable[..., Tensor] | None = None,
    rounded: Callable[..., Tensor] | None = None,
) -> dict[str, Provider]:
    """``fp32`` and ``bf16``, as they are and ``packed``.

    Args:
        weight: of the operator's arguments.
        rows: of the input.
        stored: bytes that the operator keeps for an entry of the weight.
        half: whether products in bfloat16 are among them, where such are fast.
        exact, rounded: what those in fp32 and in bfloat16 compute, where that is not what the operator does.
    """
    cpu: dict[str, Any] = {"devices": ("cpu",), "differentiable": False}
    found = {
        "fp32": Provider(plainly(weight, FLOAT), reference=exact, expansion=4 / stored),
        "fp32 packed": Provider(packed(weight, FLOAT), reference=exact, expansion=4 / stored, **cpu),
    }
    if half and has_half(rows):
        found["bf16"] = Provider(plainly(weight, HALF), reference=rounded, expansion=2 / stored)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            found["bf16 packed"] = Provider(packed(weight, HALF), reference=rounded, expansion=2 / stored, **cpu)
    return found
