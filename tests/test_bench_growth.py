# SPDX-License-Identifier: Apache-2.0
"""How costs grow: exponents, the sweeps of every operator and method, a run that was stopped, tables and plots."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from cofire import native
from cofire.bench import cases as suite
from cofire.bench import growth, harness, quiet, results, resume
from cofire.bench.cases import Case, Random, plain
from cofire.bench.growth import laws, operators, plots, sweep
from cofire.bench.growth import methods as trained
from cofire.cli import app
from cofire.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


class Hurried(harness.Effort):
    def __init__(self, quick: bool = True) -> None:
        super().__init__(quick)
        self.case_seconds, self.least_rounds, self.most_rounds = 0.0, 1, 1


# --------------------------------------------------------------------------------------------------- exponents


@pytest.mark.parametrize("law", sorted(laws.LAWS))
def test_the_exponent_of_a_power_is_that_power(law: str) -> None:
    power = laws.LAWS[law]
    points = [(float(4**i), 3.0 * 4 ** (i * power)) for i in (5, 3, 1, 4, 2)]
    assert growth.exponent(points) == pytest.approx(power, abs=1e-12)


def test_a_flat_start_does_not_count() -> None:
    flat = [(1.0, 7.0), (4.0, 7.0)]
    assert growth.exponent([*flat, (16.0, 1.0), (64.0, 16.0), (256.0, 256.0)]) == pytest.approx(2)
    assert growth.exponent([*flat, (16.0, 16.0), (64.0, 64.0)]) == pytest.approx(1)
    assert growth.exponent([(1.0, 7.0), (4.0, 16.0), (16.0, 64.0)]) == pytest.approx(1)
    # least squares, not the ends: of logs 0, 0, 1 by 0, 1, 2 the slope is a half
    assert growth.exponent([*flat, (16.0, 1.0), (64.0, 1.0), (256.0, 4.0)]) == pytest.approx(0.5)


@pytest.mark.parametrize("points", [[], [(1.0, 1.0)], [(1.0, 1.0), (1.0, 2.0)]])
def test_an_exponent_needs_two_sizes(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="exponent: points must have two sizes or more, each once, got the sizes"):
        growth.exponent(points)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_an_exponent_needs_positive_numbers(wrong: float) -> None:
    with pytest.raises(ValueError, match="exponent: sizes and costs must be above 0, got"):
        growth.exponent([(1.0, 1.0), (2.0, wrong)])


def test_the_range_of_an_exponent_is_what_the_readings_allow() -> None:
    exact = [(4.0**i, 2.0 * 4**i, 2.0 * 4**i) for i in range(5)]
    assert laws.exponent_range(exact) == (pytest.approx(1), pytest.approx(1))
    # of the last two sizes, a factor of 4 apart, a factor of 2 more in the last cost is half an exponent more
    wide = [*exact[:2], (16.0, 32.0, 32.0), (64.0, 128.0, 256.0)]
    assert laws.exponent_range(wide) == (pytest.approx(1), pytest.approx(1.5))
    # and where the first of them may cost twice as much, half an exponent less
    assert laws.exponent_range([*exact[:2], (16.0, 32.0, 64.0), (64.0, 128.0, 256.0)]) == pytest.approx((0.5, 1.5))
    assert laws.exponent_range(list(reversed(wide))) == pytest.approx((1, 1.5))
    # of 5 sizes the middle one of the last 3 has no say
    assert laws.exponent_range([*exact[:3], (64.0, 1.0, 9.0), exact[4]]) == pytest.approx((1, 1))


@pytest.mark.parametrize("power", [0.5, 1.0, 1.1, 2.0])
def test_where_the_fixed_cost_rules(power: float) -> None:
    sizes = (1.0, 8.0, 64.0, 512.0)
    cost = {s: s**power for s in sizes}
    assert laws.fixed_until(list(cost.items()), power) is None
    for fixed, until in ((0.5, None), (1.01, 1.0), (1.01 * cost[8.0], 8.0), (1.01 * cost[512.0], 512.0)):
        assert laws.fixed_until([(s, c + fixed) for s, c in cost.items()], power) == until
    assert laws.fixed_until([(s, 5.0) for s in sizes], power) == 512.0, "it does not grow"
    assert laws.fixed_until([(1.0, 5.0), (8.0, 5.0)], power) is None, "two points fit anything"
    assert laws.fixed_until([(s, 5.0) for s in sizes], 0.0) is None, "theory says that it does not grow"


# ------------------------------------------------------------------------------------------------------ sweeps


def test_every_operator_with_a_benchmark_has_a_sweep() -> None:
    benchmarked = {(family, c.op) for family in suite.families() for c in suite.of_family(family)}
    assert {(s.family, s.op) for s in operators.SWEEPS} == benchmarked


def test_every_method_has_a_sweep() -> None:
    assert {s.op for s in trained.SWEEPS} == {
        f"method:{m.__name__}" for m in METHODS.values() if "cofire" in m.__module__
    }


@pytest.mark.parametrize("swept", growth.select(), ids=lambda s: f"{s.family} {s.op} {s.grows}")
def test_a_sweep_has_sizes_and_laws(swept: Any) -> None:
    assert {swept.time, swept.memory} <= set(laws.LAWS)
    assert len(swept.sizes) >= 4
    assert list(swept.sizes) == sorted(set(swept.sizes))
    assert swept.family in suite.families()


def test_no_two_points_share_a_name() -> None:
    names = [(s.family, s.op, s.label(n)) for s in growth.select() for n in s.sizes]
    assert len(names) == len(set(names))


#: Without compiled kernels these take seconds each: cofire is the reference there, which is checked against itself.
SLOW_REFERENCE = ("dkm", "kmeans1d")


@pytest.mark.parametrize("swept", operators.SWEEPS, ids=lambda s: f"{s.family} {s.op} {s.grows}")
def test_the_smallest_input_of_a_sweep_passes_the_gate(swept: sweep.Sweep) -> None:
    if native.STATUS.variant is None and swept.op in SLOW_REFERENCE:
        pytest.skip("needs the compiled kernels")
    case = swept.case(swept.sizes[0])
    assert case.op == swept.op
    given = harness.Input(case, "cpu")
    mode = "forward+backward" if case.gradients else "forward"
    for variant, provider in harness.candidates(case, "cpu", mode, ["cofire"])["cofire"].items():
        assert given.check(provider, mode) is None, variant


@pytest.mark.parametrize("swept", trained.SWEEPS, ids=lambda s: s.op)
def test_the_smallest_step_of_a_method_is_right(swept: trained.MethodSweep) -> None:
    rows = {r["provider"]: r for r in swept.measure(swept.sizes[0] // 2, "cpu", Hurried(), [])}
    assert set(rows) == ({"cofire"} if swept.op == "method:DSnoT" else {"cofire", "dense"})
    for row in rows.values():
        assert row["correct"], row.get("note")
        assert set(results.COLUMNS) - {"family"} <= set(row)
        assert row["median_ms"] > 0 and row["peak_bytes"] > 0
        assert (row["op"], row["mode"], row["width"]) == (swept.op, "step", swept.sizes[0] // 2)


# --------------------------------------------------------------------------------------------------------- run


def mean(x: Tensor, mode: str) -> tuple[Tensor]:
    return (x.mean((2, 3)),)


def pool_case(n: int, **providers: Any) -> Case:
    def args(rand: Random) -> tuple[Tensor, str]:
        return rand.normal(n, 3, 4, 4), "avg"

    return Case("channel_pool", f"{n}x3x4x4", torch.float32, args, providers, args)


def pool_sweep(case: Any = pool_case) -> sweep.Sweep:
    return sweep.Sweep("channel_pool", "samples", (1, 2, 4, 8), case, family="gating")


class Quiet(quiet.Probe):
    """A probe that costs nothing."""

    def __init__(self, device: str) -> None:
        super().__init__(device, {"core": lambda: 1.0})


class Stopped(KeyboardInterrupt):
    """As if somebody pressed Ctrl-C."""


@pytest.fixture
def one_sweep(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """``run`` sees one sweep, and notes which sizes it measures."""
    seen: list[int] = []

    def case(n: int) -> Case:
        seen.append(n)
        return pool_case(n, dense=plain(mean, outputs=1))

    monkeypatch.setattr(operators, "SWEEPS", [pool_sweep(case)])
    monkeypatch.setattr(trained, "SWEEPS", [])
    monkeypatch.setattr(harness, "Effort", Hurried)
    monkeypatch.setattr(quiet, "Probe", Quiet)
    return seen


def test_a_run_writes_rows_with_size_and_laws(one_sweep: list[int], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "growth.json"
    found = growth.run(path, progress=False)
    assert results.Results.load(path).to_json() == found.to_json()
    assert os.listdir(path.parent) == ["growth.json"], "a temporary file was left"
    assert [(r["provider"], r["size"]) for r in found.rows] == [
        (p, n) for n in (1, 2, 4, 8) for p in ("cofire", "dense")
    ]
    for row in found.rows:
        assert set(results.COLUMNS) <= set(row)
        assert (row["family"], row["sweep"], row["time_law"], row["memory_law"]) == (
            "gating",
            "samples",
            *["linear"] * 2,
        )
        assert row["case"] == f"{row['size']} samples: {row['size']}x3x4x4"
        assert row["correct"] and row["median_ms"] > 0
    assert len(growth.run(tmp_path / "quick.json", quick=True, progress=False).rows) == 6


def test_a_stopped_run_goes_on(one_sweep: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "growth.json"
    measure = harness.measure

    def stop(case: Case, *args: Any) -> Any:
        if case.name.startswith("4x"):
            raise Stopped
        return measure(case, *args)

    monkeypatch.setattr(harness, "measure", stop)
    with pytest.raises(Stopped):
        growth.run(path, progress=False)
    assert [r["size"] for r in json.loads(path.read_text())["rows"]] == [1, 1, 2, 2]
    monkeypatch.setattr(harness, "measure", measure)
    one_sweep.clear()
    assert len(growth.run(path, progress=False).rows) == 8
    assert one_sweep == [4, 8]
    one_sweep.clear()
    assert len(growth.run(path, progress=False, fresh=True).rows) == 8
    assert one_sweep == [1, 2, 4, 8]


def test_an_error_at_one_point_leaves_the_others(
    one_sweep: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = harness.measure

    def fail(case: Case, *args: Any) -> Any:
        if case.name.startswith("4x"):
            raise MemoryError("no room")
        return measure(case, *args)

    monkeypatch.setattr(harness, "measure", fail)
    found = growth.run(tmp_path / "growth.json", progress=False)
    assert [r["size"] for r in found.rows] == [1, 1, 2, 2, 8, 8]
    assert found.refused == ["channel_pool, 4 samples: MemoryError: no room"]


def test_points_of_other_code_are_measured_again(
    one_sweep: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two states of the code may have the same commit, where there are changes that are in none."""
    path = tmp_path / "growth.json"
    monkeypatch.setattr(results, "_commit", lambda: "abc+changes")
    monkeypatch.setattr(resume, "state", lambda commit: f"{commit} and one line")
    first = growth.run(path, progress=False)
    one_sweep.clear()
    again = growth.run(path, progress=False)
    assert one_sweep == [] and again.rows == first.rows
    (run,) = {r["run"] for r in first.rows}
    assert again.environment["runs"][run]["state"] == "abc+changes and one line"
    rows = [*first.rows, dict(first.rows[0], op="another", case="kept")]
    results.Results(first.environment, {}, rows).save(path)
    monkeypatch.setattr(resume, "state", lambda commit: f"{commit} and two lines")
    found = growth.run(path, progress=False)
    assert one_sweep == [1, 2, 4, 8]
    assert len(found.rows) == 9 and [r["op"] for r in found.rows if r["run"] == run] == ["another"]
    without = [{k: v for k, v in r.items() if k != "run"} for r in found.rows]
    results.Results(first.environment, {}, without).save(path)
    one_sweep.clear()
    growth.run(path, progress=False)
    assert one_sweep == [1, 2, 4, 8], "an older file does not say what it measured"
    elsewhere = {**first.environment, "torch": "0.1"}
    results.Results(elsewhere, {}, rows).save(path)
    said: list[str] = []
    assert len(growth.run(path, progress=False, announce=said.append).rows) == 8, "rows of another environment part"
    (aside,) = (p for p in tmp_path.glob("growth*") if p != path)
    assert len(said) == 1 and "was measured under other conditions (torch 0.1 there, " in said[0]
    assert said[0].endswith(f"it is now {aside}")
    assert results.Results.load(aside).environment["torch"] == "0.1", "and nothing is lost"


