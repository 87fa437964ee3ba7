# SPDX-License-Identifier: Apache-2.0
"""Small integers, packed: one plain little-endian stream of bits per row.

Value j of a row stands at the bits ``bits * j`` to ``bits * j + bits - 1``; bit i is bit ``i % 8`` of byte ``i // 8``. Rows
begin at bytes; what is left of a row's last byte is zero. Plain torch, for storage and for what decodes a whole matrix:
eight values fill ``bits`` bytes, so each of eight passes does the same to every group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cofire.ops.checks import check_integer, refuse, shape_of

__all__ = ["pack_bits", "packed_bytes", "unpack_bits"]

GROUP = 8  #: values that fill a whole number of bytes, however many bits each has


def packed_bytes(count: int, bits: int) -> int:
    """The bytes of a row of ``count`` values of ``bits`` bits."""
    return (count * bits + 7) // 8


def _check(operator: str, name: str, x: Tensor, bits: int) -> None:
    check_integer(operator, bits=bits)
    if not 1 <= bits <= 8:
        refuse(operator, f"bits must be between 1 and 8, got {bits}")
    if x.dtype != torch.uint8:
        raise TypeError(f"{operator}: {name} must be uint8, got {x.dtype}")
    if x.dim() == 0:
        refuse(operator, f"{name} must have at least one dimension, got shape []")


def _groups(x: Tensor, size: int) -> Tensor:
    """The last dimension in groups of ``size``, filled up with zeros."""
    missing = -x.shape[-1] % size
    x = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def pack_bits(labels: Tensor, bits: int) -> Tensor:
    """Pack small integers along the last dimension.

    Args:
        labels: uint8 ``[..., n]``, each less than ``2^bits``.
        bits: of each, 1 to 8.

    Returns:
        uint8 ``[..., ceil(n * bits / 8)]``.

    Raises:
        TypeError: ``labels`` is not uint8, or ``bits`` no integer.
        ValueError: ``bits`` out of range, or a label that does not fit.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 3).tolist()  # 001, 010, 011 from the right
        [209, 0]
    """
    _check("pack_bits", "labels", labels, bits)
    if labels.numel() and bits < 8:
        largest = int(labels.max())
        if largest >> bits:
            refuse("pack_bits", f"labels must be less than {1 << bits} ({bits} bits), got {largest}")
    values = _groups(labels, GROUP)
    packed = values.new_zeros((*values.shape[:-1], bits))
    for j in range(GROUP):
        byte, shift = bits * j // 8, bits * j % 8
        packed[..., byte] |= values[..., j] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= values[..., j] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_bytes(labels.shape[-1], bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """What :func:`pack_bits` packed.

    Args:
        packed: uint8 ``[..., ceil(count * bits / 8)]``.
        bits: of each value, 1 to 8.
        count: values per row.

    Returns:
        uint8 ``[..., count]``.

    Raises:
        TypeError: ``packed`` is not uint8; ``bits`` or ``count`` no integer.
        ValueError: ``bits`` out of range, or rows of another length.

    Example:
        >>> unpack_bits(torch.tensor([209, 0], dtype=torch.uint8), 3, 3).tolist()
        [1, 2, 3]
    """
    _check("unpack_bits", "packed", packed, bits)
    check_integer("unpack_bits", count=count)
    if count < 0 or packed.shape[-1] != packed_bytes(count, bits):
        refuse(
            "unpack_bits",
            f"{count} values of {bits} bits take {packed_bytes(count, bits)} bytes, got {shape_of(packed)}",
        )
    if bits == 8:
        return packed.clone()
    groups = _groups(packed, bits)
    values = groups.new_empty((*groups.shape[:-1], GROUP))
    for j in range(GROUP):
        byte, shift = bits * j // 8, bits * j % 8
        value = groups[..., byte] >> shift
        if shift + bits > 8:
            value = value | (groups[..., byte + 1] << (8 - shift))
        values[..., j] = value & ((1 << bits) - 1)
    return values.flatten(-2)[..., :count].contiguous()
