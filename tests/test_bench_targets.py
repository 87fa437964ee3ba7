# SPDX-License-Identifier: Apache-2.0
"""What the families aim at: that every number of their tables has a case, and what the tables say of made-up results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cofire.bench import cases as suite
from cofire.bench import (
    clustering_summary,
    gating_summary,
    kv_fusion_summary,
    lowbit_summary,
    shift_add_summary,
    sparse_summary,
)
from cofire.bench.dense_products import SAME_DTYPE
from cofire.bench.harness import ONE_THREAD
from cofire.bench.peers import of_case
from cofire.bench.report import SUMMARIES, summary_markers
from cofire.bench.report.tables import markdown_table
from cofire.bench.results import Results, Row
from cofire.bench.shift_add_attention import SOFTMAX
from cofire.bench.targets import BOTH_WAYS, COLD, HOT, Index, Target, index_of, lines
from cofire.files import fill

ROOT = Path(__file__).parents[1]
MODULES = {
    "clustering": clustering_summary,
    "gating": gating_summary,
    "kv_fusion": kv_fusion_summary,
    "lowbit": lowbit_summary,
    "shift_add": shift_add_summary,
    "sparse": sparse_summary,
}


def row(family: str, case: str, provider: str, ms: float, mode: str = HOT, **more: Any) -> Row:
    return {
        "family": family, "op": "some_operator", "case": case, "dtype": "float32", "mode": mode, "provider": provider,
        "median_ms": ms, "bytes": 100, "flops": 100, "peak_bytes": 100, "noisy": False, **more,
    }  # fmt: skip


def made_up(rows: list[Row]) -> Results:
    return Results({}, {"read_gbs": {"256": 20.0}}, rows)


def everything(family: str) -> Iterator[Row]:
    """A row of each provider of each case, in each mode."""
    for case in suite.of_family(family):
        dtype = str(case.dtype).removeprefix("torch.")
        alone = [ONE_THREAD] if case.overhead else []
        for provider in ("cofire", *alone, *case.providers, *of_case(case, "cpu")):
            for mode in case.modes:
                yield row(family, case.name, provider, 1.0, mode, dtype=dtype, op=case.op)


class Asked(dict[tuple[str, str, str, str], Row]):
    """Remembers what it was asked for in vain."""

    def __init__(self, index: Index, missing: list[Any]) -> None:
        super().__init__(index)
        self.missing = missing

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self.missing.append(key)
        return super().get(key, default)


# ------------------------------------------------------------------------------------------------------ the targets


def test_every_summary_is_known() -> None:
    assert {family: module.summary for family, module in MODULES.items()} == SUMMARIES


@pytest.mark.parametrize(("family", "module"), MODULES.items(), ids=MODULES)
def test_every_target_has_a_case(family: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were all cases measured, no number would be missing: a target that no case can meet stands for nothing."""
    results = made_up([*everything(family), *everything("selection")])
    found = lines(module.TARGETS, index_of(results, family), results)
    assert [what for what, _, cell in found if cell == "-"] == []
    missing: list[Any] = []

    def asked(*args: Any) -> Asked:
        return Asked(index_of(*args), missing)

    monkeypatch.setattr(module, "index_of", asked, raising=False)
    for target in module.TARGETS:
        target.find(asked(results, family), results)
    assert missing == []


def test_cases_of_one_name_are_told_apart_by_their_operator() -> None:
    results = made_up([row("lowbit", "4 bits", "cofire", ms, op=op) for op, ms in (("first", 1.0), ("second", 2.0))])
    for op, ms in (("first", 1.0), ("second", 2.0)):
        (found,) = index_of(results, "lowbit", op).values()
        assert found["median_ms"] == ms
    assert index_of(results, "lowbit", "third") == {}


@pytest.mark.parametrize("family", MODULES)
def test_every_page_has_its_table(family: str) -> None:
    if not (ROOT / "docs").is_dir():
        pytest.skip("not a checkout")
    text = (ROOT / "docs" / f"{family}.md").read_text(encoding="utf-8")
    begin, end = summary_markers(family)
    assert begin in text and end in text.partition(begin)[2]


def test_a_number_without_a_target_is_not_missed() -> None:
    beside = Target("beside it", None, "x", lambda index, results: [("", 0.1), ("there", 2.0)])
    assert beside.line({}, made_up([])) == ["beside it", "-", "0.1x, there: 2x"]


