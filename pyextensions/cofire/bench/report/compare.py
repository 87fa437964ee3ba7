# SPDX-License-Identifier: Apache-2.0
"""Two results files side by side: two machines, or two commits of cofire on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cofire.bench.report.rows import families, measurements, score, titles
from cofire.bench.report.tables import SHORT, Table, against, bold, digits, milliseconds, plural, times
from cofire.bench.results import Results, Row, geometric_mean

FASTER, SAME, SLOWER = "faster", "same", "slower"
#: Two runs of the same thing differ by as much. A row that was marked noisy may differ by half.
STEP, NOISY_STEP = 1.1, 1.5
RULE = (
    f"Slower and faster: the readings lie apart, and the medians by more than {STEP - 1:.0%} ({NOISY_STEP - 1:.0%} where a "
    "row was marked noisy, ~). Beside it stands the same ratio of dense, which is the machine's doing."
)
Key = tuple[str, ...]  #: family, operator, case, type, mode


# --------------------------------------------------------------------------------------------------- two machines

MACHINES = ("operator", "case", "type", "mode")


def shared(a: Results, b: Results) -> list[tuple[Row, Row]]:
    """Our rows that both files have, with a time in both."""
    rows = [{_key(r): r for r in results.rows if r["provider"] == "cofire" and r["median_ms"]} for results in (a, b)]
    return [(row, rows[1][key]) for key, row in rows[0].items() if key in rows[1]]


def _key(row: Row) -> Key:
    return tuple(str(row[k]) for k in ("family", "op", "case", "dtype", "mode"))


def machines(a: Results, b: Results, called: Sequence[str] = ()) -> Table:
    """What both measured: the time on each, how much faster the second is, and the speed-up over dense on each.

    ``called``: what a page calls the two, where it shows others too.
    """
    first, second = called or titles([a, b])
    headings: tuple[str, ...] = (*MACHINES, f"ms on {first}", f"ms on {second}", "first / second")
    headings += (f"against dense on {first}", f"against dense on {second}")
    speedups = [{_key_of(m): m.against_dense for m in measurements(r.rows)} for r in (a, b)]
    lines = []
    for x, y in shared(a, b):
        key = _key(x)
        ratio = f"{x['median_ms'] / y['median_ms']:.2f}"
        both = [against(s.get(key), interval=False) for s in speedups]
        lines.append(
            [key[1], key[2], SHORT.get(key[3], key[3]), key[4], milliseconds(x), milliseconds(y), ratio, *both]
        )
    return headings, lines


def _key_of(m: object) -> Key:
    return tuple(str(getattr(m, k)) for k in ("family", "op", "case", "dtype", "mode"))


def machines_by_family(a: Results, b: Results, called: Sequence[str] = ()) -> Table:
    """The same in a line for each family."""
    first, second = called or titles([a, b])
    headings = (
        "family",
        "measurements of both",
        "first / second",
        f"against dense on {first}",
        f"against dense on {second}",
    )
    pairs, lines = shared(a, b), []
    for family in families([a, b]):
        those = [(x, y) for x, y in pairs if x["family"] == family]
        if not those:
            continue
        keys = {_key(x) for x, _ in those}
        scores = [score(m.against_dense for m in measurements(r.rows) if _key_of(m) in keys) for r in (a, b)]
        mean = geometric_mean([x["median_ms"] / y["median_ms"] for x, y in those])
        lines.append([family, str(len(those)), f"{mean:.2f}", *(times(s.mean) for s in scores)])
    return headings, lines


# ---------------------------------------------------------------------------------------------------- two commits


@dataclass(frozen=True)
class Change:
    """One row of ours, before and after."""

    old: Row
    new: Row
    control: float | None  #: the same ratio of dense, which did not change: what the machine did

    @property
    def ratio(self) -> float:
        """New time by old time: above 1 is slower."""
        return float(self.new["median_ms"] / self.old["median_ms"])

    @property
    def verdict(self) -> str:
        """Faster or slower only where the readings lie apart, and the medians further than two runs of one thing do."""
        step = NOISY_STEP if self.old["noisy"] or self.new["noisy"] else STEP
        if self.ratio > step and self.new["p20_ms"] > self.old["p80_ms"]:
            return SLOWER
        if self.ratio < 1 / step and self.new["p80_ms"] < self.old["p20_ms"]:
            return FASTER
        return SAME


def changes(old: Results, new: Results) -> list[Change]:
    """Of all rows that both have, the worst first."""
    dense = [
        {_key(r): r["median_ms"] for r in f.rows if r["provider"] == "dense" and r["median_ms"]} for f in (old, new)
    ]
    found = []
    for x, y in shared(old, new):
        before, after = (d.get(_key(x)) for d in dense)
        found.append(Change(x, y, after / before if before and after else None))
    return sorted(found, key=lambda c: -c.ratio)


CHANGES = ("operator", "case", "type", "mode", "old ms", "new ms", "new / old", "dense new / old", "verdict")


def change_table(found: Sequence[Change]) -> Table:
    lines = []
    for c in found:
        _, op, case, dtype, mode = _key(c.new)
        worse = c.verdict == SLOWER
        control = digits(c.control) if c.control is not None else "-"
        where = [op, case, SHORT.get(dtype, dtype), mode]
        lines.append([*where, milliseconds(c.old), milliseconds(c.new), bold(f"{c.ratio:.2f}", worse), control])
        lines[-1].append(bold(c.verdict, worse))
    return CHANGES, lines


def verdicts(old: Results, new: Results) -> list[str]:
    """What a reader must know first: how many became slower, and what the files do not share."""
    found = changes(old, new)
    count = {v: sum(c.verdict == v for c in found) for v in (SLOWER, SAME, FASTER)}
    words = [
        f"{plural(len(found), 'measurement')} in both files: {count[SLOWER]} slower, {count[SAME]} the same, "
        f"{count[FASTER]} faster."
    ]
    keys = {_key(c.new) for c in found}
    for which, results in (("old", old), ("new", new)):
        alone = sum(r["provider"] == "cofire" and bool(r["median_ms"]) and _key(r) not in keys for r in results.rows)
        if alone:
            words.append(f"Only in the {which} file: {plural(alone, 'measurement')}.")
    if not old.same_environment(new.environment):
        told = [f"{k}: {_fact(old, k)} and {_fact(new, k)}" for k in ("device", "threads", "torch", "python") if
                old.environment.get(k) != new.environment.get(k)]  # fmt: skip
        words.append(
            "The files were not measured in the same environment, so that the ratios are not those of the commits alone "
            f"({'; '.join(told) or 'it differs in what the files say of the machine'})."
        )
    return words


def _fact(results: Results, name: str) -> str:
    return str(results.environment.get(name, "not noted"))
