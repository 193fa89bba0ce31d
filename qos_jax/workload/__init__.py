"""Requests: arrival processes, recorded traces, generated and tabulated contents, and predictions for routers."""
