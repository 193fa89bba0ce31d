"""TOML files whose fields are all checked: every error names the file, the field, its value and what is legal."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Sequence
from typing import Any, overload

from qos_jax.errors import InputError
from qos_jax.io.text_files import number_or_nan, read_text, shown


class Section:
    """One table of a TOML file; its fields are taken one by one, and what is not taken is unknown.

    Methods raise ``InputError`` where a field is missing, of another type, or not legal. A field with a default may be
    left out.
    """

    def __init__(self, file: str, fields: Any, place: str = "") -> None:
        """Takes the fields of the table at a place of the file, as ``experts[0].engine``."""
        self.file, self.place = file, place
        if not isinstance(fields, dict):
            raise InputError(f"{file}: {place} is {shown(fields)}, must be a table of fields")
        self._fields = dict(fields)
        self._taken: list[str] = []

    def __contains__(self, name: str) -> bool:
        """Whether the field is given."""
        return name in self._fields

    @overload
    def text(self, name: str, default: str, *, legal: Sequence[str] = ()) -> str: ...
    @overload
    def text(self, name: str, default: None = None, *, legal: Sequence[str] = ()) -> str | None: ...
    def text(self, name: str, default: str | None = None, *, legal: Sequence[str] = ()) -> str | None:
        """Takes a text, one of those that are legal if these are given."""
        value = self._take(name)
        rule = f"one of {', '.join(legal)}" if legal else "a text that is not empty"
        if value is None:
            return default
        if not isinstance(value, str) or not value.strip() or (legal and value not in legal):
            raise self.error(name, value, rule)
        return value

    @overload
    def number(
        self, name: str, default: float, *, low: float = 0.0, high: float = math.inf, above: bool = False
    ) -> float: ...
    @overload
    def number(
        self, name: str, default: None = None, *, low: float = 0.0, high: float = math.inf, above: bool = False
    ) -> float | None: ...
    def number(
        self, name: str, default: float | None = None, *, low: float = 0.0, high: float = math.inf, above: bool = False
    ) -> float | None:
        """Takes a finite number from ``low`` to ``high``; ``above``: it must be more than ``low``."""
        value = self._take(name)
        if value is None:
            return default
        legal = f"a finite number {'above' if above else 'of at least'} {low:g}"
        legal += f" and at most {high:g}" if high < math.inf else ""
        number = number_or_nan(value)
        if not low <= number <= high or (above and number == low):
            raise self.error(name, value, legal)
        return number

    @overload
    def whole(self, name: str, default: int, *, low: int = 1, high: int = 2**30) -> int: ...
    @overload
    def whole(self, name: str, default: None = None, *, low: int = 1, high: int = 2**30) -> int | None: ...
    def whole(self, name: str, default: int | None = None, *, low: int = 1, high: int = 2**30) -> int | None:
        """Takes a whole number from ``low`` to ``high``."""
        value = self._take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, value, f"a whole number from {low} to {high}")
        return value

    def switch(self, name: str, default: bool | None = None) -> bool | None:
        """Takes true or false."""
        value = self._take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def section(self, name: str) -> Section:
        """Takes a table, an empty one if it is left out."""
        value = self._take(name)
        return Section(self.file, {} if value is None else value, self._at(name))

    def sections(self, name: str) -> list[Section]:
        """Takes a list of tables, an empty one if it is left out."""
        value = self._take(name)
        if value is None:
            return []
        if not isinstance(value, list) or not value:
            raise self.error(name, value, "one or more tables")
        return [Section(self.file, each, f"{self._at(name)}[{index}]") for index, each in enumerate(value)]

    def texts(self, name: str) -> tuple[str, ...]:
        """Takes a text or a list of different texts; none if it is left out."""
        value = self._take(name)
        if value is None:
            return ()
        each = value if isinstance(value, list) else [value]
        if not each or not all(isinstance(one, str) and one.strip() for one in each) or len(set(each)) < len(each):
            raise self.error(name, value, "a text that is not empty, or a list of different ones")
        return tuple(each)

    def value(self, name: str) -> Any:
        """Takes a field of any type; None if it is left out."""
        return self._take(name)

    def numbers(self) -> dict[str, float]:
        """Takes all fields, each a finite number."""
        return {name: self.required(self.number(name, low=-math.inf), name) for name in list(self._fields)}

    def required(self, value: Any, name: str) -> Any:
        """Returns a value that was taken, which may not be left out."""
        if value is None:
            raise InputError(f"{self.file}: {self._at(name)} is missing")
        return value

    def done(self) -> None:
        """Checks that no field is left."""
        for name in self._fields:
            if name not in self._taken:
                raise InputError(f"{self.file}: {self._at(name)} is unknown; choose from {', '.join(self._taken)}")

    def error(self, name: str, value: Any, legal: str) -> InputError:
        """Returns the error of a field that is not legal."""
        return InputError(f"{self.file}: {self._at(name)} is {shown(value)}, must be {legal}")

    def _take(self, name: str) -> Any:
        if name not in self._taken:
            self._taken.append(name)
        return self._fields.get(name)

    def _at(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name


def read_toml(path: str | os.PathLike[str]) -> Section:
    """Returns the top of a TOML file.

    Raises:
      InputError: the file cannot be read, or is not TOML.
    """
    text = read_text(path).replace("\r\n", "\n")
    try:
        fields = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a plain ValueError: of a number of more digits than Python reads
        raise InputError(f"{path}: is not TOML: {error}") from error
    return Section(str(path), fields)
