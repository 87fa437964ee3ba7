# SPDX-License-Identifier: Apache-2.0
"""compact by warp votes, in CUDA C++ (``csrc/cuda/selection.cu``): an alternative to the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from cofire_kernels import nvrtc

WARPS = 8  # per thread block, one row each


def compact_cuda(mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = mask.shape
    one_byte = mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0
    one_byte = one_byte.contiguous()
    index = torch.empty((rows, columns), dtype=torch.int32, device=mask.device)
    count = torch.empty((rows,), dtype=torch.int32, device=mask.device)
    if mask.numel() == 0:
        return index, count.zero_()
    blocks = -(-rows // WARPS)
    nvrtc.launch("selection", "compact_forward_kernel", blocks, 32 * WARPS, (one_byte, index, count, rows, columns))
    return index, count
