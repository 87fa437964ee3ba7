# SPDX-License-Identifier: Apache-2.0
"""The forms of a dense network that the others are compared with: plain, packed by oneDNN, in bfloat16, and both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cofire.bench.end_to_end.network import DENSE, Variant, weight_bytes
from cofire.methods.base import replace_modules
from cofire.models.decoder import Rotary

__all__ = ["BFLOAT16", "PACKED", "dense_forms", "fast_half", "half", "half_variant", "packed"]

PACKED, BFLOAT16 = f"{DENSE}, packed by oneDNN", f"{DENSE}, bfloat16"
HALF_TOLERANCE = 0.1  #: how far what is computed in bfloat16 may be off, in units of the largest output
LAYOUTS = 2  #: of a weight that are kept: for the rows of a prompt, and for those of a step

Wrap = Callable[[nn.Module], nn.Module]


def fast_half() -> tuple[str, ...]:
    """The devices that multiply in bfloat16 by instructions of their own; others take many times as long as in fp32."""
    return ("cpu", "cuda") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("cuda",)


# ---------------------------------------------------------------------------------------------------------- packed


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN wants it for so many rows, which is found out at the first call with them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._packed: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows not in self._packed:
            if len(self._packed) == LAYOUTS:
                del self._packed[next(iter(self._packed))]
            self._packed[rows] = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed[rows], self.bias, "none", [], "")
        return y


def packed(model: nn.Module) -> nn.Module | None:
    """A copy with every ``nn.Linear`` packed, as a frozen ``torch.compile`` has it; the weights stay those of the model.

    None where there is nothing to pack, or torch has no oneDNN.
    """
    if not torch._C._has_mkldnn:
        return None
    result = copy.deepcopy(model, {id(t): t for t in model.parameters()})
    new = {id(m): PackedLinear(m) for m in result.modules() if type(m) is nn.Linear}
    return replace_modules(result, new).eval() if new else None


# -------------------------------------------------------------------------------------------------------- bfloat16


class Half(nn.Module):
    """A network in bfloat16 that takes inputs of any float; its output is fp32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        output: Tensor = self.model(x.bfloat16() if x.is_floating_point() else x, *args)
        return output.float()


def half(model: nn.Module) -> nn.Module:
    """A copy in bfloat16; the frequencies of rotary positions stay as they are, or far tokens would turn another way."""
    kept = {name: m.frequency for name, m in model.named_modules() if isinstance(m, Rotary)}
    result = copy.deepcopy(model).bfloat16().eval()
    for name, frequency in kept.items():
        rotary: Any = result.get_submodule(name)
        rotary.frequency = frequency.clone()
    return result


def half_variant(model: nn.Module, reference: nn.Module, wrap: Wrap = lambda m: m) -> Variant:
    """``model``, which is in bfloat16, beside what it must compute, which is not."""
    return Variant(wrap(Half(model)), reference, HALF_TOLERANCE, weight_bytes=weight_bytes(model), devices=fast_half())


# ----------------------------------------------------------------------------------------------------------- all of it


def dense_forms(
    model: nn.Module, wrap: Wrap = lambda m: m, reference: nn.Module | None = None, note: str = ""
) -> dict[str, Variant]:
    """The dense network, packed by oneDNN, in bfloat16, and both: by name, :data:`DENSE` first.

    Args:
        model: for inference, in fp32.
        wrap: puts what a network needs around each of them, such as a cache.
        reference: what must come out; default: what the model itself computes, which then is checked against nothing.
        note: on the first.
    """
    right = model if reference is None else reference
    found = {DENSE: Variant(wrap(model), reference, note=note)}
    halved = half(model)
    by_onednn, halved_by_onednn = packed(model), packed(halved)
    if by_onednn is not None:
        found[PACKED] = Variant(wrap(by_onednn), right, 1e-3, weight_bytes=weight_bytes(model), devices=("cpu",))
    found[BFLOAT16] = half_variant(halved, right, wrap)
    if halved_by_onednn is not None and "cpu" in fast_half():
        found[f"{BFLOAT16}, packed by oneDNN"] = Variant(
            wrap(Half(halved_by_onednn)), right, HALF_TOLERANCE, weight_bytes=weight_bytes(halved), devices=("cpu",)
        )
    return found
