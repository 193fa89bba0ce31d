"""qos-jax fleet: what it shows is what the simulator takes, at once, and bad input ends in one line."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from qos_jax import load_fleet, make
from qos_jax.programs.main import run

FLEETS = pathlib.Path(__file__).parents[2] / "qos_jax" / "worlds" / "fleets"


def shown(*words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        run("fleet", words)
    return int(stopped.value.code or 0), ""


def test_the_table_has_each_expert_with_its_origin(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("show", str(FLEETS / "edge-64.toml"), f"--out={tmp_path / 'shown.json'}")[0] == 0
    printed = capsys.readouterr().out
    assert "edge-64: 64 experts" in printed
    assert "alpaca-native @ RTX 4090 x 8" in printed
    rows = json.loads((tmp_path / "shown.json").read_text())["experts"]
    _, params = make(load_fleet(FLEETS / "edge-64.toml"), rate_per_s=1.0)
    experts = params.experts
    assert len(rows) == 8
    for at, row in enumerate(rows):
        step_ms = 1e3 * (experts.step_base_s[at] + 8 * experts.per_sequence_s[at] + 4096 * experts.per_kv_token_s[at])
        assert row["step_ms"][1] == pytest.approx(float(step_ms), rel=1e-5)
        assert (row["kv_blocks"], row["count"], row["origin"]) == (int(experts.kv_blocks[at]), 8, "scaled")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "no.toml"], "error: no.toml: cannot be read: No such file or directory"),
        (["show"], "error: nothing to do; give qos-jax fleet show FILE"),
        (["draw", "no.toml"], "error: flag --action=draw: value should be one of <show|catalogue>"),
        (["show", "a", "b"], "error: unexpected argument 'b'"),
    ],
)
def test_bad_input_ends_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(*words)[0] == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_it_does_without_jax() -> None:
    program = (
        "import sys; from qos_jax.programs.main import run\n"
        f"try: run('fleet', ['show', {str(FLEETS / 'golden-rtx4090.toml')!r}])\n"
        "except SystemExit: print([name for name in ('jax', 'scipy', 'flax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "measured" in done.stdout


def test_the_catalogue_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("catalogue")[0] == 0
    printed = capsys.readouterr().out
    assert "| Jetson AGX Thor |" in printed
    assert "| qwen3-8b | " in printed
