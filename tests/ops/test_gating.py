# SPDX-License-Identifier: Apache-2.0
"""The operators of dynamic channel gating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cofire import explain, native, ops
from cofire.ops import gating
from cofire.registry import OPERATORS
from helpers import Args, Random, Refusal, Sample, check_examples, check_op, providers, refusals
from laws import assume, given, settings, st

ODD = (1, 7, 17, 63, 65, 129)


def compaction(mask: Tensor) -> tuple[Tensor, Tensor]:
    index, count = OPERATORS["compact"].reference(mask)
    return index, count


# ---------------------------------------------------------------------------------------------- channel_pool


def maps(*shape: int, mode: str, zero: float = 0.3) -> Callable[[Random], Args]:
    """Feature maps of which a share of the channels is all zero."""
    return lambda rand: (rand.normal(*shape) * rand.mask(*shape[:2], density=1 - zero)[:, :, None, None], mode)


def pool_samples(mode: str) -> list[Sample]:
    return [
        Sample(f"{mode}_odd", maps(2, 7, 5, 3, mode=mode)),
        *(Sample(f"{mode}_channels_{c}", maps(2, c, 3, 3, mode=mode)) for c in ODD),
        *(Sample(f"{mode}_pixels_{w}", maps(2, 3, 1, w, mode=mode)) for w in ODD),
        Sample(f"{mode}_large", maps(5, 33, 31, 17, mode=mode)),
        Sample(f"{mode}_negative", lambda rand: (-rand.uniform(2, 5, 4, 4) - 0.1, mode)),
        Sample(f"{mode}_ties", lambda rand: ((rand.uniform(2, 5, 4, 5) * 3).floor() - 1, mode)),
        Sample(f"{mode}_zeros", lambda rand: (torch.zeros(2, 5, 3, 3), mode)),
        # the support asks whether there is a non-zero, not for the sum or the largest
        Sample(
            f"{mode}_cancelling", lambda rand: (torch.tensor([1.0, -1.0, 0.0, -0.0]).expand(1, 3, 4, 4).clone(), mode)
        ),
        Sample(
            f"{mode}_one_tiny", lambda rand: (6e-8 * (torch.arange(63) == 62).float().expand(1, 2, 1, 63).clone(), mode)
        ),
        Sample(f"{mode}_no_samples", lambda rand: (torch.zeros(0, 5, 3, 3), mode)),
        Sample(f"{mode}_no_channels", lambda rand: (torch.zeros(2, 0, 3, 3), mode)),
    ]


def pool_tiny(mode: str) -> list[Sample]:
    return [
        Sample(f"{mode}_tiny", maps(2, 3, 3, 2, mode=mode, zero=0)),
        Sample(f"{mode}_tiny_resized", maps(3, 4, 2, 5, mode=mode, zero=0)),
    ]


def with_grad(sample: Sample) -> Sample:
    """From a sample of channel_pool one of its backward."""

    def make(rand: Random) -> Args:
        input, mode = sample.make(rand)
        return rand.normal(*input.shape[:2]), input, mode

    return Sample(sample.name, make, sample.full)


CHANNEL_POOL = [
    *check_op("channel_pool", pool_samples("max"), tiny=pool_tiny("max")),
    *check_op("channel_pool", pool_samples("avg"), tiny=pool_tiny("avg"), sums=["pooled"]),
]
CHANNEL_POOL_BACKWARD = [
    check
    for mode in ("max", "avg")
    for check in check_op(
        "channel_pool_backward",
        [with_grad(s) for s in pool_samples(mode)],
        tiny=[with_grad(s) for s in pool_tiny(mode)],
        constants=["input"],
    )
]


# ------------------------------------------------------------------------------------------------- mass_mask


def scores(n: int, c: int, mass: float, mode: str = "mass", min_keep: int = 1) -> Callable[[Random], Args]:
    """Peaks of activations after a ReLU: a third is zero, the others are long-tailed."""
    return lambda rand: (rand.normal(n, c).exp() * rand.mask(n, c, density=0.67), mass, mode, min_keep)


GOLDEN = [5.5, 7.9, 0.3, 8.6, 2.2, 3.1, 0.9]

MASS_MASK_SAMPLES = [
    Sample("odd", scores(3, 17, 0.8)),
    *(Sample(f"channels_{c}", scores(2, c, 0.9)) for c in (*ODD, 64, 128)),
    *(Sample(f"mass_{mass:g}", scores(3, 40, mass)) for mass in (0.01, 0.3, 0.5, 0.95, 0.999, 1.0, -1.0)),
    *(Sample(f"uniform_{rho:g}", scores(3, 40, rho, "uniform")) for rho in (0.0, 0.3, 0.5, 0.99)),
    *(Sample(f"min_keep_{k}", scores(3, 40, 0.05, min_keep=k)) for k in (0, 2, 40)),
    Sample("uniform_min_keep", scores(3, 40, 0.99, "uniform", 5)),
    Sample("large", scores(70, 1030, 0.95)),
    *(
        Sample(f"ties_{mode}_{value:g}", lambda rand, m=mode, v=value: ((rand.uniform(4, 65) * 4).floor(), v, m, 1))
        for mode, value in (("mass", 0.5), ("mass", 0.8), ("mass", 1.0), ("uniform", 0.4))
    ),
    *(
        Sample(f"equal_{mode}_{value:g}", lambda rand, m=mode, v=value: (torch.ones(2, 65), v, m, 1))
        for mode, value in (("mass", 0.3), ("mass", 1.0), ("uniform", 0.3))
    ),
    *(
        Sample(f"zeros_{k}_{mode}_{value:g}", lambda rand, m=mode, v=value, k=k: (torch.zeros(2, 17), v, m, k))
        for mode, value, k in (
            ("mass", 0.5, 0),
            ("mass", 0.5, 1),
            ("mass", 1.0, 3),
            ("uniform", 0.5, 1),
            ("mass", -1.0, 0),
        )
    ),
    Sample("one_dead_row", lambda rand: (rand.uniform(3, 17) * torch.tensor([[1.0], [0.0], [1.0]]), 0.9, "mass", 1)),
    # shares around the 1e-5 of "never fires", and scores around the 1e-5 of mode uniform
    Sample("shares_1e-5", lambda rand: (torch.tensor([[1.0, 2e-5, 5e-6, 0.0, 1e-3]]), 1.0, "mass", 1)),
    Sample("scores_1e-5", lambda rand: (torch.tensor([[1.0, 2e-5, 5e-6, 0.0, 1e-3]]), 0.0, "uniform", 1)),
    Sample("no_samples", lambda rand: (torch.zeros(0, 5), 0.5, "mass", 1)),
    Sample("no_channels", lambda rand: (torch.zeros(2, 0), 0.5, "mass", 0)),
]
MASS_MASK = check_op(
    "mass_mask", MASS_MASK_SAMPLES, tiny=[Sample("tiny", scores(2, 5, 0.8)), Sample("tiny_resized", scores(3, 8, 0.8))]
)


# ------------------------------------------------------------------------------------------------- gate_head


def head(
    n: int, ci: int, co: int, *, bias: float | None = 0.0, softmax: bool = True, min_keep: int = 1, scale: float = 1.0
) -> Callable[[Random], Args]:
    """``bias`` is the mean of the bias, None for no bias."""

    def make(rand: Random) -> Args:
        b = None if bias is None else 0.5 * rand.normal(co) + bias
        return scale * rand.normal(n, ci).abs(), rand.normal(co, ci), b, softmax, min_keep

    return make


def decided_by_logits(args: Args, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    logits, min_keep = outputs[0], args[4]
    mask = logits > 0
    if min_keep:
        mask |= torch.zeros_like(mask).scatter(
            1, logits.sort(dim=1, descending=True, stable=True).indices[:, :min_keep], True
        )
    index, count = compaction(mask)
    return {"mask": mask, "index": index, "count": count}


GATE_HEAD_SAMPLES = [
    Sample("odd", head(3, 7, 17)),
    *(Sample(f"in_{c}", head(2, c, 9)) for c in ODD),
    *(Sample(f"out_{c}", head(2, 9, c)) for c in ODD),
    Sample("large", head(37, 130, 257)),
    Sample("raw", head(3, 17, 33, softmax=False)),
    Sample("raw_no_bias", head(3, 17, 33, softmax=False, bias=None)),
    Sample("no_bias", head(3, 17, 33, bias=None)),
    Sample("sharp", head(3, 17, 33, scale=300.0)),
    *(Sample(f"all_negative_{k}", head(3, 7, 17, bias=-9.0, min_keep=k)) for k in (0, 1, 3, 17)),
    Sample("all_positive", head(3, 7, 17, bias=9.0)),
    Sample("equal_logits", lambda rand: (rand.normal(2, 7), torch.zeros(9, 7), -torch.ones(9), True, 2)),
    Sample("zero_logits", lambda rand: (rand.normal(2, 7), torch.zeros(9, 7), None, False, 1)),
    Sample("no_samples", head(0, 7, 9)),
    Sample("no_features", head(2, 0, 9)),
    Sample("no_outputs", head(2, 7, 0, min_keep=0)),
]
HEAD_TINY = [Sample("tiny", head(2, 3, 4)), Sample("tiny_resized", head(3, 5, 6))]


def head_backward(sample: Sample) -> Sample:
    def make(rand: Random) -> Args:
        pooled, weight, _, softmax, _ = sample.make(rand)
        return rand.normal(pooled.shape[0], weight.shape[0]), pooled, weight, softmax

    return Sample(sample.name, make, sample.full)


GATE_HEAD = check_op("gate_head", GATE_HEAD_SAMPLES, tiny=HEAD_TINY, decided_by=decided_by_logits)
GATE_HEAD_BACKWARD = check_op(
    "gate_head_backward",
    [head_backward(s) for s in GATE_HEAD_SAMPLES],
    tiny=[head_backward(s) for s in HEAD_TINY],
    sums={"grad_pooled": 4, "grad_weight": 4, "grad_bias": 4},
    by_library=True,
)


# -------------------------------------------------------------------------------------------- gated_norm_act


def norm(
    *shape: int,
    activation: str = "relu",
    training: bool = True,
    residual: bool = False,
    density: float | None = 0.5,
    mean: float = 0.3,
    gain: float = 1.0,
) -> Callable[[Random], Args]:
    """``density`` of the mask, None for no mask; ``mean`` of the input, whose deviation is 1."""

    def make(rand: Random) -> Args:
        n, c = shape[:2]
        return (
            rand.normal(*shape) + mean,
            gain * (0.5 + rand.uniform(c)),
            0.5 * rand.normal(c),
            rand.normal(c) + mean,
            0.5 + rand.uniform(c),
            rand.normal(*shape) if residual else None,
            None if density is None else rand.mask(n, c, density=density),
            activation,
            training,
            1e-5,
        )

    return make


NORM_SAMPLES = [
    Sample("odd", norm(2, 7, 5, 3)),
    *(Sample(f"channels_{c}", norm(2, c, 3, 3)) for c in ODD),
    *(Sample(f"pixels_{w}", norm(2, 3, 1, w)) for w in ODD),
    Sample("large", norm(5, 33, 31, 17, residual=True)),
    Sample("wide_large", norm(3, 130, 9, 9)),
    *(Sample(f"{a}_residual", norm(2, 7, 5, 3, activation=a, residual=True)) for a in ("identity", "relu")),
    *(Sample(f"{a}_eval", norm(2, 7, 5, 3, activation=a, training=False)) for a in ("identity", "relu")),
    Sample("relu6", norm(2, 7, 5, 3, activation="relu6", gain=6.0), kink=True),
    Sample(
        "relu6_eval_residual", norm(2, 7, 5, 3, activation="relu6", training=False, residual=True, gain=6.0), kink=True
    ),
    Sample("no_mask", norm(2, 7, 5, 3, density=None)),
    Sample("no_mask_eval", norm(2, 7, 5, 3, density=None, training=False)),
    Sample("all_masked", norm(2, 7, 5, 3, density=0.0, residual=True)),
    Sample("all_masked_eval", norm(2, 7, 5, 3, density=0.0, training=False)),
    Sample("all_kept", norm(2, 7, 5, 3, density=1.0)),
    # a variance as the difference of two large numbers loses everything here
    Sample("large_mean", norm(3, 5, 9, 7, mean=1000.0, activation="identity")),
    Sample("large_mean_long", norm(2, 2, 65, 65, mean=300.0, activation="identity")),
    Sample("large_mean_eval", norm(3, 5, 9, 7, mean=1000.0, activation="identity", training=False)),
    Sample("eval_no_samples", norm(0, 5, 3, 3, training=False)),
    Sample("eval_no_channels", norm(2, 0, 3, 3, training=False)),
    Sample("eval_one_pixel", norm(1, 5, 1, 1, training=False)),
]
CONSTANT_INPUT = Sample(  # no variance: what is left is the bias, and eps keeps the gradient finite
    "constant", lambda rand: (torch.full((2, 3, 3, 3), 0.5), *norm(2, 3, 3, 3)(rand)[1:])
)
NORM_TINY = [Sample("tiny", norm(2, 2, 2, 3, residual=True)), Sample("tiny_resized", norm(3, 4, 3, 2, residual=True))]
NORM_TINY_EVAL = [
    Sample("tiny_eval", norm(2, 2, 2, 3, training=False, activation="relu6")),
    Sample("tiny_eval_resized", norm(3, 4, 3, 2, training=False, activation="relu6")),
]


def norm_backward(sample: Sample, poison: bool = False) -> Sample:
    """``poison``: NaN in the gradient wherever the mask says that it does not matter."""

    def make(rand: Random) -> Args:
        # in numbers that every dtype holds, so that output, mean and var belong to the input in every dtype
        input, weight, *rest = (
            a.bfloat16().float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in sample.make(rand)
        )
        residual, mask, activation, training, eps = rest[3:]
        output, _, mean, var = OPERATORS["gated_norm_act"].reference(input, weight, *rest)
        grad = rand.normal(*input.shape)
        if poison:
            grad[~mask] = torch.nan
        return grad, output, input, weight, mean, var, mask, activation, training, residual is not None, eps

    return Sample(sample.name + ("_poisoned" if poison else ""), make, sample.full)


PARAMETERS = ["weight", "bias", "running_mean", "running_var"]
NORM_FACTS = {"constants": ["running_mean", "running_var"], "sums": ["mean", "var", "weight", "bias"]}
GATED_NORM_ACT = [
    *check_op("gated_norm_act", [*NORM_SAMPLES, CONSTANT_INPUT], tiny=NORM_TINY, wide=PARAMETERS, **NORM_FACTS),
    *check_op("gated_norm_act", [], tiny=NORM_TINY_EVAL, wide=PARAMETERS, **NORM_FACTS),
    # parameters in 16 bits as well
    *check_op("gated_norm_act", [Sample("narrow_parameters", norm(2, 7, 5, 3))], tiny=(), **NORM_FACTS),
]
GATED_NORM_ACT_BACKWARD = [
    check
    for samples, tiny in (
        ([*map(norm_backward, NORM_SAMPLES), norm_backward(NORM_SAMPLES[0], poison=True)], NORM_TINY),
        ([norm_backward(Sample("eval", norm(2, 7, 5, 3, training=False)), poison=True)], NORM_TINY_EVAL),
    )
    for check in check_op(
        "gated_norm_act_backward",
        samples,
        tiny=[*map(norm_backward, tiny)],
        constants=["output", "mean", "var"],
        wide=["weight", "mean", "var"],
        sums=["grad_weight", "grad_bias"],
    )
]


# ---------------------------------------------------------------------------------------------- gated_conv2d


def conv(
    n: int,
    ci: int,
    co: int,
    size: tuple[int, int],
    *,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "relu",
    bias: bool = True,
    residual: bool = False,
    density: tuple[float, float] = (0.5, 0.5),
    masked: bool = False,
    poison: bool = False,
    compact_input: int = 0,
    compact_output: int = 0,
    gain: float = 1.0,
) -> Callable[[Random], Args]:
    """``density`` of the input's and the output's mask; ``poison``: NaN in all channels that do not count.

    ``compact_input`` and ``compact_output`` are numbers of slots; no sample then has more active channels.
    """

    def selection(rand: Random, channels: int, share: float, most: int) -> tuple[Tensor, Tensor]:
        mask = rand.mask(n, channels, density=share)
        if most:
            mask &= mask.cumsum(1) <= most
        return compaction(mask)

    def make(rand: Random) -> Args:
        in_index, in_count = selection(rand, ci, density[0], compact_input)
        out_index, out_count = selection(rand, co, density[1], compact_output)
        slots = compact_input or ci
        used = (
            torch.arange(slots) < in_count[:, None] if compact_input else gating.mask_from_index(in_index, in_count, ci)
        )
        x = rand.normal(n, slots, *size)
        if masked or poison:
            x = x.masked_fill(~used[:, :, None, None], torch.nan if poison else 0.0)
        weight = gain * rand.normal(co, ci // groups, *kernel) / (max(ci // groups, 1) * kernel[0] * kernel[1]) ** 0.5
        out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
        return (
            x,
            weight,
            0.3 * rand.normal(co) if bias else None,
            rand.normal(n, co, *out) if residual else None,
            in_index,
            in_count,
            out_index,
            out_count,
            list(stride),
            list(padding),
            list(dilation),
            groups,
            activation,
            masked,
            bool(compact_input),
            compact_output,
        )

    return make


NONE, ALL = 0.0, 1.0
CONV_SAMPLES = [
    Sample("odd", conv(2, 7, 17, (5, 6))),
    *(Sample(f"in_{c}", conv(2, c, 5, (4, 4))) for c in ODD),
    *(Sample(f"out_{c}", conv(2, 5, c, (4, 4))) for c in ODD),
    Sample("large", conv(3, 65, 70, (17, 19), padding=(1, 1), residual=True), kink=True),
    Sample("one_sample", conv(1, 33, 47, (14, 14))),
    Sample("masked", conv(2, 17, 19, (6, 5), masked=True)),
    Sample("poisoned", conv(2, 17, 19, (6, 5), poison=True)),
    Sample("sparse", conv(3, 65, 63, (5, 5), density=(0.05, 0.05))),
    Sample("all_in", conv(2, 17, 19, (5, 5), density=(ALL, 0.5))),
    Sample("all_out", conv(2, 17, 19, (5, 5), density=(0.5, ALL))),
    Sample("all", conv(2, 17, 19, (5, 5), density=(ALL, ALL))),
    Sample("none_in", conv(2, 17, 19, (5, 5), density=(NONE, 0.5))),
    Sample("none_out", conv(2, 17, 19, (5, 5), density=(0.5, NONE))),
    Sample("identity", conv(2, 9, 11, (5, 5), activation="identity", bias=False)),
    Sample("relu6", conv(2, 9, 11, (5, 5), activation="relu6", gain=6.0), kink=True),
    Sample("residual_relu", conv(2, 9, 11, (5, 5), residual=True), kink=True),
    Sample("residual_identity", conv(2, 9, 11, (5, 5), residual=True, activation="identity")),
    Sample("pointwise", conv(2, 33, 21, (7, 5), kernel=(1, 1), padding=(0, 0))),
    Sample("pointwise_stride", conv(2, 33, 21, (7, 5), kernel=(1, 1), padding=(0, 0), stride=(2, 2))),
    Sample("pointwise_padding", conv(2, 9, 11, (4, 3), kernel=(1, 1), padding=(1, 2))),
    Sample("kernel_5x3", conv(2, 9, 11, (7, 8), kernel=(5, 3), padding=(2, 1))),
    Sample("kernel_7", conv(1, 3, 9, (13, 12), kernel=(7, 7), padding=(3, 3), stride=(2, 2))),
    Sample("no_padding", conv(2, 9, 11, (5, 7), padding=(0, 0))),
    Sample("wide_padding", conv(2, 5, 6, (3, 3), padding=(3, 4))),
    Sample("stride_2", conv(2, 9, 11, (7, 8), stride=(2, 2))),
    Sample("stride_3x2", conv(2, 9, 11, (9, 8), stride=(3, 2))),
    Sample("dilation_2x3", conv(2, 9, 11, (9, 10), dilation=(2, 3), padding=(2, 3))),
    Sample("groups_3", conv(2, 9, 12, (6, 5), groups=3)),
    Sample("depthwise", conv(2, 17, 17, (6, 5), groups=17)),
    Sample("depthwise_stride", conv(2, 17, 17, (9, 7), groups=17, stride=(2, 2))),
    Sample("depthwise_multiplier", conv(2, 5, 15, (6, 5), groups=5)),
    Sample("depthwise_poisoned", conv(2, 17, 17, (6, 5), groups=17, poison=True)),
    Sample("compact_input", conv(2, 17, 19, (6, 5), compact_input=9)),
    Sample("compact_input_poisoned", conv(2, 17, 19, (6, 5), compact_input=12, poison=True, density=(0.3, 0.5))),
    Sample("compact_output", conv(2, 17, 19, (6, 5), compact_output=11)),
    Sample("compact_output_full", conv(2, 7, 9, (6, 5), compact_output=9, density=(0.5, ALL))),
    Sample(
        "compact_both_residual", conv(3, 17, 19, (6, 5), compact_input=9, compact_output=11, residual=True), kink=True
    ),
    Sample("compact_groups", conv(2, 12, 9, (6, 5), compact_input=7, compact_output=6, groups=3)),
    Sample("compact_depthwise", conv(2, 17, 17, (6, 5), compact_input=9, compact_output=9, groups=17)),
    Sample(
        "compact_pointwise", conv(2, 17, 19, (6, 5), compact_input=9, compact_output=11, kernel=(1, 1), padding=(0, 0))
    ),
    Sample("compact_none", conv(2, 7, 9, (4, 4), compact_input=3, compact_output=4, density=(NONE, NONE))),
    Sample("no_samples", conv(0, 7, 9, (4, 4))),
    Sample("one_pixel", conv(2, 7, 9, (1, 1))),
]
CONV_TINY = [  # gradcheck takes as long as it has entries
    Sample("tiny", conv(2, 2, 3, (3, 2), kernel=(2, 2), padding=(0, 1), residual=True, density=(0.7, 0.7))),
    Sample("tiny_resized", conv(3, 5, 6, (4, 5), kernel=(2, 2), padding=(0, 1), residual=True, density=(0.7, 0.7))),
]
COMPACT_CONV: Any = {
    "kernel": (1, 2),
    "padding": (0, 1),
    "activation": "identity",
    "compact_input": 2,
    "compact_output": 2,
}
CONV_TINY_COMPACT = [
    Sample("tiny_compact", conv(2, 3, 3, (2, 2), density=(0.7, 0.7), **COMPACT_CONV)),
    Sample("tiny_compact_resized", conv(3, 5, 6, (4, 5), density=(0.7, 0.7), **COMPACT_CONV)),
]


def conv_backward(sample: Sample) -> Sample:
    def make(rand: Random) -> Args:
        args = sample.make(rand)
        input, weight, _, _, *selection = args[:8]
        stride, padding, dilation, groups, activation, _, compact_input, compact_output = args[8:]
        output = OPERATORS["gated_conv2d"].reference(*args)
        options = (stride, padding, dilation, groups, activation, compact_input, compact_output)
        return rand.normal(*output.shape), output, input, weight, *selection, *options

    return Sample(sample.name, make, sample.full)


GATED_CONV2D = [
    # Two roundings: on some processors the library's own error, which the bound starts from, happens to be the smaller.
    *check_op("gated_conv2d", CONV_SAMPLES, tiny=CONV_TINY, sums={"output 0": 2}),
    *check_op("gated_conv2d", [], tiny=CONV_TINY_COMPACT),
]
GATED_CONV2D_BACKWARD = [
    *check_op(
        "gated_conv2d_backward",
        [*map(conv_backward, CONV_SAMPLES)],
        tiny=[*map(conv_backward, CONV_TINY)],
        constants=["output"],
    ),
    *check_op("gated_conv2d_backward", [], tiny=[*map(conv_backward, CONV_TINY_COMPACT)], constants=["output"]),
]


# ---------------------------------------------------------------------------------------------- gated_linear


def linear(
    n: int,
    ci: int,
    co: int,
    *,
    density: tuple[float, float] = (0.5, 0.5),
    bias: bool = True,
    activation: str = "relu",
    poison: bool = False,
    gain: float = 1.0,
) -> Callable[[Random], Args]:
    def make(rand: Random) -> Args:
        in_mask, out_mask = rand.mask(n, ci, density=density[0]), rand.mask(n, co, density=density[1])
        x = rand.normal(n, ci)
        if poison:
            x = x.masked_fill(~in_mask, torch.nan)
        weight = gain * rand.normal(co, ci) / max(ci, 1) ** 0.5
        b = 0.3 * rand.normal(co) if bias else None
        return x, weight, b, *compaction(in_mask), *compaction(out_mask), activation

    return make


LINEAR_SAMPLES = [
    Sample("odd", linear(3, 7, 17)),
    *(Sample(f"in_{c}", linear(2, c, 9)) for c in ODD),
    *(Sample(f"out_{c}", linear(2, 9, c)) for c in ODD),
    Sample("large", linear(19, 130, 257)),
    Sample("one_sample", linear(1, 257, 130)),
    Sample("poisoned", linear(3, 17, 33, poison=True)),
    Sample("sparse", linear(3, 129, 65, density=(0.05, 0.05))),
    Sample("all", linear(3, 17, 33, density=(ALL, ALL))),
    Sample("none_in", linear(3, 17, 33, density=(NONE, 0.5))),
    Sample("none_out", linear(3, 17, 33, density=(0.5, NONE))),
    Sample("identity", linear(3, 17, 33, activation="identity", bias=False)),
    Sample("relu6", linear(3, 17, 33, activation="relu6", gain=6.0), kink=True),
    Sample("no_samples", linear(0, 7, 9)),
    Sample("no_features", linear(2, 0, 9)),
    Sample("no_outputs", linear(2, 7, 0)),
]
LINEAR_TINY = [
    Sample("tiny", linear(2, 3, 4, density=(0.7, 0.7))),
    Sample("tiny_resized", linear(3, 5, 6, density=(0.7, 0.7))),
]


def linear_backward(sample: Sample) -> Sample:
    def make(rand: Random) -> Args:
        args = sample.make(rand)
        input, weight, _, *selection, activation = args
        output = OPERATORS["gated_linear"].reference(*args)
        return rand.normal(*output.shape), output, input, weight, *selection, activation

    return Sample(sample.name, make, sample.full)


GATED_LINEAR = check_op("gated_linear", LINEAR_SAMPLES, tiny=LINEAR_TINY)
GATED_LINEAR_BACKWARD = check_op(
    "gated_linear_backward",
    [*map(linear_backward, LINEAR_SAMPLES)],
    tiny=[*map(linear_backward, LINEAR_TINY)],
    constants=["output"],
)


@pytest.mark.parametrize(
    "check",
    [
        *CHANNEL_POOL,
        *CHANNEL_POOL_BACKWARD,
        *MASS_MASK,
        *GATE_HEAD,
        *GATE_HEAD_BACKWARD,
        *GATED_NORM_ACT,
        *GATED_NORM_ACT_BACKWARD,
        *GATED_CONV2D,
        *GATED_CONV2D_BACKWARD,
        *GATED_LINEAR,
        *GATED_LINEAR_BACKWARD,
    ],
)
def test_operator(check: Callable[[], None]) -> None:
    check()


# --------------------------------------------------------------------------------------------------- refusals


def refuse_pool(input: Callable[[], Tensor], mode: str = "max") -> Callable[[], Any]:
    return lambda: ops.channel_pool(input(), mode)


def refuse_mass(
    scores: Callable[[], Tensor] = lambda: torch.ones(2, 4), mass: float = 0.5, mode: str = "mass", min_keep: int = 1
) -> Callable[[], Any]:
    return lambda: ops.mass_mask(scores(), mass, mode, min_keep)


def refuse_head(**changed: Any) -> Callable[[], Any]:
    def call() -> Any:
        arguments = {"pooled": torch.ones(2, 4), "weight": torch.ones(6, 4), "bias": torch.ones(6), "min_keep": 1}
        arguments |= {name: value() if callable(value) else value for name, value in changed.items()}
        return ops.gate_head(
            arguments["pooled"], arguments["weight"], arguments["bias"], min_keep=arguments["min_keep"]
        )

    return call


def refuse_norm(**changed: Any) -> Callable[[], Any]:
    def call() -> Any:
        arguments = {"input": torch.ones(2, 4, 3, 3), "weight": torch.ones(4), "bias": torch.ones(4)}
        arguments |= {name: value() if callable(value) else value for name, value in changed.items()}
        return ops.gated_norm_act(arguments.pop("input"), arguments.pop("weight"), arguments.pop("bias"), **arguments)

    return call


def selection_arguments(ci: int = 4, co: int = 6) -> dict[str, Any]:
    return {
        "in_index": torch.zeros(2, ci, dtype=torch.int32),
        "in_count": torch.ones(2, dtype=torch.int32),
        "out_index": torch.zeros(2, co, dtype=torch.int32),
        "out_count": torch.ones(2, dtype=torch.int32),
    }


def refuse_conv(**changed: Any) -> Callable[[], Any]:
    def call() -> Any:
        arguments = {"input": torch.ones(2, 4, 5, 5), "weight": torch.ones(6, 4, 3, 3), "bias": torch.ones(6)}
        arguments |= selection_arguments()
        arguments |= {name: value() if callable(value) else value for name, value in changed.items()}
        return ops.gated_conv2d(**arguments)

    return call


def refuse_linear(**changed: Any) -> Callable[[], Any]:
    def call() -> Any:
        arguments = {
            "input": torch.ones(2, 4),
            "weight": torch.ones(6, 4),
            "bias": torch.ones(6),
            **selection_arguments(),
        }
        arguments |= {name: value() if callable(value) else value for name, value in changed.items()}
        return ops.gated_linear(**arguments)

    return call


def integers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.ones(shape, dtype=torch.int64)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.ones(shape, dtype=dtype)


def scores_with(value: float) -> Callable[[], Tensor]:
    return lambda: torch.ones(3, 5).index_put((torch.tensor([1]), torch.tensor([3])), torch.tensor(value))


ACTIVATION = "activation must be one of identity, relu, relu6, got 'gelu'"
REFUSALS = [
    *(
        Refusal(f"channel_pool_{name}", call, error, f"channel_pool: {sentence}")
        for name, call, error, sentence in (
            ("rank", refuse_pool(ones(2, 3, 4)), ValueError, "input must have shape [N, C, H, W], got [2, 3, 4]"),
            (
                "integer",
                refuse_pool(integers(1, 2, 3, 4)),
                TypeError,
                "input must be a floating-point tensor, got torch.int64",
            ),
            ("mode", refuse_pool(ones(1, 2, 3, 4), "sum"), ValueError, "mode must be one of avg, max, got 'sum'"),
            ("pixels", refuse_pool(ones(1, 2, 0, 4)), ValueError, "input must have pixels, got [1, 2, 0, 4]"),
            (
                "array",
                lambda: ops.channel_pool(np.ones((1, 2, 3, 4))),  # type: ignore[arg-type]
                TypeError,
                "input must be a tensor, got ndarray",
            ),
        )
    ),
    *(
        Refusal(f"mass_mask_{name}", call, error, f"mass_mask: {sentence}")
        for name, call, error, sentence in (
            ("rank", refuse_mass(ones(4)), ValueError, "scores must have shape [N, C], got [4]"),
            (
                "integer",
                refuse_mass(integers(2, 4)),
                TypeError,
                "scores must be a floating-point tensor, got torch.int64",
            ),
            ("mode", refuse_mass(mode="top"), ValueError, "mode must be one of mass, uniform, got 'top'"),
            ("zero", refuse_mass(mass=0.0), ValueError, "mass must be in (0, 1] or negative (gating off), got 0.0"),
            (
                "above_one",
                refuse_mass(mass=1.5),
                ValueError,
                "mass must be in (0, 1] or negative (gating off), got 1.5",
            ),
            (
                "nan",
                refuse_mass(mass=torch.nan),
                ValueError,
                "mass must be in (0, 1] or negative (gating off), got nan",
            ),
            (
                "mass_text",
                refuse_mass(mass="0.9"),  # type: ignore[arg-type]
                TypeError,
                "mass must be a number, got '0.9'",
            ),
            (
                "min_keep_float",
                refuse_mass(min_keep=2.5),  # type: ignore[arg-type]
                TypeError,
                "min_keep must be an integer, got 2.5",
            ),
            (
                "uniform_one",
                refuse_mass(mass=1.0, mode="uniform"),
                ValueError,
                "mass must be in [0, 1) in mode 'uniform' (the share to prune), got 1.0",
            ),
            (
                "uniform_negative",
                refuse_mass(mass=-0.5, mode="uniform"),
                ValueError,
                "mass must be in [0, 1) in mode 'uniform' (the share to prune), got -0.5",
            ),
            (
                "min_keep_large",
                refuse_mass(min_keep=5),
                ValueError,
                "min_keep must be between 0 and the 4 channels, got 5",
            ),
            (
                "min_keep_negative",
                refuse_mass(min_keep=-1),
                ValueError,
                "min_keep must be between 0 and the 4 channels, got -1",
            ),
        )
    ),
    *(
        Refusal(
            f"mass_mask_score_{value}_{mode}_{mass}",
            refuse_mass(scores_with(value), mass, mode),
            ValueError,
            f"mass_mask: scores must be finite and non-negative, got {value:g} for sample 1, channel 3",
            data=True,
        )
        for value in (torch.nan, torch.inf, -torch.inf, -2.5)
        for mode, mass in (("mass", 0.5), ("mass", 1.0), ("mass", -1.0), ("uniform", 0.5))
    ),
    *(
        Refusal(f"gate_head_{name}", call, error, f"gate_head: {sentence}")
        for name, call, error, sentence in (
            ("rank", refuse_head(pooled=ones(4)), ValueError, "pooled must have shape [N, in_features], got [4]"),
            (
                "integer",
                refuse_head(pooled=integers(2, 4)),
                TypeError,
                "pooled must be a floating-point tensor, got torch.int64",
            ),
            (
                "weight",
                refuse_head(weight=ones(6, 5)),
                ValueError,
                "weight must have shape [out_channels, 4], got [6, 5]",
            ),
            (
                "weight_rank",
                refuse_head(weight=ones(6)),
                ValueError,
                "weight must have shape [out_channels, 4], got [6]",
            ),
            ("bias", refuse_head(bias=ones(5)), ValueError, "bias must have shape [6], got [5]"),
            (
                "dtypes",
                refuse_head(weight=ones(6, 4, dtype=torch.float16)),
                TypeError,
                "weight must have the dtype of pooled (torch.float32), got torch.float16",
            ),
            ("min_keep", refuse_head(min_keep=7), ValueError, "min_keep must be between 0 and the 6 channels, got 7"),
            ("min_keep_float", refuse_head(min_keep=1.5), TypeError, "min_keep must be an integer, got 1.5"),
            ("no_weight", refuse_head(weight=None), TypeError, "weight must be a tensor, got NoneType"),
            ("bias_list", refuse_head(bias=[0.0] * 6), TypeError, "bias must be a tensor, got list"),
        )
    ),
    *(
        Refusal(f"gated_norm_act_{name}", call, error, f"gated_norm_act: {sentence}")
        for name, call, error, sentence in (
            ("rank", refuse_norm(input=ones(2, 4, 3)), ValueError, "input must have shape [N, C, H, W], got [2, 4, 3]"),
            (
                "integer",
                refuse_norm(input=integers(2, 4, 3, 3)),
                TypeError,
                "input must be a floating-point tensor, got torch.int64",
            ),
            (
                "integer_weight",
                refuse_norm(weight=integers(4)),
                TypeError,
                "weight must be a floating-point tensor, got torch.int64",
            ),
            ("weight", refuse_norm(weight=ones(5)), ValueError, "weight must have shape [4], got [5]"),
            ("bias", refuse_norm(bias=ones(4, 1)), ValueError, "bias must have shape [4], got [4, 1]"),
            (
                "running_mean",
                refuse_norm(running_mean=ones(3)),
                ValueError,
                "running_mean must have shape [4], got [3]",
            ),
            ("running_var", refuse_norm(running_var=ones(3)), ValueError, "running_var must have shape [4], got [3]"),
            (
                "one_value",
                refuse_norm(input=ones(1, 4, 1, 1)),
                ValueError,
                "training needs more than one value per channel, got input [1, 4, 1, 1]",
            ),
            (
                "no_statistics",
                refuse_norm(training=False),
                ValueError,
                "running_mean and running_var must be given when training is False, got None",
            ),
            (
                "residual",
                refuse_norm(residual=ones(2, 4, 3, 1)),
                ValueError,
                "residual must have shape [2, 4, 3, 3], got [2, 4, 3, 1]",
            ),
            (
                "residual_dtype",
                refuse_norm(residual=ones(2, 4, 3, 3, dtype=torch.bfloat16)),
                TypeError,
                "residual must have the dtype of input (torch.float32), got torch.bfloat16",
            ),
            ("mask", refuse_norm(mask=ones(4, 2)), ValueError, "mask must have shape [2, 4], got [4, 2]"),
            (
                "mask_grad",
                refuse_norm(mask=lambda: torch.ones(2, 4, requires_grad=True)),
                ValueError,
                "mask must not require grad: no gradient passes the gate",
            ),
            ("activation", refuse_norm(activation="gelu"), ValueError, ACTIVATION),
            ("eps", refuse_norm(eps=-1e-5), ValueError, "eps must not be negative, got -1e-05"),
            ("eps_nan", refuse_norm(eps=torch.nan), ValueError, "eps must not be negative, got nan"),
            ("no_weight", refuse_norm(weight=None, bias=None), TypeError, "weight must be a tensor, got NoneType"),
            ("no_bias", refuse_norm(bias=None), TypeError, "bias must be a tensor, got NoneType"),
            (
                "integer_statistics",
                refuse_norm(running_var=integers(4)),
                TypeError,
                "running_var must be a floating-point tensor, got torch.int64",
            ),
        )
    ),
    *(
        Refusal(f"gated_conv2d_{name}", call, error, f"gated_conv2d: {sentence}")
        for name, call, error, sentence in (
            ("rank", refuse_conv(input=ones(4, 5, 5)), ValueError, "input must have shape [N, C, H, W], got [4, 5, 5]"),
            (
                "integer",
                refuse_conv(input=integers(2, 4, 5, 5)),
                TypeError,
                "input must be a floating-point tensor, got torch.int64",
            ),
            (
                "weight_rank",
                refuse_conv(weight=ones(6, 4)),
                ValueError,
                "weight must have shape [out, in / groups, kh, kw], got [6, 4]",
            ),
            (
                "channels",
                refuse_conv(input=ones(2, 3, 5, 5)),
                ValueError,
                "input must have 4 channels (weight, groups), got [2, 3, 5, 5]",
            ),
            ("groups_zero", refuse_conv(groups=0), ValueError, "groups must be at least 1, got 0"),
            ("groups_divide", refuse_conv(groups=4), ValueError, "groups must divide the 6 output channels, got 4"),
            (
                "groups_channels",
                refuse_conv(groups=2),
                ValueError,
                "input must have 8 channels (weight, groups), got [2, 4, 5, 5]",
            ),
            (
                "compact_slots",
                refuse_conv(input=ones(2, 5, 5, 5), compact_input=True),
                ValueError,
                "a compact input has at most 4 channels (weight, groups), got [2, 5, 5, 5]",
            ),
            ("bias", refuse_conv(bias=ones(4)), ValueError, "bias must have shape [6], got [4]"),
            ("stride", refuse_conv(stride=0), ValueError, "stride must be two integers >= 1, got [0, 0]"),
            *(
                (f"{name}_{value}", refuse_conv(**{name: value}), TypeError, f"{name} must be {what}, got {value!r}")
                for name, value, what in (
                    ("stride", 1.5, "an integer or a sequence of integers"),
                    ("stride", None, "an integer or a sequence of integers"),
                    ("padding", "same", "an integer or a sequence of integers"),
                    ("dilation", (1, 1.5), "an integer or a sequence of integers"),
                    ("groups", 2.0, "an integer"),
                    ("compact_output", 1.5, "an integer"),
                )
            ),
            ("bias_list", refuse_conv(bias=[0.0] * 6), TypeError, "bias must be a tensor, got list"),
            ("padding", refuse_conv(padding=(0, -1)), ValueError, "padding must be two integers >= 0, got [0, -1]"),
            (
                "dilation",
                refuse_conv(dilation=(1, 2, 3)),
                ValueError,
                "dilation must be two integers >= 1, got [1, 2, 3]",
            ),
            (
                "index_dtype",
                refuse_conv(in_index=integers(2, 4)),
                TypeError,
                "in_index must be int32 (as compact returns it), got torch.int64",
            ),
            (
                "count_dtype",
                refuse_conv(out_count=integers(2)),
                TypeError,
                "out_count must be int32 (as compact returns it), got torch.int64",
            ),
            (
                "index_shape",
                refuse_conv(out_index=ones(2, 4, dtype=torch.int32)),
                ValueError,
                "out_index must have shape [2, 6], got [2, 4]",
            ),
            (
                "count_shape",
                refuse_conv(in_count=ones(3, dtype=torch.int32)),
                ValueError,
                "in_count must have shape [2], got [3]",
            ),
            ("activation", refuse_conv(activation="gelu"), ValueError, ACTIVATION),
            (
                "no_pixels",
                refuse_conv(input=ones(2, 4, 2, 5)),
                ValueError,
                "the output would have no pixels ([0, 3]) for input [2, 4, 2, 5], weight [6, 4, 3, 3]",
            ),
            (
                "residual",
                refuse_conv(residual=ones(2, 6, 5, 5)),
                ValueError,
                "residual must have shape [2, 6, 3, 3], got [2, 6, 5, 5]",
            ),
            (
                "compact_output",
                refuse_conv(compact_output=7),
                ValueError,
                "compact_output must be between 0 and the 6 channels, got 7",
            ),
            (
                "dtypes",
                refuse_conv(weight=ones(6, 4, 3, 3, dtype=torch.float16)),
                TypeError,
                "weight must have the dtype of input (torch.float32), got torch.float16",
            ),
        )
    ),
    Refusal(
        "gated_conv2d_too_many",
        refuse_conv(
            out_index=lambda: torch.arange(6, dtype=torch.int32).repeat(2, 1),
            out_count=lambda: torch.tensor([2, 5], dtype=torch.int32),
            compact_output=3,
        ),
        ValueError,
        "gated_conv2d: compact_output must hold every sample's channels (5), got 3",
        data=True,
    ),
    *(
        Refusal(f"gated_linear_{name}", call, error, f"gated_linear: {sentence}")
        for name, call, error, sentence in (
            ("rank", refuse_linear(input=ones(4)), ValueError, "input must have shape [N, in_features], got [4]"),
            (
                "integer",
                refuse_linear(weight=integers(6, 4)),
                TypeError,
                "weight must be a floating-point tensor, got torch.int64",
            ),
            (
                "weight",
                refuse_linear(weight=ones(6, 3)),
                ValueError,
                "weight must have shape [out_features, 4], got [6, 3]",
            ),
            ("bias", refuse_linear(bias=ones(4)), ValueError, "bias must have shape [6], got [4]"),
            (
                "index_dtype",
                refuse_linear(out_index=integers(2, 6)),
                TypeError,
                "out_index must be int32 (as compact returns it), got torch.int64",
            ),
            (
                "index_shape",
                refuse_linear(in_index=ones(2, 6, dtype=torch.int32)),
                ValueError,
                "in_index must have shape [2, 4], got [2, 6]",
            ),
            ("activation", refuse_linear(activation="gelu"), ValueError, ACTIVATION),
            (
                "dtypes",
                refuse_linear(bias=ones(6, dtype=torch.float64)),
                TypeError,
                "bias must have the dtype of input (torch.float32), got torch.float64",
            ),
        )
    ),
]


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("bad", [99, "one too far", -1])
@pytest.mark.parametrize("which", ["in_index", "out_index"])
@pytest.mark.parametrize("call", [refuse_conv, refuse_linear], ids=["gated_conv2d", "gated_linear"])
def test_an_index_outside_is_an_error_and_no_stray_access(call: Any, which: str, bad: int | str) -> None:
    channels = {"in_index": 4, "out_index": 6}[which]
    index = torch.zeros(2, channels, dtype=torch.int32)
    index[1, 0] = channels if isinstance(bad, str) else bad
    with pytest.raises(ValueError, match=f"{which} must hold ascending channels below {channels}"):
        call(**{which: index})()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "reference"])
@pytest.mark.parametrize("name", ["gated_conv2d", "gated_linear"])
@pytest.mark.parametrize(
    ("argument", "value", "sentence"),
    [
        (
            "in_index",
            [[3, 2, -1, -1]] * 2,
            "in_index must hold ascending channels below 4, got 2 at slot 1 of sample 0",
        ),
        ("in_index", [[0, 1, 2, 3], [1, 1, 2, 3]], "in_index must hold ascending channels below 4, got 1 at slot 1 of"),
        (
            "in_index",
            [[0, 4, -1, -1]] * 2,
            "in_index must hold ascending channels below 4, got 4 at slot 1 of sample 0",
        ),
        ("in_count", [7, 1], "in_count must be between 0 and 4, got 7 for sample 0"),
        ("out_count", [2, -1], "out_count must be between 0 and 6, got -1 for sample 1"),
    ],
)
def test_kernel_and_reference_refuse_the_same_selections(
    name: str, argument: str, value: Any, sentence: str, dtype: torch.dtype
) -> None:
    shapes = {"input": (2, 4), "weight": (6, 4)}
    if name == "gated_conv2d":
        shapes = {"input": (2, 4, 5, 5), "weight": (6, 4, 3, 3)}
    good = {
        "in_index": [[0, 1, 2, 3]] * 2,
        "in_count": [2, 2],
        "out_index": [[0, 1, 2, 3, 4, 5]] * 2,
        "out_count": [6, 2],
    }
    selection = {k: torch.tensor(v, dtype=torch.int32) for k, v in (good | {argument: value}).items()}
    arguments = {k: torch.ones(shape, dtype=dtype) for k, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"^{name}: {sentence}"):
        getattr(ops, name)(bias=None, **arguments, **selection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "reference"])
def test_a_compact_input_holds_every_channel(dtype: torch.dtype) -> None:
    call = refuse_conv(
        input=ones(2, 2, 5, 5, dtype=dtype),
        weight=ones(6, 4, 3, 3, dtype=dtype),
        bias=None,
        in_index=lambda: torch.arange(4, dtype=torch.int32).repeat(2, 1),
        in_count=lambda: torch.tensor([1, 3], dtype=torch.int32),
        compact_input=True,
    )
    with pytest.raises(
        ValueError, match=r"^gated_conv2d: a compact input must hold every sample's channels \(3\), got"
    ):
        call()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (refuse_conv, ("bias", "in_index", "in_count", "out_index", "out_count")),
        (refuse_linear, ("weight", "in_index", "in_count", "out_index", "out_count")),
        (refuse_norm, ("weight", "bias", "running_mean", "running_var", "mask")),
    ],
)
def test_all_tensors_lie_on_one_device(call: Any, names: tuple[str, ...]) -> None:
    shapes = {"bias": 6, "weight": (6, 4), "mask": (2, 4), "running_mean": 4, "running_var": 4}
    shapes |= {"weight": 4, "bias": 4} if call is refuse_norm else {}
    for name in names:
        there = selection_arguments().get(name, torch.ones(shapes.get(name, 1))).to("meta")
        with pytest.raises(ValueError, match=rf"{name} must be on the device of input \(cpu\), got meta"):
            call(**{name: there})()


SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "even": lambda u: u,
    "wide": lambda u: torch.exp(20 * (u - 0.5)),
    "wider than fp32": lambda u: torch.exp(80 * (u - 0.5)),  # sums of these depend on their order
    "ties": lambda u: (4 * u).round(),
    "sparse": lambda u: u * (u > 0.7),
    "equal": lambda u: torch.full_like(u, 0.3),
    "huge": lambda u: 1e30 * u,
    "denormal": lambda u: 1e-38 * u,
}


@pytest.mark.parametrize("spread", SPREADS)
def test_mass_mask_is_the_reference_to_the_bit(spread: str) -> None:
    rand = Random(spread)
    for columns in (1, 7, 64, 300):
        scores = SPREADS[spread](rand.uniform(5, columns))
        for mass in (1.0, 0.99999999, 0.95, 0.5, 0.05, -1.0):
            for min_keep in (0, 1, min(3, columns)):
                args = (scores, mass, "mass", min_keep)
                expected = OPERATORS["mass_mask"].reference(*args)
                assert torch.equal(ops.mass_mask(*args), expected), (columns, mass, min_keep)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_a_gradient_that_is_not_finite_stops_at_a_clamped_output(activation: str) -> None:
    x = torch.tensor([torch.nan, -1.0, 0.0, 1.0, 6.0, 7.0]).repeat(3).requires_grad_()
    y = getattr(F, activation)(x)
    grad = torch.tensor([1.0, torch.inf, torch.nan]).repeat_interleave(6)
    (expected,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(gating._activation_grad(grad, y, activation), expected, equal_nan=True, rtol=0, atol=0)


def on_cpu(name: str) -> list[Any]:
    """The ways to compute an operator on CPU tensors, Triton's interpreter among them, as parameters of a test."""
    return [pytest.param(p, id=p.name) for p in providers(OPERATORS[name]) if p.device == "cpu"]


