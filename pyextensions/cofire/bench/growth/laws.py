# SPDX-License-Identifier: Apache-2.0
"""What a growth file says: exponents, fitted and expected, and up to where the fixed cost of a call hides them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from cofire.bench.growth.sweep import LAWS
from cofire.bench.results import Results, Row

HEADINGS = (
    *("operator or method", "what grows", "fitted over", "exponent of time", "theory", "fixed cost"),
    *("exponent of memory", "theory", "plain torch: time", "plain torch: memory"),
)
DEVIATION = 0.25  #: an exponent that is so far from theory says so
HALF = 0.5  #: of a call's time: from there on its fixed cost does not rule it
Points = list[tuple[float, float]]
Spread = list[tuple[float, float, float]]  #: size, and the cost of quick and of slow readings
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


def _weights(sizes: Sequence[float]) -> list[float]:
    """What each log cost counts in the slope of the least squares line by log size."""
    logs = [math.log(size) for size in sizes]
    middle = sum(logs) / len(logs)
    total = sum((x - middle) ** 2 for x in logs)
    return [(x - middle) / total for x in logs]


def exponent_range(spread: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """The smallest and the largest :func:`exponent` that costs within their spread allow.

    Args:
        spread: size, lowest and highest cost, all above 0, of two sizes or more.

    Example:
        >>> low, high = exponent_range([(1, 1.0, 1.0), (2, 2.0, 4.0)])
        >>> round(low), round(high)
        (1, 2)
    """
    taken = {size: (low, high) for size, low, high in spread}
    sizes = [size for size, _ in upper_half([(size, low) for size, low, _ in spread])]
    ends = [(w * math.log(taken[size][0]), w * math.log(taken[size][1])) for w, size in zip(_weights(sizes), sizes)]
    return sum(map(min, ends)), sum(map(max, ends))


def fixed_until(points: Sequence[tuple[float, float]], power: float) -> float | None:
    """The largest size at which a fixed cost is half of the whole or more; None where it nowhere is, or cannot be told.

    The cost is taken for ``a + b size^power``, by least squares of the relative errors.

    Args:
        points: pairs of size and cost, all above 0.
        power: of the law that theory names.

    Example:
        >>> fixed_until([(1, 11.0), (10, 20.0), (100, 110.0), (1000, 1010.0)], 1)
        10
    """
    if len(points) < 3 or power <= 0:
        return None
    largest = max(size for size, _ in points)
    parts = [(1 / cost, (size / largest) ** power / cost) for size, cost in points]
    uu, uv, vv = sum(u * u for u, _ in parts), sum(u * v for u, v in parts), sum(v * v for _, v in parts)
    u1, v1 = sum(u for u, _ in parts), sum(v for _, v in parts)
    fixed, rest = (u1 * vv - v1 * uv) / (uu * vv - uv * uv), (v1 * uu - u1 * uv) / (uu * vv - uv * uv)
    if fixed <= 0:
        return None
    ruled = [s for s, _ in points if fixed >= HALF * (fixed + max(rest, 0.0) * (s / largest) ** power)]
    return max(ruled, default=None)


def sweeps_of(results: Results) -> dict[Key, list[Row]]:
    """The rows of each sweep, by size. Rows of no sweep are passed over."""
    found: dict[Key, list[Row]] = {}
    for row in sorted((r for r in results.rows if "sweep" in r), key=lambda r: r["size"]):
        found.setdefault((row["family"], row["op"], row["sweep"]), []).append(row)
    return dict(sorted(found.items()))


def points_of(rows: Iterable[Row], provider: str, column: str) -> Points:
    """Size and cost, where there is one."""
    return [(r["size"], r[column]) for r in rows if r["provider"] == provider and r[column]]


def spread_of(rows: Iterable[Row], provider: str) -> Spread:
    """Size, and the times that a fifth of the readings lie below and above, where a file has them."""
    ours = (r for r in rows if r["provider"] == provider)
    return [(r["size"], r["p20_ms"], r["p80_ms"]) for r in ours if r.get("p20_ms") and r.get("p80_ms")]


def fitted(points: Points) -> float | None:
    """The exponent, or None of fewer than two points. It is rounded, so that there is no minus before a zero."""
    return round(exponent(points), 2) + 0.0 if len(points) > 1 else None


def _cell(points: Points, law: str | None, noisy: bool = False, spread: Spread | None = None) -> str:
    found = fitted(points)
    if found is None:
        return "-"
    text = ("~" if noisy else "") + f"{found:.2f}"
    if spread is not None and len(spread) == len(points):
        text += " [{:.2f}, {:.2f}]".format(*(round(end, 2) + 0.0 for end in exponent_range(spread)))
    expected = LAWS.get(law or "", found)
    if found > expected + DEVIATION:
        return f"**{text}** above"
    return f"{text} below" if found < expected - DEVIATION else text


def _fixed(points: Points, law: str | None) -> str:
    found = fixed_until(points, LAWS.get(law or "", 0.0))
    return "-" if found is None else f"up to {found:,}"


def growth_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line for each sweep: exponents of cofire, fitted and expected, and those of plain torch.

    ``~`` marks a fit to a noisy row, ``above`` (bold) and ``below`` one that is 0.25 or more away from theory. In brackets
    the exponents that readings between their 20th and 80th percentiles allow (:func:`exponent_range`); *fixed cost*: up to
    which size it is half of the time or more (:func:`fixed_until`). Of a method plain torch is the same network trained
    without it.
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
                _cell(time, laws[0], noisy, spread_of(rows, "cofire")),
                laws[0] or "-",
                _fixed(time, laws[0]),
                _cell(memory, laws[1]) if memory or not time else "allocates nothing",
                laws[1] or "-",
                _cell(points_of(rows, "dense", "median_ms"), None),
                _cell(points_of(rows, "dense", "peak_bytes"), None),
            ]
        )
    return list(HEADINGS), lines
