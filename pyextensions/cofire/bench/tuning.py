# SPDX-License-Identifier: Apache-2.0
"""``cofire tune``: find the best kernel configurations for this device.

Of a GPU those are tiles. Of a CPU it is the table by which compressed layers choose between their sparse product and a dense
one (:mod:`cofire.nn.compressed`): by dtype, format and rows the largest density at which the sparse one wins.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cofire import native
from cofire.bench.harness import _progress
from cofire.bench.results import _commit, device_name
from cofire.files import write_atomically
from cofire.nn import compressed
from cofire.nn.compressed import GAIN, ROWS, TRAINABLE
from cofire.nn.sparse import SparseConv2d, SparseLinear
from cofire.timing import medians

Key = tuple[str, int]  #: against what, and the bucket of rows
Times = tuple[float, float]  #: milliseconds of the sparse product and of the dense one
SLOW = 20  #: times as long as float32: such a dense product is not waited for
BLOCK = (16, 1)
CONVOLVED = ("csr", "delta")  #: of others the convolution itself decodes the weight and takes the dense one


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        features: of a linear layer, its inputs and its outputs.
        channels, side: of a convolution of 3x3, and of its largest input.
        rows: one number of each bucket.
        train_rows: those of a training step.
        densities: ascending.
    """

    features: int = 2048
    channels: int = 128
    side: int = 28
    rows: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    train_rows: int = 256
    densities: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
    formats: tuple[str, ...] = ("bitmap", "csr", "delta", "block")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


Found = dict[str, dict[str, dict[str, list[float]]]]


def measure(plan: Plan, announce: Callable[[str], Any] = lambda text: None) -> tuple[Found, list[str]]:
    """The table of this CPU, and sentences about what was left out.

    An entry is the largest density such that the sparse product wins there and at all lower ones. Two measurements of at most
    three decide; others stand between them, so that a slow moment of the machine spoils one at most.

    Args:
        plan: see :class:`Plan`.
        announce: called with each dtype, format and density before its turn.

    Returns:
        ``found[dtype][against][format]``, a density for each bucket of rows, and the sentences.
    """
    found: Found = {}
    left_out = []
    for dtype in plan.dtypes:
        name = str(dtype).removeprefix("torch.")
        times = _slowdown(plan, dtype)
        if times > SLOW:
            left_out.append(
                f"{name} not measured, as a dense product takes {times:.0f} times as long as one of float32"
            )
            for _ in range(len(plan.formats) * len(plan.densities)):
                announce(f"{name} left out")
            continue
        for format in plan.formats:
            entries = _entries(plan, dtype, format, announce)
            for against, densities in entries.items():
                found.setdefault(name, {}).setdefault(against, {})[format] = densities
    return found, left_out


def _slowdown(plan: Plan, dtype: torch.dtype) -> float:
    """How many times as long a dense product of 64 rows takes as in float32."""
    layers = {of: nn.Linear(plan.features, plan.features, dtype=of) for of in (torch.float32, dtype)}
    times = medians({of: (layer, torch.randn(64, plan.features, dtype=of)) for of, layer in layers.items()})
    return times[dtype] / times[torch.float32]


def _entries(plan: Plan, dtype: torch.dtype, format: str, announce: Callable[[str], Any]) -> dict[str, list[float]]:
    """By what it is measured against, the largest density of each bucket."""
    found: dict[str, list[float]] = {}
    lost: set[tuple[str, int]] = set()
    for density in plan.densities:
        announce(f"{str(dtype).removeprefix('torch.')} {format} {density:g}")
        if found and len(lost) == sum(len(densities) for densities in found.values()):
            continue
        trials = {(against, number): time for against, number, time in _trials(plan, dtype, format, density)}
        for against, _ in trials:
            found.setdefault(against, [0.0] * (1 if against == "training" else len(ROWS) + 1))
        wins = _majority({key: time for key, time in trials.items() if key not in lost})
        for (against, number), won in wins.items():
            if won:
                found[against][number] = density
            else:
                lost.add((against, number))
    return {against: e * (len(ROWS) + 1) if against == "training" else e for against, e in found.items()}


def _majority(trials: Mapping[Key, Callable[[], Times]]) -> dict[Key, bool]:
    """Whether the sparse product is faster by enough in two of up to three rounds of all that is not yet decided."""
    votes: dict[Key, list[bool]] = {key: [] for key in trials}
    for _ in range(3):
        for key, time in trials.items():
            if max(votes[key].count(True), votes[key].count(False)) < 2:
                sparse, dense = time()
                votes[key].append(sparse * GAIN <= dense)
    return {key: found.count(True) >= 2 for key, found in votes.items()}


