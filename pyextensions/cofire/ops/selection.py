# SPDX-License-Identifier: Apache-2.0
"""Selection primitives that several families share: compaction, packed masks, and which weights to keep.

A packed mask ("bits") is uint8 ``[N, ceil(K / 8)]``: bit ``k % 8`` of byte ``k // 8`` of a row says whether column k is
kept; what is left of a row's last byte is zero. It is :func:`cofire.ops.pack_bits` of zeros and ones, one bit each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cofire.ops.checks import (
    check_choice,
    check_device,
    check_finite,
    check_float,
    check_integer,
    check_number,
    check_pair,
    is_integer,
    refuse,
    shape_of,
)
from cofire.ops.packing import pack_bits, packed_bytes, unpack_bits
from cofire.registry import Kernel, Operator, register

__all__ = [
    "compact",
    "keep_mask",
    "keep_masks",
    "mask_offsets",
    "pack_mask",
    "transpose_mask",
    "unpack_mask",
]

#: What a set of scores is called, and the shape of the tensor that it needs besides the weight.
SCORES = {
    "value": None,
    "magnitude": None,
    "wanda": "[K]",
    "taylor": "[N, K]",
    "fisher": "[N, K]",
    "magnitude_gradient": "[N, K]",
}
SCOPES = ("row", "tensor", "block")


def _check_matrix(operator: str, name: str, x: Tensor, axes: str = "[rows, columns]") -> None:
    if x.dim() != 2:
        refuse(operator, f"{name} must have shape {axes}, got {shape_of(x)}")


# ------------------------------------------------------------------------------------------------- compaction


def _validate_compact(mask: Tensor) -> None:
    _check_matrix("compact", "mask", mask)


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


# ----------------------------------------------------------------------------------------------- packed masks


def _check_bits(operator: str, bits: Tensor, columns: Any = None) -> None:
    if bits.dtype != torch.uint8:
        raise TypeError(f"{operator}: bits must be uint8, got {bits.dtype}")
    _check_matrix(operator, "bits", bits, "[N, ceil(columns / 8)]")
    if columns is not None:
        check_integer(operator, columns=columns)
        if columns < 0 or bits.shape[1] != packed_bytes(columns, 1):
            refuse(
                operator, f"{columns} columns take {packed_bytes(columns, 1)} bytes per row, got bits {shape_of(bits)}"
            )


def _pack_reference(mask: Tensor) -> Tensor:
    return pack_bits((mask != 0).to(torch.uint8), 1)


_pack_mask = register(
    Operator(
        "pack_mask(Tensor mask) -> Tensor",
        family="selection",
        validate=lambda mask: _check_matrix("pack_mask", "mask", mask),
        reference=_pack_reference,
        fake=lambda mask: mask.new_empty((mask.shape[0], packed_bytes(mask.shape[1], 1)), dtype=torch.uint8),
        backward="bits have no gradient",
        cpu=(torch.bool, torch.uint8),
        triton=Kernel("cofire_kernels.selection:pack_mask"),
        bytes=lambda mask: mask.numel() * mask.element_size() + mask.shape[0] * packed_bytes(mask.shape[1], 1),
    )
)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask, one bit per entry.

    Args:
        mask: ``[N, K]``, bool or any dtype in which non-zero means kept.

    Returns:
        uint8 ``[N, ceil(K / 8)]``: column k is bit ``k % 8`` of byte ``k // 8``; the bits after the last column are zero.

    Raises:
        ValueError: ``mask`` is not two-dimensional.

    Example:
        >>> pack_mask(torch.tensor([[1, 0, 1, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)).tolist()
        [[5, 1]]

    Source: bitmaps as masks of sparse matrices (SpInfer, Fan et al., EuroSys 2025, section 4.1), here in plain row order.
    """
    result: Tensor = _pack_mask(mask)
    return result


def _unpack_reference(bits: Tensor, columns: int) -> Tensor:
    return unpack_bits(bits, 1, columns).to(torch.bool)


