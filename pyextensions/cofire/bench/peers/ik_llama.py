# SPDX-License-Identifier: Apache-2.0
"""ik_llama.cpp, a branch of llama.cpp with other products: Q4_0 and Q8_0, activations rounded to 8 bits by blocks of 32, with
a scale in bfloat16; as ik-llama-cpp-python's wheel has it.

Weights are given as stored and in the order of eight rows that its products want. The wheel is built for AVX2; built for
AVX-512 it is faster.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Case, Provider
from cofire.bench.peers import Peer
from cofire.bench.peers._ggml import BLOCK, KINDS, Library, product
from cofire.bench.peers._products import HALF, Product, _times_weight


@functools.cache
def _library() -> Library:
    spec = importlib.util.find_spec("ik_llama_cpp")
    assert spec is not None and spec.origin is not None
    return Library(Path(spec.origin).parent / "lib" / "libggml.so")


def by_blocks_of_half(*args: Any) -> Tensor:
    """With activations rounded to 8 bits by blocks of 32, of which the scale is rounded to bfloat16 first."""
    p = Product(*args)
    x = p.input.float().unflatten(-1, (-1, BLOCK))
    scale = (x.abs().amax(-1, keepdim=True) / 127).to(HALF).float()
    codes = (x * (1 / scale)).round().clamp(-127, 127)
    return _times_weight(p, (codes.double() * scale.double()).flatten(-2))


def find(case: Case) -> Mapping[str, Provider] | None:
    f = case.facts
    if case.op != "qlinear" or f["format"] != "uniform" or f["activations"] != "int8" or case.dtype != torch.float32:
        return None
    if f["bits"] not in KINDS or f["group_size"] is None or f["group_size"] % BLOCK:
        return None
    own = functools.partial(Provider, reference=by_blocks_of_half, differentiable=False, own_threads=True)
    orders = {"as stored": False, "repacked": True}
    return {name: own(functools.partial(product, _library, repacked)) for name, repacked in orders.items()}


PEER = Peer("ik_llama.cpp", find, {"ik_llama_cpp": "ik-llama-cpp-python"})
