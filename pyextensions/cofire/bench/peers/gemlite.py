# SPDX-License-Identifier: Apache-2.0
"""GemLite (Triton): weights of 2, 4 and 8 bits times 16 bits, and 8 times 8 bits with activations rounded by rows.

Its helpers pack our codes, which are shifted by a zero point there. The first call of a shape looks for the best tiles. It
was not run when this was written.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._products import HALF, Product


def _weight_only(*args: Any) -> Run:
    p = Product(*args)
    helper = importlib.import_module("gemlite.helper")
    make = getattr(helper, f"A16W{p.bits}_HQQ_INT")(device=p.input.device, dtype=p.input.dtype)
    scales = p.scale.to(p.input.dtype).reshape(-1, 1)
    zeros = torch.full_like(scales, 1 << (p.bits - 1))
    return functools.partial(make.from_weights(p.levels().to(torch.uint8), scales, zeros), p.input)


def _bytes(*args: Any) -> Run:
    p = Product(*args)
    helper = importlib.import_module("gemlite.helper")
    make = helper.A8W8_INT8_dynamic(device=p.input.device, dtype=p.input.dtype)
    return functools.partial(make.from_weights(p.signed(), bias=None, scales=p.scale.float()), p.input)


def find(case: Case) -> Provider | None:
    f = case.facts
    if case.op != "qlinear" or f["format"] != "uniform" or f["bits"] not in (2, 4, 8):
        return None
    if f["activations"] == "exact":
        return Provider(_weight_only, differentiable=False) if case.dtype == HALF else None
    return Provider(_bytes, differentiable=False) if f["bits"] == 8 and f["group_size"] is None else None


PEER = Peer("gemlite", find, {"gemlite": "gemlite"}, devices=("cuda",))
