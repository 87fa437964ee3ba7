# SPDX-License-Identifier: Apache-2.0
"""coremltools (Apple): the layer of its DKMPalettizer, and the Lloyd iterations of its k-means.

The layer's own shortcuts are off: every iteration, no threshold for zero. The k-means begins with labels: its own start,
ten trials of k-means++, takes a minute.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from cofire.bench.cases import Case, Provider, Run
from cofire.bench.peers import Peer
from cofire.bench.peers._coremltools import dkm
from cofire.bench.peers._kmeans import LLOYD, cdist_dkm, lloyd, quantiles

ENTRIES = 1 << 26  #: of the maps of all iterations, at most: half a minute each otherwise


def _kmeans(weight: Tensor, clusters: int, size: int) -> Run:
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


def find(case: Case) -> Provider | Mapping[str, Provider] | None:
    f = case.facts
    if case.op == "kmeans1d" and f["palette_rows"] is None and f["clusters"] <= 16:  # it makes a map, ten times
        return Provider(_kmeans, reference=lloyd, outputs=1)
    if case.op != "dkm" or f["grad"] != "unroll" or f["d"] != 1 or f["palette_rows"] is not None:
        return None
    if f["entries"] > ENTRIES or f["clusters"] & (f["clusters"] - 1):
        return None
    dtypes = {"fp32": torch.float32} | ({} if case.dtype == torch.float32 else {"own dtype": case.dtype})
    return {name: Provider(dkm(dtype), reference=cdist_dkm, outputs=1) for name, dtype in dtypes.items()}


PEER = Peer("coremltools", find, {"coremltools": "coremltools"})
