# SPDX-License-Identifier: Apache-2.0
"""The training loop, and what it reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cofire.data import Images
from cofire.methods import Method

Advance = Callable[[str], None]  #: called after each epoch with what is being trained


def fit(
    model: nn.Module,
    images: Images,
    groups: Iterable[Mapping[str, Any]],
    *,
    epochs: int,
    batch: int,
    seed: int,
    method: Method | None = None,
    advance: Advance | None = None,
) -> None:
    """Train by SGD with momentum 0.9; the first parameter group's rate falls to zero as a cosine, the others' stay."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([dict(group) for group in groups], momentum=0.9, nesterov=True)
    peak = optimizer.param_groups[0]["lr"]
    steps, total = 0, epochs * steps_per_epoch(images, batch)
    for _ in range(epochs):
        model.train()
        for x, y in images.batches(batch, generator):
            optimizer.param_groups[0]["lr"] = peak * 0.5 * (1 + math.cos(math.pi * steps / total))
            output = model(x)
            loss = F.cross_entropy(output, y)
            if method is not None:
                loss = loss + method.loss(model, output, y)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            if method is not None:
                method.step(model)
            steps += 1
        if advance is not None:
            advance(f"loss {loss.item():.3f}")


def steps_per_epoch(images: Images, batch: int) -> int:
    full, rest = divmod(len(images.train), batch)
    return full + (rest > 1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, batch: int = 256) -> float:
    """Per cent of the test images classified correctly."""
    model.eval()
    correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in images.test_batches(batch))
    return 100 * correct / len(images.test_labels)
