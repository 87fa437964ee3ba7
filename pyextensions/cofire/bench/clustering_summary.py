# SPDX-License-Identifier: Apache-2.0
"""The family's own page: what was aimed at and what was found, from a results file."""

from __future__ import annotations

from cofire.bench.results import Results
from cofire.bench.targets import BOTH_WAYS, HOT, Find, Found, Index, Key, Target, faster, index_of, named, page

SQUARE, LARGE = "1024x1024", "4096x4096"
STEP = f"{SQUARE} K16 T3"


def _dkm(case: str, dtype: str = "bfloat16") -> dict[str, Key]:
    return {"": (case, dtype, BOTH_WAYS)}


def _times(cases: dict[str, Key]) -> Find:
    """Our own time in ms."""

    def find(index: Index, _: Results) -> Found:
        rows = ((where, index.get((*key, "cofire"))) for where, key in cases.items())
        return named((where, None if row is None else float(row["median_ms"])) for where, row in rows)

    return find


def _of(op: str, find: Find) -> Find:
    """Of one operator: names of cases are its own."""
    return lambda _, results: find(index_of(results, "clustering", op), results)


def _start(provider: str) -> Find:
    return _of("kmeans1d", faster(provider, {"": (f"{SQUARE} K16", "bfloat16", HOT)}))


CLUSTERS = {f"K = {k}": (f"{LARGE} K{k} T3", "bfloat16", BOTH_WAYS) for k in (8, 16)}
COUNTED = {"bf16": (LARGE, "bfloat16", HOT), "fp16": (LARGE, "float16", HOT)}
TARGETS = (
    Target("dkm, 1024x1024, K = 16, T = 3, bf16, against coremltools", 100, "x", faster("peer:coremltools", _dkm(STEP))),
    Target("the same, against eager", 60, "x", faster("eager", _dkm(STEP))),
    Target("the same, against the strongest plain torch, on counted weights", None, "x", faster("dense", _dkm(STEP))),
    Target("the same, in time", 6, " ms", _times(_dkm(STEP)), most=True),
    Target("dkm, the same in fp32, against eager", 20, "x", faster("eager", _dkm(STEP, "float32"))),
    Target("the same, against the strongest plain torch, in chunks", None, "x", faster("dense", _dkm(STEP, "float32"))),
    Target("dkm, 1024x1024, K = 256, T = 3, bf16", 150, " ms", _times(_dkm(f"{SQUARE} K256 T3")), most=True),
    Target("dkm, 4096x4096, T = 3, bf16", None, " ms", _times(CLUSTERS)),
    Target("dkm, 1024x1024, K = 16, implicit gradient, bf16", None, " ms", _times(_dkm(f"{SQUARE} K16 implicit"))),
    Target("histogram16 of 16.8 M weights", 5, " ms", _of("histogram16", _times(COUNTED)), most=True),
    Target("kmeans1d, 1024x1024, K = 16, bf16, against coremltools", 100, "x", _start("peer:coremltools")),
    Target("the same, against faiss", 5, "x", _start("peer:faiss")),
    Target("the same, against scikit-learn", None, "x", _start("peer:sklearn")),
)  # fmt: skip

summary = page(
    "clustering",
    'A target that was missed is bold. "x": how many times as fast. dkm is timed forward and backward. *Eager* is DKM as the '
    "paper has it, with its maps, in the faster of the weight's own type and fp32. `kmeans1d` finds the best clusters of all; "
    "the other libraries take steps of Lloyd's from a start.",
    TARGETS,
)
