"""What a stack is given: members, numbers for each, and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from goodfit.errors import GoodfitError
from goodfit.processes import world

__all__ = ["Each", "one_each", "refuse_members"]


@dataclass(frozen=True)
class Each:
    """A batch as each part of a stack sees it. own: whether each member has its own."""

    parts: tuple[Any, ...]
    own: tuple[bool, ...]

    @classmethod
    def shared(cls, given: Any, parts: int) -> Each:
        """The same for all members of so many parts."""
        return cls((given,) * parts, (False,) * parts)


def one_each(given: Any, count: int, name: str) -> list[Any]:
    """One for each of so many members."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise GoodfitError(f"Stack takes one of {name} for each of the {count} members, or one for all, got {len(given)}.")
    return list(given)


def refuse_members(mixes: Sequence[Any], models: Sequence[Any], optimizer: Any, lr: Any, example: Any) -> None:
    """Refuse members that make no stack."""
    if not mixes or len(mixes) != len(models):
        raise GoodfitError(f"Stack takes as many models as cocktails, one or more, got {len(models)} and {len(mixes)}.")
    if len({id(model) for model in models}) < len(models):
        raise GoodfitError("Each member of a stack needs a model of its own, got one twice; copy.deepcopy makes another.")
    if example is None:
        raise GoodfitError("Stack needs an example batch, example=x, on which the models are built and compared.")
    if optimizer is not None and lr != 1e-3:
        raise GoodfitError("Stack takes lr= for AdamW, or optimizer=, which has its own; leave one out.")
    if world() > 1:
        raise GoodfitError("A stack trains in one process, got several; give each process a stack of its own.")
