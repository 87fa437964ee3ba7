# SPDX-License-Identifier: Apache-2.0
"""Do two runs say the same? How many rows that were not flagged beforehand have the same time: ``cofire bench-agree``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cofire.bench.results import KEY, Results, Row

ENOUGH = 0.9  #: the share of rows that has to agree


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)


@dataclass(frozen=True)
class Agreement:
    """``pairs`` are the rows that both files have and whose probe was quiet; ``flagged`` the pairs left out for it."""

    pairs: list[tuple[Row, Row]]
    flagged: int
    within: float
    apart: str = ""  #: how the environments differ

    def share(self, number: str = "median_ms") -> float | None:
        """Of the pairs that have this number, how many differ by no more than ``within``; None where no pair has it."""
        ratios = [_ratio(a[number], b[number]) for a, b in self.pairs if a.get(number) and b.get(number)]
        return sum(r <= 1 + self.within for r in ratios) / len(ratios) if ratios else None

    @property
    def enough(self) -> bool:
        share = self.share()
        return share is not None and share >= ENOUGH

    def text(self, worst: int = 10) -> str:
        """For people: the shares, and the rows that differ most."""
        count = len(self.pairs)
        lines = [f"the environments differ: {self.apart}"] if self.apart else []
        lines.append(f"{count} rows in both files; {self.flagged} more left out, because the machine was busy")
        for number, words in (("median_ms", "times"), ("speedup", "speed-ups")):
            share = self.share(number)
            if share is not None:
                lines.append(f"  {100 * share:.1f} % of the {words} agree within {100 * self.within:g} %")
        order = sorted(self.pairs, key=lambda pair: -_ratio(pair[0]["median_ms"], pair[1]["median_ms"]))
        for a, b in order[:worst]:
            what = ", ".join(str(a[k]) for k in ("op", "case", "dtype", "mode", "provider"))
            ratio = _ratio(a["median_ms"], b["median_ms"])
            lines.append(f"  {ratio:5.2f}x  {a['median_ms']:.4g} and {b['median_ms']:.4g} ms  {what}")
        return "\n".join(lines)


def _timed(results: Results) -> dict[tuple[Any, ...], Row]:
    return {tuple(r[k] for k in KEY): r for r in results.rows if r["correct"] and r["median_ms"]}


def _flagged(row: Row) -> bool:
    """Whether the probe was slow; a file of an earlier cofire says only whether the row is noisy."""
    return bool(row.get("flagged", row["noisy"]))


def agreement(a: Results, b: Results, within: float = 0.10) -> Agreement:
    """Compare two runs row by row.

    Args:
        a, b: results of the same machine.
        within: how much two times may differ, as a share of the shorter one.

    Returns:
        What agrees; rows that the probe flagged in one of the runs are left out, which was decided without their times.

    Raises:
        ValueError: no row is in both, or ``within`` is not above 0.
    """
    if not within > 0:
        raise ValueError(f"bench: within must be above 0, got {within}")
    first, second = _timed(a), _timed(b)
    both = [(first[key], second[key]) for key in first if key in second]
    quiet = [pair for pair in both if not any(map(_flagged, pair))]
    if not quiet:
        why = f"{len(both)} are in both, all flagged as noisy" if both else "no row is in both"
        raise ValueError(f"bench: the two results files have nothing to compare: {why}")
    apart = "" if a.same_environment(b.environment) else _apart(a, b)
    return Agreement(quiet, len(both) - len(quiet), within, apart)


def _apart(a: Results, b: Results) -> str:
    names = [k for k in a.environment if k in b.environment and not a.same_environment({k: b.environment[k]})]
    return ", ".join(f"{k} {a.environment[k]} and {b.environment[k]}" for k in names)
