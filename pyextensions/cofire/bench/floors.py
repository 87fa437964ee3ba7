# SPDX-License-Identifier: Apache-2.0
"""The physical floor of each operator: the bytes that any program must move for an input, and the arithmetic it must do.

The formulas are what the report shows, and no more than that: what the benchmarks divide by is :meth:`cofire.bench.Case.cost`.
That both say the same is tested, on the inputs of the benchmarks. A product is written as in a text: ``2 M N K``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from cofire.ops.gating import mask_from_index
from cofire.ops.packing import unpack_bits
from cofire.registry import OPERATORS, leading_dtype

Symbols = dict[str, int]
FUNCTIONS: Mapping[str, Callable[..., int]] = {"ceil": math.ceil, "min": min}
BINS = 65536


@dataclass(frozen=True)
class Floor:
    bytes: str
    flops: str  #: ``"0"``: next to none
    where: str  #: what the letters mean; e is always the bytes of an element
    symbols: Callable[[Any], Symbols]  #: of the operator's arguments, by their names

    def __str__(self) -> str:
        work = f"FLOPs: {self.flops}" if self.flops != "0" else "no arithmetic to speak of"
        return f"bytes: {self.bytes}; {work}. {self.where}"


def evaluate(formula: str, symbols: Mapping[str, int]) -> int:
    """The value of a formula.

    Raises:
        ValueError: it has a letter that ``symbols`` lacks, or is not a formula.
    """
    tokens = re.findall(r"\d+|[A-Za-z_]+|[-+*/(),]|\S", formula)
    unknown = [t for t in tokens if not re.fullmatch(r"\d+|[-+*/(),]", t) and t not in symbols and t not in FUNCTIONS]
    if unknown:
        raise ValueError(f"floors: {formula!r} must consist of {sorted(symbols)}, got {unknown[0]!r}")
    words: list[str] = []
    for token in tokens:
        ended = bool(words) and bool(re.fullmatch(r"\w+|\)", words[-1])) and words[-1] not in FUNCTIONS
        if ended and re.fullmatch(r"\w+|\(", token):  # two factors, one after the other
            words.append("*")
        words.append(token)
    value: float = eval(" ".join(words), {"__builtins__": {}}, {**FUNCTIONS, **symbols})
    return round(value)


def symbols_of(op: str, args: Sequence[Any]) -> Symbols:
    """The letters of an operator's formulas, for these arguments."""
    names = [a.name for a in OPERATORS[op].overload._schema.arguments]
    given = SimpleNamespace(**dict(zip(names, args, strict=True)))
    dtype = leading_dtype(tuple(args))
    return {"e": 0 if dtype is None else dtype.itemsize, **FLOORS[op].symbols(given)}


def floor_words(op: str) -> str:
    """For a reader: both formulas and what their letters mean; of an operator that has none, a dash."""
    return str(FLOORS[op]) if op in FLOORS else "-"


# ----------------------------------------------------------------------------------------------- parts of the table


