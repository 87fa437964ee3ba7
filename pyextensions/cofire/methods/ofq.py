# SPDX-License-Identifier: Apache-2.0
"""OFQ: transformers with weights and activations of few bits, trained without weights that oscillate.

Rounding has no derivative, so training takes that of the identity; a weight whose best value lies between two levels then
jumps to and fro between them until the end. The method's three parts remove causes of it: weight scales that are statistics
and no parameters, query and key quantised as one matrix, and a last phase in which only weights near a boundary move.

Source: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.methods.attention import KEY_HEADS, OBSTACLES, edges_of
from cofire.methods.base import Method, Report, bare, evaluation, first_input, matches, replace_modules
from cofire.methods.deployed import Timing, deployed_error, latency_of
from cofire.names import near_matches
from cofire.nn.lowbit import QuantLinear, linear_layers
from cofire.nn.statsq import (
    WEIGHTS,
    LSQActivation,
    Quantized,
    QueryKey,
    ReparameterizedAttention,
    StatsQConv2d,
    StatsQLinear,
    check_boundary_range,
)
from cofire.ops.checks import check_choice, check_integer, check_module, check_number

ACTIVATION_SCALES = ("token", "tensor")
#: A weight oscillates if the moving average of its reversals is above this.
OSCILLATING = 0.02
#: An input that stays above minus this share of its maximum (as GELU's does) counts as unsigned.
NEGATIVE_SHARE = 0.25


@dataclass(frozen=True)
class OFQLayer(Report):
    """One quantised matrix: a linear layer's or a convolution's weight, or the product of query and key."""

    name: str
    shape: tuple[int, ...]
    bits: int
    kind: str
    dense_bytes: int
    packed_bytes: int
    oscillating: float  #: share of the weights whose moving average of reversals is above 0.02
    near_boundary: float  #: share of the weights that annealing lets move


@dataclass(frozen=True)
class OFQReport(Report):
    """What quantisation saves, and how many weights oscillate. The product of query and key has ``heads C^2`` entries
    where their weights had ``2 C^2``: its bytes count as they are."""

    dense_bytes: int  #: of the weights that the quantised matrices stand for
    packed_bytes: int
    model_dense_bytes: int  #: with everything else in the model
    model_packed_bytes: int  #: of the finalized network
    bits_per_weight: float  #: packed, per weight of the dense layers
    oscillating: float  #: share of all quantised weights
    near_boundary: float
    annealing: bool
    steps: int
    deployed_error: float | None  #: largest difference of the outputs, over the largest output; None without batches
    #: Share of samples whose outputs are the same to 1e-5 of the largest. In the others the two networks' products, added in
    #: another order, fell to different sides of the boundary where an activation is rounded.
    deployed_equal: float | None
    latency: Timing | None
    layers: list[OFQLayer]
    unquantized: list[str]  #: convolutions that stay as they are: all but a first and a last one


@dataclass(frozen=True)
class OFQ(Method, name="ofq"):
    """Oscillation-free quantisation of a transformer's linear layers and attention.

    Args:
        weight_bits: 1 to 8 (2 to 8 for "lsq").
        activation_bits: 2 to 8, by learned step sizes; None: activations stay as they are.
        weights: "statsq": levels on twice the mean magnitude of a row. "lsq": a learned scale per row, the control.
        qkr: quantise query and key of each attention as one matrix per head (query-key reparameterisation).
        activation_scale: "token": each position has a scale (each position and head, in attention; each channel for the
            values). "tensor": one scale per layer.
        edge_bits: bits of weights and activations of the first and the last layer (in the order of the modules, attention and
            convolutions among them) where they are linear or an ``nn.Conv2d``, as the embedding of patches often is, both by
            learned step sizes; None: linear ones like the others, convolutions as they are.
        skip: names or patterns of layers and attentions that are left alone; of convolutions those at the edges.
        distill: weight of the cross entropy with the teacher's probabilities; 0: no teacher. The paper's loss is this and
            the cross entropy with the labels, which is the task's.
        boundary_range: in annealing a weight moves if it is within so many quantisation steps of a boundary between two
            levels; between 0 and 0.5. The paper studies 0.003 to 0.01.
        anneal_at: the step at which annealing begins by itself; None: with :meth:`anneal`.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.

    Example:
        >>> from cofire.models import digits_vit
        >>> method = OFQ(weight_bits=2, activation_bits=4)
        >>> x, y = torch.randn(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> model = method.prepare(digits_vit(), example_input=x)
        >>> output = model(x)
        >>> loss = F.cross_entropy(output, y) + method.loss(model, output)
        >>> loss.backward(); method.step(model)
        >>> method.anneal(model)  # the last epochs
        >>> packed = method.finalize(model)

    Source: Liu et al. 2023, sections 4.1 (StatsQ), 4.2 (confidence-guided annealing) and 4.3 (query-key
    reparameterisation). In the authors' code annealing leaves query and key out; here it acts on their product: see
    :class:`cofire.nn.QueryKey`. Frozen weights get a gradient of zero, so that AdamW's moments of them decay, as there;
    :meth:`keep_moments` keeps them.
    """

    weight_bits: int = 2
    activation_bits: int | None = 4
    weights: str = "statsq"
    qkr: bool = True
    activation_scale: str = "token"
    edge_bits: int | None = 8
    skip: Sequence[str] = ()
    distill: float = 1.0
    boundary_range: float = 0.005
    anneal_at: int | None = None

    def __post_init__(self) -> None:
        check_choice("OFQ", "weights", self.weights, WEIGHTS)
        check_choice("OFQ", "activation_scale", self.activation_scale, ACTIVATION_SCALES)
        least = 1 if self.weights == "statsq" else 2
        for argument, value, low in (
            ("weight_bits", self.weight_bits, least),
            ("activation_bits", self.activation_bits, 2),
            ("edge_bits", self.edge_bits, 2),
        ):
            if value is None and argument != "weight_bits":
                continue
            check_integer("OFQ", **{argument: value})
            if value is not None and not low <= value <= 8:
                raise ValueError(f"OFQ: {argument} must be between {low} and 8, got {value}")
        check_boundary_range("OFQ", self.boundary_range)
        check_number("OFQ", distill=self.distill)
        if not 0 <= self.distill < float("inf"):
            raise ValueError(f"OFQ: distill must not be negative, got {self.distill}")
        if (
            isinstance(self.skip, str)
            or not isinstance(self.skip, Collection)
            or not all(isinstance(p, str) for p in self.skip)
        ):
            raise TypeError(f"OFQ: skip must be a sequence of names or patterns, got {self.skip!r}")
        if self.anneal_at is not None:
            check_integer("OFQ", anneal_at=self.anneal_at)
            if self.weights != "statsq":
                raise ValueError(f"OFQ: anneal_at needs weights 'statsq', got {self.weights!r}")
            if self.anneal_at < 1:
                raise ValueError(
                    f"OFQ: anneal_at must be at least 1 (annealing refines a trained network), got {self.anneal_at}"
                )

    # ---------------------------------------------------------------------------------------------- protocol

    def prepare(
        self, model: nn.Module, example_input: Tensor | None = None, teacher: nn.Module | None = None
    ) -> nn.Module:
        """A copy of ``model`` with quantised layers, and beside it, for training, the teacher.

        An attention is reparameterised if it has ``num_heads``, linear layers ``q``, ``k`` and ``v`` (or ``qkv``) and
        ``proj``, takes one argument and computes ``proj(softmax(q k^T factor) v)``, as those of
        :mod:`cofire.models` and of timm's plain vision transformers do; ``factor`` is its ``scale``, or one over the root of
        a head's width. The biases of query and key are dropped. The other linear layers (exactly ``nn.Linear``, with a
        weight of their own) are quantised one by one. Of the convolutions those at the edges are (exactly ``nn.Conv2d``,
        with one scale for the whole input): the method has no others, and they stay as they are.

        Args:
            model: a trained network.
            example_input: a batch of inputs, best of training data. It says how many positions each layer sees, where
                activations are not negative, and what the first scales are; and attention is checked to be what it has to
                be. Without it, "token" scales are not possible, and the first batch gives the scales.
            teacher: gives the probabilities to learn from; default: ``model`` itself, in full precision.

        Returns:
            The network; with ``distill``, inside a :class:`Distilled`.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: prepared already, nothing to quantise, no attention for ``qkr`` or one that it is not valid for
                (rotary positions, fewer heads of keys than of queries, a bias inside the softmax), a pattern that fits
                nothing, no ``example_input`` for "token".
        """
        check_module("OFQ.prepare", model)
        if _layers(model) or _activations(model) or isinstance(bare(model), Distilled):
            raise ValueError("OFQ.prepare: the model is prepared already; prepare the network that it was made from")
        if teacher is not None:
            check_module("OFQ.prepare: teacher", teacher)
            if self.distill == 0:
                raise ValueError("OFQ.prepare: teacher is of no use with distill=0")
        if example_input is None and self.activation_bits is not None and self.activation_scale == "token":
            raise ValueError(
                "OFQ.prepare: example_input must be a batch of inputs, got None: each position has a scale "
                "(activation_scale 'token'), and how many there are must be seen; 'tensor' needs none"
            )
        student = copy.deepcopy(bare(model))
        seen = _Seen(student, example_input)
        student = self._replace(student, seen)
        if example_input is not None:
            with evaluation(student), torch.no_grad():
                student(example_input)  # the scales' first values
        if self.distill == 0:
            return student
        return Distilled(student, copy.deepcopy(bare(model if teacher is None else teacher))).train(model.training)

    def loss(self, model: nn.Module, output: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """Cross entropy between the teacher's probabilities and the network's, over dimension 1, times ``distill``.

        Without a teacher zero, as a leaf of its own.

        Raises:
            ValueError: not prepared, no ``output``, no forward in training mode yet, or outputs that do not fit.
        """
        layers = self._require(model, "loss")
        root = bare(model)
        if not isinstance(root, Distilled):
            weight = layers[next(iter(layers))].quantizer.oscillation
            return torch.zeros((), device=weight.device, requires_grad=True)
        if root.logits is None:
            raise ValueError("OFQ.loss: the model has seen no forward in training mode; call model(x) first")
        if not isinstance(output, Tensor):
            raise ValueError("OFQ.loss: output must be what model(x) returned, to be compared with the teacher's")
        if output.shape != root.logits.shape:
            raise ValueError(
                f"OFQ.loss: output must have the shape of the teacher's, {list(root.logits.shape)}, got "
                f"{list(output.shape)}; it must be of the last forward"
            )
        return self.distill * F.cross_entropy(output.float(), root.logits.float().softmax(1))

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Count one optimiser step: put back frozen weights, track the integers, begin annealing when it is time."""
        layers = self._require(model, "step")
        for layer in layers.values():
            layer.step()
        first = next(iter(layers.values())).quantizer
        if self.anneal_at is not None and first.count == self.anneal_at:
            self.anneal(model)

    def anneal(self, model: nn.Module, on: bool = True) -> None:
        """Begin (or end) confidence-guided annealing: from now on only weights near a boundary between two levels move.

        Meant for a few last epochs on a trained network. It acts on the weights that are quantised by StatsQ, query and key
        included; biases, norms and activation scales train on.

        Raises:
            ValueError: not prepared, weights by learned step sizes, or a network that has not been trained.
        """
        layers = self._require(model, "anneal")
        chosen = [layer for layer in layers.values() if layer.quantizer.kind == "statsq"]
        if not chosen:
            raise ValueError("OFQ.anneal: annealing needs weights quantised by StatsQ; prepare with weights='statsq'")
        if on and chosen[0].quantizer.count == 0:
            raise ValueError(
                "OFQ.anneal: annealing refines a network trained with StatsQ, got one without a step of training; train it, "
                "or load the state of one"
            )
        for layer in chosen:
            layer.anneal(on)

    def keep_moments(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> KeptMoments:
        """From now on the optimiser's moments of weights that annealing freezes stay what they are.

        Otherwise a frozen weight's gradient is zero, so that its moments decay, and one that becomes free begins with what is
        left of them. It acts by hooks on ``optimizer.step()``, which are no part of the state: call it again after
        resuming.

        Args:
            model: a prepared model.
            optimizer: of its parameters; anything of their shapes in its state counts as a moment.

        Returns:
            What :meth:`~KeptMoments.remove` ends it by.

        Raises:
            TypeError: ``optimizer`` is none.
            ValueError: not prepared.

        Example:
            >>> method = OFQ(qkr=False, activation_scale="tensor", edge_bits=None, distill=0)
            >>> model = method.prepare(nn.Linear(8, 4))
            >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            >>> kept = method.keep_moments(model, optimizer)  # before the last epochs
            >>> kept.remove()  # after them
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"OFQ.keep_moments: optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        return KeptMoments(self._require(model, "keep_moments").values(), optimizer)

    def finalize(self, model: nn.Module, integer: bool = False) -> nn.Module:
        """A copy of the quantised network in evaluation mode with packed integer weights, without the teacher.

        Activations are still rounded by their learned scales. Shifts after the rounding become part of the biases, where a
        product alone sees them.

        Args:
            model: a prepared model.
            integer: multiply rounded activations and weights as integers, where activations have integers of at most 127
                (7 bits, at the edges not the usual 8). Otherwise the products take the rounded activations as floats. The
                values are the same but for rounding errors; the products of two activations, in attention, are of floats
                either way.

        Raises:
            ValueError: not prepared, finalized already, or activation scales that no batch has set yet.
        """
        self._require(model, "finalize")
        for name, activation in _activations(_student(model)).items():
            if not activation.initialized:
                raise ValueError(f"OFQ.finalize: the scales of {name!r} have no values yet; run a batch first")
        return _deployed(model, integer)

    # ------------------------------------------------------------------------------------------------ report

    def report(
        self, model: nn.Module, batches: Iterable[Any] = (), latency: bool = False, integer: bool = False
    ) -> OFQReport:
        """Bytes, oscillation, and whether the deployed network equals the trained one.

        Args:
            model: a prepared model.
            batches: batches of inputs, or of tuples that begin with them: to compare the outputs.
            latency: also time the finalized network against the teacher, on the first batch.
            integer: of the finalized network, as in :meth:`finalize`.

        Raises:
            ValueError: not prepared; ``latency`` without a batch or without a teacher.
        """
        layers = [_examine(name, layer) for name, layer in self._require(model, "report").items()]
        student, root = _student(model), bare(model)
        inputs = [first_input(batch) for batch in batches]
        deployed = _deployed(model, integer)
        final = deployed if all(a.initialized for a in _activations(student).values()) else None
        error, equal, timing = None, None, None
        if inputs and final is not None:
            error, equal = deployed_error(student, final, inputs)
        if latency:
            if not isinstance(root, Distilled) or not inputs or final is None:
                raise ValueError("OFQ.report: latency needs a teacher to compare with (distill), and a batch")
            timing = latency_of(root.teacher, final, inputs[0])
        dense, packed = sum(layer.dense_bytes for layer in layers), sum(layer.packed_bytes for layer in layers)
        everything = _layers(student).values()
        count = sum(layer.weights for layer in everything)
        others = _bytes(student, (LSQActivation, Quantized))
        biases = sum(p.nbytes for layer in everything for n, p in layer.named_parameters(recurse=False) if n == "bias")
        first = next(iter(everything)).quantizer
        return OFQReport(
            dense_bytes=dense,
            packed_bytes=packed,
            model_dense_bytes=others + biases + dense,
            model_packed_bytes=_bytes(deployed, (QuantLinear,))
            + sum(m.nbytes for m in deployed.modules() if isinstance(m, QuantLinear)),
            bits_per_weight=8 * packed / sum(sum(getattr(x, n).numel() for n in x.factors) for x in everything),
            oscillating=sum(x.oscillating * y.weights for x, y in zip(layers, everything, strict=True)) / count,
            near_boundary=sum(x.near_boundary * y.weights for x, y in zip(layers, everything, strict=True)) / count,
            annealing=any(layer.quantizer.annealing for layer in everything),
            steps=first.count,
            deployed_error=error,
            deployed_equal=equal,
            latency=timing,
            layers=layers,
            unquantized=[n for n, m in student.named_modules() if isinstance(m, nn.modules.conv._ConvNd)],
        )

    # ----------------------------------------------------------------------------------------------- surgery

    def _require(self, model: nn.Module, where: str) -> dict[str, Quantized]:
        check_module(f"OFQ.{where}", model)
        layers = _layers(_student(model))
        if not layers:
            done = any(isinstance(module, (LSQActivation, ReparameterizedAttention)) for module in model.modules())
            state = "is finalized already" if done else "has no quantised layer; call prepare(model) first"
            raise ValueError(f"OFQ.{where}: the model {state}")
        return layers

    def _replace(self, model: nn.Module, seen: _Seen) -> nn.Module:
        found = {name: _attention(name, m) for name, m in model.named_modules() if self.qkr and _is_attention(m)}
        kinds = (nn.Linear, nn.Conv2d)
        plain = {n: m for n, m in linear_layers(model, also=kinds) if isinstance(m, kinds)}
        convolutions = {n for n, m in plain.items() if isinstance(m, nn.Conv2d)}
        attentions = {name: parts for name, parts in found.items() if not self._skipped(name)}
        edges = edges_of(model, attentions) if self.edge_bits is not None and (plain or attentions) else set()
        self._check_skip([*found, *(n for n in plain if n not in convolutions - edges)])
        if self.qkr and not attentions:
            raise ValueError(
                "OFQ.prepare: there is no attention to reparameterise (one has num_heads, linear layers q, k, v or qkv, and "
                "proj); qkr=False quantises the linear layers alone"
            )
        inside = {id(m) for name in attentions for m in model.get_submodule(name).modules()}
        layers = {n: m for n, m in plain.items() if id(m) not in inside and not self._skipped(n)}
        if not layers.keys() - convolutions and not attentions:
            raise ValueError("OFQ.prepare: there is no layer to quantise: no nn.Linear that skip leaves")
        new: dict[int, nn.Module] = {}
        for name, parts in attentions.items():
            seen.check(name, model.get_submodule(name), parts)
            new[id(model.get_submodule(name))] = self._reparameterized(name, parts, seen)
        for name, module in layers.items():
            if isinstance(module, nn.Linear):
                new[id(module)] = self._linear(module, name, seen, edge=name in edges).train(module.training)
            elif isinstance(module, nn.Conv2d) and name in edges:
                new[id(module)] = self._convolution(module, name, seen).train(module.training)
        return replace_modules(model, new)

    def _check_skip(self, known: Sequence[str]) -> None:
        for pattern in self.skip:
            if not matches(known, pattern):
                raise ValueError(
                    f"OFQ.prepare: skip names {pattern!r}, which fits no layer or attention that can be quantised"
                    f"{near_matches(pattern, known)}"
                )

    def _skipped(self, name: str) -> bool:
        return any(matches([name], pattern) for pattern in self.skip)

    def _linear(self, linear: nn.Linear, name: str, seen: _Seen, edge: bool = False) -> StatsQLinear:
        bits, kind, activation_bits = self.weight_bits, self.weights, self.activation_bits
        if edge:
            assert self.edge_bits is not None
            bits, kind = self.edge_bits, "lsq"
            activation_bits = None if activation_bits is None else self.edge_bits
        input = self._activation(activation_bits, linear, features=linear.in_features, **seen.of(name))
        return StatsQLinear(linear, bits, kind, input=input, boundary_range=self.boundary_range)

    def _convolution(self, conv: nn.Conv2d, name: str, seen: _Seen) -> StatsQConv2d:
        """One at the edge."""
        assert self.edge_bits is not None
        bits = None if self.activation_bits is None else self.edge_bits
        # (a scale per channel or place, and shifts, would need more than a tensor's last dimensions)
        input = self._activation(bits, conv, **seen.of(name) | {"positions": None})
        return StatsQConv2d(conv, self.edge_bits, "lsq", input=input, boundary_range=self.boundary_range)

    def _activation(
        self,
        bits: int | None,
        like: nn.Linear | nn.Conv2d,
        *,
        positions: int | None,
        parts: int = 1,
        axis: int = -2,
        **options: Any,
    ) -> LSQActivation | None:
        """``positions``: how many scales there are along ``axis``, in each of ``parts``; None: one in all."""
        if bits is None:
            return None
        if positions is not None and self.activation_scale == "token":
            options |= {"scales": positions * parts, "axis": axis, "parts": parts}
        return LSQActivation(bits, device=like.weight.device, dtype=like.weight.dtype, **options)

    def _reparameterized(self, name: str, parts: _Attention, seen: _Seen) -> ReparameterizedAttention:
        heads, positions, bits = parts.heads, seen.of(name)["positions"], self.activation_bits
        width, out = parts.v.in_features, parts.v.out_features
        options: dict[str, Any] = {"boundary_range": self.boundary_range}

        def rounding(**more: Any) -> nn.Module:
            made = self._activation(bits, parts.proj, **more)
            return nn.Identity() if made is None else made

        inner = f"{name}.proj" if name else "proj"
        per_channel = None if positions is None else out
        return ReparameterizedAttention(
            QueryKey(parts.query, parts.key, heads, self.weight_bits, self.weights, **options),
            StatsQLinear(parts.v, self.weight_bits, self.weights, **options),
            self._linear(parts.proj, inner, seen),
            heads,
            parts.factor,
            input=rounding(positions=positions, features=width),
            qk_output=rounding(positions=positions, features=heads * width, parts=heads),
            v_output=rounding(positions=per_channel, features=out, axis=-1),
            softmax=rounding(positions=positions, unsigned=True),
            attn_drop=parts.attn_drop,
            proj_drop=parts.proj_drop,
        ).train(parts.proj.training)


class KeptMoments:
    """Hooks on an optimiser that keep what it remembers of frozen weights; :meth:`OFQ.keep_moments` makes them."""

    def __init__(self, layers: Iterable[Quantized], optimizer: torch.optim.Optimizer) -> None:
        self.layers = list(layers)
        self.kept: list[
            tuple[Tensor, str, Tensor, Tensor]
        ] = []  # parameter, name, what may move, moment before the step
        self.hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """From now on moments decay."""
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.kept = []
        for layer in self.layers:
            if not layer.quantizer.annealing:
                continue
            factors = [getattr(layer, name) for name in layer.factors]
            for p, free in zip(factors, layer.movable(*(p.detach() for p in factors)), strict=True):
                moments = {n: m for n, m in optimizer.state.get(p, {}).items() if isinstance(m, Tensor)}
                self.kept += [(p, n, free, m.clone()) for n, m in moments.items() if m.shape == p.shape]

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for p, name, free, before in self.kept:
            moment = optimizer.state[p][name]
            moment.copy_(torch.where(free, moment, before))
        self.kept = []


# ------------------------------------------------------------------------------------------------------ distillation


class Distilled(nn.Module):
    """A network and its teacher, which is run on the same input in training mode.

    The teacher is frozen, stays in evaluation mode, and is part of the state, so that training resumes exactly.

    Args:
        student, teacher: networks that take the same arguments.

    Attributes:
        logits: what the teacher returned at the last forward in training mode, or None.

    Example:
        >>> model = Distilled(nn.Linear(4, 2), nn.Linear(4, 2))
        >>> model(torch.rand(3, 4)).shape, model.logits.shape
        (torch.Size([3, 2]), torch.Size([3, 2]))
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.logits: Tensor | None = None

    def train(self, mode: bool = True) -> Distilled:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            with torch.no_grad():
                self.logits = self.teacher(*args, **kwargs)
        return self.student(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "logits": None}


# --------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Attention:
    """What an attention consists of."""

    query: Tensor  #: weight ``[heads * d, C]``
    key: Tensor
    v: nn.Linear
    proj: nn.Linear
    heads: int
    factor: float
    attn_drop: nn.Module | None
    proj_drop: nn.Module | None


def _is_attention(module: nn.Module) -> bool:
    children = dict(module.named_children())
    linear = {name for name, child in children.items() if isinstance(child, nn.Linear)}
    named = "qkv" in linear or {"q", "k", "v"} <= linear
    return named and "proj" in linear and isinstance(getattr(module, "num_heads", None), int)


def _attention(name: str, module: nn.Module) -> _Attention:
    """The parts of an attention, or a sentence on why it cannot be reparameterised."""
    where = f"OFQ.prepare: attention {name!r}"
    heads, children = int(module.num_heads), dict(module.named_children())  # type: ignore[arg-type]
    for obstacle, attributes in OBSTACLES.items():
        for attribute in attributes:
            if not isinstance(getattr(module, attribute, None), (type(None), nn.Identity)):
                raise ValueError(
                    f"{where} has {obstacle} ({attribute!r}), so its logits are no product of one matrix with the inputs; "
                    "leave it out by skip, or set qkr=False"
                )
    proj = children["proj"]
    assert isinstance(proj, nn.Linear)
    biases: list[Tensor | None]
    if "qkv" in children:
        fused = children["qkv"]
        assert isinstance(fused, nn.Linear)
        rows = [fused.out_features // 3] * 3 if fused.out_features == 3 * proj.in_features else []
        trained = fused.weight.requires_grad
        weights: list[Tensor] = [
            nn.Parameter(w, trained) for w in fused.weight.detach().split(rows or [fused.out_features])
        ]
        biases = [*fused.bias.detach().split(rows)] if rows and fused.bias is not None else [None] * 3
        sizes = rows or [proj.in_features, -1, -1]
    else:
        layers = [m for m in (children[n] for n in "qkv") if isinstance(m, nn.Linear)]
        weights, biases = [m.weight for m in layers], [m.bias for m in layers]
        sizes = [w.shape[0] for w in weights]
    others = [n for n in (getattr(module, a, None) for a in KEY_HEADS) if isinstance(n, int) and n != heads]
    if others or len(set(sizes)) != 1:
        found = f"{others[0]} heads" if others else f"outputs of {sizes} features"
        raise ValueError(
            f"{where} has {heads} heads of queries, and keys and values of another number ({found}): each head needs a key of "
            "its own; leave it out by skip, or set qkr=False"
        )
    if sizes[0] % heads or len({w.shape[1] for w in weights}) != 1:
        raise ValueError(
            f"{where} has {sizes[0]} features for {heads} heads, from inputs of {[w.shape[1] for w in weights]} features: "
            "they must divide evenly, and be of one input"
        )
    v = nn.Linear(weights[2].shape[1], weights[2].shape[0], biases[2] is not None, device="meta")
    v.weight = nn.Parameter(weights[2].detach(), weights[2].requires_grad)
    if biases[2] is not None:
        v.bias = nn.Parameter(biases[2].detach(), weights[2].requires_grad)
    factor = getattr(module, "scale", None)
    factor = float(factor) if isinstance(factor, (int, float)) else (sizes[0] // heads) ** -0.5
    drops = [children.get(n) for n in ("attn_drop", "proj_drop")]
    return _Attention(weights[0], weights[1], v, proj, heads, factor, *drops)


class _Seen:
    """What each layer and attention gets when the network runs on an example: shape, range, positions."""

    def __init__(self, model: nn.Module, example: Tensor | None) -> None:
        self.shapes: dict[str, set[tuple[int, ...]]] = {}
        self.ranges: dict[str, tuple[float, float]] = {}
        self.inputs: dict[str, tuple[Any, ...]] = {}  # of attentions
        if example is None:
            return
        kinds = (nn.Linear, nn.Conv2d)
        watched = {n: m for n, m in model.named_modules() if isinstance(m, kinds) or _is_attention(m)}
        hooks = [m.register_forward_pre_hook(self._hook(n), with_kwargs=True) for n, m in watched.items()]
        try:
            with evaluation(model), torch.no_grad():
                model(example)
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args or not isinstance(args[0], Tensor):
                return
            x = args[0]
            self.shapes.setdefault(name, set()).add(tuple(x.shape[1:]))
            low, high = (float(v) for v in x.aminmax())
            before = self.ranges.get(name, (low, high))
            self.ranges[name] = (min(low, before[0]), max(high, before[1]))
            if _is_attention(module):
                self.inputs.setdefault(name, (x, args[1:], kwargs))

        return look

    def of(self, name: str) -> dict[str, Any]:
        """``positions``: of a sequence, None where there is none or several lengths are seen; ``unsigned``."""
        shapes = self.shapes.get(name, set())
        (shape,) = shapes if len(shapes) == 1 else [()]
        low, high = self.ranges.get(name, (-1.0, 1.0))
        return {"positions": shape[0] if len(shape) == 2 else None, "unsigned": low >= -NEGATIVE_SHARE * high}

    @torch.no_grad()
    def check(self, name: str, module: nn.Module, parts: _Attention) -> None:
        """On the example an attention without biases of query and key is ``proj(softmax(q k^T factor) v)``."""
        if name not in self.inputs:
            return
        x, rest, kwargs = self.inputs[name]
        plain = copy.deepcopy(module).eval()
        for child, rows in (("q", None), ("k", None), ("qkv", 2 * len(parts.query))):
            layer = dict(plain.named_children()).get(child)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                layer.bias[:rows] = 0
        found = plain(x, *rest, **kwargs)
        q, k, v = (y.unflatten(-1, (parts.heads, -1)).transpose(-3, -2) for y in (
            F.linear(x, parts.query), F.linear(x, parts.key), parts.v(x)
        ))  # fmt: skip
        weights = (q @ k.transpose(-2, -1) * parts.factor).softmax(-1)
        expected = parts.proj((weights @ v).transpose(-3, -2).flatten(-2))
        tolerance = torch.finfo(x.dtype).eps ** 0.5
        same = isinstance(found, Tensor) and found.shape == expected.shape
        if not same or not torch.allclose(
            found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        ):
            raise ValueError(
                f"OFQ.prepare: attention {name!r} computes something else than proj(softmax(q k^T factor) v) on example_input "
                "(a mask, positions, another result?), so it cannot be reparameterised; leave it out by skip, or set qkr=False"
            )


# ------------------------------------------------------------------------------------------------------- internals


def _student(model: nn.Module) -> nn.Module:
    model = bare(model)
    return model.student if isinstance(model, Distilled) else model


def _layers(model: nn.Module) -> dict[str, Quantized]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def _activations(model: nn.Module) -> dict[str, LSQActivation]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LSQActivation)}


def _deployed(model: nn.Module, integer: bool) -> nn.Module:
    """The network for inference, with memory of its own."""
    result = copy.deepcopy(_student(model)).eval()
    new: dict[int, nn.Module] = {id(layer): layer.deploy(integer) for layer in _layers(result).values()}
    attentions = [m for m in result.modules() if isinstance(m, ReparameterizedAttention)]
    new |= {id(attention): attention.deploy(integer) for attention in attentions}
    return replace_modules(result, new).eval().requires_grad_(False)


@torch.no_grad()
def _examine(name: str, layer: Quantized) -> OFQLayer:
    quantizer, matrix = layer.quantizer, layer.matrix()
    return OFQLayer(
        name=name,
        shape=tuple(matrix.shape),
        bits=quantizer.bits,
        kind=quantizer.kind,
        dense_bytes=sum(getattr(layer, factor).nbytes for factor in layer.factors),
        packed_bytes=quantizer.pack(matrix).nbytes,
        oscillating=float((quantizer.oscillation > OSCILLATING).double().mean()),
        near_boundary=float(quantizer.movable(matrix).double().mean()) if quantizer.kind == "statsq" else 0.0,
    )


def _bytes(model: nn.Module, without: tuple[type[nn.Module], ...]) -> int:
    """Of parameters and buffers outside of modules of these classes."""
    inside = {id(part) for m in model.modules() if isinstance(m, without) for part in m.modules()} if without else set()
    return sum(t.nbytes for m in model.modules() if id(m) not in inside for t in _own(m))


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
