# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves which operator here, and why a faster one does not."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cofire import native
from cofire.names import near_matches
from cofire.registry import HAS_TRITON, OPERATORS, REFERENCE_ONLY, Backward, Kernel, Operator, leading_dtype
from cofire.version import __version__

__all__ = ["explain", "info", "markdown_table", "print_table"]


SHORT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " ".join(SHORT.get(d, str(d)) for d in dtypes)


def _cpu_kernel(operator: Operator) -> str:
    if isinstance(operator.cpu, str):
        return f"reference: {operator.cpu}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"cofire::{operator.name}", "CPU"):
        return f"reference: {native.STATUS.reason}"
    return f"c++ {native.STATUS.variant} ({_names(operator.cpu)})"


def _no_gpu_kernel() -> str:
    """Why no kernel serves on CUDA, or nothing."""
    if REFERENCE_ONLY:
        return "reference: COFIRE_BACKEND=reference"
    return "" if HAS_TRITON else "reference: triton is not installed"


def _gpu_kernel(kernel: Kernel | str, missing: str) -> str:
    if isinstance(kernel, str):
        return f"none: {kernel}"
    return missing or f"{kernel.launcher} ({_names(kernel.dtypes)})"


def _describe(operator: Operator) -> dict[str, Any]:
    missing = _no_gpu_kernel() or ("" if torch.cuda.is_available() else "reference: no GPU")
    differentiable = isinstance(operator.backward, Backward)
    return {
        "name": operator.name,
        "family": operator.family,
        "kernels": {
            "cpu": _cpu_kernel(operator),
            "triton": _gpu_kernel(operator.triton, missing),
            # registered for comparison; the dispatcher never takes it
            "cuda": _gpu_kernel(operator.cuda, missing or "alternative, not dispatched: Triton serves"),
        },
        "backward": operator.backward.operator if isinstance(operator.backward, Backward) else operator.backward,
        "double_backward": operator.double_backward,
        "differentiable": differentiable,
        "test": f"tests/ops/test_{operator.family}.py",
        "benchmark": f"benchmarks/test_{operator.family}.py",
    }


def info() -> dict[str, Any]:
    """The state of this installation, as plain data.

    Returns:
        ``version``, ``operators``, ``methods``, ``cpu_variant``, ``cpu_reason``, ``cpu_features``, ``build``, ``torch``, ``cuda``,
        ``threads``, ``python``, ``platform``. Each operator has ``name``, ``family``, ``kernels`` (``cpu``, ``triton``, ``cuda``),
        ``backward``, ``double_backward``, ``differentiable``, ``test``, ``benchmark``; a kernel that is not in use reads
        ``reference: <why>`` or ``alternative, not dispatched: <why>``.

    Example:
        >>> sorted(info()["operators"][0]["kernels"])
        ['cpu', 'cuda', 'triton']
    """
    from cofire.methods import METHODS

    return {
        "version": __version__,
        "operators": [_describe(o) for o in OPERATORS.values()],
        "methods": sorted(METHODS),
        "cpu_variant": native.STATUS.variant,
        "cpu_reason": native.STATUS.reason,
        "cpu_features": list(native.STATUS.features),
        "build": native.STATUS.build,
        "torch": torch.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }


