"""Networks that are one layer after another, computed by hand for many members at once."""
