# SPDX-License-Identifier: Apache-2.0
"""Products with weights of few bits: launchers with the arguments of the operators in ``cofire.ops.lowbit``."""

from cofire_kernels.lowbit.decode import dequantize
from cofire_kernels.lowbit.product import qlinear, qlinear_backward, qlora_linear, qlora_linear_backward

__all__ = ["dequantize", "qlinear", "qlinear_backward", "qlora_linear", "qlora_linear_backward"]
