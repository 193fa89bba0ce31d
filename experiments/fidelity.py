"""``python -m experiments.fidelity`` is ``qos-jax fidelity``."""

from qos_jax.programs.main import run

if __name__ == "__main__":
    run("fidelity")
