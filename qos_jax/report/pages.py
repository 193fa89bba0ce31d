"""Pages for the eye: one file that holds all it shows, and reads well on a phone as on a wide screen."""

from __future__ import annotations

import base64
import html
import io
import string
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

_DOTS_PER_INCH = 150


def page(title: str, lead: str, parts: Sequence[str]) -> str:
    """Returns a whole page.

    Args:
      title: of the page, as text.
      lead: what it says first, as HTML.
      parts: what follows, as HTML.
    """
    return _PAGE.substitute(title=html.escape(title), lead=lead, parts="\n".join(parts))


def png(figure: Figure) -> bytes:
    """Returns the picture of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def figures(pictures: Sequence[tuple[str, bytes]]) -> str:
    """Returns pictures, given as captions and PNGs, side by side where there is room."""
    return f'<div class="figures">{"".join(_figure(*each) for each in pictures)}</div>'


def table(heads: Sequence[str], names: Mapping[str, str], columns: Sequence[Sequence[str]]) -> str:
    """Returns a table with routers as rows.

    Args:
      heads: of the columns, as HTML.
      names: class of each row by name.
      columns: cells, as HTML, in the order of the names.
    """
    head = "".join(f'<th scope="col">{each}</th>' for each in ("router", *heads))
    rows = []
    for (name, kind), *cells in zip(names.items(), *columns, strict=True):
        title = f'<th scope="row">{spoken(name)}</th>'
        rows.append(f'<tr class="{html.escape(kind)}">{title}{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def rows_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of texts."""
    head = "".join(f'<th scope="col">{html.escape(each)}</th>' for each in heads)
    body = "\n".join(
        f'<tr><th scope="row">{spoken(row[0])}</th>{"".join(f"<td>{html.escape(text)}</td>" for text in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def cell(mean: str, half: str, is_best: bool) -> str:
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


def spoken(name: str) -> str:
    """Returns the name of a router as it is read."""
    return html.escape(name.replace("_", " "))


def _figure(caption: str, picture: bytes) -> str:
    data, caption = base64.b64encode(picture).decode(), html.escape(caption)
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
    return f'<figure><div class="scroll">{image}</div><figcaption>{caption}</figcaption></figure>'


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
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8e8e6; --quiet: #a0a3a8; --line: #35373b; --paper: #17181a; --strip: #202225; --accent: #7db8dd;
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
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 2rem;
  margin-top: 2rem; align-items: start;
}
figure { margin: 0; min-width: 0; }
figure .scroll { background: #fff; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem; }
img { display: block; width: 100%; min-width: 34rem; height: auto; }
figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; line-height: 1.35; }
th, td { padding: .35rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; color: var(--quiet); font-weight: 600; }
thead small { display: block; }
small { color: var(--quiet); font-weight: 400; font-size: .8em; }
td small { margin-left: .3em; }
th:first-child {
  position: sticky; left: 0; background: var(--paper); text-align: left; font-weight: 400; padding-left: 0;
}
tbody strong { color: var(--accent); }
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
</body>
</html>
""")
