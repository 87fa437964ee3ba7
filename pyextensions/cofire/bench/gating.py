# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of dynamic channel gating, on layers of VGG, ResNet and MobileNet.

Masks are random and each sample has its own, as gates are. What the gate left out is zero in memory, so the dense
providers need not mask their input. A dense provider gets its best memory layout, and weights packed once by oneDNN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.bench.cases import Args, Case, Provider, Random, Run, compiled, plain
from cofire.bench.selection import compact_by_scan
from cofire.ops.gating import like_input, mask_from_index, to_compact, to_dense
from cofire.registry import OPERATORS

FLOAT, HALF = torch.float32, torch.bfloat16

# --------------------------------------------------------------------------------------------- gated_conv2d


@dataclass(frozen=True)
class Layer:
    """A convolution of a known network, on a batch."""

    batch: int
    in_channels: int
    out_channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    residual: bool = False

    def __str__(self) -> str:
        channels = str(self.in_channels)
        if self.out_channels != self.in_channels:
            channels += f"-{self.out_channels}"
        words = [f"B{self.batch} C{channels} {self.size}x{self.size}"]
        words += [f"{self.kernel}x{self.kernel}"] if self.kernel != 3 else []
        words += [f"stride {self.stride}"] if self.stride != 1 else []
        words += ["depthwise"] if self.groups != 1 else []
        words += ["residual"] if self.residual else []
        return " ".join(words)

    def shrunk(self) -> Layer:
        """The same layer, small."""
        low, high = (8, 8) if self.in_channels == self.out_channels else (6, 10)
        size = min(self.size, 7)
        groups = low if self.groups != 1 else 1
        return replace(self, batch=min(self.batch, 3), in_channels=low, out_channels=high, size=size, groups=groups)


def _compacted(mask: Tensor) -> tuple[Tensor, Tensor]:
    index, count = OPERATORS["compact"].reference(mask)
    return index, count


def _conv_args(rand: Random, layer: Layer, keep: float, dtype: torch.dtype, compact: bool = False) -> Args:
    n, ci, co, size, k = layer.batch, layer.in_channels, layer.out_channels, layer.size, layer.kernel
    in_mask = rand.mask(n, ci, keep)
    out_mask = in_mask if layer.groups != 1 else rand.mask(n, co, keep)  # a depthwise layer passes its gate on
    x = rand.normal(n, ci, size, size).relu_().mul_(in_mask[:, :, None, None]).to(dtype)
    fan_in = ci // layer.groups * k * k
    weight = (rand.normal(co, ci // layer.groups, k, k) * (2 / fan_in) ** 0.5).to(dtype)
    bias = rand.normal(co).to(dtype)
    pad = k // 2
    out = (size + 2 * pad - k) // layer.stride + 1
    residual = rand.normal(n, co, out, out).to(dtype) if layer.residual else None
    selection = (*_compacted(in_mask), *_compacted(out_mask))
    slots = 0
    if compact:
        slots = int(selection[3].max())
        x = to_compact(x, *selection[:2], int(selection[1].max()))
    geometry = ([layer.stride] * 2, [pad, pad], [1, 1], layer.groups)
    return (x, weight, bias, residual, *selection, *geometry, "relu", True, compact, slots)


def _conv_flops(*args: Any) -> int:
    """The multiplications and additions that the masks leave: for each sample, active outputs times active inputs."""
    x, weight, _, _, in_index, in_count, out_index, out_count, stride, padding, dilation, groups = args[:12]
    pixels = 1
    for i in (0, 1):
        reach = dilation[i] * (weight.shape[2 + i] - 1) + 1
        pixels *= (x.shape[2 + i] + 2 * padding[i] - reach) // stride[i] + 1
    ins = mask_from_index(in_index, in_count, in_index.shape[1]).view(x.shape[0], groups, -1).sum(2)
    outs = mask_from_index(out_index, out_count, out_index.shape[1]).view(x.shape[0], groups, -1).sum(2)
    pairs = int((ins * outs).sum())
    return 2 * pixels * int(weight[0, 0].numel()) * pairs


def _channels_last(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *rest: Any) -> Args:
    """The maps in channels_last; the weight follows, as ``module.to(memory_format=torch.channels_last)`` has it."""
    last = torch.channels_last
    if residual is not None:
        residual = residual.contiguous(memory_format=last)
    return (x.contiguous(memory_format=last), weight.contiguous(memory_format=last), bias, residual, *rest)


def _gate(index: Tensor, count: Tensor, channels: int, dtype: torch.dtype) -> Tensor | None:
    """The mask to multiply by, or None where every channel is kept."""
    mask = mask_from_index(index, count, channels)
    return None if bool(mask.all()) else mask.to(dtype)[:, :, None, None]


def _dense_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, _: Any, __: Any, index: Tensor, count: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, *rest: Any,
) -> Run:  # fmt: skip
    """Batch norm folded, everything after the convolution in place; no mask where every channel is kept."""
    gate = _gate(index, count, weight.shape[0], x.dtype)

    def run() -> Tensor:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        if residual is not None:
            y = y.add_(residual)
        return (y if gate is None else y.mul_(gate)).relu_()

    return run


def _packed_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, _: Any, __: Any, index: Tensor, count: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, *rest: Any,
) -> Run:  # fmt: skip
    """oneDNN with weights packed once and the activation fused: what a frozen ``torch.compile`` runs."""
    gate = _gate(index, count, weight.shape[0], x.dtype)
    onednn = torch.ops.mkldnn
    packed = onednn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(x.shape))
    geometry = (padding, stride, dilation, groups)

    def run() -> Tensor:
        if residual is None:
            y: Tensor = onednn._convolution_pointwise(x, packed, bias, *geometry, "relu", [], "")
        else:
            y = onednn._convolution_pointwise.binary(x, residual, packed, bias, *geometry, "add", 1.0, "relu", [], "")
        return y if gate is None else y.mul_(gate)

    return run


