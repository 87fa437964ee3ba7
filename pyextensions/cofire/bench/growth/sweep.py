# SPDX-License-Identifier: Apache-2.0
"""What a sweep of an operator is: its case on larger and larger inputs, and what theory says of time and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cofire.bench import harness
from cofire.bench.cases import Case, Provider
from cofire.bench.results import Row

#: Exponents by name. Of n log n it is the slope over the thousands to millions that are swept.
LAWS: Mapping[str, float] = {"constant": 0.0, "root": 0.5, "linear": 1.0, "n log n": 1.1, "quadratic": 2.0}
PROVIDERS = ("cofire", "dense", "eager")
#: Plain torch is measured as long as its next call is expected to stay below so many ms and bytes.
LONGEST_MS, MOST_BYTES = 500.0, 1 << 30
SLOW_VARIANT = 4.0  #: a variant of plain torch so many times as slow as the best is not tried at the next size


@dataclass(frozen=True)
class Sweep:
    """An operator, and the case of each size. A case with gradients is timed forward and backward."""

    op: str
    grows: str  #: what the sizes count: "weights", "tokens", ...
    sizes: Sequence[int]
    case: Callable[[int], Case]
    time: str = "linear"  #: the law, one of :data:`LAWS`, that theory names
    memory: str = "linear"  #: of what a call allocates, outputs included
    family: str = ""

    def label(self, size: int) -> str:
        """How the name of a row's case begins: no two points of an operator share it."""
        return f"{size} {self.grows}"

    def measure(self, size: int, device: str, effort: harness.Effort, before: Sequence[Row]) -> list[Row]:
        """The rows of one size; ``before`` are those of other sizes: by the smaller ones plain torch is left out in time."""
        case, before = self.case(size), [r for r in before if r["size"] < size]
        case = replace(case, providers=_affordable(case.providers, size, before, LAWS[self.time]), family=self.family)
        mode = "forward+backward" if case.gradients else "forward"
        rows = harness.measure(case, mode, device, effort, PROVIDERS)
        for row in rows:
            row.update(case=f"{self.label(size)}: {case.name}", size=size)
        return rows


Providers = Mapping[str, Provider | Mapping[str, Provider]]


def _affordable(providers: Providers, size: int, before: Sequence[Row], law: float) -> Providers:
    """Those of :data:`PROVIDERS` that will not take too long, and of their variants those that came near the best."""
    found: dict[str, Provider | Mapping[str, Provider]] = {}
    for name in PROVIDERS[1:]:
        if name not in providers:
            continue
        entry = providers[name]
        rows = sorted((r for r in before if r["provider"] == name), key=lambda r: r["size"])
        if before and not rows:
            continue  # it was too slow before
        if rows and rows[-1]["correct"]:
            last = rows[-1]
            more = (size / last["size"]) ** max(law, 1.0)
            if last["median_ms"] * more > LONGEST_MS or last["peak_bytes"] * more > MOST_BYTES:
                continue
            times = last.get("variants_ms", {})
            if not isinstance(entry, Provider):
                entry = {v: p for v, p in entry.items() if times.get(v, 0.0) <= SLOW_VARIANT * last["median_ms"]}
        found[name] = entry
    return found
