# SPDX-License-Identifier: Apache-2.0
"""Does the machine run as it usually does? Fixed pieces of work that are timed between the readings of a run.

On a machine that is shared, a core slows down by half when its sibling works for somebody else, and memory by as much when
others read theirs. Medians do not help: such a state lasts for seconds, longer than the readings of a case. So the readings
are taken in segments, with a look at the machine before and after each, and a round of readings counts if everything
was as usual in both looks. What is usual is decided by all looks of a run, and by no reading. Memory and the last cache are
shared with more than a core is: their state does not count for calls whose data stay in a core's own caches, and that of the
memory not for calls whose data stay in the last cache.
"""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from cofire.bench import cuda_timing, machine

#: The time in ms of each piece of work.
Look = dict[str, float]

BAND = 1.1  #: what takes so many times as long as usual, or as much less, was disturbed
SEGMENT_SECONDS = 0.06  #: of readings between two looks
LEAST = 5  #: where fewer rounds are undisturbed all count, and the row is flagged
CALIBRATION = 20  #: looks before the first case
SHORT_MS = 0.3
PASSES = 10_000  #: of a loop, a tenth of a millisecond
COPIED_MIB, MOST_COPIED_MIB = 24, 64  #: of memory that is copied: 1.5 times the last cache, where that is not too much
#: Of the last cache: a quarter is copied within it, a half holds what a call reads and writes; no more, as it is shared.
MOST_CACHED = 16 << 20
OUTSIDE = ("cache", "memory")  #: pieces of work that wait for what lies outside a core, the nearer one first


