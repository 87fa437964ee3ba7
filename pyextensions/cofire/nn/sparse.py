# SPDX-License-Identifier: Apache-2.0
"""Layers with pruned weights, and the one call that puts them into a model.

Three ways to hold a pruned weight:

=============== ====================================================================================================
``invariant``   dense, and zero wherever the mask is not set. Products are plain dense ones; pruned weights get no gradient,
                so that any optimiser leaves them zero
``masked``      dense, pruned weights live on behind the mask, which every forward applies; they get no gradient, or a
                straight-through one
``compressed``  the kept weights alone (:mod:`cofire.nn.compressed`)
=============== ====================================================================================================

Source: masks: Zhu and Gupta 2017 (1710.01878), section 3; straight-through: Zhou et al. 2021 (SR-STE, 2102.04010), equation 8.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.info import kernel_for
from cofire.nn.clustering import _runs_as_module
from cofire.nn.compressed import (
    PARTS,
    ROWS,
    VERSION,
    CompressedConv2d,
    CompressedLinear,
    bucket,
    bucket_name,
    check_blocks,
    check_mask,
    pack,
    trainable_format,
    trains_faster,
    unpack,
)
from cofire.nn.lowbit import Filter, is_transposed, linear_layers
from cofire.nn.mask_checks import Watched, check_masks_agree
from cofire.nn.palettes import PaddingMode
from cofire.ops import SparseWeight, apply_mask, keep_mask, keep_masks, masked_linear
from cofire.ops.checks import check_choice, check_module, check_number, check_pair, refuse, shape_of
from cofire.ops.selection import check_scores, scores_of
from cofire.ops.sparse_refine import check_pad
from cofire.ops.sparse_weight import FORMATS
from cofire.optim import pruned_not_zero
from cofire.registry import OPERATORS

__all__ = ["Sparse", "SparseConv2d", "SparseLinear", "check_masks_agree", "masks", "sparsify_"]

MODES = ("invariant", "masked")
ALL_MODES = (*MODES, "compressed", "auto")
GRADIENTS = ("hard", "ste", "srste")
SCOPES = ("row", "tensor")

L = TypeVar("L", bound="Sparse")
Pattern = str | Sequence[int] | None


# ------------------------------------------------------------------------------------------- which weights to keep


def check_density(where: str, density: Any) -> None:
    check_number(where, density=density)
    if not 0 < density <= 1:
        refuse(where, f"density must be in (0, 1], got {density}")


def _check_weight(where: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"{where}: weight must be a floating-point tensor, got {weight.dtype}")


def parse_pattern(where: str, pattern: Pattern) -> tuple[str, int, int]:
    """What a pattern says: ("free", 0, 0), ("n:m", N, M) or ("block", rows, columns)."""
    if pattern is None:
        return "free", 0, 0
    if isinstance(pattern, str):
        found = re.fullmatch(r"(\d+)([:x])(\d+)", pattern)
        if found is None:
            refuse(where, f"pattern must be like '2:4' (kept of each M), '16x1' (blocks) or None, got {pattern!r}")
        first, second = int(found[1]), int(found[3])
        if found[2] == ":":
            if not 1 <= first <= second:
                refuse(where, f"pattern N:M must have 1 <= N <= M, got {pattern!r}")
            return "n:m", first, second
    else:
        sizes = check_pair(where, "pattern", pattern)
        if len(sizes) != 2:
            refuse(where, f"pattern must be two integers (rows and columns of a block), got {pattern!r}")
        first, second = sizes
    if min(first, second) < 1:
        refuse(where, f"pattern must be a block of at least 1x1, got {pattern!r}")
    return "block", first, second


def check_groups(where: str, pattern: Pattern, group: int, columns: int, pad: bool, of: str = "") -> None:
    """Rows must consist of whole groups of a pattern N:M, unless the last may be shorter. ``of``: whose rows they are."""
    if columns % group and not pad:
        refuse(
            where,
            f"pattern {pattern!r} needs rows of a multiple of {group} weights, got {columns}{of}; pad=True lets the last group "
            "be shorter",
        )


def choose_bits(
    where: str,
    weight: Tensor,
    density: float | None,
    score: str | Tensor,
    scope: str,
    pattern: Pattern,
    other: Tensor | None,
    pad: bool = False,
) -> Tensor:
    """The packed mask of the best weights; exact counts, at least one of each scope."""
    _check_weight(where, weight)
    check_choice(where, "scope", scope, SCOPES)
    kind, first, second = parse_pattern(where, pattern)
    check_pad(where, pad, pattern if kind == "n:m" else None)
    if isinstance(score, Tensor):
        if score.shape != weight.shape:
            refuse(where, f"score must have the shape of the weight {shape_of(weight)}, got {shape_of(score)}")
        rule = "value"
        w, other = check_scores(where, score, other, rule, name="score")
    else:
        rule = score
        w, other = check_scores(where, weight, other, rule)
    rows, columns = w.shape
    if kind == "n:m":
        check_groups(where, pattern, second, columns, pad)
        if density is not None and density != first / second:
            refuse(where, f"density must be None, or {first / second} as the pattern says, got {density}")
        return keep_mask(w, first, scope="block", block=(1, second), pad=pad, score=rule, other=other)
    if density is None:
        refuse(where, "density must be given where neither a mask nor a pattern N:M is, got None")
    check_density(where, density)

    def count(size: int) -> int:
        return min(size, max(1, round(density * size)))

    if kind == "free":
        return keep_mask(w, count(columns if scope == "row" else w.numel()), scope=scope, score=rule, other=other)
    if rows % first or columns % second:
        refuse(where, f"pattern {first}x{second} must divide the weight {[rows, columns]}; pad it")
    scores = scores_of(w, other, rule, 1.0).view(rows // first, first, columns // second, second).sum((1, 3))
    keep = count(scores.shape[1] if scope == "row" else scores.numel())
    bits = keep_mask(scores, keep, scope=scope, score="value")
    whole = unpack(bits, scores).repeat_interleave(first, 0).repeat_interleave(second, 1)
    return pack(whole)


# ------------------------------------------------------------------------------------------------ the masked weight


class _Masked(torch.autograd.Function):
    """The weight that a forward uses, with the gradient that the mode gives: what a convolution needs beside the library's."""

    @staticmethod
    def forward(weight: Tensor, bits: Tensor, mode: str, decay: float) -> Tensor:
        return weight.view_as(weight) if mode == "invariant" else apply_mask(weight, bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, bits, ctx.mode, ctx.decay = inputs
        ctx.save_for_backward(bits, *([weight] if ctx.mode == "srste" else []))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        bits, *rest = ctx.saved_tensors
        if ctx.mode in ("invariant", "hard"):
            return apply_mask(grad, bits), None, None, None
        if rest:
            (weight,) = rest
            grad = torch.where(unpack(bits, weight), grad, grad + ctx.decay * weight)
        return grad, None, None, None


# ------------------------------------------------------------------------------------------------------- layers


class Sparse(Watched):
    """What the layers with a mask share.

    Attributes:
        weight: parameter, dense.
        mask_bits: uint8 buffer ``[N, ceil(K / 8)]``, where K counts the weights of a row: the packed mask. It changes in
            place, so that optimisers, compiled graphs and CUDA graphs go on; :meth:`update_mask` changes it.
        mask_format: int64 buffer, the version of that form.
        mode: "invariant" or "masked".
        gradient, decay: of the mode "masked".
        checks: whether the layer looks, as :mod:`cofire.nn.mask_checks` says, for pruned weights that an optimiser moved (in the
            first steps after a change of the mask: an error), and for masks that averages of buffers spoiled (a warning, once).
            ``Sparse.checks = False``: no layer does.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mask_bits: Tensor
    mask_format: Tensor
    plain: type[nn.Module]
    transposed = False  #: whether the state holds the weight as ``[in, out]``, as that of GPT-2's Conv1D does

    def _begin(self, mode: str, gradient: str, decay: float) -> None:
        name = type(self).__name__
        check_choice(name, "mode", mode, ALL_MODES)
        if mode == "compressed":
            refuse(
                name, f"mode must be one of a dense weight, got 'compressed': Compressed{self.plain.__name__} is one"
            )
        check_choice(name, "gradient", gradient, GRADIENTS)
        check_number(name, decay=decay)
        self.mode = "invariant" if mode == "auto" else mode
        self.gradient, self.decay = gradient, float(decay)
        if self.mode == "masked":
            # the weight is not what the layer computes with
            self.register_forward_pre_hook(_runs_as_module)
        w = self.weight
        full = torch.ones(w.shape[0], math.prod(w.shape[1:]), dtype=torch.bool, device=w.device)
        self.register_buffer("mask_bits", pack(full))
        self.register_buffer("mask_format", torch.tensor(VERSION, device=w.device))
        self._mask_changed()

    @classmethod
    def _dense_over(cls: type[L], module: nn.Module, where: str) -> tuple[L, Tensor | None]:
        """A layer of this class around the parameters of ``module``, not yet begun; and the mask that torch's pruning gave it."""
        if cls.plain is nn.Linear and is_transposed(module):
            old = cast(Any, module)
            rows = old.weight.shape[1]
            layer = cast(Any, cls.__new__(cls))
            nn.Linear.__init__(layer, old.weight.shape[0], rows, old.bias is not None, "meta")
            layer.weight = nn.Parameter(old.weight.detach().t().contiguous(), old.weight.requires_grad)
            layer.bias, layer.transposed = old.bias, True
            return layer.train(module.training), None
        if type(module) is not cls.plain:
            raise TypeError(f"{where}: module must be a {cls.plain.__name__}, got {type(module).__name__}")
        layer = cls.__new__(cls)
        layer.__dict__.update(
            {k: copy.copy(v) if isinstance(v, (dict, set)) else v for k, v in module.__dict__.items()}
        )
        found = None
        if "weight_orig" in layer._parameters:  # torch.nn.utils.prune
            from torch.nn.utils.prune import BasePruningMethod

            if "bias_orig" in layer._parameters:
                refuse(where, "the bias must not be pruned, got one that torch.nn.utils.prune prunes; remove it first")
            for key, hook in list(layer._forward_pre_hooks.items()):
                if isinstance(hook, BasePruningMethod):
                    del layer._forward_pre_hooks[key]
            layer.__dict__.pop("weight", None)
            layer._parameters["weight"] = layer._parameters.pop("weight_orig")
            mask = layer._buffers.pop("weight_mask")
            assert mask is not None
            found = mask != 0
        return layer, found

    # ------------------------------------------------------------------------------------------------- its mask

    @property
    def mask(self) -> Tensor:
        """bool, of the weight's shape; anew with each call."""
        return unpack(self.mask_bits, self.weight)

    def density(self) -> float:
        """The share of the weights that is kept."""
        return float(self.mask.double().mean()) if self.weight.numel() else 1.0

    @torch.no_grad()
    def update_mask(self, mask: Tensor) -> None:
        """Another mask, in place. In the mode "invariant" what it prunes becomes zero, and so do gradients already there.

        The moments of an optimiser are its own: those of :mod:`cofire.optim` are masked, another's momentum moves pruned weights
        until it has died out: the next forward in training raises then.

        Args:
            mask: bool, of the weight's shape; or packed, like ``mask_bits``. That buffer itself: what it prunes becomes zero again.

        Raises:
            TypeError: neither of them.
            ValueError: another shape or device.
        """
        name = f"{type(self).__name__}.update_mask"
        bits = self._bits_of(name, mask)
        if bits is not self.mask_bits:
            self.mask_bits.copy_(bits)
        self._zero_pruned()
        if bits is not self.mask_bits:
            self._mask_changed()

    _mask_names = ("mask_bits",)

    def _weight_shape(self) -> Sequence[int]:
        return self.weight.shape

    def _zeros_promised(self) -> bool:
        return self.mode == "invariant"

    def _bits_of(self, name: str, mask: Any) -> Tensor:
        if isinstance(mask, Tensor) and mask.dtype == torch.uint8 and mask.shape == self.mask_bits.shape:
            if mask.device != self.mask_bits.device:
                refuse(name, f"mask must be on the device of the weight ({self.mask_bits.device}), got {mask.device}")
            return mask
        check_mask(name, mask, self.weight.shape, self.weight.device)
        return pack(mask)

    @torch.no_grad()
    def _zero_pruned(self) -> None:
        if self.mode == "invariant" and not (self.weight.is_meta or self.mask_bits.is_meta):
            self.weight.copy_(apply_mask(self.weight, self.mask_bits))
            if self.weight.grad is not None:
                self.weight.grad.copy_(apply_mask(self.weight.grad, self.mask_bits))

    @torch.no_grad()
    def masked_weight(self) -> Tensor:
        """The weight that the layer computes with: zeros where the mask is not set. A copy, without gradient.

        Raises:
            ValueError: in the mode "invariant", a pruned weight that is not zero.
        """
        w = apply_mask(self.weight, self.mask_bits)
        if self.mode == "invariant":
            moved, _ = pruned_not_zero(self.weight, self.mask_bits)
            if moved:
                refuse(
                    type(self).__name__,
                    f"pruned weights must be zero in the mode 'invariant', got {moved} that are not: momentum from before "
                    "update_mask, an average over several masks, or averaged buffers. update_mask(mask) zeroes them",
                )
        return w

    def pack(
        self,
        format: str = "auto",
        *,
        values: torch.dtype | None = None,
        block: int | Sequence[int] = (16, 1),
        trainable: bool = False,
        cache_dense: bool = False,
    ) -> Any:
        """The compressed layer, with copies.

        Args:
            format: of :class:`cofire.ops.SparseWeight`. "auto": blocks if the mask consists of them, else by density.
            values: dtype of the stored weights; ``torch.int8``: with a scale per row.
            block: of the format "block", whose masks consist of whole blocks.
            trainable: "auto" takes a format that can be trained.
            cache_dense: see :class:`Compressed`.

        Returns:
            :class:`CompressedLinear` or :class:`CompressedConv2d`.

        Raises:
            ValueError: a pruned weight that is not zero, in the mode "invariant"; the format "block" for a mask that does not
                consist of whole blocks.
        """
        check_choice(f"{type(self).__name__}.pack", "format", format, ("auto", *FORMATS))
        sizes = check_pair(f"{type(self).__name__}.pack", "block", block)
        weight, mask = self.masked_weight().flatten(1), self.mask.flatten(1)
        if format == "auto" and trainable:
            format = trainable_format(mask, (sizes[0], sizes[1]))
        packed = SparseWeight.from_dense(weight, mask, format, block=(sizes[0], sizes[1]), values=values)
        check_blocks(f"{type(self).__name__}.pack", mask, packed)
        trained = self.weight.requires_grad and packed.trainable
        bias = None
        if self.bias is not None:
            bias = nn.Parameter(self.bias.detach().clone(), trained and self.bias.requires_grad)
        dtype = values if values is not None and values.is_floating_point else self.weight.dtype
        layer = self._around(packed, bias, dtype, trained, cache_dense)
        layer._seen.place = self._seen.place
        return layer.train(self.training)

    def _around(self, weight: SparseWeight, bias: Any, dtype: torch.dtype, trained: bool, cache_dense: bool) -> Any:
        raise NotImplementedError  # each kind of layer has its own

    @property
    def _rule(self) -> str:
        return "invariant" if self.mode == "invariant" else self.gradient

    def explain(self, rows: Any = None, dtype: torch.dtype | None = None) -> list[dict[str, Any]]:
        """What runs for so many rows of the input (default: every bucket), and why; see :meth:`Compressed.explain`."""
        dtype = self.weight.dtype if dtype is None else dtype
        numbers: Any = range(len(ROWS) + 1)
        if rows is not None:
            numbers = sorted({bucket(n) for n in ([rows] if isinstance(rows, int) else rows)})
        why = (
            "invariant: pruned weights are zeros of a dense matrix, and get no gradient"
            if self.mode == "invariant"
            else f"masked ({self.gradient}): pruned weights live on behind the mask"
        )
        size = self.weight.numel() * torch.empty(0, dtype=dtype).element_size() + self.mask_bits.numel()
        entry = {"path": "dense", "kernel": self._served_by(dtype), "why": why, "bytes": size}
        return [{"rows": bucket_name(n), **entry} for n in numbers]

    def _served_by(self, dtype: torch.dtype) -> str:
        raise NotImplementedError  # each kind of layer has its own

    # -------------------------------------------------------------------------------------------------- its state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        if self.transposed:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t().contiguous()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        state, own_missing = dict(state_dict), list[str]()
        trouble = self._translate(state, prefix) or self._check_state(state, prefix)
        if trouble:
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {trouble}")
            return
        super()._load_from_state_dict(state, prefix, local_metadata, strict, own_missing, unexpected_keys, error_msgs)
        # A dense model's state has no mask: the layer's own stays.
        missing_keys += [k for k in own_missing if k not in (f"{prefix}mask_bits", f"{prefix}mask_format")]
        if self.mode == "invariant" and not (self.weight.is_meta or self.mask_bits.is_meta):
            if local_metadata.get("assign_to_params_buffers"):  # the weight is the state's own: leave it as it is
                with torch.no_grad():
                    masked = apply_mask(self.weight, self.mask_bits)
                if not torch.equal(masked, self.weight):
                    self.weight = nn.Parameter(masked, self.weight.requires_grad)
            else:
                self._zero_pruned()
        self._mask_changed()

    def _translate(self, state: dict[str, Any], prefix: str) -> str | None:
        """Other states to one of a dense weight and a packed mask: torch's pruning, and a compressed layer."""
        names = {n: prefix + n for n in ("weight", "weight_orig", "weight_mask", "geometry", *PARTS)}
        if names["weight_orig"] in state and names["weight_mask"] in state:
            state[names["weight"]] = state.pop(names["weight_orig"])
            state[f"{prefix}mask_bits"] = pack(state.pop(names["weight_mask"]) != 0)
            return None
        if names["values"] in state and names["geometry"] in state:
            version, number, rows, columns, *shape = state.pop(names["geometry"]).tolist()
            if version != VERSION or not 0 <= number < len(FORMATS):
                return f"the format of the state must have the version {VERSION}, got {version}"
            tensors = {n: state.pop(names[n]) for n in PARTS if names[n] in state}
            packed = SparseWeight.from_tensors(
                tensors, shape=(shape[0], math.prod(shape[1:])), format=FORMATS[number], block=(rows, columns)
            )
            state[names["weight"]] = packed.to_dense().view(shape)
            state[f"{prefix}mask_bits"] = pack(packed.mask())
        elif self.transposed and names["weight"] in state:
            state[names["weight"]] = state[names["weight"]].t()
        return None

    def _check_state(self, state: Mapping[str, Any], prefix: str) -> str | None:
        version, bits = state.get(f"{prefix}mask_format"), state.get(f"{prefix}mask_bits")
        if isinstance(version, Tensor) and not version.is_meta and not bool((version == VERSION).all()):
            return f"the format of the mask must have the version {VERSION}, got {version.tolist()}"
        if isinstance(bits, Tensor) and (bits.dtype != torch.uint8 or bits.shape != self.mask_bits.shape):
            return f"mask_bits must be uint8 {shape_of(self.mask_bits)}, got {bits.dtype} {shape_of(bits)}"
        return None

    def _mode_repr(self) -> str:
        gradient = "" if self.mode == "invariant" else f", gradient={self.gradient}"
        kept = "" if self.mask_bits.is_meta else f", density={self.density():.4g}"
        return f"mode={self.mode}{gradient}{kept}"


def _from_dense(
    cls: type[L],
    module: nn.Module,
    mask: Tensor | None,
    mode: str,
    gradient: str,
    decay: float,
    density: float | None,
    score: str | Tensor,
    scope: str,
    pattern: Pattern,
    other: Tensor | None,
    pad: bool,
    options: dict[str, Any],
) -> Any:
    where = f"{cls.__name__}.from_dense"
    check_choice(where, "mode", mode, ALL_MODES)
    if options and mode not in ("compressed", "auto"):
        raise TypeError(f"{where}: the option {next(iter(options))!r} is for the modes compressed and auto")
    layer, pruned = cls._dense_over(module, where)
    _check_weight(where, layer.weight)
    if mask is None and density is None and pattern is None and pruned is not None:
        mask = pruned
    if mask is not None and density is not None:
        refuse(where, f"mask and density must not both be given, got density={density}")
    if mask is not None:
        check_mask(where, mask, layer.weight.shape, layer.weight.device)
        bits = pack(mask)
    else:
        bits = choose_bits(where, layer.weight, density, score, scope, pattern, other, pad)
    return _finish(layer, bits, mode, gradient, decay, options)


def _finish(layer: Any, bits: Tensor, mode: str, gradient: str, decay: float, options: Mapping[str, Any]) -> Any:
    """The layer in its mode, with this mask."""
    if mode == "auto":
        sizes = check_pair("from_dense", "block", options.get("block", (16, 1)))
        mask = unpack(bits, layer.weight).flatten(1)
        format = trains_faster(mask, layer.weight.dtype, (sizes[0], sizes[1])) if layer.plain is nn.Linear else None
        if format is not None and not layer.transposed:
            options = {"format": format, **options}
            mode = "compressed"
        else:
            mode, options = "invariant", {}
    compress = mode == "compressed"
    # (what is about to be compressed leaves the module's own weight as it is)
    layer._begin("masked" if compress else mode, gradient, decay)
    layer.update_mask(bits)
    if not compress:
        return layer
    packed = layer.pack(**{"trainable": True, **options})
    return packed


class SparseLinear(Sparse, nn.Linear):  # type: ignore[misc]
    """A linear layer with pruned weights.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        mode: "invariant" (pruned weights are zero, and stay so) or "masked" (they live on behind the mask); "auto": the first.
        gradient, decay: of the mode "masked", as in :func:`cofire.ops.masked_linear`: "hard" (none for pruned weights), "ste" or
            "srste".

    A new layer keeps all its weights; :meth:`from_dense` prunes, :meth:`update_mask` changes the mask.

    The state is a plain layer's, and besides ``mask_bits`` and ``mask_format``: ``nn.Linear`` loads it with
    ``strict=False``, and this layer loads a plain state, to which it applies its own mask. It also loads the states of
    ``torch.nn.utils.prune`` and of compressed layers.

    Shape: as ``nn.Linear``.

    Example:
        >>> layer = SparseLinear.from_dense(nn.Linear(64, 8), density=0.25)
        >>> layer.density(), layer(torch.rand(3, 64)).shape
        (0.25, torch.Size([3, 8]))
        >>> type(layer.to_dense()).__name__, type(layer.pack()).__name__
        ('Linear', 'CompressedLinear')

    Source: as the module.
    """

    plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "invariant",
        gradient: str = "hard",
        decay: float = 2e-4,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._begin(mode, gradient, decay)

    @classmethod
    def from_dense(
        cls,
        module: nn.Module,
        mask: Tensor | None = None,
        *,
        mode: str = "invariant",
        density: float | None = None,
        score: str | Tensor = "magnitude",
        scope: str = "row",
        pattern: Pattern = None,
        other: Tensor | None = None,
        pad: bool = False,
        gradient: str = "hard",
        decay: float = 2e-4,
        **options: Any,
    ) -> Any:
        """A pruned layer over the parameters of a dense one, which it shares: optimisers made before go on.

        In the mode "invariant" the pruned weights become zero in place.

        Args:
            module: ``nn.Linear``, or GPT-2's ``Conv1D`` (whose weight is copied, transposed).
            mask: bool, of the weight's shape ``[out, in]``, True = kept. None: by the following; of a layer that
                ``torch.nn.utils.prune`` prunes, its mask.
            mode: "invariant", "masked", "compressed" (a :class:`CompressedLinear` with copies), or "auto": compressed
                where the shipped table says that training is faster at this density on this machine, else invariant.
            density: share to keep, in (0, 1].
            score: by which weights are kept, as in :func:`cofire.ops.keep_mask`, or a tensor of scores.
            scope: "row" (the same number of each row) or "tensor".
            pattern: None; "2:4" and the like, which keeps N of each M weights in a row; "16x1" and the like, or two integers:
                whole blocks of rows x columns, by the sum of their scores.
            other: of the score, as in :func:`cofire.ops.keep_mask`.
            pad: of a pattern N:M: rows may have any number of weights. What is behind the last whole group, r weights, is a
                group of which ``min(N, r)`` are kept.
            gradient, decay: of the mode "masked".
            options: of :meth:`pack`, for the modes "compressed" and "auto".

        Raises:
            TypeError: a mask that is not bool, a weight of integers, another kind of module.
            ValueError: shapes, devices, counts or patterns that do not fit; scores that are not finite.
        """
        return _from_dense(
            cls, module, mask, mode, gradient, decay, density, score, scope, pattern, other, pad, options
        )

    def forward(self, input: Tensor) -> Tensor:
        self._guard()
        if self.mode == "invariant" and not (torch.is_grad_enabled() and self.weight.requires_grad):
            return F.linear(input, self.weight, self.bias)
        return masked_linear(input, self.weight, self.mask_bits, self.bias, mode=self._rule, decay=self.decay)

    def to_dense(self) -> nn.Linear:
        """A plain ``nn.Linear``, with copies: zeros where the mask is not set."""
        w = self.masked_weight()
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        _give_parameters(layer, self, w)
        return layer

    def _around(self, weight: SparseWeight, bias: Any, dtype: torch.dtype, trained: bool, cache_dense: bool) -> Any:
        return CompressedLinear._around(weight, bias, dtype, trained, cache_dense)

    def _served_by(self, dtype: torch.dtype) -> str:
        x = torch.empty(0, self.in_features, dtype=dtype, device=self.weight.device)
        served = kernel_for(
            OPERATORS["masked_linear"], (x, self.weight.to(dtype), self.mask_bits, None, self._rule, self.decay)
        )
        return f"masked_linear, {served}"

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self._mode_repr()}"


