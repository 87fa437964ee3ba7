# SPDX-License-Identifier: Apache-2.0
"""Attention that says how much attention each key got, without a tensor of queries times keys.

All arithmetic is in fp32 (fp64 where an argument is). Where there are fewer heads of keys than of queries
(grouped-query attention), consecutive heads of queries share one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cofire.ops.checks import check_float, check_integer, check_number, check_same, refuse, shape_of
from cofire.ops.lowbit import compute_dtype
from cofire.ops.shift_add_attention import check_shape, check_tokens, size_of
from cofire.registry import Backward, Kernel, Operator, register, through_reference

__all__ = ["attention_with_scores"]


def visible(queries: int, keys: int, device: torch.device) -> Tensor:
    """bool ``[q, S]``: the queries are the last of the tokens, and see themselves and what came before."""
    position = torch.arange(queries, device=device) + (keys - queries)
    return torch.arange(keys, device=device) <= position[:, None]


def grouped(query: Tensor, key: Tensor) -> Tensor:
    """Queries ``[B, H, q, d]`` by the head of keys that they share: ``[B, Hkv, G, q, d]``."""
    return query.unflatten(1, (key.shape[1], query.shape[1] // key.shape[1])) if key.shape[1] else query[:, :, None]


def logits_of(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    """``[B, Hkv, G, q, S]``."""
    logits = scale * (grouped(query, key) @ key[:, :, None].transpose(-1, -2))
    if causal:
        logits = torch.where(visible(query.shape[2], key.shape[2], query.device), logits, -math.inf)
    return logits


def _attention_reference(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, window: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(query, key, value)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    logits = logits_of(q, k, causal, scale)
    weights = logits.softmax(-1)
    output = (weights @ v[:, :, None]).reshape(query.shape).to(query.dtype)
    first = max(query.shape[2] - window, 0)
    scores = weights.detach()[..., first:, :].sum((2, 3))
    if normalize:
        queries, keys = query.shape[2], key.shape[2]
        seen = visible(queries, keys, query.device) if causal else q.new_ones(queries, keys, dtype=torch.bool)
        scores = scores / (seen[first:].sum(0) * logits.shape[2]).clamp(min=1)
    return output.contiguous(), logits.logsumexp(-1).reshape(query.shape[:3]).contiguous(), scores.contiguous()


def _attention_backward_reference(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(grad, query, key, value)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    g = grouped(grad.to(dtype), key)
    weights = logits_of(q, k, causal, scale).softmax(-1)
    to_weights = g @ v[:, :, None].transpose(-1, -2)
    along = (weights * to_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        along = along - grouped(grad_lse.to(dtype)[..., None], key)
    to_logits = scale * weights * (to_weights - along)
    to_query = (to_logits @ k[:, :, None]).reshape(query.shape)
    to_key = (to_logits.transpose(-1, -2) @ grouped(q, key)).sum(2)
    to_value = (weights.transpose(-1, -2) @ g).sum(2)
    to_query, to_key, to_value = (
        x.to(like.dtype).contiguous() for x, like in ((to_query, query), (to_key, key), (to_value, value))
    )
    return to_query, to_key, to_value


def check_attention(name: str, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> None:
    check_float(name, query=query, key=key, value=value)
    check_tokens(name, "query", query, "q")
    check_tokens(name, "key", key, "S")
    batch, heads, queries, d = query.shape
    if [key.shape[0], key.shape[3]] != [batch, d] or (heads % key.shape[1] if key.shape[1] else heads):
        refuse(name, f"key must have shape [{batch}, a divisor of {heads}, S, {d}], got {shape_of(key)}")
    check_shape(name, "value", value, list(key.shape))
    check_same(name, "query", query, key=key, value=value)
    if key.shape[2] == 0 or d == 0:
        refuse(name, f"key must have at least one token and one feature, got {shape_of(key)}")
    if not isinstance(causal, bool):
        raise TypeError(f"{name}: causal must be a bool, got {causal!r}")
    if causal and queries > key.shape[2]:
        refuse(name, f"causal queries are the last of the {key.shape[2]} tokens, got {queries} queries")
    check_number(name, scale=scale)
    if not 0 < scale < math.inf:
        refuse(name, f"scale must be positive and finite, got {scale}")


def _validate(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, window: int, normalize: bool
) -> None:
    name = "attention_with_scores"
    check_attention(name, query, key, value, causal, scale)
    check_integer(name, window=window)
    if window < 0:
        refuse(name, f"window must not be negative, got {window}")
    if not isinstance(normalize, bool):
        raise TypeError(f"{name}: normalize must be a bool, got {normalize!r}")


def _validate_backward(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> None:
    name = "attention_with_scores_backward"
    check_float(name, grad=grad, grad_lse=grad_lse)
    check_attention(name, query, key, value, causal, scale)
    check_shape(name, "grad", grad, list(query.shape))
    if grad_lse is not None:
        check_shape(name, "grad_lse", grad_lse, list(query.shape[:3]))


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(query, key, value)
    return (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:3], dtype=dtype),
        query.new_empty(key.shape[:3], dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, ctx.causal, ctx.scale, *_ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value)


def _formula(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _: Any) -> Any:
    query, key, value = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 7
    grad = torch.zeros_like(query) if grad is None else grad
    found = attention_with_scores_backward.overload(grad, grad_lse, query, key, value, ctx.causal, ctx.scale)
    gradients = (g if needed else None for g, needed in zip(found, ctx.needs_input_grad[:3], strict=True))
    return (*gradients, None, None, None, None)


def pairs_of(query: Tensor, key: Tensor, causal: bool) -> int:
    """Queries times the keys that they see."""
    batch, heads, queries, _ = query.shape
    hidden = queries * (queries - 1) // 2 if causal else 0
    return batch * heads * (queries * key.shape[2] - hidden)


def _flops(query: Tensor, key: Tensor, value: Tensor, causal: bool, *rest: Any) -> int:
    return 4 * query.shape[3] * pairs_of(query, key, causal)


attention_with_scores_backward = register(
    Operator(
        "attention_with_scores_backward(Tensor grad, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
        "bool causal, float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
        family="kv_fusion",
        validate=_validate_backward,
        reference=_attention_backward_reference,
        fake=lambda grad, grad_lse, query, key, value, *rest: tuple(x.new_empty(x.shape) for x in (query, key, value)),
        backward=through_reference(_attention_backward_reference),
        triton=Kernel("cofire_kernels.kv_fusion:attention_with_scores_backward"),
        flops=lambda grad, grad_lse, query, key, value, causal, scale: (
            10 * query.shape[3] * pairs_of(query, key, causal)
        ),
        bytes=lambda grad, grad_lse, query, key, value, *rest: (
            size_of(grad, grad_lse, query, key, value) * 2 - size_of(grad, grad_lse)
        ),
    )
)

_attention = register(
    Operator(
        "attention_with_scores(Tensor query, Tensor key, Tensor value, bool causal, float scale, SymInt window, "
        "bool normalize) -> (Tensor output, Tensor lse, Tensor scores)",
        family="kv_fusion",
        validate=_validate,
        reference=_attention_reference,
        fake=_fake,
        backward=Backward(_save, _formula, "attention_with_scores_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.kv_fusion:attention_with_scores"),
        flops=_flops,
        bytes=lambda query, key, value, *rest: (
            size_of(query, query, key, value) + 4 * (query[..., 0].numel() + key[..., 0].numel())
        ),
    )
)


def attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention, and for each key the sum of the attention that queries paid to it.

    Nothing of size q times S is stored: a block of queries goes over the keys, and its weights are added to the scores
    while they are in the cache.

    Args:
        query: float ``[B, H, q, d]``.
        key: ``[B, Hkv, S, d]`` in the dtype of ``query``, Hkv a divisor of H, S at least 1.
        value: ``[B, Hkv, S, d]``.
        causal: the queries are the last q of the S tokens, and see themselves and what came before.
        scale: of the products of queries and keys, positive; None for 1 / sqrt(d).
        window: how many of the last queries count for the scores; None for all, 0 for none.
        normalize: divide a key's score by how many of those queries see it, in all heads of the group. Else early keys of
            a causal block, which more queries see, get higher scores.

    Returns:
        ``output`` ``[B, H, q, d]`` in the dtype of ``query``; ``lse`` fp32 ``[B, H, q]``, the logarithm of the sum of the
        exponentials of the scaled products, by which attention to other keys can be merged; ``scores`` fp32
        ``[B, Hkv, S]``, summed over the heads of a group, without a gradient. (fp64 where the arguments are.)

    Raises:
        TypeError: tensors that are no floats or of different dtypes.
        ValueError: a shape that does not fit, no keys, more causal queries than keys, ``scale`` not positive, ``window``
            negative.

    Example:
        >>> query, key = torch.zeros(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
        >>> output, lse, scores = attention_with_scores(query, key, torch.ones(1, 1, 2, 4))
        >>> scores.tolist()  # the first query sees the first key alone
        [[[1.5, 0.5]]]

    Source: FlashAttention (Dao et al., NeurIPS 2022), algorithm 1; the scores of H2O (Zhang et al., NeurIPS 2023, section
    4) and LoCoCo (Cai et al., ICML 2024); windows of queries in SnapKV (Li et al., NeurIPS 2024, section 4).
    """
    if scale is None:
        check_tokens("attention_with_scores", "query", query, "q")
        scale = 1 / math.sqrt(max(query.shape[3], 1))
    if window is None:
        check_tokens("attention_with_scores", "query", query, "q")
        window = query.shape[2]
    output, lse, scores = _attention(query, key, value, causal, scale, window, normalize)
    return output, lse, scores
