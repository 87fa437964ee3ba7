# SPDX-License-Identifier: Apache-2.0
"""Results files: what each run measured with, and a file that keeps whether two runs agree."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cofire import bench, native
from cofire.bench import machine, results, resume
from cofire.bench.agreement import COMMAND, load, sentence
from cofire.bench.report import markdown, page
from cofire.bench.report.extras import Extras, extras_in
from cofire.cli import app

CEILINGS = {
    "copy_gbs": {"1": 100.0},
    "read_gbs": {"1": 90.0},
    "gemm_gflops": {"float32": 200.0, "bfloat16": 100.0},
    "conv_gflops": {"float32": 250.0, "bfloat16": 150.0},
}
HERE = {
    "device": "CPU", "kind": "cpu", "threads": 2, "instruction_set": "AVX9", "torch": "2", "commit": "c", "date": "d",
    "quick": False, "cofire_kernels": "avx9", "numpy": "1", "triton": None, "peers": {"onnx": "1"}, "affinity": [0, 1],
    "kernel": "6", "python": "3", "platform": "p", "cofire": "0", "format": results.FORMAT,
}  # fmt: skip


def row(case: str, ms: float | None = 1.0, **more: Any) -> results.Row:
    found = dict.fromkeys(results.COLUMNS, "x") | {"case": case, "correct": ms is not None, "noisy": False}
    return {**found, **dict.fromkeys(results.NUMBERS, ms), "bytes": 1, "flops": 1, "commit": "c", "date": "d", **more}


def made_up(rows: list[results.Row], **more: Any) -> results.Results:
    return results.Results({**HERE, **more}, CEILINGS, rows)


# ------------------------------------------------------------------------------------------------- what a run notes


def begun(path: Path, said: list[str] | None = None, **more: Any) -> tuple[results.Results, resume.Record]:
    return resume.begin(path, {**HERE, **more}, {"ops": None}, False, (said if said is not None else []).append)


def test_a_run_notes_what_it_measures_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("SECRET", "x")
    found, record = begun(tmp_path / "r.json")
    facts = found.environment["runs"][record.id]
    assert {name: facts[name] for name in ("commit", "date", "torch", "cofire_kernels", "threads", "affinity")} == {
        name: HERE[name] for name in ("commit", "date", "torch", "cofire_kernels", "threads", "affinity")
    }
    assert (facts["numpy"], facts["triton"], facts["peers"]) == ("1", None, {"onnx": "1"})
    assert facts["variables"]["OMP_WAIT_POLICY"] == "passive" and "SECRET" not in facts["variables"]
    assert facts["compiler"] == native.STATUS.build.get("compiler")
    assert {"stepping", "huge_pages"} <= set(facts)
    found.rows.append(row("a", run=record.id))
    assert results.Results.load(found.save(tmp_path / "r.json")).environment == found.environment


def test_runs_stay_as_long_as_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first, one = begun(path)
    first.rows += [row("a", run=one.id), row("b", run=one.id)]
    first.save(path)
    second, two = begun(path, numpy="2")
    assert {run: facts["numpy"] for run, facts in second.environment["runs"].items()} == {one.id: "1", two.id: "2"}
    second.add([row(case, run=two.id) for case in "ab"])
    second.save(path)
    third, three = begun(path)
    assert list(third.environment["runs"]) == [two.id, three.id], "no row is of the first any more"


def test_files_of_an_earlier_cofire_are_read(tmp_path: Path) -> None:
    path = made_up([row("a"), row("b", run="old")]).save(tmp_path / "r.json")
    found, record = begun(path)
    assert list(found.environment["runs"]) == [record.id] and len(found.rows) == 2
    assert made_up([]).same_environment(found.environment) and found.same_environment(HERE)


def stopped(path: Path, **facts: Any) -> resume.Record:
    """A run that was stopped after its first case, and noted this down."""
    found, record = begun(path)
    found.rows.append(row("a", run=record.id))
    record.done.append("a")
    found.run = record.to_json()
    found.environment["runs"][record.id].update(facts)
    found.save(path)
    return record


def test_a_stopped_run_goes_on_where_all_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    record = stopped(path)
    found, again = begun(path, date="later")
    assert again.id == record.id and list(found.environment["runs"]) == [record.id]
    assert found.environment["runs"][record.id]["date"] == "later"


@pytest.mark.parametrize(
    "what", [{"huge_pages": "another"}, {"variables": {"OMP_NUM_THREADS": "9"}}, {"compiler": "another"}]
)
def test_a_run_under_other_conditions_is_another_run(what: dict[str, Any], tmp_path: Path) -> None:
    path, said = tmp_path / "r.json", list[str]()
    record = stopped(path, **what)
    found, again = begun(path, said)
    assert again.id != record.id and set(found.environment["runs"]) == {record.id, again.id}
    assert said[0].endswith("cofire or its environment has changed since, so this is a new run")


def test_runs_that_are_none_get_a_sentence(tmp_path: Path) -> None:
    for runs in ([], {"a": 3}):
        path = made_up([], runs=runs).save(tmp_path / "r.json")
        with pytest.raises(
            ValueError, match="its environment has runs=.*, expected facts by run; measure again with cofire b"
        ):
            results.Results.load(path)


def test_the_machine_says_which_cpu_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROCESSES", tmp_path)
    monkeypatch.setattr(machine, "SYSTEM", tmp_path)
    assert machine.stepping() is None and machine.huge_pages() is None
    (tmp_path / "cpuinfo").write_text("model name\t: Some CPU\n")
    assert machine.stepping() is None
    words = "vendor_id\t: Somebody\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: Some CPU\nstepping\t: 1\n"
    (tmp_path / "cpuinfo").write_text(words + words.replace("17", "18"))
    assert machine.stepping() == {"vendor_id": "Somebody", "cpu family": "25", "model": "17", "stepping": "1"}
    enabled = tmp_path / "kernel" / "mm" / "transparent_hugepage" / "enabled"
    enabled.parent.mkdir(parents=True)
    for chosen in ("always", "madvise", "never"):
        enabled.write_text(" ".join(f"[{x}]" if x == chosen else x for x in ("always", "madvise", "never")) + "\n")
        assert machine.huge_pages() == chosen


def test_memory_that_is_freed_stays() -> None:
    """In a process of its own, as there is no way back: large blocks come again without a page fault."""
    code = """
