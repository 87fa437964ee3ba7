# SPDX-License-Identifier: Apache-2.0
"""``cofire bench`` as a tool: runs that are stopped and go on, files that are in the way, noise, two runs compared."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cofire import bench
from cofire.bench import cases as suite
from cofire.bench import ceilings, growth, harness, machine, quiet, results, resume
from cofire.bench.cases import Case, Random, plain
from cofire.bench.growth import methods as trained
from cofire.bench.growth import operators, sweep
from cofire.cli import app
from cofire.files import move_aside

HERE = Path(__file__).resolve()
CEILINGS = {
    "copy_gbs": {"1": 100.0},
    "read_gbs": {"1": 90.0},
    "gemm_gflops": {"float32": 200.0, "bfloat16": 100.0},
    "conv_gflops": {"float32": 250.0, "bfloat16": 150.0},
}


def args(rand: Random) -> tuple[Tensor, str]:
    return rand.normal(2, 3, 4, 4), "avg"


def mean(x: Tensor, mode: str) -> tuple[Tensor]:
    return (x.mean((2, 3)),)


def case_named(name: str, **options: Any) -> Case:
    """A case of channel_pool that takes microseconds."""
    return Case("channel_pool", name, torch.float32, args, {"dense": plain(mean, outputs=1)}, args, family="gating")


class Hurried(harness.Effort):
    def __init__(self, quick: bool, device: str = "cpu") -> None:
        super().__init__(True)
        self.case_seconds = 0.0
        self.least_rounds = 3


class Quiet(quiet.Probe):
    """The machine of this probe is always quiet."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device, {"core": lambda: 1.0})


THREE = [case_named(name) for name in ("a", "b", "c")]


def patched(patch: Callable[[Any, str, Any], Any], found: list[Case]) -> None:
    """``run`` sees these cases alone, and ceilings that cost no time."""
    patch(harness, "select", lambda *_: found)
    patch(ceilings, "measure", lambda *_: CEILINGS)
    patch(harness, "Effort", Hurried)
    patch(harness, "Probe", Quiet)


