"""What all schedules share: a value that depends on the step, and a length in steps or epochs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from goodfit.errors import GoodfitError

__all__ = ["Lasting", "Schedule"]


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
class Lasting(Schedule):
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
