# SPDX-License-Identifier: Apache-2.0
"""``python -m cofire.gpu_check``: the same as ``cofire gpu-check``."""

import sys

from cofire.gpu_check.command import main

if __name__ == "__main__":
    sys.exit(main())
