# SPDX-License-Identifier: Apache-2.0
"""cofire: fast kernels for efficient deep learning on PyTorch, and the training methods that stand on them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from cofire import native, ops  # the C++ kernels, and the operators that they attach themselves to
except ValueError as error:  # a switch in the environment has no such value
    if Path(sys.argv[0] if sys.argv else "").stem != "cofire":
        raise
    print(f"cofire: {error}", file=sys.stderr)  # who types the command needs no traceback
    sys.exit(2)

from cofire.info import explain, info
from cofire.version import __version__

if TYPE_CHECKING:
    from cofire.nn import quantize_

__all__ = ["__version__", "explain", "info", "native", "ops", "quantize_"]


def __getattr__(name: str) -> Any:
    """``quantize_``, with the layers that it needs, is imported when it is asked for: importing cofire stays cheap."""
    if name != "quantize_":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cofire.nn import quantize_

    globals()[name] = quantize_
    return quantize_


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