# -------------------------------------------------------------------------------------------------------- the tables


def test_of_shift_add() -> None:
    hashed, rows_ = "32x1x3136x32, 25 anchors, 16 bits", "32x1x3136x32, 16 bits"
    needed = shift_add_summary.TOKENS_BYTES
    found = [row("shift_add", hashed, "eager", 20.0)]
    found += [row("shift_add", hashed, "cofire", 1.0, bytes=2 * needed, peak_bytes=3 * needed)]
    found += [row("shift_add", rows_, "cofire", 2.0), row("shift_add", rows_, SOFTMAX, 18.0)]
    found += [
        row("shift_add", "M1 4096x4096 shifts of 5 bits", p, ms, COLD) for p, ms in (("cofire", 1.0), ("dense", 2.5))
    ]
    text = shift_add_summary.summary(made_up(found), markdown_table)
    assert "16 bits, against eager | at least 15x | 20x |" in text
    assert "memory, of that of inputs and outputs | at most 1.5x | **2x** |" in text
    assert "which is another function | at least 10x | **32 images: 9x** |" in text
    assert "| shifts of 5 bits, the same | at least 2x | 2.5x |" in text
    assert "against an eager dispatcher | at least 1.5x | - |" in text


def test_of_kv_fusion() -> None:
    found = [row("kv_fusion", kv_fusion_summary.SELECT, p, ms) for p, ms in (("cofire", 1.0), ("eager", 1.0))]
    copies = {"bytes": 32_000_000}
    found += [
        row("kv_fusion", kv_fusion_summary.GATHER, p, ms, **copies) for p, ms in (("cofire", 2.0), ("eager", 5.0))
    ]
    case = "1x32, 512 queries, 1024 keys of 128, causal"
    found += [
        row("kv_fusion", case, "cofire", 10.0, peak_bytes=20),
        row("kv_fusion", case, "eager", 20.0),
        row("kv_fusion", case, "peer:library without scores", 5.0),
    ]
    text = kv_fusion_summary.summary(made_up(found), markdown_table)
    assert "1,024 tokens of 128, against eager | at least 4x | **2x** |" in text, "3 ms in place of 6"
    assert "| the copies | at least 15 GB/s | fp32: 16 GB/s |" in text
    assert "32 heads of 128, against eager | at least 1.3x | causal: 2x |" in text
    assert "| the same: memory, of eager's | at most 0.1 | **causal: 0.2** |" in text
    assert "torch's attention without scores | at most 1.6x | **causal: 2x** |" in text
    alone = made_up([r for r in found if r["case"] != kv_fusion_summary.GATHER])
    assert "1,024 tokens of 128, against eager | at least 4x | - |" in kv_fusion_summary.summary(alone, markdown_table)


def test_of_kv_fusion_what_each_takes() -> None:
    cases = {case.name for case in suite.of_family("kv_fusion")}
    assert [case for case in kv_fusion_summary.FIGURES.values() if case not in cases] == []
    found = [
        row("kv_fusion", kv_fusion_summary.SELECT, "cofire", 2.0, peak_bytes=20, noisy=True),
        row("kv_fusion", kv_fusion_summary.SELECT, "eager", 30.0),
        row("kv_fusion", kv_fusion_summary.SELECT, "dense", 1.5),
        row("kv_fusion", kv_fusion_summary.MASKED, "cofire", 3.0, BOTH_WAYS, dtype="bfloat16"),
    ]
    text = kv_fusion_summary.summary(made_up(found), markdown_table)
    assert "1,024 tokens, 32 heads | fp32 | forward | ~2 ms | 15x | **0.75x** | 0.2 |" in text
    assert "| masked attention, 700 tokens, 32 heads of 128 | bf16 | forward+backward | 3 ms | - | - | - |" in text
    assert text.count("| fp32 |") == 1, "what was not measured has no line"


