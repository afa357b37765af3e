"""The optimizer's rate per weight: how far one step moves a weight per unit of constant gradient; and its reach.

A proximal step with threshold lam · rate has the optimum of the penalised objective as its fixed point: where the
optimizer rests, its update is rate · g with |g| <= lam on the zeros and g = -lam · sign(w) elsewhere. With lr in place of
the rate that holds for plain SGD alone (docs/design.md has the derivation and the numbers).

The reach is the step under a gradient of the size that the weight has seen so far: the learning rate for the Adam family,
without bound for SGD, whose rate does not depend on that size. A cap of 10 · reach leaves the fixed points where they are
and spares weights that have seen no gradient yet, whose rate is lr/eps.

All formulas are branch-free on tensors and never ask for a number back (no `.item()`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, optim

from goodfit.errors import GoodfitError

__all__ = ["Formula", "adam", "formula_of"]

Group = dict[str, Any]
Formula = Callable[[Group, dict[str, Any]], tuple[Tensor, Tensor]]
"""(param group, state of a weight or of a block of it) → rate and reach; shape () where all its numbers share one."""


def _scalar(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)  # beta2 ** step is 1 in bfloat16; () does not promote a weight


def _sgd(group: Group, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    lr, m = _scalar(group["lr"]), group["momentum"]
    return lr * (1 - group["dampening"]) / (1 - m) if m else lr, torch.full_like(lr, torch.inf)


def adam(group: Group, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """That of Adam and of its decoupled forms."""
    lr = _scalar(group["lr"])
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    correction = 1 - group["betas"][1] ** _scalar(state["step"])
    return lr / second.mul(correction.reciprocal()).sqrt_().add_(group["eps"]), lr


def _rmsprop(group: Group, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    lr = _scalar(group["lr"]) / (1 - group["momentum"])
    size = state["square_avg"].sqrt() + group["eps"]
    if not group["centered"]:
        return lr / size, lr
    spread = (state["square_avg"] - state["grad_avg"] ** 2).clamp(min=0).sqrt() + group["eps"]
    return lr / spread, lr * (size / spread)


def _adagrad(group: Group, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    lr = _scalar(group["lr"]) / (1 + (_scalar(state["step"]) - 1) * group["lr_decay"])
    return lr / (state["sum"].sqrt() + group["eps"]), lr


def _adamax(group: Group, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    lr = _scalar(group["lr"])
    return lr / state["exp_inf"], lr


def _radam(group: Group, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    lr, beta, step = _scalar(group["lr"]), group["betas"][1], _scalar(state["step"])
    longest = 2 / (1 - beta) - 1
    correction = 1 - beta**step
    length = longest - 2 * step * beta**step / correction
    share = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    rectified = lr * share.clamp(min=0).sqrt() * correction.sqrt() / (state["exp_avg_sq"].sqrt() + group["eps"])
    return torch.where(length > 5, rectified, lr.to(rectified.dtype)), lr


def _adadelta(group: Group, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    reach = _scalar(group["lr"]) * (state["acc_delta"] + group["eps"]).sqrt()
    return reach / (state["square_avg"] + group["eps"]).sqrt(), reach


_FORMULAS: dict[type[optim.Optimizer], Formula] = {
    optim.SGD: _sgd,
    optim.Adam: adam,
    optim.AdamW: adam,
    optim.NAdam: adam,
    optim.RMSprop: _rmsprop,
    optim.Adagrad: _adagrad,
    optim.Adamax: _adamax,
    optim.RAdam: _radam,
    optim.Adadelta: _adadelta,
}


def formula_of(optimizer: optim.Optimizer) -> Formula:
    """The rate formula of an optimizer; refuses by name one whose rate is not known.

    A subclass counts as its parent only where it inherits `step`.
    """
    kind = type(optimizer)
    own = inspect.unwrap(kind.step)
    for known in kind.__mro__:
        if known in _FORMULAS and inspect.unwrap(known.step) is own:
            return _FORMULAS[known]
    names = ", ".join(sorted(k.__name__ for k in _FORMULAS))
    raise GoodfitError(
        f"A proximal step needs the optimizer's rate per weight, and that of {kind.__name__} is not known; use one of {names}."
    )
