# SPDX-License-Identifier: Apache-2.0
"""The memory techniques that eDKM publishes, for plain DKM, so that they can be compared with: hooks on saved tensors.

DKM keeps a map ``[N, K]`` or several of each iteration for backward. eDKM moves what autograd saves elsewhere, and makes
it smaller on the way:

* marshaling (section 2.1): a tensor that is saved twice, or that views, reshapes and transpositions make from one that
  is saved already, is stored once. Found by its storage, or by a walk of a few steps along the graph of autograd.
* uniquification (section 2.2): a 16-bit weight has at most 65,536 values, and rows of a map that belong to the same value
  are equal: a table of distinct rows, and an int16 index of N entries. The index follows from the weight, so that here
  all maps share one; the published code makes one for each map.
* sharding (section 2.3): learners that hold the same weight keep a share of the rows each, and gather them in backward.

Without any of them every saved tensor is stored by itself, as a hook that moves them to another memory does. What the
forward pass computes, and its own peak of memory, stays as it was. The weight itself is not counted: it is there anyway.

Source: Cho et al., "eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models", IEEE CAL 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from cofire.ops.clustering import HALVES

__all__ = ["PAPER_LEARNERS", "PAPER_MB", "EDKMHooks"]

#: The paper's own ablation (table 2): MB kept of one attention layer's matrix of LLaMA-7B, 3 bits, on 8 learners.
PAPER_MB = {"base": 1600, "M": 544, "M+S": 97, "M+U": 68, "M+U+S": 12}
PAPER_LEARNERS = 8
#: How far back the walk along the graph goes (section 2.1).
HOPS = 4
#: Operators whose output holds the same numbers as their input, in the names of autograd.
_SAME_NUMBERS = ("View", "UnsafeView", "ReshapeAlias", "Reshape", "Squeeze", "Unsqueeze", "Clone", "Alias")
_MOVED = ("Transpose", "T", "Permute", "Expand")


class _Kept:
    """A tensor that is stored: whole, or as a table with the index of all maps; this learner's rows of it."""

    def __init__(self, value: Tensor, shape: torch.Size, by_index: bool, rows: int) -> None:
        self.value, self.shape, self.by_index, self.rows = value, shape, by_index, rows
        #: where the tensor that was stored lies in its storage; None where it does not fill it
        self.offset: int | None = None


def _signed(number: int) -> int:
    """autograd hands out negative dimensions as what they are modulo 2^64."""
    return number - 2**64 if number >= 2**63 else number


def _kind(node: Any) -> str:
    return str(node.name()).removeprefix("torch::autograd::").partition("Backward")[0]


def _replay(node: Any, x: Tensor) -> Tensor:
    """The forward of an operator that moves numbers without changing them."""
    kind = _kind(node)
    if kind == "Transpose":
        return x.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1))
    if kind == "T":
        return x.t()
    if kind == "Permute":
        return x.permute([_signed(dim) for dim in node._saved_dims])
    shape = node._input_metadata[0].shape
    return x.expand(shape) if kind == "Expand" else x.reshape(shape)


