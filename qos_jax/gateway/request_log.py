"""Reads requests.jsonl, the gateway's log, as columns of numbers."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from typing import Any

import numpy as np

from qos_jax.errors import InputError
from qos_jax.fleet.log_fitting import ServedRequests
from qos_jax.gateway.records import REQUESTS
from qos_jax.io.text_files import MAX_TOKENS, json_lines, number_or_nan, read_text, shown

NO_ENGINE = -1  # index in place of an engine
DROP = "drop"  # what the log calls a shadow's decision to drop


@dataclasses.dataclass(frozen=True)
class RequestRecords:
    """The J requests of a log, in order of arrival; times are in s."""

    path: str
    names: tuple[str, ...]  # N engines
    routers: tuple[str, ...]  # J names of the routers that decided
    arrival_s: np.ndarray  # [J] s since the first arrival
    first_engine: np.ndarray  # [J] index of the first engine that was tried, -1 for none
    engine: np.ndarray  # [J] index of the last engine that was tried, -1 for none
    served: np.ndarray  # [J] bool: answered to the end, by whichever engine
    answered: np.ndarray  # [J] bool: by the first engine that was tried, to the end
    prompt_tokens: np.ndarray  # [J] tokens
    output_tokens: np.ndarray  # [J] tokens
    first_token_s: np.ndarray  # [J] s since arrival; NaN where the answer was not streamed or has none
    end_s: np.ndarray  # [J] s since arrival
    qos: np.ndarray  # [J]
    in_time: np.ndarray  # [J] bool
    predicted_score: np.ndarray  # [J, N]; NaN where there was none
    predicted_tokens: np.ndarray  # [J, N] tokens
    shadow: np.ndarray  # [J] index of the engine that the router in the shadow chose, -1 for a drop
    shadowed: np.ndarray  # [J] bool: there are a decision of a shadow and an estimate
    estimated_qos: np.ndarray  # [J, N] of the request on each engine; NaN where there is none
    estimated_net: np.ndarray  # [J, N] change of all requests' QoS; likewise

    def of_engine(self, index: int) -> ServedRequests:
        """Returns the requests that an engine gave at least one token of."""
        own = (self.engine == index) & (self.output_tokens >= 1) & np.isfinite(self.end_s)
        return ServedRequests(
            arrival_s=self.arrival_s[own],
            prompt_tokens=self.prompt_tokens[own],
            output_tokens=self.output_tokens[own],
            first_token_s=self.first_token_s[own],
            end_s=self.end_s[own],
            answered=self.answered[own],
        )


def read_requests(folder: str | os.PathLike[str]) -> RequestRecords:
    """Reads the log in a folder, of one run or of several with the same engines.

    Raises:
      InputError: the file cannot be read, holds no request, or a line is no record of these engines.
    """
    path = pathlib.Path(folder) / REQUESTS
    rows = [_Row(where, value) for where, value in json_lines(read_text(path), path)]
    if not rows:
        raise InputError(f"{path}: holds no request")
    rows.sort(key=lambda row: row.number("time"))
    names = rows[0].names()
    for row in rows:
        if row.names() != names:
            raise InputError(f"{row.where}: names is {shown(row.value['names'])}, must be {list(names)} as above")
    columns: dict[str, list[Any]] = {
        name: [row.number(name, optional=name == "first_token_s") for row in rows]
        for name in ("time", "first_token_s", "end_s", "qos")
    }
    tokens = {name: [row.tokens(name) for row in rows] for name in ("prompt_tokens", "output_tokens")}
    columns |= {name: [row.numbers(name) for row in rows] for name in ("predicted_score", "predicted_tokens")}
    columns |= {f"estimated_{name}": [row.estimate(name) for row in rows] for name in ("qos", "net")}
    tried = [row.tried() for row in rows]
    served = np.array([row.text("status") == "ok" for row in rows])
    times = np.array(columns.pop("time"))
    return RequestRecords(
        path=str(path),
        names=names,
        arrival_s=times - times[0],
        routers=tuple(row.text("router") for row in rows),
        first_engine=np.array([each[0] if each else NO_ENGINE for each in tried]),
        engine=np.array([row.engine("engine") for row in rows]),
        served=served,
        answered=served & np.array([len(each) == 1 for each in tried]),
        in_time=np.array([row.switch("in_time") for row in rows]),
        shadow=np.array([row.engine("shadow", DROP) for row in rows]),
        shadowed=np.array([None not in (row.value.get("shadow"), row.value.get("estimate")) for row in rows]),
        **{name: np.array(values, np.int64) for name, values in tokens.items()},
        **{name: np.array(values, np.float64) for name, values in columns.items()},
    )


@dataclasses.dataclass(frozen=True)
class _Row:
    """A line of the log; every error names it and the field."""

    where: str
    value: Any

    def __post_init__(self) -> None:
        if not isinstance(self.value, dict):
            raise InputError(f"{self.where}: is {shown(self.value)}, must be a record of the gateway, an object")

    def names(self) -> tuple[str, ...]:
        """Returns the names of the engines."""
        found = self.value.get("names")
        if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
            raise self._error("names", "a list of the engines' names")
        return tuple(found)

    def engine(self, name: str, *others: str) -> int:
        """Returns the index of an engine; ``NO_ENGINE`` for null and for the other texts that may stand there."""
        found = self.value.get(name)
        if found is not None and found not in (*self.names(), *others):
            raise self._error(name, f"null or one of {', '.join((*self.names(), *others))}")
        return self.names().index(found) if found in self.names() else NO_ENGINE

    def tried(self) -> list[int]:
        """Returns the indices of the engines that were tried, in order."""
        found = self.value.get("tried")
        if not isinstance(found, list) or not all(each in self.names() for each in found):
            raise self._error("tried", f"a list, each one of {', '.join(self.names())}")
        return [self.names().index(each) for each in found]

    def text(self, name: str) -> str:
        """Returns a text."""
        found = self.value.get(name)
        if not isinstance(found, str):
            raise self._error(name, "a text")
        return found

    def switch(self, name: str) -> bool:
        """Returns true or false."""
        found = self.value.get(name)
        if not isinstance(found, bool):
            raise self._error(name, "true or false")
        return found

    def number(self, name: str, *, optional: bool = False) -> float:
        """Returns a number of at least 0; NaN for one that is left out and may be."""
        found = self.value.get(name)
        if found is None and optional:
            return math.nan
        number = number_or_nan(found)
        if not number >= 0:
            raise self._error(name, "a number of at least 0")
        return number

    def tokens(self, name: str) -> int:
        """Returns a count of tokens."""
        found = self.number(name)
        if found != int(found) or found > MAX_TOKENS:
            raise self._error(name, f"a whole number up to {MAX_TOKENS}")
        return int(found)

    def numbers(self, name: str) -> list[float]:
        """Returns one number for each engine; NaN for null."""
        return self._numbers(name, self.value)

    def estimate(self, name: str) -> list[float]:
        """Returns one number of the estimate for each engine; NaN for null, and where there is no estimate."""
        found = self.value.get("estimate")
        if found is None:
            return [math.nan] * len(self.names())
        if not isinstance(found, dict):
            raise self._error("estimate", "null or an object")
        return self._numbers(name, found, "estimate.")

    def _numbers(self, name: str, within: dict[str, Any], prefix: str = "") -> list[float]:
        found = within.get(name)
        values = found if isinstance(found, list) else []
        numbers = [number_or_nan(each) for each in values]
        legal = all(each is None or number == number for each, number in zip(values, numbers, strict=True))
        if not legal or len(values) != len(self.names()):
            rule = f"a list of {len(self.names())} numbers or null, one for each engine"
            raise self._error(name, rule, within, prefix)
        return numbers

    def _error(self, name: str, rule: str, within: dict[str, Any] | None = None, prefix: str = "") -> InputError:
        fields = self.value if within is None else within
        found = shown(fields[name]) if name in fields else "missing"
        return InputError(f"{self.where}: {prefix}{name} is {found}, must be {rule}")
