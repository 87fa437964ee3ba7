# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of softmax attention with binary queries and keys.

Where the precision "high" is asked for, torch's attention in bfloat16 is among the dense providers, checked against its own
rounding of the values: signs are exact in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cofire.bench.cases import Args, Case, Provider, Random, Run
from cofire.bench.dense_products import has_half
from cofire.bench.peers._attention import HALF, of_half, signs
from cofire.bench.shift_add_attention import pack
from cofire.registry import OPERATORS

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As it is written out."""
    return torch.softmax(scale * (query @ key.transpose(-1, -2)), -1) @ value


def by_library(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def of_signs(attend: Attend, compile: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Provider:
    """Attention of floats -1 and 1, which are there before time counts; their gradient goes to the links.

    So are values in ``dtype``, but where they are trained: then they are converted at every call.
    """

    def setup(*args: Any) -> Run:
        q, k, value, scale = signs(*args)
        query_link, key_link = args[3:5]
        query, key, fixed = (x.to(dtype) for x in (q, k, value))
        run = torch.compile(attend, dynamic=False) if compile else attend

        def call() -> Tensor:
            if not torch.is_grad_enabled():
                return run(query, key, fixed, scale)
            linked = (q + 2 * query_link).to(dtype), (k + 2 * key_link).to(dtype)
            return run(*linked, value.to(dtype), scale)

        return call

    return Provider(setup, **options)


def _products(*args: Any) -> int:
    formula = OPERATORS["binary_softmax_attention"].flops
    assert formula is not None
    return formula(*args)


def _softmax(b: int, h: int, n: int, d: int, bits: int, precision: str, **options: Any) -> Case:
    def args(b: int, n: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            query, key = (pack(rand.uniform(b, h, n, bits) < 0.5) for _ in range(2))
            links = [torch.zeros(b, h, n, bits) for _ in range(2)]
            return query, key, rand.normal(b, h, n, d), *links, bits, 1 / math.sqrt(bits), "sign", False, precision

        return make

    dense = {"library": of_signs(by_library), "products": of_signs(by_products)}
    if precision == "high" and has_half(n):
        dense["library bf16"] = of_signs(by_library, dtype=HALF, reference=of_half)
    if precision == "high":  # its products may be of 16 bits: the limit is the faster peak
        options["or_flops"] = ("bfloat16", _products)
    return Case(
        "binary_softmax_attention",
        f"{b}x{h}x{n}x{d}, {bits} bits, {precision}",
        torch.float32,
        args(b, n),
        {
            "eager": of_signs(by_products),
            "dense": dense,
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
