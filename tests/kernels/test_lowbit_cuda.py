# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ of the products with four bits, run on the CPU: threads for threads, models for instructions.

What only a GPU can show (that the instructions are what the models say, races between warps) is left to ``-m gpu``.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from cofire.ops import pack_bits
from cofire.registry import OPERATORS
from cofire_kernels import lowbit, nvrtc
from cofire_kernels.lowbit import product_cuda
from helpers import Args, Case, Context, check_values

GPP = shutil.which("g++")
HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "csrc" / "cuda" / "lowbit.cu"


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
        assert stem == "lowbit"
        launched.append(name)
        pointers = (ctypes.c_void_p * 9)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in args[:9]))
        numbers = (ctypes.c_longlong * 6)(*args[9:])
        library.emulate(ctypes.cast(getattr(library, name), ctypes.c_void_p), blocks, threads, pointers, numbers)

    monkeypatch.setattr(nvrtc, "launch", launch)
    return launched


def arguments(
    samples: int, rows: int, columns: int, group: int, dtype: torch.dtype, activations: str = "exact", table: bool = False,
    zero: str = "", offset: bool = False, bias: bool = True,
) -> Args:  # fmt: skip
    groups = columns // group
    codes = pack_bits(torch.randint(0, 16, (rows, columns), dtype=torch.uint8), 4)
    zeros = {
        "": None,
        "one": torch.full((1, 1), 8.0),
        "bytes": torch.randint(0, 16, (rows, groups), dtype=torch.uint8),
        "floats": torch.rand(rows, groups) * 15,
    }[zero]
    return (
        torch.randn(samples, columns).to(dtype),
        codes,
        torch.rand(rows, groups) + 0.1,
        zeros,
        torch.randn(rows, groups) if offset else None,
        torch.randint(-128, 128, (1, 16), dtype=torch.int8) if table else None,
        torch.randn(rows).to(dtype) if bias else None,
        4,
        group,
        activations,
    )


CASES = {
    "f16": arguments(3, 40, 256, 128, torch.float16, zero="bytes"),
    "f16_64": arguments(8, 33, 192, 64, torch.float16, zero="one"),
    "f16_32": arguments(1, 16, 96, 32, torch.float16, zero="floats", offset=True),
    "bf16": arguments(5, 64, 1280, 256, torch.bfloat16, zero="one", bias=False),
    "bf16_row": arguments(2, 7, 384, 384, torch.bfloat16),
    "bf16_32": arguments(8, 31, 160, 32, torch.bfloat16, zero="floats"),
    "s8": arguments(4, 40, 512, 128, torch.float32, "int8", zero="bytes", offset=True),
    "s8_64": arguments(8, 33, 192, 192, torch.bfloat16, "int8", zero="one"),
    "s8_32": arguments(1, 32, 96, 96, torch.float32, "int8"),
    "table": arguments(7, 35, 256, 256, torch.float32, "int8", table=True),
    "table_64": arguments(2, 17, 320, 64, torch.bfloat16, "int8", table=True, bias=False),
    "table_32": arguments(3, 32, 224, 32, torch.float16, "int8", table=True, zero="one"),
}


@pytest.mark.parametrize("name", CASES)
def test_few_rows(name: str, emulated: list[str]) -> None:
    args = CASES[name]
    y = product_cuda.qlinear_cuda(*args)
    kind = name.split("_")[0]
    assert [k.split("_")[1] for k in emulated] == [kind]
    case = Case(OPERATORS["qlinear"], (), (), (), {"output 0": 16}, None)
    check_values(Context(case, "emulated", name), args, (y,))
    assert torch.equal(y, product_cuda.qlinear_cuda(*args)), "it varies"


def test_integers_are_exact(emulated: list[str]) -> None:
    """With scales of powers of two everything is an integer: the reference in fp64 to the last bit."""
    for table in (False, True):
        args = list(arguments(8, 33, 256, 64, torch.float32, "int8", table, "" if table else "bytes", bias=False))
        args[0] = torch.randint(-127, 128, (8, 256)).float()
        args[0][:, 0] = 127
        args[2] = torch.exp2(torch.randint(-1, 2, args[2].shape).float())
        expected = OPERATORS["qlinear"].reference(args[0].double(), *args[1:])
        assert torch.equal(product_cuda.qlinear_cuda(*args).double(), expected)


