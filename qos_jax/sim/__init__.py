"""The simulator: cost of an iteration, engine, environment, exact replay, and capacity of a fleet."""
