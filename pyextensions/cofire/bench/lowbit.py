# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of products with quantised weights, on the layers of a language model of 7 billion parameters.

Weights are normal, quantised in groups; scales are numbers of bfloat16, so that all peers can hold them. *Dense* knows the
weight decoded, in fp32 or bfloat16; ``eager`` decodes at every call. With activations rounded to 8 bits the dense providers
compute with exact ones and are checked against that; one that takes bfloat16 is checked against its own rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.bench.cases import Args, Case, Provider, Random, Run, compiled, plain
from cofire.bench.dense_products import SAME_DTYPE, dense_products, has_half, plainly
from cofire.bench.fake_quantize import CASES as FAKE
from cofire.bench.lowbit_torch import int_mm, of_torch
from cofire.bench.peers._products import Product, clear_of_halves, exact, half, reference
from cofire.ops.lowbit import _dequantize_reference, int8_activations, qlinear
from cofire.ops.qtensor import QTensor
from cofire.ops.quantizers import NF4, quantize_weight
from cofire.ops.shift_add import pack_shift, shift_from_weight, shift_quantize
from cofire.registry import OPERATORS, Kernel

FLOAT, HALF, FP16 = torch.float32, torch.bfloat16, torch.float16
SQUARE, TALL, TINY = (4096, 4096), (11008, 4096), (96, 256)
#: An 8-bit palette like those that clustering finds: denser in the middle.
PALETTE = tuple(round(127 * (abs(i) / 8) ** 1.3 * (1 if i > 0 else -1)) for i in range(-8, 9) if i)

Providers = dict[str, Provider | Mapping[str, Provider]]


@functools.lru_cache(maxsize=2)
def weight(shape: tuple[int, int], bits: int, group_size: int | None, format: str) -> QTensor:
    """Kept for the cases that follow: making one takes seconds."""
    rows, columns = shape
    group_size = group_size or columns
    w = Random(f"weight {shape} {bits} {group_size} {format}").normal(rows, columns).mul_(0.02)
    if format in ("S4", "S5"):  # powers of two
        return pack_shift(*shift_quantize(*shift_from_weight(w)), format=format)
    if format in ("uniform", "minmax"):
        q = quantize_weight(w, "absmax" if format == "uniform" else "minmax", bits=bits, group_size=group_size)
        scale = q.scales()
        assert scale is not None
        return q.replace(scale=scale.to(HALF))
    table = torch.tensor(NF4 if format == "nf4" else PALETTE)
    scale = (w.view(rows, -1, group_size).abs().amax(2) / table.abs().max()).to(HALF)
    edges = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(w.view(rows, -1, group_size) / scale[:, :, None].float(), edges.float())
    lut = table[None].float() if format == "nf4" else table[None].to(torch.int8)
    return QTensor.from_codes(codes.view(shape), scale, bits=bits, group_size=group_size, lut=lut)


def _parts(q: QTensor) -> tuple[Any, ...]:
    return q.codes, q.scale, q.zero, q.offset, q.lut


def _dense_weight(q: Args, columns: int) -> Tensor:
    """fp32, by our own kernel, which is exact and fast: what a dense provider does before its first call."""
    w: Tensor = OPERATORS["dequantize"](*q, columns)
    return w


# --------------------------------------------------------------------------------------------------- qlinear


def _decoded_weight(*args: Any) -> Tensor:
    p = Product(*args)
    return _dense_weight((*p[1:6], p.bits, p.group_size), p.shape[1])


def _eager(*args: Any) -> Tensor:
    """Unpacked, decoded, multiplied, all at each call."""
    p = Product(*args)
    w = _dequantize_reference(*p[1:6], p.bits, p.group_size, p.shape[1]).to(p.input.dtype)
    x = p.input
    if p.activations == "int8":
        codes, scale = int8_activations(x)
        x = (codes * scale).to(x.dtype)
    return F.linear(x, w)


def _cuda(*args: Any) -> Tensor:
    kernel = OPERATORS["qlinear"].cuda
    assert isinstance(kernel, Kernel)
    found: Tensor = kernel.launch(*args)
    return found


