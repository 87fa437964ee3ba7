# SPDX-License-Identifier: Apache-2.0
"""The results file: what it holds, where it lies, how it is written so that a reader never sees half of it."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cofire.files import replacing

Row = dict[str, Any]

FOLDER = Path("benchmarks/results")
KEY = ("family", "op", "case", "dtype", "device", "mode", "provider")  #: what makes a row that row
COLUMNS = (*KEY, "median_ms", "p20_ms", "p80_ms", "bytes", "flops", "peak_bytes", "correct", "noisy")
UNCOMPARED = ("overhead", "first call")  #: modes that no summary counts among the speed-ups
#: Distributions of the peers. The environment says which were there: a peer that was not has no row.
PEERS = (
    *("bitsandbytes", "coremltools", "faiss-cpu", "onnxruntime", "optimum-quanto", "scikit-learn", "sparseprop"),
    *("torchao", "zentorch"),
)
NUMBERS = ("median_ms", "p20_ms", "p80_ms", "peak_bytes")  #: what a provider with a wrong answer does not get


@dataclass
class Results:
    """``rows`` measured under one ``environment``, and the ``ceilings`` of the machine at that time."""

    environment: dict[str, Any]
    ceilings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def add(self, rows: list[Row]) -> None:
        """Put rows in, in place of older measurements of the same thing."""
        fresh = {tuple(r[k] for k in KEY) for r in rows}
        self.rows = [r for r in self.rows if tuple(r[k] for k in KEY) not in fresh] + rows

    def to_json(self) -> dict[str, Any]:
        return {"environment": self.environment, "ceilings": self.ceilings, "rows": self.rows}

    def save(self, path: str | Path) -> Path:
        """Write under a temporary name, then rename: a reader sees the old file or the new one.

        Raises:
            ValueError: a row lacks a column, or has numbers although its answer was wrong.
        """
        for row in self.rows:
            _check_row(row)
        path = Path(path)
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            json.dump(self.to_json(), file, indent=1, allow_nan=False)
            file.write("\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a results file.

        Raises:
            FileNotFoundError: there is none. ValueError: it is not one.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or set(data) != {"environment", "ceilings", "rows"}:
            raise ValueError(f"bench: {path} is not a results file (environment, ceilings, rows)")
        return cls(**data)

    def same_environment(self, other: dict[str, Any]) -> bool:
        """Whether rows measured there may stand beside rows measured here: all but cofire itself is the same.

        Each row says which commit it measured, and when.
        """

        def apart_from_cofire(environment: dict[str, Any]) -> dict[str, Any]:
            other = ("date", "commit", "cofire", "cofire_kernels", "peers")
            return {k: v for k, v in environment.items() if k not in other}

        return apart_from_cofire(self.environment) == apart_from_cofire(other)

    def summary(self) -> str:
        """For people: how each operator compares with the strongest plain torch, losses included."""
        ours = [r for r in self.rows if r["provider"] == "cofire"]
        timed = [r for r in ours if r.get("speedup")]
        lines = [f"{len(ours)} measurements of cofire on {self.environment['device']}"]
        for op in dict.fromkeys(r["op"] for r in timed):
            ratios = [r["speedup"] for r in timed if r["op"] == op and r["mode"] not in UNCOMPARED]
            if not ratios:
                continue
            lost = sum(r < 1 for r in ratios)
            mean = geometric_mean(ratios)
            lines.append(
                f"  {op}: {min(ratios):.2f}x to {max(ratios):.2f}x the strongest plain torch's speed, geometric mean "
                f"{mean:.2f}x; slower in {lost} of {len(ratios)}"
            )
        wrong = [r for r in self.rows if not r["correct"]]
        lines += [f"  no number: {r['provider']} on {r['op']}, {r['case']}, {r['dtype']}: {r['note']}" for r in wrong]
        noisy = sum(r["noisy"] for r in self.rows)
        return "\n".join([*lines, f"  {noisy} of {len(self.rows)} rows are noisy"])


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _check_row(row: Row) -> None:
    missing = [c for c in COLUMNS if c not in row]
    if missing:
        raise ValueError(f"bench: a row must have the columns {', '.join(missing)}; got {sorted(row)}")
    if not row["correct"] and any(row[c] is not None for c in NUMBERS):
        what = ", ".join(str(row[k]) for k in KEY)
        raise ValueError(
            f"bench: a provider with a wrong answer gets no number, got median_ms={row['median_ms']} ({what})"
        )


def device_name(device: str) -> str:
    """The model name of the CPU or GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def results_path(device: str = "cpu", quick: bool = False) -> Path:
    """``benchmarks/results/<device>.json``, the name made safe for files; quick runs have a file of their own."""
    words = re.sub(r"\((?:r|tm|c)\)", "", device_name(device), flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    if device == "cpu":
        slug += f"-{torch.get_num_threads()}-threads"
    return FOLDER / f"{slug}{'-quick' if quick else ''}.json"


def results_files() -> list[Path]:
    """All results files here; a quick run counts only where the device has no full one."""
    found = sorted(FOLDER.glob("*.json"))
    full = {p.stem for p in found if not p.stem.endswith("-quick")}
    return [p for p in found if p.stem in full or p.stem.removesuffix("-quick") not in full]


def _commit() -> str | None:
    """The commit of the checkout this package runs from, or None when it is installed."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        call = ["git", "-C", str(here.parent), *words]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a site-packages inside somebody else's checkout is not ours
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def environment(device: str, quick: bool) -> dict[str, Any]:
    """What a reader must know to judge or repeat the numbers."""
    from cofire import native
    from cofire.version import __version__

    return {
        "device": device_name(device),
        "kind": device,
        "cpu": device_name("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cofire": __version__,
        "cofire_kernels": native.STATUS.variant or f"reference ({native.STATUS.reason})",
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "quick": quick,
        "peers": {name: _version(name) for name in PEERS},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
