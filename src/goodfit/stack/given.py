"""What a stack is given: members, numbers for each, and batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from goodfit.errors import GoodfitError
from goodfit.hyper import plain
from goodfit.losses import score_of
from goodfit.processes import world
from goodfit.schedules.schedule import Schedule

__all__ = ["Each", "rates_of", "refuse_members", "scores_of", "seeds_of"]


@dataclass(frozen=True)
class Each:
    """A batch as each part of a stack sees it. own: whether each member has its own. members: those that it was made for."""

    parts: tuple[Any, ...]
    own: tuple[bool, ...]
    members: tuple[int, ...]

    @classmethod
    def shared(cls, given: Any, parts: int, members: Sequence[int]) -> Each:
        """The same for all members of so many parts."""
        return cls((given,) * parts, (False,) * parts, tuple(members))


def one_each(given: Any, count: int, name: str) -> list[Any]:
    """One for each of so many members."""
    listed = given if isinstance(given, list | tuple) else [given] * count
    if len(listed) != count:
        raise GoodfitError(f"Stack takes one of {name} for each of the {count} members, or one for all, got {len(listed)}.")
    return list(listed)


def rates_of(given: Any, count: int) -> list[Any]:
    """The learning rate of each member."""
    rates = [plain(lr) for lr in one_each(given, count, "lr")]
    for lr in rates:
        ends = lr.ends if isinstance(lr, Schedule) else (lr,)
        if not all(type(end) in (int, float) and 0 <= end < math.inf for end in ends):
            raise GoodfitError(f"Stack takes lr as numbers >= 0 or schedules, one or a list, got lr={lr!r:.60}.")
    return rates


def seeds_of(given: Any, count: int) -> list[int]:
    """The seed of each member."""
    seeds = [plain(seed) for seed in one_each(given, count, "seeds")]
    for seed in seeds:
        if type(seed) is not int or not -(2**63) <= seed < 2**63:
            raise GoodfitError(f"Stack takes seeds as integers of 64 bits, one or a list, got seeds={seed!r:.60}.")
    return seeds


def scores_of(given: Any, members: int, name: str) -> list[float] | None:
    """One number for each member that goes on."""
    if given is None and name != "score":
        return None
    told = given.tolist() if isinstance(given, torch.Tensor) else given
    if not isinstance(told, list | tuple) or len(told) != members:
        raise GoodfitError(f"stack.epoch takes one {name} for each of the {members} members that go on, got {given!r:.60}.")
    return [float(score_of(one, f"stack.epoch: each {name}")) for one in told]


def refuse_members(
    mixes: Sequence[Any], models: Sequence[Any], optimizer: Any, lr: Any, example: Any, loss: Any, memory: Any
) -> None:
    """Refuse members that make no stack."""
    if not mixes or len(mixes) != len(models):
        raise GoodfitError(f"Stack takes as many models as cocktails, one or more, got {len(models)} and {len(mixes)}.")
    if len({id(model) for model in models}) < len(models):
        raise GoodfitError("Each member of a stack needs a model of its own, got one twice; copy.deepcopy makes another.")
    held = [{id(t) for t in (*model.parameters(), *model.buffers())} for model in models if isinstance(model, nn.Module)]
    if len(held) < len(models):
        raise GoodfitError("Stack takes models, or one function that makes them; got something else among them.")
    if sum(map(len, held)) > len(set().union(*held)):
        raise GoodfitError("Each member of a stack needs weights of its own, got models that share some; copy.deepcopy them.")
    if example is None:
        raise GoodfitError("Stack needs an example batch, example=x, on which the models are built and compared.")
    if optimizer is not None and lr != 1e-3:
        raise GoodfitError("Stack takes lr= for AdamW, or optimizer=, which has its own; leave one out.")
    if loss is not None and not callable(loss):
        raise GoodfitError(f"Stack takes loss as a function of outputs and y, got loss={loss!r:.60}; a task has the usual one.")
    if memory is not None and not (isinstance(memory, int | float) and memory > 0):
        raise GoodfitError(f"Stack takes memory as bytes > 0, got memory={memory!r:.60}.")
    if world() > 1:
        raise GoodfitError("A stack trains in one process, got several; give each process a stack of its own.")