DENSE_CONV: dict[str, Provider] = {
    "contiguous": Provider(_dense_conv),
    "channels_last": Provider(_dense_conv, _channels_last),
    "packed": Provider(_packed_conv, differentiable=False, devices=("cpu",)),
    "packed channels_last": Provider(_packed_conv, _channels_last, differentiable=False, devices=("cpu",)),
}


def _eager_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, _: Any, __: Any, index: Tensor, count: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, *rest: Any,
) -> Run:  # fmt: skip
    """As published code has it: convolution, batch norm, activation, multiplication by the mask."""
    mask = mask_from_index(index, count, weight.shape[0]).to(x.dtype)[:, :, None, None]
    channels = torch.arange(1, weight.shape[0] + 1, device=x.device)
    scale = torch.exp2((channels % 3).float() - 1)  # a batch norm that folds to (weight, bias) without rounding
    eps = 2.0**-16  # var + eps is 1 to the bit; torch 2.11 refuses an eps of 0
    mean, var = torch.zeros_like(scale), torch.full_like(scale, 1 - eps)
    unfolded = (weight.float() / scale[:, None, None, None]).to(weight.dtype)
    shift = bias.float()  # parameters in fp32, as mixed precision keeps them

    def run() -> Tensor:
        y = F.conv2d(x, unfolded, None, stride, padding, dilation, groups)
        y = F.batch_norm(y, mean, var, scale, shift, training=False, eps=eps)
        if residual is not None:
            y = y + residual
        return F.relu(y) * mask

    return run


def _gather_loop(inputs: bool) -> Callable[..., Run]:
    """One convolution per sample, on its rows of the weight, or on its rows and columns."""

    def setup(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, in_index: Tensor, in_count: Tensor,
        index: Tensor, count: Tensor, *geometry: Any,
    ) -> Run:  # fmt: skip
        rows = [index[n, : count[n]].long() for n in range(x.shape[0])]
        columns = [in_index[n, : in_count[n]].long() for n in range(x.shape[0])]
        shape = [x.shape[0], weight.shape[0], *F.conv2d(x[:1], weight[:1], None, *geometry[:3]).shape[2:]]

        def run() -> Tensor:
            y = x.new_zeros(shape)
            for n, (out, ins) in enumerate(zip(rows, columns)):
                if inputs:
                    y[n, out] = F.conv2d(x[n, ins][None], weight[out[:, None], ins], bias[out], *geometry[:3])[
                        0
                    ].relu_()
                else:
                    y[n, out] = F.conv2d(x[n : n + 1], weight[out], bias[out], *geometry[:3])[0].relu_()
            return y

        return run

    return setup


