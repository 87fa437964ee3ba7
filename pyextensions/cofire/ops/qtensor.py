# SPDX-License-Identifier: Apache-2.0
"""One description of a quantised weight matrix, whatever format it came from.

The codes are plain rows of bits (:mod:`cofire.ops.packing`), which every machine reads alike: that is the only layout
that is ever saved. What a kernel would rather read it makes from them at its first call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cofire.ops.checks import check_device, check_float, check_integer, refuse, shape_of
from cofire.ops.packing import pack_bits, packed_bytes, unpack_bits

__all__ = ["NestedScale", "QTensor"]


@dataclass(frozen=True, eq=False)
class NestedScale:
    """Scales that are themselves quantised to 8 bits in blocks, as double quantisation stores them (QLoRA, section 3).

    Scale i is ``table[codes[i]] * absmax[i // block] + mean``. Offsets may be nested as well.

    Raises:
        TypeError: codes that are not uint8, another part that is no float tensor, or a block that is no integer.
        ValueError: shapes that do not fit together.

    Example:
        >>> table = torch.linspace(-1, 1, 256)
        >>> nested = NestedScale(torch.tensor([[0, 255]], dtype=torch.uint8), table, torch.tensor([0.5]), torch.tensor(2.0), 256)
        >>> nested.dequantize().tolist()
        [[1.5, 2.5]]
    """

    codes: Tensor  #: uint8 ``[N, G]``
    table: Tensor  #: fp32 ``[256]``, or as many as there are codes
    absmax: Tensor  #: any float ``[ceil(N G / block)]``
    mean: Tensor  #: fp32 ``[]``
    block: int  #: scales, in row-major order, that share an entry of ``absmax``

    def __post_init__(self) -> None:
        check_integer("NestedScale", block=self.block)
        if self.block < 1:
            refuse("NestedScale", f"block must be at least 1, got {self.block}")
        if self.codes.dtype != torch.uint8:
            raise TypeError(f"NestedScale: codes must be uint8, got {self.codes.dtype}")
        check_float("NestedScale", table=self.table, absmax=self.absmax, mean=self.mean)
        count = -(-self.codes.numel() // self.block)
        dims = [self.codes.dim(), self.table.dim(), self.mean.numel(), *self.absmax.shape]
        if dims != [2, 1, 1, count]:
            found = ", ".join(f"{n} {shape_of(getattr(self, n))}" for n in NESTED)
            refuse("NestedScale", f"codes [N, G], a table, absmax [{count}] and one mean belong together, got {found}")

    def dequantize(self) -> Tensor:
        """fp32 ``[N, G]``."""
        absmax = self.absmax.repeat_interleave(self.block)[: self.codes.numel()].view(self.codes.shape)
        return self.table[self.codes.int()] * absmax + self.mean


TENSORS = ("codes", "scale", "zero", "offset", "lut", "perm")
NESTED = ("codes", "table", "absmax", "mean")


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight ``[N, K]`` in 1 to 8 bits: ``W[n, k] = scale[n, g] * (V(q[n, k]) - zero[n, g]) + offset[n, g]``.

    ``q`` are the codes, ``g = k // group_size``, and V(q) is q itself or, with a table, ``lut[p, q]`` where the rows are
    split into as many equal blocks as ``lut`` has rows (the last may be short) and p is the row's block.

    Args:
        codes: uint8 ``[N, ceil(K bits / 8)]``, rows of :func:`~cofire.ops.pack_bits`.
        scale: any float ``[N, G]`` with ``G = K / group_size``, or a :class:`NestedScale`; None is 1. Any finite numbers:
            some formats store negative ones (ggml's Q4_0), and 0 is the scale of a group of zeros.
        shape: ``(N, K)``.
        bits: per weight, 1 to 8.
        group_size: columns that share a scale; divides K. K itself: one scale per row.
        zero: uint8 or float ``[N, G]``, or ``[1, 1]`` where all are equal; None is 0.
        offset: any float ``[N, G]``, or a :class:`NestedScale` with the ``block`` of the scale's; None is 0.
        lut: float or int8 ``[P, 2^bits]``.
        perm: int64 ``[K]``: column j of the codes is column ``perm[j]`` of the weight (GPTQ's activation order).
        dtype: of the weight that it stands for: what :meth:`dequantize` returns.
        format: the format that it was imported from, for the way back; empty for our own.

    The constructor looks at shapes and dtypes, not at values, so that it costs a layer nothing: :meth:`from_codes`,
    :meth:`check_values` and what loads a state do.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: shapes that do not fit together, tensors on different devices, bits or a group size out of range.

    Example:
        >>> q = QTensor.from_codes(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.5], [2.0]]), bits=2)
        >>> q.dequantize().tolist()
        [[0.0, 0.5], [4.0, 6.0]]

    Source:
        Jacob et al. 2018 (1712.05877), equation 1, for scales and zero points; Dettmers et al. 2023 (QLoRA, 2305.14314),
        section 3, for tables and nested scales; Frantar et al. 2023 (GPTQ, 2210.17323) for the order of columns.
    """

    codes: Tensor
    scale: Tensor | NestedScale | None
    shape: tuple[int, int]
    bits: int
    group_size: int
    zero: Tensor | None = None
    offset: Tensor | NestedScale | None = None
    lut: Tensor | None = None
    perm: Tensor | None = None
    dtype: torch.dtype = torch.float32
    format: str = ""

    def __post_init__(self) -> None:
        check_integer("QTensor", bits=self.bits, group_size=self.group_size)
        scale = self.scale.codes if isinstance(self.scale, NestedScale) else self.scale
        offset = self.offset
        if isinstance(offset, NestedScale):
            if not isinstance(self.scale, NestedScale) or self.scale.block != offset.block:
                refuse("QTensor", f"a nested offset needs a nested scale of the same block, {offset.block}")
            offset = offset.codes.new_empty(offset.codes.shape, dtype=offset.table.dtype)
        rows, columns = self.shape
        check_parts("QTensor", self.codes, None, self.zero, offset, self.lut, self.bits, self.group_size, columns)
        if self.codes.shape[0] != rows:
            refuse("QTensor", f"codes must have a row for each of {rows} rows, got shape {shape_of(self.codes)}")
        if scale is not None and list(scale.shape) != [rows, columns // self.group_size]:
            refuse("QTensor", f"scale must have shape {[rows, columns // self.group_size]}, got {shape_of(scale)}")
        if isinstance(self.scale, Tensor) and not self.scale.is_floating_point():
            raise TypeError(f"QTensor: scale must be a floating-point tensor, got {self.scale.dtype}")
        if self.perm is not None and (self.perm.dtype != torch.int64 or list(self.perm.shape) != [columns]):
            refuse("QTensor", f"perm must be int64 of shape [{columns}], got {self.perm.dtype} {shape_of(self.perm)}")
        check_device("QTensor", "codes", self.codes, **_parts("scale", self.scale), perm=self.perm)
        check_device("QTensor", "codes", self.codes, **_parts("offset", self.offset))
        if not self.dtype.is_floating_point:
            raise TypeError(f"QTensor: dtype must be a floating-point type, got {self.dtype}")

    # ------------------------------------------------------------------------------------------ making one

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor | NestedScale | None, *, bits: int, group_size: int | None = None, **rest: Any
    ) -> QTensor:
        """From codes ``[N, K]``, one to an element.

        Unlike the constructor it looks at the values: codes in range, the rest as in :meth:`check_values`.

        Args:
            codes: of any integer type ``[N, K]``, each in 0 to ``2^bits - 1``.
            scale: as in the class.
            bits: per weight, 1 to 8.
            group_size: columns that share a scale; None: as many as the scale says.
            rest: the other arguments of the class, from ``zero`` on.

        Raises:
            TypeError: a tensor of the wrong dtype.
            ValueError: codes that are no integers or out of range, numbers that are not finite, a ``perm`` that is no
                permutation, shapes that do not fit together.

        Example:
            >>> QTensor.from_codes(torch.tensor([[0, 3, 1, 2]]), torch.tensor([[0.5, 2.0]]), bits=2).group_size
            2
        """
        if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.dim() != 2:
            got = f"{codes.dtype} {shape_of(codes)}" if isinstance(codes, Tensor) else type(codes).__name__
            refuse("QTensor.from_codes", f"codes must be integers of shape [N, K], got {got}")
        check_integer("QTensor.from_codes", bits=bits)
        if not 1 <= bits <= 8:
            refuse("QTensor.from_codes", f"bits must be between 1 and 8, got {bits}")
        if codes.numel():
            low, high = (int(v) for v in codes.aminmax())
            if low < 0 or high >> bits:
                refuse("QTensor.from_codes", f"codes must be in 0 to {(1 << bits) - 1}, got {low} to {high}")
        if group_size is None:
            groups = 1 if scale is None else (scale.codes if isinstance(scale, NestedScale) else scale).shape[-1]
            group_size = codes.shape[1] // max(groups, 1)
        packed = pack_bits(codes.to(torch.uint8), bits)
        made = cls(packed, scale, (codes.shape[0], codes.shape[1]), bits, group_size, **rest)
        return made.check_values("QTensor.from_codes")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **rest: Any) -> QTensor:
        """The way back from :meth:`tensors`; ``rest``: shape, bits, group_size, dtype, format, and ``block`` where nested."""
        parts: dict[str, Any] = {name: tensors[name] for name in TENSORS if name in tensors}
        block = rest.pop("block", None)
        for part in ("scale", "offset"):
            if f"{part}.codes" in tensors:
                parts[part] = NestedScale(**{n: tensors[f"{part}.{n}"] for n in NESTED}, block=block)
        parts.setdefault("scale", None)
        return cls(**parts, **rest)

    def check_values(self, operator: str = "QTensor") -> QTensor:
        """Look at the values, which the constructor does not. ``operator``: what the sentences begin with.

        Returns:
            Itself.

        Raises:
            ValueError: a scale, zero point, offset or table, or a part of a nested one, is not finite; codes of a nested one
                are beyond its table; ``perm`` is no permutation of the columns.

        Example:
            >>> q = QTensor(torch.tensor([[2]], dtype=torch.uint8), torch.tensor([[torch.inf]]), (1, 1), 2, 1)
            >>> q.check_values()
            Traceback (most recent call last):
            ValueError: QTensor: scale must be finite, got 1 values that are not, of 1
        """
        for name, x in self.tensors().items():
            wrong = int((~x.isfinite()).sum()) if x.is_floating_point() else 0
            if wrong:
                refuse(operator, f"{name} must be finite, got {wrong} values that are not, of {x.numel()}")
        for name, part in (("scale", self.scale), ("offset", self.offset)):
            if isinstance(part, NestedScale) and part.codes.numel() and int(part.codes.max()) >= part.table.numel():
                refuse(operator, f"{name}.codes must be below {part.table.numel()}, got up to {int(part.codes.max())}")
        columns = self.shape[1]
        every = torch.arange(columns, device=self.device)
        if self.perm is not None and not torch.equal(self.perm.sort().values, every):
            missing = columns - len({*self.perm.tolist()} & {*range(columns)})
            refuse(operator, f"perm must be a permutation of the {columns} columns, got one without {missing} of them")
        return self

    # -------------------------------------------------------------------------------------------- using it

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name: what to save."""
        found: dict[str, Tensor] = {}
        for name in TENSORS:
            value = getattr(self, name)
            if isinstance(value, NestedScale):
                found |= {f"{name}.{part}": getattr(value, part) for part in NESTED}
            elif value is not None:
                found[name] = value
        return found

    def map(self, function: Callable[[Tensor], Tensor]) -> QTensor:
        """The same with ``function`` applied to each tensor."""
        tensors = {name: function(t) for name, t in self.tensors().items()}
        block = {"block": self.scale.block} if isinstance(self.scale, NestedScale) else {}
        rest = {f: getattr(self, f) for f in ("shape", "bits", "group_size", "dtype", "format")}
        return QTensor.from_tensors(tensors, **rest, **block)

    def to(self, device: torch.device | str) -> QTensor:
        return self.map(lambda t: t.to(device))

    def replace(self, **changes: Any) -> QTensor:
        return dataclasses.replace(self, **changes)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors: what is saved."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def resident_nbytes(self) -> int:
        """Bytes that are held once it has been multiplied with: its tensors, and the second layout that products on this
        machine's CPU make of them and keep for as long as the tensors live."""
        from cofire.ops.lowbit import layout_nbytes

        return self.nbytes + layout_nbytes(self)

    def scales(self) -> Tensor | None:
        """The scales as one float tensor, or None."""
        return self.scale.dequantize() if isinstance(self.scale, NestedScale) else self.scale

    def offsets(self) -> Tensor | None:
        """The offsets as one float tensor, or None."""
        return self.offset.dequantize() if isinstance(self.offset, NestedScale) else self.offset

    def unpack(self) -> Tensor:
        """The codes, uint8 ``[N, K]``."""
        return unpack_bits(self.codes, self.bits, self.shape[1])

    def dequantize(self) -> Tensor:
        """The weight ``[N, K]`` in ``dtype``: see :func:`cofire.ops.dequantize`."""
        from cofire.ops.lowbit import dequantize

        return dequantize(self)

    def __repr__(self) -> str:
        parts = [f"{n} {list(t.shape)}" for n, t in self.tensors().items() if n != "codes"]
        name = f", {self.format}" if self.format else ""
        return (
            f"QTensor({list(self.shape)}, {self.bits} bits, groups of {self.group_size}, {', '.join(parts) or 'no scale'}"
            f", {self.dtype}{name}, {self.device})"
        )


