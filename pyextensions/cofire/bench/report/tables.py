# SPDX-License-Identifier: Apache-2.0
"""From measurements to headings and lines, which pages draw as markdown or as HTML. A loss is bold."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

from cofire.bench.ceilings import bandwidth_of
from cofire.bench.floors import floor_words
from cofire.bench.report.rows import (
    BOUND,
    LIBRARY,
    OTHER,
    OURS,
    PART,
    RIVALS,
    TORCH,
    Comparison,
    Measurement,
    Score,
    Standing,
    kind_of,
    measurements,
    scores_of,
)
from cofire.bench.results import Results, Row

Table = tuple[Sequence[str], list[list[str]]]  #: headings and lines
CHANGES = "+changes"  #: how the commit ends of code that is in none
MOST_NAMED = 5  #: of what is left out
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
    ends = found.interval if interval else None
    words = f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends is not None else ""
    return bold(f"{times(found.ratio)}{words}", found.ratio < 1)


def _name(row: Row) -> str:
    name = str(row["provider"]).removeprefix("peer:")
    return f"{name}, {row['variant']}" if row.get("variant") else name


def _dense(m: Measurement) -> str:
    row = m.rows.get("dense")
    return timed(row) + (f" {row['variant']}" if row is not None and row.get("variant") else "")


def _best(kind: str) -> Callable[[Measurement], str]:
    def cell(m: Measurement) -> str:
        row = m.rival(kind)
        return f"{_name(row)} {timed(row)}" if row is not None else "-"

    return cell


def _others(m: Measurement) -> str:
    best = [row["provider"] for kind in RIVALS if (row := m.rival(kind)) is not None]
    shown = [r for name, r in m.rows.items() if name not in ("cofire", "dense", *best)]
    return ", ".join(f"{_name(r)}{_role(r)} {timed(r)}" for r in shown) or "-"


def _role(row: Row) -> str:
    """Why it is no rival, where its name does not say so."""
    kind, name = kind_of(row["provider"]), str(row["provider"])
    said = kind in name or name.startswith("peer:cofire")
    return f" ({kind})" if kind in (BOUND, OTHER, OURS, PART) and not said else ""


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


def _pairs(m: Measurement) -> str:
    found = m.against_dense
    return "-" if found is None or found.pairs is None else str(found.pairs)


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
    "pairs": _pairs,
    "dense ms (of ceiling)": _dense,
    "against best library": lambda m: against(m.against(LIBRARY), interval=False),
    "best library ms (of ceiling)": _best(LIBRARY),
    "against other torch": lambda m: against(m.against(TORCH), interval=False),
    "best other torch ms (of ceiling)": _best(TORCH),
    "others ms (of ceiling)": _others,
    "GFLOP/s": _work("gflops"),
    "GB/s": _work("gbs"),
    "peak MiB (dense)": _peak,
    "notes": _notes,
}


def cells(m: Measurement) -> list[str]:
    return [column(m) for column in COLUMNS.values()]


def verdict(m: Measurement) -> str:
    """Against the strongest plain torch; where there is none, against the best library, or torch's other ways."""
    found = m.against_dense or m.against(LIBRARY) or m.against(TORCH)
    return "" if found is None else found.verdict


def _won(found: Score) -> str:
    parts = [f"{found.won} won", *([f"{found.tied} tied"] if found.tied else [])]
    return ", ".join([*parts, bold(f"{found.lost} lost", found.lost > 0)])


def _counts(found: Score) -> str:
    return f"{_won(found)} ({times(found.mean)})" if found.count else "-"


def _undisturbed(found: Score) -> str:
    """How many of them the probe saw nothing beside, and how often those were won."""
    if not found.count or found.quiet is None:
        return "-"
    return f"{found.quiet.count} of {found.count}" + (f": {_won(found.quiet)}" if found.quiet.count else "")


SUMMARY = (
    *("family", "machine", "against the strongest plain torch (mean)", "undisturbed"),
    *("against other libraries (mean)", "undisturbed", "against other torch (mean)", "undisturbed"),
)


def summary(standings: Sequence[Standing]) -> Table:
    """A line for each family and machine."""
    scores = [(s, (s.dense, s.library, s.torch)) for s in standings]
    return SUMMARY, [
        [s.family, s.machine, *(f(x) for x in found for f in (_counts, _undisturbed))] for s, found in scores
    ]


def short_summary(standings: Sequence[Standing]) -> Table:
    """The same, without what was undisturbed of the comparisons with rivals."""
    headings, lines = summary(standings)
    kept = [i for i in range(len(headings)) if i < 4 or headings[i] != headings[3]]
    return [headings[i] for i in kept], [[line[i] for i in kept] for line in lines]


