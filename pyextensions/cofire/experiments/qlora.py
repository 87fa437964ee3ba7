# SPDX-License-Identifier: Apache-2.0
"""QLoRA's experiment: what ``cofire train qlora`` runs.

A dense language model is trained on source text. Then it learns another text, prose, by low-rank terms alone: once beside
frozen weights in 16 bits (the control) and once beside frozen weights in 4 bits. Each finished cell is in the results file,
so an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import data as datasets
from cofire.experiments import language, quantize_report, report
from cofire.experiments.files import Results, results_file
from cofire.experiments.quantize import CHARACTERS, TEXT, Plan, Predict, Run, refuse_options
from cofire.methods import QLoRA
from cofire.methods.base import replace_modules
from cofire.nn.lowbit import linear_layers

#: What the frozen weights of each arm are.
BF16, NF4 = "bf16", "nf4"
ARMS = (BF16, NF4)


@dataclass(frozen=True)
class Adaptation(Plan):
    """How the trained network learns the second text."""

    rank: int = 8
    alpha: float = 16.0
    rounds: int = 3  #: of ``steps`` steps
    low_rank_lr: float = 2e-3  #: the same for every arm, and not tuned for any


PLAN = Adaptation(**{**asdict(CHARACTERS), "settings": ()})


def experiment(
    seeds: int = 3,
    *,
    out: Path,
    plan: Adaptation = PLAN,
    weights: Path | None = None,
    progress: Any = None,
) -> Results:
    """Train the dense networks and both arms, and return the results, also written to ``out``.

    Args:
        seeds: repeats; each draws its own initial weights and order.
        out: folder for ``results.json`` and the weights. What it holds of the same experiment is not run again.
        plan: how to train.
        weights: a ``state_dict`` to start the dense training from instead of random weights.
        progress: a ``rich.progress.Progress`` to report to, or None.

    Raises:
        ValueError: a value out of range, weights that do not fit, or ``out`` holds another experiment.
    """
    if seeds < 1:
        raise ValueError(f"experiment: seeds must be at least 1, got {seeds}")
    if not 0 < plan.low_rank_lr < math.inf:
        raise ValueError(f"experiment: lr must be a positive number, got {plan.low_rank_lr:g}")
    run = _Run(seeds, plan, out, weights, progress)
    for seed in range(seeds):
        run.dense(seed, plan.epochs)
        for arm in ARMS:
            run.cell(arm, seed)
    run.results["criteria"] = [asdict(c) for c in quantize_report.criteria(run.results)]
    run.save()
    return run.results


class LowRank(nn.Module):
    """The control: a dense layer whose frozen weight has the values of bfloat16, and a low-rank term in fp32.

    The same as :class:`cofire.nn.QLoRALinear` but for the weight: its start, its factor, its arithmetic in fp32.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int, alpha: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().bfloat16())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.factor = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.lora_b = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.float(), self.bias)
        return y + self.factor * F.linear(F.linear(x, self.lora_a), self.lora_b)


class _Run(Run):
    def __init__(self, seeds: int, plan: Adaptation, out: Path, weights: Path | None, progress: Any) -> None:
        self.plan = plan
        task = Predict(datasets.load_text(), plan)
        self.manual = datasets.load_manual()
        settings: Results = {"method": "qlora", "data": task.name, "condition": task.condition, "unit": task.unit}
        settings |= {"adapted_to": self.manual.condition, "plan": asdict(plan)}
        epochs = seeds * (plan.epochs + len(ARMS) * plan.rounds)
        super().__init__(settings, task, seeds, out, weights, progress, epochs)

    def cell(self, arm: str, seed: int) -> None:
        """One cell: scores on both texts before and after, and the bytes of the frozen weights."""
        plan = self.plan
        if not self.missing(seed, setting=arm):
            return self.advance(plan.rounds, f"{arm}, seed {seed}: found")
        torch.manual_seed(seed)
        model, frozen = self.arm(arm, seed)
        row: Results = {"setting": arm, "seed": seed, **frozen}
        row["before"] = self.score(model)
        start = time.perf_counter()
        language.fit(
            model, self.manual, rounds=plan.rounds, steps=plan.steps, batch=plan.batch, context=plan.context,
            lr=plan.low_rank_lr, weight_decay=0.0, seed=seed + 1, advance=self.each(f"{arm}, seed {seed}"),
        )  # fmt: skip
        row["seconds"] = time.perf_counter() - start
        row["score"] = self.score(model)
        row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.results["cells"].append(row)
        self.save()

    def arm(self, arm: str, seed: int) -> tuple[nn.Module, Results]:
        """The network with low-rank terms to train; bytes of the weights beside them, and of those in 16 bits."""
        plan, dense = self.plan, self.network(seed)
        layers = [module for _, module in linear_layers(dense)]
        wide = sum(2 * m.in_features * m.out_features for m in layers if isinstance(m, nn.Linear))
        if arm == NF4:
            method = QLoRA(plan.rank, plan.alpha, group_size=plan.group_size)
            model = method.prepare(dense)
            return model, {"weight_bytes": method.report(model).packed_bytes, "wide_bytes": wide}
        dense.requires_grad_(False)
        new = {id(m): LowRank(m.weight, m.bias, plan.rank, plan.alpha) for m in layers if isinstance(m, nn.Linear)}
        return replace_modules(dense, new), {"weight_bytes": wide, "wide_bytes": wide}

    def score(self, model: nn.Module) -> float:
        return language.bits_per_character(model, self.manual, context=self.plan.context, windows=self.plan.windows)


def command(
    *,
    data: str = TEXT,
    model: str | None = None,
    weights: Path | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    head_lr: float | None = None,
    lr: float | None = None,
    validate: bool = False,
    out: Path = Path("runs"),
) -> None:
    """``cofire train qlora``: run the experiment, print tables and criteria, and write them to ``out``."""
    refuse_options("qlora", data, model, PLAN.model, epochs, head_lr, validate)
    if data != TEXT:
        raise ValueError(f"experiment: qlora's data is text (--data {TEXT}), got {data!r}")
    plan = PLAN
    if epochs is not None:
        plan = replace(plan, epochs=epochs, rounds=epochs)
    if lr is not None:
        plan = replace(plan, low_rank_lr=lr)
    folder = out / f"qlora-{plan.model}-{data}"
    report.show(
        quantize_report,
        results_file(folder),
        lambda progress: experiment(seeds, out=folder, plan=plan, weights=weights, progress=progress),
    )
