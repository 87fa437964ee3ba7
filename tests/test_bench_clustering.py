# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of clustering rests on: its references, eDKM's hooks, the measurement of memory, growth."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cofire.bench import clustering, harness, memory
from cofire.bench.cases import Random
from cofire.bench.edkm_hooks import PAPER_MB, EDKMHooks
from cofire.cli import app
from cofire.ops import clustering as ops
from cofire.ops.clustering import _dkm_reference

HALF = torch.bfloat16
report = importlib.import_module("cofire.bench.report")  # the package has a function of that name

TECHNIQUES: dict[str, dict[str, Any]] = {
    "base": {},
    "M": {"marshal": True},
    "U": {"uniquify": True},
    "S": {"shard": True, "learners": 8},
    "M+S": {"marshal": True, "shard": True, "learners": 8},
    "M+U": {"marshal": True, "uniquify": True},
    "M+U+S": {"marshal": True, "uniquify": True, "shard": True, "learners": 8},
}


@pytest.fixture
def args() -> tuple[Any, ...]:
    made = clustering._dkm_args(Random("hooks"), (128, 64), HALF, 8, 1, None, 3, "unroll")
    made[0].requires_grad_()
    return made


def gradient(function: Callable[..., Any], args: tuple[Any, ...], hooks: EDKMHooks | None = None) -> Tensor:
    if hooks is None:
        output = function(*args)
    else:
        with hooks:
            output = function(*args)
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return torch.autograd.grad(output, args[0], seed)[0]


