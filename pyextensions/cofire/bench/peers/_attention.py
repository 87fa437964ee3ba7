# SPDX-License-Identifier: Apache-2.0
"""What libraries of attention are given: keys for every head, a mask, signs as floats."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cofire.bench.kv_fusion_attention import hidden
from cofire.bench.kv_fusion_attention import repeated as heads_of
from cofire.bench.shift_add_attention import unpack

__all__ = ["heads_of", "hidden", "signs"]


def signs(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, float]:
    """The arguments of ``binary_softmax_attention`` as those of any attention, and its scale."""
    _, _, bits, scale, *_ = rest
    q, k = (2 * unpack(codes, bits, value.dtype) - 1 for codes in (query, key))
    return q, k, value, scale