def _grouped_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, in_index: Tensor, in_count: Tensor,
    index: Tensor, count: Tensor, stride: list[int], padding: list[int], dilation: list[int], *rest: Any,
) -> Run:  # fmt: skip
    """All samples in one convolution, a group for each, weights gathered; shorter samples are filled up."""
    n, co = index.shape
    sample = torch.arange(n, device=x.device)[:, None]
    # Slots beyond a sample's count take an input channel that is zero, and an output channel that is cut off.
    off = mask_from_index(in_index, in_count, in_index.shape[1]).int().argmin(1, keepdim=True)
    columns = in_index[:, : int(in_count.max())]
    columns = torch.where(columns < 0, off, columns.long())
    rows = index[:, : int(count.max())]
    rows = torch.where(rows < 0, co, rows.long())
    taken = rows.clamp(max=co - 1)

    def run() -> Tensor:
        weights = weight[taken[:, :, None], columns[:, None, :]].flatten(0, 1)
        maps = x[sample, columns].flatten(0, 1)[None]
        y = F.conv2d(maps, weights, bias[taken].flatten(), stride, padding, dilation, n).relu_()
        full = x.new_zeros((n, co + 1, *y.shape[2:]))
        full[sample, rows] = y.view(n, -1, *y.shape[2:])
        return full[:, :co]

    return run


def _shrunk(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *rest: Any) -> Args:
    """A physically smaller layer with as many channels as the gates keep on average, the same for every sample."""
    ins, outs = (max(1, round(float(rest[i].float().mean()))) for i in (1, 3))
    every = [torch.arange(k, dtype=torch.int32, device=x.device).expand(x.shape[0], k) for k in (ins, outs)]
    counts = [torch.full_like(rest[1], k) for k in (ins, outs)]
    selection = (every[0], counts[0], every[1], counts[1])
    smaller = (like_input(x[:, :ins], x), like_input(weight[:outs, :ins], weight), bias[:outs].contiguous(), None)
    return (*smaller, *selection, *rest[4:])


def _static_reference(*args: Any) -> Tensor:
    result: Tensor = OPERATORS["gated_conv2d"].reference(*_shrunk(*args))
    return result


def _static(provider: Provider) -> Provider:
    arrange = provider.arrange

    def shrink(*args: Any) -> Args:
        return arrange(*_shrunk(*args)) if arrange is not None else _shrunk(*args)

    return replace(provider, arrange=shrink, reference=_static_reference)


STATIC_CONV = {name: _static(provider) for name, provider in DENSE_CONV.items()}


def _compiled_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mask: Tensor, geometry: tuple[Any, ...]
) -> Tensor:
    y = F.conv2d(x, weight, bias, *geometry)
    return F.relu(y if residual is None else y + residual) * mask


def _compile_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, _: Any, __: Any, index: Tensor, count: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, *rest: Any,
) -> Run:  # fmt: skip
    mask = mask_from_index(index, count, weight.shape[0]).to(x.dtype)[:, :, None, None]
    geometry = (stride, padding, dilation, groups)
    return compiled(_compiled_conv).setup(x, weight, bias, residual, mask, geometry)


def _read_gradients(answer: tuple[Tensor, ...], args: Args) -> tuple[Tensor, ...]:
    """The input's gradient where a gate was open: the layer before discards the rest, and dense providers leave it."""
    if len(answer) == 1:
        return answer
    open_ = mask_from_index(args[4], args[5], args[0].shape[1])[:, :, None, None]
    return (answer[0], answer[1] * open_, *answer[2:])


