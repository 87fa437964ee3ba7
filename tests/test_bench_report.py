# SPDX-License-Identifier: Apache-2.0
"""The report: who won, the tables and pictures, floors, two machines, two runs, the page in a browser, and fresh docs."""

from __future__ import annotations

import functools
import html
import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cofire import bench
from cofire.bench import cases as suite
from cofire.bench import floors, results
from cofire.bench.cases import Case, Random
from cofire.bench.peers import built_in
from cofire.bench.report import compare, markdown, page, plots, roster, rows, tables
from cofire.bench.report.chart import STYLE, LogAxis, inline
from cofire.bench.report.extras import Extras
from cofire.cli import app

report = importlib.import_module("cofire.bench.report")  # the package has a function of that name
ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CEILINGS = {
    "copy_gbs": {"1": 100.0, "64": 20.0},
    "read_gbs": {"1": 90.0, "64": 30.0},
    "gemm_gflops": {"float32": 200.0, "bfloat16": 100.0},
    "conv_gflops": {"float32": 250.0, "bfloat16": 150.0},
}


def row(provider: str, ms: float | None, case: str = "M8", op: str = "qlinear", **more: Any) -> results.Row:
    given = {
        "family": "lowbit", "op": op, "case": case, "dtype": "float32", "device": "cpu", "mode": "forward",
        "provider": provider, "median_ms": ms, "p20_ms": ms, "p80_ms": ms, "bytes": 10**6, "flops": 10**8,
        "peak_bytes": None if ms is None else 2**20, "correct": ms is not None, "noisy": False, "commit": "c", "date": "d",
    }  # fmt: skip
    if ms is not None:
        given.update(gflops=1e5 / ms / 1e3, gbs=1 / ms, percent_of_ceiling=50 / ms)
    return {**given, **more}


def against(ratio: float, spread: float = 0.01) -> dict[str, float]:
    return {"speedup": ratio, "speedup_low": ratio * (1 - spread), "speedup_high": ratio * (1 + spread)}


def made_up(found: Sequence[results.Row], device: str = "CPU A", **more: Any) -> results.Results:
    environment = {
        "device": device, "kind": "cpu", "threads": 2, "instruction_set": "AVX2", "torch": "2", "python": "3",
        "platform": "p", "cofire": "0", "cofire_kernels": "avx2", "commit": "c", "date": "d", "quick": False,
        "peers": {"onnxruntime": "1.0", "torchao": None},
    }  # fmt: skip
    return results.Results({**environment, **more}, CEILINGS, list(found))


def some_rows() -> list[results.Row]:
    """Won, lost and tied against dense; won and lost against a peer; one wrong, one absent, one that is not compared."""
    gone = {"absent": True, "note": "not installed: torchao"}
    return [
        row("cofire", 1.0, "won", **against(3)), row("dense", 3.0, "won", variant="packed"),
        row("peer:onnxruntime", 2.0, "won"), row("peer:torchao", None, "won", **gone),
        row("cofire", 4.0, "lost", **against(0.5), noisy=True), row("dense", 2.0, "lost"),
        row("peer:onnxruntime", 2.5, "lost"), row("peer:torchao", None, "lost", **gone),
        row("cofire", 1.0, "tied", **against(1.02)), row("dense", 1.02, "tied"),
        row("peer:quanto", None, "tied", note="output 0 is off by 1"),
        row("cofire", 0.1, "call", mode="overhead", **against(0.1)), row("dense", 0.01, "call", mode="overhead"),
        row("cofire", 2.0, "16 M", "compact", family="selection", flops=0, **against(4)),
        row("dense", 8.0, "16 M", "compact", family="selection", flops=0),
        row("compile", 1.0, "16 M", "compact", family="selection", flops=0),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ who won


def test_who_won() -> None:
    found = rows.measurements(some_rows())
    assert [tables.verdict(m) for m in found] == ["won", "lost", "tied", "", "won"]
    lowbit, selection = rows.standings([made_up(some_rows())])
    assert (lowbit.dense.won, lowbit.dense.tied, lowbit.dense.lost) == (1, 1, 1), "an overhead is not compared"
    assert lowbit.dense.mean == pytest.approx((3 * 0.5 * 1.02) ** (1 / 3))
    assert (lowbit.library.won, lowbit.library.lost) == (1, 1)
    assert (selection.dense.won, selection.torch.lost) == (1, 1), "torch.compile is what somebody could use instead"
    assert selection.library.count == 0, "and no other library"
    assert [tables.headline([lowbit, selection], which) for which in ("dense", "library")] == [
        "Of 4 measurements against the strongest plain torch, cofire won 2, tied 1 and lost 1; "
        "3 of 4 were undisturbed: won 2, tied 1, lost 0.",
        "Of 2 measurements against the best of other libraries, cofire won 1, tied 0 and lost 1; "
        "1 of 2 were undisturbed: won 1, tied 0, lost 0.",
    ]
    assert tables.headline([], "library") == "Nothing was compared with the best of other libraries."


def test_what_the_machine_disturbed_is_counted_apart() -> None:
    def both(ours: bool | None, other: bool | None) -> rows.Score:
        flags = [{} if f is None else {"flagged": f} for f in (ours, other)]
        found = [row("cofire", 1.0, **against(2), **flags[0]), row("dense", 2.0, **flags[1]), row("peer:x", 3.0)]
        (standing,) = rows.standings([made_up(found)])
        assert standing.dense.won == 1, "it counts all the same"
        assert standing.library.quiet is not None and standing.library.quiet.count == (not ours)
        assert standing.dense.quiet is not None
        return standing.dense.quiet

    assert both(False, False).won == both(None, None).won == 1
    assert both(True, False).count == both(False, True).count == 0
    disturbed = made_up([row("cofire", 1.0, **against(2), flagged=True), row("dense", 2.0)])
    assert tables.headline(rows.standings([disturbed])).endswith("lost 0; 0 of 1 were undisturbed.")
    assert tables.summary(rows.standings([disturbed]))[1][0][2:4] == ["1 won, 0 lost (2.00x)", "0 of 1"]


@pytest.mark.parametrize(("pairs", "text"), [(5, "2.00x"), (6, "2.00x [1.50, 2.50]"), (None, "2.00x [1.50, 2.50]")])
def test_fewer_than_six_pairs_have_no_interval(pairs: int | None, text: str) -> None:
    """The smallest and the largest of 5 readings hold the median with 94 %."""
    assert tables.against(rows.Comparison(2.0, 1.5, 2.5, {}, pairs)) == text
    assert rows.Comparison(2.0, 0.5, 2.5, {}, pairs).verdict == "tied", "their whole range says that much"


def test_the_number_of_pairs_is_said() -> None:
    def cell(ours: dict[str, Any], dense: dict[str, Any]) -> tuple[str, str]:
        found = [row("cofire", 1.0, **against(2), **ours), row("dense", 2.0, **dense)]
        (measurement,) = rows.measurements(found)
        svg = "".join(plots.speedup_plots(found))
        assert ("1.98, 2.02" in svg) == ("[" in tables.COLUMNS["against dense"](measurement))
        return tables.COLUMNS["pairs"](measurement), tables.COLUMNS["against dense"](measurement)

    assert cell({"rounds": 30}, {"rounds": 3}) == ("3", "2.00x"), "an older file says how many there are at most"
    assert cell({"rounds": 30, "pairs": 2}, {"rounds": 30}) == ("2", "2.00x")
    assert cell({"rounds": 30, "pairs": 7}, {"rounds": 30}) == ("7", "2.00x [1.98, 2.02]")
    assert cell({}, {}) == ("-", "2.00x [1.98, 2.02]")


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [(1.04, 0, "tied"), (1.06, 0, "won"), (1.2, 0.3, "tied"), (0.94, 0, "lost"), (0.96, 0, "tied"), (0.9, 0.2, "tied")],
)
def test_ties(ratio: float, spread: float, verdict: str) -> None:
    found = rows.Comparison(ratio, ratio * (1 - spread), ratio * (1 + spread), {})
    assert found.verdict == verdict


