# SPDX-License-Identifier: Apache-2.0
"""Attention with binary codes: launchers with the arguments of the operators in ``cofire.ops.shift_add_attention`` and
``cofire.ops.shift_add_softmax``."""

from cofire_kernels.shift_add_attention.encode import (
    binary_encode,
    binary_encode_backward,
    hash_encode,
    hash_encode_backward,
)
from cofire_kernels.shift_add_attention.linear import (
    binary_linear_attention,
    binary_linear_attention_backward,
    binary_linear_attention_backward_plan,
    binary_linear_attention_plan,
)
from cofire_kernels.shift_add_attention.scores import (
    binary_softmax_attention,
    binary_softmax_attention_backward,
    hamming_similarity,
)

__all__ = [
    "binary_encode",
    "binary_encode_backward",
    "binary_linear_attention",
    "binary_linear_attention_backward",
    "binary_linear_attention_backward_plan",
    "binary_linear_attention_plan",
    "binary_softmax_attention",
    "binary_softmax_attention_backward",
    "hamming_similarity",
    "hash_encode",
    "hash_encode_backward",
]
