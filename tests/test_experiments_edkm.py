# SPDX-License-Identifier: Apache-2.0
"""eDKM's experiments: what a cell measures, resuming, validation, criteria, and the published tables, on tiny data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cofire import cli, models
from cofire.data import VOCABULARY, Images, Text
from cofire.experiments import centroid_path, edkm, edkm_report, language, report
from cofire.experiments.edkm import Plan, Rounded, Setting
from cofire.methods import EDKM
from cofire.nn.clustering import Palettized
from helpers import check_plots

PLAN = Plan(
    model="digits_mlp",
    settings=(Setting(2), Setting(2, "implicit", seeds=1), Setting(2, dtype="bfloat16", seeds=1)),
    dense_epochs=2,
    epochs=1,
    batch=16,
    dense_lr=0.05,
    lr=0.01,
)


def _images(train: int = 48, test: int = 16) -> Images:
    """Two classes: bright above, or bright below."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(train + test) % 2
    pixels = torch.randint(0, 80, (train + test, 1, 8, 8), generator=generator)
    pixels[labels == 0, :, :4] += 150
    pixels[labels == 1, :, 4:] += 150
    x = pixels.to(torch.uint8)
    return Images(
        "stripes", "Stripes.", x[:train], labels[:train], x[train:], labels[train:], ("a", "b"), (0.5,), (0.3,), False
    )


def _text() -> Text:
    """Counts to nine, again and again."""
    numbers = torch.tensor([VOCABULARY.index(c) for c in "0123456789" * 200], dtype=torch.uint8)
    return Text("text", "Digits.", numbers, numbers[:400], VOCABULARY)


@pytest.fixture
def _tiny_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edkm.datasets, "load", lambda *_, **__: _images())
    monkeypatch.setattr(edkm.datasets, "load_text", lambda *_, **__: _text())


@pytest.mark.usefixtures("_tiny_data")
def test_experiment_writes_every_cell_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = edkm.experiment("stripes", 2, out=tmp_path, plan=PLAN)
    assert [(c["setting"], c["seed"]) for c in results["cells"]] == [
        ("2 bits, unroll", 0),
        ("2 bits, implicit", 0),
        ("2 bits, unroll, bf16", 0),
        ("2 bits, unroll", 1),
    ]
    for cell in results["cells"]:
        # bfloat16 rounds the packed network's activations otherwise than the trained one's
        assert cell["packed"] == pytest.approx(cell["score"], abs=0 if cell["dtype"] == "float32" else 10)
        assert 2 < cell["bits_per_weight"] < 2.05
    wide, _, narrow, _ = results["cells"]
    assert wide["dense_bytes"] == 2 * narrow["dense_bytes"]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert not list(tmp_path.rglob("*.tmp"))

    # One cell lost: it alone is trained again, and comes out the same.
    lost = written["cells"].pop()
    (tmp_path / "results.json").write_text(json.dumps(written))
    trained = []
    fit = edkm.fit
    monkeypatch.setattr(edkm, "fit", lambda *args, **kwargs: trained.append(1) or fit(*args, **kwargs))
    again = edkm.experiment("stripes", 2, out=tmp_path, plan=PLAN)
    assert trained == [1]
    assert again["cells"][-1] | {"seconds": 0} == lost | {"seconds": 0}

    with pytest.raises(ValueError, match="holds another experiment"):
        edkm.experiment("stripes", 2, out=tmp_path, plan=replace(PLAN, lr=0.02))


@pytest.mark.usefixtures("_tiny_data")
def test_text_is_trained_and_scored_in_bits(tmp_path: Path) -> None:
    plan = replace(edkm.CHARACTERS, dense_epochs=1, epochs=1, steps=2, batch=2, context=16, windows=4)
    results = edkm.experiment("text", 1, out=tmp_path, plan=plan)
    cell, harder = results["cells"]
    assert (cell["setting"], harder["setting"]) == ("3 bits, unroll", "2 bits, unroll")
    assert 0 < cell["score"] < 2 * math.log2(len(VOCABULARY))
    assert cell["packed"] == pytest.approx(cell["score"], rel=1e-4)
    assert "2 dense steps, then 2 with clustered weights" in edkm_report.conditions(results)


