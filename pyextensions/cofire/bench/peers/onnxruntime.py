# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: MatMulNBits, a model of one node whose blob is rows of bits like ours.

Accuracy level 0 takes activations as they are, and has a kernel for 4 bits alone: others take a plain loop.
Level 4 rounds them to 8 bits by groups. Input and output are bound, so that nothing is copied, and all sessions share one
set of threads: each session's own would spin against those of the next.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._onnx import model
from cofire.bench.peers._products import Product, by_group


@functools.cache
def _runtime() -> Any:
    module = importlib.import_module("onnxruntime")
    module.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    return module


def _product(accuracy_level: int, *args: Any) -> Run:
    p, module = Product(*args), _runtime()
    options = module.SessionOptions()
    options.log_severity_level, options.use_per_session_threads = 3, False
    session = module.InferenceSession(model(p, accuracy_level), options, providers=["CPUExecutionProvider"])
    binding, x = session.io_binding(), p.input.contiguous()
    y = x.new_empty(x.shape[0], p.shape[0])
    kind = getattr(importlib.import_module("numpy"), str(x.dtype).removeprefix("torch."))
    binding.bind_input("A", "cpu", 0, kind, list(x.shape), x.data_ptr())
    binding.bind_output("Y", "cpu", 0, kind, list(y.shape), y.data_ptr())

    def run(_: Tensor = x) -> Tensor:  # holds the input, as the binding does not
        session.run_with_iobinding(binding)
        return y

    return run


def find(case: Case) -> Provider | None:
    f, rounded = case.facts, case.facts.get("activations") == "int8"
    if case.op != "qlinear" or f["format"] != "uniform" or case.dtype not in (torch.float32, torch.float16):
        return None
    if f["bits"] not in ((2, 4, 8) if rounded else (4,)) or f["group_size"] is None:
        return None
    setup = functools.partial(_product, 4 if rounded else 0)
    return Provider(setup, reference=by_group if rounded else None, differentiable=False, own_threads=True)


PEER = Peer("onnxruntime", find, {"onnxruntime": "onnxruntime", "onnx": "onnx"})
