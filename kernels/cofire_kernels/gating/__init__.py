# SPDX-License-Identifier: Apache-2.0
"""Dynamic channel gating: launchers with the arguments of the operators in ``cofire.ops.gating``."""

from cofire_kernels.gating.channel_pool import channel_pool, channel_pool_backward
from cofire_kernels.gating.gate_head import gate_head, gate_head_plan
from cofire_kernels.gating.gated_conv2d import gated_conv2d, gated_conv2d_plan
from cofire_kernels.gating.gated_linear import gated_linear, gated_linear_plan
from cofire_kernels.gating.gated_norm_act import gated_norm_act, gated_norm_act_backward
from cofire_kernels.gating.mass_mask import mass_mask, mass_mask_plan

__all__ = [
    "channel_pool",
    "channel_pool_backward",
    "gate_head",
    "gate_head_plan",
    "gated_conv2d",
    "gated_conv2d_plan",
    "gated_linear",
    "gated_linear_plan",
    "gated_norm_act",
    "gated_norm_act_backward",
    "mass_mask",
    "mass_mask_plan",
]
