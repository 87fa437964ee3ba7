# SPDX-License-Identifier: Apache-2.0
"""Measuring: every provider of a case is checked on that very input, then all are timed in turn, in one process.

How a number comes about:

* A provider that does not agree with the fp64 reference (:func:`disagreement`) gets no number. cofire has to keep to
  the rule of its own tests, the others may be :func:`slack` times less exact.
* Providers take turns, each round starts with another one, at least 30 rounds (7 in a quick run, and where 30 would take
  more than five seconds, on a GPU two). A provider whose reading lasts 100 ms and ten times as long as the shortest takes
  part in the first 7 alone, in the first 3 where it lasts longer than half a second, in none after a call of 3 s.
  A row's time is the median over rounds; its speed-up is the median of the rounds' ratios to ``dense``, with a 95 %
  interval that assumes nothing about their distribution (:func:`median_interval`); of fewer than six ``pairs``, which have
  none, ``speedup_low`` and ``speedup_high`` are the least and the largest ratio. ``vs_cofire`` is how many times as long as
  cofire it took, the median of the rounds' ratios too.
* Of a provider that has several variants the fastest is timed, in each mode by itself: with cold weights it may be another
  one than with hot ones.
* Calls shorter than 1 ms (on a GPU 0.2 ms) are repeated within one reading. A short call runs once untimed before it, so
  that it finds the caches and the threads as its own last call left them, not as another provider did; ``forward, cold``
  is the mode that looks at cold weights, and ``first call`` the one that times what is done to a weight before its first
  answer. Forward runs under ``torch.inference_mode``.
* Memory that a call frees stays with the process (:func:`cofire.bench.machine.settled`), so that the next call does not
  wait for new pages. By itself glibc keeps it or not, as what lies beside it happens to be in use.
* Providers with threads of their own are kept apart from the others by a pause (:data:`SETTLE_SECONDS`).
* Fixed work, the probe, is timed before, between and after the readings of every case (:mod:`cofire.bench.quiet`). A round
  counts if the machine ran as usual before and after it, by 10 %, and a case goes on a little longer until there are
  enough of them; memory, which others share, is not asked of a call whose data fit into half the last cache, nor that cache
  of one whose data fit into a core's second-level cache. Row by row ``unfelt`` says what was not asked.
  Where there are too few, all rounds count and the row is ``flagged``; it is noisy, as is a row whose own readings spread
  by half.
* Where cofire's own answer is wrong the case is not timed, and the run says so at its end.
* ``bytes`` and ``flops`` are what the input needs at least, the same for all providers, so that GFLOP/s of a dense
  provider are effective ones. ``peak_bytes`` is what a call holds of torch's allocator at most, outputs included.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cofire.bench import ceilings as roofs
from cofire.bench import cuda_timing, machine, resume
from cofire.bench.cases import Args, Case, Provider, Random, Run, known, one_thread, plain, select
from cofire.bench.ceilings import cold_bytes
from cofire.bench.peers import of_case, with_peers
from cofire.bench.quiet import BAND, LEAST, Probe, Watch, counted, unfelt
from cofire.bench.results import UNCOMPARED, Results, Row, environment, results_path
from cofire.native import in_large_pages
from cofire.registry import OPERATORS

#: A shorter call is repeated until a reading lasts this long. Events on a GPU resolve half a microsecond.
READING_MS = {"cpu": 1.0, "cuda": 0.2}
ONE_THREAD = "peer:cofire-on-one-thread"
SHORT_MS = 3.0  #: a shorter call runs once, untimed, before each of its readings
#: Threads that wait for work spin, on the cores of those whose turn it is next: those of torch for 10 ms, those of ONNX
#: Runtime for 60. Between different pools there is a pause after which they sleep, and an untimed reading that wakes others.
SETTLE_SECONDS = 0.1
#: A reading of so many ms that is so many times the shortest is slow: it takes part in the first few rounds alone.
SLOW_MS, SLOW_TIMES, LEAST_ROUNDS = 100.0, 10.0, 7
LONG_MS, LONG_ROUNDS = 500.0, 3  #: of a slow reading that lasts longer there are fewer, and it is not warmed up twice
ONCE_MS = 3000.0  #: a slow call that lasts longer is timed once, after that of its check
BEHIND = 2.0  #: a variant that takes so many times as long as another one is not timed again
FAR_BEHIND = 4.0  #: so far behind with hot weights, it is not tried with cold ones
LONGEST_SECONDS = 5  #: where the least rounds of the others take longer there are fewer, but :data:`LEAST_ROUNDS`
LONGER = 4  #: times the rounds that fit are the most, while too few of them were undisturbed
SPREAD = 1.5  #: p80 / p20 of a row's own readings that makes it noisy


class Effort:
    """How long to measure: full, or quick. A GPU repeats itself within a per cent: the least rounds are enough for it."""

    def __init__(self, quick: bool, device: str = "cpu") -> None:
        short = quick or device == "cuda"
        self.least_rounds = 7 if quick else 30
        self.most_rounds = 30 if short else 100
        self.case_seconds = 0.2 if short else 1.0
        self.variant_seconds = 0.03 if short else 0.1  #: to find the fastest of a provider's variants
        self.copying_seconds = 0.3 if short else 5.0  #: after which no other variant gets copies of cold weights
        self.longest_seconds = 2.0 if short else LONGEST_SECONDS
        self.slow_rounds = 3 if quick else LEAST_ROUNDS
        self.ceiling_seconds = 0.02 if quick else 0.2
        self.extra_seconds = 0.2 if short else 1.0  #: to find enough rounds in which the machine was quiet


# ---------------------------------------------------------------------------------------------- correctness


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _detached(output: Any) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in _tensors(output))


def _moved(a: Any, device: str) -> Any:
    """An argument, which may be a list of tensors, on a device."""
    if isinstance(a, list):
        return [_moved(x, device) for x in a]
    return a.to(device) if isinstance(a, Tensor) else a


def _in_fp64(args: Args, bits: Sequence[int] = ()) -> Args:
    return tuple(
        a.double() if isinstance(a, Tensor) and a.is_floating_point() and i not in bits else a
        for i, a in enumerate(args)
    )


def _layouts(args: Args) -> list[Args]:
    """The arguments as they are and, where there are maps, with maps in channels_last."""
    if not any(isinstance(a, Tensor) and a.dim() == 4 for a in args):
        return [args]
    last = torch.channels_last
    return [
        args,
        tuple(a.contiguous(memory_format=last) if isinstance(a, Tensor) and a.dim() == 4 else a for a in args),
    ]


def slack(provider: str) -> int:
    """How many times the error of the rule a provider may have.

    cofire keeps to the rule. The others may be less exact than the reference, as some of torch's own operators are
    (batch norm in channels_last, 128x256x16x16, 4 times): to refuse them for rounding would hide the comparison.
    """
    return 1 if provider == "cofire" else 16


COMPARED = 1 << 17  #: entries that are compared at a time: they and their differences stay in the caches


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same entries of each, a block at a time."""
    if tensors[0].numel() <= COMPARED:
        yield tensors
    else:
        yield from zip(*(t.reshape(-1).split(COMPARED) for t in tensors))


