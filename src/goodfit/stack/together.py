"""Members of one kind, computed at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from goodfit import rates
from goodfit.errors import GoodfitError
from goodfit.noise import Clock, Noise
from goodfit.phases import Batch, Build, Gradient, Loss, Penalty, Step
from goodfit.run import Run
from goodfit.stack.adamw import AdamW
from goodfit.stack.forward import Forward, losses_of
from goodfit.stack.members import Members
from goodfit.schedules.schedule import Schedule
from goodfit.stack.optimizers import Rate, kept_state, lr_at
from goodfit.stack.slots import Slot, slots_of
from goodfit.uphill import uphill, watched

__all__ = ["Together"]


class Together:
    """Runs of one kind, whose models lie in one set of tensors. What acts at every step is lifted; a run does its checks itself."""

    def __init__(self, runs: Sequence[Run], seeds: Sequence[int]) -> None:
        self.runs = list(runs)
        self.clock = Clock()
        self.members = Members([run.model for run in runs])
        self.slots = slots_of(runs)
        self.seeds = torch.tensor(list(seeds))
        self.forward = Forward(self.members, self.clock)
        self.optimizer: Any = None
        self._lrs: list[Rate] | None = None
        self._micro: list[tuple[Any, Any, bool, bool]] = []
        self._batches = (-1, 0)

    def use(self, optimizer: Optimizer, lrs: Sequence[Rate] | None) -> None:
        """Train with this optimizer; lrs: those of the members, None where the optimizer knows its own."""
        self.optimizer, self._lrs = optimizer, None if lrs is None else list(lrs)

    def of(self, phase: type[Any]) -> list[Slot]:
        """The slots of one phase, in order."""
        return [slot for slot in self.slots if isinstance(slot.one, phase)]

    def batch(self, x: Any, y: Any, own: bool) -> tuple[Any, Any, bool]:
        """Batch regularizers on one batch; whether each member has its own behind them."""
        call = self._batches[1] + 1 if self._batches[0] == self.clock.step else 0
        self._batches = (self.clock.step, call)
        for slot in self.of(Batch):
            if not y.is_floating_point():
                raise GoodfitError(
                    f"{type(slot.one).__name__} needs y as probabilities or reals, got {y.dtype} of shape {tuple(y.shape)}; "
                    "for classes: y = torch.nn.functional.one_hot(y, n_classes).to(x.dtype)."
                )

            def act(one: Any, seed: Tensor, x: Any, y: Tensor, slot: Slot = slot) -> tuple[Any, Tensor]:
                return one.batch(x, y, Noise(seed, slot.name, self.clock.step, call))  # type: ignore[no-any-return]

            new = slot.lift(self.clock.step, act, self.seeds, x, y, dims=(0, *((0, 0) if own else (None, None))))
            old = (x, y) if own else tree_map(lambda t: t.expand(len(self.runs), *t.shape), (x, y))
            (x, y), own = tree_map(slot.where, new, old), True
        return x, y, own

    def loss(self, x: Any, y: Any, own: bool, own_y: bool) -> Tensor:
        """The losses of one batch, (K,), in train mode."""
        if any(slot.one.uphill for slot in self.of(Gradient)):
            if not own:
                x, own = tree_map(lambda t: t.expand(len(self.runs), *t.shape).clone(), x), True
            x = watched(x)
        losses = self._losses(x, y, own, own_y)
        self._micro.append((x, y, own, own_y))
        return losses

    @torch.no_grad()
    def outputs(self, x: Any) -> Any:
        """What each model gives in eval mode."""
        return self.forward(x, False, False)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def move(self) -> None:
        self.optimizer.step()

    def before_step(self) -> None:
        """Penalties, Gradient regularizers and what comes before the optimizer's step, on the gradients that are there."""
        self._set_rates()
        with torch.no_grad():
            live = {n: w for n, w in self.members.weights.items() if w.grad is not None}
            self._add_slopes(live)
            for slot in self.of(Gradient):
                self._act_on_gradients(slot, live)
            self._move(live, "before")

    def after_step(self) -> None:
        """What comes after the optimizer's step; then time passes."""
        with torch.no_grad():
            live = {n: w for n, w in self.members.weights.items() if w.grad is not None}
            self._move(live, "proximal", "after")
        self.clock.step += 1
        self._micro.clear()
        for run in self.runs:
            for key, one in run._plan.active.items():
                if isinstance(one, Build) and one.scheduled:
                    run._plan.active[key].at(self.clock.step).tune(run.model)

    def keep(self, rows: Tensor) -> None:
        """Go on with these members; the runs of the others have all that is theirs."""
        self.hand_over()
        before = self.members.weights
        self.members.keep(rows)
        kept_state(self.optimizer, before, self.members.weights, rows)
        for slot in self.slots:
            slot.keep(rows)
        self.slots = [slot for slot in self.slots if bool(slot.present.any())]
        self.runs, self.seeds = [self.runs[i] for i in rows.tolist()], self.seeds[rows]
        self._lrs = None if self._lrs is None else [self._lrs[i] for i in rows.tolist()]

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

    def _losses(self, x: Any, y: Any, own: bool, own_y: bool) -> Tensor:
        outputs = self.forward(x, own, True)
        loss = self.runs[0]._loss
        assert loss is not None
        losses = losses_of(loss, outputs, y, own_y)
        for slot in self.of(Loss):
            dims = (0, 0, 0 if own_y else None)
            new = slot.lift(self.clock.step, lambda one, *given: one.loss(*given), losses, outputs, y, dims=dims)
            losses = slot.where(new, losses)
        return losses

    def _add_slopes(self, live: Mapping[str, Tensor]) -> None:
        for slot in self.of(Penalty):
            weights = {n: live[n] for n in slot.chosen if n in live}
            if slot.one.elementwise:
                slopes = {}
                for n, w in weights.items():
                    slopes |= slot.spread(self.clock.step, w).slope({n: w}, _of(slot.state, n))
            else:
                slopes = slot.lift(self.clock.step, lambda one, w, s: one.slope(w, s), weights, slot.state)
            for n, slope in slopes.items():
                grad = weights[n].grad
                assert grad is not None
                grad.add_(slope if slot.everyone else slot.where(slope, torch.zeros_like(slope)))

    def _act_on_gradients(self, slot: Slot, live: Mapping[str, Tensor]) -> None:
        grads = {n: _grad(w) for n, w in live.items()}
        weights = {n: w.detach() for n, w in live.items()}
        second: Any = torch.zeros(())
        def act(one: Any, seed: Tensor, grads: Any, weights: Any, state: Any, second: Any) -> Any:
            noise = Noise(seed, slot.name, self.clock.step)
            return one.gradient(grads, weights, state, lambda *_: second, noise)

        def asked(one: Any, seed: Tensor, grads: Any, weights: Any, state: Any) -> Any:
            at: list[Any] = []

            def again(weights: Any, epsilon: Any = None) -> Any:
                at.extend((dict(weights), epsilon))
                return dict(grads)

            one.gradient(grads, weights, state, again, Noise(seed, slot.name, self.clock.step))
            return at[0], torch.zeros(()) if at[1] is None else torch.as_tensor(at[1])

        if slot.one.twice:
            at, epsilon = slot.lift(self.clock.step, asked, self.seeds, grads, weights, slot.state)
            second = self._again(live, at, epsilon if slot.one.uphill else None)
        dims = (0, 0, 0, 0, 0 if slot.one.twice else None)
        new, state = slot.lift(self.clock.step, act, self.seeds, grads, weights, slot.state, second, dims=dims)
        for n, g in new.items():
            _grad(live[n]).copy_(slot.where(g, grads[n]))
        slot.state = {n: slot.where(t, slot.state[n]) for n, t in state.items()}

    def _again(self, live: Mapping[str, Tensor], at: Mapping[str, Tensor], epsilon: Tensor | None) -> dict[str, Tensor]:
        """The gradient of the same objective with the same noise elsewhere; all is afterwards as it was."""
        kept = {n: t.clone() for n, t in self.members.buffers.items()}
        held = {n: (w.detach().clone(), w.grad) for n, w in live.items()}
        for n, w in live.items():
            w.copy_(at[n])
            w.grad = None
        self.clock.rewind()
        x, y, own, own_y = self._micro[0]
        if epsilon is not None:
            x = uphill(x, epsilon)
        with torch.enable_grad():
            torch.autograd.backward(self._losses(x, y, own, own_y).sum())
        self._add_slopes(live)
        found = {n: _grad(w) for n, w in live.items()}
        for n, (w, grad) in held.items():
            live[n].copy_(w)
            live[n].grad = grad
        for n, t in kept.items():
            self.members.buffers[n].copy_(t)
        return found

    def _move(self, live: Mapping[str, Tensor], *moments: str) -> None:
        for slot in self.of(Step):
            if slot.one.moment not in moments:
                continue
            weights = {n: live[n].detach() for n in slot.chosen if n in live}
            lr, rate = self._rates(slot, weights)
            if slot.one.elementwise:
                moved = {}
                for n, w in weights.items():
                    wide = {k: {n: _beside(t[n], w)} if n in t else {} for k, t in (("lr", lr), ("rate", rate))}
                    moved |= slot.spread(self.clock.step, w).step({n: w}, wide["lr"], wide["rate"], _of(slot.state, n))[0]
            else:
                moved, state = slot.lift(
                    self.clock.step, lambda one, *given: one.step(*given), weights, lr, rate, slot.state
                )
                slot.state = {n: slot.where(t, slot.state[n]) for n, t in state.items()}
            for n, w in moved.items():
                weights[n].copy_(slot.where(w, weights[n]))

    def _rates(self, slot: Slot, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Learning rate, or reach, and rate of each weight, all with the members along the first axis."""
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        lr, rate = {}, {}
        for n, w in weights.items():
            leaf = self.members.weights[n]
            group = groups[id(leaf)]
            each = torch.as_tensor(group["lr"], dtype=torch.float64).expand(len(self.runs))
            lr[n] = each
            if slot.one.moment == "proximal":
                told = {**group, "lr": each.view(-1, *(1 for _ in w.shape[1:]))}
                formula = rates.adam if isinstance(self.optimizer, AdamW) else rates.formula_of(self.optimizer)
                rate[n], lr[n] = (t.expand(len(self.runs), *t.shape[1:]) for t in formula(told, self.optimizer.state[leaf]))
                lr[n] = lr[n].reshape(len(self.runs), -1)[:, 0] if lr[n].numel() == len(self.runs) else lr[n]
                rate[n] = rate[n].reshape(len(self.runs)) if rate[n].numel() == len(self.runs) else rate[n]
        return lr, rate


def _grad(w: Tensor) -> Tensor:
    assert w.grad is not None
    return w.grad


def _of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The part of a state that belongs to one weight."""
    return {key: t for key, t in state.items() if key.endswith(f".{name}")}


def _beside(t: Tensor, w: Tensor) -> Tensor:
    """Numbers of the members, or of their weights, in a shape that meets the weights."""
    return t.to(w.dtype).view(-1, *(1 for _ in w.shape[1:])) if t.ndim == 1 else t
