# SPDX-License-Identifier: Apache-2.0
"""OFQ's experiment: what a cell measures, resuming, validation, criteria, and the published tables, on tiny data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from cofire import cli, models
from cofire.data import Images
from cofire.experiments import ofq, ofq_report, report, training
from cofire.experiments.ofq import Plan, Setting
from cofire.methods import OFQ
from helpers import check_plots

PLAN = Plan(
    model="digits_vit",
    settings=(Setting("statsq", 0.002, anneal=True), Setting("lsq", 0.001)),
    dense_epochs=2,
    epochs=1,
    anneal_epochs=1,
    batch=16,
    dense_lr=0.002,
    warm_up=2,
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


@pytest.fixture
def _tiny_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ofq.datasets, "load", lambda *_, **__: _images())


@pytest.mark.usefixtures("_tiny_data")
def test_experiment_writes_every_cell_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = ofq.experiment("stripes", 1, out=tmp_path, plan=PLAN)
    names = ["StatsQ", "StatsQ, annealed", "StatsQ, continued", "LSQ"]
    assert [c["setting"] for c in results["cells"]] == names
    for cell in results["cells"]:
        assert cell["packed"] == cell["accuracy"]
        assert cell["deployed_equal"] > 0.9
        assert cell["course"][-1] == (3, cell["oscillating"])
        # four blocks of a 64x64 matrix for each of four heads, of v and proj, and of two of twice the width
        assert cell["quantized"] == 4 * 64 * 64 * (4 + 2 + 4)
        assert cell["oscillating"] * cell["quantized"] == pytest.approx(ofq_report.count(cell))
        assert cell["scale_variance"] >= 0
    assert [row["shape"][0] for row in results["latency"]] == [1, 16]
    assert all(
        row["integer"]["packed_ms"] > 0 and row["integer"]["shape"] == row["shape"] for row in results["latency"]
    )
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert not list(tmp_path.rglob("*.tmp"))

    # One cell lost: it alone is trained again, and comes out the same.
    lost = written["cells"].pop(1)
    (tmp_path / "results.json").write_text(json.dumps(written))
    fitted = []
    fit = ofq.fit
    monkeypatch.setattr(ofq, "fit", lambda *args, **kwargs: fitted.append(1) or fit(*args, **kwargs))
    again = ofq.experiment("stripes", 1, out=tmp_path, plan=PLAN)
    assert fitted == [1]
    assert json.loads(json.dumps(again["cells"][-1])) | {"seconds": 0} == lost | {"seconds": 0}

    with pytest.raises(ValueError, match="holds another experiment"):
        ofq.experiment("stripes", 1, out=tmp_path, plan=replace(PLAN, epochs=2))


@pytest.mark.usefixtures("_tiny_data")
def test_the_phases_go_on_from_the_trained_network_at_its_last_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fit(model: torch.nn.Module, images: Images, groups: list[dict[str, float]], **options: object) -> None:
        annealing = any(getattr(m, "annealing", False) for m in model.modules())
        seen.append((groups[0]["lr"], options.get("floor", 0.0), options["epochs"], annealing))
        training.fit(model, images, groups, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ofq, "fit", fit)
    ofq.experiment("stripes", 1, out=tmp_path, plan=replace(PLAN, settings=PLAN.settings[:1], anneal_epochs=2))
    assert seen[0] == (0.002, 0.0, 2, False)
    assert seen[1:] == [
        (0.002, 0.1, 1, False),
        (pytest.approx(0.0002), 1.0, 2, True),
        (pytest.approx(0.0002), 1.0, 2, False),
    ]


def test_fit_warms_up_and_falls_to_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    torch.manual_seed(0)
    model = models.digits_mlp((8,), num_classes=2)
    groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(model.parameters())]

    def make(given: list[dict[str, object]]) -> torch.optim.Optimizer:
        optimizer = training.adamw(given)
        step = optimizer.step
        monkeypatch.setattr(
            optimizer, "step", lambda: (rates.append([g["lr"] for g in optimizer.param_groups]), step())
        )
        return optimizer

    steps: list[int] = []
    training.fit(
        model, _images(), groups, epochs=4, batch=16, seed=0, make=make, scheduled=2, warm_up=3, floor=0.1,
        watch=steps.append,
    )  # fmt: skip
    assert steps == list(range(1, 13))
    first = [r[0] / 0.01 for r in rates]
    assert first[0] == pytest.approx(1 / 3) and first[1] < first[2]
    assert first[3:] == sorted(first[3:], reverse=True) and 0.1 < first[-1] < 0.13
    assert [r[1] for r in rates] == pytest.approx([2 * r[0] for r in rates])
    assert {r[2] for r in rates} == {0.03}


def test_the_watch_measures_the_variance_of_row_scales() -> None:
    """Against all the scales kept and torch.var."""
    torch.manual_seed(0)
    model = OFQ(distill=0).prepare(models.digits_vit(), torch.randn(4, 1, 8, 8))
    watch = ofq._Watch(model, total=10, share=0.4, bits=2)
    layers = ofq._layers(model, 2)
    kept = []
    for step in range(1, 11):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn_like(p)
        watch(step)
        kept.append(torch.cat([m.quantizer.row_scale(m.matrix()) for m in layers]).double())
    last = torch.stack(kept[-4:])
    expected = (last.var(0, correction=0) / last.mean(0).square()).mean()
    assert watch.found()["scale_variance"] == pytest.approx(float(expected))
    assert len(layers) == 4 * 5
    layers[0].quantizer.oscillation[:] = 1
    share = layers[0].weights / sum(layer.weights for layer in layers)
    assert ofq.oscillating(model, 2) == pytest.approx(share)
    assert ofq.oscillating(model, 2, type(layers[0])) == pytest.approx(1 / 4)


# ------------------------------------------------------------------------------------------------------- criteria


def _cell(setting: str, seed: int, **changes: object) -> dict[str, object]:
    measured = {
        ofq_report.STATSQ: {
            "accuracy": 97.0,
            "oscillating": 0.006,
            "scale_variance": 1e-6,
            "course": [(1, 0), (2, 0.01)],
        },
        ofq_report.LSQ: {"accuracy": 96.4, "oscillating": 0.01, "scale_variance": 1e-5},
        ofq_report.ANNEALED: {"accuracy": 97.0, "oscillating": 0.001, "scale_variance": 1e-9},
    }[setting]
    cell = {"setting": setting, "seed": seed, "packed": 97.0, "near_boundary": 0.01, "bits_per_weight": 2.1}
    cell |= {"seconds": 1.0, "model_dense_bytes": 4096, "model_packed_bytes": 512, "deployed_error": 1e-3}
    cell |= {"deployed_equal": 0.995, "course": [(1, 0.0), (2, 0.02)], "quantized": 10_000}
    return cell | measured | changes


def _results(**changes: dict[str, object]) -> dict[str, object]:
    cells = [
        _cell(name, seed, **changes.get(name.split()[-1], {}))
        for seed in (0, 1)
        for name in (ofq_report.STATSQ, ofq_report.ANNEALED, ofq_report.LSQ)
    ]
    where = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    settings = {"condition": "Stripes.", "weights": None, "plan": json.loads(json.dumps(vars(PLAN), default=vars))}
    dense = [{"seed": 0, "accuracy": 98.0}, {"seed": 1, "accuracy": 97.0}]
    latency = [{"shape": [1, 1, 8, 8], "dense_ms": 2.0, "packed_ms": 1.0, "threads": 1}]
    latency += [{**latency[0], "shape": [8, 1, 8, 8], "integer": {"dense_ms": 3.0, "packed_ms": 2.0}}]
    return {"dense": dense, "cells": cells, "settings": settings, "environment": where, "latency": latency}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, None),
        ({"LSQ": {"oscillating": 0.008}}, "StatsQ at most 0.7"),
        ({"LSQ": {"course": [(1, 0.005), (2, 0.008)]}}, "over the course"),
        ({"LSQ": {"accuracy": 96.6}}, "at least 0.5 points"),
        ({"annealed": {"oscillating": 0.0013}}, "after annealing at most 0.2"),
        ({"annealed": {"accuracy": 96.9}}, "annealing loses nothing"),
        ({"LSQ": {"scale_variance": 4e-6}}, "row scales"),
        ({"LSQ": {"deployed_equal": 0.98}}, "deployed outputs"),
    ],
)
def test_criteria_judge_what_was_measured(changes: dict[str, dict[str, object]], failed: str | None) -> None:
    failures = [c.name for c in ofq_report.criteria(_results(**changes)) if not c.passed]
    assert len(failures) == (failed is not None)
    assert failed is None or failed in failures[0]


def test_what_was_not_run_is_not_judged() -> None:
    results = _results()
    results["cells"] = [c for c in results["cells"] if c["setting"] == ofq_report.STATSQ]
    found = ofq_report.criteria(results)
    assert [c.passed for c in found] == [None] * 6 + [True]
    assert {c.found for c in found[:6]} == {"not run"}


def test_tables_show_losses_and_intervals() -> None:
    assert ofq_report.interval([97.0, 98.0]) == pytest.approx(12.706 * 0.5**0.5 / 2**0.5)
    assert ofq_report.interval([97.0]) is None
    results = _results()
    results["cells"][0]["accuracy"] = 96.0
    text = ofq_report.markdown(results)
    assert "| StatsQ | 2 | 96.50 | 6.35 | 97.00 | 0.600% | 60, 60 | 0.50% | 1.0e-06 | 1.00% |" in text
    assert "| full precision | 2 | 97.50 |" in text
    assert "| accuracy: StatsQ at least 0.5 points above LSQ | +0.10 points (95 % interval +-6.35) | no |" in text
    assert "| 1 | 2.00 | 1.00 | 2.00x |  |  |  |" in text
    assert "| 8 | 2.00 | 1.00 | 2.00x | 3.00 | 2.00 | 1.50x |" in text


def test_ratios_have_an_interval_over_the_seeds() -> None:
    results = _results()
    shares = {ofq_report.STATSQ: [0.0040, 0.0090], ofq_report.LSQ: [0.0100, 0.0100]}
    for cell in results["cells"]:
        if cell["setting"] in shares:
            cell["oscillating"] = shares[cell["setting"]][cell["seed"]]
    found = ofq_report.criteria(results)[0]
    # ratios 0.4 and 0.9: their logarithms' mean is log(0.6), their half interval 12.706 * log(1.5)
    low, high = 0.6 * 1.5**-12.706, 0.6 * 1.5**12.706
    assert found.found == (
        f"0.65 (95 % interval {low:.2g} to {high:.2g}; 0.650% against 1.000%, 40, 90 weights against 100, 100)"
    )
    assert found.passed
    results["cells"][0]["oscillating"] = 0.0  # no logarithm
    assert ofq_report.criteria(results)[0].found == "0.45 (0.450% against 1.000%, 0, 90 weights against 100, 100)"
    assert "as a share of 10,000 weights" in ofq_report.conditions(results)


# -------------------------------------------------------------------------------------------- validation, command


def test_a_validation_run_never_touches_the_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test images are an object that allows nothing, so that any use of them is an error. It ends with the training
    whose rate it is to choose."""
    unreadable = replace(_images(), test=object(), test_labels=object())
    monkeypatch.setattr(ofq.datasets, "load", lambda *_, **__: unreadable)
    results = ofq.experiment("stripes", 1, out=tmp_path, plan=replace(PLAN, validate=True))
    assert "10 of the 48 training images are set aside" in ofq_report.conditions(results)
    assert [c["setting"] for c in results["cells"]] == ["StatsQ", "LSQ"]
    assert (tmp_path / "validation" / "validation.json").is_file()


