# SPDX-License-Identifier: Apache-2.0
"""gpu-check without a GPU: its time limits and its memory on made-up slices, and a dry run of the real ones."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cofire import gpu_check
from cofire.bench import ceilings, cuda_timing, harness
from cofire.bench.cases import Case, Provider, of_family, plain
from cofire.bench.results import Results
from cofire.cli import app
from cofire.gpu_check import command, plan, recorder, runner, steps, summary
from cofire.gpu_check.journal import Journal
from cofire.gpu_check.plan import Slice
from helpers import LAYOUTS, moved

ROOT = Path(__file__).parents[1]
#: What a made-up slice begins with: how it notes an item. (Without cofire, whose import takes seconds.)
NOTE = """
import json, os, sys, time
def note(**record):
    record = {"part": os.environ["COFIRE_GPU_CHECK_SLICE"].partition("/")[0],
              "slice": os.environ["COFIRE_GPU_CHECK_SLICE"], **record}
    with open(os.environ["COFIRE_GPU_CHECK_JOURNAL"], "a") as file:
        file.write(json.dumps(record) + "\\n")
def ended():
    lines = [json.loads(line) for line in open(os.environ["COFIRE_GPU_CHECK_JOURNAL"])]
    mine = [r for r in lines if r.get("slice") == os.environ["COFIRE_GPU_CHECK_SLICE"] and "item" in r]
    return {r["item"] for r in mine if r["event"] != "start"}
"""


def made_up(part: str, name: str, code: str, seconds: float = 30, **options: Any) -> Slice:
    return Slice(part, name, (sys.executable, "-S", "-c", NOTE + code), seconds, **options)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "gpu"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.01)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


def run(out: Path, slices: list[Slice], seconds: float = 30.0) -> dict[str, Any]:
    journal = Journal.open(out)
    made = runner.Runner(journal, command.environment(out, False, False), out / "logs", out)
    made.run(slices, seconds)
    return summary.summarize(slices, journal, False)


def outcomes(found: dict[str, Any]) -> dict[str, str]:
    return {r["slice"]: r["outcome"] for r in found["slices"]}


ITEMS = """
for item in ("one", "two", "three"):
    if item not in ended():
        note(item=item, event="start")
        %s
        note(item=item, event="passed")
