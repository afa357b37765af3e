"""The shape of rates over the places of a model, as others name the shapes of layer widths."""

from __future__ import annotations

from collections.abc import Callable

from goodfit.errors import GoodfitError, nearest

__all__ = ["refuse_unknown", "shares"]

_SHAPES: dict[str, Callable[[int, int], float]] = {
    "brick": lambda i, n: 1.0,
    "funnel": lambda i, n: (n - i) / n,
    "long_funnel": lambda i, n: min(1.0, (n - i) / (n // 2 + 1)),
    "triangle": lambda i, n: (i + 1) / n,
    "diamond": lambda i, n: min(i + 1, n - i) / ((n + 1) // 2),
    "hexagon": lambda i, n: min(1.0, min(i + 1, n - i) / (n // 3 + 1)),
    "stairs": lambda i, n: 1 - (i // 2) / ((n + 1) // 2),
}


def refuse_unknown(who: str, shape: object) -> None:
    """Refuse a shape that has no formula."""
    if not isinstance(shape, str) or shape not in _SHAPES:
        known = ", ".join(_SHAPES)
        raise GoodfitError(f"{who}.shape must be one of {known}, got shape={shape!r}; {nearest(str(shape), _SHAPES)}")


def shares(shape: str, count: int) -> list[float]:
    """The share of p at each of `count` places, in the order of the forward run: at most 1, reached somewhere, never 0.

    >>> shares("funnel", 4), shares("diamond", 5)
    ([1.0, 0.75, 0.5, 0.25], [0.3333333333333333, 0.6666666666666666, 1.0, 0.6666666666666666, 0.3333333333333333])
    """
    return [_SHAPES[shape](i, count) for i in range(count)]
