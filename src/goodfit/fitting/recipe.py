"""How a model is trained, whatever it is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from goodfit.batchnorms.present import by_batch
from goodfit.checkpoints.checkpoints import Checkpoints
from goodfit.cocktail import Cocktail
from goodfit.fitting.asked import asked, refuse_different
from goodfit.fitting.compute import Compute
from goodfit.fitting.data import peek, to_device
from goodfit.fitting.guard import Guard
from goodfit.fitting.learning_rates import MakeScheduler, scheduling
from goodfit.fitting.loop import LossFunction
from goodfit.fitting.preparation import (
    MakeOptimizer,
    as_reals,
    averaged,
    optimizer_for,
    refuse_beside,
    refuse_maximizing,
    steps_of,
)
from goodfit.fitting.rollback import back_to_best, refuse_rollback
from goodfit.fitting.small_batches import merged_for_norms, refuse_single_values
from goodfit.fitting.stepping import Stepping
from goodfit.fitting.training import Training
from goodfit.interrupts import Interrupts
from goodfit.layers.synchronized import SyncBatchNorm
from goodfit.logs import Told
from goodfit.losses import loss_of, rowwise, task_of
from goodfit.noise import Noise
from goodfit.processes import most, rank, world
from goodfit.progress import Progress
from goodfit.regularizers.batchnorm import BatchNorm
from goodfit.run import Run
from goodfit.schedules.schedule import Schedule
from goodfit.surgery.running import training as training_mode

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, whatever it is trained on."""

    cocktail: Cocktail
    loss: LossFunction | None
    task: str | None
    optimizer: Optimizer | MakeOptimizer | None
    scheduler: LRScheduler | MakeScheduler | Schedule | None
    scheduler_unit: str
    seed: int
    home: torch.device
    compute: Compute
    nonfinite: str
    check_every: int | None
    keep: str | Path | None
    checkpoints: Checkpoints | None
    progress: bool | None
    logs: Any = None

    def begin(self, model: nn.Module, train: Any, valid: Any, epoch: Any = None) -> Training:
        """Build the model and all beside it. epoch: batches whose number is the length of an epoch for schedules."""
        torch.manual_seed(self.seed)
        x, y = to_device(peek(train), self.home)
        kind = self.task if self.task is not None else "" if self.loss is not None else task_of(y)
        loss = self.loss or loss_of(kind)
        with training_mode(model):
            if by_batch(model) or any(self.cocktail.of(BatchNorm)):
                train = merged_for_norms(train, "train", each=2 if self._alone(model) else 1)
        steps = steps_of(train if epoch is None else epoch, self.compute.accumulate)
        mix = self.cocktail.in_steps(steps)
        refuse_maximizing(mix)
        refuse_beside(mix, self.loss, self.compute.accumulate)
        refuse_rollback(self.nonfinite, mix, self.keep)
        measure = averaged(loss)
        run = Run(mix, model, loss=measure, example=x, seed=self.seed, keep=self.keep)
        prepare = as_reals(mix, kind, model, x, y)
        optimizer = optimizer_for(self.optimizer, model)
        with training_mode(model):
            if most(len(y) == 1):
                refuse_single_values(model, x)
        schedule = scheduling(self.scheduler, self.scheduler_unit, optimizer, steps)
        if world() > 1:  # masks of torch's own dropout differ from process to process
            torch.manual_seed(Noise(self.seed, "process", rank()).generator().initial_seed())
        guard = Guard(model, self.nonfinite, partial(back_to_best, run, optimizer))
        stepping = Stepping(run, optimizer, prepare, self.compute, guard)
        told = Told(self.logs if rank() == 0 else None)
        return Training(
            stepping,
            train,
            valid,
            measure,
            rowwise(loss),
            self.check_every,
            self.nonfinite,
            told,
            schedule,
            asked=asked(model, self.cocktail, loss, optimizer),
        )

    def _alone(self, model: nn.Module) -> bool:
        """Whether a batch norm sees the rows of its own process alone."""
        apart = (m for m in by_batch(model).values() if not isinstance(m, SyncBatchNorm | nn.SyncBatchNorm))
        return any(True for _ in apart) or any(not one.sync for one in self.cocktail.of(BatchNorm))

    def refuse_different(self, work: Training, epochs: int) -> None:
        """Refuse processes that train together and were not asked for the same."""
        batches = {f"the number of batches of {name}": length_hint(getattr(work, name), -1) for name in ("train", "valid")}
        settings = {name: getattr(self, name) for name in ("seed", "compute", "nonfinite", "check_every")}
        refuse_different({**work.asked, **batches, **settings, "epochs": epochs})

    def interrupts(self, bar: Progress) -> Interrupts:
        """What hears Ctrl-C while it trains."""
        return Interrupts(terminate=self.checkpoints is not None, tell=bar.say)
