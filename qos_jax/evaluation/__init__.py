"""Judging routers: evaluation, metrics, statistics, planners and bounds, and comparison with measured runs."""
