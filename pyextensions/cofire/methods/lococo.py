# SPDX-License-Identifier: Apache-2.0
"""LoCoCo: a language model whose cache of keys and values has a fixed size, and learns what to make of what is too much.

Source: Cai, Tian, Wang, Chen, "LoCoCo: Dropping In Convolutions for Long Context Compression", ICML 2024.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.methods.base import Method, Report, bare, evaluation, first_input
from cofire.methods.qlora import QLoRA
from cofire.nn.kv_cache import KVCache, LoCoCoCache
from cofire.nn.kv_fusion import GATES, KVFusion
from cofire.nn.lowbit import LoRALinear, QLoRALinear
from cofire.ops.checks import check_choice, check_integer, check_module, check_number, refuse

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LoCoCoReport(Report):
    """What the cache takes, and what compressing costs. FLOPs are of one token of one sequence, a product and a sum two."""

    layers: int
    batch: int
    tokens: int  #: that were fed
    cache_bytes: int  #: of all that the cache has allocated, the spare for compressing included
    held_bytes: int  #: of the keys, values and scores that it holds after the last token
    full_bytes: int  #: of keys and values of all tokens
    fusion_parameters: int
    trained: int  #: parameters that are trained
    gates: tuple[float, ...]  #: the mixtures' share, by layer; training may move it out of 0 to 1
    prompt_flops: float  #: of compressing, for a token of this prompt
    decode_flops: float  #: of compressing, for a token that is generated
    model_flops: float  #: of the model's linear layers


@dataclass(frozen=True)
class LoCoCo(Method, name="lococo"):
    """A decoder reads a text in chunks, with a cache of ``capacity`` tokens: heavy hitters, and mixtures of the others.

    What is trained are the convolutions and gates that compute the mixtures, and beside them parameters by name: norms and
    embeddings, as published. :meth:`backward` goes through a text as published, with the memory of one chunk; a plain
    ``loss.backward()`` on the model's output has the same gradients.

    Args:
        capacity: tokens that the cache is reduced to.
        keep: share of them that are heavy hitters, from 0 to below 1.
        taps: odd, of the convolution over the tokens.
        hidden: channels of further convolutions before.
        local: how many of the heavy hitters are the last tokens.
        buffer: tokens more than ``capacity`` that the cache holds before it is reduced.
        chunk: tokens that are read at once.
        gate: "plain", a number that may leave 0 to 1, or "sigmoid" of one.
        std: of the convolutions' first weights.
        normalize: scores are divided by how many queries saw a token; else the first tokens of a chunk have higher ones.
        bptt: chunks that a gradient goes back through. 1, as published: a compression learns from the chunk that follows it.
        check: refuse keys, values and scores that are not finite when they are compressed; waits for the device. Without it
            only scores that are NaN are refused.
        trained: parameters whose names contain one of these are trained too.
        low_rank: a :class:`QLoRA`, to train low-rank terms beside the projections of the attentions. Those are then quantised as
            it says: with ``QLoRA(rank=8, alpha=16, method=None)``, which is LoRA, they stay as they are.
        scaling: positions are divided by it, so that a context of ``scaling`` times the length has angles that are known.
        fusion_rate, other_rate: factors of the learning rate, of convolutions and gates, and of what ``trained`` names.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.

    Example:
        >>> from cofire.models import decoder
        >>> method = LoCoCo(capacity=8, taps=3, buffer=0, chunk=8)
        >>> model = method.prepare(decoder(20, width=16, depth=2, heads=2))
        >>> optimizer = torch.optim.AdamW(method.parameter_groups(model))
        >>> tokens = torch.randint(20, (2, 40))
        >>> loss = method.backward(model, tokens); optimizer.step(); method.step(model)
        >>> model = method.finalize(model)
        >>> report = method.report(model, [tokens])
        >>> model.generate(tokens, 4).shape, report.held_bytes < 0.5 * report.full_bytes
        (torch.Size([2, 44]), True)

    Source: LoCoCo, sections 3 and 4; buffer, gate, rates and the loss inside of a chunk are those of its code.
    """

    capacity: int = 512
    keep: float = 0.5
    taps: int = 21
    hidden: Sequence[int] = ()
    local: int = 0
    buffer: int = 16
    chunk: int = 512
    gate: str = "plain"
    std: float = 1.0
    normalize: bool = False
    bptt: int = 1
    check: bool = False
    trained: Sequence[str] = ("norm", "embed")
    low_rank: QLoRA | None = None
    scaling: float = 1.0
    fusion_rate: float = 1000.0
    other_rate: float = 5.0

    def __post_init__(self) -> None:
        name = "LoCoCo"
        integers = {"capacity": self.capacity, "taps": self.taps, "local": self.local, "buffer": self.buffer}
        check_integer(name, **integers, chunk=self.chunk, bptt=self.bptt)
        rates = {"fusion_rate": self.fusion_rate, "other_rate": self.other_rate}
        check_number(name, keep=self.keep, std=self.std, scaling=self.scaling, **rates)
        for which, sequence, kind in (("hidden", self.hidden, int), ("trained", self.trained, str)):
            whole = isinstance(sequence, Sequence) and not isinstance(sequence, str)
            if not whole or not all(isinstance(x, kind) for x in sequence):
                raise TypeError(f"{name}: {which} must be a sequence of {kind.__name__}, got {sequence!r}")
        check_choice(name, "gate", self.gate, GATES)
        if self.low_rank is not None and not isinstance(self.low_rank, QLoRA):
            raise TypeError(f"{name}: low_rank must be a QLoRA or None, got {type(self.low_rank).__name__}")
        if self.capacity < 2:
            refuse(name, f"capacity must be at least 2, got {self.capacity}")
        if not 0 <= self.keep < 1:
            refuse(name, f"keep must be in [0, 1), got {self.keep}")
        if self.merged < 1:
            refuse(name, f"keep must leave a slot of {self.capacity} for a mixture, got {self.keep}")
        if self.taps < 1 or self.taps % 2 == 0:
            refuse(name, f"taps must be odd and positive, got {self.taps}")
        if not 0 <= self.local < max(self.heavy, 1):
            refuse(name, f"local must be at least 0 and less than the {self.heavy} heavy hitters, got {self.local}")
        for which, value, least in (("buffer", self.buffer, 0), ("chunk", self.chunk, 1), ("bptt", self.bptt, 1)):
            if value < least:
                refuse(name, f"{which} must be at least {least}, got {value}")
        for which, number in {"scaling": self.scaling, **rates}.items():
            if not 0 < number < math.inf:
                refuse(name, f"{which} must be positive and finite, got {number}")

    @property
    def merged(self) -> int:
        """Slots that hold mixtures."""
        return int(self.capacity * (1 - self.keep))

    @property
    def heavy(self) -> int:
        """Slots that hold heavy hitters."""
        return self.capacity - self.merged

    # ---------------------------------------------------------------------------------------------- protocol

    def prepare(self, model: nn.Module) -> CompressingDecoder:
        """A copy of ``model`` that reads in chunks through a cache, with a :class:`cofire.nn.KVFusion` for each layer.

        Args:
            model: a decoder with attentions that have ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``head_dim`` and
                ``layer_idx``: :func:`cofire.models.decoder`, or a model of transformers for causal language modelling
                that is built like Llama.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: a model without such attentions, or one prepared already.
        """
        check_module("LoCoCo.prepare", model)
        if isinstance(bare(model), CompressingDecoder):
            raise ValueError("LoCoCo.prepare: the model is prepared already; prepare the network that it was made from")
        result = copy.deepcopy(bare(model))
        layers = _attentions(result)
        if _of_transformers(result):
            from cofire.nn.kv_transformers import ATTENTION

            result.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        if self.scaling != 1:
            _scale_positions(result, self.scaling)
        result.requires_grad_(False)
        if self.low_rank is not None:
            for attention in layers:
                for name in PROJECTIONS:
                    setattr(attention, name, self.low_rank.layer(attention.get_submodule(name)))
        for name, parameter in result.named_parameters():
            if any(part in name for part in self.trained):
                parameter.requires_grad_()
        options: dict[str, Any] = {"kernel_size": self.taps, "hidden": self.hidden, "std": self.std}
        fusions = nn.ModuleList()
        for attention in layers:
            weight = next(t for t in (*attention.parameters(), *attention.buffers()) if t.is_floating_point())
            # In fp32 whatever the model is in: a rate of 1e-3 times as much is lost in fewer bits.
            fusion = KVFusion(
                _size(attention), self.merged, parameterization=self.gate, **options, device=weight.device
            )
            fusions.append(fusion)
        return CompressingDecoder(result, fusions, self).train(model.training)

    def loss(self, model: nn.Module, output: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """Zero, a leaf of its own: the task's loss alone trains the compression.

        Raises:
            ValueError: the model is not prepared, or finalized.
        """
        gate = self._require(model, "loss").gate(0)
        return torch.zeros((), dtype=torch.float32, device=gate.device, requires_grad=True)

    def backward(self, model: nn.Module, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        """Read ``tokens`` chunk by chunk, and add the gradients of the mean cross entropy: backward after each chunk.

        Args:
            model: prepared.
            tokens: int64 ``[B, T]``.
            target: ``[B, T]``, the next tokens (-100: none), or ``[B]``, the class, of a classifier. None: the tokens
                themselves, shifted inside each chunk as published, so that its first is no target.

        Returns:
            The mean cross entropy, without a gradient.

        Raises:
            ValueError: the model is not prepared, or finalized; no token to predict.
        """
        owner = self._require(model, "backward")
        return backward(owner.read, owner.new_cache(), self.chunk, self.bptt, tokens, target)

    def step(self, model: nn.Module) -> None:
        """Nothing changes with the steps.

        Raises:
            ValueError: the model is not prepared, or finalized.
        """
        self._require(model, "step")

    def parameter_groups(self, model: nn.Module, lr: float = 5e-5) -> list[dict[str, Any]]:
        """Parameter groups for ``torch.optim.AdamW``, none with weight decay; only those that have parameters.

        Convolutions and gates at ``fusion_rate`` times ``lr``, what ``trained`` names at ``other_rate`` times, low-rank terms
        at ``lr``.
        """
        owner = self._require(model, "parameter_groups")
        low = {id(p) for m in owner.modules() if isinstance(m, LoRALinear) for p in (m.lora_a, m.lora_b)}
        inner = [p for p in owner.model.parameters() if p.requires_grad]
        groups = (
            ("fusion", list(owner.fusions.parameters()), self.fusion_rate),
            ("trained", [p for p in inner if id(p) not in low], self.other_rate),
            ("low_rank", [p for p in inner if id(p) in low], 1.0),
        )
        return [
            {"name": name, "params": parameters, "lr": rate * lr, "weight_decay": 0.0}
            for name, parameters, rate in groups
            if parameters
        ]

    def finalize(self, model: nn.Module) -> CompressingDecoder:
        """A copy of ``model`` in evaluation mode, frozen, which reads and generates with the cache.

        Raises:
            ValueError: the model is not prepared, or finalized already.
        """
        self._require(model, "finalize")
        result = copy.deepcopy(bare(model)).eval().requires_grad_(False)
        assert isinstance(result, CompressingDecoder)
        result.final = True
        return result

    @torch.no_grad()
    def report(self, model: nn.Module, batches: Iterable[Any]) -> LoCoCoReport:
        """Bytes of the cache after the first of the batches of tokens, gates, and what compressing costs.

        Raises:
            ValueError: the model is not prepared; no batch.
        """
        owner = self._require(model, "report")
        tokens = next((first_input(batch) for batch in batches), None)
        if tokens is None:
            refuse("LoCoCo.report", "batches must have a batch of tokens [B, T], got none")
        with evaluation(owner):
            cache = owner.new_cache()
            owner(tokens, cache)
        held = [layer.held[0] for layer in cache.layers]
        scores = sum(layer.scores.nbytes for layer in cache.layers if layer.scores is not None)
        shapes = [(_kv_heads(attention), _size(attention)) for attention in _attentions(owner.model)]
        decoded = self.capacity + self.buffer + 1
        length = tokens.shape[1]
        of_token = 2 * sum(heads * d for heads, d in shapes) * held[0].element_size()
        linear = (m for m in owner.model.modules() if isinstance(m, (nn.Linear, QLoRALinear)))
        return LoCoCoReport(
            layers=len(held),
            batch=tokens.shape[0],
            tokens=length,
            cache_bytes=cache.bytes,
            held_bytes=2 * sum(x.nbytes for x in held) + scores,
            full_bytes=of_token * tokens.numel(),
            fusion_parameters=sum(p.numel() for p in owner.fusions.parameters()),
            trained=sum(p.numel() for p in owner.parameters() if p.requires_grad),
            gates=tuple(float(owner.gate(i)) for i in range(len(held))),
            prompt_flops=sum(self.compression_flops(n, shapes) for n in self.reductions(length)) / max(length, 1),
            decode_flops=self.compression_flops(decoded, shapes) / (self.buffer + 1),
            model_flops=2.0 * sum(m.in_features * m.out_features for m in linear),
        )

    # --------------------------------------------------------------------------------------------------- costs

    def reductions(self, tokens: int) -> list[int]:
        """How many tokens are held when the cache is reduced, each time that it is while so many are read in chunks."""
        held, found = 0, []
        for start in range(0, tokens, self.chunk):
            if held > self.capacity + self.buffer:
                found.append(held)
                held = self.capacity
            held += min(self.chunk, tokens - start)
        return found

    def compression_flops(self, held: int, shapes: Iterable[tuple[int, int]]) -> int:
        """FLOPs of one reduction of ``held`` tokens in layers with ``shapes``: heads of keys, and features of one.

        Example:
            >>> round(LoCoCo().compression_flops(512 + 17, 32 * [(32, 128)]) / 1e12, 2)  # Llama-2 7B, 17 tokens decoded
            0.81
        """
        rest, total = held - self.heavy, 0
        for heads, d in shapes:
            widths = [2 * d, *self.hidden]
            before = sum(a * b * self.taps for a, b in zip(widths, self.hidden, strict=False))
            total += 2 * heads * rest * (before + self.merged * (widths[-1] * self.taps + 2 * d))
        return total

    def _require(self, model: nn.Module, where: str) -> CompressingDecoder:
        check_module(f"LoCoCo.{where}", model)
        owner = bare(model)
        if not isinstance(owner, CompressingDecoder):
            raise ValueError(f"LoCoCo.{where}: the model has no compression; call prepare(model) first")
        if owner.final and where != "report":
            raise ValueError(f"LoCoCo.{where}: the model is finalized already")
        return owner


class CompressingDecoder(nn.Module):
    """A decoder that reads in chunks through a cache which compresses; made by :meth:`LoCoCo.prepare`.

    Attributes:
        model: the decoder.
        fusions: a :class:`cofire.nn.KVFusion` for each of its layers.
        method: how it was prepared.
    """

    def __init__(self, model: nn.Module, fusions: nn.ModuleList, method: LoCoCo) -> None:
        super().__init__()
        self.model, self.fusions, self.method, self.final = model, fusions, method, False

    def new_cache(self) -> LoCoCoCache:
        """An empty cache with the method's sizes."""
        m = self.method
        options: dict[str, Any] = {"buffer": m.buffer, "chunk": m.chunk, "normalize": m.normalize, "check": m.check}
        return LoCoCoCache(self.fusions, m.capacity, local=m.local, bptt=m.bptt > 1, **options)

    def gate(self, layer: int) -> Tensor:
        """The mixtures' share in a layer."""
        fusion = self.fusions[layer]
        assert isinstance(fusion, KVFusion)
        return fusion.share.detach()

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, *, lengths: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """The model's logits.

        Args:
            tokens: int64 ``[B, T]``.
            cache: with what was read before; None: a new one.
            lengths: how many of the tokens count in each row, the first ones; None: all.

        Returns:
            ``[B, T, vocabulary]``, or ``[B, classes]`` of a classifier.
        """
        cache = self.new_cache() if cache is None else cache
        outputs = []
        for i, (piece, counts) in enumerate(_pieces(tokens, self.method.chunk, lengths)):
            if i and i % self.method.bptt == 0:
                cache.detach()
            outputs.append(self.read(piece, cache, counts))
        if outputs[-1].dim() == 2:
            if lengths is not None:
                refuse("LoCoCo", "a classifier reads its class at the last token, so it takes no lengths")
            return outputs[-1]
        return torch.cat(outputs, 1)

    def read(self, tokens: Tensor, cache: KVCache, lengths: list[int] | None = None) -> Tensor:
        """The model's logits for at most ``chunk`` tokens."""
        return read(self.model, tokens, cache, lengths)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        *,
        cache: KVCache | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Go on after ``tokens``.

        Args:
            tokens: int64 ``[B, T]``, at least one.
            new_tokens: how many come after them.
            cache: with what was read before; None: a new one. Any policy's will do.
            lengths: how many of the tokens count in each row; None: all.
            temperature: 0 for the most probable token each time; else one drawn with probabilities of logits over this.
            generator: to draw with.

        Returns:
            ``tokens`` and the new ones, ``[B, T + new_tokens]``.
        """
        check_integer("generate", new_tokens=new_tokens)
        if tokens.dim() != 2 or tokens.shape[1] == 0 or new_tokens < 1:
            refuse(
                "generate", f"tokens must be [B, T] with T at least 1 and new_tokens at least 1, got {list(tokens.shape)}"
                f" and {new_tokens}",
            )  # fmt: skip
        cache = self.new_cache() if cache is None else cache
        logits = self(tokens, cache, lengths=lengths)
        if logits.dim() == 2:
            refuse("generate", "a classifier generates nothing")
        last = torch.full((len(tokens),), -1) if lengths is None else torch.as_tensor(lengths).cpu() - 1
        logits = logits[torch.arange(len(tokens)), last]
        found = [tokens]
        for left in reversed(range(new_tokens)):
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                token = logits.argmax(-1, keepdim=True)
            found.append(token)
            if left:
                logits = self.read(token, cache)[:, -1]
        return torch.cat(found, 1)


# ---------------------------------------------------------------------------------------------------- reading


def read(model: nn.Module, tokens: Tensor, cache: KVCache, lengths: list[int] | None = None) -> Tensor:
    """Logits of a decoder for tokens that come after those of ``cache``: of cofire's, or of a model of transformers."""
    if not _of_transformers(model):
        output: Tensor = model(tokens, cache) if lengths is None else model(tokens, cache, lengths=lengths)
        return output
    options: dict[str, Any] = {}
    starts = cache.lengths()
    if len(set(starts)) > 1:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        options["position_ids"] = torch.tensor(starts, device=tokens.device)[:, None] + steps
    past = cache.for_transformers(model, lengths=lengths)
    found: Tensor = model(input_ids=tokens, past_key_values=past, **options).logits
    return found