def stuck_in_the_second(path: str) -> None:
    """What the process does that is killed: after the first case it waits for ever."""

    def wait(x: Tensor, mode: str) -> tuple[Tensor]:
        time.sleep(600)
        return mean(x, mode)

    torch.set_num_threads(1)
    second = replace(THREE[1], providers={"dense": plain(wait, outputs=1)})
    patched(setattr, [THREE[0], second, THREE[2]])
    bench.run(out=path, progress=False)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    found = list(THREE)
    patched(monkeypatch.setattr, found)
    return found


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases that were measured, in order."""
    seen: list[str] = []
    real = harness.measure

    def measure(case: Case, *others: Any, **more: Any) -> list[results.Row]:
        seen.append(case.name)
        return real(case, *others, **more)

    monkeypatch.setattr(harness, "measure", measure)
    return seen


def stop_at(
    cases: list[Case], index: int, error: BaseException | type[BaseException] | Callable[[], Any]
) -> Callable[[], None]:
    """A provider of one case ends the run; the function that is returned repairs it."""
    before = cases[index]

    def stop(x: Tensor, mode: str) -> tuple[Tensor]:
        if isinstance(error, type | BaseException):
            raise error
        error()
        return mean(x, mode)

    cases[index] = replace(before, providers={"dense": plain(stop, outputs=1)})

    def repair() -> None:
        cases[index] = before

    return repair


def run_lines(path: Path, **options: Any) -> tuple[bench.Results, list[str]]:
    lines: list[str] = []
    return bench.run(out=path, progress=False, announce=lines.append, **options), lines


# --------------------------------------------------------------------------------------- stopped, and going on


def _in_the_second(path: Path) -> bool:
    """Whether the run of this file has written that it measures its second case."""
    record = bench.Results.load(path).run if path.exists() else None
    return record is not None and record["begun"] == "channel_pool, b, float32, forward"


def test_a_measurement_in_which_the_process_died_twice_is_left_out(
    three: list[Case], measured: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    repair = stop_at(three, 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run_lines(path)
    repair()
    content = json.loads(path.read_text())
    assert content["run"]["begun"] is None, "stopped, and not dead"
    content["run"]["begun"] = step = "channel_pool, b, float32, forward"
    path.write_text(json.dumps(content))
    repair = stop_at(three, 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run_lines(path)
    content = json.loads(path.read_text())
    assert measured == ["a", "b", "b"] and content["run"]["deaths"] == {step: 1}, "once may be somebody's kill -9"
    repair()
    content["run"]["begun"] = step
    path.write_text(json.dumps(content))
    found, lines = run_lines(path)
    assert measured == ["a", "b", "b", "c"] and {r["case"] for r in found.rows} == {"a", "c"}
    assert lines[-1] == f"{step} is left out: the process died in it 2 times; --fresh tries again"


def killed(function: str, path: Path, there: Callable[[Path], bool]) -> None:
    """A function of this file, which writes to ``path``, runs in a process of its own, which is killed when something is there."""
    words = f"from {HERE.stem} import {function}; {function}({str(path)!r})"
    where = os.pathsep.join([str(HERE.parent), *(p for p in sys.path if p)])
    process = subprocess.Popen([sys.executable, "-c", words], env={**os.environ, "PYTHONPATH": where})
    try:
        end = time.monotonic() + 120
        while not there(path) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_goes_on(tmp_path: Path, three: list[Case], measured: list[str]) -> None:
    path = tmp_path / "r.json"
    killed("stuck_in_the_second", path, _in_the_second)
    left = bench.Results.load(path)
    assert left.run is not None and left.run["done"] == ["channel_pool, a, float32, forward"]
    assert left.run["begun"] == "channel_pool, b, float32, forward"
    assert [r["provider"] for r in left.rows] == ["cofire", "dense"]
    found, lines = run_lines(path)
    assert measured == ["b", "c"]
    assert len(lines) == 1 and "1 measurements are in" in lines[0] and "this one goes on with the others" in lines[0]
    assert found.rows[:2] == left.rows
    assert [r["case"] for r in found.rows] == ["a", "a", "b", "b", "c", "c"]
    assert "run" not in json.loads(path.read_text()), "it is finished"
    assert run_lines(path)[1] == [] and measured == ["b", "c", "a", "b", "c"], "a finished run measures anew"


def swept(patch: Callable[[Any, str, Any], Any], stuck_at: int, seen: list[int]) -> None:
    """``growth.run`` sees one sweep of three sizes, and at one of them waits for ever."""

    def case(n: int) -> Case:
        seen.append(n)
        if n == stuck_at:
            time.sleep(600)
        return case_named(str(n))

    patch(operators, "SWEEPS", [sweep.Sweep("channel_pool", "samples", (1, 2, 4), case, family="gating")])
    patch(trained, "SWEEPS", [])
    patch(harness, "Effort", Hurried)
    patch(quiet, "Probe", Quiet)


def stuck_at_the_second_size(path: str) -> None:
    torch.set_num_threads(1)
    swept(setattr, 2, [])
    growth.run(path, progress=False)


def test_a_killed_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "growth.json"
    killed("stuck_at_the_second_size", path, Path.exists)
    left = bench.Results.load(path).rows
    assert [r["size"] for r in left] == [1, 1]
    seen: list[int] = []
    swept(monkeypatch.setattr, 0, seen)
    found = growth.run(path, progress=False)
    assert seen == [2, 4], "the first size is not measured again"
    assert found.rows[:2] == left and [r["size"] for r in found.rows] == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [(KeyboardInterrupt, 130, "Ctrl-C"), (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "SIGTERM")],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_signal_ends_with_a_sentence(
    error: Any, code: int, word: str, three: list[Case], measured: list[str], tmp_path: Path
) -> None:
    path, before = tmp_path / "r.json", signal.getsignal(signal.SIGTERM)
    repair = stop_at(three, 2, error)
    said = CliRunner().invoke(app, ["bench", "--out", str(path)])
    assert said.exit_code == code
    sentence = (
        f"cofire: stopped by {word}: 2 of 3 measurements are in {path}; the same command goes on with the others."
    )
    assert sentence in said.output.replace("\n", "")
    assert signal.getsignal(signal.SIGTERM) is before
    repair()
    measured.clear()
    again = CliRunner().invoke(app, ["bench", "--out", str(path)])
    assert again.exit_code == 0 and measured == ["c"]


def interrupted(path: Path, three: list[Case], **options: Any) -> None:
    repair = stop_at(three, 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.run(out=path, progress=False, **options)
    repair()


def test_a_case_of_each_operator_comes_first(
    three: list[Case], measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "measure", lambda case, *_, **__: measured.append(case.name) or [])
    three[2] = replace(three[2], name="d", op="compact")  # of another operator
    bench.run(out=tmp_path / "results.json", progress=False)
    assert measured == ["a", "d", "b"]


def test_fresh_starts_over(three: list[Case], measured: list[str], tmp_path: Path) -> None:
    interrupted(tmp_path / "r.json", three)
    measured.clear()
    found, lines = run_lines(tmp_path / "r.json", fresh=True)
    assert measured == ["a", "b", "c"] and len(found.rows) == 6
    assert lines[0].endswith("all are measured anew")


def test_another_request_is_another_run(three: list[Case], measured: list[str], tmp_path: Path) -> None:
    interrupted(tmp_path / "r.json", three)
    measured.clear()
    found, lines = run_lines(tmp_path / "r.json", providers=["cofire"])
    assert measured == ["a", "b", "c"] and len(found.rows) == 6
    assert lines[0].endswith("it was asked for something else, so this is a new run")


@pytest.mark.parametrize("what", ["commit", "peers", "code"])
def test_other_code_is_another_run(
    what: str, three: list[Case], measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "r.json", three)
    measured.clear()
    if what == "code":
        monkeypatch.setattr(resume, "state", lambda commit: "other changes")
    else:
        data = json.loads((tmp_path / "r.json").read_text())
        data["environment"][what] = "another"
        (tmp_path / "r.json").write_text(json.dumps(data))
    found, lines = run_lines(tmp_path / "r.json")
    assert measured == ["a", "b", "c"] and len(found.rows) == 6
    assert lines[0].endswith("cofire or its environment has changed since, so this is a new run")


def test_a_record_that_makes_no_sense_is_no_record(three: list[Case], measured: list[str], tmp_path: Path) -> None:
    interrupted(tmp_path / "r.json", three)
    data = json.loads((tmp_path / "r.json").read_text())
    data["run"] = {"id": 1}
    (tmp_path / "r.json").write_text(json.dumps(data))
    measured.clear()
    assert len(run_lines(tmp_path / "r.json")[0].rows) == 6 and measured == ["a", "b", "c"]


def test_state_follows_changes_that_are_in_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        stdout = b"+ a line"

    monkeypatch.setattr(resume.subprocess, "run", lambda *_, **__: Answer)
    first = resume.state("abc+changes")
    assert first == resume.state("abc+changes")
    Answer.stdout = b"+ another line"
    assert resume.state("abc+changes") != first
    assert resume.state("abc") != resume.state("abd")


def test_results_are_no_change_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that a run writes lies in the checkout: a run that is stopped goes on all the same."""
    module = tmp_path / "pyextensions" / "results.py"
    written = tmp_path / "benchmarks" / "results" / "cpu.json"
    for path in (module, written):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x", "--no-gpg-sign"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(results, "__file__", str(module))
    clean = results._commit()
    written.write_text("2")
    assert clean is not None and results._commit() == clean
    module.write_text("2")
    assert results._commit() == f"{clean}+changes"


