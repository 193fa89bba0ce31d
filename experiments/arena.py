"""``python -m experiments.arena`` is ``qos-jax arena``."""

from qos_jax.programs.main import run

if __name__ == "__main__":
    run("arena")
