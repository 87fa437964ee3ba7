# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of the family: which tokens of a cache stay, their copies, their fusion, attention with scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cofire.bench import kv_fusion_attention, kv_fusion_decode, kv_fusion_masked
from cofire.bench.cases import Args, Case, Provider, Random, Run, compiled, plain
from cofire.registry import OPERATORS

# -------------------------------------------------------------------------------------------------- selection


def select_by_sorts(scores: Tensor, heavy: int, merged: int, local: int) -> tuple[Tensor, Tensor, Tensor]:
    """As written: a stable sort defines the order of ties."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    kept, rest = order[..., :heavy].sort(-1).values, order[..., heavy:].sort(-1).values
    best = scores.gather(-1, rest).sort(dim=-1, descending=True, stable=True).indices[..., :merged].sort(-1).values
    return kept.int(), rest.int(), best.int()


def select_by_topk(scores: Tensor, heavy: int, merged: int, local: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where no scores are equal: topk does not say which of those it takes."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(-1, scores.topk(heavy, -1, sorted=False).indices, True)
    kept, rest = _positions(mask, heavy), _positions(~mask, scores.shape[-1] - heavy)
    best = scores.gather(-1, rest).topk(merged, -1, sorted=False).indices.sort(-1).values
    return kept.int(), rest.int(), best.int()


def _positions(mask: Tensor, count: int) -> Tensor:
    return mask.nonzero()[:, -1].view(*mask.shape[:-1], count)


def _select(b: int, h: int, s: int, heavy: int, merged: int, **options: Any) -> Case:
    def args(b: int, h: int, s: int, heavy: int, merged: int) -> Callable[[Random], Args]:
        # (no two are equal)
        return lambda rand: (rand.uniform(b, h, s).argsort(-1).float(), heavy, merged, 0)

    return Case(
        "kv_select",
        f"{b}x{h}, {heavy} and {merged} of {s}",
        torch.float32,
        args(b, h, s, heavy, merged),
        {
            "eager": plain(select_by_sorts),
            "dense": {"sorts": plain(select_by_sorts), "topk": plain(select_by_topk)},
            "compile": compiled(select_by_sorts),
        },
        args(2, 2, 12, 4, 3),
        **options,
    )


# -------------------------------------------------------------------------------------------------- gathering


def gather_by_masks(
    heavy_key: Tensor, heavy_value: Tensor, key: Tensor, value: Tensor, heavy: Tensor, rest: Tensor, padding: int
) -> Tensor:
    """As the paper's code has it: masks of all elements."""
    mask = torch.zeros(key.shape[:3], dtype=torch.bool, device=key.device).scatter_(2, heavy.long(), True)
    every = mask[..., None].expand(key.shape)
    count = heavy.shape[2]
    for new, old in ((heavy_key, key), (heavy_value, value)):
        new[:, :, :count] = old.masked_select(every).view(*old.shape[:2], count, -1)
    shape = (*key.shape[:2], rest.shape[2], key.shape[3])
    parts = [old.masked_select(~every).view(shape) for old in (key, value)]
    return F.pad(torch.cat(parts, -1), (0, 0, padding, padding))


def gather_by_gather(
    heavy_key: Tensor, heavy_value: Tensor, key: Tensor, value: Tensor, heavy: Tensor, rest: Tensor, padding: int
) -> Tensor:
    d, n = key.shape[3], rest.shape[2]
    kept, others = (i.long()[..., None].expand(*i.shape, d) for i in (heavy, rest))
    tokens = key.new_zeros(*key.shape[:2], n + 2 * padding, 2 * d)
    for new, old, part in ((heavy_key, key, slice(0, d)), (heavy_value, value, slice(d, 2 * d))):
        new[:, :, : heavy.shape[2]] = old.gather(2, kept)
        tokens[:, :, padding : padding + n, part] = old.gather(2, others)
    return tokens


def gather_by_rows(
    heavy_key: Tensor, heavy_value: Tensor, key: Tensor, value: Tensor, heavy: Tensor, rest: Tensor, padding: int
) -> Tensor:
    """Rows of one matrix."""
    (b, h, s, d), n, count = key.shape, rest.shape[2], heavy.shape[2]
    first = (torch.arange(b * h, device=key.device) * s).view(b, h, 1)
    kept, others = (heavy + first).flatten(), (rest + first).flatten()
    tokens = key.new_zeros(b, h, n + 2 * padding, 2 * d)
    for new, old, part in ((heavy_key, key, slice(0, d)), (heavy_value, value, slice(d, 2 * d))):
        rows = old.view(-1, d)
        new[:, :, :count] = rows.index_select(0, kept).view(b, h, count, d)
        tokens[:, :, padding : padding + n, part] = rows.index_select(0, others).view(b, h, n, d)
    return tokens


