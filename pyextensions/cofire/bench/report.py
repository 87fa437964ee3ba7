# SPDX-License-Identifier: Apache-2.0
"""From results files to tables (markdown), plots (SVG) and one page (HTML). Every row is shown, lost ones too."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cofire.bench import lowbit_summary, sparse_summary
from cofire.bench.growth import growth_plot
from cofire.bench.memory import memory_table
from cofire.bench.results import FOLDER, UNCOMPARED, Results, Row, geometric_mean
from cofire.files import fill, write_atomically

MARKERS = ("<!-- results: cofire report -->", "<!-- end of results -->")
MEASURED = ("<!-- measured -->", "<!-- end of measured -->")
#: In ``clustering.md``, if that page is there: what ``cofire bench-memory`` and ``cofire bench-growth`` measured.
MEMORY = ("<!-- results: cofire bench-memory -->", "<!-- end of memory -->")
GROWTH = ("<!-- results: cofire bench-growth -->", "<!-- end of growth -->")
#: What a family aims at, and what was found: in its own page ``<family>.md``, if that has the markers.
SUMMARIES = {"lowbit": lowbit_summary.summary, "sparse": sparse_summary.summary}
INTRODUCTION = """# Benchmarks

`cofire bench` measures, `cofire report` writes this page. Each answer is checked against an fp64 reference on the very
input that is timed; a wrong answer gets no number. *Dense* is the fastest of several ways to write the operation in
plain torch (memory layouts, packed weights, in-place expressions); the speed-up is the median ratio of paired readings,
with its 95 % interval. GFLOP/s and GB/s count what the masks leave to do, for all providers alike. The ceiling is the
larger of bytes / bandwidth and FLOPs / peak, both measured in the same run. Slower than dense is **bold**; `~` marks a
row during which the machine was busy or the readings spread. A peer that was not installed has no row.
"""
INK = "#010203"  #: a colour that no plot uses; becomes the colour of the text around the plot
WIN, LOSS, OTHER = "#2f81f7", "#e5534b", "#8b949e"

Key = tuple[str, str, str]  #: case, dtype, mode


# ---------------------------------------------------------------------------------------------------- tables


def _digits(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text and value >= 1 else text


def _ms(row: Row | None) -> str:
    if row is None:
        return "-"
    return ("~" if row["noisy"] else "") + _digits(row["median_ms"]) if row["correct"] else "no number"


def _speedup(row: Row | None) -> str:
    if row is None or row.get("speedup") is None:
        return "-"
    text = f"{row['speedup']:.2f}x [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
    return f"**{text}**" if row["speedup"] < 1 else text


def _groups(rows: Iterable[Row]) -> dict[Key, dict[str, Row]]:
    """The providers of each measurement."""
    groups: dict[Key, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["dtype"], row["mode"]), {})[row["provider"]] = row
    return groups


def _other_dtypes(groups: dict[Key, dict[str, Row]], key: Key) -> str:
    """The dense baseline in the other dtypes: a 16-bit type may be slower than fp32, or faster."""
    case, dtype, mode = key
    found = [
        f"{d}: {_ms(providers.get('dense'))}"
        for (c, d, m), providers in groups.items()
        if (c, m) == (case, mode) and d != dtype
    ]
    return ", ".join(found) or "-"


HEADINGS = (
    *(
        "case",
        "dtype",
        "mode",
        "cofire ms",
        "against dense",
        "dense ms",
        "dense in other dtypes",
        "eager ms",
        "compile ms",
    ),
    *("peers ms", "GFLOP/s", "GB/s", "% of ceiling", "peak MiB (dense)", "notes"),
)


def _cells(groups: dict[Key, dict[str, Row]], key: Key) -> list[str]:
    providers = groups[key]
    ours, dense = providers.get("cofire"), providers.get("dense")
    peers = [f"{name.removeprefix('peer:')} {_ms(row)}" for name, row in providers.items() if name.startswith("peer:")]
    timed = ours if ours is not None and ours["correct"] else None
    variant = f" ({dense['variant']})" if dense is not None and dense.get("variant") else ""
    peak = "-" if timed is None else _digits(timed["peak_bytes"] / 2**20)
    if timed is not None and dense is not None and dense["correct"]:
        peak += f" ({_digits(dense['peak_bytes'] / 2**20)})"
    notes = [f"{name}: {row['note']}" for name, row in providers.items() if row.get("note")]
    work = [_digits(timed.get(name)) if timed is not None else "-" for name in ("gflops", "gbs", "percent_of_ceiling")]
    return [
        *key,
        _ms(ours),
        _speedup(ours),
        _ms(dense) + variant,
        _other_dtypes(groups, key),
        _ms(providers.get("eager")),
        _ms(providers.get("compile")),
        ", ".join(peers) or "-",
        *work,
        peak,
        "; ".join(notes),
    ]


def _tables(results: Results) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Family, operator and the lines of its table."""
    for family, op in dict.fromkeys((r["family"], r["op"]) for r in results.rows):
        groups = _groups(r for r in results.rows if r["op"] == op)
        yield family, op, [_cells(groups, key) for key in groups]


