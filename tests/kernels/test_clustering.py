# SPDX-License-Identifier: Apache-2.0
"""What the launchers of clustering have of their own: fixed-point sums, slots, tables for 16 bits, plans, assertions."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("launchers on CPU tensors need the interpreter", allow_module_level=True)

from cofire.ops import clustering as ops
from cofire.ops.clustering import BINS, bin_values, bins_of, temperature
from cofire.registry import OPERATORS
from cofire_kernels import clustering, configs
from cofire_kernels.clustering import fixed_point, values16
from cofire_kernels.clustering.rows import Rules, counted_rows, weight_rows
from helpers import Args, Case, Context, bits, check_values

dkm_module = importlib.import_module("cofire_kernels.clustering.dkm")  # the package has a function of that name

HALVES = (torch.bfloat16, torch.float16)
RULES = {  # eps, enforce_zero, prune_threshold, keep_sparsity
    "plain": (1e-7, False, 0.0, False),
    "no_clamp": (0.0, False, 0.0, False),
    "zero": (1e-7, True, 0.0, False),
    "prune": (1e-7, True, 0.02, False),
    "sparse": (1e-7, True, 0.01, True),
}
every_gradient = pytest.mark.parametrize("grad", ["unroll", "jfb", "implicit"])

#: The path is fp64, whatever the weights are: 4 roundings of fp32. Sums lose some roundings of their own.
SUMS = {"path": 2**31, "table": 64, "slope": 64, "offset": 64, "output": 8, "grad_weight": 16, "grad_centroids": 256}


def launch(name: str, *args: Any) -> tuple[Tensor, ...]:
    """The launcher's result, which is right and the same again."""
    outputs, again = (getattr(clustering, name)(*args) for _ in range(2))
    outputs, again = (o if isinstance(o, tuple) else (o,) for o in (outputs, again))
    case = Case(OPERATORS[name], (), (), ("path",), {**SUMS, "inertia": 64}, None)
    check_values(Context(case, "triton", "kernel test"), args, outputs)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(outputs, again, strict=True)), f"{name} varies"
    return outputs


def both(name: str, args: Args, partitions_at: int = 0) -> tuple[Tensor, ...]:
    """An operator and its backward, from the reference's path."""
    outputs = launch(name, *args)
    if name == "dkm_tables":
        values, counts, _, tau, _, *rules, grad, _ = args
        _, path, status = OPERATORS[name].reference(*args)
        launch(
            "dkm_tables_backward",
            torch.randn(counts.shape, dtype=values.dtype),
            values,
            counts,
            path,
            status,
            tau,
            *rules,
            grad,
        )
    else:
        weight, _, tau, group, _, *rules, _, grad = args
        _, path, status = OPERATORS[name].reference(*args)
        launch(
            "dkm_backward", torch.randn(weight.shape).to(weight.dtype), weight, path, status, tau, group, *rules, grad
        )
    return outputs


@pytest.fixture
def narrow() -> Iterator[None]:
    """Tiles so small that every partition is shared by many programs."""
    configs.forced.update({name: {"ELEMENTS": 1, "num_warps": 4} for name in ("dkm", "dkm_tables")})
    yield
    configs.forced.clear()


@pytest.fixture
def counted_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dkm_module, "COUNTED_FROM", 1)


# ------------------------------------------------------------------------------------------- 16-bit values


def spread(n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n).mul(3).to(dtype)


