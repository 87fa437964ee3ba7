# SPDX-License-Identifier: Apache-2.0
"""A mixture of two linear experts: launchers with the arguments of the operators in ``cofire.ops.shift_add_mixture``."""

from cofire_kernels.shift_add_mixture.linear import moe2_linear, moe2_linear_backward
from cofire_kernels.shift_add_mixture.route import moe_route, moe_route_backward

__all__ = ["moe2_linear", "moe2_linear_backward", "moe_route", "moe_route_backward"]
