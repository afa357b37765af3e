"""What acts beside the optimizer's step, on all members at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from goodfit import rates
from goodfit.noise import Clock, Noise
from goodfit.phases import Gradient, Penalty, Step
from goodfit.plan import turn
from goodfit.stack.adamw import AdamW
from goodfit.stack.members import Members
from goodfit.stack.slots import Slot

__all__ = ["Acting"]

OfWeights = dict[str, Tensor]


class Acting:
    """The phases Penalty, Gradient and Step. again(epsilon): computes the gradients of the step's batch once more."""

    def __init__(self, members: Members, clock: Clock, again: Callable[[Any], None]) -> None:
        self.members, self.clock, self._redo = members, clock, again
        self.slots: Sequence[Slot] = ()
        self.seeds = torch.zeros(0)

    def of(self, phase: type[Any]) -> list[Slot]:
        """The slots of one phase, in order."""
        return [slot for slot in self.slots if isinstance(slot.one, phase)]

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """On the gradients that are there: penalties, Gradient regularizers, and what comes before the optimizer's step."""
        live = self._live()
        self._add_slopes(live)
        for slot in self.of(Gradient):
            self._act_on_gradients(slot, live)
        self._move(live, optimizer, "before")

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """On the weights behind the optimizer's step."""
        self._move(self._live(), optimizer, "proximal", "after")

    def _live(self) -> dict[str, Tensor]:
        return {n: w for n, w in self.members.weights.items() if w.grad is not None}

    def _add_slopes(self, live: Mapping[str, Tensor]) -> None:
        for slot in self.of(Penalty):
            weights = {n: live[n] for n in slot.chosen if n in live}
            if slot.one.elementwise:
                slopes: dict[str, Tensor] = {}
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

        def act(one: Any, seed: Tensor, *given: Any) -> Any:
            *three, second = given
            return one.gradient(*three, lambda *_: second, Noise(seed, slot.name, self.clock.step))

        def asked(one: Any, seed: Tensor, *three: Any) -> Any:
            at: list[Any] = []
            again = partial(_noted, at, dict(three[0]))
            one.gradient(*three, again, Noise(seed, slot.name, self.clock.step))
            return at

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
        with torch.enable_grad():
            self._redo(epsilon)
        self._add_slopes(live)
        found = {n: _grad(w) for n, w in live.items()}
        for n, (w, grad) in held.items():
            live[n].copy_(w)
            live[n].grad = grad
        for n, t in kept.items():
            self.members.buffers[n].copy_(t)
        return found

    def _move(self, live: Mapping[str, Tensor], optimizer: Optimizer, *moments: str) -> None:
        trained = {n: w for n, w in self.members.weights.items() if w.requires_grad}
        for slot in sorted(self.of(Step), key=lambda slot: turn(slot.one)):
            if slot.one.moment not in moments:
                continue
            there = trained if slot.one.watches else live
            weights = {n: there[n].detach() for n in slot.chosen if n in there}
            lr, rate = self._rates(slot, optimizer, weights)
            if slot.one.elementwise:
                moved: dict[str, Tensor] = {}
                for n, w in weights.items():
                    wide = {k: {n: _beside(t[n], w)} if n in t else {} for k, t in (("lr", lr), ("rate", rate))}
                    moved |= slot.spread(self.clock.step, w).step({n: w}, wide["lr"], wide["rate"], _of(slot.state, n))[0]
            else:
                moved, state = slot.lift(self.clock.step, lambda one, *given: one.step(*given), weights, lr, rate, slot.state)
                slot.state = {n: slot.where(t, slot.state[n]) for n, t in state.items()}
            for n, w in moved.items():
                weights[n].copy_(slot.where(w, weights[n]))

    def _rates(self, slot: Slot, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> tuple[OfWeights, OfWeights]:
        """Learning rate, or reach, and rate of each weight, all with the members along the first axis."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        lr, rate, count = {}, {}, self.members.count
        for n, w in weights.items():
            leaf = self.members.weights[n]
            group = groups[id(leaf)]
            lr[n] = torch.as_tensor(group["lr"], dtype=torch.float64).expand(count)
            if slot.one.moment == "proximal":
                formula = rates.adam if isinstance(optimizer, AdamW) else rates.formula_of(optimizer)
                told = formula({**group, "lr": lr[n].view(-1, *(1 for _ in w.shape[1:]))}, optimizer.state[leaf])
                rate[n], lr[n] = (t.reshape(count) if t.numel() == count else t for t in told)
        return lr, rate


def _grad(w: Tensor) -> Tensor:
    assert w.grad is not None
    return w.grad


def _noted(at: list[Any], grads: Any, weights: Any, epsilon: Any = 0.0) -> Any:
    """In the place of a second gradient: where it is asked for."""
    at[:] = dict(weights), torch.as_tensor(epsilon)
    return grads


def _of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The part of a state that belongs to one weight."""
    return {key: t for key, t in state.items() if key.endswith(f".{name}")}


def _beside(t: Tensor, w: Tensor) -> Tensor:
    """Numbers of the members, or of their weights, in a shape that meets the weights."""
    return t.to(w.dtype).view(-1, *(1 for _ in w.shape[1:])) if t.ndim == 1 else t
