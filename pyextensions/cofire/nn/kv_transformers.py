# SPDX-License-Identifier: Apache-2.0
"""The caches of :mod:`cofire.nn.kv_cache` for the models of transformers.

Importing this file registers the attention "cofire_scores" with transformers. A model that uses it hands queries to the
cache with the keys: the cache then attends, so that it learns how much attention each token got.
"""

from __future__ import annotations

import copy
import sys
import threading
import types
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from cofire import ops
from cofire.nn.kv_cache import KVCache, integers
from cofire.ops.checks import refuse, shape_of

__all__ = ["ATTENTION", "TransformersCache"]

#: The name by which models ask for the attention that tells the cache its scores.
ATTENTION = "cofire_scores"


class _Handover(threading.local):
    """From what transformers calls first to what it calls then."""

    layer: TransformersLayer | None = None  # was given keys and waits for the queries
    told: bool = False  # the cache that was asked for its sizes knows the lengths of the rows


_waiting = _Handover()


class TransformersLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a cache, as transformers asks for it."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: KVCache, index: int, deferred: bool, lengths: Sequence[int] | None) -> None:
        super().__init__()
        self.cache, self.index, self.deferred, self.lengths = cache, index, deferred, lengths
        cache.layer(index)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """With the first token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.deferred:
            return self.cache.update(self.index, key_states, value_states)
        before = _waiting.layer
        if before is not None and before.cache is self.cache:
            _waiting.layer = None
            raise RuntimeError(
                f"{type(self.cache).__name__}: layer {before.index} attended without the cache: "
                f'call model.set_attn_implementation("{ATTENTION}")'
            )
        _waiting.layer, _waiting.told = self, False
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        at, cache = self.cache.layers[self.index], self.cache
        held = at.count
        if cache.capacity is not None and held > cache.capacity + cache.buffer:
            held = cache.capacity
        return held + query_length, at.seen - held

    def get_seq_length(self) -> int:
        return self.cache.layers[self.index].seen

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        raise RuntimeError(f"{type(self.cache).__name__}: the cache cannot be moved to another device and back")

    def reset(self) -> None:
        if _waiting.layer is not None and _waiting.layer.cache is self.cache:
            _waiting.layer = None
        self.cache.layers[self.index].clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.layers[self.index].select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.layers[self.index].select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        at = self.cache.layers[self.index]
        at.select(torch.arange(at.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError(f"{type(self.cache).__name__}: tokens that were fused or dropped cannot be taken back")


class TransformersCache(Cache):  # type: ignore[misc]
    """A cache for the models of transformers: in ``generate``, or given to ``forward``.

    Args:
        cache: with tokens of an earlier call, or without.
        model: whose layers it serves. Policies that need scores or queries need a model with the attention
            "cofire_scores"; it takes prompts of any length, in pieces of ``cache.chunk`` tokens. Others work with any
            attention, and then with prompts of at most ``chunk`` tokens at once (``prefill_chunk_size`` of ``generate``).
        lengths: see :meth:`KVCache.for_transformers`.

    Attributes:
        cache: the cache, with all its methods.

    With the attention "cofire_scores" a batch may be padded: pass ``attention_mask``. On the left, as ``generate`` wants it;
    on the right in ``forward`` alone, with ``position_ids`` after the prompt. Each row then has a cache of its own. With
    other attentions the policies do not see the mask: do not pad there.

    A mask costs one wait for the device in each forward, also of one token: only then is it known whether a row rests.
    Without a mask nobody waits. A compiled step of one token does not wait either; the device asserts there that no row
    rests, and on a GPU such an assertion ends the process's use of it. Do not compile steps in which rows rest.

    It can be pickled and copied. A pickle has no model: what comes out of it does not notice gradient checkpointing.

    Raises:
        RuntimeError: the model has another attention than the policy needs, layers that see a window only, or trains with
            gradient checkpointing, for which transformers takes the cache away; tokens are to be taken back.
        ValueError: masks that are not causal or have gaps, a mask where ``lengths`` were given, prompts for ``generate``
            that are padded on the right.

    Example:
        >>> model.set_attn_implementation("cofire_scores")  # doctest: +SKIP
        >>> past = HeavyHitterCache(512).for_transformers(model)  # doctest: +SKIP
        >>> model.generate(ids, past_key_values=past, max_new_tokens=100)  # doctest: +SKIP
    """

    def __init__(self, cache: KVCache, model: nn.Module, lengths: Sequence[int] | None = None) -> None:
        config: Any = model.config
        config = config.get_text_config(decoder=True)
        name = type(cache).__name__
        deferred = config._attn_implementation == ATTENTION
        if cache.needs and not deferred:
            raise RuntimeError(
                f"{name}: the policy needs the {cache.needs} of the attention, which {config._attn_implementation!r} does "
                f'not give: call model.set_attn_implementation("{ATTENTION}")'
            )
        if lengths is not None and not deferred:
            raise RuntimeError(
                f"{name}: lengths need the attention {ATTENTION!r}, got {config._attn_implementation!r}: call "
                f'model.set_attn_implementation("{ATTENTION}")'
            )
        kinds = getattr(config, "layer_types", None) or [
            "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        ]
        if any(kind != "full_attention" for kind in kinds):
            raise RuntimeError(f"{name}: all layers of the model must attend to all tokens, got {sorted(set(kinds))}")
        self.cache = cache
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)  # (a copy of the cache is no copy of the model)
        super().__init__(
            layers=[TransformersLayer(cache, i, deferred, lengths) for i in range(config.num_hidden_layers)]
        )

    @property
    def seen(self) -> int:
        return self.cache.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Asked before each forward; the first to know that transformers is about to take the cache away."""
        if torch.is_grad_enabled() and self._model is not None and _checkpoints(self._model()):
            raise RuntimeError(
                f"{type(self.cache).__name__}: gradient checkpointing takes the cache away from the layers, so that it would "
                "not be used: call model.gradient_checkpointing_disable(), activation_checkpointing_disable() in newer versions"
            )
        _waiting.told = getattr(self.layers[layer_idx], "lengths", None) is not None
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformersCache:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.cache!r})"


