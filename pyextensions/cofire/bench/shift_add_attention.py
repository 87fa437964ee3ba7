# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of binary codes and of attention with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cofire.bench.cases import Args, Case, Provider, Random, Run, compiled, plain
from cofire.ops.shift_add_attention import word_of

EPS = 1e-6
#: Not what the operator computes: what a network has in its place. It has a time, and is checked against its own maths.
SOFTMAX = "peer:torch sdpa (softmax, another function)"
#: How far the features of an input are from the thresholds at least: some ten times what fp32 loses on the way to them.
CLEARANCE = 1e-5


def clear_tokens(rand: Random, shape: tuple[int, ...], distances: Callable[[Tensor], Tensor]) -> Tensor:
    """Random tokens whose features are all clear of what they are compared with.

    Closer than a rounding, a feature may fall on either side: a bit of a code, or the gradient of a whole token, would
    depend on the order of a sum, and nothing could be compared. ``distances`` gives that of each feature, in fp64; they
    depend on means over all tokens, so that a few are drawn again until all are clear.
    """
    tokens = rand.normal(*shape)
    while (close := (distances(tokens.double()) < CLEARANCE).any(-1)).any():
        tokens[close] = rand.normal(int(close.sum()), shape[-1])
    return tokens


def pack(features: Tensor) -> Tensor:
    """A power of two for each bit, summed."""
    bits = features.shape[-1]
    powers = 1 << torch.arange(bits, device=features.device)
    return (features * powers).sum(-1).to(word_of(bits))


