"""Schedules of dropout rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from goodfit.errors import GoodfitError
from goodfit.schedules.schedule import Lasting

__all__ = ["curriculum", "early", "late"]


@dataclass(frozen=True, repr=False)
class _Rate(Lasting):
    """A schedule between 0 and p."""

    p: float

    @property
    def numbers(self) -> list[str]:
        return [repr(self.p)]

    @property
    def ends(self) -> tuple[float, ...]:
        return (0.0, self.p)


@dataclass(frozen=True, repr=False)
class Curriculum(_Rate):
    name: ClassVar[str] = "curriculum"

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.gamma, int | float) and 0 < self.gamma < math.inf):
            raise GoodfitError(f"curriculum.gamma must be a finite number > 0, got {self!r}.")

    @property
    def numbers(self) -> list[str]:
        return [*super().numbers, f"gamma={self.gamma!r}"]

    def value(self, share: float) -> float:
        return -self.p * math.expm1(-self.gamma * share)


@dataclass(frozen=True, repr=False)
class Early(_Rate):
    name: ClassVar[str] = "early"

    def value(self, share: float) -> float:
        return self.p * max(1 - share, 0.0)


@dataclass(frozen=True, repr=False)
class Late(_Rate):
    name: ClassVar[str] = "late"

    def value(self, share: float) -> float:
        return self.p if share >= 1 else 0.0


def curriculum(p: float, *, gamma: float = 10.0, steps: int | None = None, epochs: float | None = None) -> Any:
    """From 0 toward p, fast and then slowly: p · (1 − exp(−gamma · t)), with t the share of `steps` (or `epochs`) that is over.

    It goes on behind them; at their end, with gamma=10, it has come within p/20000. Morerio et al. 2017, Curriculum dropout,
    arXiv 1703.06229, where gamma is 10 over the whole training.

    >>> rate = curriculum(0.5, steps=1000)
    >>> rate.at(0), round(rate.at(100), 4), round(rate.at(1000), 4)
    (0.0, 0.3161, 0.5)
    """
    return Curriculum(p, gamma, steps=steps, epochs=epochs)


def early(p: float, *, steps: int | None = None, epochs: float | None = None) -> Any:
    """From p in a straight line to 0 over the first `steps` (or `epochs`), then 0: it helps a model that underfits.

    Liu et al. 2023, Dropout reduces underfitting, arXiv 2303.01500.

    >>> rate = early(0.1, steps=1000)
    >>> rate.at(0), rate.at(500), rate.at(1000)
    (0.1, 0.05, 0.0)
    """
    return Early(p, steps=steps, epochs=epochs)


def late(p: float, *, steps: int | None = None, epochs: float | None = None) -> Any:
    """0 for the first `steps` (or `epochs`), then p. Liu et al. 2023, Dropout reduces underfitting, arXiv 2303.01500.

    >>> rate = late(0.4, steps=1000)
    >>> rate.at(0), rate.at(999), rate.at(1000)
    (0.0, 0.0, 0.4)
    """
    return Late(p, steps=steps, epochs=epochs)
