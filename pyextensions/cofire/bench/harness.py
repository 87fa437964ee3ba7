# SPDX-License-Identifier: Apache-2.0
"""Measuring: every provider of a case is checked on that very input, then all are timed in turn, in one process.

How a number comes about:

* A provider that does not agree with the fp64 reference (:func:`disagreement`) gets no number. cofire has to keep to
  the rule of its own tests, the others may be :func:`slack` times less exact.
* Providers take turns, each round starts with another one, at least 30 rounds (7 in a quick run, and where 30 would take
  more than a minute). A provider whose reading lasts 100 ms and ten times as long as the shortest takes part in the first
  7 alone. A row's time is the median over rounds; its speed-up is the median of the rounds' ratios to
  ``dense``, with a 95 % interval that assumes nothing about their distribution (:func:`median_interval`).
* Calls shorter than 1 ms are repeated within one reading. A short call runs once untimed before it, so that it finds
  the caches and the threads as its own last call left them, not as another provider did; ``forward, cold`` is the mode
  that looks at cold weights, and ``first call`` the one that times what is done to a weight before its first answer. Forward
  runs under ``torch.inference_mode``.
* Providers with threads of their own are kept apart from the others by a pause (:data:`SETTLE_SECONDS`).
* A fixed multiplication is timed around every case; where it slowed down by 15 % the case is measured once more (not in
  a quick run), and if that does not help, or a row's own readings spread by half, the row is marked noisy.
* ``bytes`` and ``flops`` are what the input needs at least, the same for all providers, so that GFLOP/s of a dense
  provider are effective ones. ``peak_bytes`` is what a call holds of torch's allocator at most, outputs included.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cofire.bench import ceilings as roofs
from cofire.bench.cases import Args, Case, Provider, Random, Run, known, one_thread, plain, select
from cofire.bench.results import UNCOMPARED, Results, Row, environment, results_path
from cofire.native import in_large_pages
from cofire.registry import OPERATORS

READING_MS = 1.0  #: a shorter call is repeated until a reading lasts this long
ONE_THREAD = "peer:cofire-on-one-thread"
NOISE = 1.15  #: slow-down of the probe that makes a row noisy
SHORT_MS = 3.0  #: a shorter call runs once, untimed, before each of its readings
#: Threads that wait for work spin, on the cores of those whose turn it is next: those of torch for 10 ms, those of ONNX
#: Runtime for 60. Between different pools there is a pause after which they sleep, and an untimed reading that wakes others.
SETTLE_SECONDS = 0.1
#: A reading of so many ms that is so many times the shortest is slow: it takes part in the first few rounds alone.
SLOW_MS, SLOW_TIMES, LEAST_ROUNDS = 100.0, 10.0, 7
LONGEST_SECONDS = 60  #: where the least rounds of the others take longer there are fewer, but :data:`LEAST_ROUNDS`
SPREAD = 1.5  #: p80 / p20 of a row's own readings that makes it noisy


class Effort:
    """How long to measure: full, or quick."""

    def __init__(self, quick: bool) -> None:
        self.least_rounds = 7 if quick else 30
        self.most_rounds = 30 if quick else 100
        self.case_seconds = 0.5 if quick else 1.5
        self.ceiling_seconds = 0.05 if quick else 0.2
        self.attempts = 1 if quick else 2


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
    got, exact, answers = _detached(got), _detached(exact), [_detached(a) for a in plain_answers]
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
        lost = max(float((a[i].double() - r).abs().max()) for a in answers)
        eps = max(torch.finfo(d).eps for d in (answers[0][i].dtype, dtype) if d.is_floating_point)
        allowed = slack * (factor * lost + eps * float(r.abs().max()))
        error = float((o.double() - r).abs().max())
        if not error <= allowed:  # a NaN is an error too
            return f"output {i} is off by {error:.3g}, allowed {allowed:.3g}"
    return None


# ------------------------------------------------------------------------------------------------ statistics


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Median and its confidence interval by order statistics: exact for any distribution, from the binomial law.

    With too few values for the confidence asked (fewer than 6 for 95 %) the interval is the whole range.
    """
    ordered, n = sorted(values), len(values)
    below, rank = 0.0, 0
    while rank < n // 2:  # the largest rank whose tail, on each side, stays below half of what may be lost
        below += math.comb(n, rank) / 2**n
        if below > (1 - confidence) / 2:
            break
        rank += 1
    low = max(rank - 1, 0)
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


# ---------------------------------------------------------------------------------------------------- timing


