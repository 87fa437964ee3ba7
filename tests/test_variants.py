# SPDX-License-Identifier: Apache-2.0
"""The operator tests once more: with every CPU variant that runs here, and with no kernel at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cofire import native

ROOT = Path(__file__).resolve().parents[1]
LOADED = native.STATUS.variant
OTHERS = [v for v in native.VARIANTS if v != LOADED]


#: What does not depend on the setting: launchers and the compiler, and fp64, which always runs the reference.
UNAFFECTED = ("triton", "compile", "gradcheck")


def run_operator_tests(*unaffected: str, **environment: str) -> None:
    """Without what does not depend on the setting, or on what it changes."""
    selection = f"not ({' or '.join((*UNAFFECTED, *unaffected))})"
    command = [sys.executable, "-m", "pytest", "tests/ops", "-q", "-m", "not full and not gpu", "-k", selection]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.full
@pytest.mark.parametrize("variant", OTHERS)
def test_other_variant(variant: str) -> None:
    built = (native.STATUS.build or {}).get("variants", ())
    if LOADED is None or variant not in built or native.VARIANTS.index(variant) > native.VARIANTS.index(LOADED):
        pytest.skip(f"this CPU or this build has no {variant}")
    # another instruction set is another build of the same sources: schemas, formulas and refusals stay
    run_operator_tests("opcheck", "counts", "autocast", "fake", COFIRE_CPU=variant)


@pytest.mark.full
def test_nothing_compiled() -> None:
    run_operator_tests(COFIRE_BACKEND="reference")
