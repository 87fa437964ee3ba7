# SPDX-License-Identifier: Apache-2.0
"""From measurements to headings and lines, which pages draw as markdown or as HTML. A loss is bold."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

from cofire.bench.ceilings import bandwidth_of
from cofire.bench.floors import floor_words
from cofire.bench.report.rows import BOUNDS, Comparison, Measurement, Score, Standing, measurements, score
from cofire.bench.results import Results, Row

Table = tuple[Sequence[str], list[list[str]]]  #: headings and lines
#: How pages speak of a type, and of a mode.
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def digits(value: float | None, count: int = 3) -> str:
    if value is None:
        return "-"
    text = f"{value:.{count}g}"
    return f"{value:.0f}" if "e" in text and value >= 1 else text


def milliseconds(row: Row | None) -> str:
    """The time; ``~`` marks noise."""
    if row is None:
        return "-"
    return ("~" if row["noisy"] else "") + digits(row["median_ms"]) if row["correct"] else "no number"


def timed(row: Row | None) -> str:
    """The time, and beside it how much of the machine's ceiling that is."""
    share = None if row is None else row.get("percent_of_ceiling")
    return milliseconds(row) + (f" ({share:.0f} %)" if share is not None else "")


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{digits(ratio)}x" if ratio >= 100 else f"{ratio:.2f}x"


def bold(text: str, when: bool) -> str:
    return f"**{text}**" if when else text


def against(found: Comparison | None, interval: bool = True) -> str:
    if found is None:
        return "-"
    ends = f" [{found.low:.2f}, {found.high:.2f}]" if interval else ""
    return bold(f"{times(found.ratio)}{ends}", found.ratio < 1)


def _name(row: Row) -> str:
    name = str(row["provider"]).removeprefix("peer:")
    return f"{name}, {row['variant']}" if row.get("variant") else name


def _dense(m: Measurement) -> str:
    row = m.rows.get("dense")
    return timed(row) + (f" {row['variant']}" if row is not None and row.get("variant") else "")


def _best(m: Measurement) -> str:
    return f"{_name(m.rivals[0])} {timed(m.rivals[0])}" if m.rivals else "-"


def _others(m: Measurement) -> str:
    best = m.rivals[0]["provider"] if m.rivals else ""
    shown = [r for name, r in m.rows.items() if name not in ("cofire", "dense", best)]
    return ", ".join(f"{_name(r)}{' (bound)' if r['provider'] in BOUNDS else ''} {timed(r)}" for r in shown) or "-"


def _mebibytes(row: Row) -> str:
    return "-" if row["peak_bytes"] is None else digits(row["peak_bytes"] / 2**20)


def _peak(m: Measurement) -> str:
    if m.ours is None:
        return "-"
    return _mebibytes(m.ours) + (f" ({_mebibytes(m.dense)})" if m.dense is not None else "")


def _work(name: str) -> Callable[[Measurement], str]:
    return lambda m: digits(m.ours.get(name)) if m.ours is not None else "-"


def _notes(m: Measurement) -> str:
    return "; ".join(f"{name}: {row['note']}" for name, row in m.rows.items() if row.get("note"))


def _rounds(m: Measurement) -> str:
    counts = m.ours is not None and m.ours.get("rounds")
    return str(counts) if counts else "-"


def _share(m: Measurement) -> str:
    share = m.ours.get("percent_of_ceiling") if m.ours is not None else None
    return "-" if share is None else f"{share:.0f} %"


COLUMNS: dict[str, Callable[[Measurement], str]] = {
    "case": lambda m: m.case,
    "type": lambda m: SHORT.get(m.dtype, m.dtype),
    "mode": lambda m: m.mode,
    "cofire ms": lambda m: milliseconds(m.rows.get("cofire")),
    "rounds": _rounds,
    "of ceiling": _share,
    "against dense": lambda m: against(m.against_dense),
    "dense ms (of ceiling)": _dense,
    "against best peer": lambda m: against(m.against_peer, interval=False),
    "best peer ms (of ceiling)": _best,
    "others ms (of ceiling)": _others,
    "GFLOP/s": _work("gflops"),
    "GB/s": _work("gbs"),
    "peak MiB (dense)": _peak,
    "notes": _notes,
}


def cells(m: Measurement) -> list[str]:
    return [column(m) for column in COLUMNS.values()]


def verdict(m: Measurement) -> str:
    """Against the strongest plain torch; where there is none, against the best peer."""
    found = m.against_dense or m.against_peer
    return "" if found is None else found.verdict


def _counts(found: Score) -> list[str]:
    if not found.count:
        return ["-", "-"]
    parts = [f"{found.won} won", *([f"{found.tied} tied"] if found.tied else [])]
    return [", ".join([*parts, bold(f"{found.lost} lost", found.lost > 0)]), times(found.mean)]


