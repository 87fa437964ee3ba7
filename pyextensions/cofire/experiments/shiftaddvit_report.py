# SPDX-License-Identifier: Apache-2.0
"""What ShiftAddViT's results say: summary, criteria, tables, plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from cofire.experiments import report
from cofire.experiments.files import Results
from cofire.experiments.ofq_report import interval
from cofire.experiments.report import Criterion, Table

ADDITIONS, SHIFTS, CONTINUED = "additions", "shifts", "continued"
#: Points of token share between what latencies imply and what is found, and the least that a change of them must move it.
TOLERANCE, MOVES = 0.08, 0.10
#: Of the linear layers: dense, and deployed as stored and as held once they have run.
BYTES = ("dense_bytes", "packed_bytes", "resident_bytes")


def _cells(results: Results, name: str) -> list[Results]:
    return [cell for cell in results["cells"] if cell["cell"] == name]


def _names(results: Results) -> list[str]:
    return list(dict.fromkeys(cell["cell"] for cell in results["cells"]))


def _mixtures(results: Results) -> list[str]:
    return [name for name in _names(results) if _cells(results, name)[0]["stage"] == 3]


def _mean(results: Results, name: str, key: str) -> float:
    return mean([float(cell[key]) for cell in _cells(results, name)])


# -------------------------------------------------------------------------------------------------------- criteria


def criteria(results: Results) -> list[Criterion]:
    """What the experiment has to show, judged on the means over the seeds."""
    mixtures = _mixtures(results)
    # The network in full precision after as many epochs as the others, if that is better than before.
    found = [_behind("attention of additions loses at most 1.0 points", results, ADDITIONS, 1.0)]
    for name in mixtures:
        found.append(_behind(f"{name} loses at most 1.5 points", results, name, 1.5))
    for name in mixtures:
        found.append(_ahead(f"{name} at least as accurate as shifts alone", results, name, SHIFTS))
    shares = {}
    for name in mixtures:
        cells = _cells(results, name)
        implied = cells[0]["balanced_share"]
        shares[name] = mean(cell["shift_share"] for cell in cells)
        worst = max(abs(cell["shift_share"] - implied) for cell in cells)
        text = f"{shares[name]:.1%} for {implied:.0%}, the farthest seed off by {100 * worst:.1f} points"
        off = abs(shares[name] - implied)
        found.append(Criterion(f"{name}: share of the shift expert within 8 points", text, off <= TOLERANCE))
    if len(shares) > 1:
        values = list(shares.values())
        moved = values[-1] - values[0]
        name = "the share moves by at least 10 points with the latencies"
        found.append(Criterion(name, f"{100 * moved:+.1f} points", moved >= MOVES))
    if mixtures:
        cells = [cell for name in mixtures for cell in _cells(results, name)]
        found += _routers(cells)
    hashed = _cells(results, ADDITIONS)
    if hashed:
        overlap, chance = _mean(results, ADDITIONS, "overlap"), hashed[0]["chance"]
        drawn = _mean(results, ADDITIONS, "random_overlap")
        text = f"{overlap:.1%} ({overlap / chance:.1f} times chance; random directions {drawn:.1%})"
        found.append(Criterion("similar tokens have similar codes: twice chance", text, overlap >= 2 * chance))
        differing = sum(cell["codes_differing"] for cell in hashed)
        error = max(cell["kernel_error"] for cell in hashed)
        text = f"{differing} codes differ, error {error:.1e}"
        found.append(
            Criterion("kernels: the reference's codes, and its outputs to 1e-5", text, not differing and error <= 1e-5)
        )
    deployed = [cell for cell in results["cells"] if cell["stage"]]
    if deployed:
        equal = min(cell["deployed_equal"] for cell in deployed)
        worst = max(cell["deployed_error"] for cell in deployed)
        text = f"{equal:.1%}, the others within {worst:.1e}"
        name = "deployed outputs equal the trained network's to 1e-5 on 99 % of images"
        found.append(Criterion(name, text, equal >= 0.99))
    return found


def _routers(cells: Sequence[Results]) -> list[Criterion]:
    """The criterion from before the run, of the task's gradient alone, and that of what is trained on: task and balance."""
    return [
        _reached("the task's gradient reaches every router", cells, "routers_reached", "router_gradient"),
        _reached("every router gets a gradient, of task and balance", cells, "routers_trained", "training_gradient"),
    ]


def _reached(name: str, cells: Sequence[Results], count: str, norm: str) -> Criterion:
    if any(count not in cell for cell in cells):
        return Criterion(name, "not recorded", None)
    reached, routers = (sum(cell[key] for cell in cells) for key in (count, "routers"))
    text = f"{reached} of {routers}, least norm {min(cell[norm] for cell in cells):.1e}"
    return Criterion(name, text, reached == routers)


def _differences(results: Results, first: str, second: dict[int, float]) -> list[float]:
    return [cell["accuracy"] - second[cell["seed"]] for cell in _cells(results, first) if cell["seed"] in second]


def _text(differences: Sequence[float]) -> str:
    half = interval(differences)
    spread = "one seed" if half is None else f"95 % interval +-{half:.2f}"
    return f"{mean(differences):+.2f} points ({spread})"


