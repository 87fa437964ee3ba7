# SPDX-License-Identifier: Apache-2.0
"""Modules, constructed like their ``torch.nn`` counterparts, one file per family."""

from cofire.nn.gating import (
    DeployedGatedConv2d,
    DeployedGatedLinear,
    Gate,
    Gated,
    GatedConv2d,
    GatedLinear,
    GateHead,
)

__all__ = [
    "DeployedGatedConv2d",
    "DeployedGatedLinear",
    "Gate",
    "GateHead",
    "Gated",
    "GatedConv2d",
    "GatedLinear",
]