def _pieces(
    tokens: Tensor, chunk: int, lengths: Sequence[int] | Tensor | None
) -> Iterator[tuple[Tensor, list[int] | None]]:
    """Chunks, and how many of their tokens count in each row."""
    counts = None if lengths is None else [int(n) for n in lengths]
    if counts is not None and (len(counts) != len(tokens) or not all(1 <= n <= tokens.shape[1] for n in counts)):
        refuse("LoCoCo", f"lengths must be {len(tokens)} numbers from 1 to the {tokens.shape[1]} tokens, got {counts}")
    for i, piece in enumerate(tokens.split(chunk, 1)):
        size = piece.shape[1]
        yield piece, None if counts is None else [min(max(n - i * chunk, 0), size) for n in counts]


def backward(
    read: Callable[[Tensor, KVCache], Tensor],
    cache: KVCache,
    chunk: int,
    bptt: int,
    tokens: Tensor,
    target: Tensor | None,
) -> Tensor:
    """Add the gradients of the mean cross entropy, each back through at most ``bptt`` chunks.

    Args:
        read: the model, of tokens and the cache.
        cache: of any policy, empty; with ``bptt`` set where ``bptt`` is more than 1.
        chunk, bptt, tokens, target: as in :class:`LoCoCo` and :meth:`LoCoCo.backward`.
    """
    pieces = tokens.split(chunk, 1)
    if target is None:
        targets = [F.pad(piece[:, 1:], (0, 1), value=-100) for piece in pieces]
    elif target.dim() == 1:
        targets = [target[:0]] * (len(pieces) - 1) + [target]
    else:
        targets = list(target.split(chunk, 1))
    count = sum(int((part >= 0).sum()) for part in targets)
    if count == 0:
        refuse(
            "LoCoCo.backward", f"there must be a token to predict, got {tokens.shape[1]} tokens in chunks of {chunk}"
        )
    total = torch.zeros((), device=tokens.device)
    for first in range(0, len(pieces), bptt):
        group = range(first, min(first + bptt, len(pieces)))
        wanted = any(targets[i].numel() for i in group)
        pending = total.new_zeros(())
        with torch.set_grad_enabled(wanted):
            for i in group:
                output = read(pieces[i], cache)
                if targets[i].numel():
                    logits, labels = output.reshape(-1, output.shape[-1]), targets[i].reshape(-1)
                    pending = pending + F.cross_entropy(logits.float(), labels, reduction="sum") / count
        if pending.requires_grad:
            torch.autograd.backward(pending)
        cache.detach()
        total += pending.detach()
    return total


