"""What depends on what inside a model: one run on an example, followed operation by operation."""
