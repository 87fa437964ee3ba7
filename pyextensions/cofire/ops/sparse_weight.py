# SPDX-License-Identifier: Apache-2.0
"""One description of a compressed weight matrix: the kept values, and where they stand.

============ ===================================================================================================
``csr``      rows of values with their columns, 16 bits each up to 65536 columns, else 32; can be trained
``delta``    the same with the distance from the column before, 8 bits; where it is more than 255, a zero at the
             distance 255 stands between, a bridge. (A kept zero at a multiple of 255 stands behind bridges, at the
             distance 0. What was packed before this was so has it at 255, where it is read as a bridge: not kept.)
``bitmap``   panels of 16 rows: per column one word of 16 bits, one a row; the values by column, then by row
``block``    blocks of R x C: the numbers of the kept ones' columns, and their values by column, then by row;
             can be trained
============ ===================================================================================================

Any format stands for any mask: the mask is authoritative, so a kept zero stays a kept value. Only blocks are kept whole:
what of them the mask does not keep becomes a kept zero.

Source: CSR, BSR: Saad, "Iterative methods for sparse linear systems" (2003), section 3.4; bitmaps: SpInfer (EuroSys 2025);
distances in few bits: Han et al. 2016 (Deep Compression, 1510.00149), section 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cofire.native import in_large_pages
from cofire.ops.checks import check_choice, check_pair, refuse, shape_of

__all__ = ["SparseWeight"]

FORMATS = ("csr", "delta", "bitmap", "block")
PANEL = 16  #: rows of a panel of a bitmap
STEP = 255  #: the largest distance that a delta holds
TENSORS = ("values", "index", "offsets", "scale")
INDEX_DTYPES = {
    "csr": (torch.uint16, torch.int32),
    "delta": (torch.uint8,),
    "bitmap": (torch.uint16,),
    "block": (torch.int32,),
}


def panels_of(rows: int, size: int) -> int:
    return -(-rows // size)


# ------------------------------------------------------------------------------------------------- to dense


def places(index: Tensor, offsets: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Row (or row of blocks) and column of each entry."""
    count = offsets.diff()
    row = torch.repeat_interleave(torch.arange(count.numel(), device=index.device), count, output_size=index.shape[0])
    column = index.long()
    if format == "delta":  # the sum within the row
        total = column.cumsum(0)
        before = torch.cat([total.new_zeros(1), total])[offsets[:-1]]
        column = total - before[row]
    return row, column


