# SPDX-License-Identifier: Apache-2.0
"""The family's own page: what was aimed at and what was found, from a results file."""

from __future__ import annotations

from collections.abc import Sequence

from cofire.bench.dense_products import SAME_DTYPE
from cofire.bench.results import Results
from cofire.bench.targets import BOTH_WAYS, COLD, HOT, Find, Found, Index, Key, Target, against, faster, index_of, page

SQUARE, TRAINED = "4096x4096", "2048x2048"


def _one_row(format: str, dtype: str, *shares: str) -> dict[str, Key]:
    return {share: (f"M1 {SQUARE} {share} {format}", dtype, COLD) for share in shares}


def _many_rows(rows: Sequence[int], *shares: str, dtype: str = "float32") -> dict[str, Key]:
    return {f"M = {m}, {s}": (f"M{m} {SQUARE} {s} csr", dtype, COLD) for m in rows for s in shares}


def _same_dtype(cases: dict[str, Key]) -> Find:
    """Against the dense product in the input's dtype: it has a row of its own where one in bfloat16 is tried too."""

    def find(index: Index, _: Results) -> Found:
        rows = {where: (key, SAME_DTYPE if (*key, SAME_DTYPE) in index else "dense") for where, key in cases.items()}
        return [found for where, (key, provider) in rows.items() for found in against(index, provider, [(where, key)])]

    return find


def _case(provider: str, case: str, mode: str = HOT) -> Find:
    return faster(provider, {"": (case, "float32", mode)})


def _selection(index: Index, results: Results) -> Found:
    cases = [(f"per {s}", (f"11008x4096 {s} keep 0.5 magnitude", "float32", HOT)) for s in ("row", "tensor")]
    return against(index_of(results, "selection"), "dense", cases)


def _training(index: Index, results: Results) -> Found:
    """The time of the unmasked layer in the masked one's."""
    cases = [(f"M = {m}", (f"M{m} {SQUARE} 50 %, invariant", "float32", BOTH_WAYS)) for m in (64, 256)]
    return against(index, "peer:plain layer", cases)


def _steps(index: Index, results: Results) -> Found:
    """The time of the unmasked step in the masked one's."""
    steps = {"256 rows, 10 %": (256, 0.1), "512 rows, 10 %": (512, 0.1), "512 rows, 50 %": (512, 0.5)}
    name = "a step of training, {} rows, {} keep {:g}"
    cases = [(words, (name.format(m, SQUARE, d), "float32", HOT)) for words, (m, d) in steps.items()]
    return against(index, "dense", cases)


BLOCKS = {f"{b}x{b}": (f"M256 {SQUARE} 90 % {b}x{b} blocks", "float32", COLD) for b in (16, 32)}
MANY, DENSE = _many_rows((256, 512), "90 %", "95 %"), _many_rows((256, 512), "90 %")
TARGETS = (
    Target("bitmap, one row, fp32, half the weights, against dense", 1.7, "x",
           _same_dtype(_one_row("bitmap", "float32", "50 %"))),
    Target("the same, 30 % of the weights", 2.4, "x", _same_dtype(_one_row("bitmap", "float32", "70 %"))),
    Target("delta, one row, fp32, 10 % and 5 %, against dense", 4, "x",
           _same_dtype(_one_row("delta", "float32", "90 %", "95 %"))),
    Target("bitmap, one row, bf16, half the weights, against dense", 1.7, "x",
           faster("dense", _one_row("bitmap", "bfloat16", "50 %"))),
    Target("the same, 30 % of the weights", 2.4, "x", faster("dense", _one_row("bitmap", "bfloat16", "70 %"))),
    Target("delta, one row, bf16, 10 %, against dense", 4, "x", faster("dense", _one_row("delta", "bfloat16", "90 %"))),
    Target("csr, one row, against MKL's CSR", 1.3, "x", faster("peer:torch csr", _many_rows((1,), "90 %", "95 %"))),
    Target("2:4 in bf16, one row, against the best dense product", 1.5, "x",
           faster("dense", _one_row("bitmap", "bfloat16", "2:4"))),
    Target("blocks of 16x1, one row, half the weights, against dense", 1.7, "x",
           _same_dtype(_one_row("16x1 blocks", "float32", "50 %"))),
    Target("blocks of 16x1, one row, 10 % of the weights, against dense", 8.5, "x",
           _same_dtype(_one_row("16x1 blocks", "float32", "90 %"))),
    Target("csr, many rows, against MKL's CSR", 2, "x", faster("peer:torch csr", MANY)),
    Target("csr, many rows, against SparseProp", 2, "x", faster("peer:sparseprop", MANY)),
    Target("csr, many rows, against dense of the same dtype", None, "x", _same_dtype(DENSE)),
    Target("csr, many rows, against the best dense product", 1.8, "x", faster("dense", DENSE)),
    Target("csr in bf16, many rows, against dense", 1.8, "x",
           faster("dense", _many_rows((256, 512), "90 %", dtype="bfloat16"))),
    Target("forward and backward, 2048x2048, 512 rows, 90 %, against SparseProp", 2, "x",
           _case("peer:sparseprop", f"M512 {TRAINED} 90 % csr", BOTH_WAYS)),
    Target("gradient of the values, the same, against torch's sampled product", 2, "x",
           _case("peer:torch sampled_addmm", f"M512 {TRAINED} 90 %")),
    Target("square blocks, 256 rows, 90 %, against torch's BSR", 2.5, "x", faster("peer:torch bsr", BLOCKS)),
    Target("the mode invariant, forward and backward, against the layer without a mask", 0.95, "x", _training),
    Target("the same with AdamW, a whole step, against the step without a mask", 0.95, "x", _steps),
    Target("selection, 11008x4096, against the best of torch", 10, "x", _selection),
)  # fmt: skip

summary = page(
    "sparse",
    "Weights of 4096x4096, cold where they are products of inference (each call the next of many copies), unless stated; a "
    'target that was missed is bold. "x": how many times as fast. Dense is of the same dtype; the best may be in bf16, where '
    "such products are fast.",
    TARGETS,
)
