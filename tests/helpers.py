# SPDX-License-Identifier: Apache-2.0
"""One harness for every operator: a family brings samples, the checks are here.

How to test a new operator, in ``tests/ops/test_<family>.py``::

    SAMPLES = [
        Sample("odd", lambda rand: (rand.normal(7, 17, 5, 3), "max")),       # arguments in the schema's order, fp32,
        CPU Sample("zeros", lambda rand: (torch.zeros(2, 3, 4, 4), "avg")),
    ]
    TINY = [Sample("tiny", ...), Sample("tiny_resized", ...)]                 # same options, other sizes

    @pytest.mark.parametrize("check", check_op("channel_pool", SAMPLES, tiny=TINY))
    def test_operator(check):
        check()

    @pytest.mark.parametrize("check", refusals([Refusal("rank", lambda: ops.channel_pool(torch.ones(2)), ValueError,
    "...")])) def test_refusal(check):
        check()

Golden vectors, laws and comparisons with an independent formula are ordinary tests beside them.

``check_op`` returns one check per operator, provider, sample and dtype. A *provider* is a way to compute the operator:

============== ======================================================================================
``reference``  the reference itself (its integer outputs must be the same in every dtype)
``cpu``        the dispatcher on CPU tensors: the C++ kernel where one is loaded, otherwise the reference
``triton``     the Triton launcher on CPU tensors, in the interpreter (``TRITON_INTERPRET=1``)
``cuda``       the dispatcher on CUDA tensors (marker ``gpu``)
``cuda_c``     the CUDA C++ launcher on CUDA tensors (marker ``gpu``)
============== ======================================================================================

Each runs through the same comparison. With r the reference in fp64, t the reference in the input's dtype and o the
provider's result, the one rule for floats is ::

    max|o - r| <= 2 max|t - r| + eps(dtype) max|r|

that is, a kernel may lose about as much as plain torch loses. For gradients it is 3 instead of 2, and max|r| is that
of a random cotangent also where the cotangent of a sum is used, whose gradient may cancel to nothing. For the outputs
named in ``sums`` it is 16 eps(dtype): the terms of a sum may cancel, and the library accumulates some in fp64, a
kernel in fp32. Of a single number |t - r| may be near nothing by luck: there it is the largest of the sample and of
``DRAWS`` more of its kind, with other random numbers. Outputs that are not floats are compared exactly with r.
An operator that writes to arguments is given copies of them, laid out as they are, and what it leaves there counts as its
first outputs (:func:`functional`): all checks hold for them as for any other output.
The one exception has to be declared: ``decided_by`` names outputs that follow from a float output of the same call by a
threshold or an order (the mask of ``gate_head`` from its logits). Rounding may move a logit over the threshold or make
two of them equal, so these outputs are compared, still exactly, with what the provider's *own* float output demands.

Cheap checks run on all samples: the rule above, layout as the fake says, no aliasing, inputs untouched, the same bits
    on
every run (a C++ kernel: and for 1, 2 and 3 threads), the kernel that the registry claims, other memory layouts. The
dear ones (opcheck, gradcheck, gradgradcheck, ``torch.compile``) run on the tiny samples.
"""

from __future__ import annotations

import doctest
import functools
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cofire import native
from cofire.registry import FLOATS, OPERATORS, REFERENCE_ONLY, Backward, Kernel, Operator, tensors_of

Args = tuple[Any, ...]

HALVES = (torch.bfloat16, torch.float16)

#: The release of PyTorch, as (major, minor).
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


# ------------------------------------------------------------------------------------------------- samples


