# SPDX-License-Identifier: Apache-2.0
"""Measures the tiles of ``default.json`` on the GPU at hand and writes the best ones for its device name."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from cofire_kernels import configs


def tune(kernels: Iterable[str] | None = None, dtype: torch.dtype = torch.bfloat16, path: Path | None = None) -> Path:
    """Time every shipped tile of each kernel at each shipped size; keep the fastest per size.

    Args:
        kernels: names in ``default.json``; all of them by default. Other kernels' entries in the file stay.
        dtype: of the inputs. Kernels whose entries name an element size are timed in the float type of that size.
        path: the file to write; by default the one that :func:`cofire_kernels.configs.tile` reads for this device.

    Returns:
        The file written.

    Raises:
        RuntimeError: there is no GPU.
        ValueError: an unknown kernel.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune: measuring tiles needs a GPU, and torch sees none")
    shipped = configs.entries("default.json")
    chosen = list(shipped if kernels is None else kernels)
    for name in chosen:
        if name not in shipped:
            raise ValueError(f"tune: kernels must be among {', '.join(shipped)}, got {name!r}")
    device = torch.device("cuda", torch.cuda.current_device())
    path = path or configs.FOLDER / configs.file_name(torch.cuda.get_device_name(device))
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in chosen:
        result[name] = [_best(name, entry["key"], dtype, device) for entry in shipped[name]]
    _replace(path, json.dumps(result, indent=1) + "\n")
    configs.entries.cache_clear()
    configs._nearest.cache_clear()
    return path


def _best(name: str, key: dict[str, int], dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, int]]:
    from triton.testing import do_bench

    from cofire_kernels.cases import CASES, Make

    if key.get("element_size", dtype.itemsize) != dtype.itemsize:
        dtype = torch.float32 if key["element_size"] == 4 else torch.bfloat16
    call = CASES[name](Make(dtype, device), key)[0]
    times: list[tuple[float, dict[str, int]]] = []
    for entry in configs.entries("default.json")[name]:
        if entry["key"].get("element_size") != key.get("element_size"):
            continue  # made for another width: it may not fit
        configs.forced[name] = entry["tile"]
        try:
            times.append((do_bench(call, return_mode="median"), entry["tile"]))
        finally:
            del configs.forced[name]
    return {"key": key, "tile": min(times, key=lambda timed: timed[0])[1]}


def _replace(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)
