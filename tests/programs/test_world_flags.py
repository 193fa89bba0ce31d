"""From flags to a world: numbers with units, and limits that say nothing."""

from __future__ import annotations

import pytest
from absl.flags import FlagValues

from qos_jax import InputError
from qos_jax.programs.app import parse
from qos_jax.programs.flags import define_evaluate
from qos_jax.programs.world_flags import notes_on, world_config
from qos_jax.worlds.config import WorldConfig


def world_of(*arguments: str) -> WorldConfig:
    values = FlagValues()
    define_evaluate(values)
    parse(values, arguments)
    return world_config(values)


@pytest.mark.parametrize("text", ["36ms,0.05", "0.036s, 50 ms", "0.036,5e-2s", "3.6e-2, 50ms"])
def test_a_latency_limit_is_in_seconds_unless_it_says_otherwise(text: str) -> None:
    assert world_of(f"--latency_limit={text}").latency_limits_s == (0.036, 0.05)


def test_a_fleet_file_stands_for_a_preset() -> None:
    path = "qos_jax/worlds/fleets/jetson-4.toml"
    world = world_of(f"--fleet={path}", "--arrivals=gamma:2")
    assert (world.name, world.latency_limits_s, len(world.pairs)) == ("jetson-4", (0.15,), 4)
    assert world.described() == {"fleet": "jetson-4.toml", "arrivals": "gamma:2"}
    with pytest.raises(InputError, match=f"--preset=edge-8 and --fleet={path} are both given: give one"):
        world_of(f"--fleet={path}", "--preset=edge-8")
    with pytest.raises(InputError, match=r"no\.toml: cannot be read"):
        world_of("--fleet=no.toml")


@pytest.mark.parametrize("text", ["30min", "ms", "30mss", "30MS", "30 m s", "inf", "nans", "0ms", "-30ms"])
def test_a_limit_in_another_unit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"--latency_limit={text}: give numbers above 0, in s or ms"):
        world_of(f"--latency_limit={text}")


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--latency_limit=30ms", []),
        (
            "--latency_limit=30",
            [
                "latency limit of 30 s/token (30000 ms) is above the longest iteration of all experts, 0.328 s: a "
                "request can"
            ],
        ),
        (
            "--latency_limit=20ms,30ms",
            ["latency limit of 0.02 s/token (20 ms) is below the shortest iteration of all experts, 0.0206 s: no req"],
        ),
        ("--tpot_limit=30", ["tpot limit of 30 s/token (30000 ms) is above the longest iteration"]),
        ("--ttft_limit=300", ["ttft limit is 300 s, over 1 min; for milliseconds write 300ms"]),
        ("--e2e_limit=30000", ["e2e limit is 30000 s, over 60 min; for milliseconds write 30000ms"]),
        ("--ttft_limit=2,300ms", []),
    ],
)
def test_a_limit_that_decides_nothing_is_told(flag: str, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    world = world_of(flag, "--preset=paper-3")
    notes_on(world, *world.build())
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(told)
    for line, part in zip(printed, told, strict=True):
        assert part in line
