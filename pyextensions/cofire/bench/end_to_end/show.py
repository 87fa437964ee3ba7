# SPDX-License-Identifier: Apache-2.0
"""Measured networks as a table, a plot and a page. Every row is shown, lost ones too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cofire.bench.end_to_end.network import DENSE, is_dense
from cofire.bench.end_to_end.results import Networks, Row, networks_files
from cofire.files import fill, write_atomically

__all__ = ["HEADINGS", "MARKERS", "plot", "summary", "table", "write_page"]

#: In ``networks.md``, if that page is there.
MARKERS = ("<!-- results: cofire bench-networks -->", "<!-- end of networks -->")
HEADINGS = (
    *("family", "network", "variant", "latency ms", "latency against dense", "throughput", "throughput against dense"),
    *("peak MiB", "weights MiB", "cache MiB", "accuracy", "notes"),
)
WIN, LOSS = "#2f81f7", "#e5534b"
TICKS = (0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
MOST_TICKS = 5  #: in a panel; of more every second is left out

Data = Networks | Mapping[str, Any]


def rows_of(data: Data) -> list[Row]:
    return data.rows if isinstance(data, Networks) else list(data["rows"])


# ---------------------------------------------------------------------------------------------------------- table


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text and abs(value) >= 1 else text


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else _number(value / 2**20)


def _ratio(row: Row, what: str) -> str:
    if row.get(what) is None:
        return "-"
    ends = [row[f"{what}_{end}"] for end in ("low", "high")]
    interval = "-" if None in ends else f"{ends[0]:.2f}, {ends[1]:.2f}"  # of too few pairs there is none
    text = f"{row[what]:.2f}x [{interval}]"
    return f"**{text}**" if row[what] < 1 else text


def _accuracy(row: Row, dense: Row | None) -> str:
    if row["accuracy"] is None:
        return "-"
    before = None if dense is None or dense is row else dense["accuracy"]
    change = "" if before is None else f" ({round(row['accuracy'] - before, 1) + 0.0:+.1f})"  # never -0.0
    return f"{row['accuracy']:.1f}{change}"


def _dense_of(rows: Sequence[Row], row: Row) -> Row | None:
    key = (row["family"], row["network"])
    return next((r for r in rows if (r["family"], r["network"]) == key and r["variant"] == DENSE), None)


def _notes(row: Row) -> str:
    notes = [row.get("note"), row.get("data") if row["variant"] == DENSE else None]
    if row["variant"] == DENSE:
        if row.get("accuracy_kind"):
            notes.append(f"accuracy: {row['accuracy_kind']}")
        if row.get("latency_of"):
            notes.append(f"latency of {row['latency_of']}, throughput at batch {row['batch']}")
    return "; ".join(note for note in notes if note)


def table(data: Data) -> tuple[tuple[str, ...], list[list[str]]]:
    """Headings, and a line of cells for each row of a file."""
    rows, lines = rows_of(data), []
    for row in rows:
        noisy = "~" if row["noisy"] else ""
        throughput = "-" if row["throughput"] is None else f"{noisy}{_number(row['throughput'])} {row['unit']}"
        lines.append(
            [
                row["family"],
                f"{row['network']}{' (random weights)' if row['accuracy_kind'] is None else ''}",
                row["variant"],
                noisy + _number(row["latency_ms"]) if row["correct"] else "no number",
                _ratio(row, "speedup"),
                throughput,
                _ratio(row, "throughput_gain"),
                _mebibytes(row["peak_bytes"]),
                _mebibytes(row["weight_bytes"]),
                _mebibytes(row.get("held_bytes")),
                _accuracy(row, _dense_of(rows, row)),
                _notes(row),
            ]
        )
    return HEADINGS, lines


def summary(data: Data) -> str:
    """For people: a line for each variant, losses included."""
    rows = rows_of(data)
    lines = []
    for family, network in dict.fromkeys((r["family"], r["network"]) for r in rows):
        lines.append(f"{family}, {network}")
        for row in (r for r in rows if (r["family"], r["network"]) == (family, network)):
            if not row["correct"]:
                lines.append(f"  {row['variant']}: no number: {row.get('note', '')}")
                continue
            parts = [f"{_number(row['latency_ms'])} ms", f"{_number(row['throughput'])} {row['unit']}"]
            for i, what in enumerate(("speedup", "throughput_gain")):  # the fastest dense form may be another in each
                if row.get(what) is not None:
                    parts[i] += f" ({row[what]:.2f}x)"
            parts.append(f"{_mebibytes(row['weight_bytes'])} MiB of weights")
            if row["accuracy"] is not None:
                parts.append(f"{_accuracy(row, _dense_of(rows, row))} {row['accuracy_kind']}")
            lines.append(f"  {'~' if row['noisy'] else ''}{row['variant']}: {', '.join(parts)}")
    noisy = sum(r["noisy"] for r in rows)
    return "\n".join([*lines, f"{noisy} of {len(rows)} rows are noisy"])


# ----------------------------------------------------------------------------------------------------------- plot


def plot(data: Data) -> str:
    """As SVG text: how many times as fast as the fastest dense form, in latency and in throughput; "" without such rows."""
    from cofire.bench.report.drawing import INK, _figure, _svg

    rows = rows_of(data)
    shown = [r for r in rows if not is_dense(r["variant"]) and r.get("speedup") and r.get("throughput_gain")]
    if not shown:
        return ""
    figure, panels = _figure(8, 0.8 + 0.2 * len(shown), 2)
    for panel, what, title in zip(panels, ("speedup", "throughput_gain"), ("latency, batch 1", "throughput, batch")):
        for y, row in enumerate(reversed(shown)):
            ratio = row[what]
            color, alpha = LOSS if ratio < 1 else WIN, 0.45 if row["noisy"] else 1
            panel.barh(y, ratio - 1, left=1, height=0.7, color=color, alpha=alpha)
            low, high = row[f"{what}_low"], row[f"{what}_high"]
            if low is not None and high is not None:
                panel.errorbar(ratio, y, xerr=[[ratio - low], [high - ratio]], color=INK, linewidth=0.6, capsize=1.5)
        panel.set_xscale("log", base=2)
        values = [r[what] for r in shown]
        ticks = [t for t in TICKS if min(*values, 1) / 2 <= t <= 2 * max(*values, 1)]
        if len(ticks) > MOST_TICKS:
            ticks = ticks[ticks.index(1) % 2 :: 2]
        panel.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        panel.minorticks_off()
        panel.axvline(1, color=INK, linewidth=0.8)
        panel.set_ylim(-0.7, len(shown) - 0.3)
        panel.set_title(title)
    panels[0].set_yticks(range(len(shown)), [_label(r, _dense_of(rows, r)) for r in reversed(shown)], fontsize=6)
    panels[1].set_yticks([])
    panels[0].set_xlabel("against the fastest dense form (red: slower; pale: noisy)")
    figure.tight_layout()
    return _svg(figure)


def _label(row: Row, dense: Row | None) -> str:
    """The network and what was done; with the change of the accuracy, where that is known."""
    label = f"{row['family']}: {row['network'].split(',')[0]}, {row['variant']}"
    if row["accuracy"] is None:
        return f"{label} (random weights)"
    return f"{label} ({_accuracy(row, dense).partition('(')[2] or ')'}"


# ----------------------------------------------------------------------------------------------------------- page


def write_page(folder: Path, files: Sequence[Path] | None = None) -> list[Path]:
    """Fill ``networks.md`` in a folder, if it is there and has the markers, and draw its plots.

    Args:
        folder: of the page.
        files: of measured networks; default: all that are here.

    Returns:
        The files written.
    """
    page = folder / "networks.md"
    if not page.exists() or MARKERS[0] not in page.read_text(encoding="utf-8"):
        return []
    from cofire.bench.report.rows import titles
    from cofire.bench.report.tables import NO_GPU
    from cofire.bench.results import Results

    parts, written = [], [page]
    paths = list(networks_files() if files is None else files)
    networks = [Networks.load(path) for path in paths]
    machines = titles([Results(found.environment, {}) for found in networks])
    for path, found, machine in zip(paths, networks, machines):
        parts += [f"### {machine}", _environment(found)]
        picture = plot(found)
        if picture:
            name = f"networks-{path.stem}.svg"
            written.append(write_atomically(folder / name, picture))
            parts.append(f"![how many times as fast as dense]({name})")
        parts.append(_markdown(*table(found)))
    if parts and all(found.environment["kind"] != "cuda" for found in networks):
        parts.append(NO_GPU)
    fill(page, MARKERS, "\n\n".join(parts) or "Not measured.")
    return written


def _environment(found: Networks) -> str:
    e = found.environment
    where = f"{e['device']}, {e['threads']} threads, {e['instruction_set']}" if e["kind"] == "cpu" else e["device"]
    commits = dict.fromkeys(f"commit {r['commit']}" for r in found.rows if r.get("commit"))
    rest = "; ".join([f"torch {e['torch']}", *commits, str(e["date"])])
    return f"{where}; {rest}{'; a quick run' if e['quick'] else ''}."


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, ["---"] * len(headings), *escaped])
