"""What each column of a table is, what is done with it, and what there is to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from goodfit.errors import GoodfitError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Column", "Target", "describe", "target_of"]

FEWEST = 20  # rows below which train, valid and test parts say nothing
MOST_CLASSES = 20  # an integer target with more distinct values counts as numbers


@dataclass(frozen=True)
class Column:
    """One input column. type: its Arrow type. kind: number, category or date. note: why it is not used."""

    name: str
    type: str
    kind: str
    missing: int
    distinct: int
    used: bool = True
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """The column to predict. classes: its distinct values in order, None where the task is numbers."""

    name: str
    type: str
    task: str
    classes: list[Any] | None


def describe(table: pa.Table, target: str) -> list[Column]:
    """The input columns of a table, each with its kind; constant ones, empty ones and identifiers are not used."""
    columns = [_column(name, table[name]) for name in table.column_names if name != target]
    if not any(column.used for column in columns):
        why = "; ".join(f"{c.name}: {c.note}" for c in columns[:5]) or "the table has no other column"
        raise GoodfitError(f"A table needs an input column besides {target!r}, got none that can be used ({why}).")
    return columns


def _column(name: str, values: pa.ChunkedArray) -> Column:
    import pyarrow.compute as pc

    kind = {"string": "category", "bool": "category"}.get(str(values.type), "number")
    kind = "date" if str(values.type).startswith("timestamp") else kind
    present = len(values) - values.null_count
    distinct = pc.count_distinct(values).as_py()
    note = ""
    if present == 0:
        note = "left out, empty"
    elif distinct == 1 and values.null_count == 0:
        note = "left out, constant"
    elif str(values.type) == "string" and distinct == present and present >= 20:
        note = "left out, a different text in every row like an identifier"
    return Column(name, str(values.type), kind, values.null_count, distinct, not note, note)


def target_of(table: pa.Table, name: str, task: str | None) -> tuple[pa.Table, Target, list[str]]:
    """The table without the rows that lack the target, what the target is, and what to tell the user."""
    import pyarrow.compute as pc

    if name not in table.column_names:
        raise GoodfitError(f"The table has no column {name!r} to predict; {nearest(name, table.column_names)}")
    values, notes = table[name], []
    if values.null_count == len(values):
        raise GoodfitError(f"The target {name!r} is missing in all {len(values)} rows; name another column.")
    if values.null_count:
        notes.append(f"{values.null_count} rows without a value of {name} are left out")
        table = table.filter(pc.is_valid(values))
        values = table[name]
    if len(values) < FEWEST:
        raise GoodfitError(f"A table needs at least {FEWEST} rows with a target to be split in three, got {len(values)}.")
    kinds = sorted(pc.unique(values).to_pylist())
    if len(kinds) == 1:
        raise GoodfitError(f"The target {name!r} must have two different values at least, got {kinds[0]!r} in every row.")
    kind = str(values.type)
    inferred = task or _task(kind, kinds)
    if inferred == "numbers" and kind not in ("int64", "double"):
        raise GoodfitError(f"task='numbers' needs a target of numbers, got {name!r} of type {kind} such as {kinds[0]!r}.")
    if inferred == "classes" and len(kinds) > len(values) / 2:
        raise GoodfitError(
            f"The target {name!r} has {len(kinds)} different values in {len(values)} rows, too many for classes; "
            "name another column, or say task='numbers' (--task numbers)."
        )
    if task is None:
        other = "numbers" if inferred == "classes" else "classes"
        notes.append(f"{name} is read as {inferred} (--task {other} if that is wrong)" if kind in ("int64", "double") else "")
    return table, Target(name, kind, inferred, kinds if inferred == "classes" else None), [n for n in notes if n]


def _task(kind: str, values: Sequence[Any]) -> str:
    if kind.startswith("timestamp"):
        raise GoodfitError("A date cannot be predicted; name a target of numbers or classes.")
    if kind in ("string", "bool"):
        return "classes"
    whole = all(float(v).is_integer() for v in values[:1000])
    return "classes" if len(values) == 2 or (whole and len(values) <= MOST_CLASSES) else "numbers"
