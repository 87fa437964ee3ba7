# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the one compiled CPU library that fits this machine.

The kernels of ``csrc/cpu`` are compiled once per instruction set, into ``cofire._cpu_default``, ``_cpu_avx2`` and
``_cpu_avx512``. Importing one of them attaches its kernels to the operators; importing a second would attach them
twice, so exactly one is loaded. Without any, the operators run their references.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cofire.registry import REFERENCE_ONLY

#: From the least to the most demanding; ``COFIRE_CPU`` names one of them.
VARIANTS = ("default", "avx2", "avx512")


@dataclass(frozen=True)
class Status:
    """What was loaded, or why nothing was."""

    variant: str | None
    reason: str
    build: dict[str, Any] = field(default_factory=dict)
    features: tuple[str, ...] = ()


def _supported() -> str:
    """The best variant for this CPU, by PyTorch's own choice of instruction set."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in VARIANTS else "default"


def _wanted() -> tuple[str, ...]:
    """The variants to try, best first."""
    best = VARIANTS.index(_supported())
    chosen = os.environ.get("COFIRE_CPU", "").lower()
    if not chosen:
        return VARIANTS[best::-1]
    if chosen not in VARIANTS:
        raise ValueError(f"COFIRE_CPU must be one of {', '.join(VARIANTS)}, got {chosen!r}")
    if VARIANTS.index(chosen) > best:
        raise ValueError(
            f"COFIRE_CPU={chosen} needs a CPU with {chosen.upper()}; this one has {VARIANTS[best].upper()}"
        )
    return (chosen,)


def _same_release(built: str, found: str) -> bool:
    return built.split("+")[0].split(".")[:2] == found.split("+")[0].split(".")[:2]


def load() -> Status:
    """Load the library that fits; on failure say why once, and leave the references in charge."""
    if REFERENCE_ONLY:
        return Status(None, "COFIRE_BACKEND=reference")
    wanted = _wanted()
    if importlib.util.find_spec("cofire._host") is None:
        return Status(None, "installed without compiled kernels")
    host = importlib.import_module("cofire._host")
    build, features = dict(host.build()), tuple(host.cpu_features())
    if not _same_release(build["torch"], torch.__version__):
        reason = f"built for torch {build['torch']}, you have torch {torch.__version__}"
        return _failed(reason, build, features, " Rebuild it with this torch.")
    for variant in wanted:
        if importlib.util.find_spec(f"cofire._cpu_{variant}") is None:
            continue
        try:
            importlib.import_module(f"cofire._cpu_{variant}")
        except ImportError as error:
            return _failed(f"cofire._cpu_{variant} does not load: {error}", build, features)
        best = f"best of the variants built ({', '.join(build['variants'])}) for this CPU"
        chosen = f"chosen by COFIRE_CPU={variant}" if os.environ.get("COFIRE_CPU") else best
        return Status(variant, chosen, build, features)
    return _failed(f"built for {', '.join(build['variants'])}, you have {wanted[0]}", build, features)


def caller(operator: str) -> Callable[..., Any] | None:
    """A function that calls an operator by a shorter way than torch.ops, where the compiled part has one: ``csrc/call.cpp``."""
    if STATUS.variant is None or importlib.util.find_spec("cofire._call") is None:
        return None
    found: Callable[..., Any] | None = importlib.import_module("cofire._call").caller(operator)
    return found


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU multiplies on tiles (AMX), and the system lets it: asked of torch, as the C++ kernels do."""
    asks = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_init_amx")]
    return all(ask is not None and ask() for ask in asks)


def in_large_pages(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of a CPU tensor in memory of pages of 2 MB, where the system has some; of others themselves.

    For large tensors that kernels read front to back, again and again: they spend fewer waits on addresses.
    """
    if STATUS.variant is None or x.device.type != "cpu" or x.numel() * x.element_size() < 1 << 22:
        return x
    copy = torch.empty_like(x, memory_format=torch.contiguous_format)
    host, place = importlib.import_module("cofire._host"), (copy.data_ptr(), copy.numel() * copy.element_size())
    host.ask_for_large_pages(*place)
    copy.copy_(x)
    host.gather_in_large_pages(*place)
    return copy


def _failed(reason: str, build: dict[str, Any], features: tuple[str, ...], advice: str = "") -> Status:
    warnings.warn(f"cofire runs without its C++ kernels: {reason}.{advice}", stacklevel=3)
    return Status(None, reason, build, features)


STATUS = load()
