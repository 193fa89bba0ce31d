"""Measurements of speed and numerical endurance."""
