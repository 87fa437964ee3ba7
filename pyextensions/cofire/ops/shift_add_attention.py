# SPDX-License-Identifier: Apache-2.0
"""Binary codes of queries and keys, and attention that adds the values which they select.

A code is a word of b bits, bit i for feature i: int16 up to 16 bits, int32 up to 32, int64 up to 64 (the sign bit is an
ordinary bit). An encoder also returns a *link*: zeros ``[B, H, N, b]`` that take no memory, through which the
straight-through gradient of the features flows from the attention back to the encoder's input.

All arithmetic is in fp32 (fp64 where an argument is). Rows are normalised to ``x / max(|x|, eps)``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cofire.ops.checks import (
    check_choice,
    check_device,
    check_float,
    check_integer,
    check_number,
    check_same,
    refuse,
    shape_of,
)
from cofire.ops.lowbit import compute_dtype
from cofire.registry import Backward, Kernel, Operator, register, through_reference

__all__ = ["binary_encode", "binary_linear_attention", "hamming_similarity", "hash_encode"]

#: The least sigma of a hash, of rows that all equal all anchors.
SIGMA_FLOOR = 1e-12
MOST_BITS = 64


def word_of(bits: int) -> torch.dtype:
    """The dtype of codes of so many bits."""
    return torch.int16 if bits <= 16 else torch.int32 if bits <= 32 else torch.int64


def _pack(features: Tensor) -> Tensor:
    """``[..., b]`` of zeros and ones to words ``[...]``."""
    bits = features.shape[-1]
    place = torch.arange(bits, device=features.device)
    return (features.to(torch.int64) << place).sum(-1).to(word_of(bits))


def _unpack(codes: Tensor, bits: int) -> Tensor:
    """Words ``[...]`` to int64 zeros and ones ``[..., bits]``."""
    return (codes.to(torch.int64)[..., None] >> torch.arange(bits, device=codes.device)) & 1


def _nothing_of(input: Tensor, bits: int) -> Tensor:
    """A link that nothing flows through: zeros of stride 0."""
    return input.new_zeros(()).expand(*input.shape[:-1], bits)


def _link(features: Tensor, passes: Tensor, input: Tensor) -> Tensor:
    """Zeros with the gradient of ``features`` where it ``passes``."""
    if not (torch.is_grad_enabled() and features.requires_grad):
        return _nothing_of(input, features.shape[-1])
    kept = torch.where(passes, features, 0)
    return (kept - kept.detach()).to(input.dtype)


def check_tokens(operator: str, name: str, x: Tensor, count: str = "N", last: str = "d") -> None:
    if x.dim() != 4:
        refuse(operator, f"{name} must have shape [B, H, {count}, {last}], got {shape_of(x)}")


def check_shape(operator: str, name: str, x: Tensor, shape: list[int]) -> None:
    if list(x.shape) != shape:
        refuse(operator, f"{name} must have shape {shape}, got {shape_of(x)}")


def check_bits(operator: str, what: str, bits: int) -> None:
    check_integer(operator, bits=bits)
    if not 1 <= bits <= MOST_BITS:
        refuse(operator, f"{what} must be between 1 and {MOST_BITS}, got {bits}")


def _check_eps(operator: str, eps: float) -> None:
    check_number(operator, eps=eps)
    if not 0 < eps < math.inf:
        refuse(operator, f"eps must be positive and finite, got {eps}")


def _normalised(x: Tensor, eps: float) -> Tensor:
    unit: Tensor = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps)
    return unit


def _normalised_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """``grad`` of the normalised rows to the gradient of x."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / norm.clamp(min=eps)
    along = torch.where(norm >= eps, (unit * grad).sum(-1, keepdim=True), 0)
    result: Tensor = (grad - unit * along) / norm.clamp(min=eps)
    return result


def size_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# ------------------------------------------------------------------------------------------------ hash_encode


def _distances(unit: Tensor, anchors: Tensor) -> Tensor:
    """Squared distances ``[B, H, N, m]``, without the differences."""
    return (
        unit.square().sum(-1, keepdim=True) + anchors.square().sum(-1)[:, None] - 2 * (unit @ anchors.transpose(-1, -2))
    )


