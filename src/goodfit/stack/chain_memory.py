"""Memory that one step leaves to the next: fresh pages cost more than what is written on them."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

__all__ = ["Lease", "Memory", "Pool"]


class Memory:
    """Tensors by what they are for. One that is asked for again in the same shape is the same tensor, with what it held."""

    def __init__(self) -> None:
        self.held: dict[Hashable, Tensor] = {}

    def take(self, key: Hashable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        held = self.held.get(key)
        if held is None or held.shape != shape or held.dtype != dtype or held.device != device:
            held = self.held[key] = torch.empty(shape, dtype=dtype, device=device)
        return held


class Pool:
    """Memories that no pass needs for its backward any more."""

    def __init__(self) -> None:
        self.free: list[Memory] = []

    def lease(self) -> Lease:
        return Lease(self, self.free.pop() if self.free else Memory())


class Lease:
    """A memory that belongs to one pass, until its backward has run or nobody can run it any more."""

    def __init__(self, pool: Pool, memory: Memory) -> None:
        self.pool, self.memory, self.returned = pool, memory, False

    def give_back(self) -> None:
        if not self.returned:
            self.returned = True
            self.pool.free.append(self.memory)

    def __del__(self) -> None:
        self.give_back()
