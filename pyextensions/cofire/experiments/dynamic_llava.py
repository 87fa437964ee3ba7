# SPDX-License-Identifier: Apache-2.0
"""Dynamic-LLaVA's experiment: what ``cofire train dynamicllava`` runs.

A small decoder is shown a digit in 64 tokens and answers one of three questions about it in letters. From its weights
each *cell* trains on: the network as it is (the control), with tokens that are chosen, and with as many that are left by
chance. Each finished cell is in the results file, so an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import data as datasets
from cofire import models
from cofire.data import Images
from cofire.experiments import dynamic_llava_report, report
from cofire.experiments.environment import environment
from cofire.experiments.files import Results, load_results, load_weights, read_weights, results_file, save_weights
from cofire.experiments.training import Advance, adamw, fit, refuse_heads, steps_per_epoch
from cofire.files import write_atomically
from cofire.methods import DynamicLLaVA
from cofire.methods.dynamic_llava import decoder_of
from cofire.models.vision_language import VisionLanguageDecoder
from cofire.timing import interleaved

# ------------------------------------------------------------------------------------------------------ questions

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Six letters each, and the answer to each digit.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "digit?": NAMES,
    "parity": tuple("odd" if d % 2 else "even" for d in range(10)),
    "large?": tuple("yes" if d >= 5 else "no" for d in range(10)),
}
#: The first token is padding, the second ends an answer.
LETTERS = " .abcdefghijklmnopqrstuvwxyz?"
LENGTH = 1 + max(len(a) for answers in QUESTIONS.values() for a in answers)
ASKED = len("digit?")


def tokens(text: str, length: int) -> list[int]:
    return [LETTERS.index(letter) for letter in text.ljust(length)]


#: int64 ``[questions, 6]`` and ``[questions, digits, LENGTH]``.
QUESTION_TOKENS = torch.tensor([tokens(q, ASKED) for q in QUESTIONS])
ANSWER_TOKENS = torch.tensor([[tokens(f"{a}.", LENGTH) for a in answers] for answers in QUESTIONS.values()])


@dataclass(frozen=True)
class Asked:
    """Images, each with a question drawn anew in each epoch."""

    images: Images

    @property
    def train(self) -> Tensor:
        return self.images.train

    def batches(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Any, Tensor]]:
        for x, y in self.images.batches(batch, generator):
            question = torch.randint(len(QUESTIONS), (len(y),), generator=generator)
            answer = ANSWER_TOKENS[question, y]
            lengths = ASKED + (answer > 0).sum(1)
            yield (x, torch.cat([QUESTION_TOKENS[question], answer], 1), ASKED, lengths), answer


def answer_loss(logits: Tensor, answer: Tensor) -> Tensor:
    """Cross entropy of the answers' letters, their ends included."""
    return F.cross_entropy(logits[:, ASKED - 1 : -1].flatten(0, 1), answer.flatten(), ignore_index=0)


# ----------------------------------------------------------------------------------------------------------- plan

CONTINUED, CHOSEN, RANDOM = "continued", "chosen", "random"
#: How each cell chooses; nothing: it does not.
CELLS = {CONTINUED: "", CHOSEN: "learned", RANDOM: "random"}


@dataclass(frozen=True)
class Plan:
    """How an experiment trains; rates are those of AdamW, which rise shortly and fall as a cosine to zero."""

    dense_epochs: int = 20
    epochs: int = 40
    batch: int = 64
    dense_lr: float = 2e-3
    lr: float = 1e-3  #: of every training that follows
    predictor_lr: float = 4e-3
    weight_decay: float = 0.01
    warm_up: int = 20
    image: int = 16
    width: int = 96
    depth: int = 4
    layer: int = 1
    vision_keep: float = 0.25
    text_keep: float = 1.0  #: of answers of a word: in the paper, too, those of fewer than 50 tokens stay whole
    weight: float = 100.0
    predictor_width: int = 64
    noise: bool = False  #: in training: a sample of the predictor's two logits, else the likelier one, as when deployed
    exact: bool = True  #: in training, too, exactly as many tokens as when deployed
    detach: bool = True  #: the predictors train no layer below them
    settle: float = 0.4  #: share of the training after which the choice stands
    keeps: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)  #: shares at which the trained networks are tested too
    #: Train without a share of the training images and score on them, so that a setting is chosen without the test.
    validate: bool = False


