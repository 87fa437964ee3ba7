# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ of the products with bitmaps and with 2:4, run on the CPU: threads for threads, models for instructions.

What only a GPU can show (that the instructions are what the models say, races between warps) is left to ``-m gpu``.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from cofire.ops.sparse_weight import SparseWeight
from cofire.registry import OPERATORS
from cofire_kernels import nvrtc, sparse
from cofire_kernels.sparse import product_cuda
from cofire_kernels.sparse.product_cuda import PANELS, bitmap_layout, layout_of, shares, two_four_layout
from helpers import Args, Case, Context, check_values

GPP = shutil.which("g++")
HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "csrc" / "cuda" / "sparse.cu"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if GPP is None or sys.platform != "linux":
        pytest.skip("needs g++ and the threads of Linux")
    where = tmp_path_factory.mktemp("emulated")
    (where / "all.cpp").write_text(f'#include "{HERE / "emulated.h"}"\n#include "{SOURCE}"\n')
    command = [GPP, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-o", str(where / "all.so")]
    run = subprocess.run([*command, str(where / "all.cpp")], capture_output=True, text=True, check=False)
    if run.returncode and "_Float16" in run.stderr:
        pytest.skip("this compiler has no half precision")
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(where / "all.so"))


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches run here; the list takes the names of the kernels."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("launchers on CPU tensors need the interpreter")
    launched: list[str] = []

    def launch(stem: str, name: str, blocks: int, threads: int, args: Any) -> None:
        assert stem == "sparse"
        launched.append(name)
        given = [a.data_ptr() if isinstance(a, Tensor) else a for a in args[:-4]]
        pointers, numbers = (ctypes.c_void_p * len(given))(*given), (ctypes.c_longlong * 4)(*args[-4:])
        kernel = ctypes.cast(getattr(library, name), ctypes.c_void_p)
        library.emulate_sparse(kernel, blocks, threads, pointers, len(given), numbers)

    monkeypatch.setattr(nvrtc, "launch", launch)
    return launched


