"""A router for one fleet as a file: the compiler's input and its memory, without the code that trained it.

The file is an ``.npz`` of the program as ``jax.export`` writes it, the first memory, and a header in JSON.
"""

from __future__ import annotations

import io
import json
import os
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from qos_jax.errors import InputError
from qos_jax.gateway.decision import DecisionProgram
from qos_jax.io.files import names_in, parse_json, read_columns, write_whole

FORMAT = 2
SUFFIX = ".npz"
PLATFORMS = ("cpu", "cuda")


def save_program(path: str | os.PathLike[str], program: DecisionProgram, made: dict[str, Any]) -> None:
    """Writes a program for CPUs and NVIDIA's GPUs; the file appears whole or not at all.

    Args:
      path: of the file.
      program: to write.
      made: ``command``, ``date`` and ``versions``, for the record.

    Raises:
      InputError: the file cannot be written.
    """
    exported = jax.export.export(jax.jit(program.decide), platforms=PLATFORMS)(*program.shapes, program.memory)
    memory = [np.asarray(leaf) for leaf in program.memory]
    header = made | {
        "format": FORMAT, "name": program.name, "slots": program.slots,
        "memory": [{"shape": leaf.shape, "dtype": leaf.dtype.name} for leaf in memory],
    }  # fmt: skip
    columns: dict[str, Any] = {f"memory_{index}": np.atleast_1d(leaf) for index, leaf in enumerate(memory)}
    columns |= {
        "header": np.array([json.dumps(header)]),
        "kv_blocks": program.kv_blocks,
        "program": np.frombuffer(exported.serialize(), np.uint8),
    }
    packed = io.BytesIO()
    np.savez_compressed(packed, **columns)
    write_whole(path, packed.getvalue())


def load_program(path: str | os.PathLike[str], num_experts: int) -> DecisionProgram:
    """Reads a program that ``save_program`` wrote. Whoever writes the file decides what the gateway computes.

    Args:
      path: of the file.
      num_experts: of the fleet, for which the program must be.

    Raises:
      InputError: the file cannot be read, is damaged, or is of another fleet or device.
    """
    columns = read_columns(path, ("header", "kv_blocks", "program"))
    header = parse_json(names_in(path, "header", columns["header"])[0], f"{path}: header")
    kinds = {"name": str, "slots": int, "memory": list}
    name, slots, memory = (_field(path, header, key, of) for key, of in kinds.items())
    if (version := _field(path, header, "format", int)) != FORMAT:
        raise InputError(f"{path}: format is {version}, must be {FORMAT}")
    if (found := len(columns["kv_blocks"])) != num_experts:
        raise InputError(f"{path}: is for {found} experts, must be for the {num_experts} of the fleet")
    names = [f"memory_{index}" for index in range(len(memory))]
    leaves = read_columns(path, names) if names else {}
    try:
        shapes = [tuple(each["shape"]) for each in memory]
        first = tuple(jnp.asarray(leaves[key].reshape(shape)) for key, shape in zip(names, shapes, strict=True))
        exported = jax.export.deserialize(bytearray(columns["program"].tobytes()))
        program = DecisionProgram(name, slots, columns["kv_blocks"].astype(float), first, exported.call)
        jax.eval_shape(program.decide, *program.shapes, first)
    except Exception as error:  # what the reader of programs raises is not said anywhere
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: holds no program of a router for this version of jax: {reason}") from error
    return program


def _field(path: str | os.PathLike[str], header: Any, key: str, of: type) -> Any:
    value = header.get(key) if isinstance(header, dict) else None
    if not isinstance(value, of) or isinstance(value, bool):
        raise InputError(f"{path}: header.{key} is {value!r}, must be of the type {of.__name__}")
    return value
