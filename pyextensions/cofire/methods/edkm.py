# SPDX-License-Identifier: Apache-2.0
"""eDKM: train-time clustering of weights by differentiable k-means, at the memory of the weights alone.

Each weight matrix becomes labels of a few bits and a small palette. Training sees the weights drawn to their centroids, by
an attention that grows sharper as the temperature falls; what is deployed are the nearest centroids.

Source: Cho et al., "eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models", IEEE CAL
2024; Cho, Alizadeh-Vahid, Adya, Rastegari, "DKM: Differentiable K-Means Clustering Layer for Neural Network Compression",
ICLR 2022.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cofire.methods.base import Method, Report, bare, evaluation, first_input, matches, replace_modules
from cofire.names import near_matches
from cofire.nn.clustering import PALETTIZED, Palette, Palettized, check_temperature, soft_evaluation, whole
from cofire.nn.palettes import PackedPalette, PackedPalettized, check_palette
from cofire.ops.checks import check_choice, check_integer, check_module, check_number
from cofire.ops.clustering import BELOW_FLOOR, GRADIENTS, STALLED

#: Equal centroids are looked for once in so many steps, since it waits for the device.
SEPARATE_EVERY = 500


@dataclass(frozen=True)
class LayerPalette(Report):
    """One clustered weight."""

    name: str
    shape: tuple[int, ...]
    bits: int
    palettes: int
    dense_bytes: int
    packed_bytes: int  #: labels, palettes and factors
    bits_per_weight: float
    soft_hard: float  #: root mean square difference between training's weights and the deployed, over their deviation
    below_floor: int  #: palettes whose temperature is too low for the implicit gradient in this dtype
    stalled: int  #: palettes for which Newton's method found no fixed point


@dataclass(frozen=True)
class PaletteReport(Report):
    """What clustering saves, and how far training is from what it saves. Weights that are shared count once."""

    dense_bytes: int  #: of the clustered weights
    packed_bytes: int
    model_dense_bytes: int  #: with everything else in the model
    model_packed_bytes: int
    bits_per_weight: float
    soft_hard: float  #: the largest of the layers
    output_gap: float | None  #: the same of the network's output, if it is one tensor and there were batches
    below_floor: int
    stalled: int
    layers: list[LayerPalette]


@dataclass(frozen=True)
class EDKM(Method, name="edkm"):
    """Differentiable k-means of the weights of linear layers, convolutions and embeddings.

    Args:
        bits: of a label, 1 to 8, for linear layers. A dict gives it per layer: by the layer's name, or by a pattern
            (``"layers.*.mlp.*"``), of which the first that matches counts; layers that it does not name are left alone.
        embedding_bits, conv_bits: for embeddings and convolutions, unless ``bits`` is a dict; None: as ``bits``. A weight
            that an embedding shares with a linear layer is an embedding's.
        weight_threshold: weights of fewer elements are left alone.
        skip: names or patterns of layers that are left alone.
        group_rows: rows of a weight (output features, channels, or words) that share a palette; None: all.
        cluster_dim: consecutive weights that share a label.
        rho, rho_end: temperature in units of the squared mean gap between centroids, at the first and at the last of
            ``total_steps``; a cosine between. Without ``total_steps``, ``rho`` throughout.
        tau: an absolute temperature instead, constant, in squared units of the weights.
        total_steps: calls of :meth:`step` in the training.
        milestone: the step at which clustering begins.
        hard_last: share of ``total_steps``, at their end, in which the layers compute with the nearest centroids, and keep
            the soft gradient. Weights that sit between two centroids come to rest.
        grad: ``"unroll"`` (the paper), ``"implicit"`` or ``"jfb"``: see :func:`cofire.ops.dkm`.
        iterations, eps: of k-means.
        enforce_zero: one centroid is zero and stays it.
        per_channel_scale: a factor per row, frozen when clustering begins.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.

    Example:
        >>> from cofire.models import digits_cnn
        >>> method = EDKM(bits=4, total_steps=100)
        >>> model = method.prepare(digits_cnn())
        >>> loss = model(torch.rand(2, 1, 8, 8)).sum() + method.loss(model)
        >>> loss.backward(); method.step(model)
        >>> packed = method.finalize(model)
        >>> report = method.report(model)
        >>> report.packed_bytes < report.dense_bytes / 7
        True

    Source: eDKM, sections 2 and 3 (3 bits for linear layers, 8 for embeddings); DKM, section 3. The scale-free temperature
    and its schedule are this library's: a constant absolute one means another softness in every layer.
    """

    bits: int | Mapping[str, int] = 3
    embedding_bits: int | None = 8
    conv_bits: int | None = None
    weight_threshold: int = 2048
    skip: Sequence[str] = ()
    group_rows: int | None = None
    cluster_dim: int = 1
    rho: float = 0.3
    rho_end: float = 0.03
    tau: float | None = None
    total_steps: int | None = None
    milestone: int = 0
    hard_last: float = 0.05
    grad: str = "unroll"
    iterations: int = 3
    eps: float = 1e-7
    enforce_zero: bool = False
    per_channel_scale: bool = False

    def __post_init__(self) -> None:
        given = {"bits": self.bits} if not isinstance(self.bits, Mapping) else _named_bits(self.bits)
        others = {"embedding_bits": self.embedding_bits, "conv_bits": self.conv_bits}
        for argument, bits in (given | {name: bits for name, bits in others.items() if bits is not None}).items():
            check_integer("EDKM", **{argument: bits})
            if not 1 <= bits <= 8:
                raise ValueError(f"EDKM: {argument} must be between 1 and 8, got {bits}")
        check_palette("EDKM", 1, self.group_rows, self.cluster_dim)
        for argument in ("rho", "rho_end", *(["tau"] if self.tau is not None else [])):
            check_temperature("EDKM", argument, getattr(self, argument))
        check_choice("EDKM", "grad", self.grad, GRADIENTS)
        check_integer(
            "EDKM", weight_threshold=self.weight_threshold, milestone=self.milestone, iterations=self.iterations
        )
        check_number("EDKM", hard_last=self.hard_last, eps=self.eps)
        if not 1 <= self.iterations <= 1000:
            raise ValueError(f"EDKM: iterations must be between 1 and 1000, got {self.iterations}")
        if not 0 <= self.eps < 1:
            raise ValueError(f"EDKM: eps must be at least 0 and less than 1, got {self.eps}")
        if not 0 <= self.hard_last <= 1:
            raise ValueError(f"EDKM: hard_last must be between 0 and 1, got {self.hard_last}")
        if (
            isinstance(self.skip, str)
            or not isinstance(self.skip, Collection)
            or not all(isinstance(p, str) for p in self.skip)
        ):
            raise TypeError(f"EDKM: skip must be a sequence of names or patterns, got {self.skip!r}")
        if self.weight_threshold < 0:
            raise ValueError(f"EDKM: weight_threshold must not be negative, got {self.weight_threshold}")
        if self.milestone < 0:
            raise ValueError(f"EDKM: milestone must not be negative, got {self.milestone}")
        if self.total_steps is not None:
            check_integer("EDKM", total_steps=self.total_steps)
            if self.total_steps <= self.milestone:
                raise ValueError(
                    f"EDKM: total_steps must be greater than milestone ({self.milestone}), got {self.total_steps}"
                )

    # ---------------------------------------------------------------------------------------------- protocol

    def prepare(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` whose linear layers, convolutions and embeddings are palettized.

        Names of parameters stay; layers that share a weight share its palette. Centroids start from the k-means of the
        weights (unless those are on the meta device: then load a state before training).

        Only layers of exactly these classes of ``torch.nn`` are replaced. A weight that is read past its layer's forward,
        as the projections inside ``nn.MultiheadAttention`` are, is left alone.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: nothing to cluster, a name or pattern that fits no layer, a weight that does not divide into
                groups or vectors, NaN or infinity in a weight, a network prepared already.
        """
        check_module("EDKM.prepare", model)
        if _palettized(model) or _packed(model):
            raise ValueError("EDKM.prepare: the model is prepared already; prepare the network that it was made from")
        result = copy.deepcopy(bare(model))
        palettes: dict[int, Palette] = {}
        replaced: dict[int, Palettized] = {}
        for name, module, bits in self._choose(result):
            kind, weight = PALETTIZED[type(module)], module.weight
            assert isinstance(weight, Tensor)
            try:
                layer = kind.from_module(
                    module, palette=palettes.get(id(weight)), **self._options(bits, id(weight) in palettes)
                )
            except ValueError as error:
                raise ValueError(f"EDKM.prepare: layer {name!r}: {error}") from None
            if id(weight) not in palettes:
                palettes[id(weight)] = layer.palette
                layer.palette.parameter_name = f"{name}.weight" if name else "weight"
                layer.palette.enabled = self.milestone == 0
                if not weight.is_meta:
                    layer.initialize()
            replaced[id(module)] = layer
        return replace_modules(result, replaced)

    def loss(self, model: nn.Module, output: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """Zero: the task's loss alone trains weights and centroids.

        A leaf of its own, so that ``backward()`` runs on it and leaves no gradient anywhere.

        Raises:
            ValueError: no palettized layer.
        """
        weight = next(iter(self._require(model, "loss").values())).weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.zeros((), dtype=dtype, device=weight.device, requires_grad=weight.requires_grad)

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Count one optimiser step: the centroids move on, the temperature falls, phases begin and end."""
        for layer in _unique(self._require(model, "step")).values():
            palette = layer.palette
            palette.advance()
            count = palette.count
            if not palette.enabled and count >= self.milestone:
                palette.initialize(layer.weight)  # anew: the weights have moved since
                palette.enabled = True
            palette.heat.fill_(self.heat(count))
            hard = self._is_hard(count)
            if palette.hard != hard:
                palette.hard = hard
            if palette.enabled and count % SEPARATE_EVERY == 0:
                palette.separate(layer.weight)

    def heat(self, step: int) -> float:
        """The temperature after so many steps: ``tau``, or the scheduled ``rho``."""
        if self.tau is not None:
            return self.tau
        if self.total_steps is None:
            return self.rho
        done = (step - self.milestone) / (self.total_steps - self.milestone)
        cosine = (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
        return self.rho_end + (self.rho - self.rho_end) * cosine

    def _is_hard(self, step: int) -> bool:
        return self.total_steps is not None and step >= self.total_steps * (1 - self.hard_last) and self.hard_last > 0

    def finalize(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` in evaluation mode whose clustered weights are packed.

        Raises:
            ValueError: no palettized layer, or packed already.
        """
        self._require(model, "finalize")
        result = copy.deepcopy(bare(model)).eval()
        packed: dict[int, PackedPalettized] = {}
        palettes: dict[int, PackedPalette] = {}
        for layer in _palettized(result).values():
            form = layer.pack()
            assert isinstance(form, PackedPalettized)
            form.palette = palettes.setdefault(id(layer.palette), form.palette)
            layer.lend_hooks(form)
            packed[id(layer)] = form
        return replace_modules(result, packed)

    # ------------------------------------------------------------------------------------------------ report

    def report(self, model: nn.Module, batches: Iterable[Any] = ()) -> PaletteReport:
        """Bytes of the weights, dense and packed; how far the weights of training are from the deployed ones.

        Args:
            model: a prepared model.
            batches: optional batches of inputs, or of tuples that begin with them: to compare the network's outputs too.
        """
        layers = [self._examine(layer) for layer in _unique(self._require(model, "report")).values()]
        model = bare(model)
        everything = {id(p): p for p in model.parameters()}
        model_bytes = sum(p.numel() * p.element_size() for p in everything.values())
        state = {id(p) for p in _palette_buffers(model)}
        model_bytes += sum(b.numel() * b.element_size() for b in model.buffers() if id(b) not in state)
        dense, packed = sum(layer.dense_bytes for layer in layers), sum(layer.packed_bytes for layer in layers)
        shared = _read_elsewhere(model)
        kept = sum(everything[i].numel() * everything[i].element_size() for i in shared)
        return PaletteReport(
            dense_bytes=dense,
            packed_bytes=packed,
            model_dense_bytes=model_bytes,
            model_packed_bytes=model_bytes - dense + packed + kept,
            bits_per_weight=8 * packed / sum(math.prod(layer.shape) for layer in layers),
            soft_hard=max(layer.soft_hard for layer in layers),
            output_gap=_output_gap(model, batches),
            below_floor=sum(layer.below_floor for layer in layers),
            stalled=sum(layer.stalled for layer in layers),
            layers=layers,
        )

    @torch.no_grad()
    def _examine(self, layer: Palettized) -> LayerPalette:
        palette, weight = copy.deepcopy(layer.palette).eval(), whole(layer.weight)
        if not palette.initialized or not palette.enabled:
            palette.initialize(weight)
            palette.enabled = True
        palette.hard = False
        hard = palette(weight).double()
        palette.soft_evaluation = True
        soft = palette(weight).double()
        status = palette.cluster(palette.divide(weight)).status
        form = layer.packed_palette()
        count = weight.numel()
        gap = (soft - hard).square().mean().sqrt() / weight.double().std(correction=0).clamp(min=1e-30)
        return LayerPalette(
            name=(palette.parameter_name or "weight").removesuffix(".weight"),
            shape=tuple(weight.shape),
            bits=palette.bits,
            palettes=palette.palettes,
            dense_bytes=count * weight.element_size(),
            packed_bytes=form.nbytes,
            bits_per_weight=8 * form.nbytes / count,
            soft_hard=float(gap),
            below_floor=int((status == BELOW_FLOOR).sum()),
            stalled=int((status == STALLED).sum()),
        )

    # ----------------------------------------------------------------------------------------------- surgery

    def _require(self, model: nn.Module, where: str) -> dict[str, Palettized]:
        check_module(f"EDKM.{where}", model)
        layers = _palettized(model)
        if not layers:
            state = "is finalized already" if _packed(model) else "has no palettized layer; call prepare(model) first"
            raise ValueError(f"EDKM.{where}: the model {state}")
        return layers

    def _options(self, bits: int, shared: bool) -> dict[str, Any]:
        if shared:
            return {}
        return {
            "bits": bits,
            "group_rows": self.group_rows,
            "cluster_dim": self.cluster_dim,
            "rho": None if self.tau is not None else self.heat(0),
            "tau": self.tau,
            "iterations": self.iterations,
            "eps": self.eps,
            "grad": self.grad,
            "enforce_zero": self.enforce_zero,
            "per_channel_scale": self.per_channel_scale,
            "update": "step",
        }

    def _choose(self, model: nn.Module) -> list[tuple[str, nn.Module, int]]:
        """Name, layer and bits of what to cluster; of layers that share a weight an embedding comes first."""
        # A module may stand in several places: any of its names chooses it.
        places: dict[int, list[str]] = {}
        candidates: dict[int, nn.Module] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if type(module) in PALETTIZED:
                candidates[id(module)] = module
                places.setdefault(id(module), []).append(name)
        known = [name for names in places.values() for name in names]
        named = list(self.bits) if isinstance(self.bits, Mapping) else []
        for argument, patterns in (("bits", named), ("skip", self.skip)):
            for pattern in patterns:
                if not matches(known, pattern):
                    raise ValueError(
                        f"EDKM.prepare: {argument} names {pattern!r}, which fits no linear layer, convolution or "
                        f"embedding{near_matches(pattern, known)}"
                    )
        chosen = []
        for key, names in places.items():
            module = candidates[key]
            bits = self._bits_of(names, module)
            weight = module.weight
            assert isinstance(weight, Tensor)
            skipped = any(matches(names, pattern) for pattern in self.skip)
            if bits is not None and not skipped and weight.numel() >= self.weight_threshold:
                chosen.append((names[0], module, bits))
        if not chosen:
            raise ValueError(
                "EDKM.prepare: there is no layer to cluster: no linear layer, convolution or embedding of at least "
                f"{self.weight_threshold} weights (weight_threshold) that bits and skip leave"
            )
        return sorted(chosen, key=lambda entry: not isinstance(entry[1], nn.Embedding))

    def _bits_of(self, names: Sequence[str], module: nn.Module) -> int | None:
        if isinstance(self.bits, Mapping):
            exact = next((self.bits[name] for name in names if name in self.bits), None)
            if exact is not None:
                return exact
            return next((bits for pattern, bits in self.bits.items() if matches(names, pattern)), None)
        own = {nn.Embedding: self.embedding_bits, nn.Conv2d: self.conv_bits}.get(type(module))
        return self.bits if own is None else own


def _named_bits(bits: Mapping[str, int]) -> dict[str, Any]:
    for name in bits:
        if not isinstance(name, str):
            raise TypeError(f"EDKM: bits must have names or patterns as keys, got {name!r}")
    return {f"bits[{name!r}]": value for name, value in bits.items()}


def _palettized(model: nn.Module) -> dict[str, Palettized]:
    return {name: module for name, module in bare(model).named_modules() if isinstance(module, Palettized)}


def _packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedPalettized) for module in model.modules())