def test_forecast() -> None:
    forecast = resume.Forecast(["a", "b", "c"], {})
    assert forecast.left() is None
    forecast.done(4.0)
    assert forecast.left() == 8.0
    known = resume.Forecast(["a", "b", "c"], {"b": 10.0, "c": 20.0})
    assert known.left() == 45.0
    known.done(1.0)
    assert known.left() == 30.0
    assert [harness._time_left(s) for s in (None, 70.0, 600.0)] == ["", "about 70 s left", "about 10 min left"]


# ---------------------------------------------------------------------------------------------------- refusals


def wrong(x: Tensor, mode: str) -> tuple[Tensor]:
    return (x.new_zeros(x.shape[:2]),)


def test_a_wrong_answer_of_cofire_is_refused(three: list[Case], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    before = bench.run(out=path, progress=False)
    three[1] = replace(three[1], ours=plain(wrong, outputs=1))
    three.append(replace(case_named("d"), ours=plain(wrong, outputs=1)))
    said = CliRunner().invoke(app, ["bench", "--out", str(path)])
    assert said.exit_code == 1
    words = said.output.replace("\n", "")
    assert "no number, because cofire's own answer was wrong or the case could not be measured" in words
    assert "channel_pool, b, float32, forward: output 0 is off by" in words
    rows = bench.Results.load(path).rows
    kept = [r for r in rows if r["case"] == "b"]
    assert kept == [r for r in before.rows if r["case"] == "b"], "the good measurement stays, with its number"
    (red,) = [r for r in rows if r["case"] == "d"]
    assert red["provider"] == "cofire" and not red["correct"] and red["median_ms"] is None
    assert all(r["run"] != before.rows[0]["run"] for r in rows if r["case"] in "ac"), "the others were measured"
    assert "run" not in json.loads(path.read_text())


def test_a_case_that_cannot_be_measured_does_not_stop_the_others(three: list[Case], tmp_path: Path) -> None:
    def broken(rand: Any) -> Any:
        raise MemoryError("too large for this machine")

    three[1] = replace(three[1], make_args=broken)
    found = bench.run(out=tmp_path / "r.json", progress=False)
    assert {r["case"] for r in found.rows} == {"a", "c"}
    expected = "channel_pool, b, float32, forward: MemoryError: too large for this machine; there is no number"
    assert found.refused == [expected] and found.run is None


def test_a_wrong_provider_does_not_end_in_an_error(three: list[Case], tmp_path: Path) -> None:
    three[:] = [replace(THREE[0], providers={**THREE[0].providers, "peer:zero": plain(wrong, outputs=1)})]
    said = CliRunner().invoke(app, ["bench", "--out", str(tmp_path / "r.json")])
    assert said.exit_code == 0 and "no number: peer:zero" in said.output


# --------------------------------------------------------------------------------------------------- the command


def test_options_reach_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def run(families: Any, quick: Any, ops: Any, cases: Any, device: Any, providers: Any, **more: Any) -> bench.Results:
        seen.update(more, families=families, quick=quick, ops=ops, cases=cases, device=device, providers=providers)
        return bench.Results({"device": "CPU"}, {})

    monkeypatch.setattr(bench, "run", run)
    words = "bench gating --family sparse --family gating --quick --op spmm --case M1 --providers dense --threads 3"
    said = CliRunner().invoke(app, [*words.split(), "--no-pin", "--fresh", "--json", "--out", "x.json"])
    assert said.exit_code == 0
    assert json.loads(said.stdout)["rows"] == []
    del seen["announce"]
    assert seen == {
        "families": ["gating", "sparse"], "quick": True, "ops": ["spmm"], "cases": ["M1"], "device": "cpu",
        "providers": ["dense"], "peers": (), "threads": 3, "pin": False, "fresh": True, "progress": False, "out": Path("x.json"),
    }  # fmt: skip


def test_threads_are_a_number_above_zero(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["bench", "--threads", "0", "--out", str(tmp_path / "r.json")])
    assert said.exit_code == 2 and "bench: threads must be at least 1, got 0" in said.output
    said = CliRunner().invoke(app, ["bench", "--device", "tpu"])
    assert said.exit_code == 2 and "--device must be cpu or cuda, got 'tpu'" in said.output


def test_threads_and_cores_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[int]] = []
    monkeypatch.setattr(machine, "affinity", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(machine, "_keep_to", lambda cores: kept.append(list(cores)))
    monkeypatch.setattr(machine, "_physical", lambda cores: [cores[0], cores[2], cores[1], cores[3]])
    lines: list[str] = []
    with machine.settled(2, True, lines.append) as fixed:
        assert fixed and torch.get_num_threads() == 2
    assert kept == [[0, 2], [0, 1, 2, 3]] and torch.get_num_threads() == 1
    with machine.settled(2, False, lines.append) as fixed:
        assert not fixed
    assert len(kept) == 2 and lines == []
    with machine.settled(8, True, lines.append):
        assert lines == ["8 threads share 4 cores: expect times that spread"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system fixes no cores")
def test_every_thread_keeps_to_the_cores() -> None:
    allowed = machine.affinity()
    assert allowed is not None
    try:
        machine._keep_to(allowed[:1])
        assert {tuple(os.sched_getaffinity(task)) for task in machine._tasks()} == {(allowed[0],)}
    finally:
        machine._keep_to(allowed)
    assert machine.affinity() == allowed


def test_the_environment_says_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "cpu/cpu0/cache/index0/level": "1", "cpu/cpu0/cache/index0/type": "Data", "cpu/cpu0/cache/index0/size": "32K",
        "cpu/cpu0/cache/index3/level": "3", "cpu/cpu0/cache/index3/type": "Unified", "cpu/cpu0/cache/index3/size": "9M",
        "cpu/cpu0/cpufreq/scaling_governor": "powersave", "cpu/intel_pstate/no_turbo": "1",
        "cpu/cpu0/topology/thread_siblings_list": "0,2", "cpu/cpu2/topology/thread_siblings_list": "0,2",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "devices/system" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    (tmp_path / "fs/cgroup/memory.max").write_text("1024\n")
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2 avx512_vnni never_heard_of\n")
    monkeypatch.setattr(machine, "SYSTEM", tmp_path)
    monkeypatch.setattr(machine, "PROCESSES", tmp_path)
    found = machine.facts()
    assert found["instructions"] == ["avx2", "avx512_vnni"]
    assert found["caches"] == {"L1d": "32K", "L3": "9M"}
    assert (found["governor"], found["turbo"], found["memory_limit"]) == ("powersave", False, 1024)
    assert machine._physical([0, 1, 2]) == [0, 1, 2]
    assert machine._physical([2, 0, 1]) == [2, 1, 0]
    monkeypatch.setattr(machine, "SYSTEM", tmp_path / "nothing")
    monkeypatch.setattr(machine, "PROCESSES", tmp_path / "nothing")
    empty = machine.facts()
    assert [empty[k] for k in ("instructions", "caches", "governor", "turbo", "memory_limit")] == [None] * 5


def test_new_words_about_a_machine_do_not_part_files() -> None:
    now = results.environment("cpu", False)
    assert {"affinity", "instructions", "caches", "governor", "turbo", "kernel", "memory_limit", "format"} <= set(now)
    before = {k: v for k, v in now.items() if k not in {*machine.facts(), "format", "numpy", "triton"}}
    assert bench.Results(before, {}).same_environment({**now, "pinned": True})
    assert bench.Results({**now, "pinned": True}, {}).same_environment(before)
    assert not bench.Results({**now, "pinned": True}, {}).same_environment({**now, "pinned": False})
    assert not bench.Results(now, {}).same_environment({**now, "turbo": "on"})
    assert bench.Results(now, {}).same_environment({**now, "kernel": "another", "affinity": [7]})


@pytest.mark.skipif(not (HERE.parents[1] / "benchmarks" / "results").is_dir(), reason="not a checkout")
def test_the_committed_files_are_continued() -> None:
    """What parts two files is said in them as this cofire says it, so that a run on the same machine goes on with one."""
    here = {**results.environment("cpu", False), "pinned": True}
    for path in (HERE.parents[1] / "benchmarks" / "results").glob("*.json"):
        found = bench.Results.load(path)
        for name in found.environment.keys() & here.keys() - set(results.UNPARTED):
            told, now = found.environment[name], here[name]
            kind = str if isinstance(now, str) else type(now)
            assert None in (told, now) or isinstance(told, kind), f"{name} in {path.name}: {told!r}, here {now!r}"


# ------------------------------------------------------------------------------------------------------- noise


class Uneasy(Quiet):
    """Its looks are those that it is given, then quiet ones."""

    def __init__(self, *looks: float) -> None:
        self.given: list[float] = []
        super().__init__()
        self.given += looks

    def look(self) -> quiet.Look:
        now = {"core": self.given.pop(0) if self.given else 1.0}
        self.remember(now, 1)
        return now


def watched(*looks: float) -> quiet.Watch:
    """A round between each two looks."""
    watch = quiet.Watch(Uneasy(*looks))
    for rounds in range(len(looks)):
        watch.look(rounds)
    return watch


def test_rounds_count_between_two_usual_looks() -> None:
    assert watched(1.0, 1.05, 1.0, 1.2, 1.0, 1.0, 0.8, 1.0).quiet() == [0, 1, 4]
    assert watched(1.0, 3.0, 1.0).quiet() == []
    assert watched(*[1.0] * 9, 3.0).seen() == {"core": 1.0}
    assert watched(1.0, 3.0, 3.0).seen() == {"core": 3.0}, "too few rounds count: of all looks"


def test_what_is_usual_is_the_lower_quartile_of_each_piece() -> None:
    probe = quiet.Probe("cpu", {"core": lambda: 2.0, "memory": lambda: 1.0})
    probe.remember({"core": 1.0, "memory": 9.0}, probe.looks)
    assert probe.usual() == {"core": 1.0, "memory": 1.0}
    assert probe.strangeness({"core": 1.1, "memory": 0.5}) == 2, "quicker than usual is strange too"
    assert probe.strangeness({}) == 1


def test_the_state_of_the_memory_does_not_count_for_what_stays_in_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "caches", lambda: {"L1d": "32K", "L2": "1M", "L3": "32768K"})
    assert machine.cache_bytes() == {"L1d": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}
    assert quiet.unfelt(1 << 20) == {"cache", "memory"} and quiet.unfelt((1 << 20) + 1) == {"memory"}
    assert quiet.unfelt(16 << 20) == {"memory"} and quiet.unfelt((16 << 20) + 1) == set()
    assert quiet.unfelt(0, "cuda") == set()
    probe = quiet.Probe("cpu", {"core": lambda: 1.0, "memory": lambda: 1.0})
    assert probe.strangeness({"core": 1.0, "memory": 2.0}, besides={"memory"}) == 1
    row = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "probe": {"core": 1.0, "memory": 2.0}}
    rows = [
        row | {"unfelt": ["memory"]},
        row,
        row | {"unfelt": []},
        row | {"unfelt": ["memory"], "probe": {"core": 2.0, "memory": 1.0}},
    ]
    harness.mark_noise(rows, probe)
    assert [r["flagged"] for r in rows] == [False, True, True, True]
    monkeypatch.setattr(machine, "caches", lambda: None)
    assert quiet.unfelt(0) == {"cache", "memory"} and quiet.unfelt(1) == set(), "a machine that tells nothing"


