# SPDX-License-Identifier: Apache-2.0
"""What the results of ``cofire train quantize`` and ``cofire train qlora`` say: summary, criteria, tables."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

from cofire.experiments import report
from cofire.experiments.files import Results
from cofire.experiments.report import Criterion, Table

#: Units of a score.
ACCURACY, BITS = "accuracy %", "bits/char"


#: Bits of the activations: as they are, which is in fp32; those of a network in bfloat16; rounded row by row.
ACTIVATIONS = {"exact": 32, "bf16": 16, "int8": 8}


def width(cell: Results) -> str:
    """Bits of weights and activations."""
    return f"W{cell['bits']}A{ACTIVATIONS[cell['activations']]}"


def label(cell: Results) -> str:
    """What a setting is called."""
    return f"{width(cell)}, {cell['method']}"


def summary(results: Results) -> list[Results]:
    """One row per setting: means over its seeds, each ``lost`` against the dense network of the same seed."""
    dense = {row["seed"]: row["score"] for row in results["dense"]}
    sign = -1 if results["settings"]["unit"] == ACCURACY else 1
    rows = []
    for name in dict.fromkeys(cell["setting"] for cell in results["cells"]):
        cells = [cell for cell in results["cells"] if cell["setting"] == name]
        row: Results = {"setting": name, "seeds": len(cells), "score": mean(cell["score"] for cell in cells)}
        lost = [sign * (cell["score"] - dense[cell["seed"]]) + 0.0 for cell in cells]  # (no -0.0)
        row |= {"lost": mean(lost), "least": min(lost), "most": max(lost)}
        if "answers" in cells[0]:
            row |= {"bits": cells[0]["bits"], "method": cells[0]["method"], "activations": cells[0]["activations"]}
            row |= {"setting": label(row), "width": width(row)}
            row |= {"format": cells[0].get("format", False), "share": cells[0].get("share", 1.0)}
            row |= {"agreeing": sum(c["agreeing"] for c in cells), "answers": sum(c["answers"] for c in cells)}
            row |= {"bits_per_weight": cells[0]["bits_per_weight"], "seconds": mean(c["seconds"] for c in cells)}
        else:
            row |= {"before": mean(cell["before"] for cell in cells), "trained": cells[0]["trained"]}
            row |= {"weight_bytes": cells[0]["weight_bytes"], "wide_bytes": cells[0]["wide_bytes"]}
        rows.append(row)
    return rows


def _qlora(results: Results) -> bool:
    return bool(results["settings"]["method"] == "qlora")


# -------------------------------------------------------------------------------------------------------- criteria


def criteria(results: Results) -> list[Criterion]:
    """What the experiment has to show, judged on the means over the seeds."""
    rows = summary(results)
    if _qlora(results):
        return list(_low_rank(rows))
    return [*(_text(rows) if results["settings"]["unit"] == BITS else ()), _same_answers(rows)]


#: Above dense, in bits per character: what four bits may lose, by the activations.
BOUNDS = {"exact": ("W4A32", 0.010), "bf16": ("W4A16", 0.010), "int8": ("W4A8", 0.015)}


def _text(rows: list[Results]) -> Iterator[Criterion]:
    """Both of rounding to the nearest, which needs no data, and of GPTQ, which looks at some."""
    there = {row["activations"] for row in rows}
    for activations, (name, bound) in BOUNDS.items():
        if activations == "bf16" and activations not in there:
            continue
        for method, words in (("minmax", "rounded to the nearest"), ("mse", "range searched"), ("gptq", "GPTQ")):
            found = [
                r for r in rows if (r["bits"], r["method"], r["activations"]) == (4, method, activations)
            ]  # at most one
            title = f"{name}, {words}: at most {bound:.3f} bits per character above dense"
            if not found:
                yield Criterion(title, "not run", None)
                continue
            yield Criterion(title, f"{found[0]['lost']:+.4f}", found[0]["lost"] <= bound)


def _same_answers(rows: list[Results]) -> Criterion:
    title = "kernels and decoded weights agree on at least 99.9 % of the answers"
    worst = min(rows, key=lambda row: row["agreeing"] / row["answers"], default=None)
    if worst is None:
        return Criterion(title, "not run", None)
    found = f"least: {_share(worst)} ({worst['setting']})"
    return Criterion(title, found, worst["agreeing"] >= 0.999 * worst["answers"])


def _share(row: Results) -> str:
    return f"{row['agreeing']:,} of {row['answers']:,}"


def _low_rank(rows: list[Results]) -> Iterator[Criterion]:
    found = {row["setting"]: row for row in rows}
    near, small = "final loss at most 1 % above that beside bf16 weights", "weights at most 35 % of bf16's bytes"
    if not {"bf16", "nf4"} <= set(found):
        yield Criterion(near, "not run", None)
        yield Criterion(small, "not run", None)
        return
    ratio = found["nf4"]["score"] / found["bf16"]["score"] - 1
    yield Criterion(near, f"{ratio:+.2%}", ratio <= 0.01)
    share = found["nf4"]["weight_bytes"] / found["nf4"]["wide_bytes"]
    yield Criterion(small, f"{share:.1%}", share <= 0.35)


# ---------------------------------------------------------------------------------------------------------- tables


def tables(results: Results) -> list[Table]:
    """Scores, sizes, and the criteria."""
    rows, judged = summary(results), report.criteria_table(criteria(results))
    if _qlora(results):
        return [_adapted(rows), judged]
    if results["settings"]["unit"] == BITS:
        return [_scores(rows), judged]
    others = [row for row in rows if row["format"]]
    return [_grid([row for row in rows if not row["format"]]), *([_others(others)] if others else []), judged]


def _scores(rows: list[Results]) -> Table:
    header = ("setting", "bits/weight", BITS, "lost", "least", "most", "same answers")
    return header, [
        [
            row["setting"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['score']:.4f}",
            *(f"{row[key]:+.4f}" for key in ("lost", "least", "most")),
            _share(row),
        ]
        for row in rows
    ]


def _grid(rows: list[Results]) -> Table:
    """Points of accuracy lost, a row for each width and a column for each method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    widths = list(dict.fromkeys(row["width"] for row in rows))
    lost = {(row["width"], row["method"]): f"{row['lost']:+.2f}" for row in rows}
    return ("points lost", *methods), [[width, *(lost.get((width, m), "") for m in methods)] for width in widths]