def _environment(results: Results) -> str:
    e = results.environment
    where = f"{e['device']}, {e['threads']} threads, {e['instruction_set']}" if e["kind"] == "cpu" else e["device"]
    kernels = f"cofire {e['cofire']} ({e['cofire_kernels']} kernels"
    kernels += f", commit {e['commit']})" if e.get("commit") else ")"
    return f"{where}; torch {e['torch']}, Python {e['python']}, {e['platform']}; {kernels}; {e['date']}" + (
        "; a quick run" if e["quick"] else ""
    )


def _commits(results: Results, op: str) -> list[str]:
    """A line for rows that were not measured with the last run."""
    last = results.environment.get("commit")
    rows = [r for r in results.rows if r["op"] == op and r.get("commit", last) != last]
    found = dict.fromkeys(f"commit {r['commit']}, {r['date']}" for r in rows)
    return [f"Measured at {'; '.join(found)}."] if found else []


def _peers(results: Results) -> list[str]:
    """A line that says which peers took part, where that was noted down."""
    peers = results.environment.get("peers")
    if not peers:
        return []
    there = ", ".join(f"{name} {version}" for name, version in peers.items() if version) or "none"
    absent = ", ".join(name for name, version in peers.items() if not version)
    return [f"Peers: {there}{f'; not installed: {absent}' if absent else ''}."]


def _ceilings(results: Results) -> str:
    c = results.ceilings
    bands = ", ".join(f"{size} MiB {_digits(max(c['copy_gbs'][size], c['read_gbs'][size]))}" for size in c["copy_gbs"])
    rates = [f"{kind} {d} {_digits(rate)}" for kind in ("gemm", "conv") for d, rate in c[f"{kind}_gflops"].items()]
    return f"bandwidth in GB/s by working set: {bands}; GFLOP/s: {', '.join(rates)}"


def _overview(results: Results) -> list[tuple[str, float, float, float, int, int]]:
    """Operator; smallest, largest, mean speed-up; how many lost; how many there are. Overheads and first calls are not counted."""
    lines = []
    for op in dict.fromkeys(r["op"] for r in results.rows):
        ours = [r for r in results.rows if r["op"] == op and r["provider"] == "cofire" and r["mode"] not in UNCOMPARED]
        ratios = [r["speedup"] for r in ours if r.get("speedup")]
        if ratios:
            lost = sum(r < 1 for r in ratios)
            lines.append((op, min(ratios), max(ratios), geometric_mean(ratios), lost, len(ratios)))
    return lines


OVERVIEW = ("operator", "smallest", "largest", "geometric mean", "slower than dense")


def _overview_cells(results: Results) -> list[list[str]]:
    return [
        [op, f"{low:.2f}x", f"{high:.2f}x", f"{mean:.2f}x", f"{lost} of {n}"]
        for op, low, high, mean, lost, n in _overview(results)
    ]


def _markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---"] * len(headings)
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, rule, *escaped])


def measured(all_results: Sequence[Results]) -> str:
    """For the README: how each operator compares, losses included."""
    parts = []
    for results in all_results:
        e = results.environment
        where = f"{e['device']}, {e['threads']} threads, torch {e['torch']}" if e["kind"] == "cpu" else e["device"]
        parts += [
            f"Speed-up over the strongest plain torch ({where}):",
            _markdown_table(OVERVIEW, _overview_cells(results)),
        ]
    return "\n\n".join(parts)


