# SPDX-License-Identifier: Apache-2.0
"""Better masks without training: kept and pruned weights of a row change places while that lowers the layer's error.

Conventions: a layer is ``y = x W^T`` with ``W [N, K]``; a mask says 1 for what is kept, packed as
:func:`cofire.ops.pack_bits` packs bits (``uint8 [N, ceil(K / 8)]``). Every row keeps as many weights as before.

All arithmetic is done in fp64 and each operation is rounded by itself, in the order written here; sums are taken as
:func:`_sum` does. So kernels and references decide alike: their masks are equal, not close.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.ops.checks import check_choice, check_device, check_float, check_integer, check_number, refuse, shape_of
from cofire.ops.packing import pack_bits, packed_bytes, unpack_bits
from cofire.ops.sparse import check_bits
from cofire.registry import Kernel, Operator, register

__all__ = ["corrected_bias", "dsnot_swap", "gram_swap", "pruning_error"]

#: A swap must lower a row's error by more than this share of its first error. Far above the roundings of fp64, so that
#: the search ends; far below what anybody could see in an output.
LEAST_GAIN = 2.0**-30
#: Partial sums of a row.
LANES = 1024
#: How the search of :func:`dsnot_swap` ends.
STOPS = ("decrease", "official")

Pattern = tuple[int, int]


# ------------------------------------------------------------------------------------------------------ validation


def _check_mask(operator: str, weight: Tensor, bits: Tensor) -> None:
    if weight.dim() != 2:
        refuse(operator, f"weight must have shape [rows, columns], got {shape_of(weight)}")
    check_bits(operator, weight, bits)


def _check_vectors(operator: str, weight: Tensor, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        if not isinstance(vector, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(vector).__name__}")
        check_float(operator, **{name: vector})
        if list(vector.shape) != [weight.shape[1]]:
            refuse(operator, f"{name} must have shape [{weight.shape[1]}], one per column, got {shape_of(vector)}")
    check_device(operator, "weight", weight, **vectors)


def _check_gram(operator: str, weight: Tensor, gram: Tensor) -> None:
    if not isinstance(gram, Tensor):
        raise TypeError(f"{operator}: gram must be a tensor, got {type(gram).__name__}")
    columns = weight.shape[1]
    check_float(operator, gram=gram)
    if list(gram.shape) != [columns, columns]:
        refuse(operator, f"gram must have shape [{columns}, {columns}], got {shape_of(gram)}")
    check_device(operator, "weight", weight, gram=gram)


def _check_swaps(operator: str, columns: int, max_swaps: int, group: int) -> None:
    check_integer(operator, max_swaps=max_swaps)
    if max_swaps < 0:
        refuse(operator, f"max_swaps must be at least 0, got {max_swaps}")
    if group and columns % group:
        refuse(
            operator,
            f"the columns of weight must be a multiple of the pattern's group ({group}), got {columns}; pad=True lets the last "
            "group be shorter",
        )


def check_pad(operator: str, pad: bool, pattern: object) -> None:
    """``pad`` is for a pattern N:M whose last group may be shorter."""
    if not isinstance(pad, bool):
        raise TypeError(f"{operator}: pad must be True or False, got {pad!r}")
    if pad and pattern is None:
        refuse(operator, "pad must be False where there is no pattern N:M, got True")


def check_pattern(operator: str, pattern: Pattern | None) -> int:
    """The size of a group of an N:M pattern; 0 where there is none."""
    if pattern is None:
        return 0
    if not (isinstance(pattern, (tuple, list)) and len(pattern) == 2):
        raise TypeError(f"{operator}: pattern must be two integers (kept, of how many), got {pattern!r}")
    check_integer(operator, **{"pattern[0]": pattern[0], "pattern[1]": pattern[1]})
    if not 1 <= pattern[0] <= pattern[1]:
        refuse(operator, f"pattern must keep 1 to {pattern[1]} of {pattern[1]}, got {pattern[0]}:{pattern[1]}")
    return int(pattern[1])


# ------------------------------------------------------------------------------------------------ parts of references


def _kept(bits: Tensor, columns: int) -> Tensor:
    return unpack_bits(bits, 1, columns).bool()


def _padded(x: Tensor, more: int, value: float = 0.0) -> Tensor:
    """So many columns more."""
    return F.pad(x.detach(), (0, more), value=value)


def _padded_bits(bits: Tensor, columns: int, more: int) -> Tensor:
    """The added columns are pruned."""
    return pack_bits(F.pad(unpack_bits(bits, 1, columns), (0, more)), 1)


def _sum(x: Tensor) -> Tensor:
    """Of each row: columns k, k + 1024, ... one after the other, and of these sums the second half is added to the first,
    until one is left."""
    width = min(LANES, 1 << max(x.shape[1] - 1, 0).bit_length())
    parts = F.pad(x, (0, -x.shape[1] % width)).view(len(x), -1, width).unbind(1)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    while width > 1:
        width //= 2
        total = total[:, :width] + total[:, width:]
    return total[:, 0]


def _at(x: Tensor, column: Tensor) -> Tensor:
    return x.gather(1, column[:, None])[:, 0]


# ---------------------------------------------------------------------------------------------------------- dsnot_swap


def _validate_dsnot_swap(
    weight: Tensor, bits: Tensor, mean: Tensor, norm: Tensor, growth: Tensor,
    max_swaps: int, threshold: float, official: bool, group: int,
) -> None:  # fmt: skip
    _check_mask("dsnot_swap", weight, bits)
    _check_vectors("dsnot_swap", weight, mean=mean, norm=norm, growth=growth)
    _check_swaps("dsnot_swap", weight.shape[1], max_swaps, group)


def _dsnot_swap_reference(
    weight: Tensor, bits: Tensor, mean: Tensor, norm: Tensor, growth: Tensor,
    max_swaps: int, threshold: float, official: bool, group: int,
) -> Tensor:  # fmt: skip
    columns = weight.shape[1]
    kept = _kept(bits, columns)
    if weight.numel() == 0:
        return pack_bits(kept.to(torch.uint8), 1)
    w = weight.double()
    share = w * mean.double()  # what a weight adds to the mean of its output
    gain = share * growth.double()
    metric = w.abs() * norm.double()
    # Each weight moves once at most; what is not finite never moves.
    may_grow = ~kept & (growth > 0) & gain.isfinite()
    may_go = kept & metric.isfinite()

    error = _sum(torch.where(kept, 0.0, share))  # of the mean output
    limit = torch.full_like(error, threshold)
    if not official:
        limit = threshold * _sum(share.abs()) / math.sqrt(columns)
    first = error.sign()
    active = error.abs() > limit
    block = torch.arange(columns, device=weight.device) // max(group, 1)
    for _ in range(min(max_swaps, columns)):
        if not active.any():
            break
        sign = error.sign()[:, None]
        grown = torch.where(may_grow, sign * gain, -torch.inf).max(1)
        fits = block == block[grown.indices][:, None] if group else sign * share < 0
        gone = torch.where(may_go & fits, metric, torch.inf).min(1)
        new = error + _at(share, gone.indices) - _at(share, grown.indices)
        swap = active & (grown.values > -torch.inf) & (gone.values < torch.inf)
        if not official:
            swap &= new.abs() < error.abs()
        elif group:
            swap &= new * first > 0
        for column, state, moves in ((grown.indices, True, may_grow), (gone.indices, False, may_go)):
            kept.scatter_(1, column[:, None], torch.where(swap, state, _at(kept, column))[:, None])
            moves.scatter_(1, column[:, None], (_at(moves, column) & ~swap)[:, None])
        error = torch.where(swap, new, error)
        active = swap & (error.abs() > limit)
    return pack_bits(kept.to(torch.uint8), 1)


_dsnot_swap = register(
    Operator(
        "dsnot_swap(Tensor weight, Tensor bits, Tensor mean, Tensor norm, Tensor growth, int max_swaps, "
        "float threshold, bool official, int group) -> Tensor",
        family="sparse",
        validate=_validate_dsnot_swap,
        reference=_dsnot_swap_reference,
        fake=lambda weight, bits, *others: bits.new_empty(bits.shape),
        backward="masks have no gradient",
        triton=Kernel("cofire_kernels.sparse_refine:dsnot_swap"),
        bytes=lambda weight, bits, *others: weight.numel() * weight.element_size() + 2 * bits.numel(),
    )
)


def dsnot_swap(
    weight: Tensor,
    bits: Tensor,
    mean: Tensor,
    norm: Tensor,
    variance: Tensor,
    *,
    max_swaps: int | None = None,
    gamma: float = 1.0,
    threshold: float = 1e-3,
    stop: str = "decrease",
    pattern: Pattern | None = None,
    pad: bool = False,
) -> Tensor:
    """Swap kept and pruned weights of each row while that brings the mean of its output nearer to the dense layer's.

    With ``c = weight * mean``, a row's error is the sum of c over its pruned weights. Repeatedly, the pruned weight with the
    largest ``sign(error) c / variance^gamma`` is grown, and of the kept weights whose c has the other sign the one with the
    least ``|weight| norm`` is pruned. Ties go to the lower column, and no weight moves twice. A row ends when its error is
    at most the threshold, after ``max_swaps`` swaps, when there is no candidate, and by ``stop``. A feature without
    variance is never grown (unless gamma is 0), and a row with values that are not finite may stay as it is.

    Args:
        weight: ``[N, K]``.
        bits: uint8 ``[N, ceil(K / 8)]``, the packed mask to start from.
        mean: ``[K]``, of the layer's inputs.
        norm: ``[K]``, Euclidean, of each column of inputs.
        variance: ``[K]``, of the inputs.
        max_swaps: per row; default ``max(8, K / 80)``.
        gamma: power of the variance.
        threshold: with ``stop="decrease"`` in units of ``sum |c| / sqrt(K)``, otherwise of the error itself.
        stop: ``"decrease"``: before the first swap that would not lower the error's magnitude. ``"official"``: the
            released code's loop, which goes on when the error has crossed zero.
        pattern: ``(N, M)``: the mask keeps N of each M columns. Then what is pruned is the least kept weight of the grown
            one's group, of either sign; with ``stop="official"`` the error must also keep its sign.
        pad: of a pattern: K need be no multiple of M, and the columns behind the last multiple are a group of their own.

    Returns:
        uint8, the shape of ``bits``: the new mask; each row (and group) keeps as many as before.

    Raises:
        TypeError: a tensor that is not one, or not of floats; ``bits`` is not uint8.
        ValueError: shapes that do not fit, K is no multiple of M without ``pad``, a value out of range.

    Example:
        >>> weight = torch.tensor([[3.0, 2.0, -1.0, 0.5]])
        >>> bits = pack_bits(torch.tensor([[1, 0, 1, 0]], dtype=torch.uint8), 1)
        >>> ones = torch.ones(4)
        >>> unpack_bits(dsnot_swap(weight, bits, ones, ones, ones), 1, 4).tolist()  # the error falls from 2.5 to -0.5
        [[1, 1, 0, 0]]

    Source: Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ICLR 2024, section 3 and
    equations 4 to 6; to stop where the error would rise is not in the paper.
    """
    check_choice("dsnot_swap", "stop", stop, STOPS)
    check_number("dsnot_swap", gamma=gamma, threshold=threshold)
    for name, value in (("gamma", gamma), ("threshold", threshold)):
        if not 0 <= value < math.inf:
            refuse("dsnot_swap", f"{name} must be a number of at least 0, got {value}")
    group, columns, more = check_pattern("dsnot_swap", pattern), 0, 0
    check_pad("dsnot_swap", pad, pattern)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        columns = weight.shape[1]
        _check_vectors("dsnot_swap", weight, mean=mean, norm=norm, variance=variance)
        max_swaps = max(8, columns // 80) if max_swaps is None else max_swaps
        v = variance.double()
        growth = (v**-gamma).clamp(max=torch.finfo(torch.float64).max)
        growth = growth if gamma == 0 else torch.where(v > 0, growth, 0.0)
        more = -columns % group if pad else 0
    else:
        growth = variance
    threshold, official = float(threshold), stop == "official"
    if more:  # of no weight and no growth: never a candidate
        _check_mask("dsnot_swap", weight, bits)
        bits = _padded_bits(bits, columns, more)
        weight, mean, norm, growth = (_padded(x, more) for x in (weight, mean, norm, growth))
        if not official:  # which is in units of the square root of the number of columns
            threshold *= math.sqrt((columns + more) / columns)
    out: Tensor = _dsnot_swap(weight, bits, mean, norm, growth, max_swaps, threshold, official, group)
    return out[:, : packed_bytes(columns, 1)].contiguous() if more else out


# ----------------------------------------------------------------------------------------------------------- gram_swap


def _validate_gram_swap(
    weight: Tensor, bits: Tensor, gram: Tensor, correlation: Tensor, max_swaps: int, candidates: int, group: int
) -> None:
    _check_mask("gram_swap", weight, bits)
    _check_gram("gram_swap", weight, gram)
    if correlation.dtype != torch.float64:
        raise TypeError(f"gram_swap: correlation must be float64, got {correlation.dtype}")
    if correlation.shape != weight.shape:
        refuse("gram_swap", f"correlation must have shape {shape_of(weight)}, got {shape_of(correlation)}")
    check_device("gram_swap", "weight", weight, correlation=correlation)
    _check_swaps("gram_swap", weight.shape[1], max_swaps, group)
    check_integer("gram_swap", candidates=candidates)
    if candidates < 1:
        refuse("gram_swap", f"candidates must be at least 1, got {candidates}")


def _finite(x: Tensor, where: Tensor | None = None) -> Tensor:
    """Infinite wherever something is no candidate."""
    there = x < torch.inf
    return torch.where(there if where is None else there & where, x, torch.inf)


def _least(x: Tensor, count: int) -> Tensor:
    """The columns of each row's least values, ties to the lower column; in ascending order of the columns."""
    return x.sort(dim=1, stable=True).indices[:, :count].sort(1).values


