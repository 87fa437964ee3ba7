# SPDX-License-Identifier: Apache-2.0
"""Palettized models to and from the form in which coremltools' PyTorch tools hand them to its converter.

There a palettized parameter is a plain one that holds the decoded weights; buffers beside it say what it is made of, so
that the converter finds labels and palette again:

===========================================  =================================================================
``_COREML_/weight/compression_type``         ``[2]``: palettization
``_COREML_/weight/lut``                      of rank ``weight.dim() + 2``: palettes per dimension of the weight, then
                                             clusters and vector: ``[P, 1, ..., 1, K, d]`` for groups of rows
``_COREML_/weight/palettization_scale``      factor per row, ``[rows, 1, ...]``; the palette holds weight over factor
``_COREML_/weight/vector_axis``              if d > 1: the dimension of the weight along which vectors lie
``_COREML_/metadata_version``                ``1``, of the whole model
===========================================  =================================================================

Source: coremltools 9.0, ``coremltools.optimize.torch``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cofire import ops
from cofire.nn.palettes import (
    PackedPalette,
    PackedPalettized,
    PackedPalettizedConv2d,
    PackedPalettizedEmbedding,
    PackedPalettizedLinear,
)
from cofire.ops.checks import check_module, refuse, shape_of

__all__ = ["export_coreml", "import_coreml", "read_coreml"]

PREFIX = "_COREML_"
VERSION, PALETTIZATION = 1, 2


def export_coreml(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which each packed layer is a layer of ``torch.nn``, with coremltools' buffers beside its weight.

    Trace the result and give it to ``coremltools.convert`` with a deployment target of iOS 18 or macOS 15.

    Args:
        model: with packed layers, as :meth:`cofire.methods.EDKM.finalize` gives it.

    Raises:
        ValueError: no packed layer; a weight that the format cannot describe: a last group of fewer rows than the others,
            or vectors that do not lie along the input features.

    Example:
        >>> from cofire.nn import PalettizedLinear
        >>> plain = export_coreml(PalettizedLinear(16, 8, bits=2).pack())
        >>> type(plain).__name__, plain.get_buffer("_COREML_/weight/lut").shape
        ('Linear', torch.Size([1, 1, 4, 1]))

    Source: coremltools 9.0, ``CompressionMetadata``.
    """
    check_module("export_coreml", model)
    result = copy.deepcopy(model)
    if not any(isinstance(module, PackedPalettized) for module in result.modules()):
        refuse("export_coreml", "the model has no packed layer; call finalize or pack first")
    # Layers that share a packed weight share the decoded one.
    weights: dict[int, nn.Parameter] = {}
    if isinstance(result, PackedPalettized):
        result = _plain("", result, weights)
    else:
        new: dict[int, nn.Module] = {}
        for name, module in list(result.named_modules()):
            for child_name, child in module._modules.items():
                if isinstance(child, PackedPalettized):
                    full = f"{name}.{child_name}" if name else child_name
                    if id(child) not in new:
                        new[id(child)] = _plain(full, child, weights)
                    module._modules[child_name] = new[id(child)]
    result.register_buffer(f"{PREFIX}/metadata_version", torch.tensor(VERSION))
    return result.eval()


def _plain(name: str, layer: PackedPalettized, weights: dict[int, nn.Parameter]) -> nn.Module:
    palette = layer.palette
    floats = palette.as_floats()  # what the form holds
    if id(palette) not in weights:
        weights[id(palette)] = nn.Parameter(floats.weight, requires_grad=False)
    weight = weights[id(palette)]
    plain = _empty(name, layer, weight)
    plain.weight = weight
    if getattr(layer, "bias", None) is not None:
        plain.bias = copy.deepcopy(layer.bias)
    buffers = palette_buffers("export_coreml", f"layer {name!r}", floats, weight.dtype)
    for key, value in buffers.items():
        plain.register_buffer(f"{PREFIX}/weight/{key}", value.clone())
    return plain


