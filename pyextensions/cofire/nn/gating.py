# SPDX-License-Identifier: Apache-2.0
"""Layers that decide, for each sample, which of their output channels to compute.

A layer has two forms. The *trainable* form (:class:`GatedConv2d`, :class:`GatedLinear`) computes everything,
masks the output with its head's prediction, and compares the prediction with the self-supervised target of
the same forward. The *deployed* form, from ``deploy()``, computes the predicted channels only, from the
non-zero input channels only.

Source: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
Self-Supervised Mask Prediction", CVPR 2022 (FTWT).
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import ops
from cofire.info import kernel_for
from cofire.ops.checks import check_integer, check_number
from cofire.registry import OPERATORS

ACTIVATIONS = ("identity", "relu", "relu6")


class Gate(NamedTuple):
    """What a :class:`GateHead` decides. Gradients flow through ``logits`` only."""

    logits: Tensor  #: ``[N, Co]``
    mask: Tensor  #: bool ``[N, Co]``: the channels to compute
    out_index: Tensor  #: int32 ``[N, Co]``, their positions, as :func:`cofire.ops.compact` gives them
    out_count: Tensor  #: int32 ``[N]``
    in_index: Tensor  #: int32 ``[N, Ci]``: the input channels that hold any non-zero element
    in_count: Tensor  #: int32 ``[N]``


class GateHead(nn.Module):
    """The mask predictor: pooling, softmax over the channels, linear, threshold at zero.

    Args:
        in_channels: channels (or features) of the gated layer's input.
        out_channels: channels of the gated layer's output.
        pool: ``"max"`` (the paper, figure 3) or ``"avg"`` (the authors' released code); without effect on a
            2-D input.
        softmax: normalise the pooled features over the channels.
        min_keep: the fewest channels kept per sample.
        rank: project the pooled features to this many before the softmax. A head costs ``in_channels *
            out_channels`` MACs, which for a linear layer is the cost of the layer itself; a low rank makes it
            cheap. None: no projection.

    Shape: input ``[N, in_channels, H, W]`` or ``[N, in_channels]``; output :class:`Gate`.

    Example:
        >>> head = GateHead(3, 5, min_keep=2)
        >>> bool((head(torch.rand(4, 3, 8, 8)).out_count >= 2).all())
        True

    Source: FTWT, section 3 and figure 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        pool: str = "max",
        softmax: bool = True,
        min_keep: int = 1,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pool not in ("avg", "max"):
            raise ValueError(f"GateHead: pool must be one of avg, max, got {pool!r}")
        check_integer("GateHead", min_keep=min_keep)
        if not 0 <= min_keep <= out_channels:
            raise ValueError(f"GateHead: min_keep must be between 0 and the {out_channels} channels, got {min_keep}")
        if rank is not None and rank < 1:
            raise ValueError(f"GateHead: rank must be at least 1, or None, got {rank}")
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self.pool, self.softmax, self.min_keep = pool, softmax, min_keep
        features = in_channels if rank is None else rank
        self.weight = nn.Parameter(torch.empty(out_channels, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        self.projection = (
            None if rank is None else nn.Parameter(torch.empty(rank, in_channels, device=device, dtype=dtype))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``."""
        for matrix in (self.weight, self.projection):
            if matrix is not None:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        bound = 1 / math.sqrt(max(self.weight.shape[1], 1))
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Gate:
        _check_channels("GateHead", "channels", self.in_channels, input)
        if input.dim() == 2:
            pooled = input
            in_index, in_count = ops.compact(input != 0)
        else:
            pooled, in_index, in_count = ops.channel_pool(input, self.pool)
        if self.projection is not None:
            pooled = F.linear(pooled, self.projection)
        decision = ops.gate_head(pooled, self.weight, self.bias, softmax=self.softmax, min_keep=self.min_keep)
        return Gate(*decision, in_index, in_count)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return self.weight.numel() + (0 if self.projection is None else self.projection.numel())

    def extra_repr(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"{self.in_channels}, {self.out_channels}, pool={self.pool}, softmax={self.softmax}{rank}"


class Gated(nn.Module):
    """What the trainable gated layers share: the head, the target, and the loss between the two.

    Attributes:
        gate_loss: scalar with a graph, from the last forward in training: binary cross entropy between logits
            and target, summed over the channels, averaged over the batch. None before. It is not part of the
            state: copies and pickles drop it.
        steps: int64 buffer, the optimiser steps that this head has seen; schedules of the loss count with it.
        force: which mask to apply instead of the prediction: None (the prediction), ``"open"`` (no mask),
            ``"target"``, or a tensor ``[N, Co]``. For experiments; copies and pickles drop it.
    """

    steps: Tensor

    def __init__(self, head: GateHead, *, activation: str, mass: float, mode: str, coupling: str) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value, choices in (
            ("activation", activation, ACTIVATIONS),
            ("mode", mode, ("mass", "uniform")),
            ("coupling", coupling, ("decoupled", "joint")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: {argument} must be one of {', '.join(choices)}, got {value!r}")
        check_mass(name, mass, mode)
        self.head = head
        self.activation, self.mass, self.mode, self.coupling = activation, float(mass), mode, coupling
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=head.weight.device))
        self.gate_loss: Tensor | None = None
        self.force: str | Tensor | None = None

    def _predict(self, input: Tensor) -> Gate:
        # Decoupled training: the head's loss must not reach the layers before.
        gate: Gate = self.head(input.detach() if self.coupling == "decoupled" else input)
        return gate

    def _target(self, peak: Tensor) -> Tensor:
        return ops.mass_mask(peak, self.mass, self.mode, self.head.min_keep)

    def _record(self, logits: Tensor, peak: Tensor) -> None:
        # fp32 for the half types: a sum over hundreds of channels
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = self._target(peak).to(logits.dtype)
        total = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        self.gate_loss = total / max(logits.shape[0], 1)

    def _mask(self, gate: Gate) -> Tensor | None:
        """The mask to apply; None for no mask, or where it is the target, which is not known yet."""
        if self.force is None:
            return gate.mask
        if isinstance(self.force, Tensor):
            return self.force
        if self.force not in ("open", "target"):
            where, found = type(self).__name__, repr(self.force)
            raise ValueError(f"{where}: force must be None, 'open', 'target' or a tensor, got {found}")
        return None

    @torch.no_grad()
    def examine(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        """The mask that a forward with these arguments applies, and the target: both bool ``[N, Co]``.

        It computes the layer once more and changes nothing.
        """
        target = self._target(self._peak(*args))
        mask = self._mask(self._predict(args[0]))
        if mask is None:
            mask = target if self.force == "target" else torch.ones_like(target)
        return mask != 0, target

    def _peak(self, *args: Tensor) -> Tensor:
        """``[N, Co]``: the largest magnitude of each channel before the gate."""
        raise NotImplementedError  # each kind of layer has its own

    def deploy(self) -> nn.Module:
        """The inference form, with copies of the weights; this layer can go on training."""
        raise NotImplementedError  # each kind of layer has its own

    def __getstate__(self) -> dict[str, Any]:
        # A non-leaf tensor can neither be copied nor pickled, and belongs to one forward only.
        return {**self.__dict__, "gate_loss": None, "force": None}

    def extra_repr(self) -> str:
        return f"activation={self.activation}, mass={self.mass}, mode={self.mode}, coupling={self.coupling}"


def check_mass(where: str, mass: float, mode: str) -> None:
    """Raise if ``mass`` is no number, or outside its range for ``mode``."""
    check_number(where, mass=mass)
    if mode == "mass" and not (mass < 0 or 0 < mass <= 1):
        raise ValueError(f"{where}: mass must be in (0, 1] or negative (gating off), got {mass}")
    if mode == "uniform" and not 0 <= mass < 1:
        raise ValueError(f"{where}: mass must be in [0, 1) in mode 'uniform' (the share to prune), got {mass}")


def _check_channels(where: str, what: str, expected: int, input: Tensor) -> None:
    if input.shape[1] != expected:
        raise ValueError(f"{where}: input must have {expected} {what}, got {list(input.shape)}")


class GatedConv2d(Gated):
    """Convolution, batch norm, activation and gate: the trainable form.

    Constructed like ``nn.Conv2d``; the further arguments are keywords. In training every channel is computed,
    because the target needs the unmasked activation; :meth:`deploy` gives the form that skips.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in ``nn.Conv2d``.
        activation: ``"relu"``, ``"relu6"`` or ``"identity"``, applied after norm and residual.
        norm: batch norm after the convolution.
        mass: share of the activation mass that the target keeps, in (0, 1]; negative: the target keeps
            everything.
        mode: ``"mass"``, or ``"uniform"`` (``mass`` is then the share of channels to prune, in [0, 1)).
        pool, softmax, min_keep: see :class:`GateHead`.
        coupling: ``"decoupled"`` (the head's loss trains the head alone) or ``"joint"`` (it also trains the
            layers before).
        device, dtype: of the parameters.

    Shape: input ``[N, in_channels, H, W]``; residual (optional, second argument of the forward, added before
    the activation) and output ``[N, out_channels, Ho, Wo]``. Gated channels are exactly zero.

    Raises:
        ValueError: an argument out of range or not among its choices.

    Example:
        >>> layer = GatedConv2d(3, 8, 3, padding=1, mass=0.9)
        >>> layer(torch.rand(2, 3, 8, 8)).shape, layer.gate_loss.dim()
        (torch.Size([2, 8, 8, 8]), 0)

    Source: FTWT, section 3.
    """

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "relu",
        norm: bool = True,
        mass: float = 0.95,
        mode: str = "mass",
        pool: str = "max",
        softmax: bool = True,
        coupling: str = "decoupled",
        min_keep: int = 1,
    ) -> None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **where)
        head = GateHead(in_channels, out_channels, pool, softmax, min_keep, **where)
        super().__init__(head, activation=activation, mass=mass, mode=mode, coupling=coupling)
        self.padding = _explicit_padding(conv)
        self.conv = conv
        self.norm = nn.BatchNorm2d(out_channels, **where) if norm else None

    @classmethod
    def from_modules(
        cls,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None = None,
        activation: str = "identity",
        *,
        mass: float = 0.95,
        mode: str = "mass",
        pool: str = "max",
        softmax: bool = True,
        coupling: str = "decoupled",
        min_keep: int = 1,
    ) -> GatedConv2d:
        """A gated layer around existing modules, which it takes over as they are.

        Raises:
            TypeError: ``conv`` is no ``Conv2d``, or ``norm`` is neither None nor a ``BatchNorm2d``. (A
                ``SyncBatchNorm`` is not: the fused epilogue takes the statistics of its own process.)
            ValueError: a padding mode other than zeros, or a norm of another width.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"GatedConv2d: conv must be a Conv2d, got {type(conv).__name__}")
        if norm is not None and type(norm) is not nn.BatchNorm2d:
            raise TypeError(f"GatedConv2d: norm must be a BatchNorm2d or None, got {type(norm).__name__}")
        if norm is not None and norm.num_features != conv.out_channels:
            expected = f"the {conv.out_channels} channels of the convolution"
            raise ValueError(f"GatedConv2d: norm must have {expected}, got {norm.num_features}")
        layer = cls.__new__(cls)  # the constructor would make new weights
        where: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        head = GateHead(conv.in_channels, conv.out_channels, pool, softmax, min_keep, **where)
        Gated.__init__(layer, head, activation=activation, mass=mass, mode=mode, coupling=coupling)
        layer.padding = _explicit_padding(conv)
        layer.conv, layer.norm = conv, norm
        return layer.train(conv.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if input.dim() != 4:
            raise ValueError(f"GatedConv2d: input must have shape [N, C, H, W], got {list(input.shape)}")
        _check_channels("GatedConv2d", "channels", self.conv.in_channels, input)
        gate = self._predict(input)
        output, peak = self._convolve(input, residual, self._mask(gate))
        if self.force == "target":
            output = output * self._target(peak)[:, :, None, None]
        if self.training:
            self._record(gate.logits, peak)
        return output

    def _peak(self, *args: Tensor) -> Tensor:
        residual = args[1] if len(args) > 1 else None
        return self._convolve(args[0], residual, None, update=False)[1]

    def _convolve(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, update: bool = True
    ) -> tuple[Tensor, Tensor]:
        conv, norm = self.conv, self.norm
        if norm is not None and type(norm) is not nn.BatchNorm2d:
            raise TypeError(f"GatedConv2d: norm must be a BatchNorm2d, got {type(norm).__name__}")
        bias = conv.bias if norm is not None else None  # without a norm, the epilogue adds it
        z = F.conv2d(input, conv.weight, bias, conv.stride, list(self.padding), conv.dilation, conv.groups)
        if residual is not None:
            residual = residual.to(z.dtype)  # under autocast the shortcut may still be fp32
        if norm is None:
            statistics, training, eps = _neutral(conv), False, 0.0
        else:
            statistics, eps = (*_affine(norm), norm.running_mean, norm.running_var), norm.eps
            training = norm.training or norm.running_mean is None
        output, peak, mean, var = ops.gated_norm_act(
            z, *statistics, residual=residual, mask=mask, activation=self.activation, training=training, eps=eps
        )
        if update and norm is not None and norm.training and norm.running_mean is not None:
            _update_running(norm, mean, var, z.numel() // max(z.shape[1], 1))
        return output, peak

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The convolution with the batch norm folded into weight and bias; a copy, without gate and activation."""
        conv, norm = self.conv, self.norm
        weight = conv.weight.double()
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.double()
        if norm is not None:
            if norm.running_mean is None or norm.running_var is None:
                raise ValueError("GatedConv2d: a norm without running statistics cannot be folded into the weights")
            gain, shift = _affine(norm)
            scale = gain.double() * (norm.running_var.double() + norm.eps).rsqrt()
            weight = weight * scale[:, None, None, None]
            bias = shift.double() + (bias - norm.running_mean.double()) * scale
        folded = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            cast("tuple[int, int]", conv.kernel_size),
            cast("tuple[int, int]", conv.stride),
            self.padding,
            cast("tuple[int, int]", conv.dilation),
            conv.groups,
            device="meta",
        )
        folded.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
        folded.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
        return folded.eval()

    def deploy(self) -> DeployedGatedConv2d:
        return DeployedGatedConv2d(self.fold(), copy.deepcopy(self.head), self.activation)


class DeployedGatedConv2d(nn.Module):
    """A gated convolution that computes the predicted channels only; made by :meth:`GatedConv2d.deploy`.

    It owns the folded weights and nothing else: there are no unfolded weights behind it that could change and
    leave it stale. The input's support is measured by the pooling pass, which has to read every element
    anyway. So it is exact whatever stands between two layers: a residual sum, a concatenation, a pooling.

    Shape: as :class:`GatedConv2d`.
    """

    def __init__(self, conv: nn.Conv2d, head: GateHead, activation: str) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.head = head.requires_grad_(False)
        self.activation, self.groups = activation, conv.groups
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.padding = list(cast("tuple[int, int]", conv.padding))
        self.eval()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        operator, args = OPERATORS["gated_conv2d"], self._arguments(input, residual)
        # The head has checked the input, and all else is this layer's own: to validate again would take as long as a
        # small convolution.
        result: Tensor = operator.run(*args) if residual is None else operator(*args)
        return result

    def _arguments(self, input: Tensor, residual: Tensor | None) -> tuple[Any, ...]:
        gate: Gate = self.head(input)
        selection = (gate.in_index, gate.in_count, gate.out_index, gate.out_count)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        # in_index is the exact support, hence the other channels are zero in memory: masked_input
        return input, self.weight, self.bias, residual, *selection, *geometry, self.activation, True, False, 0

    def explain(self, input: Tensor, residual: Tensor | None = None) -> str:
        """Which kernel runs on this input, and why."""
        return kernel_for(OPERATORS["gated_conv2d"], self._arguments(input, residual))

    def extra_repr(self) -> str:
        out, per_group, *kernel = self.weight.shape
        shape = f"{per_group * self.groups}, {out}, kernel_size={tuple(kernel)}, stride={tuple(self.stride)}"
        return f"{shape}, padding={tuple(self.padding)}, groups={self.groups}, activation={self.activation}"


class GatedLinear(Gated):
    """Linear layer, activation and gate: the trainable form. Constructed like ``nn.Linear``.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        activation, mass, mode, softmax, coupling, min_keep: as in :class:`GatedConv2d`.
        rank: of the head (see :class:`GateHead`). A full head costs as much as the layer; the default is an
            eighth of the smaller side.
        storage: how :meth:`deploy` lays out the weight. ``"out"``: row by row, so that a skipped output saves
            its bytes; ``"in"``: column by column, so that a zero input does.

    Shape: input ``[N, in_features]``, output ``[N, out_features]``. Gated features are exactly zero.

    Raises:
        ValueError: an argument out of range or not among its choices, or an input that is not 2-D.

    Example:
        >>> layer = GatedLinear(16, 8)
        >>> layer(torch.rand(2, 16)).shape
        torch.Size([2, 8])

    Source: FTWT, section 3, applied to linear layers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "relu",
        mass: float = 0.95,
        mode: str = "mass",
        softmax: bool = True,
        coupling: str = "decoupled",
        min_keep: int = 1,
        rank: int | None = None,
        storage: str = "out",
    ) -> None:
        if storage not in ("out", "in"):
            raise ValueError(f"GatedLinear: storage must be one of out, in, got {storage!r}")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        rank = max(1, min(in_features, out_features) // 8) if rank is None else rank
        head = GateHead(in_features, out_features, "max", softmax, min_keep, rank, **where)
        super().__init__(head, activation=activation, mass=mass, mode=mode, coupling=coupling)
        self.linear = nn.Linear(in_features, out_features, bias, **where)
        self.storage = storage

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            raise ValueError(f"GatedLinear: input must have shape [N, in_features], got {list(input.shape)}")
        _check_channels("GatedLinear", "features", self.linear.in_features, input)
        gate = self._predict(input)
        output, peak = self._activate(input)
        if self.training:
            self._record(gate.logits, peak)
        mask = self._target(peak) if self.force == "target" else self._mask(gate)
        return output if mask is None else output * mask

    def _peak(self, *args: Tensor) -> Tensor:
        return self._activate(*args)[1]

    def _activate(self, input: Tensor) -> tuple[Tensor, Tensor]:
        output = self.linear(input)
        if self.activation != "identity":
            output = F.relu(output) if self.activation == "relu" else F.relu6(output)
        return output, output.detach().abs()

    def deploy(self) -> DeployedGatedLinear:
        return DeployedGatedLinear(self.linear, copy.deepcopy(self.head), self.activation, self.storage)


class DeployedGatedLinear(nn.Module):
    """A gated linear layer that computes the predicted outputs only, from the non-zero inputs only.

    Made by :meth:`GatedLinear.deploy`. ``weight`` is stored ``[out, in]``, or ``[in, out]`` if ``storage`` is
    ``"in"``.
    """

    def __init__(self, linear: nn.Linear, head: GateHead, activation: str, storage: str) -> None:
        super().__init__()
        weight = linear.weight.detach().t() if storage == "in" else linear.weight.detach()
        self.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.head = head.requires_grad_(False)
        self.activation, self.storage = activation, storage
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = OPERATORS["gated_linear"].run(*self._arguments(input))  # the head has checked the input
        return result

    def _arguments(self, input: Tensor) -> tuple[Any, ...]:
        gate: Gate = self.head(input)
        weight = self.weight.t() if self.storage == "in" else self.weight
        return input, weight, self.bias, gate.in_index, gate.in_count, gate.out_index, gate.out_count, self.activation

    def explain(self, input: Tensor) -> str:
        """Which kernel runs on this input, and why."""
        return kernel_for(OPERATORS["gated_linear"], self._arguments(input))

    def extra_repr(self) -> str:
        out, in_ = reversed(self.weight.shape) if self.storage == "in" else self.weight.shape
        return f"{in_}, {out}, activation={self.activation}, storage={self.storage}"


def _explicit_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The padding in pixels, which ``nn.Conv2d`` also takes as a word."""
    if conv.padding_mode != "zeros":
        raise ValueError(f"GatedConv2d: padding_mode must be 'zeros', got {conv.padding_mode!r}")
    if not isinstance(conv.padding, str):
        return cast("tuple[int, int]", tuple(conv.padding))
    if conv.padding == "valid":
        return 0, 0
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise ValueError(f"GatedConv2d: padding='same' needs an odd kernel, got kernel_size={conv.kernel_size}")
    return total[0] // 2, total[1] // 2


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    if norm.affine:
        return norm.weight, norm.bias
    ones = torch.ones(norm.num_features, device=None if norm.running_mean is None else norm.running_mean.device)
    return ones, torch.zeros_like(ones)


def _neutral(conv: nn.Conv2d) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weight, bias, mean and variance of a batch norm that adds the convolution's bias and does nothing else."""
    ones = torch.ones(conv.out_channels, device=conv.weight.device)
    zeros = torch.zeros_like(ones)
    return ones, zeros if conv.bias is None else conv.bias, zeros, ones


@torch.no_grad()
def _update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """As ``nn.BatchNorm2d``: the unbiased variance, an exponential or (``momentum=None``) a cumulative average."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    unbiased = var * (count / max(count - 1, 1))
    momentum = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked.to(mean.dtype)
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.copy_(running + (value - running) * momentum)
