"""``python -m experiments.fit_profile`` is ``qos-jax fit-profile``."""

from qos_jax.programs.main import run

if __name__ == "__main__":
    run("fit-profile")
