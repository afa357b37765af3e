"""Which λ a path goes through."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from goodfit.errors import GoodfitError
from goodfit.paths.problem import Problem

__all__ = ["below", "checked", "climbing", "known_range"]

EPS = 1e-3


def checked(lams: Any, problem: Problem) -> list[float]:
    """The λ that the user wants, from the smallest up."""
    try:
        found = [float(lam) for lam in lams]
    except (TypeError, ValueError):
        raise GoodfitError(f"lams must be numbers, got {lams!r:.80}; write lams=[1e-4, 1e-3, 1e-2].") from None
    if not found or any(not math.isfinite(lam) or lam <= 0 for lam in found):
        raise GoodfitError(f"lams must be positive and finite, at least one, got {lams!r:.80}.")
    if any(b <= a for a, b in pairwise(found)):
        raise GoodfitError(f"lams must increase from the first to the last, got {lams!r:.80}; sort them.")
    for lam in found:
        problem.at(lam)  # the regularizer refuses what is out of its range
    return found


def below(lam_max: float, count: int) -> list[float]:
    """`count` values from λ_max / 1000 to λ_max, evenly on the logarithmic scale.

    >>> [round(lam, 6) for lam in below(1.0, 4)]
    [0.001, 0.01, 0.1, 1.0]
    """
    return [*np.geomspace(lam_max * EPS, lam_max, count).tolist()[:-1], lam_max] if count > 1 else [lam_max]


def known_range(problem: Problem, count: int) -> list[float]:
    """The range worth searching of a number that makes no zeros, so that no λ_max ends it."""
    known = problem.known
    even = np.geomspace if known.log and known.low > 0 else np.linspace
    return [float(lam) for lam in even(known.low, known.high, count)]


def climbing(low: float, high: float, count: int) -> Iterator[float]:
    """λ from `low` up: about `count` to the guess `high`, then in steps of at least two, for as long as one takes.

    >>> [round(lam) for lam, _ in zip(climbing(1, 100, 3), range(5))]
    [1, 10, 100, 1000, 10000]
    """
    factor = (high / low) ** (1 / max(count - 1, 1))
    lam, taken = low, 0
    while lam < 1e30:
        yield lam
        taken += 1
        lam *= factor if taken < count else max(factor, 2.0)
