"""Members of one kind, computed at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from goodfit.again import StepBatches, watched
from goodfit.errors import GoodfitError
from goodfit.losses import refuse_whole
from goodfit.noise import Clock, Noise
from goodfit.phases import Batch, Build, Gradient, Loss
from goodfit.run import Run
from goodfit.schedules.schedule import Schedule
from goodfit.stack.acting import Acting
from goodfit.stack.forward import Forward, losses_of
from goodfit.stack.members import Members
from goodfit.stack.optimizers import Rate, kept_state, lr_at
from goodfit.stack.slots import Slot, slots_of

__all__ = ["Together"]


class Together:
    """Runs of one kind, whose models lie in one set of tensors. What acts at each step is lifted; checks are each run's own."""

    def __init__(self, runs: Sequence[Run], seeds: Sequence[int]) -> None:
        self.runs = list(runs)
        self.clock = Clock()
        self.members = Members([run.model for run in runs])
        self.slots = slots_of(runs)
        self.seeds = torch.tensor(list(seeds))
        self.forward = Forward(self.members, self.clock)
        self.optimizer: Any = None
        self._acting = Acting(self.members, self.clock, self._redo)
        self._lrs: list[Rate] | None = None
        self._micro = StepBatches()
        self._batches = (-1, 0)
        self._settle()

    def use(self, optimizer: Optimizer, lrs: Sequence[Rate] | None) -> None:
        """Train with this optimizer; lrs: those of the members, None where the optimizer knows its own."""
        self.optimizer, self._lrs = optimizer, None if lrs is None else list(lrs)

    def of(self, phase: type[Any]) -> list[Slot]:
        """The slots of one phase, in order."""
        return self._acting.of(phase)

    def batch(self, x: Any, y: Any, own: bool) -> tuple[Any, Any, bool]:
        """Batch regularizers on one batch; whether each member has its own behind them."""
        call = self._batches[1] + 1 if self._batches[0] == self.clock.step else 0
        self._batches = (self.clock.step, call)
        for slot in self._acting.of(Batch):
            if slot.one.mixes:
                refuse_whole(y, type(slot.one).__name__)

            def act(one: Any, seed: Tensor, x: Any, y: Tensor, slot: Slot = slot) -> tuple[Any, Tensor]:
                return one.batch(x, y, Noise(seed, slot.name, self.clock.step, call))

            new = slot.lift(self.clock.step, act, self.seeds, x, y, dims=(0, *((0, 0) if own else (None, None))))
            old = (x, y) if own else tree_map(lambda t: t.expand(len(self.runs), *t.shape), (x, y))
            (x, y), own = tree_map(slot.where, new, old), True
        return x, y, own

    def loss(self, x: Any, y: Any, own: bool, own_y: bool) -> Tensor:
        """The losses of one batch, (K,), in train mode."""
        if any(slot.one.uphill for slot in self._acting.of(Gradient)):
            if not own:
                x, own = tree_map(lambda t: t.expand(len(self.runs), *t.shape).clone(), x), True
            x = watched(x)
        losses = self._losses(x, y, own, own_y)
        self._micro.note(self.members.weights.values(), losses, x, y=y, own=own, own_y=own_y)
        return losses

    @torch.no_grad()
    def outputs(self, x: Any) -> Any:
        """What each model gives in eval mode."""
        return self.forward(x, False, False)

    def weights(self) -> list[Tensor]:
        """Those that are trained, of all members."""
        return list(self.members.weights.values())

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self._micro.drop()

    def move(self) -> None:
        self.optimizer.step()

    def before_step(self) -> None:
        """Penalties, Gradient regularizers and what comes before the optimizer's step, on the gradients that are there."""
        twice = next((slot.one for slot in self._acting.of(Gradient) if slot.one.twice), None)
        if twice is not None and len(self._micro) != 1:
            seen, name = len(self._micro), type(twice).__name__
            raise GoodfitError(f"{name} needs a second gradient, which takes one stack.loss(x, y) per step, got {seen}.")
        self._set_rates()
        self._acting.before_step(self.optimizer)

    def after_step(self) -> None:
        """What comes after the optimizer's step; then time passes."""
        self._acting.after_step(self.optimizer)
        self.clock.step += 1
        self._micro.forget()
        for one, model in self._tuned:
            one.at(self.clock.step).tune(model)

    def keep(self, rows: Tensor) -> None:
        """Go on with these members; the runs of the others have all that is theirs."""
        self.hand_over()
        left = set(range(len(self.runs))) - set(rows.tolist())
        for plan in (self.runs[i]._plan for i in left):
            plan.states = {key: {name: t.clone() for name, t in state.items()} for key, state in plan.states.items()}
        before = self.members.weights
        self.members.keep(rows)
        kept_state(self.optimizer, before, self.members.weights, rows)
        for slot in self.slots:
            slot.keep(rows)
        self.slots = [slot for slot in self.slots if bool(slot.present.any())]
        self.runs, self.seeds = [self.runs[i] for i in rows.tolist()], self.seeds[rows]
        self._lrs = None if self._lrs is None else [self._lrs[i] for i in rows.tolist()]
        self._settle()

    def _settle(self) -> None:
        self._acting.slots, self._acting.seeds = self.slots, self.seeds
        built = [(one, run.model) for run in self.runs for one in run._plan.active.values() if isinstance(one, Build)]
        self._tuned = [(one, model) for one, model in built if one.scheduled]

    def take_over(self) -> None:
        """Time and states, from each run."""
        self.clock.step = self.runs[0]._plan.clock.step
        for i, run in enumerate(self.runs):
            for slot in self.slots:
                slot.take_over(i, run)

    def hand_over(self) -> None:
        """Time and states, to each run."""
        for i, run in enumerate(self.runs):
            run._plan.clock.step = self.clock.step
            for slot in self.slots:
                slot.hand_over(i, run)

    def _set_rates(self) -> None:
        if self._lrs is None or not any(isinstance(lr, Schedule) for lr in self._lrs):
            return
        now = [lr_at(lr, self.clock.step) for lr in self._lrs]
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(now, dtype=torch.float64) if isinstance(group["lr"], Tensor) else now[0]

    def _redo(self, epsilon: Tensor | None) -> None:
        """The gradients of the step's batch once more, at inputs moved by epsilon where it is given."""
        self._micro.again(self._losses, epsilon)

    def _losses(self, x: Any, y: Any, own: bool, own_y: bool) -> Tensor:
        outputs = self.forward(x, own, True)
        loss = self.runs[0]._loss
        assert loss is not None
        losses = losses_of(loss, outputs, y, own_y)
        for slot in self._acting.of(Loss):
            dims = (0, 0, 0 if own_y else None)
            new = slot.lift(self.clock.step, lambda one, *given: one.loss(*given), losses, outputs, y, dims=dims)
            losses = slot.where(new, losses)
        return losses
