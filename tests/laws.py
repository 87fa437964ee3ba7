# SPDX-License-Identifier: Apache-2.0
"""Hypothesis where it is installed; where it is not, the laws are skipped and the other tests of the file run."""

from __future__ import annotations

from typing import Any

import pytest

try:
    from hypothesis import assume, given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Anything:
        """What strategies are made of, to a test that will not run."""

        def __getattr__(self, name: str) -> _Anything:
            return self

        def __call__(self, *_: Any, **__: Any) -> _Anything:
            return self

    def given(*_: Any, **__: Any) -> Any:
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(*_: Any, **__: Any) -> Any:
        return lambda function: function

    assume = st = _Anything()

__all__ = ["assume", "given", "settings", "st"]
