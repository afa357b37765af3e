"""The one table that a benchmark prints, and writes as CSV beside its script."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["show", "write"]

Rows = Sequence[Mapping[str, Any]]


def show(rows: Rows, *, titles: bool = True) -> None:
    """Print rows of equal keys in columns that their longest entry needs; titles=False goes on below rows already shown."""
    widths = {key: max(len(key), 9, *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for line in ([dict(zip(widths, widths, strict=True))] if titles else []) + list(rows):
        print("  ".join(f"{line[key]!s:>{width}}" for key, width in widths.items()), flush=True)


def write(rows: Rows, script: str) -> None:
    """Write rows of equal keys as CSV beside `script`."""
    with Path(script).with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
