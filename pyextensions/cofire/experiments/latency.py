# SPDX-License-Identifier: Apache-2.0
"""Latency of a deployed network against the fastest form of the dense one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from cofire.experiments.files import Results
from cofire.timing import interleaved


def latency(
    name: str, dense: nn.Module, deployed: nn.Module, x: Tensor, kind: type[nn.Module], pairs: int = 51
) -> Results:
    """Medians in milliseconds on one input: the deployed network against the fastest form of the dense one.

    Dense: as given and in channels_last, and with weights packed for oneDNN and activations fused. Deployed: as given
    and in channels_last. The candidates run in turn, so that a slow moment of the machine meets all of them; the best
    of each side counts.

    Args:
        name: what the results call the deployed network.
        dense: the baseline, for inference: batch norm folded.
        deployed: what the method's ``finalize`` gives.
        x: the input.
        kind: the layers of ``deployed`` that are timed one by one, each against the layer of the same name in ``dense``.
        pairs: repeats.
    """
    candidates: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {}
    pixel_last = x.contiguous(memory_format=torch.channels_last)
    for side, network in (("dense", dense), (name, deployed)):
        candidates[f"{side} contiguous"] = (network, x)
        candidates[f"{side} channels_last"] = (_channels_last(network), pixel_last)
    packed = _prepacked(dense, x)
    if packed is not None:
        candidates["dense prepacked"] = (packed, pixel_last)
    times = interleaved(candidates, pairs, warmup=10)
    middle = {form: 1e3 * median(taken) for form, taken in times.items()}
    best = {side: min((n for n in middle if n.startswith(side)), key=middle.__getitem__) for side in ("dense", name)}
    ratios = [d / o for d, o in zip(times[best["dense"]], times[best[name]], strict=True)]
    networks = {"dense": dense, name: deployed}
    if packed is not None and best["dense"] == "dense prepacked":
        networks["dense"] = packed
    layers = [layer for layer, module in deployed.named_modules() if isinstance(module, kind)]
    return {
        "dense_ms": middle[best["dense"]],
        f"{name}_ms": middle[best[name]],
        "speedup": median(ratios),
        "candidates_ms": middle,
        "shape": list(x.shape),
        "threads": torch.get_num_threads(),
        "layers": _layer_latency(networks, layers, x, best),
    }


def _channels_last(network: nn.Module) -> nn.Module:
    """A copy whose weights, and hence whose maps, hold the channels of a pixel side by side."""
    result = copy.deepcopy(network)
    for parameter in result.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return result


class _Prepacked(nn.Module):
    """A convolution with its weights in oneDNN's own layout and its activation fused, as a compiler would leave it."""

    def __init__(self, conv: nn.Conv2d, activation: str, shape: list[int]) -> None:
        super().__init__()
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *self.geometry, shape)
        self.bias = conv.bias
        self.activation = {"identity": ("none", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0])}[
            activation
        ]

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        convolution, (name, scalars) = torch.ops.mkldnn._convolution_pointwise, self.activation
        if residual is None:
            y: Tensor = convolution(input, self.weight, self.bias, *self.geometry, name, scalars, "")
            return y
        summed = (input, residual, self.weight, self.bias, *self.geometry, "add", 1.0, name, scalars, "")
        y = convolution.binary(*summed)
        return y


def _prepacked(network: nn.Module, x: Tensor) -> nn.Module | None:
    """A copy whose fused convolutions (``layer`` and its ``activation``) are prepacked; None where torch has no oneDNN."""
    if not torch._C._has_mkldnn or x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    result = copy.deepcopy(network)
    layers = {n: m for n, m in result.named_modules() if isinstance(getattr(m, "layer", None), nn.Conv2d)}
    inputs = _inputs(result, layers, x)
    for name, layer in layers.items():
        result.set_submodule(name, _Prepacked(layer.layer, layer.activation, list(inputs[name][0].shape)))
    return result


def _inputs(network: nn.Module, layers: Mapping[str, nn.Module], x: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """What each of ``layers`` gets when ``network`` runs on ``x``."""
    inputs: dict[str, tuple[Tensor, ...]] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.__setitem__(name, args)

    hooks = [layer.register_forward_pre_hook(remember(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _layer_latency(
    networks: Mapping[str, nn.Module], names: Sequence[str], x: Tensor, forms: Mapping[str, str]
) -> list[Results]:
    """The named layers in each network, in its winning form, on the input that they get in the last one."""
    layout = {
        side: torch.contiguous_format if "contiguous" in form else torch.channels_last for side, form in forms.items()
    }
    *_, last = networks.values()
    inputs = _inputs(last, {name: last.get_submodule(name) for name in names}, x)
    rows = []
    for name in names:
        runs = {}
        for side, network in networks.items():
            layer = network.get_submodule(name)
            if forms[side].endswith("channels_last"):
                layer = _channels_last(layer)
            first, *rest = (value.contiguous(memory_format=layout[side]) for value in inputs[name])
            runs[side] = (_with(layer, rest), first)
        times = interleaved(runs, 101, warmup=10)
        rows.append({"name": name, **{f"{side}_ms": 1e3 * median(taken) for side, taken in times.items()}})
    return rows


def _with(layer: nn.Module, rest: list[Tensor]) -> Callable[[Tensor], Any]:
    return lambda value: layer(value, *rest)
