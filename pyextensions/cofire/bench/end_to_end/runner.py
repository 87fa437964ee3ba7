# SPDX-License-Identifier: Apache-2.0
"""Measuring networks: every variant is checked, scored, and timed in turn with the others, in one process."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cofire.bench import harness, machine, quiet, resume
from cofire.bench.cases import Run, known
from cofire.bench.end_to_end.network import DENSE, Call, Network, Variant, disagreement, is_dense, weight_bytes
from cofire.bench.end_to_end.results import NUMBERS, Networks, Row, networks_path
from cofire.bench.results import environment
from cofire.registry import OPERATORS

__all__ = ["families", "measure", "networks", "run"]

SAMPLES = 8  #: that a variant is checked on, where a network does not say
SEED = 0


class Effort:
    """How long to train and to measure: full, or quick."""

    def __init__(self, quick: bool) -> None:
        self.training = 0.1 if quick else 1.0  #: share of the full training
        self.seconds = 0.3 if quick else 2.0  #: of readings, for each of the two sizes of batch
        self.least_rounds = 5 if quick else 11
        self.most_rounds = 15 if quick else 60
        self.attempts = 1 if quick else 2


def families() -> list[str]:
    """The operator families that have networks."""
    names = sorted({o.family for o in OPERATORS.values()})
    return [n for n in names if importlib.util.find_spec(f"{__package__}.{n}") is not None]


def networks(chosen: Sequence[str] | None = None) -> list[Network]:
    """The networks of some families, or of all.

    Raises:
        ValueError: an unknown family; near matches are listed.
    """
    found: list[Network] = []
    for family in known("family with a network", chosen or families(), families()):
        found += importlib.import_module(f"{__package__}.{family}").NETWORKS
    return found


class Placed(nn.Module):
    """A network on a device, for inputs that are on the CPU."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x.to(self.device)).cpu()
        return output


def _row(network: Network, name: str, variant: Variant) -> Row:
    return {
        "family": network.family,
        "network": network.name,
        "variant": name,
        **dict.fromkeys(NUMBERS),
        "unit": network.unit,
        "batch": network.batch,
        "latency_of": network.latency_of,
        "weight_bytes": weight_bytes(variant.model) if variant.weight_bytes is None else variant.weight_bytes,
        "held_bytes": None,
        "accuracy_kind": network.accuracy_kind,
        "data": network.data,
        "error": None,
        "correct": False,
        "noisy": False,
    }


def _check(network: Network, variant: Variant, device: str) -> tuple[str | None, float | None]:
    """Why the variant is wrong, or None; also what it raises, as a sentence. And how far it is from its reference."""
    x = network.inputs(SAMPLES) if network.sample is None else network.sample()
    try:
        got = Placed(variant.model, device)(x)
        if variant.reference is None:
            return (None if bool(got.isfinite().all()) else "the output is not finite"), None
        expected = Placed(variant.reference.to(device), device)(x)
        return disagreement(got, expected, variant.tolerance, variant.share)
    except Exception as error:  # one variant that cannot run here is reported, and the others go on
        words = str(error).strip() or "no message"
        return f"{type(error).__name__}: {words.splitlines()[0]}", None


def measure(network: Network, device: str, effort: Any, probe: quiet.Probe) -> list[Row]:
    """All rows of one network: built, checked, scored and timed."""
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        built = network.build(SEED, effort.training)
    variants = {name: variant for name, variant in built.items() if device in variant.devices}
    known("variant", [DENSE], list(variants))
    rows = {name: _row(network, name, variant) for name, variant in variants.items()}
    right: dict[str, nn.Module] = {}
    with torch.inference_mode():
        for name, variant in variants.items():
            row, model = rows[name], variant.model.to(device)
            wrong, row["error"] = _check(network, variant, device)
            notes = [text for text in (variant.note, wrong) if text]
            if notes:
                row["note"] = "; ".join(notes)
            if wrong is None:
                row["correct"], right[name] = True, model
                if network.evaluate is not None:
                    row["accuracy"] = network.evaluate(Placed(model, device))
        if right:
            _time(network, right, rows, device, effort, probe)
    seconds = time.perf_counter() - start
    for row in rows.values():
        row["seconds"] = seconds
    return list(rows.values())


def _time(
    network: Network, models: Mapping[str, nn.Module], rows: Mapping[str, Row], device: str, effort: Any, probe: Any
) -> None:
    """Latency at batch 1, throughput and memory at the network's batch."""
    for batch in dict.fromkeys((1, network.batch)):
        x = network.inputs(batch).to(device)
        calls = {name: network.start(model, x) for name, model in models.items()}
        readings, look = _read(calls, device, effort, probe)
        for name, call in calls.items():
            row, found = rows[name], readings[name]
            row["probe"] = max(row.get("probe", look), look, key=probe.strangeness)
            spread = harness.percentile(found, 0.8) > harness.SPREAD * harness.percentile(found, 0.2)
            row["noisy"] = row["noisy"] or spread
            if batch == 1:
                _latency(row, [ms / call.steps for ms in found])
            if batch == network.batch:
                row["throughput"] = 1e3 * call.items / statistics.median(found)
                row["peak_bytes"] = harness.peak_bytes(call.run, device)
                row["held_bytes"] = None if call.held is None else call.held()
        per_item = {name: call.items for name, call in calls.items()}
        if batch == 1:
            _ratios(rows, "speedup", readings, {name: call.steps for name, call in calls.items()})
        if batch == network.batch:
            _ratios(rows, "throughput_gain", readings, per_item)
        del calls  # and the caches that they hold


