# SPDX-License-Identifier: Apache-2.0
"""zentorch's attention, which returns no scores; of binary codes, with queries and keys of -1 and 1.

Where less than fp32 is asked for, inputs in bfloat16 are a variant: they are converted before time counts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._attention import HALF, heads_of, hidden, of_half, signs
from cofire.bench.peers._zentorch import needs_avx512, operators


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Run:
    attend = operators().zentorch_sdpa
    return lambda: (attend(query, key, value, attn_mask=mask, scale=scale)[0],)


def _plain(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, *_: Any) -> Run:
    mask = hidden(query, key) if causal and query.shape[2] > 1 else None
    return _attend(query, heads_of(query, key), heads_of(query, value), mask, scale)


def _of_signs(dtype: torch.dtype, *args: Any) -> Run:
    *tensors, scale = signs(*args)
    query, key, value = (x.to(dtype) for x in tensors)
    return _attend(query, key, value, None, scale)


def find(case: Case) -> Provider | Mapping[str, Provider] | None:
    if case.op == "attention_with_scores" and not case.facts["decoding"]:
        return Provider(_plain, outputs=1, differentiable=False)
    if case.op == "binary_softmax_attention":
        found = {"fp32": Provider(functools.partial(_of_signs, torch.float32), differentiable=False)}
        if case.facts["precision"] == "high":
            setup = functools.partial(_of_signs, HALF)
            found["bf16"] = Provider(setup, reference=of_half, differentiable=False)
        return found
    return None


PEER = Peer("zentorch sdpa", find, {"zentorch": "zentorch"}, reason=needs_avx512)
