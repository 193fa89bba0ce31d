"""``python -m experiments.predictor`` is ``qos-jax predictor``."""

from qos_jax.programs.main import run

if __name__ == "__main__":
    run("predictor")
