# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of the selection primitives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Args, Case, Random, compiled, plain
from cofire.ops.packing import pack_bits


def compact_by_nonzero(mask: Tensor) -> tuple[Tensor, Tensor]:
    """As it is usually written: the coordinates of the set entries, put into place. Synchronises on a GPU."""
    rows, columns = mask.nonzero(as_tuple=True)
    count = mask.sum(1, dtype=torch.int32)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    index = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
    index[rows, torch.arange(rows.numel(), device=mask.device) - first] = columns.int()
    return index, count


def compact_by_sort(mask: Tensor) -> tuple[Tensor, Tensor]:
    columns = mask.shape[1]
    position = torch.arange(columns, dtype=torch.int32, device=mask.device)
    index = torch.where(mask, position, columns).sort(1).values
    return index.masked_fill_(index == columns, -1), mask.sum(1, dtype=torch.int32)


def compact_by_scan(mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = mask.shape
    seen = mask.cumsum(1, dtype=torch.int32)
    position = torch.arange(columns, dtype=torch.int32, device=mask.device).expand(rows, columns)
    index = position.new_full((rows, columns + 1), -1)
    index.scatter_(1, torch.where(mask, seen - 1, columns).long(), position)
    return index[:, :columns].contiguous(), seen[:, -1].clone()


def compact_by_select(mask: Tensor) -> tuple[Tensor, Tensor]:
    count = mask.sum(1, dtype=torch.int32)
    position = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
    index = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
    return index.masked_scatter_(position < count[:, None], position.expand(mask.shape).masked_select(mask)), count


def _compact(rows: int, columns: int, density: float, quick: bool = False, overhead: bool = False) -> Case:
    def args(rand: Random) -> Args:
        return (rand.mask(rows, columns, density),)

    def tiny(rand: Random) -> Args:
        return (rand.mask(3, 17, density),)

    dense = {
        "sort": plain(compact_by_sort),
        "scan": plain(compact_by_scan),
        "select": plain(compact_by_select),
        "nonzero": plain(compact_by_nonzero),
    }
    return Case(
        "compact",
        f"{rows}x{columns} keep {density:g}",
        torch.bool,
        args,
        {"eager": plain(compact_by_nonzero), "dense": dense, "compile": compiled(compact_by_scan)},
        tiny,
        quick=quick,
        overhead=overhead,
    )


# ------------------------------------------------------------------------------------------------- packed masks


def pack_by_products(mask: Tensor) -> Tensor:
    """Eight entries times the powers of two, summed."""
    groups = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).view(mask.shape[0], -1, 8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (groups * powers).sum(2, dtype=torch.uint8)


def pack_by_shifts(mask: Tensor) -> Tensor:
    """The same by eight strided passes."""
    groups = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).view(torch.uint8).view(mask.shape[0], -1, 8)
    bits = groups[..., 0].clone()
    for i in range(1, 8):
        bits |= groups[..., i] << i
    return bits


def unpack_by_shifts(bits: Tensor, columns: int) -> Tensor:
    mask = bits.new_empty((*bits.shape, 8), dtype=torch.bool)
    for i in range(8):
        mask[..., i] = bits & (1 << i)
    return mask.flatten(1)[:, :columns].contiguous()


def unpack_by_broadcast(bits: Tensor, columns: int) -> Tensor:
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits[..., None] & powers).ne_(0).to(torch.bool).flatten(1)[:, :columns].contiguous()


def unpack_by_table(bits: Tensor, columns: int) -> Tensor:
    """A row of eight bools for each byte."""
    every = torch.arange(256, device=bits.device)[:, None] >> torch.arange(8, device=bits.device)
    found = (every & 1).to(torch.bool).view(torch.int64).flatten()[bits.int()]
    return found.view(torch.bool)[:, :columns].contiguous()


def transpose_by_unpacking(bits: Tensor, columns: int) -> Tensor:
    return pack_by_shifts(unpack_by_table(bits, columns).t().contiguous())


