# SPDX-License-Identifier: Apache-2.0
"""The gradient of clustering that flows through the centroids, compared between the ways to take it.

A soft weight depends on the weight itself and on the centroids, which depend on all weights. The first part is the same for
all; the second is exact where the centroids are a fixed point and the gradient is that of the fixed point. Here this truth
comes from 500 unrolled iterations in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import ops
from cofire.nn.clustering import Palettized
from cofire.ops.clustering import mean_gap

#: Iterations of the truth, and of the unrolled gradient as it is used.
TRUTH, USED = 500, 3


def centroid_path(
    dense: nn.Module, prepared: nn.Module, batch: tuple[Tensor, Tensor], rhos: Iterable[float]
) -> list[dict[str, Any]]:
    """Cosine, norm ratio and relative error of the implicit, the Jacobian-free and the short unrolled gradient.

    Args:
        dense: the trained network.
        prepared: the same with palettized layers, whose palettes are where the comparison starts.
        batch: inputs and classes; the gradient by the soft weights is that of the cross entropy.
        rhos: temperatures in units of the squared mean gap between the centroids.

    Returns:
        One row per layer and temperature. ``residual`` is the largest movement of a centroid in another update of the truth,
        ``apart`` how far the centroids of each way are from the truth's, both over the largest centroid;
        ``status`` is 0, or says why the implicit gradient does without its linear system.
    """
    layers = {name: m for name, m in prepared.named_modules() if isinstance(m, Palettized)}
    return [_layer(dense, name, layer, batch, rho) for name, layer in layers.items() for rho in rhos]


def _layer(dense: nn.Module, name: str, layer: Palettized, batch: tuple[Tensor, Tensor], rho: float) -> dict[str, Any]:
    weight, start = layer.weight.detach(), layer.palette.centroids.detach()
    tau = rho * mean_gap(start).square()
    with torch.no_grad():
        soft = _run(weight, start, tau, USED, "unroll").output
    upstream = _loss_gradient(dense, f"{name}.weight", soft, batch)

    truth, fixed, _ = _through_centroids(
        weight.double(), start.double(), tau.double(), upstream.double(), TRUTH, "unroll"
    )
    with torch.no_grad():
        again = _run(weight.double(), fixed, tau.double(), 1, "unroll").centroids
    row: dict[str, Any] = {"layer": name, "clusters": start.shape[1], "weights": weight.numel(), "rho": rho}
    row["residual"] = float((again - fixed).abs().max() / fixed.abs().max())
    for label, grad in (("implicit", "implicit"), ("jfb", "jfb"), (f"unroll {USED}", "unroll")):
        found, centroids, status = _through_centroids(weight, start, tau, upstream, USED, grad)
        row[label] = compare(found, truth)
        row[label]["apart"] = float((centroids - fixed).abs().max() / fixed.abs().max())
        row[label]["status"] = int(status)
    return row


def _run(weight: Tensor, start: Tensor, tau: Tensor, iterations: int, grad: str) -> Any:
    return ops.dkm(weight, start, tau=tau, iterations=iterations, grad=grad)


def _through_centroids(
    weight: Tensor, start: Tensor, tau: Tensor, upstream: Tensor, iterations: int, grad: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole gradient less the part at fixed centroids (fp64), the centroids, and what :func:`cofire.ops.dkm` says."""
    leaf = weight.clone().requires_grad_()
    clustered = _run(leaf, start, tau, iterations, grad)
    (whole,) = torch.autograd.grad(clustered.output, leaf, upstream)
    centroids = clustered.centroids.detach()
    x = weight.double().flatten().requires_grad_()
    c = centroids.double().flatten()
    attention = torch.softmax(-(x[:, None] - c).square() / tau.double(), 1)
    (direct,) = torch.autograd.grad(attention @ c, x, upstream.double().flatten())
    return whole.double().flatten() - direct, centroids, clustered.status


def _loss_gradient(dense: nn.Module, name: str, value: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of the loss, by the weight ``name``, where it is ``value``."""
    leaf = value.detach().clone().requires_grad_()
    dense.eval()
    output = torch.func.functional_call(dense, {name: leaf}, (batch[0],))
    (grad,) = torch.autograd.grad(F.cross_entropy(output, batch[1]), leaf)
    return grad


def compare(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Cosine, ratio of the norms, and norm of the difference over that of the truth."""
    scale = float(truth.norm())
    if scale == 0:
        return {"cosine": math.nan, "norm_ratio": math.nan, "error": math.nan}
    size = float(found.norm())
    cosine = float(found @ truth) / (size * scale) if size else 0.0
    return {"cosine": cosine, "norm_ratio": size / scale, "error": float((found - truth).norm()) / scale}
