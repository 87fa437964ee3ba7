# SPDX-License-Identifier: Apache-2.0
"""The command: reads what was asked for, runs it, and says how it went."""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cofire.files import replacing
from cofire.gpu_check import summary as report
from cofire.gpu_check.journal import BAD, Journal
from cofire.gpu_check.plan import PARTS, Slice, checkout, plan, workers
from cofire.gpu_check.runner import Runner, terminated_as_interrupted

OUT = Path("gpu-check")
SECONDS = 540.0
INTERRUPTED = 130


def environment(out: Path, dry: bool, all_kernels: bool) -> dict[str, str]:
    """Of the processes: this very cofire, caches that stay, one core of the CPU for each process of tests."""
    here = Path(__file__).resolve().parents[2]
    root = checkout()
    paths = [str(here), *([str(root / "kernels")] if root is not None else []), os.environ.get("PYTHONPATH", "")]
    caches = (root or out.resolve()) / ".cache"
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(caches / "triton")),
        "CUPY_CACHE_DIR": os.environ.get("CUPY_CACHE_DIR", str(caches / "cupy")),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor")),
        "COFIRE_TILES": str((out / "tiles").resolve()),
        "COFIRE_GPU_CHECK_JOURNAL": str((out / "journal.jsonl").resolve()),
        "COFIRE_GPU_CHECK_DRY": "1" if dry else "0",
        "COFIRE_GPU_CHECK_ALL_KERNELS": "1" if all_kernels else "0",
    }


def check(
    out: str | Path = OUT,
    *,
    seconds: float = SECONDS,
    parts: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    dry_run: bool = False,
    all_kernels: bool = False,
    retry: bool = False,
    fresh: bool = False,
    archive: str | Path | None = None,
    announce: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Do what is left of everything that needs a GPU, for at most so long.

    Args:
        out: the folder of all that is found. A second call with the same folder goes on.
        seconds: of this call. A part gets its share, and what other parts leave over.
        parts: names among :data:`cofire.gpu_check.PARTS`; default all.
        families: of operators; default all.
        dry_run: everything but the launches: on a machine without a GPU too.
        all_kernels: a dry run compiles every Triton kernel, not a few.
        retry: do again what failed, hung or crashed.
        fresh: forget what was done in this folder.
        archive: pack the folder into this ``.tar.gz`` at the end.
        announce: called with a line whenever something begins or ends.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ValueError: an unknown part or family, no time, no GPU, or a journal that is none.
    """
    import torch

    if not seconds > 0:
        raise ValueError(f"gpu-check: seconds must be positive, got {seconds:g}")
    slices = plan(parts, families, dry_run)
    if not dry_run and not torch.cuda.is_available():
        raise ValueError("gpu-check: torch sees no NVIDIA GPU here; --dry-run does everything but the launches")
    out = Path(out)
    journal = _begin(out, dry_run, retry, fresh)
    runner = Runner(
        journal, environment(out, dry_run, all_kernels), out / "logs", checkout() or out.resolve(), announce
    )
    try:
        with terminated_as_interrupted():
            runner.run(slices, seconds)
    finally:
        journal.mend()
        found = report.summarize(slices, journal, dry_run)
        report.write(out, found)
        if archive is not None:
            _pack(out, Path(archive))
    return found


def _begin(out: Path, dry: bool, retry: bool, fresh: bool) -> Journal:
    """What is known already in this folder."""
    if fresh:
        (out / "journal.jsonl").unlink(missing_ok=True)
    journal = Journal.open(out)
    kinds = {r["dry"] for r in journal.records() if r["event"] == "call"}
    if kinds - {dry}:
        was, now = ("a dry run", "a real one") if kinds == {True} else ("a real run", "a dry one")
        raise ValueError(f"gpu-check: {out} holds {was}, and this is {now}; name another folder with --out, or --fresh")
    journal.compact()
    journal.write(part="", slice="", event="call", dry=dry)
    if retry:
        bad = {r["slice"] for r in journal.records() if r["event"] in BAD}
        journal.forget(lambda r: r["event"] in BAD or ("item" not in r and r["slice"] in bad))
    return journal


def _pack(out: Path, archive: Path) -> None:
    with replacing(archive) as temporary, tarfile.open(temporary, "w:gz") as tar:
        for file in sorted(p for p in out.rglob("*") if p.is_file() and p.suffix != ".tmp"):
            tar.add(file, Path(out.name) / file.relative_to(out))


def listing(slices: Sequence[Slice]) -> list[str]:
    """The parts, and the slices of each."""
    found = []
    for part in dict.fromkeys(s.part for s in slices):
        names = [s.name for s in slices if s.part == part and s.name]
        found.append(f"{part}: {PARTS[part][0]}" + (f" [{', '.join(names)}]" if names else ""))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cofire gpu-check",
        description="Build, test, tune and measure on an NVIDIA GPU, in parts bounded in time. The same command goes on.",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of all that is found (default: gpu-check)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of this call (default: 540)")
    parser.add_argument("--part", action="append", dest="parts", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--family", action="append", dest="families", metavar="FAMILY", help="of operators")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="everything but the launches; needs no GPU")
    parser.add_argument("--all-kernels", action="store_true", help="a dry run compiles every Triton kernel")
    parser.add_argument("--retry", action="store_true", help="do again what failed, hung or crashed")
    parser.add_argument("--fresh", action="store_true", help="forget what was done in this folder")
    parser.add_argument("--archive", type=Path, metavar="FILE.tar.gz", help="pack the folder at the end")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all done and passed; 1: something failed; 2: bad input; 4: time is over, call again."""
    given = vars(_parser().parse_args(arguments))
    return run(**given)


def run(*, list: bool, **given: Any) -> int:
    """As :func:`main`, of arguments that are parsed already."""
    try:
        if list:
            print("\n".join(listing(plan(given["parts"], given["families"], given["dry_run"]))))
            return 0
        print(f"gpu-check: {workers()} processes of tests, {given['seconds']:g} s, into {given['out']}", flush=True)
        found = check(**given, announce=lambda text: print(f"  {text}", flush=True))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu-check: stopped; what is known is kept, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    print("\n".join(report.lines(found)))
    if not found["complete"]:
        return 4
    return 0 if found["passed"] else 1
