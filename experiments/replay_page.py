"""``python -m experiments.replay-page`` is ``qos-jax replay-page``."""

from qos_jax.programs.main import run

if __name__ == "__main__":
    run("replay-page")
