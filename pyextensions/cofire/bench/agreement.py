# SPDX-License-Identifier: Apache-2.0
"""Do two runs say the same? How many rows that were not flagged beforehand have the same time: ``cofire bench-agree``.

A run decides by itself what is usual, and on a machine that is shared that may be another speed in the next run. So a row is
compared where no run flagged it and the probe took the same time beside it in both: its times are not asked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cofire.bench.quiet import BAND
from cofire.bench.results import FORMAT, KEY, Results, Row, flagged, parts_of, read_json
from cofire.files import write_atomically

ENOUGH = 0.9  #: the share of rows that has to agree
UNDISTURBED = 0.2  #: the share of rows that has to be undisturbed: of fewer nobody knows what the others would say
COMMAND = "cofire bench-agree --out"
MACHINE = ("device", "kind", "threads", "instruction_set")  #: by what a report knows whose runs agree
#: Of a file that keeps what was found, by what they are.
PARTS: dict[str, type] = {"environment": dict, "runs": list, "agreement": dict}
NUMBERS = ("within", "pairs", "flagged", "times", "speedups")


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)


@dataclass(frozen=True)
class Agreement:
    """``pairs`` are the rows that both files have and whose probe was quiet and alike; ``flagged`` the pairs left out for it."""

    pairs: list[tuple[Row, Row]]
    flagged: int
    within: float
    apart: str = ""  #: how the environments differ
    environments: tuple[dict[str, Any], ...] = field(default=(), compare=False)

    def share(self, number: str = "median_ms") -> float | None:
        """Of the pairs that have this number, how many differ by no more than ``within``; None where no pair has it."""
        ratios = [_ratio(a[number], b[number]) for a, b in self.pairs if a.get(number) and b.get(number)]
        return sum(r <= 1 + self.within for r in ratios) / len(ratios) if ratios else None

    @property
    def undisturbed(self) -> float:
        """Of the rows that both files have, how many the probes let count."""
        return len(self.pairs) / (len(self.pairs) + self.flagged)

    @property
    def enough(self) -> bool:
        """Whether nine rows in ten agree, and one in five or more could be compared."""
        share = self.share()
        return share is not None and share >= ENOUGH and self.undisturbed >= UNDISTURBED

    def text(self, worst: int = 10) -> str:
        """For people: the shares, and the rows that differ most."""
        count = len(self.pairs)
        lines = [f"the environments differ: {self.apart}"] if self.apart else []
        lines.append(
            f"{count} rows in both files; {self.flagged} more left out: the machine was busy, or of another speed"
        )
        if self.undisturbed < UNDISTURBED:
            few = f"only {100 * self.undisturbed:.1f} % of the rows were undisturbed"
            lines.append(f"  {few}: too few to say that the runs agree ({100 * UNDISTURBED:g} % are asked for)")
        for number, words in (("median_ms", "times"), ("speedup", "speed-ups")):
            share = self.share(number)
            if share is not None:
                lines.append(f"  {100 * share:.1f} % of the {words} agree within {100 * self.within:g} %")
        order = sorted(self.pairs, key=lambda pair: -_ratio(pair[0]["median_ms"], pair[1]["median_ms"]))
        for a, b in order[:worst]:
            what = ", ".join(str(a[k]) for k in ("op", "case", "dtype", "mode", "provider"))
            ratio = _ratio(a["median_ms"], b["median_ms"])
            lines.append(f"  {ratio:5.2f}x  {a['median_ms']:.4g} and {b['median_ms']:.4g} ms  {what}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """What a file keeps of it: the machine, the two runs, and the shares."""
        first = self.environments[0] if self.environments else {}
        return {
            "environment": {**{name: first.get(name) for name in MACHINE}, "format": FORMAT},
            "runs": [{name: e.get(name) for name in ("commit", "date", "quick")} for e in self.environments],
            "agreement": {
                "within": self.within,
                "pairs": len(self.pairs),
                "flagged": self.flagged,
                "times": self.share(),
                "speedups": self.share("speedup"),
                "apart": self.apart,
            },
        }

    def save(self, path: str | Path) -> Path:
        """Keep it for ``cofire report``, which reads ``agreement/*.json`` beside the results.

        Raises:
            ValueError: something else lies there already, such as a results file.
        """
        try:
            load(path)
        except FileNotFoundError:
            pass
        except ValueError as error:
            why = str(error).removeprefix("bench-agree: ")
            raise ValueError(
                f"bench-agree: out must be a new file, or one of {COMMAND} to replace; {why}. It stays as it is"
            ) from None
        return write_atomically(Path(path), json.dumps(self.to_json(), indent=1) + "\n")


def load(path: str | Path) -> dict[str, Any]:
    """Read a file of :meth:`Agreement.save`.

    Raises:
        FileNotFoundError: there is none. ValueError: it is cut off, another kind of file, or of a newer cofire.
    """
    data = parts_of(read_json(path, COMMAND), PARTS, path, COMMAND)
    found = data["agreement"]
    wrong = [name for name in NUMBERS if not isinstance(found.get(name), int | float | None) or name not in found]
    lacking = [name for name in MACHINE if name not in data["environment"]]
    if wrong or lacking or not all(isinstance(run, dict) for run in data["runs"]):
        what = ", ".join([*wrong, *lacking]) or "facts of the runs"
        raise ValueError(f"bench-agree: {path} is not a results file: it lacks {what}; name a file of {COMMAND}")
    return data


def sentence(found: dict[str, Any]) -> str:
    """For a page: what :func:`load` has read."""
    numbers = found["agreement"]
    every = numbers["pairs"] + numbers["flagged"]
    share = numbers["pairs"] / every if every else 0.0
    parts = [
        f"{100 * numbers[name]:.1f} % of the {words}"
        for name, words in (("times", "times"), ("speedups", "speed-ups over dense"))
        if numbers[name] is not None
    ]
    runs = " and ".join(f"{run.get('commit') or 'no commit'}, {run.get('date')}" for run in found["runs"])
    met = (numbers["times"] or 0.0) >= ENOUGH and share >= UNDISTURBED
    asked = f"{100 * ENOUGH:g} % of the times, of at least {100 * UNDISTURBED:g} % of the rows"
    quick = ", quick ones" if any(run.get("quick") for run in found["runs"]) else ""
    return (
        f"Two runs{quick} ({runs}) have {every} rows in common, {numbers['pairs']} undisturbed in both and at one speed of "
        f"the machine: of these "
        f"{' and '.join(parts) or 'nothing'} agree within {100 * numbers['within']:g} %. Asked for were {asked}: "
        f"{'met' if met else 'not met'}."
    )


def _timed(results: Results) -> dict[tuple[Any, ...], Row]:
    return {tuple(r[k] for k in KEY): r for r in results.rows if r["correct"] and r["median_ms"]}


def agreement(a: Results, b: Results, within: float = 0.10) -> Agreement:
    """Compare two runs row by row.

    Args:
        a, b: results of the same machine.
        within: how much two times may differ, as a share of the shorter one.

    Returns:
        What agrees; rows that the probe flagged in one of the runs are left out, and those beside which it took another time
        in the other run, both decided without their times, and so are those that both files have from the same run.

    Raises:
        ValueError: no row was measured in both, or ``within`` is not above 0.
    """
    if not within > 0:
        raise ValueError(f"bench: within must be above 0, got {within}")
    first, second = _timed(a), _timed(b)
    shared = [(first[key], second[key]) for key in first if key in second]
    both = [(x, y) for x, y in shared if "run" not in x or x["run"] != y.get("run")]
    quiet = [pair for pair in both if not any(map(flagged, pair)) and _alike(*pair)]
    if not quiet:
        why = f"{len(both)} are in both, all flagged as noisy or of another speed" if both else "no row is in both"
        why = f"all {len(shared)} rows that are in both are of the same run" if shared and not both else why
        raise ValueError(f"bench: the two results files have nothing to compare: {why}")
    apart = "" if a.same_environment(b.environment) else _apart(a, b)
    return Agreement(quiet, len(both) - len(quiet), within, apart, (a.environment, b.environment))


def _alike(a: Row, b: Row) -> bool:
    """Whether the probe took the same time beside both rows; pieces of work that neither row felt do not count."""
    first, second = a.get("probe", {}), b.get("probe", {})
    besides = {*a.get("unfelt", ())} & {*b.get("unfelt", ())}
    return all(_ratio(first[part], second[part]) <= BAND for part in {*first} & {*second} - besides)


def _apart(a: Results, b: Results) -> str:
    names = [k for k in a.environment if k in b.environment and not a.same_environment({k: b.environment[k]})]
    return ", ".join(f"{k} {a.environment[k]} and {b.environment[k]}" for k in names)
