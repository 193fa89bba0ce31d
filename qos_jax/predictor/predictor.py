"""A predictor of the score and length of each expert's answer to a prompt, and its folder on disk.

The folder of a predictor holds

* ``config.json``: names of the experts, shape of the heads, data on their training, and the name of the next folder;
* ``weights-HASH/``, by its content: ``heads.safetensors``, the heads, and the center and spread by which they
  standardise embeddings; and ``encoder/``, the text encoder in the layout of Hugging Face, missing if the predictor was
  trained on embeddings. Predictors of format 1 have both beside ``config.json``.

``config.json`` is written last, so that whatever ends the program, and whenever, the folder holds the old predictor or
the new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import serialization, traverse_util
from jax import Array

from qos_jax.errors import InputError
from qos_jax.io.files import parse_json, path_of, remove, remove_temporaries, writable_folder, write_whole
from qos_jax.io.text_files import shown
from qos_jax.predictor.heads import MAX_SIZE, Buckets, Forecast, Head, HeadConfig, HeadNetwork, Standard
from qos_jax.predictor.pretrained import Pretrained, load_pretrained, read_tensor, save_pretrained

RUN_SUBFOLDER = "predictor"  # of the folder that qos-jax predictor writes
_FORMAT = 2
_CONFIG, _HEADS, _ENCODER = "config.json", "heads.safetensors", "encoder"
_WEIGHTS, _NEW = "weights-", ".new-"  # how names of folders begin
_FIELDS: dict[str, type] = {  # required fields of config.json
    "experts": list, "embedding_size": int, "members": int, "head": dict, "with_length": bool, "with_encoder": bool,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
    """Heads on an encoder, or on given embeddings; ``fitting`` trains one, ``load_predictor`` reads one."""

    experts: tuple[str, ...]  # N names of LLMs
    center: Array  # [D], subtracted from an embedding
    spread: Array  # [], divisor of the difference
    score: Head
    length: Head | None  # of log output tokens; None if the predictor was trained on scores only
    encoder: Pretrained | None

    def predict(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """Predicts the score and length of each expert's answer to B prompts.

        A prompt longer than the encoder's ``max_tokens`` is cut off at that length.

        Args:
          texts: B prompts.

        Returns:
          Expected scores [B, N] in [0, 1], and expected output tokens [B, N] of at least 1, or None without lengths.

        Raises:
          InputError: a prompt is empty or not a string, or the predictor has no encoder.
        """
        if self.encoder is None:
            raise InputError("the predictor was trained on embeddings and has no encoder: call predict_embeddings")
        return self.predict_embeddings(self.encoder.embed(texts))

    def predict_embeddings(self, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Predicts as ``predict``, from embeddings [B, D] of the prompts by the encoder of the training data.

        Raises:
          InputError: the embeddings have a wrong shape, or are not finite.
        """
        score, length = self.forecast(embeddings)
        tokens = None if length is None else np.maximum(np.asarray(length.amount), 1.0)
        return np.clip(np.asarray(score.amount), 0.0, 1.0), tokens

    def forecast(self, embeddings: np.ndarray) -> tuple[Forecast, Forecast | None]:
        """Returns the full predictions of scores and of log output lengths; see ``predict_embeddings``."""
        size = self.center.shape[0]
        if np.ndim(embeddings) != 2 or np.shape(embeddings)[1] != size:
            raise InputError(f"embeddings have the shape {np.shape(embeddings)}, must have [prompts, {size}]")
        if not np.isfinite(embeddings).all():
            raise InputError("embeddings have entries that are not finite, must be finite")
        features = standardise(jnp.asarray(embeddings, jnp.float32), self.center, self.spread)
        return _forecast(self.score, features), None if self.length is None else _forecast(self.length, features)

    def save(self, folder: str | os.PathLike[str], **about: Any) -> None:
        """Writes the folder of the predictor; an existing predictor is replaced.

        Args:
          folder: path of the folder; see the module for its content.
          **about: plain values on the training, added to config.json.

        Raises:
          InputError: the folder cannot be written, or holds something other than a predictor.
        """
        folder = pathlib.Path(folder).absolute()
        if folder.exists() and not (folder / _CONFIG).exists() and not _is_begun(folder):
            raise InputError(f"{folder} is no predictor and would be overwritten: choose another folder")
        new = writable_folder(folder) / f"{_NEW}{os.getpid()}"
        try:
            self._write_weights(new)
            weights = folder / f"{_WEIGHTS}{_hash(new)}"
            config = json.dumps(self._config(weights.name, about), indent=1, allow_nan=False)
            if weights.exists() and _hash(weights) != _hash(new):
                remove(weights)
            if not weights.exists():
                os.replace(new, weights)
            write_whole(folder / _CONFIG, config)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
        finally:
            remove(new)
        _remove_others(folder, weights.name)

    def _write_weights(self, folder: pathlib.Path) -> None:
        tensors = {name: np.array(tensor, order="C") for name, tensor in _by_name(self._variables()).items()}
        write_whole(folder / _HEADS, safetensors.numpy.save(tensors))
        if self.encoder is not None:
            save_pretrained(self.encoder, folder / _ENCODER)

    def _config(self, weights: str, about: dict[str, Any]) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "weights": weights,
            "experts": list(self.experts),
            "embedding_size": self.center.shape[0],
            "members": len(jax.tree.leaves(self.score.weights)[0]),
            "head": dataclasses.asdict(self.score.config),
            "with_length": self.length is not None,
            "with_encoder": self.encoder is not None,
            **about,
        }

    def _variables(self) -> dict[str, Any]:
        heads = {"score": self.score} | ({} if self.length is None else {"length": self.length})
        return {"center": self.center, "spread": self.spread, **heads}