def pack_by_words(features: Tensor) -> Tensor:
    """Eight bools as one word, whose product with a constant has their bits in its last byte; whole bytes alone."""
    bytes_ = ((features.contiguous().view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8)
    return bytes_.view(word_of(features.shape[-1])).squeeze(-1)


def _packs_words(bits: int) -> bool:
    return bits in (16, 32, 64)


def unpack(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return (codes[..., None] >> torch.arange(bits, dtype=codes.dtype, device=codes.device) & 1).to(dtype)


def _link(features: Tensor, passes: Tensor) -> Tensor:
    """Zeros with the gradient of the features that pass; without autograd there is nothing to compute."""
    if not (torch.is_grad_enabled() and features.requires_grad):
        return features.new_zeros(()).expand(features.shape)
    kept = torch.where(passes, features, 0)
    return kept - kept.detach()


def _encoded(features: Tensor, sigma: Tensor, *, packed: Callable[[Tensor], Tensor] = pack) -> tuple[Tensor, ...]:
    gate = (features > 0) & (features < 1)
    return _link(features, gate), packed(features > 0), packed(gate), sigma


def hash_by_differences(input: Tensor, anchors: Tensor, center: Tensor, projection: Tensor, eps: float) -> Any:
    """As it is published: the differences of every token from every anchor."""
    unit = F.normalize(input, dim=-1, eps=eps)
    distance = ((unit[:, :, :, None] - anchors[:, None]) ** 2).sum(-1)
    sigma = distance.mean((-1, -2))
    phi = torch.exp(-distance / (2 * sigma[..., None, None])) - center[:, None]
    return _encoded(phi @ projection.transpose(-1, -2), sigma)


def _hashed(input: Tensor, anchors: Tensor, center: Tensor, projection: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sigma and the features: distances from products, their mean from the means, one buffer all the way."""
    unit = F.normalize(input, dim=-1, eps=eps)
    squares = 1 + anchors.square().sum(-1)
    sigma = squares.mean(-1) - 2 * (unit.mean(2) * anchors.mean(1)).sum(-1)
    phi = torch.matmul(unit, anchors.transpose(-1, -2)).sub_(squares[:, None] / 2).div_(sigma[..., None, None]).exp_()
    back = projection.transpose(-1, -2)
    return sigma, (phi @ back).sub_(center[:, None] @ back)


def hash_by_products(input: Tensor, anchors: Tensor, center: Tensor, projection: Tensor, eps: float) -> Any:
    """In closed form, and the codes packed by words."""
    sigma, features = _hashed(input, anchors, center, projection, eps)
    return _encoded(features, sigma, packed=pack_by_words if _packs_words(projection.shape[1]) else pack)


def _hash_flops(input: Tensor, anchors: Tensor, center: Tensor, projection: Tensor, *_: Any) -> int:
    """Of two products: tokens with anchors, and what comes of them with the projection."""
    return 2 * input[..., 0].numel() * anchors.shape[1] * (input.shape[-1] + projection.shape[1])


def _hash_backward_cost(
    input: Tensor, anchors: Tensor, center: Tensor, projection: Tensor, eps: float
) -> tuple[int, int]:
    """The gradient of the features goes back through both products: it, the gate and the input are read, one is written."""
    tokens, bits = input[..., 0].numel(), projection.shape[1]
    moved = input.element_size() * (tokens * bits + 2 * input.numel()) + word_of(bits).itemsize * tokens
    return moved, _hash_flops(input, anchors, center, projection)


def _hash(b: int, h: int, n: int, d: int, m: int, bits: int, **options: Any) -> Case:
    def args(b: int, n: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            anchors = F.normalize(rand.normal(h, m, d), dim=-1)
            center, projection = 0.6 + 0.1 * rand.uniform(h, m), rand.normal(h, bits, m)

            def distances(tokens: Tensor) -> Tensor:
                *_, features = _hashed(tokens, anchors.double(), center.double(), projection.double(), EPS)
                return torch.minimum(features.abs(), (features - 1).abs())

            return clear_tokens(rand, (b, h, n, d), distances), anchors, center, projection, EPS

        return make

    return Case(
        "hash_encode",
        f"{b}x{h}x{n}x{d}, {m} anchors, {bits} bits",
        torch.float32,
        args(b, n),
        {
            "eager": plain(hash_by_differences),
            "dense": {"products": plain(hash_by_products), "differences": plain(hash_by_differences)},
            "compile": compiled(hash_by_products),
        },
        args(1, 9),
        gradients=(0,),
        flops=_hash_flops,
        backward_cost=_hash_backward_cost,
        **options,
    )


def _binary_encoded(
    input: Tensor, threshold: Tensor | None, eps: float, packed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    unit = F.normalize(input, dim=-1, eps=eps)
    mean = unit.mean((0, 2, 3))
    bound = mean.mean() if threshold is None else threshold[:, None, None]
    return _link(unit, (unit >= 0) & (unit <= 1)), packed(unit > bound), mean


def binary_by_comparison(input: Tensor, threshold: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    return _binary_encoded(input, threshold, eps, pack)


def binary_by_words(input: Tensor, threshold: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    return _binary_encoded(input, threshold, eps, pack_by_words if _packs_words(input.shape[-1]) else pack)


def _binary(b: int, h: int, n: int, d: int, **options: Any) -> Case:
    def distances(tokens: Tensor) -> Tensor:
        unit = F.normalize(tokens, dim=-1, eps=EPS)
        # the window begins at zero, where the sign of the input is that of the feature: only the threshold is moved
        return (unit - unit.mean()).abs()

    def args(b: int, n: int) -> Callable[[Random], Args]:
        return lambda rand: (clear_tokens(rand, (b, h, n, d), distances), None, EPS)

    return Case(
        "binary_encode",
        f"{b}x{h}x{n}x{d}",
        torch.float32,
        args(b, n),
        {
            "eager": plain(binary_by_comparison),
            "dense": {"comparison": plain(binary_by_comparison), "words": plain(binary_by_words)},
            "compile": compiled(binary_by_comparison),
        },
        args(1, 9),
        gradients=(0,),
        **options,
    )


def attention_by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    query_link: Tensor,
    key_link: Tensor,
    bits: int,
    eps: float,
) -> Tensor:
    """As it is usually written, with codes of floats."""
    q, k = unpack(query, bits, value.dtype) + query_link, unpack(key, bits, value.dtype) + key_link
    t = 0.5 * value + q @ (k.transpose(-1, -2) @ value) / math.pi
    taps = weight.shape[1]
    residual = F.conv2d(value, weight[:, None, :, None], padding=(taps // 2, 0), groups=value.shape[1])
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + eps) + residual


def attention_by_library(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    query_link: Tensor,
    key_link: Tensor,
    bits: int,
    eps: float,
) -> Tensor:
    """Products with the addition inside, and the convolution along the tokens in one dimension."""
    b, h, n, d = value.shape
    q, k = unpack(query, bits, value.dtype) + query_link, unpack(key, bits, value.dtype) + key_link
    flat = value.reshape(b * h, n, d)
    sums = torch.bmm(k.reshape(b * h, n, bits).transpose(1, 2), flat) * (1 / math.pi)
    t = torch.baddbmm(flat, q.reshape(b * h, n, bits), sums, beta=0.5)
    taps = weight.shape[1]
    kernel = weight[:, None].expand(h, d, taps).reshape(h * d, 1, taps)
    rows = value.transpose(2, 3).reshape(b, h * d, n)
    residual = F.conv1d(rows, kernel, padding=taps // 2, groups=h * d).view(b, h, d, n).transpose(2, 3)
    return F.normalize(t, dim=-1, eps=math.sqrt(eps)).view(b, h, n, d) + residual


def _tokens(value: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with as many features as the values."""
    rand = Random(f"queries and keys {tuple(value.shape)}")
    return rand.normal(*value.shape).to(value), rand.normal(*value.shape).to(value)


def by_softmax(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Run:
    """torch's softmax attention to the same values: of real queries and keys, and without the residual."""
    q, k = _tokens(value)
    return lambda: F.scaled_dot_product_attention(q, k, value)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """What that computes, an image at a time: the weights of all of them take gigabytes."""
    images = zip(*_tokens(value), value, strict=True)
    return torch.stack([(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v for q, k, v in images])


def _attention(
    b: int, h: int, n: int, d: int, bits: int, softmax: bool = False, lossy: bool = False, **options: Any
) -> Case:
    """``softmax``: with the time of softmax attention, which is another function.

    ``lossy``: the gradient of the taps sums so many products that torch's convolution in two dimensions loses more of it than
    the check allows (of 3 million five times as much): where gradients are computed, what uses it is checked against its own
    maths, with its own rounding. That its maths are the operator's is what the check of forward and that of the tiny input say.
    """

    def args(b: int, n: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            query, key = (pack(rand.uniform(b, h, n, bits) < 0.5) for _ in range(2))
            links = [torch.zeros(b, h, n, bits) for _ in range(2)]
            return query, key, rand.normal(b, h, n, d), rand.normal(h, 9), *links, bits, EPS

        return make

    by_products: dict[str, Any] = {"gradient_reference": attention_by_products} if lossy else {}
    others = {SOFTMAX: Provider(by_softmax, reference=softmax_attention, differentiable=False)} if softmax else {}
    return Case(
        "binary_linear_attention",
        f"{b}x{h}x{n}x{d}, {bits} bits",
        torch.float32,
        args(b, n),
        {
            "eager": plain(attention_by_products, **by_products),
            "dense": {"products": plain(attention_by_products, **by_products), "library": plain(attention_by_library)},
            "compile": compiled(attention_by_products, **by_products),
            **others,
        },
        args(1, 9),
        gradients=(2, 3, 4, 5),
        **options,
    )


def similarity_by_product(query: Tensor, key: Tensor, bits: int, kind: str) -> Tensor:
    q, k = (unpack(codes, bits, torch.float32) for codes in (query, key))
    if kind == "sign":
        q, k = 2 * q - 1, 2 * k - 1
    return (q @ k.transpose(-1, -2)).to(torch.int32)


def similarity_by_table(query: Tensor, key: Tensor, bits: int, kind: str) -> Tensor:
    """The count of the bits of a word of 16, looked up."""
    counts = unpack(torch.arange(1 << 16, device=query.device), 16, torch.int32).sum(-1, dtype=torch.int32)
    words = query[..., None] ^ key[..., None, :] if kind == "sign" else query[..., None] & key[..., None, :]
    found = counts[words.to(torch.int32) & 0xFFFF]
    return bits - 2 * found if kind == "sign" else found


def _similarity(b: int, h: int, n: int, bits: int, **options: Any) -> Case:
    def args(b: int, n: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            query, key = (pack(rand.uniform(b, h, n, bits) < 0.5) for _ in range(2))
            return query, key, bits, "sign"

        return make

    by_product = plain(similarity_by_product)
    return Case(
        "hamming_similarity",
        f"{b}x{h}x{n}x{n}, {bits} bits",
        torch.int32,
        args(b, n),
        {
            "eager": by_product,
            "dense": {"product": by_product} | ({"table": plain(similarity_by_table)} if bits <= 16 else {}),
            "compile": compiled(similarity_by_product),
        },
        args(1, 9),
        **options,
    )


#: Shapes of the stages of PVTv2-B0 and of DeiT-T.
CASES = [
    _hash(32, 1, 3136, 32, 25, 16, overhead=True),
    _hash(1, 1, 3136, 32, 25, 16, quick=True),
    _hash(32, 2, 784, 32, 25, 16),
    _binary(32, 1, 3136, 32, overhead=True),
    _binary(32, 3, 196, 64, quick=True),
    _attention(32, 1, 3136, 32, 16, softmax=True, lossy=True, overhead=True),
    _attention(1, 1, 3136, 32, 16, softmax=True, quick=True),
    _attention(32, 3, 196, 64, 64),
    _similarity(1, 1, 3136, 16, quick=True, overhead=True),
    _similarity(8, 3, 196, 64),
]
