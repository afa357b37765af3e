"""A toy regularizer for each phase that the package does not fill yet, so that laws and loop are tested on all eight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from goodfit.hyper import hyper
from goodfit.phases import Batch, Finish, Gradient, Loss, Penalty, Step


@dataclass(frozen=True)
class Blur(Batch):
    """Noise on the inputs.

    Formula: x + std · u. Phase: Batch. Numbers: std >= 0, off at 0. Errors: none. Source: this test.

    >>> Blur(0.0).off
    True
    """

    std: float = hyper(0.1, valid="[0, inf)", off=0.0, low=1e-3, high=1.0, log=True)

    def batch(self, x: Any, y: Tensor, noise: Any) -> tuple[Any, Tensor]:
        return x + self.std * (noise.uniform(*x.shape) - 0.5).to(x.dtype), y


@dataclass(frozen=True)
class Flood(Loss):
    """A floor under the loss.

    Formula: |loss − level| + level. Phase: Loss. Numbers: level >= 0, off at 0. Errors: none. Source: this test.

    >>> Flood(0.5).loss(torch.tensor(0.4), None, None)
    tensor(0.6000)
    """

    level: float = hyper(0.1, valid="[0, inf)", off=0.0, low=1e-3, high=1.0, log=True)

    def loss(self, loss: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
        return (loss - self.level).abs() + self.level


@dataclass(frozen=True)
class Quartic(Penalty):
    """A penalty that leaves its slope to autograd.

    Formula: lam/4 · Σ w⁴. Phase: Penalty. Numbers: lam >= 0, off at 0. Errors: none. Source: this test.

    >>> Quartic(1.0).slope({"w": torch.tensor([2.0])}, {})["w"]
    tensor([8.])
    """

    lam: float = hyper(0.1, valid="[0, inf)", off=0.0, low=1e-3, high=1.0, log=True)

    def penalty(self, weights: Any, state: Any) -> Tensor:
        return self.lam / 4 * torch.stack([w.pow(4).sum() for w in weights.values()]).sum()


@dataclass(frozen=True)
class Clip(Gradient):
    """Gradients no longer than norm.

    Formula: g · min(1, norm/|g|). Phase: Gradient. Numbers: norm > 0, off at inf. Errors: none. Source: this test.

    >>> Clip(1.0).gradient({"w": torch.tensor([3.0, 4.0])}, {}, {}, None, None)[0]["w"]
    tensor([0.6000, 0.8000])
    """

    norm: float = hyper(1.0, valid="(0, inf]", off=math.inf, low=1e-2, high=10.0, log=True)

    def gradient(self, grads: Any, weights: Any, state: Any, again: Any, noise: Any) -> Any:
        length = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        return {n: g * (self.norm / length).clamp(max=1) for n, g in grads.items()}, state


@dataclass(frozen=True)
class Uphill(Gradient):
    """The gradient at a point uphill.

    Formula: g(w + rho · g). Phase: Gradient. Numbers: rho >= 0, off at 0. Errors: none. Source: this test.

    >>> Uphill(0.1).gradient({"w": torch.ones(1)}, {"w": torch.zeros(1)}, {}, lambda w: w, None)[0]["w"]
    tensor([0.1000])
    """

    twice: ClassVar[bool] = True

    rho: float = hyper(0.05, valid="[0, inf)", off=0.0, low=1e-3, high=1.0, log=True)

    def gradient(self, grads: Any, weights: Any, state: Any, again: Any, noise: Any) -> Any:
        return again({n: weights[n] + self.rho * grads[n] for n in grads}), state


@dataclass(frozen=True)
class Mean(Step, Finish):
    """The running mean of the weights.

    Formula: m ← m + share · (w − m). Phase: Step, Finish. Numbers: share, off at 0. Errors: none. Source: this test.

    >>> Mean(0.0).off
    True
    """

    averages: ClassVar[bool] = True

    share: float = hyper(0.1, valid="[0, 1]", off=0.0, low=1e-3, high=1.0, log=True)

    def init(self, weights: Any, buffers: Any) -> dict[str, Tensor]:
        return {n: w.clone() for n, w in weights.items()}

    def step(self, weights: Any, lr: Any, rate: Any, state: Any) -> Any:
        return dict(weights), {**state, **{n: state[n] + self.share * (w - state[n]) for n, w in weights.items()}}

    def finish(self, weights: Any, buffers: Any, state: Any) -> Any:
        on = torch.as_tensor(self.share) > 0
        return {n: torch.where(on, state[n], w) for n, w in weights.items()}, dict(buffers)


TOYS = {kind.__name__: kind for kind in (Blur, Flood, Quartic, Clip, Uphill, Mean)}
