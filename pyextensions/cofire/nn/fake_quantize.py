# SPDX-License-Identifier: Apache-2.0
"""Quantisation-aware training: quantisers as modules, and layers whose weights and inputs pass through one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.nn.lowbit import QuantLinear
from cofire.ops import (
    QTensor,
    fake_quantize_affine,
    fake_quantize_group,
    fake_quantize_lsq,
    fake_quantize_minmax,
    fake_quantize_statsq,
)
from cofire.ops.checks import check_choice, check_integer, is_integer, refuse
from cofire.ops.fake_quantize import SCALE_FLOOR, check_bits
from cofire.ops.lowbit import compute_dtype

__all__ = ["FakeQuantize", "LSQConv2d", "LSQLinear"]

METHODS = ("lsq", "affine", "minmax", "statsq", "group")
PER = ("tensor", "row", "group")


def lsq_range(bits: int, signed: bool) -> tuple[int, int]:
    """The levels of LSQ: ``-2^(bits - 1)`` to ``2^(bits - 1) - 1``, or 0 to ``2^bits - 1``."""
    half = 1 << (bits - 1)
    return (-half, half - 1) if signed else (0, 2 * half - 1)


def lsq_scale(
    x: Tensor, high: int, signed: bool = True, axis: int | None = None, group_size: int | None = None
) -> Tensor:
    """Where LSQ starts: twice the mean magnitude over the root of the last level; four times, if unsigned.

    The mean is over everything, over all dimensions but ``axis``, or over groups of columns. Never below the least scale.
    """
    magnitude = x.detach().abs().to(compute_dtype(x))
    if group_size is not None:
        mean = magnitude.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size).mean(-1)
    else:
        dims = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
        mean = magnitude.mean(dims) if dims else magnitude
    return (mean * ((2 if signed else 4) / math.sqrt(high))).clamp(min=SCALE_FLOOR)


class FakeQuantize(nn.Module):
    """One of the fake quantisers as a module.

    Args:
        method: "lsq" (a learned step), "affine" (a learned range and minimum, AdaQuant), "minmax" (the range of each row or
            group, anew each time), "statsq" (twice the mean magnitude of each row) or "group" (4 bits per group with exact
            outliers, Stable-SPAM).
        bits: of the levels; of "group" the format says them.
        signed: of "lsq": levels on both sides of zero.
        axis, size: of "lsq" and "affine": the dimension along which each slice has parameters, and its size; default: one
            for all.
        group_size: columns of the last dimension that share a scale; divides it. Of "minmax" (default: rows), "group"
            (default 256), and "lsq", for a weight: there each group of each row has its step, and ``size`` is the weight's
            shape.
        options: of "group": ``format``, ``outliers``, ``stochastic``, as in :func:`cofire.ops.fake_quantize_group`.
        device, dtype: of the parameters.

    The parameters are there from the start, so that an optimiser made before the first batch has them, and take their
    values from the first input that comes: ``s = 2 mean|x| / sqrt(high)`` (4 if unsigned), or its minimum and range. To
    compile, call the module, or :meth:`initialize`, once before; where several processes train copies, with the same input
    in each. What ``load_state_dict`` loads stays.

    Stochastic rounding is for training; in evaluation mode the nearest level is taken. Its seed, the attribute ``seed``,
    goes up with each call, and is part of the state, as a tensor.

    Attributes:
        scale: parameter of "lsq", ``[]``, ``[size]``, or ``[..., K / group_size]``.
        range, minimum: parameters of "affine".
        initialized: whether the parameters have their values; a buffer in the state.

    Shape: any, the result as the input.

    Raises:
        TypeError: a number of another type, or an option that the method does not have.
        ValueError: an unknown method, bits out of range, or ``axis``, ``size`` and ``group_size`` that do not fit the method
            or each other; from the forward as the operator of the same name.

    Example:
        >>> quantizer = FakeQuantize("lsq", bits=2)
        >>> quantizer(torch.tensor([-3.0, -0.5, 1.5, 3.0])).tolist(), quantizer.scale.item()
        ([-4.0, -0.0, 0.0, 4.0], 4.0)

    Source: as the operators of the same names; LSQ's start: Esser et al. 2020 (1902.08153), section 2.1.
    """

    initialized: Tensor
    scale: nn.Parameter
    range: nn.Parameter
    minimum: nn.Parameter

    def __init__(
        self,
        method: str = "lsq",
        bits: int = 4,
        *,
        signed: bool = True,
        axis: int | None = None,
        size: int | Sequence[int] | None = None,
        group_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        name = "FakeQuantize"
        check_choice(name, "method", method, METHODS)
        check_bits(name, bits, 16 if method in ("affine", "minmax") else 8)
        learned = method in ("lsq", "affine")
        if method == "affine" and group_size is not None:
            refuse(name, f"group_size must be None for method affine, got {group_size}")
        shape: tuple[int, ...] = ()
        if method == "lsq" and group_size is not None:
            shape = _scales_of_groups(axis, size, group_size)
        elif (axis is None) != (size is None):
            refuse(name, f"axis and size belong together, got axis={axis} and size={size}")
        elif axis is not None:
            check_integer(name, axis=axis, size=size)
            if not learned:
                refuse(name, f"axis must be None for method {method}, got {axis}")
            shape = (size,)  # type: ignore[assignment]
        for option in options:
            if method != "group" or option not in ("format", "outliers", "stochastic"):
                raise TypeError(f"{name}: method {method} has no option {option!r}")
        self.method, self.bits, self.signed, self.axis, self.group_size = method, bits, signed, axis, group_size
        self.low, self.high = lsq_range(bits, signed)
        if method == "lsq" and self.high < 1:
            refuse(name, "bits must be at least 2 for signed levels of method lsq, got 1")
        self.options, self.seed = options, 0
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        if method == "lsq":
            self.scale = nn.Parameter(torch.ones(shape, **like))
        elif method == "affine":
            self.range = nn.Parameter(torch.ones(shape, **like))
            self.minimum = nn.Parameter(torch.zeros(shape, **like))
        if learned:
            self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        self._ready = not learned  # the buffer's value without looking at the device

    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        """Set the parameters from an input."""
        if self.method == "lsq":
            self.scale.copy_(lsq_scale(input, self.high, self.signed, self.axis, self.group_size))
        elif self.method == "affine":
            dims = [d for d in range(input.dim()) if self.axis is None or d != self.axis % input.dim()]
            low, high = (input.amin(dims), input.amax(dims)) if dims else (input, input)
            low = low.clamp(max=0)
            self.minimum.copy_(low)
            self.range.copy_((high.clamp(min=0) - low).clamp(min=1e-6))
        else:
            return
        self.initialized.fill_(True)
        self._ready = True

    def forward(self, input: Tensor) -> Tensor:
        if not self._ready:
            self.initialize(input)
        if self.method == "lsq":
            scale, low, high = self.scale, self.low, self.high
            return fake_quantize_lsq(input, scale, low, high, axis=self.axis, group_size=self.group_size)
        if self.method == "affine":
            return fake_quantize_affine(input, self.range, self.minimum, self.bits, axis=self.axis)
        if self.method == "minmax":
            return fake_quantize_minmax(input, self.bits, group_size=self.group_size)
        if self.method == "statsq":
            return fake_quantize_statsq(input, self.bits)
        options = dict(self.options)
        options["stochastic"] = self.training and bool(options.get("stochastic", False))
        if options["stochastic"]:
            self.seed += 1
        return fake_quantize_group(input, group_size=self.group_size or 256, seed=self.seed, **options)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.seed, device="cpu")  # a tensor, as safetensors holds nothing else

    def set_extra_state(self, state: Tensor | int) -> None:
        """The seed; states of before had it as a number."""
        if not (isinstance(state, Tensor) and state.is_meta):
            self.seed = int(state)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        found = state_dict.get(f"{prefix}initialized")
        if isinstance(found, Tensor) and not found.is_meta:
            self._ready = bool(found)

    def extra_repr(self) -> str:
        parts = [repr(self.method), f"bits={self.bits}"]
        if self.method == "lsq":
            parts.append(f"signed={self.signed}")
        parts += [f"{n}={v}" for n, v in (("axis", self.axis), ("group_size", self.group_size)) if v is not None]
        return ", ".join(parts + [f"{n}={v!r}" for n, v in self.options.items()])


def _scales_of_groups(axis: int | None, size: int | Sequence[int] | None, group_size: int) -> tuple[int, ...]:
    """The shape of the steps of a tensor of the shape ``size``."""
    name = "FakeQuantize"
    check_integer(name, group_size=group_size)
    if axis is not None:
        refuse(name, f"axis and group_size exclude each other, got axis={axis} and group_size={group_size}")
    if not isinstance(size, Sequence) or not size or not all(map(is_integer, size)):
        refuse(name, f"size must be the shape of the input where method lsq has a group_size, got {size}")
    if group_size < 1 or size[-1] % group_size:
        refuse(name, f"group_size must be positive and divide the {size[-1]} columns of size, got {group_size}")
    return (*size[:-1], size[-1] // group_size)


class _LSQWeight(nn.Module):
    """What layers with an LSQ weight share; comes before the dense layer in the order of bases."""

    weight: Tensor
    weight_scale: nn.Parameter
    activation: FakeQuantize | None
    group_size: int | None = None  # of layers pickled before there were groups

    def _prepare(
        self, bits: int, per: str, group_size: int | None, activation_bits: int | None, activation_signed: bool
    ) -> None:
        name = type(self).__name__
        check_integer(name, bits=bits)
        if not 2 <= bits <= 8:
            refuse(name, f"bits must be between 2 and 8, got {bits}")
        check_choice(name, "per", per, PER)
        rows, columns = self.weight.shape[0], math.prod(self.weight.shape[1:])
        if (per == "group") != (group_size is not None):
            refuse(name, f"per='group' and group_size belong together, got per={per!r} and group_size={group_size}")
        if group_size is not None:
            check_integer(name, group_size=group_size)
            if group_size < 1 or columns % group_size:
                refuse(name, f"group_size must be positive and divide the {columns} columns, got {group_size}")
        self.bits, self.per, self.group_size = bits, per, group_size
        self.low, self.high = lsq_range(bits, True)
        self.axis = 0 if per == "row" else None
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        shapes = {"tensor": (), "row": (rows,), "group": (rows, columns // (group_size or 1))}
        self.weight_scale = nn.Parameter(torch.empty(shapes[per], **like))
        self.initialize()
        self.activation = None
        if activation_bits is not None:
            self.activation = FakeQuantize("lsq", activation_bits, signed=activation_signed, **like)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set the scales from the weight, as it is now."""
        weight = self.weight if self.group_size is None else self.weight.flatten(1)
        self.weight_scale.copy_(lsq_scale(weight, self.high, axis=self.axis, group_size=self.group_size))

    @property
    def quantized_weight(self) -> Tensor:
        """The weight that the layer applies."""
        scale, low, high = self.weight_scale, self.low, self.high
        if self.group_size is None:
            return fake_quantize_lsq(self.weight, scale, low, high, axis=self.axis)
        rows = fake_quantize_lsq(self.weight.flatten(1), scale, low, high, group_size=self.group_size)
        return rows.view(self.weight.shape)

    def _seen(self, input: Tensor) -> Tensor:
        return input if self.activation is None else self.activation(input)

    def _repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return f", bits={self.bits}, per={self.per!r}{groups}"


