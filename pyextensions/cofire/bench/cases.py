# SPDX-License-Identifier: Apache-2.0
"""What a benchmark case is. A family adds a module ``cofire.bench.<family>`` with a list ``CASES``, nothing else."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cofire.names import near_matches
from cofire.registry import OPERATORS

if TYPE_CHECKING:
    from cofire.bench.peers import Peer

Args = tuple[Any, ...]
Run = Callable[[], Any]


class Random:
    """The source of a case's inputs, seeded by the case's name: on every machine the same values."""

    def __init__(self, name: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def mask(self, rows: int, columns: int, density: float) -> Tensor:
        """Each row its own; at least one entry is set."""
        chance = self.uniform(rows, columns)
        return (chance < density) | (chance == chance.amin(1, keepdim=True))


@dataclass(frozen=True)
class Provider:
    """One way to compute an operator. ``setup(*args)`` prepares (packs weights, say) and returns the call to time."""

    setup: Callable[..., Run]
    arrange: Callable[..., Args] | None = None  #: arguments in another memory layout, before they become leaves
    reference: Callable[..., Any] | None = None  #: for a bound that computes something else: its own maths
    #: of gradients in which its way of summing loses more than the check allows: its own maths, whose rounding counts there.
    #: Forward, and all of it on the tiny input, are compared with the operator's reference.
    gradient_reference: Callable[..., Any] | None = None
    outputs: int | None = None  #: how many of the operator's outputs it gives (default: all)
    differentiable: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    expansion: float = 1.0  #: bytes that it keeps of the cold weights, by theirs: how many copies defeat the caches
    hot: bool = (
        False  #: prepares nothing and reads no less than others: the modes on cold and on new weights leave it out
    )
    first: bool = True  #: whether weights can be new to it: otherwise the mode on new weights leaves it out
    own_threads: bool = False  #: computes on threads of its own, which may spin on when a call is over


def installed(name: str) -> bool:
    """Whether a peer's package is there; nothing is imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def plain(function: Callable[..., Any], **options: Any) -> Provider:
    """A provider that is one function of the operator's arguments."""
    return Provider(lambda *args: functools.partial(function, *args), **options)


def compiled(function: Callable[..., Any], **options: Any) -> Provider:
    """``torch.compile`` of one function of the operator's arguments, for these very shapes."""

    def setup(*args: Any) -> Run:
        return functools.partial(torch.compile(function, dynamic=False), *args)

    return Provider(setup, **options)


def one_thread(provider: Provider) -> Provider:
    """The same calls without the help of other threads: what parallelism gains."""

    def setup(*args: Any) -> Run:
        run = provider.setup(*args)

        def call() -> Any:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return run()
            finally:
                torch.set_num_threads(threads)

        return call

    return Provider(setup, devices=("cpu",))


