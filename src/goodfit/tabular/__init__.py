"""From a table to a network: reading, types, split, encoding."""