def _has_fp16(rows: int) -> bool:
    """Whether products in float16 are worth trying, as :func:`has_half` says of bfloat16."""
    return rows <= 4 or torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _is_fast(dtype: torch.dtype, rows: int) -> bool:
    """Whether torch multiplies in this dtype in a reasonable time."""
    return dtype == FLOAT or (has_half(rows) if dtype == HALF else _has_fp16(rows))


def _dense_providers(
    dtype: torch.dtype, bits: int, activations: str, rows: int, half_too: bool = False
) -> dict[str, Provider]:
    """fp32 for all inputs, float16 for its own; bfloat16 where the input is, or is rounded anyway, or where it is asked for."""
    rounds = activations != "exact"
    found = dense_products(
        _decoded_weight,
        rows,
        bits / 8,
        dtype == HALF or rounds or half_too,
        exact=exact if rounds else None,
        rounded=half if rounds or dtype != HALF else None,
    )
    if dtype == FP16 and _has_fp16(rows):
        found["fp16"] = Provider(plainly(_decoded_weight, FP16), expansion=16 / bits)
    return found


def _args(
    rand: Random, shape: tuple[int, int], rows: int, bits: int, group_size: int | None, dtype: torch.dtype,
    activations: str, format: str,
) -> Args:  # fmt: skip
    q = weight(shape, bits, group_size, format)
    x = rand.normal(rows, shape[1])
    if activations == "int8":
        x = clear_of_halves(x, tuple(size for size in (32, 128) if shape[1] % size == 0))
    return (x.to(dtype), *_parts(q), None, q.bits, q.group_size, activations)


def qlinear_case(
    rows: int,
    bits: int = 4,
    group_size: int | None = 128,
    *,
    shape: tuple[int, int] = SQUARE,
    dtype: torch.dtype = FLOAT,
    activations: str = "exact",
    format: str = "uniform",
    compile: bool = False,
    cold: bool = True,
    dense_half: bool = False,
    **options: Any,
) -> Case:
    """``dense_half``: a product in bfloat16 is among the dense ones though the input is exact and of another dtype; those of
    fp32 then have a row of their own."""
    dense = _dense_providers(dtype, bits, activations, rows, dense_half)
    if activations == "int8" and bits == 8 and group_size is None:
        dense["int_mm"] = Provider(int_mm, differentiable=False)
    providers: Providers = {"dense": dense}
    same = {name: provider for name, provider in dense.items() if name.startswith("fp32")}
    if activations == "exact" and dtype == FLOAT and len(same) < len(dense):
        providers[SAME_DTYPE] = same
    if _is_fast(dtype, rows):
        providers["eager"] = plain(_eager, hot=True)
    if compile:
        providers["compile"] = compiled(_eager)
    providers |= of_torch(bits, group_size, dtype, activations, format, rows)
    if bits == 4 and rows <= 8 and format != "nf4" and (dtype == HALF or activations == "int8"):
        # our own CUDA C++, which the dispatcher leaves to Triton until a GPU has compared them
        providers["peer:cofire CUDA C++"] = plain(_cuda, devices=("cuda",), differentiable=False)
    kind = {"uniform": f"{bits} bits", "minmax": f"{bits} bits with zero points", "palette": "palette of 16 bytes"}
    kind |= {"S4": "shifts of 4 bits", "S5": "shifts of 5 bits"}
    words = [f"{shape[0]}x{shape[1]}", kind.get(format, format)]
    words += [] if format in ("S4", "S5") else [f"g{group_size}" if group_size else "by rows"]
    words += ["int8 activations"] if activations == "int8" else []
    tiny_group = None if group_size is None else min(group_size, 128)

    def tiny(rand: Random) -> Args:
        return _args(rand, TINY, min(rows, 7), bits, tiny_group, dtype, activations, format)

    return Case(
        "qlinear",
        f"M{rows} {' '.join(words)}",
        dtype,
        lambda rand: _args(rand, shape, rows, bits, group_size, dtype, activations, format),
        providers,
        tiny,
        cold=((1,) if format == "S5" else (1, 2)) if cold else (),
        hot=compile or bool(options.get("first")),
        reference=reference,
        ours=Provider(_ours),
        arithmetic="int8" if activations == "int8" else None,
        facts={"rows": rows, "bits": bits, "group_size": group_size, "format": format, "activations": activations},
        **options,
    )


