# SPDX-License-Identifier: Apache-2.0
"""What the suite compares today: which rows of a file are no longer of it, and what of it a file has not measured."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cofire.bench.cases import families, of_family
from cofire.bench.dense_products import SAME_DTYPE
from cofire.bench.harness import ONE_THREAD, candidates
from cofire.bench.results import Results, Row

Place = tuple[str, str, str, str, str]  #: family, operator, case, type, mode
Roster = Mapping[Place, Mapping[str, frozenset[str]]]  #: of each measurement the providers, and their variants
#: Whether a case has these depends on what the machine's library does in bfloat16.
BY_MACHINE = frozenset({"eager", SAME_DTYPE})
#: How a row begins to say that a peer is there, and of no use on such a machine, or for what is said there.
EXCUSED = ("cannot run here", "left out")


def place_of(row: Row) -> Place:
    family, op, case, dtype, mode = (str(row[k]) for k in ("family", "op", "case", "dtype", "mode"))
    return family, op, case, dtype, mode


@functools.cache
def roster(device: str) -> Roster:
    """The providers of each measurement of the suite with their variants, whether they are installed here or not."""
    found: dict[Place, dict[str, frozenset[str]]] = {}
    for case in (c for family in families() for c in of_family(family)):
        for mode in case.modes:
            names = {
                p: frozenset(variants) for p, variants in candidates(case, device, mode, None, absent=True).items()
            }
            if case.overhead and mode == "forward" and device == "cpu":  # whatever torch's threads are just now
                names[ONE_THREAD] = frozenset({""})
            place = case.family, case.op, case.name, str(case.dtype).removeprefix("torch."), mode
            there = found.setdefault(place, {})
            for provider, variants in names.items():
                there[provider] = there.get(provider, frozenset()) | variants
    return found


def gone(results: Results) -> list[Row]:
    """The rows of measurements that the suite no longer has, or of providers or variants that those no longer have.

    A provider that no measurement has at all may be somebody's own (``cofire bench --peer``): its rows stay. So do those
    that name no variant, from when the provider had but one.
    """
    found = []
    for row in results.rows:
        there = roster(row["device"])
        here, provider = there.get(place_of(row)), row["provider"]
        if here is None:
            found.append(row)
        elif provider not in BY_MACHINE and provider in known(row["device"]):
            if provider not in here or _other_variant(row, here[provider]):
                found.append(row)
    return found


def _other_variant(row: Row, variants: frozenset[str]) -> bool:
    """Whether a row is of a variant that its provider does not have: under the same name something else was timed."""
    return bool(row.get("variant")) and row["variant"] not in variants


def known(device: str) -> frozenset[str]:
    """All providers that some measurement has."""
    return frozenset().union(*roster(device).values())


def current(results: Results) -> Results:
    """The results without the rows that are :func:`gone`, which are kept as ``left_out``."""
    old = gone(results)
    names = {id(row) for row in old}
    return replace(results, rows=[row for row in results.rows if id(row) not in names], left_out=old)


def missing(results: Results) -> dict[Place, list[str]]:
    """What a full run on that machine would have: the providers of each measurement that were not tried.

    One that was tried has a time, or a note that says what was wrong with its answer; one that cannot run on such a machine,
    or takes too long, says so. One that is only not installed is missing, as is one whose time is of a variant that is gone.
    """
    rows = {(place_of(r), r["provider"]): r for r in results.rows}
    serial = results.environment["threads"] == 1
    found = {}
    for place, names in roster(results.environment["kind"]).items():
        asked = sorted(set(names) - BY_MACHINE - ({ONE_THREAD} if serial else set()))
        lacking = [name for name in asked if not _tried(rows.get((place, name)), names[name])]
        if lacking:
            found[place] = lacking
    return found


def _tried(row: Row | None, variants: frozenset[str]) -> bool:
    if row is None or _other_variant(row, variants):
        return False
    if row.get("absent"):
        return str(row.get("note")).startswith(EXCUSED)
    if row["median_ms"]:
        return True
    return row["provider"] != "cofire" and bool(row.get("note"))


def words(found: Mapping[Place, Sequence[str]]) -> list[str]:
    """A line for each measurement."""
    return [f"{', '.join(place)}: {', '.join(names)}" for place, names in found.items()]
