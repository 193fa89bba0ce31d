"""``python -m experiments.train`` is ``qos-jax train``."""

from qos_jax.programs.main import run

if __name__ == "__main__":
    run("train")
