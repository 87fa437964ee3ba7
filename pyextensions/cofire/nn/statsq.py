# SPDX-License-Identifier: Apache-2.0
"""Layers of few-bit weights and activations, trained without weights that oscillate between two levels.

The *trainable* form (:class:`StatsQLinear`, :class:`StatsQConv2d`, :class:`QueryKey` inside
:class:`ReparameterizedAttention`) owns the weights and computes with what quantisation makes of them; ``deploy()`` gives the
form that owns packed integers (:mod:`cofire.nn.statsq_deployed`).

Sources: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023; Esser et al., "Learned
Step Size Quantization", ICLR 2020; the measure of oscillation: Nagel et al., "Overcoming Oscillations in
Quantization-Aware Training", ICML 2022.
"""

from __future__ import annotations

import abc
import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import ops
from cofire.nn.fake_quantize import lsq_range, lsq_scale
from cofire.nn.lowbit import QuantLinear
from cofire.nn.statsq_deployed import (
    IntegerLinear,
    QuantConv2d,
    convolve,
    folded_bias,
    follow,
    geometry_repr,
    of_before_convolutions,
    rounded,
)
from cofire.ops import QTensor
from cofire.ops.checks import check_choice, check_integer, check_number, refuse, shape_of
from cofire.ops.fake_quantize import SCALE_FLOOR, statsq_levels
from cofire.ops.lowbit import compute_dtype

#: Ways to quantise a weight.
WEIGHTS = ("statsq", "lsq")
#: Of the moving average of sign reversals.
MOMENTUM = 0.01


def check_boundary_range(operator: str, value: Any) -> None:
    """Half a step is the distance of the farthest weight, so that from there on nothing would be frozen."""
    check_number(operator, boundary_range=value)
    if not 0 < value < 0.5:
        refuse(operator, f"boundary_range must be between 0 and 0.5 (quantisation steps), got {value}")


# ----------------------------------------------------------------------------------------------------- activations