@pytest.mark.parametrize("call", on_cpu("gated_norm_act_backward"))
def test_a_gradient_passes_where_the_output_is_nan(call: Callable[..., Any]) -> None:
    output = torch.tensor([torch.nan, 0.0, 2.0, 0.0]).reshape(1, 1, 2, 2)
    grad, input, one = torch.ones_like(output), torch.arange(4.0).reshape(1, 1, 2, 2), torch.ones(1)
    residual = call(grad, output, input, one, torch.zeros(1), one, None, "relu", False, True, 0.0)[3]
    assert residual.flatten().tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("call", on_cpu("channel_pool_backward"))
def test_the_first_nan_gets_the_gradient_of_a_maximum(call: Callable[..., Any]) -> None:
    x = torch.tensor([1.0, torch.nan, 3.0, torch.nan, 0.0, 2.0]).reshape(1, 1, 2, 3)
    for channels in (x, x.repeat(2, 9, 1, 1).contiguous(memory_format=torch.channels_last)):
        expected = torch.zeros_like(channels)
        expected[:, :, 0, 1] = 5
        assert torch.equal(call(torch.full(channels.shape[:2], 5.0), channels, "max")[0], expected)


@pytest.mark.parametrize("call", on_cpu("gate_head"))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_logit_that_is_nan_fills_up_first_and_is_not_positive(call: Callable[..., Any], sign: float) -> None:
    nan = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
    weight = torch.tensor([[nan], [1.0], [-1.0]])
    for min_keep, expected in {0: [0, 1, 0], 1: [0, 1, 0], 2: [1, 1, 0], 3: [1, 1, 1]}.items():
        assert call(torch.ones(1, 1), weight, None, False, min_keep)[1].int().tolist() == [expected], min_keep


