# SPDX-License-Identifier: Apache-2.0
"""Attention to a part of the tokens: by a mask that is trained, and by a cache that keeps only some of what comes.

While a choice of tokens is learned, all are computed and the dropped ones masked, so that a token that was dropped
gets a gradient too. Afterwards the dropped ones are left out of the cache. All arithmetic is in fp32 (fp64 where an
argument is).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cofire.ops.checks import check_device, check_float, check_number, check_same, refuse, shape_of
from cofire.ops.kv_fusion_attention import check_attention, grouped, logits_of, pairs_of, visible
from cofire.ops.lowbit import compute_dtype
from cofire.ops.shift_add_attention import check_shape, check_tokens, size_of
from cofire.registry import Backward, Kernel, Operator, register, through_reference

__all__ = ["kv_append_", "masked_softmax_attention"]

# ------------------------------------------------------------------------------------ masked_softmax_attention


def _factors(
    query: Tensor, key: Tensor, mask: Tensor, causal: bool, scale: float, eps: float, parity: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the weights are made of, each ``[B, Hkv, G, q, S]`` or broadcast to it.

    The exponentials, zero for what a query does not see; the mask, 1 for a query's own token; what every weight gets of
    eps; which token is a query's own.
    """
    logits = logits_of(query, key, causal, scale)
    queries, keys = logits.shape[-2:]
    exponentials = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    position = torch.arange(queries, device=query.device) + (keys - queries)
    own = torch.arange(keys, device=query.device) == position[:, None]
    gates = torch.where(own, 1, mask[:, None, None, None])
    seen = visible(queries, keys, query.device) if causal and not parity else torch.ones_like(own)
    return exponentials, gates, seen.to(logits.dtype) * (eps / keys), own


def _masked_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool, scale: float, eps: float, parity: bool
) -> Tensor:
    dtype = compute_dtype(query, key, value, mask)
    q, k, v, m = (x.to(dtype) for x in (query, key, value, mask))
    exponentials, gates, leak, _ = _factors(q, k, m, causal, scale, eps, parity)
    kept = exponentials * gates
    weights = (kept + leak) / (kept.sum(-1, keepdim=True) + eps)
    return (weights @ v[:, :, None]).reshape(query.shape).to(query.dtype).contiguous()


