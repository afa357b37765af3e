"""Batches of a stream: the rows held at once are shuffled, and what is left of them goes into the next ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from goodfit.errors import GoodfitError
from goodfit.order import Order
from goodfit.streams.files import Files

__all__ = ["Streamed"]


class Streamed:
    """Batches (x, y) of files, of the sizes of an order; `memory` bytes of rows are held at most."""

    def __init__(self, files: Files, order: Order, memory: float) -> None:
        self.files, self.order = files, order
        number = torch.empty(0).element_size()
        each = number * len(files.inputs) + (number if files.real else 8) + 8  # and its place in the order
        self.capacity = min(int(memory // each), files.rows)
        if self.capacity < min(2 * order.size, files.rows):
            raise GoodfitError(
                f"Parquet.memory must hold two batches of {order.size} rows, {2 * order.size * each} bytes, got {int(memory)}; "
                "give more, or a smaller batch_size."
            )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = self.order.begin()
        held = _Held(self.files, self.capacity, generator)
        which, of = self.order.share
        for number in range(len(self)):
            size = self.order.size if number + 1 < len(self) else self.order.rows - number * self.order.size
            rows = held.take(size)[which::of]
            yield held.x[rows], held.y[rows]


class _Held:
    """The rows that are in memory, and an order of those that are still to come."""

    def __init__(self, files: Files, capacity: int, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.x = torch.empty(capacity, len(files.inputs))
        self.y = torch.empty(capacity, dtype=self.x.dtype if files.real else torch.int64)
        self.order = torch.empty(0, dtype=torch.int64)
        self.slices = files.slices(generator)
        self.pending: tuple[list[Any], Any] | None = None

    def take(self, size: int) -> Tensor:
        """The places of the next so many rows; they stay there until the next call."""
        if len(self.order) < size:
            self._fill()
        rows, self.order = self.order[:size], self.order[size:]
        return rows

    def _fill(self) -> None:
        count, capacity = len(self.order), len(self.y)
        self.x[:count], self.y[:count] = self.x[self.order], self.y[self.order]
        while count < capacity and (found := self.pending or next(self.slices, None)):
            inputs, target = found
            fits = min(capacity - count, len(target))
            place = slice(count, count + fits)
            for column, values in zip(self.x.numpy()[place].T, inputs, strict=True):
                with np.errstate(over="ignore"):  # a number beyond the dtype is inf, which fit names
                    column[:] = values[:fits]
            self.y.numpy()[place] = target[:fits]
            self.pending = ([values[fits:] for values in inputs], target[fits:]) if fits < len(target) else None
            count += fits
        drawn = self.generator
        self.order = torch.arange(count) if drawn is None else torch.randperm(count, generator=drawn)
