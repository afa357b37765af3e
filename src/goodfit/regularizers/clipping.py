"""Clipping: gradients within a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from goodfit.hyper import hyper
from goodfit.noise import Noise
from goodfit.phases import Again, Gradient, State, Weights

__all__ = ["ClipNorm", "ClipValue", "length"]


@dataclass(frozen=True)
class ClipNorm(Gradient):
    """Clipping by norm: the gradient of a step is no longer than a bound, and keeps its direction.

    Formula: g ← g · min(1, norm / ‖g‖), with ‖g‖ over all weights of the optimizer together.
    Phase: Gradient; gradients of any shape → the same shapes. Slopes of penalties are in g, decoupled decay is not.
    Numbers: norm, the largest length of the gradient, in units of the loss per unit of the weights, > 0, off at inf.
    Errors: norm <= 0; with an adapter, beside the clipping of the host.
    Source: Pascanu, Mikolov and Bengio 2013, On the difficulty of training recurrent neural networks, arXiv 1211.5063. It is
        torch's clip_grad_norm_ without the 1e-6 that torch adds to ‖g‖. Of several optimizers each has a gradient of its own.

    >>> ClipNorm(1.0).gradient({"w": torch.tensor([3.0, 4.0])}, {}, {}, None, None)[0]["w"]
    tensor([0.6000, 0.8000])
    """

    norm: float = hyper(1.0, valid="(0, inf]", off=math.inf, low=1e-2, high=1e2, log=True)

    def gradient(
        self, grads: Weights, weights: Weights, state: State, again: Again, noise: Noise
    ) -> tuple[dict[str, Tensor], State]:
        share = (self.norm / length(grads)).clamp(max=1) if grads else 1.0
        return {name: (g * share).to(g.dtype) for name, g in grads.items()}, state


@dataclass(frozen=True)
class ClipValue(Gradient):
    """Clipping by value: no number of the gradient is further from zero than a bound.

    Formula: g ← max(−value, min(value, g)), number by number; so the direction changes.
    Phase: Gradient; gradients of any shape → the same shapes.
    Numbers: value, in units of the loss per unit of a weight, > 0, off at inf.
    Errors: value <= 0; with an adapter, beside the clipping of the host.
    Source: Mikolov 2012, Statistical language models based on neural networks, section 3.2.2. It is torch's clip_grad_value_.

    >>> ClipValue(1.0).gradient({"w": torch.tensor([3.0, -0.5])}, {}, {}, None, None)[0]["w"]
    tensor([ 1.0000, -0.5000])
    """

    value: float = hyper(1.0, valid="(0, inf]", off=math.inf, low=1e-3, high=10.0, log=True)

    def gradient(
        self, grads: Weights, weights: Weights, state: State, again: Again, noise: Noise
    ) -> tuple[dict[str, Tensor], State]:
        bound = torch.as_tensor(self.value, dtype=torch.float64)
        return {name: g.minimum(bound.to(g)).maximum(-bound.to(g)) for name, g in grads.items()}, state


def length(grads: Weights) -> Tensor:
    """The Euclidean length of all of these as one vector, in double precision."""
    of_each = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads.values()]
    return torch.linalg.vector_norm(torch.stack([one.to(of_each[0].device) for one in of_each]))
