# SPDX-License-Identifier: Apache-2.0
"""LoCoCo's experiments: what a cell measures, resuming, validation, criteria, and the published tables, on tiny data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cofire import cli
from cofire.data import Images, Text
from cofire.experiments import lococo, lococo_report, report
from cofire.experiments.lococo import CELLS, Plan
from cofire.methods import LoCoCo
from cofire.models import decoder
from cofire.nn import FullCache, HeavyHitterCache, LoCoCoCache, SlidingWindowCache, SnapKVCache
from helpers import check_plots

SIZES: dict[str, Any] = {
    "width": 16,
    "depth": 2,
    "heads": 2,
    "kv_heads": 1,
    "batch": 8,
    "lr": 3e-3,
    "taps": 3,
    "weight_decay": 0.01,
}
STREAM = Plan(
    **SIZES, epochs=2, capacity=6, chunk=5, capacities=(4, 6), updates=2, update_batch=8, update_lr=1e-4,
    trained=("norm",), cells=tuple(CELLS[i] for i in (0, 1, 4, 3, 6)),
)  # fmt: skip
CHARACTERS = Plan(
    **SIZES, epochs=1, steps=2, capacity=6, chunk=5, capacities=(6,), updates=2, update_batch=2, update_lr=1e-4,
    trained=("norm", "embed"), cells=(CELLS[0], CELLS[5], CELLS[6]), context=20, windows=4,
)  # fmt: skip


def _images(train: int = 40, test: int = 16) -> Images:
    """Two classes: bright above, or bright below."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(train + test) % 2
    pixels = torch.randint(0, 80, (train + test, 1, 4, 4), generator=generator)
    pixels[labels == 0, :, :2] += 150
    pixels[labels == 1, :, 2:] += 150
    x = pixels.to(torch.uint8)
    return Images(
        "stripes", "Stripes.", x[:train], labels[:train], x[train:], labels[train:], ("a", "b"), (0.5,), (0.3,), False
    )


def _text() -> Text:
    codes = (torch.arange(400) % 7).to(torch.uint8)
    return Text("text", "Sevens.", codes[:300], codes[300:], "abcdefg")


@pytest.fixture
def _tiny_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lococo.datasets, "load", lambda *_, **__: _images())
    monkeypatch.setattr(lococo.datasets, "load_text", _text)


@pytest.mark.usefixtures("_tiny_data")
def test_experiment_writes_every_cell_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = lococo.experiment("digits", 1, out=tmp_path, plan=STREAM)
    names = [
        "full cache",
        "window",
        "heavy hitters, latest scores, trained alike",
        "heavy hitters, latest scores",
        "LoCoCo",
    ]
    further = [f"{name}, 4 tokens" for name in (names[1], names[3], names[4])]
    assert [c["cell"] for c in results["cells"]] == [*names, *further]
    full, window, heavy, _, ours = results["cells"][:5]
    # keys and values of two layers with one head of 8 features; 17 tokens, chunks of 5
    assert full["score"] == results["dense"][0]["score"]
    assert full["held_bytes"] == full["full_bytes"] == 2 * 2 * 8 * 4 * 17 and full["capacity"] is None
    assert window["held_bytes"] == 2 * 2 * 8 * 4 * (6 + 2)
    assert ours["held_bytes"] == heavy["held_bytes"] == window["held_bytes"] + 2 * 4 * (6 + 2)
    assert window["held_bytes"] < ours["allocated_bytes"] and "gates" not in heavy
    assert len(ours["gates"]) == 2 and all(g != 0.5 for g in ours["gates"])
    assert "first_loss" in heavy and "first_loss" not in window
    assert [tokens for tokens, _ in results["growth"]] == [17, 68]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert not list(tmp_path.rglob("*.tmp"))

    # One cell lost: it alone is trained again, and comes out the same.
    lost = written["cells"].pop(4)
    (tmp_path / "results.json").write_text(json.dumps(written))
    fitted = []
    fit = lococo._Run.fit
    monkeypatch.setattr(lococo._Run, "fit", lambda *args: fitted.append(1) or fit(*args))
    again = lococo.experiment("digits", 1, out=tmp_path, plan=STREAM)
    assert fitted == [1]
    assert json.loads(json.dumps(again["cells"][-1])) | {"seconds": 0} == lost | {"seconds": 0}
    with pytest.raises(ValueError, match="holds another experiment"):
        lococo.experiment("digits", 1, out=tmp_path, plan=replace(STREAM, epochs=3))


@pytest.mark.usefixtures("_tiny_data")
def test_text_is_read_in_chunks_and_scored_in_bits(tmp_path: Path) -> None:
    results = lococo.experiment("text", 1, out=tmp_path, plan=CHARACTERS)
    full, snap, ours = results["cells"]
    assert full["score"] == pytest.approx(results["dense"][0]["score"], rel=1e-5)
    assert all(2 < cell["score"] < 4 for cell in (full, snap, ours)) and ours["full_bytes"] == 2 * 2 * 8 * 4 * 20
    criteria = [c.name for c in lococo_report.criteria(results)]
    assert "at most 0.15 bits/char behind the full cache" in criteria