# --------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("grad", ["unroll", "implicit", "jfb"])
@pytest.mark.parametrize("rows", [None, 8])
def test_counted_reference_is_the_operator_s(rows: int | None, grad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_resolution", lambda dtype: torch.finfo(HALF).eps / 2)  # of what is widened here
    made = clustering._dkm_args(Random("counted"), (32, 64), HALF, 4, 1, rows, 3, grad)
    wide = tuple(a.double() if isinstance(a, Tensor) else a for a in made)
    # Newton's method ends at a residual of NEWTON_STALLED; a fixed point that is hard to reach multiplies it
    _same_as_the_operator(clustering.counted_reference, wide, 1e-9 if grad == "implicit" else 1e-12)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("rows", [None, 8])
def test_streamed_reference_is_the_operator_s(rows: int | None, d: int) -> None:
    made = clustering._dkm_args(Random("streamed"), (32, 64), torch.float32, 4, d, rows, 3, "unroll")
    wide = tuple(a.double() if isinstance(a, Tensor) else a for a in made)
    _same_as_the_operator(clustering.streamed_reference, wide)


def _same_as_the_operator(
    reference: Callable[..., tuple[Tensor, ...]], args: tuple[Any, ...], error: float = 1e-12
) -> None:
    args[0].requires_grad_()
    for got, expected in zip(reference(*args), _dkm_reference(*args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=error)
    seed = torch.randn(args[0].shape, dtype=torch.float64)
    got, expected = (torch.autograd.grad(f(*args)[0], args[0], seed)[0] for f in (reference, _dkm_reference))
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- the hooks


@pytest.mark.parametrize("techniques", TECHNIQUES.values(), ids=TECHNIQUES.keys())
@pytest.mark.parametrize("function", [clustering.eager_dkm, clustering.eager_dkm_fp32])
def test_hooks_leave_the_gradient_as_it_is(
    args: tuple[Any, ...], function: Callable[..., Tensor], techniques: dict[str, Any]
) -> None:
    hooks = EDKMHooks(args[0], **techniques)
    assert torch.equal(gradient(function, args, hooks), gradient(function, args))


def test_each_technique_saves_memory(args: tuple[Any, ...]) -> None:
    stored = {}
    for name, techniques in TECHNIQUES.items():
        hooks = EDKMHooks(args[0], **techniques)
        gradient(clustering.eager_dkm, args, hooks)
        stored[name] = hooks.bytes
        assert 0 < hooks.stored <= hooks.tensors
    assert stored["base"] > stored["M"] > stored["M+S"] > stored["M+U+S"]
    assert stored["M"] > stored["M+U"] > stored["M+U+S"]
    assert stored["base"] > stored["U"] > stored["M+U"]
    maps = args[0].numel() * 8 * args[0].element_size()
    assert stored["base"] > 12 * maps, "three iterations of four maps, and the last one once more"
    assert stored["M+S"] < 1.05 * stored["M"] / 8
    assert PAPER_MB["base"] > PAPER_MB["M"] > PAPER_MB["M+S"] > PAPER_MB["M+U"] > PAPER_MB["M+U+S"]


def test_the_weight_itself_is_not_counted() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    with EDKMHooks(weight) as hooks:
        weight.square()
    assert (hooks.tensors, hooks.stored, hooks.bytes) == (1, 0, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.T.contiguous(),
        lambda x: x.view(8, 32, 4).permute(2, 0, 1).clone(),
        lambda x: x.transpose(-1, -2).reshape(-1),
        lambda x: x[None].expand(3, -1, -1).clone(),
    ],
)
def test_marshaling_finds_copies_along_the_graph(make: Callable[[Tensor], Tensor]) -> None:
    weight = torch.randn(256, 4, requires_grad=True)

    def run() -> Tensor:
        x = weight.exp()  # saved: its result
        y = make(x)
        return (y * y).sum()  # saved: another storage with the same numbers

    (plain,) = torch.autograd.grad(run(), weight)
    with EDKMHooks(weight, marshal=True) as hooks:
        output = run()
    assert hooks.stored == 1
    assert torch.equal(torch.autograd.grad(output, weight)[0], plain)


def test_marshaling_does_not_mistake_reused_memory() -> None:
    weight = torch.randn(64, 64, requires_grad=True)

    def run() -> Tensor:
        total = weight.sum() * 0
        for i in range(1, 6):  # the inputs of square are freed, and their memory is taken again
            total = total + (weight * i).square().sum()
        return total

    (plain,) = torch.autograd.grad(run(), weight)
    with EDKMHooks(weight, marshal=True) as hooks:
        output = run()
    assert torch.equal(torch.autograd.grad(output, weight)[0], plain)
    assert hooks.stored >= 5


def test_what_hooks_refuse() -> None:
    with pytest.raises(TypeError, match="uniquify needs a bfloat16 or float16 weight, got torch.float32"):
        EDKMHooks(torch.zeros(4), uniquify=True)
    with pytest.raises(ValueError, match="learners must be at least 1, got 0"):
        EDKMHooks(torch.zeros(4), learners=0)


def _learner(rank: int, folder: str, uniquify: bool) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/rendezvous-{uniquify}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    made = clustering._dkm_args(Random("learners"), (33, 64), HALF, 4, 1, None, 3, "unroll")
    made[0].requires_grad_()
    group = torch.distributed.group.WORLD
    hooks = EDKMHooks(made[0], marshal=True, uniquify=uniquify, shard=True, group=group)
    got = gradient(clustering.eager_dkm, made, hooks)
    whole = EDKMHooks(made[0], marshal=True, uniquify=uniquify)
    assert torch.equal(got, gradient(clustering.eager_dkm, made, whole))
    assert hooks.bytes < 0.6 * whole.bytes
    torch.distributed.destroy_process_group()


@pytest.mark.full
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("uniquify", [False, True])
def test_learners_keep_their_share_and_gather(tmp_path: Path, uniquify: bool) -> None:
    calls = [[sys.executable, __file__, str(rank), str(tmp_path), str(int(uniquify))] for rank in (0, 1)]
    running = [subprocess.Popen(call, stderr=subprocess.PIPE, text=True) for call in calls]
    for learner in running:
        errors = learner.communicate(timeout=120)[1]
        assert learner.returncode == 0, errors


# ------------------------------------------------------------------------------------------------------- memory


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@needs_linux
@pytest.mark.full
def test_memory_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "memory.json"
    methods = ["cofire", "eager", "edkm", "edkm-m", "edkm-mu", "edkm-mus"]
    found = memory.run(methods, path, large=(512, 256), small=(256, 256), clusters=[8])
    assert {**json.loads(path.read_text()), "refused": []} == found
    rows = {r["method"]: r for r in found["rows"]}
    assert list(rows) == methods
    assert rows["cofire"]["saved_bytes"] < 1 << 16, "centroids, no map"
    maps = 256 * 256 * 8 * 2
    assert rows["eager"]["saved_bytes"] > 6 * maps
    assert rows["eager"]["peak_bytes"] > 6 * maps
    order = [rows[m]["saved_bytes"] for m in ("edkm", "edkm-m", "edkm-mu", "edkm-mus")]
    assert order == sorted(order, reverse=True)
    table = memory.memory_table(found)
    for words in ("| cofire |", "1600 MB", "(computed)"):
        assert words in table


def memory_row(method: str, saved: int, side: int = 1024) -> dict[str, Any]:
    return {
        "method": method,
        "shape": [side, side],
        "clusters": 8,
        "iterations": 3,
        "weight_bytes": 2 * side * side,
        "saved_bytes": saved,
        "peak_bytes": 10**7,
        "seconds": 1.0,
        "threads": 2,
    }


def test_what_larger_weights_would_save() -> None:
    million = 1 << 20
    assert memory.saved_of(memory_row("eager", 100 * million)) == 1600 * million
    assert memory.saved_of(memory_row("edkm-mu", 2 * million + 7)) == 32 * million + 7
    assert memory.saved_of(memory_row("edkm-mus", million // 4 + 7)) == 4 * million + 7
    assert memory.saved_of(memory_row("cofire", 264)) == 264


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="no method is called 'edkm-x'"):
        memory.run(["edkm-x"])
    result = CliRunner().invoke(app, ["bench-memory", "edkm-x"])
    assert result.exit_code == 2
    assert "no method is called" in result.output


def test_a_failed_measurement_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = memory.run(["cofire"], tmp_path / "m.json", clusters=[4, 8])
    assert found["refused"] == [f"cofire, K{k}: ended with 1: no message" for k in (4, 8)]
    assert not (tmp_path / "m.json").exists()


def test_memory_of_other_methods_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file is written after each measurement. One that is cut off is moved aside, one of another kind is not replaced."""
    path, real = tmp_path / "m.json", subprocess.run

    def measured(call: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if call[0] != sys.executable:  # git
            return real(call, **options)
        method, rows, columns, k = call[3:]
        row = {"method": method, "shape": [int(rows), int(columns)], "clusters": int(k), "weight_bytes": 8}
        return subprocess.CompletedProcess(call, 0, json.dumps({**row, "saved_bytes": 1, "peak_bytes": 2}) + "\n", "")

    monkeypatch.setattr(memory.subprocess, "run", measured)
    memory.run(["cofire"], path, clusters=[4])
    memory.run(["eager"], path, clusters=[4])
    memory.run(["cofire"], path, clusters=[4, 8])
    assert [(r["method"], r["clusters"]) for r in memory.load(path)["rows"]] == [
        ("eager", 4),
        ("cofire", 4),
        ("cofire", 8),
    ]
    whole = json.loads(path.read_text())
    newer = {**whole, "environment": {**whole["environment"], "format": 99}}
    for i, (text, sentence) in enumerate(
        (
            (path.read_text()[:-40], "is cut off in line"),
            ("", "is empty; measure again with cofire bench-memory, or fetch the file again"),
        ),
        start=1,
    ):
        path.write_text(text)
        with pytest.raises(ValueError) as error:  # noqa: PT011
            memory.load(path)
        assert str(error.value).startswith(f"bench-memory: {path} ") and sentence in str(error.value)
        said: list[str] = []
        assert len(memory.run(["cofire"], path, clusters=[4], announce=said.append)["rows"]) == 1
        aside = tmp_path / f"m.json.broken{'' if i == 1 else f'-{i}'}"
        assert said[0] == f"{error.value}. It is now {aside}, and {path} is begun anew"
        assert aside.read_text() == text, "nothing is lost"
    there = sorted(tmp_path.iterdir())
    for text, sentence in (
        ("[]", "is not a results file (environment, rows); name a file of cofire bench-memory"),
        (json.dumps({**whole, "ceilings": {}}), "it has ceilings, which other files of cofire have"),
        (json.dumps(newer), "was written by a newer cofire (it is of format 99); install that one to read it"),
        ('{"environment": {}, "rows": [3]}', "it lacks device, threads, torch, date, method, shape, clusters"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError) as error:  # noqa: PT011
            memory.run(["cofire"], path, clusters=[4])
        assert str(error.value).startswith(f"bench-memory: {path} ") and sentence in str(error.value)
        assert str(error.value).endswith(". It stays as it is: move it away, or write to another file")
        assert path.read_text() == text and sorted(tmp_path.iterdir()) == there


# ------------------------------------------------------------------------------------------------- growth, report


def test_slow_providers_get_fewer_rounds() -> None:
    runs = {"slow": lambda: time.sleep(0.02), "quick": lambda: None}
    assert 7 <= len(harness.read_in_turns(runs, "cpu", 0.01, 30, 100, longest_seconds=0.2)["slow"]) <= 10
    assert len(harness.read_in_turns({"quick": lambda: None}, "cpu", 0.0, 30, 100)["quick"]) == 30


if __name__ == "__main__":
    _learner(int(sys.argv[1]), sys.argv[2], sys.argv[3] == "1")