NO_RIVALS = (
    *("peer:cofire-on-one-thread", "peer:plain layer", "eager", "dense", "peer:gather-out", "peer:grouped"),
    *("peer:torch sdpa (softmax, another function)", "peer:dequantize-then-dense", "peer:dense fp32"),
)


def test_what_is_no_rival() -> None:
    (only,) = rows.measurements([row("cofire", 2.0), *(row(name, 1.0) for name in NO_RIVALS)])
    assert only.against(rows.LIBRARY) is None and only.against(rows.TORCH) is None
    others = tables.COLUMNS["others ms (of ceiling)"](only)
    for words in ("plain layer (bound) 1", "fp32 (part of dense) 1", "dequantize-then-dense (our own code) 1"):
        assert words in others
    assert "(softmax, another function) 1" in others and "cofire-on-one-thread 1" in others, "the name says it"


def test_libraries_and_torch_are_rivals_apart() -> None:
    found = [
        row("cofire", 2.0),
        row("peer:faiss", 1.0),
        row("peer:numpy", 3.0),
        row("compile", 4.0),
        row("peer:torch csr", 3.0),
    ]
    (only,) = rows.measurements(found)
    library, torch = only.against(rows.LIBRARY), only.against(rows.TORCH)
    assert library is not None and (library.ratio, library.other["provider"]) == (0.5, "peer:faiss")
    assert torch is not None and (torch.ratio, torch.other["provider"]) == (1.5, "peer:torch csr")
    cells = dict(zip(tables.COLUMNS, tables.cells(only)))
    assert cells["against best library"] == "**0.50x**" and cells["against other torch"] == "1.50x"
    assert cells["others ms (of ceiling)"] == "numpy 3 (17 %), compile 4 (12 %)"
    assert rows.kind_of("peer:somebody's own") == rows.LIBRARY


def test_pairs_say_more_than_medians() -> None:
    def ratio(**more: Any) -> float:
        (only,) = rows.measurements([row("cofire", 2.0, run="a"), row("peer:faiss", 4.0, **more)])
        found = only.against(rows.LIBRARY)
        assert found is not None
        return found.ratio

    assert ratio(run="a", vs_cofire=2.5) == 2.5
    assert ratio(run="a") == 2.0, "an older file"
    assert ratio(run="b", vs_cofire=2.5) == 2.0, "beside a row of ours that is no longer there"


def test_every_provider_has_a_kind() -> None:
    """One that stands in a family's own file is a library only where it is named as one."""
    every = {name for family in bench.families() for case in suite.of_family(family) for name in case.providers}
    named = {*rows.NO_RIVALS, *rows.OTHER_TORCH, *rows.LIBRARIES}
    assert [n for n in every if n.startswith("peer:") and not n.startswith("peer:cofire") and n not in named] == []
    peers = {f"peer:{p.name}": rows.TORCH if not p.packages else rows.LIBRARY for p in built_in()}
    assert {name: rows.kind_of(name) for name in peers} == peers, "those without a package are torch's own"
    assert named - every <= set(peers), "a provider that no case has"


