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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cofire.bench.machine import caches, facts, instructions
from cofire.bench.peers import Peer, distributions
from cofire.files import replacing

Row = dict[str, Any]

FOLDER = Path("benchmarks/results")
KEY = ("family", "op", "case", "dtype", "device", "mode", "provider")  #: what makes a row that row
COLUMNS = (*KEY, "median_ms", "p20_ms", "p80_ms", "bytes", "flops", "peak_bytes", "correct", "noisy")
UNCOMPARED = ("overhead", "first call")  #: modes that no summary counts among the speed-ups
NUMBERS = ("median_ms", "p20_ms", "p80_ms", "peak_bytes")  #: what a provider with a wrong answer does not get
#: Of a results file, by what they are; ``run`` is there while a run is not finished.
PARTS: dict[str, type] = {"environment": dict, "ceilings": dict, "rows": list, "run": dict}
#: Of any file that cofire writes: one that has others than its kind has is of another kind, and not of a newer cofire.
EVERY_PART = ("environment", "ceilings", "rows", "run", "runs", "agreement")
#: Of the ceilings, and what every reader looks up in them; the bandwidths have the sizes that they have.
SPEEDS: dict[str, tuple[str, ...]] = {
    "copy_gbs": (),
    "read_gbs": (),
    "gemm_gflops": ("float32", "bfloat16"),
    "conv_gflops": ("float32", "bfloat16"),
}
FORMAT = 2  #: of a results file; one without a number is of format 1, which lacks some of the environment
#: What may differ between rows of one file, which say themselves what they measured, or does not change a time.
UNPARTED = (
    *("date", "commit", "cofire", "cofire_kernels", "peers"),
    *("format", "kernel", "memory_limit", "affinity", "numpy", "triton", "runs"),
)
BENCH = "cofire bench"  #: the command whose files are read where nothing else is said


@dataclass
class Results:
    """``rows`` measured under one ``environment``, and the ``ceilings`` of the machine at that time."""

    environment: dict[str, Any]
    ceilings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    #: what a run that is not finished has done (:class:`cofire.bench.resume.Record`)
    run: dict[str, Any] | None = None
    #: why cofire itself got no number in this run; is not written
    refused: list[str] = field(default_factory=list, compare=False)
    #: the rows that a report leaves out, because the suite no longer has them; is not written
    left_out: list[Row] = field(default_factory=list, compare=False)

    def add(self, rows: list[Row]) -> None:
        """Put rows in, in place of older measurements of the same thing; a peer that is gone leaves its number here."""
        timed = {tuple(r[k] for k in KEY) for r in self.rows if r["median_ms"] is not None}
        rows = [r for r in rows if not (r.get("absent") and tuple(r[k] for k in KEY) in timed)]
        fresh = {tuple(r[k] for k in KEY) for r in rows}
        self.rows = [r for r in self.rows if tuple(r[k] for k in KEY) not in fresh] + rows

    def keep(self, rows: list[Row]) -> list[Row]:
        """Put the rows of one case in, unless cofire itself was wrong in it and had been right; returns those put in."""
        ours = next((r for r in rows if r["provider"] == "cofire"), None)
        if ours is not None and not ours["correct"]:
            key = tuple(ours[k] for k in KEY)
            stays = any(r["correct"] for r in self.rows if tuple(r[k] for k in KEY) == key)
            what = "the earlier measurement stays" if stays else "there is no number"
            where = f"{ours['op']}, {ours['case']}, {ours['dtype']}, {ours['mode']}"
            self.refused.append(f"{where}: {ours.get('note', 'wrong')}; {what}")
            if stays:
                return []
        self.add(rows)
        return rows

    def to_json(self) -> dict[str, Any]:
        found = {"environment": self.environment, "ceilings": self.ceilings, "rows": self.rows}
        return found if self.run is None else {**found, "run": self.run}

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
    def load(cls, path: str | Path, command: str = BENCH) -> Results:
        """Read a results file; ``command`` is what writes such files.

        Raises:
            FileNotFoundError: there is none. ValueError: it is cut off, another kind of file, or of another cofire.
        """
        return cls(**_checked(read_json(path, command), path, command))

    def same_environment(self, other: dict[str, Any]) -> bool:
        """Whether rows measured there may stand beside rows measured here: all but cofire itself is the same.

        Each row says which commit it measured, and when. What only one of the two says parts nobody: a file of an
        earlier cofire knows less about its machine.
        """
        both = self.environment.keys() & other.keys() - set(UNPARTED)
        return all(self.environment[k] == other[k] for k in both)

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
        wrong = [r for r in self.rows if not r["correct"] and not r.get("absent")]
        lines += [f"  no number: {r['provider']} on {r['op']}, {r['case']}, {r['dtype']}: {r['note']}" for r in wrong]
        absent = {r["provider"]: r["note"] for r in self.rows if r.get("absent")}
        lines += [f"  {provider}: {note}" for provider, note in absent.items()]
        return "\n".join([*lines, f"  {self.noise()}"])

    def noise(self) -> str:
        """How many rows are noisy, and what to do about it."""
        noisy = [r for r in self.rows if r["noisy"]]
        if not noisy:
            return f"0 of {len(self.rows)} rows are noisy"
        flagged = sum(bool(r.get("flagged")) for r in noisy)
        ops = list(dict.fromkeys(r["op"] for r in noisy))
        again = "" if len(ops) > 3 else "".join(f" --op {op}" for op in ops)
        return (
            f"{len(noisy)} of {len(self.rows)} rows are noisy (something else used the machine during {flagged} of them, "
            f"the readings of the others spread): close what else runs, then cofire bench{again} measures them again"
        )


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def flagged(row: Row) -> bool:
    """Whether the probe was slow; a file of an earlier cofire says only whether the row is noisy."""
    return bool(row.get("flagged", row["noisy"]))