def _checkpoints(model: nn.Module | None) -> bool:
    """Whether layers of the model are computed anew in the backward."""
    return model is not None and any(
        m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules()
    )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention, by the protocol of transformers; ``attention_mask`` is what :func:`_mask` made of the mask."""
    layer, _waiting.layer = _waiting.layer, None
    if dropout:
        refuse(ATTENTION, f"attention has no dropout here, got {dropout}: set attention_dropout to 0")
    for name in ("softcap", "sliding_window", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            refuse(ATTENTION, f"{name} is not supported")
    if attention_mask is not None and attention_mask.dim() != 2:
        refuse(ATTENTION, f"only masks of padding are supported, got one of shape {shape_of(attention_mask)}")
    if layer is not None:
        starts, lengths = (None, layer.lengths) if attention_mask is None else attention_mask
        if lengths is not None:
            _check_side(layer, starts, lengths, query)
            layer.lengths = None  # they were those of this call
        output = layer.cache.attend(layer.index, query, key, value, scale=scaling, lengths=lengths, starts=starts)
    else:
        if attention_mask is not None:
            refuse(ATTENTION, "padding needs a cache of cofire, got none")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        output, _, _ = ops.attention_with_scores(query, key, value, causal=causal, scale=scaling, window=0)
    return output.transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Where the new tokens that count begin in each row of the batch, and how many they are: int64 ``[2, B]`` on the CPU, or
    None where all count."""
    told, _waiting.told = _waiting.told, False
    if mask_function is not causal_mask_function:
        refuse(ATTENTION, "only causal masks are supported")
    if attention_mask is None:
        return None
    if told:
        refuse(ATTENTION, "attention_mask must not be given where the cache was given lengths, got both")
    mask = attention_mask[:, : q_offset + q_length]
    if mask.shape[1] < q_offset + q_length:
        refuse(
            ATTENTION,
            f"attention_mask must have a column for each of the {q_offset + q_length} tokens, read ones included, got "
            f"{mask.shape[1]}",
        )
    if q_length == 1 and q_offset and torch.compiler.is_compiling() and (mask.is_cpu or mask.is_cuda):
        # A graph cannot ask which rows go on. It takes it that all do, and the device sees to it.
        torch._assert_async(
            mask[:, -1].all(), f"{ATTENTION}: attention_mask must be 1 for each row of a compiled step of one token"
        )
        return None
    new = mask[:, q_offset:]
    if bool(new.all()):
        return None
    new = new.cpu().bool()
    lengths, starts = new.sum(-1), new.int().argmax(-1)
    place = torch.arange(q_length)
    between = (place >= starts[:, None]) & (place < (starts + lengths)[:, None])
    if not torch.equal(new, between):
        row = int((new != between).any(-1).int().argmax())
        refuse(ATTENTION, f"attention_mask must have the ones of a row side by side, got gaps in row {row}")
    return torch.stack([starts, lengths])


def _check_side(
    layer: TransformersLayer, starts: Tensor | None, lengths: Sequence[int] | Tensor, query: Tensor
) -> None:
    """Refuse prompts for ``generate`` of which a row ends before the last column."""
    if layer.index:
        return  # the first layer was asked
    batch, _, tokens, _ = query.shape
    before = layer.cache.layers[layer.index].lengths(batch)
    first = [0] * batch if starts is None else integers(starts)
    rows = zip(before, first, integers(lengths), strict=False)  # (the cache refuses another number of lengths)
    if any(seen + count and start + count < tokens for seen, start, count in rows) and _generates(layer.cache):
        refuse(
            ATTENTION,
            "prompts for generate, which reads the logits of the last column, must be padded on the left, got padding on "
            "the right",
        )


def _generates(cache: KVCache) -> bool:
    """Whether ``generate`` is what calls the model with this cache; nothing that it hands to the attention tells. What it
    calls besides, such as a LogitsProcessor with a model and a cache of its own, is not meant."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("transformers.generation."):
            for x in frame.f_locals.values():  # the arguments of the model are in one of its dictionaries
                for held in x.values() if isinstance(x, dict) else (x,):
                    if isinstance(held, TransformersCache) and held.cache is cache:
                        return True
        frame = frame.f_back
    return False


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)