@torch.no_grad()
def test_a_gate_at_zero_is_the_control_by_the_latest_scores() -> None:
    prepared = LoCoCo(capacity=6, taps=3, buffer=0, chunk=5).prepare(decoder(9, width=16, depth=2, heads=2))
    for fusion in prepared.fusions:
        fusion.gate.zero_()
    x = torch.randint(9, (2, 30))
    readers = [
        lococo.Reader(prepared.model, lambda p=p: lococo.new_cache(p, prepared), 5) for p in ("lococo", "latest scores")
    ]
    torch.testing.assert_close(readers[0](x), readers[1](x), rtol=1e-4, atol=1e-5)


def test_every_policy_has_its_cache() -> None:
    prepared = LoCoCo(capacity=8, taps=3, buffer=2, chunk=5, bptt=2).prepare(decoder(9, width=16, depth=1, heads=2))
    kinds = {c.policy: type(lococo.new_cache(c.policy, prepared)) for c in CELLS}
    assert kinds == {
        "full": FullCache, "window": SlidingWindowCache, "heavy hitters": HeavyHitterCache,
        "latest scores": HeavyHitterCache, "snap": SnapKVCache, "lococo": LoCoCoCache,
    }  # fmt: skip
    for cell in CELLS[1:]:
        cache = lococo.new_cache(cell.policy, prepared)
        assert (cache.capacity, cache.buffer, cache.chunk, cache.bptt) == (8, 2, 5, True)


def test_the_rate_rises_and_falls() -> None:
    line = [lococo.share_of_rate(replace(STREAM, updates=4), step) for step in range(4)]
    assert line == [1.0, 0.75, 0.5, 0.25]
    wave = [lococo.share_of_rate(replace(STREAM, updates=4, cosine=True, warm_up=2), step) for step in range(4)]
    assert wave == pytest.approx([0.5, 0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5])


def test_pixels_become_tokens_whose_levels_training_blurs() -> None:
    images = torch.tensor([[[[0, 255], [16, 239]]]], dtype=torch.uint8)
    tokens = lococo.tokens_of(images)
    assert tokens.flatten().tolist() == [17, 0, 16, 1, 15] and tokens.dtype == torch.uint8
    x = torch.full((300, 5), 8)
    x[:, 0] = 17
    found = lococo.jittered(x)
    assert (found[:, 0] == 17).all() and ((found >= 0) & (found[:, 1:].max() <= 16)).all()
    assert 1.2 < found[:, 1:].double().std() < 1.9 and 7.8 < found[:, 1:].double().mean() < 8.2
    assert lococo.jittered(torch.zeros(300, 5, dtype=torch.long)).min() == 0


# ------------------------------------------------------------------------------------------------------- criteria


def _cell(name: str, seed: int, **changes: object) -> dict[str, object]:
    policy = {"full cache": "full", "LoCoCo": "lococo"}.get(name, name)
    cell = {"cell": name, "seed": seed, "policy": policy, "score": 80.0, "held_bytes": 2048, "allocated_bytes": 4096}
    cell |= {"full_bytes": 10240, "capacity": None if policy == "full" else 12, "trained": name == "LoCoCo"}
    if policy == "lococo":
        cell |= {"score": 92.0 + seed, "gates": [0.4, 0.6], "first_loss": 2.0, "last_loss": 1.0}
        cell |= {"prompt_flops": 10.0, "model_flops": 100.0}
    if policy == "full":
        cell |= {"score": 95.0}
    return cell | changes


def _results(unit: str = "accuracy %", **changes: dict[str, object]) -> dict[str, object]:
    cells = [
        _cell(c.name, seed, **changes.get(c.name.replace(" ", "_").replace(",", ""), {}))
        for seed in (0, 1)
        for c in CELLS
    ]
    cells.append(_cell("LoCoCo, 24 tokens", 0, capacity=24, policy="lococo", score=94.0))
    where = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    plan = json.loads(json.dumps(vars(STREAM), default=vars)) | {"capacity": 12}
    settings = {"condition": "Stripes.", "weights": None, "unit": unit, "length": 65, "plan": plan}
    return {"dense": [], "cells": cells, "settings": settings, "environment": where, "growth": [[65, 100], [260, 100]]}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, None),
        # the better of the controls counts
        ({"heavy_hitters_latest_scores": {"score": 89.6}}, "3 points better than heavy hitters"),
        ({"heavy_hitters_summed_scores": {"score": 89.6}}, "3 points better than heavy hitters"),
        ({"heavy_hitters_latest_scores_trained_alike": {"score": 89.6}}, "heavy hitters, trained alike"),
        ({"window": {"score": 89.6}}, "3 points better than window"),
        ({"full_cache": {"score": 97.6}}, "at most 5 points behind the full cache"),
        ({"LoCoCo": {"held_bytes": 3600}}, "at most 35 %"),
        ({"LoCoCo": {"gates": [0.9, 0.515]}}, "the gates have learned"),
    ],
)  # fmt: skip
def test_criteria_judge_what_was_measured(changes: dict[str, dict[str, object]], failed: str | None) -> None:
    failures = [c.name for c in lococo_report.criteria(_results(**changes)) if not c.passed]
    assert len(failures) == (failed is not None), failures
    assert failed is None or failed in failures[0]


