# SPDX-License-Identifier: Apache-2.0
"""How an experiment's results are shown: tables in the terminal and in markdown, and plots."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cofire.experiments.files import Results
from cofire.files import write_atomically

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  #: header and rows


@dataclass(frozen=True)
class Criterion:
    """One thing that the experiment has to show, what came out, and whether that is enough."""

    name: str
    found: str
    passed: bool | None  #: None: there is nothing to judge


def criteria_table(criteria: Iterable[Criterion]) -> Table:
    """What was demanded, what came out, and whether that is enough."""
    return ("criterion", "found", "met"), [[c.name, c.found, verdict(c)] for c in criteria]


def verdict(criterion: Criterion) -> str:
    return {True: "yes", False: "no", None: "not applicable"}[criterion.passed]


def markdown(conditions: str, tables: Iterable[Table]) -> str:
    """Conditions, and the tables."""
    lines = [conditions]
    for header, rows in tables:
        lines += ["", _markdown_row(header), _markdown_row("---" for _ in header), *map(_markdown_row, rows)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def update_page(page: Path, folder: Path, render: Callable[[Results], str]) -> bool:
    """Put the tables of results files between the markers of a markdown page; True if that changed it.

    ``<!-- results: NAME -->`` ... ``<!-- end of results -->`` holds what ``render`` makes of ``folder/NAME.json``.
    """
    pattern = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

    def fresh(found: re.Match[str]) -> str:
        results = json.loads((folder / f"{found[2]}.json").read_text(encoding="utf-8"))
        return f"{found[1]}\n{render(results)}\n{found[3]}"

    text = page.read_text(encoding="utf-8")
    new = pattern.sub(fresh, text)
    if new != text:
        write_atomically(page, new)
    return new != text


@dataclass(frozen=True)
class Series:
    """Points of a plot, drawn in matplotlib's ``style``."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str


def _figures() -> Any:
    """matplotlib's figures, if it is installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    return Figure


def plot(path: Path, xlabel: str, ylabel: str, series: Iterable[Series]) -> list[Path]:
    """Draw the series that have points as PNG; the files written, so none if matplotlib is missing."""
    make = _figures()
    if make is None:
        return []
    figure = make(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for one in series:
        if one.points:
            axes.plot(*zip(*sorted(one.points), strict=True), one.style, label=one.label, markersize=8)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return [path]


def progress_bar(console: Any) -> Any:
    """A bar with time taken and left; without a terminal it prints nothing."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not console.is_terminal:
        return nullcontext()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.description}"), console=console)


def print_tables(console: Any, conditions: str, tables: Iterable[Table]) -> None:
    """Conditions, and the tables."""
    from rich import box
    from rich import table as rich

    console.print(conditions, highlight=False)
    colours = {"yes": "[green]yes", "no": "[red]no"}
    for header, rows in tables:
        table = rich.Table(*header, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        table.columns[0].no_wrap = header[0] == "budget"
        for row in rows:
            table.add_row(*(colours.get(cell, cell) for cell in row))
        console.print(table)


def show(page: Any, file: Path, run: Callable[[Any], Results]) -> None:
    """Run an experiment with a bar, print its tables, and write table and plots beside the results.

    Args:
        page: the module that reports the experiment: ``conditions``, ``tables``, ``markdown`` and, where it draws, ``plots``;
            ``NO_PLOT``, why these results may give none.
        file: where the experiment writes its results.
        run: the experiment, of the progress bar.
    """
    from rich.console import Console

    console = Console()
    with progress_bar(console) as progress:
        results = run(progress)
    print_tables(console, page.conditions(results), page.tables(results))
    table = file.with_suffix(".md")
    write_atomically(table, page.markdown(results))
    plots = page.plots(results, file.parent) if hasattr(page, "plots") else ()
    for path in (file, table, *plots):
        console.print(f"written: {path}")
    if hasattr(page, "plots") and not plots:
        why = getattr(page, "NO_PLOT", "there is nothing to draw") if _figures() else "matplotlib is not installed"
        console.print(f"no plot: {why}")
