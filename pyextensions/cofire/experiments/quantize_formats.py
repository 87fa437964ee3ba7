# SPDX-License-Identifier: Apache-2.0
"""Weights on their way through the formats of other libraries: quantised, written as a format has them, and read back.

What a format cannot hold exactly is rounded on the way: most scales to 16 bits, those of K-quants and of nested NF4 to few.
Where a format needs more than one of our quantisers gives, the levels here are the nearest of the plain range, without the
searches that its own library does.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire import formats
from cofire.formats.ggml import TYPES
from cofire.ops import NestedScale, QTensor, pack_bits, quantize_weight

#: Scales that share a number in nested NF4.
NESTED_BLOCK = 256


def _gptq(weight: Tensor, hessian: Tensor | None) -> QTensor:
    q = quantize_weight(weight, "gptq", bits=4, group_size=64, hessian=hessian, act_order=True)
    return formats.from_gptq(**formats.to_gptq(q, 2), bits=4, version=2)


def _awq(weight: Tensor, hessian: Tensor | None) -> QTensor:
    layer = formats.to_awq(quantize_weight(weight, "minmax", bits=4, group_size=64))
    return formats.from_awq(layer["qweight"], layer["scales"], layer["qzeros"])


def _llm_awq(weight: Tensor, hessian: Tensor | None) -> QTensor:
    q = quantize_weight(weight, "minmax", bits=4, group_size=64)
    return formats.from_awq(**formats.to_awq(q, "llm-awq"), group_size=64)


def _torchao(weight: Tensor, hessian: Tensor | None) -> QTensor:
    q = quantize_weight(weight, "minmax", bits=4, group_size=64)
    return formats.from_torchao(formats.to_torchao(q, "plain"), q.shape, "plain")


def _nf4(weight: Tensor, hessian: Tensor | None) -> QTensor:
    return formats.from_bitsandbytes(*formats.to_bitsandbytes(quantize_weight(weight, "nf4", group_size=64)))


def _nested_nf4(weight: Tensor, hessian: Tensor | None) -> QTensor:
    q = quantize_weight(weight, "nf4", group_size=64)
    return formats.from_bitsandbytes(*formats.to_bitsandbytes(q.replace(scale=nested(q.scales()))))


def _ggml(kind: str) -> Callable[[Tensor, Tensor | None], QTensor]:
    def through(weight: Tensor, hessian: Tensor | None) -> QTensor:
        makers = {"Q4_0": ("absmax", 4), "Q4_1": ("minmax", 4), "Q8_0": ("absmax", 8)}
        if kind in makers:
            method, bits = makers[kind]
            q = quantize_weight(weight, method, bits=bits, group_size=32)
        elif weight.shape[1] % TYPES[kind].block:
            raise ValueError(f"{kind} has blocks of {TYPES[kind].block} columns, got {weight.shape[1]} columns")
        else:
            q = with_minima(weight, kind) if TYPES[kind].minima else symmetric(weight, kind)
        return formats.from_ggml(formats.to_ggml(q, kind), kind, q.shape)

    return through


def _coreml(weight: Tensor, hessian: Tensor | None) -> QTensor:
    return formats.from_coreml(formats.to_coreml(quantize_weight(weight, "palette", bits=4, group_size=None)))


def _bytes_palette(weight: Tensor, hessian: Tensor | None) -> QTensor:
    return quantize_weight(weight, "palette", bits=4, group_size=None, lut_dtype=torch.int8)


#: Of a weight ``[N, K]`` and its Hessian, by the name of the format; a ValueError says what the format cannot hold.
FORMATS: dict[str, Callable[[Tensor, Tensor | None], QTensor]] = {
    "GPTQ, activation order": _gptq,
    "AWQ": _awq,
    "llm-awq": _llm_awq,
    "torchao int4": _torchao,
    "bitsandbytes NF4": _nf4,
    "bitsandbytes NF4, nested": _nested_nf4,
    **{f"ggml {kind}": _ggml(kind) for kind in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K")},
    "coremltools palette": _coreml,
    "int8 palette": _bytes_palette,
}
#: The bits of a weight, and which formats have a table of floats.
FORMAT_BITS = {name: int(found[1]) if (found := re.search(r"Q(\d)", name)) else 4 for name in FORMATS}
FLOAT_TABLES = ("bitsandbytes NF4", "bitsandbytes NF4, nested", "coremltools palette")


# -------------------------------------------------------------------------------------------------- nested scales


def dynamic_map() -> Tensor:
    """fp32 ``[256]``: the signed 8-bit numbers that bitsandbytes has for scales, sorted: seven powers of ten, and between
    two of them twice as many values as between the two before.

    Source: Dettmers et al. 2022 (8-bit optimizers, 2110.02861), section 2.2; the code of bitsandbytes.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))


