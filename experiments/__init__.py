"""Programs, run as modules."""