def read_ms(run: Run, repeats: int, device: str) -> float:
    """One reading: milliseconds per call. CUDA: by events on the current stream."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats
    begin = time.perf_counter_ns()
    for _ in range(repeats):
        run()
    return (time.perf_counter_ns() - begin) / repeats / 1e6


def _warm_up(run: Run, device: str) -> float:
    """Milliseconds of a warm call."""
    for _ in range(2):
        run()
    return min(read_ms(run, 1, device) for _ in range(2))


def read_in_turns(
    runs: Mapping[str, Run], device: str, seconds: float, least: int, most: int, own_threads: Collection[str] = ()
) -> dict[str, list[float]]:
    """Readings in ms of each run, one per round, in as many rounds as fit; of slow runs in the first few.

    ``own_threads`` names the runs that do not use torch's threads.
    """
    expected = {name: _warm_up(run, device) for name, run in runs.items()}
    repeats = {name: max(1, math.ceil(READING_MS / max(ms, 1e-5))) for name, ms in expected.items()}
    longest = max(SLOW_MS, SLOW_TIMES * min(expected.values(), default=0.0))
    slow = {name for name, ms in expected.items() if ms > longest}
    round_ms = sum(expected[name] * repeats[name] for name in runs if name not in slow)
    least = max(min(least, int(1e3 * LONGEST_SECONDS / max(round_ms, 1e-3))), min(least, LEAST_ROUNDS))
    rounds = min(max(least, int(1e3 * seconds / max(round_ms, 1e-3))), most)
    readings: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    pool: str | None = None  # whose threads were the last to work
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                if name in slow and i >= LEAST_ROUNDS:
                    continue
                before, pool = pool, name if name in own_threads else None
                if before != pool:
                    time.sleep(SETTLE_SECONDS)
                    read_ms(runs[name], repeats[name], device)
                elif expected[name] < SHORT_MS:
                    runs[name]()
                readings[name].append(read_ms(runs[name], repeats[name], device))
    finally:
        gc.enable()
    return readings


def peak_bytes(run: Run, device: str) -> int:
    """The most bytes of torch's allocator in use during a call, above what was in use before it."""
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


class Probe:
    """A fixed piece of work, timed again and again: if it slows down, something else is using the machine."""

    def __init__(self, device: str) -> None:
        n = 512 if device == "cpu" else 4096
        self.a, self.b, self.device = torch.rand(n, n, device=device), torch.rand(n, n, device=device), device
        self.best = float("inf")
        self.read()

    def read(self) -> float:
        now = statistics.median(read_ms(lambda: self.a @ self.b, 1, self.device) for _ in range(7))
        self.best = min(self.best, now)
        return now


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
    """A case's arguments on a device, and the answers that its providers are checked with."""

    def __init__(self, case: Case, device: str, tiny: bool = False) -> None:
        make = case.tiny if tiny else case.make_args
        made = make(Random(str(case)))
        self.case, self.device = case, device
        operator = OPERATORS[case.op].reference
        self.reference = operator if tiny or case.reference is None else case.reference
        self.args = tuple(_moved(a, device) for a in made)
        self._known: dict[Any, list[tuple[Tensor, ...]]] = {}

    def _answers(self, reference: Callable[..., Any], mode: str) -> list[tuple[Tensor, ...]]:
        """The reference in fp64, then in the input's dtype in each memory layout."""
        key = (reference, mode == "forward+backward")
        if key not in self._known:
            with mode_context(mode):
                self._known[key] = [
                    _tensors(prepare(plain(reference), self.case, args, mode)())
                    for args in (_in_fp64(self.args, self.case.bits), *_layouts(self.args))
                ]
        return self._known[key]

    def check(self, provider: Provider, mode: str, slack: int = 1) -> str | None:
        """Why the provider's answer on this input is wrong, or None; also what it raises, as a sentence."""
        answers = self._answers(provider.reference or self.reference, mode)
        gradients = len(self.case.gradients) if mode == "forward+backward" else 0
        if provider.outputs is not None:
            outputs = len(answers[0]) - gradients
            answers = [(*a[: provider.outputs], *a[outputs:]) for a in answers]
        try:
            with mode_context(mode):
                got = _tensors(prepare(provider, self.case, self.args, mode)())
            if OPERATORS[self.case.op].mutated:
                got = got[: provider.outputs]
        except Exception as error:  # a peer that cannot run here is reported, and the others go on
            words = str(error).strip() or "no message"
            return f"{type(error).__name__}: {words.splitlines()[0]}"
        if self.case.compared is not None:
            got, *answers = (self.case.compared(a, self.args) for a in (got, *answers))
        return disagreement(got, answers[0], answers[1:], self.case.rounding or self.case.dtype, gradients, slack)

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
    """In large pages where those who make such weights would ask for them."""
    copy = in_large_pages(weight)
    return weight.clone() if copy is weight else copy


