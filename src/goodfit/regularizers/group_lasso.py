"""Group lasso: whole units, filters, inputs or heads at exactly zero, by a proximal step at the optimizer's own rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError
from goodfit.groups import Groups, Layout, units
from goodfit.hyper import hyper, lifted
from goodfit.phases import State, Step, Weights
from goodfit.regularizers.sparsity import refuse_normalized, toward
from goodfit.where import Where, kernels

__all__ = ["GroupLasso", "check_groups", "laid_out", "layout_of"]


@dataclass(frozen=True)
class GroupLasso(Step):
    """Lasso over groups: whole units, filters, input features or attention heads become exactly zero, and can be removed.

    Formula: J(w) = loss + lam · Σ_g √|g| · ‖w_g‖. After the optimizer's step, with θ = lam · √|g| · rate per weight, a group
        with Σ (w/θ)² <= 1 becomes zero; in any other w ← w · s/(s + θ), where s > 0 solves Σ w²/(s + θ)² = 1. No weight moves
        by more than 10 · reach (see L1).
    Phase: Step, proximal; weights of any shape → the same shapes.
    Numbers: lam, per unit of loss and weight, >= 0, off at 0. groups: units, inputs, heads() or custom({...}) of gf.groups;
        weights that have no such group stay as they are, and frozen ones do not count in theirs.
    Errors: lam < 0; groups that fit no selected weight; an optimizer whose rate is not known, by name.
    Source: Yuan and Lin 2006, Model selection and estimation in regression with grouped variables. Where the rates in a
        group differ, as under Adam, the usual scaling by 1 − θ/‖w‖ has another optimum; we solve the proximal problem.

    >>> w, unit = torch.tensor([[3.0, 4.0], [0.1, 0.2]]), torch.tensor(1.0)
    >>> GroupLasso(2.5 / 2**0.5).step({"w": w}, lr={"w": unit}, rate={"w": unit}, state={})[0]["w"]
    tensor([[1.5000, 2.0000],
            [0.0000, 0.0000]])
    """

    moment: ClassVar[Literal["before", "proximal", "after"]] = "proximal"

    lam: float = hyper(1e-4, valid="[0, inf)", off=0.0, low=1e-6, high=1e-1, log=True)
    groups: Groups = units
    where: Where = kernels

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self)

    def on(self, model: nn.Module) -> Any:
        refuse_normalized(self, model)
        return laid_out(self, model)

    def penalty(self, weights: Weights, state: State) -> Tensor:
        layout = layout_of(self, weights)
        lengths = layout.sums({n: w.square() for n, w in weights.items()}).sqrt()
        return self.lam * (lengths * layout.sizes(weights, lengths).sqrt()).sum()

    def step(self, weights: Weights, lr: Weights, rate: Weights, state: State) -> tuple[dict[str, Tensor], State]:
        layout = layout_of(self, weights)
        fine = {n: w if w.dtype == torch.float64 else w.float() for n, w in weights.items() if n in layout.ids}
        if not fine:
            return dict(weights), state
        scale = self.lam * layout.sizes(fine, next(iter(fine.values()))).sqrt()
        theta = {n: (layout.spread(scale, n) * rate[n]).to(w.dtype) for n, w in fine.items()}
        lost = layout.sums({n: torch.where(w == 0, 0, (w / theta[n]).square()) for n, w in fine.items()}) <= 1
        s = torch.where(lost, 1.0, _secular(layout, fine, theta))
        shares = {n: layout.spread(s, n) / (layout.spread(s, n) + theta[n]) for n in fine}
        goals = {n: torch.where(layout.spread(lost, n), 0, w * shares[n]) for n, w in fine.items()}
        return {**weights, **{n: toward(g, fine[n], lr[n]).to(weights[n].dtype) for n, g in goals.items()}}, state


def _secular(layout: Layout, z: Weights, theta: Weights, rounds: int = 6) -> Tensor:
    """The s of each group with Σ z²/(s + θ)² = 1, by Newton's method on (Σ z²/(s + θ)²)^(−1/2), which is concave in s.

    It is a line where θ is the same throughout a group: then the first round is exact.
    """
    s = layout.sums({n: w.square() for n, w in z.items()}).sqrt()
    for _ in range(rounds):
        below = {n: layout.spread(s, n) + theta[n] for n in z}
        squares = {n: torch.where(w == 0, 0, (w / below[n]).square()) for n, w in z.items()}
        a = layout.sums(squares)
        b = layout.sums({n: torch.where(q == 0, 0, q / below[n]) for n, q in squares.items()})
        s = torch.where(b > 0, (s + a * (a.sqrt() - 1) / b).clamp(min=0), s)
    return s


def laid_out(one: Any, model: nn.Module) -> Any:
    """A regularizer over groups with its groups laid out over a model, by the types of its modules."""
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name].detach() for name in one.where.select(model)}
    return lifted(one, groups=one.groups.layout(chosen, model)) if chosen else one


def layout_of(one: Any, weights: Weights) -> Layout:
    """The layout that `laid_out` made, or one by the shapes of the weights alone."""
    return one.groups if isinstance(one.groups, Layout) else one.groups.layout(weights)


def check_groups(one: Any) -> None:
    if not isinstance(one.groups, Groups):
        raise GoodfitError(f"{type(one).__name__}.groups must be one of gf.groups, such as units, got groups={one.groups!r}.")
