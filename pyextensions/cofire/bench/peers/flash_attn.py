# SPDX-License-Identifier: Apache-2.0
"""FlashAttention (Dao): no scores are returned; a decoding step appends to its own cache; binary codes as -1 and 1 in 16 bits.

It takes tokens before heads, which a caller of it would have. It was not run when this was written.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._attention import signs


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous() for x in tensors]


def _plain(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, *_: Any) -> Run:
    attend = importlib.import_module("flash_attn").flash_attn_func
    q, k, v = _tokens_first(query, key, value)
    return lambda: (attend(q, k, v, softmax_scale=scale, causal=causal).transpose(1, 2),)


def _decoding(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, *_: Any) -> Run:
    attend = importlib.import_module("flash_attn").flash_attn_with_kvcache
    q, k, v = _tokens_first(query, key, value)
    new, lengths = (
        (k[:, -1:].clone(), v[:, -1:].clone()),
        torch.full((len(k),), k.shape[1] - 1).to(k.device, torch.int32),
    )
    return lambda: (attend(q, k, v, *new, cache_seqlens=lengths, softmax_scale=scale, causal=causal).transpose(1, 2),)


def _of_signs(*args: Any) -> Run:
    query, key, value, scale = signs(*args)
    attend = importlib.import_module("flash_attn").flash_attn_func
    q, k, v = (x.half() for x in _tokens_first(query, key, value))
    return lambda: attend(q, k, v, softmax_scale=scale).transpose(1, 2).to(value.dtype)


def find(case: Case) -> Provider | None:
    if case.op == "attention_with_scores" and case.dtype == torch.bfloat16:
        return Provider(_decoding if case.facts["decoding"] else _plain, outputs=1, differentiable=False)
    if case.op == "binary_softmax_attention" and case.facts["precision"] == "high":
        return Provider(_of_signs, differentiable=False)
    return None


PEER = Peer("flash-attn", find, {"flash_attn": "flash-attn"}, devices=("cuda",))
