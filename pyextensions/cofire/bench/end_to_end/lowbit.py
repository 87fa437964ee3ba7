# SPDX-License-Identifier: Apache-2.0
"""Decoders whose linear layers are of few bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from cofire import models
from cofire.bench.end_to_end import text
from cofire.bench.end_to_end.dense import dense_forms
from cofire.bench.end_to_end.network import RANDOM_WEIGHTS, Network, Variant, decoded
from cofire.bench.end_to_end.text import Trained
from cofire.models.decoder import Decoder
from cofire.nn import quantize_

#: By name: bits, activations; and how far from the decoded weights an output may be. A code of the activations that rounding
#: turns over moves it by half a step of 1/127.
FORMS = {
    "W4, exact": (4, "exact", 1e-3),
    "W4, int8 activations": (4, "int8", 5e-2),
    "W2, exact": (2, "exact", 1e-3),
}


def forms(model: Decoder, method: str, group_size: int) -> dict[str, Variant]:
    """The dense network in its forms, and with quantised weights."""
    found = dense_forms(model)
    for name, (bits, activations, tolerance) in FORMS.items():
        quantised = quantize_(copy.deepcopy(model), method, bits=bits, group_size=group_size, activations=activations)
        found[name] = Variant(quantised, decoded(quantised), tolerance)
    return found


def trained(plan: Trained, *, prompt: int = 128, steps: int = 8, batch: int = 16, group_size: int = 64) -> Network:
    """The small decoder, trained."""

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        return forms(plan.network(seed, share), "hqq", group_size)

    return Network(
        family="lowbit",
        name=plan.shape,
        data="source text of Python's standard library",
        build=build,
        inputs=lambda n: plan.windows_of(n, prompt),
        unit=text.UNIT,
        batch=batch,
        latency_of=f"one token, after {prompt}",
        start=text.decoding(steps),
        evaluate=plan.score,
        accuracy_kind=text.KIND,
    )


def random(
    width: int = 768, depth: int = 12, heads: int = 12, kv_heads: int = 4, hidden: int = 2048, vocabulary: int = 4096,
    *, prompt: int = 128, steps: int = 8, batch: int = 16, group_size: int = 128,
) -> Network:  # fmt: skip
    """One of the size of a small language model."""

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        torch.manual_seed(seed)
        sizes = {"width": width, "depth": depth, "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
        model = models.decoder(vocabulary, **sizes).eval().requires_grad_(False)
        return forms(model, "minmax", group_size)  # of random weights no method is the best

    return Network(
        family="lowbit",
        name=f"Llama-shaped, {depth} layers of {width}",
        data=RANDOM_WEIGHTS,
        build=build,
        inputs=lambda n: text.random_tokens(n, prompt, vocabulary),
        unit=text.UNIT,
        batch=batch,
        latency_of=f"one token, after {prompt}",
        start=text.decoding(steps),
        sample=lambda: text.random_tokens(2, 64, vocabulary),
    )


NETWORKS = [trained(Trained()), random()]
