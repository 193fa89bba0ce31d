"""Files that appear whole or not at all, plain values of configurations, and provenance of results."""
