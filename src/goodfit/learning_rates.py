"""When a learning-rate scheduler of torch takes its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from goodfit.errors import GoodfitError

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
    if given is not None and not isinstance(given, LRScheduler) and not callable(given):
        raise GoodfitError(
            f"scheduler must be a function from the optimizer to a scheduler of torch, got a {type(given).__name__}; as in "
            "scheduler=lambda optimizer: CosineAnnealingLR(optimizer, 100)."
        )
    if isinstance(given, LRScheduler) and refit is not None:
        raise GoodfitError("refit trains anew, with a scheduler of its own; give a function that makes it from the optimizer.")


def scheduling(given: LRScheduler | MakeScheduler | None, unit: str, optimizer: Optimizer) -> Scheduling:
    """The scheduler that was given or made, for this very optimizer."""
    made = given(optimizer) if callable(given) and not isinstance(given, LRScheduler) else given
    if made is None:
        return Scheduling()
    if not isinstance(made, LRScheduler) or made.optimizer is not optimizer:
        what = "one of another optimizer" if isinstance(made, LRScheduler) else f"a {type(made).__name__}"
        raise GoodfitError(f"scheduler must give a scheduler of torch for the optimizer that trains, got {what}.")
    return Scheduling(made, unit)