def test_bits_are_better_when_they_are_fewer() -> None:
    scores = {"full_cache": {"score": 2.0}, "LoCoCo": {"score": 2.12}, "heavy_hitters_summed_scores": {"score": 2.15}}
    scores |= {"heavy_hitters_latest_scores": {"score": 2.135}}
    found = {c.name: c for c in lococo_report.criteria(_results("bits/char", **scores))}
    assert "not" not in found["at least 0.01 bits/char better than heavy hitters"].found
    assert found["at least 0.01 bits/char better than heavy hitters"].passed
    assert "+0.015 bits/char (95 % interval +-0.000) to heavy hitters, latest scores" in (
        found["at least 0.01 bits/char better than heavy hitters"].found
    )
    assert found["at most 0.15 bits/char behind the full cache"].passed
    scores["heavy_hitters_latest_scores"] = {"score": 2.129}
    found = {c.name: c for c in lococo_report.criteria(_results("bits/char", **scores))}
    assert not found["at least 0.01 bits/char better than heavy hitters"].passed
    grown = _results() | {"growth": [[65, 100], [260, 102]]}
    assert not {c.name: c for c in lococo_report.criteria(grown)}[
        "the cache's bytes do not grow with the text: less than 1 %"
    ].passed


def test_what_was_not_run_is_not_judged() -> None:
    results = _results()
    results["cells"] = [c for c in results["cells"] if c["cell"] in ("LoCoCo", "window")]
    found = {c.name: c for c in lococo_report.criteria(results)}
    assert found["at least 3 points better than heavy hitters"].passed is None
    assert found["at most 5 points behind the full cache"].found == "not run"
    assert found["at least 3 points better than window"].passed


def test_tables_show_scores_bytes_and_sizes() -> None:
    text = lococo_report.markdown(_results(LoCoCo={"score": 70.0}))
    assert "| full cache | all | 2 | 95.00 | 0.00 | 2.0 | 20% | 4.0 |" in text
    assert "| LoCoCo | 12 | 2 | 70.00 | 0.00 | 2.0 | 20% | 4.0 |" in text
    assert "| 0 | 0.400, 0.600 | 2.000 | 1.000 | 10.0% |" in text
    assert "| seed 0, accuracy % by tokens | 12 | 24 |" in text and "| LoCoCo | 70.00 | 94.00 |" in text


# -------------------------------------------------------------------------------------------- validation, command


@pytest.mark.parametrize("data", ["digits", "text"])
def test_a_validation_run_never_touches_the_test(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test data are an object that allows nothing, so that any use of them is an error."""
    monkeypatch.setattr(
        lococo.datasets, "load", lambda *_, **__: replace(_images(), test=object(), test_labels=object())
    )
    monkeypatch.setattr(lococo.datasets, "load_text", lambda: replace(_text(), test=object()))
    plan = replace(STREAM if data == "digits" else CHARACTERS, validate=True, cells=CELLS[1:2], capacities=())
    results = lococo.experiment(data, 1, out=tmp_path, plan=plan)
    assert "set aside" in lococo_report.conditions(results)
    assert (tmp_path / "validation" / "validation.json").is_file()


@pytest.mark.usefixtures("_tiny_data")
def test_the_command_runs_both_and_writes_the_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lococo, "STREAM", replace(STREAM, cells=(CELLS[1], CELLS[6])))
    monkeypatch.setattr(lococo, "CHARACTERS", replace(CHARACTERS, cells=(CELLS[1], CELLS[6])))
    done = CliRunner().invoke(
        cli.app, ["train", "lococo", "--seeds", "1", "--epochs", "1", "--lr", "0.0003", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert done.output.count("criterion") == 2
    folder = tmp_path / "lococo-decoder-digits"
    table = (folder / "results.md").read_text()
    assert "| LoCoCo | 6 | 1 |" in table and "| criterion | found | met |" in table
    plan = json.loads((folder / "results.json").read_text())["settings"]["plan"]
    assert (plan["update_lr"], plan["epochs"]) == (0.0003, 1)
    assert (tmp_path / "lococo-decoder-text" / "results.md").is_file()
    check_plots(folder, "sizes.png")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--head-lr", "0.1"], "lococo has no heads"),
        (["--model", "vit"], "the network of lococo is decoder, got 'vit'"),
        (["--data", "cifar"], "lococo's data is digits, text or both, got 'cifar'"),
        (["--weights", "w.pt"], "weights fit one network; give --data digits or --data text"),
        (["--lr", "0"], "lr must be a positive number, got 0"),
    ],
)
def test_the_command_refuses_with_a_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["train", "lococo", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert sentence in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", ["lococo.md"])
def test_the_tables_of_the_documentation_are_those_of_the_results(page: str) -> None:
    root = Path(__file__).parents[1]
    path = root / "docs" / page
    before = path.read_text()
    folder = root / "benchmarks" / "results" / "experiments"
    assert not report.update_page(path, folder, lococo_report.markdown), "now fresh: commit it"
    assert path.read_text() == before