def test_absent_peers_are_one_line() -> None:
    found = some_rows()
    assert rows.absent(found) == ["torchao (not installed: torchao; 2 measurements)"]
    text = markdown.family("lowbit", [made_up(found)], [])
    assert text.count("torchao (not installed") == 1 and "Not there: torchao" in text
    assert "torchao" not in tables.COLUMNS["others ms (of ceiling)"](rows.measurements(found)[0])


def test_machines_are_told_apart() -> None:
    def names(*given: results.Results) -> list[str]:
        return rows.names(given)

    a, b = made_up([]), made_up([], "CPU B")
    assert names(a, b) == ["cpu-a", "cpu-b"]
    assert names(a, made_up([], threads=8)) == ["cpu-a-2-threads", "cpu-a-8-threads"]
    assert rows.titles([a, made_up([], instruction_set="AVX512")]) == ["CPU A, AVX2", "CPU A, AVX512"]
    caches = [made_up([], caches={"L2": size}) for size in ("512K", "1024K")]
    assert rows.titles([*caches, b]) == ["CPU A, L2 512K", "CPU A, L2 1024K", "CPU B"]
    assert rows.titles([a, a, b]) == ["CPU A (1)", "CPU A (2)", "CPU B"]


# --------------------------------------------------------------------------------------------------- tables, pictures


def test_cells() -> None:
    won, lost, tied, call, compact = (
        dict(zip(tables.COLUMNS, tables.cells(m))) for m in rows.measurements(some_rows())
    )
    assert won["dense ms (of ceiling)"] == "3 (17 %) packed"
    assert won["of ceiling"] == "50 %" and won["against dense"] == "3.00x [2.97, 3.03]"
    assert won["best library ms (of ceiling)"] == "onnxruntime 2 (25 %)"
    assert lost["against dense"] == "**0.50x [0.49, 0.51]**", "a loss is bold"
    assert lost["against best library"] == "**0.62x**" and lost["cofire ms"] == "~4"
    assert "quanto no number" in tied["others ms (of ceiling)"] and "off by 1" in tied["notes"]
    assert call["against dense"] == "-" and compact["best other torch ms (of ceiling)"].startswith("compile 1")
    assert compact["best library ms (of ceiling)"] == compact["against best library"] == "-"
    assert (tables.times(None), tables.times(123.4), tables.digits(12345.0)) == ("-", "123x", "12345")
    assert tables.environment(results.Results({"device": "D", "kind": "cpu"}, {})).startswith("D, not noted threads")
    assert tables.ceilings(results.Results({}, {})) == "Ceilings: not measured."


def test_operators_have_their_floor_and_their_losses() -> None:
    headings, lines = tables.operators(made_up(some_rows()), "lowbit")
    (line,) = lines
    cells = dict(zip(headings, line))
    assert "FLOPs: 2 M N K" in cells[tables.MUST]
    assert cells["slowest"] == "**0.50x**" and cells["fastest"] == "3.00x"
    assert cells["against dense (mean)"] == "1 won, 1 tied, **1 lost** (1.15x)"
    assert cells["undisturbed"] == "2 of 3: 1 won, 1 tied, 0 lost"
    assert cells["against best library (mean)"] == "1 won, **1 lost** (1.12x)"
    assert cells["against other torch (mean)"] == "-"


def test_what_no_commit_has_is_told() -> None:
    found = [row("cofire", 1.0), row("dense", 1.0, commit="abc+changes"), row("eager", 1.0, commit="abb+changes")]
    results_ = made_up([*found, row("cofire", 1.0, family="gating")])
    line = "Measured with changes that are in no commit: 2 rows, after abb, abc."
    assert tables.caveats(results_) == tables.caveats(results_, "lowbit") == [line]
    assert tables.caveats(results_, "gating") == []
    assert line in markdown.family("lowbit", [results_], []) and line in markdown.index([results_], [], Extras())
    assert page.page([results_], Extras()).count(line) == 2, "with the family, and with the machine"


def test_what_each_run_measured_with_is_shown() -> None:
    noted = {"date": "today", "commit": "c", "threads": 2, "peers": {"onnx": "1", "torchao": None}, "affinity": [0, 1]}
    found = made_up(
        [row("cofire", 1.0, run="a"), row("dense", 1.0, run="a"), row("eager", 1.0)], runs={"a": noted, "b": noted}
    )
    headings, lines = tables.runs(found)
    assert [dict(zip(headings, line)) for line in lines] == [
        {
            "run": "a",
            "begun": "today",
            "commit": "c",
            "rows": "2",
            "measured with": "threads 2; peers onnx 1; affinity 0, 1",
        },
        {"run": "earlier ones", "begun": "-", "commit": "-", "rows": "1", "measured with": "not noted"},
    ]
    assert "| a | today | c | 2 |" in markdown.index([found], [], Extras()) and ">today<" in page.page(
        [found], Extras()
    )
    older = made_up(some_rows())
    assert tables.runs(older)[1] == [] and "each run measured with" not in markdown.index([older], [], Extras())


def test_rows_of_earlier_commits_are_told() -> None:
    found = made_up([row("cofire", 1.0), row("dense", 1.0, commit="old", date="yesterday")])
    (line,) = tables.commits(found, "lowbit")
    assert line == "Measured earlier: 1 row, at commit old, yesterday to yesterday."
    assert tables.commits(found, "gating") == []


