# SPDX-License-Identifier: Apache-2.0
"""Caches of keys and values: of fixed size, by one of several policies, or whole. One machinery, one interface.

A cache holds, for each layer, a preallocated tensor to which new tokens are appended in place. Where its policy bounds it,
more than ``capacity + buffer`` tokens are reduced to ``capacity`` before the next ones come: the reduction reads one
tensor and writes a spare one, which all layers share.

Where a gradient is wanted nothing is written in place: the tokens of the cache are then a new tensor with each call. It is
detached after each call, unless ``bptt`` is set, so that what the compression learns it learns from the very next call.

Nothing here needs transformers; :mod:`cofire.nn.kv_transformers` lets its models use these caches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import ops
from cofire.nn.kv_fusion import KVFusion
from cofire.ops.checks import check_float, check_integer, refuse, shape_of
from cofire.ops.kv_fusion import rows_at

__all__ = ["FullCache", "HeavyHitterCache", "KVCache", "LoCoCoCache", "SlidingWindowCache", "SnapKVCache"]

Pair = tuple[Tensor, Tensor]


def integers(numbers: Sequence[int] | Tensor) -> list[int]:
    found: list[int] = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
    return found


class CacheLayer:
    """What a cache holds for one layer.

    Attributes:
        count: tokens that are held.
        seen: tokens that were fed, with those that only fill up a batch.
        scores: fp32 ``[B, Hkv, count]``, or None.
    """

    def __init__(self, cache: KVCache, index: int) -> None:
        self.cache, self.index = cache, index
        self.store: Tensor | None = None  # [2, B, Hkv, room, d]: keys and values
        self.loose: Pair | None = None  # what is held instead, where a gradient was wanted
        self.rows: list[CacheLayer] | None = None  # one for each of the batch, since their lengths differ
        self.clear()

    def clear(self) -> None:
        self.count = self.seen = 0
        self.loose = self.rows = None
        self.scores: Tensor | None = None
        self.queries: Tensor | None = None  # of the last tokens, where the policy wants them

    # ------------------------------------------------------------------------------------------ what is held

    @property
    def held(self) -> Pair:
        """Keys and values ``[B, Hkv, count, d]``: parts of the cache, which later calls write to."""
        if self.rows is not None:
            raise RuntimeError(f"{self.name}: the batch has rows of different lengths; ask each of its rows")
        if self.loose is not None:
            return self.loose
        if self.store is None:
            raise RuntimeError(f"{self.name}: nothing was cached yet")
        return self.store[0][:, :, : self.count], self.store[1][:, :, : self.count]

    @property
    def name(self) -> str:
        return f"{type(self.cache).__name__}: layer {self.index}"

    @property
    def like(self) -> Tensor | None:
        """A tensor whose sizes, except for that of the tokens, dtype and device new keys must have."""
        if self.rows is not None:
            return self.rows[0].like
        if self.store is not None:
            return self.store[0]
        return None if self.loose is None else self.loose[0]

    @property
    def batch(self) -> int:
        """Rows of the batch; 0 where nothing was cached yet."""
        if self.rows is not None:
            return len(self.rows)
        like = self.like
        return 0 if like is None else like.shape[0]

    def lengths(self, batch: int) -> list[int]:
        """Tokens that each row of the batch was fed, without filling."""
        return [self.seen] * batch if self.rows is None else [row.seen for row in self.rows]

    def tensors(self) -> Iterator[Tensor]:
        for x in (self.store, self.scores, self.queries, *(self.loose or ())):
            if x is not None:
                yield x
        for row in self.rows or ():
            yield from row.tensors()

    def check(self, key: Tensor, value: Tensor) -> None:
        name = self.name
        check_float(name, key=key, value=value)
        if key.dim() != 4 or key.shape != value.shape:
            refuse(name, f"key and value must have one shape [B, Hkv, q, d], got {shape_of(key)} and {shape_of(value)}")
        if key.dtype != value.dtype:
            raise TypeError(f"{name}: value must have the dtype of key ({key.dtype}), got {value.dtype}")
        like = self.like
        if like is None or self.seen == 0:
            return
        if key.dtype != like.dtype:
            raise TypeError(f"{name}: key must have the dtype of the cache ({like.dtype}), got {key.dtype}")
        if key.device != like.device:
            refuse(name, f"key must be on the device of the cache ({like.device}), got {key.device}")
        expected = (like.shape[0] if self.rows is None else len(self.rows), like.shape[1], like.shape[3])
        if (key.shape[0], key.shape[1], key.shape[3]) != expected:
            batch, heads, d = expected
            refuse(name, f"key must have shape [{batch}, {heads}, q, {d}] like the cache, got {shape_of(key)}")

    # ------------------------------------------------------------------------------------------------ appending

    def append(self, key: Tensor, value: Tensor, grad: bool) -> Pair:
        """All keys and values, the new ones last."""
        tokens = key.shape[2]
        if grad:
            old = self.held if self.count else None
            held = (key, value) if old is None else (torch.cat([old[0], key], 2), torch.cat([old[1], value], 2))
            self.loose = held
        else:
            self.reserve(key, self.count + tokens)
            assert self.store is not None
            self.store[0][:, :, self.count : self.count + tokens] = key.detach()
            self.store[1][:, :, self.count : self.count + tokens] = value.detach()
        self.count += tokens
        self.seen += tokens
        return self.held

    def reserve(self, like: Tensor, tokens: int) -> None:
        """A tensor with room for so many tokens, and all that are held in it."""
        old = self.held if self.count else None
        fits = self.store is not None and self.matches(self.store, like) and self.store.shape[3] >= tokens
        if not fits:
            if self.store is not None and not self.matches(self.store, like):
                self.cache._spares.clear()
            self.store = self.cache._new_store(like, tokens)
            self.cache._prepare_spare(like)
        if old is not None and (self.loose is not None or not fits):
            assert self.store is not None
            self.store[0][:, :, : self.count] = old[0].detach()
            self.store[1][:, :, : self.count] = old[1].detach()
        self.loose = None

    @staticmethod
    def matches(store: Tensor, like: Tensor) -> bool:
        batch, heads, _, d = like.shape
        same = store.dtype == like.dtype and store.device == like.device
        return same and [store.shape[1], store.shape[2], store.shape[4]] == [batch, heads, d]

    def detach(self) -> None:
        if self.loose is not None:
            self.loose = (self.loose[0].detach(), self.loose[1].detach())
        for row in self.rows or ():
            row.detach()

    # ------------------------------------------------------------------------------------------------- reducing

    def enter(self, grad: bool) -> None:
        """Before new tokens: reduce what is held to the capacity, where it is more than that and the buffer."""
        cache = self.cache
        if cache.capacity is None or self.count <= cache.capacity + cache.buffer:
            return
        key, value = self.held
        if cache.check:
            for which, x in (("key", key), ("value", value), ("scores", self.scores)):
                if x is not None and not bool(x.isfinite().all()):
                    refuse(self.name, f"{which} must be finite, got {int((~x.isfinite()).sum())} elements that are not")
        if grad:
            self.loose = cache._reduce(self, key, value, None)
        else:
            spare = cache._swap(self.store, key)
            out = spare[0][:, :, : cache.capacity], spare[1][:, :, : cache.capacity]
            cache._reduce(self, key.detach(), value.detach(), out)
            self.store, self.loose = spare, None
        self.count = cache.capacity

    # ------------------------------------------------------------------------------------------- rows of a batch

    def split(self, batch: int) -> list[CacheLayer]:
        """From now on each row of the batch has a length of its own."""
        if self.rows is None:
            rows = [CacheLayer(self.cache, self.index) for _ in range(batch)]
            for b, row in enumerate(rows):
                row.count, row.seen = self.count, self.seen
                if self.count:
                    key, value = self.held
                    row.loose = (key[b : b + 1], value[b : b + 1])
                    row.scores = None if self.scores is None else self.scores[b : b + 1]
                    row.queries = None if self.queries is None else self.queries[b : b + 1]
            self.store = self.loose = self.scores = self.queries = None
            self.count, self.rows = 0, rows
            self.cache._spares.clear()
        return self.rows

    def copied(self) -> CacheLayer:
        """The same tokens, which further tokens of this one do not change. Only a store is ever written in place."""
        other = CacheLayer(self.cache, self.index)
        other.count, other.seen, other.scores, other.queries = self.count, self.seen, self.scores, self.queries
        other.loose = self.loose
        if self.loose is None and self.store is not None:
            other.store = self.store.clone()
        return other

    def select(self, index: Tensor) -> None:
        """Rows of the batch: another order, fewer, or some more than once."""
        if self.rows is not None:
            rows: list[CacheLayer] = []
            for row in (self.rows[b] for b in index.tolist()):
                rows.append(row.copied() if row in rows else row)
            self.rows = rows
            return
        if self.count:
            key, value = (x.index_select(0, index.to(x.device)) for x in self.held)
            if self.store is not None and self.loose is None and len(index) == self.store.shape[1]:
                self.store[0][:, :, : self.count], self.store[1][:, :, : self.count] = key, value
            else:
                self.store, self.loose = None, (key, value)
                self.cache._spares.clear()
        for which in ("scores", "queries"):
            x = getattr(self, which)
            if x is not None:
                setattr(self, which, x.index_select(0, index.to(x.device)))


class KVCache:
    """What all caches share. Use one of the policies: :class:`LoCoCoCache`, :class:`FullCache`,
    :class:`SlidingWindowCache`, :class:`HeavyHitterCache`, :class:`SnapKVCache`.

    Args:
        capacity: tokens that stay when there are too many; None: no bound.
        buffer: so many tokens more are held before they are reduced. With a large one it happens less often: the cost for a
            token falls with ``1 / (buffer + 1)``.
        chunk: the most new tokens that are attended to at once; longer inputs are taken in pieces. None: ``capacity``. No
            layer ever holds more than ``capacity + buffer + chunk`` tokens.
        normalize: scores are divided by how many queries saw the token, see :func:`cofire.ops.attention_with_scores`.
        bptt: the cache is not detached, so that gradients go back through all calls. (:meth:`detach` cuts them off.)
        check: refuse keys, values and scores that are not finite when they are reduced; it waits for the device. Without it,
            only scores that are NaN are refused, by :func:`cofire.ops.kv_select`; keys and values that are not finite, and
            infinite scores, go through, and what attends to such tokens is not finite.

    Attributes:
        seen: tokens that were fed, which is the position of the next one.
        bytes: of all tensors that the cache holds.
        layers: what it holds, by layer.

    Example, in the attention of a model:
        >>> cache = HeavyHitterCache(capacity=64)
        >>> for chunk in range(4):
        ...     query, key, value = torch.randn(3, 1, 2, 50, 8)  # at positions from cache.seen on
        ...     output = cache.attend(0, query, key, value)
        >>> cache.seen, cache.layers[0].count
        (200, 114)
    """

    #: What the policy needs of the attention: "scores", "queries" or nothing.
    needs = ""

    def __init__(
        self,
        capacity: int | None,
        *,
        buffer: int = 16,
        chunk: int | None = None,
        normalize: bool = False,
        bptt: bool = False,
        check: bool = False,
    ) -> None:
        name = type(self).__name__
        check_integer(name, buffer=buffer)
        if capacity is not None:
            check_integer(name, capacity=capacity)
            if capacity < 2:
                refuse(name, f"capacity must be at least 2, got {capacity}")
        if buffer < 0:
            refuse(name, f"buffer must not be negative, got {buffer}")
        if chunk is not None:
            check_integer(name, chunk=chunk)
            if chunk < 1:
                refuse(name, f"chunk must be at least 1, got {chunk}")
        self.capacity, self.buffer = capacity, buffer
        self.chunk = capacity if chunk is None else chunk
        self.normalize, self.bptt, self.check = normalize, bptt, check
        self.layers: list[CacheLayer] = []
        self._spares: dict[Any, Tensor] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(capacity={self.capacity}, buffer={self.buffer}, chunk={self.chunk})"

    def layer(self, index: int) -> CacheLayer:
        """The layer, made when it is first asked for."""
        while len(self.layers) <= index:
            self._check_layer(len(self.layers))
            self.layers.append(CacheLayer(self, len(self.layers)))
        return self.layers[index]

    # ---------------------------------------------------------------------------------------------------- use

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        starts: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Append keys and values, and attend causally to all that is held.

        Args:
            layer: which.
            query: float ``[B, H, q, d]``, of the new tokens, rotated to their positions.
            key: ``[B, Hkv, q, d]``, rotated; Hkv divides H.
            value: ``[B, Hkv, q, d]``.
            scale: as in :func:`cofire.ops.attention_with_scores`.
            lengths: of the q new tokens so many count in each row of the batch, the others only fill up; None: all from
                ``starts`` on. From the first call with different lengths on, rows are computed one by one.
            starts: where the tokens that count begin in each row, behind those that fill up on the left; None: with the
                first.

        Returns:
            ``[B, H, q, d]``; where tokens only fill up, zeros.

        Raises:
            TypeError, ValueError: tensors that do not fit each other or the cache.
        """
        at = self.layer(layer)
        at.check(key, value)
        if query.dim() != 4 or query.shape[2] != key.shape[2] or query.shape[0] != key.shape[0]:
            refuse(
                at.name,
                f"query must have shape [{key.shape[0]}, H, {key.shape[2]}, {key.shape[3]}], as many tokens as key, got "
                f"{shape_of(query)}",
            )
        places = self._places(at, key, lengths, starts)
        if places is None:
            return self._attend(at, query, key, value, scale)
        outputs = []
        for b, (row, (start, count)) in enumerate(zip(at.split(key.shape[0]), places, strict=True)):
            one = slice(b, b + 1)
            if count == 0:
                outputs.append(torch.zeros_like(query[one]))
                continue
            q, k, v = (x[one, :, start : start + count] for x in (query, key, value))
            found = self._attend(row, q, k, v, scale)
            outputs.append(F.pad(found, (0, 0, start, query.shape[2] - start - count)))
        at.seen += key.shape[2]
        return torch.cat(outputs)

    def _places(
        self,
        at: CacheLayer,
        key: Tensor,
        lengths: Sequence[int] | Tensor | None,
        starts: Sequence[int] | Tensor | None,
    ) -> list[tuple[int, int]] | None:
        """Where the tokens that count begin in each row, and how many they are; None: all, of rows that stay together."""
        batch, tokens = key.shape[0], key.shape[2]
        if lengths is None and starts is None:
            return None if at.rows is None else [(0, tokens)] * batch
        first = [0] * batch if starts is None else integers(starts)
        counts = [tokens - n for n in first] if lengths is None else integers(lengths)
        for which, numbers in (("starts", first), ("lengths", counts)):
            if len(numbers) != batch or not all(0 <= n <= tokens for n in numbers):
                refuse(at.name, f"{which} must be {batch} numbers from 0 to the {tokens} new tokens, got {numbers}")
        places = list(zip(first, counts, strict=True))
        if any(start + count > tokens for start, count in places):
            refuse(at.name, f"starts and lengths must end within the {tokens} new tokens, got {first} and {counts}")
        return None if at.rows is None and all(n == tokens for n in counts) else places

    def _attend(self, at: CacheLayer, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        tokens, chunk = query.shape[2], self.chunk
        if chunk is None or tokens <= chunk:
            return self._piece(at, query, key, value, scale)
        outputs = []
        for first in range(0, tokens, chunk):
            q, k, v = (x[:, :, first : first + chunk] for x in (query, key, value))
            outputs.append(self._piece(at, q, k, v, scale))
        return torch.cat(outputs, 2)

    def _piece(self, at: CacheLayer, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        grad = self._wants_gradient(at, query, key, value)
        at.enter(grad)
        keys, values = at.append(key, value, grad)
        wanted = query.shape[2] if self.needs == "scores" else 0
        output, _, scores = ops.attention_with_scores(
            query, keys, values, scale=scale, window=wanted, normalize=self.normalize
        )
        if self.needs == "scores":
            self._record(at, scores)
        elif self.needs == "queries":
            self._record_queries(at, query.detach())
        if grad and not self.bptt:
            at.detach()
        return output

    def update(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        """Append, for those who attend by themselves; :meth:`record` afterwards, where the policy needs scores.

        Returns:
            All keys and values, the new ones last: parts of the cache, which later calls write to.
        """
        at = self.layer(layer)
        at.check(key, value)
        if self.chunk is not None and key.shape[2] > self.chunk:
            refuse(at.name, f"at most chunk ({self.chunk}) tokens can be appended at once, got {key.shape[2]}")
        if self.needs == "queries":
            refuse(at.name, "this policy needs the queries: use attend")
        grad = self._wants_gradient(at, key, value)
        at.enter(grad)
        held = at.append(key, value, grad)
        if grad and not self.bptt:
            at.detach()
        return held

    def record(self, layer: int, scores: Tensor) -> None:
        """What attention each token that is held got from the newest queries, float ``[B, Hkv, S]``."""
        at = self.layer(layer)
        check_float(at.name, scores=scores)
        expected = list(at.held[0].shape[:3])
        if list(scores.shape) != expected:
            refuse(
                at.name, f"scores must have shape {expected}, one for each token that is held, got {shape_of(scores)}"
            )
        self._record(at, scores.detach().float())

    def _wants_gradient(self, at: CacheLayer, *tensors: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return any(x.requires_grad for x in (*tensors, *(at.loose or ())))

    # ------------------------------------------------------------------------------------------------- policies

    def _check_layer(self, index: int) -> None:
        """Whether there can be such a layer."""

    def _reduce(self, at: CacheLayer, key: Tensor, value: Tensor, out: Pair | None) -> Pair:
        """``capacity`` tokens of those that are held; in ``out`` where it is given, with gradients where it is not."""
        raise NotImplementedError  # each policy has its own

    def _record(self, at: CacheLayer, scores: Tensor) -> None:
        at.scores = scores

    def _record_queries(self, at: CacheLayer, query: Tensor) -> None:
        raise NotImplementedError  # for a policy that needs queries

    def _scores(self, at: CacheLayer) -> Tensor:
        if at.scores is None or at.scores.shape[2] != at.count:
            found = "none" if at.scores is None else f"those of {at.scores.shape[2]}"
            refuse(
                at.name,
                f"there must be scores of the {at.count} tokens that are held, got {found}: use attend or record",
            )
        return at.scores

    def _take(self, key: Tensor, value: Tensor, index: Tensor, out: Pair | None) -> Pair:
        """Copies of the tokens at ``index`` int32 ``[B, Hkv, n]``."""
        if out is None:
            return rows_at(key, index), rows_at(value, index)
        ops.kv_gather_(*out, key, value, index, index[..., :0])
        return out

    # --------------------------------------------------------------------------------------------------- memory

    def _room(self, tokens: int) -> int:
        if self.capacity is None or self.chunk is None:
            return tokens
        return self.capacity + self.buffer + self.chunk

    def _new_store(self, like: Tensor, tokens: int) -> Tensor:
        return like.new_empty((2, *like.shape[:2], self._room(tokens), like.shape[3]))

    def _spare_key(self, like: Tensor) -> tuple[Any, ...]:
        return (str(like.device), like.dtype, like.shape[0], like.shape[1], like.shape[3])

    def _prepare_spare(self, like: Tensor) -> None:
        """The tensor that a reduction writes, one for all layers of a kind."""
        if self.capacity is not None:
            key = self._spare_key(like)
            if key not in self._spares:
                self._spares[key] = self._new_store(like, 0)

    def _swap(self, store: Tensor | None, like: Tensor) -> Tensor:
        """The spare tensor for the one in use, which becomes the spare."""
        self._prepare_spare(like)
        key = self._spare_key(like)
        found = self._spares[key]
        if store is None:
            del self._spares[key]
        else:
            self._spares[key] = store
        return found

    # ---------------------------------------------------------------------------------------------------- state

    @property
    def seen(self) -> int:
        return self.layers[0].seen if self.layers else 0

    @property
    def bytes(self) -> int:
        tensors = [x for layer in self.layers for x in layer.tensors()]
        return sum(x.nbytes for x in (*tensors, *self._spares.values()))

    def lengths(self, layer: int = 0) -> list[int]:
        """Tokens that each row of the batch was fed, without those that only filled up: positions of its next token."""
        at = self.layer(layer)
        return at.lengths(at.batch)

    def detach(self) -> None:
        """Cut gradients off that go back into earlier calls."""
        for layer in self.layers:
            layer.detach()

    def reset(self) -> None:
        """Forget all tokens, and keep the memory."""
        for layer in self.layers:
            layer.clear()

    def reorder_cache(self, index: Tensor) -> None:
        """Rows of the batch in another order, as a beam search wants them: int64 ``[B']``, the row that each becomes."""
        for layer in self.layers:
            layer.select(index)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that a cache of the same arguments needs to go on, as tensors by name."""
        state = {}
        for layer in self.layers:
            for name, part in [
                (f"{layer.index}", layer),
                *((f"{layer.index}.{b}", r) for b, r in enumerate(layer.rows or ())),
            ]:
                state[f"{name}.count"] = torch.tensor([part.count, part.seen])
                key, value = part.held if part.count else (None, None)
                parts = {"key": key, "value": value, "scores": part.scores, "queries": part.queries}
                state |= {f"{name}.{which}": x.detach().clone() for which, x in parts.items() if x is not None}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of what is held.

        Raises:
            ValueError: more tokens than fit, or no scores where the policy needs them.
        """
        name = type(self).__name__
        self.layers = []
        names = [k.removesuffix(".count") for k in state if k.endswith(".count")]
        for which in sorted(names, key=lambda k: [int(part) for part in k.split(".")]):
            index, *row = (int(part) for part in which.split("."))
            part = self.layer(index)
            if row:
                part.rows = [*(part.rows or ()), CacheLayer(self, index)]
                part = part.rows[-1]
            part.count, part.seen = state[f"{which}.count"].tolist()
            if self.capacity is not None and part.count > self._room(0):
                refuse(name, f"the state must hold at most {self._room(0)} tokens of a layer, got {part.count}")
            if part.count == 0:
                continue
            part.loose = (state[f"{which}.key"].clone(), state[f"{which}.value"].clone())
            part.scores, part.queries = (
                state[k].clone() if k in state else None for k in (f"{which}.scores", f"{which}.queries")
            )
            if self.needs and getattr(part, self.needs) is None:
                refuse(name, f"the state must hold {self.needs} of layer {which}, got {sorted(state)}")

    def for_transformers(self, model: nn.Module, *, lengths: Sequence[int] | None = None) -> Any:
        """This cache as one of transformers, for ``model.generate(..., past_key_values=...)``.

        Args:
            model: whose layers it serves.
            lengths: where the caller of ``forward`` knows them, in place of ``attention_mask``, which has to be brought from the
                device: how many of its tokens count in each row, the first ones. They are those of the next call alone.

        It is a second object with the same tokens, because the two have different words for the same things: the ``update``
        of transformers has the layer last, its ``layers`` are objects of its own classes, and the attention of the model
        decides which of them are needed. See :class:`cofire.nn.kv_transformers.TransformersCache`.
        """
        from cofire.nn.kv_transformers import TransformersCache

        return TransformersCache(self, model, lengths)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        """Modules are shared: a copy of a cache is no copy of the model."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for which, x in self.__dict__.items():
            setattr(copied, which, x if which == "fusions" else copy.deepcopy(x, memo))
        return copied


# ----------------------------------------------------------------------------------------------------- policies


class FullCache(KVCache):
    """All tokens. It is not bounded: when it is full, it moves to twice the room.

    Args:
        reserve: tokens for which there is room from the start.
        **options: ``chunk``, ``bptt``, as in :class:`KVCache`.
    """

    def __init__(self, reserve: int = 0, **options: Any) -> None:
        super().__init__(None, **options)
        check_integer("FullCache", reserve=reserve)
        self.reserved = reserve

    def _room(self, tokens: int) -> int:
        room = max(self.reserved, 64)
        while room < tokens:
            room *= 2
        return room


class SlidingWindowCache(KVCache):
    """The first tokens, to which much attention goes whatever they are, and the last ones.

    Keys keep the positions at which they were rotated.

    Args:
        capacity: tokens, at least 2.
        sinks: how many of them are the first ones.
        **options: as in :class:`KVCache`.

    Source: Xiao et al., ICLR 2024 (StreamingLLM), section 3.
    """

    def __init__(self, capacity: int, *, sinks: int = 4, **options: Any) -> None:
        super().__init__(capacity, **options)
        check_integer("SlidingWindowCache", sinks=sinks)
        if not 0 <= sinks < capacity:
            refuse("SlidingWindowCache", f"sinks must be at least 0 and less than capacity ({capacity}), got {sinks}")
        self.sinks = sinks

    def _reduce(self, at: CacheLayer, key: Tensor, value: Tensor, out: Pair | None) -> Pair:
        assert self.capacity is not None
        first = key.shape[2] - (self.capacity - self.sinks)
        parts = [(x[:, :, : self.sinks], x[:, :, first:]) for x in (key, value)]
        if out is None:
            new_key, new_value = (torch.cat(part, 2) for part in parts)
            return new_key, new_value
        for x, (sinks, last) in zip(out, parts, strict=True):
            x[:, :, : self.sinks], x[:, :, self.sinks :] = sinks, last
        return out


class HeavyHitterCache(KVCache):
    """The tokens that got most attention since they came, and the last ones.

    Args:
        capacity: tokens, at least 2.
        recent: how many of them are the last ones; None: half.
        accumulate: scores add up over the calls; otherwise those of the newest call count alone, as in LoCoCo.
        **options: as in :class:`KVCache`.

    Source: Zhang et al., NeurIPS 2023 (H2O), section 4.
    """

    needs = "scores"

    def __init__(self, capacity: int, *, recent: int | None = None, accumulate: bool = True, **options: Any) -> None:
        super().__init__(capacity, **options)
        recent = capacity // 2 if recent is None else recent
        check_integer("HeavyHitterCache", recent=recent)
        if not 0 <= recent <= capacity:
            refuse("HeavyHitterCache", f"recent must be between 0 and capacity ({capacity}), got {recent}")
        self.recent, self.accumulate = recent, accumulate

    def _record(self, at: CacheLayer, scores: Tensor) -> None:
        if at.scores is not None and self.accumulate:
            scores = scores + F.pad(at.scores, (0, scores.shape[2] - at.scores.shape[2]))
        at.scores = scores

    def _reduce(self, at: CacheLayer, key: Tensor, value: Tensor, out: Pair | None) -> Pair:
        assert self.capacity is not None
        scores = self._scores(at)
        kept, _, _ = ops.kv_select(scores, self.capacity, 0, local=self.recent)
        at.scores = scores.gather(2, kept.long())
        return self._take(key, value, kept, out)


class SnapKVCache(KVCache):
    """The last tokens, and of the others those to which the last queries attend most, or to whose neighbours.

    The published method reduces the prompt once and lets the cache grow from there. This one stays within its capacity: at
    the end of a prompt, and whenever there are too many tokens again, it reduces them by the scores of the last ``window``
    queries, which it keeps for that and attends with once more. (Reducing happens when the next token comes, as with the
    other policies.)

    Args:
        capacity: tokens, at least 2.
        window: how many last tokens stay, and how many last queries count; less than ``capacity``.
        kernel_size: odd; scores become the largest of so many neighbours, so that tokens stay together.
        **options: as in :class:`KVCache`.

    Source: Li et al., NeurIPS 2024 (SnapKV), section 4.
    """

    needs = "queries"

    def __init__(self, capacity: int, *, window: int = 16, kernel_size: int = 5, **options: Any) -> None:
        super().__init__(capacity, **options)
        check_integer("SnapKVCache", window=window, kernel_size=kernel_size)
        if not 0 < window < capacity:
            refuse("SnapKVCache", f"window must be positive and less than capacity ({capacity}), got {window}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            refuse("SnapKVCache", f"kernel_size must be odd and positive, got {kernel_size}")
        self.window, self.kernel_size = window, kernel_size

    def _record_queries(self, at: CacheLayer, query: Tensor) -> None:
        if at.queries is not None and query.shape[2] < self.window:
            query = torch.cat([at.queries, query], 2)
        at.queries = query[:, :, -self.window :].clone(memory_format=torch.contiguous_format)

    def _reduce(self, at: CacheLayer, key: Tensor, value: Tensor, out: Pair | None) -> Pair:
        assert self.capacity is not None and at.queries is not None
        _, _, scores = ops.attention_with_scores(at.queries, key.detach(), value.detach(), normalize=self.normalize)
        scores = F.max_pool1d(scores[..., : -self.window], self.kernel_size, 1, self.kernel_size // 2)
        scores = F.pad(scores, (0, self.window))
        kept, _, _ = ops.kv_select(scores, self.capacity, 0, local=self.window)
        return self._take(key, value, kept, out)


class LoCoCoCache(KVCache):
    """Heavy hitters, and mixtures of the others by a convolution that learns.

    The scores are those of the most recent call alone: of a chunk of a prompt, or of the one query of a decoding step.

    Args:
        fusions: a :class:`KVFusion` for each layer. They stay part of the model: the cache holds no parameters.
        capacity: tokens, at least 2; what a fusion's ``merged`` leaves of them are heavy hitters.
        local: how many of the heavy hitters are the last tokens.
        **options: as in :class:`KVCache`.

    Raises:
        ValueError: ``capacity`` too small for a fusion, as many ``local`` tokens as heavy hitters.

    Example:
        >>> fusions = [KVFusion.for_capacity(8, 32, kernel_size=5) for _ in range(2)]
        >>> cache = LoCoCoCache(fusions, capacity=32, chunk=16)
        >>> with torch.no_grad():
        ...     output = cache.attend(0, *torch.randn(3, 1, 2, 100, 8))
        >>> output.shape, cache.layers[0].count <= 32 + 16 + 16
        (torch.Size([1, 2, 100, 8]), True)

    Source: Cai et al., ICML 2024 (LoCoCo), section 3; the buffer and the scores' newest call are those of its code.
    """

    needs = "scores"

    def __init__(self, fusions: Iterable[nn.Module], capacity: int, *, local: int = 0, **options: Any) -> None:
        super().__init__(capacity, **options)
        check_integer("LoCoCoCache", local=local)
        self.fusions = fusions if isinstance(fusions, nn.ModuleList) else list(fusions)
        self.local = local
        for index, fusion in enumerate(self.fusions):
            if not isinstance(fusion, KVFusion):
                raise TypeError(f"LoCoCoCache: fusions must be KVFusion modules, got {type(fusion).__name__}")
            heavy = capacity - fusion.merged
            if heavy < 0:
                refuse(
                    "LoCoCoCache", f"capacity must be at least merged ({fusion.merged}, layer {index}), got {capacity}"
                )
            if local < 0 or local >= max(heavy, 1):
                refuse("LoCoCoCache", f"local must be at least 0 and less than the {heavy} heavy hitters, got {local}")

    def _check_layer(self, index: int) -> None:
        if index >= len(self.fusions):
            refuse("LoCoCoCache", f"there must be a fusion for each layer, got {len(self.fusions)} and layer {index}")

    def _wants_gradient(self, at: CacheLayer, *tensors: Tensor) -> bool:
        if super()._wants_gradient(at, *tensors):
            return True
        assert self.capacity is not None
        return at.count > self.capacity + self.buffer and self._fusion(at).wants_gradient

    def _fusion(self, at: CacheLayer) -> KVFusion:
        fusion = self.fusions[at.index]
        assert isinstance(fusion, KVFusion)
        return fusion

    def _reduce(self, at: CacheLayer, key: Tensor, value: Tensor, out: Pair | None) -> Pair:
        assert self.capacity is not None
        fusion = self._fusion(at)
        heavy = self.capacity - fusion.merged
        options: dict[str, Any] = {"heavy": heavy, "local": self.local, "bptt": self.bptt, "out": out}
        found: Pair = fusion(key, value, self._scores(at), **options)
        at.scores = None  # those of the next call take their place
        return found
