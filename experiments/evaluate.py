"""``python -m experiments.evaluate`` is ``qos-jax evaluate``."""

from qos_jax.programs.main import run

if __name__ == "__main__":
    run("evaluate")