def _conv(
    layer: Layer,
    keep: float,
    dtype: torch.dtype = FLOAT,
    *,
    naive: bool = False,
    compile: bool = False,
    backward: bool = False,
    cold: bool = False,
    quick: bool = False,
    **options: Any,
) -> Case:
    providers: dict[str, Provider | Mapping[str, Provider]] = {
        "dense": DENSE_CONV,
        "eager": Provider(_eager_conv, differentiable=False),
    }
    if compile:
        providers["compile"] = {
            "contiguous": Provider(_compile_conv),
            "channels_last": Provider(_compile_conv, _channels_last),
        }
    if layer.groups == 1 and not layer.residual and keep < 1:
        providers["peer:static-pruned"] = {k: replace(p, differentiable=False) for k, p in STATIC_CONV.items()}
        if naive:
            providers["peer:gather-out"] = Provider(_gather_loop(False), differentiable=False)
            providers["peer:gather-in-out"] = Provider(_gather_loop(True), differentiable=False)
            if layer.batch > 1:
                providers["peer:grouped"] = Provider(_grouped_conv, differentiable=False)
    return Case(
        "gated_conv2d",
        f"{layer} keep {keep:g}",
        dtype,
        lambda rand: _conv_args(rand, layer, keep, dtype),
        providers,
        lambda rand: _conv_args(rand, layer.shrunk(), max(keep, 0.5), dtype),
        gradients=(0, 1, 2) if backward else (),
        compared=_read_gradients,
        cold=(1,) if cold else (),
        hot=quick,
        quick=quick,
        flops=_conv_flops,
        **options,
    )


def _compact_conv(layer: Layer, keep: float, dtype: torch.dtype = FLOAT, **options: Any) -> Case:
    """Maps that hold only the active channels, on both sides; dense providers get the same layer with full maps."""

    def full(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *rest: Any) -> Args:
        in_index, in_count, groups = rest[0], rest[1], rest[7]
        dense = like_input(to_dense(x, in_index, in_count, weight.shape[1] * groups), x)
        return (dense, weight, bias, residual, *rest[:-2], False, 0)

    def reference(*args: Any) -> Tensor:
        result: Tensor = OPERATORS["gated_conv2d"].reference(*full(*args))
        return result

    def widened(provider: Provider) -> Provider:
        arrange = provider.arrange
        if arrange is None:
            return replace(provider, arrange=full, reference=reference)
        return replace(provider, arrange=lambda *args: arrange(*full(*args)), reference=reference)

    return Case(
        "gated_conv2d",
        f"{layer} keep {keep:g} compact maps",
        dtype,
        lambda rand: _conv_args(rand, layer, keep, dtype, compact=True),
        {"dense": {k: widened(p) for k, p in DENSE_CONV.items()}, "eager": widened(Provider(_eager_conv))},
        lambda rand: _conv_args(rand, layer.shrunk(), keep, dtype, compact=True),
        flops=_conv_flops,
        **options,
    )


KEEPS, FEW = (1, 0.9, 0.75, 0.5, 0.3, 0.1), (1, 0.5, 0.1)
RESNET_14 = Layer(8, 256, 256, 14)  # stage 3 of ResNet-18 and -34
SWEEP = (
    replace(RESNET_14, batch=1),
    RESNET_14,
    replace(RESNET_14, batch=32),
    Layer(8, 64, 64, 56),  # stage 1
    Layer(8, 512, 512, 7),  # stage 4
)
VGG_4 = Layer(1, 512, 512, 4)  # the last block of VGG-16 on CIFAR-10
POINTWISE = Layer(1, 512, 512, 14, kernel=1)  # MobileNetV1
DEPTHWISE = Layer(8, 512, 512, 14, groups=512)


def _sweep(layer: Layer, keep: float, dtype: torch.dtype) -> Case:
    middle = layer == RESNET_14 and dtype == FLOAT
    return _conv(
        layer,
        keep,
        dtype,
        naive=keep in (0.5, 0.3),
        compile=middle and keep == 0.5,
        backward=middle and keep == 0.5,
        overhead=middle and keep == 0.5,
        quick=middle and keep == 0.5,
    )


