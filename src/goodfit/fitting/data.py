"""Batches from what users have: a DataLoader, a Dataset, or a pair of tensors or arrays, batched by index."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from goodfit.errors import GoodfitError
from goodfit.order import ListedOrder, Order
from goodfit.processes import rank, world
from goodfit.rows import mapped, to_device
from goodfit.streams.parquet import Parquet
from goodfit.streams.streamed import Streamed

__all__ = ["Batches", "batches_of", "mapped", "order_of", "peek", "to_device", "uncounted"]


class Batches:
    """Batches (x, y) of tensors, by index: no sample is copied alone, and no batch shares memory with the data.

    x may be a tensor, or a dict or tuple of tensors, with the rows on axis 0.
    """

    def __init__(self, x: Any, y: Tensor, order: Order) -> None:
        self.x, self.y, self.order = x, y, order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for index in self.order:
            yield mapped(self.x, partial(_taken, index)), _taken(index, self.y)


def batches_of(data: Any, name: str, size: int, *, shuffle: bool, seed: int) -> Any:
    """Something to iterate for (x, y) batches; `name` is what an error calls the data."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise GoodfitError(f"batch_size must be an integer >= 1, got batch_size={size!r}.")
    share = (rank(), world()) if shuffle else (0, 1)
    if isinstance(data, DataLoader | Batches):
        _refuse_whole(data, name, shuffle)
        return _counted(data, name)
    if isinstance(data, Parquet):
        files = data.open()
        order = _shared(Order(files.rows, size, shuffle=shuffle, seed=seed, share=share), name)
        return Streamed(files, _counted(order, name), data.memory)
    if isinstance(data, IterableDataset):
        if share[1] > 1 and shuffle:
            raise GoodfitError(f"{name} is a stream, which cannot be shared among processes; give a Dataset or tensors.")
        return DataLoader(data, batch_size=size)
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        data = data.tensors
    if isinstance(data, Dataset):
        rows = ListedOrder(len(data), size, shuffle=shuffle, seed=seed, share=share)  # type: ignore[arg-type]
        return DataLoader(data, batch_sampler=_counted(_shared(rows, name), name))
    if not (isinstance(data, tuple | list) and len(data) == 2):
        shown = f"{type(data).__name__} of {len(data)}" if isinstance(data, tuple | list | dict) else type(data).__name__
        raise GoodfitError(
            f"{name} must be a DataLoader, a Dataset, a gf.Parquet or a pair (x, y) of tensors or arrays, got {shown}."
        )
    x, y = mapped(data[0], lambda values: _tensor(values, name)), _tensor(data[1], name)
    lengths = {len(t) if t.ndim else 0 for t in (*_leaves(x), y)}
    if len(lengths) != 1:
        raise GoodfitError(f"{name} must have as many rows in x as in y, got {sorted(lengths)}.")
    return _counted(Batches(x, y, _shared(Order(len(y), size, shuffle=shuffle, seed=seed, share=share), name)), name)


def peek(batches: Any) -> Any:
    """The first batch, as an example; an order made here does not count it as an epoch."""
    first = next(iter(uncounted(batches)), None)
    if first is None:
        raise GoodfitError("train has no rows; give at least one batch.")
    return first


def uncounted(batches: Any) -> Any:
    """The same batches for a look beside training: an order made here does not count it as an epoch."""
    order = order_of(batches)
    return batches if order is None else _Uncounted(batches, order)


def order_of(batches: Any) -> Order | None:
    """The order that was made here for these batches, None where they have another."""
    order = getattr(batches, "order", None) or getattr(batches, "batch_sampler", None)
    return order if isinstance(order, Order) else None


class _Uncounted:
    def __init__(self, batches: Any, order: Order) -> None:
        self.batches, self.order = batches, order

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        epoch = self.order.epoch
        try:
            yield from self.batches
        finally:
            self.order.epoch = epoch


def _shared(order: Order, name: str) -> Order:
    """Refuse batches of which some process would get no row."""
    least = min(order.size, order.rows)
    if 0 < least < order.share[1]:
        raise GoodfitError(
            f"{order.share[1]} processes share each batch, and those of {name} have {least} rows; give more, or start fewer."
        )
    return order


def _refuse_whole(data: Any, name: str, shuffle: bool) -> None:
    """Refuse a loader that gives several processes the same rows to train on, or others than all to score."""
    sampler = getattr(data, "sampler", None)
    if world() == 1 or sampler is None or order_of(data) is not None:
        return
    split = (getattr(sampler, "rank", 0), getattr(sampler, "num_replicas", 1))
    if shuffle and split != (rank(), world()):
        raise GoodfitError(
            f"{name} must be split among the {world()} processes: give tensors or a Dataset, which goodfit splits, or make the "
            "DataLoader with sampler=DistributedSampler(dataset)."
        )
    if not shuffle and type(sampler) is not SequentialSampler:
        raise GoodfitError(
            f"{name} must give all its rows, in one order, to each of the {world()} processes, which score them by turns; make "
            "the DataLoader without shuffle and sampler."
        )


def _taken(index: Tensor, t: Tensor) -> Tensor:
    return t[index.to(t.device)]


def _leaves(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(x, found.append)
    return found


def _tensor(values: Any, name: str) -> Tensor:
    """Numbers as a tensor, without a copy where torch can read the memory (a read-only memory map, say)."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise GoodfitError(f"{name} must hold numbers, in rows of one length, got dtype {array.dtype}; encode them first.")
    if array.dtype.kind == "f" and array.dtype.itemsize >= 8:
        array = array.astype(torch.empty(0).numpy().dtype, copy=False)
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes: batches are copies
        return torch.from_numpy(array)


def _counted(batches: Any, name: str) -> Any:
    try:
        empty = len(batches) == 0
    except TypeError:  # an iterable dataset has no length
        empty = False
    if empty:
        raise GoodfitError(f"{name} has no rows; give at least one batch.")
    return batches
