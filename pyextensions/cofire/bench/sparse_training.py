# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of what trains sparse networks: ``CASES`` are part of the family ``sparse``.

Steps: ``dense`` is torch's own fused optimiser on the dense weight (the faster of ``fused`` and ``foreach``): it keeps no
mask, and is what a masked step has to be as fast as. ``eager`` keeps one as people do: the gradient is multiplied by a
mask of floats (of bools it would be slower) before the step, so that moments and weights of pruned entries stay zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from cofire.bench.cases import Args, Case, Provider, Random, Run, compiled, plain
from cofire.ops.packing import pack_bits, unpack_bits
from cofire.ops.sparse_training import _adam_update, _sgd_update

FLOAT, HALF = torch.float32, torch.bfloat16
LARGE, SMALL, TINY = (4096, 4096), (1024, 1024), (8, 64)

Providers = dict[str, Provider | Mapping[str, Provider]]


def _mask(weight: Tensor, bits: Tensor) -> Tensor:
    return unpack_bits(bits, 1, weight.shape[1]).bool()


# ------------------------------------------------------------------------------------------------------ steps


def _state(x: Tensor, mask: Tensor, packed: bool) -> Tensor:
    return x[mask] if packed else torch.where(mask, x, 0.0)


def adam_args(rand: Random, shape: tuple[int, int], density: float, packed: bool) -> Args:
    mask = rand.mask(*shape, density)
    w = torch.where(mask, rand.normal(*shape), 0.0)
    m, v = _state(rand.normal(*shape), mask, packed), _state(rand.uniform(*shape), mask, packed)
    counts = mask.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]) if packed else None
    bits = pack_bits(mask.to(torch.uint8), 1)
    return w, rand.normal(*shape), m, v, None, bits, offsets, 1e-3, 0.9, 0.999, 1e-8, 0.01, True, False, 10, False


def _dense_states(w: Tensor, bits: Tensor, offsets: Tensor | None, *states: Tensor) -> list[Tensor]:
    if offsets is None:
        return list(states)
    mask = _mask(w, bits)
    return [torch.zeros_like(w).masked_scatter_(mask, s) for s in states]


def _torch_adamw(masked: bool, **how: bool) -> Callable[..., Run]:
    """``adamw`` of torch.optim, which the optimiser calls with its lists."""

    def setup(*args: Any) -> Run:
        w, g, m, v, _, bits, offsets, lr, beta1, beta2, eps, decay, *_, step, _ = args
        m, v = _dense_states(w, bits, offsets, m, v)
        mask = _mask(w, bits).to(g.dtype) if masked else None
        grad = torch.empty_like(g) if masked else g
        count = torch.tensor(float(step - 1), device=w.device if how.get("fused") else "cpu")
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay, **how}

        def run() -> None:
            if mask is not None:
                torch.mul(g, mask, out=grad)
            adamw([w], [grad], [m], [v], [], [count], amsgrad=False, maximize=False, **options)  # type: ignore[arg-type]

        return run

    return setup


def adamw_without_mask(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, _: None, bits: Tensor, offsets: Tensor | None, *options: Any
) -> None:
    """What the dense bound computes."""
    states = _dense_states(w, bits, offsets, m, v)
    new, moments = _adam_update(*options[:-1])(w, g, states)
    w.copy_(new)
    if offsets is None:
        m.copy_(moments[0])
        v.copy_(moments[1])


def _compiled_adamw(*args: Any) -> Run:
    w, g, m, v, _, bits, offsets, *options = args
    m, v = _dense_states(w, bits, offsets, m, v)
    mask, update = _mask(w, bits), _adam_update(*options[:-1])

    def step(w: Tensor, g: Tensor, m: Tensor, v: Tensor, mask: Tensor) -> None:
        new, moments = update(w, g, [m, v])
        for old, x in zip((w, m, v), (new, *moments), strict=True):
            old.copy_(torch.where(mask, x, 0.0))

    fused = torch.compile(step, dynamic=False)
    return lambda: fused(w, g, m, v, mask)


