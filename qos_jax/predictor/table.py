"""Predictions of a trained predictor for the prompts of a quality table, for use in a world."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from qos_jax.errors import InputError
from qos_jax.predictor.predictor import Predictor
from qos_jax.workload.prediction import TablePredictions
from qos_jax.workload.tables import QualityTable


def table_predictions(predictor: Predictor, table: QualityTable, experts: Sequence[str]) -> TablePredictions:
    """Returns the predictions for each prompt of a table.

    Args:
      predictor: trained on the LLMs of the fleet, with output lengths.
      table: with the texts of its prompts.
      experts: the LLM of each of the N experts.

    Raises:
      InputError: the table has no texts, or the predictor was trained without an LLM or without lengths.
    """
    if table.prompts is None:
        raise InputError(f"{table.source}: has no texts of its prompts, must have them for a predictor; give --prompts")
    if unknown := [name for name in experts if name not in predictor.experts]:
        raise InputError(f"experts {unknown} are unknown to the predictor; choose from {', '.join(predictor.experts)}")
    score, output_tokens = predictor.predict(table.prompts)
    if output_tokens is None:
        raise InputError("the predictor was trained without output lengths, must have them for routers")
    columns = [predictor.experts.index(name) for name in experts]
    return TablePredictions(jnp.asarray(score[:, columns]), jnp.asarray(output_tokens[:, columns]))
