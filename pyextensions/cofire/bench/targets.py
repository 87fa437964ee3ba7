# SPDX-License-Identifier: Apache-2.0
"""What a family aims at, and what a results file says of it: the tables of the families' own pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cofire.bench.results import Results, Row

Key = tuple[str, str, str]  #: case, dtype, mode
Index = dict[tuple[str, str, str, str], Row]  #: by case, dtype, mode, provider
Found = list[tuple[str, float]]  #: where, and the number

HOT, COLD, BOTH_WAYS = "forward", "forward, cold", "forward+backward"


def index_of(results: Results, family: str) -> Index:
    """The rows of a family that have a time."""
    timed = (r for r in results.rows if r["family"] == family and r["median_ms"] is not None)
    return {(r["case"], r["dtype"], r["mode"], r["provider"]): r for r in timed}


def ratio(slow: Row | None, fast: Row | None) -> float | None:
    return None if slow is None or fast is None else slow["median_ms"] / fast["median_ms"]


def best_other(index: Index, case: str, dtype: str, mode: str) -> Row | None:
    others = [r for (c, d, m, p), r in index.items() if (c, d, m) == (case, dtype, mode) and p != "cofire"]
    return min(others, key=lambda r: float(r["median_ms"]), default=None)


def against(index: Index, provider: str, cases: Iterable[tuple[str, Key]]) -> Found:
    """How many times as fast as a provider, by case: ``cases`` gives each a name."""
    found: Found = []
    for where, key in cases:
        value = ratio(index.get((*key, provider)), index.get((*key, "cofire")))
        if value is not None:
            found.append((where, value))
    return found


@dataclass(frozen=True)
class Target:
    what: str
    least: float
    unit: str
    find: Callable[[Index, Results], Found]
    most: bool = False  #: the number is to stay below, not above

    def line(self, index: Index, results: Results) -> list[str]:
        """What, how much was asked, and what was found; bold where it was missed."""
        found = self.find(index, results)
        cells = []
        for where, value in found:
            text = f"{where}{': ' if where else ''}{value:.3g}{self.unit}"
            met = value <= self.least if self.most else value >= self.least
            cells.append(text if met else f"**{text}**")
        return [
            self.what,
            f"{'at most' if self.most else 'at least'} {self.least:g}{self.unit}",
            ", ".join(cells) or "-",
        ]


def lines(targets: Sequence[Target], index: Index, results: Results) -> list[list[str]]:
    return [t.line(index, results) for t in targets]
