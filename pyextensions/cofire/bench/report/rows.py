# SPDX-License-Identifier: Apache-2.0
"""What the rows of a results file say: measurements, their rivals, and who won."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cofire.bench.results import UNCOMPARED, Results, Row, geometric_mean

#: Providers that do less than the operator does, so that they show what it could reach at best. No rivals.
BOUNDS = {
    "peer:library without scores": "attention that returns no scores",
    "peer:plain layer": "a layer without a mask",
    "peer:static-pruned": "the same channels for every sample",
}
TIE = 1.05  #: less than so many times apart is a tie
WON, TIED, LOST = "won", "tied", "lost"
VERDICTS = (WON, TIED, LOST)


@dataclass(frozen=True)
class Comparison:
    """How many times as fast as ``other`` (its row); an interval where readings were paired."""

    ratio: float
    low: float
    high: float
    other: Row

    @property
    def verdict(self) -> str:
        if self.low <= 1 <= self.high or 1 / TIE < self.ratio < TIE:
            return TIED
        return WON if self.ratio > 1 else LOST


@dataclass(frozen=True)
class Measurement:
    """One operator on one input in one mode, by all providers that have a row."""

    family: str
    op: str
    case: str
    dtype: str
    mode: str
    rows: dict[str, Row]

    @property
    def ours(self) -> Row | None:
        """Our row, if it has a time."""
        row = self.rows.get("cofire")
        return row if row is not None and row["median_ms"] else None

    @property
    def dense(self) -> Row | None:
        row = self.rows.get("dense")
        return row if row is not None and row["median_ms"] else None

    @property
    def compared(self) -> bool:
        return self.mode not in UNCOMPARED

    @property
    def rivals(self) -> list[Row]:
        """Other libraries and ``torch.compile``, the fastest first: what somebody could use instead."""
        timed = [r for name, r in self.rows.items() if is_rival(name) and r["median_ms"]]
        return sorted(timed, key=lambda r: float(r["median_ms"]))

    @property
    def against_dense(self) -> Comparison | None:
        """The median of paired ratios, with its 95 % interval."""
        ours, dense = self.ours, self.dense
        if ours is None or dense is None or not ours.get("speedup") or not self.compared:
            return None
        return Comparison(ours["speedup"], ours["speedup_low"], ours["speedup_high"], dense)

    @property
    def against_peer(self) -> Comparison | None:
        """Medians of the same rounds, without an interval: only the ratios to dense were kept pair by pair."""
        ours = self.ours
        if ours is None or not self.rivals or not self.compared:
            return None
        ratio = self.rivals[0]["median_ms"] / ours["median_ms"]
        return Comparison(ratio, ratio, ratio, self.rivals[0])


def is_rival(provider: str) -> bool:
    if provider == "compile":
        return True
    return provider.startswith("peer:") and not provider.startswith("peer:cofire") and provider not in BOUNDS


def measurements(rows: Iterable[Row]) -> list[Measurement]:
    """In the order of the file. Peers that were absent take no part."""
    found: dict[tuple[str, str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        key = (row["family"], row["op"], row["case"], row["dtype"], row["mode"])
        providers = found.setdefault(key, {})
        if not row.get("absent"):
            providers[row["provider"]] = row
    return [Measurement(*key, providers) for key, providers in found.items() if providers]


def absent(rows: Iterable[Row]) -> list[str]:
    """Which peers were not there, and why: one line each, not one per case."""
    count: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.get("absent"):
            key = (row["provider"].removeprefix("peer:"), str(row.get("note") or "no reason given"))
            count[key] = count.get(key, 0) + 1
    return [f"{name} ({note}; {n} measurement{'s' if n > 1 else ''})" for (name, note), n in count.items()]


@dataclass(frozen=True)
class Score:
    """How often won, tied and lost, and the geometric mean of the ratios."""

    won: int
    tied: int
    lost: int
    mean: float | None
    least: float | None
    most: float | None

    @property
    def count(self) -> int:
        return self.won + self.tied + self.lost


def score(comparisons: Iterable[Comparison | None]) -> Score:
    there = [c for c in comparisons if c is not None]
    verdicts = [c.verdict for c in there]
    ratios = [c.ratio for c in there]
    mean = geometric_mean(ratios) if ratios else None
    least, most = min(ratios, default=None), max(ratios, default=None)
    won, tied, lost = (verdicts.count(v) for v in VERDICTS)
    return Score(won, tied, lost, mean, least, most)


@dataclass(frozen=True)
class Standing:
    """One family on one machine."""

    family: str
    machine: str
    dense: Score
    peer: Score


def standings(all_results: Sequence[Results]) -> list[Standing]:
    """Families in the order of the alphabet, machines in the order of the files."""
    found = []
    for family in families(all_results):
        for machine, results in zip(titles(all_results), all_results):
            taken = [m for m in measurements(results.rows) if m.family == family]
            dense, peer = score(m.against_dense for m in taken), score(m.against_peer for m in taken)
            if dense.count or peer.count:
                found.append(Standing(family, machine, dense, peer))
    return found


def families(all_results: Sequence[Results]) -> list[str]:
    return sorted({r["family"] for results in all_results for r in results.rows})


def title(results: Results) -> str:
    return str(results.environment["device"])


def titles(all_results: Sequence[Results]) -> list[str]:
    """What to call each machine: its device; what else tells it from others of that name; a number if nothing does."""
    words = [title(results) for results in all_results]
    for more in (_threads, _instructions):
        twice = {w for w in words if words.count(w) > 1}
        several = {w: len({more(r) for r, x in zip(all_results, words) if x == w}) > 1 for w in twice}
        words = [f"{w}, {more(r)}" if several.get(w) else w for r, w in zip(all_results, words)]
    return [f"{w} ({words[: i + 1].count(w)})" if words.count(w) > 1 else w for i, w in enumerate(words)]


def _threads(results: Results) -> str:
    return f"{results.environment.get('threads')} threads"


def _instructions(results: Results) -> str:
    return str(results.environment.get("instruction_set"))


def names(all_results: Sequence[Results]) -> list[str]:
    """The same for files."""
    return ["-".join("".join(c if c.isalnum() else " " for c in w.lower()).split()) for w in titles(all_results)]
