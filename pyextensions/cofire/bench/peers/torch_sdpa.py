# SPDX-License-Identifier: Apache-2.0
"""torch's attention by each of its libraries for a GPU, and on any device under a mask of bools, which has no gradient.

It returns no scores. A mask that is trained is 0 or 1 in the cases, and eps is left out. The GPU part was not run when this
was written.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as attend

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.registry import OPERATORS

LIBRARIES = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def _by(library: str, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, *_: Any) -> Run:
    mask: Any = causal_lower_right(query.shape[2], key.shape[2]) if causal and query.shape[2] > 1 else None
    grouped = query.shape[1] != key.shape[1]

    def run() -> tuple[Tensor]:
        with sdpa_kernel(getattr(SDPBackend, LIBRARIES[library])):
            return (attend(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped),)

    return run


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool, scale: float, *_: Any) -> Run:
    n = key.shape[2]
    seen = (mask[:, None, None] > 0) | torch.eye(n, dtype=torch.bool, device=key.device)
    seen = seen.tril() if causal else seen
    return lambda: attend(query, key, value, attn_mask=seen, scale=scale)


def without_eps(*args: Any) -> Any:
    return OPERATORS["masked_softmax_attention"].reference(*args[:6], 0.0, False)


def find(case: Case) -> Provider | Mapping[str, Provider] | None:
    if case.op == "masked_softmax_attention":
        return Provider(_masked, reference=without_eps, differentiable=False)
    if case.op != "attention_with_scores" or case.facts["decoding"]:
        return None
    return {name: Provider(functools.partial(_by, name), outputs=1, devices=("cuda",)) for name in LIBRARIES}


PEER = Peer("torch sdpa", find, devices=("cpu", "cuda"))
