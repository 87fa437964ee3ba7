# SPDX-License-Identifier: Apache-2.0
"""Selection primitives: compaction of masks, its inverse, and ordering within a row."""

from cofire_kernels.selection.compact import compact
from cofire_kernels.selection.compact_cuda import compact_cuda

__all__ = ["compact", "compact_cuda"]
