# SPDX-License-Identifier: Apache-2.0
"""zentorch (AMD): products of bfloat16 with the decoded weight, packed: a dense product, by another library than torch's."""

from __future__ import annotations

import functools
from typing import Any

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._products import HALF, Product
from cofire.bench.peers._zentorch import needs_avx512, operators
from cofire.registry import OPERATORS


def _decoded(*args: Any) -> Run:
    p, ops = Product(*args), operators()
    weight = OPERATORS["dequantize"](*p[1:6], p.bits, p.group_size, p.shape[1])
    weight = ops.zentorch_weight_prepack_for_linear(weight.to(HALF))
    return functools.partial(ops.zentorch_linear_unary, p.input, weight, is_weight_prepacked=True)


def find(case: Case) -> Provider | None:
    if case.op != "qlinear" or case.facts["activations"] != "exact" or case.dtype != HALF:
        return None
    return Provider(_decoded, differentiable=False, expansion=16 / case.facts["bits"])


PEER = Peer("zentorch dense", find, {"zentorch": "zentorch"}, reason=needs_avx512)