def test_long_plots_are_split() -> None:
    found = [
        r for i in range(90) for r in (row("cofire", 1.0, f"case {i}", **against(2)), row("dense", 2.0, f"case {i}"))
    ]
    drawn = plots.speedup_plots(found)
    assert [svg.count("case ") for svg in drawn] == [30, 30, 30]
    assert all(float(re.search(r'height="(\d+)', svg).group(1)) < 1000 for svg in drawn)  # type: ignore[union-attr]
    assert plots.speedup_plots([]) == [] and plots.speedup_plot([]) is None and plots.standing_plot([]) is None


def test_pictures() -> None:
    found = made_up(some_rows())
    drawn = markdown.pictures([found])
    assert set(drawn) == {
        "summary.svg", "cpu-a-lowbit-speedup.svg", "cpu-a-lowbit-roofline.svg", "cpu-a-selection-speedup.svg",
        "cpu-a-selection-roofline.svg",
    }  # fmt: skip
    for svg in drawn.values():
        assert svg.startswith("<svg") and "currentColor" in svg and STYLE in svg and STYLE not in inline(svg)
        assert "nan" not in svg
    assert plots.LOSS in drawn["cpu-a-lowbit-speedup.svg"] and 'opacity="0.5"' in drawn["cpu-a-lowbit-speedup.svg"]
    assert "call" not in drawn["cpu-a-lowbit-roofline.svg"], "an overhead has no roofline"
    assert plots.roofline_plots(results.Results({}, {}, found.rows), found.rows) == []


def test_axis() -> None:
    axis = LogAxis([1, 100], 0, 200)
    assert axis(10) == pytest.approx(100) and list(axis.ticks()) == [1, 10, 100]
    assert list(LogAxis([1, 8], 0, 1).ticks()) == [1, 2, 4, 8]
    assert len(list(LogAxis([1e-9, 1e9], 0, 1).ticks())) <= 7
    assert LogAxis([5, 5], 0, 10)(5) == pytest.approx(5)


# ----------------------------------------------------------------------------------------------------------- a report


def saved(found: results.Results, path: Path) -> Path:
    return found.save(path)


