# SPDX-License-Identifier: Apache-2.0
"""Softmax attention whose queries and keys are binary codes.

A score takes one of ``bits`` + 1 values, so that the exponential is a table, indexed by a count of bits. What remains of
the work is the product of the weights with the values. See ``cofire.ops.shift_add_attention`` for codes and links.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cofire.ops.checks import check_choice, check_device, check_float, check_number, check_same, refuse, shape_of
from cofire.ops.lowbit import compute_dtype
from cofire.ops.shift_add_attention import (
    KINDS,
    bits_of,
    check_bits,
    check_shape,
    check_tokens,
    size_of,
    word_of,
)
from cofire.registry import Backward, Kernel, Operator, register, through_reference

__all__ = ["binary_softmax_attention"]

PRECISIONS = ("highest", "high")


def _features(codes: Tensor, link: Tensor | None, bits: int, kind: str, dtype: torch.dtype) -> Tensor:
    found = bits_of(codes, link, bits, dtype)
    return 2 * found - 1 if kind == "sign" else found


def _weights(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = scale * (q @ k.transpose(-1, -2))
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = torch.where(seen, scores, -math.inf)
    return scores.softmax(-1)


def _attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_link: Tensor | None,
    key_link: Tensor | None,
    bits: int,
    scale: float,
    kind: str,
    causal: bool,
    precision: str,
) -> Tensor:
    dtype = compute_dtype(value)
    q, k = _features(query, query_link, bits, kind, dtype), _features(key, key_link, bits, kind, dtype)
    return (_weights(q, k, scale, causal) @ value.to(dtype)).to(value.dtype).contiguous()


def _attention_backward_reference(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_link: Tensor | None,
    key_link: Tensor | None,
    bits: int,
    scale: float,
    kind: str,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(grad, value)
    g, v = grad.to(dtype), value.to(dtype)
    q, k = _features(query, query_link, bits, kind, dtype), _features(key, key_link, bits, kind, dtype)
    weights = _weights(q, k, scale, causal)
    to_weights = g @ v.transpose(-1, -2)
    to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True))
    slope = scale * (2 if kind == "sign" else 1)  # of a score, by a bit

    def linked(link: Tensor | None, gradient: Tensor) -> Tensor:
        return value.new_empty((0,)) if link is None else (slope * gradient).to(value.dtype).contiguous()

    return (
        (weights.transpose(-1, -2) @ g).to(value.dtype).contiguous(),
        linked(query_link, to_scores @ k),
        linked(key_link, to_scores.transpose(-1, -2) @ q),
    )


def _validate(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_link: Tensor | None,
    key_link: Tensor | None,
    bits: int,
    scale: float,
    kind: str,
    causal: bool,
    precision: str = "highest",
) -> None:
    check_float(name, value=value, query_link=query_link, key_link=key_link)
    check_tokens(name, "value", value, "M", "d")
    check_bits(name, "bits", bits)
    check_choice(name, "kind", kind, KINDS)
    check_choice(name, "precision", precision, PRECISIONS)
    for which, x in (("query", query), ("key", key)):
        if x.dtype != word_of(bits):
            raise TypeError(f"{name}: {which} must be {word_of(bits)} for codes of {bits} bits, got {x.dtype}")
    check_shape(name, "key", key, list(value.shape[:3]))
    batch, heads = value.shape[:2]
    if query.dim() != 3 or query.shape[0] != batch or query.shape[1] != heads:
        refuse(name, f"query must have shape [{batch}, {heads}, N], got {shape_of(query)}")
    check_device(name, "value", value, query=query, key=key)
    check_same(name, "value", value, query_link=query_link, key_link=key_link)
    for which, link, codes in (("query_link", query_link, query), ("key_link", key_link, key)):
        if link is not None:
            check_shape(name, which, link, [*codes.shape, bits])
    check_number(name, scale=scale)
    if not 0 < scale < math.inf:
        refuse(name, f"scale must be positive and finite, got {scale}")
    if not isinstance(causal, bool):
        raise TypeError(f"{name}: causal must be a bool, got {causal!r}")


def _backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_link: Tensor | None,
    key_link: Tensor | None,
    bits: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    def linked(link: Tensor | None, codes: Tensor) -> Tensor:
        return value.new_empty((0,) if link is None else (*codes.shape, bits))

    return value.new_empty(value.shape), linked(query_link, query), linked(key_link, key)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, query_link, key_link, *ctx.options, _ = inputs
    # a link is there for its gradient alone
    links = (query_link if ctx.needs_input_grad[3] else None, key_link if ctx.needs_input_grad[4] else None)
    ctx.save_for_backward(query, key, value, *links)


def _formula(ctx: Any, grad: Tensor) -> Any:
    found = binary_softmax_attention_backward.overload(grad, *ctx.saved_tensors, *ctx.options)
    gradients = (g if needed else None for g, needed in zip(found, ctx.needs_input_grad[2:5], strict=True))
    return (None, None, *gradients, None, None, None, None, None)


def _flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    """Of the product with the values, half of it under the diagonal."""
    *_, causal, _ = rest
    return int(query.numel() * value.shape[2] * value.shape[3] * (1 if causal else 2))


binary_softmax_attention_backward = register(
    Operator(
        "binary_softmax_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? query_link, "
        "Tensor? key_link, SymInt bits, float scale, str kind, bool causal) -> (Tensor grad_value, "
        "Tensor grad_query_link, Tensor grad_key_link)",
        family="shift_add",
        validate=lambda grad, *args: _validate("binary_softmax_attention_backward", *args),
        reference=_attention_backward_reference,
        fake=_backward_fake,
        backward=through_reference(_attention_backward_reference),
        triton=Kernel("cofire_kernels.shift_add_attention:binary_softmax_attention_backward"),
        bytes=lambda grad, query, key, value, *rest: size_of(grad, query, key, value, value, *rest[:2]),
    )
)

_attention = register(
    Operator(
        "binary_softmax_attention(Tensor query, Tensor key, Tensor value, Tensor? query_link, Tensor? key_link, "
        "SymInt bits, float scale, str kind, bool causal, str precision) -> Tensor",
        family="shift_add",
        validate=lambda *args: _validate("binary_softmax_attention", *args),
        reference=_attention_reference,
        fake=lambda query, key, value, *rest: value.new_empty((*query.shape, value.shape[3])),
        backward=Backward(_save, _formula, "binary_softmax_attention_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.shift_add_attention:binary_softmax_attention"),
        flops=_flops,
        bytes=lambda query, key, value, *rest: (
            size_of(query, key, value) + query.numel() * value.shape[3] * value.element_size()
        ),
    )
)


def binary_softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bits: int,
    scale: float | None = None,
    kind: str = "sign",
    causal: bool = False,
    query_link: Tensor | None = None,
    key_link: Tensor | None = None,
    precision: str = "highest",
) -> Tensor:
    """Softmax attention with binary queries and keys: softmax(scale S) V, with S the similarity of the codes.

    As many keys as queries is no condition. The scores are neither computed by a product nor stored, and no exponential is
    taken of them: a count of bits is looked up in a table.

    Args:
        query: codes ``[B, H, N]`` of ``bits`` bits each, from :func:`hash_encode` or :func:`binary_encode`.
        key: codes ``[B, H, M]``.
        value: float ``[B, H, M, d]``.
        bits: of a code, 1 to 64.
        scale: of the scores, positive; None for 1 / sqrt(bits).
        kind: what a bit stands for in S, as in :func:`hamming_similarity`: ``"sign"``, -1 and 1, or ``"binary"``, 0 and 1.
        causal: a query sees the keys up to its own position alone, counted from the first.
        query_link: zeros ``[B, H, N, bits]`` in the dtype of ``value`` that take the gradient of the queries' bits to the
            encoder; their values are not read. None for no such gradient.
        key_link: the same of the keys, ``[B, H, M, bits]``.
        precision: of the product with the values in the forward, where a kernel has a choice. ``"highest"``: fp32.
            ``"high"``: weights of 15 bits and values of 14, each relative to the largest of a block of 128 keys (of its
            query, and of its feature), and an exact sum: an error of about 2e-4 of the result where the values have mean
            zero, at half the arithmetic. The gradients are in fp32 always.

    Returns:
        ``[B, H, N, d]`` in the dtype of ``value``.

    Raises:
        TypeError: codes of another dtype than their bits demand, or floats of different dtypes.
        ValueError: a shape that does not fit, bits out of range, an unknown kind or precision, ``scale`` not positive.

    Example:
        >>> query, key = torch.tensor([[[0b11]]], dtype=torch.int16), torch.tensor([[[0b11, 0b00]]], dtype=torch.int16)
        >>> value = torch.tensor([[[[1.0], [0.0]]]])
        >>> round(binary_softmax_attention(query, key, value, bits=2, scale=0.5).item(), 4)  # 1 / (1 + exp(-2))
        0.8808

    Source: BinaryAttention (arXiv 2603.09582, 2026), softmax attention with the signs of queries and keys; XNOR-Net
    (Rastegari et al., ECCV 2016, section 3.2): products of signs as exclusive or and bit count.
    """
    if scale is None:
        check_bits("binary_softmax_attention", "bits", bits)
        scale = 1 / math.sqrt(bits)
    args = (query, key, value, query_link, key_link, bits, scale, kind, causal, precision)
    result: Tensor = _attention(*args)
    return result