DIGITS = Plan()
#: A token of an image is ink if it has at least this share of the brightest pixel, and else background.
INK = 0.5


def experiment(
    data: str | Path = "digits", seeds: int = 3, *, out: Path, plan: Plan | None = None, progress: Any = None
) -> Results:
    """Run all cells that ``out`` does not have yet, and judge them.

    Args:
        data: as in :func:`cofire.data.load`, images of ten digits.
        seeds: every cell runs with seeds 0 to ``seeds - 1``; all on one split of the data.
        out: folder for ``results.json`` and the weights.
        plan: how to train.
        progress: a ``rich.progress.Progress`` to report to, or None.

    Raises:
        ValueError: a value out of range, data of other than ten classes, or ``out`` holds another experiment.
    """
    if seeds < 1:
        raise ValueError(f"experiment: seeds must be at least 1, got {seeds}")
    plan = plan or DIGITS
    if not 0 < plan.lr < math.inf:
        raise ValueError(f"experiment: lr must be a positive number, got {plan.lr:g}")
    run = Run(data, seeds, plan, out, progress)
    for seed in range(seeds):
        run.dense(seed)
        for cell in CELLS:
            run.cell(cell, seed)
    run.latency()
    run.results["criteria"] = [asdict(c) for c in dynamic_llava_report.criteria(run.results)]
    run.save()
    return run.results


