# SPDX-License-Identifier: Apache-2.0
"""Dynamic channel gating: launchers with the arguments of the operators in ``cofire.ops.gating``."""

from cofire_kernels.gating.channel_pool import channel_pool, channel_pool_backward
from cofire_kernels.gating.gate_head import gate_head
from cofire_kernels.gating.gated_conv2d import gated_conv2d
from cofire_kernels.gating.gated_linear import gated_linear
from cofire_kernels.gating.gated_norm_act import gated_norm_act, gated_norm_act_backward
from cofire_kernels.gating.mass_mask import mass_mask

__all__ = [
    "channel_pool",
    "channel_pool_backward",
    "gate_head",
    "gated_conv2d",
    "gated_linear",
    "gated_norm_act",
    "gated_norm_act_backward",
    "mass_mask",
]
