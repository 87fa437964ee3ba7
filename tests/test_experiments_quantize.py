# SPDX-License-Identifier: Apache-2.0
"""The experiments on quantisation after training and on QLoRA: what a cell measures, resuming, criteria, tables."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from cofire import cli, models
from cofire.data import VOCABULARY, Images, Text, load_manual
from cofire.experiments import qlora, quantize, quantize_report, report
from cofire.experiments.quantize import Decoded, InBfloat16, Plan, Setting
from cofire.experiments.quantize_formats import FLOAT_TABLES, FORMAT_BITS, FORMATS, dynamic_map, nested
from cofire.nn import QuantLinear, quantize_
from cofire.ops import NestedScale, quantize_weight

PLAN = Plan(
    model="digits_mlp",
    settings=(
        Setting(4, "minmax"),
        Setting(2, "gptq"),
        Setting(3, "palette"),
        Setting(8, "absmax", "int8"),
        Setting(4, "minmax", "bf16"),
        Setting(4, "AWQ"),
        Setting(4, "ggml Q4_K", "int8"),
    ),
    epochs=1,
    batch=16,
    lr=0.05,
    weight_decay=0.0,
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


def _text(repeated: str = "0123456789", name: str = "text") -> Text:
    numbers = torch.tensor([VOCABULARY.index(c) for c in repeated * 200], dtype=torch.uint8)
    return Text(name, f"The same {len(repeated)} characters.", numbers, numbers[:400], VOCABULARY)


@pytest.fixture
def _tiny_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize.datasets, "load", lambda *_, **__: _images())
    monkeypatch.setattr(quantize.datasets, "load_text", lambda *_, **__: _text())
    monkeypatch.setattr(quantize.datasets, "load_manual", lambda *_, **__: _text("abcdefgh", "manual"))


@pytest.mark.usefixtures("_tiny_data")
def test_experiment_writes_every_cell_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = quantize.experiment("stripes", 2, out=tmp_path, plan=PLAN)
    names = ["W4A32, minmax", "W2A32, gptq", "W3A32, palette", "W8A8, absmax", "W4A16, minmax"]
    names += ["W4A32, AWQ", "W4A8, ggml Q4_K"]
    assert [(c["setting"], c["seed"]) for c in results["cells"]] == [(n, s) for s in (0, 1) for n in names]
    weights = 64 * 256 + 256 * 256 + 2 * 256
    for cell in results["cells"]:
        assert (cell["agreeing"], cell["answers"]) == (64, 64)
        assert cell["dense_bytes"] == 4 * weights
        # AWQ holds multiples of 8 rows, of which the last layer has 2; Q4_K blocks of 256 columns, of which the first has 64
        held = {"AWQ": weights - 2 * 256, "ggml Q4_K": weights - 64 * 256}.get(cell["method"], weights)
        assert cell["share"] == held / weights and cell["format"] == (held < weights)
        assert cell["packed_bytes"] == pytest.approx(cell["bits_per_weight"] * held / 8)
    assert results["cells"][0]["bits_per_weight"] == 4 + (32 + 8) / 64
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))

    # One cell lost: it alone is made again, and comes out the same.
    lost = written["cells"].pop()
    (tmp_path / "results.json").write_text(json.dumps(written))
    made = []
    call = quantize._Run.quantized
    monkeypatch.setattr(quantize._Run, "quantized", lambda *args: made.append(1) or call(*args))
    again = quantize.experiment("stripes", 2, out=tmp_path, plan=PLAN)
    assert made == [1]
    assert again["cells"][-1] | {"seconds": 0} == lost | {"seconds": 0}
    with pytest.raises(ValueError, match="holds another experiment"):
        quantize.experiment("stripes", 2, out=tmp_path, plan=replace(PLAN, lr=0.02))


@pytest.mark.parametrize("activations", ["exact", "int8", "bf16"])
def test_agreement_is_with_plain_torch(activations: str) -> None:
    """A layer whose kernel computed something else would be found out."""
    model = models.digits_mlp((64,)).eval()
    quantize_(model, bits=4, group_size=64, activations="int8" if activations == "int8" else "exact")
    images = _images()
    batches = [images.normalize(images.train)]
    if activations == "bf16":
        wide = copy.deepcopy(model)
        narrow = InBfloat16(copy.deepcopy(model))
        seen: list[torch.dtype] = []
        narrow.model.features[0].register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
        same, count = quantize.agreement(narrow, iter(batches))
        assert same >= 47 and count == 48 and set(seen) == {torch.bfloat16}
        out = narrow(batches[0])
        assert out.dtype == torch.float32 and torch.equal(out, out.bfloat16().float())
        torch.testing.assert_close(out, wide(batches[0]), rtol=5e-2, atol=5e-2)
        layer, x = narrow.model.features[0], torch.randn(3, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(Decoded(layer)(x), layer(x), rtol=1e-2, atol=1e-2)
        return
    assert quantize.agreement(model, iter(batches)) == (48, 48)
    x = torch.randn(3, 64)
    torch.testing.assert_close(Decoded(model.features[0])(x), model.features[0](x), rtol=1e-4, atol=1e-4)

    class Wrong(QuantLinear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return -super().forward(input)

    wrong = copy.deepcopy(model)
    wrong.classifier.__class__ = Wrong
    same, count = quantize.agreement(wrong, iter(batches))
    assert count == 48 and same < 24


#: Of normal weights, the error that each format's levels may leave, in standard deviations: measured once, and rounded up.
ERRORS = {"ggml Q8_0": 0.01, "ggml Q6_K": 0.03, "ggml Q5_K": 0.06, "ggml Q3_K": 0.25, "ggml Q2_K": 0.4}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_come_back_from_every_format(name: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 256), torch.randn(512, 256)
    q = FORMATS[name](weight, x.t() @ x)
    assert q.shape == (32, 256) and q.bits == FORMAT_BITS[name]
    error = (q.replace(dtype=torch.float32).dequantize() - weight).square().mean().sqrt()
    assert 0 < error < ERRORS.get(name, 0.14)
    zeros = torch.zeros(32, 256)
    if not name.startswith("GPTQ"):
        assert FORMATS[name](zeros, None).dequantize().count_nonzero() == 0
    if "K" in name.partition("_")[2] or name.endswith("nested"):
        assert isinstance(q.scale, NestedScale)
    if name not in FLOAT_TABLES:
        QuantLinear.from_qtensor(q, activations="int8")(x[:2])


def test_formats_refuse_what_they_do_not_hold() -> None:
    refused = {
        "GPTQ, activation order": "must fill words",
        "AWQ": "multiple of 8 rows",
        "llm-awq": "multiple of 4 rows",
    }
    for name, sentence in refused.items():
        with pytest.raises(ValueError, match=sentence):
            FORMATS[name](torch.randn(10, 256), torch.eye(256))
    with pytest.raises(ValueError, match="Q4_K has blocks of 256 columns, got 64 columns"):
        FORMATS["ggml Q4_K"](torch.randn(8, 64), None)


def test_nested_scales_are_those_of_bitsandbytes() -> None:
    golden = load_file(Path(__file__).parent / "formats" / "golden" / "bitsandbytes.safetensors")
    maps = [t for name, t in golden.items() if name.endswith("nested_quant_map")]
    assert maps and all(torch.equal(dynamic_map(), t) for t in maps)
    scale = quantize_weight(torch.randn(48, 512), "nf4", group_size=64).scales()
    found = nested(scale)
    assert found.absmax.shape == (2,) and found.codes.shape == (48, 8)
    torch.testing.assert_close(found.dequantize(), scale, rtol=0.02, atol=0.0)


@pytest.mark.usefixtures("_tiny_data")
def test_text_is_scored_in_bits(tmp_path: Path) -> None:
    plan = replace(
        quantize.CHARACTERS, settings=(Setting(4, "gptq"), Setting(4, "minmax", "int8")), epochs=1, steps=2, batch=2,
        context=16, windows=4, calibration=1,
    )  # fmt: skip
    results = quantize.experiment("text", 1, out=tmp_path, plan=plan)
    for cell in results["cells"]:
        assert 0 < cell["score"] < 2 * math.log2(len(VOCABULARY)) and cell["answers"] == 4 * 16
        assert cell["packed_bytes"] == (4 + 40 / 64) / 32 * cell["dense_bytes"]  # the tied output is not counted
    assert "2 steps in batches of 2" in quantize_report.conditions(results)


@pytest.mark.usefixtures("_tiny_data")
def test_low_rank_terms_learn_another_text(tmp_path: Path) -> None:
    plan = replace(qlora.PLAN, epochs=1, rounds=2, steps=20, batch=4, context=16, windows=4, low_rank_lr=1e-2)
    results = qlora.experiment(1, out=tmp_path, plan=plan)
    control, cell = results["cells"]
    assert (control["setting"], cell["setting"]) == ("bf16", "nf4")
    for row in (control, cell):
        assert row["score"] < row["before"] - 0.5
        assert row["trained"] == 4 * 8 * (128 + 3 * 128 + 128 + 128 + 128 + 512 + 512 + 128)
    weights = 4 * (3 + 1 + 4 + 4) * 128 * 128
    assert control["weight_bytes"] == cell["wide_bytes"] == 2 * weights
    assert 0 < cell["weight_bytes"] - 4.5 / 8 * weights < 2000  # and the tables
    assert "The same 8 characters. 40 steps of the low-rank terms alone, rank 8" in quantize_report.conditions(results)
    assert qlora.experiment(1, out=tmp_path, plan=plan) == results


def test_the_control_is_a_low_rank_layer() -> None:
    dense = nn.Linear(8, 5)
    layer = qlora.LowRank(dense.weight, dense.bias, 2, 4.0)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 8)
    weight = dense.weight.bfloat16().float() + 2.0 * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, dense.bias))
    assert [n for n, _ in layer.named_parameters()] == ["lora_a", "lora_b"]


def test_the_manual_is_prose_of_this_python() -> None:
    text = load_manual()
    assert len(text.train) > 5 * len(text.test) > 100_000
    assert "for the test" in text.condition and "sha256" in text.condition


# ------------------------------------------------------------------------------------------------------- criteria


def _cell(bits: int, method: str, activations: str = "exact", **changes: Any) -> dict[str, Any]:
    setting = Setting(bits, method, activations)
    cell = {"setting": setting.name, **vars(setting), "seed": 0, "seconds": 1.0, "score": 3.0}
    return cell | {"bits_per_weight": 4.6, "agreeing": 1000, "answers": 1000} | changes


def _results(unit: str, *cells: dict[str, Any], method: str = "quantize") -> dict[str, Any]:
    plan = {"epochs": 1, "steps": 1, "batch": 1, "lr": 1, "group_size": 64, "calibration": 1, "model": "m"}
    settings = {"condition": "Text.", "unit": unit, "weights": None, "method": method, "plan": plan}
    where = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    dense = [{"seed": 0, "score": 3.0}]
    return {"dense": dense, "cells": list(cells), "settings": settings, "environment": where}


@pytest.mark.parametrize(("lost", "passed"), [(0.0099, True), (0.0101, False), (-1.0, True)])
def test_criteria_of_four_bits(lost: float, passed: bool) -> None:
    results = _results(quantize_report.BITS, _cell(4, "gptq", score=3.0 + lost))
    found = {c.name: c.passed for c in quantize_report.criteria(results)}
    assert found["W4A32, GPTQ: at most 0.010 bits per character above dense"] is passed
    assert found["W4A8, GPTQ: at most 0.015 bits per character above dense"] is None
    assert not any(name.startswith("W4A16") for name in found)
    half = _results(quantize_report.BITS, _cell(4, "gptq", "bf16", score=3.0 + lost))
    found = {c.name: c.passed for c in quantize_report.criteria(half)}
    assert found["W4A16, GPTQ: at most 0.010 bits per character above dense"] is passed
    eight = _results(quantize_report.BITS, _cell(4, "minmax", "int8", score=3.0 + lost + 0.005))
    found = {c.name: c.passed for c in quantize_report.criteria(eight)}
    assert found["W4A8, rounded to the nearest: at most 0.015 bits per character above dense"] is passed


@pytest.mark.parametrize(("agreeing", "passed"), [(1000, True), (999, True), (998, False)])
def test_the_criterion_of_same_answers_is_that_of_the_worst(agreeing: int, passed: bool) -> None:
    results = _results(quantize_report.ACCURACY, _cell(4, "nf4"), _cell(2, "hqq", agreeing=agreeing))
    (criterion,) = quantize_report.criteria(results)
    assert criterion.passed is passed


@pytest.mark.parametrize(
    ("score", "size", "passed"), [(2.0199, 35, [True, True]), (2.03, 36, [False, False]), (1.0, 1, [True, True])]
)
def test_criteria_of_low_rank_terms(score: float, size: int, passed: list[bool]) -> None:
    control = {"setting": "bf16", "seed": 0, "score": 2.0, "before": 4.0, "trained": 1, "wide_bytes": 100}
    cells = [control | {"weight_bytes": 100}, control | {"setting": "nf4", "score": score, "weight_bytes": size}]
    results = _results(quantize_report.BITS, *cells, method="qlora")
    assert [c.passed for c in quantize_report.criteria(results)] == passed
    missing = _results(quantize_report.BITS, cells[0], method="qlora")
    assert [c.passed for c in quantize_report.criteria(missing)] == [None, None]


def test_lost_counts_downwards_for_accuracy() -> None:
    results = _results(quantize_report.ACCURACY, _cell(4, "nf4", score=2.0))
    assert quantize_report.summary(results)[0]["lost"] == 1.0


def test_formats_have_a_table_of_their_own() -> None:
    other = {"format": True, "share": 0.97, "score": 2.5}
    cells = [_cell(4, "nf4"), _cell(4, "nf4", "bf16", score=2.0), _cell(4, "AWQ", **other)]
    cells += [_cell(4, "AWQ", "int8", **other | {"score": 2.0, "agreeing": 999})]
    text = quantize_report.markdown(_results(quantize_report.ACCURACY, *cells))
    assert "| points lost | nf4 |" in text and "| W4A32 | +0.00 |" in text and "| W4A16 | +1.00 |" in text
    assert "| format | weights in it | bits/weight | lost, A32 | lost, A16 | lost, A8 | same answers |" in text
    assert "| AWQ | 97% | 4.60 | +0.50 |  | +1.00 | 999 of 1,000 |" in text
    assert "A16: the network in bfloat16" in text


# --------------------------------------------------------------------------------------------------------- command


@pytest.mark.usefixtures("_tiny_data")
def test_the_commands_print_criteria_and_write_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "MLP", PLAN)
    arguments = ["train", "quantize", "--data", "digits", "--seeds", "1", "--lr", "0.02", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "quantize-digits_mlp-digits"
    table = (folder / "results.md").read_text()
    assert "| points lost | minmax | gptq | palette | absmax |" in table and "| criterion | found | met |" in table
    assert json.loads((folder / "results.json").read_text())["settings"]["plan"]["lr"] == 0.02
    tiny = replace(qlora.PLAN, steps=1, batch=1, context=8, windows=2)
    monkeypatch.setattr(qlora, "PLAN", tiny)
    done = CliRunner().invoke(cli.app, ["train", "qlora", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "weights at most 35 %" in (tmp_path / "qlora-char_transformer-text" / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["quantize", "--lr", "0"], "cofire: experiment: lr must be a positive number, got 0"),
        (["quantize", "--epochs", "0"], "cofire: experiment: epochs must be at least 1, got 0"),
        (["quantize", "--seeds", "0"], "cofire: experiment: seeds must be at least 1, got 0"),
        (
            ["quantize", "--head-lr", "1"],
            "cofire: experiment: quantize has no heads; --lr sets the rate of the training",
        ),
        (["quantize", "--validate"], "cofire: experiment: quantize chooses no setting, so there is no validation run"),
        (
            ["quantize", "--data", "text", "--model", "vgg16"],
            "cofire: experiment: the network for text is char_transformer, got 'vgg16'",
        ),
        (["qlora", "--data", "digits"], "cofire: experiment: qlora's data is text (--data text), got 'digits'"),
        (["qlora", "--lr", "-1"], "cofire: experiment: lr must be a positive number, got -1"),
        (["qlora", "--seeds", "0"], "cofire: experiment: seeds must be at least 1, got 0"),
    ],
)
def test_the_command_line_refuses_with_a_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(cli.app, ["train", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert sentence in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    root = Path(__file__).parents[1]
    page = root / "docs" / "quantization.md"
    before = page.read_text()
    folder = root / "benchmarks" / "results" / "experiments"
    assert not report.update_page(page, folder, quantize_report.markdown), "now fresh: commit it"
    assert page.read_text() == before
