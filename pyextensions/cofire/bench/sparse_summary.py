# SPDX-License-Identifier: Apache-2.0
"""The family's own page: what was aimed at and what was found, from a results file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cofire.bench.results import Results
from cofire.bench.targets import BOTH_WAYS, COLD, HOT, Found, Index, Target, against, index_of, lines

SQUARE, TRAINED = "4096x4096", "2048x2048"


def _one_row(format: str, dtype: str, *shares: str) -> Callable[[Index, Results], Found]:
    """One row of the input against the best dense product."""
    cases = [(share, (f"M1 {SQUARE} {share} {format}", dtype, COLD)) for share in shares]
    return lambda index, _: against(index, "dense", cases)


def _many_rows(provider: str, rows: Sequence[int], *shares: str) -> Callable[[Index, Results], Found]:
    cases = [(f"M = {m}, {s}", (f"M{m} {SQUARE} {s} csr", "float32", COLD)) for m in rows for s in shares]
    return lambda index, _: against(index, provider, cases)


def _case(provider: str, case: str, mode: str = HOT) -> Callable[[Index, Results], Found]:
    return lambda index, _: against(index, provider, [("", (case, "float32", mode))])


def _blocks(index: Index, results: Results) -> Found:
    cases = [(f"{b}x{b}", (f"M256 {SQUARE} 90 % {b}x{b} blocks", "float32", COLD)) for b in (16, 32)]
    return against(index, "peer:torch bsr", cases)


def _selection(index: Index, results: Results) -> Found:
    cases = [(f"per {s}", (f"11008x4096 {s} keep 0.5 magnitude", "float32", HOT)) for s in ("row", "tensor")]
    return against(index_of(results, "selection"), "dense", cases)


def _training(index: Index, results: Results) -> Found:
    """The time of the unmasked layer in the masked one's."""
    cases = [(f"M = {m}", (f"M{m} {SQUARE} 50 %, invariant", "float32", BOTH_WAYS)) for m in (64, 256)]
    return against(index, "peer:plain layer", cases)


def _steps(index: Index, results: Results) -> Found:
    """The time of the unmasked step in the masked one's."""
    steps = {"256 rows, 10 %": (256, 0.1), "512 rows, 50 %": (512, 0.5)}
    name = "a step of training, {} rows, {} keep {:g}"
    cases = [(words, (name.format(m, SQUARE, d), "float32", HOT)) for words, (m, d) in steps.items()]
    return against(index, "dense", cases)


TARGETS = (
    Target("bitmap, one row, fp32, half the weights, against dense", 1.7, "x", _one_row("bitmap", "float32", "50 %")),
    Target("the same, 30 % of the weights", 2.4, "x", _one_row("bitmap", "float32", "70 %")),
    Target("delta, one row, fp32, 10 % and 5 %, against dense", 4, "x", _one_row("delta", "float32", "90 %", "95 %")),
    Target("csr, one row, against MKL's CSR", 1.3, "x", _many_rows("peer:torch csr", (1,), "90 %", "95 %")),
    Target("2:4 in bf16, one row, against the best dense product", 1.5, "x", _one_row("bitmap", "bfloat16", "2:4")),
    Target("blocks of 16x1, one row, half the weights, against dense", 1.7, "x",
           _one_row("16x1 blocks", "float32", "50 %")),
    Target("blocks of 16x1, one row, 10 % of the weights, against dense", 8.5, "x",
           _one_row("16x1 blocks", "float32", "90 %")),
    Target("csr, many rows, against MKL's CSR", 2, "x", _many_rows("peer:torch csr", (256, 512), "90 %", "95 %")),
    Target("csr, many rows, against SparseProp", 2, "x", _many_rows("peer:sparseprop", (256, 512), "90 %", "95 %")),
    Target("csr, many rows, against dense", 1.8, "x", _many_rows("dense", (256, 512), "90 %")),
    Target("forward and backward, 2048x2048, 512 rows, 90 %, against SparseProp", 2, "x",
           _case("peer:sparseprop", f"M512 {TRAINED} 90 % csr", BOTH_WAYS)),
    Target("gradient of the values, the same, against torch's sampled product", 2, "x",
           _case("peer:torch sampled_addmm", f"M512 {TRAINED} 90 %")),
    Target("square blocks, 256 rows, 90 %, against torch's BSR", 2.5, "x", _blocks),
    Target("the mode invariant, forward and backward, against the layer without a mask", 0.95, "x", _training),
    Target("the same with AdamW, a whole step, against the step without a mask", 0.95, "x", _steps),
    Target("selection, 11008x4096, against the best of torch", 10, "x", _selection),
)  # fmt: skip


def summary(results: Results, table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]) -> str:
    """Markdown; ``table`` draws one from headings and lines. What was missed is bold."""
    words = (
        "Weights of 4096x4096, cold where they are products of inference (each call the next of many copies), unless "
        'stated; a target that was missed is bold. "x": how many times as fast.'
    )
    index = index_of(results, "sparse")
    return f"{words}\n\n{table(('what', 'target', 'found'), lines(TARGETS, index, results))}"
