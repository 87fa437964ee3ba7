# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels run on torch's threads. No test here looks at a clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cofire import native, ops
from helpers import threads

compiled = pytest.mark.skipif(native.STATUS.variant is None, reason=f"no compiled kernels: {native.STATUS.reason}")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


RUNTIMES = """
import os, re, torch, cofire
from cofire import ops
ops.compact(torch.ones(2048, 4096, dtype=torch.bool))
maps = open("/proc/self/maps", encoding="utf-8").read()
assert f"_cpu_{cofire.native.STATUS.variant}." in maps
found = {os.path.realpath(path) for path in re.findall(r"/\\S*/(?:libgomp|libiomp5|libomp)[^/\\s]*\\.so\\S*", maps)}
assert len(found) == 1, found
"""


@compiled
@linux
def test_there_is_one_openmp_runtime() -> None:
    """Two would mean two pools of threads: each kernel would fight torch for the cores.

    In a process of its own: other packages that tests import (scikit-learn) bring a runtime for themselves.
    """
    done = subprocess.run([sys.executable, "-c", RUNTIMES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def threads_used() -> list[int]:
    """For each of ten runs of kernel calls, how many threads of this process the scheduler gave a core to.

    The kernel books a running thread's time at its timer ticks, up to 10 ms apart: one call may fall between two.
    """

    def time_slices() -> dict[str, int]:
        return {
            task.name: int((task / "schedstat").read_text().split()[0]) for task in Path("/proc/self/task").iterdir()
        }

    mask = torch.ones(2048, 4096, dtype=torch.bool)  # 8 MiB, all rows alike: enough to share
    ops.compact(mask)
    used = []
    for _ in range(10):
        before = time_slices()
        for _ in range(64):
            ops.compact(mask)
        used.append(sum(spent > before.get(task, 0) for task, spent in time_slices().items()))
    return used


@compiled
@linux
def test_kernels_use_several_threads() -> None:
    """Without -fopenmp at the link, at::parallel_for is silently serial."""
    with threads(2):
        assert max(threads_used()) >= 2


@compiled
@linux
def test_the_number_of_threads_is_honoured() -> None:
    with threads(1):
        assert min(threads_used()) == 1  # in some runs a thread of the pool may still be waking from earlier work


@compiled
def test_kernels_leave_the_number_of_threads_alone() -> None:
    with threads(3):
        ops.compact(torch.ones(64, 64, dtype=torch.bool))
        assert torch.get_num_threads() == 3
