# SPDX-License-Identifier: Apache-2.0
"""``cofire gpu-check``: everything that needs an NVIDIA GPU, in parts that are bounded in time and can be resumed.

``plan.py`` says what there is to do, ``runner.py`` does it within a time, ``steps.py`` is what its processes run,
``recorder.py`` notes test by test, ``journal.py`` keeps what is known, ``summary.py`` says it. It works without typer and
rich, as ``python -m cofire.gpu_check``.
"""

from cofire.gpu_check.command import check, main
from cofire.gpu_check.plan import PARTS

__all__ = ["PARTS", "check", "main"]
