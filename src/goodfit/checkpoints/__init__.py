"""Checkpoints: a training that was killed goes on where it was, to the bit."""
