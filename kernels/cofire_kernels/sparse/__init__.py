# SPDX-License-Identifier: Apache-2.0
"""Products with masked and compressed weights: launchers with the arguments of the operators."""

from cofire_kernels.sparse.masked import (
    apply_mask,
    masked_linear,
    masked_linear_backward,
    masked_linear_backward_plan,
    masked_linear_plan,
)
from cofire_kernels.sparse.product import (
    sddmm,
    sddmm_plan,
    spmm,
    spmm_backward,
    spmm_backward_plan,
    spmm_plan,
)
from cofire_kernels.sparse.product_cuda import spmm_cuda, spmm_cuda_plan

__all__ = [
    "apply_mask",
    "masked_linear",
    "masked_linear_backward",
    "masked_linear_backward_plan",
    "masked_linear_plan",
    "sddmm",
    "sddmm_plan",
    "spmm",
    "spmm_backward",
    "spmm_backward_plan",
    "spmm_cuda",
    "spmm_cuda_plan",
    "spmm_plan",
]
