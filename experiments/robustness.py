"""``python -m experiments.robustness`` is ``qos-jax robustness``."""

from qos_jax.programs.main import run

if __name__ == "__main__":
    run("robustness")
