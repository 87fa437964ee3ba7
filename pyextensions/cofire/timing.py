# SPDX-License-Identifier: Apache-2.0
"""Timing calls against each other, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)


def interleaved(
    candidates: Mapping[Name, tuple[Callable[[Tensor], Any], Tensor]],
    repeats: int = 31,
    warmup: int = 5,
    train: bool = False,
) -> dict[Name, list[float]]:
    """Seconds of each repeat.

    The candidates run one after the other within each, so that a slow moment of the machine meets all of them. ``train``: with
    gradients; else in inference mode.
    """
    times: dict[Name, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode(not train):
        for repeat in range(warmup + repeats):
            for name, (function, x) in candidates.items():
                _synchronize(x)
                start = time.perf_counter()
                function(x)
                _synchronize(x)
                if repeat >= warmup:
                    times[name].append(time.perf_counter() - start)
    return times


def medians(
    candidates: Mapping[Name, tuple[Callable[[Tensor], Any], Tensor]], seconds: float = 0.02, train: bool = False
) -> dict[Name, float]:
    """Median seconds of a call, measured in turns for about so many ``seconds`` each: three repeats at least, 999 at most.

    Short calls are made several times within a repeat, so that the clock, or a wait for the device, does not count.
    """
    taken = interleaved(candidates, 1, 1, train).values()
    number = max(1, min(100, round(2e-4 / max(min(min(t) for t in taken), 1e-9))))
    total = sum(min(t) for t in taken)

    def several(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda x: [function(x) for _ in range(number)][-1]

    calls = {name: (several(function), x) for name, (function, x) in candidates.items()}
    repeats = max(3, min(999, round(seconds * len(candidates) / max(number * total, 1e-9))))
    times = interleaved(calls, repeats, 0, train)
    return {name: statistics.median(t) / number for name, t in times.items()}


def _synchronize(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