class Random:
    """The source of a sample's data: seeded by the sample's name, so that samples do not depend on each other."""

    def __init__(self, name: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def mask(self, *shape: int, density: float = 0.5) -> Tensor:
        return self.uniform(*shape) < density


@dataclass(frozen=True)
class Sample:
    """One set of arguments. Float tensors are made in fp32 and cast to the dtype under test."""

    name: str
    make: Callable[[Random], Args]
    full: bool = False  #: second tier only
    kink: bool = False  #: 16-bit rounding crosses a kink of the activation: gradients are compared in fp32 only
    interpreted: bool = True  #: False: so large that the interpreter would take minutes


def each(function: Callable[[Tensor], Any], a: Any) -> Any:
    """An argument with its tensor, or each of its list of tensors, replaced."""
    if isinstance(a, (list, tuple)) and any(isinstance(x, Tensor) for x in a):
        return [function(x) for x in a]
    return function(a) if isinstance(a, Tensor) else a


def _copied(x: Tensor) -> Tensor:
    """The same values in the same layout, gaps included."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def functional(operator: Operator, run: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """``run`` as a function without side effects: first what it leaves in the arguments that it writes to, then what it
    returns. Nothing stands for an optional argument that is not given."""

    def call(*args: Any) -> tuple[Any, ...]:
        own = tuple(_copied(a) if i in operator.mutated and isinstance(a, Tensor) else a for i, a in enumerate(args))
        outputs = run(*own)
        returned = () if outputs is None else _tuple(outputs)
        return (*(torch.empty(0) if own[i] is None else own[i] for i in operator.mutated), *returned)

    return call


@dataclass(frozen=True)
class Case:
    """An operator with everything the checks need to know about it."""

    operator: Operator
    constants: tuple[str, ...]  #: float arguments without a gradient
    wide: tuple[str, ...]  #: float arguments that stay in fp32 when the others have 16 bits
    kept: tuple[str, ...]  #: float arguments whose dtype is the sample's choice: what has to be bf16, or fp64, always
    sums: Mapping[str, int]  #: outputs, or arguments whose gradients are, that sum up many values: roundings allowed
    decided_by: Callable[..., dict[str, Tensor]] | None
    condition: int = 1  #: what fp64 may lose more, there being no wider reference to show what plain torch loses
    straight_through: bool = False  #: the gradient is defined, not the derivative
    by_library: bool = False  #: its products are the library's, whose rounding may change with the number of threads

    @functools.cached_property
    def names(self) -> list[str]:
        return [a.name for a in self.operator.overload._schema.arguments]

    @functools.cached_property
    def outputs(self) -> list[str]:
        returns = self.operator.overload._schema.returns
        written = [self.names[i] for i in self.operator.mutated]
        return [*written, *(r.name or f"output {i}" for i, r in enumerate(returns))]

    @functools.cached_property
    def reference(self) -> Callable[..., tuple[Tensor, ...]]:
        return functional(self.operator, self.operator.reference)

    @functools.cached_property
    def dispatched(self) -> Callable[..., tuple[Tensor, ...]]:
        return functional(self.operator, self.operator.overload)

    @functools.cached_property
    def public(self) -> Callable[..., tuple[Tensor, ...]]:
        return functional(self.operator, self.operator)

    def named(self, outputs: Sequence[Tensor]) -> list[str]:
        """A name for each output of a call; a list of tensors has as many as the call gives."""
        listed = len(self.outputs) == 1 and len(outputs) != 1
        return [f"{self.outputs[0]}[{i}]" for i in range(len(outputs))] if listed else self.outputs

    def roundings(self, name: str, dtype: torch.dtype) -> int:
        """How many roundings of the result its own arithmetic may cost."""
        return self.sums.get(name, 1) * (self.condition if dtype == torch.float64 else 1)

    def make(self, sample: Sample, dtype: torch.dtype, layout: str = "contiguous", draw: int = 0) -> Args:
        """The sample's arguments in a dtype and a memory layout, on the CPU; another ``draw`` has other random numbers."""
        args = sample.make(Random(f"{sample.name}, draw {draw}" if draw else sample.name))
        assert len(args) == len(self.names), f"{self.operator.name}: sample {sample.name} must give {self.names}"
        narrow = dtype in (torch.bfloat16, torch.float16)

        def prepare(name: str, a: Any) -> Any:
            def prepared(x: Tensor) -> Tensor:
                if x.is_floating_point() and name not in self.kept:
                    x = x.to(torch.float32 if narrow and name in self.wide else dtype)
                return LAYOUTS[layout](name, x)

            return each(prepared, a)

        return tuple(map(prepare, self.names, args))

    def in_fp64(self, args: Args) -> Args:
        def widen(name: str, a: Any) -> Any:
            return each(lambda x: x.double() if x.is_floating_point() and name not in self.kept else x, a)

        return tuple(map(widen, self.names, args))


def _strided(name: str, x: Tensor) -> Tensor:
    """The same values, no dimension dense."""
    if x.dim() == 0:
        return x
    big = x.new_zeros([2 * size + 1 for size in x.shape])
    view = big[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def _transposed(name: str, x: Tensor) -> Tensor:
    """The same values, the last two dimensions stored the other way round."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() >= 2 else x


def _channels_last(name: str, x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _expanded(name: str, x: Tensor) -> Tensor:
    """Gradients become ones of stride 0, as a sum hands them back."""
    return x.new_ones(()).expand(x.shape) if name.startswith("grad") else x


def moved(x: Tensor, device: str) -> Tensor:
    """On a device, stored in the same way: gaps, overlaps and offset included."""
    if x.device.type == device:
        return x
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


LAYOUTS: dict[str, Callable[[str, Tensor], Tensor]] = {
    "contiguous": lambda name, x: x,
    "strided": _strided,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "expanded": _expanded,
}


# ------------------------------------------------------------------------------------------------- providers


@dataclass(frozen=True)
class Provider:
    """A way to compute an operator."""

    name: str
    device: str
    run: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...]

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        if self.name == "cuda_c":
            pytest.importorskip("cupy", reason="CuPy is not installed: it compiles the CUDA C++ kernels")
        return _tuple(self.run(*(each(lambda x: x.to(self.device), a) for a in args)))

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        return [pytest.mark.gpu] if self.device == "cuda" else []


def providers(operator: Operator) -> Iterator[Provider]:
    """The ways to compute an operator in this process; those that need a GPU are marked, not left out."""
    every = (*FLOATS, torch.float64)

    def provider(name: str, device: str, run: Callable[..., Any], dtypes: tuple[torch.dtype, ...] = every) -> Provider:
        return Provider(name, device, functional(operator, run), dtypes)

    yield provider("reference", "cpu", operator.reference)
    yield provider("cpu", "cpu", operator.overload)
    if REFERENCE_ONLY:
        return
    yield provider("cuda", "cuda", operator.overload)
    if isinstance(operator.triton, Kernel) and os.environ.get("TRITON_INTERPRET") == "1":
        yield provider("triton", "cpu", lambda *a: operator.triton.launch(*a), operator.triton.dtypes)
    if isinstance(operator.cuda, Kernel):
        yield provider("cuda_c", "cuda", lambda *a: operator.cuda.launch(*a), operator.cuda.dtypes)


# ------------------------------------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Context:
    """Where a failing check happened; every message starts with it."""

    case: Case
    provider: str
    sample: str
    dtype: torch.dtype | None = None
    layout: str = "contiguous"

    def __str__(self) -> str:
        dtype = "" if self.dtype is None else f", {str(self.dtype).removeprefix('torch.')}"
        layout = "" if self.layout == "contiguous" else f", {self.layout}"
        return f"{self.case.operator.name} by {self.provider} on sample {self.sample!r}{dtype}{layout}"


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def bits(x: Tensor) -> Tensor:
    """The memory of a tensor: equal for equal results, NaN included."""
    return x.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


#: How many more samples show what plain torch loses of a single number.
DRAWS = 8


def check_close(
    where: str,
    o: Tensor,
    r: Tensor,
    t: Tensor,
    factor: float,
    scale: float,
    again: Callable[[int], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """The one rule for floats: ``factor`` times what plain torch loses, and one rounding of ``scale``.

    ``again`` gives r and t of another draw: they are asked for where a single number is off by more than its own t allows.
    """
    assert o.shape == r.shape, f"{where}: shape {list(o.shape)}, expected {list(r.shape)}"
    assert o.dtype == t.dtype, f"{where}: dtype {o.dtype}, expected {t.dtype}"
    assert r.isfinite().all(), f"{where}: the sample is useless, its reference is not finite"
    error = (o.detach().cpu().double() - r).abs()
    rest = (
        torch.finfo(t.dtype).eps * scale + torch.finfo(t.dtype).tiny
    )  # below it, machines differ in what they flush to zero
    allowed = factor * largest(t.detach().double() - r) + rest
    if again is not None and error.numel() == 1 and not error.item() <= allowed:
        draws = [again(draw) for draw in range(1, DRAWS + 1)]
        allowed = max(allowed, *(factor * largest(t_i.detach().double() - r_i) + rest for r_i, t_i in draws))
    if error.numel() and not (error <= allowed).all():  # not: NaN fails too
        worst = int(error.nan_to_num(nan=torch.inf).argmax())
        position = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
        wrong = int((~(error <= allowed)).sum())
        raise AssertionError(
            f"{where}: {wrong} of {error.numel()} values are wrong; at {position} it is {o.flatten()[worst].item():.9g}, "
            f"expected {r.flatten()[worst].item():.9g}: error {error.flatten()[worst].item():.3g}, bound {allowed:.3g}"
        )


def check_equal(where: str, o: Tensor, r: Tensor) -> None:
    """The rule for everything that is not a float."""
    o = o.cpu()
    assert (o.shape, o.dtype) == (r.shape, r.dtype), (
        f"{where}: {o.dtype} {list(o.shape)}, expected {r.dtype} {list(r.shape)}"
    )
    if not torch.equal(o, r):
        position = (o != r).nonzero()[0].tolist()
        got, expected = o[tuple(position)].item(), r[tuple(position)].item()
        raise AssertionError(
            f"{where}: {int((o != r).sum())} values differ; at {position} it is {got}, expected {expected}"
        )


def check_values(
    context: Context,
    args: Args,
    outputs: tuple[Tensor, ...],
    varied: Args | None = None,
    again: Callable[[int], Args] | None = None,
) -> None:
    """Every output of a call against the references in fp64 and in the call's dtype.

    ``varied`` are arguments of the same scale where the results to ``args`` may cancel to nothing; ``again`` gives those of
    another draw.
    """
    case = context.case
    r = case.reference(*case.in_fp64(args))
    t = case.reference(*args)
    assert len(outputs) == len(r), f"{context}: {len(outputs)} outputs, expected {len(r)}"
    sizes = r if varied is None else case.reference(*case.in_fp64(varied))
    decided = {} if case.decided_by is None else case.decided_by(args, tuple(o.cpu() for o in outputs))
    for i, (name, o_i, r_i, t_i, size) in enumerate(zip(case.named(r), outputs, r, t, sizes, strict=True)):
        if o_i.is_floating_point():
            scale = case.roundings(name, t_i.dtype) * max(largest(r_i), largest(size))

            def draw(k: int, i: int = i) -> tuple[Tensor, Tensor]:
                other = again(k)
                return case.reference(*case.in_fp64(other))[i], case.reference(*other)[i]

            check_close(f"{context}: {name}", o_i, r_i, t_i, factor=2, scale=scale, again=again and draw)
        elif name in decided:
            check_equal(f"{context}: {name}, as its own floats decide", o_i, decided[name])
        else:
            check_equal(f"{context}: {name}", o_i, r_i)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def check_layout(context: Context, args: Args, outputs: tuple[Tensor, ...]) -> None:
    """Shape, dtype and strides are what the fake promised to the compiler."""
    with FakeTensorMode() as mode:
        fakes = tuple(each(mode.from_tensor, a) for a in args)
        promised = context.case.dispatched(*fakes)
    for name, o, fake in zip(context.case.named(promised), outputs, promised, strict=True):
        assert (o.dtype, o.shape) == (fake.dtype, fake.shape), (
            f"{context}: {name} is {o.dtype} {list(o.shape)}, the fake says {fake.dtype} {list(fake.shape)}"
        )
        # The stride of a dimension of size 1 has no meaning.
        strides = [(a, b) for a, b, size in zip(o.stride(), fake.stride(), o.shape, strict=True) if size > 1]
        assert o.numel() == 0 or all(a == b for a, b in strides), (
            f"{context}: {name} has strides {list(o.stride())}, the fake says {list(fake.stride())}"
        )


def check_separate(context: Context, args: Args, outputs: tuple[Tensor, ...]) -> None:
    """No output shares memory with an input or with another output."""
    owners = {
        x.untyped_storage().data_ptr(): n
        for n, a in zip(context.case.names, args)
        for x in tensors_of([a])
        if x.numel()
    }
    for name, o in zip(context.case.named(outputs), outputs, strict=True):
        address = o.untyped_storage().data_ptr()
        assert o.numel() == 0 or address not in owners, f"{context}: {name} shares the memory of {owners[address]}"
        owners[address] = name


def check_untouched(context: Context, before: Args, args: Args) -> None:
    for name, was, now in zip(context.case.names, before, args, strict=True):
        for x, y in zip(tensors_of([was]), tensors_of([now]), strict=True):
            assert torch.equal(bits(x), bits(y)), f"{context}: it wrote to its input {name}"


def check_repeats(
    context: Context, run: Callable[[], tuple[Tensor, ...]], outputs: tuple[Tensor, ...], when: str
) -> None:
    for name, first, again in zip(context.case.named(outputs), outputs, run(), strict=True):
        assert torch.equal(bits(first), bits(again)), f"{context}: {name} changes {when}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def calls_of_reference(operator: Operator) -> Iterator[list[torch.dtype]]:
    """Records the calls that a compiled CPU kernel hands over to the reference."""
    calls: list[torch.dtype] = []

    def reference(*args: Any) -> Any:
        calls.append(tensors_of(args)[0].dtype)
        return operator.reference(*args)

    with torch.library._scoped_library("cofire", "FRAGMENT") as library:
        library.impl(f"{operator.name}.reference", reference, "CPU")
        yield calls


def has_cpu_kernel(operator: Operator, args: Args) -> bool:
    """Whether the registry claims a C++ kernel for these arguments, and its library is loaded."""
    return (
        isinstance(operator.cpu, tuple)
        and tensors_of(args)[0].dtype in operator.cpu
        and native.STATUS.variant is not None
    )


def check_served(context: Context, provider: Provider, args: Args) -> None:
    """Where the registry claims a C++ kernel, it does the work: the reference is not called."""
    with calls_of_reference(context.case.operator) as calls:
        provider(*args)
    assert not calls, f"{context}: the registry claims a C++ kernel for {calls[0]}, but the reference ran"


# ----------------------------------------------------------------------------------------------------- checks


def check_forward(
    case: Case, provider: Provider, sample: Sample, dtype: torch.dtype, layout: str = "contiguous"
) -> None:
    """Everything that one call can show, and that its repetition is the same to the last bit."""
    context = Context(case, provider.name, sample.name, dtype, layout)
    args = case.make(sample, dtype, layout)
    before = tuple(each(torch.clone, a) for a in args)
    on_device = tuple(each(lambda x: moved(x, provider.device), a) for a in args)
    outputs = provider(*on_device)
    check_untouched(context, before, tuple(each(lambda x: x.cpu(), a) for a in on_device))
    # the gradient of a constant may cancel to nothing
    varied = case.make(sample, dtype) if layout == "expanded" else None
    check_values(context, args, outputs, varied, lambda draw: case.make(sample, dtype, layout, draw))
    check_layout(context, on_device, outputs)
    check_separate(context, on_device, outputs)
    if provider.name != "reference":
        check_repeats(context, lambda: provider(*on_device), outputs, "from run to run")
    if provider.name == "cpu" and has_cpu_kernel(case.operator, args):
        if all(a.numel() for a in tensors_of(args)):  # of nothing, anyone can make nothing
            check_served(context, provider, args)
        for count in () if case.by_library else (1, 2, 3):
            with threads(count):
                check_repeats(context, lambda: provider(*on_device), outputs, f"with {count} threads")


def check_layouts(case: Case, provider: Provider, sample: Sample) -> None:
    """:func:`check_forward` for every other way to store the arguments."""
    args = case.make(sample, torch.float32)
    for layout in list(LAYOUTS)[1:]:
        stored = case.make(sample, torch.float32, layout)
        if any(a.stride() != b.stride() for a, b in zip(tensors_of(args), tensors_of(stored), strict=True)):
            check_forward(case, provider, sample, torch.float32, layout)


def _leaves(case: Case, args: Args) -> tuple[Args, list[str]]:
    """Fresh arguments that require grad where the operator is differentiable, and the names of those."""
    wanted = [
        n
        for n, a in zip(case.names, args)
        if isinstance(a, Tensor) and a.is_floating_point() and n not in (*case.constants, *case.kept)
    ]
    fresh = tuple(
        a.detach().requires_grad_(n in wanted) if isinstance(a, Tensor) else a
        for n, a in zip(case.names, args, strict=True)
    )
    return fresh, wanted


def _gradients(
    case: Case, run: Callable[..., Any], args: Args, pick: list[int], cotangents: list[Tensor]
) -> list[Tensor | None]:
    args, wanted = _leaves(case, args)
    outputs = _tuple(run(*args))
    leaves = [a for n, a in zip(case.names, args) if n in wanted]
    chosen = [outputs[i] for i in pick]
    found = torch.autograd.grad(chosen, leaves, [c.to(o) for c, o in zip(cotangents, chosen)], allow_unused=True)
    return [g if g is None else g.cpu() for g in found]


def check_gradient(case: Case, provider: Provider, sample: Sample, dtype: torch.dtype) -> None:
    """The registered backward against autograd through the reference, for a random cotangent and that of a sum."""
    context = Context(case, provider.name, sample.name, dtype)
    args = case.make(sample, dtype)
    on_device = tuple(a.to(provider.device) if isinstance(a, Tensor) else a for a in args)
    probe, wanted = _leaves(case, on_device)
    outputs = provider(*probe)
    pick = [i for i, o in enumerate(outputs) if o.requires_grad]
    assert pick, f"{context}: no output requires grad"
    random = Random(f"cotangent of {sample.name}")
    scales: dict[str, float] = {}
    for kind in ("random", "sum"):
        # rounded to the dtype first, so that all three computations see the same numbers
        cotangents = [
            random.normal(*outputs[i].shape).to(outputs[i].dtype)
            if kind == "random"
            else torch.ones(()).expand(outputs[i].shape)
            for i in pick
        ]
        o = _gradients(case, provider, on_device, pick, cotangents)
        r = _gradients(case, case.operator.reference, case.in_fp64(args), pick, cotangents)
        t = _gradients(case, case.operator.reference, args, pick, cotangents)
        for i, (name, o_i, r_i, t_i) in enumerate(zip(wanted, o, r, t, strict=True)):
            where = f"{context}: gradient of {name} ({kind} cotangent)"
            assert (o_i is None) == (r_i is None), (
                f"{where} is {'missing' if o_i is None else 'there'}, unlike the reference's"
            )
            if o_i is not None and r_i is not None and t_i is not None:
                scales[name] = max(scales.get(name, 0.0), largest(r_i))
                scale = case.roundings(name, o_i.dtype) * scales[name]

                def draw(k: int, i: int = i, cotangents: list[Tensor] = cotangents) -> tuple[Tensor, Tensor]:
                    other = case.make(sample, dtype, draw=k)
                    exact = _gradients(case, case.operator.reference, case.in_fp64(other), pick, cotangents)[i]
                    plain = _gradients(case, case.operator.reference, other, pick, cotangents)[i]
                    assert exact is not None and plain is not None
                    return exact, plain

                check_close(where, o_i, r_i, t_i, factor=3, scale=scale, again=draw)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the compiler's own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_opcheck(case: Case, sample: Sample) -> None:
    """Schema, autograd registration, fake and AOT dispatch, by PyTorch's own test."""
    args, _ = _leaves(case, case.make(sample, torch.float32))
    if not isinstance(case.operator.backward, Backward) or case.operator.backward.operator == "refused":
        args = case.make(sample, torch.float32)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if case.operator.name == "gated_conv2d_backward" and TORCH < (2, 13):
        # There the second derivative of any convolution cannot be traced with symbolic sizes (pytorch #181175).
        tests[-1] = "test_aot_dispatch_static"
    with quiet():
        torch.library.opcheck(case.operator.overload, args, test_utils=tests)


def _differentiable(case: Case, args: Args) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The operator as a function of its differentiable arguments alone, as gradcheck wants it."""
    args, wanted = _leaves(case, args)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        values = iter(leaves)
        outputs = _tuple(
            case.operator.overload(*(next(values) if n in wanted else a for n, a in zip(case.names, args)))
        )
        return tuple(o for o in outputs if o.requires_grad)

    return function, [a for n, a in zip(case.names, args) if n in wanted]


def check_gradcheck(case: Case, sample: Sample) -> None:
    """The gradient against finite differences, in fp64; of tables, along random directions."""
    function, leaves = _differentiable(case, case.make(sample, torch.float64))
    large = any(t.numel() > 1000 for t in (*leaves, *function(*leaves)))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=large)


def check_gradgradcheck(case: Case, sample: Sample) -> None:
    """The gradient of the gradient, along random directions (``fast_mode``): entry by entry it would take minutes."""
    function, leaves = _differentiable(case, case.make(sample, torch.float64))
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def check_second_refused(case: Case, sample: Sample) -> None:
    """A second derivative raises a sentence with the reason."""
    function, leaves = _differentiable(case, case.make(sample, torch.float64))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    (first, *_) = torch.autograd.grad(sum(o.square().sum() for o in function(*leaves)), leaves, create_graph=True)
    reason = re.escape(f"{case.operator.name}: there are no {case.operator.double_backward}")
    with pytest.raises(RuntimeError, match=f"^{reason}$"):
        first.square().sum().backward()


def check_compile(case: Case, samples: Sequence[Sample], dynamic: bool, backend: str = "inductor") -> None:
    """One graph, the bits of eager, and no second compilation: for the same sizes, or (dynamic) for any."""
    operator = case.operator
    # (of a backward operator the forward alone: its own backward is plain torch, not a kernel)
    differentiable = isinstance(operator.backward, Backward) and not operator.name.endswith("_backward")
    calls = [case.make(s, torch.float32) for s in samples]
    calls = calls if dynamic else [calls[0]] * 2

    def step(args: Args, run: Callable[..., Any]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        args, wanted = _leaves(case, args) if differentiable else (args, [])
        outputs = functional(operator, run)(*args)
        loss = sum(o.sum() for o in outputs if o.requires_grad)
        leaves = [a for n, a in zip(case.names, args) if n in wanted]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if differentiable else ()
        return outputs, [g for g in grads if g is not None]

    def call(*args: Any) -> Any:
        return operator(*args)

    torch._dynamo.reset()
    # Duck shapes off: sizes that happen to be equal in a tiny sample are not taken to be equal always.
    shapes = torch.fx.experimental._config.patch(use_duck_shape=False)
    with quiet(), shapes, torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=backend)
        for sample, args in zip(samples, calls, strict=True):
            context = Context(case, f"torch.compile(dynamic={dynamic}, {backend})", sample.name)
            (outputs, grads), (eager, eager_grads) = step(args, compiled), step(args, operator)
            check_repeats(context, lambda eager=eager: eager, outputs, "under compilation")
            # close, not equal: Inductor fuses the arithmetic around the operators
            torch.testing.assert_close(
                grads, eager_grads, msg=lambda message, where=context: f"{where}: gradients: {message}"
            )


def check_autocast(case: Case, sample: Sample) -> None:
    """Under autocast the operator does what it does on arguments cast by its own rule."""
    rule = case.operator.autocast
    for dtype in (torch.float32, torch.bfloat16):
        if isinstance(case.operator.cpu, tuple) and torch.float64 in case.operator.cpu and dtype == torch.bfloat16:
            continue  # an operator of wide floats alone
        context = Context(case, "autocast", sample.name, dtype)
        args = case.make(sample, dtype)
        target = {None: dtype, "lower": torch.bfloat16}.get(rule, rule)
        cast = (
            case.make(sample, dtype)
            if rule is None
            else tuple(a.to(target) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = case.public(*args)
        check_repeats(context, lambda cast=cast: case.public(*cast), outputs, "under autocast")


def check_counts(case: Case, sample: Sample) -> None:
    """The FLOP formula is registered with PyTorch's counter, and both formulas give a sensible number."""
    operator, args = case.operator, case.make(sample, torch.float32)
    if operator.flops is not None:
        with FlopCounterMode(display=False) as counter:
            case.public(*args)
        assert counter.get_total_flops() == operator.flops(*args) > 0
    if operator.bytes is not None:
        total = sum(a.numel() * a.element_size() for a in tensors_of((*args, *case.public(*args))))
        assert 0 < operator.bytes(*args) <= 4 * total


# --------------------------------------------------------------------------------------------- what tests use


def check_op(
    operator: str,
    samples: Sequence[Sample],
    *,
    tiny: Sequence[Sample],
    constants: Sequence[str] = (),
    wide: Sequence[str] = (),
    kept: Sequence[str] = (),
    sums: Sequence[str] | Mapping[str, int] = (),
    dtypes: Sequence[torch.dtype] = FLOATS,
    decided_by: Callable[..., dict[str, Tensor]] | None = None,
    condition: int = 1,
    straight_through: bool = False,
    by_library: bool = False,
) -> list[Any]:
    """All checks of one operator, as pytest parameters: each is a function without arguments.

    Args:
        operator: its name in ``cofire.registry.OPERATORS``.
        samples: run through the cheap checks in every dtype. The first should be small and general: in the interpreter
            it alone is run in every dtype and layout in the first tier, the next in every layout in the second; all others
            in fp32 and one 16-bit type, and those of the second tier only in fp32.
        tiny: two samples, same options and other sizes (2 or more), for the dear checks.
        constants: float arguments that have no gradient.
        wide: float arguments that stay in fp32 when the input has 16 bits.
        kept: float arguments that keep the dtype that the sample gives them, and have no gradient.
        sums: outputs, and arguments with respect to their gradients, that are fp32 sums over many values. As a mapping:
            how many roundings of the result they may cost.
        dtypes: of the float arguments. An operator without float arguments is run once.
        decided_by: ``decided_by(args, outputs)`` gives, by name, the outputs that follow from a float output of the
            call.
        condition: by how much the samples amplify a rounding on the way. In fp64 that is multiplied to the bound:
            elsewhere the difference between the references shows it.
        straight_through: the gradient passes through a rounding, so that finite differences of the operator say nothing
            about it: the test file has its own, of the function with its rounding frozen.
        by_library: the kernel's products are the library's GEMMs, which promise no equal results for any number of
            threads (on some processors they give them).
    """
    roundings = sums if isinstance(sums, Mapping) else dict.fromkeys(sums, 16)
    kinds = (tuple(constants), tuple(wide), tuple(kept))
    case = Case(OPERATORS[operator], *kinds, roundings, decided_by, condition, straight_through, by_library)
    return [*_cheap(case, samples, dtypes), *_dear(case, tiny)]


def _param(check: Callable[..., None], *args: Any, id: Sequence[str], marks: Sequence[Any] = ()) -> Any:
    return pytest.param(functools.partial(check, *args), id="-".join(id), marks=marks)


def _cheap(case: Case, samples: Sequence[Sample], dtypes: Sequence[torch.dtype]) -> Iterator[Any]:
    name = case.operator.name
    # The backward of a backward operator is its reference: gradcheck on the tiny samples is enough for it.
    differentiable = isinstance(case.operator.backward, Backward) and not name.endswith("_backward")
    for provider in providers(case.operator):
        for i, sample in enumerate(samples):
            interpreted = provider.name == "triton"
            if interpreted and not sample.interpreted:
                continue
            once = interpreted and sample.full  # seconds each: in fp32, as it is
            those = [torch.float32] if once else _dtypes_of(case, sample, dtypes, provider)
            if interpreted and i > 0:  # one of the 16-bit types in turn
                those = [d for d in those if d not in HALVES or d == HALVES[i % 2]]
            for dtype in those:
                later = sample.full or (interpreted and i > 0 and dtype != torch.float32)
                marks = [*provider.marks, *([pytest.mark.full] if later else [])]
                id = (name, provider.name, sample.name, str(dtype).removeprefix("torch."))
                yield _param(check_forward, case, provider, sample, dtype, id=("forward", *id), marks=marks)
                # not in fp64, where rounding is all there is to compare: that is gradcheck's work
                smooth = dtype == torch.float32 or (dtype.itemsize == 2 and not sample.kink)
                if differentiable and provider.name in ("cpu", "cuda") and smooth:
                    yield _param(check_gradient, case, provider, sample, dtype, id=("gradient", *id), marks=marks)
            if provider.name != "reference" and not once and not (interpreted and i > 1):
                later = sample.full or (interpreted and i > 0)
                marks = [*provider.marks, *([pytest.mark.full] if later else [])]
                yield _param(
                    check_layouts, case, provider, sample, id=("layouts", name, provider.name, sample.name), marks=marks
                )


def _dtypes_of(case: Case, sample: Sample, dtypes: Sequence[torch.dtype], provider: Provider) -> list[torch.dtype]:
    """Those the provider covers; for a sample without floats there is nothing to vary."""
    args = sample.make(Random(sample.name))
    typed = any(
        x.is_floating_point() and name not in case.kept
        for name, a in zip(case.names, args, strict=True)
        for x in tensors_of([a])
    )
    return [d for d in (*dtypes, torch.float64) if d in provider.dtypes] if typed else [torch.float32]


def _dear(case: Case, tiny: Sequence[Sample]) -> Iterator[Any]:
    name = case.operator.name
    for sample in tiny[:1]:
        yield _param(check_autocast, case, sample, id=("autocast", name, sample.name))
        yield _param(check_counts, case, sample, id=("counts", name, sample.name))
        yield _param(check_opcheck, case, sample, id=("opcheck", name, sample.name))
        if isinstance(case.operator.backward, Backward) and case.operator.backward.operator != "refused":
            if not case.straight_through:
                yield _param(check_gradcheck, case, sample, id=("gradcheck", name, sample.name))
            if isinstance(case.operator.double_backward, str):
                yield _param(check_second_refused, case, sample, id=("second", name, sample.name))
            elif case.operator.double_backward:
                yield _param(check_gradgradcheck, case, sample, id=("gradgradcheck", name, sample.name))
    for dynamic in (False, True) if tiny else ():
        id = ("compile", name, "dynamic" if dynamic else "static")
        yield _param(check_compile, case, tiny, dynamic, id=id)


@dataclass(frozen=True)
class Refusal:
    """A bad call and the sentence it must raise, in eager and while tracing."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    sentence: str
    data: bool = False  #: the fault is in the values, which tracing cannot see


def check_refusal(refusal: Refusal, tracing: bool) -> None:
    with FakeTensorMode() if tracing else quiet(), pytest.raises(refusal.error) as caught:
        refusal.call()
    assert str(caught.value) == refusal.sentence


def refusals(cases: Sequence[Refusal]) -> list[Any]:
    """Each bad call in eager and under FakeTensorMode, as pytest parameters."""
    modes = [(r, tracing) for r in cases for tracing in (False, True) if not (tracing and r.data)]
    return [_param(check_refusal, r, tracing, id=(r.name, "fake" if tracing else "eager")) for r, tracing in modes]


def check_examples(module: Any) -> None:
    """The examples in the docstrings of a module's public functions: each function has some, and they are right."""
    finder, runner = (
        doctest.DocTestFinder(recurse=False),
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE),
    )
    for name in module.__all__:
        tests = finder.find(getattr(module, name), name, globs=dict(vars(module)))
        assert tests and tests[0].examples, f"{name}: its docstring has no example"
        report: list[str] = []
        runner.run(tests[0], out=report.append)
        assert not report, "".join(report)


def check_plots(folder: Path, *names: str) -> None:
    """Drawings are there; skipped where there is no matplotlib to draw them."""
    pytest.importorskip("matplotlib")
    for name in names:
        assert (folder / name).stat().st_size > 1000, f"{name} holds no drawing"


def stored_bytes(model: torch.nn.Module) -> int:
    """Of the model's state, but for the few numbers that say how packed weights are divided."""
    state = model.state_dict().items()
    return sum(x.numel() * x.element_size() for name, x in state if not name.endswith("geometry"))
