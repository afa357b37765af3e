"""Drop path, or stochastic depth: the branch of a residual block is dropped whole, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from goodfit.layers.seeded import Seeded

__all__ = ["SeededDropPath"]


class SeededDropPath(Seeded):
    """Each row of a branch is zero with probability p, the others are scaled up: y = x · mask / (1 − p), mask (N, 1, ..., 1).

    axis: where the rows are. Of a module that returns a tuple the branch is the first; the rest passes.
    """

    def __init__(self, name: str = "drop_path", p: float = 0.0, axis: int = 0) -> None:
        super().__init__(name, p)
        self.axis = axis

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", axis={self.axis}" if self.axis else "")

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if not self.training:
            return x
        if isinstance(x, tuple):
            return (self._rows(x[0]), *x[1:])
        return self._rows(x)

    def _rows(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = x.shape[self.axis]
        return self.dropped(x, torch.Size(shape))
