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


def functions(sass: str) -> dict[str, str]:
    """The machine code of each kernel by name."""
    parts = re.split(r"^\s*Function : (\w+)\s*$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_few_bits_decode_in_registers(arch: str, tmp_path: Path) -> None:
    """Codes come by 128 bits, become operands by one logical operation (or permutation), and meet the tensor cores."""
    triton = pytest.importorskip("triton", reason="the disassembler is in the triton wheel")
    assert NVCC is not None
    source = next(s for s in SOURCES if s.name == "lowbit.cu")
    cubin = tmp_path / "out.cubin"
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    subprocess.run([NVCC, "-cubin", gencode, "-std=c++17", str(source), "-o", str(cubin)], check=True)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run([str(tool), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = functions(sass)
    decoding = {"f16": r"LOP3\.LUT.*0xea", "bf16": r"LOP3\.LUT.*0xea", "s8": r"LOP3\.LUT.*0xf0f0f0f", "table": "PRMT"}
    products = {"f16": r"HMMA\.16816\.F32 ", "bf16": r"HMMA\.16816\.F32\.BF16", "s8": "IMMA", "table": "IMMA"}
    for kind, operation in decoding.items():
        code = found[f"qlinear_{kind}_128_kernel"]
        assert re.search(r"LDG\.E\.128", code), kind
        assert len(re.findall(operation, code)) >= 8, kind
        assert re.search(products[kind], code), kind
        assert "LDL" not in code and "STL" not in code, kind
