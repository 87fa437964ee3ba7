# SPDX-License-Identifier: Apache-2.0
"""The family's own page: what was aimed at and what was found, and all products at a glance, from a results file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cofire.bench.ceilings import bandwidth_of
from cofire.bench.results import Results, Row
from cofire.bench.targets import (
    BOTH_WAYS,
    COLD,
    HEADINGS,
    HOT,
    Draw,
    Find,
    Found,
    Index,
    Key,
    Target,
    against,
    best_other,
    faster,
    index_of,
    lines,
    named,
    ratio,
)

SQUARE, TALL = "4096x4096", "11008x4096"
ROWS = (1, 4, 8, 16, 32, 64, 256)
INT4, INT4_32, INT2, INT3 = "4 bits g128", "4 bits g32", "2 bits g128", "3 bits g128"
FLOAT, HALF = "float32", "bfloat16"
DECODING = "peer:dequantize-then-dense"
WORST = 3  #: so many cases are named where the worst of all are asked for


def _name(rows: int, weight: str, int8: bool, shape: str = SQUARE) -> str:
    return f"M{rows} {shape} {weight}{' int8 activations' if int8 else ''}"


def _key(rows: int, weight: str, int8: bool, dtype: str = FLOAT, shape: str = SQUARE) -> Key:
    return _name(rows, weight, int8, shape), dtype, COLD


def _many(rows: Sequence[int], weight: str, int8: bool, dtype: str = FLOAT) -> dict[str, Key]:
    return {f"M = {m}": _key(m, weight, int8, dtype) for m in rows}


def _of_half(square: Sequence[int], tall: Sequence[int]) -> dict[str, Key]:
    """Exact activations in bf16, both shapes."""
    rows = {SQUARE: square, TALL: tall}
    return {f"{shape} M = {m}": _key(m, INT4, False, HALF, shape) for shape in rows for m in rows[shape]}


def _than_ours(pairs: Mapping[str, tuple[Key, Key]]) -> Find:
    """How many times as fast the second of ours is as the first."""

    def find(index: Index, _: Results) -> Found:
        return named(
            (where, ratio(_ours(index, first), _ours(index, second))) for where, (first, second) in pairs.items()
        )

    return find


def _ours(index: Index, key: Key) -> Row | None:
    return index.get((*key, "cofire"))


def _of_bits(weight: str, than: str) -> Find:
    return _than_ours({"": (_key(1, than, True), _key(1, weight, True))})


ONE_ROW = {shape: _key(1, INT4, True, shape=shape) for shape in (SQUARE, TALL)}


def _bandwidth(index: Index, results: Results) -> Found:
    read = results.ceilings["read_gbs"]
    memory = read[max(read, key=float)]
    rows = ((shape, _ours(index, key)) for shape, key in ONE_ROW.items())
    return [(shape, 100 * row["bytes"] / row["median_ms"] / 1e6 / memory) for shape, row in rows if row is not None]


def _arithmetic(index: Index, _: Results) -> Found:
    rows = ((where, _ours(index, key)) for where, key in _many((64, 256), INT4, True).items())
    return [(where, row["flops"] / row["median_ms"] / 1e6) for where, row in rows if row is not None]


def _against_best(cases: Mapping[str, Key]) -> Find:
    """How many times as fast as the fastest of all others, whose name is given."""

    def find(index: Index, _: Results) -> Found:
        found: Found = []
        for where, key in cases.items():
            best = best_other(index, *key)
            value = ratio(best, _ours(index, key))
            if value is not None and best is not None:
                found.append((f"{where} ({best['provider'].removeprefix('peer:')})", value))
        return found

    return find


def _worst(exact_fp32: bool) -> Find:
    """The least of all products against dense, with exact activations in fp32 or with all others."""

    def find(index: Index, _: Results) -> Found:
        found: Found = []
        for (case, dtype, mode, provider), ours in index.items():
            judged = (dtype == FLOAT and "int8 activations" not in case) == exact_fp32
            if provider == "cofire" and mode == COLD and ours["op"] == "qlinear" and judged:
                value = ratio(index.get((case, dtype, mode, "dense")), ours)
                found += [] if value is None else [(f"{case}, {dtype}", value)]
        return sorted(found, key=lambda cell: cell[1])[:WORST]

    return find


def _first_call(shape: str) -> Find:
    return lambda index, _: [
        (f"{case.removeprefix('M1 ')}, {dtype}", row["median_ms"])
        for (case, dtype, mode, provider), row in index.items()
        if mode == "first call" and provider == "cofire" and shape in case
    ]


def _gradients() -> dict[str, Key]:
    name = "M256 {} 4 bits g128, gradient of the input"
    found: dict[str, Key] = {}
    for dtype, shape in ((FLOAT, SQUARE), (HALF, SQUARE), (HALF, TALL)):
        for mode in (HOT, COLD):
            where = f"{dtype}{'' if shape == SQUARE else f', {shape}'}{', cold' if mode == COLD else ''}"
            found[where] = (name.format(shape), dtype, mode)
    return found


# --------------------------------------------------------------------------------------------- fake quantisation


def _trained(words: Mapping[str, tuple[str, str]]) -> dict[str, Key]:
    return {where: (f"{SQUARE} {case}", dtype, BOTH_WAYS) for where, (case, dtype) in words.items()}


LSQ = {per: (f"4 bits per {per}", FLOAT) for per in ("tensor", "row", "column")}
LSQ_HALF = {f"{per}, bf16": (f"4 bits per {per}", HALF) for per in ("tensor", "row")}
#: By operator: what its cases are called in the table, their names and dtypes.
QUANTISERS = {
    "fake_quantize_lsq": LSQ | LSQ_HALF,
    "fake_quantize_affine": {
        "tensor": ("4 bits per tensor", FLOAT),
        "row": ("4 bits per row", FLOAT),
        "row, bf16": ("4 bits per row", HALF),
    },
    "fake_quantize_minmax": {
        "rows": ("4 bits rows", FLOAT),
        "groups of 128": ("4 bits groups of 128", FLOAT),
        "rows, bf16": ("4 bits rows", HALF),
    },
    "fake_quantize_statsq": {"4 bits": ("4 bits", FLOAT), "2 bits, bf16": ("2 bits", HALF)},
    "fake_quantize_group": {
        "int4": ("int4", FLOAT),
        "int4 asymmetric": ("int4_asymmetric", FLOAT),
        "e2m1": ("e2m1", FLOAT),
        "e2m1, bf16": ("e2m1", HALF),
    },
}


def _quantiser(op: str, provider: str, words: Mapping[str, tuple[str, str]]) -> Find:
    """Forward and backward, how many times as fast as a provider. Two operators may have cases of the same name."""
    return lambda _, results: against(index_of(results, "lowbit", op), provider, _trained(words).items())


def _traffic(_: Index, results: Results) -> Found:
    """The least time in which memory can move what forward and backward have to read and write, by that which they take."""
    memory = bandwidth_of(results.ceilings, max(results.ceilings["read_gbs"], key=float))
    found: Found = []
    for op, words in QUANTISERS.items():
        index = index_of(results, "lowbit", op)
        for where, key in _trained({w: word for w, word in words.items() if word[1] == FLOAT}).items():
            row = _ours(index, key)
            if row is not None:
                share = 100 * row["bytes"] / row["median_ms"] / 1e6 / memory
                found.append((f"{op.removeprefix('fake_quantize_')} {where}", share))
    return found


HALF_ROWS = _of_half((4, 16, 32, 64, 256), (4, 16, 64, 256))
TARGETS = (
    Target("int8 activations, 4 bits, against ONNX Runtime", 1.3, "x",
           faster("peer:onnxruntime", _many((8, 16, 32, 64, 256), INT4, True))),
    Target("the same, groups of 32", None, "x",
           faster("peer:onnxruntime", _many((8, 16, 32, 64, 256), INT4_32, True))),
    Target("int8 activations, 4 bits, many rows: the aim is 800 GFLOP/s", None, " GFLOP/s", _arithmetic),
    Target("int8 activations, 4 bits, one row: share of the memory's read bandwidth", 85, " %", _bandwidth),
    Target("the same, one row, against the best of the others", 0.95, "x", _against_best(ONE_ROW)),
    Target("2 bits against our 4 bits, one row", 1.6, "x", _of_bits(INT2, INT4)),
    Target("3 bits against our 4 bits, one row", 1.0, "x", _of_bits(INT3, INT4)),
    Target("3 bits against our 2 bits, one row", 1.0, "x", _of_bits(INT3, INT2), most=True),
    Target("palette of bytes against our 4 bits, int8 activations", 0.87, "x",
           _than_ours({f"M = {m}": (_key(m, INT4, True), _key(m, "palette of 16 bytes g128", True))
                       for m in (1, 16, 64, 256)})),
    Target("fp32 activations, 4 bits, against torch's product", 20, "x",
           faster("peer:torch-int4pack", _many((1, 4, 16), INT4, False))),
    Target("bf16 activations, 4 bits, against torch's product", 2, "x", faster("peer:torch-int4pack", HALF_ROWS)),
    Target("the same, groups of 32", None, "x",
           faster("peer:torch-int4pack", _many((4, 16, 32, 64, 256), INT4_32, False, HALF))),
    Target("bf16 activations, 4 bits, against zentorch's product with 4 bits", 2, "x",
           faster("peer:zentorch", _many((32,), INT4, False, HALF))),
    Target("bf16 activations, 4 bits, against dense", 0.9, "x",
           faster("dense", _of_half((1, 4, 16, 32, 64, 256), (4, 16, 64, 256)))),
    Target("the same, against the best of all others", None, "x", _against_best(HALF_ROWS)),
    Target("the worst of all products against the best dense one, bf16 included", 0.9, "x", _worst(exact_fp32=False)),
    Target("the same, of exact activations in fp32, where bf16 is less exact", None, "x", _worst(exact_fp32=True)),
    Target("gradient of the input, 256 rows, against decoding and a dense product", 1, "x",
           faster(DECODING, _gradients())),
    Target("a new weight, one row: packed and answered", 50, " ms", _first_call(SQUARE), most=True),
    Target("the same, 11008x4096", None, " ms", _first_call(TALL)),
    Target("LSQ, forward and backward, against eager", 2.5, "x",
           _quantiser("fake_quantize_lsq", "eager", LSQ | LSQ_HALF)),
    Target("the same, against torch's learnable operators", 1.3, "x",
           _quantiser("fake_quantize_lsq", "peer:torch learnable", LSQ)),
    *(
        Target(f"{words}, forward and backward, against eager", 2.5, "x", _quantiser(op, "eager", QUANTISERS[op]))
        for op, words in (
            ("fake_quantize_affine", "learned ranges (affine)"),
            ("fake_quantize_minmax", "minimum and maximum"),
            ("fake_quantize_statsq", "StatsQ"),
            ("fake_quantize_group", "groups of 256 with outliers"),
        )
    ),
    Target("fake quantisation, fp32: the memory's least time, of the time taken", None, " %", _traffic),
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
    ("exact activations, fp16", False, "float16"),
)


def _cell(index: Index, case: str, dtype: str) -> str:
    ours, best = index.get((case, dtype, COLD, "cofire")), best_other(index, case, dtype, COLD)
    if ours is None:
        return ""
    text = f"{'~' if ours['noisy'] else ''}{ours['median_ms']:.3g} ms"
    if best is None:
        return text
    times = best["median_ms"] / ours["median_ms"]
    words = f"{times:.2f}x {best['provider'].removeprefix('peer:')}"
    return f"{text}, {words if times >= 1 else f'**{words}**'}"


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