def _gather(b: int, h: int, s: int, d: int, heavy: int, slots: int, padding: int, **options: Any) -> Case:
    dtype = options.pop("dtype", torch.float32)

    def args(b: int, h: int, s: int, d: int, heavy: int, slots: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            order = rand.uniform(b, h, s).argsort(-1)
            index = [i.sort(-1).values.int() for i in (order[..., :heavy], order[..., heavy:])]
            caches = [rand.normal(b, h, n, d).to(dtype) for n in (slots, slots, s, s)]
            return *caches, *index, padding

        return make

    return Case(
        "kv_gather_",
        f"{b}x{h}, {heavy} of {s}x{d}",
        dtype,
        args(b, h, s, d, heavy, slots),
        {
            "eager": plain(gather_by_masks),
            "dense": {
                "gather": plain(gather_by_gather),
                "rows": plain(gather_by_rows),
                "masks": plain(gather_by_masks),
            },
            "compile": compiled(gather_by_gather),
        },
        args(2, 2, 12, 4, 5, 7),
        **options,
    )


# ----------------------------------------------------------------------------------------------------- fusion


def fuse_by_matrices(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
    """As the paper's code has it, of tokens ``[B H, 2 d, n]``: shares, one-hot rows and their mixture as matrices."""
    shares = F.conv1d(x, weight, bias, padding=weight.shape[2] // 2).relu().softmax(-1)
    index = pick.flatten(0, 1).long()[..., None]
    residual = torch.zeros_like(shares).scatter_(-1, index, 1.0)
    return _halves(((1 - gate) * residual + gate * shares) @ x.transpose(1, 2), pick)


def fuse_by_rows(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
    """With the picked tokens as rows."""
    shares = F.conv1d(x, weight, bias, padding=weight.shape[2] // 2).relu().softmax(-1)
    tokens = x.transpose(1, 2)
    index = pick.flatten(0, 1).long()[..., None].expand(-1, -1, tokens.shape[2])
    return _halves(torch.lerp(tokens.gather(1, index), shares @ tokens, gate), pick)


def _halves(fused: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
    key, value = fused.unflatten(0, pick.shape[:2]).chunk(2, -1)
    return key.contiguous(), value.contiguous()


Fuse = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Any]


def _channels_first(tokens: Tensor, weight: Tensor) -> Tensor:
    """``[B H, 2 d, n]``, without the padding."""
    half, n = weight.shape[2] // 2, tokens.shape[2] - weight.shape[2] + 1
    return tokens[:, :, half : half + n].flatten(0, 1).transpose(1, 2).contiguous()


def by_channels(fuse: Fuse, compile: bool = False) -> Provider:
    """Tokens lie as a convolution wants them before time counts."""

    def setup(tokens: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, pick: Tensor) -> Run:
        x = _channels_first(tokens, weight)
        run = torch.compile(fuse, dynamic=False) if compile else fuse
        return lambda: run(x, weight, bias, gate, pick)

    return Provider(setup)


def _fuse_flops(tokens: Tensor, weight: Tensor, *_: Any) -> int:
    """The fewest, those of the mixing among them: s outputs of a convolution of t taps take s + t - 1 products (Winograd
    1980), summed over the channels. By frequencies there are some more, and transforms; in fp32 that is what a CPU does."""
    merged, width, taps = weight.shape
    places = tokens.shape[2] - taps + 1
    return 2 * tokens.shape[0] * tokens.shape[1] * merged * width * (2 * places + taps - 1)


def _fuse_backward_cost(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, pick: Tensor
) -> tuple[int, int]:
    """Of the weight and the gate: a product and a convolution as in forward, of which what is read is read again."""
    args = (tokens, weight, bias, gate, pick)
    return OPERATORS["kv_fuse"].bytes(*args) + weight.numel() * weight.element_size(), _fuse_flops(*args)  # type: ignore[misc]


#: In bfloat16 transforms would lose too much: there a convolution takes all its products, and by frequencies it is one of fp32.
AS_IT_STANDS = ("bfloat16", OPERATORS["kv_fuse"].flops)


def _fuse(b: int, h: int, n: int, d: int, merged: int, taps: int, **options: Any) -> Case:
    dtype = options.pop("dtype", torch.float32)
    if dtype == torch.bfloat16:
        options.update(arithmetic="float32", or_flops=AS_IT_STANDS)

    def args(b: int, h: int, n: int, d: int, merged: int, taps: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            tokens = F.pad(rand.normal(b, h, n, 2 * d), (0, 0, taps // 2, taps // 2))
            weight = rand.normal(merged, 2 * d, taps) / (2 * d * taps) ** 0.5
            # Half of the slots have positive logits only, half none: at zero, where their gradient jumps, rounding decides.
            bias = 8.0 - 16.0 * (torch.arange(merged) % 2)
            pick = rand.uniform(b, h, n).argsort(-1)[..., :merged].sort(-1).values.int()
            floats = (tokens, weight, bias, torch.tensor(0.5))
            return *(x.to(dtype) for x in floats), pick

        return make

    return Case(
        "kv_fuse",
        f"{b}x{h}, {n}x{2 * d} to {merged}, {taps} taps",
        dtype,
        args(b, h, n, d, merged, taps),
        {
            "eager": by_channels(fuse_by_matrices),
            "dense": {"matrices": by_channels(fuse_by_matrices), "rows": by_channels(fuse_by_rows)},
            "compile": by_channels(fuse_by_rows, compile=True),
        },
        args(2, 2, 9, 3, 4, 3),
        gradients=(1, 3),  # the bias's is zero here: a softmax does not see it
        flops=_fuse_flops,
        backward_cost=_fuse_backward_cost,
        **options,
    )


# ------------------------------------------------------------------------------------- all that a reduction does


def _caches(b: int, h: int, s: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and scores, of which no two are equal."""
    rand = Random(f"caches {b}x{h}x{s}x{d}")
    return rand.normal(b, h, s, d), rand.normal(b, h, s, d), rand.uniform(b, h, s).argsort(-1).float()


Select = Callable[[Tensor, int, int, int], tuple[Tensor, Tensor, Tensor]]
Gather = Callable[..., Tensor]


def _reduce(select: Select, gather: Gather, fuse: Fuse) -> Provider:
    """From caches and scores to the slots: as many are kept, and written to their place, as the rest is fused to."""

    def setup(tokens: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, pick: Tensor) -> Run:
        padding, (b, h, half) = weight.shape[2] // 2, pick.shape
        sizes = b, h, tokens.shape[2] - 2 * padding + half, tokens.shape[3] // 2
        key, value, scores = (x.to(tokens.device) for x in _caches(*sizes))
        kept = [key.new_zeros(b, h, 2 * half, sizes[3]) for _ in range(2)]

        def run() -> Any:
            first, rest, best = select(scores, half, half, 0)
            return fuse(gather(*kept, key, value, first, rest, padding), weight, bias, gate, best)

        return run

    return Provider(setup)


def _in_channels(fuse: Fuse) -> Fuse:
    """Tokens are laid out as a convolution wants them."""

    def run(tokens: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, pick: Tensor) -> Any:
        return fuse(_channels_first(tokens, weight), weight, bias, gate, pick)

    return run


def _whole(b: int, h: int, s: int, d: int, half: int, taps: int, **options: Any) -> Case:
    def args(b: int, h: int, s: int, d: int, half: int, taps: int) -> Callable[[Random], Args]:
        def make(rand: Random) -> Args:
            key, value, scores = _caches(b, h, s, d)
            first, rest, best = select_by_sorts(scores, half, half, 0)
            kept = key.new_zeros(b, h, 2 * half, d)
            tokens = gather_by_rows(kept, kept, key, value, first, rest, taps // 2)
            weight = rand.normal(half, 2 * d, taps) / (2 * d * taps) ** 0.5
            return tokens, weight, rand.normal(half), torch.tensor(0.5), best

        return make

    by_matrices, by_rows = _in_channels(fuse_by_matrices), _in_channels(fuse_by_rows)
    return Case(
        "kv_fuse",
        f"selection and copies too, {b}x{h}, {s}x{d} to {2 * half}, {taps} taps",
        torch.float32,
        args(b, h, s, d, half, taps),
        {
            "eager": _reduce(select_by_sorts, gather_by_masks, by_matrices),
            "dense": {
                "topk": _reduce(select_by_topk, gather_by_rows, by_rows),
                "sorts": _reduce(select_by_sorts, gather_by_rows, by_rows),
            },
        },
        args(2, 2, 9, 4, 3, 3),
        flops=_fuse_flops,
        ours=_reduce(*(OPERATORS[name] for name in ("kv_select", "kv_gather_", "kv_fuse"))),
        **options,
    )


#: A layer of Llama-2-7B with 512 slots, of which its tokens are fused into half or into all, and one of a small language model
#: with 64.
CASES = [
    _select(1, 32, 1024, 256, 256),
    _select(8, 4, 192, 32, 32, quick=True, overhead=True),
    _gather(1, 32, 1024, 128, 256, 512, 10),
    _gather(1, 32, 1024, 128, 256, 512, 10, dtype=torch.bfloat16),
    _gather(8, 4, 192, 32, 32, 64, 4, quick=True, overhead=True),
    _fuse(1, 32, 768, 128, 256, 21),
    _fuse(1, 32, 768, 128, 256, 21, dtype=torch.bfloat16),
    _fuse(1, 32, 1024, 128, 512, 21),
    _fuse(1, 32, 1024, 128, 512, 21, dtype=torch.bfloat16),
    _fuse(8, 4, 160, 32, 32, 9, quick=True, overhead=True),
    _whole(8, 4, 192, 32, 32, 9),
    _whole(1, 32, 1024, 128, 256, 21),
    *kv_fusion_attention.CASES,
    *kv_fusion_decode.CASES,
    *kv_fusion_masked.CASES,
]