CONVOLUTIONS = [
    *(_sweep(layer, keep, FLOAT) for layer in SWEEP for keep in (KEEPS if layer in SWEEP[:2] else FEW)),
    *(_sweep(layer, keep, HALF) for layer in SWEEP for keep in (FEW if layer == RESNET_14 else (0.5,))),
    *(_conv(VGG_4, 0.5, dtype, naive=True, cold=True, quick=dtype == FLOAT) for dtype in (FLOAT, HALF)),
    _conv(replace(VGG_4, batch=8), 0.5, naive=True),
    *(_conv(SWEEP[0], 0.6, dtype, naive=True, cold=dtype == FLOAT) for dtype in (FLOAT, HALF)),
    *(_conv(POINTWISE, 0.5, dtype, naive=True) for dtype in (FLOAT, HALF)),
    _conv(replace(POINTWISE, batch=8), 0.5, naive=True),
    _conv(Layer(8, 128, 256, 28, stride=2), 0.5, naive=True),
    _conv(Layer(8, 128, 256, 28, kernel=1, stride=2), 0.5),
    _conv(replace(RESNET_14, residual=True), 0.5),
    *(_conv(DEPTHWISE, 0.5, dtype) for dtype in (FLOAT, HALF)),
    _conv(replace(DEPTHWISE, batch=1), 0.5),
    _conv(Layer(8, 128, 128, 56, stride=2, groups=128), 0.5),
    _conv(Layer(1, 64, 64, 8), 0.5, naive=True),  # ResNet-56 on CIFAR-10, stage 3
    _conv(Layer(8, 32, 32, 16), 0.5, naive=True),  # and stage 2
    _compact_conv(RESNET_14, 0.5),
    _compact_conv(VGG_4, 0.5),
]

# --------------------------------------------------------------------------------------------- gated_linear


def _linear_args(
    rand: Random, batch: int, features: int, keep: tuple[float, float], column_major: bool, dtype: torch.dtype
) -> Args:
    in_mask, out_mask = (rand.mask(batch, features, k) for k in keep)
    x = rand.normal(batch, features).mul_(in_mask).to(dtype)
    weight = (rand.normal(features, features) * features**-0.5).to(dtype)
    bias = rand.normal(features).to(dtype)
    return (x, weight.t() if column_major else weight, bias, *_compacted(in_mask), *_compacted(out_mask), "relu")


def _linear_flops(*args: Any) -> int:
    in_count, out_count = args[4], args[6]
    return 2 * int((in_count.long() * out_count.long()).sum())


def _row_major(x: Tensor, weight: Tensor, *rest: Any) -> Args:
    return (x, weight.contiguous(), *rest)


def _dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor, _: Any, __: Any, index: Tensor, count: Tensor, activation: str
) -> Run:
    gate = mask_from_index(index, count, weight.shape[0]).to(x.dtype)
    return lambda: F.linear(x, weight, bias).mul_(gate).relu_()


def _packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor, _: Any, __: Any, index: Tensor, count: Tensor, activation: str
) -> Run:
    """oneDNN with a weight packed once for this batch."""
    gate = mask_from_index(index, count, weight.shape[0]).to(x.dtype)
    onednn = torch.ops.mkldnn
    packed = onednn._reorder_linear_weight(weight.contiguous(), x.shape[0])
    return lambda: onednn._linear_pointwise(x, packed, bias, "relu", [], "").mul_(gate)


def _matrix_vector(
    x: Tensor, weight: Tensor, bias: Tensor, _: Any, __: Any, index: Tensor, count: Tensor, activation: str
) -> Run:
    gate = mask_from_index(index, count, weight.shape[0]).to(x.dtype)
    return lambda: torch.addmv(bias, weight, x[0]).mul_(gate[0]).relu_()[None]


def _eager_linear(
    x: Tensor, weight: Tensor, bias: Tensor, in_index: Tensor, in_count: Tensor, index: Tensor, count: Tensor, _: str
) -> Run:
    in_mask = mask_from_index(in_index, in_count, weight.shape[1]).to(x.dtype)
    out_mask = mask_from_index(index, count, weight.shape[0]).to(x.dtype)
    return lambda: F.relu(F.linear(x * in_mask, weight, bias)) * out_mask


