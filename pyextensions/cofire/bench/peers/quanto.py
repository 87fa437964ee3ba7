# SPDX-License-Identifier: Apache-2.0
"""optimum-quanto: qint2, qint4 and, one scale for each row, qint8.

Of an input in bfloat16 the last is torch's own product, and so is qint4 where groups are of 128.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._products import Product


def _linear(*args: Any) -> Run:
    p = Product(*args)
    module = importlib.import_module("optimum.quanto")
    kind = importlib.import_module("optimum.quanto.tensor.weights.qbits").WeightQBitsTensor
    rows, columns = p.shape
    scale = p.scale.to(p.input.dtype).reshape(-1, 1)
    middle = scale * (1 << (p.bits - 1))
    weight = kind.create(
        {2: module.qint2, 4: module.qint4}[p.bits], 0, p.group_size, torch.Size((rows, columns)), (columns, 1),
        p.levels().view(-1, p.group_size), scale, middle,
    )  # fmt: skip
    return functools.partial(torch.nn.functional.linear, p.input, weight)


def _bytes(*args: Any) -> Run:
    p, module = Product(*args), importlib.import_module("optimum.quanto")
    kind = importlib.import_module("optimum.quanto.tensor.weights.qbytes").WeightQBytesTensor
    scale = p.scale.to(p.input.dtype)
    weight = kind.create(module.qint8, 0, torch.Size(p.shape), (p.shape[1], 1), p.signed(), scale)
    return functools.partial(torch.nn.functional.linear, p.input, weight)


def find(case: Case) -> Provider | None:
    f = case.facts
    if case.op != "qlinear" or f["format"] != "uniform" or f["activations"] != "exact":
        return None
    if f["bits"] == 8 and f["group_size"] is None:
        return Provider(_bytes, differentiable=False)
    if f["bits"] not in (2, 4) or f["group_size"] is None:
        return None
    return Provider(_linear, differentiable=False)


PEER = Peer("quanto", find, {"optimum.quanto": "optimum-quanto"})
