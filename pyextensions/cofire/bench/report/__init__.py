# SPDX-License-Identifier: Apache-2.0
"""From results files to tables, pictures (SVG), markdown and one page (HTML). Every row is shown, lost ones too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cofire.bench import (
    clustering_summary,
    gating_summary,
    kv_fusion_summary,
    lowbit_summary,
    shift_add_summary,
    sparse_summary,
)
from cofire.bench.memory import load, memory_table
from cofire.bench.report import markdown, page, roster, tables
from cofire.bench.report.drawing import INK, _figure, _svg
from cofire.bench.report.extras import Extras, extras_in, files_in
from cofire.bench.report.plots import speedup_plot
from cofire.bench.report.rows import families, titles
from cofire.bench.results import FOLDER, Results
from cofire.files import fill, write_atomically

__all__ = ["INK", "_figure", "_svg", "family_tables", "report", "speedup_plot", "summary_markers"]

MARKERS = ("<!-- results: cofire report -->", "<!-- end of results -->")
MEASURED = ("<!-- measured -->", "<!-- end of measured -->")
#: In ``clustering.md``, if that page is there: what ``cofire bench-memory`` measured.
MEMORY = ("<!-- results: cofire bench-memory -->", "<!-- end of memory -->")
NETWORKS = "networks.md"  #: has its own words, table and pictures of whole networks
#: What a family aims at, and what was found: in its own page ``<family>.md``, if that has the markers.
SUMMARIES = {
    "clustering": clustering_summary.summary,
    "gating": gating_summary.summary,
    "kv_fusion": kv_fusion_summary.summary,
    "lowbit": lowbit_summary.summary,
    "shift_add": shift_add_summary.summary,
    "sparse": sparse_summary.summary,
}


def summary_markers(family: str) -> tuple[str, str]:
    return f"<!-- results: cofire report, {family} -->", "<!-- end of results -->"


def family_tables(family: str, all_results: Sequence[Results]) -> str:
    """For the family's page: a section for each device that measured it."""
    parts = []
    for machine, results in zip(titles(all_results), all_results):
        if any(r["family"] == family for r in results.rows):
            parts += [f"### {machine}", tables.environment(results), *tables.peers(results)]
            parts.append(SUMMARIES[family](results, tables.markdown_table))
    return "\n\n".join(parts) or "Not measured."


def _summaries(folder: Path, all_results: Sequence[Results]) -> list[Path]:
    written = []
    for family in SUMMARIES:
        path, markers = folder / f"{family}.md", summary_markers(family)
        if path.exists() and markers[0] in path.read_text(encoding="utf-8"):
            fill(path, markers, family_tables(family, all_results))
            written.append(path)
    return written


def _memory(folder: Path, results_folders: Sequence[Path]) -> list[Path]:
    """The part of ``clustering.md`` that it has markers for."""
    path = folder / "clustering.md"
    if not path.exists() or MEMORY[0] not in path.read_text(encoding="utf-8"):
        return []
    files = [file for f in results_folders for file in sorted((f / "memory").glob("*.json"))]
    found = [memory_table(load(file)) for file in files]
    fill(path, MEMORY, "\n\n".join(found) or "Not measured.")
    return [path]


def _networks(folder: Path, results_folders: Sequence[Path]) -> list[Path]:
    """``networks.md``, if it is there, and its pictures."""
    if not (folder / NETWORKS).exists():
        return []
    from cofire.bench import end_to_end  # with all networks and methods

    return end_to_end.write_page(folder, files_in(results_folders, "end_to_end"))


def _markdown(folder: Path, all_results: Sequence[Results], extras: Extras) -> list[Path]:
    """``benchmarks.md``, a page for each family, and the pictures in the folder ``benchmarks``."""
    drawn = markdown.pictures(all_results)
    index = folder / "benchmarks.md"
    if not index.exists():
        write_atomically(index, "\n".join([markdown.INTRODUCTION, *MARKERS, ""]))
    networks = NETWORKS if (folder / NETWORKS).exists() else None
    fill(index, MARKERS, f"\n{markdown.index(all_results, list(drawn), extras, networks)}\n")
    written = [index]
    for family in families(all_results):
        text = markdown.family(family, all_results, list(drawn))
        written.append(write_atomically(folder / markdown.family_page(family), text))
    shown = extras.growth if networks else extras.growth + extras.end_to_end
    pictures = {**drawn, **{name: svg for part in shown for name, svg in part.pictures.items()}}
    return written + [write_atomically(folder / markdown.FOLDER / name, svg) for name, svg in pictures.items()]


def report(
    results_files: Iterable[str | Path],
    out_dir: str | Path = "docs",
    readme: str | Path | None = None,
    compare: tuple[str | Path, str | Path] | None = None,
) -> list[Path]:
    """Draw any number of results files.

    Args:
        results_files: what :func:`cofire.bench.run` wrote, one file per device. What lies in ``growth``, ``end_to_end``,
            ``memory`` and ``agreement`` beside them is drawn too. Rows of cases, providers and variants that the suite no
            longer has are left out, and the pages say so.
        out_dir: gets ``benchmarks.md`` (the part between its markers is replaced), ``benchmarks-<family>.md``, the pictures
            as SVG files in ``benchmarks``, and ``benchmarks.html`` (self-contained). A ``clustering.md`` in it gets the
            table of memory, a ``networks.md`` that of whole networks, and a family's own page (``sparse.md``) what was aimed at
            and what was found, where they have the markers.
        readme: a markdown file that gets the summary, between the markers ``<!-- measured -->``.
        compare: two files of one machine, the older first. ``out_dir`` gets ``comparison.md`` and ``comparison.html``
            (which rows became faster or slower), and nothing else.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: a results file that does not exist. ValueError: one that is not a results file, or a page without
            markers.

    Example:
        >>> report(["benchmarks/results/some-cpu.json"])  # doctest: +SKIP
        [PosixPath('docs/benchmarks.md'), ...]
    """
    folder = Path(out_dir)
    if compare is not None:
        old, new = (Results.load(path) for path in compare)
        pages = {"comparison.md": markdown.comparison(old, new), "comparison.html": page.comparison(old, new)}
        return [write_atomically(folder / name, text) for name, text in pages.items()]
    files = [Path(path) for path in results_files]
    all_results = [roster.current(Results.load(path)) for path in files]
    folders = list(dict.fromkeys(path.parent for path in files)) or [FOLDER]
    extras = extras_in(folders)
    written = _markdown(folder, all_results, extras) + _networks(folder, folders)
    written.append(write_atomically(folder / "benchmarks.html", page.page(all_results, extras)))
    if readme is not None:
        fill(Path(readme), MEASURED, markdown.measured(all_results))
        written.append(Path(readme))
    return written + _memory(folder, folders) + _summaries(folder, all_results)
