# SPDX-License-Identifier: Apache-2.0
"""What the processes of gpu-check run: ``python -m cofire.gpu_check.steps <step>``, told the rest by the environment."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cofire.files import write_atomically
from cofire.gpu_check.journal import BAD, GOOD, Journal
from cofire.gpu_check.plan import checkout, workers
from cofire.gpu_check.recorder import context_answers
from cofire.gpu_check.runner import CONTEXT_LOST, NOT_HERE

VERSIONS = (
    "torch",
    "triton",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "cupy",
    "numpy",
    "pytest",
    "pytest-xdist",
    "typer",
    "rich",
    "ninja",
)
#: What nvidia-smi is asked for; it is only asked.
QUERIES = (
    "name",
    "driver_version",
    "memory.total",
    "mig.mode.current",
    "persistence_mode",
    "compute_mode",
    "ecc.mode.current",
    "pstate",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
)
#: Kernels that a dry run compiles: of each family one that is compiled at once. (A product takes ten seconds.)
FEW = ("histogram16", "channel_pool", "kv_append_", "dequantize", "compact", "moe_route", "apply_mask")
#: What the host module is told when it is built.
FACTS = ("COFIRE_TORCH_VERSION", "COFIRE_COMPILER", "COFIRE_VARIANTS")


class NotHereError(Exception):
    """This machine cannot do the step; the sentence says why."""


@dataclass(frozen=True)
class Context:
    """Where a step notes and leaves what it finds."""

    out: Path
    journal: Journal
    slice: str
    dry: bool

    @property
    def part(self) -> str:
        return self.slice.partition("/")[0]

    def each(self, items: Sequence[str], work: Callable[[str], str | None]) -> None:
        """Do what has not ended yet, and note it. ``work`` gives a fault as a sentence, or None."""
        self.journal.write(part=self.part, slice=self.slice, event="plan", total=len(items))
        ended = {name for name, r in self.journal.items(self.part).items() if r["event"] in (*GOOD, *BAD)}
        for item in items:
            if item not in ended:
                self.one(item, work)

    def one(self, item: str, work: Callable[[str], str | None]) -> None:
        about = {"part": self.part, "slice": self.slice, "item": item}
        self.journal.write(**about, event="start")
        begun = time.perf_counter()
        try:
            fault = work(item)
        except Exception as error:  # the other items go on
            fault = f"{type(error).__name__}: {error}"
        seconds = round(time.perf_counter() - begun, 2)
        if fault is None:
            self.journal.write(**about, event="passed", seconds=seconds)
            return
        print(f"{item}: {fault}", flush=True)
        self.journal.write(**about, event="failed", seconds=seconds, note=fault)
        if not context_answers():
            sys.stdout.flush()
            os._exit(CONTEXT_LOST)


def _json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise NotHereError("torch sees no NVIDIA GPU")


# ------------------------------------------------------------------------------------------------ environment


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def nvidia_smi() -> dict[str, str] | str:
    """What nvidia-smi answers to :data:`QUERIES`, or why there is no answer."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not there"
    try:
        at_once = _ask_nvidia_smi(",".join(QUERIES))
        if at_once is not None and at_once.count(",") == len(QUERIES) - 1:
            return dict(zip(QUERIES, (word.strip() for word in at_once.split(",")), strict=True))
        # one by one: this driver does not know some of them
        return {query: _ask_nvidia_smi(query) or "not known to this driver" for query in QUERIES}
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi gives no answer: {error}"