@pytest.fixture
def any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite that has all that is made up here."""
    monkeypatch.setattr(roster, "gone", lambda found: [])


@pytest.mark.usefixtures("any_case")
def test_report(tmp_path: Path) -> None:
    file = saved(made_up(some_rows()), tmp_path / "r.json")
    written = {p.name: p.read_text() for p in bench.report([file], tmp_path / "docs")}
    tables_page, family = written["benchmarks.md"], written["benchmarks-lowbit.md"]
    assert "cofire won 2, tied 1 and lost 1" in tables_page and "[lowbit](benchmarks-lowbit.md)" in tables_page
    assert "benchmarks/summary.svg" in tables_page and "GPU: not measured." in tables_page
    assert "**0.50x [0.49, 0.51]**" in family and "no number" in family and "<details>" in family
    whole = written["benchmarks.html"]
    for part in ("width=device-width", "prefers-color-scheme: dark", "<svg", "<strong>0.50x", "GPU: not measured."):
        assert part in whole
    assert not re.search(r'(src|href)="(?!#)|url\(|@import', whole), "the page needs no other file"
    linked = set(re.findall(r"\]\((benchmarks[^)]*)\)", tables_page + family))
    assert linked and all((tmp_path / "docs" / name).exists() for name in linked)
    # the words around the generated part are the reader's own
    path = tmp_path / "docs" / "benchmarks.md"
    path.write_text("My words.\n" + tables_page)
    bench.report([file, file], tmp_path / "docs")
    assert path.read_text().startswith("My words.\n") and "CPU A (2)" in path.read_text()
    path.write_text("no markers")
    with pytest.raises(ValueError, match="must contain the lines"):
        bench.report([file], tmp_path / "docs")


def test_nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    written = {p.name: p.read_text() for p in bench.report([], tmp_path / "empty")}
    assert set(written) == {"benchmarks.md", "benchmarks.html"}
    assert all("Not measured." in text and "GPU: not measured." in text for text in written.values())
    assert markdown.measured([]) == "Not measured."


def test_a_gpu_has_columns_like_any_machine() -> None:
    gpu = made_up(some_rows(), "GPU X", kind="cuda")
    text = markdown.index([gpu], [], Extras())
    assert "GPU: not measured" not in text and "GPU X" in text
    assert "GPU: not measured" not in page.page([gpu], Extras())


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("[]")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "r.json"), "--out", str(tmp_path / "docs")])
    assert result.exit_code == 2 and "is not a results file" in result.output
    assert not (tmp_path / "docs").exists(), "nothing is written"


@pytest.mark.usefixtures("any_case")
def test_the_readme_has_one_short_table(tmp_path: Path) -> None:
    file = saved(made_up(some_rows()), tmp_path / "r.json")
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(["Words.", *report.MEASURED, "More."]))
    assert readme in bench.report([file], tmp_path / "docs", readme)
    text = readme.read_text()
    line = "| lowbit | CPU A | 1 won, 1 tied, **1 lost** (1.15x) | 2 of 3: 1 won, 1 tied, 0 lost | 1 won, **1 lost** (1.12x) | - |"
    assert line in text and text.endswith("More.")
    assert len(text) < 1500


def test_a_family_page_of_its_own() -> None:
    both = [made_up(some_rows()), made_up([{**r, "family": "gating"} for r in some_rows()], "CPU B")]
    text = report.family_tables("lowbit", both)
    assert "### CPU A" in text and "### CPU B" not in text
    assert "Peers: onnxruntime 1.0; not installed: torchao." in text
    assert report.family_tables("lowbit", [both[1]]) == "Not measured."


@pytest.mark.usefixtures("any_case")
def test_memory_beside_the_results(tmp_path: Path) -> None:
    file = saved(made_up(some_rows()), tmp_path / "results" / "r.json")
    where = {"device": "CPU A", "threads": 2, "torch": "2", "date": "d"}
    one = {"method": "eager", "shape": [8, 8], "clusters": 4, "saved_bytes": 9, "peak_bytes": 9, "weight_bytes": 9}
    memory = {"environment": where, "rows": [one]}
    (tmp_path / "results" / "memory").mkdir()
    (tmp_path / "results" / "memory" / "m.json").write_text(json.dumps(memory))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "clustering.md").write_text("\n".join(["Words.", *report.MEMORY, "More."]))
    assert docs / "clustering.md" in bench.report([file], docs)
    text = (docs / "clustering.md").read_text()
    assert text.startswith("Words.") and text.endswith("More.") and "| method" in text


@pytest.mark.usefixtures("any_case")
def test_growth_and_whole_networks_beside_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results"
    found = made_up(some_rows())
    file = saved(found, folder / "r.json")
    sweep = [row("cofire", 2.0**i, f"{4**i}", "dkm", sweep="weights", size=4**i) for i in range(2, 7)]
    saved(results.Results(found.environment, {}, sweep), folder / "growth" / "some-cpu.json")
    network = {
        "family": "gating", "network": "VGG", "variant": "dense", "latency_ms": 1.0, "latency_p20_ms": 1.0,
        "latency_p80_ms": 1.0, "throughput": 9.0, "unit": "images/s", "peak_bytes": 9, "weight_bytes": 9, "accuracy": 98.0,
        "accuracy_kind": "test images", "noisy": False, "seconds": 1.0, "correct": True,
    }  # fmt: skip
    fast = {**network, "variant": "gated", "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1}
    fast.update(throughput_gain=2.0, throughput_gain_low=1.9, throughput_gain_high=2.1)
    data = {"environment": found.environment, "ceilings": {}, "rows": [network, fast]}
    (folder / "end_to_end").mkdir()
    (folder / "end_to_end" / "some-cpu.json").write_text(json.dumps(data))
    for quick in ("growth", "end_to_end"):
        (folder / quick / "some-cpu-quick.json").write_text("a quick run is not read")
    written = {p.name: p for p in bench.report([file], tmp_path / "docs")}
    text, whole = (written[f"benchmarks.{kind}"].read_text() for kind in ("md", "html"))
    assert "## How cost grows" in text and "## Whole networks" in text
    assert "How cost grows</h2>" in whole and "Whole networks</h2>" in whole and "VGG" in whole and "0.50" in whole
    pictures = set(re.findall(r"\]\(benchmarks/(some-cpu[^)]*)\)", text))
    assert len(pictures) == 2 and pictures <= set(written)
    (tmp_path / "docs" / report.NETWORKS).write_text("Words on networks.")
    bench.report([file], tmp_path / "docs")
    text = written["benchmarks.md"].read_text()
    assert "[networks.md](networks.md)" in text and "VGG" not in text, "the page of the networks has them"


# ------------------------------------------------------------------------------------------------------------- floors


@functools.cache
def cases_of() -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for family in bench.families():
        for case in suite.of_family(family):
            found.setdefault(case.op, []).append(case)
    return found


def test_every_operator_with_a_benchmark_has_a_floor() -> None:
    assert set(floors.FLOORS) == set(cases_of())
    for op, floor in floors.FLOORS.items():
        letters = set(re.findall(r"[A-Za-z]+", f"{floor.bytes} {floor.flops}")) - set(floors.FUNCTIONS) - {"e"}
        assert floor.where, op
        if "bytes of" not in floor.where:
            assert all(re.search(rf"\b{x}\b", floor.where) for x in letters), f"{op}: a letter without a meaning"


def off(case: Case, floor: floors.Floor) -> str | None:
    """Where a formula and what the benchmarks divide by differ: not at all, but for a division, which is rounded down."""
    args = case.tiny(Random(str(case)))
    symbols = floors.symbols_of(case.op, args)
    got = [floors.evaluate(f, symbols) for f in (floor.bytes, floor.flops)]
    expected = list(case.cost(args, "forward"))
    rel = 1e-3 if "/" in floor.bytes else 0
    return None if got == pytest.approx(expected, rel=rel, abs=0) else f"{case}: got {got}, expected {expected}"


@pytest.mark.parametrize("op", sorted(floors.FLOORS))
def test_a_floor_is_what_the_benchmarks_divide_by(op: str) -> None:
    of_one = [c for c in cases_of()[op] if c.ours is None or c.flops is None]  # others measure more than the operator
    for case in of_one[:: max(1, len(of_one) // 3)][:4]:
        assert off(case, floors.FLOORS[op]) is None


def test_a_floor_that_lies_is_found() -> None:
    case, floor = cases_of()["masked_linear"][0], floors.FLOORS["masked_linear"]
    assert "expected" in str(off(case, replace(floor, flops="2 M N K + M")))
    assert "expected" in str(off(case, replace(floor, bytes="e (M K + N K) + b")))


def test_formulas() -> None:
    letters = {"M": 3, "N": 5, "K": 9, "e": 4}
    for formula, value in (("2 M N K", 270), ("e (M K + N) - 1", 127), ("N ceil(K / 8)", 10), ("(1 + M) (N + e)", 36)):
        assert floors.evaluate(formula, letters) == value
    with pytest.raises(ValueError, match=r"floors: 'M X' must consist of \['K', 'M', 'N', 'e'\], got 'X'"):
        floors.evaluate("M X", letters)
    with pytest.raises(ValueError, match="got '_'"):
        floors.evaluate("M . _", {**letters, ".": 1})
    assert floors.floor_words("no such operator") == "-"


# ------------------------------------------------------------------------------------------ two machines, two commits


def test_two_machines() -> None:
    other = [{**r, "median_ms": r["median_ms"] and r["median_ms"] / 2} for r in some_rows() if r["case"] != "lost"]
    a, b = made_up(some_rows()), made_up(other, "CPU B")
    headings, lines = compare.machines(a, b)
    assert headings[-1] == "against dense on CPU B" and [line[1] for line in lines] == ["won", "tied", "call", "16 M"]
    assert lines[0] == ["qlinear", "won", "fp32", "forward", "1", "0.5", "2.00", "3.00x", "3.00x"]
    by_family = compare.machines_by_family(a, b)[1]
    assert by_family[0] == ["lowbit", "3", "2.00", "1.75x", "1.75x"]
    text = markdown.index([a, b], [], Extras())
    assert "### CPU A and CPU B" in text
    alone = made_up([row("cofire", 1.0, "another")], "CPU C")
    assert "No measurement is in both files." in page.page([a, alone], Extras())
    assert markdown.side_by_side([a]) == []


def changed(old: float, new: float, spread: float = 0.01, noisy: bool = False) -> str:
    def ours(ms: float) -> results.Row:
        return row("cofire", ms, p20_ms=ms * (1 - spread), p80_ms=ms * (1 + spread), noisy=noisy)

    return compare.Change(ours(old), ours(new), None).verdict


def test_verdicts_know_noise() -> None:
    assert changed(1, 1.2) == "slower" and changed(1, 0.8) == "faster"
    assert changed(1, 1.08) == "same", "two runs of one thing differ by as much"
    assert changed(1, 1.3, spread=0.2) == "same", "the readings overlap"
    assert changed(1, 1.3, noisy=True) == "same" and changed(1, 1.6, noisy=True) == "slower"


def two_runs(**environment: Any) -> tuple[results.Results, results.Results]:
    def run(ms: dict[str, float], **more: Any) -> results.Results:
        return made_up([r for case, t in ms.items() for r in (row("cofire", t, case), row("dense", 2.0, case))], **more)

    old = run({"a": 1.0, "b": 1.0, "c": 1.0, "gone": 1.0})
    return old, run({"a": 0.5, "b": 3.0, "c": 1.0, "new": 1.0, "newer": 1.0}, commit="d", **environment)


def test_two_commits() -> None:
    old, new = two_runs()
    found = compare.changes(old, new)
    assert [(c.new["case"], c.verdict) for c in found] == [("b", "slower"), ("c", "same"), ("a", "faster")]
    assert compare.change_table(found)[1][0][-3:] == ["**3.00**", "1", "**slower**"]
    assert compare.verdicts(old, new) == [
        "3 measurements in both files: 1 slower, 1 the same, 1 faster.",
        "Only in the old file: 1 measurement.",
        "Only in the new file: 2 measurements.",
    ]
    words = compare.verdicts(*two_runs(device="CPU B"))[-1]
    assert "not measured in the same environment" in words and "device: CPU A and CPU B" in words


def test_two_commits_from_the_command_line(tmp_path: Path) -> None:
    old, new = (saved(f, tmp_path / f"{i}.json") for i, f in enumerate(two_runs()))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["report", "--compare", str(old), str(new), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert {p.name for p in out.iterdir()} == {"comparison.md", "comparison.html"}
    text = (out / "comparison.md").read_text()
    assert "1 slower, 1 the same, 1 faster" in text and text.index("| b |") < text.index("| c |") < text.index("| a |")
    result = CliRunner().invoke(app, ["report", "--compare", str(old), str(tmp_path / "none.json")])
    assert result.exit_code == 2 and "none.json" in result.output


# ------------------------------------------------------------------------------------------------------ in a browser

#: Into the page: errors are kept, then everything is opened, sorted and filtered, and what came of it is written down.
WATCH = "<script>window.problems = []; window.onerror = text => { problems.push(text); };</script>"
TRY = """<script>
const seen = {};
const wide = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.folded = wide();
for (const fold of document.querySelectorAll('details')) fold.open = true;
seen.unfolded = wide();
seen.width = window.innerWidth;
seen.ground = getComputedStyle(document.body).backgroundColor;
const table = document.querySelector('table.rows'), heads = [...table.tHead.rows[0].cells];
const head = heads.find(h => h.textContent == 'cofire ms'), column = heads.indexOf(head);
const values = () => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[column].textContent);
head.click();
seen.up = values();
head.click();
seen.down = values();
const bar = table.parentElement.previousElementSibling, [words, which, count] = bar.children;
which.value = 'lost';
which.onchange();
seen.lost = values();
which.value = '';
words.value = 'tied quanto';
words.oninput();
seen.words = values();
seen.count = count.textContent;
seen.problems = window.problems;
parent.postMessage(JSON.stringify(seen), '*');
</script>"""
#: A window is 500 pixels wide at least; a frame may be as narrow as a phone.
FRAME = """<!doctype html><html><head><meta name="color-scheme" content="light dark"><script>
window.onmessage = event => { document.body.textContent = event.data; };
</script></head><body><iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe></body></html>"""


def browse(folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """What the page in the folder tells of itself in a frame of that width."""
    assert CHROMIUM is not None
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("{width}", str(width)))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--window-size=1400,1000"]
    words += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    dom = subprocess.run(
        [CHROMIUM, *words, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    found = re.search(r"<body>(\{.*\})\s*</body>", dom, re.DOTALL)
    assert found is not None, dom[-2000:]
    seen: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    return seen


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser(width: int, dark: bool, tmp_path: Path) -> None:
    """Nothing sticks out of the page, folded or unfolded; sorting and filtering work; no script fails."""
    long = "a case with a very long name, " * 6
    found = [*some_rows(), row("cofire", 3.0, long, **against(2)), row("dense", 6.0, long)]
    both = [made_up(found, "A processor with a very long name " * 3), made_up(found, "B")]
    text = page.page(both, Extras()).replace("<head>", "<head>" + WATCH).replace("</body>", TRY + "</body>")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    seen = browse(tmp_path, width, dark)
    assert seen["width"] == width and seen["folded"] <= 0 and seen["unfolded"] <= 0
    assert seen["problems"] == []
    assert seen["ground"] == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert seen["up"] == ["0.1", "1", "1", "3", "~4"] and seen["down"] == ["~4", "3", "1", "1", "0.1"]
    assert seen["lost"] == ["~4"] and seen["words"] == ["1"] and seen["count"] == "1 of 5"


# ------------------------------------------------------------------------------------------------------------- fresh

RESULTS = ROOT / "benchmarks" / "results"
checkout = pytest.mark.skipif(not RESULTS.is_dir(), reason="not a checkout")


def committed() -> list[Path]:
    return [path for path in sorted(RESULTS.glob("*.json")) if not path.stem.endswith("-quick")]


@checkout
def test_pages_are_fresh(tmp_path: Path) -> None:
    """What ``make readme`` writes is what is there, page by page and picture by picture, and nothing else is."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for path in (ROOT / "docs").glob("*.md"):
        if not re.match(r"benchmarks-", path.name):
            shutil.copy(path, docs)
    readme = Path(shutil.copy(ROOT / "README.md", tmp_path))
    if list((RESULTS / "end_to_end").glob("*.json")):
        pytest.importorskip("matplotlib")
    written = [p for p in bench.report(committed(), docs, readme) if p.suffix != ".html"]
    stale = []
    for path in written:
        there = ROOT / path.relative_to(tmp_path)
        if not there.exists() or there.read_text(encoding="utf-8") != path.read_text(encoding="utf-8"):
            stale.append(str(path.relative_to(tmp_path)))
    assert not stale, "run: make readme"
    names = {p.relative_to(tmp_path) for p in written}
    there = {p.relative_to(ROOT) for f in ("benchmarks-*.md", "*.svg", "benchmarks/*") for p in (ROOT / "docs").glob(f)}
    assert there <= names, "these are drawn from no results file: git rm"


