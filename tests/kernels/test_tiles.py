# SPDX-License-Identifier: Apache-2.0
"""Tiles as data: where they are looked for, what is not one, and how the best are found, on calls made up here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from cofire_kernels import cases, configs
from cofire_kernels.configs import tune

CPU = torch.device("cpu")
SHIPPED = {
    "made_up": [
        {"key": {"columns": 64}, "tile": {"BLOCK": 64, "num_warps": 1}},
        {"key": {"columns": 1024}, "tile": {"BLOCK": 256, "num_warps": 4}},
    ]
}


@pytest.fixture(autouse=True)
def caches() -> Iterator[None]:
    yield
    for cached in (configs.entries, configs._nearest):
        cached.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user names; ``configs`` ships the tiles of one made-up kernel."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "default.json").write_text(json.dumps(SHIPPED))
    monkeypatch.setattr(configs, "FOLDER", shipped)
    monkeypatch.setenv("COFIRE_TILES", str(tmp_path))
    monkeypatch.setattr(configs, "_device_name", lambda device: "A GPU")
    for cached in (configs.entries, configs._nearest):
        cached.cache_clear()
    return tmp_path


def tuned(columns: int = 64, block: int = 128) -> list[dict[str, dict[str, int]]]:
    return [{"key": {"columns": columns}, "tile": {"BLOCK": block, "num_warps": 2}}]


def test_the_folder_that_is_named_comes_first(folder: Path) -> None:
    assert configs.tile("made_up", CPU, columns=64)["BLOCK"] == 64
    (configs.FOLDER / "A_GPU.json").write_text(json.dumps({"made_up": tuned(block=32)}))
    configs.entries.cache_clear()
    configs._nearest.cache_clear()
    assert configs.tile("made_up", CPU, columns=64)["BLOCK"] == 32
    (folder / "A_GPU.json").write_text(json.dumps({"made_up": tuned(block=128), "of_later": []}))
    configs.entries.cache_clear()
    configs._nearest.cache_clear()
    assert configs.tile("made_up", CPU, columns=64)["BLOCK"] == 128


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "is not JSON"),
        ("[1]", "must map kernels to lists of entries, got a list"),
        ('{"made_up": 3}', "made_up must have a list of entries, got 3"),
        ('{"made_up": []}', "made_up must have a list of entries, got []"),
        ('{"made_up": [1]}', "made_up must have entries of a key and a tile, got 1"),
        ('{"made_up": [{"key": {"columns": 1.5}, "tile": {}}]}', "made_up must have a key of whole numbers, got "),
        ('{"made_up": [{"key": {"columns": 8}, "tile": {"BLOCK": 8}}]}', "made_up has a tile of BLOCK, expected BLOCK, num_warps"),
        ('{"made_up": [{"key": {}, "tile": {"BLOCK": 8, "num_warps": 1}}]}', "made_up has a key of nothing, expected columns"),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_left_out(folder: Path, text: str, fault: str) -> None:
    (folder / "A_GPU.json").write_text(text)
    with pytest.warns(UserWarning, match=re.escape(fault) + ".*; the shipped tiles serve"):
        assert configs.tile("made_up", CPU, columns=64)["BLOCK"] == 64


def test_the_shipped_file_is_one() -> None:
    shipped = configs.read(configs.FOLDER / "default.json")
    assert configs.read(configs.FOLDER / "default.json", shipped) == shipped and set(shipped) == set(cases.CASES)
    assert sorted(tune.names()) == sorted(shipped) and tune.names()[0].startswith("qlinear")


def calls(monkeypatch: pytest.MonkeyPatch, *made: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernel's calls; the list takes the tiles that they run with."""
    ran: list[dict[str, Any]] = []

    def asks() -> None:
        ran.append(configs.tile("made_up", CPU, columns=64))

    monkeypatch.setattr(cases, "CASES", {"made_up": lambda make, sizes: [*made, asks]})
    return ran


def test_the_fastest_tile_of_each_size_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first call that asks for a tile; a tile that does not run is left out."""
    ran = calls(monkeypatch, lambda: None)

    def measure(call: Callable[[], object]) -> float:
        call()
        if ran[-1]["BLOCK"] == 64:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    best = tune.best("made_up", torch.bfloat16, CPU, measure=measure)
    assert [e["key"]["columns"] for e in best] == [64, 1024] and [e["tile"]["BLOCK"] for e in best] == [256, 256]
    assert not configs.forced


def test_what_cannot_be_tuned_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls(monkeypatch)

    def broken(call: Callable[[], object]) -> float:
        raise RuntimeError("too large")

    with pytest.raises(
        RuntimeError, match=re.escape("tune: no tile of made_up runs at {'columns': 64} (RuntimeError: too large)")
    ):
        tune.best("made_up", torch.bfloat16, CPU, measure=broken)  # fmt: skip
    monkeypatch.setattr(cases, "CASES", {"made_up": lambda make, sizes: [lambda: None]})
    with pytest.raises(RuntimeError, match=r"no call in cofire_kernels/cases.py asks for a tile of made_up at"):
        tune.best("made_up", torch.bfloat16, CPU, measure=broken)


def test_sizes_whose_turn_comes_too_late_keep_the_shipped_tile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = calls(monkeypatch)
    assert tune.best("made_up", torch.bfloat16, CPU, seconds=0.0, measure=lambda call: 1.0) == SHIPPED["made_up"]
    assert not ran


def test_every_kernel_is_written_when_it_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(tune, "best", lambda *_: tuned())
    assert tune.tune() == folder / "A_GPU.json"
    assert json.loads((folder / "A_GPU.json").read_text()) == {"made_up": tuned()}
    assert configs.tile("made_up", CPU, columns=64)["BLOCK"] == 128, "and is used from now on"
    with pytest.raises(ValueError, match="tune: kernels must be among made_up, got 'made_down'"):
        tune.tune(["made_down"])
    (folder / "A_GPU.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(f"tiles: {folder / 'A_GPU.json'} is not JSON")):
        tune.tune()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="tune: measuring tiles needs a GPU"):
        tune.tune()
