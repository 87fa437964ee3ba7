# SPDX-License-Identifier: Apache-2.0
"""torchao: 8-bit weights, one scale for each row; activations as they are, or rounded by rows; eager and compiled.

The layer holds what ``quantize_`` puts there, with our codes. Compiled, its weight is a constant, as is advised on a CPU;
``max-autotune`` found nothing faster there. On a GPU it was not run when this was written.
"""

from __future__ import annotations

import functools
import importlib
import logging
import types
from typing import Any

import torch

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Found, Peer
from cofire.bench.peers._products import Product, of_255


def _layer(p: Product) -> torch.nn.Linear:
    logging.getLogger("torchao").setLevel(logging.ERROR)
    module = importlib.import_module("torchao.quantization.quantize_.workflows.int8.int8_tensor")
    rounding = module.QuantizeTensorToInt8Kwargs(granularity=module.PerRow()) if p.activations == "int8" else None
    parts = p.signed(), p.scale.to(p.input.dtype), [1, p.shape[1]], p.input.dtype
    layer = torch.nn.Linear(p.shape[1], p.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(module.Int8Tensor(*parts, act_quant_kwargs=rounding), requires_grad=False)
    return layer.eval()


def _eager(*args: Any) -> Run:
    return functools.partial(_layer(Product(*args)), args[0])


def _compiled(*args: Any) -> Run:
    layer = _layer(Product(*args))

    def call(x: torch.Tensor) -> Any:
        return layer(x)

    # code of its own: what is compiled for other weights would be looked through at every call
    own = types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    with torch._inductor.config.patch(freezing=True, force_fuse_int_mm_with_mul=True):
        run = functools.partial(torch.compile(own, dynamic=False), args[0])
        run()
    return run


def find(case: Case) -> Found:
    if case.op != "qlinear" or [case.facts[name] for name in ("format", "bits", "group_size")] != ["uniform", 8, None]:
        return None
    rounded = of_255 if case.facts["activations"] == "int8" else None
    own = functools.partial(Provider, reference=rounded, differentiable=False)
    return {"eager": own(_eager), "compiled": own(_compiled, first=False)}


PEER = Peer("torchao", find, {"torchao": "torchao"}, devices=("cpu", "cuda"))
