"""The engines behind the gateway, as the fleet file names them."""

from __future__ import annotations

import dataclasses
import re
from urllib.parse import urlsplit

from qos_jax.errors import InputError
from qos_jax.fleet.fleet_file import Fleet

_NAME = re.compile(r"[A-Za-z0-9][\w.:/@ +-]{0,127}", re.ASCII)  # it becomes part of headers, logs and metrics
_UNKNOWN_QUALITY = 0.5


@dataclasses.dataclass(frozen=True)
class Backend:
    """One engine."""

    name: str  # of the expert, for people, logs and metrics
    url: str  # without /v1
    kind: str  # one of ``qos_jax.gateway.scrape.KINDS``
    model: str  # as the engine calls it
    api_key_env: str | None = None  # environment variable that holds the engine's key
    quality: float = _UNKNOWN_QUALITY  # mean score of its answers, which counts without a predictor
    mean_tokens: float | None = None  # of its answers, until it has given some


def backends_of(fleet: Fleet) -> tuple[Backend, ...]:
    """Returns the engines of a fleet file, in its order; replicas of one name get numbers behind it.

    Raises:
      InputError: an expert has no usable URL or name, or shares its card: which LLM is loaded is not known here.
    """
    names = [expert.name for expert in fleet.experts]
    backends = []
    for number, expert in enumerate(fleet.experts):
        where = f"{fleet.path}: expert {expert.name!r}"
        if expert.card is not None:
            raise InputError(f"{where}: card is {expert.card!r}, must be left out: a gateway knows no shared cards")
        copy = names[: number + 1].count(expert.name)
        name = expert.name if copy == 1 else f"{expert.name}-{copy}"
        if not _NAME.fullmatch(name):
            raise InputError(f"{where}: the name must be up to 128 letters, digits, spaces and ._:/@+- of ASCII")
        backends.append(
            Backend(
                name=name,
                url=checked_url(where, expert.url),
                kind=expert.engine.kind,
                model=expert.model or expert.llm_name,
                api_key_env=expert.api_key_env,
                quality=fleet.quality.mean_score.get(expert.answers, _UNKNOWN_QUALITY),
                mean_tokens=fleet.quality.mean_output_tokens.get(expert.answers),
            )
        )
    return tuple(backends)


def checked_url(where: str, url: str | None) -> str:
    """Returns the address of an engine without a slash or /v1 at its end.

    Raises:
      InputError: it is no http or https URL with a host, or it holds a key, query or fragment.
    """
    parts = urlsplit(url or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{where}: url is {url!r}, must be http://HOST:PORT or https://HOST:PORT")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(f"{where}: url must hold no user, key, query or fragment; a key goes into api_key_env")
    return str(url).rstrip("/").removesuffix("/v1")
