# SPDX-License-Identifier: Apache-2.0
"""torchao: 8-bit weights, one scale for each row; activations as they are, or rounded by rows.

On a GPU it was not run when this was written.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._products import Product, of_255


def _linear(*args: Any) -> Run:
    p = Product(*args)
    logging.getLogger("torchao").setLevel(logging.ERROR)
    module = importlib.import_module("torchao.quantization.quantize_.workflows.int8.int8_tensor")
    rounding = module.QuantizeTensorToInt8Kwargs(granularity=module.PerRow()) if p.activations == "int8" else None
    weight = module.Int8Tensor(
        p.signed(), p.scale.to(p.input.dtype), [1, p.shape[1]], p.input.dtype, act_quant_kwargs=rounding
    )
    return functools.partial(torch.nn.functional.linear, p.input, weight)


def find(case: Case) -> Provider | None:
    f = case.facts
    if case.op != "qlinear" or f["format"] != "uniform" or f["bits"] != 8 or f["group_size"] is not None:
        return None
    return Provider(_linear, reference=of_255 if f["activations"] == "int8" else None, differentiable=False)


PEER = Peer("torchao", find, {"torchao": "torchao"}, devices=("cpu", "cuda"))