@pytest.mark.parametrize("n", [1, 7, 17, 63, 65, 129, 3000])
@pytest.mark.parametrize("dtype", HALVES)
def test_partitions_of_tables(dtype: torch.dtype, n: int) -> None:
    """Counts, sums and look-ups of partitions, the last of them short."""
    x, source, group = spread(n, dtype), torch.randn(n), -(-n // 3)
    parts = -(-n // group)
    counts = values16.count(values16.patterns(x), group, parts)
    sums = values16.scatter(values16.patterns(x), source, group, parts, torch.float64)
    for p, (some, s) in enumerate(zip(x.split(group), source.split(group))):
        assert torch.equal(counts[p], torch.bincount(bins_of(some), minlength=BINS).int())
        expected = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins_of(some), s.double())
        torch.testing.assert_close(sums[p], expected, rtol=0, atol=n * 2.0**-59 * float(s.abs().max()))
    tables = torch.randn(parts, BINS)
    out = torch.empty(n)
    values16.gather(values16.patterns(x), tables, source, tables, out, group)
    row = torch.arange(n) // group
    expected = tables[row, bins_of(x)]
    torch.testing.assert_close(out, expected + expected * source)


@pytest.mark.parametrize("scale", [0, -1022, -149, -20, 0.5, 20, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_keep_their_relative_precision(dtype: torch.dtype, scale: float) -> None:
    """Of numbers near the ends of the type too; the exponent is the tensor's, so nothing overflows."""
    x = torch.tensor([1.0, 2.0] * 8, dtype=torch.bfloat16)
    source = torch.randn(16, dtype=torch.float64).mul(2.0**scale if scale else 0.0).to(dtype)
    sums = clustering.scatter16(x, source)
    expected = OPERATORS["scatter16"].reference(x, source.double())
    assert torch.isfinite(sums).all()
    error = (sums.double() - expected).abs().max()
    tiny = 2.0**-1074 if dtype == torch.float64 else 2.0**-149
    assert error <= 2 * torch.finfo(dtype).eps * expected.abs().max() + 2 * tiny


def test_sums_do_not_depend_on_the_order() -> None:
    x, source = spread(500, torch.bfloat16).abs().clamp(max=1).mul(2).round(), torch.randn(500)
    order = torch.randperm(500)
    assert torch.equal(bits(clustering.scatter16(x, source)), bits(clustering.scatter16(x[order], source[order])))


def test_what_is_not_finite_stays_where_it_is() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 5.0], dtype=torch.float16)
    inf, nan = math.inf, math.nan
    source = torch.tensor([inf, -inf, nan, 1.0, inf, -inf])
    sums = clustering.scatter16(x, source)
    torch.testing.assert_close(sums, OPERATORS["scatter16"].reference(x, source), equal_nan=True)
    assert sums[bins_of(x)][:4].tolist()[:2] == [inf, -inf]


@pytest.mark.parametrize("dtype", HALVES)
def test_the_values_of_the_bins(dtype: torch.dtype) -> None:
    found, expected = dkm_module._bin_values(dtype, torch.device("cpu")), bin_values(dtype)
    assert torch.equal(found.view(torch.int32)[expected.isfinite()], expected.view(torch.int32)[expected.isfinite()])
    assert torch.equal(found.isfinite(), expected.isfinite())


# ------------------------------------------------------------------------------------------------------ tables


def table_args(
    values: int, partitions: int, clusters: int, rules: str, grad: str, dtype: torch.dtype = torch.float32
) -> Args:
    """Values of which some do not occur, and these are NaN."""
    x = torch.randn(values).sort().values.to(dtype)
    x[values // 2] = 0
    counts = torch.randint(0, 4, (partitions, values), dtype=torch.int32)
    counts[:, values // 2] = 3
    counts[:, 1], x[1] = 0, math.nan
    centroids = torch.linspace(-1.4, 1.5, clusters, dtype=dtype).repeat(partitions, 1)
    return x, counts, centroids, temperature(centroids[:, :, None], 0.3), 3, *RULES[rules], grad, 0.0


@pytest.mark.parametrize(
    ("rules", "grad", "dtype"),
    [
        *((rules, "unroll", torch.float32) for rules in RULES),
        ("plain", "jfb", torch.float32),
        ("sparse", "jfb", torch.float64),
        ("prune", "unroll", torch.float64),
    ],
)
def test_tables(rules: str, grad: str, dtype: torch.dtype) -> None:
    both("dkm_tables", table_args(65, 2, 5, rules, grad, dtype))


@pytest.mark.parametrize(("values", "partitions", "clusters"), [(7, 1, 2), (17, 3, 3), (63, 2, 16), (129, 1, 17)])
def test_tables_of_odd_sizes(values: int, partitions: int, clusters: int) -> None:
    both("dkm_tables", table_args(values, partitions, clusters, "plain", "unroll"))


@pytest.mark.parametrize("grad", ["unroll", "jfb"])
def test_many_programs_share_the_rows(narrow: None, grad: str) -> None:
    both("dkm_tables", table_args(9, 2, 3, "sparse", grad))


def test_one_iteration_and_an_empty_partition() -> None:
    x, counts, centroids, tau, _, *rest = table_args(17, 3, 3, "zero", "unroll")
    counts[1] = 0
    table, path, _ = both("dkm_tables", (x, counts, centroids, tau, 1, *rest))
    assert not table[1].any()
    assert torch.equal(path[1, 1, 1:], centroids[1, 1:].double()), "a partition without values keeps its centroids"


# ------------------------------------------------------------------------------------------------- fixed point


def converging(rules: str) -> Args:
    """Clusters so clear that Newton's method finds them in a few iterations."""
    x = torch.cat([m + 0.2 * torch.randn(20) for m in (-2.0, 0.0, 1.8)]).sort().values
    counts = torch.randint(1, 4, (2, 60), dtype=torch.int32)
    x[int(x.abs().argmin())] = 0
    start = torch.tensor([[0.0, -1.9, 1.7]]) if RULES[rules][1] else torch.tensor([[-1.9, 0.1, 1.7]])
    return x, counts, start.repeat(2, 1), torch.full((2,), 0.5), 3, *RULES[rules], "implicit", 0.0


@pytest.mark.parametrize("rules", ["plain", "sparse"])
def test_newton_finds_the_fixed_point(rules: str) -> None:
    _, _, status = both("dkm_tables", converging(rules))
    assert status.tolist() == [fixed_point.CONVERGED] * 2


def test_partitions_go_their_own_ways() -> None:
    """One converges; below the temperature floor another takes plain updates, and the Jacobian-free gradient."""
    *args, _ = converging("plain")
    args[3] = torch.tensor([0.5, 1e-3])
    _, _, status = both("dkm_tables", (*args, 0.01))
    assert status.tolist() == [fixed_point.CONVERGED, fixed_point.BELOW_FLOOR]


@pytest.mark.parametrize(("rules", "d"), [*((rules, 1) for rules in RULES), ("plain", 2), ("sparse", 2)])
def test_the_jacobian_is_that_of_an_update(rules: str, d: int, narrow: None) -> None:
    """Against finite differences of the update at a fixed point, where the formula holds."""
    eps, enforce_zero, prune, sparse = RULES[rules]
    found, rule = torch.randn(24 * d, dtype=torch.float64), Rules(eps, enforce_zero, prune, sparse)
    found[: 4 * d] = 0
    rows, tau = weight_rows(found, 24 * d, d), torch.full((1,), 0.5, dtype=torch.float64)
    c = torch.randn(1, 3, d, dtype=torch.float64)
    c[:, 0] = 0
    reference, x, n = ops.Rules(*RULES[rules]), found.view(24, d), torch.ones(24, dtype=torch.float64)
    for _ in range(400):
        c = ops._update(x, n, ops._softmax(x, c[0], tau, reference).clamp(min=eps), c[0], reference)[None]
    left, totals = fixed_point.residual(rows, c, tau, rule)
    assert left.abs().max() < 1e-12
    j = fixed_point.jacobian(rows, c, totals, tau, rule)[0]
    for i in range(3 * d):
        step = torch.zeros(3 * d, dtype=torch.float64)
        step[i] = 1e-5
        ends = [
            (c + s * step.view(c.shape)) + fixed_point.residual(rows, c + s * step.view(c.shape), tau, rule)[0]
            for s in (1, -1)
        ]
        torch.testing.assert_close(j[:, i], (ends[0] - ends[1]).flatten() / 2e-5, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- dkm


def dkm_args(
    n: int, clusters: int, group: int | None, d: int, dtype: torch.dtype, rules: str, forward: str, grad: str
) -> Args:
    weight = torch.randn(n)
    weight[: 2 * d] = 0
    group = group or n
    partitions = -(-n // group)
    centroids = torch.linspace(-1.4, 1.5, clusters)[None, :, None].repeat(partitions, 1, d)
    if d > 1:
        centroids += 0.5 * torch.randn(partitions, clusters, d)
    tau = torch.full((partitions,), 0.4)
    return weight.to(dtype), centroids, tau, group, 2, *RULES[rules], forward, grad


SHAPES = {  # weights, clusters, group, d
    "one": (17, 3, None, 1),
    "short_last": (129, 4, 60, 1),
    "vectors": (126, 3, 48, 2),
    "triples": (63, 2, None, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_streams(shape: str, dtype: torch.dtype) -> None:
    both("dkm", dkm_args(*SHAPES[shape], dtype, "sparse", "hard_ste", "unroll"))
    both("dkm", dkm_args(*SHAPES[shape], dtype, "plain", "soft", "jfb"))


@pytest.mark.parametrize(("dtype", "rules"), [(torch.bfloat16, "sparse"), (torch.float16, "plain")])
def test_counts(counted_always: None, dtype: torch.dtype, rules: str) -> None:
    """16-bit weights through their tables, in partitions of which the last is short."""
    both("dkm", dkm_args(129, 3, 90, 1, dtype, rules, "soft", "unroll"))


def test_counts_of_the_nearest_centroids(counted_always: None) -> None:
    both("dkm", dkm_args(65, 3, None, 1, torch.float16, "prune", "hard_ste", "jfb"))


def test_slabs(counted_always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More partitions than have tables at the same time."""
    monkeypatch.setattr(dkm_module, "SLAB", 2)
    both("dkm", dkm_args(33, 3, 15, 1, torch.bfloat16, "zero", "soft", "unroll"))


def test_counted_and_streamed_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    args = dkm_args(300, 4, 100, 1, torch.bfloat16, "plain", "soft", "unroll")
    streamed = clustering.dkm(*args)
    monkeypatch.setattr(dkm_module, "COUNTED_FROM", 1)
    counted = clustering.dkm(*args)
    torch.testing.assert_close(counted[0], streamed[0], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(counted[1], streamed[1], rtol=1e-5, atol=1e-5)


def test_plans_say_the_way() -> None:
    def plan(*args: Any) -> str:
        return clustering.dkm_plan(*dkm_args(*args, "plain", "soft", "unroll"))

    assert plan(5000, 3, None, 1, torch.bfloat16) == "counted, one table per partition"
    assert plan(5000, 3, None, 1, torch.float32) == "streamed: weights of 32 bits"
    assert plan(5000, 3, None, 2, torch.bfloat16) == "streamed: vectors"
    assert plan(5000, 3, 100, 1, torch.float16) == "streamed: partitions of fewer than 4096 weights"
    args = dkm_args(5000, 3, None, 1, torch.bfloat16, "plain", "soft", "unroll")
    path = torch.zeros(3, 1, 3, 1, dtype=torch.float64)
    backward = (args[0], args[0], path, torch.zeros(1, dtype=torch.int32), args[2], 5000, *args[5:9], "unroll")
    assert clustering.dkm_backward_plan(*backward) == "counted, one table per partition"


# --------------------------------------------------------------------------------------------------- palettize


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_palettize(shape: str, dtype: torch.dtype) -> None:
    for rules in ("plain", "sparse"):
        weight, centroids, _, group, _, _, _, prune, keep, *_ = dkm_args(*SHAPES[shape], dtype, rules, "soft", "unroll")
        launch("palettize", weight, centroids, group, prune, keep)


def test_palettize_shared_by_many_programs(narrow: None) -> None:
    weight, centroids, _, group, *_ = dkm_args(33, 3, 12, 1, torch.float32, "plain", "soft", "unroll")
    launch("palettize", weight, centroids, group, 0.0, False)


# -------------------------------------------------------------------------------------------------- assertions


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_must_be_finite(counted_always: None, dtype: torch.dtype, bad: float) -> None:
    args = dkm_args(17, 3, None, 1, dtype, "plain", "soft", "unroll")
    args[0][3] = bad
    with pytest.raises(RuntimeError, match="dkm: weight must be finite"):
        clustering.dkm(*args)
    with pytest.raises(RuntimeError, match="palettize: weight must be finite"):
        clustering.palettize(args[0], args[1], 17, 0.0, False)


def test_values_that_occur_must_be_finite() -> None:
    args = table_args(17, 2, 3, "plain", "unroll")
    args[1][1, 1] = 1
    with pytest.raises(RuntimeError, match="dkm_tables: weight must be finite"):
        clustering.dkm_tables(*args)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_must_be_positive(bad: float) -> None:
    args = dkm_args(17, 3, None, 1, torch.float32, "plain", "soft", "unroll")
    args[2][0] = bad
    with pytest.raises(RuntimeError, match="dkm: tau must be positive and finite"):
        clustering.dkm(*args)
    tables = table_args(17, 2, 3, "plain", "unroll")
    tables[3][1] = bad
    with pytest.raises(RuntimeError, match="dkm_tables: tau must be positive and finite"):
        clustering.dkm_tables(*tables)


def test_rows_of_a_table_are_the_values_that_occur() -> None:
    rows = counted_rows(torch.arange(5.0), torch.tensor([[0, 2, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.int32))
    assert rows.length.tolist() == [2, 0]
    assert rows.index is not None
    assert rows.index[0, :2].tolist() == [1, 3]
