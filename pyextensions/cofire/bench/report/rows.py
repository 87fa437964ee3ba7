# SPDX-License-Identifier: Apache-2.0
"""What the rows of a results file say: measurements, their rivals, and who won."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cofire.bench.results import UNCOMPARED, Results, Row, flagged, geometric_mean, second_cache

OURS, PLAIN, LIBRARY, TORCH = "our own code", "plain torch", "library", "other torch"
BOUND, OTHER, PART = "bound", "another function", "part of dense"
RIVALS = (LIBRARY, TORCH)  #: what somebody could use instead of the operator, and of the strongest plain torch
#: torch.compile, and kernels of torch's own that are no form of the plain operation: packed, quantised, sparse, attention.
OTHER_TORCH = (
    *("compile", "peer:torch csr", "peer:torch bsr", "peer:torch sampled_addmm", "peer:torch learnable"),
    *("peer:torch-dynamic", "peer:torch-int4pack", "peer:torch-int8pack"),
    *("peer:torch sdpa", "peer:torch 2:4", "peer:torch fp8"),
)
LIBRARIES = ("peer:numpy",)  #: that stand in a family's own file; those of ``cofire.bench.peers`` need not be named
#: No rivals, and why. A bound does less than the operator, so that it shows what that could reach at best.
NO_RIVALS = {
    "peer:library without scores": (BOUND, "attention that returns no scores"),
    "peer:plain layer": (BOUND, "a layer without a mask"),
    "peer:static-pruned": (BOUND, "the same channels for every sample"),
    "peer:gather-out": (BOUND, "the channels of each sample were listed before time counts"),
    "peer:gather-in-out": (BOUND, "the channels of each sample were listed before time counts"),
    "peer:grouped": (BOUND, "the channels of each sample were listed before time counts"),
    "peer:torch sdpa (softmax, another function)": (OTHER, "softmax attention instead of linear attention"),
    "peer:dequantize-then-dense": (OURS, "the weight is decoded by our own operator"),
    "peer:dense fp32": (PART, "the forms in fp32, of those that dense is the fastest of"),
}
TIE = 1.05  #: less than so many times apart is a tie
LEAST_PAIRS = 6  #: of fewer readings no two bound the median with 95 %: the smallest and the largest of 5 do with 94
WON, TIED, LOST = "won", "tied", "lost"
VERDICTS = (WON, TIED, LOST)


def kind_of(provider: str) -> str:
    """What a provider is: only :data:`RIVALS` are counted against."""
    if provider in NO_RIVALS:
        return NO_RIVALS[provider][0]
    if provider == "cofire" or provider.startswith("peer:cofire"):
        return OURS
    if provider in OTHER_TORCH:
        return TORCH
    return LIBRARY if provider.startswith("peer:") else PLAIN


@dataclass(frozen=True)
class Comparison:
    """How many times as fast as ``other`` (its row); the range of readings where they were paired."""

    ratio: float
    low: float
    high: float
    other: Row
    pairs: int | None = None  #: of readings; None where a file does not say
    quiet: bool = True  #: the probe ran as usual during both

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the median ratio, if there were enough pairs for one."""
        enough = self.pairs is None or self.pairs >= LEAST_PAIRS
        return (self.low, self.high) if enough else None

    @property
    def verdict(self) -> str:
        """A tie where the interval, or with few pairs their whole range, holds 1, or the ratio is next to it."""
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

    def rival(self, kind: str) -> Row | None:
        """The fastest of :data:`LIBRARY`, or of :data:`TORCH`."""
        timed = [r for name, r in self.rows.items() if kind_of(name) == kind and r["median_ms"]]
        return min(timed, key=lambda r: float(r["median_ms"]), default=None)

    @property
    def against_dense(self) -> Comparison | None:
        """The median of paired ratios, with its 95 % interval."""
        ours, dense = self.ours, self.dense
        if ours is None or dense is None or not ours.get("speedup") or not self.compared:
            return None
        ends = ours["speedup_low"], ours["speedup_high"]
        return Comparison(ours["speedup"], *ends, dense, _pairs(ours, dense), _quiet(ours, dense))

    def against(self, kind: str) -> Comparison | None:
        """The median of paired ratios where one was kept, or the ratio of medians; without an interval."""
        ours, other = self.ours, self.rival(kind)
        if ours is None or other is None or not self.compared:
            return None
        # of another run it was taken beside an earlier row of ours
        together = "run" not in ours or ours["run"] == other.get("run")
        paired = other.get("vs_cofire") if together else None
        ratio = paired or other["median_ms"] / ours["median_ms"]
        return Comparison(ratio, ratio, ratio, other, quiet=_quiet(ours, other))


def _quiet(ours: Row, other: Row) -> bool:
    return not flagged(ours) and not flagged(other)


def _pairs(ours: Row, dense: Row) -> int | None:
    """How many ratios the median is of; a file of an earlier cofire tells how many there are at most."""
    rounds = [r["rounds"] for r in (ours, dense) if r.get("rounds")]
    most = min(rounds) if len(rounds) == 2 else None
    found: int | None = ours.get("pairs", most)
    return found


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
    quiet: Score | None = None  #: of the undisturbed ones alone

    @property
    def count(self) -> int:
        return self.won + self.tied + self.lost


def score(comparisons: Iterable[Comparison | None]) -> Score:
    """Of those that there are, and of the undisturbed ones among them."""
    there = [c for c in comparisons if c is not None]
    return replace(_score(there), quiet=_score([c for c in there if c.quiet]))


def _score(there: Sequence[Comparison]) -> Score:
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
    library: Score
    torch: Score


def standings(all_results: Sequence[Results]) -> list[Standing]:
    """Families in the order of the alphabet, machines in the order of the files."""
    found = []
    for family in families(all_results):
        for machine, results in zip(titles(all_results), all_results):
            taken = [m for m in measurements(results.rows) if m.family == family]
            scores = scores_of(taken)
            if any(s.count for s in scores):
                found.append(Standing(family, machine, *scores))
    return found


def scores_of(taken: Sequence[Measurement]) -> tuple[Score, Score, Score]:
    """Against the strongest plain torch, the best library, and the best of torch's other ways."""
    library, torch = (score(m.against(kind) for m in taken) for kind in RIVALS)
    return score(m.against_dense for m in taken), library, torch


def families(all_results: Sequence[Results]) -> list[str]:
    return sorted({r["family"] for results in all_results for r in results.rows})


def title(results: Results) -> str:
    return str(results.environment["device"])


def titles(all_results: Sequence[Results]) -> list[str]:
    """What to call each machine: its device; what else tells it from others of that name; a number if nothing does."""
    words = [title(results) for results in all_results]
    for more in (_threads, _instructions, _second_cache):
        twice = {w for w in words if words.count(w) > 1}
        several = {w: len({more(r) for r, x in zip(all_results, words) if x == w}) > 1 for w in twice}
        words = [f"{w}, {more(r)}" if several.get(w) else w for r, w in zip(all_results, words)]
    return [f"{w} ({words[: i + 1].count(w)})" if words.count(w) > 1 else w for i, w in enumerate(words)]


def _threads(results: Results) -> str:
    return f"{results.environment.get('threads')} threads"


def _instructions(results: Results) -> str:
    return str(results.environment.get("instruction_set"))


def _second_cache(results: Results) -> str:
    return f"L2 {second_cache(results.environment)}"


def names(all_results: Sequence[Results]) -> list[str]:
    """The same for files."""
    return ["-".join("".join(c if c.isalnum() else " " for c in w.lower()).split()) for w in titles(all_results)]
