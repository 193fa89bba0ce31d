"""A predictor: what each expert's answer to a prompt will score and how long it will be, and its folder on disk.

The folder of a predictor holds

* ``config.json``: the experts' names, the shape of the heads, and how they were trained;
* ``heads.safetensors``: the heads and how embeddings are scaled for them;
* ``encoder/``: the text encoder as Hugging Face lays it out; not there if the predictor was trained on embeddings only.

It is written under a hidden name and then renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
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
from qos_jax.io.files import parse_json, writable_folder, write_whole
from qos_jax.predictor.heads import Buckets, Forecast, Head, HeadConfig, Network, Standard
from qos_jax.predictor.pretrained import Pretrained, load_pretrained, save_pretrained

RUN_SUBFOLDER = "predictor"  # of what qos-jax predictor writes
_FORMAT = 1
_CONFIG, _HEADS, _ENCODER = "config.json", "heads.safetensors", "encoder"
_FIELDS: dict[str, type] = {  # what every config.json has
    "experts": list, "embedding_size": int, "members": int, "head": dict, "with_length": bool, "with_encoder": bool,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
    """Heads on an encoder, or on embeddings that others make; ``fitting`` makes one, ``load_predictor`` reads one."""

    experts: tuple[str, ...]  # N names
    center: Array  # [D], taken from every embedding
    spread: Array  # [], which the rest is divided by
    score: Head
    length: Head | None  # of log output tokens; None if it was trained on scores only
    encoder: Pretrained | None

    def predict(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns what to expect of each expert's answer to B prompts.

        A prompt longer than the encoder's ``max_tokens`` is cut off there.

        Returns:
          Expected scores [B, N] in [0, 1] and expected output tokens [B, N] of at least 1, or None in their place.

        Raises:
          InputError: a prompt is empty or no text, or the predictor has no encoder.
        """
        if self.encoder is None:
            raise InputError("the predictor was trained on embeddings and has no encoder: call predict_embeddings")
        return self.predict_embeddings(self.encoder.embed(texts))

    def predict_embeddings(self, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the same as ``predict`` for prompts with the embeddings [B, D] by the encoder it was trained on.

        Raises:
          InputError: the embeddings have another shape, or are not finite.
        """
        score, length = self.forecast(embeddings)
        tokens = None if length is None else np.maximum(np.asarray(length.amount), 1.0)
        return np.clip(np.asarray(score.amount), 0.0, 1.0), tokens

    def forecast(self, embeddings: np.ndarray) -> tuple[Forecast, Forecast | None]:
        """Returns what the heads of scores and of log output lengths say in full; see ``predict_embeddings``."""
        wanted = self.center.shape[0]
        if np.ndim(embeddings) != 2 or np.shape(embeddings)[1] != wanted:
            raise InputError(f"embeddings have the shape {np.shape(embeddings)}, must have [prompts, {wanted}]")
        if not np.isfinite(embeddings).all():
            raise InputError("embeddings have entries that are not finite; all must be")
        features = scaled(jnp.asarray(embeddings, jnp.float32), self.center, self.spread)
        return _forecast(self.score, features), None if self.length is None else _forecast(self.length, features)

    def save(self, folder: str | os.PathLike[str], **about: Any) -> None:
        """Writes the folder of the predictor, in place of what is there.

        Args:
          folder: see the module; a predictor that is there already is replaced, anything else is not.
          **about: how the predictor was made, as plain values, for the reader of config.json.

        Raises:
          InputError: the folder cannot be written, or holds something else.
        """
        folder = pathlib.Path(folder).absolute()
        if folder.exists() and not (folder / _CONFIG).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} is no predictor and would be overwritten: take another folder")
        writable_folder(folder.parent)
        new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{age}") for age in ("new", "old"))
        try:
            self._write(new, about)
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
        finally:
            for each in (new, old):
                shutil.rmtree(each, ignore_errors=True)

    def _write(self, folder: pathlib.Path, about: dict[str, Any]) -> None:
        tensors = {name: np.array(tensor, order="C") for name, tensor in _named(self._variables()).items()}
        config = {
            "format": _FORMAT,
            "experts": list(self.experts),
            "embedding_size": self.center.shape[0],
            "members": len(jax.tree.leaves(self.score.weights)[0]),
            "head": dataclasses.asdict(self.score.config),
            "with_length": self.length is not None,
            "with_encoder": self.encoder is not None,
            **about,
        }
        write_whole(folder / _HEADS, safetensors.numpy.save(tensors))
        write_whole(folder / _CONFIG, json.dumps(config, indent=1, allow_nan=False))
        if self.encoder is not None:
            save_pretrained(self.encoder, folder / _ENCODER)

    def _variables(self) -> dict[str, Any]:
        heads = {"score": self.score} | ({} if self.length is None else {"length": self.length})
        return {"center": self.center, "spread": self.spread, **heads}


def scaled(embeddings: Array, center: Array, spread: Array) -> Array:
    """Returns features [..., D] for the heads."""
    return (embeddings - center) / spread


def load_predictor(folder: str | os.PathLike[str]) -> Predictor:
    """Reads a predictor; what it predicts is bit for bit what the saved one did.

    Args:
      folder: of the predictor, or of a run of ``qos-jax predictor``.

    Raises:
      InputError: the folder holds no predictor that this version can read.
    """
    folder = pathlib.Path(folder)
    if not (folder / _CONFIG).exists() and (folder / RUN_SUBFOLDER / _CONFIG).exists():
        folder /= RUN_SUBFOLDER
    config = _read_config(folder / _CONFIG)
    like = _variables_like(folder / _CONFIG, config)
    variables = serialization.from_state_dict(like, _read_tensors(folder / _HEADS, like))
    encoder = load_pretrained(folder / _ENCODER) if config["with_encoder"] else None
    if encoder is not None and encoder.config.hidden_size != config["embedding_size"]:
        raise InputError(
            f"{folder / _CONFIG}: embedding_size is {config['embedding_size']}, "
            f"must be {encoder.config.hidden_size} by {_ENCODER}"
        )
    return Predictor(tuple(config["experts"]), encoder=encoder, **({"length": None} | variables))


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_text(encoding="utf-8", errors="replace"), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give the folder of a predictor") from error
    version = config.get("format") if isinstance(config, dict) else None
    if version != _FORMAT:
        raise InputError(f"{path}: format is {version!r}, must be {_FORMAT}")
    for field, kind in _FIELDS.items():
        value = config.get(field)
        if type(value) is not kind or (type(value) is int and value < 1):
            raise InputError(f"{path}: {field} is {value!r}, must be of type {kind.__name__}, at least 1 if a number")
    experts = config["experts"]
    if not experts or not all(isinstance(name, str) for name in experts) or len(set(experts)) < len(experts):
        raise InputError(f"{path}: experts is {experts!r}, must be different names")
    return config


def _variables_like(path: pathlib.Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the shapes of all variables."""
    try:
        head_config = HeadConfig(**config["head"] | {"hidden": tuple(config["head"].get("hidden", ()))})
    except (TypeError, InputError) as error:
        raise InputError(f"{path}: head is {config['head']!r}: {error}") from error
    num_experts, size = len(config["experts"]), config["embedding_size"]

    def variables() -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(0), config["members"])
        weights = jax.vmap(lambda key: Network(head_config, num_experts).init(key, jnp.zeros(size)))(keys)
        of_expert = jnp.zeros(num_experts)
        of_bucket = jnp.zeros((num_experts, head_config.num_buckets))
        if head_config.form == "buckets":
            scale: Buckets | Standard = Buckets(of_bucket[:, 1:], of_bucket, of_bucket, of_bucket)
        else:
            scale = Standard(of_expert, of_expert, jnp.zeros((), bool), of_expert, jnp.zeros(()))
        heads = {"score": Head(head_config, scale, weights)}
        if config["with_length"]:
            heads["length"] = Head(head_config, scale, weights)
        return {"center": jnp.zeros(size), "spread": jnp.zeros(()), **heads}

    return jax.eval_shape(variables)


def _read_tensors(path: pathlib.Path, like: dict[str, Any]) -> dict[str, Any]:
    """Returns the tensors of the file as a tree of dictionaries, checked against their shapes."""
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            present = set(file.keys())
            for name, wanted in _named(like).items():
                if name not in present:
                    raise InputError(f"{path}: the tensor {name} is missing, which {_CONFIG} asks for")
                tensor = file.get_tensor(name)
                if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype or np.isnan(tensor).any():
                    raise InputError(
                        f"{path}: {name} is {tensor.dtype}{list(tensor.shape)}, "
                        f"must be {wanted.dtype}{list(wanted.shape)} without NaN"
                    )
                tensors[name] = jnp.asarray(tensor)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: not a readable file of safetensors: {error}") from error
    return traverse_util.unflatten_dict(tensors, sep="/")


def _named(variables: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(serialization.to_state_dict(variables), sep="/")


@jax.jit
def _forecast(head: Head, features: Array) -> Forecast:
    return head.forecast(features)
