# SPDX-License-Identifier: Apache-2.0
"""The experiment on pruning after training: what a cell measures, resuming, criteria, tables, commands."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cofire import cli, ops
from cofire.data import VOCABULARY, Images, Text
from cofire.experiments import dsnot, dsnot_report, report
from cofire.registry import OPERATORS
from helpers import check_plots

PLAN = replace(
    dsnot.MLP,
    settings=(dsnot.WANDA, dsnot.DECREASE, dsnot.SWAP_BIAS, dsnot._two_of_four(dsnot.SWAP)),
    sparsities=(0.5, 0.8),
    epochs=1,
    batch=16,
    widths=(24, 24, 24),
    train_images=48,
)


def _images(count: int = 64) -> Images:
    """Two classes: bright above, or bright below."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    pixels = torch.randint(0, 80, (count, 1, 8, 8), generator=generator)
    pixels[labels == 0, :, :4] += 150
    pixels[labels == 1, :, 4:] += 150
    x, split = pixels.to(torch.uint8), count - 16
    parts = (x[:split], labels[:split], x[split:], labels[split:])
    return Images("stripes", "Stripes.", *parts, ("a", "b"), (0.5,), (0.3,), False)


def _text() -> Text:
    numbers = torch.tensor([VOCABULARY.index(c) for c in "0123456789" * 200], dtype=torch.uint8)
    return Text("text", "The same 10 characters.", numbers, numbers[:400], VOCABULARY)


@pytest.fixture
def _tiny_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsnot.datasets, "load", lambda *_, **__: _images())
    monkeypatch.setattr(dsnot.datasets, "load_text", lambda *_, **__: _text())


@pytest.mark.usefixtures("_tiny_data")
def test_experiment_writes_every_cell_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = dsnot.experiment("stripes", 2, out=tmp_path, plan=PLAN)
    cells = [(name, s) for name in ("Wanda", "DSnoT, decrease", "swap1, bias") for s in (0.5, 0.8)]
    cells.append(("2:4, swap1", 0.5))
    assert [(c["setting"], c["sparsity"], c["seed"]) for c in results["cells"]] == [
        (*c, s) for s in (0, 1) for c in cells
    ]
    for cell in results["cells"]:
        assert cell["weights"] == 2 * 24 * 24 and cell["kept"] == 2 * 24 * round((1 - cell["sparsity"]) * 24)
        assert cell["uniform"] is True and [layer["name"] for layer in cell["layers"]] == ["features.2", "features.4"]
        compared = cell["refine"] != "none" and (cell["sparsity"] == 0.8 or cell["pattern"] is not None)
        assert ("same_masks" in cell) == compared and cell.get("same_masks", True)
    assert "48 images for training, 16 for the test" in results["settings"]["condition"]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))

    # One cell lost: it alone is made again, and comes out the same.
    lost = written["cells"].pop()
    (tmp_path / "results.json").write_text(json.dumps(written))
    made = []
    call = dsnot.DSnoT.prune_
    monkeypatch.setattr(dsnot.DSnoT, "prune_", lambda *args: made.append(1) or call(*args))
    again = dsnot.experiment("stripes", 2, out=tmp_path, plan=PLAN)
    assert len(made) == 2, "once by the kernels, once by the references"
    assert json.loads(json.dumps(again["cells"][-1])) | {"seconds": 0} == lost | {"seconds": 0}
    with pytest.raises(ValueError, match="holds another experiment"):
        dsnot.experiment("stripes", 2, out=tmp_path, plan=replace(PLAN, lr=0.02))


def test_the_comparison_is_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bits, gram = torch.randn(3, 8), torch.full((3, 1), 0x0F, dtype=torch.uint8), torch.eye(8)
    names = []
    for name in dsnot.REFINEMENTS:
        reference = getattr(torch.ops.cofire, name).reference
        other = vars(OPERATORS[name])["overload"]
        with dsnot.by_reference():
            names.append(vars(OPERATORS[name])["overload"] is reference)
            ops.gram_swap(weight, bits, gram)
        names.append(vars(OPERATORS[name])["overload"] is other and other is not reference)
    assert names == [True] * 4


@pytest.mark.usefixtures("_tiny_data")
def test_text_is_scored_in_bits(tmp_path: Path) -> None:
    plan = replace(
        dsnot.CHARACTERS, settings=(dsnot.WANDA, dsnot.SWAP), sparsities=(0.5,), epochs=1, steps=2, batch=2, context=16,
        windows=4, calibration=1,
    )  # fmt: skip
    results = dsnot.experiment("text", 1, out=tmp_path, plan=plan)
    assert [len(cell["layers"]) for cell in results["cells"]] == [16, 16], "the tied output stays dense"
    wanda, swap = ([layer["refined"] for layer in cell["layers"]] for cell in results["cells"])
    assert sum(swap) < sum(wanda) and results["criteria"] == []
    assert "all linear layers but the output are pruned, without training, on 1 batches" in dsnot_report.conditions(
        results
    )


# ------------------------------------------------------------------------------------------------------- criteria


def _cell(name: str, score: float, error: float, **changes: Any) -> dict[str, Any]:
    layer = {"name": "a", "shape": [4, 8], "output": 2.0, "initial": error, "refined": error, "moved": 8}
    cell = {"setting": name, "sparsity": 0.8, "seed": 0, "pattern": None, "score": score, "layers": [layer]}
    return cell | {"seconds": 1.0, "uniform": True, "same_masks": True} | changes


