"""Averages of weights over the steps of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from goodfit.hyper import hyper
from goodfit.phases import Finish, State, Step, Weights
from goodfit.where import Where, everything

__all__ = ["EMA", "SWA", "Lookahead"]


@dataclass(frozen=True)
class EMA(Step, Finish):
    """Exponential moving average of the weights: what is scored and given is a mean that forgets.

    Formula: m ← d · m + (1 − d) · w after each step t = 1, 2, ..., with d = min(decay, t / (t + 9)) in the warm-up, else decay;
        m begins as the weights at the start.
    Phase: Step, after, and Finish; weights of any shape → the same shapes. Batch norms get statistics of the training data
        under m. It keeps one copy of the selected weights, in float32 where they are half as long.
    Numbers: decay, how much of the mean stays at a step, in [0, 1), off at 0; it looks back 1 / (1 − decay) steps. warmup:
        whether the mean is short at first, so that the start is forgotten.
    Errors: decay outside [0, 1); a check outside of run.view() that an EarlyStopping hears; batch norms and no data;
        another average of the same weights.
    Source: Polyak and Juditsky 1992; Tarvainen and Valpola 2017, Mean teachers, arXiv 1703.01780; the warm-up is that of
        TensorFlow's ExponentialMovingAverage. Exact zeros of L1 do not survive an average.

    >>> ema = EMA(0.9, warmup=False)
    >>> _, state = ema.step({"w": torch.ones(1)}, lr={}, rate={}, state={"count.w": torch.zeros(()), "mean.w": torch.zeros(1)})
    >>> state["mean.w"]
    tensor([0.1000])
    """

    averages: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    decay: float = hyper(0.999, valid="[0, 1)", off=0.0, low=0.9, high=0.9999)
    warmup: bool = True
    where: Where = everything

    def init(self, weights: Weights, buffers: Weights) -> State:
        return _begun(weights)

    def step(self, weights: Weights, lr: Weights, rate: Weights, state: State) -> tuple[dict[str, Tensor], State]:
        decay, new = torch.as_tensor(self.decay, dtype=torch.float64), dict(state)
        for n, w in weights.items():
            new[f"count.{n}"] = t = state[f"count.{n}"] + 1
            stays = torch.minimum(decay.to(t.device), t / (t + 9)) if self.warmup else decay
            new[f"mean.{n}"] = _moved(state[f"mean.{n}"], w, stays)
        return dict(weights), new

    def finish(self, weights: Weights, buffers: Weights, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        begun = dict.fromkeys(weights, torch.as_tensor(self.decay) > 0)
        return _averaged(weights, state, begun), dict(buffers)


@dataclass(frozen=True)
class SWA(Step, Finish):
    """Stochastic weight averaging: what is scored and given is the mean of the weights on the way.

    Formula: m ← m + (weight / n) · (w − m) with n the sum of the weights so far, every so many steps; before the first, the
        weights themselves.
    Phase: Step, after, and Finish; weights of any shape → the same shapes. Batch norms get statistics of the training data
        under m. It keeps one copy of the selected weights, in float32 where they are half as long.
    Numbers: weight, of the weights of a step in the mean, >= 0, off at 0; a schedule says from when on:
        SWA(late(1.0, epochs=75)). every, optimizer steps from one to the next, an integer >= 1.
    Errors: weight < 0; every < 1; a check outside of run.view() that an EarlyStopping hears; batch norms and no data;
        another average of the same weights.
    Source: Izmailov et al. 2018, Averaging weights leads to wider optima and better generalization, arXiv 1803.05407, which
        takes the weights at the end of each epoch of the last quarter; from the start and at each step it is the average of
        Polyak and Juditsky 1992. The learning rate is yours to schedule. Exact zeros of L1 do not survive an average.

    >>> swa, state = SWA(), {"count.w": torch.zeros(()), "sum.w": torch.zeros(()), "mean.w": torch.zeros(1)}
    >>> for w in (1.0, 3.0):
    ...     _, state = swa.step({"w": torch.tensor([w])}, lr={}, rate={}, state=state)
    >>> state["mean.w"]
    tensor([2.])
    """

    averages: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    weight: float = hyper(1.0, valid="[0, inf)", off=0.0, low=1.0, high=1.0)
    every: int = hyper(1, valid="[1, inf)", low=1, high=1000, log=True, fixed=True)
    where: Where = everything

    def init(self, weights: Weights, buffers: Weights) -> State:
        return {**_begun(weights), **{f"sum.{n}": torch.zeros((), dtype=torch.float64) for n in weights}}

    def step(self, weights: Weights, lr: Weights, rate: Weights, state: State) -> tuple[dict[str, Tensor], State]:
        weight, new = torch.as_tensor(self.weight, dtype=torch.float64), dict(state)
        for n, w in weights.items():
            new[f"count.{n}"] = t = state[f"count.{n}"] + 1
            gained = weight.to(t.device) * (t % self.every == 0)
            new[f"sum.{n}"] = total = state[f"sum.{n}"] + gained
            new[f"mean.{n}"] = _moved(state[f"mean.{n}"], w, 1 - torch.where(gained > 0, gained / total, 0.0))
        return dict(weights), new

    def finish(self, weights: Weights, buffers: Weights, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        begun = {n: state[f"sum.{n}"] > 0 for n in weights if f"sum.{n}" in state}
        return _averaged(weights, state, begun), dict(buffers)


@dataclass(frozen=True)
class Lookahead(Step):
    """Lookahead: slow weights follow the fast ones, and the fast ones begin anew from there.

    Formula: every k steps s ← (1 − alpha) · s + alpha · w, and w ← s; s begins as the weights at the start.
    Phase: Step, after; weights of any shape → the same shapes. It keeps one copy of the selected weights.
    Numbers: alpha, how far the slow weights go, in [0, 1], off at 1. k, steps from one to the next, an integer >= 1.
    Errors: alpha outside [0, 1]; k < 1.
    Source: Zhang et al. 2019, Lookahead optimizer: k steps forward, 1 step back, arXiv 1907.08610. The optimizer keeps its
        momentum, as in the paper's experiments. Between two such steps the fast weights are scored and given, as its
        implementations do; the paper scores the slow ones.

    >>> state = {"count.w": torch.tensor(4.0), "slow.w": torch.zeros(1)}
    >>> Lookahead(0.5, k=5).step({"w": torch.ones(1)}, lr={}, rate={}, state=state)[0]["w"]
    tensor([0.5000])
    """

    watches: ClassVar[bool] = True

    alpha: float = hyper(0.5, valid="[0, 1]", off=1.0, low=0.5, high=0.8)
    k: int = hyper(5, valid="[1, inf)", low=5, high=10, fixed=True)
    where: Where = everything

    def init(self, weights: Weights, buffers: Weights) -> State:
        return {**_counts(weights), **{f"slow.{n}": w.detach().clone() for n, w in weights.items()}}

    def step(self, weights: Weights, lr: Weights, rate: Weights, state: State) -> tuple[dict[str, Tensor], State]:
        moved, new = dict(weights), dict(state)
        for n, w in weights.items():
            new[f"count.{n}"] = t = state[f"count.{n}"] + 1
            now = t % self.k == 0
            slow = state[f"slow.{n}"].to(w.device)
            ahead = (slow * (1 - self.alpha) + w * self.alpha).to(w.dtype)
            moved[n], new[f"slow.{n}"] = torch.where(now.to(w.device), ahead, w), torch.where(now.to(w.device), ahead, slow)
        return moved, new


def _counts(weights: Weights) -> State:
    """No step so far: of each weight, since several optimizers take steps of their own."""
    return {f"count.{n}": torch.zeros((), dtype=torch.float64) for n in weights}


def _begun(weights: Weights) -> State:
    """The weights of the start, precise enough to be moved by a thousandth."""
    wide = {n: w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True) for n, w in weights.items()}
    return {**_counts(weights), **{f"mean.{n}": w for n, w in wide.items()}}


def _moved(mean: Tensor, w: Tensor, stays: Tensor) -> Tensor:
    mean = mean.to(w.device)
    return mean * stays.to(mean) + w.to(mean) * (1 - stays).to(mean)


def _averaged(weights: Weights, state: State, begun: Weights) -> dict[str, Tensor]:
    """The means in the place of the weights that have one."""
    means = {n: state[f"mean.{n}"].to(w) for n, w in weights.items() if f"mean.{n}" in state}
    return {n: torch.where(begun[n].to(w.device), means[n], w) if n in means else w for n, w in weights.items()}
