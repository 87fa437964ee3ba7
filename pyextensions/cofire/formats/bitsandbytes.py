# SPDX-License-Identifier: Apache-2.0
"""Weights of bitsandbytes in NF4 and FP4, with plain and with nested statistics.

The codes lie in one row, whatever the shape of the weight, two in a byte, the first in the high half; blocks of
``blocksize`` codes share a scale (``absmax``), and may cross rows. Then a group of the :class:`~cofire.ops.QTensor` is the
largest part of a block that rows keep whole: ``gcd(K, blocksize)`` columns.

Beside the codes, in a checkpoint (``QuantState.as_dict(packed=True)``):

=====================================  =================================================================================
``absmax``                             fp32 ``[blocks]``; nested: uint8, whose values are in the nested table
``quant_map``                          fp32 ``[16]``: the table of NF4 or FP4
``nested_absmax, nested_quant_map``    nested: fp32, one scale per ``nested_blocksize`` scales; fp32 ``[256]``
``quant_state.bitsandbytes__nf4``      uint8: JSON of the rest (or ``__fp4``): sizes, dtype, shape, and ``nested_offset``, the mean
=====================================  =================================================================================

Source: Dettmers et al. 2023 (QLoRA, 2305.14314), section 3; the layout of bitsandbytes 0.41 to 0.50.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cofire.formats.parts import as_bytes, check_finite, check_tensor, check_weight
from cofire.ops import NF4, NestedScale, QTensor, pack_bits, unpack_bits
from cofire.ops.checks import refuse

__all__ = ["from_bitsandbytes", "to_bitsandbytes"]

#: bitsandbytes' own 4-bit float: unlike E2M1's, its smallest number is subnormal, 1/16 of the next.
FP4 = tuple(s * v / 12 for s in (1, -1) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
TABLES = {"nf4": NF4, "fp4": FP4}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "quant_state.bitsandbytes__"


def _settings(state: Any) -> dict[str, Any]:
    """Tensors and settings by bitsandbytes' names."""
    if not isinstance(state, Mapping):
        if not hasattr(state, "as_dict"):
            raise TypeError(f"from_bitsandbytes: state must be a mapping or a QuantState, got {type(state).__name__}")
        state = state.as_dict()
    found = dict(state)
    for key in [k for k in found if k.startswith(STATE)]:
        found |= json.loads(bytes(found.pop(key).tolist()))
    missing = [k for k in ("absmax", "quant_map", "blocksize", "quant_type", "dtype", "shape") if k not in found]
    if missing:
        refuse("from_bitsandbytes", f"state must have {', '.join(missing)}, got {', '.join(sorted(found))}")
    return found


