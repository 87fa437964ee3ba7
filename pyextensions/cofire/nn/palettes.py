# SPDX-License-Identifier: Apache-2.0
"""Packed weights: labels of one to eight bits, and the palettes that they point into.

Nothing decoded is kept. A linear layer multiplies by the labels and the palette themselves
(:func:`cofire.ops.qlinear`), a convolution decodes the weight with each forward, an embedding the rows asked for.

A palette may be of signed bytes: then the factor that makes them weights is a part of the factor of each row, and a linear
layer can round its input to bytes as well, for products of integers.

Source: Cho, Alizadeh-Vahid, Adya, Rastegari, "DKM: Differentiable K-Means Clustering Layer for Neural Network Compression",
ICLR 2022, section 3.3.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.names import near_matches
from cofire.ops.checks import check_choice, check_integer, refuse, shape_of
from cofire.ops.lowbit import ACTIVATIONS, QTensor, check_int8, compute_dtype, qlinear
from cofire.ops.packing import pack_bits, packed_bytes, unpack_bits
from cofire.ops.quantizers import byte_tables

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SINGLE = "int8 activations need palettes of single weights, which share out the rows as evenly as possible"


def check_palette(where: str, bits: int, group_rows: int | None, cluster_dim: int) -> None:
    """Raise if one of these is no integer, or out of range."""
    check_integer(where, bits=bits, cluster_dim=cluster_dim)
    if not 1 <= bits <= 8:
        refuse(where, f"bits must be between 1 and 8, got {bits}")
    if cluster_dim < 1:
        refuse(where, f"cluster_dim must be at least 1, got {cluster_dim}")
    if group_rows is not None:
        check_integer(where, group_rows=group_rows)
        if group_rows < 1:
            refuse(where, f"group_rows must be at least 1, or None, got {group_rows}")


def check_options(where: str, kind: type[nn.Module], options: Mapping[str, Any]) -> None:
    """Raise if one of ``options`` is none of the keyword arguments of ``kind``."""
    signature = inspect.signature(kind).parameters.values()
    known = [p.name for p in signature if p.kind is p.KEYWORD_ONLY and p.name not in ("device", "dtype")]
    for name in options:
        if name not in known:
            raise TypeError(f"{where}: there is no option {name!r}{near_matches(name, known)}")


class Shaped(nn.Module):
    """What has the state of one weight: says in that state how the weight is divided, and loads no other.

    The shapes of labels and palettes do not tell: rows may be shared out among palettes in several ways.

    Attributes:
        geometry: int64 buffer: the weight's shape, then ``group_rows``.
    """

    geometry: Tensor
    shape: tuple[int, ...]
    group_rows: int

    def _divide_into(self, shape: Sequence[int], group_rows: int | None, device: torch.device | str | None) -> None:
        self.shape = tuple(shape)
        self.group_rows = shape[0] if group_rows is None else min(group_rows, shape[0])
        self.register_buffer("geometry", torch.tensor([*shape, self.group_rows], device=device))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        trouble = self._trouble(state_dict, prefix)
        if trouble:
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {trouble}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _trouble(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why a state is not of such a weight, or None."""
        stored = state_dict.get(f"{prefix}geometry")
        if isinstance(stored, Tensor) and not stored.is_meta:
            *shape, group_rows = stored.tolist() if stored.dim() == 1 and len(stored) else [0]
            if (tuple(shape), group_rows) != (self.shape, self.group_rows):
                return (
                    f"the state must be of a weight {list(self.shape)} with palettes of {self.group_rows} rows, got one of "
                    f"{shape} with palettes of {group_rows}"
                )
        return None


# ------------------------------------------------------------------------------------------------ labels to weights