def _ours(*args: Any) -> Run:
    """As users call it: with a weight that is checked once, when it is made."""
    p = Product(*args)
    q = QTensor(p.codes, p.scale, p.shape, p.bits, p.group_size, p.zero, p.offset, p.lut)
    return functools.partial(qlinear, p.input, q, p.bias, activations=p.activations)


def _int8(rows: int, *args: Any, **options: Any) -> Case:
    return qlinear_case(rows, *args, activations="int8", **options)


def _exact(rows: int, *args: Any, **options: Any) -> Case:
    return qlinear_case(rows, *args, dense_half=True, **options)


# Ordered by weight, which is made once for its neighbours.
INTEGERS = [
    *(_int8(m, quick=m == 1, first=m == 1, overhead=m == 1, compile=m == 32) for m in (1, 4, 8, 16, 32, 64, 256)),
    *(_int8(m, dtype=HALF) for m in (1, 64)),
    *(_int8(m, group_size=32, first=m == 1) for m in (1, 4, 8, 16, 32, 64, 256)),
    _int8(64, format="minmax"),
    *(_int8(m, 2, first=m == 1) for m in (1, 64)),
    *(_int8(m, 3, first=m == 1) for m in (1, 64)),
    *(_int8(m, 8, first=m == 1) for m in (1, 64)),
    *(_int8(m, 8, None) for m in (1, 32)),
    *(_int8(m, format="palette", first=m == 1) for m in (1, 16, 64, 256)),
    *(_int8(m, shape=TALL, first=m == 1) for m in (1, 16, 256)),
]
EXACT = [
    *(_exact(m, quick=m == 1, first=m == 1, compile=m == 16) for m in (1, 4, 16, 32, 64, 256)),
    *(_exact(m, dtype=HALF, first=m == 1) for m in (1, 4, 16, 32, 64, 256)),
    *(_exact(m, dtype=FP16) for m in (1, 16, 64)),
    *(_exact(m, group_size=32, dtype=HALF) for m in (4, 16, 32, 64, 256)),
    _exact(1, 2),
    _exact(64, 3),
    _exact(1, 8),
    *(_exact(m, 8, None, dtype=HALF) for m in (1, 32)),
    *(_exact(m, 4, 64, format="nf4", first=m == 1) for m in (1, 16, 256)),
    _exact(1, 4, 64, format="nf4", dtype=HALF),
    *(_exact(m, dtype=HALF, shape=TALL) for m in (4, 16, 64, 256)),
]

# -------------------------------------------------------------------------------------------------- training


def _scaled(*args: Any) -> Run:
    """Levels decoded beforehand; scales, which are trained, multiply them at every call."""
    p = Product(*args)
    with torch.no_grad():
        levels = _dense_weight((p.codes, None, p.zero, None, p.lut, p.bits, p.group_size), p.shape[1])
    levels = levels.view(p.shape[0], -1, p.group_size)

    def run() -> Tensor:
        w = (levels * p.scale.to(levels.dtype)[:, :, None]).view(p.shape)
        return F.linear(p.input, w.to(p.input.dtype))

    return run


def _gradients_of_scales(rows: int, dtype: torch.dtype, **options: Any) -> Case:
    """Both of the input and of the scales, which are fp32 as trained parameters are."""

    def args(rand: Random, shape: tuple[int, int], rows: int) -> Args:
        made = _args(rand, shape, rows, 4, 128, dtype, "exact", "uniform")
        return (*made[:2], made[2].float(), *made[3:])

    return Case(
        "qlinear",
        f"M{rows} {SQUARE[0]}x{SQUARE[1]} 4 bits g128, trained scales",
        dtype,
        lambda rand: args(rand, SQUARE, rows),
        {"dense": {"levels": Provider(_scaled)}, "eager": plain(_eager)},
        lambda rand: args(rand, TINY, min(rows, 7)),
        gradients=(0, 2),
        facts={"rows": rows, "bits": 4, "group_size": 128, "format": "uniform", "activations": "exact"},
        backward_cost=lambda *args: (2 * OPERATORS["qlinear"].bytes(*args), 4 * args[0].numel() * args[1].shape[0]),  # type: ignore[misc]
        **options,
    )


def _backward_weight(args: Args) -> Tensor:
    return _dense_weight((*args[2:7], args[7], args[8]), args[9])


