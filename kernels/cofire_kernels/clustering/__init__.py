# SPDX-License-Identifier: Apache-2.0
"""Differentiable k-means of weights: launchers with the arguments of the operators in ``cofire.ops.clustering``."""

from cofire_kernels.clustering.dkm import (
    dkm,
    dkm_backward,
    dkm_backward_plan,
    dkm_plan,
    dkm_tables,
    dkm_tables_backward,
)
from cofire_kernels.clustering.palettize import palettize
from cofire_kernels.clustering.values16 import histogram16, lut_apply16, scatter16

__all__ = [
    "dkm",
    "dkm_backward",
    "dkm_backward_plan",
    "dkm_plan",
    "dkm_tables",
    "dkm_tables_backward",
    "histogram16",
    "lut_apply16",
    "palettize",
    "scatter16",
]
