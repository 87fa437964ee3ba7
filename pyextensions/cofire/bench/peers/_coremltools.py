# SPDX-License-Identifier: Apache-2.0
"""coremltools' layer of differentiable k-means, and its k-means."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Run
from cofire.bench.peers._kmeans import EPS, LLOYD, quantiles


def palettizer(weight: Tensor, centroids: Tensor, tau: float, rows: int | None, iterations: int) -> Any:
    """coremltools' layer for such a weight, with its own shortcuts off: every iteration, no threshold for zero."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    layer = importlib.import_module("coremltools.optimize.torch.palettization.fake_palettize")
    observer = importlib.import_module("torch.ao.quantization").MinMaxObserver
    options = {
        "palett_tau": tau,
        "kmeans_max_iter": iterations,
        "palett_epsilon": -1.0,  # an inertia changes by more than this
        "palett_cluster_tol": 1.0,  # equal centroids stay
        "prune_threshold": 0.0,
        "zero_threshold": EPS,
    }
    bits = centroids.shape[1].bit_length() - 1
    made = layer.FakePalettize(
        observer=observer.with_args(dtype=torch.qint8),
        n_bits=bits,
        cluster_dim=1,
        group_size=rows,
        quant_min=-128,
        quant_max=127,
        advanced_options=options,
    )
    made.enable_fake_palett()
    made.train()
    made.create_partitions(weight.detach())
    return made


def dkm(dtype: torch.dtype) -> Callable[..., Run]:
    def setup(weight: Tensor, centroids: Tensor, tau: Tensor, size: int, iterations: int, *_: Any) -> Run:
        made = palettizer(weight, centroids, float(tau[0]), None, iterations)
        start = [c.to(dtype) for c in centroids]

        def run() -> Tensor:
            made.centroids = list(start)  # the layer goes on from where it was
            output: Tensor = made(weight.to(dtype))
            return output.to(weight.dtype)

        return run

    return setup


def kmeans(weight: Tensor, clusters: int, size: int) -> Run:
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    module = importlib.import_module("coremltools.optimize.torch.palettization._efficient_kmeans")
    x = weight.float().view(-1, 1)
    start = quantiles(weight, clusters)[0]
    labels = torch.bucketize(x[:, 0], (start[1:, 0] + start[:-1, 0]) / 2)

    def run() -> tuple[Tensor]:
        kmeans = module._EfficientKMeans(clusters, start, labels=labels, max_iter=LLOYD, tol=-1.0)
        found: Tensor = kmeans.fit(x).cluster_centers_
        return (found[None],)

    return run
