# SPDX-License-Identifier: Apache-2.0
"""coremltools (Apple): the layer of its DKMPalettizer, and the Lloyd iterations of its k-means.

The layer's own shortcuts are off: every iteration, no threshold for zero. The k-means begins with labels: its own start,
ten trials of k-means++, takes a minute. Cases that would take long are left out, with a word on why.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cofire.bench.cases import Case, Provider
from cofire.bench.peers import Peer
from cofire.bench.peers._coremltools import dkm, kmeans
from cofire.bench.peers._kmeans import cdist_dkm, lloyd

ENTRIES = 1 << 26  #: of the maps of all iterations, at most: half a minute each otherwise
CLUSTERS = 16  #: of the k-means, at most: it makes a map of all weights by all clusters, ten times


def find(case: Case) -> Provider | Mapping[str, Provider] | None:
    f = case.facts
    if case.op == "kmeans1d" and f["palette_rows"] is None:
        return Provider(kmeans, reference=lloyd, outputs=1)
    if case.op != "dkm" or f["grad"] != "unroll" or f["d"] != 1 or f["palette_rows"] is not None:
        return None
    if f["clusters"] & (f["clusters"] - 1):
        return None
    dtypes = {"fp32": torch.float32} | ({} if case.dtype == torch.float32 else {"own dtype": case.dtype})
    return {name: Provider(dkm(dtype), reference=cdist_dkm, outputs=1) for name, dtype in dtypes.items()}


def left_out(case: Case) -> str | None:
    f = case.facts
    if case.op == "kmeans1d" and f["clusters"] > CLUSTERS:
        return f"it makes a map of all weights by {f['clusters']} clusters, ten times; timed with at most {CLUSTERS}"
    if case.op == "dkm" and f["entries"] > ENTRIES:
        return (
            f"its maps would have {f['entries']:,} entries; timed with at most {ENTRIES:,}, as more take half a minute"
        )
    return None


PEER = Peer("coremltools", find, {"coremltools": "coremltools"}, left_out=left_out)