def test_language_fit_learns_to_count() -> None:
    torch.manual_seed(0)
    model = models.char_transformer(len(VOCABULARY), width=16, depth=1, heads=2, context=16)
    options = {"context": 16, "windows": 8}
    before = language.bits_per_character(model, _text(), **options)
    language.fit(model, _text(), rounds=3, steps=40, batch=8, context=16, lr=1e-2, weight_decay=0.0, seed=0)
    after = language.bits_per_character(model, _text(), **options)
    assert before == pytest.approx(math.log2(len(VOCABULARY)), rel=0.1)
    assert after < before / 2


def test_rounded_layers_cluster_16_bit_weights_and_keep_fine_ones() -> None:
    torch.manual_seed(0)
    method = EDKM(bits=2, weight_threshold=256)
    model = Rounded(method.prepare(models.digits_mlp(num_classes=2)))
    layers = [m for m in model.modules() if isinstance(m, Palettized)]
    assert all(layer.weight.dtype == torch.bfloat16 for layer in layers)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    output = model(torch.randn(4, 1, 8, 8))
    assert output.dtype == torch.float32
    output.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    rounded = [layer.weight.detach().clone() for layer in layers]
    model.settle()
    assert all(isinstance(layer.weight, nn.Parameter) for layer in layers)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, rounded, strict=True))


def test_soft_scores_leave_the_model_as_it_was() -> None:
    model = EDKM(bits=1, weight_threshold=256).prepare(models.digits_mlp()).eval()
    layers = [m for m in model.modules() if isinstance(m, Palettized)]
    for layer in layers:
        layer.palette.hard = True
    x = torch.randn(4, 1, 8, 8)
    hard = model(x)
    with edkm._soft(model):
        assert not torch.equal(model(x), hard)
    assert torch.equal(model(x), hard)
    assert all(layer.palette.hard for layer in layers)


def test_centroid_path_of_the_implicit_gradient_is_exact() -> None:
    torch.manual_seed(0)
    dense = models.digits_mlp((32,), num_classes=2)
    prepared = EDKM(bits=2, weight_threshold=256).prepare(dense)
    images = _images()
    batch = (images.normalize(images.train), images.train_labels)
    (row,) = centroid_path.centroid_path(dense, prepared, batch, [0.1])
    assert row["layer"] == "features.0"
    assert row["residual"] < 1e-10
    assert row["implicit"]["status"] == 0
    assert row["implicit"]["apart"] < 1e-5
    assert row["implicit"]["cosine"] > 0.9999
    assert row["implicit"]["norm_ratio"] == pytest.approx(1, abs=1e-3)
    assert row["implicit"]["error"] < row["unroll 3"]["error"]


def test_compare_knows_nothing_of_a_vanished_truth() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert all(math.isnan(value) for value in centroid_path.compare(one, zero).values())
    assert centroid_path.compare(zero, one) == {"cosine": 0.0, "norm_ratio": 0.0, "error": 1.0}


# ------------------------------------------------------------------------------------------------------- criteria


def _cell(setting: Setting, **changes: object) -> dict[str, object]:
    cell = {"setting": setting.name, "palette": setting.palette, "seed": 0, "seconds": 1.0, **setting.__dict__}
    cell |= {"score": 97.5, "soft": 97.6, "packed": 97.5, "kmeans": 90.0 if setting.bits == 2 else 60.0}
    cell |= {"kmeans_continued": 88.0 if setting.bits == 2 else 61.0}
    cell |= {"bits_per_weight": 2.0, "model_dense_bytes": 4096, "model_packed_bytes": 512, "soft_hard": 0.1}
    return cell | {"below_floor": 0, "stalled": 0} | changes


def _results(unit: str, *cells: dict[str, object], **more: object) -> dict[str, object]:
    dense = [{"seed": 0, "score": 97.8, "continued": 98.0}]
    if unit == edkm_report.BITS:
        dense = [{"seed": 0, "score": 2.2, "continued": 2.0}]
    settings = {
        "condition": "Stripes.",
        "unit": unit,
        "weights": None,
        "plan": json.loads(json.dumps(vars(PLAN), default=vars)),
    }
    where = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    return {"dense": dense, "cells": list(cells), "settings": settings, "environment": where, **more}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, None),
        ({"score": 96.9, "soft": 96.9}, "at most 1 point below"),
        ({"kmeans": 95.0}, "at least 3 points worse"),
        ({"soft": 97.1}, "soft and nearest"),
    ],
)
def test_criteria_of_two_bits(changes: dict[str, object], failed: str | None) -> None:
    results = _results(edkm_report.ACCURACY, _cell(Setting(2), **changes), _cell(Setting(1)))
    failures = [c.name for c in edkm_report.criteria(results) if c.passed is False]
    assert len(failures) == (failed is not None)
    assert failed is None or failed in failures[0]


