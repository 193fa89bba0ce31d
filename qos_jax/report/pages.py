"""Parts of a page of HTML that holds all it shows, and reads well on a phone and on a wide screen."""

from __future__ import annotations

import html
import re
import string
from collections.abc import Mapping, Sequence

from qos_jax.report.pictures import Picture
from qos_jax.report.style import display_name


def page(title: str, lead: str, parts: Sequence[str]) -> str:
    """Returns a whole page.

    Args:
      title: of the page, as text.
      lead: its first paragraph, as HTML.
      parts: the rest, as HTML.
    """
    return _PAGE.substitute(title=html.escape(title), lead=lead, parts="\n".join(parts), script=_SCRIPT)


def figures(pictures: Sequence[Picture]) -> str:
    """Returns pictures side by side where there is room."""
    return f'<div class="figures">{"".join(each.html() for each in pictures)}</div>' if pictures else ""


def table(heads: Sequence[str], names: Mapping[str, str], columns: Sequence[Sequence[str]]) -> str:
    """Returns a table with routers as rows.

    Args:
      heads: of the columns, as HTML.
      names: kind of each row's router by name, which is the class of the row.
      columns: cells, as HTML, in the order of the names.
    """
    rows = [[html.escape(display_name(name)), *cells] for name, *cells in zip(names, *columns, strict=True)]
    return cells_table(["router", *heads], rows, list(names.values()))


def rows_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of texts."""
    return cells_table([html.escape(each) for each in heads], [[html.escape(text) for text in row] for row in rows])


def cells_table(heads: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """Returns a table that sorts by a column when its head is clicked.

    Args:
      heads: of all columns, as HTML.
      rows: cells, as HTML; the first of a row is its name.
      classes: of the rows, if they have some.
    """
    text = ["" if any(map(_is_number, column)) else ' class="text"' for column in zip(*rows, strict=True)]
    text = text or [""] * len(heads)
    head = "".join(f'<th scope="col"{kind}>{each}</th>' for each, kind in zip(heads, text, strict=True))
    lines = []
    for number, (name, *cells) in enumerate(rows):
        kind = f' class="{html.escape(classes[number])}"' if classes else ""
        columns = "".join(f"<td{text[column]}>{each}</td>" for column, each in enumerate(cells, 1))
        lines.append(f'<tr{kind}><th scope="row">{name}</th>{columns}</tr>')
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def cell(mean: str, half: str, is_best: bool = False) -> str:
    """Returns a mean with half the width of its interval, which may be empty."""
    mean = f"<strong>{mean}</strong>" if is_best else mean
    return f"{mean}<small>&plusmn;&thinsp;{half}</small>" if half else mean


def folded(summary: str, content: str) -> str:
    """Returns content that is shown on demand."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def meanings(items: Mapping[str, str]) -> str:
    """Returns a list of terms with their meanings, as text."""
    pairs = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in items.items())
    return f"<dl>{''.join(pairs)}</dl>"


def literal(text: str) -> str:
    """Returns text in type of one width."""
    return f"<pre>{html.escape(text)}</pre>"


def _is_number(cell: str) -> bool:
    """Returns whether a cell, as HTML, begins with a number or says that there is none."""
    return re.match(r"(<[^>]*>)*([-+]?\d|-$)", cell) is not None


