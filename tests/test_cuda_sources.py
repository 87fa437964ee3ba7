# SPDX-License-Identifier: Apache-2.0
"""Every CUDA C++ source compiles with nvcc too, for each architecture, without spilling a register."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")

pytestmark = [pytest.mark.full, pytest.mark.skipif(NVCC is None, reason="nvcc is not on the path")]


@pytest.mark.parametrize("arch", ["80", "90a", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_spills(source: Path, arch: str, tmp_path: Path) -> None:
    assert NVCC is not None
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    options = ["-cubin", gencode, "-std=c++17", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command = [NVCC, *options, str(source), "-o", str(tmp_path / "out.cubin")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    print(*re.findall(r"Used \d+ registers.*", run.stderr), sep="\n")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert spills, f"ptxas reported no kernel:\n{run.stderr}"
    assert all(amounts == ("0", "0") for amounts in spills), run.stderr


def test_there_are_sources() -> None:
    assert SOURCES