def test_what_a_row_holds_decides_what_it_does_not_feel(three: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "caches", lambda: {"L2": "1M", "L3": "8192K"})
    case, row = three[0], {"bytes": 9, "device": "cpu", "mode": "forward"}
    assert harness._unfelt(case, row) == {"cache", "memory"}
    assert harness._unfelt(case, row | {"peak_bytes": 2 << 20}) == {"memory"}
    assert harness._unfelt(case, row | {"peak_bytes": 5 << 20}) == set()
    packed = dataclasses.replace(case, cold=(0,))
    assert harness._unfelt(packed, row) == set(), "of a packed weight others may hold more than its bytes"
    assert harness._unfelt(packed, row | {"mode": "overhead"}) == {"cache", "memory"}


@pytest.mark.parametrize(
    ("caches", "cache"),
    [
        ({"L2": "1M", "L3": "32768K"}, True),
        ({"L2": "1M", "L3": "4096K"}, False),
        ({"L2": "1M"}, False),
        (None, False),
    ],
)
def test_the_probe_times_what_calls_may_wait_for(
    caches: dict[str, str] | None, cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "caches", lambda: caches)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    probe = quiet.Probe("cpu")
    parts = {"threads", "core", "exchange", "memory"} | ({"cache"} if cache else set())
    assert set(probe.usual()) == parts and probe.looks == quiet.CALIBRATION
    assert all(ms > 0 for ms in probe.look().values())


