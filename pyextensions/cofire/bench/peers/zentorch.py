# SPDX-License-Identifier: Apache-2.0
"""zentorch (AMD): products of 8-bit rows with 8-bit rows or with 4-bit weights, and of bfloat16 with 4-bit weights.

Scales of 4-bit weights must be contiguous, groups first: a transposed view is read as if it were not transposed. Weights of 8
bits are given as they are, for the library to pack: of one packed by its own function, with more than 2,048 columns, the
answer is another. First calls are not timed: what it made of a weight once cannot be unmade.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._products import HALF, Product, rows_of_half
from cofire.bench.peers._zentorch import lent, needs_avx512, operators, packed


def _bytes(*args: Any) -> Run:
    p = Product(*args)
    weight, scale = lent(p, p.signed()), p.scale.t().float().contiguous()
    return functools.partial(operators().zentorch_dynamic_qlinear, p.input, weight, scale, None)


def _bytes_by_4_bits(*args: Any) -> Run:
    """It takes rows of bfloat16."""
    p, ops = Product(*args), operators()
    weight = lent(p, ops.zentorch_woq_repack_weight(p.signed()).view(torch.int8))
    scale = p.scale.t().float().contiguous()
    return lambda: ops.zentorch_dynamic_qlinear(p.input.to(HALF), weight, scale, None)


def _weight_only(*args: Any) -> Run:
    p, ops = Product(*args), operators()
    scale = p.scale.to(HALF).t().contiguous()
    return functools.partial(ops.zentorch_woq_linear, p.input, packed(p), scale, None, None)


def find(case: Case) -> Mapping[str, Provider] | None:
    f, own = case.facts, functools.partial(Provider, differentiable=False, first=False)
    int8 = f.get("activations") == "int8"
    if case.op != "qlinear" or f["format"] != "uniform":
        return None
    if f["bits"] == 8 and f["group_size"] is None and int8:
        return {"8 bits": own(_bytes)}
    if f["bits"] != 4 or f["group_size"] is None or not (int8 or case.dtype == HALF):
        return None
    return {"4 bits": own(_bytes_by_4_bits, reference=rows_of_half) if int8 else own(_weight_only)}


PEER = Peer("zentorch", find, {"zentorch": "zentorch"}, reason=needs_avx512)
