"""Which weights belong together: groups that a penalty or a constraint takes as one.

`units` are output units and filters, `inputs` the features that a layer reads, `heads()` those of attention, and `custom`
whatever ids say. How a parameter is cut follows from the type of the module that owns it. Values are frozen, and print as
they are written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.axes import head_ids, input_ids, unit_ids
from goodfit.errors import GoodfitError, nearest
from goodfit.factors import frozen, thawed
from goodfit.where import Where, owners

__all__ = ["Groups", "Layout", "custom", "heads", "inputs", "units"]

MOST = 10_000_000
Ids = dict[str, tuple[Any, Tensor]]  # of a parameter: who shares the numbering, and an id that broadcasts to its shape


class Layout:
    """Groups laid out over weights: every group has one number, across all weights that hold a part of it."""

    def __init__(self, ids: Ids, shapes: Mapping[str, torch.Size], text: str) -> None:
        self.text = text
        self.ids: dict[str, Tensor] = {}
        starts: dict[Any, int] = {}
        self.count = 0
        for share, one in ids.values():
            starts[share] = max(starts.get(share, 0), int(one.max()) + 1)
        for share, length in starts.items():
            starts[share], self.count = self.count, self.count + length
        for name, (share, one) in ids.items():
            self.ids[name] = one + starts[share]
        self._sizes = {n: self._sum(torch.ones(shapes[n], dtype=torch.float64), n) for n in self.ids}

    def __repr__(self) -> str:
        return self.text

    def sizes(self, names: Iterable[str], like: Tensor) -> Tensor:
        """How many numbers of these weights each group has."""
        return sum((self._sizes[n] for n in names if n in self.ids), torch.zeros(self.count, dtype=torch.float64)).to(like)

    def sums(self, values: Mapping[str, Tensor]) -> Tensor:
        """The sum of the values within each group."""
        like = next(iter(values.values()))
        return sum((self._sum(v, n) for n, v in values.items() if n in self.ids), like.new_zeros(self.count))

    def split(self, parts: Iterable[Iterable[str]]) -> bool:
        """Whether some group has weights in several of the parts."""
        found = [{group for n in names if n in self.ids for group in self.ids[n].flatten().tolist()} for names in parts]
        return len(set().union(*found)) < sum(map(len, found))

    def spread(self, numbers: Tensor, name: str) -> Tensor:
        """The number of its group for each number of a weight, in a shape that broadcasts to the weight's."""
        return numbers[self.ids[name].to(numbers.device)]

    def _sum(self, value: Tensor, name: str) -> Tensor:
        ids = self.ids[name].to(value.device)
        shared = [axis for axis, length in enumerate(ids.shape) if length == 1]
        folded = value.sum(shared, keepdim=True) if shared else value
        return torch.zeros(self.count, dtype=value.dtype, device=value.device).index_add(0, ids.flatten(), folded.flatten())


class Groups(ABC):
    """How weights are cut into groups."""

    @abstractmethod
    def ids(self, name: str, weight: Tensor, owner: nn.Module | None, local: str) -> tuple[Any, Tensor] | None:
        """Who shares the numbering, and the ids, broadcastable to the weight; None where it has no such groups.

        Without an `owner` the first axis is that of the units and the second that of the inputs.
        """

    def layout(self, weights: Mapping[str, Tensor], model: nn.Module | None = None) -> Layout:
        """The groups over these weights; with the model that owns them, by the types of its modules."""
        known = {} if model is None else owners(model)
        found = {n: self.ids(n, w, *known.get(n, (None, n.rpartition(".")[2]))) for n, w in weights.items()}
        ids = {n: one for n, one in found.items() if one is not None}
        if not ids:
            raise GoodfitError(f"groups={self!r} fits none of the weights {', '.join(list(weights)[:8])}; see gf.groups.")
        return Layout(ids, {n: weights[n].shape for n in ids}, repr(self))


@dataclass(frozen=True, repr=False)
class _Along(Groups):
    name: str

    def __repr__(self) -> str:
        return self.name

    def ids(self, name: str, weight: Tensor, owner: nn.Module | None, local: str) -> tuple[Any, Tensor] | None:
        part, ids = (unit_ids if self.name == "units" else input_ids)(weight, owner, local)
        return (id(owner) if part and owner is not None else name, part), ids


