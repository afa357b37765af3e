"""What all layers share that draw noise: a seed, and with masks a rate, that no `state_dict` holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from goodfit.noise import Clock, Noisy

__all__ = ["Drawing", "Seeded", "apart"]


class Drawing(Noisy, nn.Module):
    """A layer with a seed.

    It is a non-persistent buffer, so the model's `state_dict` does not change; it stays on the CPU in full precision wherever
    the model goes, since it is read as a scalar.
    """

    def __init__(self, name: str) -> None:
        nn.Module.__init__(self)
        self.register_buffer("seed", torch.tensor(0), persistent=False)
        self.bind(name, 0, Clock())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self


class Seeded(Drawing):
    """A layer with a seed and a rate p, a buffer of the same kind.

    Under vmap both hold one value per member: so a layer reads the rate as a tensor, and must be the identity where it is 0
    without asking whether it is.
    """

    rate: Tensor

    def __init__(self, name: str, p: float = 0.0) -> None:
        super().__init__(name)
        self.register_buffer("rate", torch.tensor(p, dtype=torch.float64), persistent=False)

    @property
    def p(self) -> float:
        return float(self.rate)

    @p.setter
    def p(self, value: float) -> None:
        self.rate.fill_(value)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"

    def dropped(self, x: Tensor, shape: torch.Size) -> Tensor:
        """x · mask / (1 − p), with a mask of a shape that broadcasts to that of `x`."""
        return self.scaled(x, self.draw(shape, x.device))

    def scaled(self, x: Tensor, noise: Tensor) -> Tensor:
        """The same, with the noise at hand."""
        return x * (1 / (1 - self.rate)) * (noise >= self.rate)  # a product keeps the memory format of x


def apart(forward: Tensor, backward: Tensor) -> Tensor:
    """The numbers of one tensor with the gradient of another, both exact."""
    return forward.detach() + (backward - backward.detach())
