# SPDX-License-Identifier: Apache-2.0
"""torch's product of 8-bit floats (``_scaled_mm``), rows of both sides scaled; the bar for 8 times 8 bits on a GPU.

The weight is rounded beforehand, the activations at every call. It was not run when this was written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._products import HALF, WIDE, Product, decoded

KIND = torch.float8_e4m3fn


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and, of each row, the scale."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(KIND).max
    return (x.float() / scale).to(KIND), scale


def _product(*args: Any) -> Run:
    p = Product(*args)
    codes, scale = _rounded(decoded(p))
    weight, scale = codes.t(), scale.t().contiguous()

    def run() -> Tensor:
        x, rows = _rounded(p.input)
        return torch._scaled_mm(x, weight, scale_a=rows, scale_b=scale, out_dtype=HALF, use_fast_accum=True)

    return run


def by_fp8(*args: Any) -> Tensor:
    """Both sides rounded, and so is the result."""
    p = Product(*args)
    x, w = (codes.double() * scale.double() for codes, scale in map(_rounded, (p.input, decoded(p))))
    y = x @ w.t()
    return y if p.input.dtype == WIDE else y.to(HALF)


def find(case: Case) -> Provider | None:
    f = case.facts
    if case.op != "qlinear" or (f["format"], f["bits"], f["activations"]) != ("uniform", 8, "int8"):
        return None
    return Provider(_product, reference=by_fp8, differentiable=False)


PEER = Peer("torch fp8", find, devices=("cuda",))
