# SPDX-License-Identifier: Apache-2.0
"""``cofire tune``: find the best kernel configurations for this device."""

from __future__ import annotations

import importlib

import torch

from cofire import native
from cofire.nn.compressed import table


def _shipped(variant: str | None) -> str:
    """Where the numbers come from by which layers choose their kernels on a CPU."""
    if variant is None:
        return "cofire tune: nothing to do on a CPU without C++ kernels."
    source = table()["source"].get(variant, "not known")
    return (
        f"cofire tune: nothing to do on a CPU; the dispatch table of sparse layers is shipped. For {variant}: {source}. "
        f"{table()['note']}."
    )


def tune(device: str = "cuda") -> str:
    """Time the shipped tile candidates on this GPU and keep the best where the launchers look for them.

    Args:
        device: ``"cuda"`` or ``"cpu"``.

    Returns:
        What was done, in a sentence.

    Raises:
        ValueError: another device, or ``"cuda"`` without a GPU.
    """
    if device == "cpu":
        return _shipped(native.STATUS.variant)
    if device != "cuda":
        raise ValueError(f"tune: device must be cpu or cuda, got {device!r}")
    if not torch.cuda.is_available():
        raise ValueError("tune: device cuda needs an NVIDIA GPU that torch can see, and there is none")
    path = importlib.import_module("cofire_kernels.configs.tune").tune()
    return f"cofire tune: wrote {path}"