@checkout
def test_no_ceiling_is_too_low() -> None:
    """What passes one says that it was measured too low, but for what the page names."""
    for path in committed():
        found = results.Results.load(path)
        if "change_gbs" not in found.ceilings:
            continue  # from before changes in place were among them
        above = [r for r in found.rows if r["provider"] == "cofire" and (r.get("percent_of_ceiling") or 0) > 105]
        narrow = (
            found.environment["instruction_set"] == "AVX2"
        )  # int8, and sums that fit in 16 bits: at most twice as fast
        few_bits = ["1 bits", "2 bits", "3 bits", "4 bits"]
        left = [
            r
            for r in above
            if not (narrow and r.get("arithmetic") == "int8" and any(bits in r["case"] for bits in few_bits))
            or r["percent_of_ceiling"] > 200
        ]
        assert {r["op"] for r in left} <= {"kv_fuse"}, path.name


@checkout
def test_nothing_is_shown_that_the_suite_does_not_have() -> None:
    """Rows of what is gone are left out; those of providers that nobody here knows are not committed."""
    for path in committed():
        found = results.Results.load(path)
        strange = {r["provider"] for r in found.rows} - roster.known(found.environment["kind"]) - roster.BY_MACHINE
        left = roster.current(found)
        shown = {r["provider"] for r in left.rows}
        assert not strange & shown, f"{path.name}: {sorted(strange & shown)}"
        assert roster.gone(left) == []