def broken(change: Any) -> str:
    """A file with one row, changed."""
    row = dict.fromkeys(results.COLUMNS, "x") | dict.fromkeys(results.NUMBERS, 1.0) | {"correct": True, "noisy": False}
    where = {"device": "CPU", "kind": "cpu", "threads": 2, "torch": "2", "format": results.FORMAT}
    data: dict[str, Any] = {"environment": where, "ceilings": {}, "rows": [{**row, "sweep": "tokens", "size": 4}]}
    change(data)
    return json.dumps(data)


ASIDE = ("truncated", "empty", "binary")  #: these nothing can read; the others are of use to somebody
BROKEN: dict[str, tuple[str | bytes, str]] = {
    "truncated": (
        broken(lambda d: None)[:-40],
        "is cut off in line 1; measure again with cofire bench-growth, or fetch",
    ),
    "empty": ("", "is empty; measure again with cofire bench-growth"),
    "binary": (b"\x89PNG\xff\xfe", "is not a results file: it is not text; name a file of cofire bench-growth"),
    "foreign": (
        '{"name": "package"}',
        "is not a results file (environment, ceilings, rows); name a file of cofire bench-g",
    ),
    "of bench-memory": (
        '{"environment": {}, "rows": []}',
        "it lacks ceilings of environment, ceilings, rows; name a file",
    ),
    "of bench": (
        broken(lambda d: d["rows"][0].pop("sweep")),
        "is not a results file of cofire bench-growth: row 0 lacks sweep",
    ),
    "of bench-agree": (broken(lambda d: d.update(agreement={})), "it has agreement, which other files of cofire have"),
    "newer": (
        broken(lambda d: d["environment"].update(format=99)),
        "was written by a newer cofire (it is of format 99)",
    ),
    "older": (
        broken(lambda d: d["environment"].pop("torch")),
        "its environment lacks torch; measure again with cofire bench-g",
    ),
    "runs": (
        broken(lambda d: d["environment"].update(runs=[1])),
        "its environment has runs=[1], expected facts by run",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_moved_aside_and_another_stays(name: str, one_sweep: list[int], tmp_path: Path) -> None:
    path = tmp_path / "growth.json"
    text, sentence = BROKEN[name]
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        growth.load(path)
    assert str(error.value).startswith(f"bench-growth: {path} ") and sentence in str(error.value)
    said: list[str] = []
    if name not in ASIDE:
        with pytest.raises(ValueError) as again:  # noqa: PT011
            growth.run(path, progress=False, announce=said.append)
        assert str(again.value) == f"{error.value}. It stays as it is: move it away, or write to another file"
        assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path] and not said
        return
    assert len(growth.run(path, progress=False, announce=said.append).rows) == 8
    assert said == [f"{error.value}. It is now {path}.broken, and {path} is begun anew"]
    assert (tmp_path / "growth.json.broken").read_bytes() == content, "nothing is lost"


def test_no_file_and_a_folder_get_a_sentence(one_sweep: list[int], tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="bench-growth: there is no results file .*; cofire bench-growth writes one"
    ):
        growth.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"bench-growth: .* cannot be read \(Is a directory\)"):
        growth.run(tmp_path, progress=False)