class LSQLinear(_LSQWeight, nn.Linear):
    """A linear layer whose weight, and input, are quantised with a learned step (LSQ) while it trains.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        bits: of the weight, 2 to 8.
        per: "row" (a scale for each output), "tensor", or "group".
        group_size: of "group": columns that share a scale; divides ``in_features``.
        activation_bits: of the input, one scale for all; None: the input stays as it is.
        activation_signed: whether the input has negative values worth levels; False after a ReLU.

    Attributes:
        weight, bias: as in ``nn.Linear``; the weight that is trained.
        weight_scale: parameter ``[out_features]``, ``[]`` or ``[out_features, in_features / group_size]``, from the weight:
            :meth:`initialize` sets it anew.
        activation: a :class:`FakeQuantize` or None. Its scale is a parameter from the start, and takes its value from the
            first batch.

    Shape: as ``nn.Linear``.

    Raises:
        TypeError: a number of another type; from :meth:`from_linear`, what is no ``nn.Linear``.
        ValueError: bits out of range, an unknown ``per``, a group size without it or one that does not divide; from
            :meth:`to_qtensor` and :meth:`finalize`, a weight or scales that are NaN.

    Example:
        >>> layer = LSQLinear(64, 8, bits=3, activation_bits=8)
        >>> x = torch.randn(5, 64)
        >>> layer(x).square().sum().backward()
        >>> layer.weight_scale.grad.shape, layer.activation.scale.grad.shape
        (torch.Size([8]), torch.Size([]))

    Source: Esser et al. 2020 (LSQ, 1902.08153).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bits: int = 4,
        per: str = "row",
        group_size: int | None = None,
        activation_bits: int | None = None,
        activation_signed: bool = True,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._prepare(bits, per, group_size, activation_bits, activation_signed)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> LSQLinear:
        """From a dense layer, whose parameters it takes over; the options are those of the class."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"LSQLinear.from_linear: linear must be an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, weight.device, weight.dtype, **options
        )
        layer.weight, layer.bias = weight, linear.bias
        layer.initialize()
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self._seen(input), self.quantized_weight, self.bias)

    @torch.no_grad()
    def to_qtensor(self) -> QTensor:
        """The weight in ``bits`` bits; decoded it is :attr:`quantized_weight`, to the last bit."""
        w = self.weight.detach()
        dtype, group_size = compute_dtype(w, self.weight_scale), self.group_size or w.shape[1]
        scale = self.weight_scale.detach().to(dtype).clamp(min=SCALE_FLOOR)
        scale = scale if self.per == "group" else scale.reshape(-1, 1).expand(w.shape[0], 1)
        each = w.to(dtype) / scale.repeat_interleave(group_size, 1)
        codes = each.clamp(self.low, self.high).round() - self.low
        wrong = int((~codes.isfinite()).sum())
        if wrong:
            refuse("LSQLinear.to_qtensor", f"weight and scales must not be NaN, got {wrong} values that are")
        zero = torch.full((1, 1), float(-self.low), device=w.device)
        return QTensor.from_codes(
            codes.to(torch.uint8), scale.contiguous(), bits=self.bits, group_size=group_size, zero=zero, dtype=w.dtype
        )

    def finalize(self) -> nn.Module:
        """The layer to deploy: a :class:`~cofire.nn.QuantLinear`, after the quantiser of the input if there is one."""
        layer = QuantLinear.from_qtensor(self.to_qtensor(), None if self.bias is None else self.bias.detach().clone())
        layer.train(self.training)
        return layer if self.activation is None else nn.Sequential(self.activation.requires_grad_(False), layer)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}{self._repr()}"


