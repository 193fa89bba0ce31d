"""A predictor in the world: what it tells routers of the requests that are drawn from a table."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from qos_jax.errors import InputError
from qos_jax.predictor.predictor import Predictor
from qos_jax.workload.prediction import TablePredictions
from qos_jax.workload.tables import QualityTable


def table_predictions(predictor: Predictor, table: QualityTable, experts: Sequence[str]) -> TablePredictions:
    """Returns what a predictor says of each prompt of a table.

    Args:
      predictor: must know the experts, and how long their answers are.
      table: must have the texts of its prompts.
      experts: names of the LLMs of the fleet, in its order.

    Raises:
      InputError: the table has no texts, or the predictor does not know an expert or no lengths.
    """
    if table.prompts is None:
        raise InputError(f"{table.source}: has no texts of its prompts, which a predictor reads; give --prompts")
    if unknown := [name for name in experts if name not in predictor.experts]:
        raise InputError(f"experts {unknown} are unknown to the predictor; it knows {', '.join(predictor.experts)}")
    score, output_tokens = predictor.predict(table.prompts)
    if output_tokens is None:
        raise InputError("the predictor was trained without output lengths, which routers need")
    columns = [predictor.experts.index(name) for name in experts]
    return TablePredictions(jnp.asarray(score[:, columns]), jnp.asarray(output_tokens[:, columns]))
