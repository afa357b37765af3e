"""The calls of a step, in their order: none is forgotten without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from goodfit.errors import GoodfitError

__all__ = ["Calls"]

_BEFORE = {"gradient": "loss", "move": "gradient", "step": "move"}
_LINE = {"loss": "stack.loss(x, y).sum().backward()", "gradient": "stack.gradient()", "move": "stack.move()"}


class Calls:
    """Which call of a step was the last, "" between two steps. viewing: whether the models hold a view."""

    def __init__(self) -> None:
        self.last = ""
        self.viewing = False

    @contextmanager
    def making(self, call: str) -> Iterator[None]:
        """A call; one that comes too early is refused, and one that fails was not made."""
        needed = _BEFORE.get(call)
        if needed is not None and self.last != needed:
            raise GoodfitError(f"stack.{call}() needs {_LINE[needed]} before it, in each step.")
        if call == "loss" and self.last in ("gradient", "move"):
            after = "move" if self.last == "gradient" else "step"
            raise GoodfitError(f"stack.loss comes behind the step that has begun: call stack.{after}(), or stack.zero_grad().")
        yield
        if call != "loss" or torch.is_grad_enabled():
            self.last = "" if call == "step" else call

    def drop(self) -> None:
        """Begin the step anew; a loss may still get its backward."""
        self.last = "loss" if self.last == "loss" else ""

    @contextmanager
    def within_view(self) -> Iterator[None]:
        """The models hold a view within."""
        self.viewing = True
        try:
            yield
        finally:
            self.viewing = False

    def between(self, call: str, gradients: bool) -> None:
        """Refuse a call in the middle of a step, which would be lost, or within a view; gradients: whether there are any."""
        if self.last in ("gradient", "move") or (self.last == "loss" and gradients):
            raise GoodfitError(
                f"{call} comes between two steps: end this one by stack.gradient(), stack.move() and stack.step(), or drop it "
                "by stack.zero_grad()."
            )
        if self.viewing and call != "stack.epoch":
            raise GoodfitError(f"{call} comes behind `with stack.view(...)`, within which weights may be averages.")
        self.last = ""
