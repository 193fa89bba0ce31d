"""Pretrained text encoders in folders of Hugging Face's format, read and written without torch and without network.

A folder holds config.json, model.safetensors and either tokenizer.json or vocab.txt, in the layout of BERT or of
DistilBERT. The optional sentence_bert_config.json gives the number of tokens at which texts are cut off.

A tokenizer.json may hold regular expressions. The library gives up one that takes millions of steps from one position
of a text, which is an error here, too. It has no limit on all positions together, so a file that is made for it can
make long texts slow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from jax import Array

from qos_jax.errors import InputError
from qos_jax.io.files import parse_json, write_whole
from qos_jax.predictor.checkpoint_layout import BERT, DISTILBERT, CheckpointLayout, layout_of
from qos_jax.predictor.encoder import EncoderConfig, TextEncoder, mean_pool

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # slow to import, so functions import it where they need it

_MIN_LENGTH = 16  # tokens, to which shorter texts are padded
_CHARACTERS_PER_TOKEN = 100  # longer words become one [UNK] in BERT's tokenizers
_MAX_GROWTH = 32  # of a text by the replacements of a normalizer
_PROBE = f"A short text, \u00e9\u4e2d\U0001f600 0-9\t\0 {'a' * 40}b"  # known and unknown characters, and a long word

_CONFIG, _WEIGHTS, _TOKENIZER, _VOCABULARY = "config.json", "model.safetensors", "tokenizer.json", "vocab.txt"
_TOKENIZER_CONFIG, _SENTENCE_CONFIG = "tokenizer_config.json", "sentence_bert_config.json"


class Tokens(NamedTuple):
    """Tokens of B texts, the input of the encoder."""

    ids: Array  # [B, T] int32
    mask: Array  # [B, T] bool, False for padding


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """An encoder with its weights and tokenizer.

    A text longer than ``max_tokens``, including the special tokens at its begin and end, is cut off at that length.
    Only the first ``100 * max_tokens`` characters of a text are tokenized, which bounds the time for very long texts.
    The bound matters only for texts with words or blanks of hundreds of characters.

    Raises:
      InputError: ``max_tokens`` is not between 3 and ``config.max_positions``, or the special tokens fill it.
    """

    config: EncoderConfig
    weights: Any  # pytree {"params": ...} for TextEncoder(config).apply(weights, ids, mask)
    tokenizer: Tokenizer
    max_tokens: int
    source: str  # the folder that was read, for messages

    def __post_init__(self) -> None:
        """Validates the length."""
        if not 3 <= self.max_tokens <= self.config.max_positions:
            raise InputError(
                f"{self.source}: max_tokens is {self.max_tokens}, "
                f"must be from 3 to max_positions, {self.config.max_positions}"
            )
        if (special := self.tokenizer.num_special_tokens_to_add(False)) >= self.max_tokens:
            raise InputError(f"{self.source}: {special} special tokens around a text, must be fewer than max_tokens, "
                             f"{self.max_tokens}")  # fmt: skip

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Returns the tokens of the texts, padded to 16, 32, 64, ... or ``max_tokens``, so that few shapes compile.

        Raises:
          InputError: a text is empty or not a string, or the tokenizer fails on it.
        """
        return self._pad(self._encode(texts))

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Returns the embeddings of M texts, vectors of unit length [M, D] float32, independent of each other.

        Raises:
          InputError: a text is empty or not a string, or ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, must be at least 1")
        encoded = self._encode(texts)
        by_length = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
        embeddings = np.zeros((len(encoded), self.config.hidden_size), np.float32)
        for start in range(0, len(encoded), batch_size):
            rows = by_length[start : start + batch_size]
            batch_rows = _next_power_of_2(len(rows), at_most=batch_size)
            repeated = rows + rows[-1:] * (batch_rows - len(rows))
            tokens = self._pad([encoded[row] for row in repeated])
            embeddings[rows] = _embed(self.config, self.weights, tokens)[: len(rows)]
        return embeddings

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, without padding."""
        if isinstance(texts, str):
            raise InputError(f"texts is the text {texts[:40]!r}, must be a list of texts")
        limit = _CHARACTERS_PER_TOKEN * self.max_tokens
        cut = [_cut(number, text, limit) for number, text in enumerate(texts)]
        with _refusing(f"{self.source}: its tokenizer fails on a text"):
            encodings = self.tokenizer.encode_batch(cut, add_special_tokens=False)
            max_words = self.max_tokens - self.tokenizer.num_special_tokens_to_add(False)
            for number, encoding in enumerate(encodings):
                if not encoding.ids:
                    raise InputError(f"text {number} is {cut[number][:40]!r}, must have a word in it")
                encoding.truncate(max_words)
            return [self.tokenizer.post_process(encoding).ids for encoding in encodings]

    def _pad(self, encoded: Sequence[Sequence[int]]) -> Tokens:
        """Returns token ids as arrays of one length."""
        longest = max(map(len, encoded), default=1)
        length = _next_power_of_2(max(longest, _MIN_LENGTH), at_most=self.max_tokens)
        ids = np.zeros((len(encoded), length), np.int32)
        mask = np.zeros((len(encoded), length), bool)
        for row, text in enumerate(encoded):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = True
        return Tokens(jnp.asarray(ids), jnp.asarray(mask))


def load_pretrained(folder: str | os.PathLike[str]) -> Pretrained:
    """Reads a folder in Hugging Face's format, such as that of sentence-transformers/all-MiniLM-L6-v2.

    Weights of half precision are converted to float32; a pooler and heads are ignored.

    Raises:
      InputError: a file is missing or damaged; the model is of another kind or has parts that are not supported; a
        tensor is missing, has a wrong shape or is not finite; or a token of the tokenizer is not in the vocabulary.
    """
    folder = pathlib.Path(folder)
    settings = _read_json(folder / _CONFIG)
    layout = layout_of(folder / _CONFIG, settings)
    config = layout.config(folder / _CONFIG, settings)
    return Pretrained(
        config=config,
        weights=_read_weights(folder / _WEIGHTS, layout, config),
        tokenizer=_read_tokenizer(folder, config),
        max_tokens=_read_max_tokens(folder / _SENTENCE_CONFIG, config),
        source=str(folder),
    )


def save_pretrained(pretrained: Pretrained, folder: str | os.PathLike[str]) -> None:
    """Writes a folder that ``load_pretrained`` and Hugging Face's libraries can read; each file appears whole.

    Raises:
      InputError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    config = pretrained.config
    layout = BERT if config.num_token_types else DISTILBERT
    tensors = {}
    for path, weight in traverse_util.flatten_dict(pretrained.weights["params"]).items():
        tensor = np.asarray(weight, np.float32)
        # Safetensors writes the memory of an array as it is, so a transposed view must be copied.
        tensors[layout.tensor_name(path)] = np.ascontiguousarray(tensor.T if path[-1] == "kernel" else tensor)
    write_whole(folder / _WEIGHTS, safetensors.numpy.save(tensors, {"format": "pt"}))
    write_whole(folder / _TOKENIZER, pretrained.tokenizer.to_str(pretty=True))
    write_whole(folder / _SENTENCE_CONFIG, _json({"max_seq_length": pretrained.max_tokens}))
    write_whole(folder / _CONFIG, _json(layout.settings(config)))  # last: a folder without it cannot be read


