"""The type of a column: cells of text become numbers, truth values or dates; Arrow's many types become five.

The five are int64, float64, bool, string and timestamp in microseconds. Nothing is lost in silence: a column is read
without loss, or stays text with a note, or is an error that names the cell and the way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from goodfit.tabular.cells import Notes, Rules, every, fail, match, option, shown, without
from goodfit.tabular.numbers import as_integers, as_numbers, finite

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["infer", "narrow"]

_GAPS = ("", "NA", "N/A", "n/a", "na", "NaN", "nan", "null", "NULL", "None", "none", "?", "-", "#N/A")
_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
_TIME = r"\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?"
_NAIVE = rf"^\d{{4}}-\d{{2}}-\d{{2}}([T ]{_TIME})?$"
_ZONED = rf"^\d{{4}}-\d{{2}}-\d{{2}}[T ]{_TIME}(Z|[+-]\d{{2}}:?\d{{2}})$"


def infer(name: str, cells: pa.ChunkedArray, rules: Rules, notes: Notes) -> pa.ChunkedArray:
    """The column `name` of a text file, typed by what all of its cells are."""
    import pyarrow.compute as pc

    trimmed = pc.utf8_trim_whitespace(cells)
    if name not in rules.text:
        bare = without(trimmed, (*_GAPS, *rules.missing))
        if bare.null_count == len(bare) and name not in rules.numbers:
            notes.add(name, "every cell is missing")
            return bare
        for typed in (as_numbers, _truths, _dates):
            found = typed(name, bare, rules, notes)
            if found is not None:
                return found
    if not every(pc.equal(trimmed, cells)):
        notes.add(name, "spaces around the text cut off")
    return without(trimmed, ("", *rules.missing))


def narrow(name: str, column: pa.ChunkedArray, rules: Rules, notes: Notes) -> pa.ChunkedArray:
    """The column `name` of a typed file, in one of the five types."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_, kind = pa.types, column.type
    if isinstance(kind, pa.BaseExtensionType):
        return narrow(name, column.cast(kind.storage_type), rules, notes)
    if is_.is_dictionary(kind):
        plain = column.cast(kind.value_type)
        return narrow(name, plain.cast(pa.string()) if is_.is_integer(kind.value_type) else plain, rules, notes)
    string = is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind)
    if string or (name in rules.text and is_.is_primitive(kind)):
        text = without(pc.utf8_trim_whitespace(column.cast(pa.string())), rules.missing)
        return infer(name, text.fill_null(""), rules, notes) if name in rules.numbers else text
    if is_.is_null(kind):
        notes.add(name, "every cell is missing")
        return column.cast(pa.string())
    if is_.is_boolean(kind):
        return column
    if is_.is_integer(kind):
        return as_integers(name, column, rules, notes)
    if is_.is_floating(kind) or is_.is_decimal(kind):
        return finite(name, column.cast(pa.float64()), rules)
    return _moments(name, column)


def _moments(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dates as timestamps in UTC, times of day and durations as seconds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_, kind = pa.types, column.type
    if is_.is_date(kind) or is_.is_timestamp(kind):
        zoned = pa.timestamp("us", getattr(kind, "tz", None))
        return pc.cast(column, options=pc.CastOptions(zoned, allow_time_truncate=True)).cast(pa.timestamp("us"))
    if not is_.is_time(kind) and not is_.is_duration(kind):
        fail(name, f"expected numbers, text or dates, got {shown(kind)}; leave it out with {option('drop', name)}")
    ticks = (column.cast(pa.int32()) if is_.is_time32(kind) else column).cast(pa.int64())
    return pc.divide(pc.cast(ticks, pa.float64(), safe=False), {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[kind.unit])


def _truths(name: str, bare: pa.ChunkedArray, rules: Rules, notes: Notes) -> pa.ChunkedArray | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not every(pc.or_kleene(pc.is_in(bare, pa.array([*_TRUE, *_FALSE])), pc.is_null(bare))):
        return None
    return pc.if_else(pc.is_null(bare), pa.scalar(None, pa.bool_()), pc.is_in(bare, pa.array(_TRUE)))


def _dates(name: str, bare: pa.ChunkedArray, rules: Rules, notes: Notes) -> pa.ChunkedArray | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    zone = "UTC" if every(match(bare, _ZONED)) else None
    if not zone and not every(match(bare, _NAIVE)):
        return None
    try:
        cut = pc.replace_substring_regex(bare, r"(\.\d{6})\d+", r"\1")
        return cut.cast(pa.timestamp("us", zone)).cast(pa.timestamp("us"))
    except pa.ArrowInvalid:
        notes.add(name, "holds dates that do not exist, read as text")
        return None