def markdown(all_results: Sequence[Results], plots: dict[str, str]) -> str:
    """The tables of all devices; ``plots`` are file names by ``<device>-<family>-<kind>``."""
    parts = []
    for device, results in zip(_devices(all_results), all_results):
        parts += [
            f"## {results.environment['device']}",
            _environment(results) + ".",
            *_peers(results),
            "Ceilings: " + _ceilings(results) + ".",
        ]
        parts.append(_markdown_table(OVERVIEW, _overview_cells(results)))
        before = ""
        for family, op, lines in _tables(results):
            if family != before:
                parts.append(f"### {family}")
                parts += [f"![{text}]({plots[key]})" for key, text in _plot_keys(device, family) if key in plots]
            before = family
            parts += [f"#### {op}", *_commits(results, op), _markdown_table(HEADINGS, lines)]
    return "\n\n".join(parts) if parts else "Not measured."


# ----------------------------------------------------------------------------------------------------- plots


def _devices(all_results: Sequence[Results]) -> list[str]:
    """A name for each, for files; with the threads where a device was measured with several numbers of them."""
    slugs = [_slug(results) for results in all_results]
    threads = [f"-{results.environment['threads']}-threads" for results in all_results]
    return [f"{slug}{more}" if slugs.count(slug) > 1 else slug for slug, more in zip(slugs, threads)]


def _plot_keys(device: str, family: str) -> list[tuple[str, str]]:
    return [
        (f"{device}-{family}-speedup", f"{family}: speed-up over dense"),
        (f"{device}-{family}-roofline", f"{family}: share of the machine's ceilings"),
    ]


def _slug(results: Results) -> str:
    words = "".join(c if c.isalnum() else " " for c in results.environment["device"].lower()).split()
    return "-".join(words)


