"""The kinds of dropout as layers: each mask is a pure function of (seed, layer, step, call)."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from goodfit.errors import GoodfitError
from goodfit.layers.seeded import Seeded
from goodfit.noise import polar

__all__ = [
    "SeededAlphaDropout",
    "SeededChannelDropout",
    "SeededDropout",
    "SeededGaussianDropout",
    "SeededInputDropout",
    "SeededLayer",
]


class SeededLayer(Seeded, _DropoutNd):
    """A layer that is noise in training and nothing in eval; a kind of it says in `noisy` what it does to its input."""

    def __init__(self, name: str = "dropout", p: float = 0.0) -> None:
        super().__init__(name, p)
        self.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        return self.noisy(x) if self.training else x

    @abstractmethod
    def noisy(self, x: Tensor) -> Tensor:
        """What training makes of `x`."""


class SeededDropout(SeededLayer, nn.Dropout):
    """Each element is zero with probability p, the others are scaled up: y = x · mask / (1 − p)."""

    def noisy(self, x: Tensor) -> Tensor:
        return self.dropped(x, x.shape)


class SeededInputDropout(SeededDropout):
    """The same, on one input of a model, which is called `source`."""

    def __init__(self, name: str = "inputdropout", p: float = 0.0, source: str = "") -> None:
        super().__init__(name, p)
        self.source = source


class SeededChannelDropout(SeededLayer):
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
        return self.dropped(x, torch.Size(shape))


class SeededAlphaDropout(SeededLayer):
    """Elements are set to SELU's lower end and all is put back to mean 0 and variance 1.

    y = a · (x · mask + α' · (1 − mask)) + b with α' = −λα, a = ((1 − p) (1 + p α'²))^(−1/2), b = −a p α'.
    """

    LOW = -1.0507009873554804934193349852946 * 1.6732632423543772848170429916717

    def noisy(self, x: Tensor) -> Tensor:
        p = self.rate
        scale = 1 / ((1 - p) * (1 + p * self.LOW**2)).sqrt()
        keep = self.draw(x.shape, x.device) >= p
        return (x * keep + self.LOW * (~keep).to(x.dtype)) * scale - scale * p * self.LOW


class SeededGaussianDropout(SeededLayer):
    """Each element is multiplied by a draw from N(1, p/(1 − p)): mean and variance of dropout, without zeros."""

    def noisy(self, x: Tensor) -> Tensor:
        length, angle = polar(self.draw(torch.Size((2, *x.shape)), x.device))
        normal = length * angle.cos()
        return (x * (1 + normal * (self.rate / (1 - self.rate)).sqrt())).to(x.dtype)