"""


def test_a_slice_that_fails_does_not_stop_the_others(out: Path) -> None:
    slices = [
        made_up("tests", "bad", "print('it broke'); sys.exit(1)"),
        made_up("tests", "not_here", "print('no such thing here'); sys.exit(3)"),
        made_up("tests", "good", ITEMS % "pass"),
    ]
    found = run(out, slices)
    assert outcomes(found) == {"tests/bad": "failed", "tests/not_here": "skipped", "tests/good": "passed"}
    assert [r["note"] for r in found["slices"]] == ["it broke", "no such thing here", ""]
    assert found["slices"][2]["passed"] == 3
    assert found["complete"] and not found["passed"]


def test_an_item_that_hangs_is_killed_and_set_aside_and_the_rest_goes_on(out: Path) -> None:
    slow = made_up("tests", "slow", ITEMS % "time.sleep(60 if item == 'two' else 0)", stall=2.0, resumes=True)
    begun = time.monotonic()
    found = run(out, [slow])
    assert time.monotonic() - begun < 40
    row = found["slices"][0]
    assert (row["outcome"], row["passed"], row["failed"], row["note"]) == ("failed", 2, 1, "1 failed")
    assert found["failures"] == [
        {"slice": "tests/slow", "item": "two", "event": "hung", "note": "no answer within 2 s"}
    ]


def test_what_a_slice_started_ends_with_it(out: Path) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    found = run(out, [made_up("build", "", code, seconds=0.5)])
    assert outcomes(found) == {"build": "timed out"} and found["slices"][0]["note"] == "0.5 s were not enough"
    child = Path("/proc") / (out / "logs" / "build.log").read_text().strip()
    deadline = time.monotonic() + 5
    while child.exists() and "Z" not in (child / "stat").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists() or ") Z " in (child / "stat").read_text()


def test_a_crash_costs_the_item_that_it_happened_in(out: Path) -> None:
    found = run(out, [made_up("tests", "", ITEMS % "os.kill(os.getpid(), 11) if item == 'two' else None")])
    assert [f["note"] for f in found["failures"]] == ["the process ended with signal SIGSEGV"]
    assert found["slices"][0]["passed"] == 2


def test_a_crash_outside_of_an_item_is_a_failure_of_the_slice(out: Path) -> None:
    found = run(out, [made_up("tests", "", "os.kill(os.getpid(), 9)")])
    assert outcomes(found) == {"tests": "failed"}
    assert found["slices"][0]["note"] == "ended with signal SIGKILL"


def test_a_lost_context_starts_a_new_process(out: Path) -> None:
    code = ITEMS % "item == 'two' and (note(item=item, event='failed', note='illegal'), os._exit(70))"
    found = run(out, [made_up("tests", "", code)])
    assert (found["slices"][0]["passed"], found["slices"][0]["failed"]) == (2, 1)


def test_the_next_call_does_what_the_time_did_not_suffice_for(out: Path) -> None:
    slices = [
        made_up("tests", "long", ITEMS % "time.sleep(0.0 if item == 'one' or os.path.exists('again') else 60)", resumes=True),
        made_up("benchmarks", "short", ITEMS % "pass"),
    ]  # fmt: skip
    found = run(out, slices, seconds=5)
    assert outcomes(found) == {"tests/long": "cut", "benchmarks/short": "passed"}, "a part has its share alone"
    assert not found["complete"]
    assert "the same command goes on" in summary.lines(found)[-1]
    (out / "again").touch()
    found = run(out, slices)
    assert outcomes(found) == {"tests/long": "passed", "benchmarks/short": "passed"}
    assert found["slices"][0]["passed"] == 3 and found["passed"]


def test_a_part_has_its_share_of_the_time() -> None:
    slices = [Slice(part, "", (), 1) for part in ("tests", "tiles", "benchmarks")]
    assert runner.share(slices, "tests") == pytest.approx(8 / 20)
    assert runner.share(slices[1:], "tiles") == pytest.approx(4 / 12)
    assert runner.share(slices[2:], "benchmarks") == 1


def test_nothing_is_begun_in_too_little_time(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LEAST_SECONDS", 10.0)
    found = run(out, [made_up("tests", "", "pass")], seconds=5)
    assert outcomes(found) == {"tests": "not begun"} and not (out / "logs").exists()


def test_logs_are_kept_short(out: Path) -> None:
    run(out, [made_up("tests", "", "print('x' * 1000000); print('the end')")])
    text = (out / "logs" / "tests.log").read_text()
    assert len(text) < 210_000 and text.endswith("the end\n")


# ------------------------------------------------------------------------------------------------- the journal


def test_half_a_line_of_a_killed_process_is_dropped(out: Path) -> None:
    Journal.open(out).write(part="tests", slice="tests", item="a", event="passed")
    with (out / "journal.jsonl").open("a") as file:
        file.write('{"part": "tests", "sl')
    journal = Journal.open(out)
    journal.write(part="tests", slice="tests", item="b", event="passed")
    assert list(journal.items("tests")) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1, 2]\n", "is not a journal of gpu-check (it has a line 1 that says no event); delete it to begin anew"),
        ("\x00\x01\n", "is not a journal of gpu-check (it has a line 1 that is no JSON)"),
        ("", "is not a journal of gpu-check (it does not begin with its format)"),
        ('{"event": "passed"}\n', "is not a journal of gpu-check (it does not begin with its format)"),
        ('{"event": "format", "format": 9}\n', "has format 9, and this cofire reads 1; name another folder with --out"),
    ],
)
def test_a_broken_journal_gives_a_sentence(out: Path, text: str, sentence: str) -> None:
    out.mkdir()
    (out / "journal.jsonl").write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Journal.open(out)
    said = CliRunner().invoke(app, ["gpu-check", "--dry-run", "--part", "ceilings", "--out", str(out)])
    assert said.exit_code == 2 and sentence in said.output


def test_compacting_keeps_the_last_word(out: Path) -> None:
    journal = Journal.open(out)
    for event in ("start", "failed", "start", "passed"):
        journal.write(part="tests", slice="tests/a", item="one", event=event)
    journal.write(part="tests", slice="tests/a", event="plan", total=1)
    journal.write(part="tests", slice="tests/a", event="cut")
    journal.write(part="tests", slice="tests/a", item="two", event="start")
    journal.compact()
    assert journal.items("tests")["one"]["event"] == "passed" and "two" not in journal.items("tests")
    assert journal.totals() == {"tests/a": 1} and journal.slices()["tests/a"]["event"] == "cut"
    assert len(journal.records()) == 3


def test_retry_forgets_failures_alone(out: Path) -> None:
    journal = Journal.open(out)
    journal.write(part="tests", slice="tests/a", item="good", event="passed")
    journal.write(part="tests", slice="tests/a", item="bad", event="hung")
    journal.write(part="tests", slice="tests/a", event="failed")
    journal.write(part="tests", slice="tests/b", event="passed")
    journal = command._begin(out, False, True, False)
    assert list(journal.items("tests")) == ["good"] and "tests/b" in journal.slices()
    assert "tests/a" not in journal.slices()


def test_a_dry_run_and_a_real_one_do_not_share_a_folder(out: Path) -> None:
    command._begin(out, True, False, False)
    with pytest.raises(ValueError, match="holds a dry run, and this is a real one; name another folder with --out, or"):
        command._begin(out, False, False, False)
    assert command._begin(out, False, False, True).records()[0]["dry"] is False


# ---------------------------------------------------------------------------------------------------- the plan


def test_every_family_has_tests_and_benchmarks_that_need_a_gpu() -> None:
    names = [str(s) for s in plan.plan()]
    for family in {o.family for o in plan.OPERATORS.values()}:
        assert f"tests/{family}" in names and f"benchmarks/{family}-quick" in names, family
    assert names.index("tests/first") < names.index("tests/lowbit") < names.index("tests/selection")
    assert names.index("benchmarks/selection-quick") < names.index("benchmarks/lowbit-all")
    assert list(dict.fromkeys(s.part for s in plan.plan())) == list(plan.PARTS)


def test_files_belong_to_the_family_of_their_operators() -> None:
    files = {file.name: family for family, found in plan.gpu_test_files(ROOT).items() for file in found}
    assert files["test_fake_quantize.py"] == files["test_lowbit_cuda.py"] == "lowbit"
    assert files["test_kv_fusion_masked.py"] == "kv_fusion" and files["test_sparse_refine.py"] == "sparse"
    assert "test_aot.py" not in files


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--part", "test"], "gpu-check: no part is called 'test'; did you mean 'tests'"),
        (["--family", "gate"], "gpu-check: no family is called 'gate'; did you mean 'gating'"),
        (["--seconds", "0"], "gpu-check: seconds must be positive, got 0"),
        ([], "gpu-check: torch sees no NVIDIA GPU here; --dry-run does everything but the launches"),
    ],
)
def test_bad_input_gives_a_sentence(
    out: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = CliRunner().invoke(app, ["gpu-check", "--out", str(out), *options])
    assert said.exit_code == 2 and sentence in said.output and not out.exists()
    assert gpu_check.main(["--out", str(out), *options]) == 2, "and without typer"
    assert sentence in capsys.readouterr().err


def test_list_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert [line.partition(":")[0] for line in said.splitlines()] == list(plan.PARTS)
    assert "[first, lowbit, gating," in said


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    (tests,) = plan.plan(["tests"])
    assert tests.command[-1] == "pytest is not installed: pip install pytest"
    monkeypatch.setattr(plan, "checkout", lambda: None)
    assert plan.plan(["tests"])[0].command[-1] == "the tests are in a checkout, and cofire is installed"


# --------------------------------------------------------------------------------------------------- the steps


@pytest.fixture
def context(out: Path) -> steps.Context:
    return steps.Context(out, Journal.open(out), "benchmarks/made-up", True)


def test_an_item_that_raises_is_a_failure_and_the_others_go_on(context: steps.Context) -> None:
    def work(item: str) -> str | None:
        if item == "a":
            raise RuntimeError("no luck")
        return "wrong" if item == "b" else None

    context.each(["a", "b", "c"], work)
    found = context.journal.items("benchmarks")
    assert {name: (r["event"], r.get("note")) for name, r in found.items()} == {
        "a": ("failed", "RuntimeError: no luck"),
        "b": ("failed", "wrong"),
        "c": ("passed", None),
    }
    context.each(["a", "b", "c"], lambda item: pytest.fail("it was done"))


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("compiler", "no C++ compiler (no-such-compiler): on the CPU the reference serves"),
        ("setuptools", "setuptools is not installed: on the CPU the reference serves"),
        (
            "ninja",
            "ninja is not installed, and without it the build would take too long: on the CPU the reference serves",
        ),
        ("checkout", "cofire is installed: it is built already, or without compiled kernels"),
    ],
)
def test_a_build_that_cannot_be_says_why(
    context: steps.Context, missing: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = steps.shutil.which("c++") or sys.executable
    monkeypatch.setattr(
        steps.shutil, "which", lambda name: there if name not in ("no-such-compiler", missing) else None
    )
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None if name == missing else name)
    if missing == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    if missing == "checkout":
        monkeypatch.setattr(steps, "checkout", lambda: None)
    with pytest.raises(steps.NotHereError, match=re.escape(sentence)):
        steps.build(context)


@pytest.mark.parametrize("fault", ["none", "setup", "compiler"])
def test_a_dry_build_asks_setup_and_the_compiler(
    context: steps.Context, fault: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []

    def answer(call: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(call)
        code = int({"setup": "setup.py", "compiler": "-fsyntax-only", "none": "?"}[fault] in call)
        return subprocess.CompletedProcess(call, code, stdout="cofire\n", stderr="it broke\n")

    monkeypatch.setattr(steps.subprocess, "run", answer)
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(steps.shutil, "which", lambda name: name)
    if fault == "none":
        steps.build(context)
        assert "the compiler takes csrc/host.cpp" in capfd.readouterr().out
    else:
        with pytest.raises(
            SystemExit, match={"setup": "setup.py does not run", "compiler": "refuses csrc/host"}[fault]
        ):
            steps.build(context)
    assert not any("build_ext" in call for call in calls)
    assert len(calls) == (1 if fault == "setup" else 2)


@pytest.mark.full
def test_a_dry_build(context: steps.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    root = steps.checkout()
    assert root is not None
    steps.build(context)
    monkeypatch.setenv("CXX", f"{steps.compiler()} -include no-such-header.h")
    with pytest.raises(SystemExit, match="the compiler refuses csrc/host.cpp"):
        steps.dry_build(root)


def test_a_dry_run_compiles_a_kernel_of_each_family() -> None:
    families = {o.family for o in plan.OPERATORS.values()}
    assert {plan.OPERATORS[name].family for name in steps.FEW} == families and len(steps.FEW) == len(families)


# --------------------------------------------------------------------------------------------- a dry run of a case


def pooled(x: torch.Tensor, mode: str) -> tuple[torch.Tensor]:
    return (x.mean((2, 3)),)


def raising(words: str) -> Any:
    def setup(*args: Any) -> Any:
        raise RuntimeError(words)

    return Provider(setup, outputs=1)


def pool_case(**providers: Any) -> Case:
    def args(rand: Any, n: int) -> tuple[torch.Tensor, str]:
        return rand.normal(n, 3, 4, 4), "avg"

    every = {"dense": plain(pooled, outputs=1), **providers}
    large = lambda rand: pytest.fail("a dry run has small inputs alone")  # noqa: E731
    return Case(
        "channel_pool", "made up", torch.float32, large, every, lambda rand: args(rand, 2), family="gating", cold=(0,)
    )


@pytest.fixture
def rehearsal(out: Path, monkeypatch: pytest.MonkeyPatch) -> steps.Rehearsal:
    rates = {"float32": 1.0, "bfloat16": 1.0}
    table = {"copy_gbs": {"1": 1.0}, "read_gbs": {"1": 1.0}, "gemm_gflops": rates, "conv_gflops": rates}
    monkeypatch.setattr(ceilings, "measure", lambda *_: table)
    return steps.Rehearsal(out / "dry")


def test_a_dry_run_goes_through_the_harness_into_a_file(rehearsal: steps.Rehearsal) -> None:
    before = harness.cold_bytes
    assert rehearsal.case(pool_case()) is None
    assert harness.cold_bytes is before
    rows = Results.load(rehearsal.path).rows
    assert {(r["provider"], r["mode"]) for r in rows} == {
        (name, mode) for name in ("cofire", "dense") for mode in ("forward", "forward, cold")
    }
    assert all(r["correct"] and r["median_ms"] > 0 and r["percent_of_ceiling"] > 0 for r in rows)
    assert steps.Rehearsal(rehearsal.folder).results.rows == rows, "a second call goes on"


def test_a_dry_run_draws_a_report(rehearsal: steps.Rehearsal) -> None:
    case = next(c for c in of_family("gating") if c.op == "channel_pool" and c.overhead)
    assert rehearsal.case(replace(case, make_args=lambda rand: pytest.fail("small inputs alone"))) is None
    rows = Results.load(rehearsal.path).rows
    assert {r["mode"] for r in rows} == set(case.modes) and "compile" not in {r["provider"] for r in rows}
    assert rehearsal.report() is None
    assert "channel_pool" in (rehearsal.folder / "report" / "benchmarks-gating.md").read_text()
    rehearsal.results.rows.append({**rows[0], "op": "no_such_operator"})
    assert rehearsal.report() == "the report lacks no_such_operator"


@pytest.mark.parametrize("name", ["dense", "eager", "peer:made-up"])
def test_a_fault_of_any_provider_is_one_of_the_dry_run(name: str, rehearsal: steps.Rehearsal) -> None:
    def zero(x: torch.Tensor, mode: str) -> tuple[torch.Tensor]:
        return (x.new_zeros(x.shape[:2]),)

    fault = rehearsal.case(pool_case(**{name: raising("no such thing\nin line two")}))
    assert f"forward, {name}: RuntimeError: no such thing" in str(fault)
    fault = rehearsal.case(pool_case(**{name: {"good": plain(pooled, outputs=1), "zero": plain(zero, outputs=1)}}))
    assert f"forward, {name}: zero: output 0 is off by" in str(fault)
    assert rehearsal.case(pool_case(**{name: raising("bfloat16 needs the cpu support of avx512")})) is None


def test_providers_of_a_gpu_alone_are_made_too(rehearsal: steps.Rehearsal) -> None:
    for words, found in (("of a typing error", True), ("Torch not compiled with CUDA enabled", False)):
        of_gpu = replace(raising(words), devices=("cuda",))
        fault = rehearsal.case(pool_case(**{"peer:of a GPU": of_gpu}))
        assert (f"forward, peer:of a GPU : RuntimeError: {words}" in str(fault)) == found


def test_commands_of_other_parts_are_called_by_name(context: steps.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(steps.NotHereError, match="this cofire has no command bench-nothing"):
        steps.command(context, "bench-nothing")
    with pytest.raises(steps.NotHereError, match="a dry run measures nothing"):
        steps.command(context, "bench-growth")
    for module in steps.COMMANDS.values():
        run = importlib.import_module(f"cofire.bench.{module}").run
        assert {"out", "device", "progress", "announce"} <= set(inspect.signature(run).parameters)
        compile(steps.COMMAND.format(module=module), module, "exec")


def test_without_a_gpu_the_steps_say_so(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = steps.Context(out, Journal.open(out), "ceilings", False)
    for step in (steps.ceilings, steps.tiles, lambda c: steps.benchmarks(c, ["selection"], "quick")):
        with pytest.raises(steps.NotHereError, match="torch sees no NVIDIA GPU"):
            step(real)


@pytest.mark.parametrize("unknown", ["pstate", "none"])
def test_nvidia_smi_is_only_asked(unknown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For everything at once, and one by one where a driver does not know something."""
    calls: list[list[str]] = []

    def answer(call: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(call)
        asked = call[1].removeprefix("--query-gpu=").split(",")
        said = ", ".join(f"{len(name)} MHz" for name in asked)
        return subprocess.CompletedProcess(call, unknown in asked, stdout=said + "\n")

    monkeypatch.setattr(steps.shutil, "which", lambda name: name)
    monkeypatch.setattr(steps.subprocess, "run", answer)
    found = steps.nvidia_smi()
    assert isinstance(found, dict) and tuple(found) == steps.QUERIES and found["clocks.sm"] == "9 MHz"
    assert found["pstate"] == ("not known to this driver" if unknown == "pstate" else "6 MHz")
    assert len(calls) == (1 if unknown == "none" else 1 + len(steps.QUERIES))
    assert all(call[1].startswith("--query-gpu=") and call[0] == "nvidia-smi" for call in calls)

    def silent(*_: Any, **__: Any) -> Any:
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    monkeypatch.setattr(steps.subprocess, "run", silent)
    assert str(steps.nvidia_smi()).startswith("nvidia-smi gives no answer: ")
    monkeypatch.setattr(steps.shutil, "which", lambda name: None)
    assert steps.nvidia_smi() == "nvidia-smi is not there"


def test_a_cofire_that_is_wrong_on_a_gpu_is_a_failure(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an earlier measurement stays in the file. Peers of a GPU are asked for, torch.compile by itself."""
    from cofire.bench import Results
    from cofire.bench.cases import of_family

    case = next(c for c in of_family("lowbit") if c.op == "qlinear")
    asked: dict[str, Any] = {}

    def measured(families: list[str], **options: Any) -> Results:
        asked.update(options)
        return Results({}, {}, refused=["forward: off by 3; the earlier measurement stays"])

    monkeypatch.setattr(harness, "run", measured)
    monkeypatch.setattr(harness, "of_case", lambda case, device: {"peer:made-up": None})
    assert steps._measure(case, False, out / "x.json") == "forward: off by 3; the earlier measurement stays"
    assert {"cofire", "dense", "peer:made-up"} <= set(asked["providers"])
    assert "compile" not in asked["providers"] and asked["device"] == "cuda" and asked["cases"] == [str(case)]
    steps._measure(case, True, out / "x.json")
    assert asked["providers"] == ["compile"]


def test_ceilings_are_measured_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda device, seconds: {"copy_gbs": {"1": 2.0}})
    steps._keep_ceilings(out)
    monkeypatch.setattr(ceilings, "measure", lambda *_: pytest.fail("measured again"))
    steps._keep_ceilings(out)
    assert ceilings.measure("cuda", 0.1) == json.loads((out / "ceilings.json").read_text()) == {"copy_gbs": {"1": 2.0}}


# ------------------------------------------------------------------------------------------------ the recorder


TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "unequal"
def test_skipped(): pytest.skip("no reason")
@pytest.fixture
def broken(): raise RuntimeError("of a fixture")
def test_broken(broken): pass
"""


def recorded(folder: Path, out: Path, *options: str) -> Journal:
    """pytest with the recorder, in a process of its own."""
    journal = Journal.open(out)
    environment = command.environment(out, False, False) | {"COFIRE_GPU_CHECK_SLICE": "tests/made-up"}
    call = [sys.executable, "-m", "pytest", "-q", "-p", "cofire.gpu_check.recorder", "-p", "no:cacheprovider", *options]
    subprocess.run([*call, str(folder)], env=environment, cwd=folder, capture_output=True, check=False)
    return journal


def test_tests_are_noted_one_by_one_and_left_out_when_they_are_known(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "test_made.py").write_text(TESTS)
    (folder / "test_not_importable.py").write_text("import no_such_package")
    found = recorded(folder, out, "--continue-on-collection-errors").items("tests")
    assert {name.rpartition("::")[2]: r["event"] for name, r in found.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_skipped": "skipped",
        "test_broken": "failed",
        "test_not_importable.py": "failed",
    }
    notes = {name.rpartition("::")[2]: r.get("note", "") for name, r in found.items()}
    assert notes["test_bad"].startswith("AssertionError: unequal") and notes["test_skipped"] == "Skipped: no reason"
    assert "no_such_package" in notes["test_not_importable.py"]
    lines = len(Journal.open(out).records())
    again = recorded(folder, out, "--continue-on-collection-errors")
    assert [r["event"] for r in again.records()[lines:]] == ["plan"], "each of them is known"
    assert again.totals() == {"tests/made-up": 4}


@pytest.mark.full
def test_a_process_that_dies_takes_one_test_with_it(tmp_path: Path, out: Path) -> None:
    """Where tests run in several processes; the one that takes its place leaves out what the others left out."""
    tests = "import os, pytest\n@pytest.mark.parametrize('i', range(8))\ndef test_i(i):\n    i == 3 and os._exit(9)"
    (tmp_path / "test_made.py").write_text(tests)
    Journal.open(out).write(part="tests", slice="x", item="test_made.py::test_i[0]", event="passed")
    found = recorded(tmp_path, out, "-n", "2").items("tests")
    assert {name[-2]: r["event"] for name, r in found.items()} == {
        str(i): "crashed" if i == 3 else "passed" for i in range(8)
    }
    assert "crashed while running" in found["test_made.py::test_i[3]"]["note"]


def test_tensors_keep_their_layout_on_a_device() -> None:
    """Else a GPU would see contiguous tensors, whatever layout is to be tested."""
    for store in LAYOUTS.values():
        x = store("grad", torch.randn(2, 3, 4, 5))
        y = moved(x, "meta")
        assert (y.device.type, y.shape, y.stride(), y.storage_offset()) == (
            *("meta", x.shape, x.stride()),
            x.storage_offset(),
        )
        assert moved(x, "cpu") is x


def test_first_of_each_kind_kernel_and_dtype() -> None:
    class Item:
        def __init__(self, name: str) -> None:
            self.name, self.nodeid = name.partition("::")[2] or name, name

    names = [
        "a.py::test_operator[forward-compact-cuda-odd-float32]",
        "a.py::test_operator[forward-compact-cuda-even-float32]",
        "a.py::test_operator[forward-compact-cuda-odd-bfloat16]",
        "a.py::test_operator[gradient-compact-cuda-odd-float32]",
        "a.py::test_operator[forward-spmm-cuda_c-odd-float32]",
        "b.py::test_layers[1-exact]",
        "b.py::test_layers[2-exact]",
    ]
    chosen = recorder._first_of_each([Item(name) for name in names])  # type: ignore[list-item]
    assert [item.nodeid for item in chosen] == [names[i] for i in (0, 2, 3, 4, 5)]


def test_a_file_that_no_slice_runs_is_found(tmp_path: Path, out: Path) -> None:
    (tmp_path / "test_made.py").write_text("def test_good(): pass")
    found = recorded(tmp_path, out, "--collect-only")
    assert found.totals() == {"tests/made-up": 1}
    (fault,) = found.items("tests").values()
    assert fault["note"] == "it has tests that need a GPU, and no slice runs it"


# ------------------------------------------------------------------------------------------------- the whole


def test_dry_run(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, tests and cases of a small family. (The whole: the next test.)"""
    monkeypatch.setattr(runner, "LEAST_SECONDS", 1.0)
    archive = tmp_path / "found.tar.gz"
    parts = [word for part in ("compile", "tests", "benchmarks") for word in ("--part", part)]
    options = ["--dry-run", "--family", "selection", "--out", str(out), "--archive", str(archive), *parts]
    said = CliRunner().invoke(app, ["gpu-check", *options, "--seconds", "300"])
    assert said.exit_code == 0, said.output
    found = json.loads((out / "summary.json").read_text())
    assert found["dry_run"] and found["complete"] and found["passed"]
    rows = {r["slice"]: r for r in found["slices"]}
    assert rows["benchmarks/dry"]["measured"] == "not measured"
    assert rows["compile"]["passed"] == len(steps.FEW) and rows["tests/collect"]["items"] > 100
    assert rows["benchmarks/dry"]["passed"] == rows["benchmarks/dry"]["items"] > 3
    measured = json.loads((out / "dry" / "cpu.json").read_text())["rows"]
    assert {r["family"] for r in measured} == {"selection"} and all(r["correct"] for r in measured)
    assert (out / "dry" / "report" / "benchmarks-selection.md").exists()
    with tarfile.open(archive) as tar:
        assert {"gpu/summary.json", "gpu/journal.jsonl"} <= set(tar.getnames())
    said = CliRunner().invoke(app, ["gpu-check", *options])
    assert said.exit_code == 0 and "at most" not in said.output, "all is done"


@pytest.mark.full
def test_dry_run_of_everything(out: Path) -> None:
    call = [sys.executable, "-m", "cofire.gpu_check", "--dry-run", "--out", str(out), "--seconds", "1800"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "pyextensions"), str(ROOT / "kernels")])}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {r["slice"]: r for r in json.loads((out / "summary.json").read_text())["slices"]}
    assert rows["tests/collect"]["items"] > 5000 and rows["benchmarks/dry"]["passed"] > 40


def test_it_needs_neither_typer_nor_rich(out: Path) -> None:
    """Every module of gpu-check is imported where there are none."""
    code = (
        "import sys; sys.modules.update({'typer': None, 'rich': None});"
        "from cofire.gpu_check import main, steps, recorder, runner, summary;"
        "sys.exit(main(['--list']))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "pyextensions"), str(ROOT / "kernels")])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


def test_stopped_by_a_signal_it_keeps_what_is_known(out: Path) -> None:
    code = f"""
import sys
from cofire.gpu_check import command, plan
from cofire.gpu_check.plan import Slice
slow = (sys.executable, "-S", "-c", {NOTE + ITEMS % "time.sleep(60 if item == 'two' else 0)"!r})
command.plan = lambda *_: [Slice("tests", "", slow, 60)]
import torch; torch.cuda.is_available = lambda: True
sys.exit(command.main(["--out", {str(out)!r}]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "pyextensions"), str(ROOT / "kernels")])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and '"two"' not in (
            (out / "journal.jsonl").read_text() if (out / "journal.jsonl").exists() else ""
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "what is known is kept, and the same command goes on" in said
    assert json.loads((out / "summary.json").read_text())["slices"][0]["passed"] == 1


# ------------------------------------------------------------------------------------------------ times on a GPU


class FakeStream:
    """A GPU whose calls take 10 us, while the host takes ``host`` seconds to start one."""

    def __init__(self, host: float = 0.0) -> None:
        self.slept: list[float] = []
        self.queued, self.ran, self.host = 0.0, 0, host

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles / cuda_timing.CYCLES_PER_MS)

    def call(self) -> None:
        time.sleep(self.host)
        self.queued += 0.01
        self.ran += 1

    def event(self, enable_timing: bool) -> Any:
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, stream: FakeStream) -> None:
        self.stream, self.at = stream, 0.0

    def record(self) -> None:
        self.at = self.stream.queued

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    made = FakeStream()
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


def test_the_gpu_sleeps_while_the_host_prepares_the_calls(stream: FakeStream) -> None:
    stream.host = 0.001
    assert harness.read_ms(stream.call, 5, "cuda") == pytest.approx(0.01)
    assert stream.ran == 6, "one call, untimed, tells how long the host takes"
    assert 1.5 * 5 * 1.0 <= stream.slept[0] <= cuda_timing.MOST_SLEEP_MS
    assert harness.read_ms(stream.call, 1, "cuda") == pytest.approx(0.01)
    assert stream.ran == 7, "a long call is not made twice"


def test_a_reading_stays_within_the_queue(stream: FakeStream) -> None:
    assert cuda_timing.read_ms(stream.call, 10_000) == pytest.approx(0.01)
    assert stream.ran == cuda_timing.MOST_REPEATS + 1
    assert cuda_timing.sleep_ms(1.0, 100) == cuda_timing.MOST_SLEEP_MS
    assert cuda_timing.sleep_ms(0.0, 1) == cuda_timing.LEAST_SLEEP_MS


def test_ceilings_of_a_gpu_are_read_by_events(stream: FakeStream) -> None:
    assert ceilings.best_seconds(stream.call, "cuda", 0.01) == pytest.approx(1e-5)


def test_8_bit_floats_have_a_ceiling_where_there_are_some(stream: FakeStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert ceilings._fp8(0.01) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    made = torch.ones, torch.randn
    monkeypatch.setattr(torch, "ones", lambda *s, device: made[0](*s))
    monkeypatch.setattr(torch, "randn", lambda *s, device: made[1](64, 64))
    shapes: list[Any] = []

    def product(a: torch.Tensor, b: torch.Tensor, **options: Any) -> None:
        shapes.append((a.dtype, b.stride(), options["out_dtype"]))
        stream.call()

    monkeypatch.setattr(torch, "_scaled_mm", product)
    assert ceilings._fp8(0.01) == pytest.approx(2 * 8192**3 / 1e-5 / 1e9)
    assert shapes[0] == (torch.float8_e4m3fn, (1, 64), torch.bfloat16), "the second factor is stored by columns"


def test_overhead_is_what_the_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too: events would show the kernels of a tiny input."""
    clocks: list[str] = []

    def read(runs: dict[str, Any], device: str, *_: Any, **__: Any) -> dict[str, list[float]]:
        clocks.append(device)
        return {name: [1.0] * 7 for name in runs}

    from cofire.bench.cases import of_family

    case = next(c for c in of_family("selection") if c.overhead)
    monkeypatch.setattr(harness, "read_in_turns", read)
    made = harness.Input
    monkeypatch.setattr(harness, "Input", lambda case, device, **options: made(case, "cpu", **options))
    monkeypatch.setattr(harness, "peak_bytes", lambda *_, **__: 0)
    harness.measure(case, "overhead", "cuda", harness.Effort(True), ["cofire"])
    assert set(clocks) == {"cpu"}