def test_of_gating() -> None:
    middle = gating_summary.MIDDLE.format(0.5)
    times = {"cofire": 2.0, "dense": 5.0, "peer:gather-out": 9.0, "peer:gather-in-out": 3.0, "peer:grouped": 4.0}
    found = [row("gating", middle, provider, ms) for provider, ms in times.items()]
    found += [row("gating", f"{shape} keep 0.9", "cofire", 1.0) for shape in gating_summary.SHAPES[:2]]
    found += [row("gating", f"{gating_summary.SHAPES[i]} keep 0.9", "dense", 0.9 + 0.1 * i) for i in range(2)]
    found += [row("gating", gating_summary.MASS, p, ms) for p, ms in (("cofire", 1.0), (ONE_THREAD, 1.9))]
    text = gating_summary.summary(made_up(found), markdown_table)
    assert "8 samples, half kept, against dense | at least 2.4x | 2.5x |" in text
    assert "| the same, against the best naive way | at least 2x | **1.5x** |" in text
    assert "| 90 % kept, against dense | at least 0.95x | **B1 C256 14x14: 0.9x**, B8 C256 14x14: 1x |" in text
    assert "| all threads, against one | - | mass_mask: 1.9x |" in text
    assert "| training epilogue, 128x256x16x16, against eager | at least 2x | - |" in text


def test_of_clustering() -> None:
    def time(op: str, case: str, mode: str, dtype: str = "bfloat16", **times: float) -> list[Row]:
        names = {"coreml": "peer:coremltools"}
        return [row("clustering", case, names.get(p, p), ms, mode, dtype=dtype, op=op) for p, ms in times.items()]

    found = time("dkm", "1024x1024 K16 T3", BOTH_WAYS, cofire=7.0, coreml=840.0, eager=350.0, dense=14.0)
    found += time("palettize", "1024x1024 K16", HOT, cofire=1.0, coreml=1.0)
    found += time("kmeans1d", "1024x1024 K16", HOT, cofire=2.0, coreml=300.0)
    found += time("lut_apply16", "4096x4096", HOT, cofire=1.0)
    found += time("histogram16", "4096x4096", HOT, cofire=4.5)
    found += time("histogram16", "4096x4096", HOT, "float16", cofire=6.0)
    text = clustering_summary.summary(made_up(found), markdown_table)
    assert "bf16, against coremltools | at least 100x | 120x |" in text
    assert "| the same, against eager | at least 60x | **50x** |" in text
    assert "| the same, in time | at most 6 ms | **7 ms** |" in text
    assert "histogram16 of 16.8 M weights | at most 5 ms | bf16: 4.5 ms, **fp16: 6 ms** |" in text, "not of lut_apply16"
    assert "kmeans1d, 1024x1024, K = 16, bf16, against coremltools | at least 100x | 150x |" in text, "not of palettize"
    assert "| the same, against faiss | at least 5x | - |" in text


def test_of_sparse_against_dense_of_each_dtype() -> None:
    many, one = "M256 4096x4096 90 % csr", "M1 4096x4096 50 % bitmap"
    found = [row("sparse", case, "cofire", 1.0, COLD) for case in (many, one)]
    found += [row("sparse", case, "dense", 1.5, COLD) for case in (many, one)]
    text = sparse_summary.summary(made_up(found), markdown_table)
    assert "against dense of the same dtype | - | M = 256, 90 %: 1.5x |" in text, "where bfloat16 is not tried"
    found += [row("sparse", case, SAME_DTYPE, 4.0, COLD) for case in (many, one)]
    text = sparse_summary.summary(made_up(found), markdown_table)
    assert "against dense of the same dtype | - | M = 256, 90 %: 4x |" in text
    assert "the best dense product | at least 1.8x | **M = 256, 90 %: 1.5x** |" in text
    assert "fp32, half the weights, against dense | at least 1.7x | 50 %: 4x |" in text


def test_of_lowbit_s_fake_quantisers() -> None:
    found = []
    for op, eager in (("fake_quantize_lsq", 30.0), ("fake_quantize_affine", 20.0)):  # the same name
        times = {"cofire": 10.0, "eager": eager, "peer:torch learnable": 12.0}
        for provider, ms in times.items():
            case = "4096x4096 4 bits per tensor"
            found.append(row("lowbit", case, provider, ms, BOTH_WAYS, op=op, bytes=100_000_000))
    text = lowbit_summary.summary(made_up(found), markdown_table)
    assert "| LSQ, forward and backward, against eager | at least 2.5x | tensor: 3x |" in text
    assert "| the same, against torch's learnable operators | at least 1.3x | **tensor: 1.2x** |" in text
    assert "| learned ranges (affine), forward and backward, against eager | at least 2.5x | **tensor: 2x** |" in text
    assert "| StatsQ, forward and backward, against eager | at least 2.5x | - |" in text
    assert "of the time taken | - | lsq tensor: 50 %, affine tensor: 50 % |" in text, "10 of 20 GB/s"


