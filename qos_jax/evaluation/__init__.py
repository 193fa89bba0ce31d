"""Evaluation of routers: runs, metrics, statistics, hindsight plans, bounds, and comparison with measured runs."""
