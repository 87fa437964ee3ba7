# SPDX-License-Identifier: Apache-2.0
"""QLoRA: a network of frozen 4-bit weights learns by small low-rank terms beside them.

Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023; the
low-rank terms: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cofire.methods.base import Method, Report, bare, matches, replace_modules
from cofire.names import near_matches
from cofire.nn.lowbit import LoRALinear, QLoRALinear, QuantLinear, dense_weight, linear_layers
from cofire.ops import QTensor, quantize_weight
from cofire.ops.checks import check_integer, check_module, check_number
from cofire.ops.quantizers import check_method


@dataclass(frozen=True)
class QLoRAReport(Report):
    """What the weights take. Dense bytes are those of the weights' own dtype."""

    layers: int
    bits_per_weight: float  #: of the layers' weights, scales included
    dense_bytes: int  #: of the layers' weights, before they were quantised
    packed_bytes: int
    low_rank_bytes: int
    trained: int  #: parameters that are trained
    model_dense_bytes: int  #: with everything else in the model, without the low-rank terms
    model_packed_bytes: int  #: with them


@dataclass(frozen=True)
class QLoRA(Method, name="qlora"):
    """Linear layers with quantised weights, frozen, and a low-rank term that is trained; everything else is frozen too.

    Args:
        rank: of the low-rank terms.
        alpha: their factor, before division by the rank.
        method, bits, group_size: how weights are quantised: :func:`cofire.ops.quantize_weight`. The method None: not at all,
            which is LoRA; weights then stay, bit for bit, and ``bits`` and ``group_size`` are not looked at.
        skip: names or patterns (``"layers.*.mlp.*"``) of layers that stay dense.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.

    Example:
        >>> from cofire.models import digits_mlp
        >>> method = QLoRA(rank=4)
        >>> model = method.prepare(digits_mlp())
        >>> trained = [p for p in model.parameters() if p.requires_grad]
        >>> loss = model(torch.rand(2, 1, 8, 8)).sum() + method.loss(model)
        >>> loss.backward(); method.step(model)
        >>> report = method.report(model)
        >>> report.packed_bytes < 0.15 * report.dense_bytes, report.trained == sum(p.numel() for p in trained)
        (True, True)
        >>> deployed = method.finalize(model)

    Source: QLoRA, section 3 (4-bit NormalFloat in groups of 64 and equation 5; scales stay in fp32 here, the paper's double
    quantisation of them is not done) and appendix B (rank 64, alpha 16).
    """

    rank: int = 64
    alpha: float = 16.0
    method: str | None = "nf4"
    bits: int = 4
    group_size: int | None = 64
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_integer("QLoRA", rank=self.rank, bits=self.bits)
        check_number("QLoRA", alpha=self.alpha)
        if self.method is not None:
            check_method("QLoRA", self.method)
        if self.rank < 1:
            raise ValueError(f"QLoRA: rank must be at least 1, got {self.rank}")
        if self.method == "gptq":
            raise ValueError(
                "QLoRA: the method 'gptq' needs Hessians: quantise with quantize_(model, 'gptq', hessians=...), and prepare "
                "that model"
            )
        skip = self.skip
        if isinstance(skip, str) or not isinstance(skip, Collection) or not all(isinstance(p, str) for p in skip):
            raise TypeError(f"QLoRA: skip must be a sequence of names or patterns, got {skip!r}")

    # ---------------------------------------------------------------------------------------------- protocol

    def prepare(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` with a low-rank term beside each linear layer, and all else frozen.

        Dense linear layers are quantised first, unless ``method`` is None; quantised ones, of
        :func:`cofire.nn.quantize_` or imported, are taken as they are. Layers whose weight is tied to another's stay dense.
        Optimise what requires a gradient.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: no linear layer, one that cannot be quantised, a pattern that fits none, a model prepared already.
        """
        check_module("QLoRA.prepare", model)
        if _trained_layers(model):
            raise ValueError("QLoRA.prepare: the model is prepared already; prepare the network that it was made from")
        result = copy.deepcopy(bare(model))
        layers: dict[str, nn.Module] = dict(linear_layers(result))
        layers |= {name: module for name, module in result.named_modules() if isinstance(module, QuantLinear)}
        for pattern in self.skip:
            if not matches(layers, pattern):
                near = near_matches(pattern, layers)
                raise ValueError(f"QLoRA.prepare: skip names {pattern!r}, which fits no linear layer{near}")
        chosen = {n: m for n, m in layers.items() if not any(matches([n], pattern) for pattern in self.skip)}
        if not chosen:
            raise ValueError("QLoRA.prepare: the model has no linear layer (tied ones stay dense) that skip leaves")
        result.requires_grad_(False)
        new: dict[int, nn.Module] = {}
        for name, module in chosen.items():
            try:
                new[id(module)] = self.layer(module)
            except ValueError as error:
                raise ValueError(f"QLoRA.prepare: layer {name!r}: {error}") from None
        return replace_modules(result, new)

    def layer(self, module: nn.Module) -> LoRALinear:
        """What this method puts in the place of one linear layer, dense or quantised.

        Raises:
            ValueError: it cannot be quantised.
        """
        if self.method is not None and not isinstance(module, QuantLinear):
            module = QuantLinear.from_linear(module, self.method, bits=self.bits, group_size=self.group_size)
        elif not isinstance(module, (nn.Linear, QuantLinear)):  # GPT-2's, with the weight transposed
            module = _linear(*dense_weight(module)).train(module.training)
        kind = QLoRALinear if isinstance(module, QuantLinear) else LoRALinear
        return kind(module, self.rank, self.alpha).train(module.training)

    def loss(self, model: nn.Module, output: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """Zero, a leaf of its own: the task's loss alone trains the low-rank terms.

        Raises:
            ValueError: no low-rank term to train.
        """
        low = next(iter(self._require(model, "loss").values())).lora_a
        return torch.zeros((), dtype=torch.float32, device=low.device, requires_grad=True)

    def step(self, model: nn.Module) -> None:
        """Nothing changes with the steps.

        Raises:
            ValueError: no low-rank term to train.
        """
        self._require(model, "step")

    def finalize(self, model: nn.Module, *, merge: bool = False) -> nn.Module:
        """A copy of ``model`` in evaluation mode, frozen.

        Args:
            model: a prepared model.
            merge: False: the low-rank terms stay beside the weights, and nothing of what was learnt is lost. True: they are
                added to the weights, which are quantised again, as this method quantises, or not if its ``method`` is None.

        Raises:
            ValueError: no low-rank term, or finalized already.
        """
        self._require(model, "finalize")
        result = copy.deepcopy(bare(model)).eval().requires_grad_(False)
        if not merge:
            return result
        return replace_modules(result, {id(m): self._merged(m) for m in _trained_layers(result).values()})

    def _merged(self, layer: LoRALinear) -> nn.Module:
        if self.method is None:
            return _linear(layer.merged().detach(), layer.base.bias).eval()
        weight = quantize_weight(layer.merged(), self.method, bits=self.bits, group_size=self.group_size)
        return QuantLinear.from_qtensor(weight, layer.base.bias).eval()

    def report(self, model: nn.Module, batches: Iterable[Any] = ()) -> QLoRAReport:
        """Bytes of the weights, dense and packed. ``batches`` are not looked at.

        Raises:
            ValueError: no low-rank term.
        """
        layers = list(self._require(model, "report").values())
        packed = sum(_held(layer).nbytes for layer in layers)
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        dense = sum(layer.in_features * layer.out_features * _held(layer).dtype.itemsize for layer in layers)
        low = sum(p.nbytes for layer in layers for p in (layer.lora_a, layer.lora_b))
        held = {t for layer in layers for t in (*layer.base.buffers(), layer.base._parameters.get("weight"))}
        tensors = {*bare(model).parameters(), *bare(model).buffers()} - held
        others = sum(t.nbytes for t in tensors) - low
        return QLoRAReport(
            layers=len(layers),
            bits_per_weight=8 * packed / weights,
            dense_bytes=dense,
            packed_bytes=packed,
            low_rank_bytes=low,
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            model_dense_bytes=others + dense,
            model_packed_bytes=others + packed + low,
        )

    def _require(self, model: nn.Module, where: str) -> dict[str, LoRALinear]:
        check_module(f"QLoRA.{where}", model)
        layers = _trained_layers(model)
        if not layers:
            raise ValueError(f"QLoRA.{where}: the model has no low-rank terms; call prepare(model) first")
        if where != "report" and not any(layer.lora_b.requires_grad for layer in layers.values()):
            raise ValueError(f"QLoRA.{where}: the model is finalized already")
        return layers


def _trained_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in bare(model).named_modules() if isinstance(module, LoRALinear)}


def _held(layer: LoRALinear) -> Tensor | QTensor:
    """The layer's frozen weight as it is kept."""
    weight: Tensor | QTensor = layer.base.qweight if isinstance(layer, QLoRALinear) else layer.base.weight
    return weight


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A dense layer around these very tensors, frozen."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, False)
    return layer
