# SPDX-License-Identifier: Apache-2.0
"""What OFQ's results say: summary, criteria, tables, plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from cofire.experiments import report
from cofire.experiments.files import Results
from cofire.experiments.report import Criterion, Table

STATSQ, LSQ, ANNEALED, CONTINUED = "StatsQ", "LSQ", "StatsQ, annealed", "StatsQ, continued"
#: Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
AVERAGED = (
    "accuracy", "packed", "oscillating", "in_course", "scale_variance", "near_boundary", "bits_per_weight", "seconds",
)  # fmt: skip
SHARES = ("oscillating", "in_course")


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean, by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    return T95.get(len(values) - 1, 1.96) * stdev(values) / math.sqrt(len(values))


def summary(results: Results) -> list[Results]:
    """One row per setting and phase: means over its seeds."""
    rows = []
    for name in dict.fromkeys(cell["setting"] for cell in results["cells"]):
        cells = _cells(results, name)
        row: Results = {key: mean(cell[key] for cell in cells) for key in AVERAGED}
        row |= {"setting": name, "seeds": len(cells), "interval": interval([c["accuracy"] for c in cells])}
        row["counts"] = [count(cell) for cell in cells]
        row["bytes"] = (cells[0]["model_dense_bytes"], cells[0]["model_packed_bytes"])
        rows.append(row)
    return rows


def count(cell: Results) -> int:
    """The weights that oscillate at the end."""
    return round(float(cell["oscillating"]) * int(cell["quantized"]))


def _cells(results: Results, name: str) -> list[Results]:
    """The cells of a setting; ``in_course``: the share of oscillating weights, mean over what was recorded while it trained."""
    found = [cell for cell in results["cells"] if cell["setting"] == name]
    return [{**cell, "in_course": mean(share for _, share in cell["course"])} for cell in found]


def _pairs(results: Results, first: str, second: str, key: str) -> list[tuple[float, float]]:
    """The values of two settings, seed by seed."""
    others = {cell["seed"]: cell[key] for cell in _cells(results, second)}
    return [(cell[key], others[cell["seed"]]) for cell in _cells(results, first) if cell["seed"] in others]


# -------------------------------------------------------------------------------------------------------- criteria


def criteria(results: Results) -> list[Criterion]:
    """What the experiment has to show, judged on the means over the seeds."""
    found = [
        _ratio("oscillating weights: StatsQ at most 0.7 of LSQ", results, STATSQ, LSQ, "oscillating", most=0.7),
        _ratio("the same, mean over the course of training", results, STATSQ, LSQ, "in_course", most=0.7),
        _ahead("accuracy: StatsQ at least 0.5 points above LSQ", results, STATSQ, LSQ, 0.5),
        _ratio(
            "oscillating weights: after annealing at most 0.2 of before", results, ANNEALED, STATSQ, "oscillating", 0.2
        ),
        _ahead("accuracy: annealing loses nothing", results, ANNEALED, STATSQ, 0.0),
        _ratio("variance of row scales: StatsQ at most 1/5 of LSQ", results, STATSQ, LSQ, "scale_variance", most=0.2),
    ]
    if results["cells"]:
        equal = min(cell["deployed_equal"] for cell in results["cells"])
        worst = max(cell["deployed_error"] for cell in results["cells"])
        text = f"{equal:.1%}, the others within {worst:.1e}"
        found.append(
            Criterion("deployed outputs equal the trained network's to 1e-5 on 99 % of images", text, equal >= 0.99)
        )
    return found


def _ratio(name: str, results: Results, first: str, second: str, key: str, most: float) -> Criterion:
    pairs = _pairs(results, first, second, key)
    if not pairs:
        return Criterion(name, "not run", None)
    a, b = mean(x for x, _ in pairs), mean(y for _, y in pairs)
    text = f"{_number(a, key)} against {_number(b, key)}"
    if key == "oscillating":
        text += f", {_counted(results, first)} weights against {_counted(results, second)}"
    if b == 0:
        return Criterion(name, text, None)
    return Criterion(name, f"{a / b:.2g} ({_between(pairs)}{text})", a / b <= most)


def _number(value: float, key: str) -> str:
    return f"{value:.3%}" if key in SHARES else f"{value:.1e}"


def _counted(results: Results, name: str) -> str:
    """How many weights oscillate, seed by seed."""
    return ", ".join(str(count(cell)) for cell in _cells(results, name))


def _between(pairs: Sequence[tuple[float, float]]) -> str:
    """The 95 % interval of the ratio, by the logarithms of the seeds' ratios; nothing where one is 0."""
    if len(pairs) < 2 or any(x <= 0 or y <= 0 for x, y in pairs):
        return ""
    logs = [math.log(x / y) for x, y in pairs]
    middle, half = mean(logs), interval(logs)
    assert half is not None
    return f"95 % interval {math.exp(middle - half):.2g} to {math.exp(middle + half):.2g}; "


