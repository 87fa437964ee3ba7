# SPDX-License-Identifier: Apache-2.0
"""Log-log plots of a growth file, as narrow as a phone: time and memory of each sweep side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cofire.bench.growth.laws import Key, Points, fitted, points_of, sweeps_of
from cofire.bench.growth.sweep import LAWS
from cofire.bench.report.chart import LOSS, TIE, WIDTH, WIN, Chart, LogAxis, legend
from cofire.bench.results import Results, Row

METHODS = "methods"  #: where the plots of methods stand, whatever their family
COLORS = {"cofire": WIN, "dense": TIE, "eager": LOSS}
WORDS = {"cofire": "cofire", "dense": "plain torch", "eager": "as usually written"}
BLOCK = 138.0  #: the height of a sweep
PANEL, LEFT = 84.0, 36.0  #: the height of a panel, and the room for the numbers beside it
UNITS = (("median_ms", "time_law", "ms", 1.0), ("peak_bytes", "memory_law", "MiB", 2.0**-20))


def growth_plots(results: Results) -> dict[str, str]:
    """As SVG text, by family, methods under ``"methods"``. Of a method plain torch is a step without it."""
    groups: dict[str, dict[Key, list[Row]]] = {}
    for key, rows in sweeps_of(results).items():
        groups.setdefault(METHODS if key[1].startswith("method:") else key[0], {})[key] = rows
    return {name: _picture(name, groups[name]) for name in sorted(groups)}


def _picture(name: str, sweeps: Mapping[Key, list[Row]]) -> str:
    there = {r["provider"] for rows in sweeps.values() for r in rows}
    entries = [(WORDS[p], color, True) for p, color in COLORS.items() if p in there]
    top = legend(Chart(0, ""), 14, entries) + 14  # on a canvas of its own, to learn how high it is
    chart = Chart(top + BLOCK * len(sweeps), f"{name}: time and memory by size")
    legend(chart, 14, entries)
    chart.line([(8, top - 17), (30, top - 17)], dash="1,2")
    chart.text(35, top - 14, "what theory says, through cofire's last point; numbers are exponents", 9)
    for i, ((_, op, grows), rows) in enumerate(sweeps.items()):
        y = top + BLOCK * i
        chart.text(8, y + 14, f"{op.removeprefix('method:')}, by {grows}", 11, bold=True, room=WIDTH - 16)
        for k, (column, law, unit, scale) in enumerate(UNITS):
            lines = {p: [(s, c * scale) for s, c in points_of(rows, p, column)] for p in COLORS}
            _panel(chart, 4 + k * WIDTH / 2, y + 28, {p: v for p, v in lines.items() if v}, rows[0].get(law), unit)
    return chart.svg()


def _panel(chart: Chart, left: float, top: float, lines: Mapping[str, Points], law: str | None, unit: str) -> None:
    """A line for each provider, and, dotted, the law of theory through cofire's last point."""
    if not lines:
        chart.text(left + 4, top, f"{unit}: nothing", 9)
        return
    fits = [(fitted(points), COLORS[provider]) for provider, points in lines.items()]
    numbers = ", ".join(f'<tspan fill="{color}">{fit:.2f}</tspan>' for fit, color in fits if fit is not None)
    chart.parts.append(
        f'<text x="{left + 4:g}" y="{top:g}" font-size="9">{unit}: {numbers}{f" ({law})" if law is not None else ""}</text>'
    )
    every = [point for points in lines.values() for point in points]
    x = LogAxis([size for size, _ in every], left + LEFT, left + WIDTH / 2 - 14)
    y = LogAxis([cost for _, cost in every], top + 8 + PANEL, top + 10)
    for tick in _apart(x, 24):
        chart.line([(x(tick), y.start), (x(tick), y.end)], TIE, 0.3, "1,3")
        chart.text(x(tick), top + 18 + PANEL, _short(tick), 8, "middle")
    for tick in _apart(y, 10):
        chart.line([(x.start, y(tick)), (x.end, y(tick))], TIE, 0.3, "1,3")
        chart.text(left + LEFT - 4, y(tick) + 3, _short(tick), 8, "end")
    for provider, points in lines.items():
        chart.line([(x(size), y(cost)) for size, cost in points], COLORS[provider], 1.2)
        for size, cost in points:
            chart.dot(x(size), y(cost), COLORS[provider], tip=f"{WORDS[provider]}: {_short(cost)} {unit} at {size:,}")
    if law is not None and law in LAWS and len(lines.get("cofire", ())) > 1:
        chart.line(_guide(lines["cofire"], LAWS[law], x, y), dash="1,2")


def _apart(axis: LogAxis, room: float) -> list[float]:
    """Ticks with room for their numbers."""
    taken: list[float] = []
    for tick in axis.ticks():
        if not taken or abs(axis(tick) - axis(taken[-1])) >= room:
            taken.append(tick)
    return taken


def _guide(points: Points, power: float, x: LogAxis, y: LogAxis) -> Sequence[tuple[float, float]]:
    """From the last point down to the first size, or to the lowest cost that the panel shows."""
    (first, _), (last, cost) = points[0], points[-1]
    if power and cost * (first / last) ** power < y.low:
        first = last * (y.low / cost) ** (1 / power)
    return [(x(size), y(cost * (size / last) ** power)) for size in (first, last)]


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"
