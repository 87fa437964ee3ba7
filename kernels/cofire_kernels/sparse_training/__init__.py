# SPDX-License-Identifier: Apache-2.0
"""What trains sparse networks: masked optimiser steps, drop and grow, statistics of activations and groups."""

from cofire_kernels.sparse_training.prune_and_grow import prune_and_grow_, prune_and_grow__plan
from cofire_kernels.sparse_training.statistics import activation_statistics, group_statistics, group_statistics_plan
from cofire_kernels.sparse_training.step import masked_adam_, masked_sgd_

__all__ = [
    "activation_statistics",
    "group_statistics",
    "group_statistics_plan",
    "masked_adam_",
    "masked_sgd_",
    "prune_and_grow_",
    "prune_and_grow__plan",
]
