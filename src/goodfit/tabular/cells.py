"""What a column is asked: which cells match, how many, which is first; and how an answer is told in one line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any, NoReturn

from goodfit.errors import GoodfitError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Notes", "Rules", "amounts", "at", "count", "every", "fail", "first", "match", "option", "shown", "some", "without"]


@dataclass(frozen=True)
class Rules:
    """What the caller said: cells that are missing, columns that are text or numbers, whether 1,5 is a number."""

    missing: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    comma: bool = False


class Notes:
    """What was decided about columns; those of which the same is to be said share one line."""

    def __init__(self) -> None:
        self._columns: dict[str, list[str]] = {}

    def add(self, column: str, what: str) -> None:
        """Say `what` of `column`."""
        self._columns.setdefault(what, []).append(shown(column))

    def lines(self) -> list[str]:
        """One line for each thing said."""
        return [_line(columns, what) for what, columns in self._columns.items()]


def _line(columns: list[str], what: str) -> str:
    more = f" and {len(columns) - 5} more" if len(columns) > 5 else ""
    return f"column{'s' if len(columns) > 1 else ''} {', '.join(columns[:5])}{more}: {what}"


def shown(value: object, longest: int = 60) -> str:
    """The text of a name or a cell, cut to a length and escaped where it would not print on one line."""
    text = str(value)
    cut = text if len(text) <= longest else text[: longest - 3] + "..."
    return cut if cut and cut.isprintable() and cut == cut.strip() else repr(cut)


def option(flag: str, value: str) -> str:
    """The flag of the command line as it is to be typed."""
    word = quote(value) if len(value) <= 60 and value.isprintable() else shown(value)
    return f"--{flag}={word}" if value.startswith("-") else f"--{flag} {word}"


def fail(column: str, what: str) -> NoReturn:
    """Raise the error that says `what` of `column`."""
    raise GoodfitError(f"column {shown(column)}: {what}.") from None


def match(cells: Any, pattern: str) -> Any:
    """Which cells match; a missing one neither does nor does not."""
    import pyarrow.compute as pc

    return pc.match_substring_regex(cells, pattern)


def count(mask: Any) -> int:
    """How many are true."""
    import pyarrow.compute as pc

    return int(pc.sum(mask).as_py() or 0)


def some(mask: Any) -> bool:
    """Whether any is true."""
    import pyarrow.compute as pc

    return bool(pc.any(mask).as_py())


def every(mask: Any) -> bool:
    """Whether none is false."""
    import pyarrow.compute as pc

    return bool(pc.all(mask, min_count=0).as_py())


def at(mask: Any) -> int:
    """Place of the first that is true."""
    import pyarrow.compute as pc

    return int(pc.index(mask, True).as_py())


def first(column: Any, mask: Any) -> str:
    """The first cell of which `mask` is true, with its row, as in 'abc' in row 17."""
    place = at(mask)
    cell = column[place].as_py()
    return f"{shown(repr(cell) if isinstance(cell, str) else cell)} in row {place + 1}"


def without(column: pa.ChunkedArray, gaps: Iterable[object]) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    is_gap = pc.is_in(column, pa.array(list(gaps), column.type))
    return pc.if_else(is_gap, pa.scalar(None, column.type), column)


def amounts(texts: Iterable[str]) -> list[float]:
    amounts = []
    for text in texts:
        try:
            amounts.append(float(text))
        except ValueError:
            continue
    return amounts
