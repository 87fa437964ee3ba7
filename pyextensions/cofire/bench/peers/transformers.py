# SPDX-License-Identifier: Apache-2.0
"""The caches of transformers in a decoding step, with torch's attention; afterwards they forget the new token again."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor]:
    grouped = query.shape[1] != key.shape[1]
    return (attend(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped),)


def _dynamic(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, *_: Any) -> Run:
    layer = importlib.import_module("transformers.cache_utils").DynamicLayer()
    layer.update(key[:, :, :-1].contiguous(), value[:, :, :-1].contiguous())
    new, before = (key[:, :, -1:], value[:, :, -1:]), (layer.keys, layer.values)

    def step() -> tuple[Tensor]:
        keys, values = layer.update(*new)
        layer.keys, layer.values = before
        return _attend(query, keys, values, None, scale)

    return step


def _static(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, *_: Any) -> Run:
    count = key.shape[2]
    layer = importlib.import_module("transformers.cache_utils").StaticLayer(max_cache_len=count + 64)
    layer.update(key[:, :, :-1], value[:, :, :-1])
    new = key[:, :, -1:], value[:, :, -1:]
    seen = torch.arange(count + 64, device=key.device)[None, None, None] < count

    def step() -> tuple[Tensor]:
        keys, values = layer.update(*new)
        layer.cumulative_length.fill_(count - 1)
        return _attend(query, keys, values, seen, scale)

    return step


def find(case: Case) -> Mapping[str, Provider] | None:
    if case.op != "attention_with_scores" or not case.facts["decoding"]:
        return None
    return {s.__name__[1:]: Provider(s, outputs=1, differentiable=False) for s in (_dynamic, _static)}


PEER = Peer("transformers", find, {"transformers": "transformers"}, devices=("cpu", "cuda"))
