# SPDX-License-Identifier: Apache-2.0
"""A deployed network against the trained one, and against the dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from cofire.methods.base import Report, evaluation
from cofire.timing import interleaved


@dataclass(frozen=True)
class Timing(Report):
    """Medians in milliseconds on one input; dense is the network in full precision."""

    dense_ms: float
    packed_ms: float
    shape: tuple[int, ...]
    threads: int

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.packed_ms


@torch.no_grad()
def deployed_error(student: nn.Module, final: nn.Module, inputs: Iterable[Any]) -> tuple[float | None, float | None]:
    """Largest difference over largest output, and the share of samples that differ by less than 1e-5 of it."""
    differences, largest = [], 1e-30
    with evaluation(student):
        for x in inputs:
            expected, found = student(x), final(x)
            if not isinstance(expected, Tensor):
                return None, None
            differences.append((found - expected).abs().flatten(1).amax(1))
            largest = max(largest, float(expected.abs().max()))
    relative = torch.cat(differences).double() / largest
    return float(relative.max()), float((relative <= 1e-5).double().mean())


def latency_of(dense: Callable[[Tensor], Any], packed: Callable[[Tensor], Any], x: Tensor) -> Timing:
    times = interleaved({"dense": (dense, x), "packed": (packed, x)})
    middle = {name: 1e3 * median(taken) for name, taken in times.items()}
    return Timing(middle["dense"], middle["packed"], tuple(x.shape), torch.get_num_threads())