def _gather_linear(
    x: Tensor, weight: Tensor, bias: Tensor, in_index: Tensor, in_count: Tensor, index: Tensor, count: Tensor, _: str
) -> Run:
    rows = [index[n, : count[n]].long() for n in range(x.shape[0])]
    columns = [in_index[n, : in_count[n]].long() for n in range(x.shape[0])]

    def run() -> Tensor:
        y = x.new_zeros(x.shape[0], weight.shape[0])
        for n, (out, ins) in enumerate(zip(rows, columns)):
            y[n, out] = torch.addmv(bias[out], weight[out[:, None], ins], x[n, ins]).relu_()
        return y

    return run


def _linear(
    batch: int,
    keep: tuple[float, float],
    dtype: torch.dtype = FLOAT,
    *,
    column_major: bool = False,
    gather: bool = False,
    features: int = 4096,
    **options: Any,
) -> Case:
    dense = {
        "row-major": Provider(_dense_linear, _row_major),
        "packed": Provider(_packed_linear, differentiable=False, devices=("cpu",)),
    }
    if batch == 1:
        dense["matrix-vector"] = Provider(_matrix_vector, _row_major)
    if column_major:
        dense["column-major"] = Provider(_dense_linear)
    providers: dict[str, Provider | Mapping[str, Provider]] = {"dense": dense, "eager": Provider(_eager_linear)}
    if gather:
        providers["peer:gather-in-out"] = Provider(_gather_linear)

    def args(rand: Random, batch: int, features: int) -> Args:
        return _linear_args(rand, batch, features, keep, column_major, dtype)

    return Case(
        "gated_linear",
        f"B{batch} {features}x{features} keep in {keep[0]:g} out {keep[1]:g}{' column-major' if column_major else ''}",
        dtype,
        lambda rand: args(rand, batch, features),
        providers,
        lambda rand: args(rand, min(batch, 3), 32),
        flops=_linear_flops,
        **options,
    )


LINEARS = [
    *(_linear(1, (1, 0.5), dtype, cold=(1,), hot=False) for dtype in (FLOAT, HALF)),
    *(_linear(1, (0.5, 1), dtype, column_major=True, cold=(1,), hot=False) for dtype in (FLOAT, HALF)),
    *(
        _linear(1, (0.5, 0.5), dtype, gather=True, cold=(1,), quick=dtype == FLOAT, overhead=dtype == FLOAT)
        for dtype in (FLOAT, HALF)
    ),
    *(_linear(batch, (0.5, 0.5), dtype) for batch in (8, 32, 256) for dtype in (FLOAT, HALF)),
    _linear(1, (0.1, 0.1), cold=(1,), hot=False),
    _linear(1, (1, 1), cold=(1,), hot=False),
    _linear(32, (1, 1), gradients=(0, 1, 2)),
]

# ------------------------------------------------------------------------------------------- gated_norm_act

EPS = 1e-5


def _norm_args(rand: Random, shape: tuple[int, ...], dtype: torch.dtype, residual: bool, last: bool) -> Args:
    n, c, _, _ = shape
    x = rand.normal(*shape).add_(0.5).to(dtype)
    skip = rand.normal(*shape).to(dtype) if residual else None
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
        skip = None if skip is None else skip.contiguous(memory_format=torch.channels_last)
    weight, bias = rand.uniform(c) + 0.5, rand.normal(c)
    _leave_kink(x, weight, bias, skip)
    return (x, weight, bias, None, None, skip, rand.mask(n, c, 0.5), "relu", True, EPS)


def _leave_kink(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    """Moves elements that the ReLU would see within rounding of zero, in place.

    Which side of zero they fall on is up to the order of a sum, and with it their whole gradient: of 8 million elements
    one or two do, and no provider could be compared.
    """
    margin = 8 * torch.finfo(x.dtype).eps
    for _ in range(4):  # a move shifts the statistics, and they the other elements
        u = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), training=True, eps=EPS)
        if residual is not None:
            u += residual
        x[u.abs() < margin] += 4 * margin


