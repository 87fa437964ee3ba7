# SPDX-License-Identifier: Apache-2.0
"""The operators of dynamic channel gating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Args, Random, Refusal, Sample, check_examples, check_op, refusals
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cofire import ops
from cofire.ops import gating
from cofire.registry import OPERATORS

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
        Sample(f"{mode}_cancelling", lambda rand: (torch.tensor([1.0, -1.0, 0.0, -0.0]).expand(1, 3, 4, 4).clone(), mode)),
        Sample(f"{mode}_one_tiny", lambda rand: (6e-8 * (torch.arange(63) == 62).float().expand(1, 2, 1, 63).clone(), mode)),
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
    *check_op("channel_pool", pool_samples("avg"), tiny=pool_tiny("avg")),
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
        for mode, value, k in (("mass", 0.5, 0), ("mass", 0.5, 1), ("mass", 1.0, 3), ("uniform", 0.5, 1), ("mass", -1.0, 0))
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
        mask |= torch.zeros_like(mask).scatter(1, logits.sort(dim=1, descending=True, stable=True).indices[:, :min_keep], True)
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
    "gate_head_backward", [head_backward(s) for s in GATE_HEAD_SAMPLES], tiny=[head_backward(s) for s in HEAD_TINY]
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
    Sample("relu6_eval_residual", norm(2, 7, 5, 3, activation="relu6", training=False, residual=True, gain=6.0), kink=True),
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
        input, weight, *rest = sample.make(rand)
        residual, mask, activation, training, eps = rest[3:]
        output, _, mean, var = OPERATORS["gated_norm_act"].reference(input, weight, *rest)
        grad = rand.normal(*input.shape)
        if poison:
            grad[~mask] = torch.nan
        return grad, output, input, weight, mean, var, mask, activation, training, residual is not None, eps

    return Sample(sample.name + ("_poisoned" if poison else ""), make, sample.full)


PARAMETERS = ["weight", "bias", "running_mean", "running_var"]
STATISTICS = ["running_mean", "running_var"]
GATED_NORM_ACT = [
    *check_op("gated_norm_act", [*NORM_SAMPLES, CONSTANT_INPUT], tiny=NORM_TINY, constants=STATISTICS, wide=PARAMETERS),
    *check_op("gated_norm_act", [], tiny=NORM_TINY_EVAL, constants=STATISTICS, wide=PARAMETERS),
    # parameters in 16 bits as well
    *check_op("gated_norm_act", [Sample("narrow_parameters", norm(2, 7, 5, 3))], tiny=(), constants=STATISTICS),
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
        used = torch.arange(slots) < in_count[:, None] if compact_input else gating.mask_from_index(in_index, in_count, ci)
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
    Sample("compact_both_residual", conv(3, 17, 19, (6, 5), compact_input=9, compact_output=11, residual=True), kink=True),
    Sample("compact_groups", conv(2, 12, 9, (6, 5), compact_input=7, compact_output=6, groups=3)),
    Sample("compact_depthwise", conv(2, 17, 17, (6, 5), compact_input=9, compact_output=9, groups=17)),
    Sample("compact_pointwise", conv(2, 17, 19, (6, 5), compact_input=9, compact_output=11, kernel=(1, 1), padding=(0, 0))),
    Sample("compact_none", conv(2, 7, 9, (4, 4), compact_input=3, compact_output=4, density=(NONE, NONE))),
    Sample("no_samples", conv(0, 7, 9, (4, 4))),
    Sample("one_pixel", conv(2, 7, 9, (1, 1))),
]
CONV_TINY = [
    Sample("tiny", conv(2, 3, 4, (3, 4), residual=True, density=(0.7, 0.7))),
    Sample("tiny_resized", conv(3, 5, 6, (4, 5), residual=True, density=(0.7, 0.7))),
]
COMPACT_CONV = dict(activation="identity", compact_input=2, compact_output=3, density=(0.7, 0.7))
CONV_TINY_COMPACT = [
    Sample("tiny_compact", conv(2, 4, 4, (3, 4), **COMPACT_CONV)),
    Sample("tiny_compact_resized", conv(3, 5, 6, (4, 5), **COMPACT_CONV)),
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
    *check_op("gated_conv2d", CONV_SAMPLES, tiny=CONV_TINY),
    *check_op("gated_conv2d", [], tiny=CONV_TINY_COMPACT),
]
GATED_CONV2D_BACKWARD = [
    *check_op("gated_conv2d_backward", [*map(conv_backward, CONV_SAMPLES)], tiny=[*map(conv_backward, CONV_TINY)], constants=["output"]),
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
