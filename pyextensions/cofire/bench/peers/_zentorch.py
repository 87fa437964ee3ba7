# SPDX-License-Identifier: Apache-2.0
"""What the peers of zentorch share."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import torch
from torch import Tensor

from cofire.bench.peers._products import Product


def operators() -> Any:
    importlib.import_module("zentorch")
    return torch.ops.zentorch


#: Weights that nobody uses, by what they were made of.
_UNUSED: dict[Any, list[Tensor]] = {}


def lent(p: Product, fresh: Tensor) -> Tensor:
    """The same weight in memory that is never given back.

    Products whose weight was not packed beforehand keep what they make of it by its address, for good, and take it for the
    next weight that lies there: the answer is then that of another product. A weight that is no longer used is used for its
    equals, in a product of the same kind.
    """
    kind = (fresh.dtype, fresh.shape, p.group_size, p.activations)
    key = (*kind, int(p.codes.long().mul(p.codes.long()).sum()), float(p.scale.double().sum()))
    unused = _UNUSED.setdefault(key, [])
    kept: Tensor = unused.pop() if unused and torch.equal(unused[-1], fresh) else fresh
    loan = kept.view_as(kept)
    weakref.finalize(loan, unused.append, kept).atexit = False
    return loan


def packed(p: Product) -> Tensor:
    """The codes as zentorch's product of bfloat16 with 4-bit weights wants them."""
    return lent(p, operators().zentorch_woq_repack_weight(p.signed()).t())


def needs_avx512() -> str | None:
    """Without it zentorch's products end the process."""
    found = torch.backends.cpu.get_cpu_capability()
    return None if found == "AVX512" else f"zentorch needs AVX-512, and torch found {found}"
