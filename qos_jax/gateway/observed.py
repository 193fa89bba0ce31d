"""What a gateway's log tells of its engines and requests, and the fleet file of a world that is like them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tomlkit

from qos_jax.errors import InputError
from qos_jax.fleet.fleet_file import Fleet
from qos_jax.fleet.log_fitting import MIN_REQUESTS, LogFit, fit_log
from qos_jax.fleet.profile_file import TIMING_UNITS, save_profile
from qos_jax.fleet.profiles import profile_of
from qos_jax.gateway.fleet import backends_of
from qos_jax.gateway.request_log import RequestRecords
from qos_jax.io.files import csv_text, write_whole
from qos_jax.io.provenance import plain
from qos_jax.io.text_files import read_text

FLEET, TRACE, SUMMARY = "fleet.toml", "requests.csv", "observed.json"
_SURE = 2.0  # standard errors from which arrivals are not taken for Poisson's
_PLACES_OF_FILES = (("llm", "config"), ("device", "profile"))  # in a table of [[experts]], beside the file


@dataclasses.dataclass(frozen=True)
class Requests:
    """The requests of a log."""

    number: int
    rate_per_s: float  # requests/s
    gap_cv: float  # coefficient of variation of the gaps between arrivals; 1 for Poisson
    prompt_tokens_median: float
    prompt_tokens_p90: float
    max_prompt_tokens: int
    max_output_tokens: int
    log_length_r2: float  # share of the variance of log output lengths, within engines, that predictions explain

    @property
    def arrivals(self) -> str:
        """The law of arrivals, as ``parse_arrivals`` takes it."""
        is_poisson = abs(self.gap_cv - 1.0) < _SURE / math.sqrt(self.number)
        return "poisson" if is_poisson else f"gamma:{min(max(self.gap_cv, 0.1), 10.0):.2f}"


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a log tells."""

    requests: Requests
    fits: dict[str, LogFit]  # by the name of the first replica
    replicas: dict[str, tuple[int, ...]]  # indices of the engines with this timing, by the same names, of all engines
    mean_output_tokens: np.ndarray  # [N] tokens; NaN where there was no answer
    mean_score: np.ndarray  # [N] as predicted
    notes: tuple[str, ...]  # what could not be told

    def as_text(self) -> str:
        """Returns lines for a terminal."""
        requests = self.requests
        lines = [
            f"{requests.number} requests, {requests.rate_per_s:.3g} per s, arrivals {requests.arrivals}; prompts of "
            f"{requests.prompt_tokens_median:.0f} tokens (median) and {requests.prompt_tokens_p90:.0f} (90 %)",
            f"predictions explain {100 * requests.log_length_r2:.0f} % of the variance of log output lengths",
            "",
            f"{'engine':20}{'answers':>8}{'step':>10}{'per prompt token':>18}   mean error of TTFT, TPOT, E2E: "
            "the log; later answers by earlier ones",
        ]
        for name, fit in self.fits.items():
            told = "; ".join(_told(fit.errors[part]) for part in ("log", "held_out"))
            lines.append(
                f"{name[:19]:20}{fit.requests:8}{1e3 * fit.timing['step_base_s']:7.2f} ms"
                f"{1e6 * fit.timing['prefill_per_token_s']:15.1f} us   {told}"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def observe(records: RequestRecords, fleet: Fleet) -> Observed:
    """Fits timing and laws to a log.

    Args:
      records: of the gateway before the engines of the fleet.
      fleet: the gateway's fleet file.

    Raises:
      InputError: the engines of the log are not those of the fleet, or none has enough answers.
    """
    names = tuple(backend.name for backend in backends_of(fleet))
    if names != records.names:
        raise InputError(
            f"{records.path}: has the engines {', '.join(records.names)}, must have those of {fleet.path}: "
            f"{', '.join(names)}"
        )
    groups: dict[str, tuple[int, ...]] = {}
    for table in dict.fromkeys(fleet.tables):
        members = tuple(index for index, each in enumerate(fleet.tables) if each == table)
        groups[names[members[0]]] = members
    fits, notes = {}, []
    for name, members in groups.items():
        logs = [log for log in (records.of_engine(member) for member in members) if len(log.arrival_s)]
        answers = sum(int(log.answered.sum()) for log in logs)
        if answers < MIN_REQUESTS:
            notes.append(f"{name} gave {answers} answers and keeps its timing; a fit needs {MIN_REQUESTS}")
            continue
        fits[name] = fit_log(name, logs, profile_of([fleet.experts[members[0]]]))
    if not fits:
        raise InputError(f"{records.path}: no engine gave {MIN_REQUESTS} answers, which a fit needs")
    return Observed(_requests_of(records), fits, groups, *_means(records), tuple(notes))


def write_observed(observed: Observed, records: RequestRecords, fleet: Fleet, folder: pathlib.Path, made: Any) -> None:
    """Writes the summary, the profiles, the requests as a trace, and the fleet file that names the profiles.

    Args:
      observed: what the log tells.
      records: the log.
      fleet: the gateway's fleet file. What the log does not tell stays as it is there, comments too.
      folder: where all is written.
      made: ``command``, ``date`` and ``versions``.

    Raises:
      InputError: a file cannot be written.
    """
    summary = {"requests": dataclasses.asdict(observed.requests) | {"arrivals": observed.requests.arrivals}}
    fits = {name: dataclasses.asdict(fit) for name, fit in observed.fits.items()}
    write_whole(
        folder / SUMMARY,
        json.dumps(plain(made | summary | {"engines": fits, "notes": observed.notes}), indent=2) + "\n",
    )
    files = _profile_files(observed.fits)
    for name, fit in observed.fits.items():
        save_profile(str(folder / files[name]), _profile(name, fit, records.path, made))
    served = (records.output_tokens >= 1) & (records.prompt_tokens >= 1)
    columns = (records.arrival_s - records.arrival_s[served][0], records.prompt_tokens, records.output_tokens)
    rows = [
        {"arrival_s": f"{arrival_s:.6f}", "prompt_tokens": prompt, "output_tokens": output}
        for arrival_s, prompt, output in zip(*(column[served] for column in columns), strict=True)
    ]
    write_whole(folder / TRACE, csv_text(rows))
    write_whole(folder / FLEET, _fleet_text(observed, fleet, folder, files))


def _requests_of(records: RequestRecords) -> Requests:
    gaps_s = np.diff(records.arrival_s)
    span_s = float(gaps_s.sum())
    if not span_s > 0:
        raise InputError(f"{records.path}: all requests have one time, must have different ones")
    return Requests(
        number=len(records.arrival_s),
        rate_per_s=len(gaps_s) / span_s,
        gap_cv=float(gaps_s.std() / gaps_s.mean()),
        prompt_tokens_median=float(np.median(records.prompt_tokens)),
        prompt_tokens_p90=float(np.quantile(records.prompt_tokens, 0.9)),
        max_prompt_tokens=int(records.prompt_tokens.max()),
        max_output_tokens=int(max(records.output_tokens.max(), 1)),
        log_length_r2=_log_length_r2(records),
    )


def _log_length_r2(records: RequestRecords) -> float:
    """Returns the share of the variance of log lengths within engines that predictions explain, in [0, 1]."""
    unexplained = total = 0.0
    for engine in range(len(records.names)):
        own = records.answered & (records.engine == engine) & (records.output_tokens >= 1)
        own &= records.predicted_tokens[:, engine] >= 1
        if own.any():
            log_length = np.log(records.output_tokens[own])
            error = log_length - np.log(records.predicted_tokens[own, engine])
            unexplained += float(((error - error.mean()) ** 2).sum())
            total += float(((log_length - log_length.mean()) ** 2).sum())
    return min(max(1.0 - unexplained / total, 0.0), 1.0) if total > 0 else 0.0


def _means(records: RequestRecords) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean output tokens and the mean predicted score [N] of each engine's answers."""
    tokens, scores = np.full((2, len(records.names)), np.nan)
    for engine in range(len(records.names)):
        own = records.answered & (records.engine == engine)
        if own.any():
            tokens[engine] = records.output_tokens[own].mean()
        known = records.predicted_score[:, engine]
        if np.isfinite(known).any():
            scores[engine] = np.nanmean(known)
    return tokens, scores


def _told(errors: dict[str, dict[str, float]]) -> str:
    of_mean = [errors.get(kind, {}).get("mean_error") for kind in ("ttft_s", "tpot_s", "e2e_s")]
    return ", ".join("-" if error is None else f"{100 * error:+.1f} %" for error in of_mean)


def _profile_files(fits: dict[str, LogFit]) -> dict[str, str]:
    """Returns the name of each engine's profile file; none is another's."""
    files: dict[str, str] = {}
    for number, name in enumerate(fits):
        plain_name = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("._")[:60] or "engine"
        files[name] = f"profile-{number}-{plain_name}.json"
    return files


def _profile(name: str, fit: LogFit, log: str, made: Any) -> dict[str, Any]:
    """Returns what is in a profile file; version 1 has no tables of kernels."""
    errors = fit.errors["held_out"] or fit.errors["fitted"]
    kinds = {"decode": "tpot_s", "prefill": "ttft_s"}
    return plain(
        made
        | {
            "version": 1,
            "name": name,
            "origin": "fitted",
            "basis": f"times of {fit.requests} answers in {log}",
            "timing": fit.timing,
            "units": TIMING_UNITS,
            "errors": {
                "hinge": {
                    kind: {"mape": errors[time]["median_error"]} for kind, time in kinds.items() if time in errors
                },
                **fit.errors,
            },
        }
    )


def _fleet_text(observed: Observed, fleet: Fleet, folder: pathlib.Path, files: dict[str, str]) -> str:
    document = tomlkit.parse(read_text(fleet.path))
    rows: Sequence[Any] = document["experts"]
    for row in rows:
        for table, field in _PLACES_OF_FILES:
            if not isinstance(row.get(table, ""), str) and field in row[table]:
                row[table][field] = _from(folder, fleet.path, str(row[table][field]))
    for name, fit in observed.fits.items():
        row = rows[fleet.tables[observed.replicas[name][0]]]
        if isinstance(row["device"], str):
            device = tomlkit.inline_table()
            device["name"] = str(row["device"])
            row["device"] = device
        row["device"]["profile"] = files[name]
        row["link_delay_s"] = round(fit.link_delay_s, 6)
    _write_quality(document, observed, fleet, folder)
    _write_workload(document, observed)
    return tomlkit.dumps(document)


def _write_quality(document: Any, observed: Observed, fleet: Fleet, folder: pathlib.Path) -> None:
    """Sets the mean lengths of answers, and what the gateway expected of their scores where the file says nothing."""
    quality = document.setdefault("quality", tomlkit.table())
    if fleet.quality.tables:
        given = quality["table"]
        each = [_from(folder, fleet.path, str(path)) for path in (given if isinstance(given, list) else [given])]
        quality["table"] = each if len(each) > 1 else each[0]
        return
    means: dict[str, list[tuple[float, float]]] = {}
    for expert, score, tokens in zip(fleet.experts, observed.mean_score, observed.mean_output_tokens, strict=True):
        means.setdefault(expert.answers, []).append((score, tokens))
    of_score = quality.setdefault("mean_score", tomlkit.inline_table())
    of_tokens = quality.setdefault("mean_output_tokens", tomlkit.inline_table())
    for name, replicas in means.items():
        scores, tokens = (np.array(column)[np.isfinite(column)] for column in zip(*replicas, strict=True))
        if name not in of_score:
            of_score[name] = round(min(float(scores.mean()), 0.999), 4) if scores.size else 0.5
        if tokens.size:
            of_tokens[name] = round(max(float(tokens.mean()), 1.0), 2)


def _write_workload(document: Any, observed: Observed) -> None:
    workload, requests = document.setdefault("workload", tomlkit.table()), observed.requests
    workload["arrivals"] = requests.arrivals
    workload["max_output_tokens"] = requests.max_output_tokens
    workload["max_prompt_tokens"] = requests.max_prompt_tokens
    if requests.prompt_tokens_p90 > requests.prompt_tokens_median:
        workload["prompt_tokens_median"] = requests.prompt_tokens_median
        workload["prompt_tokens_p90"] = requests.prompt_tokens_p90
    workload["prediction"] = f"r2:0:{requests.log_length_r2:.2f}"
    workload.pop("saturation_per_s", None)  # of other timing


def _from(folder: pathlib.Path, fleet_path: str, file: str) -> str:
    """Returns the path of a file beside the old fleet file as seen from the folder of the new one."""
    return os.path.relpath(pathlib.Path(fleet_path).parent / file, folder)
