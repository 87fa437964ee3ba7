# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights are drawn to a palette: few values, or few vectors of values, and a label for each weight.

A layer has two forms. The *trainable* form (:class:`PalettizedLinear`, :class:`PalettizedConv2d`,
:class:`PalettizedEmbedding`) owns the weight and computes with what differentiable k-means makes of it; in evaluation
mode with the nearest centroids, which is what will be deployed. The *packed* form, from ``pack()``, owns labels of one to
eight bits and the palette.

Sources: Cho, Alizadeh-Vahid, Adya, Rastegari, "DKM: Differentiable K-Means Clustering Layer for Neural Network
Compression", ICLR 2022; Cho et al., "eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language
Models", IEEE CAL 2024; seeding of vectors: Arthur, Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import ops
from cofire.nn.palettes import (
    PackedPalette,
    PackedPalettizedConv2d,
    PackedPalettizedEmbedding,
    PackedPalettizedLinear,
    PaddingMode,
    Shaped,
    check_options,
    check_palette,
    look_up,
)
from cofire.ops.checks import check_choice, check_integer, check_number, refuse, shape_of
from cofire.ops.clustering import FORWARDS, GRADIENTS, Clustered, temperature

UPDATES = ("forward", "step")
DEFAULT_RHO = 0.1
#: k-means of vectors looks at no more than these, drawn at random; iterations of Lloyd's algorithm.
SAMPLE, LLOYD_ITERATIONS = 65536, 100

L = TypeVar("L", bound="Palettized")


# ------------------------------------------------------------------------------------------------ plain k-means


