"""The report of shadow mode: what the router in the shadow would have done, and what that would have been worth.

What would have happened is not known, as the requests went elsewhere. The report therefore compares both choices by the
same estimate, that of the impact on the QoS of all requests, and says beside it how well that estimate did for the
choices that were made.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from qos_jax.errors import InputError
from qos_jax.gateway.request_log import DROP, NO_ENGINE, read_requests


@dataclasses.dataclass(frozen=True)
class ShadowReport:
    """Of the requests that both routers decided on."""

    routers: tuple[str, ...]  # that routed
    requests: int
    same: float  # share of requests on which both chose the same
    served_qos: float  # mean measured QoS
    estimated_qos: float  # mean QoS that the estimate expected of the requests where they were sent
    served_net: float  # mean estimated change of all requests' QoS, by the choices that were made
    shadow_net: float  # ... by those of the shadow
    served_shares: dict[str, float]  # of each engine, and of drops
    shadow_shares: dict[str, float]

    def as_text(self) -> str:
        """Returns the report as lines for a terminal."""
        lines = [
            f"{self.requests} requests, routed by {', '.join(self.routers)}; the shadow chose the same for "
            f"{100 * self.same:.0f} %",
            f"QoS measured {self.served_qos:.3f}, expected {self.estimated_qos:.3f}",
            f"change of all requests' QoS by one, expected: {self.served_net:.3f} as routed, "
            f"{self.shadow_net:.3f} by the shadow",
            f"{'':24}{'routed':>10}{'shadow':>10}",
        ]
        for name in self.served_shares | self.shadow_shares:
            shares = (each.get(name, 0.0) for each in (self.served_shares, self.shadow_shares))
            lines.append(f"{name[:23]:24}" + "".join(f"{100 * share:9.0f}%" for share in shares))
        return "\n".join(lines)


def shadow_report(folder: str | os.PathLike[str]) -> ShadowReport:
    """Reads requests.jsonl of a folder, and compares what was done with what the shadow would have done.

    Raises:
      InputError: the log cannot be read, see ``read_requests``, or holds no request with a shadow's decision.
    """
    log = read_requests(folder)
    decided = np.flatnonzero(log.shadowed)
    if not decided.size:
        raise InputError(f"{log.path}: holds no decision of a shadow; run qos-jax gateway with --shadow=ROUTER first")
    # The shadow decided on the first choice, not on retries.
    chosen, shadow = log.first_engine[decided], log.shadow[decided]
    served = decided[log.served[decided]]
    return ShadowReport(
        routers=tuple(dict.fromkeys(log.routers[request] for request in decided)),
        requests=decided.size,
        same=float(np.mean(chosen == shadow)),
        served_qos=float(log.qos[served].sum()) / max(served.size, 1),
        estimated_qos=float(_values(log.estimated_qos[served], log.engine[served]).sum()) / max(served.size, 1),
        served_net=float(_values(log.estimated_net[decided], chosen).mean()),
        shadow_net=float(_values(log.estimated_net[decided], shadow).mean()),
        served_shares=_shares(chosen, log.names),
        shadow_shares=_shares(shadow, log.names),
    )


def _values(estimates: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Returns what the estimates [J, N] say of choices [J]; a drop and what is not known add nothing."""
    values = estimates[np.arange(len(choices)), choices]
    return np.where((choices == NO_ENGINE) | np.isnan(values), 0.0, values)


def _shares(choices: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    return {name: float(np.mean(choices == index)) for index, name in [*enumerate(names), (NO_ENGINE, DROP)]}