@functools.cache
def cold_bytes(device: str) -> int:
    """How much memory to rotate through so that the weights are in no cache."""
    if device == "cuda":
        return 4 * int(torch.cuda.get_device_properties(0).L2_cache_size)
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        largest = max(largest, int(path.read_text().strip().rstrip("K")) << 10)
    return max(128 << 20, largest + largest // 4)


def candidates(case: Case, device: str, mode: str, wanted: Sequence[str] | None) -> dict[str, dict[str, Provider]]:
    """The providers of a case that can run here, each as ``{variant: provider}``; always with ``cofire``."""
    every = {"cofire": case.ours or plain(OPERATORS[case.op]), **case.providers}
    if case.overhead and mode == "forward" and torch.get_num_threads() > 1:
        every[ONE_THREAD] = one_thread(OPERATORS[case.op])
    found: dict[str, dict[str, Provider]] = {}
    for name, entry in every.items():
        if wanted and name not in (*wanted, "dense"):
            continue
        variants = {"": entry} if isinstance(entry, Provider) else dict(entry)
        variants = {
            v: p
            for v, p in variants.items()
            if device in p.devices
            and (p.differentiable or mode != "forward+backward")
            and not (p.hot and mode in ("forward, cold", "first call"))
        }
        if variants and not (name == "compile" and mode in ("forward, cold", "overhead", "first call")):
            found[name] = variants
    return found


def _row(case: Case, device: str, mode: str, provider: str, cost: tuple[int, int]) -> Row:
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
        "bytes": cost[0],
        "flops": cost[1],
        "peak_bytes": None,
        "correct": False,
        "noisy": False,
    }


def _pick(
    name: str, variants: Mapping[str, Provider], input: Input, mode: str
) -> tuple[str | None, dict[str, float], dict[str, str]]:
    """The fastest correct variant, the times of all in ms, and why the others have none."""
    wrong = {v: reason for v, p in variants.items() if (reason := input.check(p, mode, slack(name))) is not None}
    right = {v: p for v, p in variants.items() if v not in wrong}
    if len(right) < 2:
        return next(iter(right), None), {}, wrong
    with mode_context(mode):
        hot = "forward" if mode == "forward, cold" else mode  # a layout's rank does not depend on where the weights are
        readings = read_in_turns({v: input.runs(p, hot) for v, p in right.items()}, input.device, 0.1, 2, 15)
    times = {v: statistics.median(r) for v, r in readings.items()}
    return min(times, key=lambda v: times[v]), times, wrong


def measure(case: Case, mode: str, device: str, effort: Effort, wanted: Sequence[str] | None = None) -> list[Row]:
    """All rows of one case in one mode."""
    input = Input(case, device, tiny=mode == "overhead")
    cost = case.cost(input.args, mode)
    rows: dict[str, Row] = {}
    chosen: dict[str, Provider] = {}
    torch._dynamo.reset()  # compiled code of earlier cases would count against the limit for recompiling
    for name, variants in candidates(case, device, mode, wanted).items():
        rows[name] = row = _row(case, device, mode, name, cost)
        best, times, wrong = _pick(name, variants, input, mode)
        if times:
            row["variants_ms"] = times
        if wrong:
            row["note"] = "; ".join(f"{v}: {reason}" if v else reason for v, reason in wrong.items())
        if best is not None:
            row["correct"], chosen[name] = True, variants[best]
            if best:
                row["variant"] = best
    with mode_context(mode):
        runs = {name: input.runs(p, mode) for name, p in chosen.items()}
        own = {name for name, p in chosen.items() if p.own_threads}
        limits = (effort.case_seconds, effort.least_rounds, effort.most_rounds)
        readings = read_in_turns(runs, device, *limits, own)
        for name, run in runs.items():
            _fill(rows[name], readings[name], readings.get("dense"))
            rows[name]["peak_bytes"] = peak_bytes(run, device)
    return list(rows.values())


def _fill(row: Row, readings: list[float], dense: list[float] | None) -> None:
    """Everything that follows from the readings."""
    median = statistics.median(readings)
    row.update(
        median_ms=median, p20_ms=percentile(readings, 0.2), p80_ms=percentile(readings, 0.8), rounds=len(readings)
    )
    if dense is not None and row["provider"] != "dense":
        ratios = [d / r for d, r in zip(dense, readings)]
        row["speedup"], row["speedup_low"], row["speedup_high"] = median_interval(ratios)
    row["gbs"], row["gflops"] = row["bytes"] / median / 1e6, row["flops"] / median / 1e6


