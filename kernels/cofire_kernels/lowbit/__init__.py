# SPDX-License-Identifier: Apache-2.0
"""Products with weights of few bits: launchers with the arguments of the operators in ``cofire.ops.lowbit``."""

from cofire_kernels.lowbit.decode import dequantize, dequantize_plan
from cofire_kernels.lowbit.product import (
    qlinear,
    qlinear_backward,
    qlinear_backward_plan,
    qlinear_plan,
    qlora_linear,
    qlora_linear_backward,
    qlora_linear_backward_plan,
    qlora_linear_plan,
    sum_splits,
)

__all__ = [
    "dequantize",
    "dequantize_plan",
    "qlinear",
    "qlinear_backward",
    "qlinear_backward_plan",
    "qlinear_plan",
    "qlora_linear",
    "qlora_linear_backward",
    "qlora_linear_backward_plan",
    "qlora_linear_plan",
    "sum_splits",
]
