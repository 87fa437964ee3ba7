# SPDX-License-Identifier: Apache-2.0
"""The benchmark cases of the family ``kv_fusion`` under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_kv_fusion(measurement: Any, measure: Callable[[Any], None]) -> None:
    measure(measurement)
