# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Device functions that several kernels share. Like torch, they let a NaN through a maximum and an activation."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_max(x):
    """Largest value of each row of a 2-D tile; ``tl.max`` alone drops a NaN."""
    largest = tl.max(x, 1)
    has_nan = tl.max((x != x).to(tl.int32), 1) > 0
    return tl.where(has_nan, float("nan"), largest)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = maximum(x, 0.0)
    elif ACTIVATION == "relu6":
        x = tl.minimum(maximum(x, 0.0), 6.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def activation_grad(grad, output, ACTIVATION: tl.constexpr):
    """Gradient before the activation, from its output alone."""
    if ACTIVATION == "relu":
        grad = tl.where(output <= 0, 0.0, grad)  # as in torch, a NaN lets the gradient pass
    elif ACTIVATION == "relu6":
        grad = tl.where((output > 0) & (output < 6), grad, 0.0)
    return grad


#: Whether kernels run in the interpreter of Triton (``TRITON_INTERPRET=1``), on the CPU.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """``acc + a b`` in fp32. The interpreter holds bf16 as integers and would multiply the bit patterns."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
