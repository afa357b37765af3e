"""Constraints: weights that may go anywhere within a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from goodfit.groups import Groups, units
from goodfit.hyper import hyper
from goodfit.phases import State, Step, Weights
from goodfit.regularizers.group_lasso import check_groups, laid_out, layout_of
from goodfit.where import Where, kernels

__all__ = ["MaxNorm"]


@dataclass(frozen=True)
class MaxNorm(Step):
    """Max-norm constraint: the incoming weights of each unit stay within a ball.

    Formula: w_g ← w_g · min(1, norm / ‖w_g‖) after each step, for each group g.
    Phase: Step, after; weights of any shape → the same shapes.
    Numbers: norm, the largest length of a group, in units of the weights, > 0, off at inf. groups: units, inputs, heads() or
        custom({...}) of gf.groups.
    Errors: norm <= 0; groups that fit no selected weight.
    Source: Srebro and Shraibman 2005, Rank, trace-norm and max-norm; Srivastava et al. 2014, Dropout, section 5.1. It is
        plain renormalisation: the nearest point of the ball, hence the constrained optimum, under SGD, but not under
        optimizers whose rates differ within a group, such as Adam, where it is a bound and no more.

    >>> MaxNorm(2.5).step({"w": torch.tensor([[3.0, 4.0], [0.6, 0.8]])}, lr={}, rate={}, state={})[0]["w"]
    tensor([[1.5000, 2.0000],
            [0.6000, 0.8000]])
    """

    moment: ClassVar[Literal["before", "proximal", "after"]] = "after"

    norm: float = hyper(3.0, valid="(0, inf]", off=math.inf, low=0.5, high=10.0, log=True)
    groups: Groups = units
    where: Where = kernels

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self)

    def on(self, model: nn.Module) -> Any:
        return laid_out(self, model)

    def step(self, weights: Weights, lr: Weights, rate: Weights, state: State) -> tuple[dict[str, Tensor], State]:
        layout = layout_of(self, weights)
        if not any(n in layout.ids for n in weights):
            return dict(weights), state
        lengths = layout.sums({n: w.square() for n, w in weights.items()}).sqrt()
        scale = (self.norm / lengths).clamp(max=1)
        return {n: w * layout.spread(scale, n) if n in layout.ids else w for n, w in weights.items()}, state
