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


#: Packed weights that nobody uses, by what they were made of.
_UNUSED: dict[Any, list[Tensor]] = {}


def packed(p: Product) -> Tensor:
    """The codes as zentorch's product with 4-bit weights wants them, in memory that is never given back.

    The product keeps what it makes of a weight by the weight's address, for good, and takes it for the next weight that
    lies there: the answer is then that of another product. A weight that is no longer used is used for its equals.
    """
    key = (p.shape, p.group_size, int(p.codes.long().mul(p.codes.long()).sum()), float(p.scale.double().sum()))
    fresh = operators().zentorch_woq_repack_weight(p.signed())
    unused = _UNUSED.setdefault(key, [])
    kept: Tensor = unused.pop() if unused and torch.equal(unused[-1], fresh) else fresh
    lent = kept.t()
    weakref.finalize(lent, unused.append, kept).atexit = False
    return lent


def needs_avx512() -> str | None:
    """Without it zentorch's products end the process."""
    found = torch.backends.cpu.get_cpu_capability()
    return None if found == "AVX512" else f"zentorch needs AVX-512, and torch found {found}"
