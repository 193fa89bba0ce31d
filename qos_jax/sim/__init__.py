"""The world: experts, engine, environment, replay, metrics."""
