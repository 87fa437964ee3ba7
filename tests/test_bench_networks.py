# SPDX-License-Identifier: Apache-2.0
"""Whole networks: how they are measured, on networks made up here, and those of the families, small."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from cofire.bench import end_to_end, harness, quiet
from cofire.bench import results as suite_results
from cofire.bench.end_to_end import clustering, gating, kv_fusion, lowbit, recommender, runner, shift_add, sparse, text
from cofire.bench.end_to_end import dense as forms
from cofire.bench.end_to_end import network as declared
from cofire.bench.end_to_end.network import DENSE, Call, Network, Variant
from cofire.bench.end_to_end.results import COLUMNS, NUMBERS, Networks
from cofire.cli import app
from cofire.files import write_atomically
from cofire.registry import OPERATORS

ENVIRONMENT = {
    "device": "Some CPU", "kind": "cpu", "threads": 2, "instruction_set": "AVX9", "torch": "9", "date": "today",
    "commit": "now",
    "quick": False,
}  # fmt: skip
ROOT = Path(__file__).parents[1]
PEAK_BYTES = harness.peak_bytes


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small networks: more threads would only wait for each other, and what is slow and tested elsewhere is left out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)
    monkeypatch.setattr(harness, "peak_bytes", lambda run, device: 0 if run() is None else 1)
    monkeypatch.setattr(runner, "environment", lambda device, quick: {**ENVIRONMENT, "quick": quick})
    yield
    torch.set_num_threads(before)


class Hurried(runner.Effort):
    def __init__(self, quick: bool, device: str = "cpu") -> None:
        self.training, self.seconds, self.least_rounds, self.most_rounds, self.attempts = 0.0, 0.0, 2, 2, 1


class Shifted(nn.Module):
    """The same layer, and a number more."""

    def __init__(self, layer: nn.Module, shift: float) -> None:
        super().__init__()
        self.layer, self.shift = layer, shift

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x) + self.shift
        return output


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not on this machine\nbut on others")


def perceptron(name: str = "perceptron", built: list[float] | None = None, **changes: Any) -> Network:
    """A network that takes microseconds."""

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        if built is not None:
            built.append(share)
        dense = nn.Linear(4, 3)
        return {
            DENSE: Variant(dense),
            "dense, shifted": Variant(Shifted(dense, 0.0), dense),
            "exact": Variant(Shifted(dense, 0.0), dense),
            "wrong": Variant(Shifted(dense, 1.0), dense),
            "broken": Variant(Broken(), dense),
        }

    network = Network(
        family="gating", name=name, data="random numbers", build=build,
        inputs=lambda n: torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), unit="samples/s", batch=2,
        latency_of="one sample", evaluate=lambda model: 100 * float((model(torch.ones(1, 4)) < 9).float().mean()),
        accuracy_kind="outputs below nine, %",
    )  # fmt: skip
    return replace(network, **changes)


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``run`` sees these networks."""

    def these(*networks: Network) -> None:
        monkeypatch.setattr(runner, "networks", lambda chosen: list(networks))
        monkeypatch.setattr(runner, "Effort", Hurried)

    return these


def measured(tmp_path: Path, **options: Any) -> Networks:
    return end_to_end.run(out=tmp_path / "networks.json", progress=False, **options)


# --------------------------------------------------------------------------------------------------------- one run


