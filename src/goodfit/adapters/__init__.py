"""Other people's training loops: one callback each, which maps the epoch decision and the finish."""