def _furthest(a: Tensor, b: Tensor) -> float:
    """The largest difference, in fp64; NaN where there is one."""
    return float(torch.stack([(x.double() - y).abs_().max() for x, y in _blocks(a, b)]).max())


def _largest(a: Tensor) -> float:
    return float(torch.stack([x.abs().max() for (x,) in _blocks(a)]).max())


class Answers(list[tuple[Tensor, ...]]):
    """The right answer in fp64, then plain answers; what each output loses is worked out once, for all providers."""

    def __init__(
        self, answers: Iterable[tuple[Tensor, ...]], whole: Answers | None = None, positions: Sequence[int] = ()
    ) -> None:
        super().__init__(answers)
        self.whole, self.positions = whole, positions
        self._lost: dict[int, tuple[float, float]] = {}

    def lost(self, i: int) -> tuple[float, float]:
        """The largest error of the plain answers in output i, and the largest magnitude of the right one."""
        if self.whole is not None:
            return self.whole.lost(self.positions[i])
        if i not in self._lost:
            right, *others = (a[i] for a in self)
            self._lost[i] = max(_furthest(o, right) for o in others), _largest(right)
        return self._lost[i]

    def pick(self, positions: Sequence[int]) -> Answers:
        """These outputs alone."""
        return Answers((tuple(a[i] for i in positions) for a in self), self, positions)


def disagreement(
    got: Any, exact: Any, plain_answers: Sequence[Any], dtype: torch.dtype, gradients: int = 0, slack: int = 1
) -> str | None:
    """Why an answer is wrong, or None. Floats: ``max|o - r| <= 2 max|t - r| + eps(dtype) max|r|``; others: equal.

    Args:
        got: what the provider returned, o.
        exact: the reference in fp64, r.
        plain_answers: the reference in the input's dtype, in each memory layout. t is the least exact of them: a layout
            changes the order of a sum, and an order that torch itself takes is nobody's fault.
        dtype: the input's. An fp32 by-product of a bf16 computation may be as wrong as bf16 is.
        gradients: how many of the last outputs are gradients; they may lose 3 times what t loses.
        slack: multiplies what is allowed (:func:`slack`).
    """
    return _disagreement(got, Answers([_detached(exact), *map(_detached, plain_answers)]), dtype, gradients, slack)


def _disagreement(got: Any, answers: Answers, dtype: torch.dtype, gradients: int, slack: int) -> str | None:
    got, exact = _detached(got), answers[0]
    if len(got) != len(exact):
        return f"returned {len(got)} outputs, expected {len(exact)}"
    for i, (o, r) in enumerate(zip(got, exact)):
        if o.shape != r.shape:
            return f"output {i} has shape {list(o.shape)}, expected {list(r.shape)}"
        if not r.is_floating_point():
            if not torch.equal(o.to(r.dtype), r):
                return f"output {i} differs in {int((o.to(r.dtype) != r).sum())} entries"
            continue
        if not r.numel():
            continue
        factor = 3 if i >= len(exact) - gradients else 2
        lost, largest = answers.lost(i)
        eps = max(torch.finfo(d).eps for d in (answers[1][i].dtype, dtype) if d.is_floating_point)
        allowed = slack * (factor * lost + eps * largest)
        error = _furthest(o, r)
        if not error <= allowed:  # a NaN is an error too
            return f"output {i} is off by {error:.3g}, allowed {allowed:.3g}"
    return None


