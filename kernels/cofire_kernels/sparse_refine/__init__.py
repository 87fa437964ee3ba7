# SPDX-License-Identifier: Apache-2.0
"""Refinement of pruning masks by swaps within a row, one program per row."""

from cofire_kernels.sparse_refine.dsnot import dsnot_swap
from cofire_kernels.sparse_refine.gram import gram_swap

__all__ = ["dsnot_swap", "gram_swap"]
