# SPDX-License-Identifier: Apache-2.0
"""Representative calls of every launcher, one builder per entry of ``configs``.

A builder turns the sizes of an entry into calls on tensors of a dtype and a device. Two things use them: ahead-of-time
compilation runs all of them on meta tensors (:mod:`cofire_kernels.aot`), tuning times the first on a GPU
(:mod:`cofire_kernels.configs.tune`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cofire_kernels import (
    clustering,
    gating,
    kv_fusion,
    lowbit,
    selection,
    shift_add_attention,
    shift_add_mixture,
    sparse,
    sparse_refine,
    sparse_training,
)
from cofire_kernels.selection.positions import positions
from cofire_kernels.shift_add_attention.scores import word_of

Call = Callable[[], object]
Sizes = dict[str, int]


@dataclass(frozen=True)
class Make:
    """Inputs of the right shape; on the meta device they cost nothing."""

    dtype: torch.dtype
    device: torch.device

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def map(self, n: int, c: int, pixels: int, channels_last: bool = False) -> Tensor:
        width = max(w for w in range(1, int(pixels**0.5) + 1) if pixels % w == 0)
        x = self.values(n, c, pixels // width, width)
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def mask(self, n: int, c: int) -> Tensor:
        return torch.rand((n, c), device=self.device) < 0.5

    def selection(self, n: int, c: int) -> tuple[Tensor, Tensor]:
        """Half of the channels, as compact gives them."""
        slot = torch.arange(c, dtype=torch.int32, device=self.device)
        index = torch.where(slot < c // 2, 2 * slot, -1).to(torch.int32).repeat(n, 1)
        return index, torch.full((n,), c // 2, dtype=torch.int32, device=self.device)


def _compact(make: Make, sizes: Sizes) -> list[Call]:
    mask = make.mask(128, sizes["columns"])
    index, count = make.selection(128, sizes["columns"])
    return [lambda: selection.compact(mask), lambda: positions(index, count)]


def _packed_mask(make: Make, sizes: Sizes) -> list[Call]:
    mask = make.mask(128, 8 * sizes["bytes"])
    bits = torch.randint(0, 256, (8 * sizes["bytes"], 64), dtype=torch.uint8, device=make.device)
    return [
        lambda: selection.pack_mask(mask),
        lambda: selection.unpack_mask(bits, 512),
        lambda: selection.transpose_mask(bits, 512),
        lambda: selection.mask_offsets(bits),
    ]


def _keep_mask(make: Make, sizes: Sizes) -> list[Call]:
    n = sizes["entries"]
    weight, gradient, norms = make.values(128, n), make.values(128, n), make.values(n)
    counts = torch.full((128,), n // 2, device=make.device)

    def kept(other: Tensor | None, counts: Tensor | None, scope: str, score: str, block: tuple[int, int]) -> Call:
        return lambda: selection.keep_mask(weight, other, counts, 2, scope, score, *block, 1.0)

    return [
        kept(None, None, "row", "magnitude", (1, 1)),
        kept(norms, counts, "row", "wanda", (1, 1)),
        kept(gradient, None, "row", "magnitude_gradient", (1, 1)),
        kept(gradient, None, "block", "taylor", (8, n // 8)),
        kept(None, None, "block", "magnitude", (1, 4)),
        kept(gradient, None, "block", "fisher", (1, 32)),
    ]


def _mass_mask(make: Make, sizes: Sizes) -> list[Call]:
    scores = make.values(128, sizes["columns"]).abs()
    weight, pooled = make.values(sizes["columns"], 16), make.values(128, 16)
    return [
        lambda: gating.mass_mask(scores, 0.9, "mass", 1),
        lambda: gating.mass_mask(scores, 1.0, "mass", 1),
        lambda: gating.mass_mask(scores, 0.5, "uniform", 1),
        lambda: gating.gate_head(pooled, weight, None, True, 1),
    ]


def _gate_head(make: Make, sizes: Sizes) -> list[Call]:
    x, w, b = make.values(sizes["samples"], sizes["features"]), make.values(512, sizes["features"]), make.values(512)
    return [lambda: gating.gate_head(x, w, b, True, 1), lambda: gating.gate_head(x, w, None, False, 0)]


def _channel_pool(make: Make, sizes: Sizes, channels_last: bool = False) -> list[Call]:
    x, grad = make.map(32, 256, sizes["pixels"], channels_last), make.values(32, 256)

    def both(mode: str) -> Call:
        return lambda: (gating.channel_pool(x, mode), gating.channel_pool_backward(grad, x, mode))

    return [both("max"), both("avg")]


def _gated_norm_act(make: Make, sizes: Sizes, channels_last: bool = False) -> list[Call]:
    n, c = 32, 256
    x, y, grad = (make.map(n, c, sizes["pixels"], channels_last) for _ in range(3))
    mask = make.mask(n, c)
    mean, var = torch.zeros(c, device=make.device), torch.ones(c, device=make.device)

    def both(training: bool, residual: Tensor | None, gate: Tensor | None, activation: str) -> Call:
        def call() -> object:
            forward = gating.gated_norm_act(x, var, mean, mean, var, residual, gate, activation, training, 1e-5)
            return forward, gating.gated_norm_act_backward(
                grad, y, x, var, mean, var, gate, activation, training, residual is not None, 1e-5
            )

        return call

    return [both(True, None, mask, "relu"), both(True, y, mask, "relu6"), both(False, None, None, "identity")]


def _gated_conv2d(make: Make, sizes: Sizes) -> list[Call]:
    if make.dtype.itemsize != sizes["element_size"]:
        return []
    n, c = 8, sizes["out_channels"]
    rows, columns = (make.map(n, c, sizes["pixels"], channels_last) for channels_last in (False, True))
    compact = make.map(n, c // 2, sizes["pixels"], True)
    weight = make.values(c, c, 3, 3).contiguous(memory_format=torch.channels_last)
    bias, chosen = make.values(c), make.selection(n, c)

    def conv(x: Tensor, residual: Tensor | None, activation: str, masked: bool, inner: bool, slots: int) -> Call:
        window = ([1, 1], [1, 1], [1, 1])
        return lambda: gating.gated_conv2d(
            x, weight, bias, residual, *chosen, *chosen, *window, 1, activation, masked, inner, slots
        )

    return [
        conv(columns, None, "relu", True, False, 0),
        conv(rows, rows, "relu6", False, False, 0),
        conv(compact, columns, "identity", False, True, c // 2),
    ]


def _depthwise(make: Make, sizes: Sizes, channels_last: bool = False) -> list[Call]:
    n, c = 8, 512
    x, weight, bias = make.map(n, c, sizes["pixels"], channels_last), make.values(c, 1, 3, 3), make.values(c)
    compact, chosen = make.map(n, c // 2, sizes["pixels"], channels_last), make.selection(n, c)
    window = ([1, 1], [1, 1], [1, 1])

    def conv(masked: bool, inner: bool, slots: int) -> Call:
        source, residual = (compact, x) if inner else (x, None)
        return lambda: gating.gated_conv2d(
            source, weight, bias, residual, *chosen, *chosen, *window, c, "relu", masked, inner, slots
        )

    return [conv(True, False, 0), conv(False, True, c // 2)]


def _gated_linear(make: Make, sizes: Sizes, by_columns: bool) -> list[Call]:
    n, features = sizes["samples"], sizes["out_features"]
    x, weight, bias = make.values(n, features), make.values(features, features), make.values(features)
    weight, chosen = weight.t() if by_columns else weight, make.selection(n, features)
    return [lambda: gating.gated_linear(x, weight, bias, *chosen, *chosen, "relu")]


def _bits(make: Make, sizes: Sizes) -> Tensor:
    """16-bit weights: for fp32, bfloat16 stands in."""
    dtype = make.dtype if make.dtype.itemsize == 2 else torch.bfloat16
    return torch.randn(sizes["elements"], device=make.device).to(dtype)


def _histogram16(make: Make, sizes: Sizes) -> list[Call]:
    input = _bits(make, sizes)
    return [lambda: clustering.histogram16(input)]


def _scatter16(make: Make, sizes: Sizes) -> list[Call]:
    input, source = _bits(make, sizes), make.values(sizes["elements"])
    return [lambda: clustering.scatter16(input, source), lambda: clustering.scatter16(input, source.double())]


def _lut_apply16(make: Make, sizes: Sizes) -> list[Call]:
    input, source = _bits(make, sizes), make.values(sizes["elements"])
    table, slope = (torch.randn(65536, device=make.device) for _ in range(2))
    return [
        lambda: clustering.lut_apply16(input, table, None, None),
        lambda: clustering.lut_apply16(input, table, source, slope),
    ]


#: eps, enforce_zero, prune_threshold, keep_sparsity
_RULES = [(1e-7, False, 0.0, False), (0.0, True, 0.01, True)]


def _palette(clusters: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    even = torch.linspace(-2, 2, clusters, device=device)[None, :, None]
    return even.repeat(1, 1, d), torch.full((1,), 1.2 / clusters**2, device=device)


def _dkm_tables(make: Make, sizes: Sizes) -> list[Call]:
    values = torch.linspace(-3, 3, 4096, dtype=torch.float32, device=make.device)
    counts = torch.full((1, 4096), 16, dtype=torch.int32, device=make.device)
    centroids, tau = _palette(sizes["clusters"], 1, make.device)

    def both(rules: tuple[float, bool, float, bool], grad: str) -> Call:
        def call() -> object:
            palette = centroids[:, :, 0]
            table, path, status = clustering.dkm_tables(values, counts, palette, tau, 3, *rules, grad, 2**-9)
            return clustering.dkm_tables_backward(table, values, counts, path, status, tau, *rules, grad)

        return call

    return [both(_RULES[0], "unroll"), both(_RULES[1], "unroll"), both(_RULES[0], "implicit")]


def _dkm(make: Make, sizes: Sizes) -> list[Call]:
    """The numbers of a palette are those of scalars, and of vectors of four with a quarter of the centroids."""

    def both(d: int, rules: tuple[float, bool, float, bool], forward: str, grad: str) -> Call:
        weight, grad_output = make.values(4096, 256), make.values(4096, 256)
        centroids, tau = _palette(max(sizes["clusters"] // d, 2), d, make.device)
        size = weight.numel()

        def call() -> object:
            output, path, status = clustering.dkm(weight, centroids, tau, size, 3, *rules, forward, grad)
            gradients = clustering.dkm_backward(grad_output, weight, path, status, tau, size, *rules, grad)
            return output, gradients, clustering.palettize(weight, centroids, size, rules[2], rules[3])

        return call

    return [
        both(1, _RULES[0], "soft", "unroll"),
        both(4, _RULES[1], "hard_ste", "unroll"),
        both(4, _RULES[0], "soft", "jfb"),
    ]


Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _weight(make: Make, bits: int, columns: int, group: int, lut: str = "") -> Parts:
    """Codes, scale, zero, offset and table of 4,096 rows."""
    codes = torch.randint(0, 256, (4096, (columns * bits + 7) // 8), dtype=torch.uint8, device=make.device)
    scale = torch.ones((4096, columns // group), dtype=torch.float32, device=make.device)
    zero = torch.full((1, 1), float(1 << bits >> 1), device=make.device)
    if not lut:
        return codes, scale, zero, None, None
    table = torch.ones((1, 1 << bits), device=make.device)
    return codes, scale, None, None, table.to(torch.int8) if lut == "int8" else table


def _dequantize(make: Make, sizes: Sizes) -> list[Call]:
    k = sizes["columns"]
    four, three, palette = _weight(make, 4, k, 128), _weight(make, 3, k, 128), _weight(make, 4, k, 128, "float")
    narrow = _weight(make, 4, k, 8)
    return [
        lambda: lowbit.dequantize(*four, 4, 128, k),
        lambda: lowbit.dequantize(*three, 3, 128, k),
        lambda: lowbit.dequantize(*palette, 4, 128, k),
        lambda: lowbit.dequantize(*narrow, 4, 8, k),
    ]


def _sum_splits(make: Make, sizes: Sizes) -> list[Call]:
    parts, like = torch.randn((8, sizes["elements"]), device=make.device), make.values(sizes["elements"])
    return [lambda: lowbit.sum_splits(parts, like)]


def _qlinear(make: Make, sizes: Sizes) -> list[Call]:
    if make.dtype.itemsize != sizes.get("element_size", make.dtype.itemsize):
        return []
    k = sizes["columns"]
    x, bias = make.values(sizes["samples"], k), make.values(4096)
    a, b = make.values(16, k), make.values(4096, 16)
    four, narrow, three = _weight(make, 4, k, 128), _weight(make, 4, k, 32), _weight(make, 3, k, 128)
    two, palette = _weight(make, 2, k, k), _weight(make, 4, k, k, "float")
    return [
        lambda: lowbit.qlinear(x, *four, None, 4, 128, "exact"),
        lambda: lowbit.qlinear(x, *narrow, bias, 4, 32, "exact"),
        lambda: lowbit.qlinear(x, *three, None, 3, 128, "exact"),
        lambda: lowbit.qlinear(x, *two, None, 2, k, "exact"),
        lambda: lowbit.qlinear(x, *palette, None, 4, k, "exact"),
        lambda: lowbit.qlora_linear(x, *four, None, a, b, 0.5, 4, 128),
    ]


def _qlinear_bytes(make: Make, sizes: Sizes) -> list[Call]:
    k = sizes["columns"]
    x = make.values(sizes["samples"], k)
    four, eight, row = _weight(make, 4, k, 128), _weight(make, 8, k, 128), _weight(make, 4, k, k)
    palette = _weight(make, 4, k, k, "int8")
    return [
        lambda: lowbit.qlinear(x, *four, None, 4, 128, "int8"),
        lambda: lowbit.qlinear(x, *eight, None, 8, 128, "int8"),
        lambda: lowbit.qlinear(x, *row, None, 4, k, "int8"),
        lambda: lowbit.qlinear(x, *palette, None, 4, k, "int8"),
    ]


def _qlinear_backward(make: Make, sizes: Sizes) -> list[Call]:
    if make.dtype.itemsize != sizes["element_size"]:
        return []
    k = sizes["columns"]
    grad, a, b = make.values(sizes["samples"], 4096), make.values(16, k), make.values(4096, 16)
    four, narrow, three = _weight(make, 4, k, 128), _weight(make, 4, k, 32), _weight(make, 3, k, 128)
    palette = _weight(make, 4, k, 64, "float")
    return [
        lambda: lowbit.qlinear_backward(grad, None, *four, 4, 128, k, "exact", True),
        lambda: lowbit.qlinear_backward(grad, None, *narrow, 4, 32, k, "exact", True),
        lambda: lowbit.qlinear_backward(grad, None, *three, 3, 128, k, "exact", True),
        lambda: lowbit.qlinear_backward(grad, None, *palette, 4, 64, k, "exact", True),
        lambda: lowbit.qlora_linear_backward(grad, None, None, None, *four, a, b, 0.5, 4, 128, True),
    ]


def _fake_quantize(make: Make, sizes: Sizes) -> list[Call]:
    k = sizes["columns"]
    x, grad = make.values(4096, k), make.values(4096, k)
    each, narrow, one = (torch.full((n,), 0.1, device=make.device) for n in (k, 4096, 1))

    def lsq(scale: Tensor, inner: int) -> Call:
        return lambda: (
            lowbit.fake_quantize_lsq(x, scale, inner, -8, 7, None),
            lowbit.fake_quantize_lsq_backward(grad, x, scale, inner, -8, 7, None),
        )

    return [
        lsq(narrow, k),
        lsq(each, 1),
        lsq(one, 1),
        lambda: lowbit.fake_quantize_affine(x, narrow, narrow, k, 4),
        lambda: lowbit.fake_quantize_affine_backward(grad, x, narrow, narrow, k, 4),
        lambda: lowbit.fake_quantize_minmax(x, 4, k),
        lambda: lowbit.fake_quantize_minmax_backward(grad, x, 4, k),
        lambda: lowbit.fake_quantize_statsq(x, 4),
        lambda: lowbit.fake_quantize_group(x, "int4", k, 2, False, 0),
        lambda: lowbit.fake_quantize_group(x, "e2m1", k, 2, True, 5),
        lambda: lowbit.fake_quantize_group(x, "int4_asymmetric", k, 2, False, 0),
    ]


def _mask(make: Make, rows: int, columns: int) -> Tensor:
    return torch.full((rows, columns // 8), 0x5A, dtype=torch.uint8, device=make.device)


def _apply_mask(make: Make, sizes: Sizes) -> list[Call]:
    w, bits = make.values(4096, sizes["columns"]), _mask(make, 4096, sizes["columns"])
    return [lambda: sparse.apply_mask(w, bits)]


def _masked(make: Make, sizes: Sizes, what: str) -> list[Call]:
    if make.dtype.itemsize != sizes["element_size"]:
        return []
    m, k, n = sizes["samples"], sizes["columns"], 4096
    x, grad, w, bits = make.values(m, k), make.values(m, n), make.values(n, k), _mask(make, n, k)
    bias = make.values(n)
    if what == "product":
        return [lambda: sparse.masked_linear(x, w, bits, bias, "hard", 0.0)]
    if what == "input":
        return [lambda: sparse.masked_linear_backward(grad, x, w, bits, "hard", 0.0, True, False)]
    return [
        lambda: sparse.masked_linear_backward(grad, x, w, bits, "hard", 0.0, False, True),
        lambda: sparse.masked_linear_backward(grad, x, w, bits, "srste", 1e-4, False, True),
    ]


Compressed = tuple[Tensor, Tensor, Tensor, None, str, int, int, int, int]


def _compressed(make: Make, format: str, block: int, sizes: Sizes) -> Compressed:
    """A weight of 4096 rows, of which a quarter is kept: what spmm takes from the values on."""
    rows, columns = 4096, sizes.get("columns", 4096)
    strips, kept = {"csr": (rows, columns // 4), "delta": (rows, columns // 4), "bitmap": (256, 4 * columns)}.get(
        format, (rows // block, columns // block // 4)
    )
    dtype = {"csr": torch.uint16, "delta": torch.uint8, "bitmap": torch.uint16}.get(format, torch.int32)
    index = torch.full((strips * kept,), 1, dtype=dtype, device=make.device)
    if format == "block":
        index = (torch.arange(strips * kept, device=make.device) % kept * 4).to(torch.int32)
    elif format == "bitmap":
        index = torch.full((256, columns), 0x1111, dtype=torch.int32, device=make.device).to(torch.uint16)
    offsets = torch.arange(strips + 1, device=make.device) * kept
    values = make.values(strips * kept, block, block) if format == "block" else make.values(strips * kept)
    return values, index, offsets, None, format, rows, columns, block, block


def _decode_sparse(make: Make, sizes: Sizes) -> list[Call]:
    x = make.values(16, sizes["columns"])

    def call(format: str) -> Call:
        args = _compressed(make, format, 1, sizes)
        return lambda: sparse.spmm(x, None, *args)

    return [call("bitmap"), call("csr"), call("delta")]


def _spmm_block(make: Make, sizes: Sizes, sampled: bool) -> list[Call]:
    if make.dtype.itemsize != sizes["element_size"]:
        return []
    x, grad = make.values(sizes["samples"], 4096), make.values(sizes["samples"], 4096)
    args = _compressed(make, "block", sizes["block"], sizes)
    if sampled:
        return [lambda: sparse.spmm_backward(grad, x, *args, False, True)]
    return [
        lambda: sparse.spmm(x, None, *args),
        lambda: sparse.spmm_backward(grad, x, *args, True, False),
    ]


def _masked_step(make: Make, sizes: Sizes) -> list[Call]:
    k = sizes["columns"]
    w, g, bits = make.values(512, k), make.values(512, k), _mask(make, 512, k)
    m, v = (torch.ones((512, k), device=make.device) for _ in range(2))
    packed = [torch.ones(512 * k // 2, device=make.device) for _ in range(3)]
    offsets = torch.arange(513, device=make.device) * (k // 2)

    def adam(*states: Tensor | None, bits: Tensor | None, offsets: Tensor | None, clean: bool) -> Call:
        options = (0.1, 0.9, 0.99, 1e-8, 0.01, True, False, 3, clean)
        return lambda: sparse_training.masked_adam_(w, g, *states, bits, offsets, *options)  # type: ignore[arg-type, call-arg]

    return [
        adam(m, v, None, bits=bits, offsets=None, clean=True),
        adam(m, v, None, bits=None, offsets=None, clean=False),
        adam(*packed, bits=bits, offsets=offsets, clean=False),
        lambda: sparse_training.masked_sgd_(w, g, m, bits, None, 0.1, 0.9, 0.0, 0.01, True, False, False, False),
        lambda: sparse_training.masked_sgd_(w, g, None, bits, None, 0.1, 0.0, 0.0, 0.0, False, False, False, False),
    ]


def _prune_and_grow(make: Make, sizes: Sizes) -> list[Call]:
    w, g = make.values(512, sizes["columns"]), make.values(512, sizes["columns"])
    bits = _mask(make, 512, sizes["columns"])
    return [
        lambda: sparse_training.prune_and_grow_(w, bits, g, None, 9, "row", 0),
        lambda: sparse_training.prune_and_grow_(w, bits, None, g, 9, "row", 5),
    ]


def _activation_statistics(make: Make, sizes: Sizes) -> list[Call]:
    x = make.values(2048, sizes["columns"])
    return [lambda: sparse_training.activation_statistics(x)]


def _group_statistics(make: Make, sizes: Sizes) -> list[Call]:
    w, g = make.values(4096, 4096), make.values(4096, 4096)
    return [lambda: sparse_training.group_statistics(w, g, sizes["rows"], sizes["columns"])]


def _dsnot_swap(make: Make, sizes: Sizes) -> list[Call]:
    k = sizes["columns"]
    weight, bits = make.values(1024, k), _mask(make, 1024, k)
    vector = torch.ones(k, device=make.device)
    return [
        lambda: sparse_refine.dsnot_swap(weight, bits, vector, vector, vector, 51, 1e-3, False, 0),
        lambda: sparse_refine.dsnot_swap(weight, bits, vector, vector, vector, 51, 1e-3, False, 4),
        lambda: sparse_refine.dsnot_swap(weight, bits, vector, vector, vector, 50, 0.1, True, 0),
        lambda: sparse_refine.dsnot_swap(weight, bits, vector, vector, vector, 50, 0.1, True, 4),
    ]


def _gram_swap(make: Make, sizes: Sizes) -> list[Call]:
    k = sizes["columns"]
    weight, bits = make.values(1024, k), _mask(make, 1024, k)
    gram = torch.eye(k, device=make.device)
    correlation = torch.zeros((1024, k), dtype=torch.float64, device=make.device)
    return [
        lambda: sparse_refine.gram_swap(weight, bits, gram, correlation, k, 64, 0),
        lambda: sparse_refine.gram_swap(weight, bits, gram, correlation, k, 64, 4),
    ]


def _codes(make: Make, bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 2 ** min(bits, 15), shape, dtype=word_of(bits), device=make.device)


def _hamming_similarity(make: Make, sizes: Sizes) -> list[Call]:
    def call(bits: int, kind: str) -> Call:
        query, key = _codes(make, bits, 8, 784), _codes(make, bits, 8, sizes["keys"])
        return lambda: shift_add_attention.hamming_similarity(query, key, bits, kind)

    return [call(64, "sign"), call(32, "binary"), call(16, "sign")]


def _binary_softmax_attention(make: Make, sizes: Sizes) -> list[Call]:
    if make.dtype.itemsize != sizes["element_size"]:
        return []
    value = make.values(2, 8, 1024, sizes["features"])

    def call(bits: int, scale: float, kind: str, causal: bool, precision: str) -> Call:
        query, key = (_codes(make, bits, 2, 8, 1024) for _ in range(2))
        options = (bits, scale, kind, causal, precision)
        return lambda: shift_add_attention.binary_softmax_attention(query, key, value, None, None, *options)

    codes = _codes(make, 32, 2, 8, 1024)
    return [
        call(64, 0.125, "sign", False, "high"),
        call(64, 0.125, "sign", True, "highest"),
        call(64, 2.0, "sign", False, "high"),
        call(16, 0.25, "binary", False, "high"),
        lambda: shift_add_attention.binary_softmax_attention_backward(
            value, codes, codes, value, value, value, 32, 0.125, "sign", False
        ),
    ]


def _binary_linear_attention(make: Make, sizes: Sizes) -> list[Call]:
    if make.dtype.itemsize != sizes["element_size"]:
        return []
    value, weight = make.values(32, 3, 784, sizes["features"]), make.values(3, 9)

    def call(bits: int, weight: Tensor | None) -> list[Call]:
        codes = _codes(make, bits, 32, 3, 784)
        args = (codes, codes, value, weight, value, value, bits, 1e-6)
        return [
            lambda: shift_add_attention.binary_linear_attention(*args),
            lambda: shift_add_attention.binary_linear_attention_backward(value, *args),
        ]

    return [*call(16, weight), *call(64, None)]


def _binary_codes(make: Make, sizes: Sizes) -> list[Call]:
    width, anchors, bits = sizes["features"], 25, 16
    x, threshold = make.values(32, 3, 784, width), make.values(3)
    a, center, projection = make.values(3, anchors, width), make.values(3, anchors), make.values(3, bits, anchors)
    gate, sigma = _codes(make, bits, 32, 3, 784), torch.ones((32, 3), device=make.device)
    grad, features = make.values(32, 3, 784, bits), x[..., :64]
    return [
        lambda: shift_add_attention.hash_encode(x, a, center, projection, 1e-6),
        lambda: shift_add_attention.hash_encode_backward(grad, x, a, projection, gate, sigma, 1e-6),
        lambda: shift_add_attention.binary_encode(features, threshold, 1e-6),
        lambda: shift_add_attention.binary_encode(features, None, 1e-6),
        lambda: shift_add_attention.binary_encode_backward(x, x, 1e-6),
    ]


def _moe_route(make: Make, sizes: Sizes) -> list[Call]:
    logits, grad = make.values(sizes["tokens"], 2), make.values(sizes["tokens"])
    return [
        lambda: shift_add_mixture.moe_route(logits),
        lambda: shift_add_mixture.moe_route_backward(grad, torch.ones(2, device=make.device), logits),
    ]


def _moe2_linear(make: Make, sizes: Sizes, backward: bool) -> list[Call]:
    if make.dtype.itemsize != sizes["element_size"]:
        return []
    tokens, n = sizes["tokens"], sizes["features"]
    x, dense, shift = make.values(tokens, n), make.values(n, n), make.values(n, n)
    grad, gate, bias = make.values(tokens, n), make.values(tokens), make.values(n)
    index = torch.full((2, tokens), -1, dtype=torch.int32, device=make.device)
    index[:, : tokens // 2] = torch.arange(tokens, dtype=torch.int32, device=make.device).view(-1, 2).t()
    count = torch.full((2,), tokens // 2, dtype=torch.int32, device=make.device)

    def call(biases: tuple[Tensor | None, Tensor | None]) -> Call:
        args = (x, dense, shift, *biases, gate, index, count)
        if backward:
            return lambda: shift_add_mixture.moe2_linear_backward(grad, *args)
        return lambda: shift_add_mixture.moe2_linear(*args)

    return [call((bias, bias)), call((None, bias)), call((None, None))]


def _kv_select(make: Make, sizes: Sizes) -> list[Call]:
    scores, n = make.values(1, 32, sizes["tokens"]), sizes["tokens"]
    return [lambda: kv_fusion.kv_select(scores, n // 4, n // 4, 16)]


def _kv_gather(make: Make, sizes: Sizes) -> list[Call]:
    key, value, new_key, new_value = (make.values(1, 32, n, sizes["features"]) for n in (1024, 1024, 512, 512))
    heavy, rest = (torch.arange(n, dtype=torch.int32, device=make.device).expand(1, 32, n) for n in (256, 768))
    return [lambda: kv_fusion.kv_gather_(new_key, new_value, key, value, heavy, rest, 10)]


def _kv_fuse(make: Make, sizes: Sizes, backward: bool) -> list[Call]:
    if make.dtype.itemsize != sizes["element_size"]:
        return []
    width, taps, slots = sizes["features"], 21, 256
    tokens, weight, bias = make.values(1, 32, 788, width), make.values(slots, width, taps), make.values(slots)
    gate, pick = make.values(1), torch.arange(slots, dtype=torch.int32, device=make.device).repeat(1, 32, 1)
    if not backward:
        return [lambda: kv_fusion.kv_fuse(tokens, weight, bias, gate, pick)]
    grad = make.values(1, 32, slots, width // 2)
    return [lambda: kv_fusion.kv_fuse_backward(grad, grad, tokens, weight, bias, gate, pick, True)]


def _attention_with_scores(make: Make, sizes: Sizes, backward: bool) -> list[Call]:
    if make.dtype.itemsize != sizes["element_size"]:
        return []
    query, key = make.values(1, 32, 512, sizes["features"]), make.values(1, 8, 1024, sizes["features"])
    scale, mask = sizes["features"] ** -0.5, make.values(1, 1024)
    if not backward:
        return [
            lambda: kv_fusion.attention_with_scores(query, key, key, True, scale, 512, True),
            lambda: kv_fusion.masked_softmax_attention(query, key, key, mask, True, scale, 1e-6, False),
        ]
    of_lse = torch.ones((1, 32, 512), device=make.device)
    return [
        lambda: kv_fusion.attention_with_scores_backward(query, of_lse, query, key, key, True, scale),
        lambda: kv_fusion.masked_softmax_attention_backward(query, query, key, key, mask, True, scale, 1e-6, False),
    ]


def _kv_append(make: Make, sizes: Sizes) -> list[Call]:
    heads, width = sizes["elements"] // 128, 128
    cache_key, cache_value = make.values(8, heads, 1024, width), make.values(8, heads, 1024, width)
    key, value = make.values(8, heads, 1, width), make.values(8, heads, 1, width)
    keep = torch.zeros(8, dtype=torch.bool, device=make.device)  # however often it is called, the cache is never full
    lengths = torch.zeros(8, dtype=torch.int32, device=make.device)
    return [lambda: kv_fusion.kv_append_(cache_key, cache_value, lengths, key, value, keep)]


CASES: dict[str, Callable[[Make, Sizes], list[Call]]] = {
    "compact": _compact,
    "packed_mask": _packed_mask,
    "keep_mask": _keep_mask,
    "mass_mask": _mass_mask,
    "gate_head": _gate_head,
    "channel_pool": _channel_pool,
    "channel_pool_channels_last": lambda make, sizes: _channel_pool(make, sizes, channels_last=True),
    "gated_norm_act": _gated_norm_act,
    "gated_norm_act_channels_last": lambda make, sizes: _gated_norm_act(make, sizes, channels_last=True),
    "gated_conv2d": _gated_conv2d,
    "gated_conv2d_depthwise": _depthwise,
    "gated_conv2d_depthwise_channels_last": lambda make, sizes: _depthwise(make, sizes, channels_last=True),
    "gated_linear_rows": lambda make, sizes: _gated_linear(make, sizes, by_columns=False),
    "gated_linear_columns": lambda make, sizes: _gated_linear(make, sizes, by_columns=True),
    "histogram16": _histogram16,
    "scatter16": _scatter16,
    "lut_apply16": _lut_apply16,
    "dkm_tables": _dkm_tables,
    "dkm": _dkm,
    "dequantize": _dequantize,
    "fake_quantize": _fake_quantize,
    "sum_splits": _sum_splits,
    "qlinear_rows": _qlinear,
    "qlinear": _qlinear,
    "qlinear_bytes": _qlinear_bytes,
    "qlinear_backward": _qlinear_backward,
    "apply_mask": _apply_mask,
    "masked_linear": lambda make, sizes: _masked(make, sizes, "product"),
    "masked_input_gradient": lambda make, sizes: _masked(make, sizes, "input"),
    "masked_weight_gradient": lambda make, sizes: _masked(make, sizes, "weight"),
    "decode_sparse": _decode_sparse,
    "spmm_block": lambda make, sizes: _spmm_block(make, sizes, sampled=False),
    "sddmm_block": lambda make, sizes: _spmm_block(make, sizes, sampled=True),
    "masked_step": _masked_step,
    "prune_and_grow_keys": _prune_and_grow,
    "prune_and_grow": _prune_and_grow,
    "activation_statistics": _activation_statistics,
    "group_statistics": _group_statistics,
    "dsnot_swap": _dsnot_swap,
    "gram_swap": _gram_swap,
    "hamming_similarity": _hamming_similarity,
    "binary_softmax_attention": _binary_softmax_attention,
    "binary_linear_attention": _binary_linear_attention,
    "binary_codes": _binary_codes,
    "moe_route": _moe_route,
    "moe2_linear": lambda make, sizes: _moe2_linear(make, sizes, backward=False),
    "moe2_input_gradient": lambda make, sizes: _moe2_linear(make, sizes, backward=True),
    "moe2_weight_gradient": lambda make, sizes: _moe2_linear(make, sizes, backward=True),
    "kv_select": _kv_select,
    "kv_gather_": _kv_gather,
    "kv_fuse": lambda make, sizes: _kv_fuse(make, sizes, backward=False),
    "kv_fuse_backward": lambda make, sizes: _kv_fuse(make, sizes, backward=True),
    "attention_with_scores": lambda make, sizes: _attention_with_scores(make, sizes, backward=False),
    "attention_with_scores_backward": lambda make, sizes: _attention_with_scores(make, sizes, backward=True),
    "kv_append_": _kv_append,
}
