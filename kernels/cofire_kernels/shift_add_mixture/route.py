# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""The choice of one of two experts: gates, then the two lists, by programs that each have a chunk of tokens.

The number of tokens before a chunk that chose the shift expert decides all places of the chunk in both lists, so that
between the two kernels there is one number per chunk, and the host learns none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs


@triton.jit
def load_ahead(logits_ptr, token, inside):
    """How far the shift expert is ahead, and whether it is chosen: not by the difference, which loses infinities."""
    dense = tl.load(logits_ptr + 2 * token, mask=inside, other=0).to(tl.float32)
    shift = tl.load(logits_ptr + 2 * token + 1, mask=inside, other=0).to(tl.float32)
    return shift - dense, shift >= dense


@triton.jit
def moe_route_forward_kernel(logits_ptr, gate_ptr, chosen_ptr, sums_ptr, tokens, chunks, BLOCK: tl.constexpr):
    """Gates; of each chunk how many tokens chose the shift expert, and the sums of both probabilities."""
    chunk = tl.program_id(0)
    token = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    ahead, chosen = load_ahead(logits_ptr, token, inside)
    e = tl.exp(-tl.abs(ahead))
    larger = 1 / (1 + e)
    smaller = e / (1 + e)
    tl.store(gate_ptr + token, larger.to(gate_ptr.dtype.element_ty), mask=inside)
    of_dense = tl.where(inside, tl.where(chosen, smaller, larger), 0.0)
    of_shift = tl.where(inside, tl.where(chosen, larger, smaller), 0.0)
    tl.store(chosen_ptr + chunk, tl.sum((chosen & inside).to(tl.int32), 0))
    tl.store(sums_ptr + chunk, tl.sum(of_dense, 0))
    tl.store(sums_ptr + chunks + chunk, tl.sum(of_shift, 0))


@triton.jit
def moe_route_lists_kernel(
    logits_ptr, chosen_ptr, sums_ptr, index_ptr, count_ptr, importance_ptr, tokens, chunks,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Both lists, and from the first program the numbers of all chunks together."""
    chunk = tl.program_id(0)
    before = tl.zeros([BLOCK_C], tl.int32)
    total = tl.zeros([BLOCK_C], tl.int32)
    for start in range(0, chunks, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        chosen = tl.load(chosen_ptr + c, mask=c < chunks, other=0)
        before += tl.where(c < chunk, chosen, 0)
        total += chosen
    token = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    _, shift = load_ahead(logits_ptr, token, inside)
    one = (shift & inside).to(tl.int32)
    shifts = tl.sum(before, 0) + tl.cumsum(one, 0) - one  # tokens before this one that chose the shift expert
    denses = token - shifts
    # The r-th token of a list has its r-th place, and the r-th token of the other one puts a -1 into the r-th place from
    # its end: together they fill it.
    last = tokens - 1
    tl.store(index_ptr + tl.where(shift, last - shifts, denses), tl.where(shift, -1, token).to(tl.int32), mask=inside)
    index_ptr += tokens
    tl.store(index_ptr + tl.where(shift, shifts, last - denses), tl.where(shift, token, -1).to(tl.int32), mask=inside)
    if chunk == 0:
        sum_ = tl.sum(total, 0)
        tl.store(count_ptr, (tokens - sum_).to(tl.int32))
        tl.store(count_ptr + 1, sum_)
        for expert in range(2):
            importance = tl.zeros([BLOCK_C], tl.float32)
            for start in range(0, chunks, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                importance += tl.load(sums_ptr + expert * chunks + c, mask=c < chunks, other=0)
            tl.store(importance_ptr + expert, tl.sum(importance, 0))


@triton.jit
def moe_route_backward_kernel(grad_gate_ptr, grad_importance_ptr, logits_ptr, dx_ptr, tokens, BLOCK: tl.constexpr):
    """The gate is a probability, and all have the derivative s (1 - s), up to its sign."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    ahead, chosen = load_ahead(logits_ptr, token, inside)
    e = tl.exp(-tl.abs(ahead))
    larger = 1 / (1 + e)
    gate = tl.load(grad_gate_ptr + token, mask=inside, other=0).to(tl.float32)
    more = tl.load(grad_importance_ptr + 1).to(tl.float32) - tl.load(grad_importance_ptr).to(tl.float32)
    to_shift = larger * larger * e * (tl.where(chosen, gate, -gate) + more)
    tl.store(dx_ptr + 2 * token, (-to_shift).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + 2 * token + 1, to_shift.to(dx_ptr.dtype.element_ty), mask=inside)


def moe_route(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = logits.shape[0]
    logits = logits.contiguous()
    gate = logits.new_empty(tokens)
    index = logits.new_empty((2, tokens), dtype=torch.int32)
    count = logits.new_empty(2, dtype=torch.int32)
    importance = logits.new_empty(2, dtype=torch.float32)
    if tokens == 0:
        return gate, index, count.zero_(), importance.zero_()
    tile = configs.tile("moe_route", logits.device, tokens=tokens)
    chunks = triton.cdiv(tokens, tile["BLOCK"])
    chosen = logits.new_empty(chunks, dtype=torch.int32)
    sums = logits.new_empty((2, chunks), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        moe_route_forward_kernel[(chunks,)](logits, gate, chosen, sums, tokens, chunks, **tile)
        moe_route_lists_kernel[(chunks,)](
            logits, chosen, sums, index, count, importance, tokens, chunks, BLOCK_C=64, **tile
        )
    return gate, index, count, importance


def moe_route_backward(grad_gate: Tensor, grad_importance: Tensor, logits: Tensor) -> Tensor:
    tokens = logits.shape[0]
    result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if tokens:
        tile = configs.tile("moe_route", logits.device, tokens=tokens)
        with torch.cuda.device_of(logits):
            moe_route_backward_kernel[(triton.cdiv(tokens, tile["BLOCK"]),)](
                grad_gate.contiguous(), grad_importance.contiguous(), logits.contiguous(), result, tokens, **tile
            )
    return result
