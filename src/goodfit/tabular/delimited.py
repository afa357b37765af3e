"""Text files with a separator: the whole file is checked as it streams by, then read with every cell as text.

pyarrow is strict about the shape of rows, but takes NUL bytes, quotes that are never closed and any header as they come;
those are looked for here. A fault is told with the row it is in, the first row below the header being row 1.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goodfit.errors import GoodfitError
from goodfit.tabular.cells import match, shown, some

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["read_delimited"]

_CHUNK = 1 << 20
_BLOCK = 1 << 24  # the longest row that pyarrow can take
_NAMES = {",": "','", ";": "';'", "\t": "a tab", "|": "'|'"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def read_delimited(path: Path, encoding: str, separator: str | None) -> tuple[pa.Table, str, list[str]]:
    """The table with the header's names as they stand and text in every cell, the separator, and notes."""
    head, quotes = _checked(path, encoding)
    separator, width = _layout(head, separator)
    table = _cells(path, encoding, separator, width)
    # a quote that is never closed hides rows in a cell; only the slower reader of the standard library minds
    if quotes % 2 or (quotes and any(some(match(column, "[\r\n]")) for column in table.columns)):
        fault = _fault(path, encoding, separator, width)
        if fault:
            raise GoodfitError(fault)
    header = [column[0].as_py() for column in table.columns]
    _no_data(header)
    notes = [] if separator == "," or width == 1 else [f"read with {_NAMES[separator]} as separator"]
    if width == 1:
        notes.append("one column: the first line holds none of the separators , ; tab |")
    numeric = [name.strip() for name in header if _NUMBER.fullmatch(name.strip())]
    if numeric:
        notes.append(
            f"{len(numeric)} of {width} column names are numbers ({numeric[0]}): check that the first line is a header"
        )
    return table.slice(1).rename_columns(header), separator, notes


def _checked(path: Path, encoding: str) -> tuple[str, int]:
    """Go through the file once, refuse bytes that are no text, and give its beginning and the number of its quotes."""
    decoder = _decoder(encoding)
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    head, line, quotes = "", 1, 0
    with _stream(path) as raw:
        while True:
            chunk = raw.read(_CHUNK)
            if not head:
                _single_bytes(chunk, encoding)
            try:
                text = lines.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                _undecodable(error, encoding, line)
            if "\0" in text:
                line += text.count("\n", 0, text.index("\0"))
                raise GoodfitError(
                    f"line {line}: expected text, got a NUL byte; the file is damaged or is no text, write it anew."
                )
            head = head or text.removeprefix("\ufeff")
            line += text.count("\n")
            quotes += text.count('"')
            if not chunk:
                break
    if not head.strip():
        raise GoodfitError("expected a header and rows, got an empty file; write the table to it.")
    return head, quotes


def _stream(path: Path) -> Any:
    """The bytes of the file, unpacked where its name ends in .gz."""
    import pyarrow as pa

    return pa.input_stream(str(path), compression="gzip" if path.suffix.lower() == ".gz" else None)


def _decoder(encoding: str) -> codecs.IncrementalDecoder:
    try:
        b"a".decode(encoding, "ignore")
        return codecs.getincrementaldecoder(encoding)()
    except (LookupError, ValueError):
        raise GoodfitError(f"encoding is the name of one, such as utf-8, utf-16 or latin-1, got {shown(encoding)}.") from None


def _undecodable(error: UnicodeDecodeError, encoding: str, line: int) -> None:
    before = error.object[: error.start].decode(encoding, "ignore")
    line += len(re.findall("\r\n|\r|\n", before))
    byte = f"0x{error.object[error.start]:02x}"
    way = "" if encoding == "latin-1" else "; if it was written on Windows or is older, use --encoding latin-1"
    raise GoodfitError(f"line {line}: expected {encoding}, got the byte {byte}{way}.") from None


def _single_bytes(chunk: bytes, encoding: str) -> None:
    """Refuse UTF-16 and UTF-32, told by their mark or by the zeros between their letters, under another name."""
    if encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32", "utf16", "utf32")):
        return
    start = chunk[:4096]
    zeros = [start[i::4].count(0) / max(1, len(start[i::4])) > 0.7 for i in range(4)]
    wide = start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) or sum(zeros) == 3
    if wide or start.startswith((b"\xff\xfe", b"\xfe\xff")) or zeros in ([False, True] * 2, [True, False] * 2):
        marked = start.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
        name = ("utf-32" if wide else "utf-16") + ("" if marked else "-be" if zeros[0] else "-le")
        raise GoodfitError(f"expected {encoding}, got {name[:6].upper()}; use --encoding {name}.")


def _layout(head: str, separator: str | None) -> tuple[str, int]:
    """The separator that cuts the header and the rows below it alike, and into how many cells it cuts the header."""
    best, found = (-1.0, 0), (separator or ",", 1)
    for one in [separator] if separator else _NAMES:
        rows = list(islice(_rows(io.StringIO(head, newline=""), one), 50))
        width = len(rows[0]) if rows else 1
        alike = sum(len(row) == width for row in rows[1:]) / max(1, len(rows) - 1)
        if width > 1 and (alike, width) > best:
            best, found = (alike, width), (one, width)
    return found


def _rows(text: Any, separator: str) -> Iterator[list[str]]:
    try:
        yield from (row for row in csv.reader(text, delimiter=separator) if row)
    except csv.Error:
        return


def _cells(path: Path, encoding: str, separator: str, width: int) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv as pacsv

    names = [str(i) for i in range(width)]
    try:
        with _stream(path) as raw:
            return pacsv.read_csv(
                raw,
                pacsv.ReadOptions(column_names=names, encoding=encoding, block_size=_BLOCK),
                pacsv.ParseOptions(delimiter=separator, newlines_in_values=True),
                pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
            )
    except pa.ArrowInvalid as error:
        known = _fault(path, encoding, separator, width)
        raise GoodfitError(
            known or f"expected rows cut by {_NAMES[separator]}, got {shown(error)}; write the file anew."
        ) from None


def _fault(path: Path, encoding: str, separator: str, width: int) -> str | None:
    """What is wrong with the first row that is not as the header, or whose quotes do not match."""
    limit, number = csv.field_size_limit(2**31 - 1), -1
    text = io.TextIOWrapper(_stream(path), "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding, newline="")
    try:
        with text:
            rows = (row for row in csv.reader(text, delimiter=separator, strict=True) if row)
            for number, row in enumerate(rows):
                if len(row) != width:
                    cells = f"expected {width} {'cell' if width == 1 else 'cells'} as in the header, got {len(row)}"
                    return f"row {number}: {cells}; mend the row, or put quotes around text that holds {_NAMES[separator]}."
    except csv.Error:
        where = f"row {number + 1}" if number >= 0 else "the header"
        return f'{where}: expected a closing quote at the end of the cell, got none; close it, or write "" for one in text.'
    finally:
        csv.field_size_limit(limit)
    return None


def _no_data(header: list[str]) -> None:
    names = [name.strip() for name in header]
    numeric = [name for name in names if _NUMBER.fullmatch(name)]
    fractions = [name for name in numeric if not name.lstrip("+-").isdigit()]
    if len(numeric) == len(names) or 2 * len(fractions) >= len(names):
        got = ", ".join(shown(name) for name in names[:4])
        raise GoodfitError(
            f"the first line must be the column names, got {got}{', ...' if len(names) > 4 else ''}; add a header."
        )
