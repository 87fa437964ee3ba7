# SPDX-License-Identifier: Apache-2.0
"""What every launcher owes a GPU, on the small inputs of the benchmarks: no waiting for the host, and the current stream."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from cofire.bench.cases import Case, families, of_family
from cofire.bench.harness import Input
from cofire.registry import OPERATORS, Kernel, tensors_of

#: They refuse NaN, and masks that are too full, before anything is written: the host has to ask.
ASK = ("keep_mask", "prune_and_grow_")
LAUNCHED = sorted(name for name, o in OPERATORS.items() if isinstance(o.triton, Kernel))


@functools.cache
def cases() -> dict[str, Case]:
    """One case for each operator that has some."""
    return {case.op: case for family in reversed(families()) for case in reversed(of_family(family))}


def arguments(op: str, device: str) -> tuple[Any, ...]:
    if op not in cases():
        pytest.skip("is timed as a part of its forward")
    return Input(cases()[op], device, tiny=True).args


def test_most_launchers_have_a_small_input() -> None:
    assert len(set(LAUNCHED) & set(cases())) >= 0.6 * len(LAUNCHED)
    assert set(ASK) <= set(LAUNCHED)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [op for op in LAUNCHED if op not in ASK])
def test_no_call_waits_for_the_gpu(op: str) -> None:
    args, operator = arguments(op, "cuda"), OPERATORS[op]
    with torch.inference_mode():
        operator(*args)  # what is made at the first call may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            operator(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("op", [op for op in LAUNCHED if op not in ASK])
def test_a_captured_call_gives_the_same_again(op: str) -> None:
    """A launch on another stream than the current one, or a wait for the host, fails the capture."""
    args, operator = arguments(op, "cuda"), OPERATORS[op]
    with torch.inference_mode():
        expected = tensors_of([operator(*args)])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = tensors_of([operator(*args)])
        graph.replay()
        torch.cuda.synchronize()
    if not operator.mutated:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(expected, found, strict=True))
