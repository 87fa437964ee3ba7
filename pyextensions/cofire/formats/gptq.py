# SPDX-License-Identifier: Apache-2.0
"""GPTQ checkpoints (AutoGPTQ, GPTQModel, Optimum): 2, 3, 4 or 8 bits in 32-bit words.

===========  ====================  ==================================================================================
``qweight``  int32 ``[K b/32, N]``  codes of a column as one stream of bits along K, low bits first (3 bits: 32 codes in
                                   three words, two of them across words)
``qzeros``   int32 ``[G, N b/32]``  zero points as a stream along N; version 1 stores ``zero - 1`` modulo ``2^b``
``scales``   fp16 ``[G, N]``
``g_idx``    int32 ``[K]``          the group of each column; in steps without activation order
===========  ====================  ==================================================================================

``W[n, k] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n])``. Columns in activation order are brought into the order of
their groups, and the :class:`~cofire.ops.QTensor` carries that order as ``perm``.

Source: Frantar et al. 2023 (GPTQ, 2210.17323); the layouts of AutoGPTQ 0.7 and GPTQModel ("gptq", "gptq_v2").
"""

from __future__ import annotations

import torch
from torch import Tensor

from cofire.formats.parts import (
    FLOATS,
    HALF,
    as_bytes,
    check_finite,
    check_tensor,
    check_weight,
    from_words,
    integer_zeros,
    one_zero,
    rounded,
    scales_of,
    to_words,
)
from cofire.ops import QTensor, pack_bits, unpack_bits
from cofire.ops.checks import check_integer, refuse, shape_of

__all__ = ["from_gptq", "to_gptq"]

BITS = (2, 3, 4, 8)
VERSIONS = {1: "gptq", 2: "gptq_v2"}
INTEGERS = (torch.int32, torch.int64)


