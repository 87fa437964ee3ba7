# SPDX-License-Identifier: Apache-2.0
"""What FTWT's results say: summary, criteria, tables, plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median

from cofire.experiments import report
from cofire.experiments.files import Results
from cofire.experiments.report import Criterion, Table


def criteria(results: Results) -> list[Criterion]:
    """What the experiment has to show, judged on the means over the seeds."""
    rows = summary(results)
    checks = [_lossless(rows), _useful(rows), *_masks(rows), _estimate(rows), _exact(results), _fast(results)]
    return [check for check in checks if check is not None]


AVERAGED = (
    "accuracy",
    "random_accuracy",
    "cut",
    "cut_paper_rule",
    "estimated_cut",
    "mask_accuracy",
    "fixed_mask_accuracy",
)


def summary(results: Results) -> list[Results]:
    """One row per budget: means over its seeds. ``drop`` counts from the better of each seed's two dense trainings."""
    best = {row["seed"]: max(row["accuracy"], row["continued"]) for row in results["dense"]}
    names = dict.fromkeys(cell["budget"] for cell in results["cells"])
    rows = []
    for name in names:
        cells = [cell for cell in results["cells"] if cell["budget"] == name]
        row: Results = {key: mean(cell[key] for cell in cells) for key in AVERAGED}
        drops = [best[cell["seed"]] - cell["accuracy"] for cell in cells]
        row |= {"budget": name, "mass": cells[0]["mass"], "coupling": cells[0]["coupling"], "seeds": len(cells)}
        row |= {"drop": mean(drops), "worst_drop": max(drops)}
        row["estimate_error"] = max(abs(cell["estimated_cut"] - cell["cut"]) for cell in cells)
        row["latency"] = next((cell["latency"] for cell in cells if "latency" in cell), None)
        rows.append(row)
    return rows


def _lossless(rows: list[Results]) -> Criterion | None:
    row = next((r for r in rows if r["mass"] == 1), None)
    if row is None:
        return None
    found = f"{row['drop']:+.2f} points lost, {row['cut']:.1%} cut"
    return Criterion(
        "mass 1: at most 0.3 points lost, at least 10 % cut", found, row["drop"] <= 0.3 and row["cut"] >= 0.1
    )


def _useful(rows: list[Results]) -> Criterion:
    name = "some budget: at least 35 % cut, at most 1 point lost"
    deep = [r for r in rows if r["cut"] >= 0.35]
    if not deep:
        deepest = max(rows, key=lambda r: r["cut"])
        return Criterion(name, f"no cut above {deepest['cut']:.1%} ({deepest['budget']})", False)
    row = min(deep, key=lambda r: r["drop"])
    return Criterion(name, f"{row['budget']}: {row['cut']:.1%} cut, {row['drop']:+.2f} points lost", row["drop"] <= 1)


def _masks(rows: list[Results]) -> Iterator[Criterion]:
    # Where nearly everything is kept, random masks are as good: there is nothing to predict.
    masking = [r for r in rows if r["cut"] >= 0.1]
    lead = min(masking, key=lambda r: r["accuracy"] - r["random_accuracy"], default=None)
    if lead is None:
        yield Criterion("predicted masks beat random ones by 5 points", "no budget cuts 10 % or more", None)
    else:
        points = lead["accuracy"] - lead["random_accuracy"]
        yield Criterion(
            "predicted masks beat random ones by 5 points, at every cut of 10 % or more",
            f"least: {points:+.1f} points ({lead['budget']})",
            points >= 5,
        )
    worst = min(rows, key=lambda r: r["mask_accuracy"])
    found = f"least: {worst['mask_accuracy']:.1%} ({worst['budget']})"
    yield Criterion("mask bits predicted correctly: at least 85 %", found, worst["mask_accuracy"] >= 0.85)


def _estimate(rows: list[Results]) -> Criterion:
    worst = max(rows, key=lambda r: r["estimate_error"])
    found = f"at most {100 * worst['estimate_error']:.1f} points off ({worst['budget']})"
    return Criterion("cut estimated before training within 10 points", found, worst["estimate_error"] <= 0.1)


def _exact(results: Results) -> Criterion:
    worst = max(cell["deployed_error"] for cell in results["cells"])
    return Criterion("deployed network equals the trained one to 1e-5", f"{worst:.1e} relative", worst <= 1e-5)


def _fast(results: Results) -> Criterion:
    name = "gated layers take at most 0.8 of the dense time at batch 1, where the cut is 40 % or more"
    timed = [cell for cell in results["cells"] if "latency" in cell and cell["cut"] >= 0.4]
    if not timed:
        return Criterion(name, "no timed budget cuts 40 %", None)
    ratios = []
    for cell in timed:
        layers = cell["latency"]["layers"]
        ratio = sum(layer["gated_ms"] for layer in layers) / sum(layer["dense_ms"] for layer in layers)
        ratios.append((ratio, cell["budget"]))
    ratio, budget = max(ratios)
    return Criterion(name, f"at most {ratio:.2f} of the dense time ({budget})", ratio <= 0.8)


