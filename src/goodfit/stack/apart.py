"""Members that cannot be computed at once: runs one after the other, behind the same calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from goodfit.run import Run
from goodfit.stack.optimizers import MakeOptimizer, Rate, lr_at, plain_optimizer
from goodfit.surgery.running import call_model, evaluating

__all__ = ["Apart"]


class Apart:
    """Runs, with an optimizer each."""

    def __init__(self, runs: Sequence[Run], lrs: Sequence[Rate], make: MakeOptimizer | None) -> None:
        self.runs, self.lrs = list(runs), list(lrs)
        trained = [[p for p in run.model.parameters() if p.requires_grad] for run in runs]
        self.optimizers = [make(p) if make else plain_optimizer(p, lr) for p, lr in zip(trained, lrs, strict=True)]
        self._given, self._began = make is not None, False

    def batch(self, x: Any, y: Any, own: bool) -> tuple[Any, Any, bool]:
        """Each run's own batch, in a list."""
        each = [run.batch(*_of(i, x, y, own, own)) for i, run in enumerate(self.runs)]
        return [x for x, _ in each], [y for _, y in each], True

    def loss(self, x: Any, y: Any, own: bool, own_y: bool) -> Tensor:
        """The losses of one batch, in train mode."""
        losses = []
        for i, run in enumerate(self.runs):
            if not self._began or not run.model.training:
                run.model.train()  # a model may say in it what rests
            losses.append(run.loss(*_of(i, x, y, own, own_y)))
        self._began = True
        return torch.stack(losses)

    def outputs(self, x: Any) -> Any:
        """What each model gives in eval mode."""
        each = []
        for run in self.runs:
            with evaluating(run.model), torch.no_grad():
                each.append(call_model(run.model, x))
        return tree_map(lambda *t: torch.stack(t), *each)

    def weights(self) -> list[Tensor]:
        """Those that are trained, of all members."""
        return [p for run in self.runs for p in run.model.parameters()]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def before_step(self) -> None:
        for run, optimizer, lr in zip(self.runs, self.optimizers, self.lrs, strict=True):
            if not self._given:
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(lr, run._plan.clock.step)
            run.gradient(optimizer)

    def move(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def after_step(self) -> None:
        for run, optimizer in zip(self.runs, self.optimizers, strict=True):
            run.step(optimizer)

    def keep(self, rows: Tensor) -> None:
        """Go on with these members."""
        self.runs, self.lrs, self.optimizers = ([of[i] for i in rows.tolist()] for of in (self.runs, self.lrs, self.optimizers))

    def hand_over(self) -> None:
        """Nothing: runs have all that is theirs."""

    def take_over(self) -> None:
        """The same."""


def _of(i: int, x: Any, y: Any, own: bool, own_y: bool) -> tuple[Any, Any]:
    def one(given: Any, own: bool) -> Any:
        if not own:
            return given
        return given[i] if isinstance(given, list) else tree_map(lambda t: t[i], given)

    return one(x, own), one(y, own_y)
