# SPDX-License-Identifier: Apache-2.0
"""What differentiable k-means promises: exactness against autograd over the maps, laws, and its edge cases."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cofire import native, ops
from cofire.ops import clustering
from cofire.ops.clustering import GRADIENTS, bin_values, bins_of, temperature
from helpers import bits, threads

Maps = tuple[Tensor, Tensor]

compiled = pytest.mark.skipif(native.STATUS.variant is None, reason=f"no compiled kernels: {native.STATUS.reason}")


def eager(weight: Tensor, start: Tensor, tau: float, iterations: int, eps: float = 1e-7, zero: bool = False) -> Maps:
    """DKM as the paper writes it, over maps [N, K]; of scalars, one palette. Output and centroids, for autograd."""
    x, c = weight.reshape(-1, 1), start
    for _ in range(iterations):
        attention = torch.softmax(-(x - c).square() / tau, 1).clamp(min=eps)
        c = (attention * x).sum(0) / attention.sum(0)
        if zero:
            c = torch.cat((torch.zeros_like(c[:1]), c[1:]))
    return (attention @ c).view_as(weight), c


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def gaussian(size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return (0.02 * torch.randn(size, generator=torch.Generator().manual_seed(seed))).to(dtype)


SIZES = [2**14, pytest.param(2**20, marks=pytest.mark.full)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("clusters", "iterations"), [*itertools.product((4, 16), (1, 3))])
def test_counted_values_are_exact(size: int, clusters: int, iterations: int) -> None:
    """E1: ``dW_i = G_i slope[bin] + offset[bin]`` is the gradient through all iterations over the maps, in fp64 to 1e-11."""
    weight = gaussian(size)
    upstream = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = ops.kmeans1d(weight, clusters)[0].double()[:, :, 0]
    tau = temperature(start[:, :, None], 0.1)
    leaf = weight.double().requires_grad_()
    out, centroids = eager(leaf, start[0], tau.item(), iterations)
    (gradient,) = torch.autograd.grad(out, leaf, upstream)

    bins = bins_of(weight)
    values, counts = bin_values(weight.dtype).double(), ops.histogram16(weight)[None]
    table, path, status = ops.dkm_tables(values, counts, start, tau, iterations=iterations)
    sums = ops.scatter16(weight, upstream)[None]
    slope, offset, _ = clustering.dkm_tables_backward(
        sums, values, counts, path, status, tau, 1e-7, False, 0.0, False, "unroll"
    )
    assert relative(table[0, bins], out.detach()) <= 1e-11
    assert relative(path[-1, 0], centroids.detach()) <= 1e-11
    assert relative(slope[0, bins] * upstream + offset[0, bins], gradient) <= 1e-11


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_exact_up_to_their_rounding(dtype: torch.dtype, zero: bool, size: int) -> None:
    weight = gaussian(size, dtype)
    upstream = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    start = ops.kmeans1d(weight, 8)[0]
    tau = temperature(start, 0.1)
    exact_leaf, leaf = weight.double().requires_grad_(), weight.clone().requires_grad_()
    exact, _ = eager(exact_leaf, start.double()[0, :, 0], tau.item(), 3, zero=zero)
    (exact_gradient,) = torch.autograd.grad(exact, exact_leaf, upstream.double())
    out = ops.dkm(leaf, start, tau=tau, enforce_zero=zero).output
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    # The attention of fp32 weights is fp32. Seen, output and gradient: AVX-512 2e-6 and 9e-6, no vector instructions
    # 1e-5 and 3.1e-5; plain torch, which also sums in fp32, 2.1e-5 and 6.7e-5.
    allowed = max(torch.finfo(dtype).eps, 2e-5 if native.STATUS.variant else 5e-5)
    assert relative(out.detach().double(), exact.detach()) <= allowed
    assert relative(gradient.double(), exact_gradient) <= 3 * allowed


def spectral_radius(values: Tensor, counts: Tensor, c: Tensor, tau: Tensor) -> float:
    there = counts.nonzero().flatten()
    rules = clustering.Rules(1e-7, False, 0.0, False)
    jacobian = clustering._jacobian(values[there, None], counts[there].double(), c[:, None], tau, rules)
    return torch.linalg.eigvals(jacobian).abs().max().item()


@pytest.mark.parametrize("clusters", [4, 8])
def test_implicit_gradient_is_that_of_an_unroll_from_the_fixed_point(clusters: int) -> None:
    """To 1e-6 where the spectral radius is at most 0.95: an unroll of T iterations is off by its T-th power."""
    weight = gaussian(2**14)
    values, counts = bin_values(weight.dtype).double(), ops.histogram16(weight)[None]
    sums = torch.randn(counts.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * counts
    start = ops.kmeans1d(weight, clusters)[0].double()[:, :, 0]
    iterations, found = 400, None
    for rho in (0.3, 0.2, 0.5, 0.15, 0.1, 0.05, 1.0):
        tau = temperature(start[:, :, None], rho)
        _, path, status = ops.dkm_tables(values, counts, start, tau, grad="implicit", resolution=2**-8)
        radius = spectral_radius(values, counts[0], path[-1, 0], tau[0])
        if status.item() == 0 and radius <= 0.95:
            found = tau, path, status
            break
    assert found is not None, "no temperature with a radius of at most 0.95"
    tau, path, status = found

    def offsets(way: Tensor, state: Tensor, mode: str) -> Tensor:
        rules = (1e-7, False, 0.0, False)
        return clustering.dkm_tables_backward(sums, values, counts, way, state, tau, *rules, mode)[1]

    implicit = offsets(path, status, "implicit")
    _, long, _ = ops.dkm_tables(values, counts, path[-1], tau, iterations=iterations)
    unrolled = offsets(long, status, "unroll")
    _, short, _ = ops.dkm_tables(values, counts, path[-1], tau, iterations=3)
    truncated = offsets(short, status, "unroll")
    assert relative(long[-1], path[-1]) <= 1e-10
    assert relative(implicit, unrolled) <= 1e-6
    assert relative(truncated, unrolled) >= 0.1  # and what the paper's three iterations leave out is not small


@compiled
@pytest.mark.parametrize("grad", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, grad: str) -> None:
    weight = gaussian(600_000, dtype)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    size = 600_000 if grad != "implicit" or dtype == torch.bfloat16 else 150_000
    weight, upstream = weight[:size], upstream[:size]
    start = ops.kmeans1d(weight, 8)[0]

    def run() -> list[Tensor]:
        leaf = weight.clone().requires_grad_()
        out, centroids, _ = ops.dkm(leaf, start, rho=0.1, grad=grad)
        return [bits(t) for t in (out, centroids, *torch.autograd.grad(out, leaf, upstream))]

    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_backward_keeps_the_weight_and_the_centroids_alone() -> None:
    weight = gaussian(1 << 16).view(256, 256).requires_grad_()
    start = ops.kmeans1d(weight.detach(), 16)[0]
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = ops.dkm(weight, start, rho=0.1).output
    saved.pop(weight.untyped_storage().data_ptr())
    assert sum(saved.values()) <= 1024
    out.sum().backward()


# --------------------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("grad", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_weights_alike(dtype: torch.dtype, grad: str) -> None:
    weight = torch.full((64, 200), 0.3, dtype=dtype)
    centroids, inertia = ops.kmeans1d(weight, 4)
    assert centroids.flatten().tolist() == [weight[0, 0].item()] * 4 and inertia.item() == 0
    leaf = weight.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = ops.dkm(leaf, centroids, rho=0.1, grad=grad).output
    torch.testing.assert_close(out, weight, rtol=max(torch.finfo(dtype).eps, 1e-3), atol=0)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert gradient.isfinite().all()


def test_fewer_values_than_clusters_are_an_exact_palette() -> None:
    weight = torch.tensor([0.0, 1.0, 3.0], dtype=torch.bfloat16).repeat(5)
    centroids, inertia = ops.kmeans1d(weight, 8)
    assert centroids.flatten().tolist() == [0.0, 1.0, *[3.0] * 6] and inertia.item() == 0
    assert torch.equal(ops.dkm(weight, centroids, rho=0.001, eps=0.0).output, weight)


@pytest.mark.parametrize("grad", GRADIENTS)
def test_duplicate_centroids_are_no_obstacle(grad: str) -> None:
    weight = gaussian(4096).requires_grad_()
    start = torch.tensor([[[-0.02], [0.0], [0.0], [0.02]]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, centroids, _ = ops.dkm(weight, start, rho=0.1, grad=grad)
    assert out.isfinite().all() and centroids.isfinite().all()
    (gradient,) = torch.autograd.grad(out.float().square().sum(), weight)
    assert gradient.isfinite().all()


def test_an_empty_cluster_stays_or_drifts_to_the_mean() -> None:
    weight = torch.tensor([0.0, 0.1, 0.2, 0.3])
    start = torch.tensor([[[0.0], [0.3], [50.0]]])
    assert ops.dkm(weight, start, tau=0.01, eps=0.0).centroids[0, 2, 0].item() == 50
    assert ops.dkm(weight, start, tau=0.01, eps=1e-7).centroids[0, 2, 0].item() == pytest.approx(0.15)


def test_zeros_of_both_signs_and_denormal_numbers() -> None:
    tiny = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 6e-39], dtype=torch.bfloat16)
    weight = torch.cat((tiny, gaussian(10_000)))
    start = ops.kmeans1d(weight, 4)[0]
    out = ops.dkm(weight, start, rho=0.1).output
    assert out.isfinite().all() and torch.equal(bits(out[0].abs()), bits(out[1].abs()))
    labels, _ = ops.palettize(weight, start)
    assert labels[:5].unique().numel() == 1


def test_pinned_zero_keeps_pruned_weights() -> None:
    weight = gaussian(10_000)
    weight[::3] = 0
    start = torch.cat((torch.zeros(1, 1, 1), ops.kmeans1d(weight, 3)[0]), 1)
    sparse = ops.dkm(weight, start, rho=0.05, enforce_zero=True, keep_sparsity=True, forward="hard_ste")
    assert (sparse.output == 0).equal(weight == 0) and sparse.centroids[0, 0, 0] == 0
    pruned = ops.dkm(weight, start, rho=0.05, enforce_zero=True, prune_threshold=1e-4, forward="hard_ste")
    plain = ops.dkm(weight, start, rho=0.05, enforce_zero=True, forward="hard_ste")
    assert int((pruned.output == 0).sum()) > int((plain.output == 0).sum()) > int((weight == 0).sum())


@pytest.fixture
def forgetful() -> Iterator[None]:
    """The warnings are given once per process."""
    before = set(clustering._warned)
    clustering._warned.clear()
    yield
    clustering._warned.clear()
    clustering._warned.update(before)


@pytest.mark.usefixtures("forgetful")
def test_below_the_floor_of_temperature_the_gradient_is_jacobian_free_and_said_once() -> None:
    weight = gaussian(2**14).requires_grad_()
    start = ops.kmeans1d(weight.detach(), 16)[0]
    with pytest.warns(
        UserWarning, match="^dkm: the temperature is below the floor .* Jacobian-free gradient .said once.$"
    ):
        cold = ops.dkm(weight, start, rho=0.001, grad="implicit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.dkm(weight, start, rho=0.001, grad="implicit")
    assert cold.status.tolist() == [1]
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (gradient,) = torch.autograd.grad(cold.output, weight, upstream)
    tau = temperature(start, 0.001)
    free = ops.dkm(weight, start, tau=tau, grad="jfb", iterations=50)
    assert torch.equal(bits(cold.output), bits(free.output))
    assert torch.equal(bits(gradient), bits(torch.autograd.grad(free.output, weight, upstream)[0]))


def test_temperature_is_free_of_scale() -> None:
    weight = gaussian(20_000, torch.float32)
    start = ops.kmeans1d(weight, 8)[0]
    one, big = ops.dkm(weight, start, rho=0.1).output, ops.dkm(1024 * weight, 1024 * start, rho=0.1).output
    assert torch.allclose(1024 * one, big, rtol=1e-5)


def test_hard_output_is_what_will_be_stored() -> None:
    weight = gaussian(20_000)
    start = ops.kmeans1d(weight, 8)[0]
    out, centroids, _ = ops.dkm(weight, start, rho=0.1, forward="hard_ste")
    labels, _ = ops.palettize(weight, centroids)
    assert torch.equal(out, centroids[0, labels.int(), 0].bfloat16())


def test_second_derivatives_are_refused_with_the_reason() -> None:
    weight = gaussian(64, torch.float32).requires_grad_()
    out = ops.dkm(weight, ops.kmeans1d(weight.detach(), 4)[0], rho=0.1).output
    (gradient,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="^dkm: there are no second derivatives of differentiable k-means: no step"):
        gradient.sum().backward()


def test_inductor_and_the_kernel_agree_on_a_whole_layer() -> None:
    weight, x = gaussian(64 * 32, torch.float32).view(64, 32).requires_grad_(), torch.randn(5, 32)
    start = ops.kmeans1d(weight.detach(), 4)[0]

    def layer(w: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, ops.dkm(w, start, rho=0.1).output).square().sum()

    compiled = torch.compile(layer, fullgraph=True)
    (plain,) = torch.autograd.grad(layer(weight), weight)
    (fused,) = torch.autograd.grad(compiled(weight), weight)
    torch.testing.assert_close(fused, plain)


@compiled
def test_reference_and_kernel_find_the_same_fixed_point() -> None:
    weight = gaussian(20_000)
    start = ops.kmeans1d(weight, 16)[0]
    args = (weight, start, temperature(start, 0.1), weight.numel(), 3, 1e-7, False, 0.0, False, "soft", "implicit")
    _, path, status = torch.ops.cofire.dkm(*args)
    _, expected, expected_status = clustering._dkm_reference(*args)
    assert status.tolist() == expected_status.tolist() == [0]
    assert relative(path[-1], expected[-1]) <= 1e-11 and math.isfinite(path.sum().item())


def test_a_group_may_be_larger_than_any_tensor() -> None:
    weight, size = gaussian(300, torch.float32), 2**63 - 1
    centroids, inertia = ops.kmeans1d(weight, 4, group_size=size)
    assert torch.equal(centroids, ops.kmeans1d(weight, 4)[0]) and inertia.shape == (1,)
    assert torch.equal(ops.palettize(weight, centroids, group_size=size)[0], ops.palettize(weight, centroids)[0])
    one, other = (ops.dkm(weight, centroids, rho=0.1, group_size=g).output for g in (size, None))
    assert torch.equal(one, other)


@pytest.mark.parametrize("size", [64, 20_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_number_of_refused_values_is_that_of_all_partitions(dtype: torch.dtype, size: int) -> None:
    weight = gaussian(4 * size, dtype)
    weight[[3, size + 1, size + 2]] = torch.nan
    weight[-1] = torch.inf
    start = torch.linspace(-0.04, 0.04, 4).expand(4, 4)[:, :, None]
    calls = {
        "dkm": lambda: ops.dkm(weight, start, rho=0.1, group_size=size),
        "kmeans1d": lambda: ops.kmeans1d(weight, 4, group_size=size),
        "palettize": lambda: ops.palettize(weight, start, group_size=size),
    }
    for name, call in calls.items():
        for count in (1, 2):
            with threads(count), pytest.raises(ValueError, match=f"^{name}: .* got 3 NaN and 1 infinite values$"):
                call()


@pytest.mark.parametrize("repeats", [1, 600])  # by weight and by value
@pytest.mark.parametrize("grad", ["unroll", "jfb"])
def test_hard_output_is_what_will_be_stored_where_centroids_are_almost_equally_near(grad: str, repeats: int) -> None:
    """The palette that is stored is fp32: the nearest of its centroids is chosen, not of those before the rounding."""
    rand = torch.Generator().manual_seed(0)
    for tau in (1e-4, 1e-3, 0.1) * (400 if repeats == 1 else 40):
        weight = torch.randint(-8, 9, (20,), generator=rand).div(8).bfloat16().repeat(repeats)
        start = torch.randint(-8, 9, (1, 3, 1), generator=rand) / 8
        out, centroids, _ = ops.dkm(weight, start, tau=tau, eps=0.0, iterations=1, grad=grad, forward="hard_ste")
        labels, _ = ops.palettize(weight, centroids)
        assert torch.equal(out, centroids[0, labels.int(), 0].bfloat16())


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_centroids_that_are_no_numbers_are_no_fixed_point(dtype: torch.dtype) -> None:
    start = torch.full((1, 4, 1), torch.nan)
    with pytest.warns(UserWarning, match="^dkm: Newton's method found no fixed point"):
        found = ops.dkm(gaussian(9000, dtype), start, tau=0.1, grad="implicit")
    assert found.status.tolist() == [2] and found.output.isnan().all()


def test_values_of_bins_do_not_remember_who_asked_first() -> None:
    expected = bits(bin_values(torch.float16))
    with torch.inference_mode():
        bin_values(torch.float16).zero_()
    with torch.device("meta"):
        assert bin_values(torch.float16).device.type == "cpu"
    bin_values(torch.float16).zero_()
    values = bin_values(torch.float16)
    assert torch.equal(bits(values), expected)
    counts = torch.zeros(1, 65536, dtype=torch.int32)
    counts[0, 40_000:40_009] = 1
    start = values[[40_001, 40_006]][None].requires_grad_()
    ops.dkm_tables(values, counts, start, 0.1)[0].sum().backward()  # saves the values: no inference tensor


def test_optimal_inertia_is_that_of_the_weights() -> None:
    """Also where weights that stay together are not one number, and where they are far from zero for their spread."""
    rand = torch.Generator().manual_seed(0)
    together = 1 + torch.rand(9000, generator=rand) / 256  # one leading pattern, fewer than clusters
    far = 1 + torch.randint(0, 40, (500,), generator=rand) * 2.0**-23
    apart = far.double() - 1
    for clusters in (2, 4, 8):
        centroids, inertia = ops.kmeans1d(together, clusters)
        distance = (together.double()[:, None] - centroids[0, :, 0].double()).square().amin(1).sum()
        torch.testing.assert_close(inertia[0].double(), distance, rtol=1e-5, atol=0)
        _, expected = ops.kmeans1d(apart.float(), clusters)
        torch.testing.assert_close(ops.kmeans1d(far, clusters)[1], expected, rtol=1e-5, atol=0)


def test_little_attention_is_not_none() -> None:
    """A cluster is empty where its attention is zero in fp32 too: with 2^-117 it is not, as by the reference."""
    weight, start = torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.bfloat16), torch.tensor([[[0.0], [9.0]]])
    found = ops.dkm(weight, start, tau=1.0, eps=0.0, iterations=1).centroids
    args = (weight, start, torch.ones(1), 4, 1, 0.0, False, 0.0, False, "soft", "unroll")
    torch.testing.assert_close(found.double(), clustering._dkm_reference(*args)[1][-1], rtol=1e-5, atol=0)
