# SPDX-License-Identifier: Apache-2.0
"""Selection primitives that several families share."""

from __future__ import annotations

import torch
from torch import Tensor

from cofire.ops.checks import refuse, shape_of
from cofire.registry import Kernel, Operator, register

__all__ = ["compact"]


def _validate_compact(mask: Tensor) -> None:
    if mask.dim() != 2:
        refuse("compact", f"mask must have shape [rows, columns], got {shape_of(mask)}")


def _compact_reference(mask: Tensor) -> tuple[Tensor, Tensor]:
    set_ = mask != 0
    count = set_.sum(1, dtype=torch.int32)
    # A stable sort that puts the set columns first leaves both groups in ascending order.
    order = torch.sort((~set_).to(torch.uint8), dim=1, stable=True).indices
    slot = torch.arange(mask.shape[1], device=mask.device)
    index = torch.where(slot < count[:, None], order, -1).to(torch.int32)
    return index, count


def _compact_fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.shape, dtype=torch.int32), mask.new_empty(mask.shape[:1], dtype=torch.int32)


_compact = register(
    Operator(
        "compact(Tensor mask) -> (Tensor index, Tensor count)",
        family="selection",
        validate=_validate_compact,
        reference=_compact_reference,
        fake=_compact_fake,
        backward="indices have no gradient",
        cpu=(torch.bool, torch.uint8),
        triton=Kernel("cofire_kernels.selection:compact"),
        cuda=Kernel("cofire_kernels.selection:compact_cuda"),
        bytes=lambda mask: mask.numel() * (mask.element_size() + 4) + 4 * mask.shape[0],
    )
)


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the set entries of each row, in ascending order, without a host synchronisation.

    Args:
        mask: ``[R, C]``, bool or any dtype in which non-zero means set.

    Returns:
        ``index`` int32 ``[R, C]``, the positions followed by -1, and ``count`` int32 ``[R]``.

    Raises:
        ValueError: ``mask`` is not two-dimensional.

    Example:
        >>> index, count = compact(torch.tensor([[0, 1, 1], [0, 0, 0]], dtype=torch.bool))
        >>> index.tolist(), count.tolist()
        ([[1, 2, -1], [-1, -1, -1]], [2, 0])

    Source: stream compaction (Blelloch, "Prefix sums and their applications", 1990, section 1.3).
    """
    index, count = _compact(mask)
    return index, count
