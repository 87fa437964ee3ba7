# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped goes on where it stopped: what its results file notes down, and how a signal ends a run."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cofire.bench import machine
from cofire.bench.results import CODE, BrokenFileError, Results, Row
from cofire.files import move_aside

#: The environment may differ in these between the parts of one run.
MOMENT = ("date", "runs")
#: Of the environment, what a run notes down for itself, because rows of other runs may have it otherwise.
NOTED = (
    *("date", "commit", "torch", "cofire_kernels", "threads", "pinned", "affinity", "kernel"),
    *("numpy", "triton", "peers"),
)
DEATHS = 2  #: a measurement in which the process died so often is left out


def new_id() -> str:
    """What the rows of a run call it."""
    return uuid.uuid4().hex[:12]


@dataclass
class Record:
    """A run that is not finished yet; lies in its results file as ``run``."""

    request: dict[str, Any]  #: what was asked for
    state: str  #: of the code that is measured (:func:`state`)
    id: str = field(default_factory=new_id)
    began: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
    done: list[str] = field(default_factory=list)  #: the measurements that are finished: case and mode
    usual: dict[str, float] | None = None  #: what the machine's usual speed was so far, ...
    looks: int = 0  #: ... after so many looks at it
    begun: str | None = None  #: the measurement that is under way, ...
    deaths: dict[str, int] = field(default_factory=dict)  #: ... and how often the process died in one

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any] | None) -> Record | None:
        """The record in a file, or None where there is none that makes sense."""
        try:
            record = cls(**data) if data is not None else None
        except TypeError:
            return None
        return (
            record if record is not None and isinstance(record.done, list) and isinstance(record.deaths, dict) else None
        )

    def deadly(self, step: str) -> bool:
        """Whether the process died in a measurement twice: a library that aborts would do it again."""
        return self.deaths.get(step, 0) >= DEATHS

    def rows(self, results: Results) -> list[Row]:
        """What this run has measured so far."""
        return [row for row in results.rows if row.get("run") == self.id]


def state(commit: str | None) -> str:
    """The code that is measured: the commit, and for changes that are in none what they are, with the compiled kernels."""
    from cofire import native
    from cofire.version import __version__

    found = hashlib.sha256()
    for module in sorted(Path(native.__file__).parent.glob("*.so")):
        found.update(f"{module.name} {module.stat().st_size} {module.stat().st_mtime_ns}".encode())
    if commit is not None and commit.endswith("+changes"):
        call = ["git", "-C", str(Path(__file__).parent), "diff", "HEAD", "--", *CODE]
        found.update(subprocess.run(call, capture_output=True, check=False, timeout=30).stdout)
    return f"{__version__} {commit} {found.hexdigest()[:12]}"


def run_facts(here: dict[str, Any]) -> dict[str, Any]:
    """What a run measures with: versions, threads, the CPU, variables, the compiler of our kernels."""
    from cofire import native

    kept = {name: here[name] for name in NOTED if name in here}
    facts = {**kept, **machine.conditions(), "compiler": native.STATUS.build.get("compiler")}
    return dict(json.loads(json.dumps(facts)))  # as it would come out of a file


def noted(here: dict[str, Any], run: str, earlier: Results, **more: Any) -> dict[str, Any]:
    """The environment with ``runs``: by its id what this run measures with, and what those did whose rows are there."""
    there = {row.get("run") for row in earlier.rows}
    runs = {name: facts for name, facts in earlier.environment.get("runs", {}).items() if name in there}
    return {**here, "runs": {**runs, run: {**run_facts(here), **more}}}