def from_bitsandbytes(data: Tensor, state: Any) -> QTensor:
    """From a 4-bit weight of bitsandbytes.

    Args:
        data: the packed codes, ``(N K) / 2`` bytes in any shape and dtype.
        state: a ``QuantState``, or the mapping of the module's table, packed or not.

    Returns:
        A :class:`~cofire.ops.QTensor` ``[N, K]``; exact, and nested where the statistics are.

    Raises:
        TypeError: a tensor of the wrong dtype, or a state that is none.
        ValueError: no matrix, an odd number of columns, sizes that do not fit together.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> q = quantize_weight(torch.randn(8, 128), "nf4", group_size=64)
        >>> data, state = to_bitsandbytes(q)
        >>> data.shape, sorted(state)
        (torch.Size([512, 1]), ['absmax', 'quant_map', 'quant_state.bitsandbytes__nf4'])
        >>> torch.equal(from_bitsandbytes(data, state).dequantize(), q.dequantize())
        True
    """
    name = "from_bitsandbytes"
    known = _settings(state)
    kind, blocksize, shape = known["quant_type"], int(known["blocksize"]), tuple(known["shape"])
    if kind not in TABLES:
        refuse(name, f"quant_type must be nf4 or fp4, got {kind!r}")
    if len(shape) != 2 or shape[1] % 2:
        refuse(name, f"the weight must be a matrix of an even number of columns, got shape {list(shape)}")
    rows, columns = shape
    packed = as_bytes(data).flatten()
    if packed.numel() != rows * columns // 2:
        refuse(name, f"data must have {rows * columns // 2} bytes for a weight {list(shape)}, got {packed.numel()}")
    group = math.gcd(columns, blocksize)
    blocks, parts = -(-rows * columns // blocksize), blocksize // group
    check_tensor(name, "quant_map", known["quant_map"], (torch.float32,), [16])

    def per_group(x: Tensor) -> Tensor:
        return x.repeat_interleave(parts)[: rows * columns // group].view(rows, columns // group)

    absmax: Tensor = known["absmax"]
    scale: Tensor | NestedScale
    if "nested_absmax" in known:
        size = int(known["nested_blocksize"])
        check_tensor(name, "absmax", absmax, (torch.uint8,), [blocks])
        check_tensor(name, "nested_absmax", known["nested_absmax"], (torch.float32,), [-(-blocks // size)])
        check_tensor(name, "nested_quant_map", known["nested_quant_map"], (torch.float32,), [256])
        mean = torch.tensor(float(known["nested_offset"]), device=absmax.device)
        check_finite(name, nested_absmax=known["nested_absmax"], nested_offset=mean)
        scale = NestedScale(per_group(absmax), known["nested_quant_map"], known["nested_absmax"], mean, size * parts)
    else:
        check_tensor(name, "absmax", absmax, (torch.float32,), [blocks])
        check_finite(name, absmax=absmax)
        scale = per_group(absmax)
    swapped = (packed << 4) | (packed >> 4)  # our rows begin with the low half
    return QTensor(
        swapped.view(rows, columns // 2), scale, (rows, columns), 4, group, lut=known["quant_map"][None].clone(),
        dtype=getattr(torch, str(known["dtype"]).removeprefix("torch.")), format=f"bitsandbytes-{kind}-{blocksize}",
    )  # fmt: skip


def to_bitsandbytes(q: QTensor) -> tuple[Tensor, dict[str, Tensor]]:
    """To a 4-bit weight of bitsandbytes.

    Args:
        q: with the table of NF4 or of bitsandbytes' FP4, and groups of 32 to 4096 columns. The "fp4" of
            :func:`cofire.ops.quantize_weight` is E2M1 and has another table.

    Returns:
        The codes, uint8 ``[N K / 2, 1]``, and the mapping that goes with them into a checkpoint
        (``QuantState.from_dict`` reads it). Where ``q`` came from bitsandbytes: the same bits.

    Raises:
        ValueError: the format cannot hold it: the sentence says why.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> data, state = to_bitsandbytes(quantize_weight(torch.randn(8, 128), "nf4", group_size=64))
        >>> data.shape, state["absmax"].shape
        (torch.Size([512, 1]), torch.Size([16]))
    """
    name = "to_bitsandbytes"
    check_weight(name, q, "zero", "offset", "perm")
    (rows, columns), source = q.shape, q.format.split("-")
    if q.bits != 4 or q.lut is None or q.lut.shape[0] != 1:
        refuse(name, f"the format has 4 bits and one table, that of NF4 or FP4, got {q!r}")
    table = q.lut[0].float().contiguous()
    near = {kind: torch.equal(table, table.new_tensor(values)) for kind, values in TABLES.items()}
    kind = source[1] if source[0] == "bitsandbytes" else next((k for k, same in near.items() if same), "")
    if not kind:
        refuse(name, f"the table must be bitsandbytes' NF4 or FP4, got {[round(v, 4) for v in table.tolist()]}")
    blocksize = int(source[2]) if source[0] == "bitsandbytes" else q.group_size
    if blocksize not in BLOCKSIZES and source[0] != "bitsandbytes":
        refuse(name, f"groups must have a size of {', '.join(map(str, BLOCKSIZES))}, got {q.group_size}")
    if columns % 2:
        refuse(name, f"the number of columns must be even, got {columns}")
    step = blocksize // q.group_size
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": blocksize,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": [rows, columns],
    }
    if isinstance(q.scale, NestedScale):
        tensors["absmax"] = q.scale.codes.flatten()[::step].clone()
        tensors["quant_map"] = table
        tensors |= {"nested_absmax": q.scale.absmax, "nested_quant_map": q.scale.table}
        settings |= {
            "nested_blocksize": q.scale.block // step,
            "nested_dtype": str(q.scale.absmax.dtype).removeprefix("torch."),
            "nested_offset": float(q.scale.mean),
        }
    else:
        scale = torch.ones(rows, columns // q.group_size, device=q.device) if q.scale is None else q.scale
        tensors |= {"absmax": scale.float().flatten()[::step].clone(), "quant_map": table}
    text = json.dumps(settings).encode()
    tensors[STATE + kind] = torch.tensor(list(text), dtype=torch.uint8, device=q.device)
    packed = pack_bits(unpack_bits(q.codes, 4, columns).reshape(1, -1), 4)
    return ((packed << 4) | (packed >> 4)).view(-1, 1), tensors
