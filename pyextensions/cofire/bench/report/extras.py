# SPDX-License-Identifier: Apache-2.0
"""What else was measured, in folders beside the results: the growth of cost, and whole networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cofire.bench.report import tables
from cofire.bench.report.rows import title
from cofire.bench.results import Results

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


@dataclass
class Part:
    """One file: the machine, where and with what, its table, and its pictures by file name."""

    title: str
    environment: str
    table: Table
    pictures: dict[str, str]


@dataclass
class Extras:
    """What the folders ``growth`` and ``end_to_end`` beside the results hold."""

    growth: list[Part] = field(default_factory=list)
    end_to_end: list[Part] = field(default_factory=list)


def files_in(folders: Iterable[Path], kind: str) -> list[Path]:
    """Quick runs are left out."""
    found = [path for folder in folders for path in sorted((folder / kind).glob("*.json"))]
    return [path for path in found if not path.stem.endswith("-quick")]


def extras_in(folders: Sequence[Path]) -> Extras:
    """Read and draw what is there."""
    growth, networks = files_in(folders, "growth"), files_in(folders, "end_to_end")
    return Extras([_growth(path) for path in growth], [_end_to_end(path) for path in networks])


def _growth(path: Path) -> Part:
    from cofire.bench import growth  # with all methods

    results = Results.load(path)
    drawn = {f"{path.stem}-growth-{_slug(name)}.svg": svg for name, svg in growth.growth_plots(results).items()}
    return Part(title(results), tables.environment(results), growth.growth_table(results), drawn)


def _end_to_end(path: Path) -> Part:
    from cofire.bench import end_to_end  # with all networks and methods

    data = end_to_end.Networks.load(path).to_json()
    results = Results(data["environment"], {}, [])
    svg = end_to_end.plot(data)
    drawn = {f"{path.stem}-networks.svg": svg} if svg else {}
    return Part(title(results), tables.environment(results), end_to_end.table(data), drawn)


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