def _parts(name: str, value: Tensor | NestedScale | None) -> dict[str, Tensor | None]:
    """The tensors of a part that may be nested, by the names that sentences call them."""
    if isinstance(value, NestedScale):
        return {f"{name}.{part}": getattr(value, part) for part in NESTED}
    return {name: value}


def check_parts(
    operator: str, codes: Tensor, scale: Tensor | None, zero: Tensor | None, offset: Tensor | None, lut: Tensor | None,
    bits: int, group_size: int, columns: int,
) -> None:  # fmt: skip
    """The sentences of everything that describes a weight."""
    if not 1 <= bits <= 8:
        refuse(operator, f"bits must be between 1 and 8, got {bits}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"{operator}: codes must be uint8, got {codes.dtype}")
    if codes.dim() != 2 or codes.shape[1] != packed_bytes(columns, bits):
        want = f"[N, {packed_bytes(columns, bits)}] ({columns} columns of {bits} bits)"
        refuse(operator, f"codes must have shape {want}, got {shape_of(codes)}")
    if group_size < 1 or columns % group_size:
        refuse(operator, f"group_size must be positive and divide the {columns} columns, got {group_size}")
    rows, groups = codes.shape[0], columns // group_size
    for name, x in (("scale", scale), ("zero", zero), ("offset", offset)):
        if x is None:
            continue
        if not (x.is_floating_point() or (name == "zero" and x.dtype == torch.uint8)):
            also = "uint8 or " if name == "zero" else ""
            raise TypeError(f"{operator}: {name} must be {also}a floating-point tensor, got {x.dtype}")
        if list(x.shape) != [rows, groups] and not (name == "zero" and list(x.shape) == [1, 1]):
            also = " or [1, 1]" if name == "zero" else ""
            refuse(operator, f"{name} must have shape [{rows}, {groups}]{also}, got {shape_of(x)}")
    if lut is not None:
        if not (lut.is_floating_point() or lut.dtype == torch.int8):
            raise TypeError(f"{operator}: lut must be int8 or a floating-point tensor, got {lut.dtype}")
        if lut.dim() != 2 or lut.shape[1] != 1 << bits or not 1 <= lut.shape[0] <= max(rows, 1):
            refuse(operator, f"lut must have shape [P, {1 << bits}] with P from 1 to {rows}, got {shape_of(lut)}")
    for name, x in (("scale", scale), ("zero", zero), ("offset", offset), ("lut", lut)):
        if x is not None and x.device != codes.device:
            refuse(operator, f"{name} must be on the device of codes ({codes.device}), got {x.device}")