def palette_buffers(operator: str, name: str, palette: PackedPalette, dtype: torch.dtype) -> dict[str, Tensor]:
    """The buffers beside a weight, by their words in the module's table; refused where the format cannot describe it."""
    rows = palette.shape[0]
    if rows % palette.group_rows:
        refuse(
            operator,
            f"{name}: groups must have equally many rows, got {rows} rows in groups of {palette.group_rows}",
        )
    if palette.cluster_dim > 1 and math.prod(palette.shape[2:]) > 1:
        refuse(
            operator,
            f"{name}: vectors must lie along the input channels, which needs a kernel of 1x1, got a weight of "
            f"{list(palette.shape)}",
        )
    ones = [1] * (len(palette.shape) - 1)
    lut = palette.lut.to(dtype)
    buffers = {
        "compression_type": torch.tensor([PALETTIZATION]),
        "lut": lut.reshape(lut.shape[0], *ones, *lut.shape[1:]),
    }
    if palette.scale is not None:
        buffers["palettization_scale"] = palette.scale.to(dtype).view(-1, *ones)
    if palette.cluster_dim > 1:
        buffers["vector_axis"] = torch.tensor(1)
    return buffers


def _empty(name: str, layer: PackedPalettized, weight: Tensor) -> nn.Module:
    """The layer of ``torch.nn`` without its weights."""
    if isinstance(layer, PackedPalettizedLinear):
        return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta", weight.dtype)
    if isinstance(layer, PackedPalettizedEmbedding):
        if layer.padding_idx is not None:
            refuse(
                "export_coreml",
                f"layer {name!r}: padding_idx must be None (its row is not of the palette), got {layer.padding_idx}",
            )
        return nn.Embedding(layer.num_embeddings, layer.embedding_dim, device="meta", dtype=weight.dtype)
    conv = cast(Any, layer)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    geometry = {name: getattr(conv, name) for name in names}
    return nn.Conv2d(**geometry, bias=conv.bias is not None, device="meta", dtype=weight.dtype)


def read_coreml(state_dict: Mapping[str, Tensor]) -> dict[str, PackedPalette]:
    """The palettized parameters in a state that coremltools' PyTorch tools have finalized.

    Args:
        state_dict: with the buffers of the module's table.

    Returns:
        By the parameter's name: its labels and palette.

    Raises:
        ValueError: groups along another dimension than the rows, vectors along another than the second, a palette without a
            weight, or a weight that is not of its palette.

    Example:
        >>> state = {"weight": torch.tensor([[1.0, 3.0], [3.0, 1.0]]), "_COREML_/weight/lut": torch.tensor([1.0, 3.0])}
        >>> state["_COREML_/weight/lut"] = state["_COREML_/weight/lut"].view(1, 1, 2, 1)
        >>> read_coreml(state)["weight"].lut.flatten().tolist()
        [1.0, 3.0]
    """
    found = {}
    for key, lut in state_dict.items():
        prefix, _, buffer = key.rpartition(".") if not key.startswith(PREFIX) else ("", "", key)
        parts = buffer.split("/")
        if parts[0] != PREFIX or len(parts) != 3 or parts[2] != "lut":
            continue
        name = f"{prefix}.{parts[1]}" if prefix else parts[1]
        if name not in state_dict:
            refuse("read_coreml", f"{key!r} is the palette of a parameter {name!r}, which the state does not have")
        others = {
            word: state_dict.get(key.removesuffix("lut") + word) for word in ("palettization_scale", "vector_axis")
        }
        found[name] = _read(name, state_dict[name], lut, others["palettization_scale"], others["vector_axis"])
    return found