def nested(scale: Tensor | None) -> NestedScale:
    """Scales less their mean in 8 bits, 256 of them to a number (QLoRA, section 3)."""
    assert scale is not None
    mean, table = scale.mean(), dynamic_map()
    flat = (scale - mean).flatten()
    blocks = F.pad(flat, (0, -len(flat) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    places = (blocks / torch.where(absmax > 0, absmax, 1.0)[:, None]).flatten()[: len(flat)]
    codes = torch.bucketize(places, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return NestedScale(codes.view(scale.shape), table, absmax, mean, NESTED_BLOCK)


def _parts(scale: Tensor, kind: str, most: int, sign: float = 1.0) -> tuple[NestedScale, Tensor]:
    """Scales (or, with sign -1, minima) as whole multiples, at most ``most``, of an fp16 number for each block of 256."""
    t = TYPES[kind]
    each = t.block // t.group
    steps = t.steps(scale.device)
    blocks = scale.view(-1, each)
    unit = (blocks.amax(1) / most).half()
    multiples = (blocks / torch.where(unit > 0, unit.float(), 1.0)[:, None]).round().clamp(0, most)
    codes = (multiples + (t.low if sign > 0 else 0)).to(torch.uint8).view(scale.shape)
    table = steps if sign > 0 else -steps
    made = NestedScale(codes, table, unit, torch.tensor(-0.0), each)
    return made, (multiples * unit.float()[:, None]).view(scale.shape)


def _packed(places: Tensor, kind: str, weight: Tensor, scale: NestedScale, offset: NestedScale | None) -> QTensor:
    t = TYPES[kind]
    codes = places.round().clamp(0, (1 << t.bits) - 1).to(torch.uint8).view(weight.shape)
    zero = None if t.zero is None else torch.full((1, 1), t.zero, dtype=torch.uint8)
    shape = (weight.shape[0], weight.shape[1])
    return QTensor(pack_bits(codes, t.bits), scale, shape, t.bits, t.group, zero, offset, dtype=weight.dtype)


def symmetric(weight: Tensor, kind: str) -> QTensor:
    """Q6_K and Q3_K: up to the largest magnitude of a group."""
    t = TYPES[kind]
    assert t.zero is not None
    w = weight.detach().float().view(weight.shape[0], -1, t.group)
    most = 127 if t.signed else 31
    scale, found = _parts(w.abs().amax(2) / (t.zero - 1), kind, most)
    places = w / torch.where(found > 0, found, 1.0)[..., None] + t.zero
    return _packed(places, kind, weight, scale, None)


def with_minima(weight: Tensor, kind: str) -> QTensor:
    """Q2_K, Q4_K and Q5_K: from the smallest value of a group, 0 at most, to the largest."""
    t = TYPES[kind]
    w = weight.detach().float().view(weight.shape[0], -1, t.group)
    low = (-w.amin(2)).clamp(min=0)
    most = 63 if t.six else 15
    offset, minimum = _parts(low, kind, most, -1.0)
    span = (w.amax(2) + minimum).clamp(min=0)
    scale, found = _parts(span / ((1 << t.bits) - 1), kind, most)
    places = (w + minimum[..., None]) / torch.where(found > 0, found, 1.0)[..., None]
    return _packed(places, kind, weight, scale, offset)
