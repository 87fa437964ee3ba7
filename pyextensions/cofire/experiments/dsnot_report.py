# SPDX-License-Identifier: Apache-2.0
"""What the results of ``cofire train dsnot`` and ``cofire prune`` say: summary, criteria, tables, plots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from cofire.experiments import report
from cofire.experiments.files import Results
from cofire.experiments.quantize_report import ACCURACY, BITS
from cofire.experiments.report import Criterion, Series, Table

#: What the criteria compare, by the names of the settings.
WANDA, DECREASE, SWAP = "Wanda", "DSnoT, decrease", "swap1"
#: What is said where nothing is drawn.
NO_PLOT = "a pattern has one sparsity only, and a plot shows scores against sparsities"


def summary(results: Results) -> list[Results]:
    """One row per setting and sparsity: means over its seeds, each ``lost`` against the dense network of the same seed."""
    dense = {row["seed"]: row["score"] for row in results["dense"]}
    sign = -1 if results["settings"]["unit"] == ACCURACY else 1
    rows = []
    for name, sparsity in dict.fromkeys((cell["setting"], cell["sparsity"]) for cell in results["cells"]):
        cells = [cell for cell in results["cells"] if (cell["setting"], cell["sparsity"]) == (name, sparsity)]
        lost = [sign * (cell["score"] - dense[cell["seed"]]) + 0.0 for cell in cells]  # (no -0.0)
        errors = [_share(cell, "refined") for cell in cells]
        rows.append(
            {
                "setting": name,
                "sparsity": sparsity,
                "pattern": cells[0]["pattern"],
                "seeds": len(cells),
                "score": mean(cell["score"] for cell in cells),
                "lost": mean(lost),
                "least": min(lost),
                "most": max(lost),
                "error": mean(errors),
                "initial": mean(_share(cell, "initial") for cell in cells),
                "squared": mean(_mean(cell, "refined") for cell in cells),
                "moved": mean(_moved(cell) for cell in cells),
            }
        )
    return rows


def _mean(cell: Results, key: str) -> float:
    return mean(float(layer[key]) for layer in cell["layers"])


def _share(cell: Results, key: str) -> float:
    """Error by the mean square of the outputs, mean over the layers."""
    return mean(float(layer[key] / layer["output"]) for layer in cell["layers"])


def _moved(cell: Results) -> float:
    """Swaps of a row."""
    return float(sum(layer["moved"] for layer in cell["layers"]) / sum(layer["shape"][0] for layer in cell["layers"]))


# -------------------------------------------------------------------------------------------------------- criteria


def criteria(results: Results) -> list[Criterion]:
    """What the experiment has to show, judged on the means over the seeds."""
    judged = results["settings"]["plan"]["judged"]
    return [] if judged is None else list(_criteria(results, judged))


def _criteria(results: Results, sparsity: float) -> Iterator[Criterion]:
    found = {row["setting"]: row for row in summary(results) if row["sparsity"] == sparsity and not row["pattern"]}
    at = f"at {sparsity:.0%}"
    for name, gain, share in ((SWAP, 8.0, 0.40), (DECREASE, -1.0, 0.80)):
        points = f"{name} {at}: accuracy at least that of {WANDA} {gain:+.0f} points"
        errors = f"{name} {at}: squared error of the layers at most {share:.2f} of {WANDA}'s"
        if name not in found or WANDA not in found:
            yield Criterion(points, "not run", None)
            yield Criterion(errors, "not run", None)
            continue
        own, base = found[name], found[WANDA]
        more = own["score"] - base["score"]
        yield Criterion(points, f"{more:+.2f}", more >= gain)
        ratio = own["squared"] / base["squared"]
        yield Criterion(errors, f"{ratio:.3f}", ratio <= share)
    cells = results["cells"]
    if not cells:
        return
    uniform = sum(cell["uniform"] for cell in cells)
    yield Criterion(
        "every row keeps exactly as many weights as the others",
        f"{uniform} of {len(cells)} cells",
        uniform == len(cells),
    )
    compared = [cell["same_masks"] for cell in cells if "same_masks" in cell]
    yield Criterion(
        "kernels and references make the same masks, bit for bit",
        f"{sum(compared)} of {len(compared)} cells" if compared else "not run",
        all(compared) if compared else None,
    )


# ---------------------------------------------------------------------------------------------------------- tables


def tables(results: Results) -> list[Table]:
    """Scores and errors at each sparsity; where there are criteria, those."""
    rows = summary(results)
    judged = results["settings"]["plan"]["judged"]
    found = [_grid(rows, results["settings"]["unit"])]
    details = [row for row in rows if judged is None or row["sparsity"] == judged or row["pattern"]]
    found.append(_details(details, results["settings"]["unit"]))
    demanded = criteria(results)
    return [*found, report.criteria_table(demanded)] if demanded else found


def _number(unit: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.2f}" if unit == ACCURACY else f"{value:{sign}.4f}"


def _grid(rows: list[Results], unit: str) -> Table:
    """The score, a row for each setting and a column for each sparsity."""
    sparsities = sorted({row["sparsity"] for row in rows})
    scores = {(row["setting"], row["sparsity"]): _number(unit, row["score"]) for row in rows}
    names = dict.fromkeys(row["setting"] for row in rows)
    header = (f"{unit} at a sparsity of", *(f"{s:.0%}" for s in sparsities))
    return header, [[name, *(scores.get((name, s), "") for s in sparsities)] for name in names]


def _details(rows: list[Results], unit: str) -> Table:
    header = (
        "setting",
        "sparsity",
        unit,
        "lost",
        "least",
        "most",
        "layer error",
        "of the first mask",
        "swaps a row",
    )
    return header, [
        [
            row["setting"],
            f"{row['sparsity']:.0%}",
            _number(unit, row["score"]),
            *(_number(unit, row[key], "+") for key in ("lost", "least", "most")),
            f"{row['error']:.4f}",
            f"{row['initial']:.4f}",
            f"{row['moved']:.1f}",
        ]
        for row in rows
    ]


def plots(results: Results, folder: Path, name: str = "results") -> list[Path]:
    """The score against the sparsity, a line for each setting."""
    unit, rows = results["settings"]["unit"], [row for row in summary(results) if not row["pattern"]]
    series = []
    for i, setting in enumerate(dict.fromkeys(row["setting"] for row in rows)):
        points = [(100 * row["sparsity"], row["score"]) for row in rows if row["setting"] == setting]
        series.append(Series(setting, points, f"{'os^vDP*X<'[i % 9]}-"))
    dense = mean(row["score"] for row in results["dense"])
    span = sorted({100 * row["sparsity"] for row in rows})
    series.append(Series("dense", [(x, dense) for x in span], "k--"))
    return report.plot(folder / f"{name}.png", "sparsity of the pruned layers %", unit, series) if rows else []


def markdown(results: Results) -> str:
    """Conditions and tables as markdown."""
    return report.markdown(conditions(results), tables(results))


def conditions(results: Results) -> str:
    """One paragraph: data, network, training, pruning, machine."""
    settings, plan, where = results["settings"], results["settings"]["plan"], results["environment"]
    start = "random weights" if settings["weights"] is None else f"the weights {settings['weights']}"
    text = settings["unit"] == BITS
    length = f"{plan['epochs'] * plan['steps']} steps" if text else f"{plan['epochs']} epochs"
    dense = mean(row["score"] for row in results["dense"])
    score = f"{dense:.4f} bits per character" if text else f"{dense:.2f} %"
    layers = "all linear layers but the output" if plan["layers"] is None else f"the layers {', '.join(plan['layers'])}"
    seen = "all training images" if plan["widths"] else f"{plan['calibration']} batches of the training data"
    return (
        f"{settings['condition']} Network {plan['model']}, from {start}; {length} in batches of {plan['batch']} at a rate "
        f"from {plan['lr']:g}. Dense network, mean over the seeds ({len(results['dense'])}): {score}. Then {layers} are "
        f"pruned, without training, on {seen}. Lost: mean, least and most over the seeds, each against its dense network. "
        "Layer error: mean square of what pruning changes in a layer's outputs, in units of the mean square of the outputs; "
        f"mean over the layers. {where['cpu']}, {where['threads']} threads, torch {where['torch']}."
    )