def _masked_backward_reference(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool, scale: float, eps: float,
    parity: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(grad, query, key, value, mask)
    q, k, v, m = (x.to(dtype) for x in (query, key, value, mask))
    g = grouped(grad.to(dtype), key)
    exponentials, gates, leak, own = _factors(q, k, m, causal, scale, eps, parity)
    kept = exponentials * gates
    total = kept.sum(-1, keepdim=True) + eps
    weights = (kept + leak) / total
    to_weights = g @ v[:, :, None].transpose(-1, -2)
    slopes = (to_weights - (weights * to_weights).sum(-1, keepdim=True)) / total
    to_logits = scale * kept * slopes
    to_mask = torch.where(own, 0, exponentials * slopes).sum((1, 2, 3))
    to_query = (to_logits @ k[:, :, None]).reshape(query.shape)
    to_key = (to_logits.transpose(-1, -2) @ grouped(q, key)).sum(2)
    to_value = (weights.transpose(-1, -2) @ g).sum(2)
    pairs = ((to_query, query), (to_key, key), (to_value, value), (to_mask, mask))
    to_query, to_key, to_value, to_mask = (x.to(like.dtype).contiguous() for x, like in pairs)
    return to_query, to_key, to_value, to_mask


def _check_masked(
    name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool, scale: float, eps: float,
    parity: bool,
) -> None:  # fmt: skip
    check_attention(name, query, key, value, causal, scale)
    check_float(name, mask=mask)
    check_shape(name, "mask", mask, [key.shape[0], key.shape[2]])
    check_device(name, "query", query, mask=mask)
    if query.shape[2] > key.shape[2]:
        refuse(name, f"queries are the last of the {key.shape[2]} tokens, got {query.shape[2]} queries")
    check_number(name, eps=eps)
    if not 0 < eps < math.inf:
        refuse(name, f"eps must be positive and finite, got {eps}")
    if not isinstance(parity, bool):
        raise TypeError(f"{name}: parity must be a bool, got {parity!r}")


def _validate_masked(*args: Any) -> None:
    _check_masked("masked_softmax_attention", *args)


def _validate_masked_backward(grad: Tensor, query: Tensor, *rest: Any) -> None:
    name = "masked_softmax_attention_backward"
    check_float(name, grad=grad)
    _check_masked(name, query, *rest)
    check_shape(name, "grad", grad, list(query.shape))


def _save_masked(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.eps, ctx.parity = inputs
    ctx.save_for_backward(*tensors)


def _masked_formula(ctx: Any, grad: Tensor) -> Any:
    options = ctx.causal, ctx.scale, ctx.eps, ctx.parity
    found = masked_softmax_attention_backward.overload(grad, *ctx.saved_tensors, *options)
    gradients = (g if needed else None for g, needed in zip(found, ctx.needs_input_grad[:4], strict=True))
    return (*gradients, None, None, None, None)


masked_softmax_attention_backward = register(
    Operator(
        "masked_softmax_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor mask, bool causal, "
        "float scale, float eps, bool parity) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)",
        family="kv_fusion",
        validate=_validate_masked_backward,
        reference=_masked_backward_reference,
        fake=lambda grad, *rest: tuple(x.new_empty(x.shape) for x in rest[:4]),
        backward=through_reference(_masked_backward_reference),
        triton=Kernel("cofire_kernels.kv_fusion:masked_softmax_attention_backward"),
        flops=lambda grad, query, key, value, mask, causal, *rest: 10 * query.shape[3] * pairs_of(query, key, causal),
        bytes=lambda grad, query, key, value, mask, *rest: size_of(grad) + 2 * size_of(query, key, value, mask),
    )
)

_masked_softmax_attention = register(
    Operator(
        "masked_softmax_attention(Tensor query, Tensor key, Tensor value, Tensor mask, bool causal, float scale, float eps, "
        "bool parity) -> Tensor output",
        family="kv_fusion",
        validate=_validate_masked,
        reference=_masked_reference,
        fake=lambda query, *rest: query.new_empty(query.shape),
        backward=Backward(_save_masked, _masked_formula, "masked_softmax_attention_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.kv_fusion:masked_softmax_attention"),
        flops=lambda query, key, value, mask, causal, *rest: 4 * query.shape[3] * pairs_of(query, key, causal),
        bytes=lambda query, key, value, mask, *rest: size_of(query, query, key, value, mask),
    )
)


def masked_softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    parity: bool = False,
) -> Tensor:
    """Attention in which a mask multiplies the exponentials of the keys, with a gradient to the mask of dropped keys too.

    With E the exponentials of the logits less the largest of the row (of dropped keys as well), and G the mask of the key,
    or 1 where key and query are of the same token, ::

        P_ij = (E_ij G_ij + eps / S) / (sum_k E_ik G_ik + eps)

    A token always attends to itself, so that there is something left where all others are dropped. Nothing of size q times
    S is stored. The gradient takes the largest logit for a constant, as it is but for eps.

    Args:
        query: float ``[B, H, q, d]``, of the last q of the S tokens.
        key: ``[B, Hkv, S, d]`` in the dtype of ``query``, Hkv a divisor of H, S at least 1.
        value: ``[B, Hkv, S, d]``.
        mask: ``[B, S]``, bool or of any float dtype: 0 drops a token, for all heads.
        causal: queries see themselves and what came before.
        scale: of the products of queries and keys, positive; None for 1 / sqrt(d).
        eps: positive.
        parity: give tokens that a query does not see a weight of eps / S too, as the authors' released code does; else
            it is exactly zero.

    Returns:
        ``[B, H, q, d]`` in the dtype of ``query``.

    Raises:
        TypeError: tensors that are no floats or of different dtypes.
        ValueError: a shape that does not fit, no keys, more queries than keys, ``scale`` or ``eps`` not positive.

    Example:
        >>> query, key = torch.zeros(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
        >>> value = torch.tensor([1.0, 2.0, 4.0])[:, None].expand(1, 1, 3, 4)
        >>> output = masked_softmax_attention(query, key, value, torch.tensor([[1.0, 0.0, 1.0]]))
        >>> [round(x, 4) for x in output[0, 0, :, 0].tolist()]  # the second token sees itself, the third does not see it
        [1.0, 1.5, 2.5]

    Source: Dynamic-LLaVA (Huang et al., ICLR 2025), attention of its training; DynamicViT (Rao et al., NeurIPS 2021),
    attention masking.
    """
    name = "masked_softmax_attention"
    if scale is None:
        check_tokens(name, "query", query, "q")
        scale = 1 / math.sqrt(max(query.shape[3], 1))
    if mask.dtype == torch.bool:
        mask = mask.to(query.dtype)
    output: Tensor = _masked_softmax_attention(query, key, value, mask, causal, scale, eps, parity)
    return output


# ------------------------------------------------------------------------------------------------- kv_append_

_FULL = "kv_append_: lengths must be from 0 to less than the slots of the cache: it is full"


def _append_reference(
    cache_key: Tensor, cache_value: Tensor, lengths: Tensor, key: Tensor, value: Tensor, keep: Tensor
) -> Tensor:
    slots = cache_key.shape[2]
    # On a GPU this is a check by the device, which nobody waits for.
    torch._assert_async(((lengths >= 0) & (lengths < slots)).all(), _FULL)
    rows = torch.arange(key.shape[0], device=key.device)
    at = lengths.to(torch.int64).clamp(0, max(slots - 1, 0))
    cache_key[rows, :, at] = key[:, :, 0]
    cache_value[rows, :, at] = value[:, :, 0]
    seen = lengths + 1
    lengths += keep
    return seen


def _validate_append(
    cache_key: Tensor, cache_value: Tensor, lengths: Tensor, key: Tensor, value: Tensor, keep: Tensor
) -> None:
    name = "kv_append_"
    check_float(name, cache_key=cache_key, cache_value=cache_value, key=key, value=value)
    check_tokens(name, "cache_key", cache_key, "slots")
    check_shape(name, "cache_value", cache_value, list(cache_key.shape))
    batch, heads, _, d = cache_key.shape
    for which, x in (("key", key), ("value", value)):
        check_shape(name, which, x, [batch, heads, 1, d])
    for which, x, dtype in (("lengths", lengths, torch.int32), ("keep", keep, torch.bool)):
        if x.dtype != dtype:
            raise TypeError(f"{name}: {which} must be {str(dtype).removeprefix('torch.')}, got {x.dtype}")
        if list(x.shape) != [batch]:
            refuse(name, f"{which} must have shape [{batch}], one for each row of the batch, got {shape_of(x)}")
    check_same(name, "cache_key", cache_key, cache_value=cache_value, key=key, value=value, lengths=lengths, keep=keep)


_kv_append = register(
    Operator(
        "kv_append_(Tensor(a!) cache_key, Tensor(b!) cache_value, Tensor(c!) lengths, Tensor key, Tensor value, Tensor keep) "
        "-> Tensor seen",
        family="kv_fusion",
        validate=_validate_append,
        reference=_append_reference,
        fake=lambda cache_key, cache_value, lengths, *rest: lengths.new_empty(lengths.shape),
        backward="a cache is written in place, by a model that is not trained",
        triton=Kernel("cofire_kernels.kv_fusion:kv_append_"),
        bytes=lambda cache_key, cache_value, lengths, key, value, keep: (
            2 * size_of(key, value) + 3 * size_of(lengths) + size_of(keep)
        ),
    )
)


def kv_append_(
    cache_key: Tensor, cache_value: Tensor, lengths: Tensor, key: Tensor, value: Tensor, keep: Tensor
) -> Tensor:
    """Write a token behind those that each row of the batch has cached, and count it where it is to stay.

    A token that is not kept is in the cache for its own step, so that it attends to itself, and the next token takes its
    place. So there is nothing to branch on, and rows of the batch may decide differently.

    Args:
        cache_key: float ``[B, H, slots, d]``, any strides: row ``lengths[b]`` of each head is written.
        cache_value: the same of the values.
        lengths: int32 ``[B]``, how many tokens each row has; increased by ``keep``.
        key: ``[B, H, 1, d]`` in the dtype of the cache.
        value: ``[B, H, 1, d]``.
        keep: bool ``[B]``, which rows' tokens stay.

    Returns:
        ``seen`` int32 ``[B]``: how many tokens the new one attends to, itself included. For
        :func:`torch.nn.functional.scaled_dot_product_attention` on the whole cache, the mask is
        ``torch.arange(slots) < seen[:, None]``.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a shape that does not fit.
        RuntimeError: the cache of a row is full; nothing is written then. On a GPU, where nobody waits for an answer, the
            device itself raises, as for an index out of range.

    Example:
        >>> keys, values, lengths = torch.zeros(2, 1, 3, 1), torch.zeros(2, 1, 3, 1), torch.tensor([0, 1], dtype=torch.int32)
        >>> for token, keep in ((5.0, [True, False]), (6.0, [True, True])):
        ...     x = torch.full((2, 1, 1, 1), token)
        ...     seen = kv_append_(keys, values, lengths, x, x, torch.tensor(keep))
        >>> keys.view(2, 3).tolist(), lengths.tolist(), seen.tolist()
        ([[5.0, 6.0, 0.0], [0.0, 6.0, 0.0]], [2, 2], [2, 2])

    Source: Dynamic-LLaVA (Huang et al., ICLR 2025), decoding with a cache; without its branch, so for batches too.
    """
    seen: Tensor = _kv_append(cache_key, cache_value, lengths, key, value, keep)
    return seen