def grade(results: Results) -> None:
    """Each row's share of what the machine could do on it."""
    for row in results.rows:
        if row["median_ms"] is not None and row["mode"] not in UNCOMPARED:
            cold = row["mode"] == "forward, cold"
            dtype = row.get("arithmetic") or row["dtype"]
            shortest = roofs.shortest_ms(results.ceilings, row["bytes"], row["flops"], dtype, cold)
            row["percent_of_ceiling"] = 100 * shortest / row["median_ms"]


def mark_noise(rows: Sequence[Row], best_probe_ms: float) -> None:
    """Mark the rows that were taken while the probe was slow, or whose own readings spread."""
    for row in rows:
        spread = row["median_ms"] is not None and row["p80_ms"] > SPREAD * row["p20_ms"]
        row["noisy"] = bool(spread or row["probe_ms"] > NOISE * best_probe_ms)


def run(
    families: Sequence[str] | None = None,
    quick: bool = False,
    ops: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    device: str = "cpu",
    providers: Sequence[str] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Results:
    """Run the benchmark suite and write a results file.

    The file is written after every case, so that an interrupted run leaves what it has. Rows of other cases that are
    already there and were measured in the same environment (device, versions of torch and Python, threads) stay, each with
    its commit; otherwise the file is begun anew.

    Args:
        families: names of families; default all.
        quick: a small subset with fewer rounds and without ``torch.compile``, about a minute.
        ops, cases: only these operators, only cases whose name contains one of these. Cases asked for by name run even
            if they are not in the quick subset.
        device: ``"cpu"`` or ``"cuda"``.
        providers: only these (``"dense"`` runs always: the ratios need it).
        out: the results file; default :func:`cofire.bench.results_path`.
        progress: show a bar.

    Returns:
        The results, with the rows of the file.

    Raises:
        ValueError: an unknown family, operator, case or provider; near matches are listed.

    Example:
        >>> results = run(["selection"], quick=True, out="/tmp/selection.json", progress=False)  # doctest: +SKIP
        >>> results.rows[0]["provider"]  # doctest: +SKIP
        'cofire'
    """
    chosen = select(families, quick, ops, cases)
    _check_request(device, providers, chosen)
    if quick and not providers:
        providers = [name for name in _provider_names(chosen) if name != "compile"]
    path = Path(out) if out is not None else results_path(device, quick)
    effort = Effort(quick)
    table = roofs.measure(device, effort.ceiling_seconds)
    results = _begin(path, environment(device, quick), table)
    probe = Probe(device)
    fresh: list[Row] = []
    with _progress(progress, sum(len(c.modes) for c in chosen)) as advance:
        for case, mode in ((c, m) for c in chosen for m in c.modes):
            advance(f"{case}, {mode}")
            rows = _measure_quietly(probe, effort, functools.partial(measure, case, mode, device, effort, providers))
            for row in rows:
                row["commit"], row["date"] = results.environment["commit"], results.environment["date"]
            fresh += rows
            mark_noise(fresh, probe.best)
            results.add(rows)
            grade(results)
            results.save(path)
    return results


def _measure_quietly(probe: Probe, effort: Effort, measured: Callable[[], list[Row]]) -> list[Row]:
    """Measure between two readings of the probe; where the machine was busy, once more, and keep the quieter rows."""
    attempts = []
    for _ in range(effort.attempts):
        before = probe.read()
        rows = measured()
        slowest = max(before, probe.read())
        for row in rows:
            row["probe_ms"] = slowest
        attempts.append((slowest, rows))
        if slowest <= NOISE * probe.best:
            break
    return min(attempts, key=lambda attempt: attempt[0])[1]


def _check_request(device: str, providers: Sequence[str] | None, cases: Sequence[Case]) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: device cuda needs an NVIDIA GPU that torch can see, and there is none")
    known("provider", providers or (), _provider_names(cases))


def _provider_names(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(["cofire", "dense", ONE_THREAD, *(name for c in cases for name in c.providers)]))


def _begin(path: Path, here: dict[str, Any], table: dict[str, Any]) -> Results:
    """What the file holds already, if it was measured in this environment."""
    if path.exists():
        earlier = Results.load(path)
        if earlier.same_environment(here):
            return Results(here, roofs.highest(earlier.ceilings, table), earlier.rows)
    return Results(here, table)


class _progress:  # noqa: N801  (used like a function)
    """A bar, or nothing; gives the function that announces the next step."""

    def __init__(self, show: bool, steps: int) -> None:
        self.show, self.steps = show, steps

    def __enter__(self) -> Callable[[str], None]:
        if not self.show:
            return lambda text: None
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
        self.bar = Progress(*columns)
        self.bar.start()
        task = self.bar.add_task("", total=self.steps)
        done = itertools.count()
        return lambda text: self.bar.update(task, completed=next(done), description=text)

    def __exit__(self, *_: Any) -> None:
        if self.show:
            self.bar.stop()
