# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: nf4, quantised anew by the library from the decoded weight, which gives back the same codes.

On a CPU its fast kernel comes from a hub of models at run time; without it the weight is decoded at every call. On a GPU
``matmul_4bit`` takes its own kernel for one row, and decodes for more. The GPU part was not run when this was written.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._products import Product
from cofire.ops.lowbit import _dequantize_reference


def _linear(*args: Any) -> Run:
    p = Product(*args)
    module = importlib.import_module("bitsandbytes")
    weight = _dequantize_reference(*p[1:6], p.bits, p.group_size, p.shape[1]).to(p.input.dtype)
    codes, state = module.functional.quantize_4bit(weight, blocksize=p.group_size, quant_type="nf4")
    return functools.partial(module.matmul_4bit, p.input, codes.t(), state)


def find(case: Case) -> Provider | None:
    if case.op != "qlinear" or case.facts["format"] != "nf4" or case.facts["activations"] != "exact":
        return None
    return Provider(_linear, differentiable=False)


PEER = Peer("bitsandbytes", find, {"bitsandbytes": "bitsandbytes"}, devices=("cpu", "cuda"))