class EDKMHooks:
    """A context for the forward pass of DKM with maps: what autograd saves in it is stored as eDKM stores it.

    Args:
        weight: what is clustered, by one palette of scalars; bfloat16 or float16 for ``uniquify``.
        marshal, uniquify, shard: the techniques, each by itself.
        learners: with ``shard``, among how many learners the rows are split. Without ``group`` this process keeps all rows
            and ``bytes`` counts its share alone.
        group: with ``shard``, the process group of the learners; its size counts, not ``learners``.

    Attributes:
        bytes: what is stored on this learner, besides the weight.
        tensors: how many tensors were saved, and ``stored``, how many of them had to be stored.

    Raises:
        TypeError: ``uniquify`` of a weight that is not of 16 bits.
        ValueError: less than one learner.

    Example:
        >>> weight = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
        >>> with EDKMHooks(weight, marshal=True, uniquify=True) as hooks:
        ...     attention = torch.softmax(-(weight.view(-1, 1) - torch.tensor([-0.5, 0.5])).square(), 1)
        >>> hooks.tensors, hooks.stored
        (2, 2)

    Source: eDKM, section 2.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        marshal: bool = False,
        uniquify: bool = False,
        shard: bool = False,
        learners: int = 1,
        group: Any = None,
    ) -> None:
        if uniquify and weight.dtype not in HALVES:
            raise TypeError(f"EDKMHooks: uniquify needs a bfloat16 or float16 weight, got {weight.dtype}")
        if learners < 1:
            raise ValueError(f"EDKMHooks: learners must be at least 1, got {learners}")
        self.weight, self.marshal, self.uniquify, self.shard = weight.detach(), marshal, uniquify, shard
        self.group = group
        self.learners = torch.distributed.get_world_size(group) if group is not None else learners
        self.bytes = self.tensors = self.stored = 0
        self._index: tuple[Tensor, Tensor, int] | None = None
        self._by_storage: dict[int, tuple[StorageWeakRef, int, _Kept]] = {}
        self._by_node: dict[Any, _Kept] = {}
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> EDKMHooks:
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(kind, error, trace)
        self._by_storage.clear()  # what is looked up while saving; backward finds what it needs by itself
        self._by_node.clear()

    # ------------------------------------------------------------------------------------------------ storing

    def _pack(self, x: Tensor) -> Any:
        self.tensors += 1
        if x.untyped_storage().data_ptr() == self.weight.untyped_storage().data_ptr():
            return x.detach()
        if x.numel() < self.weight.numel():  # centroids and sums
            self.bytes += x.nbytes
            self.stored += 1
            return x.detach()
        if self.marshal:
            found = self._find(x)
            if found is not None:
                return found
        kept = self._keep(x)
        if self.marshal:
            self._remember(x, kept)
        if kept.offset is None:
            return kept, lambda stored: stored
        return kept, _view_of(x, kept.offset)

    def _keep(self, x: Tensor) -> _Kept:
        """Row by row as it lies in its storage; if it does not fill one, as it is."""
        source = x.detach()
        if source.dim() > 1 and not source.is_contiguous() and source.mT.is_contiguous():
            source = source.mT
        fills = source.is_contiguous() and source.untyped_storage().nbytes() == source.nbytes
        source = source if fills else x.detach().contiguous()
        value = source.view(-1, source.shape[-1]) if source.dim() > 1 else source[:, None]
        rows = len(value)
        by_index = self.uniquify and rows == self.weight.numel()
        if by_index:
            if self._index is None:
                self._index = self._make_index()
            value = value[self._index[1]]
            rows = len(value)
        self.stored += 1
        kept = _Kept(self._share(value, copied=by_index), source.shape, by_index, rows)
        kept.offset = int(source.storage_offset()) if fills else None
        return kept

    def _make_index(self) -> tuple[Tensor, Tensor, int]:
        """The value of each weight as int16, one place where each value stands, and how many weights there are."""
        values, place = self.weight.reshape(-1).view(torch.int16).unique(return_inverse=True)
        first = torch.empty_like(values, dtype=torch.int64)
        first[place] = torch.arange(len(place), device=place.device)
        index = (place - 2**15).to(torch.int16)
        return self._share(index, copied=True), first, len(place)

    def _share(self, value: Tensor, copied: bool) -> Tensor:
        """This learner's rows, in a memory of their own."""
        rows = math.ceil(len(value) / self.learners) if self.shard else len(value)
        self.bytes += rows * value[:1].nbytes
        if self.shard and self.group is not None:
            rank = torch.distributed.get_rank(self.group)
            padded = value.new_zeros(rows, *value.shape[1:])
            mine = value[rank * rows : (rank + 1) * rows]
            padded[: len(mine)] = mine
            return padded
        return value if copied else value.clone()

    def _gather(self, value: Tensor, rows: int) -> Tensor:
        if not self.shard or self.group is None:
            return value
        plain = value.contiguous().view(torch.uint8)  # not every backend knows 16-bit integers
        parts = [torch.empty_like(plain) for _ in range(self.learners)]
        torch.distributed.all_gather(parts, plain, group=self.group)
        return torch.cat(parts).view(value.dtype)[:rows]

    # -------------------------------------------------------------------------------------------- marshaling

    def _remember(self, x: Tensor, kept: _Kept) -> None:
        if kept.offset is not None:
            storage = x.untyped_storage()
            self._by_storage[storage.data_ptr()] = (StorageWeakRef(storage), x._version, kept)
        if x.grad_fn is not None and kept.shape == x.shape:
            self._by_node[x.grad_fn] = kept

    def _find(self, x: Tensor) -> Any:
        """A stored tensor with the same numbers, and how to make this one of it."""
        storage = x.untyped_storage()
        hit = self._by_storage.get(storage.data_ptr())
        if hit is not None and not hit[0].expired() and hit[1] == x._version and hit[2].offset is not None:
            return hit[2], _view_of(x, hit[2].offset)
        node, way = x.grad_fn, list[Any]()
        while node is not None and len(way) <= HOPS:
            if node in self._by_node:
                return self._by_node[node], _way_of(way, x.shape)
            if _kind(node) not in (*_SAME_NUMBERS, *_MOVED):
                break
            way.append(node)
            node = node.next_functions[0][0]
        return None

    # ---------------------------------------------------------------------------------------------- fetching

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        kept, remake = packed
        value = self._gather(kept.value, kept.rows)
        if kept.by_index:
            assert self._index is not None
            value = value[self._gather(self._index[0], self._index[2]).long() + 2**15]
        result: Tensor = remake(value.view(kept.shape))
        return result


def _view_of(x: Tensor, base: int) -> Callable[[Tensor], Tensor]:
    size, stride, offset = x.size(), x.stride(), x.storage_offset() - base
    return lambda stored: stored.as_strided(size, stride, offset)


def _way_of(way: list[Any], shape: torch.Size) -> Callable[[Tensor], Tensor]:
    def remake(stored: Tensor) -> Tensor:
        for node in reversed(way):
            stored = _replay(node, stored)
        return stored.reshape(shape)

    return remake
