"""``qos-jax reproduce`` with one small study of two heuristics and a learned router."""

from __future__ import annotations

from qos_jax.programs import studies
from qos_jax.programs.main import run
from qos_jax.programs.studies import Budget, Study, Trained, World

SIZES = ("chunk=8", "updates=2", "batch_size=16", "capacity=128", "warm_up=4", "hidden=8x8")
FLAGS = (
    f"--set={','.join(SIZES)}",
    "--num_envs=4",
    "--evaluation_envs=2",
    "--evaluation_steps=20",
    "--checkpoint_minutes=0",
)


def put_in_place() -> None:
    """Replaces all studies by the small one."""
    studies.TRAINED["tiny"] = Trained(agent="baseline_rl", randomise="load", flags=FLAGS)
    worlds = (World("Poisson", trained=("tiny",)), World("bursts", trained=("tiny",), fields={"arrivals": "gamma:3"}))
    small = Study("Small", "Who?", worlds, loads=(0.9,), routers=("shortest_queue", "round_robin"))
    for name in list(studies.STUDIES):
        del studies.STUDIES[name]
    studies.STUDIES["small"] = small
    studies.BUDGETS["quick"] = Budget(requests=40, seeds=2, most_steps=512, most_training_seeds=2, ends_only=False)


if __name__ == "__main__":
    put_in_place()
    run("reproduce")
