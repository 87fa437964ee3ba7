# SPDX-License-Identifier: Apache-2.0
"""What the project demands of every operator: nobody can add one and forget a part of it."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from cofire import native, ops
from cofire.info import markdown_table
from cofire.registry import FLOATS, OPERATORS, REFERENCE_ONLY, Backward, Kernel, Operator, register
from helpers import calls_of_reference

ROOT = Path(__file__).parents[1]
ALL = [pytest.param(o, id=o.name) for o in OPERATORS.values()]
PUBLIC = [pytest.param(o, id=o.name) for o in OPERATORS.values() if not o.name.endswith("_backward")]
FORWARD_OF = {o.backward.operator: o for o in OPERATORS.values() if isinstance(o.backward, Backward)}

every_operator = pytest.mark.parametrize("operator", ALL)


@every_operator
def test_it_has_a_reference_and_a_fake(operator: Operator) -> None:
    assert callable(operator.reference)
    assert callable(operator.fake)
    for overload in (operator.name, f"{operator.name}.reference"):
        for key in ("CompositeExplicitAutograd", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cofire::{overload}", key), (overload, key)


@every_operator
def test_it_has_a_backward_or_says_why_not(operator: Operator) -> None:
    if isinstance(operator.backward, str):
        assert len(operator.backward.split()) >= 3, f"{operator.name}: give a reason, not {operator.backward!r}"
        assert not operator.double_backward
        return
    assert operator.backward.operator == "reference" or operator.backward.operator in OPERATORS
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cofire::{operator.name}", "Autograd")
    if not operator.name.endswith("_backward"):
        assert operator.double_backward, f"{operator.name}: its backward must be differentiable"


@every_operator
def test_a_backward_operator_belongs_to_a_forward(operator: Operator) -> None:
    if operator.name.endswith("_backward"):
        assert operator.name in FORWARD_OF
        assert FORWARD_OF[operator.name].name == operator.name.removesuffix("_backward")


@every_operator
def test_every_kernel_exists_or_says_why_not(operator: Operator) -> None:
    """The launchers import without a GPU, and a missing kernel is a decision."""
    for kind in ("cpu", "triton", "cuda"):
        kernel = getattr(operator, kind)
        if isinstance(kernel, str):
            assert kernel.strip(), f"{operator.name}: say why there is no {kind} kernel"
            assert kernel != "no kernel yet", f"{operator.name}: {kind}"
        elif isinstance(kernel, Kernel):
            assert callable(kernel.launch), f"{operator.name}: {kernel.launcher}"


@every_operator
def test_it_has_a_test(operator: Operator) -> None:
    text = (ROOT / "tests" / "ops" / f"test_{operator.family}.py").read_text(encoding="utf-8")
    assert re.search(rf'check_op\(\s*"{operator.name}"', text), (
        f"{operator.name} is not checked in test_{operator.family}.py"
    )


@every_operator
def test_it_has_a_benchmark(operator: Operator) -> None:
    """A backward operator counts through the backward mode of its forward."""
    cases = importlib.import_module(f"cofire.bench.{operator.family}").CASES
    if operator.name in FORWARD_OF:
        assert any(c.op == FORWARD_OF[operator.name].name and c.gradients for c in cases), operator.name
    else:
        assert any(c.op == operator.name for c in cases), operator.name


@pytest.mark.parametrize("operator", PUBLIC)
def test_its_public_function_is_documented(operator: Operator) -> None:
    function = getattr(ops, operator.name)
    text = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:", "Example:", "Source:"):
        assert section in text, f"{operator.name}: no {section}"
    for name in inspect.signature(function).parameters:
        assert re.search(rf"\b{name}\b", text.partition("Args:")[2]), (
            f"{operator.name}: argument {name} is not described"
        )


@every_operator
def test_its_csrc_exists(operator: Operator) -> None:
    if isinstance(operator.cpu, tuple):
        sources = list((ROOT / "csrc" / "cpu").glob(f"{operator.family}*.cpp"))
        assert any(re.search(rf'm\.impl\("{operator.name}"', s.read_text(encoding="utf-8")) for s in sources), (
            operator.name
        )


@every_operator
def test_its_cpu_kernel_is_attached(operator: Operator) -> None:
    """With a compiled library every claim of a C++ kernel is true, and no kernel goes unmentioned; without, there is none."""
    attached = torch._C._dispatch_has_kernel_for_dispatch_key(f"cofire::{operator.name}", "CPU")
    assert attached == (isinstance(operator.cpu, tuple) and native.STATUS.variant is not None), native.STATUS


def test_the_recorder_of_reference_calls_works() -> None:
    """``check_op`` trusts it to see that a C++ kernel hands over: it does for fp64, and does not for fp32."""
    if native.STATUS.variant is None:
        pytest.skip(f"no compiled kernels: {native.STATUS.reason}")
    operator = OPERATORS["gated_norm_act"]
    assert torch.float64 not in operator.cpu
    for dtype, expected in ((torch.float64, [torch.float64]), (torch.float32, [])):
        with calls_of_reference(operator) as calls:
            ops.gated_norm_act(torch.randn(2, 3, 4, 4, dtype=dtype), torch.ones(3), torch.zeros(3))
        assert calls == expected


def test_the_library_that_fits_is_loaded() -> None:
    """A build that does not load must not hide behind the reference."""
    built = [v for v in native.VARIANTS if list(Path(native.__file__).parent.glob(f"_cpu_{v}.*"))]
    if built and not REFERENCE_ONLY:
        assert native.STATUS.variant in built, native.STATUS.reason


def test_the_readme_has_the_table() -> None:
    table = markdown_table()
    assert all(f"`{p.values[0].name}`" in table for p in PUBLIC)
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), "run: make readme"


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="register: an operator named 'compact' exists already"):
        register(OPERATORS["compact"])


def test_dtypes_are_the_three() -> None:
    assert set(FLOATS) == {torch.float32, torch.bfloat16, torch.float16}