#: two tables, so that each fits a terminal of 80 columns
OUTCOME = ("budget", "seeds", "accuracy %", "points lost", "random masks %", "MACs cut")
DETAILS = (
    "budget",
    "paper's rule",
    "estimate",
    "mask bits right",
    "best fixed mask",
    "dense ms",
    "gated ms",
    "speed-up",
)


def outcome_rows(results: Results) -> Iterator[list[str]]:
    """What each budget costs and saves."""
    for row in summary(results):
        accuracy, lost, random = (f"{row[key]:{form}}" for key, form in _OUTCOME)
        yield [row["budget"], str(row["seeds"]), accuracy, lost, random, f"{row['cut']:.1%}"]


_OUTCOME = (("accuracy", ".2f"), ("drop", "+.2f"), ("random_accuracy", ".2f"))
_SHARES = ("cut_paper_rule", "estimated_cut", "mask_accuracy", "fixed_mask_accuracy")


def detail_rows(results: Results) -> Iterator[list[str]]:
    """The cut by the paper's rule and as estimated before training, the heads' predictions, and latency."""
    for row in summary(results):
        timing = row["latency"]
        times = ["", "", ""]
        if timing is not None:
            times = [f"{timing['dense_ms']:.3f}", f"{timing['gated_ms']:.3f}", f"{timing['speedup']:.2f}x"]
        yield [row["budget"], *(f"{row[key]:.1%}" for key in _SHARES), *times]


def tables(results: Results) -> list[Table]:
    """What each budget costs and saves, the details, and the criteria."""
    return [
        (OUTCOME, list(outcome_rows(results))),
        (DETAILS, list(detail_rows(results))),
        report.criteria_table(criteria(results)),
    ]


def markdown(results: Results) -> str:
    """Conditions and tables as markdown."""
    return report.markdown(conditions(results), tables(results))


def conditions(results: Results) -> str:
    """One paragraph: data, network, length of training, baseline, machine."""
    settings, plan, dense = results["settings"], results["settings"]["plan"], results["dense"]
    start = "random weights" if settings["weights"] is None else f"the weights {settings['weights']}"
    given = f" ({mean(d['given'] for d in dense):.2f} % as given)" if "given" in dense[0] else ""
    where = results["environment"]
    timed = (cell["latency"]["threads"] for cell in results["cells"] if "latency" in cell)
    threads = next(timed, where["threads"])  # the timing may be a run of its own
    first, longer = (mean(d[key] for d in dense) for key in ("accuracy", "continued"))
    sentences = (
        f"{settings['condition']} Network {plan['model']}, from {start}{given};",
        f"{plan['dense_epochs']} dense epochs, then {plan['gated_epochs']} with gates, whose heads learn in the first",
        f"{plan['cooldown']:.0%}. Dense baseline, mean over the seeds ({len(dense)}): {first:.2f} %, and",
        f"{longer:.2f} % after as many further epochs as the gated networks had; points lost count from the better.",
        "Multiply-accumulates include the heads; the paper's rule leaves them out. The best fixed mask is the same for",
        "all samples and chosen in hindsight. Latency at batch 1, first seed, against the fastest form of the dense",
        f"network: {where['cpu']}, {threads} threads, torch {where['torch']}.",
    )
    return " ".join(sentences)


def plots(results: Results, folder: Path) -> list[Path]:
    """Accuracy against the cut, and against measured latency, as PNG; empty if matplotlib is missing."""
    rows = summary(results)
    timed = [row for row in rows if row["latency"] is not None]
    paths = _plot(results, folder / "accuracy_cut.png", "multiply-accumulates cut (%)", rows, _cut, 0.0)
    if timed:
        dense_ms = median(row["latency"]["dense_ms"] for row in timed)
        paths += _plot(results, folder / "accuracy_latency.png", "latency at batch 1 (ms)", timed, _gated_ms, dense_ms)
    return paths


def _plot(
    results: Results, path: Path, label: str, rows: list[Results], x: Callable[[Results], float], dense_x: float
) -> list[Path]:
    dense = mean(max(row["accuracy"], row["continued"]) for row in results["dense"])
    series = [report.Series("dense", [(dense_x, dense)], "k*")]
    for coupling, style in (("decoupled", "o-"), ("joint", "s-")):
        points = [(x(row), row["accuracy"]) for row in rows if row["coupling"] == coupling]
        series.append(report.Series(f"FTWT {coupling}", points, style))
    random = [(x(row), row["random_accuracy"]) for row in rows]
    series.append(report.Series("random masks, as many channels", random, "C7x:"))
    # Results from before there were validation runs do not say that they are none.
    part = "validation" if results["settings"]["plan"].get("validate") else "test"
    return report.plot(path, label, f"{part} accuracy (%)", series)


def _cut(row: Results) -> float:
    return 100 * float(row["cut"])


def _gated_ms(row: Results) -> float:
    return float(row["latency"]["gated_ms"])
