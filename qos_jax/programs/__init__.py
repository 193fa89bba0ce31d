"""The programs that users run: `qos-jax NAME`, or `python -m experiments.NAME`."""
