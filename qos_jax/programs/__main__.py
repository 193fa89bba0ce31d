"""``python -m qos_jax.programs NAME`` is ``qos-jax NAME``."""

from qos_jax.programs.main import main

if __name__ == "__main__":
    main()
