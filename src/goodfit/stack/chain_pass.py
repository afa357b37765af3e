"""One pass of K members through a chain: the numbers of each, what its backward needs, and where its gradients go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from goodfit.stack.chain_memory import Memory

__all__ = ["Part", "Pass", "Piece", "Tensors"]

Tensors = Mapping[str, Tensor]


@dataclass
class Pass:
    """What all members have in common.

    moved: the buffers that the pass moves. keeps: whether a backward may follow. draws: the noise of each layer.
    """

    members: int
    params: Tensors
    buffers: Tensors
    moved: tuple[str, ...]
    memory: Memory
    keeps: bool
    draws: dict[Any, Any] = field(default_factory=dict)

    def parts(self, size: int) -> list[Part]:
        """All members, some at a time; where nothing is kept for a backward all parts use the same memory."""
        if size >= self.members:
            return [Part(self, 0, slice(0, self.members), self.params, self.buffers)]
        count = -(-self.members // size)
        params, buffers = _split(self.params, size, count), _split({n: self.buffers[n] for n in self.moved}, size, count)
        spans = [slice(i * size, min(i * size + size, self.members)) for i in range(count)]
        return [Part(self, i * self.keeps, span, params[i], buffers[i]) for i, span in enumerate(spans)]


@dataclass
class Part:
    """Some members whose numbers fit into the cache together.

    What flows has the shape (members, features, rows), rows last: so a sum over the batch runs along memory, and what a feature
    is multiplied by is one number for many in a row. What members share has no first axis.
    """

    whole: Pass
    index: int
    span: slice
    params: Tensors
    buffers: Tensors
    kept: dict[Any, Any] = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)

    @property
    def members(self) -> int:
        return self.span.stop - self.span.start

    def room(self, key: Hashable, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of this part alone, kept until the backward."""
        return self.whole.memory.take((self.index, key), shape, dtype or like.dtype, like.device)

    def scratch(self, key: Hashable, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for the moment, which the next part writes over."""
        return self.whole.memory.take(key, shape, dtype or like.dtype, like.device)


class Piece(ABC):
    """Takes what flows one step further, and a gradient one step back.

    free says of a tensor that a piece may write on it; each tells the same of what it returns.
    """

    @abstractmethod
    def forward(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, bool]:
        """y, from x."""

    @abstractmethod
    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        """The gradient of x from that of y, and those of the parameters; that of x has no meaning where it is not wanted."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return ()

    @property
    def moved(self) -> tuple[str, ...]:
        """The buffers that a pass moves."""
        return ()


def _split(tensors: Tensors, size: int, count: int) -> list[Tensors]:
    cut = {name: t.split(size) for name, t in tensors.items()}
    return [{name: pieces[i] for name, pieces in cut.items()} for i in range(count)]
