"""Memory that one step leaves to the next: fresh pages cost more than what is written on them."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

__all__ = ["Lease", "Memory", "Pool"]


_KEPT = 4


class Memory:
    """Tensors by what they are for, in passes of one shape: what is asked for again is the same tensor, with what it held."""

    def __init__(self, shape: Hashable) -> None:
        self.shape = shape
        self.held: dict[Hashable, Tensor] = {}

    def take(self, key: Hashable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        held = self.held.get(key)
        if held is None:
            held = self.held[key] = torch.empty(shape, dtype=dtype, device=device)
        return held


class Pool:
    """Memories that no pass needs for its backward any more, those of a few shapes of a pass: the last batch may be short."""

    def __init__(self) -> None:
        self.free: list[Memory] = []

    def lease(self, shape: Hashable) -> Lease:
        """A memory for a pass of this shape."""
        found = next((memory for memory in reversed(self.free) if memory.shape == shape), None)
        if found is not None:
            self.free.remove(found)
        return Lease(self, found or Memory(shape))


class Lease:
    """A memory that belongs to one pass, until its backward has run or nobody can run it any more."""

    def __init__(self, pool: Pool, memory: Memory) -> None:
        self.pool, self.memory, self.returned = pool, memory, False

    def give_back(self) -> None:
        if not self.returned:
            self.returned = True
            self.pool.free.append(self.memory)
            del self.pool.free[:-_KEPT]

    def __del__(self) -> None:
        self.give_back()
