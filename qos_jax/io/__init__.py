"""Files that appear whole or not at all, and where results come from."""