def _read_weights(path: pathlib.Path, layout: CheckpointLayout, config: EncoderConfig) -> Any:
    one_token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    one_mask = jax.ShapeDtypeStruct((1, 1), jnp.bool)
    shapes = jax.eval_shape(TextEncoder(config).init, jax.random.key(0), one_token, one_mask)["params"]
    weights = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = _names_in_file(file.keys(), f"{layout.model_type}.")
            for weight, expected in traverse_util.flatten_dict(shapes).items():
                name = layout.tensor_name(weight)
                if name not in names:
                    raise InputError(f"{path}: the tensor {name} is missing, but {_CONFIG} requires it")
                tensor = read_tensor(file, names[name], f"{path}: {name}")
                is_kernel = weight[-1] == "kernel"
                _check_tensor(f"{path}: {name}", tensor, expected.shape[::-1] if is_kernel else expected.shape)
                weights[weight] = jnp.array(tensor.T if is_kernel else tensor, jnp.float32)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: is not a readable file of safetensors: {error}") from error
    return {"params": traverse_util.unflatten_dict(weights)}


def read_tensor(file: Any, name: str, where: str) -> np.ndarray:
    """Returns a tensor of an open file of safetensors.

    Raises:
      InputError: NumPy has no such type, for instance 8-bit floating point; the message begins with ``where``.
    """
    try:
        return np.asarray(file.get_tensor(name))
    except AttributeError as error:
        raise InputError(f"{where} is {file.get_slice(name).get_dtype()}, which NumPy cannot read") from error


def _names_in_file(names: Sequence[str], prefix: str) -> dict[str, str]:
    """Returns the names in a file by current name; old files have other names of LayerNorm, and some a prefix."""
    by_current_name = {}
    for name in names:
        current = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        by_current_name[current.removeprefix(prefix)] = name
    return by_current_name


