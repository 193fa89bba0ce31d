"""Predictors: the score and output length of each LLM's answer, from the text of a prompt."""

from qos_jax.predictor.data import PredictionTable, read_prediction_table
from qos_jax.predictor.fitting import FineTuning, fine_tune, fit_frozen
from qos_jax.predictor.heads import HeadConfig
from qos_jax.predictor.predictor import Predictor, load_predictor
from qos_jax.predictor.pretrained import Pretrained, load_pretrained, save_pretrained

__all__ = [
    "FineTuning",
    "HeadConfig",
    "PredictionTable",
    "Predictor",
    "Pretrained",
    "fine_tune",
    "fit_frozen",
    "load_predictor",
    "load_pretrained",
    "read_prediction_table",
    "save_pretrained",
]
