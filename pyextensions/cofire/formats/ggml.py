# SPDX-License-Identifier: Apache-2.0
"""Tensors of GGUF files: the block formats of ggml.

A row is a sequence of blocks of 32 or 256 weights, each a few bytes of scales and of codes. Small blocks have a scale in fp16
(``d``), and some a minimum (``m``); the K-quants have groups of 16 or 32 inside a block of 256, with scales and minima of 4 to 8
bits that ``d`` and ``m`` multiply. Those become :class:`~cofire.ops.NestedScale`, scales and offsets alike, so that nothing is
lost and nothing grows.

================  ====  =====  =====  =================================================
type              bits  block  group  weight
================  ====  =====  =====  =================================================
Q4_0, Q5_0        4, 5  32     32     ``d * (q - 8)``, ``d * (q - 16)``
Q4_1, Q5_1        4, 5  32     32     ``d * q + m``
Q8_0              8     32     32     ``d * (q - 128)``, stored as signed numbers
IQ4_NL            4     32     32     ``d * table[q]``
MXFP4             4     32     32     ``2^(e - 128) * table[q]``
Q2_K              2     256    16     ``d * s * q - m * t``
Q3_K              3     256    16     ``d * (s - 32) * (q - 4)``
Q4_K, Q5_K        4, 5  256    32     ``d * s * q - m * t``
Q6_K              6     256    16     ``d * s * (q - 32)``
IQ4_XS            4     256    32     ``d * (s - 32) * table[q]``
================  ====  =====  =====  =================================================

Products of ``d``, ``s`` and ``q`` have at most 23 bits, so they are exact in fp32 in any order; where something is added,
one rounding remains. Decoded weights are therefore those of ggml's and gguf's own code, to the last bit.

Source: ggml, ``ggml-common.h`` and ``ggml-quants.c``; the Python package gguf 0.19.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cofire.formats.parts import check_finite, check_tensor, check_weight, rounded, scales_of, spread
from cofire.names import near_matches
from cofire.ops import NestedScale, QTensor, pack_bits
from cofire.ops.checks import refuse

__all__ = ["from_ggml", "to_ggml"]

#: A plane of bits: field, bytes that lie side by side, bits of each value, and where they stand in the whole. The bytes of a
#: run hold first the lowest bits of as many values, then the next.
Plane = tuple[str, int, int, int]


def _split(x: Tensor, width: int, bits: int) -> Tensor:
    """Values ``[B, n * 8 / bits]`` of bytes ``[B, n]``."""
    runs = x.reshape(x.shape[0], x.shape[1] // width, 1, width)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device).view(1, 1, -1, 1)
    return ((runs >> shifts) & ((1 << bits) - 1)).flatten(1)


def _join(values: Tensor, width: int, bits: int) -> Tensor:
    fields = 8 // bits
    runs = values.reshape(values.shape[0], values.shape[1] // (fields * width), fields, width)
    out = runs[:, :, 0]
    for i in range(1, fields):
        out = out | (runs[:, :, i] << (bits * i))
    return out.flatten(1)


def _read(fields: dict[str, Tensor], planes: tuple[Plane, ...]) -> Tensor:
    out: Tensor | None = None
    for name, width, bits, shift in planes:
        part = _split(fields[name], width, bits) << shift
        out = part if out is None else out | part
    assert out is not None
    return out


def _write(values: Tensor, planes: tuple[Plane, ...]) -> dict[str, Tensor]:
    return {n: _join((values >> shift) & ((1 << bits) - 1), width, bits) for n, width, bits, shift in planes}


# Scales and minima of Q4_K and Q5_K: eight numbers of 6 bits each in twelve bytes. The first four of each are the low bits of a
# byte; the last four have their low halves together in the third word, their high bits in the first two.


def _read_six(fields: dict[str, Tensor]) -> Tensor:
    a, b, c = fields["s"].split(4, 1)
    first, second = (c & 15) | ((a >> 6) << 4), (c >> 4) | ((b >> 6) << 4)
    return torch.cat((a & 63, first, b & 63, second), 1)


def _write_six(values: Tensor) -> dict[str, Tensor]:
    a, first, b, second = values.split(4, 1)
    high = (first & 15) | ((second & 15) << 4)
    return {"s": torch.cat((a | ((first >> 4) << 6), b | ((second >> 4) << 6), high), 1)}


@dataclass(frozen=True)
class Layout:
    """A block: its fields in their order, and what they mean."""

    fields: dict[str, int]  #: bytes by name
    bits: int
    codes: tuple[Plane, ...]
    group: int = 32
    zero: int | None = None
    scales: tuple[Plane, ...] | None = None  #: of the groups, and behind them the minima, where there is ``m``
    six: bool = False  #: the scales of Q4_K and Q5_K
    low: int = 0  #: subtracted from each scale of a group
    signed: str = ""  #: the field of signed bytes
    table: tuple[int, ...] | None = None

    @property
    def block(self) -> int:
        return 256 if self.nested else 32

    @property
    def nested(self) -> bool:
        return self.six or self.scales is not None

    @property
    def bytes(self) -> int:
        return sum(self.fields.values())

    @property
    def minima(self) -> bool:
        return "m" in self.fields

    def steps(self, device: torch.device) -> Tensor:
        """What the scale of a group multiplies ``d`` by, for each code that it may have."""
        return torch.arange(256, dtype=torch.float32, device=device) - self.low


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled
HALVES: tuple[Plane, ...] = (("q", 16, 4, 0),)
FIFTH: tuple[Plane, ...] = (*HALVES, ("h", 1, 1, 4))
TYPES = {
    "Q4_0": Layout({"d": 2, "q": 16}, 4, HALVES, zero=8),
    "Q4_1": Layout({"d": 2, "m": 2, "q": 16}, 4, HALVES),
    "Q5_0": Layout({"d": 2, "h": 4, "q": 16}, 5, FIFTH, zero=16),
    "Q5_1": Layout({"d": 2, "m": 2, "h": 4, "q": 16}, 5, FIFTH),
    "Q8_0": Layout({"d": 2, "q": 32}, 8, (("q", 1, 8, 0),), zero=128, signed="q"),
    "IQ4_NL": Layout({"d": 2, "q": 16}, 4, HALVES, table=IQ4),
    "MXFP4": Layout({"e": 1, "q": 16}, 4, HALVES, table=E2M1),
    "Q2_K": Layout({"s": 16, "q": 64, "d": 2, "m": 2}, 2, (("q", 32, 2, 0),), 16, scales=(("s", 16, 4, 0),)),
    "Q3_K": Layout(
        {"h": 32, "q": 64, "sl": 8, "sh": 4, "d": 2}, 3, (("q", 32, 2, 0), ("h", 32, 1, 2)), 16, 4,
        (("sl", 8, 4, 0), ("sh", 4, 2, 4)), low=32,
    ),
    "Q4_K": Layout({"d": 2, "m": 2, "s": 12, "q": 128}, 4, (("q", 32, 4, 0),), six=True),
    "Q5_K": Layout({"d": 2, "m": 2, "s": 12, "h": 32, "q": 128}, 5, (("q", 32, 4, 0), ("h", 32, 1, 4)), six=True),
    "Q6_K": Layout(
        {"q": 128, "h": 64, "s": 16, "d": 2}, 6, (("q", 64, 4, 0), ("h", 32, 2, 4)), 16, 32,
        (("s", 1, 8, 0),), low=128, signed="s",
    ),
    "IQ4_XS": Layout(
        {"d": 2, "sh": 2, "sl": 4, "q": 128}, 4, HALVES, scales=(("sl", 1, 4, 0), ("sh", 1, 2, 4)), low=32, table=IQ4,
    ),
}  # fmt: skip


def _type(operator: str, type: Any) -> str:
    name = str(getattr(type, "name", type)).upper()
    if name not in TYPES:
        raise ValueError(
            f"{operator}: there is no type {name!r} among {', '.join(TYPES)}{near_matches(name, list(TYPES))}"
        )
    return name


def _powers(e: Tensor) -> Tensor:
    """fp32 ``2^(e - 128)`` of bytes; the two smallest are subnormal."""
    e = e.int()
    bits: Tensor = torch.where(e < 2, 0x200000 << e.clamp(max=1), (e - 1) << 23)
    powers: Tensor = bits.view(torch.float32)
    return powers


def _exponents(operator: str, scale: Tensor) -> Tensor:
    bits = scale.float().contiguous().view(torch.int32)
    e = torch.where(bits < 1 << 23, (bits >= 0x400000).int(), (bits >> 23) + 1)
    if not torch.equal(_powers(e.clamp(0, 255)), scale.float()):
        refuse(
            operator, "the scales of MXFP4 must be powers of two, 2^-128 to 2^127, and some of this weight's are not"
        )
    return e.to(torch.uint8)


def from_ggml(data: Any, type: Any, shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> QTensor:
    """From the bytes of a tensor in a GGUF file.

    Args:
        data: uint8, ``N`` rows of ``K / block`` blocks, in any shape: a tensor, or the array that ``gguf.GGUFReader`` gives.
        type: one of the module's table: "Q4_K", or gguf's enumeration.
        shape: ``(N, K)``: the reverse of what ``gguf.GGUFReader`` prints.
        dtype: of the weight.

    Returns:
        A :class:`~cofire.ops.QTensor` ``[N, K]``; exact.

    Raises:
        TypeError: ``data`` is not uint8.
        ValueError: an unknown type, rows that are not whole blocks, another number of bytes, scales that are not finite.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> q = quantize_weight(torch.randn(2, 64).half(), "absmax", bits=4, group_size=32)
        >>> data = to_ggml(q, "Q4_0")
        >>> data.shape, torch.equal(from_ggml(data, "Q4_0", (2, 64)).unpack(), q.unpack())
        (torch.Size([2, 36]), True)
    """
    name = "from_ggml"
    kind = _type(name, type)
    t = TYPES[kind]
    if len(shape) != 2 or shape[1] % t.block:
        refuse(name, f"shape must be [N, K] with K a multiple of {t.block} ({kind}), got {list(shape)}")
    rows, columns = (int(n) for n in shape)
    blocks = rows * columns // t.block
    x = data if isinstance(data, Tensor) else torch.tensor(data)
    check_tensor(name, "data", x, (torch.uint8,), [None] * x.dim())
    if x.numel() != blocks * t.bytes:
        refuse(name, f"data must have {blocks * t.bytes} bytes for {list(shape)} in {kind}, got {x.numel()}")
    fields = dict(zip(t.fields, x.reshape(blocks, t.bytes).split(list(t.fields.values()), 1)))
    if t.signed:
        fields[t.signed] = fields[t.signed] ^ 0x80
    codes = _read(fields, t.codes).reshape(rows, columns)

    def half(field: str) -> Tensor:
        found: Tensor = fields[field].contiguous().view(torch.float16)
        check_finite(name, **{field: found})
        return found

    groups = columns // t.group
    scale: Tensor | NestedScale
    offset: Tensor | NestedScale | None = None
    if "e" in fields:
        scale = _powers(fields["e"]).reshape(rows, groups)
    elif not t.nested:
        scale = half("d").reshape(rows, groups)
        offset = half("m").reshape(rows, groups) if t.minima else None
    else:
        steps, each = t.steps(x.device), t.block // t.group
        several = _read_six(fields) if t.six else _read(fields, t.scales or ())
        zero = torch.tensor(-0.0, device=x.device)  # adding it changes nothing, not even the sign of a zero
        parts = [p.reshape(rows, groups) for p in several.split(each, 1)]
        scale = NestedScale(parts[0], steps, half("d").flatten(), zero, each)
        offset = NestedScale(parts[1], -steps, half("m").flatten(), zero, each) if t.minima else None
    return QTensor(
        pack_bits(codes, t.bits), scale, (rows, columns), t.bits, t.group,
        None if t.zero is None else torch.full((1, 1), t.zero, dtype=torch.uint8, device=x.device), offset,
        None if t.table is None else torch.tensor([t.table], dtype=torch.int8, device=x.device),
        dtype=dtype, format=f"ggml-{kind}",
    )  # fmt: skip


def to_ggml(q: QTensor, type: Any = None) -> Tensor:
    """To the bytes of a tensor in a GGUF file.

    Args:
        q: a weight with the bits and the table of the type. Groups may be several of the type's; the zero point must be the
            type's, if it has one, and becomes part of the minimum, if it has that. K-quants only hold scales that are small
            multiples of one per 256 weights: what comes from them can go back.
        type: as in :func:`from_ggml`; None: the one that ``q`` came from.

    Returns:
        uint8 ``[N, K / block * bytes]``; where ``q`` came from that type, the same bytes. Other scales and minima are
        rounded to fp16.

    Raises:
        ValueError: the type cannot hold it: the sentence says why.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> to_ggml(quantize_weight(torch.randn(2, 64), "absmax", bits=8, group_size=32), "Q8_0").shape
        torch.Size([2, 68])
    """
    name = "to_ggml"
    check_weight(name, q, "perm")
    if type is None:
        if not q.format.startswith("ggml-"):
            refuse(name, "type must be given for a weight that did not come from ggml")
        type = q.format.removeprefix("ggml-")
    kind = _type(name, type)
    t = TYPES[kind]
    rows, columns = q.shape
    if q.bits != t.bits:
        refuse(name, f"{kind} has {t.bits} bits, got {q.bits}")
    if columns % t.block or q.group_size % t.group:
        refuse(
            name,
            f"{kind} has blocks of {t.block} columns and groups of {t.group}, which do not divide {columns} columns in groups "
            f"of {q.group_size}",
        )
    if (q.lut is None) != (t.table is None):
        refuse(name, f"{kind} {'has no table' if t.table is None else 'has a table'} of values, unlike {q!r}")
    if q.lut is not None and (q.lut.shape[0] != 1 or q.lut[0].tolist() != list(t.table or ())):
        refuse(name, f"{kind} has the table {list(t.table or ())}, got another one")
    blocks = rows * columns // t.block
    parts = _write_nested(name, kind, q) if t.nested else _write_plain(name, kind, q)
    codes = q.unpack().reshape(blocks, t.block)
    fields = {f: x.reshape(blocks, -1) for f, x in parts.items()} | _write(codes, t.codes)
    if t.signed:
        fields[t.signed] = fields[t.signed] ^ 0x80
    return torch.cat([fields[f] for f in t.fields], 1).reshape(rows, columns // t.block * t.bytes)


def _write_plain(name: str, kind: str, q: QTensor) -> dict[str, Tensor]:
    t, several = TYPES[kind], q.group_size // TYPES[kind].group
    zero = 0 if t.zero is None else t.zero
    found = torch.zeros(1, 1, device=q.device) if q.zero is None else q.zero
    scale, offset = scales_of(q), q.offsets()
    if t.minima:
        if q.zero is not None:
            shift = -scale.float() * spread(found, q).float()
            offset = shift if offset is None else offset.float() + shift
        offset = torch.zeros_like(scale) if offset is None else offset
    elif offset is not None or not bool((found == zero).all()):
        what = "no zero point" if t.table is not None else f"the zero point {zero}"
        refuse(name, f"{kind} has {what} and no offsets, unlike {q!r}")
    parts: dict[str, Tensor] = {}
    if "e" in t.fields:
        parts["e"] = _exponents(name, scale.repeat_interleave(several, 1))
        return parts
    for field, x in (("d", scale), ("m", offset if t.minima else None)):
        if x is not None:
            half = rounded(name, "scale" if field == "d" else "offset", x, torch.float16)
            parts[field] = half.repeat_interleave(several, 1).reshape(-1, 1).view(torch.uint8)
    return parts


def _write_nested(name: str, kind: str, q: QTensor) -> dict[str, Tensor]:
    t, steps = TYPES[kind], TYPES[kind].steps(q.device)
    want = [("scale", q.scale, steps), *([("offset", q.offset, -steps)] if t.minima else [])]
    widest = max(shift + bits for _, _, bits, shift in t.scales) if t.scales else 6
    same = q.zero is None if t.zero is None else q.zero is not None and bool(q.zero.eq(t.zero).all())
    fits = same and q.group_size == t.group and (t.minima or q.offset is None)
    for _, x, table in want:
        fits = fits and isinstance(x, NestedScale) and x.block == t.block // t.group and x.absmax.dtype == torch.float16
        if not fits:
            break
        assert isinstance(x, NestedScale)
        fits = (
            torch.equal(x.table, table)
            and float(x.mean) == 0
            and not bool((x.codes >> widest).any() if widest < 8 else 0)
        )
    if not fits:
        refuse(
            name,
            f"{kind} holds scales that are small multiples of one fp16 number per {t.block} weights, which only weights from "
            f"ggml have, unlike {q!r}; Q4_0, Q4_1 and Q8_0 hold any scales per 32 weights",
        )
    blocks = q.shape[0] * q.shape[1] // t.block
    parts = {
        n: x.absmax.reshape(-1, 1).view(torch.uint8) for n, (_, x, _) in zip("dm", want) if isinstance(x, NestedScale)
    }
    codes = [x.codes.reshape(blocks, -1) for _, x, _ in want if isinstance(x, NestedScale)]
    both = torch.cat(codes, 1)
    return parts | (_write_six(both) if t.six else _write(both, t.scales or ()))