class LSQActivation(nn.Module):
    """Activations in few bits, between two learned shifts: ``scale * round(clamp((x + before) / scale)) + after``.

    Parameters are there from the start, so that an optimiser made at once knows them; the scales get their values from
    the first batch, ``2 mean|x| / sqrt(high)`` (4 where unsigned).

    Args:
        bits: 2 to 8.
        unsigned: integers from 0 to ``2^bits - 1``; otherwise from ``-2^(bits-1)`` to ``2^(bits-1) - 1``.
        features: width of the shifts, along the last dimension; None: no shifts.
        scales: how many there are: 1, or as many as ``axis`` is long.
        axis: the dimension that has the scales, -1 or -2; None: one scale for everything.
        parts: the last dimension is that many rows side by side, with a scale each (a head each, in attention);
            ``scales`` counts positions times parts.
        device, dtype: of the parameters.

    Attributes:
        scale: parameter ``[scales]``.
        before, after: parameters ``[features]``, or None.
        initialized: whether the scales have their values; kept in the buffer ``flag``.

    Shape: ``[..., features]``, unchanged.

    Raises:
        TypeError, ValueError: an argument out of range; an input that has not as many positions as there are scales.

    Example:
        >>> layer = LSQActivation(2, features=3, scales=2, axis=-2)
        >>> layer(torch.tensor([[[4.0, 1.0, 1.0], [2.0, 2.0, 8.0]]])).tolist()
        [[[4.0, 0.0, 0.0], [0.0, 0.0, 8.0]]]

    Source: Esser et al. 2020, section 2 and equation 5; the shifts: Liu et al. 2023 (OFQ), after ReActNet's.
    """

    flag: Tensor
    before: nn.Parameter | None
    after: nn.Parameter | None

    def __init__(
        self,
        bits: int,
        *,
        unsigned: bool = False,
        features: int | None = None,
        scales: int = 1,
        axis: int | None = None,
        parts: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("LSQActivation", bits=bits, scales=scales, parts=parts)
        if not 2 <= bits <= 8:
            refuse("LSQActivation", f"bits must be between 2 and 8, got {bits}")
        if axis not in (None, -1, -2):
            refuse("LSQActivation", f"axis must be -1, -2 or None, got {axis}")
        if scales < 1 or (axis is None and scales != 1):
            refuse("LSQActivation", f"scales must be at least 1, and 1 without axis, got {scales}")
        self.bits, self.unsigned, self.axis, self.parts = bits, unsigned, axis, parts
        self.low, self.high = lsq_range(bits, not unsigned)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scale = nn.Parameter(torch.ones(scales, **where))
        self.before = None if features is None else nn.Parameter(torch.zeros(features, **where))
        self.after = None if features is None else nn.Parameter(torch.zeros(features, **where))
        self.register_buffer("flag", torch.zeros((), dtype=torch.uint8, device=device))
        self._initialized = False

    @property
    def initialized(self) -> bool:
        return self._initialized

    @initialized.setter
    def initialized(self, value: bool) -> None:
        self.flag.fill_(int(value))
        self._initialized = bool(value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.flag.is_meta:
            self._initialized = bool(self.flag)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the scales by a batch (shifted, and with its parts as rows)."""
        self.scale.copy_(lsq_scale(x, self.high, not self.unsigned, self.axis))
        self.initialized = True

    def forward(self, input: Tensor) -> Tensor:
        y = self._quantize(self._rows(input)).view(input.shape)
        return y if self.after is None else y + self.after

    def integers(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """What the input is rounded to, and the scales that it is multiplied by: before the shift after, of one part.

        Returns:
            Integers as floats, in the shape of the input, and scales that fit them: in fp32, or fp64 where an argument is.
            The gradient of the integers is that of no rounding.

        Raises:
            ValueError: several parts; an input that has not as many positions as there are scales.
        """
        if self.parts > 1:
            refuse("LSQActivation", f"the integers are of one part, got {self.parts} parts")
        x = self._rows(input)
        scale = self.scale.to(compute_dtype(x, self.scale)).clamp(min=SCALE_FLOOR)
        scale = scale[0] if self.axis is None else scale[:, None] if self.axis == -2 else scale
        # (in the wide type, in which a rounded input is divided as well)
        places = x.to(scale.dtype) / scale
        return ops.fake_quantize_lsq(places, places.new_ones(()), self.low, self.high), scale

    def _rows(self, input: Tensor) -> Tensor:
        """The shifted input, its parts as rows; the first one gives the scales."""
        x = input if self.before is None else input + self.before
        shape = x.shape
        if self.parts > 1 and self.axis is not None:
            x = x.reshape(*shape[:-2], shape[-2] * self.parts, shape[-1] // self.parts)
        if self.axis is not None and x.shape[self.axis] != len(self.scale):
            each = f" ({len(self.scale) // self.parts} positions of {self.parts} parts)" if self.parts > 1 else ""
            refuse(
                "LSQActivation",
                f"the input must be {len(self.scale)} long in dimension {self.axis}{each}, one scale each: the length of "
                f"the sequences that it was prepared for; got {shape_of(x)}",
            )
        if not self._initialized:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "LSQActivation: the scales get their values outside of a graph: run one batch before compiling, or "
                    "give prepare an example_input"
                )
            self.initialize(x)
        return x

    def _quantize(self, x: Tensor) -> Tensor:
        # Elements per scale in one sample: the gradient's factor must not depend on how a batch is split.
        count = max(x[:1].numel() // len(self.scale), 1)
        factor = 1 / math.sqrt(self.high * count)
        axis = None if self.axis is None else x.dim() + self.axis
        scale = self.scale if self.axis is not None else self.scale[0]
        return ops.fake_quantize_lsq(x, scale, self.low, self.high, axis=axis, gradient_scale=factor)

    def extra_repr(self) -> str:
        sign = "unsigned" if self.unsigned else "signed"
        return f"bits={self.bits}, {sign}, scales={len(self.scale)}, axis={self.axis}, parts={self.parts}"


# --------------------------------------------------------------------------------------------------------- weights


class WeightQuantizer(nn.Module):
    """How a matrix is quantised, row by row, which of its entries may move in annealing, and how they oscillate.

    Args:
        matrix: ``[rows, columns]``, as it is at the start.
        bits: 1 to 8; 2 to 8 for "lsq".
        kind: "statsq": mid-rise levels on twice the mean magnitude of a row, which is no parameter. "lsq": a learned
            scale per row.
        boundary_range: in annealing an entry may move if it is within so many quantisation steps of a boundary between
            two levels.

    Attributes:
        scale: parameter ``[rows]``, for "lsq".
        integers, directions: int8 buffers ``[rows, columns]``: the integers after the last step, and the direction (-1, 0,
            1) in which each changed last.
        oscillation: fp32 buffer ``[rows, columns]``: moving average, with momentum 0.01, of the reversals of direction.
        steps: int64 buffer; ``count`` is the same, to be read without waiting for a device.
        annealing: whether only entries near a boundary move; kept in the buffer ``flag``.

    Shape: as ``matrix``.

    Raises:
        TypeError, ValueError: bits, a kind or a range that there is not.

    Example:
        >>> quantizer = WeightQuantizer(torch.tensor([[1.0, -1.0, 0.25, 0.25]]), bits=2)
        >>> quantizer(torch.tensor([[2.0, -2.0, 0.5, 0.5]])).tolist()
        [[1.875, -1.875, 0.625, 0.625]]

    Source: Liu et al. 2023 (OFQ), sections 4.1 (StatsQ) and 4.2 (annealing); Nagel et al. 2022, equations 4 to 7.
    """

    integers: Tensor
    directions: Tensor
    oscillation: Tensor
    steps: Tensor
    flag: Tensor
    scale: nn.Parameter | None

    def __init__(self, matrix: Tensor, bits: int, kind: str = "statsq", *, boundary_range: float = 0.005) -> None:
        super().__init__()
        check_choice("WeightQuantizer", "kind", kind, WEIGHTS)
        check_integer("WeightQuantizer", bits=bits)
        check_boundary_range("WeightQuantizer", boundary_range)
        least = 1 if kind == "statsq" else 2
        if not least <= bits <= 8:
            refuse("WeightQuantizer", f"bits must be between {least} and 8 for {kind}, got {bits}")
        self.bits, self.kind, self.boundary_range = bits, kind, boundary_range
        self.half_range = 1 << (bits - 1)
        matrix = matrix.detach()
        self.scale = None
        if kind == "lsq":
            start = lsq_scale(matrix, self.half_range - 1, axis=0)
            self.scale = nn.Parameter(start.to(matrix.dtype))
        device = matrix.device
        codes = torch.zeros_like(matrix, dtype=torch.int8) if matrix.is_meta else self.codes(matrix)
        self.register_buffer("integers", codes)
        self.register_buffer("directions", torch.zeros_like(codes))
        self.register_buffer("oscillation", torch.zeros(codes.shape, dtype=torch.float32, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("flag", torch.zeros((), dtype=torch.uint8, device=device))
        self._annealing, self.count = False, 0

    # ---------------------------------------------------------------------------------------------------- state

    @property
    def annealing(self) -> bool:
        return self._annealing

    @annealing.setter
    def annealing(self, value: bool) -> None:
        self.flag.fill_(int(value))
        self._annealing = bool(value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.flag.is_meta:
            self._annealing, self.count = bool(self.flag), int(self.steps)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightQuantizer:
        """Follows a layer to its device, but not to 16 bits: an average moves by less than those can tell."""
        before = self.oscillation
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.oscillation.dtype != before.dtype:
            self.oscillation = before.to(self.oscillation.device)
        return self

    # ------------------------------------------------------------------------------------------------- the levels

    def forward(self, matrix: Tensor) -> Tensor:
        if self._annealing and self.training:
            # The frozen entries' gradient is zero, here and in whatever the matrix is made of.
            matrix = torch.where(self.movable(matrix), matrix, matrix.detach())
        if self.scale is None:
            return ops.fake_quantize_statsq(matrix, self.bits)
        return ops.fake_quantize_lsq(matrix, self.scale, -self.half_range, self.half_range - 1, axis=0)

    @torch.no_grad()
    def row_scale(self, matrix: Tensor) -> Tensor:
        """fp32 ``[rows]``: StatsQ's ``2 mean|w|``, or the learned scale."""
        if self.scale is None:
            return statsq_levels(matrix.detach().float(), self.bits)[1][:, 0]
        return self.scale.detach().float().clamp(min=SCALE_FLOOR)

    @torch.no_grad()
    def codes(self, matrix: Tensor) -> Tensor:
        """The integers as int8: ``-2^(bits-1)`` to ``2^(bits-1) - 1``; with StatsQ a level is ``(q + 1/2) scale / 2^(bits-1)``."""
        w = matrix.detach().float()
        if self.scale is None:
            return statsq_levels(w, self.bits)[0].to(torch.int8)
        return (w / self.row_scale(matrix)[:, None]).clamp(-self.half_range, self.half_range - 1).round().to(torch.int8)

    @torch.no_grad()
    def movable(self, matrix: Tensor) -> Tensor:
        """bool ``[rows, columns]``: the entries within ``boundary_range`` steps of a boundary between two levels (StatsQ)."""
        scale = self.row_scale(matrix)[:, None]
        place = (
            matrix.detach().float() / torch.where(scale > 0, scale, 1.0) * self.half_range
        )  # boundaries are integers
        boundary = place.round().clamp(1 - self.half_range, self.half_range - 1)
        return (place - boundary).abs() <= self.boundary_range

    @torch.no_grad()
    def track(self, matrix: Tensor) -> None:
        """Count a step: look which integers have changed, and which of them have turned back."""
        codes = self.codes(matrix)
        change = (codes.short() - self.integers.short()).sign().to(torch.int8)
        reversed_ = (change * self.directions) == -1
        self.oscillation.lerp_(reversed_.to(self.oscillation.dtype), MOMENTUM)
        self.directions.copy_(torch.where(change != 0, change, self.directions))
        self.integers.copy_(codes)
        self.steps += 1
        self.count += 1

    # --------------------------------------------------------------------------------------------------- the result

    @torch.no_grad()
    def pack(self, matrix: Tensor) -> QTensor:
        """The quantised matrix, whose values are those of the forward to the bit."""
        codes = (self.codes(matrix).short() + self.half_range).to(torch.uint8)
        scale, zero = self.row_scale(matrix)[:, None], float(self.half_range)
        if self.scale is None:
            scale, zero = scale / self.half_range, self.half_range - 0.5
        middle = torch.full((1, 1), zero, device=matrix.device)
        return QTensor.from_codes(codes, scale, bits=self.bits, zero=middle, dtype=matrix.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, kind={self.kind!r}, boundary_range={self.boundary_range}"


class Quantized(nn.Module, abc.ABC):
    """A layer around one quantised matrix.

    In annealing the optimiser gets a gradient of zero for what is frozen; what it moves all the same, by momentum and weight
    decay, :meth:`step` puts back.
    """

    quantizer: WeightQuantizer

    #: Names of the parameters that the matrix is made of.
    factors: tuple[str, ...] = ("weight",)

    def _watch(self) -> None:
        """To be called at the end of ``__init__``."""
        for name in self.factors:
            # Where annealing puts things back to. Between two steps it is one with the parameter: no part of the state.
            self.register_buffer(f"{name}_before", None, persistent=False)
        self.register_load_state_dict_post_hook(_remember_loaded)

    @property
    def weights(self) -> int:
        """Entries of the matrix."""
        return self.quantizer.integers.numel()

    @abc.abstractmethod
    def matrix(self, *factors: Tensor) -> Tensor:
        """The matrix, of the parameters or of other values of them."""

    @abc.abstractmethod
    def movable(self, *factors: Tensor) -> list[Tensor]:
        """Of each factor, what may move."""

    def anneal(self, on: bool = True) -> None:
        self.quantizer.annealing = on
        self.remember()

    @torch.no_grad()
    def remember(self) -> None:
        """Take the parameters as they are for what frozen ones are put back to."""
        for name in self.factors:
            parameter = getattr(self, name).detach()
            setattr(self, f"{name}_before", parameter.clone() if self.quantizer.annealing else None)

    @torch.no_grad()
    def step(self) -> None:
        """After each step of the optimiser: put back what is frozen, and track the integers."""
        if self.quantizer.annealing:
            before = [getattr(self, f"{name}_before") for name in self.factors]
            for name, old, free in zip(self.factors, before, self.movable(*before), strict=True):
                parameter = getattr(self, name)
                parameter.copy_(torch.where(free, parameter, old))
                old.copy_(parameter)
        self.quantizer.track(self.matrix())

    @abc.abstractmethod
    def deploy(self, integer: bool = False) -> nn.Module:
        """The form for inference, with memory of its own; ``integer``: multiply integers where the input has some."""


def _remember_loaded(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, Quantized)
    module.remember()


class StatsQLinear(Quantized):
    """A linear layer with a quantised weight, and quantised activations where ``input`` says how.

    Args:
        linear: the layer that it is made from; its parameters are copied.
        bits, kind, boundary_range: as in :class:`WeightQuantizer`.
        input: quantises the input; None: it comes quantised, or stays as it is.

    Attributes:
        weight, bias: parameters.

    Shape: as ``nn.Linear``.

    Raises:
        TypeError, ValueError: bits, a kind or a range that there is not; an input of another length than was seen first.

    Example:
        >>> layer = StatsQLinear(nn.Linear(8, 3), bits=2, input=LSQActivation(4, features=8))
        >>> layer(torch.rand(5, 8)).shape, layer.quantizer(layer.weight)[0].unique().numel() <= 4
        (torch.Size([5, 3]), True)

    Source: Liu et al. 2023 (OFQ), section 4.1.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Linear,
        bits: int,
        kind: str = "statsq",
        *,
        input: LSQActivation | None = None,
        boundary_range: float = 0.005,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.weight = _copied(linear.weight)
        self.bias = None if linear.bias is None else _copied(linear.bias)
        self.input = input
        self.quantizer = WeightQuantizer(self.weight, bits, kind, boundary_range=boundary_range)
        self._watch()

    def matrix(self, *factors: Tensor) -> Tensor:
        return factors[0] if factors else self.weight

    def movable(self, *factors: Tensor) -> list[Tensor]:
        return [self.quantizer.movable(*factors)]

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.input is None else self.input(input)
        return F.linear(x, self.quantizer(self.weight), self.bias)

    def deploy(self, integer: bool = False) -> nn.Module:
        """The shift after the rounding of the input becomes part of the bias."""
        weight = self.quantizer.pack(self.weight)
        if self.input is None:
            return QuantLinear.from_qtensor(weight, folded_bias(weight, self.bias, None))
        rounding = copy.deepcopy(self.input)
        if integer and IntegerLinear.takes(rounding):
            return IntegerLinear(weight, self.bias, rounding)
        linear = QuantLinear.from_qtensor(weight, folded_bias(weight, self.bias, rounding.after))
        rounding.after = None
        return rounded(rounding, linear)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class StatsQConv2d(Quantized):
    """A convolution with a quantised weight, and a quantised input where ``input`` says how.

    Args:
        conv: the convolution that it is made from; its parameters are copied.
        bits, kind, boundary_range: as in :class:`WeightQuantizer`; a row is an output channel.
        input: quantises the input, by one scale and without shifts, so that what is padded with zeros stays zero; None: the
            input stays as it is.

    Attributes:
        weight, bias: parameters, as in ``nn.Conv2d``.

    Shape: as ``nn.Conv2d``.

    Raises:
        TypeError, ValueError: bits, a kind or a range that there is not; an ``input`` with shifts or several scales.

    Example:
        >>> layer = StatsQConv2d(nn.Conv2d(3, 8, 4, stride=4), bits=8, kind="lsq", input=LSQActivation(8))
        >>> layer(torch.rand(2, 3, 16, 16)).shape, layer.quantizer.scale.shape
        (torch.Size([2, 8, 4, 4]), torch.Size([8]))

    Source: Esser et al. 2020 for "lsq", which Liu et al. 2023 (OFQ) have in the embedding of patches; their StatsQ is of
    linear layers.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        conv: nn.Conv2d,
        bits: int,
        kind: str = "statsq",
        *,
        input: LSQActivation | None = None,
        boundary_range: float = 0.005,
    ) -> None:
        super().__init__()
        if input is not None and (input.axis is not None or input.before is not None):
            refuse("StatsQConv2d", f"input must have one scale and no shifts, got {input}")
        follow(self, conv)
        self.weight = _copied(conv.weight)
        self.bias = None if conv.bias is None else _copied(conv.bias)
        self.input = input
        self.quantizer = WeightQuantizer(self.matrix(), bits, kind, boundary_range=boundary_range)
        self._watch()

    def matrix(self, *factors: Tensor) -> Tensor:
        return (factors[0] if factors else self.weight).flatten(1)

    def movable(self, *factors: Tensor) -> list[Tensor]:
        return [self.quantizer.movable(self.matrix(*factors)).view_as(self.weight)]

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.input is None else self.input(input)
        return convolve(self, x, self.quantizer(self.matrix()).view_as(self.weight), self.bias)

    def deploy(self, integer: bool = False) -> nn.Module:
        """Of no integers: the input has 8 bits where the method puts this layer, and those of the kernels end at 127."""
        conv = QuantConv2d(self, self.quantizer.pack(self.matrix()), self.bias)
        return conv if self.input is None else rounded(copy.deepcopy(self.input), conv)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        inner = (f"{prefix}quantizer.", f"{prefix}input.")
        if f"{prefix}weight" in state_dict and not any(name.startswith(inner) for name in state_dict):
            # (no error: without strict a dense weight may be loaded)
            warnings.warn(f"StatsQConv2d: {of_before_convolutions(prefix)}", stacklevel=2)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return geometry_repr(self)


class QueryKey(Quantized):
    """The product of the query's and the key's weights, ``A_h = W_q,h^T W_k,h`` for each head h, as one quantised matrix.

    Logits are ``x A_h x^T``: the weights of query and key are never quantised themselves, so no rounding of the one meets
    an oscillation of the other. Their biases are dropped.

    **Annealing.** An entry of A is no parameter: ``A_h[i, j]`` is the product of column i of W_q,h and column j of W_k,h.
    A frozen entry passes no gradient to either. A column of W_q,h stays, to the bit, as long as row i of A_h has no entry
    that may move; likewise one of W_k,h and column j. A frozen entry of a row or column that has one moves with it.

    Args:
        query, key: weights ``[heads * d, C]``; copied.
        heads: of the attention.
        bits, kind, boundary_range: as in :class:`WeightQuantizer`, for the rows of A: ``[heads * C, C]``.

    Shape: ``[B, N, C]`` to ``[B, N, heads * C]``: of each position and head ``A_h x``.

    Raises:
        TypeError, ValueError: query and key of other shapes than one ``[heads * d, C]``; bits, a kind or a range that there is
            not.

    Example:
        >>> layer = QueryKey(torch.randn(6, 4), torch.randn(6, 4), heads=2, bits=2)
        >>> layer(torch.rand(1, 5, 4)).shape
        torch.Size([1, 5, 8])

    Source: Liu et al. 2023 (OFQ), section 4.3.
    """

    factors = ("query", "key")

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        heads: int,
        bits: int,
        kind: str = "statsq",
        *,
        boundary_range: float = 0.005,
    ) -> None:
        super().__init__()
        if query.shape != key.shape or query.dim() != 2 or query.shape[0] % heads:
            refuse(
                "QueryKey",
                f"query and key must have one shape [heads * d, C] for {heads} heads, got {shape_of(query)} and "
                f"{shape_of(key)}",
            )
        self.heads = heads
        self.query, self.key = _copied(query), _copied(key)
        self.quantizer = WeightQuantizer(self.matrix(), bits, kind, boundary_range=boundary_range)
        self._watch()

    def matrix(self, *factors: Tensor) -> Tensor:
        query, key = factors or (self.query, self.key)
        with torch.autocast(query.device.type, enabled=False):
            product: Tensor = query.unflatten(0, (self.heads, -1)).transpose(1, 2) @ key.unflatten(0, (self.heads, -1))
            return product.flatten(0, 1)

    def movable(self, *factors: Tensor) -> list[Tensor]:
        free = self.quantizer.movable(self.matrix(*factors)).unflatten(0, (self.heads, -1))  # [heads, C, C]
        each = [free.any(2), free.any(1)]  # rows have columns of the query, columns those of the key
        rows = factors[0].shape[0] // self.heads
        return [columns.repeat_interleave(rows, 0) for columns in each]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantizer(self.matrix()))

    def deploy(self, integer: bool = False) -> nn.Module:
        """Of no integers by itself: its input is rounded by the attention around it."""
        return QuantLinear.from_qtensor(self.quantizer.pack(self.matrix()))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, width={self.query.shape[1]}"