@checkout
def test_every_operator_was_measured() -> None:
    """One committed file has a row with a time of each operator with a benchmark, and some file one of each peer for CPUs."""
    lacking = []
    peers = {f"peer:{p.name}" for p in built_in() if "cpu" in p.devices}
    for path in committed():
        timed = [r for r in results.Results.load(path).rows if r["median_ms"]]
        peers -= {r["provider"] for r in timed}
        operators = set(cases_of()) - {r["op"] for r in timed if r["provider"] == "cofire"}
        lacking.append(f"{path.name}: {', '.join(sorted(operators))}" if operators else "")
    assert not all(lacking), "not measured: " + "; ".join(lacking)
    assert not peers, f"peers without a time: {', '.join(sorted(peers))}"


# ----------------------------------------------------------------------------------------------- what the suite has

ALONE = frozenset({""})  #: of a provider without variants
#: The measurements of a small suite, and their providers with variants.
SMALL = {
    ("lowbit", "qlinear", "M8", "float32", "forward"): {
        "cofire": ALONE,
        "dense": frozenset({"packed", "plain"}),
        "peer:onnxruntime": ALONE,
        roster.ONE_THREAD: ALONE,
    },
    ("lowbit", "qlinear", "M8", "float32", "overhead"): {"cofire": ALONE, "dense": ALONE},
}


@pytest.fixture
def small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "roster", lambda device: SMALL if device == "cpu" else {})


