# SPDX-License-Identifier: Apache-2.0
"""The family's own page: what was aimed at and what was found, and all products at a glance, from a results file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cofire.bench.results import Results
from cofire.bench.targets import (
    COLD,
    HEADINGS,
    HOT,
    Draw,
    Found,
    Index,
    Key,
    Target,
    against,
    best_other,
    index_of,
    lines,
    ratio,
)

SQUARE, TALL = "4096x4096", "11008x4096"
ROWS = (1, 4, 8, 16, 32, 64, 256)


def _name(rows: int, weight: str, int8: bool, shape: str = SQUARE) -> str:
    return f"M{rows} {shape} {weight}{' int8 activations' if int8 else ''}"


def _against(
    index: Index, provider: str, rows: Sequence[int], weight: str, int8: bool, dtype: str, shape: str = SQUARE
) -> Found:
    """How many times as fast as a provider, with cold weights."""
    return against(index, provider, ((f"M = {m}", (_name(m, weight, int8, shape), dtype, COLD)) for m in rows))


def _compare_cofire(pairs: Iterable[tuple[str, Key, Key]], index: Index) -> Found:
    found: Found = []
    for where, other, ours in pairs:
        value = ratio(index.get((*other, "cofire")), index.get((*ours, "cofire")))
        if value is not None:
            found.append((where, value))
    return found


def _bandwidth(index: Index, results: Results) -> Found:
    read = results.ceilings["read_gbs"]
    memory = read[max(read, key=float)]
    found: Found = []
    for shape in (SQUARE, TALL):
        row = index.get((_name(1, "4 bits g128", True, shape), "float32", COLD, "cofire"))
        if row is not None:
            found.append((shape, 100 * row["bytes"] / row["median_ms"] / 1e6 / memory))
    return found


def _against_best(index: Index, results: Results) -> Found:
    found: Found = []
    for shape in (SQUARE, TALL):
        case = _name(1, "4 bits g128", True, shape)
        best = best_other(index, case, "float32", COLD)
        value = ratio(best, index.get((case, "float32", COLD, "cofire")))
        if value is not None and best is not None:
            found.append((f"{shape} ({best['provider'].removeprefix('peer:')})", value))
    return found


def _first_call(index: Index, results: Results) -> Found:
    return [
        (f"{case.removeprefix('M1 ')}, {dtype}", row["median_ms"])
        for (case, dtype, mode, provider), row in index.items()
        if mode == "first call" and provider == "cofire" and SQUARE in case
    ]


def _shapes(index: Index, provider: str, rows: Sequence[int]) -> Found:
    found: Found = []
    for shape in (SQUARE, TALL):
        cells = _against(index, provider, rows, "4 bits g128", False, "bfloat16", shape)
        found += [(f"{shape} {where}", value) for where, value in cells]
    return found


def _backward(index: Index, results: Results) -> Found:
    found: Found = []
    for dtype in ("float32", "bfloat16"):
        for mode in (HOT, COLD):
            key = (f"M256 {SQUARE} 4 bits g128, gradient of the input", dtype, mode)
            value = ratio(index.get((*key, "peer:dequantize-then-dense")), index.get((*key, "cofire")))
            if value is not None:
                found.append((f"{dtype}{', cold' if mode == COLD else ''}", value))
    return found


INT4 = "4 bits g128"
TARGETS = (
    Target(
        "int8 activations, 4 bits, against ONNX Runtime", 1.3, "x",
        lambda i, _: _against(i, "peer:onnxruntime", (8, 16, 32, 64, 256), INT4, True, "float32"),
    ),
    Target("the same, one row: share of the memory's read bandwidth", 85, " %", _bandwidth),
    Target("the same, one row, against the best of the others", 0.95, "x", _against_best),
    Target(
        "2 bits against our 4 bits, one row", 1.6, "x",
        lambda i, _: _compare_cofire(
            [("", (_name(1, INT4, True), "float32", COLD), (_name(1, "2 bits g128", True), "float32", COLD))], i
        ),
    ),
    Target(
        "3 bits against our 4 bits, one row", 1.0, "x",
        lambda i, _: _compare_cofire(
            [("", (_name(1, INT4, True), "float32", COLD), (_name(1, "3 bits g128", True), "float32", COLD))], i
        ),
    ),
    Target(
        "palette of bytes against our 4 bits, int8 activations", 0.87, "x",
        lambda i, _: _compare_cofire(
            [
                (f"M = {m}", (_name(m, INT4, True), "float32", COLD),
                 (_name(m, "palette of 16 bytes g128", True), "float32", COLD))
                for m in (1, 16, 64, 256)
            ],
            i,
        ),
    ),
    Target(
        "fp32 activations, 4 bits, against torch's product", 20, "x",
        lambda i, _: _against(i, "peer:torch-int4pack", (1, 4, 16), INT4, False, "float32"),
    ),
    Target(
        "bf16 activations, 4 bits, against torch's product", 2, "x",
        lambda i, _: _shapes(i, "peer:torch-int4pack", (4, 16, 32, 64, 256)),
    ),
    Target("the same, against dense", 0.9, "x", lambda i, _: _shapes(i, "dense", (1, 4, 16, 32, 64, 256))),
    Target("gradient of the input, 256 rows, against decoding and a dense product", 1, "x", _backward),
    Target("a new weight, one row: packed and answered", 50, " ms", _first_call, most=True),
)  # fmt: skip

WEIGHTS = (
    *("4 bits g128", "4 bits g32", "4 bits with zero points g128", "2 bits g128", "3 bits g128", "8 bits g128"),
    *("8 bits by rows", "palette of 16 bytes g128", "nf4 g64"),
)
KINDS = (
    ("int8 activations, fp32 in and out", True, "float32"),
    ("int8 activations, bf16 in and out", True, "bfloat16"),
    ("exact activations, fp32", False, "float32"),
    ("exact activations, bf16", False, "bfloat16"),
)


def _cell(index: Index, case: str, dtype: str) -> str:
    ours, best = index.get((case, dtype, COLD, "cofire")), best_other(index, case, dtype, COLD)
    if ours is None:
        return ""
    text = f"{'~' if ours['noisy'] else ''}{ours['median_ms']:.3g} ms"
    if best is None:
        return text
    faster = best["median_ms"] / ours["median_ms"]
    words = f"{faster:.2f}x {best['provider'].removeprefix('peer:')}"
    return f"{text}, {words if faster >= 1 else f'**{words}**'}"


def summary(results: Results, table: Draw) -> str:
    """Markdown; ``table`` draws one from headings and lines. What was missed, and what was lost, is bold."""
    index = index_of(results, "lowbit")
    parts = [
        "Cold weights (each call the next of many copies), groups of 128, 4096x4096, unless stated; a target that was "
        "missed is bold.",
        table(HEADINGS, lines(TARGETS, index, results)),
    ]
    for title, int8, dtype in KINDS:
        weights = []
        for shape in (SQUARE, TALL):
            for weight in WEIGHTS:
                cells = [_cell(index, _name(m, weight, int8, shape), dtype) for m in ROWS]
                if any(cells):
                    weights.append([f"{weight}, {shape}", *cells])
        if weights:
            parts += [f"*{title}*, by rows of the input; beside the time the fastest of all others:"]
            parts.append(table(("weight", *(f"M = {m}" for m in ROWS)), weights))
    return "\n\n".join(parts)