def _behind(name: str, results: Results, first: str, most: float) -> Criterion:
    """Against the network in full precision, before or after as many epochs more, whichever is better in the mean."""
    candidates = [{row["seed"]: row["accuracy"] for row in rows} for rows in (
        results["dense"], _cells(results, CONTINUED)
    ) if rows]  # fmt: skip
    control = max(candidates, key=lambda c: mean(c.values()), default={})
    differences = _differences(results, first, control)
    if not differences:
        return Criterion(name, "not run", None)
    return Criterion(name, _text(differences), mean(differences) >= -most - 1e-9)


def _ahead(name: str, results: Results, first: str, second: str) -> Criterion:
    differences = _differences(results, first, {c["seed"]: c["accuracy"] for c in _cells(results, second)})
    if not differences:
        return Criterion(name, "not run", None)
    return Criterion(name, _text(differences), mean(differences) >= -1e-9)


# ---------------------------------------------------------------------------------------------------------- tables


def tables(results: Results) -> list[Table]:
    """Accuracy and shares, sizes, latencies, and the criteria."""
    dense = [row["accuracy"] for row in results["dense"]]
    header = (
        "network",
        "seeds",
        "before training %",
        "accuracy %",
        "95 % +-",
        "deployed %",
        "shift share",
        "dead weights",
    )
    outcome: list[Sequence[str]] = [
        ["full precision", str(len(dense)), "", f"{mean(dense):.2f}", _half(dense), "", "", ""]
    ]
    sizes: list[Sequence[str]] = []
    for name in _names(results):
        cells = _cells(results, name)
        accuracies = [cell["accuracy"] for cell in cells]
        row = [name, str(len(cells)), f"{_mean(results, name, 'before'):.2f}", f"{mean(accuracies):.2f}"]
        row.append(_half(accuracies))
        if not cells[0]["stage"]:
            outcome.append([*row, "", "", ""])
            continue
        weights = sum(cell["weights"] for cell in cells)
        dead = f"{sum(cell['dead'] for cell in cells) / weights:.2%}" if weights else ""
        share = f"{_mean(results, name, 'shift_share'):.1%}" if cells[0]["stage"] == 3 else ""
        outcome.append([*row, f"{_mean(results, name, 'packed'):.2f}", share, dead])
        first = cells[0]
        linear = [_kib(first[key]) if first["stage"] > 1 else "" for key in BYTES]
        sizes.append([name, *linear, _kib(first["model_bytes"]), _kib(first["model_resident_bytes"])])
    found: list[Table] = [
        (header, outcome),
        (
            ("network", "linear layers, dense KiB", "stored KiB", "held KiB", "whole network, stored KiB", "held KiB"),
            sizes,
        ),
    ]
    if results.get("latency"):
        body = [
            [row["cell"], str(row["shape"][0]), f"{row['dense_ms']:.2f}", f"{row['packed_ms']:.2f}", _ratio(row)]
            for row in results["latency"]
        ]
        found.append((("network", "batch", "full precision ms", "deployed ms", "speed-up"), body))
    if results.get("experts"):
        body = [
            ["x".join(map(str, row["shape"])), f"{row['dense_us']:.0f}", f"{row['shift_us']:.0f}"]
            for row in results["experts"]
        ]
        found.append((("layer", "dense expert, us a batch", "shift expert, us a batch"), body))
    return [*found, report.criteria_table(criteria(results))]


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['dense_ms'] / row['packed_ms']:.2f}x"


def _kib(size: int) -> str:
    return f"{size / 1024:.1f}"


def _half(values: Sequence[float]) -> str:
    half = interval(values)
    return "" if half is None else f"{half:.2f}"


def markdown(results: Results) -> str:
    """Conditions and tables as markdown."""
    return report.markdown(conditions(results), tables(results))


def conditions(results: Results) -> str:
    """One paragraph: data, network, length of training, machine."""
    settings, where = results["settings"], results["environment"]
    plan = settings["plan"]
    start = "random weights" if settings["weights"] is None else f"the weights {settings['weights']}"
    sentences = (
        f"{settings['condition']} Network {plan['model']}, from {start}; {plan['dense_epochs']} epochs in full precision at a",
        f"rate of {plan['dense_lr']:g}, then {plan['epochs']} with attention of additions ({plan['bits']} bits, {plan['anchors']}",
        f"anchors, fitted to {plan['fitted']} images), and from there as many with shifts or mixtures, at a rate of",
        f"{plan['lr']:g} ({plan['router_lr']:g} for routers, whose noise falls to nothing), in batches of {plan['batch']}; balance",
        f"{plan['balance']:g}. *continued* is the network in full precision",
        "trained on for as many epochs as attention of additions. A mixture's latencies are given, not measured, so that its",
        f"share can be compared with what they imply. {where['cpu']}, {where['threads']} threads, torch {where['torch']}.",
    )
    return " ".join(sentences)


# ----------------------------------------------------------------------------------------------------------- plots


def plots(results: Results, folder: Path) -> list[Path]:
    """The shift expert's share of the tokens in the course of training, mean over seeds; empty without matplotlib."""
    series = []
    for name, (line, aim) in zip(_mixtures(results), (("o-", "--"), ("s-", ":")), strict=False):
        cells = _cells(results, name)
        points = [
            (float(at[0][0]), 100 * mean(share for _, share in at))
            for at in zip(*(cell["course"] for cell in cells), strict=True)
        ]
        implied = 100 * cells[0]["balanced_share"]
        series.append(report.Series(name, points, line))
        ends = [(x, implied) for x, _ in (points[:1] + points[-1:])]
        series.append(report.Series(f"{name}: equal times", ends, aim))
    if not series:
        return []
    return report.plot(folder / "shares.png", "steps", "tokens of the shift expert, %", series)
