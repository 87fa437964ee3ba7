# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: nf4, quantised anew by the library from the decoded weight, which gives back the same codes.

Twice: by ``matmul_4bit``, which on a CPU decodes the weight at every call, and as the layer ``Linear4bit`` in evaluation. At
its first call that one stores the weight for its product of bfloat16, on a CPU that has such (AVX-512), and rounds what comes
in; on others it decodes too. On a GPU both are one. The GPU part was not run when this was written.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._products import Product, half
from cofire.ops.lowbit import _dequantize_reference


def _weight(p: Product) -> Tensor:
    return _dequantize_reference(*p[1:6], p.bits, p.group_size, p.shape[1]).to(p.input.dtype)


def _function(*args: Any) -> Run:
    p, module = Product(*args), importlib.import_module("bitsandbytes")
    codes, state = module.functional.quantize_4bit(_weight(p), blocksize=p.group_size, quant_type="nf4")
    return functools.partial(module.matmul_4bit, p.input, codes.t(), state)


def _layer(*args: Any) -> Run:
    p, module = Product(*args), importlib.import_module("bitsandbytes").nn
    options = {"quant_type": "nf4", "compress_statistics": False}
    layer = module.Linear4bit(p.shape[1], p.shape[0], bias=False, compute_dtype=p.input.dtype, device="meta", **options)
    layer.weight = module.Params4bit(_weight(p), blocksize=p.group_size, module=layer, **options)
    return functools.partial(layer.to(p.input.device).eval(), p.input)


def find(case: Case) -> Mapping[str, Provider] | None:
    if case.op != "qlinear" or case.facts["format"] != "nf4" or case.facts["activations"] != "exact":
        return None
    layer = Provider(_layer, reference=half, differentiable=False)
    return {"matmul_4bit": Provider(_function, differentiable=False), "Linear4bit": layer}


PEER = Peer("bitsandbytes", find, {"bitsandbytes": "bitsandbytes"}, devices=("cpu", "cuda"))
