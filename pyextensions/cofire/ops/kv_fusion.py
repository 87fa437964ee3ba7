# SPDX-License-Identifier: Apache-2.0
"""Compression of a cache of keys and values to a fixed number of slots: which tokens stay, and what becomes of the rest.

Of S cached tokens the *heavy hitters* stay as they are. The rest, in the order of their positions, are fused into fewer
slots by mixing weights that a convolution computes from them. Selection and gathering move data only; all arithmetic is
in fp32 (fp64 where an argument is).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cofire.ops.checks import check_device, check_float, check_integer, check_same, refuse, shape_of
from cofire.ops.lowbit import compute_dtype
from cofire.ops.shift_add_attention import check_shape, check_tokens, size_of
from cofire.registry import Backward, Kernel, Operator, register, through_reference

__all__ = ["kv_fuse", "kv_gather_", "kv_select"]

# -------------------------------------------------------------------------------------------------- kv_select


def _top(scores: Tensor, count: int) -> Tensor:
    """The ascending positions of the ``count`` largest of each row; a stable sort gives ties to the lower position."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(-1).values


def _select_reference(scores: Tensor, heavy: int, merged: int, local: int) -> tuple[Tensor, Tensor, Tensor]:
    if scores.is_cuda:  # a check by the device, which nobody waits for
        torch._assert_async(~scores.isnan().any(), "kv_select: scores must not be NaN")
    elif found := int(scores.isnan().sum()):
        refuse("kv_select", f"scores must not be NaN, got {found} NaN among {scores.numel()} scores")
    tokens = scores.shape[-1]
    stays = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    stays[..., tokens - local :] = True
    stays.scatter_(-1, _top(scores[..., : tokens - local], heavy - local), True)
    # A stable sort that puts the heavy hitters first leaves both groups in ascending order.
    order = torch.sort((~stays).to(torch.uint8), dim=-1, stable=True).indices
    kept, rest = order[..., :heavy], order[..., heavy:]
    pick = _top(scores.gather(-1, rest), merged)
    kept, rest, pick = (i.to(torch.int32).contiguous() for i in (kept, rest, pick))
    return kept, rest, pick


def _validate_select(scores: Tensor, heavy: int, merged: int, local: int) -> None:
    name = "kv_select"
    check_float(name, scores=scores)
    if scores.dim() != 3:
        refuse(name, f"scores must have shape [B, H, S], got {shape_of(scores)}")
    check_integer(name, heavy=heavy, merged=merged, local=local)
    if not 0 <= heavy <= scores.shape[2]:
        refuse(name, f"heavy must be between 0 and the {scores.shape[2]} tokens, got {heavy}")
    if not 0 <= local <= heavy:
        refuse(name, f"local must be between 0 and heavy ({heavy}), got {local}")
    if not 0 <= merged <= scores.shape[2] - heavy:
        refuse(name, f"merged must be between 0 and the {scores.shape[2] - heavy} tokens that are left, got {merged}")


