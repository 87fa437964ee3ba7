# SPDX-License-Identifier: Apache-2.0
"""What else was measured, in folders beside the results: the growth of cost, whole networks, whether two runs agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cofire.bench.agreement import MACHINE, load, sentence
from cofire.bench.report import tables
from cofire.bench.report.rows import titles
from cofire.bench.results import Results

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


@dataclass
class Part:
    """One file: the machine, where and with what, its table, and its pictures by file name."""

    title: str
    environment: str
    table: Table
    pictures: dict[str, str]
    gpu: bool = False  #: whether it was measured on one


@dataclass
class Extras:
    """What the folders ``growth``, ``end_to_end`` and ``agreement`` beside the results hold."""

    growth: list[Part] = field(default_factory=list)
    end_to_end: list[Part] = field(default_factory=list)
    agreements: list[dict[str, Any]] = field(default_factory=list)

    def agreement(self, results: Results) -> str:
        """Whether two runs of the machine of these results agree, as far as a file says."""
        machine = [results.environment.get(name) for name in MACHINE]
        found = [a for a in self.agreements if [a["environment"][name] for name in MACHINE] == machine]
        return " ".join(map(sentence, found)) or "Whether two runs agree: not shown."


def files_in(folders: Iterable[Path], kind: str) -> list[Path]:
    """Quick runs are left out."""
    found = [path for folder in folders for path in sorted((folder / kind).glob("*.json"))]
    return [path for path in found if not path.stem.endswith("-quick")]


def extras_in(folders: Sequence[Path]) -> Extras:
    """Read and draw what is there."""
    growth, networks = files_in(folders, "growth"), files_in(folders, "end_to_end")
    return Extras(_growth(growth), _end_to_end(networks), list(map(load, files_in(folders, "agreement"))))


def _growth(paths: Sequence[Path]) -> list[Part]:
    from cofire.bench import growth  # with all methods

    found = []
    all_results = [growth.load(path) for path in paths]
    for path, machine, results in zip(paths, titles(all_results), all_results):
        drawn = {f"{path.stem}-growth-{_slug(name)}.svg": svg for name, svg in growth.growth_plots(results).items()}
        found.append(_part(machine, results, growth.growth_table(results), drawn))
    return found


def _end_to_end(paths: Sequence[Path]) -> list[Part]:
    from cofire.bench import end_to_end  # with all networks and methods

    found = []
    all_networks = [end_to_end.Networks.load(path) for path in paths]
    all_results = [Results(networks.environment, {}) for networks in all_networks]
    for path, networks, machine, results in zip(paths, all_networks, titles(all_results), all_results):
        svg = end_to_end.plot(networks)
        drawn = {f"{path.stem}-networks.svg": svg} if svg else {}
        found.append(_part(machine, results, end_to_end.table(networks), drawn))
    return found


def _part(machine: str, results: Results, table: Table, drawn: dict[str, str]) -> Part:
    return Part(machine, tables.environment(results), table, drawn, results.environment["kind"] == "cuda")


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