# ------------------------------------------------------------------------------------------------ statistics


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None, float | None]:
    """Median and its confidence interval by order statistics: exact for any distribution, from the binomial law.

    With too few values for the confidence asked (fewer than 6 for 95 %) there is no interval, and its ends are None: the
    whole range would be too short.
    """
    ordered, n = sorted(values), len(values)
    below, rank = 0.0, 0
    while rank < n // 2:  # the largest rank whose tail, on each side, stays below half of what may be lost
        below += math.comb(n, rank) / 2**n
        if below > (1 - confidence) / 2:
            break
        rank += 1
    if not rank:
        return statistics.median(ordered), None, None
    return statistics.median(ordered), ordered[rank - 1], ordered[n - rank]


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


# ---------------------------------------------------------------------------------------------------- timing


def read_ms(run: Run, repeats: int, device: str) -> float:
    """One reading: milliseconds per call. CUDA: by events on the current stream, the host running ahead."""
    if device == "cuda":
        return cuda_timing.read_ms(run, repeats)
    begin = time.perf_counter_ns()
    for _ in range(repeats):
        run()
    return (time.perf_counter_ns() - begin) / repeats / 1e6


def _warm_up(run: Run, device: str) -> float:
    """Milliseconds of a warm call."""
    first = read_ms(run, 1, device)
    if first > LONG_MS:
        return first
    if first > SLOW_MS:  # so long a call leaves little to warm up
        return min(first, read_ms(run, 1, device))
    run()
    return min(read_ms(run, 1, device) for _ in range(2))


