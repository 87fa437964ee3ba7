# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of products with powers of two, which are those of ``qlinear``: the linear layers of PVTv2-B0, and decoding."""

from __future__ import annotations

from typing import Any

from cofire.bench.cases import Case
from cofire.bench.lowbit import FLOAT, SQUARE, qlinear_case

#: Rows of the input, and the shape of the weight.
PVT = ((3136, (512, 64)), (3136, (64, 512)), (784, (1024, 128)), (784, (128, 1024)))


def _case(rows: int, shape: tuple[int, int], format: str, **options: Any) -> Case:
    return qlinear_case(rows, int(format[1]), None, shape=shape, format=format, **options)


CASES = [
    *(_case(1, SQUARE, f, dense_half=True) for f in ("S4", "S5")),
    *(_case(64, SQUARE, f) for f in ("S4", "S5")),
    *(
        _case(rows, shape, f, cold=False, quick=f == "S4" and (rows, shape) == PVT[2])
        for rows, shape in PVT
        for f in ("S4", "S5")
    ),
    *(_case(rows, shape, "S4", dtype=FLOAT, activations="int8", cold=False) for rows, shape in PVT),
    _case(1, SQUARE, "S4", activations="int8"),
]
