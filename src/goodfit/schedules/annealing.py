"""From one number to another: in a straight line, by a cosine, in steps; and a gentle start."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from goodfit.errors import GoodfitError
from goodfit.schedules.schedule import Lasting, Schedule

__all__ = ["cosine", "linear", "step", "warmup"]


@dataclass(frozen=True, repr=False)
class Linear(Lasting):
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
class Cosine(Lasting):
    name: ClassVar[str] = "cosine"

    start: float
    stop: float
    restart: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart is not None and not (isinstance(self.restart, int | float) and 1 <= self.restart < math.inf):
            raise GoodfitError(f"cosine.restart must be None, or how many times as long each cycle is, >= 1, got {self!r}.")

    @property
    def numbers(self) -> list[str]:
        return [repr(self.start), repr(self.stop), *([] if self.restart is None else [f"restart={self.restart!r}"])]

    @property
    def ends(self) -> tuple[float, ...]:
        return (self.start, self.stop)

    def value(self, share: float) -> float:
        length = 1.0
        while self.restart is not None and share >= length:
            share, length = share - length, length * self.restart
        high = (1 + math.cos(math.pi * min(share / length, 1.0))) / 2
        return self.start * high + self.stop * (1 - high)


@dataclass(frozen=True, repr=False)
class Steps(Lasting):
    name: ClassVar[str] = "step"

    start: float
    stop: float
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.factor, int | float) and 0 < self.factor < 1):
            raise GoodfitError(f"step.factor must lie between 0 and 1, got {self!r}.")
        if not self.start > self.stop >= 0:
            raise GoodfitError(f"step goes down from a number > stop >= 0, got {self!r}.")

    @property
    def numbers(self) -> list[str]:
        return [repr(self.start), repr(self.stop), f"factor={self.factor!r}"]

    @property
    def ends(self) -> tuple[float, ...]:
        return (self.start, self.stop)

    def value(self, share: float) -> float:
        return max(self.start * self.factor ** math.floor(share), self.stop)


@dataclass(frozen=True, repr=False)
class Warmup(Lasting):
    name: ClassVar[str] = "warmup"

    then: Any
    start: float = 0.0

    @property
    def numbers(self) -> list[str]:
        return [repr(self.then), *([] if self.start == 0 else [f"start={self.start!r}"])]

    @property
    def ends(self) -> tuple[float, ...]:
        return (self.start, *(self.then.ends if isinstance(self.then, Schedule) else (self.then,)))

    def value(self, share: float) -> float:
        assert self.steps is not None
        if share < 1:
            return self.start * (1 - share) + self._then(0) * share
        return self._then(round(share * self.steps) - self.steps)

    def in_steps(self, steps_per_epoch: int | None) -> Schedule:
        then = self.then.in_steps(steps_per_epoch) if isinstance(self.then, Schedule) else self.then
        return super(Warmup, replace(self, then=then)).in_steps(steps_per_epoch)

    def _then(self, step: int) -> float:
        return self.then.at(step) if isinstance(self.then, Schedule) else float(self.then)


def linear(start: float, stop: float, *, steps: int | None = None, epochs: float | None = None) -> Any:
    """A straight line from `start` to `stop` over `steps` (or `epochs`), then constant.

    >>> half = linear(0.0, 0.5, steps=1000)
    >>> half.at(0), half.at(500), half.at(2000)
    (0.0, 0.25, 0.5)
    """
    return Linear(start, stop, steps=steps, epochs=epochs)


def cosine(
    start: float, stop: float, *, restart: float | None = None, steps: int | None = None, epochs: float | None = None
) -> Any:
    """Half a cosine from `start` to `stop` over `steps` (or `epochs`), then constant; or again and again.

    restart: how many times as long as the one before it each cycle is, >= 1: 1 makes cycles of one length, 2 those of 15, 30
    and 60 epochs. None: one cycle. Loshchilov and Hutter 2017, SGDR, arXiv 1608.03983; the cycles of snapshot ensembles, Huang
    et al. 2017, arXiv 1704.00109.

    >>> lr = cosine(1.0, 0.0, restart=2.0, steps=10)
    >>> [round(lr.at(t), 4) for t in (0, 5, 9, 10, 20, 30)]
    [1.0, 0.5, 0.0245, 1.0, 0.5, 1.0]
    """
    return Cosine(start, stop, restart, steps=steps, epochs=epochs)


def step(start: float, stop: float = 0.0, *, factor: float = 0.1, steps: int | None = None, epochs: float | None = None) -> Any:
    """`start`, multiplied by `factor` every so many `steps` (or `epochs`), never below `stop`.

    >>> lr = step(1.0, 0.05, steps=10)
    >>> lr.at(9), lr.at(10), lr.at(20)
    (1.0, 0.1, 0.05)
    """
    return Steps(start, stop, factor, steps=steps, epochs=epochs)


def warmup(then: Any, *, start: float = 0.0, steps: int | None = None, epochs: float | None = None) -> Any:
    """A straight line from `start` to `then`, a number or a schedule, over `steps` (or `epochs`); then that from its start.

    Goyal et al. 2017, Accurate, large minibatch SGD, arXiv 1706.02677.

    >>> lr = warmup(cosine(1.0, 0.0, steps=10), steps=4)
    >>> [round(lr.at(t), 4) for t in (0, 2, 4, 9, 14)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    return Warmup(then, start, steps=steps, epochs=epochs)