def test_short_pieces_are_timed_more_often() -> None:
    short, long = iter([0.2] * 5 + [0.1]), iter([2.0, 1.0, 2.0])
    probe = quiet.Probe.__new__(quiet.Probe)
    probe.work = {"short": lambda: next(short), "long": lambda: next(long)}
    probe.looks, probe._ordered = 0, {"short": [], "long": []}
    assert probe.look() == {"short": 0.1, "long": 1.0}


def test_all_rounds_count_where_too_few_are_quiet() -> None:
    assert quiet.counted([1, 2, 3, 5, 8, 9], 9) == ([1, 2, 3, 5, 8], True)
    assert quiet.counted([1, 2, 3, 5, 8, 9], 6) == ([0, 1, 2, 3, 4, 5], False)
    assert quiet.counted([0, 1, 2], 3) == ([0, 1, 2], True), "there were no more"
    assert quiet.counted([1, 2], 3) == ([0, 1, 2], False)


def test_a_case_goes_on_until_enough_rounds_were_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "SEGMENT_SECONDS", 0.0)
    calls: list[int] = []
    read = functools.partial(harness.read_in_turns, {"x": lambda: calls.append(1)}, "cpu", 0.0, 8, 8)
    watch = quiet.Watch(Uneasy(*[1.0] * 3, *[2.0] * 5))
    readings = read(watch=watch, extra_seconds=60.0)["x"]
    assert len(watch.quiet()) == 8 and len(readings) == 14, "two at first, six beside a strange look, six"
    watch = quiet.Watch(Uneasy(*[2.0, 1.0] * 9999))
    assert 8 <= len(read(watch=watch, extra_seconds=0.0)["x"]) < 9999 and watch.quiet() == [], (
        "it does not go on for ever"
    )