def _is_begun(folder: pathlib.Path) -> bool:
    """Tells whether nothing but parts of a predictor that was not written to its end is in a folder."""
    return folder.is_dir() and all(path.name.startswith((_WEIGHTS, _NEW, f".{_CONFIG}.")) for path in folder.iterdir())


def _hash(folder: pathlib.Path) -> str:
    """Returns 16 digits that depend on all files below a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(hashlib.sha256(path.read_bytes()).digest() + str(path.relative_to(folder)).encode())
    return found.hexdigest()[:16]


def _remove_others(folder: pathlib.Path, used: str) -> None:
    """Removes earlier predictors, and what killed programs left."""
    remove_temporaries(folder, _CONFIG)
    for path in folder.iterdir():
        if path.name in (_HEADS, _ENCODER) or (path.name.startswith((_WEIGHTS, _NEW)) and path.name != used):
            remove(path)


def standardise(embeddings: Array, center: Array, spread: Array) -> Array:
    """Returns the features [..., D] of embeddings [..., D] that heads take."""
    return (embeddings - center) / spread


def load_predictor(folder: str | os.PathLike[str]) -> Predictor:
    """Reads a predictor; its predictions are identical, bit for bit, to those of the saved one.

    Args:
      folder: of the predictor, or of a run of ``qos-jax predictor``.

    Raises:
      InputError: the folder holds no predictor that this version can read.
    """
    folder = path_of(folder)
    if not (folder / _CONFIG).exists() and (folder / RUN_SUBFOLDER / _CONFIG).exists():
        folder /= RUN_SUBFOLDER
    config = _read_config(folder / _CONFIG)
    like = _variables_like(folder / _CONFIG, config)
    weights = folder / config["weights"]
    variables = serialization.from_state_dict(like, _read_tensors(weights / _HEADS, like))
    encoder = load_pretrained(weights / _ENCODER) if config["with_encoder"] else None
    if encoder is not None and encoder.config.hidden_size != config["embedding_size"]:
        raise InputError(
            f"{folder / _CONFIG}: embedding_size is {config['embedding_size']}, "
            f"must be {encoder.config.hidden_size}, the hidden_size of {_ENCODER}"
        )
    return Predictor(tuple(config["experts"]), encoder=encoder, **({"length": None} | variables))


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_text(encoding="utf-8", errors="replace"), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give the folder of a predictor") from error
    version = config.get("format") if isinstance(config, dict) else None
    if version not in (1, _FORMAT):
        raise InputError(f"{path}: format is {version!r}, must be 1 or {_FORMAT}")
    if version == 1:
        config["weights"] = "."
    elif not re.fullmatch(f"{_WEIGHTS}[0-9a-f]+", str(config.get("weights"))):
        raise InputError(f"{path}: weights is {config.get('weights')!r}, must be {_WEIGHTS}HASH, a folder beside it")
    for field, kind in _FIELDS.items():
        value = config.get(field)
        if type(value) is not kind or (type(value) is int and not 1 <= value <= MAX_SIZE):
            legal = f" from 1 to {MAX_SIZE}" if kind is int else ""
            raise InputError(f"{path}: {field} is {shown(value)}, must be of type {kind.__name__}{legal}")
    experts = config["experts"]
    if not experts or not all(isinstance(name, str) for name in experts) or len(set(experts)) < len(experts):
        raise InputError(f"{path}: experts is {experts!r}, must be different names")
    return config


def _variables_like(path: pathlib.Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the tree of all variables, with shapes and types in place of arrays."""
    try:
        head_config = HeadConfig(**config["head"] | {"hidden": tuple(config["head"].get("hidden", ()))})
    except (TypeError, InputError) as error:
        raise InputError(f"{path}: head is {str(config['head'])[:100]}: {error}") from error
    num_experts, size = len(config["experts"]), config["embedding_size"]

    def variables() -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(0), config["members"])
        weights = jax.vmap(lambda key: HeadNetwork(head_config, num_experts).init(key, jnp.zeros(size)))(keys)
        per_expert = jnp.zeros(num_experts)
        per_bucket = jnp.zeros((num_experts, head_config.num_buckets))
        if head_config.form == "buckets":
            scale: Buckets | Standard = Buckets(per_bucket[:, 1:], per_bucket, per_bucket, per_bucket)
        else:
            scale = Standard(per_expert, per_expert, jnp.zeros((), bool), per_expert, jnp.zeros(()))
        heads = {"score": Head(head_config, scale, weights)}
        if config["with_length"]:
            heads["length"] = Head(head_config, scale, weights)
        return {"center": jnp.zeros(size), "spread": jnp.zeros(()), **heads}

    return jax.eval_shape(variables)


