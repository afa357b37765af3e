"""Which members are computed at once: those of one kind of model whose cocktails agree in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from goodfit.phases import Batch, Build, Gradient
from goodfit.run import Run
from goodfit.stack.apart import Apart
from goodfit.stack.forward import losses_of
from goodfit.stack.kinds import kind_of
from goodfit.stack.members import release
from goodfit.stack.memory import at_once
from goodfit.stack.optimizers import MakeOptimizer, Rate, optimizer_of, refuse_mixing
from goodfit.stack.slots import ordered, places
from goodfit.stack.together import Together
from goodfit.stack.trial import differs

__all__ = ["How", "Part", "grouped"]


@dataclass(frozen=True)
class How:
    """What a stack was told of how to compute. together: at once, or one after the other, None for the faster of both."""

    example: Any
    together: bool | None = None
    memory: float | None = None


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

    def __str__(self) -> str:
        count = len(self.members)
        if isinstance(self.work, Apart):
            return f"{count} one after the other" + (f" ({self.why})" if self.why else "")
        return f"{count} at once, {self.work.forward}"

    def losses_of(self, x: Any, y: Tensor, loss: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """The loss of each in eval mode."""
        return losses_of(loss, self.work.outputs(x), y, False)


def grouped(runs: Sequence[Run], seeds: Sequence[int], lrs: Sequence[Rate], make: MakeOptimizer | None, how: How) -> list[Part]:
    """The parts of a stack."""
    mixing = "" if make is None else refuse_mixing(make, [run.model for run in runs])
    parts = []
    for members in _fitting(_alike(runs), runs, how):
        mine, rates = [runs[k] for k in members], [lrs[k] for k in members]
        why = mixing or _rolls_back(mine[0]) or next(filter(None, map(_moves, mine)), "")
        work = None if why or not _pays(mine, how) else Together(mine, [seeds[k] for k in members])
        if work is not None:
            why = differs(work.members, how.example)
        if work is not None and not why:
            work.use(optimizer_of(make, work.members.weights, rates), None if make else rates)
            parts.append(Part(members, work))
        else:
            for run in mine:
                release(run.model)
            parts.append(Part(members, Apart(mine, rates, make), why))
    return parts


def _pays(runs: Sequence[Run], how: How) -> bool:
    """Whether it is faster at once: not for one member, and not for convolutions on a CPU (benchmarks/stack_cnn.py)."""
    if how.together is not None:
        return how.together
    model = runs[0].model
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    return len(runs) > 1 and not (on_cpu and any(isinstance(m, _ConvNd) for m in model.modules()))


def _fitting(groups: Sequence[list[int]], runs: Sequence[Run], how: How) -> Iterator[list[int]]:
    """The same, cut where a group does not fit into memory at a time."""
    for members in groups:
        if not _pays([runs[k] for k in members], how):
            yield members
            continue
        size = at_once(runs[members[0]].model, len(members), how.example, how.memory)
        pieces = -(-len(members) // size)
        yield from (members[i::pieces] for i in range(pieces))


def _rolls_back(run: Run) -> str:
    """Why a member needs an optimizer of its own, "" where it does not: its moments begin anew when it rolls back."""
    one = next((one for one in run._plan.active.values() if getattr(one, "nonfinite", "") == "rollback"), None)
    return "" if one is None else f"{one} begins the optimizer anew"


def _moves(run: Run) -> str:
    """Why a member needs a model of its own, "" where it does not: a schedule moves what is no tensor, as torch's p is none."""
    for one in run._plan.active.values():
        if isinstance(one, Build) and one.scheduled:
            seen = []
            for step in (10**9, 1, 0):
                one.at(step).tune(run.model)
                seen.append(kind_of(run.model))
            if len(set(seen)) > 1:
                return f"{one} moves numbers of layers that are torch's own"
    return ""


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
