"""Change over time: a number of a regularizer that depends on the step.

A schedule is a frozen value with a parsable repr. Time is the number of completed optimizer steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

from goodfit.errors import GoodfitError

__all__ = ["Linear", "Schedule", "linear"]


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


@dataclass(frozen=True)
class Linear(Schedule):
    start: float
    stop: float
    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise GoodfitError(f"linear needs one of steps= and epochs=, got {self!r}.")
        length = self.steps if self.steps is not None else self.epochs
        if not (isinstance(length, int | float) and length > 0 and math.isfinite(length)):
            raise GoodfitError(f"linear must last a finite number of steps or epochs > 0, got {self!r}.")

    def __repr__(self) -> str:
        length = f"steps={self.steps!r}" if self.steps is not None else f"epochs={self.epochs!r}"
        return f"linear({self.start!r}, {self.stop!r}, {length})"

    @property
    def ends(self) -> tuple[float, ...]:
        return (self.start, self.stop)

    def at(self, step: int) -> float:
        if self.steps is None:
            raise GoodfitError(f"{self!r} counts epochs: resolve it with in_steps(steps_per_epoch) first.")
        share = min(max(step / self.steps, 0.0), 1.0)
        return self.start * (1 - share) + self.stop * share

    def in_steps(self, steps_per_epoch: int | None) -> Schedule:
        if self.epochs is None:
            return self
        if steps_per_epoch is None:
            raise GoodfitError(f"{self!r} counts epochs, but the steps of an epoch are unknown here; give steps= instead.")
        return replace(self, steps=max(1, round(self.epochs * steps_per_epoch)), epochs=None)


def linear(start: float, stop: float, *, steps: int | None = None, epochs: float | None = None) -> Any:
    """A straight line from `start` to `stop` over `steps` (or `epochs`), then constant.

    >>> half = linear(0.0, 0.5, steps=1000)
    >>> half.at(0), half.at(500), half.at(2000)
    (0.0, 0.25, 0.5)
    """
    return Linear(start, stop, steps, epochs)