import ctypes, resource
from cofire.bench import machine
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
library.prctl(41, 1, 0, 0, 0)  # small pages, whatever the system prefers
size = 24 << 20
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(size)
    ctypes.memset(block, 1, size)
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert faults() > 100 and faults() > 100, "by itself it gives such a block back"
assert machine.conditions()["freed_memory"] is None
assert machine.keep_freed_memory() and " MiB" in machine.conditions()["freed_memory"]
faults()
assert faults() < 100
machine.give_back_memory()
assert faults() > 100
"""
    if not hasattr(ctypes.CDLL(None) if os.name == "posix" else None, "malloc_trim"):
        pytest.skip("glibc alone has the function")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ------------------------------------------------------------------------------------------------------- agreement


def times(*values: float, flagged: int = 0, run: str | None = None, **more: Any) -> results.Results:
    """Rows of these times, the first of them flagged."""
    label = {} if run is None else {"run": run}
    rows = [row(str(i), ms, speedup=2.0, flagged=i < flagged, **label) for i, ms in enumerate(values)]
    return made_up(rows, **more)


def test_too_few_undisturbed_rows_are_not_enough() -> None:
    same = times(*[1.0] * 10, flagged=9)
    found = bench.agreement(same, same)
    assert found.share() == 1 and found.undisturbed == 0.1 and not found.enough
    assert (
        "only 10.0 % of the rows were undisturbed: too few to say that the runs agree (20 % are asked" in found.text()
    )
    one_more = bench.agreement(times(*[1.0] * 10, flagged=8), times(*[1.0] * 10))
    assert one_more.undisturbed == 0.2 and one_more.enough and "too few" not in one_more.text()


def test_a_run_does_not_agree_with_itself() -> None:
    with pytest.raises(ValueError, match="nothing to compare: all 2 rows that are in both are of the same run"):
        bench.agreement(times(1.0, 1.0, run="a"), times(1.0, 1.0, run="a"))
    mixed = times(1.0, 1.0, run="a")
    mixed.rows[1]["run"] = "b"
    assert len(bench.agreement(times(1.0, 1.0, run="a"), mixed).pairs) == 1


def test_rows_are_compared_where_the_probe_took_the_same_time() -> None:
    a, b = times(1.0, 1.0, 1.0, 1.0), times(1.0, 1.0, 1.0, 1.0)
    for x, y, looks, unfelt in zip(
        a.rows,
        b.rows,
        [
            ({"core": 1.0}, {"core": 1.1}),
            ({"core": 1.0}, {"core": 1.11}),
            ({"m": 1.0}, {"m": 2.0}),
            ({"m": 1.0}, {"m": 2.0}),
        ],
        [((), ()), ((), ()), (["m"], ["m"]), (["m"], ())],
    ):
        (x["probe"], y["probe"]), (x["unfelt"], y["unfelt"]) = looks, unfelt
    found = bench.agreement(a, b)
    assert [x["case"] for x, _ in found.pairs] == ["0", "2"] and found.flagged == 2
    with pytest.raises(ValueError, match="nothing to compare: 1 are in both, all flagged as noisy or of another speed"):
        bench.agreement(made_up(a.rows[1:2]), made_up(b.rows[1:2]))


def agreed(folder: Path, **more: Any) -> Path:
    """A file that the command has written."""
    paths = [
        times(*[1.0] * 9, last, flagged=1, date=date, **more).save(folder / date)
        for last, date in ((1.0, "x"), (2.0, "y"))
    ]
    out = folder / "agreement" / "cpu.json"
    said = CliRunner().invoke(app, ["bench-agree", *map(str, paths), "--out", str(out)])
    assert said.exit_code == 1, "8 of 9"
    assert f"{out}: written" in said.output.replace("\n", "")
    return out


def test_whether_two_runs_agree_is_kept(tmp_path: Path) -> None:
    found = load(agreed(tmp_path))
    assert found == {
        "environment": {"device": "CPU", "kind": "cpu", "threads": 2, "instruction_set": "AVX9", "format": results.FORMAT},
        "runs": [{"commit": "c", "date": date, "quick": False} for date in "xy"],
        "agreement": {
            "within": 0.1, "pairs": 9, "flagged": 1, "times": pytest.approx(8 / 9), "speedups": 1.0, "apart": "",
        },
    }  # fmt: skip
    assert sentence(found) == (
        "Two runs (c, x and c, y) have 10 rows in common, 9 undisturbed in both and at one speed of the machine: of these "
        "88.9 % of the times and 100.0 % of the speed-ups over dense agree within 10 %. Asked for were 90 % of the times, of "
        "at least 20 % of the rows: not met."
    )
    found["agreement"].update(times=0.9, pairs=2, flagged=8)
    assert sentence(found).endswith(": met.")
    found["agreement"].update(pairs=1, flagged=8)
    assert sentence(found).endswith(": not met."), "one in nine"


def test_pages_say_whether_two_runs_agree(tmp_path: Path) -> None:
    found = made_up([row("a")])
    for text in (markdown.index([found], [], Extras()), page.page([found], Extras())):
        assert "Whether two runs agree: not shown." in text
    agreed(tmp_path)
    for machine_, shown in ((found, True), (made_up([row("a")], instruction_set="AVX1"), False)):
        for text in (
            markdown.index([machine_], [], extras_in([tmp_path])),
            page.page([machine_], extras_in([tmp_path])),
        ):
            assert ("88.9 % of the times" in text) == shown != ("not shown" in text), "of this machine alone"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda d: d.pop("agreement"), "it lacks agreement of environment, runs, agreement; name a file of"),
        (lambda d: d["agreement"].pop("times"), "it lacks times; name a file of"),
        (lambda d: d["agreement"].update(pairs="many"), "it lacks pairs; name a file of"),
        (lambda d: d["environment"].pop("threads"), "it lacks threads; name a file of"),
        (lambda d: d["environment"].update(format=99), "was written by a newer cofire (it is of format 99)"),
        (lambda d: d.update(rows=[]), "it has rows, which other files of cofire have; name a file of"),
        (lambda d: d.update(power={}), "was written by a newer cofire (it has power)"),
    ],
)
def test_a_file_that_keeps_nothing_gets_a_sentence(change: Any, line: str, tmp_path: Path) -> None:
    path = agreed(tmp_path)
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(
        ValueError, match=f"bench-agree: .*cpu.json is cut off in line .*; measure again with {COMMAND}"
    ):
        load(path)
    data = json.loads(whole)
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load(path)
    assert str(error.value).startswith(f"bench-agree: {path} ") and line in str(error.value)


def test_only_a_file_that_keeps_an_agreement_is_replaced(tmp_path: Path) -> None:
    out = agreed(tmp_path)
    before = load(out)
    assert load(agreed(tmp_path, commit="new"))["runs"][0]["commit"] == "new" != before["runs"][0]["commit"]
    inputs = [tmp_path / "x", tmp_path / "y"]
    other = times(1.0).save(tmp_path / "other.json")
    words = tmp_path / "words.md"
    words.write_text("# A page")
    for path, line in (
        (inputs[0], "--out must be another file than the two that are compared, got"),
        (tmp_path / "agreement" / ".." / "y", "--out must be another file than the two that are compared, got"),
        (
            other,
            f"out must be a new file, or one of {COMMAND} to replace; {other} is not a results file: it has ceilings",
        ),
        (words, "no JSON at line 1, column 1"),
        (tmp_path, "cannot be read (Is a directory)"),
    ):
        kept = {p: p.read_bytes() for p in (*inputs, other, words)}
        said = CliRunner().invoke(app, ["bench-agree", *map(str, inputs), "--out", str(path)])
        assert said.exit_code == 2 and line in said.output.replace("\n", ""), path
        assert {p: p.read_bytes() for p in kept} == kept, path
