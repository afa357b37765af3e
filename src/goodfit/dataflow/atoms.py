"""What can be removed from a model only together: classes of parameter slices.

A slice is one index of one axis of a parameter or buffer, and has a number. Slices that must go together (a filter, its
bias, its batch norm, the columns that read it) are tied while the model runs; their classes are the atoms of shrinking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FIXED", "Axis", "Slices", "compact", "varying"]

FIXED = 0  # the number of what cannot be removed: the model's input, tensors of a size that code wrote down


@dataclass(frozen=True)
class Axis:
    """One axis of one tensor; its slices have the numbers first .. first + size - 1.

    With `groups` > 1 it is the axis of a grouped convolution that the weight stores for one group only.
    """

    name: str
    axis: int
    first: int
    size: int
    groups: int = 1


class Slices:
    """The numbers of all slices, which of them are tied, and which are pinned and why."""

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self.count = FIXED + 1
        self.pairs: list[Tensor] = []
        self.pins: list[tuple[Tensor, str]] = []

    def new(self, name: str, axis: int, size: int, groups: int = 1) -> Tensor:
        """Numbers for an axis that has none yet."""
        self.axes.append(Axis(name, axis, self.count, size, groups))
        self.count += size
        return torch.arange(self.count - size, self.count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Let slices go together, element by element; what meets a fixed one is pinned."""
        shape = (a + b).shape
        pairs = torch.stack([a.expand(shape).flatten(), b.expand(shape).flatten()])
        pairs = torch.unique(pairs[:, pairs[0] != pairs[1]], dim=1)
        free = (pairs != FIXED).all(0)
        self.pin(pairs[:, ~free], "meets a tensor whose size is fixed")
        self.pairs.append(pairs[:, free])

    def pin(self, ids: Tensor, reason: str) -> None:
        """These stay."""
        if ids.numel():
            self.pins.append((torch.unique(ids), reason))

    def classes(self) -> Tensor:
        """The class of each slice: the least number in it, found by handing the least number on along ties."""
        label = torch.arange(self.count)
        if not self.pairs:
            return label
        a, b = torch.cat(self.pairs, dim=1)
        while True:
            least = torch.minimum(label[a], label[b])
            new = label.scatter_reduce(0, label[a], least, "amin").scatter_reduce(0, label[b], least, "amin")
            new = new[new]
            if torch.equal(new, label):
                return label
            label = new


def compact(t: Tensor) -> Tensor:
    """The same values with length 1 along every dimension in which they do not vary."""
    for dim in range(t.ndim):
        if t.shape[dim] > 1:
            first = t.narrow(dim, 0, 1)
            if t.stride(dim) == 0 or bool((t == first).all()):
                t = first
    return t


def varying(t: Tensor) -> set[int]:
    """The dimensions in which a compact tensor varies."""
    return {dim for dim, length in enumerate(t.shape) if length > 1}
