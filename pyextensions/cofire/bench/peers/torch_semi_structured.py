# SPDX-License-Identifier: Apache-2.0
"""torch's 2:4 sparse weights on a GPU (cuSPARSELt, or CUTLASS where that is not there). It was not run when this was written."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.ops.sparse_weight import dense_values


def _linear(*args: Any) -> Run:
    weight = dense_values(*(*args[2:11], args[0].dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "prototype stage"
        sparse = torch.sparse.to_sparse_semi_structured(weight)
    return functools.partial(F.linear, args[0], sparse)


def find(case: Case) -> Provider | None:
    if case.op != "spmm" or case.facts["pattern"] != "2:4" or case.dtype != torch.bfloat16:
        return None
    return Provider(_linear, differentiable=False)


PEER = Peer("torch 2:4", find, devices=("cuda",))
