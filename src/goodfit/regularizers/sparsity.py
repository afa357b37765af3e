"""Exact zeros: the lasso and the elastic net as proximal steps at the optimizer's own rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from goodfit.errors import GoodfitError
from goodfit.factors import Factors
from goodfit.hyper import hyper
from goodfit.phases import State, Step, Weights
from goodfit.where import Where, kernels

__all__ = ["L1", "ElasticNet", "refuse_normalized", "toward"]

CAP = 10.0


@dataclass(frozen=True)
class L1(Step):
    """Lasso penalty as a proximal step: weights that do not pay for themselves become exactly zero.

    Formula: J(w) = loss + lam · Σ |w|; after the optimizer's step w ← sign(w) · max(|w| − θ, 0) with the threshold
        θ = min(lam · rate, 10 · reach). The rate is the optimizer's own per weight (lr/(1−momentum) for SGD, lr/(√v̂+ε) for
        Adam, …), so lam means the same under each of them; the reach is its step under a gradient of the size seen so far
        (the learning rate for Adam, inf for SGD).
    Phase: Step, proximal; weights of any shape → the same shapes.
    Numbers: lam, per unit of loss and weight, >= 0, off at 0. factors multiply it weight by weight: factors.adaptive() is
        the adaptive lasso, factors.given({...}) takes numbers.
    Errors: lam < 0; a selector that matches no weight; an optimizer whose rate is not known, by name.
    Source: Tibshirani 1996, Regression shrinkage and selection via the lasso; Parikh and Boyd 2014, Proximal algorithms;
        Zou 2006 for the factors. Ours differs by the rate (plain lam · lr has another optimum under momentum and Adam) and
        by the cap, which has the same fixed points and spares weights that have not seen a gradient yet.

    >>> w, unit = torch.tensor([0.05, -0.3, 1.0]), torch.tensor(1.0)
    >>> L1(0.1).step({"w": w}, lr={"w": unit}, rate={"w": unit}, state={})[0]["w"]
    tensor([ 0.0000, -0.2000,  0.9000])
    """

    moment: ClassVar[Literal["before", "proximal", "after"]] = "proximal"
    elementwise: ClassVar[bool] = True

    lam: float = hyper(1e-4, valid="[0, inf)", off=0.0, low=1e-6, high=1e-1, log=True)
    where: Where = kernels
    factors: Factors | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factors(self)

    def on(self, model: nn.Module) -> Any:
        refuse_normalized(self, model)
        return self

    def init(self, weights: Weights, buffers: Weights) -> State:
        return _factors(self.factors, weights)

    def penalty(self, weights: Weights, state: State) -> Tensor:
        return self.lam * torch.stack([(w.abs() * _factor(state, n)).sum() for n, w in weights.items()]).sum()

    def step(self, weights: Weights, lr: Weights, rate: Weights, state: State) -> tuple[dict[str, Tensor], State]:
        shrunk = {}
        for name, w in weights.items():
            threshold = torch.minimum(self.lam * _factor(state, name) * rate[name], CAP * lr[name])
            shrunk[name] = w - _within(w, threshold)  # exactly 0 within the threshold
        return shrunk, state


@dataclass(frozen=True)
class ElasticNet(Step):
    """Lasso and ridge in one proximal step: exact zeros, and correlated weights that share what they explain.

    Formula: J(w) = loss + lam · (ratio · Σ |w| + (1 − ratio)/2 · Σ w²); after the optimizer's step, with θ = lam · rate,
        w moves toward sign(w) · max(|w| − ratio · θ, 0) / (1 + (1 − ratio) · θ), by 10 · reach at most.
    Phase: Step, proximal; weights of any shape → the same shapes.
    Numbers: lam, per unit of loss, >= 0, off at 0; ratio, the lasso's share, in [0, 1]: 1 is L1, 0 is L2 without its way
        through the gradient. factors multiply lam weight by weight, as for L1.
    Errors: numbers outside their range; a selector that matches no weight; an optimizer whose rate is not known.
    Source: Zou and Hastie 2005, Regularization and variable selection via the elastic net. lam and ratio are scikit-learn's
        alpha and l1_ratio where the loss is half the mean squared error.

    >>> w, unit = torch.tensor([0.05, -0.3, 1.0]), torch.tensor(1.0)
    >>> ElasticNet(0.2, ratio=0.5).step({"w": w}, lr={"w": unit}, rate={"w": unit}, state={})[0]["w"]
    tensor([ 0.0000, -0.1818,  0.8182])
    """

    moment: ClassVar[Literal["before", "proximal", "after"]] = "proximal"
    elementwise: ClassVar[bool] = True

    lam: float = hyper(1e-4, valid="[0, inf)", off=0.0, low=1e-6, high=1e-1, log=True)
    ratio: float = hyper(0.5, valid="[0, 1]", low=0.05, high=1.0)
    where: Where = kernels
    factors: Factors | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factors(self)

    def on(self, model: nn.Module) -> Any:
        refuse_normalized(self, model)
        return self

    def init(self, weights: Weights, buffers: Weights) -> State:
        return _factors(self.factors, weights)

    def penalty(self, weights: Weights, state: State) -> Tensor:
        def of(name: str, w: Tensor) -> Tensor:
            return ((self.ratio * w.abs() + (1 - self.ratio) / 2 * w.square()) * _factor(state, name)).sum()

        return self.lam * torch.stack([of(n, w) for n, w in weights.items()]).sum()

    def step(self, weights: Weights, lr: Weights, rate: Weights, state: State) -> tuple[dict[str, Tensor], State]:
        shrunk = {}
        for name, w in weights.items():
            theta = (self.lam * _factor(state, name) * rate[name]).to(w.dtype).clamp(max=torch.finfo(w.dtype).max)  # 0 · inf
            lasso = self.ratio * theta
            goal = (w - _within(w, lasso)) / (1 + (1 - self.ratio) * theta)
            shrunk[name] = toward(goal, w, lr[name])
        return shrunk, state


def refuse_normalized(one: Any, model: nn.Module) -> None:
    """Refuse to zero what a parametrization divides by its length: the weight would be 0/0."""
    modules = dict(model.named_modules())
    for name in one.where.select(model):
        around = modules.get(name.rpartition(".")[0])
        if isinstance(around, ParametrizationList) and any(isinstance(m, _WeightNorm | _SpectralNorm) for m in around):
            raise GoodfitError(
                f"{type(one).__name__} makes zeros, but {name} is divided by its length, which would be 0/0; leave it out by "
                "where=kernels & ~named('*parametrizations*'), or remove the parametrization."
            )


def toward(goal: Tensor, w: Tensor, reach: Tensor) -> Tensor:
    """From w to the goal, by ten steps of the optimizer at most.

    Where training rests, the proximal step takes back what the optimizer did, which is less; so the cap moves no fixed
    point, and spares a weight whose rate is not known yet, since it has seen no gradient.
    """
    return w + _within(goal - w, (CAP * reach).to(w.dtype))


def _within(w: Tensor, bound: Tensor) -> Tensor:
    """w cut off at ± bound; torch's clamp takes twice as long where the bound is a tensor."""
    return torch.maximum(torch.minimum(w, bound), -bound)


def _check_factors(one: Any) -> None:
    if one.factors is not None and not isinstance(one.factors, Factors):
        raise GoodfitError(
            f"{type(one).__name__}.factors must be one of gf.factors, such as adaptive(), got factors={one.factors!r}."
        )


def _factors(factors: Factors | None, weights: Weights) -> State:
    if factors is None:
        return {}
    return {f"factor.{n}": f.clamp(max=torch.finfo(f.dtype).max) for n, f in factors.of(weights).items()}  # inf · 0 is nan


def _factor(state: State, name: str) -> Any:
    return state.get(f"factor.{name}", 1.0)
