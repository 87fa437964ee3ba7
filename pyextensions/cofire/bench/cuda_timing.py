# SPDX-License-Identifier: Apache-2.0
"""Times on a GPU without the time in which the host prepares launches.

Events around a few short calls measure how fast Python can launch, not how fast the kernels run. So the GPU is put to
sleep first: while it sleeps the host runs ahead, and the calls then run back to back. Calls that wait for the GPU, or
that launch more than its queue holds, are not helped by that, and their waiting counts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

CYCLES_PER_MS = 2_000_000  #: of a GPU at about 2 GHz; a slower one sleeps longer
LEAST_SLEEP_MS, MOST_SLEEP_MS = 0.2, 20.0
MOST_REPEATS = 100  #: a queue holds about a thousand launches, and a call may launch several
WARM_UP_SECONDS = 0.3  #: in which an idle GPU reaches its clocks


def sleep_ms(host_ms: float, repeats: int) -> float:
    """How long the GPU sleeps while the host prepares that many calls of ``host_ms``."""
    return min(max(1.5 * host_ms * repeats, LEAST_SLEEP_MS), MOST_SLEEP_MS)


def read_ms(run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds per call by events on the current stream, the host running ahead."""
    repeats = min(repeats, MOST_REPEATS)
    host_ms = MOST_SLEEP_MS / 10
    if repeats > 1:  # short calls: one more, untimed, tells how long the host takes
        begin = time.perf_counter()
        run()
        host_ms = 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CYCLES_PER_MS * sleep_ms(host_ms, repeats)))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def best_seconds(run: Callable[[], Any], seconds: float) -> float:
    """The shortest of repeated readings."""
    run()
    torch.cuda.synchronize()
    once = read_ms(run, 1)
    repeats = max(1, min(MOST_REPEATS, int(1.0 / max(once, 1e-3))))
    best, end = once, time.perf_counter() + seconds
    while True:
        best = min(best, read_ms(run, repeats))
        if time.perf_counter() >= end:
            return best / 1e3


@functools.cache
def warm_up(seconds: float = WARM_UP_SECONDS) -> None:
    """Once in a process, keep the GPU busy until its clocks are up: idle, they are at a fraction."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()
