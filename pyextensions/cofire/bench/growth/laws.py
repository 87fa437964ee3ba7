# SPDX-License-Identifier: Apache-2.0
"""What a growth file says: exponents, fitted and expected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from cofire.bench.growth.sweep import LAWS
from cofire.bench.results import Results, Row

HEADINGS = (
    *("operator or method", "what grows", "fitted over", "exponent of time", "theory"),
    *("exponent of memory", "theory", "plain torch: time", "plain torch: memory"),
)
EXCESS = 0.25  #: an exponent that is so much above theory is bold
Points = list[tuple[float, float]]
Key = tuple[str, str, str]  #: family, operator, what grows


def upper_half(points: Sequence[tuple[float, float]]) -> Points:
    """The points that an exponent is fitted to: of 5 the 3 largest, of 4 and 3 the 2 largest."""
    ordered = sorted(points)
    return ordered[min(len(ordered) // 2, max(len(ordered) - 2, 0)) :]


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """How a cost grows with size: the slope of the least squares line of log cost by log size.

    Only the upper half of the sizes counts (:func:`upper_half`): on small inputs the cost of the call itself, which does
    not grow, hides the law.

    Args:
        points: pairs of size and cost, all above 0, of two sizes or more.

    Raises:
        ValueError: fewer than two sizes, one size twice, or a number that is not above 0.

    Example:
        >>> exponent([(1, 5.0), (10, 5.0), (100, 300.0), (1000, 30000.0)])
        2.0
    """
    sizes = [size for size, _ in points]
    if len(set(sizes)) < max(len(sizes), 2):
        raise ValueError(f"exponent: points must have two sizes or more, each once, got the sizes {sizes}")
    if any(not 0 < number < math.inf for point in points for number in point):
        raise ValueError(f"exponent: sizes and costs must be above 0, got {list(points)}")
    logs = [(math.log(size), math.log(cost)) for size, cost in upper_half(points)]
    x0, y0 = (sum(column) / len(logs) for column in zip(*logs))
    slope: float = sum((x - x0) * (y - y0) for x, y in logs) / sum((x - x0) ** 2 for x, _ in logs)
    return slope


def sweeps_of(results: Results) -> dict[Key, list[Row]]:
    """The rows of each sweep, by size. Rows of no sweep are passed over."""
    found: dict[Key, list[Row]] = {}
    for row in sorted((r for r in results.rows if "sweep" in r), key=lambda r: r["size"]):
        found.setdefault((row["family"], row["op"], row["sweep"]), []).append(row)
    return dict(sorted(found.items()))


def points_of(rows: Iterable[Row], provider: str, column: str) -> Points:
    """Size and cost, where there is one."""
    return [(r["size"], r[column]) for r in rows if r["provider"] == provider and r[column]]


def fitted(points: Points) -> float | None:
    """The exponent, or None of fewer than two points. It is rounded, so that there is no minus before a zero."""
    return round(exponent(points), 2) + 0.0 if len(points) > 1 else None


def _cell(points: Points, law: str | None, noisy: bool = False) -> str:
    found = fitted(points)
    if found is None:
        return "-"
    text = ("~" if noisy else "") + f"{found:.2f}"
    return f"**{text}**" if law is not None and found > LAWS.get(law, found) + EXCESS else text


def growth_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line for each sweep: exponents of cofire, fitted and expected, and those of plain torch.

    ``~`` marks a fit to a noisy row, and bold one that is 0.25 or more above theory. Of a method plain torch is the same
    network trained without it.
    """
    lines = []
    for (_, op, grows), rows in sweeps_of(results).items():
        ours = [r for r in rows if r["provider"] == "cofire"]
        laws = (ours or rows)[0].get("time_law"), (ours or rows)[0].get("memory_law")
        time, memory = (points_of(rows, "cofire", column) for column in ("median_ms", "peak_bytes"))
        sizes = [size for size, _ in upper_half(time)]
        noisy = any(r["noisy"] for r in ours if r["size"] in sizes)
        lines.append(
            [
                op,
                grows,
                f"{sizes[0]:,} to {sizes[-1]:,}" if len(sizes) > 1 else "-",
                _cell(time, laws[0], noisy),
                laws[0] or "-",
                _cell(memory, laws[1]) if memory or not time else "allocates nothing",
                laws[1] or "-",
                _cell(points_of(rows, "dense", "median_ms"), None),
                _cell(points_of(rows, "dense", "peak_bytes"), None),
            ]
        )
    return list(HEADINGS), lines
