"""The calls of a step, in their order: none is forgotten without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from goodfit.errors import GoodfitError

__all__ = ["Calls"]

_BEFORE = {"gradient": "loss", "move": "gradient", "step": "move"}
_LINE = {"loss": "stack.loss(x, y).sum().backward()", "gradient": "stack.gradient()", "move": "stack.move()"}


class Calls:
    """Which call of a step was the last, "" between two steps. viewing: whether the models hold a view."""

    def __init__(self) -> None:
        self.last = ""
        self.viewing = False

    def make(self, call: str) -> None:
        """Note a call; refuse one that comes too early."""
        needed = _BEFORE.get(call)
        if needed is not None and self.last != needed:
            raise GoodfitError(f"stack.{call}() needs {_LINE[needed]} before it, in each step.")
        if call == "loss" and self.last in ("gradient", "move"):
            after = "move" if self.last == "gradient" else "step"
            raise GoodfitError(f"stack.loss comes behind the step that has begun: call stack.{after}().")
        self.last = "" if call == "step" else call

    def drop(self) -> None:
        """Begin the step anew."""
        if self.last == "loss":
            self.last = ""

    @contextmanager
    def within_view(self) -> Iterator[None]:
        """The models hold a view within."""
        self.viewing = True
        try:
            yield
        finally:
            self.viewing = False

    def between(self, call: str) -> None:
        """Refuse a call in the middle of a step, which would be lost, or within a view."""
        if self.last:
            raise GoodfitError(
                f"{call} comes between two steps: end this one by stack.gradient(), stack.move() and stack.step(), or drop it "
                "by stack.zero_grad()."
            )
        if self.viewing and call != "stack.epoch":
            raise GoodfitError(f"{call} comes behind `with stack.view(...)`, within which weights may be averages.")