def test_every_code_in_every_place(emulated: list[str]) -> None:
    """One activation at a time picks one column of the weight."""
    codes = (torch.arange(32)[:, None] + torch.arange(128)[None, :]) % 16
    packed, scale = pack_bits(codes.to(torch.uint8), 4), torch.ones(32, 1)
    table = (torch.arange(16) * 17 - 128).to(torch.int8)[None]
    for start in range(0, 128, 8):
        x = torch.zeros(8, 128)
        x[torch.arange(8), start + torch.arange(8)] = 127
        for dtype, activations, lut in (
            (torch.float16, "exact", None), (torch.bfloat16, "exact", None), (torch.float32, "int8", None),
            (torch.float32, "int8", table),
        ):  # fmt: skip
            y = product_cuda.qlinear_cuda(x.to(dtype), packed, scale, None, None, lut, None, 4, 128, activations)
            v = codes if lut is None else table[0][codes].long()
            assert torch.equal(y.float() / 127, v[:, start : start + 8].t().float().to(dtype).float()) or torch.equal(
                y, (127 * v[:, start : start + 8].t()).to(dtype)
            )


@pytest.mark.parametrize(
    "args",
    [
        arguments(9, 8, 64, 32, torch.float16),
        arguments(1, 8, 64, 32, torch.float32),
        arguments(1, 8, 48, 16, torch.float16),
        (*arguments(1, 8, 64, 32, torch.float16)[:5], torch.randn(1, 16), None, 4, 32, "exact"),
    ],
)
def test_the_rest_goes_to_triton(args: Args) -> None:
    assert product_cuda.qlinear_cuda_plan(*args).startswith("Triton: ")
    assert product_cuda.qlinear_cuda_plan(*CASES["f16"]) == "CUDA C++ on the tensor cores"


# ---------------------------------------------------------------------------------------------------- on a GPU


def on_the_gpu(args: Args) -> Args:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)


def agrees(function: Any, args: Args, name: str) -> Tensor:
    """The result on the GPU is right by the one rule, the references being computed on the CPU, and the same again."""
    on_device = on_the_gpu(args)
    y, again = function(*on_device), function(*on_device)
    assert torch.equal(y, again), f"{name} varies"
    check_values(
        Context(Case(OPERATORS["qlinear"], (), (), (), {"output 0": 16}, None), "cuda", name), args, (y.cpu(),)
    )
    return y


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_few_rows_on_a_gpu(name: str) -> None:
    pytest.importorskip("cupy")
    agrees(product_cuda.qlinear_cuda, CASES[name], name)
    agrees(lowbit.qlinear, CASES[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [1, 4, 8, 64, 130, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_layers_of_real_size_on_a_gpu(samples: int, dtype: torch.dtype, activations: str) -> None:
    """The tiles as shipped, with all their stages and splits."""
    args = arguments(samples, 4096, 4096, 128, dtype, activations, zero="bytes")
    agrees(lowbit.qlinear, args, f"{samples} rows")
    if samples <= product_cuda.MOST_ROWS and dtype != torch.float32:
        pytest.importorskip("cupy")
        agrees(product_cuda.qlinear_cuda, args, f"{samples} rows")


@pytest.mark.gpu
@pytest.mark.parametrize("width", range(1, 9))
def test_every_width_on_a_gpu(width: int) -> None:
    codes = pack_bits(torch.randint(0, 1 << width, (1000, 4096), dtype=torch.uint8), width)
    w = (codes, torch.rand(1000, 32) / (1 << width), torch.full((1, 1), float(1 << width >> 1)), None, None)
    found = lowbit.dequantize(*on_the_gpu(w), width, 128, 4096)
    assert torch.equal(found.cpu(), OPERATORS["dequantize"].reference(*w, width, 128, 4096))
    for samples in (1, 3, 16, 100):
        x = torch.randn(samples, 4096).bfloat16()
        agrees(lowbit.qlinear, (x, *w, None, width, 128, "exact"), f"{width} bits, {samples} rows")
    grad = torch.randn(100, 1000).bfloat16()
    args = (grad, None, *w, width, 128, 4096, "exact", True)
    dx = lowbit.qlinear_backward(*on_the_gpu(args))
    case = Case(OPERATORS["qlinear_backward"], (), (), (), {"input_grad": 16}, None)
    check_values(Context(case, "cuda", f"{width} bits"), args, tuple(t.cpu() for t in dx))


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    """Nothing synchronises, whatever way a call takes: else the capture fails."""
    calls = [
        on_the_gpu(arguments(samples, 256, 512, group, torch.bfloat16, activations, zero="bytes"))
        for samples in (1, 8, 100, 600)
        for group in (128, 4)
        for activations in ("exact", "int8")
    ]
    expected = [lowbit.qlinear(*args) for args in calls]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [lowbit.qlinear(*args) for args in calls]
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
