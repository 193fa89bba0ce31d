"""``python -m experiments.reproduce`` is ``qos-jax reproduce``."""

from qos_jax.programs.main import run

if __name__ == "__main__":
    run("reproduce")
