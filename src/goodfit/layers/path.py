"""Noise on the branch of a residual block, row by row: dropped whole, or shaken."""

from __future__ import annotations

import torch
from torch import Tensor

from goodfit.layers.seeded import Drawing, Seeded, apart

__all__ = ["SeededDropPath", "SeededShake", "SeededShakeDrop"]


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
        act = self.noisy if self.training else self.expected
        return (act(x[0]), *x[1:]) if isinstance(x, tuple) else act(x)

    def noisy(self, x: Tensor) -> Tensor:
        """The branch in training."""
        return self.dropped(x, _per_row(x, self.axis))

    def expected(self, x: Tensor) -> Tensor:
        """The branch in eval: what training makes of it on average."""
        return x


class SeededShakeDrop(SeededDropPath):
    """Each row of a branch is multiplied by α ~ U(−1, 1) with probability p, and then its gradient by β ~ U(0, 1); in eval all
    are multiplied by 1 − p."""

    def noisy(self, x: Tensor) -> Tensor:
        u = self.draw(torch.Size((3, *_per_row(x, self.axis))), x.device)
        forward, backward = (torch.where(u[0] >= self.rate, 1.0, shaken).to(x.dtype) for shaken in (2 * u[1] - 1, u[2]))
        return apart(x * forward, x * backward)

    def expected(self, x: Tensor) -> Tensor:
        return x * (1 - self.rate)


class SeededShake(Drawing):
    """Of two branches each row gets α · f + (1 − α) · g with α ~ U(0, 1), in backward with another α; in eval their mean."""

    def __init__(self, name: str = "shake", axis: int = 0) -> None:
        super().__init__(name)
        self.axis = axis

    def extra_repr(self) -> str:
        return f"axis={self.axis}" if self.axis else ""

    def forward(self, f: Tensor, g: Tensor) -> Tensor:
        if not self.training:
            return (f + g) / 2
        u = self.draw(torch.Size((2, *_per_row(f, self.axis))), f.device).to(f.dtype)
        forward, backward = (f * share + g * (1 - share) for share in u)
        return apart(forward, backward)


def _per_row(x: Tensor, axis: int) -> torch.Size:
    """One number for each row."""
    return torch.Size(x.shape[axis] if i == axis % x.ndim else 1 for i in range(x.ndim))