def _others(rows: list[Results]) -> Table:
    """A row for each format of another library: how much of the network it holds, and points of accuracy lost."""
    header = (
        "format",
        "weights in it",
        "bits/weight",
        *(f"lost, A{bits}" for bits in ACTIVATIONS.values()),
        "same answers",
    )
    body = []
    for name in dict.fromkeys(row["method"] for row in rows):
        found = {row["activations"]: row for row in rows if row["method"] == name}
        first = next(iter(found.values()))
        lost = [f"{found[a]['lost']:+.2f}" if a in found else "" for a in ACTIVATIONS]
        worst = min(found.values(), key=lambda row: row["agreeing"] / row["answers"])
        body.append([name, f"{first['share']:.0%}", f"{first['bits_per_weight']:.2f}", *lost, _share(worst)])
    return header, body


def _adapted(rows: list[Results]) -> Table:
    header = ("frozen weights", "seeds", "before", "bits/char", "weights KiB", "trained")
    return header, [
        [
            row["setting"],
            str(row["seeds"]),
            f"{row['before']:.3f}",
            f"{row['score']:.4f}",
            f"{row['weight_bytes'] / 1024:.1f}",
            f"{row['trained']:,}",
        ]
        for row in rows
    ]


def markdown(results: Results) -> str:
    """Conditions and tables as markdown."""
    return report.markdown(conditions(results), tables(results))


def _activations(results: Results) -> set[str]:
    return {cell["activations"] for cell in results["cells"]}


def conditions(results: Results) -> str:
    """One paragraph: data, network, training, machine."""
    settings, plan, where = results["settings"], results["settings"]["plan"], results["environment"]
    start = "random weights" if settings["weights"] is None else f"the weights {settings['weights']}"
    text = settings["unit"] == BITS
    length = f"{plan['epochs'] * plan['steps']} steps" if text else f"{plan['epochs']} epochs"
    dense = mean(row["score"] for row in results["dense"])
    score = f"{dense:.4f} bits per character" if text else f"{dense:.2f} %"
    sentences = [
        f"{settings['condition']} Network {plan['model']}, from {start}; {length} in batches of {plan['batch']} at a rate "
        f"from {plan['lr']:g}. Dense network, mean over the seeds ({len(results['dense'])}): {score}.",
    ]
    if _qlora(results):
        sentences.append(
            f"Then: {settings['adapted_to']} {plan['rounds'] * plan['steps']} steps of the low-rank terms alone, rank "
            f"{plan['rank']}, alpha {plan['alpha']:g}, at a rate from {plan['low_rank_lr']:g}; NF4 in groups of "
            f"{plan['group_size']}. Scores are of the second text's test."
        )
    else:
        sentences.append(
            f"Linear layers in groups of {plan['group_size']} columns (palettes: one of the whole weight), scales in fp32; "
            f"GPTQ's Hessians are of {plan['calibration']} batches of the training data. A32: activations as they are; "
            + ("A16: the network in bfloat16, but for the packed weights; " if "bf16" in _activations(results) else "")
            + "A8: activations rounded to 8 bits row by row. Lost: "
            + ("mean, least and most" if text else "mean")
            + " over the seeds, each against its dense network."
        )
    sentences.append(f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}.")
    return " ".join(sentences)