def full() -> list[results.Row]:
    """What a run of the small suite measures."""
    return [
        row(name, 1.0, case, op, mode=mode) for (_, op, case, _, mode), names in SMALL.items() for name in sorted(names)
    ]


@pytest.mark.usefixtures("small_suite")
def test_rows_that_the_suite_no_longer_has_are_left_out(tmp_path: Path) -> None:
    gone = [
        row("cofire", 1.0, "M9"),
        row("cofire", 1.0, mode="forward, cold"),
        row("peer:onnxruntime", 1.0, mode="overhead"),
    ]
    stay = [*full(), row("peer:mine", 1.0), row("eager", 1.0)]
    left = roster.current(made_up([*gone, *stay]))
    assert left.rows == stay and left.left_out == gone, "somebody's own peer stays, and what the machine decides"
    line = "Left out: 3 rows of cases, providers or variants that the suite no longer has"
    assert tables.caveats(left) == [f"{line}."]
    (found,) = tables.caveats(left, "lowbit")
    assert found.startswith(f"{line} (qlinear, M9, float32, forward; qlinear, M8, float32, forward, cold; qlinear, M8")
    assert tables.caveats(left, "gating") == []
    written = {
        p.name: p for p in bench.report([saved(made_up([*gone, *stay]), tmp_path / "r.json")], tmp_path / "docs")
    }
    text = written["benchmarks-lowbit.md"].read_text()
    assert line in text and "| M9 |" not in text and "| M8 |" in text
    assert line in written["benchmarks.html"].read_text() and line in written["benchmarks.md"].read_text()


@pytest.mark.usefixtures("small_suite")
def test_rows_of_a_variant_that_the_provider_lost_are_left_out() -> None:
    gone = [
        row("dense", 1.0, variant="4 bits"),
        row("peer:onnxruntime", 1.0, variant="bfloat16"),
        row("dense", 1.0, variant="packed", mode="overhead"),
    ]
    stay = [
        row("dense", 1.0, variant="packed"),
        row("dense", 1.0),  # from when it had no variants
        row("dense", 1.0, mode="overhead"),
        row("eager", 1.0, variant="bfloat16"),
        row("peer:mine", 1.0, variant="4 bits"),
        row("peer:onnxruntime", None, absent=True, note="not installed: onnx"),
    ]
    left = roster.current(made_up([*gone, *stay]))
    assert left.rows == stay and left.left_out == gone


@pytest.mark.usefixtures("small_suite")
def test_what_a_file_lacks_is_named() -> None:
    forward = next(iter(SMALL))
    assert roster.missing(made_up(full())) == {}
    assert roster.missing(made_up([])) == {place: sorted(names) for place, names in SMALL.items()}

    def lacking(**more: Any) -> list[str]:
        """Where the row of the peer is another one."""
        found = [row("peer:onnxruntime", **more) if r["provider"] == "peer:onnxruntime" else r for r in full()]
        return roster.missing(made_up(found)).get(forward, [])

    assert lacking(ms=2.0) == lacking(ms=None, note="output 0 is off by 1") == [], "it was tried"
    for excuse in ("cannot run here: it needs another CPU", "left out: it takes minutes"):
        assert lacking(ms=None, absent=True, note=excuse) == []
    assert lacking(ms=None, absent=True, note="not installed: onnx") == ["peer:onnxruntime"]
    assert lacking(ms=None) == ["peer:onnxruntime"], "neither a time nor a reason"
    assert lacking(ms=2.0, variant="gone") == ["peer:onnxruntime"], "it was something else"
    wrong = [
        row("cofire", None, note="wrong") if r["provider"] == "cofire" and r["mode"] == "forward" else r for r in full()
    ]
    assert roster.missing(made_up(wrong)) == {forward: ["cofire"]}, "cofire itself needs a number"
    alone = [r for r in full() if r["provider"] != roster.ONE_THREAD]
    assert roster.missing(made_up(alone)) == {forward: [roster.ONE_THREAD]}
    assert roster.missing(made_up(alone, threads=1)) == {}
    lost = made_up([r for r in full() if r["mode"] == "forward"])
    assert roster.words(roster.missing(lost)) == ["lowbit, qlinear, M8, float32, overhead: cofire, dense"]


def test_the_roster_has_every_case_and_every_peer() -> None:
    there = roster.roster("cpu")
    assert {(place[1], place[2]) for place in there} == {
        (op, c.name) for op, cases in cases_of().items() for c in cases
    }
    assert all("cofire" in names for names in there.values())
    peers = {f"peer:{p.name}" for p in built_in() if "cpu" in p.devices}
    assert peers <= roster.known("cpu"), "whether they are installed or not"
    (place,) = [p for p in there if p[1:3] == ("mass_mask", "128x512 mass 0.95") and p[4] == "forward"]
    assert set(there[place]) == {"cofire", "dense", "eager", "compile", roster.ONE_THREAD}


def test_the_roster_has_the_variants_of_peers_that_are_not_here() -> None:
    (case,) = [
        c for c in cases_of()["qlinear"] if c.name == "M32 4096x4096 4 bits g128" and str(c.dtype) == "torch.bfloat16"
    ]
    place = "lowbit", case.op, case.name, "bfloat16", "forward, cold"
    assert roster.roster("cpu")[place]["peer:zentorch"] == {"4 bits"}
    old = row("peer:zentorch", 1.0, case.name, dtype="bfloat16", mode="forward, cold", variant="bfloat16")
    assert roster.gone(made_up([old])) == [old], "a dense product, which another peer has now"
    assert roster.gone(made_up([{**old, "variant": "4 bits"}])) == []
