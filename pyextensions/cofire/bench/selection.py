# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of the selection primitives."""

from __future__ import annotations

import torch
from torch import Tensor

from cofire.bench.cases import Args, Case, Random, compiled, plain


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


CASES = [
    _compact(1, 512, 0.5),
    _compact(8, 256, 0.5, quick=True),
    _compact(128, 512, 0.5, quick=True, overhead=True),
    _compact(128, 512, 0.1),
    _compact(32, 4096, 0.5),
]