def test_run_writes_the_promised_schema(declare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(perceptron())
    monkeypatch.setattr(harness, "peak_bytes", PEAK_BYTES)
    monkeypatch.setattr(runner, "environment", suite_results.environment)
    path = tmp_path / "deep" / "networks.json"
    found = end_to_end.run(out=path, progress=False)
    data = json.loads(path.read_text())
    assert list(data) == ["environment", "ceilings", "rows"] and data["ceilings"] == {}
    assert {"device", "threads", "torch", "commit", "date"} <= set(data["environment"])
    assert [row["variant"] for row in data["rows"]] == [DENSE, "dense, shifted", "exact", "wrong", "broken"]
    for row in data["rows"]:
        assert set(COLUMNS) <= set(row)
    dense, _, exact, *_ = data["rows"]
    assert 0 < dense["latency_p20_ms"] <= dense["latency_ms"] <= dense["latency_p80_ms"]
    assert dense["throughput"] > 0 and dense["unit"] == "samples/s" and dense["accuracy"] == 100
    assert dense["weight_bytes"] == exact["weight_bytes"] == 15 * 4
    assert dense["peak_bytes"] == 2 * 3 * 4, "the outputs of a batch of two"
    assert exact["speedup_against"] in (DENSE, "dense, shifted"), "the fastest of the dense forms"
    assert exact["error"] == 0
    assert Networks.load(path).to_json() == found.to_json() == data
    assert os.listdir(path.parent) == ["networks.json"], "a temporary file was left"


def test_a_wrong_variant_gets_no_number(declare: Any, tmp_path: Path) -> None:
    declare(perceptron())
    rows = {row["variant"]: row for row in measured(tmp_path).rows}
    reasons = {
        "wrong": "100.0% of the outputs are off by more than 0.0001",
        "broken": "RuntimeError: not on this machine",
    }
    for name, reason in reasons.items():
        assert not rows[name]["correct"] and reason in rows[name]["note"]
        assert [rows[name][c] for c in NUMBERS] == [None] * len(NUMBERS)
        assert "speedup" not in rows[name]
    assert "others" not in rows["broken"]["note"], "one line of what was raised"


def test_an_output_that_is_not_finite_is_wrong(declare: Any, tmp_path: Path) -> None:
    declare(perceptron(build=lambda seed, share: {DENSE: Variant(Shifted(nn.Linear(4, 3), math.nan))}))
    (row,) = measured(tmp_path).rows
    assert row["note"] == "the output is not finite" and row["latency_ms"] is None


def test_a_network_without_a_dense_variant_is_refused(declare: Any, tmp_path: Path) -> None:
    declare(perceptron(build=lambda seed, share: {"densely": Variant(nn.Linear(4, 3))}))
    found = measured(tmp_path)
    assert not found.rows
    assert "no variant is called 'dense'; did you mean 'densely'" in found.refused[0]


def test_an_error_of_one_network_leaves_the_others(declare: Any, tmp_path: Path) -> None:
    def broken(seed: int, share: float) -> Any:
        raise OSError("no disk")

    declare(perceptron(name="first", build=broken), perceptron(name="second"))
    found = measured(tmp_path)
    assert {row["network"] for row in found.rows} == {"second"}
    assert found.refused == ["gating, first: OSError: no disk"]


def test_steps_and_items(declare: Any, tmp_path: Path) -> None:
    def start(model: nn.Module, x: Tensor) -> Call:
        def call() -> Tensor:
            time.sleep(0.02)  # beside which a pause of the machine is short
            return model(x)

        return Call(call, items=7000 * len(x), steps=1000, held=lambda: 5)

    declare(perceptron(start=start, batch=3))
    row = measured(tmp_path).rows[0]
    assert row["latency_ms"] < 0.5, "of one step"
    assert row["throughput"] == pytest.approx(7 * 3e3 / row["latency_ms"], rel=0.9)
    assert row["held_bytes"] == 5


def test_a_call_that_forgets_measures_both_at_batch_one(declare: Any, tmp_path: Path) -> None:
    declare(perceptron(batch=1))
    exact = measured(tmp_path).rows[2]
    assert exact["speedup"] == exact["throughput_gain"]


# ---------------------------------------------------------------------------------------------------- going on


def test_an_interrupted_run_goes_on(declare: Any, tmp_path: Path) -> None:
    first: list[float] = []
    second: list[float] = []

    def stop(seed: int, share: float) -> Mapping[str, Variant]:
        raise KeyboardInterrupt

    declare(perceptron("first", first), perceptron("second", build=stop))
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path)
    assert {row["network"] for row in Networks.load(tmp_path / "networks.json").rows} == {"first"}
    declare(perceptron("first", first), perceptron("second", second))
    found = measured(tmp_path)
    assert (len(first), len(second)) == (1, 1), "the first was not built again"
    assert [row["network"] for row in found.rows] == ["first"] * 5 + ["second"] * 5
    measured(tmp_path, again=True)
    assert (len(first), len(second)) == (2, 2)


