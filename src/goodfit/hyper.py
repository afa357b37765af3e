"""A number of a regularizer, with what is known about it: its range, its scale, and the value that switches it off."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from goodfit.errors import GoodfitError
from goodfit.schedules.schedule import Schedule

__all__ = ["Hyper", "hyper", "hypers", "lifted", "plain", "validate"]

S = TypeVar("S")


@dataclass(frozen=True)
class Hyper:
    """What is known of one number.

    valid is the interval of allowed values, in mathematical notation: "[0, 1)". low and high bound the values worth
    searching, log says that they are searched on a logarithmic scale. off is the value at which the regularizer is the
    identity, None for a number that does not switch. fixed marks structure: a number that no schedule may change.
    required marks a number without a usual value, and instead a class whose values may stand in the number's place.
    """

    default: float
    valid: str
    low: float
    high: float
    off: float | None = None
    log: bool = False
    unit: str = ""
    fixed: bool = False
    required: bool = False
    instead: type | None = None

    @property
    def integer(self) -> bool:
        return isinstance(self.default, int)

    def admits(self, value: float) -> bool:
        """Whether `value` lies in the valid interval (an integer number also admits inf, where the interval does)."""
        lower, upper = (float(end) for end in self.valid[1:-1].split(","))
        above = value >= lower if self.valid[0] == "[" else value > lower
        below = value <= upper if self.valid[-1] == "]" else value < upper
        whole = not self.integer or math.isinf(value) or value % 1 == 0
        return above and below and whole

    @property
    def rule(self) -> str:
        """The valid interval as an error message says it."""
        lower, upper = (end.strip() for end in self.valid[1:-1].split(","))
        kind = "an integer " if self.integer else ""
        if (lower, upper) == ("-inf", "inf"):
            return "a finite number"
        if upper == "inf":
            closed = " (or inf)" if self.integer and self.valid[-1] == "]" else ""
            return f"{kind}{'>=' if self.valid[0] == '[' else '>'} {lower}{closed}"
        return f"{kind}in {self.valid}"


def hyper(
    default: float,
    *,
    valid: str,
    low: float,
    high: float,
    off: float | None = None,
    log: bool = False,
    unit: str = "",
    fixed: bool = False,
    required: bool = False,
    instead: type | None = None,
) -> Any:
    """Declare a number of a regularizer: a dataclass field that carries a `Hyper`."""
    known = Hyper(default, valid, low, high, off, log, unit, fixed, required, instead)
    return field(default=MISSING if required else default, metadata={"hyper": known})


def hypers(spec: Any) -> Iterator[tuple[str, Hyper]]:
    """The numbers of a regularizer (class or value), in written order."""
    for f in fields(spec):
        if "hyper" in f.metadata:
            yield f.name, f.metadata["hyper"]


def validate(spec: Any) -> None:
    """Refuse a number outside its valid interval, and a schedule where a number is part of the structure.

    Numbers of other libraries become Python's own.
    """
    kind = type(spec).__name__
    for name, known in hypers(spec):
        value = plain(getattr(spec, name))
        object.__setattr__(spec, name, value)
        if known.instead is not None and isinstance(value, known.instead):
            continue
        where = f"{kind}.{name} must be {known.rule}, got {name}={value!r}"
        if isinstance(value, Schedule):
            if known.fixed:
                raise GoodfitError(f"{kind}.{name} is fixed before training starts: give a number, not {value!r}.")
            values = value.ends
        elif isinstance(value, bool) or not isinstance(value, int | float):
            other = f", or a {known.instead.__name__}" if known.instead is not None else ""
            raise GoodfitError(f"{where} ({type(value).__name__}){other}.")
        else:
            values = (value,)
        if not all(known.admits(v) for v in values):
            raise GoodfitError(f"{where}.")
        if known.integer and isinstance(value, float) and math.isfinite(value):
            object.__setattr__(spec, name, int(value))


def plain(value: Any) -> Any:
    """A number of NumPy, or a tensor of one number, as Python's own, so that a text of it reads back."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value


def lifted(spec: S, **numbers: Any) -> S:
    """Copy `spec` with other numbers, unchecked: tensors of K members, or the values of schedules at one step.

    Such copies live inside a run or a stack; they are never printed, compared or hashed.
    """
    copy = object.__new__(type(spec))
    copy.__dict__.update(spec.__dict__, **numbers)
    return copy