def _read_tensors(path: pathlib.Path, like: dict[str, Any]) -> dict[str, Any]:
    """Returns the tensors of a file as a tree of dictionaries, validated against the shapes and types of ``like``."""
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            present = set(file.keys())
            for name, expected in _by_name(like).items():
                if name not in present:
                    raise InputError(f"{path}: the tensor {name} is missing, but {_CONFIG} requires it")
                tensor = read_tensor(file, name, f"{path}: {name}")
                if tensor.shape != expected.shape or tensor.dtype != expected.dtype or np.isnan(tensor).any():
                    raise InputError(
                        f"{path}: {name} is {tensor.dtype}{list(tensor.shape)}, "
                        f"must be {expected.dtype}{list(expected.shape)} without NaN"
                    )
                tensors[name] = jnp.asarray(tensor)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: is not a readable file of safetensors: {error}") from error
    if not 0.0 < tensors["spread"] < np.inf:
        raise InputError(f"{path}: spread is {tensors['spread']}, must be above 0 and finite")
    return traverse_util.unflatten_dict(tensors, sep="/")


def _by_name(variables: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a tree of variables by the names of their tensors."""
    return traverse_util.flatten_dict(serialization.to_state_dict(variables), sep="/")


@jax.jit
def _forecast(head: Head, features: Array) -> Forecast:
    return head.forecast(features)