class Run:
    """One experiment under way: its results so far, and how to make the next."""

    def __init__(self, data: str | Path, seeds: int, plan: Plan, out: Path, progress: Any = None) -> None:
        self.data, self.plan, self.progress = data, plan, progress
        self.file = results_file(out, plan.validate)
        self.out = self.file.parent
        if len(self.images.classes) != len(NAMES):
            raise ValueError(f"experiment: data must be images of ten digits, got {len(self.images.classes)} classes")
        settings = {
            "method": "dynamicllava",
            "data": self.images.name,
            "condition": self.images.condition,
            "seeds": seeds,
            "plan": json.loads(json.dumps(asdict(plan))),
        }
        self.results = load_results(self.file, settings, environment())
        epochs = seeds * (plan.dense_epochs + len(CELLS) * plan.epochs)
        self.bar = None if progress is None else progress.add_task("training", total=epochs)

    def save(self) -> None:
        write_atomically(self.file, json.dumps(self.results, indent=2))

    @functools.cached_property
    def images(self) -> Images:
        """One split for all seeds: what one seed chooses its settings on is never another one's test."""
        found = datasets.load(self.data, seed=0)
        return found.validation() if self.plan.validate else found

    def network(self, seed: int) -> VisionLanguageDecoder:
        torch.manual_seed(seed)
        channels = self.images.train.shape[1]
        options = {"vocabulary": len(LETTERS), "width": self.plan.width, "depth": self.plan.depth}
        return models.vision_language(self.plan.image, in_channels=channels, **options)

    def method(self, choice: str) -> DynamicLLaVA:
        plan = self.plan
        return DynamicLLaVA(
            vision_keep=plan.vision_keep,
            text_keep=plan.text_keep,
            layer=plan.layer,
            steps=plan.epochs * steps_per_epoch(Asked(self.images), plan.batch),
            weight=plan.weight,
            min_answer=2,
            predictor_width=plan.predictor_width,
            predictor_depth=1,
            predictor_heads=4,
            predictor_hidden=2 * plan.predictor_width,
            noise=plan.noise,
            exact=plan.exact,
            detach=plan.detach,
            settle=plan.settle,
            choice=choice,
        )

    # ------------------------------------------------------------------------------------------------ cells

    def dense(self, seed: int) -> None:
        """The network with all tokens."""
        plan = self.plan
        if any(found["seed"] == seed for found in self.results["dense"]):
            return self._advance(plan.dense_epochs, f"all tokens, seed {seed}: found")
        start, model = time.perf_counter(), self.network(seed)
        self._fit(model, _groups(model, plan.dense_lr, plan.weight_decay), plan.dense_epochs, seed, None, "all tokens")
        row = {"seed": seed, **self.answers(model), "seconds": time.perf_counter() - start}
        save_weights(self._file("dense", seed), model)
        self.results["dense"].append(row)
        self.save()

    def cell(self, cell: str, seed: int) -> None:
        """Train one cell on, and measure it."""
        plan = self.plan
        if any((c["cell"], c["seed"]) == (cell, seed) for c in self.results["cells"]):
            return self._advance(plan.epochs, f"{cell}, seed {seed}: found")
        start, model = time.perf_counter(), self.start(cell, seed)
        method = self.method(CELLS[cell]) if CELLS[cell] else None
        if method is None:
            groups = _groups(model, plan.lr, plan.weight_decay)
        else:
            groups = method.parameter_groups(model, plan.lr, plan.predictor_lr, plan.weight_decay)
        torch.manual_seed(seed)  # of the choices
        self._fit(model, groups, plan.epochs, seed + 1, method, cell)
        row: Results = {"cell": cell, "seed": seed, "seconds": time.perf_counter() - start}
        torch.manual_seed(seed)
        row |= self.answers(model if method is None else method.finalize(model))
        if method is not None:
            row |= self.measures(method, model)
        save_weights(self._file(cell, seed), model)
        self.results["cells"].append(row)
        self.save()

    def start(self, cell: str, seed: int) -> nn.Module:
        """The network of a cell before its training."""
        model = self.network(seed)
        load_weights(model, read_weights(self._file("dense", seed)))
        return self.method(CELLS[cell]).prepare(model) if CELLS[cell] else model

    def trained(self, cell: str, seed: int) -> nn.Module:
        """The network of a cell after its training."""
        model = self.start(cell, seed)
        load_weights(model, read_weights(self._file(cell, seed)))
        return model

    # ---------------------------------------------------------------------------------------------- measures

    def answers(self, model: nn.Module) -> Results:
        """Per cent of the test images' answers that are right to the letter, in all and by question."""
        right: dict[str, int] = dict.fromkeys(QUESTIONS, 0)
        model.eval()
        for x, y in self.images.test_batches(256):
            for i, question in enumerate(QUESTIONS):
                expected = ANSWER_TOKENS[i, y]
                found = _generate(model, x, i)
                right[question] += int(((found == expected) | (expected == 0)).all(1).sum())
        count = len(self.images.test_labels)
        return {
            "accuracy": 100 * sum(right.values()) / (count * len(QUESTIONS)),
            "by_question": {q: 100 * n / count for q, n in right.items()},
        }

    @torch.no_grad()
    def measures(self, method: DynamicLLaVA, model: nn.Module) -> Results:
        """What a trained network does without, and what it keeps."""
        images, plan = self.images, self.plan
        test = images.normalize(images.test)
        asked = [(x, _whole(i, y), ASKED) for x, y in images.test_batches(256) for i in range(len(QUESTIONS))]
        found = method.report(model, [(call, None) for call in asked])
        names = ("image_tokens", "kept_tokens", "dense_token_layers", "token_layers", "vision_rate", "text_rate")
        row: Results = {n: getattr(found, n) for n in (*names, "predictor_parameters")}
        row["cache_share"] = found.cache_bytes / found.dense_cache_bytes
        final = method.finalize(model)
        if method.choice == "learned":
            row |= ink_overlap(final, images.test.float() / 255, test, plan.image) | alike(final, test)
        by_keep = []
        for keep in plan.keeps:
            decoder_of(final).vision_keep = keep
            torch.manual_seed(0)  # of the choices by chance
            by_keep.append([keep, self.answers(final)["accuracy"]])
        if method.choice == "learned":
            decoder_of(final).vision_keep, decoder_of(final).vision = plan.vision_keep, None
            torch.manual_seed(0)
            row["in_their_place"] = self.answers(final)
        return row | {"by_keep": by_keep}

    def latency(self) -> None:
        """The deployed network of the first seed against the one with all tokens: an image, a question and its answer."""
        if "latency" in self.results:
            return
        dense, method = self.network(0), self.method(CELLS[CHOSEN])
        load_weights(dense, read_weights(self._file("dense", 0)))
        final = method.finalize(self.trained(CHOSEN, 0))
        example, rows = self.images.normalize(self.images.test[: self.plan.batch]), []
        for n in (1, len(example)):
            calls = {
                name: (functools.partial(_answer_all, network.eval()), example[:n])
                for name, network in (("dense", dense), ("deployed", final))
            }
            times = {name: 1e3 * median(taken) for name, taken in interleaved(calls).items()}
            rows.append({"batch": n, "dense_ms": times["dense"], "deployed_ms": times["deployed"]})
        self.results["latency"] = rows
        self.save()

    def _fit(
        self, model: nn.Module, groups: list[dict[str, Any]], epochs: int, seed: int, method: DynamicLLaVA | None, what: str
    ) -> None:  # fmt: skip
        groups = [group for group in groups if group["params"]]
        options: dict[str, Any] = {"make": adamw, "scheduled": len(groups), "warm_up": self.plan.warm_up}
        options |= {"epochs": epochs, "batch": self.plan.batch, "seed": seed, "method": method}
        fit(
            model, Asked(self.images), groups, criterion=answer_loss, advance=self._each(f"{what}, seed {seed}"), **options
        )  # fmt: skip

    # --------------------------------------------------------------------------------------------- progress

    def _file(self, what: str, seed: int) -> Path:
        return self.out / "weights" / f"{what}-{seed}.pt"

    def _each(self, what: str) -> Advance:
        return lambda note: self._advance(1, f"{what}, {note}")

    def _advance(self, epochs: int, text: str) -> None:
        if self.progress is not None:
            self.progress.update(self.bar, advance=epochs, description=text)