class SparseConv2d(Sparse, nn.Conv2d):  # type: ignore[misc]
    """A convolution with pruned weights.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in
            ``nn.Conv2d``.
        mode, gradient, decay: as in :class:`SparseLinear`.

    The convolution is the library's, over a weight with zeros. A row of the mask is what belongs to an output channel.

    Shape: as ``nn.Conv2d``.

    Example:
        >>> layer = SparseConv2d.from_dense(nn.Conv2d(4, 8, 3, padding=1), density=0.5)
        >>> layer(torch.rand(2, 4, 8, 8)).shape, layer.mask.shape, layer.density()
        (torch.Size([2, 8, 8, 8]), torch.Size([8, 4, 3, 3]), 0.5)

    Source: as the module.
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
        *,
        mode: str = "invariant",
        gradient: str = "hard",
        decay: float = 2e-4,
    ) -> None:
        nn.Conv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._begin(mode, gradient, decay)

    @classmethod
    def from_dense(
        cls,
        module: nn.Module,
        mask: Tensor | None = None,
        *,
        mode: str = "invariant",
        density: float | None = None,
        score: str | Tensor = "magnitude",
        scope: str = "row",
        pattern: Pattern = None,
        other: Tensor | None = None,
        pad: bool = False,
        gradient: str = "hard",
        decay: float = 2e-4,
        **options: Any,
    ) -> Any:
        """As :meth:`SparseLinear.from_dense`, of an ``nn.Conv2d``; "auto" is always "invariant"."""
        return _from_dense(
            cls, module, mask, mode, gradient, decay, density, score, scope, pattern, other, pad, options
        )

    def forward(self, input: Tensor) -> Tensor:
        self._guard()
        weight: Tensor = self.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            weight = cast(Tensor, _Masked.apply(weight, self.mask_bits, self._rule, self.decay))
        elif self.mode != "invariant":
            weight = apply_mask(weight, self.mask_bits)
        output: Tensor = self._conv_forward(input, weight, self.bias)
        return output

    def to_dense(self) -> nn.Conv2d:
        """A plain ``nn.Conv2d``, with copies: zeros where the mask is not set."""
        w = self.masked_weight()
        layer = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            cast(Any, self.kernel_size),
            cast(Any, self.stride),
            cast(Any, self.padding),
            cast(Any, self.dilation),
            self.groups,
            self.bias is not None,
            cast(Any, self.padding_mode),
            "meta",
        )
        _give_parameters(layer, self, w)
        return layer

    def _around(self, weight: SparseWeight, bias: Any, dtype: torch.dtype, trained: bool, cache_dense: bool) -> Any:
        return CompressedConv2d._around(weight, bias, dtype, trained, cache_dense, self)

    def _served_by(self, dtype: torch.dtype) -> str:
        if self.mode == "invariant":
            return "torch convolution; gradients pass through apply_mask"
        return "torch convolution of apply_mask's weight"

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}, {self._mode_repr()}"  # type: ignore[no-untyped-call]


def _give_parameters(layer: nn.Linear | nn.Conv2d, source: Sparse, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight, source.weight.requires_grad)
    if source.bias is not None:
        layer.bias = nn.Parameter(source.bias.detach().clone(), source.bias.requires_grad)
    layer.train(source.training)


# ------------------------------------------------------------------------------------------------ whole models


def masks(model: nn.Module) -> Iterator[tuple[str, Sparse]]:
    """The layers of a model that have a mask, with their names, each once.

    Example:
        >>> model = sparsify_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), density=0.5)
        >>> [(name, layer.density()) for name, layer in masks(model)]
        [('0', 0.5)]
    """
    check_module("masks", model)
    for name, module in model.named_modules():
        if isinstance(module, Sparse):
            yield name, module


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))


def sparsify_(
    model: nn.Module,
    *,
    density: float | Mapping[str, float] | None = None,
    score: str = "magnitude",
    scope: str = "row",
    pattern: Pattern = None,
    pad: bool = False,
    mode: str = "invariant",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    filter: Filter | None = None,
    others: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    gradient: str = "hard",
    decay: float = 2e-4,
    **options: Any,
) -> nn.Module:
    """Put pruned layers into a model, in place: every ``nn.Linear``, ``nn.Conv2d`` and GPT-2 ``Conv1D`` but the last.

    The last such layer is as a rule the output layer, which stays dense in most of the literature; ``include`` changes
    that. Layers whose weight is tied to another module's stay dense, as do subclasses. Parameters are kept, so that an
    optimiser made before goes on. Nothing is changed if a layer cannot be pruned.

    Args:
        model: changed in place.
        density: share to keep; or a mapping from patterns of names to shares, of which the first that matches counts.
        score, scope, pattern, pad: as in :meth:`SparseLinear.from_dense`; scope also "global": one order over all layers.
        mode, gradient, decay, options: as in :meth:`SparseLinear.from_dense`.
        include, exclude: names to take and to leave out, with ``*`` and ``?`` as in ``fnmatch``. With ``include`` the last
            layer is no exception.
        filter: ``filter(module, name)`` says whether to prune a layer.
        others: by name of the layer, what the score needs besides the weight (of "wanda" the norms of the inputs).
        masks: by name, masks to use: bool, of the weight's shape; other layers stay dense.

    Returns:
        The model; or a new layer, if the model itself is a layer.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no layer is left to prune, or one cannot be: the sentence names it.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> [type(layer).__name__ for layer in sparsify_(model, density=0.1)]
        ['SparseLinear', 'ReLU', 'Linear']

    Source: layer-wise and global magnitude pruning: Blalock et al. 2020 (2003.03033), section 2.
    """
    where = "sparsify_"
    check_module(where, model)
    check_choice(where, "mode", mode, ALL_MODES)
    check_choice(where, "scope", scope, (*SCOPES, "global"))
    chosen = dict(linear_layers(model, filter, (nn.Conv2d,)))
    if include is not None:
        chosen = {n: m for n, m in chosen.items() if _matches(n, include)}
    elif masks is not None:
        chosen = {n: m for n, m in chosen.items() if n in masks}
        for name in masks:
            if name not in chosen:
                refuse(where, f"masks must be of layers that can be pruned, got one for {name!r}")
    elif len(chosen) > 1:
        chosen.popitem()
    chosen = {n: m for n, m in chosen.items() if not _matches(n, exclude)}
    if not chosen:
        refuse(where, "model must have a linear layer or a convolution to prune (tied ones stay dense), got none")
    layers: dict[str, Any] = {}
    bits: dict[str, Tensor] = {}
    for name, module in chosen.items():
        kind: Any = SparseConv2d if isinstance(module, nn.Conv2d) else SparseLinear
        layers[name], _ = kind._dense_over(module, where)
    if scope == "global" and masks is None:
        if pattern is not None or not isinstance(density, (int, float)):
            refuse(where, f"scope 'global' needs one density and no pattern, got {density!r} and {pattern!r}")
        check_density(where, density)
        check_pad(where, pad, pattern)
        weights, extra = [], []
        for name, layer in layers.items():
            with _pruning(where, name):
                other = None if others is None else _other(where, others, name)
                matrix, other = check_scores(where, layer.weight, other, score)
                weights.append(matrix)
                extra += [] if other is None else [other]
        keep = max(1, round(density * sum(w.numel() for w in weights)))
        bits = dict(zip(layers, keep_masks(weights, keep, score=score, others=extra or None), strict=True))
    for name, layer in layers.items():
        with _pruning(where, name):
            if masks is not None:
                check_mask(where, masks.get(name), layer.weight.shape, layer.weight.device)
                bits[name] = pack(masks[name])
            elif name not in bits:
                other = None if others is None else _other(where, others, name)
                share = _share(where, density, name)
                bits[name] = choose_bits(where, layer.weight, share, score, scope, pattern, other, pad)
    made = {}
    for name, module in chosen.items():
        made[module] = _finish(layers[name], bits[name], mode, gradient, decay, options)
        made[module]._seen.place = name
    if model in made:
        return cast(nn.Module, made[model])
    for parent in list(model.modules()):  # wherever it stands: a module may have several places
        for leaf, child in parent._modules.items():
            if child in made:
                parent._modules[leaf] = made[child]
    return model


@contextmanager
def _pruning(where: str, name: str) -> Iterator[None]:
    """Errors in here are those of a layer."""
    try:
        yield
    except ValueError as error:
        refuse(where, f"the layer {name!r} cannot be pruned ({error}); exclude can leave it out")


def _other(where: str, others: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in others:
        refuse(where, f"others must have a tensor for the layer {name!r}, got those of {', '.join(sorted(others))}")
    return others[name]


def _share(where: str, density: float | Mapping[str, float] | None, name: str) -> float | None:
    if not isinstance(density, Mapping):
        return density
    for pattern, share in density.items():
        if fnmatchcase(name, pattern):
            return share
    refuse(where, f"density must have an entry that matches {name!r}, got {', '.join(density)}")
