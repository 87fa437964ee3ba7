# SPDX-License-Identifier: Apache-2.0
"""Dynamic-LLaVA: a vision-language decoder learns which tokens of the image, and of its own answer, it can do without.

From one layer on only chosen tokens are there. Two small networks choose them by their hidden states before that layer: a
fixed share of the image's tokens, and of the answer's each one for itself. In training all tokens are computed and the
dropped ones masked, so that dropping gets a gradient; afterwards the dropped ones are left out of the hidden states and of
the cache.

Source: Huang et al., "Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic Vision-language Context
Sparsification", ICLR 2025.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import ops
from cofire.methods.base import Method, Report, bare, evaluation, first_input, replace_modules
from cofire.methods.deployed import Timing, latency_of
from cofire.models.vision_language import Attend, Decoder, causal
from cofire.models.vit import Block
from cofire.ops.checks import check_choice, check_integer, check_module, check_number

#: How tokens of the image are chosen: by a predictor, or, as a control, by chance.
CHOICES = ("learned", "random")


@dataclass(frozen=True)
class DynamicLLaVAReport(Report):
    """What is left out. Token-layers are tokens times the layers that compute them, of one prompt."""

    image_tokens: int
    kept_tokens: int  #: of the image, by the layers that do without the others
    dense_token_layers: int
    token_layers: int
    dense_cache_bytes: int  #: of keys and values of the prompts of the first batch
    cache_bytes: int
    vision_rate: float  #: share of the image's tokens that the predictor would keep by itself, not by rank
    text_rate: float | None  #: share of the answers' tokens that are kept; None where there are none, or all stay
    predictor_parameters: int
    latency: Timing | None  #: of the deployed and the dense network's forward, if the dense one is given

    @property
    def cut(self) -> float:
        """Share of the token-layers of a prompt that is saved."""
        return 1 - self.token_layers / self.dense_token_layers


@dataclass(frozen=True)
class DynamicLLaVA(Method, name="dynamicllava"):
    """Sparse vision and language context.

    Args:
        vision_keep: share of the image's tokens that stay, in (0, 1]; rounded down to a number of tokens.
        text_keep: share of the answer's tokens that stay, in (0, 1]; 1: all, without a predictor.
        layer: the first one that does without the others.
        steps: calls of :meth:`step` in which the temperature of the choice falls from 1 to 0.1, as an exponential.
        weight: of the loss of the shares.
        min_answer: in training, shorter answers stay whole.
        predictor_width, predictor_depth, predictor_heads, predictor_hidden: of the vision predictor's transformer.
        noise: whether the choice is sampled in training; else the likelier one is taken.
        exact: whether in training, too, exactly as many of an image's tokens are kept as when deployed, those whose logits
            differ most; noise is then added to that difference, times the temperature. Else each token is kept or dropped
            for itself, as published, and an image keeps more or fewer.
        detach: whether the predictors pass no gradient on to the layers below. Else the loss of the shares, with its weight,
            trains those too, as published.
        settle: share of ``steps``, in (0, 1], after which the predictors get no gradient any more: the network then learns to
            answer by a choice that stands. 1: never, as published.
        choice: "learned", or "random": the control that keeps as many of the image's tokens, by chance.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.

    Example:
        >>> from cofire.models import vision_language
        >>> method = DynamicLLaVA(vision_keep=0.25, layer=1, predictor_width=32, predictor_heads=4, predictor_hidden=64)
        >>> model = method.prepare(vision_language())
        >>> images, text = torch.randn(2, 1, 16, 16), torch.randint(1, 32, (2, 9))
        >>> logits = model(images, text, answer=6)
        >>> loss = F.cross_entropy(logits[:, 5:-1].flatten(0, 1), text[:, 6:].flatten()) + method.loss(model)
        >>> loss.backward(); method.step(model)
        >>> method.finalize(model).generate(images, text[:, :6], 3).shape
        torch.Size([2, 3])

    Source: Huang et al. 2025 (2412.00876), section 3; its defaults. The predictor of instructions is off there, and not here.
    """

    vision_keep: float = 0.2
    text_keep: float = 0.5
    layer: int = 2
    steps: int = 10_000
    weight: float = 100.0
    min_answer: int = 50
    predictor_width: int = 512
    predictor_depth: int = 2
    predictor_heads: int = 8
    predictor_hidden: int = 2048
    noise: bool = True
    exact: bool = False
    detach: bool = False
    settle: float = 1.0
    choice: str = "learned"

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(
            name, vision_keep=self.vision_keep, text_keep=self.text_keep, settle=self.settle, weight=self.weight
        )
        for which in ("vision_keep", "text_keep", "settle"):
            if not 0 < getattr(self, which) <= 1:
                raise ValueError(f"{name}: {which} must be in (0, 1], got {getattr(self, which)}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"{name}: weight must not be negative, got {self.weight}")
        least = {"layer": 0, "steps": 1, "min_answer": 0, "predictor_width": 4, "predictor_depth": 0}
        for which, bound in (least | {"predictor_heads": 1, "predictor_hidden": 1}).items():
            check_integer(name, **{which: getattr(self, which)})
            if getattr(self, which) < bound:
                raise ValueError(f"{name}: {which} must be at least {bound}, got {getattr(self, which)}")
        if self.predictor_width % self.predictor_heads:
            wanted = f"a multiple of predictor_heads ({self.predictor_heads})"
            raise ValueError(f"{name}: predictor_width must be {wanted}, got {self.predictor_width}")
        check_choice(name, "choice", self.choice, CHOICES)

    # ---------------------------------------------------------------------------------------------- protocol

    def prepare(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` that chooses.

        What a model must offer: one :class:`cofire.models.vision_language.Decoder`, a list of blocks that are called with
        hidden states, positions and the attention to use, before which image and text have become tokens in one sequence.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: prepared already, no or several decoders, or one with too few layers.
        """
        name = "DynamicLLaVA.prepare"
        check_module(name, model)
        result = copy.deepcopy(bare(model))
        found = [m for m in result.modules() if isinstance(m, Decoder)]
        if any(isinstance(m, SparseDecoder) for m in found):
            raise ValueError(f"{name}: the model is prepared already")
        if len(found) != 1:
            raise ValueError(f"{name}: the model must have one cofire.models.vision_language.Decoder, got {len(found)}")
        depth = len(found[0].blocks)
        if self.layer >= depth:
            raise ValueError(f"{name}: layer must be less than the decoder's {depth} layers, got {self.layer}")
        return replace_modules(result, {id(found[0]): SparseDecoder(found[0].blocks, found[0].features, self)}).train(
            model.training
        )

    def loss(self, model: nn.Module, output: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """``weight`` times the squared distances of each sample's kept shares to ``vision_keep`` and ``text_keep``.

        Raises:
            ValueError: not prepared, or no forward in training mode yet.
        """
        decoder = self._require(model, "loss")
        if decoder.rate_loss is None:
            raise ValueError("DynamicLLaVA.loss: the model has seen no forward in training mode; call it after prepare")
        return self.weight * decoder.rate_loss

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Lower the temperature."""
        decoder = self._require(model, "step")
        decoder.temperature.mul_(0.1 ** (1 / self.steps)).clamp_(min=0.1)

    def finalize(self, model: nn.Module) -> nn.Module:
        """A frozen copy that leaves out what is dropped, whatever its mode.

        Raises:
            ValueError: not prepared, or finalized already.
        """
        self._require(model, "finalize")
        result = copy.deepcopy(bare(model)).eval().requires_grad_(False)
        decoder_of(result).final = True
        return result

    def parameter_groups(
        self, model: nn.Module, lr: float = 5e-6, predictor_lr: float = 2e-4, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for ``torch.optim.AdamW``: the network's, with weight decay on matrices alone, and the predictors'."""
        decoder = self._require(model, "parameter_groups")
        parts = [part for part in (decoder.vision, decoder.text) if part is not None]
        predictors = [p for part in parts for p in part.parameters()]
        known = set(map(id, predictors))
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        return [
            {"params": [p for p in others if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in others if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
            {"params": predictors, "lr": predictor_lr, "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def report(self, model: nn.Module, batches: Iterable[Any], dense: nn.Module | None = None) -> DynamicLLaVAReport:
        """Tokens, layers and bytes that are saved.

        Args:
            model: a prepared model.
            batches: what the model is called with, a tensor or a tuple of all arguments; or tuples that begin with it.
            dense: the network that it was made from, to time the deployed one against it, on the first batch.

        Raises:
            ValueError: not prepared, or no batches.
        """
        decoder, final = self._require(model, "report"), self.finalize(model)
        calls = [_arguments(batch) for batch in batches]
        if not calls:
            raise ValueError("DynamicLLaVA.report: batches must hold at least one batch, got none")
        counts = torch.zeros(4, dtype=torch.float64)
        shapes: list[tuple[int, int, int, int]] = []

        def look(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            if isinstance(module, SparseDecoder):
                counts.add_(module.rates(*args, **options))
                x, images, answer, *_ = args
                shapes.append((x.shape[0], images, answer, x.shape[2] * x.element_size()))

        sparse = decoder_of(final)
        hook = sparse.register_forward_pre_hook(look, with_kwargs=True)
        try:
            for call in calls:
                final(*call)
        finally:
            hook.remove()
        rows, images, prompt, width = shapes[0]
        left, depth = prompt - images + sparse.kept_of(images), len(sparse.blocks)
        layers = prompt * sparse.layer + left * (depth - sparse.layer)
        timing = None
        if dense is not None:
            with evaluation(bare(dense)):
                before, after = (functools.partial(_call, network, calls[0]) for network in (bare(dense), final))
                timing = latency_of(before, after, calls[0][0])
        vision, image_tokens, text, answers = counts.tolist()
        parts = [p for p in (decoder.vision, decoder.text) if p is not None]
        return DynamicLLaVAReport(
            image_tokens=images,
            kept_tokens=sparse.kept_of(images),
            dense_token_layers=prompt * depth,
            token_layers=layers,
            dense_cache_bytes=2 * rows * width * prompt * depth,
            cache_bytes=2 * rows * width * layers,
            vision_rate=vision / image_tokens,
            text_rate=text / answers if answers else None,
            predictor_parameters=sum(p.numel() for part in parts for p in part.parameters()),
            latency=timing,
        )

    def _require(self, model: nn.Module, where: str) -> SparseDecoder:
        check_module(f"DynamicLLaVA.{where}", model)
        found = [m for m in bare(model).modules() if isinstance(m, SparseDecoder)]
        if not found:
            raise ValueError(
                f"DynamicLLaVA.{where}: the model has no decoder of this method; call prepare(model) first"
            )
        if found[0].final:
            raise ValueError(f"DynamicLLaVA.{where}: the model is finalized already")
        return found[0]


def decoder_of(model: nn.Module) -> SparseDecoder:
    """The decoder of a prepared model."""
    return next(m for m in bare(model).modules() if isinstance(m, SparseDecoder))


def _arguments(batch: Any) -> tuple[Any, ...]:
    call = first_input(batch)
    return tuple(call) if isinstance(call, (tuple, list)) else (call,)


def _call(network: nn.Module, args: tuple[Any, ...], _: Tensor) -> Any:
    return network(*args)


# ----------------------------------------------------------------------------------------------------- predictors


def _funnel(width: int) -> nn.Sequential:
    """Linear layers to two logits: to keep a token, and to drop it."""
    half, quarter = width // 2, width // 4
    return nn.Sequential(nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2))


class VisionPredictor(nn.Module):
    """Tokens of an image ``[B, n, D]`` to logits ``[B, n, 2]``: each has a say, and half of its features are their mean."""

    def __init__(self, features: int, width: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.GELU())
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.end = _funnel(width)

    def forward(self, x: Tensor) -> Tensor:
        own, shared = self.blocks(self.start(x)).tensor_split(2, -1)
        logits: Tensor = self.end(torch.cat([own, shared.mean(1, keepdim=True).expand_as(shared)], -1))
        return logits


class TextPredictor(nn.Module):
    """Tokens of a text ``[B, n, D]`` to logits ``[B, n, 2]``, each by itself."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.GELU())
        self.end = _funnel(width)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.end(self.start(x))
        return logits


def chosen(logits: Tensor, temperature: Tensor, noise: bool) -> Tensor:
    """Zeros and ones, which a sample of the logits' softmax decides, with the gradient of its softened form."""
    scores = logits.float().log_softmax(-1)
    if noise:
        scores = scores - torch.empty_like(scores).exponential_().log()
    soft = (scores / temperature).softmax(-1)[..., 0]
    hard = (scores[..., 0] > scores[..., 1]).to(soft.dtype)
    return hard + (soft - soft.detach())


def best(logits: Tensor, count: int, temperature: Tensor, noise: bool) -> Tensor:
    """Zeros and exactly ``count`` ones a row: the tokens that gain most by being kept.

    The gradient is that of a sigmoid around what parts them from the others. Noise, that of the sample in :func:`chosen`,
    fades with the temperature: tokens are tried first, and are those of the deployed network at last.
    """
    gain = logits[..., 0].float() - logits[..., 1].float()
    if noise:
        # The difference of two samples of Gumbel's law is logistic.
        gain = gain + temperature * torch.rand_like(gain).logit(1e-7)
    index, *_ = ops.kv_select(gain.detach()[:, None], count, 0)
    hard = torch.zeros_like(gain).scatter(1, index[:, 0].long(), 1.0)
    lowest = gain.detach().masked_fill(hard == 0, math.inf).amin(1, keepdim=True)
    highest = gain.detach().masked_fill(hard == 1, -math.inf).amax(1, keepdim=True)
    between = torch.where(highest.isfinite(), (lowest + highest) / 2, lowest)
    soft = ((gain - between) / temperature).sigmoid()
    return hard + (soft - soft.detach())


# --------------------------------------------------------------------------------------------------------- decoder


class Cache:
    """Keys and values of each layer, with room for what comes, and how many each row has."""

    def __init__(self, room: int, tokens: int) -> None:
        self.room, self.tokens = room, tokens  #: tokens so far, kept or not: the next one's position
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []

    def fill(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention to a prompt, whose keys and values are the first of the next layer."""
        batch, heads, tokens, d = key.shape
        keys, values = (x.new_zeros(batch, heads, tokens + self.room, d) for x in (key, value))
        keys[:, :, :tokens], values[:, :, :tokens] = key, value
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=key.device)
        self.layers.append((keys, values, lengths))
        return causal(query, key, value)

    def append(self, layer: int, keep: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of a token to what its row kept and to itself, which stays where ``keep`` says so."""
        keys, values, lengths = self.layers[layer]
        seen = ops.kv_append_(keys, values, lengths, key, value, keep)
        there = torch.arange(keys.shape[2], device=keys.device) < seen[:, None]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=there[:, None, None])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for keys, values, _ in self.layers for x in (keys, values))


class SparseDecoder(Decoder):
    """A decoder whose layers from ``layer`` on do without some of the tokens.

    Attributes:
        rate_loss: scalar with a graph, of the last forward in training.
        temperature: of the choice, a buffer.
        final: leaves out what is dropped in training mode too.
    """

    temperature: Tensor

    def __init__(self, blocks: nn.ModuleList, features: int, method: DynamicLLaVA) -> None:
        super().__init__(blocks, features)
        example = next(blocks.parameters())
        sizes = (method.predictor_width, method.predictor_depth, method.predictor_heads, method.predictor_hidden)
        learned = method.choice == "learned"
        self.vision = VisionPredictor(features, *sizes).to(example) if learned else None
        self.text = TextPredictor(features, method.predictor_width).to(example) if method.text_keep < 1 else None
        self.layer, self.noise, self.exact = method.layer, method.noise, method.exact
        self.detach, self.settle = method.detach, method.settle
        self.vision_keep, self.text_keep, self.min_answer = method.vision_keep, method.text_keep, method.min_answer
        self.register_buffer("temperature", torch.ones((), device=example.device))
        self.rate_loss: Tensor | None = None
        self.final = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rate_loss": None}  # no leaf, and of one forward only

    def kept_of(self, images: int) -> int:
        """How many of so many tokens of an image stay."""
        kept = math.floor(self.vision_keep * images + 1e-9)
        if kept == 0:
            raise ValueError(
                f"DynamicLLaVA: vision_keep ({self.vision_keep:g}) leaves none of the {images} image tokens"
            )
        return kept

    def forward(
        self, x: Tensor, images: int, answer: int, lengths: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """All tokens in training; else without those of the image that are dropped, and the answer's dropped ones masked.

        Args:
            x, images, answer, lengths: as in :class:`cofire.models.vision_language.Decoder`.
            keep: ``[B, N]`` of zeros and ones, in place of the predictors' choice; in evaluation equally many of each image.

        Raises:
            ValueError: an answer outside of the sequence, no token of the image left, a ``keep`` that does not fit.
        """
        self._check(x, images, answer, keep)
        x = self._before(x)
        if self.training and not self.final:
            mask = self._mask(x, images, answer, lengths) if keep is None else keep.to(x.dtype)
            attend: Attend = functools.partial(_attend_masked, mask)
            return self._after(x, self._positions(x), attend)
        end = x.shape[1] - answer
        x, positions = self._left(x, images, keep)
        if end == 0:
            return self._after(x, positions, causal)
        stays = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        stays[:, -end:] = self._decide(x[:, -end:]) if keep is None else keep[:, -end:] > 0
        return self._after(x, positions, functools.partial(_attend_kept, stays))

    def prefill(self, x: Tensor, images: int, room: int) -> tuple[Tensor, Cache]:
        self._check(x, images, x.shape[1], None)
        cache = Cache(room, x.shape[1])
        x = self._before(x, cache.fill)
        x, positions = self._left(x, images, None)
        return self._after(x, positions, cache.fill), cache

    def decode(self, x: Tensor, cache: Cache) -> Tensor:
        position = torch.full((1, 1), cache.tokens, device=x.device)
        keep = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        for i, block in enumerate(self.blocks):
            if i == self.layer:
                keep = self._decide(x)[:, 0]
            x = block(x, position, functools.partial(cache.append, i, keep))
        cache.tokens += 1
        return x

    def last(self, x: Tensor, images: int, answer: int) -> Tensor:
        """The last token's, of what is left: of the answer as many as the row that keeps most of it needs."""
        self._check(x, images, answer, None)
        x = self._before(x)
        end = x.shape[1] - answer
        x, positions = self._left(x, images, None)
        if end == 0:
            return self._after(x, positions, causal)[:, -1:]
        stays = self._decide(x[:, -end:])
        stays[:, -1] = True
        index, count = ops.compact(stays)
        index = index[:, : int(count.max())].long()  # rows that keep fewer are padded in front, unseen
        there = index >= 0
        order = there.int().argsort(dim=1, stable=True)
        index, there = index.gather(1, order).clamp(min=0), there.gather(1, order)
        first = x.shape[1] - end
        index = torch.cat([torch.arange(first, device=x.device).expand(x.shape[0], -1), first + index], 1)
        there = F.pad(there, (first, 0), value=True)
        attend = functools.partial(_attend_kept, there)
        return self._after(_rows(x, index), positions.gather(1, index), attend)[:, -1:]

    def rates(
        self, x: Tensor, images: int, answer: int, lengths: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """How many tokens of the images the predictor keeps, how many there are, and the same of the answers."""
        x = self._before(x)
        counts = torch.zeros(4, dtype=torch.float64)
        counts[1] = x.shape[0] * images
        if self.vision is None:
            counts[0] = x.shape[0] * self.kept_of(images)
        else:
            counts[0] = _keeps(self.vision(x[:, :images])).sum()
        if self.text is not None and answer < x.shape[1]:
            real = _real(x, lengths)[:, answer:]
            counts[2], counts[3] = (self._decide(x[:, answer:]) & real).sum(), real.sum()
        return counts

    # ------------------------------------------------------------------------------------------------- parts

    def _check(self, x: Tensor, images: int, answer: int, keep: Tensor | None) -> None:
        name, (batch, count) = "DynamicLLaVA", x.shape[:2]
        if not 0 < images <= answer <= count:
            where = f"between the {images} image tokens and the end of the {count} tokens"
            raise ValueError(f"{name}: answer must begin {where}, got {answer}")
        self.kept_of(images)
        if keep is None:
            return
        if list(keep.shape) != [batch, count]:
            raise ValueError(f"{name}: keep must have shape [{batch}, {count}], got {list(keep.shape)}")
        if not self.training and not torch.compiler.is_compiling() and keep.device.type == "cpu":
            if not bool(((keep == 0) | (keep == 1)).all()):
                raise ValueError(f"{name}: keep must hold zeros and ones in evaluation, got other values")
            kept = keep[:, :images].sum(1)
            if not bool((kept == kept[:1]).all()):
                raise ValueError(f"{name}: keep must hold as many tokens of each image, got {kept.int().tolist()}")

    @staticmethod
    def _positions(x: Tensor) -> Tensor:
        return torch.arange(x.shape[1], device=x.device)[None]

    def _before(self, x: Tensor, attend: Attend = causal) -> Tensor:
        for block in self.blocks[: self.layer]:  # type: ignore[union-attr]
            x = block(x, self._positions(x), attend)
        return x

    def _after(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        for block in self.blocks[self.layer :]:  # type: ignore[union-attr]
            x = block(x, positions, attend)
        return x

    def _mask(self, x: Tensor, images: int, answer: int, lengths: Tensor | None) -> Tensor:
        """In training: which tokens others attend to ``[B, N]``, with a gradient; and the loss of their shares."""
        temperature, batch = self.temperature, x.shape[0]
        seen = x.detach() if self.detach else x
        if self.vision is None:
            vision = self._by_chance(x, images)
            loss = x.new_zeros((), dtype=torch.float32, requires_grad=True)
        else:
            logits = self._settled(self.vision(seen[:, :images]))
            vision = alone = chosen(logits, temperature, self.noise and not self.exact)
            if self.exact:
                vision = best(logits, self.kept_of(images), temperature, self.noise)
            loss = (self.vision_keep - alone.mean(1)).square().mean()
        parts = [vision, vision.new_ones(batch, answer - images)]
        if self.text is not None and answer < x.shape[1]:
            real = _real(x, lengths)[:, answer:]
            text = chosen(self._settled(self.text(seen[:, answer:])), temperature, self.noise)
            count = real.sum(1)
            mean = (text * real).sum(1) / count.clamp(min=1)
            loss = loss + torch.where(count >= max(self.min_answer, 1), (self.text_keep - mean).square(), 0).mean()
            parts.append(torch.where(count[:, None] >= self.min_answer, text, 1))
        else:
            parts.append(vision.new_ones(batch, x.shape[1] - answer))
        self.rate_loss = loss
        return torch.cat(parts, 1)

    def _settled(self, logits: Tensor) -> Tensor:
        """Without a gradient from then on. The temperature says when, on its device, so that a training that is resumed
        knows it too."""
        if self.settle == 1:
            return logits
        fixed = logits.detach()
        return torch.where(self.temperature > 0.1**self.settle * (1 + 1e-6), logits, fixed)

    def _by_chance(self, x: Tensor, images: int) -> Tensor:
        scores = torch.rand(x.shape[0], images, device=x.device)
        index, *_ = ops.kv_select(scores[:, None], self.kept_of(images), 0)
        return torch.zeros_like(scores).scatter(1, index[:, 0].long(), 1.0)

    def _left(self, x: Tensor, images: int, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states and positions without the image's dropped tokens."""
        batch, count = x.shape[:2]
        if keep is not None:
            scores, kept = keep[:, :images].float(), int(keep[0, :images].sum())
        else:
            kept = self.kept_of(images)
            if self.vision is None:
                scores = torch.rand(batch, images, device=x.device)
            else:
                logits = self.vision(x[:, :images]).float()
                scores = logits[..., 0] - logits[..., 1]
        index, *_ = ops.kv_select(scores[:, None], kept, 0)
        text = torch.arange(images, count, device=x.device).expand(batch, -1)
        left = torch.cat([index[:, 0].long(), text], 1)
        return _rows(x, left), left

    def _decide(self, x: Tensor) -> Tensor:
        """Which tokens of an answer stay ``[B, n]``."""
        if self.text is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return _keeps(self.text(x))


def _keeps(logits: Tensor) -> Tensor:
    return logits[..., 0] > logits[..., 1]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(*index.shape, x.shape[2]))


def _real(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Which tokens are no padding ``[B, N]``."""
    if lengths is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def _attend_masked(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ops.masked_softmax_attention(query, key, value, mask)


def _attend_kept(stays: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """To the tokens that stay and came before, and to itself."""
    count = query.shape[2]
    before = torch.ones(count, count, dtype=torch.bool, device=query.device).tril(-1)
    own = torch.eye(count, dtype=torch.bool, device=query.device)
    mask = (before & stays[:, None] | own)[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
