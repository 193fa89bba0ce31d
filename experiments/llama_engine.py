"""A real engine, llama.cpp's own server, with a small model of random weights; it runs as a process of its own.

Needs the packages in requirements-gateway.lock.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time

import numpy as np

from experiments.servers import EngineProcess, free_port

_BYTES = 256
_WORDS = 745  # further tokens of the vocabulary


def write_model(path: pathlib.Path, *, layers: int, width: int, context: int = 4096, seed: int = 0) -> None:
    """Writes a LLaMA of random weights: its answers are noise, and its timing is that of any model of its size."""
    import gguf

    lot, heads, vocabulary = np.random.default_rng(seed), width // 32, 3 + _BYTES + _WORDS
    hidden = 3 * width
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(_BYTES)),
         *(f"▁w{number}" for number in range(_WORDS))]
    )  # fmt: skip
    writer.add_token_scores([0.0] * (3 + _BYTES) + [-float(number) for number in range(_WORDS)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * _BYTES + [kinds.NORMAL] * _WORDS
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, (lot.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float16))

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(width, np.float32))

    add("token_embd.weight", vocabulary, width)
    add("output.weight", vocabulary, width)
    add_norm("output_norm.weight")
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", width, width)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}.weight", hidden, width)
        add(f"blk.{layer}.ffn_down.weight", width, hidden)
        add_norm(f"blk.{layer}.attn_norm.weight")
        add_norm(f"blk.{layer}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaEngine(EngineProcess):
    """A server of one model, in a process of this interpreter."""

    def __init__(self, model: pathlib.Path, name: str, *, slots: int = 4) -> None:
        """Starts nothing yet."""
        root, port = pathlib.Path(__file__).parents[1], free_port()
        command = [sys.executable, "-m", __name__, str(model), str(port), name, str(slots)]
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        super().__init__(name, port, command, {"PYTHONPATH": path})


def _serve(model: str, port: str, name: str, slots: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {name}
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_parallel, params.n_ctx = int(slots), 4096
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.endpoint_metrics = params.endpoint_slots = params.endpoint_props = True
    server = xllamacpp.Server(params)  # which serves in a thread of its own
    while server:
        time.sleep(3600)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
