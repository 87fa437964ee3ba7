# SPDX-License-Identifier: Apache-2.0
"""What there is to do on a GPU: parts, each cut into slices, each slice a process of its own with a limit."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cofire.bench.cases import families as benchmark_families
from cofire.bench.cases import known
from cofire.registry import OPERATORS

#: The part, what it does, and its share of a call's time among the parts that have something left to do.
PARTS = {
    "environment": ("what GPU, driver, clocks and versions are there; nothing is changed", 1),
    "build": ("compile the C++ kernels, if there is a compiler", 3),
    "ceilings": ("copy, read, GEMM and convolution: what the rows are divided by", 1),
    "compile": ("compile every Triton kernel, for all tests and tiles to come", 3),
    "tests": ("pytest -m gpu: first one call of every kernel, then family by family", 8),
    "tiles": ("time the shipped tiles at the shipped sizes, and keep the best", 4),
    "benchmarks": ("the benchmark suite: a few cases of every family, then all, then torch.compile", 8),
    "growth": ("how time and memory grow: cofire bench-growth", 2),
    "networks": ("real networks, before and after: cofire bench-networks", 2),
}
#: Families by what is wanted most, where the time may not suffice for all.
ORDER = ("lowbit", "gating", "sparse", "shift_add", "kv_fusion", "clustering", "selection")
STALL_SECONDS = {"tests": 120.0, "tiles": 90.0, "benchmarks": 180.0}
MEASURING = ("ceilings", "tiles", "benchmarks", "growth", "networks")  #: parts that a dry run does not measure


@dataclass(frozen=True)
class Slice:
    """A process: what it is called, what it runs, how long it may."""

    part: str
    name: str
    command: tuple[str, ...]
    seconds: float  #: at most, in one go
    stall: float | None = None  #: killed when the journal takes no line for so long; what it was at is set aside
    resumes: bool = False  #: a second go does what is left

    def __str__(self) -> str:
        return f"{self.part}/{self.name}" if self.name else self.part


def checkout() -> Path | None:
    """The folder of the checkout that this package runs from; None when it is installed."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "setup.py").exists() and (root / "tests" / "helpers.py").exists() else None


def ordered(names: Sequence[str]) -> list[str]:
    """Families, the most wanted first; families that are newer than :data:`ORDER` come last."""
    return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


@functools.cache
def _family_of_module() -> dict[str, str]:
    """Families by the module that defines operators, as ``{"fake_quantize": "lowbit"}``."""
    return {o.reference.__module__.rpartition(".")[2]: o.family for o in OPERATORS.values()}


def family_of(file: Path) -> str:
    """The family that a test file is about: of the module of that name, or else whose name it begins with."""
    stem = file.stem.removeprefix("test_")
    found = _family_of_module().get(stem)
    if found is not None:
        return found
    near = [family for family in set(_family_of_module().values()) if stem.startswith(family)]
    return max(near, key=len, default="others")


def gpu_test_files(root: Path) -> dict[str, list[Path]]:
    """Test files with tests that need a GPU, by family: those that say so, and those of operators."""
    found: dict[str, list[Path]] = {}
    for file in sorted((root / "tests").rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if "mark.gpu" in text or "check_op(" in text:
            found.setdefault(family_of(file), []).append(file.relative_to(root))
    return found


def _step(name: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "cofire.gpu_check.steps", name, *options)


def workers() -> int:
    """Processes of tests at a time: a kernel is compiled on a CPU core, and one GPU takes turns."""
    return max(1, min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 12))


def pytest_command(files: Sequence[Path], dry: bool) -> tuple[str, ...]:
    """Collect only, or run, in several processes where pytest-xdist is there."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "--continue-on-collection-errors"]
    command += ["-p", "cofire.gpu_check.recorder", "-p", "no:cacheprovider"]
    if dry:
        command.append("--collect-only")
    elif importlib.util.find_spec("xdist") is not None and workers() > 1:
        command += ["-n", str(workers()), "--dist", "worksteal", "--max-worker-restart", "40"]
    return (*command, *map(str, files))


def _tests(families: Sequence[str], dry: bool) -> list[Slice]:
    root = checkout()
    if root is None:
        return [Slice("tests", "", _step("absent", "the tests are in a checkout, and cofire is installed"), 60)]
    if importlib.util.find_spec("pytest") is None:
        return [Slice("tests", "", _step("absent", "pytest is not installed: pip install pytest"), 60)]
    files = gpu_test_files(root)
    chosen = [f for f in ordered(list(files)) if f in families or f == "others"]
    make = functools.partial(Slice, "tests", stall=STALL_SECONDS["tests"], resumes=True)
    every = [file for family in chosen for file in files[family]]
    if dry:  # of all families the whole folder, so that a file that belongs to no slice is found
        whole = set(files) - set(chosen) <= {"others"}
        return [make("collect", pytest_command([Path("tests")] if whole else every, dry), 540)]
    first = [make("first", pytest_command(every, dry), 240)] if every else []
    return first + [make(family, pytest_command(files[family], dry), 540) for family in chosen]


def _benchmarks(families: Sequence[str], dry: bool) -> list[Slice]:
    chosen = [f for f in ordered(benchmark_families()) if f in families]
    make = functools.partial(Slice, "benchmarks", seconds=540, stall=STALL_SECONDS["benchmarks"], resumes=True)
    if dry:
        return [make("dry", _step("benchmarks", *(word for family in chosen for word in ("--family", family))))]
    return [
        make(f"{family}-{which}", _step("benchmarks", "--family", family, "--pass", which))
        for which in ("quick", "all", "compile")
        for family in chosen
    ]


def plan(parts: Sequence[str] | None = None, families: Sequence[str] | None = None, dry: bool = False) -> list[Slice]:
    """Everything there is to do, in order.

    Raises:
        ValueError: an unknown part or family; near matches are listed.
    """
    chosen = _known("part", parts or PARTS, tuple(PARTS))
    every = sorted({o.family for o in OPERATORS.values()})
    wanted = _known("family", families or every, every)
    slices = [
        Slice("environment", "", _step("environment"), 60),
        Slice("build", "", _step("build"), 400, resumes=True),
        Slice("ceilings", "", _step("ceilings"), 90),
        Slice("compile", "", _step("compile"), 300, resumes=True),
        *_tests(wanted, dry),
        Slice("tiles", "", _step("tiles"), 300, STALL_SECONDS["tiles"], resumes=True),
        *_benchmarks(wanted, dry),
        Slice("growth", "", _step("command", "bench-growth"), 540, resumes=True),
        Slice("networks", "", _step("command", "bench-networks"), 540, resumes=True),
    ]
    return [s for s in slices if s.part in chosen]


def _known(kind: str, wanted: Sequence[str] | dict[str, tuple[str, int]], every: Sequence[str]) -> list[str]:
    try:
        return known(kind, wanted, every)
    except ValueError as error:
        raise ValueError(str(error).replace("bench:", "gpu-check:", 1)) from None
