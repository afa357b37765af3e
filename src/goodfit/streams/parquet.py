"""`gf.Parquet`: rows that do not fit in memory, as data of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from goodfit.errors import GoodfitError
from goodfit.streams.files import Files

__all__ = ["Parquet"]


@dataclass(frozen=True)
class Parquet:
    """Rows of Parquet files, for `fit(model, train, valid, ...)` in the place of data that would not fit in memory.

    Shapes: x (rows, columns) of torch's default dtype; y (rows,), int64 for a target of integers or booleans, else of the
        default dtype. Batches have as many rows as those of any other data, and each row comes once in an epoch.
    Numbers: path, a file, a folder of .parquet files, or a list of files; target, the column to predict; columns, the inputs,
        or None for all others; memory, bytes that the rows held at once may take, > 0. For train, row groups come in another
        order each epoch, and the rows held are shuffled: all of them where they fit; so write row groups far smaller.
    Errors: files that are none, that differ in their columns, or that change under the training; columns that are not there, or
        hold no numbers; a missing value; memory for less than two batches. Text, dates and gaps: encode and fill them first.

    `fit(model, Parquet("train.parquet", "y"), Parquet("valid.parquet", "y"), cocktail)`

    >>> import tempfile, pyarrow
    >>> from pyarrow import parquet
    >>> file = tempfile.mkdtemp() + "/rows.parquet"
    >>> parquet.write_table(pyarrow.table({"a": [0.5, 1.5, 2.5], "y": [0, 1, 1]}), file)
    >>> Parquet(file, target="y").open().rows
    3
    """

    path: str | Path | Sequence[str | Path]
    target: str
    columns: Sequence[str] | None = None
    memory: float = 256e6

    def __post_init__(self) -> None:
        if isinstance(self.memory, bool) or not isinstance(self.memory, int | float) or not self.memory > 0:
            raise GoodfitError(f"Parquet.memory must be a number of bytes > 0, got memory={self.memory!r}.")
        given = [self.path] if isinstance(self.path, str | Path) else self.path
        if not isinstance(given, Sequence) or not given or not all(isinstance(path, str | Path) for path in given):
            raise GoodfitError(f"Parquet.path must be a file, a folder or a list of files, got {self.path!r:.80}.")
        if isinstance(self.columns, str):
            raise GoodfitError(f"Parquet.columns must be a list of names, got {self.columns!r}; write [{self.columns!r}].")

    def open(self) -> Files:
        """Its files, of which only the metadata is read, once they are known to hold numbers."""
        given = [self.path] if isinstance(self.path, str | Path) else self.path
        found: list[Path] = []
        for path in map(Path, given):
            inside = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
            if not inside or not all(one.is_file() for one in inside):
                raise GoodfitError(f"There is no Parquet file {str(path)!r}; give a file, or a folder that has .parquet files.")
            found += inside
        return Files(found, self.target, self.columns)
