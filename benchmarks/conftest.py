# SPDX-License-Identifier: Apache-2.0
"""The cases of ``cofire.bench`` under pytest-benchmark: ``pytest benchmarks``, with its options and its tables.

``cofire bench`` is the suite whose numbers are kept: it pairs the providers and measures ceilings. This is for a look
at one of them, and for comparing two checkouts (``--benchmark-autosave``, ``--benchmark-compare``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cofire.bench import cases, harness


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="all cases, not only the quick ones")
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case, mode and provider of the family that the file is named after."""
    if "measurement" not in metafunc.fixturenames:
        return
    family = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
    chosen = [c for c in cases.of_family(family) if c.quick or metafunc.config.getoption("--all-cases")]
    device = metafunc.config.getoption("--device")
    found = [
        pytest.param((case, mode, provider, name), id=f"{case}-{mode}-{name}{f'-{variant}' if variant else ''}")
        for case in chosen
        for mode in case.modes
        for name, variants in harness.candidates(case, device, mode, None).items()
        for variant, provider in variants.items()
        if name != "compile" or metafunc.config.getoption("--all-cases")
    ]
    metafunc.parametrize("measurement", found)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Any], None]:
    """Check a provider on the case's input, then hand its call to pytest-benchmark."""

    def run(measurement: Any) -> None:
        case, mode, provider, name = measurement
        device = request.config.getoption("--device")
        given = harness.Input(case, device, tiny=mode == "overhead")
        wrong = given.check(provider, mode, harness.slack(name))
        assert wrong is None, f"{name} gets no number: {wrong}"
        benchmark.group = f"{case}, {mode}"
        with harness.mode_context(mode):
            call = given.runs(provider, mode)
            harness.read_ms(call, 2, device)
            benchmark(harness.read_ms, call, 1, device)

    return run
