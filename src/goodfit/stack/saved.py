"""The state of a stack, member by member: what one member has is what its run alone would have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.run import Run
from goodfit.stack.apart import Apart
from goodfit.stack.groups import Part
from goodfit.stack.optimizers import MakeOptimizer, Rate, lr_at, plain_optimizer
from goodfit.tensors import below, from_text, load_tensors, matched, to_text, under

__all__ = ["going_in", "load_stack", "optimizer_alone", "stack_state"]

OfWeights = dict[str, dict[str, Tensor]]
_SHARED = ("step", "mu_product")  # numbers of the optimizer, of which all members have the same


def stack_state(runs: Sequence[Run], parts: Sequence[Part], about: str) -> dict[str, Tensor]:
    """All of it, flat: "3.run.…", "3.model.…" and "3.optimizer.weight/…" are those of member 3."""
    members = sorted(k for part in parts for k in part.members)
    state = {"count": torch.tensor(len(runs)), "members": torch.tensor(members, dtype=torch.int64), "about": from_text(about)}
    for k, run in enumerate(runs):
        weights = {name: t.clone() for name, t in run.model.state_dict().items()}  # a training may go on from here
        state |= under(f"{k}.run.", run.state_dict()) | under(f"{k}.model.", weights)
    for part in parts:
        for i, k in enumerate(part.members):
            for name, held in optimizer_state(part, i).items():
                state |= under(f"{k}.optimizer.{name}/", held)
    return state


def going_in(saved: Any, runs: Sequence[Run], members: Sequence[int], about: str) -> tuple[set[int], list[dict[str, Tensor]]]:
    """The members that go on in a saved state, and all models; refuses what no stack like this one has given."""
    if not isinstance(saved, Mapping) or not {"count", "members", "about"} <= saved.keys() or int(saved["count"]) != len(runs):
        got = f"one of {int(saved['count'])}" if isinstance(saved, Mapping) and "count" in saved else "something else"
        raise GoodfitError(f"load_state_dict takes what a stack of {len(runs)} members gave, got {got}.")
    there = to_text(saved["about"])
    if there.split(",")[0] != about.split(",")[0]:
        raise GoodfitError(f"The state was saved with {there:.200}, and goes on with {about:.200}; make the stack as it was.")
    if there != about:
        told = f"The state was saved with {there:.200}, and goes on with {about:.200}."
        warnings.warn(told, GoodfitWarning, stacklevel=3)
    models = [matched(run.model.state_dict(), below(f"{k}.model.", saved), "model") for k, run in enumerate(runs)]
    going = set(saved["members"].tolist())
    if not going <= set(members):
        raise GoodfitError("The state has members that have left this stack; make the stack anew, then load it.")
    return going, models


def load_stack(
    runs: Sequence[Run], parts: Sequence[Part], saved: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]]
) -> None:
    """Go on where `stack_state` was taken, with the models and the members that `going_in` found there."""
    for k, (run, tensors) in enumerate(zip(runs, models, strict=True)):
        run.load_state_dict(below(f"{k}.run.", saved))
        load_tensors(run.model, tensors, {})
    for part in parts:
        part.work.take_over()
        states: list[OfWeights] = [{} for _ in part.members]
        for state, k in zip(states, part.members, strict=True):
            for name, t in below(f"{k}.optimizer.", saved).items():
                weight, _, key = name.rpartition("/")
                state.setdefault(weight, {})[key] = t
        _load_optimizers(part, states)


def optimizer_state(part: Part, i: int) -> OfWeights:
    """What the optimizer remembers of each weight of one member."""
    work = part.work
    if isinstance(work, Apart):
        named = dict(work.runs[i].model.named_parameters())
        states = {n: _tensors(work.optimizers[i].state.get(p, {})) for n, p in named.items()}
        return {n: {k: t.clone() for k, t in state.items()} for n, state in states.items()}
    found = {}
    for n, w in work.members.weights.items():
        held = _tensors(work.optimizer.state.get(w, {}))
        found[n] = {k: t[i].clone() if t.shape == w.shape and k not in _SHARED else t.clone() for k, t in held.items()}
    return found


def _load_optimizers(part: Part, states: Sequence[OfWeights]) -> None:
    """Go on with what `optimizer_state` gave for each member."""
    work = part.work
    if isinstance(work, Apart):
        for run, optimizer, state in zip(work.runs, work.optimizers, states, strict=True):
            _into_optimizer(optimizer, run.model, state)
        return
    for n, w in work.members.weights.items():
        each = [state.get(n, {}) for state in states]
        if any(state.keys() != each[0].keys() for state in each):
            raise GoodfitError(f"The state of the optimizer of {n} is not there for all members; save the stack anew.")
        work.optimizer.state.pop(w, None)
        if each[0]:
            whole = {
                k: torch.stack([s[k] for s in each]) for k, t in each[0].items() if t.shape == w.shape[1:] and k not in _SHARED
            }
            work.optimizer.state[w] = {k: whole.get(k, t.clone()) for k, t in each[0].items()}


def optimizer_alone(part: Part, k: int, make: MakeOptimizer | None, lr: Rate) -> Callable[[], Optimizer]:
    """What makes the optimizer of a member that has left its part: the one that it had to itself, or one that remembers."""
    i = part.members.index(k)
    run, remembered = part.work.runs[i], optimizer_state(part, i)
    if isinstance(part.work, Apart):
        own = part.work.optimizers[i]
        return lambda: own

    def made() -> Optimizer:
        trained = [p for p in run.model.parameters() if p.requires_grad]
        optimizer = make(trained) if make else plain_optimizer(trained, lr_at(lr, run._plan.clock.step))
        _into_optimizer(optimizer, run.model, remembered)
        return optimizer

    return made


def _into_optimizer(optimizer: Optimizer, model: nn.Module, state: OfWeights) -> None:
    """Give an optimizer of one model what another remembered of its weights."""
    for n, p in model.named_parameters():
        optimizer.state.pop(p, None)
        if state.get(n):
            optimizer.state[p] = {k: t.clone() for k, t in state[n].items()}


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: t for k, t in state.items() if isinstance(t, Tensor)}
