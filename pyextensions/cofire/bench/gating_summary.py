# SPDX-License-Identifier: Apache-2.0
"""The family's own page: what was aimed at and what was found, from a results file."""

from __future__ import annotations

from cofire.bench.harness import ONE_THREAD
from cofire.bench.results import Results
from cofire.bench.targets import BOTH_WAYS, COLD, HOT, Find, Found, Index, Key, Target, faster, named, page, ratio

#: The ways to write it that take each sample by itself, or all as groups of one convolution.
NAIVE = ("peer:gather-out", "peer:gather-in-out", "peer:grouped")
MIDDLE = "B8 C256 14x14 keep {}"  #: stage 3 of ResNet-18 and -34
SHAPES = ("B1 C256 14x14", "B8 C256 14x14", "B32 C256 14x14", "B8 C64 56x56", "B8 C512 7x7")
LINEAR = "B1 4096x4096 keep in 0.5 out 0.5"
NORM, MASS = "128x256x16x16 training", "128x512 mass 0.95"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def _fp32(case: str, mode: str = HOT) -> Key:
    return case, "float32", mode


def _dense(case: str, mode: str = HOT, dtype: str = "float32") -> Find:
    return faster("dense", {"": (case, dtype, mode)})


def _naive(case: str) -> Find:
    """Against the fastest of :data:`NAIVE`."""

    def find(index: Index, _: Results) -> Found:
        rows = [row for name in NAIVE if (row := index.get((*_fp32(case), name))) is not None]
        best = min(rows, key=lambda r: float(r["median_ms"]), default=None)
        return named([("", ratio(best, index.get((*_fp32(case), "cofire"))))])

    return find


HALF_KEPT = {
    "14x14, 8 samples": (MIDDLE.format(0.5), "bfloat16", HOT),
    "4x4, cold weights": ("B1 C512 4x4 keep 0.5", "bfloat16", COLD),
    "pointwise": ("B1 C512 14x14 1x1 keep 0.5", "bfloat16", HOT),
    "14x14, 1 sample, 60 %": ("B1 C256 14x14 keep 0.6", "bfloat16", HOT),
    "linear": (LINEAR, "bfloat16", HOT),
    "linear, cold weights": (LINEAR, "bfloat16", COLD),
}
MOST_KEPT = {shape: _fp32(f"{shape} keep 0.9") for shape in SHAPES[:2]}
ALL_KEPT = {shape: _fp32(f"{shape} keep 1") for shape in SHAPES}
THREADS = {
    "gated_conv2d": _fp32(MIDDLE.format(0.5)),
    "gated_linear": _fp32(LINEAR),
    "gated_norm_act": _fp32(NORM),
    "channel_pool": _fp32("128x256x16x16 max"),
    "mass_mask": _fp32(MASS),
    "gate_head": _fp32("B128 512-512"),
}
TARGETS = (
    Target("3x3, 256 to 256 channels, 14x14, 8 samples, half kept, against dense", 2.4, "x", _dense(MIDDLE.format(0.5))),
    Target("the same, against the best naive way", 2, "x", _naive(MIDDLE.format(0.5))),
    Target("the same with 30 % kept, against dense", 8, "x", _dense(MIDDLE.format(0.3))),
    Target("the same with 30 % kept, against the best naive way", 4.5, "x", _naive(MIDDLE.format(0.3))),
    Target("VGG, 512 channels, 4x4, 1 sample, half kept, against dense", 1.8, "x", _dense("B1 C512 4x4 keep 0.5")),
    Target("MobileNet, pointwise, 512 channels, 14x14, 1 sample, half kept, against dense", 2, "x",
           _dense("B1 C512 14x14 1x1 keep 0.5")),
    Target("ResNet, 256 channels, 14x14, 1 sample, 60 % kept, cold weights, against dense", 1.5, "x",
           _dense("B1 C256 14x14 keep 0.6", COLD)),
    Target("linear, 4096x4096, 1 sample, half kept, against dense", 1.9, "x",
           faster("dense", {"": _fp32(LINEAR), "cold weights": _fp32(LINEAR, COLD)})),
    Target("90 % kept, against dense", 0.95, "x", faster("dense", MOST_KEPT)),
    Target("everything kept, against dense", None, "x", faster("dense", ALL_KEPT)),
    Target("half kept, bf16, against dense in bf16", None, "x", faster("dense", HALF_KEPT)),
    Target("training epilogue, 128x256x16x16, against eager", 2, "x",
           faster("eager", {"": _fp32(NORM), "forward and backward": _fp32(NORM, BOTH_WAYS)})),
    Target("mass_mask, 128x512, against eager", 5, "x", faster("eager", {"": _fp32(MASS)})),
    Target("the same, against the strongest plain torch", None, "x", faster("dense", {"": _fp32(MASS)})),
    Target("all threads, against one", None, "x", faster(ONE_THREAD, THREADS)),
)  # fmt: skip

summary = page(
    "gating",
    'A target that was missed is bold. "x": how many times as fast. fp32 and forward, unless stated; so many of the input and '
    "of the output channels are kept, of each sample its own. *Dense* is the fastest of plain convolution, channels_last and "
    "weights packed once by the library, with the mask applied in place; *naive* the fastest of two gather loops and a grouped "
    "convolution, of which each has listed the channels before time counts; *eager* is the method as its code has it.",
    TARGETS,
)