def _ask_nvidia_smi(query: str) -> str | None:
    call = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(call, capture_output=True, text=True, timeout=10, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def gpu() -> dict[str, Any] | None:
    """What torch says of the GPU."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    names = (
        "name",
        "major",
        "minor",
        "total_memory",
        "multi_processor_count",
        "L2_cache_size",
        "clock_rate",
        "memory_clock_rate",
    )
    return {name: getattr(found, name, None) for name in names} | {"count": torch.cuda.device_count()}


def environment(context: Context) -> None:
    """What there is: GPU, driver, clocks, limits, versions. Nothing is changed."""
    from cofire import native
    from cofire.bench.results import environment as of_results

    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {
        "gpu": gpu(),
        "nvidia_smi": nvidia_smi(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS},
        "cuda": torch.version.cuda,
        "compiler": shutil.which(compiler()),
        "native": native.STATUS.variant or native.STATUS.reason,
        "workers": workers(),
        "results": of_results(device, False),
    }
    _json(context.out / "environment.json", report)
    print(json.dumps(report, indent=1))


# ------------------------------------------------------------------------------------------------ preparation


def compiler() -> str:
    return shlex.split(os.environ.get("CXX", "c++"))[0]


def build(context: Context) -> None:
    """The C++ kernels, by the compiler that is there; without one the reference serves."""
    root = checkout()
    if root is None:
        raise NotHereError("cofire is installed: it is built already, or without compiled kernels")
    if shutil.which(compiler()) is None:
        raise NotHereError(f"no C++ compiler ({compiler()}): on the CPU the reference serves")
    if importlib.util.find_spec("setuptools") is None:
        raise NotHereError("setuptools is not installed: on the CPU the reference serves")
    if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
        raise NotHereError(
            "ninja is not installed, and without it the build would take too long: on the CPU the reference serves"
        )
    if context.dry:
        dry_build(root)
        return
    done = subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=root, check=False)
    if done.returncode:
        raise SystemExit(f"the build failed with exit code {done.returncode}: on the CPU the reference serves")


def dry_build(root: Path) -> None:
    """Whether setup.py runs here, and the compiler takes what is built, with the headers of this torch; nothing is written."""
    said = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--name"], cwd=root, capture_output=True, text=True, check=False
    )
    if said.returncode or said.stdout.split()[-1:] != ["cofire"]:
        print(said.stdout + said.stderr)
        raise SystemExit(f"setup.py does not run here (exit code {said.returncode})")
    headers = [Path(torch.__file__).parent / "include", root / "csrc", Path(sysconfig.get_path("include"))]
    call = [
        *shlex.split(os.environ.get("CXX", "c++")),
        "-std=c++20",
        "-fsyntax-only",
        *(f"-I{path}" for path in headers),
    ]
    done = subprocess.run([*call, *(f'-D{name}=""' for name in FACTS), str(root / "csrc" / "host.cpp")], check=False)
    if done.returncode:
        raise SystemExit(f"the compiler refuses csrc/host.cpp (exit code {done.returncode})")
    print("a dry run builds nothing: setup.py runs, and the compiler takes csrc/host.cpp")


def ceilings(context: Context) -> None:
    """What the rows are divided by."""
    if context.dry:
        raise NotHereError("a dry run measures nothing")
    _need_gpu()
    from cofire.bench.ceilings import measure

    table = measure("cuda", 0.2)
    _json(context.out / "ceilings.json", table)
    print(json.dumps(table))


def compile(context: Context) -> None:
    """Every Triton kernel, ahead of time, for the GPU at hand (a dry run: a few, for sm_90)."""
    if importlib.util.find_spec("triton") is None:
        raise NotHereError("triton is not installed")
    from cofire_kernels.aot import SHARED_MEMORY
    from cofire_kernels.configs import entries

    chip = "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "sm_90"
    if chip not in SHARED_MEMORY:
        raise NotHereError(f"kernels are compiled ahead of time for {', '.join(SHARED_MEMORY)}; this GPU is {chip}")
    every = os.environ.get("COFIRE_GPU_CHECK_ALL_KERNELS") == "1"
    names = list(FEW) if context.dry and not every else list(entries("default.json"))
    command = [sys.executable, "-m", "cofire_kernels.aot", chip, "--dtypes", "bfloat16"]
    command += [] if context.dry and not every else ["float32"]
    left = set(names)
    context.journal.write(part="compile", slice=context.slice, event="plan", total=len(names))
    faults: dict[str, str] = {}
    for facts in _lines([*command, "--configs", *names]):
        if facts.get("error"):
            faults[facts["config"]] = facts["error"]
        left.discard(facts["config"])
    for name in names:
        about = {"part": "compile", "slice": context.slice, "item": name}
        if name in left:
            faults[name] = "compiled to nothing"
        if name in faults:
            context.journal.write(**about, event="failed", note=faults[name])
        else:
            context.journal.write(**about, event="passed")


def _lines(command: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The lines of JSON that a process prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[1:4])} ended with exit code {process.returncode}")


# --------------------------------------------------------------------------------------------------- measuring


def tiles(context: Context) -> None:
    """The best of the shipped tiles at the shipped sizes, kernel by kernel. A dry run asks for every kernel's tiles."""
    if importlib.util.find_spec("triton") is None:
        raise NotHereError("triton is not installed")
    from cofire_kernels.configs import tune

    if context.dry:
        context.each(tune.names(), dry_tiles)
        return
    _need_gpu()
    path = tune.file(context.out / "tiles")

    def best(name: str) -> None:
        tune.tune([name], path=path, seconds=30.0)

    context.each(tune.names(), best)


def dry_tiles(name: str) -> str | None:
    """On tensors without memory, with launches that do nothing: some call of the kernel asks for its tile."""
    from triton.runtime.jit import JITFunction

    from cofire_kernels.configs import tune

    launch = JITFunction.run
    JITFunction.run = lambda *_, **__: None
    try:
        tune.best(name, torch.bfloat16, torch.device("meta"), measure=lambda call: 1.0)
    finally:
        JITFunction.run = launch
    return None


def results_file(out: Path) -> Path:
    from cofire.bench.results import results_path

    return out / results_path("cuda").name


def benchmarks(context: Context, families: Sequence[str], which: str) -> None:
    """Cases of families: the quick ones, all, or all by ``torch.compile``."""
    from cofire.bench.cases import Case, of_family

    cases: dict[str, Case] = {}
    for case in (case for family in families for case in of_family(family)):
        if which == "compile" and "compile" not in case.providers:
            continue
        if which != "quick" or case.quick:
            cases[f"{case}, torch.compile" if which == "compile" else str(case)] = case
    if context.dry:
        rehearsal = Rehearsal(context.out / "dry")
        context.each(
            [*cases, REPORT], lambda item: rehearsal.case(cases[item]) if item in cases else rehearsal.report()
        )
        return
    _need_gpu()
    path = results_file(context.out)
    _keep_ceilings(context.out)
    context.each(list(cases), lambda item: _measure(cases[item], which == "compile", path))


REPORT = "the report of all cases"  #: the last item of a dry run
#: What libraries say where a CPU lacks an instruction: they give no number, and that is no fault.
LACKING = ("needs the cpu support",)
#: What they say where there is no GPU.
NO_GPU = ("cuda", "gpu", "device")


class Rehearsal:
    """The suite on small inputs and on the CPU: every provider that can run there is made, checked and timed by the harness,
    the rows lie in a results file, and a report is drawn of it. The times say nothing."""

    def __init__(self, folder: Path) -> None:
        from cofire.bench.harness import Effort
        from cofire.bench.results import Results
        from cofire.bench.results import environment as of_results

        self.folder, self.path = folder, folder / "cpu.json"
        self.effort = Effort(True)
        self.effort.case_seconds = self.effort.variant_seconds = self.effort.copying_seconds = 0.0
        self.effort.least_rounds = self.effort.most_rounds = self.effort.slow_rounds = 2
        earlier = self.path.exists()
        self.results = Results.load(self.path) if earlier else Results(of_results("cpu", True), {})

    def case(self, case: Any) -> str | None:
        """A fault, or None."""
        from cofire.bench import ceilings as roofs
        from cofire.bench import harness

        if not self.results.ceilings:
            self.results.ceilings = roofs.measure("cpu", 0.0)
        faults = [
            fault for mode in case.modes for fault in (*self._measured(case, mode), *_unprepared(case, mode)) if fault
        ]
        harness.grade(self.results)
        self.results.save(self.path)
        return "; ".join(faults) or None

    def _measured(self, case: Any, mode: str) -> list[str]:
        from cofire.bench import harness

        names = [name for name in harness._provider_names([case], "cpu") if name != "compile"]
        with few_copies():
            rows = harness.measure(
                case, mode, "cpu", self.effort, names, given=harness.Input(case, "cpu", tiny=True, every_mode=True)
            )
        self.results.keep(rows)
        notes = {row["provider"]: row["note"] for row in rows if row.get("note") and not row.get("absent")}
        return [
            f"{mode}, {name}: {note}" for name, note in notes.items() if not any(words in note for words in LACKING)
        ]

    def report(self) -> str | None:
        """Draw what was measured: each operator must be on the pages."""
        from cofire.bench.report import report

        written = report([self.path], self.folder / "report")
        text = "".join(path.read_text(encoding="utf-8") for path in written if path.suffix == ".md")
        lacking = sorted({row["op"] for row in self.results.rows} - {*re.findall(r"\w+", text)})
        return f"the report lacks {', '.join(lacking)}" if lacking else None


@contextlib.contextmanager
def few_copies() -> Iterator[None]:
    """Of cold weights two copies are made, whatever the caches: of small ones it would take thousands to fill them."""
    from cofire.bench import harness

    suite: Any = harness
    before = suite.cold_bytes
    suite.cold_bytes = lambda device: 0
    try:
        yield
    finally:
        suite.cold_bytes = before


def _unprepared(case: Any, mode: str) -> Iterator[str]:
    """Faults of the providers that a GPU alone gets, when they are made on the CPU; but for the fault that there is no GPU."""
    from cofire.bench.harness import Input, candidates, prepare

    here = candidates(case, "cpu", mode, None)
    args: Any = None
    for name, variants in candidates(case, "cuda", mode, None).items():
        for variant, provider in variants.items():
            if name == "compile" or variant in here.get(name, {}):
                continue
            args = Input(case, "cpu", tiny=True).args if args is None else args
            try:
                prepare(provider, case, args, mode)
            except Exception as error:
                words = f"{type(error).__name__}: {error}"
                if not any(word in words.lower() for word in NO_GPU):
                    yield f"{mode}, {name} {variant}: {words}"


def _measure(case: Any, compiled: bool, path: Path) -> str | None:
    from cofire.bench import harness

    others = [name for name in harness._provider_names([case], "cuda") if name != "compile"]
    providers = ["compile"] if compiled else others
    results = harness.run(
        [case.family], ops=[case.op], cases=[str(case)], device="cuda", providers=providers, out=path, progress=False
    )
    return "; ".join(results.refused) or None


def _keep_ceilings(out: Path) -> None:
    """Measure the ceilings once, not with every case: those of the part ``ceilings`` where they are there."""
    from cofire.bench import ceilings as roofs

    file = out / "ceilings.json"
    if not file.exists():
        _json(file, roofs.measure("cuda", 0.2))
    table = json.loads(file.read_text(encoding="utf-8"))
    roofs.measure = lambda *_, **__: table


#: The module of the suite, which is also the folder of its files.
COMMANDS = {"bench-growth": "growth", "bench-networks": "end_to_end"}
#: In a process of its own, without the command line, which needs typer.
COMMAND = """
import sys
from cofire.bench import {module} as suite
found = suite.run(out=sys.argv[1], device="cuda", progress=False, announce=print)
print(*found.refused, sep="\\n")
sys.exit(bool(found.refused))
"""


def command(context: Context, name: str) -> None:
    """A command of ``cofire`` that resumes by itself, on the GPU."""
    if name not in COMMANDS:
        raise NotHereError(f"this cofire has no command {name}")
    if context.dry:
        raise NotHereError("a dry run measures nothing")
    _need_gpu()
    module = COMMANDS[name]
    out = context.out / module / results_file(context.out).name
    done = subprocess.run([sys.executable, "-c", COMMAND.format(module=module), str(out)], check=False)
    if done.returncode:
        raise SystemExit(f"cofire {name} ended with exit code {done.returncode}")


def absent(context: Context, reason: str) -> None:
    """Something that this machine has not."""
    raise NotHereError(reason)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cofire.gpu_check.steps")
    parser.add_argument(
        "step", choices=("environment", "build", "ceilings", "compile", "tiles", "benchmarks", "command", "absent")
    )
    parser.add_argument("text", nargs="?")
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--pass", dest="which", default="quick")
    options = parser.parse_args(None if arguments is None else list(arguments))
    journal = Journal(Path(os.environ["COFIRE_GPU_CHECK_JOURNAL"]))
    context = Context(
        journal.path.parent,
        journal,
        os.environ["COFIRE_GPU_CHECK_SLICE"],
        os.environ.get("COFIRE_GPU_CHECK_DRY") == "1",
    )
    given = [options.family, options.which] if options.step == "benchmarks" else [options.text] if options.text else []
    try:
        globals()[options.step](context, *given)
    except NotHereError as reason:
        print(reason)
        return NOT_HERE
    return 0


if __name__ == "__main__":
    sys.exit(main())