_SCRIPT = """
function sortable(table) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const entries = [...body.rows].map((row) => {
        const text = row.cells[column].textContent.trim();
        return { row, text, number: parseFloat(text) };
      });
      const numeric = entries.filter((entry) => !isNaN(entry.number)).length * 2 > entries.length;
      const before = head.getAttribute("aria-sort");
      const ascending = before ? before === "descending" : !numeric;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const sign = ascending ? 1 : -1;
      entries.sort((a, b) => {
        if (!numeric) return sign * a.text.localeCompare(b.text);
        if (isNaN(a.number) || isNaN(b.number)) return isNaN(a.number) - isNaN(b.number);
        return sign * (a.number - b.number);
      });
      body.append(...entries.map((entry) => entry.row));
    };
  });
}
document.querySelectorAll("table").forEach(sortable);

const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
for (const title of document.querySelectorAll("svg .tip title")) {
  title.parentNode.dataset.tip = title.textContent;
  title.remove();
}
document.addEventListener("pointerover", (event) => {
  const mark = event.target.closest(".tip");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const box = mark.getBoundingClientRect();
  const left = box.left + box.width / 2 - tip.offsetWidth / 2;
  tip.style.left = Math.max(4, Math.min(left, innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = Math.max(4, box.top - tip.offsetHeight - 4) + "px";
});
"""

_PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  --ink: #1a1a1a; --quiet: #63666b; --line: #e3e3e3; --paper: #fff; --strip: #f6f6f4; --accent: #0b62a4;
  --better: #1a7f37; --worse: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8e8e6; --quiet: #a0a3a8; --line: #35373b; --paper: #17181a; --strip: #202225; --accent: #7db8dd;
    --better: #6fcf8a; --worse: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 88rem;
  color: var(--ink); background: var(--paper); -webkit-text-size-adjust: 100%;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
h1 { margin: 0 0 .5rem; font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 3rem 0 .75rem; font-size: 1.2rem; }
p { max-width: 46rem; margin: 0 0 1rem; }
.note, figcaption { color: var(--quiet); font-size: .875rem; }
ul { margin: 0 0 1.5rem; padding-left: 1.2rem; }
.figures, .beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 2rem; }
.figures { margin-top: 2rem; align-items: start; }
.beside { margin-bottom: 1.5rem; align-items: start; }
figure { margin: 0; min-width: 0; }
figure:only-child { max-width: 64rem; }
figure > div { background: #fff; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem; }
figure img, figure svg { display: block; width: 100%; height: auto; }
@media (max-width: 40rem) { figure:not(.alone) .wide { display: none; } }
@media (min-width: 40.01rem) { .narrow { display: none; } }
.tip { cursor: crosshair; }
#tip {
  position: fixed; z-index: 9; padding: .25rem .5rem; border-radius: .25rem; font-size: .8rem; max-width: 90vw;
  color: var(--paper); background: var(--ink); pointer-events: none;
}
figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.beside .scroll { max-height: 26rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; line-height: 1.35; }
th, td { padding: .35rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; color: var(--quiet); font-weight: 600; }
thead small { display: block; }
thead button { all: unset; cursor: pointer; }
thead button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
[aria-sort="ascending"] button::before { content: "\\2191\\00a0"; }
[aria-sort="descending"] button::before { content: "\\2193\\00a0"; }
small { color: var(--quiet); font-weight: 400; font-size: .8em; }
td small { margin-left: .3em; }
th:first-child {
  position: sticky; left: 0; background: var(--paper); text-align: left; font-weight: 400; padding-left: 0;
}
tbody strong { color: var(--accent); }
th.text, td.text { text-align: left; }
.better { color: var(--better); }
.worse { color: var(--worse); }
.level, .unknown { color: var(--quiet); }
.oracle > * { color: var(--quiet); font-style: italic; }
details { border-top: 1px solid var(--line); }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { padding: .6rem 0; cursor: pointer; font-weight: 600; }
details .scroll { padding-bottom: 1.25rem; }
details tbody tr:last-child > * { border-bottom: 0; }
dl {
  display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.25rem; margin: 0;
  font-size: .875rem;
}
dt { font-weight: 600; }
dd { margin: 0; color: var(--quiet); overflow-wrap: anywhere; }
pre {
  margin: 1rem 0 0; padding: 1rem; overflow-x: auto; background: var(--strip); border-radius: .5rem; font-size: .8rem;
}
</style>
</head>
<body>
<h1>$title</h1>
<p>$lead</p>
$parts
<script>$script</script>
</body>
</html>
""")
