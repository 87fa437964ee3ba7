# SPDX-License-Identifier: Apache-2.0
"""Selection primitives: compaction of masks, its inverse, ordering, selection, packed masks."""

from cofire_kernels.selection.bits import mask_offsets, pack_mask, transpose_mask, unpack_mask
from cofire_kernels.selection.compact import compact
from cofire_kernels.selection.compact_cuda import compact_cuda
from cofire_kernels.selection.keep import keep_mask

__all__ = ["compact", "compact_cuda", "keep_mask", "mask_offsets", "pack_mask", "transpose_mask", "unpack_mask"]