def _unique(layers: Mapping[str, Palettized]) -> dict[int, Palettized]:
    """One layer per palette."""
    found: dict[int, Palettized] = {}
    for layer in layers.values():
        found.setdefault(id(layer.palette), layer)
    return found


def _palette_buffers(model: nn.Module) -> list[Tensor]:
    return [b for module in model.modules() if isinstance(module, Palette) for b in module.buffers()]


def _read_elsewhere(model: nn.Module) -> set[int]:
    """The clustered weights that a layer without palette reads too, so that they stay in the packed model."""
    clustered = {id(layer.weight) for layer in _palettized(model).values()}
    plain = [module for module in model.modules() if not isinstance(module, Palettized)]
    return {id(p) for module in plain for p in module._parameters.values() if id(p) in clustered}


@torch.no_grad()
def _output_gap(model: nn.Module, batches: Iterable[Any]) -> float | None:
    """Root mean square difference between the outputs with soft and with deployed weights, over their deviation."""
    difference, total, squares, count = 0.0, 0.0, 0.0, 0
    with evaluation(model):
        for batch in batches:
            hard = model(first_input(batch))
            with soft_evaluation(model):
                soft = model(first_input(batch))
            if not isinstance(hard, Tensor):
                return None
            hard, soft = hard.double(), soft.double()
            difference += float((soft - hard).square().sum())
            total, squares, count = (
                total + float(hard.sum()),
                squares + float(hard.square().sum()),
                count + hard.numel(),
            )
    if not count:
        return None
    variance = squares / count - (total / count) ** 2
    return math.sqrt(difference / count / max(variance, 1e-30))
