"""Measurements of speed and of numerical drift."""
