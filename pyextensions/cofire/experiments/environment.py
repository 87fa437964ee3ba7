# SPDX-License-Identifier: Apache-2.0
"""What an experiment ran on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from cofire.experiments.files import Results
from cofire.version import __version__


def environment() -> Results:
    """Machine and versions, for the results file."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cofire": __version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