def _adam(density: float, packed: bool = False, shape: tuple[int, int] = LARGE, **options: Any) -> Case:
    outputs = 1 if packed else None  # theirs have no packed state to compare
    dense = {"reference": adamw_without_mask, "outputs": outputs}
    providers: Providers = {
        "eager": {
            "fused": Provider(_torch_adamw(True, fused=True, foreach=False), outputs=outputs),
            "foreach": Provider(_torch_adamw(True, fused=False, foreach=True), outputs=outputs),
        },
        "dense": {
            "fused": Provider(_torch_adamw(False, fused=True, foreach=False), **dense),  # type: ignore[arg-type]
            "foreach": Provider(_torch_adamw(False, fused=False, foreach=True), **dense),  # type: ignore[arg-type]
        },
        "compile": Provider(_compiled_adamw, outputs=outputs),
    }
    return Case(
        "masked_adam_",
        f"{shape[0]}x{shape[1]} keep {density:g}{' values-only state' if packed else ''}",
        FLOAT,
        lambda rand: adam_args(rand, shape, density, packed),
        providers,
        lambda rand: adam_args(rand, TINY, density, packed),
        **options,
    )


def _sgd_args(rand: Random, shape: tuple[int, int], density: float) -> Args:
    mask = rand.mask(*shape, density)
    w, buffer = (torch.where(mask, rand.normal(*shape), 0.0) for _ in range(2))
    bits = pack_bits(mask.to(torch.uint8), 1)
    return w, rand.normal(*shape), buffer, bits, None, 1e-3, 0.9, 0.0, 1e-4, False, False, False, False


def _torch_sgd(masked: bool, **how: bool) -> Callable[..., Run]:
    def setup(*args: Any) -> Run:
        w, g, buffer, bits, _, lr, momentum, dampening, decay, *_ = args
        mask = _mask(w, bits).to(g.dtype) if masked else None
        grad = torch.empty_like(g) if masked else g
        options = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": decay, **how}

        def run() -> None:
            if mask is not None:
                torch.mul(g, mask, out=grad)
            sgd([w], [grad], [buffer], nesterov=False, maximize=False, **options)  # type: ignore[arg-type]

        return run

    return setup


def _sgd_without_mask(w: Tensor, g: Tensor, buffer: Tensor, bits: Tensor, offsets: None, *options: Any) -> None:
    new, moments = _sgd_update(*options[:-1])(w, g, [buffer])
    w.copy_(new)
    buffer.copy_(moments[0])


def _sgd(density: float, shape: tuple[int, int] = LARGE, **options: Any) -> Case:
    providers: Providers = {
        "eager": {
            "fused": Provider(_torch_sgd(True, fused=True, foreach=False)),
            "foreach": Provider(_torch_sgd(True, fused=False, foreach=True)),
        },
        "dense": {
            "fused": Provider(_torch_sgd(False, fused=True, foreach=False), reference=_sgd_without_mask),
            "foreach": Provider(_torch_sgd(False, fused=False, foreach=True), reference=_sgd_without_mask),
        },
    }
    return Case(
        "masked_sgd_",
        f"{shape[0]}x{shape[1]} keep {density:g}",
        FLOAT,
        lambda rand: _sgd_args(rand, shape, density),
        providers,
        lambda rand: _sgd_args(rand, TINY, density),
        **options,
    )


# ---------------------------------------------------------------------------------------------- drop and grow


def _distinct(rand: Random, shape: tuple[int, int]) -> Tensor:
    """No two magnitudes are equal: between equal ones theirs may choose otherwise."""
    count = shape[0] * shape[1]
    order = torch.randperm(count, generator=rand.generator).view(shape)
    return (order + 1) / count * (2 * rand.mask(*shape, 0.5) - 1)


def _move_args(rand: Random, shape: tuple[int, int], density: float, scope: str) -> Args:
    mask = rand.mask(*shape, density)
    kept = round(density * shape[1]) * (shape[0] if scope == "tensor" else 1)
    w = torch.where(mask, _distinct(rand, shape), 0.0)
    return w, pack_bits(mask.to(torch.uint8), 1), _distinct(rand, shape), None, max(kept * 3 // 10, 1), scope, 0


def _by(choose: Callable[[Tensor, Tensor, bool], Tensor]) -> Callable[..., Run]:
    """As RigL is written for torch: a mask of bools, and the entries of extreme scores by ``choose``."""

    def setup(*args: Any) -> Run:
        w, bits, g, _, count, scope, _ = args
        mask = _mask(w, bits)
        flat = (1, -1) if scope == "tensor" else tuple(w.shape)
        # rows that have fewer
        number = torch.minimum(mask.view(flat).sum(1), (~mask).view(flat).sum(1)).clamp(max=count)

        def run() -> Tensor:
            dropped = choose(torch.where(mask, w.abs(), torch.inf).view(flat), number, False)
            grown = choose(torch.where(mask, -1.0, g.abs()).view(flat), number, True)
            w.view(flat).masked_fill_(dropped | grown, 0)
            return ((mask.view(flat) & ~dropped) | grown).view(w.shape)

        return run

    return setup


def _topk(score: Tensor, number: Tensor, largest: bool) -> Tensor:
    most = int(number.max())
    index = score.topk(most, 1, largest=largest).indices
    taken = torch.arange(most, device=score.device) < number[:, None]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, index, taken)