def test_another_commit_is_measured_anew_and_another_machine_begins_anew(declare: Any, tmp_path: Path) -> None:
    built: list[float] = []
    declare(perceptron(built=built))
    found = measured(tmp_path)
    for row in found.rows:
        row["commit"] = "earlier"
    found.rows.append({**found.rows[0], "network": "of the earlier commit alone"})
    found.save(tmp_path / "networks.json")
    assert len(measured(tmp_path).rows) == 6 and len(built) == 2
    found.environment["torch"] = "0.1"
    found.save(tmp_path / "networks.json")
    said: list[str] = []
    assert len(measured(tmp_path, announce=said.append).rows) == 5 and len(built) == 3
    assert "networks.json was measured under other conditions (torch 0.1 there, " in said[0]
    assert len(os.listdir(tmp_path)) == 2, "nothing that was measured is lost"


def test_noise_is_marked(declare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(quiet.Probe):
        def usual(self) -> quiet.Look:
            return dict.fromkeys(self.work, 1e-9)

    declare(perceptron())
    monkeypatch.setattr(quiet, "Probe", Loaded)
    rows = measured(tmp_path).rows
    assert all(row["noisy"] for row in rows if row["correct"])
    assert not any(row["noisy"] for row in rows if not row["correct"]), "no number, no noise"


def test_the_quieter_of_two_attempts_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([*[1.0] * quiet.CALIBRATION, 5.0, 1.0, 1.0, 1.1])

    class Probe(quiet.Probe):
        def look(self) -> quiet.Look:
            self.remember(now := {"core": next(looks)}, 1)
            return now

    effort = Hurried(False)
    effort.attempts = 2
    answers = iter([{"a": [9.0]}, {"a": [3.0]}])
    monkeypatch.setattr(harness, "read_in_turns", lambda *_: next(answers))
    probe = Probe("cpu", {"core": lambda: 1.0})
    assert runner._read({"a": Call(lambda: None, 1)}, "cpu", effort, probe) == ({"a": [3.0]}, {"core": 1.1})


def wait_for_ever(seed: int, share: float) -> Mapping[str, Variant]:
    time.sleep(600)
    return {}


def stuck_in_the_second(path: str) -> None:
    """What the process does that is killed."""
    torch.set_num_threads(1)
    runner.networks = lambda chosen=None: [perceptron("first"), perceptron("second", build=wait_for_ever)]
    runner.Effort = Hurried  # type: ignore[misc]
    runner.environment = lambda device, quick, *_: {**ENVIRONMENT, "quick": quick}
    end_to_end.run(out=path, progress=False)


def test_a_killed_run_goes_on(declare: Any, tmp_path: Path) -> None:
    path, here = tmp_path / "networks.json", Path(__file__).resolve()
    words = f"from {here.stem} import stuck_in_the_second; stuck_in_the_second({str(path)!r})"
    where = os.pathsep.join([str(here.parent), *(p for p in sys.path if p)])
    process = subprocess.Popen([sys.executable, "-c", words], env={**os.environ, "PYTHONPATH": where})
    try:
        end = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    left = Networks.load(path).rows
    assert {row["network"] for row in left} == {"first"} and len(left) == 5
    first: list[float] = []
    second: list[float] = []
    declare(perceptron("first", first), perceptron("second", second))
    found = measured(tmp_path)
    assert (len(first), len(second)) == (0, 1), "the first was not built again"
    assert found.rows[:5] == left and len(found.rows) == 10


# ------------------------------------------------------------------------------------------------- the comparison


def test_disagreement() -> None:
    right = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    assert declared.disagreement(right, right, 0.0) == (None, 0.0)
    off = right + torch.tensor([[0.0, 0.0], [0.0, 0.02]])
    assert declared.disagreement(off, right, 0.011)[0] is None, "in units of the largest output"
    sentence, error = declared.disagreement(off, right, 0.009)
    assert "50.0% of the outputs are off by more than 0.009 of the largest, by up to 0.01; allowed are 0%" in str(
        sentence
    )
    assert error == pytest.approx(0.01)
    assert declared.disagreement(off, right, 0.009, share=0.5)[0] is None
    assert declared.disagreement(right * math.nan, right, 1.0)[0] is not None
    assert "the output has shape [2, 1], expected [2, 2]" in str(declared.disagreement(right[:, :1], right, 1.0)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_share_of_the_outputs_may_be_other_than_finite(value: float) -> None:
    right = torch.tensor([[1.0, -2.0], [0.5, 0.0], [1.0, 1.0], [2.0, 2.0]])
    wrong = right.clone()
    wrong[1, 1] = value
    assert declared.disagreement(wrong, right, 1e-3, share=0.5) == ("the output is not finite", None)
    assert declared.disagreement(right, wrong, 1e-3, share=0.5) == ("the expected output is not finite", None)


def test_a_share_of_the_outputs_may_be_another_one_but_not_any() -> None:
    right = torch.tensor([[1.0, -2.0], [0.5, 0.0], [1.0, 1.0], [2.0, 2.0]])
    for off, said in (
        (0.9, None),
        (1.1, "an output is off by 0.55 of the largest; where a decision may turn, allowed is 0.5"),
    ):
        got = right.clone()
        got[2, 0] += off
        sentence, error = declared.disagreement(got, right, 1e-3, share=0.75)
        assert sentence == said and error == pytest.approx(off / 2)
        assert "25.0% of the outputs" in str(declared.disagreement(got, right, 1e-3, share=0.8)[0])
    assert declared.disagreement(right + 1.5, right, 0.8)[0] is None, "a wide tolerance is no narrower for it"


def test_a_variant_with_one_output_that_is_not_finite_gets_no_number(declare: Any, tmp_path: Path) -> None:
    class Partly(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x).clone()
            output[0, 0] = math.nan
            return output

    def build(seed: int, share: float) -> Mapping[str, Variant]:
        dense = nn.Linear(4, 3)
        return {DENSE: Variant(dense), "partly": Variant(Partly(dense), dense, share=0.5)}

    declare(perceptron(build=build))
    row = measured(tmp_path).rows[1]
    assert row["note"] == "the output is not finite" and not row["correct"] and row["error"] is None
    assert Networks.load(tmp_path / "networks.json").rows[1] == row, "and it is written"


# ------------------------------------------------------------------------------------------------- the dense forms


@pytest.fixture
def fast_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "fast_half", lambda: ("cpu", "cuda"))


@pytest.mark.usefixtures("fast_half")
def test_every_family_compares_with_a_packed_network_and_one_in_bfloat16() -> None:
    for family in end_to_end.families():
        (network,) = (n for n in SMALL if n.family == family and n.evaluate is None)
        found = {name: v for name, v in network.build(0, 0.0).items() if declared.is_dense(name)}
        assert next(iter(found)) == DENSE
        halves = [v for name, v in found.items() if name.startswith(forms.BFLOAT16)]
        assert forms.PACKED in found and halves, family
        assert "cpu" in halves[0].devices and halves[0].reference is not None
        half, whole = (declared.weight_bytes(v.model) if v.weight_bytes is None else v.weight_bytes
                       for v in (halves[0], found[DENSE]))  # fmt: skip
        assert half < 0.6 * whole, family


def test_bfloat16_is_left_to_cpus_that_multiply_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
        found = forms.dense_forms(recommender.perceptron(64, 32))
        there = [name for name, v in found.items() if "cpu" in v.devices and "bfloat16" in name]
        assert len(there) == (2 if supported else 0)
        assert "cuda" in found[forms.BFLOAT16].devices


def test_a_packed_layer_computes_what_the_layer_does() -> None:
    model = recommender.perceptron(64, 32)
    packed = forms.packed(model)
    assert packed is not None and {type(m).__name__ for m in packed} == {"PackedLinear", "ReLU"}
    with torch.inference_mode():
        for shape in ((1, 64), (7, 64), (2, 3, 64), (1, 64)):
            x = torch.randn(shape)
            torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-5)
    (layer, *_) = packed
    assert isinstance(layer, forms.PackedLinear) and len(layer._packed) == forms.LAYOUTS
    assert layer.weight is model[0].weight, "the weights are not copied"
    assert forms.packed(nn.ReLU()) is None, "there is nothing to pack"


