"""What a client is promised: limits on the times of its answer, of which all that are given hold together."""

from __future__ import annotations

import dataclasses
import math

from qos_jax.fleet.fleet_file import Limits


@dataclasses.dataclass(frozen=True)
class Level:
    """Limits of one request; infinite where there is none. ``qos_jax.sim.service_level`` has the same for arrays."""

    latency_per_token_s: float = math.inf  # s/token, the whole time of the answer over its tokens
    ttft_s: float = math.inf  # s from arrival to first token
    tpot_s: float = math.inf  # s/token after the first
    e2e_s: float = math.inf  # s from arrival to last token

    def per_token_s(self, tokens: float) -> float:
        """Returns the latency per token [s/token] that all limits together allow an answer of so many tokens."""
        allowed_s = self.e2e_s
        if self.tpot_s < math.inf:
            first_s = self.tpot_s if self.ttft_s == math.inf else self.ttft_s
            allowed_s = min(allowed_s, first_s + self.tpot_s * (tokens - 1.0))
        return min(self.latency_per_token_s, allowed_s / tokens)

    def met(self, first_token_s: float, end_s: float, tokens: int) -> bool:
        """Tells whether an answer with these times since its arrival met all limits."""
        each_s = (end_s - first_token_s) / max(tokens - 1, 1)
        return (
            end_s / max(tokens, 1) <= self.latency_per_token_s
            and first_token_s <= self.ttft_s
            and each_s <= self.tpot_s
            and end_s <= self.e2e_s
        )


def levels_of(limits: Limits) -> list[Level]:
    """Returns the level of each class of users in a fleet file."""
    count = max(len(limits.latency_s_per_token), len(limits.ttft_s), len(limits.tpot_s), len(limits.e2e_s))
    none = (math.inf,) * count
    columns = (limits.latency_s_per_token, limits.ttft_s, limits.tpot_s, limits.e2e_s)
    return [Level(*each) for each in zip(*(column or none for column in columns), strict=True)]
