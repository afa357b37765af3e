"""Shrinking weights: L2 in the objective, L1 with exact zeros, decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from goodfit.hyper import hyper
from goodfit.phases import Penalty, State, Step, Weights
from goodfit.where import Where, kernels

__all__ = ["L1", "L2", "WeightDecay"]


@dataclass(frozen=True)
class L2(Penalty):
    """Ridge penalty: the objective gains half the squared length of the weights.

    Formula: J(w) = loss + lam/2 · Σ w², so the gradient gains lam · w.
    Phase: Penalty; weights of any shape → scalar. The gradient phase sees it: L2 before ClipNorm is clipped with the
        gradient.
    Numbers: lam, per unit of loss and squared weight, >= 0, off at 0. It equals `weight_decay` of torch's SGD and Adam
        (coupled), and twice the factor of Keras' L2.
    Errors: lam < 0; a selector that matches no weight.
    Source: Hoerl and Kennard 1970, Ridge regression; Krogh and Hertz 1991, A simple weight decay can improve
        generalization. We leave biases and norms out by default.

    >>> L2(0.1).penalty({"w": torch.tensor([1.0, 2.0])})
    tensor(0.2500)
    """

    lam: float = hyper(1e-4, valid="[0, inf)", off=0.0, low=1e-6, high=1e-1, log=True)
    where: Where = kernels

    def penalty(self, weights: Weights) -> Tensor:
        return self.lam / 2 * torch.stack([w.square().sum() for w in weights.values()]).sum()

    def slope(self, weights: Weights) -> dict[str, Tensor]:
        return {name: self.lam * w for name, w in weights.items()}


@dataclass(frozen=True)
class L1(Step):
    """Lasso penalty as a proximal step: weights that do not pay for themselves become exactly zero.

    Formula: J(w) = loss + lam · Σ |w|; after the optimizer's step w ← sign(w) · max(|w| − θ, 0) with the threshold
        θ = min(lam · rate, 10 · lr). The rate is the optimizer's own per weight (lr/(1−momentum) for SGD, lr/(√v̂+ε) for
        Adam, …), so lam means the same under each of them; lr is its reach (the learning rate for Adam, inf for SGD).
    Phase: Step, proximal; weights of any shape → the same shapes.
    Numbers: lam, per unit of loss and weight, >= 0, off at 0.
    Errors: lam < 0; a selector that matches no weight; an optimizer whose rate is not known, by name.
    Source: Tibshirani 1996, Regression shrinkage and selection via the lasso; Parikh and Boyd 2014, Proximal algorithms.
        Ours differs by the rate (plain lam · lr has another optimum under momentum and Adam) and by the cap, which has
        the same fixed points and spares weights that have not seen a gradient yet.

    >>> w, unit = torch.tensor([0.05, -0.3, 1.0]), torch.tensor(1.0)
    >>> L1(0.1).step({"w": w}, lr={"w": unit}, rate={"w": unit}, state={})[0]["w"]
    tensor([ 0.0000, -0.2000,  0.9000])
    """

    moment: ClassVar[Literal["before", "proximal", "after"]] = "proximal"

    lam: float = hyper(1e-4, valid="[0, inf)", off=0.0, low=1e-6, high=1e-1, log=True)
    where: Where = kernels

    def step(self, weights: Weights, lr: Weights, rate: Weights, state: State) -> tuple[dict[str, Tensor], State]:
        shrunk = {}
        for name, w in weights.items():
            threshold = torch.minimum(self.lam * rate[name], 10 * lr[name])
            shrunk[name] = w - torch.clamp(w, -threshold, threshold)  # exactly 0 within the threshold
        return shrunk, state


@dataclass(frozen=True)
class WeightDecay(Step):
    """Decoupled weight decay: each step takes the same share off every weight, whatever the gradient's scale.

    Formula: w ← w · (1 − lr · lam), before the optimizer's step.
    Phase: Step, before; weights of any shape → the same shapes.
    Numbers: lam, per unit of learning rate and step, >= 0, off at 0. It equals `weight_decay` of torch's AdamW, bit for
        bit; leave that one at 0.
    Errors: lam < 0; a selector that matches no weight.
    Source: Loshchilov and Hutter 2019, Decoupled weight decay regularization, arXiv 1711.05101. We leave biases and norms
        out by default.

    >>> WeightDecay(0.5).step({"w": torch.tensor([2.0])}, lr={"w": torch.tensor(0.1)}, rate={}, state={})[0]["w"]
    tensor([1.9000])
    """

    moment: ClassVar[Literal["before", "proximal", "after"]] = "before"

    lam: float = hyper(1e-2, valid="[0, inf)", off=0.0, low=1e-5, high=1.0, log=True)
    where: Where = kernels

    def step(self, weights: Weights, lr: Weights, rate: Weights, state: State) -> tuple[dict[str, Tensor], State]:
        return {name: w * (1 - lr[name] * self.lam) for name, w in weights.items()}, state
