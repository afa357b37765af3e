"""Which members are computed at once: those of one kind of model whose cocktails agree in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goodfit.phases import Batch, Gradient
from goodfit.run import Run
from goodfit.stack.apart import Apart
from goodfit.stack.forward import losses_of
from goodfit.stack.kinds import kind_of
from goodfit.stack.members import release
from goodfit.stack.optimizers import MakeOptimizer, Rate, optimizer_of, refuse_mixing
from goodfit.stack.slots import ordered, places
from goodfit.stack.together import Together

__all__ = ["Part", "grouped"]


@dataclass
class Part:
    """Some members of a stack, and how they are trained. why: they are trained one after the other, "" where they are not."""

    members: list[int]
    work: Together | Apart
    why: str = ""

    def keep(self, rows: list[int]) -> None:
        """Go on with these."""
        self.work.keep(torch.tensor(rows, dtype=torch.int64))
        self.members = [self.members[i] for i in rows]

    def losses_of(self, x: Any, y: Tensor, loss: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """The loss of each in eval mode."""
        return losses_of(loss, self.work.outputs(x), y, False)


def grouped(
    runs: Sequence[Run], seeds: Sequence[int], lrs: Sequence[Rate], make: MakeOptimizer | None, example: Any
) -> list[Part]:
    """The parts of a stack."""
    mixing = "" if make is None else refuse_mixing(make)
    parts = []
    for members in _alike(runs):
        mine, rates = [runs[k] for k in members], [lrs[k] for k in members]
        why = mixing or _rolls_back(mine[0])
        single = len(members) == 1  # a run is faster then
        work = None if why or single else Together(mine, [seeds[k] for k in members])
        if work is not None:
            why = work.forward.refuses(example)
        if work is not None and not why:
            work.use(optimizer_of(make, work.members.weights, rates), None if make else rates)
            parts.append(Part(members, work))
        else:
            for run in mine:
                release(run.model)
            parts.append(Part(members, Apart(mine, rates, make), why))
    return parts


def _rolls_back(run: Run) -> str:
    """Why a member needs an optimizer of its own, "" where it does not: its moments begin anew when it rolls back."""
    one = next((one for one in run._plan.active.values() if getattr(one, "nonfinite", "") == "rollback"), None)
    return "" if one is None else f"{one} begins the optimizer anew"


def _alike(runs: Sequence[Run]) -> list[list[int]]:
    """Members that can be one: their models differ in numbers alone, and the steps of one cost what those of another do."""
    groups: dict[Any, list[tuple[list[int], set[tuple[Any, ...]]]]] = {}
    for k, run in enumerate(runs):
        acting = run._plan.active.values()
        twice = tuple(type(one) for one in acting if isinstance(one, Gradient) and one.twice)
        key = (kind_of(run.model), twice, bool(_rolls_back(run)), any(isinstance(one, Batch) for one in acting))
        found, order = groups.setdefault(key, []), tuple(places(run))
        for members, orders in found:
            if order in orders or ordered([*orders, order]) is not None:
                members.append(k)
                orders.add(order)
                break
        else:
            found.append(([k], {order}))
    return [members for found in groups.values() for members, _ in found]
