# SPDX-License-Identifier: Apache-2.0
"""Runs slices within a time: one after the other, each in a process of its own that is killed when it hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cofire.gpu_check.journal import BAD, GOOD, Journal
from cofire.gpu_check.plan import PARTS, Slice

NOT_HERE = 3  #: exit code of a step that cannot be done on this machine, and said why
LEAST_SECONDS = 10.0  #: with less time left, nothing is begun
POLL_SECONDS = 0.1
LOG_BYTES = 200_000  #: what is kept of the end of a log
MOST_GOES = 50  #: of a slice in one call; each but the last sets an item aside


@dataclass(frozen=True)
class Ending:
    """How one go of a process ended: its exit code, or ``"cut"`` by the time or ``"hung"``."""

    code: int | None
    why: str = ""


def share(slices: Sequence[Slice], part: str) -> float:
    """The part's share of the time that is left, among the parts that have something to do."""
    waiting = {s.part for s in slices}
    return PARTS[part][1] / sum(PARTS[p][1] for p in waiting)


class Runner:
    """Does what is left of a plan, and notes it in the journal.

    Args:
        journal: what is known already.
        environment: of the processes.
        logs: the folder of what they print.
        folder: where they run.
        announce: called with a line for people.
        clock: seconds, growing.
    """

    def __init__(
        self,
        journal: Journal,
        environment: Mapping[str, str],
        logs: Path,
        folder: Path,
        announce: Callable[[str], object] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.journal, self.environment, self.logs, self.folder = journal, environment, logs, folder
        self.announce, self.clock = announce, clock

    def left(self, slices: Sequence[Slice]) -> list[Slice]:
        """The slices that have not ended, well or badly."""
        ended = {name for name, r in self.journal.slices().items() if r["event"] in (*GOOD, *BAD)}
        return [s for s in slices if str(s) not in ended]

    def run(self, slices: Sequence[Slice], seconds: float) -> None:
        """Part by part, each with its share of the time; then what is left, while there is time."""
        end = self.clock() + seconds
        waiting = self.left(slices)
        for part in dict.fromkeys(s.part for s in waiting):
            of_part = [s for s in waiting if s.part == part]
            later = [s for s in waiting if s.part not in {p for p in PARTS if _before(p, part)}]
            until = self.clock() + (end - self.clock()) * share(later, part)
            self._go_through(of_part, until)
        self._go_through(self.left(slices), end)

    def _go_through(self, slices: Sequence[Slice], until: float) -> None:
        for slice in slices:
            if until - self.clock() < LEAST_SECONDS:
                return
            self._do(slice, until)

    def _do(self, slice: Slice, until: float) -> None:
        """One slice: again and again where an item had to be set aside."""
        for _ in range(MOST_GOES):
            begun, known = self.clock(), len(self._ended_items(slice))
            limit = min(slice.seconds, until - begun)
            if limit < LEAST_SECONDS:
                return
            self.announce(f"{slice} (at most {limit:.0f} s)")
            ending = self._process(slice, limit)
            self.journal.mend()
            aside = self._set_aside(slice, ending)
            event, note = self._verdict(slice, ending, limit == slice.seconds)
            if aside and event not in GOOD and ending.why != "cut":
                continue
            if ending.code is not None and ending.code < 0 and len(self._ended_items(slice)) > known:
                continue  # a crash of which the item is known
            self.journal.write(
                part=slice.part, slice=str(slice), event=event, note=note, seconds=round(self.clock() - begun, 1)
            )
            self.announce(f"{slice}: {event}" + (f" ({note})" if note else ""))
            return

    def _ended_items(self, slice: Slice) -> set[str]:
        return {name for name, r in self.journal.items(slice.part).items() if r["event"] != "start"}

    def _set_aside(self, slice: Slice, ending: Ending) -> bool:
        """Note the items that a hung or crashed process was at; True if there are any."""
        if ending.why == "hung":
            event, note = "hung", f"no answer within {slice.stall:g} s"
        elif ending.code is not None and (ending.code < 0 or ending.code == CONTEXT_LOST):
            event, note = "crashed", f"the process ended with {_words(ending.code)}"
        else:
            return False
        stuck = [n for n, r in self.journal.items(slice.part).items() if r["event"] == "start"]
        for item in stuck:
            self.journal.write(part=slice.part, slice=str(slice), item=item, event=event, note=note)
        return bool(stuck) or ending.code == CONTEXT_LOST

    def _verdict(self, slice: Slice, ending: Ending, own_limit: bool) -> tuple[str, str]:
        """The event of the slice, and why."""
        if ending.why == "hung":
            return "hung", f"no answer within {slice.stall:g} s"
        if ending.why == "cut":
            if own_limit and not slice.resumes:
                return "timed out", f"{slice.seconds:g} s were not enough"
            return "cut", "the time was over; the next call goes on"
        if ending.code == NOT_HERE:
            return "skipped", self._last_line(slice)
        if ending.code == 0:
            bad = [r for r in self.journal.items(slice.part).values() if r["event"] in BAD and r["slice"] == str(slice)]
            return ("failed", f"{len(bad)} failed") if bad else ("passed", "")
        return "failed", self._last_line(slice) or f"ended with {_words(ending.code)}"

    def _last_line(self, slice: Slice) -> str:
        lines = [line.strip() for line in self._log(slice).read_text("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def _log(self, slice: Slice) -> Path:
        return self.logs / f"{str(slice).replace('/', '-')}.log"

    def _process(self, slice: Slice, limit: float) -> Ending:
        """One go: started in a session of its own, so that whatever it starts ends with it."""
        self.logs.mkdir(parents=True, exist_ok=True)
        environment = {**self.environment, "COFIRE_GPU_CHECK_SLICE": str(slice)}
        with self._log(slice).open("wb") as log:
            process = subprocess.Popen(
                slice.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
            try:
                return self._watch(process, slice, limit)
            finally:
                _end(process)
                _shorten(self._log(slice))

    def _watch(self, process: subprocess.Popen[bytes], slice: Slice, limit: float) -> Ending:
        begun = alive = self.clock()
        size = self._size()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return Ending(process.wait(POLL_SECONDS))
            now = self.clock()
            if self._size() != size:
                size, alive = self._size(), now
            if now - begun >= limit:
                return Ending(None, "cut")
            if slice.stall is not None and now - alive >= slice.stall:
                return Ending(None, "hung")

    def _size(self) -> int:
        return self.journal.path.stat().st_size


CONTEXT_LOST = 70  #: exit code of a step whose GPU context does not answer after an error


def _before(part: str, other: str) -> bool:
    names = list(PARTS)
    return names.index(part) < names.index(other)


def _words(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: politely, then not."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
            if how is signal.SIGTERM:
                continue  # its children may be there still
    process.wait()


def _shorten(log: Path) -> None:
    if log.stat().st_size > LOG_BYTES:
        with log.open("rb") as file:
            file.seek(-LOG_BYTES, os.SEEK_END)
            tail = file.read()
        log.write_bytes(b"...\n" + tail)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