def mask_24(rows: int, columns: int, most: int = 2) -> Tensor:
    """At most two (or ``most``) of each four columns, of any number and at any place."""
    groups = -(-columns // 4)
    order = torch.rand(rows, groups, 4).argsort(2)
    return (order < torch.randint(0, most + 1, (rows, groups, 1))).flatten(1)[:, :columns]


def arguments(
    samples: int, rows: int, columns: int, dtype: torch.dtype, density: float | str = 0.5, bias: bool = True
) -> Args:
    if density == "2:4":
        kept = mask_24(rows, columns)
    else:
        kept = torch.rand(rows, columns) < float(density)
        kept[0, :4] = True  # not 2:4
    w = SparseWeight.from_dense(torch.randn(rows, columns).to(dtype), kept, "bitmap")
    return torch.randn(samples, columns).to(dtype), torch.randn(rows) if bias else None, *w.arguments()


CASES = {
    "f16_8": arguments(3, 40, 200, torch.float16),
    "f16_16": arguments(9, 64, 256, torch.float16, 0.2, bias=False),
    "f16_32": arguments(17, 16, 64, torch.float16, 1.0),
    "f16_64": arguments(64, 130, 129, torch.float16, 0.7),
    "bf16_8": arguments(8, 17, 1100, torch.bfloat16, 0.05),
    "bf16_16": arguments(16, 7, 30, torch.bfloat16, 0.9),
    "bf16_32": arguments(32, 100, 640, torch.bfloat16),
    "bf16_64": arguments(33, 33, 65, torch.bfloat16, 0.0),
    "24_f16_8": arguments(1, 40, 200, torch.float16, "2:4"),
    "24_f16_64": arguments(50, 130, 129, torch.float16, "2:4", bias=False),
    "24_bf16_8": arguments(8, 16, 1100, torch.bfloat16, "2:4"),
    "24_bf16_16": arguments(12, 70, 256, torch.bfloat16, "2:4"),
    "24_bf16_32": arguments(32, 16, 64, torch.bfloat16, "2:4"),
}


def of(y: Tensor, args: Args, name: str, provider: str) -> None:
    check_values(Context(Case(OPERATORS["spmm"], (), (), (), {"output 0": 16}, None), provider, name), args, (y,))


@pytest.mark.parametrize("name", CASES)
def test_few_rows(name: str, emulated: list[str]) -> None:
    args = CASES[name]
    y = product_cuda.spmm_cuda(*args)
    assert emulated == [f"spmm_{'' if name.startswith('24') else 'bitmap_'}{name}_kernel"]
    of(y, args, name, "emulated")
    assert torch.equal(y, product_cuda.spmm_cuda(*args)), "it varies"


@pytest.mark.parametrize("pattern", ["bitmap", "24"])
def test_every_weight_in_every_place(pattern: str, emulated: list[str]) -> None:
    """One column of the weight at a time, whose entries name themselves; pruned ones count for nothing."""
    w = (torch.arange(16)[:, None] * 64 + torch.arange(64)[None, :] + 1).half()
    kept = mask_24(16, 64) if pattern == "24" else torch.rand(16, 64) < 0.6
    kept[0, :4] = kept[0, :4] if pattern == "24" else True
    args = SparseWeight.from_dense(w, kept, "bitmap").arguments()
    y = product_cuda.spmm_cuda(torch.eye(64, dtype=torch.float16), None, *args)
    assert emulated == [f"spmm_{pattern}_f16_64_kernel"]
    assert torch.equal(y, torch.where(kept, w, 0.0).t())


# ---------------------------------------------------------------------------------------------------- layouts


def test_bitmaps_come_back() -> None:
    """By the words of the docstring, lane by lane and bit by bit."""
    w, kept = torch.randn(20, 70), torch.rand(20, 70) < 0.4
    places, masks, values = bitmap_layout(w, kept).tensors
    places, masks = places[:-6].view(2, 3, 2), masks[:-64].view(2, 2, 32)
    found, seen = torch.zeros(32, 128), torch.zeros(32, 128, dtype=torch.bool)
    for panel in range(2):
        for slab in range(2):
            start, packed = (int(p) for p in places[panel, slab])
            assert int(places[panel, slab + 1, 0]) >= start
            before = [0, packed & 1023, packed >> 10 & 1023, packed >> 20 & 1023]
            for i in range(4):
                at = 8 * start + before[i]
                for lane in range(32):
                    for bit in range(8):
                        if int(masks[panel, slab, lane]) >> (8 * i + bit) & 1:
                            row = 16 * panel + lane // 4 + 8 * (bit // 2 % 2)
                            column = 64 * slab + 16 * (lane % 4) + 4 * i + 2 * (bit // 4) + bit % 2
                            found[row, column], seen[row, column] = values[at], True
                            at += 1
    assert torch.equal(seen[:20, :70], kept)
    assert int(seen.sum()) == int(kept.sum())
    assert torch.equal(found[:20, :70], torch.where(kept, w, 0.0))


def test_pairs_of_four_come_back() -> None:
    """By the words of the docstring, group by group."""
    kept = mask_24(20, 70)
    w = torch.randn(20, 70)
    layout = two_four_layout(w, kept)
    assert layout is not None
    metadata, values = layout.tensors
    found = torch.zeros(32, 128)
    for panel in range(2):
        for slab in range(2):
            for row in range(16):
                g, h = row % 8, row // 8
                for s in range(2):
                    for j in range(8):
                        word = int(metadata[panel, slab, 4 * g + 2 * s + j // 4]) >> (16 * h + 4 * (j % 4))
                        lower, upper = word & 3, word >> 2 & 3
                        assert lower < upper  # what "ordered metadata" promises
                        r, u = j // 2, j % 2
                        column = 64 * slab + 4 * (8 * u + 2 * s + r % 2 + 4 * (r // 2))
                        q = 2 * (j // 4) + h
                        pair = values[panel, slab, s, 4 * g + j % 4, 2 * q : 2 * q + 2]
                        found[16 * panel + row, column + lower] = pair[0]
                        found[16 * panel + row, column + upper] = pair[1]
    assert torch.equal(found[:20, :70], torch.where(kept, w, 0.0))
    assert two_four_layout(w, mask_24(20, 70, most=3)) is None


def test_a_layout_is_made_once() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("launchers on CPU tensors need the interpreter")
    w = SparseWeight.from_dense(torch.randn(16, 64), torch.rand(16, 64) < 0.5, "bitmap")
    parts = (w.values, w.index, w.offsets, 16, 64)
    first = layout_of(*parts)
    assert layout_of(*parts) is first
    w.values.mul_(2)
    changed = layout_of(*parts)
    assert changed is not first
    assert torch.equal(changed.tensors[-1], 2 * first.tensors[-1])
    count = len(product_cuda._LAYOUTS)
    del parts, w
    assert len(product_cuda._LAYOUTS) == count - 1


def test_shares_cover_the_product() -> None:
    for width in PANELS:
        for rows, columns in ((1, 1), (4096, 4096), (4096, 11008), (11008, 4096), (100, 65)):
            blocks, splits, part = shares(rows, columns, width)
            slabs = -(-columns // 64)
            assert blocks * 16 * PANELS[width] >= rows
            assert (splits - 1) * part < slabs <= splits * part
            assert splits == 1 or blocks * splits <= product_cuda.BLOCKS


def test_the_rest_goes_to_triton() -> None:
    for args in (
        arguments(65, 8, 64, torch.float16),
        arguments(1, 8, 64, torch.float32),
        (CASES["f16_8"][0].bfloat16(), *CASES["f16_8"][1:]),
        (*CASES["f16_8"][:6], "csr", *CASES["f16_8"][7:]),
    ):
        assert product_cuda.spmm_cuda_plan(*args).startswith("Triton: ")
    assert product_cuda.spmm_cuda_plan(*CASES["f16_8"]) == "CUDA C++: bits, or 2:4, to the tensor cores"


def test_older_gpus_are_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse products of tensor cores came with compute capability 8.0."""
    for found, expected in (((7, 5), "compute capability 7.5, of at least 8.0"), ((8, 0), ""), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=found: found)
        assert product_cuda.too_old(torch.device("cuda")) == expected
    assert product_cuda.too_old(torch.device("cpu")) == ""
    monkeypatch.setattr(product_cuda, "too_old", lambda device: "compute capability 7.5, of at least 8.0")
    plan = product_cuda.spmm_cuda_plan(*CASES["f16_8"])
    assert plan.startswith("Triton: ") and plan.endswith("(compute capability 7.5, of at least 8.0)")


# --------------------------------------------------------------------------------------------- machine code


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_few_instructions_decode_a_weight(tmp_path: Path) -> None:
    """Of a slab of 64 columns, 32 weights a lane: at most 7.25 instructions each, everything counted."""
    import triton

    cubin = tmp_path / "out.cubin"
    command = ["nvcc", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", str(SOURCE), "-o", str(cubin)]
    subprocess.run(command, check=True)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run([str(tool), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\w+)\s*$", sass, flags=re.MULTILINE)
    for name, code in zip(parts[1::2], parts[2::2], strict=True):
        assert "LDL" not in code and "STL" not in code, name
        assert re.search(r"HMMA\.SP\.16832\.F32" if "_24_" in name else r"HMMA\.16816\.F32", code), name
        assert re.search(r"LDG\.E\.128", code), name
        if "bitmap" in name:
            loop = longest_loop(code)
            assert loop.count("LDS.U16") == 32, name
            if name.endswith("_8_kernel"):
                assert len(loop.splitlines()) <= 232, name


def longest_loop(code: str) -> str:
    """The instructions between the longest branch backwards and where it goes, a line each."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    jumps = [(int(at, 16), re.search(r"\bBRA\S*\s(?:.*, )?0x([0-9a-f]+)", text)) for at, text in lines]
    loops = [(int(to[1], 16), at) for at, to in jumps if to is not None and int(to[1], 16) < at]
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return "\n".join(text for at, text in lines if start <= int(at, 16) <= end)


# ---------------------------------------------------------------------------------------------------- on a GPU


def on_the_gpu(args: Args) -> Args:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)


def agrees(function: Any, args: Args, name: str) -> None:
    """The result on the GPU is right by the one rule, the references being computed on the CPU, and the same again."""
    on_device = on_the_gpu(args)
    y, again = function(*on_device), function(*on_device)
    assert torch.equal(y, again), f"{name} varies"
    of(y.cpu(), args, name, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_few_rows_on_a_gpu(name: str) -> None:
    pytest.importorskip("cupy")
    agrees(product_cuda.spmm_cuda, CASES[name], name)
    agrees(sparse.spmm, CASES[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.1, 0.5, "2:4"])
@pytest.mark.parametrize("samples", [1, 8, 16, 64])
def test_layers_of_real_size_on_a_gpu(samples: int, density: float | str) -> None:
    pytest.importorskip("cupy")
    args = arguments(samples, 4096, 11008, torch.bfloat16, density)
    agrees(product_cuda.spmm_cuda, args, f"{samples} rows, {density}")


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    """Once the layout is made nothing synchronises: else the capture fails."""
    pytest.importorskip("cupy")
    calls = [on_the_gpu(CASES[name]) for name in ("f16_8", "24_bf16_8", "bf16_32")]
    expected = [product_cuda.spmm_cuda(*args) for args in calls]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [product_cuda.spmm_cuda(*args) for args in calls]
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
