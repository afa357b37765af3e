"""Which rows each batch of an epoch holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from goodfit.noise import Noise

__all__ = ["ListedOrder", "Order"]


class Order:
    """Which rows each batch of an epoch holds, as index tensors.

    With `shuffle` the order of an epoch is a pure function of (seed, epoch). A last batch of one row joins the batch
    before it: a batch norm cannot take it.
    share: (which, of how many) processes, each of which has its share of every batch, of `each` rows at least: a last batch
    of fewer joins the one before, too.
    """

    def __init__(self, rows: int, size: int, *, shuffle: bool = False, seed: int = 0, share: tuple[int, int] = (0, 1)) -> None:
        self.rows, self.size, self.shuffle, self.seed, self.share = rows, size, shuffle, seed, share
        self.epoch, self.each = 0, 1

    @property
    def joins(self) -> int:
        """How many rows at the end are too few for a batch, and join the one before."""
        rest = self.rows % self.size
        return rest if rest < max(2, self.each * self.share[1]) and self.rows > self.size else 0

    def __len__(self) -> int:
        return -(-(self.rows - self.joins) // self.size)

    def begin(self) -> torch.Generator | None:
        """Begin the next epoch: what its order is drawn from, None where it is that of the data."""
        if not self.shuffle:
            return None
        self.epoch += 1
        return Noise(self.seed, "order", self.epoch).generator()

    def __iter__(self) -> Iterator[Any]:
        generator = self.begin()
        rows = torch.arange(self.rows) if generator is None else torch.randperm(self.rows, generator=generator)
        for i in range(len(self)):
            batch = rows[i * self.size : (i + 1) * self.size if i + 1 < len(self) else None]
            yield batch[self.share[0] :: self.share[1]]


class ListedOrder(Order):
    """The same as lists, which a DataLoader can hand to a Dataset."""

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.tolist() for rows in super().__iter__())
