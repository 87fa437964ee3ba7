# SPDX-License-Identifier: Apache-2.0
"""What every test needs before its first import, and the fixtures and markers that all tests share.

Markers: ``gpu`` needs a CUDA device and is skipped without one; ``full`` is the second tier (``-m "not full"`` is the
first). The number of threads is left as the machine has it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# Threads that wait without spinning: on a busy machine the tests are ten times faster. Read when OpenMP is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The library of matrix products of a GPU gives the same bits on every run only with a workspace of a fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it has to stand before the first import of triton: launchers then run on
    # CPU tensors. A GPU machine compiles its kernels instead.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _interpreter_reads_scalars() -> None:
    """Triton 3.6's interpreter reads a scalar by ``int()`` of an array of one, which NumPy refuses from 2.4 on."""
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError:
        return
    if not triton.__version__.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


if os.environ.get("TRITON_INTERPRET") == "1":
    _interpreter_reads_scalars()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_matmuls() -> Iterator[None]:
    """TF32 off: with it, the reference in fp32 would be wrong enough to excuse any kernel."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In operator tests, memory that nobody has written holds NaN (integers: their largest value, bool: True).

    ``torch.utils.deterministic.fill_uninitialized_memory`` (on by default) does it wherever ``at::empty`` is called, so
    also in C++ kernels and in Triton launchers, for outputs and scratch alike.
    """
    if "ops" not in request.path.parts:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(2).isnan().all(), "uninitialised memory is not filled"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small inputs: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
