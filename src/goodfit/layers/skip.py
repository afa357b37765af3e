"""A shortcut around layers that run one after the other: the sum behind them gets what went into them."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from goodfit.errors import GoodfitError

__all__ = ["SKIPS", "Branch", "Carried", "Skip", "SkipStart"]


class Carried:
    """What went into a branch, on its way to the sum. Each thread has its own, and a copied or unpickled model another."""

    def __init__(self) -> None:
        self._here = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Carried, ()

    def put(self, x: Tensor) -> None:
        self._here.x = x

    def take(self) -> Tensor:
        """Once, so that nothing is held beyond the sum."""
        x: Tensor | None = self._here.__dict__.pop("x", None)
        if x is None:
            raise GoodfitError(
                "The sum of a skip connection ran without the start of its branch, as when a checkpoint begins or ends between "
                "them: checkpoint the layers of a branch and the activation behind it together."
            )
        return x


class SkipStart(nn.Module):
    """Before the first layer of a branch: notes what goes into it."""

    def __init__(self, carried: Carried) -> None:
        super().__init__()
        self.carried = carried

    def forward(self, x: Tensor) -> Tensor:
        self.carried.put(x)
        return x


class Branch(nn.Identity):
    """Hands over what is added, so that what acts on branches has a module to hang from."""


class Skip(nn.Module):
    """x + f(x) behind the last layer of a branch, f(x) being the input.

    layers: how many layers with weights the branch has. after: whether it hangs at the last of them, else at the activation
    that takes the sum. A branch that was doubled has a `twin`, which runs on the same x, and `shake` makes one of both.
    """

    def __init__(self, carried: Carried, layers: int, after: bool) -> None:
        super().__init__()
        self.carried, self.layers, self.after = carried, layers, after
        self.branch = Branch()

    def extra_repr(self) -> str:
        return f"layers={self.layers}"

    @property
    def doubled(self) -> bool:
        return "twin" in self._modules

    def forward(self, f: Tensor) -> Tensor:
        x = self.carried.take()
        if self.doubled:
            f = self.get_submodule("shake")(f, self.get_submodule("twin")(x))
        y: Tensor = x + self.branch(f)
        return y


SKIPS = (SkipStart, Branch, Skip)