def test_criteria_of_mixed_bits_and_gradients() -> None:
    row = {
        "layer": "a",
        "clusters": 4,
        "rho": 0.1,
        "implicit": {"cosine": 1.0, "norm_ratio": 1.0005, "error": 0.0, "status": 0},
    }
    cells = [
        _cell(Setting(4, grad, conv_bits=2), score=score) for grad, score in (("unroll", 97.5), ("implicit", 97.4))
    ]
    results = _results(edkm_report.ACCURACY, *cells, gradients=[row])
    assert [c.passed for c in edkm_report.criteria(results)] == [True, True, True]
    row["implicit"]["norm_ratio"] = 1.002
    cells[1]["score"] = 97.3
    assert [c.passed for c in edkm_report.criteria(results)] == [True, False, False]


@pytest.mark.parametrize(("score", "kmeans", "passed"), [(2.03, 2.1, [True, True]), (2.04, 2.09, [False, False])])
def test_criteria_of_text_count_bits_upwards(score: float, kmeans: float, passed: list[bool]) -> None:
    results = _results(
        edkm_report.BITS, _cell(Setting(3), score=score, soft=score, kmeans=kmeans + 1, kmeans_continued=kmeans)
    )
    assert [c.passed for c in edkm_report.criteria(results)] == passed


def test_a_setting_that_was_not_run_is_not_judged() -> None:
    results = _results(edkm_report.ACCURACY, _cell(Setting(2)))
    assert [c.found for c in edkm_report.criteria(results) if c.passed is None] == ["not run"]


# -------------------------------------------------------------------------------------------- validation, command


def test_a_validation_run_never_touches_the_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test images are an object that allows nothing, so that any use of them is an error."""
    unreadable = replace(_images(), test=object(), test_labels=object())
    monkeypatch.setattr(edkm.datasets, "load", lambda *_, **__: unreadable)
    plan = replace(PLAN, settings=(Setting(2),))
    with pytest.raises((TypeError, AttributeError)):
        edkm.experiment("stripes", 1, out=tmp_path, plan=plan)
    results = edkm.experiment("stripes", 1, out=tmp_path, plan=replace(plan, validate=True))
    assert "10 of the 48 training images are set aside" in edkm_report.conditions(results)
    assert (tmp_path / "validation" / "validation.json").is_file()


@pytest.mark.usefixtures("_tiny_data")
def test_the_command_prints_criteria_and_writes_the_report(tmp_path: Path) -> None:
    arguments = ["train", "edkm", "--seeds", "1", "--epochs", "1", "--lr", "0.02", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "criterion" in done.output
    folder = tmp_path / "edkm-digits_mlp-digits"
    table = (folder / "results.md").read_text()
    assert "| 2 bits, implicit | 1 |" in table
    assert "| criterion | found | met |" in table
    assert json.loads((folder / "results.json").read_text())["settings"]["plan"]["lr"] == 0.02
    check_plots(folder, "score_bits.png")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lr", "0"], "cofire: experiment: lr must be a positive number, got 0"),
        (["--epochs", "0"], "cofire: experiment: epochs must be at least 1, got 0"),
        (["--seeds", "0"], "cofire: experiment: seeds must be at least 1, got 0"),
        (["--head-lr", "1"], "cofire: experiment: edkm has no heads; --lr sets the rate of the second training"),
        (
            ["--data", "text", "--model", "vgg16"],
            "cofire: experiment: the network for text is char_transformer, got 'vgg16'",
        ),
    ],
)
def test_the_command_line_refuses_with_a_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(cli.app, ["train", "edkm", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert sentence in done.output
    assert not list(tmp_path.iterdir())


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    root = Path(__file__).parents[1]
    page = root / "docs" / "edkm.md"
    before = page.read_text()
    folder = root / "benchmarks" / "results" / "experiments"
    assert not report.update_page(page, folder, edkm_report.markdown), "now fresh: commit it"
    assert page.read_text() == before
