# SPDX-License-Identifier: Apache-2.0
"""ggml, the products of llama.cpp: Q4_0 and Q8_0, activations rounded to 8 bits by blocks; as pywhispercpp's wheel has it.

Longer groups are stored as several blocks of the same scale. Q4_0 is also stored in the order that products on this CPU
want. The wheel is built for AVX2; llama.cpp built for AVX-512 is faster.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from cofire.bench.cases import Case, Provider
from cofire.bench.peers import Peer
from cofire.bench.peers._ggml import BLOCK, by_blocks, library, product


def find(case: Case) -> Mapping[str, Provider] | None:
    f = case.facts
    if case.op != "qlinear" or f["format"] != "uniform" or f["activations"] != "int8" or case.dtype != torch.float32:
        return None
    if f["bits"] not in (4, 8) or f["group_size"] is None or f["group_size"] % BLOCK:
        return None
    own = functools.partial(Provider, reference=by_blocks, differentiable=False, own_threads=True)
    orders = {"as stored": False} | ({"repacked": True} if f["bits"] == 4 else {})
    return {name: own(functools.partial(product, library, repacked)) for name, repacked in orders.items()}


PEER = Peer("ggml", find, {"pywhispercpp": "pywhispercpp"})
