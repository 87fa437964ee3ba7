# SPDX-License-Identifier: Apache-2.0
"""Palettes of coremltools' PyTorch tools, and those of this library's packed layers.

:mod:`cofire.nn.coreml` has the form: a plain weight, and buffers beside it that say what it is made of. Here a weight of that form
becomes a :class:`~cofire.ops.QTensor`, which the products with tables of :func:`cofire.ops.qlinear` take, and back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cofire.formats.parts import check_weight
from cofire.nn.coreml import PREFIX, palette_buffers, read_coreml
from cofire.nn.palettes import PackedPalette, factor_of_rows, shares_evenly
from cofire.ops import NestedScale, QTensor
from cofire.ops.checks import refuse
from cofire.ops.quantizers import byte_tables

__all__ = ["from_coreml", "from_palette", "to_coreml", "to_palette"]

FORMAT = "coreml"


def from_palette(palette: PackedPalette, *, lut_dtype: torch.dtype | None = None) -> QTensor:
    """From the packed weight of a linear layer.

    Args:
        palette: of single weights, not vectors, of a matrix.
        lut_dtype: None: the tables as they are. ``torch.int8``: tables of floats are rounded to signed bytes, each by itself,
            and their factors become part of the scales; int8 activations of :func:`cofire.ops.qlinear` need it. No entry
            moves by more than a 254th of the largest magnitude of its table.

    Returns:
        A :class:`~cofire.ops.QTensor` with a table per group of rows, and a scale per row where the palette has one. Decoded, it
        is the palette's weight to the last bit if the entries have no more bits than the weight.

    Raises:
        TypeError: ``palette`` is no PackedPalette, or another ``lut_dtype``.
        ValueError: vectors, a weight that is no matrix, rows divided otherwise than equally, or tables that are not finite to
            be rounded.

    Example:
        >>> from cofire.nn import PalettizedLinear, QuantLinear
        >>> packed = PalettizedLinear(16, 8, bits=2).pack()
        >>> torch.equal(from_palette(packed.palette).dequantize(), packed.weight)
        True
        >>> layer = QuantLinear.from_qtensor(from_palette(packed.palette, lut_dtype=torch.int8), activations="int8")
        >>> layer(torch.rand(3, 16)).shape
        torch.Size([3, 8])
    """
    name = "from_palette"
    if not isinstance(palette, PackedPalette):
        raise TypeError(f"{name}: palette must be a PackedPalette, got {type(palette).__name__}")
    if lut_dtype not in (None, torch.int8):
        raise TypeError(f"{name}: lut_dtype must be torch.int8, or None, got {lut_dtype!r}")
    if palette.cluster_dim > 1:
        refuse(name, f"palettes must be of single weights, got vectors of {palette.cluster_dim}")
    if len(palette.shape) != 2:
        refuse(name, f"the weight must be a matrix, got shape {list(palette.shape)}")
    rows, columns = palette.shape
    tables = palette.lut.shape[0]
    if not shares_evenly(rows, tables, palette.group_rows):
        refuse(
            name,
            f"a weight must divide its {rows} rows equally among its {tables} palettes, got groups of {palette.group_rows} rows",
        )
    lut, scale = palette.lut[..., 0].clone(), None if palette.scale is None else palette.scale.clone()
    if lut_dtype == torch.int8 and lut.is_floating_point():
        lut, factor = byte_tables(name, lut)
        scale = factor_of_rows(factor, scale, rows, palette.group_rows)
    return QTensor(
        palette.labels.clone(), None if scale is None else scale.view(rows, 1), (rows, columns), palette.bits, columns,
        lut=lut, dtype=palette.like.dtype, format=FORMAT,
    )  # fmt: skip


def to_palette(q: QTensor) -> PackedPalette:
    """To the packed weight of a linear layer; tables of bytes stay what they are.

    Raises:
        ValueError: no table, scales for groups of columns, zero points, offsets, or another order of columns.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> q = quantize_weight(torch.randn(8, 16), "palette", bits=3, group_size=None, group_rows=4)
        >>> torch.equal(to_palette(q).weight, q.dequantize())
        True
    """
    name = "to_palette"
    check_weight(name, q, "zero", "offset", "perm")
    if q.lut is None:
        refuse(name, f"the format holds tables of values, and this weight has none: {q!r}")
    rows, columns = q.shape
    if q.scale is not None and (isinstance(q.scale, NestedScale) or q.group_size != columns):
        refuse(name, f"the format holds one scale per row, and this weight has groups of {q.group_size} columns: {q!r}")
    lut = q.lut
    # As many tables as rows divided by the rows of one: a last table without rows has no place.
    size = -(-rows // lut.shape[0])
    if size and -(-rows // size) != lut.shape[0]:
        refuse(name, f"each palette must have rows, got {lut.shape[0]} for {rows} rows")
    return PackedPalette.from_labels(
        q.unpack(), lut[..., None], (rows, columns), group_rows=size, scale=None if q.scale is None else q.scale,
        dtype=q.dtype, lut_dtype=lut.dtype,
    )  # fmt: skip


def from_coreml(state: Mapping[str, Tensor], name: str = "weight", *, lut_dtype: torch.dtype | None = None) -> QTensor:
    """From a palettized parameter in a state that coremltools' PyTorch tools have finalized.

    Args:
        state: of a layer or of a whole model, with the buffers of the table in :mod:`cofire.nn.coreml`.
        name: of the parameter.
        lut_dtype: as in :func:`from_palette`.

    Returns:
        A :class:`~cofire.ops.QTensor`: the palette is exact, filled up to a power of two with copies of its last entry; labels are
        found again in the decoded weight.

    Raises:
        ValueError: nothing palettized of that name; as :func:`from_palette` and :func:`cofire.nn.coreml.read_coreml`.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> q = quantize_weight(torch.randn(8, 16), "palette", bits=2, group_size=None)
        >>> torch.equal(from_coreml(to_coreml(q)).dequantize(), q.dequantize())
        True
    """
    prefix, _, last = name.rpartition(".")
    own = f"{prefix}.{PREFIX}/{last}/" if prefix else f"{PREFIX}/{last}/"
    found = read_coreml({k: v for k, v in state.items() if k == name or k.startswith(own)})
    if name not in found:
        refuse("from_coreml", f"the state must have a palettized {name!r}, with {own}lut beside it")
    return from_palette(found[name], lut_dtype=lut_dtype)


def to_coreml(q: QTensor) -> dict[str, Tensor]:
    """To the parameter and its buffers, by the names that they have in the layer.

    Tables of bytes become tables of floats of the weight's dtype, and scales are rounded to it; so is the parameter's weight.

    Raises:
        ValueError: the format cannot hold it: as :func:`to_palette`, and a last group of fewer rows than the others.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> state = to_coreml(quantize_weight(torch.randn(8, 16), "palette", bits=2, group_size=None, group_rows=4))
        >>> {name.removeprefix("_COREML_/weight/"): list(t.shape) for name, t in state.items()}
        {'weight': [8, 16], 'compression_type': [1], 'lut': [2, 1, 4, 1]}
    """
    palette = to_palette(q).as_floats()
    buffers = palette_buffers("to_coreml", "the weight", palette, palette.like.dtype)
    return {"weight": palette.weight, **{f"{PREFIX}/weight/{key}": value for key, value in buffers.items()}}