def _gram_swap_reference(
    weight: Tensor, bits: Tensor, gram: Tensor, correlation: Tensor, max_swaps: int, candidates: int, group: int
) -> Tensor:
    rows, columns = weight.shape
    kept = _kept(bits, columns)
    if weight.numel() == 0:
        return pack_bits(kept.to(torch.uint8), 1)
    w, g, c = weight.double(), gram.double(), correlation.clone()
    diagonal = g.diagonal()
    limit = -LEAST_GAIN * _sum(torch.where(kept, 0.0, w * c)).abs()
    active = torch.ones(rows, dtype=torch.bool, device=weight.device)
    for _ in range(max_swaps):
        # How the error changes if one weight goes, or comes back, alone.
        going = _finite(w * (2 * c + w * diagonal), kept)
        coming = _finite(w * (w * diagonal - 2 * c), ~kept)
        if group:
            blocks = torch.arange(columns, device=weight.device).view(-1, group).expand(rows, -1, -1)
            gone, grown = blocks[..., :, None], blocks[..., None, :]
        else:
            gone, grown = _least(going, candidates)[:, None, :, None], _least(coming, candidates)[:, None, None, :]
        shape = torch.broadcast_shapes(gone.shape, grown.shape)  # [rows, blocks or 1, gone, grown]
        gone, grown = gone.expand(shape).flatten(1), grown.expand(shape).flatten(1)
        change = going.gather(1, gone) + coming.gather(1, grown)
        change = _finite(change - 2 * w.gather(1, gone) * w.gather(1, grown) * g[gone, grown])
        least, place = change.min(1)
        active &= least < limit
        if not active.any():
            break
        p, q = _at(gone, place), _at(grown, place)
        new = c + _at(w, p)[:, None] * g[p] - _at(w, q)[:, None] * g[q]
        c = torch.where(active[:, None], new, c)
        for column, state in ((p, False), (q, True)):
            kept.scatter_(1, column[:, None], torch.where(active, state, _at(kept, column))[:, None])
    return pack_bits(kept.to(torch.uint8), 1)