def _read(name: str, weight: Tensor, lut: Tensor, scale: Tensor | None, axis: Tensor | None) -> PackedPalette:
    if lut.dim() == weight.dim() + 1:
        lut = lut[..., None]  # scalars, written without the last dimension
    if lut.dim() != weight.dim() + 2:
        refuse("read_coreml", f"{name}: lut must have {weight.dim() + 2} dimensions, got {shape_of(lut)}")
    palettes, d = lut.shape[0], lut.shape[-1]
    if math.prod(lut.shape[1:-2]) != 1 or weight.shape[0] % palettes:
        refuse(
            "read_coreml",
            f"{name}: palettes must belong to groups of rows, got lut {shape_of(lut)} of a weight {shape_of(weight)}",
        )
    if d > 1 and (axis is None or int(axis) != 1 or math.prod(weight.shape[2:]) > 1):
        found = None if axis is None else int(axis)
        refuse(
            "read_coreml",
            f"{name}: vectors must lie along dimension 1, and no further one be larger than 1, got vector_axis {found} of "
            f"a weight {shape_of(weight)}",
        )
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    plain = weight.detach()
    if scale is not None:
        scale = scale.detach().reshape(weight.shape[0])
        plain = plain.to(wide) / scale.to(wide).view(-1, *[1] * (weight.dim() - 1))
    rows, columns = weight.shape[0] // palettes, weight[0].numel()
    labels = []
    for part, entries in zip(plain.reshape(palettes, -1), lut.detach().reshape(palettes, -1, d).to(wide), strict=True):
        if len(entries) == 1:
            entries = entries.expand(2, d)  # k-means has two clusters at least
        size = max(part.numel(), entries.numel())
        labels.append(ops.palettize(part, entries[None].contiguous(), group_size=size)[0].reshape(rows, columns // d))
    packed = PackedPalette.from_labels(
        torch.cat(labels),
        lut.reshape(palettes, -1, d),
        weight.shape,
        group_rows=rows,
        scale=scale,
        dtype=weight.dtype,
    )
    gap = (packed.weight.double() - weight.detach().double()).abs().max()
    if gap > 1e-2 * weight.detach().double().abs().max():
        refuse(
            "read_coreml", f"{name}: the weight must be made of its palette, but differs from it by {float(gap):.3g}"
        )
    return packed


def import_coreml(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which each layer that coremltools' PyTorch tools have palettized is a packed layer.

    Args:
        model: finalized there: a plain model with buffers beside its weights. Linear layers, convolutions and embeddings
            are packed; what else is palettized keeps its decoded weights.

    Raises:
        ValueError: nothing palettized that can be packed; as :func:`read_coreml`.

    Example:
        >>> from cofire.nn import PalettizedLinear
        >>> packed = PalettizedLinear(16, 8, bits=2).pack()
        >>> again = import_coreml(export_coreml(packed))
        >>> torch.equal(again.weight, packed.weight)
        True
    """
    check_module("import_coreml", model)
    result = copy.deepcopy(model)
    weights = read_coreml(result.state_dict())
    new: dict[int, nn.Module] = {}
    shared: dict[int, PackedPalette] = {}
    for name, module in list(result.named_modules()):
        weight = weights.get(f"{name}.weight" if name else "weight")
        if weight is not None:
            weight = shared.setdefault(id(module.weight), weight)
        packed = None if weight is None else _pack(module, weight)
        if packed is not None:
            new[id(module)] = packed
    if not new:
        refuse("import_coreml", "the model has no palettized linear layer, convolution or embedding")
    if id(result) in new:
        return new[id(result)].eval()
    for module in list(result.modules()):
        for child_name, child in module._modules.items():
            if child is not None and id(child) in new:
                module._modules[child_name] = new[id(child)]
    result._buffers.pop(f"{PREFIX}/metadata_version", None)
    return result.eval()


def _pack(module: nn.Module, weight: PackedPalette) -> nn.Module | None:
    if isinstance(module, nn.Embedding):
        row = None if module.padding_idx is None else module.weight.detach()[module.padding_idx].clone()
        return PackedPalettizedEmbedding._around(weight, module.padding_idx, row)
    bias = getattr(module, "bias", None)
    bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    if isinstance(module, nn.Conv2d):
        return PackedPalettizedConv2d._around(weight, bias, module)
    return PackedPalettizedLinear._around(weight, bias) if isinstance(module, nn.Linear) else None