def _select_fake(scores: Tensor, heavy: int, merged: int, local: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens = scores.shape[:2], scores.shape[2]
    kept, rest, pick = (scores.new_empty((*rows, n), dtype=torch.int32) for n in (heavy, tokens - heavy, merged))
    return kept, rest, pick


_kv_select = register(
    Operator(
        "kv_select(Tensor scores, SymInt heavy, SymInt merged, SymInt local) -> (Tensor heavy_index, Tensor rest_index, "
        "Tensor pick)",
        family="kv_fusion",
        validate=_validate_select,
        reference=_select_reference,
        fake=_select_fake,
        backward="a choice has no gradient",
        triton=Kernel("cofire_kernels.kv_fusion:kv_select"),
        bytes=lambda scores, heavy, merged, local: (
            size_of(scores) + 4 * scores.numel() + 4 * merged * scores.shape[0] * scores.shape[1]
        ),
    )
)


def kv_select(scores: Tensor, heavy: int, merged: int, *, local: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Divide the tokens of a cache into heavy hitters and the rest, and pick the best of the rest.

    Exact and the same on every run: of equal scores the lower position wins.

    Args:
        scores: float ``[B, H, S]``, how much attention each token got, such as :func:`attention_with_scores` returns.
        heavy: how many tokens stay, 0 to S.
        merged: how many of the rest are picked, 0 to S - heavy.
        local: how many of the heavy hitters are the last tokens, whatever their scores.

    Returns:
        ``heavy_index`` int32 ``[B, H, heavy]`` and ``rest_index`` int32 ``[B, H, S - heavy]``, positions; ``pick`` int32
        ``[B, H, merged]``, indices into ``rest_index``. All in ascending order.

    Raises:
        TypeError: ``scores`` is not a float, or a number no integer.
        ValueError: ``scores`` has another shape or a NaN, or there are fewer tokens than asked for. On a GPU, where nobody
            waits for an answer, the device itself raises for a NaN, as for an index out of range.

    Example:
        >>> heavy, rest, pick = kv_select(torch.tensor([[[0.5, 0.1, 0.9, 0.2, 0.9, 0.3]]]), 2, 2)
        >>> heavy.tolist(), rest.tolist(), pick.tolist()
        ([[[2, 4]]], [[[0, 1, 3, 5]]], [[[0, 3]]])

    Source: LoCoCo (Cai et al., ICML 2024), heavy hitters and the merged slots' residuals.
    """
    heavy_index, rest_index, pick = _kv_select(scores, heavy, merged, local)
    return heavy_index, rest_index, pick


# ------------------------------------------------------------------------------------------------- kv_gather_


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x [B, H, S, d]`` at ``index [B, H, n]``."""
    return x.gather(2, index.to(torch.int64)[..., None].expand(*index.shape, x.shape[3]))


def _gather_reference(
    heavy_key: Tensor,
    heavy_value: Tensor,
    key: Tensor,
    value: Tensor,
    heavy_index: Tensor,
    rest_index: Tensor,
    padding: int,
) -> Tensor:
    heavy = heavy_index.shape[2]
    heavy_key[:, :, :heavy] = rows_at(key, heavy_index)
    heavy_value[:, :, :heavy] = rows_at(value, heavy_index)
    rest = torch.cat([rows_at(key, rest_index), rows_at(value, rest_index)], -1)
    return torch.nn.functional.pad(rest, (0, 0, padding, padding)).contiguous()


def check_index(operator: str, name: str, index: Tensor, heads: list[int], count: str = "n") -> None:
    if index.dtype != torch.int32:
        raise TypeError(f"{operator}: {name} must be int32 (as kv_select returns it), got {index.dtype}")
    if index.dim() != 3 or list(index.shape[:2]) != heads:
        refuse(operator, f"{name} must have shape [{heads[0]}, {heads[1]}, {count}], got {shape_of(index)}")


def _validate_gather(
    heavy_key: Tensor,
    heavy_value: Tensor,
    key: Tensor,
    value: Tensor,
    heavy_index: Tensor,
    rest_index: Tensor,
    padding: int,
) -> None:
    name = "kv_gather_"
    check_float(name, key=key, value=value, heavy_key=heavy_key, heavy_value=heavy_value)
    check_tokens(name, "key", key, "S")
    check_shape(name, "value", value, list(key.shape))
    heads, d = list(key.shape[:2]), key.shape[3]
    for which, index in (("heavy_index", heavy_index), ("rest_index", rest_index)):
        check_index(name, which, index, heads)
    heavy = heavy_index.shape[2]
    for which, x in (("heavy_key", heavy_key), ("heavy_value", heavy_value)):
        if x.dim() != 4 or [*x.shape[:2], x.shape[3]] != [*heads, d] or x.shape[2] < heavy:
            shape = f"[{heads[0]}, {heads[1]}, M, {d}] with M at least {heavy}"
            refuse(name, f"{which} must have shape {shape}, got {shape_of(x)}")
    others = {"value": value, "heavy_key": heavy_key, "heavy_value": heavy_value}
    check_same(name, "key", key, **others, heavy_index=heavy_index, rest_index=rest_index)
    check_integer(name, padding=padding)
    if padding < 0:
        refuse(name, f"padding must not be negative, got {padding}")


def _gather_fake(
    heavy_key: Tensor,
    heavy_value: Tensor,
    key: Tensor,
    value: Tensor,
    heavy_index: Tensor,
    rest_index: Tensor,
    padding: int,
) -> Tensor:
    return key.new_empty((*key.shape[:2], rest_index.shape[2] + 2 * padding, 2 * key.shape[3]))


_kv_gather = register(
    Operator(
        "kv_gather_(Tensor(a!) heavy_key, Tensor(b!) heavy_value, Tensor key, Tensor value, Tensor heavy_index, "
        "Tensor rest_index, SymInt padding) -> Tensor tokens",
        family="kv_fusion",
        validate=_validate_gather,
        reference=_gather_reference,
        fake=_gather_fake,
        backward="a cache is written in place; where a gradient is wanted, torch.gather has one",
        triton=Kernel("cofire_kernels.kv_fusion:kv_gather_"),
        bytes=lambda heavy_key, heavy_value, key, value, heavy_index, rest_index, padding: (
            4
            * key.element_size()
            * key.shape[3]
            * (heavy_index.numel() + rest_index.numel() + padding * key.shape[0] * key.shape[1])
        ),
    )
)


def kv_gather_(
    heavy_key: Tensor,
    heavy_value: Tensor,
    key: Tensor,
    value: Tensor,
    heavy_index: Tensor,
    rest_index: Tensor,
    *,
    padding: int = 0,
) -> Tensor:
    """Copy the heavy hitters straight to where they stay, and lay the rest out for :func:`kv_fuse`.

    Args:
        heavy_key: ``[B, H, M, d]``, M at least ``heavy``, such as a part of a new cache: its first ``heavy`` rows are
            written, others are left alone. It must not overlap with ``key`` or ``value``.
        heavy_value: the same of the values.
        key: float ``[B, H, S, d]``, may be a part of a larger cache.
        value: ``[B, H, S, d]`` in the dtype of ``key``.
        heavy_index: int32 ``[B, H, heavy]``, from :func:`kv_select`.
        rest_index: int32 ``[B, H, n]``.
        padding: rows of zeros before and after the rest: half a convolution's width.

    Returns:
        ``[B, H, padding + n + padding, 2 d]``, token by token, the value beside the key.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a shape that does not fit, a negative padding.
        IndexError, RuntimeError: an index outside of the cache; what is written then is undefined. (On a GPU nothing is
            raised, and such a row is zero.)

    Example:
        >>> key = torch.arange(1.0, 5.0).view(1, 1, 4, 1)
        >>> new_key, new_value = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)
        >>> heavy, rest = torch.tensor([[[1]]], dtype=torch.int32), torch.tensor([[[0, 2, 3]]], dtype=torch.int32)
        >>> kv_gather_(new_key, new_value, key, 10 * key, heavy, rest).tolist()
        [[[[1.0, 10.0], [3.0, 30.0], [4.0, 40.0]]]]
        >>> new_key.flatten().tolist()
        [2.0, 0.0]

    Source: LoCoCo (Cai et al., ICML 2024): keys and values of the rest as channels of one sequence.
    """
    args = (heavy_key, heavy_value, key, value, heavy_index, rest_index, padding)
    result: Tensor = _kv_gather(*args)
    return result


# ---------------------------------------------------------------------------------------------------- kv_fuse


def _parts(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The logits ``[B, H, Mc, n]``, their softmax, and the rest without its padding ``[B, H, n, 2 d]``."""
    taps = weight.shape[2]
    rest = tokens.shape[2] - taps + 1
    logits = torch.nn.functional.conv1d(tokens.flatten(0, 1).transpose(-1, -2), weight, bias).relu()
    logits = logits.unflatten(0, tokens.shape[:2])
    return logits, logits.softmax(-1), tokens[:, :, taps // 2 : taps // 2 + rest]


def _fuse_reference(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, pick: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(tokens, weight, bias, gate)
    x, w, c = tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _, shares, rest = _parts(x, w, c)
    fused = torch.lerp(rows_at(rest, pick), shares @ rest, gate.to(dtype)).to(tokens.dtype)
    d = tokens.shape[3] // 2
    key, value = (x.clone(memory_format=torch.contiguous_format) for x in (fused[..., :d], fused[..., d:]))
    return key, value


def _fuse_backward_reference(
    grad_key: Tensor,
    grad_value: Tensor,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    pick: Tensor,
    to_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(grad_key, grad_value, tokens, weight, bias, gate)
    x, w, g = tokens.to(dtype), weight.to(dtype), gate.to(dtype)
    grad = torch.cat([grad_key.to(dtype), grad_value.to(dtype)], -1)
    logits, shares, rest = _parts(x, w, None if bias is None else bias.to(dtype))
    mixed = shares @ rest
    to_gate = (grad * (mixed - rows_at(rest, pick))).sum()
    along = (grad * mixed).sum(-1, keepdim=True)
    to_logits = torch.where(logits > 0, g * shares * (grad @ rest.transpose(-1, -2) - along), 0)
    taps, count = weight.shape[2], rest.shape[2]
    windows = [x[:, :, j : j + count] for j in range(taps)]
    to_weight = torch.stack([torch.einsum("bhms,bhsc->mc", to_logits, window) for window in windows], 2)
    nothing = tokens.new_empty((0,))
    to_bias = nothing if bias is None else to_logits.sum((0, 1, 3)).to(bias.dtype)
    to_x = nothing
    if to_tokens:
        index = pick.to(torch.int64)[..., None].expand(grad.shape)
        direct = torch.zeros_like(rest).scatter_add(2, index, (1 - g) * grad) + g * shares.transpose(-1, -2) @ grad
        pads = [(taps // 2, taps // 2), *((j, taps - 1 - j) for j in range(taps))]
        through = [direct, *(to_logits.transpose(-1, -2) @ w[:, :, j] for j in range(taps))]
        padded = (torch.nn.functional.pad(t, (0, 0, *pad)) for t, pad in zip(through, pads, strict=True))
        to_x = sum(padded, start=torch.zeros_like(x)).to(tokens.dtype).contiguous()
    return to_x, to_weight.to(weight.dtype).contiguous(), to_bias, to_gate.reshape(gate.shape).to(gate.dtype)


def _check_fuse(name: str, tokens: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, pick: Tensor) -> None:
    check_float(name, tokens=tokens, weight=weight, bias=bias, gate=gate)
    check_device(name, "tokens", tokens, weight=weight, bias=bias, gate=gate, pick=pick)
    check_tokens(name, "tokens", tokens, "n + taps - 1", "2 d")
    width = tokens.shape[3]
    if width % 2 or width == 0:
        refuse(name, f"tokens must hold keys and values of equal size, got {shape_of(tokens)}")
    if weight.dim() != 3 or weight.shape[1] != width or weight.shape[2] % 2 == 0 or weight.shape[0] == 0:
        shape = f"[merged, {width}, taps] with merged at least 1 and odd taps"
        refuse(name, f"weight must have shape {shape}, got {shape_of(weight)}")
    if tokens.shape[2] < weight.shape[2]:
        refuse(
            name,
            f"tokens must be padded by half of the {weight.shape[2]} taps, and be at least one, got {shape_of(tokens)}",
        )
    if bias is not None:
        check_shape(name, "bias", bias, [weight.shape[0]])
    if gate.numel() != 1:
        refuse(name, f"gate must be one number, got {shape_of(gate)}")
    check_index(name, "pick", pick, list(tokens.shape[:2]), "merged")
    check_shape(name, "pick", pick, [*tokens.shape[:2], weight.shape[0]])


def _fuse_fake(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, pick: Tensor
) -> tuple[Tensor, Tensor]:
    shape = (*tokens.shape[:2], weight.shape[0], tokens.shape[3] // 2)
    return tokens.new_empty(shape), tokens.new_empty(shape)


def _validate_fuse_backward(grad_key: Tensor, grad_value: Tensor, *args: Any) -> None:
    name = "kv_fuse_backward"
    tokens, weight, *rest, _ = args
    _check_fuse(name, tokens, weight, *rest)
    shape = [*tokens.shape[:2], weight.shape[0], tokens.shape[3] // 2]
    for which, grad in (("grad_key", grad_key), ("grad_value", grad_value)):
        check_float(name, **{which: grad})
        check_shape(name, which, grad, shape)


def _fuse_backward_fake(
    grad_key: Tensor,
    grad_value: Tensor,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    pick: Tensor,
    to_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def nothing() -> Tensor:
        return tokens.new_empty((0,))

    return (
        tokens.new_empty(tokens.shape) if to_tokens else nothing(),
        weight.new_empty(weight.shape),
        nothing() if bias is None else bias.new_empty(bias.shape),
        gate.new_empty(gate.shape),
    )


def _save_fuse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _fuse_formula(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> Any:
    tokens, weight, bias, gate, pick = ctx.saved_tensors
    args = (grad_key, grad_value, tokens, weight, bias, gate, pick, ctx.needs_input_grad[0])
    found = kv_fuse_backward.overload(*args)
    return (*(g if needed else None for g, needed in zip(found, ctx.needs_input_grad[:4], strict=True)), None)


def _fuse_flops(tokens: Tensor, weight: Tensor, *rest: Any) -> int:
    """Of the convolution and of the mixing."""
    merged, width, taps = weight.shape
    return 2 * tokens.shape[0] * tokens.shape[1] * (tokens.shape[2] - taps + 1) * merged * width * (taps + 1)


kv_fuse_backward = register(
    Operator(
        "kv_fuse_backward(Tensor grad_key, Tensor grad_value, Tensor tokens, Tensor weight, Tensor? bias, Tensor gate, "
        "Tensor pick, bool to_tokens) -> (Tensor grad_tokens, Tensor grad_weight, Tensor grad_bias, Tensor grad_gate)",
        family="kv_fusion",
        validate=_validate_fuse_backward,
        reference=_fuse_backward_reference,
        fake=_fuse_backward_fake,
        backward=through_reference(_fuse_backward_reference),
        triton=Kernel("cofire_kernels.kv_fusion:kv_fuse_backward"),
        bytes=lambda grad_key, grad_value, tokens, weight, bias, *rest: size_of(
            grad_key, grad_value, tokens, weight, weight, *([tokens] if rest[-1] else [])
        ),
    )
)

_kv_fuse = register(
    Operator(
        "kv_fuse(Tensor tokens, Tensor weight, Tensor? bias, Tensor gate, Tensor pick) -> (Tensor key, Tensor value)",
        family="kv_fusion",
        validate=lambda *args: _check_fuse("kv_fuse", *args),
        reference=_fuse_reference,
        fake=_fuse_fake,
        backward=Backward(_save_fuse, _fuse_formula, "kv_fuse_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.kv_fusion:kv_fuse"),
        flops=_fuse_flops,
        bytes=lambda tokens, weight, bias, gate, pick: (
            size_of(tokens, weight, bias, pick) + pick.numel() * tokens.shape[3] * tokens.element_size()
        ),
    )
)


def kv_fuse(tokens: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
    """Fuse tokens into fewer slots: each is a mixture of all of them and, by the gate, one of them as it is.

    With x the n tokens, Z = relu(conv(x)) of as many channels as slots, P = softmax(Z) over the tokens, slot m is
    ``gate (P x)_m + (1 - gate) x[pick_m]``. The convolution runs as products of shifted views of the tokens or, on a
    CPU and of many taps, by frequencies; neither it nor P is stored.

    Args:
        tokens: float ``[B, H, n + taps - 1, 2 d]``, from :func:`kv_gather_` with ``padding=taps // 2``: key and value of a
            token beside each other, n at least 1.
        weight: float ``[merged, 2 d, taps]``, of a ``torch.nn.Conv1d``, merged at least 1, an odd number of taps; all
            heads share it.
        bias: float ``[merged]``, or None.
        gate: one number, usually between 0 and 1.
        pick: int32 ``[B, H, merged]``, from :func:`kv_select`. No gradient.

    Returns:
        ``key`` and ``value`` ``[B, H, merged, d]`` in the dtype of ``tokens``.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a shape that does not fit, an even number of taps, no tokens.
        IndexError, RuntimeError: an index outside of the tokens. (On a GPU nothing is raised: it counts as a token of zeros.)

    Example:
        >>> tokens = torch.tensor([[[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [6.0, 60.0]]]])
        >>> pick = torch.tensor([[[0, 3]]], dtype=torch.int32)
        >>> key, value = kv_fuse(tokens, torch.zeros(2, 2, 1), None, torch.tensor(0.5), pick)  # equal shares
        >>> key.flatten().tolist(), value.flatten().tolist()
        ([2.125, 4.625], [21.25, 46.25])

    Source: LoCoCo (Cai et al., ICML 2024): convolutional kernels that compute the mixing weights, over heavy hitters' rest.
    """
    key, value = _kv_fuse(tokens, weight, bias, gate, pick)
    return key, value
