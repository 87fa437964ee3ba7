# SPDX-License-Identifier: Apache-2.0
"""Dynamic-LLaVA's experiment: questions, what a cell measures, resuming, validation, criteria, tables, on tiny data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cofire import cli
from cofire.data import Images
from cofire.experiments import dynamic_llava, dynamic_llava_report, report
from cofire.experiments.dynamic_llava import ANSWER_TOKENS, ASKED, LETTERS, QUESTION_TOKENS, Asked, Plan
from helpers import check_plots

PLAN = Plan(
    dense_epochs=1,
    epochs=1,
    batch=20,
    warm_up=2,
    image=8,
    width=16,
    depth=2,
    predictor_width=8,
    keeps=(0.25, 1.0),
    text_keep=0.5,
)


def _images(train: int = 50, test: int = 20) -> Images:
    """A bright row for each of ten classes, where there is room."""
    labels = torch.arange(train + test) % 10
    pixels = torch.randint(0, 80, (train + test, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels[torch.arange(train + test), 0, labels % 8] = 250
    x = pixels.to(torch.uint8)
    parts = x[:train], labels[:train], x[train:], labels[train:]
    return Images("rows", "Rows.", *parts, tuple("0123456789"), (0.5,), (0.3,), False)


@pytest.fixture
def _tiny_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_llava.datasets, "load", lambda *_, **__: _images())


def _letters(tokens: torch.Tensor) -> str:
    return "".join(LETTERS[i] for i in tokens.tolist())


def test_every_digit_has_its_answers() -> None:
    assert [_letters(q) for q in QUESTION_TOKENS] == ["digit?", "parity", "large?"]
    assert [_letters(a) for a in ANSWER_TOKENS[:, 7]] == ["seven.", "odd.  ", "yes.  "]
    assert [_letters(a) for a in ANSWER_TOKENS[:, 4]] == ["four. ", "even. ", "no.   "]
    assert _letters(dynamic_llava._whole(2, torch.tensor([4]))[0]) == "large?no...."


def test_batches_ask_and_say_how_long_the_answers_are() -> None:
    found = list(Asked(_images()).batches(20, torch.Generator().manual_seed(0)))
    assert [len(y) for _, y in found] == [20, 20, 10]
    questions = set()
    for (x, text, answer, lengths), y in found:
        assert x.shape[1:] == (1, 8, 8) and answer == ASKED
        assert torch.equal(text[:, ASKED:], y)
        assert torch.equal((text > 0).sum(1), lengths)
        questions |= {_letters(t[:ASKED]) for t in text}
    assert questions == {"digit?", "parity", "large?"}


def test_the_loss_is_that_of_the_next_letters() -> None:
    answer = ANSWER_TOKENS[2, [4, 7]]
    logits = torch.full((2, ASKED + 6, len(LETTERS)), -30.0)
    rows = torch.arange(2)[:, None]
    logits[rows, torch.arange(ASKED - 1, ASKED + 5), answer] = 30.0
    assert dynamic_llava.answer_loss(logits, answer) < 1e-6
    logits[:, ASKED + 4 :] = logits[:, ASKED + 4 :].flip(-1)  # what follows "no." and "yes." counts for nothing
    assert dynamic_llava.answer_loss(logits, answer) < 1e-6
    assert dynamic_llava.answer_loss(logits.roll(1, 1), answer) > 1


@pytest.mark.usefixtures("_tiny_data")
def test_experiment_writes_every_cell_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = dynamic_llava.experiment("rows", 1, out=tmp_path, plan=PLAN)
    assert [c["cell"] for c in results["cells"]] == ["continued", "chosen", "random"]
    continued, chosen, random = results["cells"]
    assert "vision_rate" not in continued
    assert (chosen["image_tokens"], chosen["kept_tokens"]) == (16, 4)
    assert (chosen["dense_token_layers"], chosen["token_layers"]) == (2 * 22, 22 + 10)
    assert chosen["compared"] == 60 and chosen["differing"] == 0
    assert 0 < chosen["chance"] < chosen["ink"] + 1 and 0 <= chosen["text_rate"] <= 1
    assert "ink" not in random and random["vision_rate"] == 0.25
    assert 0 <= chosen["in_their_place"]["accuracy"] <= 100 and "in_their_place" not in random
    assert [keep for keep, _ in chosen["by_keep"]] == [0.25, 1.0] and chosen["by_keep"][0][1] == chosen["accuracy"]
    assert [row["batch"] for row in results["latency"]] == [1, 20]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert not list(tmp_path.rglob("*.tmp"))

    # One cell lost: it alone is trained again, and comes out the same.
    lost = written["cells"].pop(1)
    (tmp_path / "results.json").write_text(json.dumps(written))
    fitted = []
    fit = dynamic_llava.fit
    monkeypatch.setattr(dynamic_llava, "fit", lambda *args, **kwargs: fitted.append(1) or fit(*args, **kwargs))
    again = dynamic_llava.experiment("rows", 1, out=tmp_path, plan=PLAN)
    assert fitted == [1]
    assert json.loads(json.dumps(again["cells"][-1])) | {"seconds": 0} == lost | {"seconds": 0}

    with pytest.raises(ValueError, match="holds another experiment"):
        dynamic_llava.experiment("rows", 1, out=tmp_path, plan=replace(PLAN, epochs=2))


def test_ink_is_what_is_bright() -> None:
    """Of a predictor that prefers bright tokens, all that is kept is ink."""
    run_images = _images()
    plan = replace(PLAN, vision_keep=0.125)
    network = dynamic_llava.models.vision_language(8, vocabulary=len(LETTERS), width=16, depth=2)
    method = dynamic_llava.DynamicLLaVA(vision_keep=0.125, layer=0, predictor_width=4, predictor_heads=1)
    final = method.finalize(method.prepare(network))
    pixels = run_images.test.float() / 255
    decoder = dynamic_llava.decoder_of(final)
    light = torch.nn.functional.avg_pool2d(pixels, 2).flatten(1)
    decoder.vision.forward = lambda x: torch.stack([light, -light], -1)
    found = dynamic_llava.ink_overlap(final, pixels, run_images.normalize(run_images.test), plan.image)
    assert found["ink"] == 1 and found["chance"] == pytest.approx(0.25, abs=0.03)


# ------------------------------------------------------------------------------------------------------- criteria


def _cell(name: str, seed: int, **changes: Any) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell": name, "seed": seed, "accuracy": {"random": 70.0}.get(name, 95.0), "seconds": 1.0}
    cell["by_question"] = {"digit?": 94.0, "parity": 96.0, "large?": 95.0}
    if name != "continued":
        cell |= {"image_tokens": 64, "kept_tokens": 16, "dense_token_layers": 280, "token_layers": 136}
        cell |= {"vision_rate": 0.26, "text_rate": 0.5, "by_keep": [[0.25, cell["accuracy"]], [1.0, 90.0]]}
    if name == "chosen":
        cell |= {"ink": 0.7, "chance": 0.3, "differing": 0, "compared": 100}
        cell["in_their_place"] = {"accuracy": 60.0, "by_question": cell["by_question"]}
    return cell | changes


def _results(**changes: dict[str, Any]) -> dict[str, Any]:
    names = ("continued", "chosen", "random")
    settings = {"condition": "Rows.", "plan": json.loads(json.dumps(vars(PLAN)))}
    by_question = {"digit?": 94.0, "parity": 96.0, "large?": 95.0}
    return {
        "dense": [{"seed": seed, "accuracy": 95.5 + seed, "by_question": by_question} for seed in (0, 1)],
        "cells": [_cell(name, seed, **changes.get(name, {})) for seed in (0, 1) for name in names],
        "settings": settings,
        "environment": {"cpu": "a CPU", "threads": 1, "torch": "2"},
        "latency": [{"batch": 1, "dense_ms": 2.0, "deployed_ms": 1.0}],
    }


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, None),
        ({"chosen": {"accuracy": 94.4}}, "chosen tokens lose at most 1.5 points"),
        ({"continued": {"accuracy": 96.6}}, "chosen tokens lose at most 1.5 points"),  # the better control counts
        ({"random": {"accuracy": 85.5}}, "at least 10 points ahead of random tokens, trained alike"),
        (
            {"chosen": {"in_their_place": {"accuracy": 85.5, "by_question": {}}}},
            "at least 10 points ahead of random tokens in the place of the chosen",
        ),
        ({"chosen": {"vision_rate": 0.285}}, "keeps its share"),
        ({"chosen": {"ink": 0.59}}, "twice chance"),
        ({"chosen": {"differing": 1}}, "the same answers"),
        ({"chosen": {"token_layers": 141}}, "cut by half"),
    ],
)
def test_criteria_judge_what_was_measured(changes: dict[str, Any], failed: str | None) -> None:
    failures = [c.name for c in dynamic_llava_report.criteria(_results(**changes)) if not c.passed]
    assert len(failures) == (failed is not None), failures
    assert failed is None or failed in failures[0]


def test_what_was_not_run_is_not_judged() -> None:
    results = _results()
    results["cells"] = [c for c in results["cells"] if c["cell"] == "chosen"]
    found = {c.name: c for c in dynamic_llava_report.criteria(results)}
    assert found["at least 10 points ahead of random tokens, trained alike"].passed is None
    assert [c.passed for c in dynamic_llava_report.criteria(results | {"cells": []})] == [None]


def test_tables_show_losses() -> None:
    text = dynamic_llava_report.markdown(_results())
    assert "| all tokens | 2 | 96.00 | 6.35 | 94.00 | 96.00 | 95.00 |  |  |" in text
    assert "| chosen | 2 | 95.00 | 0.00 | 94.00 | 96.00 | 95.00 | 16 of 64 | 50.0% |" in text
    assert "| random tokens in the place of the chosen | 2 | 60.00 | 0.00 | 94.00 | 96.00 | 95.00 |  |  |" in text
    assert "| random | 70.00 | 90.00 |" in text and "| 1 | 2.00 | 1.00 | 2.00x |" in text


# -------------------------------------------------------------------------------------------- validation, command


def test_a_validation_run_never_touches_the_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test images are an object that allows nothing, so that any use of them is an error."""
    unreadable = replace(_images(), test=object(), test_labels=object())
    monkeypatch.setattr(dynamic_llava.datasets, "load", lambda *_, **__: unreadable)
    monkeypatch.setattr(dynamic_llava, "CELLS", {"chosen": "learned"})
    results = dynamic_llava.experiment("rows", 1, out=tmp_path, plan=replace(PLAN, validate=True))
    assert "10 of the 50 training images are set aside" in dynamic_llava_report.conditions(results)
    assert (tmp_path / "validation" / "validation.json").is_file()