def _results(*cells: dict[str, Any], judged: float | None = 0.8) -> dict[str, Any]:
    plan = {"judged": judged, "epochs": 1, "batch": 1, "lr": 1, "model": "m", "layers": None, "widths": [1], "steps": 1}
    settings = {"condition": "Data.", "unit": "accuracy %", "weights": None, "method": "dsnot", "plan": plan}
    where = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    return {"dense": [{"seed": 0, "score": 99.0}], "cells": list(cells), "settings": settings, "environment": where}


@pytest.mark.parametrize(
    ("swap", "decrease", "passed"),
    [
        ((88.0, 0.4), (79.0, 0.8), [True, True, True, True]),
        ((87.9, 0.41), (78.9, 0.81), [False, False, False, False]),
    ],
)
def test_criteria(swap: tuple[float, float], decrease: tuple[float, float], passed: list[bool]) -> None:
    cells = [_cell("Wanda", 80.0, 1.0), _cell("swap1", *swap), _cell("DSnoT, decrease", *decrease)]
    found = dsnot_report.criteria(_results(*cells))
    assert [c.passed for c in found] == [*passed, True, True]
    other = [_cell("Wanda", 0.0, 9.0, sparsity=0.9), _cell("2:4, swap1", 0.0, 9.0, pattern=[2, 4])]  # of no account
    assert [c.passed for c in dsnot_report.criteria(_results(*cells, *other))] == [*passed, True, True]


def test_rows_and_masks_must_be_the_same_in_every_cell() -> None:
    cells = [_cell("Wanda", 80.0, 1.0, uniform=False), _cell("swap1", 90.0, 0.1, same_masks=False)]
    found = dsnot_report.criteria(_results(*cells))
    assert [c.passed for c in found] == [True, True, None, None, False, False]
    assert found[4].found == "1 of 2 cells" and found[5].found == "1 of 2 cells"
    assert dsnot_report.criteria(_results(*cells, judged=None)) == []


def test_summary_is_in_units_of_the_output() -> None:
    (row,) = dsnot_report.summary(_results(_cell("Wanda", 90.0, 0.5)))
    assert (row["error"], row["lost"], row["moved"]) == (0.25, 9.0, 2.0)


# --------------------------------------------------------------------------------------------------------- commands


@pytest.mark.usefixtures("_tiny_data")
def test_the_commands_print_and_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsnot, "MLP", PLAN)
    done = CliRunner().invoke(cli.app, ["train", "dsnot", "--seeds", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "dsnot-digits_mlp-digits"
    table = (folder / "results.md").read_text()
    assert "| accuracy % at a sparsity of | 50% | 80% |" in table and "| criterion | found | met |" in table
    check_plots(folder, "results.png")
    chosen = ["prune", "--refine", "dsnot", "--stop", "official", "--no-bias-correct", "--sparsity", "0.75"]
    done = CliRunner().invoke(cli.app, [*chosen, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "prune-digits_mlp-digits-dsnot-wanda-official-bias0-0.75"
    check_plots(folder, "results.png")
    table = (folder / "results.md").read_text()
    assert "| dsnot from wanda, released loop |" in table and "| magnitude |" in table and "criterion" not in table
    done = CliRunner().invoke(cli.app, ["prune", "--pattern", "2:4", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "prune-digits_mlp-digits-swap1-wanda-decrease-bias1-2of4"
    assert not list(folder.glob("*.png"))
    assert "no plot: a pattern has one sparsity only" in " ".join(done.output.split())


@pytest.mark.usefixtures("_tiny_data")
def test_a_pattern_that_does_not_divide_the_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 = 4 * 5 + 4 columns: of the last four as many as fit."""
    monkeypatch.setattr(dsnot, "MLP", PLAN)
    dsnot.prune(pattern="3:5", out=tmp_path)
    (file,) = tmp_path.glob("*/results.json")
    cells = json.loads(file.read_text())["cells"]
    assert {cell["kept"] for cell in cells} == {2 * 24 * 15} and all(cell["uniform"] for cell in cells)


def test_a_plot_that_cannot_be_drawn_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    results = _results(_cell("Wanda", 80.0, 1.0), _cell("swap1", 90.0, 0.2), judged=None)
    report.show(dsnot_report, tmp_path / "results.json", lambda progress: results)
    assert "no plot: matplotlib is not installed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "dsnot", "--lr", "0"], "cofire: experiment: lr must be a positive number, got 0"),
        (["train", "dsnot", "--seeds", "0"], "cofire: experiment: seeds must be at least 1, got 0"),
        (
            ["train", "dsnot", "--validate"],
            "cofire: experiment: dsnot chooses no setting, so there is no validation run",
        ),
        (["prune", "--sparsity", "1"], "cofire: experiment: sparsity must be at least 0 and below 1, got 1"),
        (["prune", "--pattern", "half"], "cofire: prune: pattern must be N:M, as 2:4, got 'half'"),
        (["prune", "--pattern", "5:4"], "cofire: DSnoT: pattern must keep 1 to 4 of 4, got 5:4"),
        (["prune", "--pattern", "2:4", "--sparsity", "0.5"], "cofire: prune: give --sparsity or --pattern, got both"),
        (["prune", "--refine", "swap2"], "cofire: DSnoT: refine must be one of none, dsnot, swap1, got 'swap2'"),
        (
            ["prune", "--data", "text", "--model", "vgg16"],
            "cofire: experiment: the network for text is char_transformer, got 'vgg16'",
        ),
    ],
)
def test_the_command_line_refuses_with_a_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert sentence in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    root = Path(__file__).parents[1]
    page = root / "docs" / "dsnot.md"
    folder = root / "benchmarks" / "results" / "experiments"
    assert not report.update_page(page, folder, dsnot_report.markdown), "now fresh: commit it"
