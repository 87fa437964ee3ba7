# SPDX-License-Identifier: Apache-2.0
"""The benchmark cases of the family ``lowbit`` under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_lowbit(measurement: Any, measure: Callable[[Any], None]) -> None:
    measure(measurement)
