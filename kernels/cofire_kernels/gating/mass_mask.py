# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Channels that carry a given share of each sample's activation mass: one program sorts and scans one sample.

The arithmetic is that of the reference (fp32 shares, added in sorted order), but a GPU adds a prefix sum as a tree and
a CPU from left to right. The two can differ in the last bits of the running share, and a channel whose running share
lies within that rounding of ``mass + 1e-5`` can then be kept by one and dropped by the other. Every run on one device
agrees with itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.selection.order import LONGEST_ROW, key_column, key_value, sort_descending, sort_keys

NEGLIGIBLE = 1e-5  # shares (mode "mass") and scores (mode "uniform") up to here count as nothing


@triton.jit
def mass_mask_forward_kernel(
    scores_ptr,
    mask_ptr,
    valid_ptr,
    columns,
    mass,
    kept,
    min_keep,
    negligible,
    MODE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, BLOCK_C)
    inside = rank < columns
    score = tl.load(scores_ptr + sample * columns + rank, mask=inside, other=0).to(tl.float32)
    invalid = (score < 0) | (score != score) | (score == float("inf"))
    tl.store(valid_ptr + sample, tl.max(invalid.to(tl.int32), 0) == 0)

    key = sort_descending(sort_keys(score, rank, inside), BLOCK_C)
    ordered = tl.where(inside, key_value(key), 0.0)
    if MODE == "uniform":
        keep = (rank < kept) & (ordered > negligible)
    else:
        total = tl.sum(tl.where(rank == columns - 1, tl.cumsum(ordered, 0), 0.0), 0) + tl.zeros_like(ordered)
        share = tl.div_rn(ordered, tl.where(total > 0, total, 1.0))
        keep = share > negligible if MODE == "all" else tl.cumsum(share, 0) - mass <= negligible
        keep &= total > 0
    keep |= rank < min_keep
    tl.store(mask_ptr + sample * columns + key_column(key), keep, mask=inside)


def mass_mask_plan(*args) -> str:
    """What :func:`mass_mask` does with these arguments."""
    long = args[0].shape[1] > LONGEST_ROW
    return f"torch operators: more than {LONGEST_ROW} channels" if long else "one program per sample"


def mass_mask(scores: Tensor, mass: float, mode: str, min_keep: int) -> Tensor:
    rows, columns = scores.shape
    kept = columns - int(mass * columns) if mode == "uniform" else 0
    rule = "all" if mode == "mass" and mass == 1 else mode
    if mode == "mass" and mass < 0:  # gating off
        min_keep = columns
    if scores.numel() == 0:
        return torch.empty((rows, columns), dtype=torch.bool, device=scores.device)
    if columns > LONGEST_ROW:
        mask, valid = _composed(scores, mass, rule, kept, min_keep)
    else:
        mask = torch.empty((rows, columns), dtype=torch.bool, device=scores.device)
        valid = torch.empty((rows,), dtype=torch.bool, device=scores.device)
        with torch.cuda.device_of(scores):
            tile = configs.tile("mass_mask", scores.device, columns=columns)
            block = max(triton.next_power_of_2(columns), 16)
            mass_mask_forward_kernel[(rows,)](
                scores.contiguous(),
                mask,
                valid,
                columns,
                float(mass),
                kept,
                min_keep,
                NEGLIGIBLE,
                MODE=rule,
                BLOCK_C=block,
                **tile,
            )
    torch._assert_async(valid.all(), "mass_mask: scores must be finite and non-negative")
    return mask


def _composed(scores: Tensor, mass: float, rule: str, kept: int, min_keep: int) -> tuple[Tensor, Tensor]:
    """The same of torch operators, for rows that one program cannot sort."""
    ordered, order = scores.float().sort(dim=1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    if rule == "uniform":
        keep = (rank < kept) & (ordered > NEGLIGIBLE)
    else:
        total = ordered.cumsum(1)[:, -1:]
        share = ordered / total
        keep = share > NEGLIGIBLE if rule == "all" else share.cumsum(1) - mass <= NEGLIGIBLE
        keep &= total > 0
    keep |= rank < min_keep
    return torch.zeros_like(keep).scatter(1, order, keep), scores.isfinite() & (scores >= 0)
