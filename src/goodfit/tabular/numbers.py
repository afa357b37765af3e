"""Columns of numbers: recognised cell by cell, read without loss, or refused with the cell that is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from goodfit.tabular.cells import Notes, Rules, amounts, at, count, every, fail, first, match, option, some, without

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["as_integers", "as_numbers", "finite"]

_EXACT = 2**53  # beyond it a float, and so a network, cannot tell a whole number from the next
_CODES = 20  # so few different whole numbers and texts, often repeated, are labels and no slip of the pen
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_WHOLE = r"^[+-]?\d+$"
_PADDED = r"^[+-]?0\d+$"
_COMMA = r"^[+-]?(\d+,\d*|,\d+)([eE][+-]?\d+)?$"
_GROUPED = r"^[+-]?(\d{1,3}(,\d{3})+(\.\d+)?|\d{1,3}(\.\d{3})+,\d+|\d+,\d+)$"
_INFINITE = r"(?i)^[+-]?inf(inity)?$"


def as_numbers(name: str, bare: pa.ChunkedArray, rules: Rules, notes: Notes) -> pa.ChunkedArray | None:
    """The trimmed cells as numbers; None where too few of them look like one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    plain = match(bare, _NUMBER)
    present, forced = len(bare) - bare.null_count, name in rules.numbers
    comma = grouped = infinite = pc.xor(plain, plain)
    if not every(plain):  # a look at every cell is what takes the time
        comma = pc.and_(match(bare, _COMMA), rules.comma)
        grouped = pc.and_not(match(bare, _GROUPED), comma)
        infinite = match(bare, _INFINITE)
    like = pc.or_(pc.or_(plain, comma), pc.or_(grouped, infinite))
    likes, pointed = count(like), pc.and_(plain, pc.match_substring(bare, "."))
    wholes = 0 if some(pointed) else count(match(bare, _WHOLE))
    if not forced:
        enough = likes == present or (likes >= 10 and likes >= 0.9 * present)
        if likes == count(infinite) or not enough:
            return None
        if (
            likes < present
            and wholes == likes
            and (kinds := pc.count_distinct(bare).as_py()) <= _CODES
            and present >= 10 * kinds
        ):
            notes.add(name, "a few codes, numbers and text: read as text")
            return bare
        if wholes == likes and some(match(bare, _PADDED)):
            notes.add(name, "leading zeros kept, read as text; --numbers NAME reads them as numbers")
            return bare
    _refuse(name, bare, grouped, infinite, pc.invert(like))
    if some(comma) and some(pointed):
        fail(
            name, f"expected one decimal sign, got {first(bare, comma)} and {first(bare, pointed)}; use one of them throughout"
        )
    if some(comma):
        notes.add(name, "read with ',' as decimal sign")
    elif rules.comma and some(pointed):
        notes.add(name, "read with '.' as decimal sign")
    if present and wholes == present:
        return _whole(name, bare, forced, notes)
    return finite(name, (pc.replace_substring(bare, ",", ".") if some(comma) else bare).cast(pa.float64()), rules)


def _refuse(name: str, bare: Any, grouped: Any, infinite: Any, other: Any) -> None:
    """Raise for cells that are no number in a column of numbers."""
    text = option("text", name)
    if some(grouped):
        what = f"expected numbers such as 1234.5, got {first(bare, grouped)}"
        fail(name, f"{what}; write them without thousands separators and with a decimal point, or read text with {text}")
    if some(infinite):
        _infinite(name, bare, infinite)
    if some(other):
        cells = f"{count(other)} of {len(bare)} cells"
        way = option("missing", bare[at(other)].as_py())
        what = f"expected numbers, got text in {cells}, first {first(bare, other)}"
        fail(name, f"{what}; make such a cell missing with {way}, or read the column as text with {text}")


def _infinite(name: str, column: pa.ChunkedArray, where: Any) -> None:
    import pyarrow.compute as pc

    spellings = pc.unique(column.filter(where)).to_pylist()[:4]
    out = " ".join(option("missing", str(one)) for one in spellings)
    fail(
        name,
        f"expected finite numbers, got {count(where)} infinite, first {first(column, where)}; make them missing with {out}",
    )


def _whole(name: str, bare: pa.ChunkedArray, forced: bool, notes: Notes) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        whole = pc.utf8_ltrim(bare, characters="+").cast(pa.int64())
        if forced or not some(pc.or_(pc.greater(whole, _EXACT), pc.less(whole, -_EXACT))):
            return whole
    except pa.ArrowInvalid:
        if forced:
            notes.add(name, "too long for whole numbers, rounded to 16 digits")
            return finite(name, bare.cast(pa.float64()), Rules())
    notes.add(name, "whole numbers beyond 2**53 kept as text: they are identifiers")
    return bare


def as_integers(name: str, column: pa.ChunkedArray, rules: Rules, notes: Notes) -> pa.ChunkedArray:
    """Integers of any width as int64, or as text where they do not fit."""
    import pyarrow as pa

    try:
        whole = column.cast(pa.int64())
    except pa.ArrowInvalid:
        notes.add(name, "whole numbers beyond int64 kept as text: they are identifiers")
        return column.cast(pa.string())
    gaps = [int(gap) for gap in amounts(rules.missing) if gap.is_integer() and abs(gap) <= _EXACT]
    return without(whole, gaps)


def finite(name: str, column: pa.ChunkedArray, rules: Rules) -> pa.ChunkedArray:
    """Floats without NaN, which is missing, and without infinity, which is an error."""
    import pyarrow as pa
    import pyarrow.compute as pc

    known = without(pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column), amounts(rules.missing))
    if some(pc.is_inf(known)):
        _infinite(name, known, pc.is_inf(known))
    return known
