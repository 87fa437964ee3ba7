# SPDX-License-Identifier: Apache-2.0
"""The package as users get it: a wheel in an empty environment, and an install without a compiler."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[1]

# One operator, one method; run with the environment's own Python, in a folder that is not the checkout.
PROGRAM = """
import sys, torch, cofire
from torch import nn
from cofire.methods import FTWT
assert "site-packages" in cofire.__file__, cofire.__file__
index, count = cofire.ops.compact(torch.tensor([[True, False, True]]))
assert index.tolist() == [[0, 2, -1]] and count.tolist() == [2]
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
method = FTWT(mass=0.9)
model = method.prepare(net)
(model(torch.randn(4, 3, 9, 9)).mean() + method.loss(model)).backward()
method.step(model)
assert method.finalize(model.eval())(torch.randn(1, 3, 9, 9)).shape == (1, 8, 5, 5)
print("variant", cofire.native.STATUS.variant)
"""


def _environment() -> dict[str, str]:
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "COFIRE_BACKEND", "COFIRE_CPU", "TRITON_INTERPRET", "MAKEFLAGS")
    return {k: v for k, v in os.environ.items() if k not in dropped}


def _run(*command: str | Path, cwd: Path, **extra: str) -> str:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**_environment(), **extra}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree."""
    target = tmp_path_factory.mktemp("source") / "cofire"
    everywhere = shutil.ignore_patterns("*.so", "__pycache__")
    made = {".git", ".venv", ".venv-peers", ".cache", "build", "dist", "gpu-check", "report", "runs"}

    def ignored(folder: str, names: list[str]) -> set[str]:
        return everywhere(folder, names) | (made if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, target, ignore=ignored)
    return target


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds nothing but pip."""
    folder = tmp_path_factory.mktemp("empty")
    _run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Built in the checkout, by one worker at a time: its object files serve, so nothing is compiled twice."""
    out = tmp_path_factory.mktemp("dist")
    (ROOT / ".cache").mkdir(exist_ok=True)
    with (ROOT / ".cache" / "wheel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for old in (ROOT / "build").glob("lib*"):  # modules that are gone would be in the wheel
            shutil.rmtree(old)
        _run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", out, cwd=ROOT)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def _install(package: Path, source: Path, empty: Path, **environment: str) -> None:
    """Replaces what another test installed; each test stands alone, since workers share out the tests."""
    _run(empty / "pip", "uninstall", "--quiet", "--yes", "cofire", cwd=empty)
    constraints = source / "constraints.txt"
    _run(empty / "pip", "install", "--quiet", "-c", constraints, package, cwd=empty, **environment)


def test_without_a_compiler(source: Path, empty: Path) -> None:
    _install(source, source, empty, COFIRE_BUILD="0", CXX="no-such-compiler")
    assert "variant None" in _run(empty / "python", "-c", PROGRAM, cwd=empty)


def test_wheel_runs_in_an_empty_environment(artefacts: dict[str, Path], source: Path, empty: Path) -> None:
    _install(artefacts["wheel"], source, empty)
    assert "variant None" not in _run(empty / "python", "-c", PROGRAM, cwd=empty)
    assert '"cpu_variant": null' not in _run(empty / "cofire", "info", "--json", cwd=empty)


def test_wheel_carries_what_run_time_reads(artefacts: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(artefacts["wheel"]).namelist())
    needed = {"cofire/py.typed", "cofire_kernels/py.typed", "cofire_kernels/configs/default.json"}
    needed |= {f"cofire_kernels/cuda/{p.name}" for p in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert needed <= names, needed - names
    packages = {p.parent for root in ("pyextensions", "kernels") for p in (ROOT / root).rglob("*.py")}
    modules = {str(p.relative_to(ROOT)).partition("/")[2] for folder in packages for p in folder.glob("*.py")}
    assert modules <= names, f"not in the wheel (see packages in pyproject.toml): {sorted(modules - names)}"


def test_sdist_carries_the_sources(artefacts: dict[str, Path]) -> None:
    with tarfile.open(artefacts["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert needed | {"setup.py", "constraints.txt", "LICENSE"} <= names


def test_build_says_what_is_missing(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    environment = {**_environment(), "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no C++ compiler (no-such-compiler) was found" in done.stderr