def _sort(score: Tensor, number: Tensor, largest: bool) -> Tensor:
    index = score.argsort(1, descending=largest)
    taken = torch.arange(score.shape[1], device=score.device) < number[:, None]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, index, taken)


def _masks(outputs: tuple[Tensor, ...], args: Args) -> tuple[Tensor, ...]:
    """Packed or not, the same mask."""
    weight, mask = outputs
    return weight, mask if mask.dtype == torch.bool else _mask(weight, mask)


def _move(density: float, scope: str, shape: tuple[int, int] = LARGE, **options: Any) -> Case:
    return Case(
        "prune_and_grow_",
        f"{shape[0]}x{shape[1]} keep {density:g} {scope}",
        FLOAT,
        lambda rand: _move_args(rand, shape, density, scope),
        {"eager": Provider(_by(_sort)), "dense": {"topk": Provider(_by(_topk)), "sort": Provider(_by(_sort))}},
        lambda rand: _move_args(rand, TINY, density, scope),
        compared=_masks,
        **options,
    )


# ------------------------------------------------------------------------------------------------- statistics


def eager_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.float() if x.dtype == HALF else x
    return x.mean(0), x.var(0, correction=0) * x.shape[0], x.abs().amax(0)


def dense_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without a tensor of magnitudes."""
    x = x.float() if x.dtype == HALF else x
    variance, mean = torch.var_mean(x, 0, correction=0)
    low, high = torch.aminmax(x, dim=0)
    return mean, variance.mul_(x.shape[0]), torch.maximum(low.neg_(), high)


def _statistics(rows: int, columns: int, dtype: torch.dtype, **options: Any) -> Case:
    return Case(
        "activation_statistics",
        f"{rows}x{columns}",
        dtype,
        lambda rand: (rand.normal(rows, columns).to(dtype),),
        {
            "eager": plain(eager_statistics),
            "dense": {"two reductions": plain(dense_statistics), "three": plain(eager_statistics)},
            "compile": compiled(eager_statistics),
        },
        lambda rand: (rand.normal(*TINY).to(dtype),),
        **options,
    )


def _gram(rows: int, columns: int, **options: Any) -> Case:
    return Case(
        "gram",
        f"{rows}x{columns}",
        FLOAT,
        lambda rand: (rand.normal(rows, columns),),
        {"dense": plain(lambda x: x.t() @ x)},
        lambda rand: (rand.normal(*TINY),),
        **options,
    )


def eager_groups(w: Tensor, g: Tensor, r: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    w, g = (x.view(x.shape[0] // r, r, x.shape[1] // c, c) for x in (w, g))
    return w.square().sum((1, 3)), g.square().sum((1, 3)), (w * g).sum((1, 3))


def _groups(r: int, c: int, shape: tuple[int, int] = LARGE, **options: Any) -> Case:
    def args(rand: Random, shape: tuple[int, int], r: int, c: int) -> Args:
        return rand.normal(*shape), rand.normal(*shape), r, c

    return Case(
        "group_statistics",
        f"{shape[0]}x{shape[1]} groups of {r}x{c}",
        FLOAT,
        lambda rand: args(rand, shape, r, c),
        {"dense": plain(eager_groups), "compile": compiled(eager_groups)},
        lambda rand: args(rand, TINY, min(r, TINY[0]), min(c, TINY[1])),
        **options,
    )


CASES = [
    _adam(0.1, overhead=True),
    _adam(0.1, shape=SMALL, quick=True),
    _adam(0.5),
    _adam(0.1, packed=True),
    _adam(0.5, packed=True),
    _sgd(0.1),
    _sgd(0.1, shape=SMALL, quick=True),
    _move(0.1, "row"),
    _move(0.1, "row", SMALL, quick=True),
    _move(0.1, "tensor"),
    _statistics(2048, 4096, FLOAT, quick=True),
    _statistics(2048, 4096, HALF),
    _gram(2048, 1024, quick=True),
    _groups(1, 4096),
    _groups(16, 16, quick=True),
]