def offsets_by_table(bits: Tensor) -> Tensor:
    """The number of set bits of each byte, looked up."""
    every = torch.arange(256, device=bits.device)[:, None] >> torch.arange(8, device=bits.device)
    counts = (every & 1).sum(1)[bits.int()].sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def offsets_by_unpacking(bits: Tensor) -> Tensor:
    counts = unpack_by_table(bits, 8 * bits.shape[1]).sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _packed(
    op: str, rows: int, columns: int, providers: Mapping[str, Any], quick: bool = False, overhead: bool = False
) -> Case:
    def args(n: int, k: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            mask = rand.uniform(n, k) < 0.5
            if op == "pack_mask":
                return (mask,)
            bits = pack_bits(mask.to(torch.uint8), 1)
            return (bits,) if op == "mask_offsets" else (bits, k)

        return make

    return Case(
        op,
        f"{rows}x{columns}",
        torch.uint8,
        args(rows, columns),
        providers,
        args(3, 17),
        quick=quick,
        overhead=overhead,
    )


PACKED: dict[str, Mapping[str, Any]] = {
    "pack_mask": {
        "eager": plain(pack_by_products),
        "dense": {"products": plain(pack_by_products), "shifts": plain(pack_by_shifts)},
        "compile": compiled(pack_by_products),
    },
    "unpack_mask": {
        "eager": plain(unpack_by_broadcast),
        "dense": {
            "broadcast": plain(unpack_by_broadcast),
            "shifts": plain(unpack_by_shifts),
            "table": plain(unpack_by_table),
        },
        "compile": compiled(unpack_by_broadcast),
    },
    "transpose_mask": {"eager": plain(transpose_by_unpacking), "dense": plain(transpose_by_unpacking)},
    "mask_offsets": {
        "eager": plain(offsets_by_table),
        "dense": {"table": plain(offsets_by_table), "unpacking": plain(offsets_by_unpacking)},
        "compile": compiled(offsets_by_table),
    },
}

# ------------------------------------------------------------------------------------------------------ selection


def _scores(weight: Tensor, other: Tensor | None, score: str) -> Tensor:
    if other is None:
        return weight.abs()
    return weight.abs() * other if score == "wanda" else (weight * other).abs()


def _folded(scores: Tensor, scope: str, rows: int, columns: int) -> Tensor:
    """A row for each scope; blocks have one row."""
    if scope == "row":
        return scores
    return scores.view(1, -1) if scope == "tensor" else scores.view(-1, columns)


def mask_by_sort(
    weight: Tensor, other: Tensor | None, counts: None, keep: int, scope: str, score: str, *rest: Any
) -> Tensor:
    scores = _folded(_scores(weight, other, score), scope, rest[0], rest[1])
    order = scores.sort(dim=1, descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :keep], True)
    return pack_by_shifts(mask.view(weight.shape))


def _mask_from_threshold(scores: Tensor, threshold: Tensor, keep: int) -> Tensor:
    """All that reach the threshold; only where they are too many, those equal to it are counted off."""
    mask = scores >= threshold
    surplus = mask.sum(1) != keep
    if surplus.any():
        rows = scores[surplus]
        above, tied = rows > threshold[surplus], rows == threshold[surplus]
        mask[surplus] = above | (tied & (tied.cumsum(1) <= keep - above.sum(1, keepdim=True)))
    return mask


def mask_by_kthvalue(
    weight: Tensor, other: Tensor | None, counts: None, keep: int, scope: str, score: str, *rest: Any
) -> Tensor:
    scores = _folded(_scores(weight, other, score), scope, rest[0], rest[1])
    threshold = scores.kthvalue(scores.shape[1] - keep + 1, dim=1, keepdim=True).values
    return pack_by_shifts(_mask_from_threshold(scores, threshold, keep).view(weight.shape))


def mask_by_topk(
    weight: Tensor, other: Tensor | None, counts: None, keep: int, scope: str, score: str, *rest: Any
) -> Tensor:
    """The least of the unsorted top entries; which of several equal ones topk takes is not defined."""
    scores = _folded(_scores(weight, other, score), scope, rest[0], rest[1])
    threshold = scores.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    return pack_by_shifts(_mask_from_threshold(scores, threshold, keep).view(weight.shape))


def mask_by_ranks(
    weight: Tensor, other: Tensor | None, counts: None, keep: int, scope: str, score: str, *rest: Any
) -> Tensor:
    """Of small groups: how many of the group go before an entry, one after the other."""
    scores = _folded(_scores(weight, other, score), scope, rest[0], rest[1])
    ahead = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)
    for j in range(scores.shape[1]):
        mine = scores[:, j : j + 1]
        ahead[:, :j] += mine > scores[:, :j]
        ahead[:, j + 1 :] += mine >= scores[:, j + 1 :]
    return pack_by_shifts((ahead < keep).view(weight.shape))


SELECTORS = {"sort": plain(mask_by_sort), "kthvalue": plain(mask_by_kthvalue), "topk": plain(mask_by_topk)}


