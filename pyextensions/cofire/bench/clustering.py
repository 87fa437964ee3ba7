# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of differentiable k-means, on weights of the shapes that linear layers have.

Weights are normal with standard deviation 0.02; centroids start at quantiles; the temperature is 0.1 of the squared mean
gap. ``eager`` is DKM as it is written from the paper: a map ``[N, K]`` at every step, kept by autograd. Where its maps
would have more than :data:`MAP_ENTRIES` entries there is no eager row. ``dense`` is the strongest plain torch: 16-bit
weights counted with ``bincount`` or ``unique``, others in chunks that stay in the cache, gradients by hand. The implicit
gradient has no eager row: nobody writes it with maps.

Peers compute something else where they have to, and are checked against their own maths in plain torch: coremltools
expands the squared distance (its rounding is that of ``torch.cdist``), and Lloyd's iterations (faiss, scikit-learn,
coremltools) end in a local optimum where :func:`cofire.ops.kmeans1d` finds the global one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cofire.bench.cases import Args, Case, Provider, Random, compiled, plain
from cofire.bench.peers._kmeans import EPS, quantiles
from cofire.ops import clustering as ops
from cofire.ops.clustering import BINS, HALVES, Rules, bin_values, temperature

FLOAT, HALF = torch.float32, torch.bfloat16
SIGMA, RHO = 0.02, 0.1
#: The most entries, of the maps of all iterations, with which eager runs: it keeps four maps for each of them, in fp32
#: for some, and has others on the way. Four times as many would need tens of GB, and a minute for each call.
MAP_ENTRIES = 1 << 28

Providers = dict[str, Provider | Mapping[str, Provider]]