def dense_values(
    values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None, format: str, rows: int, columns: int,
    block_rows: int, block_columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The matrix ``[rows, columns]`` in ``dtype``; differentiable with respect to the values."""
    v = values.to(dtype)
    if format == "bitmap":
        bit = torch.arange(PANEL, device=index.device, dtype=torch.int32)
        kept = (index.to(torch.int32)[:, :, None] >> bit & 1).bool()
        dense = v.new_zeros(kept.shape).masked_scatter(kept, v)
        dense = dense.transpose(1, 2).flatten(0, 1)[:rows]
    elif format == "block":
        row, column = places(index, offsets, format)
        grid = (panels_of(rows, block_rows), panels_of(columns, block_columns), block_rows, block_columns)
        dense = v.new_zeros(grid).index_put((row, column), v.transpose(1, 2))
        dense = dense.transpose(1, 2).reshape(grid[0] * block_rows, grid[1] * block_columns)[:rows, :columns]
    else:
        row, column = places(index, offsets, format)
        dense = v.new_zeros((rows, columns)).index_put((row, column), v)
    if scale is not None:
        dense = dense * scale.to(dtype)[:, None]
    return dense.contiguous()


# ------------------------------------------------------------------------------------------------- the class


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A weight ``[N, K]`` of which only the kept entries are stored.

    Args:
        values: any float, or int8 with a ``scale``. ``[nnz]``; of a block format ``[blocks, C, R]``.
        index: where they stand: see the formats above. ``csr``: uint16 or int32 ``[nnz]``; ``delta``: uint8 ``[nnz]``;
            ``bitmap``: uint16 ``[ceil(N / 16), K]``; ``block``: int32 ``[blocks]``.
        offsets: int64, the first value of each row (``bitmap``: panel; ``block``: row of blocks), and their number.
        shape: ``(N, K)``.
        format: ``"csr"``, ``"delta"``, ``"bitmap"`` or ``"block"``.
        block: ``(R, C)`` of a block format, else ``(1, 1)``.
        scale: any float ``[N]``, of int8 values; else None.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: shapes that do not fit together, an unknown format.

    Example:
        >>> w = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]])
        >>> s = SparseWeight.from_dense(w, w != 0, format="csr")
        >>> s.values.tolist(), s.index.tolist(), s.offsets.tolist()
        ([2.0, 1.0, 3.0], [1, 0, 2], [0, 1, 3])
    """

    values: Tensor
    index: Tensor
    offsets: Tensor
    shape: tuple[int, int]
    format: str
    block: tuple[int, int] = (1, 1)
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        check_sparse("SparseWeight", *self.arguments())

    def arguments(self) -> tuple[Any, ...]:
        """What the operators take: tensors, format, rows, columns, block rows, block columns."""
        return (self.values, self.index, self.offsets, self.scale, self.format, *self.shape, *self.block)

    # ------------------------------------------------------------------------------------------ making one

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        mask: Tensor,
        format: str = "auto",
        *,
        block: int | tuple[int, int] = (16, 1),
        values: torch.dtype | None = None,
    ) -> SparseWeight:
        """Keep the entries of ``weight`` ``[N, K]`` where ``mask`` is set.

        Args:
            weight: any float ``[N, K]``.
            mask: bool ``[N, K]``; nothing is read from the weight where it is False.
            format: one of the formats above, or ``"auto"``: blocks if the mask consists of whole blocks, else
                a bitmap below 85 % of zeros, and ``"csr"`` above.
            block: of the block format. A block is stored if any of its entries is kept, the others in it as zeros.
            values: dtype of the stored values (default: the weight's). ``torch.int8``: with a scale per row.
        """
        operator = "SparseWeight.from_dense"
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            got = f"{weight.dtype} {shape_of(weight)}" if isinstance(weight, Tensor) else type(weight).__name__
            refuse(operator, f"weight must be a floating-point tensor of shape [N, K], got {got}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            got = f"{mask.dtype} {shape_of(mask)}" if isinstance(mask, Tensor) else type(mask).__name__
            refuse(operator, f"mask must be bool of shape {shape_of(weight)}, got {got}")
        if mask.device != weight.device:
            refuse(operator, f"mask must be on the device of weight ({weight.device}), got {mask.device}")
        check_choice(operator, "format", format, ("auto", *FORMATS))
        size = check_pair(operator, "block", block)
        if len(size) != 2 or min(size) < 1:
            refuse(operator, f"block must be two positive integers, got {block!r}")
        if format == "auto":
            format = _choose(mask, size)
        w = torch.where(mask, weight.detach(), 0.0)
        scale = None
        if values == torch.int8:
            scale = w.float().abs().amax(1) / 127 if w.shape[1] else w.new_zeros(w.shape[0], dtype=torch.float32)
            scale = torch.where(scale > 0, scale, 1.0)
            w = (w.float() / scale[:, None]).round().to(torch.int8)
        elif values is not None:
            if not values.is_floating_point:
                raise TypeError(f"{operator}: values must be a floating-point type or torch.int8, got {values}")
            w = w.to(values)
        pack = {"csr": _pack_csr, "delta": _pack_delta, "bitmap": _pack_bitmap}.get(format)
        if pack is None:
            v, index, offsets = _pack_blocks(w, mask, size[0], size[1])
        else:
            v, index, offsets = pack(w, mask)
        v, index = in_large_pages(v), in_large_pages(index)
        shape = (weight.shape[0], weight.shape[1])
        return cls(v, index, offsets, shape, format, (size[0], size[1]) if format == "block" else (1, 1), scale)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **rest: Any) -> SparseWeight:
        """The way back from :meth:`tensors`; ``rest``: shape, format, block."""
        parts: dict[str, Any] = {name: tensors[name] for name in TENSORS if name in tensors}
        return cls(**parts, **rest)

    # -------------------------------------------------------------------------------------------- using it

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name: what to save."""
        return {name: t for name in TENSORS if (t := getattr(self, name)) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseWeight:
        """The same with ``function`` applied to each tensor. (For another type of the values there is :meth:`cast`.)"""
        changed: dict[str, Any] = {name: function(t) for name, t in self.tensors().items()}
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device | str) -> SparseWeight:
        return self.map(lambda t: t.to(device))

    def replace(self, **changes: Any) -> SparseWeight:
        return dataclasses.replace(self, **changes)

    def cast(self, dtype: torch.dtype) -> SparseWeight:
        """The same with the values in another floating-point type; what is too small for it is a kept zero.

        Of ``delta`` such a zero may need an entry more, or it would be taken for a bridge: then all is packed anew.

        Raises:
            TypeError: ``dtype`` is no floating-point type, or the values are int8.

        Example:
            >>> w = torch.zeros(1, 300)
            >>> w[0, 255] = 1e-9
            >>> s = SparseWeight.from_dense(w, w != 0, "delta").cast(torch.float16)
            >>> s.values.tolist(), s.index.tolist(), s.mask().sum().item()
            ([0.0, 0.0], [255, 0], 1)
        """
        if not (self.values.is_floating_point() and dtype.is_floating_point):
            raise TypeError(f"SparseWeight.cast: floats alone have another type, got {self.values.dtype} to {dtype}")
        values = self.values.to(dtype)
        if self.format == "delta" and bool(((values == 0) & (self.values != 0) & (self.index == STEP)).any()):
            return SparseWeight.from_dense(self.to_dense().to(dtype), self.mask(), self.format)
        return self.replace(values=values)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def trainable(self) -> bool:
        """Whether gradients of the values are defined: not for what is packed for inference."""
        return self.format in ("csr", "block") and self.values.is_floating_point()

    def to_dense(self) -> Tensor:
        """``[N, K]`` in the dtype of the values (fp32 for int8)."""
        dtype = self.values.dtype if self.values.is_floating_point() else torch.float32
        wide = torch.promote_types(dtype, torch.float32)
        return dense_values(*(*self.arguments(), wide)).to(dtype)

    def mask(self) -> Tensor:
        """bool ``[N, K]``: what is kept. (Of ``block``, all of the blocks that are stored.)"""
        if self.format == "delta":
            bridge = (self.index == STEP) & (self.values == 0)
            place = places(self.index, self.offsets, self.format)
            count = torch.zeros(self.shape, dtype=torch.int32, device=self.device)
            return count.index_put(place, (~bridge).to(torch.int32), accumulate=True) != 0
        ones = torch.ones_like(self.values, dtype=torch.float32)
        return dense_values(*(ones, self.index, self.offsets, None, *self.arguments()[4:], torch.float32)) != 0

    def __repr__(self) -> str:
        total = self.shape[0] * self.shape[1]
        share = f"{100 * self.values.numel() / total:.1f} % stored" if total else "empty"
        block = f" {self.block[0]}x{self.block[1]}" if self.format == "block" else ""
        return f"SparseWeight({list(self.shape)}, {self.format}{block}, {share}, {self.values.dtype}, {self.device})"


def _choose(mask: Tensor, block: list[int]) -> str:
    rows, columns = mask.shape
    if block != [1, 1] and rows % block[0] == 0 and columns % block[1] == 0 and mask.numel():
        tiles = mask.view(rows // block[0], block[0], columns // block[1], block[1])
        if bool((tiles == tiles[:, :1, :, :1]).all()):
            return "block"
    return "csr" if mask.numel() == 0 or float(mask.float().mean()) < 0.15 else "bitmap"


def _row_offsets(mask: Tensor) -> Tensor:
    offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
    offsets[1:] = mask.flatten(1).sum(1).cumsum(0)
    return offsets


def _pack_csr(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.uint16 if w.shape[1] <= 1 << 16 else torch.int32
    return w[mask], mask.nonzero()[:, 1].to(torch.int32).to(dtype), _row_offsets(mask)


def _pack_delta(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row, column = mask.nonzero(as_tuple=True)
    before = torch.zeros_like(column)
    before[1:] = torch.where(row[1:] == row[:-1], column[:-1], 0)
    gap, kept = column - before, w[mask]
    between = (gap - 1).clamp(min=0) // STEP  # bridges to put before the entry
    between += (kept == 0) & (gap > 0) & (gap % STEP == 0)  # or it would be taken for one
    place = torch.arange(gap.numel(), device=w.device) + between.cumsum(0)
    total = gap.numel() + int(between.sum())
    values = w.new_zeros(total)
    index = torch.full((total,), STEP, dtype=torch.uint8, device=w.device)
    values[place] = kept
    index[place] = (gap - between * STEP).to(torch.uint8)
    count = torch.zeros(w.shape[0] + 1, dtype=torch.int64, device=w.device)
    count.index_add_(0, row + 1, between + 1)
    return values, index, count.cumsum(0)


def _pack_bitmap(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = w.shape
    panels = panels_of(rows, PANEL)
    short = panels * PANEL - rows
    pad = torch.nn.functional.pad
    kept = pad(mask, (0, 0, 0, short)).view(panels, PANEL, columns).transpose(1, 2)
    values = pad(w, (0, 0, 0, short)).view(panels, PANEL, columns).transpose(1, 2)[kept]
    bit = torch.arange(PANEL, device=w.device, dtype=torch.int32)
    index = (kept.to(torch.int32) << bit).sum(2, dtype=torch.int32).to(torch.uint16)
    return values, index.contiguous(), _row_offsets(kept)


def _pack_blocks(w: Tensor, mask: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = w.shape
    grid = (panels_of(rows, block_rows), panels_of(columns, block_columns))
    margin = (0, grid[1] * block_columns - columns, 0, grid[0] * block_rows - rows)
    pad = torch.nn.functional.pad

    def tiles(x: Tensor) -> Tensor:
        return pad(x, margin).view(grid[0], block_rows, grid[1], block_columns).permute(0, 2, 3, 1)

    kept = tiles(mask).flatten(2).any(2)
    return tiles(w)[kept].contiguous(), kept.nonzero()[:, 1].to(torch.int32), _row_offsets(kept)


# ------------------------------------------------------------------------------------------------- sentences


def check_sparse(
    operator: str, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None, format: str, rows: int, columns: int,
    block_rows: int, block_columns: int,
) -> None:  # fmt: skip
    """The sentences of everything that describes a compressed weight."""
    check_choice(operator, "format", format, FORMATS)
    if rows < 0 or columns < 0:
        refuse(operator, f"shape must be two sizes, got {[rows, columns]}")
    if min(block_rows, block_columns) < 1:
        refuse(operator, f"block must be two positive integers, got {[block_rows, block_columns]}")
    if not (values.is_floating_point() or values.dtype == torch.int8):
        raise TypeError(f"{operator}: values must be int8 or a floating-point tensor, got {values.dtype}")
    if index.dtype not in INDEX_DTYPES[format]:
        names = " or ".join(str(d).removeprefix("torch.") for d in INDEX_DTYPES[format])
        raise TypeError(f"{operator}: index must be {names} in the format {format}, got {index.dtype}")
    if offsets.dtype != torch.int64:
        raise TypeError(f"{operator}: offsets must be int64, got {offsets.dtype}")
    if format == "csr" and index.dtype == torch.uint16 and columns > 1 << 16:
        refuse(operator, f"index must be int32 for more than 65536 columns, got uint16 for {columns}")
    entries = index.shape[0] if index.dim() else 0
    size = {"bitmap": PANEL, "block": block_rows}.get(format, 1)
    want = {
        "index": [panels_of(rows, PANEL), columns] if format == "bitmap" else [entries],
        "offsets": [panels_of(rows, size) + 1],
        "scale": [rows],
    }
    if format == "block":
        want["values"] = [entries, block_columns, block_rows]
    elif format == "bitmap":
        want["values"] = [values.shape[0] if values.dim() else 0]
    else:
        want["values"] = [entries]
    for name, x in (("index", index), ("values", values), ("offsets", offsets), ("scale", scale)):
        if x is not None and list(x.shape) != want[name]:
            refuse(operator, f"{name} must have shape {want[name]}, got {shape_of(x)}")
        if x is not None and x.device != values.device:
            refuse(operator, f"{name} must be on the device of values ({values.device}), got {x.device}")
    if scale is not None and not scale.is_floating_point():
        raise TypeError(f"{operator}: scale must be a floating-point tensor, got {scale.dtype}")
    if (scale is None) != values.is_floating_point():
        refuse(operator, "int8 values need a scale, and others have none")
