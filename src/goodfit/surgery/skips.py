"""Where shortcuts belong in a plain network, and how they are put in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from goodfit.layers.skip import Carried, Skip, SkipStart
from goodfit.surgery.insert import insert_after, insert_before
from goodfit.surgery.trace import Call

__all__ = ["Block", "connect", "plain_blocks", "skips"]

_LAYERS = (nn.Linear, _ConvNd)


@dataclass(frozen=True)
class Block:
    """Layers to go around: the first and the last call of the branch, and the activation that takes the sum.

    The sum is made before the activation where that is a module that runs once, else `after` the last layer.
    """

    first: Call
    last: Call
    activation: Call
    after: bool


def plain_blocks(calls: list[Call], layers: int) -> list[Block]:
    """The blocks of so many linear or convolution layers in a row, in the order of the forward run, none over another.

    Each layer takes the very output of the one before, through norms and an activation; the last one's goes straight, or
    through a norm, into an activation. Input and output have one shape, and the input is not that of the model.
    """
    runs = Counter(id(c.module) for c in calls if c.module is not None)
    inner = {id(c) for before in calls for c in before.reaches}
    found: list[Block] = []
    used: set[int] = set()
    for start in calls:
        if id(start) in inner and id(start) not in used:
            branch = _branch(start, layers)
            block = _block(branch, runs) if branch else None
            if block is not None:
                found.append(block)
                used |= {id(c) for c in branch}
    return found


def _branch(start: Call, layers: int) -> list[Call]:
    """The calls of a branch that begins here, and the activation behind it; empty where there is none."""
    branch, count = [start], 1
    while isinstance(start.module, _LAYERS) and count <= layers:
        takers = list({id(c.output): c for c in branch[-1].feeds}.values())  # a norm is a function first, then its module
        if len(takers) != 1:
            return []
        following = takers[0]
        branch.append(following)
        if following.kind == "kernel":
            count = count + 1 if isinstance(following.module, _LAYERS) else layers + 1
        elif following.kind == "activation" and count == layers:
            return branch
    return []


def _block(branch: list[Call], runs: Counter[int]) -> Block | None:
    first, last, activation = branch[0], branch[-2], branch[-1]
    same = isinstance(first.source, Tensor) and first.source.shape == last.output.shape
    after = activation.module is None or runs[id(activation.module)] > 1
    ends = (first.module, last.module if after else activation.module)
    once = all(m is not None and runs[id(m)] == 1 for m in ends)
    return Block(first, last, activation, after) if same and once and not (activation.gate or activation.scales) else None


def connect(block: Block, layers: int) -> None:
    """Put x + f(x) around a block."""
    carried = Carried()
    first: Any = block.first.module
    end: Any = block.last.module if block.after else block.activation.module
    insert_before(first, _free(first, "skip_start"), SkipStart(carried))
    (insert_after if block.after else insert_before)(end, _free(end, "skip"), Skip(carried, layers, block.after))


def _free(host: nn.Module, child: str) -> str:
    return f"inserted_{child}" if hasattr(host, child) else child


def skips(model: nn.Module) -> dict[str, Skip]:
    """The shortcuts that were put into a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Skip)}