# --------------------------------------------------------------------------------------------------- the model


def _of_transformers(model: nn.Module) -> bool:
    return any(c.__module__.startswith("transformers.") for c in type(model).__mro__)


def _attentions(model: nn.Module) -> list[nn.Module]:
    """The attentions, by layer."""
    found = [
        m
        for m in model.modules()
        if isinstance(getattr(m, "layer_idx", None), int)
        and all(isinstance(getattr(m, p, None), nn.Module) for p in PROJECTIONS)
    ]
    found.sort(key=lambda m: int(m.layer_idx))  # type: ignore[arg-type]
    if not found or [m.layer_idx for m in found] != list(range(len(found))):
        refuse(
            "LoCoCo.prepare",
            f"model must have attentions with {', '.join(PROJECTIONS)} and layer_idx from 0 on, got "
            f"{[m.layer_idx for m in found] or 'none'} in {type(model).__name__}",
        )
    return found


def _size(attention: nn.Module) -> int:
    return int(attention.head_dim)  # type: ignore[arg-type]


def _kv_heads(attention: nn.Module) -> int:
    return int(attention.k_proj.out_features) // _size(attention)  # type: ignore[union-attr, arg-type]


def _scale_positions(model: nn.Module, factor: float) -> None:
    """All angles over ``factor``, which is to divide the positions by it."""
    found = False
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "frequency", None), Tensor) and hasattr(module, "scaling"):  # cofire's
            module.scaling *= factor
            found = True
        elif isinstance(getattr(module, "inv_freq", None), Tensor):
            for name in ("inv_freq", "original_inv_freq"):
                if isinstance(getattr(module, name, None), Tensor):
                    getattr(module, name).div_(factor)
            found = True
    if not found:
        refuse("LoCoCo.prepare", f"scaling needs rotary positions, got none in {type(model).__name__}")
    parameters = getattr(getattr(model, "config", None), "rope_parameters", None)
    if isinstance(parameters, dict) and parameters.get("rope_type", "default") == "default":
        parameters |= {"rope_type": "linear", "factor": factor}  # so that what is saved is read as it is
