# SPDX-License-Identifier: Apache-2.0
"""SparseProp (Nikdan et al. 2023, 2302.04852): the functions of its linear layer and of its convolution, both ways.

The layers' own formats are made of our values and indices, so that gradients are those of our values. Its convolution has
two kernels, of which the faster is the row; the one along images is wrong where their number is no multiple of eight.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer

FUNCTIONS = "sparseprop.modules.functions"


def _linear(*args: Any) -> Run:
    x, _, values, index, offsets, *_ = args
    layer = importlib.import_module(FUNCTIONS).SparseLinearFunction
    where = (offsets.int(), index.int())
    rows = offsets.numel() - 1
    return lambda: layer.apply(x, values, where, None, rows)


def _conv(along_rows: bool, *args: Any) -> Run:
    """An entry's position: offsets of each output channel, of each of its input channels, and the place in the window."""
    x, bias, values, index, offsets = args[:5]
    (k, _), (stride, _), (padding, _) = args[11:14]
    along_rows = along_rows or x.shape[0] % 8 != 0
    rows, columns = offsets.numel() - 1, args[8] // (k * k)
    entries = index.long()
    row = torch.repeat_interleave(torch.arange(rows), offsets.diff())
    counts = torch.bincount(row * columns + entries // (k * k), minlength=rows * columns).view(rows, columns)
    channels = torch.cat([counts.new_zeros(rows, 1), counts.cumsum(1)], 1).flatten().short()
    place = entries % (k * k)
    where = (offsets.int(), channels, (place // k).to(torch.uint8), (place % k).to(torch.uint8))
    layer = importlib.import_module(FUNCTIONS).SparseConvFunction
    return lambda: layer.apply(x, values, where, bias, rows, k, padding, stride, along_rows, along_rows)


def find(case: Case) -> Provider | Mapping[str, Provider] | None:
    f = case.facts
    if case.op == "sparse_conv2d":
        names = ("rows",) if f["batch"] % 8 else ("rows", "images")
        return {name: Provider(functools.partial(_conv, name == "rows")) for name in names}
    if case.op != "spmm" or f["format"] != "csr" or f["rows"] == 1 or {case.dtype, f["values"]} != {torch.float32}:
        return None
    return Provider(_linear, differentiable=f["backward"], expansion=8 / 6)


PEER = Peer("sparseprop", find, {"sparseprop": "sparseprop"})
