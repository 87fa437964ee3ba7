# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Heavy hitters, the rest, and the best of the rest: one program holds the scores of a head and makes all three lists."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.selection.keep import largest
from cofire_kernels.selection.order import ordered

#: The most scores of a head that one program holds: of longer caches the reference's sort selects.
MOST_TOKENS = 8192


@triton.jit
def kv_select_kernel(
    scores_ptr, heavy_ptr, rest_ptr, pick_ptr, tokens, heavy, merged, local, ENTRIES: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, ENTRIES)
    inside = token < tokens
    score = tl.load(scores_ptr + row * tokens + token, mask=inside, other=0)
    tl.device_assert(tl.sum((score != score).to(tl.int32), 0) == 0, "kv_select: scores must not be NaN")
    key = ordered(score).to(tl.uint32, bitcast=True) ^ 0x80000000
    early = token < tokens - local
    stays = largest(tl.where(early, key, 0), early, heavy - local) | (inside & (token >= tokens - local))
    before = tl.cumsum(stays.to(tl.int32), 0) - stays.to(tl.int32)
    goes = inside & (stays == 0)
    tl.store(heavy_ptr + row * heavy + before, token, mask=stays)
    tl.store(rest_ptr + row * (tokens - heavy) + (token - before), token, mask=goes)
    picked = largest(tl.where(goes, key, 0), goes, merged)
    place = tl.cumsum(picked.to(tl.int32), 0) - picked.to(tl.int32)
    tl.store(pick_ptr + row * merged + place, token - before, mask=picked)


def kv_select(scores: Tensor, heavy: int, merged: int, local: int) -> tuple[Tensor, Tensor, Tensor]:
    (*rows, tokens), count = scores.shape, scores.shape[0] * scores.shape[1]
    if tokens > MOST_TOKENS or scores.dtype == torch.float64:
        chosen: tuple[Tensor, Tensor, Tensor] = torch.ops.cofire.kv_select.reference(scores, heavy, merged, local)
        return chosen

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=scores.device)

    kept, rest, pick = (empty(*rows, n) for n in (heavy, tokens - heavy, merged))
    if scores.numel() == 0:
        return kept, rest, pick
    # On a GPU the kernel checks, and nobody waits for it.
    if scores.is_cpu and (found := int(scores.isnan().sum())):
        raise ValueError(f"kv_select: scores must not be NaN, got {found} NaN among {scores.numel()} scores")
    with torch.cuda.device_of(scores):
        tile = configs.tile("kv_select", scores.device, tokens=tokens)
        kv_select_kernel[(count,)](
            scores.to(torch.float32).contiguous(), kept, rest, pick, tokens, heavy, merged, local,
            ENTRIES=max(triton.next_power_of_2(tokens), 16), debug=True, sanitize_overflow=False, **tile,
        )  # fmt: skip
    return kept, rest, pick
