# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most: the speeds that every benchmark row is divided by, measured in the same run."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.bench import cuda_timing, machine

MIB = 1 << 20
#: Of the bandwidth table, in MiB: the smallest lies in a core's cache, the largest in memory. Those of a GPU are larger: 256 MiB
#: last it 60 microseconds.
LEAST_MIB, MOST_MIB = 0.25, {"cpu": 256, "cuda": 4096}
RANDOM_NUMBERS = (
    1 << 18
)  #: that a buffer consists of, again and again: to draw all of them would take longer than to time it
ROW = 4096  #: numbers in a row of the matrix that is read
DTYPES = (torch.float32, torch.bfloat16)
LONGEST_SECONDS = 2.0  #: of a multiplication that is worth trying


def best_seconds(call: Callable[[], Any], device: str, seconds: float) -> float:
    """The shortest of repeated calls: a ceiling is what the machine manages when nobody interferes."""
    if device == "cuda":
        return cuda_timing.best_seconds(call, seconds)
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def cold_bytes(device: str) -> int:
    """How much memory to rotate through so that the weights are in no cache."""
    if device == "cuda":
        return 4 * int(torch.cuda.get_device_properties(0).L2_cache_size)
    largest = max((machine.cache_bytes() or {}).values(), default=0)
    return max(128 * MIB, largest + largest // 4)


def sizes(device: str) -> list[float]:
    """Of the bandwidth table, in MiB: each twice the one before, up to one that lies in no cache."""
    found = [LEAST_MIB]
    while found[-1] < MOST_MIB[device] or found[-1] * MIB < cold_bytes(device):
        found.append(2 * found[-1])
    return found


def _readers(x: Tensor) -> list[Callable[[], Any]]:
    """Ways to read all of it and to write next to nothing. Which is the fastest hangs on the library and on the size."""
    matrix, first, second = x.view(-1, ROW), *x.chunk(2)
    return [
        x.sum,
        x.view(torch.int64).sum,
        functools.partial(torch.dot, first, second),
        functools.partial(torch.mv, matrix, torch.ones(ROW, device=x.device)),
    ]


def _bandwidth(device: str, seconds: float) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """GB/s of a copy, of reading and of a change in place, by the size of the memory that they touch.

    What is written where it was read needs not be fetched before, so that a change in place may move the most.
    """
    copy, read, change = {}, {}, {}
    for mib in sizes(device):
        numbers = int(mib * MIB) // 4
        x = torch.rand(min(numbers, RANDOM_NUMBERS), device=device).repeat(max(1, numbers // RANDOM_NUMBERS))
        touched, name = 4 * x.numel(), f"{mib:g}"
        source, target = x.chunk(2)
        copy[name] = touched / best_seconds(functools.partial(target.copy_, source), device, seconds) / 1e9
        readers = _readers(x)
        shortest = min(best_seconds(reader, device, seconds / len(readers)) for reader in readers)
        read[name] = touched / shortest / 1e9
        change[name] = 2 * touched / best_seconds(x.neg_, device, seconds) / 1e9
    return copy, read, change


def _gemm(dtype: torch.dtype, device: str, seconds: float) -> float:
    sizes = (512, 1024, 2048) if device == "cpu" else (4096, 8192)
    rates: list[float] = []
    for n in sizes:
        if rates and 2e-9 * n**3 / max(rates) > LONGEST_SECONDS:  # no library for this dtype here
            break
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates.append(2 * n**3 / best_seconds(functools.partial(torch.mm, a, b), device, seconds) / 1e9)
    return max(rates)


def _conv(dtype: torch.dtype, device: str, seconds: float) -> float:
    batch = 8 if device == "cpu" else 256
    x = torch.randn(batch, 256, 14, 14, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    return 2 * batch * 196 * w.numel() / best_seconds(lambda: F.conv2d(x, w, padding=1), device, seconds) / 1e9


def _int8(device: str, seconds: float) -> float:
    """Bytes times bytes as torch multiplies them fastest: by the library of its quantised layers, on a GPU by a GEMM."""
    rates = []
    for n in (512, 1024) if device == "cpu" else (4096, 8192):
        a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
        calls = [functools.partial(torch._int_mm, a, b.t())]
        if device == "cpu":
            scale, zero = torch.full((n,), 0.01, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                weight = torch._make_per_channel_quantized_tensor(b, scale, zero, 0)
            packed = torch.ops.quantized.linear_prepack(weight, None)
            calls.append(functools.partial(torch.ops.quantized.linear_dynamic, a.float(), packed, True))
        rates += [2 * n**3 / best_seconds(call, device, seconds) / 1e9 for call in calls]
    return max(rates)


def _fp8(seconds: float) -> float | None:
    """8-bit floats by the library's GEMM of scaled factors, on a GPU that has them (compute capability 8.9 and later)."""
    if torch.cuda.get_device_capability() < (8, 9):
        return None
    rates, one = [], torch.ones((), device="cuda")
    for n in (4096, 8192):
        a, b = (torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
        call = functools.partial(torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        rates.append(2 * n**3 / best_seconds(call, "cuda", seconds) / 1e9)
    return max(rates)


def measure(device: str, seconds: float = 0.1) -> dict[str, Any]:
    """Bandwidths by working set and arithmetic rates by dtype, each measured for about ``seconds``."""
    if device == "cuda":
        cuda_timing.warm_up()
    with torch.inference_mode():
        copy, read, change = _bandwidth(device, seconds)
        gemm = {str(d).removeprefix("torch."): _gemm(d, device, seconds) for d in DTYPES}
        gemm["int8"] = _int8(device, seconds)
        if device == "cuda" and (fp8 := _fp8(seconds)) is not None:
            gemm["float8_e4m3fn"] = fp8
        conv = {str(d).removeprefix("torch."): _conv(d, device, seconds) for d in DTYPES}
    return {"copy_gbs": copy, "read_gbs": read, "change_gbs": change, "gemm_gflops": gemm, "conv_gflops": conv}


def highest(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measurements of the same machine, speed by speed; of an older file ``a`` some may not be there.

    Bandwidths of an older file that were measured at other sizes do not count: they were measured in another way.
    """
    earlier = {kind: {} if kind.endswith("_gbs") and {*a[kind]} != {*b.get(kind, {})} else a[kind] for kind in a}
    return {kind: {k: max(earlier.get(kind, {}).get(k, 0.0), b[kind][k]) for k in b[kind]} for kind in b}


def bandwidth(ceilings: dict[str, Any], held: int, cold: bool = False) -> float:
    """GB/s that a call whose data take ``held`` bytes could reach; ``cold``: straight from memory.

    Between two sizes of the table it is the higher speed of both.
    """
    names = sorted(ceilings["copy_gbs"], key=float)
    above = next((i for i, name in enumerate(names) if held <= float(name) * MIB), None)
    near = names[-1:] if cold or above is None else names[max(above - 1, 0) : above + 1]
    return max(bandwidth_of(ceilings, name) for name in near)


def bandwidth_of(ceilings: dict[str, Any], size: str) -> float:
    """The best of what touched so many MiB; files from before ``change_gbs`` do without."""
    kinds = ("copy_gbs", "read_gbs", "change_gbs")
    return float(max(ceilings[kind].get(size, 0.0) for kind in kinds if kind in ceilings))


def arithmetic(ceilings: dict[str, Any], dtype: str) -> float:
    """GFLOP/s for a dtype: the best of GEMM and convolution; 16-bit and 8-bit work may be done in fp32 where that is faster."""
    rates = [
        table[d]
        for table in (ceilings["gemm_gflops"], ceilings["conv_gflops"])
        for d in {dtype, "float32"} & set(table)
    ]
    return float(max(rates))


def shortest_ms(
    ceilings: dict[str, Any], moved: int, flops: int, dtype: str, cold: bool = False, held: int | None = None
) -> float:
    """The roofline: no call that moves these bytes, in ``held`` bytes of memory, and does this arithmetic can take less."""
    rate = bandwidth(ceilings, moved if held is None else held, cold)
    return max(moved / rate, flops / arithmetic(ceilings, dtype)) / 1e6