def _ahead(name: str, results: Results, first: str, second: str, least: float) -> Criterion:
    differences = [x - y for x, y in _pairs(results, first, second, "accuracy")]
    if not differences:
        return Criterion(name, "not run", None)
    half = interval(differences)
    spread = "one seed" if half is None else f"95 % interval +-{half:.2f}"
    found = mean(differences)
    return Criterion(name, f"{found:+.2f} points ({spread})", found >= least - 1e-9)


# ---------------------------------------------------------------------------------------------------------- tables


def tables(results: Results) -> list[Table]:
    """Accuracy and oscillation, sizes, latency, and the criteria."""
    rows = summary(results)
    dense = [row["accuracy"] for row in results["dense"]]
    header = (
        "weights",
        "seeds",
        "accuracy %",
        "95 % +-",
        "packed %",
        "oscillating",
        "weights",
        "in the course",
        "row scale variance",
        "near boundary",
    )
    outcome: list[Sequence[str]] = [
        ["full precision", str(len(dense)), f"{mean(dense):.2f}", _half(interval(dense)), *[""] * 6]
    ]
    outcome += [
        [
            row["setting"],
            str(row["seeds"]),
            f"{row['accuracy']:.2f}",
            _half(row["interval"]),
            f"{row['packed']:.2f}",
            f"{row['oscillating']:.3%}",
            ", ".join(map(str, row["counts"])),
            f"{row['in_course']:.2%}",
            f"{row['scale_variance']:.1e}",
            f"{row['near_boundary']:.2%}",
        ]
        for row in rows
    ]
    sizes = [
        [row["setting"], f"{row['bits_per_weight']:.2f}", *(f"{size / 1024:.1f}" for size in row["bytes"])]
        for row in rows
        if row["setting"] in (STATSQ, LSQ)
    ]
    found: list[Table] = [(header, outcome), (("weights", "bits/weight", "model KiB", "packed KiB"), sizes)]
    if results.get("latency"):
        body = [[str(row["shape"][0]), *_timed(row), *_timed(row.get("integer"))] for row in results["latency"]]
        dense_ms = "full precision ms"
        found.append((("batch", dense_ms, "packed ms", "speed-up", dense_ms, "integers ms", "speed-up"), body))
    return [*found, report.criteria_table(criteria(results))]


def _timed(row: Results | None) -> list[str]:
    """Milliseconds of the network in full precision and of the deployed one, timed in turns, and how much faster this is."""
    if row is None:
        return [""] * 3
    return [f"{row['dense_ms']:.2f}", f"{row['packed_ms']:.2f}", f"{row['dense_ms'] / row['packed_ms']:.2f}x"]


def _half(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def markdown(results: Results) -> str:
    """Conditions and tables as markdown."""
    return report.markdown(conditions(results), tables(results))


def conditions(results: Results) -> str:
    """One paragraph: data, network, length of training, machine."""
    settings, where = results["settings"], results["environment"]
    plan = settings["plan"]
    start = "random weights" if settings["weights"] is None else f"the weights {settings['weights']}"
    rates = ", ".join(f"{'StatsQ' if s['weights'] == 'statsq' else 'LSQ'} {s['lr']:g}" for s in plan["settings"])
    sentences = (
        f"{settings['condition']} Network {plan['model']}, from {start}; {plan['dense_epochs']} epochs in full precision,",
        f"then {plan['epochs']} with {plan['weight_bits']}-bit weights and {plan['activation_bits']}-bit activations (first and",
        f"last layer 8 bits), the former network as teacher, in batches of {plan['batch']}, at rates from {rates},",
        f"falling to {plan['floor']:g} of that; then {plan['anneal_epochs']} at that rate with annealing (boundary range",
        f"{plan['boundary_range']:g}), and as a control without. A weight oscillates if the moving average (momentum 0.01) of",
        f"its integer's reversals is above 0.02: at the end of a training, as a share of {_quantized(results)} weights and",
        "counted seed by seed, and mean over its course. The row scales' variance is over the last",
        f"{plan['watched']:.0%} of the steps, relative to the squared mean. Intervals are over the seeds, by Student's t,",
        f"of ratios by their logarithms. {where['cpu']}, {where['threads']} threads, torch {where['torch']}.",
    )
    return " ".join(sentences)


def _quantized(results: Results) -> str:
    """How many weights have few bits."""
    return f"{results['cells'][0]['quantized']:,}" if results["cells"] else "no"


# ----------------------------------------------------------------------------------------------------------- plots


def plots(results: Results, folder: Path) -> list[Path]:
    """The share of oscillating weights in the course of training, mean over the seeds; empty without matplotlib."""
    series = []
    offset = max((point[0] for cell in _cells(results, STATSQ) for point in cell["course"]), default=0)
    for name, style in ((LSQ, "s--"), (STATSQ, "o-"), (CONTINUED, "^:"), (ANNEALED, "D-")):
        cells = _cells(results, name)
        if not cells:
            continue
        start = offset if name in (ANNEALED, CONTINUED) else 0
        courses = zip(*(cell["course"] for cell in cells), strict=True)
        points = [(start + float(at[0][0]), 100 * mean(value for _, value in at)) for at in courses]
        series.append(report.Series(name, points, style))
    return report.plot(folder / "oscillation.png", "steps", "oscillating weights, %", series)
