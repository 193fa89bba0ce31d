"""``python -m experiments.sweep`` is ``qos-jax sweep``."""

from qos_jax.programs.main import run

if __name__ == "__main__":
    run("sweep")