def _eager_norm(
    x: Tensor, weight: Tensor, bias: Tensor, _: Any, __: Any, residual: Tensor | None, mask: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """As published code has it: batch norm, residual, activation, the peak of its magnitude, the mask."""
    u = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    u = F.relu(u if residual is None else u + residual)
    peak = u.detach().abs().amax((2, 3))
    return u * mask[:, :, None, None], peak


def _dense_norm(
    x: Tensor, weight: Tensor, bias: Tensor, _: Any, __: Any, residual: Tensor | None, mask: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The fewest passes that plain torch allows: in place, parameters in fp32, no ``abs`` after a ReLU."""
    u = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    if residual is not None:
        u = u.add_(residual)
    u = u.relu_()
    return u * mask[:, :, None, None].to(u.dtype), u.detach().amax((2, 3))


def _dense_norm_early(
    x: Tensor, weight: Tensor, bias: Tensor, _: Any, __: Any, residual: Tensor | None, mask: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The mask before the activation, all in place; the peak is taken before both."""
    u = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    if residual is not None:
        u = u.add_(residual)
    peak = u.detach().amax((2, 3)).relu_()
    return u.mul_(mask[:, :, None, None].to(u.dtype)).relu_(), peak


def _norm_backward_cost(*args: Any) -> tuple[int, int]:
    """Two passes over gradient, output and input, one over the result, and the residual's gradient."""
    x, residual = args[0], args[5]
    return (7 + (residual is not None)) * x.numel() * x.element_size(), 0


def _norm(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = FLOAT,
    *,
    residual: bool = False,
    last: bool = False,
    compile: bool = False,
    **options: Any,
) -> Case:
    providers: dict[str, Provider | Mapping[str, Provider]] = {
        "dense": {"mask last": plain(_dense_norm, outputs=2), "mask first": plain(_dense_norm_early, outputs=2)},
        "eager": plain(_eager_norm, outputs=2),
    }
    if compile:
        providers["compile"] = compiled(_dense_norm, outputs=2)
    words = [
        "x".join(map(str, shape)),
        "training",
        *(["residual"] if residual else []),
        *(["channels_last"] if last else []),
    ]
    return Case(
        "gated_norm_act",
        " ".join(words),
        dtype,
        lambda rand: _norm_args(rand, shape, dtype, residual, last),
        providers,
        lambda rand: _norm_args(rand, (3, 8, 5, 5), dtype, residual, last),
        gradients=(0, 1, 2, 5) if residual else (0, 1, 2),
        backward_cost=_norm_backward_cost,
        **options,
    )


NORMS = [
    _norm((128, 256, 16, 16), compile=True, overhead=True),
    _norm((128, 256, 16, 16), HALF, compile=True),
    _norm((128, 256, 16, 16), residual=True),
    _norm((128, 256, 16, 16), last=True, compile=True),
    _norm((128, 64, 32, 32)),  # VGG-16 on CIFAR-10, block 1
    _norm((128, 16, 32, 32), residual=True),  # ResNet-56, stage 1
    _norm((128, 512, 4, 4), quick=True),  # VGG-16, block 5
    _norm((32, 512, 7, 7), HALF, residual=True, last=True),
]

# ---------------------------------------------------------------------------- channel_pool, mass_mask, gate_head


def _pool_args(rand: Random, shape: tuple[int, ...], mode: str, dtype: torch.dtype) -> Args:
    mask = rand.mask(shape[0], shape[1], 0.5)
    return (rand.normal(*shape).mul_(mask[:, :, None, None]).to(dtype), mode)


def _eager_pool(x: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    pool = F.adaptive_max_pool2d if mode == "max" else F.adaptive_avg_pool2d
    return pool(x, 1).flatten(1), *compact_by_scan((x != 0).flatten(2).any(2))


def _dense_pool(x: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    pooled = x.amax((2, 3)) if mode == "max" else x.mean((2, 3))
    return pooled, *compact_by_scan((x != 0).flatten(2).any(2))


def _dense_pool_by_range(x: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """A channel is all zero where its minimum and maximum are."""
    low, high = x.flatten(2).aminmax(dim=2)
    pooled = high if mode == "max" else x.mean((2, 3))
    return pooled, *compact_by_scan((low != 0) | (high != 0))


def _pool(shape: tuple[int, int, int, int], mode: str, dtype: torch.dtype = FLOAT, **options: Any) -> Case:
    return Case(
        "channel_pool",
        f"{'x'.join(map(str, shape))} {mode}",
        dtype,
        lambda rand: _pool_args(rand, shape, mode, dtype),
        {
            "dense": {"two reductions": plain(_dense_pool), "range": plain(_dense_pool_by_range)},
            "eager": plain(_eager_pool),
            "compile": compiled(_dense_pool),
        },
        lambda rand: _pool_args(rand, (3, 8, 5, 5), mode, dtype),
        **options,
    )


def _mass_args(rand: Random, rows: int, columns: int, mass: float, mode: str) -> Args:
    """Peaks of a layer behind a ReLU: one channel in four never fires."""
    return (rand.normal(rows, columns).sub_(-0.67).relu_(), mass, mode, 1)


def _eager_mass(scores: Tensor, mass: float, mode: str, min_keep: int) -> Tensor:
    """As published code has it: coordinates of the kept entries, written one by one. Synchronises on a GPU."""
    ordered, order = (scores / scores.sum(1, keepdim=True)).sort(1, descending=True)
    rows, columns = torch.where(ordered.cumsum(1) - mass <= 1e-5)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[rows, order[rows, columns]] = True
    return mask.scatter_(1, order[:, :min_keep], True)


def _dense_mass(scores: Tensor, mass: float, mode: str, min_keep: int) -> Tensor:
    ordered, order = torch.sort(scores, dim=1, descending=True, stable=True)
    share = ordered.cumsum(1)
    keep = share.div_(share[:, -1:].clone()) <= mass + 1e-5
    keep[:, :min_keep] = True
    return torch.zeros_like(keep).scatter_(1, order, keep)


def _mass(rows: int, columns: int, mass: float, **options: Any) -> Case:
    return Case(
        "mass_mask",
        f"{rows}x{columns} mass {mass:g}",
        FLOAT,
        lambda rand: _mass_args(rand, rows, columns, mass, "mass"),
        {"dense": plain(_dense_mass), "eager": plain(_eager_mass), "compile": compiled(_dense_mass)},
        lambda rand: _mass_args(rand, 3, 17, mass, "mass"),
        **options,
    )


def _head_args(rand: Random, batch: int, ins: int, outs: int) -> Args:
    return (rand.normal(batch, ins).abs_(), rand.normal(outs, ins), rand.normal(outs) * 0.1, True, 1)


def _eager_head(
    pooled: Tensor, weight: Tensor, bias: Tensor, softmax: bool, min_keep: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = F.linear(pooled.softmax(1), weight, bias)
    mask = logits > 0
    mask = mask.scatter(1, logits.topk(min_keep, 1).indices, True)
    return logits, mask, *compact_by_scan(mask)


def _dense_head(
    pooled: Tensor, weight: Tensor, bias: Tensor, softmax: bool, min_keep: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One channel at least: the largest logit, without a top-k."""
    logits = F.linear(pooled.softmax(1), weight, bias)
    mask = (logits > 0).scatter_(1, logits.argmax(1, keepdim=True), True)
    return logits, mask, *compact_by_scan(mask)


def _head(batch: int, ins: int, outs: int, **options: Any) -> Case:
    return Case(
        "gate_head",
        f"B{batch} {ins}-{outs}",
        FLOAT,
        lambda rand: _head_args(rand, batch, ins, outs),
        {"dense": plain(_dense_head), "eager": plain(_eager_head), "compile": compiled(_dense_head)},
        lambda rand: _head_args(rand, min(batch, 3), 16, 24),
        gradients=(0, 1, 2),
        **options,
    )


GATES = [
    _pool((128, 256, 16, 16), "max", quick=True, overhead=True),
    _pool((128, 256, 16, 16), "avg", gradients=(0,)),
    _pool((128, 256, 16, 16), "max", HALF),
    _pool((8, 256, 14, 14), "max"),
    _pool((1, 512, 4, 4), "max"),
    _mass(128, 512, 0.95, quick=True, overhead=True),
    _mass(128, 512, 0.8),
    _mass(8, 64, 0.9),
    _head(1, 512, 512),
    _head(128, 512, 512, quick=True, overhead=True),
]

CASES = [*CONVOLUTIONS, *LINEARS, *NORMS, *GATES]
