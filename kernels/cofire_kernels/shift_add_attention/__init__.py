# SPDX-License-Identifier: Apache-2.0
"""Attention with binary codes: launchers with the arguments of the operators in ``cofire.ops.shift_add_attention`` and
``cofire.ops.shift_add_softmax``."""

from cofire_kernels.shift_add_attention.scores import binary_softmax_attention, hamming_similarity

__all__ = ["binary_softmax_attention", "hamming_similarity"]
