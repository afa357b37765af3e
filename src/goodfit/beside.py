"""What happens beside the optimizer's step: penalties, gradients and decay before it, proximal and other steps after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from goodfit import rates
from goodfit.accumulation import watch_accumulation
from goodfit.blocks import Block, block_of, blocks
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.hooks import lacking
from goodfit.noise import Noise
from goodfit.phases import Again, Gradient, Penalty, State, Step
from goodfit.plan import Plan, turn
from goodfit.regularizers.shrinkage import L2, L2SP, WeightDecay
from goodfit.tensors import load_tensors

__all__ = ["Beside"]

Redo = Callable[..., Any]


class Beside:
    """The phases Penalty, Gradient and Step of a plan, on the optimizers that it meets."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.optimizers: list[Optimizer] = []
        self.covered = False
        self._live: dict[int, dict[str, nn.Parameter]] = {}
        self._formulas: dict[int, rates.Formula] = {}

    def join(self, optimizers: Iterable[Optimizer]) -> None:
        """Meet all of these, or none."""
        known = list(self.optimizers)
        try:
            for optimizer in optimizers:
                if any(optimizer is one for one in self.optimizers):
                    raise GoodfitError(f"This {type(optimizer).__name__} is attached already.")
                self.meet(optimizer)
            if not self.plan.waiting:
                self.cover()
        except GoodfitError:
            self.optimizers = known  # a refused one must not keep the time of the next
            raise

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, redo: Redo) -> None:
        """Act on the gradients; `redo` runs backward on the same batch once more."""
        live = {n: p for n, p in self._names(optimizer).items() if p.grad is not None}
        self._live[id(optimizer)] = live
        climbing = {id(p) for group in optimizer.param_groups if group.get("maximize") for p in group["params"]}
        self._add_slopes(live, climbing)
        for key, one in self.plan.of(Gradient):
            grads = {n: _grad(p, n) for n, p in live.items()}
            weights = {n: p.detach() for n, p in live.items()}
            again, noise = self._again(live, climbing, redo), Noise(self.plan.seed, self.plan.names[key], self.plan.clock.step)
            grads, self.plan.states[key] = one.gradient(grads, weights, self.plan.states[key], again, noise)
            for name, new in grads.items():
                _grad(live[name], name).copy_(new)
        self._move(optimizer, "before")

    def _add_slopes(self, live: dict[str, nn.Parameter], climbing: set[int]) -> None:
        """The gradients of all penalties, at the weights of now."""
        for key, one in self.plan.of(Penalty):
            names = [n for n in self.plan.chosen[key] if n in live and live[n].grad is not None]
            weights = {n: live[n].detach() for n in names}
            grads = {n: _grad(live[n], n) for n in names}
            for part, block, state in _pieces(one, weights, grads, self.plan.states[key]):
                for name, slope in one.slope(part, state).items():
                    grad = block_of(grads[name], block, grads[name])
                    grad.add_(slope, alpha=-1 if id(live[name]) in climbing else 1)

    def awaits(self, optimizer: Optimizer) -> bool:
        """Whether `before_step` has acted and `after_step` has not."""
        return id(optimizer) in self._live

    def after_step(self, optimizer: Optimizer) -> None:
        """Act on the stepped weights, then let time pass (with several optimizers, the first one's steps count)."""
        self._move(optimizer, "proximal", "after")
        self._live.pop(id(optimizer), None)
        if optimizer is self.optimizers[0]:
            self.plan.tick()

    @torch.no_grad()
    def _move(self, optimizer: Optimizer, *moments: str) -> None:
        live = self._live.get(id(optimizer), {})
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        held = self._names(optimizer)
        for key, one in sorted(self.plan.of(Step), key=lambda item: turn(item[1])):
            if one.moment not in moments:
                continue
            there = held if one.watches else live
            weights = {n: there[n].detach() for n in self.plan.chosen[key] if n in there}
            for part, block, state in _pieces(one, weights, {}, self.plan.states[key]):
                lr, rate = {}, {}
                for n in part:
                    group = groups[id(there[n])]
                    lr[n] = torch.as_tensor(group["lr"], dtype=torch.float64)
                    if one.moment == "proximal":
                        memory = block_of(optimizer.state[live[n]], block, live[n])
                        rate[n], lr[n] = self._formulas[id(optimizer)](group, memory)
                moved, new = one.step(part, lr, rate, state)
                for name, w in moved.items():
                    part[name].copy_(w)
                if not one.elementwise:
                    self.plan.states[key] = new

    def _again(self, live: dict[str, nn.Parameter], climbing: set[int], redo: Redo) -> Again:
        """The gradient of the same objective with the same noise at other weights; the model is afterwards as it was."""

        def again(weights: Mapping[str, Tensor], epsilon: Any = None) -> dict[str, Tensor]:
            kept = {n: b.clone() for n, b in self.plan.model.named_buffers()}
            before = {n: p.detach().clone() for n, p in live.items()}
            held = [(p, p.grad) for p in self.plan.model.parameters()]  # of other optimizers too
            load_tensors(self.plan.model, weights, {})
            for p, _ in held:
                p.grad = None
            self.plan.clock.rewind()
            with torch.enable_grad():
                redo() if epsilon is None else redo(epsilon)
            self._add_slopes(live, climbing)
            found = any(p.grad is not None for p in live.values())
            grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in live.items()}
            for p, grad in held:
                p.grad = grad
            load_tensors(self.plan.model, before, kept)
            if not found:
                raise GoodfitError(
                    "A second gradient needs a closure that runs backward, got one that gives no gradient (Lightning makes one "
                    "in manual optimization); give optimizer.step a closure with zero_grad, loss and backward."
                )
            return grads

        return again

    def meet(self, optimizer: Optimizer) -> None:
        """Take an optimizer in; refuse one beside which a regularizer of the cocktail cannot act."""
        kind = type(optimizer).__name__
        acting = [r for r in self.plan.active.values() if isinstance(r, Penalty | Gradient | Step)]
        if acting and isinstance(optimizer, LBFGS):
            raise GoodfitError(f"{acting[0]} cannot act beside LBFGS, which evaluates several times a step; use SGD or Adam.")
        if any(isinstance(r, Step) and r.moment == "proximal" for r in acting):
            self._formulas[id(optimizer)] = rates.formula_of(optimizer)
        decays = any(group.get("weight_decay", 0) for group in optimizer.param_groups)
        twice = next((r for r in acting if isinstance(r, L2 | L2SP | WeightDecay)), None)
        if decays and twice is not None:
            warnings.warn(
                f"Weights decay twice: by {twice} of the cocktail and by the weight_decay of {kind} itself (torch's AdamW has "
                "0.01 by default); make the optimizer with weight_decay=0.",
                GoodfitWarning,
                stacklevel=4,
            )
        self.optimizers.append(optimizer)

    def cover(self) -> None:
        """Refuse optimizers that lack a trainable parameter: made before the model was built, say."""
        name = lacking(self.plan.model, self.optimizers)
        if name is not None:
            raise GoodfitError(
                f"The optimizer lacks the trainable parameter {name}: make it after the run, as in "
                "run = Run(cocktail, model, example=x); optimizer = AdamW(model.parameters()); or freeze the parameter; "
                "several optimizers go in together: run.attach(a, b)."
            )
        self._refuse_split_groups()
        watch_accumulation(self.plan)
        self.covered = True

    def _refuse_split_groups(self) -> None:
        """A group is judged as a whole, so one optimizer must hold all of it."""
        for key, one in self.plan.active.items():
            layout = getattr(one, "groups", None)
            held = [[n for n in self._names(o) if n in self.plan.chosen[key]] for o in self.optimizers]
            if layout is not None and layout.split(held):
                raise GoodfitError(f"{one} has a group that several optimizers hold parts of; give its weights to one of them.")

    def _names(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {n: p for n, p in self.plan.model.named_parameters() if id(p) in held}


def _pieces(
    one: Penalty | Step, weights: dict[str, Tensor], grads: dict[str, Tensor], state: State
) -> Iterator[tuple[dict[str, Tensor], Block, State]]:
    """All weights at once, or block by block with their part of the state where each number counts by itself."""
    if not one.elementwise:
        if weights:
            yield weights, None, state
        return
    for name, w in weights.items():
        mine = {key: value for key, value in state.items() if key.endswith(f".{name}")}
        for block in blocks(w, *((grads[name],) if name in grads else ())):
            yield {name: block_of(w, block, w)}, block, block_of(mine, block, w)


def _grad(p: nn.Parameter, name: str) -> Tensor:
    assert p.grad is not None
    if p.grad.is_sparse:
        raise GoodfitError(
            f"{name} has a sparse gradient, which a regularizer would make dense; leave it out by where=, or make its "
            "layer with sparse=False."
        )
    return p.grad