def _size(*tensors: Tensor | None) -> int:
    """In bytes."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _elements(t: Tensor, name: str = "n") -> Symbols:
    return {name: t.numel()}


def _matrix(t: Tensor) -> Symbols:
    return {"N": t.shape[0], "K": t.shape[1]}


def _product(x: Tensor, rows: int, columns: int) -> Symbols:
    return {"M": x.numel() // max(x.shape[-1], 1), "N": rows, "K": columns}


def _stored(a: Any) -> int:
    """Of a quantised weight, and of a bias."""
    return _size(a.codes, a.scale, a.zero, a.offset, a.lut, getattr(a, "bias", None))


def _used(index: Tensor, count: Tensor, channels: int) -> int:
    """Channels that any sample uses."""
    return int(mask_from_index(index, count, channels).any(0).sum())


def _pairs(a: Any, groups: int = 1) -> int:
    """Used inputs times used outputs of each sample and group, summed."""
    samples = a.input.shape[0]
    ins, outs = (
        mask_from_index(i, c, i.shape[1]).view(samples, groups, -1).sum(2)
        for i, c in ((a.in_index, a.in_count), (a.out_index, a.out_count))
    )
    return int((ins * outs).sum())


def _out(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _pixels(x: Tensor, kernel: Sequence[int], a: Any) -> int:
    """Of an output channel."""
    return math.prod(_out(x.shape[2 + i], kernel[i], a.stride[i], a.padding[i], a.dilation[i]) for i in (0, 1))


def _gated_conv(a: Any) -> Symbols:
    return {
        "U": _used(a.out_index, a.out_count, a.weight.shape[0]),
        "V": _used(a.in_index, a.in_count, a.in_index.shape[1]),
        "I": int(a.in_count.sum()), "O": int(a.out_count.sum()), "Z": _pairs(a, a.groups), "G": a.groups,
        "R": a.weight[0, 0].numel(), "H": a.input[0, 0].numel(), "P": _pixels(a.input, a.weight.shape[2:], a),
        "r": int(a.residual is not None),
    }  # fmt: skip


def _attention(a: Any) -> Symbols:
    batch, heads, queries, width = a.query.shape
    hidden = queries * (queries - 1) // 2 if a.causal else 0
    keys = a.key.shape[2]
    return {
        "Q": batch * heads * queries, "S": a.key[..., 0].numel(), "d": width,
        "T": batch * heads * (queries * keys - hidden), "k": _size(a.key), "v": _size(a.value), "q": _size(a.query),
    }  # fmt: skip


def _optimizer(a: Any, *states: Tensor | None) -> Symbols:
    return {"w": _size(a.weight), "g": _size(a.grad), "s": _size(*states), "b": _size(a.bits, a.offsets)}


FLOORS: dict[str, Floor] = {
    # clustering
    "histogram16": Floor(
        "2 n + 4 B", "0", "n elements of 16 bits, B = 65536 bins.", lambda a: {**_elements(a.input), "B": BINS}
    ),
    "scatter16": Floor(
        "2 n + s n + 4 B", "n", "n elements of 16 bits, sources of s bytes, B = 65536 bins.",
        lambda a: {**_elements(a.input), "s": a.source.element_size(), "B": BINS},
    ),
    "lut_apply16": Floor(
        "(4 + s) n", "(1 + t) n", "n elements of 16 bits; with a source, of s bytes, t = 1, else s = t = 0.",
        lambda a: {
            **_elements(a.input), "s": 0 if a.source is None else a.source.element_size(),
            "t": int(a.source is not None),
        },
    ),
    "dkm_tables": Floor(
        "(4 + 2 v) B", "9 u K (T + 1)",
        "B bins, u of them not empty, values of v bytes, K clusters, T iterations.",
        lambda a: {
            "B": a.counts.numel(), "v": a.values.element_size(), "u": int((a.counts > 0).sum()),
            "K": a.centroids.shape[1], "T": a.iterations,
        },
    ),
    "dkm": Floor(
        "2 e n", "(6 + 3 d) u K (T + 1)",
        "n weights, u vectors of d weights that differ (16-bit scalars; else u = n / d), K clusters, T iterations.",
        lambda a: _dkm(a),
    ),
    "palettize": Floor(
        "e n + n / d", "3 n K", "n weights in vectors of d, K clusters.",
        lambda a: {**_elements(a.weight), "d": a.centroids.shape[2], "K": a.centroids.shape[1]},
    ),
    "kmeans1d": Floor("e n", "0", "n weights, read once.", lambda a: _elements(a.weight)),
    # gating
    "channel_pool": Floor(
        "e n + C (e + 4)", "0", "n elements of C channels, counted over all samples.",
        lambda a: {**_elements(a.input), "C": a.input.shape[0] * a.input.shape[1]},
    ),
    "mass_mask": Floor("n (e + 1)", "0", "n scores.", lambda a: _elements(a.scores)),
    "gate_head": Floor(
        "e (M K + N K) + M N (e + 5)", "2 M N K", "M samples, K pooled channels, N gates.",
        lambda a: _product(a.pooled, *a.weight.shape),
    ),
    "gated_norm_act": Floor(
        "e n (2 + t + r)", "0", "n elements; t = 1 in training (read twice), r = 1 with a residual.",
        lambda a: {**_elements(a.input), "t": int(a.training), "r": int(a.residual is not None)},
    ),
    "gated_conv2d": Floor(
        "e (U V R / G + I H + O P (1 + r))", "2 Z R P",
        "U output and V input channels used by any sample; I and O used ones summed over the samples, Z the pairs of both; "
        "R taps, G groups, H and P pixels of an input and an output channel; r = 1 with a residual.",
        _gated_conv,
    ),
    "gated_linear": Floor(
        "e (U V + I + O)", "2 Z",
        "U output and V input channels used by any sample; I and O used ones summed over the samples, Z the pairs of both.",
        lambda a: {
            "U": _used(a.out_index, a.out_count, a.weight.shape[0]),
            "V": _used(a.in_index, a.in_count, a.weight.shape[1]),
            "I": int(a.in_count.sum()), "O": int(a.out_count.sum()), "Z": _pairs(a),
        },
    ),
    # kv_fusion
    "kv_select": Floor(
        "e n + 4 n + 4 m R", "0", "n scores in R rows, m slots.",
        lambda a: {**_elements(a.scores), "m": a.merged, "R": a.scores.shape[0] * a.scores.shape[1]},
    ),
    "kv_gather_": Floor(
        "4 e d (h + r + p R)", "0", "h tokens that stay, r others, p of padding in R rows, d wide; key and value, read and "
        "written.",
        lambda a: {
            "d": a.key.shape[3], "h": a.heavy_index.numel(), "r": a.rest_index.numel(), "p": a.padding,
            "R": a.key.shape[0] * a.key.shape[1],
        },
    ),
    "kv_fuse": Floor(
        "x + w + p + e m d", "2 R M D (2 s + t - 1)",
        "x, w, p bytes of the tokens, of the weight and bias, of the picks; m slots in all, d wide; R rows of s places, M "
        "slots of a row, D channels and t taps of the convolution, of which s places take s + t - 1 products at least.",
        lambda a: {
            "x": _size(a.tokens), "w": _size(a.weight, a.bias), "p": _size(a.pick), "m": a.pick.numel(),
            "d": a.tokens.shape[3], "R": a.tokens.shape[0] * a.tokens.shape[1],
            "s": a.tokens.shape[2] - a.weight.shape[2] + 1, "M": a.weight.shape[0], "D": a.weight.shape[1],
            "t": a.weight.shape[2],
        },
    ),
    "attention_with_scores": Floor(
        "2 q + k + v + 4 (Q + S)", "4 d T",
        "q, k, v bytes of query, key and value; Q queries, S keys, d wide, T pairs of a query and a key that it sees.",
        _attention,
    ),
    "masked_softmax_attention": Floor(
        "2 q + k + v + b", "4 d T",
        "q, k, v, b bytes of query, key, value and mask; d wide, T pairs of a query and a key that it sees.",
        lambda a: {**_attention(a), "b": _size(a.mask)},
    ),
    "kv_append_": Floor(
        "2 (k + v) + 3 l + b", "0", "k, v, l, b bytes of the new keys, the new values, the lengths and the mask.",
        lambda a: {"k": _size(a.key), "v": _size(a.value), "l": _size(a.lengths), "b": _size(a.keep)},
    ),
    # lowbit
    "qlinear": Floor(
        "S + e (M K + M N)", "2 M N K", "M rows, N outputs, K inputs; S bytes of the codes, their parameters and the bias.",
        lambda a: {**_product(a.input, a.codes.shape[0], a.input.shape[-1]), "S": _stored(a)},
    ),
    "qlinear_backward": Floor(
        "S + e (M N + M K)", "2 M N K (x + w)",
        "M rows, N outputs, K inputs; S bytes of the codes and their parameters; x, w = 1: gradients of input and parameters.",
        lambda a: {
            **_product(a.grad, a.codes.shape[0], a.columns), "S": _stored(a) - _size(a.lut),
            "x": int(a.to_input), "w": int(a.input is not None),
        },
    ),
    "qlora_linear": Floor(
        "S + A + e (M K + M N)", "2 M N K + 2 r M (K + N)",
        "M rows, N outputs, K inputs, rank r; S bytes of the codes, their parameters and the bias, A of both low-rank factors.",
        lambda a: {
            **_product(a.input, a.codes.shape[0], a.input.shape[-1]), "S": _stored(a), "A": _size(a.lora_a, a.lora_b),
            "r": a.lora_a.shape[0],
        },
    ),
    "dequantize": Floor(
        "c + 4 N K", "0", "c bytes of codes, N rows of K weights.",
        lambda a: {"c": a.codes.numel(), "N": a.codes.shape[0], "K": a.columns},
    ),
    "fake_quantize_lsq": Floor(
        "2 e n + p", "0", "n elements, p bytes of scales.",
        lambda a: {**_elements(a.input), "p": _size(a.scale)},
    ),
    "fake_quantize_affine": Floor(
        "2 e n + p", "0", "n elements, p bytes of ranges and minima.",
        lambda a: {**_elements(a.input), "p": _size(a.range, a.minimum)},
    ),
    "fake_quantize_minmax": Floor("2 e n", "0", "n elements.", lambda a: _elements(a.input)),
    "fake_quantize_statsq": Floor("2 e n", "0", "n elements.", lambda a: _elements(a.input)),
    "fake_quantize_group": Floor("2 e n", "0", "n elements.", lambda a: _elements(a.input)),
    # selection
    "compact": Floor(
        "N K (m + 4) + 4 N", "0", "a mask of N rows and K columns, m bytes an entry.",
        lambda a: {**_matrix(a.mask), "m": a.mask.element_size()},
    ),
    "pack_mask": Floor(
        "m N K + N ceil(K / 8)", "0", "a mask of N rows and K columns, m bytes an entry.",
        lambda a: {**_matrix(a.mask), "m": a.mask.element_size()},
    ),
    "unpack_mask": Floor(
        "N ceil(K / 8) + N K", "0", "N rows, K columns.", lambda a: {"N": a.bits.shape[0], "K": a.columns}
    ),
    "transpose_mask": Floor(
        "N ceil(K / 8) + K ceil(N / 8)", "0", "N rows, K columns.",
        lambda a: {"N": a.bits.shape[0], "K": a.columns},
    ),
    "mask_offsets": Floor(
        "N b + 8 (N + 1)", "0", "N rows of b bytes.", lambda a: {"N": a.bits.shape[0], "b": a.bits.shape[1]}
    ),
    "keep_mask": Floor(
        "e N K + o + N ceil(K / 8)", "0", "N rows, K columns; o bytes of what the weight is scored with.",
        lambda a: {**_matrix(a.weight), "o": _size(a.other)},
    ),
    "keep_masks": Floor(
        "w + o + b", "0", "bytes of all weights, of what they are scored with, and of the packed masks.",
        lambda a: {
            "w": _size(*a.weights), "o": _size(*a.others),
            "b": sum(w.shape[0] * math.ceil(w.shape[1] / 8) for w in a.weights),
        },
    ),
    # shift_add
    "hash_encode": Floor(
        "e n d + 2 c n", "2 n m (d + b)",
        "n tokens of d features, m anchors, codes of b bits in c bytes, and a gate of as many.",
        lambda a: {
            "n": a.input[..., 0].numel(), "d": a.input.shape[-1], "m": a.anchors.shape[1], "b": a.projection.shape[1],
            "c": _word(a.projection.shape[1]),
        },
    ),
    "binary_encode": Floor(
        "e n d + c n", "0", "n tokens of d features, codes of c bytes.",
        lambda a: {"n": a.input[..., 0].numel(), "d": a.input.shape[-1], "c": _word(a.input.shape[3])},
    ),
    "binary_linear_attention": Floor(
        "c + 2 v", "2 n (2 b + t)", "c, v bytes of the codes and of the values; n values, b bits of a code, t taps.",
        lambda a: {
            "c": _size(a.query, a.key), "v": _size(a.value), "n": a.value.numel(), "b": a.bits,
            "t": 0 if a.weight is None else a.weight.shape[1],
        },
    ),
    "hamming_similarity": Floor(
        "c + 4 Q S", "0", "c bytes of the codes; Q queries in all, S keys for each.",
        lambda a: {"c": _size(a.query, a.key), "Q": a.query.numel(), "S": a.key.shape[-1]},
    ),
    "binary_softmax_attention": Floor(
        "c + v + s Q d", "f Q S d",
        "c, v bytes of the codes and of the values, s of one of them; Q queries in all, S keys for each, d wide; f = 2, 1 if "
        "causal.",
        lambda a: {
            "c": _size(a.query, a.key), "v": _size(a.value), "s": a.value.element_size(), "Q": a.query.numel(),
            "S": a.value.shape[2], "d": a.value.shape[3], "f": 1 if a.causal else 2,
        },
    ),
    "moe_route": Floor(
        "2 M (e + 4) + e M", "0", "M tokens, two experts.", lambda a: {"M": a.logits.shape[0]}
    ),
    "moe2_linear": Floor(
        "e (M K + M (N + 1) + 2 N K) + 4 M", "2 M N K", "M tokens, N outputs, K inputs, two experts.",
        lambda a: _product(a.x, *a.dense_weight.shape),
    ),
    # sparse
    "apply_mask": Floor(
        "2 e n + b", "0", "n weights, b bytes of the mask.",
        lambda a: {**_elements(a.weight), "b": a.bits.numel()},
    ),
    "masked_linear": Floor(
        "e (M K + N K + M N) + b", "2 M N K", "M rows, N outputs, K inputs, b bytes of the mask.",
        lambda a: {**_product(a.input, *a.weight.shape), "b": a.bits.numel()},
    ),
    "spmm": Floor(
        "S + e (M K + M N)", "2 M z", "M rows, N outputs, K inputs; z stored values, S bytes of them and their places.",
        lambda a: {
            **_product(a.input, a.rows, a.input.shape[-1]), "z": a.values.numel(),
            "S": _size(a.values, a.index, a.offsets),
        },
    ),
    "sddmm": Floor(
        "e (M N + M K) + z (i + 4 B)", "2 M z B", "M rows, N outputs, K inputs; z blocks of B values, i bytes of a place.",
        lambda a: {
            **_product(a.grad, a.grad.shape[-1], a.input.shape[-1]), "z": a.index.shape[0],
            "i": a.index.element_size(), "B": a.block_rows * a.block_columns,
        },
    ),
    "sparse_conv2d": Floor(
        "S + e (x + M N P)", "2 M z P",
        "M samples, x elements of the input, N outputs of P pixels; z stored values, S bytes of them and their places.",
        lambda a: {
            "S": _size(a.values, a.index, a.offsets), "x": a.input.numel(), "M": a.input.shape[0], "N": a.rows,
            "P": _pixels(a.input, a.kernel_size, a), "z": a.values.numel(),
        },
    ),
    "dsnot_swap": Floor(
        "e n + 2 b", "0", "n weights, b bytes of the mask.",
        lambda a: {**_elements(a.weight), "b": a.bits.numel()},
    ),
    "gram_swap": Floor(
        "w + 2 b + g + c", "s (4 p + 7 n)",
        "w, b, g, c bytes of the weight, the mask, the Gram matrix and the correlation; n weights, p pairs that are tried for a "
        "swap of each row, s swaps of a row.",
        lambda a: {
            "w": _size(a.weight), "b": _size(a.bits), "g": _size(a.gram), "c": _size(a.correlation),
            **_elements(a.weight), "p": _pairs_of_swaps(a), "s": a.max_swaps,
        },
    ),
    "masked_sgd_": Floor(
        "2 w + g + 2 s + b", "0", "bytes of the weight, the gradient, the state and the mask.",
        lambda a: _optimizer(a, a.momentum_buffer),
    ),
    "masked_adam_": Floor(
        "2 w + g + 2 s + b", "0", "bytes of the weight, the gradient, the state and the mask.",
        lambda a: _optimizer(a, a.exp_avg, a.exp_avg_sq, a.max_exp_avg_sq),
    ),
    "prune_and_grow_": Floor(
        "w + 2 b + s", "0", "bytes of the weight, the mask and the scores.",
        lambda a: {"w": _size(a.weight), "b": _size(a.bits), "s": _size(a.grow_score, a.drop_score)},
    ),
    "activation_statistics": Floor(
        "e M K + 12 K", "0", "M rows of K inputs.", lambda a: _product(a.input, 0, a.input.shape[-1])
    ),
    "gram": Floor(
        "e M K + 4 K K", "2 M K K", "M rows of K inputs.", lambda a: _product(a.input, 0, a.input.shape[-1])
    ),
    "group_statistics": Floor(
        "w + g + 12 n / B", "0", "bytes of the weight and the gradient; n weights in blocks of B.",
        lambda a: {
            "w": _size(a.weight), "g": _size(a.grad), **_elements(a.weight), "B": a.block_rows * a.block_columns,
        },
    ),
}  # fmt: skip


def _word(bits: int) -> int:
    """Bytes of a code."""
    return 2 if bits <= 16 else 4 if bits <= 32 else 8


def _pairs_of_swaps(a: Any) -> int:
    """Kept and pruned weights that are tried with each other for one swap of each row."""
    columns = a.weight.shape[1]
    kept = unpack_bits(a.bits, 1, columns).view(len(a.bits), -1, a.group or columns).sum(2)
    pruned = (a.group or columns) - kept
    if not a.group:
        kept, pruned = kept.clamp(max=a.candidates), pruned.clamp(max=a.candidates)
    return int((kept.long() * pruned).sum())


def _dkm(a: Any) -> Symbols:
    partitions, clusters, width = a.centroids.shape
    vectors = a.weight.numel() // width
    if a.weight.element_size() == 2 and width == 1:
        vectors = sum(part.unique().numel() for part in a.weight.view(partitions, -1))
    return {**_elements(a.weight), "d": width, "u": vectors, "K": clusters, "T": a.iterations}
