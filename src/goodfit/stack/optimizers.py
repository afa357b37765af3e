"""The optimizer of K members: one of torch where they share its numbers, else AdamW with a learning rate for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from goodfit import rates
from goodfit.errors import GoodfitError
from goodfit.schedules.schedule import Schedule
from goodfit.stack.adamw import AdamW

__all__ = ["MakeOptimizer", "Rate", "about", "kept_state", "lr_at", "optimizer_of", "plain_optimizer", "refuse_mixing"]

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


def refuse_mixing(make: MakeOptimizer, models: Sequence[nn.Module]) -> str:
    """Why members cannot share an optimizer, "" where each of its numbers counts by itself."""
    alone = [p.detach().clone().requires_grad_() for p in models[0].parameters() if p.requires_grad]
    stacked = [p.detach().expand(2, *p.shape).clone().requires_grad_() for p in alone]
    made, other = make(alone), make(stacked)
    if not isinstance(made, Optimizer):
        raise GoodfitError(f"optimizer must be a function from parameters to an optimizer of torch, got {made!r:.60} from it.")
    if _layout(made, alone) != _layout(other, stacked):
        return "their optimizer looks at the shape of the weights"
    if made._optimizer_step_pre_hooks or made._optimizer_step_post_hooks:
        return "their optimizer has hooks"
    try:
        rates.formula_of(made)
    except GoodfitError:
        return f"a number of {type(made).__name__} may depend on others"
    return f"{type(made).__name__} maximizes" if any(group.get("maximize") for group in made.param_groups) else ""


def _layout(optimizer: Optimizer, weights: Sequence[Tensor]) -> list[Any]:
    """Which weights are in which group, with what numbers."""
    places = {id(p): i for i, p in enumerate(weights)}
    return [
        ([places.get(id(p)) for p in group["params"]], {k: repr(v) for k, v in group.items() if k != "params"})
        for group in optimizer.param_groups
    ]


def about(make: MakeOptimizer | None, lrs: Sequence[Rate]) -> str:
    """What a saved state of it depends on."""
    if make is None:
        return f"the optimizer AdamW, lr={list(lrs)}"
    return f"the optimizer {type(make([torch.zeros(1, requires_grad=True)])).__name__}, lr=its own"


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
