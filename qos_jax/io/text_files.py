"""Text files of others: their lines, JSON lines, csv tables and numbers; every error names the file and the line.

A text is UTF-8, with or without a byte order mark, and may be packed by gzip, whatever its name. Lines end at LF or
CR LF, in csv also at CR, and at nothing else: other characters that Unicode calls line ends are text.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from qos_jax.errors import InputError
from qos_jax.io.files import most_unpacked, parse_json, path_of

MAX_TOKENS = 2**31 - 1

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|\0[^\0]\0[^\0]|[^\0]\0[^\0]\0")  # a byte order mark, or ASCII without one


def read_text(path: str | os.PathLike[str]) -> str:
    """Returns the text of a file.

    Raises:
      InputError: the file cannot be read, is packed and unpacks to too much, or is not UTF-8.
    """
    file = path_of(path)
    try:
        content = file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that holds a null character
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if content.startswith(b"\x1f\x8b"):
        content = _unpacked(path, content)
    if _UTF_16.match(content):
        raise InputError(f"{path}: is not UTF-8 text but UTF-16: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def _unpacked(path: str | os.PathLike[str], content: bytes) -> bytes:
    most, size = most_unpacked(len(content)), 0
    chunks: list[bytes] = []
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            while chunk := file.read(2**20):
                chunks.append(chunk)
                size += len(chunk)
                if size > most:
                    raise InputError(f"{path}: {len(content)} bytes unpack to more than {most}, the most that is read")
        return b"".join(chunks)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is not a whole gzip file: {error}") from error


def json_lines(text: str, path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yields the place, as ``FILE, line N``, and the value of each line of a text that is not blank.

    Raises:
      InputError: a line is not JSON.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where)


class CsvTable:
    """The text of a csv file with one line of column names, separated by commas, tabs or semicolons.

    Cells may be quoted, and then hold line ends; spaces around cells and blank lines are left out.

    Raises:
      InputError: there is no line, or it is not csv.
    """

    def __init__(self, text: str, path: str | os.PathLike[str]) -> None:
        """Reads the column names; the path is for messages."""
        self.path = path
        first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
        if not first:
            raise InputError(f"{path}: is empty")
        self._records = self._read(text, max(",\t;", key=first.count))
        _, self.header = next(self._records, (0, []))

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        """Yields the place, as ``FILE, line N``, and the cells of these columns, row by row; can be used once.

        Raises:
          InputError: a column is missing or there twice, or a row has not as many cells as there are columns.
        """
        if missing := [name for name in columns if name not in self.header]:
            names = ", ".join(self.header)[:200]
            raise InputError(f"{self.path}: lacks the column(s) {', '.join(missing)}; it has {names!r}")
        if twice := [name for name in columns if self.header.count(name) > 1]:
            raise InputError(f"{self.path}: has the column {twice[0]} twice, must have it once")
        return self._cells([self.header.index(name) for name in columns])

    def _cells(self, at: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
        size = len(self.header)
        for number, cells in self._records:
            if len(cells) < size or any(cells[size:]):
                raise InputError(
                    f"{self.path}, line {number}: has {len(cells)} cells, must have {size}, as the line of column names"
                )
            yield f"{self.path}, line {number}", [cells[index] for index in at]

    def _read(self, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Yields the number of its first line and the cells of each record."""
        lines = io.StringIO(text, newline="")
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                record = next(reader, None)
            except csv.Error as error:
                raise InputError(f"{self.path}, line {number}: {error}") from error
            if record is None:
                return
            if len(record) > 1 or any(cell.strip() for cell in record):
                yield number, [cell.strip() for cell in record]


def parse_number(value: Any) -> float:
    """Returns a number of JSON, or one in a text without underscores, thousands separators and names.

    Raises:
      ValueError: the value is another one, or not finite.
    """
    if isinstance(value, bool) or not (
        isinstance(value, int | float) or (isinstance(value, str) and _NUMBER.fullmatch(value))
    ):
        raise ValueError(value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def finite_number(value: Any, name: str, where: str) -> float:
    """Returns a number of JSON or of a text, see ``parse_number``.

    Args:
      value: the number.
      name: of its field, for the message.
      where: the file and line, for the message.

    Raises:
      InputError: it is none.
    """
    try:
        return parse_number(value)
    except ValueError:
        raise InputError(f"{where}: {name} is {shown(value)}, must be a finite number") from None


def number_or_nan(value: Any) -> float:
    """Returns a number of JSON or TOML; NaN, which fails every check of a range, for texts and other values."""
    try:
        return math.nan if isinstance(value, str) else parse_number(value)
    except ValueError:
        return math.nan


def parse_count(value: Any) -> int:
    """Returns a whole number of tokens, which may be written as ``44.0``.

    Raises:
      ValueError: it is no number as ``parse_number`` takes, not whole, negative or above ``MAX_TOKENS``.
    """
    number = parse_number(value)
    if not (number.is_integer() and 0 <= number <= MAX_TOKENS):
        raise ValueError(value)
    return int(number)


def shown(value: Any) -> str:
    """Returns a value for a message, cut after 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # of a whole number with more digits than Python writes
        text = "a value that is too long to be written"
    return text if len(text) <= 80 else f"{text[:80]}..."
