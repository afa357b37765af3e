"""The regularizers of K members side by side: those that differ in their numbers alone are one, and act at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from goodfit.hyper import hypers, lifted, structure
from goodfit.phases import Batch, Gradient, Loss, Penalty, State, Step
from goodfit.plan import occurrences
from goodfit.run import Run
from goodfit.tensors import tensors_of

__all__ = ["Slot", "ordered", "places", "slots_of"]

_ACTING = (Batch, Loss, Penalty, Gradient, Step)
Place = tuple[Any, ...]


class Slot:
    """One regularizer of several members, each with its numbers, or without it.

    one: that of the first member that has it, as it acts on the model. keys: by which the plan of each member knows it, None
    where a member does not have it. state: those of all members, along the first axis.
    """

    def __init__(self, keys: Sequence[str | None], runs: Sequence[Run]) -> None:
        self.keys = list(keys)
        self.ones = [None if key is None else run._plan.active[key] for run, key in zip(runs, self.keys, strict=True)]
        first = next(i for i, key in enumerate(self.keys) if key is not None)
        key, plan = str(self.keys[first]), runs[first]._plan
        self.one: Any = self.ones[first]
        self.name, self.chosen = plan.names[key], plan.chosen[key]
        self.state = _stacked([self._state_of(run, own) for run, own in zip(runs, self.keys, strict=True)])
        self._settle()

    def _state_of(self, run: Run, key: str | None) -> State:
        if key is not None:
            return run._plan.states[key]
        weights, buffers = tensors_of(run.model)
        made: State = self.one.init({n: weights[n] for n in self.chosen}, buffers)
        return made

    def _settle(self) -> None:
        self.present = torch.tensor([one is not None for one in self.ones])
        self.everyone = bool(self.present.all())
        self._scheduled = any(one is not None and one.scheduled for one in self.ones)
        self._numbers: dict[str, Tensor] = {}

    def numbers(self, step: int) -> dict[str, Tensor]:
        """The numbers of all members after so many steps; a member without the regularizer has those of another."""
        if self._scheduled or not self._numbers:
            now = [(self.one if one is None else one).at(step) for one in self.ones]
            names = [name for name, _ in hypers(self.one)]
            self._numbers = {n: torch.tensor([float(getattr(one, n)) for one in now], dtype=torch.float64) for n in names}
        return self._numbers

    def lift(self, step: int, call: Callable[..., Any], *given: Any, dims: Sequence[int | None] | None = None) -> Any:
        """What `call(regularizer, *given)` gives for each member; dims: the axis of the members in each, 0 if not said."""
        numbers = self.numbers(step)

        def alone(numbers: dict[str, Tensor], *given: Any) -> Any:
            return call(lifted(self.one, **numbers), *given)

        return vmap(alone, in_dims=(0, *(dims or (0,) * len(given))))(numbers, *given)

    def spread(self, step: int, like: Tensor) -> Any:
        """The regularizer with all numbers at once, of shapes that meet tensors like this number by number."""
        shape = (-1, *(1 for _ in like.shape[1:]))
        return lifted(self.one, **{n: t.view(shape).to(like) for n, t in self.numbers(step).items()})

    def where(self, new: Tensor, old: Tensor) -> Tensor:
        """The new one for members that have the regularizer."""
        if self.everyone:
            return new
        return torch.where(self.present.to(new.device).view(-1, *(1 for _ in new.shape[1:])), new, old)

    def keep(self, rows: Tensor) -> None:
        """Go on with these members."""
        self.keys, self.ones = ([had[i] for i in rows.tolist()] for had in (self.keys, self.ones))
        self.state = {name: t[rows.to(t.device)] for name, t in self.state.items()}
        self._settle()

    def hand_over(self, i: int, run: Run) -> None:
        """The state of one member, to its run."""
        key = self.keys[i]
        if key is not None:
            run._plan.states[key] = {name: t[i] for name, t in self.state.items()}

    def take_over(self, i: int, run: Run) -> None:
        """The state of one member, from its run."""
        key = self.keys[i]
        if key is not None:
            for name, t in self.state.items():
                t[i] = run._plan.states[key][name].to(t.device)


def places(run: Run) -> dict[Place, str]:
    """Where in a cocktail each regularizer stands that acts at every step, with its key."""
    plan = run._plan
    keyed = zip(plan.names, occurrences(run.cocktail), strict=True)
    return {
        (*structure(one), n): key for key, (one, n) in keyed if key in plan.active and isinstance(plan.active[key], _ACTING)
    }


def ordered(sequences: Sequence[Sequence[Place]]) -> list[Place] | None:
    """One order that agrees with all of these, None where there is none."""
    sorter = TopologicalSorter[Place]()
    for sequence in sequences:
        for one in sequence:
            sorter.add(one)
        for before, one in pairwise(sequence):
            sorter.add(one, before)
    try:
        return list(sorter.static_order())
    except CycleError:
        return None


def slots_of(runs: Sequence[Run]) -> list[Slot]:
    """All regularizers of these members that act at every step, in an order that agrees with each cocktail."""
    found = [places(run) for run in runs]
    order = ordered(list(dict.fromkeys(map(tuple, found))))
    assert order is not None
    return [Slot([one.get(place) for one in found], runs) for place in order]


def _stacked(states: Sequence[State]) -> State:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}
