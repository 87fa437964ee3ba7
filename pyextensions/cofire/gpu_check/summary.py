# SPDX-License-Identifier: Apache-2.0
"""What passed, what failed, what the time did not suffice for: as JSON, and as lines for people."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cofire.files import write_atomically
from cofire.gpu_check.journal import BAD, GOOD, Journal
from cofire.gpu_check.plan import MEASURING, Slice

NAME = "summary.json"
NOT_BEGUN = "not begun"


def _slice(slice: Slice, journal: Journal, dry: bool) -> dict[str, Any]:
    name = str(slice)
    end = journal.slices().get(name, {"event": NOT_BEGUN})
    items = [r for r in journal.items(slice.part).values() if r["slice"] == name]
    counts = Counter(r["event"] for r in items)
    total = journal.totals().get(name)
    found = {
        "slice": name,
        "outcome": end["event"],
        "note": end.get("note", ""),
        "seconds": end.get("seconds"),
        "passed": counts["passed"],
        "failed": sum(counts[event] for event in BAD),
        "skipped": counts["skipped"],
        "items": total,
    }
    return found | ({"measured": "not measured"} if dry and slice.part in MEASURING else {})


def summarize(slices: Sequence[Slice], journal: Journal, dry: bool) -> dict[str, Any]:
    """The whole as a dictionary."""
    from cofire.bench.results import environment

    rows = [_slice(s, journal, dry) for s in slices]
    parts = dict.fromkeys(s.part for s in slices)
    failures = [
        {"slice": r["slice"], "item": name, "event": r["event"], "note": r.get("note", "")}
        for part in parts
        for name, r in journal.items(part).items()
        if r["event"] in BAD
    ]
    here = environment("cpu", False)
    return {
        "dry_run": dry,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        **{name: here[name] for name in ("commit", "cofire", "torch", "cuda", "python")},
        "complete": all(r["outcome"] in (*GOOD, *BAD) for r in rows),
        "passed": all(r["outcome"] in GOOD for r in rows) and not failures,
        "slices": rows,
        "failures": failures,
    }


def write(out: Path, summary: dict[str, Any]) -> Path:
    return write_atomically(out / NAME, json.dumps(summary, indent=1) + "\n")


def lines(summary: dict[str, Any]) -> list[str]:
    """A table, then the failures, then what to do next."""
    wide = max([len(r["slice"]) for r in summary["slices"]], default=5)
    found = [f"{'slice':{wide}}  {'outcome':10} {'passed':>6} {'failed':>6} {'skipped':>7} {'of':>5}"]
    for r in summary["slices"]:
        counts = [r["passed"], r["failed"], r["skipped"]] if r["items"] is not None else ["", "", ""]
        note = r["note"] or r.get("measured", "")
        total = "" if r["items"] is None else r["items"]
        found.append(
            f"{r['slice']:{wide}}  {r['outcome']:10} {counts[0]:>6} {counts[1]:>6} {counts[2]:>7} {total:>5}  {note}".rstrip()
        )
    for failure in summary["failures"][:20]:
        found.append(
            f"{failure['event']}: {failure['item']}: {failure['note'].splitlines()[0] if failure['note'] else ''}"
        )
    if len(summary["failures"]) > 20:
        found.append(f"... and {len(summary['failures']) - 20} more in {NAME}")
    if not summary["complete"]:
        found.append("The time was over before everything was done: the same command goes on where it stopped.")
    elif summary["passed"]:
        found.append("Everything passed." if not summary["dry_run"] else "The dry run passed. Nothing was measured.")
    else:
        found.append("Not everything passed: --retry does again what failed.")
    return found