_gram_swap = register(
    Operator(
        "gram_swap(Tensor weight, Tensor bits, Tensor gram, Tensor correlation, int max_swaps, int candidates, "
        "int group) -> Tensor",
        family="sparse",
        validate=_validate_gram_swap,
        reference=_gram_swap_reference,
        fake=lambda weight, bits, *others: bits.new_empty(bits.shape),
        backward="masks have no gradient",
        triton=Kernel("cofire_kernels.sparse_refine:gram_swap"),
        bytes=lambda weight, bits, gram, correlation, *others: sum(
            t.numel() * t.element_size() for t in (weight, bits, bits, gram, correlation)
        ),
    )
)


def gram_swap(
    weight: Tensor,
    bits: Tensor,
    gram: Tensor,
    *,
    max_swaps: int | None = None,
    candidates: int = 64,
    pattern: Pattern | None = None,
    pad: bool = False,
) -> Tensor:
    """Swap kept and pruned weights of each row, each time the pair that lowers the layer's squared error most.

    The mean squared error of a row is ``e = w_P^T G w_P`` over its pruned weights P, with the inputs' second moments
    ``G = X^T X / T``. Pruning p and growing q changes it by ``(2 w_p c_p + w_p^2 G_pp) + (w_q^2 G_qq - 2 w_q c_q) -
    2 w_p w_q G_pq``, where ``c = G (w * pruned)`` is kept up to date. The best pair is that of the best ``candidates`` to
    go and to come by themselves; ties go to the lower p, then the lower q. A row ends when its best pair lowers the error
    by less than 2^-30 of what it was at first, which is far above the roundings. With the covariance as G the error is that
    behind a corrected bias (:func:`corrected_bias`).

    Args:
        weight: ``[N, K]``.
        bits: uint8 ``[N, ceil(K / 8)]``, the packed mask to start from.
        gram: ``[K, K]``, symmetric; the scale does not matter.
        max_swaps: per row; default K. A row seldom needs half as many as it has pruned weights.
        candidates: how many to go, and to come, are tried with each other.
        pattern: ``(N, M)``: the mask keeps N of each M columns; then the pairs are all those within a group.
        pad: of a pattern: K need be no multiple of M, and the columns behind the last multiple are a group of their own.

    Returns:
        uint8, the shape of ``bits``: the new mask; each row (and group) keeps as many as before.

    Raises:
        TypeError: a tensor that is not one, or not of floats; ``bits`` is not uint8.
        ValueError: shapes that do not fit, K is no multiple of M without ``pad``, a value out of range.

    Example:
        >>> weight = torch.tensor([[1.0, 1.0, 0.8]])
        >>> bits = pack_bits(torch.tensor([[1, 1, 0]], dtype=torch.uint8), 1)
        >>> gram = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 2.0]])  # the first two are nearly one
        >>> unpack_bits(gram_swap(weight, bits, gram), 1, 3).tolist()
        [[0, 1, 1]]

    Source: the quadratic error of a layer: Frantar, Alistarh, "SparseGPT", ICML 2023, equation 2; swaps by it: "SparseSwaps:
    Tractable LLM Pruning Mask Refinement at Scale", arXiv 2512.10922.
    """
    group, columns, more = check_pattern("gram_swap", pattern), 0, 0
    check_pad("gram_swap", pad, pattern)
    correlation = weight
    if isinstance(weight, Tensor) and weight.dim() == 2:
        _check_mask("gram_swap", weight, bits)
        _check_gram("gram_swap", weight, gram)
        columns = weight.shape[1]
        max_swaps = columns if max_swaps is None else max_swaps
        correlation = _pruned(weight, bits) @ gram.double()
        more = -columns % group if pad else 0
    if more:  # of infinite cost: never a candidate
        bits, correlation = _padded_bits(bits, columns, more), _padded(correlation, more)
        weight, gram = _padded(weight, more, 1.0), F.pad(gram.detach(), (0, more, 0, more))
        gram.diagonal()[columns:] = torch.inf
    out: Tensor = _gram_swap(weight, bits, gram, correlation, max_swaps, candidates, group)
    return out[:, : packed_bytes(columns, 1)].contiguous() if more else out