_unpack_mask = register(
    Operator(
        "unpack_mask(Tensor bits, SymInt columns) -> Tensor",
        family="selection",
        validate=lambda bits, columns: _check_bits("unpack_mask", bits, columns),
        reference=_unpack_reference,
        fake=lambda bits, columns: bits.new_empty((bits.shape[0], columns), dtype=torch.bool),
        backward="bits have no gradient",
        cpu=(torch.uint8,),
        triton=Kernel("cofire_kernels.selection:unpack_mask"),
        bytes=lambda bits, columns: bits.numel() + bits.shape[0] * columns,
    )
)


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    """What :func:`pack_mask` packed.

    Args:
        bits: uint8 ``[N, ceil(columns / 8)]``; bits after the last column are ignored.
        columns: K.

    Returns:
        bool ``[N, K]``.

    Raises:
        TypeError: ``bits`` is not uint8, or ``columns`` no integer.
        ValueError: ``bits`` has another shape.

    Example:
        >>> unpack_mask(torch.tensor([[5, 1]], dtype=torch.uint8), 9).int().tolist()
        [[1, 0, 1, 0, 0, 0, 0, 0, 1]]

    Source: the inverse of :func:`pack_mask`.
    """
    result: Tensor = _unpack_mask(bits, columns)
    return result


_transpose_mask = register(
    Operator(
        "transpose_mask(Tensor bits, SymInt columns) -> Tensor",
        family="selection",
        validate=lambda bits, columns: _check_bits("transpose_mask", bits, columns),
        reference=lambda bits, columns: _pack_reference(_unpack_reference(bits, columns).t()),
        fake=lambda bits, columns: bits.new_empty((columns, packed_bytes(bits.shape[0], 1))),
        backward="bits have no gradient",
        cpu=(torch.uint8,),
        triton=Kernel("cofire_kernels.selection:transpose_mask"),
        bytes=lambda bits, columns: bits.numel() + columns * packed_bytes(bits.shape[0], 1),
    )
)


def transpose_mask(bits: Tensor, columns: int) -> Tensor:
    """The packed mask of the transposed matrix.

    Args:
        bits: uint8 ``[N, ceil(columns / 8)]``; bits after the last column are ignored.
        columns: K.

    Returns:
        uint8 ``[K, ceil(N / 8)]``.

    Raises:
        TypeError: ``bits`` is not uint8, or ``columns`` no integer.
        ValueError: ``bits`` has another shape.

    Example:
        >>> transpose_mask(torch.tensor([[1], [3]], dtype=torch.uint8), 2).tolist()  # rows 10 and 11
        [[3], [2]]

    Source: transposition of bit matrices (Warren, "Hacker's Delight", 2nd edition, section 7-3).
    """
    result: Tensor = _transpose_mask(bits, columns)
    return result


def _offsets_reference(bits: Tensor) -> Tensor:
    counts = unpack_bits(bits, 1, 8 * bits.shape[1]).sum(1, dtype=torch.int64)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


_mask_offsets = register(
    Operator(
        "mask_offsets(Tensor bits) -> Tensor",
        family="selection",
        validate=lambda bits: _check_bits("mask_offsets", bits),
        reference=_offsets_reference,
        fake=lambda bits: bits.new_empty((bits.shape[0] + 1,), dtype=torch.int64),
        backward="bits have no gradient",
        cpu=(torch.uint8,),
        triton=Kernel("cofire_kernels.selection:mask_offsets"),
        bytes=lambda bits: bits.numel() + 8 * (bits.shape[0] + 1),
    )
)


def mask_offsets(bits: Tensor) -> Tensor:
    """Where the kept values of each row begin, if the kept values of all rows stand one after the other.

    Args:
        bits: uint8 ``[N, ceil(K / 8)]``, as :func:`pack_mask` makes them (zero after the last column).

    Returns:
        int64 ``[N + 1]``: zero, then the number of set bits up to the end of each row.

    Raises:
        TypeError: ``bits`` is not uint8.
        ValueError: ``bits`` is not two-dimensional.

    Example:
        >>> mask_offsets(torch.tensor([[5, 1], [0, 0], [2, 0]], dtype=torch.uint8)).tolist()
        [0, 3, 3, 4]

    Source: the row pointer of compressed sparse rows.
    """
    result: Tensor = _mask_offsets(bits)
    return result


# ------------------------------------------------------------------------------------------- which weights to keep


