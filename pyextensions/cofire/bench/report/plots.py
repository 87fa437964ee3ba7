# SPDX-License-Identifier: Apache-2.0
"""The pictures: who won, by how much, and how near to the machine's ceilings. As narrow as a phone; long ones are split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cofire.bench.ceilings import bandwidth_of
from cofire.bench.report import chart
from cofire.bench.report.chart import COLORS, LOSS, TIE, WIDTH, WIN, Chart, LogAxis
from cofire.bench.report.rows import LOST, TIED, WON, Comparison, Measurement, Score, Standing, measurements
from cofire.bench.report.tables import SHORT, digits, times
from cofire.bench.results import UNCOMPARED, Results, Row

MOST_BARS = 36  #: in one picture
SHADE = {WON: WIN, TIED: TIE, LOST: LOSS}


def standing_plot(standings: Sequence[Standing]) -> str | None:
    """For each family and machine three bars: how many measurements were won, tied and lost."""
    if not standings:
        return None
    picture = Chart(34 + 60 * len(standings), "won, tied and lost by family")
    x = 8.0
    for word, color in SHADE.items():
        picture.rect(x, 6, 9, 9, color)
        picture.text(x + 13, 14, word, 10)
        x += 56
    several = len({s.machine for s in standings}) > 1
    y = 34.0
    for s in standings:
        picture.text(8, y, s.family, 11, bold=True)
        if several:
            picture.text(WIDTH - 8, y, s.machine, 9, "end", room=220)
        for i, (name, found) in enumerate(
            (("plain torch", s.dense), ("libraries", s.library), ("other torch", s.torch))
        ):
            _share_bar(picture, y + 5 + 14 * i, name, found)
        y += 60
    return picture.svg()


def _share_bar(picture: Chart, y: float, name: str, found: Score) -> None:
    start, end = 74.0, WIDTH - 52.0
    picture.text(8, y + 9, name, 9)
    if not found.count:
        picture.text(start, y + 9, "not compared", 9)
        return
    x = start
    for word, count in ((WON, found.won), (TIED, found.tied), (LOST, found.lost)):
        width = (end - start) * count / found.count
        if count:
            picture.rect(x, y, width - 1, 11, SHADE[word], tip=f"{word} {count} of {found.count}")
            if width > 8 * len(str(count)):
                picture.parts.append(
                    f'<text x="{chart.number(x + width / 2)}" y="{chart.number(y + 9)}" font-size="9" fill="#ffffff" '
                    f'text-anchor="middle">{count}</text>'
                )
        x += width
    picture.text(WIDTH - 8, y + 9, times(found.mean), 10, "end", bold=True)


def speedup_plots(rows: Sequence[Row]) -> list[str]:
    """One bar per measurement: to the right of 1 faster than the strongest plain torch, to the left slower."""
    shown = [m for m in measurements(rows) if m.against_dense is not None]
    each = math.ceil(len(shown) / max(1, math.ceil(len(shown) / MOST_BARS)))  # pieces of about the same length
    pieces = [shown[i : i + each] for i in range(0, len(shown), max(each, 1))]
    ratios = [m.against_dense.ratio for m in shown if m.against_dense is not None]
    return [_speedups(piece, ratios) for piece in pieces]


def speedup_plot(rows: Sequence[Row]) -> str | None:
    """All of :func:`speedup_plots`, for a page."""
    return "".join(map(chart.inline, speedup_plots(rows))) or None


def _speedups(shown: Sequence[Measurement], ratios: Sequence[float]) -> str:
    ops = dict.fromkeys(m.op for m in shown)
    picture = Chart(24 + 25 * len(shown) + 18 * len(ops) + 14, "speed-up over the strongest plain torch")
    axis = LogAxis([*ratios, 0.8, 1.25], 8, WIDTH - 44)
    ticks = _readable(axis)
    for tick in ticks:
        picture.text(axis(tick), picture.height - 4, f"{tick:g}x", 9, "middle")
    y = 16.0
    for op in ops:
        y += 18
        picture.text(8, y - 5, op, 11, bold=True)
        for m in shown:
            if m.op == op and m.against_dense is not None:
                for tick in ticks:  # beside the bars alone: words stay readable
                    picture.line([(axis(tick), y + 10), (axis(tick), y + 22)], TIE, 0.4)
                _bar(picture, axis, y, m, m.against_dense)
                picture.line([(axis(1), y + 9.5), (axis(1), y + 21.5)])
                y += 25
    return picture.svg()


def _readable(axis: LogAxis) -> list[float]:
    """Ticks far enough apart, 1 among them."""
    taken = [1.0]
    for tick in axis.ticks():
        if all(abs(axis(tick) - axis(t)) > 26 for t in taken):
            taken.append(tick)
    return taken


def _bar(picture: Chart, axis: LogAxis, y: float, m: Measurement, found: Comparison) -> None:
    mode = "" if m.mode == "forward" else f", {m.mode.removeprefix('forward, ')}"
    noisy = bool(m.rows["cofire"]["noisy"] or m.rows["dense"]["noisy"])
    picture.text(8, y + 8, f"{m.case}, {SHORT.get(m.dtype, m.dtype)}{mode}", 8.5, room=WIDTH - 16)
    left, right = sorted((axis(1), axis(found.ratio)))
    interval = found.interval
    range_ = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval is not None else f", {found.pairs} pairs"
    tip = f"{times(found.ratio)}{range_}{', noisy' if noisy else ''}"
    picture.rect(left, y + 11, right - left, 9, SHADE[found.verdict], 0.5 if noisy else 1, tip)
    ends = [min(max(v, axis.low), axis.high) for v in interval or (found.ratio, found.ratio)]
    if interval is not None:
        picture.line([(axis(ends[0]), y + 15.5), (axis(ends[1]), y + 15.5)], width=1)
    picture.text(
        max(right, axis(ends[1])) + 4, y + 19, ("~" if noisy else "") + times(found.ratio), 9, bold=found.ratio < 1
    )


def roofline_plots(results: Results, rows: Sequence[Row]) -> list[str]:
    """Arithmetic against intensity; and bandwidth, for the operators that do next to no arithmetic."""
    if not results.ceilings.get("copy_gbs"):
        return []
    taken = [m for m in measurements(rows) if m.compared]
    shown = [r for m in taken for r in (m.dense, m.ours) if r is not None]
    arithmetic = [r for r in shown if r["flops"] and r["bytes"]]
    moving = [r for r in shown if not r["flops"] and r["bytes"]]
    found = [_arithmetic(results.ceilings, arithmetic)] if arithmetic else []
    return found + ([_bandwidth(results.ceilings, moving)] if moving else [])


Line = tuple[str, str, list[tuple[float, float]]]  #: name, dash, points


def _arithmetic(ceilings: dict[str, Any], rows: Sequence[Row]) -> str:
    intensity = [r["flops"] / r["bytes"] for r in rows]
    start, end = min(intensity) / 1.5, max(intensity) * 1.5
    xs = [start * (end / start) ** (i / 60) for i in range(61)]
    bands = {float(s): bandwidth_of(ceilings, s) for s in ceilings["copy_gbs"]}
    memory, cache = bands[max(bands)], max(bands.values())
    rates: dict[str, float] = {}
    for kind in ("gemm_gflops", "conv_gflops"):
        for dtype, rate in ceilings.get(kind, {}).items():
            rates[dtype] = max(rate, rates.get(dtype, 0.0))
    used = [d for d in rates if d in {"float32", *(r.get("arithmetic") or r["dtype"] for r in rows)}]
    lines: list[Line] = [
        (f"{SHORT.get(d, d)}, from memory", dash, [(x, min(rates[d], memory * x)) for x in xs])
        for d, dash in zip(used, ("", "1,2", "4,2"))
    ]
    if used:
        peak = max(rates[d] for d in used)
        lines.append(("best, from cache", "6,3", [(x, min(peak, cache * x)) for x in xs]))
    return _roofline(rows, lambda r: float(r["flops"] / r["bytes"]), "gflops", lines, "FLOPs per byte", "GFLOP/s")


def _bandwidth(ceilings: dict[str, Any], rows: Sequence[Row]) -> str:
    lines: list[Line] = [
        (kind, dash, [(float(s), v) for s, v in ceilings[f"{kind}_gbs"].items()])
        for kind, dash in (("copy", ""), ("read", "1,2"))
    ]
    return _roofline(rows, lambda r: float(r["bytes"] / 2**20), "gbs", lines, "MiB moved", "GB/s")


def _roofline(
    rows: Sequence[Row], along: Callable[[Row], float], up: str, lines: Sequence[Line], below: str, beside: str
) -> str:
    ops = list(dict.fromkeys(r["op"] for r in rows))
    color = {op: COLORS[i % len(COLORS)] for i, op in enumerate(ops)}
    entries = [(op, color[op], True) for op in ops] + [("filled: cofire", "currentColor", True)]
    entries += [("ring: strongest plain torch", "currentColor", False)]
    space = Chart(0, "")  # only to learn how high the legend is
    height = 258 + chart.legend(space, 0, entries) + 13 * ((len(lines) + 1) // 2)
    picture = Chart(height, f"{beside} by {below}, with the machine's ceilings")
    points = [p for _, _, line in lines for p in line]
    x = LogAxis([*(along(r) for r in rows), *(p[0] for p in points)], 40, WIDTH - 10)
    y = LogAxis([*(r[up] for r in rows), *(p[1] for p in points)], 220, 22)
    for tick in x.ticks():
        picture.line([(x(tick), 222), (x(tick), 18)], TIE, 0.3, "1,3")
        picture.text(x(tick), 233, digits(tick), 9, "middle")
    for tick in y.ticks():
        picture.line([(40, y(tick)), (WIDTH - 10, y(tick))], TIE, 0.3, "1,3")
        picture.text(36, y(tick) + 3, digits(tick), 9, "end")
    picture.text(8, 12, beside, 9, bold=True)
    picture.text(WIDTH - 10, 246, below, 9, "end", bold=True)
    for _, dash, line in lines:
        picture.line([(x(a), y(b)) for a, b in line], dash=dash)
    for row in rows:
        if row["mode"] not in UNCOMPARED:
            tip = f"{row['op']}, {row['case']}, {row['dtype']}, {row['mode']}, {row['provider']}: {digits(row[up])} {beside}"
            picture.dot(x(along(row)), y(row[up]), color[row["op"]], row["provider"] == "cofire", tip)
    below_legend = chart.legend(picture, 260, entries)
    for i, (name, dash, _) in enumerate(lines):
        left, top = 8 + 176 * (i % 2), below_legend + 13 * (i // 2)
        picture.line([(left, top - 3), (left + 22, top - 3)], dash=dash)
        picture.text(left + 27, top, name, 9)
    return picture.svg()
