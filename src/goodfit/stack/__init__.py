"""Members of one architecture, trained together."""