def shares_evenly(rows: int, palettes: int, group_rows: int) -> bool:
    """Whether the palettes share out the rows as the products find them: by the row's share of all rows."""
    return palettes <= 1 or -(-rows // palettes) == group_rows


def factor_of_rows(factor: Tensor, scale: Tensor | None, rows: int, group_rows: int) -> Tensor:
    """``[R]``: the factor ``[P]`` of each row's palette, times its own where it has one."""
    each = factor.repeat_interleave(group_rows)[:rows]
    return each if scale is None else each * scale.detach().reshape(rows)


def weight_dtype(lut: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    """``dtype``, unless it is None: that of the palette, or of the factors where the palette is of bytes."""
    if dtype is not None:
        return dtype
    if lut.is_floating_point():
        return lut.dtype
    return torch.float32 if scale is None else scale.dtype


def look_up(labels: Tensor, lut: Tensor, palette: Tensor | None) -> Tensor:
    """Weights ``[R, n * d]`` of labels ``[R, n]``; ``palette [R]`` says which one each row uses (None: the first)."""
    index = labels.int()
    if palette is not None:
        index = index + (palette.int() * lut.shape[1])[:, None]
    # To select numbers is several times faster than to select rows of one number.
    entries = lut.flatten() if lut.shape[2] == 1 else lut.flatten(0, 1)
    return entries.index_select(0, index.flatten()).view(labels.shape[0], labels.shape[1] * lut.shape[2])


def decode(
    labels: Tensor,
    lut: Tensor,
    scale: Tensor | None = None,
    *,
    columns: int,
    group_rows: int,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weights behind packed labels.

    Args:
        labels: uint8 ``[R, ceil(columns / d * bits / 8)]``, rows of :func:`cofire.ops.packing.pack_bits`.
        lut: float or int8 ``[P, 2^bits, d]``.
        scale: optional, ``[R]``: multiplies each row.
        columns: weights per row.
        group_rows: rows that share a palette.
        rows: optional, int64: which rows to decode; all without.
        dtype: of the weights; that of ``lut`` without, or of ``scale`` where ``lut`` is int8.

    Returns:
        ``[R or len(rows), columns]``.
    """
    if rows is not None:
        # Unlike indexing, this refuses negative rows.
        labels = labels.index_select(0, rows)
        scale = None if scale is None else scale.index_select(0, rows)
    elif lut.shape[0] > 1:
        rows = torch.arange(labels.shape[0], device=labels.device)
    bits = (lut.shape[1] - 1).bit_length()
    palette = rows // group_rows if rows is not None and lut.shape[0] > 1 else None
    weight = look_up(unpack_bits(labels, bits, columns // lut.shape[2]), lut, palette)
    dtype = weight_dtype(lut, scale, dtype)
    # A byte times its factor is rounded once to 16 bits, as the products round it, not the factor before.
    weight = weight.to(dtype if lut.is_floating_point() else compute_dtype(scale))
    return (weight if scale is None else weight * scale.to(weight.dtype)[:, None]).to(dtype)


def as_qtensor(
    labels: Tensor, lut: Tensor, scale: Tensor | None, *, columns: int, group_rows: int, dtype: torch.dtype | None
) -> QTensor | None:
    """A packed weight as the products take it; the arguments are those of :func:`decode`.

    Returns:
        None for what they do not take: labels of vectors, and palettes that do not share out the rows as evenly as possible.
    """
    palettes, entries, d = lut.shape
    rows = labels.shape[0]
    if d > 1 or not rows or not columns or not shares_evenly(rows, palettes, group_rows):
        return None
    dtype = weight_dtype(lut, scale, dtype)
    factors = None if scale is None else scale[:, None]
    bits = (entries - 1).bit_length()
    table = lut[:, :, 0].to(dtype) if lut.is_floating_point() else lut[:, :, 0]
    return QTensor(labels, factors, (rows, columns), bits, columns, lut=table, dtype=dtype)


def palettized_linear(
    input: Tensor,
    labels: Tensor,
    lut: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_rows: int,
    dtype: torch.dtype | None = None,
    activations: str = "exact",
) -> Tensor:
    """``input @ weight.T + bias`` for a packed weight: by :func:`cofire.ops.qlinear`, which decodes inside the product.

    A weight that it does not take (:func:`as_qtensor`) is decoded whole, for the library's product.

    Args:
        input: ``[..., in_features]``.
        labels, lut, scale, group_rows, dtype: as in :func:`decode`.
        bias: optional, ``[R]``.
        activations: "exact", or, with an int8 ``lut``, "int8".

    Returns:
        ``[..., R]`` in the dtype of ``input``, under autocast in autocast's.

    Raises:
        ValueError: int8 activations with a palette of floats, or a weight that would have to be decoded.
    """
    check_choice("palettized_linear", "activations", activations, ACTIVATIONS)
    columns = input.shape[-1]
    weight = as_qtensor(labels, lut, scale, columns=columns, group_rows=group_rows, dtype=dtype)
    if weight is None:
        if activations == "int8" and labels.numel():
            refuse("palettized_linear", SINGLE)
        dense = decode(labels, lut, scale, columns=columns, group_rows=group_rows, dtype=dtype)
        return F.linear(input, dense, bias)
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device))
    return qlinear(input, weight, bias, activations=activations)


# ------------------------------------------------------------------------------------------------ packed layers


class PackedPalette(Shaped):
    """A weight as labels and palettes.

    Args:
        shape: of the weight; dimension 0 counts rows.
        bits, group_rows, cluster_dim: as in :class:`Palette`.
        scale: whether there is a factor per row; with int8 palettes there always is.
        dtype: of the weight that it stands for.
        lut_dtype: of palettes and factors; None: ``dtype``. int8 palettes have factors in fp32 (fp64 for an fp64 weight), and
            keep both dtypes when the layer is cast.
        device: of the buffers.

    Attributes:
        labels: uint8 buffer ``[rows, ceil(columns / cluster_dim * bits / 8)]``: :func:`cofire.ops.packing.pack_bits`.
        lut: buffer ``[P, 2^bits, cluster_dim]``, float or int8.
        scale: float buffer ``[rows]``, or None.

    Example:
        >>> labels = torch.tensor([[0, 1, 1], [2, 3, 0]])
        >>> packed = PackedPalette.from_labels(labels, torch.tensor([[[0.0], [0.5], [1.0], [2.0]]]), (2, 3))
        >>> packed.weight.tolist(), packed.nbytes
        ([[0.0, 0.5, 0.5], [1.0, 2.0, 0.0]], 18)

    Source: DKM, section 3.3 (inference); palettes of bytes as ``lut_dtype`` of coremltools.
    """

    labels: Tensor
    lut: Tensor
    scale: Tensor | None
    like: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bits: int = 4,
        group_rows: int | None = None,
        cluster_dim: int = 1,
        scale: bool = False,
        dtype: torch.dtype | None = None,
        lut_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_palette("PackedPalette", bits, group_rows, cluster_dim)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        lut_dtype = dtype if lut_dtype is None else lut_dtype
        if lut_dtype not in (torch.int8, *FLOATS):
            raise TypeError(f"PackedPalette: lut_dtype must be int8 or a float of 16 to 64 bits, got {lut_dtype}")
        rows, columns = shape[0], math.prod(shape[1:])
        if columns % cluster_dim:
            refuse("PackedPalette", f"rows of {columns} weights do not divide into vectors of {cluster_dim}")
        self._divide_into(shape, group_rows, device)
        self.columns, self.bits, self.cluster_dim = columns, bits, cluster_dim
        palettes = -(-rows // self.group_rows)
        width = packed_bytes(columns // cluster_dim, bits)
        self.register_buffer("labels", torch.zeros(rows, width, dtype=torch.uint8, device=device))
        self.register_buffer("lut", torch.zeros(palettes, 1 << bits, cluster_dim, dtype=lut_dtype, device=device))
        factors: Tensor | None = None
        if scale or lut_dtype == torch.int8:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            factors = torch.ones(rows, dtype=wide if lut_dtype == torch.int8 else lut_dtype, device=device)
        self.register_buffer("scale", factors)
        # The dtype of the weight, which follows the layer wherever it is cast to.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedPalette:
        before = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.scale
        if self.lut.dtype == torch.int8 and before is not None and after is not None and after.dtype != before.dtype:
            self.scale = before.to(after.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        one = self.like.dtype == self.lut.dtype
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        dtype = self.lut.dtype if one else self.like.dtype  # the palette may have been assigned, not copied
        if (dtype, self.lut.device) != (self.like.dtype, self.like.device):
            self.like = torch.empty(0, dtype=dtype, device=self.lut.device)

    def _trouble(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        stored = state_dict.get(f"{prefix}lut")
        if isinstance(stored, Tensor) and stored.is_floating_point() != self.lut.is_floating_point():
            expected = "floats" if self.lut.is_floating_point() else self.lut.dtype
            return f"the palette of the state must be of {expected} (lut_dtype), got {stored.dtype}"
        return super()._trouble(state_dict, prefix)

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,
        lut: Tensor,
        shape: Sequence[int],
        *,
        group_rows: int | None = None,
        scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
        lut_dtype: torch.dtype | None = None,
    ) -> PackedPalette:
        """Pack labels, as :func:`cofire.ops.palettize` gives them, and palettes.

        Args:
            labels: integers of ``shape``, or ``[rows, columns / d]``.
            lut: float or int8 ``[P, K, d]``. K is filled up to a power of two with copies of the last entry.
            shape: of the weight.
            group_rows: rows that share a palette; None: all.
            scale: optional ``[rows]``.
            dtype: of the weight; None: that of ``lut``, or the default where it is int8.
            lut_dtype: None: int8 for an int8 ``lut``, otherwise ``dtype``. To int8 each palette of floats is rounded by itself,
                the largest magnitude to 127, and its factor becomes part of ``scale``.

        Raises:
            TypeError: ``lut_dtype`` is neither a float nor int8.
            ValueError: a shape that does not fit, a label without an entry, or a palette that is not finite to be rounded.
        """
        if lut.dim() != 3 or not 1 <= lut.shape[1] <= 256:
            refuse("PackedPalette", f"lut must have shape [palettes, 1 to 256, d], got {shape_of(lut)}")
        clusters, d = lut.shape[1:]
        bits = max(1, (clusters - 1).bit_length())
        if lut.dtype == torch.int8:
            dtype = torch.get_default_dtype() if dtype is None else dtype
            lut_dtype = torch.int8 if lut_dtype is None else lut_dtype
        packed = cls(
            shape,
            bits=bits,
            group_rows=group_rows,
            cluster_dim=d,
            scale=scale is not None,
            dtype=lut.dtype if dtype is None else dtype,
            lut_dtype=lut_dtype,
            device=lut.device,
        )
        rows, count = shape[0], packed.columns // d
        if labels.numel() != rows * count:
            refuse("PackedPalette", f"labels must be {rows} rows of {count}, got {shape_of(labels)}")
        if lut.shape[0] != packed.lut.shape[0]:
            refuse("PackedPalette", f"lut must hold {packed.lut.shape[0]} palettes, got {shape_of(lut)}")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < clusters:
            refuse("PackedPalette", f"labels must be between 0 and {clusters - 1}, got {int(labels.max())}")
        filled = torch.cat((lut, lut[:, -1:].expand(-1, (1 << bits) - clusters, -1)), 1).detach()
        if packed.lut.dtype == torch.int8 and lut.is_floating_point():
            filled, factor = byte_tables("PackedPalette", filled)
            scale = factor_of_rows(factor, scale, rows, packed.group_rows)
        packed.lut.copy_(filled)
        packed.labels.copy_(pack_bits(labels.reshape(rows, count).to(torch.uint8), bits))
        if packed.scale is not None and scale is not None:
            packed.scale.copy_(scale.detach().reshape(rows))
        return packed

    def as_floats(self) -> PackedPalette:
        """The same, for what takes no palette of bytes: its entries as floats, in the dtype of the weight as the factors.

        Entries are divided by a power of two, which is exact, and the factors multiplied by it: a factor of bytes is near
        the largest weight / 127, which fp16 would round as a subnormal where the weight itself is none.
        """
        if self.lut.is_floating_point():
            return self
        assert self.scale is not None
        dtype = self.like.dtype
        labels = unpack_bits(self.labels, self.bits, self.columns // self.cluster_dim)
        exponent = int(self.lut.short().abs().max()).bit_length()  # 7, but for palettes of small integers
        lut, scale = self.lut.to(dtype) / 2**exponent, self.scale * 2**exponent
        return self.from_labels(
            labels, lut, self.shape, group_rows=self.group_rows, scale=scale, dtype=dtype, lut_dtype=dtype
        )

    @property
    def weight(self) -> Tensor:
        """The decoded weight, anew with each call."""
        return self.rows().view(self.shape)

    def rows(self, index: Tensor | None = None) -> Tensor:
        """The rows at ``index``, or all, decoded: ``[R, columns]``."""
        return decode(
            self.labels,
            self.lut,
            self.scale,
            columns=self.columns,
            group_rows=self.group_rows,
            rows=index,
            dtype=self.like.dtype,
        )

    @property
    def nbytes(self) -> int:
        """Of labels, palettes and factors."""
        return sum(x.numel() * x.element_size() for x in (self.labels, self.lut, self.scale) if x is not None)

    def extra_repr(self) -> str:
        groups = "" if self.lut.shape[0] == 1 else f", group_rows={self.group_rows}"
        vectors = "" if self.cluster_dim == 1 else f", cluster_dim={self.cluster_dim}"
        entries = "" if self.lut.is_floating_point() else f", lut_dtype={self.lut.dtype}"
        return f"{list(self.shape)}, bits={self.bits}{groups}{vectors}{entries}, {self.nbytes} bytes"


class PackedPalettized(nn.Module):
    """What the packed layers share: the packed weight, and nothing decoded.

    Attributes:
        palette: the :class:`PackedPalette`.
    """

    palette: PackedPalette

    @property
    def labels(self) -> Tensor:
        return self.palette.labels

    @property
    def lut(self) -> Tensor:
        return self.palette.lut

    @property
    def weight(self) -> Tensor:
        """The decoded weight, anew with each call."""
        return self.palette.weight

    @property
    def nbytes(self) -> int:
        """Of labels, palettes, factors and whatever is not packed, as the bias."""
        own = {**self._parameters, **self._buffers, "geometry": None}
        return sum(x.numel() * x.element_size() for x in own.values() if x is not None) + self.palette.nbytes


class PackedPalettizedLinear(PackedPalettized):
    """A linear layer whose weight is labels and a palette; :meth:`PalettizedLinear.pack` makes it.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        activations: "exact", or, with an int8 palette, "int8": the input is rounded to bytes too, as in
            :func:`cofire.ops.qlinear`.
        palette: options of :class:`PackedPalette`: ``bits``, ``group_rows``, ``cluster_dim``, ``scale``, ``lut_dtype``. An
            empty layer made with them loads the state of a packed one, and its activations with it.

    Attributes:
        activations: "exact" or "int8"; may be set.
        geometry: int64 buffer ``[1]``: 0 for exact activations, 1 for int8. With older states, which have none, the layer
            keeps its own.

    Shape: as ``nn.Linear``.

    Raises:
        ValueError: int8 activations with a palette of floats, of vectors, or of rows that are not shared out evenly, or with
            rows too wide for sums in 32 bits.
        RuntimeError: from ``load_state_dict``, for a state that does not fit.

    Example:
        >>> from cofire.nn import PalettizedLinear
        >>> packed = PalettizedLinear(16, 8, bits=2).pack()
        >>> empty = PackedPalettizedLinear(16, 8, bits=2)
        >>> empty.load_state_dict(packed.state_dict())
        <All keys matched successfully>
        >>> x = torch.rand(3, 16)
        >>> torch.equal(empty(x), packed(x))
        True
        >>> PalettizedLinear(16, 8, bits=2).pack(lut_dtype=torch.int8, activations="int8")(x).shape
        torch.Size([3, 8])

    Source: DKM, section 3.3 (inference); int8 activations: Dettmers et al. 2022 (LLM.int8(), 2208.07339), section 2.
    """

    bias: nn.Parameter | None
    geometry: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activations: str = "exact",
        **palette: Any,
    ) -> None:
        super().__init__()
        check_options("PackedPalettizedLinear", PackedPalette, palette)
        self.palette = PackedPalette((out_features, in_features), device=device, dtype=dtype, **palette)
        self.bias = _empty_bias(out_features, device, dtype) if bias else None
        self._take(activations)
        self.eval()

    @classmethod
    def _around(
        cls, palette: PackedPalette, bias: nn.Parameter | None, activations: str = "exact"
    ) -> PackedPalettizedLinear:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.palette, layer.bias = palette, bias
        layer._take(activations)
        return layer.eval()

    def _take(self, activations: str) -> None:
        self._check_activations(activations)
        self._activations = activations
        self.register_buffer("geometry", self._numbers(self.labels.device))

    def _numbers(self, device: torch.device) -> Tensor:
        """What ``geometry`` holds."""
        return torch.tensor([ACTIVATIONS.index(self._activations)], device=device)

    def _check_activations(self, activations: str) -> None:
        check_choice("PackedPalettizedLinear", "activations", activations, ACTIVATIONS)
        p = self.palette
        if activations == "int8":
            if p.lut.dtype != torch.int8:
                refuse(
                    "PackedPalettizedLinear",
                    f"int8 activations need a palette of bytes (lut_dtype=torch.int8), got one of {p.lut.dtype}",
                )
            if p.cluster_dim > 1 or not shares_evenly(p.shape[0], p.lut.shape[0], p.group_rows):
                refuse("PackedPalettizedLinear", f"{SINGLE}, got {p.extra_repr()}")
            check_int8("PackedPalettizedLinear", p.bits, p.columns, p.lut)

    @property
    def activations(self) -> str:
        return self._activations

    @activations.setter
    def activations(self, value: str) -> None:
        self._take(value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "geometry" not in self._buffers:  # pickled before activations were a part of the state
            self._take(self.__dict__.pop("activations", "exact"))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name, device = f"{prefix}geometry", self.geometry.device
        stored = state_dict.get(name)
        refused = self.palette._trouble(state_dict, f"{prefix}palette.") is not None
        if isinstance(stored, Tensor) and not stored.is_meta and not refused:
            numbers = stored.tolist()
            try:
                if numbers not in ([0], [1]):
                    refuse(
                        "PackedPalettizedLinear",
                        f"the geometry of the state must hold 0 (exact activations) or 1 (int8), got {numbers}",
                    )
                self._check_activations(ACTIVATIONS[numbers[0]])
                self._activations = ACTIVATIONS[numbers[0]]
            except ValueError as error:
                error_msgs.append(f"{prefix.removesuffix('.') or 'PackedPalettizedLinear'}: {error}")
                refused = True
        if stored is None or refused:
            like = state_dict.get(f"{prefix}palette.geometry")
            own = self._numbers(like.device if isinstance(like, Tensor) else device)
            state_dict = {**state_dict, name: own}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @property
    def in_features(self) -> int:
        return self.palette.columns

    @property
    def out_features(self) -> int:
        return self.palette.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            refuse("PackedPalettizedLinear", f"input must have {self.in_features} features, got {shape_of(input)}")
        p = self.palette
        return palettized_linear(
            input, p.labels, p.lut, p.scale, self.bias, group_rows=p.group_rows, dtype=p.like.dtype,
            activations=self.activations,
        )  # fmt: skip

    def extra_repr(self) -> str:
        rounded = "" if self.activations == "exact" else f", activations={self.activations}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{rounded}"
        )


class PackedPalettizedConv2d(PackedPalettized):
    """A convolution whose weight is labels and a palette; :meth:`PalettizedConv2d.pack` makes it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in
            ``nn.Conv2d``.
        palette: options of :class:`PackedPalette`, as in :class:`PackedPalettizedLinear`.

    Shape: as ``nn.Conv2d``.

    Example:
        >>> from cofire.nn import PalettizedConv2d
        >>> packed = PalettizedConv2d(3, 8, 3, bits=2).pack()
        >>> packed(torch.rand(1, 3, 5, 5)).shape, packed.weight.shape
        (torch.Size([1, 8, 3, 3]), torch.Size([8, 3, 3, 3]))

    Source: DKM, section 3.3 (inference).
    """

    bias: nn.Parameter | None
    GEOMETRY = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "_reversed_padding_repeated_twice",
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **palette: Any,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta"
        )
        self._follow(conv)
        check_options("PackedPalettizedConv2d", PackedPalette, palette)
        self.palette = PackedPalette(conv.weight.shape, device=device, dtype=dtype, **palette)
        self.bias = _empty_bias(out_channels, device, dtype) if bias else None
        self.eval()

    @classmethod
    def _around(cls, palette: PackedPalette, bias: nn.Parameter | None, conv: nn.Conv2d) -> PackedPalettizedConv2d:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._follow(conv)
        layer.palette, layer.bias = palette, bias
        return layer.eval()

    def _follow(self, conv: nn.Conv2d) -> None:
        for name in self.GEOMETRY:
            setattr(self, name, getattr(conv, name))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = nn.Conv2d._conv_forward(cast(nn.Conv2d, self), input, self.weight, self.bias)
        return output

    def extra_repr(self) -> str:
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{shape}, padding={self.padding}, groups={self.groups}, bias={self.bias is not None}"


class PackedPalettizedEmbedding(PackedPalettized):
    """An embedding whose table is labels and a palette, and which decodes the rows asked for.

    :meth:`PalettizedEmbedding.pack` makes it.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as in ``nn.Embedding``.
        palette: options of :class:`PackedPalette`, as in :class:`PackedPalettizedLinear`.

    Attributes:
        padding: buffer ``[embedding_dim]``: the row at ``padding_idx``, which is not palettized.

    Shape: as ``nn.Embedding``.

    Example:
        >>> from cofire.nn import PalettizedEmbedding
        >>> packed = PalettizedEmbedding(100, 8, bits=8).pack()
        >>> packed(torch.tensor([3, 99])).shape
        torch.Size([2, 8])

    Source: eDKM, section 3 (8-bit embeddings).
    """

    padding: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **palette: Any,
    ) -> None:
        super().__init__()
        check_options("PackedPalettizedEmbedding", PackedPalette, palette)
        self.palette = PackedPalette((num_embeddings, embedding_dim), device=device, dtype=dtype, **palette)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            expected = f"between {-num_embeddings} and {num_embeddings - 1}"
            refuse("PackedPalettizedEmbedding", f"padding_idx must be {expected}, or None, got {padding_idx}")
        index = padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + num_embeddings
        row = None if index is None else torch.zeros(embedding_dim, device=device, dtype=dtype)
        self._finish(index, row)

    @classmethod
    def _around(cls, palette: PackedPalette, padding_idx: int | None, row: Tensor | None) -> PackedPalettizedEmbedding:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.palette = palette
        layer._finish(padding_idx, row)
        return layer

    def _finish(self, padding_idx: int | None, row: Tensor | None) -> None:
        self.num_embeddings, self.embedding_dim = self.palette.shape
        self.padding_idx = padding_idx
        self.register_buffer("padding", row)
        self.eval()

    @property
    def weight(self) -> Tensor:
        """The decoded table, anew with each call."""
        table = self.palette.weight
        if self.padding is not None and self.padding_idx is not None:
            table[self.padding_idx] = self.padding
        return table

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"PackedPalettizedEmbedding: input must be int32 or int64, got {input.dtype}")
        rows = self.palette.rows(input.flatten().long()).view(*input.shape, self.embedding_dim)
        if self.padding is None or self.padding_idx is None:
            return rows
        return torch.where(input.eq(self.padding_idx)[..., None], self.padding, rows)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


def _empty_bias(size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, device=device, dtype=dtype), requires_grad=False)
