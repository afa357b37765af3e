"""Read a table from a file: CSV, Parquet, Arrow or NPZ, with every decision noted and every doubt an error.

What comes back has columns of five types only: int64, float64, bool, string and timestamp in microseconds. Missing cells
are null; NaN counts as missing. Rows are counted from 1 below the header, blank lines left out.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goodfit.errors import GoodfitError, nearest
from goodfit.tabular.arrays import read_npz
from goodfit.tabular.cells import Notes, Rules, option, shown
from goodfit.tabular.delimited import read_delimited
from goodfit.tabular.types import infer, narrow

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["read"]

_KINDS = {
    ".csv": "csv", ".txt": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow", ".npz": "npz",
}  # fmt: skip


def read(
    path: Path,
    *,
    encoding: str = "utf-8",
    missing: Sequence[str] = (),
    text: Sequence[str] = (),
    numbers: Sequence[str] = (),
    drop: Sequence[str] = (),
    like: Mapping[str, str] | None = None,
) -> tuple[pa.Table, list[str]]:
    """The table in `path` and notes on what was decided.

    missing: cells that mean missing, besides the usual ones. text, numbers: columns to read as such. drop: columns to
    leave out. The command line spells them --missing, --text, --numbers and --drop, and so do the messages. like: the types
    of another table's columns; those are read, as what they were there, and no other column.
    """
    path = Path(path)
    rules = Rules(_listed(missing), _listed(text), _listed(numbers))
    try:
        return _read(path, encoding, rules, _listed(drop), like)
    except GoodfitError as error:
        raise GoodfitError(f"{shown(path, 4096)}: {' '.join(str(error).split())}") from None


def _listed(given: Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _read(
    path: Path, encoding: str, rules: Rules, drop: tuple[str, ...], like: Mapping[str, str] | None
) -> tuple[pa.Table, list[str]]:
    import pyarrow as pa

    kind = _kind(path)
    with _readable(kind):
        table, rules, said = _raw(path, kind, encoding, rules)
    if table.num_rows == 0:
        raise GoodfitError("expected rows, got a table that has a header but no rows; add some.")
    table = _named(table, said)
    _known(table.column_names, {"text": rules.text, "numbers": rules.numbers, "drop": drop})
    names = [name for name in table.column_names if name not in drop]
    if like is not None:
        if lacking := [name for name in like if name not in names]:
            raise GoodfitError(f"expected the column {shown(lacking[0])}, which is not there; {nearest(lacking[0], names)}")
        names = [name for name in names if name in like]
        numbers = tuple(name for name in names if like[name] in ("int64", "double"))
        rules = replace(rules, text=tuple(name for name in names if like[name] == "string"), numbers=numbers)
    if not names and like is None:
        raise GoodfitError("expected at least one column, got none; drop fewer.")
    typed, notes = infer if kind in ("csv", "tsv") else narrow, Notes()
    columns = []
    for name in names:
        with _readable(f"column {shown(name)}"):
            columns.append(typed(name, table[name], rules, notes))
    return pa.table(columns, names=names), [*said, *notes.lines()]


def _raw(path: Path, kind: str, encoding: str, rules: Rules) -> tuple[pa.Table, Rules, list[str]]:
    """The table as the file has it, the rules that its layout adds to, and notes."""
    if kind in ("csv", "tsv"):
        table, separator, said = read_delimited(path, encoding, "\t" if kind == "tsv" else None)
        return table, replace(rules, comma=separator in ";\t"), said
    if kind == "npz":
        table, said = read_npz(path)
        return table, rules, said
    return _arrow(path, kind), rules, []


def _kind(path: Path) -> str:
    """How to read the file, by its name; an error where there is no file to read."""
    try:
        if path.is_dir():
            raise GoodfitError("expected a file, got a folder; name a file in it.")
        if not path.exists():
            folder = path.parent
            near = (
                nearest(path.name, sorted(shown(one.name) for one in folder.iterdir())) if folder.is_dir() else "nor its folder"
            )
            raise GoodfitError(f"there is no such file; {near}")
        size = path.stat().st_size
    except OSError as error:
        raise GoodfitError(f"expected a readable file, got: {error.strerror}; check its name and its rights.") from None
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    packed = suffixes[-1] == ".gz" and len(suffixes) > 1
    kind = _KINDS.get(suffixes[-2 if packed else -1])
    if kind is None or (packed and kind not in ("csv", "tsv")):
        raise GoodfitError(
            f"expected a file named {', '.join(_KINDS)} or .csv.gz, got {shown(suffixes[-1])}; save the table as CSV."
        )
    if size == 0:
        raise GoodfitError("expected a table, got an empty file; write the table to it.")
    return kind


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn what the readers raise on damaged files into one line."""
    import pyarrow as pa

    damaged = (pa.ArrowException, OSError, ValueError, ArithmeticError, EOFError, LookupError, MemoryError, RuntimeError)
    try:
        yield
    except GoodfitError:
        raise
    except (*damaged, SyntaxError, TypeError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise GoodfitError(f"expected a readable {what}, got: {reason.rstrip('.')}; write the file anew.") from None


def _arrow(path: Path, kind: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(str(path)) as file:
        if kind == "parquet":
            table = _coded(pq.ParquetFile(file, pre_buffer=False))
        else:
            magic = file.read(6)
            file.seek(0)
            table = (pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)).read_all()
    table.validate(full=True)
    return table


def _coded(file: Any) -> pa.Table:
    """The table of a Parquet file; integers that its writer held as categories, which Parquet forgets, as text again."""
    import pyarrow as pa

    table, kept = file.read(), (file.metadata.metadata or {}).get(b"ARROW:schema")
    for field in pa.ipc.read_schema(pa.BufferReader(b64decode(kept))) if kept else ():
        place = table.schema.get_field_index(field.name)
        coded = pa.types.is_dictionary(field.type) and pa.types.is_integer(field.type.value_type)
        if coded and place >= 0 and pa.types.is_integer(table.schema.types[place]):
            table = table.set_column(place, field.name, table.column(place).cast(pa.string()))
    return table


def _named(table: pa.Table, said: list[str]) -> pa.Table:
    """The table with names trimmed, each of them there and there once, and without the index that pandas saves."""
    names = [name.strip() for name in table.column_names]
    if names != table.column_names:
        said.append("spaces around column names cut off")
    if names and names[0] in ("", "Unnamed: 0") and _counts(table.column(0)):
        said.append("the unnamed first column counts the rows and was left out")
        table, names = table.remove_column(0), names[1:]
    if "" in names:
        raise GoodfitError(
            f"expected a name for each column, got none for column {names.index('') + 1} of {len(names)}; name it."
        )
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        got = ", ".join(shown(name) for name in twice[:10])
        raise GoodfitError(f"expected each column name once, got more than one {got}; rename them.")
    return table.rename_columns(names)


def _counts(column: pa.ChunkedArray) -> bool:
    """Whether the cells are 0, 1, 2, ... or 1, 2, 3, ..."""
    import numpy as np
    import pyarrow as pa

    try:
        cells = column.cast(pa.int64()).to_numpy()
    except pa.ArrowException:
        return False
    return cells[0] in (0, 1) and bool((cells == np.arange(cells[0], cells[0] + len(cells))).all())


def _known(names: list[str], asked: dict[str, tuple[str, ...]]) -> None:
    for flag, columns in asked.items():
        for column in columns:
            if column not in names:
                raise GoodfitError(
                    f"{option(flag, column)} names no column; {nearest(column, [shown(name) for name in names])}"
                )
    both = sorted(set(asked["text"]) & set(asked["numbers"]))
    if both:
        raise GoodfitError(f"column {shown(both[0])}: expected text or numbers, got both; leave one of them out.")