def _copied(x: Tensor) -> nn.Parameter:
    """Trained, unless it is a frozen parameter."""
    trained = x.requires_grad or not isinstance(x, nn.Parameter)
    return nn.Parameter(x.detach().clone(memory_format=torch.contiguous_format), trained)


# ------------------------------------------------------------------------------------------------------- attention


class ReparameterizedAttention(nn.Module):
    """Self-attention whose logits are ``x A_h x^T * factor``, with quantised activations in between.

    Args:
        qk: :class:`QueryKey`; in the deployed form a :class:`~cofire.nn.QuantLinear` of the same shape, or one of integers,
            for which then ``input`` is an :class:`LSQActivation` and ``v`` of integers too.
        v: the values' layer, ``[B, N, C]`` to ``[B, N, heads * d]``.
        proj: the last layer; quantises its own input.
        heads: number of heads.
        factor: of the logits.
        input, qk_output, v_output, softmax: quantise what their names say; ``nn.Identity`` where it stays as it is.
        attn_drop, proj_drop: dropout of the weights and of the output.

    Shape: ``[B, N, C]``, unchanged.

    Raises:
        ValueError: an input that has not as many positions as the activations have scales.

    Example:
        >>> qk = QueryKey(torch.randn(6, 4), torch.randn(6, 4), heads=2, bits=2)
        >>> v, proj = (StatsQLinear(nn.Linear(a, b), bits=2) for a, b in ((4, 6), (6, 4)))
        >>> rounding = {"input": LSQActivation(4, features=4), "qk_output": LSQActivation(4, features=8)}
        >>> rounding |= {"v_output": nn.Identity(), "softmax": LSQActivation(4, unsigned=True)}
        >>> layer = ReparameterizedAttention(qk, v, proj, 2, 3**-0.5, **rounding)
        >>> layer(torch.rand(1, 5, 4)).shape
        torch.Size([1, 5, 4])

    Source: Liu et al. 2023 (OFQ), section 4.3.
    """

    def __init__(
        self,
        qk: nn.Module,
        v: nn.Module,
        proj: nn.Module,
        heads: int,
        factor: float,
        *,
        input: nn.Module,
        qk_output: nn.Module,
        v_output: nn.Module,
        softmax: nn.Module,
        attn_drop: nn.Module | None = None,
        proj_drop: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.factor = heads, factor
        self.input, self.qk, self.qk_output, self.v, self.v_output = input, qk, qk_output, v, v_output
        self.softmax, self.proj = softmax, proj
        self.attn_drop = nn.Identity() if attn_drop is None else attn_drop
        self.proj_drop = nn.Identity() if proj_drop is None else proj_drop

    def forward(self, x: Tensor) -> Tensor:
        x, keys, values = self._products(x)
        keys = self.qk_output(keys).unflatten(2, (self.num_heads, -1))  # [B, N, heads, C]
        values = self.v_output(values).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        logits = x.unsqueeze(1) @ keys.permute(0, 2, 3, 1) * self.factor
        weights = self.attn_drop(self.softmax(logits.softmax(-1)))
        y: Tensor = self.proj_drop(self.proj((weights @ values).transpose(1, 2).flatten(2)))
        return y

    def _products(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rounded input, and its products with both weights."""
        if not isinstance(self.qk, IntegerLinear):
            rounded = self.input(x)
            return rounded, self.qk(rounded), self.v(rounded)
        assert isinstance(self.input, LSQActivation) and isinstance(self.v, IntegerLinear)
        integers, scale = self.input.integers(x)
        extended = self.qk.extended(integers)
        keys, values = (layer.multiply(extended, scale).to(x.dtype) for layer in (self.qk, self.v))
        rounded = (integers * scale).to(x.dtype)
        return rounded if self.input.after is None else rounded + self.input.after, keys, values

    def deploy(self, integer: bool = False) -> ReparameterizedAttention:
        """The form for inference, with memory of its own; ``integer``: multiply integers by the weights.

        The shift after ``qk_output`` adds the same to all logits of a query, which the softmax takes away: it is left out.
        """

        def deployed(layer: nn.Module, integer: bool = False) -> nn.Module:
            return layer.deploy(integer) if isinstance(layer, Quantized) else copy.deepcopy(layer)

        qk, v = deployed(self.qk), deployed(self.v)
        rounding, keys = copy.deepcopy(self.input), copy.deepcopy(self.qk_output)
        if integer and isinstance(rounding, LSQActivation) and IntegerLinear.takes(rounding):
            if isinstance(qk, QuantLinear) and isinstance(v, QuantLinear):
                qk, v = (IntegerLinear(layer.qweight, layer.bias, rounding, inside=False) for layer in (qk, v))
        if isinstance(keys, LSQActivation):
            keys.after = None
        rest = {name: copy.deepcopy(getattr(self, name)) for name in ("v_output", "softmax", "attn_drop", "proj_drop")}
        result = ReparameterizedAttention(
            qk, v, deployed(self.proj, integer), self.num_heads, self.factor, input=rounding, qk_output=keys, **rest
        )
        result.register_load_state_dict_pre_hook(_without_keys_shift)
        return result.train(self.training)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, factor={self.factor:.4g}"


def _without_keys_shift(attention: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Of a deployed attention: states of when it was not left out."""
    state_dict.pop(f"{prefix}qk_output.after", None)
