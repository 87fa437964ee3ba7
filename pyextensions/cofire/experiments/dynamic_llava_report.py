# SPDX-License-Identifier: Apache-2.0
"""What Dynamic-LLaVA's results say: criteria, tables, plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from cofire.experiments import report
from cofire.experiments.files import Results
from cofire.experiments.ofq_report import interval
from cofire.experiments.report import Criterion, Table

CONTINUED, CHOSEN, RANDOM = "continued", "chosen", "random"
IN_THEIR_PLACE = "random tokens in the place of the chosen"
#: Points that the choice may lose, and must gain over chance; how far the kept share may be off.
LOSS, GAIN, TOLERANCE = 1.5, 10.0, 0.03


def _cells(results: Results, name: str) -> list[Results]:
    if name == IN_THEIR_PLACE:  # of the same networks, without their predictor
        cells = (cell for cell in _cells(results, CHOSEN) if "in_their_place" in cell)
        return [{"seed": cell["seed"], **cell["in_their_place"]} for cell in cells]
    return [cell for cell in results["cells"] if cell["cell"] == name]


# -------------------------------------------------------------------------------------------------------- criteria


def criteria(results: Results) -> list[Criterion]:
    """What the experiment has to show, judged on the means over the seeds."""
    cells = _cells(results, CHOSEN)
    if not cells:
        return [Criterion("chosen tokens", "not run", None)]
    # With all tokens, after as many epochs as the others if that is better than before.
    controls = [rows for rows in (results["dense"], _cells(results, CONTINUED)) if rows]
    best = max(controls, key=lambda rows: mean(row["accuracy"] for row in rows))
    behind = _differences(cells, best)
    found = [
        Criterion(f"chosen tokens lose at most {LOSS} points", _text(behind), mean(behind) >= -LOSS - 1e-9),
    ]
    for control, words in ((IN_THEIR_PLACE, IN_THEIR_PLACE), (RANDOM, "random tokens, trained alike")):
        ahead, name = _differences(cells, _cells(results, control)), f"at least {GAIN:.0f} points ahead of {words}"
        found.append(Criterion(name, _text(ahead), mean(ahead) >= GAIN) if ahead else Criterion(name, "not run", None))
    aim = results["settings"]["plan"]["vision_keep"]
    rate = mean(cell["vision_rate"] for cell in cells)
    worst = max(abs(cell["vision_rate"] - aim) for cell in cells)
    text = f"{rate:.3f} for {aim:g}, the farthest seed off by {worst:.3f}"
    name = f"the predictor by itself keeps its share within {TOLERANCE}"
    found.append(Criterion(name, text, abs(rate - aim) <= TOLERANCE))
    ink, chance = (mean(cell[key] for cell in cells) for key in ("ink", "chance"))
    text = f"{ink:.1%}, {ink / chance:.2f} times chance ({chance:.1%})"
    found.append(Criterion("kept tokens are ink: twice chance", text, ink >= 2 * chance))
    differing, compared = (sum(cell[key] for cell in cells) for key in ("differing", "compared"))
    text = f"{differing} of {compared:,} differ"
    found.append(Criterion("with a cache and without: the same answers", text, differing == 0))
    cut = 1 - cells[0]["token_layers"] / cells[0]["dense_token_layers"]
    text = f"{cut:.1%} ({cells[0]['dense_token_layers']} to {cells[0]['token_layers']})"
    found.append(Criterion("token-layers of a prompt cut by half", text, cut >= 0.5))
    return found


def _differences(cells: Sequence[Results], control: Sequence[Results]) -> list[float]:
    known = {row["seed"]: row["accuracy"] for row in control}
    return [cell["accuracy"] - known[cell["seed"]] for cell in cells if cell["seed"] in known]


def _text(differences: Sequence[float]) -> str:
    half = interval(differences)
    spread = "one seed" if half is None else f"95 % interval +-{half:.2f}"
    return f"{mean(differences):+.2f} points ({spread})"


# ---------------------------------------------------------------------------------------------------------- tables


def tables(results: Results) -> list[Table]:
    """Networks, shares of tokens, latency, criteria."""
    rows = [("all tokens", results["dense"])]
    rows += [(name, _cells(results, name)) for name in (CONTINUED, CHOSEN, IN_THEIR_PLACE, RANDOM)]
    rows = [(name, cells) for name, cells in rows if cells]
    questions = list(rows[0][1][0]["by_question"])
    body = []
    for name, cells in rows:
        values = [cell["accuracy"] for cell in cells]
        half = interval(values)
        by_question = [f"{mean(cell['by_question'][q] for cell in cells):.2f}" for q in questions]
        shares = ["", ""]
        if "vision_rate" in cells[0]:
            kept, texts = cells[0]["kept_tokens"], [c["text_rate"] for c in cells if c["text_rate"] is not None]
            shares = [f"{kept} of {cells[0]['image_tokens']}", f"{mean(texts):.1%}" if texts else ""]
        spread = "" if half is None else f"{half:.2f}"
        body.append([name, str(len(cells)), f"{mean(values):.2f}", spread, *by_question, *shares])
    header = ("network", "seeds", "answers right %", "95 % +-", *(f"{q} %" for q in questions))
    found: list[Table] = [((*header, "image tokens", "answer tokens cached"), body)]
    sparse = [(name, cells) for name, cells in rows if "by_keep" in cells[0]]
    if sparse:
        keeps = [keep for keep, _ in sparse[0][1][0]["by_keep"]]
        body = [[name, *(f"{y:.2f}" for _, y in _course(cells))] for name, cells in sparse]
        found.append((("answers right %, image tokens kept:", *(f"{keep:.1%}" for keep in keeps)), body))
    if results.get("latency"):
        body = [
            [str(row["batch"]), f"{row['dense_ms']:.2f}", f"{row['deployed_ms']:.2f}", _ratio(row)]
            for row in results["latency"]
        ]
        found.append((("batch", "all tokens ms", "deployed ms", "speed-up"), body))
    return [*found, report.criteria_table(criteria(results))]


def _ratio(row: Results) -> str:
    return f"{row['dense_ms'] / row['deployed_ms']:.2f}x"


def _course(cells: Sequence[Results]) -> list[tuple[float, float]]:
    """Accuracy by the share of tokens kept, the mean over the seeds."""
    return [(at[0][0], mean(accuracy for _, accuracy in at)) for at in zip(*(c["by_keep"] for c in cells), strict=True)]


def markdown(results: Results) -> str:
    """Conditions and tables as markdown."""
    return report.markdown(conditions(results), tables(results))


def conditions(results: Results) -> str:
    """One paragraph: data, network, length of training, machine."""
    settings, where = results["settings"], results["environment"]
    plan = settings["plan"]
    choice = "a sample decides" if plan.get("noise", True) else "the likelier of two logits decides"
    if plan.get("exact", False):
        choice = "as many as when deployed" + (", of a sample" if plan["noise"] else "")
    if plan.get("detach", False):
        choice += ", the predictor trains no layer below it"
    if plan.get("settle", 1) < 1:
        choice += f", and after {plan['settle']:.0%} of the training the choice stands"
    texts = "all" if plan["text_keep"] == 1 else f"a share of {plan['text_keep']:g}"
    sentences = (
        f"{settings['condition']} Scaled to {plan['image']}x{plan['image']}, in {(plan['image'] // 2) ** 2} tokens, and one of",
        f"three questions of 6 letters, drawn anew in each epoch; a decoder of {plan['depth']} layers of {plan['width']}",
        f"features. {plan['dense_epochs']} epochs with all tokens at a rate of {plan['dense_lr']:g}; from there {plan['epochs']}",
        f"more at {plan['lr']:g}, with all tokens (*continued*), with a share of {plan['vision_keep']:g} of the image's tokens",
        f"and {texts} of the answer's from layer {plan['layer']} on (*chosen*: in training {choice}), and with as many of",
        f"the image's by chance (*random*); batches of {plan['batch']}. *{IN_THEIR_PLACE.capitalize()}*: the same",
        "networks, with as many by chance. An answer is right if every letter is.",
        f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}.",
    )
    return " ".join(sentences)


# ------------------------------------------------------------------------------------------------------------ plot


def plots(results: Results, folder: Path) -> list[Path]:
    """Accuracy by the share of the image's tokens, mean over seeds; empty without matplotlib."""
    series = []
    for name, style in ((CHOSEN, "o-"), (RANDOM, "s--")):
        cells = _cells(results, name)
        if cells:
            points = [(100 * keep, accuracy) for keep, accuracy in _course(cells)]
            series.append(report.Series(f"{name} tokens", points, style))
    if not series:
        return []
    for name, rows in (("all tokens", results["dense"]), (CONTINUED, _cells(results, CONTINUED))):
        if rows:
            level = mean(row["accuracy"] for row in rows)
            series.append(report.Series(name, [(6.25, level), (100, level)], ":" if name == CONTINUED else "-."))
    return report.plot(folder / "keep.png", "image tokens kept, %", "answers right, %", series)