def _keep(
    rows: int,
    columns: int,
    density: float,
    scope: str,
    score: str = "magnitude",
    dtype: torch.dtype = torch.float32,
    group: int = 1,
    **options: Any,
) -> Case:
    def args(n: int, k: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            weight = rand.normal(n, k).to(dtype)
            other = {"wanda": lambda: rand.uniform(k), "taylor": lambda: rand.normal(n, k)}.get(score, lambda: None)()
            other = None if other is None else other.to(dtype)
            size = {"row": k, "tensor": n * k, "block": group}[scope]
            return weight, other, None, round(density * size), scope, score, 1, group, 1.0

        return make

    pattern = f"{round(density * group)}:{group}" if scope == "block" else f"{scope} keep {density:g}"
    return Case(
        "keep_mask",
        f"{rows}x{columns} {pattern} {score}",
        dtype,
        args(rows, columns),
        {
            "eager": plain(mask_by_sort),
            "dense": SELECTORS | ({"ranks": plain(mask_by_ranks)} if scope == "block" else {}),
            **({"compile": compiled(mask_by_ranks)} if scope == "block" else {}),
        },
        args(4, 40),
        bits=(0, 1),  # scores are defined in the dtype of the weights
        **options,
    )


def masks_by_sort(weights: list[Tensor], others: list[Tensor], keep: int, score: str, factor: float) -> list[Tensor]:
    return _split(weights, mask_by_sort(*_joined(weights), keep, "tensor", score, 1, 1))


def masks_by_kthvalue(
    weights: list[Tensor], others: list[Tensor], keep: int, score: str, factor: float
) -> list[Tensor]:
    return _split(weights, mask_by_kthvalue(*_joined(weights), keep, "tensor", score, 1, 1))


def masks_by_topk(weights: list[Tensor], others: list[Tensor], keep: int, score: str, factor: float) -> list[Tensor]:
    return _split(weights, mask_by_topk(*_joined(weights), keep, "tensor", score, 1, 1))


def _joined(weights: list[Tensor]) -> tuple[Tensor, None, None]:
    return torch.cat([w.flatten() for w in weights])[None], None, None


def _split(weights: list[Tensor], bits: Tensor) -> list[Tensor]:
    """Of rows that are whole bytes."""
    parts = bits[0].split([w.numel() // 8 for w in weights])
    return [part.view(w.shape[0], -1) for part, w in zip(parts, weights, strict=True)]


def _keep_list(name: str, shapes: list[tuple[int, int]], density: float, **options: Any) -> Case:
    def args(shapes: list[tuple[int, int]]) -> Callable[[Random], Args]:
        total = sum(n * k for n, k in shapes)

        def make(rand: Random) -> Args:
            return [rand.normal(*shape) for shape in shapes], [], round(density * total), "magnitude", 1.0

        return make

    return Case(
        "keep_masks",
        f"{name} keep {density:g} magnitude",
        torch.float32,
        args(shapes),
        {
            "eager": plain(masks_by_sort),
            "dense": {
                "sort": plain(masks_by_sort),
                "kthvalue": plain(masks_by_kthvalue),
                "topk": plain(masks_by_topk),
            },
        },
        args([(3, 16), (2, 8)]),
        **options,
    )


CASES = [
    _compact(1, 512, 0.5),
    _compact(8, 256, 0.5),
    _compact(128, 512, 0.5, quick=True, overhead=True),
    _compact(128, 512, 0.1),
    _compact(32, 4096, 0.5),
    *(_packed(op, 4096, 4096, providers, quick=True, overhead=True) for op, providers in PACKED.items()),
    *(_packed(op, 11008, 4096, providers) for op, providers in PACKED.items()),
    _keep(512, 2048, 0.5, "row", quick=True, overhead=True),
    _keep(512, 2048, 0.5, "tensor"),
    _keep(512, 2048, 0.5, "block", group=4, quick=True),
    _keep(4096, 4096, 0.5, "row"),
    _keep(4096, 4096, 0.1, "row", "wanda"),
    _keep(4096, 4096, 0.5, "row", dtype=torch.bfloat16),
    _keep(4096, 4096, 0.5, "tensor"),
    _keep(4096, 4096, 0.5, "block", group=4),
    _keep(4096, 4096, 0.5, "block", group=8),
    _keep(11008, 4096, 0.5, "row"),
    _keep(11008, 4096, 0.5, "tensor"),
    _keep(11008, 4096, 0.1, "tensor", "taylor"),
    _keep_list("attention block of 1024", [(1024, 1024)] * 4 + [(2752, 1024)] * 2, 0.5),
    _keep_list("MLP 64-512x3-16", [(512, 64), (512, 512), (512, 512), (16, 512)], 0.2, quick=True, overhead=True),
]
