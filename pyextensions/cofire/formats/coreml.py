# SPDX-License-Identifier: Apache-2.0
"""Palettes of coremltools' PyTorch tools, and those of this library's packed layers.

:mod:`cofire.nn.coreml` has the form: a plain weight, and buffers beside it that say what it is made of. Here a weight of that form
becomes a :class:`~cofire.ops.QTensor`, which the products with tables of :func:`cofire.ops.qlinear` take, and back.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cofire.formats.parts import check_weight
from cofire.nn.coreml import PREFIX, palette_buffers, read_coreml
from cofire.nn.palettes import PackedPalette
from cofire.ops import NestedScale, QTensor
from cofire.ops.checks import refuse

__all__ = ["from_coreml", "from_palette", "to_coreml", "to_palette"]

FORMAT = "coreml"


def from_palette(palette: PackedPalette) -> QTensor:
    """From the packed weight of a linear layer.

    Args:
        palette: of single weights, not vectors, of a matrix.

    Returns:
        A :class:`~cofire.ops.QTensor` with a table per group of rows, and a scale per row where the palette has one. Decoded, it
        is the palette's weight to the last bit if the entries have no more bits than the weight.

    Raises:
        ValueError: vectors, a weight that is no matrix, or rows divided otherwise than equally.

    Example:
        >>> import torch
        >>> from cofire.nn import PalettizedLinear
        >>> packed = PalettizedLinear(16, 8, bits=2).pack()
        >>> torch.equal(from_palette(packed.palette).dequantize(), packed.weight)
        True
    """
    name = "from_palette"
    if not isinstance(palette, PackedPalette):
        raise TypeError(f"{name}: palette must be a PackedPalette, got {type(palette).__name__}")
    if palette.cluster_dim > 1:
        refuse(name, f"palettes must be of single weights, got vectors of {palette.cluster_dim}")
    if len(palette.shape) != 2:
        refuse(name, f"the weight must be a matrix, got shape {list(palette.shape)}")
    rows, columns = palette.shape
    tables = palette.lut.shape[0]
    if tables > 1 and -(-rows // tables) != palette.group_rows:
        refuse(
            name,
            f"a weight must divide its {rows} rows equally among its {tables} palettes, got groups of {palette.group_rows} rows",
        )
    scale = None if palette.scale is None else palette.scale.view(rows, 1).clone()
    return QTensor(
        palette.labels.clone(), scale, (rows, columns), palette.bits, columns, lut=palette.lut[..., 0].clone(),
        dtype=palette.like.dtype, format=FORMAT,
    )  # fmt: skip


def to_palette(q: QTensor) -> PackedPalette:
    """To the packed weight of a linear layer.

    Raises:
        ValueError: no table, scales for groups of columns, zero points, offsets, or another order of columns.

    Example:
        >>> import torch
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
    lut = q.lut if q.lut.is_floating_point() else q.lut.to(q.dtype)
    # As many tables as rows divided by the rows of one: a last table without rows has no place.
    size = -(-rows // lut.shape[0])
    if size and -(-rows // size) != lut.shape[0]:
        refuse(name, f"each palette must have rows, got {lut.shape[0]} for {rows} rows")
    return PackedPalette.from_labels(
        q.unpack(), lut[..., None], (rows, columns), group_rows=size, scale=None if q.scale is None else q.scale,
        dtype=q.dtype, lut_dtype=lut.dtype,
    )  # fmt: skip


def from_coreml(state: Mapping[str, Tensor], name: str = "weight") -> QTensor:
    """From a palettized parameter in a state that coremltools' PyTorch tools have finalized.

    Args:
        state: of a layer or of a whole model, with the buffers of the table in :mod:`cofire.nn.coreml`.
        name: of the parameter.

    Returns:
        A :class:`~cofire.ops.QTensor`: the palette is exact, filled up to a power of two with copies of its last entry; labels are
        found again in the decoded weight.

    Raises:
        ValueError: nothing palettized of that name; as :func:`from_palette` and :func:`cofire.nn.coreml.read_coreml`.

    Example:
        >>> import torch
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
    return from_palette(found[name])


def to_coreml(q: QTensor) -> dict[str, Tensor]:
    """To the parameter and its buffers, by the names that they have in the layer.

    Raises:
        ValueError: the format cannot hold it: as :func:`to_palette`, and a last group of fewer rows than the others.
    """
    palette = to_palette(q)
    buffers = palette_buffers("to_coreml", "the weight", palette, palette.like.dtype)
    return {"weight": palette.weight, **{f"{PREFIX}/weight/{key}": value for key, value in buffers.items()}}
