"""A cocktail prepared for one model: built, its weights selected, its states made. Prepare once, apply many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.cocktail import Cocktail
from goodfit.errors import GoodfitError, listed
from goodfit.hyper import structure
from goodfit.noise import Clock, Noise, Noisy
from goodfit.phases import Build, Epoch, Finish, Gradient, Penalty, Regularizer, State, Step
from goodfit.processes import rank
from goodfit.surgery.running import seeded
from goodfit.surgery.snapshot import Snapshot
from goodfit.tensors import below, matched, tensors_of

__all__ = ["Plan", "occurrences", "turn"]


class Plan:
    """Which regularizer acts on what, and what it remembers.

    active: the regularizers that are switched on, by their key ("0.L2"). names: those by which they draw.
    chosen: the weights of each. states: its dict.
    apart: whether the best weights are kept elsewhere than in the state of an Epoch phase.
    """

    def __init__(self, cocktail: Cocktail, model: nn.Module, seed: int, apart: bool = False) -> None:
        self.model, self.seed, self.apart = model, seed, apart
        self.clock = Clock()
        self.active = {f"{i}.{type(r).__name__}": r for i, r in enumerate(cocktail) if not r.off}
        self.names = {f"{i}.{type(r).__name__}": f"{type(r).__name__}.{n}" for i, (r, n) in enumerate(occurrences(cocktail))}
        _refuse_lost([one for one in self.active.values() if isinstance(one, Gradient)])
        for one in self.active.values():
            one.at(0)  # a schedule in epochs is refused here, not at the first step
        self.chosen: dict[str, list[str]] = {}
        self.states: dict[str, State] = {}
        self._waiting: Any = None

    def of(self, phase: type[Any]) -> list[tuple[str, Any]]:
        """The active regularizers of one phase with the numbers of now, in written order."""
        return [(key, r.at(self.clock.step)) for key, r in self.active.items() if isinstance(r, phase)]

    def begin_watching(self) -> None:
        """Let what follows the weights, averages and slow weights, begin anew at those of now."""
        weights, buffers = tensors_of(self.model)
        for key, one in self.of(Step):
            if one.watches:
                self.states[key] = one.init({n: weights[n] for n in self.chosen[key]}, buffers)

    @property
    def uphill(self) -> bool:
        """Whether inputs need a gradient."""
        return any(one.uphill for _, one in self.of(Gradient))

    def prepare(self, example: Any) -> None:
        """Build now, or with the first batch that the model sees where nobody gave an example."""
        if example is None and self.of(Build):
            self._wait()
        else:
            self._build(example)

    def _wait(self) -> None:
        self._waiting = self.model.register_forward_pre_hook(self._first_forward, with_kwargs=True)

    @property
    def waiting(self) -> bool:
        """Whether the model is still to be built."""
        return self._waiting is not None

    def refuse_waiting(self) -> None:
        """Refuse to train a model that is still to be built."""
        if self.waiting:
            builder = next(r for r in self.active.values() if isinstance(r, Build))
            raise GoodfitError(
                f"{builder} is not built: {type(self.model).__name__} has not run yet, or was refused; give Run an example=."
            )

    def build_if_waiting(self, example: Any) -> None:
        """Take the first batch as the example; where it is refused, the next one."""
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None
            try:
                self._build(example)
            except BaseException:
                self._wait()
                raise

    def _first_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.build_if_waiting(dict(kwargs) if kwargs and not args else args)

    def _build(self, example: Any) -> None:
        """All of it, or nothing: a cocktail that is refused leaves no part of it in the model."""
        before = Snapshot(self.model)
        try:
            self._edit(example)
        except BaseException:
            before.restore()
            raise

    def _edit(self, example: Any) -> None:
        for key, one in self.of(Build):
            with seeded(self.model, Noise(self.seed, self.names[key]).generator().initial_seed()):
                one.build(self.model, example)  # what it draws is of the run, too
        self._bind()
        weights, buffers = tensors_of(self.model)
        acting: dict[str, Regularizer] = {}
        for key, one in self.active.items():
            where = None if isinstance(one, Build) else getattr(one, "where", None)
            self.chosen[key] = list(weights) if where is None else where.select(self.model)
            if where is not None and not self.chosen[key]:
                has = listed(weights) or "none"
                raise GoodfitError(f"{type(one).__name__} matched no weights (where={where}); the model has: {has}.")
            acting[key] = one.on(self.model)
            none = self.apart and isinstance(one, Epoch)
            self.states[key] = one.init({n: weights[n] for n in self.chosen[key] if not none}, {} if none else buffers)
        self.active = acting
        self._refuse_two_averages()

    def _refuse_two_averages(self) -> None:
        seen: dict[str, str] = {}
        for key, one in self.of(Finish):
            for name in self.chosen[key] if one.averages else ():
                if name in seen:
                    raise GoodfitError(
                        f"{seen[name]} and {type(one).__name__} would both give an average of {name}, and one of them be lost; "
                        "leave one out, or give them other weights by where=."
                    )
                seen[name] = type(one).__name__

    def _bind(self) -> None:
        """Layers draw by this run, as if nothing had been drawn in this step."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, Noisy):
                layer.bind(name, self.seed, self.clock, rank())

    @torch.no_grad()
    def penalty(self) -> float:
        """The sum of all penalties at the weights of now."""
        weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        acting = [(key, one) for kind in (Penalty, Step) for key, one in self.of(kind)]
        chosen = {key: {n: weights[n] for n in self.chosen[key] if n in weights} for key, _ in acting}
        return float(sum(float(one.penalty(chosen[key], self.states[key])) for key, one in acting if chosen[key]))

    def tick(self) -> None:
        """One optimizer step is complete."""
        self.clock.step += 1
        self._tune()

    def _tune(self) -> None:
        for one in self.active.values():
            if isinstance(one, Build) and one.scheduled:
                one.at(self.clock.step).tune(self.model)

    def state_dict(self) -> dict[str, Tensor]:
        """All that must be remembered between two steps, as flat tensors."""
        flat = {f"{key}.{name}": t.clone() for key, state in self.states.items() for name, t in state.items()}
        return {"step": torch.tensor(self.clock.step), "seed": torch.tensor(self.seed), **flat}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken."""
        for key, one in self.of(Epoch):
            if own := below(f"{key}.", saved):  # none of it: another cocktail, which is told below
                one.refuse_state(own)
        new = matched(self.state_dict(), saved, "cocktail or model")
        if int(new["seed"]) != self.seed:
            raise GoodfitError(f"The state was saved under another seed: make the run with seed={int(new['seed'])}.")
        self.states = {key: {name: new[f"{key}.{name}"] for name in state} for key, state in self.states.items()}
        self.clock.step = int(new["step"])
        self._bind()
        self._tune()


def occurrences(cocktail: Cocktail) -> Iterator[tuple[Regularizer, int]]:
    """Each regularizer, and how many of its structure stand before it: it draws the same whatever else is in the cocktail."""
    seen = Counter[tuple[Any, ...]]()
    for one in cocktail:
        kind = structure(one)
        yield one, seen[kind]
        seen[kind] += 1


def turn(one: Any) -> tuple[bool, bool]:
    """When a Step regularizer acts among others: what follows the weights last, and averages behind all."""
    return one.watches, getattr(one, "averages", False)


def _refuse_lost(acting: list[Gradient]) -> None:
    """A second gradient takes the place of the first, and of all that was made of it."""
    for before, one in pairwise(acting):
        if one.twice:
            raise GoodfitError(
                f"{type(one).__name__} asks for a second gradient, so what {type(before).__name__} does to the first would be "
                "lost; " + ("leave one of them out." if before.twice else f"write {type(one).__name__} before it.")
            )
