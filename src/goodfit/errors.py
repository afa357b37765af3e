"""One error voice for the whole package: expected; where; got; do this."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["GoodfitError", "GoodfitWarning", "listed", "nearest"]


class GoodfitError(ValueError):
    """Something the user can mend: one line that says what was expected, where, what came, and what to do."""


class GoodfitWarning(UserWarning):
    """Something that was done otherwise than asked, or left out, and why."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the tail of an error message: the names closest to `name`, else all of them.

    >>> nearest("Dropuot", ["Dropout", "L2"])
    'did you mean Dropout?'
    """
    names = list(known)
    lowered = {n.lower(): n for n in reversed(names)}
    close = [lowered[n] for n in get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {listed(names, 20)}" if names else "there are none"


def listed(names: Iterable[object], most: int = 8) -> str:
    """Names for one line of text, each once, the first `most`."""
    shown = list(dict.fromkeys(map(str, names)))
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")