def markdown_table() -> str:
    """The support table of the README: what exists, whatever machine this is."""

    def mark(present: bool) -> str:
        return "yes" if present else "-"

    rows = [
        "| operator | family | C++ CPU | Triton | CUDA C++ | backward | double backward |",
        "|---|---|---|---|---|---|---|",
    ]
    for o in OPERATORS.values():
        if o.name.endswith("_backward"):
            continue
        kernels = (isinstance(o.cpu, tuple), isinstance(o.triton, Kernel), isinstance(o.cuda, Kernel))
        gradient = isinstance(o.backward, Backward)
        cells = [f"`{o.name}`", o.family, *map(mark, kernels)]
        second = "refused" if isinstance(o.double_backward, str) else mark(o.double_backward)
        cells += [mark(gradient), second] if gradient else [f"none: {o.backward}", "-"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def print_table() -> None:
    """Print :func:`info` for people."""
    from rich.console import Console
    from rich.table import Column, Table

    facts = info()
    console = Console()
    variant = facts["cpu_variant"] or "none"
    console.print(f"cofire {facts['version']}, torch {facts['torch']}, Python {facts['python']}, {facts['platform']}")
    console.print(f"CPU kernels: [bold]{variant}[/bold] ({facts['cpu_reason']}); {facts['threads']} threads")
    if facts["build"]:
        console.print("built with: " + ", ".join(f"{k} {v}" for k, v in facts["build"].items()))
    if facts["cpu_features"]:
        console.print("CPU has: " + " ".join(facts["cpu_features"]))
    console.print(f"GPU: {facts['cuda'] or 'none that CUDA can see'}; methods: {', '.join(facts['methods'])}")
    table = Table(Column("operator", no_wrap=True), "CPU", "GPU: Triton", "GPU: CUDA C++")
    for o in facts["operators"]:
        table.add_row(o["name"], *(o["kernels"][kind] for kind in ("cpu", "triton", "cuda")))
    console.print(table)


def kernel_for(operator: Operator, args: tuple[Any, ...]) -> str:
    """Which kernel the dispatcher takes for these arguments, and why."""
    if REFERENCE_ONLY:
        return "reference: COFIRE_BACKEND=reference"
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    device = tensors[0].device.type
    if device not in ("cpu", "cuda"):
        return f"reference: no kernel for device {device}"
    kernel = operator.cpu if device == "cpu" else operator.triton
    if isinstance(kernel, str):
        return f"reference: {kernel}"
    if device == "cuda" and (why := _no_gpu_kernel()):
        return why
    dtypes = kernel.dtypes if isinstance(kernel, Kernel) else kernel
    if device == "cpu" and not torch._C._dispatch_has_kernel_for_dispatch_key(f"cofire::{operator.name}", "CPU"):
        return f"reference: {native.STATUS.reason}"
    dtype = leading_dtype(args)
    if dtype is not None and dtype not in dtypes and any(d.is_floating_point for d in dtypes):
        return f"reference: the kernel covers {_names(dtypes)}, got {_names((dtype,))}"
    if isinstance(kernel, Kernel):
        plan = _gpu_plan(kernel)
        return "triton" if plan is None else f"triton: {plan(*args)}"
    name = f"c++ {native.STATUS.variant}"
    plan = getattr(torch.ops.cofire_plan, operator.name, None)  # of operators that choose between two ways
    return name if plan is None else f"{name}: {plan(*args)}"


def _gpu_plan(kernel: Kernel) -> Callable[..., str] | None:
    """``<launcher>_plan``, which launchers that choose between two ways have beside them."""
    module, _, launcher = kernel.launcher.partition(":")
    plan: Callable[..., str] | None = getattr(importlib.import_module(module), f"{launcher}_plan", None)
    return plan


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cofire":
            operator = OPERATORS[func._schema.name.removeprefix("cofire::")]
            self.calls.append({"operator": operator.name, "kernel": kernel_for(operator, args)})
        return func(*args, **(kwargs or {}))


def explain(call: str | Callable[..., Any], *args: Any, **kwargs: Any) -> list[dict[str, str]]:
    """Run a call and say, for each cofire operator in it, which kernel served it and why.

    Args:
        call: the name of a function in ``cofire.ops``, or anything callable (a module, a whole model).
        args, kwargs: its arguments.

    Returns:
        One ``{"operator", "kernel"}`` per operator call, in order.

    Raises:
        ValueError: no function of that name; the near matches are listed.

    Example:
        >>> import torch
        >>> [c["operator"] for c in explain("compact", torch.ones(1, 2))]
        ['compact']
    """
    from cofire import ops

    if isinstance(call, str):
        public = [name for name in OPERATORS if hasattr(ops, name)]
        if call not in public:
            raise ValueError(f"explain: no operator is called {call!r}{near_matches(call, public)}")
        call = cast(Callable[..., Any], getattr(ops, call))
    recorder = _Recorder()
    with recorder:
        call(*args, **kwargs)
    return recorder.calls


if __name__ == "__main__":
    print_table()
