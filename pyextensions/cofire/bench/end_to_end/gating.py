# SPDX-License-Identifier: Apache-2.0
"""Convolutional networks that compute only the channels each image needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cofire import models
from cofire.bench.cases import Random
from cofire.bench.end_to_end import digits
from cofire.bench.end_to_end.dense import BFLOAT16, half, half_variant
from cofire.bench.end_to_end.network import DENSE, RANDOM_WEIGHTS, Network, Variant, in_double, weight_bytes
from cofire.experiments import training
from cofire.experiments.latency import _channels_last, _prepacked
from cofire.methods import FTWT
from cofire.models.vgg import VGG16
from cofire.nn.gating import Gated

#: A gate at the border may open or close by a rounding of its head's logits.
SHARE = 0.9


class ChannelsLast(nn.Module):
    """A network in torch's layout for convolutions, the channels of a pixel side by side."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        return output


def forms(dense: nn.Module, gated: nn.Module, method: FTWT, example: Tensor, kept: str) -> dict[str, Variant]:
    """The dense network with batch norm folded, in several forms, and the gated one.

    The gated one must compute what its trained form does: every channel, and the mask.
    """
    folded = method.dense(method.prepare(dense))
    found = {
        DENSE: Variant(folded),
        "dense, channels_last": Variant(ChannelsLast(_channels_last(folded)), folded, 1e-3),
    }
    packed = _prepacked(folded, example)
    if packed is not None:
        found["dense, packed by oneDNN"] = Variant(
            ChannelsLast(packed), folded, 1e-3, weight_bytes=weight_bytes(folded), devices=("cpu",)
        )
    found[f"{BFLOAT16}, channels_last"] = half_variant(ChannelsLast(_channels_last(half(folded))), folded)
    deployed = method.finalize(gated)
    found[f"gated, {kept}"] = Variant(deployed, in_double(gated), 1e-3, SHARE)
    found[f"gated, {kept}, channels_last"] = Variant(
        ChannelsLast(_channels_last(deployed)), in_double(gated), 1e-3, SHARE
    )
    return found


def trained(
    layers: Sequence[int | str] = (32, "pool", 128, 256, 256), size: int = 24, epochs: tuple[int, int] = (4, 6),
    *, batch: int = 16, images: int | None = None, mass: float = 0.8, throughput: int = 32,
) -> Network:  # fmt: skip
    """Trained dense on the digits, then with gates."""

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        found = digits.load(size, images)
        dense_epochs, gated_epochs = (max(1, round(share * n)) for n in epochs)
        torch.manual_seed(seed)
        dense = models.vgg(layers, in_channels=1)
        groups = [{"params": dense.parameters(), "lr": 0.02, "weight_decay": 5e-4}]
        training.fit(dense, found, groups, epochs=dense_epochs, batch=batch, seed=seed)
        steps = training.steps_per_epoch(found, batch) * gated_epochs
        method = FTWT(mass=mass, cooldown=0.7, total_steps=steps)
        gated = method.prepare(dense)
        groups = method.parameter_groups(gated, lr=0.01, head_lr=30.0)
        training.fit(gated, found, groups, epochs=gated_epochs, batch=batch, seed=seed, method=method)
        gains = method.report(gated, [found.normalize(found.test[:128])])
        kept = f"{gains.kept:.0%} of the channels"
        return forms(dense.eval(), gated.eval(), method, found.normalize(found.test[:1]), kept)

    return Network(
        family="gating",
        name=f"VGG-like, {' '.join(map(str, layers))}, {size}x{size} pixels",
        data=digits.DATA,
        build=build,
        inputs=lambda n: digits.first(n, size),
        unit="images/s",
        batch=throughput,
        latency_of="one image",
        evaluate=lambda model: training.accuracy(model, digits.load(size)),
        accuracy_kind=digits.KIND,
    )


def random(layers: Sequence[int | str] = VGG16, size: int = 32, *, share: float = 0.5, throughput: int = 16) -> Network:
    """All layers but the first gated to a share of their channels."""

    def build(seed: int, _: float) -> Mapping[str, Variant]:
        torch.manual_seed(seed)
        dense = models.vgg(layers).eval()
        method = FTWT(mass=0.95)
        gated = method.prepare(dense).eval()
        _open(gated, share, inputs(32))
        return forms(dense, gated, method, inputs(1), f"{share:.0%} of the channels")

    def inputs(n: int) -> Tensor:
        return Random("images").normal(n, 3, size, size)

    return Network(
        family="gating",
        name=f"VGG of {sum(isinstance(x, int) for x in layers)} convolutions, {size}x{size} pixels",
        data=RANDOM_WEIGHTS,
        build=build,
        inputs=inputs,
        unit="images/s",
        batch=throughput,
        latency_of="one image",
    )


@torch.no_grad()
def _open(gated: nn.Module, share: float, images: Tensor) -> None:
    """Random heads that open each channel for so many of the images: each image has channels of its own."""
    generator = torch.Generator().manual_seed(0)

    def fit(gate: Gated, args: tuple[Tensor, ...]) -> None:
        head = gate.head
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.bias.zero_()
        head.bias.copy_(-head(args[0]).logits.quantile(1 - share, dim=0))

    hooks = [m.register_forward_pre_hook(fit) for m in gated.modules() if isinstance(m, Gated)]
    try:
        gated(images)
    finally:
        for hook in hooks:
            hook.remove()


NETWORKS = [trained(), random()]
