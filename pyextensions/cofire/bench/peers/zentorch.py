# SPDX-License-Identifier: Apache-2.0
"""zentorch (AMD): products of 8-bit rows with 8-bit rows, of 4-bit weights with bfloat16, and of bfloat16, all packed.

Scales of a 4-bit weight must be contiguous, groups first: a transposed view is read as if it were not transposed. Its first
calls are not timed: what it made of a weight once cannot be unmade.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._products import HALF, Product
from cofire.bench.peers._zentorch import needs_avx512, operators, packed
from cofire.registry import OPERATORS


def _dynamic(*args: Any) -> Run:
    p, ops = Product(*args), operators()
    weight = ops.zentorch_weight_prepack_for_dynamic_qlinear(p.signed())
    scale = p.scale.t().float().contiguous()
    return functools.partial(ops.zentorch_dynamic_qlinear, p.input, weight, scale, None, is_weight_prepacked=True)


def _weight_only(*args: Any) -> Run:
    p, ops = Product(*args), operators()
    scale = p.scale.to(HALF).t().contiguous()
    return functools.partial(ops.zentorch_woq_linear, p.input, packed(p), scale, None, None)


def _decoded(*args: Any) -> Run:
    p, ops = Product(*args), operators()
    weight = OPERATORS["dequantize"](*p[1:6], p.bits, p.group_size, p.shape[1])
    weight = ops.zentorch_weight_prepack_for_linear(weight.to(HALF))
    return functools.partial(ops.zentorch_linear_unary, p.input, weight, is_weight_prepacked=True)


def find(case: Case) -> Mapping[str, Provider] | None:
    f = case.facts
    if case.op != "qlinear":
        return None
    if f["activations"] == "int8":
        bytes_ = f["format"] == "uniform" and f["bits"] == 8 and f["group_size"] is None
        return {"8 bits": Provider(_dynamic, differentiable=False)} if bytes_ else None
    if case.dtype != HALF:
        return None
    found = {"bfloat16": Provider(_decoded, differentiable=False, expansion=16 / f["bits"])}
    if f["format"] == "uniform" and f["bits"] == 4 and f["group_size"] is not None:
        found["4 bits"] = Provider(_weight_only, differentiable=False, first=False)
    return found


PEER = Peer("zentorch", find, {"zentorch": "zentorch"}, reason=needs_avx512)
