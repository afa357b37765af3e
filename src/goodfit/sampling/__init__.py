"""Predictions with dropout on: which random draws a model makes, switching dropout alone on, and what samples say."""