def test_rows_say_what_the_probe_said(three: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "SEGMENT_SECONDS", 60.0)  # a look before and one after
    probe = Uneasy(1.0, 1.0, 1.0, 2.0, 2.0)
    monkeypatch.setattr(harness, "Probe", lambda device: probe)
    found = bench.run(out=tmp_path / "r.json", progress=False)
    by_case = {r["case"]: r for r in found.rows if r["provider"] == "cofire"}
    assert [by_case[c]["flagged"] for c in "abc"] == [False, True, False]
    assert by_case["b"]["noisy"] and by_case["b"]["quiet_rounds"] == 0 and by_case["a"]["quiet_rounds"] >= 3
    assert by_case["b"]["probe_before"] == {"core": 1.0} and by_case["b"]["probe_after"] == {"core": 2.0}
    assert found.noise().startswith(f"{sum(r['noisy'] for r in found.rows)} of 6 rows are noisy")
    assert "close what else runs, then cofire bench --op channel_pool measures them again" in found.noise()
    for row in found.rows:
        row["noisy"] = False
    assert found.noise() == "0 of 6 rows are noisy"


# ------------------------------------------------------------------------------------------- files in the way


def good() -> dict[str, Any]:
    row = dict.fromkeys(results.COLUMNS, "x") | dict.fromkeys(results.NUMBERS, 1.0) | {"correct": True, "noisy": False}
    environment = {"device": "CPU", "kind": "cpu", "threads": 2, "torch": "2", "format": results.FORMAT}
    return {"environment": environment, "ceilings": copy.deepcopy(CEILINGS), "rows": [row]}


def broken(change: Callable[[dict[str, Any]], Any]) -> str:
    data = good()
    change(data)
    return json.dumps(data)


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "truncated": (json.dumps(good())[:-40], "is cut off in line 1; measure again with cofire bench, or fetch"),
    "truncated in a word": (json.dumps(good())[:30], "is cut off in line 1"),
    "empty": ("", "is empty; measure again"),
    "binary": (b"\x89PNG\xff\xfe", "is not a results file: it is not text; name a file of cofire bench"),
    "text": ("# A page\n\nof words.", "is not a results file: no JSON at line 1, column 1; name a file"),
    "list": ("[1, 2]", "is not a results file (environment, ceilings, rows); name a file"),
    "foreign": ('{"name": "package"}', "is not a results file (environment, ceilings, rows); name a file"),
    "half": (broken(lambda d: d.pop("ceilings")), "it lacks ceilings of environment, ceilings, rows; name a file"),
    "kinds": (broken(lambda d: d.update(rows={})), "rows is dict, expected list"),
    "columns": (
        broken(lambda d: d["rows"][0].pop("peak_bytes")),
        "was written by an older cofire or by another program: row 0 lacks peak_bytes; measure again with cofire bench",
    ),
    "row": (broken(lambda d: d["rows"].append(3)), "row 1 lacks family, op"),
    "numbers": (broken(lambda d: d["rows"][0].update(p20_ms="fast")), "row 0 has p20_ms='fast', expected a number"),
    "environment": (broken(lambda d: d["environment"].pop("torch")), "its environment lacks torch; measure again"),
    "ceilings": (broken(lambda d: d["ceilings"].pop("copy_gbs")), "its ceilings lack copy_gbs; measure again"),
    "speeds": (
        broken(lambda d: d["ceilings"]["conv_gflops"].pop("bfloat16")),
        "its ceilings lack conv_gflops float32 bfloat16; measure again",
    ),
    "newer": (
        broken(lambda d: d["environment"].update(format=99)),
        "was written by a newer cofire (it is of format 99); install that one to read it",
    ),
    "newer parts": (broken(lambda d: d.update(power={})), "was written by a newer cofire (it has power)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_gets_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    text, sentence = BROKEN[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:  # noqa: PT011
        bench.Results.load(path)
    assert str(error.value).startswith(f"bench: {path} ") and sentence in str(error.value)
    said = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path)])
    assert said.exit_code == 2 and f"cofire: bench: {path}" in said.output.replace("\n", "")


def test_a_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(good()))
    assert bench.Results.load(path).to_json() == good()
    path.write_text(broken(lambda d: d.update(ceilings={})))
    assert bench.Results.load(path).ceilings == {}, "as cofire bench-growth writes them"


def test_no_file_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no results file .*none\.json; cofire bench writes one"):
        bench.Results.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); name a file of cofire bench"):
        bench.Results.load(tmp_path)
    said = CliRunner().invoke(app, ["bench-agree", str(tmp_path / "none.json"), str(tmp_path / "none.json")])
    assert said.exit_code == 2 and "cofire bench writes one" in said.output