def test_of_lowbit_s_products() -> None:
    found = []

    def time(case: str, dtype: str = "float32", **times: float) -> None:
        names = {"onnx": "peer:onnxruntime", "torch": "peer:torch-int4pack", "zen": "peer:zentorch"}
        more = {"dtype": dtype, "op": "qlinear", "flops": 10**9}
        found.extend(row("lowbit", case, names.get(p, p), ms, COLD, **more) for p, ms in times.items())

    def bits(rows: int, weight: str, int8: bool = True, shape: str = "4096x4096") -> str:
        return f"M{rows} {shape} {weight}{' int8 activations' if int8 else ''}"

    time(bits(1, "4 bits g128"), cofire=1.0, dense=5.0)
    time(bits(1, "3 bits g128"), cofire=0.4, dense=2.0)
    time(bits(1, "2 bits g128"), cofire=0.5, dense=2.0)
    time(bits(8, "4 bits g128"), cofire=1.0, onnx=1.2, dense=0.95)
    time(bits(8, "4 bits g32"), cofire=1.0, onnx=1.2, dense=1.1)
    time(bits(64, "4 bits g128"), cofire=2.0, dense=3.0)
    for shape, ms in (("4096x4096", 1.0), ("11008x4096", 2.0)):
        time(bits(16, "4 bits g128", False, shape), "bfloat16", cofire=1.0, torch=3.0, dense=0.8 * ms, zen=5.0)
    time(bits(32, "4 bits g128", False), "bfloat16", cofire=1.0, zen=1.9)
    time(bits(16, "4 bits g32", False), "bfloat16", cofire=1.0, torch=1.5)
    time(bits(256, "4 bits g128", False), cofire=1.0, dense=0.5)
    for shape in ("4096x4096", "11008x4096"):
        found.append(row("lowbit", f"M1 {shape} 4 bits g128", "cofire", 60.0, "first call"))
    text = lowbit_summary.summary(made_up(found), markdown_table)
    for line in (
        "int8 activations, 4 bits, against ONNX Runtime | at least 1.3x | **M = 8: 1.2x** |",
        "the same, groups of 32 | - | M = 8: 1.2x |",
        "the aim is 800 GFLOP/s | - | M = 64: 500 GFLOP/s |",
        "3 bits against our 4 bits, one row | at least 1x | 2.5x |",
        "3 bits against our 2 bits, one row | at most 1x | **1.25x** |",
        "bf16 activations, 4 bits, against torch's product | at least 2x | 4096x4096 M = 16: 3x, 11008x4096 M = 16: 3x |",
        "the same, groups of 32 | - | M = 16: 1.5x |",
        "against zentorch's product with 4 bits | at least 2x | **M = 32: 1.9x** |",
        "bf16 activations, 4 bits, against dense | at least 0.9x | **4096x4096 M = 16: 0.8x**, 11008x4096 M = 16: 1.6x |",
        "the same, against the best of all others | - | 4096x4096 M = 16 (dense): 0.8x, 4096x4096 M = 32 (zentorch): 1.9x, ",
        "at least 0.9x | **M16 4096x4096 4 bits g128, bfloat16: 0.8x**, M8 4096x4096 4 bits g128 int8 activations, "
        "float32: 0.95x, M8 4096x4096 4 bits g32 int8 activations, float32: 1.1x |",
        "where bf16 is less exact | - | M256 4096x4096 4 bits g128, float32: 0.5x |",
        "packed and answered | at most 50 ms | **4096x4096 4 bits g128, float32: 60 ms** |",
        "the same, 11008x4096 | - | 11008x4096 4 bits g128, float32: 60 ms |",
    ):
        assert line in text, line


# --------------------------------------------------------------------------------------------------------- the pages


def test_parts_of_a_page_may_end_alike(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- one -->\nfirst\n<!-- end -->\nwords\n<!-- two -->\nold\n<!-- end -->\n")
    assert fill(page, ("<!-- two -->", "<!-- end -->"), "new")
    assert page.read_text() == "<!-- one -->\nfirst\n<!-- end -->\nwords\n<!-- two -->\nnew\n<!-- end -->\n"
    assert not fill(page, ("<!-- two -->", "<!-- end -->"), "new")
    for begin, end in (("<!-- three -->", "<!-- end -->"), ("<!-- two -->", "<!-- one -->")):
        with pytest.raises(ValueError, match="must contain the lines"):
            fill(page, (begin, end), "new")
