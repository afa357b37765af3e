"""Batches from what users have: a DataLoader, a Dataset, or a pair of tensors or arrays, batched by index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from goodfit.errors import GoodfitError
from goodfit.noise import Noise

__all__ = ["Batches", "batches_of", "mapped", "peek", "to_device"]


class Batches:
    """Batches (x, y) of a pair of tensors, by index, without a per-sample collate.

    x may be a tensor, or a dict or tuple of tensors, with the rows on axis 0. With `shuffle` the order of an epoch is a
    pure function of (seed, epoch). A last batch of one row joins the batch before it: a batch norm cannot take it.
    """

    def __init__(self, x: Any, y: Tensor, size: int, *, shuffle: bool = False, seed: int = 0) -> None:
        self.x, self.y, self.size, self.shuffle, self.seed = x, y, size, shuffle, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._bounds())

    def _bounds(self) -> list[tuple[int, int]]:
        n = len(self.y)
        starts = list(range(0, n, self.size))
        if len(starts) > 1 and n % self.size == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], n], strict=True))

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        order = None
        if self.shuffle:
            self.epoch += 1
            generator = Noise(self.seed, "order", self.epoch).generator()
            order = torch.randperm(len(self.y), generator=generator).to(self.y.device)
        for start, stop in self._bounds():
            index = slice(start, stop) if order is None else order[start:stop]
            yield mapped(self.x, itemgetter(index)), self.y[index]


def batches_of(data: Any, name: str, size: int, *, shuffle: bool, seed: int) -> Any:
    """Something to iterate for (x, y) batches; `name` is what an error calls the data."""
    if isinstance(data, DataLoader | Batches):
        return _counted(data, name)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Dataset):
        generator = Noise(seed, "order").generator()
        return _counted(DataLoader(data, batch_size=size, shuffle=shuffle, generator=generator), name)
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise GoodfitError(
            f"{name} must be a DataLoader, a Dataset or a pair (x, y) of tensors or arrays, got {type(data).__name__}."
        )
    x, y = mapped(data[0], _tensor), _tensor(data[1])
    rows = {len(t) for t in _leaves(x)} | {len(y)}
    if len(rows) != 1:
        raise GoodfitError(f"{name} must have as many rows in x as in y, got {sorted(rows)}.")
    return _counted(Batches(x, y, size, shuffle=shuffle, seed=seed), name)


def peek(batches: Any) -> Any:
    """The first batch, as an example; an epoch of `Batches` does not count for it."""
    plain = Batches(batches.x, batches.y, batches.size) if isinstance(batches, Batches) else batches
    return next(iter(plain))


def to_device(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    """An (x, y) batch on a device; refuses another shape of batch."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        shown = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list | dict) else type(batch).__name__
        raise GoodfitError(f"A batch must be a pair (x, y), got a {shown}.")
    x = tuple(batch[0]) if isinstance(batch[0], list) else batch[0]
    return mapped(x, lambda t: t.to(device, non_blocking=True)), batch[1].to(device, non_blocking=True)


def mapped(x: Any, f: Callable[[Any], Any]) -> Any:
    """Apply `f` to each tensor of a nested dict or tuple."""
    if isinstance(x, dict):
        return {k: mapped(v, f) for k, v in x.items()}
    return tuple(mapped(v, f) for v in x) if isinstance(x, tuple) else f(x)


def _leaves(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(x, found.append)
    return found


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise GoodfitError(f"Arrays must hold numbers, got dtype {array.dtype}; encode them first.")
    if array.dtype == np.float64:
        array = array.astype(torch.empty(0).numpy().dtype)
    return torch.as_tensor(array if array.flags.writeable else array.copy())


def _counted(batches: Any, name: str) -> Any:
    try:
        empty = len(batches) == 0
    except TypeError:  # an iterable dataset has no length
        empty = False
    if empty:
        raise GoodfitError(f"{name} has no rows; give at least one batch.")
    return batches
