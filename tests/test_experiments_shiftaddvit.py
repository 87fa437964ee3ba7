# SPDX-License-Identifier: Apache-2.0
"""ShiftAddViT's experiment: what a cell measures, resuming, validation, criteria, and the published tables, on tiny data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cofire import cli, models
from cofire.data import Images
from cofire.experiments import report, shiftaddvit, shiftaddvit_report
from cofire.experiments.shiftaddvit import CELLS, Plan
from cofire.methods import ShiftAddViT
from cofire.nn import MixtureOfPrimitives
from helpers import check_plots

PLAN = Plan(
    model="digits_vit",
    dense_epochs=2,
    epochs=1,
    batch=16,
    dense_lr=0.002,
    lr=0.002,
    cells=(*CELLS[:2], *CELLS[3:5]),
    bits=8,
    anchors=6,
    topk=4,
    fitted=16,
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
    monkeypatch.setattr(shiftaddvit.datasets, "load", lambda *_, **__: _images())


@pytest.mark.usefixtures("_tiny_data")
def test_experiment_writes_every_cell_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = shiftaddvit.experiment("stripes", 1, out=tmp_path, plan=PLAN)
    assert [c["cell"] for c in results["cells"]] == ["continued", "additions", "shifts", "mixture 6:4"]
    continued, additions, shifts, mixture = results["cells"]
    assert "packed" not in continued and continued["before"] == results["dense"][0]["accuracy"]
    assert shifts["before"] <= 100 and additions["dense_bytes"] == 0
    assert additions["kernel_error"] < 1e-5 and 0 <= additions["overlap"] <= 1 and additions["chance"] == 4 / 255
    assert shifts["weights"] == 4 * (3 * 64 * 64 + 2 * 64 * 128) and shifts["dead"] < shifts["weights"]
    assert shifts["shift_share"] is None and mixture["balanced_share"] == pytest.approx(0.6)
    # the task does not reach those of the four qk, whose rows the hash normalises: the balance does
    assert mixture["router_gradient"] > 0 and (mixture["routers"], mixture["routers_reached"]) == (20, 16)
    assert mixture["training_gradient"] > 0 and mixture["routers_trained"] == 20
    assert mixture["resident_bytes"] - mixture["packed_bytes"] == 4 * mixture["weights"]
    assert [step for step, _ in mixture["course"]] == [1, 2, 3]
    for cell in results["cells"][1:]:
        assert cell["packed"] == cell["accuracy"] and cell["deployed_equal"] > 0.9
    assert [(row["cell"], row["shape"][0]) for row in results["latency"]] == [
        (name, n) for name in ("additions", "shifts", "mixture 6:4") for n in (1, 16)
    ]
    assert [row["shape"] for row in results["experts"]] == [[64, 64], [64, 128], [128, 64]]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert not list(tmp_path.rglob("*.tmp"))

    # One cell lost: it alone is trained again, and comes out the same.
    lost = written["cells"].pop(3)
    (tmp_path / "results.json").write_text(json.dumps(written))
    fitted = []
    fit = shiftaddvit.fit
    monkeypatch.setattr(shiftaddvit, "fit", lambda *args, **kwargs: fitted.append(1) or fit(*args, **kwargs))
    again = shiftaddvit.experiment("stripes", 1, out=tmp_path, plan=PLAN)
    assert fitted == [1]
    assert json.loads(json.dumps(again["cells"][-1])) | {"seconds": 0} == lost | {"seconds": 0}

    with pytest.raises(ValueError, match="holds another experiment"):
        shiftaddvit.experiment("stripes", 1, out=tmp_path, plan=replace(PLAN, epochs=2))


def test_the_watch_counts_tokens_and_changes_nothing() -> None:
    method = ShiftAddViT(alpha=(6, 4), bits=8, anchors=6, topk=4)
    x = torch.randn(16, 1, 8, 8)
    model = method.prepare(models.digits_vit(), x).train()
    watch = shiftaddvit._Watch(model, x, total=10)
    assert watch.share() == 1 and model.training  # equal logits
    layers = [m for m in model.modules() if isinstance(m, MixtureOfPrimitives)]
    with torch.no_grad():
        for layer in layers[:5]:
            layer.router.bias[0] = 1
    assert watch.share() == pytest.approx(1 - 5 / len(layers)) == pytest.approx(method.report(model, [x]).shift_share)
    for step in range(1, 11):
        watch(step)
    assert [step for step, _ in watch.course] == list(range(1, 11))


def test_overlap_is_whole_where_codes_order_as_angles_do(monkeypatch: pytest.MonkeyPatch) -> None:
    method = ShiftAddViT(1, bits=8, anchors=6, topk=4)
    x = torch.randn(16, 1, 8, 8)
    model = method.prepare(models.digits_vit(), x)
    before = {n: b.clone() for n, b in model.named_buffers()}
    found = shiftaddvit.hash_overlap(model, x, 10)
    assert found["chance"] == 10 / 255 and found["chance"] < found["random_overlap"] < 1
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())

    def angles(codes: torch.Tensor, _: torch.Tensor, bits: int) -> torch.Tensor:
        rows = seen.pop(0)
        return 1e6 * rows @ rows.transpose(1, 2)

    seen = []
    for layer, inputs in shiftaddvit._inputs(model, x):
        unit = torch.nn.functional.normalize(layer._heads(layer.qk(inputs)), dim=-1)
        seen += [unit.transpose(0, 1).flatten(1, 2).detach()] * 2
    monkeypatch.setattr(shiftaddvit.ops, "hamming_similarity", angles)
    assert shiftaddvit.hash_overlap(model, x, 10)["overlap"] > 0.99


# ------------------------------------------------------------------------------------------------------- criteria


def _cell(name: str, seed: int, **changes: object) -> dict[str, object]:
    stage = {"continued": 0, "additions": 1, "shifts": 2}.get(name, 3)
    cell = {"cell": name, "seed": seed, "stage": stage, "before": 50.0, "accuracy": 96.0, "seconds": 1.0}
    if stage:
        cell |= {"packed": 96.0, "deployed_equal": 1.0, "deployed_error": 1e-6, "dead": 1, "weights": 100}
        cell |= {"dense_bytes": 4096, "packed_bytes": 1024, "resident_bytes": 1024 * stage, "shift_share": None}
        cell |= {"model_bytes": 8192, "model_resident_bytes": 10240}
    if stage == 1:
        cell |= {"overlap": 0.3, "random_overlap": 0.2, "chance": 0.02, "codes_differing": 0, "kernel_error": 1e-7}
        cell |= {"weights": 0}
    if stage == 3:
        implied = 0.6 if "6:4" in name else 0.8
        cell |= {"balanced_share": implied, "shift_share": implied + 0.01, "router_gradient": 1e-3}
        cell |= {"routers": 20, "routers_reached": 20, "routers_trained": 20, "training_gradient": 2e-4}
        cell |= {"course": [(1, 1.0), (2, implied)]}
    return cell | changes


def _results(**changes: dict[str, object]) -> dict[str, object]:
    names = ("continued", "additions", "shifts", "mixture 6:4", "mixture 8:2")
    cells = [_cell(name, seed, **changes.get(name.replace(" ", "_"), {})) for seed in (0, 1) for name in names]
    where = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    settings = {"condition": "Stripes.", "weights": None, "plan": json.loads(json.dumps(vars(PLAN), default=vars))}
    dense = [{"seed": 0, "accuracy": 96.5}, {"seed": 1, "accuracy": 95.5}]
    latency = [{"cell": "shifts", "shape": [1, 1, 8, 8], "dense_ms": 2.0, "packed_ms": 1.0, "threads": 1}]
    experts = [{"shape": [64, 128], "dense_us": 10.0, "shift_us": 20.0}]
    return {
        "dense": dense, "cells": cells, "settings": settings, "environment": where, "latency": latency,
        "experts": experts,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, None),
        ({"additions": {"accuracy": 94.9}}, "attention of additions loses"),
        # the better control counts
        ({"continued": {"accuracy": 97.6}, "mixture_8:2": {"accuracy": 97.0}, "mixture_6:4": {"accuracy": 97.0},
          "additions": {"accuracy": 96.5}}, "attention of additions loses"),
        ({"mixture_6:4": {"accuracy": 94.4}, "shifts": {"accuracy": 94.0}}, "mixture 6:4 loses at most 1.5"),
        ({"shifts": {"accuracy": 96.1}, "mixture_6:4": {"accuracy": 96.2}}, "mixture 8:2 at least as accurate"),
        ({"mixture_8:2": {"shift_share": 0.89}}, "mixture 8:2: share of the shift expert"),
        ({"mixture_6:4": {"shift_share": 0.665}, "mixture_8:2": {"shift_share": 0.74}}, "the share moves"),
        ({"mixture_8:2": {"routers_trained": 19}}, "every router gets a gradient"),
        ({"mixture_8:2": {"routers_reached": 16}}, "the task's gradient reaches every router"),
        ({"additions": {"overlap": 0.039}}, "similar tokens"),
        ({"additions": {"codes_differing": 1}}, "kernels"),
        ({"shifts": {"deployed_equal": 0.98}}, "deployed outputs"),
    ],
)  # fmt: skip
def test_criteria_judge_what_was_measured(changes: dict[str, dict[str, object]], failed: str | None) -> None:
    failures = [c.name for c in shiftaddvit_report.criteria(_results(**changes)) if not c.passed]
    assert len(failures) == (failed is not None), failures
    assert failed is None or failed in failures[0]


def test_what_was_not_run_is_not_judged() -> None:
    results = _results()
    results["cells"] = [c for c in results["cells"] if c["stage"] == 3]
    found = {c.name: c for c in shiftaddvit_report.criteria(results)}
    assert found["attention of additions loses at most 1.0 points"].passed is None
    assert found["mixture 6:4 at least as accurate as shifts alone"].found == "not run"
    assert found["mixture 6:4 loses at most 1.5 points"].passed


def test_gradients_that_older_results_do_not_have_are_not_judged() -> None:
    results = _results(**{"mixture_6:4": {"routers_reached": 16}})
    for cell in results["cells"]:
        cell.pop("routers_trained", None)
    task, both = (c for c in shiftaddvit_report.criteria(results) if "router" in c.name)
    assert both.passed is None and both.found == "not recorded"
    assert task.passed is False and task.found == "72 of 80, least norm 1.0e-03"


def test_every_router_is_trained_by_task_or_balance() -> None:
    """Without a balance those of the projections that the hash normalises are not; the network is left as it was."""
    options = {"alpha": (6, 4), "bits": 8, "anchors": 6, "topk": 4}
    x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    for balance, trained in ((0.01, 20), (0.0, 16)):
        method = ShiftAddViT(balance=balance, **options)
        model = method.prepare(models.digits_vit(), x)
        with torch.no_grad():  # as training leaves them: no longer equal logits
            for layer in model.modules():
                if isinstance(layer, MixtureOfPrimitives):
                    layer.router.weight.normal_(std=0.1)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        drawn = torch.get_rng_state()
        found = shiftaddvit.router_gradients(method, model, x, y)
        assert (found["routers"], found["routers_trained"], found["routers_reached"]) == (20, trained, 16)
        assert torch.equal(torch.get_rng_state(), drawn) and all(p.grad is None for p in model.parameters())
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_tables_show_losses_and_sizes() -> None:
    text = shiftaddvit_report.markdown(_results(shifts={"accuracy": 90.0}))
    assert "| full precision | 2 |  | 96.00 | 6.35 |  |  |  |" in text
    assert "| shifts | 2 | 50.00 | 90.00 | 0.00 | 96.00 |  | 1.00% |" in text
    assert "| mixture 8:2 | 2 | 50.00 | 96.00 | 0.00 | 96.00 | 81.0% | 1.00% |" in text
    assert "| additions |  |  |  | 8.0 | 10.0 |" in text and "| shifts | 4.0 | 1.0 | 2.0 | 8.0 | 10.0 |" in text
    assert "| the task's gradient reaches every router | 80 of 80, least norm 1.0e-03 | yes |" in text
    assert "| every router gets a gradient, of task and balance | 80 of 80, least norm 2.0e-04 | yes |" in text
    assert "| shifts | 1 | 2.00 | 1.00 | 2.00x |" in text and "| 64x128 | 10 | 20 |" in text


# -------------------------------------------------------------------------------------------- validation, command


def test_a_validation_run_never_touches_the_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test images are an object that allows nothing, so that any use of them is an error."""
    unreadable = replace(_images(), test=object(), test_labels=object())
    monkeypatch.setattr(shiftaddvit.datasets, "load", lambda *_, **__: unreadable)
    plan = replace(PLAN, validate=True, cells=CELLS[1:2])
    results = shiftaddvit.experiment("stripes", 1, out=tmp_path, plan=plan)
    assert "10 of the 48 training images are set aside" in shiftaddvit_report.conditions(results)
    assert (tmp_path / "validation" / "validation.json").is_file()


