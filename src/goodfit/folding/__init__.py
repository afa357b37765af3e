"""Batch norms go into the layers beside them."""