SUMMARY = ("family", "machine", "against the strongest plain torch", "mean", "against the best peer", "mean")


def summary(standings: Sequence[Standing]) -> Table:
    lines = [[s.family, s.machine, *_counts(s.dense), *_counts(s.peer)] for s in standings]
    return SUMMARY, lines


MUST = "what any program must do (e: bytes of an element)"
OPERATORS = (
    *("operator", MUST, "slowest", "fastest", "against dense", "mean"),
    *("against best peer", "mean", "of ceiling"),
)


def operators(results: Results, family: str) -> Table:
    """A line for each operator of a family: its floor, its range, how often it won, and its median share of the ceiling."""
    taken = [m for m in measurements(results.rows) if m.family == family]
    lines = []
    for op in dict.fromkeys(m.op for m in taken):
        those = [m for m in taken if m.op == op]
        dense, peer = score(m.against_dense for m in those), score(m.against_peer for m in those)
        shares = sorted(
            m.ours["percent_of_ceiling"] for m in those if m.ours is not None and m.ours.get("percent_of_ceiling")
        )
        middle = f"{shares[len(shares) // 2]:.0f} %" if shares else "-"
        ends = [bold(times(r), r is not None and r < 1) for r in (dense.least, dense.most)]
        lines.append([op, floor_words(op), *ends, *_counts(dense), *_counts(peer), middle])
    return OPERATORS, lines


def environment(results: Results) -> str:
    """A sentence on where and with what. What a file does not say reads "not noted"."""
    e = collections.defaultdict(lambda: "not noted", results.environment)
    where = f"{e['device']}, {e['threads']} threads, {e['instruction_set']}" if e["kind"] == "cpu" else e["device"]
    kernels = f"cofire {e['cofire']} ({e['cofire_kernels']} kernels"
    kernels += f", commit {e['commit']})" if results.environment.get("commit") else ")"
    words = f"{where}; torch {e['torch']}, Python {e['python']}, {e['platform']}; {kernels}; {e['date']}"
    return words + ("; a quick run." if results.environment.get("quick") else ".")


def commits(results: Results, family: str) -> list[str]:
    """A line for rows that were not measured with the last run: the commits, and between which dates."""
    last = results.environment.get("commit")
    rows = [r for r in results.rows if r["family"] == family and r.get("commit", last) != last]
    found = list(dict.fromkeys(str(r["commit"]) for r in rows))
    if not found:
        return []
    dates = sorted(str(r.get("date", "?")) for r in rows)
    which = f"commit {found[0]}" if len(found) == 1 else f"{len(found)} commits"
    return [f"Measured earlier: {plural(len(rows), 'row')}, at {which}, {dates[0]} to {dates[-1]}."]


def peers(results: Results) -> list[str]:
    """A line that says which peers took part, where that was noted down."""
    found = results.environment.get("peers")
    if not found:
        return []
    there = ", ".join(f"{name} {version}" for name, version in found.items() if version) or "none"
    missing = ", ".join(name for name, version in found.items() if not version)
    return [f"Peers: {there}{f'; not installed: {missing}' if missing else ''}."]


def ceilings(results: Results) -> str:
    c = results.ceilings
    if not c.get("copy_gbs"):
        return "Ceilings: not measured."
    bands = ", ".join(f"{size} MiB {digits(bandwidth_of(c, size))}" for size in c["copy_gbs"])
    kinds = ("gemm", "conv")
    rates = [f"{kind} {d} {digits(rate)}" for kind in kinds for d, rate in c.get(f"{kind}_gflops", {}).items()]
    return f"Ceilings: bandwidth in GB/s by working set: {bands}; GFLOP/s: {', '.join(rates)}."


NO_GPU = "GPU: not measured."


def gpu_words(all_results: Sequence[Results], family: str | None = None) -> list[str]:
    """What to say where no GPU was measured, or none of a family was measured on one."""
    there = [r for r in all_results if r.environment["kind"] == "cuda"]
    found = any(family in (None, row["family"]) for r in there for row in r.rows)
    return [] if found else [NO_GPU]


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---"] * len(headings)
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, rule, *escaped])


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def headline(standings: Sequence[Standing], which: str = "dense") -> str:
    """The one sentence on all families."""
    found: list[Score] = [getattr(s, which) for s in standings]
    total: dict[str, Any] = {k: sum(getattr(f, k) for f in found) for k in ("won", "tied", "lost", "count")}
    other = "the strongest plain torch" if which == "dense" else "the best peer (another library, or torch.compile)"
    if not total["count"]:
        return f"Nothing was compared with {other}."
    return (
        f"Of {plural(total['count'], 'measurement')} against {other}, cofire won {total['won']}, tied {total['tied']} "
        f"and lost {total['lost']}."
    )
