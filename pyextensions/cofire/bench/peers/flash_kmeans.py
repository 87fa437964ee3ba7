# SPDX-License-Identifier: Apache-2.0
"""flash-kmeans (Triton): its batched k-means, of a batch of one and vectors of one number, from the same start.

It was made for vectors of many numbers. It was not run when this was written.
"""

from __future__ import annotations

import importlib

from torch import Tensor

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._kmeans import LLOYD, lloyd, quantiles


def _kmeans(weight: Tensor, clusters: int, size: int) -> Run:
    fit = importlib.import_module("flash_kmeans").batch_kmeans_Euclid
    start = quantiles(weight, clusters)

    def run() -> tuple[Tensor]:
        _, centroids, _ = fit(weight.float().view(1, -1, 1), clusters, max_iters=LLOYD, tol=0.0, init_centroids=start)
        return (centroids.sort(1).values,)

    return run


def find(case: Case) -> Provider | None:
    if case.op != "kmeans1d" or case.facts["palette_rows"] is not None:
        return None
    return Provider(_kmeans, reference=lloyd, outputs=1)


PEER = Peer("flash-kmeans", find, {"flash_kmeans": "flash-kmeans"}, devices=("cuda",))