# -------------------------------------------------------------------------------------------- what a mask does to a layer


def _pruned(weight: Tensor, bits: Tensor) -> Tensor:
    """What a mask takes away, in fp64."""
    return torch.where(_kept(bits, weight.shape[1]), 0.0, weight.detach().double())


def pruning_error(weight: Tensor, bits: Tensor, gram: Tensor) -> Tensor:
    """The mean squared error that a mask makes in each output of a layer.

    Args:
        weight: ``[N, K]``.
        bits: uint8 ``[N, ceil(K / 8)]``, the packed mask.
        gram: ``[K, K]``, mean of ``x x^T`` over the inputs; or their covariance, for the error behind a corrected bias.

    Returns:
        fp64 ``[N]``.

    Raises:
        TypeError, ValueError: as in :func:`gram_swap`.

    Example:
        >>> bits = pack_bits(torch.tensor([[1, 0]], dtype=torch.uint8), 1)
        >>> pruning_error(torch.tensor([[5.0, 3.0]]), bits, torch.eye(2)).tolist()
        [9.0]
    """
    _check_mask("pruning_error", weight, bits)
    _check_gram("pruning_error", weight, gram)
    pruned = _pruned(weight, bits)
    return (pruned @ gram.double() * pruned).sum(1)


def corrected_bias(weight: Tensor, bits: Tensor, mean: Tensor, bias: Tensor | None = None) -> Tensor:
    """The bias with which a pruned layer has the dense layer's mean outputs: ``bias + pruned weights @ mean``.

    Args:
        weight: ``[N, K]``.
        bits: uint8 ``[N, ceil(K / 8)]``, the packed mask.
        mean: ``[K]``, of the layer's inputs.
        bias: ``[N]``, of the dense layer; None: it has none.

    Returns:
        ``[N]`` in the weight's dtype.

    Raises:
        TypeError: a tensor that is not one, or not of floats; ``bits`` is not uint8.
        ValueError: shapes that do not fit.

    Example:
        >>> bits = pack_bits(torch.tensor([[1, 0]], dtype=torch.uint8), 1)
        >>> corrected_bias(torch.tensor([[5.0, 3.0]]), bits, torch.tensor([1.0, 0.5])).tolist()
        [1.5]
    """
    _check_mask("corrected_bias", weight, bits)
    _check_vectors("corrected_bias", weight, mean=mean)
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        refuse("corrected_bias", f"bias must have shape [{weight.shape[0]}], got {shape_of(bias)}")
    more = _pruned(weight, bits) @ mean.double()
    return (more if bias is None else more + bias.detach().double()).to(weight.dtype)