@pytest.mark.usefixtures("_tiny_data")
def test_the_command_prints_criteria_and_writes_the_report(tmp_path: Path) -> None:
    arguments = ["train", "ofq", "--seeds", "1", "--epochs", "1", "--lr", "0.003", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "criterion" in done.output
    folder = tmp_path / "ofq-digits_vit-digits"
    table = (folder / "results.md").read_text()
    assert "| StatsQ, annealed | 1 |" in table
    assert "| criterion | found | met |" in table
    plan = json.loads((folder / "results.json").read_text())["settings"]["plan"]
    assert [setting["lr"] for setting in plan["settings"]] == [0.003, 0.003]
    check_plots(folder, "oscillation.png")


def test_plans_fit_the_data() -> None:
    assert ofq.plan_of("digits") == ofq.DIGITS
    assert ofq.plan_of("some/folder").model == "vit_patch8"
    assert ofq.plan_of("some/folder", model="vit", epochs=3).epochs == 3
    small = SimpleNamespace(train=torch.empty(4_000, 3, 32, 32))
    assert training.steps_per_epoch(small, ofq.IMAGES.batch) == 63  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lr", "0"], "cofire: experiment: lr must be a positive number, got 0"),
        (["--epochs", "0"], "cofire: experiment: epochs must be at least 1, got 0"),
        (["--seeds", "0"], "cofire: experiment: seeds must be at least 1, got 0"),
        (["--head-lr", "1"], "cofire: experiment: ofq has no heads; --lr sets the rate of the quantised training"),
    ],
)
def test_the_command_line_refuses_with_a_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(cli.app, ["train", "ofq", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert sentence in done.output
    assert not list(tmp_path.iterdir())


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    root = Path(__file__).parents[1]
    page = root / "docs" / "ofq.md"
    before = page.read_text()
    folder = root / "benchmarks" / "results" / "experiments"
    assert not report.update_page(page, folder, ofq_report.markdown), "now fresh: commit it"
    assert page.read_text() == before
