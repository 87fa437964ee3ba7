# SPDX-License-Identifier: Apache-2.0
"""The report as markdown: a page with the summary, and one for each family with all its rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from cofire.bench.report import compare, tables
from cofire.bench.report.extras import Extras, Part
from cofire.bench.report.plots import roofline_plots, speedup_plots, standing_plot
from cofire.bench.report.rows import absent, families, measurements, names, standings, title, titles
from cofire.bench.results import Results

INTRODUCTION = """# Benchmarks

`cofire bench` measures, `cofire report` writes this page. Each answer is checked against an fp64 reference on the very
input that is timed; a wrong answer gets no number. *Dense* is the strongest plain torch: the fastest of several ways to
write the operation in it (memory layouts, packed weights, in-place expressions); the speed-up is the median ratio of
paired readings, with its 95 % interval, which fewer than six *pairs* do not have. Two more comparisons have no interval (the
median of paired ratios; in older files the ratio of medians): with the fastest of other *libraries*, and with the fastest of
torch's other ways (*other torch*): `torch.compile`, and its packed, quantised and sparse kernels. No rival is what computes
another function, what is built on our own operators, and what is marked as a *bound*, because it does less than the operator;
nor does attention without scores return what `attention_with_scores` does, but it is what is used instead. cofire may lose
twice what plain torch in that type loses (gradients three times), the others 16 times as much; a peer that rounds in a way of
its own is checked against that. A tie is less than 5 % apart, or within the interval (with fewer than six pairs: within their
range). *Undisturbed* are the comparisons during which a probe of fixed work took as long as usual: they are counted apart.
GFLOP/s and GB/s count what the masks leave to do, for all
providers alike. The *ceiling* is the larger of bytes / bandwidth and FLOPs / peak, both measured on the same machine with the
same torch, the best of all runs of the file: 100 % is as fast as the machine allows. `kv_fuse` passes that: its FLOPs are
those of the sum as it stands, by frequencies (in fp32) they are fewer, and in bf16 on AMX it ran faster than the library's
products, which the ceiling is measured with. So do, on CPUs without products of bytes (AVX2), int8 activations times codes
of up to 4 bits: their sums fit in 16 bits for a while, which saves one of the two multiplications of the library's product,
with which that ceiling is measured. In older files optimisers pass it too: there changes in place, which move the
most, were not measured. *Rounds* are those that count: a case that takes long has
fewer than the usual 30, as has one that was disturbed. Slower is **bold**; `~` marks a row during which the machine was busy
or the readings spread.
"""
FOLDER = "benchmarks"  #: of the pictures, beside the page
GROWTH = """Each exponent is that of a power law through the larger half of the sizes; in brackets, of time, the smallest and the
largest that the readings allow, between their 20th and 80th percentiles. One that is a quarter or more away from what theory
expects says "above" (**bold**) or "below". Where a call's fixed cost weighs, time grows slower than theory says: *fixed cost* is
the largest size at which it is half of the time or more, if the time is a fixed cost and the law of theory. *Plain
torch* is the strongest plain torch of an operator; of a method, a step of the same network without it."""


def family_page(family: str) -> str:
    return f"benchmarks-{family}.md"


def pictures(all_results: Sequence[Results]) -> dict[str, str]:
    """SVG text by file name, of everything but the extras."""
    found: dict[str, str] = {}
    standing = standing_plot(standings(all_results))
    if standing is not None:
        found["summary.svg"] = standing
    for name, results in zip(names(all_results), all_results):
        for family in families([results]):
            rows = [r for r in results.rows if r["family"] == family]
            for kind, drawn in (("speedup", speedup_plots(rows)), ("roofline", roofline_plots(results, rows))):
                for i, svg in enumerate(drawn, 1):
                    found[f"{name}-{family}-{kind}{f'-{i}' if len(drawn) > 1 else ''}.svg"] = svg
    return found


def summary(all_results: Sequence[Results], drawn: Sequence[str]) -> str:
    """What a person understands in ten seconds."""
    found = standings(all_results)
    if not found:
        return "\n\n".join(["Not measured.", *tables.gpu_words(all_results)])
    headings, lines = tables.summary(found)
    linked = [[f"[{line[0]}]({family_page(line[0])})", *line[1:]] for line in lines]
    parts = [*tables.headlines(found), tables.markdown_table(headings, linked)]
    if "summary.svg" in drawn:
        parts.append(_image("won, tied and lost by family", "summary.svg"))
    return "\n\n".join([*parts, *tables.gpu_words(all_results)])


def index(all_results: Sequence[Results], drawn: Sequence[str], extras: Extras, networks: str | None = None) -> str:
    """The generated part of ``benchmarks.md``; ``networks``: a page that shows whole networks."""
    parts = [summary(all_results, drawn)]
    if networks is None:
        parts += _extra("## Whole networks", extras.end_to_end, "")
    else:
        parts += [
            "## Whole networks",
            f"Latency, throughput, memory and accuracy, before and after: [{networks}]({networks}).",
        ]
    parts += _extra("## How cost grows", extras.growth, GROWTH)
    parts += side_by_side(all_results)
    if all_results:
        parts.append("## Machines")
    for machine, results in zip(titles(all_results), all_results):
        parts += [f"### {machine}", tables.environment(results), *tables.peers(results), tables.ceilings(results)]
        parts += [*tables.caveats(results), extras.agreement(results)]
        headings, lines = tables.runs(results)
        parts += [_folded("what each run measured with", headings, lines)] if lines else []
    return "\n\n".join(parts)


def _extra(heading: str, files: Sequence[Part], words: str) -> list[str]:
    found = [words] if words and files else []
    for part in files:
        found += [f"### {part.title}", part.environment, _folded("table", *part.table)]
        images = "\n".join(_image(Path(name).stem, name) for name in part.pictures)
        found += [f"<details><summary>plots</summary>\n\n{images}\n\n</details>"] if images else []
    if found and not any(part.gpu for part in files):
        found.append(tables.NO_GPU)
    return [heading, *found] if found else []


def side_by_side(all_results: Sequence[Results]) -> list[str]:
    """Each pair of machines, as far as both measured the same."""
    parts = []
    for (a, first), (b, second) in itertools.combinations(zip(all_results, titles(all_results)), 2):
        headings, lines = compare.machines_by_family(a, b, (first, second))
        parts.append(f"### {first} and {second}")
        if not lines:
            parts.append("No measurement is in both files.")
            continue
        parts += [
            tables.markdown_table(headings, lines),
            _folded("All rows of both", *compare.machines(a, b, (first, second))),
        ]
    return ["## Machines side by side", *parts] if parts else []


def family(name: str, all_results: Sequence[Results], drawn: Sequence[str]) -> str:
    """The page of a family: for each machine its operators, their pictures, and all rows."""
    parts = [f"# Benchmarks of {name}", "How to read this: [benchmarks.md](benchmarks.md)."]
    for slug, machine, results in zip(names(all_results), titles(all_results), all_results):
        rows = [r for r in results.rows if r["family"] == name]
        if not rows:
            continue
        parts += [f"## {machine}", tables.environment(results), *tables.commits(results, name)]
        parts += tables.caveats(results, name)
        missing = absent(rows)
        parts += [f"Not there: {'; '.join(missing)}."] if missing else []
        parts.append(tables.markdown_table(*tables.operators(results, name)))
        for kind, words in (("speedup", "speed-up over dense"), ("roofline", "share of the machine's ceilings")):
            shown = [f for f in drawn if f.startswith(f"{slug}-{name}-{kind}")]
            images = "\n".join(_image(f"{name}: {words}", f) for f in shown)
            parts += [f"<details><summary>{words}</summary>\n\n{images}\n\n</details>"] if shown else []
        for op in dict.fromkeys(r["op"] for r in rows):
            lines = [tables.cells(m) for m in measurements(rows) if m.op == op]
            parts.append(_folded(f"{op}: {tables.plural(len(lines), 'measurement')}", tuple(tables.COLUMNS), lines))
    return "\n\n".join([*parts, *tables.gpu_words(all_results, name)]) + "\n"


def _folded(words: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return f"<details><summary>{words}</summary>\n\n{tables.markdown_table(headings, lines)}\n\n</details>"


def _image(words: str, file: str) -> str:
    return f"![{words}]({FOLDER}/{file})"


def _run(results: Results) -> str:
    e = results.environment
    return f"{e.get('commit') or e.get('cofire')} ({e.get('date', 'not dated')})"


def comparison(old: Results, new: Results) -> str:
    """Two commits: what became slower first."""
    found = compare.changes(old, new)
    commits = [_run(old), _run(new)]
    parts = [
        "# Two runs side by side",
        f"Old: {commits[0]}. New: {commits[1]}. {title(new)}.",
        "\n".join(f"- {line}" for line in compare.verdicts(old, new)),
        compare.RULE.replace("~", "`~`"),
        tables.markdown_table(*compare.change_table(found)),
    ]
    return "\n\n".join(parts) + "\n"


def measured(all_results: Sequence[Results]) -> str:
    """For the README: who won, by family."""
    found = standings(all_results)
    if not found:
        return "Not measured."
    headings, lines = tables.short_summary(found)
    parts = [*tables.headlines(found), tables.markdown_table(headings, lines)]
    return "\n\n".join([*parts, *tables.gpu_words(all_results)])
