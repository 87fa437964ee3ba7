# SPDX-License-Identifier: Apache-2.0
"""The operators of weight clustering. What the family promises beyond one operator stands in test_clustering_laws.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cofire import explain, native, ops
from cofire.ops import clustering
from cofire.ops.clustering import BINS, GRADIENTS, bin_values, bins_of, temperature
from cofire.registry import FLOATS, OPERATORS
from helpers import Args, Random, Refusal, Sample, check_examples, check_op, refusals
from laws import given, settings, st

ODD = (1, 7, 17, 63, 65, 129)
HALVES = (torch.bfloat16, torch.float16)

# --------------------------------------------------------------------------- histogram16, scatter16, lut_apply16


def halves(*shape: int, dtype: torch.dtype = torch.bfloat16, distinct: int | None = None) -> Callable[[Random], Tensor]:
    """16-bit values; of only so many kinds, if asked."""

    def make(rand: Random) -> Tensor:
        x = rand.normal(*shape)
        return (x if distinct is None else (rand.uniform(*shape) * distinct).floor() - 1).to(dtype)

    return make


INPUTS = {
    "odd": halves(7, 17),
    "fp16": halves(3, 5, 11, dtype=torch.float16),
    **{f"length_{n}": halves(n) for n in ODD},
    "three_values": halves(129, distinct=3),
    "one_value": lambda rand: torch.full((65,), 0.5, dtype=torch.bfloat16),
    "zeros_of_both_signs": lambda rand: torch.tensor([0.0, -0.0, 0.0], dtype=torch.float16),
    "extremes": lambda rand: torch.tensor([torch.inf, -torch.inf, 6e-8, -6e-8, 65504.0], dtype=torch.float16),
    "nothing": halves(0, 3),
    "several_threads": halves(3, 70000),
}
LATER = ("several_threads", "length_63", "length_65", "length_129")  # of no more interest to an interpreter


def samples16(make: Callable[[Random, Tensor], Args], names: tuple[str, ...] = tuple(INPUTS)) -> list[Sample]:
    return [Sample(n, lambda rand, n=n: make(rand, INPUTS[n](rand)), full=n in LATER) for n in names]


def finite(rand: Random, x: Tensor) -> Tensor:
    return rand.normal(*x.shape)


TINY16 = (halves(5, 3), halves(4, 2))


@pytest.mark.parametrize(
    "check",
    check_op(
        "histogram16",
        samples16(lambda rand, x: (x,)),
        tiny=[Sample(f"tiny_{i}", lambda rand, make=make: (make(rand),)) for i, make in enumerate(TINY16)],
        kept=("input",),
    ),
)
def test_histogram16(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    check_op(
        "scatter16",
        samples16(lambda rand, x: (x, finite(rand, x))),
        tiny=[
            Sample(f"tiny_{i}", lambda rand, make=make: (make(rand), rand.normal(*make(rand).shape)))
            for i, make in enumerate(TINY16)
        ],
        kept=("input",),
        sums=("output 0",),
    ),
)
def test_scatter16(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    check_op(
        "lut_apply16",
        [
            *samples16(lambda rand, x: (x, rand.normal(BINS), finite(rand, x), rand.normal(BINS))),
            *(
                Sample(f"{s.name}_alone", lambda rand, s=s: (s.make(rand)[0], rand.normal(BINS), None, None), s.full)
                for s in samples16(lambda rand, x: (x,), ("odd", "fp16", "length_17", "nothing", "several_threads"))
            ),
        ],
        tiny=[
            Sample(
                f"tiny_{i}",
                lambda rand, make=make: (
                    make(rand),
                    rand.normal(BINS),
                    rand.normal(*make(rand).shape),
                    rand.normal(BINS),
                ),
            )
            for i, make in enumerate(TINY16)
        ],
        kept=("input",),
        wide=("table", "slope"),
        sums=("table", "slope"),
    ),
)
def test_lut_apply16(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("dtype", HALVES)
def test_bins_are_ordered_by_value(dtype: torch.dtype) -> None:
    values = bin_values(dtype)
    there = values[~values.isnan()]
    assert (there.diff() >= 0).all()
    assert int((there.diff() == 0).sum()) == 1  # -0 and 0
    patterns = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    assert torch.equal(bins_of(patterns).sort().values, torch.arange(BINS))
    finite = patterns[patterns.isfinite()]
    assert torch.equal(values[bins_of(finite)], finite.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_counts_by_itself(dtype: torch.dtype) -> None:
    patterns = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    assert torch.equal(ops.histogram16(patterns), torch.ones(BINS, dtype=torch.int32))
    assert torch.equal(
        bins_of(ops.lut_apply16(patterns[patterns.isfinite()], bin_values(dtype))),
        bins_of(patterns[patterns.isfinite()]),
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 65535), max_size=40), st.sampled_from(HALVES))
def test_histogram16_is_bincount(patterns: list[int], dtype: torch.dtype) -> None:
    x = torch.tensor(patterns, dtype=torch.int32).to(torch.uint16).view(dtype)
    counts = ops.histogram16(x)
    assert int(counts.sum()) == len(patterns)
    assert torch.equal(
        counts[bins_of(x)].sort().values, torch.tensor([patterns.count(p) for p in patterns]).int().sort().values
    )


@pytest.mark.parametrize("size", [*range(18), 1000, 40_000, 300_001, 2**20 + 3])
@pytest.mark.parametrize("kind", ["alike", "half_zeros", "spread"])
def test_histogram16_of_patterns_that_repeat_and_that_do_not(kind: str, size: int) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0)).half()
    weight = {"alike": torch.full_like(weight, 0.5), "half_zeros": weight.clamp(min=0), "spread": weight}[kind]
    expected = torch.bincount(bins_of(weight), minlength=BINS)
    assert torch.equal(ops.histogram16(weight).long(), expected)


def test_what_is_not_finite_stays_in_its_bin() -> None:
    x = torch.tensor([1.0, 2.0, 1.0], dtype=torch.bfloat16)
    sums = ops.scatter16(x, torch.tensor([torch.nan, 1.0, 2.0]))
    assert sums[bins_of(x)].isnan().tolist() == [True, False, True]
    assert int(sums.isnan().sum()) == 1


# ------------------------------------------------------------------------------------------------- dkm_tables

RULES = {  # eps, enforce_zero, prune_threshold, keep_sparsity
    "plain": (1e-7, False, 0.0, False),
    "no_clamp": (0.0, False, 0.0, False),
    "strong_clamp": (1e-2, False, 0.0, False),
    "zero": (1e-7, True, 0.0, False),
    "prune": (1e-7, True, 0.02, False),
    "sparse": (1e-7, True, 0.0, True),
}
#: The path is fp64, and what leads to it is fp32 (of fp32 weights): 4 roundings of fp32.
PATH = {"path": 2**31}
#: Scores are squared distances over the temperature, up to some thousand, and attention has their absolute error.
SCORES = 64


def palettes(rand: Random, partitions: int, clusters: int, d: int = 1) -> Tensor:
    """Centroids spread over the weights, in ascending order, no two near each other."""
    if d > 1:
        return rand.normal(partitions, clusters, d)
    even = torch.linspace(-1.6, 1.6, clusters).expand(partitions, clusters)
    return (even + 0.5 / clusters * (rand.uniform(partitions, clusters) - 0.5))[:, :, None].clone()


def tables(
    values: int,
    partitions: int,
    clusters: int,
    rules: str = "plain",
    grad: str = "unroll",
    rho: float = 0.3,
    steps: int = 3,
) -> Callable[[Random], Args]:
    def make(rand: Random) -> Args:
        x = rand.normal(values).sort().values
        counts = (rand.uniform(partitions, values) * 5).int()
        counts[:, 0] += 1
        centroids = palettes(rand, partitions, clusters)
        tau = temperature(centroids, rho)
        return x, counts, centroids[:, :, 0], tau, steps, *RULES[rules], grad, 0.0

    return make


TABLES = [
    Sample("odd", tables(17, 1, 3)),
    Sample("partitions", tables(33, 3, 4)),
    *(Sample(f"values_{n}", tables(n, 1, 4)) for n in ODD),
    *(Sample(f"rules_{name}", tables(65, 2, 5, rules=name)) for name in RULES if name != "plain"),
    Sample("one_step", tables(65, 1, 4, steps=1)),
    Sample("ten_steps", tables(65, 1, 4, steps=10), full=True),
    Sample("cold", tables(129, 1, 8, rho=0.01)),
    Sample("hot", tables(129, 1, 8, rho=3.0)),
    Sample("two_clusters", tables(63, 2, 2)),
    Sample("many_clusters", tables(300, 1, 17), full=True),
    Sample("most_clusters", tables(700, 1, 256, rho=0.1), full=True),
    Sample("several_threads", tables(5000, 2, 16, rho=0.1), full=True),
    *(
        Sample(f"implicit_{name}", tables(129, 2, 4, rules=name, grad="implicit"))
        for name in ("plain", "zero", "sparse")
    ),
    *(Sample(f"jfb_{name}", tables(65, 2, 4, rules=name, grad="jfb")) for name in ("plain", "zero")),
]
TINY_TABLES = [Sample("tiny", tables(9, 2, 3)), Sample("tiny_resized", tables(12, 3, 4))]


@pytest.mark.parametrize(
    "check",
    check_op(
        "dkm_tables", TABLES, tiny=TINY_TABLES, constants=("tau",), dtypes=(torch.float32,),
        sums={"table": 64, "values": 64, "centroids": 64} | PATH, condition=SCORES,
    ),
)  # fmt: skip
def test_dkm_tables(check: Callable[[], None]) -> None:
    check()


def backward_of_tables(sample: Sample) -> Sample:
    def make(rand: Random) -> Args:
        values, counts, centroids, tau, steps, *rules, grad, _ = sample.make(rand)
        _, path, status = clustering._dkm_tables_reference(values, counts, centroids, tau, steps, *rules, grad, 0.0)
        return rand.normal(*counts.shape), values, counts, path, status, tau, *rules, grad

    return Sample(sample.name, make, sample.full)


@pytest.mark.parametrize(
    "check",
    check_op(
        "dkm_tables_backward", [backward_of_tables(s) for s in TABLES], tiny=[backward_of_tables(s) for s in TINY_TABLES],
        kept=("path",), dtypes=(torch.float32,), sums={"slope": 64, "offset": 64, "grad_centroids": 64},
        condition=SCORES,
    ),
)  # fmt: skip
def test_dkm_tables_backward(check: Callable[[], None]) -> None:
    check()


# -------------------------------------------------------------------------------------------------------- dkm


def clustered(
    *shape: int, clusters: int = 4, group: int | None = None, d: int = 1, rules: str = "plain", forward: str = "soft",
    grad: str = "unroll", rho: float = 0.3, steps: int = 3,
) -> Callable[[Random], Args]:  # fmt: skip
    def make(rand: Random) -> Args:
        weight = rand.normal(*shape)
        if rules in ("zero", "sparse", "prune"):
            weight = weight * (rand.uniform(*shape) < 0.7)
        size = group or weight.numel()
        centroids = palettes(rand, -(-weight.numel() // size), clusters, d)
        return weight, centroids, temperature(centroids, rho), size, steps, *RULES[rules], forward, grad

    return make


DKM = [
    Sample("odd", clustered(7, 17)),
    Sample("groups", clustered(9, 16, group=32, clusters=3)),
    Sample("short_last_group", clustered(5, 13, group=15, clusters=5)),
    *(Sample(f"weights_{n}", clustered(n), full=n > 17) for n in ODD if n >= 4),
    *(Sample(f"vectors_{d}", clustered(12, 2 * d, d=d, clusters=3)) for d in (2, 3, 4, 8)),
    Sample("vectors_in_groups", clustered(10, 4, d=2, clusters=3, group=12)),
    *(Sample(f"rules_{name}", clustered(7, 17, rules=name)) for name in RULES if name != "plain"),
    *(
        Sample(f"vector_rules_{name}", clustered(9, 14, d=2, rules=name), full=True)
        for name in RULES
        if name != "plain"
    ),
    *(
        Sample(f"hard_{name}", clustered(7, 17, rules=name, forward="hard_ste"))
        for name in ("plain", "sparse", "prune")
    ),
    Sample("hard_vectors", clustered(8, 6, d=2, forward="hard_ste")),
    *(
        Sample(f"{g}_{name}", clustered(8, 17, rules=name, grad=g))
        for g in GRADIENTS[1:]
        for name in ("plain", "sparse")
    ),
    Sample("implicit_hard", clustered(9, 15, grad="implicit", forward="hard_ste")),
    Sample("implicit_vectors", clustered(40, 4, d=2, clusters=3, grad="implicit", rho=0.1), full=True),
    Sample("jfb_vectors", clustered(10, 6, d=2, clusters=3, grad="jfb")),
    Sample("table", clustered(91, 93, clusters=8, rho=0.1), full=True),
    *(Sample(f"table_{g}", clustered(91, 93, clusters=4, grad=g), full=True) for g in GRADIENTS[1:]),
    Sample("table_hard", clustered(91, 93, clusters=8, forward="hard_ste"), full=True),
    Sample("table_groups", clustered(190, 97, clusters=4, group=9000), full=True),
    Sample("several_threads", clustered(300, 301, clusters=16, rho=0.1), full=True),
    Sample("most_clusters", clustered(60, 50, clusters=256, rho=0.1), full=True),
]
TINY_DKM = [
    Sample("tiny", clustered(3, 4, clusters=3, group=8)),
    Sample("tiny_resized", clustered(4, 6, clusters=3, group=8)),
]
#: Each of some hundred weights may pull a centroid: gradients of centroids are sums, and those of weights hold some.
SUMS = {"weight": 16, "centroids": 64, "output": 8}


@pytest.mark.parametrize(
    "check",
    check_op(
        "dkm", DKM, tiny=TINY_DKM, constants=("tau",), wide=("centroids", "tau"), sums=SUMS | PATH, condition=SCORES
    ),
)
def test_dkm(check: Callable[[], None]) -> None:
    check()


def backward_of_dkm(sample: Sample) -> Sample:
    def make(rand: Random) -> Args:
        weight, centroids, tau, size, steps, *rules, _, grad = sample.make(rand)
        args = (weight.double(), centroids.double(), tau.double(), size, steps, *rules, "soft", grad)
        _, path, status = clustering._dkm_reference(*args)
        return rand.normal(*weight.shape), weight, path, status, tau, size, *rules, grad

    return Sample(sample.name, make, sample.full)


@pytest.mark.parametrize(
    "check",
    check_op(
        "dkm_backward", [backward_of_dkm(s) for s in DKM if "hard" not in s.name],
        tiny=[backward_of_dkm(s) for s in TINY_DKM], kept=("path",), wide=("tau",),
        sums={"grad_weight": 16, "grad_centroids": 64}, condition=SCORES,
    ),
)  # fmt: skip
def test_dkm_backward(check: Callable[[], None]) -> None:
    check()


def test_golden_iteration() -> None:
    """Two weights and two centroids, by hand: A = softmax(-(x - c)^2 / tau)."""
    weight = torch.tensor([0.0, 1.0], dtype=torch.float64)
    near, far = 1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(0.5))  # distances 1/16 and 9/16 over tau = 1
    out, centroids, status = ops.dkm(
        weight, torch.tensor([[[0.25], [0.75]]], dtype=torch.float64), tau=1.0, iterations=1, eps=0.0
    )
    assert centroids.flatten().tolist() == pytest.approx([far, near], rel=1e-12)
    assert out.tolist() == pytest.approx([2 * near * far, near**2 + far**2], rel=1e-12)
    assert status.tolist() == [0]


def test_explain_names_the_way() -> None:
    if native.STATUS.variant is None:
        pytest.skip(f"no compiled kernels: {native.STATUS.reason}")
    centroids = torch.randn(1, 4, 1)
    ways = {
        "histogram of the 16-bit values": torch.randn(128, 128).bfloat16(),
        "streams the weights, in fp32": torch.randn(128, 128),
        "streams the weights, in fp64": torch.randn(16, 16).bfloat16(),
    }
    for way, weight in ways.items():
        (call,) = explain("dkm", weight, centroids, tau=0.1)
        assert way in call["kernel"], call


# --------------------------------------------------------------------------------------- palettize, kmeans1d


def labelled(*shape: int, **options: object) -> Callable[[Random], Args]:
    def make(rand: Random) -> Args:
        weight, centroids, _, size, _, _, _, prune, keep, *_ = clustered(*shape, **options)(rand)  # type: ignore[arg-type]
        return weight, centroids, size, prune, keep

    return make


@pytest.mark.parametrize(
    "check",
    check_op(
        "palettize",
        [
            Sample("odd", labelled(7, 17)),
            Sample("groups", labelled(5, 13, group=15, clusters=5)),
            *(Sample(f"weights_{n}", labelled(n), full=n > 17) for n in ODD if n >= 4),
            *(Sample(f"vectors_{d}", labelled(12, 2 * d, d=d, clusters=3)) for d in (2, 3, 4, 8)),
            *(Sample(f"rules_{name}", labelled(7, 17, rules=name)) for name in ("prune", "sparse")),
            Sample(
                "ties", lambda rand: (torch.arange(9.0), torch.tensor([[[0.0], [2.0], [4.0], [2.0]]]), 9, 0.0, False)
            ),
            Sample("most_clusters", labelled(40, 40, clusters=256), full=True),
            Sample("table", labelled(300, 301, clusters=16), full=True),
        ],
        tiny=[
            Sample("tiny", labelled(3, 4, clusters=3, group=8)),
            Sample("tiny_resized", labelled(4, 6, clusters=3, group=8)),
        ],
        wide=("centroids",),
        sums={"inertia": 64},
    ),
)
def test_palettize(check: Callable[[], None]) -> None:
    check()


def optimal(
    *shape: int, clusters: int, group: int | None = None, distinct: int | None = None
) -> Callable[[Random], Args]:
    def make(rand: Random) -> Args:
        weight = rand.normal(*shape)
        weight = weight if distinct is None else (rand.uniform(*shape) * distinct).floor()
        return weight, clusters, group or weight.numel()

    return make


@pytest.mark.parametrize(
    "check",
    check_op(
        "kmeans1d",
        [
            Sample("odd", optimal(7, 17, clusters=4)),
            Sample("groups", optimal(5, 13, clusters=3, group=15)),
            *(Sample(f"weights_{n}", optimal(n, clusters=3)) for n in ODD),
            Sample("as_many_values", optimal(129, clusters=8, distinct=8)),
            Sample("fewer_values", optimal(65, clusters=5, distinct=3)),
            Sample("one_value", lambda rand: (torch.full((17,), 0.3), 4, 17)),
            Sample("two_clusters", optimal(63, 65, clusters=2)),
            Sample("large", optimal(100, 101, clusters=16), full=True),
        ],
        tiny=[
            Sample("tiny", optimal(3, 4, clusters=3, group=8)),
            Sample("tiny_resized", optimal(4, 6, clusters=3, group=8)),
        ],
        sums={"centroids": 4, "inertia": 64},
    ),
)
def test_kmeans1d(check: Callable[[], None]) -> None:
    check()


def all_partitions(x: list[float], clusters: int) -> float:
    """The least inertia over all ways to cut the sorted values, by enumeration."""
    if clusters == 1 or len(x) <= 1:
        return float(((np.array(x) - np.mean(x)) ** 2).sum()) if x else 0.0
    return min(all_partitions(x[:i], 1) + all_partitions(x[i:], clusters - 1) for i in range(1, len(x)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=4, max_size=9, unique=True), st.integers(2, 4))
def test_kmeans1d_is_optimal(values: list[int], clusters: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    centroids, inertia = ops.kmeans1d(x, clusters)
    assert inertia.item() == pytest.approx(all_partitions(sorted(map(float, values)), clusters), abs=1e-4)
    assert (centroids[0, :, 0].diff() >= 0).all()
    _, by_labels = ops.palettize(x, centroids)
    assert by_labels.item() == pytest.approx(inertia.item(), abs=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_kmeans1d_with_most_clusters(dtype: torch.dtype) -> None:
    """Values of 16 bits are evenly spaced, and many palettes are equally good: any of them will do."""
    weight = Random("most").normal(30, 30).to(dtype)
    centroids, inertia = ops.kmeans1d(weight, 256)
    _, least = OPERATORS["kmeans1d"].reference(weight.double(), 256, weight.numel())
    _, found = ops.palettize(weight.double(), centroids.double())
    assert inertia.item() == pytest.approx(least.item(), rel=1e-5)
    assert found.item() == pytest.approx(least.item(), rel=1e-5)


def test_kmeans1d_of_wide_weights_in_groups_is_as_good() -> None:
    """Weights that share sixteen bits stay together: against exact clustering of the same weights in pieces."""
    weight = Random("wide").normal(64, 128) * 0.02
    _, inertia = ops.kmeans1d(weight, 16)
    start, _ = ops.kmeans1d(weight.flatten()[:4096], 16)
    centroids = start
    for _ in range(300):  # Lloyd's iterations, to a local optimum
        labels, _ = ops.palettize(weight, centroids)
        sums = torch.zeros(16).index_add(0, labels.flatten().int(), weight.flatten())
        centroids = (sums / labels.flatten().int().bincount(minlength=16))[None, :, None]
    _, local = ops.palettize(weight, centroids)
    assert inertia.item() <= local.item() * 1.0005


# --------------------------------------------------------------------------------------------------- refusals


def w() -> Tensor:
    return torch.ones(4, 4)


def c() -> Tensor:
    return torch.ones(1, 3, 1)


def half() -> Tensor:
    return w().bfloat16()


def bad(name: str, call: Callable[[], object], error: type[Exception], sentence: str, data: bool = False) -> Refusal:
    return Refusal(name, call, error, sentence, data)


REFUSALS = [
    bad(
        "dtype16", lambda: ops.histogram16(w()), TypeError,
        "histogram16: input must be bfloat16 or float16, got torch.float32",
    ),
    bad("no_tensor", lambda: ops.histogram16(3), TypeError, "histogram16: input must be a tensor, got int"),  # type: ignore[arg-type]
    bad(
        "scatter_shape", lambda: ops.scatter16(half(), torch.ones(4)), ValueError,
        "scatter16: source must have the shape of input [4, 4], got [4]",
    ),
    bad(
        "scatter_int", lambda: ops.scatter16(half(), half().int()), TypeError,
        "scatter16: source must be a floating-point tensor, got torch.int32",
    ),
    bad(
        "table", lambda: ops.lut_apply16(half(), torch.ones(7)), ValueError,
        "lut_apply16: table must have shape [65536], got [7]",
    ),
    bad(
        "alone", lambda: ops.lut_apply16(half(), torch.ones(BINS), w()), ValueError,
        "lut_apply16: source and slope must be given together",
    ),
    bad("no_tau", lambda: ops.dkm(w(), c()), ValueError, "dkm: one of tau and rho must be given"),
    bad("both", lambda: ops.dkm(w(), c(), tau=1, rho=1), ValueError, "dkm: one of tau and rho must be given"),
    bad("rho", lambda: ops.dkm(w(), c(), rho=-1), ValueError, "dkm: rho must be positive and finite, got -1"),
    bad("tau", lambda: ops.dkm(w(), c(), tau=0.0), ValueError, "dkm: tau must be positive and finite, got 0 for partition 0", True),
    bad("clusters", lambda: ops.dkm(w(), c()[:, :1], tau=1.0), ValueError, "dkm: there must be 2 to 256 clusters, got 1"),
    bad(
        "clusters_257", lambda: ops.dkm(torch.ones(300), torch.ones(1, 257, 1), tau=1.0), ValueError,
        "dkm: there must be 2 to 256 clusters, got 257",
    ),
    bad(
        "few_weights", lambda: ops.dkm(w(), c(), tau=1.0, group_size=2), ValueError,
        "dkm: centroids must be given for 8 partitions, got [1, 3, 1]",
    ),
    bad(
        "fewer_than_clusters", lambda: ops.dkm(w(), c().expand(8, 3, 1), tau=1.0, group_size=2), ValueError,
        "dkm: a partition must have at least 3 weights (3 clusters), got 2",
    ),
    bad(
        "vectors", lambda: ops.dkm(w(), torch.ones(1, 3, 3), tau=1.0), ValueError,
        "dkm: weight [4, 4] and group_size 16 must divide into vectors of 3",
    ),
    bad(
        "rank", lambda: ops.dkm(w(), c()[0], tau=1.0), ValueError,
        "dkm: centroids must have shape [partitions, clusters, d], got [3, 1]",
    ),
    bad(
        "dtype", lambda: ops.dkm(half(), c().bfloat16(), tau=1.0), TypeError,
        "dkm: centroids of torch.bfloat16 weights must be torch.float32, got torch.bfloat16",
    ),
    bad(
        "device", lambda: ops.dkm(w(), torch.ones(1, 3, 1, device="meta"), tau=1.0), ValueError,
        "dkm: centroids must be on the device of weight (cpu), got meta",
    ),
    bad(
        "grad", lambda: ops.dkm(w(), c(), tau=1.0, grad="unrol"), ValueError,
        "dkm: grad must be one of unroll, implicit, jfb, got 'unrol'",
    ),
    bad(
        "forward", lambda: ops.dkm(w(), c(), tau=1.0, forward="hard"), ValueError,
        "dkm: forward must be one of soft, hard_ste, got 'hard'",
    ),
    bad(
        "iterations", lambda: ops.dkm(w(), c(), tau=1.0, iterations=0), ValueError,
        "dkm: iterations must be between 1 and 1000, got 0",
    ),
    bad(
        "eps", lambda: ops.dkm(w(), c(), tau=1.0, eps=-1e-7), ValueError,
        "dkm: eps must be at least 0 and less than 1, got -1e-07",
    ),
    bad(
        "prune", lambda: ops.dkm(w(), c(), tau=1.0, prune_threshold=-1.0), ValueError,
        "dkm: prune_threshold must be finite and not negative, got -1.0",
    ),
    bad(
        "sparsity", lambda: ops.dkm(w(), c(), tau=1.0, keep_sparsity=True), ValueError,
        "dkm: keep_sparsity needs enforce_zero",
    ),
    bad("empty", lambda: ops.dkm(w()[:0], c(), tau=1.0), ValueError, "dkm: weight must have elements, got shape [0, 4]"),
    bad(
        "integers", lambda: ops.dkm(w().int(), c(), tau=1.0), TypeError,
        "dkm: weight must be a floating-point tensor, got torch.int32",
    ),
    bad(
        "tables_counts", lambda: ops.dkm_tables(w()[0], torch.ones(1, 4), c()[:, :, 0], 1.0), TypeError,
        "dkm_tables: counts must be int32, as histogram16 gives them, got torch.float32",
    ),
    bad(
        "no_weights", lambda: ops.kmeans1d(w()[:0], 4), ValueError,
        "kmeans1d: weight must have elements, got shape [0, 4]",
    ),
    bad("one_cluster", lambda: ops.kmeans1d(w(), 1), ValueError, "kmeans1d: there must be 2 to 256 clusters, got 1"),
]  # fmt: skip


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def poisoned(dtype: torch.dtype, size: int) -> Tensor:
    weight = Random("poisoned").normal(size)
    weight[[3, 5, 11]] = torch.nan
    weight[7], weight[9] = torch.inf, -torch.inf
    return weight.to(dtype)


@pytest.mark.parametrize("size", [64, 10000])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_nan_is_refused_with_its_number(dtype: torch.dtype, size: int) -> None:
    weight = poisoned(dtype, size)
    centroids = torch.linspace(-1, 1, 4, dtype=torch.promote_types(dtype, torch.float32))[None, :, None]
    for name, call in (
        ("dkm", lambda: ops.dkm(weight, centroids, tau=0.1)),
        ("kmeans1d", lambda: ops.kmeans1d(weight, 4)),
        ("palettize", lambda: ops.palettize(weight, centroids)),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: weight must be finite, got 3 NaN and 2 infinite values$"):
            call()


def test_examples() -> None:
    check_examples(clustering)


@pytest.mark.parametrize("clusters", [2, 3, 16, 17, 256])
@pytest.mark.parametrize("kind", ["lattice", "equal centroids", "magnitudes", "denormal"])
def test_labels_of_scalars_where_distances_are_equal(clusters: int, kind: str) -> None:
    """Ties, also those that rounding makes of different distances, go to the first, as a search through all has it."""
    rand = Random(f"{kind} {clusters}")
    weight, centroids = rand.normal(3, 217), rand.normal(2, clusters, 1)
    if kind == "lattice":
        weight, centroids = (weight * 8).round() / 8, (centroids * 4).round() / 4
    elif kind == "equal centroids":
        centroids = centroids[:, torch.arange(clusters) // 3 * 3]
    elif kind == "magnitudes":
        weight, centroids = (
            weight * 10 ** (12 * rand.normal(3, 217)),
            centroids * 10 ** (12 * rand.normal(2, clusters, 1)),
        )
    else:
        weight, centroids = weight * 1e-40, centroids * 1e-40
    reference = OPERATORS["palettize"].reference
    for threshold, keep in ((0.0, False), (0.01, False), (0.01, True)):
        for dtype in (torch.float32, torch.bfloat16):
            given = weight.to(dtype).nan_to_num()
            expected = reference(given, centroids, 400, threshold, keep)
            labels, inertia = ops.palettize(
                given, centroids, group_size=400, prune_threshold=threshold, keep_sparsity=keep
            )
            assert torch.equal(labels, expected[0])
            torch.testing.assert_close(inertia, expected[1])