def _sigma(unit: Tensor, anchors: Tensor) -> Tensor:
    """The mean of the squared distances ``[B, H]``, from the means alone."""
    rows = unit.square().sum(-1).mean(-1) + anchors.square().sum(-1).mean(-1)
    return (rows - 2 * (unit.mean(2) * anchors.mean(1)).sum(-1)).clamp(min=SIGMA_FLOOR)


def _hash_encode_reference(
    input: Tensor, anchors: Tensor, center: Tensor, projection: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(input, anchors, center, projection)
    a, c, p = (t.to(dtype) for t in (anchors, center, projection))
    unit = _normalised(input.to(dtype), eps)
    # (the mean of nothing)
    sigma = _sigma(unit, a) if input.shape[2] else unit.new_zeros(input.shape[:2])
    phi = torch.exp(-_distances(unit, a) / (2 * sigma[..., None, None])) - c[:, None]
    features = phi @ p.transpose(-1, -2)
    gate = (features > 0) & (features < 1)
    return _link(features, gate, input), _pack(features > 0), _pack(gate), sigma.detach()


def _hash_encode_backward_reference(
    grad: Tensor,
    input: Tensor,
    anchors: Tensor,
    projection: Tensor,
    gate: Tensor,
    sigma: Tensor,
    eps: float,
) -> Tensor:
    dtype = compute_dtype(grad, input, anchors, projection)
    g, x, a, p = (t.to(dtype) for t in (grad, input, anchors, projection))
    if not input.shape[2]:
        return torch.zeros_like(input, memory_format=torch.contiguous_format)
    unit = _normalised(x, eps)
    # Sigma is a function of the input: as data it is the value, here it is what is differentiated.
    s = _sigma(unit, a)[..., None, None]
    distance = _distances(unit, a)
    kernel = torch.exp(-distance / (2 * s))
    weighted = kernel * ((g * _unpack(gate, p.shape[1])) @ p)
    through_sigma = (weighted * distance).sum((-1, -2), keepdim=True) / (2 * s * s)
    through_sigma = torch.where(sigma[..., None, None] > SIGMA_FLOOR, through_sigma, 0)
    to_distance = -weighted / (2 * s) + through_sigma / (distance.shape[-1] * distance.shape[-2])
    to_unit = 2 * (to_distance.sum(-1, keepdim=True) * unit - to_distance @ a)
    return _normalised_backward(to_unit, x, eps).to(input.dtype).contiguous()


def _validate_hash(
    name: str, input: Tensor, anchors: Tensor, projection: Tensor, eps: float, center: Tensor | None = None
) -> None:
    check_float(name, input=input, anchors=anchors, center=center, projection=projection)
    check_device(name, "input", input, anchors=anchors, center=center, projection=projection)
    check_tokens(name, "input", input)
    heads, width = input.shape[1], input.shape[3]
    if width == 0:
        refuse(name, f"input must have at least one feature, got {shape_of(input)}")
    if anchors.dim() != 3 or anchors.shape[0] != heads or anchors.shape[2] != width or anchors.shape[1] == 0:
        refuse(name, f"anchors must have shape [{heads}, m, {width}] with m at least 1, got {shape_of(anchors)}")
    if center is not None:
        check_shape(name, "center", center, list(anchors.shape[:2]))
    if projection.dim() != 3 or projection.shape[0] != heads or projection.shape[2] != anchors.shape[1]:
        refuse(name, f"projection must have shape [{heads}, b, {anchors.shape[1]}], got {shape_of(projection)}")
    check_bits(name, "the bits of a code (rows of projection)", projection.shape[1])
    _check_eps(name, eps)


def _validate_hash_encode(input: Tensor, anchors: Tensor, center: Tensor, projection: Tensor, eps: float) -> None:
    _validate_hash("hash_encode", input, anchors, projection, eps, center)


def _hash_encode_fake(
    input: Tensor, anchors: Tensor, center: Tensor, projection: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bits, dtype = projection.shape[1], compute_dtype(input, anchors, center, projection)
    codes, gate = (input.new_empty(input.shape[:3], dtype=word_of(bits)) for _ in range(2))
    return _nothing_of(input, bits), codes, gate, input.new_empty(input.shape[:2], dtype=dtype)


def _save_hash_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, anchors, _, projection, ctx.eps = inputs
    _, _, gate, sigma = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, anchors, projection, gate, sigma)


def _hash_encode_formula(ctx: Any, *grads: Tensor | None) -> Any:
    grad = grads[0]
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 5
    return hash_encode_backward.overload(grad, *ctx.saved_tensors, ctx.eps), None, None, None, None


hash_encode_backward = register(
    Operator(
        "hash_encode_backward(Tensor grad, Tensor input, Tensor anchors, Tensor projection, Tensor gate, "
        "Tensor sigma, float eps) -> Tensor",
        family="shift_add",
        validate=lambda grad, input, anchors, projection, gate, sigma, eps: _validate_hash(
            "hash_encode_backward", input, anchors, projection, eps
        ),
        reference=_hash_encode_backward_reference,
        fake=lambda grad, input, *rest: torch.empty_like(input, memory_format=torch.contiguous_format),
        backward=through_reference(_hash_encode_backward_reference),
        triton=Kernel("cofire_kernels.shift_add_attention:hash_encode_backward"),
        bytes=lambda grad, input, *rest: size_of(grad, input, input, rest[2]),
    )
)

_hash_encode = register(
    Operator(
        "hash_encode(Tensor input, Tensor anchors, Tensor center, Tensor projection, float eps) -> (Tensor link, "
        "Tensor codes, Tensor gate, Tensor sigma)",
        family="shift_add",
        validate=_validate_hash_encode,
        reference=_hash_encode_reference,
        fake=_hash_encode_fake,
        backward=Backward(_save_hash_encode, _hash_encode_formula, "hash_encode_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.shift_add_attention:hash_encode"),
        bytes=lambda input, anchors, center, projection, eps: (
            size_of(input) + 2 * word_of(projection.shape[1]).itemsize * input[..., 0].numel()
        ),
    )
)


def hash_encode(
    input: Tensor, anchors: Tensor, center: Tensor, projection: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Codes of tokens by a kernelised Hamming hash, and the link for their gradient.

    With unit rows u of ``input``, D[n, j] = |u_n - a_j|^2 and sigma its mean over n and j, separately for each batch
    entry and head, the features are y = (exp(-D / (2 sigma)) - center) projection^T, and bit i is y_i > 0. The
    gradient with respect to y passes where 0 < y < 1 and reaches the input through D and sigma; anchors, center and
    projection are constants. Neither D nor the differences u_n - a_j are stored.

    Args:
        input: float ``[B, H, N, d]``.
        anchors: float ``[H, m, d]``, unit rows usually.
        center: float ``[H, m]``, subtracted from the kernel's values.
        projection: float ``[H, b, m]``, b from 1 to 64.
        eps: the least norm that a row is divided by.

    Returns:
        ``codes`` ``[B, H, N]``, int16, int32 or int64 by the number of bits, and ``link``, zeros ``[B, H, N, b]`` in the
        dtype of ``input`` that use no memory and carry the straight-through gradient.

    Raises:
        TypeError: a tensor is not a float.
        ValueError: a shape that does not fit, more than 64 bits, ``eps`` not positive.

    Example:
        >>> x = torch.tensor([[[[2.0, 0.0], [0.0, 3.0]]]])
        >>> anchors = torch.eye(2)[None]
        >>> codes, link = hash_encode(x, anchors, torch.full((1, 2), 0.5), torch.eye(2)[None])
        >>> codes.tolist(), link.shape
        ([[[1, 2]]], torch.Size([1, 1, 2, 2]))

    Source: kernel-based supervised hashing (Liu et al., CVPR 2012, section 3) as ShiftAddViT encodes queries and keys
    (You et al., NeurIPS 2023, section 4.1).
    """
    link, codes, _, _ = _hash_encode(input, anchors, center, projection, eps)
    return codes, link


# ---------------------------------------------------------------------------------------------- binary_encode


def _binary_encode_reference(input: Tensor, threshold: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(input, threshold)
    unit = _normalised(input.to(dtype), eps)
    mean = unit.mean((0, 2, 3), dtype=torch.float64).to(dtype) if unit.numel() else unit.new_zeros(unit.shape[1])
    bound = mean.double().mean().to(dtype) if threshold is None else threshold.to(dtype)[:, None, None]
    return _link(unit, (unit >= 0) & (unit <= 1), input), _pack(unit > bound), mean.detach()


def _binary_encode_backward_reference(grad: Tensor, input: Tensor, eps: float) -> Tensor:
    dtype = compute_dtype(grad, input)
    x = input.to(dtype)
    unit = _normalised(x, eps)
    passed = torch.where((unit >= 0) & (unit <= 1), grad.to(dtype), 0)
    return _normalised_backward(passed, x, eps).to(input.dtype).contiguous()


def _validate_binary_encode(input: Tensor, threshold: Tensor | None, eps: float) -> None:
    name = "binary_encode"
    check_float(name, input=input, threshold=threshold)
    check_device(name, "input", input, threshold=threshold)
    check_tokens(name, "input", input)
    check_bits(name, "the bits of a code (features of input)", input.shape[3])
    if threshold is not None:
        check_shape(name, "threshold", threshold, [input.shape[1]])
    _check_eps(name, eps)


def _save_binary_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, _, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input)


def _binary_encode_formula(ctx: Any, *grads: Tensor | None) -> Any:
    if grads[0] is None or not ctx.needs_input_grad[0]:
        return None, None, None
    return binary_encode_backward.overload(grads[0], *ctx.saved_tensors, ctx.eps), None, None


binary_encode_backward = register(
    Operator(
        "binary_encode_backward(Tensor grad, Tensor input, float eps) -> Tensor",
        family="shift_add",
        validate=lambda grad, input, eps: check_tokens("binary_encode_backward", "input", input),
        reference=_binary_encode_backward_reference,
        fake=lambda grad, input, eps: torch.empty_like(input, memory_format=torch.contiguous_format),
        backward=through_reference(_binary_encode_backward_reference),
        triton=Kernel("cofire_kernels.shift_add_attention:binary_encode_backward"),
        bytes=lambda grad, input, eps: size_of(grad, input, input),
    )
)

_binary_encode = register(
    Operator(
        "binary_encode(Tensor input, Tensor? threshold, float eps) -> (Tensor link, Tensor codes, Tensor mean)",
        family="shift_add",
        validate=_validate_binary_encode,
        reference=_binary_encode_reference,
        fake=lambda input, threshold, eps: (
            _nothing_of(input, input.shape[3]),
            input.new_empty(input.shape[:3], dtype=word_of(input.shape[3])),
            input.new_empty(input.shape[1:2], dtype=compute_dtype(input, threshold)),
        ),
        backward=Backward(_save_binary_encode, _binary_encode_formula, "binary_encode_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.shift_add_attention:binary_encode"),
        bytes=lambda input, threshold, eps: size_of(input) + word_of(input.shape[3]).itemsize * input[..., 0].numel(),
    )
)


def binary_encode(
    input: Tensor, threshold: Tensor | None = None, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of tokens whose bits are their own features, compared with a threshold, and the link for their gradient.

    With unit rows u of ``input``, bit i of a code is u_i > threshold. The straight-through gradient is that of
    clamp(u, 0, 1), both ends included; the threshold has none.

    Args:
        input: float ``[B, H, N, d]``, d from 1 to 64.
        threshold: float ``[H]``, one for each head, so that a code does not depend on the other samples of a batch; None
            for the mean of all unit rows of the call.
        eps: the least norm that a row is divided by.

    Returns:
        ``codes`` ``[B, H, N]``, int16, int32 or int64 by the number of bits; ``mean`` fp32 ``[H]``, the mean of each
        head's unit rows, to be averaged into running thresholds; and ``link``, zeros ``[B, H, N, d]`` in the dtype of
        ``input`` that use no memory and carry the straight-through gradient.

    Raises:
        TypeError: a tensor is not a float.
        ValueError: a shape that does not fit, more than 64 features, ``eps`` not positive.

    Example:
        >>> codes, mean, link = binary_encode(torch.tensor([[[[3.0, 4.0], [-3.0, 4.0]]]]))
        >>> codes.tolist(), round(mean.item(), 4)
        ([[[3, 2]]], 0.4)

    Source: ShiftAddViT (You et al., NeurIPS 2023, section 4.1), its vanilla binary quantisation of queries and keys.
    """
    link, codes, mean = _binary_encode(input, threshold, eps)
    return codes, mean, link


# ------------------------------------------------------------------------------------ binary_linear_attention


def bits_of(codes: Tensor, link: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    found = _unpack(codes, bits).to(dtype)
    return found if link is None else found + link.to(dtype)


def _depthwise(value: Tensor, weight: Tensor) -> Tensor:
    """Along the tokens, every head with its own weight ``[taps]``, filled up with zeros at both ends."""
    taps = weight.shape[1]
    padded = torch.nn.functional.pad(value, (0, 0, taps // 2, taps // 2))
    tokens = value.shape[2]
    return sum(
        (weight[:, j, None, None] * padded[:, :, j : j + tokens] for j in range(taps)), start=torch.zeros_like(value)
    )


def attention_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``K^T V``, and the rows whose directions are the attention: ``T = V / 2 + Q K^T V / pi``."""
    kv = k.transpose(-1, -2) @ v
    return kv, v / 2 + q @ kv / math.pi


def _attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    query_link: Tensor | None,
    key_link: Tensor | None,
    bits: int,
    eps: float,
) -> Tensor:
    dtype = compute_dtype(value, weight)
    v = value.to(dtype)
    q, k = bits_of(query, query_link, bits, dtype), bits_of(key, key_link, bits, dtype)
    _, t = attention_rows(q, k, v)
    out = t * torch.rsqrt(t.square().sum(-1, keepdim=True) + eps)
    if weight is not None:
        out = out + _depthwise(v, weight.to(dtype))
    return out.to(value.dtype).contiguous()


def _attention_backward_reference(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    query_link: Tensor | None,
    key_link: Tensor | None,
    bits: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(grad, value, weight)
    g, v = grad.to(dtype), value.to(dtype)
    q, k = bits_of(query, query_link, bits, dtype), bits_of(key, key_link, bits, dtype)
    kv, t = attention_rows(q, k, v)
    scale = torch.rsqrt(t.square().sum(-1, keepdim=True) + eps)
    direction = t * scale
    to_t = scale * (g - direction * (direction * g).sum(-1, keepdim=True))
    to_kv = q.transpose(-1, -2) @ to_t / math.pi
    to_value = to_t / 2 + k @ to_kv
    to_weight = value.new_empty((0,))
    if weight is not None:
        taps, tokens = weight.shape[1], v.shape[2]
        to_value = to_value + _depthwise(g, weight.to(dtype).flip(1))
        padded = torch.nn.functional.pad(v, (0, 0, taps // 2, taps // 2))
        parts = [(g * padded[:, :, j : j + tokens]).sum((0, 2, 3)) for j in range(taps)]
        to_weight = torch.stack(parts, 1).to(weight.dtype)

    def linked(link: Tensor | None, gradient: Tensor) -> Tensor:
        return value.new_empty((0,)) if link is None else gradient.to(value.dtype).contiguous()

    return (
        to_value.to(value.dtype).contiguous(),
        to_weight,
        linked(query_link, to_t @ kv.transpose(-1, -2) / math.pi),
        linked(key_link, v @ to_kv.transpose(-1, -2)),
    )


def _check_codes(operator: str, value: Tensor, bits: int, **codes: Tensor) -> None:
    check_bits(operator, "bits", bits)
    for name, x in codes.items():
        if x.dtype != word_of(bits):
            raise TypeError(f"{operator}: {name} must be {word_of(bits)} for codes of {bits} bits, got {x.dtype}")
        check_shape(operator, name, x, list(value.shape[:3]))


def _validate_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    query_link: Tensor | None,
    key_link: Tensor | None,
    bits: int,
    eps: float,
) -> None:
    name = "binary_linear_attention"
    check_float(name, value=value, weight=weight, query_link=query_link, key_link=key_link)
    check_tokens(name, "value", value)
    _check_codes(name, value, bits, query=query, key=key)
    others = {"query": query, "key": key, "weight": weight, "query_link": query_link, "key_link": key_link}
    check_same(name, "value", value, **others)
    if weight is not None and (weight.dim() != 2 or weight.shape[0] != value.shape[1] or weight.shape[1] % 2 == 0):
        refuse(name, f"weight must have shape [{value.shape[1]}, taps] with odd taps, got {shape_of(weight)}")
    for which, link in (("query_link", query_link), ("key_link", key_link)):
        if link is not None:
            check_shape(name, which, link, [*value.shape[:3], bits])
    _check_eps(name, eps)


def _attention_backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    query_link: Tensor | None,
    key_link: Tensor | None,
    bits: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def linked(link: Tensor | None) -> Tensor:
        return value.new_empty((0,) if link is None else (*value.shape[:3], bits))

    to_weight = value.new_empty((0,)) if weight is None else weight.new_empty(weight.shape)
    return value.new_empty(value.shape), to_weight, linked(query_link), linked(key_link)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, weight, query_link, key_link, ctx.bits, ctx.eps = inputs
    # a link is there for its gradient alone
    links = (query_link if ctx.needs_input_grad[4] else None, key_link if ctx.needs_input_grad[5] else None)
    ctx.save_for_backward(query, key, value, weight, *links)


def _attention_formula(ctx: Any, grad: Tensor) -> Any:
    found = binary_linear_attention_backward.overload(grad, *ctx.saved_tensors, ctx.bits, ctx.eps)
    to_value, to_weight, to_query, to_key = (
        g if needed else None for g, needed in zip(found, ctx.needs_input_grad[2:6], strict=True)
    )
    return None, None, to_value, to_weight, to_query, to_key, None, None


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, *rest: Any) -> int:
    """Of the products with the bits of the codes, and with the taps."""
    taps = 0 if weight is None else weight.shape[1]
    return int(2 * value.numel() * (2 * rest[2] + taps))


binary_linear_attention_backward = register(
    Operator(
        "binary_linear_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? weight, "
        "Tensor? query_link, Tensor? key_link, SymInt bits, float eps) -> (Tensor grad_value, Tensor grad_weight, "
        "Tensor grad_query_link, Tensor grad_key_link)",
        family="shift_add",
        validate=lambda grad, *args: _validate_attention(*args),
        reference=_attention_backward_reference,
        fake=_attention_backward_fake,
        backward=through_reference(_attention_backward_reference),
        triton=Kernel("cofire_kernels.shift_add_attention:binary_linear_attention_backward"),
        bytes=lambda grad, query, key, value, weight, *rest: size_of(grad, query, key, value, value, *rest[:2]),
    )
)

_attention = register(
    Operator(
        "binary_linear_attention(Tensor query, Tensor key, Tensor value, Tensor? weight, Tensor? query_link, "
        "Tensor? key_link, SymInt bits, float eps) -> Tensor",
        family="shift_add",
        validate=_validate_attention,
        reference=_attention_reference,
        fake=lambda query, key, value, *rest: value.new_empty(value.shape),
        backward=Backward(_save_attention, _attention_formula, "binary_linear_attention_backward"),
        double_backward=True,
        triton=Kernel("cofire_kernels.shift_add_attention:binary_linear_attention"),
        flops=_attention_flops,
        bytes=lambda query, key, value, *rest: size_of(query, key, value, value),
    )
)


def binary_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None = None,
    *,
    bits: int,
    query_link: Tensor | None = None,
    key_link: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Linear attention whose queries and keys are binary: its products are sums of the selected values.

    With Q and K the bits of the codes, T = V / 2 + Q (K^T V) / pi and row t of T, the output is t / sqrt(|t|^2 + eps)
    plus a depthwise convolution of the values along the tokens.

    Args:
        query: codes ``[B, H, N]`` of ``bits`` bits each, from :func:`hash_encode` or :func:`binary_encode`.
        key: codes ``[B, H, N]``; the same tensor where queries and keys are shared.
        value: float ``[B, H, N, d]``.
        weight: float ``[H, taps]``, an odd number of taps, centred; None for no convolution.
        bits: of a code, 1 to 64.
        query_link: zeros ``[B, H, N, bits]`` in the dtype of ``value`` that take the gradient of Q to the encoder; their
            values are not read. None for no such gradient.
        key_link: the same of the keys.
        eps: added to the squared norm.

    Returns:
        ``[B, H, N, d]`` in the dtype of ``value``.

    Raises:
        TypeError: codes of another dtype than their bits demand, or floats of different dtypes.
        ValueError: a shape that does not fit, bits out of range, ``eps`` not positive.

    Example:
        >>> codes = torch.tensor([[[1, 3, 2]]], dtype=torch.int16)
        >>> value = torch.tensor([[[[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]]])
        >>> binary_linear_attention(codes, codes, value, bits=2)[0, 0, 2].tolist()  # a quarter of a turn
        [0.0, 0.9999997019767761]

    Source: ShiftAddViT (You et al., NeurIPS 2023, section 4.1); linear-angular attention (Castling-ViT, You et al., CVPR
    2023, section 4).
    """
    result: Tensor = _attention(query, key, value, weight, query_link, key_link, bits, eps)
    return result


# ----------------------------------------------------------------------------------------- hamming_similarity

KINDS = ("binary", "sign")
WORDS = (torch.int16, torch.int32, torch.int64)


def _similarity_reference(query: Tensor, key: Tensor, bits: int, kind: str) -> Tensor:
    q, k = _unpack(query, bits), _unpack(key, bits)
    if kind == "sign":
        q, k = 2 * q - 1, 2 * k - 1
    # integers up to 64 are exact in any float
    return (q.float() @ k.float().transpose(-1, -2)).to(torch.int32)


def _validate_similarity(query: Tensor, key: Tensor, bits: int, kind: str) -> None:
    name = "hamming_similarity"
    check_bits(name, "bits", bits)
    check_choice(name, "kind", kind, KINDS)
    for which, x in (("query", query), ("key", key)):
        if x.dtype != word_of(bits):
            raise TypeError(f"{name}: {which} must be {word_of(bits)} for codes of {bits} bits, got {x.dtype}")
        if x.dim() == 0:
            refuse(name, f"{which} must have at least one dimension, got shape []")
    check_device(name, "query", query, key=key)
    if query.shape[:-1] != key.shape[:-1]:
        refuse(name, f"key must have shape [{''.join(f'{n}, ' for n in query.shape[:-1])}M], got {shape_of(key)}")


_hamming_similarity = register(
    Operator(
        "hamming_similarity(Tensor query, Tensor key, SymInt bits, str kind) -> Tensor",
        family="shift_add",
        validate=_validate_similarity,
        reference=_similarity_reference,
        fake=lambda query, key, bits, kind: query.new_empty((*query.shape, key.shape[-1]), dtype=torch.int32),
        backward="codes have no gradient",
        cpu=WORDS,
        triton=Kernel("cofire_kernels.shift_add_attention:hamming_similarity", WORDS),
        bytes=lambda query, key, bits, kind: size_of(query, key) + 4 * query.numel() * key.shape[-1],
    )
)


def hamming_similarity(query: Tensor, key: Tensor, *, bits: int, kind: str = "sign") -> Tensor:
    """How alike codes are, every query with every key: the products of their bits, by counting.

    Args:
        query: codes ``[..., N]`` of ``bits`` bits, int16, int32 or int64 (see :func:`binary_encode`).
        key: codes ``[..., M]``, the leading dimensions those of ``query``.
        bits: of a code, 1 to 64; other bits of a word are ignored.
        kind: ``"sign"``: bits stand for -1 and 1, the product is ``bits`` less twice the Hamming distance;
            ``"binary"``: for 0 and 1, the product is the number of common ones.

    Returns:
        int32 ``[..., N, M]``.

    Raises:
        TypeError: codes of another dtype than their bits demand.
        ValueError: a shape that does not fit, an unknown kind, bits out of range.

    Example:
        >>> query, key = torch.tensor([0b101], dtype=torch.int16), torch.tensor([0b101, 0b110, 0b010], dtype=torch.int16)
        >>> hamming_similarity(query, key, bits=3).tolist(), hamming_similarity(query, key, bits=3, kind="binary").tolist()
        ([[3, -1, -3]], [[2, 1, 0]])

    Source: XNOR-Net (Rastegari et al., ECCV 2016, section 3.2): products of signs as exclusive or and bit count.
    """
    result: Tensor = _hamming_similarity(query, key, bits, kind)
    return result
