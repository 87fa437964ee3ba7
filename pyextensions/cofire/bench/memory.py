# SPDX-License-Identifier: Apache-2.0
"""The memory of one step of differentiable k-means, for each method in a process of its own: ``cofire bench-memory``.

Two numbers, of one forward and one backward of one weight:

* *saved*: what autograd holds between forward and backward besides the weight, each storage once. For eDKM's hooks, what
  they store on one learner.
* *peak*: by how much the resident memory of the process grew at most (``VmHWM`` of Linux). The weight, the gradient that
  comes in and, after a step on a small weight, code and thread pools are there before; the output and the weight's
  gradient are in the growth, so that it is at least ``2 w``.

Methods that keep maps run on a smaller weight; what they would save of the large one is computed (maps and indices grow
with the weight, tables of distinct values do not) and marked as that.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from cofire.bench.cases import Random
from cofire.bench.edkm_hooks import PAPER_LEARNERS, PAPER_MB, EDKMHooks
from cofire.bench.results import FOLDER, Results, environment, parts_of, read_json, results_path
from cofire.bench.resume import may_stay, whole
from cofire.files import write_atomically

__all__ = ["METHODS", "load", "measure", "memory_table", "run"]

COMMAND = "cofire bench-memory"
KEY = ("method", "shape", "clusters")  #: what makes a row that row

LARGE, SMALL = (4096, 4096), (1024, 1024)
CLUSTERS, ITERATIONS = (8, 16), 3
STATUS = Path("/proc/self/status")

#: How each method calls itself in the tables, by the name it is asked for.
METHODS = {
    "cofire": "cofire",
    "cofire-implicit": "cofire, implicit gradient",
    "eager": "eager, bf16 maps",
    "eager-fp32": "eager, fp32 maps",
    "edkm": "eDKM hooks, none (each saved tensor by itself)",
    "edkm-m": "eDKM hooks, M",
    "edkm-ms": f"eDKM hooks, M+S, of {PAPER_LEARNERS} learners",
    "edkm-mu": "eDKM hooks, M+U",
    "edkm-mus": f"eDKM hooks, M+U+S, of {PAPER_LEARNERS} learners",
    "coremltools": "coremltools",
}
_PAPER = {"edkm": "base", "edkm-m": "M", "edkm-ms": "M+S", "edkm-mu": "M+U", "edkm-mus": "M+U+S"}


# --------------------------------------------------------------------------------------------- in the process measured


def _read(field: str) -> int:
    """Bytes of one line of the process's status, e.g. ``VmHWM``."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"bench-memory: {STATUS} has no line {field}")


def _settle() -> int:
    """Give freed memory back, forget the peak so far; returns the resident memory."""
    gc.collect()
    library = ctypes.util.find_library("c")
    if library is not None and hasattr(ctypes.CDLL(library), "malloc_trim"):
        ctypes.CDLL(library).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _read("VmHWM")


def _hooks(method: str, weight: Tensor) -> EDKMHooks:
    letters = method.removeprefix("edkm").removeprefix("-")
    techniques = {"marshal": "m" in letters, "uniquify": "u" in letters, "shard": "s" in letters}
    return EDKMHooks(weight, **techniques, learners=PAPER_LEARNERS)


def _forward(method: str, args: tuple[Any, ...]) -> Callable[[], Tensor]:
    """The forward pass of a method, ready to run."""
    from cofire.bench import clustering as bench
    from cofire.bench.peers._coremltools import dkm
    from cofire.registry import OPERATORS

    if method.startswith("cofire"):
        grad = "implicit" if method.endswith("implicit") else "unroll"
        return lambda: OPERATORS["dkm"](*args[:-1], grad)[0]
    if method == "coremltools":
        run = dkm(args[0].dtype)(*args)
        return lambda: run()  # type: ignore[no-any-return]
    return lambda: (bench.eager_dkm_fp32 if method == "eager-fp32" else bench.eager_dkm)(*args)