def weights(rand: Random, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return (rand.normal(*shape) * SIGMA).to(dtype)


# --------------------------------------------------------------------------------------- dkm: its answer, in less memory


class _Counted(torch.autograd.Function):
    """The operator's reference over counted values: what is exact for scalars of which many are equal."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, centroids: Tensor, tau: Tensor, *options: Any) -> tuple[Tensor, ...]:
        size, iterations, *rules, forward, grad = options
        assert forward == "soft"
        outputs, paths, states, ctx.parts = [], [], [], []
        for part, c, t in zip(weight.detach().reshape(-1).split(size), centroids, tau):
            x, place, n = part.unique(return_inverse=True, return_counts=True)
            x, n = x.to(c.dtype)[:, None], n.to(c.dtype)
            # of bfloat16, also where the weight comes widened
            found = ops._cluster(x, n, c, t, iterations, Rules(*rules), grad, ops._resolution(HALF))
            outputs.append(found[0][place, 0])
            paths.append(found[1].double())
            states.append(found[2])
            ctx.parts.append((x, n, place, found[1].to(c.dtype), t, found[2]))
        ctx.size, ctx.rules, ctx.grad = size, Rules(*rules), grad
        output = torch.cat(outputs).view(weight.shape).to(weight.dtype)
        path, status = torch.stack(paths, 1), torch.tensor(states, dtype=torch.int32, device=weight.device)
        ctx.mark_non_differentiable(path, status)
        return output, path, status

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        parts = []
        for g, (x, n, place, path, t, status) in zip(grads[0].reshape(-1).split(ctx.size), ctx.parts):
            wide = g.to(x.dtype)
            total = torch.zeros_like(x).index_add(0, place, wide[:, None])
            slope, offset, _ = ops._cluster_backward(None, total, x, n, path, t, ctx.rules, ctx.grad, status)
            parts.append((wide * slope[place, 0] + offset[place, 0]).to(grads[0].dtype))
        return torch.cat(parts).view(grads[0].shape), *[None] * 10


def counted_reference(*args: Any) -> tuple[Tensor, ...]:
    """:func:`cofire.ops.dkm`'s reference, by its own formulas, on the distinct values instead of the weights."""
    found: tuple[Tensor, ...] = _Counted.apply(*args)  # type: ignore[no-untyped-call]
    return found


def streamed_reference(
    weight: Tensor, centroids: Tensor, tau: Tensor, group_size: int, iterations: int, eps: float, enforce_zero: bool,
    prune_threshold: float, keep_sparsity: bool, forward: str, grad: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`cofire.ops.dkm`'s reference a chunk at a time; maps are computed again for backward."""
    rules = Rules(eps, enforce_zero, prune_threshold, keep_sparsity)
    outputs, paths = [], []

    def attention(x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return ops._softmax(x, c, t, rules).clamp(min=eps)

    def sums(x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return attention(x, c, t).T @ torch.cat((x, torch.ones_like(x[:, :1])), 1)

    def draw(x: Tensor, c: Tensor, new: Tensor, t: Tensor) -> Tensor:
        return attention(x, c, t) @ new

    def again(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*args)
        result: Tensor = checkpoint(function, *args, use_reentrant=False)
        return result

    for part, c, t in zip(weight.reshape(-1).split(group_size), centroids, tau):
        chunks = part.to(c.dtype).view(-1, c.shape[1]).split(1 << 15)
        path = [c]
        for _ in range(iterations):
            total = functools.reduce(torch.add, (again(sums, x, path[-1], t) for x in chunks))
            path.append(total[:, :-1] / total[:, -1:])
        outputs += [again(draw, x, path[-2], path[-1], t).reshape(-1) for x in chunks]
        paths.append(torch.stack(path).detach().double())
    output = torch.cat(outputs).view(weight.shape).to(weight.dtype)
    return output, torch.stack(paths, 1), torch.zeros(len(paths), dtype=torch.int32, device=weight.device)


# --------------------------------------------------------------------------------------------- dkm: as people write it


def eager_dkm(
    weight: Tensor, centroids: Tensor, tau: Tensor, group_size: int, iterations: int, eps: float, *options: Any
) -> Tensor:
    """DKM in the weight's dtype: at each iteration distances, attention and new centroids, all kept by autograd."""
    partitions, _, d = centroids.shape
    x, c = weight.view(partitions, -1, d), centroids.to(weight.dtype)
    heat = tau.to(weight.dtype)[:, None, None]
    for _ in range(iterations):
        distance = (x - c.mT).square() if d == 1 else (x[:, :, None] - c[:, None]).square().sum(3)
        attention = torch.softmax(-distance / heat, 2).clamp(min=eps)
        c = (attention.mT @ x) / attention.sum(1)[:, :, None]
    return (attention @ c).view(weight.shape)


def eager_dkm_fp32(weight: Tensor, *args: Any) -> Tensor:
    return eager_dkm(weight.float(), *args).to(weight.dtype)


# -------------------------------------------------------------------------------------- dkm: the strongest plain torch
#
# Maps are [K, n] here, vectors [d, n]: torch's elementwise operators, sums over K included, run along the vectors.

Chunk = tuple[Tensor, Tensor | None]  #: vectors, and how often each occurs (None: once)


def _soft(x: Tensor, c: Tensor, heat: float) -> Tensor:
    score = (x[:1] - c[:, :1]).square_()
    for i in range(1, len(x)):
        score += (x[i : i + 1] - c[:, i : i + 1]).square_()
    score.mul_(-1 / heat)
    score -= score.amax(0)
    score.clamp_(min=-30)  # far below EPS; what is smaller would be denormal, and slow
    return score.exp_().mul_(score.sum(0).reciprocal_())


def _pull(d_attention: Tensor, soft: Tensor, x: Tensor, c: Tensor, n: Tensor | None, heat: float) -> tuple[Tensor, ...]:
    """Gradients of each vector and, summed, of the centroids, from that of the attention; overwrites it."""
    d_attention.mul_(soft > EPS)
    d_attention -= (soft * d_attention).sum(0)
    d_score = d_attention.mul_(soft)
    total = d_score.sum(1, keepdim=True) if n is None else d_score @ n.T
    d_c = d_score @ (x if n is None else x * n).T
    return (c.T @ d_score).mul_(2 / heat), d_c.sub_(total * c).mul_(2 / heat)


def _centroids(chunks: list[Chunk], c: Tensor, heat: float, iterations: int) -> tuple[list[Tensor], list[Tensor]]:
    """The centroids on the way and how many weights each had."""
    path, shares = [c], []
    for _ in range(iterations):
        share, moment = torch.zeros_like(c[:, :1]), torch.zeros_like(c)
        for x, n in chunks:
            attention = _soft(x, path[-1], heat).clamp_(min=EPS)
            share += attention.sum(1, keepdim=True) if n is None else attention @ n.T
            moment += attention @ (x if n is None else x * n).T
        path.append(moment / share)
        shares.append(share)
    return path, shares


def _gradients(
    chunks: list[Chunk], gradients: list[Tensor], path: list[Tensor], shares: list[Tensor], heat: float, unit: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """What each vector gets directly (with ``unit``: of a gradient of one), and through the centroids."""
    before, after = path[-2], path[-1]
    local, shared = [], []
    to_after, to_before = torch.zeros_like(after), torch.zeros_like(after)
    for (x, _), g in zip(chunks, gradients):
        soft = _soft(x, before, heat)
        d_x, d_c = _pull(after @ g, soft, x, before, None, heat)
        if unit:
            d_x = _pull(after.expand(-1, x.shape[1]).clone(), soft, x, before, None, heat)[0]
        local.append(d_x)
        to_before += d_c
        to_after += soft.clamp_(min=EPS) @ g.T
    for t in range(len(path) - 1, 0, -1):
        share = to_after / shares[t - 1]
        base = (path[t] * share).sum(1, keepdim=True)
        to_after = to_before if t == len(path) - 1 else torch.zeros_like(to_before)
        for i, (x, n) in enumerate(chunks):
            soft = _soft(x, path[t - 1], heat)
            d_x, d_c = _pull(torch.addmm(base, share, x, beta=-1), soft, x, path[t - 1], n, heat)
            d_x.addmm_(share.T, soft.clamp_(min=EPS))
            if t == len(path) - 1:
                shared.append(d_x)
            else:
                shared[i] += d_x
            to_after += d_c
    return local, shared


class _Tables(torch.autograd.Function):
    """DKM of 16-bit scalars on their distinct values, gathered and scattered by bit pattern or by sorting."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, centroids: Tensor, tau: Tensor, size: int, iterations: int, sort: bool
    ) -> Tensor:
        output, ctx.parts = torch.empty_like(weight), []
        flat = weight.reshape(-1).split(size)
        for part, result, c, heat in zip(flat, output.view(-1).split(size), centroids, tau.tolist()):
            if sort:
                values, place, counts = part.unique(return_inverse=True, return_counts=True)
                there = slice(None)
            else:
                place = part.view(torch.uint16).int()
                counts = place.bincount(minlength=BINS)
                there = counts.nonzero()[:, 0]
                values, counts = there.to(torch.uint16).view(part.dtype), counts[there]
            x, n = values.float()[None], counts.float()[None]
            path, shares = _centroids([(x, n)], c, heat, iterations)
            drawn = (path[-1].T @ _soft(x, path[-2], heat).clamp_(min=EPS)).to(part.dtype)[0]
            table = drawn if sort else part.new_empty(BINS).index_put_((there,), drawn)
            torch.index_select(table, 0, place, out=result)
            ctx.parts.append((x, n, there, place, path, shares, heat))
        ctx.size, ctx.sort = size, sort
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        parts = []
        for g, (x, n, there, place, path, shares, heat) in zip(grad.reshape(-1).split(ctx.size), ctx.parts):
            wide = g.float()
            total = torch.bincount(place, wide, x.shape[1] if ctx.sort else BINS)[None, there]
            (local,), (shared,) = _gradients([(x, n)], [total], path, shares, heat, unit=True)
            tables = torch.cat((local, shared))
            if not ctx.sort:
                tables = wide.new_empty(2, BINS).index_copy_(1, there, tables)
            slope, offset = (table.index_select(0, place) for table in tables)
            parts.append(offset.addcmul_(slope, wide).to(g.dtype))
        return torch.cat(parts).view(grad.shape), *[None] * 5


class _Chunks(torch.autograd.Function):
    """DKM of anything, a chunk of vectors at a time; backward computes the maps again."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, centroids: Tensor, tau: Tensor, size: int, iterations: int, chunk: int
    ) -> Tensor:
        ctx.parts, parts = [], []
        for part, c, heat in zip(weight.reshape(-1).split(size), centroids, tau.tolist()):
            vectors = part.float().view(-1, c.shape[1]).T.contiguous()
            chunks: list[Chunk] = [(x, None) for x in vectors.split(chunk, 1)]
            path, shares = _centroids(chunks, c, heat, iterations)
            parts += [(path[-1].T @ _soft(x, path[-2], heat).clamp_(min=EPS)).T.reshape(-1) for x, _ in chunks]
            ctx.parts.append((chunks, path, shares, heat))
        ctx.size, ctx.chunk = size, chunk
        return torch.cat(parts).to(weight.dtype).view(weight.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        found = []
        for g, (chunks, path, shares, heat) in zip(grad.reshape(-1).split(ctx.size), ctx.parts):
            pieces = g.float().view(-1, path[0].shape[1]).T.contiguous().split(ctx.chunk, 1)
            local, shared = _gradients(chunks, list(pieces), path, shares, heat, unit=False)
            found += [a.add_(b).T.reshape(-1) for a, b in zip(local, shared)]
        return torch.cat(found).to(grad.dtype).view(grad.shape), *[None] * 5


def dense_tables(
    weight: Tensor, centroids: Tensor, tau: Tensor, size: int, iterations: int, *_: Any, sort: bool = False
) -> Tensor:
    """16-bit weights, counted."""
    output: Tensor = _Tables.apply(weight, centroids, tau, size, iterations, sort)  # type: ignore[no-untyped-call]
    return output


def dense_chunks(
    weight: Tensor, centroids: Tensor, tau: Tensor, size: int, iterations: int, *_: Any, chunk: int = 1 << 13
) -> Tensor:
    """Any weights, in chunks whose maps stay in the cache."""
    output: Tensor = _Chunks.apply(weight, centroids, tau, size, iterations, chunk)  # type: ignore[no-untyped-call]
    return output


# -------------------------------------------------------------------------------------------------------- dkm: cases


def _dkm_args(
    rand: Random, shape: tuple[int, int], dtype: torch.dtype, clusters: int, d: int, rows: int | None, iterations: int,
    grad: str,
) -> Args:  # fmt: skip
    weight = weights(rand, shape, dtype)
    size = weight.numel() if rows is None else rows * shape[1]
    partitions = math.ceil(weight.numel() / size)
    if d == 1:
        centroids = quantiles(weight, clusters, partitions)
    else:  # random vectors of the weight itself
        vectors = weight.float().view(partitions, -1, d)
        centroids = vectors[:, torch.randperm(vectors.shape[1], generator=rand.generator)[:clusters]].contiguous()
    rules = (EPS, False, 0.0, False)
    return (weight, centroids, temperature(centroids, RHO), size, iterations, *rules, "soft", grad)


def _dkm_flops(weight: Tensor, centroids: Tensor, *args: Any) -> int:
    """Of the values that there are: the operator's formula takes all that there may be."""
    partitions, clusters, d = centroids.shape
    values = weight.numel() // d
    if weight.dtype in HALVES and d == 1:
        values = sum(part.unique().numel() for part in weight.view(partitions, -1))
    return (6 + 3 * d) * values * clusters * (int(args[2]) + 1)


def _dkm_backward_cost(weight: Tensor, *args: Any) -> tuple[int, int]:
    """Read the weight and the gradient, write the gradient; twice the arithmetic."""
    return 3 * weight.numel() * weight.element_size(), 2 * _dkm_flops(weight, *args)


def _dkm(
    shape: tuple[int, int],
    clusters: int = 16,
    dtype: torch.dtype = HALF,
    *,
    d: int = 1,
    iterations: int = 3,
    rows: int | None = None,
    grad: str = "unroll",
    compile: bool = False,
    **options: Any,
) -> Case:
    counted = dtype in HALVES and d == 1
    entries = shape[0] * shape[1] // d * clusters * iterations
    providers: Providers = {}
    if grad != "unroll":
        providers["dense"] = plain(counted_reference)
    else:
        dense = {"chunks": plain(dense_chunks, outputs=1)}
        if not counted:  # fewer steps for several threads, more memory
            dense["large chunks"] = plain(functools.partial(dense_chunks, chunk=1 << 16), outputs=1)
        if counted:
            by_sort = functools.partial(dense_tables, sort=True)
            dense |= {"counts": plain(dense_tables, outputs=1), "sort": plain(by_sort, outputs=1)}
        providers["dense"] = dense
        if entries <= MAP_ENTRIES:
            eager = {"": plain(eager_dkm, outputs=1)}
            if dtype != FLOAT:
                eager = {"own dtype": eager[""], "fp32": plain(eager_dkm_fp32, outputs=1)}
            providers["eager"] = eager
        if compile:
            providers["compile"] = compiled(eager_dkm_fp32, outputs=1)
    words = [f"{shape[0]}x{shape[1]} K{clusters}", f"T{iterations}" if grad == "unroll" else grad]
    words += [f"d{d}"] if d > 1 else []
    words += [f"{rows}-row palettes"] if rows is not None else []

    def args(rand: Random, shape: tuple[int, int], clusters: int, rows: int | None) -> Args:
        return _dkm_args(rand, shape, dtype, clusters, d, rows, iterations, grad)

    # the implicit gradient divides by what 512 weights may leave next to nothing of
    small = (32, 64) if grad == "implicit" else (16, 32)
    return Case(
        "dkm",
        " ".join(words),
        dtype,
        lambda rand: args(rand, shape, clusters, rows),
        providers,
        lambda rand: args(rand, small, min(clusters, 8), None if rows is None else 8),
        gradients=(0,),
        flops=_dkm_flops,
        backward_cost=_dkm_backward_cost,
        reference=counted_reference if counted else streamed_reference,
        facts={
            "clusters": clusters,
            "d": d,
            "palette_rows": rows,
            "iterations": iterations,
            "grad": grad,
            "entries": entries,
        },
        **options,
    )


SMALL, SQUARE, WIDE, LARGE = (512, 512), (1024, 1024), (4096, 1024), (4096, 4096)

DKM = [
    _dkm(SQUARE, overhead=True, compile=True),
    _dkm(SQUARE, dtype=FLOAT, compile=True),
    _dkm(SMALL),
    _dkm(SMALL, dtype=FLOAT, quick=True),
    _dkm(WIDE),
    _dkm(WIDE, dtype=FLOAT),
    _dkm(LARGE, 2, iterations=1),
    _dkm(LARGE, 8),
    _dkm(LARGE, 16),
    _dkm(SQUARE, 2),
    _dkm(SQUARE, 4, FLOAT),
    _dkm(SQUARE, 256),
    _dkm(SMALL, 256, FLOAT),
    _dkm(SQUARE, iterations=1),
    _dkm(SQUARE, iterations=10),
    _dkm(SQUARE, dtype=FLOAT, d=2),
    _dkm(SQUARE, d=2),
    _dkm(SQUARE, rows=16),
    _dkm(SQUARE, dtype=FLOAT, rows=16),
    _dkm(LARGE, rows=16),
    _dkm(SQUARE, grad="implicit"),
    _dkm(LARGE, 8, grad="implicit"),
]

# -------------------------------------------------------------------------------------------------------- dkm_tables


def _tables_args(rand: Random, shape: tuple[int, int], clusters: int, rows: int | None, grad: str) -> Args:
    weight, centroids, tau, size, iterations, *rules, _, _ = _dkm_args(
        rand, shape, HALF, clusters, 1, rows, 3, grad
    )  # fmt: skip
    counts = torch.stack([ops._histogram16_reference(part) for part in weight.view(-1).split(size)])
    return bin_values(HALF), counts, centroids[:, :, 0], tau, iterations, *rules, grad, torch.finfo(HALF).eps / 2


def _eager_tables(
    values: Tensor, counts: Tensor, centroids: Tensor, tau: Tensor, iterations: int, eps: float, *options: Any
) -> Tensor:
    """Over all values of the type; those that are not there count as zeros."""
    tables = []
    for n, c, heat in zip(counts.to(values.dtype), centroids, tau):
        x = torch.where(n > 0, values, 0)[:, None]
        for _ in range(iterations):
            attention = torch.softmax(-(x - c).square() / heat, 1).clamp(min=eps)
            c = (attention.T @ (n * x[:, 0])) / (attention.T @ n)
        tables.append(torch.where(n > 0, attention @ c, 0))
    return torch.stack(tables)


def _compact_tables(
    values: Tensor, counts: Tensor, centroids: Tensor, tau: Tensor, iterations: int, eps: float, *options: Any
) -> Tensor:
    """Over the values that are there."""
    tables = []
    for row, c, heat in zip(counts, centroids, tau):
        there = row.nonzero()[:, 0]
        x, n = values[there, None], row[there].to(values.dtype)
        moment = n * x[:, 0]
        for _ in range(iterations):
            attention = (x - c).square().div_(-heat).softmax(1).clamp(min=eps)
            c = (attention.T @ moment) / (attention.T @ n)
        tables.append(torch.zeros_like(values).index_put((there,), attention @ c))
    return torch.stack(tables)


def _tables(
    shape: tuple[int, int], clusters: int = 16, *, rows: int | None = None, grad: str = "unroll", **options: Any
) -> Case:
    providers: Providers = {}
    if grad == "unroll":
        providers["eager"] = plain(_eager_tables, outputs=1)
        providers["dense"] = {
            "values that are there": plain(_compact_tables, outputs=1),
            "all values": plain(_eager_tables, outputs=1),
        }
    else:
        providers["dense"] = plain(ops._dkm_tables_reference)
    words = [f"counts of {shape[0]}x{shape[1]} K{clusters}", "T3" if grad == "unroll" else grad]
    words += [f"{rows}-row palettes"] if rows is not None else []
    return Case(
        "dkm_tables",
        " ".join(words),
        FLOAT,
        lambda rand: _tables_args(rand, shape, clusters, rows, grad),
        providers,
        lambda rand: _tables_args(rand, (16, 32), min(clusters, 8), None if rows is None else 8, grad),
        gradients=(0, 2) if grad == "unroll" else (),
        flops=_tables_flops,
        **options,
    )


def _tables_flops(values: Tensor, counts: Tensor, centroids: Tensor, tau: Tensor, iterations: int, *_: Any) -> int:
    return 9 * int((counts > 0).sum()) * centroids.shape[1] * (iterations + 1)


TABLES = [
    _tables(SQUARE, quick=True, overhead=True),
    _tables(LARGE, 256),
    _tables(SQUARE, rows=16),
    _tables(SQUARE, grad="implicit"),
]

# ------------------------------------------------------------------------------- histogram16, scatter16, lut_apply16


@functools.cache
def _by_value(device: str = "cpu") -> Tensor:
    """The bit pattern of each bin: puts what is ordered by pattern into the order of values."""
    pattern = torch.arange(BINS, dtype=torch.int32)
    return torch.where(pattern < BINS // 2, pattern ^ 0xFFFF, pattern ^ 0x8000).to(device)


@functools.cache
def _by_pattern(device: str = "cpu") -> Tensor:
    """The bin of each bit pattern."""
    return _by_value().argsort().to(device)


def _patterns(input: Tensor) -> Tensor:
    return input.reshape(-1).view(torch.uint16).int()


def _sorted(by_pattern: Tensor) -> Tensor:
    return by_pattern[_by_value(str(by_pattern.device))]


def _eager_histogram(input: Tensor) -> Tensor:
    return torch.bincount(ops.bins_of(input).flatten(), minlength=BINS).int()


def _bincount_histogram(input: Tensor) -> Tensor:
    return _sorted(torch.bincount(_patterns(input), minlength=BINS).int())


def _histc_histogram(input: Tensor) -> Tensor:
    """Patterns are exact in fp32; the bins of ``histc`` are one pattern each."""
    return _sorted(torch.histc(_patterns(input).float(), BINS, 0, BINS).int())


def _unique_histogram(input: Tensor) -> Tensor:
    values, counts = _patterns(input).unique(return_counts=True)
    return _sorted(counts.new_zeros(BINS).index_put_((values,), counts).int())


def _numpy_histogram(input: Tensor) -> Tensor:
    import numpy

    return _sorted(torch.from_numpy(numpy.bincount(input.reshape(-1).view(torch.uint16).numpy(), minlength=BINS)).int())


def _histogram(shape: tuple[int, int], dtype: torch.dtype = HALF, **options: Any) -> Case:
    return Case(
        "histogram16",
        f"{shape[0]}x{shape[1]}",
        dtype,
        lambda rand: (weights(rand, shape, dtype),),
        {
            "dense": {
                "bincount": plain(_bincount_histogram),
                "histc": plain(_histc_histogram),
                "unique": plain(_unique_histogram),
            },
            "eager": plain(_eager_histogram),
            "peer:numpy": plain(_numpy_histogram, devices=("cpu",)),
        },
        lambda rand: (weights(rand, (16, 32), dtype),),
        bits=(0,),
        **options,
    )


def _eager_scatter(input: Tensor, source: Tensor) -> Tensor:
    total = torch.promote_types(source.dtype, FLOAT)
    zeros = torch.zeros(BINS, dtype=total, device=source.device)
    return zeros.index_add(0, ops.bins_of(input).flatten(), source.flatten().to(total))


def _index_add_scatter(input: Tensor, source: Tensor) -> Tensor:
    wide = source.reshape(-1).to(torch.promote_types(source.dtype, FLOAT))
    return _sorted(wide.new_zeros(BINS).index_add_(0, _patterns(input), wide))


def _bincount_scatter(input: Tensor, source: Tensor) -> Tensor:
    wide = source.reshape(-1).to(torch.promote_types(source.dtype, FLOAT))
    return _sorted(torch.bincount(_patterns(input), wide, BINS))


def _numpy_scatter(input: Tensor, source: Tensor) -> Tensor:
    import numpy

    patterns, wide = input.reshape(-1).view(torch.uint16).numpy(), source.reshape(-1).float().numpy()
    return _sorted(torch.from_numpy(numpy.bincount(patterns, wide, BINS))).float()


def _scatter(shape: tuple[int, int], dtype: torch.dtype = HALF, **options: Any) -> Case:
    def args(rand: Random, shape: tuple[int, int]) -> Args:
        return weights(rand, shape, HALF), rand.normal(*shape).to(dtype)

    return Case(
        "scatter16",
        f"{shape[0]}x{shape[1]} of {str(dtype).removeprefix('torch.')}",
        HALF,
        lambda rand: args(rand, shape),
        {
            "dense": {"bincount": plain(_bincount_scatter), "index_add": plain(_index_add_scatter)},
            "eager": plain(_eager_scatter),
            "peer:numpy": plain(_numpy_scatter, devices=("cpu",)),
        },
        lambda rand: args(rand, (16, 32)),
        bits=(0,),
        **options,
    )


def _eager_lut(input: Tensor, table: Tensor, source: Tensor | None, slope: Tensor | None) -> Tensor:
    bins = ops.bins_of(input)
    if source is None or slope is None:
        return table[bins].to(input.dtype)
    return (table[bins] + slope[bins] * source).to(source.dtype)


def _lut(take: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """By bit pattern: tables of 65,536 entries are put into its order first, not the weights into theirs."""

    def run(input: Tensor, table: Tensor, source: Tensor | None, slope: Tensor | None) -> Tensor:
        order, patterns = _by_pattern(str(input.device)), _patterns(input)
        if source is None or slope is None:
            return take(table[order].to(input.dtype), patterns).view(input.shape)
        found, factor = take(table[order], patterns), take(slope[order], patterns)
        return found.addcmul_(factor, source.reshape(-1).to(found.dtype)).to(source.dtype).view(source.shape)

    return run


def _lut_args(rand: Random, shape: tuple[int, int], affine: bool) -> Args:
    table = bin_values(HALF).nan_to_num(0, 0, 0).clamp(-1, 1).square()
    if not affine:
        return weights(rand, shape, HALF), table, None, None
    return weights(rand, shape, HALF), table, rand.normal(*shape).to(HALF), table.neg().exp()


def _lut_case(shape: tuple[int, int], affine: bool, **options: Any) -> Case:
    by_long = _lut(lambda table, index: table.take(index.long()))
    return Case(
        "lut_apply16",
        f"{shape[0]}x{shape[1]}{' with source' if affine else ''}",
        HALF,
        lambda rand: _lut_args(rand, shape, affine),
        {
            "dense": {
                "index_select": plain(_lut(lambda table, index: table.index_select(0, index))),
                "take": plain(by_long),
            },
            "eager": plain(_eager_lut),
        },
        lambda rand: _lut_args(rand, (16, 32), affine),
        bits=(0,),
        **options,
    )


VALUES = [
    _histogram(LARGE, overhead=True),
    _histogram(SQUARE, quick=True),
    _histogram(LARGE, torch.float16),
    _scatter(LARGE, overhead=True),
    _scatter(SQUARE, FLOAT, quick=True),
    _lut_case(LARGE, False, overhead=True),
    _lut_case(LARGE, True),
    _lut_case(SQUARE, True, quick=True),
]

# ---------------------------------------------------------------------------------------------------------- palettize


def _eager_palettize(weight: Tensor, centroids: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    partitions, _, d = centroids.shape
    x = weight.view(partitions, -1, d).to(centroids.dtype)
    distance = (x - centroids.mT).square() if d == 1 else (x[:, :, None] - centroids[:, None]).square().sum(3)
    nearest, labels = distance.min(2)
    return labels.to(torch.uint8).view(weight.shape if d == 1 else -1), nearest.sum(1)


def _thresholds(centroids: Tensor) -> Tensor:
    """Between ascending centroids the largest numbers of their dtype that are not nearer to the upper one."""
    middle = (centroids[:, 1:, 0].double() + centroids[:, :-1, 0].double()) / 2
    near = middle.to(centroids.dtype)
    return torch.where(near.double() > middle, near.nextafter(near.new_tensor(-math.inf)), near)


def _search_palettize(weight: Tensor, centroids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Scalars, by binary search between the midpoints; the same answer to the last tie."""
    x = weight.view(len(centroids), -1).to(centroids.dtype)
    labels = torch.searchsorted(_thresholds(centroids), x, out_int32=True)
    inertia = (x - centroids[:, :, 0].gather(1, labels.long())).square_().sum(1)
    return labels.to(torch.uint8).view(weight.shape), inertia


def _table_palettize(weight: Tensor, centroids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """16-bit scalars: the label of each of the 65,536 patterns, looked up; the inertia from the counts."""
    every = _patterns_of(weight.dtype, str(weight.device)).to(centroids.dtype).nan_to_num(0, 0, 0).clamp(-1e9, 1e9)
    labels, inertia = [], []
    for part, c, threshold in zip(weight.view(len(centroids), -1), centroids[:, :, 0], _thresholds(centroids)):
        table, patterns = torch.bucketize(every, threshold), _patterns(part)
        there = torch.bincount(patterns, minlength=BINS)
        distance = (every - c[table]).square_()
        inertia.append((distance * there).sum())
        labels.append(table.to(torch.uint8).index_select(0, patterns))
    return torch.cat(labels).view(weight.shape), torch.stack(inertia)


@functools.cache
def _patterns_of(dtype: torch.dtype, device: str) -> Tensor:
    return torch.arange(BINS, dtype=torch.int32).to(torch.uint16).view(dtype).float().to(device)


def _palettize_args(
    rand: Random, shape: tuple[int, int], clusters: int, dtype: torch.dtype, d: int, rows: int | None
) -> Args:
    weight, centroids, _, size, *_ = _dkm_args(rand, shape, dtype, clusters, d, rows, 3, "unroll")
    return weight, centroids, size, 0.0, False


def _palettize(
    shape: tuple[int, int],
    clusters: int = 16,
    dtype: torch.dtype = HALF,
    *,
    d: int = 1,
    rows: int | None = None,
    **options: Any,
) -> Case:
    dense = {"map": plain(_eager_palettize)}
    if d == 1:
        dense["search"] = plain(_search_palettize)
    if d == 1 and dtype in HALVES:
        dense["table"] = plain(_table_palettize)
    providers: Providers = {"dense": dense}
    if shape[0] * shape[1] // d * clusters <= MAP_ENTRIES // 2:
        providers["eager"] = plain(_eager_palettize)
    else:
        del dense["map"]
    words = [f"{shape[0]}x{shape[1]} K{clusters}", *([f"d{d}"] if d > 1 else [])]
    words += [f"{rows}-row palettes"] if rows is not None else []

    def args(rand: Random, shape: tuple[int, int], clusters: int, rows: int | None) -> Args:
        return _palettize_args(rand, shape, clusters, dtype, d, rows)

    return Case(
        "palettize",
        " ".join(words),
        dtype,
        lambda rand: args(rand, shape, clusters, rows),
        providers,
        lambda rand: args(rand, (16, 32), min(clusters, 8), None if rows is None else 8),
        facts={"clusters": clusters, "d": d, "palette_rows": rows},
        **options,
    )


PALETTIZE = [
    _palettize(SQUARE, quick=True, overhead=True),
    _palettize(SQUARE, dtype=FLOAT),
    _palettize(LARGE),
    _palettize(SQUARE, 256, FLOAT),
    _palettize(SQUARE, dtype=FLOAT, d=2),
    _palettize(SQUARE, rows=16),
]

# ----------------------------------------------------------------------------------------------------------- kmeans1d


def _cells(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and sum of squares of the weights that share their leading sixteen bits, ascending; by counting."""
    if part.dtype in HALVES or part.numel() > ops.EXACT_WEIGHTS:
        top = part if part.dtype in HALVES else part.float().view(torch.int32).bitwise_right_shift(16).to(torch.int16)
        place, wide = top.view(torch.uint16).int(), part.double()
        found = [torch.bincount(place, minlength=BINS).double()]
        found += [torch.bincount(place, moment, BINS) for moment in (wide, wide.square())]
        count, *moments = (_sorted(m) for m in found)
        there = count > 0
        return count[there], moments[0][there], moments[1][there]
    values, counts = part.double().unique(return_counts=True)
    return counts.double(), values * counts, values.square() * counts


def _divide_and_conquer(part: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """The best last boundary grows with the end: all ends at one distance are searched at once between their neighbours."""
    middle = part.double().mean()
    n, s, q = _cells(part)
    q = q - 2 * middle * s + n * middle.square()
    s = s - n * middle
    count, total, square = (torch.cat((m.new_zeros(1), m.cumsum(0))) for m in (n, s, q))
    cells = len(n)
    if cells <= clusters:
        means = s / n + middle
        return torch.cat((means, means[-1:].expand(clusters - cells))), (q - s.square() / n).clamp(min=0).sum()
    best = square.new_full((cells + 1,), math.inf)
    best[0] = 0
    choices = []
    for _ in range(clusters):
        chosen, found = torch.zeros(cells + 1, dtype=torch.int64), square.new_full((cells + 1,), math.inf)
        stride = 1 << (cells.bit_length() - 1)
        while stride:
            ends = torch.arange(stride, cells + 1, 2 * stride)
            low, high = chosen[ends - stride], ends - 1
            inside = ends + stride <= cells
            high[inside] = torch.minimum(high[inside], chosen[ends[inside] + stride])
            width = high - low + 1
            row = torch.arange(len(ends)).repeat_interleave(width)
            start = low[row] + torch.arange(len(row)) - (width.cumsum(0) - width)[row]
            end = ends[row]
            parts = total[end] - total[start]
            cost = square[end] - square[start] - parts.square() / (count[end] - count[start])
            cost = best[start] + cost.clamp_(min=0)
            least = cost.new_empty(len(ends)).scatter_reduce(0, row, cost, "amin", include_self=False)
            tied = torch.where(cost == least[row], start, cells)
            chosen[ends] = torch.full_like(ends, cells).scatter_reduce(0, row, tied, "amin")
            found[ends] = least
            stride //= 2
        best = found
        choices.append(chosen)
    edges = [cells]
    for chosen in reversed(choices):
        edges.append(int(chosen[edges[-1]]))
    edge = torch.tensor(edges[::-1])
    return total[edge].diff() / count[edge].diff() + middle, best[-1]


def _dense_kmeans(weight: Tensor, clusters: int, size: int) -> tuple[Tensor, Tensor]:
    found = [_divide_and_conquer(part, clusters) for part in weight.reshape(-1).split(size)]
    return torch.stack([c for c, _ in found])[:, :, None].float(), torch.stack([i for _, i in found]).float()


def _kmeans(
    shape: tuple[int, int],
    clusters: int = 16,
    dtype: torch.dtype = HALF,
    *,
    rows: int | None = None,
    all_splits: bool = False,
    **options: Any,
) -> Case:
    dense = {"divide and conquer": plain(_dense_kmeans, devices=("cpu",))}
    if all_splits:
        dense["all splits"] = plain(ops._kmeans1d_reference)
    providers: Providers = {"dense": dense}

    def args(rand: Random, shape: tuple[int, int], clusters: int, rows: int | None) -> Args:
        weight = weights(rand, shape, dtype)
        return weight, clusters, weight.numel() if rows is None else rows * shape[1]

    return Case(
        "kmeans1d",
        f"{shape[0]}x{shape[1]} K{clusters}{f' {rows}-row palettes' if rows is not None else ''}",
        dtype,
        lambda rand: args(rand, shape, clusters, rows),
        providers,
        lambda rand: args(rand, (16, 32), min(clusters, 8), None if rows is None else 8),
        facts={"clusters": clusters, "palette_rows": rows},
        **options,
    )


KMEANS = [
    _kmeans(SQUARE, overhead=True, all_splits=True),
    _kmeans(SMALL, quick=True),
    _kmeans(SQUARE, dtype=FLOAT),
    _kmeans(LARGE),
    _kmeans(SQUARE, 256),
    _kmeans(SQUARE, rows=16),
]

CASES = [*DKM, *TABLES, *VALUES, *PALETTIZE, *KMEANS]