def read_in_turns(
    runs: Mapping[str, Run],
    device: str,
    seconds: float,
    least: int,
    most: int,
    own_threads: Collection[str] = (),
    *,
    longest_seconds: float = LONGEST_SECONDS,
    slow_rounds: int = LEAST_ROUNDS,
    watch: Watch | None = None,
    extra_seconds: float = 0.0,
    expected: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Readings in ms of each run, one per round, in as many rounds as fit; of slow runs in the first few.

    ``own_threads`` names the runs that do not use torch's threads; ``watch`` looks at the machine between rounds, of which
    there are more, for ``extra_seconds``, until so many as fit were undisturbed; ``expected`` are the times in ms of runs
    that are warm.
    """
    if not runs:
        return {}
    expected = expected or {name: _warm_up(run, device) for name, run in runs.items()}
    repeats = {name: max(1, math.ceil(READING_MS[device] / max(ms, 1e-5))) for name, ms in expected.items()}
    longest = max(SLOW_MS, SLOW_TIMES * min(expected.values(), default=0.0))
    slow = {
        name: min(slow_rounds, LONG_ROUNDS) if ms > LONG_MS else slow_rounds
        for name, ms in expected.items()
        if ms > longest
    }
    round_ms = sum(expected[name] * repeats[name] for name in runs if name not in slow)
    pools = len({name if name in own_threads else None for name in runs})
    round_ms += 1e3 * SETTLE_SECONDS * (pools if pools > 1 else 0)
    least = max(min(least, int(1e3 * longest_seconds / max(round_ms, 1e-3))), min(least, slow_rounds))
    rounds = min(max(least, int(1e3 * seconds / max(round_ms, 1e-3))), most)
    once = {name for name in slow if expected[name] > ONCE_MS}
    readings: dict[str, list[float]] = {name: [expected[name]] if name in once else [] for name in runs}
    names = [name for name in runs if name not in once]
    pool: str | None = None  # whose threads were the last to work
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for i in itertools.count():
            over = i >= rounds
            shift = i % len(names)
            turn = [name for name in names[shift:] + names[:shift] if i < slow.get(name, math.inf)]
            if watch is not None and (watch.due() or i in (rounds, LONGER * rounds)):
                _let_sleep(pool)
                watch.look(i)
                pool = None
                if over:
                    late = time.perf_counter() - begin > 1e-3 * rounds * round_ms + extra_seconds
                    if late or i == LONGER * rounds or len(watch.quiet()) >= min(rounds, least):
                        break
                runs[turn[0]]()  # the caches hold what was looked at
            elif over and watch is None:
                break
            for name in turn:
                before, pool = pool, name if name in own_threads else None
                if before != pool:
                    time.sleep(SETTLE_SECONDS)
                    read_ms(runs[name], repeats[name], device)
                elif expected[name] < SHORT_MS:
                    runs[name]()
                readings[name].append(read_ms(runs[name], repeats[name], device))
    finally:
        gc.enable()
    _let_sleep(pool)
    return readings


def _let_sleep(pool: str | None) -> None:
    """Wait until threads that are not torch's have stopped to spin."""
    if pool is not None:
        time.sleep(SETTLE_SECONDS)


def peak_bytes(run: Run, device: str, warm: bool = False) -> int:
    """The most bytes of torch's allocator in use during a call, above what was in use before it.

    ``warm``: it has been called before, and so made what it makes but once.
    """
    if not warm:
        run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each start and stop on stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = run()
    del output
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# ----------------------------------------------------------------------------------------------------- cases


def _leaves(args: Args, positions: Sequence[int]) -> Args:
    return tuple(a.detach().clone().requires_grad_() if i in positions else a for i, a in enumerate(args))


def _with_backward(run: Run, leaves: list[Tensor]) -> Run:
    """Forward, then the gradients of the first output by the leaves."""
    seeds: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        output = _tensors(run())
        if not seeds:
            random = torch.randn(output[0].shape, generator=torch.Generator().manual_seed(0))
            seeds.append(torch.empty_like(output[0], requires_grad=False).copy_(random))
        return (*output, *torch.autograd.grad(output[0], leaves, seeds[0]))

    return call


def _with_written(run: Run, written: Sequence[Tensor]) -> Run:
    """What the call leaves in the arguments that it writes to comes first, then what it returns."""

    def call() -> tuple[Tensor, ...]:
        output = run()
        return (*written, *(() if output is None else _tensors(output)))

    return call


def prepare(provider: Provider, case: Case, args: Args, mode: str) -> Run:
    """The call to time, for one provider in one mode."""
    if provider.arrange is not None:
        args = provider.arrange(*args)
    mutated = OPERATORS[case.op].mutated
    if mutated:  # each provider writes to tensors of its own
        args = tuple(a.clone() if i in mutated and isinstance(a, Tensor) else a for i, a in enumerate(args))
        written = [args[i] for i in mutated if args[i] is not None]
        return _with_written(provider.setup(*args), written)
    if mode != "forward+backward":
        return provider.setup(*args)
    args = _leaves(args, case.gradients)
    return _with_backward(provider.setup(*args), [args[i] for i in case.gradients])


def mode_context(mode: str) -> AbstractContextManager[Any]:
    """What a mode runs under."""
    return nullcontext() if mode == "forward+backward" else torch.inference_mode()


class Input:
    """A case's arguments on a device, and the answers that its providers are checked with.

    ``every_mode``: all modes of the case will be asked for, so that the gradients may be computed with the first answer.
    """

    def __init__(self, case: Case, device: str, tiny: bool = False, every_mode: bool = False) -> None:
        make = case.tiny if tiny else case.make_args
        made = make(Random(str(case)))
        self.case, self.device, self.tiny = case, device, tiny
        self.together = every_mode and bool(case.gradients) and not OPERATORS[case.op].mutated
        operator = OPERATORS[case.op].reference
        self.reference = operator if tiny or case.reference is None else case.reference
        self.args = tuple(_moved(a, device) for a in made)
        self._known: dict[Any, Answers] = {}
        #: by provider, variant and whether with gradients: verdicts, which hold for all modes that compute the same, ...
        self.verdicts: dict[tuple[str, str, bool], str | None] = {}
        self.ranks: dict[tuple[str, bool], dict[str, float]] = {}  #: ... the times of a provider's variants in ms, ...
        self.calls: dict[tuple[str, str, bool], Run] = {}  #: ... and calls that were prepared for a check, to be timed
        self.cold: dict[tuple[str, str], Run] = {}  #: calls of variants with cold weights, ranked and to be timed

    def _answers(self, reference: Callable[..., Any], mode: str) -> Answers:
        """The reference in fp64, then in the input's dtype in each memory layout."""
        if self.together and mode != "forward+backward" and reference is self.reference:
            both = self._answers(reference, "forward+backward")
            return both.pick(range(len(both[0]) - len(self.case.gradients)))
        key = (reference, mode == "forward+backward")
        if key not in self._known:
            if key[1]:  # the modes come in order: those without gradients are over
                self._known = {k: answers for k, answers in self._known.items() if k[1]}
            with mode_context(mode):
                self._known[key] = Answers(
                    _detached(prepare(plain(reference), self.case, args, mode)())
                    for args in (_in_fp64(self.args, self.case.bits), *_layouts(self.args))
                )
        return self._known[key]

    def check(self, provider: Provider, mode: str, slack: int = 1) -> str | None:
        """Why the provider's answer on this input is wrong, or None; also what it raises, as a sentence."""
        return self.checked(provider, mode, slack)[0]

    def checked(self, provider: Provider, mode: str, slack: int = 1) -> tuple[str | None, Run | None]:
        """What :meth:`check` says, and the call that it was said of, if the provider could prepare one."""
        large = mode == "forward+backward" and not self.tiny
        own = provider.gradient_reference if large else None
        answers = self._answers(own or provider.reference or self.reference, mode)
        gradients = len(self.case.gradients) if mode == "forward+backward" else 0
        if provider.outputs is not None:
            outputs = len(answers[0]) - gradients
            answers = answers.pick([*range(outputs)[: provider.outputs], *range(outputs, len(answers[0]))])
        call = None
        try:
            with mode_context(mode):
                call = prepare(provider, self.case, self.args, mode)
                got = _tensors(call())
            if OPERATORS[self.case.op].mutated:
                got = got[: provider.outputs]
        except Exception as error:  # a peer that cannot run here is reported, and the others go on
            words = str(error).strip() or "no message"
            return f"{type(error).__name__}: {words.splitlines()[0]}", call
        if self.case.compared is not None:
            got = self.case.compared(got, self.args)
            answers = Answers(_detached(self.case.compared(a, self.args)) for a in answers)
        return _disagreement(got, answers, self.case.rounding or self.case.dtype, gradients, slack), call

    def verdict(self, name: str, variant: str, provider: Provider, mode: str) -> str | None:
        """What :meth:`check` says, said once for all modes that compute the same; its call is kept for one of them."""
        key = (name, variant, mode == "forward+backward")
        if key not in self.verdicts:
            for other in [k for k in self.calls if k[2] != key[2]]:
                del self.calls[other]
            self.verdicts[key], call = self.checked(provider, mode, slack(name))
            if self.verdicts[key] is None and call is not None and mode not in ("forward, cold", "first call"):
                self.calls[key] = call
        return self.verdicts[key]

    def call(self, name: str, variant: str, provider: Provider, mode: str) -> Run:
        """The call to time: the one that was checked, where it is still there and the mode asks for no other."""
        key = (name, variant, mode == "forward+backward")
        if mode == "forward, cold" and (name, variant) in self.cold:
            return self.cold[name, variant]
        if mode in ("forward, cold", "first call") or key not in self.calls:
            return self.runs(provider, mode)
        return self.calls[key]

    def runs(self, provider: Provider, mode: str) -> Run:
        """The call to time; for ``forward, cold`` one that takes the next copy of the weights each time, for ``first call``
        one that has a new copy."""

        def new() -> Args:
            return tuple(_copy(a) if i in self.case.cold else a for i, a in enumerate(self.args))

        if mode == "first call":
            return lambda: prepare(provider, self.case, new(), mode)()
        if mode != "forward, cold":
            return prepare(provider, self.case, self.args, mode)
        weights = [self.args[i] for i in self.case.cold]
        size = sum(w.numel() * w.element_size() for w in weights) * provider.expansion
        calls = []
        for _ in range(max(2, math.ceil(cold_bytes(self.device) / size))):
            calls.append(prepare(provider, self.case, new(), mode))
            calls[-1]()  # what is made of a weight at its first use is there when time counts
        turn = itertools.cycle(calls)
        return lambda: next(turn)()


def _copy(weight: Tensor) -> Tensor:
    """Laid out as it is; in large pages where those who make such weights would ask for them."""
    copy = in_large_pages(weight) if weight.is_contiguous() else weight
    return weight.clone() if copy is weight else copy


def candidates(
    case: Case, device: str, mode: str, wanted: Sequence[str] | None, absent: bool = False
) -> dict[str, dict[str, Provider]]:
    """The providers of a case that can run here, each as ``{variant: provider}``; always with ``cofire``.

    ``absent``: those too that cannot (:func:`absentees`).
    """
    ours = case.ours or plain(OPERATORS[case.op])
    every = {"cofire": ours, **case.providers}
    if case.overhead and mode == "forward" and torch.get_num_threads() > 1:
        every[ONE_THREAD] = one_thread(ours)
    every |= {
        name: entry for name, (peer, entry) in of_case(case, device).items() if absent or peer.absence(case) is None
    }
    found = {name: _variants(name, entry, device, mode) for name, entry in every.items() if _is_wanted(name, wanted)}
    return {name: variants for name, variants in found.items() if variants}


def absentees(case: Case, device: str, mode: str, wanted: Sequence[str] | None) -> dict[str, str]:
    """The peers that compute this case and give no number here, and why."""
    return {
        name: why
        for name, (peer, entry) in of_case(case, device).items()
        if _is_wanted(name, wanted) and _variants(name, entry, device, mode) and (why := peer.absence(case)) is not None
    }


def _is_wanted(name: str, wanted: Sequence[str] | None) -> bool:
    return not wanted or name in (*wanted, "dense")


def _variants(name: str, entry: Provider | Mapping[str, Provider], device: str, mode: str) -> dict[str, Provider]:
    """Those that have a place in this mode."""
    if name == "compile" and mode in ("forward, cold", "overhead", "first call"):
        return {}
    return {
        v: p
        for v, p in ({"": entry} if isinstance(entry, Provider) else entry).items()
        if device in p.devices
        and (p.differentiable or mode != "forward+backward")
        and not (p.hot and mode in ("forward, cold", "first call"))
        and (p.first or mode != "first call")
    }


def _work(case: Case, args: Args, mode: str) -> Row:
    """What this input needs at least, whoever computes it."""
    moved, flops = case.cost(args, mode)
    held = case.footprint(args, moved)
    other = case.other_cost(args, mode)
    return {
        "bytes": moved,
        "flops": flops,
        **({"footprint": held} if held < moved else {}),
        **({"or_flops": list(other)} if other is not None else {}),
    }


def _row(case: Case, device: str, mode: str, provider: str, work: Row) -> Row:
    dtype = str(case.dtype).removeprefix("torch.")
    return {
        **({"arithmetic": case.arithmetic} if case.arithmetic is not None else {}),
        "family": case.family,
        "op": case.op,
        "case": case.name,
        "dtype": dtype,
        "device": device,
        "mode": mode,
        "provider": provider,
        "median_ms": None,
        "p20_ms": None,
        "p80_ms": None,
        **work,
        "peak_bytes": None,
        "correct": False,
        "noisy": False,
    }


def _pick(
    name: str, variants: Mapping[str, Provider], input: Input, mode: str, effort: Effort
) -> tuple[str | None, dict[str, float], dict[str, str]]:
    """The fastest correct variant, the times of all in ms, and why the others have none."""
    wrong = {v: reason for v, p in variants.items() if (reason := input.verdict(name, v, p, mode)) is not None}
    right = {v: p for v, p in variants.items() if v not in wrong}
    if len(right) < 2:
        return next(iter(right), None), {}, wrong
    hot = "forward" if mode == "forward, cold" else mode
    key = (name, hot == "forward+backward")
    times = input.ranks.get(key, {}) if hot != "first call" else {}
    if not {*right} <= {*times}:
        with mode_context(mode):
            runs = {v: input.call(name, v, p, hot) for v, p in right.items()}
            times = _rank(runs, "cpu" if mode == "overhead" else input.device, effort.variant_seconds)
        if hot != "first call":
            input.ranks[key] = times
    times = {v: times[v] for v in right}
    if mode == "forward, cold":
        times = _rank_cold(name, right, times, input, effort)
    best = min(times, key=lambda v: times[v])
    for variant in {*right} - {best}:
        input.calls.pop((name, variant, key[1]), None)
    return best, times, wrong


def _rank_cold(
    name: str, variants: Mapping[str, Provider], hot: Mapping[str, float], input: Input, effort: Effort
) -> dict[str, float]:
    """The times in ms with cold weights, of the variants that are not far behind with hot ones; the best one's call is kept.

    To copy and prepare so many weights takes time and memory. The fastest with hot weights come first; when they have taken
    ``effort.copying_seconds`` the others are left out.
    """
    runs: dict[str, Run] = {}
    begin = time.perf_counter()
    with mode_context("forward, cold"):
        for variant in sorted(hot, key=lambda v: hot[v]):
            late = time.perf_counter() - begin > effort.copying_seconds
            if runs and (late or hot[variant] > FAR_BEHIND * min(hot.values())):
                break
            runs[variant] = input.runs(variants[variant], "forward, cold")
        times = _rank(runs, input.device, effort.variant_seconds)
    best = min(times, key=lambda v: times[v])
    input.cold[name, best] = runs[best]
    return times


def _rank(runs: Mapping[str, Run], device: str, seconds: float) -> dict[str, float]:
    """The time of each in ms; of one that is far behind the fastest at once, its first warm call says enough."""
    first = {v: _warm_up(run, device) for v, run in runs.items()}
    shortest = min(first.values())
    close = {v: run for v, run in runs.items() if shortest < READING_MS[device] or first[v] <= BEHIND * shortest}
    if len(close) < 2:
        return first
    expected = {v: first[v] for v in close}
    readings = read_in_turns(close, device, seconds, 2, 15, expected=expected)
    return {**first, **{v: statistics.median(r) for v, r in readings.items()}}


def measure(
    case: Case,
    mode: str,
    device: str,
    effort: Effort,
    wanted: Sequence[str] | None = None,
    *,
    given: Input | None = None,
    probe: Probe | None = None,
) -> list[Row]:
    """All rows of one case in one mode; where cofire itself is wrong its row alone, without a number.

    Args:
        case, mode, device, effort: what to measure, where, and how long.
        wanted: only these providers.
        given: the case's input with the answers known so far, where another mode had it already.
        probe: looks at the machine before, between and after; what it sees stands in the rows.
    """
    input = given if given is not None and mode != "overhead" else Input(case, device, tiny=mode == "overhead")
    work = _work(case, input.args, mode)
    rows: dict[str, Row] = {}
    chosen: dict[str, Provider] = {}
    torch._dynamo.reset()  # compiled code of earlier cases would count against the limit for recompiling
    for name, variants in candidates(case, device, mode, wanted).items():
        rows[name] = row = _row(case, device, mode, name, work)
        best, times, wrong = _pick(name, variants, input, mode, effort)
        if times:
            row["variants_ms"] = times
        if wrong:
            row["note"] = "; ".join(f"{v}: {reason}" if v else reason for v, reason in wrong.items())
        if best is not None:
            row["correct"], chosen[name] = True, variants[best]
            if best:
                row["variant"] = best
        elif name == "cofire":
            return [row]
    own = {name for name, p in chosen.items() if p.own_threads}
    with mode_context(mode):
        runs = {name: input.call(name, rows[name].get("variant", ""), p, mode) for name, p in chosen.items()}
        input.calls.clear()
        input.cold.clear()
        clock = "cpu" if mode == "overhead" else device  # what a call costs the host, whoever computes
        besides = _unfelt(case, _row(case, device, mode, "cofire", work))
        watch = Watch(probe, besides) if probe is not None else None
        readings = read_in_turns(
            *(runs, clock, effort.case_seconds, effort.least_rounds, effort.most_rounds, own),
            longest_seconds=effort.longest_seconds,
            slow_rounds=effort.slow_rounds,
            watch=watch,
            extra_seconds=effort.extra_seconds,
        )
        for name, run in runs.items():
            rows[name]["peak_bytes"] = peak_bytes(run, device, warm=True)
            _fill(rows[name], readings[name], readings, watch, _unfelt(case, rows[name]))
    absent = absentees(case, device, mode, wanted)
    return [*rows.values(), *(_absent_row(case, device, mode, name, work, why) for name, why in absent.items())]


def _absent_row(case: Case, device: str, mode: str, provider: str, work: Row, why: str) -> Row:
    """Of a peer that is not here: no number, and no reading of the probe."""
    return {**_row(case, device, mode, provider, work), "note": why, "absent": True}


def _fill(
    row: Row, readings: list[float], all_of: Mapping[str, list[float]], watch: Watch | None, unfelt: frozenset[str]
) -> None:
    """Everything that follows from the readings, its own and those of all, and from the looks at the machine."""
    every, quiet = list(range(len(readings))), True
    if watch is not None:
        every, quiet = counted(watch.quiet(unfelt), len(readings))
        looks = [look for _, look in watch.looks]
        row.update(
            probe_before=looks[0],
            probe=watch.seen(unfelt),
            probe_after=looks[-1],
            quiet_rounds=len(every) if quiet else 0,
            unfelt=sorted(unfelt),
        )
    dense, ours = (all_of.get(name, []) for name in ("dense", "cofire"))
    ratios = [dense[i] / readings[i] for i in every if i < len(dense)]
    against_ours = [readings[i] / ours[i] for i in every if i < len(ours)]
    readings = [readings[i] for i in every]
    median = statistics.median(readings)
    row.update(
        median_ms=median, p20_ms=percentile(readings, 0.2), p80_ms=percentile(readings, 0.8), rounds=len(readings)
    )
    if ratios and row["provider"] != "dense":
        middle, low, high = median_interval(ratios)
        ends = (min(ratios), max(ratios)) if low is None or high is None else (low, high)
        row.update(speedup=middle, speedup_low=ends[0], speedup_high=ends[1], pairs=len(ratios))
    if against_ours and row["provider"] != "cofire":
        row["vs_cofire"] = statistics.median(against_ours)
    row["gbs"], row["gflops"] = row["bytes"] / median / 1e6, row["flops"] / median / 1e6


def grade(results: Results) -> None:
    """Each row's share of what the machine could do on it."""
    for row in results.rows:
        if row["median_ms"] is not None and row["mode"] not in UNCOMPARED:
            row["percent_of_ceiling"] = 100 * _shortest_ms(results.ceilings, row) / row["median_ms"]


def _shortest_ms(ceilings: dict[str, Any], row: Row) -> float:
    """By the roofline; where there are two ways to count the arithmetic, each in a dtype of its own, by the shorter one."""
    ways = [(row.get("arithmetic") or row["dtype"], row["flops"])]
    ways += [tuple(row["or_flops"])] if "or_flops" in row else []
    cold = row["mode"] == "forward, cold"
    return min(
        roofs.shortest_ms(ceilings, row["bytes"], flops, dtype, cold, row.get("footprint")) for dtype, flops in ways
    )


def _unfelt(case: Case, row: Row) -> frozenset[str]:
    """Pieces of the probe's work that say nothing of a row: what it holds and moves, at most, stays in nearer caches.

    Of a weight that is packed others may hold more than its bytes: cases that have cold weights feel everything.
    """
    if case.cold and row["mode"] != "overhead":
        return frozenset()
    return unfelt(max(row["bytes"], row.get("peak_bytes") or 0), row["device"])


def mark_noise(rows: Sequence[Row], probe: Probe) -> None:
    """Mark the rows that were taken while the machine was busy (``flagged``), or whose own readings spread (``noisy``)."""
    usual = probe.usual()
    for row in rows:
        if row["median_ms"] is None:
            row["noisy"] = False
            continue
        few = row.get("quiet_rounds", LEAST) < min(LEAST, row.get("rounds", LEAST))
        row["flagged"] = few or probe.strangeness(row.get("probe", {}), usual, row.get("unfelt", ())) > BAND
        row["noisy"] = row["flagged"] or row["p80_ms"] > SPREAD * row["p20_ms"]


def run(
    families: Sequence[str] | None = None,
    quick: bool = False,
    ops: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    device: str = "cpu",
    providers: Sequence[str] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    peers: Sequence[str | Path] = (),
    *,
    threads: int | None = None,
    pin: bool = True,
    fresh: bool = False,
    announce: Callable[[str], Any] = lambda text: None,
) -> Results:
    """Run the benchmark suite and write a results file.

    The file is written after every case, so that a run that is stopped leaves what it has; a case of each operator comes
    first, then the next of each. The same call then goes on where it stopped, if neither cofire nor its environment has
    changed; a run that was finished measures anew. A measurement in which the process died twice, as where a library
    aborts, is left out. Rows of other cases that are already there and were measured in the same environment (device,
    versions of torch and Python, threads) stay, each with its commit; otherwise the file is moved aside and begun anew, as
    is one that is broken.

    Args:
        families: names of families; default all.
        quick: a case or two for each operator with fewer rounds, without ``torch.compile``, without first calls and,
            where weights are cold, without the same in the caches; a few minutes.
        ops, cases: only these operators, only cases whose name contains one of these. Cases asked for by name run even
            if they are not in the quick subset.
        device: ``"cpu"`` or ``"cuda"``.
        providers: only these (``"dense"`` runs always: the ratios need it).
        out: the results file; default :func:`cofire.bench.results_path`.
        progress: show a bar.
        peers: files that add a peer each (CONTRIBUTING.md shows one).
        threads: how many threads torch uses; default as many as it uses now.
        pin: keep the process on as many cores as it has threads.
        fresh: measure everything anew, whatever a run that was stopped has measured.
        announce: called with a line about a file that is continued or moved aside, and when the run is stopped.

    Returns:
        The results, with the rows of the file. ``refused`` says where cofire's own answer was wrong, or what a case raised:
        it gets no number, and an earlier good measurement of it stays.

    Raises:
        ValueError: an unknown family, operator, case or provider; near matches are listed. A peer's file that cannot be
            used; a number of threads below 1. FileNotFoundError: one that does not exist.

    Example:
        >>> results = run(["selection"], quick=True, out="/tmp/selection.json", progress=False)  # doctest: +SKIP
        >>> results.rows[0]["provider"]  # doctest: +SKIP
        'cofire'
    """
    chosen = with_peers(select(families, quick, ops, cases), peers)
    _check_request(device, providers, chosen)
    if threads is not None and threads < 1:
        raise ValueError(f"bench: threads must be at least 1, got {threads}")
    request: dict[str, Any] = {"families": families, "quick": quick, "ops": ops, "cases": cases}
    request.update(device=device, providers=providers, peers=[str(p) for p in peers])
    if quick and not providers:
        providers = [name for name in _provider_names(chosen, device) if name != "compile"]
    with machine.settled(threads, pin, announce) as pinned, _little_garbage():
        path = Path(out) if out is not None else results_path(device, quick)
        here = {**environment(device, quick, chosen[0].peers if chosen else ()), "pinned": pinned}
        results, record = resume.begin(path, here, request, fresh, announce)
        steps = [(c, m) for c in _in_turns(chosen) for m in c.modes if not quick or cases or _is_quick(c, m)]
        try:
            _run(steps, results, record, Effort(quick, device), device, providers, path, progress, announce)
        except KeyboardInterrupt as error:
            done = f"{len(record.done)} of {len(steps)} measurements are in {path}"
            announce(f"stopped by {resume.stopped(error)[0]}: {done}; the same command goes on with the others")
            raise
    return results


def _is_quick(case: Case, mode: str) -> bool:
    """Weights that are cold stand for those in the caches, and nothing is prepared anew."""
    return mode != "first call" and (mode != "forward" or not case.cold)


def _in_turns(cases: Sequence[Case]) -> list[Case]:
    """A case of each operator, then the next of each, and so on: a run that is stopped early has seen most operators."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, Case]] = []
    for case in cases:
        turns.append((seen[case.op], case))
        seen[case.op] += 1
    return [case for _, case in sorted(turns, key=lambda turn: turn[0])]


def _run(
    steps: Sequence[tuple[Case, str]],
    results: Results,
    record: resume.Record,
    effort: Effort,
    device: str,
    providers: Sequence[str] | None,
    path: Path,
    progress: bool,
    announce: Callable[[str], Any],
) -> None:
    """Measure what the record does not have yet, and write the file before and after each measurement."""
    table = roofs.measure(device, effort.ceiling_seconds)
    results.ceilings = roofs.highest(results.ceilings, table) if results.ceilings else table
    probe = Probe(device)
    if record.usual is not None:
        probe.remember(record.usual, record.looks)
    mine = record.rows(results)
    left = [(c, m) for c, m in steps if f"{c}, {m}" not in record.done]
    forecast = resume.Forecast([f"{c}, {m}" for c, m in left], _seconds(results))
    given: Input | None = None
    with _progress(progress, len(steps), len(record.done)) as advance:
        for case, mode in left:
            step = f"{case}, {mode}"
            advance(step, forecast.left())
            if record.deadly(step):
                announce(f"{step} is left out: the process died in it {record.deaths[step]} times; --fresh tries again")
                continue
            begin = time.perf_counter()
            rows: list[Row] | None = None
            with _under_way(step, results, record, path):
                try:
                    if mode != "overhead" and (given is None or given.case is not case):
                        given = None  # free the last one's memory first
                        machine.give_back_memory()
                        given = Input(case, device, every_mode=True)
                    rows = measure(case, mode, device, effort, providers, given=given, probe=probe)
                except Exception as error:  # of one case: the others go on, if there is a GPU to go on with
                    if device == "cuda":
                        torch.cuda.synchronize()
                    given = None
                    results.refused.append(f"{step}: {type(error).__name__}: {error}; there is no number")
            seconds = time.perf_counter() - begin
            if rows is None:
                forecast.done(seconds)
                continue
            for row in rows:
                row.update(commit=results.environment["commit"], date=results.environment["date"], run=record.id)
                row["seconds"] = seconds
            mine += results.keep(rows)
            mark_noise(mine, probe)
            forecast.done(seconds)
            record.done.append(step)
            record.usual, record.looks = probe.usual(), probe.looks
            results.run = record.to_json()
            grade(results)
            results.save(path)
    results.run = None
    results.save(path)


@contextmanager
def _under_way(step: str, results: Results, record: resume.Record, path: Path) -> Iterator[None]:
    """The file says which measurement is under way, so that the next run knows in which one this process died."""
    record.begun = step
    results.run = record.to_json()
    results.save(path)
    try:
        yield
    except BaseException:  # it has not died: whoever stopped it, or what is wrong, is known
        record.begun = None
        results.run = record.to_json()
        results.save(path)
        raise
    record.begun = None


def _seconds(results: Results) -> dict[str, float]:
    """How long each measurement took, where the file says so."""
    return {f"{r['op']}, {r['case']}, {r['dtype']}, {r['mode']}": r["seconds"] for r in results.rows if "seconds" in r}


@contextmanager
def _little_garbage() -> Iterator[None]:
    """What is there before a run is no garbage: to look through it before each reading takes longer than the reading."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _check_request(device: str, providers: Sequence[str] | None, cases: Sequence[Case]) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: device cuda needs an NVIDIA GPU that torch can see, and there is none")
    known("provider", providers or (), _provider_names(cases, device))


def _provider_names(cases: Sequence[Case], device: str) -> list[str]:
    names = (name for c in cases for name in (*c.providers, *of_case(c, device)))
    return list(dict.fromkeys(["cofire", "dense", ONE_THREAD, *names]))


class _progress:  # noqa: N801  (used like a function)
    """A bar, or nothing; gives the function that announces the next step and the seconds that are left."""

    def __init__(self, show: bool, steps: int, done: int = 0) -> None:
        self.show, self.steps, self.first = show, steps, done

    def __enter__(self) -> Callable[[str, float | None], None]:
        if not self.show:
            return lambda text, left: None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}")
        self.bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
        self.bar.start()
        self.task = self.bar.add_task("", total=self.steps, completed=self.first, left="")
        done = itertools.count(self.first)
        return lambda text, left: self.bar.update(
            self.task, completed=next(done), description=text, left=_time_left(left)
        )

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.show:
            if kind is None:
                self.bar.update(self.task, completed=self.steps, description="done", left="")
            self.bar.stop()


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f"about {minutes} min left" if minutes > 1 else f"about {round(seconds)} s left"
