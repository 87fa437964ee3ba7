# SPDX-License-Identifier: Apache-2.0
"""Timing networks against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)


def interleaved(
    candidates: Mapping[Name, tuple[Callable[[Tensor], Any], Tensor]], repeats: int = 31, warmup: int = 5
) -> dict[Name, list[float]]:
    """Seconds of each repeat.

    The candidates run one after the other within each, so that a slow moment of the machine meets all of them.
    """
    times: dict[Name, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for repeat in range(warmup + repeats):
            for name, (function, x) in candidates.items():
                _synchronize(x)
                start = time.perf_counter()
                function(x)
                _synchronize(x)
                if repeat >= warmup:
                    times[name].append(time.perf_counter() - start)
    return times


def _synchronize(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
