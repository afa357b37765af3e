"""Layers of ours: modules that draw masks which can be drawn again."""
