# SPDX-License-Identifier: Apache-2.0
"""Training a language model over characters, and what it reaches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.data import Text
from cofire.experiments.training import Advance
from cofire.methods import Method

WARM_UP = 20  #: steps over which the rate rises


def fit(
    model: nn.Module,
    text: Text,
    *,
    rounds: int,
    steps: int,
    batch: int,
    context: int,
    lr: float,
    weight_decay: float,
    seed: int,
    method: Method | None = None,
    advance: Advance | None = None,
) -> None:
    """Train for ``rounds * steps`` steps of AdamW; the rate rises shortly and then falls to zero as a cosine."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    total = rounds * steps
    model.train()
    for step in range(total):
        rate = lr * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / total))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = text.batch(batch, context, generator)
        output = model(x)
        loss = _loss(output, y)
        if method is not None:
            loss = loss + method.loss(model, output, y)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if method is not None:
            method.step(model)
        if advance is not None and (step + 1) % steps == 0:
            advance(f"{loss.item() / math.log(2):.2f} bits per character")


def _loss(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction=reduction)


@torch.no_grad()
def bits_per_character(model: nn.Module, text: Text, *, context: int, windows: int, batch: int = 32) -> float:
    """Mean of the negative binary logarithm of the probability that the model gives to the next character."""
    model.eval()
    total, count = 0.0, 0
    for x, y in text.test_batches(batch, context, windows):
        total += float(_loss(model(x), y, "sum"))
        count += y.numel()
    return total / count / math.log(2)
