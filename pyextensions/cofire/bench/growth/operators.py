# SPDX-License-Identifier: Apache-2.0
"""The sweeps of the operators. Sizes are a factor of 4 apart, or of 2 where the cost is quadratic in them.

Weights are square matrices: their width, on which some of what a call allocates depends, is the root of their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from cofire.bench import (
    clustering,
    fake_quantize,
    gating,
    kv_fusion,
    kv_fusion_attention,
    kv_fusion_masked,
    lowbit,
    selection,
    shift_add_attention,
    shift_add_linear,
    shift_add_mixture,
    shift_add_softmax,
    sparse,
    sparse_refine,
    sparse_training,
)
from cofire.bench.growth.sweep import Sweep

WEIGHTS = tuple(1 << i for i in (16, 18, 20, 22, 24))
FEWER = WEIGHTS[:4]
WIDTHS = (64, 128, 256, 512)
CHANNELS = (32, 64, 128, 256, 512)
TOKENS = (256, 1024, 4096, 16384)
MEETING = (128, 256, 512, 1024, 2048)  #: tokens, where each meets each
SAMPLES = (1, 4, 16, 64, 256)
FLOAT = fake_quantize.FLOAT


def _square(n: int) -> tuple[int, int]:
    return math.isqrt(n), math.isqrt(n)


def _rows_of(columns: int) -> Callable[[int], tuple[int, int]]:
    return lambda n: (n // columns, columns)


_by_256, _by_1024 = _rows_of(256), _rows_of(1024)

CLUSTERING = [
    Sweep("dkm", "weights", WEIGHTS, lambda n: clustering._dkm(_by_256(n))),
    Sweep("dkm", "clusters", (4, 16, 64, 256), lambda k: clustering._dkm(_by_256(1 << 20), k), memory="constant"),
    Sweep(
        "dkm_tables",
        "clusters",
        (4, 16, 64, 256),
        lambda k: clustering._tables(clustering.SQUARE, k),
        memory="constant",
    ),
    Sweep("histogram16", "weights", WEIGHTS, lambda n: clustering._histogram(_by_256(n)), memory="constant"),
    Sweep("scatter16", "weights", WEIGHTS, lambda n: clustering._scatter(_by_256(n)), memory="constant"),
    Sweep("lut_apply16", "weights", WEIGHTS, lambda n: clustering._lut_case(_by_256(n), False)),
    Sweep("palettize", "weights", WEIGHTS, lambda n: clustering._palettize(_by_256(n))),
    Sweep(
        "kmeans1d",
        "weights",
        tuple(1 << i for i in (12, 15, 18, 21)),
        lambda n: clustering._kmeans(_by_256(n)),
        memory="constant",
    ),
]

GATING = [
    Sweep("gated_conv2d", "channels", CHANNELS, lambda c: gating._conv(gating.Layer(8, c, c, 14), 0.5), "quadratic"),
    Sweep(
        "gated_linear",
        "features",
        (256, 512, 1024, 2048, 4096),
        lambda n: gating._linear(8, (0.5, 0.5), features=n),
        "quadratic",
    ),
    Sweep("gated_norm_act", "samples", SAMPLES, lambda b: gating._norm((b, 64, 16, 16))),
    Sweep("channel_pool", "samples", SAMPLES, lambda b: gating._pool((b, 256, 16, 16), "max")),
    Sweep("mass_mask", "channels", (64, 256, 1024, 4096), lambda c: gating._mass(128, c, 0.95), "n log n"),
    Sweep("gate_head", "channels", (128, 256, 512, 1024, 2048), lambda c: gating._head(128, c, c), *["quadratic"] * 2),
]

KV_FUSION = [
    Sweep("kv_select", "tokens", TOKENS, lambda s: kv_fusion._select(1, 32, s, s // 4, s // 4)),
    Sweep("kv_gather_", "tokens", TOKENS, lambda s: kv_fusion._gather(1, 8, s, 128, s // 4, s // 2, 10)),
    Sweep("kv_fuse", "tokens", (64, 256, 1024, 4096), lambda n: kv_fusion._fuse(1, 4, n, 64, 64, 21)),
    Sweep(
        "attention_with_scores",
        "tokens",
        MEETING,
        lambda n: kv_fusion_attention._attention(1, 8, 8, n, n, 64, True),
        "quadratic",
    ),
    Sweep(
        "masked_softmax_attention", "tokens", MEETING, lambda n: kv_fusion_masked._attention(1, 4, n, 64), "quadratic"
    ),
    Sweep("kv_append_", "sequences", (1, 4, 16, 64), lambda b: kv_fusion_masked._append(b, 32, 256, 128)),
]

LOWBIT = [
    Sweep("qlinear", "weights", WEIGHTS, lambda n: lowbit._int8(16, shape=_square(n)), memory="root"),
    Sweep("qlinear", "rows", (1, 4, 16, 64, 256), lambda m: lowbit._int8(m, shape=(1024, 1024))),
    Sweep("qlinear_backward", "weights", WEIGHTS, lambda n: lowbit._backward(16, shape=_square(n)), memory="root"),
    Sweep("qlora_linear", "weights", WEIGHTS, lambda n: lowbit._lora(16, shape=_square(n)), memory="root"),
    Sweep("dequantize", "weights", WEIGHTS, lambda n: lowbit._dequantize(4, shape=_square(n))),
    Sweep("fake_quantize_lsq", "weights", WEIGHTS, lambda n: fake_quantize._lsq(_by_1024(n), "row", FLOAT)),
    Sweep("fake_quantize_affine", "weights", WEIGHTS, lambda n: fake_quantize._affine(_by_1024(n), "row", FLOAT)),
    Sweep("fake_quantize_minmax", "weights", WEIGHTS, lambda n: fake_quantize._minmax(_by_1024(n), 128, FLOAT)),
    Sweep("fake_quantize_statsq", "weights", WEIGHTS, lambda n: fake_quantize._statsq(_by_1024(n), 4, FLOAT)),
    Sweep("fake_quantize_group", "weights", WEIGHTS, lambda n: fake_quantize._group(_by_1024(n), "int4", FLOAT)),
]


def _packed(op: str) -> Sweep:
    return Sweep(op, "entries", WEIGHTS, lambda n: selection._packed(op, *_by_1024(n), selection.PACKED[op]))


SELECTION = [
    Sweep("compact", "entries", FEWER, lambda n: selection._compact(n // 512, 512, 0.5)),
    *map(_packed, selection.PACKED),
    Sweep("keep_mask", "weights", WEIGHTS, lambda n: selection._keep(*_by_1024(n), 0.5, "row")),
    Sweep("keep_masks", "weights", WEIGHTS, lambda n: selection._keep_list("4 layers", [_by_256(n // 4)] * 4, 0.5)),
]

SHIFT_ADD = [
    Sweep(
        "qlinear", "weights", WEIGHTS, lambda n: shift_add_linear._case(16, _square(n), "S4", cold=False), memory="root"
    ),
    Sweep("hash_encode", "tokens", TOKENS, lambda n: shift_add_attention._hash(4, 1, n, 32, 25, 16)),
    Sweep("binary_encode", "tokens", TOKENS, lambda n: shift_add_attention._binary(1, 4, n, 32)),
    Sweep("binary_linear_attention", "tokens", TOKENS, lambda n: shift_add_attention._attention(4, 1, n, 32, 16)),
    Sweep(
        "hamming_similarity",
        "tokens",
        (256, 512, 1024, 2048, 4096),
        lambda n: shift_add_attention._similarity(1, 1, n, 16),
        *["quadratic"] * 2,
    ),
    Sweep(
        "binary_softmax_attention",
        "tokens",
        MEETING,
        lambda n: shift_add_softmax._softmax(1, 4, n, 64, 64, "high"),
        "quadratic",
    ),
    Sweep("moe_route", "tokens", (1024, 4096, 16384, 65536, 262144), shift_add_mixture._route),
    Sweep("moe2_linear", "tokens", TOKENS, lambda n: shift_add_mixture._linear(n, 64, 64)),
]

SPARSE = [
    Sweep("spmm", "weights", WEIGHTS, lambda n: sparse._spmm(16, 0.1, "csr", shape=_square(n)), memory="root"),
    Sweep("sddmm", "weights", FEWER, lambda n: sparse._sddmm(64, 0.1, _square(n))),
    Sweep("apply_mask", "weights", WEIGHTS, lambda n: sparse._apply_mask(FLOAT, _square(n))),
    Sweep("masked_linear", "weights", FEWER, lambda n: sparse._masked_linear(64, "invariant", _square(n))),
    Sweep("sparse_conv2d", "channels", CHANNELS, lambda c: sparse._conv(1, c, 14, 0.1), "quadratic"),
    Sweep("masked_adam_", "weights", WEIGHTS, lambda n: sparse_training._adam(0.1, shape=_by_1024(n))),
    Sweep("masked_sgd_", "weights", WEIGHTS, lambda n: sparse_training._sgd(0.1, _by_1024(n))),
    Sweep("prune_and_grow_", "weights", FEWER, lambda n: sparse_training._move(0.1, "row", _by_1024(n))),
    Sweep(
        "activation_statistics",
        "rows",
        (64, 256, 1024, 4096, 16384),
        lambda n: sparse_training._statistics(n, 1024, FLOAT),
        memory="constant",
    ),
    Sweep("gram", "columns", (128, 256, 512, 1024, 2048), lambda k: sparse_training._gram(512, k), *["quadratic"] * 2),
    Sweep("group_statistics", "weights", WEIGHTS, lambda n: sparse_training._groups(16, 16, _by_1024(n))),
    Sweep("dsnot_swap", "weights", FEWER, lambda n: sparse_refine._dsnot(*_by_256(n), 0.5, False)),
    Sweep("gram_swap", "columns", WIDTHS, lambda k: sparse_refine._gram(64, k, 0.5, 8), "quadratic"),
]

FAMILIES = {
    "clustering": CLUSTERING,
    "gating": GATING,
    "kv_fusion": KV_FUSION,
    "lowbit": LOWBIT,
    "selection": SELECTION,
    "shift_add": SHIFT_ADD,
    "sparse": SPARSE,
}
SWEEPS = [replace(sweep, family=family) for family, sweeps in FAMILIES.items() for sweep in sweeps]