@pytest.mark.usefixtures("_tiny_data")
def test_the_command_prints_criteria_and_writes_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_llava, "DIGITS", PLAN)
    monkeypatch.setattr(dynamic_llava, "CELLS", {"chosen": "learned"})
    arguments = ["train", "dynamicllava", "--seeds", "1", "--epochs", "1", "--lr", "0.003", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "criterion" in done.output
    folder = tmp_path / "dynamicllava-digits"
    table = (folder / "results.md").read_text()
    assert "| chosen | 1 |" in table and "| criterion | found | met |" in table
    assert json.loads((folder / "results.json").read_text())["settings"]["plan"]["lr"] == 0.003
    check_plots(folder, "keep.png")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lr", "0"], "cofire: experiment: lr must be a positive number, got 0"),
        (["--epochs", "0"], "cofire: experiment: epochs must be at least 1, got 0"),
        (["--seeds", "0"], "cofire: experiment: seeds must be at least 1, got 0"),
        (["--head-lr", "1"], "cofire: experiment: dynamicllava has no heads; --lr sets the rate"),
        (["--model", "vit"], "cofire: experiment: dynamicllava trains its own network"),
    ],
)
def test_the_command_line_refuses_with_a_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(cli.app, ["train", "dynamicllava", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert sentence in done.output
    assert not list(tmp_path.iterdir())


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    root = Path(__file__).parents[1]
    page = root / "docs" / "dynamic_llava.md"
    before = page.read_text()
    folder = root / "benchmarks" / "results" / "experiments"
    assert not report.update_page(page, folder, dynamic_llava_report.markdown), "now fresh: commit it"
    assert page.read_text() == before