def _check(operator: str, bits: int, version: int) -> None:
    check_integer(operator, bits=bits, version=version)
    if bits not in BITS:
        refuse(operator, f"bits must be 2, 3, 4 or 8, got {bits}")
    if version not in VERSIONS:
        refuse(operator, f"version must be 1 or 2, got {version}")


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int,
    version: int = 1,
) -> QTensor:
    """From the tensors of a GPTQ layer.

    Args:
        qweight: int32 ``[K bits / 32, N]``.
        qzeros: int32 ``[G, N bits / 32]``.
        scales: fp16, bf16 or fp32 ``[G, N]``.
        g_idx: int32 ``[K]``: the group of each column, in any order; None: K / G columns at a time.
        bits: 2, 3, 4 or 8.
        version: 1 (``checkpoint_format`` "gptq", and everything before there was one) or 2 ("gptq_v2").

    Returns:
        A :class:`~cofire.ops.QTensor` ``[N, K]`` of the dtype of ``scales``; exact.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes that do not fit together, groups that are not equally large, scales that are not finite.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> q = quantize_weight(torch.randn(32, 64).half(), "minmax", bits=4, group_size=32)
        >>> layer = to_gptq(q)
        >>> {name: list(t.shape) for name, t in layer.items()}
        {'qweight': [8, 32], 'qzeros': [2, 4], 'scales': [2, 32], 'g_idx': [64]}
        >>> torch.equal(from_gptq(**layer, bits=4).unpack(), q.unpack())
        True
    """
    name = "from_gptq"
    _check(name, bits, version)
    check_tensor(name, "scales", scales, FLOATS, [None, None])
    groups, rows = scales.shape
    if rows * bits % 32:
        refuse(name, f"the {rows} rows of {bits} bits must fill words of 32 bits")
    check_tensor(name, "qweight", qweight, (torch.int32,), [None, rows])
    check_tensor(name, "qzeros", qzeros, (torch.int32,), [groups, rows * bits // 32])
    columns = qweight.shape[0] * 32 // bits
    if qweight.shape[0] * 32 % bits:
        refuse(name, f"qweight must hold whole codes of {bits} bits, got {qweight.shape[0]} words of 32 bits")
    if groups == 0 or columns % groups:
        refuse(name, f"groups must be equally large: {columns} columns do not divide into {groups} groups")
    check_finite(name, scales=scales)
    size = columns // groups
    packed = as_bytes(qweight.t())
    perm = None if g_idx is None else _order(g_idx, groups, columns)
    if perm is not None:
        packed = pack_bits(unpack_bits(packed, bits, columns)[:, perm], bits)
    zero = from_words(qzeros, bits)
    if version == 1:
        zero = (zero + 1) & ((1 << bits) - 1)
    return QTensor(
        packed, scales.t().contiguous(), (rows, columns), bits, size, one_zero(zero.t().contiguous()), perm=perm,
        dtype=scales.dtype, format=VERSIONS[version],
    )  # fmt: skip


def _order(g_idx: Tensor, groups: int, columns: int) -> Tensor | None:
    """The columns in the order of their groups; None where they are in it."""
    check_tensor("from_gptq", "g_idx", g_idx, INTEGERS, [columns])
    index, size = g_idx.long(), columns // groups
    if columns and not 0 <= int(index.min()) <= int(index.max()) < groups:
        refuse("from_gptq", f"g_idx must be in 0 to {groups - 1}, got {int(index.min())} to {int(index.max())}")
    counts = torch.bincount(index, minlength=groups)
    if not bool((counts == size).all()):
        found = f"{int(counts.min())} to {int(counts.max())}"
        refuse("from_gptq", f"g_idx must put {size} columns into each of {groups} groups, got {found}")
    order = torch.argsort(index, stable=True)
    return None if bool((order == torch.arange(columns, device=order.device)).all()) else order


def to_gptq(q: QTensor, version: int | None = None) -> dict[str, Tensor]:
    """To the tensors of a GPTQ layer.

    Args:
        q: with 2, 3, 4 or 8 bits, integer zero points, no table.
        version: 1 or 2; None: the one that ``q`` came from, or 1. Readers of version 1 differ in what they do with the
            zero point 0, which it stores as ``2^bits - 1``: take 2 where there are such.

    Returns:
        ``qweight``, ``qzeros``, ``scales``, ``g_idx``: what :func:`from_gptq` takes, and where ``q`` came from it, the
        same bits. Scales that are not of 16 bits are rounded to fp16, unless they came so.

    Raises:
        ValueError: the format cannot hold it: the sentence says why.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> sorted(to_gptq(quantize_weight(torch.randn(32, 64), "minmax", bits=3, group_size=64)))
        ['g_idx', 'qweight', 'qzeros', 'scales']
    """
    name = "to_gptq"
    check_weight(name, q, "lut", "offset")
    if version is None:
        version = 2 if q.format == "gptq_v2" else 1
    _check(name, q.bits, version)
    (rows, columns), bits, size = q.shape, q.bits, q.group_size
    if rows * bits % 32 or columns * bits % 32:
        refuse(
            name, f"rows and columns of {bits} bits must fill words of 32 bits, got {rows} rows and {columns} columns"
        )
    scale = scales_of(q)
    if scale.dtype not in HALF and q.format not in VERSIONS.values():
        scale = rounded(name, "scale", scale, torch.float16)
    zero = integer_zeros(name, q)
    if version == 1:
        zero = (zero - 1) & ((1 << bits) - 1)
    group = torch.arange(columns, dtype=torch.int32, device=q.device) // size
    packed = q.codes
    if q.perm is not None:
        if not torch.equal(q.perm.sort().values, torch.arange(columns, device=q.device)):
            refuse(
                name, f"perm must be a permutation of the {columns} columns, got {shape_of(q.perm)} with repetitions"
            )
        back = torch.argsort(q.perm)
        packed = pack_bits(q.unpack()[:, back], bits)
        group = group[back]
    return {
        "qweight": packed.contiguous().view(torch.int32).t().contiguous(),
        "qzeros": to_words(zero.t().contiguous(), bits, torch.int32),
        "scales": scale.t().contiguous(),
        "g_idx": group,
    }
