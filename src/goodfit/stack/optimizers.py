"""The optimizer of K members: one of torch where they share its numbers, else AdamW with a learning rate for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from goodfit import rates
from goodfit.errors import GoodfitError
from goodfit.schedules.schedule import Schedule
from goodfit.stack.adamw import AdamW

__all__ = ["MakeOptimizer", "Rate", "kept_state", "lr_at", "optimizer_of", "plain_optimizer", "refuse_mixing"]

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
Rate = float | Schedule


def optimizer_of(make: MakeOptimizer | None, weights: Mapping[str, Tensor], lrs: Sequence[Rate]) -> Optimizer:
    """For members along the first axis."""
    trained = [w for w in weights.values() if w.requires_grad]
    if make is not None:
        return make(trained)
    if len(set(lrs)) == 1:
        return plain_optimizer(trained, lrs[0])
    return AdamW(trained, lr=torch.tensor([lr_at(lr, 0) for lr in lrs], dtype=torch.float64))


def plain_optimizer(weights: Iterable[Tensor], lr: Rate) -> Optimizer:
    """What trains where nothing else was said: AdamW without decay, as in fit."""
    trained = list(weights)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained)
    return torch.optim.AdamW(trained, lr=lr_at(lr, 0), weight_decay=0.0, fused=fused)


def lr_at(lr: Rate, step: int) -> float:
    """The learning rate after so many steps."""
    return lr.at(step) if isinstance(lr, Schedule) else float(lr)


def refuse_mixing(make: MakeOptimizer) -> str:
    """Why members cannot share an optimizer, "" where each of its numbers counts by itself."""
    made = make([torch.zeros(1, requires_grad=True)])
    try:
        rates.formula_of(made)
    except GoodfitError:
        return f"a number of {type(made).__name__} may depend on others"
    return f"{type(made).__name__} maximizes" if any(group.get("maximize") for group in made.param_groups) else ""


def kept_state(optimizer: Optimizer, before: Mapping[str, Tensor], after: Mapping[str, Tensor], rows: Tensor) -> None:
    """Go on with these members: other tensors in the place of those before, with their part of the state."""
    new = {id(old): after[name] for name, old in before.items()}
    for old in before.values():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            kept = {k: t[rows.to(t.device)] if isinstance(t, Tensor) and t.shape == old.shape else t for k, t in state.items()}
            optimizer.state[new[id(old)]] = kept
    for group in optimizer.param_groups:
        group["params"] = [new[id(p)] for p in group["params"]]
        if isinstance(group["lr"], Tensor) and group["lr"].ndim:
            group["lr"] = group["lr"][rows]
