"""Parquet files of one form, read slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from goodfit.errors import GoodfitError, nearest

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

__all__ = ["Files"]

SLICE = 2**14  # rows that are decoded at once
READ = 2**16  # bytes of a column that are read at once


class Files:
    """Parquet files with the same numbers in them. rows: of all; inputs, target: their columns; real: whether y is."""

    def __init__(self, paths: Sequence[Path], target: str, columns: Sequence[str] | None) -> None:
        self.paths, self.target = paths, target
        self._marks = [_mark(path) for path in paths]
        with _opened(paths[0]) as first:
            self.inputs = _chosen(first.schema_arrow, target, columns)
            kinds = self._kinds(first, paths[0])
        self.real = _family(kinds[target]) == "reals"
        self._groups: list[tuple[Path, int]] = []
        self.rows = 0
        for path in paths:
            with _opened(path) as file:
                if columns is None and set(file.schema_arrow.names) != {*self.inputs, target}:
                    raise GoodfitError(
                        f"{str(path)!r} has other columns than {str(paths[0])!r}; write them alike, or name the "
                        "inputs in columns."
                    )
                self._refuse_other(self._kinds(file, path), kinds, path)
                self._groups += [(path, group) for group in range(file.metadata.num_row_groups)]
                self.rows += file.metadata.num_rows

    def slices(self, generator: torch.Generator | None) -> Iterator[tuple[list[Any], Any]]:
        """All rows as (columns of inputs, target), a few thousand at once; row groups in an order drawn from the generator."""
        for path, mark in zip(self.paths, self._marks, strict=True):
            if _mark(path) != mark:
                raise GoodfitError(f"{str(path)!r} is no longer the file that the training began with; put it back.")
        count = len(self._groups)
        order = range(count) if generator is None else torch.randperm(count, generator=generator).tolist()
        for path, group in (self._groups[i] for i in order):
            with _opened(path) as file:
                yield from self._slices_of(file, path, group)

    def _slices_of(self, file: ParquetFile, path: Path, group: int) -> Iterator[tuple[list[Any], Any]]:
        import pyarrow as pa

        try:
            for batch in file.iter_batches(SLICE, row_groups=[group], columns=[*self.inputs, self.target]):
                columns = [_numbers(batch.column(name), name, path, group) for name in (*self.inputs, self.target)]
                yield columns[:-1], columns[-1]
        except (OSError, pa.ArrowException) as wrong:
            raise _unreadable(path, wrong) from None

    def _kinds(self, file: ParquetFile, path: Path) -> dict[str, pa.DataType]:
        """The types of the columns that are read, all of them numbers."""
        known = {field.name: field.type for field in file.schema_arrow}
        for name in (*self.inputs, self.target):
            if name not in known:
                raise GoodfitError(f"{str(path)!r} has no column {name!r}; {nearest(name, known)}")
            if not _family(known[name]):
                raise GoodfitError(
                    f"A stream holds numbers, and the column {name!r} of {str(path)!r} is {known[name]}; encode it first, "
                    "leave it out of columns, or fit a table that memory holds by goodfit fit."
                )
        if str(known[self.target]) == "uint64":
            raise GoodfitError(f"The target {self.target!r} of {str(path)!r} is uint64, and classes are int64; write it so.")
        return {name: known[name] for name in (*self.inputs, self.target)}

    def _refuse_other(self, kinds: dict[str, pa.DataType], first: dict[str, pa.DataType], path: Path) -> None:
        odd = next((name for name in first if _family(kinds[name]) != _family(first[name])), None)
        if odd is not None:
            raise GoodfitError(
                f"All files need columns of one kind, and {odd!r} is {first[odd]} in {str(self.paths[0])!r}, and {kinds[odd]} "
                f"in {str(path)!r}; write them alike."
            )


def _opened(path: Path) -> ParquetFile:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=READ)
    except (OSError, pa.ArrowException) as wrong:
        raise _unreadable(path, wrong) from None


def _unreadable(path: Path, wrong: Exception) -> GoodfitError:
    line = (str(wrong).strip().splitlines() or [type(wrong).__name__])[0]
    return GoodfitError(f"{str(path)!r} cannot be read as Parquet ({line:.150}); write it again.")


def _chosen(schema: pa.Schema, target: str, columns: Sequence[str] | None) -> list[str]:
    """The inputs, in their order."""
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise GoodfitError(f"Columns need names of their own, got {twice!r} twice; rename one.")
    chosen = [name for name in schema.names if name != target] if columns is None else list(columns)
    if not chosen or len(set(chosen)) < len(chosen) or target in chosen:
        raise GoodfitError(f"Parquet.columns must be inputs, each once, without the target {target!r}, got {chosen!r:.80}.")
    return chosen


def _family(kind: pa.DataType) -> str:
    """What a type of numbers is, "" for no numbers."""
    from pyarrow import types

    return "reals" if types.is_floating(kind) else "whole" if types.is_integer(kind) or types.is_boolean(kind) else ""


def _numbers(column: pa.Array, name: str, path: Path, group: int) -> np.ndarray[Any, Any]:
    if column.null_count:
        raise GoodfitError(f"The column {name!r} of {str(path)!r} has a missing value, in row group {group}; fill it first.")
    numbers: np.ndarray[Any, Any] = column.to_numpy(zero_copy_only=False)
    return numbers


def _mark(path: Path) -> tuple[int, int]:
    """What tells a file from what it may become."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