def kmeans(vectors: Tensor, clusters: int, generator: torch.Generator | None = None) -> Tensor:
    """k-means of vectors: seeds by k-means++, then Lloyd's algorithm until no label changes.

    Args:
        vectors: ``[n, d]``, any float, finite. Of more than 65,536, as many are drawn at random.
        clusters: at least 1.
        generator: of the draws, on the CPU; None: one with seed 0, so that every process finds the same.

    Returns:
        Centroids ``[clusters, d]``, fp32 (fp64 for fp64). Fewer distinct vectors than clusters are repeated.

    Raises:
        ValueError: no vectors, NaN or infinity among them, or ``clusters`` out of range.

    Example:
        >>> vectors = torch.tensor([[0.0, 1.0], [0.0, 3.0], [8.0, 8.0]])
        >>> sorted(kmeans(vectors, 2).tolist())
        [[0.0, 2.0], [8.0, 8.0]]

    Source: Arthur, Vassilvitskii, SODA 2007; Lloyd, "Least squares quantization in PCM", IEEE Trans. Information Theory
    1982.
    """
    check_integer("kmeans", clusters=clusters)
    if clusters < 1:
        refuse("kmeans", f"clusters must be at least 1, got {clusters}")
    if vectors.dim() != 2 or vectors.numel() == 0:
        refuse("kmeans", f"vectors must have shape [n, d] and elements, got {shape_of(vectors)}")
    if not bool(vectors.isfinite().all()):
        nan, infinite = int(vectors.isnan().sum()), int(vectors.isinf().sum())
        refuse("kmeans", f"vectors must be finite, got {nan} NaN and {infinite} infinite values")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    x = vectors.detach()
    if len(x) > SAMPLE:
        x = x[torch.randperm(len(x), generator=generator)[:SAMPLE].to(x.device)]
    # On the CPU and in fp64, where sums have one order: each process of a parallel training finds the same centroids.
    x = x.double().cpu()
    centroids = _seeds(x, clusters, generator)
    labels = torch.full((len(x),), -1)
    for _ in range(LLOYD_ITERATIONS):
        distance, nearest = _distances(x, centroids).min(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        count = torch.bincount(labels, minlength=clusters)
        total = x.new_zeros(centroids.shape).index_add(0, labels, x)
        centroids = torch.where(count[:, None] > 0, total / count[:, None].clamp(min=1), centroids)
        empty = (count == 0).nonzero().flatten()
        if len(empty) and distance.max() > 0:
            far = distance.argsort(descending=True)[: len(empty)]
            centroids[empty[: len(far)]] = x[far]
    return centroids.to(vectors.device, torch.promote_types(vectors.dtype, torch.float32))


def _distances(x: Tensor, centroids: Tensor) -> Tensor:
    """Squared, ``[n, K]``; not by way of a product, which cancels."""
    return torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist").square()


def _seeds(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Each seed is drawn with a probability proportional to the squared distance to the nearest one before it."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    distance = _distances(x, x[chosen[-1:]])[:, 0]
    while len(chosen) < clusters:
        total = distance.sum()
        drawn = torch.multinomial(distance / total, 1, generator=generator) if total > 0 else torch.tensor([chosen[0]])
        chosen.append(int(drawn))
        distance = torch.minimum(distance, _distances(x, x[drawn])[:, 0])
    return x[chosen]


def separate(vectors: Tensor, centroids: Tensor, keep_first: bool = False) -> tuple[Tensor, bool]:
    """Give centroids that equal another one work of their own: each splits the cell with the largest inertia in two.

    Equal centroids move alike for ever, and make the system of the implicit gradient singular.

    Args:
        vectors: ``[n, d]``.
        centroids: ``[K, d]``.
        keep_first: centroid 0 stays where it is.

    Returns:
        The centroids, and whether all are different now; if not, there are fewer different vectors than centroids, and
        each vector is one.

    Example:
        >>> vectors = torch.tensor([[0.0], [1.0], [8.0], [9.0]])
        >>> parted, different = separate(vectors, torch.tensor([[0.5], [8.5], [8.5]]))
        >>> parted.flatten().tolist(), different
        ([0.0, 8.5, 1.0], True)
    """
    centroids = centroids.clone()
    for _ in range(len(centroids)):
        same = (centroids[:, None] == centroids).all(2).tril(-1).any(1)
        spare = same.nonzero().flatten()
        if len(spare) == 0:
            return centroids, True
        labels = ops.palettize(vectors, centroids[None], group_size=max(vectors.numel(), centroids.numel()))[0].long()
        error = (vectors.to(centroids.dtype) - centroids[labels.view(-1)]).square().sum(1)
        inertia = error.new_zeros(len(centroids)).index_add(0, labels.view(-1), error)
        for cell in inertia.argsort(descending=True).tolist():
            members = vectors[labels.view(-1) == cell]
            if len(members) > 1 and bool((members != members[0]).any()):
                break
        else:
            return centroids, False
        halves = ops.kmeans1d(members, 2)[0][0] if members.shape[1] == 1 else kmeans(members, 2)
        if keep_first and cell == 0:
            centroids[spare[0]] = halves[halves.square().sum(1).argmax()]
        else:
            centroids[cell], centroids[spare[0]] = halves[0], halves[1]
    return centroids, not bool((centroids[:, None] == centroids).all(2).tril(-1).any())


# ------------------------------------------------------------------------------------------------------- palette


class Palette(Shaped):
    """The state of one clustered weight, and how it is clustered.

    Palettized layers that share a weight share this module too. All floating-point state is fp32 (fp64 for an fp64
    weight) whatever the layer is cast to.

    Args:
        shape: of the weight; dimension 0 counts rows.
        bits: of a label: there are ``2^bits`` clusters; 1 to 8.
        group_rows: rows of the weight that share a palette; the last group may have fewer. None: all.
        cluster_dim: consecutive weights of a row that share a label.
        tau: temperature in squared units of the weights. Give this or ``rho``; neither: ``rho`` of 0.1.
        rho: temperature in units of the squared mean gap between centroids.
        iterations, eps, forward, grad, enforce_zero, prune_threshold, keep_sparsity: as in :func:`cofire.ops.dkm`.
        per_channel_scale: divide each row by its largest magnitude, as it is at the initialisation (a row of zeros: by
            1), and multiply it back afterwards. In 16 bits the quotient is rounded once more.
        update: when the centroids that a forward in training has found become those where the next one starts:
            ``"forward"``: at once, as in DKM. ``"step"``: by :meth:`advance`. Then a forward that is repeated finds the
            same again, as gradient checkpointing and accumulated gradients need it.
        device, dtype: of the weight.

    Attributes:
        centroids: buffer ``[P, 2^bits, cluster_dim]``.
        heat: buffer, the temperature: ``tau`` or ``rho``.
        steps: int64 buffer, how often :meth:`advance` was called.
        flags: uint8 buffer behind the properties ``initialized``, ``enabled`` (if not, the weight stays as it is) and
            ``hard`` (``forward="hard_ste"``).
        scale: buffer ``[rows]``, with ``per_channel_scale``.
        parameter_name: of the weight; error sentences begin with it.

    Shape: weight and result as ``shape``.

    Raises:
        TypeError, ValueError: an argument out of range, or a weight that does not divide into vectors and groups.

    Example:
        >>> palette = Palette((4, 8), bits=1, rho=0.01)
        >>> weight = torch.randn(4, 8)
        >>> palette.initialize(weight)
        >>> palette.eval()(weight).unique().numel()
        2

    Source: DKM, section 3.2; eDKM, section 2.
    """

    centroids: Tensor
    heat: Tensor
    steps: Tensor
    flags: Tensor
    moved: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bits: int = 4,
        group_rows: int | None = None,
        cluster_dim: int = 1,
        tau: float | None = None,
        rho: float | None = None,
        iterations: int = 3,
        eps: float = 1e-7,
        forward: str = "soft",
        grad: str = "unroll",
        enforce_zero: bool = False,
        prune_threshold: float = 0.0,
        keep_sparsity: bool = False,
        per_channel_scale: bool = False,
        update: str = "forward",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_palette("Palette", bits, group_rows, cluster_dim)
        check_choice("Palette", "update", update, UPDATES)
        check_choice("Palette", "forward", forward, FORWARDS)
        check_choice("Palette", "grad", grad, GRADIENTS)
        check_integer("Palette", iterations=iterations)
        if not 1 <= iterations <= 1000:
            refuse("Palette", f"iterations must be between 1 and 1000, got {iterations}")
        if tau is not None and rho is not None:
            refuse("Palette", f"one of tau and rho may be given, got {tau} and {rho}")
        rows, columns = shape[0], math.prod(shape[1:])
        self._divide_into(shape, group_rows, device)
        self.rows, self.columns = rows, columns
        self.bits, self.cluster_dim, self.update = bits, cluster_dim, update
        if columns % cluster_dim or columns == 0:
            refuse("Palette", f"rows of {columns} weights do not divide into vectors of {cluster_dim}")
        least = cluster_dim << bits
        if self.group_size < least:
            found = f"{self.group_rows} rows of {columns}"
            refuse("Palette", f"a group must have at least {least} weights for {1 << bits} clusters, got {found}")
        self.absolute = tau is not None
        start = DEFAULT_RHO if tau is None and rho is None else rho if tau is None else tau
        assert start is not None
        check_temperature("Palette", "tau" if self.absolute else "rho", start)
        check_number("Palette", eps=eps, prune_threshold=prune_threshold)
        if keep_sparsity and not enforce_zero:
            refuse("Palette", "keep_sparsity needs enforce_zero")
        self.rules: dict[str, Any] = {"prune_threshold": prune_threshold, "keep_sparsity": keep_sparsity}
        self.options: dict[str, Any] = {
            "iterations": iterations,
            "eps": eps,
            "grad": grad,
            "enforce_zero": enforce_zero,
        }
        self.parameter_name: str | None = None
        self.soft_evaluation = False
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        where: dict[str, Any] = {"device": device, "dtype": wide}
        self.register_buffer("centroids", torch.zeros(self.palettes, 1 << bits, cluster_dim, **where))
        self.register_buffer("heat", torch.full((), start, **where))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(rows, **where) if per_channel_scale else None)
        # Between two steps it is one with the centroids, so it is no part of the state.
        self.register_buffer("moved", torch.zeros_like(self.centroids) if update == "step" else None, persistent=False)
        self._flags, self.count = [False, False, False], 0
        self.enabled, self.hard = True, forward == "hard_ste"

    # ---------------------------------------------------------------------------------------------------- state

    @property
    def group_size(self) -> int:
        """Weights per palette."""
        return self.group_rows * self.columns

    @property
    def palettes(self) -> int:
        return -(-self.rows // self.group_rows)

    def _flag(self, place: int, value: bool) -> None:
        # Read from Python, which decides what runs, and kept in a buffer, which is saved: no forward waits for a device.
        if not self.flags.is_meta:
            self.flags[place] = value
        self._flags = [value if i == place else known for i, known in enumerate(self._flags)]

    @property
    def initialized(self) -> bool:
        return self._flags[0]

    @initialized.setter
    def initialized(self, value: bool) -> None:
        self._flag(0, value)

    @property
    def enabled(self) -> bool:
        return self._flags[1]

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._flag(1, value)

    @property
    def hard(self) -> bool:
        return self._flags[2]

    @hard.setter
    def hard(self, value: bool) -> None:
        self._flag(2, value)

    def refresh(self) -> None:
        """Take over what the buffers say; needed where something other than ``load_state_dict`` wrote them."""
        if self.flags.is_meta:
            return
        self._flags = [bool(flag) for flag in self.flags.tolist()]
        self.count = int(self.steps)
        if self.moved is not None:
            self.moved = self.centroids.clone()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Palette:
        """Follows a layer to its device, but not to 16 bits: the centroids move by less than those can tell."""

        def keep(x: Tensor) -> Tensor:
            result = fn(x)
            if not x.is_floating_point():
                return result
            dtype = torch.float64 if result.dtype == torch.float64 else torch.float32
            return result.to(dtype) if x.is_meta or result.dtype == x.dtype else x.to(result.device, dtype)

        super()._apply(keep, recurse)
        return self

    # ------------------------------------------------------------------------------------------------ clustering

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        if not self.initialized:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "Palette: it is initialised once, outside of a graph: call initialize() before compiling"
                )
            self.initialize(weight)
        scaled = self.divide(weight)
        if self.training or self.soft_evaluation:
            return self._multiply(self._cluster(scaled))
        labels, _ = self.assign(scaled)
        lut = self.centroids.to(weight.dtype)
        return self._multiply(look_up(labels, lut, self._palette_of_rows()).view(self.shape))

    def _cluster(self, scaled: Tensor) -> Tensor:
        clustered = self.cluster(scaled)
        if self.training:
            with torch.no_grad():
                (self.centroids if self.moved is None else self.moved).copy_(clustered.centroids)
        return clustered.output

    def cluster(self, scaled: Tensor) -> Clustered:
        """Differentiable k-means of a weight that is divided already, as training computes it; changes nothing."""
        if torch.compiler.is_compiling():
            return self._dkm(scaled)
        try:
            return self._dkm(scaled)
        except ValueError as error:
            raise self._named(error) from None

    def _dkm(self, scaled: Tensor) -> Clustered:
        return ops.dkm(
            scaled,
            self.centroids,
            tau=self.temperature(),
            group_size=self.group_size,
            forward="hard_ste" if self.hard else "soft",
            **self.rules,
            **self.options,
        )

    def _named(self, error: ValueError) -> ValueError:
        return error if self.parameter_name is None else ValueError(f"{self.parameter_name}: {error}")

    def temperature(self) -> Tensor:
        """In squared units of the weights, ``[P]``."""
        if self.absolute:
            return self.heat.expand(self.palettes).clone()
        return temperature(self.centroids, cast(float, self.heat))

    def assign(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Labels ``[rows, columns / cluster_dim]`` of the nearest centroids, and the inertia ``[P]``."""
        if torch.compiler.is_compiling():
            return self._palettize(scaled)
        try:
            return self._palettize(scaled)
        except ValueError as error:
            raise self._named(error) from None

    def _palettize(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        labels, inertia = ops.palettize(scaled.detach(), self.centroids, group_size=self.group_size, **self.rules)
        return labels.view(self.rows, -1), inertia

    def _palette_of_rows(self) -> Tensor | None:
        if self.palettes == 1:
            return None
        return torch.arange(self.rows, device=self.centroids.device) // self.group_rows

    def divide(self, weight: Tensor) -> Tensor:
        return weight if self.scale is None else weight / self._row_scale(weight)

    def _multiply(self, scaled: Tensor) -> Tensor:
        return scaled if self.scale is None else scaled * self._row_scale(scaled)

    def _row_scale(self, like: Tensor) -> Tensor:
        assert self.scale is not None
        return self.scale.to(like.dtype).view(-1, *[1] * (len(self.shape) - 1))

    # ---------------------------------------------------------------------------------------------- between steps

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Start from the k-means of ``weight``: the optimal one of scalars, a seeded one of vectors.

        Raises:
            ValueError: NaN or infinity in ``weight``, with their number.
        """
        weight = whole(weight)
        if self.scale is not None:
            largest = weight.abs().flatten(1).amax(1)
            self.scale.copy_(torch.where(largest == 0, 1, largest))
        scaled = self.divide(weight)
        try:
            if self.cluster_dim == 1:
                centroids, _ = ops.kmeans1d(scaled, 1 << self.bits, group_size=self.group_size)
            else:
                centroids = torch.stack([kmeans(part, 1 << self.bits) for part in self._groups(scaled)])
        except ValueError as error:
            raise self._named(error) from None
        if self.options["enforce_zero"]:
            nearest = centroids.square().sum(2).argmin(1, keepdim=True)[:, :, None].expand(-1, 1, self.cluster_dim)
            centroids = centroids.scatter(1, nearest, centroids[:, :1])
            centroids[:, 0] = 0
        self._place(centroids)
        self.initialized = True
        self.separate(weight)

    def _place(self, centroids: Tensor) -> None:
        self.centroids.copy_(centroids)
        if self.moved is not None:
            self.moved.copy_(centroids)

    def _groups(self, scaled: Tensor) -> Iterator[Tensor]:
        """The vectors ``[n, d]`` of each palette."""
        yield from (part.reshape(-1, self.cluster_dim) for part in scaled.reshape(-1).split(self.group_size))

    @torch.no_grad()
    def separate(self, weight: Tensor) -> None:
        """Part centroids that have become equal: see :func:`separate`. Waits for the device.

        A group of fewer different weights than clusters keeps its palette, which holds them exactly.
        """
        suspects = self._with_duplicates()
        if not suspects:
            return
        centroids, alike = self.centroids.clone(), False
        groups = list(self._groups(self.divide(whole(weight))))
        for p in suspects:
            centroids[p], different = separate(groups[p], centroids[p], bool(self.options["enforce_zero"]))
            alike = alike or not different
        self._place(centroids)
        if alike:
            _warn_exact(self.parameter_name, 1 << self.bits)

    def _with_duplicates(self) -> list[int]:
        if self.cluster_dim == 1:
            gaps = self.centroids[:, :, 0].sort(1).values.diff(dim=1)
            return cast("list[int]", (gaps == 0).any(1).nonzero().flatten().tolist())
        return [p for p, c in enumerate(self.centroids) if len(c.unique(dim=0)) < len(c)]

    @torch.no_grad()
    def advance(self) -> None:
        """Count a step; with ``update="step"``, start the next forward where the last one ended."""
        if self.moved is not None and self.enabled:
            self.centroids.copy_(self.moved)
        self.steps += 1
        self.count += 1

    def extra_repr(self) -> str:
        groups = "" if self.palettes == 1 else f", group_rows={self.group_rows}"
        vectors = "" if self.cluster_dim == 1 else f", cluster_dim={self.cluster_dim}"
        scaled = "" if self.scale is None else ", per_channel_scale=True"
        return f"bits={self.bits}, grad={self.options['grad']}{groups}{vectors}{scaled}"


_said_exact = False


def _warn_exact(name: str | None, clusters: int) -> None:
    global _said_exact
    if not _said_exact:
        _said_exact = True
        warnings.warn(
            f"{name or 'Palette'}: a group has fewer different weights than {clusters} clusters; its palette holds them "
            "exactly, and some centroids are equal (said once)",
            stacklevel=4,
        )


def check_temperature(where: str, name: str, value: float) -> None:
    """Raise if ``value`` is not a positive and finite number."""
    check_number(where, **{name: value})
    if not (value > 0 and math.isfinite(value)):
        refuse(where, f"{name} must be positive and finite, got {value}")


def whole(x: Tensor) -> Tensor:
    """The tensor itself, gathered where it is sharded."""
    gather = getattr(x, "full_tensor", None)
    return x.detach() if gather is None else cast(Tensor, gather()).detach()


# --------------------------------------------------------------------------------------------- trainable layers


def _runs_as_module(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing.

    In evaluation mode ``nn.TransformerEncoderLayer`` hands the plain weights of its layers to one fused operator, unless
    one of them has a hook.
    """


class Palettized(nn.Module):
    """What the trainable palettized layers share.

    Attributes:
        palette: the :class:`Palette`.
    """

    palette: Palette
    weight: Tensor
    bias: Any
    plain: type[nn.Module]  #: the class of ``torch.nn`` that it replaces

    @classmethod
    def _palette_of(cls, weight: Tensor, options: Mapping[str, Any]) -> Palette:
        check_options(cls.__name__, Palette, options)
        return Palette(weight.shape, device=weight.device, dtype=weight.dtype, **options)

    def _attach(self, palette: Palette) -> None:
        self.palette = palette
        self.register_forward_pre_hook(_runs_as_module)

    @classmethod
    def from_module(cls: type[L], module: nn.Module, *, palette: Palette | None = None, **options: Any) -> L:
        """A palettized layer that shares weight, bias and hooks with ``module``.

        Args:
            module: a layer of the class of ``torch.nn`` that this one replaces.
            palette: the palette of another layer with the same weight, to be shared; None: one of its own.
            options: of :class:`Palette`.

        Raises:
            TypeError: ``module`` is of another class (a class derived from it may compute something else).
            ValueError: what the layer does not support; an option out of range.
        """
        if type(module) is not cls.plain:
            raise TypeError(f"{cls.__name__}: module must be a {cls.plain.__name__}, got {type(module).__name__}")
        layer = cls.__new__(cls)
        layer.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()})
        layer._check()
        weight = layer.weight
        if palette is None:
            palette = cls._palette_of(weight, options)
        elif palette.shape != tuple(weight.shape):
            raise ValueError(f"{cls.__name__}: palette must be of {shape_of(weight)}, got {list(palette.shape)}")
        layer._attach(palette)
        return layer.train(module.training)

    def lend_hooks(self, other: nn.Module) -> None:
        """Register this layer's forward hooks with ``other`` too, but for its own."""
        for key, before in self._forward_pre_hooks.items():
            if before is not _runs_as_module:
                other.register_forward_pre_hook(before, with_kwargs=key in self._forward_pre_hooks_with_kwargs)
        for key, after in self._forward_hooks.items():
            how = {
                "with_kwargs": key in self._forward_hooks_with_kwargs,
                "always_call": key in self._forward_hooks_always_called,
            }
            other.register_forward_hook(after, **how)

    def _check(self) -> None:
        """Raise for what the layer of ``torch.nn`` can do and this one cannot."""

    @property
    def centroids(self) -> Tensor:
        return self.palette.centroids

    def initialize(self) -> None:
        """Start from the k-means of the weight as it is now; otherwise the first forward does it."""
        self.palette.initialize(self.weight)

    def pack(self, lut_dtype: torch.dtype | None = None) -> nn.Module:
        """The packed form, with copies: labels of the nearest centroids, and the palette.

        ``lut_dtype``: of the palette, as in :meth:`PackedPalette.from_labels`; int8 rounds it to bytes.
        """
        raise NotImplementedError  # each kind of layer has its own

    def packed_palette(self, lut_dtype: torch.dtype | None = None) -> PackedPalette:
        """The weight alone, packed."""
        palette, weight = self.palette, whole(self.weight)
        if not palette.initialized or not palette.enabled:  # the weights may have moved since the palette was made
            palette = copy.deepcopy(palette)
            palette.initialize(weight)
        with torch.no_grad():
            labels, _ = palette.assign(palette.divide(weight))
        return PackedPalette.from_labels(
            labels,
            palette.centroids,
            palette.shape,
            group_rows=palette.group_rows,
            scale=palette.scale,
            dtype=weight.dtype,
            lut_dtype=lut_dtype,
        )

    def _packed_bias(self) -> nn.Parameter | None:
        return None if self.bias is None else nn.Parameter(whole(self.bias).clone(), requires_grad=False)


class PalettizedLinear(Palettized, nn.Linear):
    """A linear layer with a palettized weight.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        palette: options of :class:`Palette`: ``bits``, ``group_rows``, ``cluster_dim``, ``tau`` or ``rho``, ``iterations``,
            ``eps``, ``forward``, ``grad``, ``enforce_zero``, ``prune_threshold``, ``keep_sparsity``, ``per_channel_scale``,
            ``update``.

    Shape: input ``[..., in_features]``, output ``[..., out_features]``.

    Raises:
        TypeError, ValueError: as :class:`Palette`; in the forward, NaN or infinity in the weight.

    Example:
        >>> layer = PalettizedLinear(16, 8, bits=2, rho=0.05)
        >>> layer(torch.rand(2, 16)).sum().backward()
        >>> layer.weight.grad.shape, layer.eval().pack().nbytes
        (torch.Size([8, 16]), 80)

    Source: DKM, section 3.
    """

    plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **palette: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._attach(self._palette_of(self.weight, palette))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.palette(self.weight), self.bias)

    def pack(self, lut_dtype: torch.dtype | None = None, activations: str = "exact") -> PackedPalettizedLinear:
        """As :meth:`Palettized.pack`; ``activations``: of :class:`PackedPalettizedLinear`, "int8" with an int8 palette."""
        return PackedPalettizedLinear._around(self.packed_palette(lut_dtype), self._packed_bias(), activations)


class PalettizedConv2d(Palettized, nn.Conv2d):
    """A convolution with a palettized weight.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in
            ``nn.Conv2d``.
        palette: options of :class:`Palette`, as in :class:`PalettizedLinear`; a row is what belongs to an output channel.

    Shape: input ``[N, in_channels, H, W]``, output ``[N, out_channels, Ho, Wo]``.

    Raises:
        TypeError, ValueError: as :class:`PalettizedLinear`.

    Example:
        >>> layer = PalettizedConv2d(3, 8, 3, padding=1, bits=2, group_rows=4)
        >>> layer(torch.rand(2, 3, 8, 8)).shape, layer.centroids.shape
        (torch.Size([2, 8, 8, 8]), torch.Size([2, 4, 1]))

    Source: DKM, section 3.
    """

    plain = nn.Conv2d

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
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._attach(self._palette_of(self.weight, palette))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, self.palette(self.weight), self.bias)
        return output

    def pack(self, lut_dtype: torch.dtype | None = None) -> PackedPalettizedConv2d:
        return PackedPalettizedConv2d._around(self.packed_palette(lut_dtype), self._packed_bias(), self)


class PalettizedEmbedding(Palettized, nn.Embedding):
    """An embedding with a palettized table.

    Args:
        num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, device, dtype: as in ``nn.Embedding``. The row at
            ``padding_idx`` is not palettized, and no gradient reaches it.
        palette: options of :class:`Palette`, as in :class:`PalettizedLinear`.

    Shape: input, integers of any shape; output ``[*, embedding_dim]``.

    Raises:
        TypeError, ValueError: as :class:`PalettizedLinear`; :meth:`from_module` also for ``max_norm`` and ``sparse``.

    Example:
        >>> layer = PalettizedEmbedding(10, 8, bits=3)
        >>> layer(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 8])

    Source: eDKM, section 3 (8-bit embeddings).
    """

    plain = nn.Embedding
    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scale_grad_by_freq: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **palette: Any,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            device=device,
            dtype=dtype,
        )
        self._attach(self._palette_of(self.weight, palette))

    def _check(self) -> None:
        if self.max_norm is not None:
            raise ValueError(
                f"PalettizedEmbedding: max_norm must be None (it changes rows in place), got {self.max_norm}"
            )
        if self.sparse:
            raise ValueError("PalettizedEmbedding: sparse must be False (every weight moves the centroids), got True")

    def forward(self, input: Tensor) -> Tensor:
        if self.padding_idx is None:
            return F.embedding(input, self.palette(self.weight), scale_grad_by_freq=self.scale_grad_by_freq)
        padding = torch.arange(self.num_embeddings, device=self.weight.device)[:, None] == self.padding_idx
        fixed = self.weight.detach()
        table = torch.where(padding, fixed, self.palette(torch.where(padding, fixed, self.weight)))
        return F.embedding(input, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def pack(self, lut_dtype: torch.dtype | None = None) -> PackedPalettizedEmbedding:
        row = None if self.padding_idx is None else whole(self.weight)[self.padding_idx].clone()
        return PackedPalettizedEmbedding._around(self.packed_palette(lut_dtype), self.padding_idx, row)


#: The trainable form of each layer of ``torch.nn``.
PALETTIZED: dict[type[nn.Module], type[Palettized]] = {
    nn.Linear: PalettizedLinear,
    nn.Conv2d: PalettizedConv2d,
    nn.Embedding: PalettizedEmbedding,
}


@contextmanager
def soft_evaluation(model: nn.Module) -> Iterator[None]:
    """Within the context palettized layers compute in evaluation mode what they compute in training."""
    palettes = [module for module in model.modules() if isinstance(module, Palette)]
    for palette in palettes:
        palette.soft_evaluation = True
    try:
        yield
    finally:
        for palette in palettes:
            palette.soft_evaluation = False
