# SPDX-License-Identifier: Apache-2.0
"""cofire: fast kernels for efficient deep learning on PyTorch, and the training methods that stand on them."""

from cofire import native, ops  # the C++ kernels, and the operators that they attach themselves to
from cofire.info import explain, info
from cofire.version import __version__

__all__ = ["__version__", "explain", "info", "native", "ops"]
