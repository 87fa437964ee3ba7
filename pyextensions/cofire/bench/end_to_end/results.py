# SPDX-License-Identifier: Apache-2.0
"""The file of the measured networks: what it holds, where it lies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cofire.bench.results import FOLDER, Results, parts_of, read_json, results_path
from cofire.files import write_atomically

__all__ = ["COLUMNS", "NUMBERS", "Networks", "networks_files", "networks_path"]

COMMAND = "cofire bench-networks"
Row = dict[str, Any]
KEY = ("family", "network", "variant")  #: what makes a row that row
NUMBERS = ("latency_ms", "latency_p20_ms", "latency_p80_ms", "throughput", "peak_bytes", "accuracy")
COLUMNS = (*KEY, *NUMBERS, "unit", "weight_bytes", "accuracy_kind", "noisy", "seconds", "correct")
#: What every reader of a file looks up in its environment.
ENVIRONMENT = ("device", "kind", "threads", "torch", "instruction_set", "commit", "quick", "date")
PARTS: dict[str, type] = {"environment": dict, "ceilings": dict, "rows": list}


@dataclass
class Networks:
    """Rows measured under one environment; ``ceilings`` is empty: a network has none."""

    environment: dict[str, Any]
    ceilings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    #: which networks raised an error in this run, and which; is not written
    refused: list[str] = field(default_factory=list, compare=False)

    def add(self, rows: list[Row]) -> None:
        """Put rows in, in place of all older ones of the same networks."""
        fresh = {(r["family"], r["network"]) for r in rows}
        self.rows = [r for r in self.rows if (r["family"], r["network"]) not in fresh] + rows

    def has(self, family: str, network: str) -> bool:
        """Whether this commit measured the network, and came to its end."""
        found = [r for r in self.rows if (r["family"], r["network"]) == (family, network)]
        return bool(found) and all(r.get("commit") == self.environment["commit"] for r in found)

    def same_environment(self, other: dict[str, Any]) -> bool:
        """Whether rows measured there may stand beside these: all but cofire itself is the same."""
        return Results(self.environment, {}).same_environment(other)

    def to_json(self) -> dict[str, Any]:
        return {"environment": self.environment, "ceilings": self.ceilings, "rows": self.rows}

    def save(self, path: str | Path) -> Path:
        """Write under a temporary name, then rename: a reader sees the old file or the new one.

        Raises:
            ValueError: a row lacks a column, has numbers although its answer was wrong, or one that is none.
        """
        for row in self.rows:
            _check_row(row)
        return write_atomically(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Networks:
        """Read a file of measured networks.

        Raises:
            FileNotFoundError: there is none. ValueError: it is cut off, another kind of file, or of another cofire.
        """
        data = parts_of(read_json(path, COMMAND), PARTS, path, COMMAND)
        for row in data["rows"]:
            try:
                _check_row(row)
            except ValueError as error:
                raise ValueError(f"{error} (in {path})") from None
        lacking = [name for name in ENVIRONMENT if name not in data["environment"]]
        if lacking:
            raise ValueError(
                f"bench-networks: {path} was written by an older cofire or by another program: its environment lacks "
                f"{', '.join(lacking)}; measure again with {COMMAND}"
            )
        return cls(**data)


def _check_row(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"bench-networks: a row must be a dict, got {type(row).__name__}")
    missing = [c for c in COLUMNS if c not in row]
    if missing:
        raise ValueError(f"bench-networks: a row must have the columns {', '.join(missing)}; got {sorted(row)}")
    what = ", ".join(str(row[k]) for k in KEY)
    found = {c: row[c] for c in NUMBERS if row[c] is not None}
    if not row["correct"] and found:
        name, value = next(iter(found.items()))
        raise ValueError(f"bench-networks: a variant with a wrong answer gets no number, got {name}={value} ({what})")
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"bench-networks: {name} must be a finite number or null, got {value!r} ({what})")


def networks_path(device: str = "cpu", quick: bool = False) -> Path:
    """``benchmarks/results/end_to_end/<device>.json``."""
    return FOLDER / "end_to_end" / results_path(device, quick).name


def networks_files(folders: Iterable[Path] = (FOLDER,)) -> list[Path]:
    """All files of measured networks in the folders of results, but for those of quick runs and those moved aside."""
    found = [path for folder in folders for path in sorted((folder / "end_to_end").glob("*.json"))]
    return [path for path in found if not path.stem.endswith("-quick")]
