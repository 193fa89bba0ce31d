"""What the gateway expects of a request before it is answered: prompt tokens, and scores and lengths of answers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from qos_jax.predictor.predictor import Predictor

_BYTES_PER_TOKEN = 4.0  # of English text in today's tokenizers, until engines have told more
_PRIOR_TOKENS, _PRIOR_WEIGHT = 200.0, 10.0  # of an answer, as if so many had been seen
_FORGET = 0.995  # weight of all earlier answers against the next one


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one request."""

    prompt_tokens: int
    score: np.ndarray  # [N] in [0, 1]
    tokens: np.ndarray  # [N] tokens, at least 1


class Expectations:
    """Predictions by a trained predictor, or by the means of what was seen so far."""

    def __init__(
        self,
        quality: Sequence[float],
        mean_tokens: Sequence[float | None] | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        """Begins with no answer seen.

        Args:
          quality: [N] mean score of each engine's answers, which counts without a predictor.
          mean_tokens: [N] of each engine's answers, which count until it has given some; None where unknown.
          predictor: predicts for the N engines in their order.
        """
        self._quality = np.asarray(quality, float)
        self._predictor = predictor
        self._bytes_per_token = np.full(len(quality), _BYTES_PER_TOKEN)
        self._tokens = np.array([each or _PRIOR_TOKENS for each in mean_tokens or [None] * len(quality)], float)
        self._weight = np.full(len(quality), _PRIOR_WEIGHT)

    async def predict(self, text: str, max_tokens: int | None) -> Prediction:
        """Predicts for a prompt; with an encoder, in a thread, as that takes milliseconds."""
        score, tokens = self._quality, self._tokens
        if self._predictor is not None and text.strip():
            scores, lengths = await asyncio.to_thread(self._predictor.predict, [text])
            score, tokens = scores[0], tokens if lengths is None else lengths[0]
        tokens = np.clip(tokens, 1.0, max_tokens)
        return Prediction(max(1, round(len(text.encode()) / self._bytes_per_token.mean())), score, tokens)

    def learn(self, expert: int, text_bytes: int, prompt_tokens: int | None, answer_tokens: int) -> None:
        """Takes what an engine has told of an answer that was finished.

        Args:
          expert: index of the engine.
          text_bytes: of the prompt.
          prompt_tokens: of it, as the engine counts them.
          answer_tokens: of the answer.
        """
        if prompt_tokens and text_bytes:
            ratio = min(max(text_bytes / prompt_tokens, 0.5), 20.0)
            self._bytes_per_token[expert] += 0.02 * (ratio - self._bytes_per_token[expert])
        weight = _FORGET * self._weight[expert]
        self._tokens[expert] = (weight * self._tokens[expert] + answer_tokens) / (weight + 1.0)
        self._weight[expert] = weight + 1.0
