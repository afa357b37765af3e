"""The values of a column as a NumPy array, as the preprocessing wants them; and as plain JSON and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from goodfit.errors import GoodfitError
from goodfit.tabular.columns import Column

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Array", "from_plain", "numbers_of", "texts_of", "to_plain"]

MICROSECONDS_PER_DAY = 86_400_000_000
Array = np.ndarray[Any, Any]


def numbers_of(table: pa.Table, column: Column) -> Array:
    """Float64 numbers, NaN where missing; a date is days since 1970."""
    import pyarrow as pa

    values, got = table[column.name], str(table[column.name].type)
    if values.null_count == len(values):
        return np.full(len(values), np.nan)
    if (column.kind == "date") != got.startswith("timestamp"):
        held = "dates" if column.kind == "date" else "numbers"
        raise GoodfitError(f"The column {column.name!r} held {held} when the network was fitted, got {got}; mend the column.")
    if column.kind == "date":
        days = values.cast(pa.int64()).to_numpy().astype(np.float64) / MICROSECONDS_PER_DAY
        return np.where(values.is_null().to_numpy(), np.nan, days)
    try:
        return np.asarray(values.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)
    except pa.ArrowException as wrong:
        why = str(wrong).splitlines()[0]
        raise GoodfitError(f"The column {column.name!r} held numbers when the network was fitted, got {got}: {why}.") from None


def texts_of(table: pa.Table, column: Column) -> Array:
    """Texts, "" where missing; true and false are texts too."""
    values = table[column.name].to_pylist()
    if column.type == "bool":
        values = [None if v is None else str(v).lower() for v in values]
    return np.array(["" if v is None else str(v) for v in values], dtype=object)


def to_plain(table: pa.Table, names: list[str]) -> dict[str, list[Any]]:
    """Columns as JSON types; a date is its microseconds since 1970."""
    import pyarrow as pa

    plain = {}
    for name in names:
        values = table[name]
        plain[name] = (values.cast(pa.int64()) if str(values.type).startswith("timestamp") else values).to_pylist()
    return plain


def from_plain(plain: dict[str, list[Any]], types: dict[str, str]) -> pa.Table:
    """The table that `to_plain` was given, from its values and the Arrow type of each column."""
    import pyarrow as pa

    known = {"int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_(), "string": pa.string()}

    def array(name: str) -> pa.Array:
        kind = known.get(types[name])
        return pa.array(plain[name], kind) if kind is not None else pa.array(plain[name], pa.int64()).cast(pa.timestamp("us"))

    return pa.table({name: array(name) for name in plain})
