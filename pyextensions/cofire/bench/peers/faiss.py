# SPDX-License-Identifier: Apache-2.0
"""faiss: its k-means on all weights (by default it takes a sample of 256 for each centroid), and its search for one neighbour.

It takes fp32. Labels of the search are not compared, their distances are.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._kmeans import LLOYD, inertia, lloyd, quantiles


def _search(weight: Tensor, centroids: Tensor, *_: Any) -> Run:
    faiss = importlib.import_module("faiss")
    d = centroids.shape[2]
    palette = centroids[0].numpy()

    def run() -> tuple[Tensor]:
        faiss.omp_set_num_threads(torch.get_num_threads())
        distance, labels = faiss.knn(weight.float().view(-1, d).numpy(), palette, 1)
        torch.from_numpy(labels).to(torch.uint8)
        return (torch.from_numpy(distance).sum()[None],)

    return run


def _kmeans(weight: Tensor, clusters: int, size: int) -> Run:
    faiss = importlib.import_module("faiss")
    start = quantiles(weight, clusters)[0].numpy()

    def run() -> tuple[Tensor]:
        faiss.omp_set_num_threads(torch.get_num_threads())
        x = weight.float().view(-1, 1).numpy()
        kmeans = faiss.Kmeans(1, clusters, niter=LLOYD, max_points_per_centroid=len(x), min_points_per_centroid=1)
        kmeans.train(x, init_centroids=start)
        return (torch.from_numpy(kmeans.centroids).sort(0).values[None],)

    return run


def find(case: Case) -> Provider | None:
    if case.op not in ("kmeans1d", "palettize") or case.facts["palette_rows"] is not None:
        return None
    if case.op == "palettize":
        return Provider(_search, reference=inertia, outputs=1)
    return Provider(_kmeans, reference=lloyd, outputs=1)


PEER = Peer("faiss", find, {"faiss": "faiss-cpu"})
