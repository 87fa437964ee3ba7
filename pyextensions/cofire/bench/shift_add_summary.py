# SPDX-License-Identifier: Apache-2.0
"""The family's own page: what was aimed at and what was found, from a results file."""

from __future__ import annotations

from cofire.bench.results import Results
from cofire.bench.shift_add_attention import SOFTMAX
from cofire.bench.targets import BOTH_WAYS, COLD, HOT, Found, Index, Key, Target, faster, page

HASH = ("32x1x3136x32, 25 anchors, 16 bits", "float32", HOT)
TOKENS_BYTES = 4 * 32 * 3136 * 32  #: of the input of that case
LINEAR = "32x1x3136x32, 16 bits"
PVT = ("M3136 512x64", "M3136 64x512", "M784 1024x128", "M784 128x1024")
EXPERTS = ("64->64", "128->128", "256->256", "512->512", "64->512")


def _memory(index: Index, results: Results) -> Found:
    """What the inputs and the call hold together, by what inputs and outputs need."""
    row = index.get((*HASH, "cofire"))
    return [] if row is None else [("", (TOKENS_BYTES + row["peak_bytes"]) / row["bytes"])]


def _softmax(precision: str) -> dict[str, Key]:
    return {"": (f"1x1x3136x64, 64 bits, {precision}", "float32", HOT)}


def _one_row(bits: int) -> dict[str, Key]:
    return {"": (f"M1 4096x4096 shifts of {bits} bits", "float32", COLD)}


def _many_rows(bits: int) -> dict[str, Key]:
    shapes = {shape: (f"{shape} shifts of {bits} bits", "float32", HOT) for shape in PVT}
    return {"M64 4096x4096, cold": (f"M64 4096x4096 shifts of {bits} bits", "float32", COLD), **shapes}


IMAGES = {f"{n} image{'s' if n > 1 else ''}": (f"{n}x1x3136x32, 16 bits", "float32", HOT) for n in (32, 1)}
INT8 = {shape: (f"{shape} shifts of 4 bits int8 activations", "float32", HOT) for shape in PVT}
MIXTURES = {shape: (f"3136 tokens {shape}", "float32", HOT) for shape in EXPERTS}
TARGETS = (
    Target("hash of 32 images, 3,136 tokens of 32, 16 bits, against eager", 15, "x", faster("eager", {"": HASH})),
    Target("the same: memory, of that of inputs and outputs", 1.5, "x", _memory, most=True),
    Target("binary linear attention, the same shape, against eager", 3, "x",
           faster("eager", {"": (LINEAR, "float32", HOT)})),
    Target("the same, forward and backward", 2.5, "x", faster("eager", {"": (LINEAR, "float32", BOTH_WAYS)})),
    Target("binary linear attention against torch's softmax attention to as many tokens, which is another function", 10, "x",
           faster(SOFTMAX, IMAGES)),
    Target("softmax attention of binary codes, 3,136 tokens of 64, precision high, against torch's best", 3, "x",
           faster("dense", _softmax("high"))),
    Target("the same, against zentorch's best", 1.5, "x", faster("peer:zentorch sdpa", _softmax("high"))),
    Target("the same, precision highest, against torch's in fp32", None, "x", faster("dense", _softmax("highest"))),
    Target("the same, precision highest, against zentorch's in fp32", None, "x",
           faster("peer:zentorch sdpa", _softmax("highest"))),
    Target("shifts of 4 bits, int8 activations, layers of PVT, against torch's dynamic layer", 1.3, "x",
           faster("peer:torch-dynamic", INT8)),
    Target("shifts of 4 bits, one row, 4096x4096, cold, against the best dense product", 2, "x",
           faster("dense", _one_row(4))),
    Target("shifts of 5 bits, the same", 2, "x", faster("dense", _one_row(5))),
    Target("shifts of 4 bits, one row, against our 4 bits", 0.8, "x", faster("peer:cofire 4 bits", _one_row(4))),
    Target("shifts of 5 bits, the same", 0.5, "x", faster("peer:cofire 4 bits", _one_row(5))),
    Target("shifts of 4 bits, many rows, exact, against dense", 0.95, "x", faster("dense", _many_rows(4))),
    Target("shifts of 5 bits, the same", 0.95, "x", faster("dense", _many_rows(5))),
    Target("mixture of two linear layers, 3,136 tokens, against an eager dispatcher", 1.5, "x", faster("eager", MIXTURES)),
)  # fmt: skip

summary = page(
    "shift_add",
    'A target that was missed is bold. "x": how many times as fast, or as much. fp32; forward, and what is read may be in the '
    "caches, unless stated; cold: each call has the next of many copies of the weight. The best of several may be in bf16, where "
    "such products are fast.",
    TARGETS,
)
