"""Noise on gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from goodfit.hyper import hyper
from goodfit.noise import Noise
from goodfit.phases import Again, Gradient, State, Weights

__all__ = ["GradientNoise"]


@dataclass(frozen=True)
class GradientNoise(Gradient):
    """Gradient noise: each number of the gradient gains Gaussian noise that fades.

    Formula: g ← g + N(0, σ²) with σ² = eta / (1 + t)^gamma, t the completed steps.
    Phase: Gradient; gradients of any shape → the same shapes. Processes that train together draw the same.
    Numbers: eta, the variance at the start, in units of the squared gradient, >= 0, off at 0. gamma, how fast it fades, >= 0.
    Errors: eta < 0; gamma < 0.
    Source: Neelakantan et al. 2015, Adding gradient noise improves learning for very deep networks, arXiv 1511.06807, with eta
        of 0.01, 0.3 or 1 and gamma of 0.55; after Welling and Teh 2011.

    >>> import torch
    >>> noisy, _ = GradientNoise(0.01).gradient({"w": torch.zeros(2)}, {}, {}, None, Noise(0, "here"))
    >>> noisy["w"].shape, bool((noisy["w"] != 0).all())
    (torch.Size([2]), True)
    """

    eta: float = hyper(0.01, valid="[0, inf)", off=0.0, low=1e-4, high=1.0, log=True)
    gamma: float = hyper(0.55, valid="[0, inf)", low=0.0, high=2.0)

    def gradient(
        self, grads: Weights, weights: Weights, state: State, again: Again, noise: Noise
    ) -> tuple[dict[str, Tensor], State]:
        std = (self.eta / (1 + noise.step) ** self.gamma) ** 0.5
        return {n: (g + std * noise.part(n).normal(*g.shape, device=g.device)).to(g.dtype) for n, g in grads.items()}, state
