# SPDX-License-Identifier: Apache-2.0
"""What libraries of attention are given: keys for every head, a mask, signs as floats; and what they compute in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cofire.bench.kv_fusion_attention import hidden
from cofire.bench.kv_fusion_attention import repeated as heads_of
from cofire.bench.shift_add_attention import unpack
from cofire.registry import OPERATORS

__all__ = ["heads_of", "hidden", "of_half", "signs"]

HALF = torch.bfloat16


def signs(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, float]:
    """The arguments of ``binary_softmax_attention`` as those of any attention, and its scale."""
    _, _, bits, scale, *_ = rest
    q, k = (2 * unpack(codes, bits, value.dtype) - 1 for codes in (query, key))
    return q, k, value, scale


def of_half(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """``binary_softmax_attention`` of values rounded to bfloat16, and so is the result, unless the values are in fp64."""
    y: Tensor = OPERATORS["binary_softmax_attention"].reference(query, key, value.to(HALF).to(value.dtype), *rest)
    return y if value.dtype == torch.float64 else y.to(HALF)