def test_plain_torch_is_left_out_where_it_would_take_too_long() -> None:
    slow, fast = plain(mean, outputs=1), plain(mean, outputs=1)
    providers = {"dense": {"slow": slow, "fast": fast}, "eager": slow, "peer:other": slow}
    ours = {"provider": "cofire", "size": 4, "correct": True, "median_ms": 1.0, "peak_bytes": 9}
    dense = {**ours, "provider": "dense", "variants_ms": {"slow": 4.5, "fast": 1.0}}
    eager = {**ours, "provider": "eager"}

    def left(*before: dict[str, Any], law: float = 1.0) -> dict[str, Any]:
        return dict(sweep._affordable(providers, 16, before, law))

    assert left() == {"dense": providers["dense"], "eager": slow}
    assert left(ours, dense, eager) == {"dense": {"fast": fast}, "eager": slow}
    assert set(left(ours, dense)) == {"dense"}, "what was left out once stays out"
    assert set(left(ours, dense, {**eager, "median_ms": 130.0})) == {"dense"}
    assert set(left(ours, dense, {**eager, "median_ms": 120.0})) == {"dense", "eager"}
    assert set(left(ours, dense, {**eager, "median_ms": 120.0}, law=2.0)) == {"dense"}
    assert set(left(ours, dense, {**eager, "peak_bytes": 1 << 29})) == {"dense"}
    wrong = {**eager, "correct": False, "median_ms": None, "peak_bytes": None}
    assert set(left(ours, dense, wrong)) == {"dense", "eager"}, "a wrong answer says nothing of time"


