"""Training of predictors: of heads on a frozen encoder's embeddings, and of encoder and heads together.

Tables of prompts are small (hundreds to thousands), so the risk is to learn them by heart. ``fit_frozen`` trains an
ensemble. Each member leaves out a fifth of the prompts, and together they have learned from all. What the members that
have not learned a prompt say of it together is as good as what is said of a new one; training stops where that is best.
Members stopped each for itself would stop earlier, and their mean would be too cautious: on 322 prompts of AlpacaEval,
scores and log lengths differed 1.35 and 1.22 times as much from their means as predicted, against 1.03 and 1.17 so.

A score and a length have a network each: what they share is in the embedding already, and one network for both was a
little worse.

``fine_tune`` keeps a fifth of the prompts for validation, fits heads on the rest, and then moves the last layers of the
encoder and the heads together, by small steps; the state with the lowest validation loss is kept, which is the frozen
one where fine-tuning does not help.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array, lax

from qos_jax.errors import InputError
from qos_jax.predictor.data import PredictionTable, fold_numbers
from qos_jax.predictor.encoder import EncoderConfig, TextEncoder, mean_pooled
from qos_jax.predictor.heads import Head, HeadConfig, Network, Standard, fit_amounts, fit_scale
from qos_jax.predictor.predictor import Predictor, scaled
from qos_jax.predictor.pretrained import Pretrained, Tokens

_REPEATS, _FOLDS = 4, 5  # each fold of each partition is left out by one member
NUM_MEMBERS = _REPEATS * _FOLDS

_STEP_SIZE = 0.064  # by the inputs of the last layer, so that a step moves outputs equally far at any width
_BATCH_ROWS = 1024
_STEPS_PER_CHECK = 5
_PATIENCE = 10  # checks without improvement
_MAX_CHECKS = 400
_CHECKED_ROWS = 4096  # at most, evenly spaced as tables are often sorted
_SHORTEST = 16  # tokens; texts are grouped by powers of 2 from there
_OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def fit_frozen(
    table: PredictionTable, config: HeadConfig, *, seed: int = 0, encoder: Pretrained | None = None
) -> Predictor:
    """Fits heads on embeddings.

    Args:
      table: prompts to learn from, with embeddings; at least 10.
      config: shape of the heads.
      seed: of weights, batches and which prompts a member leaves out.
      encoder: that made the embeddings, for the predictor to keep; without it, it predicts from embeddings only.

    Raises:
      InputError: there are too few prompts, or no embeddings.
    """
    if table.embeddings is None:
        raise InputError(f"{table.source}: has no embeddings to learn from; give an encoder that makes them of texts")
    if len(table) < 2 * _FOLDS:
        raise InputError(f"{table.source}: {len(table)} prompts to learn from; at least {2 * _FOLDS} are needed")
    center = jnp.asarray(table.embeddings.mean(0), jnp.float32)
    spread = jnp.asarray(max(float(table.embeddings.std(0).mean()), 1e-6), jnp.float32)
    features = scaled(jnp.asarray(table.embeddings, jnp.float32), center, spread)
    left_out = _left_out(len(table), seed)
    score_key, length_key = jax.random.split(jax.random.key(seed))
    score = _fit_head(score_key, config, features, left_out, table.score)
    length = None
    if (tokens := table.output_tokens) is not None:
        length = _fit_head(length_key, config, features, left_out, np.log(tokens), tokens)
    return Predictor(table.experts, center, spread, score, length, encoder)


def _left_out(num_prompts: int, seed: int) -> Array:
    """Returns [R, M] bool: the prompts that each member does not learn, a fold of several partitions."""
    number = np.stack([fold_numbers(num_prompts, _FOLDS, _REPEATS * seed + repeat) for repeat in range(_REPEATS)])
    return jnp.asarray((number[:, None] == np.arange(_FOLDS)[:, None]).reshape(NUM_MEMBERS, num_prompts))


def _fit_head(
    key: Array, config: HeadConfig, features: Array, left_out: Array, values: np.ndarray,
    amounts: np.ndarray | None = None,
) -> Head:  # fmt: skip
    """Returns the head of one quantity; member r does not learn the prompts where ``left_out[r]`` [R, M]."""
    scale = fit_scale(config, values, amounts)
    key, init_key = jax.random.split(key)
    keys = jax.random.split(init_key, NUM_MEMBERS)
    networks = jax.vmap(Network(config, values.shape[1]).init, (0, None))(keys, features[0])
    start = Head(config, scale, networks)
    head = _train(start, key, features, jnp.asarray(values, jnp.float32), left_out)
    if isinstance(scale, Standard) and amounts is not None:
        predicted = head.decode(_outputs_unlearned(head, features, left_out)).value
        head = head.replace(scale=fit_amounts(scale, np.asarray(predicted), amounts))
    return head


@jax.jit
def _outputs_unlearned(head: Head, features: Array, left_out: Array) -> Array:
    """Returns the mean outputs [M, N, K] of those members that have not learned the prompt."""
    outputs = head.outputs(features)
    return jnp.sum(jnp.where(left_out[..., None, None], outputs, 0.0), 0) / jnp.sum(left_out, 0)[:, None, None]


class _State(NamedTuple):
    """Training of R members."""

    key: Array
    weights: Any
    optimiser: Any
    best: Any  # weights
    best_loss: Array  # []
    since_best: Array  # [] checks
    checks: Array  # []


@jax.jit
def _train(start: Head, key: Array, features: Array, values: Array, left_out: Array) -> Head:
    """Trains all members until what they say together of prompts that they have not learned is no longer better."""
    last_width = (*features.shape[1:], *start.config.hidden)[-1]
    optimiser = optax.adam(_STEP_SIZE / last_width)
    rows = min(_BATCH_ROWS, len(features))
    check = jnp.linspace(0, len(features) - 1, min(_CHECKED_ROWS, len(features))).round().astype(int)

    def learning_loss(weights: Any, batch: Array) -> Array:
        losses = start.replace(weights=weights).losses(features[batch], values[batch]).mean(-1)
        learned = ~left_out[:, batch]
        return jnp.sum(jnp.sum(losses * learned, -1) / jnp.maximum(jnp.sum(learned, -1), 1))

    def unlearned_loss(weights: Any) -> Array:
        outputs = _outputs_unlearned(start.replace(weights=weights), features[check], left_out[:, check])
        return start.scale.losses(outputs, values[check]).mean()

    def step(state: _State, key: Array) -> tuple[_State, None]:
        batch = jnp.arange(rows) if rows == len(features) else jax.random.choice(key, len(features), (rows,))
        gradient = jax.grad(learning_loss)(state.weights, batch)
        updates, moments = optimiser.update(gradient, state.optimiser)
        return state._replace(weights=optax.apply_updates(state.weights, updates), optimiser=moments), None

    def train_and_check(state: _State) -> _State:
        key, steps_key = jax.random.split(state.key)
        state, _ = lax.scan(step, state, jax.random.split(steps_key, _STEPS_PER_CHECK))
        loss = unlearned_loss(state.weights)
        better = loss < state.best_loss
        return state._replace(
            key=key,
            best=jax.tree.map(lambda new, old: jnp.where(better, new, old), state.weights, state.best),
            best_loss=jnp.minimum(loss, state.best_loss),
            since_best=jnp.where(better, 0, state.since_best + 1),
            checks=state.checks + 1,
        )

    def unfinished(state: _State) -> Array:
        return (state.checks < _MAX_CHECKS) & (state.since_best < _PATIENCE)

    none = jnp.zeros((), jnp.int32)
    weights = start.weights
    state = _State(key, weights, optimiser.init(weights), weights, unlearned_loss(weights), none, none)
    return start.replace(weights=lax.while_loop(unfinished, train_and_check, state).best)


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """How encoder and heads are trained together."""

    layers: int = 2  # last ones of the encoder that are moved; the embeddings of tokens never are
    epochs: int = 3  # 258 prompts of AlpacaEval were learned by heart from the third on
    learning_rate: float = 5e-5  # of the encoder; it grows to this over the first epoch, then falls to 0
    heads_learning_rate: float = 2e-4
    batch_size: int = 16
    validation_fraction: float = 0.2

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
          InputError: a field is out of range.
        """
        for name in ("layers", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("learning_rate", "heads_learning_rate", "validation_fraction"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise InputError(f"{name} is {getattr(self, name)}, must lie between 0 and 1")


class Epoch(NamedTuple):
    """How fine-tuning stands."""

    number: int  # 0 before the first
    train_loss: float  # mean over its batches, as they were met; NaN before the first
    validation_loss: float


def fine_tune(
    table: PredictionTable,
    encoder: Pretrained,
    config: HeadConfig,
    tuning: FineTuning,
    *,
    seed: int = 0,
    progress: Callable[[Epoch], None] = lambda epoch: None,
) -> Predictor:
    """Fits heads, then encoder and heads together.

    Args:
      table: prompts to learn from, with texts.
      encoder: to begin with.
      config: shape of the heads.
      tuning: see there.
      seed: of the heads, of batches, and of which prompts are for validation.
      progress: called before the first epoch and after each.

    Raises:
      InputError: there are too few prompts or no texts, or the encoder has fewer layers than are to be moved.
    """
    if table.texts is None:
        raise InputError(f"{table.source}: has no texts, which fine-tuning needs")
    if tuning.layers > encoder.config.num_layers:
        raise InputError(f"layers is {tuning.layers}, must be at most {encoder.config.num_layers}, all of the encoder")
    train, validation = table.split_rows(tuning.validation_fraction, seed)
    learned = dataclasses.replace(table.rows(train), embeddings=encoder.embed([table.texts[row] for row in train]))
    start = fit_frozen(learned, config, seed=seed, encoder=encoder)
    parts, trained = _parts(start, encoder, tuning.layers)
    data = _Data(encoder.tokenize(table.texts), _values(table))
    rng = np.random.default_rng(seed)

    def validation_loss() -> float:
        batches = list(data.batches(np.random.default_rng(seed), validation, tuning.batch_size))
        losses = [float(_loss(parts, trained, *batch)) for batch in batches]
        return float(np.average(losses, weights=[batch.weight.sum() for batch in batches]))

    best, best_loss = trained, validation_loss()
    progress(Epoch(0, float("nan"), best_loss))
    moments = _OPTIMISER.init(trained)
    for epoch in range(1, tuning.epochs + 1):
        losses = []
        batches = list(data.batches(rng, train, tuning.batch_size))
        for number, batch in enumerate(batches):
            share = _learning_rate_share(epoch - 1 + (number + 1) / len(batches), tuning.epochs)
            rates = {"encoder": share * tuning.learning_rate, "heads": share * tuning.heads_learning_rate}
            trained, moments, loss = _step(parts, rates, trained, moments, *batch)
            losses.append(loss)
        epoch_loss = validation_loss()
        progress(Epoch(epoch, float(np.mean(losses)), epoch_loss))
        if epoch_loss < best_loss:
            best, best_loss = trained, epoch_loss
    return _assembled(start, encoder, parts, best)


def _learning_rate_share(epochs_done: float, epochs: int) -> float:
    """Returns what share of the learning rate is used: it grows for an epoch, then falls as a cosine."""
    if epochs_done <= 1.0:
        return epochs_done
    return 0.5 + 0.5 * math.cos(math.pi * (epochs_done - 1.0) / (epochs - 1.0))


class _Batch(NamedTuple):
    """Prompts of about equal length."""

    tokens: Tokens  # [B, T]
    values: dict[str, np.ndarray]  # [B, N] by quantity
    weight: np.ndarray  # [B] 0 where a prompt only fills the batch


class _Data(NamedTuple):
    """What fine-tuning reads of a table."""

    tokens: Tokens  # [M, T]
    values: dict[str, np.ndarray]  # [M, N] by quantity

    def batches(self, rng: np.random.Generator, rows: np.ndarray, size: int) -> Iterator[_Batch]:
        """Yields these rows in batches, in random order; lengths are alike in each, so that little is padded."""
        lengths = np.asarray(self.tokens.mask).sum(1)[rows]
        padded = np.maximum(_SHORTEST, 2 ** np.ceil(np.log2(lengths)).astype(int))
        batches = []
        for length in np.unique(padded):
            mine = rng.permutation(rows[padded == length])
            batches += [(length, mine[start : start + size]) for start in range(0, len(mine), size)]
        for index in rng.permutation(len(batches)):
            length, some = batches[index]
            filled = np.resize(some, size)
            yield _Batch(
                Tokens(*(x[filled, :length] for x in self.tokens)),
                {name: values[filled] for name, values in self.values.items()},
                (np.arange(size) < len(some)).astype(np.float32),
            )


def _values(table: PredictionTable) -> dict[str, np.ndarray]:
    values = {"score": table.score.astype(np.float32)}
    if table.output_tokens is not None:
        values["length"] = np.log(table.output_tokens).astype(np.float32)
    return values


class _Parts(struct.PyTreeNode):
    """Everything but what is trained."""

    config: EncoderConfig = struct.field(pytree_node=False)
    layers: dict[str, Any]  # of the encoder that stay as they are
    heads: dict[str, Head]  # by quantity; their weights are not used
    center: Array  # [D]
    spread: Array  # []


def _parts(start: Predictor, encoder: Pretrained, layers: int) -> tuple[_Parts, dict[str, Any]]:
    """Returns what stays, and what is trained: the encoder's last layers and the heads."""
    params = encoder.weights["params"]
    moved = {f"layer_{encoder.config.num_layers - 1 - i}" for i in range(layers)}
    heads = {name: head for name, head in (("score", start.score), ("length", start.length)) if head is not None}
    fixed = {name: layer for name, layer in params.items() if name not in moved}
    trained = {
        "encoder": {name: params[name] for name in moved},
        "heads": {name: head.weights for name, head in heads.items()},
    }
    return _Parts(encoder.config, fixed, heads, start.center, start.spread), trained


def _assembled(start: Predictor, encoder: Pretrained, parts: _Parts, trained: dict[str, Any]) -> Predictor:
    heads = {name: head.replace(weights=trained["heads"][name]) for name, head in parts.heads.items()}
    weights = {"params": parts.layers | trained["encoder"]}
    tuned = dataclasses.replace(encoder, weights=weights)
    return dataclasses.replace(start, score=heads["score"], length=heads.get("length"), encoder=tuned)


@jax.jit
def _loss(parts: _Parts, trained: Any, tokens: Tokens, values: dict[str, Array], weight: Array) -> Array:
    """Returns the mean loss [] of all members, experts and quantities over prompts with weight [B]."""
    states = cast(Array, TextEncoder(parts.config).apply({"params": parts.layers | trained["encoder"]}, *tokens))
    features = scaled(mean_pooled(states, tokens.mask), parts.center, parts.spread)
    of_prompt = [
        head.replace(weights=trained["heads"][name]).losses(features, values[name]).mean((0, 2))
        for name, head in parts.heads.items()
    ]
    return jnp.sum(weight * sum(of_prompt)) / jnp.sum(weight)


@jax.jit
def _step(
    parts: _Parts, rates: dict[str, Array], trained: dict[str, Any], moments: Any, *batch: Any
) -> tuple[dict[str, Any], Any, Array]:
    """Returns what is trained, the optimiser's state and the loss [] before the step."""
    loss, gradient = jax.value_and_grad(_loss, argnums=1)(parts, trained, *batch)
    directions, moments = _OPTIMISER.update(gradient, moments)
    moved = {
        part: jax.tree.map(lambda x, direction, rate=rates[part]: x - rate * direction, trained[part], directions[part])
        for part in trained
    }
    return moved, moments, loss
