"""Data larger than memory, row group by row group."""
