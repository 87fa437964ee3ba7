# SPDX-License-Identifier: Apache-2.0
"""Compression of a cache of keys and values: launchers with the arguments of the operators in ``cofire.ops.kv_fusion``,
``cofire.ops.kv_fusion_attention`` and ``cofire.ops.kv_fusion_masked``."""

from cofire_kernels.kv_fusion.attention import attention_with_scores, attention_with_scores_backward
from cofire_kernels.kv_fusion.fuse import kv_fuse, kv_fuse_backward
from cofire_kernels.kv_fusion.gather import kv_gather_
from cofire_kernels.kv_fusion.masked import kv_append_, masked_softmax_attention, masked_softmax_attention_backward
from cofire_kernels.kv_fusion.select import kv_select

__all__ = [
    "attention_with_scores",
    "attention_with_scores_backward",
    "kv_append_",
    "kv_fuse",
    "kv_fuse_backward",
    "kv_gather_",
    "kv_select",
    "masked_softmax_attention",
    "masked_softmax_attention_backward",
]
