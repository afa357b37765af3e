"""Skip connections: the start of a branch, and the sum behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from goodfit.chain.passes import Part, Piece

__all__ = ["Fork", "Sum"]


class Fork(Piece):
    """Where a branch starts: what comes here goes on, and waits for the sum; both gradients meet here."""

    def forward(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, bool]:
        part.kept[self] = x
        return x, False

    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        if not wanted:
            return g, free
        past = part.kept[self, "gradient"]
        if g.ndim < past.ndim:
            past = past.sum(0)
        return (g.add_(past) if free else g + past), True


class Sum(Piece):
    """x + f(x), where x is what came to the fork."""

    def __init__(self, fork: Fork) -> None:
        self.fork = fork

    def forward(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, bool]:
        past = part.kept[self.fork]
        free = free and x.ndim >= past.ndim
        return torch.add(x, past, out=x if free else part.room(self, tuple(x.shape), x)), True

    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        part.kept[self.fork, "gradient"] = g
        return g, False
