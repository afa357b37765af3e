"""Train, valid and test parts of a table: seeded, stratified for classes, with duplicates across them counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Split", "count_duplicates", "split"]

Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts."""

    train: Rows
    valid: Rows
    test: Rows

    @property
    def sizes(self) -> dict[str, int]:
        """Rows in each part."""
        return {"train": len(self.train), "valid": len(self.valid), "test": len(self.test)}


def split(rows: int, classes: Rows | None, seed: int) -> Split:
    """60 % train, 20 % valid, 20 % test; with `classes` (a number per row) each part has the shares of the whole."""
    from sklearn.model_selection import train_test_split

    strata = None if classes is None else _strata(classes)
    everything = np.arange(rows)
    rest, test = train_test_split(everything, test_size=0.2, random_state=seed, stratify=strata)
    train, valid = train_test_split(rest, test_size=0.25, random_state=seed, stratify=None if strata is None else strata[rest])
    return Split(np.sort(train), np.sort(valid), np.sort(test))


def _strata(classes: Rows) -> Rows | None:
    """The classes, those with under 5 rows together as one; None where that leaves too few rows for a stratum."""
    counts = np.bincount(classes)
    strata = np.where(counts[classes] < 5, -1, classes)
    _, sizes = np.unique(strata, return_counts=True)
    if sizes.min() < 5:
        strata = np.where(strata == -1, counts.argmax(), strata)
        _, sizes = np.unique(strata, return_counts=True)
    return strata if sizes.min() >= 5 and len(sizes) <= 0.2 * len(classes) else None


def count_duplicates(table: pa.Table, parts: Split) -> dict[str, int]:
    """How many rows of valid and of test stand in an earlier part too, equal in every column."""
    codes = np.ascontiguousarray(np.column_stack([_codes(table[name]) for name in table.column_names]))
    first: dict[bytes, int] = {}
    row = np.array([first.setdefault(codes[i].tobytes(), i) for i in range(len(codes))])
    seen = row[parts.train]
    before_test = np.concatenate([seen, row[parts.valid]])
    return {
        "valid": int(np.isin(row[parts.valid], seen).sum()),
        "test": int(np.isin(row[parts.test], before_test).sum()),
    }


def _codes(values: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """A number per row, equal where the values are."""
    indices = values.combine_chunks().dictionary_encode(null_encoding="encode").indices
    return np.asarray(indices.to_numpy(zero_copy_only=False), dtype=np.int32)