def test_rotary_positions_do_not_become_coarse_in_bfloat16() -> None:
    model = DECODER.network(0, 0.0)
    halved = forms.half(model)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    rotary, kept = (m.get_submodule("rotary") for m in (halved, model))
    assert torch.equal(rotary.frequency, kept.frequency) and rotary.frequency.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "it is a copy"


# -------------------------------------------------------------------------------------------------- few pairs


def test_of_few_pairs_there_is_no_interval(declare: Any, tmp_path: Path) -> None:
    declare(perceptron())
    found = measured(tmp_path)  # of two rounds
    exact = found.rows[2]
    assert exact["speedup"] > 0 and exact["speedup_low"] is None and exact["throughput_gain_high"] is None
    headings, lines = end_to_end.table(found)
    assert lines[2][headings.index("latency against dense")].strip("*").endswith("x [-]")
    pytest.importorskip("matplotlib")
    assert "exact" in end_to_end.plot(found)


def test_the_decoded_network_has_no_packed_layer() -> None:
    from cofire.methods import EDKM, GradualPruning
    from cofire.nn import quantize_

    x = torch.randn(2, 64)
    pruning = GradualPruning(0.5)
    for packed in (
        quantize_(recommender.perceptron(64, 64), bits=4, group_size=32),
        pruning.finalize(pruning.prepare(recommender.perceptron(64, 64))),
        EDKM(bits=2).finalize(EDKM(bits=2).prepare(recommender.perceptron(64, 64))),
    ):
        plain = declared.decoded(packed)
        assert {type(m).__name__ for m in plain} <= {"Linear", "ReLU", "Decoded"}
        assert {type(m).__name__ for m in packed} - {"ReLU"} != {"Linear"}, "the packed one stays"
        torch.testing.assert_close(plain(x), packed(x))
    words = nn.Sequential(nn.Embedding(50, 64))
    packed = EDKM(bits=2).finalize(EDKM(bits=2).prepare(words))
    torch.testing.assert_close(declared.decoded(packed)(torch.arange(50)), packed(torch.arange(50)))


