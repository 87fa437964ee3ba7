# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of masked and compressed weights: linear layers and convolutions, normal, masks at random.

``dense`` is the product with all weights, pruned ones as zeros, in the best dtype, ``peer:dense fp32`` the same in the dtype
of an input in fp32; ``peer:torch csr`` is torch's own CSR with 32-bit indices (MKL on x86), ``peer:torch bsr`` its blocks; the
layers of other libraries are in :mod:`cofire.bench.peers`. ``eager`` is the mask multiplied at every call, as pruning is
usually written; of masked layers ``dense`` is the fastest way to write it, and a layer without a mask a bound.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.bench import sparse_refine, sparse_step, sparse_training
from cofire.bench.cases import Args, Case, Provider, Random, Run, plain
from cofire.bench.dense_products import FLOAT, HALF, SAME_DTYPE, dense_products, in_half
from cofire.ops.packing import pack_bits, unpack_bits
from cofire.ops.sparse import SparseWeight, spmm
from cofire.ops.sparse_weight import dense_values

SQUARE, TRAINED = (4096, 4096), (2048, 2048)


@functools.lru_cache(maxsize=2)
def _weight(
    shape: tuple[int, int], density: float, format: str, block: tuple[int, int], pattern: str, dtype: torch.dtype
) -> SparseWeight:
    rand = Random(f"{shape} {density} {format} {block} {pattern}")
    w = rand.normal(*shape)
    if pattern == "2:4":
        mask = torch.zeros(shape, dtype=torch.bool).view(shape[0], -1, 4)
        mask.scatter_(2, rand.uniform(shape[0], shape[1] // 4, 4).topk(2, 2).indices, True)
        mask = mask.view(shape)
    elif format == "block":
        mask = rand.mask(shape[0] // block[0], shape[1] // block[1], density)
        mask = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    else:
        mask = rand.mask(*shape, density)
    return SparseWeight.from_dense(w, mask, format, block=block, values=dtype)


def _dense_weight(*args: Any) -> Tensor:
    """In fp32: what a dense provider makes before its first call."""
    return dense_values(*(*args[2:11], FLOAT))


def _in_half(*args: Any) -> Tensor:
    """What a dense product in bfloat16 computes of an input in fp32."""
    return in_half(args[0], _dense_weight(*args))


def _torch_csr(*args: Any) -> Run:
    """Indices of 32 bits: with torch's default of 64 it is several times slower."""
    x, _, values, index, offsets, _, _, rows, columns, *_ = args
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        w = torch.sparse_csr_tensor(offsets.int(), index.int(), values.float(), size=(rows, columns))
    return lambda: torch.mm(w, x.t()).t()


def _torch_bsr(*args: Any) -> Run:
    x, _, values, index, offsets, _, _, rows, columns, *_ = args
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        w = torch.sparse_bsr_tensor(
            offsets.int(), index.int(), values.transpose(1, 2).contiguous(), size=(rows, columns)
        )
    return lambda: torch.mm(w, x.t()).t()


def _spmm(
    rows: int,
    density: float,
    format: str,
    *,
    block: tuple[int, int] = (16, 1),
    shape: tuple[int, int] = SQUARE,
    dtype: torch.dtype = FLOAT,
    values: torch.dtype | None = None,
    pattern: str = "",
    backward: bool = False,
    **options: Any,
) -> Case:
    values = values or dtype

    def args(rand: Random, shape: tuple[int, int], rows: int) -> Args:
        w = _weight(shape, density, format, block, pattern, values)
        return (rand.normal(rows, shape[1]).to(dtype), None, *w.arguments())

    stored = density * values.itemsize + {"csr": 2 * density, "delta": density, "bitmap": 0.125}.get(format, 0.0)
    dense = dense_products(_dense_weight, rows, stored, True, rounded=_in_half if dtype == FLOAT else None)
    if backward:
        dense = {"fp32": Provider(_trained_dense)}
    providers: dict[str, Any] = {"dense": dense}
    same = {name: provider for name, provider in dense.items() if name.startswith("fp32")}
    if dtype == FLOAT and len(same) < len(dense):
        providers[SAME_DTYPE] = same
    if dtype == FLOAT and values == FLOAT and not backward:
        if format == "csr":
            providers["peer:torch csr"] = Provider(_torch_csr, differentiable=False, expansion=8 / 6)
        elif format == "block" and block[0] == block[1]:
            providers["peer:torch bsr"] = Provider(_torch_bsr, differentiable=False)
    kind = f"{block[0]}x{block[1]} blocks" if format == "block" else format
    words = [f"M{rows}", f"{shape[0]}x{shape[1]}", pattern or f"{round(100 * (1 - density))} %", kind]
    words += ["int8 values"] if values == torch.int8 else []
    return Case(
        "spmm",
        " ".join(words),
        dtype,
        lambda rand: args(rand, shape, rows),
        providers,
        lambda rand: args(rand, (64, 96), min(rows, 7)),
        cold=() if backward else (2, 3),
        hot=bool(options.get("quick")),
        gradients=(0, 2) if backward else (),
        ours=Provider(_ours),
        facts={
            "rows": rows,
            "density": density,
            "format": format,
            "values": values,
            "pattern": pattern,
            "backward": backward,
        },
        **options,
    )


def _ours(*args: Any) -> Run:
    """As users call it: with a weight that is checked once, when it is made."""
    x, bias, values, index, offsets, scale, format, rows, columns, *block = args
    w = SparseWeight(values, index, offsets, (rows, columns), format, (block[0], block[1]), scale)
    return functools.partial(spmm, x, w, bias)


def _trained_dense(*args: Any) -> Run:
    """A dense layer whose weight is made beforehand: of the gradient of the values, the product is dense."""
    x, _, values, index, offsets, scale, *rest = args
    w = dense_values(*(values.detach(), index, offsets, scale, *rest, FLOAT))
    row = torch.repeat_interleave(torch.arange(rest[1], device=x.device), offsets.diff())

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return F.linear(x, w)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            (x,) = ctx.saved_tensors
            return grad @ w, (grad.t() @ x)[row, index.long()]

    return lambda: Layer.apply(x, values)


# ---------------------------------------------------------------------------------------------------- sddmm


def _sampled_addmm(*args: Any) -> Run:
    grad, x, index, offsets, *_ = args
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pattern = torch.sparse_csr_tensor(
            offsets.int(),
            index.int(),
            torch.zeros(index.numel(), device=index.device),
            size=(grad.shape[1], x.shape[1]),
        )
    return lambda: torch.sparse.sampled_addmm(pattern, grad.t(), x, beta=0.0).values()


def _dense_then_taken(*args: Any) -> Run:
    grad, x, index, offsets, *_ = args
    row = torch.repeat_interleave(torch.arange(grad.shape[1], device=x.device), offsets.diff())
    column = index.long()
    return lambda: (grad.t() @ x)[row, column]


def _sddmm(rows: int, density: float, shape: tuple[int, int] = TRAINED, **options: Any) -> Case:
    def args(rand: Random, shape: tuple[int, int], rows: int) -> Args:
        w = _weight(shape, density, "csr", (16, 1), "", FLOAT)
        return rand.normal(rows, shape[0]), rand.normal(rows, shape[1]), w.index, w.offsets, "csr", 1, 1

    return Case(
        "sddmm",
        f"M{rows} {shape[0]}x{shape[1]} {round(100 * (1 - density))} %",
        FLOAT,
        lambda rand: args(rand, shape, rows),
        {
            "dense": Provider(_dense_then_taken, differentiable=False),
            "peer:torch sampled_addmm": Provider(_sampled_addmm, differentiable=False),
        },
        lambda rand: args(rand, (64, 96), min(rows, 7)),
        **options,
    )


# ---------------------------------------------------------------------------------------------------- masks


def _masked(shape: tuple[int, ...], rand: Random) -> tuple[Tensor, Tensor]:
    mask = rand.mask(shape[0], shape[1], 0.5)
    return torch.where(mask, rand.normal(*shape), 0.0), pack_bits(mask.to(torch.uint8), 1)


def _bool_mask(bits: Tensor, columns: int) -> Tensor:
    return unpack_bits(bits, 1, columns).bool()


def _multiply(weight: Tensor, bits: Tensor) -> Run:
    """As pruning is usually written: a product with a mask of bool."""
    mask = _bool_mask(bits, weight.shape[1])
    return lambda: weight * mask


def _where(weight: Tensor, bits: Tensor) -> Run:
    mask = _bool_mask(bits, weight.shape[1])
    return lambda: torch.where(mask, weight, 0.0)


def _multiply_floats(weight: Tensor, bits: Tensor) -> Run:
    """A mask of floats: four times the memory, and the fastest product."""
    mask = _bool_mask(bits, weight.shape[1]).to(weight.dtype)
    return lambda: weight * mask


def _apply_mask(dtype: torch.dtype, shape: tuple[int, int] = SQUARE) -> Case:
    def args(rand: Random, shape: tuple[int, int]) -> Args:
        w, bits = _masked(shape, rand)
        return w.to(dtype), bits

    return Case(
        "apply_mask",
        f"{shape[0]}x{shape[1]} 50 %",
        dtype,
        lambda rand: args(rand, shape),
        {
            "eager": Provider(_multiply),
            "dense": {"where": Provider(_where), "mask of floats": Provider(_multiply_floats)},
        },
        lambda rand: args(rand, (17, 65)),
        quick=dtype == FLOAT,
    )


def _linear_with_mask(input: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, *rest: Any) -> Run:
    mask = _bool_mask(bits, weight.shape[1])
    return lambda: F.linear(input, weight * mask, bias)


def _linear_where(input: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, *rest: Any) -> Run:
    mask = _bool_mask(bits, weight.shape[1])
    return lambda: F.linear(input, torch.where(mask, weight, 0.0), bias)


def _linear_by_floats(input: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, *rest: Any) -> Run:
    """A mask of floats: four times the memory, and the faster product."""
    mask = _bool_mask(bits, weight.shape[1]).to(weight.dtype)
    return lambda: F.linear(input, weight * mask, bias)


def _linear_in_place(input: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, mode: str, *rest: Any) -> Run:
    """No tensor is made but the results: the masked weight lies in memory that is there, its gradient is masked in place.

    Where pruned weights are zero already ("invariant") it is the weight itself, and the gradient alone is masked.
    """
    mask = _bool_mask(bits, weight.shape[1]).to(weight.dtype)
    held = weight.detach() if mode == "invariant" else torch.empty_like(weight, requires_grad=False)

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            if mode != "invariant":
                torch.mul(w, mask, out=held)
            ctx.save_for_backward(x)
            return F.linear(x, held, bias)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            (x,) = ctx.saved_tensors
            return grad @ held, (grad.t() @ x).mul_(mask)

    return lambda: Layer.apply(input, weight)


def _without_mask(input: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, *rest: Any) -> Run:
    """The plain layer, whose gradients of pruned weights are not zero: what masking is to cost nothing over."""
    return lambda: F.linear(input, weight, bias)


def _plain_layer(input: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return F.linear(input, weight, bias)


def _masked_linear(rows: int, mode: str, shape: tuple[int, int] = SQUARE, **options: Any) -> Case:
    def args(rand: Random, shape: tuple[int, int], rows: int) -> Args:
        w, bits = _masked(shape, rand)
        return rand.normal(rows, shape[1]), w, bits, None, mode, 0.0

    return Case(
        "masked_linear",
        f"M{rows} {shape[0]}x{shape[1]} 50 %, {mode}",
        FLOAT,
        lambda rand: args(rand, shape, rows),
        {
            "eager": Provider(_linear_with_mask),
            "dense": {
                "where": Provider(_linear_where),
                "mask of floats": Provider(_linear_by_floats),
                "in place": Provider(_linear_in_place),
            },
            "peer:plain layer": Provider(_without_mask, reference=_plain_layer),
        },
        lambda rand: args(rand, (17, 65), min(rows, 7)),
        gradients=(0, 1),
        **options,
    )


# ---------------------------------------------------------------------------------------------- convolution


def _dense_conv(channels_last: bool) -> Callable[..., Run]:
    def setup(*args: Any) -> Run:
        x, bias, *_ = args
        kernel_size, stride, padding, dilation, groups = args[11:16]
        w = _dense_weight(*args).to(x.dtype).view(args[7], -1, *kernel_size)
        if channels_last:
            x, w = x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)
        return lambda: F.conv2d(x, w, bias, stride, padding, dilation, groups)

    return setup


def _maps_last(x: Tensor, *rest: Any) -> Args:
    return (x.contiguous(memory_format=torch.channels_last), *rest)


def _trained_conv(*args: Any) -> Run:
    """A dense layer whose weight is made beforehand, laid out as the maps are: of the gradient of the values, all is computed."""
    x, bias, values, index, offsets, scale, *rest = args
    kernel_size, stride, padding, dilation, groups = args[11:16]
    rows = rest[1]
    w = (
        dense_values(*(values.detach(), index, offsets, scale, *rest[:5], FLOAT))
        .to(x.dtype)
        .view(rows, -1, *kernel_size)
    )
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        w = w.contiguous(memory_format=torch.channels_last)
    row = torch.repeat_interleave(torch.arange(rows, device=x.device), offsets.diff())
    geometry = (stride, padding, dilation, False, [0, 0], groups)

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return F.conv2d(x, w, bias, stride, padding, dilation, groups)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            (x,) = ctx.saved_tensors
            to_x, to_w, _ = torch.ops.aten.convolution_backward(grad, x, w, None, *geometry, [True, True, False])
            return to_x, to_w.reshape(rows, -1)[row, index.long()]

    return lambda: Layer.apply(x, values)


def _decoded_conv(*args: Any) -> Tensor:
    """The weight decoded at every call, so that its values get gradients."""
    x, bias, *_ = args
    kernel_size, stride, padding, dilation, groups = args[11:16]
    w = _dense_weight(*args).to(x.dtype).view(args[7], -1, *kernel_size)
    return F.conv2d(x, w, bias, stride, padding, dilation, groups)


def _conv(batch: int, channels: int, size: int, density: float, kernel: int = 3, **options: Any) -> Case:
    def args(rand: Random, channels: int, size: int, batch: int) -> Args:
        w = _weight((channels, channels * kernel * kernel), density, "csr", (16, 1), "", FLOAT)
        window = [[kernel, kernel], [1, 1], [kernel // 2, kernel // 2], [1, 1], 1]
        return (rand.normal(batch, channels, size, size), None, *w.arguments(), *window)

    dense = {
        "plain": Provider(_dense_conv(False), differentiable=False),
        "channels_last": Provider(_dense_conv(True), differentiable=False),
    }
    if options.get("gradients"):
        dense = {"plain": Provider(_trained_conv), "channels_last": Provider(_trained_conv, _maps_last)}
    return Case(
        "sparse_conv2d",
        f"B{batch} {channels}x{size}x{size} {kernel}x{kernel} {round(100 * (1 - density))} %",
        FLOAT,
        lambda rand: args(rand, channels, size, batch),
        {
            "dense": dense,
            "eager": plain(_decoded_conv),
        },
        lambda rand: args(rand, 8, 7, 2),
        facts={"batch": batch, "density": density, "kernel": kernel},
        **options,
    )


CASES = [
    *(_spmm(1, d, "bitmap", quick=d == 0.5) for d in (0.5, 0.3, 0.1)),
    *(_spmm(1, d, "delta") for d in (0.3, 0.1, 0.05)),
    *(_spmm(1, d, "csr", overhead=d == 0.1, quick=d == 0.1) for d in (0.5, 0.3, 0.1, 0.05)),
    *(_spmm(1, d, "block") for d in (0.5, 0.1)),
    *(_spmm(1, d, "bitmap", dtype=HALF) for d in (0.5, 0.3, 0.1)),
    *(_spmm(1, d, "delta", dtype=HALF) for d in (0.5, 0.3, 0.1)),
    _spmm(1, 0.5, "bitmap", dtype=HALF, pattern="2:4"),
    _spmm(1, 0.5, "bitmap", values=torch.int8),
    *(_spmm(m, 0.1, "csr", dtype=HALF) for m in (1, 256, 512)),
    *(_spmm(16, d, "csr") for d in (0.3, 0.1)),
    *(_spmm(m, d, "csr") for m in (256, 512) for d in (0.2, 0.1, 0.05)),
    *(_spmm(m, 0.1, "block", block=b) for m in (16, 256) for b in ((16, 1), (16, 16), (32, 32))),
    _spmm(512, 0.1, "csr", shape=TRAINED, backward=True),
    _sddmm(512, 0.1),
    _sddmm(64, 0.1, quick=True),
    *(_apply_mask(dtype) for dtype in (FLOAT, HALF)),
    *(_masked_linear(m, mode) for m in (64, 256) for mode in ("invariant", "hard")),
    _masked_linear(64, "invariant", TRAINED, quick=True),
    *(_conv(1, 256, 14, d, gradients=(0, 2) if d == 0.1 else (), quick=d == 0.1) for d in (0.2, 0.1)),
    _conv(8, 64, 56, 0.1),
    *sparse_training.CASES,
    *sparse_step.CASES,
    *sparse_refine.CASES,
]