@dataclass(frozen=True)
class Case:
    """An operator on one input, with everything it is compared with.

    The operator itself (``"cofire"``) is added by the harness. Other names: ``"eager"`` (the expression as users write
    it), ``"dense"`` (the strongest plain torch), ``"compile"`` and ``"peer:<name>"``. A name may stand for several
    candidates ``{variant: provider}``; the fastest of them, measured, is the row.
    """

    op: str
    name: str  #: the shape of a real model and the options, as the tables show them
    dtype: torch.dtype
    make_args: Callable[[Random], Args]  #: in the schema's order, on the CPU, random, never all zero
    providers: Mapping[str, Provider | Mapping[str, Provider]]
    tiny: Callable[[Random], Args]  #: the same with small shapes: for tests, and to time the overhead of a call
    quick: bool = False
    gradients: tuple[int, ...] = ()  #: what to differentiate by, by position; adds the mode ``forward+backward``
    cold: tuple[int, ...] = ()  #: positions of the weights to rotate through memory; adds the mode ``forward, cold``
    hot: bool = True  #: False: with the weights cold alone, as inference meets them, and without the mode ``forward``
    #: the operator's representative: adds the mode ``overhead``, the time of one call on the tiny input, and to
    #: ``forward`` the time on one thread
    overhead: bool = False
    #: adds the mode ``first call``: weights (those of ``cold``) that were never seen, from their setup to the answer
    first: bool = False
    arithmetic: str | None = None  #: the dtype whose peak is the limit, where it is not that of the activations
    flops: Callable[..., int] | None = None  #: the arithmetic that this input needs (default: the operator's formula)
    #: another way to count it, where that takes more but in a dtype that may be faster: the dtype, and a formula for forward
    or_flops: tuple[str, Callable[..., int]] | None = None
    compared: Callable[[tuple[Tensor, ...], Args], tuple[Tensor, ...]] | None = (
        None  #: the part of an answer that callers read
    )
    backward_cost: Callable[..., tuple[int, int]] | None = None  #: default: twice the forward
    #: the same maths as the operator's reference, for inputs on which that would not fit into memory
    reference: Callable[..., Any] | None = None
    #: the dtype whose rounding an answer may have, where the operator is asked for less than its input's
    rounding: torch.dtype | None = None
    bits: tuple[int, ...] = ()  #: positions of what is read bit by bit: the fp64 reference gets it as it is
    ours: Provider | None = None  #: what stands as "cofire": the operator (the default), or what is built on it
    #: what a peer decides by whether it computes the case, and how: shapes, bits, formats, as the family names them
    facts: Mapping[str, Any] = field(default_factory=dict)
    peers: tuple[Peer, ...] = ()  #: from outside, beside those of :mod:`cofire.bench.peers`
    family: str = ""

    def __str__(self) -> str:
        return f"{self.op}, {self.name}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def modes(self) -> list[str]:
        found = ["forward"] if self.hot or not self.cold else []
        found += ["forward, cold"] if self.cold else []
        found += ["first call"] if self.first else []
        found += ["forward+backward"] if self.gradients else []
        return found + (["overhead"] if self.overhead else [])

    def cost(self, args: Args, mode: str) -> tuple[int, int]:
        """The fewest bytes and FLOPs that this input needs, whoever computes it."""
        operator = OPERATORS[self.op]
        moved = operator.bytes(*args) if operator.bytes is not None else 0
        formula = self.flops or operator.flops
        flops = formula(*args) if formula is not None else 0
        if mode != "forward+backward":
            return moved, flops
        more = self.backward_cost(*args) if self.backward_cost is not None else (2 * moved, 2 * flops)
        return moved + more[0], flops + more[1]

    def other_cost(self, args: Args, mode: str) -> tuple[str, int] | None:
        """The dtype of ``or_flops`` and its count, of which a backward takes as many times more as of ``flops``."""
        if self.or_flops is None:
            return None
        dtype, formula = self.or_flops
        once, all_of = (self.cost(args, which)[1] for which in ("forward", mode))
        return dtype, formula(*args) * all_of // max(once, 1)

    def footprint(self, args: Args, moved: int) -> int:
        """The bytes of memory that so many moved ones lie in: what is written where it was read counts once."""
        written = (args[i] for i in OPERATORS[self.op].mutated)
        twice = sum(a.numel() * a.element_size() for a in written if isinstance(a, Tensor))
        return max(moved - twice, -(-moved // 2))


def families() -> list[str]:
    """The operator families that have benchmark cases."""
    names = sorted({o.family for o in OPERATORS.values()})
    return [n for n in names if importlib.util.find_spec(f"cofire.bench.{n}") is not None]


def of_family(family: str) -> list[Case]:
    """All cases of a family."""
    (name,) = known("family", [family], families())
    module = importlib.import_module(f"cofire.bench.{name}")
    return [replace(case, family=name) for case in module.CASES]


def known(kind: str, wanted: Iterable[str], known: Sequence[str]) -> list[str]:
    wanted = list(wanted)
    for name in wanted:
        if name not in known:
            raise ValueError(f"bench: no {kind} is called {name!r}{near_matches(name, known)}")
    return wanted


def select(
    chosen_families: Sequence[str] | None, quick: bool, ops: Sequence[str] | None, names: Sequence[str] | None
) -> list[Case]:
    """The cases asked for. ``names`` are parts of case names; asking for one by name overrides ``quick``."""
    chosen = known("family", chosen_families or families(), families())
    found = [case for family in chosen for case in of_family(family)]
    if ops:
        known("operator with a benchmark", ops, sorted({c.op for c in found}))
        found = [c for c in found if c.op in ops]
    if names:
        for name in names:
            if not any(name in str(c) for c in found):
                known("case", [name], [str(c) for c in found])
        return [c for c in found if any(name in str(c) for name in names)]
    return [c for c in found if c.quick] if quick else found
