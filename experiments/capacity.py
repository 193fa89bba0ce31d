"""``python -m experiments.capacity`` is ``qos-jax capacity``."""

from qos_jax.programs.main import run

if __name__ == "__main__":
    run("capacity")
