# SPDX-License-Identifier: Apache-2.0
"""The benchmark cases of the family ``shift_add`` under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_shift_add(measurement: Any, measure: Callable[[Any], None]) -> None:
    measure(measurement)
