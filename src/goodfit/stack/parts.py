"""The parts of a stack, and what goes on in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from goodfit.errors import GoodfitError
from goodfit.phases import Batch
from goodfit.stack.given import Each
from goodfit.stack.groups import Part
from goodfit.stack.together import Together

__all__ = ["Parts"]


class Parts:
    """The parts, and the members that go on in them, in order."""

    def __init__(self, parts: list[Part]) -> None:
        self.all = parts
        self.members = sorted(k for part in parts for k in part.members)

    def of(self, k: int) -> Part | None:
        """The part of a member, None where it does not go on."""
        return next((part for part in self.all if k in part.members), None)

    @property
    def gradients(self) -> bool:
        """Whether any weight has one."""
        return any(p.grad is not None for part in self.all for p in part.work.weights())

    def batch(self, x: Any, y: Any, own: bool) -> tuple[Each, Each]:
        """Batch regularizers on one batch."""
        self._refuse_none()
        if not len(y):
            raise GoodfitError("stack.batch takes a batch of one row or more, got none.")
        if own and len(y) != len(self.members):
            raise GoodfitError(
                f"stack.batch(own=True) takes one batch for each of the {len(self.members)} members, got {len(y)}."
            )
        found = [part.work.batch(*self._rows(part, x, y, own), own) for part in self.all]
        flags, members = tuple(own for _, _, own in found), tuple(self.members)
        return Each(tuple(x for x, _, _ in found), flags, members), Each(tuple(y for _, y, _ in found), flags, members)

    def given(self, x: Any, y: Any) -> tuple[Each, Each]:
        """A batch that `batch` has made, or one that needs nothing of it."""
        self._refuse_none()
        for part in self.all:
            mixer = next(iter(part.work.of(Batch)), None) if isinstance(part.work, Together) else None
            if mixer is not None and not isinstance(x, Each):
                name = type(mixer.one).__name__
                raise GoodfitError(f"{name} acts in stack.batch, which was not called; add: x, y = stack.batch(x, y)")
        xs, ys = (one if isinstance(one, Each) else Each.shared(one, len(self.all), self.members) for one in (x, y))
        if not xs.members == ys.members == tuple(self.members):
            raise GoodfitError("This batch was made for members of which some have left; call stack.batch(x, y) again.")
        return xs, ys

    def loss(self, i: int, xs: Each, ys: Each) -> Tensor:
        """The losses of one part."""
        return self.all[i].work.loss(xs.parts[i], ys.parts[i], xs.own[i], ys.own[i])

    def outputs(self, x: Any) -> Any:
        """What the members give in eval mode; a list where their shapes differ."""
        self._refuse_none()
        found = [part.work.outputs(x) for part in self.all]
        try:
            return found[0] if len(found) == 1 else tree_map(lambda *t: self.joined(t), *found)
        except (RuntimeError, ValueError):
            each = {
                k: tree_map(lambda t, i=i: t[i], out)
                for part, out in zip(self.all, found, strict=True)
                for i, k in enumerate(part.members)
            }
            return [each[k] for k in self.members]

    def losses(self, x: Any, y: Tensor, measure: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """The loss of each member in eval mode."""
        self._refuse_none()
        return self.joined([part.losses_of(x, y, measure) for part in self.all])

    def leave(self, members: Sequence[int]) -> None:
        """Go on without these."""
        gone = set(members)
        for part in self.all:
            rows = [i for i, k in enumerate(part.members) if k not in gone]
            if len(rows) < len(part.members):
                part.keep(rows)
        self.all = [part for part in self.all if part.members]
        self.members = [k for k in self.members if k not in gone]

    def hand_over(self) -> None:
        """Time and states, to each run."""
        for part in self.all:
            part.work.hand_over()

    def joined(self, found: Sequence[Tensor]) -> Tensor:
        """What the parts have found, in the order of the members."""
        if len(found) == 1:
            return found[0]
        places = {k: i for i, k in enumerate(k for part in self.all for k in part.members)}
        return torch.cat(list(found))[torch.tensor([places[k] for k in self.members], device=found[0].device)]

    def _rows(self, part: Part, x: Any, y: Any, own: bool) -> tuple[Any, Any]:
        """The rows of an own batch that belong to the members of one part."""
        if not own or len(self.all) == 1:
            return x, y
        at = torch.tensor([self.members.index(k) for k in part.members])
        return tree_map(lambda t: t[at.to(t.device)], x), y[at.to(y.device)]

    def _refuse_none(self) -> None:
        if not self.all:
            raise GoodfitError("No member of this stack goes on: all have stopped, or it is finished; stack.models has them.")
