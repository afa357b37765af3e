"""Noise on what goes into a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from goodfit.hyper import hyper
from goodfit.noise import Noise
from goodfit.phases import Batch
from goodfit.regularizers.leaves import floats, replaced

__all__ = ["InputNoise"]


@dataclass(frozen=True)
class InputNoise(Batch):
    """Gaussian noise on the inputs, each number by itself; targets stay.

    Formula: x ← x + std · z with z ~ N(0, 1). To second order in std a squared error gains std² · E‖∂f/∂x‖² by it: for a linear
        model f that is exact, and is L2 on inputs of that scale.
    Phase: Batch. It acts on every tensor of floating point in x; integers and booleans, such as tokens and masks, stay as they
        are.
    Numbers: std >= 0 in the unit of the inputs, so of their standard deviation where they are standardized, off at 0.
    Errors: std < 0; x without floating point.
    Source: Bishop 1995, Training with noise is equivalent to Tikhonov regularization; the draw: Box and Muller 1958.

    >>> InputNoise(0.5).batch(torch.zeros(2, 2), torch.zeros(2), Noise(0, "inputnoise"))[0]
    tensor([[-0.2276, -0.4292],
            [-0.5577, -0.1339]])
    """

    mixes: ClassVar[bool] = False

    std: float = hyper(0.1, valid="[0, inf)", off=0.0, low=1e-3, high=1.0, log=True)

    def batch(self, x: Any, y: Tensor, noise: Noise) -> tuple[Any, Tensor]:
        noisy = {name: self._noisy(t, noise.part(name)) for name, t in floats(x, "InputNoise").items()}
        return replaced(x, noisy), y

    def _noisy(self, t: Tensor, noise: Noise) -> Tensor:
        wide = torch.promote_types(t.dtype, torch.float32)
        std = torch.as_tensor(self.std, dtype=wide, device=t.device)
        return (t.to(wide) + std * noise.normal(*t.shape, dtype=wide, device=t.device)).to(t.dtype)
