"""When a learning-rate scheduler takes its steps: one of torch, or a schedule of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from goodfit.errors import GoodfitError
from goodfit.schedules.schedule import Schedule

__all__ = ["MakeScheduler", "Scheduling", "refuse_scheduler", "scheduling"]

MakeScheduler = Callable[[Optimizer], LRScheduler]
UNITS = ("epochs", "steps")


class Scheduling:
    """A scheduler, or none, that steps behind each epoch or each step; ReduceLROnPlateau does so at each check."""

    def __init__(self, scheduler: LRScheduler | None = None, unit: str = "epochs") -> None:
        self.scheduler = scheduler
        self.unit = "checks" if isinstance(scheduler, ReduceLROnPlateau) else unit

    def behind(self, unit: str, *score: Any) -> None:
        """Step, where this is the unit that it counts."""
        if self.scheduler is not None and unit == self.unit:
            self.scheduler.step(*score)


def refuse_scheduler(given: Any, unit: Any, refit: Any) -> None:
    """Refuse what is no scheduler, and no function that makes one."""
    if unit not in UNITS:
        raise GoodfitError(f"scheduler_unit must be 'epochs' or 'steps', got scheduler_unit={unit!r}.")
    if given is not None and not isinstance(given, LRScheduler | Schedule) and not callable(given):
        raise GoodfitError(
            "scheduler must be of gf.schedules, as in scheduler=gf.schedules.cosine(1e-3, 0.0, epochs=100), or a function from "
            f"the optimizer to a scheduler of torch, got a {type(given).__name__}."
        )
    if isinstance(given, LRScheduler) and refit is not None:
        raise GoodfitError("refit trains anew, with a scheduler of its own; give a function that makes it from the optimizer.")


def scheduling(
    given: LRScheduler | MakeScheduler | Schedule | None, unit: str, optimizer: Optimizer, steps_per_epoch: int | None
) -> Scheduling:
    """The scheduler that was given or made, for this very optimizer."""
    if isinstance(given, Schedule):
        return Scheduling(_following(given.in_steps(steps_per_epoch), optimizer), "steps")
    made = given(optimizer) if callable(given) and not isinstance(given, LRScheduler) else given
    if made is None:
        return Scheduling()
    if not isinstance(made, LRScheduler) or made.optimizer is not optimizer:
        what = "one of another optimizer" if isinstance(made, LRScheduler) else f"a {type(made).__name__}"
        raise GoodfitError(f"scheduler must give a scheduler of torch for the optimizer that trains, got {what}.")
    return Scheduling(made, unit)


def _following(schedule: Schedule, optimizer: Optimizer) -> LRScheduler:
    """A scheduler of torch whose learning rate is that of a schedule."""
    if min(schedule.ends) < 0:
        raise GoodfitError(f"A learning rate must be >= 0, got scheduler={schedule!r}.")
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) > 1 or not min(rates) > 0:
        raise GoodfitError(
            f"A schedule is the one learning rate of all weights, and the optimizer has lr={sorted(rates)}; give its groups "
            "one lr > 0, or a function from the optimizer to a scheduler of torch."
        )
    return LambdaLR(optimizer, [_share(schedule, group["lr"]) for group in optimizer.param_groups])


def _share(schedule: Schedule, lr: Any) -> Callable[[int], float]:
    return lambda step: schedule.at(step) / float(lr)