def scores_of(weight: Tensor, other: Tensor | None, score: str, factor: float) -> Tensor:
    """The scores by which weights are kept, in fp32 (fp64 where an argument is), each operation rounded by itself.

    Every kernel computes these very numbers, so that masks are equal bit for bit.
    """
    wide = torch.float64 in (weight.dtype, None if other is None else other.dtype)
    w = weight.detach().to(torch.float64 if wide else torch.float32)
    if other is None:
        return w if score == "value" else w.abs()
    o = other.detach().to(w.dtype)
    if score == "wanda":
        return w.abs() * o
    if score == "taylor":
        return (w * o).abs()
    if score == "fisher":
        return (w * o).square()
    return w.abs() + o.abs() * factor


def _refuse_nan(operator: str, scores: Sequence[Tensor]) -> None:
    found = sum(int(s.isnan().sum()) for s in scores)
    if found:
        refuse(operator, f"scores must not be NaN, got {found} NaN among {sum(s.numel() for s in scores)} scores")


def _refuse_counts(counts: Tensor, columns: int) -> None:
    if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= columns:
        got = f"{int(counts.min())} to {int(counts.max())}"
        refuse("keep_mask", f"keep must be between 0 and the {columns} columns of a row, got {got}")


def _largest(scores: Tensor, counts: Tensor) -> Tensor:
    """bool ``[S, size]``: the ``counts[s]`` largest of each row; a stable sort gives ties to the lower position."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    kept = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, kept)


def _keep_mask_reference(
    weight: Tensor,
    other: Tensor | None,
    counts: Tensor | None,
    keep: int,
    scope: str,
    score: str,
    block_rows: int,
    block_columns: int,
    factor: float,
) -> Tensor:
    scores = scores_of(weight, other, score, factor)
    _refuse_nan("keep_mask", [scores])
    rows, columns = scores.shape
    if counts is not None:
        _refuse_counts(counts, columns)
    if scope == "row":
        flat = scores
    elif scope == "tensor":
        flat = scores.reshape(1, rows * columns)
    else:
        grid = scores.reshape(rows // block_rows, block_rows, columns // block_columns, block_columns)
        flat = grid.transpose(1, 2).reshape(grid.shape[0] * grid.shape[2], block_rows * block_columns)
    mask = _largest(flat, flat.new_full((flat.shape[0],), keep, dtype=torch.int64) if counts is None else counts)
    if scope == "block":
        grid_shape = (rows // block_rows, columns // block_columns, block_rows, block_columns)
        mask = mask.reshape(grid_shape).transpose(1, 2)
    return _pack_reference(mask.reshape(rows, columns))


def _check_score(operator: str, weight: Tensor, other: Tensor | None, score: str, factor: float) -> None:
    check_float(operator, weight=weight, other=other)
    check_choice(operator, "score", score, tuple(SCORES))
    check_number(operator, factor=factor)
    if not -math.inf < factor < math.inf:  # (math.isfinite cannot be traced)
        refuse(operator, f"factor must be finite, got {factor}")
    wanted = SCORES[score]
    if wanted is None:
        if other is not None:
            refuse(operator, f"other must be None where score is {score!r}, got a tensor of shape {shape_of(other)}")
        return
    if other is None:
        refuse(operator, f"other must be a tensor of shape {wanted} where score is {score!r}, got None")
    check_device(operator, "weight", weight, other=other)
    shape = list(weight.shape[1:]) if wanted == "[K]" else list(weight.shape)
    if list(other.shape) != shape:
        refuse(operator, f"other must have shape {shape} where score is {score!r}, got {shape_of(other)}")


def _check_count(operator: str, keep: int, most: int, of: str) -> None:
    if not 0 <= keep <= most:
        refuse(operator, f"keep must be between 0 and the {most} {of}, got {keep}")


def _validate_keep_mask(
    weight: Tensor,
    other: Tensor | None,
    counts: Tensor | None,
    keep: int,
    scope: str,
    score: str,
    block_rows: int,
    block_columns: int,
    factor: float,
) -> None:
    name = "keep_mask"
    _check_matrix(name, "weight", weight, "[N, K]")
    _check_score(name, weight, other, score, factor)
    check_choice(name, "scope", scope, SCOPES)
    check_integer(name, keep=keep)
    rows, columns = weight.shape
    if counts is not None:
        if scope != "row":
            refuse(name, f"keep must be an integer where scope is {scope!r}, got a tensor of shape {shape_of(counts)}")
        if counts.dtype != torch.int64:
            raise TypeError(f"{name}: keep must be an integer or an int64 tensor, got {counts.dtype}")
        if list(counts.shape) != [rows]:
            refuse(name, f"keep must have shape [{rows}] (an entry per row of weight), got {shape_of(counts)}")
        check_device(name, "weight", weight, keep=counts)
    elif scope == "row":
        _check_count(name, keep, columns, "columns of a row")
    elif scope == "tensor":
        _check_count(name, keep, rows * columns, "entries of weight")
    if scope == "block":
        if block_rows < 1 or block_columns < 1 or rows % block_rows or columns % block_columns:
            way = "otherwise pad weight with zeros to a multiple, torch.nn.functional.pad"
            if block_rows == 1 and block_columns >= 1:
                way = "pad=True lets the last block of a row be shorter"
            refuse(
                name,
                f"block must be positive and divide weight {shape_of(weight)} ({way}), got ({block_rows}, {block_columns})",
            )
        _check_count(name, keep, block_rows * block_columns, "entries of a block")


def _selection_bytes(weight: Tensor, other: Tensor | None, *rest: Any) -> int:
    read = weight.numel() * weight.element_size() + (0 if other is None else other.numel() * other.element_size())
    return read + weight.shape[0] * packed_bytes(weight.shape[1], 1)


_keep_mask = register(
    Operator(
        "keep_mask(Tensor weight, Tensor? other, Tensor? counts, SymInt keep, str scope, str score, SymInt block_rows, "
        "SymInt block_columns, float factor) -> Tensor",
        family="selection",
        validate=_validate_keep_mask,
        reference=_keep_mask_reference,
        fake=lambda weight, *rest: weight.new_empty(
            (weight.shape[0], packed_bytes(weight.shape[1], 1)), dtype=torch.uint8
        ),
        backward="a choice has no gradient",
        # whole tensors, and blocks that are not whole bytes, by the reference's sort: they take several launches
        triton=Kernel("cofire_kernels.selection:keep_mask"),
        bytes=_selection_bytes,
    )
)


def check_scores(
    where: str, weight: Tensor, other: Tensor | None, score: str, factor: float = 1.0, *, name: str = "weight"
) -> tuple[Tensor, Tensor | None]:
    """What layers and methods ask of what they choose by: arguments that fit, and scores that are finite.

    ``name`` is what ``weight`` is called. Returns both as :func:`keep_mask` reads them.
    """
    matrix = _as_matrix(where, name, weight.detach())
    second = None if other is None else _other_as_matrix(where, "other", weight, other).detach()
    _check_score(where, matrix, second, score, factor)
    check_finite(where, **{name: matrix, "other": second})
    if second is not None:  # a product may be infinite where no factor is
        check_finite(where, **{f"scores {score!r}": scores_of(matrix, second, score, factor)})
    return matrix, second


def _as_matrix(operator: str, name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(x).__name__}")
    if x.dim() < 2:
        refuse(operator, f"{name} must have shape [N, K] or [N, ...], got {shape_of(x)}")
    return x.flatten(1) if x.dim() > 2 else x


def _other_as_matrix(operator: str, name: str, weight: Tensor, other: Any) -> Tensor:
    """Of a weight of more than two dimensions: ``other`` has its shape, or that of one of its rows."""
    if not isinstance(other, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(other).__name__}")
    if weight.dim() > 2 and other.shape == weight.shape:
        return other.flatten(1)
    return other.flatten() if weight.dim() > 2 and other.shape == weight.shape[1:] else other


def keep_mask(
    weight: Tensor,
    keep: int | Tensor,
    *,
    scope: str = "row",
    score: str = "magnitude",
    other: Tensor | None = None,
    block: Sequence[int] | None = None,
    pad: bool = False,
    factor: float = 1.0,
) -> Tensor:
    """The weights with the largest scores, exactly ``keep`` of each scope, as a packed mask.

    Equal scores go to the lower flat index; -0 equals 0. Scores are computed on the way in fp32 (fp64 where an argument
    is) and never stored as a whole. Infinite ones are in this order too; the layers and methods that choose weights by this
    operator refuse them.

    Args:
        weight: float ``[N, K]``, or ``[N, ...]``, which is read as ``[N, K]``.
        keep: how many entries of each scope are kept; for rows also int64 ``[N]``, an entry per row.
        scope: ``"row"``; ``"tensor"``; or ``"block"``, every block of ``block`` entries by itself.
        score: ``"value"`` w, ``"magnitude"`` |w|, ``"wanda"`` |w| x with x of shape ``[K]`` (the norms of the inputs),
            ``"taylor"`` |w g|, ``"fisher"`` (w g)^2, or ``"magnitude_gradient"`` |w| + ``factor`` |g|, with g of the
            shape of ``weight``.
        other: x or g of the score, of any float dtype.
        block: ``(R, C)``; N and K must be multiples. ``(1, M)`` with ``keep=N`` is the pattern N:M.
        pad: of blocks ``(1, M)``: K may be any number. The last r = K mod M columns of a row, if there are some, are a
            group of their own, of which ``min(keep, r)`` are kept.
        factor: see ``score``.

    Returns:
        uint8 ``[N, ceil(K / 8)]``, see :func:`pack_mask`.

    Raises:
        TypeError: a tensor is not a float, or ``keep`` no integer.
        ValueError: an unknown scope or score, a shape that does not fit, more to keep than there is, a score that is NaN.

    Example:
        >>> weight = torch.tensor([[1.0, -4.0, 2.0, 0.0], [3.0, 3.0, 3.0, -5.0]])
        >>> unpack_mask(keep_mask(weight, 2), 4).int().tolist()
        [[0, 1, 1, 0], [1, 0, 0, 1]]
        >>> unpack_mask(keep_mask(weight, 1, scope="block", block=(1, 2)), 4).int().tolist()
        [[0, 1, 1, 0], [1, 0, 0, 1]]
        >>> unpack_mask(keep_mask(weight, 2, scope="tensor"), 4).int().tolist()
        [[0, 1, 0, 0], [0, 0, 0, 1]]
        >>> unpack_mask(keep_mask(weight, 1, scope="block", block=(1, 3), pad=True), 4).int().tolist()
        [[0, 1, 0, 1], [1, 0, 0, 1]]

    Source: magnitude pruning (Han et al. 2015); Wanda (Sun et al. 2024, equation 1); first-order Taylor scores and their
    squares (Molchanov et al. 2019, equation 8).
    """
    name = "keep_mask"
    if not isinstance(score, str) or not isinstance(scope, str):
        raise TypeError(f"{name}: scope and score must be strings, got {scope!r} and {score!r}")
    matrix = _as_matrix(name, "weight", weight)
    other = None if other is None else _other_as_matrix(name, "other", weight, other)
    counts = keep if isinstance(keep, Tensor) else None
    if counts is None and not is_integer(keep):
        raise TypeError(f"{name}: keep must be an integer or an int64 tensor, got {keep!r}")
    if (block is not None) != (scope == "block") and scope in SCOPES:
        refuse(name, f"block must be given exactly where scope is 'block', got scope={scope!r} and block={block!r}")
    sizes = [1, 1] if block is None else check_pair(name, "block", block)
    if len(sizes) != 2:
        refuse(name, f"block must be two integers (R, C), got {block!r}")
    if not isinstance(pad, bool):
        raise TypeError(f"{name}: pad must be True or False, got {pad!r}")
    if pad and (scope != "block" or sizes[0] != 1):
        refuse(name, f"pad must be False but for blocks of one row, got scope={scope!r} and block={block!r}")
    amount = 0 if counts is not None else keep
    columns, group = matrix.shape[1], sizes[1]
    if not pad or group < 1 or columns % group == 0:
        result: Tensor = _keep_mask(matrix, other, counts, amount, scope, score, *sizes, factor)
        return result
    _check_score(name, matrix, other, score, factor)
    whole = columns - columns % group
    first, last = (None, None) if other is None else (other[..., :whole], other[..., whole:])
    groups = _keep_mask(matrix[:, :whole], first, counts, amount, scope, score, 1, group, factor)
    few = min(amount, columns - whole)
    rest = _keep_mask(matrix[:, whole:], last, None, few, "row", score, 1, 1, factor)
    both = torch.cat([unpack_mask(groups, whole), unpack_mask(rest, columns - whole)], 1)
    return pack_mask(both)


def _keep_masks_reference(
    weights: Sequence[Tensor], others: Sequence[Tensor], keep: int, score: str, factor: float
) -> list[Tensor]:
    paired: list[Tensor | None] = list(others) or [None] * len(weights)
    pairs = zip(weights, paired, strict=True)
    scores = [scores_of(w, o, score, factor) for w, o in pairs]
    _refuse_nan("keep_masks", scores)
    wide = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
    flat = torch.cat([s.to(wide).reshape(1, -1) for s in scores], 1)
    mask = _largest(flat, torch.full((1,), keep, dtype=torch.int64, device=flat.device))[0]
    parts = mask.split([w.numel() for w in weights])
    return [_pack_reference(part.view(w.shape)) for part, w in zip(parts, weights, strict=True)]


def _validate_keep_masks(
    weights: Sequence[Tensor], others: Sequence[Tensor], keep: int, score: str, factor: float
) -> None:
    name = "keep_masks"
    if others and len(others) != len(weights):
        refuse(name, f"others must have {len(weights)} entries, one for each weight, got {len(others)}")
    for i, w in enumerate(weights):
        _check_matrix(name, f"weights[{i}]", w, "[N, K]")
        _check_score(name, w, others[i] if others else None, score, factor)
        check_device(name, "weights[0]", weights[0], **{f"weights[{i}]": w})
    check_integer(name, keep=keep)
    _check_count(name, keep, sum(w.numel() for w in weights), "entries of all weights")


_keep_masks = register(
    Operator(
        "keep_masks(Tensor[] weights, Tensor[] others, SymInt keep, str score, float factor) -> Tensor[]",
        family="selection",
        validate=_validate_keep_masks,
        reference=_keep_masks_reference,
        fake=lambda weights, *rest: [
            w.new_empty((w.shape[0], packed_bytes(w.shape[1], 1)), dtype=torch.uint8) for w in weights
        ],
        backward="a choice has no gradient",
        triton="an order over several tensors takes many launches: the reference's sort",
        bytes=lambda weights, others, *rest: (
            sum(_selection_bytes(w, None) for w in weights) + sum(o.numel() * o.element_size() for o in others)
        ),
    )
)


def keep_masks(
    weights: Sequence[Tensor],
    keep: int,
    *,
    score: str = "magnitude",
    others: Sequence[Tensor] | None = None,
    factor: float = 1.0,
) -> list[Tensor]:
    """The ``keep`` weights with the largest scores of several tensors together, as packed masks.

    Equal scores go to the earlier tensor, then to the lower flat index.

    Args:
        weights: float ``[N, K]`` or ``[N, ...]`` each, which is read as ``[N, K]``.
        keep: how many entries of all are kept.
        score: as for :func:`keep_mask`.
        others: x or g of the score, one for each weight.
        factor: as for :func:`keep_mask`.

    Returns:
        A packed mask for each weight, see :func:`pack_mask`.

    Raises:
        TypeError: a tensor is not a float, or ``keep`` no integer.
        ValueError: as :func:`keep_mask`.

    Example:
        >>> masks = keep_masks([torch.tensor([[1.0, -4.0]]), torch.tensor([[4.0, 0.5]])], 1)
        >>> [bits.tolist() for bits in masks]
        [[[2]], [[0]]]

    Source: global magnitude pruning (Han et al. 2015; Blalock et al. 2020, section 2).
    """
    name = "keep_masks"
    check_integer(name, keep=keep)
    matrices = [_as_matrix(name, f"weights[{i}]", w) for i, w in enumerate(weights)]
    seconds = [] if others is None else list(others)
    if len(seconds) == len(matrices):
        pairs = zip(weights, seconds, strict=True)
        seconds = [_other_as_matrix(name, f"others[{i}]", w, o) for i, (w, o) in enumerate(pairs)]
    if not matrices:
        _validate_keep_masks(matrices, seconds, keep, score, factor)
        return []
    result: list[Tensor] = _keep_masks(matrices, seconds, keep, score, factor)
    return result
