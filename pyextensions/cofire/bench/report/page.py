# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that needs no other: for a phone and a desk, in light and dark, and without JavaScript."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence

from cofire.bench.report import compare, tables
from cofire.bench.report.chart import WIDTH, inline
from cofire.bench.report.extras import Extras, Part
from cofire.bench.report.markdown import INTRODUCTION
from cofire.bench.report.plots import roofline_plots, speedup_plots, standing_plot
from cofire.bench.report.rows import (
    LIBRARY,
    LOST,
    TORCH,
    VERDICTS,
    Comparison,
    Measurement,
    absent,
    families,
    measurements,
    standings,
    titles,
)
from cofire.bench.results import Results, Row

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1f2328; --soft: #f3f5f7; --line: #d0d7de; --dim: #59636e;
  --loss: #c93c37; --won: #2f81f7; --link: #0969da }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --ink: #e6edf3; --soft: #161b22; --line: #30363d; --dim: #9198a1; --loss: #ff7b72;
    --won: #2f81f7; --link: #4493f8 }
}
* { box-sizing: border-box }
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  padding: 1rem; max-width: 80rem }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere } h2 { margin-top: 2.5rem; border-top: 1px solid var(--line);
  padding-top: 1rem } p, li { max-width: 46rem; overflow-wrap: anywhere } a { color: var(--link) }
.lead { font-size: 1.15rem; font-weight: 600 } .dim { color: var(--dim); font-size: .85rem }
nav { display: flex; flex-wrap: wrap; gap: .3rem .9rem } figure { margin: .5rem 0; max-width: 30rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1rem;
  max-width: 75rem; align-items: start } .wide { overflow-x: auto } svg { max-width: 100%; height: auto; display: block }
.pictures svg, figure svg { width: 100% } .wide svg { min-width: 36rem }
.scroll { overflow: auto; max-height: 85vh; margin: .5rem 0 1.5rem }
table { border-collapse: separate; border-spacing: 0; font-size: .8rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: left; white-space: nowrap;
  vertical-align: top } th { background: var(--soft); position: sticky; top: 0; z-index: 1 }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--soft); white-space: normal;
  overflow-wrap: anywhere; min-width: 7.5rem; max-width: 11rem } th:first-child { z-index: 2 }
td.words { white-space: normal; min-width: 18rem; max-width: 36rem } th[aria-sort] { cursor: pointer }
th[aria-sort=ascending]::after { content: " \\2191" } th[aria-sort=descending]::after { content: " \\2193" }
tr.lost td:first-child { box-shadow: inset 3px 0 var(--loss) } tr.won td:first-child { box-shadow: inset 3px 0 var(--won) }
tr.tied td:first-child { box-shadow: inset 3px 0 var(--dim) } strong { color: var(--loss) }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; overflow-wrap: anywhere }
.filter { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center } .filter input { flex: 1 1 10rem; max-width: 22rem;
  min-width: 0 } .filter input, .filter select { font: inherit; padding: .2rem .4rem; color: inherit;
  background: var(--soft); border: 1px solid var(--line); border-radius: .3rem }
