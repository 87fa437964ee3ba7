# SPDX-License-Identifier: Apache-2.0
"""Humming: products compiled for their shape at the first call; its layer, loaded with our codes and scales.

Activations of 16 bits as they are, or rounded to 8 bits by rows. It was not run when this was written.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._products import HALF, Product


def _layer(*args: Any) -> Run:
    p = Product(*args)
    rows, columns = p.shape
    layer = (
        importlib.import_module("humming.layer")
        .HummingLayer(
            shape_n=rows,
            shape_k=columns,
            weight_config={"dtype": f"int{p.bits}", "group_size": 0 if p.group_size == columns else p.group_size},
            input_config={"dtype": "int8"} if p.activations == "int8" else None,
            torch_dtype=p.input.dtype,
        )
        .cuda()
    )
    packed = importlib.import_module("humming.ops").pack_weight(p.levels().to(torch.int32), p.bits)
    layer.load_from_tensors({"weight": packed, "weight_scale": p.scale.to(p.input.dtype)})
    layer.transform()
    return functools.partial(layer, p.input)


def find(case: Case) -> Provider | None:
    if case.op != "qlinear" or case.facts["format"] != "uniform" or case.dtype != HALF:
        return None
    return Provider(_layer, differentiable=False)


PEER = Peer("humming", find, {"humming": "humming-kernels"}, devices=("cuda",))
