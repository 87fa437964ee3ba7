# SPDX-License-Identifier: Apache-2.0
"""What trains sparse networks: optimiser steps that keep pruned weights zero, drop and grow, and statistics.

A mask is packed: uint8 ``[N, ceil(K / 8)]``, bit ``k % 8`` of byte ``k // 8``, 1 = kept (:func:`cofire.ops.pack_mask`); a
weight of more than two dimensions is read as ``[N, K]``. The mask is authoritative: a kept zero stays kept, and whatever
stands at a pruned entry, NaN included, is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cofire.ops.checks import (
    check_choice,
    check_device,
    check_float,
    check_integer,
    check_number,
    check_pair,
    check_same,
    refuse,
    shape_of,
)
from cofire.ops.fake_quantize import WORD, philox
from cofire.ops.lowbit import compute_dtype
from cofire.ops.packing import pack_bits
from cofire.ops.sparse import _kept as kept_of
from cofire.ops.sparse import check_bits
from cofire.registry import Kernel, Operator, register

__all__ = [
    "ActivationStatistics",
    "activation_statistics",
    "gram",
    "group_statistics",
    "masked_adam_",
    "masked_sgd_",
    "prune_and_grow_",
]

SCOPES = ("row", "tensor")


def _columns(weight: Tensor) -> int:
    return math.prod(weight.shape[1:])


def _size(x: Tensor | None) -> int:
    return 0 if x is None else x.numel() * x.element_size()


# ----------------------------------------------------------------------------------------- optimiser steps

#: ``(w, g, states) -> (w, states)``, in the dtype of the states.
Update = Callable[[Tensor, Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]


def _step_reference(
    weight: Tensor, grad: Tensor, states: Sequence[Tensor], bits: Tensor | None, offsets: Tensor | None, update: Update
) -> None:
    """Apply an update to the kept entries and write zeros to the others."""
    dtype = compute_dtype(weight)
    w, g = weight.detach().to(dtype), grad.detach().to(dtype)
    if bits is None:
        new, moments = update(w, g, list(states))
        weight.copy_(new)
        for state, moment in zip(states, moments, strict=True):
            state.copy_(moment)
        return
    kept = kept_of(bits, weight)
    if offsets is not None:  # one value of each state for each kept entry, in row-major order
        new, moments = update(w[kept], g[kept], list(states))
        weight.copy_(torch.zeros_like(w).masked_scatter(kept, new))
    else:
        new, moments = update(w, g, list(states))
        weight.copy_(torch.where(kept, new, 0.0))
        moments = [torch.where(kept, m, 0.0) for m in moments]
    for state, moment in zip(states, moments, strict=True):
        state.copy_(moment)


def _check_step(
    operator: str,
    weight: Tensor,
    grad: Tensor,
    states: dict[str, Tensor | None],
    bits: Tensor | None,
    offsets: Tensor | None,
    clean: bool,
) -> None:
    check_float(operator, weight=weight, grad=grad, **states)
    check_same(operator, "weight", weight, grad=grad)
    if grad.shape != weight.shape:
        refuse(operator, f"grad must have shape {shape_of(weight)}, got {shape_of(grad)}")
    if bits is not None:
        check_bits(operator, weight, bits)
    if bits is None and clean:
        refuse(operator, "clean needs a mask, got bits None")
    if offsets is not None:
        if bits is None:
            refuse(operator, "offsets need a mask, got bits None")
        if offsets.dtype != torch.int64:
            raise TypeError(f"{operator}: offsets must be int64, got {offsets.dtype}")
        if list(offsets.shape) != [weight.shape[0] + 1]:
            refuse(operator, f"offsets must have shape [{weight.shape[0] + 1}], got {shape_of(offsets)}")
        check_device(operator, "weight", weight, offsets=offsets)
    dtype = compute_dtype(weight)
    first: Tensor | None = None
    for name, x in states.items():
        if x is None:
            continue
        if x.dtype != dtype:
            raise TypeError(f"{operator}: {name} must be {dtype} (weight is {weight.dtype}), got {x.dtype}")
        if offsets is None and x.shape != weight.shape:
            refuse(operator, f"{name} must have shape {shape_of(weight)}, got {shape_of(x)}")
        if offsets is not None and (x.dim() != 1 or (first is not None and x.shape != first.shape)):
            want = "[kept entries]" if first is None else shape_of(first)
            refuse(operator, f"{name} must have shape {want} where offsets are given, got {shape_of(x)}")
        first = x
        check_device(operator, "weight", weight, **{name: x})


def _step_bytes(weight: Tensor, grad: Tensor, states: Sequence[Tensor | None], *masks: Tensor | None) -> int:
    return 2 * _size(weight) + _size(grad) + 2 * sum(map(_size, states)) + sum(map(_size, masks))


def _sgd_update(
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool, first: bool
) -> Update:
    def update(w: Tensor, g: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        g = -g if maximize else g
        if weight_decay != 0:
            g = g.add(w, alpha=weight_decay)
        if not states:
            return w.add(g, alpha=-lr), []
        buffer = g.clone() if first else states[0].mul(momentum).add(g, alpha=1 - dampening)
        g = g.add(buffer, alpha=momentum) if nesterov else buffer
        return w.add(g, alpha=-lr), [buffer]

    return update


def _sgd_reference(
    weight: Tensor, grad: Tensor, momentum_buffer: Tensor | None, bits: Tensor | None, offsets: Tensor | None,
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool, first: bool,
    clean: bool,
) -> None:  # fmt: skip
    states = [] if momentum_buffer is None else [momentum_buffer]
    update = _sgd_update(lr, momentum, dampening, weight_decay, nesterov, maximize, first)
    _step_reference(weight, grad, states, bits, offsets, update)


def _validate_sgd(
    weight: Tensor, grad: Tensor, momentum_buffer: Tensor | None, bits: Tensor | None, offsets: Tensor | None,
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool, first: bool,
    clean: bool,
) -> None:  # fmt: skip
    name = "masked_sgd_"
    _check_step(name, weight, grad, {"momentum_buffer": momentum_buffer}, bits, offsets, clean)
    check_number(name, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
    needed = True if momentum != 0 else False  # noqa: SIM210  (while tracing, a comparison is no bool)
    if (momentum_buffer is not None) != needed:
        got = "None" if momentum_buffer is None else shape_of(momentum_buffer)
        refuse(name, f"momentum_buffer must be a tensor exactly where momentum is not 0, got {got} and {momentum}")
    if nesterov and (momentum <= 0 or dampening != 0):
        refuse(name, f"nesterov needs a momentum and no dampening, got momentum={momentum} and dampening={dampening}")


_masked_sgd = register(
    Operator(
        "masked_sgd_(Tensor(a!) weight, Tensor grad, Tensor(b!)? momentum_buffer, Tensor? bits, Tensor? offsets, "
        "float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first, "
        "bool clean) -> ()",
        family="sparse",
        validate=_validate_sgd,
        reference=_sgd_reference,
        fake=lambda *args: None,
        backward="an optimiser's step is not differentiated",
        triton=Kernel("cofire_kernels.sparse_training:masked_sgd_"),
        bytes=lambda weight, grad, momentum_buffer, bits, offsets, *rest: _step_bytes(
            weight, grad, [momentum_buffer], bits, offsets
        ),
    )
)


def masked_sgd_(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    bits: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    clean: bool = False,
) -> None:
    """One step of stochastic gradient descent on the kept entries, in place and in one pass; the pruned ones become zero.

    Args:
        weight: fp32, bf16 or fp16 ``[N, ...]``; written. Computed in fp32 (fp64 for fp64).
        grad: of the weight's shape and dtype. What stands at pruned entries does not matter.
        momentum_buffer: fp32 (fp64 for fp64), of the weight's shape, or ``[kept entries]`` where ``offsets`` are given;
            written. None where ``momentum`` is 0.
        bits: the packed mask; None: every entry is kept.
        offsets: where the state of each row begins (:func:`cofire.ops.mask_offsets`). The state then holds the values of
            the kept entries alone, in row-major order.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in :class:`torch.optim.SGD`.
        first: the buffer is empty yet and becomes the gradient, as in torch's first step.
        clean: the caller knows that pruned entries of weight and state are zero already, so that runs of 64 pruned
            entries need not be touched.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: shapes that do not fit, a buffer without momentum or momentum without a buffer.

    Returns:
        Nothing.

    Example:
        >>> weight, grad = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, float("nan")]])
        >>> masked_sgd_(weight, grad, bits=torch.tensor([[1]], dtype=torch.uint8), lr=0.25)
        >>> weight.tolist()
        [[-1.5, 0.0]]

    Source: Sutskever et al. 2013 (On the importance of initialization and momentum), as torch.optim.SGD computes it.
    """
    _masked_sgd(
        weight, grad, momentum_buffer, bits, offsets, lr, momentum, dampening, weight_decay, nesterov, maximize, first,
        clean,
    )  # fmt: skip


def _adam_update(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool, maximize: bool, step: int
) -> Update:
    size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)

    def update(w: Tensor, g: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        g = -g if maximize else g
        if weight_decay != 0:
            w, g = (w * (1 - lr * weight_decay), g) if decoupled else (w, g.add(w, alpha=weight_decay))
        m = states[0].lerp(g, 1 - beta1)
        v = states[1].mul(beta2).addcmul_(g, g, value=1 - beta2)
        highest = [torch.maximum(states[2], v)] if len(states) == 3 else []
        denominator = ((highest[0] if highest else v).sqrt() / root).add_(eps)
        return w.addcdiv(m, denominator, value=-size), [m, v, *highest]

    return update


def _adam_reference(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None,
    bits: Tensor | None, offsets: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    decoupled: bool, maximize: bool, step: int, clean: bool,
) -> None:  # fmt: skip
    states = [exp_avg, exp_avg_sq, *([] if max_exp_avg_sq is None else [max_exp_avg_sq])]
    update = _adam_update(lr, beta1, beta2, eps, weight_decay, decoupled, maximize, step)
    _step_reference(weight, grad, states, bits, offsets, update)


def _validate_adam(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None,
    bits: Tensor | None, offsets: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    decoupled: bool, maximize: bool, step: int, clean: bool,
) -> None:  # fmt: skip
    name = "masked_adam_"
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "max_exp_avg_sq": max_exp_avg_sq}
    _check_step(name, weight, grad, states, bits, offsets, clean)
    check_number(name, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    check_integer(name, step=step)
    for argument, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            refuse(name, f"{argument} must be at least 0 and less than 1, got {beta}")
    if step < 1:
        refuse(name, f"step must be at least 1 (the number of this step), got {step}")


_masked_adam = register(
    Operator(
        "masked_adam_(Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
        "Tensor(d!)? max_exp_avg_sq, Tensor? bits, Tensor? offsets, float lr, float beta1, float beta2, float eps, "
        "float weight_decay, bool decoupled, bool maximize, SymInt step, bool clean) -> ()",
        family="sparse",
        validate=_validate_adam,
        reference=_adam_reference,
        fake=lambda *args: None,
        backward="an optimiser's step is not differentiated",
        triton=Kernel("cofire_kernels.sparse_training:masked_adam_"),
        bytes=lambda weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, bits, offsets, *rest: _step_bytes(
            weight, grad, [exp_avg, exp_avg_sq, max_exp_avg_sq], bits, offsets
        ),
    )
)


def masked_adam_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    bits: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    step: int,
    clean: bool = False,
) -> None:
    """One step of Adam or AdamW on the kept entries, in place and in one pass; the pruned ones become zero.

    Args:
        weight: fp32, bf16 or fp16 ``[N, ...]``; written. Computed in fp32 (fp64 for fp64).
        grad: of the weight's shape and dtype. What stands at pruned entries does not matter.
        exp_avg, exp_avg_sq: the moments, fp32 (fp64 for fp64), of the weight's shape, or ``[kept entries]`` where
            ``offsets`` are given; written, zero where pruned.
        max_exp_avg_sq: the largest second moment so far, likewise: the variant AMSGrad.
        bits: the packed mask; None: every entry is kept.
        offsets: where the state of each row begins (:func:`cofire.ops.mask_offsets`). The state then holds the values of
            the kept entries alone, in row-major order.
        lr, beta1, beta2, eps, weight_decay, maximize: as in :class:`torch.optim.Adam`.
        decoupled: the decay acts on the weight itself, as in :class:`torch.optim.AdamW`, not through the moments.
        step: the number of this step, from 1.
        clean: the caller knows that pruned entries of weight and state are zero already, so that runs of 64 pruned
            entries need not be touched.

    Raises:
        TypeError: a tensor of the wrong dtype, or a step that is no integer.
        ValueError: shapes that do not fit, a beta out of [0, 1), a step below 1.

    Returns:
        Nothing.

    Example:
        >>> weight, grad = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, float("nan")]])
        >>> first, second = torch.zeros(1, 2), torch.zeros(1, 2)
        >>> masked_adam_(weight, grad, first, second, bits=torch.tensor([[1]], dtype=torch.uint8), lr=0.25, step=1)
        >>> weight.tolist()
        [[0.75, 0.0]]

    Source: Kingma and Ba 2015 (1412.6980), algorithm 1; Loshchilov and Hutter 2019 (1711.05101), algorithm 2; in the order
    of operations of torch.optim.
    """
    _masked_adam(
        weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, bits, offsets, lr, beta1, beta2, eps, weight_decay,
        decoupled, maximize, step, clean,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- drop and grow


def random_keys(seed: int, count: int, device: torch.device | None = None) -> Tensor:
    """Of each of ``count`` flat indices a random number of 32 bits, in int64: word ``i % 4`` of Philox's block ``i // 4``
    under the key ``seed``."""
    block = torch.arange((count + 3) // 4, device=device)
    zero = torch.zeros_like(block)
    words = philox((block & WORD, block >> 32, zero, zero), (seed & WORD, (seed >> 32) & WORD))
    return torch.stack(words, 1).flatten()[:count]


def _first(key: Tensor, among: Tensor, number: Tensor, descending: bool) -> Tensor:
    """bool: the ``number`` first of the entries ``among`` by key, of each row; of equal ones those of lower index."""
    order = key.sort(dim=1, descending=descending, stable=True).indices
    others = ~among.gather(1, order)
    order = order.gather(1, others.to(torch.uint8).sort(dim=1, stable=True).indices)
    taken = torch.arange(key.shape[1], device=key.device) < number[:, None]
    return torch.zeros_like(among).scatter(1, order, taken)


def _refuse_nan(name: str, scores: Tensor, among: Tensor, of: str) -> None:
    found = int((scores.isnan() & among).sum())
    if found:
        refuse("prune_and_grow_", f"{name} scores must not be NaN, got NaN at {found} {of} entries")


def _prune_and_grow_reference(
    weight: Tensor,
    bits: Tensor,
    grow_score: Tensor | None,
    drop_score: Tensor | None,
    count: int,
    scope: str,
    seed: int,
) -> Tensor:
    kept = kept_of(bits, weight)
    shape = (1, weight.numel()) if scope == "tensor" else (weight.shape[0], _columns(weight))
    mask = kept.reshape(shape)
    drop = (weight if drop_score is None else drop_score).detach().reshape(shape).abs()
    _refuse_nan("drop", drop, mask, "kept")
    if grow_score is None:
        grow = random_keys(seed, weight.numel(), weight.device).view(shape)
    else:
        grow = grow_score.detach().reshape(shape).abs()
        _refuse_nan("grow", grow, ~mask, "pruned")
    has = mask.sum(1)
    number = torch.minimum(has, shape[1] - has).clamp(max=count)
    dropped, grown = _first(drop, mask, number, False), _first(grow, ~mask, number, True)
    weight.copy_(torch.where((dropped | grown).view(weight.shape), 0.0, weight))
    return pack_bits(((mask & ~dropped) | grown).view(weight.shape[0], -1).to(torch.uint8), 1)


def _validate_prune_and_grow(
    weight: Tensor,
    bits: Tensor,
    grow_score: Tensor | None,
    drop_score: Tensor | None,
    count: int,
    scope: str,
    seed: int,
) -> None:
    name = "prune_and_grow_"
    check_float(name, weight=weight, grow_score=grow_score, drop_score=drop_score)
    check_bits(name, weight, bits)
    for argument, x in (("grow_score", grow_score), ("drop_score", drop_score)):
        if x is not None and x.shape != weight.shape:
            refuse(name, f"{argument} must have shape {shape_of(weight)}, got {shape_of(x)}")
    check_device(name, "weight", weight, grow_score=grow_score, drop_score=drop_score)
    check_integer(name, count=count, seed=seed)
    check_choice(name, "scope", scope, SCOPES)
    if count < 0:
        refuse(name, f"count must not be negative, got {count}")


_prune_and_grow = register(
    Operator(
        "prune_and_grow_(Tensor(a!) weight, Tensor bits, Tensor? grow_score, Tensor? drop_score, SymInt count, str scope, "
        "int seed) -> Tensor new_bits",
        family="sparse",
        validate=_validate_prune_and_grow,
        reference=_prune_and_grow_reference,
        fake=lambda weight, bits, *rest: bits.new_empty(bits.shape),
        backward="a choice has no gradient",
        triton=Kernel("cofire_kernels.sparse_training:prune_and_grow_"),
        bytes=lambda weight, bits, grow_score, drop_score, *rest: (
            _size(weight) + 2 * _size(bits) + _size(grow_score) + _size(drop_score)
        ),
    )
)


def prune_and_grow_(
    weight: Tensor,
    bits: Tensor,
    grow_score: Tensor | None,
    count: int,
    *,
    scope: str = "row",
    drop_score: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Drop the least of the kept entries and grow as many of the pruned ones; dropped and grown weights become zero.

    What was just dropped cannot grow, and each row (or the tensor) keeps exactly as many entries as it had. Of equal
    scores those of lower index are dropped, and grown. Moments of an optimiser have to be zeroed at both: those of
    :mod:`cofire.optim` see to it, for others there is :func:`cofire.optim.reset_moments`.

    Args:
        weight: any float ``[N, ...]``; written where something was dropped or grown.
        bits: the packed mask.
        grow_score: of the weight's shape, any float; the largest magnitudes grow, best of the dense gradient. None:
            random ones, by a counter generator: Philox-4x32-10 with ``seed`` as key; an entry's number depends on its
            flat index alone, the same on every device. Take another seed at each update.
        count: how many to move in each row, or in the tensor. Where fewer are kept, or pruned, so many.
        scope: ``"row"`` or ``"tensor"``.
        drop_score: of the weight's shape, any float; the least magnitudes are dropped. None: those of the weight.
        seed: of random growth.

    Returns:
        uint8, the new packed mask.

    Raises:
        TypeError: a tensor that is no float, or numbers that are no integers.
        ValueError: shapes that do not fit, an unknown scope, a negative count, a score that is NaN.

    Example:
        >>> weight, bits = torch.tensor([[3.0, -1.0, 0.0, 0.0]]), torch.tensor([[3]], dtype=torch.uint8)
        >>> prune_and_grow_(weight, bits, torch.tensor([[9.0, 9.0, 0.5, -2.0]]), 1).tolist()  # 1001
        [[9]]
        >>> weight.tolist()
        [[3.0, 0.0, 0.0, 0.0]]

    Source: Mocanu et al. 2018 (SET, 1707.04780) for random growth; Evci et al. 2020 (RigL, 1911.11134), algorithm 1.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"prune_and_grow_: weight must be a tensor, got {type(weight).__name__}")
    result: Tensor = _prune_and_grow(weight, bits, grow_score, drop_score, count, scope, seed)
    return result


# ---------------------------------------------------------------------------------------------- statistics


class ActivationStatistics(NamedTuple):
    """Statistics of each feature, which can be merged over batches.

    Example:
        >>> x = torch.tensor([[1.0, -5.0], [3.0, 1.0], [2.0, 1.0]])
        >>> both = activation_statistics(x[:2]).merge(activation_statistics(x[2:]))
        >>> both.number, both.sum.tolist(), both.largest.tolist()
        (3, [6.0, -3.0], [3.0, 5.0])
    """

    number: int  #: how many vectors there were
    mean: Tensor
    deviation: Tensor  #: the sum of the squared deviations from the mean
    largest: Tensor  #: the largest magnitude

    @property
    def sum(self) -> Tensor:
        return self.mean * self.number

    @property
    def sum_of_squares(self) -> Tensor:
        return self.deviation + self.mean.square() * self.number

    @property
    def variance(self) -> Tensor:
        """Of the vectors seen, not of what they are a sample of."""
        return self.deviation / max(self.number, 1)

    def merge(self, other: ActivationStatistics) -> ActivationStatistics:
        """Those of both sets together (Chan et al. 1979)."""
        count = self.number + other.number
        share = other.number / max(count, 1)
        delta = other.mean - self.mean
        return ActivationStatistics(
            count,
            self.mean + delta * share,
            self.deviation + other.deviation + delta.square() * (self.number * share),
            torch.maximum(self.largest, other.largest),
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _statistics_reference(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = _rows(input.detach()).to(compute_dtype(input))
    if x.shape[0] == 0:
        return x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    mean = x.mean(0)
    return mean, (x - mean).square().sum(0), x.abs().amax(0)


def _check_features(operator: str, input: Tensor) -> None:
    check_float(operator, input=input)
    if input.dim() == 0:
        refuse(operator, "input must have shape [..., K], got []")


def _statistics_fake(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, deviation, largest = (input.new_empty(input.shape[-1:], dtype=compute_dtype(input)) for _ in range(3))
    return mean, deviation, largest


_activation_statistics = register(
    Operator(
        "activation_statistics(Tensor input) -> (Tensor mean, Tensor deviation, Tensor largest)",
        family="sparse",
        validate=lambda input: _check_features("activation_statistics", input),
        reference=_statistics_reference,
        fake=_statistics_fake,
        backward="statistics of calibration have no gradient",
        triton=Kernel("cofire_kernels.sparse_training:activation_statistics"),
        bytes=lambda input: _size(input) + 12 * input.shape[-1],
    )
)


def activation_statistics(input: Tensor) -> ActivationStatistics:
    """Number, mean, squared deviation and largest magnitude of each feature, in one pass over memory.

    Args:
        input: any float ``[..., K]``; all dimensions but the last count vectors.

    Returns:
        ``number`` (of vectors), and ``mean``, ``deviation`` (the sum of squared deviations) and ``largest`` (magnitude), fp32
        ``[K]`` each (fp64 for fp64); properties ``sum``, ``sum_of_squares``, ``variance``, and ``merge`` for several batches. A NaN
        makes the statistics of its feature NaN. Of no vectors all are zero.

    Raises:
        TypeError: ``input`` is no float tensor.
        ValueError: ``input`` has no dimension.

    Example:
        >>> found = activation_statistics(torch.tensor([[1.0, -5.0], [3.0, 1.0]]))
        >>> found.mean.tolist(), found.variance.tolist(), found.largest.tolist()
        ([2.0, -2.0], [1.0, 9.0], [3.0, 5.0])

    Source: Chan, Golub and LeVeque 1979 (Updating formulae and a pairwise algorithm for computing sample variances),
    equations 2.1.
    """
    mean, deviation, largest = _activation_statistics(input)
    return ActivationStatistics(math.prod(input.shape[:-1]), mean, deviation, largest)


def _gram_reference(input: Tensor) -> Tensor:
    x = _rows(input.detach()).to(compute_dtype(input))
    return x.t() @ x


_gram = register(
    Operator(
        "gram(Tensor input) -> Tensor",
        family="sparse",
        validate=lambda input: _check_features("gram", input),
        reference=_gram_reference,
        fake=lambda input: input.new_empty((input.shape[-1], input.shape[-1]), dtype=compute_dtype(input)),
        backward="statistics of calibration have no gradient",
        cpu="a product of the library",
        triton="a product of the library",
        flops=lambda input: 2 * input.numel() * input.shape[-1],
        bytes=lambda input: _size(input) + 4 * input.shape[-1] ** 2,
    )
)


def gram(input: Tensor) -> Tensor:
    """``X^T X`` of the vectors in X, in fp32.

    Args:
        input: any float ``[..., K]``; all dimensions but the last count vectors.

    Returns:
        ``[K, K]``, fp32 (fp64 for fp64). Sums of several batches are those of all.

    Raises:
        TypeError: ``input`` is no float tensor.
        ValueError: ``input`` has no dimension.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[1.0, 2.0], [2.0, 5.0]]

    Source: the Hessian of a layer's squared error (Hassibi and Stork 1993; Frantar and Alistarh 2022, 2208.11580).
    """
    result: Tensor = _gram(input)
    return result


def _groups_of(x: Tensor, rows: int, columns: int) -> Tensor:
    matrix = x.detach().to(compute_dtype(x))
    return matrix.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def _group_reference(
    weight: Tensor, grad: Tensor, block_rows: int, block_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    w, g = (_groups_of(x, block_rows, block_columns) for x in (weight, grad))
    return w.square().sum((1, 3)), g.square().sum((1, 3)), (w * g).sum((1, 3))


def _validate_group(weight: Tensor, grad: Tensor, block_rows: int, block_columns: int) -> None:
    name = "group_statistics"
    check_float(name, weight=weight, grad=grad)
    check_same(name, "weight", weight, grad=grad)
    if weight.dim() != 2:
        refuse(name, f"weight must have shape [N, K], got {shape_of(weight)}")
    if grad.shape != weight.shape:
        refuse(name, f"grad must have shape {shape_of(weight)}, got {shape_of(grad)}")
    if block_rows < 1 or block_columns < 1 or weight.shape[0] % block_rows or weight.shape[1] % block_columns:
        got = f"({block_rows}, {block_columns})"
        refuse(name, f"block must be positive and divide the shape of weight {shape_of(weight)}, got {got}")


def _group_fake(weight: Tensor, grad: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (weight.shape[0] // block_rows, weight.shape[1] // block_columns)
    first, second, third = (weight.new_empty(shape, dtype=compute_dtype(weight)) for _ in range(3))
    return first, second, third


_group_statistics = register(
    Operator(
        "group_statistics(Tensor weight, Tensor grad, SymInt block_rows, SymInt block_columns) -> "
        "(Tensor weight_squares, Tensor grad_squares, Tensor products)",
        family="sparse",
        validate=_validate_group,
        reference=_group_reference,
        fake=_group_fake,
        backward="statistics of groups have no gradient",
        triton=Kernel("cofire_kernels.sparse_training:group_statistics"),
        bytes=lambda weight, grad, block_rows, block_columns: (
            _size(weight) + _size(grad) + 12 * weight.numel() // (block_rows * block_columns)
        ),
    )
)


def group_statistics(weight: Tensor, grad: Tensor, block: int | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each group of R x C entries the sums of ``w^2``, ``g^2`` and ``w g``, in one pass over memory.

    Args:
        weight: any float ``[N, K]``.
        grad: of the same shape and dtype.
        block: ``(R, C)``, or one number for both; N and K must be multiples. ``(1, K)`` are rows, ``(N, 1)`` columns.

    Returns:
        ``weight_squares``, ``grad_squares`` and ``products``, fp32 ``[N / R, K / C]`` each (fp64 for fp64).

    Raises:
        TypeError: a tensor that is no float, or a block of something else than integers.
        ValueError: shapes that do not fit, or a block that does not divide them.

    Example:
        >>> w, g = torch.tensor([[1.0, 2.0, 0.0, 3.0]]), torch.tensor([[1.0, -1.0, 5.0, 2.0]])
        >>> [x.tolist() for x in group_statistics(w, g, (1, 2))]
        [[[5.0, 9.0]], [[2.0, 29.0]], [[-1.0, 6.0]]]

    Source: group saliency from norms and their product with the gradient (Chen et al. 2024, HESSO, 2409.09085).
    """
    sizes = check_pair("group_statistics", "block", block)
    if len(sizes) != 2:
        refuse("group_statistics", f"block must be (R, C), got {block!r}")
    squares, grads, products = _group_statistics(weight, grad, *sizes)
    return squares, grads, products
