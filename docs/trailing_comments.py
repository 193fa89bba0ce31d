"""Documents the fields of classes with the comments behind them, which state shapes and units."""

from __future__ import annotations

from typing import Any

import griffe


class TrailingComments(griffe.Extension):
    """Takes ``x: Array  # [N] s`` as the documentation of ``x``, where it has no docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Sets the docstring of a field of a class."""
        if attr.docstring is None and attr.parent is not None and attr.parent.is_class and attr.lines:
            comment = attr.lines[-1].partition("  # ")[2].strip()
            if comment:
                attr.docstring = griffe.Docstring(comment, parent=attr)