def _svg(figure: Any) -> str:
    """As SVG text whose ink is the colour of the surrounding text, in light and dark."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    style = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
    start = text.index(">") + 1
    return text[:start] + style + text[start:]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("report: plots need matplotlib; install cofire[report]") from error
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cofire", "font.size": 8})
    for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"):
        matplotlib.rcParams[name] = INK
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def speedup_plot(rows: Sequence[Row]) -> str | None:
    """One bar per measurement of cofire: to the right of 1 faster than dense, to the left slower."""
    shown = [r for r in rows if r["provider"] == "cofire" and r["mode"] not in UNCOMPARED and r.get("speedup")]
    if not shown:
        return None
    figure, (axes,) = _figure(7, 0.6 + 0.17 * len(shown))
    for y, row in enumerate(reversed(shown)):
        ratio = row["speedup"]
        error = [[ratio - row["speedup_low"]], [row["speedup_high"] - ratio]]
        axes.barh(y, ratio - 1, left=1, height=0.7, color=LOSS if ratio < 1 else WIN, alpha=0.45 if row["noisy"] else 1)
        axes.errorbar(ratio, y, xerr=error, color=INK, linewidth=0.6, capsize=1.5)
    labels = [
        f"{r['op']} {r['case']} {r['dtype']}{'' if r['mode'] == 'forward' else ', ' + r['mode']}"
        for r in reversed(shown)
    ]
    axes.set_yticks(range(len(shown)), labels, fontsize=6)
    axes.set_xscale("log", base=2)
    ticks = [t for t in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if _within(t, [r["speedup"] for r in shown])]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_xlabel("speed-up over the strongest plain torch, 95 % interval (red: slower; pale: noisy)")
    return _svg(figure)


def _within(tick: float, values: Sequence[float]) -> bool:
    return min(*values, 1) / 2 <= tick <= 2 * max(*values, 1)


def roofline_plot(results: Results, rows: Sequence[Row]) -> str | None:
    """Left: arithmetic against intensity. Right: bandwidth of the operators that do next to no arithmetic."""
    shown = [r for r in rows if r["median_ms"] and r["mode"] not in UNCOMPARED and r["provider"] in ("cofire", "dense")]
    panels = [[r for r in shown if r["flops"] and r["bytes"]], [r for r in shown if not r["flops"] and r["bytes"]]]
    used = [i for i in (0, 1) if panels[i]]
    if not used:
        return None
    figure, axes = _figure(3.6 * len(used), 3.2, len(used))
    for i, panel in zip(used, axes):
        (_arithmetic_panel if i == 0 else _bandwidth_panel)(panel, results.ceilings, panels[i])
        panel.set_xscale("log")
        panel.set_yscale("log")
        handles, labels = panel.get_legend_handles_labels()
        unique = dict(zip(labels, handles))
        panel.legend(unique.values(), unique.keys(), fontsize=5.5, frameon=False)
    figure.tight_layout()
    return _svg(figure)


def _points(panel: Any, rows: Sequence[Row], x: Any, y: str) -> None:
    for op in dict.fromkeys(r["op"] for r in rows):
        colour = panel.plot([], [])[0].get_color()
        for provider in ("dense", "cofire"):
            points = [(x(r), r[y]) for r in rows if r["op"] == op and r["provider"] == provider]
            if points:
                face = colour if provider == "cofire" else "none"
                panel.scatter(
                    *zip(*points), s=9, facecolors=face, edgecolors=colour, linewidths=0.6, label=f"{op} {provider}"
                )


def _arithmetic_panel(panel: Any, ceilings: dict[str, Any], rows: Sequence[Row]) -> None:
    _points(panel, rows, lambda r: r["flops"] / r["bytes"], "gflops")
    intensity = [r["flops"] / r["bytes"] for r in rows]
    ends = [min(intensity) / 2, max(intensity) * 2]
    xs = [ends[0] * (ends[1] / ends[0]) ** (i / 40) for i in range(41)]
    bands = [max(ceilings["copy_gbs"][s], ceilings["read_gbs"][s]) for s in ceilings["copy_gbs"]]
    for dtype, style in (("float32", "-"), ("bfloat16", ":")):
        peak = max(ceilings["gemm_gflops"][dtype], ceilings["conv_gflops"][dtype])
        panel.plot(
            xs, [min(peak, bands[-1] * x) for x in xs], style, color=INK, linewidth=0.8, label=f"{dtype}, from memory"
        )
    kinds = {"float32", "bfloat16", *(r.get("arithmetic", "float32") for r in rows)}
    rates = [t[k] for t in (ceilings["gemm_gflops"], ceilings["conv_gflops"]) for k in kinds if k in t]
    peak = max(rates)
    panel.plot(xs, [min(peak, max(bands) * x) for x in xs], color=OTHER, linewidth=0.8, label="from cache")
    panel.set_xlabel("FLOPs per byte")
    panel.set_ylabel("GFLOP/s")


def _bandwidth_panel(panel: Any, ceilings: dict[str, Any], rows: Sequence[Row]) -> None:
    _points(panel, rows, lambda r: r["bytes"] / 2**20, "gbs")
    for kind, style in (("copy", "-"), ("read", ":")):
        table = ceilings[f"{kind}_gbs"]
        panel.plot([float(s) for s in table], list(table.values()), style, color=INK, linewidth=0.8, label=kind)
    panel.set_xlabel("MiB moved")
    panel.set_ylabel("GB/s")


def plots(all_results: Sequence[Results]) -> dict[str, str]:
    """All plots as SVG text, by ``<device>-<family>-<kind>``."""
    found: dict[str, str] = {}
    for device, results in zip(_devices(all_results), all_results):
        for family in dict.fromkeys(r["family"] for r in results.rows):
            rows = [r for r in results.rows if r["family"] == family]
            (speedup, _), (roofline, _) = _plot_keys(device, family)
            for key, svg in ((speedup, speedup_plot(rows)), (roofline, roofline_plot(results, rows))):
                if svg is not None:
                    found[key] = svg
    return found


# ------------------------------------------------------------------------------------------------------ page

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1f2328; --soft: #f3f5f7; --line: #d0d7de; --loss: #c93c37 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --ink: #e6edf3; --soft: #161b22; --line: #30363d; --loss: #ff7b72 }
}
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  padding: 1rem; max-width: 75rem }
h1, h2, h3 { line-height: 1.2 } p { max-width: 46rem; overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin: .5rem 0 1.5rem }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: left; white-space: nowrap }
th { background: var(--soft) } td:first-child, th:first-child { position: sticky; left: 0; background: var(--soft) }
td:last-child { white-space: normal; min-width: 12rem } strong { color: var(--loss) }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600 } svg { max-width: 100%; height: auto }
"""


def _html_cell(text: str) -> str:
    if text.startswith("**"):
        return f"<strong>{html.escape(text.strip('*'))}</strong>"
    return html.escape(text)