class _Counter:
    """Counts what autograd saves, each storage once, without the weight's."""

    def __init__(self, weight: Tensor) -> None:
        self.own, self.seen = weight.untyped_storage().data_ptr(), dict[int, int]()

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() != self.own:
            self.seen[storage.data_ptr()] = storage.nbytes()
        return x.detach()


def measure(method: str, shape: tuple[int, int], clusters: int, iterations: int = ITERATIONS) -> dict[str, Any]:
    """One method in this process: use a fresh one for each call, the peak is the process's.

    Args:
        method: one of :data:`METHODS`.
        shape: of the weight, bfloat16.
        clusters, iterations: K and T.

    Returns:
        A row: what was measured, in bytes and seconds.

    Raises:
        KeyError: an unknown method. OSError: not on Linux.
    """
    from cofire.bench.clustering import HALF, _dkm_args

    METHODS[method]

    def step(shape: tuple[int, int], count: bool) -> tuple[int, int, float]:
        """Bytes saved, bytes of the peak above what was there, seconds."""
        args = _dkm_args(Random("memory"), shape, HALF, clusters, 1, None, iterations, "unroll")
        weight = args[0].requires_grad_()
        seed = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(HALF)
        forward, counter = _forward(method, args), _Counter(weight)
        context: AbstractContextManager[Any] = nullcontext()
        if method.startswith("edkm"):
            context = _hooks(method, weight)
        elif count:
            context = saved_tensors_hooks(counter.pack, lambda x: x)
        before, start = _settle(), time.perf_counter()
        with context:
            output = forward()
        (gradient,) = torch.autograd.grad(output, weight, seed)
        seconds, peak = time.perf_counter() - start, _read("VmHWM")
        assert gradient.shape == output.shape
        saved = context.bytes if isinstance(context, EDKMHooks) else sum(counter.seen.values())
        return saved, peak - before, seconds

    step((64, 64), True)
    _, peak, seconds = step(shape, False)
    saved, _, _ = step(shape, True)
    return {
        "method": method,
        "shape": list(shape),
        "clusters": clusters,
        "iterations": iterations,
        "weight_bytes": 2 * shape[0] * shape[1],
        "saved_bytes": saved,
        "peak_bytes": peak,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }


# ------------------------------------------------------------------------------------------------------------- the suite


