# SPDX-License-Identifier: Apache-2.0
"""torchao's 4-bit weights: three ways to lay out the same ``W = (q - 8) * scale + zero_point``, with a float zero point.

"tile_packed_to_4d" (``Int4TilePackedTo4dTensor``, the tinygemm kernels of CUDA): int32 ``[N/8, K/128, 32, 4]`` of a weight
filled up to a multiple of 8 rows and 1024 columns. Word j of lane t of a tile holds, of row ``t // 4``, the columns
``32 j + 2 (t % 4) + (0, 8, 16, 24, 1, 9, 17, 25)[i]`` in field i.

"plain" (``Int4Tensor``): int8 ``[N, K/2]``, the first of two codes in the low half, as signed numbers ``q - 8``.

"cpu" (``Int4OpaqueTensor``, ``_weight_int4pack_mm_for_cpu``): uint8 ``[N, K/2]`` in blocks of rows; which, depends on the
instruction set of the machine that packed it: ``capability`` "AVX512", "AVX2", or "DEFAULT".

Scales and zero points are ``scale_and_zero [G, N, 2]``; in "plain" two tensors ``[G, N]``. With scales of 16 bits the decoded
weight is what torch's CPU kernel multiplies with, to the last bit; with fp32 ones that kernel rounds once where two operations
round twice.

Source: torchao 0.18, ``torchao.quantization.quantize_.workflows.int4``; torch 2.13, ``int4mm.cu`` and ``int4mm_kernel.cpp``.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cofire.formats.parts import (
    FLOATS,
    HALF,
    as_bytes,
    check_finite,
    check_tensor,
    check_weight,
    rounded,
    scales_of,
    spread,
    to_words,
)
from cofire.ops import QTensor, pack_bits, unpack_bits
from cofire.ops.checks import check_choice, refuse

__all__ = ["from_torchao", "to_torchao"]

LAYOUTS = ("tile_packed_to_4d", "plain", "cpu")
#: Rows of a block, and how far apart the rows are whose codes share a byte.
BLOCKS = {"AVX512": (64, 32), "AVX2": (32, 16), "DEFAULT": (32, 1)}
ROWS, COLUMNS = 8, 1024  # what tinygemm's weights are filled up to


def from_torchao(
    tensors: Mapping[str, Tensor],
    shape: Sequence[int],
    layout: str = "tile_packed_to_4d",
    *,
    capability: str | None = None,
) -> QTensor:
    """From the tensors of a 4-bit weight of torchao.

    Args:
        tensors: by torchao's names: ``qdata``, and ``scale_and_zero``, or in "plain" ``scale`` and ``zero_point``.
        shape: ``(N, K)`` of the weight.
        layout: "tile_packed_to_4d", "plain" or "cpu".
        capability: for "cpu": "AVX512", "AVX2" or "DEFAULT"; None: this machine's.

    Returns:
        A :class:`~cofire.ops.QTensor` ``[N, K]``, of the dtype of the scales; exact. What the tiles were filled up with is
        dropped.

    Raises:
        KeyError: a tensor that is not there.
        TypeError: one of another dtype.
        ValueError: shapes that do not fit together, numbers that are not finite.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> q = quantize_weight(torch.randn(8, 1024).bfloat16(), "minmax", bits=4, group_size=128)
        >>> tensors = to_torchao(q)
        >>> {name: list(t.shape) for name, t in tensors.items()}
        {'qdata': [1, 8, 32, 4], 'scale_and_zero': [8, 8, 2]}
        >>> torch.equal(from_torchao(tensors, q.shape).unpack(), q.unpack())
        True
    """
    name = "from_torchao"
    check_choice(name, "layout", layout, LAYOUTS)
    if len(shape) != 2:
        refuse(name, f"shape must be [N, K], got {list(shape)}")
    rows, columns = (int(n) for n in shape)
    qdata = tensors["qdata"]
    full = _filled(rows, columns) if layout == "tile_packed_to_4d" else (rows, columns)
    if layout == "plain":
        scale, offset = tensors["scale"], tensors["zero_point"]
        check_tensor(name, "scale", scale, FLOATS, [None, rows])
    else:
        both = tensors["scale_and_zero"]
        check_tensor(name, "scale_and_zero", both, FLOATS, [None, full[0], 2])
        scale, offset = both.unbind(-1)
    check_tensor(name, "zero_point", offset, (scale.dtype,), list(scale.shape))
    check_finite(name, scale=scale, zero_point=offset)
    groups = scale.shape[0]
    if groups == 0 or full[1] % groups or columns % (full[1] // groups):
        refuse(name, f"groups must divide the {columns} columns, got {groups} groups of {full[1]} columns")
    size = full[1] // groups
    if layout == "plain":
        check_tensor(name, "qdata", qdata, (torch.int8, torch.uint8), [rows, columns // 2])
        packed = as_bytes(qdata) ^ 0x88
    elif layout == "cpu":
        check_tensor(name, "qdata", qdata, (torch.uint8,), [rows, columns // 2])
        packed = pack_bits(_from_blocks(qdata, rows, columns, _capability(name, capability)), 4)
    else:
        check_tensor(name, "qdata", qdata, (torch.int32,), [full[0] // 8, full[1] // 128, 32, 4])
        packed = pack_bits(_from_tiles(qdata)[:rows, :columns].contiguous(), 4)
    keep = columns // size
    return QTensor(
        packed, scale[:keep, :rows].t().contiguous(), (rows, columns), 4, size,
        torch.full((1, 1), 8, dtype=torch.uint8, device=packed.device), offset[:keep, :rows].t().contiguous(),
        dtype=scale.dtype, format=f"torchao-{layout}",
    )  # fmt: skip


def to_torchao(
    q: QTensor, layout: str | None = None, *, dtype: torch.dtype | None = None, capability: str | None = None
) -> dict[str, Tensor]:
    """To the tensors of a 4-bit weight of torchao.

    Args:
        q: of 4 bits, without table and order of columns.
        layout: None: the one that ``q`` came from, or "tile_packed_to_4d".
        dtype: of the scales; None: as they are where they came from torchao or have 16 bits, else bfloat16.
        capability: for "cpu": that of the machine that will read it; None: this one's.

    Returns:
        ``qdata``, and ``scale_and_zero`` or ``scale`` and ``zero_point``: what :func:`from_torchao` takes, and where ``q``
        came from it, the same bits. Tiles are filled up as torchao's default does it, with what it makes of zeros.
        Other zero points than 8 become part of the float ones, rounded once.

    Raises:
        ValueError: the format cannot hold it: the sentence says why.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> tensors = to_torchao(quantize_weight(torch.randn(16, 256), "minmax", bits=4, group_size=128), "plain")
        >>> {name: list(t.shape) for name, t in tensors.items()}
        {'qdata': [16, 128], 'scale': [2, 16], 'zero_point': [2, 16]}
    """
    name = "to_torchao"
    check_weight(name, q, "lut", "perm")
    origin = q.format.removeprefix("torchao-") if q.format.startswith("torchao-") else None
    layout = layout or origin or LAYOUTS[0]
    check_choice(name, "layout", layout, LAYOUTS)
    if q.bits != 4:
        refuse(name, f"the format has 4 bits, got {q.bits}")
    rows, columns = q.shape
    scale = scales_of(q)
    if dtype is None:
        dtype = scale.dtype if origin or scale.dtype in HALF else torch.bfloat16
    shift = spread(torch.zeros(1, 1, device=q.device) if q.zero is None else q.zero, q).float()
    offset = q.offsets()
    if offset is None:
        offset = (8 - shift) * scale.float()
    elif not bool((shift == 8).all()):
        offset = offset.float() + (8 - shift) * scale.float()
    scale = rounded(name, "scale", scale, dtype)
    offset = rounded(name, "offset", offset, dtype)
    codes = q.unpack()
    if layout == "tile_packed_to_4d":
        # A group of zeros gets the smallest scale that torchao allows, and from it a zero point of 8 scales.
        more = [full - n for full, n in zip(_filled(rows, columns), (rows, columns))]
        if more[1] % q.group_size:
            refuse(name, f"groups of {q.group_size} columns must divide {columns + more[1]}, to which it is filled up")
        least = torch.finfo(dtype).tiny
        sides = (0, more[1] // q.group_size, 0, more[0])
        scale = torch.nn.functional.pad(scale, sides, value=least)
        offset = torch.nn.functional.pad(offset, sides, value=8 * least)
        qdata = _to_tiles(torch.nn.functional.pad(codes, (0, more[1], 0, more[0])))
    elif columns % 2:
        refuse(name, f"{layout} needs an even number of columns, got {columns}")
    elif layout == "plain":
        qdata = (q.codes ^ 0x88).view(torch.int8)
        return {"qdata": qdata, "scale": scale.t().contiguous(), "zero_point": offset.t().contiguous()}
    else:
        if rows % 16:
            refuse(name, f"cpu needs a multiple of 16 rows, got {rows}")
        qdata = _to_blocks(codes, _capability(name, capability))
    return {"qdata": qdata, "scale_and_zero": torch.stack((scale.t(), offset.t()), -1).contiguous()}


# ------------------------------------------------------------------------------------------------- tiles


def _filled(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS


# A word of a lane, field by field: two columns (c) times four pairs (p) that lie 8 columns apart, all of c = 0 first.
# Column of a row: 128 o + 32 j + 8 p + 2 l + c, of the lane 4 r + l.


def _to_tiles(codes: Tensor) -> Tensor:
    rows, columns = codes.shape
    x = codes.view(rows // 8, 8, columns // 128, 4, 4, 4, 2)  # n r o j p l c
    x = x.permute(0, 2, 1, 5, 3, 6, 4).reshape(rows // 8, columns // 128, 32, 4 * 8)  # n o (r l) (j c p)
    return to_words(x, 4, torch.int32)


def _from_tiles(qdata: Tensor) -> Tensor:
    n, o = qdata.shape[:2]
    x = unpack_bits(as_bytes(qdata), 4, 32).view(n, o, 8, 4, 4, 2, 4)  # n o r l j c p
    return x.permute(0, 2, 1, 4, 6, 3, 5).reshape(8 * n, 128 * o)


# ------------------------------------------------------------------------------------------------- blocks


def _capability(operator: str, capability: str | None) -> str:
    if capability is None:
        capability = torch.backends.cpu.get_cpu_capability()
        if capability not in BLOCKS or platform.machine().lower() not in ("x86_64", "amd64"):
            refuse(operator, f"capability must be given on {platform.machine()}: AVX512, AVX2 or DEFAULT")
    check_choice(operator, "capability", capability, tuple(BLOCKS))
    return capability


def _blocks(rows: int, capability: str) -> list[tuple[int, int, int]]:
    """Of each block its first row, its rows, and the distance of two rows in a byte: neighbours where it is not full."""
    size, apart = BLOCKS[capability]
    return [(at, min(size, rows - at), apart if rows - at >= size else 1) for at in range(0, rows, size)]


def _to_blocks(codes: Tensor, capability: str) -> Tensor:
    rows, columns = codes.shape
    parts = []
    for at, size, apart in _blocks(rows, capability):
        pairs = codes[at : at + size].t().reshape(columns, size // (2 * apart), 2, apart)
        parts.append((pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten())
    return torch.cat(parts).view(rows, columns // 2) if parts else codes.new_zeros(rows, columns // 2)


def _from_blocks(qdata: Tensor, rows: int, columns: int, capability: str) -> Tensor:
    flat, codes = qdata.flatten(), qdata.new_empty(rows, columns)
    if rows % 2:
        refuse("from_torchao", f"cpu needs an even number of rows, got {rows}")
    for at, size, apart in _blocks(rows, capability):
        part = flat[at * columns // 2 : (at + size) * columns // 2].view(columns, size // (2 * apart), 1, apart)
        both = torch.cat((part & 15, part >> 4), 2)
        codes[at : at + size] = both.reshape(columns, size).t()
    return codes
