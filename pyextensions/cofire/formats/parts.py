# SPDX-License-Identifier: Apache-2.0
"""What the converters share: fields of bits in words, and the sentences about what a format cannot hold."""

from __future__ import annotations

import torch
from torch import Tensor

from cofire.ops import QTensor, pack_bits, unpack_bits
from cofire.ops.checks import refuse, shape_of

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)


def as_bytes(x: Tensor) -> Tensor:
    """uint8 ``[..., n s]`` of ``[..., n]`` of s bytes each: the least byte of each word first, as little-endian machines do."""
    return x.contiguous().view(torch.uint8)


def from_words(words: Tensor, bits: int) -> Tensor:
    """uint8 ``[..., n]``: the fields of ``bits`` bits in integers, those of low weight first."""
    packed = as_bytes(words)
    return unpack_bits(packed, bits, packed.shape[-1] * 8 // bits)


def to_words(values: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The way back from :func:`from_words`; the fields must fill whole words."""
    return pack_bits(values, bits).view(dtype)


def check_tensor(operator: str, name: str, x: object, dtypes: tuple[torch.dtype, ...], shape: list[int | None]) -> None:
    """Type, dtype and shape; None in the shape is any size."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{operator}: {name} must be {' or '.join(str(d) for d in dtypes)}, got {x.dtype}")
    if x.dim() != len(shape) or any(want is not None and want != got for want, got in zip(shape, x.shape)):
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        refuse(operator, f"{name} must have shape [{sizes}], got {shape_of(x)}")


def check_finite(operator: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not bool(x.isfinite().all()):
            wrong = int((~x.isfinite()).sum())
            refuse(operator, f"{name} must be finite, got {wrong} values that are not, of {x.numel()}")


def check_weight(operator: str, q: QTensor, *without: str) -> None:
    """That it is a weight, and has none of the parts that the format has no place for."""
    if not isinstance(q, QTensor):
        raise TypeError(f"{operator}: q must be a QTensor, got {type(q).__name__}")
    why = {
        "zero": "zero points",
        "offset": "offsets",
        "lut": "tables of values",
        "perm": "another order of columns (perm)",
    }
    for part in without:
        if getattr(q, part) is not None:
            refuse(operator, f"the format has no place for {why[part]}, which this weight has: {q!r}")


def one_zero(zero: Tensor) -> Tensor:
    """``[1, 1]`` where all zero points are equal, which kernels read once."""
    if zero.numel() > 1 and bool((zero == zero[0, 0]).all()):
        return zero[:1, :1].clone()
    return zero


def spread(part: Tensor, q: QTensor) -> Tensor:
    """``[1, 1]`` to one value per group."""
    return part.expand(q.shape[0], q.shape[1] // q.group_size)


def scales_of(q: QTensor) -> Tensor:
    """Scales ``[N, G]``, ones where there are none."""
    scale = q.scales()
    if scale is None:
        scale = torch.ones(q.shape[0], q.shape[1] // q.group_size, device=q.device, dtype=q.dtype)
    return scale


def integer_zeros(operator: str, q: QTensor, default: int = 0) -> Tensor:
    """Zero points uint8 ``[N, G]``, each of them a code."""
    if q.zero is None:
        zero = torch.full((1, 1), default, dtype=torch.uint8, device=q.device)
    else:
        zero = q.zero
        if zero.is_floating_point() and zero.numel():
            if not bool((zero == zero.round()).all()):
                refuse(operator, "zero points must be integers for this format, and some of this weight's are not")
        if zero.numel() and (float(zero.min()) < 0 or float(zero.max()) > (1 << q.bits) - 1):
            refuse(operator, f"zero points must be codes, 0 to {(1 << q.bits) - 1}, and some of this weight's are not")
        zero = zero.to(torch.uint8)
    return spread(zero, q)


def rounded(operator: str, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the format; refused where that would turn a finite number into an infinity."""
    y = x.to(dtype)
    if x.numel() and not bool((y.isfinite() == x.isfinite()).all()):
        refuse(operator, f"{name} must fit {dtype}, got up to {float(x.abs().max()):.3g}")
    return y
