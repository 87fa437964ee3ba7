# SPDX-License-Identifier: Apache-2.0
"""The training loop, the experiment and its bookkeeping, on tiny data."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cofire import cli, models
from cofire.data import Images
from cofire.experiments import files, ftwt, ftwt_report, latency, report, training
from cofire.experiments.ftwt import Budget, Plan
from cofire.files import write_atomically
from cofire.methods import FTWT
from helpers import check_plots

PLAN = Plan(
    model="digits_cnn",
    budgets=(Budget(0.9), Budget(0.7, "joint", seeds=1)),
    dense_epochs=1,
    gated_epochs=1,
    batch=16,
    dense_lr=0.05,
    gated_lr=0.01,
    head_lr=10.0,
    counted=8,
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
    monkeypatch.setattr(ftwt.datasets, "load", lambda *_, **__: _images())


def test_fit_learns_and_repeats_exactly() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = models.digits_cnn((8, 8), num_classes=2)
        groups = [{"params": model.parameters(), "lr": 0.05}]
        training.fit(model, _images(), groups, epochs=5, batch=16, seed=0)
        weights.append(model.classifier.weight.detach().clone())
    assert torch.equal(*weights)
    assert training.accuracy(model, _images()) == 100


def test_fit_schedules_the_backbone_and_not_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = torch.optim.SGD.step

    def record(self: torch.optim.SGD, *args: object) -> object:
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    method = FTWT(mass=0.9, total_steps=6)
    model = method.prepare(models.digits_cnn((8, 8), num_classes=2))
    groups = method.parameter_groups(model, lr=0.01, head_lr=1.0)
    training.fit(model, _images(), groups, epochs=2, batch=16, seed=0, method=method)
    assert len(seen) == 6
    assert [head for _, head in seen] == [1.0] * 6
    assert seen[0][0] == 0.01
    assert all(a > b for (a, _), (b, _) in itertools.pairwise(seen))
    assert all(int(m.steps) == 6 for m in model.modules() if hasattr(m, "steps"))


@pytest.mark.usefixtures("_tiny_data")
def test_experiment_writes_every_cell_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = ftwt.experiment("stripes", 2, out=tmp_path, plan=PLAN)
    assert [(c["budget"], c["seed"]) for c in results["cells"]] == [
        ("decoupled 0.9", 0),
        ("joint 0.7", 0),
        ("decoupled 0.9", 1),
    ]
    assert len(results["dense"]) == 2
    assert all("latency" in cell for cell in results["cells"] if cell["seed"] == 0)
    assert max(cell["deployed_error"] for cell in results["cells"]) < 1e-5
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert not list(tmp_path.rglob("*.tmp"))

    # One cell lost: it alone is trained again, and comes out the same.
    lost = written["cells"].pop()
    (tmp_path / "results.json").write_text(json.dumps(written))
    trained = []
    fit = ftwt.fit
    monkeypatch.setattr(ftwt, "fit", lambda *args, **kwargs: trained.append(1) or fit(*args, **kwargs))
    again = ftwt.experiment("stripes", 2, out=tmp_path, plan=PLAN)
    assert trained == [1]
    assert again["cells"][-1] | {"seconds": 0} == lost | {"seconds": 0}

    with pytest.raises(ValueError, match="holds another experiment"):
        ftwt.experiment("stripes", 2, out=tmp_path, plan=replace(PLAN, gated_lr=0.02))


@pytest.mark.usefixtures("_tiny_data")
def test_command_prints_criteria_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ftwt.command(data="digits", seeds=1, epochs=1, out=tmp_path)
    text = capsys.readouterr().out
    assert "criterion" in text
    assert "Stripes." in text.replace("\n", " ")
    folder = tmp_path / "ftwt-digits_cnn-digits"
    table = (folder / "results.md").read_text()
    assert "| decoupled 0.95 | 1 |" in table
    assert "| criterion | found | met |" in table
    check_plots(folder, "accuracy_cut.png", "accuracy_latency.png")


def _cell(mass: float, **changes: object) -> dict[str, object]:
    timing = {
        "dense_ms": 2.0,
        "gated_ms": 1.0,
        "speedup": 2.0,
        "threads": 2,
        "layers": [{"dense_ms": 1.0, "gated_ms": 0.5}],
    }
    cell = {"budget": f"decoupled {mass:g}", "mass": mass, "coupling": "decoupled", "seed": 0, "accuracy": 98.0}
    cell |= {"random_accuracy": 60.0, "cut": 0.45, "cut_paper_rule": 0.5, "estimated_cut": 0.4, "mask_accuracy": 0.9}
    cell |= {"fixed_mask_accuracy": 0.8, "deployed_error": 1e-6, "latency": timing}
    return cell | changes


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, None),
        ({"accuracy": 96.0}, "some budget"),
        ({"random_accuracy": 95.0}, "beat random"),
        ({"mask_accuracy": 0.84}, "mask bits"),
        ({"estimated_cut": 0.3}, "estimated before"),
        ({"deployed_error": 1e-4}, "equals the trained"),
        ({"latency": {"layers": [{"dense_ms": 1.0, "gated_ms": 0.9}]}}, "gated layers take"),
    ],
)
def test_criteria_judge_what_was_measured(change: dict[str, object], failed: str | None) -> None:
    dense = [{"seed": 0, "accuracy": 98.0, "continued": 98.4}]
    results = {"dense": dense, "cells": [_cell(1, cut=0.12, estimated_cut=0.1, accuracy=98.2), _cell(0.8, **change)]}
    failures = [c.name for c in ftwt_report.criteria(results) if not c.passed]
    assert len(failures) == (failed is not None)
    assert failed is None or failed in failures[0]


def test_points_lost_count_from_the_better_baseline() -> None:
    dense = [{"seed": 0, "accuracy": 97.0, "continued": 98.5}]
    (row,) = ftwt_report.summary({"dense": dense, "cells": [_cell(0.8)]})
    assert row["drop"] == pytest.approx(0.5)


def test_fixed_mask_accuracy_is_the_share_of_the_majority() -> None:
    method = FTWT(mass=0.5)
    model = method.prepare(models.digits_cnn((4, 4), num_classes=2)).eval()
    x = torch.rand(3, 1, 8, 8)
    (gate,) = (m for m in model.modules() if hasattr(m, "examine"))
    targets = []
    gate.register_forward_pre_hook(lambda module, args: targets.append(module.examine(*args)[1]))
    found = ftwt.fixed_mask_accuracy(model, [x])
    frequency = targets[0].float().mean(0)
    assert found == pytest.approx(float(torch.maximum(frequency, 1 - frequency).mean()))


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_latency_compares_networks_that_agree(name: str) -> None:
    """All candidates, the prepacked one with residual sums and ReLU6 too, compute the dense network's output."""
    torch.manual_seed(0)
    method = FTWT(mass=0.9)
    model = method.prepare(models.build(name)).eval()
    x = torch.randn(1, 3, 16, 16)
    dense = method.dense(model)
    expected = dense(x)
    for form in (latency._channels_last(dense), latency._prepacked(dense, x)):
        if form is not None:
            torch.testing.assert_close(form(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_weights_are_read_from_common_forms(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pt")
    other = nn.Linear(2, 1)
    files.load_weights(other, files.read_weights(tmp_path / "w.pt"))
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(ValueError, match="do not fit Linear"):
        files.load_weights(nn.Linear(3, 1), state)
    with pytest.raises(FileNotFoundError, match="no file"):
        files.read_weights(tmp_path / "absent.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_update_page_replaces_what_is_between_the_markers(tmp_path: Path) -> None:
    results = {
        "dense": [{"seed": 0, "accuracy": 97.0, "continued": 98.5}],
        "cells": [_cell(0.8)],
        "settings": {"condition": "Stripes.", "weights": None, "plan": {**PLAN.__dict__}},
        "environment": {"cpu": "a CPU", "threads": 2, "torch": "2"},
    }
    (tmp_path / "one.json").write_text(json.dumps(results, default=lambda budget: budget.__dict__))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results: one -->\nold\n<!-- end of results -->\nafter\n")
    assert report.update_page(page, tmp_path, ftwt_report.markdown)
    text = page.read_text()
    assert text.startswith("before\n<!-- results: one -->\n\nStripes.")
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert "| decoupled 0.8 | 1 | 98.00 | +0.50 |" in text
    assert "old" not in text
    assert not report.update_page(page, tmp_path, ftwt_report.markdown)


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    root = Path(__file__).parents[1]
    page = root / "docs" / "ftwt.md"
    before = page.read_text()
    folder = root / "benchmarks" / "results" / "experiments"
    assert not report.update_page(page, folder, ftwt_report.markdown), "now fresh: commit it"
    assert page.read_text() == before


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_no_positive_number_is_refused(tmp_path: Path, rate: float) -> None:
    with pytest.raises(ValueError, match=f"head_lr must be a positive number, got {rate:g}"):
        ftwt.experiment(out=tmp_path, plan=replace(PLAN, head_lr=rate))
    assert not list(tmp_path.iterdir())


def test_seeds_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        ftwt.experiment(seeds=0, out=tmp_path)


# ----------------------------------------------------------------------------------------------- validation runs


def test_a_validation_run_never_touches_the_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test images are an object that allows nothing, so that any use of them is an error."""
    unreadable = replace(_images(), test=object(), test_labels=object())
    monkeypatch.setattr(ftwt.datasets, "load", lambda *_, **__: unreadable)
    plan = replace(PLAN, budgets=(Budget(0.9),))
    with pytest.raises((TypeError, AttributeError)):
        ftwt.experiment("stripes", 1, out=tmp_path, plan=plan)
    results = ftwt.experiment("stripes", 1, out=tmp_path, plan=replace(plan, validate=True, head_lr=3.0))
    assert "10 of the 48 training images are set aside" in ftwt_report.conditions(results)
    assert results["settings"]["plan"]["validate"] is True
    assert results["settings"]["plan"]["head_lr"] == 3.0


@pytest.mark.usefixtures("_tiny_data")
def test_validation_and_test_runs_keep_their_files_apart(tmp_path: Path) -> None:
    plan = replace(PLAN, budgets=(Budget(0.9),))
    ftwt.experiment("stripes", 1, out=tmp_path, plan=replace(plan, validate=True))
    folder = tmp_path / "validation"
    assert [p.name for p in tmp_path.iterdir()] == ["validation"]
    assert sorted(p.name for p in folder.iterdir()) == ["validation.json", "weights"]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    results = ftwt.experiment("stripes", 1, out=tmp_path, plan=plan)
    assert results["settings"]["plan"]["validate"] is False
    assert "Validation" not in ftwt_report.conditions(results)
    assert (tmp_path / "results.json").is_file()
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("_tiny_data")
def test_the_command_line_runs_a_validation(tmp_path: Path) -> None:
    arguments = ["train", "ftwt", "--validate", "--head-lr", "3", "--seeds", "1", "--epochs", "1", "--out", tmp_path]
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert "Validation run" in done.output
    folder = tmp_path / "ftwt-digits_cnn-digits" / "validation"
    assert "Validation run" in (folder / "validation.md").read_text()
    plan = json.loads((folder / "validation.json").read_text())["settings"]["plan"]
    assert (plan["validate"], plan["head_lr"]) == (True, 3.0)
    assert not list(tmp_path.rglob("results.*"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ftwt", "--head-lr", "0"], "cofire: experiment: head_lr must be a positive number, got 0"),
        (["ftwd"], "cofire: no method is called 'ftwd'; did you mean 'ftwt'?"),
        (["FTWT", "--epochs", "0"], "cofire: no method is called 'FTWT'; did you mean 'ftwt'?"),
        (["ftwt", "--epochs", "-1"], "cofire: experiment: epochs must be at least 1, got -1"),
    ],
)
def test_the_command_line_refuses_with_a_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(cli.app, ["train", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert sentence in done.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["report", "/nope.json"], "bench: there is no results file /nope.json; cofire bench writes one"),
        (["info", "--readme", "/nope.json"], "no file '/nope.json'"),
    ],
    ids=["report", "info"],
)
def test_a_missing_file_gets_a_sentence(arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert done.output == f"cofire: {sentence}\n"


def test_no_hook_stays_when_a_forward_fails() -> None:
    model = FTWT(mass=0.9).prepare(models.digits_cnn())
    bad = torch.ones(2, 3, 8, 8)
    with pytest.raises((RuntimeError, ValueError)):
        ftwt.fixed_mask_accuracy(model, [bad])
    layers = {name: module for name, module in model.named_modules() if name}
    with pytest.raises((RuntimeError, ValueError)):
        latency._inputs(model, layers, bad)
    assert not any(module._forward_pre_hooks for module in model.modules())