def _check_tensor(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"{name} is {tensor.dtype}{list(tensor.shape)}, must be floating point {list(shape)}")
    if not np.isfinite(tensor).all():
        raise InputError(f"{name} has weights that are not finite, must be finite")


def _read_tokenizer(folder: pathlib.Path, config: EncoderConfig) -> Tokenizer:
    path = folder / _TOKENIZER if (folder / _TOKENIZER).exists() else folder / _VOCABULARY
    tokenizer = _from_tokenizer_json(path) if path.name == _TOKENIZER else _from_vocabulary(path)
    with _refusing(f"{path}: is no tokenizer"):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        around_a_text = tokenizer.post_process(tokenizer.encode("", add_special_tokens=False)).ids
        tokenizer.post_process(tokenizer.encode(_PROBE, add_special_tokens=False))
    highest = max([*tokenizer.get_vocab().values(), *around_a_text], default=0)
    if highest >= config.vocab_size:
        raise InputError(f"{path}: has a token of id {highest}, must be below vocab_size, {config.vocab_size}")
    return tokenizer


def _from_tokenizer_json(path: pathlib.Path) -> Tokenizer:
    from tokenizers import Tokenizer

    text = _read_text(path)
    with _refusing(f"{path}: is no tokenizer"):
        tokenizer = Tokenizer.from_str(text)
        growth = _growth(json.loads(tokenizer.to_str())["normalizer"])
    if growth > _MAX_GROWTH:
        raise InputError(f"{path}: normalizer makes a text up to {growth} times as long, must be {_MAX_GROWTH} at most")
    return tokenizer


def _growth(normalizer: Any) -> int:
    """Returns how many times as long as a text what its replacements make of it may be."""
    if not isinstance(normalizer, dict):
        return 1
    parts, content = normalizer.get("normalizers"), normalizer.get("content")
    within = math.prod(map(_growth, parts)) if isinstance(parts, list) else 1
    return within * max(len(content) if isinstance(content, str) else 1, 1)


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turns errors of the tokenizer's library into input errors that begin with ``what``."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # the library raises plain exceptions, and panics, which are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {error}") from error


def _from_vocabulary(path: pathlib.Path) -> Tokenizer:
    """Returns BERT's tokenizer with the tokens in vocab.txt and the options in tokenizer_config.json, if it exists."""
    from tokenizers import Tokenizer
    from tokenizers.implementations import BertWordPieceTokenizer

    vocabulary = {token: number for number, token in enumerate(_read_text(path).removesuffix("\n").split("\n"))}
    for token in ("[UNK]", "[CLS]", "[SEP]"):
        if token not in vocabulary:
            raise InputError(f"{path}: has no line {token}, must hold one token per line, including this one")
    settings_path = path.with_name(_TOKENIZER_CONFIG)
    settings = _read_json(settings_path) if settings_path.exists() else {}
    try:
        tokenizer = BertWordPieceTokenizer(
            vocabulary,
            lowercase=settings.get("do_lower_case", True),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
    except TypeError as error:
        raise InputError(f"{settings_path}: has illegal options of a tokenizer: {error}") from error
    return Tokenizer.from_str(tokenizer.to_str())


def _read_max_tokens(path: pathlib.Path, config: EncoderConfig) -> int:
    if not path.exists():
        return config.max_positions
    max_tokens = _read_json(path).get("max_seq_length")
    if type(max_tokens) is not int:
        raise InputError(f"{path}: max_seq_length is {max_tokens!r}, must be a whole number")
    return max_tokens


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    content = parse_json(_read_text(path), str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: is {str(content)[:40]!r}, must be a JSON object")
    return content


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not a readable text file: {error}") from error


def _missing(path: pathlib.Path) -> InputError:
    return InputError(
        f"{path} is missing: download {path.name} of an encoder of the BERT or DistilBERT family, such as "
        f"sentence-transformers/all-MiniLM-L6-v2 on Hugging Face, into {path.parent}"
    )


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _cut(number: int, text: Any, limit: int) -> str:
    """Returns the first ``limit`` characters of a text, checked to be Unicode, which the tokenizer requires."""
    if not isinstance(text, str):
        raise InputError(f"text {number} is {text!r}, must be a string")
    start = text[:limit]
    try:
        start.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"text {number} is no Unicode text: {error}") from error
    return start


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: EncoderConfig, weights: Any, tokens: Tokens) -> Array:
    states = cast(Array, TextEncoder(config).apply(weights, *tokens))
    return mean_pool(states, tokens.mask)


def _next_power_of_2(number: int, at_most: int) -> int:
    return min(at_most, 1 << (number - 1).bit_length())
