# SPDX-License-Identifier: Apache-2.0
"""The demonstration, on a tiny network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cofire import data, demo

SETTINGS = demo.Settings(
    layers=(8, "pool", 16, 16), size=12, dense_epochs=1, gated_epochs=1, batch=32, images=96, bench=False
)


def test_demo_prints_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    result = demo.main(tmp_path, SETTINGS)
    page = (tmp_path / "index.html").read_text()
    assert f"{result['latency']['speedup']:.2f}x" in page
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert (tmp_path / "layers.png").exists()
    assert "gated, deployed" in capsys.readouterr().out


def test_demo_can_be_scored_without_the_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    images = replace(data.load("digits", size=12), test=object(), test_labels=object())
    monkeypatch.setattr(demo.data, "load", lambda *_, **__: images)
    demo.main(tmp_path, replace(SETTINGS, validate=True))
    text = capsys.readouterr().out
    assert "Validation run" in text
    assert "validation accuracy" in " ".join(text.split())
    assert "test accuracy" not in (tmp_path / "index.html").read_text()
