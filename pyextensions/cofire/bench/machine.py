# SPDX-License-Identifier: Apache-2.0
"""What a machine says about itself: instructions, caches, clock, limits. And on which of its cores a run stays."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SYSTEM = Path("/sys")
PROCESSES = Path("/proc")
#: Instructions that some kernel, of cofire, of torch or of a peer, is written for.
INSTRUCTIONS = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx512vbmi", "avx512_vpopcntdq"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "avx10_1", "avx10_2"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)


def _line(path: Path) -> str | None:
    """The first line of a file, or None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].strip()
    except OSError:
        return None


def instructions() -> list[str] | None:
    """Those of :data:`INSTRUCTIONS` that the CPU has; None where the system does not tell."""
    try:
        words = (PROCESSES / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", words, re.MULTILINE)
    if found is None:
        return None
    has = set(found.group(1).split())
    return [name for name in INSTRUCTIONS if name in has]


def caches() -> dict[str, str] | None:
    """Sizes of the first core's caches, by level: ``{"L1d": "32K", "L2": "1024K"}``."""
    found = {}
    for folder in sorted((SYSTEM / "devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_line(folder / name) for name in ("level", "type", "size"))
        if level and kind and size:
            found[f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind, '') }"] = size
    return found or None


def cache_bytes() -> dict[str, int] | None:
    """The same in bytes."""
    found = caches()
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    if found is None:
        return None
    return {name: int(size.rstrip("KMG")) * units.get(size[-1], 1) for name, size in found.items()}


def turbo() -> bool | None:
    """Whether the clock may rise above its base, where the system tells."""
    frequency = SYSTEM / "devices/system/cpu"
    off = _line(frequency / "intel_pstate/no_turbo")
    if off is not None:
        return off == "0"
    boost = _line(frequency / "cpufreq/boost")
    return None if boost is None else boost == "1"


def memory_limit() -> int | None:
    """Bytes that the container may use, or None where nothing limits it."""
    for name in ("cgroup/memory.max", "cgroup/memory/memory.limit_in_bytes"):
        limit = _line(SYSTEM / "fs" / name)
        if limit is not None and limit.isdigit() and int(limit) < 1 << 60:  # version 1 writes a huge number for none
            return int(limit)
    return None


def affinity() -> list[int] | None:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def facts() -> dict[str, Any]:
    """What of the machine may change a time. What it does not tell is None."""
    return {
        "affinity": affinity(),
        "instructions": instructions(),
        "caches": caches(),
        "governor": _line(SYSTEM / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "turbo": turbo(),
        "kernel": platform.release(),
        "memory_limit": memory_limit(),
    }


#: How the names of variables begin that change what a library does: threads, memory, kernels.
VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "COFIRE_", "MALLOC_", "LD_PRELOAD")


def stepping() -> dict[str, str] | None:
    """Which CPU it is, beside its name, as ``/proc/cpuinfo`` tells: family, model, stepping, microcode."""
    try:
        words = (PROCESSES / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    names = ("vendor_id", "cpu family", "model", "stepping", "microcode")
    found = {name: re.search(rf"^{name}[ \t]*:[ \t]*(.+)$", words, re.MULTILINE) for name in names}
    return {name: match.group(1).strip() for name, match in found.items() if match is not None} or None


def huge_pages() -> str | None:
    """Whether memory comes in large pages: ``always``, ``madvise`` or ``never``."""
    line = _line(SYSTEM / "kernel/mm/transparent_hugepage/enabled") or ""
    chosen = re.search(r"\[(\w+)\]", line)
    return chosen.group(1) if chosen is not None else None


def conditions() -> dict[str, Any]:
    """What each run notes down besides :func:`facts`; a time may depend on it, and no two machines need agree in it."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return {"stepping": stepping(), "huge_pages": huge_pages(), "freed_memory": _KEPT, "variables": variables}


# ----------------------------------------------------------------------------------------------------- memory

_KEPT: str | None = None  #: what becomes of memory that is freed; None: what the system does by itself


def keep_freed_memory() -> bool:
    """From now on this process keeps memory that its main thread frees, where it runs on glibc; gives whether.

    Blocks of up to 1 GiB, with an older glibc of up to 32 MiB.

    By itself glibc gives a large block back to the system or keeps it, as what lies beside it happens to be in use, and what
    was given back costs a page fault for each 4 KiB at the next call: the same call then takes up to twice as long. There
    is no way back to that.
    """
    global _KEPT
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        return False
    trim_threshold, mmap_threshold = -1, -3
    for most in (1 << 30, 1 << 25):
        if library.mallopt(mmap_threshold, most) and library.mallopt(trim_threshold, -1):  # -1: never
            _KEPT = f"kept by the process, blocks of up to {most >> 20} MiB"
            break
    return _KEPT is not None


def give_back_memory() -> None:
    """What :func:`keep_freed_memory` kept goes back to the system: when a case is over, the next may need it in one piece."""
    if _KEPT is not None:
        ctypes.CDLL(None).malloc_trim(0)


# ------------------------------------------------------------------------------------------------------ cores


def _physical(cores: Sequence[int]) -> list[int]:
    """The same cores, those first that share nothing with one before them."""
    seen: set[str] = set()
    first: list[int] = []
    rest: list[int] = []
    for core in cores:
        shared = _line(SYSTEM / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list") or str(core)
        (rest if shared in seen else first).append(core)
        seen.add(shared)
    return first + rest


def _tasks() -> list[int]:
    """The threads of this process."""
    return [int(path.name) for path in (PROCESSES / "self/task").glob("*")] or [0]


def _keep_to(cores: Sequence[int]) -> None:
    for task in _tasks():
        try:
            os.sched_setaffinity(task, cores)
        except ProcessLookupError:  # a thread that has just ended
            continue


@contextmanager
def settled(threads: int | None, pin: bool, announce: Callable[[str], Any]) -> Iterator[bool]:
    """Run with so many threads and, if asked, on so many cores, each thread free to use all of them; freed memory is kept.

    Threads are not tied one to a core: a library that starts threads of its own from a thread that is tied would run
    them all on that one core, and be slow for no fault of its own. Gives whether the cores are fixed.
    """
    keep_freed_memory()
    before, allowed = torch.get_num_threads(), affinity()
    if threads is not None:
        torch.set_num_threads(threads)
    count = torch.get_num_threads()
    if allowed is not None and count > len(allowed):
        announce(f"{count} threads share {len(allowed)} cores: expect times that spread")
    fixed = pin and allowed is not None
    try:
        if fixed and allowed is not None and count < len(allowed):
            _keep_to(_physical(allowed)[:count])
        yield fixed
    finally:
        if fixed and allowed is not None and count < len(allowed):
            _keep_to(allowed)
        torch.set_num_threads(before)