@pytest.mark.usefixtures("_tiny_data")
def test_the_command_prints_criteria_and_writes_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shiftaddvit, "DIGITS", replace(PLAN, cells=(CELLS[1], CELLS[4])))
    arguments = ["train", "shiftaddvit", "--seeds", "1", "--epochs", "1", "--lr", "0.003", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "criterion" in done.output
    folder = tmp_path / "shiftaddvit-digits_vit-digits"
    table = (folder / "results.md").read_text()
    assert "| additions | 1 |" in table and "| criterion | found | met |" in table
    plan = json.loads((folder / "results.json").read_text())["settings"]["plan"]
    assert (plan["lr"], plan["epochs"], plan["dense_epochs"]) == (0.003, 1, 1)
    check_plots(folder, "shares.png")


def test_plans_fit_the_data() -> None:
    assert shiftaddvit.plan_of("digits") == shiftaddvit.DIGITS
    assert shiftaddvit.plan_of("some/folder").model == "vit_patch8"
    assert shiftaddvit.plan_of("some/folder", model="pvt", epochs=3).epochs == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lr", "0"], "cofire: experiment: lr must be a positive number, got 0"),
        (["--epochs", "0"], "cofire: experiment: epochs must be at least 1, got 0"),
        (["--seeds", "0"], "cofire: experiment: seeds must be at least 1, got 0"),
        (["--head-lr", "1"], "cofire: experiment: shiftaddvit has no heads; --lr sets the rate"),
    ],
)
def test_the_command_line_refuses_with_a_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(cli.app, ["train", "shiftaddvit", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert sentence in done.output
    assert not list(tmp_path.iterdir())


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    root = Path(__file__).parents[1]
    page = root / "docs" / "shift_add.md"
    before = page.read_text()
    folder = root / "benchmarks" / "results" / "experiments"
    assert not report.update_page(page, folder, shiftaddvit_report.markdown), "now fresh: commit it"
    assert page.read_text() == before
