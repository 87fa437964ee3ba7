# SPDX-License-Identifier: Apache-2.0
"""AWQ checkpoints of 4 bits, in both layouts that are about.

"gemm": what AutoAWQ writes and transformers reads.

===========  ===================  ======================================================================================
``qweight``  int32 ``[K, N/8]``    field i of a word is output ``8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]``, low bits first
``qzeros``   int32 ``[G, N/8]``    in the same order; ``W = (q - zero) * scale``
``scales``   fp16 ``[G, N]``
===========  ===================  ======================================================================================

"llm-awq": the newer one of the authors' own library; AutoAWQ's "gemv_fast", which calls ``scaled_zeros`` ``qzeros``.

=================  ==================  =====================================================================================
``qweight``        int16 ``[N/4, K]``   four outputs, 64 inputs at a time; 32 inputs in the order ``8 a + 2 b + c``, by b, c, a
``scales``         fp16 ``[G', N]``     G' is G filled up with zeros
``scaled_zeros``   fp16 ``[G', N]``     ``-scale * zero``: ``W = q * scale + scaled_zero``
=================  ==================  =====================================================================================

Source: Lin et al. 2024 (AWQ, 2306.00978); the layouts of AutoAWQ 0.2 and llm-awq.
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
    spread,
    to_words,
)
from cofire.ops import QTensor, pack_bits, unpack_bits
from cofire.ops.checks import check_choice, check_integer, refuse

__all__ = ["from_awq", "to_awq"]

LAYOUTS = ("gemm", "llm-awq")
FORMATS = {"gemm": "awq", "llm-awq": "llm-awq"}


def _from_order(x: Tensor) -> Tensor:
    """``[..., N]`` as packed to the order of outputs: field ``4 h + m`` of a word is output ``2 m + h``."""
    return x.view(*x.shape[:-1], x.shape[-1] // 8, 2, 4).transpose(-1, -2).flatten(-3)


def _to_order(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], x.shape[-1] // 8, 4, 2).transpose(-1, -2).flatten(-3)


def from_awq(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None = None,
    scaled_zeros: Tensor | None = None,
    *,
    group_size: int | None = None,
) -> QTensor:
    """From the tensors of an AWQ layer: "gemm" with ``qzeros``, "llm-awq" with ``scaled_zeros``.

    Args:
        qweight: int32 ``[K, N / 8]``, or int16 ``[N / 4, K]``.
        scales: fp16 or bf16 ``[G, N]``; filled up in "llm-awq".
        qzeros: int32 ``[G, N / 8]``; or, in floats, ``scaled_zeros`` by AutoAWQ's name.
        scaled_zeros: like ``scales``.
        group_size: needed for "llm-awq", whose shapes do not tell; elsewhere ``K / G``.

    Returns:
        A :class:`~cofire.ops.QTensor` ``[N, K]`` of the dtype of ``scales``; exact. "llm-awq" gives an ``offset``,
        and no zero points.

    Raises:
        TypeError: a tensor of another dtype, or neither or both of ``qzeros`` and ``scaled_zeros``.
        ValueError: shapes that do not fit together, numbers that are not finite, padding that is not zero.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> q = quantize_weight(torch.randn(16, 64).half(), "minmax", bits=4, group_size=32)
        >>> layer = to_awq(q)
        >>> torch.equal(from_awq(**layer).unpack(), q.unpack())
        True
    """
    name = "from_awq"
    if isinstance(qzeros, Tensor) and qzeros.is_floating_point() and scaled_zeros is None:
        qzeros, scaled_zeros = None, qzeros
    if (qzeros is None) == (scaled_zeros is None):
        raise TypeError(f"{name}: one of qzeros (gemm) and scaled_zeros (llm-awq) must be given")
    check_tensor(name, "scales", scales, FLOATS, [None, None])
    check_finite(name, scales=scales)
    if qzeros is not None:
        return _from_gemm(qweight, scales, qzeros, group_size)
    assert scaled_zeros is not None
    return _from_llm_awq(qweight, scales, scaled_zeros, group_size)


def _from_gemm(qweight: Tensor, scales: Tensor, qzeros: Tensor, group_size: int | None) -> QTensor:
    name = "from_awq"
    groups, rows = scales.shape
    if rows % 8:
        refuse(name, f"scales must have a multiple of 8 columns, one for each output, got {rows}")
    check_tensor(name, "qweight", qweight, (torch.int32,), [None, rows // 8])
    check_tensor(name, "qzeros", qzeros, (torch.int32,), [groups, rows // 8])
    columns = qweight.shape[0]
    if groups == 0 or columns % groups or group_size not in (None, columns // groups):
        asked = "" if group_size is None else f" of {group_size}"
        refuse(name, f"groups must be equally large: {columns} columns do not divide into {groups} groups{asked}")
    codes = _from_order(from_words(qweight, 4)).t()
    zero = one_zero(_from_order(from_words(qzeros, 4)).t().contiguous())
    return QTensor(
        pack_bits(codes.contiguous(), 4), scales.t().contiguous(), (rows, columns), 4, columns // groups, zero,
        dtype=scales.dtype, format=FORMATS["gemm"],
    )  # fmt: skip


def padded_groups(columns: int, group_size: int) -> int:
    """The rows that llm-awq gives its scales: eights of groups, by ones, twos (groups of 64) or fours (of 32)."""
    several = 1 if group_size >= 128 else 128 // group_size
    eights = -(-(columns // group_size) // 8)
    return -(-eights // several) * several * 8


def _from_llm_awq(qweight: Tensor, scales: Tensor, scaled_zeros: Tensor, group_size: int | None) -> QTensor:
    name = "from_awq"
    if group_size is None:
        raise TypeError(f"{name}: group_size must be given for llm-awq: shapes do not tell it")
    check_integer(name, group_size=group_size)
    rows = scales.shape[1]
    check_tensor(name, "qweight", qweight, (torch.int16,), [None, None])
    columns = qweight.shape[1]
    _check_llm_awq(name, rows, columns, group_size)
    check_tensor(name, "qweight", qweight, (torch.int16,), [rows // 4, columns])
    full, groups = padded_groups(columns, group_size), columns // group_size
    for word, x in (("scales", scales), ("scaled_zeros", scaled_zeros)):
        check_tensor(name, word, x, (scales.dtype,), [full, rows])
        if bool(x[groups:].count_nonzero()):
            refuse(name, f"{word} must be zero from row {groups} on: there are {groups} groups of {group_size}")
    check_finite(name, scaled_zeros=scaled_zeros)
    blocks = unpack_bits(as_bytes(qweight), 4, 4 * columns).view(rows // 4, columns // 64, 4, 2, 4, 2, 4)
    codes = blocks.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows, columns)
    return QTensor(
        pack_bits(codes, 4), scales[:groups].t().contiguous(), (rows, columns), 4, group_size,
        offset=scaled_zeros[:groups].t().contiguous(), dtype=scales.dtype, format=FORMATS["llm-awq"],
    )  # fmt: skip


def _check_llm_awq(name: str, rows: int, columns: int, group_size: int) -> None:
    if rows % 4 or columns % 64:
        refuse(name, f"llm-awq needs a multiple of 4 rows and of 64 columns, got {rows} rows and {columns} columns")
    if group_size < 32 or (group_size < 128 and group_size not in (32, 64)) or columns % group_size:
        refuse(
            name, f"llm-awq needs groups of 32, 64, or 128 and more, that divide {columns} columns, got {group_size}"
        )


def to_awq(q: QTensor, layout: str | None = None) -> dict[str, Tensor]:
    """To the tensors of an AWQ layer.

    Args:
        q: of 4 bits, without table and order of columns.
        layout: "gemm" or "llm-awq"; None: the one that ``q`` came from, or "gemm".

    Returns:
        ``qweight``, ``scales``, and ``qzeros`` or ``scaled_zeros``: what :func:`from_awq` takes, and where ``q`` came from
        it, the same bits. Scales of more than 16 bits are rounded to fp16; scaled zeros are ``-scale * zero`` rounded to the dtype
        of the scales.

    Raises:
        ValueError: the format cannot hold it: the sentence says why.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> layer = to_awq(quantize_weight(torch.randn(16, 64), "minmax", bits=4, group_size=64), "llm-awq")
        >>> {name: list(t.shape) for name, t in layer.items()}
        {'qweight': [4, 64], 'scales': [16, 16], 'scaled_zeros': [16, 16]}
    """
    name = "to_awq"
    check_weight(name, q, "lut", "perm")
    if layout is None:
        layout = "llm-awq" if q.format == FORMATS["llm-awq"] else "gemm"
    check_choice(name, "layout", layout, LAYOUTS)
    if q.bits != 4:
        refuse(name, f"the format has 4 bits, got {q.bits}")
    (rows, columns), size = q.shape, q.group_size
    scale = scales_of(q)
    if scale.dtype not in HALF and q.format not in FORMATS.values():
        scale = rounded(name, "scale", scale, torch.float16)
    if layout == "gemm":
        check_weight(name, q, "offset")
        if rows % 8:
            refuse(name, f"gemm needs a multiple of 8 rows, got {rows}")
        return {
            "qweight": to_words(_to_order(q.unpack().t()), 4, torch.int32),
            "scales": scale.t().contiguous(),
            "qzeros": to_words(_to_order(integer_zeros(name, q).t()), 4, torch.int32),
        }
    _check_llm_awq(name, rows, columns, size)
    codes = q.unpack().view(rows // 4, 4, columns // 64, 2, 4, 4, 2).permute(0, 2, 1, 3, 5, 6, 4)
    offset = q.offsets()
    if offset is None or q.zero is not None:
        shift = -(scale.float() * spread(q.zero, q).float()) if q.zero is not None else torch.zeros_like(scale)
        offset = shift if offset is None else offset.float() + shift
    offset = rounded(name, "offset", offset, scale.dtype)
    more = padded_groups(columns, size) - columns // size
    filled = {
        word: torch.nn.functional.pad(x, (0, more)).t().contiguous()
        for word, x in (("scales", scale), ("scaled_zeros", offset))
    }
    return {"qweight": to_words(codes.reshape(rows // 4, 4 * columns), 4, torch.int16), **filled}
