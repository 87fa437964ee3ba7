# SPDX-License-Identifier: Apache-2.0
"""The sweeps of the methods: a step of training on wider and wider networks, beside a step without the method.

A step is forward, loss, backward, optimiser and ``method.step``. Methods that move their masks every hundredth step move them
in every one here, so that moving is part of what is measured. DSnoT has no training: its step is ``prepare``, which finds
the masks of the whole network from calibration data.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import methods, models, optim
from cofire.bench import harness
from cofire.bench.cases import Random, Run
from cofire.bench.results import Row

RATE = 1e-4  #: so small that no network leaves the range of numbers in a hundred steps
Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


def classify(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The task's loss, and the network's output."""
    output = model(batch[0])
    return F.cross_entropy(output, batch[1]), output


def predict(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each next token."""
    output = model(batch[0])
    return F.cross_entropy(output[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten()), output


def answer(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The tokens of a text from the sixth on, about an image."""
    images, text = batch
    output = model(images, text, answer=6)
    return F.cross_entropy(output[:, 5:-1].flatten(0, 1), text[:, 6:].flatten()), output


def images(count: int, size: int, channels: int = 1) -> Callable[[Random], Batch]:
    def make(rand: Random) -> Batch:
        return rand.normal(count, channels, size, size), torch.arange(count) % 10

    return make


def tokens(count: int, length: int, vocabulary: int) -> Callable[[Random], Batch]:
    return lambda rand: ((rand.uniform(count, length) * (vocabulary - 1)).long() + 1,)


def scene(rand: Random) -> Batch:
    return rand.normal(8, 1, 16, 16), *tokens(8, 24, 32)(rand)


@dataclass(frozen=True)
class MethodSweep:
    """A method, and the network of each width."""

    family: str
    method: methods.Method
    network: Callable[[int], nn.Module]
    batch: Callable[[Random], Batch]
    loss: Loss = classify
    example: bool = False  #: whether ``prepare`` gets the batch's input
    masked: bool = False  #: whether the optimiser is one that knows masks
    sizes: Sequence[int] = (64, 128, 256, 512)  #: widths
    grows: str = "parameters"
    time: str = "linear"
    memory: str = "linear"

    @property
    def op(self) -> str:
        return f"method:{type(self.method).__name__}"

    def label(self, size: int) -> str:
        return f"width {size}"

    def measure(self, size: int, device: str, effort: harness.Effort, before: Sequence[Row]) -> list[Row]:
        """A row of the method, and one of the same network without it; ``size`` becomes the number of parameters."""
        torch.manual_seed(0)
        network = self.network(size).to(device).train()
        parameters = sum(p.numel() for p in network.parameters())
        batch = tuple(x.to(device) for x in self.batch(Random(f"{self.op} {size}")))
        makers = {"cofire": lambda: self._with_method(network, batch)}
        if not isinstance(self.method, methods.DSnoT):
            makers["dense"] = lambda: self._step(network, batch, None)
        rows, runs = {}, {}
        for provider, make in makers.items():
            rows[provider] = row = self._row(size, parameters, device, provider)
            try:
                runs[provider] = make()
                note = _judge(runs[provider]())
            except Exception as error:  # a method that cannot run here is reported, and the others go on
                note = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            if note is None:
                row["correct"] = True
            else:
                row["note"] = note
                runs.pop(provider, None)
        limits = (effort.case_seconds, effort.least_rounds, effort.most_rounds)
        readings = harness.read_in_turns(runs, device, *limits)
        for provider, run in runs.items():
            times = readings[provider]
            p20, p80 = (harness.percentile(times, share) for share in (0.2, 0.8))
            rows[provider].update(median_ms=statistics.median(times), p20_ms=p20, p80_ms=p80, rounds=len(times))
            rows[provider]["peak_bytes"] = harness.peak_bytes(run, device)
        return list(rows.values())

    def _row(self, size: int, parameters: int, device: str, provider: str) -> Row:
        return {
            "family": self.family,
            "op": self.op,
            "case": f"{self.label(size)}: {parameters} parameters",
            "dtype": "float32",
            "device": device,
            "mode": "step",
            "provider": provider,
            "median_ms": None,
            "p20_ms": None,
            "p80_ms": None,
            "bytes": None,
            "flops": None,
            "peak_bytes": None,
            "correct": False,
            "noisy": False,
            "size": parameters,
            "width": size,
        }

    def _with_method(self, network: nn.Module, batch: Batch) -> Run:
        method = self.method
        if isinstance(method, methods.DSnoT):
            return functools.partial(method.prepare, network, [batch[0]])
        options: dict[str, Any] = {"example_input": batch[0]} if self.example else {}
        return self._step(method.prepare(network, **options).train(), batch, method)

    def _step(self, model: nn.Module, batch: Batch, method: methods.Method | None) -> Run:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: Any
        if method is not None and self.masked:
            optimizer = optim.MaskedAdamW(trained, lr=RATE, model=model)
        else:
            optimizer = torch.optim.AdamW(trained, lr=RATE)

        def run() -> Tensor:
            loss, output = self.loss(model, batch)
            if method is not None:
                loss = loss + method.loss(model, output, batch[-1])
            loss.backward()
            optimizer.step()
            if method is not None:
                method.step(model)
            optimizer.zero_grad()  # last: what a step allocates it also frees, and the peak is its own
            return loss.detach()

        return run


def _judge(result: Any) -> str | None:
    """Why a step went wrong, or None: its loss, or what is left of a pruned network's weights, must be numbers."""
    if isinstance(result, nn.Module):
        fine = all(bool(x.isfinite().all()) for x in result.state_dict().values() if x.is_floating_point())
        return None if fine else "the pruned network has weights that are no finite numbers"
    return None if bool(torch.isfinite(result)) else f"the loss of the first step is {float(result)}"


def _mlp(width: int) -> nn.Module:
    return models.digits_mlp((width, width))


def _vit(width: int) -> nn.Module:
    return models.vit(32, 8, width=width, depth=2, in_channels=1)


NARROW = (32, 64, 128, 256)
DIGITS = images(64, 8)
LLAVA = {"predictor_width": 64, "predictor_depth": 1, "predictor_heads": 4, "predictor_hidden": 128}

SWEEPS = [
    MethodSweep("clustering", methods.EDKM(), _mlp, DIGITS, sizes=(128, 256, 512, 1024)),
    MethodSweep(
        "gating",
        methods.FTWT(),
        lambda width: models.digits_cnn((width, width, width)),
        images(32, 8),
        example=True,
        sizes=(16, 32, 64, 128),
    ),
    MethodSweep(
        "kv_fusion",
        methods.LoCoCo(capacity=32, taps=5, buffer=0, chunk=32),
        lambda width: models.decoder(width=width, depth=2),
        tokens(4, 96, 96),
        predict,
        sizes=NARROW,
    ),
    MethodSweep(
        "kv_fusion",
        methods.DynamicLLaVA(layer=1, min_answer=4, **LLAVA),  # type: ignore[arg-type]
        lambda width: models.vision_language(width=width),
        scene,
        answer,
        sizes=NARROW,
    ),
    MethodSweep("lowbit", methods.OFQ(), _vit, images(16, 32), example=True, sizes=NARROW),
    MethodSweep("lowbit", methods.QLoRA(rank=16), _mlp, DIGITS, sizes=(128, 256, 512, 1024)),
    MethodSweep(
        "shift_add", methods.ShiftAddViT(stage=3, alpha=(6, 4)), _vit, images(16, 32), example=True, sizes=NARROW
    ),
    MethodSweep("sparse", methods.DSnoT(), _mlp, images(256, 8), sizes=(128, 256, 512, 1024)),
    MethodSweep(
        "sparse",
        methods.GradualPruning(density=0.1, end=1_000_000, every=1),
        _mlp,
        DIGITS,
        masked=True,
        sizes=(128, 256, 512, 1024),
    ),
    MethodSweep("sparse", methods.RigL(every=1, end=1_000_000), _mlp, DIGITS, masked=True, sizes=(128, 256, 512, 1024)),
]
