# SPDX-License-Identifier: Apache-2.0
"""What a family aims at, and what a results file says of it: the tables of the families' own pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cofire.bench.results import Results, Row

Key = tuple[str, str, str]  #: case, dtype, mode
Index = dict[tuple[str, str, str, str], Row]  #: by case, dtype, mode, provider
Found = list[tuple[str, float]]  #: where, and the number
Find = Callable[[Index, Results], Found]
Draw = Callable[[Sequence[str], Sequence[Sequence[str]]], str]  #: a table, from headings and lines

HEADINGS = ("what", "target", "found")
HOT, COLD, BOTH_WAYS = "forward", "forward, cold", "forward+backward"


def index_of(results: Results, family: str, op: str | None = None) -> Index:
    """The rows of a family, or of one operator of it, that have a time. Names of cases are those of an operator."""
    timed = (
        r for r in results.rows if r["family"] == family and r["median_ms"] is not None and op in (None, r.get("op"))
    )
    return {(r["case"], r["dtype"], r["mode"], r["provider"]): r for r in timed}


def ratio(slow: Row | None, fast: Row | None) -> float | None:
    return None if slow is None or fast is None else slow["median_ms"] / fast["median_ms"]


def best_other(index: Index, case: str, dtype: str, mode: str) -> Row | None:
    others = [r for (c, d, m, p), r in index.items() if (c, d, m) == (case, dtype, mode) and p != "cofire"]
    return min(others, key=lambda r: float(r["median_ms"]), default=None)


def memory_share(ours: Row | None, other: Row | None) -> float | None:
    """Of what a call of the other holds at most; its outputs are a part of both."""
    return None if ours is None or other is None else ours["peak_bytes"] / max(other["peak_bytes"], 1)


def named(values: Iterable[tuple[str, float | None]]) -> Found:
    """Those that were measured."""
    return [(where, value) for where, value in values if value is not None]


def against(index: Index, provider: str, cases: Iterable[tuple[str, Key]]) -> Found:
    """How many times as fast as a provider, by case: ``cases`` gives each a name."""
    return named((where, ratio(index.get((*key, provider)), index.get((*key, "cofire")))) for where, key in cases)


def faster(provider: str, cases: Mapping[str, Key]) -> Find:
    """How many times as fast as a provider, in each of these cases."""
    return lambda index, _: against(index, provider, cases.items())


def beside(value: Callable[[Row | None, Row | None], float | None], provider: str, cases: Mapping[str, Key]) -> Find:
    """In each of these cases what a function makes of our row and a provider's."""

    def find(index: Index, _: Results) -> Found:
        rows = ((where, index.get((*key, "cofire")), index.get((*key, provider))) for where, key in cases.items())
        return named((where, value(ours, other)) for where, ours, other in rows)

    return find


@dataclass(frozen=True)
class Target:
    what: str
    least: float | None  #: None: nothing was aimed at, and the number stands beside one that has a target
    unit: str
    find: Find
    most: bool = False  #: the number is to stay below, not above

    def line(self, index: Index, results: Results) -> list[str]:
        """What, how much was asked, and what was found; bold where it was missed."""
        found = self.find(index, results)
        cells = []
        for where, value in found:
            text = f"{where}{': ' if where else ''}{value:.3g}{self.unit}"
            missed = self.least is not None and (value > self.least if self.most else value < self.least)
            cells.append(f"**{text}**" if missed else text)
        asked = "-" if self.least is None else f"{'at most' if self.most else 'at least'} {self.least:g}{self.unit}"
        return [self.what, asked, ", ".join(cells) or "-"]


def lines(targets: Sequence[Target], index: Index, results: Results) -> list[list[str]]:
    return [t.line(index, results) for t in targets]


def page(family: str, words: str, targets: Sequence[Target]) -> Callable[[Results, Draw], str]:
    """The words and the table of a family: a function of results, and of what draws a table. What was missed is bold."""

    def summary(results: Results, table: Draw) -> str:
        return f"{words}\n\n{table(HEADINGS, lines(targets, index_of(results, family), results))}"

    return summary
