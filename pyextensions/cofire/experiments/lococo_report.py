# SPDX-License-Identifier: Apache-2.0
"""What LoCoCo's results say: criteria, tables, plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from cofire.experiments import report
from cofire.experiments.files import Results
from cofire.experiments.ofq_report import interval
from cofire.experiments.quantize_report import ACCURACY
from cofire.experiments.report import Criterion, Table

FULL, LOCOCO = "full cache", "LoCoCo"
#: Controls by what they keep; each is judged by the better of its cells.
HEAVY, WINDOW = "heavy hitters", "window"
ALIKE = ", trained alike"


def _accuracy(results: Results) -> bool:
    return bool(results["settings"]["unit"] == ACCURACY)


def _cells(results: Results, name: str) -> list[Results]:
    return [cell for cell in results["cells"] if cell["cell"] == name]


def _names(results: Results) -> list[str]:
    """The cells that every seed has, so not those of other sizes."""
    size = results["settings"]["plan"]["capacity"]
    found = (cell["cell"] for cell in results["cells"] if cell["capacity"] in (None, size))
    return list(dict.fromkeys(found))


def _score(results: Results, name: str) -> float:
    return mean([float(cell["score"]) for cell in _cells(results, name)])


# -------------------------------------------------------------------------------------------------------- criteria


def criteria(results: Results) -> list[Criterion]:
    """What the experiment has to show, judged on the means over the seeds."""
    found = []
    if _accuracy(results):
        margins = [(HEAVY, 3.0), (WINDOW, 3.0)]
        behind, unit = 5.0, "points"
    else:
        margins = [(HEAVY, 0.01)]
        behind, unit = 0.15, "bits/char"
    for kind, margin in margins:
        found.append(_ahead(results, kind, False, margin, unit))
        if _controls(results, kind, True):
            found.append(_ahead(results, kind, True, margin, unit))
    found.append(_against(f"at most {behind:g} {unit} behind the full cache", results, FULL, -behind, unit))
    ours = _cells(results, LOCOCO)
    if ours:
        if _accuracy(results):
            share = max(cell["held_bytes"] / cell["full_bytes"] for cell in ours)
            name = "the cache holds at most 35 % of the bytes of the full one at the end"
            found.append(Criterion(name, f"{share:.1%}", share <= 0.35))
        moved = [mean(abs(g - 0.5) for g in gates) for gates in zip(*(cell["gates"] for cell in ours), strict=True)]
        text = f"from 0.5 by {', '.join(f'{m:.3f}' for m in moved)}, by layer"
        found.append(
            Criterion("the gates have learned: all more than 0.02 from where they start", text, min(moved) > 0.02)
        )
    if results.get("growth"):
        (tokens, first), (more, last) = results["growth"]
        slope = (last - first) / first
        name = "the cache's bytes do not grow with the text: less than 1 %"
        found.append(Criterion(name, f"{slope:.1%} from {tokens} to {more} tokens", abs(slope) < 0.01))
    return found


def _gains(results: Results, name: str) -> list[float]:
    """How much better LoCoCo is, by seed."""
    sign = 1 if _accuracy(results) else -1
    others = {cell["seed"]: cell["score"] for cell in _cells(results, name)}
    return [sign * (c["score"] - others[c["seed"]]) for c in _cells(results, LOCOCO) if c["seed"] in others]


def _controls(results: Results, kind: str, trained: bool) -> list[str]:
    return [n for n in _names(results) if n.startswith(kind) and n.endswith(ALIKE) == trained]


def _ahead(results: Results, kind: str, trained: bool, margin: float, unit: str) -> Criterion:
    """Against the best of the controls of a kind."""
    names = _controls(results, kind, trained)
    what = f"{kind}{ALIKE if trained else ''}"
    name = f"at least {margin:g} {unit} better than {what}"
    if not names:
        return Criterion(name, "not run", None)
    sign = 1 if _accuracy(results) else -1
    return _against(name, results, max(names, key=lambda n: sign * _score(results, n)), margin, unit)


def _against(name: str, results: Results, control: str, margin: float, unit: str) -> Criterion:
    gains = _gains(results, control)
    if not gains:
        return Criterion(name, "not run", None)
    half = interval(gains)
    digits = 2 if _accuracy(results) else 3
    spread = "one seed" if half is None else f"95 % interval +-{half:.{digits}f}"
    text = f"{mean(gains):+.{digits}f} {unit} ({spread}) to {control}"
    return Criterion(name, text, mean(gains) >= margin - 1e-9)


# ---------------------------------------------------------------------------------------------------------- tables


def tables(results: Results) -> list[Table]:
    """Scores and bytes, the gates, other sizes, and the criteria."""
    unit, digits = results["settings"]["unit"], 2 if _accuracy(results) else 3
    header = ("cache", "tokens", "seeds", unit, "95 % +-", "held KiB", "of full", "allocated KiB")
    body: list[Sequence[str]] = []
    for name in _names(results):
        cells = _cells(results, name)
        scores = [cell["score"] for cell in cells]
        half = interval(scores)
        body.append(
            [name, str(cells[0]["capacity"] or "all"), str(len(cells)), f"{mean(scores):.{digits}f}",
             "" if half is None else f"{half:.{digits}f}", f"{cells[0]['held_bytes'] / 1024:.1f}",
             f"{cells[0]['held_bytes'] / cells[0]['full_bytes']:.0%}", f"{cells[0]['allocated_bytes'] / 1024:.1f}"]
        )  # fmt: skip
    found: list[Table] = [(header, body)]
    ours = _cells(results, LOCOCO)
    if ours:
        rows = [
            [str(cell["seed"]), ", ".join(f"{g:.3f}" for g in cell["gates"]), f"{cell['first_loss']:.3f}",
             f"{cell['last_loss']:.3f}", f"{cell['prompt_flops'] / cell['model_flops']:.1%}"]
            for cell in ours
        ]  # fmt: skip
        columns = (
            "LoCoCo, seed",
            "gates by layer",
            "loss, first tenth",
            "last tenth",
            "compression, of the layers' FLOPs",
        )
        found.append((columns, rows))
    sizes = _by_size(results)
    names = [name for name, points in sizes.items() if len(points) > 1]
    if names:
        capacities = sorted({c for name in names for c in sizes[name]})
        rows = [[n, *(f"{sizes[n][c]:.{digits}f}" if c in sizes[n] else "" for c in capacities)] for n in names]
        found.append(((f"seed 0, {unit} by tokens", *map(str, capacities)), rows))
    return [*found, report.criteria_table(criteria(results))]


def _by_size(results: Results) -> dict[str, dict[int, float]]:
    """Scores of the first seed by the size of the cache, by name of the cell."""
    found: dict[str, dict[int, float]] = {}
    for cell in results["cells"]:
        if cell["seed"] == 0 and cell["capacity"] is not None:
            name = cell["cell"].removesuffix(f", {cell['capacity']} tokens")
            found.setdefault(name, {})[cell["capacity"]] = cell["score"]
    return found


def markdown(results: Results) -> str:
    """Conditions and tables as markdown."""
    return report.markdown(conditions(results), tables(results))


def conditions(results: Results) -> str:
    """One paragraph: data, network, length of training, machine."""
    settings, where = results["settings"], results["environment"]
    plan = settings["plan"]
    start = "random weights" if settings["weights"] is None else f"the weights {settings['weights']}"
    if _accuracy(results):
        task = f"Each image is a stream of {settings['length']} tokens, and its class is read at the last one."
        first = f"{plan['epochs']} epochs in batches of {plan['batch']}"
    else:
        task = f"Read in {plan['windows']} windows of {plan['context']} characters."
        first = f"{plan['epochs'] * plan['steps']} steps of {plan['batch']} times {plan['context']} characters"
    trained = " and ".join({"norm": "norms", "embed": "embeddings"}.get(name, name) for name in plan["trained"])
    back = "the chunk after a compression" if plan["bptt"] == 1 else f"{plan['bptt']} chunks"
    local = f", the last {plan['local']} tokens among them" if plan["local"] else ""
    course = ["that fall as a cosine"] if plan.get("cosine") else []  # files written before have no such settings
    if plan.get("warm_up"):
        course.append(f"after {plan['warm_up']} updates in which they rise")
    if plan.get("clip") is not None:
        course.append(f"with the gradients of each clipped to a norm of {plan['clip']:g}")
    fall = "".join(f", {part}" for part in course)
    scores = ", scores divided by the number of queries that saw a token" if plan["normalize"] else ""
    sentences = (
        f"{settings['condition']} {task} Decoder of {plan['depth']} blocks, width {plan['width']}, {plan['heads']} heads of",
        f"queries and {plan['kv_heads']} of keys, from {start}: {first} at a rate of {plan['lr']:g} with all keys. Caches of",
        f"{plan['capacity']} tokens and a buffer of {plan['buffer']}, chunks of {plan['chunk']}{scores}. LoCoCo:",
        f"{plan['keep']:.0%} heavy hitters{local}, {plan['taps']} taps whose weights start with a deviation of {plan['std']:g};",
        f"trained for {plan['updates']} updates in batches of {plan['update_batch']}, at a rate of {plan['update_lr']:g} times",
        f"{plan['fusion_rate']:g} for convolutions and gates and times {plan['other_rate']:g} for {trained}{fall}, with gradients",
        f"through {back}. *Trained alike*: the same updates of {trained} through the control's cache. The window has the first",
        f"{plan['sinks']} tokens and the last; *summed scores* (H2O) has the last half and, of the rest, what got most attention;",
        f"*latest scores* keeps what got most from the last chunk{local}, which is LoCoCo without mixtures.",
        f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}.",
    )
    return " ".join(sentences)


# ----------------------------------------------------------------------------------------------------------- plots

STYLES = {"LoCoCo": "o-", "heavy hitters, latest scores": "v--", "heavy hitters, summed scores": "^--", "window": "s--"}


def plots(results: Results, folder: Path) -> list[Path]:
    """Score by the size of the cache, first seed; empty without matplotlib."""
    sizes = _by_size(results)
    series = [
        report.Series(name, [(float(c), score) for c, score in sizes[name].items()], style)
        for name, style in STYLES.items()
        if len(sizes.get(name, ())) > 1
    ]
    if not series:
        return []
    ends = [x for one in series for x, _ in one.points]
    full = [cell["score"] for cell in _cells(results, FULL) if cell["seed"] == 0]
    series.append(report.Series(FULL, [(x, y) for y in full for x in (min(ends), max(ends))], ":"))
    return report.plot(folder / "sizes.png", "tokens in the cache", results["settings"]["unit"], series)
