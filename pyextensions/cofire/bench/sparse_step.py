# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of a whole step of training: forward, backward and AdamW of a pruned layer, as its users write it.

``cofire`` is :class:`cofire.nn.SparseLinear` in the mode "invariant" with its optimiser. ``dense`` is the layer without a
mask and torch's own optimiser, the faster of ``fused`` and ``foreach``: what a pruned layer has to be as fast as. ``eager``
multiplies the weight by a mask of floats (of bools it would be slower) in each forward, as pruning with a mask is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cofire.bench.cases import Args, Case, Provider, Random, Run
from cofire.bench.sparse_training import adam_args, adamw_without_mask
from cofire.nn import SparseLinear
from cofire.ops.packing import unpack_bits
from cofire.optim import MaskedAdamW

SQUARE, TINY = (4096, 4096), (8, 64)
#: A layer and its optimiser, from its weight, its packed mask, and the optimiser's options.
Make = Callable[[Tensor, Tensor, dict[str, Any]], tuple[nn.Module, torch.optim.Optimizer]]


def _batch(rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Inputs, and the gradient of the outputs: those of a weight have the variance 1."""
    rand = Random(f"{rows} rows")
    return rand.normal(rows, inputs), rand.normal(rows, outputs) / rows**0.5


def _args(rand: Random, rows: int, shape: tuple[int, int], density: float) -> Args:
    """Those of the optimiser's step alone, with the gradient that this batch gives."""
    w, _, *rest = adam_args(rand, shape, density, packed=False)
    x, seed = _batch(rows, *shape)
    return w, seed.t() @ x, *rest


def _alive(x: Tensor) -> Tensor:
    """The same memory as a tensor that autograd takes: arguments are made in inference mode."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage(), 0, x.shape, x.stride())


def _step(rows: int, make: Make) -> Callable[..., Run]:
    """The layer has the weight of the case, its optimiser the moments."""

    def setup(*args: Any) -> Run:
        with torch.inference_mode(False):
            w, _, m, v, _, bits, _, lr, beta1, beta2, eps, decay, *_, step, _ = args
            options = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
            layer, optimizer = make(_alive(w), _alive(bits), options)
            (parameter,) = layer.parameters()
            count = torch.tensor(float(step - 1), device=w.device if optimizer.defaults.get("fused") else "cpu")
            optimizer.state[parameter] = {"step": count, "exp_avg": _alive(m), "exp_avg_sq": _alive(v)}
            x, seed = (t.to(w.device) for t in _batch(rows, *w.shape))

        def run() -> None:
            with torch.inference_mode(False), torch.enable_grad():
                optimizer.zero_grad()
                layer(x).backward(seed)
                optimizer.step()

        return run

    return setup


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def _invariant(weight: Tensor, bits: Tensor, options: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    layer = SparseLinear.from_dense(_layer(weight), unpack_bits(bits, 1, weight.shape[1]).bool())
    return layer, MaskedAdamW(layer.parameters(), model=layer, **options)


class _Multiplied(nn.Module):
    mask: Tensor

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("mask", mask)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask)


def _by_torch(masked: bool, **how: Any) -> Make:
    def make(weight: Tensor, bits: Tensor, options: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
        mask = unpack_bits(bits, 1, weight.shape[1]).to(weight.dtype) if masked else None
        layer = _layer(weight) if mask is None else _Multiplied(weight, mask)
        return layer, torch.optim.AdamW(layer.parameters(), **how, **options)

    return make


def _case(rows: int, density: float) -> Case:
    hows = {"fused": {"fused": True}, "foreach": {"foreach": True}}
    return Case(
        "masked_adam_",
        f"a step of training, {rows} rows, {SQUARE[0]}x{SQUARE[1]} keep {density:g}",
        torch.float32,
        lambda rand: _args(rand, rows, SQUARE, density),
        {
            "eager": {name: Provider(_step(rows, _by_torch(True, **how))) for name, how in hows.items()},
            "dense": {
                name: Provider(_step(rows, _by_torch(False, **how)), reference=adamw_without_mask)
                for name, how in hows.items()
            },
        },
        lambda rand: _args(rand, rows, TINY, density),
        ours=Provider(_step(rows, _invariant)),
        flops=lambda w, *_: 4 * rows * w.numel(),
    )


CASES = [_case(256, 0.1), _case(512, 0.1), _case(512, 0.5)]