def test_a_broken_file_is_moved_aside(three: list[Case], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for number, end in enumerate(["broken", "broken-2"]):
        path.write_text(f"{{ {number}")
        found, lines = run_lines(path)
        assert len(found.rows) == 6
        assert (tmp_path / f"r.json.{end}").read_text() == f"{{ {number}"
        assert (
            f"is cut off in line 1; measure again with cofire bench, or fetch the file again. It is now {path}"
            in lines[0]
        )
    assert sorted(os.listdir(tmp_path)) == ["r.json", "r.json.broken", "r.json.broken-2"]


@pytest.mark.parametrize("name", ["list", "half", "columns", "environment", "newer", "newer parts"])
def test_a_file_of_another_kind_or_cofire_stays(name: str, three: list[Case], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    text, sentence = BROKEN[name]
    assert isinstance(text, str)
    path.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        bench.run(out=path, progress=False)
    assert sentence in str(error.value) and str(error.value).endswith(
        ". It stays as it is: move it away, or write to another file"
    )
    assert path.read_text() == text and os.listdir(tmp_path) == ["r.json"]


def test_a_file_that_cannot_be_read_stays(three: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "r.json", Path.read_text
    path.write_text(json.dumps(good()))

    def read_text(self: Path, *args: Any, **options: Any) -> str:
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        with pytest.raises(
            ValueError, match=r"r\.json cannot be read \(Permission denied\).* It stays as it is: move it"
        ):
            bench.run(out=path, progress=False)
    assert json.loads(path.read_text()) == good() and os.listdir(tmp_path) == ["r.json"]


def test_a_folder_in_the_way_is_an_error(three: list[Case], tmp_path: Path) -> None:
    (tmp_path / "r.json").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        bench.run(out=tmp_path / "r.json", progress=False)


def test_results_of_other_conditions_are_moved_aside(three: list[Case], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first, _ = run_lines(path)
    bench.Results({**first.environment, "torch": "0.1"}, CEILINGS, first.rows).save(path)
    before = path.read_text()
    _, lines = run_lines(path)
    assert (tmp_path / "r.json.earlier").read_text() == before
    assert (
        f"was measured under other conditions (torch 0.1 there, {torch.__version__} here): it is now {path}.earlier"
        in lines[0]
    )


def test_amx_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    for has, said in ((["avx2", "amx_tile"], f"{capability} AMX"), (["avx2"], capability), (None, capability)):
        monkeypatch.setattr(results, "instructions", lambda has=has: has)
        assert results.instruction_set() == said


def test_two_machines_of_one_name_have_a_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "device_name", lambda device: "Some CPU")
    monkeypatch.setattr(results, "instruction_set", lambda: "AVX9 TILES")
    assert results.results_path().name == "some-cpu-1-threads.json"
    for has, name in (("AVX9 TILES", "some-cpu-1-threads.json"), ("AVX9", "some-cpu-avx9-tiles-1-threads.json")):
        data = good()
        data["environment"]["instruction_set"] = has
        (tmp_path / "some-cpu-1-threads.json").write_text(json.dumps(data))
        assert results.results_path().name == name
    for cache, name in (("512K", "some-cpu-1-threads.json"), ("1024K", "some-cpu-avx9-tiles-1-threads.json")):
        monkeypatch.setattr(results, "caches", lambda cache=cache: {"L1d": "32K", "L2": cache})
        data["environment"] |= {"instruction_set": "AVX9 TILES", "caches": {"L2": "512K"}}
        (tmp_path / "some-cpu-1-threads.json").write_text(json.dumps(data))
        assert results.results_path().name == name
    (tmp_path / "some-cpu-avx9-tiles-1-threads.json").write_text(json.dumps(data))
    assert results.results_path().name == "some-cpu-avx9-tiles-l2-1024k-1-threads.json"
    monkeypatch.setattr(results, "caches", lambda: None)  # it does not say
    assert results.results_path().name == "some-cpu-1-threads.json"


def test_nothing_is_overwritten_by_moving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("this file system has no links")

    for i, link in enumerate((os.link, refuse)):
        monkeypatch.setattr("cofire.files.os.link", link)
        for text in "ab":
            (tmp_path / str(i)).write_text(text)
            move_aside(tmp_path / str(i), "old")
        assert [(tmp_path / f"{i}.{end}").read_text() for end in ("old", "old-2")] == ["a", "b"]
        assert not (tmp_path / str(i)).exists()


# --------------------------------------------------------------------------------------------------- agreement


def times(*values: float, flagged: int | None = None, **environment: Any) -> bench.Results:
    data = good()
    rows = [{**data["rows"][0], "case": str(i), "median_ms": v, "speedup": 2.0} for i, v in enumerate(values)]
    for i, row in enumerate(rows):
        row["flagged"] = i == flagged
    return bench.Results({**data["environment"], **environment}, CEILINGS, rows)


def test_agreement() -> None:
    found = bench.agreement(times(*[1.0] * 10), times(*[1.09] * 9, 3.0))
    assert found.share() == 0.9 and found.enough and found.flagged == 0 and found.share("speedup") == 1
    text = found.text(1)
    assert "90.0 % of the times agree within 10 %" in text and "100.0 % of the speed-ups agree" in text
    assert text.splitlines()[-1].startswith("   3.00x  1 and 3 ms  x, 9,")
    assert not bench.agreement(times(*[1.0] * 10), times(*[1.09] * 8, 3.0, 3.0)).enough
    assert bench.agreement(times(*[1.0] * 10), times(*[1.09] * 9, 3.0, flagged=9)).share() == 1
    assert bench.agreement(times(*[1.0] * 10, flagged=9), times(*[1.09] * 9, 3.0)).flagged == 1
    assert bench.agreement(times(1.0), times(1.5), within=0.5).enough
    old = times(1.0, 1.0)
    for row in old.rows:
        del row["flagged"]
    old.rows[1]["noisy"] = True
    assert bench.agreement(old, times(1.0, 3.0)).share() == 1, "of an older file the noisy rows are left out"
    apart = bench.agreement(times(1.0), times(1.0, torch="3")).text()
    assert "the environments differ: torch 2 and 3" in apart


def test_nothing_to_compare_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="nothing to compare: no row is in both"):
        bench.agreement(times(1.0), times())
    with pytest.raises(ValueError, match="nothing to compare: 1 are in both, all flagged as noisy"):
        bench.agreement(times(1.0, flagged=0), times(1.0))
    with pytest.raises(ValueError, match=r"within must be above 0, got 0"):
        bench.agreement(times(1.0), times(1.0), within=0)


def test_bench_agree(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.json") for i in range(3)]
    for path, last in zip(paths, (1.0, 1.05, 2.0)):
        times(1.0, last).save(path)
    said = CliRunner().invoke(app, ["bench-agree", *paths[:2]])
    assert said.exit_code == 0 and "100.0 % of the times agree within 10 %" in said.output
    assert CliRunner().invoke(app, ["bench-agree", paths[0], paths[2]]).exit_code == 1
    assert CliRunner().invoke(app, ["bench-agree", paths[0], paths[2], "--within", "100"]).exit_code == 0
    said = CliRunner().invoke(app, ["bench-agree", *paths[:2], "--within", "-1"])
    assert said.exit_code == 2 and "within must be above 0, got -0.01" in said.output


# ------------------------------------------------------------------------------------------------ the quick run


@pytest.mark.parametrize("family", bench.families())
def test_every_operator_has_a_quick_case(family: str) -> None:
    every = suite.of_family(family)
    assert {c.op for c in every} == {c.op for c in every if c.quick}


def test_the_modes_of_a_case_share_its_input(
    three: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "cold_bytes", lambda device: 0)
    made: list[str] = []
    references: list[str] = []

    def counted(rand: Random) -> tuple[Tensor, str]:
        made.append("args")
        return args(rand)

    def reference(x: Tensor, mode: str) -> tuple[Tensor, ...]:
        references.append(str(x.dtype))
        from cofire.registry import OPERATORS

        return tuple(OPERATORS["channel_pool"].reference(x, mode))

    three[:] = [replace(case_named("a"), make_args=counted, cold=(0,), gradients=(0,), reference=reference)]
    bench.run(out=tmp_path / "r.json", progress=False, providers=["cofire"])
    assert made == ["args"], "forward, cold and backward"
    assert references.count("torch.float64") == 1, "with gradients, for all modes"


def test_a_slow_call_is_warmed_up_but_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SLOW_MS", 1.0)
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.004)

    harness.read_in_turns({"slow": slow, "fast": lambda: calls.append("fast")}, "cpu", 0.0, 7, 9, slow_rounds=3)
    assert calls.count("slow") == 2 + 3


def test_a_variant_that_is_far_behind_is_not_timed_again() -> None:
    calls: list[str] = []

    def waiting(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            time.sleep(seconds)

        return call

    runs = {"fast": waiting("fast", 0.002), "near": waiting("near", 0.003), "far": waiting("far", 0.02)}
    times = harness._rank(runs, "cpu", 0.0)
    assert times["fast"] < times["near"] < times["far"]
    assert calls.count("far") == 4 < calls.count("near")


def test_answers_are_compared_entry_by_entry() -> None:
    """In blocks, and whatever the memory layout."""
    n = harness.COMPARED + 5
    exact = torch.zeros(n, dtype=torch.float64)
    for at, value, said in ((n - 1, 1.0, 1.0), (0, -2.0, 2.0)):
        got = torch.zeros(n)
        got[at] = value
        assert harness._furthest(got, exact) == said
        assert harness._largest(got) == said
        assert "is off by" in str(harness.disagreement(got, exact, [exact.float()], torch.float32))
    got[7] = float("nan")
    assert "is off by nan" in str(harness.disagreement(got, exact, [exact.float()], torch.float32))
    image = torch.arange(2.0 * 3 * 5 * 7).view(2, 3, 5, 7)
    assert harness._furthest(image.contiguous(memory_format=torch.channels_last), image.double()) == 0


def test_what_plain_answers_lose_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = harness.Input(case_named("a"), "cpu")
    assert given.check(plain(mean, outputs=1), "forward") is None
    answers = given._answers(given.reference, "forward")
    assert list(answers._lost) == [0], "of the outputs that were compared"
    picked = answers.pick([0])
    monkeypatch.setattr(harness, "_furthest", lambda *_: pytest.fail("worked out again"))
    assert picked.lost(0) == answers._lost[0]
