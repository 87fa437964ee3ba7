# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the kernels, as data.

``<device name>.json`` holds what ``cofire tune`` measured on that device, ``default.json`` the heuristics for every
other one. Both map a kernel to a list of ``{"key": sizes, "tile": launch options}``; the entry whose sizes are nearest
on a logarithmic scale serves. Looking up costs no measurement and no synchronisation.

Tuned files are looked for in the folder that the environment's ``COFIRE_TILES`` names, then here. One that is not what
it should be is left out, with a warning that says why.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
DEFAULT = "default.json"

Entry = dict[str, dict[str, int]]

#: Tiles that :mod:`cofire_kernels.configs.tune` is trying out, by kernel; empty otherwise.
forced: dict[str, dict[str, int]] = {}
asked: set[str] = set()  #: kernels that asked for a tile while there was one to try out


def tile(kernel: str, device: torch.device, **sizes: int) -> dict[str, Any]:
    """Launch options (block sizes, ``num_warps``, ``num_stages``) of ``kernel`` for these sizes on this device."""
    if forced and kernel in forced:
        asked.add(kernel)
        return forced[kernel]
    return _nearest(kernel, _device_name(device), tuple(sizes.items()))


def file_name(device_name: str) -> str:
    """``"NVIDIA H100 80GB HBM3"`` is tuned in ``NVIDIA_H100_80GB_HBM3.json``."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device_name) + ".json"


def folders() -> list[Path]:
    """Where tuned files are looked for, the first that has one."""
    chosen = os.environ.get("COFIRE_TILES")
    return [Path(chosen), FOLDER] if chosen else [FOLDER]


@functools.cache
def entries(name: str) -> dict[str, list[Entry]]:
    """The content of one file, empty where it does not exist or is not what it should be."""
    if name == DEFAULT:
        return read(FOLDER / DEFAULT)
    for folder in folders():
        if (folder / name).exists():
            try:
                return read(folder / name, entries(DEFAULT))
            except ValueError as error:
                warnings.warn(f"{error}; the shipped tiles serve", stacklevel=2)
                return {}
    return {}


def read(path: Path, shipped: dict[str, list[Entry]] | None = None) -> dict[str, list[Entry]]:
    """A file of tiles; with ``shipped``, one whose kernels, sizes and options are among those.

    Raises:
        ValueError: it is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"tiles: {path} is not JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"tiles: {path} must map kernels to lists of entries, got a {type(content).__name__}")
    for kernel, listed in content.items():
        if shipped is not None and kernel not in shipped:
            continue  # of another version of cofire
        fault = _fault(listed, None if shipped is None else shipped[kernel])
        if fault is not None:
            raise ValueError(f"tiles: {path}: {kernel} {fault}")
    return content


def _fault(listed: Any, shipped: list[Entry] | None) -> str | None:
    """What is wrong with the entries of one kernel, or None."""
    if not isinstance(listed, list) or not listed:
        return f"must have a list of entries, got {str(listed)[:60]}"
    for entry in listed:
        if not isinstance(entry, dict) or set(entry) != {"key", "tile"}:
            return f"must have entries of a key and a tile, got {str(entry)[:60]}"
        for name in ("key", "tile"):
            options = entry[name]
            if not isinstance(options, dict) or not all(type(v) is int and v >= 0 for v in options.values()):
                return f"must have a {name} of whole numbers, got {str(options)[:60]}"
            known = [set(e[name]) for e in shipped or ()]
            if known and set(options) not in known:
                return (
                    f"has a {name} of {', '.join(sorted(options)) or 'nothing'}, expected {', '.join(sorted(known[0]))}"
                )
    return None


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.lru_cache(maxsize=4096)
def _nearest(kernel: str, device_name: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
    candidates = entries(file_name(device_name)).get(kernel) or entries(DEFAULT)[kernel]

    def distance(entry: Entry) -> float:
        key = entry["key"]
        return sum(math.log2((size + 1) / (key[name] + 1)) ** 2 for name, size in sizes if name in key)

    return min(candidates, key=distance)["tile"]