class LSQConv2d(_LSQWeight, nn.Conv2d):
    """A convolution whose weight, and input, are quantised with a learned step (LSQ) while it trains.

    Args:
        in_channels, out_channels, kernel_size, and the other arguments up to dtype: as in ``nn.Conv2d``.
        bits, per, group_size, activation_bits, activation_signed: as in :class:`LSQLinear`; a row is an output channel, and
            its columns are its ``in_channels / groups * kernel height * kernel width`` weights in that order.

    Attributes:
        weight, bias: as in ``nn.Conv2d``.
        weight_scale, activation: as in :class:`LSQLinear`.

    Shape: as ``nn.Conv2d``.

    Raises:
        TypeError, ValueError: as :class:`LSQLinear`.

    Example:
        >>> LSQConv2d(3, 8, 3, padding=1, bits=4)(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 6, 6])

    Source: Esser et al. 2020 (LSQ, 1902.08153).
    """

    def __init__(
        self,
        *args: Any,
        bits: int = 4,
        per: str = "row",
        group_size: int | None = None,
        activation_bits: int | None = None,
        activation_signed: bool = True,
        **options: Any,
    ) -> None:
        nn.Conv2d.__init__(self, *args, **options)
        self._prepare(bits, per, group_size, activation_bits, activation_signed)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(self._seen(input), self.quantized_weight, self.bias)
        return output

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}{self._repr()}"
