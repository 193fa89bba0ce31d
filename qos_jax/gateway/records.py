"""What the gateway writes down: one line of JSON for each request, and a log with one line of JSON for each event."""

from __future__ import annotations

import json
import logging
import pathlib
import sys
import time
from typing import IO, Any

from qos_jax.errors import InputError

REQUESTS = "requests.jsonl"


class RequestFile:
    """The file of all requests; lines are whole, and appended to what is there."""

    def __init__(self, folder: pathlib.Path | None) -> None:
        """Opens the file in a folder that is there; None writes nothing.

        Raises:
          InputError: the file cannot be written.
        """
        self._file: IO[str] | None = None
        if folder is not None:
            try:
                self._file = (folder / REQUESTS).open("a", encoding="utf-8")
            except OSError as error:
                raise InputError(f"{folder / REQUESTS} cannot be written: {error.strerror}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line; a full disk costs the line, not the request."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except (OSError, ValueError) as error:
            logging.getLogger(__name__).error("a record was not written", extra={"fields": {"error": str(error)}})

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class JsonLines(logging.Formatter):
    """Formats an entry of the log as one line of JSON; line ends within it are escaped, so none can be forged."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        value = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        return json.dumps(value, default=str)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Has the gateway's log written to stderr. Those of libraries are at warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("qos_jax").setLevel(level)


def wall_time() -> float:
    """Returns the time of day in s since 1970, for records; durations are of the monotonic clock."""
    return round(time.time(), 6)
