# SPDX-License-Identifier: Apache-2.0
"""Measures the tiles of ``default.json`` on the GPU at hand and writes the best ones for its device name."""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from cofire_kernels import configs

Call = Callable[[], object]
#: What users run most, first: the time may not suffice for all.
WANTED = ("qlinear", "gated", "masked", "spmm", "attention", "binary", "kv_fuse", "dkm")


def names() -> list[str]:
    """The kernels of ``default.json``, the most wanted first."""

    def rank(name: str) -> int:
        return next((i for i, start in enumerate(WANTED) if name.startswith(start)), len(WANTED))

    return sorted(configs.entries(configs.DEFAULT), key=rank)


def file(folder: Path | None = None) -> Path:
    """The file of the GPU at hand, in ``folder`` or where :func:`cofire_kernels.configs.tile` looks first."""
    device = torch.device("cuda", torch.cuda.current_device())
    return (folder or configs.folders()[0]) / configs.file_name(torch.cuda.get_device_name(device))


def tune(
    kernels: Iterable[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    path: Path | None = None,
    seconds: float | None = None,
) -> Path:
    """Time every shipped tile of each kernel at each shipped size; keep the fastest per size.

    The file is written after every kernel. A tile that does not fit this GPU is left out.

    Args:
        kernels: names in ``default.json``; all of them by default. Other kernels' entries in the file stay.
        dtype: of the inputs. Kernels whose entries name an element size are timed in the float type of that size.
        path: the file to write; by default the one that :func:`cofire_kernels.configs.tile` reads for this device.
        seconds: for each kernel; a size whose turn comes later keeps its shipped tile. Default: no limit.

    Returns:
        The file written.

    Raises:
        RuntimeError: there is no GPU, or none of the tiles of the only kernel asked for runs on it (of several, a warning).
        ValueError: an unknown kernel, or the file there is no file of tiles.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune: measuring tiles needs a GPU, and torch sees none")
    shipped = configs.entries(configs.DEFAULT)
    chosen = names() if kernels is None else list(kernels)
    for name in chosen:
        if name not in shipped:
            raise ValueError(f"tune: kernels must be among {', '.join(shipped)}, got {name!r}")
    device = torch.device("cuda", torch.cuda.current_device())
    path = path or file()
    result: dict[str, Any] = configs.read(path, shipped) if path.exists() else {}
    for name in chosen:
        try:
            result[name] = best(name, dtype, device, seconds)
        except RuntimeError as error:
            if len(chosen) == 1:
                raise
            warnings.warn(f"{error}; the other kernels go on", stacklevel=2)
            continue
        _replace(path, json.dumps(result, indent=1) + "\n")
        configs.entries.cache_clear()
        configs._nearest.cache_clear()
    return path


def best(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float | None = None,
    measure: Callable[[Call], float] | None = None,
) -> list[dict[str, dict[str, int]]]:
    """The fastest tile of a kernel at each of its sizes."""
    measure = measure or _milliseconds
    end = None if seconds is None else time.monotonic() + seconds
    found: list[dict[str, dict[str, int]]] = []
    for entry in configs.entries(configs.DEFAULT)[name]:
        late = end is not None and time.monotonic() >= end
        found.append(dict(entry) if late else _best(name, entry["key"], dtype, device, measure))
    return found


def _milliseconds(call: Call) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=25, return_mode="median"))


def _best(
    name: str, key: dict[str, int], dtype: torch.dtype, device: torch.device, measure: Callable[[Call], float]
) -> dict[str, dict[str, int]]:
    candidates = [
        entry["tile"]
        for entry in configs.entries(configs.DEFAULT)[name]
        if entry["key"].get("element_size") == key.get("element_size")  # others may not fit
    ]
    call = call_for(name, key, dtype, device)
    times: list[tuple[float, dict[str, int]]] = []
    fault = ""
    for tile in [t for i, t in enumerate(candidates) if t not in candidates[:i]]:
        configs.forced[name] = tile
        try:
            times.append((measure(call), tile))
        except Exception as error:  # too much shared memory for this GPU, say: the other tiles go on
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises where no later launch can succeed
            fault = f"{type(error).__name__}: {error}"
        finally:
            del configs.forced[name]
    if not times:
        raise RuntimeError(f"tune: no tile of {name} runs at {key} ({fault})")
    return {"key": key, "tile": min(times, key=lambda timed: timed[0])[1]}


def call_for(name: str, key: dict[str, int], dtype: torch.dtype, device: torch.device) -> Call:
    """The first of the kernel's calls that asks for its tile: a launcher may take another way.

    Raises:
        RuntimeError: none of them does.
    """
    from cofire_kernels.cases import CASES, Make

    if key.get("element_size", dtype.itemsize) != dtype.itemsize:
        dtype = torch.float32 if key["element_size"] == 4 else torch.bfloat16
    shipped = next(e["tile"] for e in configs.entries(configs.DEFAULT)[name] if e["key"] == key)
    fault = ""
    for call in CASES[name](Make(dtype, device), key):
        configs.asked.discard(name)
        configs.forced[name] = shipped
        try:
            call()
        except Exception as error:  # the tiles are tried one by one later on
            fault = f" ({type(error).__name__}: {error})"
        finally:
            del configs.forced[name]
        if name in configs.asked:
            return call
    raise RuntimeError(f"tune: no call in cofire_kernels/cases.py asks for a tile of {name} at {key}{fault}")


def _replace(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)