def test_a_sweep_measures_no_more_than_its_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = pool_case(4, dense=plain(mean, outputs=1), **{"peer:other": plain(mean, outputs=1)})
    rows = pool_sweep(lambda n: case).measure(4, "cpu", Hurried(), [])
    assert [r["provider"] for r in rows] == ["cofire", "dense"]
    larger = [dict(rows[0], size=8)]  # says nothing about 4
    assert [r["provider"] for r in pool_sweep(lambda n: case).measure(4, "cpu", Hurried(), larger)] == [
        "cofire",
        "dense",
    ]


def test_a_step_that_goes_wrong_gets_no_number() -> None:
    def nothing(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        loss, output = trained.classify(model, batch)
        return loss * float("nan"), output

    def broken(width: int) -> nn.Module:
        return nn.Conv2d(1, width, 3)

    (swept,) = [s for s in trained.SWEEPS if s.op == "method:QLoRA"]
    for rows, note in (
        (replace(swept, loss=nothing).measure(128, "cpu", Hurried(), []), "the loss of the first step is nan"),
        (
            replace(swept, network=broken).measure(128, "cpu", Hurried(), [])[:1],
            "ValueError: QLoRA.prepare: the model has no",
        ),
    ):
        for row in rows:
            assert not row["correct"] and note in row["note"]
            assert [row[c] for c in results.NUMBERS] == [None] * 4
    pruned = nn.Linear(2, 2)
    assert trained._judge(pruned) is None
    nn.init.constant_(pruned.weight, float("inf"))
    assert trained._judge(pruned) == "the pruned network has weights that are no finite numbers"


# ------------------------------------------------------------------------------------------------- what is asked


def test_only_what_is_asked_for() -> None:
    def names(**only: Any) -> set[str]:
        return {s.op for s in growth.select(**only)}

    assert names(ops=["dkm"]) == {"dkm"}
    assert names(methods=["ftwt", "DSnoT"]) == {"method:FTWT", "method:DSnoT"}
    assert names(ops=["dkm"], methods=["edkm"]) == {"dkm", "method:EDKM"}
    assert {s.family for s in growth.select(["gating"])} == {"gating"}
    assert "method:FTWT" in names(chosen_families=["gating"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--op", "dkn"], "bench: no operator with a sweep is called 'dkn'; did you mean 'dkm'?"),
        (["--family", "gatin"], "bench: no family is called 'gatin'; did you mean 'gating'?"),
        (["--method", "FTVT"], "bench: no method with a sweep is called 'FTVT'; did you mean 'FTWT'?"),
        (["--family", "gating", "--op", "dkm"], "bench: no operator with a sweep is called 'dkm'"),
        (["--device", "tpu"], "bench: device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_a_wrong_name_gets_a_sentence(options: list[str], sentence: str) -> None:
    found = CliRunner().invoke(app, ["bench-growth", *options])
    assert found.exit_code == 2
    assert sentence in found.output


def test_the_command_prints_the_table(one_sweep: list[int], tmp_path: Path) -> None:
    path = tmp_path / "growth.json"
    found = CliRunner().invoke(app, ["bench-growth", "--op", "channel_pool", "--out", str(path)])
    assert found.exit_code == 0, found.output
    assert re.search(r"channel_pool +samples +4 to 8 ", found.output)
    assert len(results.Results.load(path).rows) == 8


# -------------------------------------------------------------------------------------------- tables and plots


def row(op: str, provider: str, size: int, ms: float | None, peak: int | None, **more: Any) -> dict[str, Any]:
    keys = {"family": "gating", "op": op, "provider": provider, "size": size, "sweep": "tokens"}
    laws_ = {"time_law": "linear", "memory_law": "constant"}
    return keys | laws_ | {"median_ms": ms, "peak_bytes": peak, "correct": ms is not None, "noisy": False} | more


def drawn_results() -> results.Results:
    rows = [row("kind", "cofire", n, 0.1 * n, 64) for n in (1, 4, 16, 64)]
    rows += [row("kind", "dense", n, 0.1 * n**2, n) for n in (1, 4, 16)]
    rows += [row("kind", "eager", 1, None, None)]
    rows += [row("unkind", "cofire", n, 0.1 * n**1.5, 64 * n, noisy=n == 64) for n in (16, 1, 64, 4)]
    rows += [row("in_place", "cofire", n, 0.1 * n, 0, memory_law="linear") for n in (1, 4)]
    rows += [row("method:Some", "cofire", 100, 1.0, 10, sweep="parameters")]
    for n, ms in ((1, 4.1), (4, 4.4), (16, 5.6), (64, 10.4), (256, 29.6)):  # 4 and a tenth of the size
        rows.append(row("flat_kind", "cofire", n, ms, 64, p20_ms=ms, p80_ms=1.1 * ms))
    return results.Results({"device": "x"}, {}, [*rows, {"op": "of no sweep"}])


def test_table() -> None:
    headings, lines = growth.growth_table(drawn_results())
    assert all(len(line) == len(headings) for line in lines)
    found = {line[0]: line[1:] for line in lines}
    assert found["kind"] == ["tokens", "16 to 64", "1.00", "linear", "-", "0.00", "constant", "2.00", "1.00"]
    unkind = ["tokens", "16 to 64", "**~1.50** above", "linear", "-", "**1.00** above", "constant", "-", "-"]
    assert found["unkind"] == unkind
    assert found["in_place"] == ["tokens", "1 to 4", "1.00", "linear", "-", "allocates nothing", "linear", "-", "-"]
    assert found["method:Some"] == ["parameters", "-", "-", "linear", "-", "-", "constant", "-", "-"]
    flat = ["tokens", "16 to 256", "0.60 [0.57, 0.63] below", "linear", "up to 16", "0.00", "constant", "-", "-"]
    assert found["flat_kind"] == flat


def test_plots() -> None:
    drawn = growth.growth_plots(drawn_results())
    assert set(drawn) == {"gating", "methods"}
    for svg in drawn.values():
        xml.etree.ElementTree.fromstring(svg)
        assert "prefers-color-scheme:dark" in svg and "currentColor" in svg
    text = re.sub("</?tspan[^>]*>", "", drawn["gating"])
    for words in ("kind, by tokens", ">ms: 1.50 (linear)<", ">ms: 1.00, 2.00 (linear)<", "MiB: nothing", "plain torch"):
        assert words in text, words
    assert "Some, by parameters" in drawn["methods"]
    assert len(re.findall("<circle", drawn["methods"])) == 3, "one in the legend, one for time, one for memory"


def test_the_line_of_theory_stays_in_its_panel() -> None:
    x, y = plots.LogAxis([1, 100], 0, 100), plots.LogAxis([1, 10], 100, 0)
    assert plots._guide([(1, 5), (100, 10)], 0.5, x, y) == [(0, pytest.approx(100)), (100, 0)]
    assert plots._guide([(1, 5), (100, 10)], 1, x, y) == [(pytest.approx(50), pytest.approx(100)), (100, 0)]
    assert plots._guide([(1, 5), (100, 10)], 0, x, y) == [(0, 0), (100, 0)]


def test_every_line_has_its_points() -> None:
    found = laws.sweeps_of(drawn_results())
    assert list(found)[:2] == [("gating", "flat_kind", "tokens"), ("gating", "in_place", "tokens")]
    assert laws.points_of(found["gating", "kind", "tokens"], "dense", "median_ms") == [(1, 0.1), (4, 1.6), (16, 25.6)]
    assert laws.points_of(found["gating", "kind", "tokens"], "eager", "median_ms") == []
