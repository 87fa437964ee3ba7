# SPDX-License-Identifier: Apache-2.0
"""How the time of differentiable k-means grows with the weights and with the clusters: ``cofire bench-growth``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cofire.bench import harness
from cofire.bench.results import FOLDER, Results, Row, environment, results_path

__all__ = ["growth_path", "growth_plot", "run"]

#: Weights, at :data:`FIXED_CLUSTERS`; and clusters, at :data:`FIXED_WEIGHTS`.
SIZES = tuple(1 << i for i in range(16, 25, 2))
CLUSTERS = (2, 4, 8, 16, 64, 256)
FIXED_CLUSTERS, FIXED_WEIGHTS = 16, 1 << 20
#: Providers, and the most weights times clusters they are given: eager keeps some thirteen maps of that size.
PROVIDERS = {"cofire": 1 << 62, "dense": 1 << 26, "eager": 1 << 24}
COLORS = {"cofire": "#2f81f7", "dense": "#8b949e", "eager": "#e5534b"}


def run(
    out: str | Path | None = None,
    *,
    sizes: Sequence[int] = SIZES,
    clusters: Sequence[int] = CLUSTERS,
    fixed_clusters: int = FIXED_CLUSTERS,
    fixed_weights: int = FIXED_WEIGHTS,
    device: str = "cpu",
    announce: Callable[[str], Any] = lambda text: None,
) -> Results:
    """Time forward and backward of bfloat16 weights, T = 3, each answer checked, and write a results file.

    Args:
        out: the file; default ``benchmarks/results/growth/<device>.json``.
        sizes: how many weights; multiples of 256.
        clusters: K.
        fixed_clusters, fixed_weights: what stays while the other one grows.
        device: ``"cpu"`` or ``"cuda"``.
        announce: called with a line before each measurement.

    Returns:
        Results whose rows also have ``weights`` and ``clusters``; of plain torch only up to the sizes in :data:`PROVIDERS`.

    Example:
        >>> run("/tmp/growth.json", sizes=[65536], clusters=[]).rows[0]["weights"]  # doctest: +SKIP
        65536
    """
    from cofire.bench.clustering import _dkm

    path = Path(out) if out is not None else growth_path(device)
    results = Results(environment(device, False), {})
    points = [(n, fixed_clusters) for n in sizes] + [(fixed_weights, k) for k in clusters]
    for n, k in dict.fromkeys(points):
        announce(f"{n} weights, K{k}")
        case = _dkm((n // 256, 256), k)
        wanted = [name for name, most in PROVIDERS.items() if n * k <= most]
        rows = harness.measure(case, "forward+backward", device, harness.Effort(True), wanted)
        for row in rows:
            row.update(family="clustering", weights=n, clusters=k)
        results.add(rows)
        results.save(path)
    return results


def growth_path(device: str = "cpu") -> Path:
    return FOLDER / "growth" / results_path(device).name


def _line(rows: Sequence[Row], provider: str, along: str, fixed: str, value: int) -> list[tuple[int, float]]:
    return sorted(
        (r[along], r["median_ms"]) for r in rows if r["provider"] == provider and r[fixed] == value and r["median_ms"]
    )


def growth_plot(results: Results) -> str:
    """As SVG text: time by weights, and by clusters."""
    from cofire.bench.report import _figure, _svg

    figure, axes = _figure(7, 2.8, 2)
    weights, clusters = ({r[name] for r in results.rows} for name in ("weights", "clusters"))
    most_k = max(clusters, key=lambda k: len({r["weights"] for r in results.rows if r["clusters"] == k}))
    most_n = max(weights, key=lambda n: len({r["clusters"] for r in results.rows if r["weights"] == n}))
    panels = (
        ("weights", "clusters", most_k, f"weights (K = {most_k})"),
        ("clusters", "weights", most_n, f"clusters ({most_n} weights)"),
    )
    for panel, (along, fixed, value, label) in zip(axes, panels):
        for provider, color in COLORS.items():
            points = _line(results.rows, provider, along, fixed, value)
            if points:
                panel.plot(*zip(*points), marker="o", markersize=3, linewidth=1, color=color, label=provider)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(label)
        panel.set_ylabel("ms, forward + backward")
        panel.legend(fontsize=6, frameon=False)
    figure.tight_layout()
    return _svg(figure)