"""

#: Sorting and filtering of the tables. Without it they stand there whole, in the order of the file.
SCRIPT = """
for (const table of document.querySelectorAll('table.rows')) {
  const body = table.tBodies[0], rows = [...body.rows], bar = document.createElement('div');
  bar.className = 'filter';
  bar.innerHTML = '<input type="search" placeholder="filter: words of a row" aria-label="filter rows"><select ' +
    'aria-label="which rows"><option value="">all rows</option><option>won</option><option>tied</option>' +
    '<option>lost</option></select><span></span>';
  const [words, which, count] = bar.children;
  const show = () => {
    const wanted = words.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = (which.value && !row.classList.contains(which.value)) || !wanted.every(w => text.includes(w));
      shown += !row.hidden;
    }
    count.textContent = shown + ' of ' + rows.length;
  };
  words.oninput = which.onchange = show;
  table.parentElement.before(bar);
  show();
  const value = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent.replace(/^[~\\s]+/, '');
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    head.tabIndex = 0;
    head.setAttribute('aria-sort', 'none');
    const sort = () => {
      const up = head.getAttribute('aria-sort') != 'ascending';
      for (const other of table.tHead.rows[0].cells) other.setAttribute('aria-sort', 'none');
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const key = new Map(rows.map(row => [row, value(row, i)]));
      rows.sort((a, b) => {
        const [x, y] = [parseFloat(key.get(a)), parseFloat(key.get(b))];
        const both = isNaN(x) && isNaN(y) ? key.get(a).localeCompare(key.get(b)) : isNaN(x) ? 1 : isNaN(y) ? -1 : 0;
        return both || (up ? x - y : y - x) || 0;
      });
      body.append(...rows);
    };
    head.onclick = sort;
    head.onkeydown = event => { if (event.key == 'Enter') sort(); };
  });
}
"""


# --------------------------------------------------------------------------------------------------------- pieces


def _cell(text: str, words: bool = False, value: float | None = None) -> str:
    shown = html.escape(text)
    if "**" in text:  # a loss
        pieces = text.split("**")
        shown = "".join(f"<strong>{html.escape(p)}</strong>" if i % 2 else html.escape(p) for i, p in enumerate(pieces))
    attributes = (' class="words"' if words else "") + (f' data-v="{value:.6g}"' if value is not None else "")
    return f"<td{attributes}>{shown}</td>"


def table(headings: Sequence[str], lines: Sequence[Sequence[str]], words: Sequence[str] = ()) -> str:
    """``words``: headings of columns that may break into lines."""
    body = ("".join(_cell(c, h in words) for h, c in zip(headings, line)) for line in lines)
    return _framed(headings, (f"<tr>{line}</tr>" for line in body))


def _framed(headings: Sequence[str], rows: Sequence[str] | object, kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    lines = "".join(rows)  # type: ignore[arg-type]
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _rows_table(taken: Sequence[Measurement]) -> str:
    """All rows of a family, to sort and to filter."""
    headings = ("operator", *tables.COLUMNS)
    lines = []
    for m in taken:
        values = {
            "dense ms (of ceiling)": _time(m.dense),
            "best library ms (of ceiling)": _time(m.rival(LIBRARY)),
            "best other torch ms (of ceiling)": _time(m.rival(TORCH)),
            "against dense": _ratio(m.against_dense),
            "against best library": _ratio(m.against(LIBRARY)),
            "against other torch": _ratio(m.against(TORCH)),
        }
        cells = [m.op, *tables.cells(m)]
        body = "".join(
            _cell(c, h in ("notes", "others ms (of ceiling)"), values.get(h)) for h, c in zip(headings, cells)
        )
        lines.append(f'<tr class="{tables.verdict(m)}">{body}</tr>')
    return _framed(headings, lines, ' class="rows"')


def _time(row: Row | None) -> float | None:
    return None if row is None else float(row["median_ms"])


def _ratio(found: Comparison | None) -> float | None:
    return None if found is None else found.ratio


def _paragraphs(lines: Sequence[str], kind: str = "") -> str:
    return "".join(f"<p{kind}>{html.escape(line)}</p>" for line in lines)


def _folded(words: str, inside: str, unfolded: bool = False) -> str:
    return f"<details{' open' if unfolded else ''}><summary>{html.escape(words)}</summary>{inside}</details>"


def _pictures(drawn: Sequence[str]) -> str:
    return f'<div class="pictures">{"".join(map(inline, drawn))}</div>'


def document(name: str, parts: Sequence[str]) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(name)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )


# ---------------------------------------------------------------------------------------------------------- pages


def page(all_results: Sequence[Results], extras: Extras) -> str:
    """The report on any number of machines."""
    more = [_section("end-to-end", "Whole networks", _extra(extras.end_to_end))]
    more += [_section("growth", "How cost grows", _extra(extras.growth))]
    more += [_section("machines", "Machines side by side", _side_by_side(all_results))]
    return document(
        "cofire benchmarks",
        [
            "<h1>cofire benchmarks</h1>",
            _summary(all_results),
            _links(all_results, extras),
            *(_family(family, all_results) for family in families(all_results)),
            *filter(None, more),
            _how_to_read(all_results, extras),
        ],
    )


def _summary(all_results: Sequence[Results]) -> str:
    found = standings(all_results)
    if not found:
        return _paragraphs(["Not measured.", *tables.gpu_words(all_results)])
    picture = standing_plot(found)
    lead = _paragraphs(tables.headlines(found), ' class="lead"')
    drawn = f"<figure>{inline(picture)}</figure>" if picture is not None else ""
    means = "The number at the right of a bar is the geometric mean of the speed-ups."
    return lead + drawn + _paragraphs([means, *tables.gpu_words(all_results)]) + table(*tables.summary(found))


def _links(all_results: Sequence[Results], extras: Extras) -> str:
    links = [(f, f) for f in families(all_results)]
    links += [("end-to-end", "whole networks")] if extras.end_to_end else []
    links += [("growth", "growth")] if extras.growth else []
    links += [("machines", "side by side")] if len(all_results) > 1 else []
    links += [("reading", "how to read this")]
    return "<nav>" + "".join(f'<a href="#{anchor}">{html.escape(words)}</a>' for anchor, words in links) + "</nav>"


def _family(family: str, all_results: Sequence[Results]) -> str:
    parts = [f'<h2 id="{html.escape(family)}">{html.escape(family)}</h2>']
    for machine, results in zip(titles(all_results), all_results):
        rows = [r for r in results.rows if r["family"] == family]
        if not rows:
            continue
        parts.append(f"<h3>{html.escape(machine)}</h3>")
        said = [tables.environment(results), *tables.commits(results, family), *tables.caveats(results, family)]
        parts.append(_paragraphs(said, ' class="dim"'))
        missing = absent(rows)
        parts.append(_paragraphs([f"Not there: {'; '.join(missing)}."]) if missing else "")
        parts.append(table(*tables.operators(results, family), words=(tables.MUST,)))
        for words, drawn in (
            ("Roofline: share of the machine's ceilings", roofline_plots(results, rows)),
            ("Speed-up over the strongest plain torch, 95 % interval (pale: noisy)", speedup_plots(rows)),
        ):
            parts.append(_folded(words, _pictures(drawn)) if drawn else "")
        taken = measurements(rows)
        verdicts = [tables.verdict(m) for m in taken]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICTS)
        parts.append(_folded(f"All {tables.plural(len(taken), 'measurement')}: {counts}", _rows_table(taken)))
    return "".join(parts)


def _section(anchor: str, words: str, inside: str) -> str:
    return f'<h2 id="{anchor}">{html.escape(words)}</h2>{inside}' if inside else ""


def _extra(files: Sequence[Part]) -> str:
    parts = []
    for part in files:
        narrow = [svg for svg in part.pictures.values() if f'viewBox="0 0 {WIDTH} ' in svg]
        wide = [f'<div class="wide">{inline(svg)}</div>' for svg in part.pictures.values() if svg not in narrow]
        drawn = (_pictures(narrow) if narrow else "") + "".join(wide)
        parts.append(f"<h3>{html.escape(part.title)}</h3>" + _paragraphs([part.environment], ' class="dim"'))
        parts.append(table(*part.table) + (_folded("Plots", drawn) if drawn else ""))
    if files and not any(part.gpu for part in files):
        parts.append(_paragraphs([tables.NO_GPU]))
    return "".join(parts)


def _side_by_side(all_results: Sequence[Results]) -> str:
    parts = []
    for (a, first), (b, second) in itertools.combinations(zip(all_results, titles(all_results)), 2):
        parts.append(f"<h3>{html.escape(f'{first} and {second}')}</h3>")
        headings, lines = compare.machines_by_family(a, b, (first, second))
        if not lines:
            parts.append("<p>No measurement is in both files.</p>")
            continue
        parts.append(
            table(headings, lines) + _folded("All rows of both", table(*compare.machines(a, b, (first, second))))
        )
    return "".join(parts)


def _how_to_read(all_results: Sequence[Results], extras: Extras) -> str:
    words = INTRODUCTION.split("\n\n", 1)[1].replace("`", "").replace("*", "")
    parts = [f'<h2 id="reading">How to read this</h2>{_paragraphs([words])}']
    for results in all_results:
        said = [tables.environment(results), *tables.peers(results), tables.ceilings(results), *tables.caveats(results)]
        parts.append(_paragraphs([*said, extras.agreement(results)], ' class="dim"'))
        headings, lines = tables.runs(results)
        parts.append(
            _folded("What each run measured with", table(headings, lines, words=headings[-1:])) if lines else ""
        )
    return "".join(parts)


def comparison(old: Results, new: Results) -> str:
    """Two commits: what became slower first."""
    found = compare.changes(old, new)
    headings, lines = compare.change_table(found)
    kinds = {compare.SLOWER: LOST, compare.FASTER: VERDICTS[0], compare.SAME: VERDICTS[1]}
    body = [f'<tr class="{kinds[c.verdict]}">{"".join(map(_cell, line))}</tr>' for c, line in zip(found, lines)]
    first, *rest = compare.verdicts(old, new)
    runs = [f"{which}: {tables.environment(r)}" for which, r in (("Old", old), ("New", new))]
    return document(
        "cofire: two runs",
        [
            "<h1>Two runs side by side</h1>",
            _paragraphs([first], ' class="lead"'),
            _paragraphs(rest),
            _paragraphs([compare.RULE]),
            _paragraphs(runs, ' class="dim"'),
            _framed(headings, body),
        ],
    )
