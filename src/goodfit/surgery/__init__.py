"""Edits of a model, each verified on an example."""
