"""Damaged, odd and hostile files: every reader returns something usable or raises a clear InputError.

No bytes may cause another exception. Nothing in a file is executed. No file makes a reader allocate much more memory
than the file is large.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qos_jax import InputError
from qos_jax.agent import AGENTS, configs
from qos_jax.agent.overrides import overridden
from qos_jax.fleet.catalogue import MEASURED
from qos_jax.fleet.fleet_file import load_fleet
from qos_jax.fleet.profile_fitting import TIMING_UNITS, load_profile, load_tables
from qos_jax.predictor.data import read_prediction_table
from qos_jax.predictor.heads import Head, HeadConfig, HeadNetwork, fit_scale
from qos_jax.predictor.predictor import Predictor, load_predictor
from qos_jax.predictor.pretrained import load_pretrained
from qos_jax.programs.world_flags import numbers
from qos_jax.training.config import TrainingConfig
from qos_jax.training.load import load_router
from qos_jax.training.run_config import CONFIG, make_config
from qos_jax.training.run_folder import METRICS, RunFolder
from qos_jax.workload.arrivals import parse_arrivals
from qos_jax.workload.prediction import parse_prediction
from qos_jax.workload.tables import read_mix_instruct, read_npz
from qos_jax.workload.trace_files import read_trace
from tests.helpers.instant_env import instant_env, small_learner
from tests.helpers.prediction_tables import EXPERTS, made_up_table, write_mix_instruct, write_npz, write_prompts
from tests.helpers.small_env import small_params
from tests.helpers.tiny_encoder import write_tiny_encoder

TEXTS = ("mix_instruct", "prompts", "profile", "run", "checksums", "metrics")
EXAMPLES = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
ODD = (
    b"null", b"NaN", b"-1", b"1e999", b"99999999999999999999999", b"[]", b"{}", b'""', b"true", b"0.5", b",", b"\n",
    b'"', b"\x00", b"\xff\xfe", "é".encode(), b"{", b"[" * 3000, b"0" * 5000, b"2023-13-45", b"../../etc/passwd",
)  # fmt: skip
LENGTHS = {"prompt_tokens": np.full(4, 9)}

FLEET = """
format = 1
limits = { latency_ms_per_token = 150 }
quality = { mean_score = { "llama-3.1-8b" = 0.312 }, mean_output_tokens = { "llama-3.1-8b" = 686 } }
workload = { arrivals = "poisson", prompt_tokens_median = 400, prompt_tokens_p90 = 1500, saturation_per_s = 4.73 }
[[experts]]
llm = "llama-3.1-8b:int4"
device = "Jetson AGX Orin 64GB"
count = 2
link_delay_s = 0.004
engine = { kind = "vllm", max_num_seqs = 48, memory_share = 0.16 }
"""
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 30), st.one_of(st.sampled_from(ODD), st.binary(max_size=12))), max_size=6
)


def edited(content: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """Returns a file with some stretches replaced, each given by its begin, its length and the new bytes."""
    for begin, length, new in changes:
        at = int(begin * len(content))
        content = content[:at] + new + content[at + length :]
    return content


Reader = Callable[[pathlib.Path], Any]
TRACES = {
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04,396,9\n",
    "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Chat\n",
    "mooncake": '{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1]}\n' * 2,
    "plain": "arrival_s,prompt_tokens,output_tokens\n0.5,3,4\n1.25,5,6\n",
    "quoted": '"arrived_at";"num_prefill_tokens";"num_decode_tokens"\r\n"0.5";"3";"4"\r\n',
}


def _written(folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path, Reader]]:
    """Yields the name of each kind of file, an undamaged file, and its reader."""
    for name, text in TRACES.items():
        (folder / f"{name}.trace").write_text(text)
        yield name, folder / f"{name}.trace", read_trace
    (folder / "packed.trace").write_bytes(gzip.compress(TRACES["azure"].encode()))
    yield "packed", folder / "packed.trace", read_trace
    table = made_up_table(num_prompts=4)
    prompts = write_prompts(folder / "prompts.jsonl", table.texts)
    yield "prompts", prompts, lambda path: read_prediction_table(path.with_name("predictions.npz"), "quality", path)
    yield "npz", write_npz(folder / "table.npz", table, **LENGTHS), lambda path: read_npz(path, "quality")
    path = write_npz(folder / "predictions.npz", table)
    yield "predictions", path, lambda path: read_prediction_table(path, "quality")
    yield "mix_instruct", write_mix_instruct(folder / "table.jsonl", table), read_mix_instruct
    profile = folder / "profile.json"
    profile.write_text(json.dumps({"timing": {field: 0.5 for field in TIMING_UNITS}}))
    yield "profile", profile, lambda path: load_profile(str(path))
    tables = folder / "tables.json"
    tables.write_text(next(iter(MEASURED.values())).read_text())
    yield "tables", tables, load_tables
    fleet = folder / "fleet.toml"
    fleet.write_text(FLEET)
    yield "fleet", fleet, load_fleet
    run = _write_run(folder / "run")
    yield "run", run / CONFIG, lambda path: load_router(path.parent)
    yield "checksums", run / "checkpoints" / "32" / "checksums.json", lambda path: load_router(path.parents[2])
    yield "metrics", run / METRICS, lambda path: RunFolder(path.parent, {}).records()
    encoder = write_tiny_encoder(folder / "encoder")
    for name in ("config.json", "sentence_bert_config.json", "vocab.txt", "tokenizer.json", "model.safetensors"):
        yield f"encoder {name}", encoder / name, lambda path: load_pretrained(path.parent)
    _predictor().save(folder / "predictor")
    yield "predictor config.json", folder / "predictor" / "config.json", lambda path: load_predictor(path.parent)
    (heads,) = (folder / "predictor").glob("*/heads.safetensors")
    yield "predictor heads.safetensors", heads, lambda path: load_predictor(path.parents[1])


def _write_run(folder: pathlib.Path) -> pathlib.Path:
    """Writes a run with a checkpoint of untrained weights."""
    learner = small_learner()
    run = RunFolder.start(folder, make_config(learner, TrainingConfig(agent=learner.config, steps=64)))
    obs, _ = instant_env().reset(jax.random.key(0), small_params())
    weights = learner.network.init(jax.random.key(0), learner.features(obs))
    run.save(32, {"state": jnp.zeros(2)}, weights)
    (folder / METRICS).write_text('{"kind": "train", "steps": 32, "metrics": {"qos": [0.5]}}\n' * 3)
    return folder


def _predictor() -> Predictor:
    """Returns a predictor of untrained heads on embeddings."""
    config, table = HeadConfig("buckets", (4,), 3), made_up_table(num_prompts=8)
    size = table.embeddings.shape[1]
    weights = jax.vmap(lambda key: HeadNetwork(config, len(EXPERTS)).init(key, jnp.zeros(size)))(
        jax.random.split(jax.random.key(0), 2)
    )
    score = Head(config, fit_scale(config, table.score), weights)
    length = Head(config, fit_scale(config, np.log(table.output_tokens), table.output_tokens), weights)
    return Predictor(EXPERTS, jnp.zeros(size), jnp.ones(()), score, length, encoder=None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[pathlib.Path, Reader]]:
    return {name: (path, read) for name, path, read in _written(tmp_path_factory.mktemp("files"))}


KINDS = (
    *TRACES, "packed", "prompts", "npz", "predictions", "mix_instruct", "profile", "fleet", "run", "checksums",
    "metrics", "predictor config.json", "predictor heads.safetensors",
    *(f"encoder {name}" for name in ("config.json", "sentence_bert_config.json", "vocab.txt", "tokenizer.json")),
    "encoder model.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_undamaged_file_is_read(kind: str, files: dict) -> None:
    """If it were refused, the tests of damaged files would show nothing."""
    path, read = files[kind]
    read(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(kind: str, files: dict, data: st.DataObject) -> None:
    path, read = files[kind]
    whole = path.read_bytes()
    try:
        path.write_bytes(edited(whole, data.draw(edits)))
        read(path)
    except InputError as error:
        assert str(error)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "kind",
    ["azure", "npz", "fleet", *TEXTS, "predictor heads.safetensors"],
)
@EXAMPLES
@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(kind: str, files: dict, content: bytes) -> None:
    path, read = files[kind]
    whole = path.read_bytes()
    try:
        path.write_bytes(content)
        read(path)
    except InputError as error:
        assert str(path) in str(error) or str(path.parent) in str(error)
    finally:
        path.write_bytes(whole)


JSON_LINES = ("mooncake", "mix_instruct", "prompts", "metrics")
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-10, 10**20), st.floats(), st.text(max_size=5))
VALUES = st.recursive(
    SCALARS, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each), max_leaves=6
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["mooncake", *TEXTS, "predictor config.json", "encoder config.json"],
)
@EXAMPLES
@given(data=st.data())
def test_json_with_another_value_somewhere_is_read_or_refused(kind: str, files: dict, data: st.DataObject) -> None:
    path, read = files[kind]
    whole = path.read_bytes()
    record = json.loads(whole.decode().splitlines()[0] if kind in JSON_LINES else whole)
    place = record
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(VALUES)
    try:
        path.write_text(json.dumps(record) + "\n")
        read(path)
    except InputError as error:
        assert str(error)
    finally:
        path.write_bytes(whole)


COLUMN_KINDS = (np.float32, np.float64, np.int8, np.int64, np.uint64, np.complex64, "U3", "S3", bool, "datetime64[s]")


@EXAMPLES
@given(data=st.data())
def test_columns_of_any_kind_and_shape_make_a_table_or_are_refused(files: dict, data: st.DataObject) -> None:
    path, _ = files["npz"]
    shapes = st.sampled_from([(), (0,), (3,), (4,), (4, 3), (3, 4), (4, 3, 2), (0, 3)])
    name = data.draw(st.sampled_from(["experts", "quality", "out_tokens", "prompt_tokens", "prompt_emb_minilm"]))
    column = np.ones(data.draw(shapes)).astype(data.draw(st.sampled_from(COLUMN_KINDS)))
    changes = LENGTHS | {name: column}
    other = write_npz(path.with_name("other.npz"), made_up_table(num_prompts=4), **changes)
    for read in (lambda: read_npz(other, "quality"), lambda: read_prediction_table(other, "quality")):
        try:
            read()
        except InputError as error:
            assert str(other) in str(error)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_nothing_in_a_table_is_executed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = made_up_table(num_prompts=4)
    path = write_npz(tmp_path / "table.npz", table, **LENGTHS, quality=np.array([_Harmful()] * 4, object))
    for read in (read_npz, read_prediction_table):
        with pytest.raises(InputError, match="not a readable"):
            read(path, "quality")
    path.write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(InputError, match="not a readable"):
        read_npz(path, "quality")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("read", [read_npz, read_prediction_table])
def test_a_table_cannot_claim_more_memory_than_it_fills(tmp_path: pathlib.Path, read: Any) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 8)})
    path = write_npz(tmp_path / "table.npz", made_up_table(num_prompts=4), **LENGTHS, quality=None)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("quality.npy", header.getvalue() + bytes(64))
    with pytest.raises(InputError, match="not a readable"):
        read(path, "quality")


@pytest.mark.parametrize("read", [read_npz, read_prediction_table])
@pytest.mark.parametrize("column", [np.zeros(2**27, np.int8), np.zeros(2**27, "S0")], ids=["zeros", "nothing"])
def test_a_small_table_that_unpacks_to_much_is_refused(tmp_path: pathlib.Path, read: Any, column: np.ndarray) -> None:
    path = write_npz(tmp_path / "table.npz", made_up_table(num_prompts=4), **LENGTHS)
    with np.load(path) as file:
        np.savez_compressed(path, **dict(file) | {"experts": column})
    with pytest.raises(InputError, match=r"its columns unpack to \d+ bytes, more than the 67108864"):
        read(path, "quality")


@EXAMPLES
@given(
    text=st.one_of(
        st.text(max_size=20), st.from_regex(r"(gamma|mmpp|sinusoidal|r2)(:[0-9.e+-]{0,6}){0,3}", fullmatch=True)
    )
)
def test_any_text_of_arrivals_and_predictions_is_parsed_or_refused(text: str) -> None:
    for parse in (
        lambda: parse_arrivals(text, 1.0),
        lambda: parse_prediction(text),
        lambda: numbers("load", [text]),
    ):
        try:
            parse()
        except InputError as error:
            assert str(error)


@EXAMPLES
@given(
    name=st.sampled_from(
        ["num_envs", "han.layers", "hidden", "alpha", "encoder", "residual", "targets", "capacity", "slots"]
    ),
    text=st.one_of(st.text(max_size=8), st.from_regex(r"-?[0-9]{1,9}(x[0-9]{0,4})?", fullmatch=True)),
)
def test_any_setting_of_an_agent_is_taken_or_refused(name: str, text: str) -> None:
    try:
        config = overridden(AGENTS["mvr"], {name: text})
        assert configs.from_dict(configs.to_dict(config)) == config
    except InputError as error:
        assert str(error)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E8M0", "BF16"])
@pytest.mark.parametrize("kind", ["predictor heads.safetensors", "encoder model.safetensors"])
def test_tensors_of_odd_types_are_read_or_refused(kind: str, dtype: str, files: dict) -> None:
    """NumPy has no type for the first two."""
    path, read = files[kind]
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    tensor = next(each for name, each in header.items() if name != "__metadata__" and each["dtype"] == "F32")
    begin, end = tensor["data_offsets"]
    tensor |= {"dtype": dtype, "shape": [(end - begin) // (2 if dtype == "BF16" else 1)]}
    text = json.dumps(header).encode()
    try:
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
        with pytest.raises(InputError, match=str(path)):
            read(path)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "kind, field, value",
    [
        ("predictor config.json", "members", 10**20),
        ("predictor config.json", "head.hidden", [8] * 20_000),
        ("predictor config.json", "embedding_size", 10**400),
        ("predictor config.json", "head.hidden", [10**400]),
        ("predictor config.json", "head.num_buckets", 2**62),
        ("encoder config.json", "num_hidden_layers", 20_000),
        ("run", "spec.num_experts", 10**20),
        ("run", "training.agent.network.hidden", [8] * 20_000),
        ("run", "training.agent.network.han.layers", 20_000),
        ("run", "training.agent.network.hidden", [10**400]),
        ("run", "training.agent.network.rate_clip_per_s", 10**400),
        ("run", "training.agent.network", 5),
        ("run", "training.agent.hyper", []),
        ("checksums", "weights", []),
        ("checksums", "weights", "sums"),
        ("checksums", "weights", None),
    ],
)
def test_sizes_and_kinds_are_checked_before_the_work(kind: str, field: str, value: Any, files: dict) -> None:
    path, read = files[kind]
    whole = path.read_bytes()
    *tables, name = field.split(".")
    record = table = json.loads(whole)
    for each in tables:
        table = table[each]
    table[name] = value
    try:
        path.write_text(json.dumps(record))
        with pytest.raises(InputError, match=str(path.parent)):
            read(path)
    finally:
        path.write_bytes(whole)


def _template(*parts: dict) -> dict:
    """A post-processor that puts these parts around a text."""
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
              "[HIGH]": {"id": "[HIGH]", "ids": [99_999], "tokens": ["[HIGH]"]}}  # fmt: skip
    return {"type": "TemplateProcessing", "single": list(parts), "pair": pair, "special_tokens": tokens}


TEXT, CLS, HIGH, ABSENT = (
    {"Sequence": {"id": "A", "type_id": 0}},
    *({"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[HIGH]", "[ABSENT]")),
)
REPLACE = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1000}


@pytest.mark.parametrize(
    "part, value",
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8AAAAA"}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}),
        ("normalizer", {"type": "Sequence", "normalizers": [REPLACE] * 3}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}),
        ("model", {"type": "WordPiece", "unk_token": "[NO]", "vocab": {}, "continuing_subword_prefix": "##",
                   "max_input_chars_per_word": 9}),
        ("model", {"type": "WordLevel", "unk_token": "[NO]", "vocab": {"a": 0}}),
        ("model", {"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]]}),
        ("model", {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}),
        ("model", {"type": "BPE", "unk_token": "[NO]", "vocab": {"a": 0}, "merges": []}),
        ("post_processor", _template(CLS, TEXT, HIGH)),
        ("post_processor", _template(TEXT, ABSENT)),
        ("post_processor", _template({"Sequence": {"id": "B", "type_id": 0}})),
        ("post_processor", _template(TEXT, *[CLS] * 1000)),
    ],
    ids=[
        "panic at load", "panic on any text", "endless replacement", "replacement that fills the memory",
        "endless split", "no unknown word", "no unknown level", "unknown piece beyond", "no unknown piece",
        "no unknown pair", "token beyond the vocabulary", "absent token", "absent text", "no room for a text",
    ],
)  # fmt: skip
def test_a_hostile_tokenizer_is_refused(part: str, value: dict, files: dict) -> None:
    path, read = files["encoder tokenizer.json"]
    whole = path.read_bytes()
    try:
        path.write_text(json.dumps(json.loads(whole) | {part: value}))
        with pytest.raises(InputError, match=str(path.parent)):
            read(path)
    finally:
        path.write_bytes(whole)


def test_a_text_on_which_the_tokenizer_panics_is_an_input_error(files: dict) -> None:
    path, read = files["encoder tokenizer.json"]
    whole = path.read_bytes()
    endless = {"type": "Replace", "pattern": {"Regex": "(q+)+$"}, "content": "x"}
    try:
        path.write_text(json.dumps(json.loads(whole) | {"normalizer": endless}))
        encoder = read(path)
    finally:
        path.write_bytes(whole)
    with pytest.raises(InputError, match=f"{path.parent}: its tokenizer fails on a text: .*retry-limit"):
        encoder.tokenize(["q" * 40 + "b"])
