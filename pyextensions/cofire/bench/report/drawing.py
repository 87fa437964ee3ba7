# SPDX-License-Identifier: Apache-2.0
"""Pictures by matplotlib, for what :mod:`cofire.bench.report.chart` has no shapes for."""

from __future__ import annotations

import io
from typing import Any

INK = "#010203"  #: a colour that no plot uses; becomes the colour of the text around the plot


def _svg(figure: Any) -> str:
    """As SVG text whose ink is the colour of the surrounding text, in light and dark."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    style = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
    start = text.index(">") + 1
    return text[:start] + style + text[start:]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("report: plots need matplotlib; install cofire[report]") from error
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cofire", "font.size": 8})
    for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"):
        matplotlib.rcParams[name] = INK
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, columns, squeeze=False)[0]
