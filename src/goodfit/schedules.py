"""Change over time: a number of a regularizer that depends on the step.

A schedule is a frozen value with a parsable repr. Time is the number of completed optimizer steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from goodfit.errors import GoodfitError

__all__ = ["Curriculum", "Early", "Late", "Linear", "Schedule", "curriculum", "early", "late", "linear"]


class Schedule(ABC):
    """A number as a function of the completed optimizer steps."""

    @property
    @abstractmethod
    def ends(self) -> tuple[float, ...]:
        """Values that bound all others, for the range check."""

    @abstractmethod
    def at(self, step: int) -> float:
        """The number after `step` completed optimizer steps."""

    @abstractmethod
    def in_steps(self, steps_per_epoch: int | None) -> Schedule:
        """The same schedule with its length in steps; refuses epochs where the steps of an epoch are unknown."""


@dataclass(frozen=True, repr=False, kw_only=True)
class _Lasting(Schedule):
    """A schedule with a length, in steps or in epochs; its name and its numbers are those of the function that makes it."""

    name: ClassVar[str]

    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        if not all(hasattr(number, "__float__") and not isinstance(number, bool) for number in self.ends):
            raise GoodfitError(f"{self.name} goes between numbers, got {self!r}.")
        if (self.steps is None) == (self.epochs is None):
            raise GoodfitError(f"{self.name} needs one of steps= and epochs=, got {self!r}.")
        length = self.steps if self.steps is not None else self.epochs
        if not (isinstance(length, int | float) and length > 0 and math.isfinite(length)):
            raise GoodfitError(f"{self.name} must last a finite number of steps or epochs > 0, got {self!r}.")

    def __repr__(self) -> str:
        length = f"steps={self.steps!r}" if self.steps is not None else f"epochs={self.epochs!r}"
        return f"{self.name}({', '.join([*self.numbers, length])})"

    @property
    @abstractmethod
    def numbers(self) -> list[str]:
        """Its other numbers, as they are written."""

    @abstractmethod
    def value(self, share: float) -> float:
        """The number after this share of the length: 0 at the start, 1 at its end, more behind it."""

    def at(self, step: int) -> float:
        if self.steps is None:
            raise GoodfitError(f"{self!r} counts epochs: give steps=..., or let gf.fit count them.")
        return self.value(max(step / self.steps, 0.0))

    def in_steps(self, steps_per_epoch: int | None) -> Schedule:
        if self.epochs is None:
            return self
        if steps_per_epoch is None:
            raise GoodfitError(f"{self!r} counts epochs, but the steps of an epoch are unknown here; give steps= instead.")
        return replace(self, steps=max(1, round(self.epochs * steps_per_epoch)), epochs=None)


@dataclass(frozen=True, repr=False)
class Linear(_Lasting):
    name: ClassVar[str] = "linear"

    start: float
    stop: float

    @property
    def numbers(self) -> list[str]:
        return [repr(self.start), repr(self.stop)]

    @property
    def ends(self) -> tuple[float, ...]:
        return (self.start, self.stop)

    def value(self, share: float) -> float:
        share = min(share, 1.0)
        return self.start * (1 - share) + self.stop * share


@dataclass(frozen=True, repr=False)
class _Rate(_Lasting):
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


def linear(start: float, stop: float, *, steps: int | None = None, epochs: float | None = None) -> Any:
    """A straight line from `start` to `stop` over `steps` (or `epochs`), then constant.

    >>> half = linear(0.0, 0.5, steps=1000)
    >>> half.at(0), half.at(500), half.at(2000)
    (0.0, 0.25, 0.5)
    """
    return Linear(start, stop, steps=steps, epochs=epochs)


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
