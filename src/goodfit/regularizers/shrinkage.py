"""Shrinking all weights a little: L2 in the objective, toward zero or toward the start, and decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from goodfit.hyper import hyper
from goodfit.phases import Penalty, State, Step, Weights
from goodfit.where import Where, kernels

__all__ = ["L2", "L2SP", "WeightDecay"]


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

    >>> L2(0.1).penalty({"w": torch.tensor([1.0, 2.0])}, {})
    tensor(0.2500)
    """

    elementwise: ClassVar[bool] = True

    lam: float = hyper(1e-4, valid="[0, inf)", off=0.0, low=1e-6, high=1e-1, log=True)
    where: Where = kernels

    def penalty(self, weights: Weights, state: State) -> Tensor:
        return self.lam / 2 * torch.stack([w.square().sum() for w in weights.values()]).sum()

    def slope(self, weights: Weights, state: State) -> dict[str, Tensor]:
        return {name: self.lam * w for name, w in weights.items()}


@dataclass(frozen=True)
class L2SP(Penalty):
    """Ridge penalty toward the start point: fine-tuning that does not forget where it came from.

    Formula: J(w) = loss + lam/2 · Σ (w − w₀)², with w₀ the weights when the run was made; the gradient gains lam · (w − w₀).
    Phase: Penalty; weights of any shape → scalar. It keeps one copy of the selected weights.
    Numbers: lam, per unit of loss and squared weight, >= 0, off at 0. With w₀ = 0 it is L2.
    Errors: lam < 0; a selector that matches no weight.
    Source: Li, Grandvalet and Davoine 2018, Explicit inductive bias for transfer learning with convolutional networks,
        arXiv 1802.01483. A new head has no start worth keeping: leave it out by where=kernels & ~named("head.*"), and
        give it an L2 of its own. We leave biases and norms out by default.

    >>> L2SP(0.1).slope({"w": torch.tensor([3.0])}, {"start.w": torch.tensor([1.0])})["w"]
    tensor([0.2000])
    """

    elementwise: ClassVar[bool] = True

    lam: float = hyper(1e-2, valid="[0, inf)", off=0.0, low=1e-4, high=1.0, log=True)
    where: Where = kernels

    def init(self, weights: Weights, buffers: Weights) -> State:
        return {f"start.{name}": w.detach().clone() for name, w in weights.items()}

    def penalty(self, weights: Weights, state: State) -> Tensor:
        away = {name: w - state[f"start.{name}"].to(w.device) for name, w in weights.items()}
        return self.lam / 2 * torch.stack([d.square().sum() for d in away.values()]).sum()

    def slope(self, weights: Weights, state: State) -> dict[str, Tensor]:
        return {name: self.lam * (w - state[f"start.{name}"].to(w.device)) for name, w in weights.items()}


@dataclass(frozen=True)
class WeightDecay(Step):
    """Decoupled weight decay: each step takes the same share off every weight, whatever the gradient's scale.

    Formula: w ← w · (1 − lr · lam), before the optimizer's step; w ← w · (1 − lam) where it is independent of the lr.
    Phase: Step, before; weights of any shape → the same shapes.
    Numbers: lam, per unit of learning rate and step, >= 0, off at 0. It equals `weight_decay` of torch's AdamW, bit for
        bit; leave that one at 0. independent: lam is the share per step, whatever the lr and its schedule; half of a weight
        without gradient is gone after ln 2 / lam steps. lam takes a schedule: WeightDecay(linear(0.1, 0.0, steps=1000)).
    Errors: lam < 0; a selector that matches no weight.
    Source: Loshchilov and Hutter 2019, Decoupled weight decay regularization, arXiv 1711.05101. Their algorithm 2 decays by
        the schedule alone, not by the base lr: that is independent=True with a schedule for lam. We leave biases and norms
        out by default.

    >>> WeightDecay(0.5).step({"w": torch.tensor([2.0])}, lr={"w": torch.tensor(0.1)}, rate={}, state={})[0]["w"]
    tensor([1.9000])
    """

    moment: ClassVar[Literal["before", "proximal", "after"]] = "before"
    elementwise: ClassVar[bool] = True

    lam: float = hyper(1e-2, valid="[0, inf)", off=0.0, low=1e-5, high=1.0, log=True)
    where: Where = kernels
    independent: bool = False

    def step(self, weights: Weights, lr: Weights, rate: Weights, state: State) -> tuple[dict[str, Tensor], State]:
        return {name: w * (1 - self.lam * (1.0 if self.independent else lr[name])) for name, w in weights.items()}, state