class BrokenFileError(ValueError):
    """A file is empty, cut off, or no JSON: nothing can read it, not even another cofire."""


def read_json(path: str | Path, command: str = BENCH) -> Any:
    """The JSON in a file that a command of cofire writes; what is wrong with it as a sentence.

    Raises:
        FileNotFoundError: there is none. BrokenFileError: it is empty, cut off, or no JSON. ValueError: it cannot be read.
    """
    path, who = Path(path), _who(command)
    again, name = f"measure again with {command}, or fetch the file again", f"name a file of {command}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{who}: there is no results file {path}; {command} writes one") from None
    except UnicodeDecodeError:
        raise BrokenFileError(f"{who}: {path} is not a results file: it is not text; {name}") from None
    except OSError as error:
        raise ValueError(f"{who}: {path} cannot be read ({error.strerror}); {name}") from None
    if not text.strip():
        raise BrokenFileError(f"{who}: {path} is empty; {again}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg:
            raise BrokenFileError(f"{who}: {path} is cut off in line {error.lineno}; {again}") from None
        where = f"line {error.lineno}, column {error.colno}"
        raise BrokenFileError(f"{who}: {path} is not a results file: no JSON at {where}; {name}") from None


def _who(command: str) -> str:
    """How the sentences of a command begin."""
    return command.split()[1]


def parts_of(data: Any, kinds: Mapping[str, type], path: str | Path, command: str = BENCH) -> dict[str, Any]:
    """The parts of a file that a command of cofire writes, if they are there, of their kinds, and no others.

    ``run`` may be there or not: it is a part of a run that is not finished.

    Raises:
        ValueError: it is another kind of file, or of a newer cofire.
    """
    other, name = f"{_who(command)}: {path} is not a results file", f"name a file of {command}"
    needed = [part for part in kinds if part != "run"]
    parts = ", ".join(needed)
    if not isinstance(data, dict) or not set(data) & set(needed):
        raise ValueError(f"{other} ({parts}); {name}")
    environment = data.get("environment")
    written = environment.get("format", 1) if isinstance(environment, dict) else 1
    unknown = sorted(set(data) - set(kinds))
    strange = [part for part in unknown if part in EVERY_PART]
    if strange:
        raise ValueError(f"{other}: it has {', '.join(strange)}, which other files of cofire have; {name}")
    if unknown or not isinstance(written, int) or written > FORMAT:
        what = f"has {', '.join(unknown)}" if unknown else f"is of format {written}"
        raise ValueError(
            f"{_who(command)}: {path} was written by a newer cofire (it {what}); install that one to read it"
        )
    missing = [part for part in needed if part not in data]
    if missing:
        raise ValueError(f"{other}: it lacks {', '.join(missing)} of {parts}; {name}")
    for part, value in data.items():
        if not isinstance(value, kinds[part]) and not (part == "run" and value is None):
            raise ValueError(f"{other}: {part} is {type(value).__name__}, expected {kinds[part].__name__}")
    return data


def _checked(data: Any, path: str | Path, command: str) -> dict[str, Any]:
    """The parts of a results file, each as it has to be."""
    found = parts_of(data, PARTS, path, command)
    _check_kept(found, path, command)
    return found


def _check_kept(data: dict[str, Any], path: str | Path, command: str) -> None:
    """What every reader of a file may count on."""
    older = f"{_who(command)}: {path} was written by an older cofire or by another program"
    again = f"measure again with {command}"
    for name in ("device", "kind", "threads", "torch"):
        if name not in data["environment"]:
            raise ValueError(f"{older}: its environment lacks {name}; {again}")
    runs = data["environment"].get("runs", {})
    if not isinstance(runs, dict) or not all(isinstance(facts, dict) for facts in runs.values()):
        raise ValueError(f"{older}: its environment has runs={runs!r}, expected facts by run; {again}")
    for kind, least in SPEEDS.items() if data["ceilings"] else ():  # a file of cofire bench-growth has none
        table = data["ceilings"].get(kind)
        if not isinstance(table, dict) or not table or not {*least} <= {*table}:
            raise ValueError(f"{older}: its ceilings lack {' '.join([kind, *least])}; {again}")
    for i, row in enumerate(data["rows"]):
        missing = [c for c in COLUMNS if c not in row] if isinstance(row, dict) else list(COLUMNS)
        if missing:
            raise ValueError(f"{older}: row {i} lacks {', '.join(missing)}; {again}")
        wrong = [c for c in NUMBERS if not isinstance(row[c], int | float | None)]
        if wrong:
            raise ValueError(f"{older}: row {i} has {wrong[0]}={row[wrong[0]]!r}, expected a number or null; {again}")


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


def instruction_set() -> str:
    """The widest vectors that torch uses here, and AMX where the CPU has it: what it does to products is more than that."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability} AMX" if "amx_tile" in (instructions() or ()) else capability


def results_path(device: str = "cpu", quick: bool = False) -> Path:
    """``benchmarks/results/<device>.json``, the name made safe for files; quick runs have a file of their own.

    Some machines do not tell which CPU they have ("AMD EPYC"). Where a file of that name was measured with other
    instructions, or with another cache of the second level, the name says what this machine has.
    """
    words = re.sub(r"\((?:r|tm|c)\)", "", device_name(device), flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    if device != "cpu":
        return FOLDER / f"{slug}{'-quick' if quick else ''}.json"
    end = f"{torch.get_num_threads()}-threads{'-quick' if quick else ''}.json"
    instructions, cache = instruction_set(), second_cache({"caches": caches()})
    paths = [FOLDER / f"{slug}-{end}"]
    for more in (instructions, f"l2 {cache}"):
        slug += f"-{more.lower().replace(' ', '-')}"
        paths.append(FOLDER / f"{slug}-{end}")
    return next((path for path in paths if _fits(path, instructions, cache)), paths[-1])


def second_cache(environment: Mapping[str, Any]) -> str | None:
    """The size of the second-level cache, where an environment says it."""
    found = (environment.get("caches") or {}).get("L2")
    return None if found is None else str(found)


def _fits(path: Path, instructions: str, cache: str | None) -> bool:
    """Whether a file is this machine's, as far as it says what it is of, or may become it: there is none that can be read."""
    try:
        environment = Results.load(path).environment
    except (FileNotFoundError, ValueError):
        return True
    pairs = ((environment.get("instruction_set"), instructions), (second_cache(environment), cache))
    return all(there is None or here is None or there == here for there, here in pairs)


def results_files() -> list[Path]:
    """All results files here; a quick run counts only where the device has no full one."""
    found = sorted(FOLDER.glob("*.json"))
    full = {p.stem for p in found if not p.stem.endswith("-quick")}
    return [p for p in found if p.stem in full or p.stem.removesuffix("-quick") not in full]


#: What is measured, in a checkout; results and pages of an earlier part of the run are no change of it.
CODE = (":/csrc", ":/kernels", ":/pyextensions", ":/setup.py")


def _commit() -> str | None:
    """The commit of the checkout this package runs from, or None when it is installed."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        call = ["git", "-C", str(here.parent), *words]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a site-packages inside somebody else's checkout is not ours
        changed = git("status", "--porcelain", "-uno", "--", *CODE)
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def environment(device: str, quick: bool, peers: Iterable[Peer] = ()) -> dict[str, Any]:
    """What a reader must know to judge or repeat the numbers; ``peers`` are those from outside."""
    from cofire import native
    from cofire.version import __version__

    return {
        "device": device_name(device),
        "kind": device,
        "cpu": device_name("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **facts(),
        "instruction_set": instruction_set(),
        "cofire": __version__,
        "cofire_kernels": native.STATUS.variant or f"reference ({native.STATUS.reason})",
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "triton": _version("triton"),
        "platform": f"{sys.platform} {platform.machine()}",
        "quick": quick,
        "format": FORMAT,
        "peers": {name: _version(name) for name in distributions(device, peers)},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
