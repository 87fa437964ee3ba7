# SPDX-License-Identifier: Apache-2.0
"""Weights of other libraries as :class:`~cofire.ops.QTensor`, and back: one module per format, ``from_`` and ``to_`` in each.

None of the other libraries is needed: the converters take and give plain tensors, in the layouts that checkpoints have.
"""

from cofire.formats.awq import from_awq, to_awq
from cofire.formats.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from cofire.formats.checkpoint import from_checkpoint
from cofire.formats.coreml import from_coreml, from_palette, to_coreml, to_palette
from cofire.formats.ggml import from_ggml, to_ggml
from cofire.formats.gptq import from_gptq, to_gptq
from cofire.formats.torchao import from_torchao, to_torchao

__all__ = [
    "from_awq",
    "from_bitsandbytes",
    "from_checkpoint",
    "from_coreml",
    "from_ggml",
    "from_gptq",
    "from_palette",
    "from_torchao",
    "to_awq",
    "to_bitsandbytes",
    "to_coreml",
    "to_ggml",
    "to_gptq",
    "to_palette",
    "to_torchao",
]
