# SPDX-License-Identifier: Apache-2.0
"""What a network of this part of the suite is: how it is built, what it gets, what it must compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from cofire.bench.cases import Run
from cofire.experiments.quantize import Decoded
from cofire.methods.base import replace_modules
from cofire.nn import Compressed, PackedPalettizedEmbedding, PackedPalettizedLinear, QuantLinear

__all__ = [
    "DENSE",
    "Call",
    "Network",
    "Variant",
    "compressed",
    "decoded",
    "disagreement",
    "in_double",
    "is_dense",
    "one_pass",
    "weight_bytes",
]

DENSE = "dense"  #: the variant that the others are compared with
RANDOM_WEIGHTS = "random weights: speed only"
MOST = 0.5  #: how far an output may be off that another decision led to, in units of the largest output


@dataclass(frozen=True)
class Variant:
    """One form of a network."""

    model: nn.Module  #: as it is deployed
    #: What must come out, by a network that computes it in another way; None: nobody knows better.
    reference: nn.Module | None = None
    tolerance: float = 1e-4  #: the largest difference, in units of the largest output
    #: The share of samples that must keep to it. Less than all where a rounding may turn a decision: a gate, a code. The others
    #: may be off by :data:`MOST`.
    share: float = 1.0
    note: str = ""
    weight_bytes: int | None = None  #: where they do not lie in parameters and buffers
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Call:
    """What is timed: a call, which does ``steps`` times what the latency is of, and gives so many ``items``."""

    run: Run
    items: int
    steps: int = 1
    held: Callable[[], int] | None = None  #: bytes that are held between calls, beside the weights


def is_dense(name: str) -> bool:
    """Whether a variant of this name is a form of the dense network, which nothing was taken from."""
    return name == DENSE or name.startswith(f"{DENSE}, ")


def one_pass(model: nn.Module, x: Tensor) -> Call:
    """The network on a batch."""
    return Call(lambda: model(x), len(x))


@dataclass(frozen=True)
class Network:
    """A network of a family, and the variants of it that are compared.

    A module ``cofire.bench.end_to_end.<family>`` has a list ``NETWORKS`` of these, nothing else is needed.
    """

    family: str
    name: str  #: as the tables show it
    data: str  #: what it is trained and scored on, or :data:`RANDOM_WEIGHTS`
    #: ``build(seed, share)``: the variants by name, :data:`DENSE` among them; ``share`` of the full training is done.
    build: Callable[[int, float], Mapping[str, Variant]]
    inputs: Callable[[int], Tensor]  #: a batch of so many, on the CPU, the same each time
    unit: str  #: of the throughput
    batch: int  #: that the throughput is measured with
    latency_of: str  #: what takes the latency, at batch 1
    start: Callable[[Any, Tensor], Call] = one_pass
    sample: Callable[[], Tensor] | None = None  #: what the variants are checked on; None: eight of ``inputs``
    evaluate: Callable[[nn.Module], float] | None = None
    accuracy_kind: str | None = None

    def __str__(self) -> str:
        return f"{self.family}, {self.name}"


# ------------------------------------------------------------------------------------------------------- correctness


def _plain(layer: nn.Module) -> nn.Module | None:
    """The same layer in plain torch, on the decoded weight; None: it is none of the packed ones."""
    if isinstance(layer, QuantLinear):
        return Decoded(layer)
    if isinstance(layer, Compressed):
        dense: nn.Module = cast(Any, layer).to_dense()  # each of the two classes has its own
        return dense
    if isinstance(layer, PackedPalettizedLinear):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(layer.weight, False), layer.bias  # type: ignore[assignment]
        return linear
    if isinstance(layer, PackedPalettizedEmbedding):
        embedding: nn.Embedding = nn.Embedding.from_pretrained(layer.weight, padding_idx=layer.padding_idx)
        return embedding
    return None


def decoded(model: nn.Module) -> nn.Module:
    """A copy in which every packed layer is one of plain torch, with the decoded weight."""
    result = copy.deepcopy(model)
    new = {id(m): plain for m in result.modules() if (plain := _plain(m)) is not None}
    return replace_modules(result, new).eval()


def compressed(model: nn.Module) -> Variant:
    """A packed network in fp32, which must compute what its decoded weights say."""
    return Variant(model, decoded(model), 1e-4)


class InDouble(nn.Module):
    """A network in fp64, for which no kernel is written: the operators' references compute it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).double().eval()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x.double() if x.is_floating_point() else x)
        return output


def in_double(model: nn.Module) -> nn.Module:
    """A copy in fp64, which takes inputs of any float."""
    return InDouble(model)


def disagreement(
    got: Tensor, expected: Tensor, tolerance: float, share: float = 1.0, most: float = MOST
) -> tuple[str | None, float | None]:
    """Why an output is wrong, or None; and its largest difference, in units of the largest expected value, if it has one.

    Args:
        got, expected: ``[..., features]``; what comes before the features are samples.
        tolerance: of the difference, in the same units.
        share: of the samples that must keep to it.
        most: the largest difference of the others: a decision that a rounding turns leads to another output, not to any.
    """
    if got.shape != expected.shape:
        return f"the output has shape {list(got.shape)}, expected {list(expected.shape)}", None
    for what, output in (("output", got), ("expected output", expected)):
        if not bool(output.isfinite().all()):
            return f"the {what} is not finite", None
    wanted = expected.double()
    apart = (got.double() - wanted).abs().flatten(0, -2).amax(1) / wanted.abs().max().clamp(min=1e-30)
    error = float(apart.max())
    within = float((apart <= tolerance).double().mean())
    if within < share:
        wrong = f"{1 - within:.1%} of the outputs are off by more than {tolerance:g} of the largest"
        return f"{wrong}, by up to {error:.3g}; allowed are {1 - share:.0%}", error
    if error > max(most, tolerance):
        return f"an output is off by {error:.3g} of the largest; where a decision may turn, allowed is {most:g}", error
    return None, error


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers; what is shared counts once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
