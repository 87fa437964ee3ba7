# SPDX-License-Identifier: Apache-2.0
"""What eDKM's results say: summary, criteria, tables, plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean

from cofire.experiments import report
from cofire.experiments.files import Results
from cofire.experiments.report import Criterion, Table
from cofire.ops.clustering import CONVERGED

#: Units of a score.
ACCURACY, BITS = "accuracy %", "bits/char"
AVERAGED = ("score", "soft", "kmeans", "kmeans_continued", "packed", "bits_per_weight", "soft_hard", "seconds")


def summary(results: Results) -> list[Results]:
    """One row per setting: means over its seeds. What is lost counts from the better of each seed's dense trainings.

    ``lost`` is positive where clustering is worse, whatever the unit. ``kmeans_lost`` is the same for k-means without
    training, of the better of the two; ``lead`` is how much better training is than that. ``gap`` is the mean size of the
    difference between soft and nearest weights.
    """
    best = {row["seed"]: _best(results, row) for row in results["dense"]}
    rows = []
    for name in dict.fromkeys(cell["setting"] for cell in results["cells"]):
        cells = [cell for cell in results["cells"] if cell["setting"] == name]
        row: Results = {key: mean(cell[key] for cell in cells) for key in AVERAGED}
        row |= {key: cells[0][key] for key in ("setting", "palette", "bits", "conv_bits", "grad", "dtype")}
        row["seeds"] = len(cells)
        row["bytes"] = (cells[0]["model_dense_bytes"], cells[0]["model_packed_bytes"])
        row["lost"] = mean(_worse(results, best[cell["seed"]], cell["score"]) for cell in cells)
        kmeans = [_better(results, cell["kmeans"], cell["kmeans_continued"]) for cell in cells]
        row["kmeans_lost"] = mean(_worse(results, best[cell["seed"]], k) for cell, k in zip(cells, kmeans, strict=True))
        row["lead"] = row["kmeans_lost"] - row["lost"]
        row["gap"] = mean(abs(cell["soft"] - cell["score"]) for cell in cells)
        row["troubled"] = sum(cell["below_floor"] + cell["stalled"] for cell in cells)
        rows.append(row)
    return rows


def _unit(results: Results) -> str:
    return str(results["settings"]["unit"])


def _better(results: Results, a: float, b: float) -> float:
    return max(a, b) if _unit(results) == ACCURACY else min(a, b)


def _best(results: Results, row: Results) -> float:
    return _better(results, row["score"], row["continued"])


def _worse(results: Results, reference: float, score: float) -> float:
    return reference - score if _unit(results) == ACCURACY else score - reference


# -------------------------------------------------------------------------------------------------------- criteria


def criteria(results: Results) -> list[Criterion]:
    """What the experiment has to show, judged on the means over the seeds, at the setting that does worst."""
    rows = summary(results)
    if _unit(results) == BITS:
        return list(_text(rows))
    plain = [row for row in rows if row["conv_bits"] is None]
    mixed = [row for row in rows if row["conv_bits"] is not None]
    return [*_plain(plain), *_mixed(mixed), *_gradient(results)]


def _text(rows: list[Results]) -> Iterator[Criterion]:
    rows = [row for row in rows if row["bits"] == 3]
    yield _most("3 bits: at most 0.03 bits per character above dense", rows, "lost", 0.03, "{:+.3f}")
    yield _least("3 bits: k-means without training at least 0.10 above dense", rows, "kmeans_lost", 0.10, "{:+.3f}")


def _plain(rows: list[Results]) -> Iterator[Criterion]:
    if not rows:
        return
    two, one = ([row for row in rows if row["bits"] == bits] for bits in (2, 1))
    yield _most("2 bits: at most 1 point below dense", two, "lost", 1.0, "{:+.2f} points")
    yield _least("2 bits: k-means without training at least 3 points worse", two, "lead", 3.0, "{:+.2f} points")
    yield _least("1 bit: k-means without training at least 10 points worse", one, "lead", 10.0, "{:+.2f} points")
    yield _most("soft and nearest weights at most 0.3 points apart", rows, "gap", 0.3, "{:.2f} points")


def _mixed(rows: list[Results]) -> Iterator[Criterion]:
    if not rows:
        return
    name = f"{rows[0]['palette']}: at most 1 point below dense"
    yield _most(name, rows, "lost", 1.0, "{:+.2f} points")
    by_grad = {row["grad"]: row["score"] for row in rows}
    if {"implicit", "unroll"} <= set(by_grad):
        ahead = by_grad["implicit"] - by_grad["unroll"]
        passed = _at_least(ahead, -0.1)
        yield Criterion("implicit at most 0.1 points below unrolled", f"{ahead:+.2f} points", passed)


def _gradient(results: Results) -> Iterator[Criterion]:
    rows = results.get("gradients")
    if not rows:
        return
    cosine = min(row["implicit"]["cosine"] for row in rows)
    ratio = max(abs(row["implicit"]["norm_ratio"] - 1) for row in rows)
    yield Criterion(
        "implicit gradient through the centroids: cosine at least 0.9999, norm within 0.001, of 500 iterations'",
        f"cosine at least {cosine:.6f}, norm within {ratio:.1e}",
        cosine >= 0.9999 and ratio <= 1e-3,
    )


def _at_least(found: float, bound: float) -> bool:
    return found >= bound - 1e-9  # a difference of two percentages has rounding errors


def _most(name: str, rows: Iterable[Results], key: str, bound: float, form: str) -> Criterion:
    worst = max(rows, key=lambda row: row[key], default=None)
    if worst is None:
        return Criterion(name, "not run", None)
    return Criterion(name, f"most: {form.format(worst[key])} ({worst['setting']})", _at_least(-worst[key], -bound))


def _least(name: str, rows: Iterable[Results], key: str, bound: float, form: str) -> Criterion:
    worst = min(rows, key=lambda row: row[key], default=None)
    if worst is None:
        return Criterion(name, "not run", None)
    return Criterion(name, f"least: {form.format(worst[key])} ({worst['setting']})", _at_least(worst[key], bound))


# ---------------------------------------------------------------------------------------------------------- tables


def tables(results: Results) -> list[Table]:
    """Scores, sizes, gradients where they were compared, and the criteria."""
    unit = _unit(results)
    places = 2 if unit == ACCURACY else 3
    rows = summary(results)
    header = ("setting", "seeds", unit, "lost", "soft", "k-means", "of longer", "lost")
    outcome = [
        [
            row["setting"],
            str(row["seeds"]),
            f"{row['score']:.{places}f}",
            f"{row['lost']:+.{places}f}",
            f"{row['soft']:.{places}f}",
            f"{row['kmeans']:.{places}f}",
            f"{row['kmeans_continued']:.{places}f}",
            f"{row['kmeans_lost']:+.{places}f}",
        ]
        for row in rows
    ]
    details = ("setting", "bits/weight", "model KiB", "packed KiB", "weights' gap", "no fixed point")
    sizes = [
        [
            row["setting"],
            f"{row['bits_per_weight']:.2f}",
            *(f"{size / 1024:.1f}" for size in row["bytes"]),
            f"{row['soft_hard']:.3f}",
            str(row["troubled"]) if row["grad"] == "implicit" else "",
        ]
        for row in rows
    ]
    found: list[Table] = [(header, outcome), (details, sizes)]
    if results.get("gradients"):
        found.append(_gradient_table(results["gradients"]))
    return [*found, report.criteria_table(criteria(results))]


def _gradient_table(rows: list[Results]) -> Table:
    """Relative error of each way; of the implicit one also cosine, norm ratio, and whether it found its fixed point."""
    ways = [key for key, value in rows[0].items() if isinstance(value, dict)]
    header = ("layer", "K", "rho", *(f"{way}: error" for way in ways), "cosine", "norm", "fixed point")
    body = []
    for row in rows:
        errors = [f"{row[way]['error']:.1e}" for way in ways]
        found = row["implicit"]
        exact = [f"{found['cosine']:.6f}", f"{found['norm_ratio']:.6f}"]
        state = "found" if found["status"] == CONVERGED else "not found"
        body.append([row["layer"], str(row["clusters"]), f"{row['rho']:.2g}", *errors, *exact, state])
    return header, body


def markdown(results: Results) -> str:
    """Conditions and tables as markdown."""
    return report.markdown(conditions(results), tables(results))


def conditions(results: Results) -> str:
    """One paragraph: data, network, length of training, dense network, machine."""
    settings, plan, dense, where = (
        results["settings"],
        results["settings"]["plan"],
        results["dense"],
        results["environment"],
    )
    start = "random weights" if settings["weights"] is None else f"the weights {settings['weights']}"
    given = f" ({mean(d['given'] for d in dense):.2f} as given)" if "given" in dense[0] else ""
    first, longer = (mean(d[key] for d in dense) for key in ("score", "continued"))
    text = _unit(results) == BITS
    places, unit = (3, " bits per character") if text else (2, " %")
    length = (plan["dense_epochs"] * plan["steps"], plan["epochs"] * plan["steps"]) if text else None
    lengths = (
        f"{plan['dense_epochs']} dense epochs, then {plan['epochs']} with clustered weights"
        if length is None
        else f"{length[0]} dense steps, then {length[1]} with clustered weights"
    )
    sentences = (
        f"{settings['condition']} Network {plan['model']}, from {start}{given};",
        f"{lengths}, in batches of {plan['batch']}, at a rate from {plan['lr']:g};",
        f"rho from {plan['rho']:g} to {plan['rho_end']:g}, nearest centroids in the last {plan['hard_last']:.0%}.",
        f"Dense network, mean over the seeds ({len(dense)}): {first:.{places}f}{unit}, and {longer:.{places}f}{unit}",
        "after as many further steps as the clustered networks had; what is lost counts from the better.",
        "Scores are those of the nearest centroids, which are deployed; soft are those of training's weights, at the last",
        "temperature. k-means are optimal palettes without training: of the dense network, and of the one trained longer.",
        f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}.",
    )
    return " ".join(sentences)


# ----------------------------------------------------------------------------------------------------------- plots


def plots(results: Results, folder: Path) -> list[Path]:
    """Score against bits per weight as PNG; empty if matplotlib is missing."""
    rows = summary(results)
    dense = mean(_best(results, row) for row in results["dense"])
    part = "validation" if results["settings"]["plan"]["validate"] else "test"
    series = [report.Series("dense", [(32.0, dense)], "k*")]
    for grad, style in (("unroll", "o-"), ("implicit", "s--"), ("jfb", "^:")):
        series.append(report.Series(f"eDKM, {grad}", _points(rows, grad, _score), style))
    series.append(report.Series("eDKM, unroll, bf16", _points(rows, "unroll", _score, "bfloat16"), "D"))
    series.append(
        report.Series(
            "k-means without training, of the longer trained", _points(rows, rows[0]["grad"], _kmeans), "C7x:"
        )
    )
    path = folder / "score_bits.png"
    return report.plot(path, "bits per clustered weight", f"{part} {_unit(results)}", series)


def _points(
    rows: list[Results], grad: str, y: Callable[[Results], float], dtype: str = "float32"
) -> list[tuple[float, float]]:
    chosen = (row for row in rows if row["grad"] == grad and row["dtype"] == dtype)
    return [(float(row["bits_per_weight"]), y(row)) for row in chosen if math.isfinite(y(row))]


def _score(row: Results) -> float:
    return float(row["score"])


def _kmeans(row: Results) -> float:
    return float(row["kmeans_continued"])
