"""Worlds: named presets and their variations, randomised training worlds, and world configurations."""
