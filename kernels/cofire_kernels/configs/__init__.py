# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the kernels, as data.

``<device name>.json`` holds what ``cofire tune`` measured on that device, ``default.json`` the heuristics for every
other one. Both map a kernel to a list of ``{"key": sizes, "tile": launch options}``; the entry whose sizes are nearest
on a logarithmic scale serves. Looking up costs no measurement and no synchronisation.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent

Entry = dict[str, dict[str, int]]

#: Tiles that :mod:`cofire_kernels.configs.tune` is trying out, by kernel; empty otherwise.
forced: dict[str, dict[str, int]] = {}


def tile(kernel: str, device: torch.device, **sizes: int) -> dict[str, Any]:
    """Launch options (block sizes, ``num_warps``, ``num_stages``) of ``kernel`` for these sizes on this device."""
    if forced and kernel in forced:
        return forced[kernel]
    return _nearest(kernel, _device_name(device), tuple(sizes.items()))


def file_name(device_name: str) -> str:
    """``"NVIDIA H100 80GB HBM3"`` is tuned in ``NVIDIA_H100_80GB_HBM3.json``."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device_name) + ".json"


@functools.cache
def entries(name: str) -> dict[str, list[Entry]]:
    """The content of one file, empty where it does not exist."""
    path = FOLDER / name
    content: dict[str, list[Entry]] = json.loads(path.read_text()) if path.exists() else {}
    return content


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.lru_cache(maxsize=4096)
def _nearest(kernel: str, device_name: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
    candidates = entries(file_name(device_name)).get(kernel) or entries("default.json")[kernel]

    def distance(entry: Entry) -> float:
        key = entry["key"]
        return sum(math.log2((size + 1) / (key[name] + 1)) ** 2 for name, size in sizes if name in key)

    return min(candidates, key=distance)["tile"]