@dataclass(frozen=True, repr=False)
class _Heads(Groups):
    count: int | None = None
    rows: Where | None = None
    columns: Where | None = None

    def __repr__(self) -> str:
        return "heads()" if self.count is None else f"heads({self.count!r}, rows={self.rows!r}, columns={self.columns!r})"

    def ids(self, name: str, weight: Tensor, owner: nn.Module | None, local: str) -> tuple[Any, Tensor] | None:
        if self.count is None:
            found = head_ids(weight, owner, local)
            return None if found is None else (id(owner), found)
        for axis, where in enumerate((self.rows, self.columns)):
            if where is not None and where.holds(name, "kernel") and weight.ndim > axis:
                length = weight.shape[axis]
                if length % self.count:
                    raise GoodfitError(f"heads({self.count}) must divide axis {axis} of {name}, got {length}.")
                ids = torch.arange(length) // (length // self.count)
                return name.rsplit(".", 2)[0], ids.view([-1 if a == axis else 1 for a in range(weight.ndim)])
        return None


@dataclass(frozen=True, repr=False)
class _Custom(Groups):
    numbers: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        return f"custom({ {name: thawed(numbers) for name, numbers in self.numbers}!r})"

    def ids(self, name: str, weight: Tensor, owner: nn.Module | None, local: str) -> tuple[Any, Tensor] | None:
        known = dict(self.numbers)
        if name not in known:
            return None
        ids = torch.tensor(thawed(known[name]))
        ids = ids.view([1] * (weight.ndim - ids.ndim) + list(ids.shape))
        if ids.ndim != weight.ndim or any(i not in (1, w) for i, w in zip(ids.shape, weight.shape, strict=True)):
            raise GoodfitError(f"custom({name!r}) must broadcast to {tuple(weight.shape)}, got shape {tuple(ids.shape)}.")
        return "", ids

    def layout(self, weights: Mapping[str, Tensor], model: nn.Module | None = None) -> Layout:
        missing = next((name for name, _ in self.numbers if name not in weights), None)
        if missing is not None:
            raise GoodfitError(f"custom names {missing!r}, which is not among the weights; {nearest(missing, weights)}")
        return super().layout(weights, model)


units: Groups = _Along("units")
inputs: Groups = _Along("inputs")


def heads(count: int | None = None, *, rows: Where | None = None, columns: Where | None = None) -> Groups:
    """Attention heads: of every nn.MultiheadAttention, or cut from layers of one's own.

    For layers of one's own: `heads(12, rows=named("*.[qkv]_proj.weight"), columns=named("*.o_proj.weight"))` cuts the rows of
    the projections in and the columns of the projection out into 12; layers of one parent module share their heads.
    """
    own = count is not None or rows is not None or columns is not None
    if own and not (isinstance(count, int) and count > 0 and any(isinstance(w, Where) for w in (rows, columns))):
        shown = f"heads({count!r}, rows={rows!r}, columns={columns!r})"
        raise GoodfitError(f"heads takes nothing, or a count >= 1 and selectors of rows and columns, got {shown}.")
    return _Heads(count, rows, columns)


def custom(ids: Mapping[str, Any]) -> Groups:
    """Groups by name of the weight: whole numbers >= 0 as nested lists that broadcast to its shape; equal ids are one group.

    >>> custom({"0.weight": [0, 0, 1]}).layout({"0.weight": torch.ones(5, 3)}).sums({"0.weight": torch.ones(5, 3)})
    tensor([10.,  5.])
    """
    if not isinstance(ids, Mapping):
        raise GoodfitError(f"custom takes ids by name of the weight, as in custom({{'0.weight': [0, 0, 1]}}), got {ids!r:.60}.")
    kept = []
    for name, numbers in ids.items():
        try:
            tensor = torch.as_tensor(numbers)
        except (TypeError, ValueError, RuntimeError):
            tensor = torch.empty(0)
        whole = tensor.numel() > 0 and not tensor.is_floating_point() and not tensor.is_complex()
        if not whole or int(tensor.min()) < 0 or int(tensor.max()) >= MOST:
            raise GoodfitError(f"custom({name!r}) must hold whole numbers from 0 to {MOST - 1:,}, got {numbers!r:.60}.")
        kept.append((str(name), frozen(tensor.to(torch.int64).tolist())))
    return _Custom(tuple(kept))