def saved_of(row: dict[str, Any], shape: tuple[int, int] = LARGE) -> int:
    """What a method that was measured on a small weight would save of a larger one."""
    method, weights, larger = row["method"], row["weight_bytes"] // 2, shape[0] * shape[1]
    if method.startswith("cofire"):  # centroids alone
        return int(row["saved_bytes"])
    if method in ("edkm-mu", "edkm-mus"):
        learners = PAPER_LEARNERS if method == "edkm-mus" else 1
        index = 2 * weights // learners  # int16; the tables of distinct values stay
        return int(row["saved_bytes"] - index + 2 * larger // learners)
    return int(row["saved_bytes"] * larger // weights)


def run(
    methods: Sequence[str] | None = None,
    out: str | Path | None = None,
    *,
    large: tuple[int, int] = LARGE,
    small: tuple[int, int] = SMALL,
    clusters: Iterable[int] = CLUSTERS,
    announce: Callable[[str], Any] = lambda text: None,
) -> dict[str, Any]:
    """Measure every method in a process of its own and write a file after each of them.

    What the file holds of other methods stays, if it was measured in this environment; one that is broken is moved aside.

    Args:
        methods: of :data:`METHODS`; default all (coremltools where it is installed).
        out: the file; default ``benchmarks/results/memory/<device>.json``.
        large, small: shapes of the weight, for ours and for those that keep maps.
        clusters: K.
        announce: called with a line before each measurement, and about a file that is moved aside.

    Returns:
        What the file holds, ``environment`` and ``rows``; and ``refused``, which measurements failed, with their last
        lines.

    Raises:
        ValueError: an unknown method, or a file of another kind or of another cofire, which stays as it is.

    Example:
        >>> run(["cofire"], out="/tmp/memory.json")["rows"][0]["saved_bytes"]  # doctest: +SKIP
        292
    """
    from cofire.bench.cases import installed, known

    default = [m for m in METHODS if m != "coremltools" or installed("coremltools")]
    chosen = known("method", methods or default, list(METHODS))
    path = Path(out) if out is not None else memory_path()
    here, rows, refused = environment("cpu", False), [], []
    earlier = whole(path, lambda: load(path), announce)
    if earlier is not None and may_stay(path, Results(earlier["environment"], {}), here, announce):
        rows = earlier["rows"]
    for method in chosen:
        shape = large if method.startswith("cofire") else small
        for k in clusters:
            announce(f"{METHODS[method]}, {shape[0]}x{shape[1]}, K{k}")
            call = [sys.executable, "-m", "cofire.bench.memory", method, *map(str, shape), str(k)]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                refused.append(f"{method}, K{k}: ended with {done.returncode}: {reason}")
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            rows = [r for r in rows if any(r[name] != row[name] for name in KEY)] + [row]
            write_atomically(path, json.dumps({"environment": here, "rows": rows}, indent=1) + "\n")
    return {"environment": here, "rows": rows, "refused": refused}


def load(path: str | Path) -> dict[str, Any]:
    """Read a file of :func:`run`.

    Raises:
        FileNotFoundError: there is none. ValueError: it is cut off, another kind of file, or of another cofire.
    """
    data = parts_of(read_json(path, COMMAND), {"environment": dict, "rows": list}, path, COMMAND)
    wanted = (*KEY, "weight_bytes", "saved_bytes", "peak_bytes")
    lacking = [name for name in ("device", "threads", "torch", "date") if name not in data["environment"]]
    lacking += [name for name in wanted if any(not isinstance(row, dict) or name not in row for row in data["rows"])]
    if lacking:
        raise ValueError(
            f"bench-memory: {path} was written by an older cofire or by another program: it lacks {', '.join(lacking)}; "
            f"measure again with {COMMAND}"
        )
    return data


def memory_path() -> Path:
    return FOLDER / "memory" / results_path("cpu").name


def _size(value: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} B"


def memory_table(found: dict[str, Any]) -> str:
    """As markdown, with the paper's own ablation beside the hooks."""
    columns = ["method", "weight", "K", "saved for backward", f"saved at {LARGE[0]}x{LARGE[1]}"]
    columns += ["growth of resident memory", "of it in weights", "paper's own, K = 8"]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join(["---"] * len(columns)) + " |"]
    for row in found["rows"]:
        at_large = _size(row["saved_bytes"])
        if row["shape"] != list(LARGE):
            at_large = f"{_size(saved_of(row))} (computed)"
        paper = _PAPER.get(row["method"]) if row["clusters"] == 8 else None
        cells = [
            METHODS[row["method"]],
            f"{row['shape'][0]}x{row['shape'][1]}",
            str(row["clusters"]),
            _size(row["saved_bytes"]),
            at_large,
            _size(row["peak_bytes"]),
            f"{row['peak_bytes'] / row['weight_bytes']:.2f} w",
            f"{PAPER_MB[paper]} MB" if paper else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    e = found["environment"]
    where = f"{e['device']}, {e['threads']} threads, torch {e['torch']}, {e['date']}"
    return "\n".join(
        [
            *lines,
            "",
            f"{where}. bfloat16, T = {ITERATIONS}. Resident memory: output and gradient are two of the weights; the "
            "hooks' is that of keeping every learner's share.",
        ]
    )


if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    rows_, columns_, k_ = map(int, numbers)
    print(json.dumps(measure(name, (rows_, columns_), k_)))
