# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of softmax attention with binary queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cofire.bench.cases import Args, Case, Provider, Random, Run
from cofire.bench.shift_add_attention import pack, unpack

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As it is written out."""
    return torch.softmax(scale * (query @ key.transpose(-1, -2)), -1) @ value


def by_library(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def of_signs(attend: Attend, compile: bool = False) -> Provider:
    """Attention of floats -1 and 1, which are there before time counts; their gradient goes to the links."""

    def setup(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_link: Tensor,
        key_link: Tensor,
        bits: int,
        scale: float,
        *_: Any,
    ) -> Run:
        q, k = (2 * unpack(codes, bits, value.dtype) - 1 for codes in (query, key))
        run = torch.compile(attend, dynamic=False) if compile else attend

        def call() -> Tensor:
            if not torch.is_grad_enabled():
                return run(q, k, value, scale)
            return run(q + 2 * query_link, k + 2 * key_link, value, scale)

        return call

    return Provider(setup)


def _softmax(b: int, h: int, n: int, d: int, bits: int, precision: str, **options: Any) -> Case:
    def args(b: int, n: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            query, key = (pack(rand.uniform(b, h, n, bits) < 0.5) for _ in range(2))
            links = [torch.zeros(b, h, n, bits) for _ in range(2)]
            return query, key, rand.normal(b, h, n, d), *links, bits, 1 / math.sqrt(bits), "sign", False, precision

        return make

    return Case(
        "binary_softmax_attention",
        f"{b}x{h}x{n}x{d}, {bits} bits, {precision}",
        torch.float32,
        args(b, n),
        {
            "eager": of_signs(by_products),
            "dense": {"library": of_signs(by_library), "products": of_signs(by_products)},
            "compile": of_signs(by_products, compile=True),
        },
        args(1, 9),
        gradients=(2, 3, 4),
        rounding=torch.float16 if precision == "high" else None,
        facts={"precision": precision},
        **options,
    )


#: The first stage of PVTv2 with a head of 64, a decoder's context, and DeiT-T.
CASES = [
    _softmax(1, 1, 3136, 64, 64, "high", overhead=True),
    _softmax(1, 1, 3136, 64, 64, "highest"),
    _softmax(1, 8, 1024, 64, 64, "high"),
    _softmax(1, 8, 1024, 64, 64, "highest"),
    _softmax(8, 3, 197, 64, 64, "high", quick=True),
    _softmax(8, 3, 197, 64, 64, "highest"),
]