MUST = "what any program must do (e: bytes of an element)"
OPERATORS = (
    *("operator", MUST, "slowest", "fastest", "against dense (mean)", "undisturbed"),
    *("against best library (mean)", "against other torch (mean)", "of ceiling"),
)


def operators(results: Results, family: str) -> Table:
    """A line for each operator of a family: its floor, its range, how often it won, and its median share of the ceiling."""
    taken = [m for m in measurements(results.rows) if m.family == family]
    lines = []
    for op in dict.fromkeys(m.op for m in taken):
        those = [m for m in taken if m.op == op]
        dense, library, torch = scores_of(those)
        shares = sorted(
            m.ours["percent_of_ceiling"] for m in those if m.ours is not None and m.ours.get("percent_of_ceiling")
        )
        middle = f"{shares[len(shares) // 2]:.0f} %" if shares else "-"
        ends = [bold(times(r), r is not None and r < 1) for r in (dense.least, dense.most)]
        counts = [_counts(dense), _undisturbed(dense), _counts(library), _counts(torch)]
        lines.append([op, floor_words(op), *ends, *counts, middle])
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


def caveats(results: Results, family: str | None = None) -> list[str]:
    """Lines for rows that nobody can repeat from a commit alone, and for those that are not shown; of all families or one."""
    shown, old = ([r for r in rows if family in (None, r["family"])] for rows in (results.rows, results.left_out))
    changed = [str(r["commit"]) for r in shown if str(r.get("commit")).endswith(CHANGES)]
    found = []
    if changed:
        commits = ", ".join(sorted({c.removesuffix(CHANGES) for c in changed}))
        found.append(f"Measured with changes that are in no commit: {plural(len(changed), 'row')}, after {commits}.")
    if old:
        cases = list(dict.fromkeys(f"{r['op']}, {r['case']}, {r['dtype']}, {r['mode']}" for r in old))
        some = "; ".join(cases[:MOST_NAMED]) + ("; ..." if len(cases) > MOST_NAMED else "")
        words = f"{plural(len(old), 'row')} of cases, providers or variants that the suite no longer has"
        found.append(f"Left out: {words}{'' if family is None else f' ({some})'}.")
    return found


def peers(results: Results) -> list[str]:
    """A line that says which peers took part, where that was noted down."""
    found = results.environment.get("peers")
    if not found:
        return []
    there = ", ".join(f"{name} {version}" for name, version in found.items() if version) or "none"
    missing = ", ".join(name for name, version in found.items() if not version)
    return [f"Peers: {there}{f'; not installed: {missing}' if missing else ''}."]


RUNS = ("run", "begun", "commit", "rows", "measured with")


def runs(results: Results) -> Table:
    """A line for each run that noted down what it measured with; rows of earlier ones in the last line."""
    noted: dict[str, dict[str, Any]] = results.environment.get("runs", {})
    count = collections.Counter(r.get("run") for r in results.rows)
    lines = []
    for run, facts in noted.items():
        if count[run]:
            kept = [
                f"{name} {_fact(value)}" for name, value in facts.items() if name not in ("date", "commit") and value
            ]
            where = [run, str(facts.get("date")), str(facts.get("commit")), str(count[run])]
            lines.append([*where, "; ".join(kept)])
    rest = sum(n for run, n in count.items() if run not in noted)
    return RUNS, [*lines, ["earlier ones", "-", "-", str(rest), "not noted"]] if lines and rest else lines


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {x}" for name, x in value.items() if x is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


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


#: What the strongest plain torch, and the rivals, are called in a sentence.
AGAINST = {
    "dense": "the strongest plain torch",
    "library": "the best of other libraries",
    "torch": "torch.compile and torch's packed, quantised and sparse kernels",
}


def headline(standings: Sequence[Standing], which: str = "dense") -> str:
    """The one sentence on all families, and one on what was undisturbed."""
    found: list[Score] = [getattr(s, which) for s in standings]
    total, quiet = _total(found), _total([s.quiet for s in found if s.quiet is not None])
    count, other = sum(total), AGAINST[which]
    if not count:
        return f"Nothing was compared with {other}."
    won, tied, lost = total
    words = f"Of {plural(count, 'measurement')} against {other}, cofire won {won}, tied {tied} and lost {lost}"
    if not sum(quiet):
        return f"{words}; 0 of {count} were undisturbed."
    return f"{words}; {sum(quiet)} of {count} were undisturbed: won {quiet[0]}, tied {quiet[1]}, lost {quiet[2]}."


def headlines(standings: Sequence[Standing]) -> list[str]:
    return [headline(standings, which) for which in AGAINST]


def _total(scores: Sequence[Score]) -> tuple[int, int, int]:
    return sum(s.won for s in scores), sum(s.tied for s in scores), sum(s.lost for s in scores)
