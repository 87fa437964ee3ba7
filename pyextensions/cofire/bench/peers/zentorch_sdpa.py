# SPDX-License-Identifier: Apache-2.0
"""zentorch's attention, which returns no scores; of binary codes, with queries and keys of -1 and 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._attention import heads_of, hidden, signs
from cofire.bench.peers._zentorch import needs_avx512, operators


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Run:
    attend = operators().zentorch_sdpa
    return lambda: (attend(query, key, value, attn_mask=mask, scale=scale)[0],)


def _plain(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, *_: Any) -> Run:
    mask = hidden(query, key) if causal and query.shape[2] > 1 else None
    return _attend(query, heads_of(query, key), heads_of(query, value), mask, scale)


def _of_signs(*args: Any) -> Run:
    query, key, value, scale = signs(*args)
    return _attend(query, key, value, None, scale)


def find(case: Case) -> Provider | None:
    if case.op == "attention_with_scores" and not case.facts["decoding"]:
        return Provider(_plain, outputs=1, differentiable=False)
    if case.op == "binary_softmax_attention":
        return Provider(_of_signs, differentiable=False)
    return None


PEER = Peer("zentorch sdpa", find, {"zentorch": "zentorch"}, reason=needs_avx512)
