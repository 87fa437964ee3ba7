# SPDX-License-Identifier: Apache-2.0
"""The recommender of the families that need fully connected layers.

Its users are the functions of Python's standard library, and the items the names that a function uses: it is shown all of
them but one, and is right if the hidden one is among its first ten. Real data, and on every machine.
"""

from __future__ import annotations

import ast
import collections
import copy
import functools
import itertools
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import data
from cofire.bench.cases import Random
from cofire.experiments import training
from cofire.methods import Method

KIND = "hidden names among the first 10, %"
LEAST = 3  #: names that a function must use
DATA = "functions of Python's standard library and the names they use"


@dataclass(frozen=True)
class Uses:
    """Which functions use which of the most frequent names: float ``[functions, names]``, 0 or 1."""

    train: Tensor
    test: Tensor

    def batches(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch; inputs lack half of the names, targets have all."""
        for rows in torch.split(torch.randperm(len(self.train), generator=generator), batch):
            uses = self.train[rows]
            shown = torch.rand(uses.shape, generator=generator) < 0.5
            if len(rows) > 1:
                yield uses * shown, uses


@functools.lru_cache(maxsize=4)
def load(items: int, functions: int | None = None) -> Uses:
    """The uses of the ``items`` most frequent names of the training modules; ``functions``: of each part, at most.

    Raises:
        FileNotFoundError: none of the modules is in the library of the Python that runs.
    """
    parts = [list(itertools.islice(_names(modules), functions)) for modules in (data.TRAIN_MODULES, data.TEST_MODULES)]
    if not all(parts):
        raise FileNotFoundError(f"recommender: no module of Python's library is in {sysconfig.get_path('stdlib')!r}")
    frequency = collections.Counter(itertools.chain.from_iterable(parts[0]))
    chosen = sorted(frequency, key=lambda name: (-frequency[name], name))[:items]
    number = {name: i for i, name in enumerate(chosen)}
    return Uses(*(_table(part, number, items) for part in parts))


def _names(modules: Iterable[str]) -> Iterator[set[str]]:
    """Of each function, the variables and attributes that it uses."""
    folder = Path(sysconfig.get_path("stdlib"))
    for name in modules:
        path = folder / f"{name}.py"
        if path.is_file():
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    inside = list(ast.walk(node))
                    names = {n.id for n in inside if isinstance(n, ast.Name)}
                    yield names | {n.attr for n in inside if isinstance(n, ast.Attribute)}


def _table(uses: Sequence[set[str]], number: dict[str, int], items: int) -> Tensor:
    rows = [[number[name] for name in names if name in number] for names in uses]
    rows = [row for row in rows if len(row) >= LEAST]
    table = torch.zeros(len(rows), items)
    for row, columns in zip(table, rows, strict=True):
        row[columns] = 1
    return table


@dataclass(frozen=True)
class Recommender:
    """A network of three linear layers, and how it is trained."""

    items: int = 1024
    width: int = 1024
    epochs: int = 15
    batch: int = 64
    lr: float = 1e-3
    functions: int | None = None

    @property
    def shape(self) -> str:
        return f"MLP recommender, {self.items}-{self.width}-{self.width}-{self.items}"

    def empty(self) -> nn.Sequential:
        return perceptron(self.items, self.width)

    def network(self, seed: int, share: float) -> nn.Sequential:
        """Trained, in evaluation mode. It is trained once for all families that ask for it."""
        return copy.deepcopy(_trained(self, seed, share))

    def fit(self, model: nn.Module, epochs: int, lr: float, seed: int, method: Method | None = None) -> nn.Module:
        """Train by the likelihood of the names, all of them, with AdamW."""
        groups = [{"params": list(model.parameters()), "lr": lr, "weight_decay": 0.01}]
        options: dict[str, Any] = {"epochs": epochs, "batch": self.batch, "seed": seed, "method": method}
        training.fit(model, self.uses, groups, make=training.adamw, warm_up=20, criterion=_likelihood, **options)
        return model.eval()

    @property
    def uses(self) -> Uses:
        return load(self.items, self.functions)

    def steps(self, epochs: int) -> int:
        return epochs * training.steps_per_epoch(self.uses, self.batch)

    def inputs(self, n: int) -> Tensor:
        """Functions of the test, again and again."""
        test = self.uses.test
        return test[torch.arange(n) % len(test)]

    def score(self, model: nn.Module) -> float:
        """Per cent of the hidden names that are among the ten most probable of those not shown; each name once."""
        right = count = 0
        for row in self.uses.test.split(1):
            hidden = row[0].nonzero().flatten()
            shown = row.repeat(len(hidden), 1)
            shown[torch.arange(len(hidden)), hidden] = 0
            scores = model(shown).masked_fill(shown > 0, -torch.inf)
            right += int((scores.topk(10).indices == hidden[:, None]).any(1).sum())
            count += len(hidden)
        return 100 * right / count


def perceptron(items: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(items, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, items)
    )


def random_uses(n: int, items: int) -> Tensor:
    """As sparse as those of the functions."""
    return (Random("uses").uniform(n, items) < 20 / items).float()


def _likelihood(output: Tensor, uses: Tensor) -> Tensor:
    return -(F.log_softmax(output, 1) * uses).sum() / uses.sum().clamp(min=1)


@functools.lru_cache(maxsize=1)
def _trained(plan: Recommender, seed: int, share: float) -> nn.Sequential:
    torch.manual_seed(seed)
    model = plan.empty()
    plan.fit(model, max(1, round(share * plan.epochs)), plan.lr, seed)
    return model
