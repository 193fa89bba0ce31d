"""Named worlds and sample_worlds ones to train in."""