def test_bytes_that_are_shared_count_once() -> None:
    layer = nn.Linear(4, 3, bias=False)
    assert declared.weight_bytes(nn.Sequential(layer, layer)) == 48
    assert declared.weight_bytes(nn.BatchNorm1d(2)) == 4 * 8 + 8


# -------------------------------------------------------------------------------------------------------- the file


def whole(**changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(COLUMNS) | {
        "family": "gating",
        "network": "n",
        "variant": DENSE,
        "correct": True,
        "noisy": False,
    }
    return row | {"latency_ms": 1.0, "throughput": 2.0, "unit": "images/s", "weight_bytes": 1 << 20} | changes


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"family": "gating"}, r"a row must have the columns network, variant, .*; got \['family'\]"),
        ([], "a row must be a dict, got list"),
        (
            whole(correct=False),
            r"a variant with a wrong answer gets no number, got latency_ms=1\.0 \(gating, n, dense\)",
        ),
        (whole(latency_ms=math.inf), r"latency_ms must be a finite number or null, got inf \(gating, n, dense\)"),
        (whole(throughput="fast"), "throughput must be a finite number or null, got 'fast'"),
    ],
)
def test_a_row_that_is_none_is_neither_written_nor_read(row: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "networks.json"
    path.write_text("old")
    with pytest.raises(ValueError, match=f"bench-networks: {sentence}"):
        Networks({}, {}, [row]).save(path)
    assert path.read_text() == "old"
    path.write_text(json.dumps({"environment": {}, "ceilings": {}, "rows": [row]}))
    with pytest.raises(ValueError, match=f"bench-networks: {sentence}.*in .*networks.json"):
        Networks.load(path)


@pytest.mark.parametrize(
    ("content", "sentence", "aside"),
    [
        (
            '{"environment": {}, "rows": [',
            "is cut off in line 1; measure again with cofire bench-networks, or fetch",
            True,
        ),
        ("", "is empty; measure again with cofire bench-networks, or fetch the file again", True),
        (b"\xff\xfe", "is not a results file: it is not text; name a file of cofire bench-networks", True),
        ("[]", "is not a results file (environment, ceilings, rows); name a file of cofire bench-networks", False),
        ('{"environment": {}}', "it lacks ceilings, rows of environment, ceilings, rows; name a file of", False),
        ('{"environment": {}, "ceilings": {}, "rows": {}}', "rows is dict, expected list", False),
        (
            '{"environment": {}, "ceilings": {}, "rows": []}',
            "its environment lacks device, kind, threads, torch, instr",
            False,
        ),
        (
            '{"environment": {"format": 99}, "ceilings": {}, "rows": []}',
            "was written by a newer cofire (it is of format 99)",
            False,
        ),
        (
            '{"environment": {}, "ceilings": {}, "rows": [], "run": {}}',
            "it has run, which other files of cofire have",
            False,
        ),
    ],
)
def test_a_file_that_is_none_gets_a_sentence_and_is_moved_aside_if_broken(
    content: str | bytes, sentence: str, aside: bool, tmp_path: Path, declare: Any
) -> None:
    path = tmp_path / "networks.json"
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    declare(perceptron())
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Networks.load(path)
    assert str(error.value).startswith(f"bench-networks: {path} ") and sentence in str(error.value)
    said: list[str] = []
    if not aside:
        with pytest.raises(ValueError) as again:  # noqa: PT011
            measured(tmp_path, announce=said.append)
        assert str(again.value) == f"{error.value}. It stays as it is: move it away, or write to another file"
        assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path] and not said
        return
    assert len(measured(tmp_path, announce=said.append).rows) == 5
    assert said == [f"{error.value}. It is now {path}.broken, and {path} is begun anew"]
    assert (tmp_path / "networks.json.broken").read_bytes() == content, "nothing is lost"


