# SPDX-License-Identifier: Apache-2.0
"""scikit-learn: Lloyd's k-means, from the same start and for as many iterations."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._kmeans import LLOYD, lloyd, quantiles


def _kmeans(weight: Tensor, clusters: int, size: int) -> Run:
    module = importlib.import_module("sklearn.cluster")
    start = quantiles(weight, clusters)[0].numpy()

    def run() -> tuple[Tensor]:
        kmeans = module.KMeans(clusters, init=start, n_init=1, max_iter=LLOYD, tol=0, algorithm="lloyd")
        return (torch.from_numpy(kmeans.fit(weight.float().view(-1, 1).numpy()).cluster_centers_)[None].float(),)

    return run


def find(case: Case) -> Provider | None:
    if case.op != "kmeans1d" or case.facts["palette_rows"] is not None:
        return None
    return Provider(_kmeans, reference=lloyd, outputs=1)


PEER = Peer("sklearn", find, {"sklearn": "scikit-learn"})
