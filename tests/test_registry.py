# SPDX-License-Identifier: Apache-2.0
"""What the project demands of every operator: nobody can add one and forget a part of it."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cofire import native, ops
from cofire.info import kernel_for, markdown_table
from cofire.registry import FLOATS, IDENTITY, OPERATORS, REFERENCE_ONLY, Backward, Kernel, Operator, register
from helpers import calls_of_reference

info = importlib.import_module("cofire.info")  # the package's attribute of this name is the function
ROOT = Path(__file__).parents[1]
ALL = [pytest.param(o, id=o.name) for o in OPERATORS.values()]
PUBLIC = [pytest.param(o, id=o.name) for o in OPERATORS.values() if not o.name.endswith("_backward")]
FORWARD_OF = {
    o.backward.operator: o
    for o in OPERATORS.values()
    if isinstance(o.backward, Backward) and o.backward.operator.endswith("_backward")
}

every_operator = pytest.mark.parametrize("operator", ALL)


@every_operator
def test_it_has_a_reference_and_a_fake(operator: Operator) -> None:
    assert callable(operator.reference)
    assert callable(operator.fake)
    for overload in (operator.name, f"{operator.name}.reference"):
        for key in ("CompositeExplicitAutograd", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cofire::{overload}", key), (overload, key)


@every_operator
def test_its_first_call_can_be_compiled(operator: Operator) -> None:
    """``functools.cached_property`` takes a lock in Python 3.10 and 3.11, which ``torch.compile`` does not trace."""
    assert "overload" in vars(operator)


@every_operator
def test_it_has_a_backward_or_says_why_not(operator: Operator) -> None:
    if isinstance(operator.backward, str):
        assert len(operator.backward.split()) >= 3, f"{operator.name}: give a reason, not {operator.backward!r}"
        assert not operator.double_backward
        return
    if operator.backward.operator == IDENTITY:
        assert operator.double_backward is True
        return
    assert operator.backward.operator in ("reference", "refused", *OPERATORS)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cofire::{operator.name}", "Autograd")
    if not operator.name.endswith("_backward"):
        assert operator.double_backward, f"{operator.name}: its backward must be differentiable, or say why it is not"
        refused = [
            o for o in OPERATORS.values() if isinstance(o.backward, Backward) and o.backward.operator == "refused"
        ]
        assert isinstance(operator.double_backward, str) == (OPERATORS.get(operator.backward.operator) in refused)


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
    texts = [p.read_text(encoding="utf-8") for p in (ROOT / "tests" / "ops").glob("test_*.py")]
    assert any(re.search(rf'check(_op|s)\(\s*"{operator.name}"', text) for text in texts), (
        f"{operator.name} is not checked in tests/ops"
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


# ------------------------------------------------------------------------------------------ what is said of a GPU


def test_without_triton_the_info_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "HAS_TRITON", False)
    monkeypatch.setattr(info, "REFERENCE_ONLY", False)
    kernels = info._describe(OPERATORS["compact"])["kernels"]
    assert kernels["triton"] == kernels["cuda"] == "reference: triton is not installed"


def test_a_kernel_that_is_never_dispatched_is_not_said_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(info, "HAS_TRITON", True)
    monkeypatch.setattr(info, "REFERENCE_ONLY", False)
    assert info._describe(OPERATORS["compact"])["kernels"]["cuda"] == "alternative, not dispatched: Triton serves"
    assert info._describe(OPERATORS["gated_linear"])["kernels"]["cuda"] == "none: Triton says it"


def _on_a_gpu(name: str, **sizes: int) -> str:
    """What kernel_for says of a call on a GPU that need not be there."""
    size = {"n": 2, "ci": 4, "co": 6, "groups": 1, "transposed": 0} | sizes
    n, ci, co, groups = (size[k] for k in ("n", "ci", "co", "groups"))
    with FakeTensorMode():

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        selection = [make(*shape, dtype=torch.int32) for shape in ((n, ci), (n,), (n, co), (n,))]
        weight = make(ci, co).t() if size["transposed"] else make(co, ci)
        args: dict[str, tuple[object, ...]] = {
            "gated_linear": (make(n, ci), weight, None, *selection, "relu"),
            "gated_conv2d": (
                *(make(n, ci, 5, 5), make(co, ci // groups, 3, 3), None, None, *selection),
                *([1, 1], [1, 1], [1, 1], groups, "relu", False, False, 0),
            ),
            "mass_mask": (make(n, ci), 0.9, "mass", 1),
            "gate_head": (make(n, ci), make(co, ci), None, True, 1),
            "channel_pool": (make(n, ci, 5, 5), "max"),
        }
        return kernel_for(OPERATORS[name], args[name])


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("gated_linear", {}, "triton: skips inactive outputs"),
        ("gated_linear", {"transposed": 1}, "triton: skips inactive inputs"),
        ("gated_linear", {"n": 33}, "triton: library GEMM on masked tensors: more than 32 samples"),
        ("gated_conv2d", {}, "triton: computes the active channels"),
        ("gated_conv2d", {"groups": 4, "co": 8}, "triton: depthwise kernel"),
        ("gated_conv2d", {"groups": 2}, "triton: library convolution on masked tensors: groups of several channels"),
        ("mass_mask", {}, "triton: one program per sample"),
        ("mass_mask", {"ci": 5000}, "triton: torch operators: more than"),
        ("gate_head", {}, "triton: logits; the mask by one program per sample"),
        ("gate_head", {"co": 5000}, "triton: logits; the mask by torch operators: more than"),
        ("channel_pool", {}, "triton"),
    ],
)
def test_explain_knows_the_plan_of_a_launcher(name: str, sizes: dict[str, int], expected: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if REFERENCE_ONLY:
        pytest.skip("COFIRE_BACKEND=reference")
    found = _on_a_gpu(name, **sizes)
    assert found.startswith(expected)
    assert found == expected or expected.endswith("than")


def test_only_the_advice_that_helps() -> None:
    with pytest.warns(UserWarning, match=r"without its C\+\+ kernels: cofire._cpu_avx2 does not load.$"):
        native._failed("cofire._cpu_avx2 does not load", {}, ())