class Probe:
    """Fixed work for all threads, for one core, between cores, in the last cache and in memory, timed again and again.

    ``work`` may be other pieces of work, each a function that returns how many ms it took.
    """

    def __init__(self, device: str, work: Mapping[str, Callable[[], float]] | None = None) -> None:
        self.work = work if work is not None else _on_gpu() if device == "cuda" else _on_cpu()
        self.looks = 0
        self._ordered: dict[str, list[float]] = {part: [] for part in self.work}
        for _ in range(CALIBRATION):
            self.look()

    def look(self) -> Look:
        """The time that each piece takes now, the shortest of three, of short ones of six."""
        now = {}
        for part, timed in self.work.items():
            shortest = min(timed() for _ in range(3))
            if shortest < SHORT_MS:
                shortest = min(shortest, *(timed() for _ in range(3)))
            now[part] = round(shortest, 4)
        self.remember(now, 1)
        return now

    def remember(self, look: Look, looks: int) -> None:
        """Count a look so many times; or what was usual in an earlier part of the run, after so many looks."""
        for _ in range(looks):
            self.looks += 1
            for part, times in self._ordered.items():
                bisect.insort(times, look[part])

    def usual(self) -> Look:
        """The lower quartile of all looks: what the machine reaches again and again."""
        return {part: times[len(times) // 4] for part, times in self._ordered.items()}

    def strangeness(
        self, look: Mapping[str, float], usual: Mapping[str, float] | None = None, besides: Collection[str] = ()
    ) -> float:
        """How many times the piece that is farthest from its usual time takes as long, or as much less; some do not count."""
        usual = self.usual() if usual is None else usual
        parts = [p for p in usual if p in look and p not in besides]
        return max((max(look[p] / usual[p], usual[p] / look[p]) for p in parts), default=1.0)


def _milliseconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - begin) / 1e6


def _count() -> None:
    for _ in range(PASSES):
        pass


def unfelt(held: int, device: str = "cpu") -> frozenset[str]:
    """The pieces of work whose state a call does not feel that holds and moves so many bytes, the same each time."""
    if device != "cpu":
        return frozenset()
    if held <= (machine.cache_bytes() or {}).get("L2", 0):
        return frozenset(OUTSIDE)
    return frozenset(OUTSIDE[1:]) if held <= min(_last_cache() // 2, MOST_CACHED) else frozenset()


def _last_cache() -> int:
    return max((machine.cache_bytes() or {}).values(), default=0)


def _copy(size: int) -> Callable[[], float]:
    source = torch.rand(size // 4)
    target = torch.empty_like(source)
    return lambda: _milliseconds(lambda: target.copy_(source))


def _on_cpu() -> dict[str, Callable[[], float]]:
    a, b = torch.rand(384, 384), torch.rand(384, 384)
    caches = machine.cache_bytes() or {}
    last = _last_cache()
    copied = last + last // 2
    copied = copied if COPIED_MIB << 20 <= copied <= MOST_COPIED_MIB << 20 else COPIED_MIB << 20
    # What torch's grain gives to two threads, and what of it one thread takes: it reads what the other has written. Cores
    # that share no cache are slow at that, and on which ones a machine that is shared lets two threads run may change.
    written, grain = torch.zeros(1 << 16), 1 << 15
    taken = torch.empty(grain - 1)

    def exchange() -> None:
        for _ in range(4):
            written.add_(1.0)
            taken.copy_(written[-taken.numel() :])

    work = {
        "threads": lambda: _milliseconds(lambda: a @ b),
        "core": lambda: _milliseconds(_count),
        "exchange": lambda: _milliseconds(exchange),
    }
    cached = min(last // 4, MOST_CACHED // 2)  # read and written
    if cached > torch.get_num_threads() * caches.get("L2", last):  # what they hold themselves says nothing of it
        work["cache"] = _copy(cached // 2)
    return {**work, "memory": _copy(copied)}


def _on_gpu() -> dict[str, Callable[[], float]]:
    cuda_timing.warm_up()
    a, b = torch.rand(4096, 4096, device="cuda"), torch.rand(4096, 4096, device="cuda")
    return {"device": lambda: cuda_timing.read_ms(lambda: a @ b, 1), "core": lambda: _milliseconds(_count)}


class Watch:
    """The looks of one case, and which of its rounds they let count; ``besides``: pieces of work that say nothing of it."""

    def __init__(self, probe: Probe, besides: Collection[str] = ()) -> None:
        self.probe = probe
        self.besides = besides
        self.looks: list[tuple[int, Look]] = []  #: how many rounds there were before each, and what it saw
        self._last = float("-inf")

    def due(self) -> bool:
        return time.perf_counter() - self._last >= SEGMENT_SECONDS

    def look(self, rounds: int) -> None:
        self.looks.append((rounds, self.probe.look()))
        self._last = time.perf_counter()

    def quiet(self, besides: Collection[str] | None = None) -> list[int]:
        """The rounds between two looks in which everything was as usual, but for what is ``besides``."""
        return [i for (begin, _), (end, _) in self._quiet_segments(besides) for i in range(begin, end)]

    def seen(self, besides: Collection[str] | None = None) -> Look:
        """The usual look around the rounds that count; around all where too few do."""
        segments = self._quiet_segments(besides) if len(self.quiet(besides)) >= LEAST else []
        looks = [look for pair in segments for _, look in pair] or [look for _, look in self.looks]
        return {part: statistics.median(look[part] for look in looks) for part in looks[0]}

    def _quiet_segments(self, besides: Collection[str] | None) -> list[tuple[tuple[int, Look], tuple[int, Look]]]:
        usual = self.probe.usual()
        besides = self.besides if besides is None else besides
        fine = [self.probe.strangeness(look, usual, besides) <= BAND for _, look in self.looks]
        pairs = zip(self.looks, self.looks[1:])
        return [pair for pair, before, after in zip(pairs, fine, fine[1:]) if before and after]


def counted(quiet: Sequence[int], rounds: int) -> tuple[list[int], bool]:
    """Which of a run's rounds count, and whether they were undisturbed: all of them count where too few were."""
    found = [i for i in quiet if i < rounds]
    if len(found) >= min(LEAST, rounds):
        return found, True
    return list(range(rounds)), False