def _html_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{_html_cell(c)}</td>" for c in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def page(all_results: Sequence[Results], drawn: dict[str, str]) -> str:
    """One file that needs no other: tables and plots, for a phone and for a desk, in light and dark."""
    parts = []
    for device, results in zip(_devices(all_results), all_results):
        parts.append(
            f"<h2>{html.escape(results.environment['device'])}</h2><p>{html.escape(_environment(results))}.</p>"
        )
        parts.append(_html_table(OVERVIEW, _overview_cells(results)))
        before = ""
        for family, op, lines in _tables(results):
            if family != before:
                parts.append(f"<h3>{html.escape(family)}</h3>")
                for key, text in _plot_keys(device, family):
                    if key in drawn:
                        parts.append(f"<details open><summary>{html.escape(text)}</summary>{drawn[key]}</details>")
            before = family
            table = _html_table(HEADINGS, lines)
            parts.append(
                f"<details><summary>{html.escape(op)}: all {len(lines)} measurements</summary>{table}</details>"
            )
        parts += [f"<p>{html.escape(line)}</p>" for line in _peers(results)]
        parts.append(f"<p>Ceilings: {html.escape(_ceilings(results))}.</p>")
    introduction = INTRODUCTION.split("\n\n", 1)[1].replace("`", "").replace("*", "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>cofire benchmarks</title>'
        f"<style>{STYLE}</style></head><body><h1>cofire benchmarks</h1><p>{html.escape(introduction)}</p>"
        + ("".join(parts) or "<p>Not measured.</p>")
        + "</body></html>\n"
    )


def summary_markers(family: str) -> tuple[str, str]:
    return f"<!-- results: cofire report, {family} -->", "<!-- end of results -->"


def family_tables(family: str, all_results: Sequence[Results]) -> str:
    """For the family's page: a section for each device that measured it."""
    parts = []
    for results in all_results:
        if any(r["family"] == family for r in results.rows):
            parts += [f"### {results.environment['device']}", _environment(results) + ".", *_peers(results)]
            parts.append(SUMMARIES[family](results, _markdown_table))
    return "\n\n".join(parts) or "Not measured."


def _summaries(folder: Path, all_results: Sequence[Results]) -> list[Path]:
    written = []
    for family in SUMMARIES:
        page, markers = folder / f"{family}.md", summary_markers(family)
        if page.exists() and markers[0] in page.read_text(encoding="utf-8"):
            fill(page, markers, family_tables(family, all_results))
            written.append(page)
    return written


def _clustering(folder: Path) -> list[Path]:
    """The parts of ``clustering.md`` that it has markers for, and the plots they show."""
    page, written = folder / "clustering.md", list[Path]()
    if not page.exists():
        return written
    words = page.read_text(encoding="utf-8")
    if MEMORY[0] in words:
        files = sorted((FOLDER / "memory").glob("*.json"))
        tables = [memory_table(json.loads(path.read_text(encoding="utf-8"))) for path in files]
        fill(page, MEMORY, "\n\n".join(tables) or "Not measured.")
        written.append(page)
    if GROWTH[0] in words:
        lines = []
        for path in sorted((FOLDER / "growth").glob("*.json")):
            results = Results.load(path)
            name = f"benchmarks-{_slug(results)}-clustering-growth.svg"
            written.append(write_atomically(folder / name, growth_plot(results)))
            lines += [f"![time by weights and by clusters]({name})", _environment(results) + "."]
        fill(page, GROWTH, "\n\n".join(lines) or "Not measured.")
        written.append(page)
    return list(dict.fromkeys(written))


def report(
    results_files: Iterable[str | Path], out_dir: str | Path = "docs", readme: str | Path | None = None
) -> list[Path]:
    """Draw any number of results files.

    Args:
        results_files: what :func:`cofire.bench.run` wrote, one file per device.
        out_dir: gets ``benchmarks.md`` (the part between its markers is replaced), ``benchmarks.html`` (self-contained)
            and the plots as SVG files. A ``clustering.md`` in it gets memory and growth, a ``lowbit.md`` its tables, where
            they have the markers.
        readme: a markdown file that gets the overview, between the markers ``<!-- measured -->``.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: a results file that does not exist. ValueError: one that is not a results file, or a
            ``benchmarks.md`` without markers. ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> report(["benchmarks/results/some-cpu.json"])  # doctest: +SKIP
        [PosixPath('docs/benchmarks.md'), ...]
    """
    all_results = [Results.load(path) for path in results_files]
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots(all_results)
    names = {key: f"benchmarks-{key}.svg" for key in drawn}
    tables = folder / "benchmarks.md"
    if not tables.exists():
        write_atomically(tables, "\n".join([INTRODUCTION, *MARKERS, ""]))
    fill(tables, MARKERS, f"\n{markdown(all_results, names)}\n")
    written = [tables, write_atomically(folder / "benchmarks.html", page(all_results, drawn))]
    if readme is not None:
        fill(Path(readme), MEASURED, measured(all_results))
        written.append(Path(readme))
    written += _clustering(folder) + _summaries(folder, all_results)
    return written + [write_atomically(folder / names[key], svg) for key, svg in drawn.items()]
