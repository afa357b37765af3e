"""Second gradients: at weights uphill of these, or at inputs uphill of those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from goodfit.hyper import hyper
from goodfit.noise import Noise
from goodfit.phases import Again, Gradient, State, Weights
from goodfit.regularizers.clipping import length

__all__ = ["FGSM", "SAM"]


@dataclass(frozen=True)
class SAM(Gradient):
    """Sharpness-aware minimization: the gradient is that of the worst weights near by.

    Formula: g ← ∇J(w + ε) with ε = rho · g / ‖g‖; where adaptive, ε = rho · w² · g / ‖ |w| · g ‖.
    Phase: Gradient; gradients of any shape → the same shapes. J is the loss of the same batch, with the same noise, and the
        penalties. It asks for a second gradient, of what run.loss or the closure gives and of nothing that is added to it, so a
        step takes twice the time; batch norm statistics are those of the first.
    Numbers: rho, how far uphill, in units of the weights (adaptive: of each weight's own size), >= 0, off at 0.
    Errors: rho < 0; another Gradient regularizer before it; a loop without run.loss and without a closure.
    Source: Foret et al. 2021, Sharpness-aware minimization for efficiently improving generalization, arXiv 2010.01412, rho of
        0.05; adaptive: Kwon et al. 2021, ASAM, arXiv 2102.11600, rho of 0.5 to 2. Under DDP the point uphill is that of the
        whole batch, while the paper lets each device have its own.

    >>> uphill, _ = SAM(0.1).gradient({"w": torch.tensor([3.0, 4.0])}, {"w": torch.zeros(2)}, {}, lambda w: w, None)
    >>> uphill["w"]
    tensor([0.0600, 0.0800])
    """

    twice: ClassVar[bool] = True

    rho: float = hyper(0.05, valid="[0, inf)", off=0.0, low=1e-2, high=2.0, log=True)
    adaptive: bool = False

    def gradient(
        self, grads: Weights, weights: Weights, state: State, again: Again, noise: Noise
    ) -> tuple[dict[str, Tensor], State]:
        scaled = {n: g * weights[n].abs() for n, g in grads.items()} if self.adaptive else dict(grads)
        step = self.rho / length(scaled).clamp(min=1e-12)
        moves = {n: s * weights[n].abs() if self.adaptive else s for n, s in scaled.items()}
        return again({n: (weights[n] + step * move).to(weights[n].dtype) for n, move in moves.items()}), state


@dataclass(frozen=True)
class FGSM(Gradient):
    """Adversarial training by the fast gradient sign method: half of the loss is that of inputs moved against the model.

    Formula: g ← (1 − share) · g + share · ∇J(x + epsilon · sign ∂J/∂x).
    Phase: Gradient; gradients of any shape → the same shapes; floating leaves of x move, each number by epsilon, as the batch
        regularizers have left them. It asks for a second gradient, of what run.loss gives and of nothing that is added to it,
        so a step takes twice the time; batch norm statistics are those of the clean inputs.
    Numbers: epsilon, in units of the inputs (of their standard deviations where they are standardized), >= 0, off at 0. share,
        the weight of the moved inputs, in [0, 1].
    Errors: epsilon < 0; another Gradient regularizer before it; inputs without floating point; a loop without run.loss.
    Source: Goodfellow, Shlens and Szegedy 2015, Explaining and harnessing adversarial examples, arXiv 1412.6572, with a share
        of 0.5. The label stays, and moved inputs are not clipped to a range.

    >>> half, _ = FGSM(0.1).gradient({"w": torch.ones(1)}, {"w": torch.zeros(1)}, {}, lambda w, e: {"w": torch.zeros(1)}, None)
    >>> half["w"]
    tensor([0.5000])
    """

    twice: ClassVar[bool] = True
    uphill: ClassVar[bool] = True

    epsilon: float = hyper(0.01, valid="[0, inf)", off=0.0, low=1e-3, high=0.5, log=True)
    share: float = hyper(0.5, valid="[0, 1]", low=0.1, high=1.0)

    def gradient(
        self, grads: Weights, weights: Weights, state: State, again: Again, noise: Noise
    ) -> tuple[dict[str, Tensor], State]:
        moved = again(weights, self.epsilon)
        return {n: (g * (1 - self.share) + moved[n] * self.share).to(g.dtype) for n, g in grads.items()}, state
