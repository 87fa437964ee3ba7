# SPDX-License-Identifier: Apache-2.0
"""FTWT: dynamic channel pruning with self-supervised masks.

Each convolution gets a head that predicts, from the layer's input, which of its channels will carry most of
the activation mass of this sample; the others are not computed. The head learns from what the layer really
produced, by binary cross entropy.

Source: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
Self-Supervised Mask Prediction", CVPR 2022.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn

from cofire.methods import tracing
from cofire.methods.base import Method, bare, evaluation
from cofire.methods.counting import Count, FlopsEstimate, GatingReport, Latency
from cofire.names import near_matches
from cofire.nn.gating import DeployedGatedConv2d, DeployedGatedLinear, Gated, GatedConv2d, GatedLinear, check_mass
from cofire.ops.checks import check_integer, check_module, check_number
from cofire.timing import interleaved

#: Names of convolution, norm and activation. The norm may be None; the activation may be None, or a function's name.
Group = tuple[str, "str | None", "str | None"]


@dataclass(frozen=True)
class FTWT(Method, name="ftwt"):
    """Fire Together Wire Together.

    Args:
        mass: share of the activation mass that a layer's target keeps, in (0, 1]; 1 drops only channels that
            never fire. A dict gives it per layer, by the name of the convolution; layers that it does not
            name are not gated.
        mode: ``"mass"``, or ``"uniform"`` (``mass`` is then the share of channels to prune in every layer).
        pool: of the head: ``"max"`` (the paper) or ``"avg"``.
        softmax: the head normalises over the channels.
        coupling: ``"decoupled"``: the heads' loss trains the heads alone. ``"joint"``: it trains the backbone
            too.
        min_keep: the fewest channels per layer and sample; without one, a single dominant channel would close
            its layer.
        gate_after_residual: in a residual block, gate the activated sum, so that the next layer's input is
            zero exactly where the mask is. Otherwise the last convolution alone, and the shortcut fills the
            channels again.
        skip_first: leave the layers that read the network's input ungated; they have few input channels.
        cooldown, total_steps: the heads' loss counts until this share of ``total_steps`` calls of
            :meth:`step`; always if ``total_steps`` is None.
        compat: ``"official"`` sets what the authors' released code does: average pooling, gates before the
            residual sum, and on the first layer too.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> from cofire.models import digits_cnn
        >>> method = FTWT(mass=0.9)
        >>> model = method.prepare(digits_cnn())
        >>> loss = model(torch.rand(2, 1, 8, 8)).sum() + method.loss(model)
        >>> loss.backward(); method.step(model)
        >>> deployed = method.finalize(model)

    Source: CVPR 2022; the loss is binary cross entropy, summed over the channels, averaged over batch and
    layers. No gradient passes the mask: the task's loss never reaches the heads.
    """

    mass: float | Mapping[str, float] = 0.95
    mode: str = "mass"
    pool: str = "max"
    softmax: bool = True
    coupling: str = "decoupled"
    min_keep: int = 1
    gate_after_residual: bool = True
    skip_first: bool = True
    cooldown: float = 0.5
    total_steps: int | None = None
    compat: str | None = None

    def __post_init__(self) -> None:
        for argument, choices in (
            ("mode", ("mass", "uniform")),
            ("pool", ("max", "avg")),
            ("coupling", ("decoupled", "joint")),
            ("compat", (None, "official")),
        ):
            value = getattr(self, argument)
            if value not in choices:
                raise ValueError(f"FTWT: {argument} must be one of {', '.join(map(str, choices))}, got {value!r}")
        for mass in self.mass.values() if isinstance(self.mass, Mapping) else [self.mass]:
            check_mass("FTWT", mass, self.mode)
        check_integer("FTWT", min_keep=self.min_keep)
        check_number("FTWT", cooldown=self.cooldown)
        if self.min_keep < 0:
            raise ValueError(f"FTWT: min_keep must not be negative, got {self.min_keep}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"FTWT: cooldown must be between 0 and 1, got {self.cooldown}")
        if self.total_steps is not None:
            check_integer("FTWT", total_steps=self.total_steps)
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"FTWT: total_steps must be at least 1, or None, got {self.total_steps}")
        if self.compat == "official":
            for argument, value in (("pool", "avg"), ("gate_after_residual", False), ("skip_first", False)):
                object.__setattr__(self, argument, value)

    # ---------------------------------------------------------------------------------------------- protocol

    def prepare(
        self, model: nn.Module, example_input: Tensor | None = None, groups: Sequence[Group] | None = None
    ) -> nn.Module:
        """A copy of ``model`` whose convolutions are gated.

        Args:
            model: a network that ``torch.fx`` can trace; the result is then a ``GraphModule`` with the same
                names.
            example_input: if given, the rewritten network with all gates open has to reproduce the output of
                ``model`` on it.
            groups: for a network that cannot be traced: which modules belong together, as triples of the
                names of convolution, norm (or None) and activation (or ``"relu"`` / ``"relu6"`` if the
                forward applies it as a function; a module whose own name is ``relu`` or ``relu6`` is taken for
                the function). Each is gated where it stands; a residual sum after it is not part of the group.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: nothing to gate, a name that the network does not have, a network prepared already or
                not traceable.
        """
        check_module("FTWT.prepare", model)
        if _gates(model) or _deployed(model):
            raise ValueError("FTWT.prepare: the model is prepared already; prepare the network that it was made from")
        result = copy.deepcopy(bare(model))
        if groups is not None:
            self._replace_named(result, groups)
        else:
            result = self._replace_traced(result)
        if example_input is not None:
            _check_equal(model, result, example_input)
        return result

    def loss(self, model: nn.Module, output: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """Binary cross entropy between predicted and target masks: summed over channels, averaged over batch
        and layers.

        Raises:
            ValueError: no gated layer, or no forward in training mode yet, or one that kept no graph.
        """
        gates = self._require_gates(model, "loss")
        terms = []
        for name, gate in gates.items():
            if gate.gate_loss is None:
                raise ValueError(f"FTWT.loss: layer {name!r} has seen no forward in training mode; call model(x) first")
            terms.append(gate.gate_loss)
        losses = torch.stack(terms)
        trainable = any(p.requires_grad for gate in gates.values() for p in gate.head.parameters())
        if torch.is_grad_enabled() and trainable and not losses.requires_grad:
            raise ValueError(
                "FTWT.loss: the last forward kept no graph, so the heads would not train: it ran under "
                "torch.no_grad, or under checkpoint(use_reentrant=True); use checkpoint(use_reentrant=False)"
            )
        if self.total_steps is not None:
            # Zero instead of absent after the cooldown, so that data parallelism still sees a gradient for every head.
            steps = torch.stack([gate.steps for gate in gates.values()])
            losses = losses * (steps < self.cooldown * self.total_steps)
        return losses.mean()

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Count one optimiser step."""
        torch._foreach_add_([gate.steps for gate in self._require_gates(model, "step").values()], 1)

    def finalize(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` in evaluation mode with batch norm folded and every gated layer in its deployed
        form.

        Raises:
            ValueError: no gated layer, or already deployed.
        """
        self._require_gates(model, "finalize")
        return _convert(model, lambda gate: gate.deploy())

    def dense(self, model: nn.Module) -> nn.Module:
        """The baseline of :meth:`finalize`: the same weights, no gates, batch norm folded, the library's kernels."""
        self._require_gates(model, "dense")
        return _convert(model, _Dense.of)

    def parameter_groups(
        self, model: nn.Module, lr: float = 0.01, weight_decay: float = 5e-4, head_lr: float = 0.1
    ) -> list[dict[str, Any]]:
        """Parameter groups for ``torch.optim.SGD``: the backbone, then the heads (own rate, no weight decay).

        The paper keeps the heads' rate constant while it schedules the backbone's:
        ``LambdaLR(optimizer, [schedule, lambda epoch: 1.0])``.
        """
        gates = self._require_gates(model, "parameter_groups")
        heads = [p for gate in gates.values() for p in gate.head.parameters()]
        known = set(map(id, heads))
        backbone = [p for p in model.parameters() if id(p) not in known]
        return [
            {"params": backbone, "lr": lr, "weight_decay": weight_decay},
            {"params": heads, "lr": head_lr, "weight_decay": 0.0},
        ]

    def recalibrate(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Measure the batch norms' running statistics anew: they depend on which channels the layers before
        let pass.

        Call it after a change of ``mass``, before :meth:`finalize`.
        """
        self._require_gates(model, "recalibrate")
        torch.optim.swa_utils.update_bn(batches, model)

    # ------------------------------------------------------------------------------------------------ report

    def estimate_flops(self, model: nn.Module, batches: Iterable[Any], **prepare: Any) -> FlopsEstimate:
        """What gating would save, before any head is trained: the target masks themselves are applied, and
        counted.

        Args:
            model: the pretrained network, not prepared.
            batches: a few batches of inputs, or of tuples that begin with them.
            prepare: further arguments of :meth:`prepare`.
        """
        prepared = self.prepare(model, **prepare)
        with target_masks(prepared):
            count = Count(prepared, batches)
        return FlopsEstimate(*count.totals())

    def report(self, model: nn.Module, batches: Iterable[Any], latency: bool = False) -> GatingReport:
        """Multiply-accumulates, kept channels, accuracy of the masks and bytes, measured on ``batches``.

        Args:
            model: a prepared model.
            batches: batches of inputs, or of tuples that begin with them.
            latency: also time the deployed network against the dense one, on the first sample.
        """
        self._require_gates(model, "report")
        model = bare(model)
        count = Count(model, batches)
        assert count.first is not None
        paper_rule, exact = count.totals()
        layers = count.layer_reports()
        bits = sum(layer.bits for layer in count.layers.values())
        return GatingReport(
            paper_rule=paper_rule,
            exact=exact,
            head_macs=sum(layer.head_macs for layer in layers),
            kept=sum(layer.kept for layer in layers if layer.gated) / sum(layer.gated for layer in layers),
            mask_accuracy=sum(layer.agreeing for layer in count.layers.values()) / max(bits, 1),
            dense_bytes=sum(layer.dense_bytes for layer in layers),
            gated_bytes=sum(layer.gated_bytes for layer in layers),
            latency=self._latency(model, count.first[:1]) if latency else None,
            layers=layers,
        )

    def _latency(self, model: nn.Module, input: Tensor) -> Latency:
        """Median of interleaved pairs; each side in the faster of the two memory formats."""
        candidates = {}
        for name, network in (("dense", self.dense(model)), ("gated", self.finalize(model))):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = input.contiguous(memory_format=layout)
                candidates[name, layout] = (copy.deepcopy(network).to(memory_format=layout), x)  # type: ignore[call-overload]
        times = interleaved(candidates)
        best = {side: min(median(taken) for (s, _), taken in times.items() if s == side) for side in ("dense", "gated")}
        return Latency(best["dense"] * 1e3, best["gated"] * 1e3, tuple(input.shape), torch.get_num_threads())

    # ----------------------------------------------------------------------------------------------- surgery

    def _require_gates(self, model: nn.Module, where: str) -> dict[str, Gated]:
        check_module(f"FTWT.{where}", model)
        gates = _gates(model)
        if not gates:
            state = "is finalized already" if _deployed(model) else "has no gated layer; call prepare(model) first"
            raise ValueError(f"FTWT.{where}: the model {state}")
        return gates

    def _options(self, name: str) -> dict[str, Any]:
        mass = self.mass[name] if isinstance(self.mass, Mapping) else self.mass
        return {
            "mass": mass,
            "mode": self.mode,
            "pool": self.pool,
            "softmax": self.softmax,
            "coupling": self.coupling,
            "min_keep": self.min_keep,
        }

    def _choose(self, names: Sequence[str], skip: Sequence[str] = ()) -> list[str]:
        """The layers to gate, of those that can be."""
        if isinstance(self.mass, Mapping):
            for name in self.mass:
                if name not in names:
                    raise ValueError(
                        f"FTWT.prepare: mass names {name!r}, which cannot be gated{near_matches(name, names)}"
                    )
            chosen = [name for name in names if name in self.mass]
        else:
            chosen = [name for name in names if name not in skip]
        if not chosen:
            why = "apart from the first, which skip_first leaves out" if names else "followed by batch norm or ReLU"
            raise ValueError(f"FTWT.prepare: no layer to gate: the network has no convolution {why}")
        return chosen

    def _replace_traced(self, model: nn.Module) -> nn.Module:
        try:
            traced = tracing.trace(model)
        except ValueError as error:
            example = 'groups=[("features.0", "features.1", "features.2"), ...]'
            raise ValueError(f"FTWT.prepare: {error}. Or name convolution, norm and activation: {example}") from error
        tracing.drop_identities(traced)
        groups = {group.name: group for group in tracing.conv_groups(traced, self.gate_after_residual)}
        depth = tracing.conv_depths(traced)
        first = [name for name, group in groups.items() if depth[group.conv] == 1] if self.skip_first else []
        for name in self._choose(list(groups), first):
            group = groups[name]
            norm = None if group.norm is None else traced.get_submodule(str(group.norm.target))
            conv = traced.get_submodule(name)
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, (nn.BatchNorm2d, type(None)))
            gated = GatedConv2d.from_modules(conv, norm, group.activation, **self._options(name))
            tracing.replace(traced, group, gated)
        return tracing.clean(traced)

    def _replace_named(self, model: nn.Module, groups: Sequence[Group]) -> None:
        modules = dict(model.named_modules())

        def find(name: str, kind: type[nn.Module]) -> Any:
            if name not in modules:
                raise ValueError(
                    f"FTWT.prepare: groups names {name!r}, a module that the model does not have"
                    f"{near_matches(name, modules)}"
                )
            if not isinstance(modules[name], kind):
                found = type(modules[name]).__name__
                raise ValueError(f"FTWT.prepare: groups expects a {kind.__name__} at {name!r}, got {found}")
            return modules[name]

        for group in groups:
            if not (isinstance(group, (tuple, list)) and len(group) == 3):
                expected = "triples of names (convolution, norm or None, activation or None)"
                raise ValueError(f"FTWT.prepare: groups must hold {expected}, got {group!r}")
        chosen = self._choose([conv for conv, _, _ in groups])
        for conv, norm, activation in groups:
            if conv not in chosen:
                continue
            kind = activation or "identity"
            if kind not in ("identity", "relu", "relu6"):
                module = find(kind, nn.Module)
                if type(module) not in tracing.RELUS:
                    found = type(module).__name__
                    raise ValueError(f"FTWT.prepare: groups expects a ReLU or ReLU6 at {kind!r}, got {found}")
                # It stays: after the layer's own it changes nothing, and the forward may call it elsewhere, too. In
                # place it would write to what the layer keeps for its backward.
                module.inplace = False
                kind = tracing.RELUS[type(module)]
            batch_norm = None if norm is None else find(norm, nn.BatchNorm2d)
            gated = GatedConv2d.from_modules(find(conv, nn.Conv2d), batch_norm, kind, **self._options(conv))
            if norm is not None:
                model.set_submodule(norm, nn.Identity())
            model.set_submodule(conv, gated)


# ------------------------------------------------------------------------------------------------- controls


@contextmanager
def target_masks(model: nn.Module) -> Iterator[None]:
    """Within the context each layer applies its target instead of its prediction: the oracle."""
    with _forced(model, "target"):
        yield


@contextmanager
def open_gates(model: nn.Module) -> Iterator[None]:
    """Within the context no layer masks anything: the dense network."""
    with _forced(model, "open"):
        yield


@contextmanager
def random_masks(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Within the context each layer keeps, for each sample, as many channels as its head would, but random
    ones: the control.

    Each forward of ``model`` runs twice: once with the predicted masks, to count, then with random ones of
    these counts.
    """
    model = bare(model)
    gates = list(_gates(model).values())
    generator = torch.Generator().manual_seed(seed)
    counts: dict[Gated, Tensor] = {}

    def count(gate: Gated, args: tuple[Any, ...]) -> None:
        counts[gate] = gate.examine(*args)[0].sum(1)

    def draw(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for gate in gates:
            gate.force = None
        hooks = [gate.register_forward_pre_hook(count) for gate in gates]
        try:
            with evaluation(root), torch.no_grad():  # this forward must not count for the running statistics
                root.forward(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        for gate in gates:
            k = counts[gate]
            order = torch.rand(len(k), gate.head.out_channels, generator=generator).argsort(1).argsort(1).to(k.device)
            gate.force = order < k[:, None]

    with _forced(model, None):
        hook = model.register_forward_pre_hook(draw, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def _forced(model: nn.Module, force: str | None) -> Iterator[None]:
    gates = list(_gates(model).values())
    before = [gate.force for gate in gates]
    for gate in gates:
        gate.force = force
    try:
        yield
    finally:
        for gate, value in zip(gates, before, strict=True):
            gate.force = value


# ------------------------------------------------------------------------------------------------- internals


class _Dense(nn.Module):
    """A gated layer without its gate, batch norm folded: convolution, sum, activation, the last two in place."""

    def __init__(self, layer: nn.Module, activation: str) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    @classmethod
    def of(cls, gate: Gated) -> _Dense:
        if isinstance(gate, GatedConv2d):
            return cls(gate.fold(), gate.activation)
        assert isinstance(gate, GatedLinear)
        return cls(copy.deepcopy(gate.linear), gate.activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(input)
        if residual is not None:
            y += residual
        if self.activation == "relu":
            return y.relu_()
        return y.clamp_(0, 6) if self.activation == "relu6" else y


def _gates(model: nn.Module) -> dict[str, Gated]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Gated)}


def _deployed(model: nn.Module) -> bool:
    return any(isinstance(module, (DeployedGatedConv2d, DeployedGatedLinear)) for module in model.modules())


def _convert(model: nn.Module, form: Callable[[Any], nn.Module]) -> nn.Module:
    """A copy for inference, each gated layer in another form, the other batch norms folded where a graph shows them."""
    result = copy.deepcopy(bare(model)).eval()
    if isinstance(result, Gated):
        return form(result)
    for name, gate in _gates(result).items():
        result.set_submodule(name, form(gate))
    if isinstance(result, fx.GraphModule):
        tracing.fold_norms(result)
        tracing.clean(result)
    return result.requires_grad_(False)


@torch.no_grad()
def _check_equal(model: nn.Module, prepared: nn.Module, input: Tensor) -> None:
    """With open gates the rewritten network computes what the network computed."""
    outputs = []
    for network in (model, prepared):
        with evaluation(network), open_gates(network):
            outputs.append(network(input))
    # A wrong rewriting changes everything, rounding the last digits: half of the digits is a safe border.
    tolerance = torch.finfo(input.dtype).eps ** 0.5
    try:
        torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
    except AssertionError as error:
        raise ValueError(
            "FTWT.prepare: on example_input the rewritten network differs from the model: the forward does "
            f"something that the trace does not show; pass groups ({error})"
        ) from error
