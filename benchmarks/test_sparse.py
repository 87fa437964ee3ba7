# SPDX-License-Identifier: Apache-2.0
"""The benchmark cases of the family ``sparse`` under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_sparse(measurement: Any, measure: Callable[[Any], None]) -> None:
    measure(measurement)