def _dense_backward(dtype: torch.dtype) -> Callable[..., Run]:
    def setup(*args: Any) -> Run:
        grad, w = args[0], _backward_weight(args).to(dtype)
        return lambda: (grad.to(dtype) @ w).to(grad.dtype)

    return setup


def _decode_and_multiply(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The weight decoded by our fast operator at each call, then a library's product: what backward must not lose to."""

    def call(*args: Any) -> Tensor:
        grad: Tensor = args[0]
        return (grad.to(dtype) @ _backward_weight(args).to(dtype)).to(grad.dtype)

    return call


def _eager_backward(*args: Any) -> Tensor:
    grad: Tensor = args[0]
    w = _dequantize_reference(*args[2:10])
    return grad @ w.to(grad.dtype)


def _backward(rows: int, dtype: torch.dtype = FLOAT, shape: tuple[int, int] = SQUARE, **options: Any) -> Case:
    """The gradient of the input alone: training on a frozen weight."""

    def args(rand: Random, shape: tuple[int, int], rows: int) -> Args:
        q = weight(shape, 4, 128, "uniform")
        grad = rand.normal(rows, shape[0]).to(dtype)
        return (grad, None, *_parts(q), q.bits, q.group_size, shape[1], "exact", True)

    dense = {"fp32": Provider(_dense_backward(FLOAT), outputs=1, expansion=8)}
    decoding = {"fp32": plain(_decode_and_multiply(FLOAT), outputs=1)}
    providers: Providers = {"dense": dense, "peer:dequantize-then-dense": decoding}
    if dtype == HALF and has_half(rows):
        dense["bf16"] = Provider(_dense_backward(HALF), outputs=1, expansion=4)
        decoding["bf16"] = plain(_decode_and_multiply(HALF), outputs=1)
    if dtype != HALF or has_half(rows):
        providers["eager"] = plain(_eager_backward, outputs=1, hot=True)
    return Case(
        "qlinear_backward",
        f"M{rows} {shape[0]}x{shape[1]} 4 bits g128, gradient of the input",
        dtype,
        lambda rand: args(rand, shape, rows),
        providers,
        lambda rand: args(rand, TINY, min(rows, 7)),
        cold=(2, 3),
        **options,
    )


def _dense_lora(dtype: torch.dtype) -> Callable[..., Run]:
    def setup(*args: Any) -> Run:
        x, codes, scale, zero, offset, lut, _, a, b, alpha, bits, group_size = args
        with torch.no_grad():
            w = _dense_weight((codes, scale, zero, offset, lut, bits, group_size), x.shape[1]).to(dtype)

        def run() -> Tensor:
            wide = x.to(dtype)
            low = F.linear(wide, a.to(dtype))
            return torch.add(F.linear(wide, w), F.linear(low, b.to(dtype)), alpha=alpha).to(x.dtype)

        return run

    return setup


def _eager_lora(*args: Any) -> Tensor:
    x, codes, scale, zero, offset, lut, _, a, b, alpha, bits, group_size = args
    w = _dequantize_reference(codes, scale, zero, offset, lut, bits, group_size, x.shape[1])
    y: Tensor = F.linear(x, w.to(x.dtype)) + alpha * F.linear(F.linear(x, a), b)
    return y


def _lora_backward_cost(input: Tensor, codes: Tensor, *rest: Any) -> tuple[int, int]:
    """The weight has no gradient: one product with it for that of the input; the low-rank term's factors each have theirs."""
    operator = OPERATORS["qlora_linear"]
    assert operator.bytes is not None
    assert operator.flops is not None
    frozen = 2 * input.numel() * codes.shape[0]
    moved = operator.bytes(input, codes, *rest) + input.numel() * input.element_size()
    return moved, 2 * operator.flops(input, codes, *rest) - frozen


def _lora(
    rows: int, dtype: torch.dtype = FLOAT, format: str = "nf4", shape: tuple[int, int] = SQUARE, **options: Any
) -> Case:
    """As QLoRA trains: nf4 in blocks of 64, rank 16."""
    rank = 16

    def args(rand: Random, shape: tuple[int, int], rows: int) -> Args:
        q = weight(shape, 4, 64, format)
        a = rand.normal(rank, shape[1]).mul_(shape[1] ** -0.5).to(dtype)
        b = rand.normal(shape[0], rank).mul_(0.02).to(dtype)
        return (rand.normal(rows, shape[1]).to(dtype), *_parts(q), None, a, b, 2.0, q.bits, q.group_size)

    dense = {"fp32": Provider(_dense_lora(FLOAT), outputs=1)}
    providers: Providers = {"dense": dense}
    if dtype == HALF and has_half(rows):
        dense["bf16"] = Provider(_dense_lora(HALF), outputs=1)
    if dtype != HALF or has_half(rows):
        providers["eager"] = plain(_eager_lora, outputs=1)
    return Case(
        "qlora_linear",
        f"M{rows} {shape[0]}x{shape[1]} {format} g64 rank {rank}",
        dtype,
        lambda rand: args(rand, shape, rows),
        providers,
        lambda rand: args(rand, TINY, min(rows, 7)),
        gradients=(0, 7, 8),
        backward_cost=_lora_backward_cost,
        **options,
    )


TRAINING = [
    *(_backward(m, quick=m == 16, overhead=m == 16) for m in (16, 256)),
    *(_backward(m, HALF) for m in (16, 256)),
    _backward(256, HALF, TALL),
    _gradients_of_scales(256, FLOAT),
    _lora(16, quick=True),
    _lora(256, overhead=True),
    _lora(256, HALF),
]

# ------------------------------------------------------------------------------------------------- dequantize


def _finish(levels: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """In place: levels ``[N, K]`` in fp32 become the weight."""
    w = levels.view(levels.shape[0], -1, group_size)
    if zero is not None:
        w.sub_(zero.to(w.dtype)[:, :, None])
    return w.mul_(scale.to(w.dtype)[:, :, None]).view(levels.shape)


def _by_shifts(
    codes: Tensor, scale: Tensor, zero: Tensor | None, offset: None, lut: Tensor | None, bits: int, group_size: int,
    columns: int,
) -> Tensor:  # fmt: skip
    """Of bits that divide a byte: each field with its shift, straight to its place."""
    if lut is not None:
        q = torch.stack([(codes >> s) & ((1 << bits) - 1) for s in range(0, 8, bits)], 2).view(len(codes), columns)
        return _finish(lut[0].float().index_select(0, q.view(-1).int()).view(q.shape), scale, zero, group_size)
    levels = torch.empty(len(codes), codes.shape[1], 8 // bits, device=codes.device)
    for i in range(8 // bits):
        levels[:, :, i] = (codes >> (bits * i)) & ((1 << bits) - 1) if bits < 8 else codes
    return _finish(levels.view(len(codes), columns), scale, zero, group_size)


def _by_bytes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, offset: None, lut: Tensor | None, bits: int, group_size: int,
    columns: int,
) -> Tensor:  # fmt: skip
    """A table of what each byte decodes to."""
    byte = torch.arange(256, device=codes.device)
    fields = torch.stack([(byte >> s) & ((1 << bits) - 1) for s in range(0, 8, bits)], 1)
    table = fields.float() if lut is None else lut[0].float()[fields]
    return _finish(F.embedding(codes.int(), table).view(len(codes), columns), scale, zero, group_size)


def _dequantize(
    bits: int, group_size: int = 128, format: str = "uniform", shape: tuple[int, int] = SQUARE, **options: Any
) -> Case:
    def args(shape: tuple[int, int]) -> Args:
        q = weight(shape, bits, group_size, format)
        return (*_parts(q), q.bits, q.group_size, shape[1])

    eager = plain(_dequantize_reference)
    dense = {"eager": eager}
    if 8 % bits == 0:
        dense |= {"shifts": plain(_by_shifts), "bytes": plain(_by_bytes)}
    return Case(
        "dequantize",
        f"{shape[0]}x{shape[1]} {format if format == 'nf4' else f'{bits} bits'} g{group_size}",
        FLOAT,
        lambda rand: args(shape),
        {"dense": dense, "eager": eager},
        lambda rand: args(TINY),
        **options,
    )


DEQUANTIZE = [
    _dequantize(4, quick=True, overhead=True),
    _dequantize(2),
    _dequantize(3, gradients=(1,)),
    _dequantize(8),
    _dequantize(4, 64, "nf4"),
]

CASES = [*INTEGERS, *EXACT, *TRAINING, *DEQUANTIZE, *FAKE]
