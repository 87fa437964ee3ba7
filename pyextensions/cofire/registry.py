# SPDX-License-Identifier: Apache-2.0
"""The operator registry: turns the parts of an operator into a torch operator.

One :class:`Operator` per schema holds everything there is to know about it. :func:`register` hands the parts to
``torch.library``; after that the PyTorch dispatcher alone chooses the kernel, and nothing here is on the call path
but the validation of the public function. The way to the dispatcher is ``torch.ops`` or, where nothing but plain tensors and
numbers is passed, the shorter one of ``csrc/call.cpp``; past autograd, where no gradient is recorded. The C++ kernels of
``csrc/cpu`` attach themselves when their library is loaded (``cofire.native``); the Triton kernels are imported with
their first launch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

LIBRARY = torch.library.Library("cofire", "FRAGMENT")
OPERATORS: dict[str, Operator] = {}


def _reference_only() -> bool:
    backend = os.environ.get("COFIRE_BACKEND", "")
    if backend not in ("", "reference"):
        raise ValueError(f"COFIRE_BACKEND must be reference, or not set, got {backend!r}")
    return backend == "reference"


#: ``COFIRE_BACKEND=reference`` turns every kernel off; read once, at import.
REFERENCE_ONLY = _reference_only()
#: Triton is an optional extra; looked for, not imported.
HAS_TRITON = importlib.util.find_spec("triton") is not None

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: The backward "operator" of a function whose gradient is the one that comes: there is nothing to compute.
IDENTITY = "identity"


def leading_dtype(args: tuple[Any, ...]) -> torch.dtype | None:
    """The dtype that decides whether a kernel covers a call: of the first floating-point tensor. Others follow from it."""
    return next((a.dtype for a in tensors_of(args) if a.is_floating_point()), None)


def tensors_of(args: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among arguments, those in lists of tensors too."""
    every = itertools.chain.from_iterable(a if isinstance(a, (list, tuple)) else (a,) for a in args)
    return [a for a in every if isinstance(a, torch.Tensor)]


@dataclass(frozen=True)
class Backward:
    """How gradients flow: what to keep from the forward, and which operator computes them."""

    save: Callable[..., None]  #: ``save(ctx, inputs, output)``
    formula: Callable[..., Any]  #: ``formula(ctx, *grads)``: one gradient, or None, per input
    operator: str  #: the operator that does the work, for the support table; or IDENTITY


@dataclass(frozen=True)
class Kernel:
    """A device kernel: where its launcher lives and what it covers."""

    launcher: str  #: ``"package.module:function"``, imported with the first launch
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def covers(self, args: tuple[Any, ...]) -> bool:
        return leading_dtype(args) in (None, *self.dtypes)

    @functools.cached_property
    def launch(self) -> Callable[..., Any]:
        module, _, function = self.launcher.partition(":")
        launch: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return launch


#: The guard in which torch's own wrapper calls an operator when no gradient is wanted. (Private, so it may be gone one day.)
_BelowAutograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)


def _nothing_to_record(args: tuple[Any, ...]) -> bool:
    """Whether a call can go past autograd, whose wrapper, written in Python, takes as long as a small kernel."""
    if _BelowAutograd is None or torch._C._functorch.maybe_current_level() is not None:
        return False
    if not torch.is_grad_enabled():
        return True
    if any(isinstance(a, tuple) for a in args):
        args = tuple(list(a) if isinstance(a, tuple) else a for a in args)
    return not torch._C._any_requires_grad(*args)


@dataclass(frozen=True)
class Operator:
    """Everything about one operator. Each callable takes the operator's arguments, in the schema's order.

    An operator may write to arguments, ``Tensor(a!)`` in its schema: its reference writes to them too, what it returns
    (nothing, often) is what the schema says, and its fake returns the same and writes nothing.
    """

    schema: str  #: without namespace and defaults: ``"compact(Tensor mask) -> (Tensor index, Tensor count)"``
    family: str  #: the stem under which every file of the operator is found
    reference: Callable[..., Any]  #: the maths in plain torch: any device, differentiable, the oracle of the tests
    fake: Callable[..., Any]  #: shapes and dtypes only
    backward: Backward | str  #: or, in one phrase, why there is none
    double_backward: bool | str = False  #: or, in one sentence, why it is refused
    validate: Callable[..., None] | None = None  #: raises on bad input; the same for eager and while tracing
    cpu: tuple[torch.dtype, ...] | str = FLOATS  #: dtypes of the C++ kernel, or why there is none
    triton: Kernel | str = "no kernel yet"
    cuda: Kernel | str = "Triton says it"
    autocast: torch.dtype | str | None = None  #: a dtype, "lower" (autocast's own), or None (inputs as they come)
    flops: Callable[..., int] | None = None
    bytes: Callable[..., int] | None = None  #: the fewest bytes the operator can move
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.schema.partition("(")[0])

    @functools.cached_property
    def overload(self) -> Any:
        return getattr(torch.ops.cofire, self.name).default

    @functools.cached_property
    def direct(self) -> Callable[..., Any]:
        """The overload, by a shorter way past autograd if nothing is recorded; NotImplemented where that way is not open."""
        from cofire import native

        direct = native.caller(f"cofire::{self.name}")
        return direct if direct is not None else lambda *args: NotImplemented

    @functools.cached_property
    def mutated(self) -> tuple[int, ...]:
        """The positions of the arguments that it writes to."""
        arguments = self.overload._schema.arguments
        return tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)

    def __call__(self, *args: Any) -> Any:
        """Validate and run: what the public function of the operator returns."""
        # Under autocast mixed dtypes are no mistake: what is validated is what comes out of the cast.
        try:
            if self.validate is not None and not (self.autocast and torch.is_autocast_enabled(args[0].device.type)):
                self.validate(*args)
        except AttributeError:  # what a tensor has and something else has not
            self._refuse_non_tensors(args)
            raise
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        """The same for arguments that were validated already."""
        if torch.compiler.is_compiling():
            return self.overload(*args)
        result = self.direct(*args)
        if result is not NotImplemented:
            return result
        if _nothing_to_record(args):
            with _BelowAutograd():
                return self.overload(*args)
        return self.overload(*args)

    def _refuse_non_tensors(self, args: tuple[Any, ...]) -> None:
        for argument, value in zip(self.overload._schema.arguments, args, strict=True):
            optional = str(argument.type) == "Optional[Tensor]" and value is None
            if "Tensor" in str(argument.type) and not (optional or isinstance(value, torch.Tensor)):
                raise TypeError(f"{self.name}: {argument.name} must be a tensor, got {type(value).__name__}") from None