def _groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]


def _generate(model: nn.Module, x: Tensor, question: int, cached: bool = True) -> Tensor:
    found: Tensor = model.generate(x, QUESTION_TOKENS[question].expand(len(x), -1), LENGTH, cached=cached)  # type: ignore[operator]
    return found


def _answer_all(model: nn.Module, x: Tensor) -> Tensor:
    return _generate(model, x, 0)


def _whole(question: int, labels: Tensor) -> Tensor:
    """Question and answer, what is behind its end written as more ends: without padding."""
    answer = ANSWER_TOKENS[question, labels]
    answer = torch.where(answer == 0, LETTERS.index("."), answer)
    return torch.cat([QUESTION_TOKENS[question].expand(len(labels), -1), answer], 1)


def ink_overlap(final: nn.Module, pixels: Tensor, x: Tensor, size: int) -> Results:
    """How many of the kept tokens of an image are ink, and of all tokens: what chance would keep.

    Args:
        final: deployed, with a predictor.
        pixels: the images from 0 to 1.
        x: the same as the network sees them.
        size: of the network's images, twice as many tokens a side.
    """
    large = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
    ink = F.avg_pool2d(large, 2).mean(1).flatten(1) >= INK
    decoder, question = decoder_of(final), QUESTION_TOKENS[0].expand(len(x), -1)
    hidden = decoder._before(final.hidden(x, question))  # type: ignore[operator]
    _, positions = decoder._left(hidden, ink.shape[1], None)
    kept = positions[:, : decoder.kept_of(ink.shape[1])]
    return {"ink": float(ink.gather(1, kept).double().mean()), "chance": float(ink.double().mean())}


def alike(final: nn.Module, x: Tensor) -> Results:
    """Answers that differ without the cache, of all."""
    pairs = [[_generate(final, x, i, cached) for cached in (True, False)] for i in range(len(QUESTIONS))]
    differing = sum(int((a != b).any(1).sum()) for a, b in pairs)
    return {"differing": differing, "compared": len(x) * len(QUESTIONS)}


# --------------------------------------------------------------------------------------------------------- command


def plan_of(epochs: int | None = None, lr: float | None = None, validate: bool = False) -> Plan:
    """The experiment's plan, with what the command line changes."""
    plan = DIGITS
    if epochs is not None:
        plan = replace(plan, dense_epochs=epochs, epochs=epochs)
    if lr is not None:
        plan = replace(plan, lr=lr)
    return replace(plan, validate=validate)


def command(
    *,
    data: str = "digits",
    model: str | None = None,
    weights: Path | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    head_lr: float | None = None,
    lr: float | None = None,
    validate: bool = False,
    out: Path = Path("runs"),
) -> None:
    """``cofire train dynamicllava``: run the experiment, print table and criteria, write results, table and plot."""
    refuse_heads("dynamicllava", epochs, head_lr, "what follows the dense training")
    if model is not None or weights is not None:
        raise ValueError("experiment: dynamicllava trains its own network; leave out --model and --weights")
    plan = plan_of(epochs, lr, validate)
    folder = out / f"dynamicllava-{Path(data).name}"
    report.show(
        dynamic_llava_report,
        results_file(folder, validate),
        lambda progress: experiment(data, seeds, out=folder, plan=plan, progress=progress),
    )
