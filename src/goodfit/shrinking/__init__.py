"""What is exactly zero goes: units, filters, heads and input features."""
