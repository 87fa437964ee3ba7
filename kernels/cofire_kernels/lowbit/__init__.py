# SPDX-License-Identifier: Apache-2.0
"""Products with weights of few bits: launchers with the arguments of the operators in ``cofire.ops.lowbit``."""

from cofire_kernels.lowbit.decode import dequantize, dequantize_plan
from cofire_kernels.lowbit.fake_quantize import (
    fake_quantize_affine,
    fake_quantize_affine_backward,
    fake_quantize_affine_backward_plan,
    fake_quantize_affine_plan,
    fake_quantize_group,
    fake_quantize_group_plan,
    fake_quantize_lsq,
    fake_quantize_lsq_backward,
    fake_quantize_lsq_backward_plan,
    fake_quantize_lsq_plan,
    fake_quantize_minmax,
    fake_quantize_minmax_backward,
    fake_quantize_minmax_backward_plan,
    fake_quantize_statsq,
)
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
from cofire_kernels.lowbit.product_cuda import qlinear_cuda, qlinear_cuda_plan

__all__ = [
    "dequantize",
    "dequantize_plan",
    "fake_quantize_affine",
    "fake_quantize_affine_backward",
    "fake_quantize_affine_backward_plan",
    "fake_quantize_affine_plan",
    "fake_quantize_group",
    "fake_quantize_group_plan",
    "fake_quantize_lsq",
    "fake_quantize_lsq_backward",
    "fake_quantize_lsq_backward_plan",
    "fake_quantize_lsq_plan",
    "fake_quantize_minmax",
    "fake_quantize_minmax_backward",
    "fake_quantize_minmax_backward_plan",
    "fake_quantize_statsq",
    "qlinear",
    "qlinear_backward",
    "qlinear_backward_plan",
    "qlinear_cuda",
    "qlinear_cuda_plan",
    "qlinear_plan",
    "qlora_linear",
    "qlora_linear_backward",
    "qlora_linear_backward_plan",
    "qlora_linear_plan",
    "sum_splits",
]