def test_names_of_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite_results, "device_name", lambda device: "Some(R) GPU")
    assert end_to_end.networks_path("cuda") == Path("benchmarks/results/end_to_end/some-gpu.json")
    assert end_to_end.networks_path("cuda", quick=True).name == "some-gpu-quick.json"
    for name in ("b.json", "a.json", "a-quick.json"):
        write_atomically(tmp_path / "end_to_end" / name, "{}")
    assert [p.name for p in end_to_end.networks_files([tmp_path])] == ["a.json", "b.json"]


# ----------------------------------------------------------------------------------------------------------- words


def test_bad_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no family with a network is called 'gatin'; did you mean 'gating'?"):
        end_to_end.run(["gatin"], out=tmp_path / "r.json")
    with pytest.raises(ValueError, match="bench-networks: device must be cpu or cuda, got 'tpu'"):
        end_to_end.run(device="tpu", out=tmp_path / "r.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda needs an NVIDIA GPU that torch can see, and there is none"):
        end_to_end.run(device="cuda", out=tmp_path / "r.json")
    done = CliRunner().invoke(app, ["bench-networks", "--family", "gatin"])
    assert done.exit_code == 2 and "did you mean 'gating'?" in done.stderr


def test_command(declare: Any, tmp_path: Path) -> None:
    built: list[float] = []
    declare(perceptron(built=built))
    words = ["bench-networks", "--family", "gating", "--quick", "--out", str(tmp_path / "r.json")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "gating, perceptron" in done.stdout
    assert "100.0 (+0.0) outputs below nine, %" in done.stdout
    assert "wrong: no number: 100.0% of the outputs are off" in done.stdout
    assert "of 5 rows are noisy" in done.stdout
    CliRunner().invoke(app, words)
    assert len(built) == 1
    CliRunner().invoke(app, [*words, "--again"])
    assert len(built) == 2
    (tmp_path / "r.json").write_text("{")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "is cut off in line 1" in done.stderr
    assert (tmp_path / "r.json.broken").read_text() == "{" and len(built) == 3


def lost() -> dict[str, Any]:
    ratios = {f"{what}{end}": v for what in ("speedup", "throughput_gain") for end, v in
              (("", 0.5), ("_low", 0.4), ("_high", 0.6))}  # fmt: skip
    return whole(
        variant="gated, half", latency_ms=2.0, accuracy=97.0, accuracy_kind="digits right, %", noisy=True, **ratios
    )


def table_of_three() -> dict[str, Any]:
    dense = whole(accuracy=98.0, accuracy_kind="digits right, %", data="digits", latency_of="one image", batch=8)
    refused = whole(variant="gated, wrong", latency_ms=None, throughput=None, correct=False, note="off by a mile")
    return {"environment": ENVIRONMENT, "ceilings": {}, "rows": [dense, lost(), refused]}


def test_table_shows_losses() -> None:
    headings, lines = end_to_end.table(table_of_three())
    rows = [dict(zip(headings, line, strict=True)) for line in lines]
    assert len(rows) == 3
    assert "**0.50x [0.40, 0.60]**" in lines[1], "a loss is bold"
    assert rows[1]["latency ms"] == "~2" and rows[1]["accuracy"] == "97.0 (-1.0)"
    assert rows[0]["accuracy"] == "98.0" and rows[0]["weights MiB"] == "1"
    assert rows[0]["notes"] == "digits; accuracy: digits right, %; latency of one image, throughput at batch 8"
    assert rows[2]["latency ms"] == "no number" and rows[2]["notes"] == "off by a mile"
    assert rows[2]["network"] == "n (random weights)", "without an accuracy, speed only"


def test_plot() -> None:
    pytest.importorskip("matplotlib")
    picture = end_to_end.plot(table_of_three())
    assert picture.startswith("<svg") and "gated, half (-1.0)" in picture and "gated, wrong" not in picture
    assert end_to_end.plot({"environment": {}, "ceilings": {}, "rows": [whole()]}) == ""


def test_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "results" / "some-cpu.json"
    Networks(**table_of_three()).save(path)
    assert end_to_end.write_page(tmp_path, [path]) == [], "there is no page"
    page = tmp_path / "networks.md"
    page.write_text("My words.\n<!-- results: cofire bench-networks -->\n<!-- end of networks -->\nMore.\n")
    written = end_to_end.write_page(tmp_path, [path])
    assert [p.name for p in written] == ["networks.md", "networks-some-cpu.svg"]
    words = page.read_text()
    assert words.startswith("My words.\n") and words.endswith("More.\n")
    assert "### Some CPU" in words and "| **0.50x [0.40, 0.60]** |" in words and "(networks-some-cpu.svg)" in words
    end_to_end.write_page(tmp_path, [])
    assert "Not measured." in page.read_text()


def test_the_page_agrees_with_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    page = ROOT / "docs" / "networks.md"
    copied = write_atomically(tmp_path / "networks.md", page.read_text(encoding="utf-8"))
    for path in end_to_end.write_page(tmp_path):
        committed = page.with_name(path.name)
        assert committed.exists() and path.read_text() == committed.read_text(), (
            f"{path.name} is old: run cofire report"
        )
    assert copied.read_text() == page.read_text()


# ---------------------------------------------------------------------------------------------------- the networks

DECODER = text.Trained(
    width=32, depth=2, heads=2, kv_heads=1, hidden=64, context=64, batch=2, rounds=1, steps=2, windows=2
)
CACHE = kv_fusion.Sizes(capacity=8, chunk=8, taps=3, buffer=4, prompt=24, batch=2)
PERCEPTRON = recommender.Recommender(items=64, width=32, epochs=1, functions=150)
SMALL = (
    lowbit.trained(DECODER, prompt=16, steps=2, batch=2, group_size=32),
    lowbit.random(64, 2, 4, 2, 128, 32, prompt=16, steps=2, batch=2, group_size=64),
    kv_fusion.trained(DECODER, CACHE, updates=2, batch=2),
    kv_fusion.random(CACHE, 32, 2, 2, 32, checked=40),
    gating.trained((4, "pool", 8, 8), 8, (1, 1), images=64, throughput=4),
    gating.random((8, 8, "pool", 16), 8, throughput=4),
    shift_add.trained(shift_add.Plan(1, 1, 32, images=96), throughput=4),
    shift_add.random(32, 8, 32, 2, 2, throughput=4),
    sparse.trained(PERCEPTRON, epochs=1, throughput=4),
    sparse.random(64, 64, throughput=4),
    clustering.trained(PERCEPTRON, epochs=1, throughput=4),
    clustering.random(64, 64, throughput=4),
)


@pytest.mark.parametrize("network", SMALL, ids=str)
def test_network(network: Network) -> None:
    """Every variant computes what it must, and has all its numbers."""
    rows = runner.measure(network, "cpu", Hurried(False), quiet.Probe("cpu"))
    assert rows[0]["variant"] == DENSE and len(rows) > 2
    for row in rows:
        assert row["correct"], row["note"]
        assert [n for n in NUMBERS if row[n] is None] == ([] if network.evaluate else ["accuracy"])
        assert (row["error"] is None) == (row["variant"] == DENSE and network.family != "kv_fusion")
    small = [row for row in rows if not declared.is_dense(row["variant"])]
    if network.family in ("lowbit", "clustering", "sparse"):
        assert all(row["weight_bytes"] < rows[0]["weight_bytes"] for row in small)
    if network.family == "kv_fusion":
        assert all(row["held_bytes"] < rows[0]["held_bytes"] for row in small)


def test_every_family_has_networks_with_and_without_training() -> None:
    """The operators of ``selection`` choose what the networks of ``sparse`` keep."""
    assert set(end_to_end.families()) == {o.family for o in OPERATORS.values()} - {"selection"}
    for family in end_to_end.families():
        found = end_to_end.networks([family])
        assert {n.family for n in found} == {family}
        assert {n.evaluate is None for n in found} == {True, False}
        assert all((n.evaluate is None) == (n.data == declared.RANDOM_WEIGHTS) for n in found)
    names = [str(n) for n in end_to_end.networks()]
    assert len(set(names)) == len(names)


def test_builds_repeat() -> None:
    first, second = (SMALL[10].build(0, 0.0) for _ in range(2))
    for name, variant in first.items():
        for a, b in zip(variant.model.state_dict().values(), second[name].model.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_the_recommender_is_scored_on_names_it_was_not_shown() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(x.shape[1], 0, -1).float().expand(len(x), -1)

    class Shown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e6 * x + torch.arange(x.shape[1], 0, -1)

    test = PERCEPTRON.uses.test
    right = count = 0
    for row in test:
        names = row.nonzero().flatten().tolist()
        for hidden in names:
            others = [i for i in range(len(row)) if i == hidden or i not in names][:10]
            right, count = right + (hidden in others), count + 1
    assert PERCEPTRON.score(Constant()) == pytest.approx(100 * right / count)
    assert PERCEPTRON.score(Shown()) == PERCEPTRON.score(Constant()), (
        "the hidden name is not shown, the others do not count"
    )
    assert set(PERCEPTRON.uses.train.unique().tolist()) == {0.0, 1.0}
    assert float(PERCEPTRON.uses.train.sum(1).min()) >= recommender.LEAST


def test_the_recommender_needs_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="recommender: no module of Python's library is in"):
        recommender.load(7)


def test_the_decoder_is_scored_by_the_likeliest_character() -> None:
    class Space(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(torch.zeros_like(x), 96).float()

    windows = torch.cat([y for _, y in text._text().test_batches(16, DECODER.context, DECODER.windows)])
    assert DECODER.score(Space()) == pytest.approx(100 * float((windows == 0).float().mean()))


def test_generating_again_begins_at_the_same_place() -> None:
    model = DECODER.network(0, 0.0)
    prompt = DECODER.windows_of(2, 16)
    with torch.inference_mode():
        call = text.decoding(5)(model, prompt)
        assert torch.equal(call.run(), call.run())
        tokens = prompt
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
        assert torch.equal(call.run(), tokens[:, -1:])
    assert (call.items, call.steps) == (10, 5)
