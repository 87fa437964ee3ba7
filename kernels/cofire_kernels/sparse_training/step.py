# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Optimiser steps on masked weights, in one pass.

Each lane looks at its bit first: what is pruned is not loaded, so that a run of pruned entries costs no traffic but the
zeros that are written, and none where these are known to stand there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cofire_kernels import configs
from cofire_kernels.numerics import maximum


@triton.jit
def read_bits(bits_ptr, row, column, inside, columns, MASKED: tl.constexpr):
    """Which entries are kept."""
    kept = inside
    if MASKED:
        byte = tl.load(bits_ptr + row * ((columns + 7) // 8) + column // 8, mask=inside, other=0).to(tl.int32)
        kept = inside & (((byte >> (column % 8).to(tl.int32)) & 1) != 0)
    return kept


@triton.jit
def sgd_values(
    w, g, buffer, minus_lr, momentum, take, decay,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, FIRST: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    if MAXIMIZE:
        g = -g
    if DECAY:
        g = g + decay * w
    if MOMENTUM:
        buffer = g if FIRST else buffer * momentum + take * g
        g = g + momentum * buffer if NESTEROV else buffer
    return w + minus_lr * g, buffer


@triton.jit
def adam_values(
    w, g, m, v, highest, minus_size, root, near, keep, take, eps, shrink, decay,
    AMSGRAD: tl.constexpr, DECAY: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, FROM_START: tl.constexpr,
):  # fmt: skip
    if MAXIMIZE:
        g = -g
    if DECAY:
        if DECOUPLED:
            w = w * shrink
        else:
            g = g + decay * w
    # torch.lerp: from the nearer end
    m = m + near * (g - m) if FROM_START else g - (g - m) * (1 - near)
    v = v * keep + take * g * g
    second = v
    if AMSGRAD:
        highest = maximum(highest, v)
        second = highest
    w = w + tl.div_rn(minus_size * m, tl.div_rn(tl.sqrt_rn(second), root + tl.zeros_like(second)) + eps)
    return w, m, v, highest


@triton.jit
def load_f32(ptr, place, mask):
    return tl.load(ptr + place, mask=mask, other=0).to(tl.float32)


@triton.jit
def store_as(ptr, place, value, mask):
    tl.store(ptr + place, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def masked_sgd_kernel(
    w_ptr, g_ptr, buffer_ptr, bits_ptr, offsets_ptr, columns, blocks, minus_lr, momentum, take, decay,
    MASKED: tl.constexpr, PACKED: tl.constexpr, CLEAN: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr, FIRST: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # a state of kept values is walked along the row, everything else is a block of its own
    row = (tl.program_id(0) if PACKED else tl.program_id(0) // blocks).to(tl.int64)
    start = 0 if PACKED else tl.program_id(0) % blocks
    place = tl.load(offsets_ptr + row) if PACKED else row * 0
    for block in range(start, blocks if PACKED else start + 1):
        column = (row * 0 + block) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        kept = read_bits(bits_ptr, row, column, inside, columns, MASKED)
        at = row * columns + column
        state = at
        if PACKED:
            one = kept.to(tl.int32)
            state = place + tl.cumsum(one, 0) - one
            place += tl.sum(one, 0)
        w, g = load_f32(w_ptr, at, kept), load_f32(g_ptr, at, kept)
        buffer = w
        if MOMENTUM:
            buffer = load_f32(buffer_ptr, state, kept)
        w, buffer = sgd_values(
            w, g, buffer, minus_lr, momentum, take, decay, MOMENTUM, NESTEROV, MAXIMIZE, FIRST, DECAY
        )
        written = kept if CLEAN else inside
        store_as(w_ptr, at, tl.where(kept, w, 0.0), written)
        if MOMENTUM:
            store_as(buffer_ptr, state, tl.where(kept, buffer, 0.0), kept if PACKED else written)


@triton.jit
def masked_adam_kernel(
    w_ptr, g_ptr, m_ptr, v_ptr, highest_ptr, bits_ptr, offsets_ptr, columns, blocks,
    minus_size, root, near, keep, take, eps, shrink, decay,
    MASKED: tl.constexpr, PACKED: tl.constexpr, CLEAN: tl.constexpr, AMSGRAD: tl.constexpr, DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, FROM_START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) if PACKED else tl.program_id(0) // blocks).to(tl.int64)
    start = 0 if PACKED else tl.program_id(0) % blocks
    place = tl.load(offsets_ptr + row) if PACKED else row * 0
    for block in range(start, blocks if PACKED else start + 1):
        column = (row * 0 + block) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        kept = read_bits(bits_ptr, row, column, inside, columns, MASKED)
        at = row * columns + column
        state = at
        if PACKED:
            one = kept.to(tl.int32)
            state = place + tl.cumsum(one, 0) - one
            place += tl.sum(one, 0)
        w, g = load_f32(w_ptr, at, kept), load_f32(g_ptr, at, kept)
        m, v = load_f32(m_ptr, state, kept), load_f32(v_ptr, state, kept)
        highest = v
        if AMSGRAD:
            highest = load_f32(highest_ptr, state, kept)
        w, m, v, highest = adam_values(
            w, g, m, v, highest, minus_size, root, near, keep, take, eps, shrink, decay,
            AMSGRAD, DECAY, DECOUPLED, MAXIMIZE, FROM_START,
        )  # fmt: skip
        written = kept if CLEAN else inside
        to_state = kept if PACKED else written
        store_as(w_ptr, at, tl.where(kept, w, 0.0), written)
        store_as(m_ptr, state, tl.where(kept, m, 0.0), to_state)
        store_as(v_ptr, state, tl.where(kept, v, 0.0), to_state)
        if AMSGRAD:
            store_as(highest_ptr, state, tl.where(kept, highest, 0.0), to_state)


def _launch(
    kernel: Any, weight: Tensor, grad: Tensor, states: Sequence[Tensor | None], bits: Tensor | None,
    offsets: Tensor | None, clean: bool, scalars: Sequence[float], **options: bool,
) -> None:  # fmt: skip
    """Contiguous arguments, a grid, and copies back where an argument was not contiguous."""
    if weight.numel() == 0:
        return
    given = [weight, *(s for s in states if s is not None)]
    own = {id(x): x.contiguous() for x in given}
    rows = 1 if bits is None else weight.shape[0]
    columns = weight.numel() // rows
    w = own[id(weight)]
    # what is not there is never read
    pointers = [w if s is None else own[id(s)] for s in states]
    mask = w if bits is None else bits.contiguous()
    begins = w if offsets is None else offsets.contiguous()
    with torch.cuda.device_of(weight):
        tile = configs.tile("masked_step", weight.device, columns=columns)
        blocks = triton.cdiv(columns, tile["BLOCK"])
        grid = (rows if offsets is not None else rows * blocks,)
        kernel[grid](
            w, grad.contiguous(), *pointers, mask, begins, columns, blocks, *scalars,
            MASKED=bits is not None, PACKED=offsets is not None, CLEAN=clean, **options, **tile,
        )  # fmt: skip
    for x in given:
        if own[id(x)] is not x:
            x.copy_(own[id(x)])


def masked_sgd_(
    weight: Tensor, grad: Tensor, momentum_buffer: Tensor | None, bits: Tensor | None, offsets: Tensor | None,
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool, first: bool,
    clean: bool,
) -> None:  # fmt: skip
    _launch(
        masked_sgd_kernel, weight, grad, [momentum_buffer], bits, offsets, clean,
        [float(-lr), float(momentum), float(1 - dampening), float(weight_decay)],
        MOMENTUM=momentum_buffer is not None, NESTEROV=nesterov, MAXIMIZE=maximize, FIRST=first,
        DECAY=weight_decay != 0,
    )  # fmt: skip


def masked_adam_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None,
    bits: Tensor | None, offsets: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    decoupled: bool, maximize: bool, step: int, clean: bool,
) -> None:  # fmt: skip
    size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    scalars = [-size, root, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, weight_decay]
    _launch(
        masked_adam_kernel, weight, grad, [exp_avg, exp_avg_sq, max_exp_avg_sq], bits, offsets, clean,
        list(map(float, scalars)),
        AMSGRAD=max_exp_avg_sq is not None, DECAY=weight_decay != 0, DECOUPLED=decoupled, MAXIMIZE=maximize,
        FROM_START=1 - beta1 < 0.5,
    )  # fmt: skip