def begin(
    path: Path, here: dict[str, Any], request: dict[str, Any], fresh: bool, announce: Callable[[str], Any]
) -> tuple[Results, Record]:
    """The results to add to, and the run to go on with: that of the file, if it asked for the same, or a new one."""
    request = json.loads(json.dumps(request))  # as it would come out of a file
    new = Record(request, state(here["commit"]))
    earlier = whole(path, lambda: Results.load(path), announce)
    if earlier is None or not may_stay(path, earlier, here, announce):
        return Results(noted(here, new.id, Results({}, {})), {}), new
    results = Results(noted(here, new.id, earlier), earlier.ceilings, earlier.rows)
    old = Record.of(earlier.run)
    if old is None:
        return results, new
    words = f"the run that began at {old.began} was not finished: {len(old.done)} measurements are in {path}"
    if fresh:
        announce(f"{words}; all are measured anew")
    elif old.request != request:
        announce(f"{words}; it was asked for something else, so this is a new run")
    elif old.state != new.state or not _same_moment(earlier.environment, here) or _other_facts(earlier, old, here):
        announce(f"{words}; cofire or its environment has changed since, so this is a new run")
    else:
        announce(f"{words}; this one goes on with the others (--fresh measures all anew)")
        if old.begun is not None:
            old.deaths[old.begun] = old.deaths.get(old.begun, 0) + 1
            old.begun = None
        return Results(noted(here, old.id, earlier), earlier.ceilings, earlier.rows), old
    return results, new


def _other_facts(earlier: Results, old: Record, here: dict[str, Any]) -> bool:
    """Whether the run that was stopped noted down something else than it would now; an older cofire noted nothing."""
    then = earlier.environment.get("runs", {}).get(old.id)
    return then is not None and not _same_moment(then, run_facts(here))


Loaded = TypeVar("Loaded")


def whole(path: Path, load: Callable[[], Loaded], announce: Callable[[str], Any]) -> Loaded | None:
    """What a file holds, or None where there is none; one that is empty, cut off or no JSON is moved aside.

    Raises:
        ValueError: it cannot be read, or is of another kind or of another cofire: it may be of use to somebody, and stays.
    """
    try:
        return load()
    except FileNotFoundError:
        return None
    except BrokenFileError as error:
        if not path.is_file():
            raise
        aside = move_aside(path, "broken")
        announce(f"{error}. It is now {aside}, and {path} is begun anew")
        return None
    except ValueError as error:
        raise ValueError(f"{error}. It stays as it is: move it away, or write to another file") from None


class Measured(Protocol):
    """What a results file of any kind holds."""

    environment: dict[str, Any]

    def same_environment(self, other: dict[str, Any]) -> bool: ...


def may_stay(path: Path, earlier: Measured, here: dict[str, Any], announce: Callable[[str], Any]) -> bool:
    """Whether what a file holds may stand beside what is measured here; otherwise the file is moved aside."""
    if earlier.same_environment(here):
        return True
    aside = move_aside(path, "earlier")
    differences = _differences(earlier.environment, here)
    announce(f"{path} was measured under other conditions ({differences}): it is now {aside}")
    return False


def _same_moment(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a.get(k) == b.get(k) for k in {*a, *b} - set(MOMENT))


def _differences(a: dict[str, Any], b: dict[str, Any]) -> str:
    results = Results(a, {})
    parted = [k for k in a if k in b and not results.same_environment({k: b[k]})]
    return ", ".join(f"{k} {a[k]} there, {b[k]} here" for k in parted)


# ---------------------------------------------------------------------------------------------------- signals


class Terminated(KeyboardInterrupt):
    """SIGTERM; like Ctrl-C, it ends a run and is no error of a provider."""


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` (in the main thread; elsewhere Python lets nobody handle signals)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def stopped(error: KeyboardInterrupt) -> tuple[str, int]:
    """What stopped a run, in words, and the exit code that shells expect."""
    return ("SIGTERM", 143) if isinstance(error, Terminated) else ("Ctrl-C", 130)


# ---------------------------------------------------------------------------------------------------- forecast


class Forecast:
    """How long the rest takes: as long as it took last time, where a file says so, or as the steps so far on average."""

    def __init__(self, steps: Sequence[str], known: dict[str, float]) -> None:
        self.steps, self.known = list(steps), dict(known)
        self.taken: list[float] = []

    def done(self, seconds: float) -> None:
        self.taken.append(seconds)

    def left(self) -> float | None:
        """Seconds, or None where nothing is known."""
        seen = self.taken or list(self.known.values())
        if not seen:
            return None
        usual = sum(seen) / len(seen)
        return sum(self.known.get(step, usual) for step in self.steps[len(self.taken) :])
