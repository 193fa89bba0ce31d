"""A real engine, vLLM's own server on a CPU, with a small model of random weights; it runs as a process of its own.

vLLM needs an environment of its own: requirements-vllm.lock.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from experiments.servers import EngineProcess, free_port

_BLOCK_SIZE_TOKENS, _KV_BLOCKS = 32, 129  # the smallest block with which vLLM starts on a CPU; one block stays empty
_CONTEXT_TOKENS = 2048
_START_S = 300.0  # that it may take until it answers
_WORDS = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(1021))]
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",
}


def write_model(folder: pathlib.Path, *, layers: int, width: int) -> None:
    """Writes what vLLM needs to know of a LLaMA whose weights it draws at random, and a tokenizer of whole words."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": len(_WORDS),
        "max_position_embeddings": _CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    vocabulary = {word: number for number, word in enumerate(_WORDS)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for message in messages %}{{ message.content }} {% endfor %}",
    }
    for name, value in {"config": config, "tokenizer": tokenizer, "tokenizer_config": settings}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


class VllmServer(EngineProcess):
    """A server of one model."""

    def __init__(self, python: str, model: pathlib.Path, name: str, *, max_running: int = 4) -> None:
        """Starts nothing yet.

        Args:
          python: interpreter of the environment that has vLLM.
          model: folder of the model.
          name: by which clients ask for it.
          max_running: requests at a time.
        """
        port = free_port()
        flags = {
            "host": "127.0.0.1", "port": port, "model": model, "served-model-name": name, "load-format": "dummy",
            "dtype": "float32", "block-size": _BLOCK_SIZE_TOKENS, "num-gpu-blocks-override": _KV_BLOCKS,
            "max-num-seqs": max_running, "max-model-len": _CONTEXT_TOKENS,
        }  # fmt: skip
        values = [f"--{flag}={value}" for flag, value in flags.items()]
        command = [python, "-m", "vllm.entrypoints.openai.api_server", *values, "--enforce-eager"]
        super().__init__(name, port, command, _ENVIRONMENT, _START_S)
