# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ kernels compiled at run time by NVRTC, through CuPy."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def source(stem: str) -> str:
    """The text of ``<stem>.cu``: package data in an installed package, ``csrc/cuda`` in a checkout."""
    here = Path(__file__).resolve()
    places = (here.parent / "cuda", here.parents[2] / "csrc" / "cuda")
    for place in places:
        if (place / f"{stem}.cu").exists():
            return (place / f"{stem}.cu").read_text()
    raise FileNotFoundError(f"the CUDA source {stem}.cu is in neither {places[0]} nor {places[1]}: reinstall cofire")


@functools.cache
def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ImportError("the CUDA C++ kernels need CuPy: pip install 'cofire[cuda]'") from error
    return cupy


@functools.cache
def _kernel(stem: str, name: str, device: int) -> Any:
    cupy = _cupy()
    with cupy.cuda.Device(device):
        return cupy.RawModule(code=source(stem), options=("--std=c++17",)).get_function(name)


def launch(stem: str, name: str, blocks: int, threads: int, args: Sequence[Tensor | int]) -> None:
    """Start a kernel on torch's current stream of the device of the first tensor. Integers arrive as ``long long``."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type != "cuda":
        raise ValueError(f"{name}: the CUDA C++ kernel needs tensors on a GPU, got {device}")
    cupy, index = _cupy(), device.index
    values = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in args)
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device_id=index)
    with cupy.cuda.Device(index), stream:
        _kernel(stem, name, index)((blocks,), (threads,), values)