def _trials(
    plan: Plan, dtype: torch.dtype, format: str, density: float
) -> Iterator[tuple[str, int, Callable[[], Times]]]:
    """What there is to measure: against what, the bucket, and the measurement. What has no kernel is left out."""
    linear = _compressed(nn.Linear(plan.features, plan.features, dtype=dtype), format, density)
    if not linear._kernel(dtype).startswith("reference"):
        for against in ("kept", "decoded"):
            for number, rows in enumerate(plan.rows):
                yield against, number, functools.partial(_time_linear, linear, against == "kept", rows, dtype)
        if format in TRAINABLE:
            yield "training", 0, functools.partial(_time_training, linear, plan.train_rows, dtype)
    if format not in CONVOLVED:
        return
    conv = _compressed(nn.Conv2d(plan.channels, plan.channels, 3, padding=1, dtype=dtype), format, density)
    if not conv._kernel(dtype).startswith("reference"):
        for number, rows in enumerate(plan.rows):
            side = min(plan.side, math.isqrt(rows))
            shape = (math.ceil(rows / side**2), plan.channels, side, side)
            yield "convolution", number, functools.partial(conv._time, shape, dtype)


def _compressed(layer: nn.Linear | nn.Conv2d, format: str, density: float) -> Any:
    """The layer with random weights kept, whole blocks of them where the format is of blocks."""
    rows, columns = layer.weight.flatten(1).shape
    high = BLOCK[0] if format == "block" else 1
    mask = (torch.rand(rows // high, columns) < density).repeat_interleave(high, 0).view(layer.weight.shape)
    kind = SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d
    return kind.from_dense(layer, mask=mask).pack(format, block=BLOCK, cache_dense=True)


def _time_linear(layer: Any, kept: bool, rows: int, dtype: torch.dtype) -> Times:
    """As a layer measures itself, with a dense copy or without."""
    layer.cache_dense, layer._copy = kept, None
    times: Times = layer._time(rows, dtype)
    return times


def _time_training(layer: Any, rows: int, dtype: torch.dtype) -> Times:
    """Milliseconds of forward and backward, of the compressed layer and of the dense one."""
    dense = layer.to_dense()
    x = torch.randn(rows, layer.in_features, dtype=dtype, requires_grad=True)
    gradient = torch.randn(rows, layer.out_features, dtype=dtype)

    def step(module: nn.Module, x: Tensor) -> None:
        for tensor in (x, *module.parameters()):
            tensor.grad = None
        module(x).backward(gradient)

    return compressed.milliseconds(functools.partial(step, layer), functools.partial(step, dense), x, train=True)


def _write(path: Path, machine: str, found: Found, source: str) -> None:
    """Put what was measured into the table; entries of what was not stay."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content["source"][machine] = source
    entries = content["densities"].setdefault(machine, {})
    for dtype, ways in found.items():
        for against, formats in ways.items():
            entries.setdefault(dtype, {}).setdefault(against, {}).update(formats)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    lists = re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), text)
    write_atomically(path, lists + "\n")
    compressed.table.cache_clear()


def _tune_cpu(path: Path, plan: Plan, progress: bool) -> str:
    if native.STATUS.variant is None:
        return "cofire tune: nothing to do on a CPU without C++ kernels."
    if not os.access(path, os.R_OK) or not os.access(path.parent, os.W_OK):
        raise ValueError(f"tune: the table must be a file that can be read and replaced, got {path}")
    with _progress(progress, len(plan.dtypes) * len(plan.formats) * len(plan.densities)) as advance:
        found, left_out = measure(plan, lambda text: advance(text, None))
    machine = compressed.instruction_set()
    size = f"{plan.features} x {plan.features} and convolutions of 3x3 of {plan.channels} channels"
    conditions = f"{device_name('cpu')}, {torch.get_num_threads()} threads, {datetime.date.today()}, commit {_commit()}"
    gain = f"up to these densities at least {100 * (GAIN - 1):.0f} % faster"
    source = "; ".join([f"measured on {conditions}: {size}, {gain}", *left_out])
    _write(path, machine, found, source)
    return f"cofire tune: wrote {path}. {machine}: {source}."


def tune(
    device: str = "cuda", *, path: Path = compressed.TABLE, plan: Plan | None = None, progress: bool = False
) -> str:
    """Measure the device at hand, and keep what is best where kernels and layers look for it.

    Args:
        device: ``"cuda"``: the shipped tile candidates are timed. ``"cpu"``: the sparse products of compressed layers are, against
            dense ones, with the present number of threads; the table's entries of this CPU's instruction set are replaced.
        path: of the table, on a CPU.
        plan: what is measured on a CPU; default: all of it, in half an hour on two cores.
        progress: show a bar, on a CPU.

    Returns:
        What was done, in a sentence.

    Raises:
        ValueError: another device, ``"cuda"`` without a GPU, or a table that cannot be replaced.
    """
    if device == "cpu":
        return _tune_cpu(path, plan or Plan(), progress)
    if device != "cuda":
        raise ValueError(f"tune: device must be cpu or cuda, got {device!r}")
    if not torch.cuda.is_available():
        raise ValueError("tune: device cuda needs an NVIDIA GPU that torch can see, and there is none")
    written = importlib.import_module("cofire_kernels.configs.tune").tune()
    return f"cofire tune: wrote {written}"