def test_a_tap_beyond_the_padding_reads_nothing() -> None:
    """Ten million columns away there is no memory to read."""
    far = 10_000_000
    x, w = torch.ones(1, 1, 4, 8), torch.ones(2, 1, 1, 3)
    both, one = compaction(torch.ones(1, 2, dtype=torch.bool)), compaction(torch.ones(1, 1, dtype=torch.bool))
    y = ops.gated_conv2d(x, w, None, *one, *both, padding=(0, far), dilation=(1, far))
    torch.testing.assert_close(y, torch.ones(1, 2, 4, 8))


@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize("view", ["channels", "rows", "one channel"])
def test_views_of_channels_last_maps_keep_to_the_fake(view: str, keep: float) -> None:
    """Which format a view has is ambiguous; kernel, reference and fake have to agree."""
    rand = Random("views")
    last = rand.normal(8, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    x = {"channels": last.chunk(2, 1)[0], "rows": last[:, :, ::2], "one channel": last[:, :1]}[view]
    ci = x.shape[1]
    ins = compaction(torch.ones(8, ci, dtype=torch.bool))
    outs = compaction(torch.arange(12).expand(8, 12) < 12 * keep)
    args = (x, rand.normal(12, ci, 3, 3), None, None, *ins, *outs, [1, 1], [1, 1], [1, 1], 1, "relu", True, False, 0)
    operator = torch.ops.cofire.gated_conv2d
    assert operator.default(*args).stride() == operator.reference(*args).stride()
    torch.library.opcheck(operator.default, args, test_utils="test_faketensor")


# ------------------------------------------------------------------------------------- golden vectors and laws


@pytest.mark.parametrize(
    ("row", "mass", "expected"),
    [
        (GOLDEN, 0.95, [1, 1, 0, 1, 0, 1, 0]),
        (GOLDEN, 0.80, [1, 1, 0, 1, 0, 0, 0]),
        ([1.0, 1.0, 0.0, 0.0], 0.99999999, [1, 1, 1, 1]),  # not 1, though it rounds to it in fp32
        (GOLDEN, 0.30, [0, 0, 0, 1, 0, 0, 0]),  # the largest share alone is .302: nothing fits, min_keep fills up
        (GOLDEN, 1.0, [1, 1, 1, 1, 1, 1, 1]),
        ([0.0, 2.0, 0.0, 2.0], 1.0, [0, 1, 0, 1]),
        ([0.0, 2.0, 0.0, 2.0], 0.5, [0, 1, 0, 0]),  # of equals the lower index
        ([0.0, 0.0, 0.0, 0.0], 0.9, [1, 0, 0, 0]),
        ([0.0, 0.0, 0.0, 0.0], 1.0, [1, 0, 0, 0]),
        (GOLDEN, -1.0, [1, 1, 1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_mass_mask(row: list[float], mass: float, expected: list[int], dtype: torch.dtype) -> None:
    assert ops.mass_mask(torch.tensor([row], dtype=dtype), mass).int().tolist() == [expected]


def test_golden_min_keep_zero() -> None:
    assert ops.mass_mask(torch.tensor([GOLDEN]), 0.3, min_keep=0).sum() == 0
    assert ops.mass_mask(torch.zeros(1, 4), 0.9, min_keep=0).sum() == 0


def test_golden_uniform() -> None:
    row = torch.tensor(
        [[5.0, 1.0, 0.0, 1.0, 3.0, 4.0]]
    )  # int(.5 * 6) = 3 go: 0, and of the ones first the higher index
    assert ops.mass_mask(row, 0.5, "uniform").int().tolist() == [[1, 0, 0, 0, 1, 1]]
    assert ops.mass_mask(row, 0.34, "uniform").int().tolist() == [[1, 1, 0, 0, 1, 1]]
    assert ops.mass_mask(row, 0.0, "uniform").int().tolist() == [[1, 1, 0, 1, 1, 1]]


def test_golden_gate_head() -> None:
    """softmax([ln 3, 0]) = [.75, .25]."""
    pooled = torch.tensor([[3.0, 1.0]]).log()
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [4.0, 0.0], [0.0, -4.0]])
    logits, mask, index, count = ops.gate_head(pooled, weight, torch.tensor([0.0, 0.0, -4.0, 3.0]))
    torch.testing.assert_close(logits, torch.tensor([[0.5, -0.5, -1.0, 2.0]]))
    assert (mask.int().tolist(), index.tolist(), count.tolist()) == ([[1, 0, 0, 1]], [[0, 3, -1, -1]], [2])


def test_golden_max_gradient_takes_the_first_of_equals() -> None:
    input = torch.tensor([[[[1.0, 3.0], [3.0, 3.0]]]], requires_grad=True)
    ops.channel_pool(input, "max")[0].backward(torch.tensor([[5.0]]))
    assert input.grad is not None
    assert input.grad.tolist() == [[[[0.0, 5.0], [0.0, 0.0]]]]


def kept_by_hand(row: list[float], mass: float, min_keep: int) -> list[bool]:
    """The rule of mass_mask in fp64, one channel after the other."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    total, taken, kept = sum(row), 0.0, [False] * len(row)
    for rank, i in enumerate(order):
        taken += row[i] / total if total else 0.0
        fits = total > 0 and (row[i] / total > 1e-5 if mass == 1 else taken - mass <= 1e-5)
        kept[i] = fits or rank < min_keep
    return kept


rows = st.lists(st.integers(0, 1000), min_size=1, max_size=70).map(lambda row: [v / 8 for v in row])
masses = st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.9, 0.95])


def away_from_threshold(row: list[float], mass: float) -> bool:
    """No running share within fp32's reach of the threshold (it lies 1e-5 above ``mass``)."""
    total, taken = sum(row), 0.0
    for value in sorted(row, reverse=True):
        taken += value / total if total else 0.0
        if abs(taken - mass - 1e-5) < 2e-6:
            return False
    return True


@given(rows, masses, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_mass_mask_follows_the_rule(row: list[float], mass: float, min_keep: int) -> None:
    assume(min_keep <= len(row) and away_from_threshold(row, mass))
    assert ops.mass_mask(torch.tensor([row]), mass, min_keep=min_keep)[0].tolist() == kept_by_hand(row, mass, min_keep)


@given(rows, masses)
@settings(max_examples=100, deadline=None)
def test_mass_mask_keeps_at_most_the_mass(row: list[float], mass: float) -> None:
    values = torch.tensor([row])
    mask = ops.mass_mask(values, mass)
    share = (values * mask).sum().item() / (values.sum().item() or 1)
    assert mask.sum() >= 1
    assert share <= mass + 2e-5 or mask.sum() == 1


@given(rows, masses, masses)
@settings(max_examples=100, deadline=None)
def test_mass_mask_grows_with_the_mass(row: list[float], a: float, b: float) -> None:
    values = torch.tensor([row])
    less, more = ops.mass_mask(values, min(a, b)), ops.mass_mask(values, max(a, b))
    assert bool((less <= more).all())


@given(rows, masses, st.integers(-20, 20))
@settings(max_examples=100, deadline=None)
def test_mass_mask_does_not_depend_on_the_scale(row: list[float], mass: float, exponent: int) -> None:
    values = torch.tensor([row])
    assert torch.equal(ops.mass_mask(values, mass), ops.mass_mask(values * 2.0**exponent, mass))


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=70, unique=True), masses, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_mass_mask_follows_a_permutation(row: list[int], mass: float, random: Any) -> None:
    values = torch.tensor([row], dtype=torch.float32)
    order = list(range(len(row)))
    random.shuffle(order)
    assert torch.equal(ops.mass_mask(values, mass)[:, order], ops.mass_mask(values[:, order], mass))


@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_gate_head_keeps_the_positive_or_the_largest(n: int, c: int, min_keep: int, seed: int) -> None:
    assume(min_keep <= c)
    rand = Random(str(seed))
    logits, mask, index, count = ops.gate_head(
        rand.normal(n, 3), rand.normal(c, 3), rand.normal(c) - 2, min_keep=min_keep
    )
    assert bool((mask | (logits <= 0)).all())
    assert torch.equal(mask.sum(1), (logits > 0).sum(1).clamp(min=min_keep))
    assert bool((logits.masked_fill(~mask, -torch.inf).amax(1) >= logits.amax(1))[count > 0].all())
    assert torch.equal(gating.mask_from_index(index, count, c), mask)


# ------------------------------------------------------------------------------ against an independent formula
# In fp64, where a kernel hands over to the reference: this is the test of the references themselves.


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_channel_pool_is_adaptive_pooling(mode: str) -> None:
    input = Random("pool").normal(3, 5, 4, 7).double().requires_grad_()
    grad = Random("pool grad").normal(3, 5).double()
    theirs = (F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d)(input, 1).flatten(1)
    ours = ops.channel_pool(input, mode)[0]
    assert_same(ours, theirs)
    assert_same(torch.autograd.grad(ours, input, grad)[0], torch.autograd.grad(theirs, input, grad)[0])


@pytest.mark.parametrize("softmax", [True, False])
def test_gate_head_is_softmax_and_linear(softmax: bool) -> None:
    rand = Random("head")
    leaves = [rand.normal(*shape).double().requires_grad_() for shape in ((3, 5), (7, 5), (7,))]
    grad = rand.normal(3, 7).double()
    pooled, weight, bias = leaves
    theirs = F.linear(F.softmax(pooled, 1) if softmax else pooled, weight, bias)
    ours = ops.gate_head(*leaves, softmax=softmax)[0]
    assert_same(ours, theirs)
    assert_same(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6"])
def test_gated_norm_act_is_batch_norm_and_a_gate(activation: str, training: bool) -> None:
    input, weight, bias, mean, var, residual, mask, *_ = (
        a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in norm(3, 5, 4, 7, residual=True, gain=4.0)(Random("norm"))
    )
    leaves = [x.requires_grad_() for x in (input, weight, bias, residual)]
    act = {"identity": lambda x: x, "relu": F.relu, "relu6": F.relu6}[activation]
    u = act(F.batch_norm(input, mean.clone(), var.clone(), weight, bias, training=training, eps=1e-5) + residual)
    theirs = u * mask[:, :, None, None]
    ours, peak, ours_mean, ours_var = ops.gated_norm_act(
        input, weight, bias, mean, var, residual=residual, mask=mask, activation=activation, training=training
    )
    assert_same(ours, theirs)
    assert_same(peak, u.abs().amax((2, 3)).detach())
    assert_same(ours_mean, (input.mean((0, 2, 3)) if training else mean).detach())
    assert_same(ours_var, (input.var((0, 2, 3), correction=0) if training else var).detach())
    grad = Random("norm grad").normal(*input.shape).double()
    assert_same(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad))
    assert not any(x.requires_grad for x in (peak, ours_mean, ours_var))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6"])
def test_gated_conv2d_is_a_masked_convolution(activation: str, groups: int) -> None:
    rand = Random(f"conv {groups}")
    leaves = [
        rand.normal(*s).double().requires_grad_() for s in ((3, 6, 7, 8), (12, 6 // groups, 3, 2), (12,), (3, 12, 4, 4))
    ]
    input, weight, bias, residual = leaves
    in_mask, out_mask = rand.mask(3, 6), rand.mask(3, 12)
    act = {"identity": lambda x: x, "relu": F.relu, "relu6": F.relu6}[activation]
    dense = F.conv2d(input * in_mask[:, :, None, None], weight, bias, (2, 2), (1, 1), (1, 2), groups)
    theirs = act(dense + residual) * out_mask[:, :, None, None]
    ours = ops.gated_conv2d(
        input,
        weight,
        bias,
        *compaction(in_mask),
        *compaction(out_mask),
        residual=residual,
        stride=2,
        padding=1,
        dilation=(1, 2),
        groups=groups,
        activation=activation,
    )
    assert_same(ours, theirs)
    grad = rand.normal(*theirs.shape).double()
    assert_same(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gated_conv2d_compact_is_dense_in_other_places(dtype: torch.dtype) -> None:
    rand = Random("compact")
    input, weight = rand.normal(3, 9, 6, 5).to(dtype), rand.normal(11, 9, 3, 3).to(dtype)
    in_index, in_count = compaction(rand.mask(3, 9))
    out_index, out_count = compaction(rand.mask(3, 11))
    selection = (in_index, in_count, out_index, out_count)
    dense = ops.gated_conv2d(input, weight, None, *selection, padding=1)
    slots = int(in_count.max())
    compact_input = torch.full((3, slots, 6, 5), torch.nan, dtype=dtype)
    for n in range(3):
        active = in_index[n, : in_count[n]].long()
        compact_input[n, : len(active)] = input[n, active]
    compact = ops.gated_conv2d(
        compact_input, weight, None, *selection, padding=1, compact_input=True, compact_output=int(out_count.max())
    )
    for n in range(3):
        active = out_index[n, : out_count[n]].long()
        torch.testing.assert_close(compact[n, : len(active)], dense[n, active])
        assert not compact[n, len(active) :].any()


def test_gated_linear_is_a_masked_linear() -> None:
    rand = Random("linear")
    leaves = [rand.normal(*s).double().requires_grad_() for s in ((5, 7), (9, 7), (9,))]
    in_mask, out_mask = rand.mask(5, 7), rand.mask(5, 9)
    input, weight, bias = leaves
    theirs = F.relu(F.linear(input * in_mask, weight, bias)) * out_mask
    ours = ops.gated_linear(*leaves, *compaction(in_mask), *compaction(out_mask), activation="relu")
    assert_same(ours, theirs)
    grad = rand.normal(5, 9).double()
    assert_same(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad))


# --------------------------------------------------------------------------------------------- dispatch rules


@pytest.mark.skipif(native.STATUS.variant is None, reason=f"no compiled kernels: {native.STATUS.reason}")
@pytest.mark.parametrize(("keep", "words"), [(1.0, "library convolution"), (0.3, "computes the active channels")])
def test_explain_says_what_the_convolution_does(keep: float, words: str) -> None:
    """The words come from the rule itself, and the profiler sees the library's convolution or does not."""
    rand = Random("explain")
    x, w = rand.normal(8, 64, 7, 7), rand.normal(64, 64, 3, 3)
    selection = compaction(torch.arange(64).expand(8, 64) < 64 * keep)

    def call() -> Tensor:
        return ops.gated_conv2d(x, w, None, *selection, *selection, padding=1)

    (told,) = explain(call)
    assert told["operator"] == "gated_conv2d" and words in told["kernel"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    used_library = any(event.key == "aten::conv2d" for event in seen.key_averages())
    assert used_library == ("library" in words)


@pytest.mark.skipif(native.STATUS.variant is None, reason=f"no compiled kernels: {native.STATUS.reason}")
@pytest.mark.parametrize(("keep", "words"), [(1.0, "library GEMM"), (0.3, "computes the active outputs")])
def test_explain_says_what_the_linear_layer_does(keep: float, words: str) -> None:
    rand = Random("explain")
    selection = compaction(torch.arange(64).expand(1, 64) < 64 * keep)
    (told,) = explain("gated_linear", rand.normal(1, 64), rand.normal(64, 64), None, *selection, *selection)
    assert words in told["kernel"]


# ------------------------------------------------------------------------------------------- public functions


def test_public_functions_compile_into_one_graph() -> None:
    """The whole chain of a gated layer, validation included, forward and backward."""

    def layer(x: Tensor, w: Tensor, g: Tensor, b: Tensor, head: Tensor) -> Tensor:
        pooled, in_index, in_count = ops.channel_pool(x, "max")
        logits, mask, out_index, out_count = ops.gate_head(pooled, head, None, min_keep=1)
        y = ops.gated_conv2d(x, w, None, in_index, in_count, out_index, out_count, padding=1)
        z, peak, _, _ = ops.gated_norm_act(y, g, b, mask=mask)
        target = ops.mass_mask(peak, 0.9)
        index, count = ops.compact(target)
        return (
            z.sum()
            + F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))
            + (index.sum() + count.sum()) * 0
        )

    rand = Random("layer")
    leaves = [rand.normal(*s).requires_grad_() for s in ((2, 5, 6, 6), (7, 5, 3, 3), (7,), (7,), (7, 5))]
    eager = layer(*leaves)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves))


def test_examples() -> None:
    check_examples(gating)
