# SPDX-License-Identifier: Apache-2.0
"""ShiftAddViT: a trained vision transformer, reparameterised into additions and shifts, stage by stage.

Stage 1 puts attention with binary codes in the place of softmax attention: its products are sums of selected values. Then
every linear layer of the blocks becomes one of powers of two (stage 2), or a mixture of a dense expert and one of powers
of two with a router that is trained towards equal latency (stage 3). The paper trains after each stage.

Source: You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer", NeurIPS 2023.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cofire.methods.attention import KEY_HEADS, OBSTACLES, edges_of
from cofire.methods.base import Method, Report, bare, evaluation, first_input, matches, replace_modules
from cofire.methods.deployed import Timing, deployed_error, latency_of
from cofire.names import near_matches
from cofire.nn.lowbit import linear_layers
from cofire.nn.shift_add import (
    ACTIVATIONS,
    BinaryLinearAttention,
    MixtureOfPrimitives,
    PackedMixture,
    ShiftLinear,
    check_alpha,
    check_encoder,
)
from cofire.ops.checks import check_choice, check_integer, check_module, check_number
from cofire.ops.shift_add import FORMATS

#: What an attention's projections are called, and where its number of heads is.
TRIPLES = (("q", "k", "v"), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
RESULTS = ("proj", "o_proj", "out_proj")
HEADS = ("num_heads", "num_attention_heads")


@dataclass(frozen=True)
class ShiftAddLayer(Report):
    """One linear layer that became one of powers of two, or a mixture."""

    name: str
    kind: str  #: "shift" or "mixture"
    shape: tuple[int, int]
    dense_bytes: int  #: of the dense layer in its place
    packed_bytes: int  #: as stored; a mixture has both experts and the router
    resident_bytes: int  #: as held once it has run: a mixture keeps a decoded copy of its shift expert
    dead: int  #: weights that are 0 because of their sign
    clipped: int  #: weights that format S4 changes
    shift_share: float | None  #: of the tokens; None without batches, and for "shift"
    costs: tuple[float, float] | None  #: what the balance loss takes a token to cost in the dense and the shift expert


@dataclass(frozen=True)
class ShiftAddViTReport(Report):
    """What became of the network. Bytes are those of tensors; no energy is estimated.

    What kernels lay out for themselves is not counted: on a CPU, about the codes of a shift layer once more.
    """

    stage: int
    attentions: int  #: binary ones
    dense_bytes: int  #: of the dense layers that shift layers and mixtures stand for
    packed_bytes: int  #: of these layers as stored
    resident_bytes: int  #: of these layers as held once they have run
    model_bytes: int  #: of everything in the deployed network, as stored
    model_resident_bytes: int  #: as held once it has run
    model_dense_bytes: int | None  #: of the dense network, if it is given
    dead: int
    shift_share: float | None  #: share of all tokens of all mixtures that take the shift expert
    balanced_share: float | None  #: the share at which both experts take equally long, by the costs of the mixtures
    deployed_error: float | None  #: largest difference of the outputs, over the largest output; None without batches
    deployed_equal: float | None  #: share of samples whose outputs are the same to 1e-5 of the largest
    latency: Timing | None  #: of the deployed network and the dense one, if that is given
    layers: list[ShiftAddLayer]


@dataclass(frozen=True)
class ShiftAddViT(Method, name="shiftaddvit"):
    """Attention of additions, and linear layers of shifts or of a mixture of both primitives.

    Args:
        stage: 1: attentions alone. 2: and linear layers of powers of two. 3: and, in their place, mixtures.
        encoder, bits, anchors, topk, kernel_size: of the attention, see :class:`cofire.nn.BinaryLinearAttention`.
        format: of the packed powers of two: "S5", "S4" or "S8".
        activations: "exact", or "int8" (stage 2 with S4).
        balance: weight of the mixtures' balance losses, each of which counts fully.
        alpha: what a token costs in the dense and in the shift expert; None: latencies, which :meth:`prepare` measures.
        noise: whether routers get noise in training.
        noise_steps: so many calls of :meth:`step` take the noise linearly to nothing, so that in the end the balance is that
            of the deployed network's choices; None: it stays.
        keep_attention: names or patterns of attentions that stay as they are, their linear layers included, as the paper
            leaves those of a pyramid's last stage.
        skip: names or patterns of linear layers that stay dense.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.

    Example:
        >>> import torch.nn.functional as F
        >>> from cofire.models import digits_vit
        >>> method = ShiftAddViT(stage=3, anchors=12, alpha=(6, 4))
        >>> x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
        >>> model = method.prepare(digits_vit(), example_input=x)
        >>> loss = F.cross_entropy(model(x), y) + method.loss(model)
        >>> loss.backward(); method.step(model)
        >>> packed = method.finalize(model)

    Source: You et al. 2023 (2306.06446), section 4. As published, the gate scales what an expert returns, so that the router
    is trained; in the authors' released code it is constant, and the balance loss is 0. One kind of router learns from the
    balance alone even so: queries and keys are normalised, which divides the gate of their projections out.
    """

    stage: int = 3
    encoder: str = "hash"
    bits: int = 16
    anchors: int = 25
    topk: int = 10
    kernel_size: int = 9
    format: str = "S5"
    activations: str = "exact"
    balance: float = 0.01
    alpha: Sequence[float] | None = None
    noise: bool = True
    noise_steps: int | None = None
    keep_attention: Sequence[str] = ()
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_integer(name, stage=self.stage)
        if self.stage not in (1, 2, 3):
            raise ValueError(f"{name}: stage must be 1, 2 or 3, got {self.stage}")
        check_encoder(name, self.encoder, self.bits, self.anchors, self.topk, self.kernel_size, 0.1)
        check_choice(name, "format", self.format, FORMATS)
        check_choice(name, "activations", self.activations, ACTIVATIONS)
        if self.activations == "int8" and (self.stage != 2 or self.format != "S4"):
            raise ValueError(f"{name}: int8 activations need stage 2 and format S4, got {self.stage}, {self.format!r}")
        check_alpha(name, self.alpha)
        if self.noise_steps is not None:
            check_integer(name, noise_steps=self.noise_steps)
            if self.noise_steps < 1:
                raise ValueError(f"{name}: noise_steps must be at least 1, or None, got {self.noise_steps}")
        check_number(name, balance=self.balance)
        if not 0 <= self.balance < float("inf"):
            raise ValueError(f"{name}: balance must not be negative, got {self.balance}")
        for argument in ("keep_attention", "skip"):
            value = getattr(self, argument)
            fine = isinstance(value, Collection) and not isinstance(value, str)
            if not fine or not all(isinstance(p, str) for p in value):
                raise TypeError(f"{name}: {argument} must be a sequence of names or patterns, got {value!r}")

    # ---------------------------------------------------------------------------------------------- protocol

    def prepare(self, model: nn.Module, example_input: Any = None) -> nn.Module:
        """A copy of ``model`` at this method's stage.

        ``model`` may be at an earlier stage already, trained: then only what is missing is replaced. The linear layers are
        those of the blocks: all (exactly ``nn.Linear``, with a weight of their own) but the first and the last layer of the
        network.

        An attention is replaced if it has ``num_heads`` (or ``num_attention_heads``), projections ``q``, ``k``, ``v`` or
        ``qkv`` or ``q``, ``kv`` (or ``q_proj``, ... or ``query``, ...) and attends from all tokens to all, as those of
        :mod:`cofire.models`, timm and transformers do. A reduction of the keys' grid is dropped. With the hash, the
        query's projection becomes that of both codes.

        Args:
            model: a trained network.
            example_input: a batch of training inputs. Attentions are fitted to it, one after the other; and it says how many
                tokens a mixture's latencies are measured with.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: prepared already, no attention to replace or one that cannot be, a pattern that fits nothing, no
                ``example_input`` where one is needed.
        """
        name = "ShiftAddViT.prepare"
        check_module(name, model)
        before = stage_of(bare(model))
        if before >= self.stage:
            raise ValueError(f"{name}: the model is prepared already, at stage {before}; this is stage {self.stage}")
        if _is_final(bare(model)):
            raise ValueError(f"{name}: the model is finalized already; prepare the network that it was made from")
        result = copy.deepcopy(bare(model))
        softmax = {n: m for n, m in result.named_modules() if _is_attention(m)}
        kept = {n for n in softmax if any(matches([n], p) for p in self.keep_attention)}
        self._check_patterns("keep_attention", self.keep_attention, [*softmax])
        fresh = {n: m for n, m in softmax.items() if n not in kept}
        if before == 0 and not fresh:
            raise ValueError(
                f"{name}: there is no attention to replace: one has num_heads, and projections q, k, v (or qkv, or q and kv)"
            )
        if example_input is None and (fresh or (self.stage == 3 and self.alpha is None)):
            what = "attentions are fitted to it" if fresh else "latencies are measured with its tokens (or give alpha)"
            raise ValueError(f"{name}: example_input must be a batch of inputs, got None: {what}")
        if fresh:
            result = self._attentions(result, fresh, example_input)
        if self.stage > 1:
            result = self._linears(result, kept)
        if self.stage == 3 and self.alpha is None:
            self.measure(result, example_input)
        return result

    def loss(self, model: nn.Module, output: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """``balance`` times the sum of the mixtures' balance losses; without mixtures zero, as a leaf of its own.

        Raises:
            ValueError: not prepared, or no forward in training mode yet.
        """
        mixtures = _of(self._require(model, "loss"), MixtureOfPrimitives)
        if not mixtures or self.balance == 0:
            where = next(bare(model).parameters()).device
            return torch.zeros((), device=where, requires_grad=True)
        losses = [m.balance_loss for m in mixtures.values() if m.balance_loss is not None]
        if not losses:
            raise ValueError(
                "ShiftAddViT.loss: the model has seen no forward in training mode; call model(x) first, after prepare"
            )
        return self.balance * torch.stack([loss.float() for loss in losses]).sum()

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Keep shifts in their range, move the running thresholds of a "binary" encoder, lower the noise."""
        for module in self._require(model, "step").values():
            if isinstance(module, ShiftLinear):
                module.clamp_()
            elif isinstance(module, BinaryLinearAttention):
                module.step()
            elif isinstance(module, MixtureOfPrimitives) and self.noise_steps is not None:
                module.noise_scale.sub_(1 / self.noise_steps).clamp_(min=0)

    def measure(self, model: nn.Module, batch: Any) -> None:
        """Time the experts of every mixture, with as many tokens as it gets of ``batch``, and average the latencies in.

        Never called by :meth:`step`: measured numbers differ from run to run, and training would.
        """
        mixtures = _of(self._require(model, "measure"), MixtureOfPrimitives)
        if not mixtures:
            raise ValueError("ShiftAddViT.measure: the model has no mixture; prepare it at stage 3")
        tokens = {id(m): 0 for m in mixtures.values()}

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            tokens[id(module)] = args[0].numel() // max(args[0].shape[-1], 1)

        _run(bare(model), batch, mixtures.values(), look)
        for mixture in mixtures.values():
            if tokens[id(mixture)]:
                mixture.measure(tokens[id(mixture)])

    def finalize(self, model: nn.Module) -> nn.Module:
        """A frozen copy in evaluation mode, with packed powers of two.

        Raises:
            ValueError: not prepared, or finalized already.
        """
        self._require(model, "finalize")
        result = copy.deepcopy(bare(model)).eval()
        new: dict[int, nn.Module] = {}
        for module in result.modules():  # an expert is replaced with its mixture
            if isinstance(module, (MixtureOfPrimitives, ShiftLinear)):
                new[id(module)] = module.pack()
            elif isinstance(module, BinaryLinearAttention):
                module.deployed = True
        return replace_modules(result, new).eval().requires_grad_(False)

    def parameter_groups(
        self,
        model: nn.Module,
        lr: float = 5e-5,
        weight_decay: float = 0.05,
        shift_lr: float | None = None,
        router_lr: float | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups for ``torch.optim.AdamW``.

        Matrices, the only ones with weight decay; vectors; shifts and signs, which decay would make large and dead; routers and
        their noise.

        Args:
            model: prepared.
            lr, weight_decay: of the matrices.
            shift_lr: of shifts and signs; default: ``lr``.
            router_lr: of routers; default: ``lr``.
        """
        modules = self._require(model, "parameter_groups")
        layers = [m for m in modules.values() if isinstance(m, ShiftLinear)]
        powers = [p for layer in layers for p in (layer.shift, layer.sign)]
        routers = [
            p
            for m in modules.values()
            if isinstance(m, MixtureOfPrimitives)
            for part in (m.router, m.noise)
            if part is not None
            for p in part.parameters()
        ]
        known = set(map(id, [*powers, *routers]))
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        return [
            {"params": [p for p in others if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in others if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
            {"params": powers, "lr": lr if shift_lr is None else shift_lr, "weight_decay": 0.0},
            {"params": routers, "lr": lr if router_lr is None else router_lr, "weight_decay": 0.0},
        ]

    # ------------------------------------------------------------------------------------------------ report

    @torch.no_grad()
    def report(
        self, model: nn.Module, batches: Iterable[Any] = (), dense: nn.Module | None = None
    ) -> ShiftAddViTReport:
        """Bytes, dead weights, token shares, and whether the deployed network equals the trained one.

        Args:
            model: a prepared model.
            batches: batches of inputs, or of tuples that begin with them: for the shares, and to compare the outputs.
            dense: the network in full precision: to time the deployed one against it, on the first batch.

        Raises:
            ValueError: not prepared; ``dense`` without a batch.
        """
        modules = self._require(model, "report")
        network, final = bare(model), self.finalize(model)
        inputs = [first_input(batch) for batch in batches]
        if dense is not None and not inputs:
            raise ValueError("ShiftAddViT.report: dense needs a batch to be timed on")
        counts = _token_counts(network, inputs)
        error, equal = deployed_error(network, final, inputs) if inputs else (None, None)
        timing = None
        if dense is not None:
            with evaluation(bare(dense)):
                timing = latency_of(bare(dense), final, inputs[0])
        experts = {id(m.shift) for m in modules.values() if isinstance(m, MixtureOfPrimitives)}
        layers = [
            _examine(name, module, counts)
            for name, module in modules.items()
            if isinstance(module, (MixtureOfPrimitives, ShiftLinear)) and id(module) not in experts
        ]
        total, shift = (sum(c[i] for c in counts.values()) for i in (0, 1))
        shares = [x.costs[0] / sum(x.costs) for x in layers if x.costs is not None]
        packed, resident = sum(x.packed_bytes for x in layers), sum(x.resident_bytes for x in layers)
        return ShiftAddViTReport(
            stage=stage_of(network),
            attentions=len(_of(modules, BinaryLinearAttention)),
            dense_bytes=sum(x.dense_bytes for x in layers),
            packed_bytes=packed,
            resident_bytes=resident,
            model_bytes=_bytes(final),
            model_resident_bytes=_bytes(final) + resident - packed,
            model_dense_bytes=None if dense is None else _bytes(bare(dense)),
            dead=sum(x.dead for x in layers),
            shift_share=shift / total if total else None,
            balanced_share=sum(shares) / len(shares) if shares else None,
            deployed_error=error,
            deployed_equal=equal,
            latency=timing,
            layers=layers,
        )

    # ----------------------------------------------------------------------------------------------- surgery

    def _require(self, model: nn.Module, where: str) -> dict[str, nn.Module]:
        """The modules of this family by name."""
        check_module(f"ShiftAddViT.{where}", model)
        network = bare(model)
        if _is_final(network):
            raise ValueError(f"ShiftAddViT.{where}: the model is finalized already")
        kinds = (BinaryLinearAttention, ShiftLinear, MixtureOfPrimitives)
        found: dict[str, nn.Module] = {n: m for n, m in network.named_modules() if isinstance(m, kinds)}
        if not found:
            raise ValueError(f"ShiftAddViT.{where}: the model has no layer of this method; call prepare(model) first")
        return found

    def _check_patterns(self, argument: str, patterns: Iterable[str], known: Sequence[str]) -> None:
        for pattern in patterns:
            if not matches(known, pattern):
                what = "attention" if argument == "keep_attention" else "linear layer"
                raise ValueError(
                    f"ShiftAddViT.prepare: {argument} names {pattern!r}, which fits no {what}{near_matches(pattern, known)}"
                )

    def _attentions(self, model: nn.Module, found: Mapping[str, nn.Module], example: Any) -> nn.Module:
        pairs: set[int] = set()

        def look(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple):
                pairs.add(id(module))

        hooks = [m.register_forward_hook(look) for m in found.values()]
        try:
            _run(model, example)
        finally:
            for hook in hooks:
                hook.remove()
        new: dict[int, nn.Module] = {}
        made: dict[str, BinaryLinearAttention] = {}
        for name, module in found.items():
            made[name] = self._attention(name, module)
            new[id(module)] = PairAttention(made[name]) if id(module) in pairs else made[name]
        model = replace_modules(model, new)
        names = {id(m): n for n, m in made.items()}

        def fit(module: nn.Module, args: tuple[Any, ...]) -> None:
            try:
                cast(BinaryLinearAttention, module).fit(args[0])
            except ValueError as error:
                raise ValueError(f"ShiftAddViT.prepare: attention {names[id(module)]!r}: {error}") from error

        _run(model, example, made.values(), fit)
        for name, layer in made.items():
            if not layer.is_fitted:
                raise ValueError(
                    f"ShiftAddViT.prepare: attention {name!r} is not reached by example_input, so it cannot be fitted; keep "
                    "it by keep_attention"
                )
        return model

    def _attention(self, name: str, module: nn.Module) -> BinaryLinearAttention:
        """The new attention, with the weights of the old one."""
        parts = _projections(name, module)
        (query, query_bias), (key, key_bias), (value, value_bias) = parts.projections
        layer = BinaryLinearAttention(
            query.shape[1],
            parts.heads,
            encoder=self.encoder,
            bits=self.bits,
            anchors=self.anchors,
            topk=self.topk,
            kernel_size=self.kernel_size,
            project=False,
            device=query.device,
            dtype=query.dtype,
        )
        if self.encoder == "hash":
            layer.qk = _linear(query, query_bias)
        else:
            layer.q, layer.k = _linear(query, query_bias), _linear(key, key_bias)
        layer.v, layer.proj = _linear(value, value_bias), parts.result
        return layer.train(module.training)

    def _linears(self, model: nn.Module, kept: Collection[str]) -> nn.Module:
        inside = tuple(f"{name}." for name in kept)
        attentions = [n for n, m in model.named_modules() if isinstance(m, BinaryLinearAttention)]
        edges = edges_of(model, [*attentions, *kept])
        also: tuple[type[nn.Module], ...] = (ShiftLinear,) if self.stage == 3 else ()
        plain = {
            n: m
            for n, m in linear_layers_with(model, also).items()
            if n not in edges and not n.startswith(inside or ("\0",))
        }
        self._check_patterns("skip", self.skip, [*plain])
        chosen = {n: m for n, m in plain.items() if not any(matches([n], p) for p in self.skip)}
        if not chosen:
            raise ValueError("ShiftAddViT.prepare: there is no linear layer to replace: no nn.Linear that skip leaves")
        new: dict[int, nn.Module] = {}
        for module in chosen.values():
            if self.stage == 3:
                options: dict[str, Any] = {"noise": self.noise, "alpha": self.alpha, "format": self.format}
                new[id(module)] = MixtureOfPrimitives.from_dense(module, **options)
            else:
                new[id(module)] = ShiftLinear.from_dense(module, format=self.format, activations=self.activations)
        return replace_modules(model, new)


class PairAttention(nn.Module):
    """An attention where one is expected that returns a pair, of which the second are weights that it does not have.

    Arguments beside the input are those of transformers: masks and heads to leave out have to be None.
    """

    def __init__(self, attention: BinaryLinearAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        given = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        if given or any(isinstance(value, Tensor) for value in args):
            raise TypeError(
                f"ShiftAddViT: attention of additions takes no mask, got {', '.join(given) or 'a tensor beside the input'}"
            )
        return self.attention(hidden_states), None


# ------------------------------------------------------------------------------------------------------ what is found


@dataclass(frozen=True)
class _Projections:
    projections: tuple[tuple[Tensor, Tensor | None], ...]  #: weight ``[C, C]`` and bias of query, key and value
    result: nn.Linear | None
    heads: int


def _linear_children(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}


def _heads(module: nn.Module) -> int | None:
    found = (getattr(module, name, None) for name in HEADS)
    return next((n for n in found if isinstance(n, int)), None)


def _is_attention(module: nn.Module) -> bool:
    names = set(_linear_children(module))
    named = "qkv" in names or {"q", "kv"} <= names or any(set(triple) <= names for triple in TRIPLES)
    return named and _heads(module) is not None


def _projections(name: str, module: nn.Module) -> _Projections:
    """The parts of an attention, or a sentence on why it cannot be replaced."""
    where = f"ShiftAddViT.prepare: attention {name!r}"
    children, heads = _linear_children(module), _heads(module)
    assert heads is not None
    for obstacle, attributes in OBSTACLES.items():
        for attribute in attributes:
            if not isinstance(getattr(module, attribute, None), (type(None), nn.Identity)):
                raise ValueError(
                    f"{where} has {obstacle} ({attribute!r}), which attention of additions has no place for; keep it by "
                    "keep_attention"
                )
    parts: list[tuple[Tensor, Tensor | None]] = []
    triple = next((t for t in TRIPLES if set(t) <= set(children)), ())
    names = triple or (("qkv",) if "qkv" in children else ("q", "kv"))
    for child in names:
        layer = children[child]
        count = {"qkv": 3, "kv": 2}.get(child, 1)
        if layer.out_features % count:
            count = 1  # refused below
        weights = layer.weight.detach().chunk(count)
        biases: Sequence[Tensor | None] = [None] * count if layer.bias is None else layer.bias.detach().chunk(count)
        parts += list(zip(weights, biases, strict=True))
    width = parts[0][0].shape[1]
    others = [n for n in (getattr(module, a, None) for a in KEY_HEADS) if isinstance(n, int) and n != heads]
    if others or len(parts) != 3 or any(tuple(w.shape) != (width, width) for w, _ in parts) or width % heads:
        shapes = [list(w.shape) for w, _ in parts]
        also = f", {others[0]} heads of keys" if others else ""
        raise ValueError(
            f"{where} has {heads} heads{also} and projections {shapes}: it needs three of {width} features, which its heads "
            "divide; keep it by keep_attention"
        )
    result = next((children[n] for n in RESULTS if n in children), None)
    return _Projections(tuple(parts), result, heads)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def linear_layers_with(model: nn.Module, also: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """The linear layers, and layers of other classes."""
    found = dict(linear_layers(model))
    found |= {n: m for n, m in model.named_modules() if isinstance(m, also)}
    return {n: m for n, m in model.named_modules() if n in found}


def stage_of(model: nn.Module) -> int:
    """The stage that a prepared model is at; 0 for others."""
    kinds = ((3, MixtureOfPrimitives), (2, ShiftLinear), (1, BinaryLinearAttention))
    return next((stage for stage, kind in kinds if any(isinstance(m, kind) for m in model.modules())), 0)


def _is_final(model: nn.Module) -> bool:
    return any(
        isinstance(m, PackedMixture) or (isinstance(m, BinaryLinearAttention) and m.deployed) for m in model.modules()
    )


def _of(modules: Mapping[str, nn.Module], kind: type[Any]) -> dict[str, Any]:
    return {n: m for n, m in modules.items() if isinstance(m, kind)}


def _run(model: nn.Module, batch: Any, watched: Iterable[nn.Module] = (), look: Any = None) -> None:
    """One forward in evaluation mode, with ``look`` before each of the modules."""
    hooks = [m.register_forward_pre_hook(look) for m in watched]
    try:
        with evaluation(model), torch.no_grad():
            model(first_input(batch))
    finally:
        for hook in hooks:
            hook.remove()


def _token_counts(model: nn.Module, inputs: Iterable[Any]) -> dict[int, tuple[int, int]]:
    """By mixture: all tokens, and those that take the shift expert."""
    mixtures = [m for m in model.modules() if isinstance(m, MixtureOfPrimitives)]
    found = {id(m): (0, 0) for m in mixtures}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        dense, shift = cast(MixtureOfPrimitives, module).route(args[0])[2].tolist()
        before = found[id(module)]
        found[id(module)] = (before[0] + dense + shift, before[1] + shift)

    for x in inputs if mixtures else ():
        _run(model, x, mixtures, look)
    return found


def _examine(
    name: str, module: MixtureOfPrimitives | ShiftLinear, counts: Mapping[int, tuple[int, int]]
) -> ShiftAddLayer:
    mixture = isinstance(module, MixtureOfPrimitives)
    shift = module.shift if isinstance(module, MixtureOfPrimitives) else module
    seen = shift.statistics()
    tokens, cheap = counts.get(id(module), (0, 0))
    dense, cost = module.costs.tolist() if isinstance(module, MixtureOfPrimitives) else (0.0, 0.0)
    packed = module.pack()
    return ShiftAddLayer(
        name=name,
        kind="mixture" if mixture else "shift",
        shape=(module.out_features, module.in_features),
        dense_bytes=shift.shift.nbytes + (0 if shift.bias is None else shift.bias.nbytes),
        packed_bytes=packed.nbytes,
        resident_bytes=packed.resident_nbytes if isinstance(packed, PackedMixture) else packed.nbytes,
        dead=seen["dead"],
        clipped=seen["clipped"],
        shift_share=cheap / tokens if tokens else None,
        costs=(dense, cost) if mixture else None,
    )


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
