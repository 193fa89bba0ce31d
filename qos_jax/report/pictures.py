"""Figures as files and as parts of a page: PNG, PDF and SVG, at full width and for one column.

A drawing is a function with an argument ``width``, as those of ``plots`` are, bound to its data with
``functools.partial``. A finished ``Figure``, or a function without ``width``, exists at its own width only.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import inspect
import io
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure

from qos_jax.errors import InputError
from qos_jax.io.files import shortened, write_whole
from qos_jax.io.imports import in_one_line
from qos_jax.report import style

Drawing = Figure | Callable[..., Figure]

_LONGEST_NAME = 200  # bytes, without the ending
_FORMATS = ("png", "pdf", "svg")
_METADATA = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
}
_TEXT_STAYS_TEXT = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "qos_jax"}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure in all its forms."""

    caption: str
    files: dict[str, bytes]  # by what follows the name of the figure, such as .png and _column.pdf

    def write(self, folder: str | os.PathLike[str], name: str) -> None:
        """Writes NAME.png, .pdf and .svg, and NAME_column.png, .pdf and .svg where there is a narrow form.

        Raises:
          InputError: a file cannot be written.
        """
        for ending, content in self.files.items():
            write_whole(pathlib.Path(folder) / f"{shortened(name, _LONGEST_NAME)}{ending}", content)

    def html(self) -> str:
        """Returns the figure as part of a page: the narrow form on a phone, the wide one elsewhere."""
        caption = html.escape(self.caption)
        shown = [f'<div class="wide">{self._shown("", caption)}</div>']
        if "_column.png" in self.files:
            shown.append(f'<div class="narrow">{self._shown("_column", caption)}</div>')
        alone = "" if len(shown) == 2 else ' class="alone"'
        return f"<figure{alone}>{''.join(shown)}<figcaption>{caption}</figcaption></figure>"

    def _shown(self, ending: str, caption: str) -> str:
        """Returns the SVG where it has tips or is the smaller file, otherwise the PNG."""
        svg, png = self.files.get(f"{ending}.svg", b"").decode(), self.files[f"{ending}.png"]
        if svg and ('class="tip"' in svg or len(svg) < len(png)):
            return _inline(svg, caption)
        return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{caption}">'


def picture(drawing: Drawing) -> Picture:
    """Returns a figure in all its forms."""
    figure = drawing if isinstance(drawing, Figure) else drawing()
    files = _all_formats(figure, "", style.FULL)
    if not isinstance(drawing, Figure) and _takes_width(drawing):
        files |= _all_formats(drawing(width=style.COLUMN), "_column", style.COLUMN)
    return Picture(str(figure.get_label()), files)


def picture_or_warning(name: str, drawing: Drawing) -> Picture | None:
    """Returns a figure in all its forms; one that cannot be drawn is None and a line on stderr."""
    try:
        return picture(drawing)
    except Exception as error:  # a picture is worth less than the numbers
        print(f"warning: the picture {name} is left out: {in_one_line(error)}", file=sys.stderr)
        return None


def write_figure(folder: str | os.PathLike[str], name: str, drawing: Drawing) -> Picture | None:
    """Draws a figure, writes all its files and returns it; see ``picture_or_warning`` and ``write_or_warn``."""
    drawn = picture_or_warning(name, drawing)
    if drawn is not None:
        write_or_warn(folder, name, drawn)
    return drawn


def write_or_warn(folder: str | os.PathLike[str], name: str, drawn: Picture) -> None:
    """Writes all files of a picture; one that cannot be written is a line on stderr."""
    try:
        drawn.write(folder, name)
    except InputError as error:
        print(f"warning: the picture {name} is left out: {error}", file=sys.stderr)


def saved(figure: Figure, kind: str, width: style.Width = style.FULL) -> bytes:
    """Returns the file of a figure: png, pdf or svg. Texts stay texts, and the same figure gives the same bytes."""
    for artist in figure.findobj(lambda each: str(each.get_gid()).startswith(style.TIP)):
        artist.set_visible(kind == "svg")  # only pages show tips
    buffer = io.BytesIO()
    with matplotlib.rc_context(style.rc(width) | _TEXT_STAYS_TEXT):
        figure.savefig(buffer, format=kind, dpi=width.dots_per_inch, metadata=_METADATA[kind])
    if kind != "svg":
        return buffer.getvalue()
    tips = rf'<g id="{style.TIP}([^"]*)">'
    return re.sub(tips, r'<g class="tip"><title>\1</title>', buffer.getvalue().decode()).encode()


def _takes_width(drawing: Callable[..., Figure]) -> bool:
    parameters = inspect.signature(drawing).parameters
    return "width" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _all_formats(figure: Figure, ending: str, width: style.Width) -> dict[str, bytes]:
    files = {}
    for kind in _FORMATS:
        files[f"{ending}.{kind}"] = saved(figure, kind, width)
        figure.set_layout_engine("none")  # the layout of the first is that of all, and takes as long as to draw
    return files


def _inline(svg: str, caption: str) -> str:
    """Returns an SVG as an element of a page, as wide as its place, with identifiers that are its own."""
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    head, rest = element.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    prefix = f"f{zlib.crc32(svg.encode()):x}-"
    rest = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}", rest)
    return f'{head} role="img" aria-label="{caption}">{rest}'
