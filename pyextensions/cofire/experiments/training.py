# SPDX-License-Identifier: Apache-2.0
"""The training loop, and what it reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.data import Images
from cofire.methods import Method

Advance = Callable[[str], None]  #: called after each epoch with what is being trained
Optimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class Examples(Protocol):
    """What can be trained on: images with labels, for one."""

    @property
    def train(self) -> Sized: ...

    def batches(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Any, Tensor]]:
        """An epoch of inputs, one tensor or a tuple of all arguments, and targets; none of fewer than two examples."""


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """SGD with momentum 0.9."""
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW in one kernel per step."""
    return torch.optim.AdamW(groups, fused=True)


def fit(
    model: nn.Module,
    images: Examples,
    groups: Iterable[Mapping[str, Any]],
    *,
    epochs: int,
    batch: int,
    seed: int,
    method: Method | None = None,
    advance: Advance | None = None,
    make: Optimizer = sgd,
    scheduled: int = 1,
    warm_up: int = 0,
    floor: float = 0.0,
    watch: Callable[[int], None] | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> None:
    """Train; the rates of the first ``scheduled`` parameter groups fall as a cosine, the others' stay.

    Args:
        model, images, epochs, batch, method: what is trained, on what, for how long, and how.
        groups: parameter groups with their rates.
        seed: of the order of the images.
        advance: called after each epoch.
        make: the optimiser.
        scheduled, warm_up, floor: so many groups' rates rise from zero in the first ``warm_up`` steps, and fall to ``floor``
            times their peak.
        watch: called after each step with the number of steps so far.
        criterion: the task's loss, of outputs and targets.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = make([dict(group) for group in groups])
    peaks = [group["lr"] for group in optimizer.param_groups[:scheduled]]
    steps, total = 0, epochs * steps_per_epoch(images, batch)
    for _ in range(epochs):
        model.train()
        for x, y in images.batches(batch, generator):
            share = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * steps / total))
            share *= min(1.0, (steps + 1) / max(warm_up, 1))
            for group, peak in zip(optimizer.param_groups, peaks, strict=False):
                group["lr"] = peak * share
            output = model(*x) if isinstance(x, tuple) else model(x)
            loss = criterion(output, y)
            if method is not None:
                loss = loss + method.loss(model, output, y)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            if method is not None:
                method.step(model)
            steps += 1
            if watch is not None:
                watch(steps)
        if advance is not None:
            advance(f"loss {loss.item():.3f}")


def refuse_heads(method: str, epochs: int | None, head_lr: float | None, training: str) -> None:
    """Raise for no epochs, and for the rate of heads where a method has none; ``training``: what its ``lr`` is of."""
    if epochs is not None and epochs < 1:
        raise ValueError(f"experiment: epochs must be at least 1, got {epochs}")
    if head_lr is not None:
        raise ValueError(f"experiment: {method} has no heads; --lr sets the rate of {training}")


def steps_per_epoch(images: Examples, batch: int) -> int:
    full, rest = divmod(len(images.train), batch)
    return full + (rest > 1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, batch: int = 256) -> float:
    """Per cent of the test images classified correctly."""
    model.eval()
    correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in images.test_batches(batch))
    return 100 * correct / len(images.test_labels)
