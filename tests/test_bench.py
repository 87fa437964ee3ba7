# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite: its harness on cases made up here, and every case of the families on small shapes."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import bench, native
from cofire.bench import cases as suite
from cofire.bench import ceilings, harness, quiet, results, tuning
from cofire.bench.cases import Case, Provider, Random, plain
from cofire.nn import compressed
from cofire.registry import OPERATORS, tensors_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CEILINGS = {
    "copy_gbs": {"1": 100.0, "64": 20.0},
    "read_gbs": {"1": 90.0, "64": 30.0},
    "gemm_gflops": {"float32": 200.0, "bfloat16": 100.0},
    "conv_gflops": {"float32": 250.0, "bfloat16": 150.0},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def pool_case(**providers: Provider) -> Case:
    """A case of channel_pool that takes microseconds."""

    def args(rand: Random) -> tuple[Tensor, str]:
        return rand.normal(2, 3, 4, 4), "avg"

    return Case("channel_pool", "2x3x4x4", torch.float32, args, providers, args, family="gating")


def mean(x: Tensor, mode: str) -> tuple[Tensor]:
    return (x.mean((2, 3)),)


def zero(x: Tensor, mode: str) -> tuple[Tensor]:
    return (x.new_zeros(x.shape[:2]),)


def missing(x: Tensor, mode: str) -> tuple[Tensor]:
    raise ImportError("no such library here")


class Hurried(harness.Effort):
    def __init__(self, quick: bool, device: str = "cpu") -> None:
        super().__init__(quick, device)
        self.case_seconds = 0.01


@pytest.fixture
def suite_of_one(monkeypatch: pytest.MonkeyPatch) -> Case:
    """``run`` sees this one case, and ceilings that cost no time."""
    case = pool_case(
        dense=plain(mean, outputs=1), **{"peer:zero": plain(zero, outputs=1), "peer:missing": plain(missing, outputs=1)}
    )
    monkeypatch.setattr(harness, "select", lambda *_: [case])
    monkeypatch.setattr(ceilings, "measure", lambda *_: CEILINGS)
    monkeypatch.setattr(harness, "Effort", Hurried)
    return case


# ---------------------------------------------------------------------------------------------- one run


def test_run_writes_the_promised_schema(suite_of_one: Case, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    found = bench.run(quick=True, out=path, progress=False)
    data = json.loads(path.read_text())
    assert set(data) == {"environment", "ceilings", "rows"}
    assert {"device", "threads", "instruction_set", "torch", "commit", "date"} <= set(data["environment"])
    assert [r["provider"] for r in data["rows"]] == ["cofire", "dense", "peer:zero", "peer:missing"]
    for row in data["rows"]:
        assert set(results.COLUMNS) <= set(row)
    assert bench.Results.load(path).to_json() == found.to_json()
    assert os.listdir(path.parent) == ["results.json"], "a temporary file was left"


def test_a_wrong_provider_gets_no_number(suite_of_one: Case, tmp_path: Path) -> None:
    rows = {r["provider"]: r for r in bench.run(quick=True, out=tmp_path / "r.json", progress=False).rows}
    assert rows["dense"]["correct"]
    assert rows["dense"]["median_ms"] > 0
    ours = rows["cofire"]
    assert ours["speedup_low"] <= ours["speedup"] <= ours["speedup_high"]
    assert ours["pairs"] == ours["rounds"] and "vs_cofire" not in ours and rows["dense"]["vs_cofire"] > 0
    for name, reason in (("peer:zero", "output 0 is off by"), ("peer:missing", "ImportError: no such library here")):
        assert not rows[name]["correct"]
        assert reason in rows[name]["note"]
        assert [rows[name][c] for c in results.NUMBERS] == [None] * 4
        assert "speedup" not in rows[name]


def test_a_number_of_a_wrong_provider_is_not_written(suite_of_one: Case, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    found = bench.run(quick=True, out=path, progress=False)
    before = path.read_text()
    found.rows[2]["median_ms"] = 1.0
    with pytest.raises(ValueError, match=r"a provider with a wrong answer gets no number, got median_ms=1\.0"):
        found.save(path)
    del found.rows[2]["median_ms"]
    with pytest.raises(ValueError, match="a row must have the columns"):
        found.save(path)
    assert path.read_text() == before


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        bench.Results({"device": math.nan}, {}, []).save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.json"]


def test_rows_of_the_same_environment_stay(suite_of_one: Case, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first = bench.run(quick=True, out=path, progress=False)
    first.rows[0]["case"] = "another"
    first.save(path)
    assert len(bench.run(quick=True, out=path, progress=False).rows) == 5
    first.rows[0]["commit"] = "earlier"
    bench.Results({**first.environment, "commit": "earlier"}, CEILINGS, first.rows).save(path)
    later = bench.run(quick=True, out=path, progress=False)
    assert len(later.rows) == 5 and sum(row["commit"] == "earlier" for row in later.rows) == 1
    elsewhere = bench.Results({**first.environment, "torch": "0.1"}, CEILINGS, first.rows)
    elsewhere.save(path)
    assert len(bench.run(quick=True, out=path, progress=False).rows) == 4


def test_the_fastest_variant_is_the_baseline() -> None:
    def slow(x: Tensor, mode: str) -> tuple[Tensor]:
        for _ in range(50):
            x.mean((2, 3))
        return mean(x, mode)

    case = replace(pool_case(), providers={"dense": {"slow": plain(slow, outputs=1), "fast": plain(mean, outputs=1)}})
    rows = {r["provider"]: r for r in harness.measure(case, "forward", "cpu", Hurried(quick=True))}
    assert rows["dense"]["variant"] == "fast"
    assert rows["dense"]["variants_ms"]["slow"] > rows["dense"]["variants_ms"]["fast"]


# --------------------------------------------------------------------------------- variants with cold weights

HOT_MS, COLD_MS, STEADY_MS = 1.0, 9.0, 4.0


def of_weights(copied: list[str], name: str, cold_ms: float, hot_ms: float) -> Provider:
    """Slow with a weight that is another one than in its last call; ``copied`` gets its name for each copy that it is given."""
    last: list[int] = [0]

    def setup(x: Tensor, mode: str) -> Callable[[], tuple[Tensor]]:
        copied.append(name)

        def run() -> tuple[Tensor]:
            time.sleep((hot_ms if last[0] == x.data_ptr() else cold_ms) / 1e3)
            last[0] = x.data_ptr()
            return mean(x, mode)

        return run

    return Provider(setup, outputs=1)


def cold_case(monkeypatch: pytest.MonkeyPatch, variants: dict[str, tuple[float, float]]) -> tuple[Case, list[str]]:
    """Of variants by the ms that they take with cold and with hot weights; there are three copies of the weights."""
    monkeypatch.setattr(harness, "cold_bytes", lambda device: 3 * 4 * 2 * 3 * 16)
    copied: list[str] = []
    dense = {name: of_weights(copied, name, *ms) for name, ms in variants.items()}
    return replace(pool_case(), cold=(0,), providers={"dense": dense}), copied


@pytest.mark.parametrize("hot_first", [True, False], ids=["after hot weights", "at once"])
def test_the_fastest_variant_with_cold_weights_is_found_with_cold_weights(
    hot_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, copied = cold_case(monkeypatch, {"hot": (COLD_MS, HOT_MS), "steady": (STEADY_MS, STEADY_MS - 0.5)})
    given = harness.Input(case, "cpu", every_mode=True)
    effort = Hurried(quick=True)
    if hot_first:
        rows = {r["provider"]: r for r in harness.measure(case, "forward", "cpu", effort, given=given)}
        assert rows["dense"]["variant"] == "hot"
    copied.clear()
    rows = {r["provider"]: r for r in harness.measure(case, "forward, cold", "cpu", effort, given=given)}
    dense = rows["dense"]
    assert dense["variant"] == "steady" and dense["variants_ms"]["hot"] > dense["variants_ms"]["steady"]
    assert dense["median_ms"] == pytest.approx(STEADY_MS, rel=0.5)
    assert copied.count("steady") == copied.count("hot"), "the winner's copies are made but once"
    assert not given.cold, "and kept no longer than they are timed"


def test_a_variant_that_is_far_behind_gets_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    case, copied = cold_case(monkeypatch, {"near": (2.0, 2.0), "far": (30.0, 30.0)})
    rows = {r["provider"]: r for r in harness.measure(case, "forward, cold", "cpu", Hurried(quick=True))}
    assert rows["dense"]["variant"] == "near" and list(rows["dense"]["variants_ms"]) == ["near"]
    assert copied.count("far") <= 2, "for its check, and for its rank with hot weights"


def test_when_copying_took_long_the_best_with_hot_weights_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    case, copied = cold_case(monkeypatch, {"steady": (STEADY_MS, STEADY_MS), "hot": (COLD_MS, HOT_MS)})
    effort = Hurried(quick=True)
    effort.copying_seconds = 0.0
    monkeypatch.setattr(harness, "FAR_BEHIND", 100.0)
    rows = {r["provider"]: r for r in harness.measure(case, "forward, cold", "cpu", effort)}
    assert rows["dense"]["variant"] == "hot" and copied.count("steady") <= 2


def test_gradients_are_checked() -> None:
    def detached(x: Tensor, mode: str) -> tuple[Tensor]:
        return ((x * 2).mean((2, 3)) - x.detach().mean((2, 3)),)  # the right value, twice the gradient

    case = replace(pool_case(), gradients=(0,))
    given = harness.Input(case, "cpu")
    assert given.check(plain(mean, outputs=1), "forward+backward") is None
    assert given.check(plain(detached, outputs=1), "forward") is None
    assert "output 1 is off by" in str(given.check(plain(detached, outputs=1), "forward+backward"))


def test_cold_weights_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "cold_bytes", lambda device: 4 * 2 * 3 * 16 * 5)
    seen = []
    given = harness.Input(replace(pool_case(), cold=(0,)), "cpu")
    run = given.runs(plain(lambda x, mode: seen.append(x.data_ptr())), "forward, cold")
    for _ in range(10):
        run()
    assert len(set(seen)) == 5
    assert seen[:5] == seen[5:10] == seen[10:], "each is used once before time counts"


def test_copies_are_laid_out_as_weights_are() -> None:
    for weight in (torch.ones(2048, 1024), torch.ones(1024, 2048).t()):
        assert harness._copy(weight).stride() == weight.stride()


def test_peak_counts_what_a_call_allocates() -> None:
    x = torch.ones(1 << 16)
    assert harness.peak_bytes(lambda: (x + 1) * 2, "cpu") == pytest.approx(2 * 4 * x.numel(), abs=256)
    assert harness.peak_bytes(lambda: None, "cpu") == 0


# --------------------------------------------------------------------------------------- the rule, the law


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule(dtype: torch.dtype) -> None:
    exact = torch.tensor([1.0, -3.0], dtype=torch.float64)
    plain_answers = [exact.to(dtype)]  # loses nothing: what is left is eps(dtype) * 3
    step = 3 * torch.finfo(dtype).eps

    def verdict(error: float) -> str | None:
        return harness.disagreement((exact + error,), (exact,), plain_answers, dtype)

    assert verdict(0.99 * step) is None
    assert "output 0 is off by" in str(verdict(1.01 * step))
    assert "output 0 is off by" in str(verdict(math.nan))


def test_rule_for_integers_shapes_and_gradients() -> None:
    index = torch.tensor([0, 2])
    differing = harness.disagreement((index + 1,), (index,), [index], torch.bool)
    assert differing == "output 0 differs in 2 entries"
    assert "shape [2, 1], expected [2]" in str(harness.disagreement(index[:, None], index, [index], torch.bool))
    assert "returned 2 outputs, expected 1" in str(harness.disagreement((index, index), index, [index], torch.bool))
    one = torch.ones(1, dtype=torch.float64)
    lossy = [one.float(), (one * 1.1).float()]
    assert harness.disagreement(one * 1.29, one, lossy, torch.float32) is not None
    assert harness.disagreement(one * 1.29, one, lossy, torch.float32, gradients=1) is None
    assert harness.disagreement(one * 2, one, lossy, torch.float32, slack=harness.slack("dense")) is None
    assert harness.slack("cofire") == 1


def test_interval_is_the_binomial_one() -> None:
    # ranks 10 and 21 of 30, 6 and 15 of 20, 1 and 6 of 6: the table of any text on the sign test
    for n, low, high in ((30, 10, 21), (20, 6, 15), (6, 1, 6)):
        median, lower, upper = harness.median_interval([float(v) for v in range(1, n + 1)])
        assert (median, lower, upper) == ((n + 1) / 2, low, high)
    for n in (1, 2, 5):
        found = harness.median_interval([float(v) for v in range(1, n + 1)])
        assert found == ((n + 1) / 2, None, None), (
            "the smallest and the largest of 5 hold the median in 94 of 100 cases"
        )
    assert harness.median_interval([1.0, 2.0, 3.0, 4.0, 5.0], 0.9) == (3, 1, 5)


def test_interval_covers() -> None:
    source = random.Random(0)
    hits = 0
    for _ in range(1000):
        _, low, high = harness.median_interval([source.expovariate(1) for _ in range(31)])
        assert low is not None and high is not None
        hits += low <= math.log(2) <= high
    assert 940 <= hits <= 990


def test_percentiles() -> None:
    assert [harness.percentile([3.0, 1.0, 2.0, 5.0, 4.0, 6.0], p) for p in (0, 0.2, 0.8, 1)] == [1, 2, 5, 6]


def test_ratios_are_those_of_the_rounds() -> None:
    readings = {"cofire": [1.0, 2.0, 4.0, 1.0], "dense": [3.0, 4.0, 4.0, 5.0], "peer:slow": [9.0, 8.0]}
    rows: dict[str, results.Row] = {
        name: {"provider": name, "device": "cpu", "mode": "forward", "bytes": 1, "flops": 1} for name in readings
    }
    for name, row in rows.items():
        harness._fill(row, readings[name], readings, None, frozenset())
    assert [rows["cofire"][k] for k in ("speedup", "speedup_low", "speedup_high", "pairs")] == [2.5, 1, 5, 4]
    assert rows["peer:slow"]["speedup"] == pytest.approx((3 / 9 + 4 / 8) / 2) and rows["peer:slow"]["pairs"] == 2
    assert rows["peer:slow"]["vs_cofire"] == 6.5 and rows["dense"]["vs_cofire"] == 2.5
    assert "speedup" not in rows["dense"] and "vs_cofire" not in rows["cofire"]


def test_noise_marks() -> None:
    usual = {"median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1, "probe": {"core": 1.0}, "rounds": 7, "quiet_rounds": 7}
    rows = [usual, {**usual, "probe": {"core": 1.2}}, {**usual, "p80_ms": 1.5}, {**usual, "median_ms": None}]
    rows += [{**usual, "quiet_rounds": 0}, {**usual, "rounds": 3, "quiet_rounds": 3}]
    harness.mark_noise(rows, quiet.Probe("cpu", {"core": lambda: 1.0}))
    assert [r["noisy"] for r in rows] == [False, True, True, False, True, False]
    assert [r.get("flagged") for r in rows] == [False, True, False, None, True, False]


def test_ceilings() -> None:
    assert ceilings.bandwidth(CEILINGS, 1 << 19) == 100
    assert ceilings.bandwidth(CEILINGS, 1 << 19, cold=True) == 30
    assert ceilings.bandwidth(CEILINGS, 1 << 40) == 30
    assert ceilings.arithmetic(CEILINGS, "bfloat16") == 250, "16-bit work may be done in fp32"
    assert ceilings.shortest_ms(CEILINGS, 10**8, 10**6, "float32") == pytest.approx(1e8 / 30e9 * 1e3)
    assert ceilings.shortest_ms(CEILINGS, 10, 10**9, "float32") == pytest.approx(4)
    assert ceilings.bandwidth(CEILINGS, 1 << 21) == 100, "between two sizes the higher speed of both"
    inside = ceilings.shortest_ms(CEILINGS, 10**8, 10**6, "float32", held=1 << 19)
    assert inside == pytest.approx(1), "by the memory that is touched"


def test_bandwidths_are_measured_up_to_a_size_that_lies_in_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache, largest in (("307200K", 512), ("32768K", 256), (None, 256)):
        monkeypatch.setattr(ceilings.machine, "caches", lambda cache=cache: {"L3": cache} if cache else None)
        ceilings.cold_bytes.cache_clear()
        sizes = ceilings.sizes("cpu")
        assert sizes[0] == 0.25 and sizes[-1] == largest and sizes[-1] * ceilings.MIB >= ceilings.cold_bytes("cpu")
        assert all(b == 2 * a for a, b in itertools.pairwise(sizes))
    ceilings.cold_bytes.cache_clear()


def test_bandwidths_count_what_is_touched_and_what_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "sizes", lambda device: [1.0, 2.0])
    seen: list[Any] = []

    def timed(call: Any, device: str, seconds: float) -> float:
        seen.append((call(), seconds))
        return float(1 + len(seen) % 3)

    monkeypatch.setattr(ceilings, "best_seconds", timed)
    copy, read, change = ceilings._bandwidth("cpu", 1.0)
    assert list(copy) == list(read) == list(change) == ["1", "2"] and len(seen) == 2 * 6
    mib = ceilings.MIB / 1e9
    times = [float(1 + n % 3) for n in range(1, 7)]
    assert copy["1"] == pytest.approx(mib / times[0]) and read["1"] == pytest.approx(mib / min(times[1:5]))
    assert change["1"] == pytest.approx(2 * mib / times[5])
    assert sum(seconds for _, seconds in seen[:6]) == 3.0
    assert seen[0][0].numel() == ceilings.MIB // 8 and seen[5][0].numel() == ceilings.MIB // 4


def test_every_reader_reads_everything() -> None:
    ones = torch.ones(4 * ceilings.ROW)
    answers = [reader() for reader in ceilings._readers(ones)]
    bits = torch.ones(2).view(torch.int64)
    assert answers[0] == ones.numel() and answers[1] == bits * (ones.numel() // 2) and answers[2] == ones.numel() // 2
    assert answers[3].tolist() == [ceilings.ROW] * 4


def test_bandwidths_of_other_sizes_do_not_count() -> None:
    old = {"copy_gbs": {"1": 9.0, "64": 9.0}, "gemm_gflops": {"float32": 9.0}}
    new = {"copy_gbs": {"1": 1.0, "2": 1.0}, "read_gbs": {"1": 2.0, "2": 2.0}, "gemm_gflops": {"float32": 1.0}}
    found = ceilings.highest(old, new)
    assert found == {**new, "gemm_gflops": {"float32": 9.0}}
    assert ceilings.highest(found, {**new, "copy_gbs": {"1": 3.0, "2": 0.0}})["copy_gbs"] == {"1": 3.0, "2": 1.0}


def test_what_is_written_where_it_was_read_lies_there_once() -> None:
    by_op = {c.op: c for family in ("sparse", "kv_fusion") for c in suite.of_family(family)}
    adam, append, spmm = (by_op[op] for op in ("masked_adam_", "kv_append_", "spmm"))
    args = harness.Input(adam, "cpu", tiny=True).args
    moved, _ = adam.cost(args, "forward")
    w, g, m, v, _, bits, *_ = args
    assert adam.footprint(args, moved) == sum(t.nbytes for t in (w, g, m, v, bits))
    args = harness.Input(append, "cpu", tiny=True).args
    assert append.footprint(args, 200) == 100, "at least half, though the cache that is written to is larger"
    args = harness.Input(spmm, "cpu", tiny=True).args
    assert spmm.footprint(args, 1000) == 1000
    row = harness._work(adam, harness.Input(adam, "cpu", tiny=True).args, "forward")
    assert row["footprint"] < row["bytes"] == moved and "footprint" not in harness._work(spmm, args, "forward")


def test_the_shorter_of_two_ways_to_count_is_the_limit() -> None:
    row = {
        "mode": "forward",
        "dtype": "bfloat16",
        "arithmetic": "float32",
        "bytes": 0,
        "flops": 10**9,
        "median_ms": 8.0,
    }
    table = {**CEILINGS, "gemm_gflops": {"float32": 200.0, "bfloat16": 2000.0}}
    for other, percent in ((None, 50), (10**9, 100 * 0.5 / 8), (16 * 10**9, 50)):
        found = {**row, **({} if other is None else {"or_flops": ["bfloat16", other]})}
        harness.grade(bench.Results({}, table, [found]))
        assert found["percent_of_ceiling"] == pytest.approx(percent)


def test_a_fusion_in_bf16_is_counted_both_ways() -> None:
    for case in (c for c in suite.of_family("kv_fusion") if c.op == "kv_fuse" and c.ours is None):
        work = {mode: harness._work(case, harness.Input(case, "cpu", tiny=True).args, mode) for mode in case.modes}
        once, both = work["forward"], work["forward+backward"]
        assert both["flops"] == 2 * once["flops"], "the gradients of the weight and the gate take as much again"
        tokens, weight, *_ = case.tiny(Random("x"))
        places, (slots, width, taps) = tokens.shape[2] - weight.shape[2] + 1, weight.shape
        products = tokens.shape[0] * tokens.shape[1] * slots * width
        assert once["flops"] == 2 * products * (2 * places + taps - 1)
        if case.dtype == torch.bfloat16:
            assert once["or_flops"] == ["bfloat16", 2 * products * places * (taps + 1)]
            assert both["or_flops"][1] == 2 * once["or_flops"][1] and case.arithmetic == "float32"
        else:
            assert "or_flops" not in once


# -------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"families": ["gatin"]}, "no family is called 'gatin'; did you mean 'gating'?"),
        ({"families": ["xyz"]}, "no family is called 'xyz'; there are 'clustering', 'gating', 'kv_fusion', 'lowbit'"),
        ({"ops": ["gated_conv"]}, "no operator with a benchmark is called 'gated_conv'; did you mean 'gated_conv2d'"),
        ({"cases": ["no such case"]}, "no case is called 'no such case'"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
        ({"providers": ["densely"]}, "no provider is called 'densely'; did you mean 'dense'?"),
    ],
)
def test_unknown_names(options: dict[str, object], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        bench.run(**options, out=tmp_path / "r.json")  # type: ignore[arg-type]
    assert sentence in str(error.value)


def test_a_list_of_names_is_short(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no case is called 'zzz'; there are .*, \.\.\. and \d+ more$") as error:
        bench.run(cases=["zzz"], out=tmp_path / "r.json")
    assert len(str(error.value)) < 1000


def test_not_a_results_file(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a results file"):
        bench.Results.load(tmp_path / "r.json")


def test_file_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "device_name", lambda device: "Intel(R) Xeon(R) Gold 6/42 @ 2.8 GHz")
    path = results.results_path("cuda")
    assert path == Path("benchmarks/results/intel-xeon-gold-6-42-2-8-ghz.json")
    assert results.results_path("cuda", quick=True).stem.endswith("-quick")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for name in ("a.json", "a-quick.json", "b-quick.json"):
        (tmp_path / name).write_text("{}")
    assert [p.name for p in results.results_files()] == ["a.json", "b-quick.json"]


TINY = tuning.Plan(
    *(32, 16, 4, (1, 4, 16, 64, 65, 513), 8, (0.1, 0.4, 0.7)), formats=("csr", "bitmap"), dtypes=(torch.float32,)
)


def a_table(folder: Path) -> Path:
    path = folder / "dispatch.json"
    path.write_text(compressed.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.mark.skipif(native.STATUS.variant is None, reason="needs C++ kernels")
def test_tune_measures_the_table_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry is the largest density below which nothing was lost; other machines' entries and types stay."""
    lost_at = {(1, True): 0.1, (4, True): 0.4}  # else never; (rows, kept)
    asked: list[tuple[int, bool, float]] = []

    def times(self: Any, rows: int, dtype: torch.dtype) -> tuple[float, float]:
        where = rows, self.cache_dense
        asked.append((*where, round(self.density(), 1)))
        return 1.0, 1.04 if self.density() > lost_at.get(where, 1) - 0.1 else 1.06

    monkeypatch.setattr(compressed.CompressedLinear, "_time", times)
    path, old = a_table(tmp_path), json.loads(compressed.TABLE.read_text(encoding="utf-8"))
    monkeypatch.setattr(compressed, "instruction_set", lambda: "made up")
    said = bench.tune("cpu", path=path, plan=TINY)
    new = json.loads(path.read_text(encoding="utf-8"))
    source = new["source"].pop("made up")
    assert said == f"cofire tune: wrote {path}. made up: {source}."
    assert source.startswith(f"measured on {results.device_name('cpu')}, 1 threads, ") and "32 x 32" in source
    found = new["densities"].pop("made up")
    assert new == old and list(found) == ["float32"]
    ways = found["float32"]
    assert set(ways) == {"kept", "decoded", "training", "convolution"}
    assert list(ways["convolution"]) == ["csr"] and len(ways["convolution"]["csr"]) == 6
    for format in ("csr", "bitmap"):
        assert ways["kept"][format] == [0.0, 0.1, 0.7, 0.7, 0.7, 0.7] and ways["decoded"][format] == [0.7] * 6
    assert list(ways["training"]) == ["csr"] and len(set(ways["training"]["csr"])) == 1
    assert all(d in (0.0, *TINY.densities) for formats in ways.values() for entry in formats.values() for d in entry)
    assert sum(a[:2] == (1, True) for a in asked) == 4, "of each format the first loss is found twice, and ends it"
    assert (
        path.read_text(encoding="utf-8").count("[0.0, 0.1, 0.7, 0.7, 0.7, 0.7]") == 2
        and len(list(tmp_path.iterdir())) == 1
    )
    before = compressed.TABLE.read_text(encoding="utf-8")
    monkeypatch.setattr(tuning, "_slowdown", lambda plan, dtype: 30.0 if dtype == torch.float16 else 1.0)
    some = replace(TINY, formats=("csr",), densities=(0.1,), dtypes=(torch.float16,))
    said = bench.tune("cpu", path=path, plan=some)
    assert said.endswith("; float16 not measured, as a dense product takes 30 times as long as one of float32.")
    assert json.loads(path.read_text(encoding="utf-8"))["densities"]["made up"] == found
    assert compressed.TABLE.read_text(encoding="utf-8") == before


def test_two_of_three_measurements_decide() -> None:
    won, lost = (1.0, 1.06), (1.0, 1.04)
    given = {0: [won, won], 1: [lost, won, won], 2: [lost, lost], 3: [won, lost, lost]}
    order: list[int] = []
    times = {n: iter(all_of) for n, all_of in given.items()}
    found = tuning._majority({("kept", n): lambda n=n: (order.append(n), next(times[n]))[1] for n in given})
    assert found == {("kept", 0): True, ("kept", 1): True, ("kept", 2): False, ("kept", 3): False}
    assert order == [0, 1, 2, 3, 0, 1, 2, 3, 1, 3], "others stand between two measurements of one"


@pytest.mark.skipif(native.STATUS.variant is None, reason="needs C++ kernels")
def test_what_tune_times() -> None:
    """Every measurement of the plan runs, with inputs of its bucket."""
    assert [compressed.bucket(n) for n in tuning.Plan().rows] == list(range(6))
    blocks = {(against, number) for against, number, _ in tuning._trials(TINY, torch.bfloat16, "block", 0.4)}
    assert blocks == {*((against, n) for against in ("kept", "decoded") for n in range(6)), ("training", 0)}
    trials = list(tuning._trials(TINY, torch.bfloat16, "csr", 0.4))
    assert {(against, number) for against, number, _ in trials} == {
        *((against, n) for against in ("kept", "decoded", "convolution") for n in range(6)),
        ("training", 0),
    }
    for against, number, measure in trials:
        assert all(t > 0 for t in measure())
        if against == "convolution":
            layer, (shape, _) = measure.func.__self__, measure.args  # type: ignore[attr-defined]
            assert compressed.bucket(layer._positions(math.prod(shape))) == number


def test_tune_needs_kernels_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "STATUS", native.Status("avx2", ""))
    with pytest.raises(ValueError, match=r"tune: the table must be a file that can be read and replaced, got .*none"):
        bench.tune("cpu", path=tmp_path / "none")
    monkeypatch.setattr(native, "STATUS", native.Status(None, ""))
    assert bench.tune("cpu") == "cofire tune: nothing to do on a CPU without C++ kernels."


def test_the_dispatch_table_says_how_each_cpu_came_to_its_numbers() -> None:
    assert set(compressed.table()["densities"]) <= set(compressed.table()["source"])
    for text in compressed.table()["source"].values():
        named = re.match(r"measured on [^,:;]*(AMD|Zen|EPYC|Intel|Xeon|Arm|Neoverse|Apple)[^,:;]*, \w+ threads", text)
        assert named or text.startswith("estimated"), f"what was measured names its CPU and threads, got {text!r}"


def test_tune_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match="device must be cpu or cuda"):
        bench.tune("tpu")


# ------------------------------------------------------------------------------------------------ the suite


def test_every_operator_has_a_case() -> None:
    covered = {case.op for family in bench.families() for case in suite.of_family(family)}
    backward = {name for name in OPERATORS if name.endswith("_backward")}
    assert covered - backward == set(OPERATORS) - backward, "the backward operators are in the mode forward+backward"


#: Operators that are compared with no strongest plain torch in a mode, and why.
WITHOUT_DENSE = {
    (f"fake_quantize_{name}", mode): "compared with the published expression, and with torch.compile of the reference"
    for name in ("affine", "minmax", "group")
    for mode in ("forward", "forward+backward")
}


def test_every_case_is_compared_with_the_strongest_plain_torch() -> None:
    cases = [case for family in bench.families() for case in suite.of_family(family)]
    lacking = {
        (case.op, mode)
        for case in cases
        for mode in set(case.modes) - set(results.UNCOMPARED)
        if "dense" not in harness.candidates(case, "cpu", mode, None)
    }
    assert lacking <= set(WITHOUT_DENSE)


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="not a checkout")
def test_every_family_runs_under_pytest_benchmark() -> None:
    files = {path.stem.removeprefix("test_"): path for path in BENCHMARKS.glob("test_*.py")}
    assert set(files) == set(bench.families())
    for family, path in files.items():
        assert f"def test_{family}(measurement: " in path.read_text(encoding="utf-8")


def test_cases_are_told_apart() -> None:
    for family in bench.families():
        names = [str(case) for case in suite.of_family(family)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("family", bench.families())
def test_quick_is_a_subset(family: str) -> None:
    assert any(case.quick for case in suite.of_family(family))


@pytest.mark.parametrize("case", [c for f in bench.families() for c in suite.of_family(f)], ids=str)
def test_case(case: Case) -> None:
    """Every provider of every case passes the correctness gate on the small input."""
    given = harness.Input(case, "cpu", tiny=True)
    assert any(a.count_nonzero() for a in tensors_of(given.args)), "an input of zeros"
    for mode in case.modes:
        moved, flops = case.cost(given.args, mode)
        assert moved > 0
        assert flops >= 0
        for name, variants in harness.candidates(case, "cpu", mode, None).items():
            if name == "compile":  # minutes of compiling; the function it compiles is one of the others
                continue
            for variant, provider in variants.items():
                problem = given.check(provider, mode, harness.slack(name))
                if name != "cofire" and "needs the cpu support" in str(problem):
                    continue  # what the library says of bfloat16 without AVX-512: no number, and no mistake
                assert problem is None, f"{mode}: {name} {variant}"


def test_flops_of_a_gated_convolution_are_counted_from_the_masks() -> None:
    case = next(c for c in suite.of_family("gating") if c.op == "gated_conv2d" and "keep 0.5" in c.name)
    given = harness.Input(case, "cpu", tiny=True)
    x, weight, *_, in_count, _, out_count = given.args[:8]
    expected = sum(2 * int(i) * int(o) for i, o in zip(in_count, out_count)) * x[0, 0].numel() * weight[0, 0].numel()
    assert case.cost(given.args, "forward")[1] == expected


def test_a_slow_provider_takes_part_in_the_first_rounds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SLOW_MS", 1.0)
    runs = {"fast": lambda: None, "slow": lambda: time.sleep(0.003)}
    readings = harness.read_in_turns(runs, "cpu", 0.001, 30, 100)
    assert len(readings["slow"]) == harness.LEAST_ROUNDS and len(readings["fast"]) >= 30


def test_a_slow_call_is_not_repeated_after_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after a look at the machine either; a very slow one is timed by its warm call alone."""
    calls = {"fast": 0, "slow": 0}

    def counted(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls[name] += 1
            time.sleep(seconds)

        return run

    monkeypatch.setattr(quiet, "SEGMENT_SECONDS", 0.0)  # a look in every round
    monkeypatch.setattr(harness, "SLOW_MS", 2.0)
    probe = quiet.Probe("cpu", {"core": lambda: 1.0})
    runs = {"fast": counted("fast", 1e-4), "slow": counted("slow", 0.004)}

    def readings() -> list[float]:
        return harness.read_in_turns(runs, "cpu", 0.05, 30, 100, watch=quiet.Watch(probe))["slow"]

    assert len(readings()) == harness.LEAST_ROUNDS
    # a look, a round: of those in which it is the first it runs once untimed
    assert calls["slow"] <= 2 + 2 * harness.LEAST_ROUNDS
    calls["slow"] = 0
    monkeypatch.setattr(harness, "ONCE_MS", 2.0)
    assert len(readings()) == 1 and calls["slow"] == 2
