# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow with size, of every operator and every method: ``cofire bench-growth``.

``operators.py`` and ``methods.py`` hold the sweeps; ``laws.py`` fits exponents, ``plots.py`` draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofire.bench import harness, machine, quiet, resume
from cofire.bench.cases import families, known
from cofire.bench.growth.laws import exponent, growth_table
from cofire.bench.growth.plots import growth_plots
from cofire.bench.growth.sweep import Sweep
from cofire.bench.results import FOLDER, Results, Row, environment, results_path

if TYPE_CHECKING:
    from cofire.bench.growth.methods import MethodSweep

__all__ = ["Sweep", "exponent", "growth_path", "growth_plots", "growth_table", "load", "run", "select"]

COMMAND = "cofire bench-growth"
QUICK = 3  #: so many sizes, the smallest ones


def growth_path(device: str = "cpu", quick: bool = False) -> Path:
    """``benchmarks/results/growth/<device>.json``; quick runs have a file of their own."""
    return FOLDER / "growth" / results_path(device, quick).name


def select(
    chosen_families: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
) -> list[Sweep | MethodSweep]:
    """The sweeps asked for. With ``ops`` alone no methods, with ``methods`` alone no operators; methods by their names or
    those of their classes.

    Raises:
        ValueError: an unknown family, operator or method; near matches are listed.
    """
    from cofire.bench.growth import methods as trained
    from cofire.bench.growth import operators

    chosen = known("family", chosen_families or families(), families())
    found: list[Sweep | MethodSweep] = []
    if ops or not methods:
        swept = [s for s in operators.SWEEPS if s.family in chosen]
        known("operator with a sweep", ops or (), sorted({s.op for s in swept}))
        found += [s for s in swept if not ops or s.op in ops]
    if methods or not ops:
        ours = [s for s in trained.SWEEPS if s.family in chosen]
        names = {s.op: {type(s.method).name, type(s.method).__name__} for s in ours}
        known("method with a sweep", methods or (), sorted(set().union(*names.values())))
        found += [s for s in ours if not methods or names[s.op] & set(methods)]
    return found


def run(
    out: str | Path | None = None,
    *,
    families: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    quick: bool = False,
    device: str = "cpu",
    fresh: bool = False,
    progress: bool = True,
    announce: Callable[[str], Any] = lambda text: None,
) -> Results:
    """Time operators and methods on larger and larger inputs, each answer checked, and write a results file.

    The file is written after each point. A point that is there already, measured with this very code in this environment, is
    not measured again: an interrupted run goes on where it stopped. A file that is broken is moved aside and begun anew.

    Args:
        out: the file; default :func:`growth_path`.
        families, ops, methods: only these (:func:`select`).
        quick: only the three smallest sizes of each sweep.
        device: ``"cpu"`` or ``"cuda"``.
        fresh: measure again what is there.
        progress: show a bar.
        announce: called with a line about a file that is moved aside: one that is broken, or was measured elsewhere.

    Returns:
        Results, whose ``refused`` says which points raised an error, and which; the others go on. The rows also have
        ``sweep`` (what grows), ``size``, and ``time_law`` and ``memory_law``, the names of what theory expects. Of plain
        torch only up to the size where a call takes half a second. Rows of methods have the mode ``step`` and the operator
        ``method:<Name>``; their ``dense`` is a step of the same network without the method.

    Raises:
        ValueError: an unknown family, operator, method or device; near matches are listed. A file of another kind or of
            another cofire, which stays as it is.

    Example:
        >>> run("/tmp/growth.json", ops=["dkm"], quick=True, progress=False).rows[0]["size"]  # doctest: +SKIP
        65536
    """
    chosen = select(families, ops, methods)
    harness._check_request(device, None, ())
    path = Path(out) if out is not None else growth_path(device, quick)
    points = [(sweep, size) for sweep in chosen for size in (sweep.sizes[:QUICK] if quick else sweep.sizes)]
    began: list[Row] = []
    with machine.settled(None, True, announce) as pinned, harness._progress(progress, len(points)) as advance:
        results, run_id = _begin(path, {**environment(device, quick), "pinned": pinned}, announce)
        effort, probe = harness.Effort(True), quiet.Probe(device)
        for sweep, size in points:
            advance(f"{sweep.op}, {sweep.label(size)}", None)
            if not fresh and _measured(results, run_id, sweep, size, device):
                continue
            others = _measured(results, run_id, sweep, None, device)
            measured = functools.partial(sweep.measure, size, device, effort, others)
            try:
                rows = _with_facts(measured, sweep, results, run_id, probe)
            except Exception as error:  # of one point: the others go on
                results.refused.append(f"{sweep.op}, {sweep.label(size)}: {type(error).__name__}: {error}")
                continue
            began += rows
            harness.mark_noise(began, probe)
            results.rows = [r for r in results.rows if not _is_of(r, sweep, size, device)] + rows
            results.save(path)
    return results


def load(path: str | Path) -> Results:
    """Read a file of :func:`run`.

    Raises:
        FileNotFoundError: there is none. ValueError: it is cut off, another kind of file, or of another cofire.
    """
    found = Results.load(path, COMMAND)
    for i, row in enumerate(found.rows):
        lacking = [name for name in ("sweep", "size") if name not in row]
        if lacking:
            raise ValueError(
                f"bench-growth: {path} is not a results file of {COMMAND}: row {i} lacks {', '.join(lacking)}; name a file "
                f"of {COMMAND}"
            )
    return found


def _begin(path: Path, here: dict[str, Any], announce: Callable[[str], Any]) -> tuple[Results, str]:
    """What the file holds already, if it was measured in this environment, and the id of this run."""
    earlier, run_id = resume.whole(path, lambda: load(path), announce), resume.new_id()
    if earlier is None or not resume.may_stay(path, earlier, here, announce):
        earlier = Results({}, {})
    there = resume.noted(here, run_id, earlier, state=resume.state(here["commit"]))
    return Results(there, {}, earlier.rows), run_id


def _is_of(row: Row, sweep: Sweep | MethodSweep, size: int | None, device: str) -> bool:
    """Whether a row belongs to a sweep, and to one size of it."""
    same = (row["family"], row["op"], row.get("sweep"), row["device"]) == (sweep.family, sweep.op, sweep.grows, device)
    return same and (size is None or row["case"].startswith(f"{sweep.label(size)}: "))


def _measured(results: Results, run_id: str, sweep: Sweep | MethodSweep, size: int | None, device: str) -> list[Row]:
    """The rows of this run and of those of the very same code: others say nothing about what is there, or affordable."""
    runs = results.environment["runs"]
    same = {name for name, facts in runs.items() if facts.get("state") == runs[run_id]["state"]}
    return [r for r in results.rows if _is_of(r, sweep, size, device) and r.get("run") in same]


def _with_facts(
    measured: Callable[[], list[Row]], sweep: Sweep | MethodSweep, results: Results, run_id: str, probe: quiet.Probe
) -> list[Row]:
    """The rows of a point between two readings of the probe, with what a reader must know of the sweep."""
    before = probe.look()
    rows = measured()
    strangest = max(before, probe.look(), key=probe.strangeness)
    facts = {"sweep": sweep.grows, "time_law": sweep.time, "memory_law": sweep.memory, "probe": strangest}
    for row in rows:
        row.update(facts, commit=results.environment["commit"], date=results.environment["date"], run=run_id)
    return rows
