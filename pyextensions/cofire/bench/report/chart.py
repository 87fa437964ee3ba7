# SPDX-License-Identifier: Apache-2.0
"""Small SVG pictures without a library: as narrow as a phone, in the colour of the text around them, the same on every machine."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

WIDTH = 360  #: of every picture, in its own units: those of a phone
WIN, LOSS, TIE = "#2f81f7", "#e5534b", "#8b949e"
COLORS = ("#2f81f7", "#e5534b", "#3fb950", "#d29922", "#a371f7", "#39c5cf", "#db61a2", "#8b949e", "#f0883e", "#7d8590")
#: In a file of its own a picture has no text around it. On a page it takes the page's colour: :func:`inline`.
STYLE = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
LETTER = 0.56  #: the mean width of a letter, in parts of the font's size


def number(value: float) -> str:
    """Two decimals at most: files that do not differ in the twelfth digit."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


class Chart:
    """Shapes on a canvas, from the top left."""

    def __init__(self, height: float, label: str) -> None:
        self.height, self.label = height, label
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 10,
        anchor: str = "start",
        bold: bool = False,
        room: float = 0,
    ) -> None:
        """``room``: shorten to so much width; the whole of it is then the tip."""
        shown = words
        if room and len(words) * size * LETTER > room:
            shown = words[: max(1, int(room / (size * LETTER)) - 1)].rstrip() + "…"
        tip = f"<title>{html.escape(words)}</title>" if shown != words else ""
        self.parts.append(
            f'<text x="{number(x)}" y="{number(y)}" font-size="{number(size)}"'
            + (f' text-anchor="{anchor}"' if anchor != "start" else "")
            + (' font-weight="600"' if bold else "")
            + f">{html.escape(shown)}{tip}</text>"
        )

    def rect(
        self, x: float, y: float, width: float, height: float, color: str, opacity: float = 1, tip: str = ""
    ) -> None:
        faint = f' opacity="{number(opacity)}"' if opacity != 1 else ""
        inside = f"<title>{html.escape(tip)}</title>" if tip else ""
        self.parts.append(
            f'<rect x="{number(x)}" y="{number(y)}" width="{number(max(width, 0.5))}" height="{number(height)}" '
            f'fill="{color}"{faint}>{inside}</rect>'
        )

    def line(
        self, points: Sequence[tuple[float, float]], color: str = "currentColor", width: float = 0.8, dash: str = ""
    ) -> None:
        places = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="{number(width)}"{dashed}/>'
        )

    def dot(self, x: float, y: float, color: str, filled: bool = True, tip: str = "") -> None:
        inside = f"<title>{html.escape(tip)}</title>" if tip else ""
        paint = f'fill="{color}"' if filled else f'fill="none" stroke="{color}"'
        self.parts.append(f'<circle cx="{number(x)}" cy="{number(y)}" r="2.5" {paint}>{inside}</circle>')

    def svg(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {number(self.height)}" width="{WIDTH}" height="{number(self.height)}"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{html.escape(self.label)}" '
            f'font-family="system-ui, sans-serif" fill="currentColor">{STYLE}{"".join(self.parts)}</svg>\n'
        )


def inline(svg: str) -> str:
    """A picture as a part of a page, whose colours it takes."""
    return svg.replace(STYLE, "", 1).strip()


class LogAxis:
    """From values to places, logarithmically."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.high = min(values), max(values)
        if self.high <= self.low * 1.01:
            self.low, self.high = self.low / 2, self.high * 2
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        """Powers of ten; on a short axis of two. Seven at most."""
        base = 10.0 if self.high / self.low > 50 else 2.0
        first = math.ceil(math.log(self.low, base) - 1e-9)
        last = math.floor(math.log(self.high, base) + 1e-9)
        for exponent in range(first, last + 1, max(1, math.ceil((last - first + 1) / 7))):
            yield base**exponent


def legend(chart: Chart, y: float, entries: Sequence[tuple[str, str, bool]]) -> float:
    """Dots with names, in as many lines as they need; returns where the next thing may begin."""
    x = 8.0
    for name, color, filled in entries:
        width = 14 + len(name) * 9 * LETTER
        if x + width > WIDTH - 4 and x > 8:
            x, y = 8.0, y + 13
        chart.dot(x, y - 3, color, filled)
        chart.text(x + 6, y, name, 9, room=WIDTH - x - 10)
        x += width + 4
    return y + 13
