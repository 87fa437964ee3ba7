# SPDX-License-Identifier: Apache-2.0
"""What peers of the clustering operators compute, in plain torch.

coremltools expands the squared distance: its rounding is that of ``torch.cdist``. Lloyd's iterations end in a local
optimum where :func:`cofire.ops.kmeans1d` finds the global one; all of them start at the same quantiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cofire.ops import clustering as ops

EPS = 1e-7
LLOYD = 10  #: iterations


def quantiles(weight: Tensor, clusters: int, partitions: int = 1) -> Tensor:
    """Centroids ``[P, K, 1]`` with equally many weights around each: near the optimum, at no cost."""
    ordered = weight.float().reshape(partitions, -1).sort(1).values
    place = ((torch.arange(clusters) + 0.5) / clusters * ordered.shape[1]).long()
    return ordered[:, place, None].contiguous()


def cdist_dkm(
    weight: Tensor, centroids: Tensor, tau: Tensor, group_size: int, iterations: int, eps: float, *options: Any
) -> tuple[Tensor]:
    """DKM with the squared distance multiplied out, as ``torch.cdist`` has it: what coremltools rounds like."""
    partitions, _, d = centroids.shape
    x, c = weight.view(partitions, -1, d), centroids.to(weight.dtype)
    for _ in range(iterations):
        distance = torch.cdist(x, c).square()
        attention = torch.softmax(-distance / tau.to(weight.dtype)[:, None, None], 2).clamp(min=eps)
        c = (attention.mT @ x) / attention.sum(1)[:, :, None]
    return ((attention @ c).view(weight.shape),)


def inertia(weight: Tensor, centroids: Tensor, *args: Any) -> tuple[Tensor]:
    """What a peer is checked on: of two centroids equally near within rounding it may take either."""
    return (ops._palettize_reference(weight, centroids, *args)[1],)


def lloyd(weight: Tensor, clusters: int, size: int) -> tuple[Tensor]:
    """:data:`LLOYD` plain iterations from the quantiles, in the weight's dtype but at least fp32.

    With squared distances multiplied out, as the peers have them: near a boundary they round a weight to either side.
    """
    found = []
    for part in weight.reshape(-1).split(size):
        c = quantiles(part, clusters)[0, :, 0].to(torch.promote_types(weight.dtype, torch.float32))
        chunks = part.to(c.dtype).split(1 << 16)
        for _ in range(LLOYD):
            labels = torch.cat([(c.square() - 2 * x[:, None] * c).argmin(1) for x in chunks])
            total = torch.zeros_like(c).index_add(0, labels, torch.cat(chunks))
            c = total / torch.bincount(labels, minlength=clusters)
        found.append(c[:, None])
    return (torch.stack(found),)
