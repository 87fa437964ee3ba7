# SPDX-License-Identifier: Apache-2.0
"""One layer's weight out of a checkpoint, as transformers writes it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cofire.formats.awq import from_awq
from cofire.formats.bitsandbytes import from_bitsandbytes
from cofire.formats.coreml import from_coreml
from cofire.formats.gptq import BITS, from_gptq
from cofire.ops import QTensor
from cofire.ops.checks import check_choice, refuse

__all__ = ["from_checkpoint"]

FORMATS = ("gptq", "gptq_v2", "awq", "llm-awq", "bitsandbytes", "coreml")


def from_checkpoint(
    tensors: Mapping[str, Tensor], prefix: str, format: str, *, group_size: int | None = None
) -> QTensor:
    """The weight of one layer out of the tensors of a checkpoint.

    Args:
        tensors: by name, as ``safetensors.torch.load_file`` gives them.
        prefix: of the layer: "model.layers.0.mlp.up_proj".
        format: "gptq", "gptq_v2", "awq" (AutoAWQ's), "llm-awq", "bitsandbytes", or "coreml".
        group_size: needed for "llm-awq" only.

    Returns:
        A :class:`~cofire.ops.QTensor`. How many bits a weight of GPTQ has follows from the shapes.

    Raises:
        ValueError: an unknown format, or a layer without the tensors of it.

    Example:
        >>> import torch
        >>> from cofire.formats import to_gptq
        >>> from cofire.ops import quantize_weight
        >>> layer = to_gptq(quantize_weight(torch.randn(32, 64), "minmax", bits=3, group_size=64))
        >>> from_checkpoint({f"fc.{n}": t for n, t in layer.items()}, "fc", "gptq").bits
        3
    """
    name = "from_checkpoint"
    check_choice(name, "format", format, FORMATS)
    start = f"{prefix}." if prefix else ""
    own = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
    if format == "llm-awq" and "qzeros" in own:
        own["scaled_zeros"] = own.pop("qzeros")  # AutoAWQ's name
    need = {
        "awq": ("qweight", "scales", "qzeros"),
        "llm-awq": ("qweight", "scales", "scaled_zeros"),
        "bitsandbytes": ("weight", "weight.absmax", "weight.quant_map"),
        "coreml": ("weight",),
    }.get(format, ("qweight", "qzeros", "scales"))
    missing = [n for n in need if n not in own]
    if missing:
        refuse(name, f"the layer {prefix!r} must have {', '.join(need)} ({format}), and has no {', '.join(missing)}")
    if format == "coreml":
        return from_coreml(own)
    if format == "bitsandbytes":
        return from_bitsandbytes(own["weight"], {k[7:]: t for k, t in own.items() if k.startswith("weight.")})
    if format in ("awq", "llm-awq"):
        return from_awq(**{n: own[n] for n in need}, group_size=group_size)
    rows = max(own["scales"].shape[-1], 1)
    bits = own["qzeros"].shape[-1] * 32 // rows
    if bits not in BITS:
        refuse(name, f"the layer {prefix!r} must have 2, 3, 4 or 8 bits, got {bits} by its shapes")
    parts = {n: own[n] for n in (*need, "g_idx") if n in own}
    return from_gptq(**parts, bits=bits, version=2 if format == "gptq_v2" else 1)
