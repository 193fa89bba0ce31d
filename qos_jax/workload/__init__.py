"""What the world is fed: arrivals, contents, predictions, tables, profiles."""