def _read(
    calls: Mapping[str, Call], device: str, effort: Any, probe: quiet.Probe
) -> tuple[dict[str, list[float]], quiet.Look]:
    """Readings in ms, and the strangest look at the machine around them; of the quieter of two attempts."""
    runs: dict[str, Run] = {name: call.run for name, call in calls.items()}
    attempts = []
    for _ in range(effort.attempts):
        before = probe.look()
        found = harness.read_in_turns(runs, device, effort.seconds, effort.least_rounds, effort.most_rounds)
        attempts.append((max(before, probe.look(), key=probe.strangeness), found))
        if probe.strangeness(attempts[-1][0]) <= quiet.BAND:
            break
    strangest, readings = min(attempts, key=lambda attempt: probe.strangeness(attempt[0]))
    return readings, strangest


def _latency(row: Row, readings: list[float]) -> None:
    row["latency_ms"] = statistics.median(readings)
    row["latency_p20_ms"], row["latency_p80_ms"] = (harness.percentile(readings, share) for share in (0.2, 0.8))
    row["rounds"] = len(readings)


def _ratios(rows: Mapping[str, Row], what: str, readings: Mapping[str, list[float]], steps: Mapping[str, int]) -> None:
    """How many times as fast as the fastest dense form, from the rounds' pairs; with an interval, where there are enough."""
    forms = {name: statistics.median(readings[name]) / steps[name] for name in readings if is_dense(name)}
    if not forms:
        return
    fastest = min(forms, key=lambda name: forms[name])
    for name, own in readings.items():
        if name != fastest:
            pairs = zip(readings[fastest], own)
            ratios = [(dense / steps[fastest]) / (ours / steps[name]) for dense, ours in pairs]
            rows[name][what], rows[name][f"{what}_low"], rows[name][f"{what}_high"] = harness.median_interval(ratios)
            rows[name][f"{what}_against"] = fastest


def run(
    chosen: Sequence[str] | None = None,
    device: str = "cpu",
    quick: bool = False,
    *,
    out: str | Path | None = None,
    again: bool = False,
    progress: bool = True,
    announce: Callable[[str], Any] = lambda text: None,
) -> Networks:
    """Train, convert, check, score and time the networks, and write a file after each of them.

    What the file holds already of the same commit and environment is not measured again, so that an interrupted run goes on
    where it stopped.

    Args:
        chosen: names of families; default all.
        device: ``"cpu"`` or ``"cuda"``. Networks are trained on the CPU in any case.
        quick: a tenth of the training and fewer rounds; the file is another one.
        out: the file; default ``benchmarks/results/end_to_end/<device>.json``.
        again: measure also what the file holds.
        progress: show a bar.
        announce: called with a line about a file that is moved aside.

    Returns:
        What the file holds. ``refused`` says which networks raised an error, and which; the others go on.

    Raises:
        ValueError: an unknown family or device, or a file of another kind or of another cofire, which stays as it is.

    Example:
        >>> found = run(["lowbit"], quick=True, out="/tmp/networks.json")  # doctest: +SKIP
        >>> found.rows[0]["variant"]  # doctest: +SKIP
        'dense'
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench-networks: device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench-networks: device cuda needs an NVIDIA GPU that torch can see, and there is none")
    wanted = networks(chosen)
    path = Path(out) if out is not None else networks_path(device, quick)
    with machine.settled(None, True, announce) as pinned:
        found = _begin(path, {**environment(device, quick), "pinned": pinned}, announce)
        missing = [n for n in wanted if again or not found.has(n.family, n.name)]
        effort, probe = Effort(quick), quiet.Probe(device)
        with harness._progress(progress, len(missing)) as advance:
            for network in missing:
                advance(str(network), None)
                try:
                    rows = measure(network, device, effort, probe)
                except Exception as error:  # of one network: the others go on
                    found.refused.append(f"{network}: {type(error).__name__}: {error}")
                    continue
                for row in rows:
                    row["commit"], row["date"] = found.environment["commit"], found.environment["date"]
                    row["noisy"] = bool(row["noisy"] or probe.strangeness(row.get("probe", {})) > quiet.BAND)
                found.add(rows)
                found.save(path)
    return found


def _begin(path: Path, here: dict[str, Any], announce: Callable[[str], Any]) -> Networks:
    """What the file holds already, if it was measured in this environment; else, or if it is broken, it is moved aside."""
    earlier = resume.whole(path, lambda: Networks.load(path), announce)
    if earlier is not None and resume.may_stay(path, earlier, here, announce):
        return Networks(here, {}, earlier.rows)
    return Networks(here)
