"""From columns to numbers: scikit-learn's transformers, kept as JSON and rebuilt from it.

Numbers and dates are standardised; where the training part lacked some, missing is the mean, and one more column says so.
Categories are one-hot; missing is a level of its own, unseen and rare ones are zero in all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from goodfit.errors import GoodfitError, nearest
from goodfit.tabular.columns import Column
from goodfit.tabular.values import Array, from_plain, numbers_of, texts_of, to_plain

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Encoder"]

MOST_LEVELS = 100


class Encoder:
    """The fitted preprocessing of the input columns.

    means, scales: of the number columns. flagged: those of them whose missing cells get a column of their own. levels: of
    the category columns. sample: some rows and what they encode to, which prove a rebuilt encoder.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        means: Sequence[float],
        scales: Sequence[float],
        flagged: Sequence[int],
        levels: Sequence[Sequence[str]],
        sample: dict[str, Any] | None = None,
    ) -> None:
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        self.columns, self.flagged, self.levels, self.sample = (
            list(columns),
            list(flagged),
            [list(one) for one in levels],
            sample,
        )
        self.numbers, self.categories = _kinds(columns)
        self.scaler = StandardScaler()
        self.scaler.mean_, self.scaler.scale_ = np.array(means), np.array(scales)
        self.scaler.n_features_in_ = len(self.numbers)
        lists = [np.array(one, dtype=object) for one in levels]
        self.onehot = OneHotEncoder(categories=lists, handle_unknown="ignore", sparse_output=False, dtype=np.float32)
        if lists:
            self.onehot.fit(np.array([[one[0] for one in lists]], dtype=object))

    @classmethod
    def fit(cls, table: pa.Table, columns: Sequence[Column]) -> Encoder:
        """Learn from the training part."""
        from sklearn.preprocessing import StandardScaler

        numbers, categories = _kinds(columns)
        values = np.column_stack([np.empty((table.num_rows, 0)), *(numbers_of(table, c) for c in numbers)])
        holes = np.isnan(values)
        flagged = np.flatnonzero(holes.any(axis=0)).tolist()
        values[:, holes.all(axis=0)] = 0.0
        scaler = StandardScaler().fit(values) if numbers else None
        means, scales = ([], []) if scaler is None else (scaler.mean_.tolist(), scaler.scale_.tolist())
        levels = [sorted(level for level, _ in Counter(texts_of(table, c)).most_common(MOST_LEVELS)) for c in categories]
        encoder = cls(columns, means, scales, flagged, levels)
        head = table.slice(0, 5)
        encoder.sample = {"rows": to_plain(head, encoder.needed), "encoded": encoder.transform(head).tolist()}
        return encoder

    @property
    def needed(self) -> list[str]:
        """Names of the columns that a table must have."""
        return [c.name for c in self.columns if c.used]

    def transform(self, table: pa.Table) -> Array:
        """A float32 matrix, a row per row; the table may have its columns in any order, and others beside them."""
        names = set(table.column_names)
        for name in self.needed:
            if name not in names:
                raise GoodfitError(
                    f"The network needs the column {name!r}, which the table lacks; {nearest(name, table.column_names)}"
                )
        parts = [np.empty((table.num_rows, 0), dtype=np.float32)]
        if self.numbers:
            values = np.column_stack([numbers_of(table, c) for c in self.numbers])
            parts += [np.nan_to_num(self.scaler.transform(values), nan=0.0), np.isnan(values[:, self.flagged])]
        if self.categories:
            parts.append(self.onehot.transform(np.column_stack([texts_of(table, c) for c in self.categories])))
        return np.concatenate([part.astype(np.float32) for part in parts], axis=1)

    def strangers(self, table: pa.Table) -> list[str]:
        """What a table has that the training part had not: whole columns missing, categories never or rarely seen."""
        used = [c.name for c in (*self.numbers, *self.categories) if table[c.name].null_count == table.num_rows]
        found = [f"column {name}: every cell is missing" for name in used if table.num_rows]
        for column, levels in zip(self.categories, self.levels, strict=True):
            cells, known = texts_of(table, column), {*levels, ""}
            new = sum(cell not in known for cell in cells)
            if new:
                found.append(f"column {column.name}: {new} of {len(cells)} cells hold categories new or rare to the fit")
        return found

    def to_json(self) -> dict[str, Any]:
        """All that `from_json` needs."""
        return {
            "columns": [c.to_json() for c in self.columns],
            "means": self.scaler.mean_.tolist(),
            "scales": self.scaler.scale_.tolist(),
            "flagged": self.flagged,
            "levels": self.levels,
            "sample": self.sample,
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Encoder:
        """Rebuild, and refuse where the stored rows now encode to something else."""
        try:
            columns = [Column(**c) for c in saved["columns"]]
            encoder = cls(columns, saved["means"], saved["scales"], saved["flagged"], saved["levels"], saved["sample"])
            rows = from_plain(saved["sample"]["rows"], {c.name: c.type for c in columns})
            same = np.array_equal(encoder.transform(rows), np.array(saved["sample"]["encoded"], dtype=np.float32))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as wrong:
            raise GoodfitError(
                f"The stored preprocessing cannot be read ({type(wrong).__name__}: {wrong}); fit again."
            ) from None
        if not same:
            raise GoodfitError("The stored preprocessing encodes its sample rows otherwise than when it was fitted; fit again.")
        return encoder


def _kinds(columns: Sequence[Column]) -> tuple[list[Column], list[Column]]:
    used = [c for c in columns if c.used]
    return [c for c in used if c.kind != "category"], [c for c in used if c.kind == "category"]
