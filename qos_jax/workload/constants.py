"""The figures to which the built-in request generator is fitted, with their sources.

* [Blender]: the published means of mix-instruct (LLM-Blender, arXiv 2306.02561, table 2).
* [AlpacaEval]: 644 prompts answered by 15 LLMs of 2.7 to 13 billion parameters (tatsu-lab/alpaca_eval, commit cd543a1),
  scored by a BERTScore over MiniLM token embeddings. Its spreads and correlations are used for mix-instruct, whose own
  are not published.
"""

from __future__ import annotations

import dataclasses
import math

# Scores --------------------------------------------------------------------------------------------------------------
SCORE_SD = 0.13  # [AlpacaEval] of one LLM over the prompts: 0.124 to 0.141 among the chat LLMs
SCORE_CORRELATION = 0.57  # [AlpacaEval] between two LLMs over the prompts, mean of all pairs (0.39 to 0.71)
SCORE_VARIANCE_SHARES = (0.56, 0.05, 0.39)  # [AlpacaEval] of prompt, LLM and residual
ORACLE_SCORE = 0.7767  # [Blender] mean score of the best answer to each prompt

# The generator samples log(1 - score): a lognormal shortfall has the measured skewness (-1.1) and keeps scores below 1.
LATENT_SCORE_CORRELATION = 0.585  # gives 0.57 between the scores
# [AlpacaEval] SD of the logarithm of the spread of the LLMs on a prompt. On some prompts all LLMs do equally well, on
# others they differ widely: the quartiles of the spread, 0.042 and 0.085, are further apart than sampling explains.
# With equal spreads the best of many LLMs is too good: 0.800 with AlpacaEval's means and 0.801 with mix-instruct's,
# against 0.778 and 0.777 measured.
LOG_SPREAD_SD = 0.55

# Output lengths -----------------------------------------------------------------------------------------------------
MAX_OUTPUT_TOKENS = 512  # [Blender] generation limit of the candidates
LOG_LENGTH_CORRELATION = 0.63  # [AlpacaEval] between the log lengths of two LLMs; with the prompt's length it is 0
# [AlpacaEval] mean tokens, mean of the log length, SD of the log length.
MEASURED_LENGTHS = {
    "alpaca-7b": (102.0, 4.26, 1.00),
    "falcon-7b-instruct": (118.0, 4.27, 0.97),
    "oasst-sft-pythia-12b": (167.0, 4.54, 1.23),
    "vicuna-13b": (264.0, 5.27, 0.92),
    "chatglm2-6b": (282.0, 5.18, 1.04),
    "baize-v2-7b": (293.0, 5.32, 1.00),
}

# Prompt lengths [AlpacaEval]. The log tokens are a quadratic in a standard normal z that reproduces p50 24, p90 80 and
# p99 283 tokens with a mean of 40; a lognormal through p50 and p90 has its p99 at 213.
LOG_PROMPT_TOKENS = (math.log(24.0), 0.79, 0.116)  # coefficients of 1, z and z^2
MAX_PROMPT_TOKENS = 512  # [Blender] longer inputs were filtered out of mix-instruct

# Predictors. R2: 5-fold R^2 of ridge regression on MiniLM embeddings of the prompt [AlpacaEval]. WITHIN_R2: squared
# correlation of predicted and true deviations of an expert from the mean of all experts on the prompt. The one for
# lengths is AlpacaEval's. The one for scores is from 5,608 prompts and 6 LLMs (ulab-uiuc/LLMRouter 4e7a796), as the 515
# training prompts of AlpacaEval are too few for it (0.003).
REALISTIC_SCORE_R2 = 0.10
REALISTIC_LOG_LENGTH_R2 = 0.24
REALISTIC_SCORE_WITHIN_R2 = 0.10
REALISTIC_LOG_LENGTH_WITHIN_R2 = 0.02


@dataclasses.dataclass(frozen=True)
class AnswerLaw:
    """Distribution of one LLM's answers: the mean score, and the lognormal of the output tokens before the cap."""

    score_mean: float
    log_length_mean: float  # of the natural logarithm of the output tokens
    log_length_sd: float


def answer_law(score_mean: float, output_tokens_mean: float | None = None) -> AnswerLaw:
    """Returns the law of an LLM of which only means are known; lengths scatter as those of AlpacaEval do.

    Args:
        score_mean: mean score, below 1.
        output_tokens_mean: mean tokens of an answer before the cap; by default the mean of the LLMs in AlpacaEval.
    """
    measured = list(MEASURED_LENGTHS.values())
    log_sd = sum(law[2] for law in measured) / len(measured)
    mean = sum(law[0] for law in measured) / len(measured) if output_tokens_mean is None else output_tokens_mean
    return AnswerLaw(score_mean, math.log(mean) - log_sd**2 / 2, log_sd)


def _law(bertscore: float, *, lengths_of: str) -> AnswerLaw:
    return AnswerLaw(bertscore / 100.0, *MEASURED_LENGTHS[lengths_of][1:])


# mix-instruct by its own model names. Scores: [Blender], BERTScore / 100. mpt-7b is missing from that table; its 62.96
# follows from the published mean over all twelve LLMs, 66.36.
# Lengths: [AlpacaEval], as those of mix-instruct's candidates are not published. An LLM that was not measured has the
# lengths of its nearest relative: mpt-7b-instruct and dolly (fine-tuned on dolly-15k's short answers) those of falcon,
# koala (distilled from the same chats) those of vicuna, the base model mpt-7b those of the longest, moss and stablelm
# (open assistants of the same year) those of oasst, and flan-t5 those of the shortest.
MIX_INSTRUCT = {
    "oasst-sft-4-pythia-12b-epoch-3.5": _law(74.68, lengths_of="oasst-sft-pythia-12b"),
    "vicuna-13b-1.1": _law(69.60, lengths_of="vicuna-13b"),
    "alpaca-native": _law(71.46, lengths_of="alpaca-7b"),
    "llama-7b-hf-baize-lora-bf16": _law(65.57, lengths_of="baize-v2-7b"),
    "moss-moon-003-sft": _law(64.85, lengths_of="oasst-sft-pythia-12b"),
    "chatglm-6b": _law(70.38, lengths_of="chatglm2-6b"),
    "koala-7B-HF": _law(63.96, lengths_of="vicuna-13b"),
    "dolly-v2-12b": _law(62.26, lengths_of="falcon-7b-instruct"),
    "mpt-7b-instruct": _law(63.21, lengths_of="falcon-7b-instruct"),
    "mpt-7b": _law(62.96, lengths_of="baize-v2-7b"),
    "stablelm-tuned-alpha-7b": _law(62.47, lengths_of="oasst-sft-pythia-12b"),
    "flan-t5-xxl": _law(64.92, lengths_of="alpaca-7b"),
}

# The 300 ShareGPT requests of the measured vLLM run (casys-kaist/LLMServingSim 5daddb2), Llama-3.1-8B on an RTX 4090:
# mean and SD of the log prompt tokens and log output tokens, and the maximum of each. The answers were not scored.
SHAREGPT_RUN_LOG_PROMPT = (6.598, 0.550)
SHAREGPT_RUN_LOG_OUTPUT = (6.470, 0.150)
SHAREGPT_RUN_MAX_TOKENS = (4000, 1024)