def register(operator: Operator) -> Operator:
    """Define the operator in ``torch.ops.cofire`` and attach all its parts."""
    name, signature = operator.name, operator.schema[len(operator.name) :]
    if name in OPERATORS:
        raise ValueError(f"register: an operator named {name!r} exists already")

    def fake(*args: Any) -> Any:
        if operator.validate is not None:
            operator.validate(*args)
        return operator.fake(*args)

    # The overload `.reference` is what a C++ kernel calls for a dtype that it does not cover.
    for qualified in (name, f"{name}.reference"):
        LIBRARY.define(qualified + signature, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
        LIBRARY.impl(qualified, operator.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"cofire::{qualified}", fake, lib=LIBRARY)
    if isinstance(operator.backward, Backward):
        torch.library.register_autograd(
            f"cofire::{name}", operator.backward.formula, setup_context=operator.backward.save, lib=LIBRARY
        )
    if isinstance(operator.triton, Kernel) and HAS_TRITON and not REFERENCE_ONLY:
        LIBRARY.impl(name, _launch_or_reference(operator, operator.triton), "CUDA")
    if operator.mutated:
        LIBRARY.impl(name, _count_writes(operator), "ADInplaceOrView", with_keyset=True)
    # Also where nothing is cast: the library calls inside a kernel must not be cast either.
    for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        LIBRARY.impl(name, _cast_then_call(operator, device, key), key)
    _register_flops(operator)
    OPERATORS[name] = operator
    assert operator.overload is not None  # found now: the compiler cannot trace a property that takes a lock
    return operator


def through_reference(reference: Callable[..., Any]) -> Backward:
    """Gradients by differentiating the reference: the backward of the backward operators, of any order."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, torch.Tensor)))
        ctx.others = [None if isinstance(a, torch.Tensor) else (a,) for a in inputs]

    def formula(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            args = [next(saved) if other is None else other[0] for other in ctx.others]
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            for i in wanted:  # an alias, so that the gradient stops here and not at the leaves behind
                args[i] = args[i].view_as(args[i]) if args[i].requires_grad else args[i].detach().requires_grad_()
            outputs = reference(*args)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [args[i] for i in wanted],
                [g for _, g in pairs],
                allow_unused=True,
                create_graph=differentiable,
            )
        result: list[torch.Tensor | None] = [None] * len(args)
        for i, gradient in zip(wanted, found, strict=True):
            result[i] = gradient
        return tuple(result)

    return Backward(save, formula, "reference")


def refuse_second(operator: str, reason: str) -> Backward:
    """The backward of a backward operator that has none: a sentence instead of a silent zero."""

    def formula(ctx: Any, *grads: torch.Tensor | None) -> Any:
        raise RuntimeError(f"{operator}: there are no {reason}")

    return Backward(lambda ctx, inputs, output: None, formula, "refused")


def _launch_or_reference(operator: Operator, kernel: Kernel) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return kernel.launch(*args) if kernel.covers(args) else operator.reference(*args)

    return run


def _count_writes(operator: Operator) -> Callable[..., Any]:
    """Tells autograd of the writes, as torch's own in-place operators do: a backward that saved the old value then raises."""

    def run(keys: Any, *args: Any) -> Any:
        for i in operator.mutated:
            if args[i] is not None:
                torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator.overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    return run


def _cast_then_call(operator: Operator, device: str, key: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device) if operator.autocast == "lower" else operator.autocast

        def cast(a: Any) -> Any:
            eligible = isinstance(a, torch.Tensor) and a.is_floating_point() and a.dtype != torch.float64
            return a.to(dtype) if eligible and dtype is not None else a

        args = tuple(map(cast, args))
        if operator.validate is not None:
            operator.validate(*args)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator.overload(*args)

    return run


class _FlopFormulas(importlib.abc.MetaPathFinder):
    """Registers the FLOP formulas right after torch's FLOP counter is imported; to import it here would import triton."""

    counter = "torch.utils.flop_counter"

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.counter:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_register(module: Any) -> None:
                execute(module)
                for operator in OPERATORS.values():
                    _register_flops(operator)

            spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def _register_flops(operator: Operator) -> None:
    counter = sys.modules.get(_FlopFormulas.counter)
    if counter is None or operator.flops is None:
        return

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        assert operator.flops is not None
        return operator.flops(*args)

    counter.register_flop_formula(getattr(torch.ops.cofire, operator.name), get_raw=True)(formula)


if _FlopFormulas.counter not in sys.modules:
    sys.meta_path.insert(0, _FlopFormulas())
