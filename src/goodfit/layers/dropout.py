"""The kinds of dropout as layers: each mask is a pure function of (seed, layer, step, call)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from goodfit.errors import GoodfitError
from goodfit.noise import Clock, Noisy

__all__ = ["SeededAlphaDropout", "SeededChannelDropout", "SeededDropout", "SeededGaussianDropout", "SeededLayer"]


class SeededLayer(Noisy, _DropoutNd):
    """A layer that is noise in training and nothing in eval; a kind of it says in `noisy` what it does to its input.

    The rate and the seed are non-persistent buffers, so the model's `state_dict` does not change; they stay on the CPU in
    full precision wherever the model goes, since they are read as scalars. Under vmap they hold one value per member: so
    `noisy` reads the rate as a tensor, and must be the identity where it is 0 without asking whether it is.
    """

    rate: Tensor

    def __init__(self, name: str = "dropout", p: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.inplace = False
        self.register_buffer("rate", torch.tensor(p, dtype=torch.float64), persistent=False)
        self.register_buffer("seed", torch.tensor(0), persistent=False)
        self.bind(name, 0, Clock())

    @property
    def p(self) -> float:
        return float(self.rate)

    @p.setter
    def p(self, value: float) -> None:
        self.rate.fill_(value)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"

    def forward(self, x: Tensor) -> Tensor:
        return self.noisy(x) if self.training else x

    @abstractmethod
    def noisy(self, x: Tensor) -> Tensor:
        """What training makes of `x`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self


class SeededDropout(SeededLayer):
    """Each element is zero with probability p, the others are scaled up: y = x · mask / (1 − p)."""

    def noisy(self, x: Tensor) -> Tensor:
        return self._dropped(x, x.shape)

    def _dropped(self, x: Tensor, shape: torch.Size) -> Tensor:
        keep = self.draw(shape, x.device) >= self.rate
        return torch.where(keep, x * (1 / (1 - self.rate)), torch.zeros((), dtype=x.dtype, device=x.device))


class SeededChannelDropout(SeededDropout):
    """Whole channels of one row at once: the mask has shape (N, C, 1, ...) or (N, 1, ..., C).

    axis: where the channels are, 1 or -1. ndim: the number of axes that an input must have, None for any.
    """

    def __init__(self, name: str = "dropout", p: float = 0.0, axis: int = 1, ndim: int | None = None) -> None:
        super().__init__(name, p)
        self.axis, self.ndim = axis, ndim

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, axis={self.axis}"

    def noisy(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or self.ndim not in (None, x.ndim):
            raise GoodfitError(
                f"{self.name} drops whole channels of a batch of rank {self.ndim or '2 or more'}, got {tuple(x.shape)}: "
                "give a batch as in the example the model was built on."
            )
        shape = [1] * x.ndim
        for axis in (0, self.axis):
            shape[axis] = x.shape[axis]
        return self._dropped(x, torch.Size(shape))


class SeededAlphaDropout(SeededLayer):
    """Elements are set to SELU's lower end and all is put back to mean 0 and variance 1.

    y = a · (x · mask + α' · (1 − mask)) + b with α' = −λα, a = ((1 − p) (1 + p α'²))^(−1/2), b = −a p α'.
    """

    LOW = -1.0507009873554804934193349852946 * 1.6732632423543772848170429916717

    def noisy(self, x: Tensor) -> Tensor:
        p = self.rate
        scale = 1 / ((1 - p) * (1 + p * self.LOW**2)).sqrt()
        keep = self.draw(x.shape, x.device) >= p
        low = torch.full((), self.LOW, dtype=x.dtype, device=x.device)
        return torch.where(keep, x, low) * scale - scale * p * self.LOW


class SeededGaussianDropout(SeededLayer):
    """Each element is multiplied by a draw from N(1, p/(1 − p)): mean and variance of dropout, without zeros."""

    def noisy(self, x: Tensor) -> Tensor:
        u = self.draw(torch.Size((2, *x.shape)), x.device)
        normal = (-2 * (1 - u[0]).log()).sqrt() * (2 * math.pi * u[1]).cos()  # Box and Muller 1958; 1 − u is never 0
        return (x * (1 + normal * (self.rate / (1 - self.rate)).sqrt())).to(x.dtype)
